//! Every way in which a request is refused: a closed list, each with its status, its gRPC status, its word and the rule
//! that decided.
//!
//! Sources: RFC 9110 15 (statuses), gRPC over HTTP/2 and its status codes (a trailers-only answer), RFC 6585 (429).
//! A refusal says which rule decided: in the header `outrigger-reason` the stable word, in the body or `grpc-message` the
//! rule's name. It never says what a token or a body held.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Response, StatusCode};

use super::body::Body;
use super::connect::NoTunnel;
use super::interims::TooMuch;
use crate::base::names::Named;
use crate::dataplane::pool::HeadTooLarge;
use crate::policy::RuleName;
use crate::policy::headers::HeaderEdit;
use crate::policy::jwt::{TOKEN_MISSING, TokenRefused};
use crate::telemetry::reason::Reason;

/// Why a request or a connection is refused.
#[derive(Clone, Debug)]
pub(crate) enum Reject {
    /// Not HTTP that can be passed on, in one sentence.
    BadRequest(&'static str),
    /// A transfer coding beside the chunked one: its body could not be told from one without it further on.
    TransferCoding,
    /// A header that only a sidecar may set.
    ReservedHeader(HeaderName),
    /// The head is over a limit.
    TooLarge(Limit),
    /// The client read nothing of its answers.
    SlowReader,
    /// The client did something too often.
    Flood(Flood),
    /// The client sent no request in time.
    RequestTimeout,
    /// The client left in the middle of its request.
    CallerLeft,
    /// A peer without mutual TLS, refused by this rule.
    PlaintextRefused(RuleName),
    /// The token was refused.
    TokenRefused(TokenRefused),
    /// Authorization said no.
    Denied(RuleName),
    /// A CONNECT is not carried.
    NoTunnel(NoTunnel),
    /// No token left in the bucket; there is one after this time.
    RateLimited(RuleName, Duration),
    /// A fault was injected.
    Fault(RuleName, StatusCode),
    /// The route sends the caller elsewhere, and edits that answer.
    Redirected(RuleName, StatusCode, HeaderValue, Option<Arc<HeaderEdit>>),
    /// The route answers what a browser may ask, with these headers.
    Preflight(RuleName, Box<HeaderMap>),
    /// An address outside of the mesh.
    EgressDenied,
    /// A port of the sidecar's own.
    OwnPort,
    /// No rule matches.
    NoRoute(Named),
    /// The rule has no backend that exists.
    NoBackend(RuleName),
    /// Nothing is known of the destination yet, and it is not to be reached in plaintext for that.
    NoConfiguration,
    /// Limits of the service's breaker are reached.
    BreakerRejected(RuleName),
    /// The sidecar has nothing left to open a connection with.
    Overloaded,
    /// Large heads hold this much already.
    HeadsHeld(u64),
    /// The service has no endpoint.
    NoEndpoint(Named),
    /// The endpoint could not be connected to.
    ConnectFailed,
    /// Connecting took too long.
    ConnectTimeout,
    /// The endpoint is not who it must be.
    IdentityMismatch,
    /// The destination broke off before it answered.
    UpstreamReset,
    /// The destination said that it did not process the request.
    UpstreamRefused,
    /// The destination's answer cannot be passed on.
    UpstreamProtocol,
    /// The destination said too much before its answer.
    TooManyInterims,
    /// The head of the destination's answer is over a limit.
    AnswerTooLarge(HeadTooLarge),
    /// The application does not speak HTTP/2, as its caller does.
    AppNotHttp2,
    /// The application takes no protocol but HTTP, in a way that its caller would take for the other one or cannot hear.
    UpgradeDeclined,
    /// One attempt took too long, and there is no other.
    AttemptTimeout,
    /// The request's time is up.
    DeadlineExceeded,
}

/// A limit on the head of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Limit {
    Target(u32),
    HeadBytes(u32),
    HeaderCount(u32),
}

/// What a client of HTTP/2 did too often.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Flood {
    /// It took streams back: more than this within ten seconds.
    Resets(u32),
    /// It took back what was over already: more than this within ten seconds.
    LateResets(u32),
    /// It took streams back before they were looked at.
    PendingResets(u32),
    /// It had streams reset for breaking the rules.
    ErrorResets(u32),
    /// It sent frames that carry nothing: more than this within ten seconds.
    ControlFrames(u32),
    /// It sent empty DATA frames, beyond what the codec takes.
    EmptyData,
    /// It sent DATA frames of a few bytes, beyond what the codec holds where nobody takes them.
    TinyData,
    /// It sent DATA frames of padding and a few bytes at most, beyond what the codec takes.
    PaddedData,
    /// It spread one head over more frames than the codec takes.
    Continuations,
    /// It had more requests under way at once.
    Streams(u32),
}

/// What is told about a refusal.
#[derive(Clone, Debug)]
pub(crate) struct Told<'a> {
    pub(crate) status: StatusCode,
    /// <https://grpc.github.io/grpc/core/md_doc_statuscodes.html>
    pub(crate) grpc_status: u32,
    pub(crate) reason: Reason,
    pub(crate) rule: Option<&'a RuleName>,
    pub(crate) text: Cow<'static, str>,
}

impl Reject {
    /// Everything about it.
    pub(crate) fn told(&self) -> Told<'_> {
        let (status, grpc_status, reason, rule) = match self {
            Self::BadRequest(text) => {
                return Told {
                    status: StatusCode::BAD_REQUEST,
                    grpc_status: INTERNAL,
                    reason: Reason::BadRequest,
                    rule: None,
                    text: Cow::Borrowed(text),
                };
            }
            Self::TooLarge(limit) => {
                let (status, reason) = match limit {
                    Limit::Target(_) => (StatusCode::URI_TOO_LONG, Reason::UriTooLong),
                    Limit::HeadBytes(_) | Limit::HeaderCount(_) => {
                        (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, Reason::HeadersTooLarge)
                    }
                };
                return Told { status, grpc_status: RESOURCE_EXHAUSTED, reason, rule: None, text: limit.text() };
            }
            Self::Flood(flood) => {
                let status = StatusCode::TOO_MANY_REQUESTS;
                let (reason, text) = (flood.reason(), flood.text());
                return Told { status, grpc_status: RESOURCE_EXHAUSTED, reason, rule: None, text };
            }
            Self::AnswerTooLarge(_) | Self::TooManyInterims => {
                let status = StatusCode::BAD_GATEWAY;
                let text = Cow::Owned(match self {
                    Self::AnswerTooLarge(limit) => limit.to_string(),
                    _interims => TooMuch.to_string(),
                });
                return Told { status, grpc_status: INTERNAL, reason: Reason::UpstreamProtocol, rule: None, text };
            }
            Self::HeadsHeld(limit) => {
                let text = format!("the head is large, and those of other requests hold most of {limit} bytes (largeHeadBytes)");
                let (status, reason) = (StatusCode::SERVICE_UNAVAILABLE, Reason::Overloaded);
                return Told { status, grpc_status: RESOURCE_EXHAUSTED, reason, rule: None, text: Cow::Owned(text) };
            }
            Self::TransferCoding => {
                let text = Cow::Borrowed("the request has a Transfer-Encoding beside chunked, which is not implemented");
                let status = StatusCode::NOT_IMPLEMENTED;
                return Told { status, grpc_status: UNIMPLEMENTED, reason: Reason::BadRequest, rule: None, text };
            }
            Self::NoTunnel(why) => {
                let (status, grpc_status) = match why {
                    NoTunnel::Unnamed | NoTunnel::Undecided => (StatusCode::NOT_IMPLEMENTED, UNIMPLEMENTED),
                    NoTunnel::Tokens | NoTunnel::RateLimit => (StatusCode::FORBIDDEN, PERMISSION_DENIED),
                };
                let text = Cow::Borrowed(why.text());
                return Told { status, grpc_status, reason: Reason::ConnectRefused, rule: None, text };
            }
            Self::ReservedHeader(_) => (StatusCode::BAD_REQUEST, INTERNAL, Reason::ReservedHeader, None),
            Self::SlowReader => (StatusCode::REQUEST_TIMEOUT, DEADLINE_EXCEEDED, Reason::SlowReader, None),
            Self::RequestTimeout => (StatusCode::REQUEST_TIMEOUT, DEADLINE_EXCEEDED, Reason::RequestTimeout, None),
            Self::CallerLeft => (StatusCode::BAD_REQUEST, CANCELLED, Reason::CallerLeft, None),
            Self::PlaintextRefused(rule) => (StatusCode::FORBIDDEN, PERMISSION_DENIED, Reason::PlaintextRefused, Some(rule)),
            Self::TokenRefused(refused) if refused.reason == TOKEN_MISSING => {
                (StatusCode::UNAUTHORIZED, UNAUTHENTICATED, Reason::TokenMissing, Some(&refused.rule))
            }
            Self::TokenRefused(refused) => (StatusCode::UNAUTHORIZED, UNAUTHENTICATED, Reason::TokenRefused, Some(&refused.rule)),
            Self::Denied(rule) => (StatusCode::FORBIDDEN, PERMISSION_DENIED, Reason::Denied, Some(rule)),
            Self::RateLimited(rule, _) => (StatusCode::TOO_MANY_REQUESTS, RESOURCE_EXHAUSTED, Reason::RateLimited, Some(rule)),
            Self::Fault(rule, status) => (*status, grpc_of(*status), Reason::FaultInjected, Some(rule)),
            Self::Redirected(rule, status, ..) => (*status, UNKNOWN, Reason::Redirected, Some(rule)),
            Self::Preflight(rule, _) => (StatusCode::NO_CONTENT, UNKNOWN, Reason::Preflight, Some(rule)),
            Self::EgressDenied => (StatusCode::FORBIDDEN, PERMISSION_DENIED, Reason::EgressDenied, None),
            Self::OwnPort => (StatusCode::MISDIRECTED_REQUEST, PERMISSION_DENIED, Reason::OwnPort, None),
            Self::NoRoute(_) => (StatusCode::NOT_FOUND, UNIMPLEMENTED, Reason::NoRoute, None),
            Self::NoBackend(rule) => (StatusCode::INTERNAL_SERVER_ERROR, UNAVAILABLE, Reason::NoBackend, Some(rule)),
            Self::NoConfiguration => (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, Reason::NoConfiguration, None),
            Self::BreakerRejected(rule) => (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, Reason::BreakerRejected, Some(rule)),
            Self::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, Reason::Overloaded, None),
            Self::NoEndpoint(_) => (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, Reason::NoEndpoint, None),
            Self::ConnectFailed => (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, Reason::ConnectFailed, None),
            Self::ConnectTimeout => (StatusCode::GATEWAY_TIMEOUT, UNAVAILABLE, Reason::ConnectTimeout, None),
            Self::IdentityMismatch => (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, Reason::IdentityMismatch, None),
            Self::UpstreamReset => (StatusCode::BAD_GATEWAY, UNAVAILABLE, Reason::UpstreamReset, None),
            Self::UpstreamRefused => (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, Reason::UpstreamRefused, None),
            Self::UpstreamProtocol => (StatusCode::BAD_GATEWAY, INTERNAL, Reason::UpstreamProtocol, None),
            Self::AppNotHttp2 => (StatusCode::BAD_GATEWAY, INTERNAL, Reason::AppNotHttp2, None),
            Self::UpgradeDeclined => (StatusCode::NOT_IMPLEMENTED, UNIMPLEMENTED, Reason::UpgradeDeclined, None),
            Self::AttemptTimeout => (StatusCode::GATEWAY_TIMEOUT, DEADLINE_EXCEEDED, Reason::AttemptTimeout, None),
            Self::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, DEADLINE_EXCEEDED, Reason::DeadlineExceeded, None),
        };
        Told { status, grpc_status, reason, rule, text: Cow::Borrowed(reason.text()) }
    }

    /// What the log says of it beyond the reason's word: the limit, the fault, the header. None: the word says it all.
    pub(crate) fn detail(&self, told: &Told<'_>) -> Option<Cow<'static, str>> {
        match self {
            Self::TokenRefused(refused) => Some(Cow::Borrowed(refused.reason)),
            Self::ReservedHeader(name) => Some(Cow::Owned(name.to_string())),
            _another => (*told.text != *told.reason.text()).then(|| told.text.clone()),
        }
    }

    /// The answer that the caller gets.
    pub(crate) fn render(&self, grpc: bool) -> Response<Body> {
        let told = self.told();
        match self {
            // What a route answers is no refusal, and is said in HTTP to every caller.
            Self::Redirected(_, status, location, edit) => {
                let mut response = direct(*status, told.reason);
                response.headers_mut().insert(LOCATION, location.clone());
                if let Some(edit) = edit {
                    edit.apply(response.headers_mut());
                }
                return response;
            }
            Self::Preflight(_, headers) => {
                let mut response = direct(told.status, told.reason);
                response.headers_mut().extend(headers.as_ref().clone());
                return response;
            }
            _refusal => {}
        }
        let mut text = String::from("outrigger: ");
        text.push_str(told.text.trim_end_matches('.'));
        // Writing to a string does not fail.
        let written = match self {
            Self::TokenRefused(refused) => write!(text, ": {}", refused.reason),
            Self::ReservedHeader(name) => write!(text, ": {name}"),
            Self::NoRoute(service) | Self::NoEndpoint(service) => write!(text, ": {service}"),
            _nothing_more => Ok(()),
        };
        debug_assert!(written.is_ok(), "a string takes what is written");
        if let Some(rule) = told.rule {
            text.push_str("; decided by ");
            text.push_str(rule.as_str());
        }
        let mut response = if grpc {
            let mut response = Response::new(Body::Empty);
            let headers = response.headers_mut();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from(told.grpc_status));
            if let Ok(message) = HeaderValue::try_from(percent_encoding::utf8_percent_encode(&text, MESSAGE).to_string()) {
                headers.insert("grpc-message", message);
            }
            response
        } else {
            text.push('\n');
            let mut response = Response::new(Body::Full(Bytes::from(text)));
            *response.status_mut() = told.status;
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
            response
        };
        let headers = response.headers_mut();
        headers.insert(REASON, HeaderValue::from_static(told.reason.as_str()));
        match self {
            Self::RateLimited(_, after) => {
                // Whole seconds, rounded up: a caller that waits as long finds a token.
                let seconds = after.as_secs().saturating_add(u64::from(after.subsec_nanos() > 0)).max(1);
                headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
            }
            Self::TokenRefused(refused) => {
                // Who brought no token is told nothing but that one is needed (RFC 6750 3.1).
                let challenge = if refused.reason == TOKEN_MISSING { "Bearer" } else { "Bearer error=\"invalid_token\"" };
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
            }
            _nothing_more => {}
        }
        response
    }
}

impl Limit {
    /// Which one it is, in one sentence.
    pub(crate) fn text(self) -> Cow<'static, str> {
        Cow::Owned(match self {
            Self::Target(limit) => format!("the target of the request is longer than {limit} bytes (uriBytes)"),
            Self::HeadBytes(limit) => format!("the head of the request is larger than {limit} bytes (headerBytes)"),
            Self::HeaderCount(limit) => format!("the request has more than {limit} headers (headerCount)"),
        })
    }
}

impl Flood {
    fn reason(self) -> Reason {
        match self {
            Self::Resets(_) | Self::LateResets(_) | Self::PendingResets(_) | Self::ErrorResets(_) => Reason::TooManyResets,
            Self::ControlFrames(_) | Self::EmptyData | Self::TinyData | Self::PaddedData | Self::Continuations => {
                Reason::TooManyFrames
            }
            Self::Streams(_) => Reason::TooManyStreams,
        }
    }

    /// Which limit it is, in one sentence.
    fn text(self) -> Cow<'static, str> {
        Cow::Owned(match self {
            Self::Resets(limit) => format!("the client took back more than {limit} requests within ten seconds (resets)"),
            Self::LateResets(limit) => {
                format!("the client took back more than {limit} times within ten seconds what was over already (resets)")
            }
            Self::PendingResets(limit) => format!("the client took back more than {limit} requests at once (pendingResets)"),
            Self::ErrorResets(limit) => format!("more than {limit} streams of the client broke the rules (errorResets)"),
            Self::ControlFrames(limit) => {
                format!("the client sent more than {limit} frames that carry nothing within ten seconds (controlFrames)")
            }
            Self::Streams(limit) => {
                format!("the client has more than {limit} requests under way on one connection (concurrentStreams)")
            }
            Self::EmptyData => return Cow::Borrowed("the client sent too many empty DATA frames"),
            Self::TinyData => return Cow::Borrowed("the client sent too many tiny DATA frames that nobody took"),
            Self::PaddedData => return Cow::Borrowed("the client sent too many DATA frames of little but padding"),
            Self::Continuations => return Cow::Borrowed("the client spread one head over too many frames"),
        })
    }
}

/// An answer of a route's own, without a body.
fn direct(status: StatusCode, reason: Reason) -> Response<Body> {
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = status;
    response.headers_mut().insert(REASON, HeaderValue::from_static(reason.as_str()));
    response
}

fn grpc_of(status: StatusCode) -> u32 {
    // https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md
    match status.as_u16() {
        400 => INTERNAL,
        401 => UNAUTHENTICATED,
        403 => PERMISSION_DENIED,
        404 => UNIMPLEMENTED,
        429 | 502 | 503 | 504 => UNAVAILABLE,
        _ => UNKNOWN,
    }
}

/// Says why a request was refused, on every refusal; only sidecars set it.
pub(crate) const REASON: HeaderName = HeaderName::from_static("outrigger-reason");

/// What `grpc-message` escapes: everything but printable ASCII, and the percent sign.
const MESSAGE: &percent_encoding::AsciiSet = &percent_encoding::CONTROLS.add(b'%');

const CANCELLED: u32 = 1;
const UNKNOWN: u32 = 2;
const DEADLINE_EXCEEDED: u32 = 4;
const PERMISSION_DENIED: u32 = 7;
const RESOURCE_EXHAUSTED: u32 = 8;
const UNIMPLEMENTED: u32 = 12;
const INTERNAL: u32 = 13;
const UNAVAILABLE: u32 = 14;
const UNAUTHENTICATED: u32 = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_its_reason_and_its_rule() {
        let answer = Reject::Denied(RuleName::new("AuthorizationPolicy/shop/web rules[0]")).render(false);
        assert_eq!(answer.status(), StatusCode::FORBIDDEN);
        assert_eq!(answer.headers()["outrigger-reason"], "denied");
        let Body::Full(text) = answer.into_body() else { panic!("a text is expected") };
        assert!(text.ends_with(b"; decided by AuthorizationPolicy/shop/web rules[0]\n"), "{text:?}");
    }

    #[test]
    fn grpc_is_refused_in_its_own_shape() {
        let answer = Reject::NoConfiguration.render(true);
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.headers()["grpc-status"], "14");
        assert_eq!(answer.headers()["content-type"], "application/grpc");
        assert!(http_body::Body::is_end_stream(answer.body()));
    }

    #[test]
    fn the_log_says_which_limit_or_fault_it_was() {
        for (reject, detail) in [
            (Reject::TooLarge(Limit::HeadBytes(7)), Some("the head of the request is larger than 7 bytes (headerBytes)")),
            (Reject::TooLarge(Limit::Target(7)), Some("the target of the request is longer than 7 bytes (uriBytes)")),
            (Reject::BadRequest("no Host header"), Some("no Host header")),
            (Reject::TransferCoding, Some("the request has a Transfer-Encoding beside chunked, which is not implemented")),
            (Reject::ReservedHeader(REASON), Some("outrigger-reason")),
            (Reject::NoTunnel(NoTunnel::RateLimit), Some(NoTunnel::RateLimit.text())),
            (Reject::Denied(RuleName::new("web")), None),
            (Reject::UpstreamReset, None),
        ] {
            assert_eq!(reject.detail(&reject.told()).as_deref(), detail, "{reject:?}");
        }
    }

    #[test]
    fn a_missing_token_is_told_apart_from_a_bad_one() {
        for (reason, word, challenge) in
            [("token_missing", "token_missing", "Bearer"), ("token_expired", "token_refused", "Bearer error=\"invalid_token\"")]
        {
            let answer = Reject::TokenRefused(TokenRefused { rule: RuleName::new("web"), reason }).render(false);
            assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
            assert_eq!(
                (&answer.headers()["outrigger-reason"], &answer.headers()["www-authenticate"]),
                (&HeaderValue::from_static(word), &HeaderValue::from_static(challenge))
            );
        }
    }

    #[test]
    fn a_rate_limit_says_when_to_come_back() {
        let answer = Reject::RateLimited(RuleName::new("TrafficPolicy/shop/web"), Duration::from_millis(1_200)).render(false);
        assert_eq!((answer.status().as_u16(), &answer.headers()["retry-after"]), (429, &HeaderValue::from_static("2")));
    }
}
