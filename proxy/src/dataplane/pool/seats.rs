//! How many connections in HTTP/1 there are to one address for one client, and who waits for one of them.
//!
//! A client of HTTP/2 has many requests under way on one connection, and in HTTP/1 each of them takes a connection of its own.
//! Where there are as many as the limit says, a request waits until one of them is free or ends, and there is room for so many that
//! wait and no more. Who comes later waits behind them.
//!
//! Sources: none; other meshes limit the connections of a cluster, and queue before it. Invariant: each connection that comes
//! free or ends wakes one of those who wait, for as long as there are some.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::Notify;

/// The places for connections to one address for one client.
#[derive(Debug, Default)]
pub(super) struct Seats {
    taken: AtomicU32,
    waiting: AtomicU32,
    /// Rung when there may be a connection for somebody who waits.
    pub(super) freed: Notify,
}

/// Held by a connection from before it is opened until it is closed.
#[derive(Debug)]
pub(super) struct Seat(Arc<Seats>);

/// Held by a request while it waits.
#[derive(Debug)]
pub(super) struct Waiting<'a>(&'a Seats);

impl Seats {
    /// A place for another connection; none at the limit.
    pub(super) fn take(self: &Arc<Self>, limit: u32) -> Option<Seat> {
        // The count guards no other memory, so relaxed order is enough.
        let more = |taken: u32| (taken < limit).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok().then(|| Seat(Arc::clone(self)))
    }

    /// One more that waits; none where too many do.
    pub(super) fn wait(&self) -> Option<Waiting<'_>> {
        let waiting = Waiting(self);
        (self.waiting.fetch_add(1, Ordering::Relaxed) < WAITING_MAX).then_some(waiting)
    }

    /// Does anybody wait?
    pub(super) fn are_awaited(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// A connection is free, or its place is.
    pub(super) fn ring(&self) {
        if self.are_awaited() {
            self.freed.notify_one();
        }
    }
}

impl Seat {
    /// Among which it is one.
    pub(super) fn of(&self) -> Arc<Seats> {
        Arc::clone(&self.0)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        // Each seat was counted once when it was taken, so the count cannot pass below 0.
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
        self.0.ring();
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Requests that wait for a connection to one address: as many as wait for a place on shared ones.
const WAITING_MAX: u32 = 1_024;
