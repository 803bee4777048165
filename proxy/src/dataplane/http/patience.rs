//! One answer on a connection of HTTP/2 whose client reads nothing of it is given up after a while, and no other one.
//!
//! Sources: RFC 9113 5.2 (flow control), 10.5. The codec does not ask for more of an answer while its client grants no
//! window, so an answer that was handed a part and is not asked for the next one waits for its client, and in any other
//! case it waits for the application, whose times are limited elsewhere. The stream is reset when its future is dropped.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use super::body::{Body, BodyError};
use crate::dataplane::tasks::Tasks;

/// Runs the streams of one connection.
#[derive(Clone, Debug)]
pub(crate) struct Patient {
    tasks: Tasks,
    limit: Duration,
}

/// What is known of one stream, by its own task alone.
#[derive(Debug, Default)]
struct Reader {
    /// A part of the answer was handed on, and the next one is not asked for yet.
    behind: AtomicBool,
    parts: AtomicU32,
    /// It was not waited for any longer.
    given_up: AtomicBool,
}

tokio::task_local! {
    static READER: Reader;
}

/// An answer's body that notes when it is asked.
pub(crate) struct Noted(pub(crate) Body);

impl Patient {
    /// Streams run among `tasks`, and none stands still for longer than `limit`.
    pub(crate) fn new(tasks: Tasks, limit: Duration) -> Self {
        Self { tasks, limit }
    }
}

impl<F> hyper::rt::Executor<F> for Patient
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, stream: F) {
        self.tasks.spawn(READER.scope(Reader::default(), watch(stream, self.limit)));
    }
}

/// Is the stream that ends now one that was given up, because its client does not read?
pub(crate) fn given_up() -> bool {
    READER.try_with(|reader| reader.given_up.load(Ordering::Relaxed)).unwrap_or(false)
}

/// Runs a stream to its end, or until it stood still for too long.
async fn watch<F: Future>(stream: F, limit: Duration) {
    let mut stream = pin!(Some(stream));
    let mut timer: Option<Pin<Box<Sleep>>> = None;
    let (mut seen, mut since) = (0, None);
    poll_fn(|cx| {
        let Some(running) = stream.as_mut().as_pin_mut() else { return Poll::Ready(()) };
        if running.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let (behind, parts) = READER.with(|reader| (reader.behind.load(Ordering::Relaxed), reader.parts.load(Ordering::Relaxed)));
        if !behind {
            since = None;
            return Poll::Pending;
        }
        if parts != seen {
            (seen, since) = (parts, None);
        }
        let end = *since.get_or_insert_with(Instant::now) + limit;
        // The timer is moved only when it rings too soon.
        let timer = timer.get_or_insert_with(|| Box::pin(sleep_until(end)));
        while timer.as_mut().poll(cx).is_ready() {
            if Instant::now() >= end {
                READER.with(|reader| reader.given_up.store(true, Ordering::Relaxed));
                // Dropped here, where its record still finds out why.
                stream.set(None);
                return Poll::Ready(());
            }
            timer.as_mut().reset(end);
        }
        Poll::Pending
    })
    .await;
}

impl http_body::Body for Noted {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.0).poll_frame(cx);
        // Outside of a stream's task nobody watches.
        let noted = READER.try_with(|reader| {
            reader.behind.store(polled.is_ready(), Ordering::Relaxed);
            if polled.is_ready() {
                reader.parts.store(reader.parts.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
            }
        });
        debug_assert!(noted.is_ok(), "a stream runs in its own task");
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}
