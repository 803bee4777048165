//! Connections to a port with routes for connections: where each goes is drawn once, for some by the name that the client's
//! own TLS asks for.
//!
//! Sources: Gateway API TCPRoute and TLSRoute; RFC 6066 3. Not a byte is held back but a ClientHello that a route reads, and
//! nothing of a handshake is changed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tracing::debug;

use super::connection::Leads;
use super::http::reject::Reject;
use super::sniff::Prefixed;
use super::{Proxy, opaque, tls};
use crate::base::net::BoxedIo;
use crate::snapshot::{ServicePort, draw};

/// Carries a connection of the own application to where the routes at `port` send it. A ClientHello is waited for at most so
/// long.
pub(super) async fn outbound(
    proxy: &Arc<Proxy>,
    mut io: BoxedIo,
    (peer, original): (SocketAddr, SocketAddr),
    begun: Instant,
    port: &Arc<ServicePort>,
    at_most: Duration,
) {
    let (name, first) = if port.asks_for_server_name() {
        match tls::server_name(&mut io, at_most).await {
            Ok(heard) => heard,
            Err(error) => return debug!(%error, "a client left before it said whom it wants"),
        }
    } else {
        (None, Bytes::new())
    };
    let leads = choose(proxy, port, name.as_deref());
    let reaching = Box::pin(opaque::reach_endpoint(proxy, &leads, original));
    opaque::outbound(proxy, Prefixed::join(first, io), peer, begun, reaching).await;
}

fn choose(proxy: &Proxy, port: &Arc<ServicePort>, server_name: Option<&str>) -> Leads {
    let port = Arc::clone(port);
    let Some(rule) = port.stream(server_name) else {
        let reject = Reject::NoRoute(port.service.clone());
        return Leads::Stream { port, rule: None, backend: Err(reject) };
    };
    let drawn = draw(&rule.backends, |total| proxy.dice.lock().below(total));
    let backend = drawn.and_then(|drawn| drawn.backend.clone()).ok_or_else(|| Reject::NoBackend(rule.name.clone()));
    Leads::Stream { rule: Some(rule.name.clone()), backend, port }
}
