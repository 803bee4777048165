//! The control plane: resources in, answers out.

pub(crate) mod select;
pub(crate) mod world;
