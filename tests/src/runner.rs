//! The cases' runner: groups of cases on one mesh each, one after another, with the closing line of a test runner.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::rung::Rung;

/// What the command line asks for.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// Full counts.
    pub long: bool,
    filter: Vec<String>,
    /// A group that is another run's.
    without: Option<String>,
    list: bool,
}

impl Wish {
    /// From the arguments of this process; libtest's flags that mean nothing here are passed over.
    pub fn from_arguments() -> Self {
        let mut wish = Self::default();
        for argument in std::env::args().skip(1) {
            if let Some(group) = argument.strip_prefix("--without=") {
                wish.without = Some(group.to_owned());
                continue;
            }
            match argument.as_str() {
                "--long" => wish.long = true,
                "--list" => wish.list = true,
                flag if flag.starts_with("--") => {}
                name => wish.filter.push(name.to_owned()),
            }
        }
        wish
    }

    fn wants(&self, group: &str, case: &str) -> bool {
        let whole = format!("{group}::{case}");
        self.without.as_deref() != Some(group)
            && (self.filter.is_empty() || self.filter.iter().any(|part| whole.contains(part.as_str())))
    }
}

/// One case: a sentence, and what proves it.
pub struct Case<W> {
    pub name: &'static str,
    pub run: fn(&W, &Wish) -> Result<()>,
}

// Whatever the world is: of a case, its address is copied.
impl<W> Clone for Case<W> {
    fn clone(&self) -> Self {
        Self { name: self.name, run: self.run }
    }
}

/// Runs groups and counts.
pub struct Runner {
    wish: Wish,
    passed: usize,
    failed: Vec<String>,
    filtered: usize,
    start: Instant,
    rung: Rung,
}

impl Runner {
    /// Nothing has run yet.
    pub fn new(wish: Wish) -> Self {
        Self { rung: Rung::asked(), wish, passed: 0, failed: Vec::new(), filtered: 0, start: Instant::now() }
    }

    /// Are full counts asked for?
    pub fn is_long(&self) -> bool {
        self.wish.long
    }

    /// Runs a group: `make` builds its world once, each case gets it, and it is dropped behind the last one.
    pub fn group<W>(&mut self, name: &str, make: impl FnOnce() -> Result<W>, cases: &[Case<W>]) {
        let Some((world, wanted)) = self.world(name, make, cases) else { return };
        for case in wanted {
            let (result, took) = timed(&world, case, &self.wish);
            self.note_timed(&format!("{name}::{}", case.name), result, took);
        }
    }

    /// The same, with cases that wait more than they work and touch nothing in common: those of `together` run first, so many
    /// of them at a time, and then those of `alone`, one after another.
    pub fn crowd<W: Sync>(
        &mut self,
        name: &str,
        make: impl FnOnce() -> Result<W>,
        (at_once, together): (usize, &[Case<W>]),
        alone: &[Case<W>],
    ) {
        let all = [together, alone].concat();
        let Some((world, wanted)) = self.world(name, make, &all) else { return };
        let is_together = |case: &&Case<W>| together.iter().any(|other| other.name == case.name);
        let (together, alone): (Vec<_>, Vec<_>) = wanted.into_iter().partition(is_together);
        let (next, wish) = (AtomicUsize::new(0), self.wish.clone());
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::scope(|threads| {
            for _ in 0..at_once {
                let (sender, next, together, world, wish) = (sender.clone(), &next, &together, &world, &wish);
                threads.spawn(move || {
                    while let Some(case) = together.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let (result, took) = timed(world, case, wish);
                        // Whoever listens does so to the last.
                        sender.send((case.name, result, took)).ok();
                    }
                });
            }
            drop(sender);
            for (case, result, took) in receiver {
                self.note_timed(&format!("{name}::{case}"), result, took);
            }
        });
        for case in alone {
            let (result, took) = timed(&world, case, &self.wish);
            self.note_timed(&format!("{name}::{}", case.name), result, took);
        }
    }

    /// The world of a group, and those of its cases that are to run; none if none of them is.
    fn world<'a, W>(
        &mut self,
        name: &str,
        make: impl FnOnce() -> Result<W>,
        cases: &'a [Case<W>],
    ) -> Option<(W, Vec<&'a Case<W>>)> {
        let (mut wanted, mut others) = (Vec::new(), Vec::new());
        for case in cases.iter().filter(|case| self.wish.wants(name, case.name)) {
            match self.rung.lacks(case.name) {
                None => wanted.push(case),
                Some(why) => others.push((case.name, why)),
            }
        }
        self.filtered += cases.len() - wanted.len();
        for (case, why) in others {
            say(&format!("not on {}: {name}::{case}: {why}", self.rung));
        }
        if wanted.is_empty() {
            return None;
        }
        if self.wish.list {
            wanted.iter().for_each(|case| say(&format!("{name}::{}: test", case.name)));
            return None;
        }
        match guarded(make) {
            Ok(world) => Some((world, wanted)),
            Err(error) => {
                // The first line of each failure says why; the rest is the group's.
                for case in wanted {
                    self.note(&format!("{name}::{}", case.name), Err(anyhow::anyhow!("its world could not be made: {error:#}")));
                }
                None
            }
        }
    }

    /// Names a case that cannot run on this machine, if it was asked for.
    pub fn left_out(&self, group: &str, case: &str, reason: &str) {
        if self.wish.wants(group, case) {
            say(&format!("left out: {group}::{case}: {reason}"));
        }
    }

    /// Names a case that wants something which no checkout has. It is no part of a run of all cases.
    pub fn by_hand(&self, group: &str, case: &str, how: &str) {
        if self.wish.wants(group, case) {
            say(&format!("by hand: {group}::{case}: {how}"));
        }
    }

    /// Prints the failures again and the closing line; returns whether all passed.
    pub fn finish(self) -> bool {
        if !self.failed.is_empty() {
            say("\nfailures:\n");
            self.failed.iter().for_each(|failure| say(failure));
        }
        let word = if self.failed.is_empty() { "ok" } else { "FAILED" };
        say(&format!(
            "\ntest result: {word}. {} passed; {} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s",
            self.passed,
            self.failed.len(),
            self.filtered,
            self.start.elapsed().as_secs_f64()
        ));
        self.failed.is_empty()
    }

    fn note(&mut self, name: &str, result: Result<()>) {
        self.note_timed(name, result, Duration::ZERO);
    }

    fn note_timed(&mut self, name: &str, result: Result<()>, took: Duration) {
        match result {
            Ok(()) => {
                self.passed += 1;
                say(&format!("test {name} ... ok ({:.1}s)", took.as_secs_f64()));
            }
            Err(error) => {
                // What was around it may be long: the cause stands before it, and is told again at the end.
                let cause = error.root_cause().to_string();
                say(&format!("test {name} ... FAILED: {cause}\n    {}", format!("{error:#}").replace('\n', "\n    ")));
                self.failed.push(format!("{name}: {cause}"));
            }
        }
    }
}

/// Runs a case, and takes its time.
fn timed<W>(world: &W, case: &Case<W>, wish: &Wish) -> (Result<()>, Duration) {
    let start = Instant::now();
    let result = guarded(|| (case.run)(world, wish));
    (result, start.elapsed())
}

/// A panic (of an assertion, say) is a failure as any other, and guards still run.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_else(|| "a panic without a message".to_owned());
        Err(anyhow::anyhow!("{text}"))
    })
}

#[expect(clippy::print_stdout, reason = "a test runner speaks on its standard output")]
fn say(text: &str) {
    println!("{text}");
}
