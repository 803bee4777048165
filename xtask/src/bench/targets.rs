//! What the measurements shall reach, as data, and whether they did.
//!
//! A ratio to a peer holds within one run alone, so a missed one is told and ends nothing; the limits that end a command
//! with exit code 1 stand in `limits.rs`.

use super::samples::Samples;
use serde_json::{Value, json};

/// One thing to reach.
struct Target {
    work: &'static str,
    metric: &'static str,
    rank: Rank,
    bound: Bound,
}

#[derive(Clone, Copy)]
enum Rank {
    Must,
    Aim,
}

/// Of Outrigger's median, where nothing else is said.
#[derive(Clone, Copy)]
enum Bound {
    AtMost(f64),
    /// So many times the median of a peer.
    Times(f64, &'static str),
    /// Below a peer's value in this share of the rounds.
    Below(f64, &'static str),
    /// No more than a tenth above what it is in another work.
    As(&'static str),
}

use Bound::{As, AtMost, Below, Times};
use Rank::{Aim, Must};

const CPU: &str = "cpu_us_per_request";

const TARGETS: &[Target] = &[
    target("hop-h1-64", CPU, Must, Times(1.35, "nginx")),
    target("hop-h1-64", CPU, Aim, Times(1.1, "nginx")),
    target("pair-h1-64", CPU, Must, Times(0.42, "envoy")),
    target("pair-h1-64", CPU, Must, Times(1.3, "haproxy")),
    target("pair-h1-64", CPU, Aim, Times(1.0, "haproxy")),
    target("pair-h1-1", CPU, Must, Times(0.33, "envoy")),
    target("pair-h1-1", CPU, Must, Times(1.0, "haproxy")),
    target("pair-h1-1", CPU, Aim, Times(0.2, "envoy")),
    target("pair-grpc", CPU, Must, Times(0.42, "envoy")),
    target("pair-grpc", CPU, Must, Times(1.3, "haproxy")),
    target("pair-grpc", CPU, Aim, Times(1.0, "haproxy")),
    target("pair-h1-2000rps", "p50_us", Must, Times(0.6, "envoy")),
    target("pair-h1-2000rps", "p50_us", Aim, Times(0.4, "envoy")),
    target("pair-h1-2000rps", "p99_us", Must, Below(0.8, "envoy")),
    target("tls-connect", CPU, Must, Times(0.85, "envoy")),
    target("tls-connect", CPU, Aim, Times(0.7, "envoy")),
    target("idle", "rss_mib", Must, AtMost(12.0)),
    target("idle", "rss_mib", Aim, AtMost(8.0)),
    target("idle-1000", "kib_per_idle_connection", Must, AtMost(6.0)),
    target("idle-1000", "kib_per_idle_connection", Aim, AtMost(3.0)),
    target("idle-10000", "kib_per_idle_connection", Must, AtMost(6.0)),
    target("idle-10000", "kib_per_idle_connection", Aim, AtMost(3.0)),
    target("first-answer", "ready_ms", Must, AtMost(30.0)),
    target("first-answer", "ready_ms", Aim, AtMost(10.0)),
    target("config-10000", "rss_mib", Must, AtMost(15.0)),
    target("config-10000", "rss_mib", Aim, As("config-10")),
    target("config-10000", "ready_ms", Must, AtMost(100.0)),
    target("config-10000", "ready_ms", Aim, As("config-10")),
    // What keeps the stream alive is less than this over a change; a resource is more.
    target("config-10000", "stream_bytes_per_change", Must, AtMost(16.0)),
    target("config-10000", "stream_kib", Aim, As("config-10")),
];

const fn target(work: &'static str, metric: &'static str, rank: Rank, bound: Bound) -> Target {
    Target { work, metric, rank, bound }
}

/// What became of a target in this run.
pub(crate) struct Verdict {
    pub(crate) work: &'static str,
    pub(crate) metric: &'static str,
    rank: &'static str,
    bound: String,
    value: String,
    pub(crate) met: bool,
}

/// The verdicts on what was measured; a target whose peer had no turn has none.
pub(crate) fn judge(samples: &Samples) -> Vec<Verdict> {
    TARGETS.iter().filter_map(|target| target.judge(samples)).collect()
}

impl Target {
    fn judge(&self, samples: &Samples) -> Option<Verdict> {
        let Self { work, metric, rank, bound } = *self;
        let median = samples.spread(work, "outrigger", metric)?.median;
        let (bound, value, met) = match bound {
            AtMost(most) => (format!("<= {most}"), short(median), median <= most),
            Times(most, peer) => {
                let ratio = samples.ratio(work, peer, metric)?;
                (format!("<= {most} x {peer}"), format!("{ratio:.2}"), ratio <= most)
            }
            Below(share, peer) => {
                let (below, all) = samples.below(work, peer, metric);
                if all == 0 {
                    return None;
                }
                let met = below as f64 >= share * all as f64;
                (format!("< {peer} in {:.0} %", share * 100.0), format!("{below} of {all}"), met)
            }
            As(other) => {
                let there = samples.spread(other, "outrigger", metric)?.median;
                let ratio = if there > 0.0 { format!("{:.2}", median / there) } else { short(median) };
                (format!("as {other}"), ratio, median <= there * 1.1)
            }
        };
        let rank = match rank {
            Must => "must",
            Aim => "aim",
        };
        Some(Verdict { work, metric, rank, bound, value, met })
    }
}

impl Verdict {
    /// A line of at most 80 columns.
    pub(crate) fn line(&self) -> String {
        let Self { work, metric, rank, bound, value, met } = self;
        let met = if *met { "met" } else { "missed" };
        format!("{work:<15} {metric:<23} {rank:<4} {bound:<17} {value:>8} {met}")
    }

    pub(crate) fn value(&self) -> Value {
        let Self { work: _, metric: _, rank, bound, value, met } = self;
        json!({ "rank": rank, "bound": bound, "value": value, "met": met })
    }
}

/// A number with as many places as it deserves.
pub(crate) fn short(number: f64) -> String {
    let places = if number.abs() >= 1000.0 || number == 0.0 {
        0
    } else if number.abs() >= 10.0 {
        1
    } else {
        2
    };
    format!("{number:.places$}")
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::super::works::{METRICS, WORKS};
    use super::*;

    #[test]
    fn a_target_is_met_or_missed_and_without_its_peer_neither() {
        let samples = samples::of(&[
            ("pair-h1-64", "outrigger", CPU, &[30.0, 31.0, 29.0]),
            ("pair-h1-64", "envoy", CPU, &[60.0, 100.0, 90.0]),
            ("pair-h1-2000rps", "outrigger", "p99_us", &[1.0, 1.0, 1.0, 1.0, 9.0]),
            ("pair-h1-2000rps", "envoy", "p99_us", &[2.0; 5]),
            ("idle", "outrigger", "rss_mib", &[9.0]),
        ]);
        let lines: Vec<String> = judge(&samples).iter().map(Verdict::line).collect();
        let [times, below, must, aim] = lines.as_slice() else { panic!("{lines:?}") };
        assert!(times.contains("0.33 met") && times.contains("<= 0.42 x envoy"), "{times}");
        assert!(below.ends_with("4 of 5 met"), "{below}");
        assert!(must.ends_with("9.00 met") && aim.ends_with("9.00 missed"), "{must}\n{aim}");
    }

    #[test]
    fn targets_name_works_and_metrics_that_there_are() {
        for Target { work, metric, .. } in TARGETS {
            assert!(WORKS.iter().any(|known| known.is_called(work)), "{work}");
            assert!(METRICS.iter().any(|(known, _)| known == metric), "{metric}");
        }
    }

    #[test]
    fn a_verdict_fits_a_terminal() {
        let samples = samples::of(&[
            ("idle-10000", "outrigger", "kib_per_idle_connection", &[123.45]),
            ("config-10000", "outrigger", "stream_bytes_per_change", &[12345.0]),
            ("config-10000", "outrigger", "ready_ms", &[12345.0]),
            ("config-10", "outrigger", "ready_ms", &[12345.0]),
        ]);
        for verdict in judge(&samples) {
            assert!(verdict.line().chars().count() <= 80, "{}", verdict.line());
        }
    }
}
