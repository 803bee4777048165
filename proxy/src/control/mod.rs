//! The control plane: resources in, answers out.
//!
//! `source` reads folders or a cluster, `store` keeps the world, `select` finds what a sidecar may see, `sessions` tell each sidecar and
//! remember what it acknowledged; `authority` signs for the node agents, `api` answers people, `cluster` is what is kept in a
//! Kubernetes cluster, `webhook` what its API server asks. Nothing is served before the source was read once: a sidecar that comes back must not be told that its configuration is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tracing::{error, info, warn};

use crate::admin;
use crate::base::clock::WallClock;
use crate::base::drain::{Drain, DrainGuard};
use crate::delta::authority::authority_server::AuthorityServer;
use crate::delta::grpc::{KEEP_ALIVE, KEEP_ALIVE_MAX, service};
use crate::delta::transport::{ALPN, ALPN_AUTHORITY, Terms, Voucher, accept, control_identity};
use crate::identity::source::{Identity, IdentityError};
use crate::identity::spiffe::{SpiffeError, TrustDomain};
use crate::identity::verify::ClientDemand;
use crate::model::Resource;
use crate::model::object::{MESH_NAMESPACE, Object};
use crate::model::service::ServiceSpec;

pub(crate) mod api;
pub(crate) mod authority;
pub(crate) mod ca;
pub(crate) mod cluster;
mod contest;
pub(crate) mod coverage;
pub(crate) mod dashboard;
pub(crate) mod holders;
pub(crate) mod join;
pub(crate) mod metrics;
mod names;
pub(crate) mod placed;
mod references;
pub(crate) mod select;
pub(crate) mod sessions;
pub(crate) mod source;
pub(crate) mod store;
#[cfg(test)]
mod tests;
pub(crate) mod token;
pub(crate) mod webhook;
pub(crate) mod world;
mod written;

use api::Api;
use authority::{Nodes, Signer};
use ca::{Authority, CaError};
use cluster::Keeper;
use cluster::writer::Statuses;
use dashboard::Dashboard;
use dashboard::graph::Target;
use join::Join;
use join::kubernetes::Reviewer;
use metrics::Metrics;
use placed::Placed;
use sessions::Sessions;
use source::Batch;
use source::kubernetes::ClientError;
use source::kubernetes::health::Health;
use store::{Store, Wrong};
use token::Token;
use webhook::WebhookConfig;
use world::{Change, Origin, World};

/// What a control plane is told.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) source: SourceConfig,
    pub(crate) state: PathBuf,
    pub(crate) trust_domain: TrustDomain,
    /// Where the stream and the authority are served.
    pub(crate) listen: Vec<SocketAddr>,
    /// Where the API and the dashboard are served; a loopback address.
    pub(crate) api: SocketAddr,
    /// Where the own metrics are served.
    pub(crate) metrics: SocketAddr,
    /// How long a workload's certificate is good.
    pub(crate) svid_lifetime: Duration,
    /// The Workload API that workloads have their identities from, and this process the one that it shows to their sidecars.
    /// None: all of them are the own authority's.
    pub(crate) workload_api: Option<PathBuf>,
    /// What the API server of a cluster asks.
    pub(crate) webhook: WebhookConfig,
}

/// Where documents come from.
#[derive(Clone, Debug)]
pub(crate) enum SourceConfig {
    /// Folders of documents that are watched.
    Folders(Vec<PathBuf>),
    /// The API server of a Kubernetes cluster.
    Kubernetes,
}

/// Why a control plane cannot start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    /// The environment is at fault.
    #[error("cannot keep state in {}", path.display())]
    State {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The environment is at fault: the address is taken or not this machine's.
    #[error("cannot listen at {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    /// The user is at fault.
    #[error("the API listens on loopback addresses only, not at {0}: whoever reaches it rules the mesh")]
    ApiNotLocal(SocketAddr),
    #[error(transparent)]
    Cluster(#[from] ClientError),
    #[error(transparent)]
    Authority(#[from] CaError),
    #[error("cannot take the own identity")]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    TrustDomain(#[from] SpiffeError),
    /// We are at fault.
    #[error("cannot make the metrics")]
    Metrics(#[from] prometheus::Error),
    #[error(transparent)]
    Door(#[from] admin::AdminError),
}

/// A control plane that has everything it needs, and serves nothing yet.
pub(crate) struct Control {
    config: Config,
    cluster: Option<Cluster>,
    store: Arc<Store>,
    sessions: Arc<Sessions>,
    ca: Arc<Authority>,
    token: Token,
    api_token: Token,
    identity: Identity,
    /// As sidecars see it, where another Workload API vouches for both.
    foreign: Option<Identity>,
    terms: Terms,
    metrics: Arc<Metrics>,
    clock: WallClock,
    streams: Vec<TcpListener>,
    api: TcpListener,
    scrape: TcpListener,
}

/// The cluster in which a control plane works.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) client: kube::Client,
    /// How its source stands.
    pub(crate) health: Arc<Health>,
}

impl Control {
    /// Takes the state folder, the authority and the listeners, in this order; nothing is left behind if one fails.
    ///
    /// # Errors
    /// The environment lacks one of them.
    pub(crate) async fn build(config: Config, clock: WallClock) -> Result<Self, ControlError> {
        if !config.api.ip().is_loopback() {
            return Err(ControlError::ApiNotLocal(config.api));
        }
        // The state folder is for its owner alone: keys and tokens lie in it.
        for folder in [config.state.clone(), config.state.join(STORED), config.state.join(PODS)] {
            make_folder(&folder)?;
        }
        let state_failed = |path: PathBuf| move |source| ControlError::State { path, source };
        let cluster = match &config.source {
            SourceConfig::Folders(_) => None,
            SourceConfig::Kubernetes => {
                let client = source::kubernetes::client().await?;
                Some(Cluster { client, health: Arc::new(Health::new(clock.clone())) })
            }
        };
        let trust_domain = config.trust_domain.clone();
        let ca = Arc::new(match &cluster {
            None => Authority::open(&config.state.join("ca"), trust_domain, clock.clone())?,
            Some(Cluster { client, .. }) => cluster::root::open(client, trust_domain, clock.clone()).await?,
        });
        let token_path = config.state.join("join-token");
        let token = Token::open(&token_path).map_err(state_failed(token_path))?;

        let identity = Identity::new(config.trust_domain.clone(), clock.clone());
        take_identity(&ca, &identity, OWN_LIFETIME)?;
        let mut terms =
            Terms { authority: identity.server_config(ClientDemand::CertificateIfAny, &[ALPN_AUTHORITY, ALPN])?, sidecars: None };
        let mut foreign = None;
        if config.workload_api.is_some() {
            let own = control_identity(&config.trust_domain)?;
            let seen = Identity::new(config.trust_domain.clone(), clock.clone()).only(own).apart_from(ca.root());
            terms.sidecars = Some(seen.server_config(ClientDemand::Certificate, &[ALPN])?);
            foreign = Some(seen);
        }
        let voucher = if foreign.is_some() { Voucher::WorkloadApi } else { Voucher::Authority };

        let metrics = Arc::new(Metrics::new()?);
        metrics.root_expiry.set(i64::try_from(ca.root_expires().as_secs()).unwrap_or(i64::MAX));
        let store = match cluster {
            None => Store::new(&config.state),
            Some(_) => Store::of_cluster(&config.state),
        };
        let store = Arc::new(store.of_trust_domain(config.trust_domain.clone()));
        let sessions = Arc::new(Sessions::new(
            Arc::clone(&store),
            config.trust_domain.clone(),
            voucher,
            clock.clone(),
            Arc::clone(&metrics),
        ));

        let streams = config.listen.iter().map(|address| listen(*address)).collect::<Result<_, _>>()?;
        let api = tokio_listener(admin::listen(config.api)?, config.api)?;
        let scrape = tokio_listener(admin::listen(config.metrics)?, config.metrics)?;
        // Only now that the API's port is held: what listened there while no mesh was up may have been shown the token of an
        // earlier life by a command, which is worth nothing any more.
        let token_path = config.state.join(API_TOKEN);
        let api_token = Token::issue(&token_path).map_err(state_failed(token_path))?;
        Ok(Self {
            config,
            cluster,
            store,
            sessions,
            ca,
            token,
            api_token,
            identity,
            foreign,
            terms,
            metrics,
            clock,
            streams,
            api,
            scrape,
        })
    }

    /// Serves until `stopped` says so, then lets sidecars know and ends.
    pub(crate) async fn serve(self, mut stopped: DrainGuard) {
        let (drain, stop) = Drain::new();
        let mut tasks = JoinSet::new();

        let Self {
            config,
            cluster,
            store,
            sessions,
            ca,
            token,
            api_token,
            identity,
            foreign,
            terms,
            metrics,
            clock,
            streams,
            api,
            scrape,
        } = self;
        tasks.spawn(renew(Arc::clone(&ca), identity));
        if let (Some(foreign), Some(socket)) = (foreign.clone(), config.workload_api.clone()) {
            tasks.spawn(async move { foreign.follow(socket).await });
        }
        let (batches, mut arrived) = mpsc::channel(BATCHES);
        let statuses = Arc::new(Statuses::default());
        let placed: Arc<Placed> = Arc::default();
        match (&config.source, &cluster) {
            (SourceConfig::Folders(folders), _) => {
                let watched = source::file::Watched {
                    folders: folders.clone(),
                    applied: config.state.join(STORED),
                    pods: config.state.join(PODS),
                    kept: config.state.join(KEPT),
                };
                tasks.spawn(source::file::watch(watched, batches, stop.clone()));
            }
            (SourceConfig::Kubernetes, Some(Cluster { client, health })) => {
                tasks.spawn(source::kubernetes::watch(
                    client.clone(),
                    Arc::clone(health),
                    Arc::clone(&placed),
                    batches,
                    stop.clone(),
                ));
            }
            (SourceConfig::Kubernetes, None) => {}
        }
        tokio::select! {
            first = arrived.recv() => {
                take(&store, &statuses, first.unwrap_or_default()).await;
                store.forget_gone();
            }
            () = stopped.stopped() => {}
        }
        tasks.spawn(follow(Arc::clone(&store), Arc::clone(&statuses), arrived));
        tasks.spawn(report(Arc::clone(&store)));
        let (targets, aimed) = watch::channel(Vec::new());
        tasks.spawn(aim(Arc::clone(&store), targets));
        let dashboard = Dashboard::start(aimed, clock.clone());

        let accepted = accept(streams, &terms, &stop, &mut tasks);
        let nodes = Arc::new(Nodes::default());
        let join = match &cluster {
            None => Join::Token(token),
            Some(Cluster { client, .. }) => Join::Kubernetes(Box::new(Reviewer::new(client.clone(), MESH_NAMESPACE))),
        };
        let signer = Signer {
            ca: Arc::clone(&ca),
            store: Arc::clone(&store),
            join,
            placed,
            svid_lifetime: foreign.is_none().then_some(config.svid_lifetime),
            metrics: Arc::clone(&metrics),
            nodes: Arc::clone(&nodes),
            clock: clock.clone(),
            stop: stop.clone(),
        };
        let server = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(KEEP_ALIVE))
            .http2_keepalive_timeout(Some(KEEP_ALIVE_MAX))
            .max_concurrent_streams(STREAMS_PER_CONNECTION)
            .add_service(service(Arc::clone(&sessions), clock.clone(), stop.clone()))
            .add_service(AuthorityServer::new(signer));
        let mut server_stop = stop.clone();
        tasks.spawn(async move {
            let served = server
                .serve_with_incoming_shutdown(ReceiverStream::new(accepted), async move { server_stop.stopped().await })
                .await;
            if let Err(error) = served {
                error!(%error, "serving streams failed");
            }
        });

        if let Some(Cluster { client, .. }) = &cluster {
            let keeper = Keeper {
                client: client.clone(),
                authority: Arc::clone(&ca),
                statuses,
                store: Arc::clone(&store),
                metrics: Arc::clone(&metrics),
                clock: clock.clone(),
            };
            keeper.start(&stop, &mut tasks);
            let (ca, store, metrics) = (Arc::clone(&ca), Arc::clone(&store), Arc::clone(&metrics));
            tasks.spawn(webhook::run(config.webhook.clone(), client.clone(), ca, store, metrics, stop.clone()));
        }
        let health = cluster.as_ref().map(|cluster| Arc::clone(&cluster.health));
        let api_state =
            Api::new(&config, Arc::clone(&store), Arc::clone(&sessions), nodes, ca, foreign.clone(), clock, health.clone());
        let pages = api::routes(api_state).merge(dashboard::router(dashboard));
        tasks.spawn(admin::serve(api, api::guarded(pages, api_token)));
        tasks.spawn(admin::serve(scrape, metrics::routes(metrics, Arc::clone(&store), sessions, foreign, health)));
        info!(api = %config.api, listen = ?config.listen, trust_domain = %config.trust_domain, "the control plane is ready");

        stopped.stopped().await;
        drop(stop);
        info!("the control plane stops");
        let lingers_until = tokio::time::Instant::now() + LINGER;
        // Streams end by themselves; whoever holds on longer than the deadline is cut off.
        if !drain.drain(STOP_MAX).await {
            warn!("some streams did not end in time");
        }
        if cluster.is_some() {
            // The API server is led here until the cluster's proxies have heard that this replica ends.
            tokio::time::sleep_until(lingers_until).await;
        }
        tasks.shutdown().await;
    }
}

fn make_folder(path: &Path) -> Result<(), ControlError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| ControlError::State { path: path.to_owned(), source })
}

/// Listens at an address that need not be this machine's yet: the pods' bridge may be made later.
fn listen(address: SocketAddr) -> Result<TcpListener, ControlError> {
    let open = || -> io::Result<TcpListener> {
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        match address {
            SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
            SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
        }
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    };
    open().map_err(|source| ControlError::Listen { address, source })
}

fn tokio_listener(listener: std::net::TcpListener, address: SocketAddr) -> Result<TcpListener, ControlError> {
    TcpListener::from_std(listener).map_err(|source| ControlError::Listen { address, source })
}

fn take_identity(ca: &Authority, identity: &Identity, lifetime: Duration) -> Result<(), ControlError> {
    let (signed, key) = ca.issue(&control_identity(ca.trust_domain())?, lifetime)?;
    let bundles = ca.bundles().map_err(IdentityError::Bundle)?;
    identity.publish(signed.chain, key, bundles)?;
    Ok(())
}

/// Renews the own certificate at half of its life, for as long as the process lives.
async fn renew(ca: Arc<Authority>, identity: Identity) {
    let mut pause = OWN_LIFETIME / 2;
    loop {
        tokio::time::sleep(pause).await;
        pause = match take_identity(&ca, &identity, OWN_LIFETIME) {
            Ok(()) => OWN_LIFETIME / 2,
            Err(error) => {
                error!(%error, "the own certificate cannot be renewed");
                RENEW_AGAIN
            }
        };
    }
}

/// Takes what the source says from the first batch on. What `apply` stored is taken from the API alone, in its order: the
/// folder would tell of it later, and of an older form after a newer one.
async fn follow(store: Arc<Store>, statuses: Arc<Statuses>, mut arrived: mpsc::Receiver<Batch>) {
    while let Some(mut batch) = arrived.recv().await {
        batch.changes.retain(|change| {
            let (Change::Put { origin, .. } | Change::Remove { origin, .. }) = change;
            !matches!(origin, Origin::Applied(_))
        });
        take(&store, &statuses, batch).await;
    }
}

async fn take(store: &Arc<Store>, statuses: &Statuses, batch: Batch) {
    let store = Arc::clone(store);
    let Batch { changes, problems, objects, standing } = batch;
    // The state folder's locks and writes block.
    let taken = tokio::task::spawn_blocking(move || {
        store.tell(problems);
        store.apply(changes);
    });
    if let Err(error) = taken.await {
        error!(%error, "a batch of changes was lost");
    }
    statuses.take(objects, standing);
}

/// Tells the log what is wrong with the resources, each problem once.
async fn report(store: Arc<Store>) {
    let mut told = BTreeSet::new();
    let mut changes = store.news();
    loop {
        changes.mark_unchanged();
        // Compiling everything takes its time; streams must not wait for it.
        let asked = Arc::clone(&store);
        let Ok(problems) = tokio::task::spawn_blocking(move || asked.problems()).await else { return };
        let problems: BTreeSet<Wrong> = problems.iter().cloned().collect();
        for wrong in problems.difference(&told) {
            let problem = &wrong.problem;
            warn!(place = wrong.place, resource = problem.resource, at = %problem.at, remedy = problem.remedy, "{}", problem.text);
        }
        told = problems;
        if changes.changed().await.is_err() {
            return;
        }
        // Documents come in bursts; what is wrong with half of a burst is of no interest.
        tokio::time::sleep(SETTLE).await;
    }
}

/// Tells the dashboard which sidecars there are to read.
async fn aim(store: Arc<Store>, targets: watch::Sender<Vec<Target>>) {
    let mut changes = store.changes();
    loop {
        changes.mark_unchanged();
        let found = sidecars(&store.world());
        targets.send_if_modified(|targets| {
            let new = *targets != found;
            *targets = found;
            new
        });
        if changes.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(SETTLE).await;
    }
}

fn sidecars(world: &World) -> Vec<Target> {
    let resources = &world.resources().by_key;
    // By the first label that they select, so that a workload looks at the services that may select it.
    let mut selecting: BTreeMap<(&str, &str, &str), Vec<&Object<ServiceSpec>>> = BTreeMap::new();
    for resource in resources.values() {
        if let Resource::Service(service) = resource.as_ref()
            && let Some((label, value)) = service.spec.selector.first_key_value()
        {
            selecting.entry((&service.metadata.namespace, label, value)).or_default().push(service);
        }
    }
    let targets = resources.iter().filter_map(|(key, resource)| {
        let Resource::Workload(workload) = resource.as_ref() else { return None };
        let meshed = workload.spec.transport.has_sidecar();
        let labels = &workload.metadata.labels;
        let services = labels
            .iter()
            .filter_map(|(label, value)| selecting.get(&(workload.metadata.namespace.as_str(), label, value)))
            .flatten()
            .filter(|service| service.spec.selects(labels));
        Some(Target {
            workload: key.name.clone(),
            address: *workload.spec.addresses.first().filter(|_| meshed)?,
            services: services.map(|service| service.named()).collect(),
        })
    });
    targets.collect()
}

/// The folder of documents that `apply` stored.
pub(crate) const STORED: &str = "resources";

/// The file of the API's token, in the state folder.
pub(crate) const API_TOKEN: &str = "api-token";

/// The folder of local pods' records.
const PODS: &str = "pods";

/// The folder of the last good forms of what people keep in watched folders.
const KEPT: &str = "last-good";

/// Batches of the folders that wait to be taken.
const BATCHES: usize = 4;

const BACKLOG: i32 = 1024;

/// A sidecar opens one stream, a node agent a few.
const STREAMS_PER_CONNECTION: u32 = 64;

/// How long the own certificate is good.
const OWN_LIFETIME: Duration = Duration::from_secs(24 * 3600);
const RENEW_AGAIN: Duration = Duration::from_secs(60);

/// How long streams may take to end.
const STOP_MAX: Duration = Duration::from_secs(2);
/// How long the webhooks are served after the stop: kube-proxy writes what it hears each second, or each few where it has much.
const LINGER: Duration = Duration::from_secs(4);

const SETTLE: Duration = Duration::from_millis(200);
