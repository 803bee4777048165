//! `cargo xtask test`: every test that this machine can run, what it left out and why, and how long each part took.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::{Stop, ebpf, kernels, kube, setup, shell, tidy};

/// The groups of end-to-end cases that run on the second rung of capture too, whenever everything does: those in which
/// traffic of many kinds goes through. `cargo xtask e2e --capture nftables` runs all of them there.
const ON_NFTABLES: [&str; 5] = ["capture::", "third_party::", "fidelity::", "policies::", "hold::"];

/// Counts of a test runner's closing lines.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    ignored: u64,
}

/// One part of the run.
struct Part {
    name: &'static str,
    took: Duration,
    counts: Counts,
    /// Why it did not run, or did not run whole.
    left_out: Option<String>,
}

/// What it means that a part could not run on this machine.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum LeftOut {
    /// It is named, with the reason.
    IsNamed,
    /// It is named and fails the run: where everything can be installed, nothing is left out by right.
    Fails,
}

/// Runs everything. Every part runs even if one before it failed.
pub(crate) fn run(root: &Path, long: bool, left_out: LeftOut) -> Result<()> {
    let parts = [
        part("tidy", || check(|| tidy::run(root))),
        part("unit", || unit(root)),
        part("kernel programs", || check(|| ebpf::run(root, true))),
        part("other kernels", || kernels::part(root)),
        part("end to end", || cases(root, long, "ebpf", &["--without=cluster".to_owned()])),
        part("on nftables", || cases(root, long, "nftables", &ON_NFTABLES.map(str::to_owned))),
        part("on Kubernetes", || cases(root, long, "ebpf", &["cluster::".to_owned()])),
    ];
    println!();
    println!("{:<17} {:>8} {:>7} {:>7}", "part", "minutes", "passed", "failed");
    let mut total = Counts::default();
    for part in &parts {
        let Part { name, took, counts, left_out: _ } = part;
        println!("{name:<17} {:>8.1} {:>7} {:>7}", took.as_secs_f64() / 60.0, counts.passed, counts.failed);
        total.passed += counts.passed;
        total.failed += counts.failed;
        total.ignored += counts.ignored;
    }
    for part in &parts {
        if let Some(reason) = &part.left_out {
            println!("left out: {}: {reason}", part.name);
            total.failed += u64::from(left_out == LeftOut::Fails);
        }
    }
    println!();
    println!("{} passed, {} failed", total.passed, total.failed);
    if total.failed > 0 { Err(Stop::No("tests failed".to_owned()).into()) } else { Ok(()) }
}

/// The end-to-end cases alone.
pub(crate) fn end_to_end(root: &Path, long: bool, capture: &str, filter: &[String]) -> Result<()> {
    let (counts, left_out) = cases(root, long, capture, filter)?;
    if let Some(reason) = left_out {
        return Err(Stop::Missing(reason).into());
    }
    if counts.failed > 0 { Err(Stop::No(format!("{} cases failed", counts.failed)).into()) } else { Ok(()) }
}

fn part(name: &'static str, work: impl FnOnce() -> Result<(Counts, Option<String>)>) -> Part {
    shell::say(name);
    let start = Instant::now();
    let (counts, left_out) = work().unwrap_or_else(|error| match error.downcast_ref() {
        Some(Stop::Missing(reason)) => (Counts::default(), Some(reason.clone())),
        Some(Stop::No(_) | Stop::Usage(_)) | None => {
            eprintln!("error: {error:#}");
            (Counts { failed: 1, ..Counts::default() }, None)
        }
    });
    Part { name, took: start.elapsed(), counts, left_out }
}

/// A part that is one check.
fn check(work: impl FnOnce() -> Result<()>) -> Result<(Counts, Option<String>)> {
    work().map(|()| (Counts { passed: 1, ..Counts::default() }, None))
}

fn unit(root: &Path) -> Result<(Counts, Option<String>)> {
    if shell::is_root() {
        // The tests of the rulesets run nft; those who are not root run none of them.
        setup::run(root, setup::Need::Mesh)?;
    }
    let mut command = shell::cargo(root, &["test", "--locked"]);
    command.args(setup::SELECTION);
    watched(command)
}

fn cases(root: &Path, long: bool, capture: &str, filter: &[String]) -> Result<(Counts, Option<String>)> {
    if !shell::is_root() {
        return Err(Stop::Missing(
            "the end-to-end cases make network namespaces and load kernel programs: run as root".to_owned(),
        )
        .into());
    }
    setup::run(root, setup::Need::Everything)?;
    setup::build(root)?;
    if filter.iter().any(|part| part.starts_with("cluster")) && kube::build::has_go() {
        kube::build::run(root)?;
        if long {
            kube::build::suite(root)?;
        }
    }
    let mut command = shell::command(root, "target/debug/cases", &[]);
    command.args(filter).env("OUTRIGGER_CAPTURE", capture);
    if long {
        command.arg("--long");
    }
    watched(command)
}

/// Runs a test command and adds up its closing lines. A command that fails without having counted a failure counts one.
pub(crate) fn watched(command: std::process::Command) -> Result<(Counts, Option<String>)> {
    let mut counts = Counts::default();
    let mut left_out = Vec::new();
    let succeeded = shell::run_watched(command, |line| {
        counts.add(line);
        if let Some(reason) = line.strip_prefix("left out: ") {
            left_out.push(reason.to_owned());
        }
    })?;
    if !succeeded && counts.failed == 0 {
        counts.failed = 1;
    }
    Ok((counts, (!left_out.is_empty()).then(|| left_out.join("; "))))
}

impl Counts {
    /// Takes a line of a test runner: `test result: ok. 3 passed; 0 failed; 1 ignored; ...` counts, any other does not.
    pub(crate) fn add(&mut self, line: &str) {
        let Some(rest) = line.strip_prefix("test result: ") else { return };
        for field in rest.split([';', '.']) {
            let mut words = field.split_whitespace();
            if let (Some(Ok(number)), Some(word)) = (words.next().map(str::parse::<u64>), words.next()) {
                match word {
                    "passed" => self.passed += number,
                    "failed" => self.failed += number,
                    "ignored" => self.ignored += number,
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_of_a_test_runner_are_added_up() {
        let mut counts = Counts::default();
        counts.add("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s");
        counts.add("test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s");
        counts.add("test policy::retry::tests::a_test ... ok");
        assert_eq!((counts.passed, counts.failed, counts.ignored), (4, 2, 1));
    }
}
