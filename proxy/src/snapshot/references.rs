//! What resources say about each other and is not so: names that nothing has, two that want the same thing.
//!
//! Only who sees all resources can know it: the control plane and `outrigger check`. Almost everything here warns: what does
//! not exist yet may come. An address that no range ever gives to a host is refused.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::cluster_address::{ClusterAddresses, is_given};
use super::ranges::{check_edges, check_ranges};
use super::selected::Selected;
use super::service_claims::Taken;
use super::{claims, compile, excluded, kept, ranges, route_references, rules, service};
use crate::base::names::Named;
use crate::base::problems::{FieldPath, Problems};
use crate::model::object::Object;
use crate::model::service::{PortRef, ServicePortSpec, ServiceSpec};
use crate::model::target::{TargetKind, TargetRef};
use crate::model::workload::WorkloadSpec;
use crate::model::{Kind, Resource, ResourceKey, Resources};

/// All of it. `lost_services` have none of their addresses.
pub(super) fn check(resources: &Resources, lost_services: &BTreeMap<Named, Taken>) -> Problems {
    let mut all = Problems::default();
    let mut addresses: BTreeMap<IpAddr, String> = BTreeMap::new();
    let networks = compile::mesh_of(resources).networks();
    let cluster = ClusterAddresses::of(resources);
    let lost = claims::lost_among(resources);
    let workloads = Selected::of(resources);
    let pods: BTreeMap<IpAddr, &ResourceKey> = resources
        .of_kind(Kind::Workload)
        .filter(|(key, _)| !lost.contains_key(*key))
        .filter_map(|(key, resource)| if let Resource::Workload(workload) = resource { Some((key, workload)) } else { None })
        .flat_map(|(key, workload)| workload.spec.addresses.iter().map(move |address| (address.to_canonical(), key)))
        .collect();
    let mut meshes = 0;
    for (key, resource) in &resources.by_key {
        let mut problems = Problems::of(key);
        match resource.as_ref() {
            Resource::Mesh(_) => {
                meshes += 1;
                if meshes > 1 {
                    problems.warn(&FieldPath::root(), "there is another Mesh, which counts", "keep one");
                }
            }
            Resource::Service(service) => {
                check_ports(&workloads, service, &mut problems);
                check_ranges(&networks, &cluster, &pods, service, &mut problems);
                check_edges(
                    &networks,
                    compile::addresses(service),
                    &FieldPath::root().field("spec").field("clusterIP"),
                    &mut problems,
                );
                if let Some(lost) = lost_services.get(&key.name) {
                    // One that no Service can have is told of as that.
                    if !problems.refused() {
                        lost.tell(&service.spec, &mut problems);
                    }
                } else {
                    let own = cluster.of_service(service, |address| pods.contains_key(&address));
                    addresses.extend(own.into_iter().map(|address| (address, key.to_string())));
                }
            }
            Resource::Workload(workload) => {
                if let Some(lost) = lost.get(key) {
                    lost.tell(&mut problems);
                    all.append(problems);
                    continue;
                }
                for (index, address) in workload.spec.addresses.iter().enumerate() {
                    let at = FieldPath::root().field("spec").field("addresses").index(index);
                    check_edges(&networks, [*address], &at, &mut problems);
                }
                taken(workload, &addresses, &mut problems);
            }
            Resource::HttpRoute(_) | Resource::GrpcRoute(_) | Resource::TlsRoute(_) | Resource::TcpRoute(_) => {
                route_references::check(resources, resource, &mut problems);
            }
            Resource::ReferenceGrant(_) => {}
            Resource::AuthorizationPolicy(_)
            | Resource::RequestAuthentication(_)
            | Resource::PeerAuthentication(_)
            | Resource::TrafficPolicy(_) => {
                check_targets(resources, resource, &mut problems);
                check_kept(resources, resource, &mut problems);
                if let Resource::AuthorizationPolicy(policy) = resource.as_ref() {
                    rules::check_ports(resources, policy, &mut problems);
                }
            }
        }
        all.append(problems);
    }
    all.append(route_references::contradictions(resources));
    all.append(excluded::check(resources));
    all.append(ranges::held(resources, &networks, |key| lost.contains_key(key)));
    all
}

/// Does a Workload write the address of a Service?
fn taken(workload: &Object<WorkloadSpec>, services: &BTreeMap<IpAddr, String>, problems: &mut Problems) {
    let at = FieldPath::root().field("spec").field("addresses");
    for address in &workload.spec.addresses {
        let Some(owner) = services.get(&address.to_canonical()) else { continue };
        let text = format!("{address} is the address of {owner} too");
        if is_given(address.to_canonical()) {
            problems.refuse(&at, text, "write the address at which the workload is");
        } else {
            problems.warn(&at, text, "give each its own");
        }
    }
}

fn check_ports(workloads: &Selected<'_>, object: &Object<ServiceSpec>, problems: &mut Problems) {
    let selected = workloads.by(object);
    for (index, port) in object.spec.ports.iter().enumerate() {
        if object.spec.is_headless() && port.is_tcp() {
            check_headless(port, index, &selected, problems);
        }
        let Some(PortRef::Name(name)) = &port.target_port else { continue };
        let at = FieldPath::root().field("spec").field("ports").index(index).field("targetPort");
        let is_there = selected.is_empty() || selected.iter().any(|workload| workload.spec.port_named(name).is_some());
        if !is_there {
            problems.warn(
                &at,
                format!("no workload that the service selects has a port {name:?}"),
                "name the workload's port, or write its number",
            );
        }
    }
}

/// Where a Service has no address of its own, its callers dial its workloads themselves: the port that they write is the one
/// that they reach.
fn check_headless(port: &ServicePortSpec, index: usize, workloads: &[&Object<WorkloadSpec>], problems: &mut Problems) {
    let target = match port.target() {
        PortRef::Number(number) => Some(number),
        PortRef::Name(_) => workloads.iter().find_map(|workload| service::target_port(port, &workload.spec)),
    };
    if let Some(target) = target.filter(|target| *target != port.port) {
        let at = FieldPath::root().field("spec").field("ports").index(index).field("targetPort");
        let text = format!(
            "a Service without an address translates no port: who calls its port {} reaches that port of a pod, and not {target}",
            port.port
        );
        problems.warn(&at, text, format!("write port: {target}, or leave clusterIP out"));
    }
}

fn check_targets(resources: &Resources, policy: &Resource, problems: &mut Problems) {
    let key = policy.key();
    for (index, target) in policy.targets().iter().enumerate() {
        if let Some(wanted) = missing(resources, &key.name.namespace, target) {
            let at = FieldPath::root().field("spec").field("targetRefs").index(index).field("name");
            let names = resources.of_kind(wanted.kind).filter(|(other, _)| other.name.namespace == key.name.namespace);
            let remedy = nearest(&target.name, names.map(|(other, _)| &*other.name.name));
            problems.warn(&at, format!("{wanted} does not exist; {}", unprotected(policy, target)), remedy);
        }
    }
}

/// What a policy covers beyond where its Services lead.
fn check_kept(resources: &Resources, policy: &Resource, problems: &mut Problems) {
    // Told though no pod is there: any that comes is covered.
    for form in policy.kept() {
        let service = ResourceKey { kind: Kind::Service, name: Named::new(&*policy.key().name.namespace, form.service.as_str()) };
        let text = match (form.selector.is_empty(), form.every_port) {
            (true, true) => {
                format!("what {service} led to is not known any more: the policy covers every port of every pod of the namespace")
            }
            (true, false) => format!(
                "{service} led to more than can be remembered: the policy covers those ports of every pod of the namespace"
            ),
            (false, true) => {
                format!(
                    "{service} led to more ports than can be remembered: the policy covers every port of the pods that it led to"
                )
            }
            (false, false) => continue,
        };
        problems.warn(&FieldPath::root().field("spec").field("targetRefs"), text, "change the policy: an annotation will do");
    }
    for beyond in kept::beyond(resources, policy, policy.kept()) {
        let at = FieldPath::root().field("spec").field("targetRefs");
        let service = ResourceKey { kind: Kind::Service, name: beyond.service.clone() };
        let (since, remedy) = if beyond.is_known {
            (
                ", and leads there no longer",
                "bring the Service back to what it was, or let go by changing the policy: an annotation will do",
            )
        } else {
            ("", "change the policy where it need not: an annotation will do")
        };
        let text = format!("the policy goes on covering {}: {service} {} there{since}", beyond.covered, beyond.led());
        problems.warn(&at, text, remedy);
    }
}

/// What it means that such a target of a policy does not exist.
pub(super) fn unprotected(policy: &Resource, target: &TargetRef) -> &'static str {
    if target.kind == TargetKind::Service && policy.kept().iter().any(|form| form.service == target.name) {
        return "the policy goes on covering what it led to, and nothing else";
    }
    match policy.key().kind {
        Kind::AuthorizationPolicy => "the policy refuses nothing until it does: whom it kept out may be let in",
        Kind::RequestAuthentication => "the policy demands no token until it does: requests without one may be let in",
        Kind::PeerAuthentication => "the mode of the namespace or the mesh holds until it does",
        Kind::Mesh
        | Kind::Service
        | Kind::Workload
        | Kind::HttpRoute
        | Kind::GrpcRoute
        | Kind::TlsRoute
        | Kind::TcpRoute
        | Kind::ReferenceGrant
        | Kind::TrafficPolicy => "the policy applies once it does",
    }
}

/// The security policies of which a target does not exist, each with that target and what it means.
pub(super) fn without_target(resources: &Resources) -> BTreeMap<(ResourceKey, ResourceKey), &'static str> {
    let refused = resources.refused.iter().filter_map(|(key, resource)| Some((key, resource.as_ref()?)));
    let mut found = BTreeMap::new();
    for (key, resource) in resources.by_key.iter().chain(refused) {
        if !key.kind.is_security() {
            continue;
        }
        for target in resource.targets() {
            if let Some(wanted) = missing(resources, &key.name.namespace, target) {
                found.insert((key.clone(), wanted), unprotected(resource, target));
            }
        }
    }
    found
}

/// The target of a policy of `namespace`, where it does not exist.
fn missing(resources: &Resources, namespace: &Arc<str>, target: &TargetRef) -> Option<ResourceKey> {
    let kind = match target.kind {
        TargetKind::Service => Kind::Service,
        TargetKind::Workload => Kind::Workload,
    };
    let wanted = ResourceKey { kind, name: Named::new(Arc::clone(namespace), target.name.as_str()) };
    // Offline there are no workloads at all: they come with the pods.
    let can_tell = kind == Kind::Service || resources.workloads_in(namespace).next().is_some();
    (can_tell && resources.get(&wanted).is_none()).then_some(wanted)
}

/// What to do about a name that nothing has.
pub(super) fn nearest<'a>(wrong: &str, names: impl Iterator<Item = &'a str>) -> String {
    match crate::base::names::nearest(wrong, names) {
        Some(name) => format!("did you mean {name:?}? else create it"),
        None => "create it, or correct the name".to_owned(),
    }
}
