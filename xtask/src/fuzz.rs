//! `cargo xtask fuzz`: builds the fuzz targets and runs each for a while, as libFuzzer does it.
//!
//! The corpus of a target stands in `proxy/fuzz/corpus/TARGET`, one input a file. What a run finds goes to a copy under
//! `target/fuzz`, so that a run changes nothing of what is committed; `--keep` takes over the inputs that reach something
//! new. An input that breaks a promise is kept under `target/fuzz/broken`, and the message says how to run it again.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};

use crate::{Stop, shell};

/// What a run of the fuzz targets is asked for.
#[derive(clap::Args)]
pub(crate) struct Wish {
    /// How long each target runs, in seconds; 0 runs the corpus once
    #[arg(long, default_value_t = SECONDS, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86_400))]
    seconds: u64,
    /// Where chance begins; 0 begins somewhere else each time
    #[arg(long, default_value_t = SEED)]
    seed: u32,
    /// Put the inputs that reach something new into the committed corpus
    #[arg(long)]
    keep: bool,
    /// Run these targets; all when none is named
    target: Vec<String>,
}

impl Wish {
    /// What CI runs: all of them, from what is committed and for as long as anybody's run.
    pub(crate) fn all() -> Self {
        Self { seconds: SECONDS, seed: SEED, keep: false, target: Vec::new() }
    }
}

const SECONDS: u64 = 60;
/// A fixed one: what passes on one machine passes on the next, as far as both come in the time.
const SEED: u32 = 1;
/// What one input may take, in seconds, and a target in memory, in MiB.
const INPUT_SECONDS_MAX: u64 = 10;
const MEMORY_MIB_MAX: u64 = 1024;
/// Targets at once.
const AT_ONCE: usize = 2;

/// Builds and runs them.
pub(crate) fn run(root: &Path, wish: &Wish) -> Result<()> {
    let known = targets(root)?;
    let wanted: Vec<&String> = if wish.target.is_empty() {
        known.iter().collect()
    } else {
        wish.target.iter().filter(|name| known.contains(name)).collect()
    };
    if let Some(unknown) = wish.target.iter().find(|name| !known.contains(name)) {
        return Err(Stop::No(format!("there is no fuzz target {unknown}; there are {}", known.join(", "))).into());
    }
    build(root)?;
    let mut broken = Vec::new();
    for group in wanted.chunks(AT_ONCE) {
        let started = group.iter().map(|name| start(root, name, wish)).collect::<Result<Vec<_>>>()?;
        for (name, child) in group.iter().zip(started) {
            if !end(root, name, child)? {
                broken.push(name.as_str());
            }
        }
    }
    if !broken.is_empty() {
        return Err(Stop::No(format!("a promise was broken in {}", broken.join(", "))).into());
    }
    if wish.keep {
        for name in wanted {
            keep(root, name)?;
        }
    }
    Ok(())
}

/// The targets, by the files that hold them.
fn targets(root: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(root.join("proxy/fuzz/targets")).context("cannot list the fuzz targets")? {
        let path = entry?.path();
        names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

fn build(root: &Path) -> Result<()> {
    if !shell::has("c++") {
        return Err(Stop::Missing("libFuzzer wants a C++ compiler (Debian: apt-get install g++)".to_owned()).into());
    }
    // The same selection as every build for development, so that the dependencies are shared with it.
    let mut command = shell::cargo(root, &["build", "--locked", "--workspace", "--features", SELECTED]);
    for name in targets(root)? {
        command.args(["--bin", &format!("fuzz-{name}")]);
    }
    command.env("RUSTC_WORKSPACE_WRAPPER", root.join("proxy/fuzz/rustc.sh"));
    shell::run(command)
}

const SELECTED: &str = "e2e/programs,outrigger-fuzz/libfuzzer";

fn committed(root: &Path, name: &str) -> PathBuf {
    root.join("proxy/fuzz/corpus").join(name)
}

fn work(root: &Path, name: &str) -> PathBuf {
    root.join("target/fuzz").join(name)
}

fn program(root: &Path, name: &str) -> Command {
    let mut command = shell::command(root, &format!("target/debug/fuzz-{name}"), &[]);
    command.arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}")).arg(format!("-timeout={INPUT_SECONDS_MAX}"));
    command
}

/// Starts one; what it says goes to a file, for two talk at once.
fn start(root: &Path, name: &str, wish: &Wish) -> Result<Child> {
    let work = work(root, name);
    std::fs::create_dir_all(&work)?;
    let broken = root.join("target/fuzz/broken");
    std::fs::create_dir_all(&broken)?;
    let log = std::fs::File::create(root.join(format!("target/fuzz/{name}.log")))?;
    let mut command = program(root, name);
    if wish.seconds == 0 {
        command.arg("-runs=0");
    }
    command.arg(format!("-max_total_time={}", wish.seconds)).arg(format!("-seed={}", wish.seed)).arg("-print_final_stats=1");
    command.arg(format!("-artifact_prefix={}/{name}-", broken.display()));
    command.arg(&work).arg(committed(root, name));
    shell::say(&format!("fuzz {name} for {} s", wish.seconds));
    command.stdout(Stdio::null()).stderr(log).spawn().with_context(|| format!("cannot start the fuzz target {name}"))
}

/// Waits for one and says what it did; `false` if it broke a promise.
fn end(root: &Path, name: &str, mut child: Child) -> Result<bool> {
    // libFuzzer ends by itself; one that does not has met an input without end that it could not time.
    let status = child.wait()?;
    let log = root.join(format!("target/fuzz/{name}.log"));
    let text = String::from_utf8_lossy(&std::fs::read(&log)?).into_owned();
    let number = |label: &str| {
        text.lines().rev().find_map(|line| line.strip_prefix(label).map(|rest| rest.trim().to_owned())).unwrap_or_default()
    };
    let edges = text.lines().rev().find_map(|line| line.split("cov: ").nth(1)?.split(' ').next()).unwrap_or("?");
    if status.success() {
        let executions = number("stat::number_of_executed_units:");
        println!("test fuzz::{name} ... ok ({executions} inputs, {edges} edges)");
        println!("test result: ok. 1 passed; 0 failed; 0 ignored");
        return Ok(true);
    }
    println!("test fuzz::{name} ... FAILED");
    // What was broken and the input that broke it stand at the end, behind as many words about what was reached.
    let told: Vec<&str> = text.lines().filter(|line| !REACHED.iter().any(|start| line.starts_with(start))).collect();
    for line in told.iter().skip(told.len().saturating_sub(LOG_LINES)) {
        println!("    {line}");
    }
    if let Some(input) = text.lines().find_map(|line| line.split("Test unit written to ").nth(1)) {
        println!("again: target/debug/fuzz-{name} {input}");
    }
    println!("test result: FAILED. 0 passed; 1 failed; 0 ignored");
    Ok(false)
}

/// As much of a failed run's log as one wants to read.
const LOG_LINES: usize = 60;
/// How libFuzzer's lines about what it has reached begin.
const REACHED: [&str; 2] = ["#", "\tNEW_FUNC"];

/// Takes what reaches something new into the committed corpus.
fn keep(root: &Path, name: &str) -> Result<()> {
    let committed = committed(root, name);
    std::fs::create_dir_all(&committed)?;
    let mut command = program(root, name);
    command.arg("-merge=1").arg(&committed).arg(work(root, name)).stdout(Stdio::null()).stderr(Stdio::null());
    shell::run(command)
}
