//! What peers may send of answers on a connection in HTTP/2 that was opened to them: as much as all its streams where their readers
//! may stand still, out of one credit of the whole sidecar.
//!
//! A stream holds no more than its own window, whatever its connection was granted. So a connection is granted [`BASE`], and
//! [`EACH`] for each answer that may be large; then those whose readers stand still leave the others as much as there was, and
//! those whose readers are fast come as fast as their own windows allow. Answers of one piece change nothing. Where the credit is used up, connections share what they have among their
//! streams, and those that hold little go on.
//!
//! The codec's target bounds what it holds and what it granted together. A target that is lowered takes nothing back: until as
//! much was read, what was granted before counts.
//!
//! Sources: RFC 9113 5.2 and 6.9 (flow control). Invariant: what a connection holds and what its peer may still send are
//! together no more than its base and what it took of the credit. It keeps that until the last answer on it is gone, for a
//! connection that ended holds what nobody read as well.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Waker};

use parking_lot::Mutex;

use super::STREAM_WINDOW;
use crate::dataplane::http::credit::{Account, BASE, Claim, Credit};

/// What those who read a connection's answers and the one that drives it tell each other.
#[derive(Debug)]
pub(super) struct Granted {
    /// Answers that may be large, and for how many of them more than the base was granted.
    large: AtomicU32,
    roomy: AtomicU32,
    /// Of what is read.
    pub(super) account: Arc<Account>,
    claim: Mutex<Claim>,
    driver: Mutex<Option<Waker>>,
}

/// What a connection's driver tells the codec to hold and to grant.
pub(super) struct Grants {
    granted: Arc<Granted>,
    target: u32,
    /// More may be held and granted than the target says, for it was lowered; and what was released when that was looked at.
    surplus: bool,
    released: u32,
    /// The most answers that were large at once since the last tick.
    most: u32,
    /// There is less than is wanted, and more is waited for.
    waits: bool,
    /// Who is woken, so that it is not written down at every turn.
    driver: Option<Waker>,
}

impl Granted {
    /// From now on there may be much of one more answer.
    pub(super) fn more(&self) {
        // In one order with what `lower` does: either this sees the room that is left, or that sees this.
        let large = self.large.fetch_add(1, Ordering::SeqCst).saturating_add(1);
        if large > self.roomy.load(Ordering::SeqCst) {
            let driver = self.driver.lock();
            if let Some(driver) = &*driver {
                driver.wake_by_ref();
            }
        }
    }

    /// One of them is gone, and so is what it held.
    pub(super) fn less(&self) {
        self.large.fetch_sub(1, Ordering::SeqCst);
    }

    /// Does it have some of the credit?
    pub(super) fn has_credit(&self) -> bool {
        self.claim.lock().taken() > 0
    }
}

impl Grants {
    /// Of a connection that is to be opened. It begins with more than the base while there is plenty of credit.
    pub(super) fn new(credit: &Arc<Credit>) -> Self {
        let mut claim = Claim::new(Arc::clone(credit));
        claim.take_of_plenty(START - BASE);
        let target = BASE.saturating_add(claim.taken());
        let granted = Granted {
            large: AtomicU32::new(0),
            roomy: AtomicU32::new(room(target)),
            account: Account::new(),
            claim: Mutex::new(claim),
            driver: Mutex::default(),
        };
        Self { granted: Arc::new(granted), target, surplus: false, released: 0, most: 0, waits: false, driver: None }
    }

    pub(super) fn granted(&self) -> Arc<Granted> {
        Arc::clone(&self.granted)
    }

    /// With what the codec begins, and what it was told last.
    pub(super) fn target(&self) -> u32 {
        self.target
    }

    /// What the codec is to be told after it was polled, if that is something else than before: to grant what is needed.
    pub(super) fn poll_raised(&mut self, cx: &mut Context<'_>) -> Option<u32> {
        if self.driver.as_ref().is_none_or(|driver| !driver.will_wake(cx.waker())) {
            self.driver = Some(cx.waker().clone());
            (*self.granted.driver.lock()).clone_from(&self.driver);
        }
        let large = self.granted.large.load(Ordering::SeqCst);
        self.most = self.most.max(large);
        if self.surplus {
            self.settle();
        }
        let wanted = wanted(large);
        if wanted <= self.beyond_base() {
            if std::mem::take(&mut self.waits) {
                self.granted.claim.lock().stop_waiting();
            }
            return None;
        }
        let taken = {
            let mut claim = self.granted.claim.lock();
            claim.grow(wanted, cx);
            claim.taken()
        };
        self.waits = taken < wanted;
        let target = BASE.saturating_add(taken.min(wanted)).max(self.target);
        let raised = (target != self.target).then_some(target);
        if raised.is_some() {
            self.aim(target);
        }
        raised
    }

    /// What the codec is to be told now and then, if that is something else than before: not to grant anew what was not needed
    /// lately.
    pub(super) fn lowered(&mut self, cx: &mut Context<'_>) -> Option<u32> {
        self.settle();
        let most = wanted(std::mem::take(&mut self.most));
        let rest = if self.granted.claim.lock().is_of_plenty() { START - BASE } else { 0 };
        let target = BASE.saturating_add(most.max(rest));
        if target >= self.target {
            return None;
        }
        self.aim(target);
        self.surplus = true;
        self.released = self.granted.account.released_until_now();
        // Whoever came meanwhile saw the room that there was.
        Some(self.poll_raised(cx).unwrap_or(target))
    }

    fn aim(&mut self, target: u32) {
        self.target = target;
        self.granted.roomy.store(room(target), Ordering::SeqCst);
    }

    fn beyond_base(&self) -> u32 {
        self.target.saturating_sub(BASE)
    }

    /// Gives back what was read since the target was lowered.
    fn settle(&mut self) {
        if !self.surplus {
            return;
        }
        let released = self.granted.account.released_until_now();
        let freed = released.wrapping_sub(std::mem::replace(&mut self.released, released));
        let needed = self.beyond_base();
        let mut claim = self.granted.claim.lock();
        let left = claim.taken().saturating_sub(freed).max(needed);
        claim.shrink(left);
        self.surplus = left > needed;
    }
}

impl Drop for Grants {
    fn drop(&mut self) {
        // What it took is kept until the last answer is gone; whoever else waits is told before.
        self.granted.claim.lock().stop_waiting();
    }
}

/// What so many large answers are granted.
fn wanted(large: u32) -> u32 {
    large.saturating_mul(EACH).min(MOST)
}

/// For how many of them a target has room.
fn room(target: u32) -> u32 {
    match target.saturating_sub(BASE) {
        MOST.. => u32::MAX,
        beyond => beyond / EACH,
    }
}

/// For each large answer: its window, and half of that again, for the codec grants a connection nothing anew before half of what it
/// was granted is read.
const EACH: u32 = STREAM_WINDOW / 2 * 3;
/// As much as all streams of a connection can hold.
const MOST: u32 = 256 * STREAM_WINDOW;

/// What a connection is granted before anything is known of its answers: sixteen of them come at full speed from the first byte.
const START: u32 = 4 << 20;

#[cfg(test)]
mod tests {
    use prometheus::IntGauge;

    use super::*;
    use crate::base::random::Dice;

    const MIB: u32 = 1 << 20;

    /// A connection as its codec keeps it, with an answer on each stream: what it holds, what its peer may send, and whether it is
    /// large.
    struct Codec {
        grants: Option<Grants>,
        granted: Arc<Granted>,
        target: u32,
        window: u32,
        streams: Vec<(u32, bool)>,
    }

    impl Codec {
        fn new(credit: &Arc<Credit>) -> Self {
            let grants = Grants::new(credit);
            let (granted, target) = (grants.granted(), grants.target());
            Self { grants: Some(grants), granted, target, window: target, streams: Vec::new() }
        }

        fn held(&self) -> u32 {
            self.streams.iter().map(|(held, _)| held).sum()
        }

        fn bound(&self) -> u32 {
            BASE + self.granted.claim.lock().taken()
        }

        fn grant(&mut self) {
            let more = i64::from(self.target) - i64::from(self.held()) - i64::from(self.window);
            if self.grants.is_some() && more > 0 && more >= i64::from(self.window / 2) {
                self.window += u32::try_from(more).unwrap();
            }
        }

        fn turn(&mut self, ticks: bool) {
            self.grant();
            let cx = &mut Context::from_waker(Waker::noop());
            let Some(grants) = &mut self.grants else { return };
            self.target = grants.poll_raised(cx).unwrap_or(self.target);
            if ticks {
                self.target = grants.lowered(cx).unwrap_or(self.target);
            }
            self.grant();
        }

        /// The peer sends what it may of an answer.
        fn receive(&mut self, stream: usize, bytes: u32) -> u32 {
            let (held, _) = &mut self.streams[stream];
            let bytes = if self.grants.is_some() { bytes.min(self.window).min(STREAM_WINDOW - *held) } else { 0 };
            *held += bytes;
            self.window -= bytes;
            bytes
        }

        fn release(&mut self, stream: usize, bytes: u32) {
            let (held, large) = &mut self.streams[stream];
            if !std::mem::replace(large, true) {
                self.granted.more();
            }
            let bytes = bytes.min(*held);
            *held -= bytes;
            self.granted.account.released(usize::try_from(bytes).unwrap());
        }

        fn end(&mut self, stream: usize) {
            let (held, large) = self.streams.swap_remove(stream);
            self.granted.account.released(usize::try_from(held).unwrap());
            if large {
                self.granted.less();
            }
        }

        /// That many large answers whose readers stand still after the first pieces.
        fn fill(&mut self, answers: u32) {
            for _ in 0..answers {
                self.streams.push((0, false));
                let last = self.streams.len() - 1;
                self.receive(last, 1);
                self.release(last, 1);
                self.turn(false);
                self.receive(last, STREAM_WINDOW);
            }
        }
    }

    fn credit(limit: u32) -> (Arc<Credit>, IntGauge) {
        let told = IntGauge::new("granted", "granted").unwrap();
        (Credit::new(limit, told.clone()), told)
    }

    #[test]
    fn what_is_held_and_granted_is_never_more_than_base_and_claim() {
        for seed in 0..300 {
            let limit = 20 * MIB;
            let (credit, told) = credit(limit);
            let mut dice = Dice::from_seed(seed);
            let mut drawn = |most: u32| u32::try_from(dice.bits() % u64::from(most)).unwrap();
            let mut all: Vec<Codec> = (0..4).map(|_| Codec::new(&credit)).collect();
            for _ in 0..3_000 {
                let index = usize::try_from(drawn(u32::try_from(all.len()).unwrap())).unwrap();
                let codec = &mut all[index];
                let stream = if codec.streams.is_empty() { 0 } else { drawn(u32::try_from(codec.streams.len()).unwrap()) };
                let stream = usize::try_from(stream).unwrap();
                match drawn(12) {
                    0..=2 if codec.streams.len() < 256 => codec.streams.push((0, false)),
                    3..=7 if !codec.streams.is_empty() => {
                        codec.receive(stream, drawn(300_000));
                    }
                    8 | 9 if !codec.streams.is_empty() => codec.release(stream, drawn(300_000)),
                    10 if !codec.streams.is_empty() => codec.end(stream),
                    // The connection ends, and its readers still have what came.
                    11 if drawn(200) == 0 => {
                        codec.grants = None;
                        codec.window = 0;
                        all.push(Codec::new(&credit));
                        continue;
                    }
                    _ => {}
                }
                let ticks = drawn(20) == 0;
                codec.turn(ticks);
                assert!(codec.held() + codec.window <= codec.bound(), "seed {seed}");
                let taken: u32 = all.iter().map(|codec| codec.bound() - BASE).sum();
                assert_eq!(told.get(), i64::from(taken), "seed {seed}");
                assert!(taken <= limit, "seed {seed}");
                all.retain(|codec| codec.grants.is_some() || !codec.streams.is_empty());
            }
            drop(all);
            assert_eq!(told.get(), 0, "seed {seed}");
        }
    }

    #[test]
    fn answers_that_nobody_reads_leave_their_connection_what_it_had() {
        let (credit, told) = credit(64 * MIB);
        let mut codec = Codec::new(&credit);
        for count in 1..=240 {
            codec.fill(1);
            codec.turn(false);
            assert!(codec.window >= BASE / 2, "{count}: {}", codec.window);
        }
        assert_eq!((told.get(), codec.held()), (i64::from(MOST), 60 * MIB));
    }

    #[test]
    fn what_was_granted_comes_back_when_it_was_read_and_was_not_needed_for_a_while() {
        let (credit, told) = credit(128 * MIB);
        let mut codec = Codec::new(&credit);
        codec.fill(100);
        codec.turn(true);
        assert_eq!(told.get(), i64::from(100 * EACH), "it is needed");
        while !codec.streams.is_empty() {
            codec.end(0);
        }
        codec.turn(true);
        assert_eq!(codec.target, START);
        assert_eq!(codec.held() + codec.window, codec.bound(), "what was granted is not taken back");
        codec.streams.push((0, false));
        while told.get() > i64::from(START - BASE) {
            let came = codec.receive(0, 100_000);
            codec.release(0, came);
            codec.turn(false);
        }
        assert!(codec.held() + codec.window <= START);
    }

    #[test]
    fn a_connection_whose_answers_come_again_takes_only_what_is_left() {
        let limit = 16 * MIB;
        let (credit, told) = credit(limit);
        let [mut first, mut second] = [(); 2].map(|()| Codec::new(&credit));
        for _ in 0..3 {
            for codec in [&mut first, &mut second] {
                codec.fill(64);
                assert!(told.get() <= i64::from(limit), "{}", told.get());
            }
            let granted = [&first, &second].map(|codec| codec.held() + codec.window).iter().sum::<u32>();
            assert!(granted <= limit + 2 * BASE, "{granted}");
            while !first.streams.is_empty() {
                first.end(0);
                first.turn(true);
            }
        }
    }

    #[test]
    fn who_finds_no_credit_is_told_when_there_is_some() {
        let (credit, _told) = credit(8 * MIB);
        let [mut first, mut second] = [(); 2].map(|()| Codec::new(&credit));
        first.fill(64);
        second.fill(8);
        assert!(second.target < BASE + 8 * EACH, "{}", second.target);
        assert!(credit.is_short() && !second.granted.has_credit());
        drop(first);
        second.turn(false);
        assert_eq!(second.target, BASE + 8 * EACH);
    }
}
