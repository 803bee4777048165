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
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use kube::Client;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::{info, warn};

mod cluster;
mod mutate;
mod review;
mod serving;
#[cfg(test)]
mod tests;
mod validate;

use self::cluster::Cluster;
use self::review::{Answer, Request};
use super::ca::Authority;
use super::metrics::Metrics;
use super::store::Store;
use crate::admin;
use crate::base::drain::DrainGuard;
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
    /// Documents that are compiled at a time: whoever reaches the port may ask.
    compiling: Semaphore,
    metrics: Arc<Metrics>,
}

/// Serves until `stop` says so, and keeps the API server told by which authority.
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
    let webhook = Webhook { settings, namespaces, store, compiling: Semaphore::new(COMPILING_MAX), metrics };
    tasks.spawn(admin::serve_tls(listener, serving, routes(webhook)));
    tasks.spawn(async move { cluster.keep_known(&ca.root_pem()).await });
    stop.stopped().await;
    tasks.shutdown().await;
}

fn routes(webhook: Webhook) -> Router {
    Router::new()
        .route("/mutate", post(mutate))
        .route("/validate", post(validate))
        .layer(DefaultBodyLimit::max(REVIEW_BYTES_MAX))
        .with_state(Arc::new(webhook))
}

async fn mutate(State(webhook): State<Arc<Webhook>>, body: Result<Bytes, BytesRejection>) -> Response {
    let request = match read(body) {
        Ok(request) => request,
        Err(refused) => return webhook.refused("mutate", *refused),
    };
    let name = request.namespace.clone().unwrap_or_default();
    let answer = match webhook.namespaces.of(&name).await {
        Ok(namespace) => mutate::answer(&request, &namespace, &webhook.settings),
        // The API server asks again with the pod's next attempt.
        Err(why) => Answer::refused("no_namespace", format!("the namespace {name} cannot be looked at: {why}")),
    };
    webhook.told("mutate", &request, answer)
}

async fn validate(State(webhook): State<Arc<Webhook>>, body: Result<Bytes, BytesRejection>) -> Response {
    let request = match read(body) {
        Ok(request) => request,
        Err(refused) => return webhook.refused("validate", *refused),
    };
    let Ok(_turn) = webhook.compiling.acquire().await else { return StatusCode::SERVICE_UNAVAILABLE.into_response() };
    let asked = Arc::clone(&webhook);
    // Compiling takes its time; other reviews must not wait for it.
    let answered = tokio::task::spawn_blocking(move || {
        let answer = validate::answer(&request, || asked.store.world().resources().clone());
        asked.told("validate", &request, answer)
    });
    answered.await.unwrap_or_else(|error| (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response())
}

/// What cannot be answered in the form of a review.
struct Unread {
    status: StatusCode,
    word: &'static str,
    text: String,
}

fn read(body: Result<Bytes, BytesRejection>) -> Result<Request, Box<Unread>> {
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            let text = format!("an admission review of more than {REVIEW_BYTES_MAX} bytes is not read");
            Box::new(Unread { status: StatusCode::PAYLOAD_TOO_LARGE, word: "too_large", text })
        }
        status => Box::new(Unread { status, word: "broken_off", text: rejection.body_text() }),
    })?;
    review::read(&body)
        .map_err(|fault| Box::new(Unread { status: StatusCode::BAD_REQUEST, word: fault.word(), text: fault.to_string() }))
}

impl Webhook {
    fn refused(&self, webhook: &'static str, Unread { status, word, text }: Unread) -> Response {
        warn!(webhook, reason = word, "a question was refused: {text}");
        self.metrics.admission(webhook, word);
        (status, text + "\n").into_response()
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
const COMPILING_MAX: usize = 4;
const LISTEN_AGAIN: Duration = Duration::from_secs(1);
