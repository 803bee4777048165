//! The control plane's own numbers, served at `--metrics`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::routing::get;
use prometheus::{IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

use super::coverage::Wide;
use super::sessions::Sessions;
use super::source::kubernetes::health::Health;
use super::store::Store;
use crate::base::problems::Severity;
use crate::identity::source::Identity;
use crate::model::Kind;

/// Every metric of the control plane.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub(super) revision: IntGauge,
    pub(super) resources: IntGaugeVec,
    pub(super) problems: IntGaugeVec,
    pub(super) sidecars: IntGauge,
    pub(super) sidecars_behind: IntGauge,
    pub(super) refused: IntGauge,
    certificates: IntCounterVec,
    streams: IntCounterVec,
    admissions: IntCounterVec,
    pub(super) root_expiry: IntGauge,
    widened: IntGaugeVec,
    unwritten: IntGauge,
    silent_since: IntGaugeVec,
    statuses: IntCounterVec,
}

impl Metrics {
    /// All at zero.
    ///
    /// # Errors
    /// A name is not one, which a test rules out.
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let gauges = |name: &str, help: &str, label: &str| -> Result<IntGaugeVec, prometheus::Error> {
            let gauges = IntGaugeVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(gauges.clone()))?;
            Ok(gauges)
        };
        let certificates = IntCounterVec::new(
            Opts::new("outrigger_control_certificates_total", "Requests for certificates, by for whom and by outcome."),
            &["subject", "outcome"],
        )?;
        registry.register(Box::new(certificates.clone()))?;
        let streams = IntCounterVec::new(
            Opts::new("outrigger_control_streams_total", "Configuration streams that sidecars asked for, by outcome."),
            &["outcome"],
        )?;
        registry.register(Box::new(streams.clone()))?;
        let statuses = IntCounterVec::new(
            Opts::new("outrigger_control_status_writes_total", "Writes of the status of objects of a cluster, by outcome."),
            &["outcome"],
        )?;
        registry.register(Box::new(statuses.clone()))?;
        let admissions = IntCounterVec::new(
            Opts::new("outrigger_control_admissions_total", "Questions of the API server, by webhook and by what came of them."),
            &["webhook", "outcome"],
        )?;
        registry.register(Box::new(admissions.clone()))?;
        registry.register(Box::new(crate::telemetry::process::ProcessCollector::new()?))?;
        Ok(Self {
            revision: gauge("outrigger_control_revision", "Counts the changes of the desired state.")?,
            resources: gauges("outrigger_control_resources", "Resources in force, by kind.", "kind")?,
            problems: gauges("outrigger_control_problems", "Problems of resources, by severity.", "severity")?,
            sidecars: gauge("outrigger_control_sidecars", "Sidecars whose configuration stream is open.")?,
            sidecars_behind: gauge(
                "outrigger_control_sidecars_behind",
                "Sidecars that have not acknowledged the newest revision.",
            )?,
            refused: gauge("outrigger_control_refused_resources", "Resources that some sidecar refused.")?,
            root_expiry: gauge(
                "outrigger_control_root_expiry_timestamp_seconds",
                "When the root ends, in seconds since the epoch.",
            )?,
            widened: gauges(
                "outrigger_control_policies_widened",
                "Security policies that cover more than their Services ever led to, by reason.",
                "reason",
            )?,
            unwritten: gauge(
                "outrigger_control_coverage_unwritten",
                "1 while what security policies covered cannot be written, and would not be known after a restart.",
            )?,
            silent_since: gauges(
                "outrigger_control_kubernetes_silent_timestamp_seconds",
                "Since when the API server gives no news of a kind, in seconds since the epoch; 0 while it does.",
                "kind",
            )?,
            statuses,
            certificates,
            streams,
            admissions,
            registry,
        })
    }

    /// A certificate was asked for.
    pub(super) fn signed(&self, subject: &str, granted: bool) {
        let outcome = if granted { "granted" } else { "refused" };
        self.certificates.with_label_values(&[subject, outcome]).inc();
    }

    /// The status of an object was written, or the API server refused it.
    pub(super) fn status_written(&self, done: bool) {
        self.statuses.with_label_values(&[if done { "written" } else { "refused" }]).inc();
    }

    /// The API server asked a webhook, and this came of it.
    pub(super) fn admission(&self, webhook: &str, outcome: &str) {
        self.admissions.with_label_values(&[webhook, outcome]).inc();
    }

    /// A stream was asked for.
    pub(super) fn stream(&self, granted: bool) {
        let outcome = if granted { "granted" } else { "refused" };
        self.streams.with_label_values(&[outcome]).inc();
    }

    /// As Prometheus reads it.
    pub(crate) fn text(&self) -> String {
        // What was registered can be written; a metric that cannot is left out rather than the whole page.
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}

/// `/metrics` and `/ready`. Gauges are read at the moment of the scrape. Where sidecars are shown a `foreign` identity, there
/// is no use in them before there is a good one.
pub(crate) fn routes(
    metrics: Arc<Metrics>,
    store: Arc<Store>,
    sessions: Arc<Sessions>,
    foreign: Option<Identity>,
    cluster: Option<Arc<Health>>,
) -> Router {
    let page = move || {
        metrics.read(&store, &sessions);
        if let Some(health) = &cluster {
            metrics.read_cluster(health);
        }
        let text = metrics.text();
        async move { ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text) }
    };
    let ready = move || {
        let missing = foreign.as_ref().and_then(Identity::missing);
        async move {
            match missing {
                None => (StatusCode::OK, "ready\n".to_owned()),
                Some(missing) => (StatusCode::SERVICE_UNAVAILABLE, format!("{missing}\n")),
            }
        }
    };
    Router::new().route("/metrics", get(page)).route("/ready", get(ready))
}

impl Metrics {
    fn read(&self, store: &Store, sessions: &Sessions) {
        let signed = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let mut kinds: BTreeMap<Kind, usize> = Kind::ALL.into_iter().map(|kind| (kind, 0)).collect();
        let revision = {
            let world = store.world();
            for why in Wide::ALL {
                let count = world.coverage().wide().filter(|(_, found)| *found == why).count();
                self.widened.with_label_values(&[why.as_str()]).set(signed(count));
            }
            for key in world.resources().by_key.keys() {
                *kinds.entry(key.kind).or_default() += 1;
            }
            world.revision()
        };
        for (kind, count) in kinds {
            self.resources.with_label_values(&[kind.as_str()]).set(signed(count));
        }
        self.revision.set(i64::try_from(revision).unwrap_or(i64::MAX));
        self.unwritten.set(store.unwritten().is_some().into());
        let problems = store.problems();
        for (label, severity) in [("refuses", Severity::Refuses), ("warns", Severity::Warns)] {
            let count = problems.iter().filter(|wrong| wrong.problem.severity == severity).count();
            self.problems.with_label_values(&[label]).set(signed(count));
        }
        let sidecars = sessions.sidecars();
        self.sidecars.set(signed(sidecars.len()));
        self.sidecars_behind.set(signed(sidecars.iter().filter(|sidecar| sidecar.acknowledged < revision).count()));
        self.refused.set(signed(sidecars.iter().map(|sidecar| sidecar.refused.len()).sum()));
    }
}

impl Metrics {
    fn read_cluster(&self, health: &Health) {
        for (kind, standing) in health.standings() {
            let since = standing.silent_since.map_or(0, |since| i64::try_from(since).unwrap_or(i64::MAX));
            self.silent_since.with_label_values(&[kind]).set(since);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_stands_in_the_docs() {
        let docs = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/observability.md")).unwrap();
        let metrics = Metrics::new().unwrap();
        metrics.signed("node", true);
        metrics.stream(true);
        metrics.admission("mutate", "injected");
        metrics.resources.with_label_values(&["Mesh"]).set(1);
        metrics.problems.with_label_values(&["warns"]).set(1);
        metrics.status_written(true);
        metrics.silent_since.with_label_values(&["Pod"]).set(1);
        metrics.widened.with_label_values(&["forgotten"]).set(1);
        for family in metrics.registry.gather() {
            let kind = format!("{:?}", family.get_field_type()).to_lowercase();
            let labels = family.get_metric().first().map(|metric| {
                metric.get_label().iter().map(|label| format!("`{}`", label.name())).collect::<Vec<_>>().join(", ")
            });
            let line = format!("| `{}` | {kind} | {} | {} |", family.name(), labels.unwrap_or_default(), family.help());
            assert!(docs.contains(&line), "docs/observability.md lacks\n{line}");
        }
    }
}
