//! `Workload`: one running thing with addresses. Local pods become Workloads by themselves; a document stands for an
//! address that `outrigger run` did not make.

use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Kind;
use super::capture::CaptureConfig;
use super::object::{Object, Spec};
use super::pod_record::{PodPort, PodRecord};
use super::service::PortRef;

/// The service account of a workload that names none.
pub(crate) const DEFAULT_SERVICE_ACCOUNT: &str = "default";

/// The body of a Workload. Its labels stand in `metadata`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct WorkloadSpec {
    /// Where it is reached; the first of a family is the one that is dialled.
    pub(crate) addresses: Vec<IpAddr>,
    /// The account of which its identity is made. Default: `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) service_account: Option<String>,
    /// Ports that a Service may name in `targetPort`; of a workload with a sidecar none of the sidecar's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) ports: Vec<WorkloadPort>,
    /// How it is reached. Default: `MutualTls`.
    #[serde(default, skip_serializing_if = "WorkloadTransport::is_mutual_tls")]
    pub(crate) transport: WorkloadTransport,
    /// It is about to end: it still serves, but nothing new is begun with it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) terminating: bool,
    /// Its program has ended for good, and its sidecar is to end too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) finished: bool,
    /// Its program does not serve yet, or not now: a Service leads there only if it says `publishNotReadyAddresses`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) unready: bool,
    /// Its machine is not heard of any more, and it was ready when it was last: a Service leads there if it would lead nowhere else.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) unheard: bool,
    /// The machine on which it runs. One that has a machine may have no address yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) node: Option<String>,
}

/// One port of a Workload.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct WorkloadPort {
    /// Its name; up to the first dash it may say what the port speaks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    pub(crate) port: u16,
    /// What the port speaks, as in a Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) app_protocol: Option<String>,
}

/// How a workload is reached.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub(crate) enum WorkloadTransport {
    /// It has a sidecar, which must prove the workload's identity.
    #[default]
    MutualTls,
    /// It has none: it is dialled in plaintext.
    Plaintext,
    /// It has one that nothing captures for, and that its program asks as its proxy: it is dialled in plaintext.
    Unprotected,
}

impl Spec for WorkloadSpec {
    const KIND: Kind = Kind::Workload;
}

impl Object<WorkloadSpec> {
    /// The Workload that a local pod is.
    pub(crate) fn of_pod(pod: &PodRecord) -> Self {
        let spec = WorkloadSpec {
            addresses: pod.addresses.clone(),
            service_account: Some(pod.service_account.clone()),
            ports: pod.ports.iter().map(WorkloadPort::from).collect(),
            transport: match (pod.meshed, pod.unprotected) {
                (false, _) => WorkloadTransport::Plaintext,
                (true, false) => WorkloadTransport::MutualTls,
                // What arrives meets its program, not its sidecar.
                (true, true) => WorkloadTransport::Unprotected,
            },
            terminating: pod.terminating,
            finished: false,
            unready: false,
            unheard: false,
            node: None,
        };
        let mut workload = Self::new(&pod.named(), pod.labels.clone(), spec);
        workload.metadata.annotations = CaptureConfig::ours(&pod.annotations);
        workload
    }

    /// What the pod's owner asks of its capture. A document of people's may say what says nothing: then nothing is asked.
    pub(crate) fn capture(&self) -> CaptureConfig {
        CaptureConfig::of(&self.metadata.annotations).unwrap_or_default()
    }
}

impl From<&PodPort> for WorkloadPort {
    fn from(port: &PodPort) -> Self {
        Self { name: Some(port.name.clone()), port: port.port, app_protocol: port.app_protocol.clone() }
    }
}

impl WorkloadSpec {
    /// The account of which the workload's identity is made.
    pub(crate) fn account(&self) -> &str {
        self.service_account.as_deref().unwrap_or(DEFAULT_SERVICE_ACCOUNT)
    }

    /// The number of a port that a Service refers to.
    pub(crate) fn port(&self, port: &PortRef) -> Option<u16> {
        match port {
            PortRef::Number(number) => Some(*number),
            PortRef::Name(name) => self.port_named(name),
        }
    }

    /// The number of the port `name`.
    pub(crate) fn port_named(&self, name: &str) -> Option<u16> {
        self.ports.iter().find(|port| port.name.as_deref() == Some(name)).map(|port| port.port)
    }
}

impl WorkloadTransport {
    /// Is there a sidecar, which has an identity and a configuration of its own?
    pub(crate) const fn has_sidecar(self) -> bool {
        match self {
            Self::MutualTls | Self::Unprotected => true,
            Self::Plaintext => false,
        }
    }

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde calls")]
    fn is_mutual_tls(&self) -> bool {
        *self == Self::MutualTls
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workload_of_a_pod_says_what_its_owner_asks_of_capture_and_none_of_his_other_notes() {
        let record = r#"{"namespace":"shop","name":"web-1","serviceAccount":"web","addresses":["10.64.0.5"],
            "annotations":{"outrigger.dev/exclude-inbound-ports":"9100","example.com/note":"mine"},
            "netns":"/run/netns/a","netnsCookie":1,"cgroup":"/sys/fs/cgroup/a","meshed":true,"supervisor":1,"startedMs":1}"#;
        let workload = Object::of_pod(&PodRecord::parse(record.as_bytes()).unwrap());
        assert_eq!(workload.metadata.annotations.len(), 1);
        assert_eq!(workload.capture().lets_in(9100), Some("outrigger.dev/exclude-inbound-ports"));
        assert_eq!(workload.capture().lets_in(80), None);
        assert_eq!(workload.spec.transport, WorkloadTransport::MutualTls);
        let unprotected = record.replace("\"meshed\":true", "\"meshed\":true,\"unprotected\":true");
        let transport = Object::of_pod(&PodRecord::parse(unprotected.as_bytes()).unwrap()).spec.transport;
        assert!(transport == WorkloadTransport::Unprotected && transport.has_sidecar());
    }
}
