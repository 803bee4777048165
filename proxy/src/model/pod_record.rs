//! A pod as it is recorded on its node: one JSON file per pod in `STATE/pods/`, `NAMESPACE.NAME.json`.
//!
//! `outrigger run` writes one for a local pod, and on Kubernetes the node agent for itself when a pod's sidecar first asks. The
//! agent enrols what it finds there; without Kubernetes the control plane makes an endpoint of it. A record is written at once
//! or not at all, so a reader never sees half of one; a field that a reader does not know is a newer writer's and is
//! left alone.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::capture::{CaptureConfig, CaptureError};
use crate::base::names::{NameError, Named, check_host, check_name, check_part};

/// One pod of this node.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodRecord {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) service_account: String,
    #[serde(default)]
    pub(crate) labels: BTreeMap<String, String>,
    /// Ours say what is asked of the pod's capture, see [`CaptureConfig`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) annotations: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) ports: Vec<PodPort>,
    /// IPv4 first, then IPv6 where the machine has it.
    pub(crate) addresses: Vec<IpAddr>,
    /// What the API server said of its addresses when it was enrolled, where that was of its former network.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) former_addresses: Vec<IpAddr>,
    /// The pod's UID, on Kubernetes: one that is made again under its name is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) uid: Option<String>,
    /// A file that stands for the network namespace. None on Kubernetes: the pod's own sockets show it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) netns: Option<PathBuf>,
    /// The kernel's number for that namespace (`SO_NETNS_COOKIE`).
    pub(crate) netns_cookie: u64,
    /// Holds the pod's cgroups: of a local pod `app` and `sidecar`.
    pub(crate) cgroup: PathBuf,
    /// The sidecar's cgroup, where it is another one than `sidecar`: on Kubernetes that of its container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sidecar: Option<PathBuf>,
    /// `false`: a pod outside the mesh, which has no sidecar and is not enrolled.
    pub(crate) meshed: bool,
    /// Nothing captures its connections, and its owner wants it all the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) unprotected: bool,
    /// Set when the pod is being stopped: it still serves, but nobody should begin anything new with it.
    #[serde(default)]
    pub(crate) terminating: bool,
    /// How long connections wait for a sidecar that is not there, in milliseconds.
    #[serde(default = "hold_by_default")]
    pub(crate) hold_ms: u64,
    /// The process that owns the pod.
    pub(crate) supervisor: u32,
    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub(crate) started_ms: u64,
}

/// A port that a pod names, for Services to refer to.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodPort {
    pub(crate) name: String,
    pub(crate) port: u16,
    /// As in a Service's `appProtocol`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) app_protocol: Option<String>,
}

/// Why a file is not a pod's record.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    /// Not JSON, or a field is missing.
    #[error("not a pod's record: {0}")]
    Format(#[from] serde_json::Error),
    /// The namespace, the name or the service account could not stand in an identity.
    #[error("not a pod's record: {0}")]
    Name(#[from] NameError),
    /// A pod without an address cannot be reached.
    #[error("not a pod's record: it names no address")]
    NoAddress,
    /// An annotation of ours that says nothing.
    #[error("not a pod's record: {0}")]
    Capture(#[from] CaptureError),
}

/// Where the network namespaces of local pods have names, and what those begin with: a record's file name follows.
pub(crate) const NAMESPACES: (&str, &str) = ("/run/netns", "outrigger-");
/// The cgroups of local pods, below the root.
pub(crate) const CGROUPS: &str = "outrigger/pods";
/// How long connections wait for a sidecar, where nobody says otherwise.
pub(crate) const HOLD: Duration = Duration::from_secs(10);

impl PodRecord {
    /// How long connections wait for a sidecar that is not there; zero: they are refused.
    pub(crate) const fn hold(&self) -> Duration {
        Duration::from_millis(self.hold_ms)
    }

    /// The cgroup whose tasks are the pod's sidecar.
    pub(crate) fn sidecar_cgroup(&self) -> PathBuf {
        self.sidecar.clone().unwrap_or_else(|| Self::local_sidecar_cgroup(&self.cgroup))
    }

    /// The same of a local pod, by what holds its cgroups.
    pub(crate) fn local_sidecar_cgroup(pod: &Path) -> PathBuf {
        pod.join("sidecar")
    }

    /// A cgroup above the pod's program, and above nobody else's.
    pub(crate) fn app_cgroup(&self) -> PathBuf {
        // On Kubernetes each of the pod's containers has one, in the pod's own.
        if self.sidecar.is_some() { self.cgroup.clone() } else { self.cgroup.join("app") }
    }

    /// Reads a record.
    ///
    /// # Errors
    /// It is not one.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, RecordError> {
        let record: Self = serde_json::from_slice(bytes)?;
        check_part(&record.namespace)?;
        check_host(&record.name)?;
        check_name(&record.service_account)?;
        // On Kubernetes those that were not the pod's own are taken from it.
        if record.addresses.is_empty() && record.uid.is_none() {
            return Err(RecordError::NoAddress);
        }
        record.capture()?;
        Ok(record)
    }

    /// What is asked of the pod's capture.
    ///
    /// # Errors
    /// An annotation of ours says nothing; of a record that was parsed, none does.
    pub(crate) fn capture(&self) -> Result<CaptureConfig, CaptureError> {
        CaptureConfig::of(&self.annotations)
    }

    /// The pod's name.
    pub(crate) fn named(&self) -> Named {
        Named::new(self.namespace.as_str(), self.name.as_str())
    }

    /// The name of the pod's service account.
    pub(crate) fn account(&self) -> Named {
        Named::new(self.namespace.as_str(), self.service_account.as_str())
    }

    /// The record's file name, also the name of the pod's cgroup and folders. A namespace holds no dot, so two pods
    /// never share one.
    pub(crate) fn file_stem(pod: &Named) -> String {
        format!("{}.{}", pod.namespace, pod.name)
    }
}

fn hold_by_default() -> u64 {
    u64::try_from(HOLD.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = r#"{"namespace":"shop","name":"web-1","serviceAccount":"web","labels":{"app":"web"},
        "ports":[{"name":"http","port":8080}],"addresses":["10.64.0.5","fd64::5"],"netns":"/run/netns/outrigger-shop.web-1",
        "netnsCookie":4097,"cgroup":"/sys/fs/cgroup/outrigger/pods/shop.web-1","meshed":true,"supervisor":12,
        "startedMs":1700000000000,"aFieldOfTomorrow":1}"#;

    #[test]
    fn a_record_survives_writing_and_reading() {
        let record = PodRecord::parse(WEB.as_bytes()).unwrap();
        assert_eq!(record.addresses.len(), 2);
        assert!(!record.terminating);
        assert_eq!(record.hold(), HOLD);
        assert_eq!(PodRecord::parse(&serde_json::to_vec(&record).unwrap()).unwrap(), record);
        assert_eq!(PodRecord::file_stem(&record.named()), "shop.web-1");
    }

    #[test]
    fn what_cannot_be_an_identity_is_no_record() {
        for (from, to) in
            [("\"shop\"", "\"shop/../x\""), ("\"web-1\"", "\"\""), ("\"serviceAccount\":\"web\"", "\"serviceAccount\":\"W\"")]
        {
            assert!(matches!(PodRecord::parse(WEB.replace(from, to).as_bytes()), Err(RecordError::Name(_))), "{to}");
        }
        assert!(matches!(PodRecord::parse(b"{"), Err(RecordError::Format(_))));
        let mistaken = WEB.replace(r#""labels""#, r#""annotations":{"outrigger.dev/exclude-ports":"80"},"labels""#);
        assert!(matches!(PodRecord::parse(mistaken.as_bytes()), Err(RecordError::Capture(_))));
        let nowhere = WEB.replace(r#"["10.64.0.5","fd64::5"]"#, "[]");
        assert!(matches!(PodRecord::parse(nowhere.as_bytes()), Err(RecordError::NoAddress)));
        assert!(PodRecord::parse(nowhere.replace(r#""ports""#, r#""uid":"0a-1","ports""#).as_bytes()).is_ok());
    }
}
