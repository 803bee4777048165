//! The rules of one port of a service, in the order in which a request or a connection is compared with them.
//!
//! Source: Gateway API HTTPRoute v1, "Precedence": the host that is named most exactly, then path, method, headers and query
//! parameters, then the older route, then its name, then the order in it. Each match stands for itself: a rule with two
//! matches has two places. GRPCRoute has the same with service and method in place of the path.

use std::cmp::Reverse;
use std::sync::Arc;

use super::attached::{Attached, in_force};
use super::compile::Own;
use super::route::{Extension, Rule, Wanted};
use super::service::Backends;
use super::{BackendPolicies, RoutePolicies, RouteRule, StreamRule, WeightedBackend};
use crate::base::names::Named;
use crate::model::service::ServicePortSpec;
use crate::model::{Kind, route as model};
use crate::policy::RuleName;
use crate::policy::fault::Fault;
use crate::policy::matcher::Precedence;
use crate::policy::retry::Retry;
use crate::policy::shadow::Shadow;

/// The place of one match of one rule: the smaller one is compared first.
type Place<'a> = (Reverse<(u8, usize)>, Reverse<Precedence>, (bool, Option<&'a str>), &'a Named, usize, usize);

/// What is compared at a port.
pub(super) struct Table {
    pub(super) rules: Vec<Arc<RouteRule>>,
    /// Empty where requests are compared.
    pub(super) streams: Vec<StreamRule>,
}

/// The rules of a port. Without a route: the one that leads to the service itself.
pub(super) fn build(
    routes: &[Attached<'_>],
    service: &Named,
    port: &ServicePortSpec,
    fault: Option<&Arc<Fault>>,
    own: &Own,
    backends: &mut Backends<'_>,
) -> Table {
    let counting = in_force(routes, service, port, &own.workload.namespace);
    let are_streams = counting.first().is_some_and(|attached| matches!(attached.route.kind, Kind::TlsRoute | Kind::TcpRoute));
    if counting.is_empty() || are_streams {
        let rules = vec![Arc::new(to_the_service(service, port.port, fault, backends))];
        return Table { rules, streams: streams(&counting, backends) };
    }
    let mut placed = Vec::new();
    for Attached { document, route } in counting {
        let hosts: Vec<Option<&Box<str>>> =
            if route.hosts.is_empty() { vec![None] } else { route.hosts.iter().map(Some).collect() };
        for (index, rule) in route.rules.iter().enumerate() {
            // What all places of a rule share is built once.
            let common = Common::new(document, rule, fault, backends);
            for (match_index, one) in rule.matches.iter().enumerate() {
                for host in &hosts {
                    let place: Place<'_> = (
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
    Table { rules: placed.into_iter().map(|(_, rule)| rule).collect(), streams: Vec::new() }
}

/// The rules for connections, in the same order.
fn streams(routes: &[&Attached<'_>], all: &mut Backends<'_>) -> Vec<StreamRule> {
    let mut placed = Vec::new();
    for Attached { document, route } in routes {
        let hosts: Vec<Option<&Box<str>>> =
            if route.hosts.is_empty() { vec![None] } else { route.hosts.iter().map(Some).collect() };
        for rule in &route.rules {
            let backends = backends(document, &rule.backends, all);
            for host in &hosts {
                let place = (
                    Reverse(exactness(host.map(|host| &**host))),
                    (route.created.is_none(), route.created.as_deref()),
                    &route.name,
                );
                let hosts = host.map(|host| (*host).clone()).into_iter().collect();
                placed.push((place, StreamRule { name: rule.name.clone(), hosts, backends: backends.clone() }));
            }
        }
    }
    placed.sort_by_key(|(place, _)| *place);
    placed.into_iter().map(|(_, rule)| rule).collect()
}

/// How exactly a host is named: a whole name before a suffix, a longer one before a shorter one, any before none.
fn exactness(host: Option<&str>) -> (u8, usize) {
    match host {
        None => (0, 0),
        Some(host) if host.starts_with("*.") => (1, host.len()),
        Some(host) => (2, host.len()),
    }
}

fn to_the_service(service: &Named, port: u16, fault: Option<&Arc<Fault>>, backends: &mut Backends<'_>) -> RouteRule {
    let backend = backends.backend(service, port);
    RouteRule {
        name: RuleName::new("default"),
        hosts: Vec::new(),
        matches: Vec::new(),
        backends: vec![WeightedBackend { weight: 1, backend, policies: BackendPolicies::default() }],
        policies: RoutePolicies {
            fault: fault.map(Arc::clone),
            retry: Some(Arc::new(Retry::default())),
            ..RoutePolicies::default()
        },
    }
}

/// The backends of a rule: one that is not there, or that its namespace does not grant, is kept as broken.
fn backends(route: &model::Route<'_>, wanted: &[Wanted], all: &mut Backends<'_>) -> Vec<WeightedBackend> {
    let backends = wanted.iter().map(|Wanted { weight, service, policies }| {
        let granted = service.as_ref().filter(|(service, _)| all.permits(route, service));
        let backend = granted.and_then(|(service, port)| all.backend(service, *port));
        let mut policies = policies.clone();
        keep_granted(&mut policies.shadow, route, all);
        WeightedBackend { weight: *weight, backend, policies }
    });
    backends.collect()
}

/// Leaves the copies that may be sent where they are to go.
fn keep_granted(shadows: &mut Vec<Arc<Shadow>>, route: &model::Route<'_>, all: &mut Backends<'_>) {
    shadows.retain(|shadow| all.permits(route, &shadow.service));
    for shadow in shadows {
        // Built for the table of backends, where the request line looks for it.
        all.backend(&shadow.service, shadow.port);
    }
}

struct Common {
    backends: Vec<WeightedBackend>,
    policies: RoutePolicies,
}

impl Common {
    fn new(route: &model::Route<'_>, rule: &Rule, fault: Option<&Arc<Fault>>, all: &mut Backends<'_>) -> Self {
        let fault = match &rule.extension {
            None => fault.map(Arc::clone),
            Some(extension) => {
                let known = if let Extension::Policy(policy) = extension { all.fault_of(policy) } else { None };
                match known {
                    Some(fault) => Some(fault),
                    // A filter is never left out: what it would have been for goes nowhere.
                    None => return Self { backends: Vec::new(), policies: RoutePolicies::default() },
                }
            }
        };
        let backends = backends(route, &rule.backends, all);
        let mut policies = RoutePolicies { fault, ..rule.policies.clone() };
        keep_granted(&mut policies.shadow, route, all);
        Self { backends, policies }
    }
}
