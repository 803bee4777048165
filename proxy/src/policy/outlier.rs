//! Outlier ejection: an endpoint that fails several times in a row is left out for a growing time, never the last one.
//!
//! Sources: none; the numbers are those of Envoy's outlier detection where it has them. A refusal by policy (401, 403, 429)
//! and every other 4xx is the caller's doing and no failure of the endpoint.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::base::problems::{FieldPath, Problems};
use crate::base::units::{Percent, Span};

/// What a user writes.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct OutlierConfig {
    /// Failures in a row that eject an endpoint; 5 when absent, at least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) consecutive_failures: Option<u32>,
    /// For how long it is left out the first time; the second time twice as long, and so on; `30s` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) base_ejection: Option<Span>,
    /// For how long at most; `300s` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_ejection: Option<Span>,
    /// The share of a service's endpoints that may be left out at once; 50 when absent. One may always be left out if there
    /// are two, and one always stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_ejection_percent: Option<Percent>,
}

/// The state of one service's endpoints.
#[derive(Debug)]
pub(crate) struct Ejections {
    limits: Limits,
    endpoints: Mutex<BTreeMap<SocketAddr, Health>>,
}

/// How an attempt ended, as far as the endpoint is to blame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Outcome {
    Success,
    /// A connection failure, a reset, a timeout, or a 5xx status.
    Failure,
}

/// What the user said, checked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Limits {
    failures: u32,
    base: Duration,
    max: Duration,
    share: Percent,
}

/// One endpoint.
#[derive(Debug, Default)]
struct Health {}

impl OutlierConfig {
    /// Reports every fault under `at` and returns the state only if there is none.
    pub(crate) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<Ejections> {
        todo!()
    }
}

impl Default for Ejections {
    fn default() -> Self {
        todo!()
    }
}

impl Ejections {
    /// This state, or `previous` if both have the same limits: a new configuration does not bring a bad endpoint back.
    pub(crate) fn carried_from(self, previous: &std::sync::Arc<Self>) -> std::sync::Arc<Self> {
        todo!()
    }

    /// Forgets endpoints that are not among these.
    pub(crate) fn retain(&self, endpoints: &[SocketAddr]) {
        todo!()
    }

    /// Reports an attempt. `endpoints` is how many the service has now. Returns the time for which this report ejected the endpoint.
    pub(crate) fn report(&self, _endpoint: SocketAddr, _outcome: Outcome, _endpoints: usize, _now: Instant) -> Option<Duration> {
        todo!()
    }

    /// Is the endpoint left out now?
    pub(crate) fn is_ejected(&self, _endpoint: SocketAddr, _now: Instant) -> bool {
        todo!()
    }

    /// Endpoints that are left out now, and until when.
    pub(crate) fn ejected(&self, _now: Instant) -> Vec<(SocketAddr, Instant)> {
        todo!()
    }

    /// The word for why endpoints are left out.
    pub(crate) fn reason(&self) -> &'static str {
        "consecutive_failures"
    }
}
