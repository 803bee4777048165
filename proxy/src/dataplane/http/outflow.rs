//! Bodies that go out on a stream of HTTP/2, as fast as their reader grants, and no longer than it is waited for.
//!
//! Sources: RFC 9113 5.2 (flow control), 10.5. The first piece of a body is asked for without asking for room: most bodies are
//! no longer. From then on a body is asked for more only when there is room for it. Where the reader is not to be waited for
//! forever, the codec gets no byte that there is no room for: it would keep it as long as the reader likes.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, SendStream};
use http_body::Body as _;
use tokio::time::{Instant, Sleep, sleep_until};

use super::body::{Body, BodyError};

/// A body on its way into a stream. Ready when nothing more is to be sent, whatever the reason; dropped before, it takes the
/// stream back.
pub(crate) struct Outflow {
    body: Body,
    to: SendStream<Bytes>,
    first: bool,
    /// What there was no room for yet.
    kept: Bytes,
    /// Nothing comes behind what is kept.
    last: bool,
    /// The body broke off: what the stream is to be taken back for.
    broken: Option<Reason>,
    /// How long the reader may grant nothing; none: it is waited for elsewhere.
    patience: Option<Duration>,
    timer: Option<Pin<Box<Sleep>>>,
    waits: Option<Instant>,
    /// The stream was over before the body was.
    cut: bool,
}

impl Outflow {
    /// A request's body.
    pub(crate) fn new(body: Body, to: SendStream<Bytes>) -> Self {
        let kept = Bytes::new();
        Self { body, to, first: true, kept, last: false, broken: None, patience: None, timer: None, waits: None, cut: false }
    }

    /// An answer's body, whose client is given up when it reads nothing for that long.
    pub(crate) fn patient(body: Body, to: SendStream<Bytes>, patience: Duration) -> Self {
        Self { patience: Some(patience), ..Self::new(body, to) }
    }

    /// From now on nobody waits for an answer: the reader is given up after as long as the sender would be.
    pub(crate) fn alone(&mut self) {
        self.patience = Some(self.body.patience());
    }

    /// When it is ready: was the stream over before the body was?
    pub(crate) fn is_cut(&self) -> bool {
        self.cut
    }

    /// It was, because its reader broke the rules.
    pub(crate) fn reader_broke(&mut self) {
        self.body.reader_broke();
    }

    fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        loop {
            ready!(self.poll_kept(cx))?;
            if let Some(reason) = self.broken {
                self.to.send_reset(reason);
                return Poll::Ready(Ok(()));
            }
            if self.last {
                return Poll::Ready(Ok(()));
            }
            if !self.first {
                ready!(self.poll_room(1, cx))?;
            }
            let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
                // Whoever does not want the rest says so while nothing comes.
                ready!(self.to.poll_reset(cx))?;
                self.cut = true;
                return Poll::Ready(Ok(()));
            };
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        let end = self.body.is_end_stream();
                        self.first = false;
                        if self.patience.is_some() && !self.has_room(data.len()) {
                            (self.kept, self.last) = (data, end);
                            continue;
                        }
                        self.to.send_data(data, end)?;
                        if end {
                            return Poll::Ready(Ok(()));
                        }
                    }
                    Err(frame) => {
                        // What was asked for and not used is another stream's.
                        self.to.reserve_capacity(0);
                        return Poll::Ready(match frame.into_trailers() {
                            Ok(trailers) => self.to.send_trailers(trailers),
                            Err(_neither) => self.to.send_data(Bytes::new(), true),
                        });
                    }
                },
                Some(Err(error)) => {
                    // The codec drops what it was handed before and has not written yet. Its turn comes before the next one here.
                    self.broken = Some(reason_of(&error));
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                None => {
                    self.to.reserve_capacity(0);
                    return Poll::Ready(self.to.send_data(Bytes::new(), true));
                }
            }
        }
    }

    /// Sends what is kept, as room for it comes.
    fn poll_kept(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        while !self.kept.is_empty() {
            let room = ready!(self.poll_room(self.kept.len(), cx))?;
            let piece = self.kept.split_to(room.min(self.kept.len()));
            self.to.send_data(piece, self.last && self.kept.is_empty())?;
        }
        Poll::Ready(Ok(()))
    }

    /// Does the reader grant as much already?
    fn has_room(&mut self, wanted: usize) -> bool {
        self.to.reserve_capacity(wanted);
        self.to.capacity() >= wanted
    }

    /// Is ready when the reader grants something of what is wanted: how much.
    fn poll_room(&mut self, wanted: usize, cx: &mut Context<'_>) -> Poll<Result<usize, h2::Error>> {
        self.to.reserve_capacity(wanted);
        loop {
            match self.to.capacity() {
                0 => match self.to.poll_capacity(cx) {
                    Poll::Ready(Some(Ok(_))) => {}
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                    Poll::Ready(None) => return Poll::Ready(Err(Reason::CANCEL.into())),
                    Poll::Pending => return self.poll_patience(cx),
                },
                room => {
                    self.waits = None;
                    return Poll::Ready(Ok(room));
                }
            }
        }
    }

    /// Is ready when the reader is not to be waited for any longer.
    fn poll_patience<T>(&mut self, cx: &mut Context<'_>) -> Poll<Result<T, h2::Error>> {
        let Some(patience) = self.patience else { return Poll::Pending };
        self.body.waits();
        let end = *self.waits.get_or_insert_with(Instant::now) + patience;
        // The timer is moved only when it rings too soon.
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(end)));
        while timer.as_mut().poll(cx).is_ready() {
            if Instant::now() >= end {
                self.body.slow_reader();
                self.to.send_reset(Reason::CANCEL);
                return Poll::Ready(Err(Reason::CANCEL.into()));
            }
            timer.as_mut().reset(end);
        }
        Poll::Pending
    }
}

impl Future for Outflow {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if let Err(error) = ready!(self.poll_sent(cx)) {
            tracing::debug!(%error, "a body was not taken whole");
            self.cut = true;
            // Others may hold the stream. Without its end and without this its reader would wait for more.
            self.to.send_reset(Reason::INTERNAL_ERROR);
        }
        Poll::Ready(())
    }
}

/// What a stream is taken back for when its body broke off.
fn reason_of(error: &BodyError) -> Reason {
    match error {
        // Without an error it would pass for a whole one. What its sender did wrong is not the reader's doing.
        BodyError::Stream(error) if !error.is_library() => {
            error.reason().filter(|reason| *reason != Reason::NO_ERROR).unwrap_or(Reason::INTERNAL_ERROR)
        }
        BodyError::Stream(_) => Reason::INTERNAL_ERROR,
        BodyError::Sender(_) | BodyError::Trailers(_) | BodyError::Stalled | BodyError::GivenUp => Reason::INTERNAL_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use http::{Request, Response};

    use super::*;

    /// Who reads the request holds the stream as well, so that its end would not be heard by itself.
    #[tokio::test]
    async fn a_stream_that_takes_no_more_of_a_body_is_taken_back() {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let served = tokio::spawn(async move {
            let mut codec = h2::server::handshake(far).await.unwrap();
            let (request, mut respond) = codec.accept().await.unwrap().unwrap();
            let mut to = respond.send_response(Response::new(()), false).unwrap();
            to.send_data(Bytes::from_static(b"all"), true).unwrap();
            Outflow::new(Body::Full(Bytes::from_static(b"more")), to).await;
            // The codec goes on.
            drop(codec.accept().await);
            drop((request, respond));
        });
        let (sender, connection) = h2::client::handshake(near).await.unwrap();
        let driven = tokio::spawn(connection);
        let (answer, _upload) =
            sender.ready().await.unwrap().send_request(Request::post("http://api.shop/").body(()).unwrap(), false).unwrap();
        assert_eq!(answer.await.unwrap_err().reason(), Some(Reason::INTERNAL_ERROR));
        driven.abort();
        served.abort();
    }
}
