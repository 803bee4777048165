//! Retry: may a failed attempt be tried again, and when?
//!
//! Sources: Gateway API GEP-1731 (HTTPRouteRetry) and GEP-3388 (budgets); RFC 9110 9.2.2 (idempotent methods).
//! A request that a peer may have processed is sent again only if its method is idempotent: no retry of ours makes an order
//! twice. Every retry is spent from a budget, so that a failing backend is not drowned by its own callers.

use std::collections::VecDeque;
use std::fmt;
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
    /// Nothing of the request left, or provably nobody read it.
    NotSent,
    /// The peer said that it did not process the request (HTTP/2 REFUSED_STREAM, GOAWAY).
    Refused,
    /// The request left and no answer came: it may have been processed.
    Sent,
    /// The response head arrived with this status.
    Answered(StatusCode),
}

impl WireState {
    /// The stable word, as in the access log.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::NotSent => "not_sent",
            Self::Refused => "refused",
            Self::Sent => "sent",
            Self::Answered(_) => "answered",
        }
    }
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
#[derive(Clone, Copy, Debug, PartialEq)]
struct BudgetLimits {
    /// Retries as a share of the other requests, between 0 and 1.
    share: f64,
    interval: Duration,
    /// Retries that are free in one interval.
    free: u64,
}

/// What happened in the last interval, in slices: one that has left the interval is forgotten as a whole.
#[derive(Debug, Default)]
struct Counts {
    /// When slice 0 began.
    began: Option<Instant>,
    /// The number of the slice that is counted in now.
    number: u128,
    newest: Slice,
    /// With their numbers, the oldest first; at most [`SLICES`].
    older: VecDeque<(u128, Slice)>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slice {
    requests: u64,
    retries: u64,
}

impl RetryConfig {
    /// Reports every fault under `at` and returns a policy only if there is none.
    pub(crate) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<Retry> {
        let Self { codes, attempts, backoff } = self;
        let mut good = true;
        let mut listed = Vec::new();
        match codes {
            None => listed.extend(CODES),
            Some(codes) => {
                for (index, code) in codes.iter().enumerate() {
                    match StatusCode::from_u16(*code) {
                        Ok(status) if (400..600).contains(code) => listed.push(status),
                        Ok(_) | Err(_) => {
                            problems.refuse(
                                &at.field("codes").index(index),
                                format!("{code} is not the status of a failure"),
                                "write 400 to 599",
                            );
                            good = false;
                        }
                    }
                }
            }
        }
        let attempts = attempts.unwrap_or(ATTEMPTS);
        if attempts > ATTEMPTS_MAX {
            problems.refuse(
                &at.field("attempts"),
                format!("{attempts} retries are too many"),
                format!("write at most {ATTEMPTS_MAX}"),
            );
            good = false;
        }
        let backoff = backoff.map_or(BACKOFF, |backoff| backoff.0);
        if backoff > BACKOFF_MAX {
            let text = format!("no caller waits {} for another attempt", Span(backoff));
            problems.refuse(&at.field("backoff"), text, format!("write at most {}", Span(BACKOFF_MAX)));
            good = false;
        }
        listed.sort();
        listed.dedup();
        good.then_some(Retry { codes: listed, after_silence: true, attempts: 1 + attempts, backoff })
    }
}

impl RetryBudgetConfig {
    /// Reports every fault under `at` and returns a budget only if there is none.
    pub(crate) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<RetryBudget> {
        let limits = BudgetLimits::default();
        let interval = self.interval.map_or(limits.interval, |interval| interval.0);
        if !(INTERVAL_MIN..=INTERVAL_MAX).contains(&interval) {
            problems.refuse(&at.field("interval"), format!("{} is no interval to count over", Span(interval)), "write 1s to 1h");
            return None;
        }
        let share = self.percent.map_or(limits.share, Percent::fraction);
        let free = u64::from(self.min_retries_per_second.unwrap_or(FREE_PER_SECOND)) * interval.as_secs();
        Some(RetryBudget::new(BudgetLimits { share, interval, free }))
    }
}

impl fmt::Display for Retry {
    /// For people: what is tried again, and how often.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "up to {} attempts, from {} apart, after what never left", self.attempts, Span(self.backoff))?;
        if self.after_silence {
            f.write_str(", after silence where the method is idempotent")?;
        }
        if !self.codes.is_empty() {
            let codes: Vec<&str> = self.codes.iter().map(StatusCode::as_str).collect();
            write!(f, ", after {} likewise", codes.join(", "))?;
        }
        Ok(())
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self { codes: Vec::new(), after_silence: false, attempts: 1 + ATTEMPTS, backoff: BACKOFF }
    }
}

impl Default for BudgetLimits {
    fn default() -> Self {
        Self { share: SHARE, interval: INTERVAL, free: u64::from(FREE_PER_SECOND) * INTERVAL.as_secs() }
    }
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self::new(BudgetLimits::default())
    }
}

impl RetryBudget {
    fn new(limits: BudgetLimits) -> Self {
        Self { limits, counts: Mutex::default() }
    }

    /// This budget, or `previous` if both allow the same: a new configuration does not refill it.
    pub(crate) fn carried_from(self, previous: &Arc<Self>) -> Arc<Self> {
        if self.limits == previous.limits { Arc::clone(previous) } else { Arc::new(self) }
    }

    /// Counts a request that is no retry.
    pub(crate) fn deposit(&self, now: Instant) {
        let mut counts = self.counts.lock();
        counts.advance(self.limits.interval, now);
        counts.newest.requests += 1;
    }

    /// Takes one retry, if there is one.
    fn withdraw(&self, now: Instant) -> bool {
        let mut counts = self.counts.lock();
        counts.advance(self.limits.interval, now);
        let slices = counts.older.iter().map(|(_, slice)| slice).chain([&counts.newest]);
        let (requests, retries) =
            slices.fold((0, 0), |(requests, retries), slice| (requests + slice.requests, retries + slice.retries));
        #[expect(clippy::cast_precision_loss, reason = "more than 2^52 requests in an interval need not be exact")]
        let left = self.limits.share * requests as f64 + self.limits.free as f64 - retries as f64;
        if left < 1.0 {
            return false;
        }
        counts.newest.retries += 1;
        true
    }
}

impl Counts {
    /// Makes `newest` the slice of `now`. A moment before the last one, which another thread saw, counts as it.
    fn advance(&mut self, interval: Duration, now: Instant) {
        let since = now.saturating_duration_since(*self.began.get_or_insert(now));
        let width = interval.as_nanos().div_ceil(SLICES).max(1);
        let number = (since.as_nanos() / width).max(self.number);
        if number > self.number {
            self.older.push_back((self.number, std::mem::take(&mut self.newest)));
            self.number = number;
        }
        while self.older.front().is_some_and(|(old, _)| old + SLICES < number) {
            self.older.pop_front();
        }
    }
}

impl Retry {
    /// May this attempt be tried again? Takes from `budget` when the answer is yes.
    pub(crate) fn decide(&self, attempt: Attempt<'_>, budget: &Arc<RetryBudget>, now: Instant, dice: &mut Dice) -> Decision {
        let Attempt { number, method, state, replayable } = attempt;
        let refusal = match state {
            WireState::NotSent | WireState::Refused => None,
            WireState::Sent if !self.after_silence => Some("request_sent"),
            WireState::Answered(status) if self.codes.binary_search(&status).is_err() => Some("status_not_listed"),
            // "A proxy MUST NOT automatically retry a request with a non-idempotent method" unless it knows that the
            // request was never applied (RFC 9110 9.2.2). A status can be an intermediary's after the work was done.
            WireState::Sent | WireState::Answered(_) => (!is_idempotent(method)).then_some("method_not_idempotent"),
        };
        if let Some(reason) = refusal {
            return Decision::Answer(reason);
        }
        if !replayable {
            return Decision::Answer("not_replayable");
        }
        if number >= self.attempts {
            return Decision::Answer("attempts_used");
        }
        if !budget.withdraw(now) {
            return Decision::Answer("budget_empty");
        }
        Decision::Again(self.wait(number, dice))
    }

    /// The wait after attempt `number`: doubled each time up to a bound, and up to half as long again by chance, so that
    /// callers that failed together do not come back together. Never shorter than what is configured (GEP-1731).
    fn wait(&self, number: u32, dice: &mut Dice) -> Duration {
        let doubled = self.backoff.saturating_mul(1_u32.checked_shl(number.saturating_sub(1)).unwrap_or(u32::MAX));
        let step = doubled.min(self.backoff.saturating_mul(GROWTH_MAX));
        step + step.mul_f64(dice.fraction() / 2.0)
    }
}

/// RFC 9110 9.2.2. An extension method is not known to be idempotent.
fn is_idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE)
}

/// Statuses that are tried again where a policy names none: those of a gateway that got no answer.
const CODES: [StatusCode; 3] = [StatusCode::BAD_GATEWAY, StatusCode::SERVICE_UNAVAILABLE, StatusCode::GATEWAY_TIMEOUT];

/// Retries of one request where nothing else is written.
const ATTEMPTS: u32 = 2;

const ATTEMPTS_MAX: u32 = 10;

/// The first wait where nothing else is written.
const BACKOFF: Duration = Duration::from_millis(25);

const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// How many times the first wait the later ones may be.
const GROWTH_MAX: u32 = 10;

/// Retries as a share of requests where nothing else is written (GEP-3388).
const SHARE: f64 = 0.2;

/// Retries that are free each second where nothing else is written.
const FREE_PER_SECOND: u32 = 3;

/// The time over which requests are counted where nothing else is written (GEP-3388).
const INTERVAL: Duration = Duration::from_secs(10);

/// Into how many slices an interval is cut: it is between one and 1.1 intervals that is remembered.
const SLICES: u128 = 10;

const INTERVAL_MIN: Duration = Duration::from_secs(1);

const INTERVAL_MAX: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const S: Duration = Duration::from_secs(1);

    fn compile(config: serde_json::Value) -> Result<Retry, String> {
        let config: RetryConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
        let mut problems = Problems::of("HTTPRoute/shop/web");
        let compiled = config.compile(&FieldPath::root(), &mut problems);
        assert_eq!(compiled.is_none(), problems.refused());
        compiled.ok_or_else(|| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    fn budget(config: serde_json::Value) -> Result<Arc<RetryBudget>, String> {
        let config: RetryBudgetConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
        let mut problems = Problems::of("TrafficPolicy/shop/web");
        let compiled = config.compile(&FieldPath::root(), &mut problems);
        let said = || problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        compiled.map(Arc::new).ok_or_else(said)
    }

    fn answered(code: u16) -> WireState {
        WireState::Answered(StatusCode::from_u16(code).unwrap())
    }

    /// Is a first attempt tried again, and if not, why?
    fn check(retry: &Retry, method: &Method, state: WireState, expected: &str) {
        let attempt = Attempt { number: 1, method, state, replayable: true };
        let decision = retry.decide(attempt, &Arc::default(), Instant::now(), &mut Dice::from_seed(1));
        let got = match decision {
            Decision::Answer(reason) => reason,
            Decision::Again(_) => "again",
        };
        assert_eq!(got, expected, "{method} {state:?}");
    }

    #[test]
    fn without_a_policy_only_what_never_left_is_tried_again() {
        let retry = Retry::default();
        check(&retry, &Method::POST, WireState::NotSent, "again");
        check(&retry, &Method::POST, WireState::Refused, "again");
        check(&retry, &Method::GET, WireState::NotSent, "again");
        check(&retry, &Method::GET, WireState::Sent, "request_sent");
        check(&retry, &Method::GET, answered(503), "status_not_listed");
    }

    #[test]
    fn what_may_have_been_processed_is_tried_again_for_idempotent_methods_only() {
        let retry = compile(json!({"codes": [500, 503]})).unwrap();
        for method in [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE, Method::PUT, Method::DELETE] {
            check(&retry, &method, WireState::Sent, "again");
            check(&retry, &method, answered(503), "again");
            check(&retry, &method, answered(502), "status_not_listed");
        }
        for method in [Method::POST, Method::PATCH, Method::CONNECT, "PURGE".parse().unwrap()] {
            check(&retry, &method, WireState::NotSent, "again");
            check(&retry, &method, WireState::Sent, "method_not_idempotent");
            check(&retry, &method, answered(503), "method_not_idempotent");
        }
    }

    #[test]
    fn a_policy_without_codes_lists_those_of_gateways() {
        let retry = compile(json!({})).unwrap();
        for (code, expected) in
            [(500, "status_not_listed"), (502, "again"), (503, "again"), (504, "again"), (404, "status_not_listed")]
        {
            check(&retry, &Method::GET, answered(code), expected);
        }
        check(&compile(json!({"codes": []})).unwrap(), &Method::GET, answered(503), "status_not_listed");
    }

    #[test]
    fn a_body_that_is_gone_is_not_sent_again() {
        let attempt = Attempt { number: 1, method: &Method::PUT, state: WireState::NotSent, replayable: false };
        let decision = Retry::default().decide(attempt, &Arc::default(), Instant::now(), &mut Dice::from_seed(1));
        assert_eq!(decision, Decision::Answer("not_replayable"));
    }

    #[test]
    fn attempts_end() {
        let decide = |retry: &Retry, number| {
            let attempt = Attempt { number, method: &Method::GET, state: WireState::NotSent, replayable: true };
            retry.decide(attempt, &Arc::default(), Instant::now(), &mut Dice::from_seed(1))
        };
        assert!(matches!(decide(&Retry::default(), 2), Decision::Again(_)));
        assert_eq!(decide(&Retry::default(), 3), Decision::Answer("attempts_used"));
        assert_eq!(decide(&compile(json!({"attempts": 0})).unwrap(), 1), Decision::Answer("attempts_used"));
    }

    #[test]
    fn an_empty_budget_returns_the_first_answer() {
        let budget = budget(json!({"percent": 0, "minRetriesPerSecond": 0})).unwrap();
        let now = Instant::now();
        budget.deposit(now);
        let attempt = Attempt { number: 1, method: &Method::GET, state: WireState::NotSent, replayable: true };
        let decision = Retry::default().decide(attempt, &budget, now, &mut Dice::from_seed(1));
        assert_eq!(decision, Decision::Answer("budget_empty"));
    }

    #[test]
    fn what_is_not_tried_again_costs_nothing() {
        let budget = budget(json!({"minRetriesPerSecond": 1, "interval": "1s"})).unwrap();
        let (now, mut dice) = (Instant::now(), Dice::from_seed(1));
        let attempt = Attempt { number: 1, method: &Method::POST, state: WireState::Sent, replayable: true };
        for _ in 0..5 {
            assert!(matches!(Retry::default().decide(attempt, &budget, now, &mut dice), Decision::Answer("request_sent")));
        }
        let attempt = Attempt { state: WireState::NotSent, ..attempt };
        assert!(matches!(Retry::default().decide(attempt, &budget, now, &mut dice), Decision::Again(_)));
        assert_eq!(Retry::default().decide(attempt, &budget, now, &mut dice), Decision::Answer("budget_empty"));
    }

    #[test]
    fn a_budget_is_a_share_of_requests_and_some_that_are_free() {
        let budget = budget(json!({"percent": 20, "interval": "10s", "minRetriesPerSecond": 1})).unwrap();
        let start = Instant::now();
        let taken = |now| std::iter::repeat_with(|| budget.withdraw(now)).take_while(|good| *good).count();
        (0..100).for_each(|_| budget.deposit(start));
        assert_eq!(taken(start), 30);
        assert_eq!(taken(start + 9 * S), 0);
        (0..50).for_each(|_| budget.deposit(start + 9 * S));
        assert_eq!(taken(start + 9 * S), 10);
        // The first requests and retries are forgotten together.
        assert_eq!(taken(start + 12 * S), 10);
        assert_eq!(taken(start + 100 * S), 10);
    }

    #[test]
    fn a_clock_that_another_thread_read_earlier_does_no_harm() {
        let budget = budget(json!({})).unwrap();
        let start = Instant::now();
        budget.deposit(start + 50 * S);
        budget.deposit(start);
        assert!(budget.withdraw(start));
    }

    #[test]
    fn an_unchanged_budget_is_carried_over() {
        let old = budget(json!({"percent": 5})).unwrap();
        let same = RetryBudget::new(old.limits).carried_from(&old);
        assert!(Arc::ptr_eq(&old, &same));
        assert!(!Arc::ptr_eq(&old, &RetryBudget::default().carried_from(&old)));
    }

    #[test]
    fn waits_grow_to_a_bound_and_differ() {
        let retry = compile(json!({"backoff": "100ms", "attempts": 10})).unwrap();
        let mut dice = Dice::from_seed(7);
        for (number, step) in [(1, 100), (2, 200), (3, 400), (4, 800), (5, 1000), (10, 1000), (u32::MAX, 1000)] {
            let waits: Vec<_> = (0..50).map(|_| retry.wait(number, &mut dice).as_millis()).collect();
            assert!(waits.iter().all(|wait| (step..=step * 3 / 2).contains(wait)), "{number}: {waits:?}");
            assert!(waits.iter().max() > waits.iter().min());
        }
        let none = compile(json!({"backoff": "0s"})).unwrap();
        assert_eq!(none.wait(1, &mut dice), Duration::ZERO);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for config in [
            json!({"codes": [200]}),
            json!({"codes": [600]}),
            json!({"codes": [0]}),
            json!({"attempts": 11}),
            json!({"backoff": "1h"}),
            json!({"perTryTimeout": "1s"}),
        ] {
            assert!(compile(config.clone()).is_err(), "{config}");
        }
        for config in [json!({"interval": "0s"}), json!({"interval": "2h"}), json!({"percent": 101})] {
            assert!(budget(config.clone()).is_err(), "{config}");
        }
        expect_test::expect!["HTTPRoute/shop/web: codes[1]: 200 is not the status of a failure; write 400 to 599"]
            .assert_eq(&compile(json!({"codes": [503, 200]})).unwrap_err());
    }

    proptest! {
        /// Over any history, retries are at most the share of the requests and what is free in each interval begun.
        #[test]
        fn retries_stay_in_the_budget(
            steps in proptest::collection::vec((0_u64..3_000, any::<bool>()), 1..300),
            percent in 0_u32..=100,
            free in 0_u32..3,
        ) {
            let budget = budget(json!({"percent": percent, "interval": "2s", "minRetriesPerSecond": free})).unwrap();
            let start = Instant::now();
            let (mut now, mut requests, mut retries) = (start, 0_u32, 0_u32);
            for (wait_ms, is_request) in steps {
                now += Duration::from_millis(wait_ms);
                if is_request {
                    budget.deposit(now);
                    requests += 1;
                } else if budget.withdraw(now) {
                    retries += 1;
                }
            }
            let intervals = f64::from(u32::try_from((now - start).as_millis() / 2_000).unwrap() + 1);
            // A request may be counted for in two intervals, as the window slides over it.
            let allowed = 2.0 * f64::from(percent) / 100.0 * f64::from(requests) + f64::from(free) * 2.0 * intervals;
            prop_assert!(f64::from(retries) <= allowed, "{} retries of {} requests", retries, requests);
        }

        /// No attempt that may have been processed is repeated for a method that is not idempotent.
        #[test]
        fn no_order_is_made_twice(code in 400_u16..600, attempts in 0_u32..=10, number in 1_u32..12, codes in proptest::collection::vec(400_u16..600, 0..20)) {
            let retry = compile(json!({"codes": codes, "attempts": attempts})).unwrap();
            for state in [WireState::Sent, answered(code)] {
                let attempt = Attempt { number, method: &Method::POST, state, replayable: true };
                let decision = retry.decide(attempt, &Arc::default(), Instant::now(), &mut Dice::from_seed(1));
                prop_assert!(matches!(decision, Decision::Answer(_)));
            }
        }
    }
}
