//! What a pod's owner takes out of capture: ports and networks that its app reaches without its sidecar, and ports at which
//! others reach its app without it. A pod's flags tell whether there is anything to look up.

use crate::address::Address;

/// [`PortKey`] -> 1.
pub const EXCLUDED_PORTS: &str = "EXCLUDED_PORTS";
/// [`Network`], of as many bits as are fixed -> [`FAMILY_V4`] or [`FAMILY_V6`].
pub const EXCLUDED_CIDRS: &str = "EXCLUDED_CIDRS";
/// Most excluded ports of all pods of a node.
pub const EXCLUDED_PORTS_MAX: usize = 16384;
/// Most excluded networks of all pods of a node.
pub const EXCLUDED_CIDRS_MAX: usize = 16384;

/// The network is of IPv4.
pub const FAMILY_V4: u32 = 4;
/// The network is of IPv6: `::/0` holds no IPv4 address, though it holds their mapped form.
pub const FAMILY_V6: u32 = 6;

/// One excluded port of one pod.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct PortKey {
    /// Cookie of the pod's network namespace.
    pub netns: u64,
    /// The port, in host byte order.
    pub port: u32,
    /// A [`Direction`](crate::flows::Direction).
    pub direction: u32,
}

const _: () = assert!(size_of::<PortKey>() == 16);

/// One network that a pod's app reaches without its sidecar, in the bits that a trie compares from the first to the last.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Network {
    /// Cookie of the pod's network namespace, in two words for the sake of their alignment.
    pub netns: [u32; 2],
    /// The network's address.
    pub address: Address,
}

const _: () = assert!(size_of::<Network>() == 24);

impl Network {
    /// Bits before the address; all of them are fixed.
    pub const NETNS_BITS: u32 = 64;
    /// Bits of a key that looks up one address.
    pub const BITS: u32 = Self::NETNS_BITS + 128;

    /// The network in the pod with this cookie.
    #[inline(always)]
    pub const fn new(netns: u64, address: Address) -> Self {
        Self { netns: [(netns & 0xffff_ffff) as u32, (netns >> 32) as u32], address }
    }

    /// The pod's cookie.
    pub const fn pod(&self) -> u64 {
        (self.netns[1] as u64) << 32 | self.netns[0] as u64
    }
}

#[cfg(feature = "user")]
// SAFETY: integers without padding, 16 bytes, asserted above.
#[expect(unsafe_code, reason = "aya asks for the promise that the type is plain bytes")]
unsafe impl aya::Pod for PortKey {}

#[cfg(feature = "user")]
// SAFETY: integers without padding, 24 bytes, asserted above.
#[expect(unsafe_code, reason = "aya asks for the promise that the type is plain bytes")]
unsafe impl aya::Pod for Network {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_survives_its_two_words() {
        for cookie in [1, u64::from(u32::MAX) + 7, u64::MAX] {
            assert_eq!(Network::new(cookie, Address::NONE).pod(), cookie);
        }
    }
}
