//! How many connections each caller holds: one pod cannot take the places of all others.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

/// Connections by the cookie of the network namespace that they come from.
#[derive(Debug)]
pub(crate) struct Callers {
    at_most: usize,
    held: Mutex<BTreeMap<u64, usize>>,
}

/// One connection; dropping it gives its place back.
#[derive(Debug)]
pub(crate) struct Place {
    callers: Arc<Callers>,
    cookie: u64,
}

impl Callers {
    /// Lets each namespace hold `at_most` connections.
    pub(crate) fn new(at_most: usize) -> Arc<Self> {
        Arc::new(Self { at_most, held: Mutex::default() })
    }

    /// A place for one more connection, if the caller has one left.
    pub(crate) fn admit(self: &Arc<Self>, cookie: u64) -> Option<Place> {
        let mut held = self.held.lock();
        let count = held.entry(cookie).or_default();
        if *count >= self.at_most {
            return None;
        }
        *count += 1;
        Some(Place { callers: Arc::clone(self), cookie })
    }
}

impl Place {
    /// The caller's namespace.
    pub(crate) fn cookie(&self) -> u64 {
        self.cookie
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.callers.held.lock();
        if let Some(count) = held.get_mut(&self.cookie) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                held.remove(&self.cookie);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_that_holds_all_of_its_places_leaves_those_of_others() {
        let callers = Callers::new(2);
        let (first, _second) = (callers.admit(1), callers.admit(1).unwrap());
        assert!(callers.admit(1).is_none());
        let other = callers.admit(2);
        assert!(other.is_some());
        drop(first);
        assert!(callers.admit(1).is_some());
        drop(other);
        assert_eq!(callers.held.lock().len(), 1);
    }
}
