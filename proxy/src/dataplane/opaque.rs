//! Connections that carry no request, in both directions: reached, decided on, joined, and told at their end.
//!
//! Invariant: on such a connection, rules about requests are decided by what it can never bring.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::time::Instant;
use tracing::debug;

use super::Proxy;
use super::connection::{Leads, inbound_port};
use super::hello::Overheard;
use super::http::attempt::{pick, refusal_of};
use super::http::record::{ConnectionRecord, DEFAULT_ALLOW, Ends, REVOKED, default_allow};
use super::http::reject::Reject;
use super::pool::{Destination, Opaque, distrusted};
use super::race::{Ahead, Reached, Reaching};
use super::tcp;
use crate::base::net::BoxedIo;
use crate::policy::authorization::Verdict;
use crate::policy::{Peer, RuleName};
use crate::snapshot::{InboundPort, Plaintext, Snapshot};
use crate::telemetry::reason::Reason;
use crate::telemetry::{Direction, Protocol};

/// Carries a connection of the own application to what is reached for it.
pub(super) async fn outbound(proxy: &Arc<Proxy>, io: BoxedIo, peer: SocketAddr, begun: Instant, reaching: Reaching<'_>) {
    let reached = reaching.await;
    let mut record = ConnectionRecord::start(proxy, Direction::Outbound, peer);
    record.begun(begun);
    record.ends = reached.ends;
    match reached.upstream {
        Ok(upstream) => carry(proxy, Direction::Outbound, record, io, upstream, std::future::pending()).await,
        Err(reject) => record.refused(&reject),
    }
}

/// Connects to what no service and no policy is known of.
pub(super) async fn reach_outside(proxy: &Proxy, original: SocketAddr) -> Result<Opaque, Reject> {
    proxy.pool.opaque(&Destination::outside(original)).await.map_err(|error| {
        debug!(error = &error as &dyn std::error::Error, "an address outside of the mesh was not reached");
        refusal_of(error)
    })
}

/// Joins the application with what [`reach_outside`] reached.
pub(super) async fn passthrough(proxy: &Arc<Proxy>, io: BoxedIo, peer: SocketAddr, begun: Instant, upstream: Opaque) {
    let mut record = ConnectionRecord::start(proxy, Direction::Outbound, peer);
    record.begun(begun);
    record.ends.source = proxy.identity.own().map(|own| own.id.clone());
    carry(proxy, Direction::Outbound, record, io, upstream, std::future::pending()).await;
}

/// Decides on a connection to the own application, and carries it. `ahead` is the way there, where it was begun.
pub(super) async fn inbound(proxy: &Arc<Proxy>, io: BoxedIo, peer: &Peer, original: SocketAddr, ahead: Option<Ahead<'_>>) {
    let mut record = ConnectionRecord::start(proxy, Direction::Inbound, peer.address);
    record.ends.source.clone_from(&peer.identity);
    record.ends.destination = proxy.identity.own().map(|own| own.id.clone());
    record.ends.mtls = peer.identity.is_some();
    let decided = {
        let snapshot = proxy.published.current();
        let port = inbound_port(&snapshot, original);
        record.ends.service.clone_from(&port.service);
        decide(&snapshot, port, peer)
    };
    match decided {
        Ok(rule) => record.ends.rule = rule,
        Err(reject) => return record.refused(&reject),
    }
    let reached = match ahead {
        Some(ahead) => ahead.reached().await,
        None => reach_app(proxy, peer.address, original).await,
    };
    match reached.upstream {
        Ok(upstream) => {
            let revoked = revoked(proxy, original, |snapshot, port| permit(snapshot, port, peer).map(drop));
            carry(proxy, Direction::Inbound, record, io, upstream, revoked).await;
        }
        Err(reject) => record.refused(&reject),
    }
}

/// Would a client be let through to the application, if its connection carried no request?
pub(super) fn permits(proxy: &Proxy, original: SocketAddr, peer: &Peer) -> bool {
    let snapshot = proxy.published.current();
    let port = inbound_port(&snapshot, original);
    permit(&snapshot, port, peer).is_ok()
}

/// Connects to an endpoint. One that cannot be connected to is left for another one: nothing was sent yet, so that is
/// always safe.
pub(super) async fn reach_endpoint(proxy: &Proxy, leads: &Leads, original: SocketAddr) -> Reached {
    let mut ends = Ends::of(proxy, Direction::Outbound, None, original);
    let mut tried = Vec::new();
    loop {
        let (endpoint, destination) = match leads {
            Leads::Service(_) | Leads::Stream { .. } => {
                let backend = match leads {
                    Leads::Stream { port, rule, backend } => {
                        ends.service = Some(port.service.clone());
                        ends.route.clone_from(rule);
                        match backend {
                            Ok(backend) => backend,
                            Err(reject) => return Reached { ends, upstream: Err(reject.clone()) },
                        }
                    }
                    Leads::Service(port) => &port.default_backend,
                    Leads::Workload(_) | Leads::Refused(_) | Leads::Outside => {
                        return Reached { ends, upstream: Err(Reject::EgressDenied) };
                    }
                };
                ends.service = Some(backend.service.clone());
                let Some(endpoint) = pick(proxy, backend, &tried).filter(|endpoint| !tried.contains(&endpoint.address)) else {
                    return Reached { ends, upstream: Err(Reject::NoEndpoint(backend.service.clone())) };
                };
                if endpoint.is_own_port() {
                    tried.push(endpoint.address);
                    if tried.len() < TRIES.min(backend.endpoints.len()) {
                        continue;
                    }
                    return Reached { ends, upstream: Err(Reject::OwnPort) };
                }
                let destination = Destination::endpoint(&endpoint, backend);
                (endpoint, destination)
            }
            Leads::Workload(endpoint) => (Arc::clone(endpoint), Destination::workload(endpoint, original.port())),
            Leads::Refused(reject) => return Reached { ends, upstream: Err(reject.clone()) },
            // Untouched, and never asked for here.
            Leads::Outside => return Reached { ends, upstream: Err(Reject::EgressDenied) },
        };
        ends.endpoint = Some(endpoint.workload.clone());
        ends.destination.clone_from(&destination.peer);
        ends.mtls = destination.peer.is_some();
        match proxy.pool.opaque(&destination).await {
            Ok(upstream) => return Reached { ends, upstream: Ok(upstream) },
            Err(error) => {
                debug!(error = &error as &dyn std::error::Error, "an endpoint was not reached");
                let reject = refusal_of(error);
                tried.push(destination.address);
                let more = matches!(leads, Leads::Service(_) | Leads::Stream { .. }) && tried.len() < TRIES;
                if !more || matches!(reject, Reject::BreakerRejected(_)) {
                    return Reached { ends, upstream: Err(reject) };
                }
            }
        }
    }
}

/// Connects to the own application, which is shown its true client.
pub(super) async fn reach_app(proxy: &Proxy, client: SocketAddr, original: SocketAddr) -> Reached {
    let destination = Destination::application(original, client);
    Reached { ends: Ends::default(), upstream: proxy.pool.opaque(&destination).await.map_err(refusal_of) }
}

/// May this peer send bytes that are no request? Costs a token, as a request does.
fn decide(snapshot: &Snapshot, port: &InboundPort, peer: &Peer) -> Result<Option<RuleName>, Reject> {
    let rule = permit(snapshot, port, peer)?;
    if let Some(limit) = &port.policies.rate_limit {
        limit.admit(Instant::now()).map_err(|after| Reject::RateLimited(limit.rule.clone(), after))?;
    }
    Ok(rule)
}

/// May it, by the rules about who it is?
fn permit(snapshot: &Snapshot, port: &InboundPort, peer: &Peer) -> Result<Option<RuleName>, Reject> {
    if snapshot.generation == 0 {
        return Err(Reject::NoConfiguration);
    }
    admit(port, peer)?;
    if let Some(jwt) = &port.policies.jwt {
        jwt.decide_opaque().map_err(Reject::TokenRefused)?;
    }
    match &port.policies.authorization {
        Some(authorization) => match authorization.decide_opaque(peer) {
            Verdict::Allow(rule) => Ok(Some(rule)),
            Verdict::Deny(rule) => Err(Reject::Denied(rule)),
        },
        None => Ok(peer.identity.is_some().then(default_allow)),
    }
}

/// May this peer speak to the port at all? Who has no identity speaks in plaintext.
pub(super) fn admit(port: &InboundPort, peer: &Peer) -> Result<(), Reject> {
    match &port.plaintext {
        Plaintext::Refuse(rule) if peer.identity.is_none() => Err(Reject::PlaintextRefused(rule.clone())),
        Plaintext::Refuse(_) | Plaintext::Permit(_) => Ok(()),
    }
}

/// Returns why what was let through once is let through no more: `judge` says so of a configuration that came since. What
/// lives for days would otherwise outlive the policy that shuts its peer out.
pub(super) async fn revoked(
    proxy: &Proxy,
    original: SocketAddr,
    judge: impl Fn(&Snapshot, &InboundPort) -> Result<(), Reject>,
) -> Reject {
    let mut generations = proxy.generations.subscribe();
    loop {
        let judged = {
            let snapshot = proxy.published.current();
            judge(&snapshot, inbound_port(&snapshot, original))
        };
        if let Err(reject) = judged {
            return reject;
        }
        if generations.changed().await.is_err() {
            // Nothing is published any more.
            std::future::pending::<()>().await;
        }
    }
}

/// Copies until the end, counted and recorded, or until it is `revoked`.
async fn carry(
    proxy: &Proxy,
    direction: Direction,
    mut record: ConnectionRecord,
    down: BoxedIo,
    up: Opaque,
    revoked: impl Future<Output = Reject>,
) {
    let _open = proxy.telemetry.metrics.connection(direction, Protocol::Opaque, record.ends.mtls);
    let _open_there = record.open();
    let counts = Arc::clone(&record.counts);
    let down = Overheard::new(down, Arc::clone(&record.hello));
    let Opaque { io: up, vouched, slot: _slot } = up;
    let ended = tokio::select! {
        ended = tcp::copy(down, up, &counts, tcp::IDLE_MAX) => ended,
        () = distrusted(&proxy.identity, vouched.as_ref()) => {
            record.reason = Reason::IdentityMismatch;
            return;
        }
        reject = revoked => {
            record.detail = Some(REVOKED);
            return record.refused(&reject);
        }
    };
    match ended {
        tcp::Ended::Both => {
            if record.ends.rule.as_ref().is_some_and(|rule| rule.as_str() == DEFAULT_ALLOW) {
                record.reason = Reason::DefaultAllow;
            }
        }
        tcp::Ended::Idle => record.reason = Reason::IdleTimeout,
        tcp::Ended::Downstream(error) => {
            debug!(%error, "the client broke off");
            record.reason = Reason::CallerLeft;
        }
        tcp::Ended::Upstream(error) => {
            debug!(%error, "the destination broke off");
            record.reason = Reason::UpstreamReset;
        }
    }
}

/// Endpoints that a connection tries to reach.
const TRIES: usize = 3;
