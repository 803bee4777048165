//! What the programs inside pods have in common: words of a command line in, and an exit code out.

use std::process::ExitCode;

use anyhow::Result;

/// Runs a program with the words of its command line, on one thread, and tells why it failed.
pub fn main(name: &str, run: impl AsyncFnOnce(&[&str]) -> Result<()>) -> ExitCode {
    let ended = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Into::into).and_then(|runtime| {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        tokio::task::LocalSet::new().block_on(&runtime, run(&words))
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}
