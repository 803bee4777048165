//! Whether a client is still there while nothing is read from it.
//!
//! The codec of HTTP/1 reads nothing while an answer is made, so it hears of an end only when it writes. Who asked what is
//! answered late, or never, would keep its place in every limit until then, and the application would work for nobody.
//!
//! Sources: RFC 9112 9.6 (either end may close at any time), RFC 9293 3.6 (one that closes may still read).
//! Invariant: no byte is taken from the socket, and its readiness is never put out while bytes wait in it: the codec reads
//! them when it is their turn.

use std::io;
use std::task::{Context, Poll};

use futures_util::FutureExt as _;
use tokio::io::{Interest, ReadBuf};
use tokio::net::TcpStream;

/// What is to be seen of a client without reading from it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Sight {
    /// It is there. Who looked is woken when that changes.
    There,
    /// Bytes wait that it sent ahead. Nobody is woken when it leaves: it is to be looked for again.
    Ahead,
    /// It sends no more. Whether it reads yet, only writing shows.
    Ended,
}

/// Looks at the client at the other end of a socket; with `ahead` not further than is known without asking the kernel, for
/// bytes wait there, or somebody reads them. Its reset is an error.
pub(super) fn look(socket: &TcpStream, ahead: bool, cx: &mut Context<'_>) -> io::Result<Sight> {
    if !ahead {
        match socket.poll_peek(cx, &mut ReadBuf::new(&mut [0])) {
            Poll::Pending => return Ok(Sight::There),
            Poll::Ready(Ok(0)) => return Ok(Sight::Ended),
            Poll::Ready(bytes) => drop(bytes?),
        }
    }
    let Some(ready) = socket.ready(Interest::READABLE | Interest::WRITABLE).now_or_never() else { return Ok(Sight::Ahead) };
    let ready = ready?;
    if ready.is_write_closed() {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    Ok(if ready.is_read_closed() { Sight::Ended } else { Sight::Ahead })
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::timeout;

    use super::*;
    use crate::dataplane::world::over_tcp;

    /// Waits as somebody does who looks whenever it is woken.
    async fn until_seen(socket: &TcpStream, ahead: bool) -> io::Result<Sight> {
        let seen = poll_fn(|cx| match look(socket, ahead, cx) {
            Ok(Sight::There) => Poll::Pending,
            seen => Poll::Ready(seen),
        });
        timeout(Duration::from_secs(10), seen).await.expect("nobody was woken")
    }

    /// The same, of somebody who is not woken and looks from time to time.
    async fn until_changed(socket: &TcpStream) -> io::Result<Sight> {
        for _ in 0..1_000 {
            let seen = poll_fn(|cx| Poll::Ready(look(socket, true, cx))).await;
            if !matches!(seen, Ok(Sight::Ahead)) {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("nothing was seen");
    }

    #[tokio::test]
    async fn a_client_that_resets_and_one_that_ends_are_seen_at_once_and_one_that_waits_is_there() {
        for resets in [true, false] {
            let (client, server) = over_tcp().await;
            let seen = poll_fn(|cx| Poll::Ready(look(&server, false, cx))).await;
            assert_eq!(seen.unwrap(), Sight::There);
            if resets {
                client.set_zero_linger().unwrap();
            }
            let ((), seen) = tokio::join!(async move { drop(client) }, until_seen(&server, false));
            let seen = seen.map_err(|error| error.kind());
            assert_eq!(seen, if resets { Err(io::ErrorKind::ConnectionReset) } else { Ok(Sight::Ended) });
        }
    }

    #[tokio::test]
    async fn bytes_that_were_sent_ahead_are_left_where_they_are_and_an_end_behind_them_is_seen() {
        for resets in [true, false] {
            let (mut client, mut server) = over_tcp().await;
            client.write_all(b"ahead").await.unwrap();
            assert_eq!(until_seen(&server, false).await.unwrap(), Sight::Ahead);
            let mut bytes = [0; 2];
            server.read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, b"ah");
            assert_eq!(until_seen(&server, false).await.unwrap(), Sight::Ahead);
            if resets {
                client.set_zero_linger().unwrap();
            }
            drop(client);
            let seen = until_changed(&server).await.map_err(|error| error.kind());
            if resets {
                assert_eq!(seen, Err(io::ErrorKind::ConnectionReset));
            } else {
                assert_eq!(seen, Ok(Sight::Ended));
                let mut rest = Vec::new();
                server.read_to_end(&mut rest).await.unwrap();
                assert_eq!(rest, b"ead");
            }
        }
    }
}
