//! Questions to the kernel's routing tables, and what they need of its format.
//!
//! Source: netlink(7), rtnetlink(7), `include/uapi/linux/{netlink,net_namespace}.h`. The kernel is asked about another namespace
//! from here, by the number by which this one knows it: that takes CAP_NET_ADMIN, and nobody enters it.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use crate::base::sockopt;

/// The number by which this thread's namespace knows another one, if it does.
pub(super) fn number_of(netns: &impl AsFd) -> io::Result<Option<u32>> {
    // `struct rtgenmsg`: a family, which is none, and three bytes of nothing.
    let mut number = None;
    let body = [&[0; 4][..], &attribute(NETNSA_FD, netns.as_fd().as_raw_fd().cast_unsigned())].concat();
    ask(libc::RTM_GETNSID, 0, &body, |answer| {
        let mut attributes = answer.get(4..).unwrap_or_default();
        while let Some((attribute, others)) = short_piece(attributes) {
            if half(attribute, 2) == Some(NETNSA_NSID) {
                number = word(attribute, 4);
            }
            attributes = others;
        }
    })?;
    Ok(number.filter(|number| *number != NONE))
}

/// Has this thread's namespace know another one by a number. One that has a number keeps it; the number goes with the namespace.
pub(super) fn give_number(netns: &impl AsFd) -> io::Result<()> {
    let body =
        [&[0; 4][..], &attribute(NETNSA_NSID, NONE), &attribute(NETNSA_FD, netns.as_fd().as_raw_fd().cast_unsigned())].concat();
    match ask(libc::RTM_NEWNSID, libc::NLM_F_ACK, &body, |_nothing| {}) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _done_or_there => Ok(()),
    }
}

/// Asks the kernel, and hands each answer on without its header.
pub(super) fn ask(type_: u16, flags: libc::c_int, body: &[u8], mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let mut socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(Protocol::from(libc::NETLINK_ROUTE)))?;
    socket.set_read_timeout(Some(ANSWER_AT_MOST))?;
    sockopt::ask_strictly(&socket)?;
    // `struct nlmsghdr`: length, type, flags, number, sender.
    let length = u32::try_from(HEADER_BYTES + body.len()).unwrap_or(u32::MAX);
    let flags = (libc::NLM_F_REQUEST | flags).to_ne_bytes();
    let flags = flags.get(if cfg!(target_endian = "big") { 2..4 } else { 0..2 }).unwrap_or_default();
    let request = [&length.to_ne_bytes()[..], &type_.to_ne_bytes(), flags, &[0; 8], body].concat();
    if socket.write(&request)? != request.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    let mut buffer = vec![0; ANSWER_BYTES];
    loop {
        let length = socket.read(&mut buffer)?;
        if !read_messages(buffer.get(..length).unwrap_or_default(), &mut take)? {
            return Ok(());
        }
    }
}

/// Reads one datagram of the answer. `false` after the last one.
fn read_messages(mut bytes: &[u8], take: &mut impl FnMut(&[u8])) -> io::Result<bool> {
    while let Some((message, rest)) = piece(bytes) {
        match half(message, 4).map(libc::c_int::from) {
            Some(libc::NLMSG_DONE) => return Ok(false),
            Some(libc::NLMSG_ERROR) => {
                let number = word(message, HEADER_BYTES).map_or(0, u32::cast_signed);
                if number == 0 {
                    // It was asked for, and says that it was done.
                    return Ok(false);
                }
                return Err(io::Error::from_raw_os_error(number.saturating_neg()));
            }
            _answer => take(message.get(HEADER_BYTES..).unwrap_or_default()),
        }
        // One that is not of several is the whole answer.
        let is_of_several = half(message, 6).is_some_and(|flags| libc::c_int::from(flags) & libc::NLM_F_MULTI != 0);
        if !is_of_several {
            return Ok(false);
        }
        bytes = rest;
    }
    Ok(true)
}

/// An attribute of four bytes.
pub(super) fn attribute(kind: u16, value: u32) -> [u8; 8] {
    let ([a, b], [c, d], [e, f, g, h]) = (8_u16.to_ne_bytes(), kind.to_ne_bytes(), value.to_ne_bytes());
    [a, b, c, d, e, f, g, h]
}

/// The first message, whose length its first four bytes say, and what follows it.
fn piece(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    cut(bytes, usize::try_from(word(bytes, 0)?).ok()?, 16)
}

/// The first attribute, whose length its first two bytes say, and what follows it.
pub(super) fn short_piece(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    cut(bytes, usize::from(half(bytes, 0)?), 4)
}

/// Both are aligned to four bytes.
fn cut(bytes: &[u8], length: usize, least: usize) -> Option<(&[u8], &[u8])> {
    let piece = bytes.get(..length).filter(|_piece| length >= least)?;
    Some((piece, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

pub(super) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_ne_bytes(*word))
}

pub(super) fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|half| u16::from_ne_bytes(*half))
}

const HEADER_BYTES: usize = 16;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
/// `NETNSA_NSID_NOT_ASSIGNED`.
const NONE: u32 = u32::MAX;
const ANSWER_AT_MOST: Duration = Duration::from_secs(2);
/// The kernel fills no more than 32 KiB at once.
const ANSWER_BYTES: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: u16 = 5;

    fn message(type_: u16, flags: libc::c_int, body: &[u8]) -> Vec<u8> {
        let (length, flags) = (u32::try_from(16 + body.len()).unwrap(), u16::try_from(flags).unwrap());
        let mut bytes = [&length.to_ne_bytes()[..], &type_.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8], body].concat();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// The bodies that were found, and whether there may be more.
    fn read(bytes: &[u8]) -> (Vec<Vec<u8>>, io::Result<bool>) {
        let mut found = Vec::new();
        let more = read_messages(bytes, &mut |body: &[u8]| found.push(body.to_vec()));
        (found, more)
    }

    #[test]
    fn an_answer_of_several_messages_ends_with_the_last_one_and_one_alone_with_itself() {
        let several = [message(16, libc::NLM_F_MULTI, &[1; 4]), message(16, libc::NLM_F_MULTI, &[2; 8])].concat();
        let (found, more) = read(&several);
        assert!(more.unwrap() && found == [vec![1; 4], vec![2; 8]]);
        assert!(!read(&message(3, libc::NLM_F_MULTI, &[0; 4])).1.unwrap());
        let (found, more) = read(&message(88, 0, &attribute(NETNSA_NSID, 3)));
        assert!(!more.unwrap() && found == [attribute(NETNSA_NSID, 3)]);
    }

    #[test]
    fn attributes_are_found_past_others() {
        let name = [&9_u16.to_ne_bytes()[..], &3_u16.to_ne_bytes(), b"eth0\0\0\0\0"].concat();
        let bytes = [&name[..], &attribute(LINK, 7)].concat();
        let (first, rest) = short_piece(&bytes).unwrap();
        assert_eq!((half(first, 2), first.len()), (Some(3), 9));
        let (second, rest) = short_piece(rest).unwrap();
        assert_eq!((half(second, 2), word(second, 4), rest), (Some(LINK), Some(7), &[][..]));
    }

    #[test]
    fn what_is_cut_short_ends_and_an_error_is_told() {
        let whole = message(16, libc::NLM_F_MULTI, &[0; 24]);
        for length in 0..whole.len() {
            let (found, more) = read(&whole[..length]);
            assert!(more.unwrap() && found.is_empty(), "{length}");
        }
        let error = message(2, 0, &(-libc::EPERM).to_ne_bytes());
        assert_eq!(read(&error).1.unwrap_err().raw_os_error(), Some(libc::EPERM));
    }
}
