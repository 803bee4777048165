//! For whom a policy is, seen from one workload: which of its ports the policy reaches, and from how near.

use super::kept;
use crate::base::names::Named;
use crate::model::object::{MESH_NAMESPACE, Object};
use crate::model::target::{TargetKind, TargetRef};
use crate::model::workload::WorkloadSpec;
use crate::model::{Resource, ResourceKey};

/// For whom a policy is, in the order of precedence: the nearest first.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Level {
    Workload,
    Service,
    Namespace,
    Mesh,
}

/// What a policy says that it is for.
#[derive(Clone, Debug)]
pub(super) struct Reach {
    namespace: String,
    targets: Vec<TargetRef>,
    /// Ports of the own workload that it goes on covering, though its Services lead there no longer.
    kept: kept::Ports,
}

impl Reach {
    /// Of a policy that could be read.
    pub(super) fn of(resource: &Resource, own: &Object<WorkloadSpec>) -> Self {
        let (namespace, targets) = (resource.metadata().namespace.clone(), resource.targets().to_vec());
        Self { namespace, targets, kept: kept::ports(resource, own) }
    }

    /// Of a policy of which nothing but its name could be read: it may be for everything in its namespace.
    pub(super) fn unread(key: &ResourceKey) -> Self {
        Self { namespace: key.name.namespace.to_string(), targets: Vec::new(), kept: kept::Ports::default() }
    }

    /// Does it reach a port of the workload to which these services lead, and from how near?
    pub(super) fn level(&self, own: &Named, services: &[&Named]) -> Option<Level> {
        let here = self.namespace == *own.namespace;
        if self.targets.is_empty() {
            let mesh = self.namespace == MESH_NAMESPACE;
            return if here && !mesh { Some(Level::Namespace) } else { mesh.then_some(Level::Mesh) };
        }
        if !here {
            return None;
        }
        if self.targets.iter().any(|target| target.is(TargetKind::Workload, &own.name)) {
            return Some(Level::Workload);
        }
        let named = |service: &&Named| self.targets.iter().any(|target| target.is(TargetKind::Service, &service.name));
        services.iter().any(named).then_some(Level::Service)
    }

    /// The ports that it goes on covering, as far as they are known one by one.
    pub(super) fn kept_numbers(&self) -> impl Iterator<Item = u16> {
        self.kept.numbers()
    }

    /// Does it go on covering a port which it does not reach any more?
    pub(super) fn keeps(&self, own: &Named, port: Option<u16>, services: &[&Named]) -> bool {
        self.kept.contain(port) && self.level(own, services).is_none()
    }
}
