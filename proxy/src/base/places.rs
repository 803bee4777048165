//! So many places for each caller: who takes all of his own leaves those of others.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

/// What is held at once, by whose it is.
#[derive(Debug)]
pub(crate) struct Places<Whose> {
    each_most: usize,
    held: Mutex<BTreeMap<Whose, usize>>,
}

/// One of them; given back when dropped.
#[derive(Debug)]
pub(crate) struct Place<Whose: Copy + Ord> {
    places: Arc<Places<Whose>>,
    whose: Whose,
}

impl<Whose: Copy + Ord> Places<Whose> {
    /// `each_most` for each.
    pub(crate) fn new(each_most: usize) -> Arc<Self> {
        Arc::new(Self { each_most, held: Mutex::default() })
    }

    /// One more of `whose`, if one is left.
    pub(crate) fn take(self: &Arc<Self>, whose: Whose) -> Option<Place<Whose>> {
        let mut held = self.held.lock();
        let count = held.entry(whose).or_default();
        if *count >= self.each_most {
            return None;
        }
        *count += 1;
        Some(Place { places: Arc::clone(self), whose })
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

    /// Is none taken?
    #[cfg(test)]
    pub(crate) fn all_free(&self) -> bool {
        self.held.lock().is_empty()
    }
}

impl<Whose: Copy + Ord> Place<Whose> {
    /// Counts it to another, who may have more than his places by that: it is held already.
    pub(crate) fn pass_to(&mut self, whose: Whose) {
        let former = std::mem::replace(&mut self.whose, whose);
        *self.places.held.lock().entry(whose).or_default() += 1;
        self.places.give_back(former);
    }
}

impl<Whose: Copy + Ord> Drop for Place<Whose> {
    fn drop(&mut self) {
        self.places.give_back(self.whose);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_that_holds_all_of_its_places_leaves_those_of_others() {
        let places = Places::new(2);
        let (first, second) = (places.take(1), places.take(1));
        assert!(second.is_some() && places.take(1).is_none());
        let other = places.take(2);
        assert!(other.is_some());
        drop(first);
        let third = places.take(1);
        assert!(third.is_some() && places.take(1).is_none());
        drop((second, third, other));
        assert!(places.all_free());
    }

    #[test]
    fn a_place_that_turns_out_to_be_anothers_is_free_for_whose_it_was() {
        let places = Places::new(1);
        let (mut first, second) = (places.take(1).unwrap(), places.take(2).unwrap());
        first.pass_to(2);
        first.pass_to(2);
        let third = places.take(1);
        assert!(third.is_some() && places.take(2).is_none());
        drop(second);
        assert!(places.take(2).is_none());
        drop((first, third));
        assert!(places.all_free());
    }
}
