//! `GRPCRoute` (gateway.networking.k8s.io/v1): an HTTPRoute for calls of gRPC, with conditions of its own.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Kind;
use super::http_route::{HttpBackendRef, HttpRouteFilter};
use super::object::Spec;
use super::route::ParentRef;
use crate::policy::grpc::CallMatchConfig;

/// The body of a GRPCRoute.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct GrpcRouteSpec {
    /// The Services whose callers take this route, as in an HTTPRoute.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) parent_refs: Vec<ParentRef>,
    /// Means nothing where the parent is a Service (GEP-1294): the route is for every host. Rules may match the header `Host`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) hostnames: Vec<String>,
    /// What is done with which calls.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) rules: Vec<GrpcRouteRule>,
}

/// One rule (Gateway API GRPCRouteRule).
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct GrpcRouteRule {
    /// A name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// One of them must fit; every call when absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) matches: Vec<CallMatchConfig>,
    /// What is done to a call and its answer: header modifiers and mirrors.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) filters: Vec<HttpRouteFilter>,
    /// Where calls go, by weight. Without one, or with none that has a weight, they end with UNAVAILABLE.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) backend_refs: Vec<HttpBackendRef>,
}

impl Spec for GrpcRouteSpec {
    const KIND: Kind = Kind::GrpcRoute;
}
