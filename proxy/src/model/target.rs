//! What a policy applies to (Gateway API GEP-713, LocalPolicyTargetReference): an object in the policy's own namespace.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::de::{Error as _, Unexpected};
use serde::{Deserialize, Deserializer, Serialize};

use super::object::Object;
use super::service::{PortRef, ServiceSpec};
use super::workload::WorkloadSpec;

/// One target of a policy.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct TargetRef {
    /// The API group: empty for a Service, `outrigger.dev` for a Workload.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) group: String,
    /// `Service`: the ports that it leads to, on every workload that it selects. `Workload`: all of its ports.
    pub(crate) kind: TargetKind,
    /// Its name, in the policy's namespace.
    pub(crate) name: String,
}

/// Reads the targets of a security policy. An empty list is refused: it would be read as none at all, which is the whole
/// namespace, where nothing may have been meant.
pub(super) fn some_targets<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<TargetRef>, D::Error> {
    let targets = Vec::deserialize(deserializer)?;
    if targets.is_empty() {
        return Err(D::Error::invalid_value(Unexpected::Other("an empty list"), &"one target or more, or no targetRefs at all"));
    }
    Ok(targets)
}

/// What can be a target.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize)]
pub(crate) enum TargetKind {
    Service,
    Workload,
}

/// What a Service led to in one of its forms: these ports of the workloads with these labels.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Former {
    /// The Service's name, in the policy's namespace.
    pub(crate) service: String,
    /// Labels that a workload of the namespace must have. Empty: every workload of it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) selector: BTreeMap<String, String>,
    /// Ports of the workload, by number or name.
    pub(crate) ports: BTreeSet<PortRef>,
    /// All of its ports: which ones they were is more than can be remembered, or not known any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) every_port: bool,
}

impl Former {
    /// What the Service leads to; none where that is nothing.
    pub(crate) fn of(service: &Object<ServiceSpec>) -> Option<Self> {
        let ports: BTreeSet<PortRef> = service.spec.ports.iter().filter(|port| port.is_tcp()).map(|port| port.target()).collect();
        let leads_somewhere = !service.spec.selector.is_empty() && !ports.is_empty();
        let former =
            Self { service: service.metadata.name.clone(), selector: service.spec.selector.clone(), ports, every_port: false };
        leads_somewhere.then_some(former)
    }

    /// Every port of every workload of the namespace: where a Service of which nothing more is known may have led.
    pub(crate) fn anywhere(service: &str) -> Self {
        Self { service: service.to_owned(), selector: BTreeMap::new(), ports: BTreeSet::new(), every_port: true }
    }

    /// Is it what the Service led to, and not all that it may have led to?
    pub(crate) fn is_remembered(&self) -> bool {
        !self.every_port && !self.selector.is_empty()
    }

    /// Does it lead to every workload to which the other leads?
    pub(crate) fn is_as_wide_as(&self, other: &Self) -> bool {
        self.selector.iter().all(|(key, value)| other.selector.get(key) == Some(value))
    }

    /// Does it select a workload of the same namespace?
    pub(crate) fn selects(&self, workload: &Object<WorkloadSpec>) -> bool {
        self.selector.iter().all(|(key, value)| workload.metadata.labels.get(key) == Some(value))
    }

    /// The ports of a workload of the same namespace to which it leads, as far as they are known one by one.
    pub(crate) fn ports_of(&self, workload: &Object<WorkloadSpec>) -> BTreeSet<u16> {
        let ports = self.ports.iter().filter(|_| self.selects(workload));
        ports.filter_map(|port| workload.spec.port(port)).collect()
    }
}

impl TargetRef {
    /// Does it name this object of its kind?
    pub(crate) fn is(&self, kind: TargetKind, name: &str) -> bool {
        self.kind == kind && self.name == name
    }
}
