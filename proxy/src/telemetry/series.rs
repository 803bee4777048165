//! The series of one kind of traffic, resolved once: a request that ends finds its counters without building a label.
//!
//! Invariant: the number of series is bounded. What comes after the bound is counted under `other`, and that this
//! happened is counted too.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::metrics::OpenConnection;
use super::reason::Reason;
use super::{ConnectionEnd, Direction, RequestEnd};

/// Who calls whom on which route. Names are resource names and identities, never addresses or paths; what is not known
/// is empty.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) struct TrafficLabels<'a> {
    pub(crate) direction: Direction,
    /// SPIFFE ID of the caller.
    pub(crate) source_identity: &'a str,
    /// SPIFFE ID of the workload that serves.
    pub(crate) destination_identity: &'a str,
    /// `NAMESPACE/NAME` of the service that serves: the backend where a route chose one.
    pub(crate) destination_service: &'a str,
    /// Name of the route rule.
    pub(crate) route: &'a str,
    /// Does the hop between the sidecars use mutual TLS?
    pub(crate) mtls: bool,
}

/// The series of one [`TrafficLabels`]. Keep it as long as the labels stay the same.
#[derive(Debug)]
pub(crate) struct Traffic {
    direction: Direction,
    source_identity: Box<str>,
    destination_identity: Box<str>,
    destination_service: Box<str>,
    route: Box<str>,
    mtls: bool,
    families: Families,
    // Made when first used: opaque traffic has no durations, HTTP traffic no opaque bytes.
    duration: OnceLock<Histogram>,
    requests: RwLock<Vec<(Outcome, IntCounter)>>,
    opaque: RwLock<Vec<(Reason, IntCounter)>>,
    opaque_open: OnceLock<IntGauge>,
    opaque_bytes: OnceLock<[IntCounter; 2]>,
}

/// All traffic of a process by its labels.
#[derive(Debug)]
pub(crate) struct TrafficTable {
    hasher: RandomState,
    by_hash: RwLock<HashMap<u64, Vec<Arc<Traffic>>>>,
    families: Families,
    overflow: IntCounter,
    /// Series of labels beyond the bound, one per direction.
    other: [Arc<Traffic>; 2],
}

/// The families that traffic is counted in.
#[derive(Clone, Debug)]
pub(crate) struct Families {
    /// direction, source_identity, destination_identity, destination_service, route, mtls, status, grpc_status, reason
    pub(crate) requests: IntCounterVec,
    /// direction, source_identity, destination_service, route
    pub(crate) duration: HistogramVec,
    /// direction, source_identity, destination_identity, destination_service, mtls, reason
    pub(crate) opaque: IntCounterVec,
    /// direction, source_identity, destination_identity, destination_service, mtls
    pub(crate) opaque_open: IntGaugeVec,
    /// direction, source_identity, destination_service, flow
    pub(crate) bytes: IntCounterVec,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Outcome {
    status: u16,
    grpc_status: Option<u32>,
    reason: Reason,
}

impl TrafficTable {
    /// An empty table that counts in `families`.
    pub(crate) fn new(families: Families, overflow: IntCounter) -> Self {
        let other = |direction| {
            Arc::new(Traffic::new(
                &TrafficLabels {
                    direction,
                    source_identity: OTHER,
                    destination_identity: OTHER,
                    destination_service: OTHER,
                    route: OTHER,
                    mtls: false,
                },
                &families,
            ))
        };
        let other = [other(Direction::Inbound), other(Direction::Outbound)];
        Self { hasher: RandomState::new(), by_hash: RwLock::default(), families, overflow, other }
    }

    /// The series of these labels; those named `other` once there are too many.
    pub(crate) fn resolve(&self, labels: &TrafficLabels<'_>) -> Arc<Traffic> {
        let hash = self.hasher.hash_one(labels);
        let find = |table: &HashMap<u64, Vec<Arc<Traffic>>>| {
            table.get(&hash).and_then(|found| found.iter().find(|traffic| traffic.labels() == *labels).map(Arc::clone))
        };
        let found = find(&self.by_hash.read());
        if let Some(found) = found {
            return found;
        }
        let mut table = self.by_hash.write();
        // Another thread may have come first.
        if let Some(found) = find(&table) {
            return found;
        }
        if table.len() >= TRAFFIC_MAX {
            self.overflow.inc();
            let [inbound, outbound] = &self.other;
            return Arc::clone(match labels.direction {
                Direction::Inbound => inbound,
                Direction::Outbound => outbound,
            });
        }
        let traffic = Arc::new(Traffic::new(labels, &self.families));
        table.entry(hash).or_default().push(Arc::clone(&traffic));
        traffic
    }
}

impl Traffic {
    fn new(labels: &TrafficLabels<'_>, families: &Families) -> Self {
        let TrafficLabels { direction, source_identity, destination_identity, destination_service, route, mtls } = *labels;
        Self {
            direction,
            source_identity: source_identity.into(),
            destination_identity: destination_identity.into(),
            destination_service: destination_service.into(),
            route: route.into(),
            mtls,
            duration: OnceLock::new(),
            requests: RwLock::default(),
            opaque: RwLock::default(),
            opaque_open: OnceLock::new(),
            opaque_bytes: OnceLock::new(),
            families: families.clone(),
        }
    }

    /// The labels it was resolved from.
    pub(crate) fn labels(&self) -> TrafficLabels<'_> {
        TrafficLabels {
            direction: self.direction,
            source_identity: &self.source_identity,
            destination_identity: &self.destination_identity,
            destination_service: &self.destination_service,
            route: &self.route,
            mtls: self.mtls,
        }
    }

    /// Counts a request.
    pub(super) fn request_ended(&self, end: &RequestEnd<'_>) {
        let duration = self.duration.get_or_init(|| {
            self.families.duration.with_label_values(&[
                self.direction.as_str(),
                &*self.source_identity,
                &*self.destination_service,
                &*self.route,
            ])
        });
        duration.observe(end.duration.as_secs_f64());
        let outcome = Outcome { status: end.status, grpc_status: end.grpc_status, reason: end.reason };
        if let Some((_, counter)) = self.requests.read().iter().find(|(known, _)| *known == outcome) {
            counter.inc();
            return;
        }
        let mut known = self.requests.write();
        let bounded = known.len() < OUTCOMES_MAX;
        let (status, grpc_status) = if bounded {
            (status_label(end.status), end.grpc_status.map_or(String::new(), grpc_label))
        } else {
            (OTHER.to_owned(), String::new())
        };
        let counter = self.families.requests.with_label_values(&[
            self.direction.as_str(),
            &*self.source_identity,
            &*self.destination_identity,
            &*self.destination_service,
            &*self.route,
            mtls_label(self.mtls),
            &status,
            &grpc_status,
            end.reason.as_str(),
        ]);
        counter.inc();
        if bounded && !known.iter().any(|(known, _)| *known == outcome) {
            known.push((outcome, counter));
        }
    }

    /// An opaque connection is open until the answer is dropped. (That it was is counted by [`super::Telemetry::connection`].)
    pub(crate) fn open_opaque(&self) -> OpenConnection {
        let gauge = self.opaque_open.get_or_init(|| {
            self.families.opaque_open.with_label_values(&[
                self.direction.as_str(),
                &*self.source_identity,
                &*self.destination_identity,
                &*self.destination_service,
                mtls_label(self.mtls),
            ])
        });
        OpenConnection::new(gauge.clone())
    }

    /// Counts an opaque connection.
    pub(super) fn connection_ended(&self, end: &ConnectionEnd<'_>) {
        let [received, sent] = self.opaque_bytes.get_or_init(|| {
            ["received", "sent"].map(|flow| {
                let labels = [self.direction.as_str(), &*self.source_identity, &*self.destination_service, flow];
                self.families.bytes.with_label_values(&labels)
            })
        });
        received.inc_by(end.bytes_received);
        sent.inc_by(end.bytes_sent);
        if let Some((_, counter)) = self.opaque.read().iter().find(|(known, _)| *known == end.reason) {
            counter.inc();
            return;
        }
        let mut known = self.opaque.write();
        let counter = self.families.opaque.with_label_values(&[
            self.direction.as_str(),
            &*self.source_identity,
            &*self.destination_identity,
            &*self.destination_service,
            mtls_label(self.mtls),
            end.reason.as_str(),
        ]);
        counter.inc();
        if !known.iter().any(|(known, _)| *known == end.reason) {
            known.push((end.reason, counter));
        }
    }
}

/// How a yes or no is written as a label.
pub(crate) fn mtls_label(mtls: bool) -> &'static str {
    if mtls { "true" } else { "false" }
}

fn status_label(status: u16) -> String {
    match status {
        0 => String::new(),
        100..=599 => status.to_string(),
        _ => OTHER.to_owned(),
    }
}

fn grpc_label(status: u32) -> String {
    if status <= 16 { status.to_string() } else { OTHER.to_owned() }
}

/// Upper bounds of the duration histogram, in seconds: fine where a mesh's own cost shows, coarse where people wait.
pub(crate) const DURATION_BUCKETS: [f64; 18] =
    [0.000_25, 0.000_5, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// What label values beyond a bound are called.
pub(crate) const OTHER: &str = "other";
/// Combinations of caller, destination and route that get series of their own.
const TRAFFIC_MAX: usize = 2_000;
/// Combinations of status and reason within one of them.
const OUTCOMES_MAX: usize = 48;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::Metrics;

    fn labels(route: &str) -> TrafficLabels<'_> {
        TrafficLabels {
            direction: Direction::Outbound,
            source_identity: "spiffe://cluster.local/ns/shop/sa/web",
            destination_identity: "",
            destination_service: "shop/cart",
            route,
            mtls: true,
        }
    }

    #[test]
    fn the_same_labels_resolve_to_the_same_series() {
        let metrics = Metrics::new().unwrap();
        assert!(Arc::ptr_eq(&metrics.traffic(&labels("a")), &metrics.traffic(&labels("a"))));
        assert!(!Arc::ptr_eq(&metrics.traffic(&labels("a")), &metrics.traffic(&labels("b"))));
    }

    #[test]
    fn traffic_beyond_the_bound_is_counted_under_other() {
        let metrics = Metrics::new().unwrap();
        for i in 0..TRAFFIC_MAX {
            metrics.traffic(&labels(&i.to_string()));
        }
        assert_eq!(metrics.traffic(&labels("one-more")).labels().route, OTHER);
        assert_eq!(metrics.traffic(&labels("7")).labels().route, "7");
        assert!(metrics.render().contains("outrigger_series_overflow_total 1\n"));
    }
}
