//! `--detach`: the same command goes on as a process of its own, and the one that was called returns once it is ready.
//!
//! The process that goes on reports on its standard output, which is a pipe to the caller, and then turns its outputs to
//! a log: the end of the pipe is the news. What fails before is told on the caller's own standard error.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use super::super::{Failure, print};
use super::pod::cannot;

/// Set in the environment of the process that goes on.
pub(crate) const MARK: &str = "OUTRIGGER_DETACHED";

/// Is this the process that goes on?
pub(crate) fn is_detached() -> bool {
    std::env::var_os(MARK).is_some()
}

/// The process that goes on leaves the terminal's session: nothing pressed there reaches it any more.
pub(crate) fn leave_the_terminal() {
    // It fails only for the leader of a group, which a process just started by its own command is not.
    if is_detached() && rustix::process::setsid().is_err() {}
}

/// Starts this command again in the background and waits until it reports.
///
/// # Errors
/// It cannot be started.
pub(crate) fn go_on() -> Result<ExitCode, Failure> {
    let mut command = Command::new("/proc/self/exe");
    command.args(std::env::args_os().skip(1)).env(MARK, "1").stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|error| cannot("start in the background", &error))?;
    let mut report = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_string(&mut report).map_err(|error| cannot("hear from the background", &error))?;
    }
    if report.is_empty() {
        let status = child.wait().map_err(|error| cannot("hear from the background", &error))?;
        let code = status.code().or(status.signal().map(|signal| 128 + signal)).and_then(|code| u8::try_from(code).ok());
        return Ok(ExitCode::from(code.unwrap_or(1)));
    }
    print(&report)?;
    Ok(ExitCode::SUCCESS)
}

/// Reports to the caller, which returns, and turns both outputs to the file `log`.
///
/// # Errors
/// The log cannot be opened.
pub(crate) fn report(text: &str, log: &Path) -> Result<(), Failure> {
    print(text)?;
    let log = File::options().create(true).append(true).open(log).map_err(|error| cannot("open the log", &error))?;
    rustix::stdio::dup2_stdout(&log).map_err(|error| cannot("turn to the log", &error.into()))?;
    rustix::stdio::dup2_stderr(&log).map_err(|error| cannot("turn to the log", &error.into()))
}
