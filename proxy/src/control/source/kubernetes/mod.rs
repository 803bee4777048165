//! A Kubernetes cluster as a source: one watch for each kind, one batch for what they told in a moment.
//!
//! Sources: Kubernetes API concepts, "Efficient detection of changes" (pages, bookmarks, 410 Gone). A watch goes on where it
//! ended; where the server does not remember that, it lists anew, and what the list does not hold is gone. While the API
//! server is away or slow, all that is known stays as it is. Invariant: the first batch holds what every watch listed, so
//! that no sidecar is told that something is gone which was not looked for yet.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::api::{Api, DynamicObject, TypeMeta};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, Config};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tracing::{debug, info, warn};

mod cluster;
mod document;
mod ending;
pub(crate) mod health;
mod object;
mod pod;
mod pods;
mod ranges;
mod returning;
mod slices;
#[cfg(test)]
mod tests;
pub(crate) mod watched;
pub(crate) mod written;

use cluster::{Cluster, News};
use ending::Doubted;
use health::Health;
use object::Object;
use watched::Watched;

use super::Batch;
use crate::base::drain::DrainGuard;
use crate::base::random::Dice;
use crate::control::cluster::last_good;
use crate::control::placed::Placed;

/// Why the API server cannot be asked. The environment is at fault.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error("neither the pod that this runs in nor KUBECONFIG says where the API server is")]
    Nowhere(#[source] kube::config::InferConfigError),
    #[error("the API server cannot be asked")]
    Client(#[source] kube::Error),
}

/// A client of the API server: of the cluster that the process runs in, or of the one that KUBECONFIG names.
///
/// # Errors
/// Nothing says where it is, or what says so cannot be read.
pub(crate) async fn client() -> Result<Client, ClientError> {
    let mut config = Config::infer().await.map_err(ClientError::Nowhere)?;
    config.connect_timeout = Some(CONNECT_MAX);
    config.read_timeout = Some(SILENCE_MAX);
    config.write_timeout = Some(SILENCE_MAX);
    Client::try_from(config).map_err(ClientError::Client)
}

/// Watches until `stop` says so or nobody listens any more. The first batch holds everything.
pub(crate) async fn watch(
    client: Client,
    health: Arc<Health>,
    placed: Arc<Placed>,
    batches: mpsc::Sender<Batch>,
    mut stop: DrainGuard,
) {
    let (news, mut arrived) = mpsc::channel(NEWS);
    let mut watches = JoinSet::new();
    for (number, watched) in (0_u64..).zip(Watched::all()) {
        // Replicas that were started together must not come back in step, either.
        let dice = Dice::from_seed(u64::from(std::process::id()) << 32 | number);
        watches.spawn(follow(client.clone(), watched, Arc::clone(&health), news.clone(), dice));
    }
    drop(news);
    let mut cluster = Cluster::default();
    tokio::select! {
        () = stop.stopped() => return,
        () = remember(&client, &mut cluster) => {}
    }
    let mut is_first = true;
    let begun = Instant::now();
    let mut complain = begun + COMPLAIN;
    let mut placing = placed.news();
    let mut forget = begun + FORGET;
    let mut ask_others = begun + ASK_OTHERS;
    let mut look = begun;
    loop {
        let first = tokio::select! {
            () = stop.stopped() => return,
            news = arrived.recv() => news,
            Ok(()) = placing.changed() => {
                placing.mark_unchanged();
                cluster.place(&placed);
                None
            }
            () = tokio::time::sleep_until(forget) => {
                placed.keep(|uid| cluster.is_nowhere(uid));
                forget = Instant::now() + FORGET;
                continue;
            }
            () = tokio::time::sleep_until(look), if cluster.is_returning() => {
                cluster.look_at_returning(&placed);
                look = Instant::now() + TIME_TO_ASK;
                None
            }
            // Another replica may have seen the form that was good, before this one began and after it asked.
            () = tokio::time::sleep_until(ask_others), if cluster.is_without() => {
                if let Ok(known) = last_good::read(&client).await {
                    cluster.remember(known);
                }
                ask_others = Instant::now() + ASK_OTHERS;
                None
            }
            () = tokio::time::sleep_until(complain), if is_first => {
                let awaited: Vec<&str> = cluster.awaited().map(Watched::kind).collect();
                warn!(awaited = awaited.join(", "), "nothing is served before the API server has listed every kind");
                complain = Instant::now() + COMPLAIN;
                continue;
            }
        };
        if let Some((watched, news)) = first {
            cluster.take(watched, news, &placed);
        } else if arrived.is_closed() {
            return;
        }
        // What is told within a moment belongs together more often than not.
        let deadline = Instant::now() + MOMENT;
        for _ in 0..BATCH {
            let Ok(Some((watched, news))) = tokio::time::timeout_at(deadline, arrived.recv()).await else { break };
            cluster.take(watched, news, &placed);
        }
        if is_first && cluster.awaited().next().is_some() {
            continue;
        }
        let Some(batch) = cluster.batch().or_else(|| is_first.then(Batch::default)) else { continue };
        if is_first {
            info!(after_ms = begun.elapsed().as_millis(), changes = batch.changes.len(), "every kind was listed");
            is_first = false;
        }
        debug!(changes = batch.changes.len(), problems = batch.problems.len(), "the cluster changed");
        if batches.send(batch).await.is_err() {
            return;
        }
    }
}

/// Learns what stood in the place of refused documents. Nobody is served before that: it would go out of force for a while.
async fn remember(client: &Client, cluster: &mut Cluster) {
    let mut pause = PAUSE_MIN;
    loop {
        match last_good::read(client).await {
            Ok(known) => return cluster.remember(known),
            Err(error) => warn!(error, "last good forms cannot be read; it is tried again"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Follows one kind for as long as anybody wants its news.
async fn follow(client: Client, watched: Watched, health: Arc<Health>, news: mpsc::Sender<(Watched, News)>, mut dice: Dice) {
    let versions = watched.api_versions();
    let mut turn = versions.iter().cycle();
    let Some(mut version) = turn.next().copied() else { return };
    let events = |version| {
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &watched.resource(version));
        Box::pin(watcher(api, watched.config()))
    };
    let mut stream = events(version);
    let mut unknown = 0;
    let mut pause = PAUSE_MIN;
    let mut failed = Instant::now();
    let mut doubted = Doubted::new();
    loop {
        // Cancel-safe: what the stream has not told yet it tells the next time.
        let event = tokio::select! {
            biased;
            () = tokio::time::sleep_until(doubted.ask()), if doubted.is_any() => {
                match doubted.settle(watched, &client, &mut dice).await {
                    Ok(settled) => {
                        for told in settled {
                            if news.send(told).await.is_err() {
                                return;
                            }
                        }
                    }
                    Err(error) => {
                        let error = told(&error);
                        if health.silent(watched, format!("whether a namespace is being deleted is not known: {error}")) {
                            warn!(
                                kind = watched.kind(),
                                error,
                                "whether a namespace is being deleted is not known; policies that were deleted stay in force"
                            );
                        }
                    }
                }
                continue;
            }
            event = timeout(SETTLED, stream.next()) => event,
        };
        let event = match event {
            Ok(Some(event)) => event,
            Ok(None) => return,
            // A watch that stands and has nothing to tell.
            Err(_nothing_happened) => {
                if !doubted.is_any() && health.heard(watched) {
                    info!(kind = watched.kind(), "the API server is back");
                }
                continue;
            }
        };
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                let is_absent = is_absent(&error);
                if is_absent && versions.len() > 1 {
                    // Another version of it may be served.
                    unknown += 1;
                    version = turn.next().copied().unwrap_or(version);
                    stream = events(version);
                    if unknown % versions.len() != 0 {
                        continue;
                    }
                }
                if is_absent {
                    if health.absent(watched) {
                        warn!(
                            kind = watched.kind(),
                            versions = versions.join(", "),
                            "the API server does not know the kind; none of it is in force"
                        );
                    }
                    if news.send((watched, News::Absent)).await.is_err() {
                        return;
                    }
                } else if health.silent(watched, told(&error)) {
                    warn!(
                        kind = watched.kind(),
                        error = told(&error),
                        "the API server gives no news; what is known stays in force"
                    );
                }
                if failed.elapsed() > FORGIVEN {
                    pause = PAUSE_MIN;
                }
                failed = Instant::now();
                let most = if is_absent { ABSENT_PAUSE } else { pause };
                tokio::time::sleep(most.mul_f64(0.5 + dice.fraction() / 2.0)).await;
                pause = (pause * 2).min(PAUSE_MAX);
                continue;
            }
        };
        // A list begins before the server was asked for it.
        if !matches!(event, Event::Init) && !doubted.is_any() && health.heard(watched) {
            info!(kind = watched.kind(), "the API server is back");
        }
        let told = match event {
            Event::Init => {
                doubted.list_begins();
                Some(News::Begins)
            }
            Event::InitApply(object) | Event::Apply(object) => Object::read(typed(object, watched, version)).map(News::Is),
            Event::Delete(object) => match Object::read(typed(object, watched, version)) {
                Some(gone) if watched.is_security() => {
                    doubted.put(gone);
                    None
                }
                gone => gone.map(News::Gone),
            },
            // What is not in the list any more goes now.
            Event::InitDone if health.listed(watched) && watched.is_security() => {
                doubted.list_ends();
                None
            }
            Event::InitDone => Some(News::Ends),
        };
        if let Some(told) = told
            && news.send((watched, told)).await.is_err()
        {
            return;
        }
    }
}

/// The elements of a list may leave out what they are.
fn typed(mut object: DynamicObject, watched: Watched, version: &str) -> DynamicObject {
    object.types.get_or_insert_with(|| TypeMeta { api_version: version.to_owned(), kind: watched.kind().to_owned() });
    object
}

/// Is there no such kind? A definition that was not installed, or a server that is too old.
fn is_absent(error: &watcher::Error) -> bool {
    let (watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error)) = error else { return false };
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// An error with its causes, in one line.
pub(crate) fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(known) = cause {
        let more = known.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = known.source();
    }
    text.chars().take(ERROR_MAX).collect()
}

/// News that wait to be taken. Objects are large; the watches wait.
const NEWS: usize = 64;

/// News of one batch at most: what arrives without an end must not keep from what has arrived.
const BATCH: usize = 10_000;

/// How long news wait for others.
const MOMENT: Duration = Duration::from_millis(10);

/// How often the words of nodes are looked through.
const FORGET: Duration = Duration::from_secs(60);

/// The time that a kubelet has to ask how a pod is. One that starts waits for up to a period of the probe, which is 10 s where nobody
/// says otherwise.
const TIME_TO_ASK: Duration = Duration::from_secs(10);

/// How often other replicas are asked what stood in the place of a document that is refused.
const ASK_OTHERS: Duration = Duration::from_secs(10);

/// How often people are told what is waited for before the first batch.
const COMPLAIN: Duration = Duration::from_secs(10);

/// How long it may take to reach the API server.
const CONNECT_MAX: Duration = Duration::from_secs(5);

/// How long the API server may say nothing on a connection: longer than a watch lasts on which nothing happens.
const SILENCE_MAX: Duration = Duration::from_secs(125);

/// After so long without an error, a watch stands.
const SETTLED: Duration = Duration::from_secs(8);

/// Between two attempts, a half of it by chance.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(15);

/// After so long without an error the pauses are short again.
const FORGIVEN: Duration = Duration::from_secs(120);

/// How often a kind is asked for that the API server does not know.
const ABSENT_PAUSE: Duration = Duration::from_secs(10);

const ERROR_MAX: usize = 500;
