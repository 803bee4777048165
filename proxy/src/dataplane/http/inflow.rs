//! Bodies that come in: from the codec of HTTP/1, or from a stream of HTTP/2.
//!
//! What was read of a stream is granted anew when its reader asks for the next piece, and so has taken this one on.
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

use super::body::BodyError;
use super::credit::Account;
use super::guard::Reading;

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
    account: Arc<Account>,
}

impl Inflow {
    /// What a stream carries behind its head.
    pub(crate) fn stream(from: RecvStream) -> Self {
        if from.is_end_stream() { Self::Empty } else { Self::Stream(Stream::new(from)) }
    }

    /// What a client sends behind the head of a request, on a connection that has this account.
    pub(super) fn upload(from: RecvStream, account: &Arc<Account>) -> Self {
        if from.is_end_stream() {
            return Self::Empty;
        }
        Self::Upload(Upload { stream: Stream::new(from), account: Arc::clone(account) })
    }

    /// The stream of which everything was read, for whoever lets go of it.
    pub(crate) fn spent(&mut self) -> Option<RecvStream> {
        match std::mem::replace(self, Self::Empty) {
            Self::Stream(Stream { from, ended: true, .. }) => Some(from),
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
    fn new(from: RecvStream) -> Self {
        Self { from, owed: 0, data_done: false, ended: false }
    }

    fn poll_frame(&mut self, account: Option<&Account>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        self.release(account);
        if !self.data_done {
            match ready!(self.from.poll_data(cx)) {
                Some(Ok(data)) => {
                    self.owed = data.len();
                    self.ended = self.from.is_end_stream();
                    if self.ended {
                        // Nobody asks again.
                        self.release(account);
                    }
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => self.data_done = true,
            }
        }
        let trailers = ready!(self.from.poll_trailers(cx));
        self.ended = true;
        Poll::Ready(trailers.map(|trailers| trailers.map(Frame::trailers)).transpose())
    }

    /// What was read last was taken on.
    fn release(&mut self, account: Option<&Account>) {
        let bytes = std::mem::take(&mut self.owed);
        if bytes > 0 {
            if let Some(account) = account {
                account.released(bytes);
            }
            // A stream that is over takes no grant any more, and needs none.
            drop(self.from.flow_control().release_capacity(bytes));
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Self { stream, account } = self;
        if !stream.ended {
            stream.release(Some(account));
            // The codec lets go of what nobody read.
            account.released(stream.from.flow_control().used_capacity());
        }
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
            Self::Stream(stream) => stream.poll_frame(None, cx).map_err(BodyError::Stream),
            Self::Upload(Upload { stream, account }) => stream.poll_frame(Some(account), cx).map_err(BodyError::Stream),
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
