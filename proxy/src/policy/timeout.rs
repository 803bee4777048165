//! Timeouts and deadlines (Gateway API GEP-1742; gRPC `grpc-timeout`).

use std::time::Duration;

use tokio::time::Instant;

/// Compiled timeouts of a rule.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Timeouts {
    /// From the whole request header to the whole response header, all attempts together.
    pub(crate) request: Option<Duration>,
    /// One attempt.
    pub(crate) attempt: Option<Duration>,
}

impl Timeouts {
    /// The moment at which the request must be answered: the rule's limit, cut by what the caller says it will wait
    /// (`grpc-timeout`).
    pub(crate) fn deadline(&self, _headers: &http::HeaderMap, _now: Instant) -> Option<Instant> {
        todo!()
    }
}
