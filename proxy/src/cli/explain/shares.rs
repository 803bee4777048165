//! Where a rule leads: its backends by their shares, and every endpoint that may be chosen.

use std::collections::BTreeSet;

use super::question::Question;
use super::told::Told;
use super::walk::{Caller, arrive};
use crate::base::units::Span;
use crate::model::Resources;
use crate::policy::RuleName;
use crate::snapshot::{ServicePort, WeightedBackend};

/// What becomes of a connection to a port of a service with routes for connections.
pub(super) fn by_stream(resources: &Resources, port: &ServicePort, caller: &Caller<'_>, question: &Question, told: &mut Told) {
    let asks = port.asks_for_server_name();
    if asks {
        told.say("note", format!("the connection is taken to be TLS that asks for {}", question.host), None);
    }
    let Some(rule) = port.stream(asks.then_some(question.host.as_str())) else {
        told.refuse("route", "routes for connections are attached, and none is for this name: closed, no_route", None);
        return;
    };
    told.say("route", "decides about the connection, whose bytes are not looked into", Some(rule.name.to_string()));
    let mut opaque = question.again();
    opaque.opaque = true;
    by_share(resources, (&rule.name, &rule.backends, "closed, no_backend"), caller, &opaque, told);
}

/// What becomes of what a rule sends to its backends; `outcome` is that of a share that cannot be sent.
pub(super) fn by_share(
    resources: &Resources,
    (rule, backends, outcome): (&RuleName, &[WeightedBackend], &str),
    caller: &Caller<'_>,
    arriving: &Question,
    told: &mut Told,
) {
    let total: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    if total == 0 {
        told.refuse("backend", format!("none has a weight: {outcome}"), Some(rule.to_string()));
    }
    let mut asked = BTreeSet::new();
    for backend in backends.iter().filter(|backend| backend.weight > 0) {
        let share = u64::from(backend.weight) * 100 / total.max(1);
        let Some(target) = &backend.backend else {
            let says = format!("{share} % to a Service or port that does not exist or is not granted: {outcome}");
            told.refuse("backend", says, Some(rule.to_string()));
            continue;
        };
        told.say(
            "backend",
            format!(
                "{share} % to Service/{} port {}, {} endpoints, connect within {}",
                target.service,
                target.port,
                target.endpoints.len(),
                Span(target.connect_timeout)
            ),
            Some(target.breaker.rule.to_string()),
        );
        if target.endpoints.is_empty() {
            told.refuse("endpoint", "there is none: 503 no_endpoint", None);
        }
        let mut arriving = arriving.again();
        if let Some(edit) = &backend.request_headers {
            edit.apply(&mut arriving.headers);
            told.say("headers", "the backend's filter edits the request's", Some(rule.to_string()));
        }
        for endpoint in &target.endpoints {
            if asked.insert(endpoint.address) {
                arrive(resources, caller, endpoint, &arriving, told);
            }
        }
    }
}
