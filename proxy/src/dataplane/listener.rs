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
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::connection::{self, Accepted};
use super::{Proxy, StartError, Way, forward, stopping};
use crate::base::descriptors;
use crate::base::drain::DrainGuard;
use crate::telemetry::Direction;

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
        (Direction::Outbound, CONNECTIONS_MAX, &proxy.room),
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
        (Direction::Inbound, CONNECTIONS_MAX, &proxy.room),
        drain,
        |stream, peer| (peer, stream.local_addr()),
        |proxy, accepted| Box::pin(connection::inbound(proxy, accepted)),
    )
    .await;
}

/// How many connections all listeners of the sidecar have at once: so many that files are left for the connections that they
/// lead to. Listeners that see the same free place may all take one: what they are too many is as many
/// as they are, for which there is room besides.
#[derive(Debug)]
pub(super) struct Room {
    carried: watch::Sender<usize>,
    most: usize,
}

impl Room {
    pub(super) fn new(most: usize) -> Self {
        Self { carried: watch::Sender::new(0), most }
    }

    fn is_full(&self) -> bool {
        *self.carried.borrow() >= self.most
    }

    /// Returns when fewer are here than `now`. Cancel-safe.
    async fn fewer(&self, now: usize) {
        // The other end is this room's own.
        if self.carried.subscribe().wait_for(|carried| *carried < now).await.is_err() {}
    }

    /// Returns when somebody left a room that was full. Cancel-safe.
    async fn left(&self) {
        // The other end is this room's own.
        if self.carried.subscribe().wait_for(|carried| *carried < self.most).await.is_err() {}
    }
}

/// One connection among those of a [`Room`].
struct Carried(Arc<Room>);

impl Carried {
    fn new(room: &Arc<Room>) -> Self {
        room.carried.send_modify(|carried| *carried += 1);
        Self(Arc::clone(room))
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        self.0.carried.send_modify(|carried| *carried -= 1);
    }
}

type Served = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

async fn accept(
    proxy: &Arc<Proxy>,
    listener: &TcpListener,
    (direction, places, room): (Direction, usize, &Arc<Room>),
    mut drain: DrainGuard,
    addresses: impl Fn(&TcpStream, SocketAddr) -> (SocketAddr, io::Result<SocketAddr>),
    serve: impl Fn(Arc<Proxy>, Accepted) -> Served,
) {
    let own = Arc::new(Semaphore::new(places));
    let mut waits = Waits { proxy, direction, told: None };
    loop {
        // What does not fit waits in the backlog, where it costs the least.
        let place = match Arc::clone(&own).try_acquire_owned() {
            Ok(place) => place,
            Err(_full) => {
                waits.tell("connections", &format_args!("{places} connections at once"));
                let freed = tokio::select! {
                    () = drain.stopped() => return,
                    freed = Arc::clone(&own).acquire_owned() => freed,
                };
                let Ok(place) = freed else { return };
                place
            }
        };
        if room.is_full() {
            waits.tell(
                "descriptors",
                &format_args!("{} connections at once: the other files are for where they lead to", room.most),
            );
            tokio::select! {
                () = drain.stopped() => return,
                () = room.left() => {}
            }
        }
        let accepted = tokio::select! {
            () = drain.stopped() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // The system gives none, or the limit on files was lowered since: trying again at once would spin.
                waits.tell("system", &error);
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
        let last_file = descriptors::leave_own(&stream).err();
        let accepted = Accepted { io: Box::new(stream), peer: canonical(peer), original, drain: drain.clone() };
        let served = serve(Arc::clone(proxy), accepted);
        let carried = Carried::new(room);
        let now = *room.carried.borrow();
        proxy.tasks.spawn(async move {
            served.await;
            drop((place, carried));
        });
        if let Some(error) = last_file {
            // Its way on is refused. The next one comes when it or another is over, so that these files last.
            waits.tell("descriptors", &error);
            tokio::select! {
                () = drain.stopped() => return,
                _ = tokio::time::timeout(LAST_FILES_PAUSE, room.fewer(now)) => {}
            }
        }
    }
}

/// Tells that a listener takes nothing more for a while, so that what comes waits in its backlog, and why.
struct Waits<'a> {
    proxy: &'a Proxy,
    direction: Direction,
    told: Option<Instant>,
}

impl Waits<'_> {
    /// Counts it, and logs it if that was not done a moment ago: a listener that is full is so again with the next connection.
    fn tell(&mut self, reason: &'static str, why: &dyn std::fmt::Display) {
        let direction = self.direction.as_str();
        self.proxy.telemetry.metrics.accepts_delayed.with_label_values(&[direction, reason]).inc();
        if self.told.is_none_or(|told| told.elapsed() >= TELL_EVERY) {
            self.told = Some(Instant::now());
            warn!(direction, %why, "no connection can be accepted, what comes waits in the backlog");
        }
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
/// The longest time until a listener looks again whether files are left that are not the sidecar's own. Many have gone since, or none.
const LAST_FILES_PAUSE: Duration = Duration::from_secs(1);
const TELL_EVERY: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::timeout;

    use super::*;
    use crate::base::drain::Drain;
    use crate::dataplane::world::{World, pod};

    async fn greeted(client: &mut TcpStream, within: Duration) -> bool {
        timeout(within, client.read_exact(&mut [0; 5])).await.is_ok_and(|read| read.is_ok())
    }

    /// Serves whoever comes with a greeting, until he leaves, and tells how often a listener was delayed for a reason.
    async fn check_waits(places: usize, room: usize, reason: &str) {
        let proxy = World::new(&[pod("web", "web-1", 3)]).sidecar("web", "web-1", 3);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let at = listener.local_addr().unwrap();
        let (drain, guard) = Drain::new();
        let accepting = tokio::spawn({
            let proxy = Arc::clone(&proxy);
            async move {
                let serve = |_proxy, mut accepted: Accepted| -> Served {
                    Box::pin(async move {
                        accepted.io.write_all(b"hello").await.unwrap();
                        // Until the client leaves.
                        drop(accepted.io.read_u8().await);
                    })
                };
                let addresses = |stream: &TcpStream, peer| (peer, stream.local_addr());
                let room = Arc::new(Room::new(room));
                accept(&proxy, &listener, (Direction::Inbound, places, &room), guard, addresses, serve).await;
            }
        });
        let delayed = |direction| proxy.telemetry.metrics.accepts_delayed.with_label_values(&[direction, reason]).get();
        let mut first = TcpStream::connect(at).await.unwrap();
        assert!(greeted(&mut first, Duration::from_secs(5)).await);
        assert_eq!(delayed("inbound"), 0);
        let mut second = TcpStream::connect(at).await.unwrap();
        let mut third = TcpStream::connect(at).await.unwrap();
        assert!(greeted(&mut second, Duration::from_secs(5)).await);
        assert!(!greeted(&mut third, Duration::from_millis(200)).await, "there is no room");
        assert_eq!((delayed("inbound"), delayed("outbound")), (1, 0));
        drop(first);
        assert!(greeted(&mut third, Duration::from_secs(5)).await, "there is room");
        drop((second, third));
        assert!(drain.drain(Duration::from_secs(5)).await);
        accepting.await.unwrap();
    }

    #[tokio::test]
    async fn what_there_is_no_room_for_waits_and_is_counted_until_somebody_leaves() {
        check_waits(2, 32, "connections").await;
    }

    #[tokio::test]
    async fn what_might_find_no_file_for_the_way_on_waits_and_is_counted_until_somebody_leaves() {
        check_waits(32, 2, "descriptors").await;
    }

    #[tokio::test]
    async fn listeners_share_the_files_of_their_sidecar() {
        let room = Arc::new(Room::new(2));
        let (inbound, outbound) = (Carried::new(&room), Carried::new(&room));
        assert!(room.is_full());
        drop(inbound);
        room.left().await;
        assert!(!room.is_full());
        drop(outbound);
        assert_eq!(*room.carried.borrow(), 0);
    }

    #[tokio::test]
    async fn a_full_listener_hears_at_once_that_the_sidecar_stops_and_so_does_whoever_fills_it() {
        for (places, room) in [(1, 32), (32, 1)] {
            check_stop(places, room).await;
        }
    }

    async fn check_stop(places: usize, room: usize) {
        let proxy = World::new(&[pod("web", "web-1", 3)]).sidecar("web", "web-1", 3);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let at = listener.local_addr().unwrap();
        let (drain, guard) = Drain::new();
        let (leaves, mut left) = tokio::sync::mpsc::channel(1);
        let accepting = tokio::spawn({
            let proxy = Arc::clone(&proxy);
            async move {
                let serve = |_proxy, mut accepted: Accepted| -> Served {
                    let leaves = leaves.clone();
                    Box::pin(async move {
                        accepted.io.write_all(b"hello").await.unwrap();
                        accepted.drain.stopped().await;
                        leaves.send(()).await.unwrap();
                        // It is asked to leave, and does not.
                        drop(accepted.io.read_u8().await);
                    })
                };
                let addresses = |stream: &TcpStream, peer| (peer, stream.local_addr());
                let room = Arc::new(Room::new(room));
                accept(&proxy, &listener, (Direction::Inbound, places, &room), guard, addresses, serve).await;
            }
        });
        let mut first = TcpStream::connect(at).await.unwrap();
        assert!(greeted(&mut first, Duration::from_secs(5)).await);
        let mut second = TcpStream::connect(at).await.unwrap();
        assert!(!greeted(&mut second, Duration::from_millis(100)).await, "there is no room");
        let draining = tokio::spawn(drain.drain(Duration::from_secs(30)));
        timeout(Duration::from_secs(5), left.recv()).await.expect("who fills the listener is told to leave");
        timeout(Duration::from_secs(5), accepting).await.expect("the listener ends while it is full").unwrap();
        assert!(!draining.is_finished(), "the drain waits for the connection that is left");
        drop(first);
        assert!(draining.await.unwrap());
        assert!(!greeted(&mut second, Duration::from_secs(5)).await, "nobody was taken after the stop");
    }
}
