//! Pods that ask for a sidecar and came up without one: the webhook was away, or the label came later. They are closed, both
//! ways, until they are made anew or the label is taken back. And pods that have one, until it has asked to be enrolled: what
//! is called like the sidecar may be none, and init containers may run before a classic one. So no pod that asks for a
//! sidecar is open before it is known to have one.
//!
//! A pod is recognised by its UID in the name of its cgroup, which the kubelet gives it: nobody has to enter anything, and no right
//! is needed beyond those of capture. It is closed as soon as the API server says what it is and its cgroup is there, which is
//! before its sandbox has a network as a rule; what it did before ends too, since every packet is looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tracing::{debug, error, info, warn};

use super::cluster::{Cluster, Namespaces, PodsByUid};
use super::described::Described;
use super::events::Events;
use super::volume::Owner;
use super::{admission, cgroup};
use crate::injection;
use crate::node::kernel::Kernel;
use crate::node::{Agent, chain};

/// Closes and opens until the agent ends.
pub(super) async fn follow(agent: Arc<Agent>, cluster: Arc<Cluster>, mut events: Events) {
    let (mut pods, mut namespaces) = (cluster.pods.subscribe(), cluster.namespaces.subscribe());
    let mut enrolled = agent.pods.subscribe();
    let mut told = BTreeMap::new();
    loop {
        let uids: BTreeSet<String> = enrolled.borrow_and_update().values().filter_map(|pod| pod.record.uid.clone()).collect();
        let known = (pods.borrow_and_update().clone(), namespaces.borrow_and_update().clone());
        let mut is_waiting = false;
        // Before both were heard once nobody is opened.
        if let ((Some(pods), Some(namespaces)), Some(kernel)) = (known, agent.capture.kernel()) {
            let is_recorded = |pod: &Described| uids.contains(&pod.owner.uid) || admission::is_recorded(&agent, &pod.owner);
            let wanted = wanted(&pods, &namespaces, is_recorded);
            is_waiting = put(&agent, kernel, &wanted, &mut told, &mut events);
            let lacking = wanted.values().filter(|(why, _pod)| *why == Why::NoSidecar).count();
            agent.metrics.quarantined.set(i64::try_from(lacking).unwrap_or(i64::MAX));
        }
        let span = if is_waiting { LOOK_SOON } else { LOOK_EVERY };
        // Cancel-safe: all of it is looked at whatever the reason.
        let heard = tokio::select! {
            heard = pods.changed() => heard,
            heard = namespaces.changed() => heard,
            heard = enrolled.changed() => heard,
            () = tokio::time::sleep(span) => Ok(()),
        };
        if heard.is_err() {
            return;
        }
    }
}

/// Why a pod is closed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Why {
    /// It asks for a sidecar and has none.
    NoSidecar,
    /// Its sidecar has not asked to be enrolled, and nothing says that it will not.
    NotYet,
}

/// The pods that are to be closed, by UID; `is_heard` are those of which the sidecar asked to be enrolled.
fn wanted(
    pods: &PodsByUid,
    namespaces: &Namespaces,
    is_heard: impl Fn(&Described) -> bool,
) -> BTreeMap<String, (Why, Arc<Described>)> {
    let lacks = |pod: &Described| {
        // A namespace that was not heard of says nothing; its pod's own label counts.
        let unheard = || injection::Namespace { name: pod.owner.namespace.clone(), ..injection::Namespace::default() };
        let namespace = namespaces.get(&pod.owner.namespace).cloned().unwrap_or_else(unheard);
        injection::is_asked(&pod.metadata(), &namespace)
    };
    let why = |pod: &Described| {
        // What is in the node's network is not in the mesh's, and to close it could close the node.
        if pod.host_network || pod.ended {
            return None;
        }
        if !pod.has_sidecar() {
            return lacks(pod).then_some(Why::NoSidecar);
        }
        if is_heard(pod) {
            return None;
        }
        // A sidecar is ready, and so was heard, before any other container begins, but for init containers before a classic one.
        if pod.others_begun && !pod.begins_without {
            return lacks(pod).then_some(Why::NoSidecar);
        }
        (pod.begins_without || lacks(pod)).then_some(Why::NotYet)
    };
    pods.iter().filter_map(|(uid, pod)| Some((uid.clone(), (why(pod)?, Arc::clone(pod))))).collect()
}

/// Has the kernel close these and no others. Is one of them not to be found yet?
fn put(
    agent: &Agent,
    kernel: &Mutex<Kernel>,
    wanted: &BTreeMap<String, (Why, Arc<Described>)>,
    told: &mut BTreeMap<String, (Why, String)>,
    events: &mut Events,
) -> bool {
    let closed = kernel.lock().closed_pods().unwrap_or_else(|error| {
        error!(error = chain(&error), "cannot tell which pods are closed");
        Vec::new()
    });
    for uid in closed.iter().filter(|uid| !wanted.contains_key(*uid)) {
        let opened = kernel.lock().open_pod(uid);
        match opened {
            Ok(()) => info!(uid, "a pod is in quarantine no more"),
            Err(error) => warn!(uid, error = chain(&error), "a pod cannot be let out of quarantine"),
        }
    }
    told.retain(|uid, _outcome| wanted.contains_key(uid));
    let mut is_waiting = false;
    for (uid, (why, pod)) in wanted {
        let outcome = match folder(agent, uid) {
            Some(folder) => {
                let kernel = kernel.lock();
                // Its sidecar may have been heard since, see `let_out`.
                if *why == Why::NotYet && admission::is_recorded(agent, &pod.owner) {
                    continue;
                }
                kernel.close_pod(uid, &folder).map_err(|error| chain(&error))
            }
            // It has none before it has a sandbox.
            None => {
                is_waiting = true;
                continue;
            }
        };
        let text = outcome.err().unwrap_or_default();
        // What passed for a sidecar is closed already when it is found out.
        let now = (*why, text.clone());
        if told.insert(uid.clone(), now.clone()).as_ref() == Some(&now) {
            continue;
        }
        if text.is_empty() && *why == Why::NotYet {
            debug!(pod = %pod.owner.named(), uid, "a pod is closed until its sidecar asks to be enrolled");
            continue;
        }
        if text.is_empty() {
            warn!(pod = %pod.owner.named(), uid, remedy = REMEDY, "a pod asks for a sidecar and has none: it is in quarantine");
            events.quarantined(pod, REMEDY);
        } else {
            error!(pod = %pod.owner.named(), uid, error = text, remedy = REMEDY, "a pod without a running sidecar cannot be closed");
        }
    }
    is_waiting
}

/// Lets out a pod whose sidecar is enrolled, before that is told so: its first connection would wait a second for its second
/// attempt. Its record is written by then, and who closes pods looks for that with the kernel held.
pub(super) fn let_out(agent: &Agent, owner: &Owner) {
    let Some(kernel) = agent.capture.kernel() else { return };
    let opened = kernel.lock().open_pod(&owner.uid);
    if let Err(error) = opened {
        warn!(pod = %owner.named(), error = chain(&error), "a pod whose sidecar is enrolled cannot be let out yet");
    }
}

fn folder(agent: &Agent, uid: &str) -> Option<PathBuf> {
    cgroup::folder_of(uid, &agent.cgroup_root)
}

const REMEDY: &str = "delete the pod, so that it is made anew with its sidecar, or label it outrigger.dev/inject: disabled";

/// While a pod is awaited that has no cgroup yet.
const LOOK_SOON: Duration = Duration::from_millis(20);
/// A cgroup may be made anew with the pod's sandbox.
const LOOK_EVERY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::described::tests::pod;
    use super::*;

    fn is_closed(namespace: &str, change: impl FnOnce(&mut Value)) -> bool {
        why(namespace, false, change).is_some()
    }

    fn why(namespace: &str, is_heard: bool, change: impl FnOnce(&mut Value)) -> Option<Why> {
        let pods: PodsByUid = [("0a-1".to_owned(), Arc::new(pod(change)))].into();
        let labels = [("outrigger.dev/inject".to_owned(), namespace.to_owned())].into();
        let shop = injection::Namespace { name: "shop".into(), labels, ..injection::Namespace::default() };
        wanted(&pods, &[("shop".to_owned(), shop)].into(), |_pod| is_heard).remove("0a-1").map(|(why, _pod)| why)
    }

    fn bare(pod: &mut Value) {
        pod["spec"]["initContainers"] = json!([]);
        pod["spec"]["volumes"] = json!([]);
    }

    #[test]
    fn a_pod_that_asks_for_a_sidecar_and_has_none_is_closed() {
        assert_eq!(why("enabled", false, bare), Some(Why::NoSidecar));
        assert!(!is_closed("disabled", bare));
        assert!(is_closed("disabled", |pod| {
            bare(pod);
            pod["metadata"]["labels"]["outrigger.dev/inject"] = json!("enabled");
        }));
        assert!(!is_closed("enabled", |pod| {
            bare(pod);
            pod["metadata"]["labels"]["outrigger.dev/inject"] = json!("disabled");
        }));
    }

    #[test]
    fn a_label_that_says_nothing_opens_nothing_and_a_mark_of_ours_is_no_sidecar() {
        assert!(is_closed("enabled", |pod| {
            bare(pod);
            pod["metadata"]["labels"]["outrigger.dev/inject"] = json!("yes");
        }));
        assert!(is_closed("enabled", |pod| {
            bare(pod);
            pod["metadata"]["labels"]["outrigger.dev/sidecar"] = json!("injected");
        }));
        assert!(is_closed("enabled", |pod| pod["spec"]["volumes"] = json!([{ "name": "outrigger", "emptyDir": {} }])));
    }

    #[test]
    fn a_pod_is_closed_from_the_first_on_until_its_sidecar_was_heard() {
        let as_made = |_pod: &mut Value| {};
        assert_eq!(why("enabled", false, as_made), Some(Why::NotYet));
        assert_eq!(why("enabled", true, as_made), None);
        assert_eq!(why("disabled", false, as_made), None, "one that asks for nothing is not waited for");
    }

    #[test]
    fn a_container_of_the_sidecars_name_that_was_never_heard_is_none_once_another_one_has_begun() {
        let begun = |pod: &mut Value| {
            pod["status"] = json!({ "containerStatuses": [
                { "name": "app", "containerID": "containerd://aa11", "image": "", "imageID": "", "ready": true, "restartCount": 0 },
            ] });
        };
        assert_eq!(why("enabled", false, begun), Some(Why::NoSidecar));
        assert_eq!(why("disabled", false, begun), None);
        assert_eq!(why("enabled", true, begun), None);
    }

    #[test]
    fn what_is_the_nodes_the_clusters_or_over_is_left_alone() {
        assert!(!is_closed("enabled", |pod| {
            bare(pod);
            pod["spec"]["hostNetwork"] = json!(true);
        }));
        assert!(!is_closed("enabled", |pod| {
            bare(pod);
            pod["metadata"]["namespace"] = json!("kube-system");
            pod["metadata"]["labels"]["outrigger.dev/inject"] = json!("enabled");
        }));
        assert!(!is_closed("enabled", |pod| {
            bare(pod);
            pod["status"] = json!({ "phase": "Succeeded" });
        }));
    }

    #[test]
    fn a_pod_whose_init_containers_come_before_its_sidecar_is_closed_until_that_is_enrolled() {
        let classic = pod(|pod| {
            let sidecar = pod["spec"]["initContainers"][0].take();
            pod["spec"]["initContainers"] = json!([{ "name": "first" }]);
            pod["spec"]["containers"].as_array_mut().unwrap().insert(0, sidecar);
        });
        let pods: PodsByUid = [("0a-1".to_owned(), Arc::new(classic))].into();
        // Its status takes some time to say that it runs.
        let why = |enrolled: &[&str]| {
            let is_heard = |pod: &Described| enrolled.contains(&pod.owner.uid.as_str());
            wanted(&pods, &Namespaces::new(), is_heard).remove("0a-1").map(|(why, _pod)| why)
        };
        assert_eq!(why(&["0b-2"]), Some(Why::NotYet));
        assert_eq!(why(&["0a-1"]), None);
        assert!(!is_closed("disabled", |pod| {
            let sidecar = pod["spec"]["initContainers"][0].take();
            pod["spec"]["initContainers"] = json!([]);
            pod["spec"]["containers"].as_array_mut().unwrap().insert(0, sidecar);
        }));
    }
}
