//! How many threads carry traffic.

use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;
use std::thread::available_parallelism;

/// As it is asked for: a number, or as many as the process may use processors at once.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Workers {
    Auto,
    Just(NonZeroUsize),
}

/// What is neither.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no number of workers; write a number from 1 to {WORKERS_MAX}, or `auto`")]
pub(crate) struct NoWorkers(String);

impl Workers {
    /// How many that is here. The standard library reads the affinity and the quota of the cgroup, version 1 and 2, and
    /// rounds down: a worker more than the quota has room for would be stopped in the middle of requests.
    pub(crate) fn count(self) -> usize {
        match self {
            Self::Just(count) => count.get(),
            Self::Auto => available_parallelism().map_or(1, NonZeroUsize::get).min(WORKERS_MAX),
        }
    }
}

impl FromStr for Workers {
    type Err = NoWorkers;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == AUTO {
            return Ok(Self::Auto);
        }
        let count = text.parse().ok().filter(|count: &NonZeroUsize| count.get() <= WORKERS_MAX);
        count.map(Self::Just).ok_or_else(|| NoWorkers(text.to_owned()))
    }
}

impl fmt::Display for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str(AUTO),
            Self::Just(count) => count.fmt(f),
        }
    }
}

const AUTO: &str = "auto";
/// Beyond it, workers are in each other's way.
const WORKERS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_a_number_or_auto() {
        for text in ["1", "64", "auto"] {
            let workers: Workers = text.parse().unwrap();
            assert_eq!(workers.to_string(), text);
            assert!((1..=WORKERS_MAX).contains(&workers.count()));
        }
        for text in ["0", "65", "", "-1", "all", "1.5"] {
            let error = text.parse::<Workers>().unwrap_err().to_string();
            assert!(error.contains("`auto`"), "{error}");
        }
    }
}
