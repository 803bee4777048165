//! Who is who: SPIFFE IDs, the workload's own certificate and trust bundles from the Workload API, and the rustls
//! verifiers that hold a peer to the identity it must have.

pub(crate) mod source;
pub(crate) mod spiffe;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod testing;
mod verified;
pub(crate) mod verify;
