//! Outlier ejection: an endpoint that fails several times in a row is left out for a growing time, never the last one.
//!
//! Sources: none; the numbers are those of Envoy's outlier detection where it has them. A refusal by policy (401, 403, 429)
//! and every other 4xx is the caller's doing and no failure of the endpoint.
//!
//! An endpoint whose time is over is on trial: its next success clears it, its next failure ejects it again, for longer. What
//! is reported about an endpoint while it is left out comes from attempts that began before, and counts for nothing. For
//! each base time that it stays in afterwards, one ejection is forgiven.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
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
    /// How many endpoints are in the map; read without its lock.
    known: AtomicUsize,
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
#[derive(Clone, Copy, Debug, PartialEq)]
struct Limits {
    failures: u32,
    base: Duration,
    max: Duration,
    /// Of a service's endpoints, between 0 and 1.
    share: f64,
}

/// One endpoint that is not known to be well.
#[derive(Clone, Copy, Debug, Default)]
struct Health {
    /// In a row.
    failures: u32,
    /// Ejections that are not forgiven.
    times: u32,
    /// The end of its last ejection, be it past or to come.
    until: Option<Instant>,
}

impl OutlierConfig {
    /// Reports every fault under `at` and returns the state only if there is none.
    pub(crate) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<Ejections> {
        let Self { consecutive_failures, base_ejection, max_ejection, max_ejection_percent } = self;
        let default = Limits::default();
        let base = base_ejection.map_or(default.base, |span| span.0);
        let limits = Limits {
            failures: consecutive_failures.unwrap_or(default.failures),
            base,
            // Where only the base is written and it is longer than the usual longest time, it is the longest time.
            max: max_ejection.map_or(default.max.max(base), |span| span.0),
            share: max_ejection_percent.map_or(default.share, Percent::fraction),
        };
        let mut good = true;
        if limits.failures == 0 {
            let remedy = "write at least 1; maxEjectionPercent: 0 leaves every endpoint in";
            problems.refuse(&at.field("consecutiveFailures"), "0 failures eject everybody", remedy);
            good = false;
        }
        if limits.base.is_zero() || limits.base > EJECTION_MAX {
            problems.refuse(&at.field("baseEjection"), format!("{} is no time to be left out", Span(base)), "write 1ms to 24h");
            good = false;
        }
        if limits.max < limits.base || limits.max > EJECTION_MAX {
            let remedy = format!("write {} to 24h", Span(base));
            let text = format!("{} is shorter than baseEjection ({}), or longer than a day", Span(limits.max), Span(base));
            problems.refuse(&at.field("maxEjection"), text, remedy);
            good = false;
        }
        good.then(|| Ejections::new(limits))
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { failures: 5, base: Duration::from_secs(30), max: Duration::from_secs(300), share: 0.5 }
    }
}

impl Default for Ejections {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl Ejections {
    fn new(limits: Limits) -> Self {
        Self { limits, known: AtomicUsize::new(0), endpoints: Mutex::default() }
    }

    /// This state, or `previous` if both have the same limits: a new configuration does not bring a bad endpoint back.
    pub(crate) fn carried_from(self, previous: &Arc<Self>) -> Arc<Self> {
        if self.limits == previous.limits { Arc::clone(previous) } else { Arc::new(self) }
    }

    /// Forgets endpoints that are not among these.
    pub(crate) fn retain(&self, endpoints: &[SocketAddr]) {
        let mut known = self.endpoints.lock();
        known.retain(|address, _| endpoints.contains(address));
        self.known.store(known.len(), Ordering::Relaxed);
    }

    /// Reports an attempt. `endpoints` is how many the service has now. Returns the time for which this report ejected the endpoint.
    pub(crate) fn report(&self, endpoint: SocketAddr, outcome: Outcome, endpoints: usize, now: Instant) -> Option<Duration> {
        if outcome == Outcome::Success && self.all_are_well() {
            return None;
        }
        let mut known = self.endpoints.lock();
        let ejected = match outcome {
            Outcome::Success => {
                Self::succeed(&mut known, endpoint, self.limits.base, now);
                None
            }
            Outcome::Failure => self.fail(&mut known, endpoint, endpoints, now),
        };
        self.known.store(known.len(), Ordering::Relaxed);
        ejected
    }

    /// Did none of them fail lately? Then a success is no news.
    pub(crate) fn all_are_well(&self) -> bool {
        self.known.load(Ordering::Relaxed) == 0
    }

    /// Is the endpoint left out now?
    pub(crate) fn is_ejected(&self, endpoint: SocketAddr, now: Instant) -> bool {
        // Nearly always nobody is known to be ill, and then no lock is taken. A report that another thread makes at this very
        // moment is seen by the next request.
        !self.all_are_well() && self.endpoints.lock().get(&endpoint).is_some_and(|health| health.is_ejected(now))
    }

    /// Endpoints that are left out now, and until when.
    #[cfg(test)]
    pub(crate) fn ejected(&self, now: Instant) -> Vec<(SocketAddr, Instant)> {
        let known = self.endpoints.lock();
        known.iter().filter_map(|(address, health)| Some((*address, health.until.filter(|until| *until > now)?))).collect()
    }

    fn succeed(known: &mut BTreeMap<SocketAddr, Health>, endpoint: SocketAddr, base: Duration, now: Instant) {
        let Some(health) = known.get_mut(&endpoint) else { return };
        if health.is_ejected(now) {
            return;
        }
        health.failures = 0;
        if health.times_unforgiven(base, now) == 0 {
            known.remove(&endpoint);
        }
    }

    fn fail(
        &self,
        known: &mut BTreeMap<SocketAddr, Health>,
        endpoint: SocketAddr,
        endpoints: usize,
        now: Instant,
    ) -> Option<Duration> {
        let out = known.iter().filter(|(address, health)| **address != endpoint && health.is_ejected(now)).count();
        let health = known.entry(endpoint).or_default();
        if health.is_ejected(now) {
            return None;
        }
        health.failures = health.failures.saturating_add(1);
        if health.failures < self.limits.failures || out >= self.limits.may_be_out(endpoints) {
            return None;
        }
        health.times = health.times_unforgiven(self.limits.base, now).saturating_add(1);
        // On trial when it comes back: one failure is enough.
        health.failures = self.limits.failures - 1;
        let time = self.limits.base.saturating_mul(health.times).min(self.limits.max);
        health.until = Some(now + time);
        Some(time)
    }
}

impl Limits {
    /// How many of a service's endpoints may be left out at once.
    fn may_be_out(&self, endpoints: usize) -> usize {
        if self.share <= 0.0 {
            return 0;
        }
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a count is a count, and no service has 2^52 endpoints"
        )]
        let share = (self.share * endpoints as f64) as usize;
        share.max(1).min(endpoints.saturating_sub(1))
    }
}

impl Health {
    fn is_ejected(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| until > now)
    }

    fn times_unforgiven(&self, base: Duration, now: Instant) -> u32 {
        let since = self.until.map_or(Duration::ZERO, |until| now.saturating_duration_since(until));
        let forgiven = since.as_nanos() / base.as_nanos().max(1);
        self.times.saturating_sub(u32::try_from(forgiven).unwrap_or(u32::MAX))
    }
}

/// The longest time for which anything is left out.
const EJECTION_MAX: Duration = Duration::from_secs(24 * 60 * 60);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const S: Duration = Duration::from_secs(1);

    fn endpoint(number: u8) -> SocketAddr {
        SocketAddr::from(([10, 64, 0, number], 80))
    }

    fn compile(config: serde_json::Value) -> Result<Ejections, String> {
        let config: OutlierConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
        let mut problems = Problems::of("TrafficPolicy/shop/web");
        let compiled = config.compile(&FieldPath::root(), &mut problems);
        assert_eq!(compiled.is_none(), problems.refused());
        compiled.ok_or_else(|| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    /// Fails `number` as often as it takes; for how long it is ejected, in seconds.
    fn eject(ejections: &Ejections, number: u8, endpoints: usize, now: Instant) -> Option<u64> {
        (0..10).find_map(|_| ejections.report(endpoint(number), Outcome::Failure, endpoints, now)).map(|time| time.as_secs())
    }

    #[test]
    fn failures_in_a_row_eject_and_time_brings_back() {
        let (ejections, now) = (Ejections::default(), Instant::now());
        for _ in 0..4 {
            assert_eq!(ejections.report(endpoint(1), Outcome::Failure, 3, now), None);
        }
        assert!(!ejections.is_ejected(endpoint(1), now));
        assert_eq!(ejections.report(endpoint(1), Outcome::Failure, 3, now), Some(30 * S));
        assert!(ejections.is_ejected(endpoint(1), now));
        assert_eq!(ejections.ejected(now), [(endpoint(1), now + 30 * S)]);
        assert!(ejections.is_ejected(endpoint(1), now + 29 * S));
        assert!(!ejections.is_ejected(endpoint(1), now + 30 * S));
        assert_eq!(ejections.ejected(now + 30 * S), []);
    }

    #[test]
    fn a_success_in_between_starts_the_count_again() {
        let (ejections, now) = (Ejections::default(), Instant::now());
        for _ in 0..5 {
            for _ in 0..4 {
                assert_eq!(ejections.report(endpoint(1), Outcome::Failure, 3, now), None);
            }
            assert_eq!(ejections.report(endpoint(1), Outcome::Success, 3, now), None);
        }
        assert!(ejections.endpoints.lock().is_empty());
    }

    #[test]
    fn the_time_grows_to_its_bound() {
        let (ejections, mut now) = (Ejections::default(), Instant::now());
        for seconds in [30, 60, 90, 120, 150, 180, 210, 240, 270, 300, 300] {
            assert_eq!(eject(&ejections, 1, 2, now), Some(seconds));
            now += Duration::from_secs(seconds);
        }
    }

    #[test]
    fn an_endpoint_that_comes_back_is_on_trial() {
        let (ejections, now) = (Ejections::default(), Instant::now());
        eject(&ejections, 1, 3, now);
        assert_eq!(ejections.report(endpoint(1), Outcome::Failure, 3, now + 31 * S), Some(60 * S));
        let back = now + 31 * S + 60 * S;
        assert_eq!(ejections.report(endpoint(1), Outcome::Success, 3, back), None);
        assert_eq!(ejections.report(endpoint(1), Outcome::Failure, 3, back), None);
    }

    #[test]
    fn what_is_reported_of_an_ejected_endpoint_counts_for_nothing() {
        let (ejections, now) = (Ejections::default(), Instant::now());
        eject(&ejections, 1, 3, now);
        assert_eq!(eject(&ejections, 1, 3, now + S), None);
        assert_eq!(ejections.report(endpoint(1), Outcome::Success, 3, now + S), None);
        assert!(ejections.is_ejected(endpoint(1), now + 29 * S));
        assert!(!ejections.is_ejected(endpoint(1), now + 30 * S));
    }

    #[test]
    fn ejections_are_forgiven_one_by_one() {
        let (ejections, now) = (Ejections::default(), Instant::now());
        eject(&ejections, 1, 3, now);
        eject(&ejections, 1, 3, now + 30 * S);
        ejections.report(endpoint(1), Outcome::Success, 3, now + 100 * S);
        assert_eq!(eject(&ejections, 1, 3, now + 121 * S), Some(60));
        ejections.report(endpoint(1), Outcome::Success, 3, now + 1000 * S);
        assert!(ejections.endpoints.lock().is_empty());
    }

    #[test]
    fn the_last_endpoint_stays() {
        let (ejections, now) = (Ejections::default(), Instant::now());
        assert_eq!(eject(&ejections, 1, 1, now), None);
        assert_eq!(eject(&ejections, 1, 0, now), None);
        let (all, now) = (compile(json!({"maxEjectionPercent": 100})).unwrap(), Instant::now());
        assert_eq!(eject(&all, 1, 3, now), Some(30));
        assert_eq!(eject(&all, 2, 3, now), Some(30));
        assert_eq!(eject(&all, 3, 3, now), None);
        // As soon as another one is back, it goes.
        assert_eq!(all.report(endpoint(3), Outcome::Failure, 3, now + 30 * S), Some(30 * S));
    }

    #[test]
    fn half_of_the_endpoints_stay_and_one_of_two_may_go() {
        for (endpoints, out) in [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (10, 5)] {
            let (ejections, now) = (Ejections::default(), Instant::now());
            let ejected = (1..=endpoints).filter(|number| eject(&ejections, *number, usize::from(endpoints), now).is_some());
            assert_eq!(ejected.count(), out, "{endpoints}");
        }
        let none = compile(json!({"maxEjectionPercent": 0})).unwrap();
        assert_eq!(eject(&none, 1, 10, Instant::now()), None);
    }

    #[test]
    fn endpoints_that_left_are_forgotten() {
        let (ejections, now) = (Ejections::default(), Instant::now());
        eject(&ejections, 1, 2, now);
        ejections.retain(&[endpoint(2)]);
        assert!(!ejections.is_ejected(endpoint(1), now));
        assert_eq!(eject(&ejections, 2, 2, now), Some(30));
    }

    #[test]
    fn unchanged_limits_keep_their_ejections() {
        let old = Arc::new(compile(json!({"consecutiveFailures": 1})).unwrap());
        eject(&old, 1, 2, Instant::now());
        let same = compile(json!({"consecutiveFailures": 1})).unwrap().carried_from(&old);
        assert!(same.is_ejected(endpoint(1), Instant::now()));
        let other = compile(json!({"consecutiveFailures": 2})).unwrap().carried_from(&old);
        assert!(!other.is_ejected(endpoint(1), Instant::now()));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for config in [
            json!({"consecutiveFailures": 0}),
            json!({"baseEjection": "0s"}),
            json!({"baseEjection": "10s", "maxEjection": "5s"}),
            json!({"maxEjection": "48h"}),
            json!({"maxEjectionPercent": 101}),
        ] {
            assert!(compile(config.clone()).is_err(), "{config}");
        }
        assert!(compile(json!({"baseEjection": "10m"})).is_ok());
    }

    proptest! {
        /// Whatever happens, one endpoint of a service stays, and nobody is out for longer than the longest time.
        #[test]
        fn one_endpoint_always_stays(
            steps in proptest::collection::vec((0_u64..40_000, 1_u8..5, prop::bool::weighted(0.8)), 1..200),
            percent in 0_u32..=100,
        ) {
            let ejections = compile(json!({"consecutiveFailures": 2, "maxEjectionPercent": percent})).unwrap();
            let mut now = Instant::now();
            for (wait_ms, number, failed) in steps {
                now += Duration::from_millis(wait_ms);
                let outcome = if failed { Outcome::Failure } else { Outcome::Success };
                ejections.report(endpoint(number), outcome, 4, now);
                let out = ejections.ejected(now);
                prop_assert!(out.len() < 4);
                prop_assert!(out.iter().all(|(_, until)| *until <= now + 300 * S));
                let asked: Vec<_> = (1..5).filter(|number| ejections.is_ejected(endpoint(*number), now)).collect();
                prop_assert_eq!(out.len(), asked.len());
            }
        }
    }
}
