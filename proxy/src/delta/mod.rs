//! The configuration stream: its messages, and both ends of it as state machines without sockets.

pub(crate) mod authority;
pub(crate) mod envelope;
