//! The networks of a cluster's pods and Services, for a Mesh that does not say them. Pure.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use crate::base::names::Named;
use crate::base::problems::{FieldPath, Problem, Severity};
use crate::model::ResourceKey;
use crate::model::mesh::{MeshSpec, Network, service_ranges};
use crate::model::object::{MESH_NAMESPACE, Object};
use crate::model::{Kind, Resource};

/// The networks, by the object that says them.
#[derive(Debug, Default)]
pub(super) struct Ranges(BTreeMap<(bool, Named), Vec<IpNet>>);

impl Ranges {
    /// A machine says where its pods are, a ServiceCIDR where Services are. Returns whether that is new.
    pub(super) fn put(&mut self, is_node: bool, name: &Named, body: &Value) -> bool {
        let Written { spec } = Written::deserialize(body).unwrap_or_default();
        let mut networks: Vec<IpNet> =
            spec.pod_cidrs.into_iter().chain(spec.cidrs).filter_map(|text| text.parse().ok()).collect();
        networks.sort();
        let key = (is_node, name.clone());
        let before = self.0.insert(key, networks.clone());
        before.unwrap_or_default() != networks
    }

    /// One is gone. Returns whether it said anything.
    pub(super) fn remove(&mut self, is_node: bool, name: &Named) -> bool {
        self.0.remove(&(is_node, name.clone())).is_some_and(|networks| !networks.is_empty())
    }

    /// All of them, neighbours as one.
    pub(super) fn networks(&self) -> Vec<IpNet> {
        let all: BTreeSet<IpNet> = self.0.values().flatten().copied().collect();
        let mut networks = IpNet::aggregate(&all.into_iter().collect());
        networks.sort();
        networks
    }

    /// Gives a Mesh the networks that it does not say itself.
    pub(super) fn fill(&self, mesh: &mut MeshSpec) {
        let networks = self.networks();
        if mesh.ranges.is_none() && !networks.is_empty() {
            mesh.ranges = Some(networks.into_iter().map(Network).collect());
        }
    }

    /// The Mesh of a cluster in which nobody writes one. None: nothing is known of it, either.
    pub(super) fn mesh(&self) -> Option<Resource> {
        let mut spec = MeshSpec::default();
        self.fill(&mut spec);
        spec.ranges.is_some().then(|| Resource::Mesh(Object::new(&nobodys().name, BTreeMap::new(), spec)))
    }

    /// What is wrong with them.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let networks = self.networks();
        let overlaps = |one: &IpNet, other: &IpNet| one.contains(&other.network()) || other.contains(&one.network());
        let own = service_ranges().filter(|own| networks.iter().any(|network| overlaps(network, own)));
        own.map(|own| Problem {
            resource: nobodys().to_string(),
            at: FieldPath::root(),
            text: format!("the cluster's networks hold {own}, from which a mesh without Kubernetes takes its Services' addresses: its pods are taken for Services"),
            remedy: "give the cluster other networks".to_owned(),
            severity: Severity::Refuses,
            condition: None,
        })
        .collect()
    }
}

/// The key of the Mesh that nobody wrote.
pub(super) fn nobodys() -> ResourceKey {
    ResourceKey { kind: Kind::Mesh, name: Named::new(MESH_NAMESPACE, "cluster-networks") }
}

#[derive(Default, Deserialize)]
struct Written {
    #[serde(default)]
    spec: Spec,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Vec<String>,
    cidrs: Vec<String>,
}
