//! The documents that are asked: those in force, or those of files with what only a running mesh would add.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};
use serde_json::Value;

use super::super::Failure;
use super::super::check::Loaded;
use super::super::mesh::Mesh;
use super::told::Told;
use crate::base::names::{Named, nearest};
use crate::model::mesh::Network;
use crate::model::object::Object;
use crate::model::service::{PortRef, ServiceSpec};
use crate::model::workload::{WorkloadPort, WorkloadSpec};
use crate::model::{Kind, Resource, ResourceKey, Resources};
use crate::snapshot::compile;

/// What the control plane has in force.
pub(super) fn ask(mesh: &Mesh<'_>) -> Result<(Resources, String), Failure> {
    let answer = mesh.get("/api/resources")?;
    let mut resources = Resources::default();
    for item in answer.get("items").and_then(Value::as_array).into_iter().flatten() {
        let kind = item.get("kind").and_then(Value::as_str).unwrap_or_default();
        let Some(kind) = Kind::ALL.into_iter().find(|known| known.as_str() == kind) else { continue };
        let resource = Resource::read(kind, item.clone()).map_err(|error| {
            Failure::environment(format!("the control plane's answer cannot be read: {error}"), "use the control plane's version")
        })?;
        let (key, resource) = (resource.key(), Arc::new(resource));
        // A Service whose address is another one's has none; what it selects stays known.
        let is_known = item.pointer("/status/addressTakenBy").is_some();
        if item.pointer("/status/inForce").and_then(Value::as_bool) == Some(false) && !is_known {
            resources.refused.insert(key, Some(resource));
        } else {
            resources.by_key.insert(key, resource);
        }
    }
    let status = mesh.get("/api/status")?;
    let domain = status.pointer("/control/trustDomain").and_then(Value::as_str).unwrap_or("cluster.local");
    Ok((resources, domain.to_owned()))
}

pub(super) fn load(files: &[PathBuf]) -> Result<Resources, Failure> {
    let loaded = Loaded::read(files);
    if loaded.unreadable.is_empty() { Ok(loaded.resources) } else { Err(Failure::invalid(&loaded.unreadable)) }
}

/// Adds what only a running mesh has: the calling pod, and addresses of services.
pub(super) fn prepare(
    resources: &mut Resources,
    from: &Named,
    account: &str,
    offline: bool,
    told: &mut Told,
) -> Result<(), Failure> {
    if resources.workload(from).is_none() {
        let key = ResourceKey { kind: Kind::Workload, name: from.clone() };
        if !offline {
            let pods: Vec<String> = resources.workloads().map(|workload| workload.named().to_string()).collect();
            let meant = nearest(&from.to_string(), pods.iter().map(String::as_str)).map(|name| format!("; did you mean {name}?"));
            return Err(Failure::invalid([format!("there is no {key}{}", meant.unwrap_or_default())]));
        }
        let spec = WorkloadSpec {
            addresses: vec![Ipv4Addr::new(192, 0, 2, 1).into()],
            service_account: Some(account.to_owned()),
            ..WorkloadSpec::default()
        };
        let workload = Object::new(from, std::collections::BTreeMap::new(), spec);
        resources.by_key.insert(key, Arc::new(Resource::Workload(workload)));
        told.say("note", format!("the documents do not hold {from}; a pod of service account {account} is assumed"), None);
    }
    if offline {
        assume_endpoints(resources, told);
    }
    // From the range for documentation (RFC 5737), or class E where there are more: these addresses are only looked up here.
    let mut next = u32::from(ASSUMED) + 1;
    for resource in resources.by_key.values_mut() {
        if let Resource::Service(service) = Arc::make_mut(resource)
            && service.spec.addresses().next().is_none()
            && !service.spec.is_headless()
        {
            service.spec.cluster_ip = Some(Ipv4Addr::from(next).to_string());
            next += 1;
        }
    }
    let mut mesh = compile::mesh_of(resources);
    let mut ranges = mesh.networks();
    ranges.extend(Ipv4Net::new(ASSUMED, 4).map(IpNet::V4));
    mesh.ranges = Some(ranges.into_iter().map(Network).collect());
    let name = resources.of_kind(Kind::Mesh).next().map_or_else(|| Named::new("", "mesh"), |(key, _)| key.name.clone());
    let mesh = Object::new(&name, std::collections::BTreeMap::new(), mesh);
    resources.by_key.insert(mesh.key(), Arc::new(Resource::Mesh(mesh)));
    Ok(())
}

/// The network of the addresses that are assumed: class E, which no document can have.
const ASSUMED: Ipv4Addr = Ipv4Addr::new(240, 0, 0, 0);

/// Documents seldom hold pods: a service that selects none is given one, so that its policies can be asked.
fn assume_endpoints(resources: &mut Resources, told: &mut Told) {
    let is_empty = |service: &&Object<ServiceSpec>| {
        !service.spec.selector.is_empty()
            && !resources
                .workloads_in(&service.metadata.namespace)
                .any(|workload| service.spec.selects(&workload.metadata.labels))
    };
    let mut assumed = Vec::new();
    for (address, service) in (u32::from(Ipv4Addr::new(241, 0, 0, 1))..).zip(resources.services().filter(is_empty)) {
        let named = service.spec.ports.iter().filter_map(|port| match &port.target_port {
            Some(PortRef::Name(name)) => Some(WorkloadPort { name: Some(name.clone()), port: port.port, app_protocol: None }),
            _ => None,
        });
        let spec =
            WorkloadSpec { addresses: vec![Ipv4Addr::from(address).into()], ports: named.collect(), ..WorkloadSpec::default() };
        let name = Named::new(service.metadata.namespace.as_str(), format!("assumed-{}", service.metadata.name));
        assumed.push(Object::new(&name, service.spec.selector.clone(), spec));
    }
    if !assumed.is_empty() {
        let names: Vec<String> = assumed.iter().map(|workload| workload.named().to_string()).collect();
        told.say("note", format!("the documents hold no pods for some services; assumed are {}", names.join(", ")), None);
    }
    for workload in assumed {
        resources.by_key.insert(workload.key(), Arc::new(Resource::Workload(workload)));
    }
}
