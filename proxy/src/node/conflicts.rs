//! Looks again and again whether other people's programs decide about the pods' connections.

use std::collections::BTreeSet;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use super::kernel::{Conflict, KernelError};
use super::pods::Pod;
use super::{Agent, admission};

/// Looks until the agent ends.
pub(super) async fn follow(agent: Arc<Agent>) {
    loop {
        let pods: Vec<Arc<Pod>> = agent.pods.borrow().values().map(Arc::clone).collect();
        let mut found = BTreeSet::new();
        for pod in pods {
            match of(&agent, &pod) {
                Ok(conflicts) => found.extend(conflicts),
                // One that ends at this moment has no cgroup any more.
                Err(error) => tracing::debug!(error = super::chain(&error), "cannot tell who else is at a pod's hooks"),
            }
        }
        told(&agent, found.into_iter().collect());
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What runs for every pod is told once, without a name of one.
fn of(agent: &Agent, pod: &Pod) -> Result<Vec<Conflict>, KernelError> {
    // On another rung nobody decides beside our programs.
    let Some(kernel) = agent.capture.kernel() else { return Ok(Vec::new()) };
    let mut found = kernel.lock().others_at_connect(&pod.record.app_cgroup())?;
    let Ok(Some(netns)) = admission::namespace(agent, &pod.record) else { return Ok(found) };
    let in_pod = kernel.lock().others_at_arrival(netns.as_fd())?;
    let name = pod.record.named();
    found.extend(in_pod.into_iter().map(|one| Conflict { text: format!("{name}: {}", one.text), ..one }));
    Ok(found)
}

fn told(agent: &Agent, found: Vec<Conflict>) {
    agent.metrics.conflicts.set(i64::try_from(found.len()).unwrap_or(i64::MAX));
    agent.conflicts.send_if_modified(|known| {
        let changed = *known != found;
        for conflict in found.iter().filter(|conflict| !known.contains(conflict)) {
            warn!(conflict = conflict.text, steals = conflict.steals, "another program decides about the pods' connections");
        }
        if changed && found.is_empty() {
            info!("no other program decides about the pods' connections any more");
        }
        if changed {
            *known = found;
        }
        changed
    });
}

const LOOK_EVERY: Duration = Duration::from_secs(10);
