//! Outlier ejection: an endpoint that fails several times in a row is left out for a growing time, never the last one.

use std::net::SocketAddr;

use tokio::time::Instant;

/// The state of one service's endpoints.
#[derive(Debug)]
pub(crate) struct Ejections {}

/// How an attempt ended, as far as the endpoint is to blame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Outcome {
    Success,
    /// A connection failure, a reset, a timeout, or a 5xx status.
    Failure,
}

impl Ejections {
    /// Reports an attempt. `endpoints` is how many the service has now. Returns the time for which this report ejected the endpoint.
    pub(crate) fn report(
        &self,
        _endpoint: SocketAddr,
        _outcome: Outcome,
        _endpoints: usize,
        _now: Instant,
    ) -> Option<std::time::Duration> {
        todo!()
    }

    /// Is the endpoint left out now?
    pub(crate) fn is_ejected(&self, _endpoint: SocketAddr, _now: Instant) -> bool {
        todo!()
    }

    /// Endpoints that are left out now, and until when.
    pub(crate) fn ejected(&self, _now: Instant) -> Vec<(SocketAddr, Instant)> {
        todo!()
    }
}
