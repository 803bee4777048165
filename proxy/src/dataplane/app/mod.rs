//! Asks the own application what the kubelet and Prometheus want to know of it: they are not of the mesh, and strict mutual
//! TLS would let neither in.
//!
//! The door is open to whoever reaches the pod, in clear, so what can be asked is exactly what the injection wrote down, in the
//! form that it wrote down. Whoever asks again while an answer is on its way gets the same one: no crowd of strangers makes
//! more of it than one question of each kind at a time, and none keeps the kubelet waiting for a place.
//!
//! Source: the kubelet's prober (`pkg/probe`), whose judgement of an answer holds here too.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use parking_lot::Mutex;
use prometheus::IntCounterVec;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{info, warn};

use super::Window;
use super::pool::connect::Dial;
use crate::admin::Caller;
use crate::base::net::BoxedIo;
use crate::model::app_doors::{AppDoors, AppProbe, Ask, HttpDoor, METRICS_PATH, PROBE_PATH, ProbeKind};
use crate::telemetry::metrics::Metrics;

mod grpc;
mod http;
#[cfg(test)]
mod tests;
mod tls;

/// Whether the app is well; if not, why.
type Verdict = Result<(), String>;

/// Where a question of one probe stands.
type Lane = Mutex<Option<WeakShared<BoxFuture<'static, Verdict>>>>;

/// Asks in the place of others.
#[derive(Debug)]
pub(crate) struct Deputy {
    probes: BTreeMap<String, Probe>,
    metrics: Option<HttpDoor>,
    /// Readers of the app's metrics at a time.
    readers: Arc<Semaphore>,
    window: Arc<Window>,
    asked: IntCounterVec,
    dial: Arc<dyn Dial>,
}

#[derive(Debug)]
struct Probe {
    is: AppProbe,
    lane: Lane,
    /// What it came to last, to tell the log of changes alone.
    last: Mutex<Option<Verdict>>,
}

/// The doors of the app, for the port that the network reaches.
pub(crate) fn routes(doors: AppDoors, window: &Arc<Window>, metrics: &Metrics, dial: Arc<dyn Dial>) -> Router {
    let probe = |is| Probe { is, lane: Mutex::default(), last: Mutex::default() };
    let deputy = Deputy {
        probes: doors.probes.into_iter().map(|(name, is)| (name, probe(is))).collect(),
        metrics: doors.metrics,
        readers: Arc::new(Semaphore::new(READERS_MAX)),
        window: Arc::clone(window),
        asked: metrics.app_asked.clone(),
        dial,
    };
    Router::new()
        .route(&format!("{PROBE_PATH}{{container}}/{{kind}}"), get(probe_of))
        .route(METRICS_PATH, get(metrics_of))
        .with_state(Arc::new(deputy))
}

async fn probe_of(
    State(deputy): State<Arc<Deputy>>,
    Extension(Caller(caller)): Extension<Caller>,
    Path((container, kind)): Path<(String, String)>,
) -> Response {
    let name = format!("{container}/{kind}");
    if !deputy.probes.contains_key(&name) {
        return (StatusCode::NOT_FOUND, "the pod has no probe of that name\n").into_response();
    }
    match deputy.answer(&name, caller).await {
        Ok(()) => "the app is well\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why + "\n").into_response(),
    }
}

async fn metrics_of(
    State(deputy): State<Arc<Deputy>>,
    Extension(Caller(caller)): Extension<Caller>,
    headers: HeaderMap,
) -> Response {
    let Some(door) = &deputy.metrics else {
        return (StatusCode::NOT_FOUND, "the pod has no metrics of its own\n").into_response();
    };
    let Ok(reader) = Arc::clone(&deputy.readers).try_acquire_owned() else {
        return (StatusCode::TOO_MANY_REQUESTS, "others read the app's metrics at this moment\n").into_response();
    };
    let read = async {
        let io = deputy.connect(door.port, caller).await?;
        http::read(io.0, io.1, door, &headers, reader).await
    };
    let read = timeout(METRICS_AT_MOST, read).await;
    deputy.count("metrics", matches!(read, Ok(Ok(_))));
    match read {
        Ok(Ok(answer)) => answer,
        Ok(Err(why)) => (StatusCode::BAD_GATEWAY, format!("the app's metrics cannot be read: {why}\n")).into_response(),
        Err(_elapsed) => (StatusCode::GATEWAY_TIMEOUT, "the app's metrics did not come in time\n").into_response(),
    }
}

impl Deputy {
    /// What the probe of this name comes to; the question that is on its way, if there is one.
    async fn answer(self: &Arc<Self>, name: &str, caller: SocketAddr) -> Verdict {
        let Some(probe) = self.probes.get(name) else { return Err("the pod has no probe of that name".to_owned()) };
        let question = {
            let mut lane = probe.lane.lock();
            // Where whoever asked has gone, the question went with him.
            let under_way = lane.as_ref().and_then(WeakShared::upgrade).filter(|question| question.peek().is_none());
            under_way.unwrap_or_else(|| {
                let question = self.question(name.to_owned(), caller);
                *lane = question.downgrade();
                question
            })
        };
        let verdict = question.await;
        let mut last = probe.last.lock();
        if last.as_ref() != Some(&verdict) {
            match &verdict {
                Err(why) => warn!(probe = name, why, "the app fails its probe"),
                // That it is well from the first time on is as it should be.
                Ok(()) if last.is_some() => info!(probe = name, "the app passes its probe"),
                Ok(()) => {}
            }
            *last = Some(verdict.clone());
        }
        verdict
    }

    fn question(self: &Arc<Self>, name: String, caller: SocketAddr) -> Shared<BoxFuture<'static, Verdict>> {
        let deputy = Arc::clone(self);
        let question = async move {
            let Some(Probe { is, .. }) = deputy.probes.get(&name) else { return Ok(()) };
            let at_most = Duration::from_secs(is.timeout_seconds.into());
            let verdict = timeout(at_most, deputy.ask(&is.ask, caller)).await;
            let verdict = verdict.unwrap_or_else(|_elapsed| Err(format!("the app did not answer within {at_most:?}")));
            let kind = ProbeKind::ALL.into_iter().find(|kind| name.ends_with(kind.as_str()));
            deputy.count(kind.map_or("unknown", ProbeKind::as_str), verdict.is_ok());
            verdict
        };
        question.boxed().shared()
    }

    fn count(&self, what: &str, answered: bool) {
        self.asked.with_label_values(&[what, if answered { "passed" } else { "failed" }]).inc();
    }

    async fn ask(&self, ask: &Ask, caller: SocketAddr) -> Verdict {
        match ask {
            Ask::Http(door) => http::probe(|| self.connect(door.port, caller).boxed(), door).await,
            Ask::Tcp(door) => self.connect(door.port, caller).await.map(drop),
            Ask::Grpc(door) => {
                let (io, at) = self.connect(door.port, caller).await?;
                grpc::probe(io, at, &door.service).await
            }
        }
    }

    /// A connection to the app, at the address at which the kubelet would ask, with the caller as the client that the app sees.
    async fn connect(&self, port: u16, caller: SocketAddr) -> Result<(BoxedIo, SocketAddr), String> {
        let Some(ip) = self.window.address() else {
            return Err("the sidecar does not know the pod's address yet: it is not enrolled".to_owned());
        };
        let at = SocketAddr::new(ip, port);
        // A client of the address's own family, as capture demands.
        let caller = if caller.is_ipv4() == at.is_ipv4() { caller } else { SocketAddr::new(ip, caller.port()) };
        match self.dial.dial(at, Some(caller)).await {
            Ok(io) => Ok((io, at)),
            Err(error) => Err(format!("cannot connect to {at}: {error}")),
        }
    }
}

/// One Prometheus, and another one.
const READERS_MAX: usize = 4;
/// Until the app's answer begins.
const METRICS_AT_MOST: Duration = Duration::from_secs(10);
