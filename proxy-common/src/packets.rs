//! Where in a packet its TCP header begins, and what that does for a connection. A sender with a raw socket writes the
//! packet as it likes: what hides its TCP header behind fragments or more headers or tags than any honest packet has is taken for
//! the begin of a connection.
//!
//! Sources: RFC 791 3.1, RFC 8200 4, RFC 9293 3.1; of fragments that hide flags, RFC 1858; of tags, IEEE 802.1Q 9.

/// What stands behind a header.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Next {
    /// Nothing of TCP.
    Nothing,
    /// A part of a TCP segment, or of who knows what.
    Fragment,
    /// A TCP header, so many bytes behind the begin of the packet.
    Tcp(u32),
    /// Another header of IPv6: its kind, and where it stands.
    Header(u8, u32),
}

/// What a TCP segment does for a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// It ends one at once, or is none.
    Other,
    /// Its sender asks for one: SYN without ACK, or hidden.
    Begins,
    /// Its sender is asked for one, and takes it: SYN and ACK.
    Accepts,
    /// It is of one that stands: neither SYN nor RST.
    Continues,
}

/// How many tags of 802.1Q and 802.1ad are looked behind. A receiver takes off as many as there are.
pub const TAGS_MAX: usize = 4;
/// How many of IPv6's headers are looked at.
pub const HEADERS_MAX: usize = 6;

const TCP: u8 = 6;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// Reads the fixed part of an IPv4 header.
#[inline(always)]
pub const fn v4(head: &[u8; 20]) -> Next {
    if head[9] != TCP {
        return Next::Nothing;
    }
    // More fragments, or not the first one; the bits above say something else.
    if head[6] & 0x3f != 0 || head[7] != 0 {
        return Next::Fragment;
    }
    Next::Tcp((head[0] & 0x0f) as u32 * 4)
}

/// Reads an IPv6 header.
#[inline(always)]
pub const fn v6(head: &[u8; 40]) -> Next {
    behind(head[6], 40)
}

/// Reads the begin of the header `kind` at `at`.
#[inline(always)]
pub const fn v6_header(kind: u8, at: u32, header: &[u8; 8]) -> Next {
    match kind {
        // More fragments, or not the first one. What it is a part of the header says.
        FRAGMENT if header[2] != 0 || header[3] & 0xf9 != 0 => match behind(header[0], at) {
            Next::Nothing => Next::Nothing,
            _ => Next::Fragment,
        },
        FRAGMENT => behind(header[0], at + 8),
        AUTHENTICATION => behind(header[0], at + (header[1] as u32 + 2) * 4),
        _ => behind(header[0], at + (header[1] as u32 + 1) * 8),
    }
}

/// What a TCP segment with these flags does.
#[inline(always)]
pub const fn step(flags: u8) -> Step {
    match flags & 0x16 {
        0x02 | 0x06 => Step::Begins,
        0x12 | 0x16 => Step::Accepts,
        0x04 | 0x14 => Step::Other,
        _ => Step::Continues,
    }
}

/// Stands a tag before what a frame of this type (of the host's byte order) carries?
#[inline(always)]
pub const fn is_tag(ether_type: u16) -> bool {
    matches!(ether_type, 0x8100 | 0x88a8)
}

#[inline(always)]
const fn behind(kind: u8, at: u32) -> Next {
    match kind {
        TCP => Next::Tcp(at),
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION => Next::Header(kind, at),
        _ => Next::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head4(words: u8, protocol: u8, fragment: u16) -> [u8; 20] {
        let mut head = [0; 20];
        (head[0], head[9]) = (0x40 | words, protocol);
        [head[6], head[7]] = fragment.to_be_bytes();
        head
    }

    #[test]
    fn tcp_is_found_behind_the_options_of_ipv4() {
        assert_eq!(v4(&head4(5, 6, 0x4000)), Next::Tcp(20));
        assert_eq!(v4(&head4(15, 6, 0)), Next::Tcp(60));
        assert_eq!(v4(&head4(5, 17, 0)), Next::Nothing);
    }

    #[test]
    fn a_fragment_of_tcp_hides_nothing() {
        for fragment in [0x2000, 1, 0x2001, 0x1fff, 0x0100] {
            assert_eq!(v4(&head4(5, 6, fragment)), Next::Fragment, "{fragment:#x}");
        }
        assert_eq!(v6_header(FRAGMENT, 40, &[6, 0, 0, 1, 0, 0, 0, 0]), Next::Fragment);
        assert_eq!(v6_header(FRAGMENT, 40, &[6, 0, 0, 8, 0, 0, 0, 0]), Next::Fragment);
        assert_eq!(v6_header(FRAGMENT, 40, &[17, 0, 0, 8, 0, 0, 0, 0]), Next::Nothing);
        // The only one of its packet.
        assert_eq!(v6_header(FRAGMENT, 40, &[6, 0, 0, 0, 0, 0, 0, 0]), Next::Tcp(48));
    }

    #[test]
    fn tcp_is_found_behind_the_headers_of_ipv6() {
        let mut head = [0; 40];
        head[6] = TCP;
        assert_eq!(v6(&head), Next::Tcp(40));
        head[6] = DESTINATION;
        assert_eq!(v6(&head), Next::Header(DESTINATION, 40));
        assert_eq!(v6_header(DESTINATION, 40, &[6, 2, 0, 0, 0, 0, 0, 0]), Next::Tcp(64));
        assert_eq!(v6_header(AUTHENTICATION, 64, &[6, 4, 0, 0, 0, 0, 0, 0]), Next::Tcp(88));
        assert_eq!(v6_header(ROUTING, 40, &[58, 0, 0, 0, 0, 0, 0, 0]), Next::Nothing);
    }

    #[test]
    fn syn_without_ack_begins_a_connection_and_with_it_accepts_one() {
        assert_eq!([0x02, 0xc2, 0x0a, 0x06].map(step), [Step::Begins; 4]);
        assert_eq!([0x12, 0x52, 0x1a, 0x16].map(step), [Step::Accepts; 4]);
        assert_eq!([0x10, 0x11, 0x18, 0x00].map(step), [Step::Continues; 4]);
        assert_eq!([0x04, 0x14, 0x1c].map(step), [Step::Other; 3]);
    }
}
