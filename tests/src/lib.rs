//! A mesh as a user has it, for tests, demo and benchmark: the real binary, its commands, its exit codes.
//!
//! Nothing here knows the inside of the product. Whatever is started is stopped when its guard is dropped, and a mesh
//! that an earlier crash left behind is taken down before the next one comes up.
#![expect(clippy::print_stderr, reason = "a terminal is where this is watched")]
#![expect(clippy::disallowed_types, reason = "real programs are waited for in real time")]

pub mod cluster;
pub mod mesh;
pub mod metrics;
pub mod programs;
pub mod quota;
#[cfg(feature = "programs")]
pub mod role;
pub mod rung;
pub mod runner;
pub mod spire;
pub mod wire;
