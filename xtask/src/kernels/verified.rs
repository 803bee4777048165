//! How many instructions the verifier goes through per program and kernel: recorded, so that a test can hold the programs
//! to it. Close to a million a kernel refuses a program; what grows there unseen breaks on somebody else's kernel first.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};

/// By program.
pub(super) type Counts = BTreeMap<String, u64>;

/// What is recorded, by series of kernels (`6.1`).
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct Record(BTreeMap<Series, Counts>);

/// A kernel's major and minor number.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Series(u32, u32);

/// Where it is recorded.
pub(super) const RECORD: &str = "ebpf/verified.toml";
const HEAD: &str = "\
# How many instructions the verifier goes through, by kernel and program. A test fails where a program takes more than a
# twentieth more. `cargo xtask kernels --bless` writes this file.
";

impl Record {
    /// What is recorded; nothing where there is no file.
    pub(super) fn read(root: &Path) -> Result<Self> {
        match std::fs::read_to_string(root.join(RECORD)) {
            Ok(text) => Self::parse(&text).with_context(|| format!("cannot read {RECORD}")),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("cannot read {RECORD}")),
        }
    }

    pub(super) fn write(&self, root: &Path) -> Result<()> {
        std::fs::write(root.join(RECORD), self.text()).with_context(|| format!("cannot write {RECORD}"))
    }

    /// Records the counts of a kernel in the place of what stood for its series.
    pub(super) fn set(&mut self, release: &str, counts: Counts) -> Result<()> {
        self.0.insert(Series::of(release).with_context(|| format!("{release} is no kernel's release"))?, counts);
        Ok(())
    }

    fn parse(text: &str) -> Result<Self> {
        let record: BTreeMap<String, Counts> = toml::from_str(text)?;
        let series = |name: &str| Series::of(name).with_context(|| format!("{name} is no kernel's release"));
        record.into_iter().map(|(name, counts)| Ok((series(&name)?, counts))).collect::<Result<_>>().map(Self)
    }

    fn text(&self) -> String {
        let mut text = HEAD.to_owned();
        for (Series(major, minor), counts) in &self.0 {
            text.push_str(&format!("\n[\"{major}.{minor}\"]\n"));
            for (program, count) in counts {
                text.push_str(&format!("{program} = {count}\n"));
            }
        }
        text
    }
}

impl Series {
    /// Of a release as `uname -r` tells it.
    pub(super) fn of(release: &str) -> Option<Self> {
        let mut numbers = release.split(|sign: char| !sign.is_ascii_digit());
        Some(Self(numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }
}

impl std::fmt::Display for Series {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// The counts that the runner told: `verified PROGRAM COUNT`.
pub(super) fn told(output: &str) -> Counts {
    let words = output.lines().filter_map(|line| line.strip_prefix("verified ")?.split_once(' '));
    words.filter_map(|(program, count)| Some((program.to_owned(), count.trim().parse().ok()?))).collect()
}

/// One line per program, one column per kernel.
pub(super) fn table(columns: &[(String, &Counts)]) -> String {
    let programs: std::collections::BTreeSet<&String> = columns.iter().flat_map(|(_, counts)| counts.keys()).collect();
    let mut text = format!("{:<24}", "verified instructions");
    for (kernel, _) in columns {
        text.push_str(&format!(" {kernel:>8}"));
    }
    for program in programs {
        text.push_str(&format!("\n{program:<24}"));
        for (_, counts) in columns {
            let count = counts.get(program).map_or("-".to_owned(), u64::to_string);
            text.push_str(&format!(" {count:>8}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_is_read_as_it_was_written_with_the_series_in_their_order() {
        let mut record = Record::default();
        record.set("6.12.9+deb12-cloud-amd64", [("or_b".to_owned(), 2), ("or_a".to_owned(), 1)].into()).unwrap();
        record.set("6.1.0-40", [("or_a".to_owned(), 3)].into()).unwrap();
        assert_eq!(record.text(), format!("{HEAD}\n[\"6.1\"]\nor_a = 3\n\n[\"6.12\"]\nor_a = 1\nor_b = 2\n"));
        assert_eq!(Record::parse(&record.text()).unwrap(), record);
        assert!(record.set("?", Counts::new()).is_err());
    }

    #[test]
    fn counts_are_taken_from_what_the_runner_tells() {
        let counts = told("test a ... ok\nverified or_a 12\r\nverified or_b x\nverified\n");
        assert_eq!(counts, [("or_a".to_owned(), 12)].into());
    }
}
