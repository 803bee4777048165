//! Local rate limit: a token bucket.
//!
//! Sources: the generic cell rate algorithm (ITU-T I.371 A.1), which keeps one moment instead of a count and a clock.
//! In any stretch of time `t` at most `burst + t × requests / per` requests pass, exactly; a refused request takes nothing.
//! The limit is each sidecar's own: two replicas of a service admit twice as much.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::RuleName;
use crate::base::problems::{FieldPath, Problems};
use crate::base::units::Span;

/// What a user writes.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct RateLimitConfig {
    /// Requests that pass in `per`; at least 1.
    pub(crate) requests: u32,
    /// The unit of time; `1s` when absent, at most `24h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) per: Option<Span>,
    /// Requests that may come at once after a pause; as many as `requests` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) burst: Option<u32>,
}

/// The compiled limit; the bucket is shared by all snapshots in which the limit is the same.
#[derive(Clone, Debug)]
pub(crate) struct RateLimit {
    pub(crate) rule: RuleName,
    pub(crate) bucket: Arc<Bucket>,
}

/// The state of a limit.
#[derive(Debug)]
pub(crate) struct Bucket {
    /// The time that one request costs.
    cost: Duration,
    /// How far the next free moment may lie ahead of now: the burst without its last request.
    tolerance: Duration,
    /// When the bucket is full again; none before the first request.
    full_at: Mutex<Option<Instant>>,
}

impl RateLimitConfig {
    /// Reports every fault under `at` and returns a limit only if there is none. Its bucket is new and full.
    pub(crate) fn compile(&self, rule: RuleName, at: &FieldPath, problems: &mut Problems) -> Option<RateLimit> {
        let per = self.per.map_or(Duration::from_secs(1), |per| per.0);
        let burst = self.burst.unwrap_or(self.requests);
        let mut good = true;
        if self.requests == 0 {
            problems.refuse(
                &at.field("requests"),
                "a limit of 0 requests lets nothing pass",
                "write at least 1, or refuse the requests by an AuthorizationPolicy",
            );
            good = false;
        }
        if per.is_zero() || per > PER_MAX {
            problems.refuse(&at.field("per"), format!("{} is no unit of time for a limit", Span(per)), "write 1ms to 24h");
            good = false;
        }
        if burst == 0 {
            problems.refuse(&at.field("burst"), "a burst of 0 lets nothing pass", "write at least 1, or leave it out");
            good = false;
        }
        if !good {
            return None;
        }
        // Rounded up, so that rounding never lets more pass than is written.
        let nanos = per.as_nanos().div_ceil(u128::from(self.requests));
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let bucket = Bucket { cost, tolerance: cost.saturating_mul(burst - 1), full_at: Mutex::new(None) };
        Some(RateLimit { rule, bucket: Arc::new(bucket) })
    }
}

impl RateLimit {
    /// This limit with the bucket of `previous`, if both say the same: a new configuration does not refill it.
    pub(crate) fn carried_from(mut self, previous: &Self) -> Self {
        if self.bucket.cost == previous.bucket.cost && self.bucket.tolerance == previous.bucket.tolerance {
            self.bucket = Arc::clone(&previous.bucket);
        }
        self
    }

    /// Takes a token, or says how long until there is one.
    pub(crate) fn admit(&self, now: Instant) -> Result<(), Duration> {
        let bucket = &self.bucket;
        let mut full_at = bucket.full_at.lock();
        let from = full_at.map_or(now, |at| at.max(now));
        let ahead = from.duration_since(now);
        if ahead > bucket.tolerance {
            return Err(ahead - bucket.tolerance);
        }
        *full_at = Some(from + bucket.cost);
        Ok(())
    }
}

/// The longest unit of time: longer ones are quotas, which must survive a restart.
const PER_MAX: Duration = Duration::from_secs(24 * 60 * 60);
