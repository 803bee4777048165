//! The table for people, 80 columns wide, and the same as data.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::samples::{Samples, Spread};
use super::targets::{self, Verdict, short};
use super::works::{METRICS, Work};

/// A column: its metric, its heading and its width.
struct Column {
    metric: &'static str,
    heading: &'static str,
    width: usize,
}

// What has no column stands in the data alone.
const COLUMNS: [Column; 10] = [
    Column { metric: "cpu_us_per_request", heading: "CPU us/req", width: 10 },
    Column { metric: "rps", heading: "req/s", width: 7 },
    Column { metric: "p50_us", heading: "p50 us", width: 7 },
    Column { metric: "p99_us", heading: "p99 us", width: 7 },
    Column { metric: "kib_per_idle_connection", heading: "KiB/conn", width: 9 },
    Column { metric: "rss_mib", heading: "RSS MiB", width: 8 },
    Column { metric: "ready_ms", heading: "ready ms", width: 8 },
    Column { metric: "stream_kib", heading: "recv KiB", width: 8 },
    Column { metric: "stream_bytes_per_change", heading: "B/change", width: 8 },
    Column { metric: "cpu_ms_per_change", heading: "ms/change", width: 9 },
];

/// Each work's candidates in the order of their turns.
pub(crate) type Rows<'a> = [(&'a Work, Vec<String>)];

/// The whole text.
pub(crate) fn text(rows: &Rows<'_>, samples: &Samples, verdicts: &[Verdict]) -> String {
    let mut text = String::new();
    for (work, candidates) in rows {
        section(&mut text, work, candidates, samples);
    }
    if !verdicts.is_empty() {
        text.push_str("\nTo reach:\n");
    }
    for verdict in verdicts {
        text.push_str(&verdict.line());
        text.push('\n');
    }
    for (work, candidate, why) in &samples.failed {
        // A string takes what is written to it.
        writeln!(text, "\nno result: {work}, {candidate}: {why}").ok();
    }
    text
}

fn section(text: &mut String, work: &Work, candidates: &[String], samples: &Samples) {
    let shown: Vec<&Column> = COLUMNS
        .iter()
        .filter(|column| candidates.iter().any(|who| !samples.rounds(work.name, who, column.metric).is_empty()))
        .collect();
    let Some(first) = shown.first() else { return };
    writeln!(text, "\n{}: {}", work.name, work.text).ok();
    write!(text, "  {:<10}", "").ok();
    for (at, column) in shown.iter().enumerate() {
        write!(text, " {:>width$}", column.heading, width = column.width).ok();
        if at == 0 {
            write!(text, " {:>13} {:>6}", "(min-max)", "o/it").ok();
        }
    }
    text.push('\n');
    for who in candidates {
        let spread = |column: &Column| samples.spread(work.name, who, column.metric);
        if shown.iter().all(|column| spread(column).is_none()) {
            continue;
        }
        write!(text, "  {who:<10.10}").ok();
        for (at, column) in shown.iter().enumerate() {
            let median = spread(column).map_or("-".to_owned(), |spread| short(spread.median));
            write!(text, " {median:>width$}", width = column.width).ok();
            if at == 0 {
                let extremes =
                    spread(first).map_or(String::new(), |Spread { min, max, .. }| format!("{}-{}", short(min), short(max)));
                let ratio = samples.ratio(work.name, who, first.metric).filter(|_| who != "outrigger");
                let ratio = ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
                write!(text, " {extremes:>13} {ratio:>6}").ok();
            }
        }
        text.push('\n');
    }
}

/// One object for each work, candidate and metric.
pub(crate) fn data(rows: &Rows<'_>, samples: &Samples, verdicts: &[Verdict]) -> Vec<Value> {
    let mut results = Vec::new();
    for (work, candidates) in rows {
        for who in candidates {
            for (metric, unit) in METRICS {
                let Some(Spread { min, median, max, rounds }) = samples.spread(work.name, who, metric) else { continue };
                let values: Vec<f64> = samples.rounds(work.name, who, metric).iter().map(|(_, value)| *value).collect();
                let mut result = json!({
                    "work": work.name, "candidate": who, "metric": metric, "unit": unit,
                    "min": min, "median": median, "max": max, "rounds": rounds, "values": values,
                    "outrigger_over_this": samples.ratio(work.name, who, metric),
                });
                let judged = verdicts.iter().filter(|verdict| verdict.work == work.name && verdict.metric == metric);
                let judged: Vec<Value> = judged.filter(|_| who == "outrigger").map(Verdict::value).collect();
                if let Some(fields) = result.as_object_mut().filter(|_| !judged.is_empty()) {
                    fields.insert("targets".to_owned(), judged.into());
                }
                results.push(result);
            }
        }
    }
    results
}

/// The verdicts on the samples.
pub(crate) fn verdicts(samples: &Samples) -> Vec<Verdict> {
    targets::judge(samples)
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::super::works::WORKS;
    use super::*;

    #[test]
    fn the_table_fits_a_terminal_whatever_was_measured() {
        let mut list = Vec::new();
        for work in WORKS {
            for (metric, _) in METRICS {
                let traffic = ["cpu_us_per_request", "rps", "p50_us", "p99_us", "rss_mib"].contains(&metric);
                let scale = ["ready_ms", "run_ms", "rss_mib", "stream_kib", "stream_bytes_per_change", "cpu_ms_per_change"]
                    .contains(&metric);
                let idle = ["rss_mib", "kib_per_idle_connection"].contains(&metric);
                if match work.name {
                    name if name.starts_with("idle") => idle,
                    name if name.starts_with("config") => scale,
                    _ => traffic,
                } {
                    list.push((work.name, "outrigger", metric, [12_345.6, 99_999.9, 1_000.0].as_slice()));
                    list.push((work.name, "haproxy", metric, [12_345.6].as_slice()));
                }
            }
        }
        let samples = samples::of(&list);
        let rows: Vec<(&Work, Vec<String>)> =
            WORKS.iter().map(|work| (work, vec!["haproxy".to_owned(), "outrigger".to_owned()])).collect();
        let text = text(&rows, &samples, &verdicts(&samples));
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{} columns: {line}", line.chars().count());
        }
        assert_eq!(data(&rows, &samples, &[]).len(), list.len());
    }
}
