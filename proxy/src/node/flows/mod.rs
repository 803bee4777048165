//! Kernel flow records: one for each connection between a pod's sidecar and what is outside the pod, when it closes. They
//! become metrics of the agent, and the latest of them, with the names of pods in place of addresses, are kept for people.
//!
//! Invariant: nothing here grows with traffic. What the kernel had no place for and what nobody can be named for is counted.

mod metrics;
mod recent;

use std::sync::Arc;

use proxy_common::PORT_PROBE;
use proxy_common::counters::Counter;
use proxy_common::flows::{Direction, End, Flow};
use tracing::warn;

pub(crate) use self::metrics::FlowMetrics;
pub(crate) use self::recent::{FlowReport, FlowsReport, Question, Recent};
use super::Agent;
use super::kernel::Flows;
use super::pods::Pod;
use crate::base::clock::WallClock;

/// Reads records until the kernel gives none any more. Cancel-safe: a record is taken and counted in one step.
pub(crate) async fn follow(agent: Arc<Agent>, mut flows: Flows, clock: WallClock) {
    let mut taken = 0_usize;
    loop {
        match flows.next().await {
            Ok(flow) => take(&agent, &flow, &clock),
            Err(error) => {
                warn!(%error, "the kernel's flow records ended");
                return;
            }
        }
        taken = taken.wrapping_add(1);
        if taken.is_multiple_of(AT_ONCE) {
            // There may always be a next one, and others want to run as well.
            tokio::task::yield_now().await;
        }
    }
}

/// What is known of recent connections, for whoever asks.
pub(crate) fn report(agent: &Agent, question: &Question) -> FlowsReport {
    let mut report = agent.flows.lock().report(question);
    let pods: Vec<Arc<Pod>> = agent.pods.borrow().values().map(Arc::clone).collect();
    let lost = |pod: &Arc<Pod>| agent.capture.counters(pod).map_or(0, |of| of.of(Counter::FlowLost));
    report.lost = pods.iter().map(lost).sum::<u64>().saturating_add(agent.metrics.flows.unnamed());
    report
}

fn take(agent: &Agent, flow: &Flow, clock: &WallClock) {
    if is_probe(flow) {
        return;
    }
    let known = agent.pods.borrow().get(&flow.netns).map(|pod| pod.record.named());
    if let Some(pod) = &known {
        agent.metrics.flows.record(flow, &pod.namespace, &pod.name);
    }
    // One pod's last connections may close after it is gone.
    if !agent.flows.lock().take(flow, known, clock.since_epoch()) {
        agent.metrics.flows.is_unnamed();
    }
}

/// Is it of the agent's own look at a pod's capture? No program's connection leads to that port.
fn is_probe(flow: &Flow) -> bool {
    flow.direction == Direction::Inbound as u16 && flow.local_port == PORT_PROBE
}

/// The word for a record's direction.
fn direction(flow: &Flow) -> &'static str {
    if flow.direction == Direction::Inbound as u16 { "inbound" } else { "outbound" }
}

/// The word for how it ended.
fn end(flow: &Flow) -> &'static str {
    let is = |end: End| flow.end == end as u16;
    if is(End::Finished) {
        "finished"
    } else if is(End::Reset) {
        "reset"
    } else if is(End::TimedOut) {
        "timed_out"
    } else {
        "unknown"
    }
}

/// Records without a pause.
const AT_ONCE: usize = 256;

#[cfg(test)]
fn flow(direction: Direction, end: End) -> Flow {
    use proxy_common::address::Address;

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
        direction: direction as u16,
        end: end as u16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_agent_dials_to_prove_capture_is_no_connection_of_the_pods() {
        assert!(is_probe(&Flow { local_port: PORT_PROBE, ..flow(Direction::Inbound, End::Finished) }));
        assert!(!is_probe(&flow(Direction::Inbound, End::Finished)));
        assert!(!is_probe(&Flow { local_port: PORT_PROBE, ..flow(Direction::Outbound, End::Finished) }), "an ephemeral port");
    }
}
