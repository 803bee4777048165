//! The way of one request: out of the caller's sidecar by its route, and into every endpoint that it may be given.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::super::Failure;
use super::super::local::GATEWAYS;
use super::passed;
use super::question::{Destination, Question, destination, refusal};
use super::shares::{by_share, by_stream};
use super::told::Told;
use crate::base::names::Named;
use crate::base::units::Span;
use crate::dataplane::http::connect::{self, NoTunnel};
use crate::dataplane::http::normalize;
use crate::dataplane::http::reject::Reject;
use crate::identity::spiffe::{SpiffeId, TrustDomain};
use crate::model::Resources;
use crate::model::object::Object;
use crate::model::service::ServiceSpec;
use crate::model::workload::WorkloadSpec;
use crate::model::workload::WorkloadTransport;
use crate::policy::Peer;
use crate::policy::authorization::Verdict;
use crate::policy::limits::Limits;
use crate::snapshot::compile::{self, Own};
use crate::snapshot::{AppProtocol, Egress, Endpoint, Plaintext, RoutePolicies, ServicePort, Snapshot, Transport};

/// Who calls.
#[derive(Clone)]
pub(super) struct Caller<'a> {
    pub(super) from: &'a Named,
    /// None: it calls without a sidecar.
    pub(super) identity: Option<SpiffeId>,
    address: SocketAddr,
    domain: &'a TrustDomain,
    now: Duration,
    /// What one caller may send, everywhere in the mesh.
    limits: Limits,
}

pub(super) fn explain(
    resources: &Resources,
    from: &Named,
    question: &Question,
    trust_domain: &TrustDomain,
    now: Duration,
    told: &mut Told,
) -> Result<(), Failure> {
    let own = Own { workload: from.clone(), trust_domain: trust_domain.clone() };
    let (snapshot, _) = compile::compile(resources, &own, &Snapshot::empty());
    let source = resources.workload(from).filter(|workload| workload.spec.transport == WorkloadTransport::MutualTls);
    let identity =
        source.and_then(|workload| trust_domain.service_account(&Named::new(&*from.namespace, workload.spec.account())).ok());
    match &identity {
        Some(identity) => told.say("from", format!("{from} as {identity}"), None),
        None => told.say("from", format!("{from}, which is outside the mesh"), None),
    }
    let Destination { address, service } = destination(resources, from, question)?;
    let caller = Caller {
        from,
        identity,
        address: SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 0),
        domain: trust_domain,
        now,
        limits: snapshot.mesh.limits,
    };
    if caller.identity.is_none() {
        // No sidecar: no route, no policy of the caller's side.
        told.say("route", "none: the caller has no sidecar", None);
        match service {
            Some((service, port)) if question.is_by_name() => {
                by_name(resources, &snapshot, &caller, service, port, question, told)
            }
            Some((service, _)) => unknown(service, address, told),
            None => bare(resources, &snapshot, &caller, address, question, told),
        }
        return Ok(());
    }
    let Some((service, number)) = service else {
        direct(resources, &snapshot, &caller, address, question, told);
        return Ok(());
    };
    if service.spec.is_headless() {
        headless(resources, &snapshot, &caller, (service, number), question, told);
        return Ok(());
    }
    if passes(resources, &caller, address, told) {
        unknown(service, address, told);
        return Ok(());
    }
    let Some(port) = snapshot.outbound.services.get(&address) else {
        let ports: Vec<_> = service.spec.ports.iter().filter(|port| port.is_tcp()).map(|port| port.port.to_string()).collect();
        let says = if ports.is_empty() {
            format!("{} has no TCP port: 503 no_configuration", service.key())
        } else {
            format!("{} has no TCP port {number}, it has {}: 404 no_route", service.key(), ports.join(", "))
        };
        told.refuse("to", says, None);
        return Ok(());
    };
    told.say("to", format!("Service/{} port {} ({address}), {:?}", port.service, port.port, port.protocol), None);
    by_port(resources, port, &caller, question, told);
    Ok(())
}

/// Does a connection of a caller with a sidecar pass it by?
fn passes(resources: &Resources, caller: &Caller<'_>, address: SocketAddr, told: &mut Told) -> bool {
    let annotation = passed::out(resources, caller.from, address);
    if let Some(annotation) = annotation {
        let says =
            format!("what {} sends to {address} passes its sidecar by: it leaves in plaintext, without identity", caller.from);
        told.say("capture", says, Some(format!("annotation {annotation} of {}", caller.from)));
    }
    annotation.is_some()
}

/// An address of a service, dialled past every sidecar.
fn unknown(service: &Object<ServiceSpec>, address: SocketAddr, told: &mut Told) {
    let says = format!("{address} is the address of {}, which sidecars alone know: nobody answers there", service.key());
    told.refuse("to", says, None);
}

/// A connection to a service that has no address of its own: to one of the workloads to which its name leads.
fn headless(
    resources: &Resources,
    snapshot: &Snapshot,
    caller: &Caller<'_>,
    (service, number): (&Object<ServiceSpec>, u16),
    question: &Question,
    told: &mut Told,
) {
    let behind: Vec<_> = service.spec.leads_to(resources.workloads_in(&service.metadata.namespace)).collect();
    let all: Vec<String> =
        behind.iter().flat_map(|workload| named(service, workload)).map(|address| address.to_canonical().to_string()).collect();
    let key = service.key();
    if all.is_empty() {
        told.refuse("to", format!("{key} has no address of its own, and its name no address: no workload is behind it"), None);
        return;
    }
    told.say("to", format!("{key} has no address of its own: its name is {}, and one of them is dialled", all.join(", ")), None);
    for address in behind.iter().filter_map(|workload| named(service, workload).next()) {
        // Whose port it is there, the request's host says, as the sidecar asks it.
        direct(resources, snapshot, caller, SocketAddr::new(address.to_canonical(), number), question, told);
    }
}

/// What becomes of a request at a port of a service.
fn by_port(resources: &Resources, port: &ServicePort, caller: &Caller<'_>, question: &Question, told: &mut Told) {
    if !port.streams.is_empty() {
        by_stream(resources, port, caller, question, told);
        return;
    }
    if port.protocol == AppProtocol::Opaque {
        told.say("route", "none: the port is declared opaque, its bytes are not looked into", None);
        let mut opaque = question.again();
        opaque.opaque = true;
        for endpoint in &port.default_backend.endpoints {
            arrive(resources, caller, endpoint, &opaque, told);
        }
        return;
    }
    let mut question = question.again();
    if let Err(reason) = question.normalize(&caller.limits) {
        told.refuse("request", reason, None);
        return;
    }
    let Some(rule) = port.rule(normalize::host(&question.authority), question.view()) else {
        told.refuse("route", "routes are attached, and none of their rules matches: 404 no_route", None);
        return;
    };
    told.say("route", "decides", Some(rule.name.to_string()));
    let mut arriving = question.again();
    apply(&rule.policies, &mut arriving, told);
    if let Some(redirect) = &rule.policies.redirect {
        let host = normalize::host(&question.authority);
        let location = redirect.location(host, port.port, &question.path, question.query.as_deref());
        told.say("redirect", format!("{} to {location}", redirect.status.as_u16()), Some(rule.name.to_string()));
        return;
    }
    by_share(resources, (&rule.name, &rule.backends, "500"), caller, &arriving, told);
}

/// What a name leads to where there is no sidecar to know the service's own address: the pods themselves.
fn by_name(
    resources: &Resources,
    snapshot: &Snapshot,
    caller: &Caller<'_>,
    service: &Object<ServiceSpec>,
    port: u16,
    question: &Question,
    told: &mut Told,
) {
    let selected = service.spec.leads_to(resources.workloads_in(&service.metadata.namespace));
    let mut pods = selected.filter(|workload| named(service, workload).next().is_some()).peekable();
    if pods.peek().is_none() {
        told.refuse("endpoint", "there is none, so that the name has no address", None);
        return;
    }
    let declared = service.spec.ports.iter().find(|declared| declared.is_tcp() && declared.port == port);
    let mut told_apart = false;
    for workload in pods {
        let led = declared.and_then(|declared| workload.spec.port(&declared.target()));
        if let Some(led) = led.filter(|led| *led != port && !std::mem::replace(&mut told_apart, true)) {
            let says = format!(
                "the name leads a caller without a sidecar to the pods themselves: port {port} is theirs, and not the {led} to \
                 which {} leads; ask for that one by --to {}:{led}",
                service.key(),
                question.host,
            );
            told.say("note", says, None);
        }
        let endpoint =
            named(service, workload).next().and_then(|address| snapshot.outbound.workloads.get(&address.to_canonical()));
        if let Some(endpoint) = endpoint {
            let address = SocketAddr::new(endpoint.address.ip(), port);
            arrive(resources, caller, &Endpoint { address, ..endpoint.as_ref().clone() }, question, told);
        }
    }
}

/// The addresses of a workload to which the name of a Service leads.
fn named<'a>(service: &'a Object<ServiceSpec>, workload: &'a Object<WorkloadSpec>) -> impl Iterator<Item = &'a IpAddr> {
    workload.spec.addresses.iter().filter(|address| service.spec.is_of_family(**address))
}

/// A connection of a caller without a sidecar to an address that is no service's.
fn bare(
    resources: &Resources,
    snapshot: &Snapshot,
    caller: &Caller<'_>,
    address: SocketAddr,
    question: &Question,
    told: &mut Told,
) {
    let ip = address.ip();
    if ip.is_loopback() || ip.is_unspecified() {
        told.say("to", format!("{address} is the caller's own loopback: the mesh has no part in it"), None);
    } else if let Some(endpoint) = snapshot.outbound.workloads.get(&ip) {
        arrive(resources, caller, &Endpoint { address, ..endpoint.as_ref().clone() }, question, told);
    } else if GATEWAYS.contains(&ip) {
        told.say(
            "to",
            format!("{address} is of the machine itself: whether anything answers there, the mesh does not know"),
            None,
        );
    } else if snapshot.mesh.ranges.iter().any(|range| range.contains(&ip)) {
        told.refuse("to", format!("{address} is an address of the mesh that no pod has: nobody answers there"), None);
    } else {
        told.say(
            "to",
            format!("{address} is outside the mesh, and no sidecar is asked: whether it answers, the mesh does not know"),
            None,
        );
    }
}

/// The caller's own loopback, to which connections are never captured.
fn loopback(address: SocketAddr, told: &mut Told) {
    match address.port() {
        proxy_common::PORT_OUTBOUND => told.refuse("to", format!("{address} is the caller's own sidecar: 421 own_port"), None),
        proxy_common::PORT_INBOUND => {
            told.refuse("to", format!("{address} is the caller's own sidecar: it closes without an answer, own_port"), None);
        }
        proxy_common::PORT_ADMIN | proxy_common::PORT_METRICS => {
            told.say("to", format!("{address} is the caller's own sidecar, which shows itself there and asks no policy"), None);
        }
        _anything_else => told.say(
            "to",
            format!("{address} is the caller's own loopback, which is never captured: no sidecar and no policy is asked"),
            None,
        ),
    }
}

/// A connection to an address that is no service's.
fn direct(
    resources: &Resources,
    snapshot: &Snapshot,
    caller: &Caller<'_>,
    address: SocketAddr,
    question: &Question,
    told: &mut Told,
) {
    if address.ip().is_loopback() || address.ip().is_unspecified() {
        loopback(address, told);
    } else if passes(resources, caller, address, told) {
        bare(resources, snapshot, &Caller { identity: None, ..caller.clone() }, address, question, told);
    } else if let Some(port) = meant(snapshot, caller, address, question) {
        told.say("to", format!("Service/{} port {} ({address}), {:?}", port.service, port.port, port.protocol), None);
        by_port(resources, port, caller, question, told);
    } else if let Some(endpoint) = snapshot.outbound.workloads.get(&address.ip()) {
        told.say("to", format!("Workload/{} itself ({address})", endpoint.workload), None);
        let meshed = matches!(endpoint.transport, Transport::MutualTls(_));
        if meshed && address.port() == proxy_common::PORT_METRICS {
            told.say("endpoint", "its sidecar's own metrics and readiness, read-only and in plaintext: no policy is asked", None);
            return;
        }
        let endpoint = Endpoint { address, ..endpoint.as_ref().clone() };
        let mut question = question.again();
        // What is closed at once is not read.
        if !(meshed && compile::is_own_port(address.port()))
            && let Err(reason) = question.normalize(&caller.limits)
        {
            told.refuse("request", reason, None);
            return;
        }
        arrive(resources, caller, &endpoint, &question, told);
    } else if snapshot.mesh.ranges.iter().any(|range| range.contains(&address.ip())) {
        told.refuse("to", format!("{address} is an address of the mesh that nothing has: 503 no_configuration"), None);
    } else if snapshot.mesh.egress == Egress::Allow {
        told.say("to", format!("{address} is outside the mesh and is dialled as it is"), Some("Mesh egress Allow".to_owned()));
    } else {
        told.refuse("to", format!("{address} is outside the mesh: 403 egress_denied"), Some("Mesh egress Deny".to_owned()));
    }
}

/// The service that a request to an address of a pod is for. None: the pod itself.
fn meant<'a>(
    snapshot: &'a Snapshot,
    caller: &Caller<'_>,
    address: SocketAddr,
    question: &Question,
) -> Option<&'a Arc<ServicePort>> {
    let first = snapshot.outbound.service_at(address)?;
    if first.protocol == AppProtocol::Opaque {
        // Nothing that is sent tells whether the service or the pod is meant.
        return Some(first);
    }
    let mut read = question.again();
    // What cannot be read is refused by whichever it is for.
    read.normalize(&caller.limits).ok()?;
    snapshot.outbound.service_called(address, normalize::host(&read.authority))
}

/// What the caller's sidecar does to the request.
fn apply(policies: &RoutePolicies, question: &mut Question, told: &mut Told) {
    let RoutePolicies {
        cors,
        jwt: _,
        authorization: _,
        rate_limit: _,
        fault,
        redirect: _,
        request_headers,
        rewrite,
        shadow,
        timeouts,
        retry,
        response_headers,
    } = policies;
    if cors.is_some() {
        told.say("cors", "a browser's preflight is answered here; other answers say which pages may read them", None);
    }
    if let Some(fault) = fault {
        told.say("fault", "a share of requests is delayed or aborted", Some(fault.rule.to_string()));
    }
    if let Some(edit) = request_headers {
        edit.apply(&mut question.headers);
        told.say("headers", "the request's are edited", None);
    }
    if let Some(rewrite) = rewrite {
        told.say("rewrite", question.rewrite(rewrite), None);
    }
    for shadow in shadow {
        told.say("shadow", format!("a share is copied to Service/{} port {}", shadow.service, shadow.port), None);
    }
    let limit = |limit: Option<Duration>| limit.map_or_else(|| "no limit".to_owned(), |limit| Span(limit).to_string());
    if timeouts.request.is_some() || timeouts.attempt.is_some() {
        told.say("timeouts", format!("request {}, each attempt {}", limit(timeouts.request), limit(timeouts.attempt)), None);
    }
    if let Some(retry) = retry {
        told.say("retry", retry.to_string(), None);
    }
    if response_headers.is_some() {
        told.say("headers", "the answer's are edited", None);
    }
}

/// What the sidecar of `endpoint` would do.
pub(super) fn arrive(resources: &Resources, caller: &Caller<'_>, endpoint: &Endpoint, question: &Question, told: &mut Told) {
    let begin = told.steps.len();
    let name = endpoint.workload.to_string();
    match (&endpoint.transport, &caller.identity) {
        (Transport::Plaintext, Some(_)) if question.is_tunnel() => {
            let says = refusal(&Reject::NoTunnel(NoTunnel::Undecided));
            told.refuse("endpoint", format!("{name} {} in plaintext: {says}", endpoint.address), None);
            told.about(begin, &name);
            return;
        }
        (Transport::Plaintext, _) => {
            told.say(
                "endpoint",
                format!("{name} {} in plaintext: it has no sidecar, nothing is asked there", endpoint.address),
                None,
            );
            told.about(begin, &name);
            return;
        }
        (Transport::MutualTls(_), caller) if compile::is_own_port(endpoint.address.port()) => {
            let outcome = if caller.is_some() { "421 own_port" } else { "the connection is refused" };
            told.refuse("endpoint", format!("{name} {} is a port of its sidecar's own: {outcome}", endpoint.address), None);
            told.about(begin, &name);
            return;
        }
        (Transport::MutualTls(_), caller) if endpoint.address.port() == proxy_common::PORT_METRICS => {
            let text = "is where its sidecar serves metrics, in plaintext and without policies";
            match caller {
                Some(_) => told.refuse(
                    "endpoint",
                    format!("{name} {} {text}: mutual TLS finds nobody there: 503", endpoint.address),
                    None,
                ),
                None => told.say("endpoint", format!("{name} {} {text}", endpoint.address), None),
            }
            told.about(begin, &name);
            return;
        }
        (Transport::MutualTls(_), _) if passed::arrives(resources, caller, endpoint, told) => {
            told.about(begin, &name);
            return;
        }
        (Transport::MutualTls(id), Some(_)) => {
            told.say("endpoint", format!("{name} {} by mutual TLS as {id}", endpoint.address), None);
        }
        (Transport::MutualTls(_), None) => told.say("endpoint", format!("{name} {} in plaintext", endpoint.address), None),
    }
    let own = Own { workload: endpoint.workload.clone(), trust_domain: caller.domain.clone() };
    let (snapshot, _) = compile::compile(resources, &own, &Snapshot::empty());
    let port = snapshot.inbound.port(endpoint.address.port());
    let mut question = question.again();
    // The first sidecar on the way; a caller's own has done it before.
    if caller.identity.is_none()
        && let Err(reason) = question.normalize(&caller.limits)
    {
        told.refuse("request", reason, None);
        told.about(begin, &name);
        return;
    }
    if caller.identity.is_none() {
        match &port.plaintext {
            Plaintext::Refuse(rule) => {
                told.refuse("plaintext", "refused: 403 plaintext_refused", Some(rule.to_string()));
                told.about(begin, &name);
                return;
            }
            Plaintext::Permit(rule) => told.say("plaintext", "permitted", Some(rule.to_string())),
        }
    }
    let view = question.view();
    let peer = Peer { identity: caller.identity.clone(), address: caller.address, port: endpoint.address.port() };
    let RoutePolicies { jwt, authorization, rate_limit, .. } = &port.policies;
    let verified = jwt.as_ref().map(|jwt| match question.opaque {
        true => jwt.decide_opaque().map(|()| None),
        false => jwt.verify(view, caller.now),
    });
    let claims = match verified {
        Some(Err(refused)) => {
            told.refuse("token", format!("refused: {}", refused.reason), Some(refused.rule.to_string()));
            told.about(begin, &name);
            return;
        }
        Some(Ok(Some(claims))) => {
            told.say("token", format!("accepted, issued by {}", claims.issuer), None);
            Some(claims)
        }
        Some(Ok(None)) => {
            told.say("token", "none was sent, and none is needed", None);
            None
        }
        None => None,
    };
    if question.ambiguous && !question.opaque && authorization.as_ref().is_some_and(|authorization| authorization.names_paths()) {
        let says = "servers read this path differently, and a policy decides on it: 400 bad_request";
        told.refuse("authorization", says, None);
        told.about(begin, &name);
        return;
    }
    let verdict = match authorization {
        _ if question.is_tunnel() => match connect::permit(&port.policies, &peer) {
            Ok(rule) => Some(Verdict::Allow(rule)),
            Err(Reject::Denied(rule)) => Some(Verdict::Deny(rule)),
            Err(reject) => {
                told.refuse("authorization", refusal(&reject), None);
                told.about(begin, &name);
                return;
            }
        },
        Some(authorization) if question.opaque => Some(authorization.decide_opaque(&peer)),
        Some(authorization) => Some(authorization.decide(&peer, view, claims.as_ref())),
        None => None,
    };
    match verdict {
        Some(Verdict::Allow(rule)) => told.say("authorization", "allowed", Some(rule.to_string())),
        Some(Verdict::Deny(rule)) => {
            told.refuse("authorization", "refused: 403", Some(rule.to_string()));
            told.about(begin, &name);
            return;
        }
        None => {}
    }
    if let Some(limit) = rate_limit {
        told.say("rate limit", "what is over it is refused: 429", Some(limit.rule.to_string()));
    }
    told.about(begin, &name);
}
