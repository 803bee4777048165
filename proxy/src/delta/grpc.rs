//! Drives both ends of the configuration stream over tonic: what the state machines decide is sent, what arrives is
//! handed to them.
//!
//! The sidecar's end is one task that reconnects with growing, jittered pauses for as long as anybody wants its updates:
//! slowly growing ones while nobody listens, which costs nobody anything, so that an outage is not much longer for it.
//! The control plane's end has no task of its own: it is the response stream that the HTTP/2 connection polls, so it
//! ends with the connection. Nothing is queued at either end but one response.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info, warn};

use crate::base::clock::WallClock;
use crate::base::drain::DrainGuard;
use crate::base::names::Named;
use crate::base::random::Dice;
use crate::delta::client::{AckHandle, Machine, Parts, Rejection, Update};
use crate::delta::envelope::delta_client::DeltaClient as WireClient;
use crate::delta::envelope::delta_server::{Delta, DeltaServer};
use crate::delta::envelope::{DeltaRequest, DeltaResponse};
use crate::delta::server::{Session, View};
use crate::delta::transport::{Dial, PeerInfo};
use crate::delta::{MESSAGE_BYTES_MAX, Scope};
use crate::model::ResourceKey;

/// What a sidecar's stream needs.
pub(crate) struct ClientConfig {
    /// Addresses of the control plane; tried in turn.
    pub(crate) control: Vec<String>,
    /// The own pod.
    pub(crate) node: Named,
    /// What is in force from an earlier life, with its versions.
    pub(crate) held: BTreeMap<ResourceKey, Arc<str>>,
    /// How a stream to one of the addresses is opened ([`crate::delta::transport::tls_dial`]).
    pub(crate) dial: Dial,
    /// Seed of the jitter between attempts.
    pub(crate) seed: u64,
}

/// The sidecar's handle on its stream. Cheap to clone; the stream ends with the receiver of its updates or with the
/// `JoinSet` that owns it, not with the handle.
#[derive(Clone, Debug)]
pub(crate) struct DeltaClient {
    shared: Arc<Shared>,
    connected: watch::Receiver<bool>,
}

/// Updates, in order. The next one comes only after the last one was acknowledged.
pub(crate) type UpdateStream = mpsc::Receiver<Update>;

/// What drives a stream, as long as it is polled.
pub(crate) type Driving = Pin<Box<dyn Future<Output = ()> + Send>>;

#[derive(Debug)]
struct Shared {
    wanted: Mutex<BTreeSet<Scope>>,
    changed: Notify,
}

impl DeltaClient {
    /// Starts the stream as a task of `owner`.
    #[cfg(test)]
    pub(crate) fn start(config: ClientConfig, owner: &mut tokio::task::JoinSet<()>) -> (Self, UpdateStream) {
        let (client, updates, driver) = Self::prepare(config);
        owner.spawn(driver);
        (client, updates)
    }

    /// The stream, and what drives it, which is to be run as a task.
    pub(crate) fn prepare(config: ClientConfig) -> (Self, UpdateStream, Driving) {
        let shared = Arc::new(Shared { wanted: Mutex::new(BTreeSet::new()), changed: Notify::new() });
        let (is_connected, connected) = watch::channel(false);
        let (updates, stream) = mpsc::channel(1);
        let driver = Driver {
            machine: Machine::new(config.node, env!("CARGO_PKG_VERSION"), &config.held),
            shared: Arc::clone(&shared),
            connected: is_connected,
            updates,
            answer: None,
        };
        let driving = driver.run(config.control, config.dial, Dice::from_seed(config.seed));
        (Self { shared, connected }, stream, Box::pin(driving))
    }

    /// Asks for a scope. Idempotent, never blocks; the answer is an update that names the scope.
    pub(crate) fn subscribe(&self, scope: Scope) {
        if self.shared.wanted.lock().insert(scope) {
            self.shared.changed.notify_one();
        }
    }

    /// Gives a scope up. What only it needed is removed by a later update.
    #[cfg_attr(not(test), expect(dead_code, reason = "a sidecar keeps what its pod once called; the tests give scopes up"))]
    pub(crate) fn unsubscribe(&self, scope: &Scope) {
        if self.shared.wanted.lock().remove(scope) {
            self.shared.changed.notify_one();
        }
    }

    /// Is the stream open? For readiness and metrics.
    pub(crate) fn connected(&self) -> watch::Receiver<bool> {
        self.connected.clone()
    }
}

struct Driver {
    machine: Machine,
    shared: Arc<Shared>,
    connected: watch::Sender<bool>,
    updates: mpsc::Sender<Update>,
    /// Where the owner answers the update in its hands.
    answer: Option<oneshot::Receiver<Vec<Rejection>>>,
}

/// How a stream ended.
enum End {
    /// Nobody wants updates any more.
    Unwanted,
    /// It broke or was refused after it had worked, or before.
    Broken { worked: bool, error: String },
    /// Nobody listens there.
    Unanswered { error: String },
}

/// How long to wait before the next attempt.
#[derive(Debug)]
struct Pause(Duration);

impl Pause {
    fn new() -> Self {
        Self(PAUSE_MIN)
    }

    /// The next pause, of which `share` (0.0 to 1.0) is by chance, so that sidecars do not come back all at once.
    fn next(&mut self, growth: f64, share: f64) -> Duration {
        let jittered = self.0.mul_f64(0.5 + share / 2.0);
        self.0 = self.0.mul_f64(growth).min(PAUSE_MAX);
        jittered
    }
}

impl Driver {
    async fn run(mut self, control: Vec<String>, dial: Dial, mut dice: Dice) {
        let mut pause = Pause::new();
        let mut told = false;
        for address in control.iter().cycle() {
            let ended = self.stream(address, &dial).await;
            self.connected.send_replace(false);
            self.machine.disconnected();
            let (worked, error, growth) = match ended {
                End::Unwanted => return,
                End::Broken { worked, error } => (worked, error, GROWTH),
                End::Unanswered { error } => (false, error, GROWTH_UNANSWERED),
            };
            if worked {
                pause = Pause::new();
            }
            // One line for an outage, however many attempts it takes.
            if worked || !told {
                warn!(error, control = address, "no configuration stream; the last good configuration stays");
            } else {
                debug!(error, control = address, "still no configuration stream");
            }
            told = true;
            tokio::select! {
                () = self.updates.closed() => return,
                () = sleep(pause.next(growth, dice.fraction())) => {}
            }
        }
    }

    async fn stream(&mut self, address: &str, dial: &Dial) -> End {
        let broken = |error: String| End::Broken { worked: false, error };
        // An update of the last stream that is still being published decides what this one is told to be held.
        if let Some(answer) = self.answer.take() {
            let answer = answer.await.ok();
            self.machine.published(answer);
        }
        let opened = async {
            let io = dial(address.to_owned()).await?;
            let mut io = Some(TokioIo::new(io));
            let connector =
                tower::service_fn(move |_| std::future::ready(io.take().ok_or(io::Error::from(io::ErrorKind::NotConnected))));
            let channel = endpoint().connect_with_connector(connector).await.map_err(io::Error::other)?;
            let (requests, sent) = mpsc::channel(1);
            let first = self.machine.connected(&self.shared.wanted.lock());
            // The channel is empty and open.
            drop(requests.try_send(first));
            let mut client = WireClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
            let responses = client.stream(ReceiverStream::new(sent)).await.map_err(|status| io::Error::other(text(&status)))?;
            Ok::<_, io::Error>((requests, responses.into_inner()))
        };
        let (requests, mut responses) = tokio::select! {
            () = self.updates.closed() => return End::Unwanted,
            opened = timeout(OPEN_MAX, opened) => match opened {
                Ok(Ok(opened)) => opened,
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    return End::Unanswered { error: error.to_string() };
                }
                Ok(Err(error)) => return broken(error.to_string()),
                Err(_elapsed) => return broken("opening it took too long".to_owned()),
            },
        };
        info!(control = address, "the configuration stream is open");
        self.connected.send_replace(true);
        let mut worked = false;
        loop {
            let wanted = self.shared.wanted.lock().clone();
            if let Some(request) = self.machine.request(&wanted) {
                match timeout(OPEN_MAX, requests.send(request)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_closed)) => return End::Broken { worked, error: "the control plane closed it".to_owned() },
                    Err(_elapsed) => return End::Broken { worked, error: "the control plane does not read".to_owned() },
                }
            }
            // Every arm is cancel-safe: a message that is half read stays in the stream's buffer.
            tokio::select! {
                () = self.updates.closed() => return End::Unwanted,
                () = self.shared.changed.notified() => {}
                answer = answered(&mut self.answer) => {
                    self.answer = None;
                    self.machine.published(answer);
                }
                response = responses.message(), if self.machine.takes_response() => match response {
                    Ok(Some(response)) => {
                        worked = true;
                        self.deliver(response);
                    }
                    Ok(None) => return End::Broken { worked, error: "the control plane ended it".to_owned() },
                    Err(status) => return End::Broken { worked, error: text(&status) },
                },
            }
        }
    }

    fn deliver(&mut self, response: DeltaResponse) {
        let Parts { version, resources, removed, scopes } = self.machine.response(response);
        debug!(%version, resources = resources.len(), removed = removed.len(), "configuration arrived");
        let (handle, answer) = oneshot::channel();
        let update = Update { version, resources, removed, scopes, ack: AckHandle(handle) };
        // There is room, for the last update was answered. If nobody receives, the handle is dropped with the update.
        drop(self.updates.try_send(update));
        self.answer = Some(answer);
    }
}

/// Waits for the owner's answer; for ever while there is nothing to answer. Cancel-safe.
async fn answered(answer: &mut Option<oneshot::Receiver<Vec<Rejection>>>) -> Option<Vec<Rejection>> {
    match answer {
        Some(answer) => answer.await.ok(),
        None => std::future::pending().await,
    }
}

fn endpoint() -> Endpoint {
    Endpoint::from_static("http://control.outrigger-system")
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_MAX)
        .keep_alive_while_idle(true)
}

/// What a status says, for people.
fn text(status: &Status) -> String {
    format!("{}: {}", status.code().description(), status.message())
}

/// What the control plane answers from, as its streams see it.
pub(crate) trait Desired: Send + Sync + 'static {
    /// One sidecar's place among those that are connected; dropped when its stream ends.
    type Seat: Send + 'static;

    /// May this peer open a stream for the pod that the session names?
    ///
    /// # Errors
    /// The status to end the stream with.
    fn admit(&self, peer: &PeerInfo, session: &Session) -> impl Future<Output = Result<Self::Seat, Status>> + Send;

    /// What the sidecar should have now.
    ///
    /// # Errors
    /// It may have nothing any more; the status to end the stream with, upon which the sidecar keeps what it has.
    fn view(&self, seat: &Self::Seat, session: &Session) -> Result<View, Status>;

    /// Tells when the desired state changes.
    fn changes(&self) -> watch::Receiver<u64>;

    /// The session changed: something was sent, acknowledged or subscribed to.
    fn report(&self, seat: &Self::Seat, session: &Session);
}

/// The service that serves configuration streams until `stop` is said.
pub(crate) fn service<D: Desired>(desired: Arc<D>, clock: WallClock, stop: DrainGuard) -> DeltaServer<Streams<D>> {
    DeltaServer::new(Streams { desired, clock, stop }).max_encoding_message_size(MESSAGE_BYTES_MAX)
}

/// Serves configuration streams.
pub(crate) struct Streams<D> {
    desired: Arc<D>,
    clock: WallClock,
    stop: DrainGuard,
}

#[tonic::async_trait]
impl<D: Desired> Delta for Streams<D> {
    type StreamStream = Pin<Box<dyn Stream<Item = Result<DeltaResponse, Status>> + Send>>;

    async fn stream(&self, request: Request<Streaming<DeltaRequest>>) -> Result<Response<Self::StreamStream>, Status> {
        let Some(peer) = request.extensions().get::<PeerInfo>().cloned() else {
            return Err(Status::internal("the connection has no peer"));
        };
        let mut requests = request.into_inner();
        let first = match timeout(OPEN_MAX, requests.message()).await {
            Ok(first) => first?.ok_or_else(|| Status::invalid_argument("the stream ended before its first request"))?,
            Err(_elapsed) => return Err(Status::deadline_exceeded("no first request came")),
        };
        let session = Session::open(first).map_err(refusal)?;
        let seat = self.desired.admit(&peer, &session).await?;
        // A stream does not outlive the certificate that opened it; the sidecar comes back with its fresh one and what it
        // holds is not sent again.
        let lifetime = peer.expires.map(|expires| expires.saturating_sub(self.clock.since_epoch()));
        let expiry = Box::pin(async move {
            match lifetime {
                Some(lifetime) => sleep(lifetime).await,
                None => std::future::pending().await,
            }
        });
        let changes = self.desired.changes();
        let serving = Serving {
            desired: Arc::clone(&self.desired),
            stop: self.stop.clone(),
            session,
            seat,
            requests,
            changes,
            expiry,
            ended: false,
        };
        let stream = futures_util::stream::unfold(serving, |mut serving| async move {
            let next = serving.next().await?;
            Some((next, serving))
        });
        Ok(Response::new(Box::pin(stream)))
    }
}

struct Serving<D: Desired> {
    desired: Arc<D>,
    stop: DrainGuard,
    session: Session,
    seat: D::Seat,
    requests: Streaming<DeltaRequest>,
    changes: watch::Receiver<u64>,
    expiry: Pin<Box<dyn Future<Output = ()> + Send>>,
    ended: bool,
}

impl<D: Desired> Serving<D> {
    /// The next response; none at the end. Cancel-safe: nothing is taken out of the session before it is returned.
    async fn next(&mut self) -> Option<Result<DeltaResponse, Status>> {
        if self.ended {
            return None;
        }
        loop {
            if !self.session.waits() {
                self.changes.mark_unchanged();
                let view = match self.desired.view(&self.seat, &self.session) {
                    Ok(view) => view,
                    Err(status) => {
                        self.ended = true;
                        return Some(Err(status));
                    }
                };
                let response = self.session.respond(&view);
                self.desired.report(&self.seat, &self.session);
                if let Some(response) = response {
                    return Some(Ok(response));
                }
            }
            let status = tokio::select! {
                request = self.requests.message() => match request {
                    Ok(Some(request)) => match self.session.request(request) {
                        Ok(_heard) => continue,
                        Err(error) => refusal(error),
                    },
                    // The sidecar left.
                    Ok(None) | Err(_) => return None,
                },
                changed = self.changes.changed(), if !self.session.waits() => match changed {
                    Ok(()) => continue,
                    Err(_gone) => Status::unavailable("the control plane stops; connect again"),
                },
                () = self.stop.stopped() => Status::unavailable("the control plane stops; connect again"),
                () = &mut self.expiry => Status::unauthenticated("the certificate expired; connect again with a fresh one"),
            };
            self.ended = true;
            return Some(Err(status));
        }
    }
}

fn refusal(error: crate::delta::server::ProtocolError) -> Status {
    use crate::delta::server::ProtocolError as E;
    let text = error.to_string();
    match error {
        E::AnotherPod { .. } => Status::permission_denied(text),
        E::TooManyScopes => Status::resource_exhausted(text),
        E::NoNode | E::NotFirst | E::BadNode(_) | E::BadScope(_) => Status::invalid_argument(text),
    }
}

/// The pause after the first failure, and the longest one.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How much longer each pause is than the one before: an attempt that is answered and fails costs the control plane a
/// handshake, one that nobody answers costs a packet.
const GROWTH: f64 = 2.0;
const GROWTH_UNANSWERED: f64 = 1.25;

/// The longest that opening a stream may take, up to the answer to its first request's head.
const OPEN_MAX: Duration = Duration::from_secs(10);

/// How often a quiet connection is asked whether it is alive, and how long the answer may take.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_secs(10);
pub(crate) const KEEP_ALIVE_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    /// When attempts are made, in an outage that begins at zero, with the longest pauses that chance can give.
    fn attempts(growth: f64) -> Vec<Duration> {
        let mut pause = Pause::new();
        let pauses = std::iter::repeat_with(|| pause.next(growth, 1.0)).take(60);
        pauses
            .scan(Duration::ZERO, |at, pause| {
                *at += pause;
                Some(*at)
            })
            .collect()
    }

    #[test]
    fn an_outage_of_seconds_is_not_much_longer_for_a_sidecar_that_nobody_answers() {
        for outage in (200..15_000).step_by(100).map(Duration::from_millis) {
            let attempts = attempts(GROWTH_UNANSWERED);
            let back = attempts.iter().find(|at| **at >= outage).unwrap();
            let late = *back - outage;
            assert!(late <= PAUSE_MIN + outage.mul_f64(0.25), "{late:?} late after {outage:?}");
        }
    }

    #[test]
    fn a_control_plane_that_answers_and_fails_is_asked_ever_less_often() {
        assert!(attempts(GROWTH).iter().filter(|at| **at < Duration::from_secs(10)).count() <= 7);
        let mut pause = Pause::new();
        let last = std::iter::repeat_with(|| pause.next(GROWTH_UNANSWERED, 1.0)).take(40).last().unwrap();
        assert_eq!(last, PAUSE_MAX);
        assert_eq!(Pause::new().next(GROWTH, 0.0), PAUSE_MIN / 2);
    }
}
