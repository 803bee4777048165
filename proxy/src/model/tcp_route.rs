//! `TCPRoute` (gateway.networking.k8s.io/v1): where the connections to a Service go, whatever they carry.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Kind;
use super::object::Spec;
use super::route::{ParentRef, StreamRule};

/// The body of a TCPRoute.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct TcpRouteSpec {
    /// The Services whose callers take this route, as in an HTTPRoute. Their ports are opaque by that.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) parent_refs: Vec<ParentRef>,
    /// Exactly one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) rules: Vec<StreamRule>,
}

impl Spec for TcpRouteSpec {
    const KIND: Kind = Kind::TcpRoute;
}
