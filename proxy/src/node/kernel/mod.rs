//! The kernel programs: load, attach once at the cgroup2 root, pin, enrol pods, take listeners, remove. With `maps.rs`
//! the only file that knows aya.
//!
//! Sources: the kernel's `Documentation/bpf/{prog_sk_lookup,prog_cgroup_sockopt}.rst` and `include/uapi/linux/bpf.h`.
//! Invariant: what is pinned goes on without this process; a pod is enrolled before its sidecar starts, so that nothing
//! of it is ever uncaptured, and nothing is detached while its pod runs.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use proxy_common::counters::Counters;

/// The loaded programs and their maps, pinned. Dropping it detaches nothing.
#[derive(Debug)]
pub(crate) struct Kernel {
    pins: PathBuf,
}

/// How to load.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    /// The programs write rare events into the log (see [`Kernel::log`]). Decided when the programs are loaded.
    pub(crate) log: bool,
}

/// A pod to enrol.
#[derive(Debug)]
pub(crate) struct PodEntry<'a> {
    /// Cookie of its network namespace (`SO_NETNS_COOKIE` of a socket made in it).
    pub(crate) cookie: u64,
    /// Its IPv4 address.
    pub(crate) v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub(crate) v6: Option<Ipv6Addr>,
    /// The cgroup2 folder whose tasks are its sidecar; the folder's inode is the cgroup's id.
    pub(crate) sidecar_cgroup: &'a Path,
    /// Its network namespace (`/run/netns/…`, `/proc/PID/ns/net`, or `SIOCGSKNS` of a socket).
    pub(crate) netns: BorrowedFd<'a>,
}

/// A pod that is enrolled, as the maps say.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Enrolled {
    /// Cookie of its network namespace.
    pub(crate) cookie: u64,
    /// Its IPv4 address.
    pub(crate) v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub(crate) v6: Option<Ipv6Addr>,
    /// Id of its sidecar's cgroup.
    pub(crate) sidecar_cgroup_id: u64,
}

/// Why capture does not work. Every variant is the environment's fault; [`KernelError::remedy`] says what helps.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    /// There is no cgroup2 hierarchy.
    #[error("no cgroup2 hierarchy is mounted")]
    NoCgroup2,
}

impl KernelError {
    /// What the operator can do about it: one sentence.
    pub(crate) fn remedy(&self) -> String {
        String::new()
    }
}

impl Kernel {
    /// Loads the programs, attaches them once at `cgroup_root` and pins all of it under `pins`, a folder on a bpffs (see
    /// [`mount_bpffs`]). Where pins of the same layout stand, adopts them: attached programs go on untouched if they are
    /// of this build, else each is replaced in place.
    pub(crate) fn open(pins: &Path, cgroup_root: &Path, options: Options) -> Result<Self, KernelError> {
        _ = (pins, cgroup_root, options);
        Err(KernelError::NoCgroup2)
    }

    /// Enrols a pod: from here its connections go to its sidecar, and what arrives is dropped until a listener is
    /// registered. Idempotent; a changed address or cgroup replaces the former.
    pub(crate) fn enrol(&mut self, pod: &PodEntry<'_>) -> Result<(), KernelError> {
        _ = pod;
        Err(KernelError::NoCgroup2)
    }

    /// Gives what arrives at the pod's addresses to `listener`. The kernel forgets it when its last descriptor closes.
    pub(crate) fn register_listener(&mut self, cookie: u64, listener: BorrowedFd<'_>) -> Result<(), KernelError> {
        _ = (cookie, listener);
        Err(KernelError::NoCgroup2)
    }

    /// Forgets a pod. Only for a pod that is gone: a running one would be open afterwards. Idempotent.
    pub(crate) fn withdraw(&mut self, cookie: u64) -> Result<(), KernelError> {
        _ = cookie;
        Err(KernelError::NoCgroup2)
    }

    /// The enrolled pods, by cookie.
    pub(crate) fn enrolled(&self) -> Result<Vec<Enrolled>, KernelError> {
        Err(KernelError::NoCgroup2)
    }

    /// What the programs counted for a pod since its enrolment, summed over CPUs; `None` if it is not enrolled.
    pub(crate) fn counters(&self, cookie: u64) -> Result<Option<Counters>, KernelError> {
        _ = (cookie, &self.pins);
        Err(KernelError::NoCgroup2)
    }

    /// Detaches every program and removes every pin below `pins`. Safe after a crash and where nothing stands.
    /// Only when no pod runs any more: a running one would be open afterwards.
    pub(crate) fn remove_all(pins: &Path) -> Result<(), KernelError> {
        _ = pins;
        Err(KernelError::NoCgroup2)
    }
}

/// Where cgroup2 is mounted: `/sys/fs/cgroup` on most systems, `/sys/fs/cgroup/unified` on hybrid ones.
pub(crate) fn find_cgroup2() -> Result<PathBuf, KernelError> {
    Err(KernelError::NoCgroup2)
}

/// Mounts a bpffs of our own at `folder`, which is made if missing; nothing where one stands.
pub(crate) fn mount_bpffs(folder: &Path) -> Result<(), KernelError> {
    _ = folder;
    Err(KernelError::NoCgroup2)
}
