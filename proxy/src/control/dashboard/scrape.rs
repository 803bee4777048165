//! Reads every sidecar's metrics: a few at a time, each within its time and size, so that a pod that hangs delays nobody.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, timeout};

use super::graph::{Target, Watched};
use super::reading::Reading;
use crate::base::names::Named;

/// Everything that was read.
#[derive(Debug, Default)]
pub(crate) struct Readings {
    pub(crate) by_workload: BTreeMap<Named, Watched>,
    /// When the last round ended.
    pub(crate) updated: Option<Instant>,
}

/// Reads the targets, over and over, until the future is dropped. `watched_at` is when somebody last looked, if ever.
pub(crate) async fn scrape_forever(
    targets: watch::Receiver<Vec<Target>>,
    readings: Arc<Mutex<Readings>>,
    watched_at: watch::Receiver<Option<Instant>>,
) {
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = Instant::now();
    loop {
        tick.tick().await;
        // Reading costs every sidecar a little: when nobody looks, now and then is enough to have something to show.
        let is_watched = watched_at.borrow().is_some_and(|looked| looked.elapsed() <= ATTENTION);
        if !is_watched && last.elapsed() < EVERY_UNWATCHED {
            continue;
        }
        let current = targets.borrow().clone();
        round(current, &readings).await;
        // From the round's end: one over many sidecars may take longer than the pause.
        last = Instant::now();
    }
}

async fn round(targets: Vec<Target>, readings: &Arc<Mutex<Readings>>) {
    {
        let mut readings = readings.lock();
        let mut before = std::mem::take(&mut readings.by_workload);
        for target in &targets {
            let mut watched = before.remove(&target.workload).unwrap_or_else(|| Watched {
                target: target.clone(),
                readings: Vec::new(),
                error: Some("not read yet".to_owned()),
            });
            // Another address is another pod of the same name: its counters are others.
            if watched.target.address != target.address {
                watched.readings.clear();
            }
            watched.target = target.clone();
            readings.by_workload.insert(target.workload.clone(), watched);
        }
    }
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let mut scrapes = JoinSet::new();
    for target in targets {
        let room = Arc::clone(&room);
        scrapes.spawn(async move {
            // The semaphore is never closed; if it were, reading unbounded would still be right.
            let _place = room.acquire_owned().await;
            let text = timeout(SCRAPE_AT_MOST, scrape(SocketAddr::new(target.address, METRICS_PORT))).await;
            let text = text.unwrap_or_else(|_elapsed| Err(ScrapeError::Slow));
            (target.workload, text.map(|text| Reading::parse(&text, Instant::now())))
        });
    }
    while let Some(done) = scrapes.join_next().await {
        let Ok((workload, outcome)) = done else { continue };
        let mut readings = readings.lock();
        let Some(watched) = readings.by_workload.get_mut(&workload) else { continue };
        match outcome {
            Ok(reading) => {
                watched.error = None;
                keep(&mut watched.readings, reading);
            }
            Err(error) => {
                tracing::debug!(%error, %workload, "cannot read sidecar");
                watched.error = Some(error.to_string());
            }
        }
    }
    readings.lock().updated = Some(Instant::now());
}

/// Keeps the newest reading and two older ones, so that there is always one some seconds ago to compare with.
fn keep(readings: &mut Vec<Reading>, newest: Reading) {
    if let [_, middle, _] = readings.as_slice() {
        if newest.at.duration_since(middle.at) >= COMPARE_AFTER {
            readings.remove(0);
        } else {
            readings.truncate(2);
        }
    }
    readings.push(newest);
}

/// Why a sidecar told nothing.
#[derive(Debug, thiserror::Error)]
enum ScrapeError {
    /// The pod's, or the way to it.
    #[error("cannot connect: {0}")]
    Connect(#[source] std::io::Error),
    #[error("no answer in time")]
    Slow,
    #[error("broken answer: {0}")]
    Http(#[from] hyper::Error),
    #[error("answered {0}")]
    Status(http::StatusCode),
    #[error("the answer is too large or broke off")]
    Body,
}

async fn scrape(address: SocketAddr) -> Result<String, ScrapeError> {
    let stream = TcpStream::connect(address).await.map_err(ScrapeError::Connect)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = http::Request::get("/metrics")
        .header(http::header::HOST, address.to_string())
        .header(http::header::CONNECTION, "close")
        .body(Empty::<Bytes>::new());
    let Ok(request) = request else { return Err(ScrapeError::Body) };
    let exchange = async {
        let response = sender.send_request(request).await?;
        if response.status() != http::StatusCode::OK {
            return Err(ScrapeError::Status(response.status()));
        }
        let body = Limited::new(response.into_body(), BODY_MAX).collect().await.map_err(|_too_large| ScrapeError::Body)?;
        Ok(String::from_utf8_lossy(&body.to_bytes()).into_owned())
    };
    // The connection's own future moves the bytes; when it ends first, the exchange has all that there is.
    let (text, _ended) = tokio::join!(exchange, connection);
    text
}

/// Where a sidecar serves its metrics.
const METRICS_PORT: u16 = 14021;
const EVERY: Duration = Duration::from_secs(1);
const EVERY_UNWATCHED: Duration = Duration::from_secs(10);
/// How long somebody who looked once is taken to look.
const ATTENTION: Duration = Duration::from_secs(30);
/// Rates are over a time between this and twice this.
const COMPARE_AFTER: Duration = Duration::from_secs(5);
/// Sidecars that are read at the same time.
const AT_ONCE: usize = 16;
const SCRAPE_AT_MOST: Duration = Duration::from_millis(900);
const BODY_MAX: usize = 8 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn there_is_always_a_reading_some_seconds_ago_to_compare_with() {
        let start = Instant::now();
        let mut readings = Vec::new();
        for second in 0..60 {
            keep(&mut readings, Reading::parse("", start + Duration::from_secs(second)));
            assert!(readings.len() <= 3);
            let span = readings.last().unwrap().at - readings[0].at;
            assert!(span <= 2 * COMPARE_AFTER, "{span:?}");
            assert!(second < 5 || span >= COMPARE_AFTER, "{second}: {span:?}");
        }
    }
}
