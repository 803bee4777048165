//! Bytes in, bytes out: the proxy beside one pod.
//!
//! A connection's way: `listener` accepts it and learns where its client wanted to go, `sniff` and `race` tell what it
//! speaks, `connection` and `opaque` are the line at level 4, `http/pipeline` the line at level 7, `pool` has the
//! connections upstream. `config` follows the control plane, `enrolment` hands the listeners to the node agent. `app` asks the
//! application what the kubelet wants to know of it.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

pub(crate) mod app;
mod balance;
mod config;
mod connection;
mod enrolment;
mod forward;
mod hello;
pub(crate) mod http;
mod learned;
mod listener;
mod opaque;
mod pool;
mod probe;
mod race;
mod sniff;
mod stream;
mod tap;
mod tasks;
mod tcp;
mod thread;
mod tls;
mod window;
mod wire;
mod workers;

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
#[cfg(any(test, feature = "fuzzing"))]
mod strict;
#[cfg(test)]
mod tests;
#[cfg(any(test, feature = "fuzzing"))]
mod world;

use self::config::Follower;
pub(crate) use self::enrolment::{app_runs, resume};
use self::http::headroom::Headroom;
use self::listener::{Listeners, Room};
use self::pool::connect::Dial;
pub(crate) use self::pool::connect::TcpDial;
use self::pool::{AnswerLimits, Pool};
use self::probe::Probes;
use self::tasks::Tasks;
use self::thread::Thread;
pub(crate) use self::window::Window;
pub(crate) use self::workers::Workers;
use crate::admin::routes::Inspect;
use crate::base::clock::WallClock;
use crate::base::descriptors;
use crate::base::drain::{Drain, DrainGuard};
use crate::base::memory::release_code;
use crate::base::names::Named;
use crate::base::random::Dice;
use crate::delta::Scope;
use crate::delta::grpc::{ClientConfig, DeltaClient};
use crate::delta::transport::{control_identity, tls_dial};
use crate::identity::source::Identity;
use crate::identity::spiffe::TrustDomain;
use crate::policy::limits::Limits;
use crate::snapshot::Snapshot;
use crate::snapshot::publish::Published;
use crate::telemetry::Telemetry;

/// What every connection uses.
#[derive(Debug)]
pub(crate) struct Proxy {
    identity: Identity,
    published: Published,
    /// Counts what was published, for those who wait for configuration.
    generations: watch::Sender<u64>,
    pool: Arc<Pool>,
    telemetry: Telemetry,
    series: http::series::SeriesCache,
    clock: WallClock,
    dice: Mutex<Dice>,
    /// What runs beside the connections: streams of HTTP/2, tunnels, shadows.
    tasks: Tasks,
    shadows: Arc<Semaphore>,
    /// For what clients of HTTP/2 send and nobody takes.
    uploads: Arc<http::credit::Credit>,
    /// For the heads of their requests.
    headroom: Arc<Headroom>,
    demand: Demand,
    learned: learned::Learned,
    probes: Arc<Probes>,
    /// Configurations of links, made once.
    server_tls: Arc<rustls::ServerConfig>,
    way: Way,
    room: Arc<Room>,
}

/// How the own application's connections come here.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Way {
    /// Capture brings them, and tells where they wanted to go.
    #[default]
    Captured,
    /// It knows its sidecar as its proxy, and asks it.
    Asked,
}

/// How a destination is asked for that is not known yet.
#[derive(Debug, Default)]
enum Demand {
    /// There is no stream: what is known is all there is.
    #[default]
    Nobody,
    Control(DeltaClient),
    /// Tests answer themselves.
    #[cfg(any(test, feature = "fuzzing"))]
    Test(Mutex<Vec<Scope>>),
}

/// What a sidecar is told at its start.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) name: Named,
    pub(crate) trust_domain: TrustDomain,
    /// Addresses of the control plane's stream.
    pub(crate) control: Vec<String>,
    pub(crate) workload_api: PathBuf,
    pub(crate) node: PathBuf,
    /// Listeners of a former sidecar of the pod, in which connections may wait.
    pub(crate) kept: Vec<OwnedFd>,
    /// Where the last good configuration is kept.
    pub(crate) state: PathBuf,
    /// How long connections may go on when the sidecar stops.
    pub(crate) drain: Duration,
    pub(crate) workers: Workers,
    pub(crate) way: Way,
    pub(crate) seed: u64,
}

/// Why a sidecar cannot start. The environment is at fault.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("cannot listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot hand the pod's listeners to the node agent")]
    HandOver(#[source] std::io::Error),
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    #[error("cannot make TLS configurations")]
    Tls(#[from] crate::identity::source::IdentityError),
    #[error("the trust domain cannot name the control plane")]
    Control(#[from] crate::identity::spiffe::SpiffeError),
}

/// A running sidecar.
#[derive(Debug)]
pub(crate) struct Sidecar {
    proxy: Arc<Proxy>,
    window: Arc<Window>,
    owned: JoinSet<()>,
    /// They end after the tasks that run on them.
    _threads: Vec<Thread>,
    workers: Vec<Handle>,
    doors: Doors,
    drain: Drain,
    drain_at_most: Duration,
}

/// Where connections wait until they are taken.
#[derive(Debug)]
struct Doors {
    listeners: Listeners,
    /// A clone of it is held by every connection.
    guard: DrainGuard,
    /// It is known where the own application's connections may go, from an earlier life.
    is_configured: bool,
    /// All of them are open.
    open: bool,
}

impl Proxy {
    /// Puts the parts together.
    fn new(
        identity: Identity,
        published: Published,
        telemetry: Telemetry,
        dial: Arc<dyn Dial>,
        clock: WallClock,
        seed: u64,
        demand: Demand,
    ) -> Result<Self, StartError> {
        let server_tls = identity.server_config(crate::identity::verify::ClientDemand::Certificate, &tls::Alpn::OFFERED)?;
        let answers = http::credit::Credit::new(Limits::default().answer_bytes, telemetry.metrics.answers_granted.clone());
        Ok(Self {
            pool: Arc::new(Pool::new(dial, identity.clone(), answers, Tasks::default(), seed)),
            identity,
            uploads: http::credit::Credit::new(Limits::default().upload_bytes, telemetry.metrics.uploads_held.clone()),
            headroom: Headroom::new(Limits::default().large_head_bytes, telemetry.metrics.heads_held.clone()),
            published,
            generations: watch::Sender::new(0),
            telemetry,
            series: http::series::SeriesCache::default(),
            clock,
            dice: Mutex::new(Dice::from_seed(seed)),
            tasks: Tasks::default(),
            shadows: Arc::new(Semaphore::new(http::pipeline::SHADOWS_MAX)),
            demand,
            learned: learned::Learned::default(),
            probes: Arc::default(),
            server_tls,
            way: Way::default(),
            room: Arc::new(Room::new(descriptors::connections_max())),
        })
    }

    /// From now on this snapshot holds; who waits for configuration looks again.
    fn publish(&self, snapshot: Snapshot) {
        let generation = snapshot.generation;
        self.uploads.limit(snapshot.mesh.limits.upload_bytes);
        let limits = &snapshot.mesh.limits;
        self.headroom.limit(limits.large_head_bytes);
        self.pool.limit(AnswerLimits::of(limits), limits.upstream_connections, limits.answer_bytes);
        self.published.publish(snapshot);
        self.generations.send_replace(generation);
    }

    /// Returns when there is a configuration, or the time is up. Cancel-safe.
    async fn configured(&self, at_most: Duration) {
        let mut generations = self.generations.subscribe();
        // Late or never: the requests that come say that there is none.
        drop(tokio::time::timeout(at_most, generations.wait_for(|generation| *generation > 0)).await);
    }

    /// Draws with the given chance.
    fn draw(&self, chance: f64) -> bool {
        // The usual shares need no dice.
        if chance >= 1.0 {
            return true;
        }
        chance > 0.0 && self.dice.lock().fraction() < chance
    }

    /// Asks the control plane for an address; `false` if nobody can be asked.
    fn ask_for(&self, address: std::net::IpAddr) -> bool {
        match &self.demand {
            Demand::Nobody => false,
            Demand::Control(client) => {
                client.subscribe(Scope::Address(address));
                *client.connected().borrow()
            }
            #[cfg(any(test, feature = "fuzzing"))]
            Demand::Test(asked) => {
                asked.lock().push(Scope::Address(address));
                true
            }
        }
    }
}

/// Makes the pod's listeners and hands them to the node agent, which lets connections wait in them until the sidecar comes.
///
/// # Errors
/// A port is taken, or the agent refuses them.
pub(crate) async fn listen_only(node: &std::path::Path, name: &Named) -> Result<(), StartError> {
    let listeners = Listeners::open(resume(node, name).await)?;
    enrolment::hand_over(node, name, &listeners.duplicate()?).await.map_err(StartError::HandOver)
}

impl Sidecar {
    /// Starts: hand-over, identity and configuration, on a thread of their own. Connections wait until [`Sidecar::open`].
    /// `window` was made of the same `identity` and `telemetry`.
    ///
    /// # Errors
    /// A port is taken, or a thread or TLS cannot be had.
    pub(crate) async fn start(
        settings: Settings,
        identity: Identity,
        telemetry: Telemetry,
        window: &Arc<Window>,
    ) -> Result<Self, StartError> {
        let mut owned = JoinSet::new();
        let listeners = Listeners::open(settings.kept)?;
        let aside = Thread::start("aside").map_err(StartError::Thread)?;
        let probes: Arc<Probes> = Arc::default();
        let enrolment = enrolment::Enrolment {
            path: settings.node,
            name: settings.name.clone(),
            listeners: listeners.duplicate()?,
            ways_out: listeners
                .outbound
                .iter()
                .filter_map(|one| one.local_addr().ok())
                .map(|at| probe::Way::of_listener(at.ip()))
                .collect(),
            probes: Arc::clone(&probes),
            window: Arc::clone(window),
            dice: Dice::from_seed(settings.seed),
        };
        let enrolment = enrolment.keep();
        owned.spawn_on(enrolment, aside.handle());
        let follow = identity.clone();
        owned.spawn_on(async move { follow.follow(settings.workload_api).await }, aside.handle());

        let kept = config::load(&settings.state);
        let is_configured = !kept.resources.by_key.is_empty();
        let (client, updates, driver) = DeltaClient::prepare(ClientConfig {
            control: settings.control,
            node: settings.name.clone(),
            held: kept.versions.clone(),
            dial: tls_dial(identity.clone(), control_identity(&settings.trust_domain)?),
            seed: settings.seed,
        });
        let dial = TcpDial::new(telemetry.metrics.clients_undeclared.clone());
        let mut proxy = Proxy::new(
            identity.clone(),
            window.published.clone(),
            telemetry,
            Arc::new(dial),
            WallClock::system(),
            settings.seed,
            Demand::Control(client.clone()),
        )?;
        proxy.way = settings.way;
        proxy.probes = probes;
        let proxy = Arc::new(proxy);
        let own = crate::snapshot::compile::Own { workload: settings.name, trust_domain: settings.trust_domain };
        let follower = Follower::new(Arc::clone(&proxy), Arc::clone(window), own, kept, settings.state);
        follower.subscribe(&client);
        owned.spawn_on(follower.run(client, updates), aside.handle());
        owned.spawn_on(
            async move {
                // The control plane talks to nobody without an identity.
                identity.arrived().await;
                driver.await;
            },
            aside.handle(),
        );

        // The first worker is the thread that this runs on.
        let mut threads = Vec::new();
        for _further in 1..settings.workers.count() {
            threads.push(Thread::start("worker").map_err(StartError::Thread)?);
        }
        let workers = std::iter::once(Handle::current()).chain(threads.iter().map(|thread| thread.handle().clone())).collect();
        threads.push(aside);
        let (drain, guard) = Drain::new();
        let doors = Doors { listeners, guard, is_configured, open: false };
        let window = Arc::clone(window);
        Ok(Self { proxy, window, owned, _threads: threads, workers, doors, drain, drain_at_most: settings.drain })
    }

    /// Takes connections, as soon as it may; [`Window::ready`] says when traffic may come. Not to be called again; given up
    /// halfway, it leaves a sidecar that can only be stopped.
    ///
    /// Before there is an identity and a configuration, the pod's door stays shut: connections to it wait in its backlog. The application's own
    /// connections are taken as soon as there is a configuration that says where they may go, which one that was kept does.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub(crate) async fn open(&mut self) -> Result<(), StartError> {
        let Self { proxy, owned, workers, doors: Doors { listeners, guard, is_configured, open }, .. } = self;
        if !*is_configured {
            info!("waiting for an identity and a configuration");
            proxy.identity.arrived().await;
            proxy.configured(CONFIGURED_AT_MOST).await;
        }
        for worker in &*workers {
            let _there = worker.enter();
            for listener in &listeners.outbound {
                let listener = listener::share(listener)?;
                owned.spawn_on(listener::serve_outbound(Arc::clone(proxy), listener, guard.clone()), worker);
            }
        }
        // The follower says every few seconds why there is none; without one, nobody may come in. Who dials a pod that has
        // only just begun waits for its configuration as well, instead of being told that there is none.
        proxy.identity.arrived().await;
        proxy.configured(CONFIGURED_AT_MOST).await;
        for worker in &*workers {
            let _there = worker.enter();
            let listener = listener::share(&listeners.inbound)?;
            owned.spawn_on(listener::serve_inbound(Arc::clone(proxy), listener, guard.clone()), worker);
        }
        self.window.open.send_replace(true);
        owned.spawn(sweep(Arc::clone(proxy), Arc::clone(&self.window)));
        *open = true;
        Ok(())
    }

    /// Takes no new connection, lets what is under way end, and gives up what has not ended in time. Connections that wait
    /// at a door wait on where the node agent holds it, for the next sidecar of the pod; elsewhere they are reset.
    pub(crate) async fn stop(mut self) {
        if !self.doors.open {
            let missing = self.window.ready().err().unwrap_or_default().replace('\n', "; ");
            info!(missing, "stopping before every connection was taken");
        }
        info!(at_most_seconds = self.drain_at_most.as_secs(), "draining");
        self.window.open.send_replace(false);
        drop(self.doors);
        if !self.drain.drain(self.drain_at_most).await {
            warn!("connections were left when the time to drain was up");
        }
        if tokio::time::timeout(LAST_WORDS, self.proxy.tasks.ended()).await.is_err() {
            info!(tasks = self.proxy.tasks.running(), "tasks were given up");
        }
        self.owned.shutdown().await;
        info!("stopped");
    }
}

async fn sweep(proxy: Arc<Proxy>, window: Arc<Window>) {
    let mut started = false;
    loop {
        tokio::time::sleep(SWEEP).await;
        proxy.pool.sweep();
        if !started && window.ready().is_ok() {
            started = true;
            if let Err(error) = release_code() {
                debug!(%error, "the start's memory was not given back");
            }
        }
    }
}

/// Is this guard's sidecar stopping? For whoever only asks.
fn stopping(guard: &DrainGuard) -> bool {
    guard.is_stopped()
}

/// How long the pod's door stays shut while the control plane says nothing.
const CONFIGURED_AT_MOST: Duration = Duration::from_secs(5);
/// How often idle upstream connections are looked at.
const SWEEP: Duration = Duration::from_secs(2);
/// For answers' last bytes after the last connection ended.
const LAST_WORDS: Duration = Duration::from_millis(500);
