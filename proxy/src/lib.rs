//! Outrigger, the map of the house.
//!
//! A room may use the rooms below it, never those above it, and the three planes are strangers to each other:
//!
//! ```text
//! cli → { dataplane | control | node } → { admin, delta } → snapshot → model → policy → { identity, telemetry } → base
//! ```
//!
//! `cargo xtask tidy` reads that line and fails where a `use crate::…` breaks it.

pub mod cli;

mod control;
mod dataplane;
mod node;

mod admin;
mod base;
mod delta;
mod identity;
mod model;
mod policy;
mod snapshot;
mod telemetry;
