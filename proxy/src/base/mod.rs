//! The doors and the words: everything that touches the world (clock, chance, network, shutdown) enters through here,
//! and the value types that every room shares are named here. Uses nothing above it.

pub(crate) mod backoff;
pub(crate) mod clock;
pub(crate) mod descriptors;
pub(crate) mod drain;
pub(crate) mod handover;
pub(crate) mod memory;
pub(crate) mod names;
pub(crate) mod net;
pub(crate) mod placed;
pub(crate) mod places;
pub(crate) mod problems;
pub(crate) mod random;
pub(crate) mod room;
pub(crate) mod secrecy;
pub(crate) mod sockopt;
pub(crate) mod state;
pub(crate) mod units;
