//! Stands between an HTTP/2 client and the codec and counts what the codec does not: frames that carry nothing, heads that
//! do not end, requests that are taken back, and a client that reads nothing. What the codec writes passes here as well, so
//! that what it refuses by itself is seen ([`Unseen`]).
//!
//! Sources: RFC 9113 4.1 (the nine bytes before each frame), 6 (their types) and 10.5; CVE-2023-44487, CVE-2019-9512, -9515.
//! Invariant: no byte is changed or kept, and none is held back but while requests that were read wait to be looked at. What comes
//! after a breach is not read any more.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::HeaderMap;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep};

use super::body::TrailersOver;
use super::credit::Account;
use super::cut::{
    CONTINUATION, Cut, Cutter, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, PADDED, PREFACE_BYTES, RST_STREAM,
    WINDOW_UPDATE,
};
use super::normalize::list_bytes;
use super::reject::{Flood, Limit, REASON, Reject, Told};
use super::unseen::{Unseen, Written};
use crate::dataplane::wire::Wire;
use crate::policy::limits::Limits;

/// What is known of one connection's frames.
#[derive(Debug)]
pub(crate) struct Traffic {
    limits: Limits,
    control: Window,
    resets: Window,
    /// Of the head that is being read: its frames behind the first, its bytes on the wire.
    continuations: AtomicU32,
    head_bytes: AtomicUsize,
    /// Of the whole connection.
    heads: AtomicU32,
    empties: AtomicU32,
    /// Pieces of bodies that cost the codec more than they carry; and whether such a piece came last.
    tiny: AtomicU32,
    in_body: AtomicBool,
    /// The same of pieces with padding, of which it is not seen what they carry.
    padded: AtomicU32,
    in_padding: AtomicBool,
    taken_back: AtomicU32,
    /// Nothing is read before the requests that came were looked at.
    paused: AtomicBool,
    /// Requests that the client may still take back: each of them once, and no more than can be under way.
    resettable: AtomicU32,
    /// What a client may grant anew by frames that are not counted: as often as it was sent something to read.
    grants: AtomicU32,
    breach: Mutex<Option<Breach>>,
    breached: Notify,
    /// The preface or a head began and did not end yet.
    head: AtomicBool,
    /// Counts bytes that came and went, so that standing still is seen.
    moves: AtomicU32,
    /// The client does not read: bytes wait to be written.
    blocked: AtomicBool,
    /// All that was written went out: whatever comes next begins a frame.
    between_frames: AtomicBool,
    late: Mutex<Option<Stands>>,
    /// Streams that the client took back for what the codec takes them back for as well, and whether it said goodbye.
    blamed: Mutex<VecDeque<u32>>,
    left: AtomicBool,
    /// Streams whose trailers had more bytes on the wire than a head may have: the codec may have dropped some of them.
    trailing: Mutex<VecDeque<u32>>,
    pub(super) unseen: Unseen,
    pub(super) account: Arc<Account>,
}

/// Why a client of HTTP/2 is not waited for any longer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Stands {
    /// A head began, and does not end.
    Head,
    /// It reads nothing.
    Reader,
    /// Nothing comes and nothing goes.
    Idle,
}

/// What the client did, and where it can be answered besides.
#[derive(Clone, Debug)]
pub(crate) struct Breach {
    pub(crate) reject: Reject,
    /// The stream of the request whose head it was.
    pub(crate) stream: Option<u32>,
}

/// A count within ten seconds.
#[derive(Debug)]
struct Window(Mutex<(Instant, u32)>);

/// The stream as the codec sees it.
pub(crate) struct Framed {
    io: Wire,
    traffic: Arc<Traffic>,
    read: Cutter,
    /// Heads and resets since reading began or went on.
    passed: u32,
    /// What is passed over ends a head, or the preface.
    ends_head: bool,
    /// Of the head that is being read.
    stream: u32,
    written: Written,
}

/// A request that is made and not answered yet. Whoever takes it back at once is counted.
pub(crate) struct Unanswered {
    traffic: Arc<Traffic>,
    since: Instant,
    answered: bool,
}

impl Window {
    fn new() -> Self {
        Self(Mutex::new((Instant::now(), 0)))
    }

    /// One more; is it beyond the limit?
    fn over(&self, limit: u32) -> bool {
        let mut window = self.0.lock();
        let now = Instant::now();
        if now.duration_since(window.0) > WINDOW {
            *window = (now, 0);
        }
        window.1 = window.1.saturating_add(1);
        window.1 > limit
    }
}

impl Traffic {
    /// Of a connection that just opened.
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            control: Window::new(),
            resets: Window::new(),
            continuations: AtomicU32::new(0),
            head_bytes: AtomicUsize::new(0),
            heads: AtomicU32::new(0),
            empties: AtomicU32::new(0),
            tiny: AtomicU32::new(0),
            in_body: AtomicBool::new(false),
            padded: AtomicU32::new(0),
            in_padding: AtomicBool::new(false),
            taken_back: AtomicU32::new(0),
            paused: AtomicBool::new(false),
            resettable: AtomicU32::new(0),
            grants: AtomicU32::new(GRANTS_FIRST),
            breach: Mutex::new(None),
            breached: Notify::new(),
            head: AtomicBool::new(true),
            moves: AtomicU32::new(0),
            blocked: AtomicBool::new(false),
            between_frames: AtomicBool::new(false),
            late: Mutex::new(None),
            blamed: Mutex::default(),
            left: AtomicBool::new(false),
            trailing: Mutex::default(),
            unseen: Unseen::default(),
            account: Account::new(),
        })
    }

    /// What the client did too often, or beyond all measure.
    pub(crate) fn breach(&self) -> Option<Breach> {
        self.breach.lock().clone()
    }

    fn is_breached(&self) -> bool {
        self.breach.lock().is_some()
    }

    /// Returns when there is a breach. Cancel-safe.
    pub(crate) async fn breached(&self) {
        self.breached.notified().await;
    }

    /// A request begins.
    pub(crate) fn asked(self: &Arc<Self>) -> Unanswered {
        self.unseen.asked();
        Unanswered { traffic: Arc::clone(self), since: Instant::now(), answered: false }
    }

    /// Is reading to go on when the codec has given out all requests that it read?
    pub(super) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// It did: reading goes on.
    pub(super) fn resume(&self) {
        self.paused.store(false, Ordering::Relaxed);
    }

    /// A request that the codec refused and nobody else saw. To be asked after the codec was polled, until there is none.
    pub(crate) fn refused_unseen(&self) -> Option<Reject> {
        self.unseen.take(&self.limits)
    }

    /// Whom the connection waits for, and a number that changes whenever anything moves.
    pub(crate) fn stands(&self) -> (Stands, u32) {
        let stands = if self.blocked.load(Ordering::Relaxed) {
            Stands::Reader
        } else if self.head.load(Ordering::Relaxed) {
            // Bytes that trickle in do not make a head end sooner.
            return (Stands::Head, 0);
        } else {
            Stands::Idle
        };
        (stands, self.moves.load(Ordering::Relaxed))
    }

    /// How long that may take.
    pub(crate) fn patience(&self, stands: Stands) -> Duration {
        match stands {
            Stands::Head => self.limits.header_timeout,
            Stands::Reader => self.limits.stream_timeout,
            Stands::Idle => self.limits.idle_timeout,
        }
    }

    /// May a frame of ours be written, now that the codec is gone?
    pub(crate) fn between_frames(&self) -> bool {
        self.between_frames.load(Ordering::Relaxed)
    }

    /// What the codec ended the connection for. It has a word for several things; the frames tell them apart.
    pub(crate) fn likely(&self, error: &h2::Error) -> Reject {
        let head = Reject::TooLarge(Limit::HeadBytes(self.limits.header_bytes));
        match error.reason() {
            Some(h2::Reason::ENHANCE_YOUR_CALM) => {}
            // Of a head that is over its limit the codec reads no string that goes on for ever, and says so in this way alone.
            Some(h2::Reason::COMPRESSION_ERROR) => return head,
            _another => return Reject::BadRequest("the connection broke the rules of HTTP/2"),
        }
        let flood = if self.continuations.load(Ordering::Relaxed) > self.continuations_read() {
            if self.is_head_over(1) {
                return head;
            }
            Flood::Continuations
        } else if self.empties.load(Ordering::Relaxed) >= FEW {
            Flood::EmptyData
        } else if self.in_body.load(Ordering::Relaxed) && self.tiny.load(Ordering::Relaxed) >= TINY_LEAST {
            Flood::TinyData
        } else if self.in_padding.load(Ordering::Relaxed) && self.padded.load(Ordering::Relaxed) >= PADDED_LEAST {
            Flood::PaddedData
        } else if self.taken_back.load(Ordering::Relaxed) >= self.limits.pending_resets {
            Flood::PendingResets(self.limits.pending_resets)
        } else if self.heads.load(Ordering::Relaxed) >= self.limits.error_resets {
            Flood::ErrorResets(self.limits.error_resets)
        } else {
            // Too few streams for anything else: it was the size of one head, many times over the limit.
            return head;
        };
        Reject::Flood(flood)
    }

    /// Is the head that is being read so many times over its limit, by its bytes on the wire?
    fn is_head_over(&self, times: u32) -> bool {
        let limit = self.limits.header_bytes.saturating_mul(times);
        u32::try_from(self.head_bytes.load(Ordering::Relaxed)).map_or(true, |bytes| bytes > limit)
    }

    /// So much of an answer went to the client, which will grant it anew.
    pub(super) fn sent(&self, bytes: usize) {
        let grants = u32::try_from(bytes / GRANT_LEAST).unwrap_or(GRANTS_MAX).saturating_add(GRANTS_EACH);
        self.may_grant(grants);
    }

    fn may_grant(&self, grants: u32) {
        // One task changes it, so nothing is lost between load and store.
        self.grants.store(self.grants.load(Ordering::Relaxed).saturating_add(grants).min(GRANTS_MAX), Ordering::Relaxed);
    }

    fn may_reset(&self) {
        let resettable = self.resettable.load(Ordering::Relaxed);
        self.resettable.store(resettable.saturating_add(1).min(self.limits.concurrent_streams), Ordering::Relaxed);
    }

    /// A stream was reset. To take back what is over costs the client nothing and may be due to a race, so of these there is room
    /// for as many as requests that were made; what is beyond them is counted.
    fn reset(&self) {
        let resettable = self.resettable.load(Ordering::Relaxed);
        self.resettable.store(resettable.saturating_sub(1), Ordering::Relaxed);
        if resettable == 0 && self.resets.over(self.limits.resets) {
            self.refuse(Reject::Flood(Flood::LateResets(self.limits.resets)), None);
        }
    }

    /// Is this grant one that the client had something for?
    fn is_granted_for_something(&self) -> bool {
        let grants = self.grants.load(Ordering::Relaxed);
        self.grants.store(grants.saturating_sub(1), Ordering::Relaxed);
        grants > 0
    }

    /// How many frames behind the first the codec reads of one head: a quarter more than its limit on heads fills.
    fn continuations_read(&self) -> u32 {
        let fill = (self.limits.header_bytes.saturating_mul(HEADERS_READ) / FRAME_BYTES).max(1);
        fill.saturating_add(fill / 4).max(5)
    }

    /// Did the codec end this stream for this reason, because its client broke the rules? The codec does not say who did, so it is
    /// kept of which streams the client said it.
    fn broke(&self, stream: u32, reason: h2::Reason) -> bool {
        is_for_breach(reason) && !self.left.load(Ordering::Relaxed) && !self.blamed.lock().contains(&stream)
    }

    /// The client took back a stream, for this reason.
    fn took_back(&self, stream: u32, reason: h2::Reason) {
        if is_for_breach(reason) {
            keep(&self.blamed, stream);
        }
    }

    /// Which limit the trailers of a request are over, as the codec read them. What it dropped of them was one that is longer than the
    /// limit, for it reads [`HEADERS_READ`] times that much: it is known by the bytes on the wire, of which a letter takes five bits at
    /// least (RFC 7541 5.2). What another sidecar passes on was held to the limits there, some of it as HTTP/1 counts it.
    pub(super) fn trailers_over(&self, stream: u32, trailers: &HeaderMap, link: bool) -> Option<TrailersOver> {
        let Limits { header_bytes, header_count, .. } = self.limits;
        let over = |size: usize, limit: u32| u32::try_from(size).map_or(true, |size| size > limit);
        if link {
            return over(list_bytes(trailers), header_bytes.saturating_mul(HEADERS_READ - 1)).then_some(TrailersOver::Bytes);
        }
        if over(list_bytes(trailers), header_bytes) || self.trailing.lock().contains(&stream) {
            return Some(TrailersOver::Bytes);
        }
        over(trailers.len(), header_count).then_some(TrailersOver::Count)
    }

    /// The client is given up.
    pub(crate) fn late(&self, stands: Stands) {
        *self.late.lock() = Some(stands);
    }

    /// Why it was.
    pub(crate) fn is_late(&self) -> Option<Stands> {
        *self.late.lock()
    }

    fn refuse(&self, reject: Reject, stream: Option<u32>) {
        self.breach.lock().get_or_insert(Breach { reject, stream });
        self.breached.notify_one();
    }

    fn moved(&self) {
        one_more(&self.moves);
    }
}

/// The clock of one connection. There is one timer, and it is moved only when it would ring too late.
pub(crate) struct Clock {
    seen: (Stands, u32),
    since: Instant,
    /// When the connection is old, until that was told.
    old: Option<Instant>,
    timer: Pin<Box<Sleep>>,
}

/// What the clock of a connection says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Rings {
    /// The client is not to be waited for any longer.
    Late(Stands),
    /// The connection served for as long as one connection does. Told once.
    Old,
}

impl Clock {
    /// Starts now. `spread`, between 0 and 1, makes the connection old a little sooner, so that those that were opened together
    /// do not come back together.
    pub(crate) fn start(traffic: &Traffic, spread: f64) -> Self {
        let timer = Box::pin(sleep(traffic.limits.header_timeout));
        let since = Instant::now();
        let age = traffic.limits.connection_age.mul_f64(1.0 - AGE_JITTER * spread.clamp(0.0, 1.0));
        Self { seen: traffic.stands(), since, old: Some(since + age), timer }
    }

    /// Is ready when there is something to do. To be polled after the codec was: what that did is what is looked at.
    pub(crate) fn poll_rings(&mut self, traffic: &Traffic, cx: &mut Context<'_>) -> Poll<Rings> {
        let seen = traffic.stands();
        if std::mem::replace(&mut self.seen, seen) != seen {
            self.since = Instant::now();
        }
        let late = self.since + traffic.patience(seen.0);
        let end = self.old.map_or(late, |old| late.min(old));
        if end < self.timer.deadline() {
            self.timer.as_mut().reset(end);
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            if self.old.take_if(|old| *old <= now).is_some() {
                return Poll::Ready(Rings::Old);
            }
            if now >= late {
                self.since = now;
                return Poll::Ready(Rings::Late(seen.0));
            }
            self.timer.as_mut().reset(end);
        }
    }
}

impl Unanswered {
    /// Of the connection on which it came.
    pub(super) fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    /// There is an answer.
    pub(crate) fn answered(&mut self) {
        self.answered = true;
    }

    /// Was its stream, which was reset for this reason, ended by the codec, because its client broke the rules?
    pub(super) fn broke(&self, stream: u32, reason: h2::Reason) -> bool {
        self.traffic.broke(stream, reason)
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        let traffic = &self.traffic;
        if !self.answered && self.since.elapsed() < AT_ONCE && traffic.resets.over(traffic.limits.resets) {
            traffic.refuse(Reject::Flood(Flood::Resets(traffic.limits.resets)), None);
        }
    }
}

impl Framed {
    /// Counts the frames of a stream that begins with the preface.
    pub(crate) fn new(io: Wire, traffic: Arc<Traffic>) -> Self {
        let read = Cutter::new(PREFACE_BYTES);
        Self { io, traffic, read, passed: 0, ends_head: true, stream: 0, written: Written::new() }
    }

    fn take(&mut self, mut bytes: &[u8]) {
        while let Some(cut) = self.read.next(&mut bytes) {
            match cut {
                Cut::Frame(frame) => self.frame(frame),
                Cut::End if self.ends_head => self.head_ended(),
                Cut::End => {}
            }
        }
    }

    fn frame(&mut self, frame: Frame) {
        let Frame { length, kind, flags, stream, word } = frame;
        let tiny = kind == DATA && (1..TINY).contains(&length);
        self.traffic.in_body.store(tiny, Ordering::Relaxed);
        if tiny {
            one_more(&self.traffic.tiny);
        }
        // What a piece carries may be shorter by the padding and the byte that says how much that is.
        let padded = kind == DATA && flags & PADDED != 0 && length < TINY + PADDING_MOST;
        self.traffic.in_padding.store(padded, Ordering::Relaxed);
        if padded {
            one_more(&self.traffic.padded);
        }
        match kind {
            HEADERS | CONTINUATION => {
                let traffic = &self.traffic;
                if kind == CONTINUATION {
                    one_more(&traffic.continuations);
                    let bytes = traffic.head_bytes.load(Ordering::Relaxed).saturating_add(length);
                    traffic.head_bytes.store(bytes, Ordering::Relaxed);
                    // Left to the codec, it would be told as a flood of frames: what the codec counts is these.
                    if flags & END_HEADERS == 0 && traffic.is_head_over(HEAD_PASSED_ON) {
                        let stream = traffic.unseen.is_new(self.stream).then_some(self.stream);
                        traffic.refuse(Reject::TooLarge(Limit::HeadBytes(traffic.limits.header_bytes)), stream);
                    }
                } else {
                    self.passed = self.passed.saturating_add(1);
                    one_more(&traffic.heads);
                    if traffic.unseen.is_new(stream) {
                        traffic.may_reset();
                    }
                    traffic.may_grant(GRANTS_EACH);
                    traffic.continuations.store(0, Ordering::Relaxed);
                    traffic.head_bytes.store(length, Ordering::Relaxed);
                    self.stream = stream;
                }
                self.traffic.head.store(true, Ordering::Relaxed);
                self.ends_head = flags & END_HEADERS != 0;
                if self.ends_head && length == 0 {
                    self.head_ended();
                }
            }
            DATA if length > 0 || flags & END_STREAM != 0 => self.traffic.account.received(length),
            // It says something about a stream.
            RST_STREAM => {
                self.passed = self.passed.saturating_add(1);
                one_more(&self.traffic.taken_back);
                self.traffic.took_back(stream, word.into());
                self.traffic.reset();
            }
            WINDOW_UPDATE if self.traffic.is_granted_for_something() => {}
            _nothing_of_a_request => {
                match kind {
                    DATA => one_more(&self.traffic.empties),
                    GOAWAY => self.traffic.left.store(true, Ordering::Relaxed),
                    _another => {}
                }
                let limit = self.traffic.limits.control_frames;
                if self.traffic.control.over(limit) {
                    self.traffic.refuse(Reject::Flood(Flood::ControlFrames(limit)), None);
                }
            }
        }
    }

    fn head_ended(&mut self) {
        self.ends_head = false;
        let traffic = &self.traffic;
        traffic.head.store(false, Ordering::Relaxed);
        if traffic.is_head_over(1) && !traffic.unseen.is_new(self.stream) {
            keep(&traffic.trailing, self.stream);
        }
        traffic.unseen.head(self.stream, traffic.head_bytes.load(Ordering::Relaxed));
    }
}

impl AsyncRead for Framed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.traffic.is_paused() {
            // Who has all requests given out resumes it, and comes back.
            return Poll::Pending;
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        if let Some(bytes) = buf.filled().get(before..) {
            this.traffic.moved();
            this.take(bytes);
            if this.traffic.is_breached() {
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
            if this.passed >= PASS {
                this.passed = 0;
                this.traffic.paused.store(true, Ordering::Relaxed);
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Framed {
    /// So many bytes of these were written, or none yet.
    fn wrote<'a>(&mut self, written: &Poll<io::Result<usize>>, bytes: impl IntoIterator<Item = &'a [u8]>) {
        let blocked = written.is_pending();
        self.traffic.between_frames.store(false, Ordering::Relaxed);
        self.traffic.blocked.store(blocked, Ordering::Relaxed);
        if blocked {
            return;
        }
        self.traffic.moved();
        if let Poll::Ready(Ok(count)) = written {
            let mut left = *count;
            for part in bytes {
                let part = part.get(..left.min(part.len())).unwrap_or_default();
                left -= part.len();
                self.written.take(part, &self.traffic);
            }
        }
    }
}

impl AsyncWrite for Framed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let written = Pin::new(&mut this.io).poll_write(cx, buf);
        this.wrote(&written, [buf]);
        written
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let written = Pin::new(&mut this.io).poll_write_vectored(cx, bufs);
        this.wrote(&written, bufs.iter().map(|buf| &**buf));
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let flushed = Pin::new(&mut this.io).poll_flush(cx);
        // The codec flushes the stream when it has written whatever it held.
        if flushed.is_ready() {
            this.traffic.between_frames.store(true, Ordering::Relaxed);
        }
        this.traffic.blocked.store(flushed.is_pending(), Ordering::Relaxed);
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// The answer to a request whose head is not read to its end: a status, and why (RFC 9113 8.1: before the request is complete;
/// RFC 7541 6.2.2 and 6.3: nothing of it goes into a table, which is empty from here on).
pub(crate) fn answer(stream: u32, told: &Told<'_>) -> Vec<u8> {
    let mut block = vec![TABLE_OF_NOTHING, STATUS_LITERAL];
    string(&mut block, told.status.as_str());
    block.push(NAME_LITERAL);
    string(&mut block, REASON.as_str());
    string(&mut block, told.reason.as_str());
    let mut frame = u32::try_from(block.len()).unwrap_or(0).to_be_bytes().get(1..).unwrap_or_default().to_vec();
    frame.extend_from_slice(&[HEADERS, END_HEADERS | END_STREAM]);
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(&block);
    frame
}

/// A string of a block of headers, whose length has one byte: statuses and reasons are short.
fn string(block: &mut Vec<u8>, text: &str) {
    let text = text.get(..text.len().min(126)).unwrap_or_default();
    block.push(u8::try_from(text.len()).unwrap_or(0));
    block.extend_from_slice(text.as_bytes());
}

/// A GOAWAY that asks for calm and says why (RFC 9113 6.8 and 7).
pub(crate) fn calm(text: &str) -> Vec<u8> {
    let text = text.as_bytes();
    let length = u32::try_from(text.len().saturating_add(8)).unwrap_or(8);
    let mut frame = length.to_be_bytes().get(1..).unwrap_or_default().to_vec();
    // Type and flags, stream 0, the highest stream there can be: each may have been processed.
    frame.extend_from_slice(&[GOAWAY, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, ENHANCE_YOUR_CALM]);
    frame.extend_from_slice(text);
    frame
}

/// Is a stream taken back for this because the other side broke the rules (RFC 9113 5.4.2 and 7)?
fn is_for_breach(reason: h2::Reason) -> bool {
    matches!(reason, h2::Reason::PROTOCOL_ERROR | h2::Reason::FLOW_CONTROL_ERROR | h2::Reason::STREAM_CLOSED)
}

/// One more stream of which something is known, in the place of the first one where there are many.
fn keep(streams: &Mutex<VecDeque<u32>>, stream: u32) {
    let mut streams = streams.lock();
    if streams.len() >= STREAMS_KEPT {
        streams.pop_front();
    }
    streams.push_back(stream);
}

/// One task changes it, so nothing is lost between load and store.
fn one_more(count: &AtomicU32) {
    count.store(count.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

/// Heads and resets after which the requests that came are looked at before more is read. The codec reads whatever is there, and
/// counts requests that were taken back meanwhile; on a link those are of many clients, and of one that left with all of its own.
const PASS: u32 = 128;
/// How often a client may grant something for each head and each piece of an answer, and how little of a piece at once: clients
/// that grant what they read in pieces of 512 bytes, to the stream and to the connection, are no flood.
const GRANTS_EACH: u32 = 4;
const GRANT_LEAST: usize = 256;
/// For the connection as it begins, and as many as are kept.
const GRANTS_FIRST: u32 = 16;
const GRANTS_MAX: u32 = 1 << 20;
/// What is shorter costs the codec as much as this, and so many of one byte are the fewest that it ends a connection for.
const TINY: usize = 256;
const TINY_LEAST: u32 = 1 << 16;
/// What padding can add to a piece (RFC 9113 6.1), and so many that are empty but for it are the fewest that the codec ends a
/// connection for.
const PADDING_MOST: usize = 256;
const PADDED_LEAST: u32 = 100;
/// Of how many streams it is kept that they are unusual.
const STREAMS_KEPT: usize = 256;
/// More than an ordinary client has of what the codec counts.
const FEW: u32 = 4;
const WINDOW: Duration = Duration::from_secs(10);
/// By how much of it the age of a connection may be shorter.
const AGE_JITTER: f64 = 0.2;
/// A request that is taken back sooner was hardly meant.
const AT_ONCE: Duration = Duration::from_secs(1);
const ENHANCE_YOUR_CALM: u8 = 11;
/// How many times the limit on a head is read of one by the codec.
pub(super) const HEADERS_READ: u32 = 4;
/// How many times its limit a head that does not end is passed on to the codec, which takes a quarter more of frames than what
/// it reads of one fills.
const HEAD_PASSED_ON: u32 = 5;
/// The size of a frame, where nobody asked for larger ones (RFC 9113 6.5.2).
const FRAME_BYTES: u32 = 16_384;
/// In a block of headers: the table is emptied; a status follows; a name and its value follow.
const TABLE_OF_NOTHING: u8 = 0x20;
const STATUS_LITERAL: u8 = 0x08;
const NAME_LITERAL: u8 = 0x00;
