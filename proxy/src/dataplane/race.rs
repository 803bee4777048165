//! Which side of a connection speaks first, where nobody declared what a port speaks: while a client is silent, its server
//! is connected to and listened to as well, so that the greeting of a mail server or a database need not wait for the
//! silence to end.
//!
//! Sources: RFC 9113 3.4 (a server may send its settings before it heard anything), RFC 9110 15.5.9 (408).
//! Invariants: not a byte goes to the server before it is clear what the connection is, and not one is lost of what either
//! side said; what HTTP servers say unasked does not make a connection opaque.

use std::io;
use std::pin::Pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use tokio::io::AsyncReadExt as _;
use tokio::time::{Instant, sleep_until, timeout};

use super::http::record::Ends;
use super::http::reject::Reject;
use super::pool::Opaque;
use super::sniff::{Prefixed, SILENCE_MAX, Sniffed, Sniffer};
use super::tcp::IDLE_MAX;
use crate::base::net::BoxedIo;

/// The other side of an opaque connection: who it is, and the way to it.
pub(crate) struct Reached {
    pub(crate) ends: Ends,
    pub(crate) upstream: Result<Opaque, Reject>,
}

/// A connection to the server on its way.
pub(crate) type Reaching<'a> = Pin<Box<dyn Future<Output = Reached> + Send + 'a>>;

/// What is known when one side spoke, or neither did in time.
pub(crate) struct Met<'a> {
    pub(crate) sniffed: Sniffed,
    /// What the client said so far.
    pub(crate) first: Bytes,
    /// The way to the server, where it was begun. Of use to an opaque connection alone.
    pub(crate) ahead: Option<Ahead<'a>>,
    /// The server's own words, and no HTTP, came first.
    pub(crate) server_first: bool,
}

/// A server that is connected to before it is known whether the connection will be used.
pub(crate) struct Ahead<'a> {
    way: Way<'a>,
    said: BytesMut,
}

enum Way<'a> {
    Reaching(Reaching<'a>),
    Reached(Reached),
}

/// What a server's first words are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Words {
    /// What an HTTP server may say before it is asked. The client still decides.
    Http,
    Other,
    /// It closed, or is not there.
    Gone,
    /// There is nobody to listen to, and the time is up.
    Late,
}

/// Listens to the client for `quiet`; if it said nothing that tells by then, connects to the server with `reach`, and
/// listens to both, for as long as both are silent and there: a client that waits before its first request is still one that
/// makes requests.
///
/// # Errors
/// The client's connection broke.
pub(crate) async fn meet<'a>(io: &mut BoxedIo, quiet: Duration, reach: impl FnOnce() -> Reaching<'a>) -> io::Result<Met<'a>> {
    let begun = Instant::now();
    let mut sniffer = Sniffer::new(IDLE_MAX);
    // A timer of no time rings with the next millisecond.
    let early = match quiet {
        Duration::ZERO => sniffer.sniff(io).now_or_never(),
        quiet => timeout(quiet, sniffer.sniff(io)).await.ok(),
    };
    if let Some(sniffed) = early {
        return Ok(Met::client(sniffed?, sniffer.into_bytes()));
    }
    let mut ahead = Some(Ahead { way: Way::Reaching(reach()), said: BytesMut::new() });
    let mut gone = false;
    loop {
        let words = async {
            match &mut ahead {
                Some(ahead) if !gone => ahead.speaks().await,
                _nobody => {
                    sleep_until(begun + SILENCE_MAX).await;
                    Words::Late
                }
            }
        };
        // Both arms are cancel-safe. The client's bytes are looked at first: what it said before the server did, tells.
        tokio::select! {
            biased;
            sniffed = sniffer.sniff(io) => {
                let sniffed = sniffed?;
                let ahead = ahead.filter(|_| matches!(sniffed, Sniffed::Opaque | Sniffed::Tls));
                return Ok(Met { sniffed, first: sniffer.into_bytes(), ahead, server_first: false });
            }
            words = words => match words {
                Words::Http => ahead = None,
                Words::Gone => gone = true,
                Words::Late => {
                    let (sniffed, first) = sniffer.settled();
                    return Ok(Met { sniffed, first, ahead, server_first: false });
                }
                Words::Other => {
                    return Ok(Met { sniffed: Sniffed::Opaque, first: sniffer.into_bytes(), ahead, server_first: true });
                }
            },
        }
    }
}

impl Met<'_> {
    /// The client's own words told, or its silence did.
    pub(crate) fn client(sniffed: Sniffed, first: Bytes) -> Self {
        Self { sniffed, first, ahead: None, server_first: false }
    }
}

impl Ahead<'_> {
    /// Returns when the server said what tells, or is known not to say anything. Cancel-safe.
    async fn speaks(&mut self) -> Words {
        if let Way::Reaching(reaching) = &mut self.way {
            self.way = Way::Reached(reaching.await);
        }
        if let Way::Reached(Reached { upstream: Ok(upstream), .. }) = &mut self.way {
            loop {
                if let Some(words) = words(&self.said) {
                    return words;
                }
                match upstream.io.read_buf(&mut self.said).await {
                    Ok(read) if read > 0 => {}
                    _ended if self.said.is_empty() => break,
                    _ended => return Words::Other,
                }
            }
        }
        Words::Gone
    }

    /// The server, once it is reached; what it said is read again.
    pub(crate) async fn reached(self) -> Reached {
        let Reached { ends, upstream } = match self.way {
            Way::Reaching(reaching) => reaching.await,
            Way::Reached(reached) => reached,
        };
        let said = self.said.freeze();
        let upstream = upstream.map(|Opaque { io, vouched, slot }| Opaque { io: Prefixed::join(said, io), vouched, slot });
        Reached { ends, upstream }
    }
}

/// What a server's first words are; `None` while more of them are needed.
fn words(bytes: &[u8]) -> Option<Words> {
    if bytes.starts_with(ANSWER) {
        return Some(Words::Http);
    }
    if ANSWER.starts_with(bytes) {
        return None;
    }
    // A frame of SETTINGS: its length, a multiple of 6 that fits into one byte, its type, no flag, stream 0.
    let settings = match bytes {
        [0, 0, length, 4, rest @ ..] => length.is_multiple_of(6) && rest.iter().take(SETTINGS_REST).all(|byte| *byte == 0),
        [0, 0, _] | [0, 0] | [0] => true,
        _other => false,
    };
    match settings {
        true if bytes.len() < SETTINGS_HEAD => None,
        true => Some(Words::Http),
        false => Some(Words::Other),
    }
}

const ANSWER: &[u8] = b"HTTP/1.";
const SETTINGS_HEAD: usize = 9;
/// The flags and the stream's number.
const SETTINGS_REST: usize = 5;
/// How long a client may be silent before its server is listened to as well. Clients that speak first do so with their
/// handshake's last packet or right behind it.
pub(crate) const QUIET: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_servers_of_http_say_unasked_is_known() {
        for (bytes, told) in [
            (b"".as_slice(), None),
            (b"HTTP", None),
            (b"HTTP/1.1 408 Request Timeout\r\n", Some(Words::Http)),
            (b"HTTP/0", Some(Words::Other)),
            (b"\0\0\x0c\x04\0", None),
            (b"\0\0\x0c\x04\0\0\0\0\0\0\x03\0\0\0\x64", Some(Words::Http)),
            (b"\0\0\x0c\x04\x01\0\0\0\0", Some(Words::Other)),
            (b"\0\0\x0b\x04\0\0\0\0\0", Some(Words::Other)),
            (b"\x4a\0\0\0\x0a8.0.36\0", Some(Words::Other)),
            (b"220 mail ESMTP\r\n", Some(Words::Other)),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Some(Words::Other)),
            (b"N", Some(Words::Other)),
        ] {
            assert_eq!(words(bytes), told, "{:?}", String::from_utf8_lossy(bytes));
        }
    }
}
