//! What security policies go on covering: ports of workloads to which their Services led once and lead no longer.
//!
//! The control plane remembers it and sends it with the policy (`status.kept`); here is what it comes to, for the sidecar
//! that it is for and for people. Invariant: what is kept only ever restricts.

use std::collections::{BTreeMap, BTreeSet};

use super::service;
use crate::base::names::Named;
use crate::model::object::Object;
use crate::model::target::{Former, TargetKind};
use crate::model::workload::WorkloadSpec;
use crate::model::{Resource, Resources};

/// Ports of a workload.
#[derive(Clone, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Ports {
    /// All there are.
    every: bool,
    numbers: BTreeSet<u16>,
}

impl Ports {
    /// Is this port one of them? None: any that nothing names.
    pub(super) fn contain(&self, port: Option<u16>) -> bool {
        self.every || port.is_some_and(|port| self.numbers.contains(&port))
    }

    /// Those that are known one by one.
    pub(super) fn numbers(&self) -> impl Iterator<Item = u16> {
        self.numbers.iter().copied()
    }

    fn is_empty(&self) -> bool {
        !self.every && self.numbers.is_empty()
    }

    fn text(&self) -> String {
        let numbers: Vec<String> = self.numbers.iter().map(u16::to_string).collect();
        match numbers.as_slice() {
            _all if self.every => "every port".to_owned(),
            [one] => format!("port {one}"),
            several => format!("ports {}", several.join(", ")),
        }
    }
}

/// The ports of a workload that a policy goes on covering.
pub(super) fn ports(policy: &Resource, workload: &Object<WorkloadSpec>) -> Ports {
    if policy.metadata().namespace != workload.metadata.namespace {
        return Ports::default();
    }
    let forms = policy.kept().iter();
    Ports {
        every: forms.clone().any(|form| form.every_port && form.selects(workload)),
        numbers: forms.flat_map(|form| form.ports_of(workload)).collect(),
    }
}

/// Ports of workloads that a policy covers beyond where its Services lead.
#[derive(Debug)]
pub(crate) struct Beyond {
    /// The Service that led there, or may have.
    pub(crate) service: Named,
    /// As `port 8080 of shop/web-1`.
    pub(crate) covered: String,
    /// Is it known that the Service led there?
    pub(crate) is_known: bool,
}

impl Beyond {
    /// What the Service did, as far as it is known.
    pub(crate) fn led(&self) -> &'static str {
        if self.is_known { "led" } else { "may have led" }
    }
}

/// Of these forms, what they come to with the workloads that are there, and what the policy does not cover by its Services.
pub(crate) fn beyond(resources: &Resources, policy: &Resource, forms: &[Former]) -> Vec<Beyond> {
    let (known, wide): (Vec<&Former>, Vec<&Former>) = forms.iter().partition(|form| form.is_remembered());
    let each = [(known, true), (wide, false)].into_iter().flat_map(|(forms, is_known)| {
        let found = ports_beyond(resources, policy, &forms);
        found.into_iter().map(move |(service, covered)| Beyond { service, covered: text(&covered), is_known })
    });
    each.collect()
}

fn ports_beyond(resources: &Resources, policy: &Resource, forms: &[&Former]) -> BTreeMap<Named, BTreeMap<Ports, Vec<Named>>> {
    let namespace = policy.metadata().namespace.as_str();
    let mut found: BTreeMap<Named, BTreeMap<Ports, Vec<Named>>> = BTreeMap::new();
    if forms.is_empty() {
        return found;
    }
    for workload in resources.workloads_in(namespace) {
        let is_target = |name: &str| policy.targets().iter().any(|target| target.is(TargetKind::Workload, name));
        if is_target(&workload.metadata.name) {
            continue;
        }
        let led_to: BTreeSet<u16> = policy
            .targets()
            .iter()
            .filter(|target| target.kind == TargetKind::Service)
            .filter_map(|target| resources.service(&Named::new(namespace, target.name.as_str())))
            .filter(|service| service.spec.selects(&workload.metadata.labels))
            .flat_map(|service| service.spec.ports.iter().filter(|port| port.is_tcp()))
            .filter_map(|port| service::target_port(port, &workload.spec))
            .collect();
        let mut by_service: BTreeMap<&str, Ports> = BTreeMap::new();
        for form in forms {
            let ports = by_service.entry(&form.service).or_default();
            ports.every |= form.every_port && form.selects(workload);
            ports.numbers.extend(form.ports_of(workload).into_iter().filter(|port| !led_to.contains(port)));
        }
        for (service, ports) in by_service.into_iter().filter(|(_, ports)| !ports.is_empty()) {
            found.entry(Named::new(namespace, service)).or_default().entry(ports).or_default().push(workload.named());
        }
    }
    found
}

fn text(covered: &BTreeMap<Ports, Vec<Named>>) -> String {
    let each = covered.iter().map(|(ports, workloads)| {
        let more = if workloads.len() > WORKLOADS_TOLD { ", …" } else { "" };
        let workloads: Vec<String> = workloads.iter().take(WORKLOADS_TOLD).map(Named::to_string).collect();
        format!("{} of {}{more}", ports.text(), workloads.join(", "))
    });
    each.collect::<Vec<_>>().join("; ")
}

/// How many workloads a text names.
const WORKLOADS_TOLD: usize = 8;
