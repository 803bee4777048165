//! Timeouts and deadlines.
//!
//! Sources: Gateway API GEP-1742 (HTTPRouteTimeouts; `0s` switches a timeout off); gRPC over HTTP/2, `grpc-timeout`.
//! A caller can shorten a rule's limit, never lengthen it.

use std::time::Duration;

use http::{HeaderMap, HeaderName};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::base::problems::{FieldPath, Problems};
use crate::base::units::Span;

/// What a user writes (Gateway API HTTPRouteTimeouts).
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct TimeoutsConfig {
    /// From the request to its answer, all attempts together; `0s` or absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) request: Option<Span>,
    /// One attempt at one endpoint, at most `request`; `0s` or absent: no limit of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) backend_request: Option<Span>,
}

/// Compiled timeouts of a rule.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Timeouts {
    /// From the whole request header to the whole response header, all attempts together.
    pub(crate) request: Option<Duration>,
    /// One attempt.
    pub(crate) attempt: Option<Duration>,
}

impl TimeoutsConfig {
    /// Reports every fault under `at` and returns timeouts only if there is none.
    pub(crate) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<Timeouts> {
        let limit = |span: Option<Span>| span.map(|span| span.0).filter(|limit| !limit.is_zero());
        let (request, attempt) = (limit(self.request), limit(self.backend_request));
        if let (Some(request), Some(attempt)) = (request, attempt)
            && attempt > request
        {
            problems.refuse(
                &at.field("backendRequest"),
                format!("one attempt may take {}, which is longer than all of them together", Span(attempt)),
                format!("write at most {}", Span(request)),
            );
            return None;
        }
        Some(Timeouts { request, attempt })
    }
}

impl Timeouts {
    /// The moment at which the request must be answered: the rule's limit, cut by what the caller says it will wait
    /// (`grpc-timeout`). No headers: none of them says so.
    pub(crate) fn deadline(&self, headers: Option<&HeaderMap>, now: Instant) -> Option<Instant> {
        let asked = headers.and_then(|headers| headers.get(&GRPC_TIMEOUT)).and_then(|value| grpc_timeout(value.as_bytes()));
        // A time past what the clock can tell is no limit.
        [self.request, asked].into_iter().flatten().filter_map(|limit| now.checked_add(limit)).min()
    }
}

/// Reads a `grpc-timeout`: 1 to 8 digits and a unit (`H M S m u n`). `None` for anything else.
pub(crate) fn grpc_timeout(text: &[u8]) -> Option<Duration> {
    let (unit, digits) = text.split_last()?;
    if !(1..=8).contains(&digits.len()) || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let amount = digits.iter().fold(0_u64, |amount, digit| amount * 10 + u64::from(digit - b'0'));
    match unit {
        b'H' => Some(Duration::from_secs(amount * 3600)),
        b'M' => Some(Duration::from_secs(amount * 60)),
        b'S' => Some(Duration::from_secs(amount)),
        b'm' => Some(Duration::from_millis(amount)),
        b'u' => Some(Duration::from_micros(amount)),
        b'n' => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const S: Duration = Duration::from_secs(1);

    fn compile(request: Option<&str>, attempt: Option<&str>) -> Result<Timeouts, String> {
        let read = |text: Option<&str>| text.map(|text| text.parse().unwrap());
        let config = TimeoutsConfig { request: read(request), backend_request: read(attempt) };
        let mut problems = Problems::of("HTTPRoute/shop/web");
        let compiled = config.compile(&FieldPath::root(), &mut problems);
        compiled.ok_or_else(|| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    /// When a request must be answered, from now.
    fn check(request: Option<&str>, asked: Option<&str>, expected: Option<Duration>) {
        let mut headers = HeaderMap::new();
        if let Some(asked) = asked {
            headers.insert(GRPC_TIMEOUT, asked.parse().unwrap());
        }
        let now = Instant::now();
        let deadline = compile(request, None).unwrap().deadline(Some(&headers), now);
        assert_eq!(deadline.map(|at| at - now), expected, "{request:?} {asked:?}");
    }

    #[test]
    fn the_shorter_of_rule_and_caller_counts() {
        check(None, None, None);
        check(Some("2s"), None, Some(2 * S));
        check(None, Some("3S"), Some(3 * S));
        check(Some("2s"), Some("3S"), Some(2 * S));
        check(Some("2s"), Some("1000m"), Some(S));
        check(Some("2s"), Some("0n"), Some(Duration::ZERO));
    }

    #[test]
    fn zero_switches_a_timeout_off() {
        check(Some("0s"), None, None);
        check(Some("0s"), Some("1S"), Some(S));
        assert_eq!(compile(Some("0s"), Some("5s")).unwrap().attempt, Some(5 * S));
        assert_eq!(compile(Some("5s"), Some("0s")).unwrap().attempt, None);
    }

    #[test]
    fn what_is_no_grpc_timeout_counts_for_nothing() {
        for text in ["", "S", "1", "1s", "-1S", "1.5S", "123456789S", "1 S", "S1", "+1S"] {
            assert_eq!(grpc_timeout(text.as_bytes()), None, "{text}");
            check(Some("2s"), Some(text), Some(2 * S));
        }
    }

    #[test]
    fn every_unit_is_read() {
        for (text, expected) in [
            ("1H", 3600 * S),
            ("2M", 120 * S),
            ("00000003S", 3 * S),
            ("4m", Duration::from_millis(4)),
            ("5u", Duration::from_micros(5)),
            ("6n", Duration::from_nanos(6)),
            ("99999999H", Duration::from_secs(99_999_999 * 3600)),
        ] {
            assert_eq!(grpc_timeout(text.as_bytes()), Some(expected), "{text}");
        }
    }

    #[test]
    fn one_attempt_is_not_longer_than_all() {
        expect_test::expect!["HTTPRoute/shop/web: backendRequest: one attempt may take 2s, which is longer than all of them together; write at most 1s"].assert_eq(&compile(Some("1s"), Some("2s")).unwrap_err());
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_asked(bytes in proptest::collection::vec(any::<u8>(), 0..12)) {
            if let Some(timeout) = grpc_timeout(&bytes) {
                let deadline = Instant::now().checked_add(timeout);
                prop_assert!(deadline.is_some() || timeout > 1_000_000 * S);
            }
        }
    }
}
