//! Keeps the records of pods as the API server describes them, and removes those of pods that are gone, with what closed these.
//!
//! A pod's record outlives its volume until no process of it is left: one that still runs stays captured. An agent that is
//! killed in between leaves a record without a volume, by which the next one knows that the pod was about to end.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tracing::warn;

use super::admission::{file, is_populated, write};
use super::cgroup;
use super::cluster::{Cluster, PodsByUid};
use super::described::Described;
use super::volume::Owner;
use crate::model::pod_record::PodRecord;
use crate::node::pods::Pod;
use crate::node::{Agent, chain, undescribed, withdraw_pod};

/// Pods whose volumes are gone, and of which a record or a process is there yet.
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

    /// All of them.
    pub(super) fn owners(&self) -> Vec<Owner> {
        self.owners.lock().clone()
    }
}

/// The pods with a record and without a volume: their volumes went when a former agent was there, which did not live to see
/// the end of their processes.
pub(super) fn left_behind(records: &[PodRecord], volumes: &[Owner]) -> Vec<Owner> {
    let has_volume = |of: &Owner| volumes.iter().any(|owner| owner.uid == of.uid);
    records.iter().filter_map(Owner::of_record).filter(|owner| !has_volume(owner)).collect()
}

/// Does a process of the pod's application run? Of a pod of which nothing was heard yet that is not known, and it is taken for
/// granted.
pub(crate) fn app_runs(cluster: &Cluster, owner: &Owner, cgroup: &Path) -> bool {
    let pods = cluster.pods.borrow();
    let Some(pods) = pods.as_ref() else { return true };
    pods.get(&owner.uid).is_some_and(|described| runs(described, cgroup))
}

fn runs(described: &Described, cgroup: &Path) -> bool {
    cgroup::containers_in(cgroup).any(|(id, folder)| described.is_of_app(&id) && is_populated(&folder))
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
        let record = corrected(&pod.record, now);
        if record == pod.record {
            continue;
        }
        if let Err(error) = write(agent, &record) {
            warn!(pod = %record.named(), %error, "a pod's record cannot be written");
        }
        agent.look.notify_one();
    }
}

/// What is said of a pod now. It is enrolled before the API server says its addresses as a rule; those that its namespace
/// showed and that are not its own are taken from it.
fn corrected(record: &PodRecord, now: &Described) -> PodRecord {
    let addresses = now.own(&record.addresses, &record.former_addresses);
    PodRecord { terminating: now.terminating, labels: now.labels.clone(), addresses, ..record.clone() }
}

/// Removes the record of a pod that is gone, and what closed it. `false`: some of its processes run yet.
fn forget(agent: &Agent, owner: &Owner) -> bool {
    let is_forgotten = forget_record(agent, owner);
    if is_forgotten && let Some(kernel) = agent.capture.kernel() {
        let opened = kernel.lock().open_pod(&owner.uid);
        // Who opens pods tries again, once the API server has said that it is gone.
        if let Err(error) = opened {
            warn!(pod = %owner.named(), error = chain(&error), "what closed a pod that is gone cannot be removed yet");
        }
    }
    is_forgotten
}

fn forget_record(agent: &Agent, owner: &Owner) -> bool {
    let path = file(agent, owner);
    let record = std::fs::read(&path).ok().and_then(|bytes| PodRecord::parse(&bytes).ok());
    // Another pod may have its name by now.
    let Some(record) = record.filter(|record| record.uid.as_ref() == Some(&owner.uid)) else {
        // Its sidecar never asked.
        let left = cgroup::folder_of(&owner.uid, &agent.cgroup_root);
        return !left.is_some_and(|folder| undescribed::is_populated(&folder));
    };
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::described::tests::pod;
    use super::*;
    use crate::node::pods::tests::record;

    #[test]
    fn addresses_that_are_not_the_pods_own_are_taken_from_it_once_its_own_are_known() {
        let enrolled = PodRecord { labels: [("app".to_owned(), "web".to_owned())].into(), ..record("web", 1) };
        let told = |ips: serde_json::Value| pod(|pod| pod["status"] = json!({ "podIPs": ips }));
        assert_eq!(corrected(&enrolled, &told(json!([]))), enrolled);
        assert_eq!(corrected(&enrolled, &told(json!([{ "ip": "10.64.0.5" }, { "ip": "fd64::5" }]))), enrolled);
        let narrowed = PodRecord { addresses: vec!["fd64::5".parse().unwrap()], ..enrolled.clone() };
        assert_eq!(corrected(&enrolled, &told(json!([{ "ip": "fd64::5" }]))), narrowed);
        assert!(corrected(&enrolled, &told(json!([{ "ip": "10.64.0.9" }]))).addresses.is_empty());
        // It was enrolled anew with another network, and that is not told yet.
        let again = PodRecord { former_addresses: vec!["10.64.0.9".parse().unwrap()], ..enrolled };
        assert_eq!(corrected(&again, &told(json!([{ "ip": "10.64.0.9" }]))), again);
        assert!(corrected(&again, &told(json!([{ "ip": "10.64.0.8" }]))).addresses.is_empty());
    }

    #[test]
    fn the_application_runs_for_as_long_as_a_process_of_one_of_its_containers_does() {
        let cgroup = tempfile::tempdir().unwrap();
        let says = |id: &str, populated: &str| {
            let folder = cgroup.path().join(id);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("cgroup.events"), format!("populated {populated}\nfrozen 0\n")).unwrap();
        };
        let status = |name: &str, id: &str| json!({ "name": name, "containerID": format!("containerd://{id}"), "image": "", "imageID": "", "ready": true, "restartCount": 0 });
        let described = pod(|pod| {
            pod["status"] = json!({
                "initContainerStatuses": [status("outrigger", "aa11aa11aa11")],
                "containerStatuses": [status("app", "bb22bb22bb22")],
            });
        });
        // The sandbox's has no name, and runs to the last.
        for id in ["aa11aa11aa11", "bb22bb22bb22", "cc33cc33cc33"] {
            says(id, "1");
        }
        assert!(runs(&described, cgroup.path()));
        says("bb22bb22bb22", "0");
        assert!(!runs(&described, cgroup.path()));
        std::fs::remove_dir_all(cgroup.path().join("bb22bb22bb22")).unwrap();
        assert!(!runs(&described, cgroup.path()));
    }

    #[test]
    fn a_pod_whose_volume_went_before_its_record_is_about_to_end() {
        let of = |name: &str, uid: &str| PodRecord { uid: Some(uid.to_owned()), ..record(name, 1) };
        let records = [of("web", "0a-1"), of("api", "0b-2")];
        let [web, api] =
            ["web", "api"].map(|name| left_behind(&records, &[]).into_iter().find(|owner| owner.name == name).unwrap());
        assert_eq!((web.uid.as_str(), web.namespace.as_str(), web.service_account.as_str()), ("0a-1", "shop", "web"));
        assert_eq!(left_behind(&records, std::slice::from_ref(&web)), [api]);
        // A pod of that name that was made anew has a volume of its own, and says nothing of the one before.
        let again = Owner { uid: "0c-3".to_owned(), ..web.clone() };
        assert!(left_behind(&records, &[again]).contains(&web));
    }
}
