//! `outrigger explain`: what would happen to a request, and by which rule.

use std::process::ExitCode;

use clap::Args;

use super::Failure;

#[derive(Args, Debug)]
pub(crate) struct ExplainArgs {}

pub(crate) fn run(_args: ExplainArgs) -> Result<ExitCode, Failure> {
    Err(Failure::environment("this build has no `explain`", "use a later build"))
}
