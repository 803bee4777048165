//! Why a request or a connection ended as it did: one closed list, shared by the metric label, the access log and the
//! response. A word here is a promise to people who write alerts on it: words are added, never renamed.

/// Who is answerable for an end of this kind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fault {
    /// Nobody: the application's own answer, whatever its status, went through.
    Nobody,
    /// The caller sent what cannot be served, or left.
    Caller,
    /// A rule of the mesh said no.
    Policy,
    /// The application behind the destination, or the way to it, failed.
    Upstream,
    /// The mesh itself could not serve.
    Mesh,
}

macro_rules! reasons {
    ($($(#[doc = $text:literal])+ $variant:ident = $word:literal, $fault:ident;)+) => {
        /// Why a request or a connection ended as it did.
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub(crate) enum Reason {
            $($(#[doc = $text])+ $variant,)+
        }

        impl Reason {
            /// All of them, in the order of the documentation.
            pub(crate) const ALL: &[Self] = &[$(Self::$variant),+];

            /// The stable word, as in logs, labels and response headers.
            pub(crate) fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }

            /// Who is answerable.
            pub(crate) fn fault(self) -> Fault {
                match self { $(Self::$variant => Fault::$fault,)+ }
            }

            /// One sentence for people.
            pub(crate) fn text(self) -> &'static str {
                match self { $(Self::$variant => concat!($($text),+).trim_ascii(),)+ }
            }
        }
    };
}

reasons! {
    /// The destination's own answer went through, or an opaque connection ran to its end. Where the destination's sidecar answered in
    /// its place, that sidecar's reason stands here too.
    Answered = "answered", Nobody;
    /// As `answered`; the peer was allowed because no policy is on the target.
    DefaultAllow = "default_allow", Nobody;
    /// A route's redirect was the answer.
    Redirected = "redirected", Nobody;
    /// A route's cross-origin policy answered a browser that asked what it may ask.
    Preflight = "preflight", Nobody;

    /// The request is not valid HTTP, or its target cannot be normalised.
    BadRequest = "bad_request", Caller;
    /// The request carries a header that only the mesh may set.
    ReservedHeader = "reserved_header", Caller;
    /// The header block is larger than the limit.
    HeadersTooLarge = "headers_too_large", Caller;
    /// The request line is longer than the limit.
    UriTooLong = "uri_too_long", Caller;
    /// The caller sent no whole request in time.
    RequestTimeout = "request_timeout", Caller;
    /// The caller took back too many requests on one connection of HTTP/2.
    TooManyResets = "too_many_resets", Caller;
    /// The caller sent too many frames of HTTP/2 that carry nothing.
    TooManyFrames = "too_many_frames", Caller;
    /// The caller had too many requests under way on one connection of HTTP/2.
    TooManyStreams = "too_many_streams", Caller;
    /// The caller read nothing of its answer for too long.
    SlowReader = "slow_reader", Caller;
    /// The caller left before the answer was complete.
    CallerLeft = "caller_left", Caller;
    /// The peer's TLS handshake failed, for example with a certificate that expired; the access log's `detail` says why.
    HandshakeFailed = "handshake_failed", Caller;

    /// The peer spoke plaintext to a port that takes mutual TLS only.
    PlaintextRefused = "plaintext_refused", Policy;
    /// A token is needed and none was sent.
    TokenMissing = "token_missing", Policy;
    /// The token was refused.
    TokenRefused = "token_refused", Policy;
    /// An authorization rule denied, or none allowed.
    Denied = "denied", Policy;
    /// The caller asks for a tunnel by CONNECT, and no authorization rule allows that method by name, or rules about tokens or a rate
    /// limit are in force, which do not see what a tunnel carries.
    ConnectRefused = "connect_refused", Policy;
    /// The rate limit is used up.
    RateLimited = "rate_limited", Policy;
    /// A fault was injected on purpose.
    FaultInjected = "fault_injected", Policy;
    /// The mesh does not let this pod reach addresses outside of it.
    EgressDenied = "egress_denied", Policy;
    /// The connection was for one of the sidecar's own ports.
    OwnPort = "own_port", Policy;

    /// No rule of the service's routes matches the request.
    NoRoute = "no_route", Mesh;
    /// The matching rule has no backend that exists.
    NoBackend = "no_backend", Mesh;
    /// The sidecar has no configuration for the destination yet.
    NoConfiguration = "no_configuration", Mesh;
    /// Limits on connections or pending requests of the service are reached.
    BreakerRejected = "breaker_rejected", Mesh;
    /// The sidecar is at a limit of its own: it may open no further file, its machine gives no further socket, or the large heads of
    /// requests under way hold as much as they may together.
    Overloaded = "overloaded", Mesh;
    /// The sidecar is stopping.
    Draining = "draining", Mesh;
    /// A fault of the sidecar's own.
    Internal = "internal", Mesh;

    /// The service has no endpoint.
    NoEndpoint = "no_endpoint", Upstream;
    /// The endpoint could not be connected to.
    ConnectFailed = "connect_failed", Upstream;
    /// Connecting to the endpoint took too long.
    ConnectTimeout = "connect_timeout", Upstream;
    /// The endpoint is not the workload that the service's endpoints name, or could not prove it.
    IdentityMismatch = "identity_mismatch", Upstream;
    /// The destination closed or reset the connection before its answer was complete.
    UpstreamReset = "upstream_reset", Upstream;
    /// The destination said that it did not process the request (REFUSED_STREAM or GOAWAY of HTTP/2).
    UpstreamRefused = "upstream_refused", Upstream;
    /// The destination's answer is not valid HTTP.
    UpstreamProtocol = "upstream_protocol", Upstream;
    /// The caller speaks HTTP/2 and the application does not: have it speak HTTP/2, and declare its port by
    /// `appProtocol: kubernetes.io/h2c` or a name that begins with `grpc` or `http2`; or, unless the calls are gRPC, declare its port as `http`.
    AppNotHttp2 = "app_not_http2", Upstream;
    /// The caller asks for another protocol (WebSocket over HTTP/2), and the application takes that neither by an extended CONNECT
    /// nor by an upgrade of HTTP/1.1.
    UpgradeDeclined = "upgrade_declined", Upstream;
    /// One attempt took longer than its timeout, and no attempt was left.
    AttemptTimeout = "attempt_timeout", Upstream;
    /// The request's deadline passed.
    DeadlineExceeded = "deadline_exceeded", Upstream;
    /// Nothing was sent in either direction for too long.
    IdleTimeout = "idle_timeout", Upstream;
}

impl Reason {
    /// The reason that a word stands for.
    pub(crate) fn of(word: &[u8]) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.as_str().as_bytes() == word)
    }

    /// Did the mesh answer in the destination's place?
    pub(crate) fn is_refusal(self) -> bool {
        match self.fault() {
            Fault::Nobody => false,
            Fault::Caller => !matches!(self, Self::CallerLeft),
            Fault::Policy | Fault::Upstream | Fault::Mesh => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_reason_has_a_word_of_its_own_and_a_sentence() {
        let words: BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
        assert_eq!(words.len(), Reason::ALL.len());
        for reason in Reason::ALL {
            assert!(reason.as_str().bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'), "{reason:?}");
            assert!(reason.text().ends_with('.'), "{reason:?}");
        }
    }
}
