//! Reads the text that Prometheus reads, as far as a sidecar writes it.
//!
//! Sources: Prometheus text exposition format 0.0.4. The text comes from a pod: whatever it holds, reading it ends, stays
//! within its bound and skips what it does not understand.

use std::borrow::Cow;

/// One value of one series.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sample<'a> {
    pub(crate) name: &'a str,
    pub(crate) labels: Vec<(&'a str, Cow<'a, str>)>,
    pub(crate) value: f64,
}

impl Sample<'_> {
    /// The value of a label; empty where there is none, which is the same in Prometheus.
    pub(crate) fn label(&self, name: &str) -> &str {
        self.labels.iter().find(|(known, _)| *known == name).map_or("", |(_, value)| value)
    }
}

/// The samples of a text. Lines that are none, comments among them, are passed over.
pub(crate) fn samples(text: &str) -> impl Iterator<Item = Sample<'_>> {
    text.lines().take(LINES_MAX).filter_map(sample)
}

fn sample(line: &str) -> Option<Sample<'_>> {
    let line = line.trim();
    let end = line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':')).unwrap_or(line.len());
    let (name, rest) = line.split_at_checked(end)?;
    if name.is_empty() {
        return None;
    }
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (Vec::new(), rest),
    };
    // A timestamp may follow the value; when it was scraped is known better here.
    let value = rest.split_ascii_whitespace().next()?;
    let value = match value {
        "+Inf" => f64::INFINITY,
        "-Inf" => f64::NEG_INFINITY,
        other => other.parse().ok()?,
    };
    Some(Sample { name, labels, value })
}

type Labels<'a> = Vec<(&'a str, Cow<'a, str>)>;

/// The labels up to the closing brace, and what follows it.
fn labels(mut rest: &str) -> Option<(Labels<'_>, &str)> {
    let mut labels = Vec::new();
    loop {
        rest = rest.trim_start_matches([' ', ',']);
        if let Some(rest) = rest.strip_prefix('}') {
            return Some((labels, rest));
        }
        if labels.len() == LABELS_MAX {
            return None;
        }
        let (name, tail) = rest.split_once('=')?;
        let tail = tail.trim_start().strip_prefix('"')?;
        let end = closing_quote(tail)?;
        let (value, tail) = tail.split_at_checked(end)?;
        labels.push((name.trim(), unescape(value)));
        rest = tail.strip_prefix('"')?;
    }
}

/// Where the first quote stands that no backslash guards.
fn closing_quote(text: &str) -> Option<usize> {
    let mut guarded = false;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'"' if !guarded => return Some(at),
            b'\\' => guarded = !guarded,
            _ => guarded = false,
        }
    }
    None
}

fn unescape(text: &str) -> Cow<'_, str> {
    if !text.contains('\\') {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('n') => out.push('\n'),
                Some(other) => out.push(other),
                None => {}
            },
            other => out.push(other),
        }
    }
    Cow::Owned(out)
}

/// Lines that are read of one text.
const LINES_MAX: usize = 50_000;
/// Labels of one sample.
const LABELS_MAX: usize = 32;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_labels_escapes_and_values_are_read() {
        let text =
            "# HELP a b\n# TYPE a counter\na 1\nb_total{x=\"1\",y=\"q\\\"\\\\\\n}\",} 2.5 1700000000\nc{le=\"+Inf\"} +Inf\n";
        let read: Vec<_> = samples(text).collect();
        assert_eq!(read.len(), 3);
        assert_eq!((read[0].name, read[0].value), ("a", 1.0));
        assert_eq!((read[1].label("y"), read[1].label("z"), read[1].value), ("q\"\\\n}", "", 2.5));
        assert_eq!(read[2].value, f64::INFINITY);
    }

    #[test]
    fn what_a_sidecar_writes_is_read_back_in_full() {
        let text = crate::telemetry::metrics::tests::populated().metrics.render();
        let lines = text.lines().filter(|line| !line.starts_with('#')).count();
        assert_eq!(samples(&text).count(), lines);
    }

    #[test]
    fn a_line_that_is_no_sample_is_passed_over() {
        for bad in ["", "{", "a{", "a{x}", "a{x=\"", "a{x=\"1\"", "a{x=\"1\"}", "a b", "é 1", "a{x=\"\\\"} 1"] {
            assert_eq!(samples(bad).count(), 0, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_to_its_end(text in "\\PC{0,200}") {
            samples(&text).for_each(drop);
        }

        #[test]
        fn any_label_value_is_read_back(value in "[^\n]{0,40}") {
            let written = format!("a{{x=\"{}\"}} 1", value.replace('\\', "\\\\").replace('"', "\\\""));
            let read: Vec<_> = samples(&written).collect();
            prop_assert_eq!(read.len(), 1);
            prop_assert_eq!(read[0].label("x"), value);
        }
    }
}
