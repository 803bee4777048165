//! Pods that ask for a sidecar and came up without one: the webhook was away, or the label came later. They are closed, both
//! ways, until they are made anew or the label is taken back. And pods that have one, until it is enrolled and the pod captured:
//! what is called like the sidecar may be none, init containers may run before a classic one, and to capture may fail. So no
//! pod that asks for a sidecar is open before its traffic is that sidecar's; in a sandbox that is made anew neither (`sandbox`).
//!
//! A pod is recognised by its UID in the name of its cgroup, which the kubelet gives it: nobody has to enter anything, and no right
//! is needed beyond those of capture. One that has a volume of ours is closed before anything of it runs (`beginning`). Another one
//! is closed as soon as the API server says what it is and its cgroup is there, which is before its sandbox has a network as a
//! rule; what it did before ends too, since every packet is looked at.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tracing::{debug, error, info, warn};

use super::cluster::{Cluster, Namespaces, PodsByUid};
use super::described::Described;
use super::events::Events;
use super::volume::Owner;
use super::volumes::Volumes;
use super::{admission, cgroup};
use crate::base::backoff::Backoff;
use crate::injection;
use crate::model::pod_record::PodRecord;
use crate::node::kernel::{Enrolled, Kernel, KernelError};
use crate::node::{Agent, chain};

/// Closes and opens until the agent ends.
pub(super) async fn follow(agent: Arc<Agent>, cluster: Arc<Cluster>, volumes: Arc<Volumes>, mut events: Events) {
    let (mut pods, mut namespaces) = (cluster.pods.subscribe(), cluster.namespaces.subscribe());
    let mut enrolled = agent.pods.subscribe();
    let mut told = BTreeMap::new();
    let mut looks = Looks::new();
    loop {
        // First: a pod that is expelled is known no more before it is closed.
        let closed = agent.capture.kernel().map(closed).unwrap_or_default();
        let uids: BTreeSet<String> =
            enrolled.borrow_and_update().values().filter(|pod| !pod.is_left()).filter_map(|pod| pod.record.uid.clone()).collect();
        let known = (pods.borrow_and_update().clone(), namespaces.borrow_and_update().clone());
        let mut awaited = BTreeSet::new();
        // Before both were heard once nobody is opened.
        if let ((Some(pods), Some(namespaces)), Some(kernel)) = (known, agent.capture.kernel()) {
            // In this order: a pod is closed after it has its volume, and is about to end before it has none any more. One that
            // was closed above and is in neither was let go.
            let mut begun = volumes.owners();
            begun.extend(agent.ending.owners());
            let got = |owner: &Owner| {
                if uids.contains(&owner.uid) { Got::Captured } else { got(&agent, &kernel.lock(), owner) }
            };
            let wanted = wanted(&pods, &namespaces, &begun, got);
            awaited = put(&agent, kernel, &closed, &wanted, &mut told, &mut events);
            let lacking = wanted.values().filter(|(why, _owner)| why.remedy().is_some()).count();
            agent.metrics.quarantined.set(i64::try_from(lacking).unwrap_or(i64::MAX));
        }
        let span = looks.next(awaited);
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

/// When it is looked again, whatever is heard.
struct Looks {
    backoff: Backoff,
    /// Pods that are to be closed and have no cgroup, by UID.
    awaited: BTreeSet<String>,
}

impl Looks {
    const fn new() -> Self {
        Self { backoff: cgroup::LOOKS, awaited: BTreeSet::new() }
    }

    /// How long after a look that found none for these. The cgroup of a pod that was not awaited before comes soon, whoever else
    /// has been waiting for his for long.
    fn next(&mut self, awaited: BTreeSet<String>) -> Duration {
        if !awaited.is_subset(&self.awaited) {
            self.backoff.reset();
        }
        self.awaited = awaited;
        if self.awaited.is_empty() { LOOK_EVERY } else { self.backoff.whole() }
    }
}

/// Why a pod is closed.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Why {
    /// It asks for a sidecar and has none.
    NoSidecar,
    /// It has none, and what it says of one says nothing: made anew, it would have none again.
    Unclear(injection::Refusal),
    /// It has a sidecar's volume, and no sidecar.
    VolumeAlone,
    /// Its sidecar is not enrolled, and nothing says that it will not be.
    NotYet,
}

impl Why {
    /// What the pod's owner can do about it. `None`: it is as it should be.
    fn remedy(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::NoSidecar => Some(REMEDY.into()),
            Self::Unclear(refusal) => Some(format!("{refusal}; where that is enabled, {MADE_ANEW}").into()),
            Self::VolumeAlone => Some(MADE_ANEW.into()),
            Self::NotYet => None,
        }
    }
}

/// How far a pod's sidecar has got.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Got {
    Unheard,
    /// It asked to be enrolled, and the pod is not captured: it cannot be, or not yet; or the node or the pod's sandbox was started
    /// anew since.
    Asked,
    Captured,
}

/// The pods that are to be closed, by UID. Those that have `begun` have a volume of ours, and may not have been heard of yet.
fn wanted(
    pods: &PodsByUid,
    namespaces: &Namespaces,
    begun: &[Owner],
    got: impl Fn(&Owner) -> Got,
) -> BTreeMap<String, (Why, Owner)> {
    let asks = |pod: &Described| {
        // A namespace that was not heard of says nothing; its pod's own label counts.
        let unheard = || injection::Namespace { name: pod.owner.namespace.clone(), ..injection::Namespace::default() };
        let namespace = namespaces.get(&pod.owner.namespace).cloned().unwrap_or_else(unheard);
        let metadata = pod.metadata();
        let why = injection::unclear(&metadata, &namespace).map_or(Why::NoSidecar, Why::Unclear);
        injection::is_asked(&metadata, &namespace).then_some(why)
    };
    let lacks = |pod: &Described| if pod.has_volume { Some(Why::VolumeAlone) } else { asks(pod) };
    let why = |pod: &Described| {
        // What is in the node's network is not in the mesh's, and to close it could close the node.
        if pod.host_network || pod.ended {
            return None;
        }
        if !pod.has_sidecar() {
            return lacks(pod);
        }
        match got(&pod.owner) {
            Got::Captured => None,
            // Whatever its labels say, it is of the mesh: what cannot be captured is not open.
            Got::Asked => Some(Why::NotYet),
            // A sidecar is ready, and so was heard, before any container behind it begins. What was enrolled is forgotten
            // before the API server says that the pod is gone.
            Got::Unheard if pod.others_begun && !pod.begins_without && !pod.terminating => Some(Why::VolumeAlone),
            Got::Unheard => Some(Why::NotYet),
        }
    };
    let heard = pods.iter().filter_map(|(uid, pod)| Some((uid.clone(), (why(pod)?, pod.owner.clone()))));
    let unheard = begun.iter().filter(|owner| !pods.contains_key(&owner.uid) && got(owner) != Got::Captured);
    heard.chain(unheard.map(|owner| (owner.uid.clone(), (Why::NotYet, owner.clone())))).collect()
}

/// The pods that are closed.
fn closed(kernel: &Mutex<Kernel>) -> Vec<String> {
    kernel.lock().closed_pods().unwrap_or_else(|error| {
        error!(error = chain(&error), "cannot tell which pods are closed");
        Vec::new()
    })
}

/// Closes one pod, unless it is captured. With the kernel held: its sidecar may have been enrolled since, see `let_out`.
pub(super) fn close(agent: &Agent, kernel: &Kernel, owner: &Owner, folder: &Path) -> Result<Got, KernelError> {
    let got = got(agent, kernel, owner);
    if got != Got::Captured {
        kernel.close_pod(&owner.uid, folder)?;
    }
    Ok(got)
}

/// Has the kernel close these and no others. Returns those of them that are not to be found yet.
fn put(
    agent: &Agent,
    kernel: &Mutex<Kernel>,
    closed: &[String],
    wanted: &BTreeMap<String, (Why, Owner)>,
    told: &mut BTreeMap<String, (Why, String)>,
    events: &mut Events,
) -> BTreeSet<String> {
    for uid in closed.iter().filter(|uid| !wanted.contains_key(*uid)) {
        let opened = kernel.lock().open_pod(uid);
        match opened {
            Ok(()) => info!(uid, "a pod is in quarantine no more"),
            Err(error) => warn!(uid, error = chain(&error), "a pod cannot be let out of quarantine"),
        }
    }
    told.retain(|uid, _outcome| wanted.contains_key(uid));
    let mut awaited = BTreeSet::new();
    for (uid, (why, owner)) in wanted {
        let outcome = match folder(agent, uid) {
            Some(folder) => {
                let closed = close(agent, &kernel.lock(), owner, &folder);
                match closed {
                    Ok(Got::Captured) => continue,
                    closed => closed.map_err(|error| chain(&error)),
                }
            }
            // It has none before it has a sandbox.
            None => {
                awaited.insert(uid.clone());
                continue;
            }
        };
        let text = outcome.err().unwrap_or_default();
        // What passed for a sidecar is closed already when it is found out.
        let now = (why.clone(), text.clone());
        if told.insert(uid.clone(), now.clone()).as_ref() == Some(&now) {
            continue;
        }
        let pod = owner.named();
        match why.remedy() {
            None if text.is_empty() => debug!(%pod, uid, "a pod is closed until its sidecar asks to be enrolled"),
            Some(remedy) if text.is_empty() => {
                warn!(%pod, uid, %remedy, "a pod asks for a sidecar and has none: it is in quarantine");
                events.quarantined(owner, &remedy);
            }
            remedy => {
                let remedy = remedy.unwrap_or(MADE_ANEW.into());
                error!(%pod, uid, error = text, %remedy, "a pod without a running sidecar cannot be closed");
            }
        }
    }
    awaited
}

/// By the pod's record and the kernel's own word, so that the next agent finds the same.
fn got(agent: &Agent, kernel: &Kernel, owner: &Owner) -> Got {
    let Some(record) = admission::recorded(agent, owner) else { return Got::Unheard };
    // What is captured then is a network that nothing of the pod is in any more.
    if agent.pods.borrow().get(&record.netns_cookie).is_some_and(|pod| pod.is_left()) {
        return Got::Asked;
    }
    match kernel.find(record.netns_cookie) {
        Ok(Some(enrolled)) if is_of(&enrolled, &record) => Got::Captured,
        _another_or_none => Got::Asked,
    }
}

/// Is this what the record's pod was enrolled as? A record outlives its boot, after which another namespace may have the cookie.
fn is_of(enrolled: &Enrolled, record: &PodRecord) -> bool {
    let own = [enrolled.v4.map(IpAddr::V4), enrolled.v6.map(IpAddr::V6)];
    enrolled.cookie == record.netns_cookie && own.into_iter().flatten().any(|own| record.addresses.contains(&own))
}

/// Lets out a pod whose sidecar is enrolled, before that is told so: its first connection would wait a second for its second
/// attempt. One that could not be captured stays closed. Who closes pods looks for the same, with the kernel held.
pub(super) fn let_out(agent: &Agent, owner: &Owner) {
    let Some(kernel) = agent.capture.kernel() else { return };
    let opened = {
        let kernel = kernel.lock();
        if got(agent, &kernel, owner) != Got::Captured {
            return;
        }
        kernel.open_pod(&owner.uid)
    };
    if let Err(error) = opened {
        warn!(pod = %owner.named(), error = chain(&error), "a pod whose sidecar is enrolled cannot be let out yet");
    }
}

fn folder(agent: &Agent, uid: &str) -> Option<PathBuf> {
    cgroup::folder_of(uid, &agent.cgroup_root)
}

const MADE_ANEW: &str = "delete the pod, so that it is made anew with its sidecar";
const REMEDY: &str = "delete the pod, so that it is made anew with its sidecar, or label it outrigger.dev/inject: disabled";

/// A cgroup may be made anew with the pod's sandbox.
const LOOK_EVERY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::described::tests::pod;
    use super::*;
    use crate::node::pods::tests::record;

    fn is_closed(namespace: &str, change: impl FnOnce(&mut Value)) -> bool {
        why(namespace, Got::Unheard, change).is_some()
    }

    fn why(namespace: &str, got: Got, change: impl FnOnce(&mut Value)) -> Option<Why> {
        let pods: PodsByUid = [("0a-1".to_owned(), Arc::new(pod(change)))].into();
        let labels = [("outrigger.dev/inject".to_owned(), namespace.to_owned())].into();
        let shop = injection::Namespace { name: "shop".into(), labels, ..injection::Namespace::default() };
        wanted(&pods, &[("shop".to_owned(), shop)].into(), &[], |_owner| got).remove("0a-1").map(|(why, _owner)| why)
    }

    fn owner(uid: &str) -> Owner {
        Owner { namespace: "shop".into(), name: "web-1".into(), uid: uid.into(), service_account: "web".into() }
    }

    fn running(name: &str) -> Value {
        json!({ "name": name, "containerID": format!("containerd://{name}"), "image": "", "imageID": "", "ready": true, "restartCount": 0 })
    }

    fn begun(pod: &mut Value) {
        pod["status"] = json!({ "containerStatuses": [running("app")] });
    }

    fn bare(pod: &mut Value) {
        pod["spec"]["initContainers"] = json!([]);
        pod["spec"]["volumes"] = json!([]);
    }

    #[test]
    fn a_pod_that_asks_for_a_sidecar_and_has_none_is_closed() {
        assert_eq!(why("enabled", Got::Unheard, bare), Some(Why::NoSidecar));
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
    fn a_pod_whose_label_says_nothing_is_told_which_it_is_and_what_to_write() {
        let yes = |pod: &mut Value| {
            bare(pod);
            pod["metadata"]["labels"]["outrigger.dev/inject"] = json!("yes");
        };
        for (namespace, text) in [
            ("enabled", "label outrigger.dev/inject of the pod: \"yes\" says nothing; write enabled or disabled"),
            ("true", "label outrigger.dev/inject of the pod: \"yes\" says nothing; write enabled or disabled"),
        ] {
            let remedy = why(namespace, Got::Unheard, yes).unwrap().remedy().unwrap().into_owned();
            assert_eq!(remedy, format!("{text}; where that is enabled, {MADE_ANEW}"));
        }
        let remedy = why("", Got::Unheard, bare).unwrap().remedy().unwrap().into_owned();
        assert!(remedy.starts_with("label outrigger.dev/inject of the namespace: \"\" says nothing; write"), "{remedy}");
        assert_eq!(why("enabled", Got::Unheard, bare), Some(Why::NoSidecar));
        // Its own word is clear, whatever its namespace's is.
        let own = |pod: &mut Value| {
            bare(pod);
            pod["metadata"]["labels"]["outrigger.dev/inject"] = json!("disabled");
        };
        assert_eq!(why("true", Got::Unheard, own), None);
    }

    #[test]
    fn a_pod_is_closed_from_the_first_on_until_it_is_captured() {
        let as_made = |_pod: &mut Value| {};
        assert_eq!(why("enabled", Got::Unheard, as_made), Some(Why::NotYet));
        assert_eq!(why("enabled", Got::Captured, as_made), None);
        assert_eq!(
            why("disabled", Got::Unheard, as_made),
            Some(Why::NotYet),
            "it has a sidecar's volume, whatever its labels say"
        );
    }

    #[test]
    fn a_pod_with_a_volume_of_ours_is_closed_before_anything_was_heard_of_it_and_until_it_is_captured() {
        let begun = [owner("0a-1"), owner("0b-2")];
        let captured = |owner: &Owner| if owner.uid == "0b-2" { Got::Captured } else { Got::Unheard };
        let wanted = wanted(&PodsByUid::new(), &Namespaces::new(), &begun, captured);
        assert_eq!(wanted, [("0a-1".to_owned(), (Why::NotYet, owner("0a-1")))].into());
    }

    #[test]
    fn what_is_heard_of_a_pod_with_a_volume_of_ours_counts_from_then_on() {
        let of_node = pod(|pod| pod["spec"]["hostNetwork"] = json!(true));
        let pods: PodsByUid = [("0a-1".to_owned(), Arc::new(of_node))].into();
        assert_eq!(wanted(&pods, &Namespaces::new(), &[owner("0a-1")], |_owner| Got::Unheard), BTreeMap::new());
    }

    #[test]
    fn a_pod_that_holds_a_sidecars_volume_and_no_sidecar_is_told_that_no_label_lets_it_out() {
        let renamed = |pod: &mut Value| pod["spec"]["initContainers"][0]["name"] = json!("other");
        for namespace in ["enabled", "disabled"] {
            assert_eq!(why(namespace, Got::Unheard, renamed), Some(Why::VolumeAlone));
        }
        assert_eq!(Why::VolumeAlone.remedy().as_deref(), Some(MADE_ANEW));
        assert!(MADE_ANEW.len() < REMEDY.len() && REMEDY.starts_with(MADE_ANEW));
    }

    #[test]
    fn a_pod_whose_sidecar_asked_and_that_is_not_captured_is_closed_and_not_told_to_have_none() {
        for namespace in ["enabled", "disabled"] {
            assert_eq!(why(namespace, Got::Asked, |_as_made| {}), Some(Why::NotYet), "{namespace}");
            assert_eq!(
                why(namespace, Got::Asked, begun),
                Some(Why::NotYet),
                "as its status was before its node was started anew"
            );
            assert_eq!(why(namespace, Got::Captured, begun), None, "{namespace}");
        }
    }

    #[test]
    fn a_record_of_an_earlier_boot_is_not_taken_for_what_has_its_cookie_now() {
        let record = record("web-1", 7);
        let of = |cookie: u64, v4: &str| Enrolled { cookie, v4: v4.parse().ok(), v6: None, sidecar_cgroup_id: 1 };
        assert!(is_of(&of(7, "10.64.0.5"), &record));
        assert!(!is_of(&of(7, "10.64.0.6"), &record) && !is_of(&of(8, "10.64.0.5"), &record));
    }

    #[test]
    fn a_pod_that_is_about_to_be_gone_stays_closed_and_is_not_told_to_have_no_sidecar() {
        let ending = |pod: &mut Value| {
            begun(pod);
            pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        };
        assert_eq!(why("enabled", Got::Unheard, ending), Some(Why::NotYet));
    }

    #[test]
    fn a_pod_whose_cgroup_does_not_come_is_looked_for_less_often_and_one_that_was_just_heard_of_at_once() {
        let mut looks = Looks::new();
        let mut next = |uids: &[&str]| looks.next(uids.iter().map(|uid| (*uid).to_owned()).collect()).as_millis();
        let waited: Vec<u128> = std::iter::repeat_with(|| next(&["0a-1"])).take(7).collect();
        assert_eq!(waited, [5, 10, 20, 40, 80, 100, 100]);
        assert_eq!([next(&["0a-1", "0b-2"]), next(&["0a-1", "0b-2"])], [5, 10]);
        // One that came leaves the other's pace as it is.
        assert_eq!([next(&["0a-1"]), next(&["0a-1"])], [20, 40]);
        assert_eq!(next(&[]), LOOK_EVERY.as_millis());
        assert_eq!(next(&["0a-1"]), 5);
    }

    #[test]
    fn what_begins_before_the_sidecar_does_not_say_that_there_is_none() {
        let first_begun = |pod: &mut Value| {
            let sidecar = pod["spec"]["initContainers"][0].take();
            pod["spec"]["initContainers"] = json!([{ "name": "first" }, sidecar]);
            pod["status"] = json!({ "initContainerStatuses": [running("first")] });
        };
        assert_eq!(why("enabled", Got::Unheard, first_begun), Some(Why::NotYet));
        let sidecar_begun = |pod: &mut Value| {
            let sidecar = pod["spec"]["initContainers"][0].take();
            pod["spec"]["initContainers"] = json!([{ "name": "first" }]);
            pod["spec"]["containers"].as_array_mut().unwrap().insert(0, sidecar);
            pod["status"] = json!({ "initContainerStatuses": [running("first")], "containerStatuses": [running("outrigger")] });
        };
        assert_eq!(why("enabled", Got::Unheard, sidecar_begun), Some(Why::NotYet), "it has begun and is about to ask");
    }

    #[test]
    fn a_container_of_the_sidecars_name_that_was_never_heard_is_none_once_another_one_has_begun() {
        assert_eq!(why("enabled", Got::Unheard, begun), Some(Why::VolumeAlone));
        assert_eq!(why("disabled", Got::Unheard, begun), Some(Why::VolumeAlone));
        assert_eq!(why("enabled", Got::Captured, begun), None);
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
            let got = |owner: &Owner| if enrolled.contains(&owner.uid.as_str()) { Got::Captured } else { Got::Unheard };
            wanted(&pods, &Namespaces::new(), &[], got).remove("0a-1").map(|(why, _owner)| why)
        };
        assert_eq!(why(&["0b-2"]), Some(Why::NotYet));
        assert_eq!(why(&["0a-1"]), None);
    }
}
