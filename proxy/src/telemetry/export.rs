//! Spans to a collector: OTLP over gRPC, in batches, from a thread of its own.
//!
//! Sources: OpenTelemetry protocol 1.x; semantic conventions for HTTP and RPC spans; our own attributes begin with
//! `outrigger.`. Invariant: a collector that is slow or gone costs spans, which are counted, and never a request.

use std::sync::mpsc as blocking;
use std::time::Duration;

use opentelemetry::trace::{SpanContext, SpanKind, Status, TraceFlags, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue, Value};
use opentelemetry_otlp::{SpanExporter as OtlpExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanExporter as _, SpanLinks};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::metrics::Metrics;
use super::trace::TraceContext;
use super::{Direction, Protocol, RequestEnd, TelemetryError};
use crate::base::names::Named;

/// Takes spans; dropping it exports what is left, for at most [`CLOSE_AT_MOST`].
#[derive(Debug)]
pub(crate) struct SpanExport {
    queue: Option<mpsc::Sender<SpanData>>,
    scope: InstrumentationScope,
    dropped: prometheus::IntCounter,
    done: parking_lot::Mutex<blocking::Receiver<()>>,
}

impl SpanExport {
    /// Starts exporting to `endpoint` (`http://HOST:4317`) as `workload`. It need not be there yet.
    ///
    /// # Errors
    /// The endpoint is no URL, or no thread can be started.
    pub(crate) fn start(endpoint: &str, workload: &Named, metrics: &Metrics) -> Result<Self, TelemetryError> {
        let refuse =
            |source: Box<dyn std::error::Error + Send + Sync>| TelemetryError::Export { endpoint: endpoint.to_owned(), source };
        let uri: http::Uri = endpoint.parse().map_err(|error: http::uri::InvalidUri| refuse(error.into()))?;
        if uri.scheme_str() != Some("http") || uri.authority().is_none() {
            return Err(refuse("it is not an http:// URL".into()));
        }
        let (queue, spans) = mpsc::channel(QUEUE_MAX);
        let (finish, done) = blocking::sync_channel(1);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| TelemetryError::Thread { name: THREAD, source })?;
        // The exporter's connection belongs to the runtime in which it is built.
        let mut exporter = {
            let _inside = runtime.enter();
            OtlpExporter::builder()
                .with_tonic()
                .with_endpoint(endpoint)
                .with_timeout(EXPORT_AT_MOST)
                .build()
                .map_err(|error| refuse(error.into()))?
        };
        exporter.set_resource(&resource(workload));
        let counted = (metrics.spans_exported.clone(), metrics.spans_dropped.clone());
        std::thread::Builder::new()
            .name(THREAD.to_owned())
            .spawn(move || {
                runtime.block_on(export(spans, exporter, counted));
                // The other side may have stopped waiting.
                if finish.send(()).is_err() {}
            })
            .map_err(|source| TelemetryError::Thread { name: THREAD, source })?;
        Ok(Self {
            queue: Some(queue),
            scope: InstrumentationScope::builder("outrigger").with_version(env!("CARGO_PKG_VERSION")).build(),
            dropped: metrics.spans_dropped.clone(),
            done: parking_lot::Mutex::new(done),
        })
    }

    /// Exports a request's span.
    pub(super) fn request(&self, end: &RequestEnd<'_>, trace: &TraceContext) {
        let Some(queue) = &self.queue else { return };
        // Room first: a span that finds none is not even built.
        match queue.try_reserve() {
            Ok(room) => room.send(span(end, trace, self.scope.clone())),
            Err(_full_or_closed) => self.dropped.inc(),
        }
    }
}

impl Drop for SpanExport {
    fn drop(&mut self) {
        self.queue = None;
        // Late spans are worth a short wait, not the process's end.
        if self.done.lock().recv_timeout(CLOSE_AT_MOST).is_err() {}
    }
}

fn resource(workload: &Named) -> Resource {
    Resource::builder_empty()
        .with_service_name(workload.name.to_string())
        .with_attributes([
            KeyValue::new("service.namespace", workload.namespace.to_string()),
            KeyValue::new("service.instance.id", workload.to_string()),
        ])
        .build()
}

async fn export(
    mut spans: mpsc::Receiver<SpanData>,
    exporter: OtlpExporter,
    (exported, dropped): (prometheus::IntCounter, prometheus::IntCounter),
) {
    let mut failing = false;
    while let Some(first) = spans.recv().await {
        let mut batch = vec![first];
        let full_at = Instant::now() + GATHER;
        while batch.len() < BATCH_MAX {
            match timeout_at(full_at, spans.recv()).await {
                Ok(Some(span)) => batch.push(span),
                Ok(None) | Err(_) => break,
            }
        }
        let count = u64::try_from(batch.len()).unwrap_or(u64::MAX);
        // The exporter has a limit of its own; this one holds even where it does not keep it.
        let outcome = tokio::time::timeout(EXPORT_AT_MOST + GATHER, exporter.export(batch)).await;
        match outcome {
            Ok(Ok(())) => {
                exported.inc_by(count);
                failing = false;
            }
            Ok(Err(error)) => {
                dropped.inc_by(count);
                if !failing {
                    tracing::warn!(%error, "cannot export spans");
                }
                failing = true;
            }
            Err(_elapsed) => {
                dropped.inc_by(count);
                if !failing {
                    tracing::warn!("cannot export spans: the collector does not answer");
                }
                failing = true;
            }
        }
    }
}

fn span(end: &RequestEnd<'_>, trace: &TraceContext, scope: InstrumentationScope) -> SpanData {
    let labels = end.traffic.labels();
    let grpc = end.protocol == Protocol::Grpc;
    let mut attributes = vec![
        KeyValue::new("http.request.method", end.method.to_owned()),
        KeyValue::new("url.path", end.path.to_owned()),
        KeyValue::new("url.scheme", "http"),
        KeyValue::new("server.address", end.authority.to_owned()),
        KeyValue::new("http.request.body.size", number(end.bytes_received)),
        KeyValue::new("http.response.body.size", number(end.bytes_sent)),
        KeyValue::new("network.protocol.name", "http"),
        KeyValue::new("network.protocol.version", if matches!(end.protocol, Protocol::Http1) { "1.1" } else { "2" }),
        KeyValue::new("outrigger.reason", end.reason.as_str()),
        KeyValue::new("outrigger.mtls", labels.mtls),
    ];
    let mut known = |name: &'static str, value: &str| {
        if !value.is_empty() {
            attributes.push(KeyValue::new(name, value.to_owned()));
        }
    };
    known("outrigger.source.identity", labels.source_identity);
    known("outrigger.destination.identity", labels.destination_identity);
    known("outrigger.destination.service", labels.destination_service);
    known("outrigger.route", labels.route);
    known("outrigger.rule", end.rule.unwrap_or_default());
    known("outrigger.endpoint", end.endpoint.unwrap_or_default());
    if end.status != 0 {
        attributes.push(KeyValue::new("http.response.status_code", i64::from(end.status)));
    }
    if end.attempts > 1 {
        attributes.push(KeyValue::new("http.request.resend_count", i64::from(end.attempts - 1)));
    }
    if grpc {
        attributes.push(KeyValue::new("rpc.system", "grpc"));
        if let Some(status) = end.grpc_status {
            attributes.push(KeyValue::new("rpc.grpc.status_code", i64::from(status)));
        }
    }
    // "For HTTP status codes in the 4xx range span status MUST be left unset in case of SpanKind.SERVER and SHOULD be set
    // to Error in case of SpanKind.CLIENT."
    let failed_from = if labels.direction == Direction::Inbound { 500 } else { 400 };
    let failed = end.status == 0 || end.status >= failed_from || end.grpc_status.is_some_and(|status| status != 0);
    if failed {
        let kind = if end.reason.is_refusal() { end.reason.as_str().to_owned() } else { end.status.to_string() };
        attributes.push(KeyValue::new("error.type", kind));
    }
    let started = std::time::UNIX_EPOCH + end.started;
    SpanData {
        span_context: SpanContext::new(
            opentelemetry::TraceId::from_bytes(trace.trace_id().bytes()),
            opentelemetry::SpanId::from_bytes(trace.span_id().bytes()),
            TraceFlags::SAMPLED,
            false,
            TraceState::NONE,
        ),
        parent_span_id: trace
            .parent_id()
            .map_or(opentelemetry::SpanId::INVALID, |parent| opentelemetry::SpanId::from_bytes(parent.bytes())),
        parent_span_is_remote: trace.parent_id().is_some(),
        span_kind: match labels.direction {
            Direction::Inbound => SpanKind::Server,
            Direction::Outbound => SpanKind::Client,
        },
        // A path is no name: there are too many of them. A gRPC method is one.
        name: if grpc { end.path.trim_start_matches('/').to_owned().into() } else { end.method.to_owned().into() },
        start_time: started,
        end_time: started + end.duration,
        attributes,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: if failed { Status::error(end.reason.as_str()) } else { Status::Unset },
        instrumentation_scope: scope,
    }
}

fn number(bytes: u64) -> Value {
    Value::I64(i64::try_from(bytes).unwrap_or(i64::MAX))
}

const THREAD: &str = "spans";
/// Spans that wait to be exported.
const QUEUE_MAX: usize = 4_096;
/// Spans in one message.
const BATCH_MAX: usize = 512;
/// How long a message gathers spans.
const GATHER: Duration = Duration::from_millis(500);
/// How long the collector has to take one.
const EXPORT_AT_MOST: Duration = Duration::from_secs(5);
/// How long the end of the process waits for the last spans.
const CLOSE_AT_MOST: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::random::Dice;
    use crate::telemetry::reason::Reason;
    use crate::telemetry::series::TrafficLabels;

    #[test]
    fn an_endpoint_that_is_no_url_is_refused_with_a_remedy() {
        let metrics = Metrics::new().unwrap();
        for bad in ["collector:4317", "https://collector:4317", "not a url", ""] {
            let error = SpanExport::start(bad, &Named::new("shop", "web"), &metrics).unwrap_err();
            assert!(error.to_string().contains("http://HOST:4317"), "{bad}");
        }
    }

    #[test]
    fn a_collector_that_is_gone_costs_spans_and_no_time() {
        let metrics = Metrics::new().unwrap();
        let spans = SpanExport::start("http://127.0.0.1:9", &Named::new("shop", "web"), &metrics).unwrap();
        let traffic = metrics.traffic(&TrafficLabels {
            direction: Direction::Outbound,
            source_identity: "",
            destination_identity: "",
            destination_service: "shop/cart",
            route: "",
            mtls: true,
        });
        let trace = TraceContext::continue_or_begin(None, &mut Dice::from_seed(1), |_| true);
        let end = RequestEnd {
            traffic: &traffic,
            logged: false,
            started: Duration::from_secs(1_700_000_000),
            duration: Duration::from_millis(3),
            protocol: Protocol::Http1,
            method: "GET",
            authority: "cart",
            path: "/",
            status: 200,
            grpc_status: None,
            reason: Reason::Answered,
            rule: None,
            detail: None,
            endpoint: None,
            attempts: 1,
            wire: None,
            bytes_received: 0,
            bytes_sent: 0,
            peer: None,
            trace: Some(&trace),
        };
        for _ in 0..3 * QUEUE_MAX {
            spans.request(&end, &trace);
        }
        drop(spans);
        assert!(metrics.spans_dropped.get() > 0);
        assert_eq!(metrics.spans_exported.get(), 0);
    }
}
