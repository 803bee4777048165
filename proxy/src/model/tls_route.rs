//! `TLSRoute` (gateway.networking.k8s.io/v1): where the TLS connections to a Service go, by the name that they ask for. The
//! TLS is the applications' own and stays closed.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Kind;
use super::object::Spec;
use super::route::{ParentRef, StreamRule};

/// The body of a TLSRoute.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct TlsRouteSpec {
    /// The Services whose callers take this route, as in an HTTPRoute. Their ports are opaque by that.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) parent_refs: Vec<ParentRef>,
    /// The server names (SNI) that it is for, `*.` first for a suffix; at least one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) hostnames: Vec<String>,
    /// Exactly one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) rules: Vec<StreamRule>,
}

impl Spec for TlsRouteSpec {
    const KIND: Kind = Kind::TlsRoute;
}
