//! What the kubelet asks for with a volume, read and judged: whose it is and where it is to be. Pure.
//!
//! Sources: the CSI specification (`NodePublishVolume`) and the kubelet's additions to the volume's context where a driver asks
//! for the pod's information on mount. Invariant: a place that is taken lies in the folder of the very pod that the kubelet
//! names, and nothing of what names it leads out of there.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::names::{Named, check_host, check_name, check_part};
use crate::model::pod_record::PodRecord;

/// The pod behind a volume, by the kubelet's word.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Owner {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) service_account: String,
}

/// Where a volume is, below the kubelet's folder of pods.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Place {
    pub(crate) uid: String,
    /// The pod's name for the volume.
    pub(crate) volume: String,
}

/// Why a volume is not made or removed. The pod's author is at fault, or whoever calls.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Wrong {
    #[error("the volume has no id that could name a file: {0:?}")]
    Id(String),
    #[error("the kubelet says nothing of the pod: {0} is missing; the driver's object needs podInfoOnMount: true")]
    NoPod(&'static str),
    #[error("what the kubelet says of the pod cannot be used: {0}")]
    Pod(String),
    #[error("this driver has ephemeral inline volumes only")]
    Lifecycle,
    #[error("the volume can be written to; write readOnly: true")]
    Writable,
    #[error("{target} is no volume of this driver in {pods}")]
    Elsewhere { target: String, pods: String },
    #[error("the volume is to be in the folder of the pod {place}, and the kubelet names the pod {owner}")]
    AnotherPod { place: String, owner: String },
    #[error("the volume {0} is there already, of another pod or at another place")]
    Taken(String),
}

impl Owner {
    /// Reads the context of a volume.
    pub(crate) fn of(context: &HashMap<String, String>) -> Result<Self, Wrong> {
        if context.get(EPHEMERAL).map(String::as_str) != Some("true") {
            return Err(Wrong::Lifecycle);
        }
        let said = |key: &'static str| context.get(key).filter(|said| !said.is_empty()).cloned().ok_or(Wrong::NoPod(key));
        let owner = Self {
            namespace: said(POD_NAMESPACE)?,
            name: said(POD_NAME)?,
            uid: said(POD_UID)?,
            service_account: said(SERVICE_ACCOUNT)?,
        };
        let checked =
            check_part(&owner.namespace).and_then(|()| check_host(&owner.name)).and_then(|()| check_name(&owner.service_account));
        checked.map_err(|error| Wrong::Pod(error.to_string()))?;
        if !is_plain(&owner.uid) {
            return Err(Wrong::Pod(format!("{:?} is no UID", owner.uid)));
        }
        Ok(owner)
    }

    /// The pod of a record. `None`: it is not of Kubernetes.
    pub(crate) fn of_record(record: &PodRecord) -> Option<Self> {
        Some(Self {
            namespace: record.namespace.clone(),
            name: record.name.clone(),
            uid: record.uid.clone()?,
            service_account: record.service_account.clone(),
        })
    }

    /// The pod's name.
    pub(crate) fn named(&self) -> Named {
        Named::new(self.namespace.as_str(), self.name.as_str())
    }
}

impl Place {
    /// Reads the path that the kubelet gives a volume of a driver: `PODS/UID/volumes/kubernetes.io~csi/NAME/mount`.
    pub(crate) fn of(target: &str, pods: &Path) -> Result<Self, Wrong> {
        let elsewhere = || Wrong::Elsewhere { target: target.to_owned(), pods: pods.display().to_string() };
        // Not cleaned up by anybody: a path with `..`, `.` or `//` in it is another one than those the kubelet writes.
        let below = target.strip_prefix(pods.to_str().unwrap_or_default()).and_then(|rest| rest.strip_prefix('/'));
        let parts: Vec<&str> = below.ok_or_else(elsewhere)?.split('/').collect();
        match parts.as_slice() {
            [uid, VOLUMES, PLUGIN, volume, MOUNT] if is_plain(uid) && is_plain(volume) => {
                Ok(Self { uid: (*uid).to_owned(), volume: (*volume).to_owned() })
            }
            _others => Err(elsewhere()),
        }
    }

    /// The folder that holds the volume's own, below the kubelet's folder of pods.
    pub(crate) fn parent(&self) -> PathBuf {
        [&self.uid, VOLUMES, PLUGIN, &self.volume].iter().collect()
    }
}

/// May it stand for a file's name as it is? So do UIDs, names of volumes and the kubelet's ids of ephemeral volumes.
pub(crate) fn is_plain(name: &str) -> bool {
    let is_one = Path::new(name).components().eq([Component::Normal(name.as_ref())]);
    is_one && name.len() <= 128 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// The volume's own folder, in [`Place::parent`].
pub(crate) const MOUNT: &str = "mount";
const VOLUMES: &str = "volumes";
/// How the kubelet writes the plugin `kubernetes.io/csi` in a path.
const PLUGIN: &str = "kubernetes.io~csi";

const POD_NAME: &str = "csi.storage.k8s.io/pod.name";
const POD_NAMESPACE: &str = "csi.storage.k8s.io/pod.namespace";
const POD_UID: &str = "csi.storage.k8s.io/pod.uid";
const SERVICE_ACCOUNT: &str = "csi.storage.k8s.io/serviceAccount.name";
const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn context(uid: &str) -> HashMap<String, String> {
        let said = [(POD_NAME, "web-1"), (POD_NAMESPACE, "shop"), (POD_UID, uid), (SERVICE_ACCOUNT, "web"), (EPHEMERAL, "true")];
        said.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn the_kubelet_says_whose_volume_it_is() {
        let owner = Owner::of(&context("0a-1")).unwrap();
        assert_eq!((owner.named(), owner.service_account.as_str()), (Named::new("shop", "web-1"), "web"));
    }

    #[test]
    fn what_the_kubelet_does_not_say_is_asked_for_by_name() {
        for key in [POD_NAME, POD_NAMESPACE, POD_UID, SERVICE_ACCOUNT] {
            let mut context = context("0a-1");
            context.remove(key);
            assert_eq!(Owner::of(&context), Err(Wrong::NoPod(key)));
            context.insert(key.to_owned(), String::new());
            assert_eq!(Owner::of(&context), Err(Wrong::NoPod(key)));
            context.insert(key.to_owned(), "../../etc".to_owned());
            assert!(matches!(Owner::of(&context), Err(Wrong::Pod(_))), "{key}");
        }
        let mut lasting = context("0a-1");
        lasting.insert(EPHEMERAL.to_owned(), "false".to_owned());
        assert_eq!(Owner::of(&lasting), Err(Wrong::Lifecycle));
        assert_eq!(Owner::of(&HashMap::new()), Err(Wrong::Lifecycle));
    }

    #[test]
    fn a_place_is_a_volume_of_a_pod_and_nowhere_else() {
        let pods = Path::new("/var/lib/kubelet/pods");
        let good = Place::of("/var/lib/kubelet/pods/0a-1/volumes/kubernetes.io~csi/outrigger/mount", pods).unwrap();
        assert_eq!(good, Place { uid: "0a-1".into(), volume: "outrigger".into() });
        assert_eq!(good.parent(), Path::new("0a-1/volumes/kubernetes.io~csi/outrigger"));
        for bad in [
            "",
            "/",
            "/etc",
            "/var/lib/kubelet/pods",
            "/var/lib/kubelet/pods/0a-1",
            "/var/lib/kubelet/pods/0a-1/volumes/kubernetes.io~csi/outrigger",
            "/var/lib/kubelet/pods/0a-1/volumes/kubernetes.io~csi/outrigger/mount/",
            "/var/lib/kubelet/pods/0a-1/volumes/kubernetes.io~csi/outrigger/mount/more",
            "/var/lib/kubelet/pods/0a-1/volumes/kubernetes.io~empty-dir/outrigger/mount",
            "/var/lib/kubelet/pods/../volumes/kubernetes.io~csi/outrigger/mount",
            "/var/lib/kubelet/pods/0a-1/volumes/kubernetes.io~csi/../mount",
            "/var/lib/kubelet/pods//volumes/kubernetes.io~csi/outrigger/mount",
            "/var/lib/kubelet/podsx/0a-1/volumes/kubernetes.io~csi/outrigger/mount",
            "var/lib/kubelet/pods/0a-1/volumes/kubernetes.io~csi/outrigger/mount",
        ] {
            assert!(matches!(Place::of(bad, pods), Err(Wrong::Elsewhere { .. })), "{bad}");
        }
    }
}
