//! The one place from which requests read what holds: an atomically replaced pointer to the newest snapshot.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::Snapshot;

/// The newest snapshot. One per process; everybody who reads has a handle.
#[derive(Clone, Debug)]
pub(crate) struct Published(Arc<ArcSwap<Snapshot>>);

impl Published {
    /// Begins with the snapshot that allows nothing.
    pub(crate) fn new() -> Self {
        Self(Arc::new(ArcSwap::from_pointee(Snapshot::empty())))
    }

    /// What holds now. A request reads once and keeps what it read, so that it never sees two configurations.
    pub(crate) fn current(&self) -> Arc<Snapshot> {
        self.0.load_full()
    }

    /// From now on this one holds.
    pub(crate) fn publish(&self, snapshot: Snapshot) {
        self.0.store(Arc::new(snapshot));
    }
}
