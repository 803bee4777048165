//! Connections of a sidecar to its own pod's address, from the SYN to the handshake's end. A packet from a pod's address
//! to itself passes only with an entry here; without one its source is forged or it passed the sidecar by.

use crate::address::Address;

/// [`OwnDialKey`] -> [`OwnDial`].
pub const OWN_DIALS: &str = "OWN_DIALS";
/// Most such connections of a node under way at once. A plain hash: no pod can push out another's.
pub const OWN_DIALS_MAX: usize = 16384;

/// The connection: source and destination address are the same.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct OwnDialKey {
    /// The pod's address.
    pub address: Address,
    /// Source port, in host byte order.
    pub source_port: u32,
    /// Destination port, in host byte order.
    pub port: u32,
}

const _: () = assert!(size_of::<OwnDialKey>() == 24);

/// Whose connection it is, and for whom.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct OwnDial {
    /// Cookie of the pod's network namespace.
    pub netns: u64,
    /// The client that the sidecar declared.
    pub client: Address,
    /// Its port, in host byte order.
    pub client_port: u32,
    /// 1 if a client was declared: the connection is for the app. Else it is one of the pod to itself, for its sidecar.
    pub declared: u32,
}

const _: () = assert!(size_of::<OwnDial>() == 32);
