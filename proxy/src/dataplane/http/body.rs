//! Bodies: one concrete type in all directions, the replay buffer that makes a request repeatable, and the wrapper that
//! counts an answer and completes its record when it ends or is dropped.

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep, sleep_until};

use super::inflow::Inflow;
use super::normalize::cleaned_trailers;
use super::pipeline::BROKE;
use super::record::Record;
use super::reject::Reject;
use crate::dataplane::pool::Lease;
use crate::dataplane::tcp::Counts;
use crate::policy::breaker::Slot;
use crate::policy::limits::Limits;
use crate::telemetry::reason::Reason;

/// Any body that leaves us.
#[derive(Debug, Default)]
pub(crate) enum Body {
    #[default]
    Empty,
    /// A text of ours, or a copy for a shadow.
    Full(Bytes),
    /// The caller's body on its way to one attempt.
    Request(Cursor),
    /// The destination's body on its way to the caller.
    Answer(Box<Answer>),
}

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    /// The side that sends it broke.
    #[error("the body's sender broke off")]
    Sender(#[from] hyper::Error),
    /// The side that sends it took its stream back, or broke.
    #[error("the body's stream broke off")]
    Stream(#[from] h2::Error),
    /// Its trailers are over a limit on heads.
    #[error("the body's trailers are over a limit")]
    Trailers(TrailersOver),
    /// Its sender sent nothing for too long.
    #[error("the body's sender sent nothing for too long")]
    Stalled,
    /// A later attempt reads the body now.
    #[error("the attempt was given up")]
    GivenUp,
}

impl BodyError {
    /// What its sender did wrong, where it did and was not told otherwise.
    fn fault(&self) -> BodyFault {
        let sentence = match self {
            Self::Sender(error) => std::error::Error::source(error).map(ToString::to_string).unwrap_or_default(),
            Self::Trailers(over) => return BodyFault::Trailers(*over),
            Self::Stream(_) | Self::Stalled | Self::GivenUp => String::new(),
        };
        // The codec of HTTP/1 keeps the limits on heads here as well, and says which one in a sentence and no other way.
        match &*sentence {
            "chunk trailers bytes over limit" => BodyFault::Trailers(TrailersOver::Bytes),
            "chunk trailers count overflow" => BodyFault::Trailers(TrailersOver::Count),
            _ if self.is_malformed() => BodyFault::Malformed,
            _ => BodyFault::Left,
        }
    }

    /// Did its sender break the rules? Otherwise it left, or took it back.
    fn is_malformed(&self) -> bool {
        match self {
            Self::Sender(error) => malformed(error),
            Self::Stream(error) => error.is_library(),
            Self::Trailers(_) => true,
            Self::Stalled | Self::GivenUp => false,
        }
    }
}

/// What a caller did wrong while it sent a body.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum BodyFault {
    /// It sent nothing for too long.
    Stalled,
    /// Its chunks or lengths are not valid.
    Malformed,
    /// Its trailers are over a limit on heads.
    Trailers(TrailersOver),
    /// It left before the end.
    Left,
}

/// Which limit on heads trailers are over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum TrailersOver {
    /// They have more bytes than a head may have.
    Bytes,
    /// There are more of them than headers of a head.
    Count,
}

impl TrailersOver {
    /// Of a request, in one sentence.
    pub(crate) fn text_of_request(self) -> &'static str {
        match self {
            Self::Bytes => "the trailers of the request are larger than a head may be (headerBytes)",
            Self::Count => "the request has more trailers than a head may have headers (headerCount)",
        }
    }

    /// The same of an answer.
    fn text_of_answer(self) -> &'static str {
        match self {
            Self::Bytes => "the trailers of the answer are larger than its head may be (headerBytes)",
            Self::Count => "the answer has more trailers than its head may have headers (headerCount)",
        }
    }
}

/// The caller's body, from which attempts read one after the other. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct RequestBody {
    /// None: there is no body.
    shared: Option<Arc<Mutex<Shared>>>,
}

/// A body that is held, for whoever may let it pass and does not keep it.
#[derive(Clone, Debug)]
pub(crate) struct HeldBody(Weak<Mutex<Shared>>);

#[derive(Debug)]
struct Shared {
    source: Inflow,
    /// What was read so far, while all of it fits.
    kept: Vec<Bytes>,
    kept_bytes: usize,
    keep_max: usize,
    /// More was read than is kept: it cannot be sent again.
    lost: bool,
    ended: bool,
    trailers: Option<HeaderMap>,
    /// Which attempt reads. An earlier one that still polls must not take bytes or wake-ups from it.
    reader: u32,
    counts: Arc<Counts>,
    copies: Vec<oneshot::Sender<Bytes>>,
    /// How long its sender may send nothing, since when it does, and what rings then. Most bodies need no timer.
    patience: Duration,
    endless: bool,
    since: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
    fault: Option<BodyFault>,
    /// It is not to be asked for yet.
    held: bool,
    /// Its sender waits to be told that it is wanted, and was not.
    untold: bool,
    /// Who asked all the same, or waits for what may never come.
    waker: Option<Waker>,
}

/// One attempt's reading of the body.
#[derive(Debug)]
pub(crate) struct Cursor {
    shared: Arc<Mutex<Shared>>,
    reader: u32,
    next: usize,
    trailers_sent: bool,
}

/// The destination's answer, watched.
#[derive(Debug)]
pub(crate) struct Answer {
    inner: Inflow,
    counts: Arc<Counts>,
    record: Option<Record>,
    lease: Option<Lease>,
    slot: Option<Slot>,
    request: Option<Unread>,
    extent: Extent,
}

/// How much of an answer there was so far. Most have one piece.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Extent {
    Nothing,
    Piece,
    /// There may be much of it, and its connection is told.
    Large,
}

/// A request's body that may still be held when its answer ended.
#[derive(Debug)]
pub(crate) struct Unread(pub(crate) RequestBody);

impl Drop for Unread {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

impl HeldBody {
    /// It is read again, for its sender is told that it is wanted. `false`: it is gone, and so is who sent it.
    pub(crate) fn release(&self) -> bool {
        let shared = self.0.upgrade();
        let is_there = shared.is_some();
        RequestBody { shared }.wake(|shared| (shared.held, shared.untold) = (false, false));
        is_there
    }

    /// It is read again, and its sender is not told anything.
    pub(crate) fn let_pass(&self) {
        RequestBody { shared: self.0.upgrade() }.wake(|shared| shared.held = false);
    }
}

impl RequestBody {
    /// Takes the caller's body; up to `keep_max` bytes of it are kept so that they can be sent again.
    /// Its sender is waited for no longer than `patience` at a time.
    pub(crate) fn new(source: Inflow, keep_max: usize, patience: Duration, counts: Arc<Counts>) -> Self {
        if source.is_end_stream() {
            return Self { shared: None };
        }
        let shared = Shared {
            source,
            kept: Vec::new(),
            kept_bytes: 0,
            keep_max,
            lost: false,
            ended: false,
            trailers: None,
            reader: 0,
            counts,
            copies: Vec::new(),
            patience,
            endless: false,
            since: None,
            timer: None,
            fault: None,
            held: false,
            untold: false,
            waker: None,
        };
        Self { shared: Some(Arc::new(Mutex::new(shared))) }
    }

    /// A body for the next attempt, from the first byte.
    pub(crate) fn attempt(&self) -> Body {
        let Some(shared) = &self.shared else { return Body::Empty };
        let reader = {
            let mut shared = shared.lock();
            shared.reader = shared.reader.wrapping_add(1);
            shared.reader
        };
        Body::Request(Cursor { shared: Arc::clone(shared), reader, next: 0, trailers_sent: false })
    }

    /// From now on nothing is read of it. `None`: there is no body.
    pub(crate) fn hold(&self) -> Option<HeldBody> {
        let shared = self.shared.as_ref()?;
        {
            let mut shared = shared.lock();
            (shared.held, shared.untold) = (true, true);
        }
        Some(HeldBody(Arc::downgrade(shared)))
    }

    /// If it is still held, or its sender was not told and did not begin, whoever waits to read it waits for nothing any more.
    pub(crate) fn give_up(&self) {
        self.wake(|shared| {
            if shared.held || (shared.untold && shared.kept_bytes == 0) {
                shared.reader = shared.reader.wrapping_add(1);
            }
        });
    }

    fn wake(&self, change: impl FnOnce(&mut Shared)) {
        if let Some(shared) = &self.shared {
            let waker = {
                let mut shared = shared.lock();
                change(&mut shared);
                shared.waker.take()
            };
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    /// From now on its sender may be silent for as long as it likes: it is in a talk, and waits for its turn.
    pub(crate) fn may_be_silent(&self) {
        if let Some(shared) = &self.shared {
            shared.lock().endless = true;
        }
    }

    /// Can it be sent (again) from its first byte?
    pub(crate) fn replayable(&self) -> bool {
        self.shared.as_ref().is_none_or(|shared| !shared.lock().lost)
    }

    /// What its sender did wrong, if it is the reason why it ended.
    pub(crate) fn fault(&self) -> Option<BodyFault> {
        self.shared.as_ref().and_then(|shared| shared.lock().fault)
    }

    /// A copy of the whole body once it was read; the receiver hears nothing if it is larger than what is kept, or
    /// breaks off.
    pub(crate) fn copy(&self) -> oneshot::Receiver<Bytes> {
        let (sender, receiver) = oneshot::channel();
        match &self.shared {
            None => drop(sender.send(Bytes::new())),
            Some(shared) => shared.lock().copies.push(sender),
        }
        receiver
    }
}

/// How to send a body again, from its first byte.
#[derive(Debug)]
pub(crate) struct Replay(Again);

#[derive(Debug)]
enum Again {
    Empty,
    Full(Bytes),
    Request(RequestBody),
    Never,
}

impl Body {
    /// Taken before a body is sent: how to send it once more.
    pub(crate) fn replay(&self) -> Replay {
        Replay(match self {
            Self::Empty => Again::Empty,
            Self::Full(bytes) => Again::Full(bytes.clone()),
            Self::Request(cursor) => Again::Request(RequestBody { shared: Some(Arc::clone(&cursor.shared)) }),
            Self::Answer(_) => Again::Never,
        })
    }
}

impl Replay {
    /// The body once more; none if more of it was read than is kept.
    pub(crate) fn body(&self) -> Option<Body> {
        match &self.0 {
            Again::Empty => Some(Body::Empty),
            Again::Full(bytes) => Some(Body::Full(bytes.clone())),
            Again::Request(body) => body.replayable().then(|| body.attempt()),
            Again::Never => None,
        }
    }
}

impl Shared {
    /// What comes next of the source; it is an error that nothing comes for too long.
    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.source).poll_frame(cx) {
            self.since = None;
            return Poll::Ready(frame);
        }
        if self.endless {
            return Poll::Pending;
        }
        let end = *self.since.get_or_insert_with(Instant::now) + self.patience;
        // The timer is moved only when it rings too soon.
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(end)));
        while timer.as_mut().poll(cx).is_ready() {
            if Instant::now() >= end {
                self.fault = Some(BodyFault::Stalled);
                return Poll::Ready(Some(Err(BodyError::Stalled)));
            }
            timer.as_mut().reset(end);
        }
        Poll::Pending
    }

    fn take(&mut self, data: &Bytes) {
        self.counts.received.fetch_add(u64::try_from(data.len()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.kept_bytes = self.kept_bytes.saturating_add(data.len());
        if self.lost || self.kept_bytes > self.keep_max {
            self.lost = true;
            self.copies.clear();
        } else {
            self.kept.push(data.clone());
        }
    }

    fn end(&mut self) {
        self.ended = true;
        if !self.copies.is_empty() {
            let whole = Bytes::from(self.kept.concat());
            for copy in self.copies.drain(..) {
                // A shadow that was given up wants no copy.
                drop(copy.send(whole.clone()));
            }
        }
    }
}

impl http_body::Body for Cursor {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let mut shared = this.shared.lock();
        if shared.reader != this.reader {
            return Poll::Ready(Some(Err(BodyError::GivenUp)));
        }
        if shared.held {
            shared.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if let Some(data) = shared.kept.get(this.next) {
            this.next += 1;
            return Poll::Ready(Some(Ok(Frame::data(data.clone()))));
        }
        if !shared.ended {
            if shared.untold {
                shared.waker = Some(cx.waker().clone());
            }
            match std::task::ready!(shared.poll_source(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        shared.take(&data);
                        // Whoever sends it on then ends the stream with it: one frame and one turn less for most uploads.
                        if shared.source.is_end_stream() {
                            shared.end();
                        }
                        this.next = if shared.lost {
                            // Nothing is kept any more; what comes next comes from the source.
                            shared.kept.clear();
                            0
                        } else {
                            shared.kept.len()
                        };
                        return Poll::Ready(Some(Ok(Frame::data(data))));
                    }
                    Err(frame) => {
                        shared.trailers = frame.into_trailers().ok().and_then(cleaned_trailers);
                        shared.end();
                    }
                },
                Some(Err(error)) => {
                    if !matches!(error, BodyError::Stalled | BodyError::GivenUp) {
                        shared.fault = Some(error.fault());
                    }
                    shared.lost = true;
                    shared.copies.clear();
                    return Poll::Ready(Some(Err(error)));
                }
                None => shared.end(),
            }
        }
        match (&shared.trailers, this.trailers_sent) {
            (Some(trailers), false) => {
                this.trailers_sent = true;
                Poll::Ready(Some(Ok(Frame::trailers(trailers.clone()))))
            }
            _none_or_sent => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        let shared = self.shared.lock();
        shared.ended && self.next >= shared.kept.len() && (self.trailers_sent || shared.trailers.is_none())
    }

    fn size_hint(&self) -> SizeHint {
        let shared = self.shared.lock();
        let mut hint = shared.source.size_hint();
        if self.next == 0 && !shared.lost {
            // What was kept comes before what is still to be read.
            let kept = u64::try_from(shared.kept_bytes).unwrap_or(u64::MAX);
            match hint.exact() {
                Some(rest) => hint.set_exact(rest.saturating_add(kept)),
                None => hint = SizeHint::default(),
            }
        }
        hint
    }
}

impl Answer {
    /// Passes `inner` on and completes `record` when it ends or is dropped; until then it holds its place upstream.
    pub(crate) fn new(inner: Inflow, record: Record, lease: Lease, slot: Option<Slot>, request: Option<Unread>) -> Self {
        let counts = record.counts();
        let mut answer = Self { inner, counts, record: Some(record), lease: Some(lease), slot, request, extent: Extent::Nothing };
        if answer.inner.is_end_stream() {
            answer.ended();
        }
        answer
    }

    /// Another piece came.
    fn grew(&mut self) {
        match self.extent {
            Extent::Nothing => self.extent = Extent::Piece,
            // Its reader may stop at any time. Those of HTTP/1 take two pieces before they can stand still.
            Extent::Piece => self.may_be_large(),
            Extent::Large => {}
        }
    }

    fn may_be_large(&mut self) {
        if self.extent != Extent::Large {
            self.extent = Extent::Large;
            if let Some(lease) = &self.lease {
                lease.may_be_large();
            }
        }
    }

    /// Everything was read. The record is complete when this is dropped: whoever sends the body on may still have to say that
    /// its client did not take it.
    fn ended(&mut self) {
        if let Some(record) = &mut self.record {
            record.body_ended();
        }
        if let Some(lease) = self.lease.take() {
            lease.give_back(self.inner.spent());
        }
    }
}

/// The same of what the codec of HTTP/1 says.
fn malformed(error: &hyper::Error) -> bool {
    if error.is_incomplete_message() || error.is_canceled() || error.is_closed() || error.is_timeout() {
        return false;
    }
    std::error::Error::source(error)
        .and_then(|source| source.downcast_ref::<std::io::Error>())
        .is_some_and(|error| matches!(error.kind(), std::io::ErrorKind::InvalidInput | std::io::ErrorKind::InvalidData))
}

impl Body {
    /// The caller's body that is read, if it is one.
    pub(crate) fn origin(&self) -> Option<RequestBody> {
        if let Self::Request(cursor) = self { Some(RequestBody { shared: Some(Arc::clone(&cursor.shared)) }) } else { None }
    }

    /// How long whoever sends or reads it is waited for.
    pub(crate) fn patience(&self) -> Duration {
        match self {
            Self::Request(cursor) => cursor.shared.lock().patience,
            Self::Empty | Self::Full(_) | Self::Answer(_) => Limits::default().stream_timeout,
        }
    }

    /// The client broke the rules before it had the whole answer.
    pub(crate) fn reader_broke(&mut self) {
        if let Self::Answer(answer) = self
            && let Some(record) = &mut answer.record
        {
            record.caller_broke(&Reject::BadRequest(BROKE));
        }
    }

    /// Its reader has no room for what there is of it.
    pub(crate) fn waits(&mut self) {
        if let Self::Answer(answer) = self {
            answer.may_be_large();
        }
    }

    /// The client is given up, for it reads nothing.
    pub(crate) fn slow_reader(&mut self) {
        if let Self::Answer(answer) = self
            && let Some(record) = &mut answer.record
        {
            record.slow_reader();
        }
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = std::task::ready!(Pin::new(&mut self.inner).poll_frame(cx));
        match frame {
            Some(Ok(frame)) => {
                let frame = match frame.into_data() {
                    Ok(data) => Frame::data(data),
                    Err(frame) => match frame.into_trailers().ok().and_then(cleaned_trailers) {
                        Some(trailers) => Frame::trailers(trailers),
                        None => {
                            self.ended();
                            return Poll::Ready(None);
                        }
                    },
                };
                if let Some(data) = frame.data_ref() {
                    self.counts.sent.fetch_add(u64::try_from(data.len()).unwrap_or(u64::MAX), Ordering::Relaxed);
                    self.grew();
                }
                if let Some(record) = &mut self.record
                    && let Some(trailers) = frame.trailers_ref()
                {
                    record.grpc_status(trailers);
                }
                // Who sends the body on need not ask again after the last frame.
                if self.inner.is_end_stream() {
                    self.ended();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                if let Some(mut record) = self.record.take() {
                    record.body_broke(if error.is_malformed() { Reason::UpstreamProtocol } else { Reason::UpstreamReset });
                    if let BodyFault::Trailers(over) = error.fault() {
                        record.detail(over.text_of_answer());
                    }
                }
                // Whoever is told of the end may be slow to pass it on.
                (self.lease, self.slot, self.request) = (None, None, None);
                Poll::Ready(Some(Err(error)))
            }
            None => {
                self.ended();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                *self = Self::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Self::Request(_) | Self::Answer(_) => loop {
                let frame = std::task::ready!(match &mut *self {
                    Self::Request(cursor) => Pin::new(cursor).poll_frame(cx),
                    Self::Answer(answer) => Pin::new(&mut **answer).poll_frame(cx),
                    Self::Empty | Self::Full(_) => Poll::Ready(None),
                });
                // A piece without bytes says nothing. Sent on, it is a DATA frame that is empty and ends nothing: peers close
                // an HTTP/2 connection after a hundred of them, as they must against CVE-2019-9518.
                let empty = matches!(&frame, Some(Ok(frame)) if frame.data_ref().is_some_and(Bytes::is_empty));
                if !empty {
                    return Poll::Ready(frame);
                }
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(_) => false,
            Self::Request(cursor) => cursor.is_end_stream(),
            Self::Answer(answer) => answer.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            // Without a length of its own: the codec would say one of requests whose caller did not.
            Self::Empty => SizeHint::default(),
            Self::Full(bytes) => SizeHint::with_exact(u64::try_from(bytes.len()).unwrap_or(u64::MAX)),
            Self::Request(cursor) => cursor.size_hint(),
            Self::Answer(answer) => answer.size_hint(),
        }
    }
}

/// What of a request is kept so that it can be sent again or copied.
pub(crate) const KEEP_MAX: usize = 64 * 1024;
