//! What brings the pods' connections to their sidecars: the rung of the ladder that the agent stands on, behind one
//! interface. Which one it is, is decided once, at the agent's start.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use parking_lot::Mutex;
use proxy_common::counters::Counters;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::NodeError;
use super::kernel::{self, Flows, Kernel, KernelError, PodEntry, Watch};
use super::ladder::{Fall, Ladder, Rung, Standing};
use super::nftables::{Nftables, NftablesError};
use super::pods::Pod;
use crate::base::names::Named;
use crate::base::state;

/// The agent's own hold on its rung.
#[derive(Debug)]
pub(crate) enum Capture {
    /// Locked for one system call or a few, never across a wait.
    Ebpf(Box<Mutex<Kernel>>),
    Nftables(Nftables),
    /// Nothing is captured.
    Explicit,
}

/// What is needed to step on a rung.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ground<'a> {
    /// The folder for pins; a bpffs is mounted on it.
    pub(crate) pins: &'a Path,
    pub(crate) options: kernel::Options,
}

/// Steps on the first of `rungs` that holds. What holds for a reason that another rung would not mend ends the agent.
///
/// # Errors
/// The last of them does not hold.
pub(crate) fn climb(rungs: &[Rung], cgroup_root: &Path, ground: Ground<'_>) -> Result<(Capture, Vec<Fall>), NodeError> {
    let mut fallen = Vec::new();
    for (place, rung) in rungs.iter().enumerate() {
        let is_last = place + 1 == rungs.len();
        let error = match rung {
            Rung::Ebpf => match open(cgroup_root, ground) {
                Ok(kernel) => return Ok((Capture::Ebpf(Box::new(Mutex::new(kernel))), fallen)),
                Err(error) if is_last || !error.is_for_another_rung() => return Err(error.into()),
                Err(error) => error.fall(),
            },
            Rung::Nftables => match Nftables::open(cgroup_root) {
                Ok(nftables) => return Ok((Capture::Nftables(nftables), fallen)),
                Err(error) if is_last => return Err(error.into()),
                Err(error) => fall(&error),
            },
            Rung::Explicit => return Ok((Capture::Explicit, fallen)),
        };
        warn!(rung = error.rung.word(), error = error.text, remedy = error.remedy, "a rung of capture does not hold");
        fallen.push(error);
    }
    Err(NodeError::Ended("no way to capture was asked for".to_owned()))
}

fn open(cgroup_root: &Path, ground: Ground<'_>) -> Result<Kernel, KernelError> {
    kernel::mount_bpffs(ground.pins)?;
    Kernel::open(ground.pins, cgroup_root, ground.options)
}

/// Why nftables does not hold.
pub(crate) fn fall(error: &NftablesError) -> Fall {
    Fall {
        rung: Rung::Nftables,
        kernel: kernel::release(),
        text: super::chain(error),
        remedy: error.remedy().to_owned(),
        ..Fall::default()
    }
}

impl Capture {
    /// Where that is.
    pub(crate) const fn rung(&self) -> Rung {
        match self {
            Self::Ebpf(_) => Rung::Ebpf,
            Self::Nftables(_) => Rung::Nftables,
            Self::Explicit => Rung::Explicit,
        }
    }

    /// Takes a pod's connections from here on. Idempotent.
    ///
    /// # Errors
    /// The pod is to stay closed.
    pub(crate) fn enrol(&self, pod: &PodEntry<'_>) -> Result<Watch, NodeError> {
        match self {
            Self::Ebpf(kernel) => Ok(kernel.lock().enrol(pod)?),
            Self::Nftables(nftables) => Ok(nftables.enrol(pod)?),
            Self::Explicit if pod.capture.enforce => Err(NodeError::CannotEnforce),
            Self::Explicit => Ok(Watch::Not("nothing is captured".to_owned())),
        }
    }

    /// Gives what arrives at the pod to `listener`.
    ///
    /// # Errors
    /// The kernel does not take it.
    pub(crate) fn register_listener(&self, cookie: u64, listener: BorrowedFd<'_>) -> Result<(), NodeError> {
        match self {
            Self::Ebpf(kernel) => Ok(kernel.lock().register_listener(cookie, listener)?),
            Self::Nftables(nftables) => Ok(nftables.register_listener(listener)?),
            Self::Explicit => Ok(()),
        }
    }

    /// Forgets a pod that is gone. Idempotent.
    ///
    /// # Errors
    /// Something of it stays.
    pub(crate) fn withdraw(&self, cookie: u64) -> Result<(), KernelError> {
        match self {
            Self::Ebpf(kernel) => kernel.lock().withdraw(cookie),
            Self::Nftables(nftables) => {
                nftables.forget(cookie);
                Ok(())
            }
            Self::Explicit => Ok(()),
        }
    }

    /// The programs of the kernel, where they capture.
    pub(crate) const fn kernel(&self) -> Option<&Mutex<Kernel>> {
        match self {
            Self::Ebpf(kernel) => Some(kernel),
            Self::Nftables(_) | Self::Explicit => None,
        }
    }

    /// What was counted for a pod.
    pub(crate) fn counters(&self, pod: &Pod) -> Option<Counters> {
        let cookie = pod.record.netns_cookie;
        match self {
            Self::Ebpf(kernel) => kernel.lock().counters(cookie).ok().flatten(),
            Self::Nftables(nftables) => nftables.counters(cookie, pod.record.netns.as_deref()?),
            Self::Explicit => None,
        }
    }

    /// The flow records, for one reader; inside a runtime.
    ///
    /// # Errors
    /// They cannot be read.
    pub(crate) fn flows(&self) -> Result<Option<Flows>, KernelError> {
        match self {
            Self::Ebpf(kernel) => kernel.lock().flows().map(Some),
            Self::Nftables(_) | Self::Explicit => Ok(None),
        }
    }
}

/// What the agent wrote down of its rung, for the one after it: pods outlive agents.
#[derive(Debug, Deserialize, Serialize)]
struct Written {
    rung: Rung,
}

/// Where the agent will stand: what was asked for, held against what pods that run stand on.
///
/// # Errors
/// They stand on another rung than the one asked for.
pub(crate) fn rungs(asked: Ladder, state: &Path, running: Option<Named>) -> Result<Vec<Rung>, NodeError> {
    // Of before there was a ladder, or of a mesh that never ran: then there is nothing to be held against.
    let written = fs::read(state.join(STANDING)).ok().and_then(|bytes| serde_json::from_slice::<Written>(&bytes).ok());
    let running = running.map(|pod| (written.map_or(Rung::Ebpf, |written| written.rung), pod));
    Ok(asked.rungs(running)?)
}

/// Writes down where the agent stands.
///
/// # Errors
/// The file cannot be written.
pub(crate) fn write_down(standing: &Standing, folder: &Path) -> io::Result<()> {
    state::write_atomic(&folder.join(STANDING), &serde_json::to_vec(&Written { rung: standing.rung })?, 0o600)
}

/// In the folder of the mesh's state.
pub(crate) const STANDING: &str = "capture.json";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_agent_stays_where_pods_that_run_are() {
        let folder = tempfile::tempdir().unwrap();
        let web = || Some(Named::new("shop", "web"));
        assert_eq!(rungs(Ladder::Auto, folder.path(), web()).unwrap(), [Rung::Ebpf]);
        let standing = Standing { rung: Rung::Nftables, ..Standing::default() };
        write_down(&standing, folder.path()).unwrap();
        assert_eq!(rungs(Ladder::Auto, folder.path(), web()).unwrap(), [Rung::Nftables]);
        let refused = rungs(Ladder::Only(Rung::Ebpf), folder.path(), web()).unwrap_err();
        assert!(refused.remedy().contains("--capture nftables"), "{refused}");
        // Without pods nothing holds it there.
        assert_eq!(rungs(Ladder::Auto, folder.path(), None).unwrap(), Rung::ALL);
    }

    #[test]
    fn a_machine_without_a_bpffs_falls_by_name() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let pins = folder.path().join("pins");
        fs::write(&pins, "no folder").unwrap();
        let ground = Ground { pins: &pins, options: kernel::Options::default() };
        let (capture, fallen) = climb(&[Rung::Ebpf, Rung::Explicit], Path::new("/sys/fs/cgroup"), ground).unwrap();
        assert_eq!(capture.rung(), Rung::Explicit);
        let [fall] = fallen.as_slice() else { panic!("{fallen:?}") };
        assert_eq!((fall.rung, fall.errno, fall.kernel.as_str()), (Rung::Ebpf, Some(libc::EEXIST), kernel::release().as_str()));
        assert!(fall.text.contains("pins") && !fall.remedy.is_empty(), "{fall:?}");
        assert!(Kernel::remove_all(&pins).is_ok(), "there is nothing to take away");
        // Asked for alone, it is an error.
        assert!(matches!(climb(&[Rung::Ebpf], Path::new("/sys/fs/cgroup"), ground), Err(NodeError::Kernel(_))));
    }
}
