//! Fault injection: a drawn share of requests is delayed or aborted, so that callers can be seen to bear it.
//!
//! Sources: none; the shape is that of other meshes. Delay and abort are drawn apart, the delay comes first, and a request
//! that is aborted never reaches a backend.

use std::time::Duration;

use http::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RuleName;
use crate::base::problems::{FieldPath, Problems};
use crate::base::random::Dice;
use crate::base::units::{Percent, Span};

/// What a user writes: a delay, an abort, or both.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct FaultConfig {
    /// A share of requests waits before it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) delay: Option<DelayConfig>,
    /// A share of requests is answered here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) abort: Option<AbortConfig>,
}

/// A delay.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct DelayConfig {
    /// How long; at most `5m`.
    pub(crate) duration: Span,
    /// Share of requests.
    pub(crate) percent: Percent,
}

/// An abort.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct AbortConfig {
    /// The answer's status, 400 to 599.
    pub(crate) status: u16,
    /// Share of requests.
    pub(crate) percent: Percent,
}

/// The compiled fault.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) rule: RuleName,
    delay: Option<(Duration, Percent)>,
    abort: Option<(StatusCode, Percent)>,
}

/// What is done to one request: first the delay, then the abort.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Injection {
    pub(crate) delay: Option<Duration>,
    pub(crate) abort: Option<StatusCode>,
}

impl FaultConfig {
    /// Reports every fault under `at` and returns a policy only if there is none.
    pub(crate) fn compile(&self, rule: RuleName, at: &FieldPath, problems: &mut Problems) -> Option<Fault> {
        let mut good = true;
        let delay = self.delay.as_ref().map(|delay| (delay.duration.0, delay.percent));
        if let Some((duration, _)) = delay
            && (duration.is_zero() || duration > DELAY_MAX)
        {
            let text = format!("{} is no delay that a request is given", Span(duration));
            problems.refuse(&at.field("delay").field("duration"), text, "write 1ms to 5m");
            good = false;
        }
        let mut abort = None;
        if let Some(AbortConfig { status, percent }) = &self.abort {
            match StatusCode::from_u16(*status) {
                Ok(code) if (400..600).contains(status) => abort = Some((code, *percent)),
                Ok(_) | Err(_) => {
                    problems.refuse(
                        &at.field("abort").field("status"),
                        format!("{status} is not the status of a failure"),
                        "write 400 to 599",
                    );
                    good = false;
                }
            }
        }
        if self.delay.is_none() && self.abort.is_none() {
            problems.refuse(at, "the fault does nothing", "write delay, abort or both, or leave the fault out");
            good = false;
        }
        good.then_some(Fault { rule, delay, abort })
    }
}

impl Fault {
    /// Draws what is done to a request.
    pub(crate) fn draw(&self, dice: &mut Dice) -> Injection {
        // Both are drawn always, so that one seed gives one sequence whatever the shares are.
        let (for_delay, for_abort) = (dice.fraction(), dice.fraction());
        Injection {
            delay: self.delay.and_then(|(duration, share)| (for_delay < share.fraction()).then_some(duration)),
            abort: self.abort.and_then(|(status, share)| (for_abort < share.fraction()).then_some(status)),
        }
    }
}

/// Longer than any caller waits: more would only hold connections.
const DELAY_MAX: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn compile(config: serde_json::Value) -> Result<Fault, String> {
        let config: FaultConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
        let mut problems = Problems::of("TrafficPolicy/shop/web");
        let compiled = config.compile(RuleName::new("web"), &FieldPath::root(), &mut problems);
        assert_eq!(compiled.is_none(), problems.refused());
        compiled.ok_or_else(|| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    /// How many of 10,000 requests are delayed, and how many are aborted.
    fn check(config: serde_json::Value, delayed: std::ops::RangeInclusive<usize>, aborted: std::ops::RangeInclusive<usize>) {
        let (fault, mut dice) = (compile(config.clone()).unwrap(), Dice::from_seed(1));
        let drawn: Vec<_> = (0..10_000).map(|_| fault.draw(&mut dice)).collect();
        assert!(delayed.contains(&drawn.iter().filter(|one| one.delay.is_some()).count()), "{config}");
        assert!(aborted.contains(&drawn.iter().filter(|one| one.abort.is_some()).count()), "{config}");
    }

    #[test]
    fn the_share_that_is_written_is_drawn() {
        check(json!({"delay": {"duration": "1s", "percent": 100}}), 10_000..=10_000, 0..=0);
        check(json!({"abort": {"status": 503, "percent": 0}}), 0..=0, 0..=0);
        check(
            json!({"delay": {"duration": "1s", "percent": 20}, "abort": {"status": 503, "percent": 0.5}}),
            1_850..=2_150,
            20..=90,
        );
    }

    #[test]
    fn what_is_drawn_is_what_is_written() {
        let fault =
            compile(json!({"delay": {"duration": "1s", "percent": 100}, "abort": {"status": 418, "percent": 100}})).unwrap();
        let both = Injection { delay: Some(Duration::from_secs(1)), abort: Some(StatusCode::IM_A_TEAPOT) };
        assert_eq!(fault.draw(&mut Dice::from_seed(1)), both);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for config in [
            json!({}),
            json!({"delay": {"duration": "0s", "percent": 1}}),
            json!({"delay": {"duration": "1h", "percent": 1}}),
            json!({"abort": {"status": 200, "percent": 1}}),
            json!({"abort": {"status": 99, "percent": 1}}),
            json!({"abort": {"status": 503, "percent": 101}}),
            json!({"abort": {"status": 503}}),
        ] {
            assert!(compile(config.clone()).is_err(), "{config}");
        }
    }
}
