//! The rules of one port of a service, in the order in which a request is compared with them.
//!
//! Source: Gateway API HTTPRoute v1, "Precedence": the host that is named most exactly, then path, method, headers and query
//! parameters, then the older route, then its name, then the order in it. Each match stands for itself: a rule with two
//! matches has two places. GEP-1426: routes of the caller's namespace go before those of the service's.

use std::cmp::Reverse;
use std::sync::Arc;

use super::compile::Own;
use super::route::{Route, Rule, Wanted};
use super::service::Backends;
use super::{RoutePolicies, RouteRule, WeightedBackend};
use crate::base::names::Named;
use crate::model::Resources;
use crate::model::http_route::HttpRouteSpec;
use crate::model::object::Object;
use crate::model::service::ServicePortSpec;
use crate::policy::RuleName;
use crate::policy::fault::Fault;
use crate::policy::matcher::Precedence;
use crate::policy::retry::Retry;

/// A route of the table, and its document.
pub(super) struct Attached<'a> {
    pub(super) document: &'a Object<HttpRouteSpec>,
    pub(super) route: Route,
}

/// The place of one match of one rule: the smaller one is compared first.
type Place<'a> = (Reverse<bool>, Reverse<(u8, usize)>, Reverse<Precedence>, (bool, Option<&'a str>), &'a Named, usize, usize);

/// Is the route attached to this port of the service, and does the caller take it?
pub(super) fn applies(route: &Object<HttpRouteSpec>, service: &Named, port: &ServicePortSpec, caller: &str) -> bool {
    let is_producers = *service.namespace == *route.metadata.namespace;
    (is_producers || route.metadata.namespace == caller)
        && route.spec.parent_refs.iter().any(|parent| {
            parent.is_service()
                && parent.name == *service.name
                && parent.namespace.as_deref().unwrap_or(&route.metadata.namespace) == &*service.namespace
                && parent.port.is_none_or(|number| number == port.port)
                && parent.section_name.as_ref().is_none_or(|name| Some(name) == port.name.as_ref())
        })
}

/// The rules of a port. Without a route: the one that leads to the service itself.
pub(super) fn rules(
    routes: &[Attached<'_>],
    service: &Named,
    port: &ServicePortSpec,
    fault: Option<&Arc<Fault>>,
    own: &Own,
    backends: &mut Backends<'_>,
) -> Vec<Arc<RouteRule>> {
    let attached = routes.iter().filter(|attached| applies(attached.document, service, port, &own.workload.namespace));
    let routes: Vec<&Route> = attached.map(|attached| &attached.route).collect();
    if routes.is_empty() {
        return vec![Arc::new(to_the_service(service, port.port, fault, backends))];
    }
    let mut placed = Vec::new();
    for route in routes {
        let hosts: Vec<Option<&Box<str>>> =
            if route.hosts.is_empty() { vec![None] } else { route.hosts.iter().map(Some).collect() };
        for (index, rule) in route.rules.iter().enumerate() {
            // What all places of a rule share is built once.
            let common = Common::new(rule, fault, backends);
            for (match_index, one) in rule.matches.iter().enumerate() {
                for host in &hosts {
                    let is_consumers = route.name.namespace != service.namespace;
                    let place: Place<'_> = (
                        Reverse(is_consumers),
                        Reverse(exactness(host.map(|host| &**host))),
                        Reverse(one.precedence()),
                        (route.created.is_none(), route.created.as_deref()),
                        &route.name,
                        index,
                        match_index,
                    );
                    let built = RouteRule {
                        name: rule.name.clone(),
                        hosts: host.map(|host| (*host).clone()).into_iter().collect(),
                        matches: vec![one.clone()],
                        backends: common.backends.clone(),
                        policies: common.policies.clone(),
                    };
                    placed.push((place, Arc::new(built)));
                }
            }
        }
    }
    placed.sort_by_key(|(place, _)| *place);
    placed.into_iter().map(|(_, rule)| rule).collect()
}

/// How exactly a host is named: a whole name before a suffix, a longer one before a shorter one, any before none.
pub(super) fn exactness(host: Option<&str>) -> (u8, usize) {
    match host {
        None => (0, 0),
        Some(host) if host.starts_with("*.") => (1, host.len()),
        Some(host) => (2, host.len()),
    }
}

/// Every service of a route to which its rules lead, for a caller that must know them.
pub(super) fn compile_all<'a>(resources: &'a Resources) -> Vec<Attached<'a>> {
    resources
        .of_kind(crate::model::Kind::HttpRoute)
        .filter_map(|(key, resource)| match resource {
            crate::model::Resource::HttpRoute(document) => {
                let mut problems = crate::base::problems::Problems::of(key);
                super::route::compile(document, &mut problems).map(|route| Attached { document, route })
            }
            _ => None,
        })
        .collect()
}

fn to_the_service(service: &Named, port: u16, fault: Option<&Arc<Fault>>, backends: &mut Backends<'_>) -> RouteRule {
    let backend = backends.backend(service, port);
    RouteRule {
        name: RuleName::new("default"),
        hosts: Vec::new(),
        matches: Vec::new(),
        backends: vec![WeightedBackend { weight: 1, backend, request_headers: None, response_headers: None }],
        policies: RoutePolicies {
            fault: fault.map(Arc::clone),
            retry: Some(Arc::new(Retry::default())),
            ..RoutePolicies::default()
        },
    }
}

struct Common {
    backends: Vec<WeightedBackend>,
    policies: RoutePolicies,
}

impl Common {
    fn new(rule: &Rule, fault: Option<&Arc<Fault>>, all: &mut Backends<'_>) -> Self {
        let wanted = rule.backends.iter();
        let backends = wanted.map(|Wanted { weight, service, request_headers, response_headers }| WeightedBackend {
            weight: *weight,
            backend: service.as_ref().and_then(|(service, port)| all.backend(service, *port)),
            request_headers: request_headers.clone(),
            response_headers: response_headers.clone(),
        });
        let backends = backends.collect();
        for shadow in &rule.policies.shadow {
            // Built for the table of backends, where the request line looks for it.
            all.backend(&shadow.service, shadow.port);
        }
        Self { backends, policies: RoutePolicies { fault: fault.map(Arc::clone), ..rule.policies.clone() } }
    }
}
