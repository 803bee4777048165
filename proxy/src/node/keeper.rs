//! Listeners that outlive their sidecars, so that connections wait instead of failing while no sidecar accepts them.
//!
//! A connection waits only in the backlog of a listener that exists, and a listener exists for as long as somebody holds a
//! descriptor of it. The agent holds one of each that a sidecar handed over, and gives them to the pod's next sidecar.
//! Invariant: what waits is never let through without a sidecar, and a pod whose sidecars do not stay waits no longer than
//! its hold time in all: only one that served for as long begins the time anew.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

/// The listeners of pods, by the cookie of their network namespace. `L` closes when it is dropped.
#[derive(Debug)]
pub(crate) struct Keeper<L> {
    pods: BTreeMap<u64, Kept<L>>,
    enrolments: u64,
}

#[derive(Debug)]
struct Kept<L> {
    /// Empty once the time was up.
    listeners: Vec<L>,
    /// Which enrolment they came with.
    enrolment: u64,
    served_since: Instant,
    is_served: bool,
    /// From when until when connections may wait, while they do.
    wait: Option<(Instant, Instant)>,
    /// What earlier waits left of the hold time; `None`: all of it.
    rest: Option<Duration>,
}

impl<L> Keeper<L> {
    pub(crate) const fn new() -> Self {
        Self { pods: BTreeMap::new(), enrolments: 0 }
    }

    /// A sidecar handed these over, and serves them. Returns what [`Self::left`] is to be told, and whether connections had
    /// been waiting.
    pub(crate) fn keep(&mut self, pod: u64, listeners: Vec<L>, now: Instant) -> (u64, bool) {
        self.enrolments += 1;
        let former = self.pods.remove(&pod);
        let waited = former.as_ref().is_some_and(Kept::is_waiting);
        let rest = former.and_then(|former| match former.wait {
            Some((_since, until)) => Some(until.saturating_duration_since(now)),
            None => former.rest,
        });
        let kept = Kept { listeners, enrolment: self.enrolments, served_since: now, is_served: true, wait: None, rest };
        self.pods.insert(pod, kept);
        (self.enrolments, waited)
    }

    /// The sidecar of `enrolment` is gone: connections wait for another one, for `hold` at most. `None` if another one is
    /// there already, or nothing may wait; else the time that is left.
    pub(crate) fn left(&mut self, pod: u64, enrolment: u64, hold: Duration, now: Instant) -> Option<Duration> {
        let kept = self.pods.get_mut(&pod).filter(|kept| kept.enrolment == enrolment)?;
        kept.is_served = false;
        let is_steady = now.duration_since(kept.served_since) >= hold;
        let rest = kept.rest.filter(|_left| !is_steady).unwrap_or(hold).min(hold);
        kept.wait = Some((now, now + rest));
        if rest.is_zero() {
            kept.listeners.clear();
            return None;
        }
        kept.is_waiting().then_some(rest)
    }

    /// What the pod's next sidecar is given.
    pub(crate) fn listeners(&self, pod: u64) -> &[L] {
        self.pods.get(&pod).map_or(&[], |kept| &kept.listeners)
    }

    /// When the first of them is to be closed.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.pods.values().filter(|kept| kept.is_waiting()).filter_map(|kept| kept.wait).map(|(_since, until)| until).min()
    }

    /// Closes those whose time is up. Returns their pods.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<u64> {
        let mut expired = Vec::new();
        for (pod, kept) in &mut self.pods {
            if kept.is_waiting() && kept.wait.is_some_and(|(_since, until)| until <= now) {
                kept.listeners.clear();
                expired.push(*pod);
            }
        }
        expired
    }

    /// The pod is gone, or going: nothing waits for it any more.
    pub(crate) fn forget(&mut self, pod: u64) {
        self.pods.remove(&pod);
    }

    /// For how long connections of a pod have waited for a sidecar, and may at most, if they do.
    pub(crate) fn wait(&self, pod: u64, now: Instant) -> Option<(Duration, Duration)> {
        let (since, until) = self.pods.get(&pod).filter(|kept| kept.is_waiting())?.wait?;
        Some((now.duration_since(since), until.duration_since(since)))
    }

    /// Pods that have a sidecar.
    pub(crate) fn served(&self) -> impl Iterator<Item = u64> {
        self.pods.iter().filter(|(_pod, kept)| kept.is_served).map(|(pod, _kept)| *pod)
    }

    /// Pods whose connections wait for a sidecar.
    pub(crate) fn waiting(&self) -> usize {
        self.pods.values().filter(|kept| kept.is_waiting()).count()
    }
}

impl<L> Kept<L> {
    fn is_waiting(&self) -> bool {
        !self.is_served && !self.listeners.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOLD: Duration = Duration::from_secs(10);
    const POD: u64 = 7;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    /// A keeper whose pod lost its sidecar at the given time, after it had served for long.
    fn lost(at: Instant) -> Keeper<&'static str> {
        let mut keeper = Keeper::new();
        let (enrolment, waited) = keeper.keep(POD, vec!["inbound", "outbound"], at - seconds(60));
        assert!(!waited);
        assert_eq!(keeper.left(POD, enrolment, HOLD, at), Some(HOLD));
        keeper
    }

    #[tokio::test(start_paused = true)]
    async fn listeners_wait_for_the_next_sidecar() {
        let now = Instant::now() + seconds(100);
        let mut keeper = lost(now);
        assert_eq!((keeper.waiting(), keeper.next(), keeper.served().count()), (1, Some(now + HOLD), 0));
        assert!(keeper.expire(now + seconds(9)).is_empty());
        assert_eq!(keeper.wait(POD, now + seconds(3)), Some((seconds(3), HOLD)));
        assert_eq!(keeper.listeners(POD), ["inbound", "outbound"]);
        let (_enrolment, waited) = keeper.keep(POD, vec!["inbound", "outbound"], now + seconds(9));
        assert!(waited);
        assert_eq!((keeper.waiting(), keeper.next(), keeper.wait(POD, now + seconds(9))), (0, None, None));
        assert_eq!(keeper.served().next(), Some(POD));
        assert!(keeper.expire(now + seconds(60)).is_empty());
        assert_eq!(keeper.listeners(POD).len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_waits_longer_than_the_hold_time() {
        let now = Instant::now() + seconds(100);
        let mut keeper = lost(now);
        assert_eq!(keeper.expire(now + HOLD), [POD]);
        assert_eq!(keeper.wait(POD, now + HOLD), None);
        assert_eq!((keeper.listeners(POD).len(), keeper.waiting(), keeper.next()), (0, 0, None));
        assert!(keeper.expire(now + HOLD).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn sidecars_that_end_again_and_again_do_not_prolong_the_time() {
        let now = Instant::now() + seconds(100);
        let mut keeper = lost(now);
        // What counts is how long connections waited, not how long ago the first of them did.
        let (second, _) = keeper.keep(POD, vec!["inbound"], now + seconds(3));
        assert_eq!(keeper.left(POD, second, HOLD, now + seconds(12)), Some(seconds(7)));
        let (third, _) = keeper.keep(POD, vec!["inbound"], now + seconds(18));
        assert_eq!(keeper.left(POD, third, HOLD, now + seconds(20)), Some(seconds(1)));
        assert_eq!(keeper.wait(POD, now + seconds(20)), Some((seconds(0), seconds(1))));
        assert_eq!(keeper.expire(now + seconds(21)), [POD]);
        let (fourth, _) = keeper.keep(POD, vec!["inbound"], now + seconds(30));
        assert_eq!(keeper.left(POD, fourth, HOLD, now + seconds(31)), None);
        assert_eq!(keeper.listeners(POD).len(), 0);
        let (steady, _) = keeper.keep(POD, vec!["inbound"], now + seconds(40));
        assert_eq!(keeper.left(POD, steady, HOLD, now + seconds(50)), Some(HOLD));
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_a_former_sidecar_says_nothing_about_the_next_one() {
        let now = Instant::now();
        let mut keeper = Keeper::new();
        let (first, _) = keeper.keep(POD, vec!["inbound"], now);
        let (second, _) = keeper.keep(POD, vec!["inbound"], now);
        assert_eq!(keeper.left(POD, first, HOLD, now), None);
        assert_eq!(keeper.waiting(), 0);
        assert_eq!(keeper.left(POD, second, HOLD, now), Some(HOLD));
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_hold_time_nothing_waits() {
        let now = Instant::now();
        let mut keeper = Keeper::new();
        let (enrolment, _) = keeper.keep(POD, vec!["inbound"], now);
        assert_eq!(keeper.left(POD, enrolment, Duration::ZERO, now), None);
        assert_eq!(keeper.listeners(POD).len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_is_gone_is_forgotten() {
        let now = Instant::now() + seconds(100);
        let mut keeper = lost(now);
        keeper.forget(POD);
        assert_eq!((keeper.waiting(), keeper.next(), keeper.listeners(POD).len()), (0, None, 0));
    }
}
