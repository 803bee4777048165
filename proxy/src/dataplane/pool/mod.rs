//! Upstream connections: one shared HTTP/2 connection per endpoint and expected identity, kept-alive HTTP/1 connections
//! towards the own application and towards endpoints without a sidecar.
//!
//! Invariants: a connection is never used for another peer identity or another client than the one it was opened for; of
//! every failure it is known whether the request can have been processed.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::task::{Poll, ready};
use std::time::Duration;

use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http1 as codec;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tracing::debug;

pub(crate) mod connect;
mod first;
mod grants;
mod heads;
mod http1;
mod idleness;
mod link;
mod seats;
mod upload;

use self::connect::{ConnectError, Dial};
pub(crate) use self::heads::{AnswerLimits, HeadTooLarge};
use self::http1::{Single, Singles};
use self::link::{Answered, Link};
pub(crate) use self::link::{RESET_KEPT, RESETS_KEPT, STREAM_WINDOW};
use self::seats::Seat;
use self::upload::Held;
use super::http::answers::Answers;
use super::http::body::Body;
use super::http::inflow::Inflow;
use super::http::interims::{Interims, TooMuch};
use super::http::marks::{Mark, Marks};
use super::http::spelling::Spelling;
use super::http::tunnel::Upgrading;
use super::tasks::Tasks;
use super::tls::Alpn;
use crate::base::net::BoxedIo;
use crate::base::placed;
use crate::base::random::Dice;
use crate::dataplane::http::credit::Credit;
use crate::dataplane::http::inflow::Stream;
use crate::identity::source::{Identity, Vouched};
use crate::identity::spiffe::SpiffeId;
use crate::policy::RuleName;
use crate::policy::breaker::{Breaker, Slot};
use crate::snapshot::{Backend, Endpoint, Transport};

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

impl Destination {
    /// An endpoint of a service, by the service's policies.
    pub(crate) fn endpoint(endpoint: &Endpoint, backend: &Backend) -> Self {
        Self {
            address: endpoint.address,
            peer: peer_of(endpoint),
            client: None,
            connect_timeout: backend.connect_timeout,
            breaker: Some(Arc::clone(&backend.breaker)),
        }
    }

    /// A port of a workload that is called by its own address.
    pub(crate) fn workload(workload: &Endpoint, port: u16) -> Self {
        Self { peer: peer_of(workload), ..Self::outside(SocketAddr::new(workload.address.ip(), port)) }
    }

    /// The own application, which is shown its true client.
    pub(crate) fn application(address: SocketAddr, client: SocketAddr) -> Self {
        Self { client: Some(client), ..Self::outside(address) }
    }

    /// What no service and no policy is known of.
    pub(crate) fn outside(address: SocketAddr) -> Self {
        Self { address, peer: None, client: None, connect_timeout: CONNECT_MAX, breaker: None }
    }
}

/// Who an endpoint must prove to be.
pub(crate) fn peer_of(endpoint: &Endpoint) -> Option<SpiffeId> {
    match &endpoint.transport {
        Transport::MutualTls(id) => Some(id.clone()),
        Transport::Plaintext => None,
    }
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
    configs: connect::Configs,
    tasks: Tasks,
    /// For what peers send of answers that nobody reads.
    answers: Arc<Credit>,
    links: Mutex<BTreeMap<Key, Arc<Link>>>,
    /// What a connection in HTTP/2 that carries further requests reads of an answer's head, at least.
    list_bytes: AtomicU32,
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

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The request did not leave.
    #[error("the request did not leave")]
    NotSent(#[source] WireError),
    /// What answered in clear is no server of HTTP/2.
    #[error("the destination does not speak HTTP/2")]
    NotHttp2(#[source] h2::Error),
    /// The peer was not asked: it does not offer extended CONNECT.
    #[error("the destination does not offer extended CONNECT")]
    NotExtended,
    /// The peer said that it did not process the request.
    #[error("the request was refused")]
    Refused(#[source] WireError),
    /// The peer had closed before anything of the request reached it.
    #[error("the connection was closed before the request reached the other side")]
    Unread { source: hyper::Error },
    /// Too much was said before the answer.
    #[error(transparent)]
    TooMuch(#[from] TooMuch),
    /// The head of the answer is over a limit.
    #[error(transparent)]
    TooLarge(#[from] HeadTooLarge),
    /// The peer broke the rules of HTTP: in its answer, or so that the whole connection ends.
    #[error("the answer breaks the rules of HTTP")]
    Malformed(#[source] WireError),
    /// The request left and may have been processed.
    #[error("the connection broke before an answer came")]
    Broken(#[source] WireError),
}

/// What the codecs say.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    #[error(transparent)]
    Single(#[from] hyper::Error),
    #[error(transparent)]
    Stream(#[from] h2::Error),
}

/// May a connection be used that carried a request before?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Reuse {
    Allowed,
    Fresh,
}

/// An answer, and what it holds until its body is through. It is large, and boxed where it is made: it is handed on a few times.
#[derive(Debug)]
pub(crate) struct Sent {
    pub(crate) response: Response<Inflow>,
    /// Of its headers, as they came.
    pub(crate) marks: Marks,
    /// The connection or stream as a tunnel, where the answer makes one of it.
    pub(crate) upgrading: Option<Upgrading>,
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

/// The place of one request on a connection. An HTTP/1 connection is given back when the answer was read whole; what still
/// goes out on a stream ends when the answer is dropped before that.
#[derive(Debug)]
pub(crate) struct Lease {
    one: Option<(Arc<Pool>, Key, Single)>,
    held: Option<Held>,
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
    /// There may be much of the answer: a stream's connection is granted as much as its reader may leave there.
    pub(crate) fn may_be_large(&self) {
        if let Some(held) = &self.held {
            held.may_be_large();
        }
    }

    /// The answer was read whole, from this stream if it came on one: the connection can carry another request.
    pub(crate) fn give_back(mut self, spent: Option<Stream>) {
        if let Some((pool, key, single)) = self.one.take() {
            pool.singles.put(key, single);
        }
        if let Some(held) = self.held.take() {
            held.give_back(spent);
        }
    }
}

impl Pool {
    /// Nothing open yet.
    pub(crate) fn new(dial: Arc<dyn Dial>, identity: Identity, answers: Arc<Credit>, tasks: Tasks, seed: u64) -> Self {
        Self {
            dial,
            identity,
            configs: connect::Configs::default(),
            tasks,
            answers,
            links: Mutex::default(),
            list_bytes: AtomicU32::new(AnswerLimits::default().list_bytes_read()),
            singles: Singles::default(),
            loads: Mutex::default(),
            dice: Mutex::new(Dice::from_seed(seed)),
        }
    }

    /// What answers may be from now on, how many connections in HTTP/1 there may be to one address for one client, and how much
    /// all in HTTP/2 may hold.
    pub(crate) fn limit(&self, limits: AnswerLimits, connections: u32, answer_bytes: u32) {
        self.answers.limit(answer_bytes);
        self.list_bytes.store(limits.list_bytes_read(), Ordering::Relaxed);
        self.singles.limit(limits, connections);
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
        let (terms, short) = (self.terms(), self.answers.is_short());
        self.links.lock().retain(|key, link| {
            // What was opened with handshakes is worth more, and its other end closes it in time.
            link.sweep(terms, key.peer.is_none().then_some(UNUSED_MAX));
            if short {
                link.yield_credit();
            }
            !link.is_idle()
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
        interims: Option<&Interims>,
    ) -> Result<Box<Sent>, SendError> {
        let load = self.count(to.address);
        if to.peer.is_some() || speaks == Speaks::Http2 {
            let Answered { response, upgrading, held } = self.send_shared(to, request, interims).await?;
            heads::within(|| self.singles.limits(), response.headers())?;
            let lease = Lease { one: None, held: Some(held), _load: load };
            let marks = Marks::of(response.headers());
            Ok(placed::boxed(|| Sent { response, marks, upgrading, spelling: None, lease }))
        } else {
            let (mut response, single) = self.send_single(to, request, reuse, interims).await?;
            let marks = Marks::of(response.headers());
            if marks.has(Mark::KEEP_ALIVE) {
                single.answered(response.headers());
            }
            let spelling = single.answers.answered();
            let lease = Lease { one: Some((Arc::clone(self), key_of(to), single)), held: None, _load: load };
            let upgrading = response.extensions_mut().remove::<OnUpgrade>().map(Upgrading::codec);
            Ok(placed::boxed(|| Sent { response: response.map(Inflow::from), marks, upgrading, spelling, lease }))
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
        let trust = self.identity.trust_epoch();
        let link =
            connect::link(&*self.dial, &self.identity, &self.configs, to.address, peer, Alpn::Tcp, to.connect_timeout).await?;
        let vouched = Some(self.identity.vouch(link.get_ref().1.peer_certificates(), trust));
        Ok(Opaque { io: Box::new(link), vouched, slot })
    }

    async fn send_single(
        &self,
        to: &Destination,
        mut request: Request<Body>,
        reuse: Reuse,
        interims: Option<&Interims>,
    ) -> Result<(Response<Incoming>, Single), SendError> {
        loop {
            let kept = if reuse == Reuse::Allowed { self.singles.take(&key_of(to), request.method()) } else { None };
            let mut single = match kept {
                Some(single) => single,
                None => {
                    let _waiting = wait(to)?;
                    // Large and seldom: boxed, it takes no place in every other request.
                    placed::pinned(|| self.another_single(to, request.method(), reuse)).await?
                }
            };
            single.answers.asked();
            let sent = {
                let answers = &single.answers;
                let mut sending = pin!(single.sender.try_send_request(request));
                let sent = poll_fn(|cx| {
                    answers.hear(cx.waker(), interims)?;
                    let sent = ready!(sending.as_mut().poll(cx));
                    // Whatever the connection's task read until now was said before.
                    answers.hear(cx.waker(), interims)?;
                    Poll::Ready(Ok::<_, TooMuch>(sent))
                });
                sent.await?
            };
            match sent {
                Ok(response) => return Ok((response, single)),
                Err(mut failed) => match failed.take_message() {
                    Some(message) if single.reused() => request = message,
                    Some(_message) => return Err(SendError::NotSent(failed.into_error().into())),
                    None if single.unread() => return Err(SendError::Unread { source: failed.into_error() }),
                    None => return Err(single.failed(failed.into_error())),
                },
            }
        }
    }

    /// A connection where none was free: another one, or one that somebody else leaves.
    async fn another_single(&self, to: &Destination, method: &Method, reuse: Reuse) -> Result<Single, ConnectError> {
        let key = key_of(to);
        let seats = self.singles.seats(&key);
        if !seats.are_awaited()
            && let Some(seat) = seats.take(self.singles.connections())
        {
            return self.open_single(to, seat).await;
        }
        let Some(_waiting) = seats.wait() else {
            return Err(ConnectError::Limit(RuleName::new("waiting_for_connections")));
        };
        loop {
            // From here on no bell is missed. Who heard one looks before it waits for anything else.
            let mut freed = pin!(seats.freed.notified());
            freed.as_mut().enable();
            if let Some(mut single) = self.singles.next(&key) {
                // The codec may have a turn to go until it can carry a request.
                if reuse == Reuse::Allowed && single.sender.ready().await.is_ok() && single.begin_again(method) {
                    return Ok(single);
                }
                // It ends with this, and its seat is free then.
                continue;
            }
            if let Some(seat) = seats.take(self.singles.connections()) {
                return self.open_single(to, seat).await;
            }
            freed.await;
        }
    }

    async fn open_single(&self, to: &Destination, seat: Seat) -> Result<Single, ConnectError> {
        let slot = admit(to)?;
        let seats = seat.of();
        let io = connect::plain(&*self.dial, to.address, to.client, to.connect_timeout).await?;
        let (io, watch) = self.singles.watch(to.address, io, seat);
        let (io, answers) = Answers::watch(Box::new(io));
        let limits = self.singles.limits();
        let mut codec = codec::Builder::new();
        // "A proxy MUST remove any such whitespace from a response message" (RFC 9112 5.1).
        codec.allow_spaces_after_header_name_in_responses(true).max_buf_size(limits.bytes).max_header_size(limits.bytes);
        if let Some(count) = limits.count {
            codec.max_headers(count);
        }
        let (sender, connection) = codec
            .handshake(TokioIo::new(io))
            .await
            .map_err(|source| ConnectError::Http { to: to.address, source: source.into() })?;
        let address = to.address;
        self.tasks.spawn(async move {
            let _slot = slot;
            if let Err(error) = connection.with_upgrades().await {
                debug!(%address, error = &error as &dyn std::error::Error, "an upstream connection ended");
            }
        });
        Ok(Single::new(sender, watch, answers, limits, seats))
    }

    fn link_to(&self, to: &Destination) -> Arc<Link> {
        Arc::clone(self.links.lock().entry(key_of(to)).or_default())
    }

    fn count(&self, address: SocketAddr) -> Load {
        let load = Arc::clone(self.loads.lock().entry(address).or_default());
        load.fetch_add(1, Ordering::Relaxed);
        Load(load)
    }
}

/// How long a connection may take to be made where no policy says it.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How long a shared connection in clear is kept that nobody uses. There may be one for each client of the application.
const UNUSED_MAX: Duration = Duration::from_secs(60);

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
