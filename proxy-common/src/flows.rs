//! What the kernel says of a connection at its end.

use crate::address::Address;

/// Ring buffer of [`Flow`].
pub const FLOWS: &str = "FLOWS";
/// Its size: about 3,000 records.
pub const FLOWS_BYTES: usize = 256 * 1024;

/// Which way a connection went, seen from the pod.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u16)]
pub enum Direction {
    /// Into the pod.
    Inbound = 0,
    /// Out of the pod.
    Outbound = 1,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u16)]
pub enum End {
    /// Both sides said that they send no more.
    Finished = 1,
    /// One side cut it short.
    Reset = 2,
    /// What was sent was never acknowledged.
    TimedOut = 3,
}

/// One connection between a sidecar and what is outside its pod.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Flow {
    /// Cookie of the pod's network namespace.
    pub netns: u64,
    /// Bytes that the other side acknowledged. The kernel counts SYN and FIN for a byte each.
    pub sent_bytes: u64,
    /// Bytes received, counted in the same way.
    pub received_bytes: u64,
    /// From the handshake's end to the close.
    pub duration_ns: u64,
    /// The pod's end.
    pub local: Address,
    /// The other end.
    pub remote: Address,
    /// Smoothed round-trip time in microseconds.
    pub srtt_us: u32,
    /// Segments sent again.
    pub retransmits: u32,
    /// Port of the pod's end, in host byte order.
    pub local_port: u16,
    /// Port of the other end, in host byte order.
    pub remote_port: u16,
    /// A [`Direction`].
    pub direction: u16,
    /// An [`End`]; 0 where the programs of an earlier build wrote it.
    pub end: u16,
}

const _: () = assert!(size_of::<Flow>() == 80);

#[cfg(feature = "user")]
// SAFETY: integers without padding, 80 bytes, asserted above.
#[expect(unsafe_code, reason = "aya asks for the promise that the type is plain bytes")]
unsafe impl aya::Pod for Flow {}
