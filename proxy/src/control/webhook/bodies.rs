//! Room for the bodies of questions. Whoever reaches the port may send one, so all of them together are bounded; where there is
//! no room left, the one that is read the longest gives way: the API server's are whole within milliseconds.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// The bodies that are read or answered at this moment.
#[derive(Debug)]
pub(super) struct Bodies {
    most: usize,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    /// Of all together.
    bytes: usize,
    /// By number, the oldest first.
    bodies: BTreeMap<u64, Body>,
    count: u64,
}

#[derive(Debug)]
struct Body {
    bytes: usize,
    is_whole: bool,
    gone: Arc<Notify>,
}

/// The room of one body; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Room {
    bodies: Arc<Bodies>,
    number: u64,
    gone: Arc<Notify>,
}

impl Bodies {
    /// Of `most` bytes together.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, held: Mutex::default() })
    }

    /// For a body of which nothing was read yet.
    pub(super) fn begin(self: &Arc<Self>) -> Room {
        let gone = Arc::new(Notify::new());
        let mut held = self.held.lock();
        held.count += 1;
        let number = held.count;
        held.bodies.insert(number, Body { bytes: 0, is_whole: false, gone: Arc::clone(&gone) });
        Room { bodies: Arc::clone(self), number, gone }
    }
}

impl Held {
    fn remove(&mut self, number: u64) -> Option<Body> {
        let body = self.bodies.remove(&number)?;
        self.bytes -= body.bytes;
        Some(body)
    }
}

impl Room {
    /// Makes it `bytes` large. `false`: it has given way, or there is not as much even without those that can.
    pub(super) fn resize(&self, bytes: usize) -> bool {
        let mut held = self.bodies.held.lock();
        loop {
            let Some(own) = held.bodies.get(&self.number).map(|own| own.bytes) else { return false };
            let all = held.bytes - own + bytes;
            if all <= self.bodies.most {
                held.bytes = all;
                if let Some(own) = held.bodies.get_mut(&self.number) {
                    own.bytes = bytes;
                }
                return true;
            }
            let can_go = |(number, body): &(&u64, &Body)| **number != self.number && !body.is_whole && body.bytes > 0;
            let Some(oldest) = held.bodies.iter().find(can_go).map(|(number, _body)| *number) else { return false };
            if let Some(oldest) = held.remove(oldest) {
                oldest.gone.notify_one();
            }
        }
    }

    /// Ends when the room was given to another body. Cancel-safe.
    pub(super) async fn gone(&self) {
        self.gone.notified().await;
    }

    /// It is whole, and is answered now: it gives way to nobody. `false`: it has.
    pub(super) fn keep(&self) -> bool {
        let mut held = self.bodies.held.lock();
        held.bodies.get_mut(&self.number).map(|own| own.is_whole = true).is_some()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.bodies.held.lock().remove(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_body_that_is_read_the_longest_gives_way_and_one_that_is_answered_does_not() {
        let bodies = Bodies::new(10);
        let (first, second, third) = (bodies.begin(), bodies.begin(), bodies.begin());
        assert!(first.resize(4) && second.resize(4));
        assert!(third.resize(4), "for which the first went");
        first.gone().await;
        assert!(!first.resize(1) && !first.keep());
        assert!(second.keep() && third.resize(6));
        assert!(!third.resize(7), "the second is answered");
        drop(second);
        assert!(third.resize(10) && !third.resize(11));
        drop((first, third));
        let held = bodies.held.lock();
        assert!(held.bodies.is_empty() && held.bytes == 0);
    }
}
