//! nft(8): found, and run inside a pod's network namespace within a time limit.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::NftablesError;
use crate::node::netns;

/// The program, where it was found.
#[derive(Clone, Debug)]
pub(super) struct Nft(PathBuf);

impl Nft {
    /// Where the caller's programs are found, or where distributions put it: a path without `/usr/sbin` is common.
    ///
    /// # Errors
    /// It is nowhere, or does not start.
    pub(super) fn find() -> Result<Self, NftablesError> {
        for path in ["nft", "/usr/sbin/nft", "/sbin/nft"] {
            match spawn(Path::new(path), &["--version"], "") {
                Ok(output) if output.status.success() => return Ok(Self(path.into())),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Ok(output) => return Err(NftablesError::refused("tell its version", &output)),
                Err(source) => return Err(NftablesError::Program { source }),
            }
        }
        Err(NftablesError::Missing)
    }

    /// Loads `ruleset` in the network namespace of this thread, whole or not at all.
    pub(super) fn load_here(&self, ruleset: &str) -> Result<(), NftablesError> {
        self.here("load the ruleset of a pod", &["-f", "-"], ruleset).map(drop)
    }

    /// What stands there of `table`, as JSON.
    pub(super) fn list_here(&self, table: &str) -> Result<String, NftablesError> {
        self.here("list the ruleset of a pod", &["-j", "list", "table", "inet", table], "")
    }

    /// [`Self::load_here`], in another namespace.
    pub(super) fn load(&self, netns: impl AsFd, ruleset: &str) -> Result<(), NftablesError> {
        inside(netns, || self.load_here(ruleset))
    }

    /// [`Self::list_here`], in another namespace.
    pub(super) fn list(&self, netns: &File, table: &str) -> Result<String, NftablesError> {
        inside(netns, || self.list_here(table))
    }

    /// What stands there of the counters of `table` alone, as JSON: far less than all of it.
    pub(super) fn count(&self, netns: &File, table: &str) -> Result<String, NftablesError> {
        let counters = ["-j", "list", "counters", "table", "inet", table];
        inside(netns, || self.here("list the counters of a pod", &counters, ""))
    }

    fn here(&self, what: &'static str, arguments: &[&str], input: &str) -> Result<String, NftablesError> {
        let output = spawn(&self.0, arguments, input).map_err(|source| NftablesError::Program { source })?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(NftablesError::refused(what, &output))
        }
    }
}

fn inside<T: Send>(netns: impl AsFd, work: impl FnOnce() -> Result<T, NftablesError> + Send) -> Result<T, NftablesError> {
    netns::inside(netns, || Ok(work())).map_err(|source| NftablesError::Namespace { source })?
}

/// Runs a program to its end, or ends it.
fn spawn(program: &Path, arguments: &[&str], input: &str) -> io::Result<Output> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // What it says is read, and told.
        .env("LC_ALL", "C")
        .spawn()?;
    let process = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    let (send, receive) = mpsc::channel();
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
    // Both of its outputs are read by a thread of their own, so that a full pipe cannot hold it.
    std::thread::spawn(move || send.send(child.wait_with_output()));
    match receive.recv_timeout(ANSWER_AT_MOST) {
        // Who ended before it read everything says why.
        Ok(Ok(output)) if !output.status.success() => Ok(output),
        Ok(output) => written.and(output),
        Err(_late) => {
            pidfd_send_signal(&process, Signal::KILL)?;
            Err(io::ErrorKind::TimedOut.into())
        }
    }
}

const ANSWER_AT_MOST: Duration = Duration::from_secs(5);
