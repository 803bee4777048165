//! How long a kept-alive connection to one endpoint may be idle and still be used: a pure machine.
//!
//! A server closes an idle connection when it likes (RFC 9112 9.5), and a request that crosses its FIN may be lost. So a
//! connection is given up before its server does: a good while before what the server told in `Keep-Alive: timeout=N`, and
//! after a quarter of the shortest idleness after which it was seen to close one. What was seen counts for less as time passes,
//! since a server that is restarted closes connections of any age.
//!
//! Invariant: the bound is never longer than what the server told, and never zero for ever.

use std::time::Duration;

use tokio::time::Instant;

/// What is known of one endpoint.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Idleness {
    told: Option<Duration>,
    /// The shortest idleness after which it closed, and when that was seen.
    closed: Option<(Duration, Instant)>,
}

impl Idleness {
    /// The server said in an answer how long it keeps an idle connection (RFC 2068 19.7.1; the field outlived its RFC).
    pub(super) fn told(&mut self, keep_alive: &[u8]) {
        if let Some(timeout) = timeout_of(keep_alive) {
            self.told = Some(timeout);
        }
    }

    /// The server closed a connection that had been idle for so long.
    pub(super) fn closed(&mut self, idle: Duration, now: Instant) {
        let idle = idle.max(CLOSED_MIN);
        if self.remembered(now).is_none_or(|shortest| idle <= shortest) {
            self.closed = Some((idle, now));
        }
    }

    /// A connection that has been idle for this long, or longer, is not used any more.
    pub(super) fn bound(&self, now: Instant) -> Duration {
        let told = match self.told {
            // One second for clocks, queues and servers that round; half of what is not much longer.
            Some(told) => told.saturating_sub(MARGIN).max(told / 2).min(told).min(TOLD_MAX),
            None => UNTOLD,
        };
        match self.remembered(now) {
            Some(closed) => told.min(closed / 4),
            None => told,
        }
    }

    /// The shortest idleness that ended in a close, made longer by the time since then.
    fn remembered(&self, now: Instant) -> Option<Duration> {
        let (idle, seen) = self.closed?;
        let doublings = now.saturating_duration_since(seen).as_secs() / DOUBLES_EVERY.as_secs();
        let factor = 1_u32.checked_shl(u32::try_from(doublings).unwrap_or(u32::MAX))?;
        Some(idle.saturating_mul(factor)).filter(|idle| *idle / 4 < TOLD_MAX)
    }
}

/// `timeout=N`, in seconds, of a `Keep-Alive` field.
fn timeout_of(field: &[u8]) -> Option<Duration> {
    let text = std::str::from_utf8(field).ok()?;
    text.split(',').find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        let seconds: u32 = name.trim().eq_ignore_ascii_case("timeout").then(|| value.trim().trim_matches('"').parse().ok())??;
        Some(Duration::from_secs(u64::from(seconds)))
    })
}

/// Where the server told nothing: below the five seconds that the shortest of the usual servers keep.
const UNTOLD: Duration = Duration::from_secs(4);
/// However long a server would keep it, an idle connection costs memory on both sides.
const TOLD_MAX: Duration = Duration::from_secs(15);
const MARGIN: Duration = Duration::from_secs(1);
/// Shorter than this nothing can be told apart from a close right after the answer.
const CLOSED_MIN: Duration = Duration::from_micros(50);
/// What was seen counts for half as much after each such time.
const DOUBLES_EVERY: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    async fn pass(time: Duration) -> Instant {
        tokio::time::advance(time).await;
        Instant::now()
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_server_told_is_kept_with_a_margin() {
        let now = Instant::now();
        for (field, bound) in [
            ("timeout=5, max=100", 4_000),
            ("timeout=5", 4_000),
            ("max=3, Timeout = \"10\"", 9_000),
            ("timeout=1", 500),
            ("timeout=0", 0),
            ("timeout=75", 15_000),
            ("timeout=x", 4_000),
            ("max=5", 4_000),
            ("", 4_000),
        ] {
            let mut idleness = Idleness::default();
            idleness.told(field.as_bytes());
            assert_eq!(idleness.bound(now), bound * MS, "{field}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_shortest_close_that_was_seen_counts_and_is_forgotten_in_time() {
        let mut idleness = Idleness::default();
        let now = Instant::now();
        idleness.closed(100 * MS, now);
        idleness.closed(700 * MS, now);
        assert_eq!(idleness.bound(now), 25 * MS);
        idleness.closed(20 * MS, now);
        assert_eq!(idleness.bound(now), 5 * MS);
        assert_eq!(idleness.bound(pass(9_999 * MS).await), 5 * MS);
        assert_eq!(idleness.bound(pass(MS).await), 10 * MS);
        // What was remembered as forty is confirmed, and holds for another while.
        idleness.closed(32 * MS, Instant::now());
        assert_eq!(idleness.bound(Instant::now()), 8 * MS);
        assert_eq!(idleness.bound(pass(Duration::from_secs(100)).await), 4_000 * MS);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_closes_after_every_answer_is_tried_again_after_a_while() {
        let mut idleness = Idleness::default();
        idleness.closed(Duration::ZERO, Instant::now());
        assert!(idleness.bound(Instant::now()) < MS);
        assert_eq!(idleness.bound(pass(Duration::from_secs(240)).await), 4_000 * MS);
        assert_eq!(idleness.bound(pass(Duration::from_secs(86_400 * 365)).await), 4_000 * MS);
    }

    proptest::proptest! {
        #[test]
        fn it_is_never_longer_than_what_was_told_or_just_seen(told in 0_u64..100, closed in 0_u64..20_000) {
            let mut idleness = Idleness::default();
            let now = Instant::now();
            idleness.told(format!("timeout={told}").as_bytes());
            idleness.closed(Duration::from_millis(closed), now);
            let bound = idleness.bound(now);
            proptest::prop_assert!(bound <= Duration::from_secs(told));
            proptest::prop_assert!(bound <= Duration::from_millis(closed).max(CLOSED_MIN));
        }

        #[test]
        fn any_field_is_read_without_harm(field: Vec<u8>) {
            Idleness::default().told(&field);
        }
    }
}
