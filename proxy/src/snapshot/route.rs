//! An HTTPRoute by itself: what each of its rules matches, does and leads to, before it is known what exists.
//!
//! Source: Gateway API HTTPRoute v1 and GEP-1426 (routes of a mesh).

use std::collections::BTreeSet;
use std::sync::Arc;

use super::RoutePolicies;
use crate::base::names::Named;
use crate::base::problems::{Condition, FieldPath, Problems};
use crate::model::http_route::{BackendRef, FilterType, HttpRouteFilter, HttpRouteRule, HttpRouteSpec};
use crate::model::object::Object;
use crate::policy::RuleName;
use crate::policy::headers::HeaderEdit;
use crate::policy::matcher::{RequestMatch, RequestMatchConfig};
use crate::policy::retry::Retry;

/// A route whose every part compiles.
#[derive(Debug)]
pub(super) struct Route {
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
    /// Never empty: a rule that names no match has the one that matches everything.
    pub(super) matches: Vec<RequestMatch>,
    pub(super) policies: RoutePolicies,
    pub(super) backends: Vec<Wanted>,
}

/// A backend that the rule names.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) weight: u32,
    /// None: it is not a Service.
    pub(super) service: Option<(Named, u16)>,
    pub(super) request_headers: Option<HeaderEdit>,
    pub(super) response_headers: Option<HeaderEdit>,
}

/// The largest weight that Gateway API takes.
const WEIGHT_MAX: u32 = 1_000_000;

/// Reports every fault of the route and returns it only if there is none.
pub(super) fn compile(route: &Object<HttpRouteSpec>, problems: &mut Problems) -> Option<Route> {
    let at = FieldPath::root().field("spec");
    let name = route.named();
    for (index, parent) in route.spec.parent_refs.iter().enumerate() {
        if parent.port == Some(0) {
            problems.refuse(
                &at.field("parentRefs").index(index).field("port"),
                "0 is not a port",
                "write a port of the Service, or leave it out",
            );
        }
    }
    let mut hosts = Vec::new();
    for (index, host) in route.spec.hostnames.iter().enumerate() {
        let lower = host.to_ascii_lowercase();
        if is_hostname(&lower) {
            hosts.push(lower.into_boxed_str());
        } else {
            let text = format!("{host:?} is not a host name");
            let remedy = "write a name without port and path, with \"*.\" in front for every name below it";
            problems.refuse(&at.field("hostnames").index(index), text, remedy);
        }
    }
    let rules = route.spec.rules.iter().enumerate();
    let rules: Vec<_> = rules
        .map(|(index, rule)| {
            let name = RuleName::new(format!("HTTPRoute/{name} rules[{index}]"));
            compile_rule(route, rule, name, &at.field("rules").index(index), problems)
        })
        .collect();
    let rules = rules.into_iter().collect::<Option<Vec<_>>>()?;
    (!problems.refused()).then(|| Route { name, created: route.metadata.creation_timestamp.clone(), hosts, rules })
}

/// The match as Gateway API fills it in: without a path, every path.
pub(super) fn filled_in(written: &RequestMatchConfig) -> RequestMatchConfig {
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

fn compile_rule(
    route: &Object<HttpRouteSpec>,
    rule: &HttpRouteRule,
    name: RuleName,
    at: &FieldPath,
    problems: &mut Problems,
) -> Option<Rule> {
    let matches = matches(rule).into_iter().enumerate();
    let matches: Vec<_> = matches.map(|(index, one)| one.compile(&at.field("matches").index(index), problems)).collect();
    let matches = matches.into_iter().collect::<Option<Vec<_>>>()?;

    let mut policies = RoutePolicies::default();
    let mut seen = BTreeSet::new();
    for (index, filter) in rule.filters.iter().enumerate() {
        let at = at.field("filters").index(index);
        if !is_well_formed(filter, &at, problems) {
            continue;
        }
        if filter.kind != FilterType::RequestMirror && !seen.insert(filter.kind) {
            problems.refuse_as(
                Condition::IncompatibleFilters,
                &at,
                "the rule has this filter already",
                "write one filter that does both",
            );
            continue;
        }
        let HttpRouteFilter { kind: _, request_header_modifier, response_header_modifier, url_rewrite, request_mirror } = filter;
        if let Some(edit) = request_header_modifier {
            policies.request_headers = edit.compile(&at.field("requestHeaderModifier"), problems).map(Arc::new);
        }
        if let Some(edit) = response_header_modifier {
            policies.response_headers = edit.compile(&at.field("responseHeaderModifier"), problems).map(Arc::new);
        }
        if let Some(rewrite) = url_rewrite {
            policies.rewrite = rewrite.compile(&matches, &at.field("urlRewrite"), problems).map(Arc::new);
        }
        if let Some(mirror) = request_mirror {
            let shadow = mirror.compile(&route.metadata.namespace, &at.field("requestMirror"), problems);
            policies.shadow.extend(shadow.map(Arc::new));
        }
    }
    if let Some(timeouts) = &rule.timeouts {
        policies.timeouts = timeouts.compile(&at.field("timeouts"), problems).unwrap_or_default();
    }
    let retry = match &rule.retry {
        Some(retry) => retry.compile(&at.field("retry"), problems),
        None => Some(Retry::default()),
    };
    policies.retry = retry.map(Arc::new);

    let backends = rule.backend_refs.iter().enumerate();
    let backends: Vec<_> = backends
        .map(|(index, backend)| compile_backend(route, backend, &at.field("backendRefs").index(index), problems))
        .collect();
    let backends = backends.into_iter().collect::<Option<Vec<_>>>()?;
    (!problems.refused()).then_some(Rule { name, matches, policies, backends })
}

fn compile_backend(
    route: &Object<HttpRouteSpec>,
    backend: &BackendRef,
    at: &FieldPath,
    problems: &mut Problems,
) -> Option<Wanted> {
    let weight = backend.weight.unwrap_or(1);
    let mut good = true;
    if weight > WEIGHT_MAX {
        let text = format!("the weight {weight} is too large");
        problems.refuse(&at.field("weight"), text, format!("write at most {WEIGHT_MAX}"));
        good = false;
    }
    let mut service = None;
    if !backend.is_service() {
        problems.warn_as(
            Condition::InvalidKind,
            &at.field("kind"),
            "the backend is not a Service; its share of requests is answered with 500",
            "lead to a Service",
        );
    } else {
        match backend.port {
            Some(port) if port > 0 => service = Some((route.named_or_here(backend.namespace.as_deref(), &backend.name), port)),
            _ => {
                problems.refuse(&at.field("port"), "a Service as backend needs a port", "write a port of the Service");
                good = false;
            }
        }
    }
    let (mut request_headers, mut response_headers) = (None, None);
    let mut seen = BTreeSet::new();
    for (index, filter) in backend.filters.iter().enumerate() {
        let at = at.field("filters").index(index);
        if !is_well_formed(filter, &at, problems) {
            good = false;
            continue;
        }
        if !seen.insert(filter.kind) {
            problems.refuse_as(
                Condition::IncompatibleFilters,
                &at,
                "the backend has this filter already",
                "write one filter that does both",
            );
            good = false;
        }
        match filter.kind {
            FilterType::RequestHeaderModifier => {
                let edit = filter.request_header_modifier.as_ref();
                request_headers = edit.and_then(|edit| edit.compile(&at.field("requestHeaderModifier"), problems));
                good &= request_headers.is_some();
            }
            FilterType::ResponseHeaderModifier => {
                let edit = filter.response_header_modifier.as_ref();
                response_headers = edit.and_then(|edit| edit.compile(&at.field("responseHeaderModifier"), problems));
                good &= response_headers.is_some();
            }
            FilterType::UrlRewrite | FilterType::RequestMirror => {
                problems.refuse(&at, "this filter cannot stand at a backend", "move it to the rule's filters");
                good = false;
            }
        }
    }
    good.then_some(Wanted { weight, service, request_headers, response_headers })
}

/// Is exactly the field there that the filter's type names?
fn is_well_formed(filter: &HttpRouteFilter, at: &FieldPath, problems: &mut Problems) -> bool {
    let HttpRouteFilter { kind, request_header_modifier, response_header_modifier, url_rewrite, request_mirror } = filter;
    let fields = [
        (FilterType::RequestHeaderModifier, "requestHeaderModifier", request_header_modifier.is_some()),
        (FilterType::ResponseHeaderModifier, "responseHeaderModifier", response_header_modifier.is_some()),
        (FilterType::UrlRewrite, "urlRewrite", url_rewrite.is_some()),
        (FilterType::RequestMirror, "requestMirror", request_mirror.is_some()),
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
