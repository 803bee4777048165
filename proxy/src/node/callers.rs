//! How many connections each caller holds: one pod cannot take the places of all others, and neither can who makes many network
//! namespaces: those of which no pod is known have one share together.

use std::sync::Arc;

use crate::base::places::{self, Places};

/// Connections by whom they are of.
#[derive(Debug)]
pub(crate) struct Callers(Arc<Places<Whose>>);

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
    cookie: u64,
    place: places::Place<Whose>,
}

impl Callers {
    /// Lets each namespace that is known hold `at_most` connections, and all others together as many.
    pub(crate) fn new(at_most: usize) -> Self {
        Self(Places::new(at_most))
    }

    /// A place for one more connection from the namespace with this cookie, if there is one left for it.
    pub(crate) fn admit(&self, cookie: u64, is_known: bool) -> Option<Place> {
        let place = self.0.take(if is_known { Whose::Known(cookie) } else { Whose::Strangers })?;
        Some(Place { cookie, place })
    }
}

impl Place {
    /// The caller's namespace.
    pub(crate) fn cookie(&self) -> u64 {
        self.cookie
    }

    /// The caller turned out to be of a pod: strangers have its place again.
    pub(crate) fn is_known(&mut self) {
        self.place.pass_to(Whose::Known(self.cookie));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(callers.0.all_free());
    }
}
