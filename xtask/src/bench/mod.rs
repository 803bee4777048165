//! `cargo xtask bench`: what a request costs, side by side with the peers, in one run.
//!
//! Everything runs in local pods on the same bridge: the load generator in one, the server in another, each candidate's
//! proxies beside them. Outrigger is as shipped: captured by the kernel programs, configured over the stream, built
//! as it is released, no flag that a user does not get. Load and server are held on processor 0, proxies on processor 1. Candidates
//! alternate, every other round in reverse order; the table shows the median, and of the first metric the extremes.
//!
//! A turn that comes to nothing is told at the end, with exit code 1, and the others go on.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::{Stop, instructions, limits, release, setup, shell};

pub(crate) mod bed;
pub(crate) mod peer;
mod process;
mod report;
mod samples;
mod scale;
mod targets;
pub(crate) mod works;

use bed::{Bed, Candidate};
use peer::Description;
use samples::Samples;
use scale::Scale;
use works::{Kind, Work};

/// What to measure.
#[derive(clap::Args, Debug)]
pub(crate) struct Wish {
    /// Only these works; --list tells which there are
    #[arg(long, value_name = "WORK,...", value_delimiter = ',')]
    only: Vec<String>,
    /// How often each candidate has its turn
    #[arg(long, default_value_t = 3, value_name = "N")]
    rounds: usize,
    /// Seconds of each turn
    #[arg(long, default_value_t = 2.0, value_name = "S")]
    pub(crate) seconds: f64,
    /// Another peer: a description file, or a folder of them (docs/performance.md tells the form)
    #[arg(long, value_name = "FILE")]
    peer: Vec<PathBuf>,
    /// Measure no other peers than these, by name
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    beside: Vec<String>,
    /// Print the works and end
    #[arg(long)]
    list: bool,
    /// Count the instructions of each sidecar per request instead, under valgrind's callgrind: no peers, no clock
    #[arg(long)]
    instructions: bool,
    /// Measure this binary instead of building one, to compare two builds
    #[arg(long, value_name = "FILE", conflicts_with = "untrained")]
    binary: Option<PathBuf>,
    /// Measure a release build without a profile; the released one has that of the last `cargo xtask release`, or a new one
    #[arg(long)]
    untrained: bool,
    /// Also write the results there, as a list of objects
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Measures and prints.
pub(crate) fn run(root: &Path, wish: &Wish) -> Result<()> {
    let works = works::chosen(&wish.only).map_err(Stop::Usage)?;
    if wish.list {
        println!("{}", list());
        return Ok(());
    }
    if !shell::is_root() {
        return Err(
            Stop::Missing("the benchmark makes network namespaces and loads kernel programs: run as root".to_owned()).into()
        );
    }
    let alone: Vec<String> = works.iter().map(|work| work.name.to_owned()).filter(|name| limits::is_one(name)).collect();
    if !wish.only.is_empty() && limits::are_wanted(&wish.only) {
        let (results, verdict) = limits::run(root, wish.built(root)?, &alone, wish.rounds)?;
        print_judged(&results);
        wish.write(&results)?;
        return verdict;
    }
    if wish.instructions {
        setup::run(root, setup::Need::Mesh)?;
        let bed = Bed::make(root, wish.built(root)?, &[])?;
        return instructions::run(&bed, &works, wish);
    }
    setup::run(root, setup::Need::Peers)?;
    let peers = wish.peers()?;
    let binary = wish.built(root)?;
    let mut samples = Samples::default();
    let bar = Progress::begin(turns(&works, &peers) * wish.rounds.max(1));
    alternate(root, wish, &works, &peers, &binary, &mut samples, &bar)?;
    for work in &works {
        if let Kind::Scale { services } = work.kind {
            scales(root, wish, (work, services), &peers, &binary, &mut samples, &bar)?;
        }
    }
    bar.end();
    let verdicts = report::verdicts(&samples);
    let rows: Vec<(&Work, Vec<String>)> = works.iter().map(|work| (*work, names(work, &peers))).collect();
    println!("{}", report::text(&rows, &samples, &verdicts));
    let mut results = report::data(&rows, &samples, &verdicts);
    wish.write(&results)?;
    let mut verdict = Ok(());
    // What has a limit of its own is measured alone on the machine, also where it stands in the table beside the peers.
    let limited: Vec<String> = alone.into_iter().filter(|name| name != "idle").collect();
    if !limited.is_empty() {
        let (more, kept) = limits::run(root, binary, &limited, wish.rounds)?;
        print_judged(&more);
        results.extend(more);
        wish.write(&results)?;
        verdict = kept;
    }
    if !samples.failed.is_empty() {
        return Err(Stop::No(format!("{} turns came to nothing", samples.failed.len())).into());
    }
    verdict
}

/// Traffic and idle connections: all candidates of a work, one after another, in every round.
fn alternate(
    root: &Path,
    wish: &Wish,
    works: &[&Work],
    peers: &[Description],
    binary: &Path,
    samples: &mut Samples,
    bar: &Progress,
) -> Result<()> {
    if works.iter().all(|work| bed::candidates(work, peers).is_empty()) {
        return Ok(());
    }
    let bed = Bed::make(root, binary.to_owned(), peers)?;
    for peer in peers {
        if let Some(program) = peer.missing(&bed.places) {
            return Err(Stop::Missing(format!("the peer {} is missing: there is no {program}", peer.name)).into());
        }
    }
    for round in 0..wish.rounds.max(1) {
        for work in works {
            let mut order: Vec<Candidate<'_>> = bed::candidates(work, peers);
            if round % 2 == 1 {
                order.reverse();
            }
            for candidate in order {
                let turn = bar.turn(wish.rounds, round, work.name, candidate.name(), || bed.turn(candidate, work, wish.seconds));
                samples.note(work.name, candidate.name(), round, turn);
            }
        }
    }
    Ok(())
}

/// One number of services, in a mesh of its own.
fn scales(
    root: &Path,
    wish: &Wish,
    (work, services): (&Work, usize),
    peers: &[Description],
    binary: &Path,
    samples: &mut Samples,
    bar: &Progress,
) -> Result<()> {
    let scale = match Scale::make(root, binary.to_owned(), services) {
        Ok(scale) => scale,
        Err(error) => {
            samples.note(work.name, "outrigger", 0, Err(error));
            return Ok(());
        }
    };
    for round in 0..wish.rounds.max(1) {
        let turn = bar.turn(wish.rounds, round, work.name, "outrigger", || scale.outrigger());
        samples.note(work.name, "outrigger", round, turn);
        let turn = bar.turn(wish.rounds, round, work.name, "envoy", || scale.envoy(peers));
        if let Some(turn) = turn.transpose() {
            samples.note(work.name, "envoy", round, turn);
        }
    }
    Ok(())
}

/// The candidates of a work, by name.
fn names(work: &Work, peers: &[Description]) -> Vec<String> {
    match work.kind {
        Kind::Scale { .. } => vec!["envoy".to_owned(), "outrigger".to_owned()],
        Kind::Traffic(_) | Kind::Idle { .. } | Kind::Alone => {
            bed::candidates(work, peers).iter().map(|candidate| candidate.name().to_owned()).collect()
        }
    }
}

/// Turns of a round.
fn turns(works: &[&Work], peers: &[Description]) -> usize {
    works.iter().map(|work| names(work, peers).len()).sum()
}

/// Says of what has a limit of its own whether it also reached what it shall.
fn print_judged(results: &[Value]) {
    let mut samples = Samples::default();
    for result in results {
        let word = |field: &str| result.get(field).and_then(Value::as_str).unwrap_or_default();
        let metric = works::METRICS.iter().find(|(metric, _)| *metric == word("metric"));
        if let (Some((metric, _)), Some(median)) = (metric, result.get("median").and_then(Value::as_f64)) {
            samples.add(word("work"), word("candidate"), 0, vec![(metric, median)]);
        }
    }
    report::verdicts(&samples).iter().for_each(|verdict| println!("{}", verdict.line()));
}

/// The works, for people.
fn list() -> String {
    works::WORKS.iter().map(|work| format!("{:<16} {}", work.name, work.text)).collect::<Vec<_>>().join("\n")
}

impl Wish {
    /// The binary that is measured.
    fn built(&self, root: &Path) -> Result<PathBuf> {
        setup::build_around(root)?;
        match &self.binary {
            Some(binary) => std::path::absolute(binary).with_context(|| format!("no {}", binary.display())),
            None if self.untrained => setup::build_untrained(root),
            None => release::built(root),
        }
    }

    /// The peers that are measured beside it.
    fn peers(&self) -> Result<Vec<Description>> {
        let mut all = peer::all(&self.peer).map_err(|error| Stop::Usage(format!("{error:#}")))?;
        if let Some(unknown) = self.beside.iter().find(|name| !all.iter().any(|peer| peer.name == **name)) {
            let known: Vec<&str> = all.iter().map(|peer| peer.name.as_str()).collect();
            return Err(Stop::Usage(format!("no peer is called {unknown}; there are {}", known.join(", "))).into());
        }
        all.retain(|peer| self.beside.is_empty() || self.beside.contains(&peer.name));
        Ok(all)
    }

    /// Writes the results where they are wanted.
    pub(crate) fn write(&self, results: &[Value]) -> Result<()> {
        let Some(file) = &self.json else { return Ok(()) };
        std::fs::write(file, serde_json::to_string_pretty(results)?).with_context(|| format!("cannot write {}", file.display()))
    }
}

/// How far the run is: a bar on a terminal, a line for each turn elsewhere.
struct Progress {
    bar: ProgressBar,
}

impl Progress {
    fn begin(turns: usize) -> Self {
        let bar = ProgressBar::new(u64::try_from(turns).unwrap_or(u64::MAX));
        if let Ok(style) = ProgressStyle::with_template("{bar:20} {pos}/{len} {msg} ({elapsed}, {eta} left)") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(500));
        Self { bar }
    }

    fn turn<T>(&self, rounds: usize, round: usize, work: &str, candidate: &str, turn: impl FnOnce() -> Result<T>) -> Result<T> {
        let text = format!("round {} of {rounds}: {work} {candidate}", round + 1);
        self.bar.set_message(text.clone());
        let result = turn();
        self.bar.inc(1);
        match &result {
            Err(error) => self.bar.suspend(|| shell::say(&format!("{text}: failed: {error:#}"))),
            Ok(_) if !std::io::stderr().is_terminal() => shell::say(&text),
            Ok(_) => {}
        }
        result
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}
