//! Quantities that exist only if valid: durations as people write them, percentages.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A duration as Gateway API writes it (GEP-2257): up to four groups of digits with `h`, `m`, `s` or `ms`, as in `1h30m`
/// or `250ms`. No sign, no fraction.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct Span(pub(crate) Duration);

/// Why a text is not a [`Span`].
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0:?} is not a duration; write it as \"250ms\", \"10s\" or \"1h30m\"")]
pub(crate) struct SpanError(String);

impl FromStr for Span {
    type Err = SpanError;

    fn from_str(text: &str) -> Result<Self, SpanError> {
        let fail = || SpanError(text.to_owned());
        let mut rest = text;
        let mut total = Duration::ZERO;
        let mut groups = 0;
        while !rest.is_empty() {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let (number, tail) = rest.split_at_checked(digits).ok_or_else(fail)?;
            if digits == 0 || digits > 5 || groups == 4 {
                return Err(fail());
            }
            let number: u64 = number.parse().map_err(|_not_a_number| fail())?;
            let (unit_ms, tail) = if let Some(tail) = tail.strip_prefix("ms") {
                (1, tail)
            } else if let Some(tail) = tail.strip_prefix('s') {
                (1_000, tail)
            } else if let Some(tail) = tail.strip_prefix('m') {
                (60_000, tail)
            } else if let Some(tail) = tail.strip_prefix('h') {
                (3_600_000, tail)
            } else {
                return Err(fail());
            };
            total += Duration::from_millis(number * unit_ms);
            rest = tail;
            groups += 1;
        }
        if groups == 0 { Err(fail()) } else { Ok(Self(total)) }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        if ms == 0 {
            return f.write_str("0s");
        }
        let (h, m, s, ms) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1_000 % 60, ms % 1_000);
        for (n, unit) in [(h, "h"), (m, "m"), (s, "s"), (ms, "ms")] {
            if n > 0 {
                write!(f, "{n}{unit}")?;
            }
        }
        Ok(())
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Span {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$" })
    }
}

/// A share between 0 and 100, whole or with a fraction.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub(crate) struct Percent(f64);

impl Percent {
    /// Nothing.
    pub(crate) const NONE: Self = Self(0.0);
    /// 1 %.
    pub(crate) const ONE_OF_A_HUNDRED: Self = Self(1.0);
    /// Everything.
    pub(crate) const ALL: Self = Self(100.0);

    /// `None` outside 0 to 100.
    pub(crate) fn new(value: f64) -> Option<Self> {
        (0.0..=100.0).contains(&value).then_some(Self(value))
    }

    /// The share as a number between 0 and 1.
    pub(crate) fn fraction(self) -> f64 {
        self.0 / 100.0
    }
}

// A percentage is never NaN, so equality is an equivalence.
impl Eq for Percent {}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = f64::deserialize(deserializer)?;
        Self::new(value)
            .ok_or_else(|| serde::de::Error::custom(format!("{value} is not a percentage; write a number from 0 to 100")))
    }
}

impl JsonSchema for Percent {
    fn schema_name() -> Cow<'static, str> {
        "Percent".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "number", "minimum": 0, "maximum": 100 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_and_written_as_gateway_api_does() {
        for (text, ms) in [("250ms", 250), ("10s", 10_000), ("1h30m", 5_400_000), ("0s", 0), ("1s500ms", 1_500)] {
            let span: Span = text.parse().unwrap();
            assert_eq!(span.0, Duration::from_millis(ms), "{text}");
            assert_eq!(span.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_duration_is_refused() {
        for text in ["", "10", "s", "-1s", "1.5s", "123456s", "1d", "1s1s1s1s1s", "1 s"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_percentage_lies_between_0_and_100() {
        assert!(Percent::new(-0.1).is_none() && Percent::new(100.1).is_none() && Percent::new(f64::NAN).is_none());
        assert_eq!(Percent::new(50.0).map(Percent::fraction), Some(0.5));
    }
}
