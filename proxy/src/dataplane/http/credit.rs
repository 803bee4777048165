//! What clients of HTTP/2 may send of bodies that nobody takes: windows that grow with what their connections hold, out of one
//! credit of the whole sidecar.
//!
//! A connection begins with a window of [`BASE`]. Streams whose readers stand still use it up, and the others of the connection
//! would stand still with them; so it is granted anew what it holds, as long as there is credit. Beyond it a connection that
//! holds much waits until somebody reads, and one that holds little goes on. The codec counts what it holds and tells nobody;
//! each time that it grants anew, the difference between its target and the client's window is what it holds.
//!
//! Sources: RFC 9113 5.2 and 6.9 (flow control), 10.5. Invariant: what a connection holds and what its client may still send are
//! together no more than its base and what it took of the credit. A window that was granted cannot be taken back, so nothing is
//! granted in the place of what was read beyond the base.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Waker};

use parking_lot::Mutex;
use prometheus::IntGauge;
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

/// What all connections may hold together, beyond the base of each.
#[derive(Debug)]
pub(crate) struct Credit {
    limit: AtomicU64,
    taken: AtomicU64,
    /// Rung when there is more, for one of those who wait for it.
    returned: Arc<Notify>,
    told: IntGauge,
}

/// What is known of one connection: by who sees its frames, and by who reads its streams.
#[derive(Debug)]
pub(crate) struct Account {
    /// What the client may send before more is granted. One task changes it and the next one, so nothing is lost between load
    /// and store.
    window: AtomicU32,
    grants: AtomicU32,
    /// Bytes that left the codec's hands, from the beginning on.
    released: AtomicU32,
    /// The connection holds some of the credit, and is to be told of what is released.
    watched: AtomicBool,
    watcher: Mutex<Option<Waker>>,
}

/// What one connection took of a credit. It is given back with it.
#[derive(Debug)]
pub(crate) struct Claim {
    credit: Arc<Credit>,
    taken: u32,
    waits: Option<Pin<Box<OwnedNotified>>>,
}

/// What one connection has of the credit of uploads.
pub(super) struct Share {
    account: Arc<Account>,
    /// What the codec is told to hold and to grant together.
    target: u32,
    /// No more than the base and this is held and granted.
    claim: Claim,
    /// The target when more was granted last, how often that was, and what was released since.
    anchor: u32,
    grants: u32,
    freed: u32,
    released: u32,
}

impl Credit {
    /// As much as is the default, told by this gauge.
    pub(crate) fn new(limit: u32, told: IntGauge) -> Arc<Self> {
        Arc::new(Self { limit: AtomicU64::new(limit.into()), taken: AtomicU64::new(0), returned: Arc::default(), told })
    }

    /// From now on there is so much. Where more was taken, nobody gets any before it came back.
    pub(crate) fn limit(&self, limit: u32) {
        if self.limit.swap(limit.into(), Ordering::Relaxed) < limit.into() {
            self.returned.notify_one();
        }
    }

    /// How much of it there is of what is wanted; nothing, rather than less than is worth a grant.
    fn take(&self, wanted: u32) -> u32 {
        let limit = self.limit.load(Ordering::Relaxed);
        let mut taken = self.taken.load(Ordering::Relaxed);
        loop {
            let got = u32::try_from(limit.saturating_sub(taken)).unwrap_or(u32::MAX).min(wanted);
            if got < wanted.min(LEAST) || got == 0 {
                return 0;
            }
            match self.taken.compare_exchange_weak(taken, taken + u64::from(got), Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => {
                    self.told.add(got.into());
                    return got;
                }
                Err(now) => taken = now,
            }
        }
    }

    fn give_back(&self, bytes: u32) {
        if bytes > 0 {
            self.taken.fetch_sub(bytes.into(), Ordering::Relaxed);
            self.told.sub(bytes.into());
            self.returned.notify_one();
        }
    }

    /// Would half of it be left if so much more were taken?
    pub(crate) fn is_ample(&self, more: u32) -> bool {
        let taken = self.taken.load(Ordering::Relaxed).saturating_add(more.into());
        taken <= self.limit.load(Ordering::Relaxed) / 2
    }

    /// Does nobody get any more?
    pub(crate) fn is_short(&self) -> bool {
        self.taken.load(Ordering::Relaxed).saturating_add(LEAST.into()) > self.limit.load(Ordering::Relaxed)
    }
}

impl Claim {
    /// Nothing yet.
    pub(crate) fn new(credit: Arc<Credit>) -> Self {
        Self { credit, taken: 0, waits: None }
    }

    pub(crate) fn taken(&self) -> u32 {
        self.taken
    }

    /// Takes what is missing of what is wanted, where that leaves half of the credit, and does not wait.
    pub(crate) fn take_of_plenty(&mut self, wanted: u32) {
        let missing = wanted.saturating_sub(self.taken);
        if self.credit.is_ample(missing) {
            self.taken = self.taken.saturating_add(self.credit.take(missing));
        }
    }

    /// Is half of the credit there still?
    pub(crate) fn is_of_plenty(&self) -> bool {
        self.credit.is_ample(0)
    }

    /// Takes what is missing of what is wanted, or what there is of it; then it waits for more.
    pub(crate) fn grow(&mut self, wanted: u32, cx: &mut Context<'_>) {
        loop {
            self.taken = self.taken.saturating_add(self.credit.take(wanted.saturating_sub(self.taken)));
            if self.taken >= wanted {
                if self.waits.take().is_some() {
                    // There may be some left for the next.
                    self.credit.returned.notify_one();
                }
                return;
            }
            let waits = self.waits.get_or_insert_with(|| Box::pin(Arc::clone(&self.credit.returned).notified_owned()));
            if waits.as_mut().poll(cx).is_pending() {
                return;
            }
            self.waits = None;
        }
    }

    /// What it has is enough.
    pub(crate) fn stop_waiting(&mut self) {
        self.waits = None;
    }

    /// No more than this is needed.
    pub(crate) fn shrink(&mut self, needed: u32) {
        self.credit.give_back(self.taken.saturating_sub(needed));
        self.taken = self.taken.min(needed);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

impl Account {
    /// Of a connection that just opened.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            window: AtomicU32::new(WINDOW_FIRST),
            grants: AtomicU32::new(0),
            released: AtomicU32::new(0),
            watched: AtomicBool::new(false),
            watcher: Mutex::new(None),
        })
    }

    /// The client sent a piece of a body.
    pub(super) fn received(&self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        // Beyond the window the codec ends the connection.
        self.window.store(self.window.load(Ordering::Relaxed).saturating_sub(bytes), Ordering::Relaxed);
    }

    /// The client may send more.
    pub(super) fn granted(&self, bytes: u32) {
        self.window.store(self.window.load(Ordering::Relaxed).saturating_add(bytes), Ordering::Relaxed);
        self.grants.store(self.grants.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    /// The codec is about to be told that so much is held no more.
    pub(crate) fn released(&self, bytes: usize) {
        self.released.fetch_add(u32::try_from(bytes).unwrap_or(u32::MAX), Ordering::Relaxed);
        if self.watched.load(Ordering::Relaxed) {
            let watcher = self.watcher.lock().take();
            if let Some(watcher) = watcher {
                watcher.wake();
            }
        }
    }

    /// How much that was, from the beginning on; it wraps around.
    pub(crate) fn released_until_now(&self) -> u32 {
        self.released.load(Ordering::Relaxed)
    }

    fn watch(&self, watcher: Option<&Waker>) {
        if watcher.is_none() && !self.watched.load(Ordering::Relaxed) {
            return;
        }
        *self.watcher.lock() = watcher.cloned();
        self.watched.store(watcher.is_some(), Ordering::Relaxed);
    }
}

impl Share {
    /// Of a connection whose codec begins with a target of [`BASE`].
    pub(super) fn new(credit: Arc<Credit>, account: Arc<Account>) -> Self {
        // The codec grants the rest of the base when it begins.
        let claim = Claim::new(credit);
        Self { account, target: BASE, claim, anchor: WINDOW_FIRST, grants: 0, freed: 0, released: 0 }
    }

    /// What the codec is to be told before it is polled, if that is something else than before: not to grant what was read beyond
    /// the base.
    pub(super) fn lowered(&mut self) -> Option<u32> {
        let before = self.target;
        let _needs = self.settle();
        (self.target != before).then_some(self.target)
    }

    /// What the codec is to be told after it was polled, if that is something else than before: to grant what is needed. What came
    /// for streams that are over it has granted anew by then, so that nothing is taken for that.
    pub(super) fn poll_raised(&mut self, cx: &mut Context<'_>) -> Option<u32> {
        let before = self.target;
        match self.settle() {
            Some(wanted) => self.grow(wanted, cx),
            None => self.claim.stop_waiting(),
        }
        self.account.watch((self.bound() > BASE).then(|| cx.waker()));
        (self.target != before).then_some(self.target)
    }

    /// Takes in what happened since. Returns what the target would have to be for the client to have something to send.
    fn settle(&mut self) -> Option<u32> {
        let grants = self.account.grants.load(Ordering::Relaxed);
        let has_granted = std::mem::replace(&mut self.grants, grants) != grants;
        let released = self.account.released_until_now();
        let freed = released.wrapping_sub(std::mem::replace(&mut self.released, released));
        if has_granted {
            // The codec grants up to its target.
            (self.anchor, self.freed) = (self.target, 0);
        }
        self.freed = self.freed.saturating_add(freed);
        let window = self.account.window.load(Ordering::Relaxed);
        if self.bound() == BASE && window >= LOW {
            return None;
        }
        if has_granted {
            self.bound_to(self.target);
        }
        self.target = self.target.saturating_sub(freed).max(BASE);
        self.bound_to(self.bound().saturating_sub(freed).max(self.target));
        let held = self.anchor.saturating_sub(window).saturating_sub(self.freed);
        let wanted = BASE.saturating_add(held);
        if has_granted {
            // Some was released that nobody told of: padding, or what came for a stream that was over.
            self.target = self.target.min(wanted);
        }
        (window < LOW && wanted > self.target).then_some(wanted)
    }

    /// Takes what is wanted of the credit, or what there is of it; then it waits for more.
    fn grow(&mut self, wanted: u32, cx: &mut Context<'_>) {
        self.claim.grow(wanted.saturating_sub(BASE), cx);
        self.target = wanted.min(self.bound());
    }

    /// No more than this is held and granted.
    fn bound(&self) -> u32 {
        BASE.saturating_add(self.claim.taken())
    }

    /// It is known that no more is held and granted.
    fn bound_to(&mut self, bound: u32) {
        self.claim.shrink(bound.saturating_sub(BASE));
    }
}

/// What each connection may hold and grant without any credit: four streams whose readers stand still.
pub(crate) const BASE: u32 = 1 << 20;
/// Whose window is smaller is granted more.
const LOW: u32 = BASE / 2;
/// As little as is taken at once. The codec grants nothing that is less than half of the window.
const LEAST: u32 = BASE / 4;
/// With what a connection begins (RFC 9113 6.9.2).
const WINDOW_FIRST: u32 = 65_535;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::random::Dice;

    /// A connection as its codec keeps it.
    struct Codec {
        share: Share,
        target: u32,
        window: u32,
        held: u32,
    }

    impl Codec {
        fn new(credit: &Arc<Credit>) -> Self {
            let share = Share::new(Arc::clone(credit), Account::new());
            let mut codec = Self { share, target: BASE, window: WINDOW_FIRST, held: 0 };
            codec.turn();
            codec
        }

        fn turn(&mut self) {
            self.target = self.share.lowered().unwrap_or(self.target);
            self.grant();
            if let Some(target) = self.share.poll_raised(&mut Context::from_waker(Waker::noop())) {
                self.target = target;
                self.grant();
            }
        }

        fn grant(&mut self) {
            let more = i64::from(self.target) - i64::from(self.held) - i64::from(self.window);
            if more > 0 && more >= i64::from(self.window / 2) {
                let more = u32::try_from(more).unwrap();
                self.window += more;
                self.share.account.granted(more);
            }
        }

        fn receive(&mut self, bytes: u32) {
            let bytes = bytes.min(self.window);
            self.window -= bytes;
            self.held += bytes;
            self.share.account.received(usize::try_from(bytes).unwrap());
        }

        fn release(&mut self, bytes: u32) {
            let bytes = bytes.min(self.held);
            self.held -= bytes;
            self.share.account.released(usize::try_from(bytes).unwrap());
        }
    }

    fn credit(limit: u32) -> Arc<Credit> {
        Credit::new(limit, IntGauge::new("held", "held").unwrap())
    }

    #[test]
    fn what_is_held_and_granted_is_never_more_than_base_and_share() {
        for seed in 0..200 {
            let limit = 6 * BASE;
            let credit = credit(limit);
            let mut dice = Dice::from_seed(seed);
            let mut drawn = |most: u32| u32::try_from(dice.bits() % u64::from(most)).unwrap();
            let mut all: Vec<Codec> = (0..4).map(|_| Codec::new(&credit)).collect();
            for _ in 0..2_000 {
                let index = usize::try_from(drawn(4)).unwrap();
                let codec = &mut all[index];
                match drawn(8) {
                    0..=4 => codec.receive(drawn(400_000)),
                    5 => codec.release(drawn(4 * BASE)),
                    // What nobody reads, and nobody tells of.
                    6 => codec.held -= drawn(20_000).min(codec.held),
                    _ => {}
                }
                codec.turn();
                assert!(codec.held + codec.window <= codec.share.bound(), "seed {seed}");
                let taken: u64 = all.iter().map(|codec| u64::from(codec.share.bound() - BASE)).sum();
                assert_eq!(credit.taken.load(Ordering::Relaxed), taken, "seed {seed}");
                assert!(taken <= u64::from(limit), "seed {seed}");
            }
            drop(all);
            assert_eq!((credit.taken.load(Ordering::Relaxed), credit.told.get()), (0, 0), "seed {seed}");
        }
    }

    #[test]
    fn a_connection_is_granted_what_it_holds_and_gives_it_back_when_it_is_read() {
        let credit = credit(64 * BASE);
        let mut codec = Codec::new(&credit);
        for _ in 0..100 {
            codec.receive(STEP);
            codec.turn();
            assert!(codec.window >= LOW, "{} held", codec.held);
        }
        assert!(credit.told.get() > i64::from(codec.held - BASE), "{}", credit.told.get());
        while codec.held > 0 {
            codec.release(STEP);
            codec.turn();
        }
        assert_eq!((credit.told.get(), codec.target), (0, BASE));
        assert!(codec.window <= BASE, "nothing was granted for what was read: {}", codec.window);
    }

    #[test]
    fn who_finds_no_credit_is_told_when_there_is_some() {
        let credit = credit(BASE);
        let [mut first, mut second] = [(); 2].map(|()| Codec::new(&credit));
        while first.window > 0 {
            first.receive(STEP);
            first.turn();
        }
        assert_eq!(first.held, 2 * BASE);
        second.receive(BASE);
        second.turn();
        assert_eq!(second.window, 0);
        drop(first);
        let mut waits = second.share.claim.waits.take().expect("it waits");
        assert!(waits.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready());
        second.turn();
        assert_eq!(second.window, BASE);
    }

    /// The codec grants it anew by itself, and tells nobody.
    #[test]
    fn what_comes_for_streams_that_are_over_spends_no_credit() {
        let credit = credit(64 * BASE);
        let mut codec = Codec::new(&credit);
        for _ in 0..100 {
            // So much within one turn that little is left of the window.
            codec.receive(8 * STEP);
            codec.held -= 8 * STEP;
            codec.turn();
            assert_eq!(credit.told.get(), 0);
        }
    }

    const STEP: u32 = 100_000;
}
