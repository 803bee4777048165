//! Addresses as maps hold them: 16 bytes, IPv4 in its mapped form (`::ffff:a.b.c.d`, RFC 4291 2.5.5.2), so that one key
//! format serves both families and a v6 socket that talks IPv4 makes the same key as a v4 socket.

/// An IPv6 address, or an IPv4 address in its mapped form: four words in network byte order, as contexts give them.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[repr(transparent)]
pub struct Address(pub [u32; 4]);

const _: () = assert!(size_of::<Address>() == 16);

impl Address {
    /// No address.
    pub const NONE: Self = Self([0; 4]);
    /// 127.0.0.1.
    pub const LOOPBACK_V4: Self = Self([0, 0, MAPPED, 0x7f00_0001_u32.to_be()]);
    /// ::1.
    pub const LOOPBACK_V6: Self = Self([0, 0, 0, 1_u32.to_be()]);
    /// 192.0.2.14, which a sidecar dials to see that its pod's connections come to it. It stands in a network for
    /// documentation (RFC 5737, TEST-NET-1): nobody is there, and where nothing captures the dial it leads nowhere.
    pub const PROBE_V4: Self = Self([0, 0, MAPPED, 0xc000_020e_u32.to_be()]);
    /// 100::14, for the same; all that is sent to its network is to be discarded (RFC 6666).
    pub const PROBE_V6: Self = Self([0x0100_0000_u32.to_be(), 0, 0, 0x14_u32.to_be()]);

    /// The mapped form of an IPv4 address in network byte order.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self([0, 0, MAPPED, word])
    }

    /// Is it an IPv4 address?
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// 127.0.0.0/8 or ::1.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() { u32::from_be(self.0[3]) >> 24 == 127 } else { self.same(&Self::LOOPBACK_V6) }
    }

    /// One of the addresses that probes go to?
    #[inline(always)]
    pub const fn is_probe(&self) -> bool {
        self.same(&Self::PROBE_V4) || self.same(&Self::PROBE_V6)
    }

    /// 0.0.0.0 or `::`, which `connect` takes for loopback.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.same(&Self::NONE) || self.is_v4() && self.0[3] == 0
    }

    /// fe80::/10, whose meaning depends on an interface. IPv4's 169.254.0.0/16 is not meant: it has no scope.
    #[inline(always)]
    pub const fn is_link_local_v6(&self) -> bool {
        u32::from_be(self.0[0]) >> 22 == 0xfe80 >> 6
    }

    /// Equality of all words at once. The derived one may become a call to `memcmp`, which the kernel's machine has not; and one
    /// word after the other is a branch for each, along every one of which the verifier goes on.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        let ([a, b, c, d], [e, f, g, h]) = (self.0, other.0);
        (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h) == 0
    }
}

#[cfg(feature = "user")]
impl From<std::net::IpAddr> for Address {
    fn from(address: std::net::IpAddr) -> Self {
        let octets = match address {
            std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            std::net::IpAddr::V6(v6) => v6.octets(),
        };
        let (words, _) = octets.as_chunks::<4>();
        let mut out = [0; 4];
        for (word, bytes) in out.iter_mut().zip(words) {
            *word = u32::from_ne_bytes(*bytes);
        }
        Self(out)
    }
}

#[cfg(feature = "user")]
impl From<Address> for std::net::IpAddr {
    fn from(address: Address) -> Self {
        let mut octets = [0; 16];
        for (bytes, word) in octets.as_chunks_mut::<4>().0.iter_mut().zip(address.0) {
            *bytes = word.to_ne_bytes();
        }
        std::net::Ipv6Addr::from(octets).to_canonical()
    }
}

#[cfg(feature = "user")]
// SAFETY: four words, any bit pattern is valid, no padding (asserted above).
#[expect(unsafe_code, reason = "aya asks for the promise that the type is plain bytes")]
unsafe impl aya::Pod for Address {}

/// Third word of a mapped address.
const MAPPED: u32 = 0xffff_u32.to_be();

#[cfg(test)]
pub(crate) mod tests {
    use std::net::{IpAddr, Ipv6Addr};

    use super::*;

    /// An address from its text, without the feature `user`.
    pub(crate) fn address(text: &str) -> Address {
        let v6 = match text.parse().unwrap() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        words(v6)
    }

    fn words(v6: Ipv6Addr) -> Address {
        let o = v6.octets();
        Address(std::array::from_fn(|i| u32::from_ne_bytes([o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]])))
    }

    #[test]
    fn loopback_of_both_families_and_its_mapped_form_is_known() {
        for text in ["127.0.0.1", "127.255.0.3", "::1", "::ffff:127.0.0.1"] {
            assert!(address(text).is_loopback(), "{text}");
        }
        for text in ["10.0.0.1", "::2", "fd00::1", "0.0.0.0", "::"] {
            assert!(!address(text).is_loopback(), "{text}");
        }
        assert_eq!(address("127.0.0.1"), Address::LOOPBACK_V4);
        assert_eq!(address("::1"), Address::LOOPBACK_V6);
    }

    #[test]
    fn probes_go_to_one_reserved_address_of_each_family() {
        for text in ["192.0.2.14", "::ffff:192.0.2.14", "100::14"] {
            assert!(address(text).is_probe(), "{text}");
        }
        for text in ["192.0.2.15", "100::15", "10.64.0.5", "::"] {
            assert!(!address(text).is_probe(), "{text}");
        }
    }

    #[test]
    fn unspecified_of_both_families_is_known() {
        for text in ["0.0.0.0", "::", "::ffff:0.0.0.0"] {
            assert!(address(text).is_unspecified(), "{text}");
        }
        assert!(!address("::1").is_unspecified());
    }

    #[test]
    fn link_local_ends_where_fe80_10_ends() {
        for text in ["fe80::1", "febf:ffff::1"] {
            assert!(address(text).is_link_local_v6(), "{text}");
        }
        for text in ["fec0::1", "fe7f::1", "169.254.169.254", "fd00::1"] {
            assert!(!address(text).is_link_local_v6(), "{text}");
        }
    }

    #[cfg(feature = "user")]
    #[test]
    fn an_address_survives_its_map_form() {
        for text in ["10.64.0.5", "fd64::5", "255.255.255.255", "::1"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Address::from(ip)), ip);
            assert_eq!(Address::from(ip), address(text));
        }
    }
}
