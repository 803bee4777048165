//! Entering a pod: its network namespace for a moment (to make a socket there, to ask for its cookie), or for good, as
//! the last thing a new process does before it becomes the pod's program.
//!
//! Sources: setns(2), network_namespaces(7), mount_namespaces(7), capabilities(7), close_range(2); `SO_NETNS_COOKIE` since
//! Linux 5.14, `SIOCGSKNS` of `include/uapi/linux/sockios.h`. Invariant: what starts here has the three standard streams open and nothing else.
//! A namespace belongs to a thread. Whoever enters one here is a thread of its own that ends there, so no thread of a
//! runtime is ever left in a pod.

#![expect(unsafe_code, reason = "a socket option that no safe interface has, and the code between fork and exec")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
use rustix::process::{Gid, Signal, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets, LinkNameSpaceType, UnshareFlags};

/// What surrounds a process from its first instruction on.
#[derive(Debug)]
pub(crate) struct Surroundings {
    pub(crate) netns: OwnedFd,
    /// The file `cgroup.procs` of its cgroup, open for writing.
    pub(crate) cgroup: OwnedFd,
    /// In a mount namespace of its own, each second path shows what the first one holds.
    pub(crate) shown: Vec<(CString, CString)>,
    /// The user and group that it becomes, without any capability and without a way back.
    pub(crate) confined_to: Option<(u32, u32)>,
    /// Sent to it when its parent is gone.
    pub(crate) when_orphaned: Option<Signal>,
    /// Leads a session of its own: a terminal's signals pass it by.
    pub(crate) own_session: bool,
}

/// The cookie of the network namespace that `socket` belongs to.
///
/// # Errors
/// It is no socket, or the kernel is older than 5.14.
pub(crate) fn cookie_of_socket(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: the kernel writes at most `length` bytes, the size of `cookie`, and both live through the call.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if outcome == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// The network namespace that `socket` belongs to, open.
///
/// # Errors
/// It is no socket, or the caller lacks `CAP_NET_ADMIN`.
pub(crate) fn of_socket(socket: impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument, and answers with a descriptor of its own or an error.
    let answer = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), SIOCGSKNS, 0) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(answer) })
}

/// Is the user namespace that owns `netns` the caller's own? One that somebody made for himself in a pod is owned by another.
///
/// Source: ioctl_ns(2), `NS_GET_USERNS`, which asks for no right.
///
/// # Errors
/// It is no namespace, or its owner is none that the caller may see.
pub(crate) fn is_of_own_user_namespace(netns: impl AsFd) -> io::Result<bool> {
    // SAFETY: the request takes no argument, and answers with a descriptor of its own or an error.
    let answer = unsafe { libc::ioctl(netns.as_fd().as_raw_fd(), NS_GET_USERNS) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    let owner = unsafe { OwnedFd::from_raw_fd(answer) };
    Ok(inode(owner)? == inode(File::open("/proc/self/ns/user")?)?)
}

/// `_IO(0xb7, 1)` of `include/uapi/linux/nsfs.h`.
const NS_GET_USERNS: libc::Ioctl = 0xb701;

/// The inode of an open network namespace.
///
/// # Errors
/// The kernel does not tell.
pub(crate) fn inode(netns: impl AsFd) -> io::Result<u64> {
    Ok(rustix::fs::fstat(netns)?.st_ino)
}

/// Lets go of every capability but `kept`, for good. Before the process has threads: each has its own.
///
/// # Errors
/// Some of `kept` is not there, or the kernel refuses.
pub(crate) fn keep_capabilities(kept: CapabilitySet) -> io::Result<()> {
    rustix::thread::clear_ambient_capability_set()?;
    bound_capabilities(kept);
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: none })?;
    rustix::thread::set_no_new_privs(true)?;
    Ok(())
}

/// The cookie of a network namespace.
///
/// # Errors
/// The namespace cannot be entered, or the kernel is older than 5.14.
pub(crate) fn cookie(netns: &File) -> io::Result<u64> {
    inside(netns, || cookie_of_socket(&UdpSocket::bind("127.0.0.1:0")?))
}

/// Does `work` inside the namespace, on a thread of its own, and waits for it.
///
/// # Errors
/// The namespace cannot be entered (it needs `CAP_SYS_ADMIN`), or the work fails.
pub(crate) fn inside<T: Send>(netns: impl AsFd, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let netns = netns.as_fd();
    apart(|| {
        rustix::thread::move_into_link_name_space(netns, Some(LinkNameSpaceType::Network))?;
        work()
    })
}

/// Does `work` inside a new namespace, which is gone when nothing is left in it.
///
/// # Errors
/// None can be made (it needs `CAP_SYS_ADMIN`), or the work fails.
pub(crate) fn in_a_new_one<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    apart(|| {
        // SAFETY: of what this process shares, only the network of this very thread is unshared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
        work()
    })
}

/// Does `visit` on a thread that ends with it.
fn apart<T: Send>(visit: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| match scope.spawn(visit).join() {
        Ok(outcome) => outcome,
        Err(_panic) => Err(io::Error::other("the work inside the namespace did not end")),
    })
}

/// Closes what this process inherited beyond its three standard streams: a lock, a pipe or a socket of whoever called it
/// would live for as long as it and what it starts do. Only as the first thing of a command.
///
/// # Errors
/// The kernel is older than 5.9, or a filter of system calls is in the way.
pub(crate) fn close_inherited() -> io::Result<()> {
    close_from_three(0)
}

/// Puts what `command` starts into `surroundings` before it runs. A step that fails makes the start fail.
pub(crate) fn surround(command: &mut Command, surroundings: Surroundings) {
    // SAFETY: between fork and exec only system calls may be made, nothing that allocates or locks. `enter` makes
    // system calls on descriptors and C strings that were made before the fork.
    unsafe { command.pre_exec(move || enter(&surroundings)) };
}

/// What `command` starts leads a session of its own, and is sent `signal` when its parent is gone.
pub(crate) fn orphan_with(command: &mut Command, signal: Signal) {
    let leave = move || {
        rustix::process::setsid()?;
        rustix::process::set_parent_process_death_signal(Some(signal))?;
        close_from_three(libc::CLOSE_RANGE_CLOEXEC)
    };
    // SAFETY: as in `surround`: three system calls.
    unsafe { command.pre_exec(leave) };
}

fn enter(surroundings: &Surroundings) -> io::Result<()> {
    let Surroundings { netns, cgroup, shown, confined_to, when_orphaned, own_session } = surroundings;
    // The cgroup first: the capture programs know a sidecar by it, and no socket may exist before.
    rustix::io::write(cgroup, b"0")?;
    rustix::thread::move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
    if !shown.is_empty() {
        // SAFETY: neither the file descriptor table nor anything else that this process shares is unshared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
        // What the machine unmounts later goes here too; what is mounted here stays here.
        mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
        for (source, target) in shown {
            mount_bind(source.as_c_str(), target.as_c_str())?;
        }
    }
    if *own_session {
        rustix::process::setsid()?;
    }
    if let Some((user, group)) = confined_to {
        confine(*user, *group)?;
    }
    // After the change of user, which would reset it.
    if when_orphaned.is_some() {
        rustix::process::set_parent_process_death_signal(*when_orphaned)?;
    }
    // The descriptors of this very function are still needed until the program starts, and so is the pipe that tells
    // whether it did.
    close_from_three(libc::CLOSE_RANGE_CLOEXEC)
}

/// close_range(2) of everything but the standard streams. By its number, because C libraries have it since 2021 only.
fn close_from_three(flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: takes plain numbers only. Nothing of this process is closed under its owner: with `CLOSE_RANGE_CLOEXEC`
    // nothing is closed now, and without it the caller has opened nothing yet.
    let outcome = unsafe { libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, libc::c_uint::MAX, flags) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn confine(user: u32, group: u32) -> io::Result<()> {
    rustix::thread::clear_ambient_capability_set()?;
    bound_capabilities(CapabilitySet::empty());
    let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(group, group, group)?;
    // Leaving user 0 clears the permitted and the effective set.
    rustix::thread::set_thread_res_uid(user, user, user)?;
    // What could be handed on to a program with capabilities of its own stayed.
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    rustix::thread::set_no_new_privs(true)?;
    Ok(())
}

/// No program that this one becomes gets a capability that is not `kept`, as far as this one may say so.
fn bound_capabilities(kept: CapabilitySet) {
    for capability in 0..64_u32 {
        if kept.bits() & (1 << capability) != 0 {
            continue;
        }
        // SAFETY: takes plain numbers only. The kernel answers EINVAL for the first number that it has no capability for.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) } != 0 {
            break;
        }
    }
}

const SIOCGSKNS: libc::Ioctl = 0x894c;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_tells_its_namespace_and_a_file_does_not() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(cookie_of_socket(&socket).unwrap(), cookie_of_socket(&other).unwrap());
        assert!(cookie_of_socket(File::open("/dev/null").unwrap()).is_err());
    }

    #[test]
    fn a_socket_tells_which_namespace_it_is_from_without_anybody_entering_it() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let own = inode(File::open("/proc/self/ns/net").unwrap()).unwrap();
        assert_eq!(inode(of_socket(UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap()).unwrap(), own);
        assert!(of_socket(File::open("/dev/null").unwrap()).is_err());
    }
}
