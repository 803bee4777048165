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

/// The ports of a workload that a policy goes on covering.
pub(super) fn ports(policy: &Resource, workload: &Object<WorkloadSpec>) -> BTreeSet<u16> {
    if policy.metadata().namespace != workload.metadata.namespace {
        return BTreeSet::new();
    }
    policy.kept().iter().flat_map(|form| form.ports_of(workload)).collect()
}

/// Of these forms, the ports of workloads that are there and that the policy does not cover by its Services: as
/// `port 8080 of shop/web-1`, by the Service that led there.
pub(crate) fn beyond(resources: &Resources, policy: &Resource, forms: &[Former]) -> BTreeMap<Named, String> {
    let namespace = policy.metadata().namespace.as_str();
    let mut found: BTreeMap<Named, BTreeMap<BTreeSet<u16>, Vec<Named>>> = BTreeMap::new();
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
        let mut by_service: BTreeMap<&str, BTreeSet<u16>> = BTreeMap::new();
        for form in forms {
            let ports = form.ports_of(workload).into_iter().filter(|port| !led_to.contains(port));
            by_service.entry(&form.service).or_default().extend(ports);
        }
        for (service, ports) in by_service.into_iter().filter(|(_, ports)| !ports.is_empty()) {
            found.entry(Named::new(namespace, service)).or_default().entry(ports).or_default().push(workload.named());
        }
    }
    found.into_iter().map(|(service, covered)| (service, text(&covered))).collect()
}

fn text(covered: &BTreeMap<BTreeSet<u16>, Vec<Named>>) -> String {
    let each = covered.iter().map(|(ports, workloads)| {
        let plural = if ports.len() == 1 { "port" } else { "ports" };
        let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
        let more = if workloads.len() > WORKLOADS_TOLD { ", …" } else { "" };
        let workloads: Vec<String> = workloads.iter().take(WORKLOADS_TOLD).map(Named::to_string).collect();
        format!("{plural} {} of {}{more}", ports.join(", "), workloads.join(", "))
    });
    each.collect::<Vec<_>>().join("; ")
}

/// How many workloads a text names.
const WORKLOADS_TOLD: usize = 8;
