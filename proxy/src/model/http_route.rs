//! `HTTPRoute` (gateway.networking.k8s.io/v1) as a mesh reads it: its parents are Services (GEP-1426).
//!
//! Fields that Gateway API knows and nothing here carries out are refused like misspelt ones: a route that is taken does
//! all that it says.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Kind;
use super::object::{Object, Spec};
use crate::base::names::Named;
use crate::policy::headers::HeaderEditConfig;
use crate::policy::matcher::RequestMatchConfig;
use crate::policy::retry::RetryConfig;
use crate::policy::rewrite::RewriteConfig;
use crate::policy::shadow::ShadowConfig;
use crate::policy::timeout::TimeoutsConfig;

/// The body of an HTTPRoute.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct HttpRouteSpec {
    /// The Services whose callers take this route. A Service of the route's own namespace: every caller takes it. Of
    /// another namespace: only callers in the route's namespace do, and before the Service's own routes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) parent_refs: Vec<ParentRef>,
    /// Hosts that it is for, `*.` first for a suffix; every host when absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) hostnames: Vec<String>,
    /// What is done with which requests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) rules: Vec<HttpRouteRule>,
}

/// What a route is attached to (Gateway API ParentReference).
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ParentRef {
    /// Empty for a Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) group: Option<String>,
    /// `Service`; a parent of another kind is not the mesh's and is left alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<String>,
    /// The route's own namespace when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) namespace: Option<String>,
    pub(crate) name: String,
    /// The name of one port; every port when neither this nor `port` is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) section_name: Option<String>,
    /// One port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) port: Option<u16>,
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
    /// Where requests go, by weight. Without one, or with none that has a weight, they are answered with 500.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) backend_refs: Vec<BackendRef>,
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
}

/// What a filter does.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize)]
pub(crate) enum FilterType {
    RequestHeaderModifier,
    ResponseHeaderModifier,
    #[serde(rename = "URLRewrite")]
    UrlRewrite,
    RequestMirror,
}

/// Where requests go (Gateway API HTTPBackendRef).
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct BackendRef {
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
    /// Header modifiers for requests that go there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) filters: Vec<HttpRouteFilter>,
}

impl Spec for HttpRouteSpec {
    const KIND: Kind = Kind::HttpRoute;
}

impl Object<HttpRouteSpec> {
    /// The services whose callers take this route.
    pub(crate) fn service_parents(&self) -> impl Iterator<Item = Named> {
        let parents = self.spec.parent_refs.iter().filter(|parent| parent.is_service());
        parents.map(|parent| self.named_or_here(parent.namespace.as_deref(), &parent.name))
    }

    /// The services to which it leads: backends and the targets of mirrors, which may not exist.
    pub(crate) fn services(&self) -> BTreeSet<Named> {
        let rules = self.spec.rules.iter();
        let backends = rules.clone().flat_map(|rule| &rule.backend_refs);
        let filters = rules.flat_map(|rule| &rule.filters).chain(backends.clone().flat_map(|backend| &backend.filters));
        let mirrors = filters.filter_map(|filter| filter.request_mirror.as_ref()).map(|mirror| &mirror.backend_ref);
        let backends = backends.map(|backend| self.named_or_here(backend.namespace.as_deref(), &backend.name));
        backends.chain(mirrors.map(|mirror| self.named_or_here(mirror.namespace.as_deref(), &mirror.name))).collect()
    }

    /// A name as the route means it: without a namespace, in its own.
    pub(crate) fn named_or_here(&self, namespace: Option<&str>, name: &str) -> Named {
        Named::new(namespace.unwrap_or(&self.metadata.namespace), name)
    }
}

impl ParentRef {
    /// Is the parent a Service? (Strictly the absent group would be Gateway API's own, which has no Service.)
    pub(crate) fn is_service(&self) -> bool {
        is_core(self.group.as_deref()) && self.kind.as_deref() == Some("Service")
    }
}

impl BackendRef {
    /// Is the backend a Service?
    pub(crate) fn is_service(&self) -> bool {
        is_core(self.group.as_deref()) && self.kind.as_deref().is_none_or(|kind| kind == "Service")
    }
}

/// `core` is another spelling of the empty group.
fn is_core(group: Option<&str>) -> bool {
    matches!(group, None | Some("" | "core"))
}
