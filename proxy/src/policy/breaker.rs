//! Circuit breaking by limits: connections, waiting requests and requests of one service.
//!
//! Sources: none; the shape and the size of the limits are those of other meshes. What is over a limit is refused at once:
//! a queue in front of a backend that is too slow makes it slower. The limits are each sidecar's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RuleName;
use crate::base::problems::{FieldPath, Problems};

/// What a user writes. Every limit is at least 1.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct BreakerConfig {
    /// Connections to all endpoints of the service together; 1024 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_connections: Option<u32>,
    /// Requests that wait for a connection; 1024 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_pending_requests: Option<u32>,
    /// Requests under way, waiting ones among them; 4096 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_requests: Option<u32>,
}

/// The limits of one service and how much of them is used.
#[derive(Debug)]
pub(crate) struct Breaker {
    pub(crate) rule: RuleName,
    connections: Gauge,
    pending: Gauge,
    requests: Gauge,
}

/// Held while a slot is used; dropping it gives the slot back.
#[derive(Debug)]
pub(crate) struct Slot {
    breaker: Arc<Breaker>,
    of: Kind,
}

/// What a slot is a slot of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Connection,
    Pending,
    Request,
}

/// A count that never passes its limit.
#[derive(Debug)]
struct Gauge {
    used: AtomicU32,
    limit: u32,
}

impl BreakerConfig {
    /// Reports every fault under `at` and returns a breaker only if there is none.
    pub(crate) fn compile(&self, rule: RuleName, at: &FieldPath, problems: &mut Problems) -> Option<Breaker> {
        let limits = [
            ("maxConnections", self.max_connections),
            ("maxPendingRequests", self.max_pending_requests),
            ("maxRequests", self.max_requests),
        ];
        let mut good = true;
        for (field, limit) in limits {
            if limit == Some(0) {
                problems.refuse(&at.field(field), "a limit of 0 lets nothing pass", "write at least 1, or leave it out");
                good = false;
            }
        }
        good.then(|| Breaker {
            rule,
            connections: Gauge::new(self.max_connections.unwrap_or(CONNECTIONS)),
            pending: Gauge::new(self.max_pending_requests.unwrap_or(PENDING)),
            requests: Gauge::new(self.max_requests.unwrap_or(REQUESTS)),
        })
    }
}

impl Breaker {
    /// The breaker of a service of which no policy says anything.
    pub(crate) fn by_default() -> Self {
        Self {
            rule: RuleName::new("default_limits"),
            connections: Gauge::new(CONNECTIONS),
            pending: Gauge::new(PENDING),
            requests: Gauge::new(REQUESTS),
        }
    }

    /// This breaker, or `previous` if both say the same, so that slots in use stay counted.
    pub(crate) fn carried_from(self, previous: &Arc<Self>) -> Arc<Self> {
        let same = self.rule == previous.rule
            && self.connections.limit == previous.connections.limit
            && self.pending.limit == previous.pending.limit
            && self.requests.limit == previous.requests.limit;
        if same { Arc::clone(previous) } else { Arc::new(self) }
    }

    /// A slot for a request that waits for or holds an upstream stream; `None` at the limit.
    pub(crate) fn admit_request(self: &Arc<Self>) -> Option<Slot> {
        self.admit(Kind::Request)
    }

    /// A slot for the time in which a request waits for a connection; `None` at the limit. Given back when it has one.
    pub(crate) fn admit_pending(self: &Arc<Self>) -> Option<Slot> {
        self.admit(Kind::Pending)
    }

    /// A slot for an upstream connection; `None` at the limit.
    pub(crate) fn admit_connection(self: &Arc<Self>) -> Option<Slot> {
        self.admit(Kind::Connection)
    }

    /// Connections, waiting requests and requests now.
    #[cfg(test)]
    pub(crate) fn used(&self) -> (u32, u32, u32) {
        let used = |kind| self.gauge(kind).used.load(Ordering::Relaxed);
        (used(Kind::Connection), used(Kind::Pending), used(Kind::Request))
    }

    fn admit(self: &Arc<Self>, of: Kind) -> Option<Slot> {
        self.gauge(of).take().then(|| Slot { breaker: Arc::clone(self), of })
    }

    fn gauge(&self, of: Kind) -> &Gauge {
        match of {
            Kind::Connection => &self.connections,
            Kind::Pending => &self.pending,
            Kind::Request => &self.requests,
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Each slot was counted once when it was made, so the count cannot pass below 0.
        self.breaker.gauge(self.of).used.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Gauge {
    fn new(limit: u32) -> Self {
        Self { used: AtomicU32::new(0), limit }
    }

    fn take(&self) -> bool {
        // The count guards no other memory, so relaxed order is enough.
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| (used < self.limit).then_some(used + 1)).is_ok()
    }
}

/// Connections of one service where nothing else is written: as in Envoy.
const CONNECTIONS: u32 = 1024;

/// Waiting requests of one service where nothing else is written: as in Envoy.
const PENDING: u32 = 1024;

/// Requests of one service where nothing else is written. More than connections: sidecars share them.
const REQUESTS: u32 = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn compile(config: serde_json::Value) -> Result<Breaker, String> {
        let config: BreakerConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
        let mut problems = Problems::of("TrafficPolicy/shop/web");
        let compiled = config.compile(RuleName::new("web"), &FieldPath::root(), &mut problems);
        assert_eq!(compiled.is_none(), problems.refused());
        compiled.ok_or_else(|| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    #[test]
    fn each_limit_is_counted_alone_and_given_back() {
        let breaker = Arc::new(compile(json!({"maxConnections": 1, "maxPendingRequests": 2, "maxRequests": 3})).unwrap());
        let connection = breaker.admit_connection();
        let pending: Vec<_> = std::iter::from_fn(|| breaker.admit_pending()).collect();
        let requests: Vec<_> = std::iter::from_fn(|| breaker.admit_request()).collect();
        assert!(connection.is_some() && breaker.admit_connection().is_none());
        assert_eq!((pending.len(), requests.len(), breaker.used()), (2, 3, (1, 2, 3)));
        drop((connection, pending, requests));
        assert_eq!(breaker.used(), (0, 0, 0));
        assert!(breaker.admit_connection().is_some());
    }

    #[test]
    fn many_threads_never_pass_the_limit() {
        let breaker = Arc::new(compile(json!({"maxRequests": 4})).unwrap());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        let slot = breaker.admit_request();
                        assert!(breaker.used().2 <= 4);
                        drop(slot);
                    }
                });
            }
        });
        assert_eq!(breaker.used(), (0, 0, 0));
    }

    #[test]
    fn an_unchanged_breaker_keeps_its_slots() {
        let old = Arc::new(compile(json!({"maxRequests": 1})).unwrap());
        let slot = old.admit_request();
        let same = compile(json!({"maxRequests": 1})).unwrap().carried_from(&old);
        assert!(same.admit_request().is_none());
        let other = compile(json!({"maxRequests": 2})).unwrap().carried_from(&old);
        assert!(other.admit_request().is_some());
        drop(slot);
        assert!(same.admit_request().is_some());
    }

    #[test]
    fn a_limit_of_nothing_is_refused() {
        for field in ["maxConnections", "maxPendingRequests", "maxRequests"] {
            assert!(compile(json!({field: 0})).is_err(), "{field}");
        }
        assert!(compile(json!({"maxRetries": 3})).is_err());
        assert_eq!(compile(json!({})).unwrap().requests.limit, Breaker::by_default().requests.limit);
    }
}
