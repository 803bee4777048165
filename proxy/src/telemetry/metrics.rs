//! Every metric of a sidecar, in one struct with resolved handles, and the text that Prometheus reads.
//!
//! Sources: Prometheus text exposition format 0.0.4. Names are `outrigger_<subject>_<thing>_<unit>[_total]`; labels come
//! from closed enums, resource names and identities, never from paths, addresses or end users. The full list is the
//! golden file `testdata/metrics.txt`; docs/observability.md explains it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus::core::{Collector, Desc};
use prometheus::{
    Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use tokio::time::Instant;

use super::process::ProcessCollector;
use super::reason::Reason;
use super::series::{DURATION_BUCKETS, Families, OTHER, Traffic, TrafficLabels, TrafficTable, mtls_label};
use super::{Direction, Protocol, TelemetryError};
use crate::base::names::Named;

/// The metrics of a sidecar.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    traffic: TrafficTable,
    refusals: IntCounterVec,
    refusal_series: Mutex<usize>,
    connections: IntCounterVec,
    connections_open: IntGaugeVec,
    retries: IntCounterVec,
    ejections: IntCounterVec,
    ejected: Arc<Ejected>,
    shadows: IntCounterVec,
    egress: IntCounterVec,
    tls_passed: IntCounterVec,
    foreign_hosts: Mutex<BTreeSet<Box<str>>>,
    certificate_expiry: Gauge,
    config_generation: IntGauge,
    config_info: IntGaugeVec,
    config_updates: IntCounterVec,
    config_rejected: IntGauge,
    control_connected: IntGauge,
    /// Access-log lines that found the buffer full.
    pub(crate) access_log_dropped: IntCounter,
    /// What the own application was asked in the place of the kubelet and of Prometheus, by what and by outcome.
    pub(crate) app_asked: IntCounterVec,
    /// Times that a listener could take nothing, by direction and why.
    pub(crate) accepts_delayed: IntCounterVec,
    /// What clients of HTTP/2 sent and nobody took.
    pub(crate) uploads_held: IntGauge,
    /// What large heads of requests under way hold.
    pub(crate) heads_held: IntGauge,
    pub(crate) answers_granted: IntGauge,
    /// Connections to the own application without their true client.
    pub(crate) clients_undeclared: IntCounter,
    /// Spans that found the queue full, or that the collector did not take.
    pub(crate) spans_dropped: IntCounter,
    /// Spans that the collector took.
    pub(crate) spans_exported: IntCounter,
}

/// An open connection; counts it as closed when dropped.
#[derive(Debug)]
pub(crate) struct OpenConnection(IntGauge);

/// What became of a copy of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ShadowOutcome {
    /// With whatever status.
    Answered,
    /// No answer came, or a refusal of the mesh.
    Failed,
    /// Not sent: the body was too large to copy, or too many copies were under way.
    Skipped,
}

/// May the connection leave the mesh?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum EgressVerdict {
    Allowed,
    Denied,
}

/// Which endpoints are left out now, told at the moment of reading.
#[derive(Debug)]
struct Ejected {
    desc: GaugeVec,
    until: Mutex<BTreeMap<(String, String), Instant>>,
}

impl Metrics {
    /// Metrics of this process, all at zero.
    ///
    /// # Errors
    /// Two metrics have one name, which the test of the golden list rules out.
    pub(crate) fn new() -> Result<Self, TelemetryError> {
        let registry = process_registry()?;
        let r = &registry;
        let families = Families {
            requests: counters(
                r,
                "outrigger_requests_total",
                "Requests that ended.",
                &[
                    "direction",
                    "source_identity",
                    "destination_identity",
                    "destination_service",
                    "route",
                    "mtls",
                    "status",
                    "grpc_status",
                    "reason",
                ],
            )?,
            duration: {
                let vec = HistogramVec::new(
                    HistogramOpts::new(
                        "outrigger_request_duration_seconds",
                        "Time from the whole request head to the end of the answer.",
                    )
                    .buckets(DURATION_BUCKETS.to_vec()),
                    &["direction", "source_identity", "destination_service", "route"],
                )?;
                registry.register(Box::new(vec.clone()))?;
                vec
            },
            opaque: counters(
                r,
                "outrigger_opaque_connections_total",
                "Opaque connections that ended, and connections that were refused before they carried a request.",
                &["direction", "source_identity", "destination_identity", "destination_service", "mtls", "reason"],
            )?,
            opaque_open: gauges(
                r,
                "outrigger_opaque_connections_open",
                "Opaque connections that are open now.",
                &["direction", "source_identity", "destination_identity", "destination_service", "mtls"],
            )?,
            bytes: counters(
                r,
                "outrigger_opaque_bytes_total",
                "Bytes of opaque connections, from and to the caller.",
                &["direction", "source_identity", "destination_service", "flow"],
            )?,
        };
        let overflow = counter(
            r,
            "outrigger_series_overflow_total",
            "Requests and connections counted under the label value `other`, because there were too many combinations of labels.",
        )?;
        let ejected = Arc::new(Ejected::new()?);
        registry.register(Box::new(EjectedCollector(Arc::clone(&ejected))))?;
        let certificate_expiry = Gauge::new(
            "outrigger_certificate_expiry_timestamp_seconds",
            "When the workload's certificate expires, in seconds since the epoch; 0 before the first one.",
        )?;
        registry.register(Box::new(certificate_expiry.clone()))?;
        Ok(Self {
            traffic: TrafficTable::new(families, overflow),
            refusals: counters(
                r,
                "outrigger_refusals_total",
                "Requests and connections that the mesh answered in the destination's place, by the rule that decided.",
                &["direction", "source_identity", "destination_service", "protocol", "reason", "rule"],
            )?,
            refusal_series: Mutex::new(0),
            connections: counters(
                r,
                "outrigger_connections_total",
                "Connections accepted from the application (outbound) and from peers (inbound).",
                &["direction", "protocol", "mtls"],
            )?,
            connections_open: gauges(
                r,
                "outrigger_connections_open",
                "Connections that are open now.",
                &["direction", "protocol", "mtls"],
            )?,
            retries: counters(
                r,
                "outrigger_retries_total",
                "Failed attempts, by what was decided: `sent` for a retry, else why there was none.",
                &["destination_service", "outcome"],
            )?,
            ejections: counters(
                r,
                "outrigger_ejections_total",
                "Times that an endpoint was left out because it failed.",
                &["destination_service", "destination_workload"],
            )?,
            ejected,
            shadows: counters(
                r,
                "outrigger_shadow_requests_total",
                "Copies of requests, by the service they went to and what became of them.",
                &["destination_service", "outcome"],
            )?,
            egress: counters(
                r,
                "outrigger_egress_connections_total",
                "Connections to addresses outside of the mesh.",
                &["verdict"],
            )?,
            tls_passed: counters(
                r,
                "outrigger_tls_passed_connections_total",
                "Connections of applications that speak TLS themselves, by the name that they asked for.",
                &["direction", "server_name"],
            )?,
            foreign_hosts: Mutex::default(),
            certificate_expiry,
            app_asked: counters(
                r,
                "outrigger_app_asked_total",
                "Probes and readings of metrics that the sidecar made at its application for others, by outcome.",
                &["what", "outcome"],
            )?,
            accepts_delayed: counters(
                r,
                "outrigger_accepts_delayed_total",
                "Times that a listener took nothing more for a while, so that what came waited in its backlog: as many were open as one listener may have (`connections`), as leaves files for the connections that they lead to (`descriptors`), or the system gave none (`system`).",
                &["direction", "reason"],
            )?,
            uploads_held: gauge(
                r,
                "outrigger_uploads_held_bytes",
                "Bytes of requests' bodies that clients of HTTP/2 sent and nobody took yet, beyond what each connection may always send.",
            )?,
            heads_held: gauge(
                r,
                "outrigger_large_heads_held_bytes",
                "Bytes of heads over 4 KiB of requests that wait for the head of their answer.",
            )?,
            answers_granted: gauge(
                r,
                "outrigger_answers_granted_bytes",
                "Bytes of answers that peers may send, or sent and nobody read yet, on the connections in HTTP/2 that were opened to them, beyond what each is always granted.",
            )?,
            clients_undeclared: counter(
                r,
                "outrigger_clients_undeclared_total",
                "Connections to the own application that show it the sidecar as the client, because capture is not there.",
            )?,
            config_generation: gauge(r, "outrigger_config_generation", "Configurations that this process put into force.")?,
            config_info: gauges(
                r,
                "outrigger_config_info",
                "The version of the configuration in force, always 1.",
                &["version"],
            )?,
            config_updates: counters(
                r,
                "outrigger_config_updates_total",
                "Configuration updates received, by what became of them.",
                &["outcome"],
            )?,
            config_rejected: gauge(
                r,
                "outrigger_config_rejected_resources",
                "Resources that this process refused and whose last good form, if any, it uses instead.",
            )?,
            control_connected: gauge(r, "outrigger_control_connected", "Is the configuration stream up? 1 or 0.")?,
            access_log_dropped: counter(
                r,
                "outrigger_access_log_dropped_total",
                "Access-log lines dropped because the reader of the log is too slow.",
            )?,
            spans_dropped: counter(
                r,
                "outrigger_spans_dropped_total",
                "Spans dropped: queue full, or the collector did not take them.",
            )?,
            spans_exported: counter(r, "outrigger_spans_exported_total", "Spans that the collector took.")?,
            registry,
        })
    }

    /// The text that Prometheus reads.
    pub(crate) fn render(&self) -> String {
        render(&self.registry)
    }

    /// Resolves the series of a kind of traffic. Worth keeping while the labels stay the same; a look-up takes no allocation.
    pub(crate) fn traffic(&self, labels: &TrafficLabels<'_>) -> Arc<Traffic> {
        self.traffic.resolve(labels)
    }

    /// A connection was accepted and is open until the answer is dropped.
    pub(crate) fn connection(&self, direction: Direction, protocol: Protocol, mtls: bool) -> OpenConnection {
        let labels = [direction.as_str(), protocol.as_str(), mtls_label(mtls)];
        self.connections.with_label_values(&labels).inc();
        OpenConnection::new(self.connections_open.with_label_values(&labels))
    }

    /// A request or connection was refused; called by [`super::Telemetry`].
    pub(super) fn refused(&self, traffic: &Traffic, protocol: Protocol, reason: Reason, rule: Option<&str>) {
        let labels = traffic.labels();
        let rule = rule.unwrap_or_default();
        let values = [
            labels.direction.as_str(),
            labels.source_identity,
            labels.destination_service,
            protocol.as_str(),
            reason.as_str(),
            rule,
        ];
        // Rules come and go with the configuration while series stay; the bound is counted, not guessed.
        let mut series = self.refusal_series.lock();
        if *series < REFUSALS_MAX {
            let counter = self.refusals.with_label_values(&values);
            if counter.get() == 0 {
                *series += 1;
            }
            counter.inc();
        } else {
            drop(series);
            self.refusals
                .with_label_values(&[labels.direction.as_str(), OTHER, OTHER, protocol.as_str(), reason.as_str(), OTHER])
                .inc();
        }
    }

    /// An attempt at `service` failed and `outcome` was decided: `sent`, or the fixed word why there is no retry.
    pub(crate) fn retry(&self, service: &str, outcome: &'static str) {
        self.retries.with_label_values(&[service, outcome]).inc();
    }

    /// `workload`, an endpoint of `service`, is left out until `until`.
    pub(crate) fn ejected(&self, service: &str, workload: &str, until: Instant) {
        self.ejections.with_label_values(&[service, workload]).inc();
        let mut ejected = self.ejected.until.lock();
        if ejected.len() >= EJECTED_MAX {
            let now = Instant::now();
            ejected.retain(|_, until| *until > now);
        }
        if ejected.len() < EJECTED_MAX {
            ejected.insert((service.to_owned(), workload.to_owned()), until);
        }
    }

    /// What became of a copy of a request.
    pub(crate) fn shadow(&self, service: &str, outcome: ShadowOutcome) {
        let outcome = match outcome {
            ShadowOutcome::Answered => "answered",
            ShadowOutcome::Failed => "failed",
            ShadowOutcome::Skipped => "skipped",
        };
        self.shadows.with_label_values(&[service, outcome]).inc();
    }

    /// A connection to an address outside of the mesh.
    pub(crate) fn egress(&self, verdict: EgressVerdict) {
        let verdict = match verdict {
            EgressVerdict::Allowed => "allowed",
            EgressVerdict::Denied => "denied",
        };
        self.egress.with_label_values(&[verdict]).inc();
    }

    /// An application's own TLS passed, asking for `name`, which is that of `service` if it is one of the mesh. Names of
    /// other hosts are told apart where the own application asked for them, and only so many.
    pub(crate) fn tls_passed(&self, direction: Direction, name: Option<&str>, service: Option<&Named>) {
        let service = service.map(|service| format!("{}.{}", service.name, service.namespace));
        let label = match (name, &service) {
            (None, _) => "",
            (Some(_), Some(service)) => service,
            (Some(name), None) => {
                let mut hosts = self.foreign_hosts.lock();
                let told = direction == Direction::Outbound
                    && (hosts.contains(name) || (hosts.len() < FOREIGN_HOSTS_MAX && hosts.insert(name.into())));
                if told { name } else { OTHER }
            }
        };
        self.tls_passed.with_label_values(&[direction.as_str(), label]).inc();
    }

    /// The workload has a certificate that expires at this time since the epoch.
    pub(crate) fn certificate_expires(&self, at: Duration) {
        self.certificate_expiry.set(at.as_secs_f64());
    }

    /// A configuration is in force. `version` is the control plane's word for it, `rejected` how many resources were refused.
    pub(crate) fn config_published(&self, generation: u64, version: &str, rejected: usize) {
        let outcome = if rejected == 0 { "applied" } else { "partly_rejected" };
        self.config_updates.with_label_values(&[outcome]).inc();
        self.config_generation.set(i64::try_from(generation).unwrap_or(i64::MAX));
        // One series at a time: a version that is no longer in force says nothing.
        self.config_info.reset();
        self.config_info.with_label_values(&[version]).set(1);
        self.config_rejected.set(i64::try_from(rejected).unwrap_or(i64::MAX));
    }

    /// The configuration stream came up or went down.
    pub(crate) fn control_connected(&self, connected: bool) {
        self.control_connected.set(i64::from(connected));
    }
}

impl OpenConnection {
    /// Counts one in `open` until it is dropped.
    pub(super) fn new(open: IntGauge) -> Self {
        open.inc();
        Self(open)
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Ejected {
    fn new() -> Result<Self, prometheus::Error> {
        let desc = GaugeVec::new(
            Opts::new("outrigger_endpoint_ejected", "Endpoints that are left out now because they failed, always 1."),
            &["destination_service", "destination_workload"],
        )?;
        Ok(Self { desc, until: Mutex::default() })
    }
}

/// Tells the registry which endpoints are left out.
struct EjectedCollector(Arc<Ejected>);

impl Collector for EjectedCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.0.desc.desc()
    }

    fn collect(&self) -> Vec<prometheus::proto::MetricFamily> {
        let now = Instant::now();
        let mut until = self.0.until.lock();
        until.retain(|_, until| *until > now);
        self.0.desc.reset();
        for (service, workload) in until.keys() {
            self.0.desc.with_label_values(&[service, workload]).set(1.0);
        }
        self.0.desc.collect()
    }
}

/// A registry that tells about the process itself: for roles that add their own metrics.
///
/// # Errors
/// Never for a fresh registry; the type of the registry's own error.
pub(crate) fn process_registry() -> Result<Registry, TelemetryError> {
    let registry = Registry::new();
    registry.register(Box::new(ProcessCollector::new()?))?;
    let build = gauges(&registry, "outrigger_build_info", "The running version, always 1.", &["version"])?;
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    Ok(registry)
}

/// The text that Prometheus reads. A family that cannot be written is left out and logged.
pub(crate) fn render(registry: &Registry) -> String {
    let mut text = String::new();
    for family in registry.gather() {
        // One family at a time, so that a bad one takes no other with it.
        if let Err(error) = TextEncoder::new().encode_utf8(std::slice::from_ref(&family), &mut text) {
            tracing::warn!(%error, metric = family.name(), "cannot write metric");
        }
    }
    text
}

/// A counter without labels, registered.
///
/// # Errors
/// The name is taken.
pub(crate) fn counter(registry: &Registry, name: &str, help: &str) -> Result<IntCounter, TelemetryError> {
    let counter = IntCounter::new(name, help)?;
    registry.register(Box::new(counter.clone()))?;
    Ok(counter)
}

/// Counters by labels, registered.
///
/// # Errors
/// The name is taken.
pub(crate) fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, TelemetryError> {
    let vec = IntCounterVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(vec.clone()))?;
    Ok(vec)
}

/// A gauge without labels, registered.
///
/// # Errors
/// The name is taken.
pub(crate) fn gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, TelemetryError> {
    let gauge = IntGauge::new(name, help)?;
    registry.register(Box::new(gauge.clone()))?;
    Ok(gauge)
}

/// Gauges by labels, registered.
///
/// # Errors
/// The name is taken.
pub(crate) fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, TelemetryError> {
    let vec = IntGaugeVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(vec.clone()))?;
    Ok(vec)
}

/// Refusals told apart by caller, destination and rule.
const REFUSALS_MAX: usize = 1_000;
/// Hosts outside of the mesh that are told apart.
const FOREIGN_HOSTS_MAX: usize = 100;
/// Endpoints that are named as left out.
const EJECTED_MAX: usize = 1_000;

#[cfg(test)]
pub(crate) mod tests {
    use std::fmt::Write as _;

    use expect_test::expect_file;

    use super::*;
    use crate::telemetry::handshake::HandshakeFault;
    use crate::telemetry::{ConnectionEnd, RequestEnd, Telemetry};

    /// Metrics in which every family has a value.
    pub(crate) fn populated() -> Telemetry {
        let metrics = Arc::new(Metrics::new().unwrap());
        let telemetry = Telemetry { metrics: Arc::clone(&metrics), access_log: None, spans: None };
        let web = "spiffe://cluster.local/ns/shop/sa/web";
        let cart = "spiffe://cluster.local/ns/shop/sa/cart";
        let traffic = |direction, destination_service, route| {
            metrics.traffic(&TrafficLabels {
                direction,
                source_identity: web,
                destination_identity: cart,
                destination_service,
                route,
                mtls: true,
            })
        };
        let request = |traffic: &Traffic, status, reason, rule| {
            telemetry.request(&RequestEnd {
                traffic,
                logged: false,
                started: Duration::from_secs(1_700_000_000),
                duration: Duration::from_micros(2_500),
                protocol: Protocol::Http1,
                method: "GET",
                authority: "cart",
                path: "/",
                status,
                grpc_status: None,
                reason,
                rule,
                detail: None,
                endpoint: Some("shop/cart-1"),
                attempts: 1,
                wire: None,
                bytes_received: 0,
                bytes_sent: 10,
                peer: None,
                trace: None,
            });
        };
        let out = traffic(Direction::Outbound, "shop/cart", "default");
        let inbound = traffic(Direction::Inbound, "shop/cart", "");
        for _ in 0..9 {
            request(&out, 200, Reason::Answered, None);
        }
        request(&out, 503, Reason::ConnectFailed, None);
        request(&inbound, 403, Reason::Denied, Some("AuthorizationPolicy/shop/no-delete rules[0]"));
        telemetry.connection(&ConnectionEnd {
            traffic: &traffic(Direction::Outbound, "shop/redis", ""),
            logged: false,
            started: Duration::from_secs(1_700_000_000),
            duration: Duration::from_secs(1),
            protocol: Protocol::Opaque,
            reason: Reason::Answered,
            rule: None,
            detail: None,
            tls_server_name: None,
            endpoint: None,
            bytes_received: 7,
            bytes_sent: 9,
            peer: None,
        });
        drop(traffic(Direction::Outbound, "shop/redis", "").open_opaque());
        drop(metrics.connection(Direction::Inbound, Protocol::Link, true));
        metrics.accepts_delayed.with_label_values(&["inbound", "connections"]).inc();
        metrics.retry("shop/cart", "sent");
        metrics.ejected("shop/cart", "shop/cart-2", Instant::now() + Duration::from_secs(3_600));
        metrics.shadow("shop/cart-v2", ShadowOutcome::Answered);
        metrics.egress(EgressVerdict::Allowed);
        metrics.tls_passed(Direction::Outbound, Some("example.org"), None);
        metrics.certificate_expires(Duration::from_secs(1_700_003_600));
        metrics.config_published(3, "17", 0);
        metrics.control_connected(true);
        telemetry
    }

    /// One line a family: name, kind, labels, what it tells.
    pub(crate) fn families() -> Vec<[String; 4]> {
        let telemetry = populated();
        let mut list: Vec<_> = telemetry
            .metrics
            .registry
            .gather()
            .iter()
            .map(|family| {
                let labels = family.get_metric().first().map(|metric| {
                    let names: Vec<_> = metric.get_label().iter().map(|label| label.name()).collect();
                    names.join(", ")
                });
                let kind = format!("{:?}", family.get_field_type()).to_lowercase();
                [family.name().to_owned(), kind, labels.unwrap_or_default(), family.help().to_owned()]
            })
            .collect();
        list.sort();
        list
    }

    #[test]
    fn the_list_of_metrics_is_the_golden_one() {
        let mut text = String::new();
        for [name, kind, labels, _] in families() {
            writeln!(text, "{name} {kind} {{{labels}}}").unwrap();
        }
        expect_file!["../../testdata/metrics.txt"].assert_eq(&text);
    }

    #[test]
    fn the_documentation_lists_every_metric_and_every_reason() {
        let mut metrics = String::from("| metric | kind | labels | what it tells |\n| --- | --- | --- | --- |\n");
        for [name, kind, labels, help] in families() {
            let labels: Vec<_> = labels.split(", ").filter(|label| !label.is_empty()).map(|label| format!("`{label}`")).collect();
            writeln!(metrics, "| `{name}` | {kind} | {} | {help} |", labels.join(", ")).unwrap();
        }
        let mut reasons = String::from("| reason | whose | what happened |\n| --- | --- | --- |\n");
        for reason in Reason::ALL {
            let whose = format!("{:?}", reason.fault()).to_lowercase();
            writeln!(reasons, "| `{}` | {whose} | {} |", reason.as_str(), reason.text()).unwrap();
        }
        let written = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/observability.md")).unwrap();
        let mut handshakes = String::from("| detail | what happened | what to do |\n| --- | --- | --- |\n");
        for fault in HandshakeFault::ALL {
            writeln!(handshakes, "| `{}` | {} | {} |", fault.as_str(), fault.text(), fault.remedy()).unwrap();
        }
        let written = with_section(&with_section(&written, "metrics", &metrics), "reasons", &reasons);
        let written = with_section(&written, "handshakes", &handshakes);
        expect_file!["../../../docs/observability.md"].assert_eq(&written);
    }

    fn with_section(text: &str, name: &str, content: &str) -> String {
        let (begin, end) = (format!("<!-- begin {name} -->\n"), format!("<!-- end {name} -->"));
        let (head, rest) = text.split_once(&begin).unwrap();
        let (_, tail) = rest.split_once(&end).unwrap();
        format!("{head}{begin}{content}{end}{tail}")
    }

    #[test]
    fn every_query_of_the_dashboard_is_in_the_golden_list_and_names_metrics_that_exist() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/dashboards/outrigger.json");
        let dashboard: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        let known: Vec<String> = families().into_iter().map(|[name, ..]| name).collect();
        let mut text = String::new();
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().into_iter().flatten() {
                let query = target["expr"].as_str().unwrap();
                writeln!(text, "{}: {query}", panel["title"].as_str().unwrap()).unwrap();
                let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
                for name in
                    query.split(|c| !word(c)).filter(|name| name.starts_with("outrigger_") || name.starts_with("process_"))
                {
                    assert!(known.iter().any(|known| known == name.trim_end_matches("_bucket")), "{name} in {query}");
                }
            }
        }
        expect_file!["../../testdata/dashboard-queries.txt"].assert_eq(&text);
    }

    #[test]
    fn an_ejected_endpoint_is_told_until_its_time_is_over() {
        let metrics = Metrics::new().unwrap();
        metrics.ejected("shop/cart", "shop/cart-1", Instant::now() - Duration::from_millis(1));
        metrics.ejected("shop/cart", "shop/cart-2", Instant::now() + Duration::from_secs(3_600));
        let text = metrics.render();
        let told: Vec<_> = text.lines().filter(|line| line.starts_with("outrigger_endpoint_ejected{")).collect();
        assert_eq!(told, [r#"outrigger_endpoint_ejected{destination_service="shop/cart",destination_workload="shop/cart-2"} 1"#]);
    }

    #[test]
    fn names_of_hosts_are_bounded_and_strangers_add_none() {
        let metrics = Metrics::new().unwrap();
        let service = Named::new("shop", "cart");
        for i in 0..=FOREIGN_HOSTS_MAX {
            metrics.tls_passed(Direction::Outbound, Some(&format!("host-{i}.example")), None);
        }
        metrics.tls_passed(Direction::Outbound, Some("host-1.example"), None);
        metrics.tls_passed(Direction::Inbound, Some("host-1.example"), None);
        metrics.tls_passed(Direction::Inbound, Some("cart.shop.svc.cluster.local"), Some(&service));
        metrics.tls_passed(Direction::Inbound, None, None);
        let text = metrics.render();
        for (labels, count) in [
            (r#"direction="outbound",server_name="host-1.example""#, 2),
            (r#"direction="outbound",server_name="other""#, 1),
            (r#"direction="inbound",server_name="other""#, 1),
            (r#"direction="inbound",server_name="cart.shop""#, 1),
            (r#"direction="inbound",server_name="""#, 1),
        ] {
            let line = format!("outrigger_tls_passed_connections_total{{{labels}}} {count}");
            assert!(text.lines().any(|told| told == line), "{line} is not in {text}");
        }
    }

    #[test]
    fn refusals_beyond_the_bound_keep_their_reason_and_lose_their_rule() {
        let metrics = Metrics::new().unwrap();
        let traffic = metrics.traffic(&TrafficLabels {
            direction: Direction::Inbound,
            source_identity: "",
            destination_identity: "",
            destination_service: "shop/cart",
            route: "",
            mtls: true,
        });
        for i in 0..=REFUSALS_MAX {
            metrics.refused(&traffic, Protocol::Http1, Reason::Denied, Some(&i.to_string()));
        }
        assert!(metrics.render().contains(r#"reason="denied",rule="other",source_identity="other"} 1"#));
    }
}
