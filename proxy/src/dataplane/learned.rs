//! What ports taught about themselves that nobody declared: who speaks first at them. It shortens how long a silent client
//! of the own application waits, and decides nothing else.
//!
//! Invariants: only a server's own bytes teach, so that no client can teach the others; what is learned expires and is
//! bounded.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// What is learned of the ports that the own application calls, by the address that it dialled.
#[derive(Debug, Default)]
pub(crate) struct Learned(Mutex<BTreeMap<SocketAddr, Lesson>>);

/// Who speaks first at a port.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum First {
    /// The server greeted a silent client.
    Server,
    /// The server answered a request of HTTP.
    Client,
}

#[derive(Clone, Copy, Debug)]
struct Lesson {
    first: First,
    until: Instant,
}

impl Learned {
    /// What is known of a port.
    pub(crate) fn of(&self, port: SocketAddr) -> Option<First> {
        let lesson = self.0.lock().get(&port).copied()?;
        (Instant::now() < lesson.until).then_some(lesson.first)
    }

    /// The server behind a port did this. Where one endpoint greets and another one answers, greetings count: listening to
    /// both sides is never wrong, only dearer.
    pub(crate) fn learn(&self, port: SocketAddr, first: First) {
        let now = Instant::now();
        let mut lessons = self.0.lock();
        if first == First::Client && lessons.get(&port).is_some_and(|lesson| lesson.first == First::Server && now < lesson.until)
        {
            return;
        }
        if lessons.len() >= PORTS_MAX && !lessons.contains_key(&port) {
            let oldest = lessons.iter().min_by_key(|(_, lesson)| lesson.until).map(|(port, _)| *port);
            oldest.map(|port| lessons.remove(&port));
        }
        lessons.insert(port, Lesson { first, until: now + LESSON_MAX });
    }
}

/// Ports that are remembered.
const PORTS_MAX: usize = 1024;
/// How long a lesson holds after it was given last: what listens at a port may become something else.
const LESSON_MAX: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use super::*;

    fn port(number: u16) -> SocketAddr {
        SocketAddr::from(([10, 65, 0, 1], number))
    }

    #[tokio::test(start_paused = true)]
    async fn a_lesson_expires() {
        let learned = Learned::default();
        assert_eq!(learned.of(port(25)), None);
        learned.learn(port(25), First::Server);
        learned.learn(port(25), First::Client);
        assert_eq!((learned.of(port(25)), learned.of(port(26))), (Some(First::Server), None));
        tokio::time::advance(LESSON_MAX).await;
        assert_eq!(learned.of(port(25)), None);
        learned.learn(port(25), First::Client);
        assert_eq!(learned.of(port(25)), Some(First::Client));
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_lesson_makes_room() {
        let learned = Learned::default();
        for number in 0..=u16::try_from(PORTS_MAX).unwrap() {
            learned.learn(port(number), First::Server);
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert_eq!(learned.0.lock().len(), PORTS_MAX);
        assert_eq!((learned.of(port(0)), learned.of(port(1))), (None, Some(First::Server)));
    }
}
