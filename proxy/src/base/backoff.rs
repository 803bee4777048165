//! Pauses between attempts: each is twice as long as the one before, up to a longest one, and part of it may be by chance, so
//! that those who wait for the same do not come back in step.

use std::time::Duration;

/// How long to wait before the next attempt.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    pause: Duration,
}

impl Backoff {
    /// Begins with `first`.
    pub(crate) const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, pause: first }
    }

    /// The next pause, whole.
    pub(crate) fn whole(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).min(self.longest);
        pause
    }

    /// The next pause, of which up to a half is left out: all of that half where `chance` is 0.0, nothing where it is 1.0.
    pub(crate) fn jittered(&mut self, chance: f64) -> Duration {
        self.whole().mul_f64(0.5 + chance.clamp(0.0, 1.0) / 2.0)
    }

    /// Begins again.
    pub(crate) const fn reset(&mut self) {
        self.pause = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_again() {
        let mut backoff = Backoff::new(ms(20), ms(100));
        let pauses: Vec<Duration> = std::iter::repeat_with(|| backoff.whole()).take(5).collect();
        assert_eq!(pauses, [20, 40, 80, 100, 100].map(ms));
        backoff.reset();
        assert_eq!(backoff.whole(), ms(20));
    }

    #[test]
    fn chance_leaves_out_a_half_at_most_and_growth_does_not_depend_on_it() {
        let mut backoff = Backoff::new(ms(100), ms(5_000));
        assert_eq!([backoff.jittered(0.0), backoff.jittered(1.0), backoff.jittered(0.5)], [50, 200, 300].map(ms));
    }
}
