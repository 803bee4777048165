//! The end-to-end cases. Run them with `cargo xtask e2e [NAME]...`.
#![expect(clippy::print_stdout, reason = "a test runner speaks on its standard output")]

use std::process::ExitCode;

use e2e::runner::{Runner, Wish};

fn main() -> ExitCode {
    if !rustix::process::geteuid().is_root() {
        println!("left out: the end-to-end cases need root");
        println!("\ntest result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s");
        return ExitCode::SUCCESS;
    }
    let runner = Runner::new(Wish::from_arguments());
    if runner.finish() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
