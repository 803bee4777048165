//! The node's ends of a pod's links: which devices of this machine a pod's own devices are paired with.
//!
//! Source: rtnetlink(7). Two devices are a pair when each names the other as its link. What a pod's device merely stands on,
//! as a macvlan does, names nobody back.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use super::netns;

/// The devices of the caller's own namespace that are paired with one of `netns`, by number.
///
/// # Errors
/// The namespace cannot be entered, or the kernel does not answer.
pub(crate) fn nodes_ends(netns: &File) -> io::Result<Vec<u32>> {
    let theirs = netns::inside(netns, links)?;
    let ours = links()?;
    let paired = |(device, link): (&u32, &u32)| (ours.get(link) == Some(device)).then_some(*link);
    Ok(theirs.iter().filter_map(paired).collect())
}

/// Every device of this thread's namespace that names a link, and the link.
fn links() -> io::Result<BTreeMap<u32, u32>> {
    let mut socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(Protocol::from(libc::NETLINK_ROUTE)))?;
    socket.set_read_timeout(Some(ANSWER_AT_MOST))?;
    // `struct nlmsghdr` (length, type, flags, number, sender), then `struct ifinfomsg`, all zero: every device.
    let mut request = [0; 32];
    let (type_, flags) = (libc::RTM_GETLINK.to_ne_bytes(), (libc::NLM_F_REQUEST | libc::NLM_F_DUMP).to_ne_bytes());
    for (place, byte) in
        request.iter_mut().zip(32_u32.to_ne_bytes().iter().chain(&type_).chain(flags.get(..2).unwrap_or_default()))
    {
        *place = *byte;
    }
    if socket.write(&request)? != request.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    let (mut found, mut buffer) = (BTreeMap::new(), vec![0; ANSWER_BYTES]);
    loop {
        let length = socket.read(&mut buffer)?;
        if !read_messages(buffer.get(..length).unwrap_or_default(), &mut found)? {
            return Ok(found);
        }
    }
}

/// Reads one datagram of the answer. `false` after the last one.
fn read_messages(mut bytes: &[u8], found: &mut BTreeMap<u32, u32>) -> io::Result<bool> {
    while let Some((message, rest)) = piece(bytes) {
        match half(message, 4).map(libc::c_int::from) {
            Some(libc::NLMSG_DONE) => return Ok(false),
            Some(libc::NLMSG_ERROR) => {
                let number = word(message, 16).map_or(0, u32::cast_signed);
                return Err(io::Error::from_raw_os_error(number.saturating_neg()));
            }
            _device => {
                let device = word(message, 20);
                let mut attributes = message.get(32..).unwrap_or_default();
                while let Some((attribute, others)) = short_piece(attributes) {
                    if let (Some(IFLA_LINK), Some(device), Some(link)) = (half(attribute, 2), device, word(attribute, 4)) {
                        found.insert(device, link);
                    }
                    attributes = others;
                }
            }
        }
        bytes = rest;
    }
    Ok(true)
}

/// The first message, whose length its first four bytes say, and what follows it.
fn piece(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    cut(bytes, usize::try_from(word(bytes, 0)?).ok()?, 16)
}

/// The first attribute, whose length its first two bytes say, and what follows it.
fn short_piece(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    cut(bytes, usize::from(half(bytes, 0)?), 4)
}

/// Both are aligned to four bytes.
fn cut(bytes: &[u8], length: usize, least: usize) -> Option<(&[u8], &[u8])> {
    let piece = bytes.get(..length).filter(|_piece| length >= least)?;
    Some((piece, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_ne_bytes(*word))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|half| u16::from_ne_bytes(*half))
}

const IFLA_LINK: u16 = 5;
const ANSWER_AT_MOST: Duration = Duration::from_secs(2);
/// The kernel fills no more than 32 KiB at once.
const ANSWER_BYTES: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn message(type_: u16, device: u32, attributes: &[u8]) -> Vec<u8> {
        let length = u32::try_from(32 + attributes.len()).unwrap();
        let mut bytes = [&length.to_ne_bytes()[..], &type_.to_ne_bytes(), &[0; 14], &device.to_ne_bytes(), &[0; 8]].concat();
        bytes.extend_from_slice(attributes);
        bytes
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn devices_that_name_a_link_are_found_past_other_attributes() {
        let attributes = [attribute(3, b"eth0\0"), attribute(IFLA_LINK, &7_u32.to_ne_bytes())].concat();
        let bytes = [message(16, 2, &attributes), message(16, 1, &attribute(3, b"lo\0"))].concat();
        let mut found = BTreeMap::new();
        assert!(read_messages(&bytes, &mut found).unwrap());
        assert_eq!(found, [(2, 7)].into());
        assert!(!read_messages(&message(3, 0, &[]), &mut found).unwrap());
    }

    #[test]
    fn what_is_cut_short_ends_and_an_error_is_told() {
        let mut found = BTreeMap::new();
        let whole = message(16, 2, &attribute(IFLA_LINK, &7_u32.to_ne_bytes()));
        for length in 0..whole.len() {
            assert!(read_messages(&whole[..length], &mut found).unwrap(), "{length}");
        }
        assert_eq!(found, BTreeMap::new());
        let mut error = message(2, 0, &[]);
        error[16..20].copy_from_slice(&(-libc::EPERM).to_ne_bytes());
        assert_eq!(read_messages(&error, &mut found).unwrap_err().raw_os_error(), Some(libc::EPERM));
    }

    #[test]
    fn the_kernel_answers_and_a_namespace_is_paired_with_nobody_by_itself() {
        links().unwrap();
        if rustix::process::geteuid().is_root() {
            assert_eq!(nodes_ends(&File::open("/proc/self/ns/net").unwrap()).unwrap(), Vec::<u32>::new());
        }
    }
}
