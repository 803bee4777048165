//! What is said before an answer: `100 Continue`, `103 Early Hints`, and every other interim answer but the switch to another
//! protocol, from whoever answers to whoever asked.
//!
//! Sources: RFC 9110 15.2 ("A proxy MUST forward 1xx responses unless the proxy itself requested the generation of the 1xx
//! response. ... A server MUST NOT send a 1xx response to an HTTP/1.0 client"), 10.1.1; RFC 8297. In HTTP/2 the codec reads and
//! writes them. That of HTTP/1 passes over them: they are read off the bytes beneath it, and written between its own.
//!
//! Invariant: the next answer of a connection in HTTP/1 is not handed to the codec before all that was said before it is
//! written, and nothing is written while the codec still holds bytes of its own.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::CONTENT_LENGTH;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use parking_lot::Mutex;

use super::body::HeldBody;
use super::normalize;

/// What is said before the answer to one request and was not written yet. A connection of HTTP/1 has one for all of its
/// requests.
#[derive(Debug, Default)]
pub(crate) struct Interims {
    /// It is not as it was made: otherwise nothing of it has to be looked at.
    used: AtomicBool,
    /// Something is to be written.
    waiting: AtomicBool,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    queue: VecDeque<Response<()>>,
    /// The body whose sender waits to be told that it is wanted. Not kept: it knows the connection that this is a part of, and
    /// an answer may come without a word.
    expecting: Option<HeldBody>,
    /// It was told.
    told: bool,
    /// Headers that the policies of the route take from answers.
    gone: Vec<HeaderName>,
}

/// How much an answer was preceded by.
#[derive(Debug, Default)]
pub(crate) struct Said {
    count: usize,
    bytes: usize,
}

/// Interim answers that are read off the bytes of a connection in HTTP/1.
#[derive(Debug, Default)]
pub(super) struct Saying {
    /// The headers of the one that is being read.
    lines: Vec<u8>,
    heard: VecDeque<Response<()>>,
    said: Said,
    too_much: bool,
}

/// More was said before an answer than is passed on.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("more than {COUNT_MAX} interim answers (1xx) came before the answer, or more than {BYTES_MAX} bytes of them")]
pub(crate) struct TooMuch;

impl Interims {
    /// Another request begins.
    pub(crate) fn begin(&self) {
        if self.used.swap(false, Ordering::Relaxed) {
            *self.kept.lock() = Kept::default();
            self.waiting.store(false, Ordering::Relaxed);
        }
    }

    /// The sender of this body waits to be told.
    pub(crate) fn expect(&self, body: HeldBody) {
        self.kept().expecting = Some(body);
    }

    /// What the policies of a route take from answers is not said before them either.
    pub(crate) fn without(&self, names: &[HeaderName]) {
        if !names.is_empty() {
            self.kept().gone.extend_from_slice(names);
        }
    }

    /// That was said. It is for the caller, but for what concerned one connection alone.
    pub(crate) fn hear(&self, mut interim: Response<()>) {
        let mut kept = self.kept();
        match interim.status() {
            StatusCode::SWITCHING_PROTOCOLS => return,
            // "If the request did not contain an Expect header field ..., the client can simply discard this" (RFC 9110 15.2.1).
            StatusCode::CONTINUE if !kept.expecting.take().is_some_and(|body| body.release()) => return,
            StatusCode::CONTINUE => kept.told = true,
            _others => {}
        }
        let headers = interim.headers_mut();
        normalize::strip_hop_by_hop(headers);
        normalize::strip_reserved(headers, None);
        // There is no content (RFC 9110 8.6).
        headers.remove(CONTENT_LENGTH);
        for name in &kept.gone {
            headers.remove(name);
        }
        kept.queue.push_back(interim);
        self.waiting.store(true, Ordering::Relaxed);
    }

    /// Was the sender of the body told that it is wanted?
    pub(crate) fn is_told(&self) -> bool {
        self.used.load(Ordering::Relaxed) && self.kept.lock().told
    }

    /// Is something to be written?
    pub(crate) fn are_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }

    /// The next one that is to be written.
    pub(crate) fn next(&self) -> Option<Response<()>> {
        self.kept.lock().queue.pop_front()
    }

    /// All of them were written.
    pub(crate) fn written(&self) {
        self.waiting.store(false, Ordering::Relaxed);
    }

    /// Returns when none waits to be written. To be awaited by the task that writes them, which is woken when it has.
    pub(crate) async fn through(&self) {
        poll_fn(|_cx| if self.are_waiting() { Poll::Pending } else { Poll::Ready(()) }).await;
    }

    fn kept(&self) -> parking_lot::MutexGuard<'_, Kept> {
        self.used.store(true, Ordering::Relaxed);
        self.kept.lock()
    }
}

impl Said {
    /// One more, of so many bytes as HTTP/2 counts them, whatever it came in: what passes one hop passes the next.
    ///
    /// # Errors
    /// It is one too many.
    pub(crate) fn more(&mut self, bytes: usize) -> Result<(), TooMuch> {
        self.count = self.count.saturating_add(1);
        self.bytes = self.bytes.saturating_add(bytes);
        if self.count > COUNT_MAX || self.bytes > BYTES_MAX { Err(TooMuch) } else { Ok(()) }
    }
}

impl Saying {
    /// Another answer is asked for.
    pub(super) fn begin(&mut self) {
        self.lines.clear();
        self.heard.clear();
        self.said = Said::default();
    }

    /// Takes a line of headers, or a part of one, of an interim answer with this status; says whether it was the last one.
    ///
    /// # Errors
    /// It is too much.
    pub(super) fn line(&mut self, status: &[u8], line: &[u8]) -> Result<bool, TooMuch> {
        let heard = self.more(status, line);
        self.too_much |= heard.is_err();
        heard
    }

    fn more(&mut self, status: &[u8], line: &[u8]) -> Result<bool, TooMuch> {
        if self.lines.len().saturating_add(line.len()) > BYTES_MAX {
            return Err(TooMuch);
        }
        self.lines.extend_from_slice(line);
        let last = self.lines.ends_with(b"\n") && matches!(self.last_line(), b"\n" | b"\r\n");
        if last {
            let lines = std::mem::take(&mut self.lines);
            let interim = StatusCode::from_bytes(status).ok().and_then(|status| of_http1(status, &lines));
            // What is none is not said, and counts as it came.
            self.said.more(interim.as_ref().map_or(lines.len(), |interim| normalize::list_bytes(interim.headers())))?;
            self.heard.extend(interim);
        }
        Ok(last)
    }

    fn last_line(&self) -> &[u8] {
        let end = self.lines.len().saturating_sub(1);
        let begin = self.lines.iter().take(end).rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        self.lines.get(begin..).unwrap_or_default()
    }

    /// Is there something that nobody took?
    pub(super) fn is_any(&self) -> bool {
        self.too_much || !self.heard.is_empty()
    }

    /// Those that nobody took yet.
    ///
    /// # Errors
    /// It was too much.
    pub(super) fn take(&mut self) -> Result<VecDeque<Response<()>>, TooMuch> {
        if self.too_much { Err(TooMuch) } else { Ok(std::mem::take(&mut self.heard)) }
    }
}

/// The answer on a stream, once nothing is said before it any more.
pub(crate) fn poll_answer(
    answer: &mut h2::client::ResponseFuture,
    said: &mut Said,
    interims: Option<&Interims>,
    cx: &mut Context<'_>,
) -> Poll<Result<Response<h2::RecvStream>, Ended>> {
    // The codec drops what was not asked for when the answer is asked for, so the answer is asked for when it is next.
    while let Some(Ok(interim)) = std::task::ready!(answer.poll_informational(cx)) {
        said.more(normalize::list_bytes(interim.headers()))?;
        if let Some(interims) = interims {
            interims.hear(interim);
        }
    }
    std::pin::Pin::new(answer).poll(cx).map_err(Ended::Stream)
}

/// Why there is no answer on a stream.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    #[error(transparent)]
    Stream(h2::Error),
    #[error(transparent)]
    TooMuch(#[from] TooMuch),
}

/// An interim answer as it is written in HTTP/1.
pub(crate) fn to_http1(interim: &Response<()>) -> Bytes {
    let status = interim.status();
    let mut bytes = Vec::with_capacity(64);
    // Writing to a vector does not fail.
    drop(write!(bytes, "HTTP/1.1 {} {}\r\n", status.as_str(), status.canonical_reason().unwrap_or_default()));
    for (name, value) in interim.headers() {
        bytes.extend_from_slice(name.as_str().as_bytes());
        bytes.extend_from_slice(b": ");
        bytes.extend_from_slice(value.as_bytes());
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.into()
}

/// An interim answer of this status from its lines as they came in HTTP/1, with the empty one; none: they are no headers.
fn of_http1(status: StatusCode, lines: &[u8]) -> Option<Response<()>> {
    let mut headers = HeaderMap::new();
    for line in lines.split(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            break;
        }
        let colon = line.iter().position(|byte| *byte == b':')?;
        let (name, value) = (line.get(..colon)?, line.get(colon + 1..)?);
        // The type for names takes a quote, which no name has (RFC 9110 5.6.2).
        let name = HeaderName::from_bytes(name.trim_ascii_end()).ok().filter(|name| !name.as_str().contains('"'))?;
        headers.append(name, HeaderValue::from_bytes(value.trim_ascii()).ok()?);
    }
    let mut interim = Response::new(());
    *interim.status_mut() = status;
    *interim.headers_mut() = headers;
    Some(interim)
}

/// What may be said before one answer: `102 Processing` every few seconds of a long one, and early hints as large as a head.
const COUNT_MAX: usize = 100;
const BYTES_MAX: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn written(status: u16, lines: &str) -> Option<String> {
        let interims = Interims::default();
        interims.without(&[HeaderName::from_static("x-gone")]);
        interims.hear(of_http1(StatusCode::from_u16(status).unwrap(), lines.as_bytes())?);
        let next = interims.next()?;
        Some(String::from_utf8(to_http1(&next).to_vec()).unwrap())
    }

    #[test]
    fn an_interim_answer_is_written_as_it_came_but_for_what_concerns_one_connection() {
        let lines = "Link: </a>; rel=preload\r\nlink : </b>\r\nX-Empty:\r\n\r\n";
        let expected = "HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\nlink: </b>\r\nx-empty: \r\n\r\n";
        assert_eq!(written(103, lines).unwrap(), expected);
        let hops =
            "Connection: x-hop\nX-Hop: 1\nContent-Length: 3\nOutrigger-Reason: denied\nX-Gone: 1\nTransfer-Encoding: chunked\n\n";
        assert_eq!(written(102, hops).unwrap(), "HTTP/1.1 102 Processing\r\n\r\n");
        assert_eq!(written(199, "\r\n").unwrap(), "HTTP/1.1 199 \r\n\r\n");
    }

    #[test]
    fn what_is_no_interim_answer_is_not_said() {
        for lines in ["Link\r\n\r\n", " folded: 1\r\n\r\n", "a\"b: 1\r\n\r\n", "a: b\0\r\n\r\n", "a b: 1\r\n\r\n", ": 1\r\n\r\n"]
        {
            assert_eq!(written(103, lines), None, "{lines:?}");
        }
        assert_eq!(written(101, "\r\n"), None);
        assert_eq!(written(100, "\r\n"), None, "nobody waits for it");
    }

    #[test]
    fn so_much_is_said_and_no_more() {
        let mut said = Said::default();
        assert!((0..COUNT_MAX).all(|_| said.more(1).is_ok()));
        assert_eq!(said.more(1), Err(TooMuch));
        assert_eq!(Said::default().more(BYTES_MAX + 1), Err(TooMuch));
    }
}
