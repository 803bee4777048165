//! Keeps the records of pods as the API server describes them, and removes those of pods that are gone.
//!
//! A pod's record outlives its volume until no process of it is left: one that still runs stays captured.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tracing::warn;

use super::admission::{file, write};
use super::cluster::{Cluster, PodsByUid};
use super::volume::Owner;
use crate::model::pod_record::PodRecord;
use crate::node::pods::Pod;
use crate::node::{Agent, undescribed, withdraw_pod};

/// Pods whose volumes are gone, and whose records are there yet.
#[derive(Debug, Default)]
pub(crate) struct Ending {
    owners: Mutex<Vec<Owner>>,
    added: Notify,
}

impl Ending {
    /// One more.
    pub(super) fn add(&self, owner: Owner) {
        self.owners.lock().push(owner);
        self.added.notify_one();
    }
}

/// Looks after both until the agent ends.
pub(super) async fn follow(agent: Arc<Agent>, cluster: Arc<Cluster>) {
    let mut heard = cluster.pods.subscribe();
    loop {
        let is_waiting = !agent.ending.owners.lock().is_empty();
        // Cancel-safe: all of it is looked at whatever the reason.
        tokio::select! {
            () = agent.ending.added.notified() => {}
            () = tokio::time::sleep(LOOK_EVERY), if is_waiting => {}
            changed = heard.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
        let described = heard.borrow_and_update().clone();
        if let Some(described) = described {
            describe(&agent, &described);
        }
        agent.ending.owners.lock().retain(|owner| !forget(&agent, owner));
    }
}

/// Writes down what changed of the pods that are enrolled. What their owners ask of capture stays as it was at the start.
fn describe(agent: &Agent, described: &PodsByUid) {
    let pods: Vec<Arc<Pod>> = agent.pods.borrow().values().map(Arc::clone).collect();
    for pod in pods {
        let Some(now) = pod.record.uid.as_ref().and_then(|uid| described.get(uid)) else { continue };
        if now.terminating == pod.record.terminating && now.labels == pod.record.labels {
            continue;
        }
        let record = PodRecord { terminating: now.terminating, labels: now.labels.clone(), ..pod.record.clone() };
        if let Err(error) = write(agent, &record) {
            warn!(pod = %record.named(), %error, "a pod's record cannot be written");
        }
        agent.look.notify_one();
    }
}

/// Removes the record of a pod that is gone. `false`: some of its processes run yet.
fn forget(agent: &Agent, owner: &Owner) -> bool {
    let path = file(agent, owner);
    let record = std::fs::read(&path).ok().and_then(|bytes| PodRecord::parse(&bytes).ok());
    // Another pod may have its name by now.
    let Some(record) = record.filter(|record| record.uid.as_ref() == Some(&owner.uid)) else { return true };
    if undescribed::is_populated(&record.cgroup) {
        return false;
    }
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            warn!(pod = %owner.named(), %error, "a pod's record cannot be removed");
            return false;
        }
        _gone => {}
    }
    agent.namespaces.lock().forget(record.netns_cookie);
    if !agent.pods.borrow().contains_key(&record.netns_cookie) {
        // A former agent enrolled it, and nobody asked since.
        withdraw_pod(agent, record.netns_cookie);
    }
    agent.look.notify_one();
    true
}

const LOOK_EVERY: Duration = Duration::from_millis(200);
