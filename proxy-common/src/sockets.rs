//! What is known of one socket, in its own storage: it goes when the socket goes.

use crate::address::Address;

/// Storage of a socket -> [`Socket`].
pub const SOCKETS: &str = "SOCKETS";

/// What a socket is to the mesh.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Role {
    /// Nothing (any more).
    None = 0,
    /// An app's connection that goes to its sidecar instead; `address` is where the app wanted to go.
    App = 1,
    /// The same connection as its sidecar accepted it; `address` is where the app wanted to go.
    Outbound = 2,
    /// A connection that a sidecar makes; `address` is the client it declared, if any.
    Upstream = 3,
    /// What an app accepted from its sidecar; `address` is the true client.
    Served = 4,
    /// What a sidecar accepted from elsewhere and [`crate::arrivals`] has no place for.
    Inbound = 5,
    /// An app's connection to an excluded port or network.
    Excluded = 6,
}

/// The sidecar declared a client.
pub const DECLARED: u8 = 1;
/// The connection goes to the pod's own address.
pub const OWN: u8 = 2;
/// The handshake is done: its end is worth a flow record.
pub const ESTABLISHED: u8 = 4;
/// It was sent to the sidecar, and its SYN has not left yet.
pub const UNSENT: u8 = 8;
/// The kernel sent again until it gave up.
pub const TIMED_OUT: u8 = 16;

/// What is known of one socket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Socket {
    /// See [`Role`].
    pub address: Address,
    /// When the handshake was done, or its sidecar accepted it, in nanoseconds of the kernel's monotonic clock.
    pub since_ns: u64,
    /// Port of `address`, in host byte order.
    pub port: u16,
    /// A [`Role`].
    pub role: u8,
    /// [`DECLARED`], [`OWN`], [`ESTABLISHED`], [`UNSENT`], [`TIMED_OUT`].
    pub flags: u8,
    /// Always 0.
    pub reserved: u32,
}

const _: () = assert!(size_of::<Socket>() == 32);

impl Socket {
    /// Is it of this role?
    #[inline(always)]
    pub const fn is(&self, role: Role) -> bool {
        self.role == role as u8
    }

    /// Has it one of these flags?
    #[inline(always)]
    pub const fn has(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }
}
