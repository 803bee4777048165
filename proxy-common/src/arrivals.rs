//! When a connection that came in began, until it ends in a flow record.
//!
//! Not in the socket's own storage: what the kernel takes to set that aside is a multiple of what a place here costs, and a
//! connection pays it while its caller waits. A socket's cookie says which place: cookies are numbered one after the other, so
//! the next connection's is beside this one's. Where a place is taken by one that stands, the storage it is.

/// Number of a place -> [`Arrived`].
pub const ARRIVALS: &str = "ARRIVALS";
/// How many places there are.
pub const ARRIVALS_LEN: usize = 0x1_0000;

/// A connection that came in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Arrived {
    /// Cookie of the socket that a sidecar accepted; 0 where the place is free.
    pub cookie: u64,
    /// When the handshake was done, or its sidecar accepted it, in nanoseconds of the kernel's monotonic clock.
    pub since_ns: u64,
    /// 1 once the kernel sent again until it gave up.
    pub timed_out: u64,
}

const _: () = assert!(size_of::<Arrived>() == 24 && ARRIVALS_LEN == 0xffff + 1);

impl Arrived {
    /// The place of the socket with this cookie.
    #[inline(always)]
    pub const fn place(cookie: u64) -> u32 {
        (cookie & 0xffff) as u32
    }
}
