//! State that outlives a swap: buckets, budgets, breakers, ejections. Each policy knows whether its state still fits its
//! configuration; here stands where the previous one is found.

use std::sync::Arc;

use super::{Backend, Inbound};
use crate::policy::breaker::Breaker;
use crate::policy::outlier::Ejections;
use crate::policy::rate_limit::RateLimit;
use crate::policy::retry::RetryBudget;

/// The state of one backend, as its configuration asks for it.
pub(super) struct Cells {
    pub(super) budget: RetryBudget,
    pub(super) breaker: Breaker,
    pub(super) ejections: Ejections,
}

/// The state of one backend, as it goes on.
pub(super) struct Carried {
    pub(super) budget: Arc<RetryBudget>,
    pub(super) breaker: Arc<Breaker>,
    pub(super) ejections: Arc<Ejections>,
}

impl Cells {
    /// Goes on with the state of the previous form of the backend where its configuration is the same.
    pub(super) fn carried_from(self, previous: Option<&Arc<Backend>>) -> Carried {
        let Self { budget, breaker, ejections } = self;
        match previous {
            Some(previous) => Carried {
                budget: budget.carried_from(&previous.budget),
                breaker: breaker.carried_from(&previous.breaker),
                ejections: ejections.carried_from(&previous.ejections),
            },
            None => Carried { budget: Arc::new(budget), breaker: Arc::new(breaker), ejections: Arc::new(ejections) },
        }
    }
}

/// The limit with the bucket that it had, wherever in the previous configuration it stood.
pub(super) fn carry_limit(limit: RateLimit, previous: &Inbound) -> RateLimit {
    let ports = previous.ports.values().chain([&previous.other]);
    let mut limits = ports.filter_map(|port| port.policies.rate_limit.as_ref());
    match limits.find(|old| old.rule == limit.rule) {
        Some(old) => limit.carried_from(old),
        None => limit,
    }
}

/// The backend, or the previous one if nothing changed, so that what is shared stays shared.
pub(super) fn share(backend: Backend, previous: Option<&Arc<Backend>>) -> Arc<Backend> {
    let Some(previous) = previous else { return Arc::new(backend) };
    let Backend { service, port, protocol, endpoints, connect_timeout, budget, breaker, ejections } = &backend;
    let same = *service == previous.service
        && *port == previous.port
        && *protocol == previous.protocol
        && *endpoints == previous.endpoints
        && *connect_timeout == previous.connect_timeout
        && Arc::ptr_eq(budget, &previous.budget)
        && Arc::ptr_eq(breaker, &previous.breaker)
        && Arc::ptr_eq(ejections, &previous.ejections);
    if same { Arc::clone(previous) } else { Arc::new(backend) }
}
