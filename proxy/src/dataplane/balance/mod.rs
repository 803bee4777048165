//! Which endpoint gets a request: the less loaded of two drawn ones, among those that are neither ejected nor tried
//! already. Pure.
//!
//! Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing". Where every endpoint is ejected or tried,
//! any of them is better than none.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::time::Instant;

use crate::base::random::Dice;
use crate::snapshot::{Backend, Endpoint};

/// An endpoint of `backend`; `None` if it has none. `load` tells how many requests are under way to one.
pub(crate) fn pick<'a>(
    backend: &'a Backend,
    tried: &[SocketAddr],
    now: Instant,
    load: impl Fn(&Endpoint) -> usize,
    dice: &mut Dice,
) -> Option<&'a Arc<Endpoint>> {
    let healthy = |endpoint: &&Arc<Endpoint>| !backend.ejections.is_ejected(endpoint.address, now);
    let fresh = |endpoint: &&Arc<Endpoint>| !tried.contains(&endpoint.address);
    let all = || backend.endpoints.iter();
    two_choices(all().filter(healthy).filter(fresh).collect(), &load, dice)
        .or_else(|| two_choices(all().filter(healthy).collect(), &load, dice))
        .or_else(|| two_choices(all().filter(fresh).collect(), &load, dice))
        .or_else(|| two_choices(all().collect(), &load, dice))
}

fn two_choices<'a>(
    mut among: Vec<&'a Arc<Endpoint>>,
    load: &impl Fn(&Endpoint) -> usize,
    dice: &mut Dice,
) -> Option<&'a Arc<Endpoint>> {
    if among.is_empty() {
        return None;
    }
    let one = among.swap_remove(dice.below(among.len()));
    if among.is_empty() {
        return Some(one);
    }
    let other = among.swap_remove(dice.below(among.len()));
    Some(if load(other) < load(one) { other } else { one })
}
