//! The enrolled pods: by the cookie of their network namespace, and which pod an address is of.
//!
//! The listeners stand in a SOCKHASH keyed by the same addresses: an address with a pod and without a listener is dropped.

use crate::address::Address;

/// Cookie of a pod's network namespace -> [`Pod`].
pub const PODS: &str = "PODS";
/// [`Address`] of a pod -> cookie of its network namespace.
pub const ADDRESSES: &str = "ADDRESSES";
/// [`Address`] of a pod -> its sidecar's inbound listener.
pub const LISTENERS: &str = "LISTENERS";
/// Number of a device at which a pod's link ends on the node -> cookie of the pod's network namespace.
pub const LINKS: &str = "LINKS";
/// Most links of the pods of one node.
pub const LINKS_MAX: usize = 2 * PODS_MAX;
/// Most links of one pod that are watched.
pub const POD_LINKS_MAX: usize = 4;
/// Most pods of one node.
pub const PODS_MAX: usize = 1024;
/// Most addresses of the pods of one node: IPv4 and IPv6 of each.
pub const ADDRESSES_MAX: usize = 2 * PODS_MAX;

/// An enrolled pod.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Pod {
    /// Id of the cgroup whose tasks are the pod's sidecar; not of its children, which nobody vouches for.
    pub sidecar_cgroup: u64,
    /// The pod's IPv4 address, or [`Address::NONE`].
    pub v4: Address,
    /// The pod's IPv6 address, or [`Address::NONE`].
    pub v6: Address,
    /// [`ENFORCES`], [`EXCLUDES_OUTBOUND_PORTS`], [`EXCLUDES_OUTBOUND_CIDRS`], [`EXCLUDES_INBOUND_PORTS`], [`WATCHED`].
    pub flags: u32,
    /// One more than the number by which the node's network namespace knows the pod's; 0 where it is not known.
    pub number: u32,
    /// The node's ends of the pod's links, by number; 0 for none.
    pub links: [u32; POD_LINKS_MAX],
}

const _: () = assert!(size_of::<Pod>() == 64);

/// What gets past the pod's sidecar and no exclusion names is dropped, not only counted.
pub const ENFORCES: u32 = 1;
/// Some ports are excluded on the way out.
pub const EXCLUDES_OUTBOUND_PORTS: u32 = 2;
/// Some networks are excluded on the way out.
pub const EXCLUDES_OUTBOUND_CIDRS: u32 = 4;
/// Some ports are excluded on the way in.
pub const EXCLUDES_INBOUND_PORTS: u32 = 8;
/// A program stands at every one of the pod's links.
pub const WATCHED: u32 = 16;

impl Pod {
    /// Is `address` this pod's?
    #[inline(always)]
    pub const fn owns(&self, address: &Address) -> bool {
        !address.is_unspecified() && (address.same(&self.v4) || address.same(&self.v6))
    }

    /// Has it one of these flags?
    #[inline(always)]
    pub const fn has(&self, flags: u32) -> bool {
        self.flags & flags != 0
    }

    /// The pod's address of the family of `peer`, if it has one.
    #[inline(always)]
    pub const fn end_towards(&self, peer: &Address) -> Option<Address> {
        let own = if peer.is_v4() { self.v4 } else { self.v6 };
        if own.is_unspecified() { None } else { Some(own) }
    }
}

#[cfg(feature = "user")]
// SAFETY: integers without padding: 8 + 16 + 16 + 4 + 4 + 16 bytes, asserted above.
#[expect(unsafe_code, reason = "aya asks for the promise that the type is plain bytes")]
unsafe impl aya::Pod for Pod {}
