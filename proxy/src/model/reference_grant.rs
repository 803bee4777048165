//! `ReferenceGrant` (gateway.networking.k8s.io/v1): whose routes may lead to Services of a namespace that is not theirs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::object::Spec;
use super::route::{Route, is_core};
use super::{Kind, Resource, Resources};
use crate::base::names::Named;

/// The body of a ReferenceGrant.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ReferenceGrantSpec {
    /// Whose references are granted; any of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) from: Vec<GrantFrom>,
    /// What they may refer to in the grant's namespace; any of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) to: Vec<GrantTo>,
}

/// Whose references (Gateway API ReferenceGrantFrom).
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct GrantFrom {
    /// `gateway.networking.k8s.io` for routes.
    pub(crate) group: String,
    /// `HTTPRoute`, `GRPCRoute`, `TLSRoute`, `TCPRoute`; another one grants nothing here.
    pub(crate) kind: String,
    pub(crate) namespace: String,
}

/// To what (Gateway API ReferenceGrantTo).
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct GrantTo {
    /// Empty for a Service.
    pub(crate) group: String,
    /// `Service`; another one grants nothing here.
    pub(crate) kind: String,
    /// One of them; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
}

impl Spec for ReferenceGrantSpec {
    const KIND: Kind = Kind::ReferenceGrant;
}

impl Resources {
    /// May the route lead to this Service? In its own namespace, and back to its own parents, it may; anywhere else it takes
    /// a grant of the Service's namespace.
    pub(crate) fn permits(&self, route: &Route<'_>, service: &Named) -> bool {
        if *service.namespace == *route.metadata.namespace || route.service_parents().any(|(_, _, parent)| parent == *service) {
            return true;
        }
        let mut grants = self.of_kind(Kind::ReferenceGrant).filter_map(|(key, resource)| match resource {
            Resource::ReferenceGrant(grant) if key.name.namespace == service.namespace => Some(&grant.spec),
            _ => None,
        });
        grants.any(|grant| grant.permits(route, service))
    }
}

impl ReferenceGrantSpec {
    fn permits(&self, route: &Route<'_>, service: &Named) -> bool {
        let theirs = |from: &GrantFrom| {
            from.group == GROUP && from.kind == route.kind.as_str() && from.namespace == route.metadata.namespace
        };
        let meant = |to: &GrantTo| {
            is_core(Some(&to.group)) && to.kind == "Service" && to.name.as_deref().is_none_or(|name| *name == *service.name)
        };
        self.from.iter().any(theirs) && self.to.iter().any(meant)
    }
}

/// The group of routes.
const GROUP: &str = "gateway.networking.k8s.io";
