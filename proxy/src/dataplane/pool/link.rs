//! Shared connections of HTTP/2: to other sidecars, and to applications that speak it.
//!
//! One connection per destination carries everything, for frames of many requests in one piece are cheaper than pieces of
//! many connections. Another is opened only when the first has no stream left, up to a few; who finds no place on any of
//! them waits, and there is room for so many that wait and no more. A connection that grew old, or was opened under trust
//! that holds no more, takes no new request; it says goodbye when its last one ended.
//!
//! Sources: RFC 9113 5.1.2 (streams at once), 6.8 (GOAWAY), 8.7 (what was not processed), RFC 8441. Invariant: a request is
//! on a connection only as long as the peer lets it have that many, so that none waits in the codec, where it could not be
//! moved to another connection. How many that is, is not known of a fresh connection until its peer's settings came; one it may
//! always carry.

use std::fmt;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Builder, Connection, SendRequest};
use h2::{Ping, PingPong, Reason};
use http::header::CONTENT_LENGTH;
use http::{Method, Request, Response};
use http_body::Body as _;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep, timeout, timeout_at};
use tracing::{debug, info};

use super::connect::{self, ConnectError};
use super::first::First;
use super::grants::{Granted, Grants};
use super::upload::Held;
use super::{Destination, Pool, SendError, WireError, admit, distrusted, wait};
use crate::base::net::BoxedIo;
use crate::base::placed;
use crate::dataplane::http::body::Body;
use crate::dataplane::http::inflow::{Inflow, Stream};
use crate::dataplane::http::interims::{self, Ended, Interims, Said};
use crate::dataplane::http::outflow::Outflow;
use crate::dataplane::http::tunnel::{Tunnel, Upgrading};
use crate::dataplane::tls::Alpn;
use crate::dataplane::wire::Wire;
use crate::policy::RuleName;
use crate::telemetry::trace::TraceContext;

/// The connections to one destination.
#[derive(Debug, Default)]
pub(super) struct Link {
    open: Mutex<Vec<Arc<Open>>>,
    /// A turn to dial, held while one caller opens what all of them will use; and why the last dial failed, and when.
    dialling: tokio::sync::Mutex<Option<(Instant, ConnectError)>>,
    /// Rung when a place is free and somebody waits for one.
    freed: Notify,
    waiting: AtomicUsize,
}

/// A connection.
struct Open {
    /// The stream that was over last. Letting go of one wakes the connection's task, which is done when the next request wakes
    /// it anyway.
    spent: Mutex<Option<Stream>>,
    sender: SendRequest<Bytes>,
    used: Arc<Use>,
    granted: Arc<Granted>,
    /// How the peer began to speak, where it is no sidecar.
    first: First,
    /// Requests that it may still carry before its stream numbers are used up.
    left: AtomicUsize,
    born: Instant,
    /// Drawn for each connection, so that those that were opened together are not opened anew together.
    age_max: Duration,
    /// What was left when it was last looked whether it is used, and when that was something else, or it was in use.
    looked: Mutex<(usize, Instant)>,
    terms: Terms,
}

/// Under what a connection is opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// The own name and the authorities.
    trust: u64,
    /// What its codec reads of an answer's head, in its way of counting.
    list_bytes: u32,
}

impl Terms {
    /// How large the trailers of an answer may be: as large as its head, of which the codec reads twice as much.
    fn trailer_bytes(self) -> usize {
        usize::try_from(self.list_bytes / 2).unwrap_or(usize::MAX)
    }
}

/// What those who use a connection and the one that drives it tell each other.
#[derive(Debug, Default)]
struct Use {
    /// Requests on it.
    streams: AtomicUsize,
    closed: AtomicBool,
}

/// A request's place on a connection.
pub(super) struct Place {
    link: Arc<Link>,
    open: Arc<Open>,
    /// It carried requests before.
    reused: bool,
    /// There may be much of its answer.
    large: AtomicBool,
}

/// A request's answer, and what it holds until its body is through.
pub(super) struct Answered {
    pub(super) response: Response<Inflow>,
    pub(super) upgrading: Option<Upgrading>,
    pub(super) held: Held,
}

impl fmt::Debug for Open {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Open({:?})", self.used)
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Place({:?})", self.open)
    }
}

impl Place {
    /// Keeps a stream that is over, in the place of the one before.
    pub(super) fn spent(&self, stream: Option<Stream>) {
        if let Some(stream) = stream {
            let before = self.open.spent.lock().replace(stream);
            drop(before);
        }
    }

    /// From now on there may be much of the answer.
    pub(super) fn may_be_large(&self) {
        if !self.large.swap(true, Ordering::Relaxed) {
            self.open.granted.more();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if *self.large.get_mut() {
            self.open.granted.less();
        }
        self.open.used.streams.fetch_sub(1, Ordering::Relaxed);
        if self.link.waiting.load(Ordering::Relaxed) > 0 {
            self.link.freed.notify_one();
        }
    }
}

impl Link {
    /// Is there nothing worth keeping?
    pub(super) fn is_idle(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) == 1 && self.open.lock().iter().all(|open| open.is_closed())
    }

    /// Lets go of connections that take no requests any more, and of those that nobody used for `unused_max`. What is under
    /// way on them goes on. To be called now and then.
    pub(super) fn sweep(&self, terms: Terms, unused_max: Option<Duration>) {
        let wanted = |open: &Open| unused_max.is_none_or(|max| open.unused() < max);
        self.open.lock().retain(|open| open.takes_requests(terms) && wanted(open));
    }

    /// Lets go of connections that nobody uses now and that have some of the credit: of what was granted nothing comes back by
    /// itself, and others need it. The next request there pays for a handshake.
    pub(super) fn yield_credit(&self) {
        let spared = |open: &Open| open.used.streams.load(Ordering::Relaxed) > 0 || !open.granted.has_credit();
        self.open.lock().retain(|open| spared(open));
    }

    /// A place on a connection that is open, if there is one.
    fn place(self: &Arc<Self>, terms: Terms) -> Option<Place> {
        let mut all = self.open.lock();
        // What is under way on an old one goes on; it closes when its last request ended.
        all.retain(|open| open.takes_requests(terms));
        let open = all.iter().find(|open| open.has_room())?;
        Some(self.taken(open, true))
    }

    fn taken(self: &Arc<Self>, open: &Arc<Open>, reused: bool) -> Place {
        open.used.streams.fetch_add(1, Ordering::Relaxed);
        open.left.fetch_sub(1, Ordering::Relaxed);
        Place { link: Arc::clone(self), open: Arc::clone(open), reused, large: AtomicBool::new(false) }
    }

    /// How many connections there are, and one of them of which it will be known soon how much it takes.
    fn others(&self) -> (usize, Option<Arc<Open>>) {
        let all = self.open.lock();
        (all.len(), all.iter().find(|open| open.is_settling()).cloned())
    }

    /// One more that waits for a place.
    fn wait(&self) -> Result<Waiting<'_>, ConnectError> {
        let waiting = Waiting(&self.waiting);
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= WAITING_MAX {
            return Err(ConnectError::Limit(RuleName::new("waiting_for_streams")));
        }
        Ok(waiting)
    }
}

/// Counts while it lives.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Open {
    fn takes_requests(&self, terms: Terms) -> bool {
        let holds = self.terms.trust == terms.trust && self.terms.list_bytes >= terms.list_bytes;
        !self.is_closed() && holds && self.left.load(Ordering::Relaxed) > 0 && self.born.elapsed() < self.age_max
    }

    /// How long nobody used it, as far as those who look now and then can know.
    fn unused(&self) -> Duration {
        let (left, now) = (self.left.load(Ordering::Relaxed), Instant::now());
        let mut looked = self.looked.lock();
        if looked.0 != left || self.used.streams.load(Ordering::Relaxed) > 0 {
            *looked = (left, now);
        }
        now.saturating_duration_since(looked.1)
    }

    fn is_closed(&self) -> bool {
        self.used.closed.load(Ordering::Relaxed)
    }

    fn has_room(&self) -> bool {
        let most = match self.sender.current_max_send_streams() {
            UNSAID => 1,
            said => said.min(STREAMS_MAX),
        };
        self.used.streams.load(Ordering::Relaxed) < most
    }

    /// Will it be known soon how many requests it takes?
    fn is_settling(&self) -> bool {
        self.sender.current_max_send_streams() == UNSAID && !self.is_closed() && self.born.elapsed() < SETTINGS_MAX
    }

    /// Why a request has no answer.
    fn ended(&self, ended: Ended) -> SendError {
        match ended {
            Ended::Stream(error) => self.failed(error),
            Ended::TooMuch(error) => error.into(),
        }
    }

    /// How far a request came that has no answer (RFC 9113 8.7).
    fn failed(&self, error: h2::Error) -> SendError {
        // Of a goodbye of the peer's only those requests hear that it left out, "not ... processed", whatever its error is
        // (RFC 9113 6.8); the others go on until the connection ends, and hear of that.
        let unprocessed = error.reason() == Some(Reason::REFUSED_STREAM) || (error.is_go_away() && error.is_remote());
        if self.first.is_other() {
            SendError::NotHttp2(error)
        } else if unprocessed {
            SendError::Refused(WireError::Stream(error))
        } else if error.is_library() {
            SendError::Malformed(WireError::Stream(error))
        } else {
            SendError::Broken(WireError::Stream(error))
        }
    }

    /// Waits until the peer says whether it takes extended CONNECT: "A client MUST NOT use the extended CONNECT before it
    /// received SETTINGS_ENABLE_CONNECT_PROTOCOL" (RFC 8441 3), and on a fresh connection that frame may still be on its way.
    /// What is no server of HTTP/2, or is gone, is found out by sending.
    async fn takes_extended(&self) -> bool {
        let offered = || self.sender.is_extended_connect_protocol_enabled();
        let settings = async {
            while !offered() && !self.is_closed() {
                let known = self.first.is_known();
                // The codec may have a turn to go until it has read what came.
                sleep(SETTINGS_ASK).await;
                if known {
                    break;
                }
            }
        };
        drop(timeout(SETTINGS_MAX, settings).await);
        offered() || self.is_closed() || self.first.is_other()
    }
}

impl Pool {
    /// Sends a request on a shared connection. One that turns out dead before the request left is replaced.
    pub(super) async fn send_shared(
        &self,
        to: &Destination,
        request: Request<Body>,
        interims: Option<&Interims>,
    ) -> Result<Answered, SendError> {
        let link = self.link_to(to);
        let extended = request.extensions().get::<h2::ext::Protocol>().is_some();
        let tunnels = *request.method() == Method::CONNECT;
        let (place, mut sender) = loop {
            let place = match link.place(self.terms()) {
                Some(place) => place,
                None => {
                    let _waiting = wait(to)?;
                    // Large and seldom: boxed, it takes no place in every other request.
                    placed::pinned(|| self.another(&link, to)).await?
                }
            };
            let mut sender = place.open.sender.clone();
            if extended && !place.open.takes_extended().await {
                return Err(SendError::NotExtended);
            }
            match poll_fn(|cx| sender.poll_ready(cx)).await {
                Ok(()) => break (place, sender),
                Err(error) => {
                    place.open.used.closed.store(true, Ordering::Relaxed);
                    if place.open.first.is_other() {
                        return Err(SendError::NotHttp2(error));
                    }
                    if !place.reused {
                        return Err(SendError::NotSent(WireError::Stream(error)));
                    }
                }
            }
        };
        let (mut head, body) = request.into_parts();
        if !place.reused {
            TraceContext::introduce(&mut head.headers);
        }
        let end = !tunnels && body.is_end_stream();
        if !end && !tunnels {
            say_length(&mut head, &body);
        }
        let (mut answer, stream) = sender
            .send_request(Request::from_parts(head, ()), end)
            .map_err(|error| SendError::NotSent(WireError::Stream(error)))?;
        drop(sender);
        let spent = place.open.spent.lock().take();
        drop(spent);
        let mut said = Said::default();
        let trailers_max = place.open.terms.trailer_bytes();
        if tunnels {
            let answered = poll_fn(|cx| interims::poll_answer(&mut answer, &mut said, interims, cx));
            let response = answered.await.map_err(|ended| place.open.ended(ended))?;
            if response.status().is_success() {
                place.may_be_large();
                let (head, from) = response.into_parts();
                let tunnel = Tunnel::new(from, Arc::clone(&place.open.granted.account), stream);
                let upgrading = Upgrading::new(std::future::ready(Ok(Box::new(tunnel) as BoxedIo)));
                let response = Response::from_parts(head, Inflow::Empty);
                return Ok(Answered { response, upgrading: Some(upgrading), held: Held::tunnel(place) });
            }
            let response = response.map(|from| Inflow::stream(from, &place.open.granted.account, trailers_max));
            return Ok(Answered { response, upgrading: None, held: Held::tunnel(place) });
        }
        let mut outflow = if end { None } else { Some(Outflow::new(body, stream)) };
        let answered = poll_fn(|cx| {
            if outflow.as_mut().is_some_and(|outflow| Pin::new(outflow).poll(cx).is_ready()) {
                outflow = None;
            }
            interims::poll_answer(&mut answer, &mut said, interims, cx)
        });
        let response = answered.await.map_err(|ended| place.open.ended(ended))?;
        let response = response.map(|from| Inflow::stream(from, &place.open.granted.account, trailers_max));
        Ok(Answered { response, upgrading: None, held: Held::new(place, outflow, &self.tasks) })
    }

    /// A place where none was free: on another connection, or when somebody else leaves.
    async fn another(&self, link: &Arc<Link>, to: &Destination) -> Result<Place, ConnectError> {
        let _waiting = link.wait()?;
        loop {
            // From here on no bell is missed.
            let mut freed = pin!(link.freed.notified());
            freed.as_mut().enable();
            // Whoever heard one looks before it waits for anything else: if it is given up then, no bell is lost with it.
            if let Some(place) = link.place(self.terms()) {
                return Ok(place);
            }
            let begun = Instant::now();
            let settling = {
                let mut turn = link.dialling.lock().await;
                let terms = self.terms();
                // Somebody else had the turn before.
                if let Some(place) = link.place(terms) {
                    return Ok(place);
                }
                // It waited for a dial that failed: another one would tell the same, and that much later.
                if let Some(same) = turn.as_ref().filter(|(failed, _)| begun < *failed).and_then(|(_, error)| error.again()) {
                    return Err(same);
                }
                let (others, settling) = link.others();
                if settling.is_none() && others < CONNECTIONS_MAX {
                    match self.open(link, to, terms).await {
                        Ok(open) => {
                            let open = Arc::new(open);
                            let place = link.taken(&open, false);
                            link.open.lock().push(open);
                            // There is room on it for some of those who wait because no connection was to be had before.
                            link.freed.notify_waiters();
                            return Ok(place);
                        }
                        // The service may have no more connections, but those it has will do.
                        Err(ConnectError::Limit(_)) if others > 0 => {}
                        Err(error) => {
                            *turn = error.again().map(|same| (Instant::now(), same));
                            return Err(error);
                        }
                    }
                }
                settling
            };
            match settling {
                None => freed.await,
                Some(open) => {
                    // It rings when the settings came too, and when there will be none.
                    drop(timeout_at(open.born + SETTINGS_MAX, freed).await);
                    if open.first.is_other() {
                        // Whoever sends there is told so. Another connection would tell the same, one after the other.
                        return Ok(link.taken(&open, true));
                    }
                }
            }
        }
    }

    /// Under what connections are opened, and used, from now on.
    pub(super) fn terms(&self) -> Terms {
        Terms { trust: self.identity.trust_epoch(), list_bytes: self.list_bytes.load(Ordering::Relaxed) }
    }

    async fn open(&self, link: &Arc<Link>, to: &Destination, terms: Terms) -> Result<Open, ConnectError> {
        let slot = admit(to)?;
        let mut vouched = None;
        let first = First::default();
        let wire = match &to.peer {
            Some(peer) => {
                let link =
                    connect::link(&*self.dial, &self.identity, &self.configs, to.address, peer, Alpn::H2, to.connect_timeout)
                        .await?;
                let (io, session) = link.into_inner();
                vouched = Some(self.identity.vouch(session.peer_certificates(), terms.trust));
                Wire::secured(io, session)
            }
            None => {
                let io = connect::plain(&*self.dial, to.address, to.client, to.connect_timeout).await?;
                Wire::plain(first.watch(io))
            }
        };
        let grants = Grants::new(&self.answers);
        let granted = grants.granted();
        let mut codec = Builder::new();
        codec
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(grants.target())
            .data_frame_budget(SMALL_FRAMES)
            .max_header_list_size(terms.list_bytes)
            .max_concurrent_reset_streams(RESETS_KEPT)
            .reset_stream_duration(RESET_KEPT)
            // Callers share it: those who leave before their answers came must not end the answers of the others.
            .max_local_error_reset_streams(None)
            .initial_max_send_streams(UNSAID);
        let (sender, connection) = match timeout(to.connect_timeout, codec.handshake(wire.clone())).await {
            Ok(pair) => pair.map_err(|source| ConnectError::Http { to: to.address, source: WireError::Stream(source) })?,
            Err(_elapsed) => return Err(ConnectError::Timeout(to.address)),
        };
        let (address, identity) = (to.address, self.identity.clone());
        let used = Arc::<Use>::default();
        let alive = Alive::new(wire.clone(), Arc::clone(&used));
        let (link, ours) = (Arc::downgrade(link), Arc::clone(&used));
        self.tasks.spawn(Box::pin(async move {
            let _slot = slot;
            let driven = Driven { connection, alive, grants, address, link: Weak::clone(&link), settled: false };
            // Both arms are cancel-safe.
            tokio::select! {
                biased;
                ended = wire.drive(driven) => if let Err(error) = ended {
                    debug!(%address, %error, "a link ended");
                },
                () = distrusted(&identity, vouched.as_ref()) => {
                    info!(%address, "a link is cut: nobody who is believed vouches for its peer");
                }
            }
            ours.closed.store(true, Ordering::Relaxed);
            // Whoever waits for a place there looks elsewhere.
            if let Some(link) = link.upgrade() {
                link.freed.notify_waiters();
            }
        }));
        let age_max = LINK_AGE_MAX.mul_f64(1.0 - LINK_AGE_JITTER * self.dice.lock().fraction());
        let born = Instant::now();
        let (left, looked) = (AtomicUsize::new(REQUESTS_MAX), Mutex::new((REQUESTS_MAX, born)));
        Ok(Open { spent: Mutex::default(), sender, used, granted, first, left, born, age_max, looked, terms })
    }
}

/// What the codec does, and whether the peer is still there.
struct Driven {
    connection: Connection<Wire, Bytes>,
    alive: Alive,
    grants: Grants,
    address: SocketAddr,
    /// Who waits there for a place is told once that the peer said how many it has.
    link: Weak<Link>,
    settled: bool,
}

impl Future for Driven {
    type Output = Result<(), h2::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if let Poll::Ready(ended) = Pin::new(&mut this.connection).poll(cx) {
            return Poll::Ready(ended);
        }
        if !this.settled && this.connection.max_concurrent_send_streams() != UNSAID {
            this.settled = true;
            if let Some(link) = this.link.upgrade() {
                link.freed.notify_waiters();
            }
        }
        // The codec asks to be polled again where that grants anything.
        if let Some(target) = this.grants.poll_raised(cx) {
            this.connection.set_target_window_size(target);
        }
        let Alive { pings, .. } = &mut this.alive;
        if pings.is_none() {
            *pings = this.connection.ping_pong();
        }
        if this.alive.poll_gone(cx).is_ready() {
            info!(address = %this.address, "a link is given up: its peer does not answer");
            return Poll::Ready(Err(Reason::NO_ERROR.into()));
        }
        if std::mem::take(&mut this.alive.ticked)
            && let Some(target) = this.grants.lowered(cx)
        {
            this.connection.set_target_window_size(target);
        }
        Poll::Pending
    }
}

/// Asks a peer from which nothing comes whether it is alive: a pod that vanished says no goodbye.
struct Alive {
    wire: Wire,
    used: Arc<Use>,
    pings: Option<PingPong>,
    tick: Pin<Box<Sleep>>,
    /// It rang, for whoever else looks at something now and then.
    ticked: bool,
    /// No request waits for anything, so nothing is looked at.
    rests: bool,
    /// What had come by the last tick, and for how many ticks it was nothing new.
    heard: u32,
    quiet: u32,
}

impl Alive {
    fn new(wire: Wire, used: Arc<Use>) -> Self {
        Self { wire, used, pings: None, tick: Box::pin(sleep(TICK)), ticked: false, rests: false, heard: 0, quiet: 0 }
    }

    /// Is ready when the peer was asked and did not answer.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let used = self.used.streams.load(Ordering::Relaxed) > 0;
        if self.rests {
            // Whoever begins a request wakes the codec, and so this.
            if !used {
                return Poll::Pending;
            }
            self.rests = false;
            self.tick.as_mut().reset(Instant::now() + TICK);
        }
        while self.tick.as_mut().poll(cx).is_ready() {
            self.ticked = true;
            if !used {
                (self.rests, self.quiet) = (true, 0);
                return Poll::Pending;
            }
            self.tick.as_mut().reset(Instant::now() + TICK);
            let heard = self.wire.heard();
            self.quiet = if heard == self.heard { self.quiet.saturating_add(1) } else { 0 };
            self.heard = heard;
            if self.quiet >= QUIET_MAX {
                return Poll::Ready(());
            }
            if self.quiet >= QUIET_ASK
                && let Some(pings) = &mut self.pings
            {
                // One that is on its way already is enough. Its answer is heard, and nobody else looks at it.
                drop(pings.send_ping(Ping::opaque()));
            }
        }
        if self.quiet >= QUIET_ASK
            && let Some(pings) = &mut self.pings
        {
            drop(pings.poll_pong(cx));
        }
        Poll::Pending
    }
}

/// Says how long a body is, where its sender did not and it is known.
fn say_length(head: &mut http::request::Parts, body: &Body) {
    let Some(length) = body.size_hint().exact() else { return };
    let usual = matches!(head.method, Method::POST | Method::PUT | Method::PATCH);
    if (length > 0 || usual) && !head.headers.contains_key(CONTENT_LENGTH) {
        head.headers.insert(CONTENT_LENGTH, length.into());
    }
}

/// After this time a connection is opened anew, so that certificates and trust are looked at again.
const LINK_AGE_MAX: Duration = Duration::from_secs(30 * 60);
/// By how much of it the age of a connection may be shorter.
const LINK_AGE_JITTER: f64 = 0.2;
/// What may be on its way in one stream.
pub(crate) const STREAM_WINDOW: u32 = 256 << 10;
/// By how much the frames that a connection holds may be short of 256 bytes, all together. The codec would make it follow the
/// connection's window, and end a connection for messages that it was granted before.
const SMALL_FRAMES: usize = 32 << 20;
/// Requests at once on one connection, if its peer takes as many.
const STREAMS_MAX: usize = 256;
/// What the codec says of a peer whose settings have not come: a number that no peer can say, and not the one that means "as many as
/// you like".
const UNSAID: usize = usize::MAX - 1;
/// How many streams that were given up a connection remembers, and for how long: frames of theirs may still be on the way,
/// which are no error of the peer's.
pub(crate) const RESETS_KEPT: usize = 4_096;
pub(crate) const RESET_KEPT: Duration = Duration::from_secs(30);
/// Requests of one connection from its beginning to its end; stream numbers are odd and have 31 bits.
const REQUESTS_MAX: usize = 1 << 29;
/// Connections to one destination.
const CONNECTIONS_MAX: usize = 16;
/// Requests that wait for a place on one of them.
const WAITING_MAX: usize = 1_024;
/// How often a connection is looked at whose peer says nothing, after how many such looks it is asked, and after how many it is
/// given up.
const TICK: Duration = Duration::from_millis(2_500);
const QUIET_ASK: u32 = 2;
const QUIET_MAX: u32 = 4;
/// How long a peer's first settings are waited for, and how often they are looked for meanwhile.
const SETTINGS_MAX: Duration = Duration::from_secs(1);
const SETTINGS_ASK: Duration = Duration::from_millis(2);
