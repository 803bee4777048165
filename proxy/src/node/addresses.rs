//! The addresses of a network namespace by the kernel's word, asked for from here.
//!
//! Source: rtnetlink(7), `include/uapi/linux/if_addr.h`. Nobody enters the namespace (`IFA_TARGET_NETNSID`).

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::rtnetlink::{ask, attribute, give_number, half, number_of, short_piece};

/// The addresses at which others reach `netns`, IPv4 first; of a family in the kernel's order.
///
/// # Errors
/// The kernel does not answer, or the caller may not ask.
pub(crate) fn of(netns: &File) -> io::Result<Vec<IpAddr>> {
    if number_of(netns)?.is_none() {
        give_number(netns)?;
    }
    let number = number_of(netns)?.ok_or_else(|| io::Error::other("the namespace has no number here"))?;
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        // `struct ifaddrmsg`: the family, and of every device.
        let family = u8::try_from(family).unwrap_or_default();
        let body = [&[family, 0, 0, 0, 0, 0, 0, 0][..], &attribute(IFA_TARGET_NETNSID, number)].concat();
        ask(libc::RTM_GETADDR, libc::NLM_F_DUMP, &body, |answer| found.extend(address(answer).filter(is_reached)))?;
    }
    Ok(found)
}

/// What one answer says: the own address, which of a link with two ends is not the one that names the other end.
fn address(answer: &[u8]) -> Option<IpAddr> {
    let (mut own, mut other) = (None, None);
    let mut attributes = answer.get(8..).unwrap_or_default();
    while let Some((attribute, others)) = short_piece(attributes) {
        match half(attribute, 2) {
            Some(IFA_LOCAL) => own = ip(attribute.get(4..)?),
            Some(IFA_ADDRESS) => other = ip(attribute.get(4..)?),
            _of_something_else => {}
        }
        attributes = others;
    }
    own.or(other)
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into()),
        16 => Some(Ipv6Addr::from(*bytes.first_chunk::<16>()?).into()),
        _neither => None,
    }
}

/// Not one that is another machine's or namespace's own too.
fn is_reached(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    }
}

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_TARGET_NETNSID: u16 = 10;

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::node::netns;

    fn ip(words: &str) {
        let status = Command::new("ip").args(words.split(' ')).status().unwrap();
        assert!(status.success(), "ip {words}");
    }

    #[test]
    fn a_namespace_is_asked_for_its_addresses_and_not_entered() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let name = format!("or-addr-{}", std::process::id());
        ip(&format!("netns add {name}"));
        let netns = File::open(format!("/run/netns/{name}")).unwrap();
        let none = of(&netns);
        for words in [
            "link set lo up",
            "link add br0 type bridge",
            "link set br0 up",
            "addr add 10.9.8.7/24 dev br0",
            "addr add fd09::7/64 dev br0",
        ] {
            ip(&format!("-n {name} {words}"));
        }
        let found = of(&netns);
        // A socket shows the namespace that it is from.
        let socket = netns::inside(&netns, || std::net::UdpSocket::bind("127.0.0.1:0")).unwrap();
        let shown = File::from(netns::of_socket(&socket).unwrap());
        let by_socket = of(&shown);
        ip(&format!("netns del {name}"));
        assert_eq!(none.unwrap(), Vec::<IpAddr>::new());
        let expected: [IpAddr; 2] = ["10.9.8.7".parse().unwrap(), "fd09::7".parse().unwrap()];
        assert_eq!(found.unwrap(), expected);
        assert_eq!(by_socket.unwrap(), expected);
    }
}
