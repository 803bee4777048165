//! Where an app's connection wanted to go, on its way from the app's socket to the socket that the sidecar accepts:
//! written when the SYN leaves, taken when the handshake is done.

use crate::address::Address;

/// [`OriginalKey`] -> [`Original`]; the least recently used go first, because a refused connection leaves its entry.
pub const ORIGINALS: &str = "ORIGINALS";
/// Most connections between SYN and accept, and refused ones not yet pushed out.
pub const ORIGINALS_MAX: usize = 32768;

/// The app's end of the connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct OriginalKey {
    /// Cookie of the network namespace.
    pub netns: u64,
    /// Source address: one port may be in use at 127.0.0.1 and at the pod's address at once.
    pub source: Address,
    /// Source port, in host byte order.
    pub port: u32,
    /// Always 0.
    pub reserved: u32,
}

const _: () = assert!(size_of::<OriginalKey>() == 32);

/// Where the app wanted to go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Original {
    /// The destination.
    pub address: Address,
    /// Its port, in host byte order.
    pub port: u32,
}

const _: () = assert!(size_of::<Original>() == 20);
