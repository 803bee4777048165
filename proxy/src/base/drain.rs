//! Graceful stop: one side says stop, everybody who works hears it, and the side that said it waits for the last of
//! them or for a deadline.

use std::time::Duration;

use tokio::sync::{mpsc, watch};

/// Says stop.
#[derive(Debug)]
pub(crate) struct Drain {
    stop: watch::Sender<bool>,
    last: mpsc::Receiver<()>,
}

/// Held by whoever must finish before the process may go; dropping it says finished.
#[derive(Clone, Debug)]
pub(crate) struct DrainGuard {
    stop: watch::Receiver<bool>,
    _held: mpsc::Sender<()>,
}

impl Drain {
    /// A drain and the first of its guards.
    pub(crate) fn new() -> (Self, DrainGuard) {
        let (stop, stopped) = watch::channel(false);
        let (held, last) = mpsc::channel(1);
        (Self { stop, last }, DrainGuard { stop: stopped, _held: held })
    }

    /// Says stop and waits until every guard is gone; `false` if some were left after `at_most`.
    pub(crate) async fn drain(mut self, at_most: Duration) -> bool {
        self.stop.send_replace(true);
        tokio::time::timeout(at_most, self.last.recv()).await.is_ok()
    }
}

impl DrainGuard {
    /// Returns when stop was said. Cancel-safe.
    pub(crate) async fn stopped(&mut self) {
        // An error means that the drain itself is gone, which is the same news.
        if self.stop.wait_for(|stop| *stop).await.is_err() {}
    }

    /// Finished, and hears of the stop all the same.
    pub(crate) fn into_news(self) -> watch::Receiver<bool> {
        self.stop
    }

    /// Was stop said?
    pub(crate) fn is_stopped(&self) -> bool {
        *self.stop.borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn drain_waits_for_the_last_guard() {
        let (drain, mut guard) = Drain::new();
        let worker = tokio::spawn(async move {
            guard.stopped().await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        });
        assert!(drain.drain(Duration::from_secs(2)).await);
        worker.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn drain_gives_up_at_its_deadline() {
        let (drain, guard) = Drain::new();
        assert!(!drain.drain(Duration::from_secs(2)).await);
        drop(guard);
    }
}
