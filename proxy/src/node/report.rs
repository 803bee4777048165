//! What the agent tells people of its pods' capture, at `/capture` beside the metrics.

use std::collections::BTreeMap;
use std::sync::Arc;

use proxy_common::counters::Counter;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::Agent;
pub(crate) use super::attest::Mended;
use super::kernel::{self, Conflict, Watch};
use super::ladder::Standing;
use super::pods::Pod;
pub(crate) use super::proof::Proven;

/// How capture stands on this node.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CaptureReport {
    /// The running kernel's release.
    pub(crate) kernel: String,
    /// On which rung of the ladder, and why.
    #[serde(default)]
    pub(crate) standing: Standing,
    /// Programs that are not where they were attached and rulesets that were changed, each in a sentence.
    pub(crate) faults: Vec<String>,
    /// What of them was put back within the last hour.
    #[serde(default)]
    pub(crate) mended: Vec<Mended>,
    /// Programs of others that decide about the same connections.
    #[serde(default)]
    pub(crate) conflicts: Vec<Conflict>,
    pub(crate) pods: Vec<PodReport>,
}

/// How capture stands in one pod.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodReport {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Nothing captures its connections.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) unprotected: bool,
    /// What gets past the sidecar without being excluded is dropped.
    pub(crate) enforce: bool,
    /// Why nobody sees what raw sockets send; absent where the pod's link is watched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) not_watched: Option<String>,
    /// What its sidecar proved last; absent where it has not told yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) proven: Option<Proven>,
    /// Connections that got past the sidecar, by reason; those without any are left out.
    pub(crate) bypass: BTreeMap<String, u64>,
    /// How many of them were dropped.
    pub(crate) dropped: u64,
    /// Connections of the app that failed because no port was left for them.
    #[serde(default)]
    pub(crate) no_port: u64,
    /// While its connections wait for a sidecar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) waiting: Option<Waiting>,
}

/// How long connections wait for a pod's sidecar.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Waiting {
    /// So far.
    pub(crate) for_ms: u64,
    /// In all: what is waiting then is refused.
    pub(crate) at_most_ms: u64,
}

/// What the kernel says now.
pub(super) fn report(agent: &Agent) -> CaptureReport {
    let now = Instant::now();
    let pods: Vec<Arc<Pod>> = agent.pods.borrow().values().map(Arc::clone).collect();
    let of = |pod: &Arc<Pod>| {
        let counters = agent.capture.counters(pod);
        let count = |counter| counters.map_or(0, |counters| counters.of(counter));
        let some = Counter::BYPASSES.into_iter().map(|counter| (counter.name().to_owned(), count(counter)));
        PodReport {
            namespace: pod.record.namespace.clone(),
            name: pod.record.name.clone(),
            unprotected: pod.record.unprotected,
            enforce: pod.record.capture().is_ok_and(|capture| capture.enforce),
            not_watched: match &pod.watch {
                Watch::Watched => None,
                Watch::Not(reason) => Some(reason.clone()),
            },
            proven: agent.proofs.lock().of(pod.record.netns_cookie, now),
            bypass: some.filter(|(_reason, count)| *count > 0).collect(),
            dropped: count(Counter::BypassDropped),
            no_port: count(Counter::NoPort),
            waiting: agent.keeper.lock().wait(pod.record.netns_cookie, now).map(|(so_far, at_most)| Waiting {
                for_ms: u64::try_from(so_far.as_millis()).unwrap_or(u64::MAX),
                at_most_ms: u64::try_from(at_most.as_millis()).unwrap_or(u64::MAX),
            }),
        }
    };
    CaptureReport {
        kernel: kernel::release(),
        standing: agent.standing.clone(),
        faults: agent.faults.borrow().all(),
        mended: agent.mends.lock().list(now),
        conflicts: agent.conflicts.borrow().clone(),
        pods: pods.iter().map(of).collect(),
    }
}
