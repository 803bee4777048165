//! What the API server says of a pod, as far as the agent asks, and which of its containers is the sidecar. Pure.
//!
//! The kubelet's word (whose volume it is) and the kernel's (in which container of which pod a process runs) say nothing of
//! a container's name. Two things do. The pod's own description, which the API server has before the kubelet starts anything
//! and which nobody changes afterwards, says which containers mount the volume: where that is the sidecar's alone, who
//! reached the socket is the sidecar. And the pod's status says which container has which id, some time after its start.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, Volume, VolumeMount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::volume::Owner;
use crate::injection;
use crate::model::capture::CaptureConfig;
use crate::model::marks::{self, CONTAINER as SIDECAR, DRIVER, Mode};
use crate::model::pod_record::{HOLD, PodRecord};

/// A pod of this node by the API server's word.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Described {
    pub(crate) owner: Owner,
    pub(crate) labels: BTreeMap<String, String>,
    /// Those that are of the mesh.
    annotations: BTreeMap<String, String>,
    /// Its addresses; none before its status says some.
    addresses: Vec<IpAddr>,
    /// It is in its node's network.
    pub(crate) host_network: bool,
    /// It is to end.
    pub(crate) terminating: bool,
    /// None of its containers runs any more, or ever will.
    pub(crate) ended: bool,
    /// Containers run in it before its sidecar does, which has not begun: it is of the classic form, and there are init
    /// containers.
    pub(crate) begins_without: bool,
    /// A container has begun that comes behind the sidecar.
    pub(crate) others_begun: bool,
    /// It has a volume of this driver, whoever mounts it: it asks for a sidecar.
    pub(crate) has_volume: bool,
    /// The containers that mount a volume of this driver.
    mounted_by: BTreeSet<String>,
    /// Those of them that were added to a pod that runs, and are never started anew.
    debugging: BTreeSet<String>,
    /// The containers of its application, with whose end it ends.
    apps: BTreeSet<String>,
    /// Names of containers by their ids, of those that have one yet.
    containers: BTreeMap<String, String>,
}

/// Why a container is not taken for the sidecar. The pod's author is at fault, or the caller.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum NotSidecar {
    #[error("no container {SIDECAR} of the pod mounts a volume of {DRIVER}")]
    None,
    #[error("the caller is the container {0}, not {SIDECAR}")]
    Another(String),
    #[error("containers other than {SIDECAR} mount the volume too ({0}), and the pod's status does not say yet which one calls")]
    Shared(String),
}

impl Described {
    /// `None`: an object without what every pod has.
    pub(crate) fn of(pod: &Pod) -> Option<Self> {
        let (metadata, spec) = (&pod.metadata, pod.spec.as_ref()?);
        let owner = Owner {
            namespace: metadata.namespace.clone()?,
            name: metadata.name.clone()?,
            uid: metadata.uid.clone()?,
            service_account: spec.service_account_name.clone().unwrap_or_else(|| "default".to_owned()),
        };
        let is_ours = |volume: &&Volume| volume.csi.as_ref().is_some_and(|csi| csi.driver == DRIVER);
        let ours: BTreeSet<&str> = spec.volumes.iter().flatten().filter(is_ours).map(|volume| volume.name.as_str()).collect();
        let mounts = |mounts: &Option<Vec<VolumeMount>>| mounts.iter().flatten().any(|mount| ours.contains(mount.name.as_str()));
        let lasting = spec.init_containers.iter().flatten().chain(&spec.containers);
        let lasting = lasting.filter(|one| mounts(&one.volume_mounts)).map(|one| one.name.clone());
        let debugging = spec.ephemeral_containers.iter().flatten();
        let debugging: BTreeSet<String> =
            debugging.filter(|one| mounts(&one.volume_mounts)).map(|one| one.name.clone()).collect();
        let is_classic = marks::container(spec).is_some_and(|(mode, _)| mode == Mode::Classic);
        let has_first = spec.init_containers.iter().flatten().next().is_some();
        let status = pod.status.clone().unwrap_or_default();
        let mut begun = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
        let inits = spec.init_containers.iter().flatten().map(|one| one.name.as_str());
        let before: BTreeSet<&str> = inits.take_while(|name| *name != SIDECAR).collect();
        let others_begun =
            begun.any(|one| one.container_id.is_some() && one.name != SIDECAR && !before.contains(one.name.as_str()));
        let addresses = status.pod_ips.iter().flatten().filter_map(|address| address.ip.parse().ok()).collect();
        let all = [status.init_container_statuses, status.container_statuses, status.ephemeral_container_statuses];
        let containers = all.into_iter().flatten().flatten().filter_map(|one| Some((bare(&one.container_id?), one.name)));
        let containers: BTreeMap<String, String> = containers.collect();
        let has_begun = containers.values().any(|name| name == SIDECAR);
        Some(Self {
            owner,
            labels: metadata.labels.clone().unwrap_or_default(),
            annotations: metadata.annotations.iter().flatten().filter(is_told).map(owned).collect(),
            addresses,
            host_network: spec.host_network == Some(true),
            terminating: metadata.deletion_timestamp.is_some(),
            ended: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            begins_without: is_classic && has_first && !has_begun,
            others_begun,
            has_volume: !ours.is_empty(),
            mounted_by: lasting.chain(debugging.iter().cloned()).collect(),
            debugging,
            apps: spec.containers.iter().map(|one| one.name.clone()).filter(|name| name != SIDECAR).collect(),
            containers,
        })
    }

    /// What it says of itself, as far as somebody here asks.
    pub(crate) fn metadata(&self) -> ObjectMeta {
        let (labels, annotations) = (Some(self.labels.clone()), Some(self.annotations.clone()));
        ObjectMeta { labels, annotations, ..ObjectMeta::default() }
    }

    /// The annotations that say what is asked of the pod's capture.
    pub(crate) fn capture(&self) -> BTreeMap<String, String> {
        CaptureConfig::ours(&self.annotations)
    }

    /// How long connections wait for a sidecar that is not there. One that says nothing was refused by the injection.
    pub(crate) fn hold(&self) -> Duration {
        CaptureConfig::hold(&self.annotations).ok().flatten().unwrap_or(HOLD)
    }

    /// Those of `shown`, of a namespace that passes for the pod's, which are its own; all of them for as long as nothing is
    /// said of its addresses but those of its `former` network.
    pub(crate) fn own(&self, shown: &[IpAddr], former: &[IpAddr]) -> Vec<IpAddr> {
        let is_told = self.addresses.as_slice() != former && !self.addresses.is_empty();
        let is_own = |address: &&IpAddr| !is_told || self.addresses.contains(*address);
        shown.iter().filter(is_own).copied().collect()
    }

    /// What is said of its addresses, where that is of the network that it had when `record` was written: its sandbox was made
    /// anew, in the namespace `cookie`, and the kubelet tells of that once its containers have begun. The sidecar of before has ended.
    pub(crate) fn former_addresses(&self, record: &PodRecord, cookie: u64) -> &[IpAddr] {
        let is_of_former =
            self.addresses == record.former_addresses || self.addresses.iter().any(|address| record.addresses.contains(address));
        if record.netns_cookie != cookie && is_of_former { &self.addresses } else { &[] }
    }

    /// Has it a sidecar at all?
    pub(crate) fn has_sidecar(&self) -> bool {
        self.mounted_by.contains(SIDECAR)
    }

    /// Does its status say that the container with this id is the sidecar?
    pub(crate) fn names_sidecar(&self, id: &str) -> bool {
        self.containers.get(id).is_some_and(|name| name == SIDECAR)
    }

    /// Is the container with this id one of its application's?
    pub(crate) fn is_of_app(&self, id: &str) -> bool {
        self.containers.get(id).is_some_and(|name| self.apps.contains(name))
    }

    /// Is the container with this id its sidecar?
    pub(crate) fn check_sidecar(&self, id: &str) -> Result<(), NotSidecar> {
        if !self.has_sidecar() {
            return Err(NotSidecar::None);
        }
        match self.containers.get(id) {
            Some(name) if name == SIDECAR => Ok(()),
            Some(name) => Err(NotSidecar::Another(name.clone())),
            None => {
                // Whose one id is known is not the one that calls with another.
                let is_told = |name: &str| self.debugging.contains(name) && self.containers.values().any(|known| known == name);
                let others = self.mounted_by.iter().map(String::as_str).filter(|name| *name != SIDECAR && !is_told(name));
                match others.collect::<Vec<_>>().as_slice() {
                    [] => Ok(()),
                    others => Err(NotSidecar::Shared(others.join(", "))),
                }
            }
        }
    }
}

fn is_told((name, _text): &(&String, &String)) -> bool {
    name.starts_with(marks::OURS) || name.as_str() == injection::MIRROR
}

fn owned((name, text): (&String, &String)) -> (String, String) {
    (name.clone(), text.clone())
}

/// A container's id without the name of the runtime in front (`containerd://…`).
fn bare(id: &str) -> String {
    id.rsplit_once("://").map_or(id, |(_runtime, id)| id).to_owned()
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::node::pods::tests::record;

    /// A pod with a native sidecar and an app, as the webhook makes it.
    pub(in super::super) fn pod(change: impl FnOnce(&mut Value)) -> Described {
        let mut pod = json!({
            "metadata": { "namespace": "shop", "name": "web-1", "uid": "0a-1", "labels": { "app": "web" },
                          "annotations": { "outrigger.dev/exclude-inbound-ports": "9100", "example.com/note": "mine" } },
            "spec": {
                "serviceAccountName": "web",
                "initContainers": [
                    { "name": "outrigger", "restartPolicy": "Always", "volumeMounts": [{ "name": "outrigger", "mountPath": "/run/outrigger" }] },
                ],
                "containers": [{ "name": "app", "volumeMounts": [{ "name": "data", "mountPath": "/data" }] }],
                "volumes": [
                    { "name": "outrigger", "csi": { "driver": "csi.outrigger.dev", "readOnly": true } },
                    { "name": "data", "emptyDir": {} },
                ],
            },
        });
        change(&mut pod);
        Described::of(&serde_json::from_value(pod).unwrap()).unwrap()
    }

    fn status(pod: &mut Value) {
        pod["status"] = json!({
            "initContainerStatuses": [
                { "name": "outrigger", "containerID": "containerd://aa11", "image": "", "imageID": "", "ready": true, "restartCount": 0 },
            ],
            "containerStatuses": [
                { "name": "app", "containerID": "containerd://bb22", "image": "", "imageID": "", "ready": true, "restartCount": 0 },
            ],
        });
    }

    #[test]
    fn who_alone_mounts_the_volume_is_the_sidecar_before_the_status_says_so() {
        let starting = pod(|_same| {});
        assert_eq!(starting.check_sidecar("aa11"), Ok(()));
        assert_eq!((starting.capture().len(), starting.hold()), (1, HOLD));
        let at_once = pod(|same| same["metadata"]["annotations"][marks::HOLD] = json!("0"));
        assert_eq!(at_once.hold(), Duration::ZERO);
        assert!(starting.has_sidecar() && !starting.host_network && !starting.terminating && !starting.ended);
    }

    #[test]
    fn an_address_is_the_pods_own_if_the_api_server_says_so_or_nothing_yet() {
        let [own, second, foreign]: [IpAddr; 3] = ["10.244.0.7", "fd00::7", "10.244.0.9"].map(|text| text.parse().unwrap());
        let told =
            pod(|pod| pod["status"] = json!({ "podIP": "10.244.0.7", "podIPs": [{ "ip": "10.244.0.7" }, { "ip": "fd00::7" }] }));
        assert_eq!(told.own(&[foreign, own, second], &[]), [own, second]);
        assert_eq!(told.own(&[foreign], &[]), Vec::<IpAddr>::new());
        assert_eq!(pod(|_same| {}).own(&[foreign], &[]), [foreign]);
    }

    #[test]
    fn what_is_said_of_a_network_that_the_pod_has_no_more_says_nothing_of_the_one_that_it_has() {
        let [old, new]: [IpAddr; 2] = ["10.244.0.7", "10.244.0.9"].map(|text| text.parse().unwrap());
        let told = |ip: &str| pod(|pod| pod["status"] = json!({ "podIPs": [{ "ip": ip }] }));
        let before = PodRecord { addresses: vec![old], ..record("web-1", 7) };
        let former = |ip: &str, before: &PodRecord, cookie: u64| told(ip).former_addresses(before, cookie).to_vec();
        assert_eq!(former("10.244.0.7", &before, 8), [old]);
        assert_eq!(told("10.244.0.7").own(&[new], &[old]), [new]);
        // The same network; one that is told already; one of which nobody enrolled anything.
        assert!(former("10.244.0.7", &before, 7).is_empty());
        assert!(former("10.244.0.9", &before, 8).is_empty());
        assert!(told("10.244.0.9").own(&[old], &[old]).is_empty());
        // Anew once more, before the kubelet had told of the second.
        let second = PodRecord { addresses: vec![new], former_addresses: vec![old], ..record("web-1", 8) };
        assert_eq!(former("10.244.0.7", &second, 9), [old]);
    }

    #[test]
    fn a_container_of_another_name_is_never_the_sidecar() {
        let running = pod(status);
        assert_eq!(running.check_sidecar("aa11"), Ok(()));
        assert_eq!(running.check_sidecar("bb22"), Err(NotSidecar::Another("app".into())));
        assert_eq!(["aa11", "bb22", "cc33"].map(|id| running.names_sidecar(id)), [true, false, false]);
        assert_eq!(
            running.check_sidecar("cc33"),
            Ok(()),
            "a sidecar that was started again has an id that the status does not know yet"
        );
    }

    #[test]
    fn a_volume_that_others_mount_proves_nothing_by_itself() {
        let share = |pod: &mut Value| {
            pod["spec"]["containers"][0]["volumeMounts"] = json!([{ "name": "outrigger", "mountPath": "/x" }]);
        };
        let shared = pod(share);
        assert_eq!(shared.check_sidecar("aa11"), Err(NotSidecar::Shared("app".into())));
        let known = pod(|pod| {
            share(pod);
            status(pod);
        });
        assert_eq!(known.check_sidecar("aa11"), Ok(()));
        assert_eq!(known.check_sidecar("bb22"), Err(NotSidecar::Another("app".into())));
        let debugged = pod(|pod| {
            let mounts = json!([{ "name": "outrigger", "mountPath": "/x" }]);
            pod["spec"]["ephemeralContainers"] = json!([{ "name": "debugger", "volumeMounts": mounts }]);
        });
        assert_eq!(debugged.check_sidecar("aa11"), Err(NotSidecar::Shared("debugger".into())));
    }

    #[test]
    fn a_debugging_container_that_runs_does_not_keep_a_sidecar_from_coming_back() {
        let debugged = pod(|pod| {
            status(pod);
            let mounts = json!([{ "name": "outrigger", "mountPath": "/x" }]);
            pod["spec"]["ephemeralContainers"] = json!([{ "name": "debugger", "volumeMounts": mounts }]);
            pod["status"]["ephemeralContainerStatuses"] = json!([
                { "name": "debugger", "containerID": "containerd://dd44", "image": "", "imageID": "", "ready": false, "restartCount": 0 },
            ]);
        });
        assert_eq!(debugged.check_sidecar("dd44"), Err(NotSidecar::Another("debugger".into())));
        assert_eq!(debugged.check_sidecar("cc33"), Ok(()), "the sidecar's next container");
    }

    #[test]
    fn a_container_of_our_name_without_our_volume_is_none() {
        let forged = pod(|pod| pod["spec"]["volumes"] = json!([{ "name": "outrigger", "emptyDir": {} }]));
        assert_eq!(forged.check_sidecar("aa11"), Err(NotSidecar::None));
        let renamed = pod(|pod| pod["spec"]["initContainers"][0]["name"] = json!("other"));
        assert_eq!(renamed.check_sidecar("aa11"), Err(NotSidecar::None));
    }

    #[test]
    fn an_end_is_seen() {
        assert!(pod(|pod| pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z")).terminating);
        assert!(pod(|pod| pod["status"] = json!({ "phase": "Succeeded" })).ended);
        assert!(pod(|pod| pod["spec"]["hostNetwork"] = json!(true)).host_network);
    }
}
