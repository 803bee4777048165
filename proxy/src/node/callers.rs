//! How many connections each caller holds: one pod cannot take the places of all others, and neither can who makes many network
//! namespaces: those of which no pod is known have one share together.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

/// Connections by whom they are of.
#[derive(Debug)]
pub(crate) struct Callers {
    at_most: usize,
    held: Mutex<BTreeMap<Whose, usize>>,
}

/// Whose share a connection is counted to.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Whose {
    /// Of the network namespace with this cookie.
    Known(u64),
    Strangers,
}

/// One connection; dropping it gives its place back.
#[derive(Debug)]
pub(crate) struct Place {
    callers: Arc<Callers>,
    cookie: u64,
    whose: Whose,
}

impl Callers {
    /// Lets each namespace that is known hold `at_most` connections, and all others together as many.
    pub(crate) fn new(at_most: usize) -> Arc<Self> {
        Arc::new(Self { at_most, held: Mutex::default() })
    }

    /// A place for one more connection from the namespace with this cookie, if there is one left for it.
    pub(crate) fn admit(self: &Arc<Self>, cookie: u64, is_known: bool) -> Option<Place> {
        let whose = if is_known { Whose::Known(cookie) } else { Whose::Strangers };
        let mut held = self.held.lock();
        let count = held.entry(whose).or_default();
        if *count >= self.at_most {
            return None;
        }
        *count += 1;
        Some(Place { callers: Arc::clone(self), cookie, whose })
    }

    fn give_back(&self, whose: Whose) {
        let mut held = self.held.lock();
        if let Some(count) = held.get_mut(&whose) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                held.remove(&whose);
            }
        }
    }
}

impl Place {
    /// The caller's namespace.
    pub(crate) fn cookie(&self) -> u64 {
        self.cookie
    }

    /// The caller turned out to be of a pod: strangers have its place again.
    pub(crate) fn is_known(&mut self) {
        let whose = std::mem::replace(&mut self.whose, Whose::Known(self.cookie));
        *self.callers.held.lock().entry(self.whose).or_default() += 1;
        self.callers.give_back(whose);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.callers.give_back(self.whose);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_that_holds_all_of_its_places_leaves_those_of_others() {
        let callers = Callers::new(2);
        let (first, _second) = (callers.admit(1, true), callers.admit(1, true).unwrap());
        assert!(callers.admit(1, true).is_none());
        let other = callers.admit(2, true);
        assert!(other.is_some());
        drop(first);
        assert!(callers.admit(1, true).is_some());
        drop(other);
        assert_eq!(callers.held.lock().len(), 1);
    }

    #[test]
    fn namespaces_of_which_no_pod_is_known_have_one_share_together_until_one_is() {
        let callers = Callers::new(2);
        let (mut first, second) = (callers.admit(1, false).unwrap(), callers.admit(2, false).unwrap());
        assert!(callers.admit(3, false).is_none() && callers.admit(4, true).is_some());
        first.is_known();
        first.is_known();
        let third = callers.admit(3, false);
        assert!(third.is_some() && callers.admit(5, false).is_none());
        drop((first, second, third));
        assert!(callers.held.lock().is_empty());
    }
}
