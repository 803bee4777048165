//! The webhooks: what the API server asks before it takes a pod, or a document of ours.
//!
//! Source: Kubernetes' admission.k8s.io/v1. `review` reads the question and writes the answer, `mutate` gives pods their
//! sidecars, `validate` compiles documents and looks at the marks of pods; they are pure. `serving` is the certificate,
//! signed by the mesh's own authority, and `cluster` makes it known to the API server.
//!
//! Invariant: a question that cannot be answered is refused by name. Whether a refusal keeps a pod out is the API server's to
//! decide (`failurePolicy`), and the node agent keeps a pod closed that came in without its sidecar all the same.

use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use futures_util::StreamExt as _;
use kube::Client;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinSet;
use tracing::{info, warn};

mod bodies;
mod cluster;
mod mutate;
mod review;
mod serving;
#[cfg(test)]
mod tests;
mod validate;

use self::bodies::{Bodies, Room};
use self::cluster::Cluster;
use self::review::{Answer, Request};
use super::ca::Authority;
use super::metrics::Metrics;
use super::store::Store;
use crate::admin;
use crate::base::drain::DrainGuard;
use crate::base::names;
use crate::injection::{Namespace, Settings};

/// What the webhooks are told.
#[derive(Clone, Debug)]
pub(crate) struct WebhookConfig {
    pub(crate) listen: SocketAddr,
    /// What every sidecar gets.
    pub(crate) settings: Settings,
}

#[cfg(test)]
impl WebhookConfig {
    /// For control planes that have no cluster.
    pub(crate) fn example() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 0)), settings: Settings::default() }
    }
}

/// Where the namespace of a pod is looked up: the API server, or a table in tests. The error is for people.
trait Namespaces: Send + Sync {
    fn of<'a>(&'a self, name: &'a str) -> Pin<Box<dyn Future<Output = Result<Namespace, String>> + Send + 'a>>;
}

/// What answers.
struct Webhook {
    settings: Settings,
    namespaces: Arc<dyn Namespaces>,
    store: Arc<Store>,
    bodies: Arc<Bodies>,
    /// Bytes of memory of the questions that are answered at a time.
    answering: Semaphore,
    /// Documents that are compiled at a time: whoever reaches the port may ask.
    compiling: Semaphore,
    metrics: Arc<Metrics>,
}

/// Serves until it is dropped, also while the control plane stops, and keeps the API server told by which authority.
pub(crate) async fn run(
    config: WebhookConfig,
    client: Client,
    ca: Arc<Authority>,
    store: Arc<Store>,
    metrics: Arc<Metrics>,
    mut stop: DrainGuard,
) {
    let cluster = Arc::new(Cluster::new(client));
    let mut tasks = JoinSet::new();
    let serving = match serving::start(&ca, &mut tasks) {
        Ok(serving) => serving,
        Err(error) => return warn!(%error, "the webhooks have no certificate and are not served"),
    };
    let listener = loop {
        match admin::listen(config.listen).and_then(|listener| admin::on_this_runtime(listener, config.listen)) {
            Ok(listener) => break listener,
            Err(error) => warn!(error = %format!("{:#}", anyhow::Error::from(error)), "the webhooks are not served yet"),
        }
        tokio::select! {
            () = stop.stopped() => return,
            () = tokio::time::sleep(LISTEN_AGAIN) => {}
        }
    };
    let mode = cluster.mode(config.settings.mode).await;
    let settings = Settings { mode, ..config.settings };
    info!(listen = %config.listen, mode = mode.as_str(), image = settings.image, "the webhooks are served");
    let namespaces: Arc<dyn Namespaces> = Arc::<Cluster>::clone(&cluster);
    let webhook = Webhook::new(settings, namespaces, store, metrics);
    // Nobody has to wait for this.
    tasks.spawn(admin::serve_tls(listener, serving, routes(webhook), stop.into_news()));
    tasks.spawn(async move { cluster.keep_known(&ca.root_pem()).await });
    std::future::pending().await
}

fn routes(webhook: Webhook) -> Router {
    Router::new().route("/mutate", post(mutate)).route("/validate", post(validate)).with_state(Arc::new(webhook))
}

async fn mutate(State(webhook): State<Arc<Webhook>>, body: Body) -> Response {
    let (request, _turn) = match webhook.read(body).await {
        Ok(read) => read,
        Err(refused) => return webhook.refused("mutate", *refused),
    };
    let name = request.namespace.clone().unwrap_or_default();
    // It becomes a part of a path of the API server, and whoever reaches the port may ask.
    if let Err(fault) = names::check_part(&name) {
        return webhook.told("mutate", &request, Answer::refused("no_namespace", format!("namespace: {fault}")));
    }
    let answer = match webhook.namespaces.of(&name).await {
        Ok(namespace) => mutate::answer(&request, &namespace, &webhook.settings),
        // The API server asks again with the pod's next attempt.
        Err(why) => Answer::refused("no_namespace", format!("the namespace {name} cannot be looked at: {why}")),
    };
    webhook.told("mutate", &request, answer)
}

async fn validate(State(webhook): State<Arc<Webhook>>, body: Body) -> Response {
    let (request, _turn) = match webhook.read(body).await {
        Ok(read) => read,
        Err(refused) => return webhook.refused("validate", *refused),
    };
    let Ok(_compiling) = webhook.compiling.acquire().await else { return StatusCode::SERVICE_UNAVAILABLE.into_response() };
    let asked = Arc::clone(&webhook);
    // Compiling takes its time; other reviews must not wait for it.
    let answered = tokio::task::spawn_blocking(move || {
        let answer = validate::answer(&request, || asked.store.world().resources().clone());
        asked.told("validate", &request, answer)
    });
    answered.await.unwrap_or_else(|error| (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response())
}

/// A question that is not answered.
struct Unread {
    status: StatusCode,
    word: &'static str,
    text: String,
    /// By which a refusal in the form of a review is known to whoever asked, where it could be read.
    uid: Option<String>,
}

impl Unread {
    fn new(status: StatusCode, word: &'static str, text: String) -> Box<Self> {
        Box::new(Self { status, word, text, uid: None })
    }
}

/// Reads a question. One that is too large is taken to its end all the same and thrown away: the API server asks in HTTP/1.1, and
/// reads no answer while it writes.
async fn whole(body: Body, room: &Room) -> Result<Vec<u8>, Box<Unread>> {
    let busy = || {
        let text = "others ask more than is read at a time; ask again".to_owned();
        Unread::new(StatusCode::SERVICE_UNAVAILABLE, "busy", text)
    };
    let (mut kept, mut taken) = (Vec::new(), 0);
    let mut pieces = body.into_data_stream();
    loop {
        // Cancel-safe: what was read is in `kept`, and who gave way reads on no more.
        let piece = tokio::select! {
            piece = pieces.next() => piece,
            () = room.gone() => return Err(busy()),
        };
        let Some(piece) = piece else { break };
        let piece = piece.map_err(|error| Unread::new(StatusCode::BAD_REQUEST, "broken_off", error.to_string()))?;
        taken += piece.len();
        if taken <= REVIEW_BYTES_MAX {
            // What it grows to, and not only what is in it, is memory.
            kept.reserve(piece.len());
            if !room.resize(kept.capacity()) {
                return Err(busy());
            }
            kept.extend_from_slice(&piece);
        } else if kept.len() > HEAD_BYTES_MAX {
            kept.truncate(HEAD_BYTES_MAX);
            kept.shrink_to_fit();
            room.resize(kept.capacity());
        }
        if taken > THROWN_AWAY_BYTES_MAX {
            break;
        }
    }
    if taken > REVIEW_BYTES_MAX {
        let text = format!("an admission review of more than {REVIEW_BYTES_MAX} bytes is not read; write a smaller object");
        let unread = Unread::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", text);
        return Err(Box::new(Unread { uid: review::uid(&kept), ..*unread }));
    }
    if room.keep() { Ok(kept) } else { Err(busy()) }
}

impl Webhook {
    fn new(settings: Settings, namespaces: Arc<dyn Namespaces>, store: Arc<Store>, metrics: Arc<Metrics>) -> Self {
        let (bodies, answering) = (Bodies::new(BODIES_BYTES_MAX), Semaphore::new(ANSWERED_WEIGHT_MAX));
        Self { settings, namespaces, store, bodies, answering, compiling: Semaphore::new(COMPILING_MAX), metrics }
    }

    /// The question, and its turn to be answered, which lasts until that is dropped.
    async fn read(&self, body: Body) -> Result<(Request, SemaphorePermit<'_>), Box<Unread>> {
        let room = self.bodies.begin();
        let read = tokio::time::timeout(READ_WITHIN, whole(body, &room)).await;
        let late = || Unread::new(StatusCode::REQUEST_TIMEOUT, "slow", format!("no whole question came within {READ_WITHIN:?}"));
        let body = read.map_err(|_elapsed| late())??;
        let weight = review::weight(&body);
        if weight > review::WEIGHT_MAX {
            let heavy = review::Fault::Heavy;
            let unread = Unread::new(StatusCode::PAYLOAD_TOO_LARGE, heavy.word(), heavy.to_string());
            return Err(Box::new(Unread { uid: review::uid(&body), ..*unread }));
        }
        let turn = self.answering.acquire_many(u32::try_from(weight).unwrap_or(u32::MAX)).await;
        let turn = turn.map_err(|closed| Unread::new(StatusCode::SERVICE_UNAVAILABLE, "busy", closed.to_string()))?;
        match review::read(&body) {
            Ok(request) => Ok((request, turn)),
            Err(fault) => Err(Unread::new(StatusCode::BAD_REQUEST, fault.word(), fault.to_string())),
        }
    }

    fn refused(&self, webhook: &'static str, Unread { status, word, text, uid }: Unread) -> Response {
        warn!(webhook, reason = word, "a question was refused: {text}");
        self.metrics.admission(webhook, word);
        match uid {
            Some(uid) => axum::Json(Answer::refused(word, text).review(&uid)).into_response(),
            None => (status, text + "\n").into_response(),
        }
    }

    fn told(&self, webhook: &'static str, request: &Request, answer: Answer) -> Response {
        if let Some(text) = answer.refusal() {
            let Request { kind, namespace, name, .. } = request;
            let namespace = namespace.as_deref().unwrap_or_default();
            warn!(webhook, reason = answer.word(), kind = %kind, namespace, name, "refused: {text}");
        }
        self.metrics.admission(webhook, answer.word());
        axum::Json(answer.review(&request.uid)).into_response()
    }
}

/// How people know an object that has no file: `Deployment shop/web`.
fn place(request: &Request) -> &Path {
    Path::new(&request.name)
}

/// An object has 1.5 MiB at most, and a change carries it twice.
const REVIEW_BYTES_MAX: usize = 8 << 20;
/// Of all that are read at a time.
const BODIES_BYTES_MAX: usize = 32 << 20;
/// What all that are answered at a time take in memory.
const ANSWERED_WEIGHT_MAX: usize = 2 * review::WEIGHT_MAX;
/// The API server waits for ten seconds altogether, unless it is told otherwise.
const READ_WITHIN: Duration = Duration::from_secs(10);
/// In what comes first of a larger one stands by what it is known.
const HEAD_BYTES_MAX: usize = 4 << 10;
/// Nobody who has an object to ask about sends more.
const THROWN_AWAY_BYTES_MAX: usize = 64 << 20;
const COMPILING_MAX: usize = 4;
const LISTEN_AGAIN: Duration = Duration::from_secs(1);
