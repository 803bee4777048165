//! THE LINE: from a request to its answer, in the order of [`ORDER`]. Read this file first.
//!
//! Inbound and outbound are the same line; [`Direction`] picks which table is read. Every early end is a [`Reject`],
//! caught in one place. `RoutePolicies` is taken apart without a rest, so that a new policy does not compile until it has
//! its place here.

use std::borrow::Cow;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;

use http::uri::{Authority, PathAndQuery};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt as _, Limited};
use hyper::ext::ReasonPhrase;
use tokio::time::{Instant, sleep, timeout};

use super::attempt::{
    Bounds, CARRIER, Failed, HTTP_VERSION, Head, STATUS, Tried, UPGRADE_TOKEN, Upstream, attempt, effective_status, said,
};
use super::body::{Answer, Body, KEEP_MAX, RequestBody, Unread};
use super::connect;
use super::expect::{self, Expectation};
use super::inflow::Inflow;
use super::interims::Interims;
use super::marks::{Mark, Marks};
use super::normalize::{self, Coding};
use super::record::{Record, default_allow};
use super::reject::{REASON, Reject};
use super::spelling::{self, HEADER_NAMES, REASON_PHRASE, Spelling};
use super::tunnel::Upgrading;
use super::upgrade::{self, Taken};
use super::websocket;
use crate::base::drain::DrainGuard;
use crate::base::placed;
use crate::dataplane::connection::inbound_port;
use crate::dataplane::learned::First;
use crate::dataplane::pool::peer_of;
use crate::dataplane::{Proxy, opaque};
use crate::policy::authorization::Verdict;
use crate::policy::cors;
use crate::policy::grpc::is_grpc;
use crate::policy::headers::HeaderEdit;
use crate::policy::limits::Limits;
use crate::policy::retry::{Attempt, Decision, WireState};
use crate::policy::{Peer, RequestView};
use crate::snapshot::{Backend, InboundPort, RoutePolicies, RouteRule, ServicePort, Snapshot, WeightedBackend, draw};
use crate::telemetry::metrics::ShadowOutcome;
use crate::telemetry::reason::Reason;
use crate::telemetry::trace::TraceContext;
use crate::telemetry::{Direction, Protocol};

/// What a request meets, in this order, and why there.
pub(crate) const ORDER: &[(&str, &str)] = &[
    ("record", "whatever happens is told"),
    ("normalize", "everything after it decides about the text that is forwarded"),
    ("snapshot", "read once, so that a request sees one configuration"),
    ("route", "names the policies"),
    ("cors", "a browser asks without credentials what it may ask with them"),
    ("jwt", "claims are conditions of authorization"),
    ("authorization", "before anything is spent on a stranger"),
    ("rate_limit", "only who may call uses up the limit"),
    ("fault", "an injected fault stands for the destination, so it comes after the refusals of the mesh"),
    ("redirect", "stands for the destination like a fault, and needs none"),
    ("headers", "edits are for the destination; conditions saw what the caller sent"),
    ("rewrite", "the destination's path, not the one that was authorized by the caller's side"),
    ("shadow", "a copy of what the destination gets"),
    ("deadline", "every wait from here on is cut by it"),
    ("attempts", "pick, admit, connect, send, classify, and again if the policy says so"),
    ("response", "edits of the answer"),
    ("body", "the record completes when it ended"),
];

/// What is known of the connection on which requests come.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) proxy: Arc<Proxy>,
    pub(crate) direction: Direction,
    pub(crate) peer: Peer,
    /// Where the client wanted to go.
    pub(crate) original: SocketAddr,
    /// It comes from another sidecar, whose metadata is believed.
    pub(crate) link: bool,
    /// Every request is refused, for this reason.
    pub(crate) refuse: Option<Reject>,
    /// It leads to a port that nobody declared, about which its server's first answer teaches something: was that said?
    pub(crate) teaches: Option<AtomicBool>,
    /// What is under way on it is cut, for this reason.
    pub(crate) revoked: OnceLock<Box<Reject>>,
    /// Those with which it began.
    pub(crate) limits: Limits,
    /// Says when the sidecar stops; held while the connection lives.
    pub(crate) drain: DrainGuard,
}

impl Connection {
    /// Is its destination one that could not be connected to just now? A client that asks again does it on another
    /// connection, for which that is tried anew.
    pub(super) fn is_unreached(&self) -> bool {
        matches!(self.refuse, Some(Reject::ConnectFailed | Reject::ConnectTimeout | Reject::Overloaded))
    }

    /// Its server answered a request.
    fn answered(&self) {
        if let Some(told) = &self.teaches
            && !told.load(Ordering::Relaxed)
        {
            told.store(true, Ordering::Relaxed);
            self.proxy.learned.learn(self.original, First::Client);
        }
    }
}

/// Where a request goes by its route.
#[derive(Debug)]
enum Chosen<'a> {
    Rule { port: &'a ServicePort, rule: &'a RouteRule },
    Inbound(&'a InboundPort),
    Workload(Upstream<'a>),
}

/// What goes with a request beside what HTTP says of it.
#[derive(Debug)]
pub(crate) struct Beside<'a> {
    /// How a caller in HTTP/1 spelled its headers.
    pub(crate) spelling: Option<Spelling>,
    /// What the caller is told before its answer.
    pub(crate) interims: &'a Interims,
    /// Set when the codec ended its stream because the caller broke the rules: nothing more comes of it, and nobody hears an answer.
    pub(crate) broke: Option<&'a AtomicBool>,
}

/// Answers a request. Infallible: what cannot be answered by the destination is answered by us.
/// `upgrading` is the connection that the caller asks to have for itself.
pub(crate) async fn handle(
    connection: Arc<Connection>,
    request: Request<Inflow>,
    beside: Beside<'_>,
    upgrading: Option<Upgrading>,
) -> Response<Body> {
    let (parts, incoming) = request.into_parts();
    let marks = Marks::of(&parts.headers);
    if connection.link && marks.has(Mark::CONTINUE) && parts.headers.contains_key(expect::ASKED) {
        return expect::answer();
    }
    // Whoever asks for a tunnel takes a success for it, be it one of gRPC that says why not.
    let grpc = marks.has(Mark::CONTENT_TYPE) && parts.method != Method::CONNECT && is_grpc(&parts.headers);
    let protocol = match parts.version {
        Version::HTTP_2 if grpc => Protocol::Grpc,
        Version::HTTP_2 => Protocol::Http2,
        _older => Protocol::Http1,
    };
    let mut record = Record::start(&connection, protocol);
    record.ends.mtls = connection.peer.identity.is_some();
    let http1 = protocol == Protocol::Http1;
    let mut readable = None;
    // The line is a large future and most of it waits: one allocation keeps connections small.
    let broke = beside.broke;
    let decided = {
        let mut line = placed::pinned(|| line(&connection, &mut record, &mut readable, parts, marks, incoming, beside));
        poll_fn(|cx| match broke {
            Some(broke) if broke.load(Ordering::Relaxed) => Poll::Ready(Err(Reject::BadRequest(BROKE))),
            _may_go_on => line.as_mut().poll(cx),
        })
        .await
    };
    match decided {
        Ok(answered) => respond(&connection, record, answered, readable.as_ref(), upgrading, http1),
        Err(reject) => {
            record.ends.fill(&connection.proxy, connection.direction, connection.peer.identity.as_ref(), connection.original);
            let told = reject.told();
            record.refused(&reject, &told);
            let mut response = reject.render(protocol == Protocol::Grpc);
            // A page may read why it got no answer, too.
            if let Some(readable) = readable {
                readable.write(response.headers_mut());
            }
            response
        }
    }
}

/// A destination's answer, and what it takes to pass it on.
struct Answered {
    tried: Tried,
    response_edits: Vec<Arc<HeaderEdit>>,
    weighted_edit: Option<HeaderEdit>,
    /// The answer comes from another sidecar.
    from_link: bool,
    asked: Asked,
    /// Its body may be held.
    request: Option<Unread>,
}

/// What a request asks to have its connection or stream for.
#[derive(Debug)]
enum Asked {
    /// An answer in HTTP.
    Nothing,
    /// Another protocol. The key is one that was made for a caller that has none.
    Upgrade { protocol: HeaderValue, key: Option<HeaderValue> },
    /// A tunnel to somewhere else.
    Tunnel,
}

async fn line(
    connection: &Arc<Connection>,
    record: &mut Record,
    readable: &mut Option<cors::Readable>,
    mut parts: http::request::Parts,
    marks: Marks,
    incoming: Inflow,
    beside: Beside<'_>,
) -> Result<Answered, Reject> {
    let proxy = &connection.proxy;
    let peer = &connection.peer;

    // normalize
    let head_bytes = normalize::head_bytes(&parts);
    if !connection.link {
        normalize::within_limits(&parts, head_bytes, &connection.limits).map_err(|reject| unread(record, &parts, reject))?;
    }
    // Given back with the head, when there is an answer.
    let _room = proxy.headroom.claim(head_bytes).map_err(|reject| unread(record, &parts, reject))?;
    let mut target = normalize::target(&parts).map_err(|reject| unread(record, &parts, reject))?;
    let (version, upgrade) = arrived(connection, &parts, marks).map_err(|reject| unread(record, &parts, reject))?;
    if connection.link && !marks.has(Mark::HOST) && version == Version::HTTP_10 && !target.tunnel {
        // HTTP/2 needs a name; the caller gave none, and the application hears of none.
        target.authority = None;
    }
    let (path, query) = (target.path(), target.path_and_query.query());
    let named = target.authority.as_ref().map_or("", Authority::as_str);
    normalize::host_of_absolute_form(&mut parts)?;
    normalize::strip_hop_by_hop(&mut parts.headers);
    let Beside { mut spelling, interims, broke: _ } = beside;
    if marks.has(Mark::RESERVED) {
        if connection.link {
            spelling = marks.has(Mark::HEADER_NAMES).then(|| Spelling::take(&parts.headers)).flatten();
        }
        normalize::take_reserved(&mut parts.headers, connection.link).map_err(|reject| unread(record, &parts, reject))?;
    }

    // snapshot
    let snapshot = proxy.published.current();
    let logged = proxy.draw(snapshot.mesh.access_log.fraction());
    let trace = {
        let share = snapshot.mesh.trace_sample.fraction();
        let mut dice = proxy.dice.lock();
        let carried = marks.has(Mark::TRACE).then_some(&parts.headers);
        TraceContext::continue_or_begin(carried, &mut dice, |dice| dice.fraction() < share)
    };
    trace.write(&mut parts.headers, marks.has(Mark::TRACE));
    // An upgrade that travels as extended CONNECT is a GET to everybody who decides, and who is told.
    let method = if upgrade.is_some() { &Method::GET } else { &parts.method };
    record.drawn(trace, logged, method, named, path);
    let own = proxy.identity.own().map(|own| own.id.clone());
    match connection.direction {
        Direction::Inbound => {
            record.ends.source.clone_from(&peer.identity);
            record.ends.destination = own;
        }
        Direction::Outbound => record.ends.source = own,
    }
    if let Some(reject) = &connection.refuse {
        return Err(reject.clone());
    }
    if connection.direction == Direction::Inbound {
        // A connection may outlive the mode under which it was opened.
        opaque::admit(inbound_port(&snapshot, connection.original), peer)?;
    }

    // route
    let seen = RequestView { method, authority: named, path, query, headers: &parts.headers };
    let none = RoutePolicies::default();
    let chosen = route(connection, &snapshot, record, seen)?;
    let policies = match &chosen {
        Chosen::Rule { rule, .. } => &rule.policies,
        Chosen::Inbound(port) => &port.policies,
        Chosen::Workload(_) => &none,
    };
    let RoutePolicies {
        cors,
        jwt,
        authorization,
        rate_limit,
        fault,
        redirect,
        request_headers,
        rewrite,
        shadow,
        timeouts,
        retry,
        response_headers,
    } = policies;

    // cors
    if let Some(cors) = cors {
        match cors.decide(seen.method, seen.headers) {
            cors::Verdict::Nothing => {}
            cors::Verdict::Preflight(headers) => return Err(Reject::Preflight(cors.rule.clone(), Box::new(headers))),
            cors::Verdict::Readable(by) => *readable = Some(by),
        }
    }

    // jwt
    let claims = match jwt {
        Some(jwt) => jwt.verify(seen, proxy.clock.since_epoch()).map_err(Reject::TokenRefused)?,
        None => None,
    };

    // authorization
    if target.tunnel && connection.direction == Direction::Inbound {
        record.ends.rule = Some(connect::permit(policies, peer)?);
    } else if let Some(authorization) = authorization {
        if target.ambiguous && authorization.names_paths() {
            return Err(Reject::BadRequest("servers read this path differently, and a policy decides on it"));
        }
        match authorization.decide(peer, seen, claims.as_ref()) {
            Verdict::Allow(rule) => record.ends.rule = Some(rule),
            Verdict::Deny(rule) => return Err(Reject::Denied(rule)),
        }
    } else if connection.direction == Direction::Inbound && peer.identity.is_some() {
        record.ends.rule = Some(default_allow());
    }

    // rate_limit
    if let Some(limit) = rate_limit {
        limit.admit(Instant::now()).map_err(|after| Reject::RateLimited(limit.rule.clone(), after))?;
    }

    // fault
    if let Some(fault) = fault {
        let injection = fault.draw(&mut proxy.dice.lock());
        if let Some(delay) = injection.delay {
            record.detail("delayed");
            sleep(delay).await;
        }
        if let Some(status) = injection.abort {
            return Err(Reject::Fault(fault.rule.clone(), status));
        }
    }

    // redirect
    if let Some(redirect) = redirect
        && let Chosen::Rule { port, rule } = &chosen
    {
        let called = normalize::host(named);
        // Who named no host is sent back to the address that it called.
        let called = if called.is_empty() { Cow::Owned(host_of(connection.original)) } else { Cow::Borrowed(called) };
        let location = HeaderValue::try_from(redirect.location(&called, port.port, path, query))
            .map_err(|_not_one| Reject::BadRequest("a target that cannot be passed on"))?;
        let edit = response_headers.clone();
        return Err(Reject::Redirected(rule.name.clone(), redirect.status, location, edit));
    }

    // The backend is part of the route, but it is drawn only for a request that was let through.
    let (upstream, weighted) = match chosen {
        Chosen::Rule { rule, .. } => draw_backend(proxy, rule)?,
        Chosen::Inbound(port) => {
            let at = connection.original;
            (Upstream::Application { at, client: peer.address, protocol: port.protocol }, None)
        }
        Chosen::Workload(upstream) => (upstream, None),
    };
    if let Upstream::Service(backend) = upstream {
        record.ends.service = Some(backend.service.clone());
    }

    // headers
    let http::request::Parts { method, mut headers, .. } = parts;
    if let Some(jwt) = jwt {
        jwt.strip(&mut headers);
    }
    if let Some(edit) = request_headers {
        edit.apply(&mut headers);
    }
    let mut edited = request_headers.is_some();
    let weighted = weighted.map(|weighted| &weighted.policies);
    if let Some(edit) = weighted.and_then(|weighted| weighted.request_headers.as_ref()) {
        edit.apply(&mut headers);
        edited = true;
    }
    let marks = if edited { Marks::of(&headers) } else { marks };

    // rewrite
    let stripped = jwt.as_ref().and_then(|jwt| jwt.strip_query(query?));
    let query = stripped.as_deref().map_or(query, |rest| (!rest.is_empty()).then_some(rest));
    let rewrite = rewrite.as_ref().or(weighted.and_then(|weighted| weighted.rewrite.as_ref()));
    // What was authorized of a tunnel is where it leads.
    let rewrite = rewrite.filter(|_| !target.tunnel);
    let rewritten = rewrite.and_then(|rewrite| rewrite.path(path, query));
    let rewritten =
        rewritten.or_else(|| stripped.as_ref().map(|_| query.map_or_else(|| path.to_owned(), |query| format!("{path}?{query}"))));
    let path_and_query = match rewritten {
        Some(rewritten) => {
            PathAndQuery::try_from(rewritten).map_err(|_not_one| Reject::BadRequest("a target that cannot be passed on"))?
        }
        None => target.path_and_query,
    };
    let mut head = Head {
        method: if upgrade.is_some() { Method::GET } else { method },
        authority: target.authority,
        path_and_query,
        headers,
        spelling,
        version,
        upgrade,
        expectation: None,
    };
    if let Some(authority) = rewrite.and_then(|rewrite| rewrite.authority.as_deref()) {
        let cannot = || Reject::BadRequest("a target that cannot be passed on");
        head.authority = Some(Authority::try_from(authority).map_err(|_not_one| cannot())?);
        if let Some(host) = head.headers.get_mut(http::header::HOST) {
            *host = HeaderValue::try_from(authority).map_err(|_not_one| cannot())?;
        }
    }

    // shadow
    // Even without a retry policy: a kept connection may turn out closed when the request is on its way.
    let body = RequestBody::new(incoming, KEEP_MAX, connection.limits.stream_timeout, record.counts());
    // A call that streams may have nothing to say for hours, on either side, and begins its answer when it has.
    if record.is_grpc() {
        body.may_be_silent();
    }
    for shadow in shadow.iter().chain(weighted.into_iter().flat_map(|weighted| &weighted.shadow)) {
        if head.upgrade.is_none() && !target.tunnel && shadow.draw(&mut proxy.dice.lock()) {
            let backend = snapshot.outbound.backends.get(&(shadow.service.clone(), shadow.port));
            cast_shadow(proxy, &shadow.service.to_string(), backend, &head, &body);
        }
    }

    let asked = match &head.upgrade {
        Some(protocol) => {
            let keyless = version == Version::HTTP_2 && !connection.link && websocket::is_meant(protocol);
            let key = if keyless { websocket::ask(&mut head.headers, &mut proxy.dice.lock()) } else { None };
            Asked::Upgrade { protocol: protocol.clone(), key }
        }
        None if target.tunnel => Asked::Tunnel,
        None => Asked::Nothing,
    };
    if head.upgrade.is_some() {
        normalize::without_length(&mut head.headers);
    } else if marks.has(Mark::EXPECT) {
        head.expectation = Expectation::hold(version, &head.headers, &body);
    }
    if let Some(expectation) = &head.expectation {
        interims.expect(expectation.body());
    }
    let request = head.expectation.is_some().then(|| Unread(body.clone()));
    for edit in response_headers.as_deref().into_iter().chain(weighted.and_then(|weighted| weighted.response_headers.as_ref())) {
        interims.without(&edit.remove);
    }
    // "A server MUST NOT send a 1xx response to an HTTP/1.0 client" (RFC 9110 15.2).
    let interims = (version != Version::HTTP_10).then_some(interims);

    // deadline
    let deadline = timeouts.deadline(marks.has(Mark::GRPC_TIMEOUT).then_some(&head.headers), record.started());

    // attempts
    if let Upstream::Service(backend) = upstream {
        backend.budget.deposit(record.started());
    }
    let bounds = Bounds { attempt: timeouts.attempt, deadline };
    let mut addresses = Vec::new();
    let mut number = 0;
    let tried = loop {
        number += 1;
        record.attempt();
        let tried = attempt(proxy, &head, body.attempt(), upstream, &addresses, bounds, interims).await;
        if let Some(endpoint) = &tried.endpoint {
            record.ends.endpoint = Some(endpoint.workload.clone());
            record.ends.destination = peer_of(endpoint);
            if connection.direction == Direction::Outbound {
                record.ends.mtls = record.ends.destination.is_some();
            }
        }
        let state = match &tried.outcome {
            Ok(sent) => {
                let status = effective_status(sent);
                if status.as_u16() < 400 {
                    record.wire(WireState::Answered(status));
                    break tried;
                }
                let peer = tried.endpoint.as_deref().and_then(peer_of);
                match peer.and_then(|_sidecar| unprocessed(&sent.response)) {
                    Some(state) => state,
                    None => WireState::Answered(status),
                }
            }
            // What our own limits refuse is not tried again against the same limits.
            Err(Failed {
                reject:
                    Reject::BreakerRejected(_)
                    | Reject::NoEndpoint(_)
                    | Reject::BadRequest(_)
                    | Reject::RequestTimeout
                    // All endpoints of a service are the same application.
                    | Reject::AppNotHttp2
                    | Reject::UpgradeDeclined
                    | Reject::NoTunnel(_),
                state,
            }) => {
                record.wire(*state);
                break tried;
            }
            Err(failed) => failed.state,
        };
        record.wire(state);
        let Some(retry) = retry else { break tried };
        let Upstream::Service(backend) = upstream else { break tried };
        let replayable = body.replayable() && head.upgrade.is_none();
        let again = Attempt { number, method: &head.method, state, replayable };
        let now = Instant::now();
        if deadline.is_some_and(|deadline| now >= deadline) {
            break tried;
        }
        let decision = retry.decide(again, &backend.budget, now, &mut proxy.dice.lock());
        match decision {
            Decision::Answer(why) => {
                // An answer that blames the caller is the answer; there is nothing to explain.
                if !matches!(state, WireState::Answered(status) if !status.is_server_error()) {
                    record.detail(why);
                    proxy.telemetry.metrics.retry(&backend.service.to_string(), why);
                }
                break tried;
            }
            Decision::Again(after) => {
                // A wait that outlasts the deadline would only end in it.
                if deadline.is_some_and(|deadline| now + after >= deadline) {
                    record.detail("deadline");
                    break tried;
                }
                proxy.telemetry.metrics.retry(&backend.service.to_string(), "sent");
                if let Some(endpoint) = &tried.endpoint {
                    addresses.push(endpoint.address);
                }
                drop(tried);
                sleep(after).await;
            }
        }
    };

    // response
    if tried.outcome.is_ok() {
        body.may_be_silent();
    }
    Ok(Answered {
        from_link: tried.endpoint.as_ref().is_some_and(|endpoint| peer_of(endpoint).is_some()),
        tried,
        response_edits: response_headers.iter().cloned().collect(),
        weighted_edit: weighted.and_then(|weighted| weighted.response_headers.clone()),
        asked,
        request,
    })
    .and_then(|answered| match &answered.tried.outcome {
        Ok(_) => Ok(answered),
        Err(failed) => Err(failed.reject.clone()),
    })
}

/// Keeps what was asked for of a request that is refused before it was understood.
fn unread(record: &mut Record, parts: &http::request::Parts, reject: Reject) -> Reject {
    let host = || parts.headers.get(http::header::HOST).map(|host| String::from_utf8_lossy(host.as_bytes()));
    let authority = parts.uri.authority().map(|authority| Cow::Borrowed(authority.as_str())).or_else(host);
    record.unread(&parts.method, &authority.unwrap_or_default(), parts.uri.path());
    reject
}

/// What the caller spoke and asks to be upgraded to: as it says itself, or as its sidecar says.
///
/// # Errors
/// It asks for what nobody is asked for.
fn arrived(
    connection: &Connection,
    parts: &http::request::Parts,
    marks: Marks,
) -> Result<(Version, Option<HeaderValue>), Reject> {
    if !connection.link {
        // The method of another request would be lost: across a link an upgrade is an extended CONNECT, which stands for GET.
        let may = marks.has(Mark::UPGRADE) && parts.version == Version::HTTP_11 && parts.method == Method::GET;
        let upgrade = if may { normalize::upgrade_of(&parts.headers) } else { normalize::protocol_asked(parts)? };
        return Ok((parts.version, upgrade));
    }
    let version = match parts.headers.get(HTTP_VERSION).filter(|_| marks.has(Mark::RESERVED)).map(HeaderValue::as_bytes) {
        Some(b"1.0") => Version::HTTP_10,
        Some(b"2") => Version::HTTP_2,
        _unsaid_is_1_1 => Version::HTTP_11,
    };
    let asked = normalize::protocol_asked(parts)?;
    Ok((version, asked.map(|protocol| parts.headers.get(UPGRADE_TOKEN).cloned().unwrap_or(protocol))))
}

/// How far a request came where another sidecar answered in its application's place before that did anything for it; nothing
/// where the application may have processed it.
fn unprocessed(response: &Response<Inflow>) -> Option<WireState> {
    let before = [Reason::ConnectFailed, Reason::ConnectTimeout, Reason::NoConfiguration, Reason::Draining, Reason::Overloaded];
    if said(response, Reason::UpstreamRefused) {
        return Some(WireState::Refused);
    }
    before.into_iter().any(|reason| said(response, reason)).then_some(WireState::NotSent)
}

/// An address as a host.
fn host_of(address: SocketAddr) -> String {
    if address.is_ipv6() { format!("[{}]", address.ip()) } else { address.ip().to_string() }
}

fn route<'a>(
    connection: &Connection,
    snapshot: &'a Snapshot,
    record: &mut Record,
    request: RequestView<'_>,
) -> Result<Chosen<'a>, Reject> {
    match connection.direction {
        Direction::Inbound => {
            if snapshot.generation == 0 {
                return Err(Reject::NoConfiguration);
            }
            let port = snapshot.inbound.port(connection.original.port());
            record.ends.service = port.service_of(normalize::host(request.authority)).cloned();
            Ok(Chosen::Inbound(port))
        }
        Direction::Outbound => {
            let host = normalize::host(request.authority);
            if let Some(port) = snapshot.outbound.service_called(connection.original, host) {
                record.ends.service = Some(port.service.clone());
                let rule = port.rule(host, request).ok_or_else(|| Reject::NoRoute(port.service.clone()))?;
                record.ends.route = Some(rule.name.clone());
                return Ok(Chosen::Rule { port, rule });
            }
            record.ends.service = None;
            match snapshot.outbound.workloads.get(&connection.original.ip()) {
                Some(endpoint) => Ok(Chosen::Workload(Upstream::Workload(endpoint, connection.original.port()))),
                None => Err(Reject::NoConfiguration),
            }
        }
    }
}

/// Draws one of a rule's backends by weight.
fn draw_backend<'a>(proxy: &Proxy, rule: &'a RouteRule) -> Result<(Upstream<'a>, Option<&'a WeightedBackend>), Reject> {
    let none = || Reject::NoBackend(rule.name.clone());
    let drawn = draw(&rule.backends, |total| proxy.dice.lock().below(total)).ok_or_else(none)?;
    let target = drawn.backend.as_ref().ok_or_else(none)?;
    Ok((Upstream::Service(target), Some(drawn)))
}

/// Sends a copy, whose fate never touches the caller: not its speed, not its failure, not its answer.
fn cast_shadow(proxy: &Arc<Proxy>, service: &str, backend: Option<&Arc<Backend>>, head: &Head, body: &RequestBody) {
    let service = service.to_owned();
    let skipped = || proxy.telemetry.metrics.shadow(&service, ShadowOutcome::Skipped);
    let Some(backend) = backend.map(Arc::clone) else { return skipped() };
    let Ok(place) = Arc::clone(&proxy.shadows).try_acquire_owned() else { return skipped() };
    let (head, copy, owner) = (head.clone(), body.copy(), Arc::clone(proxy));
    proxy.tasks.spawn(async move {
        let _place = place;
        let sent = async {
            // A body that is larger than what is kept, or that broke off, is not copied.
            let Ok(bytes) = copy.await else { return ShadowOutcome::Skipped };
            let body = if bytes.is_empty() { Body::Empty } else { Body::Full(bytes) };
            let tried = attempt(&owner, &head, body, Upstream::Service(&backend), &[], Bounds::default(), None).await;
            match tried.outcome {
                Ok(sent) => {
                    // The receiver's sidecar said it, and not its application.
                    let refused = sent.response.headers().contains_key(&REASON);
                    match Limited::new(sent.response.into_body(), SHADOW_ANSWER_MAX).collect().await {
                        Ok(_dropped) => {
                            sent.lease.give_back(None);
                            if refused { ShadowOutcome::Failed } else { ShadowOutcome::Answered }
                        }
                        Err(_broken) => ShadowOutcome::Failed,
                    }
                }
                Err(_failed) => ShadowOutcome::Failed,
            }
        };
        let outcome = timeout(SHADOW_MAX, sent).await.unwrap_or(ShadowOutcome::Failed);
        owner.telemetry.metrics.shadow(&service, outcome);
    });
}

/// Turns the destination's answer into the caller's.
fn respond(
    connection: &Arc<Connection>,
    mut record: Record,
    answered: Answered,
    readable: Option<&cors::Readable>,
    ours: Option<Upgrading>,
    http1: bool,
) -> Response<Body> {
    let Answered { tried, response_edits, weighted_edit, from_link, asked, request } = answered;
    let Tried { outcome, slot, .. } = tried;
    let Ok(sent) = outcome else {
        debug_assert!(false, "the line returned an answer");
        return Reject::UpstreamReset.render(false);
    };
    let sent = *sent;
    let marks = sent.marks;
    let (mut parts, incoming) = sent.response.into_parts();
    let (upgrade, key) = match &asked {
        Asked::Upgrade { protocol, key } => (Some(protocol), key.as_ref()),
        Asked::Nothing | Asked::Tunnel => (None, None),
    };
    let tunnels = matches!(asked, Asked::Tunnel) && parts.status.is_success();
    if tunnels {
        normalize::without_framing(&mut parts.headers);
    }
    let coded = marks.has(Mark::TRANSFER_ENCODING) && normalize::coding(&parts.headers) != Coding::Undone;
    let switches = parts.status == StatusCode::SWITCHING_PROTOCOLS;
    let length = normalize::one_length(parts.status, &mut parts.headers);
    if coded || (switches && upgrade.is_none()) || length.is_err() {
        return unfit(record, &Reject::UpstreamProtocol);
    }
    match marks.has(Mark::RESERVED).then(|| parts.headers.get(&REASON)).flatten() {
        // An answer of the mesh, in the server's place, says nothing about the server.
        Some(word) => {
            if from_link && let Some(reason) = Reason::of(word.as_bytes()) {
                record.answered_in_its_place(reason);
            }
        }
        None => connection.answered(),
    }
    let accepted = upgrade
        .filter(|_| switches || (from_link && parts.status == StatusCode::OK && parts.headers.contains_key(UPGRADE_TOKEN)));
    // To a caller in HTTP/2 that would say that the tunnel stands, and on a link it says so by another header.
    if upgrade.is_some() && accepted.is_none() && parts.status.is_success() && !http1 && !connection.link {
        return unfit(record, &Reject::UpgradeDeclined);
    }
    if accepted.is_some() && key.is_some_and(|key| !websocket::take_proof(&mut parts.headers, key)) {
        return unfit(record, &Reject::UpstreamProtocol);
    }
    let chosen = match accepted {
        Some(_) => parts.headers.get(http::header::UPGRADE).or_else(|| parts.headers.get(UPGRADE_TOKEN)).cloned(),
        None => None,
    };
    let demanded = normalize::demanded(&parts, from_link);
    let (mut spelling, mut phrase) = (sent.spelling, None);
    if marks.has(Mark::RESERVED) {
        if from_link {
            spelling = Spelling::take(&parts.headers);
            phrase = parts.headers.get(REASON_PHRASE).cloned();
        }
        normalize::strip_reserved(&mut parts.headers, from_link.then_some(&REASON));
    }
    normalize::strip_hop_by_hop(&mut parts.headers);
    let edited = !response_edits.is_empty() || weighted_edit.is_some();
    if let Some(readable) = readable {
        readable.write(&mut parts.headers);
    }
    for edit in response_edits {
        edit.apply(&mut parts.headers);
    }
    if let Some(edit) = weighted_edit {
        edit.apply(&mut parts.headers);
    }
    parts.version = Version::HTTP_11;
    record.answered(parts.status);
    if edited || marks.has(Mark::GRPC_STATUS) {
        record.grpc_status(&parts.headers);
    }
    dress(&mut parts, spelling, phrase, connection.link, http1);
    match demanded {
        Some(protocols) if connection.link => drop(parts.headers.insert(UPGRADE_TOKEN, protocols)),
        Some(protocols) if http1 => {
            parts.headers.insert(http::header::CONNECTION, HeaderValue::from_static("upgrade"));
            parts.headers.insert(http::header::UPGRADE, protocols);
        }
        // There is no such header in HTTP/2.
        _nothing => {}
    }
    if connection.link && upgrade.is_some() && parts.status.is_success() {
        parts.headers.insert(STATUS, HeaderValue::from(parts.status.as_u16()));
        parts.status = CARRIER;
    }
    let taken = match accepted {
        Some(asked) => {
            let Some(token) = chosen.filter(|chosen| normalize::is_offered(chosen, asked)) else {
                return unfit(record, &Reject::UpstreamProtocol);
            };
            Some(match (connection.link, http1) {
                (true, _) => Taken::Link(token),
                (false, true) => Taken::Switch(token),
                (false, false) => Taken::Stream,
            })
        }
        None => tunnels.then_some(Taken::Tunnel),
    };
    if let Some(taken) = taken {
        return upgrade::establish(connection, record, parts, taken, ours, sent.upgrading, (sent.lease, slot));
    }
    let body = placed::boxed(|| Answer::new(incoming, record, sent.lease, slot, request));
    Response::from_parts(parts, Body::Answer(body))
}

/// An answer that cannot be passed on.
fn unfit(mut record: Record, reject: &Reject) -> Response<Body> {
    record.refused(reject, &reject.told());
    reject.render(false)
}

/// Has an answer written as the application wrote it: its names' spelling and its reason phrase.
fn dress(parts: &mut http::response::Parts, spelling: Option<Spelling>, phrase: Option<HeaderValue>, link: bool, http1: bool) {
    if link {
        if let Some(spelling) = spelling {
            parts.headers.insert(HEADER_NAMES, spelling.to_header());
        }
        // The codec tells of a phrase that is not the status's own, and of no other.
        let phrase = parts.extensions.remove::<ReasonPhrase>().map(|phrase| HeaderValue::from_bytes(phrase.as_bytes()));
        if let Some(Ok(phrase)) = phrase {
            parts.headers.insert(REASON_PHRASE, phrase);
        }
    } else if http1 {
        if let Some(spelling) = spelling {
            spelling::restore(&spelling, &mut parts.extensions);
        }
        if let Some(Ok(phrase)) = phrase.map(|phrase| ReasonPhrase::try_from(phrase.as_bytes())) {
            parts.extensions.insert(phrase);
        }
    }
}

/// What a caller did for which the codec of HTTP/2 ended its stream when the head was good (RFC 9113 8.1.1).
pub(super) const BROKE: &str =
    "what came behind the head of the request breaks the rules of HTTP/2, or its body is not as long as content-length says";
/// How long a copy may take, from the request's head to the end of its answer.
const SHADOW_MAX: std::time::Duration = std::time::Duration::from_secs(30);
/// How much of a copy's answer is read before it is given up.
const SHADOW_ANSWER_MAX: usize = 1 << 20;
/// Copies that may be under way at once.
pub(crate) const SHADOWS_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    /// It is boxed once for each request.
    #[test]
    fn what_the_line_keeps_for_a_request_is_small() {
        fn of<A, B, C, D, E, F, G, O: Future>(_function: impl Fn(A, B, C, D, E, F, G) -> O) -> usize {
            size_of::<O>()
        }
        assert!(of(line) <= LINE_MAX, "{} bytes", of(line));
    }

    const LINE_MAX: usize = 6_800;

    #[test]
    fn the_order_is_the_documented_one() {
        let order: Vec<_> = ORDER.iter().map(|(step, _)| *step).collect();
        expect_test::expect![[r#"["record", "normalize", "snapshot", "route", "cors", "jwt", "authorization", "rate_limit", "fault", "redirect", "headers", "rewrite", "shadow", "deadline", "attempts", "response", "body"]"#]]
        .assert_eq(&format!("{order:?}"));
    }
}
