//! The control plane: resources in, answers out.

pub(crate) mod authority;
pub(crate) mod ca;
pub(crate) mod dashboard;
pub(crate) mod metrics;
pub(crate) mod select;
pub(crate) mod sessions;
pub(crate) mod store;
pub(crate) mod world;
