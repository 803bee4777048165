//! Local rate limit: a token bucket.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::RuleName;

/// The compiled limit; the bucket is shared by all snapshots in which the limit is the same.
#[derive(Clone, Debug)]
pub(crate) struct RateLimit {
    pub(crate) rule: RuleName,
    pub(crate) bucket: Arc<Bucket>,
}

/// The state of a limit.
#[derive(Debug)]
pub(crate) struct Bucket {}

impl RateLimit {
    /// Takes a token, or says how long until there is one.
    pub(crate) fn admit(&self, _now: Instant) -> Result<(), Duration> {
        todo!()
    }
}
