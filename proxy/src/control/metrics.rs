//! The control plane's own numbers, served at `--metrics`.

use prometheus::{IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

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
    pub(super) root_expiry: IntGauge,
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
            root_expiry: gauge("outrigger_control_root_expiry_seconds", "When the root ends, in seconds since the epoch.")?,
            certificates,
            registry,
        })
    }

    /// A certificate was asked for.
    pub(super) fn signed(&self, subject: &str, granted: bool) {
        let outcome = if granted { "granted" } else { "refused" };
        self.certificates.with_label_values(&[subject, outcome]).inc();
    }

    /// As Prometheus reads it.
    pub(crate) fn text(&self) -> String {
        // What was registered can be written; a metric that cannot is left out rather than the whole page.
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}
