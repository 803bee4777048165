//! The control plane: resources in, answers out.
