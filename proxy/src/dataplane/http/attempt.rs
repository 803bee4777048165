//! One upstream try: pick an endpoint, be admitted, check out a connection, send, classify.
//!
//! What an attempt says is data: the answer, or the refusal it would end in and how far the request came. Whether there
//! is another attempt is decided by the retry policy alone.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::Either;
use h2::ext::Protocol;
use http::header::{CONNECTION, CONTENT_LENGTH, COOKIE, HOST, TE, TRANSFER_ENCODING, UPGRADE};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use http_body::Body as _;
use tokio::time::{Instant, sleep, timeout_at};

use super::body::{Body, BodyFault, Replay};
use super::connect::NoTunnel;
use super::expect::Expectation;
use super::interims::Interims;
use super::marks::Mark;
use super::reject::{REASON, Reject};
use super::spelling::{self, HEADER_NAMES, Spelling};
use super::websocket;
use crate::dataplane::Proxy;
use crate::dataplane::balance;
use crate::dataplane::pool::connect::ConnectError;
use crate::dataplane::pool::{Destination, Reuse, SendError, Sent, Speaks};
use crate::policy::breaker::Slot;
use crate::policy::grpc::is_grpc;
use crate::policy::outlier::Outcome;
use crate::policy::retry::WireState;
use crate::snapshot::{AppProtocol, Backend, Endpoint};
use crate::telemetry::reason::Reason;

/// A request's head in the form that attempts are made from.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) method: Method,
    /// None where the caller named none.
    pub(crate) authority: Option<Authority>,
    pub(crate) path_and_query: PathAndQuery,
    pub(crate) headers: HeaderMap,
    /// How the caller spelled its headers, where that is not the usual way.
    pub(crate) spelling: Option<Spelling>,
    /// What the caller spoke, at the beginning of the chain.
    pub(crate) version: Version,
    /// The protocol that the caller wants instead of HTTP.
    pub(crate) upgrade: Option<HeaderValue>,
    /// The caller waits to be told to send its body.
    pub(crate) expectation: Option<Expectation>,
}

/// Whom a request goes to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Upstream<'a> {
    /// One of a service's endpoints.
    Service(&'a Arc<Backend>),
    /// A workload that the application dialled by its address.
    Workload(&'a Arc<Endpoint>, u16),
    /// The own application, at the address that was dialled, for this client.
    Application { at: SocketAddr, client: SocketAddr, protocol: AppProtocol },
}

/// What an attempt came to.
#[derive(Debug)]
pub(crate) struct Tried {
    pub(crate) endpoint: Option<Arc<Endpoint>>,
    pub(crate) outcome: Result<Box<Sent>, Failed>,
    /// Held while the answer's body is on its way.
    pub(crate) slot: Option<Slot>,
}

/// No answer.
#[derive(Debug)]
pub(crate) struct Failed {
    /// What the caller hears if this was the last attempt.
    pub(crate) reject: Reject,
    pub(crate) state: WireState,
}

/// How a request is written for its receiver.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Form {
    /// To another sidecar.
    Link,
    Http1,
    Http2,
}

/// How long a request may take.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bounds {
    /// One attempt of it.
    pub(crate) attempt: Option<Duration>,
    /// All of them.
    pub(crate) deadline: Option<Instant>,
}

/// Tries once. `tried` are endpoints that failed before; whoever hears `interims` is told what is said before the answer.
pub(crate) async fn attempt(
    proxy: &Arc<Proxy>,
    head: &Head,
    body: Body,
    to: Upstream<'_>,
    tried: &[SocketAddr],
    bounds: Bounds,
    interims: Option<&Interims>,
) -> Tried {
    let none = |reject| Tried { endpoint: None, outcome: Err(Failed { reject, state: WireState::NotSent }), slot: None };
    let (endpoint, destination, protocol) = match to {
        Upstream::Service(backend) => {
            let Some(endpoint) = pick(proxy, backend, tried) else { return none(Reject::NoEndpoint(backend.service.clone())) };
            // Its sidecar would close the door without a word.
            if endpoint.is_own_port() {
                let endpoint = Some(endpoint);
                return Tried { endpoint, ..none(Reject::OwnPort) };
            }
            let destination = Destination::endpoint(&endpoint, backend);
            (Some(endpoint), destination, backend.protocol)
        }
        Upstream::Workload(endpoint, port) => {
            let destination = Destination::workload(endpoint, port);
            (Some(Arc::clone(endpoint)), destination, AppProtocol::Detect)
        }
        Upstream::Application { at, client, protocol } => (None, Destination::application(at, client), protocol),
    };
    // The receiver's sidecar decides; who has none decides nothing.
    if head.is_tunnel() && destination.peer.is_none() && !matches!(to, Upstream::Application { .. }) {
        return Tried { endpoint, ..none(Reject::NoTunnel(NoTunnel::Undecided)) };
    }
    let slot = match to {
        Upstream::Service(backend) => match backend.breaker.admit_request() {
            Some(slot) => Some(slot),
            None => return none(Reject::BreakerRejected(backend.breaker.rule.clone())),
        },
        Upstream::Workload(..) | Upstream::Application { .. } => None,
    };
    let form = if destination.peer.is_some() {
        Form::Link
    } else if head.takes_http2(protocol) {
        Form::Http2
    } else {
        Form::Http1
    };
    let origin = body.origin();
    // Who waits for leave to send a body had not sent it; the wait is not begun a second time.
    let replay = head.expectation.is_none().then(|| body.replay());
    let request = match head.request(form, destination.address, body) {
        Ok(request) => request,
        Err(reject) => return none(reject),
    };
    let speaks = if form == Form::Http1 { Speaks::Http1 } else { Speaks::Http2 };
    let attempt_ends = bounds.attempt.map(|limit| Instant::now() + limit);
    let (ends, overall) = match (attempt_ends, bounds.deadline) {
        (Some(attempt), Some(deadline)) if attempt < deadline => (Some(attempt), false),
        (Some(attempt), None) => (Some(attempt), false),
        (_, deadline) => (deadline, true),
    };
    // Large: from here on it is handed on by its place.
    let sending = pin!(async {
        match proxy.pool.send(&destination, speaks, request, Reuse::Allowed, interims).await {
            Err(SendError::NotExtended | SendError::NotHttp2(_)) if form == Form::Http2 && head.upgrade.is_some() => {
                Box::pin(upgrade(proxy, head, &destination, interims)).await
            }
            Err(undone @ (SendError::Unread { .. } | SendError::Refused(_))) => match replay {
                Some(replay) => Box::pin(repeat(proxy, (head, form), &destination, replay, undone, interims)).await,
                None => Err(undone),
            },
            sent => sent,
        }
    });
    let sending = match &head.expectation {
        None => Either::Left(sending),
        Some(expectation) => Either::Right(expectation.wait(sending)),
    };
    let sent = match ends {
        Some(ends) => match timeout_at(ends, sending).await {
            Ok(sent) => sent.map_err(classify),
            // It cannot be known how far a request came that was given up, so it counts as sent.
            Err(_elapsed) => Err(Failed {
                reject: if overall { Reject::DeadlineExceeded } else { Reject::AttemptTimeout },
                state: WireState::Sent,
            }),
        },
        None => sending.await.map_err(classify),
    };
    let fault = if sent.is_err() { origin.and_then(|origin| origin.fault()) } else { None };
    let mut sent = match fault {
        Some(fault) => Err(Failed { reject: fault_of(fault), state: WireState::Sent }),
        None => sent,
    };
    match (form, &head.upgrade, &mut sent) {
        (Form::Link, Some(_), Ok(sent)) => declined(&mut sent.response),
        (Form::Http2, Some(protocol), Ok(sent)) if sent.upgrading.is_some() => accepted(head, protocol, &mut sent.response),
        _as_it_is => {}
    }
    if let (Upstream::Service(backend), Some(endpoint)) = (to, &endpoint) {
        report(proxy, backend, endpoint, &sent);
    }
    Tried { endpoint, outcome: sent, slot }
}

/// It is proven that nobody read the request, for its connection was closed just then; or the peer says that it did not process it
/// (RFC 9113 8.7): it did not happen. That is no failure of the endpoint's, so it goes to the same one on another connection, or
/// when there is room, is no retry, and takes nothing from the budget. A server that closes every connection unread, or refuses
/// everything, is left to the retry policy in the end.
async fn repeat(
    proxy: &Arc<Proxy>,
    (head, form): (&Head, Form),
    destination: &Destination,
    replay: Replay,
    mut undone: SendError,
    interims: Option<&Interims>,
) -> Result<Box<Sent>, SendError> {
    let speaks = if form == Form::Http1 { Speaks::Http1 } else { Speaks::Http2 };
    for after in REPEATS {
        // Who refuses more than one request in a row has too much to do.
        if !after.is_zero() && matches!(undone, SendError::Refused(_)) {
            sleep(after).await;
        }
        let Some(Ok(request)) = replay.body().map(|body| head.request(form, destination.address, body)) else { break };
        match proxy.pool.send(destination, speaks, request, Reuse::Fresh, interims).await {
            Err(again @ (SendError::Unread { .. } | SendError::Refused(_))) => undone = again,
            sent => return sent,
        }
    }
    Err(undone)
}

/// Asks an application for another protocol by an upgrade of HTTP/1.1, which is what it may take where it does not offer to be asked
/// in HTTP/2.
async fn upgrade(
    proxy: &Arc<Proxy>,
    head: &Head,
    destination: &Destination,
    interims: Option<&Interims>,
) -> Result<Box<Sent>, SendError> {
    let Ok(request) = head.request(Form::Http1, destination.address, Body::Empty) else { return Err(SendError::NotExtended) };
    match proxy.pool.send(destination, Speaks::Http1, request, Reuse::Allowed, interims).await {
        // To who hears HTTP/2 alone that was no request.
        Err(SendError::NotSent(_) | SendError::Malformed(_) | SendError::Broken(_) | SendError::Unread { source: _ }) => {
            Err(SendError::NotExtended)
        }
        sent => sent,
    }
}

/// Has an application's answer say as HTTP/1.1 does that it takes the protocol.
fn accepted<B>(head: &Head, protocol: &HeaderValue, response: &mut Response<B>) {
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(UPGRADE, protocol.clone());
    if websocket::is_meant(protocol) {
        websocket::prove(&head.headers, response.headers_mut());
    }
}

/// Gives an application's answer to an upgrade that it did not take the status back that a link cannot carry.
fn declined<B>(response: &mut Response<B>) {
    let status = response.headers_mut().remove(STATUS).and_then(|status| StatusCode::from_bytes(status.as_bytes()).ok());
    if let Some(status) = status {
        *response.status_mut() = status;
    }
}

/// The status by which a retry policy judges an answer: gRPC says in the head what HTTP says by 503.
pub(crate) fn effective_status(sent: &Sent) -> StatusCode {
    let status = sent.response.status();
    let unavailable = || sent.response.headers().get(&GRPC_STATUS).is_some_and(|grpc| grpc.as_bytes() == b"14");
    let grpc = status == StatusCode::OK && sent.marks.has(Mark::GRPC_STATUS);
    if grpc && unavailable() { StatusCode::SERVICE_UNAVAILABLE } else { status }
}

/// An endpoint of a service that is neither ejected nor tried already, where there is such a one.
pub(crate) fn pick(proxy: &Proxy, backend: &Backend, tried: &[SocketAddr]) -> Option<Arc<Endpoint>> {
    let now = Instant::now();
    let load = |endpoint: &Endpoint| proxy.pool.load(endpoint.address);
    let mut dice = proxy.dice.lock();
    balance::pick(backend, tried, now, load, &mut dice).map(Arc::clone)
}

/// What the caller is told about a connection that was not made.
pub(crate) fn refusal_of(error: ConnectError) -> Reject {
    match error {
        ConnectError::Timeout(_) => Reject::ConnectTimeout,
        ConnectError::Identity { .. } | ConnectError::NotOurs(_) => Reject::IdentityMismatch,
        ConnectError::Exhausted { .. } => Reject::Overloaded,
        ConnectError::Limit(rule) => Reject::BreakerRejected(rule),
        ConnectError::Failed { .. } | ConnectError::Http { .. } | ConnectError::Own(_) => Reject::ConnectFailed,
    }
}

/// The caller's own fault, whatever came of it upstream.
fn fault_of(fault: BodyFault) -> Reject {
    match fault {
        BodyFault::Stalled => Reject::RequestTimeout,
        BodyFault::Left => Reject::CallerLeft,
        BodyFault::Malformed => Reject::BadRequest("the body of the request is not valid"),
        BodyFault::Trailers(over) => Reject::BadRequest(over.text_of_request()),
    }
}

fn classify(error: SendError) -> Failed {
    tracing::debug!(error = &error as &dyn std::error::Error, "an attempt failed");
    match error {
        SendError::Connect(error) => Failed { reject: refusal_of(error), state: WireState::NotSent },
        // The words of a connection that was not made: whoever reads them across a link knows that nothing was sent.
        SendError::NotSent(_) | SendError::Unread { source: _ } => {
            Failed { reject: Reject::ConnectFailed, state: WireState::NotSent }
        }
        SendError::NotExtended => Failed { reject: Reject::UpgradeDeclined, state: WireState::NotSent },
        SendError::NotHttp2(_) => Failed { reject: Reject::AppNotHttp2, state: WireState::NotSent },
        SendError::Refused(_) => Failed { reject: Reject::UpstreamRefused, state: WireState::Refused },
        SendError::TooMuch(_) => Failed { reject: Reject::TooManyInterims, state: WireState::Sent },
        SendError::TooLarge(limit) => Failed { reject: Reject::AnswerTooLarge(limit), state: WireState::Sent },
        SendError::Malformed(_) => Failed { reject: Reject::UpstreamProtocol, state: WireState::Sent },
        SendError::Broken(_) => Failed { reject: Reject::UpstreamReset, state: WireState::Sent },
    }
}

/// Is that the word of a refusal by another sidecar?
pub(crate) fn said<B>(response: &Response<B>, reason: Reason) -> bool {
    response.headers().get(&REASON).is_some_and(|word| word.as_bytes() == reason.as_str().as_bytes())
}

fn report(proxy: &Proxy, backend: &Backend, endpoint: &Endpoint, sent: &Result<Box<Sent>, Failed>) {
    let outcome = match sent {
        // As usual, and then nobody need know what time it is.
        Ok(sent) if !effective_status(sent).is_server_error() && backend.ejections.all_are_well() => return,
        Ok(sent) if !effective_status(sent).is_server_error() => Outcome::Success,
        // A limit of our own is not the endpoint's fault, nor is a caller that stands still, breaks off or sends nonsense.
        Err(Failed {
            reject:
                Reject::BreakerRejected(_)
                | Reject::Overloaded
                | Reject::HeadsHeld(_)
                | Reject::RequestTimeout
                | Reject::CallerLeft
                | Reject::BadRequest(_)
                | Reject::AppNotHttp2
                | Reject::UpgradeDeclined,
            ..
        }) => return,
        // Nor is it that its caller speaks HTTP/2 and it does not.
        Ok(sent) if said(&sent.response, Reason::AppNotHttp2) || said(&sent.response, Reason::UpgradeDeclined) => return,
        Ok(_) | Err(_) => Outcome::Failure,
    };
    let now = Instant::now();
    if let Some(out_for) = backend.ejections.report(endpoint.address, outcome, backend.endpoints.len(), now) {
        let (service, workload) = (backend.service.to_string(), endpoint.workload.to_string());
        tracing::info!(service, workload, seconds = out_for.as_secs_f64(), "an endpoint is left out because it failed");
        proxy.telemetry.metrics.ejected(&service, &workload, now + out_for);
    }
}

impl Head {
    /// Is a destination in clear that was declared so spoken to in HTTP/2? What is not declared is spoken to as the caller
    /// speaks; `http` means HTTP/1.1 to applications, whatever their callers speak. There is no gRPC but in HTTP/2.
    fn takes_http2(&self, protocol: AppProtocol) -> bool {
        match protocol {
            AppProtocol::Http2 => true,
            // A call of gRPC is neither for another protocol nor for a tunnel.
            AppProtocol::Http => {
                self.version == Version::HTTP_2 && self.upgrade.is_none() && !self.is_tunnel() && is_grpc(&self.headers)
            }
            AppProtocol::Detect | AppProtocol::Opaque => self.version == Version::HTTP_2,
        }
    }

    /// A tunnel, which has no target but its authority.
    fn is_tunnel(&self) -> bool {
        self.method == Method::CONNECT
    }

    fn request(&self, form: Form, destination: SocketAddr, body: Body) -> Result<Request<Body>, Reject> {
        let streams = !body.is_end_stream() && body.size_hint().exact().is_none();
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.headers_mut() = self.headers.clone();
        let cannot = Reject::BadRequest("a target that cannot be passed on");
        if form == Form::Http1 {
            *request.uri_mut() = match &self.authority {
                Some(authority) if self.is_tunnel() => Uri::from(authority.clone()),
                _path => Uri::from(self.path_and_query.clone()),
            };
            *request.version_mut() = if self.version == Version::HTTP_10 { Version::HTTP_10 } else { Version::HTTP_11 };
            let headers = request.headers_mut();
            if let Some(authority) = &self.authority
                && !headers.contains_key(HOST)
            {
                headers.insert(HOST, HeaderValue::try_from(authority.as_str()).map_err(|_not_ascii| cannot)?);
            }
            if self.version == Version::HTTP_2 {
                join_cookies(headers);
            }
            let bodyless = matches!(self.method, Method::GET | Method::HEAD);
            if streams && bodyless && self.version != Version::HTTP_10 && !headers.contains_key(CONTENT_LENGTH) {
                // The codec takes it for granted that there is no body then.
                headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
            }
            if let Some(protocol) = &self.upgrade {
                headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
                headers.insert(UPGRADE, protocol.clone());
            }
            // "A sender of TE MUST also send a `TE` connection option" (RFC 9110 10.1.4).
            if headers.contains_key(TE) {
                headers.append(CONNECTION, HeaderValue::from_static("TE"));
            }
            if let Some(spelling) = &self.spelling {
                spelling::restore(spelling, request.extensions_mut());
            }
            return Ok(request);
        }
        let authority = match &self.authority {
            Some(authority) => authority.clone(),
            None => Authority::try_from(destination.to_string()).map_err(|_not_one| cannot.clone())?,
        };
        let mut target = http::uri::Parts::default();
        target.authority = Some(authority.clone());
        // "The `:scheme` and `:path` pseudo-header fields MUST be omitted" (RFC 9113 8.5).
        if !self.is_tunnel() {
            target.scheme = Some(Scheme::HTTP);
            target.path_and_query = Some(self.path_and_query.clone());
        }
        *request.uri_mut() = Uri::from_parts(target).map_err(|_not_a_uri| cannot.clone())?;
        *request.version_mut() = Version::HTTP_2;
        if let Some(protocol) = &self.upgrade {
            // RFC 8441 4: the upgrade of HTTP/1.1, as HTTP/2 carries it.
            *request.method_mut() = Method::CONNECT;
            let token = protocol.to_str().map_err(|_not_ascii| cannot.clone())?;
            request.extensions_mut().insert(protocol_of(token, form));
            if form != Form::Link {
                websocket::take_key(request.headers_mut());
            }
        }
        if form != Form::Link {
            request.headers_mut().remove(HOST);
        } else {
            // It keeps its place among the others for the application's sake, and says what the target says.
            let differs = |host: &HeaderValue| !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes());
            if self.headers.get(HOST).is_some_and(differs) {
                let host = HeaderValue::try_from(authority.as_str()).map_err(|_not_ascii| cannot.clone())?;
                request.headers_mut().insert(HOST, host);
            }
            if let Some(spelling) = &self.spelling {
                request.headers_mut().insert(HEADER_NAMES, spelling.to_header());
            }
            // The usual one goes without saying: a header that is taken away again at the other end costs most there.
            let spoken = match self.version {
                Version::HTTP_10 => Some("1.0"),
                Version::HTTP_2 => Some("2"),
                _others_are_1_1 => None,
            };
            if let Some(spoken) = spoken {
                request.headers_mut().insert(HTTP_VERSION, HeaderValue::from_static(spoken));
            }
            if let Some(protocol) = &self.upgrade {
                request.headers_mut().insert(UPGRADE_TOKEN, protocol.clone());
            }
        }
        Ok(request)
    }
}

/// "If there are multiple Cookie header fields after decompression, these MUST be concatenated into a single octet string using
/// the two-octet delimiter of `; ` before being passed into a non-HTTP/2 context" (RFC 9113 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let mut cookies = headers.get_all(COOKIE).iter();
    let (Some(first), Some(second)) = (cookies.next(), cookies.next()) else { return };
    let mut joined = first.as_bytes().to_vec();
    for cookie in std::iter::once(second).chain(cookies) {
        joined.extend_from_slice(b"; ");
        joined.extend_from_slice(cookie.as_bytes());
    }
    // Values that are valid one by one are valid together.
    if let Ok(joined) = HeaderValue::from_bytes(&joined) {
        headers.insert(COOKIE, joined);
    }
}

/// The `:protocol` of an extended CONNECT. On a link the usual one is spelled out; every other one travels in our own header.
fn protocol_of(token: &str, form: Form) -> Protocol {
    if token.eq_ignore_ascii_case(websocket::WEBSOCKET) {
        Protocol::from_static(websocket::WEBSOCKET)
    } else if form == Form::Link {
        Protocol::from_static("outrigger")
    } else {
        Protocol::from(token)
    }
}

/// What the caller spoke at the beginning of the chain, so that the last sidecar speaks the same; absent where that is HTTP/1.1.
pub(crate) const HTTP_VERSION: HeaderName = HeaderName::from_static("outrigger-http-version");
/// The token of an HTTP/1.1 upgrade that travels as extended CONNECT; in the answer, that it was accepted.
pub(crate) const UPGRADE_TOKEN: HeaderName = HeaderName::from_static("outrigger-upgrade");
/// The status of an answer in HTTP to the request for an upgrade: on a link a success would mean that the tunnel stands
/// (RFC 8441 4), so such an answer crosses under [`CARRIER`].
pub(crate) const STATUS: HeaderName = HeaderName::from_static("outrigger-status");
pub(crate) const CARRIER: StatusCode = StatusCode::BAD_REQUEST;
/// What gRPC says instead of a status.
pub(crate) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// A request is sent again so often that provably nobody read or processed, and so long after it was refused.
const REPEATS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(10), Duration::from_millis(100)];
