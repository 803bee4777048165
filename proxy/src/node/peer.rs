//! Which process stands at the other end of a Unix socket, and in which cgroup it runs, by the kernel's word.
//!
//! Sources: unix(7) `SO_PEERCRED`, pidfd_open(2), cgroups(7), `SO_PEERPIDFD` of Linux 6.5. An id is another process's as soon as
//! its own has ended, so nothing is believed of an id alone: the process is held by a pidfd, and what was read under its id
//! counts if it had not ended afterwards. Older kernels give none with the socket; there it is opened by the id when the
//! connection is accepted, and what is left is the time between the two calls.
//!
//! The process is the one that connected. Who is handed a connected socket speaks for that one for as long as it lives.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{UCred, sockopt};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::kubernetes;
use crate::base::sockopt::peer_process;

/// A process at the other end of a connection.
#[derive(Debug)]
pub(crate) struct Peer {
    /// For people.
    pub(crate) pid: u32,
    process: OwnedFd,
}

impl Peer {
    /// Who connected `stream`.
    ///
    /// # Errors
    /// It has ended, or the kernel does not tell.
    pub(crate) fn of(stream: &impl AsFd) -> io::Result<Self> {
        let UCred { pid, .. } = sockopt::socket_peercred(stream)?;
        match peer_process(stream) {
            Ok(process) => Ok(Self { pid: number(pid), process }),
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Self::with_id(pid),
            Err(error) => Err(error),
        }
    }

    fn with_id(pid: Pid) -> io::Result<Self> {
        Ok(Self { pid: number(pid), process: pidfd_open(pid, PidfdFlags::empty())? })
    }

    /// What `/proc/PID/cgroup` says of it now.
    ///
    /// # Errors
    /// It has ended, or the file cannot be read.
    pub(crate) fn proc_cgroup(&self) -> io::Result<String> {
        let text = std::fs::read_to_string(format!("/proc/{}/cgroup", self.pid))?;
        // A pidfd can be read once its process has ended; until then nobody else had the id.
        let mut ended = [PollFd::new(&self.process, PollFlags::IN)];
        match poll(&mut ended, Some(&Timespec::default()))? {
            0 => Ok(text),
            _ended => Err(io::Error::new(io::ErrorKind::NotFound, "the process has ended")),
        }
    }

    /// Its cgroup2 folder, if that can be told: of a process in a container of Kubernetes the container's.
    pub(crate) fn cgroup(&self, root: &Path) -> Option<PathBuf> {
        let text = self.proc_cgroup().ok()?;
        kubernetes::container_of(&text, root).or_else(|| cgroup_of(&text, root))
    }
}

fn number(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get().unsigned_abs()
}

/// The cgroup2 folder in a `/proc/PID/cgroup`: its line has hierarchy 0 and no controllers (cgroups(7)).
pub(crate) fn cgroup_of(proc_cgroup: &str, root: &Path) -> Option<PathBuf> {
    let path = proc_cgroup.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(root.join(path))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn whoever_connected_is_found_with_its_cgroup() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).unwrap();
        assert_eq!(peer.pid, std::process::id());
        assert_eq!(peer.proc_cgroup().unwrap(), std::fs::read_to_string("/proc/self/cgroup").unwrap());
    }

    #[test]
    fn of_a_process_that_has_ended_nothing_is_believed_whoever_has_its_id() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let peer = Peer::with_id(Pid::from_child(&child)).unwrap();
        assert!(peer.proc_cgroup().is_ok());
        child.kill().unwrap();
        child.wait().unwrap();
        // As if its id were this very process's by now.
        let reused = Peer { pid: std::process::id(), ..peer };
        assert_eq!(reused.proc_cgroup().unwrap_err().to_string(), "the process has ended");
        assert_eq!(reused.cgroup(Path::new("/sys/fs/cgroup")), None);
    }

    /// Its own process: it connects, waits for a byte and ends.
    #[test]
    #[ignore = "run by the test below, to end while its connection is looked at"]
    fn connects_and_ends() {
        let Some(path) = std::env::var_os(DOOR) else { return };
        let mut stream = UnixStream::connect(path).unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }

    const DOOR: &str = "OUTRIGGER_TEST_DOOR";
    /// The next process of this namespace gets the id behind that one. Root may say which that is.
    const LAST_ID: &str = "/proc/sys/kernel/ns_last_pid";

    #[test]
    fn who_gets_the_id_of_a_process_that_connected_and_ended_is_not_taken_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("door");
        let door = UnixListener::bind(&path).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "--ignored", "node::peer::tests::connects_and_ends"]).stdout(Stdio::null());
        let mut child = child.env(DOOR, &path).spawn().unwrap();
        let (mut stream, _unnamed) = door.accept().unwrap();
        let before = Peer::of(&stream).unwrap();
        assert!(before.pid == child.id() && before.proc_cgroup().is_ok());
        stream.write_all(&[0]).unwrap();
        assert!(child.wait().unwrap().success());
        // Others of the machine may be faster to it.
        let next = || {
            std::fs::write(LAST_ID, (before.pid - 1).to_string()).ok()?;
            let next = Command::new("sleep").arg("100").spawn().unwrap();
            Some(next)
        };
        let mut reused = None;
        for _attempt in 0..100 {
            let Some(mut next) = next() else { break };
            if next.id() == before.pid {
                reused = Some(next);
                break;
            }
            next.kill().unwrap();
            next.wait().unwrap();
        }
        let Some(mut reused) = reused else {
            io::stdout().write_all(b"\nleft out: an id that is used again, which root alone can have done\n").unwrap();
            return;
        };
        let root = Path::new("/sys/fs/cgroup");
        let text = std::fs::read_to_string(format!("/proc/{}/cgroup", before.pid));
        // Who was asked about before, and who is asked about only now; or the kernel gives nothing of a process that is gone.
        let after = Peer::of(&stream).ok();
        let believed: Vec<_> = [Some(&before), after.as_ref()].into_iter().flatten().map(|peer| peer.cgroup(root)).collect();
        reused.kill().unwrap();
        reused.wait().unwrap();
        assert!(text.is_ok(), "the id is nobody's: {text:?}");
        assert!(believed.iter().all(Option::is_none), "{believed:?}");
    }

    #[test]
    fn a_process_is_found_in_its_cgroup_on_pure_and_hybrid_hosts() {
        let root = Path::new("/sys/fs/cgroup");
        assert_eq!(cgroup_of("0::/outrigger/pods/a.b/sidecar\n", root), Some(root.join("outrigger/pods/a.b/sidecar")));
        assert_eq!(cgroup_of("4:memory:/x\n1:name=systemd:/y\n0::/\n", root), Some(root.join("")));
        assert_eq!(cgroup_of("4:memory:/x\n", root), None);
    }
}
