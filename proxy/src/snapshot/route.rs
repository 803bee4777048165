//! A route by itself: what each of its rules matches, does and leads to, before it is known what exists.
//!
//! Source: Gateway API HTTPRoute, GRPCRoute, TLSRoute and TCPRoute v1, and GEP-1294 (routes of a mesh).

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{BackendPolicies, RoutePolicies};
use crate::base::names::Named;
use crate::base::problems::{Condition, FieldPath, Problems};
use crate::model::http_route::{ExtensionRef, FilterType, HttpBackendRef, HttpRouteFilter, HttpRouteRule};
use crate::model::route::{self, ParentRef, StreamRule};
use crate::model::{Kind, Resource};
use crate::policy::RuleName;
use crate::policy::matcher::{RequestMatch, RequestMatchConfig};
use crate::policy::retry::Retry;

/// A route whose every part compiles.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) kind: Kind,
    pub(super) name: Named,
    /// RFC 3339, which sorts as text.
    pub(super) created: Option<String>,
    /// Lower case.
    pub(super) hosts: Vec<Box<str>>,
    pub(super) rules: Vec<Rule>,
}

/// One rule of it.
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) name: RuleName,
    /// Never empty where the route is for requests: a rule that names no match has the one that matches everything.
    pub(super) matches: Vec<RequestMatch>,
    pub(super) policies: RoutePolicies,
    /// The policy of which its requests meet the fault, in place of the service's.
    pub(super) extension: Option<Extension>,
    pub(super) backends: Vec<Wanted>,
}

/// A backend that the rule names.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) weight: u32,
    /// None: it is not a Service.
    pub(super) service: Option<(Named, u16)>,
    pub(super) policies: BackendPolicies,
}

/// A backend, whatever kind of route names it.
struct Written<'a> {
    is_service: bool,
    namespace: Option<&'a str>,
    name: &'a str,
    port: Option<u16>,
    weight: Option<u32>,
}

/// The largest weight that Gateway API takes.
const WEIGHT_MAX: u32 = 1_000_000;

/// Reports every fault of the route and returns it only if there is none; nothing of what is no route.
pub(super) fn compile(resource: &Resource, problems: &mut Problems) -> Option<Route> {
    let document = resource.route()?;
    let at = FieldPath::root().field("spec");
    check_parents(document.parents, &at.field("parentRefs"), problems);
    let rules_at = |index: usize| at.field("rules").index(index);
    let name = |index: usize, named: &Option<String>| rule_name(&document, index, named.as_deref());
    let (hostnames, rules): (&[String], Vec<Option<Rule>>) = match resource {
        Resource::HttpRoute(route) => {
            check_names(route.spec.rules.iter().map(|rule| rule.name.as_deref()), problems);
            let rules = route.spec.rules.iter().enumerate();
            let rules =
                rules.map(|(index, rule)| request_rule(&document, rule, name(index, &rule.name), &rules_at(index), problems));
            (&route.spec.hostnames, rules.collect())
        }
        Resource::GrpcRoute(route) => {
            check_names(route.spec.rules.iter().map(|rule| rule.name.as_deref()), problems);
            let rules = route.spec.rules.iter().enumerate();
            let rules = rules.map(|(index, rule)| {
                let at = rules_at(index);
                let matches = rule.matches.iter().enumerate();
                let matches: Vec<_> =
                    matches.map(|(index, one)| one.compile(&at.field("matches").index(index), problems)).collect();
                let mut matches = matches.into_iter().collect::<Option<Vec<_>>>()?;
                if matches.is_empty() {
                    matches.extend(crate::policy::grpc::CallMatchConfig::default().compile(&at, problems));
                }
                let name = name(index, &rule.name);
                let policies = filters(&document, &rule.filters, &matches, &name, &at, problems)?;
                let policies = RoutePolicies { retry: Some(Arc::new(Retry::default())), ..policies };
                let backends =
                    backends(&document, &rule.backend_refs, &Around { matches: &matches, policies: &policies }, &at, problems)?;
                Some(Rule { name, matches, policies, extension: extension(&document, &rule.filters), backends })
            });
            (&route.spec.hostnames, rules.collect())
        }
        Resource::TlsRoute(route) => {
            if route.spec.hostnames.is_empty() {
                problems.refuse(&at.field("hostnames"), "the route names no server", "write the names that clients ask for");
            }
            (&route.spec.hostnames, stream_rules(&document, &route.spec.rules, &at.field("rules"), problems))
        }
        Resource::TcpRoute(route) => (&[], stream_rules(&document, &route.spec.rules, &at.field("rules"), problems)),
        _no_route => return None,
    };
    let hosts = hosts(hostnames, &at.field("hostnames"), problems);
    let hosts = if asks_hosts(document.kind) { hosts } else { Vec::new() };
    let rules = rules.into_iter().collect::<Option<Vec<_>>>()?;
    let created = document.metadata.creation_timestamp.clone();
    (!problems.refused()).then(|| Route { kind: document.kind, name: document.named(), created, hosts, rules })
}

/// Is a route of this kind for the hosts alone that it names? GEP-1294, "hostnames field": "GAMMA implementations SHOULD NOT infer any
/// functionality from the `hostnames` field". A TLSRoute has nothing else to go by: without it, it would be a TCPRoute.
const fn asks_hosts(kind: Kind) -> bool {
    matches!(kind, Kind::TlsRoute)
}

/// The match as Gateway API fills it in: without a path, every path.
fn filled_in(written: &RequestMatchConfig) -> RequestMatchConfig {
    RequestMatchConfig { path: Some(written.path.clone().unwrap_or_default()), ..written.clone() }
}

/// The matches of a rule as Gateway API fills them in: without one, every request.
pub(super) fn matches(rule: &HttpRouteRule) -> Vec<RequestMatchConfig> {
    if rule.matches.is_empty() {
        vec![filled_in(&RequestMatchConfig::default())]
    } else {
        rule.matches.iter().map(filled_in).collect()
    }
}

/// `KIND/NAMESPACE/NAME rules[I]`, and the name that people gave it.
fn rule_name(route: &route::Route<'_>, index: usize, named: Option<&str>) -> RuleName {
    let named = named.map(|name| format!(" {name}")).unwrap_or_default();
    RuleName::new(format!("{}/{} rules[{index}]{named}", route.kind, route.named()))
}

fn check_parents(parents: &[ParentRef], at: &FieldPath, problems: &mut Problems) {
    for (index, parent) in parents.iter().enumerate() {
        if parent.port == Some(0) {
            problems.refuse(&at.index(index).field("port"), "0 is not a port", "write a port of the Service, or leave it out");
        }
    }
}

fn check_names<'a>(names: impl Iterator<Item = Option<&'a str>>, problems: &mut Problems) {
    let mut seen = BTreeSet::new();
    for (index, name) in names.enumerate() {
        let Some(name) = name else { continue };
        let at = FieldPath::root().field("spec").field("rules").index(index).field("name");
        if let Err(error) = crate::base::names::check_name(name) {
            problems.refuse(&at, error.to_string(), "write a name, or leave it out");
        }
        if !seen.insert(name) {
            problems.refuse(&at, format!("another rule is named {name:?}"), "give each rule a name of its own");
        }
    }
}

fn hosts(hostnames: &[String], at: &FieldPath, problems: &mut Problems) -> Vec<Box<str>> {
    let mut hosts = Vec::new();
    for (index, host) in hostnames.iter().enumerate() {
        let lower = host.to_ascii_lowercase();
        if is_hostname(&lower) {
            hosts.push(lower.into_boxed_str());
        } else {
            let text = format!("{host:?} is not a host name");
            let remedy = "write a name without port and path, with \"*.\" in front for every name below it";
            problems.refuse(&at.index(index), text, remedy);
        }
    }
    hosts
}

fn request_rule(
    route: &route::Route<'_>,
    rule: &HttpRouteRule,
    name: RuleName,
    at: &FieldPath,
    problems: &mut Problems,
) -> Option<Rule> {
    let matches = matches(rule).into_iter().enumerate();
    let matches: Vec<_> = matches.map(|(index, one)| one.compile(&at.field("matches").index(index), problems)).collect();
    let matches = matches.into_iter().collect::<Option<Vec<_>>>()?;

    let mut policies = filters(route, &rule.filters, &matches, &name, at, problems)?;
    if let Some(timeouts) = &rule.timeouts {
        policies.timeouts = timeouts.compile(&at.field("timeouts"), problems).unwrap_or_default();
    }
    let retry = match &rule.retry {
        Some(retry) => retry.compile(&at.field("retry"), problems),
        None => Some(Retry::default()),
    };
    policies.retry = retry.map(Arc::new);
    if policies.redirect.is_some() && !rule.backend_refs.is_empty() {
        let text = "the rule redirects its requests, so that none goes to a backend";
        problems.refuse_as(Condition::IncompatibleFilters, &at.field("backendRefs"), text, "keep the filter or the backends");
    }
    let backends = backends(route, &rule.backend_refs, &Around { matches: &matches, policies: &policies }, at, problems)?;
    let extension = extension(route, &rule.filters);
    (!problems.refused()).then_some(Rule { name, matches, policies, extension, backends })
}

/// What the filters of a rule do.
fn filters(
    route: &route::Route<'_>,
    filters: &[HttpRouteFilter],
    matches: &[RequestMatch],
    rule: &RuleName,
    at: &FieldPath,
    problems: &mut Problems,
) -> Option<RoutePolicies> {
    let mut policies = RoutePolicies::default();
    let mut seen = BTreeSet::new();
    for (index, filter) in filters.iter().enumerate() {
        let at = at.field("filters").index(index);
        if !is_well_formed(filter, &at, problems) {
            continue;
        }
        let of_http = matches!(filter.kind, FilterType::UrlRewrite | FilterType::RequestRedirect | FilterType::Cors);
        if of_http && route.kind == Kind::GrpcRoute {
            problems.refuse(&at, "a GRPCRoute has no such filter", "leave it out, or write an HTTPRoute");
            continue;
        }
        if filter.kind != FilterType::RequestMirror && !seen.insert(filter.kind) {
            let (text, remedy) = ("the rule has this filter already", "write one filter that does both");
            problems.refuse_as(Condition::IncompatibleFilters, &at, text, remedy);
            continue;
        }
        let HttpRouteFilter {
            kind: _,
            request_header_modifier,
            response_header_modifier,
            url_rewrite,
            request_mirror,
            request_redirect,
            cors,
            // What it refers to is looked for where the rules are put together.
            extension_ref: _,
        } = filter;
        if let Some(edit) = request_header_modifier {
            policies.request_headers = edit.compile(&at.field("requestHeaderModifier"), problems).map(Arc::new);
        }
        if let Some(edit) = response_header_modifier {
            policies.response_headers = edit.compile(&at.field("responseHeaderModifier"), problems).map(Arc::new);
        }
        if let Some(rewrite) = url_rewrite {
            policies.rewrite = rewrite.compile(matches, &at.field("urlRewrite"), problems).map(Arc::new);
        }
        if let Some(mirror) = request_mirror {
            let shadow = mirror.compile(&route.metadata.namespace, &at.field("requestMirror"), problems);
            policies.shadow.extend(shadow.map(Arc::new));
        }
        if let Some(redirect) = request_redirect {
            policies.redirect = redirect.compile(matches, &at.field("requestRedirect"), problems).map(Arc::new);
        }
        if let Some(cors) = cors {
            policies.cors = cors.compile(rule.clone(), &at.field("cors"), problems).map(Arc::new);
        }
    }
    if policies.redirect.is_some() && (policies.rewrite.is_some() || !policies.shadow.is_empty()) {
        let text = "what is redirected is sent nowhere: it can neither be rewritten nor copied";
        let remedy = "keep RequestRedirect, or URLRewrite and RequestMirror";
        problems.refuse_as(Condition::IncompatibleFilters, &at.field("filters"), text, remedy);
    }
    (!problems.refused()).then_some(policies)
}

/// What a rule's filters refer to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Extension {
    /// A policy of which the rule may take something.
    Policy(Named),
    /// Something that means nothing here. "The filter MUST NOT be skipped" (Gateway API, HTTPRouteFilter).
    Unknown,
}

/// Is that a policy of which a rule can take something?
pub(super) fn is_ours(extension: &ExtensionRef) -> bool {
    let ours = Kind::TrafficPolicy;
    let group = ours.api_version().split('/').next();
    group == Some(extension.group.as_str()) && extension.kind == ours.as_str()
}

fn extension(route: &route::Route<'_>, filters: &[HttpRouteFilter]) -> Option<Extension> {
    let extension = filters.iter().find_map(|filter| filter.extension_ref.as_ref())?;
    Some(match is_ours(extension) {
        true => Extension::Policy(Named::new(&*route.metadata.namespace, extension.name.as_str())),
        false => Extension::Unknown,
    })
}

fn backends(
    route: &route::Route<'_>,
    written: &[HttpBackendRef],
    rule: &Around<'_>,
    at: &FieldPath,
    problems: &mut Problems,
) -> Option<Vec<Wanted>> {
    let backends = written.iter().enumerate();
    let backends: Vec<_> = backends
        .map(|(index, backend)| {
            let at = at.field("backendRefs").index(index);
            let HttpBackendRef { group, kind, name, namespace, port, weight, filters } = backend;
            let is_service = route::is_service(group.as_deref(), kind.as_deref());
            let written = Written { is_service, namespace: namespace.as_deref(), name, port: *port, weight: *weight };
            let wanted = wanted(route, &written, &at, problems);
            let policies = backend_filters(route, filters, rule, &at, problems);
            let wanted = Wanted { policies: policies?, ..wanted? };
            // "The filter MUST NOT be skipped": its share meets what leads nowhere.
            let is_extended = filters.iter().any(|filter| filter.kind == FilterType::ExtensionRef);
            Some(Wanted { service: wanted.service.filter(|_| !is_extended), ..wanted })
        })
        .collect();
    backends.into_iter().collect()
}

/// The one rule of a route for connections.
fn stream_rules(route: &route::Route<'_>, rules: &[StreamRule], at: &FieldPath, problems: &mut Problems) -> Vec<Option<Rule>> {
    if rules.len() != 1 {
        let text = format!("the route has {} rules", rules.len());
        problems.refuse(at, text, format!("write exactly one; for another, write another {}", route.kind));
    }
    let rules = rules.iter().enumerate().map(|(index, rule)| {
        let at = at.index(index);
        if rule.backend_refs.is_empty() {
            problems.refuse(&at.field("backendRefs"), "the rule leads nowhere", "name a Service");
        }
        let backends = rule.backend_refs.iter().enumerate().map(|(index, backend)| {
            let at = at.field("backendRefs").index(index);
            let is_service = route::is_service(backend.group.as_deref(), backend.kind.as_deref());
            let route::BackendRef { name, namespace, port, weight, .. } = backend;
            let written = Written { is_service, namespace: namespace.as_deref(), name, port: *port, weight: *weight };
            wanted(route, &written, &at, problems)
        });
        let backends = backends.collect::<Vec<_>>().into_iter().collect::<Option<Vec<_>>>()?;
        let name = rule_name(route, index, rule.name.as_deref());
        Some(Rule { name, matches: Vec::new(), policies: RoutePolicies::default(), extension: None, backends })
    });
    rules.collect()
}

fn wanted(route: &route::Route<'_>, written: &Written<'_>, at: &FieldPath, problems: &mut Problems) -> Option<Wanted> {
    let weight = written.weight.unwrap_or(1);
    let mut good = true;
    if weight > WEIGHT_MAX {
        let text = format!("the weight {weight} is too large");
        problems.refuse(&at.field("weight"), text, format!("write at most {WEIGHT_MAX}"));
        good = false;
    }
    let mut service = None;
    if !written.is_service {
        let text = format!("the backend is not a Service; its share of {} is {}", carried(route.kind), refused(route.kind));
        problems.warn_as(Condition::InvalidKind, &at.field("kind"), text, "lead to a Service");
    } else {
        match written.port {
            Some(port) if port > 0 => {
                let namespace = written.namespace.unwrap_or(&route.metadata.namespace);
                service = Some((Named::new(namespace, written.name), port));
            }
            _ => {
                problems.refuse(&at.field("port"), "a Service as backend needs a port", "write a port of the Service");
                good = false;
            }
        }
    }
    good.then_some(Wanted { weight, service, policies: BackendPolicies::default() })
}

/// What a route of this kind is about.
pub(super) fn carried(kind: Kind) -> &'static str {
    match kind {
        Kind::TlsRoute | Kind::TcpRoute => "connections",
        Kind::GrpcRoute => "calls",
        _ => "requests",
    }
}

/// What becomes of it where it cannot be sent anywhere.
pub(super) fn refused(kind: Kind) -> &'static str {
    match kind {
        Kind::TlsRoute | Kind::TcpRoute => "closed",
        Kind::GrpcRoute => "ended with UNAVAILABLE",
        _ => "answered with 500",
    }
}

/// What the rule says around the filters of its backends.
struct Around<'a> {
    matches: &'a [RequestMatch],
    policies: &'a RoutePolicies,
}

/// What the filters of a backend do.
fn backend_filters(
    route: &route::Route<'_>,
    filters: &[HttpRouteFilter],
    rule: &Around<'_>,
    at: &FieldPath,
    problems: &mut Problems,
) -> Option<BackendPolicies> {
    let mut policies = BackendPolicies::default();
    let mut good = true;
    let mut seen = BTreeSet::new();
    for (index, filter) in filters.iter().enumerate() {
        let at = at.field("filters").index(index);
        if !is_well_formed(filter, &at, problems) {
            good = false;
            continue;
        }
        if filter.kind != FilterType::RequestMirror && !seen.insert(filter.kind) {
            let (text, remedy) = ("the backend has this filter already", "write one filter that does both");
            problems.refuse_as(Condition::IncompatibleFilters, &at, text, remedy);
            good = false;
        }
        match filter.kind {
            FilterType::RequestHeaderModifier => {
                let edit = filter.request_header_modifier.as_ref();
                policies.request_headers = edit.and_then(|edit| edit.compile(&at.field("requestHeaderModifier"), problems));
                good &= policies.request_headers.is_some();
            }
            FilterType::ResponseHeaderModifier => {
                let edit = filter.response_header_modifier.as_ref();
                policies.response_headers = edit.and_then(|edit| edit.compile(&at.field("responseHeaderModifier"), problems));
                good &= policies.response_headers.is_some();
            }
            FilterType::RequestMirror => {
                let mirror = filter.request_mirror.as_ref();
                let shadow =
                    mirror.and_then(|mirror| mirror.compile(&route.metadata.namespace, &at.field("requestMirror"), problems));
                good &= shadow.is_some();
                policies.shadow.extend(shadow.map(Arc::new));
            }
            FilterType::UrlRewrite if route.kind == Kind::GrpcRoute => {
                problems.refuse(&at, "a GRPCRoute has no such filter", "leave it out, or write an HTTPRoute");
                good = false;
            }
            FilterType::UrlRewrite if rule.policies.rewrite.is_some() => {
                let (text, remedy) = ("the rule rewrites its requests already", "keep one of the two");
                problems.refuse_as(Condition::IncompatibleFilters, &at, text, remedy);
                good = false;
            }
            FilterType::UrlRewrite => {
                let rewrite = filter.url_rewrite.as_ref();
                policies.rewrite =
                    rewrite.and_then(|rewrite| rewrite.compile(rule.matches, &at.field("urlRewrite"), problems)).map(Arc::new);
                good &= policies.rewrite.is_some();
            }
            FilterType::ExtensionRef => {
                let Some(ExtensionRef { kind, group, .. }) = &filter.extension_ref else { continue };
                let outcome = format!("its share of {} is {}", carried(route.kind), refused(route.kind));
                let text = format!("a {kind} of {group:?} means nothing at a backend; {outcome}");
                let remedy = "leave the filter out; one of the rule's may name a TrafficPolicy of outrigger.dev";
                problems.warn_as(Condition::InvalidKind, &at.field("extensionRef"), text, remedy);
            }
            FilterType::RequestRedirect | FilterType::Cors => {
                problems.refuse(&at, "this filter cannot stand at a backend", "move it to the rule's filters");
                good = false;
            }
        }
    }
    good.then_some(policies)
}

/// Is exactly the field there that the filter's type names?
fn is_well_formed(filter: &HttpRouteFilter, at: &FieldPath, problems: &mut Problems) -> bool {
    let HttpRouteFilter {
        kind,
        request_header_modifier,
        response_header_modifier,
        url_rewrite,
        request_mirror,
        request_redirect,
        cors,
        extension_ref,
    } = filter;
    let fields = [
        (FilterType::RequestHeaderModifier, "requestHeaderModifier", request_header_modifier.is_some()),
        (FilterType::ResponseHeaderModifier, "responseHeaderModifier", response_header_modifier.is_some()),
        (FilterType::UrlRewrite, "urlRewrite", url_rewrite.is_some()),
        (FilterType::RequestMirror, "requestMirror", request_mirror.is_some()),
        (FilterType::RequestRedirect, "requestRedirect", request_redirect.is_some()),
        (FilterType::Cors, "cors", cors.is_some()),
        (FilterType::ExtensionRef, "extensionRef", extension_ref.is_some()),
    ];
    let mut good = true;
    for (of, field, is_there) in fields {
        if of == *kind && !is_there {
            problems.refuse(at, format!("the filter has no {field}"), format!("write {field}, or another type"));
            good = false;
        }
        if of != *kind && is_there {
            let remedy = "write a filter of its own for it";
            problems.refuse(&at.field(field), format!("{field} belongs to another type of filter"), remedy);
            good = false;
        }
    }
    good
}

/// A DNS name, or one below which every name is meant.
fn is_hostname(host: &str) -> bool {
    let name = host.strip_prefix("*.").unwrap_or(host);
    crate::base::names::check_name(name).is_ok() && name.parse::<std::net::IpAddr>().is_err()
}
