//! The series that the last requests were counted in, found again without building a label.
//!
//! A request names its ends by shared handles: the same configuration and the same connection give the same handles. Where
//! all of them are those of an earlier request, so are the series. Invariant: an entry keeps its handles alive, so that
//! equal addresses mean equal names.

use std::sync::Arc;

use parking_lot::Mutex;

use super::record::Ends;
use crate::base::names::Named;
use crate::identity::spiffe::SpiffeId;
use crate::policy::RuleName;
use crate::telemetry::Direction;
use crate::telemetry::series::Traffic;

/// A few places, each for the requests whose handles lead to it.
#[derive(Debug)]
pub(crate) struct SeriesCache {
    places: Mutex<[Option<Entry>; PLACES]>,
}

impl Default for SeriesCache {
    fn default() -> Self {
        Self { places: Mutex::new(std::array::from_fn(|_| None)) }
    }
}

#[derive(Debug)]
struct Entry {
    direction: Direction,
    ends: Ends,
    traffic: Arc<Traffic>,
}

impl SeriesCache {
    /// The series of a request between these ends; `resolve` looks them up by their labels.
    pub(crate) fn resolve(&self, direction: Direction, ends: &Ends, resolve: impl FnOnce() -> Arc<Traffic>) -> Arc<Traffic> {
        let place = place_of(ends);
        let known = |entry: &&Entry| entry.direction == direction && same(&entry.ends, ends);
        if let Some(entry) = self.places.lock().get(place).and_then(Option::as_ref).filter(known) {
            return Arc::clone(&entry.traffic);
        }
        let traffic = resolve();
        let entry = Entry { direction, ends: ends.clone(), traffic: Arc::clone(&traffic) };
        let replaced = self.places.lock().get_mut(place).and_then(|place| place.replace(entry));
        drop(replaced);
        traffic
    }
}

/// Are all names that become labels the same handles?
fn same(one: &Ends, other: &Ends) -> bool {
    addresses(one) == addresses(other) && one.mtls == other.mtls
}

fn place_of(ends: &Ends) -> usize {
    // Addresses of allocations differ least in their lowest bits.
    let mixed = addresses(ends).into_iter().fold(0_usize, |mixed, address| (mixed ^ (address >> 4)).wrapping_mul(MIX));
    mixed.rotate_left(8) % PLACES
}

fn addresses(ends: &Ends) -> [usize; 5] {
    [
        ends.source.as_ref().map_or(0, SpiffeId::address),
        ends.destination.as_ref().map_or(0, SpiffeId::address),
        ends.service.as_ref().map_or(0, |service| Named::addresses(service).0),
        ends.service.as_ref().map_or(0, |service| Named::addresses(service).1),
        ends.route.as_ref().map_or(0, RuleName::address),
    ]
}

/// How many there are: more than a pod usually has callers and callees.
const PLACES: usize = 64;
/// An odd number with its bits well spread.
const MIX: usize = 0x9e37_79b9_7f4a_7c15;

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::telemetry::metrics::Metrics;
    use crate::telemetry::series::TrafficLabels;

    fn ends(service: &str, route: &str) -> Ends {
        Ends { service: Some(Named::new("shop", service)), route: Some(RuleName::new(route)), ..Ends::default() }
    }

    #[test]
    fn the_same_handles_are_looked_up_once_and_others_by_themselves() {
        let (metrics, cache, asked) = (Metrics::new().unwrap(), SeriesCache::default(), Cell::new(0));
        let resolve = |direction, ends: &Ends| {
            cache.resolve(direction, ends, || {
                asked.set(asked.get() + 1);
                metrics.traffic(&TrafficLabels {
                    direction,
                    source_identity: "",
                    destination_identity: "",
                    destination_service: &ends.service.as_ref().unwrap().to_string(),
                    route: ends.route.as_ref().unwrap().as_str(),
                    mtls: ends.mtls,
                })
            })
        };
        let one = ends("cart", "a");
        let first = resolve(Direction::Inbound, &one);
        assert!(Arc::ptr_eq(&first, &resolve(Direction::Inbound, &one.clone())));
        assert_eq!(asked.get(), 1);
        // Whatever becomes a label tells requests apart, even where it meets the same place.
        for (direction, other) in [
            (Direction::Outbound, one.clone()),
            (Direction::Inbound, Ends { mtls: true, ..one.clone() }),
            (Direction::Inbound, ends("cart", "b")),
            (Direction::Inbound, ends("books", "a")),
        ] {
            assert!(!Arc::ptr_eq(&first, &resolve(direction, &other)), "{other:?}");
        }
        // Equal names by other handles are the same series, found the long way.
        assert!(Arc::ptr_eq(&first, &resolve(Direction::Inbound, &ends("cart", "a"))));
    }
}
