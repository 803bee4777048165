//! What flow records add up to: what each pod's sidecar exchanged with what is outside the pod, as the kernel saw it,
//! whatever the sidecar itself says.
//!
//! Invariant: labels are pods, directions and ways; an address or a port never is one.

use std::time::Duration;

use prometheus::{HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Registry};
use proxy_common::flows::{End, Flow};

use super::direction;
use crate::telemetry::{TelemetryError, metrics};

/// What the records add up to.
#[derive(Clone, Debug)]
pub(crate) struct FlowMetrics {
    /// namespace, pod, direction
    flows: IntCounterVec,
    /// namespace, pod, direction, way
    bytes: IntCounterVec,
    /// namespace, pod, direction
    retransmits: IntCounterVec,
    /// namespace, pod, direction
    resets: IntCounterVec,
    /// namespace, pod, direction
    timeouts: IntCounterVec,
    unnamed: IntCounter,
    /// direction
    duration: HistogramVec,
    /// direction
    round_trip: HistogramVec,
}

impl FlowMetrics {
    /// Registers all of them.
    ///
    /// # Errors
    /// Two of one name.
    pub(crate) fn new(registry: &Registry) -> Result<Self, TelemetryError> {
        let pod = ["namespace", "pod", "direction"];
        let histogram = |name: &str, help: &str, buckets: &[f64]| -> Result<HistogramVec, TelemetryError> {
            let histogram = HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), &["direction"])?;
            registry.register(Box::new(histogram.clone()))?;
            Ok(histogram)
        };
        Ok(Self {
            flows: metrics::counters(
                registry,
                "outrigger_capture_flows_total",
                "Closed connections between a pod's sidecar and what is outside the pod.",
                &pod,
            )?,
            bytes: metrics::counters(
                registry,
                "outrigger_capture_flow_bytes_total",
                "Bytes of such connections, counted when they close.",
                &["namespace", "pod", "direction", "way"],
            )?,
            retransmits: metrics::counters(
                registry,
                "outrigger_capture_flow_retransmits_total",
                "Segments that such connections sent again.",
                &pod,
            )?,
            resets: metrics::counters(
                registry,
                "outrigger_capture_flow_resets_total",
                "Such connections that one side cut short.",
                &pod,
            )?,
            timeouts: metrics::counters(
                registry,
                "outrigger_capture_flow_timeouts_total",
                "Such connections that were given up because the other side acknowledged nothing any more.",
                &pod,
            )?,
            unnamed: metrics::counter(
                registry,
                "outrigger_capture_flows_unnamed_total",
                "Flow records of pods that were gone already and that nobody remembered.",
            )?,
            duration: histogram(
                "outrigger_capture_flow_duration_seconds",
                "From the handshake to the close of such connections.",
                &[0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1_000.0],
            )?,
            round_trip: histogram(
                "outrigger_capture_flow_round_trip_seconds",
                "Smoothed round-trip time of such connections when they closed.",
                &[0.000_05, 0.000_1, 0.000_5, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0],
            )?,
        })
    }

    /// Adds one connection of the pod `name` in `namespace`.
    pub(crate) fn record(&self, flow: &Flow, namespace: &str, name: &str) {
        let direction = direction(flow);
        let pod = [namespace, name, direction];
        self.flows.with_label_values(&pod).inc();
        self.bytes.with_label_values(&[namespace, name, direction, "sent"]).inc_by(flow.sent_bytes);
        self.bytes.with_label_values(&[namespace, name, direction, "received"]).inc_by(flow.received_bytes);
        self.retransmits.with_label_values(&pod).inc_by(flow.retransmits.into());
        // Made in any case: a rate needs a zero to begin with.
        let (resets, timeouts) = (self.resets.with_label_values(&pod), self.timeouts.with_label_values(&pod));
        if flow.end == End::Reset as u16 {
            resets.inc();
        } else if flow.end == End::TimedOut as u16 {
            timeouts.inc();
        }
        self.duration.with_label_values(&[direction]).observe(Duration::from_nanos(flow.duration_ns).as_secs_f64());
        self.round_trip.with_label_values(&[direction]).observe(Duration::from_micros(flow.srtt_us.into()).as_secs_f64());
    }

    /// Nobody knows whose record it was.
    pub(crate) fn is_unnamed(&self) {
        self.unnamed.inc();
    }

    /// How many there were.
    pub(crate) fn unnamed(&self) -> u64 {
        self.unnamed.get()
    }

    /// Drops the series of a pod that is gone. A record that comes later makes them anew until the next one goes.
    pub(crate) fn forget(&self, namespace: &str, name: &str) {
        for direction in ["inbound", "outbound"] {
            let pod = [namespace, name, direction];
            // An error says that there was no such series.
            drop(self.flows.remove_label_values(&pod));
            drop(self.retransmits.remove_label_values(&pod));
            drop(self.resets.remove_label_values(&pod));
            drop(self.timeouts.remove_label_values(&pod));
            for way in ["sent", "received"] {
                drop(self.bytes.remove_label_values(&[namespace, name, direction, way]));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::flows::Direction;

    use super::*;
    use crate::node::flows::flow;

    #[test]
    fn records_add_up_by_pod_and_direction() {
        let registry = Registry::new();
        let metrics = FlowMetrics::new(&registry).unwrap();
        metrics.record(&flow(Direction::Inbound, End::Finished), "shop", "web-1");
        metrics.record(&flow(Direction::Inbound, End::Reset), "shop", "web-1");
        metrics.record(&flow(Direction::Outbound, End::TimedOut), "shop", "web-1");
        let text = metrics::render(&registry);
        for line in [
            r#"outrigger_capture_flows_total{direction="inbound",namespace="shop",pod="web-1"} 2"#,
            r#"outrigger_capture_flow_bytes_total{direction="inbound",namespace="shop",pod="web-1",way="received"} 2000"#,
            r#"outrigger_capture_flow_bytes_total{direction="outbound",namespace="shop",pod="web-1",way="sent"} 300"#,
            r#"outrigger_capture_flow_retransmits_total{direction="outbound",namespace="shop",pod="web-1"} 2"#,
            r#"outrigger_capture_flow_resets_total{direction="inbound",namespace="shop",pod="web-1"} 1"#,
            r#"outrigger_capture_flow_timeouts_total{direction="inbound",namespace="shop",pod="web-1"} 0"#,
            r#"outrigger_capture_flow_timeouts_total{direction="outbound",namespace="shop",pod="web-1"} 1"#,
            r#"outrigger_capture_flow_duration_seconds_sum{direction="outbound"} 2"#,
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
    }

    #[test]
    fn pod_that_is_gone_leaves_no_series() {
        let registry = Registry::new();
        let metrics = FlowMetrics::new(&registry).unwrap();
        metrics.record(&flow(Direction::Inbound, End::Reset), "shop", "web-1");
        metrics.forget("shop", "web-1");
        metrics.forget("shop", "never-seen");
        assert!(!metrics::render(&registry).contains("web-1"));
    }
}
