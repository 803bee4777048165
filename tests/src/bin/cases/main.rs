//! The end-to-end cases. Run them with `cargo xtask e2e [NAME]...`.
#![expect(clippy::print_stdout, reason = "a test runner speaks on its standard output")]
#![expect(clippy::indexing_slicing, reason = "a field that a JSON value does not have reads as null")]
#![expect(clippy::disallowed_types, reason = "real programs are waited for in real time")]

use std::process::ExitCode;

use e2e::runner::{Runner, Wish};

mod bad_input;
mod capture;
mod cluster;
mod conformance;
mod corpus;
mod crowd;
mod enrolment;
mod explicit;
mod faults;
mod fidelity;
mod gamma;
mod hangups;
mod hold;
mod ladder;
mod life;
mod limits;
mod neighbours;
mod observability;
mod policies;
mod proof;
mod spire;
mod strangers;
mod third_party;
mod tools;
mod upgrade;
mod world;

const HELP: &str = "The end-to-end cases, each on real namespaces, kernel programs and processes; needs root.

Usage: cases [--list] [--long] [--without=GROUP] [NAME]...

  NAME             runs the cases of which GROUP::CASE contains one of these; all where there is none
  --list           names them and runs nothing
  --long           full counts, and the cases that take minutes
  --without=GROUP  leaves a group to another run

Other flags of a test runner are passed over. `cargo xtask e2e` builds what the cases need first.";

fn main() -> ExitCode {
    if std::env::args().any(|argument| matches!(argument.as_str(), "-h" | "--help")) {
        println!("{HELP}");
        return ExitCode::SUCCESS;
    }
    if !rustix::process::geteuid().is_root() {
        println!("left out: the end-to-end cases need root");
        println!("\ntest result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s");
        return ExitCode::SUCCESS;
    }
    let mut runner = Runner::new(Wish::from_arguments());
    life::run(&mut runner);
    capture::run(&mut runner);
    proof::run(&mut runner);
    ladder::run(&mut runner);
    explicit::run(&mut runner);
    enrolment::run(&mut runner);
    limits::run(&mut runner);
    crowd::run(&mut runner);
    neighbours::run(&mut runner);
    bad_input::run(&mut runner);
    third_party::run(&mut runner);
    fidelity::run(&mut runner);
    strangers::run(&mut runner);
    conformance::run(&mut runner);
    gamma::run(&mut runner);
    policies::run(&mut runner);
    observability::run(&mut runner);
    tools::run(&mut runner);
    faults::run(&mut runner);
    hold::run(&mut runner);
    hangups::run(&mut runner);
    upgrade::run(&mut runner);
    spire::run(&mut runner);
    cluster::run(&mut runner);
    if runner.finish() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
