//! Bodies that go out on a stream of HTTP/2, as fast as their reader grants, and no longer than it is waited for.
//!
//! Sources: RFC 9113 5.2 (flow control), 10.5. The first piece goes without asking for room: the codec holds it back by itself
//! until there is some, and most bodies are no longer. From then on a body is asked for more only when there is room for it.

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
    /// How long the reader may grant nothing; none: it is waited for elsewhere.
    patience: Option<Duration>,
    timer: Option<Pin<Box<Sleep>>>,
    waits: Option<Instant>,
}

impl Outflow {
    /// A request's body.
    pub(crate) fn new(body: Body, to: SendStream<Bytes>) -> Self {
        Self { body, to, first: true, patience: None, timer: None, waits: None }
    }

    /// An answer's body, whose client is given up when it reads nothing for that long.
    pub(crate) fn patient(body: Body, to: SendStream<Bytes>, patience: Duration) -> Self {
        Self { patience: Some(patience), ..Self::new(body, to) }
    }

    /// From now on nobody waits for an answer: the reader is given up after as long as the sender would be.
    pub(crate) fn alone(&mut self) {
        self.patience = Some(self.body.patience());
    }

    fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        loop {
            if !self.first {
                ready!(self.poll_room(cx))?;
            }
            let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
                // Whoever does not want the rest says so while nothing comes.
                return self.to.poll_reset(cx).map_ok(drop);
            };
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        let end = self.body.is_end_stream();
                        self.first = false;
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
                    self.to.send_reset(reason_of(&error));
                    return Poll::Ready(Ok(()));
                }
                None => {
                    self.to.reserve_capacity(0);
                    return Poll::Ready(self.to.send_data(Bytes::new(), true));
                }
            }
        }
    }

    /// Is ready when the reader grants something.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        self.to.reserve_capacity(1);
        while self.to.capacity() == 0 {
            match self.to.poll_capacity(cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(None) => return Poll::Ready(Err(Reason::CANCEL.into())),
                Poll::Pending => return self.poll_patience(cx),
            }
        }
        self.waits = None;
        Poll::Ready(Ok(()))
    }

    /// Is ready when the reader is not to be waited for any longer.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        let Some(patience) = self.patience else { return Poll::Pending };
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
        self.poll_sent(cx).map(|sent| {
            if let Err(error) = sent {
                tracing::debug!(%error, "a body was not taken whole");
            }
        })
    }
}

/// What a stream is taken back for when its body broke off.
fn reason_of(error: &BodyError) -> Reason {
    match error {
        BodyError::Stream(error) => error.reason().unwrap_or(Reason::INTERNAL_ERROR),
        BodyError::Sender(_) | BodyError::Stalled | BodyError::GivenUp => Reason::INTERNAL_ERROR,
    }
}
