//! What the kernel programs and user space share: one module per map (name, key, value, size), constants, and every
//! decision that the programs take, as pure functions that the host tests.
//!
//! Sources: the kernel's `include/uapi/linux/bpf.h`. Invariant: a type that stands in a map has no padding, because the
//! kernel compares keys and copies values byte by byte; a changed type, map or pin name, and a map more, changes [`LAYOUT`].
//! What holds the notes of connections on their way (`SOCKETS`, `ORIGINALS`, `OWN_DIALS`) and the sidecars' sockets (`LISTENERS`)
//! never changes: nobody could copy it while connections go on. What a later layout has to note besides gets a map of its own.
#![cfg_attr(not(any(test, feature = "user")), no_std)]

pub mod address;
pub mod arrivals;
pub mod decide;
pub mod packets;

pub mod counters;
pub mod exclusions;
pub mod flows;
pub mod originals;
pub mod owndials;
pub mod pods;
pub mod sockets;

/// Number of the arrangement of maps and pins. A node agent takes over pins of earlier layouts, from [`LAYOUT_OLDEST`] on.
pub const LAYOUT: u32 = 5;
/// The oldest layout whose pins are taken over.
pub const LAYOUT_OLDEST: u32 = 3;

/// Where a sidecar takes its app's connections: on 127.0.0.1 and ::1.
pub const PORT_OUTBOUND: u16 = 14001;
/// Where a sidecar takes what comes to its pod, whichever port it was sent to.
pub const PORT_INBOUND: u16 = 14006;
/// Where probes arrive: the sidecar's own connections to [`address::Address::PROBE_V4`] and [`address::Address::PROBE_V6`] are
/// sent to [`PORT_OUTBOUND`] as an app's would be, and the node agent's to the pod's addresses come in as everybody's do.
pub const PORT_PROBE: u16 = 14007;
/// A sidecar's administration, on loopback only.
pub const PORT_ADMIN: u16 = 14020;
/// A sidecar's metrics and readiness, the one port of a pod that passes its sidecar by.
pub const PORT_METRICS: u16 = 14021;
/// All of a sidecar's ports.
pub const OWN_PORTS: [u16; 5] = [PORT_OUTBOUND, PORT_INBOUND, PORT_PROBE, PORT_ADMIN, PORT_METRICS];

/// Level of the private socket option by which a sidecar declares a connection's true client (`mesh` in ASCII).
pub const SOL_MESH: i32 = 0x6d65_7368;
/// Its one option: a `sockaddr_in6`, IPv4 in its mapped form.
pub const MESH_CLIENT: i32 = 1;
/// Bytes of a `sockaddr_in6`.
pub const SOCKADDR_IN6_BYTES: i32 = 28;
/// Asks an accepted socket where its client wanted to go (`SO_ORIGINAL_DST`, also `IP6T_SO_ORIGINAL_DST`).
pub const SO_ORIGINAL_DST: i32 = 80;
