//! What the node agent counts, and where it is read: `/metrics`, `/ready`, `/capture` and `/flows` on a port of their own.
//!
//! Invariant: addresses and who talks with whom are told to this machine alone; what others may read has neither.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{ConnectInfo, Query, State};
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use prometheus::{IntCounterVec, IntGauge, IntGaugeVec, Registry};
use proxy_common::counters::Counter;
use tokio::net::TcpListener;

use super::Agent;
use super::flows::{self, FlowMetrics, FlowsReport, Question};
use super::ladder::Rung;
use super::pods::Pod;
use super::report::{self, CaptureReport};
use crate::telemetry::{TelemetryError, metrics};

/// The agent's metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) registry: Registry,
    /// Enrolled pods.
    pub(crate) pods: IntGauge,
    /// Questions of sidecars, by what became of them.
    pub(crate) enrolments: IntCounterVec,
    /// Calls of the Workload API, by what became of them.
    pub(crate) identity_calls: IntCounterVec,
    /// Pods that could not be enrolled, by why.
    pub(crate) refused: IntCounterVec,
    /// What became of pods that lost their sidecar.
    pub(crate) holds: IntCounterVec,
    /// Pods whose connections wait for a sidecar.
    held: IntGauge,
    /// 1 while the node's certificate is good and the agent may have others signed.
    joined: IntGauge,
    /// When each pod's certificate ends.
    expiry: IntGaugeVec,
    /// What the kernel programs counted for each pod.
    capture: IntGaugeVec,
    /// 1 for the rung of capture that the agent stands on.
    rung: IntGaugeVec,
    /// Programs that are not where they were attached, and rulesets that somebody changed.
    pub(crate) faults: IntGauge,
    /// Other people's programs at the same hooks.
    pub(crate) conflicts: IntGauge,
    pub(crate) quarantined: IntGauge,
    /// Such programs that were put back, by program and by what came of it.
    pub(crate) mends: IntCounterVec,
    /// Rounds of probes, by what came of them.
    pub(crate) probes: IntCounterVec,
    /// Pods whose last probes did not all come through.
    unproven: IntGauge,
    /// Of the connections, those that got past a sidecar.
    bypass: IntCounterVec,
    /// What the kernel said of connections at their end.
    pub(crate) flows: FlowMetrics,
}

impl Metrics {
    /// Registers all of them, and those of the process.
    ///
    /// # Errors
    /// Two of one name.
    pub(crate) fn new() -> Result<Self, TelemetryError> {
        let registry = metrics::process_registry()?;
        Ok(Self {
            pods: metrics::gauge(&registry, "outrigger_node_pods", "Enrolled pods.")?,
            enrolments: metrics::counters(
                &registry,
                "outrigger_node_enrolments_total",
                "Questions of sidecars, by what became of them.",
                &["outcome"],
            )?,
            identity_calls: metrics::counters(
                &registry,
                "outrigger_node_workload_api_calls_total",
                "Calls of the Workload API, by what became of them.",
                &["outcome"],
            )?,
            refused: metrics::counters(
                &registry,
                "outrigger_node_pods_refused_total",
                "Pods that could not be enrolled and stay closed, by why.",
                &["reason"],
            )?,
            holds: metrics::counters(
                &registry,
                "outrigger_node_holds_total",
                "Times that a pod lost its sidecar and its connections had to wait, by what became of it.",
                &["outcome"],
            )?,
            held: metrics::gauge(&registry, "outrigger_node_pods_held", "Pods whose connections wait for a sidecar.")?,
            joined: metrics::gauge(&registry, "outrigger_node_joined", "1 once the control plane certified this node.")?,
            expiry: metrics::gauges(
                &registry,
                "outrigger_node_certificate_expiry_timestamp_seconds",
                "End of validity of each pod's certificate.",
                &["namespace", "pod"],
            )?,
            capture: metrics::gauges(
                &registry,
                "outrigger_capture_connections",
                "What the kernel programs did with connections of a pod since its enrolment.",
                &["namespace", "pod", "event"],
            )?,
            rung: metrics::gauges(
                &registry,
                "outrigger_capture_rung",
                "1 for the rung of capture that the agent stands on.",
                &["rung"],
            )?,
            faults: metrics::gauge(
                &registry,
                "outrigger_capture_faults",
                "Kernel programs that are not where they were attached, and rulesets that somebody changed.",
            )?,
            conflicts: metrics::gauge(
                &registry,
                "outrigger_capture_conflicts",
                "Programs of others that decide about the same connections.",
            )?,
            quarantined: metrics::gauge(
                &registry,
                "outrigger_node_quarantined_pods",
                "Pods that ask for a sidecar, have none, and are closed.",
            )?,
            mends: metrics::counters(
                &registry,
                "outrigger_capture_mends_total",
                "Kernel programs that were found missing, by what was done about it.",
                &["program", "outcome"],
            )?,
            probes: metrics::counters(
                &registry,
                "outrigger_capture_probes_total",
                "Rounds of probes by which sidecars prove that connections come to them.",
                &["outcome"],
            )?,
            unproven: metrics::gauge(
                &registry,
                "outrigger_capture_unproven_pods",
                "Pods whose last probes did not all come through.",
            )?,
            bypass: metrics::counters(
                &registry,
                "outrigger_capture_bypass_total",
                "Connections of a pod that got past its sidecar since its enrolment.",
                &["namespace", "pod", "reason"],
            )?,
            flows: FlowMetrics::new(&registry)?,
            registry,
        })
    }
}

/// Serves them at `listener` until the agent ends.
///
/// # Errors
/// The listener fails.
pub(crate) async fn serve(agent: Arc<Agent>, listener: TcpListener) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(render))
        .route("/ready", get(ready))
        .route("/capture", get(capture))
        .route("/flows", get(flows))
        .with_state(agent);
    axum::serve(listener, router.into_make_service_with_connect_info::<SocketAddr>()).await
}

async fn render(State(agent): State<Arc<Agent>>) -> Result<String, StatusCode> {
    asked(move || rendered(&agent)).await
}

/// Does what may have to run a program and wait for it, off the threads that serve others.
async fn asked<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, StatusCode> {
    tokio::task::spawn_blocking(work).await.map_err(|_ended| StatusCode::INTERNAL_SERVER_ERROR)
}

fn rendered(agent: &Agent) -> String {
    let metrics = &agent.metrics;
    metrics.joined.set(i64::from(agent.authority.is_joined()));
    metrics.unproven.set(i64::try_from(agent.proofs.lock().failing()).unwrap_or(i64::MAX));
    metrics.held.set(i64::try_from(agent.keeper.lock().waiting()).unwrap_or(i64::MAX));
    for rung in Rung::ALL {
        metrics.rung.with_label_values(&[rung.word()]).set(i64::from(rung == agent.standing.rung));
    }
    // Pods that are gone leave no series behind.
    metrics.expiry.reset();
    metrics.capture.reset();
    metrics.bypass.reset();
    let pods: Vec<Arc<Pod>> = agent.pods.borrow().values().map(Arc::clone).collect();
    for pod in &pods {
        let (namespace, name) = (pod.record.namespace.as_str(), pod.record.name.as_str());
        if let Some(svid) = &*pod.svid.borrow() {
            let ends = i64::try_from(svid.not_after.as_secs()).unwrap_or(i64::MAX);
            metrics.expiry.with_label_values(&[namespace, name]).set(ends);
        }
        let Some(counted) = agent.capture.counters(pod) else { continue };
        for counter in Counter::ALL {
            let count = i64::try_from(counted.of(counter)).unwrap_or(i64::MAX);
            metrics.capture.with_label_values(&[namespace, name, counter.name()]).set(count);
        }
        // The kernel counts, so the sum that was there before goes first.
        for counter in Counter::BYPASSES {
            metrics.bypass.with_label_values(&[namespace, name, counter.name()]).inc_by(counted.of(counter));
        }
    }
    metrics::render(&metrics.registry)
}

async fn capture(State(agent): State<Arc<Agent>>) -> Result<Json<CaptureReport>, StatusCode> {
    asked(move || Json(report::report(&agent))).await
}

async fn flows(
    State(agent): State<Arc<Agent>>,
    ConnectInfo(asker): ConnectInfo<SocketAddr>,
    Query(question): Query<Question>,
) -> Result<Json<FlowsReport>, (StatusCode, &'static str)> {
    if !asker.ip().to_canonical().is_loopback() {
        return Err((StatusCode::FORBIDDEN, "who talks with whom is told at the machine's loopback address alone\n"));
    }
    asked(move || Json(flows::report(&agent, &question))).await.map_err(|status| (status, "the counters cannot be read\n"))
}

/// Ready: capture is as it was made, both sockets answer, and the node may have certificates signed.
async fn ready(State(agent): State<Arc<Agent>>) -> (StatusCode, String) {
    let faults = agent.faults.borrow().all();
    let conflicts = agent.conflicts.borrow();
    let thieves: Vec<&str> = conflicts.iter().filter(|one| one.steals).map(|one| one.text.as_str()).collect();
    if !agent.authority.is_joined() {
        (StatusCode::SERVICE_UNAVAILABLE, "the control plane has not certified this node yet\n".to_owned())
    } else if !faults.is_empty() {
        (StatusCode::SERVICE_UNAVAILABLE, format!("capture is not complete: {}\n", faults.join("; ")))
    } else if !thieves.is_empty() {
        (StatusCode::SERVICE_UNAVAILABLE, format!("another program takes connections: {}\n", thieves.join("; ")))
    } else {
        (StatusCode::OK, "ready\n".to_owned())
    }
}
