//! What the kinds of routes share: what they are attached to and where they lead, whatever else they say.
//!
//! Source: Gateway API, ParentReference and BackendObjectReference; as a mesh reads them, parents are Services (GEP-1294).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::object::Metadata;
use super::{Kind, Resource};
use crate::base::names::Named;
use crate::base::problems::FieldPath;
use crate::model::http_route::{ExtensionRef, HttpBackendRef, HttpRouteFilter};

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

/// Where connections go (Gateway API BackendRef).
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
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
    /// Its share among the backends; 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) weight: Option<u32>,
}

/// One rule of a route for connections (Gateway API TCPRouteRule, TLSRouteRule).
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct StreamRule {
    /// A name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// Where connections go, by weight. The share of one that is not there is closed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) backend_refs: Vec<BackendRef>,
}

/// A route of any kind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Route<'a> {
    pub(crate) kind: Kind,
    pub(crate) metadata: &'a Metadata,
    pub(crate) parents: &'a [ParentRef],
    resource: &'a Resource,
}

/// A place to which a route leads.
#[derive(Clone, Debug)]
pub(crate) struct Lead<'a> {
    /// Where the reference is written.
    pub(crate) at: FieldPath,
    /// Are copies sent there, and no answer is waited for?
    pub(crate) is_mirror: bool,
    group: Option<&'a str>,
    kind: Option<&'a str>,
    namespace: Option<&'a str>,
    name: &'a str,
    pub(crate) port: Option<u16>,
}

impl Resource {
    /// The resource as a route, if it is one.
    pub(crate) fn route(&self) -> Option<Route<'_>> {
        let parents = match self {
            Self::HttpRoute(route) => &route.spec.parent_refs,
            Self::GrpcRoute(route) => &route.spec.parent_refs,
            Self::TlsRoute(route) => &route.spec.parent_refs,
            Self::TcpRoute(route) => &route.spec.parent_refs,
            Self::Mesh(_)
            | Self::Service(_)
            | Self::Workload(_)
            | Self::ReferenceGrant(_)
            | Self::AuthorizationPolicy(_)
            | Self::RequestAuthentication(_)
            | Self::PeerAuthentication(_)
            | Self::TrafficPolicy(_) => return None,
        };
        Some(Route { kind: self.key().kind, metadata: self.metadata(), parents, resource: self })
    }
}

impl<'a> Route<'a> {
    /// Namespace and name.
    pub(crate) fn named(&self) -> Named {
        Named::new(self.metadata.namespace.as_str(), self.metadata.name.as_str())
    }

    /// The parents that are Services, by their place in the list.
    pub(crate) fn service_parents(&self) -> impl Iterator<Item = (usize, &'a ParentRef, Named)> + use<'a> {
        let namespace = self.metadata.namespace.as_str();
        let parents = self.parents.iter().enumerate().filter(|(_, parent)| parent.is_service());
        parents.map(move |(index, parent)| {
            let namespace = parent.namespace.as_deref().unwrap_or(namespace);
            (index, parent, Named::new(namespace, parent.name.as_str()))
        })
    }

    /// Where it leads: backends, and the targets of mirrors.
    pub(crate) fn leads(&self) -> Vec<Lead<'a>> {
        match self.resource {
            Resource::HttpRoute(route) => {
                let rules = route.spec.rules.iter().map(|rule| (rule.filters.as_slice(), rule.backend_refs.as_slice()));
                requests_lead(rules)
            }
            Resource::GrpcRoute(route) => {
                let rules = route.spec.rules.iter().map(|rule| (rule.filters.as_slice(), rule.backend_refs.as_slice()));
                requests_lead(rules)
            }
            Resource::TlsRoute(route) => streams_lead(&route.spec.rules),
            Resource::TcpRoute(route) => streams_lead(&route.spec.rules),
            _no_route => Vec::new(),
        }
    }

    /// The policies that its rules refer to, with where that is written.
    pub(crate) fn extensions(&self) -> Vec<(FieldPath, &'a ExtensionRef)> {
        let filters: Vec<&[HttpRouteFilter]> = match self.resource {
            Resource::HttpRoute(route) => route.spec.rules.iter().map(|rule| rule.filters.as_slice()).collect(),
            Resource::GrpcRoute(route) => route.spec.rules.iter().map(|rule| rule.filters.as_slice()).collect(),
            _no_filters => Vec::new(),
        };
        let of_rule = |(rule, filters): (usize, &'a [HttpRouteFilter])| {
            let at = move |index| rule_at(rule).field("filters").index(index).field("extensionRef");
            filters.iter().enumerate().filter_map(move |(index, filter)| Some((at(index), filter.extension_ref.as_ref()?)))
        };
        filters.into_iter().enumerate().flat_map(of_rule).collect()
    }
}

fn rule_at(index: usize) -> FieldPath {
    FieldPath::root().field("spec").field("rules").index(index)
}

fn requests_lead<'a>(rules: impl Iterator<Item = (&'a [HttpRouteFilter], &'a [HttpBackendRef])>) -> Vec<Lead<'a>> {
    let mut all = Vec::new();
    for (index, (filters, backends)) in rules.enumerate() {
        for (backend_index, backend) in backends.iter().enumerate() {
            all.push(Lead {
                at: rule_at(index).field("backendRefs").index(backend_index),
                is_mirror: false,
                group: backend.group.as_deref(),
                kind: backend.kind.as_deref(),
                namespace: backend.namespace.as_deref(),
                name: &backend.name,
                port: backend.port,
            });
            let at = rule_at(index).field("backendRefs").index(backend_index);
            all.extend(mirrors_lead(&backend.filters, at));
        }
        all.extend(mirrors_lead(filters, rule_at(index)));
    }
    all
}

/// Where the mirrors among filters lead; `at` is what the filters stand in.
fn mirrors_lead(filters: &[HttpRouteFilter], at: FieldPath) -> impl Iterator<Item = Lead<'_>> {
    filters.iter().enumerate().filter_map(move |(index, filter)| {
        let backend = &filter.request_mirror.as_ref()?.backend_ref;
        Some(Lead {
            at: at.field("filters").index(index).field("requestMirror").field("backendRef"),
            is_mirror: true,
            group: backend.group.as_deref(),
            kind: backend.kind.as_deref(),
            namespace: backend.namespace.as_deref(),
            name: &backend.name,
            port: Some(backend.port),
        })
    })
}

fn streams_lead(rules: &[StreamRule]) -> Vec<Lead<'_>> {
    let rules = rules.iter().enumerate();
    let backends = rules.flat_map(|(index, rule)| rule.backend_refs.iter().enumerate().map(move |backend| (index, backend)));
    let leads = backends.map(|(index, (backend_index, backend))| Lead {
        at: rule_at(index).field("backendRefs").index(backend_index),
        is_mirror: false,
        group: backend.group.as_deref(),
        kind: backend.kind.as_deref(),
        namespace: backend.namespace.as_deref(),
        name: &backend.name,
        port: backend.port,
    });
    leads.collect()
}

impl Lead<'_> {
    /// Is it a Service?
    pub(crate) fn is_service(&self) -> bool {
        is_service(self.group, self.kind)
    }

    /// Whose name it is: without a namespace, one of the route's own.
    pub(crate) fn named(&self, route: &Route<'_>) -> Named {
        Named::new(self.namespace.unwrap_or(&route.metadata.namespace), self.name)
    }
}

impl ParentRef {
    /// Is the parent a Service? (Strictly the absent group would be Gateway API's own, which has no Service.)
    pub(crate) fn is_service(&self) -> bool {
        is_core(self.group.as_deref()) && self.kind.as_deref() == Some("Service")
    }

    /// Is the route attached to this port of the parent?
    pub(crate) fn takes(&self, port: u16, name: Option<&str>) -> bool {
        self.port.is_none_or(|number| number == port) && self.section_name.as_deref().is_none_or(|section| Some(section) == name)
    }
}

/// Is this a Service, by group and kind?
pub(crate) fn is_service(group: Option<&str>, kind: Option<&str>) -> bool {
    is_core(group) && kind.is_none_or(|kind| kind == "Service")
}

/// `core` is another spelling of the empty group.
pub(super) fn is_core(group: Option<&str>) -> bool {
    matches!(group, None | Some("" | "core"))
}
