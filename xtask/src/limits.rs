//! `cargo xtask bench --only idle,start,first-answer`: what a release build must keep to, alone on the machine and without
//! peers.
//!
//! `idle` is the resident memory of a sidecar that carries nothing, `start` the time of `outrigger run --detach` from the
//! command to the ready pod, `first-answer` that of a sidecar that is started again, from its process to its first answer
//! over a plain hop. Each has a limit; beyond it the command ends with exit code 1, so that CI can hold a build to them. The end-to-end cases hold debug builds to wider ones.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, Pod};
use serde_json::{Value, json};

use crate::setup::{self, step};
use crate::{Stop, first_answer};

/// One measurement and its limit.
struct Limit {
    work: &'static str,
    metric: &'static str,
    unit: &'static str,
    /// Inclusive.
    most: f64,
    /// Which of the rounds must keep to it.
    judged: Judged,
}

#[derive(Clone, Copy, Debug)]
enum Judged {
    /// A size is the build's doing alone: the worst counts.
    Largest,
    /// A time is the machine's doing as well: half of the rounds may be late.
    Median,
}

/// 15 MB, in the table's unit.
const IDLE: Limit =
    Limit { work: "idle", metric: "rss_mib", unit: "MiB", most: 15_000_000.0 / 1_048_576.0, judged: Judged::Largest };
const START: Limit = Limit { work: "start", metric: "ready_ms", unit: "ms", most: 300.0, judged: Judged::Median };
const FIRST: Limit = Limit { work: "first-answer", metric: "ready_ms", unit: "ms", most: 30.0, judged: Judged::Median };

/// What a sidecar's start needed is given back by then, and the control plane has read the metrics a few times.
const SETTLED: Duration = Duration::from_secs(8);

/// Are these the works of this file?
pub(crate) fn are_wanted(works: &[String]) -> bool {
    !works.is_empty() && works.iter().all(|work| is_one(work))
}

/// Is this a work of this file?
pub(crate) fn is_one(work: &str) -> bool {
    [IDLE.work, START.work, FIRST.work].contains(&work)
}

/// Measures, prints, judges; returns the results as bench writes them.
pub(crate) fn run(root: &Path, binary: PathBuf, works: &[String], rounds: usize) -> Result<(Vec<Value>, Result<()>)> {
    setup::run(root, setup::Need::Mesh)?;
    let mesh = step("bringing up the mesh", || Mesh::up_binary(binary, &[]))?;
    let wanted = |limit: &Limit| works.iter().any(|work| work == limit.work);
    let (mut pods, mut times) = (Vec::new(), Vec::new());
    let idle_rounds = if wanted(&IDLE) || wanted(&START) { rounds.max(1) } else { 0 };
    for round in 0..idle_rounds {
        let pod = mesh.pod(&format!("bench/idle-{round}"));
        let begun = Instant::now();
        pods.push(step(&format!("round {} of {rounds}: start", round + 1), || pod.detach(["sleep", "1000000"]))?);
        times.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    let mut measured = Vec::new();
    if wanted(&IDLE) {
        step("letting the sidecars idle", || {
            std::thread::sleep(SETTLED);
            Ok(())
        })?;
        measured.push((IDLE, pods.iter().map(resident_mib).collect::<Result<Vec<f64>>>()?));
    }
    if wanted(&START) {
        measured.push((START, times));
    }
    if wanted(&FIRST) {
        measured.push((FIRST, first_answer::measure(root, &mesh, rounds.max(1))?));
    }
    mesh.down()?;
    println!(
        "\n{:<12} {:<10} {:<19} {:>10} {:>10} {:>10} {:>10}",
        "work", "candidate", "metric", "median", "min", "max", "limit"
    );
    let (mut results, mut broken) = (Vec::new(), Vec::new());
    for (limit, mut values) in measured {
        values.sort_by(f64::total_cmp);
        let (least, median, most) = spread(&values).context("nothing was measured")?;
        let Limit { work, metric, unit, most: allowed, judged } = limit;
        println!("{work:<12} {:<10} {metric:<19} {median:>10.1} {least:>10.1} {most:>10.1} {allowed:>10.1}", "outrigger");
        results.push(json!({
            "work": work, "candidate": "outrigger", "metric": metric, "unit": unit,
            "min": least, "median": median, "max": most, "rounds": values.len(), "limit": allowed,
        }));
        let counts = match judged {
            Judged::Largest => most,
            Judged::Median => median,
        };
        if counts > allowed {
            broken.push(format!("{work}: {counts:.1} {unit}, at most {allowed:.1} are allowed"));
        }
    }
    let verdict = if broken.is_empty() { Ok(()) } else { Err(Stop::No(broken.join("; ")).into()) };
    Ok((results, verdict))
}

/// Least, median and most of sorted values.
fn spread(values: &[f64]) -> Option<(f64, f64, f64)> {
    Some((*values.first()?, *values.get(values.len() / 2)?, *values.last()?))
}

fn resident_mib(pod: &Pod) -> Result<f64> {
    let process = pod.sidecar()?;
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).context("a sidecar is gone")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.split_whitespace().next().and_then(|number| number.parse().ok()).context("no number")?;
    ensure!(kib > 0.0, "a sidecar without memory");
    Ok(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_works_with_limits_are_measured_by_themselves() {
        let wanted = |works: &[&str]| are_wanted(&works.iter().map(|work| (*work).to_owned()).collect::<Vec<_>>());
        assert!(wanted(&["idle"]) && wanted(&["start", "idle"]) && wanted(&["first-answer"]));
        assert!(!wanted(&[]) && !wanted(&["idle", "pair-h1-64"]));
    }

    #[test]
    fn the_median_is_between_the_extremes() {
        assert_eq!(spread(&[1.0, 2.0, 9.0]), Some((1.0, 2.0, 9.0)));
        assert_eq!(spread(&[]), None);
    }
}
