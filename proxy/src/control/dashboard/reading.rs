//! What is kept of one scrape of one sidecar: sums by who called whom, nothing that grows with paths or time.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

use super::exposition::{Sample, samples};
use crate::telemetry::reason::Reason;

/// One scrape of one sidecar.
#[derive(Clone, Debug)]
pub(crate) struct Reading {
    pub(crate) at: Instant,
    pub(crate) flows: BTreeMap<FlowKey, Flow>,
    pub(crate) refusals: BTreeMap<RefusalKey, f64>,
    /// Retries sent, by the service that failed first.
    pub(crate) retries: BTreeMap<String, f64>,
    /// Copies of requests that were sent, by the service that got them.
    pub(crate) shadows: BTreeMap<String, f64>,
    /// Service and workload of endpoints that this sidecar leaves out.
    pub(crate) ejected: BTreeSet<(String, String)>,
    /// The sidecar's own identity, once it called somebody or was called.
    pub(crate) identity: Option<String>,
    pub(crate) certificate_expiry: f64,
    pub(crate) config_version: String,
    pub(crate) config_generation: f64,
    pub(crate) config_rejected: f64,
    pub(crate) control_connected: bool,
    pub(crate) resident_bytes: f64,
}

/// Who called whom, as one sidecar saw it.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct FlowKey {
    pub(crate) outbound: bool,
    pub(crate) source_identity: String,
    pub(crate) destination_service: String,
    /// Where there is no service to name: a workload that was called by its own address. Empty else.
    pub(crate) destination_identity: String,
}

/// Sums since the sidecar started.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Flow {
    pub(crate) requests: f64,
    pub(crate) failed: f64,
    /// Requests and ended connections that left the caller's pod, or came to the callee's, and those of them in mutual TLS.
    pub(crate) carried: f64,
    pub(crate) carried_mtls: f64,
    /// Opaque connections that ended.
    pub(crate) connections: f64,
    pub(crate) connections_failed: f64,
    /// Opaque connections open now, and those of them that use mutual TLS.
    pub(crate) open: f64,
    pub(crate) open_mtls: f64,
    /// Requests that took at most the bucket's bound, by the bound's bits: positive numbers order as their bits do.
    pub(crate) buckets: BTreeMap<u64, f64>,
}

/// What was refused, and which rule decided.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct RefusalKey {
    pub(crate) outbound: bool,
    pub(crate) source_identity: String,
    pub(crate) destination_service: String,
    pub(crate) reason: String,
    pub(crate) rule: String,
}

impl Reading {
    /// Reads the text of a scrape.
    pub(crate) fn parse(text: &str, at: Instant) -> Self {
        let mut reading = Self {
            at,
            flows: BTreeMap::new(),
            refusals: BTreeMap::new(),
            retries: BTreeMap::new(),
            shadows: BTreeMap::new(),
            ejected: BTreeSet::new(),
            identity: None,
            certificate_expiry: 0.0,
            config_version: String::new(),
            config_generation: 0.0,
            config_rejected: 0.0,
            control_connected: false,
            resident_bytes: 0.0,
        };
        for sample in samples(text) {
            // A value that is no number would spoil every sum it gets into.
            if !sample.value.is_nan() {
                reading.take(&sample);
            }
        }
        reading
    }

    fn take(&mut self, sample: &Sample<'_>) {
        let value = sample.value;
        let mtls = if sample.label("mtls") == "true" { value } else { 0.0 };
        let carried = if was_carried(sample) { value } else { 0.0 };
        match sample.name {
            "outrigger_requests_total" => {
                let failed = if request_failed(sample) { value } else { 0.0 };
                if let Some(flow) = self.flow(sample) {
                    flow.requests += value;
                    flow.failed += failed;
                    flow.carried += carried;
                    flow.carried_mtls += mtls;
                }
            }
            "outrigger_request_duration_seconds_bucket" => {
                let bound = sample.label("le").replace("+Inf", "inf").parse::<f64>().unwrap_or(f64::INFINITY);
                if let Some(flow) = self.flow(sample) {
                    *flow.buckets.entry(bound.max(0.0).to_bits()).or_default() += value;
                }
            }
            "outrigger_opaque_connections_total" => {
                let failed = if is_refusal(sample.label("reason")) { value } else { 0.0 };
                if let Some(flow) = self.flow(sample) {
                    flow.connections += value;
                    flow.connections_failed += failed;
                    flow.carried += carried;
                    flow.carried_mtls += mtls;
                }
            }
            "outrigger_opaque_connections_open" => {
                if let Some(flow) = self.flow(sample) {
                    flow.open += value;
                    flow.open_mtls += mtls;
                }
            }
            "outrigger_refusals_total" => {
                let key = RefusalKey {
                    outbound: sample.label("direction") == "outbound",
                    source_identity: sample.label("source_identity").to_owned(),
                    destination_service: sample.label("destination_service").to_owned(),
                    reason: sample.label("reason").to_owned(),
                    rule: sample.label("rule").to_owned(),
                };
                if self.refusals.len() < KEYS_MAX || self.refusals.contains_key(&key) {
                    *self.refusals.entry(key).or_default() += value;
                }
            }
            "outrigger_retries_total" if sample.label("outcome") == "sent" && self.retries.len() < KEYS_MAX => {
                *self.retries.entry(sample.label("destination_service").to_owned()).or_default() += value;
            }
            "outrigger_shadow_requests_total" if sample.label("outcome") != "skipped" && self.shadows.len() < KEYS_MAX => {
                *self.shadows.entry(sample.label("destination_service").to_owned()).or_default() += value;
            }
            "outrigger_endpoint_ejected" if value > 0.0 && self.ejected.len() < KEYS_MAX => {
                let service = sample.label("destination_service").to_owned();
                self.ejected.insert((service, sample.label("destination_workload").to_owned()));
            }
            "outrigger_certificate_expiry_timestamp_seconds" => self.certificate_expiry = value,
            "outrigger_config_info" => sample.label("version").clone_into(&mut self.config_version),
            "outrigger_config_generation" => self.config_generation = value,
            "outrigger_config_rejected_resources" => self.config_rejected = value,
            "outrigger_control_connected" => self.control_connected = value > 0.0,
            "process_resident_memory_bytes" => self.resident_bytes = value,
            _ => {}
        }
    }

    fn flow(&mut self, sample: &Sample<'_>) -> Option<&mut Flow> {
        let outbound = sample.label("direction") == "outbound";
        let source_identity = sample.label("source_identity").to_owned();
        let own = if outbound { source_identity.as_str() } else { sample.label("destination_identity") };
        if self.identity.is_none() && !matches!(own, "" | "other") {
            self.identity = Some(own.to_owned());
        }
        let destination_service = sample.label("destination_service").to_owned();
        // Durations carry no destination identity, and a service is name enough.
        let destination_identity =
            if destination_service.is_empty() { sample.label("destination_identity").to_owned() } else { String::new() };
        let key = FlowKey { outbound, source_identity, destination_service, destination_identity };
        if self.flows.len() >= KEYS_MAX && !self.flows.contains_key(&key) {
            return None;
        }
        Some(self.flows.entry(key).or_default())
    }
}

impl Flow {
    /// What came since `before`. A sum that shrank belongs to a sidecar that started anew: all of it came since.
    pub(crate) fn since(&self, before: Option<&Self>) -> Self {
        let Some(before) = before.filter(|before| before.requests <= self.requests && before.connections <= self.connections)
        else {
            return self.clone();
        };
        let buckets = self
            .buckets
            .iter()
            .map(|(bound, count)| (*bound, (count - before.buckets.get(bound).copied().unwrap_or_default()).max(0.0)));
        Self {
            requests: self.requests - before.requests,
            failed: (self.failed - before.failed).max(0.0),
            carried: (self.carried - before.carried).max(0.0),
            carried_mtls: (self.carried_mtls - before.carried_mtls).max(0.0),
            connections: self.connections - before.connections,
            connections_failed: (self.connections_failed - before.connections_failed).max(0.0),
            open: self.open,
            open_mtls: self.open_mtls,
            buckets: buckets.collect(),
        }
    }

    /// Adds another flow's sums.
    pub(crate) fn add(&mut self, other: &Self) {
        let Self { requests, failed, carried, carried_mtls, connections, connections_failed, open, open_mtls, buckets } = other;
        self.requests += requests;
        self.failed += failed;
        self.carried += carried;
        self.carried_mtls += carried_mtls;
        self.connections += connections;
        self.connections_failed += connections_failed;
        self.open += open;
        self.open_mtls += open_mtls;
        for (bound, count) in buckets {
            *self.buckets.entry(*bound).or_default() += count;
        }
    }

    /// The duration in seconds that `share` of the requests did not exceed, interpolated inside a bucket as Prometheus
    /// does; `None` without requests.
    pub(crate) fn quantile(&self, share: f64) -> Option<f64> {
        let total = self.buckets.values().copied().fold(0.0, f64::max);
        if total <= 0.0 {
            return None;
        }
        let rank = total * share;
        let (mut lower_bound, mut lower_count) = (0.0, 0.0);
        for (bits, count) in &self.buckets {
            let bound = f64::from_bits(*bits);
            if *count >= rank {
                // Beyond the last bound nothing is known but that it was exceeded.
                return Some(if bound.is_infinite() || *count <= lower_count {
                    lower_bound
                } else {
                    lower_bound + (bound - lower_bound) * (rank - lower_count) / (count - lower_count)
                });
            }
            (lower_bound, lower_count) = (bound, *count);
        }
        Some(lower_bound)
    }
}

/// A request failed when the server side is to blame: 5xx, or a gRPC status that says so (UNKNOWN, DEADLINE_EXCEEDED,
/// RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE, DATA_LOSS). 4xx are answers, and no answer at all is a caller that left.
fn request_failed(sample: &Sample<'_>) -> bool {
    sample.label("status").starts_with('5') || matches!(sample.label("grpc_status"), "2" | "4" | "8" | "13" | "14" | "15")
}

/// What the caller's own sidecar answered was on no wire, in plaintext or otherwise.
fn was_carried(sample: &Sample<'_>) -> bool {
    sample.label("mtls") == "true" || sample.label("direction") != "outbound" || !is_refusal(sample.label("reason"))
}

/// Did the mesh end it in the destination's place? A word that is not known is none of ours.
fn is_refusal(reason: &str) -> bool {
    Reason::ALL.iter().any(|known| known.as_str() == reason && known.is_refusal())
}

/// Combinations of caller and destination that are kept of one sidecar.
const KEYS_MAX: usize = 4_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_of_a_sidecar_is_summed_by_who_called_whom() {
        let text = crate::telemetry::metrics::tests::populated().metrics.render();
        let reading = Reading::parse(&text, Instant::now());
        let key = FlowKey {
            outbound: true,
            source_identity: "spiffe://cluster.local/ns/shop/sa/web".to_owned(),
            destination_service: "shop/cart".to_owned(),
            destination_identity: String::new(),
        };
        let flow = &reading.flows[&key];
        assert_eq!((flow.requests, flow.failed, flow.carried_mtls), (10.0, 1.0, 10.0));
        // All took 2.5 ms, half-way between the bounds of 2 and 3 ms.
        assert!((flow.quantile(0.5).unwrap() - 0.0025).abs() < 1e-9);
        assert_eq!(reading.refusals.len(), 2);
        assert_eq!(reading.identity.as_deref(), Some("spiffe://cluster.local/ns/shop/sa/web"));
        assert_eq!(reading.shadows["shop/cart-v2"], 1.0);
        assert_eq!(reading.config_version, "17");
        assert!(reading.control_connected && reading.certificate_expiry > 1e9 && reading.resident_bytes > 0.0);
        assert!(reading.ejected.contains(&("shop/cart".to_owned(), "shop/cart-2".to_owned())));
    }

    #[test]
    fn a_sidecar_that_started_anew_counts_from_zero() {
        let flow = |requests| Flow { requests, ..Flow::default() };
        assert_eq!(flow(7.0).since(Some(&flow(5.0))).requests, 2.0);
        assert_eq!(flow(3.0).since(Some(&flow(5.0))).requests, 3.0);
        assert_eq!(flow(3.0).since(None).requests, 3.0);
    }

    #[test]
    fn durations_beyond_the_last_bound_are_told_as_the_bound() {
        let mut flow = Flow::default();
        flow.buckets.insert(1.0f64.to_bits(), 1.0);
        flow.buckets.insert(f64::INFINITY.to_bits(), 10.0);
        assert_eq!(flow.quantile(0.99), Some(1.0));
        assert_eq!(Flow::default().quantile(0.5), None);
    }
}
