//! `cargo xtask kernels`: the kernel programs and their tests on other kernels than the one that runs here.
//!
//! Debian's packaged kernels start in virtual machines by software emulation, with the library's own test runner beside
//! them: what is loaded is the committed object, by the product's own loader, and what is tested is what is tested on the
//! running kernel. One kernel is older than what the programs need; it must be refused by name.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::finish;
use serde_json::{Value, json};

use crate::test::Counts;
use crate::{Stop, setup, shell};

mod archive;
mod machine;
mod packages;
mod verified;

use packages::Fetched;
use verified::{Record, Series};

/// Which kernels, and what to do with what they say.
#[derive(clap::Args, Debug)]
pub(crate) struct Wish {
    /// These kernels alone: 5.10, 6.1, 6.12, newest
    kernel: Vec<String>,
    /// Record the verifier's counts of instructions, of these kernels and the running one, in ebpf/verified.toml
    #[arg(long)]
    bless: bool,
    /// Also write the results there, as a list of objects
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A packaged kernel.
#[derive(Debug)]
struct Kernel {
    /// How it is asked for.
    name: &'static str,
    /// What its release begins with.
    series: &'static str,
    /// The suite that has it.
    suite: &'static str,
    /// The processor that the emulator shows it.
    processor: &'static str,
    must: Must,
}

/// What has to happen on a kernel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Must {
    /// Every test passes.
    Pass,
    /// The programs are refused, and it is told what the kernel lacks.
    BeRefused,
}

/// Five levels of page tables are emulated slowly. With cmpxchg16b 6.12 now and then panics at its start in qemu 7.2,
/// and without it 7.2 has no storage for sockets.
const KERNELS: [Kernel; 4] = [
    Kernel { name: "5.10", series: "5.10.", suite: "bullseye-security", processor: "max,la57=off", must: Must::BeRefused },
    Kernel { name: "6.1", series: "6.1.", suite: "bookworm-security", processor: "max,la57=off", must: Must::Pass },
    Kernel { name: "6.12", series: "6.12.", suite: "bookworm-backports", processor: "max,la57=off,-cx16", must: Must::Pass },
    Kernel { name: "newest", series: "", suite: "trixie-backports", processor: "max,la57=off", must: Must::Pass },
];

/// The tests that run, and those about what a kernel says of the object alone.
const RUNNER: &str = "node::kernel::";
const VERDICTS: &str = "node::kernel::verdicts::";
/// The test that a grown count fails.
const RECORDED: &str = "verdicts::verifier_goes_through_no_more_than_is_recorded";
/// On the running kernel, where they take a moment.
const HERE: Duration = Duration::from_secs(60);

/// How it went with a kernel.
#[derive(Debug)]
struct Outcome {
    kernel: &'static Kernel,
    /// What the kernel calls itself.
    release: String,
    took: Duration,
    counts: Counts,
    /// The tests that failed, and what else went wrong.
    wrong: Vec<String>,
    /// In which words the programs were refused.
    refused: Option<String>,
    verified: verified::Counts,
    left_out: Option<String>,
}

/// Runs the kernels that are asked for, and prints.
pub(crate) fn run(root: &Path, wish: &Wish) -> Result<()> {
    let kernels = chosen(&wish.kernel)?;
    let runner = ready(root)?;
    let mut outcomes = outcomes(root, &kernels, &runner)?;
    let here = verified_here(&runner)?;
    if wish.bless {
        bless(root, &mut outcomes, here.as_ref())?;
    }
    print(&outcomes, here.as_ref());
    if let Some(file) = &wish.json {
        let results: Vec<Value> = outcomes.iter().map(Outcome::data).collect();
        std::fs::write(file, serde_json::to_vec_pretty(&results)?).with_context(|| format!("cannot write {}", file.display()))?;
    }
    let failed: Vec<&str> = outcomes.iter().filter(|outcome| outcome.counts.failed > 0).map(|one| one.kernel.name).collect();
    if !failed.is_empty() {
        return Err(Stop::No(format!("not as it must be on {}", failed.join(", "))).into());
    }
    match left_out(&outcomes) {
        Some(reason) => Err(Stop::Missing(reason).into()),
        None => Ok(()),
    }
}

/// All of them, as a part of the tests: the counts, and what could not run and why.
pub(crate) fn part(root: &Path) -> Result<(Counts, Option<String>)> {
    let runner = ready(root)?;
    let outcomes = outcomes(root, &chosen(&[])?, &runner)?;
    print(&outcomes, None);
    let mut sum = Counts::default();
    for outcome in &outcomes {
        sum.passed += outcome.counts.passed;
        sum.failed += outcome.counts.failed;
    }
    Ok((sum, left_out(&outcomes)))
}

/// Fetches all of them, and what starts them, so that later nothing needs the network. Says what could not be had: the
/// tests will name it as left out.
pub(crate) fn fetch(root: &Path) {
    if let Err(error) = setup::run(root, setup::Need::Kernels) {
        return shell::say(&format!("other kernels cannot be started: {error:#}"));
    }
    for kernel in &KERNELS {
        let fetched = setup::step(&format!("fetching the kernel {}", kernel.name), || packages::fetch(root, kernel));
        if let Err(error) = fetched {
            shell::say(&format!("the kernel {} cannot be tested: {error:#}", kernel.name));
        }
    }
}

/// Where fetched kernels stand, and what their machines say.
fn folder(root: &Path) -> PathBuf {
    root.join("target/kernels")
}

fn chosen(names: &[String]) -> Result<Vec<&'static Kernel>> {
    let all = KERNELS.each_ref().map(|kernel| kernel.name);
    if let Some(unknown) = names.iter().find(|name| !all.contains(&name.as_str())) {
        return Err(Stop::Usage(format!("there is no kernel {unknown} here; there are {}", all.join(", "))).into());
    }
    Ok(KERNELS.iter().filter(|kernel| names.is_empty() || names.iter().any(|name| name == kernel.name)).collect())
}

/// What a machine needs, with the runner last: the library's test runner, without debug information.
fn ready(root: &Path) -> Result<PathBuf> {
    if std::env::consts::ARCH != "x86_64" {
        return Err(Stop::Missing("the packaged kernels are started on x86_64 alone".to_owned()).into());
    }
    setup::run(root, setup::Need::Kernels)?;
    let mut build = shell::cargo(root, &["test", "--locked", "--lib", "--no-run", "--message-format=json"]);
    build.args(setup::SELECTION);
    let built = setup::step("building the tests", || shell::output(build))?;
    let runner = built.lines().find_map(library_tests).context("cargo names no test runner of the library")?;
    let stripped = folder(root).join("runner");
    std::fs::create_dir_all(folder(root))?;
    let mut strip = shell::command(root, "strip", &["--strip-debug", "-o"]);
    strip.arg(&stripped).arg(runner);
    shell::output(strip)?;
    Ok(stripped)
}

/// The test runner's path, if this line of cargo's is about it.
fn library_tests(line: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(line).ok()?;
    let target = message.get("target")?;
    let is_library = target.get("kind")?.as_array()?.iter().any(|kind| kind == "lib");
    let is_it = target.get("name")? == "outrigger" && is_library;
    message.get("executable").filter(|_| is_it)?.as_str().map(PathBuf::from)
}

/// Runs the kernels, as many at a time as there are processors.
fn outcomes(root: &Path, kernels: &[&'static Kernel], runner: &Path) -> Result<Vec<Outcome>> {
    let waiting: Mutex<VecDeque<&'static Kernel>> = Mutex::new(kernels.iter().copied().collect());
    let next = || waiting.lock().ok().and_then(|mut waiting| waiting.pop_front());
    let work = || {
        let mut outcomes = Vec::new();
        while let Some(kernel) = next() {
            outcomes.push(Outcome::of(root, kernel, runner));
        }
        outcomes
    };
    let hands = std::thread::available_parallelism().map_or(1, usize::from).min(kernels.len());
    let mut outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let hands: Vec<_> = (0..hands).map(|_| scope.spawn(work)).collect();
        hands.into_iter().filter_map(|hand| hand.join().ok()).flatten().collect()
    });
    ensure!(outcomes.len() == kernels.len(), "the work on a kernel broke down");
    outcomes.sort_by_key(|outcome| KERNELS.iter().position(|kernel| kernel.name == outcome.kernel.name));
    Ok(outcomes)
}

/// What the verifier goes through on the running kernel, if this user may ask it: the kernel's release and the counts.
fn verified_here(runner: &Path) -> Result<Option<(String, verified::Counts)>> {
    if !shell::is_root() {
        return Ok(None);
    }
    let mut command = Command::new(runner);
    let told = finish(command.args([VERDICTS, "--test-threads=1", "--show-output"]), HERE)?;
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let counts = verified::told(&told.stdout);
    ensure!(!counts.is_empty(), "the running kernel tells no counts: {}", told.all());
    Ok(Some((release, counts)))
}

/// Records what was counted. A test that failed over it would pass now.
fn bless(root: &Path, outcomes: &mut [Outcome], here: Option<&(String, verified::Counts)>) -> Result<()> {
    let mut record = Record::read(root)?;
    for outcome in outcomes.iter_mut().filter(|outcome| !outcome.verified.is_empty()) {
        record.set(&outcome.release, outcome.verified.clone())?;
        let before = outcome.wrong.len();
        outcome.wrong.retain(|wrong| wrong != RECORDED);
        if outcome.wrong.len() < before {
            outcome.counts.failed -= 1;
            outcome.counts.passed += 1;
        }
    }
    match here {
        Some((release, counts)) => record.set(release, counts.clone())?,
        None => shell::say("without root the running kernel cannot be asked, and what is recorded of it stays"),
    }
    record.write(root)?;
    shell::say(&format!("{} says what was counted; commit it", verified::RECORD));
    Ok(())
}

fn print(outcomes: &[Outcome], here: Option<&(String, verified::Counts)>) {
    println!("\n{:<8} {:<34} {:>7} {:>6} {:>6}  result", "kernel", "release", "seconds", "passed", "failed");
    for outcome in outcomes {
        let Outcome { kernel, release, took, counts, .. } = outcome;
        let (seconds, result) = (took.as_secs_f64(), outcome.result());
        println!("{:<8} {release:<34} {seconds:>7.0} {:>6} {:>6}  {result}", kernel.name, counts.passed, counts.failed);
    }
    for Outcome { kernel, refused, .. } in outcomes {
        if let Some(refused) = refused {
            println!("\n{} says: {refused}", kernel.name);
        }
    }
    let name = |release: &str| Series::of(release).map_or_else(|| release.to_owned(), |series| series.to_string());
    let counted = outcomes.iter().filter(|outcome| !outcome.verified.is_empty());
    let mut columns: Vec<_> = counted.map(|outcome| (name(&outcome.release), &outcome.verified)).collect();
    columns.extend(here.map(|(release, counts)| (format!("{} here", name(release)), counts)));
    if !columns.is_empty() {
        println!("\n{}\n", verified::table(&columns));
    }
}

fn left_out(outcomes: &[Outcome]) -> Option<String> {
    let reasons = outcomes.iter().filter_map(|outcome| Some(format!("{}: {}", outcome.kernel.name, outcome.left_out.as_ref()?)));
    let reasons: Vec<String> = reasons.collect();
    (!reasons.is_empty()).then(|| reasons.join("; "))
}

impl Outcome {
    /// Fetches a kernel, starts it, and takes down what it says. Says how it went as soon as that is known.
    fn of(root: &Path, kernel: &'static Kernel, runner: &Path) -> Self {
        let mut outcome = Self {
            kernel,
            release: String::new(),
            took: Duration::ZERO,
            counts: Counts::default(),
            wrong: Vec::new(),
            refused: None,
            verified: verified::Counts::new(),
            left_out: None,
        };
        match packages::fetch(root, kernel) {
            Ok(fetched) => {
                shell::say(&format!("kernel {}: starting", kernel.name));
                let begun = Instant::now();
                if let Err(error) = outcome.test(root, runner, &fetched) {
                    outcome.counts.failed = outcome.counts.failed.max(1);
                    outcome.wrong.push(format!("{error:#}"));
                }
                outcome.took = begun.elapsed();
            }
            Err(error) => outcome.left_out = Some(format!("{error:#}")),
        }
        shell::say(&format!("kernel {}: {}", kernel.name, outcome.result()));
        outcome
    }

    fn test(&mut self, root: &Path, runner: &Path, fetched: &Fetched) -> Result<()> {
        let filter = match self.kernel.must {
            Must::Pass => RUNNER,
            Must::BeRefused => VERDICTS,
        };
        let file_system = machine::file_system(root, runner, fetched, filter)?;
        let ran = machine::run(root, self.kernel, fetched, &file_system)?;
        self.release.clone_from(&ran.release);
        ran.console.lines().for_each(|line| self.counts.add(line));
        self.wrong = ran.failed();
        self.verified = verified::told(&ran.console);
        self.refused = ran.console.lines().find_map(|line| line.strip_prefix("refused: ")).map(str::to_owned);
        let log = folder(root).join(self.kernel.name).join("console.log");
        ensure!(ran.is_whole(), "the tests did not come to an end; see {}", log.display());
        ensure!(self.counts.passed + self.counts.failed > 0, "no test ran; see {}", log.display());
        ensure!(
            self.refused.is_some() == (self.kernel.must == Must::BeRefused),
            "it takes the programs or refuses them, as it must not; see {}",
            log.display()
        );
        Ok(())
    }

    /// In a few words.
    fn result(&self) -> String {
        if let Some(reason) = &self.left_out {
            return format!("left out: {reason}");
        }
        match (&self.refused, self.counts.failed) {
            (_, 1..) => format!("failed: {}", self.wrong.join(", ")),
            (Some(_), 0) => "refused by name, as it must be".to_owned(),
            (None, 0) => "passed".to_owned(),
        }
    }

    fn data(&self) -> Value {
        let Self { kernel, release, took, counts, wrong, refused, verified, left_out } = self;
        json!({
            "kernel": kernel.name, "release": release, "seconds": took.as_secs_f64(), "passed": counts.passed,
            "failed": counts.failed, "wrong": wrong, "refused": refused, "verified": verified, "leftOut": left_out,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_asked_for_by_name() {
        let asked = |names: &[&str]| chosen(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        let named = |kernels: Vec<&Kernel>| kernels.iter().map(|kernel| kernel.name).collect::<Vec<_>>();
        assert_eq!(named(asked(&[]).unwrap()).len(), KERNELS.len());
        assert_eq!(named(asked(&["newest", "6.1"]).unwrap()), ["6.1", "newest"]);
        assert!(asked(&["4.4"]).unwrap_err().to_string().contains("5.10, 6.1, 6.12, newest"));
    }

    #[test]
    fn the_librarys_test_runner_is_known_among_what_cargo_builds() {
        let line = |name: &str, kind: &str, executable: &str| {
            format!(r#"{{"target":{{"name":"{name}","kind":["{kind}"]}},"executable":{executable}}}"#)
        };
        assert_eq!(library_tests(&line("outrigger", "lib", "\"/a\"")), Some(PathBuf::from("/a")));
        assert_eq!(library_tests(&line("outrigger", "lib", "null")), None);
        assert_eq!(library_tests(&line("outrigger", "bin", "\"/a\"")), None);
        assert_eq!(library_tests(&line("e2e", "lib", "\"/a\"")), None);
    }
}
