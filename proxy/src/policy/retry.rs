//! Retry: may a failed attempt be tried again, and when?
//!
//! Sources: Gateway API GEP-1731 (HTTPRouteRetry) and GEP-3388 (budgets); RFC 9110 9.2.2 (idempotent methods).
//! A request that a peer may have processed is sent again only if its method is idempotent: no retry of ours makes an order
//! twice. Every retry is spent from a budget, so that a failing backend is not drowned by its own callers.

use std::sync::Arc;
use std::time::Duration;

use http::{Method, StatusCode};
use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::base::problems::{FieldPath, Problems};
use crate::base::random::Dice;
use crate::base::units::{Percent, Span};

/// What a user writes in a rule (Gateway API HTTPRouteRetry).
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct RetryConfig {
    /// Statuses that are tried again, 400 to 599; 502, 503 and 504 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) codes: Option<Vec<u16>>,
    /// How many times a request is tried again, 0 to 10; 2 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) attempts: Option<u32>,
    /// The wait before the first retry, doubled for each further one, up to ten times the first; `25ms` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) backoff: Option<Span>,
}

/// What a user writes for a service: how many of the requests to it may be retries.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct RetryBudgetConfig {
    /// Retries as a share of the other requests; 20 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) percent: Option<Percent>,
    /// The time over which requests are counted; `10s` when absent, `1s` to `1h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) interval: Option<Span>,
    /// Retries that are free, so that a service with few requests has some; 3 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) min_retries_per_second: Option<u32>,
}

/// The compiled policy of a rule. The default is for a rule that says nothing: connections that failed before a byte of the
/// request left are tried again, twice.
#[derive(Clone, Debug)]
pub(crate) struct Retry {
    /// Sorted. Empty: only what never left is tried again.
    codes: Vec<StatusCode>,
    /// May an attempt be repeated that left and got no answer (if its method is idempotent)?
    after_silence: bool,
    /// Attempts in all, the first among them.
    attempts: u32,
    backoff: Duration,
}

/// How far an attempt came: what the peer can have done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum WireState {
    /// No byte of the request left, or the peer said that it did not process it (HTTP/2 REFUSED_STREAM, GOAWAY).
    NotSent,
    /// The request left and no answer came: it may have been processed.
    Sent,
    /// The response head arrived with this status.
    Answered(StatusCode),
}

/// One failed attempt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attempt<'a> {
    /// 1 for the first.
    pub(crate) number: u32,
    pub(crate) method: &'a Method,
    pub(crate) state: WireState,
    /// Can the request be sent again, body and all?
    pub(crate) replayable: bool,
}

/// What to do about a failed attempt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Decision {
    /// Answer the caller with what there is, and why it was not tried again.
    Answer(&'static str),
    /// Try again after this time.
    Again(Duration),
}

/// The budget of one service: a share of its requests may be retries.
#[derive(Debug)]
pub(crate) struct RetryBudget {
    limits: BudgetLimits,
    counts: Mutex<Counts>,
}

/// What a budget allows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct BudgetLimits {
    share: Percent,
    interval: Duration,
    /// Retries that are free in one interval.
    free: u64,
}

/// What happened lately.
#[derive(Debug, Default)]
struct Counts {}

impl RetryConfig {
    /// Reports every fault under `at` and returns a policy only if there is none.
    pub(crate) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<Retry> {
        todo!()
    }
}

impl RetryBudgetConfig {
    /// Reports every fault under `at` and returns a budget only if there is none.
    pub(crate) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<RetryBudget> {
        todo!()
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self { codes: Vec::new(), after_silence: false, attempts: 1 + ATTEMPTS, backoff: BACKOFF }
    }
}

impl Default for RetryBudget {
    fn default() -> Self {
        todo!()
    }
}

impl RetryBudget {
    /// This budget, or `previous` if both allow the same: a new configuration does not refill it.
    pub(crate) fn carried_from(self, previous: &Arc<Self>) -> Arc<Self> {
        if self.limits == previous.limits { Arc::clone(previous) } else { Arc::new(self) }
    }

    /// Counts a request that is no retry.
    pub(crate) fn deposit(&self, _now: Instant) {
        todo!()
    }
}

impl Retry {
    /// May this attempt be tried again? Takes from `budget` when the answer is yes.
    pub(crate) fn decide(&self, _attempt: Attempt<'_>, _budget: &Arc<RetryBudget>, _now: Instant, _dice: &mut Dice) -> Decision {
        todo!()
    }
}

/// Retries of one request where nothing else is written.
const ATTEMPTS: u32 = 2;

/// The first wait where nothing else is written.
const BACKOFF: Duration = Duration::from_millis(25);
