//! The project's automation: `cargo xtask COMMAND`, and nothing else builds, checks, demonstrates or measures it.
//!
//! Exit codes are those of the product: 0 done, 1 the check says no, 2 wrong usage, 3 the environment cannot (the message
//! names what is missing and what to do).
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a terminal is what this program is for")]
#![expect(clippy::disallowed_types, reason = "nothing here runs under paused time")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod conformance;
mod demo;
mod ebpf;
mod first_answer;
mod fuzz;
mod generate;
mod image;
mod instructions;
mod kernels;
mod kube;
mod limits;
mod lint;
mod release;
mod setup;
mod shell;
mod show;
mod test;
mod tidy;

/// The project's automation.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build, bring up the local mesh with a small shop in it, drive traffic, show what happened
    ///
    /// Stays up until interrupted, then takes everything down. Example: cargo xtask demo --check
    Demo {
        /// Assert all of it, take everything down, exit with 0 or 1
        #[arg(long)]
        check: bool,
    },
    /// The measurements of the performance table, side by side with the peers
    ///
    /// A missing peer ends the run with exit code 3; a result beyond its limit (idle, start, first-answer) and a turn that came to nothing
    /// end it with 1. A ratio to a peer that is missed is told, and ends nothing.
    #[command(after_help = "Examples:
  cargo xtask bench                                    all works, three rounds
  cargo xtask bench --only pair-h1-64,pair-grpc --rounds 5 --json results.json
  cargo xtask bench --only hop-h1-64 --peer mine.toml --beside mine,nginx
  cargo xtask bench --only idle,start --rounds 10      the limits of a release build, without peers
  cargo xtask bench --instructions --only pair-h1-64   instructions of its own, without a clock
  cargo xtask bench --list                             the works")]
    Bench(bench::Wish),
    /// Build the binary as it is released: trained on this machine with the works of the benchmark
    ///
    /// Builds twice, and drives a local mesh between, as root; needs llvm-profdata (`rustup component add llvm-tools`, or
    /// Debian's package llvm-22), and ends with exit code 3 where it is missing. The profile stays under target/trained.
    #[command(after_help = "Examples:
  cargo xtask release
  cargo xtask release --profile outrigger.profdata    one that was trained elsewhere, by the same compiler")]
    Release(release::Wish),
    /// Every test that this machine can run: tidy, unit, kernel programs, other kernels, end to end
    ///
    /// Installs what it needs, names what it leaves out and why, prints the minutes of each part and ends with
    /// `N passed, N failed`. Example: cargo xtask test --long
    Test {
        /// Full counts in the tests that repeat something (20 kills instead of 5)
        #[arg(long)]
        long: bool,
    },
    /// The end-to-end cases alone: builds the binary, then runs them as root
    ///
    /// Examples: cargo xtask e2e redis postgres, cargo xtask e2e --capture nftables
    E2e {
        /// The rung of capture on which they run: ebpf or nftables; the cases of what nftables has not are named
        #[arg(long, default_value = "ebpf", value_parser = ["ebpf", "nftables"])]
        capture: String,
        /// Full counts in the tests that repeat something
        #[arg(long)]
        long: bool,
        /// Run the cases whose name or group contains one of these
        filter: Vec<String>,
    },
    /// Run the published suites of others, and write down what came of them
    ///
    /// h2spec before both doors of a sidecar and before Envoy: which cases Envoy passes. The mesh tests of Gateway API on a
    /// Kubernetes of its own: the suite's report, in docs/conformance. Both are end-to-end cases as well.
    #[command(after_help = "Examples:
  cargo xtask conformance
  cargo xtask conformance gateway-api
  cargo xtask conformance gateway-api --only MeshTrafficSplit    one test, of which nothing is written down")]
    Conformance(conformance::Wish),
    /// Run the fuzz targets, each for a while; an input that breaks a promise is kept and named
    ///
    /// Example: cargo xtask fuzz --seconds 600 http1
    Fuzz(fuzz::Wish),
    /// Build the kernel programs and put the object into ebpf/prebuilt
    ///
    /// Example: cargo xtask ebpf --check
    Ebpf {
        /// Change nothing; fail where a rebuild differs from the committed object
        #[arg(long)]
        check: bool,
    },
    /// Test the kernel programs on Debian's packaged kernels, in virtual machines by software emulation
    ///
    /// One that is too old must be refused by name. Ends with a table of the kernels and one of the instructions that each
    /// one's verifier goes through. Example: cargo xtask kernels 6.1 newest
    Kernels(kernels::Wish),
    /// The product's image, without a container engine: an OCI archive of one static binary, the same bytes for the same sources
    ///
    /// Prints its path, digest, size and name. Example: cargo xtask image && cargo xtask kube load target/images/*.tar
    Image(image::Wish),
    /// A real Kubernetes of one node on this machine, out of Go modules
    ///
    /// Example: cargo xtask kube up
    #[command(subcommand)]
    Kube(kube::Wish),
    /// Generate the code of the protocols
    Gen {
        /// Change nothing; fail where the committed code is not what would be generated
        #[arg(long)]
        check: bool,
    },
    /// Check what the compiler does not: dependency direction, absences, the top level
    Tidy,
    /// Formatting, clippy with warnings as errors, generated code, licences and sources (cargo-deny)
    Lint,
    /// What CI runs: lint, each fuzz target for a minute, then test
    Ci,
    /// Install what tests and demo need; third-party programs are unpacked under target/, nothing is started
    Setup,
}

/// Why a command ended without having failed technically: what the exit code tells.
#[derive(Debug)]
enum Stop {
    /// The check says no.
    No(String),
    /// Nothing can be meant by what was asked for.
    Usage(String),
    /// The environment cannot: what is missing, and what to do.
    Missing(String),
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::No(text) | Self::Usage(text) | Self::Missing(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Stop {}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&root(), arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            match error.downcast_ref() {
                Some(Stop::Usage(_)) => ExitCode::from(2),
                Some(Stop::Missing(_)) => ExitCode::from(3),
                Some(Stop::No(_)) | None => ExitCode::from(1),
            }
        }
    }
}

fn run(root: &Path, command: Command) -> Result<()> {
    match command {
        Command::Bench(wish) => bench::run(root, &wish),
        Command::Release(wish) => release::run(root, &wish),
        Command::Demo { check } => demo::run(root, check),
        Command::Test { long } => test::run(root, long, test::LeftOut::IsNamed),
        Command::E2e { capture, long, filter } => test::end_to_end(root, long, &capture, &filter),
        Command::Conformance(wish) => conformance::run(root, &wish),
        Command::Fuzz(wish) => fuzz::run(root, &wish),
        Command::Ebpf { check } => ebpf::run(root, check),
        Command::Kernels(wish) => kernels::run(root, &wish),
        Command::Image(wish) => image::run(root, &wish),
        Command::Kube(wish) => kube::run(root, wish),
        Command::Gen { check } => generate::run(root, check),
        Command::Tidy => tidy::run(root),
        Command::Lint => lint::run(root, test::LeftOut::IsNamed),
        Command::Ci => {
            lint::run(root, test::LeftOut::Fails)?;
            fuzz::run(root, &fuzz::Wish::all())?;
            test::run(root, false, test::LeftOut::Fails)
        }
        Command::Setup => {
            setup::run(root, setup::Need::Everything)?;
            kernels::fetch(root);
            if kube::build::has_go() {
                kube::build::run(root)?;
            }
            Ok(())
        }
    }
}

/// The workspace's folder. Cargo says where the package is now; the compiled-in place is for a binary that is run by hand.
fn root() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package.parent().map(Path::to_path_buf).unwrap_or(package)
}
