//! Bodies that come in: from the codec of HTTP/1, or from a stream of HTTP/2.
//!
//! What was read of a stream is granted anew when its reader asks for the next piece, and so has taken this one on. Its
//! connection's account is told before.
//!
//! The codec of HTTP/2 holds heads to a limit, and of trailers that are over it drops what is beyond, and tells nobody: what is
//! left of them would pass for all of them. So trailers have a limit of their own here, well below the codec's.
//!
//! Sources: RFC 9113 5.2 (flow control), 8.1 (a server that answered in full may stop a request without an
//! error), 8.7. Invariant: a stream that was taken back before its end is an error, never an end. That holds for a reset
//! without an error too: the codec says nothing of one that comes behind the end.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::RecvStream;
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;

use super::body::{BodyError, TrailersOver};
use super::credit::Account;
use super::frames::Traffic;
use super::guard::Reading;
use super::normalize::list_bytes;

/// A body that comes in.
#[derive(Debug)]
pub(crate) enum Inflow {
    /// There is none, or it is without a byte.
    Empty,
    /// The one that reads tells the codec's guard of its end.
    Codec(Incoming, Option<Reading>),
    Stream(Stream),
    Upload(Upload),
}

/// The body on a stream of HTTP/2.
#[derive(Debug)]
pub(crate) struct Stream {
    from: RecvStream,
    account: Arc<Account>,
    /// How large its trailers may be, as HTTP/2 counts them.
    trailers_max: usize,
    /// Was read last and is not granted anew yet.
    owed: usize,
    /// Trailers may come, and nothing else.
    data_done: bool,
    /// The last frame was handed on.
    ended: bool,
}

/// The body of a client's request, on a connection that counts what is read of it.
#[derive(Debug)]
pub(crate) struct Upload {
    stream: Stream,
    traffic: Arc<Traffic>,
    /// It comes from another sidecar.
    link: bool,
}

impl Inflow {
    /// What a stream carries behind the head of an answer, on the connection of this account.
    pub(crate) fn stream(from: RecvStream, account: &Arc<Account>, trailers_max: usize) -> Self {
        if from.is_end_stream() { Self::Empty } else { Self::Stream(Stream::new(from, account, trailers_max)) }
    }

    /// What a client, or another sidecar, sends behind the head of a request, on a connection of which this is known.
    pub(super) fn upload(from: RecvStream, traffic: &Arc<Traffic>, link: bool) -> Self {
        if from.is_end_stream() {
            return Self::Empty;
        }
        // What is known of the frames decides below.
        Self::Upload(Upload { stream: Stream::new(from, &traffic.account, usize::MAX), traffic: Arc::clone(traffic), link })
    }

    /// The stream of which everything was read, for whoever lets go of it.
    pub(crate) fn spent(&mut self) -> Option<Stream> {
        match std::mem::replace(self, Self::Empty) {
            Self::Stream(stream) if stream.ended => Some(stream),
            unread => {
                *self = unread;
                None
            }
        }
    }
}

impl From<Incoming> for Inflow {
    fn from(body: Incoming) -> Self {
        Self::Codec(body, None)
    }
}

impl Stream {
    fn new(from: RecvStream, account: &Arc<Account>, trailers_max: usize) -> Self {
        Self { from, account: Arc::clone(account), trailers_max, owed: 0, data_done: false, ended: false }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.release();
        if !self.data_done {
            match ready!(self.from.poll_data(cx)) {
                Some(Ok(data)) => {
                    self.owed = data.len();
                    self.ended = self.from.is_end_stream();
                    if self.ended {
                        // Nobody asks again.
                        self.release();
                    }
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => self.data_done = true,
            }
        }
        let trailers = ready!(self.from.poll_trailers(cx))?;
        self.ended = true;
        let Some(trailers) = trailers else { return Poll::Ready(None) };
        if list_bytes(&trailers) > self.trailers_max {
            return Poll::Ready(Some(Err(BodyError::Trailers(TrailersOver::Bytes))));
        }
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    /// What was read last was taken on.
    fn release(&mut self) {
        let bytes = std::mem::take(&mut self.owed);
        if bytes > 0 {
            self.account.released(bytes);
            // A stream that is over takes no grant any more, and needs none.
            drop(self.from.flow_control().release_capacity(bytes));
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.ended {
            self.release();
            // The codec lets go of what nobody read.
            self.account.released(self.from.flow_control().used_capacity());
        }
    }
}

impl Upload {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(self.stream.poll_frame(cx)?);
        if let Some(trailers) = frame.as_ref().and_then(Frame::trailers_ref) {
            let stream = self.stream.from.stream_id().as_u32();
            if let Some(over) = self.traffic.trailers_over(stream, trailers, self.link) {
                return Poll::Ready(Some(Err(BodyError::Trailers(over))));
            }
        }
        Poll::Ready(frame.map(Ok))
    }
}

impl http_body::Body for Inflow {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Codec(body, reading) => {
                if let Some(reading) = reading {
                    ready!(reading.poll_clear(cx));
                }
                Pin::new(body).poll_frame(cx).map_err(BodyError::Sender)
            }
            Self::Stream(stream) => stream.poll_frame(cx),
            Self::Upload(upload) => upload.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Codec(body, _reading) => body.is_end_stream(),
            Self::Stream(stream) | Self::Upload(Upload { stream, .. }) => stream.ended,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Codec(body, _reading) => body.size_hint(),
            // Where the length is known, a header says it.
            Self::Stream(_) | Self::Upload(_) => SizeHint::default(),
        }
    }
}
