//! The dashboard: one page that shows who calls whom, how well, and why something was refused, live.
//!
//! The control plane reads the sidecars' metrics itself, so that the page needs nothing else installed. It reads and
//! shows; it changes nothing.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::base::clock::WallClock;

pub(crate) mod exposition;
pub(crate) mod graph;
mod reading;
mod scrape;

use graph::{Graph, Target, graph};
use scrape::Readings;

/// The page's state; dropping the last clone ends the reading.
#[derive(Debug)]
pub(crate) struct Dashboard {
    readings: Arc<Mutex<Readings>>,
    looked: watch::Sender<Option<Instant>>,
    clock: WallClock,
    scraping: AbortHandle,
}

impl Dashboard {
    /// Starts reading the sidecars of `targets` on the current runtime.
    pub(crate) fn start(targets: watch::Receiver<Vec<Target>>, clock: WallClock) -> Arc<Self> {
        let readings = Arc::new(Mutex::new(Readings::default()));
        let (looked, looked_at) = watch::channel(None);
        let scraping = tokio::spawn(scrape::scrape_forever(targets, Arc::clone(&readings), looked_at)).abort_handle();
        Arc::new(Self { readings, looked, clock, scraping })
    }

    /// What is known now.
    pub(crate) fn graph(&self) -> Graph {
        let now = Instant::now();
        self.looked.send_replace(Some(now));
        let readings = self.readings.lock();
        let age = readings.updated.map(|updated| now.duration_since(updated));
        let mut graph = graph(readings.by_workload.values(), now);
        if let Some(age) = age {
            graph.age_seconds = age.as_secs_f64();
            let at = self.clock.since_epoch().saturating_sub(age);
            let at = jiff::Timestamp::from_millisecond(i64::try_from(at.as_millis()).unwrap_or(i64::MAX));
            graph.updated = at.map(|at| format!("{at:.3}")).unwrap_or_default();
        }
        graph
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        self.scraping.abort();
    }
}

/// `GET /`, the page, and `GET /api/graph`, its data.
pub(crate) fn router(dashboard: Arc<Dashboard>) -> Router {
    Router::new().route("/", get(page)).route("/api/graph", get(data)).with_state(dashboard)
}

async fn page() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CACHE_CONTROL, "no-store"),
        // The page brings all it needs; names that it shows come from others and must never become code.
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
             img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, PAGE).into_response()
}

async fn data(State(dashboard): State<Arc<Dashboard>>) -> Response {
    ([(header::CACHE_CONTROL, "no-store")], Json(dashboard.graph())).into_response()
}

const PAGE: &str = include_str!("page.html");
