//! The sidecar's own listeners: bound, accepted from within limits, and where a client wanted to go.
//!
//! The kernel programs of capture steer the application's connections to the outbound listener and the pod's to the
//! inbound one. An inbound connection's local address is the true one that the client dialled; an outbound connection's is
//! told by `SO_ORIGINAL_DST`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as Listener};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use proxy_common::{PORT_INBOUND, PORT_OUTBOUND};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use super::connection::{self, Accepted};
use super::{Proxy, StartError, Way, forward, stopping};
use crate::base::drain::DrainGuard;

/// The pod's own listeners.
#[derive(Debug)]
pub(crate) struct Listeners {
    /// Where everybody's connections to the pod arrive, of both families, whichever port they were for.
    pub(crate) inbound: Listener,
    /// Where the own application's connections arrive: on both loopback addresses, where the pod has both.
    pub(crate) outbound: Vec<Listener>,
}

impl Listeners {
    /// Those of `kept`, which a former sidecar of the pod left behind with the connections that wait in them, and new ones
    /// for what is missing.
    ///
    /// # Errors
    /// A port is taken.
    pub(crate) fn open(kept: Vec<OwnedFd>) -> Result<Self, StartError> {
        let mut kept: Vec<Listener> = kept.into_iter().map(Listener::from).collect();
        let mut open = |address: SocketAddr| match kept
            .iter()
            .position(|listener| listener.local_addr().is_ok_and(|local| local == address))
        {
            Some(place) => Ok(kept.swap_remove(place)),
            None => listen(address),
        };
        let mut outbound = vec![open(SocketAddr::from((Ipv4Addr::LOCALHOST, PORT_OUTBOUND)))?];
        match open(SocketAddr::from((Ipv6Addr::LOCALHOST, PORT_OUTBOUND))) {
            Ok(listener) => outbound.push(listener),
            Err(error) => warn!(error = &error as &dyn std::error::Error, "no IPv6 in this pod"),
        }
        let inbound = open(SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT_INBOUND)))
            .or_else(|_no_ipv6| open(SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT_INBOUND))))?;
        Ok(Self { inbound, outbound })
    }

    /// Second handles on all of them, the inbound one first, to be handed over.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub(crate) fn duplicate(&self) -> Result<Vec<OwnedFd>, StartError> {
        std::iter::once(&self.inbound).chain(&self.outbound).map(|listener| duplicate(listener).map(OwnedFd::from)).collect()
    }
}

/// A worker's own handle on a listener; the kernel wakes whoever is there. To be called on the worker's runtime.
///
/// # Errors
/// There are no descriptors left.
pub(crate) fn share(listener: &Listener) -> Result<TcpListener, StartError> {
    let copy = duplicate(listener)?;
    let address = copy.local_addr().unwrap_or(SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT_INBOUND)));
    TcpListener::from_std(copy).map_err(|source| StartError::Listen { address, source })
}

/// Serves the own application's connections until the sidecar stops.
pub(crate) async fn serve_outbound(proxy: Arc<Proxy>, listener: TcpListener, drain: DrainGuard) {
    accept(
        &proxy,
        &listener,
        drain,
        |stream, peer| {
            let original = original_destination(stream);
            (peer, original)
        },
        |proxy, accepted| match proxy.way {
            Way::Captured => Box::pin(connection::outbound(proxy, accepted)),
            Way::Asked => Box::pin(forward::outbound(proxy, accepted)),
        },
    )
    .await;
}

/// Serves connections to the pod until the sidecar stops.
pub(crate) async fn serve_inbound(proxy: Arc<Proxy>, listener: TcpListener, drain: DrainGuard) {
    accept(
        &proxy,
        &listener,
        drain,
        |stream, peer| (peer, stream.local_addr()),
        |proxy, accepted| Box::pin(connection::inbound(proxy, accepted)),
    )
    .await;
}

type Served = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

async fn accept(
    proxy: &Arc<Proxy>,
    listener: &TcpListener,
    mut drain: DrainGuard,
    addresses: impl Fn(&TcpStream, SocketAddr) -> (SocketAddr, io::Result<SocketAddr>),
    serve: impl Fn(Arc<Proxy>, Accepted) -> Served,
) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // What does not fit waits in the backlog, where it costs the least.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        let accepted = tokio::select! {
            () = drain.stopped() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: trying again at once would spin.
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        if stopping(&drain) {
            return;
        }
        let (peer, original) = addresses(&stream, peer);
        let original = match original.and_then(|original| stream.set_nodelay(true).map(|()| original)) {
            Ok(original) => canonical(original),
            Err(error) => {
                debug!(%error, "a client left at once");
                continue;
            }
        };
        let accepted = Accepted { io: Box::new(stream), peer: canonical(peer), original, drain: drain.clone() };
        let served = serve(Arc::clone(proxy), accepted);
        proxy.tasks.spawn(async move {
            served.await;
            drop(place);
        });
    }
}

fn duplicate(listener: &Listener) -> Result<Listener, StartError> {
    let address = listener.local_addr().unwrap_or(SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT_INBOUND)));
    listener.try_clone().map_err(|source| StartError::Listen { address, source })
}

fn original_destination(stream: &TcpStream) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let local = stream.local_addr()?;
    let told = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    // Without an answer the local address is all there is: capture shows the original one there too, and who dialled the
    // listener itself is refused by it.
    Ok(told.ok().and_then(|address| address.as_socket()).unwrap_or(local))
}

/// One address has one spelling: IPv4 in IPv6 clothes is IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V6(ip) => SocketAddr::new(ip.to_canonical(), address.port()),
        IpAddr::V4(_) => address,
    }
}

fn listen(address: SocketAddr) -> Result<Listener, StartError> {
    let open = || -> io::Result<Listener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(address.ip() != Ipv6Addr::UNSPECIFIED)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    open().map_err(|source| StartError::Listen { address, source })
}

const BACKLOG: i32 = 4096;
/// Connections at once per listener and worker.
const CONNECTIONS_MAX: usize = 32_768;
const PAUSE: Duration = Duration::from_millis(50);
