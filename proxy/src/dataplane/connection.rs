//! The line at level 4: one accepted connection, from its first bytes to its end, in both directions.
//!
//! Invariants: an address inside the mesh's ranges is never dialled in clear because its configuration is missing; a peer
//! without mutual TLS reaches the application only where a rule permits it; what was learned about a port shortens waits
//! and decides nothing.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, info};

use super::Proxy;
use super::http::pipeline::Connection;
use super::http::record::{ConnectionRecord, Ends};
use super::http::reject::Reject;
use super::http::server::{Serves, serve, serve_link};
use super::learned::First;
use super::probe::Way;
use super::race::{Met, QUIET, Reaching, meet};
use super::sniff::{Prefixed, SILENCE_MAX, Sniffed, Sniffer};
use super::tcp::IDLE_MAX;
use super::wire::Wire;
use super::{opaque, stream, tls};
use crate::base::drain::DrainGuard;
use crate::base::net::BoxedIo;
use crate::policy::{Peer, RuleName};
use crate::snapshot::compile::is_own_port;
use crate::snapshot::{
    AppProtocol, Backend, Egress, Endpoint, InboundPort, Plaintext, ServicePort, Snapshot, Transport, WeightedBackend,
};
use crate::telemetry::handshake::HandshakeFault;
use crate::telemetry::metrics::EgressVerdict;
use crate::telemetry::reason::Reason;
use crate::telemetry::{Direction, Protocol};

/// An accepted connection.
pub(crate) struct Accepted {
    pub(crate) io: BoxedIo,
    /// The client.
    pub(crate) peer: SocketAddr,
    /// Where the client wanted to go.
    pub(crate) original: SocketAddr,
    /// Held until the connection ended.
    pub(crate) drain: DrainGuard,
}

/// Where a connection of the own application leads.
pub(super) enum Leads {
    Service(Arc<ServicePort>),
    /// By a rule for connections.
    Stream {
        port: Arc<ServicePort>,
        rule: Option<RuleName>,
        backend: Result<Arc<Backend>, Reject>,
    },
    Workload(Arc<Endpoint>),
    /// Out of the mesh, untouched.
    Outside,
    Refused(Reject),
}

/// A client that speaks HTTP.
struct Caller {
    first: Bytes,
    io: BoxedIo,
    serves: Serves,
    connection: Arc<Connection>,
}

/// Serves a connection that the own application opened.
pub(crate) async fn outbound(proxy: Arc<Proxy>, accepted: Accepted) {
    if let Some(way) = Way::out(accepted.original) {
        return Box::pin(proxy.probes.take(accepted.io, way, accepted.original)).await;
    }
    // Learning what is spoken takes more room than serving it does, and is over soon.
    if let Some(Caller { first, io, serves, connection }) = Box::pin(meet_outbound(proxy, accepted)).await {
        serve(first, io, serves, connection).await;
    }
}

/// Serves a connection that came to the pod.
pub(crate) async fn inbound(proxy: Arc<Proxy>, accepted: Accepted) {
    if let Some(way) = Way::into_pod(accepted.original) {
        return Box::pin(proxy.probes.take(accepted.io, way, accepted.original)).await;
    }
    if let Some(Caller { first, io, serves, connection }) = Box::pin(meet_inbound(proxy, accepted)).await {
        serve(first, io, serves, connection).await;
    }
}

/// Learns what the own application speaks, and carries it to its end if it is no HTTP.
async fn meet_outbound(proxy: Arc<Proxy>, accepted: Accepted) -> Option<Caller> {
    let Accepted { mut io, peer, original, drain } = accepted;
    let mut leads = lookup(&proxy, original).await;
    let begun = Instant::now();
    if is_untouched(&leads, original) {
        if matches!(leads, Leads::Outside) {
            proxy.telemetry.metrics.egress(EgressVerdict::Allowed);
        }
        match opaque::reach_outside(&proxy, original).await {
            Ok(upstream) => {
                opaque::passthrough(&proxy, io, peer, begun, upstream).await;
                return None;
            }
            // Nothing of what the client said has left: if it is a request, it can be answered.
            Err(reject) => leads = Leads::Refused(reject),
        }
    }
    let limits = proxy.published.current().mesh.limits;
    if let Leads::Service(port) = &leads
        && !port.streams.is_empty()
    {
        let at_most = limits.handshake_timeout;
        Box::pin(stream::outbound(&proxy, io, (peer, original), begun, port, at_most)).await;
        return None;
    }
    let (declared, refuse) = match &leads {
        Leads::Service(port) => (port.protocol, None),
        Leads::Stream { .. } | Leads::Workload(_) | Leads::Outside => (AppProtocol::Detect, None),
        Leads::Refused(reject) => {
            if matches!(reject, Reject::EgressDenied) {
                proxy.telemetry.metrics.egress(EgressVerdict::Denied);
            }
            (AppProtocol::Detect, Some(reject.clone()))
        }
    };
    let quiet = quiet(&proxy, &leads, original);
    let reach = || -> Reaching<'_> { Box::pin(opaque::reach_endpoint(&proxy, &leads, original)) };
    let (sniffed, first, ahead) = match read_first(&mut io, declared, limits.header_timeout, quiet, &reach).await {
        Ok(Some(Met { sniffed, first, ahead, server_first })) => {
            if server_first {
                proxy.learned.learn(original, First::Server);
            }
            (sniffed, first, ahead)
        }
        Ok(None) => {
            let mut record = ConnectionRecord::start(&proxy, Direction::Outbound, peer);
            record.protocol = Protocol::Unknown;
            record.begun(begun);
            record.ends = Ends::of(&proxy, Direction::Outbound, None, original);
            record.refused(&Reject::RequestTimeout);
            return None;
        }
        Err(error) => {
            debug!(%error, "a client left before it said anything");
            if let Some(reject) = refuse {
                let mut record = ConnectionRecord::start(&proxy, Direction::Outbound, peer);
                record.protocol = Protocol::Unknown;
                record.begun(begun);
                record.ends = Ends::of(&proxy, Direction::Outbound, None, original);
                record.refused(&reject);
            }
            return None;
        }
    };
    let connection = |refuse| {
        Arc::new(Connection {
            proxy: Arc::clone(&proxy),
            direction: Direction::Outbound,
            peer: Peer { identity: None, address: peer, port: original.port() },
            original,
            link: false,
            refuse,
            teaches: (declared == AppProtocol::Detect).then(AtomicBool::default),
            revoked: OnceLock::new(),
            limits,
            drain: drain.clone(),
        })
    };
    match sniffed {
        Sniffed::Http1 => Some(Caller { first, io, serves: Serves::Http1, connection: connection(refuse) }),
        Sniffed::Http2 => Some(Caller { first, io, serves: Serves::Http2, connection: connection(refuse) }),
        // The application's own TLS is opaque to us.
        Sniffed::Tls | Sniffed::Opaque => {
            let reaching = ahead.map_or_else(reach, |ahead| Box::pin(ahead.reached()));
            Box::pin(opaque::outbound(&proxy, Prefixed::join(first, io), peer, begun, reaching)).await;
            None
        }
    }
}

/// Learns what a client of the pod speaks, and carries it to its end if it is no HTTP, or a link.
async fn meet_inbound(proxy: Arc<Proxy>, accepted: Accepted) -> Option<Caller> {
    let Accepted { mut io, peer, original, drain } = accepted;
    let refuse = own_port(original).then_some(Reject::OwnPort);
    if refuse.is_some() {
        let mut record = ConnectionRecord::start(&proxy, Direction::Inbound, peer);
        record.protocol = Protocol::Unknown;
        record.refused(&Reject::OwnPort);
        return None;
    }
    let limits = proxy.published.current().mesh.limits;
    let begun = Instant::now();
    let declared = declared_inbound(&proxy, original);
    let stranger = Peer { identity: None, address: peer, port: original.port() };
    let quiet = opaque::permits(&proxy, original, &stranger).then_some(QUIET);
    let reach = || -> Reaching<'_> { Box::pin(opaque::reach_app(&proxy, peer, original)) };
    let (sniffed, first, ahead) = match read_first(&mut io, declared, limits.header_timeout, quiet, &reach).await {
        Ok(Some(Met { sniffed, first, ahead, server_first: _ })) => (sniffed, first, ahead),
        Ok(None) => {
            let mut record = ConnectionRecord::start(&proxy, Direction::Inbound, peer);
            record.protocol = Protocol::Unknown;
            record.begun(begun);
            record.ends = Ends::of(&proxy, Direction::Inbound, None, original);
            record.refused(&Reject::RequestTimeout);
            return None;
        }
        Err(error) => {
            debug!(%error, "a client left before it said anything");
            return None;
        }
    };
    let (offers, first) = if sniffed == Sniffed::Tls {
        match tls::offers_link(&mut io, first, limits.handshake_timeout).await {
            Ok(answer) => answer,
            Err(error) => {
                debug!(%error, "a client left in its handshake");
                return None;
            }
        }
    } else {
        (Ok(false), first)
    };
    let link = match offers {
        Ok(link) => link,
        // Where plaintext is let through it may be something else that the application understands.
        Err(_unfinished) if quiet.is_some() => false,
        Err(fault) => {
            debug!(%peer, detail = fault.as_str(), remedy = fault.remedy(), "a handshake did not become whole");
            handshake_failed(&proxy, peer, original, fault);
            return None;
        }
    };
    let connection = |identity, link| {
        Arc::new(Connection {
            proxy: Arc::clone(&proxy),
            direction: Direction::Inbound,
            peer: Peer { identity, address: peer, port: original.port() },
            original,
            link,
            refuse: None,
            teaches: None,
            revoked: OnceLock::new(),
            limits: if link { limits.on_link() } else { limits },
            drain: drain.clone(),
        })
    };
    if link {
        let trust = proxy.identity.trust_epoch();
        match tls::accept(Arc::clone(&proxy.server_tls), Prefixed::join(first, io), limits.handshake_timeout).await {
            Ok((stream, id, tls::Alpn::H2)) => {
                let (io, session) = stream.into_inner();
                let vouched = proxy.identity.vouch(session.peer_certificates(), trust);
                let served = serve_link(Wire::secured(io, session), connection(Some(id), true));
                tokio::select! {
                    () = served => {}
                    () = proxy.identity.distrusted(&vouched) => info!(%peer, "a link is cut: nobody who is believed vouches for its peer"),
                }
            }
            Ok((stream, id, tls::Alpn::Tcp)) => {
                let vouched = proxy.identity.vouch(stream.get_ref().1.peer_certificates(), trust);
                tokio::select! {
                    () = Box::pin(unrequested(&proxy, Box::new(stream), connection(Some(id), false))) => {}
                    () = proxy.identity.distrusted(&vouched) => info!(%peer, "a link is cut: nobody who is believed vouches for its peer"),
                }
            }
            Err(error) => {
                let (fault, error) = (error.fault(), &error as &dyn std::error::Error);
                debug!(error, %peer, detail = fault.as_str(), remedy = fault.remedy(), "a link was refused");
                handshake_failed(&proxy, peer, original, fault);
            }
        }
        return None;
    }
    // Whether plaintext is permitted is asked for each request, and of what is none before it is carried.
    match sniffed {
        Sniffed::Http1 => Some(Caller { first, io, serves: Serves::Http1, connection: connection(None, false) }),
        Sniffed::Http2 => Some(Caller { first, io, serves: Serves::Http2, connection: connection(None, false) }),
        Sniffed::Tls | Sniffed::Opaque => {
            Box::pin(opaque::inbound(&proxy, Prefixed::join(first, io), &stranger, original, ahead)).await;
            None
        }
    }
}

/// Tells of a link that did not come about.
fn handshake_failed(proxy: &Arc<Proxy>, peer: SocketAddr, original: SocketAddr, fault: HandshakeFault) {
    let mut record = ConnectionRecord::start(proxy, Direction::Inbound, peer);
    record.protocol = Protocol::Link;
    record.ends = Ends::of(proxy, Direction::Inbound, None, original);
    record.reason = Reason::HandshakeFailed;
    record.detail = Some(fault.as_str());
    record.logged();
}

/// Carries a connection of a workload whose sidecar says that it brings no request. Where a rule looks into requests, what comes
/// is looked at all the same: who sends it may have seen to it that nobody did.
async fn unrequested(proxy: &Arc<Proxy>, mut io: BoxedIo, connection: Arc<Connection>) {
    let (original, peer) = (connection.original, connection.peer.clone());
    let declared = {
        let snapshot = proxy.published.current();
        let InboundPort { protocol, policies, .. } = inbound_port(&snapshot, original);
        let looks = policies.jwt.is_some() || policies.rate_limit.is_some();
        if looks && *protocol != AppProtocol::Opaque { AppProtocol::Detect } else { AppProtocol::Opaque }
    };
    let reach = || -> Reaching<'_> { Box::pin(opaque::reach_app(proxy, peer.address, original)) };
    let quiet = opaque::permits(proxy, original, &peer).then_some(Duration::ZERO);
    match read_first(&mut io, declared, IDLE_MAX, quiet, reach).await {
        Ok(Some(Met { sniffed: Sniffed::Http1, first, .. })) => serve(first, io, Serves::Http1, connection).await,
        Ok(Some(Met { sniffed: Sniffed::Http2, first, .. })) => serve(first, io, Serves::Http2, connection).await,
        Ok(Some(Met { first, ahead, .. })) => opaque::inbound(proxy, Prefixed::join(first, io), &peer, original, ahead).await,
        Ok(None) => {}
        Err(error) => debug!(%error, "a link ended before it brought anything"),
    }
}

/// Is a connection joined with its destination as it is, whatever it carries?
fn is_untouched(leads: &Leads, original: SocketAddr) -> bool {
    match leads {
        Leads::Outside => true,
        // A sidecar's metrics are served in plaintext, to scrapers in the mesh as to those outside of it.
        Leads::Workload(_) => original.port() == proxy_common::PORT_METRICS,
        Leads::Service(_) | Leads::Stream { .. } | Leads::Refused(_) => false,
    }
}

pub(super) fn inbound_port(snapshot: &Snapshot, original: SocketAddr) -> &InboundPort {
    snapshot.inbound.ports.get(&original.port()).unwrap_or(&snapshot.inbound.other)
}

/// What was declared of a port to which plaintext is permitted. On every other one only a handshake is of use, and a port
/// that was declared opaque may get one too: there, first bytes are looked at in any case.
fn declared_inbound(proxy: &Proxy, original: SocketAddr) -> AppProtocol {
    let snapshot = proxy.published.current();
    let port = inbound_port(&snapshot, original);
    match (port.protocol, &port.plaintext) {
        (AppProtocol::Http | AppProtocol::Http2, Plaintext::Permit(_)) => port.protocol,
        _look => AppProtocol::Detect,
    }
}

/// First bytes, where what is spoken was not declared; none where a request was declared and nothing came in time. A client
/// that was silent for `quiet` is not waited for alone any more.
async fn read_first<'a>(
    io: &mut BoxedIo,
    declared: AppProtocol,
    patience: Duration,
    quiet: Option<Duration>,
    reach: impl FnOnce() -> Reaching<'a>,
) -> std::io::Result<Option<Met<'a>>> {
    let patience = match declared {
        AppProtocol::Opaque => return Ok(Some(Met::client(Sniffed::Opaque, Bytes::new()))),
        AppProtocol::Detect => match quiet {
            // It is over before the connection is served, and need not take its room for long.
            Some(quiet) => return Box::pin(meet(io, quiet, reach)).await.map(Some),
            None => SILENCE_MAX,
        },
        AppProtocol::Http | AppProtocol::Http2 => patience,
    };
    let mut sniffer = Sniffer::new(patience);
    let sniffed = sniffer.sniff(io).await?;
    let first = sniffer.into_bytes();
    Ok(match (declared, sniffed) {
        (AppProtocol::Http | AppProtocol::Http2, Sniffed::Opaque) if first.is_empty() => None,
        // It was declared: whatever else it is, it is HTTP that is not valid, and is answered so.
        (AppProtocol::Http | AppProtocol::Http2, Sniffed::Opaque) => Some(Met::client(Sniffed::Http1, first)),
        (_, known) => Some(Met::client(known, first)),
    })
}

/// How long a silent client of the own application is waited for alone; none: until detection ends.
fn quiet(proxy: &Proxy, leads: &Leads, original: SocketAddr) -> Option<Duration> {
    match leads {
        // To what is refused there is no way to go ahead on.
        Leads::Refused(_) | Leads::Stream { .. } | Leads::Outside => None,
        Leads::Service(_) | Leads::Workload(_) => match proxy.learned.of(original) {
            None => Some(QUIET),
            Some(First::Server) => Some(Duration::ZERO),
            // Its clients will speak, and it is spared connections that come to nothing.
            Some(First::Client) => Some(SILENCE_MAX),
        },
    }
}

/// Where an address leads; asks the control plane about one that is not known, and waits for its answer for a while.
async fn lookup(proxy: &Proxy, original: SocketAddr) -> Leads {
    if own_port(original) && original.ip().is_loopback() {
        return Leads::Refused(Reject::OwnPort);
    }
    let mut generations = proxy.generations.subscribe();
    let deadline = Instant::now() + ANSWER_MAX;
    let mut asked = false;
    loop {
        generations.mark_unchanged();
        let snapshot = proxy.published.current();
        if let Some(leads) = known(&snapshot, original) {
            return leads;
        }
        let inside = inside(&snapshot, original.ip());
        let can_answer = if asked { true } else { proxy.ask_for(original.ip()) };
        asked = true;
        // Outside of the mesh's ranges, nobody need wait for a control plane that is not there.
        let waited = if can_answer || inside {
            timeout_at(deadline, generations.changed()).await.is_ok_and(|changed| changed.is_ok())
        } else {
            false
        };
        if !waited {
            return if inside { Leads::Refused(Reject::NoConfiguration) } else { leave(&snapshot) };
        }
    }
}

/// What a snapshot says of an address; `None` where it says nothing.
fn known(snapshot: &Snapshot, original: SocketAddr) -> Option<Leads> {
    let outbound = &snapshot.outbound;
    if let Some(port) = outbound.service_at(original) {
        if leads_to_own_ports(port) {
            return Some(Leads::Refused(Reject::OwnPort));
        }
        return Some(Leads::Service(Arc::clone(port)));
    }
    if let Some(endpoint) = outbound.workloads.get(&original.ip()) {
        // The other sidecar would close the door without a word; this side knows why, and can say so. Where there is no
        // sidecar, the port is an application's like any other.
        if own_port(original) && matches!(endpoint.transport, Transport::MutualTls(_)) {
            return Some(Leads::Refused(Reject::OwnPort));
        }
        return Some(Leads::Workload(Arc::clone(endpoint)));
    }
    let ip = original.ip();
    let service = outbound.services.range(SocketAddr::new(ip, 0)..=SocketAddr::new(ip, u16::MAX)).next();
    if let Some((_, other_port)) = service {
        return Some(Leads::Refused(Reject::NoRoute(other_port.service.clone())));
    }
    if outbound.absent.contains(&ip) {
        return Some(if inside(snapshot, ip) { Leads::Refused(Reject::NoConfiguration) } else { leave(snapshot) });
    }
    None
}

/// An address outside of the mesh's ranges at which nothing of the mesh is known to be.
fn leave(snapshot: &Snapshot) -> Leads {
    match snapshot.mesh.egress {
        Egress::Allow => Leads::Outside,
        // Before the first configuration nobody said that it is denied; it is only not known.
        Egress::Deny if snapshot.generation == 0 => Leads::Refused(Reject::NoConfiguration),
        Egress::Deny => Leads::Refused(Reject::EgressDenied),
    }
}

fn inside(snapshot: &Snapshot, ip: IpAddr) -> bool {
    snapshot.mesh.ranges.iter().any(|range| range.contains(&ip))
}

fn own_port(address: SocketAddr) -> bool {
    is_own_port(address.port())
}

/// Are ports of sidecars all that this port of a service leads to, whatever its rules say?
fn leads_to_own_ports(port: &ServicePort) -> bool {
    let own =
        |backend: &Backend| !backend.endpoints.is_empty() && backend.endpoints.iter().all(|endpoint| endpoint.is_own_port());
    let leads_there = |backend: &WeightedBackend| backend.backend.as_deref().is_some_and(own);
    own(&port.default_backend)
        && port.rules.iter().all(|rule| rule.backends.iter().all(leads_there))
        && port.streams.iter().all(|rule| rule.backends.iter().all(leads_there))
}

/// How long the first use of a destination waits for the control plane's answer.
const ANSWER_MAX: Duration = Duration::from_secs(2);
