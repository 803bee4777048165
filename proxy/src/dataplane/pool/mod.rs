//! Upstream connections: one shared HTTP/2 connection per endpoint and expected identity, kept-alive HTTP/1 connections
//! towards the own application and towards endpoints without a sidecar.
//!
//! Invariants: a connection is never used for another peer identity or another client than the one it was opened for; of
//! every failure it is known whether the request can have been processed.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{http1 as codec, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

pub(crate) mod connect;
mod first;
mod http1;
mod idleness;

use self::connect::{ConnectError, Dial};
use self::first::First;
use self::http1::{Single, Singles};
use super::http::body::Body;
use super::http::spelling::{Answers, Spelling};
use super::tasks::Tasks;
use super::tls::Alpn;
use super::wire::Wire;
use crate::base::net::BoxedIo;
use crate::base::random::Dice;
use crate::identity::source::{Identity, Vouched};
use crate::identity::spiffe::SpiffeId;
use crate::policy::breaker::{Breaker, Slot};

/// Where a request or connection goes, and how.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    pub(crate) address: SocketAddr,
    /// The identity that the peer must prove; none: in clear.
    pub(crate) peer: Option<SpiffeId>,
    /// The true client, where the destination is the own application.
    pub(crate) client: Option<SocketAddr>,
    pub(crate) connect_timeout: Duration,
    /// Counts the connections of the service.
    pub(crate) breaker: Option<Arc<Breaker>>,
}

/// What a destination is spoken to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Speaks {
    Http1,
    Http2,
}

/// All upstream connections of the sidecar.
#[derive(Debug)]
pub(crate) struct Pool {
    dial: Arc<dyn Dial>,
    identity: Identity,
    tasks: Tasks,
    links: Mutex<BTreeMap<Key, Arc<Link>>>,
    singles: Singles,
    loads: Mutex<BTreeMap<SocketAddr, Arc<AtomicUsize>>>,
    dice: Mutex<Dice>,
}

/// What may share a connection.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Key {
    address: SocketAddr,
    peer: Option<SpiffeId>,
    /// The application is shown the address of the client that a connection was opened for.
    client: Option<IpAddr>,
}

/// A shared connection; its lock is a turn to dial, held while one caller opens what all of them will use.
#[derive(Debug, Default)]
struct Link {
    open: tokio::sync::Mutex<Option<Open>>,
}

#[derive(Clone, Debug)]
struct Open {
    sender: http2::SendRequest<Body>,
    /// The peer takes extended CONNECT.
    extended: watch::Receiver<bool>,
    /// How the peer began to speak, where it is no sidecar.
    first: First,
    born: Instant,
    /// Drawn for each link, so that links that were opened together are not opened anew together.
    age_max: Duration,
    /// The own name and the authorities under which it was opened.
    trust: u64,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The request did not leave.
    #[error("the request did not leave")]
    NotSent(#[source] hyper::Error),
    /// What answered in clear is no server of HTTP/2.
    #[error("the destination does not speak HTTP/2")]
    NotHttp2(#[source] hyper::Error),
    /// The peer said that it did not process the request.
    #[error("the request was refused")]
    Refused(#[source] hyper::Error),
    /// The peer had closed before anything of the request reached it.
    #[error("the connection was closed before the request reached the other side")]
    Unread { source: hyper::Error },
    /// The request left and may have been processed.
    #[error("the connection broke before an answer came")]
    Broken(#[source] hyper::Error),
}

/// May a connection be used that carried a request before?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Reuse {
    Allowed,
    Fresh,
}

/// An answer, and what it holds until its body is through.
#[derive(Debug)]
pub(crate) struct Sent {
    pub(crate) response: Response<Incoming>,
    /// How an answer in HTTP/1 spelled its headers.
    pub(crate) spelling: Option<Spelling>,
    pub(crate) lease: Lease,
}

/// A connection for opaque bytes.
pub(crate) struct Opaque {
    pub(crate) io: BoxedIo,
    /// What its peer showed, where it had to show something.
    pub(crate) vouched: Option<Vouched>,
    pub(crate) slot: Option<Slot>,
}

/// Returns when a peer that had to show something is believed no more. Cancel-safe.
pub(crate) async fn distrusted(identity: &Identity, vouched: Option<&Vouched>) {
    match vouched {
        Some(vouched) => identity.distrusted(vouched).await,
        None => std::future::pending().await,
    }
}

/// The place of one request on a connection. An HTTP/1 connection is given back when the answer was read whole.
#[derive(Debug)]
pub(crate) struct Lease {
    one: Option<(Arc<Pool>, Key, Single)>,
    _load: Load,
}

/// Counts a request at its endpoint while it lives.
#[derive(Debug)]
struct Load(Arc<AtomicUsize>);

impl Drop for Load {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Lease {
    /// The answer was read whole: the connection can carry another request.
    pub(crate) fn give_back(mut self) {
        if let Some((pool, key, single)) = self.one.take() {
            pool.singles.put(key, single);
        }
    }
}

impl Pool {
    /// Nothing open yet.
    pub(crate) fn new(dial: Arc<dyn Dial>, identity: Identity, tasks: Tasks, seed: u64) -> Self {
        Self {
            dial,
            identity,
            tasks,
            links: Mutex::default(),
            singles: Singles::default(),
            loads: Mutex::default(),
            dice: Mutex::new(Dice::from_seed(seed)),
        }
    }

    /// Requests that are under way to an endpoint.
    pub(crate) fn load(&self, address: SocketAddr) -> usize {
        self.loads.lock().get(&address).map_or(0, |load| load.load(Ordering::Relaxed))
    }

    /// Forgets connections to endpoints that are not in `keep`; what is under way on them ends in peace. Connections to
    /// the own application stay.
    pub(crate) fn prune(&self, keep: &BTreeSet<SocketAddr>) {
        let kept = |key: &Key| key.client.is_some() || keep.contains(&key.address);
        self.links.lock().retain(|key, _| kept(key));
        self.singles.retain(keep, kept);
        self.loads.lock().retain(|address, load| keep.contains(address) || load.load(Ordering::Relaxed) > 0);
    }

    /// Closes what is idle for too long. To be called now and then.
    pub(crate) fn sweep(&self) {
        self.singles.sweep();
        self.links.lock().retain(|_, link| match link.open.try_lock() {
            Ok(open) => open.as_ref().is_some_and(|open| !open.sender.is_closed()) || Arc::strong_count(link) > 1,
            Err(_dialling) => true,
        });
    }

    /// Sends a request. A connection that turns out dead before the request left is replaced once.
    ///
    /// # Errors
    /// See [`SendError`].
    pub(crate) async fn send(
        self: &Arc<Self>,
        to: &Destination,
        speaks: Speaks,
        request: Request<Body>,
        reuse: Reuse,
    ) -> Result<Sent, SendError> {
        let load = self.count(to.address);
        if to.peer.is_some() || speaks == Speaks::Http2 {
            let response = self.send_shared(to, request).await?;
            Ok(Sent { response, spelling: None, lease: Lease { one: None, _load: load } })
        } else {
            let (response, single) = self.send_single(to, request, reuse).await?;
            let spelling = single.answers.answered();
            let lease = Lease { one: Some((Arc::clone(self), key_of(to), single)), _load: load };
            Ok(Sent { response, spelling, lease })
        }
    }

    /// A connection of one's own for opaque bytes.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub(crate) async fn opaque(&self, to: &Destination) -> Result<Opaque, ConnectError> {
        let slot = admit(to)?;
        let Some(peer) = &to.peer else {
            let io = connect::plain(&*self.dial, to.address, to.client, to.connect_timeout).await?;
            return Ok(Opaque { io, vouched: None, slot });
        };
        let link = connect::link(&*self.dial, &self.identity, to.address, peer, Alpn::Tcp, to.connect_timeout).await?;
        let vouched = Some(self.identity.vouch(link.get_ref().1.peer_certificates()));
        Ok(Opaque { io: Box::new(link), vouched, slot })
    }

    async fn send_shared(&self, to: &Destination, mut request: Request<Body>) -> Result<Response<Incoming>, SendError> {
        let extended = request.extensions().get::<hyper::ext::Protocol>().is_some();
        let mut fresh = false;
        loop {
            let link = Arc::clone(self.links.lock().entry(key_of(to)).or_default());
            let waiting = wait(to)?;
            let (open, reused) = self.shared(&link, to, fresh).await?;
            drop(waiting);
            let mut sender = open.sender;
            if extended {
                let mut extended = open.extended;
                // "A client MUST NOT use the extended CONNECT before it received SETTINGS_ENABLE_CONNECT_PROTOCOL" (RFC 8441
                // 3): on a fresh connection that frame may still be on its way. Without it, sending says what is wrong.
                drop(timeout(SETTINGS_MAX, extended.wait_for(|is| *is)).await);
            }
            match sender.try_send_request(request).await {
                Ok(response) => return Ok(response),
                Err(failed) if open.first.is_other() => return Err(SendError::NotHttp2(failed.into_error())),
                Err(mut failed) => match failed.take_message() {
                    Some(message) if reused => {
                        request = message;
                        fresh = true;
                    }
                    Some(_message) => return Err(SendError::NotSent(failed.into_error())),
                    None => {
                        let error = failed.into_error();
                        return Err(if unprocessed(&error) { SendError::Refused(error) } else { SendError::Broken(error) });
                    }
                },
            }
        }
    }

    /// The shared connection, opened if there is none. The flag says that it was there before.
    async fn shared(&self, link: &Link, to: &Destination, fresh: bool) -> Result<(Open, bool), ConnectError> {
        let mut open = link.open.lock().await;
        if !fresh
            && let Some(open) = open.as_ref()
            && !open.sender.is_closed()
            && open.born.elapsed() < open.age_max
            && open.trust == self.identity.trust_epoch()
        {
            return Ok((open.clone(), true));
        }
        // What is under way on an old connection goes on; it closes when its last request ended.
        *open = None;
        let slot = admit(to)?;
        let trust = self.identity.trust_epoch();
        let mut vouched = None;
        let first = First::default();
        let wire = match &to.peer {
            Some(peer) => {
                let link = connect::link(&*self.dial, &self.identity, to.address, peer, Alpn::H2, to.connect_timeout).await?;
                let (io, session) = link.into_inner();
                vouched = Some(self.identity.vouch(session.peer_certificates()));
                Wire::secured(io, session)
            }
            None => {
                let io = connect::plain(&*self.dial, to.address, to.client, to.connect_timeout).await?;
                Wire::plain(first.watch(io))
            }
        };
        let cut = CancellationToken::new();
        let handshake = http2::Builder::new(Driver { tasks: self.tasks.clone(), cut: cut.clone(), wire: wire.clone() })
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(super::http::server::HEADER_BYTES_MAX)
            .keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE_MAX)
            .handshake(TokioIo::new(wire));
        let (sender, connection) = match timeout(to.connect_timeout, handshake).await {
            Ok(pair) => pair.map_err(|source| ConnectError::Http { to: to.address, source })?,
            Err(_elapsed) => return Err(ConnectError::Timeout(to.address)),
        };
        let address = to.address;
        let (told, extended) = watch::channel(false);
        let identity = self.identity.clone();
        self.tasks.spawn(async move {
            let _slot = slot;
            let mut connection = std::pin::pin!(connection);
            // The codec wakes nobody here when the peer's settings come, so they are asked for until then.
            let mut ask = tokio::time::interval(SETTINGS_ASK);
            let mut asks = SETTINGS_ASKS;
            let ended = std::future::poll_fn(|cx| {
                let polled = connection.as_mut().poll(cx);
                while asks > 0 {
                    if connection.is_extended_connect_protocol_enabled() {
                        told.send_replace(true);
                        asks = 0;
                    } else if ask.poll_tick(cx).is_ready() {
                        asks -= 1;
                    } else {
                        break;
                    }
                }
                polled
            });
            // Both arms are cancel-safe.
            tokio::select! {
                ended = ended => if let Err(error) = ended {
                    debug!(%address, error = &error as &dyn std::error::Error, "a link ended");
                },
                () = distrusted(&identity, vouched.as_ref()) => {
                    cut.cancel();
                    info!(%address, "a link is cut: nobody who is believed vouches for its peer");
                }
            }
        });
        let age_max = LINK_AGE_MAX.mul_f64(1.0 - LINK_AGE_JITTER * self.dice.lock().fraction());
        let opened = Open { sender, extended, first, born: Instant::now(), age_max, trust };
        *open = Some(opened.clone());
        Ok((opened, false))
    }

    async fn send_single(
        &self,
        to: &Destination,
        mut request: Request<Body>,
        reuse: Reuse,
    ) -> Result<(Response<Incoming>, Single), SendError> {
        loop {
            let kept = if reuse == Reuse::Allowed { self.singles.take(&key_of(to)) } else { None };
            let mut single = match kept {
                Some(single) => single,
                None => {
                    let _waiting = wait(to)?;
                    self.open_single(to).await?
                }
            };
            single.answers.asked();
            match single.sender.try_send_request(request).await {
                Ok(response) => {
                    single.answered(response.headers());
                    return Ok((response, single));
                }
                Err(mut failed) => match failed.take_message() {
                    Some(message) if single.reused() => request = message,
                    Some(_message) => return Err(SendError::NotSent(failed.into_error())),
                    None if single.unread() => return Err(SendError::Unread { source: failed.into_error() }),
                    None => return Err(SendError::Broken(failed.into_error())),
                },
            }
        }
    }

    async fn open_single(&self, to: &Destination) -> Result<Single, ConnectError> {
        let slot = admit(to)?;
        let io = connect::plain(&*self.dial, to.address, to.client, to.connect_timeout).await?;
        let (io, watch) = self.singles.watch(to.address, io);
        let (io, answers) = Answers::watch(Box::new(io));
        let (sender, connection) = codec::Builder::new()
            .handshake(TokioIo::new(io))
            .await
            .map_err(|source| ConnectError::Http { to: to.address, source })?;
        let address = to.address;
        self.tasks.spawn(async move {
            let _slot = slot;
            if let Err(error) = connection.with_upgrades().await {
                debug!(%address, error = &error as &dyn std::error::Error, "an upstream connection ended");
            }
        });
        Ok(Single::new(sender, watch, answers))
    }

    fn count(&self, address: SocketAddr) -> Load {
        let load = Arc::clone(self.loads.lock().entry(address).or_default());
        load.fetch_add(1, Ordering::Relaxed);
        Load(load)
    }
}

/// Runs the tasks that the codec makes of a connection, so that what they write is sent.
#[derive(Clone)]
struct Driver {
    tasks: Tasks,
    /// Ends them, whatever is under way.
    cut: CancellationToken,
    wire: Wire,
}

impl<F> hyper::rt::Executor<F> for Driver
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, task: F) {
        let (wire, cut) = (self.wire.clone(), self.cut.clone());
        self.tasks.execute(async move {
            let driven = wire.drive(task);
            // Both arms are cancel-safe: one of them is the end.
            tokio::select! {
                _ended = driven => {}
                () = cut.cancelled() => {}
            }
        });
    }
}

fn key_of(to: &Destination) -> Key {
    Key { address: to.address, peer: to.peer.clone(), client: to.client.map(|client| client.ip()) }
}

/// A slot for the time in which a request waits for a connection.
fn wait(to: &Destination) -> Result<Option<Slot>, ConnectError> {
    let admit = |breaker: &Arc<Breaker>| breaker.admit_pending().ok_or_else(|| ConnectError::Limit(breaker.rule.clone()));
    to.breaker.as_ref().map(admit).transpose()
}

fn admit(to: &Destination) -> Result<Option<Slot>, ConnectError> {
    match &to.breaker {
        Some(breaker) => match breaker.admit_connection() {
            Some(slot) => Ok(Some(slot)),
            None => Err(ConnectError::Limit(breaker.rule.clone())),
        },
        None => Ok(None),
    }
}

/// Did the peer say that it did not process the request (RFC 9113 8.7)?
fn unprocessed(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(h2) = inner.downcast_ref::<h2::Error>() {
            return h2.reason() == Some(h2::Reason::REFUSED_STREAM)
                || (h2.is_go_away() && h2.is_remote() && h2.reason() == Some(h2::Reason::NO_ERROR));
        }
        source = inner.source();
    }
    false
}

/// After this time a link is opened anew, so that certificates and trust are looked at again.
const LINK_AGE_MAX: Duration = Duration::from_secs(30 * 60);
/// By how much of it the age of a link may be shorter.
const LINK_AGE_JITTER: f64 = 0.2;
/// What may be on its way in one stream, and on one connection: as much as 256 streams together, so that a few whose readers
/// stand still never hold up the others. More is not granted, for that is what they may make a sidecar hold.
pub(crate) const STREAM_WINDOW: u32 = 256 << 10;
pub(crate) const CONNECTION_WINDOW: u32 = 64 << 20;
/// A link on which a request waits and nothing comes is asked whether it is alive: a pod that vanished says no goodbye.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
const KEEP_ALIVE_MAX: Duration = Duration::from_secs(5);
/// How long a peer's first settings are waited for.
const SETTINGS_MAX: Duration = Duration::from_secs(1);
/// How often they are looked for meanwhile.
const SETTINGS_ASK: Duration = Duration::from_millis(2);
const SETTINGS_ASKS: u32 = 500;
