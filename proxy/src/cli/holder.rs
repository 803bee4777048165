//! Who listens at a TCP port of this machine: the process and its command, as the kernel tells it in procfs
//! (proc_net_tcp, proc(5) `/proc/PID/fd`).
//!
//! It may find nothing: a process of another user, or of another process namespace, is not ours to look into.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

/// A process that listens.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Holder {
    pub(crate) process: u32,
    /// Its program and arguments, in one line of bounded length.
    pub(crate) command: String,
}

/// The process that keeps `address` from being listened at, if it can be found.
pub(crate) fn holder(address: SocketAddr) -> Option<Holder> {
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"].into_iter().find_map(|path| {
        let table = std::fs::read_to_string(path).ok()?;
        table.lines().find_map(|line| listener(line, address))
    })?;
    let socket = format!("socket:[{inode}]");
    std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let process = entry.file_name().to_str()?.parse().ok()?;
        let mut files = std::fs::read_dir(entry.path().join("fd")).ok()?.flatten();
        files
            .any(|file| std::fs::read_link(file.path()).is_ok_and(|target| target == Path::new(&socket)))
            .then(|| Holder { process, command: command(process) })
    })
}

impl Holder {
    /// Is it one of the roles that `outrigger up` starts?
    pub(crate) fn is_role(&self) -> bool {
        let name = std::fs::read_to_string(format!("/proc/{}/comm", self.process)).unwrap_or_default();
        let mut words = self.command.split(' ').skip(1);
        // Started by its own binary as /proc/self/exe, which the kernel names `exe`.
        matches!(name.trim(), "exe" | "outrigger") && matches!(words.next(), Some("control" | "node"))
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} ({})", self.process, self.command)
    }
}

/// The socket's inode, if this line of the table is a listener in the way of `address`.
fn listener(line: &str, address: SocketAddr) -> Option<u64> {
    // sl, local address, remote address, state, queues, timer, retransmissions, user, timeout, inode
    let mut fields = line.split_whitespace().skip(1);
    let (ip, port) = fields.next()?.rsplit_once(':')?;
    let state = fields.nth(1)?;
    let (ip, port) = (address_of(ip)?, u16::from_str_radix(port, 16).ok()?);
    let meets = ip.is_unspecified() || address.ip().is_unspecified() || ip == address.ip();
    if state != LISTEN || port != address.port() || !meets {
        return None;
    }
    fields.nth(5)?.parse().ok()
}

/// An address as the tables write it: words of 32 bits, each printed as a number of this machine's byte order.
fn address_of(text: &str) -> Option<IpAddr> {
    let mut bytes = Vec::with_capacity(16);
    for word in 0..text.len() / 8 {
        let word = text.get(word * 8..word * 8 + 8)?;
        bytes.extend(u32::from_str_radix(word, 16).ok()?.to_ne_bytes());
    }
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes.as_slice()) {
        return Some(Ipv4Addr::from(bytes).into());
    }
    let bytes = <[u8; 16]>::try_from(bytes.as_slice()).ok()?;
    Some(Ipv6Addr::from(bytes).to_canonical())
}

fn command(process: u32) -> String {
    let read = |file| std::fs::read(format!("/proc/{process}/{file}")).unwrap_or_default();
    let mut line = read("cmdline");
    if line.is_empty() {
        line = read("comm");
    }
    // Whatever another process calls itself must not write to this terminal.
    let text = String::from_utf8_lossy(&line).replace(|letter: char| letter.is_control(), " ");
    text.trim().chars().take(COMMAND_LETTERS_MAX).collect()
}

const LISTEN: &str = "0A";
const COMMAND_LETTERS_MAX: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_found_with_its_process() {
        for text in ["127.0.0.1:0", "[::]:0"] {
            let listener = std::net::TcpListener::bind(text).unwrap();
            let address = SocketAddr::from(([127, 0, 0, 1], listener.local_addr().unwrap().port()));
            let found = holder(address).unwrap();
            assert_eq!(found.process, std::process::id());
            assert!(!found.command.is_empty() && !found.is_role(), "{found}");
            drop(listener);
            assert_eq!(holder(address), None);
        }
    }

    #[test]
    fn a_line_of_the_table_is_read_by_address_port_and_state() {
        let line = |local: &str, state: &str| {
            format!("   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100")
        };
        let loopback = format!("{:08X}:3700", u32::from_ne_bytes([127, 0, 0, 1]));
        let find = |line: &str, address: &str| listener(line, address.parse().unwrap());
        assert_eq!(find(&line(&loopback, "0A"), "127.0.0.1:14080"), Some(4711));
        assert_eq!(find(&line(&loopback, "0A"), "0.0.0.0:14080"), Some(4711));
        assert_eq!(find(&line("00000000:3700", "0A"), "127.0.0.1:14080"), Some(4711));
        assert_eq!(find(&line("00000000000000000000000000000000:3700", "0A"), "127.0.0.1:14080"), Some(4711));
        assert_eq!(find(&line(&loopback, "01"), "127.0.0.1:14080"), None);
        assert_eq!(find(&line(&loopback, "0A"), "10.64.0.1:14080"), None);
        assert_eq!(find(&line(&loopback, "0A"), "127.0.0.1:14081"), None);
        assert_eq!(find("  sl  local_address rem_address   st", "127.0.0.1:1"), None);
    }
}
