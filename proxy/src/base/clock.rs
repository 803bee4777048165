//! Wall time, for what is dated by the world: certificates, tokens, log lines. Everything else uses `tokio::time`, so
//! that paused time rules in tests.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Tells wall time. A fixed clock makes expiry testable.
#[derive(Clone)]
pub(crate) struct WallClock(Source);

#[derive(Clone)]
enum Source {
    System,
    #[cfg_attr(not(any(test, feature = "fuzzing")), expect(dead_code, reason = "tests date certificates and tokens with it"))]
    Fixed(Arc<parking_lot::Mutex<Duration>>),
}

impl WallClock {
    /// The system's clock.
    pub(crate) fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that stands at `since_epoch` until it is moved.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn fixed(since_epoch: Duration) -> Self {
        Self(Source::Fixed(Arc::new(parking_lot::Mutex::new(since_epoch))))
    }

    /// Moves a fixed clock forward; the system's clock is not moved.
    #[cfg(test)]
    pub(crate) fn advance(&self, by: Duration) {
        if let Source::Fixed(at) = &self.0 {
            *at.lock() += by;
        }
    }

    /// Time since 1970-01-01T00:00:00Z.
    pub(crate) fn since_epoch(&self) -> Duration {
        match &self.0 {
            Source::System => {
                #[expect(clippy::disallowed_methods, clippy::disallowed_types, reason = "the one door to wall time")]
                let now = std::time::SystemTime::now();
                now.duration_since(std::time::UNIX_EPOCH).unwrap_or_default()
            }
            Source::Fixed(at) => *at.lock(),
        }
    }
}

impl fmt::Debug for WallClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WallClock({:?})", self.since_epoch())
    }
}
