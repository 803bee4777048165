//! Circuit breaking by limits: connections and pending requests of one service.

use std::sync::Arc;

use super::RuleName;

/// The limits of one service and how much of them is used.
#[derive(Debug)]
pub(crate) struct Breaker {
    pub(crate) rule: RuleName,
}

/// Held while a slot is used; dropping it gives the slot back.
#[derive(Debug)]
pub(crate) struct Slot {}

impl Breaker {
    /// A slot for a request that waits for or holds an upstream stream; `None` at the limit.
    pub(crate) fn admit_request(self: &Arc<Self>) -> Option<Slot> {
        todo!()
    }

    /// A slot for an upstream connection; `None` at the limit.
    pub(crate) fn admit_connection(self: &Arc<Self>) -> Option<Slot> {
        todo!()
    }
}
