//! What routes say about each other and about Services, and is not so: parents and backends that are not there or not
//! granted, kinds and matches of which another one counts.

use std::collections::{BTreeMap, BTreeSet};

use super::AppProtocol;
use super::attached::{KINDS, is_attached, rank};
use super::references::nearest;
use super::route;
use super::service::{self, NotLent, protocol};
use crate::base::names::Named;
use crate::base::problems::{Condition, FieldPath, Problems};
use crate::model::object::Object;
use crate::model::route::Route;
use crate::model::service::{ServicePortSpec, ServiceSpec};
use crate::model::{Kind, Resource, Resources};

/// The problems of one route, where it leads and what it is attached to.
pub(super) fn check(resources: &Resources, resource: &Resource, problems: &mut Problems) {
    let Some(object) = resource.route() else { return };
    check_parents(resources, &object, problems);
    let refused = format!("its share of {} is {}", route::carried(object.kind), route::refused(object.kind));
    for lead in object.leads().into_iter().filter(|lead| lead.is_service()) {
        let name = lead.named(&object);
        let outcome = if lead.is_mirror { "no copies are sent" } else { &refused };
        if !resources.permits(&object, &name) {
            let text = format!("Service/{name} is in another namespace, which does not grant it; {outcome}");
            let remedy = format!(
                "write a ReferenceGrant in {} from {} of {} to Service {}",
                name.namespace, object.kind, object.metadata.namespace, name.name
            );
            problems.warn_as(Condition::RefNotPermitted, &lead.at, text, remedy);
            continue;
        }
        let outcome = (outcome, Condition::BackendNotFound);
        if let Some(service) = existing(resources, &name, &lead.at.field("name"), outcome, problems)
            && let Some(port) = lead.port
        {
            check_port(service, port, &lead.at.field("port"), outcome, problems);
        }
    }
    for (at, extension) in object.extensions() {
        let name = Named::new(&*object.metadata.namespace, extension.name.as_str());
        let outcome = format!("the rule's {} are {}", route::carried(object.kind), route::refused(object.kind));
        if !route::is_ours(extension) {
            let text = format!("a {} of {:?} means nothing here; {outcome}", extension.kind, extension.group);
            problems.warn_as(Condition::InvalidKind, &at, text, "name a TrafficPolicy of outrigger.dev, or leave the filter out");
            continue;
        }
        match service::lent_by(resources, &name) {
            Ok(_fault) => {}
            Err(NotLent::Missing) => {
                let names = resources.of_kind(Kind::TrafficPolicy).filter(|(key, _)| key.name.namespace == name.namespace);
                let remedy = nearest(&name.name, names.map(|(key, _)| &*key.name.name));
                let text = format!("TrafficPolicy/{name} does not exist; {outcome}");
                problems.warn_as(Condition::BackendNotFound, &at.field("name"), text, remedy);
            }
            Err(NotLent::SaysMore) => {
                let text = format!("TrafficPolicy/{name} is not a fault and nothing else; {outcome}");
                let remedy = "write a TrafficPolicy of its own with the fault alone";
                problems.warn_as(Condition::InvalidKind, &at.field("name"), text, remedy);
            }
        }
    }
    check_weights(resource, problems);
    check_hosts(resource, problems);
}

fn check_parents(resources: &Resources, object: &Route<'_>, problems: &mut Problems) {
    let at = FieldPath::root().field("spec").field("parentRefs");
    if object.parents.is_empty() {
        problems.warn(&at, "the route has no parent; no request takes it", "name a Service as parent");
    }
    for (index, _) in object.parents.iter().enumerate().filter(|(_, parent)| !parent.is_service()) {
        let at = at.index(index).field("kind");
        problems.warn(&at, "the parent is not a Service; for the mesh it is not there", "write kind: Service");
    }
    for (index, parent, name) in object.service_parents() {
        let at = at.index(index);
        let (outcome, condition) = ("no request takes this route", Condition::NoMatchingParent);
        let Some(service) = existing(resources, &name, &at.field("name"), (outcome, condition), problems) else {
            continue;
        };
        if let Some(port) = parent.port {
            check_port(service, port, &at.field("port"), ("no request takes this route there", condition), problems);
        }
        if let Some(section) = &parent.section_name
            && !service.spec.ports.iter().any(|port| port.name.as_ref() == Some(section))
        {
            let text = format!("Service/{name} has no port named {section:?}");
            problems.warn_as(condition, &at.field("sectionName"), text, "name one of its ports, or write port");
        }
        let ports: Vec<&ServicePortSpec> = service.spec.ports.iter().filter(|port| port.is_tcp()).collect();
        let meant = ports.iter().copied().filter(|port| parent.takes(port.port, port.name.as_deref()));
        let meant: Vec<&ServicePortSpec> = meant.collect();
        check_kinds(resources, object, &name, &meant, &at, problems);
        let names_one = parent.port.is_some() || parent.section_name.is_some();
        let of_requests = matches!(object.kind, Kind::HttpRoute | Kind::GrpcRoute);
        let speaks = |port: &ServicePortSpec| protocol(port.app_protocol.as_deref(), port.name.as_deref());
        if names_one && of_requests && meant.iter().any(|port| speaks(port) == AppProtocol::Opaque) {
            let text = format!("the port of Service/{name} is declared opaque, so that no request of it is seen");
            problems.warn(&at, text, "declare the port as http, http2 or grpc, or write a TCPRoute");
        }
    }
}

/// Of several kinds of routes at one port one counts.
fn check_kinds(
    resources: &Resources,
    object: &Route<'_>,
    service: &Named,
    ports: &[&ServicePortSpec],
    at: &FieldPath,
    problems: &mut Problems,
) {
    let before = KINDS.into_iter().filter(|kind| rank(*kind) < rank(object.kind));
    let rivals = before.flat_map(|kind| resources.of_kind(kind)).filter_map(|(key, resource)| Some((key, resource.route()?)));
    // Routes for callers of one namespace do not compete with those for all.
    let rivals: Vec<_> = rivals.filter(|(_, rival)| rival.metadata.namespace == object.metadata.namespace).collect();
    let mut lost = BTreeSet::new();
    let mut first = None;
    for port in ports {
        if let Some((key, _)) = rivals.iter().find(|(_, rival)| is_attached(rival, service, port)) {
            lost.insert(port.port);
            first = first.or(Some(key));
        }
    }
    let Some(first) = first else { return };
    let remedy = "keep routes of one kind there, or name different ports";
    if lost.len() == ports.len() {
        let text = format!("{first} is attached there too, and {} goes before {}", first.kind, object.kind);
        problems.warn_as(Condition::Conflicted, at, text, remedy);
    } else {
        let lost = lost.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
        let text = format!("{first} is attached to {lost} too, and {} goes before {} there", first.kind, object.kind);
        problems.warn(at, text, remedy);
    }
}

fn check_weights(resource: &Resource, problems: &mut Problems) {
    let rules = FieldPath::root().field("spec").field("rules");
    let weights: Vec<(bool, Vec<Option<u32>>)> = match resource {
        Resource::HttpRoute(route) => {
            let rules = route.spec.rules.iter();
            let is_answered = |rule: &crate::model::http_route::HttpRouteRule| {
                rule.filters.iter().any(|filter| filter.request_redirect.is_some())
            };
            rules.map(|rule| (is_answered(rule), rule.backend_refs.iter().map(|backend| backend.weight).collect())).collect()
        }
        Resource::GrpcRoute(route) => route
            .spec
            .rules
            .iter()
            .map(|rule| (false, rule.backend_refs.iter().map(|backend| backend.weight).collect()))
            .collect(),
        Resource::TlsRoute(route) => route
            .spec
            .rules
            .iter()
            .map(|rule| (false, rule.backend_refs.iter().map(|backend| backend.weight).collect()))
            .collect(),
        Resource::TcpRoute(route) => route
            .spec
            .rules
            .iter()
            .map(|rule| (false, rule.backend_refs.iter().map(|backend| backend.weight).collect()))
            .collect(),
        _no_route => return,
    };
    let kind = resource.key().kind;
    for (index, (_, weights)) in weights.iter().enumerate().filter(|(_, (is_answered, _))| !is_answered) {
        if weights.iter().all(|weight| *weight == Some(0)) {
            let at = rules.index(index).field("backendRefs");
            let text = format!("the rule leads nowhere; its {} are {}", route::carried(kind), route::refused(kind));
            problems.warn(&at, text, "name a Service with a weight");
        }
    }
}

fn existing<'a>(
    resources: &'a Resources,
    name: &Named,
    at: &FieldPath,
    (outcome, condition): (&str, Condition),
    problems: &mut Problems,
) -> Option<&'a Object<ServiceSpec>> {
    let service = resources.service(name);
    if service.is_none() {
        let names = resources.of_kind(Kind::Service).filter(|(other, _)| other.name.namespace == name.namespace);
        let remedy = nearest(&name.name, names.map(|(other, _)| &*other.name.name));
        problems.warn_as(condition, at, format!("Service/{name} does not exist; {outcome}"), remedy);
    }
    service
}

fn check_port(
    service: &Object<ServiceSpec>,
    port: u16,
    at: &FieldPath,
    (outcome, condition): (&str, Condition),
    problems: &mut Problems,
) {
    let ports: Vec<String> = service.spec.ports.iter().filter(|port| port.is_tcp()).map(|port| port.port.to_string()).collect();
    if !ports.contains(&port.to_string()) {
        let remedy = if ports.is_empty() { "give the Service ports".to_owned() } else { format!("it has {}", ports.join(", ")) };
        problems.warn_as(condition, at, format!("{} has no port {port}; {outcome}", service.key()), remedy);
    }
}

/// What two matches have in common of which the later one is never reached: kind, Service, callers and port, host, match.
type Same = (Kind, Named, String, String, String);

/// Two matches that are the same, at the same port of the same service: the later one is never reached.
pub(super) fn contradictions(resources: &Resources) -> Problems {
    let mut all = Problems::default();
    let mut first: BTreeMap<Same, (String, FieldPath)> = BTreeMap::new();
    let routes = KINDS.into_iter().flat_map(|kind| resources.of_kind(kind));
    let mut routes: Vec<_> = routes.filter_map(|(key, resource)| Some((key, resource, resource.route()?))).collect();
    // The order in which two routes that match alike are asked.
    routes.sort_by_key(|(_, _, route)| {
        let created = route.metadata.creation_timestamp.clone();
        (created.is_none(), created, route.named())
    });
    for (key, resource, object) in routes {
        let mut problems = Problems::of(key);
        let matches = matches(resource);
        let what = route::carried(object.kind);
        for (_, parent, service) in object.service_parents() {
            // Routes for callers of one namespace do not compete with those for all.
            let callers = if *service.namespace == *object.metadata.namespace { "" } else { object.metadata.namespace.as_str() };
            let port = match (&parent.port, &parent.section_name) {
                (Some(port), _) => port.to_string(),
                (None, Some(name)) => {
                    let ports = resources.service(&service).map_or(&[][..], |service| service.spec.ports.as_slice());
                    let named = ports.iter().find(|port| port.name.as_ref() == Some(name));
                    named.map_or_else(|| name.clone(), |port| port.port.to_string())
                }
                (None, None) => "*".to_owned(),
            };
            for host in hosts(resource) {
                for (at, one) in &matches {
                    let place = format!("{callers}|{port}");
                    let same = (object.kind, service.clone(), place, host.to_ascii_lowercase(), one.clone());
                    let this = (key.to_string(), at.clone());
                    let Some((other, other_at)) = first.get(&same) else {
                        first.insert(same, this);
                        continue;
                    };
                    let mine = *other == this.0;
                    let whose = if mine { String::new() } else { format!("{other} ") };
                    problems.warn_as(
                        Condition::OverlappingMatches,
                        at,
                        format!("{whose}{other_at} matches the same {what} to Service/{service} and is asked first"),
                        if mine { "keep one of the two" } else { "keep one of the two, or let them match different requests" },
                    );
                }
            }
        }
        all.append(problems);
    }
    all
}

/// Are hosts named that nobody asks for?
fn check_hosts(resource: &Resource, problems: &mut Problems) {
    let hostnames = match resource {
        Resource::HttpRoute(route) => &route.spec.hostnames,
        Resource::GrpcRoute(route) => &route.spec.hostnames,
        _asked_for_or_without => return,
    };
    if !hostnames.is_empty() {
        problems.warn(
            &FieldPath::root().field("spec").field("hostnames"),
            "hostnames mean nothing where the parent is a Service: the route is for every host",
            "leave them out, or match the header Host in the rules",
        );
    }
}

/// The hosts of a route, `*` for every one.
fn hosts(resource: &Resource) -> Vec<String> {
    let hosts = match resource {
        Resource::TlsRoute(route) => route.spec.hostnames.clone(),
        _without => Vec::new(),
    };
    if hosts.is_empty() { vec!["*".to_owned()] } else { hosts }
}

/// What each rule of a route matches, as a text that is the same for equal matches.
fn matches(resource: &Resource) -> Vec<(FieldPath, String)> {
    let rules_at = FieldPath::root().field("spec").field("rules");
    let placed = |index: usize, is_written: bool, matches: Vec<String>| {
        let rule_at = rules_at.index(index);
        let places = matches.into_iter().enumerate();
        let places = places.map(move |(match_index, one)| {
            let at = if is_written { rule_at.field("matches").index(match_index) } else { rule_at.clone() };
            (at, one)
        });
        places.collect::<Vec<_>>()
    };
    match resource {
        Resource::HttpRoute(document) => {
            let rules = document.spec.rules.iter().enumerate();
            rules
                .flat_map(|(index, rule)| {
                    let matches = route::matches(rule).iter().map(|one| format!("{one:?}")).collect();
                    placed(index, !rule.matches.is_empty(), matches)
                })
                .collect()
        }
        Resource::GrpcRoute(document) => {
            let rules = document.spec.rules.iter().enumerate();
            rules
                .flat_map(|(index, rule)| {
                    let mut matches: Vec<String> = rule.matches.iter().map(|one| format!("{one:?}")).collect();
                    if matches.is_empty() {
                        matches.push(format!("{:?}", crate::policy::grpc::CallMatchConfig::default()));
                    }
                    placed(index, !rule.matches.is_empty(), matches)
                })
                .collect()
        }
        Resource::TlsRoute(document) if !document.spec.rules.is_empty() => placed(0, false, vec![String::new()]),
        Resource::TcpRoute(document) if !document.spec.rules.is_empty() => placed(0, false, vec![String::new()]),
        _without => Vec::new(),
    }
}
