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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const MS: Duration = Duration::from_millis(1);

    fn compile(config: serde_json::Value) -> Result<RateLimit, String> {
        let config: RateLimitConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
        let mut problems = Problems::of("TrafficPolicy/shop/web");
        let compiled = config.compile(RuleName::new("web"), &FieldPath::root(), &mut problems);
        assert_eq!(compiled.is_none(), problems.refused());
        compiled.ok_or_else(|| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    fn passing(limit: &RateLimit, now: Instant) -> usize {
        std::iter::repeat_with(|| limit.admit(now)).take_while(Result::is_ok).count()
    }

    #[tokio::test(start_paused = true)]
    async fn requests_pass_at_their_rate_after_a_burst() {
        let limit = compile(json!({"requests": 10, "burst": 3})).unwrap();
        assert_eq!(passing(&limit, Instant::now()), 3);
        assert_eq!(limit.admit(Instant::now()), Err(100 * MS));
        tokio::time::sleep(99 * MS).await;
        assert_eq!(limit.admit(Instant::now()), Err(MS));
        tokio::time::sleep(MS).await;
        assert_eq!(passing(&limit, Instant::now()), 1);
        tokio::time::sleep(1000 * MS).await;
        assert_eq!(passing(&limit, Instant::now()), 3);
    }

    #[test]
    fn without_a_burst_a_whole_unit_may_come_at_once() {
        assert_eq!(passing(&compile(json!({"requests": 5, "per": "1m"})).unwrap(), Instant::now()), 5);
    }

    #[test]
    fn an_earlier_moment_of_another_thread_does_no_harm() {
        let limit = compile(json!({"requests": 1})).unwrap();
        let start = Instant::now();
        assert_eq!(limit.admit(start + 500 * MS), Ok(()));
        assert_eq!(limit.admit(start), Err(1500 * MS));
    }

    #[test]
    fn an_unchanged_limit_is_not_refilled() {
        let (old, now) = (compile(json!({"requests": 1})).unwrap(), Instant::now());
        assert_eq!(passing(&old, now), 1);
        assert_eq!(passing(&compile(json!({"requests": 1})).unwrap().carried_from(&old), now), 0);
        assert_eq!(passing(&compile(json!({"requests": 2})).unwrap().carried_from(&old), now), 2);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for config in [
            json!({"requests": 0}),
            json!({"requests": 1, "burst": 0}),
            json!({"requests": 1, "per": "0s"}),
            json!({"requests": 1, "per": "25h"}),
            json!({}),
        ] {
            assert!(compile(config.clone()).is_err(), "{config}");
        }
    }

    proptest! {
        #[test]
        fn never_more_pass_than_burst_and_rate(requests in 1_u32..50, burst in 1_u32..20, waits in proptest::collection::vec(0_u64..50, 1..300)) {
            let limit = compile(json!({"requests": requests, "burst": burst})).unwrap();
            let (start, mut now, mut passed) = (Instant::now(), Instant::now(), 0_u32);
            now = now.max(start);
            for wait in waits {
                now += MS * u32::try_from(wait).unwrap();
                passed += u32::from(limit.admit(now).is_ok());
            }
            let most = f64::from(burst) + (now - start).as_secs_f64() * f64::from(requests);
            prop_assert!(f64::from(passed) <= most + 1e-6, "{} passed, {} may", passed, most);
        }

        #[test]
        fn who_waits_as_told_passes(requests in 1_u32..1000, burst in 1_u32..20) {
            let limit = compile(json!({"requests": requests, "burst": burst})).unwrap();
            let mut now = Instant::now();
            for _ in 0..50 {
                if let Err(wait) = limit.admit(now) {
                    now += wait;
                    prop_assert!(limit.admit(now).is_ok());
                }
            }
        }
    }
}
