//! Outrigger, the map of the house.
//!
//! Users write resources; the control plane checks and keeps them, and sends each sidecar the part that it asked for; the
//! sidecar compiles that part to an immutable snapshot, published by one swap; a request reads the snapshot once and
//! walks one straight line of plain functions. What can be decided without touching the world is a pure function with its
//! tests beside it; the world (sockets, clock, chance, files, kernel) enters through a few named doors.
//!
//! A room may use the rooms below it, never those above it, and the three planes are strangers to each other:
//!
//! ```text
//! { cli, fuzz } → { dataplane | control | node } → { admin, delta, injection } → snapshot → model → policy → { identity, telemetry } → base
//! ```
//!
//! `cargo xtask tidy` reads that line and fails where a `use crate::…` breaks it.
//!
//! | room | what it is |
//! | --- | --- |
//! | `cli` | the front door: reads the command line, builds one role or runs one tool, gives the exit code |
//! | `fuzz` | what is fuzzed; not in a build of the product |
//! | `dataplane` | the sidecar: bytes in, bytes out. Read `dataplane/http/pipeline.rs` first |
//! | `control` | the control plane: folders → world → what each sidecar may see; the certificate authority; the API and the dashboard |
//! | `node` | the node agent: pods of this machine, their enrolment and identity, the kernel's programs |
//! | `admin` | the doors for operators of a process: metrics, readiness, dumps |
//! | `injection` | how a pod of Kubernetes gets its sidecar: the same function for the webhook and for `outrigger inject` |
//! | `delta` | the configuration stream: both ends as state machines, and what drives them |
//! | `snapshot` | what the line reads, and how it is compiled from resources |
//! | `model` | resources as users write them, and the files that the processes of one machine share |
//! | `policy` | one file for each policy: written form, compiled form, decision, tests |
//! | `identity` | SPIFFE IDs, the own certificate, who a TLS peer must be |
//! | `telemetry` | metrics, access log, traces, the process's own log |
//! | `base` | the doors to the world, and the words that every room uses |
//!
//! The way of a change: `control/source` → `control/store` → `control/select` → `delta` → `dataplane/config.rs` →
//! `snapshot/compile.rs` → `snapshot/publish.rs`. The way of a request: `dataplane/listener.rs` → `connection.rs` →
//! `http/server.rs` → `http/pipeline.rs` → `http/attempt.rs`.

pub mod cli;
#[cfg(feature = "fuzzing")]
pub mod fuzz;

mod control;
mod dataplane;
mod node;

mod admin;
mod base;
mod delta;
mod identity;
mod injection;
mod model;
mod policy;
mod snapshot;
mod telemetry;
