//! Stands between an HTTP/1 client and the codec and knows whose turn it is: what the codec would refuse in its own words
//! is refused in ours, and a head that does not end is given up.
//!
//! Sources: RFC 9112 3 and 9.6 (a lingering close), RFC 9110 15.5.9 (408), 15.5.15 (414), RFC 6585 5 (431).
//! Invariant: while an answer is on its way, every byte passes. What the codec writes at any other time can only be a
//! refusal of its own; it is taken away, and the connection is given back to whoever serves it, who says it better. What is
//! said before an answer is written here, between what the codec writes ([`Interims`]). An answer that breaks off is heard as far
//! as it came, and by nobody for the whole of it.

use std::fmt;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use futures_util::task::AtomicWaker;
use http::Response;
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::body::{Body, BodyError};
use super::expect::CONTINUE;
use super::interims::{self, Interims};
use super::presence::{self, Sight};
use super::reject::{Limit, Reject};
use super::spelling::{Heads, Odd, Spelling};
use crate::base::net::{BoxedIo, poll_write_pieces, socket};
use crate::base::sockopt::unacknowledged;
use crate::dataplane::sniff::Prefixed;
use crate::policy::limits::Limits;

/// Whose turn it is on one connection. Only the task that serves the connection changes it; the atomics are there because
/// the codec wants a service that can be sent elsewhere.
pub(crate) struct Turn {
    phase: AtomicU8,
    /// Heads that were read whole.
    requests: AtomicU32,
    /// Of the head that is being read.
    head_bytes: AtomicUsize,
    /// Of its first line.
    line_bytes: AtomicUsize,
    line_ended: AtomicBool,
    /// The request has a body, which may outlast its answer.
    uploading: AtomicBool,
    /// Somebody may still read from that body.
    reading: AtomicBool,
    /// While the answer is made, bytes wait that nobody reads.
    ahead: AtomicBool,
    /// The client sent all that it will ever send.
    ended: AtomicBool,
    /// The codec's own words were taken away.
    silenced: AtomicBool,
    /// The client waits to be told that its body is wanted. The codec would tell it when the body is read.
    expects: AtomicBool,
    /// Nothing is to be done before the codec holds no bytes. Who waits for that: the one that reads the request's body, which may
    /// be another task, and the answer's body.
    clears: AtomicBool,
    reader: AtomicWaker,
    answer: AtomicWaker,
    /// The answer ends where the connection does; all of it was handed to the codec.
    until_close: AtomicBool,
    whole: AtomicBool,
    /// What is said before the answer that is being made.
    pub(super) interims: Interims,
    /// How the names in the heads are spelled.
    heads: Mutex<Heads>,
    /// The client does not read: bytes wait to be written.
    blocked: AtomicBool,
    /// Counts what was written, so that standing still is seen.
    writes: AtomicU32,
    /// The client was given up because it reads nothing.
    slow: AtomicBool,
    limits: Limits,
    /// The stream, when the codec is done with it.
    left: Mutex<Option<BoxedIo>>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
enum Phase {
    /// Nobody says anything.
    Idle,
    /// A head began.
    Head,
    /// An answer is being made or sent.
    Busy,
    /// The answer is made, and the codec still holds bytes of it.
    Ending,
    /// The answer is out. What comes may be the rest of the request's body, or the next head.
    Open,
    /// The connection is a tunnel for good.
    Tunnel,
}

/// Why a client is not waited for any longer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Late {
    /// A head began and did not end in time.
    Head,
    /// Nothing came.
    Idle,
    /// Nothing of an answer is read.
    Reader,
    /// It sends no more, and nothing could be written to it since: it left, by all appearance.
    Left,
    /// Nothing came for a short while, and the codec holds nothing: it need not wait here.
    Rest,
}

/// Held by whoever reads the body of a request.
pub(crate) struct Reading(Arc<Turn>);

/// The stream as the codec sees it.
pub(crate) struct Guarded {
    /// There until it is given back.
    io: Option<BoxedIo>,
    /// What was read of it already.
    first: Bytes,
    /// What is left of an interim answer that is being written.
    interim: Bytes,
    turn: Arc<Turn>,
}

/// An answer's body, whose end is the end of a turn.
pub(crate) struct Watched {
    body: Body,
    /// It broke off. The codec, once told, drops what it was handed before.
    broken: Option<Box<BodyError>>,
    turn: Arc<Turn>,
}

/// The clock of one connection. There is one timer, and it is moved only when it would ring too late.
pub(crate) struct Clock {
    /// The phase, the requests, whether a body is read, and what was written to a client that does not read, or of which
    /// nobody knows whether it does.
    seen: (Phase, u32, bool, Option<u32>),
    since: Instant,
    /// The codec may be put away when it has nothing to do.
    rests: bool,
    timer: Pin<Box<Sleep>>,
}

impl Turn {
    /// Of a connection that just opened, or on which requests were answered before.
    pub(crate) fn new(limits: Limits, opened: bool) -> Arc<Self> {
        Arc::new(Self {
            limits,
            blocked: AtomicBool::new(false),
            writes: AtomicU32::new(0),
            slow: AtomicBool::new(false),
            phase: AtomicU8::new(Phase::Idle as u8),
            requests: AtomicU32::new(u32::from(!opened)),
            head_bytes: AtomicUsize::new(0),
            line_bytes: AtomicUsize::new(0),
            line_ended: AtomicBool::new(true),
            uploading: AtomicBool::new(false),
            reading: AtomicBool::new(false),
            ahead: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            silenced: AtomicBool::new(false),
            expects: AtomicBool::new(false),
            clears: AtomicBool::new(false),
            reader: AtomicWaker::new(),
            answer: AtomicWaker::new(),
            until_close: AtomicBool::new(false),
            whole: AtomicBool::new(false),
            interims: Interims::default(),
            heads: Mutex::new(Heads::of_requests()),
            left: Mutex::new(None),
        })
    }

    /// A whole head was read, of a request with or without a body whose sender waits to be told; says how its names are
    /// spelled, and what else of it the codec does not show.
    pub(crate) fn asked(&self, body: bool, expects: bool) -> (Option<Spelling>, Odd) {
        self.interims.begin();
        self.expects.store(expects, Ordering::Relaxed);
        // The codec says its own word where it stands, be it within the answer before this one.
        self.clears.store(expects, Ordering::Relaxed);
        self.head_bytes.store(0, Ordering::Relaxed);
        self.line_bytes.store(0, Ordering::Relaxed);
        self.line_ended.store(true, Ordering::Relaxed);
        self.uploading.store(body, Ordering::Relaxed);
        self.ahead.store(false, Ordering::Relaxed);
        self.ended.store(false, Ordering::Relaxed);
        // One task changes it, so nothing is lost between load and store.
        self.requests.store(self.requests.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        self.set(Phase::Busy);
        self.heads.lock().next_odd()
    }

    /// Knows of the request's body until what is returned is dropped.
    pub(crate) fn body_read(self: &Arc<Self>) -> Reading {
        self.reading.store(true, Ordering::Relaxed);
        Reading(Arc::clone(self))
    }

    /// May bytes still come of the body of a request that was answered?
    pub(crate) fn is_uploading(&self) -> bool {
        self.uploading.load(Ordering::Relaxed) && self.heads.lock().is_in_body()
    }

    /// The answer that is made has no other end than that of the connection.
    pub(crate) fn until_close(&self) {
        self.whole.store(false, Ordering::Relaxed);
        self.until_close.store(true, Ordering::Relaxed);
    }

    /// Would an end of the connection pass for that of an answer which broke off?
    pub(crate) fn is_cut_short(&self) -> bool {
        self.until_close.load(Ordering::Relaxed) && !self.whole.load(Ordering::Relaxed)
    }

    /// Is ready when the codec holds no bytes, where somebody is to wait for that, in a place of its own.
    fn poll_clear(&self, waits: &AtomicWaker, cx: &Context<'_>) -> Poll<()> {
        if !self.clears.load(Ordering::Relaxed) {
            return Poll::Ready(());
        }
        waits.register(cx.waker());
        if self.clears.load(Ordering::Acquire) { Poll::Pending } else { Poll::Ready(()) }
    }

    /// The connection is a tunnel from now on.
    pub(crate) fn tunnel(&self) {
        self.set(Phase::Tunnel);
    }

    /// The stream, once the codec dropped it.
    pub(crate) fn take_back(&self) -> Option<BoxedIo> {
        self.left.lock().take()
    }

    /// What the codec's refusal is in our words; nothing where an answer was under way, or where it is no refusal.
    pub(crate) fn refusal(&self, error: &hyper::Error) -> Option<Reject> {
        if !self.is_codecs() {
            return None;
        }
        // The codec says of a length that no body can have what it says of a head that is too large.
        if error.is_parse_too_large() && self.heads.lock().is_longer_than_any() {
            return Some(Reject::BadRequest("the Content-Length is larger than any body"));
        }
        if error.is_parse_too_large() {
            let Limits { header_bytes, header_count, uri_bytes, .. } = self.limits;
            let beyond = |count: &AtomicUsize, limit: u32| {
                u32::try_from(count.load(Ordering::Relaxed)).map_or(true, |count| count >= limit)
            };
            let limit = if !self.line_ended.load(Ordering::Relaxed) || beyond(&self.line_bytes, uri_bytes) {
                Limit::Target(uri_bytes)
            } else if beyond(&self.head_bytes, header_bytes) {
                Limit::HeadBytes(header_bytes)
            } else {
                Limit::HeaderCount(header_count)
            };
            return Some(Reject::TooLarge(limit));
        }
        error.is_parse().then(|| Reject::BadRequest(fault(&error.to_string())))
    }

    /// Is a request being answered, or does somebody still read its body?
    pub(crate) fn is_under_way(&self) -> bool {
        matches!(self.phase(), Phase::Busy | Phase::Ending) || self.reading.load(Ordering::Relaxed)
    }

    fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Idle,
            1 => Phase::Head,
            2 => Phase::Busy,
            3 => Phase::Ending,
            4 => Phase::Open,
            _ => Phase::Tunnel,
        }
    }

    fn set(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Is everything that came answered, and nothing of a next request there?
    fn is_at_rest(&self) -> bool {
        matches!(self.phase(), Phase::Idle | Phase::Open)
            && !self.reading.load(Ordering::Relaxed)
            && !self.silenced.load(Ordering::Relaxed)
            && self.heads.lock().is_between()
    }

    /// Would what is written now be the codec's own?
    fn is_codecs(&self) -> bool {
        matches!(self.phase(), Phase::Idle | Phase::Head | Phase::Open)
    }

    fn read(&self, bytes: &[u8]) {
        let phase = self.phase();
        if phase != Phase::Tunnel {
            self.heads.lock().read(bytes);
        }
        let bytes = match phase {
            Phase::Idle => {
                // Empty lines before a request are no beginning of one (RFC 9112 2.2).
                let Some(begin) = bytes.iter().position(|byte| !matches!(byte, b'\r' | b'\n')) else { return };
                self.line_ended.store(false, Ordering::Relaxed);
                self.set(Phase::Head);
                bytes.get(begin..).unwrap_or_default()
            }
            Phase::Head => bytes,
            Phase::Busy | Phase::Ending | Phase::Open | Phase::Tunnel => return,
        };
        self.head_bytes.fetch_add(bytes.len(), Ordering::Relaxed);
        if !self.line_ended.load(Ordering::Relaxed) {
            let end = bytes.iter().position(|byte| *byte == b'\n');
            self.line_ended.store(end.is_some(), Ordering::Relaxed);
            self.line_bytes.fetch_add(end.unwrap_or(bytes.len()), Ordering::Relaxed);
        }
    }

    /// The answer's body is in the codec's hands.
    fn answer_made(&self) {
        if self.phase() == Phase::Busy {
            self.set(Phase::Ending);
        }
    }

    /// The codec holds nothing back.
    fn flushed(&self) {
        if self.clears.load(Ordering::Relaxed) {
            self.clears.store(false, Ordering::Release);
            self.reader.wake();
            self.answer.wake();
        }
        if self.phase() == Phase::Ending {
            self.set(if self.uploading.load(Ordering::Relaxed) { Phase::Open } else { Phase::Idle });
        }
    }

    fn wrote(&self, blocked: bool) {
        self.blocked.store(blocked, Ordering::Relaxed);
        if !blocked {
            self.writes.store(self.writes.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        }
    }

    fn silence(&self) -> bool {
        let silence = self.is_codecs();
        if silence {
            self.silenced.store(true, Ordering::Relaxed);
        }
        silence
    }
}

impl Guarded {
    /// Guards a stream of which `first` was read already.
    pub(crate) fn new(first: Bytes, io: BoxedIo, turn: Arc<Turn>) -> Self {
        Self { io: Some(io), first, interim: Bytes::new(), turn }
    }
}

impl Guarded {
    /// Writes what is said before an answer. To be called when the codec holds nothing.
    fn poll_interims(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(io) = &mut self.io else { return Poll::Ready(Err(gone())) };
        loop {
            if self.interim.is_empty() {
                let Some(next) = self.turn.interims.next() else { break };
                self.interim = interims::to_http1(&next);
            }
            let written = Pin::new(&mut *io).poll_write(cx, &self.interim);
            self.turn.wrote(written.is_pending());
            match ready!(written)? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.interim.advance(count),
            }
        }
        self.turn.interims.written();
        // The answer waits for this, in the same task.
        cx.waker().wake_by_ref();
        Poll::Ready(Ok(()))
    }

    /// Looks whether a client that waits for its answer is still there. To be called whenever the codec was at work: it reads
    /// nothing meanwhile.
    fn look(&self, cx: &mut Context<'_>) -> io::Result<()> {
        let turn = &self.turn;
        let Some(socket) = self.io.as_ref().filter(|_| turn.phase() == Phase::Busy).and_then(socket) else { return Ok(()) };
        let uploading = turn.is_uploading();
        let sight = presence::look(socket, uploading || turn.ahead.load(Ordering::Relaxed), cx)?;
        turn.ahead.store(sight == Sight::Ahead && !uploading, Ordering::Relaxed);
        // The rest of a body may stand before the end.
        turn.ended.store(sight == Sight::Ended && !uploading, Ordering::Relaxed);
        Ok(())
    }

    /// Is that, which the codec writes, its own word that a body is wanted? It is the application that says so. The codec held
    /// nothing when the body was asked for, so nothing stands before it.
    fn is_leave(&self, words: &[u8]) -> bool {
        self.turn.expects.load(Ordering::Relaxed)
            && words.starts_with(CONTINUE)
            && self.turn.expects.swap(false, Ordering::Relaxed)
    }
}

impl Watched {
    /// Watches an answer's body.
    pub(crate) fn new(body: Body, turn: Arc<Turn>) -> Self {
        Self { body, broken: None, turn }
    }
}

impl Reading {
    /// Is ready when the body may be read.
    pub(crate) fn poll_clear(&self, cx: &Context<'_>) -> Poll<()> {
        self.0.poll_clear(&self.0.reader, cx)
    }
}

impl Clock {
    /// Starts now, or goes on where the clock of the codec before stood.
    pub(crate) fn start(turn: &Turn, since: Option<Instant>, rests: bool) -> Self {
        let timer = Box::pin(sleep(turn.limits.header_timeout));
        let seen = (Phase::Idle, turn.requests.load(Ordering::Relaxed), false, None);
        Self { seen, since: since.unwrap_or_else(Instant::now), rests, timer }
    }

    /// Since when the connection has been as it is.
    pub(crate) fn since(&self) -> Instant {
        self.since
    }

    /// Rings now and then, which has the codec at work, and so its guard look.
    fn look_again(&mut self, cx: &mut Context<'_>) {
        let next = Instant::now() + LOOK_EVERY;
        if next < self.timer.deadline() {
            self.timer.as_mut().reset(next);
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            self.timer.as_mut().reset(next);
        }
    }

    /// Is ready when the client is not to be waited for any longer, or not here. To be polled after the codec was: what that
    /// did is what is looked at.
    pub(crate) fn poll_late(&mut self, turn: &Turn, cx: &mut Context<'_>) -> Poll<Late> {
        let blocked = turn.blocked.load(Ordering::Relaxed);
        let doubtful = blocked || turn.ended.load(Ordering::Relaxed);
        let written = doubtful.then(|| turn.writes.load(Ordering::Relaxed));
        let seen = (turn.phase(), turn.requests.load(Ordering::Relaxed), turn.reading.load(Ordering::Relaxed), written);
        let changed = std::mem::replace(&mut self.seen, seen) != seen;
        let Limits { header_timeout, idle_timeout, stream_timeout, .. } = turn.limits;
        let (limit, late) = match seen {
            (Phase::Head, ..) => (header_timeout, Late::Head),
            (Phase::Idle, 0, ..) => (header_timeout, Late::Idle),
            (Phase::Idle | Phase::Open, ..) => (idle_timeout, Late::Idle),
            (Phase::Busy, _, _, Some(_)) if !blocked => (LEFT_AFTER.min(stream_timeout), Late::Left),
            (Phase::Busy | Phase::Ending, _, _, Some(_)) => (stream_timeout, Late::Reader),
            (Phase::Busy, ..) if turn.uploading.load(Ordering::Relaxed) || turn.ahead.load(Ordering::Relaxed) => {
                self.look_again(cx);
                return Poll::Pending;
            }
            // Whoever answers has deadlines of its own.
            (Phase::Busy | Phase::Ending, _, _, None) | (Phase::Tunnel, ..) => return Poll::Pending,
        };
        if changed {
            self.since = Instant::now();
        }
        let end = self.since + limit;
        let mut rest = match seen {
            (Phase::Idle | Phase::Open, 1.., ..) if self.rests => self.since + REST_AFTER,
            _other => end,
        };
        if end.min(rest) < self.timer.deadline() {
            self.timer.as_mut().reset(end.min(rest));
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            if now >= end {
                turn.slow.store(late == Late::Reader, Ordering::Relaxed);
                return Poll::Ready(late);
            }
            if now >= rest {
                if turn.is_at_rest() {
                    return Poll::Ready(Late::Rest);
                }
                rest = now + REST_AFTER;
            }
            self.timer.as_mut().reset(end.min(rest));
        }
    }
}

/// Refuses in our words, and closes so that the client has a chance to read them: what it still sends is read for a
/// while, for a close with bytes unread would be a reset that takes the answer away.
pub(crate) async fn refuse(io: BoxedIo, reject: &Reject) {
    farewell(io, &written(reject.render(false))).await;
}

/// Hears out a client that was answered and may still be sending, so that it has a chance to read the answer.
pub(crate) async fn linger(io: BoxedIo) {
    farewell(io, &[]).await;
}

/// Cuts a connection whose end would pass for that of an answer: what was written arrives, and then an error.
pub(crate) async fn cut(io: BoxedIo) {
    let Some(socket) = socket(&io) else { return };
    let until = Instant::now() + LINGER_MAX;
    while unacknowledged(socket).is_ok_and(|left| left > 0) && Instant::now() < until {
        sleep(CUT_STEP).await;
    }
    if let Err(error) = socket.set_zero_linger() {
        tracing::debug!(%error, "a connection ends as if its answer were whole");
    }
}

/// Writes last words.
pub(crate) async fn farewell(io: impl AsyncRead + AsyncWrite + Unpin, words: &[u8]) {
    let mut io = io;
    let talk = async {
        io.write_all(words).await?;
        io.shutdown().await?;
        let mut left = LINGER_BYTES;
        let mut buffer = vec![0; LINGER_READ];
        while left > 0 {
            let read = io.read(&mut buffer).await?;
            if read == 0 {
                break;
            }
            left = left.saturating_sub(read);
        }
        Ok::<_, io::Error>(())
    };
    // Whoever does not read a refusal loses it.
    if let Ok(Err(error)) = timeout(LINGER_MAX, pin!(talk)).await {
        tracing::debug!(%error, "a refused client left");
    }
}

fn written(answer: Response<Body>) -> Vec<u8> {
    let (parts, body) = answer.into_parts();
    let text = if let Body::Full(text) = body { text } else { Bytes::new() };
    let phrase = parts.status.canonical_reason().unwrap_or_default();
    let mut bytes = format!("HTTP/1.1 {} {phrase}\r\n", parts.status.as_str()).into_bytes();
    for (name, value) in &parts.headers {
        bytes.extend_from_slice(name.as_str().as_bytes());
        bytes.extend_from_slice(b": ");
        bytes.extend_from_slice(value.as_bytes());
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(format!("content-length: {}\r\nconnection: close\r\n\r\n", text.len()).as_bytes());
    bytes.extend_from_slice(&text);
    bytes
}

/// The codec tells what it met in a sentence and no other way; one that is not known here is told in general.
fn fault(sentence: &str) -> &'static str {
    let known = [
        ("invalid HTTP method", "the method is not valid"),
        ("invalid URI", "the target is not valid"),
        ("invalid HTTP version", "the version is not one of HTTP/1"),
        ("invalid content-length", "the Content-Length is not valid, or there are several"),
        ("invalid transfer-encoding", "the Transfer-Encoding is not valid"),
        ("unexpected transfer-encoding", "a Transfer-Encoding where none may be"),
        ("invalid HTTP header", "a header is not valid"),
    ];
    known.iter().find(|(begin, _)| sentence.starts_with(begin)).map_or("the request is not valid HTTP/1", |(_, text)| text)
}

impl AsyncRead for Guarded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        if self.turn.phase() != Phase::Tunnel && self.turn.heads.lock().is_astray() {
            // What came before was passed on, so it is its request that fails.
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        if self.first.is_empty() {
            let Some(io) = &mut self.io else { return Poll::Ready(Err(gone())) };
            ready!(Pin::new(io).poll_read(cx, buf))?;
        } else {
            let length = self.first.len().min(buf.remaining());
            buf.put_slice(&self.first.split_to(length));
            if self.first.is_empty() {
                // The buffer's memory is not kept for the life of the connection.
                self.first = Bytes::new();
            }
        }
        if let Some(bytes) = buf.filled().get(before..) {
            self.turn.read(bytes);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.turn.silence() {
            return Poll::Ready(Ok(buf.len()));
        }
        if self.is_leave(buf) {
            return Poll::Ready(Ok(CONTINUE.len()));
        }
        let Some(io) = &mut self.io else { return Poll::Ready(Err(gone())) };
        let written = Pin::new(io).poll_write(cx, buf);
        self.turn.wrote(written.is_pending());
        written
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.turn.silence() {
            return Poll::Ready(Ok(bufs.iter().map(|buf| buf.len()).sum()));
        }
        if bufs.first().is_some_and(|first| self.is_leave(first)) {
            return Poll::Ready(Ok(CONTINUE.len()));
        }
        let Some(io) = &mut self.io else { return Poll::Ready(Err(gone())) };
        let written = poll_write_pieces(Pin::new(io), cx, bufs);
        self.turn.wrote(written.is_pending());
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.as_ref().is_some_and(|io| io.is_write_vectored())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The codec flushes the stream when it has nothing left to write into it.
        if self.turn.interims.are_waiting() {
            ready!(self.poll_interims(cx))?;
        }
        let Some(io) = &mut self.io else { return Poll::Ready(Err(gone())) };
        ready!(Pin::new(io).poll_flush(cx))?;
        self.turn.flushed();
        Poll::Ready(self.look(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.turn.silenced.load(Ordering::Relaxed) {
            // The client has not been told yet.
            return Poll::Ready(Ok(()));
        }
        let Some(io) = &mut self.io else { return Poll::Ready(Err(gone())) };
        Pin::new(io).poll_shutdown(cx)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // A tunnel's stream belongs to nobody else, and goes with it.
        if self.turn.phase() != Phase::Tunnel {
            let first = std::mem::take(&mut self.first);
            *self.turn.left.lock() = self.io.take().map(|io| Prefixed::join(first, io));
        }
    }
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if this.broken.is_none() {
            match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Err(error)) => this.broken = Some(Box::new(error)),
                frame => {
                    if frame.is_none() || this.body.is_end_stream() {
                        this.turn.whole.store(true, Ordering::Relaxed);
                    }
                    return Poll::Ready(frame);
                }
            }
            this.turn.clears.store(true, Ordering::Relaxed);
        }
        ready!(this.turn.poll_clear(&this.turn.answer, cx));
        Poll::Ready(this.broken.take().map(|error| Err(*error)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.reading.store(false, Ordering::Relaxed);
    }
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reading")
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if self.turn.slow.load(Ordering::Relaxed) {
            self.body.slow_reader();
        }
        self.turn.answer_made();
    }
}

fn gone() -> io::Error {
    io::ErrorKind::NotConnected.into()
}

/// How long a connection carries nothing before its codec is put away. Clients that ask now and then ask more often than
/// this, or so seldom that making the codec anew is nothing beside it.
pub(crate) const REST_AFTER: Duration = Duration::from_millis(500);
/// How long an answer may take to begin, or to go on, for a client that sends no more. There are those that only end what they
/// send; of the others nothing is heard.
const LEFT_AFTER: Duration = Duration::from_secs(5);
/// How often a client is looked for whose end wakes nobody.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long a client that was refused may take to read why.
const LINGER_MAX: Duration = Duration::from_secs(2);
/// How often it is looked whether a client has what was written.
const CUT_STEP: Duration = Duration::from_millis(5);
/// What is read from it meanwhile.
const LINGER_BYTES: usize = 1 << 20;
const LINGER_READ: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use std::task::{Wake, Waker};

    use http_body::Body as _;

    use super::*;

    #[derive(Default)]
    struct Rung(AtomicU32);

    impl Wake for Rung {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A request's body may go its way in a task of its own, while the answer that began breaks off.
    #[test]
    fn who_reads_the_request_and_who_ends_the_answer_are_both_woken_when_the_codec_holds_nothing() {
        for reader_first in [true, false] {
            let turn = Turn::new(Limits::default(), true);
            turn.asked(true, true);
            let reading = turn.body_read();
            let broken = Some(Box::new(BodyError::Stalled));
            let mut answer = Watched { body: Body::Empty, broken, turn: Arc::clone(&turn) };
            let (reader, writer) = (Arc::<Rung>::default(), Arc::<Rung>::default());
            let wakers = [Waker::from(Arc::clone(&reader)), Waker::from(Arc::clone(&writer))];
            let [reads, mut writes] = wakers.each_ref().map(Context::from_waker);
            for reads_now in [reader_first, !reader_first] {
                if reads_now {
                    assert!(reading.poll_clear(&reads).is_pending());
                } else {
                    assert!(Pin::new(&mut answer).poll_frame(&mut writes).is_pending());
                }
            }
            turn.flushed();
            assert_eq!([reader, writer].map(|rung| rung.0.load(Ordering::Relaxed)), [1, 1], "{reader_first}");
            assert!(reading.poll_clear(&reads).is_ready());
            assert!(matches!(Pin::new(&mut answer).poll_frame(&mut writes), Poll::Ready(Some(Err(_)))));
        }
    }
}
