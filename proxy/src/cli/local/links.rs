//! The pod network: one bridge, and a veth pair into each pod's network namespace. Made with ip(8) in one batch per
//! namespace; what is to be done is text, written by pure functions.
//!
//! Invariant: nothing here asks ip(8) to enter a namespace. It would make a mount namespace for that, whose end waits for
//! the kernel longer than all the rest takes; who starts it is there already.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::{Command, Stdio};

use proxy_common::OWN_PORTS;

use super::super::Failure;
use super::places::{BRIDGE, GATEWAY_V4, GATEWAY_V6};
use super::pod::cannot;
use crate::node::netns;

/// The addresses of one pod.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PodLink {
    /// Names the host's end of the pair.
    pub(crate) number: u16,
    pub(crate) v4: Ipv4Addr,
    /// Absent where the machine has no IPv6.
    pub(crate) v6: Option<Ipv6Addr>,
}

/// Makes the bridge where it does not stand yet.
///
/// # Errors
/// ip(8) is missing or refuses.
pub(crate) fn make_bridge() -> Result<(), Failure> {
    if !Path::new("/sys/class/net").join(BRIDGE).exists() {
        ip(&["-batch", "-"], &bridge_batch(has_v6()))?;
    }
    Ok(())
}

/// Removes the bridge and every pod's link to it.
///
/// # Errors
/// ip(8) is missing or refuses.
pub(crate) fn remove_bridge() -> Result<(), Failure> {
    for entry in std::fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_pod_link(&name) {
            // It may go by itself with its namespace while we look.
            drop(ip(&["link", "delete", &name], ""));
        }
    }
    let bridge = Path::new("/sys/class/net").join(BRIDGE);
    if !bridge.exists() {
        return Ok(());
    }
    let removed = ip(&["link", "delete", BRIDGE], "");
    // Another `outrigger down` may have been there first.
    if bridge.exists() { removed } else { Ok(()) }
}

/// Makes a pod's network namespace, named `name` and found at `path`, with its link, addresses and routes. Its link is down:
/// see [`open_pod`].
///
/// # Errors
/// ip(8) is missing or refuses.
pub(crate) fn make_pod(name: &str, path: &Path, link: &PodLink) -> Result<File, Failure> {
    ip(&["-batch", "-"], &host_batch(name, link))?;
    let made = File::open(path).map_err(|error| cannot("open the pod's network namespace", &error))?;
    let furnished = netns::inside(&made, || {
        reserve_ports()?;
        Ok(ip(&["-batch", "-"], &pod_batch(link)))
    });
    furnished.map_err(|error| cannot("enter the pod's network namespace", &error))??;
    Ok(made)
}

/// Opens a pod's link. Until then no packet comes out of the pod or into it, whatever runs there.
///
/// # Errors
/// ip(8) is missing or refuses.
pub(crate) fn open_pod(number: u16) -> Result<(), Failure> {
    ip(&["link", "set", &host_end(number), "up"], "")
}

/// Removes a pod's network namespace, and with it its link. Nothing where none stands.
///
/// # Errors
/// ip(8) is missing or refuses.
pub(crate) fn remove_pod(netns: &str) -> Result<(), Failure> {
    let stands = || Path::new("/run/netns").join(netns).exists();
    if !stands() {
        return Ok(());
    }
    match ip(&["netns", "delete", netns], "") {
        // Its supervisor may remove it at the same moment.
        Err(_it_is_gone) if !stands() => Ok(()),
        outcome => outcome,
    }
}

/// Keeps the kernel from giving one of the sidecar's ports to an app that asks for any: `listen` without `bind` passes no hook
/// that could refuse it. The setting is the calling thread's network namespace's own.
fn reserve_ports() -> io::Result<()> {
    let ports = OWN_PORTS.map(|port| port.to_string()).join(",");
    match std::fs::write("/proc/sys/net/ipv4/ip_local_reserved_ports", ports) {
        // Where settings cannot be changed, nobody has lowered the range of ports that are given out either.
        Err(error) if matches!(error.kind(), io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::NotFound) => Ok(()),
        outcome => outcome,
    }
}

/// Does this machine speak IPv6 at all?
pub(crate) fn has_v6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

fn bridge_batch(v6: bool) -> String {
    let mut batch = format!(
        "link add {BRIDGE} address {BRIDGE_ADDRESS} type bridge forward_delay 0 stp_state 0\naddress add {GATEWAY_V4}/16 dev {BRIDGE}\n"
    );
    if v6 {
        append(&mut batch, format_args!("address add {GATEWAY_V6}/64 dev {BRIDGE} nodad\n"));
    }
    append(&mut batch, format_args!("link set {BRIDGE} up\n"));
    batch
}

fn host_batch(netns: &str, link: &PodLink) -> String {
    let host = host_end(link.number);
    format!("netns add {netns}\nlink add {host} type veth peer name eth0 netns {netns}\nlink set {host} master {BRIDGE}\n")
}

fn pod_batch(link: &PodLink) -> String {
    let mut batch = format!("link set lo up\naddress add {}/16 dev eth0\n", link.v4);
    if let Some(v6) = link.v6 {
        // Addresses are given out once: waiting for a duplicate would only delay the pod.
        append(&mut batch, format_args!("address add {v6}/64 dev eth0 nodad\n"));
    }
    append(&mut batch, format_args!("link set eth0 up\nroute add default via {GATEWAY_V4}\n"));
    if link.v6.is_some() {
        append(&mut batch, format_args!("route add default via {GATEWAY_V6} dev eth0\n"));
    }
    batch
}

fn append(batch: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing into a string does not fail.
    if batch.write_fmt(line).is_err() {}
}

fn host_end(number: u16) -> String {
    format!("orpod{number}")
}

fn is_pod_link(name: &str) -> bool {
    name.strip_prefix("orpod").is_some_and(|number| number.parse::<u16>().is_ok())
}

fn ip(arguments: &[&str], batch: &str) -> Result<(), Failure> {
    let missing = |error: io::Error| {
        Failure::environment(format!("cannot run ip(8): {error}"), "install iproute2 (on Debian: apt-get install iproute2)")
    };
    let mut child = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(batch.as_bytes()).map_err(missing)?;
    }
    let output = child.wait_with_output().map_err(missing)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let cause = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("it gave no reason").trim().to_owned();
    Err(Failure::environment(
        format!("ip {} failed: {cause}", arguments.join(" ")),
        "run as root; after a crash, `outrigger down` first",
    ))
}

/// A bridge that was given none takes the lowest address of its ports, and another one whenever that port goes: whoever
/// knows it as a neighbour by then talks to nobody for seconds. Of the range that is administered locally (IEEE 802).
const BRIDGE_ADDRESS: &str = "02:6f:75:74:00:01";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_ipv6_gets_no_ipv6() {
        let link = PodLink { number: 5, v4: Ipv4Addr::new(10, 64, 0, 5), v6: None };
        assert_eq!(
            pod_batch(&link),
            "link set lo up\naddress add 10.64.0.5/16 dev eth0\nlink set eth0 up\nroute add default via 10.64.0.1\n"
        );
        assert!(pod_batch(&PodLink { v6: "fd64::5".parse().ok(), ..link }).contains("address add fd64::5/64 dev eth0 nodad\n"));
        assert!(!bridge_batch(false).contains("fd64"));
        assert!(bridge_batch(true).starts_with("link add outrigger0 address 02:6f:75:74:00:01 type bridge "));
    }

    #[test]
    fn only_own_links_are_removed() {
        assert!(is_pod_link(&host_end(u16::MAX)) && host_end(u16::MAX).len() <= 15);
        for foreign in ["orpod", "orpodx", "eth0", "outrigger0", "orpod70000"] {
            assert!(!is_pod_link(foreign), "{foreign}");
        }
    }
}
