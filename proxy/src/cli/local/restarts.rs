//! When a process that ended is started anew, and what is told of it.
//!
//! After a pause that doubles with each end, jittered and bounded, and set back once a process has lived for a steady time.
//! It does not matter who ended it: a process that is killed again and again is no better than one that fails by itself.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::super::table;
use crate::base::backoff::Backoff;
use crate::base::clock::WallClock;
use crate::base::random::Dice;

/// Of one process.
#[derive(Debug)]
pub(crate) struct Restarts {
    backoff: Backoff,
    dice: Dice,
    /// Since when the present one lives, or the last one did.
    since: Option<Instant>,
    due: Option<Instant>,
    told: Option<Restarted>,
}

/// What others are told. Milliseconds since the epoch.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Restarted {
    /// How often it was started anew.
    pub(crate) times: u64,
    /// How the last one ended.
    pub(crate) ended: String,
    pub(crate) ended_at_ms: u64,
    /// When the next one is started; none once it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) next_at_ms: Option<u64>,
}

impl Restarts {
    /// Of a process that was not started yet.
    pub(crate) const fn new(dice: Dice) -> Self {
        Self { backoff: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE), dice, since: None, due: None, told: None }
    }

    /// The first one is to be started then, and not before.
    pub(crate) const fn first_at(&mut self, due: Instant) {
        self.due = Some(due);
    }

    /// It is started now.
    pub(crate) fn started(&mut self, now: Instant) {
        (self.since, self.due) = (Some(now), None);
        if let Some(told) = self.told.as_mut().filter(|told| told.next_at_ms.is_some()) {
            told.times += 1;
            told.next_at_ms = None;
        }
    }

    /// It has ended, or could not be started, for the reason `why`.
    pub(crate) fn ended(&mut self, now: Instant, clock: &WallClock, why: impl fmt::Display) -> &Restarted {
        if self.since.take().is_some_and(|since| now.duration_since(since) >= STEADY) {
            self.backoff.reset();
        }
        let pause = self.backoff.jittered(self.dice.fraction());
        self.due = Some(now + pause);
        let ended_at_ms = millis(clock.since_epoch());
        let times = self.told.as_ref().map_or(0, |told| told.times);
        let next_at_ms = Some(ended_at_ms + millis(pause));
        self.told.insert(Restarted { times, ended: why.to_string(), ended_at_ms, next_at_ms })
    }

    /// When it is to be started; none while it runs.
    pub(crate) const fn due(&self) -> Option<Instant> {
        self.due
    }

    /// What there is to tell; nothing of one that never ended.
    pub(crate) const fn told(&self) -> Option<&Restarted> {
        self.told.as_ref()
    }
}

impl Restarted {
    /// As a clause, `now` since the epoch: `ended 3s ago (signal: 9 (SIGKILL)), started anew 2 times`.
    pub(crate) fn clause(&self, now: Duration) -> String {
        let ended = format!("ended {} ({})", table::moment(self.ended_at_ms / 1000, now.as_secs()), self.ended);
        let anew = || format!(", started anew {}", table::times(self.times));
        let Some(next) = self.next_at_ms else { return ended + &anew() };
        let before = if self.times == 0 { String::new() } else { anew() + " before" };
        match Duration::from_millis(next).saturating_sub(now) {
            Duration::ZERO => format!("{ended}, next start now{before}"),
            pause => format!("{ended}, next start in {:.1} s{before}", pause.as_secs_f64()),
        }
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Who waits for a process that is started anew waits for this pause too.
pub(crate) const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// One that lived this long did not fail at its start.
const STEADY: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that lives for so long each time; the pauses before it is started anew, and what is told of the last.
    fn pauses(lives: &[u64]) -> (Vec<Duration>, Restarted) {
        let clock = WallClock::fixed(Duration::from_secs(1_000));
        let (mut restarts, mut now) = (Restarts::new(Dice::from_seed(1)), Instant::now());
        let mut pauses = Vec::new();
        for life_ms in lives {
            restarts.started(now);
            assert_eq!(restarts.due(), None);
            now += Duration::from_millis(*life_ms);
            restarts.ended(now, &clock, "signal: 9 (SIGKILL)");
            let due = restarts.due().unwrap();
            pauses.push(due - now);
            now = due;
        }
        (pauses, restarts.told().unwrap().clone())
    }

    fn assert_are(pauses: &[Duration], whole_ms: &[u64]) {
        let is = |(pause, whole): (&Duration, &u64)| (whole / 2..=*whole).contains(&millis(*pause));
        assert!(pauses.len() == whole_ms.len() && pauses.iter().zip(whole_ms).all(is), "{pauses:?}, not {whole_ms:?}");
    }

    #[tokio::test]
    async fn what_ends_again_and_again_is_started_after_pauses_that_grow_to_a_bound_however_it_ends() {
        let (found, told) = pauses(&[0, 500, 9_999, 50, 50, 50, 50, 50]);
        assert_are(&found, &[100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000]);
        assert_eq!(told.times, 7);
    }

    #[tokio::test]
    async fn a_steady_life_sets_the_pause_back() {
        assert_are(&pauses(&[50, 50, 50, 10_000, 50]).0, &[100, 200, 400, 100, 200]);
    }

    #[tokio::test]
    async fn two_processes_do_not_come_back_in_step() {
        let pauses = |seed| {
            let mut restarts = Restarts::new(Dice::from_seed(seed));
            restarts.ended(Instant::now(), &WallClock::fixed(Duration::ZERO), "x").next_at_ms
        };
        assert!(pauses(1) != pauses(2) || pauses(1) != pauses(3));
    }

    #[tokio::test]
    async fn what_was_never_started_is_due_when_it_was_said_and_has_nothing_to_tell() {
        let (mut restarts, now) = (Restarts::new(Dice::from_seed(1)), Instant::now());
        restarts.first_at(now + STEADY);
        assert_eq!((restarts.due(), restarts.told()), (Some(now + STEADY), None));
        restarts.started(now + STEADY);
        assert_eq!((restarts.due(), restarts.told()), (None, None));
    }

    #[test]
    fn it_is_told_why_it_ended_when_it_comes_back_and_how_often_it_did() {
        let told = |times, next_at_ms| {
            Restarted { times, ended: "exit status: 1".to_owned(), ended_at_ms: 1_000_200, next_at_ms }
                .clause(Duration::from_millis(1_003_100))
        };
        assert_eq!(told(0, Some(1_004_400)), "ended 3s ago (exit status: 1), next start in 1.3 s");
        assert_eq!(told(1, Some(1_003_000)), "ended 3s ago (exit status: 1), next start now, started anew once before");
        assert_eq!(told(1, None), "ended 3s ago (exit status: 1), started anew once");
        assert_eq!(told(4, None), "ended 3s ago (exit status: 1), started anew 4 times");
    }

    #[test]
    fn what_is_told_is_read_again() {
        for next_at_ms in [None, Some(9)] {
            let told = Restarted { times: 2, ended: "x".to_owned(), ended_at_ms: 5, next_at_ms };
            assert_eq!(serde_json::from_str::<Restarted>(&serde_json::to_string(&told).unwrap()).unwrap(), told);
        }
    }
}
