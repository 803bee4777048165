//! First bytes tell what a client speaks. Sans-IO at heart; the one reader is bounded in bytes and time.
//!
//! Sources: RFC 8446 5.1 (record header), RFC 9112 3 (request line), RFC 9113 3.4 (connection preface). What is not
//! surely one of them is opaque: a protocol in which the server speaks first must not wait for long.

use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, timeout_at};

use crate::base::net::BoxedIo;

/// What a connection speaks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Sniffed {
    /// A TLS handshake record with a ClientHello in it.
    Tls,
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// None of them, or nothing at all in time.
    Opaque,
}

/// What the first bytes are; `None` while more of them are needed.
pub(crate) fn classify(bytes: &[u8]) -> Option<Sniffed> {
    if *bytes.first()? == TLS_HANDSHAKE {
        return tls(bytes);
    }
    if let Some(answer) = preface(bytes) {
        return answer;
    }
    request_line(bytes)
}

/// What the first bytes are when no more will come in time: a beginning that only one protocol has is that protocol.
pub(crate) fn settle(bytes: &[u8]) -> Sniffed {
    if let Some(answer) = classify(bytes) {
        return answer;
    }
    // Whoever sends a request in two parts shall not choose that nobody looks into the connection.
    let line = without_blanks(bytes);
    let method = line.split(|byte| !is_token(*byte)).next().unwrap_or_default();
    let begins = |known: &&[u8]| known.starts_with(method) && (*known == method || method.len() == line.len());
    match METHODS.iter().any(begins) {
        _ if bytes.is_empty() => Sniffed::Opaque,
        true => Sniffed::Http1,
        false if PREFACE.starts_with(bytes) => Sniffed::Http2,
        false => Sniffed::Opaque,
    }
}

/// Reads the first bytes of a client, and keeps them for whoever serves its connection.
#[derive(Debug)]
pub(crate) struct Sniffer {
    bytes: BytesMut,
    until: Instant,
}

impl Sniffer {
    /// Waits at most `wait` for the first byte, and [`SILENCE_MAX`] from there.
    pub(crate) fn new(wait: Duration) -> Self {
        Self { bytes: BytesMut::new(), until: Instant::now() + wait }
    }

    /// Reads until it is clear what the client speaks, or the time is up. Cancel-safe: what was read stays here.
    ///
    /// # Errors
    /// The connection broke.
    pub(crate) async fn sniff(&mut self, io: &mut BoxedIo) -> io::Result<Sniffed> {
        loop {
            if let Some(answer) = classify(&self.bytes) {
                return Ok(answer);
            }
            if self.bytes.len() >= BYTES_MAX {
                return Ok(settle(&self.bytes));
            }
            let silent = self.bytes.is_empty();
            match timeout_at(self.until, poll_fn(|cx| poll_more(io, &mut self.bytes, cx))).await {
                // The end of what the client sends, or of the time: what is there has to do.
                Err(_) | Ok(Ok(0)) => return Ok(settle(&self.bytes)),
                Ok(Ok(_)) if silent => self.until = Instant::now() + SILENCE_MAX,
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(error),
            }
        }
    }

    /// What it is, as far as it came, and what was read.
    pub(crate) fn settled(self) -> (Sniffed, Bytes) {
        (settle(&self.bytes), self.into_bytes())
    }

    /// What was read.
    pub(crate) fn into_bytes(self) -> Bytes {
        self.bytes.freeze()
    }
}

/// Reads once. There is room only while there is something to read: whoever is silent may be so for hours.
fn poll_more(io: &mut BoxedIo, bytes: &mut BytesMut, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    let mut room = [MaybeUninit::uninit(); FIRST_READ];
    let mut room = ReadBuf::uninit(&mut room);
    ready!(Pin::new(io).poll_read(cx, &mut room))?;
    bytes.extend_from_slice(room.filled());
    Poll::Ready(Ok(room.filled().len()))
}

/// A stream whose first bytes were read already.
pub(crate) struct Prefixed {
    prefix: Bytes,
    inner: BoxedIo,
}

impl Prefixed {
    /// Reads `prefix`, then `inner`.
    pub(crate) fn join(prefix: Bytes, inner: BoxedIo) -> BoxedIo {
        if prefix.is_empty() { inner } else { Box::new(Self { prefix, inner }) }
    }
}

impl AsyncRead for Prefixed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let length = self.prefix.len().min(buf.remaining());
        if let Some(bytes) = self.prefix.get(..length) {
            buf.put_slice(bytes);
        }
        self.prefix.advance(length);
        if self.prefix.is_empty() {
            // The buffer's memory is not kept for the life of the connection.
            self.prefix = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Prefixed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// A handshake record (22) of version 3.x that begins with a ClientHello (1).
fn tls(bytes: &[u8]) -> Option<Sniffed> {
    match bytes {
        [_, major, ..] if *major != 3 => Some(Sniffed::Opaque),
        [_, _, minor, ..] if *minor > 4 => Some(Sniffed::Opaque),
        [_, _, _, _, _, 1, ..] => Some(Sniffed::Tls),
        [_, _, _, _, _, _other, ..] => Some(Sniffed::Opaque),
        _shorter => None,
    }
}

/// `None`: not the preface. `Some(None)`: it may become it.
#[expect(clippy::option_option, reason = "three answers: no, not yet, yes")]
fn preface(bytes: &[u8]) -> Option<Option<Sniffed>> {
    if bytes.starts_with(PREFACE) {
        Some(Some(Sniffed::Http2))
    } else if PREFACE.starts_with(bytes) {
        Some(None)
    } else {
        None
    }
}

fn request_line(bytes: &[u8]) -> Option<Sniffed> {
    let line = without_blanks(bytes);
    let full = bytes.len() >= BYTES_MAX;
    if line.is_empty() {
        return full.then_some(Sniffed::Http1);
    }
    let token = line.iter().take_while(|byte| is_token(**byte)).count();
    let known = line.get(..token).is_some_and(|method| METHODS.contains(&method));
    match line.get(token) {
        None if token <= METHOD_MAX && !full => return None,
        Some(b' ' | b'\t') if (1..=METHOD_MAX).contains(&token) => {}
        // Not a line's end: what stands behind it is of another line.
        Some(byte) if known && *byte != b'\n' && is_blank_to_some(*byte) => {}
        _not_a_method => return Some(Sniffed::Opaque),
    }
    let target = line.get(token + 1..).unwrap_or_default();
    let line_end = line.iter().position(|byte| *byte == b'\n');
    // A control byte does not belong into a request line, whether its end was read or not.
    let control = || line.iter().take(line_end.unwrap_or(line.len())).any(|byte| *byte < b' ' && *byte != b'\r');
    if !known && control() {
        return Some(Sniffed::Opaque);
    }
    match line_end {
        Some(end) => {
            let line = line.get(..end).unwrap_or_default();
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let version = line.len().checked_sub(VERSION.len() + 1).and_then(|start| line.get(start..));
            let http =
                version.is_some_and(|version| version.starts_with(VERSION) && version.last().is_some_and(u8::is_ascii_digit));
            // What is surely meant as a request and is none is refused as one: its sender shall not choose, by a blank at the
            // line's end or a version of its own, that nobody looks into the connection.
            let names = |part: &[u8]| {
                part.split_first().is_some_and(|(blank, name)| is_blank_to_some(*blank) && name.eq_ignore_ascii_case(NAME))
            };
            let meant = || known && (target.starts_with(b"/") || line.windows(NAME.len() + 1).any(names));
            Some(if http || meant() { Sniffed::Http1 } else { Sniffed::Opaque })
        }
        // A target longer than what is read here, of a method that only HTTP has.
        None if full => Some(if known { Sniffed::Http1 } else { Sniffed::Opaque }),
        None => None,
    }
}

/// What stands behind the line breaks and blanks before a request line: "a server ... SHOULD ignore at least one empty line"
/// (RFC 9112 2.2), and there are servers that ignore more: all that is white space to their language.
fn without_blanks(bytes: &[u8]) -> &[u8] {
    let blanks = bytes.iter().take_while(|byte| matches!(byte, 0x09..=0x0d | 0x1c..=0x20 | 0x85 | 0xa0)).count();
    bytes.get(blanks..).unwrap_or_default()
}

/// Does a server take this byte for one between the parts of a request line? There are those that split it at whatever is white
/// space to their language: other control bytes, and some beyond ASCII.
fn is_blank_to_some(byte: u8) -> bool {
    byte <= b' ' || byte >= 0x7f
}

/// A letter of a token (RFC 9110 5.6.2).
pub(super) fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

const TLS_HANDSHAKE: u8 = 0x16;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const VERSION: &[u8] = b" HTTP/1.";
const NAME: &[u8] = b"HTTP/";
const METHODS: [&[u8]; 9] = [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH"];
/// The longest method that is waited for.
const METHOD_MAX: usize = 24;
/// Enough for a usual request head in one read.
const FIRST_READ: usize = 2048;
/// What is read at most before an answer is given.
pub(crate) const BYTES_MAX: usize = 16 * 1024;
/// How long a client may be silent before its connection counts as opaque.
pub(crate) const SILENCE_MAX: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    fn check(bytes: &[u8], now: Option<Sniffed>, at_the_end: Sniffed) {
        assert_eq!(classify(bytes), now, "{:?}", String::from_utf8_lossy(bytes));
        assert_eq!(settle(bytes), at_the_end, "{:?} at the end", String::from_utf8_lossy(bytes));
    }

    #[test]
    fn what_is_surely_meant_as_a_request_is_one_whatever_is_wrong_with_it() {
        for line in [
            b"GET / HTTP/1.1 \r\n".as_slice(),
            b"POST /a HTTP/2.0\r\n",
            b"GET / HTTP/\n",
            b"DELETE /a b HTTP/1.1\r\n",
            b"GET\t/\tHTTP/1.1\r\n",
            b"GET\x0b/\x0bHTTP/1.1\r\n",
            b"POST\x0c/a\x1cHTTP/1.1\r\n",
            b"GET\xa0/\xa0HTTP/1.1\r\n",
            b"GET\xc2\xa0/\xc2\xa0HTTP/1.1\r\n",
            b"GET\xc2\x85a\xc2\x85HTTP/1.1\r\n",
            b"\x0bGET / HTTP/1.1\r\n",
            b"\xa0\x1fGET / HTTP/1.1\r\n",
            b"GET\r/\rHTTP/1.1\r\n",
            b"GET\0/\0HTTP/1.1\r\n",
            b"GET / http/1.1\r\n",
            b"GET /\0 HTTP/1.1\r\n",
            b" GET / HTTP/1.1\r\n",
            b"GET /\r\n",
        ] {
            check(line, Some(Sniffed::Http1), Sniffed::Http1);
        }
        for line in [b"OPTIONS rtsp://a RTSP/1.0\r\n".as_slice(), b"OPTIONS sip:a SIP/2.0\r\n", b"HELO / HTTP/3\r\n"] {
            check(line, Some(Sniffed::Opaque), Sniffed::Opaque);
        }
    }

    #[test]
    fn requests_are_known_by_their_first_line() {
        for line in ["GET / HTTP/1.1\r\n", "POST /a?b=c HTTP/1.0\r\n", "PROPFIND /x HTTP/1.1\n"] {
            for before in ["", "\r\n", "\n", "\r\n\r\n\n"] {
                check(format!("{before}{line}").as_bytes(), Some(Sniffed::Http1), Sniffed::Http1);
            }
        }
    }

    #[test]
    fn other_protocols_are_opaque() {
        for bytes in [
            b"PING\r\n".as_slice(),
            b"*1\r\n$4\r\nPING\r\n",
            b"EHLO example.org\r\n",
            b"get key\r\n",
            b"\x00\x00\x00\x08\x04\xd2\x16\x2f",
            b"\x16\x00\x01",
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"\xff\xfe\xfd",
            b"GET key\r\n",
            b"GET\x0bkey\r\n",
            b"GET\r\nHTTP/1.1\r\n",
            b"GET\n/",
            b"GET(/) HTTP/1.1\r\n",
            b"* \x03 HTTP/1.0\r\n",
        ] {
            check(bytes, Some(Sniffed::Opaque), Sniffed::Opaque);
        }
    }

    #[test]
    fn a_client_hello_and_the_preface_are_known() {
        check(b"\x16\x03\x01\x02\x00\x01\x00", Some(Sniffed::Tls), Sniffed::Tls);
        check(b"\x16\x03\x01\x02\x00\x02\x00", Some(Sniffed::Opaque), Sniffed::Opaque);
        check(PREFACE, Some(Sniffed::Http2), Sniffed::Http2);
    }

    #[test]
    fn a_beginning_waits_for_more_until_the_time_is_up() {
        check(b"", None, Sniffed::Opaque);
        check(b"PRI * HT", None, Sniffed::Http2);
        check(b"PRI * HTTP/2.0\r\n", None, Sniffed::Http2);
        check(b"GET /index", None, Sniffed::Http1);
        check(b"GET\x0b/index", None, Sniffed::Http1);
        check(b"FOO /index", None, Sniffed::Opaque);
        check(b"GE", None, Sniffed::Http1);
        check(b"\r\n", None, Sniffed::Http1);
        check(b"GET ", None, Sniffed::Http1);
        check(b"GET key", None, Sniffed::Http1);
        check(b"HELLO", None, Sniffed::Opaque);
        check(b"\x16\x03", None, Sniffed::Opaque);
    }

    #[test]
    fn a_very_long_target_is_still_a_request() {
        let mut line = b"GET /".to_vec();
        line.resize(BYTES_MAX, b'a');
        check(&line, Some(Sniffed::Http1), Sniffed::Http1);
        check(&[b'\n'; BYTES_MAX], Some(Sniffed::Http1), Sniffed::Http1);
    }

    proptest::proptest! {
        #[test]
        fn an_answer_never_changes_when_more_bytes_come(bytes: Vec<u8>, cut in 0_usize..64) {
            let head = &bytes[..cut.min(bytes.len())];
            if let Some(answer) = classify(head) {
                proptest::prop_assert_eq!(classify(&bytes), Some(answer));
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_is_opaque_after_a_quarter_of_a_second() {
        let (near, _far) = tokio::io::duplex(64);
        let mut near: BoxedIo = Box::new(near);
        let begin = Instant::now();
        let mut sniffer = Sniffer::new(SILENCE_MAX);
        let answer = sniffer.sniff(&mut near).await.unwrap();
        assert_eq!((answer, sniffer.into_bytes().len(), begin.elapsed()), (Sniffed::Opaque, 0, SILENCE_MAX));
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_lost_of_what_a_reader_read_that_was_cancelled() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut near: BoxedIo = Box::new(near);
        let mut sniffer = Sniffer::new(SILENCE_MAX);
        for part in [b"GET".as_slice(), b" / HT"] {
            far.write_all(part).await.unwrap();
            let early = tokio::time::timeout(Duration::from_millis(1), sniffer.sniff(&mut near)).await;
            assert!(early.is_err(), "{early:?}");
        }
        far.write_all(b"TP/1.1\r\n").await.unwrap();
        assert_eq!(sniffer.sniff(&mut near).await.unwrap(), Sniffed::Http1);
        assert_eq!(sniffer.into_bytes(), b"GET / HTTP/1.1\r\n".as_slice());
    }
}
