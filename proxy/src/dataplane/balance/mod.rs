//! Which endpoint gets a request: the less loaded of two drawn ones, among those that are neither ejected nor tried
//! already. Pure, and without allocation: it is on the way of every request.
//!
//! Where no endpoint is both well and untried, a well one that was tried goes before one that is ejected: it failed once,
//! the other in a row. Where all are ejected, any of them is better than none.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::time::Instant;

use crate::base::random::Dice;
use crate::snapshot::{Backend, Endpoint};

mod p2c;

/// An endpoint of `backend`; `None` if it has none. `load` tells how many requests are under way to one.
pub(crate) fn pick<'a>(
    backend: &'a Backend,
    tried: &[SocketAddr],
    now: Instant,
    load: impl Fn(&Endpoint) -> usize,
    dice: &mut Dice,
) -> Option<&'a Arc<Endpoint>> {
    let healthy = |endpoint: &Endpoint| !backend.ejections.is_ejected(endpoint.address, now);
    let fresh = |endpoint: &Endpoint| !tried.contains(&endpoint.address);
    for (must_be_healthy, must_be_fresh) in [(true, true), (true, false), (false, true), (false, false)] {
        let among = || {
            let fits = |endpoint: &&Arc<Endpoint>| (!must_be_fresh || fresh(endpoint)) && (!must_be_healthy || healthy(endpoint));
            backend.endpoints.iter().filter(fits)
        };
        // Another thread may eject one between counting and choosing; then what is left is asked again, more widely.
        let chosen = p2c::choose(among().count(), |place| among().nth(place), |endpoint| load(endpoint), dice);
        if chosen.is_some() {
            return chosen;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::names::Named;
    use crate::policy::breaker::Breaker;
    use crate::policy::outlier::Outcome;
    use crate::snapshot::{AppProtocol, Transport};

    fn address(number: u8) -> SocketAddr {
        SocketAddr::from(([10, 64, 0, number], 80))
    }

    fn backend(endpoints: u8) -> Backend {
        let endpoint = |number| Endpoint {
            workload: Named::new("shop", format!("web-{number}")),
            address: address(number),
            transport: Transport::Plaintext,
        };
        Backend {
            service: Named::new("shop", "web"),
            port: 80,
            protocol: AppProtocol::Http,
            endpoints: (1..=endpoints).map(|number| Arc::new(endpoint(number))).collect(),
            connect_timeout: std::time::Duration::from_secs(1),
            budget: Arc::default(),
            breaker: Arc::new(Breaker::by_default()),
            ejections: Arc::default(),
        }
    }

    /// Which endpoints are picked, in many draws, when these are ejected and these were tried.
    fn check(endpoints: u8, ejected: &[u8], tried: &[u8], expected: &[u8]) {
        let (backend, now, mut dice) = (backend(endpoints), Instant::now(), Dice::from_seed(1));
        for number in ejected {
            // As if there were many, so that every one of them can be ejected.
            for _ in 0..5 {
                backend.ejections.report(address(*number), Outcome::Failure, 100, now);
            }
        }
        let tried: Vec<_> = tried.iter().map(|number| address(*number)).collect();
        let mut picked: Vec<_> =
            (0..500).filter_map(|_| pick(&backend, &tried, now, |_| 0, &mut dice)).map(|endpoint| endpoint.address).collect();
        picked.sort();
        picked.dedup();
        let expected: Vec<_> = expected.iter().map(|number| address(*number)).collect();
        assert_eq!(picked, expected, "{ejected:?} {tried:?}");
    }

    #[test]
    fn those_that_are_well_and_untried_go_first() {
        check(0, &[], &[], &[]);
        check(3, &[], &[], &[1, 2, 3]);
        check(3, &[1], &[], &[2, 3]);
        check(3, &[], &[1], &[2, 3]);
        check(3, &[1], &[2], &[3]);
    }

    #[test]
    fn one_that_was_tried_goes_before_one_that_is_ejected() {
        check(2, &[1], &[2], &[2]);
        check(1, &[], &[1], &[1]);
    }

    #[test]
    fn where_all_are_ejected_any_is_better_than_none() {
        check(2, &[1, 2], &[], &[1, 2]);
        check(2, &[1, 2], &[1], &[2]);
        check(2, &[1, 2], &[1, 2], &[1, 2]);
    }

    #[test]
    fn a_busy_endpoint_is_left_alone() {
        let (backend, mut dice) = (backend(2), Dice::from_seed(1));
        let busy = |endpoint: &Endpoint| if endpoint.address == address(1) { 9 } else { 1 };
        for _ in 0..100 {
            let picked = pick(&backend, &[], Instant::now(), busy, &mut dice).unwrap();
            assert_eq!(picked.address, address(2));
        }
    }
}
