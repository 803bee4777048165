//! What a kernel says of the object: whether it takes the programs, and how far its verifier has to go for that.
//!
//! `cargo xtask kernels` runs these tests on other kernels, one too old for the programs among them, and reads what they
//! print.
#![expect(clippy::print_stdout, reason = "the harness keeps it to itself unless it is asked for, or a test fails")]

use std::collections::BTreeMap;

use super::tests::may_load;
use super::*;

/// By program.
type Counts = BTreeMap<String, u64>;

/// What the verifier went through per kernel, as it is recorded.
const RECORD: &str = include_str!("../../../../ebpf/verified.toml");
/// The oldest kernel that the programs are made for.
const OLDEST: (u32, u32) = (6, 1);

/// A folder of pins on a bpffs, of programs that are loaded and attached to nothing.
struct Pins(tempfile::TempDir);

impl Pins {
    /// `None` where this user may not load programs.
    fn new() -> Option<Self> {
        if !may_load() {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        mount_bpffs(folder.path()).unwrap();
        Some(Self(folder))
    }

    /// Loads the programs; tells of each how many instructions the verifier went through.
    fn load(&self) -> Result<Counts, KernelError> {
        let pins = self.0.path();
        let mut counts = Counts::new();
        for (program, loaded) in programs::load(pins, Options::default())? {
            let pin = pins.join(program_pin(program));
            links::pin(loaded.as_fd(), &pin)?;
            let count = ProgramInfo::from_pin(&pin).unwrap().verified_instruction_count().unwrap();
            counts.insert(program.name.to_owned(), count.into());
        }
        Ok(counts)
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        Kernel::remove_all(self.0.path()).unwrap();
        unmount_bpffs(self.0.path()).unwrap();
    }
}

/// Major and minor number of a release, or of its first two numbers alone.
fn series(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|sign: char| !sign.is_ascii_digit()).map(|number| number.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

fn here() -> (u32, u32) {
    series(&release())
}

/// What is recorded of a kernel, or the most of what is recorded of any where this one is not among them.
fn recorded(kernel: (u32, u32)) -> Counts {
    let record: BTreeMap<String, Counts> = toml::from_str(RECORD).unwrap();
    if let Some((_, counts)) = record.iter().find(|(release, _)| series(release) == kernel) {
        return counts.clone();
    }
    let mut most = Counts::new();
    for (program, count) in record.into_values().flatten() {
        let former = most.entry(program).or_default();
        *former = count.max(*former);
    }
    most
}

/// A twentieth more, and a few for programs that are very short: what another compiler makes of the same source.
fn allowed(recorded: u64) -> u64 {
    recorded + recorded / 20 + 8
}

#[test]
fn kernel_takes_the_programs_or_is_refused_by_what_it_lacks() {
    let Some(pins) = Pins::new() else { return };
    let loaded = pins.load();
    if here() >= OLDEST {
        loaded.unwrap();
        return;
    }
    let error = loaded.unwrap_err();
    println!("refused: {error}; {}", error.remedy());
    assert!(matches!(&error, KernelError::Lacks { what, .. } if what == "the helper bpf_get_netns_cookie"), "{error:?}");
    assert!(error.to_string().contains(&release()));
    assert!(error.remedy().contains("too old") && error.remedy().contains("6.1"));
}

#[test]
fn verifier_goes_through_no_more_than_is_recorded() {
    if here() < OLDEST {
        return;
    }
    let Some(pins) = Pins::new() else { return };
    let (counts, recorded) = (pins.load().unwrap(), recorded(here()));
    for (program, count) in &counts {
        println!("verified {program} {count}");
    }
    let grown: Vec<String> = counts
        .iter()
        .filter_map(|(program, count)| match recorded.get(program) {
            Some(recorded) if *count <= allowed(*recorded) => None,
            Some(recorded) => Some(format!("{program}: {count}, {recorded} are recorded")),
            None => Some(format!("{program}: {count}, nothing is recorded")),
        })
        .collect();
    assert!(grown.is_empty(), "{}; if that is wanted: cargo xtask kernels --bless", grown.join("; "));
}

#[test]
fn kernel_that_is_not_recorded_is_held_to_the_most_of_those_that_are() {
    let most = recorded((99, 0));
    let any = recorded(OLDEST);
    assert!(!any.is_empty() && any.iter().all(|(program, count)| most[program] >= *count));
    assert_eq!(allowed(1000), 1058);
}
