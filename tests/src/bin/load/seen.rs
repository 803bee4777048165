//! What a connection, or all of them, saw.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

#[derive(Default)]
pub(crate) struct Seen {
    statuses: BTreeMap<u16, u64>,
    /// By what went wrong.
    failures: BTreeMap<String, u64>,
    latencies: Histogram,
}

impl Seen {
    pub(crate) fn answer(&mut self, status: u16, took: Duration) {
        *self.statuses.entry(status).or_default() += 1;
        self.latencies.record(took);
    }

    pub(crate) fn failure(&mut self, what: String) {
        *self.failures.entry(what).or_default() += 1;
    }

    pub(crate) fn add(&mut self, other: Self) {
        other.statuses.into_iter().for_each(|(status, count)| *self.statuses.entry(status).or_default() += count);
        other.failures.into_iter().for_each(|(what, count)| *self.failures.entry(what).or_default() += count);
        self.latencies.add(&other.latencies);
    }

    /// All of it, with the rate of answers over this time.
    pub(crate) fn report(&self, time: Duration) -> Value {
        let requests: u64 = self.statuses.values().sum();
        json!({
            "requests": requests,
            "rps": requests as f64 / time.as_secs_f64(),
            "statuses": self.statuses,
            "failures": self.failures,
            "p50_us": self.latencies.quantile(0.50),
            "p99_us": self.latencies.quantile(0.99),
            "max_us": self.latencies.quantile(1.0),
        })
    }
}

/// Counts of microseconds in buckets that are at most 1/64 wide, as HDR histograms have them.
#[derive(Default)]
struct Histogram {
    buckets: BTreeMap<u32, u64>,
}

impl Histogram {
    fn record(&mut self, latency: Duration) {
        let micros = u32::try_from(latency.as_micros()).unwrap_or(u32::MAX);
        // Seven significant bits are kept: below 128 every microsecond has its bucket.
        let dropped = (32 - micros.leading_zeros()).saturating_sub(7);
        *self.buckets.entry(micros >> dropped << dropped).or_default() += 1;
    }

    fn add(&mut self, other: &Self) {
        other.buckets.iter().for_each(|(bucket, count)| *self.buckets.entry(*bucket).or_default() += count);
    }

    fn quantile(&self, share: f64) -> u32 {
        let total: u64 = self.buckets.values().sum();
        let mut left = total as f64 * share;
        for (bucket, count) in &self.buckets {
            left -= *count as f64;
            if left <= 0.0 {
                return *bucket;
            }
        }
        self.buckets.keys().next_back().copied().unwrap_or(0)
    }
}
