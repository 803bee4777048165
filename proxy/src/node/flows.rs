//! Kernel flow records become metrics of the node agent: what each pod's sidecar exchanged with what is outside the pod,
//! as the kernel saw it, whatever the sidecar itself says.
//!
//! Invariant: labels are pods, directions and ways; an address or a port never is one.

use std::time::Duration;

use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Registry};
use proxy_common::flows::{Direction, Flow};
use tracing::warn;

use super::kernel::Flows;
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
        let direction = if flow.direction == Direction::Inbound as u32 { "inbound" } else { "outbound" };
        let pod = [namespace, name, direction];
        self.flows.with_label_values(&pod).inc();
        self.bytes.with_label_values(&[namespace, name, direction, "sent"]).inc_by(flow.sent_bytes);
        self.bytes.with_label_values(&[namespace, name, direction, "received"]).inc_by(flow.received_bytes);
        self.retransmits.with_label_values(&pod).inc_by(flow.retransmits.into());
        self.duration.with_label_values(&[direction]).observe(Duration::from_nanos(flow.duration_ns).as_secs_f64());
        self.round_trip.with_label_values(&[direction]).observe(Duration::from_micros(flow.srtt_us.into()).as_secs_f64());
    }

    /// Drops the series of a pod that is gone. A record that comes later makes them anew until the next one goes.
    pub(crate) fn forget(&self, namespace: &str, name: &str) {
        for direction in ["inbound", "outbound"] {
            let pod = [namespace, name, direction];
            // An error says that there was no such series.
            drop(self.flows.remove_label_values(&pod));
            drop(self.retransmits.remove_label_values(&pod));
            for way in ["sent", "received"] {
                drop(self.bytes.remove_label_values(&[namespace, name, direction, way]));
            }
        }
    }
}

/// Reads records until the kernel gives none any more. `record` finds the pod of a namespace cookie; a record of a pod that
/// is gone already is dropped. Cancel-safe: a record is taken and counted in one step.
pub(crate) async fn follow(mut flows: Flows, mut record: impl FnMut(&Flow)) {
    loop {
        match flows.next().await {
            Ok(flow) => record(&flow),
            Err(error) => {
                warn!(%error, "the kernel's flow records ended");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::address::Address;

    use super::*;

    fn flow(direction: Direction) -> Flow {
        Flow {
            netns: 1,
            sent_bytes: 300,
            received_bytes: 1000,
            duration_ns: 2_000_000_000,
            local: Address::NONE,
            remote: Address::NONE,
            srtt_us: 70,
            retransmits: 2,
            local_port: 80,
            remote_port: 40000,
            direction: direction as u32,
        }
    }

    #[test]
    fn records_add_up_by_pod_and_direction() {
        let registry = Registry::new();
        let metrics = FlowMetrics::new(&registry).unwrap();
        metrics.record(&flow(Direction::Inbound), "shop", "web-1");
        metrics.record(&flow(Direction::Inbound), "shop", "web-1");
        metrics.record(&flow(Direction::Outbound), "shop", "web-1");
        let text = metrics::render(&registry);
        for line in [
            r#"outrigger_capture_flows_total{direction="inbound",namespace="shop",pod="web-1"} 2"#,
            r#"outrigger_capture_flow_bytes_total{direction="inbound",namespace="shop",pod="web-1",way="received"} 2000"#,
            r#"outrigger_capture_flow_bytes_total{direction="outbound",namespace="shop",pod="web-1",way="sent"} 300"#,
            r#"outrigger_capture_flow_retransmits_total{direction="outbound",namespace="shop",pod="web-1"} 2"#,
            r#"outrigger_capture_flow_duration_seconds_sum{direction="outbound"} 2"#,
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
    }

    #[test]
    fn pod_that_is_gone_leaves_no_series() {
        let registry = Registry::new();
        let metrics = FlowMetrics::new(&registry).unwrap();
        metrics.record(&flow(Direction::Inbound), "shop", "web-1");
        metrics.forget("shop", "web-1");
        metrics.forget("shop", "never-seen");
        assert!(!metrics::render(&registry).contains("web-1"));
    }
}
