//! The access log: one JSON line a request, one a refused or opaque connection.
//!
//! docs/observability.md lists the fields. A line goes into a bounded buffer; a thread of its own writes it out, so that
//! a reader that is slow, or gone, costs lines and never a request. What was dropped is counted.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use prometheus::IntCounter;
use serde::Serialize;

use super::series::TrafficLabels;
use super::{ConnectionEnd, Direction, RequestEnd, TelemetryError};

/// Where lines go.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum AccessLogTarget {
    Stdout,
    /// Appended to.
    File(std::path::PathBuf),
}

/// Takes lines; dropping it writes out what is left, for at most [`CLOSE_AT_MOST`].
#[derive(Debug)]
pub(crate) struct AccessLog {
    shared: Arc<Shared>,
    dropped: IntCounter,
}

#[derive(Debug, Default)]
struct Shared {
    lines: Mutex<Lines>,
    /// Told when the first line comes into an empty buffer, at the end, and when the writer is done.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Lines {
    buffer: Vec<u8>,
    closed: bool,
    done: bool,
}

/// A line as it is written. Fields keep this order; what is not known is left out.
#[derive(Serialize)]
struct Line<'a> {
    time: Time,
    kind: &'static str,
    direction: &'static str,
    protocol: &'static str,
    mtls: bool,
    #[serde(skip_serializing_if = "str::is_empty")]
    source_identity: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<std::net::SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    method: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    authority: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    grpc_status: Option<u32>,
    reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_server_name: Option<&'a str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    destination_service: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    destination_identity: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    route: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    attempts: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    wire: Option<&'static str>,
    duration_ms: f64,
    bytes_received: u64,
    bytes_sent: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    span_id: Option<String>,
}

/// A moment since the epoch, written as RFC 3339 in UTC with milliseconds.
struct Time(Duration);

impl AccessLog {
    /// Opens the target and starts the writer.
    ///
    /// # Errors
    /// The file cannot be opened for appending, or no thread can be started.
    pub(crate) fn start(target: &AccessLogTarget, dropped: IntCounter) -> Result<Self, TelemetryError> {
        let sink: Box<dyn Write + Send> = match target {
            AccessLogTarget::Stdout => Box::new(std::io::stdout()),
            AccessLogTarget::File(path) => Box::new(open(path)?),
        };
        Self::to(sink, dropped)
    }

    fn to(sink: Box<dyn Write + Send>, dropped: IntCounter) -> Result<Self, TelemetryError> {
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        std::thread::Builder::new()
            .name(THREAD.to_owned())
            .spawn(move || write_out(&writer, sink))
            .map_err(|source| TelemetryError::Thread { name: THREAD, source })?;
        Ok(Self { shared, dropped })
    }

    /// Writes a request's line.
    pub(super) fn request(&self, end: &RequestEnd<'_>) {
        let TrafficLabels { direction, source_identity, destination_identity, destination_service, route, mtls } =
            end.traffic.labels();
        self.push(&Line {
            time: Time(end.started),
            kind: "request",
            direction: direction.as_str(),
            protocol: end.protocol.as_str(),
            mtls,
            source_identity,
            peer: end.peer,
            // Of a head that could not be read nothing is known.
            method: Some(end.method).filter(|method| !method.is_empty()),
            authority: Some(end.authority).filter(|_| !end.method.is_empty()),
            path: Some(end.path).filter(|_| !end.method.is_empty()),
            status: Some(end.status),
            grpc_status: end.grpc_status,
            reason: end.reason.as_str(),
            rule: end.rule,
            detail: end.detail,
            tls_server_name: None,
            destination_service,
            destination_identity,
            route,
            endpoint: end.endpoint,
            // An inbound request has one way to go, so a count says something outbound only.
            attempts: (direction == Direction::Outbound).then_some(end.attempts),
            wire: end.wire,
            duration_ms: milliseconds(end.duration),
            bytes_received: end.bytes_received,
            bytes_sent: end.bytes_sent,
            trace_id: end.trace.map(|trace| trace.trace_id().to_string()),
            span_id: end.trace.map(|trace| trace.span_id().to_string()),
        });
    }

    /// Writes a connection's line.
    pub(super) fn connection(&self, end: &ConnectionEnd<'_>) {
        let TrafficLabels { direction, source_identity, destination_identity, destination_service, route, mtls } =
            end.traffic.labels();
        self.push(&Line {
            time: Time(end.started),
            kind: "connection",
            direction: direction.as_str(),
            protocol: end.protocol.as_str(),
            mtls,
            source_identity,
            peer: end.peer,
            method: None,
            authority: None,
            path: None,
            status: None,
            grpc_status: None,
            reason: end.reason.as_str(),
            rule: end.rule,
            detail: end.detail,
            tls_server_name: end.tls_server_name,
            destination_service,
            destination_identity,
            route,
            endpoint: end.endpoint,
            attempts: None,
            wire: None,
            duration_ms: milliseconds(end.duration),
            bytes_received: end.bytes_received,
            bytes_sent: end.bytes_sent,
            trace_id: None,
            span_id: None,
        });
    }

    fn push(&self, line: &Line<'_>) {
        let mut lines = self.shared.lines.lock();
        // A line is measured by what the buffer already holds: one line more than the bound is still a bound.
        if lines.closed || lines.buffer.len() >= BUFFER_MAX {
            self.dropped.inc();
            return;
        }
        let before = lines.buffer.len();
        if serde_json::to_writer(&mut lines.buffer, line).is_err() {
            // Nothing of half a line stays.
            lines.buffer.truncate(before);
            self.dropped.inc();
            return;
        }
        lines.buffer.push(b'\n');
        drop(lines);
        if before == 0 {
            self.shared.changed.notify_all();
        }
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        let mut lines = self.shared.lines.lock();
        lines.closed = true;
        self.shared.changed.notify_all();
        // A writer that hangs on a full pipe does not hold up the end of the process.
        self.shared.changed.wait_while_for(&mut lines, |lines| !lines.done, CLOSE_AT_MOST);
    }
}

impl Serialize for Time {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let nanos = i128::try_from(self.0.as_nanos()).unwrap_or(i128::MAX);
        let time = jiff::Timestamp::from_nanosecond(nanos).unwrap_or(jiff::Timestamp::MAX);
        serializer.collect_str(&format_args!("{time:.3}"))
    }
}

fn milliseconds(duration: Duration) -> f64 {
    // Microseconds are as fine as a line needs to be.
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn open(path: &Path) -> Result<std::fs::File, TelemetryError> {
    std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(|source| TelemetryError::AccessLog { path: path.to_owned(), source })
}

fn write_out(shared: &Shared, mut sink: Box<dyn Write + Send>) {
    let mut out = Vec::new();
    let mut failing = false;
    loop {
        {
            let mut lines = shared.lines.lock();
            shared.changed.wait_while(&mut lines, |lines| lines.buffer.is_empty() && !lines.closed);
            if !lines.closed && lines.buffer.len() < BUFFER_MAX / 2 {
                // More lines follow the first: one write for all of them, and at most one wake-up per pause.
                parking_lot::MutexGuard::unlocked(&mut lines, || std::thread::sleep(PAUSE));
            }
            std::mem::swap(&mut out, &mut lines.buffer);
            if out.is_empty() {
                lines.done = true;
                shared.changed.notify_all();
                return;
            }
        }
        match sink.write_all(&out).and_then(|()| sink.flush()) {
            Ok(()) => failing = false,
            Err(error) => {
                if !failing {
                    tracing::warn!(%error, "cannot write access log");
                }
                failing = true;
            }
        }
        out.clear();
        out.shrink_to(BUFFER_KEPT);
    }
}

const THREAD: &str = "access-log";
/// Bytes of lines that wait to be written.
const BUFFER_MAX: usize = 1 << 20;
/// Bytes of memory kept for lines to come.
const BUFFER_KEPT: usize = 1 << 14;
/// How long lines gather before they are written.
const PAUSE: Duration = Duration::from_millis(20);
/// How long the end of the process waits for the last lines.
const CLOSE_AT_MOST: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;
    use crate::base::random::Dice;
    use crate::telemetry::Protocol;
    use crate::telemetry::metrics::Metrics;
    use crate::telemetry::reason::Reason;
    use crate::telemetry::trace::TraceContext;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn traffic(metrics: &Metrics) -> Arc<crate::telemetry::series::Traffic> {
        metrics.traffic(&TrafficLabels {
            direction: Direction::Outbound,
            source_identity: "spiffe://cluster.local/ns/shop/sa/web",
            destination_identity: "spiffe://cluster.local/ns/shop/sa/cart",
            destination_service: "shop/cart",
            route: "HTTPRoute/shop/cart rules[0]",
            mtls: true,
        })
    }

    fn request<'a>(traffic: &'a crate::telemetry::series::Traffic, trace: &'a TraceContext) -> RequestEnd<'a> {
        RequestEnd {
            traffic,
            logged: true,
            started: Duration::from_millis(1_700_000_000_123),
            duration: Duration::from_micros(1_234),
            protocol: Protocol::Http1,
            method: "GET",
            authority: "cart",
            path: "/a\"b",
            status: 503,
            grpc_status: None,
            reason: Reason::UpstreamReset,
            rule: None,
            detail: Some("budget_empty"),
            endpoint: Some("shop/cart-1"),
            attempts: 2,
            wire: Some("sent"),
            bytes_received: 0,
            bytes_sent: 42,
            peer: Some("10.64.0.5:4242".parse().unwrap()),
            trace: Some(trace),
        }
    }

    #[test]
    fn a_request_is_one_line_of_json() {
        let metrics = Metrics::new().unwrap();
        let sink = Sink::default();
        let log = AccessLog::to(Box::new(sink.clone()), metrics.access_log_dropped.clone()).unwrap();
        let trace = TraceContext::continue_or_begin(None, &mut Dice::from_seed(3), |_| true);
        let traffic = traffic(&metrics);
        log.request(&request(&traffic, &trace));
        drop(log);
        let text = String::from_utf8(sink.0.lock().clone()).unwrap();
        expect![[r#"
            {"time":"2023-11-14T22:13:20.123Z","kind":"request","direction":"outbound","protocol":"http1","mtls":true,"source_identity":"spiffe://cluster.local/ns/shop/sa/web","peer":"10.64.0.5:4242","method":"GET","authority":"cart","path":"/a\"b","status":503,"reason":"upstream_reset","detail":"budget_empty","destination_service":"shop/cart","destination_identity":"spiffe://cluster.local/ns/shop/sa/cart","route":"HTTPRoute/shop/cart rules[0]","endpoint":"shop/cart-1","attempts":2,"wire":"sent","duration_ms":1.234,"bytes_received":0,"bytes_sent":42,"trace_id":"0d2beb91b9196929a5ddec9f6e306924","span_id":"ddf4a24268e3e59f"}
        "#]].assert_eq(&text);
        let _valid: serde_json::Value = serde_json::from_str(&text).unwrap();
    }

    #[test]
    fn a_reader_that_hangs_costs_lines_and_no_time() {
        struct Hangs;
        impl Write for Hangs {
            fn write(&mut self, _bytes: &[u8]) -> std::io::Result<usize> {
                std::thread::park_timeout(Duration::from_secs(600));
                Ok(0)
            }

            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let metrics = Metrics::new().unwrap();
        let log = AccessLog::to(Box::new(Hangs), metrics.access_log_dropped.clone()).unwrap();
        let trace = TraceContext::continue_or_begin(None, &mut Dice::from_seed(3), |_| true);
        let traffic = traffic(&metrics);
        let lines = 3 * BUFFER_MAX / 500;
        for _ in 0..lines {
            log.request(&request(&traffic, &trace));
        }
        let dropped = metrics.access_log_dropped.get();
        assert!(dropped > 0, "{dropped} of {lines}");
        assert!(log.shared.lines.lock().buffer.len() < BUFFER_MAX + 1_000);
    }
}
