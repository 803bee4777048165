//! What the turns brought: a value for each work, candidate, metric and round.

use std::collections::BTreeMap;

use anyhow::Result;

use super::bed::Turn;

#[derive(Default)]
pub(crate) struct Samples {
    values: BTreeMap<Key, Vec<(usize, f64)>>,
    /// Turns that came to nothing: work, candidate and why.
    pub(crate) failed: Vec<(String, String, String)>,
}

/// Work, candidate, metric.
type Key = (String, String, &'static str);

/// A metric over the rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) max: f64,
    pub(crate) rounds: usize,
}

impl Samples {
    pub(crate) fn add(&mut self, work: &str, candidate: &str, round: usize, turn: Turn) {
        for (metric, value) in turn {
            self.values.entry((work.to_owned(), candidate.to_owned(), metric)).or_default().push((round, value));
        }
    }

    /// Takes what became of a turn.
    pub(crate) fn note(&mut self, work: &str, candidate: &str, round: usize, turn: Result<Turn>) {
        match turn {
            Ok(turn) => self.add(work, candidate, round, turn),
            Err(error) => self.failed.push((work.to_owned(), candidate.to_owned(), format!("{error:#}"))),
        }
    }

    pub(crate) fn rounds(&self, work: &str, candidate: &str, metric: &'static str) -> &[(usize, f64)] {
        self.values.get(&(work.to_owned(), candidate.to_owned(), metric)).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn spread(&self, work: &str, candidate: &str, metric: &'static str) -> Option<Spread> {
        let mut values: Vec<f64> = self.rounds(work, candidate, metric).iter().map(|(_, value)| *value).collect();
        values.sort_by(f64::total_cmp);
        let (min, median, max) = (*values.first()?, *values.get(values.len() / 2)?, *values.last()?);
        Some(Spread { min, median, max, rounds: values.len() })
    }

    /// Outrigger's median over another candidate's.
    pub(crate) fn ratio(&self, work: &str, candidate: &str, metric: &'static str) -> Option<f64> {
        let theirs = self.spread(work, candidate, metric)?.median;
        let ours = self.spread(work, "outrigger", metric)?.median;
        (theirs > 0.0).then_some(ours / theirs)
    }

    /// In how many of the rounds that both had was Outrigger's value below the other's?
    pub(crate) fn below(&self, work: &str, candidate: &str, metric: &'static str) -> (usize, usize) {
        let theirs: BTreeMap<usize, f64> = self.rounds(work, candidate, metric).iter().copied().collect();
        let ours = self.rounds(work, "outrigger", metric).iter();
        let both = ours.filter_map(|(round, ours)| Some((*ours, *theirs.get(round)?)));
        both.fold((0, 0), |(below, all), (ours, theirs)| (below + usize::from(ours < theirs), all + 1))
    }
}

#[cfg(test)]
pub(crate) fn of(list: &[(&str, &str, &'static str, &[f64])]) -> Samples {
    let mut samples = Samples::default();
    for (work, candidate, metric, values) in list {
        values.iter().enumerate().for_each(|(round, value)| samples.add(work, candidate, round, vec![(metric, *value)]));
    }
    samples
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_least_median_and_most() {
        let samples = of(&[("w", "outrigger", "rps", &[9.0, 1.0, 2.0]), ("w", "envoy", "rps", &[4.0])]);
        let spread = Spread { min: 1.0, median: 2.0, max: 9.0, rounds: 3 };
        assert_eq!(samples.spread("w", "outrigger", "rps"), Some(spread));
        assert_eq!(samples.spread("w", "nginx", "rps"), None);
        assert_eq!(samples.ratio("w", "envoy", "rps"), Some(0.5));
    }

    #[test]
    fn only_rounds_that_both_had_are_compared() {
        let samples = of(&[("w", "outrigger", "p99_us", &[1.0, 5.0, 1.0]), ("w", "envoy", "p99_us", &[2.0, 4.0])]);
        assert_eq!(samples.below("w", "envoy", "p99_us"), (1, 2));
    }
}
