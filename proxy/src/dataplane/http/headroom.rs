//! How much the large heads of all requests under way may hold together.
//!
//! In HTTP/2 a head of 60 KiB costs its sender one byte for each header that its table has (RFC 7541 6.1), and the sidecar all
//! of it until there is an answer. What one client may have under way is bounded, and how many clients there are is not; so is
//! what they hold together here. Small heads always pass: whoever has large ones takes nothing from the others.
//!
//! Invariant: what is claimed is given back with its claim, however a request ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus::IntGauge;

use super::reject::Reject;

/// What there is for large heads.
#[derive(Debug)]
pub(crate) struct Headroom {
    limit: AtomicU64,
    taken: AtomicU64,
    told: IntGauge,
}

/// What one head took of it.
#[derive(Debug)]
pub(super) struct Claimed {
    room: Arc<Headroom>,
    bytes: u64,
}

impl Headroom {
    /// As much as this, told by this gauge.
    pub(crate) fn new(limit: u32, told: IntGauge) -> Arc<Self> {
        Arc::new(Self { limit: AtomicU64::new(limit.into()), taken: AtomicU64::new(0), told })
    }

    /// From now on there is so much. What was taken before stays.
    pub(crate) fn limit(&self, limit: u32) {
        self.limit.store(limit.into(), Ordering::Relaxed);
    }

    /// Room for a head of so many bytes, which a small one needs none of.
    ///
    /// # Errors
    /// There is not enough left.
    pub(super) fn claim(self: &Arc<Self>, bytes: usize) -> Result<Option<Claimed>, Reject> {
        if bytes <= SMALL {
            return Ok(None);
        }
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let limit = self.limit.load(Ordering::Relaxed);
        let more = |taken: u64| taken.checked_add(bytes).filter(|taken| *taken <= limit);
        if self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_err() {
            return Err(Reject::HeadsHeld(limit));
        }
        self.told.add(bytes.cast_signed());
        Ok(Some(Claimed { room: Arc::clone(self), bytes }))
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        self.room.taken.fetch_sub(self.bytes, Ordering::Relaxed);
        self.room.told.sub(self.bytes.cast_signed());
    }
}

/// The most bytes of a head that always passes, as HTTP/2 counts them: more than browsers and clients of gRPC send without large
/// cookies and tokens.
pub(super) const SMALL: usize = 4 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_heads_always_pass_and_large_ones_share_what_there_is() {
        let told = IntGauge::new("told", "told").unwrap();
        let room = Headroom::new(100_000, told.clone());
        let held = room.claim(60_000).unwrap();
        assert!(matches!(room.claim(60_000), Err(Reject::HeadsHeld(100_000))));
        assert!(room.claim(SMALL).unwrap().is_none());
        let rest = room.claim(40_000).unwrap();
        assert!(room.claim(SMALL + 1).is_err());
        assert_eq!(told.get(), 100_000);
        drop(held);
        assert_eq!(told.get(), 40_000);
        room.limit(50_000);
        assert!(room.claim(60_000).is_err());
        drop(rest);
        assert!(room.claim(50_000).unwrap().is_some());
        assert_eq!(told.get(), 0);
    }
}
