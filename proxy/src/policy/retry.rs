//! Retry: may a failed attempt be tried again, and when?

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::base::random::Dice;

/// The compiled policy of a rule.
#[derive(Clone, Debug)]
pub(crate) struct Retry {}

/// How far an attempt came: what the peer can have done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum WireState {
    /// No byte of the request left, or the peer said that it did not process it (HTTP/2 REFUSED_STREAM, GOAWAY).
    NotSent,
    /// The request left and no answer came: it may have been processed.
    Sent,
    /// The response head arrived with this status.
    Answered(http::StatusCode),
}

/// One failed attempt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attempt<'a> {
    /// 1 for the first.
    pub(crate) number: u32,
    pub(crate) method: &'a http::Method,
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
pub(crate) struct RetryBudget {}

impl RetryBudget {
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
