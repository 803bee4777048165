//! A local pod's cgroups: `app` and `sidecar` below `outrigger/pods/NAMESPACE.NAME` of the cgroup2 hierarchy. They tell
//! the kernel programs who is the sidecar, and whoever removes the pod what to end.
//!
//! Source: the kernel's `Documentation/admin-guide/cgroup-v2.rst` (`cgroup.kill` since Linux 5.14).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use crate::node::peer::cgroup_of;

/// Below the cgroup2 mount, one for each pod.
pub(crate) use crate::model::pod_record::CGROUPS as PODS;

/// Makes the pod's cgroups.
///
/// # Errors
/// The hierarchy is not writable.
pub(crate) fn make(pod: &Path) -> io::Result<()> {
    std::fs::create_dir_all(pod.join("app"))?;
    std::fs::create_dir_all(pod.join("sidecar"))
}

/// Keeps the kernel ready for moves into cgroups as long as it lives.
///
/// The first move after a while waits until all processors have taken notice (an RCU grace period, 10 ms and more), and moves
/// within another such period after it do not: the lock that they take is otherwise kept cheap for whoever forks. A start moves
/// two processes, one after the other, and waited twice. Here a thread with nothing else to do waits instead, while the pod's
/// network is made: it moves this process to where it is, over and over.
#[derive(Debug)]
pub(crate) struct MovesAhead {
    /// Its end ends the thread.
    _until: mpsc::Sender<()>,
}

impl MovesAhead {
    /// `root` is the cgroup2 mount. Where it does nothing, moves wait as ever.
    pub(crate) fn expect(root: &Path) -> Option<Self> {
        let own = cgroup_of(&std::fs::read_to_string("/proc/self/cgroup").ok()?, root)?.join("cgroup.procs");
        let (until, ended) = mpsc::channel();
        let again = move || ended.recv_timeout(MOVE_AGAIN) == Err(mpsc::RecvTimeoutError::Timeout);
        let moving = move || while std::fs::write(&own, "0").is_ok() && again() {};
        std::thread::Builder::new().name("moves".to_owned()).spawn(moving).ok()?;
        Some(Self { _until: until })
    }
}

/// The file to write a process into, open.
///
/// # Errors
/// The cgroup does not stand.
pub(crate) fn entrance(cgroup: &Path) -> io::Result<OwnedFd> {
    Ok(OpenOptions::new().write(true).open(cgroup.join("cgroup.procs"))?.into())
}

/// Ends every process of the cgroup and of those below it, at once. Nothing where none stands.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn kill(cgroup: &Path) -> io::Result<()> {
    match std::fs::write(cgroup.join("cgroup.kill"), "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

/// The processes in the cgroup itself.
pub(crate) fn processes(cgroup: &Path) -> Vec<i32> {
    let text = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// Removes the cgroup and those below it, deepest first, after their last process is gone. Nothing where none stands.
///
/// # Errors
/// Processes are still in it after a moment, or the kernel refuses.
pub(crate) fn remove(cgroup: &Path) -> io::Result<()> {
    for below in children(cgroup) {
        remove(&below)?;
    }
    for attempt in 0.. {
        match std::fs::remove_dir(cgroup) {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            // A killed process leaves its cgroup when it is reaped, a moment later.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempt < ATTEMPTS => std::thread::sleep(PAUSE),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The cgroups directly below.
pub(crate) fn children(cgroup: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(cgroup).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

/// Less than what the kernel stays ready for.
const MOVE_AGAIN: Duration = Duration::from_millis(4);
const ATTEMPTS: u32 = 300;
const PAUSE: Duration = Duration::from_millis(10);
