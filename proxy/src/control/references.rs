//! Who refers to whom, by name, so that what concerns a service, a workload or an address is found without reading everything.
//! Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::base::names::Named;
use crate::model::object::MESH_NAMESPACE;
use crate::model::target::TargetKind;
use crate::model::{Resource, ResourceKey};
use crate::snapshot::compile;

/// What is known of that.
#[derive(Clone, Debug, Default)]
pub(super) struct References {
    /// Routes by the service that they are attached to.
    pub(super) routes: BTreeMap<Named, BTreeSet<ResourceKey>>,
    /// Policies by the service or workload that they target.
    pub(super) targets: BTreeMap<(TargetKind, Named), BTreeSet<ResourceKey>>,
    /// Services and workloads by address.
    pub(super) addresses: BTreeMap<IpAddr, BTreeSet<ResourceKey>>,
    /// Policies without target, by namespace.
    pub(super) namespaces: BTreeMap<String, BTreeSet<ResourceKey>>,
}

/// What a resource can be found by.
pub(super) enum Place {
    Route(Named),
    Target(TargetKind, Named),
    Address(IpAddr),
    Namespace(String),
}

impl References {
    /// A resource is found there from now on.
    pub(super) fn remember(&mut self, place: Place, key: &ResourceKey) {
        let keys = match place {
            Place::Route(name) => self.routes.entry(name).or_default(),
            Place::Target(kind, name) => self.targets.entry((kind, name)).or_default(),
            Place::Address(address) => self.addresses.entry(address).or_default(),
            Place::Namespace(namespace) => self.namespaces.entry(namespace).or_default(),
        };
        keys.insert(key.clone());
    }

    /// It is not found there any more.
    pub(super) fn forget(&mut self, place: &Place, key: &ResourceKey) {
        match place {
            Place::Route(name) => drop_from(&mut self.routes, name, key),
            Place::Target(kind, name) => drop_from(&mut self.targets, &(*kind, name.clone()), key),
            Place::Address(address) => drop_from(&mut self.addresses, address, key),
            Place::Namespace(namespace) => drop_from(&mut self.namespaces, namespace, key),
        }
    }
}

fn drop_from<K: Ord>(index: &mut BTreeMap<K, BTreeSet<ResourceKey>>, at: &K, key: &ResourceKey) {
    if let Some(keys) = index.get_mut(at) {
        keys.remove(key);
        if keys.is_empty() {
            index.remove(at);
        }
    }
}

/// Where a policy that cannot be read is found: in its namespace, whatever its target was meant to be.
pub(super) fn closed(key: &ResourceKey) -> Place {
    Place::Namespace(key.name.namespace.to_string())
}

/// Where a resource is found.
pub(super) fn places(resource: &Resource) -> Vec<Place> {
    match resource {
        Resource::Mesh(_) => vec![Place::Namespace(MESH_NAMESPACE.to_owned())],
        Resource::Service(service) => compile::addresses(service).into_iter().map(Place::Address).collect(),
        Resource::Workload(workload) => workload.spec.addresses.iter().map(|ip| Place::Address(ip.to_canonical())).collect(),
        Resource::HttpRoute(_) | Resource::GrpcRoute(_) | Resource::TlsRoute(_) | Resource::TcpRoute(_) => resource
            .route()
            .into_iter()
            .flat_map(|route| route.service_parents())
            .map(|(_, _, service)| Place::Route(service))
            .collect(),
        // It is found by its namespace among all grants, which are few.
        Resource::ReferenceGrant(_) => Vec::new(),
        Resource::AuthorizationPolicy(_)
        | Resource::RequestAuthentication(_)
        | Resource::PeerAuthentication(_)
        | Resource::TrafficPolicy(_) => {
            let namespace = resource.metadata().namespace.as_str();
            let targets = resource.targets();
            if targets.is_empty() && !resource.key().kind.is_security() {
                // It is found by its name, in the routes that refer to it.
                return Vec::new();
            }
            if targets.is_empty() {
                return vec![Place::Namespace(namespace.to_owned())];
            }
            targets.iter().map(|target| Place::Target(target.kind, Named::new(namespace, target.name.as_str()))).collect()
        }
    }
}
