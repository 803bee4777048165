//! `HTTPRoute` (gateway.networking.k8s.io/v1) as a mesh reads it: its parents are Services (GEP-1294).
//!
//! Fields that Gateway API knows and nothing here carries out are refused like misspelt ones: a route that is taken does
//! all that it says.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Kind;
use super::object::Spec;
use super::route::ParentRef;
use crate::policy::cors::CorsConfig;
use crate::policy::headers::HeaderEditConfig;
use crate::policy::matcher::RequestMatchConfig;
use crate::policy::redirect::RedirectConfig;
use crate::policy::retry::RetryConfig;
use crate::policy::rewrite::RewriteConfig;
use crate::policy::shadow::ShadowConfig;
use crate::policy::timeout::TimeoutsConfig;

/// The body of an HTTPRoute.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct HttpRouteSpec {
    /// The Services whose callers take this route. A Service of the route's own namespace: every caller takes it. Of
    /// another namespace: only callers in the route's namespace do, in place of the Service's own routes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) parent_refs: Vec<ParentRef>,
    /// Means nothing where the parent is a Service (GEP-1294): the route is for every host. Rules may match the header `Host`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) hostnames: Vec<String>,
    /// What is done with which requests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) rules: Vec<HttpRouteRule>,
}

/// One rule (Gateway API HTTPRouteRule).
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct HttpRouteRule {
    /// A name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// One of them must fit; every request when absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) matches: Vec<RequestMatchConfig>,
    /// What is done to a request and its answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) filters: Vec<HttpRouteFilter>,
    /// Where requests go, by weight. Without one, or with none that has a weight, they are answered with 500; a redirect needs
    /// none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) backend_refs: Vec<HttpBackendRef>,
    /// How long things may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) timeouts: Option<TimeoutsConfig>,
    /// Which failures are tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) retry: Option<RetryConfig>,
}

/// One filter (Gateway API HTTPRouteFilter). Exactly the field that `type` names is there.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct HttpRouteFilter {
    #[serde(rename = "type")]
    pub(crate) kind: FilterType,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) request_header_modifier: Option<HeaderEditConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) response_header_modifier: Option<HeaderEditConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) url_rewrite: Option<RewriteConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) request_mirror: Option<ShadowConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) request_redirect: Option<RedirectConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cors: Option<CorsConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) extension_ref: Option<ExtensionRef>,
}

/// A policy of the route's namespace that a rule takes something from (Gateway API LocalObjectReference).
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ExtensionRef {
    /// `outrigger.dev`.
    pub(crate) group: String,
    /// `TrafficPolicy`, of which the rule's requests meet the `fault`.
    pub(crate) kind: String,
    pub(crate) name: String,
}

/// What a filter does.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize)]
pub(crate) enum FilterType {
    RequestHeaderModifier,
    ResponseHeaderModifier,
    #[serde(rename = "URLRewrite")]
    UrlRewrite,
    RequestMirror,
    RequestRedirect,
    #[serde(rename = "CORS")]
    Cors,
    ExtensionRef,
}

/// Where requests go (Gateway API HTTPBackendRef).
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct HttpBackendRef {
    /// Empty for a Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) group: Option<String>,
    /// `Service`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<String>,
    pub(crate) name: String,
    /// The route's namespace when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) namespace: Option<String>,
    /// A port of the Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) port: Option<u16>,
    /// Its share among the rule's backends; 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) weight: Option<u32>,
    /// Header modifiers, a rewrite and mirrors for requests that go there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) filters: Vec<HttpRouteFilter>,
}

impl Spec for HttpRouteSpec {
    const KIND: Kind = Kind::HttpRoute;
}
