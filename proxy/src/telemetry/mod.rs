//! What one sees of a process: its log, its metrics, one access-log line a request, and spans.
//!
//! The data plane hands one [`RequestEnd`] or [`ConnectionEnd`] to [`Telemetry`] on every way out; everything else
//! follows from it. Nothing here blocks a request: what cannot be written is dropped and counted.

use std::sync::Arc;
use std::time::Duration;

pub(crate) mod access_log;
pub(crate) mod export;
pub(crate) mod handshake;
pub(crate) mod log;
pub(crate) mod metrics;
pub(crate) mod process;
pub(crate) mod reason;
pub(crate) mod series;
pub(crate) mod trace;

use access_log::AccessLog;
use export::SpanExport;
use metrics::Metrics;
use reason::{Fault, Reason};
use series::Traffic;
use trace::TraceContext;

/// Seen from the own pod.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Direction {
    /// To the pod's application.
    Inbound,
    /// From the pod's application.
    Outbound,
}

/// What a connection or request spoke.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Protocol {
    /// HTTP/1.0 or HTTP/1.1.
    Http1,
    /// HTTP/2 that is not gRPC.
    Http2,
    /// gRPC over HTTP/2.
    Grpc,
    /// Bytes that nobody looks into.
    Opaque,
    /// The link between two sidecars, which carries any of the above.
    Link,
    /// It ended before one could tell.
    Unknown,
}

/// All of a sidecar's telemetry; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Telemetry {
    pub(crate) metrics: Arc<Metrics>,
    /// None: no access log is written.
    pub(crate) access_log: Option<Arc<AccessLog>>,
    /// None: no span is exported; trace context is carried on all the same.
    pub(crate) spans: Option<Arc<SpanExport>>,
}

/// A request as it ended: when the last byte of its answer went out, or when it was given up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestEnd<'a> {
    /// Who called whom on which route; also names the direction.
    pub(crate) traffic: &'a Traffic,
    /// Does it get a line in the access log? Drawn by the caller from the snapshot's share.
    pub(crate) logged: bool,
    /// Since the epoch.
    pub(crate) started: Duration,
    /// From the whole request head to the end of the answer.
    pub(crate) duration: Duration,
    pub(crate) protocol: Protocol,
    pub(crate) method: &'a str,
    pub(crate) authority: &'a str,
    /// Without query: queries carry what does not belong into logs.
    pub(crate) path: &'a str,
    /// What the caller was answered; 0 if it got no answer.
    pub(crate) status: u16,
    /// gRPC only (`grpc-status`).
    pub(crate) grpc_status: Option<u32>,
    pub(crate) reason: Reason,
    /// The rule that decided, allowing or refusing.
    pub(crate) rule: Option<&'a str>,
    /// More about the reason, fixed words only: why a token was refused, why no retry was made.
    pub(crate) detail: Option<&'a str>,
    /// `NAMESPACE/NAME` of the endpoint's workload that the last attempt went to.
    pub(crate) endpoint: Option<&'a str>,
    /// Upstream tries; 0 if the request never left.
    pub(crate) attempts: u32,
    /// How far the last attempt came, in fixed words.
    pub(crate) wire: Option<&'static str>,
    /// Body bytes from the caller.
    pub(crate) bytes_received: u64,
    /// Body bytes to the caller.
    pub(crate) bytes_sent: u64,
    /// The caller's address, for the access log alone.
    pub(crate) peer: Option<std::net::SocketAddr>,
    /// The context of this request's own span, and the span it continues.
    pub(crate) trace: Option<&'a TraceContext>,
}

/// An opaque connection as it ended, or any connection that was refused before it carried a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnectionEnd<'a> {
    pub(crate) traffic: &'a Traffic,
    pub(crate) logged: bool,
    /// Since the epoch.
    pub(crate) started: Duration,
    pub(crate) duration: Duration,
    pub(crate) protocol: Protocol,
    pub(crate) reason: Reason,
    pub(crate) rule: Option<&'a str>,
    pub(crate) detail: Option<&'a str>,
    /// The name that the application's own TLS asked for.
    pub(crate) tls_server_name: Option<&'a str>,
    pub(crate) endpoint: Option<&'a str>,
    pub(crate) bytes_received: u64,
    pub(crate) bytes_sent: u64,
    pub(crate) peer: Option<std::net::SocketAddr>,
}

/// Why telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TelemetryError {
    /// Our fault: two metrics of one name.
    #[error("cannot register metrics")]
    Register(#[from] prometheus::Error),
    /// The environment's or the user's: the access log's file.
    #[error("cannot open access log {path:?}")]
    AccessLog {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The user's: a collector's address that is no URL.
    #[error("cannot export spans to {endpoint:?}; write the collector's address as http://HOST:4317")]
    Export {
        endpoint: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The environment's: no thread to be had.
    #[error("cannot start thread {name}")]
    Thread {
        name: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// The user's: a log filter that is none.
    #[error("{filter:?} is not a log filter; write a level as \"info\", or \"info,outrigger::dataplane=debug\"")]
    Filter {
        filter: String,
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// The user's: a word that is neither a level nor names one for a module.
    #[error(
        "{0:?} is not a log filter; write a level (off, error, warn, info, debug, trace), or \"info,outrigger::dataplane=debug\""
    )]
    NoLevel(String),
    /// Ours: the log was set up twice.
    #[error("the log is already set up")]
    LogTwice,
}

impl Telemetry {
    /// Counts, logs and exports a request that ended. Never blocks.
    pub(crate) fn request(&self, end: &RequestEnd<'_>) {
        end.traffic.request_ended(end);
        if end.reason.is_refusal() {
            self.metrics.refused(end.traffic, end.protocol, end.reason, deciding(end.traffic, end.reason, end.rule));
        }
        if end.logged
            && let Some(log) = &self.access_log
        {
            log.request(end);
        }
        if let Some(spans) = &self.spans
            && let Some(trace) = end.trace
            && trace.sampled()
        {
            spans.request(end, trace);
        }
    }

    /// Counts and logs a connection that ended. Never blocks.
    pub(crate) fn connection(&self, end: &ConnectionEnd<'_>) {
        end.traffic.connection_ended(end);
        if end.reason.is_refusal() {
            self.metrics.refused(end.traffic, end.protocol, end.reason, deciding(end.traffic, end.reason, end.rule));
        }
        if end.logged
            && let Some(log) = &self.access_log
        {
            log.connection(end);
        }
    }
}

/// The rule to name beside a refusal. Inbound, the rule of a request that the application then failed is the one that
/// allowed it: it did not decide this.
fn deciding<'a>(traffic: &Traffic, reason: Reason, rule: Option<&'a str>) -> Option<&'a str> {
    let allowed = traffic.labels().direction == Direction::Inbound && matches!(reason.fault(), Fault::Upstream | Fault::Caller);
    rule.filter(|_| !allowed)
}

impl Direction {
    /// The stable word.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

impl Protocol {
    /// The stable word.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "http1",
            Self::Http2 => "http2",
            Self::Grpc => "grpc",
            Self::Opaque => "opaque",
            Self::Link => "link",
            Self::Unknown => "unknown",
        }
    }
}
