//! What an operator sees of a sidecar through its doors, from before it takes anything: whether traffic may come, and what is missing.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::admin::routes::Inspect;
use crate::identity::source::Identity;
use crate::snapshot::publish::Published;
use crate::telemetry::Telemetry;

/// What an operator may see and ask of a sidecar.
#[derive(Debug)]
pub(crate) struct Window {
    telemetry: Telemetry,
    pub(super) published: Published,
    identity: Identity,
    pub(super) enrolled: AtomicBool,
    /// The pod's addresses, as the node agent named them.
    pub(super) addresses: Mutex<Vec<IpAddr>>,
    /// Connections of both directions are taken.
    pub(super) open: watch::Sender<bool>,
    proof: Mutex<Proof>,
    pub(super) held: Mutex<serde_json::Value>,
    drain: watch::Sender<bool>,
}

/// What probes said of capture.
#[derive(Debug, Default, PartialEq)]
enum Proof {
    #[default]
    NotYet,
    Holds,
    /// What did not come to the sidecar.
    Fails(Vec<String>),
}

impl Window {
    /// For the operators' doors, which open before anything else does.
    pub(crate) fn new(identity: Identity, telemetry: Telemetry) -> Arc<Self> {
        Arc::new(Self {
            telemetry,
            published: Published::new(),
            identity,
            enrolled: AtomicBool::new(false),
            addresses: Mutex::default(),
            open: watch::Sender::new(false),
            proof: Mutex::default(),
            held: Mutex::default(),
            drain: watch::Sender::new(false),
        })
    }

    /// What the last probes came to: nothing, where all of them came through. Whether it is news.
    pub(super) fn proven(&self, faults: Vec<String>) -> bool {
        let now = if faults.is_empty() { Proof::Holds } else { Proof::Fails(faults) };
        let mut proof = self.proof.lock();
        let is_news = *proof != now;
        *proof = now;
        is_news
    }

    /// The pod's first address, which is the one that the kubelet asks; none before the pod is enrolled.
    pub(super) fn address(&self) -> Option<IpAddr> {
        self.addresses.lock().first().copied()
    }

    /// Returns when an operator asks for an end. Cancel-safe.
    pub(crate) async fn drain_asked(&self) {
        // The sender lives as long as this does.
        drop(self.drain.subscribe().wait_for(|asked| *asked).await);
    }
}

impl Inspect for Window {
    fn metrics(&self) -> String {
        if let Some(own) = self.identity.own() {
            self.telemetry.metrics.certificate_expires(own.expires);
        }
        self.telemetry.metrics.render()
    }

    fn ready(&self) -> Result<(), String> {
        let mut missing: Vec<String> = Vec::new();
        // One that has ended is told by status and metrics. What stands goes on without it, and a pod that is taken out for that
        // would be one more that is missing.
        if self.identity.own().is_none() {
            missing.extend(self.identity.missing());
        }
        if !self.enrolled.load(Ordering::Relaxed) {
            missing.push("not enrolled yet: the node agent has not taken the inbound listener".into());
        }
        if self.published.current().generation == 0 {
            missing.push("no configuration yet: the control plane has not answered and none was kept".into());
        }
        match &*self.proof.lock() {
            Proof::NotYet => missing.push("capture is not proven yet: the first probes are not back".into()),
            Proof::Holds => {}
            Proof::Fails(faults) => missing.extend(faults.iter().map(|fault| format!("capture is not complete: {fault}"))),
        }
        if missing.is_empty() { Ok(()) } else { Err(missing.join("\n")) }
    }

    fn snapshot(&self) -> Option<serde_json::Value> {
        Some(self.held.lock().clone())
    }

    fn drain(&self) -> bool {
        self.drain.send_replace(true);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::testing::{Authority, Leaf, NOW, clock};
    use crate::telemetry::metrics::Metrics;

    #[test]
    fn a_certificate_that_ended_makes_nobody_unready_and_one_that_never_came_does() {
        let identity = Identity::new("cluster.local".parse().unwrap(), clock());
        let telemetry = Telemetry { metrics: Arc::new(Metrics::new().unwrap()), access_log: None, spans: None };
        let window = Window::new(identity.clone(), telemetry);
        let unready = || window.ready().unwrap_err();
        assert!(unready().contains("no identity yet"), "{}", unready());
        let authority = Authority::new();
        authority.issue_to(&identity, &Leaf { until: NOW - 10, ..Leaf::workload("web") }, &[&authority]);
        assert!(identity.missing().is_some_and(|why| why.contains("has ended")));
        assert!(!unready().contains("identity"), "{}", unready());
    }
}
