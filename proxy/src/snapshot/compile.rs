//! From resources to a snapshot.

use std::sync::Arc;

use super::Snapshot;
use crate::base::names::Named;
use crate::base::problems::Problems;
use crate::identity::spiffe::TrustDomain;
use crate::model::{Resource, ResourceKey, Resources};

/// For whom a snapshot is compiled.
#[derive(Clone, Debug)]
pub(crate) struct Own {
    /// The sidecar's own pod.
    pub(crate) workload: Named,
    /// Of which the identities of the mesh's workloads are.
    pub(crate) trust_domain: TrustDomain,
}

/// Takes a new form of one resource into `resources`, or why it could not be read. A form that does not compile leaves the
/// last good one in force; where there is none, the resource counts as refused, which closes the target of a security
/// policy. The problems of this one resource are returned; `refused()` of them says that the form was not taken.
pub(crate) fn admit(resources: &mut Resources, key: ResourceKey, form: Result<Arc<Resource>, String>) -> Problems {
    todo!()
}

/// The resource is no longer there.
pub(crate) fn forget(resources: &mut Resources, key: &ResourceKey) {
    resources.by_key.remove(key);
    resources.refused.remove(key);
}

/// Builds what the sidecar of `own` reads. Total: what is wrong is a problem, never a panic or a missing snapshot. State
/// (buckets, budgets, breakers, ejections) is carried over from `previous` where its configuration is the same.
pub(crate) fn compile(resources: &Resources, own: &Own, previous: &Snapshot) -> (Snapshot, Problems) {
    todo!()
}

/// All problems of a set of documents, as `outrigger check` and the control plane tell them.
pub(crate) fn check(resources: &Resources) -> Problems {
    todo!()
}
