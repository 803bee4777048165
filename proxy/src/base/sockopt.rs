//! Socket options that no safe wrapper knows.
//!
//! The sidecar declares the true client of a connection that it opens to its own application by a private option. The
//! kernel programs of capture take it, so that the application's `getpeername` tells that client. Without capture the
//! kernel does not know the option and says so (`ENOPROTOOPT`). What a peer acknowledged, and which process it is, is asked of
//! the kernel too.
#![expect(unsafe_code, reason = "neither an option of our own nor SIOCOUTQ nor SO_PEERPIDFD has a safe wrapper")]

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

use socket2::SockRef;

/// Declares `client` as the true client of the connection that `socket` is about to open.
///
/// # Errors
/// `ENOPROTOOPT`: capture is not there. Anything else: capture refused it.
pub(crate) fn declare_client(socket: &impl AsFd, client: SocketAddr) -> io::Result<()> {
    let ip = match client.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let address = libc::sockaddr_in6 {
        sin6_family: AF_INET6,
        sin6_port: client.port().to_be(),
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr { s6_addr: ip.octets() },
        sin6_scope_id: 0,
    };
    // SAFETY: the descriptor is open for as long as it is borrowed, and the pointer and length describe a whole
    // `sockaddr_in6` that lives until the call returns.
    let answer = unsafe { libc::setsockopt(socket.as_fd().as_raw_fd(), LEVEL, NAME, (&raw const address).cast(), LENGTH) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Declares the connection that `socket` is about to open to be the sidecar's to its own application, where the kernel
/// programs are not there to be told: by the priority of its packets, which rules of nftables read.
///
/// # Errors
/// It is no socket of IP.
pub(crate) fn declare_own_dial(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_priority(OWN_DIAL_PRIORITY)
}

/// Has a netlink socket's questions be taken by the letter, without which some are not looked at as a whole (Linux 4.20).
///
/// # Errors
/// It is no netlink socket.
pub(crate) fn ask_strictly(socket: &impl AsFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is open for as long as it is borrowed, and the pointer leads to one int that lives until the call returns.
    let answer = unsafe {
        libc::setsockopt(socket.as_fd().as_raw_fd(), libc::SOL_NETLINK, NETLINK_GET_STRICT_CHK, (&raw const on).cast(), 4)
    };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How many bytes that were written to a TCP socket its peer has not acknowledged.
///
/// # Errors
/// It is no TCP socket.
pub(crate) fn unacknowledged(socket: &impl AsFd) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open for as long as it is borrowed, and SIOCOUTQ (which has the number of TIOCOUTQ, tcp(7))
    // writes one int, to which the pointer leads.
    let answer = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if answer == 0 { Ok(u64::try_from(bytes).unwrap_or(0)) } else { Err(io::Error::last_os_error()) }
}

/// The process that connected a Unix socket, or made the pair that it is of, as a pidfd: it stands for that process, whoever
/// has its id later.
///
/// # Errors
/// `ENOPROTOOPT`: the kernel is older than 6.5. `ESRCH`: the process has ended (the kernel is older than 6.16).
pub(crate) fn peer_process(socket: &impl AsFd) -> io::Result<OwnedFd> {
    let mut process: libc::c_int = -1;
    let mut length: libc::socklen_t = 4;
    // SAFETY: the kernel writes at most `length` bytes, the size of `process`, and both live through the call.
    let answer = unsafe {
        libc::getsockopt(socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, SO_PEERPIDFD, (&raw mut process).cast(), &raw mut length)
    };
    if answer != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(process) })
}

/// Of `include/uapi/asm-generic/socket.h`.
const SO_PEERPIDFD: libc::c_int = 77;
/// The highest one that a process without capabilities may give (socket(7)). Nothing schedules by it on loopback.
pub(crate) const OWN_DIAL_PRIORITY: u32 = 6;
/// Of `include/uapi/linux/netlink.h`.
const NETLINK_GET_STRICT_CHK: libc::c_int = 12;
/// "mesh": a level that no protocol has.
const LEVEL: libc::c_int = 0x6d65_7368;
const NAME: libc::c_int = 1;
#[expect(clippy::cast_possible_truncation, reason = "the constant is 10 and the size 28")]
const AF_INET6: libc::sa_family_t = libc::AF_INET6 as libc::sa_family_t;
#[expect(clippy::cast_possible_truncation, reason = "the size is 28")]
const LENGTH: libc::socklen_t = size_of::<libc::sockaddr_in6>() as libc::socklen_t;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_capture_the_option_is_unknown() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let error = declare_client(&socket, "192.0.2.1:80".parse().unwrap()).unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP | libc::EINVAL)), "{error}");
    }
}
