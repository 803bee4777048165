//! The node agent: pods of this machine, their enrolment, their identity, the kernel programs.
//!
//! It reconciles what the pods' records say with what the kernel holds, again and again, and each step may be repeated:
//! an agent that was killed finds its programs pinned and the pods enrolled, and sidecars hand their listeners over
//! again. Traffic never passes through this process.

mod addresses;
mod admission;
mod attest;
pub(crate) mod authority;
pub(crate) mod callers;
pub(crate) mod capture;
mod conflicts;
mod device;
pub(crate) mod enrolment;
pub(crate) mod flows;
pub(crate) mod identities;
mod keeper;
pub(crate) mod kernel;
pub(crate) mod kubernetes;
pub(crate) mod ladder;
mod maps;
pub(crate) mod metrics;
pub(crate) mod netns;
pub(crate) mod nftables;
pub(crate) mod peer;
pub(crate) mod pods;
pub(crate) mod proof;
mod refusal;
pub(crate) mod report;
mod rtnetlink;
pub(crate) mod undescribed;
pub(crate) mod workload_api;
pub(crate) mod workload_proto;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Permissions;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::Watcher as _;
use parking_lot::Mutex;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tracing::{debug, info, warn};

use self::admission::Namespaces;
use self::attest::{Faults, Mends};
use self::authority::Authority;
use self::capture::{Capture, Ground};
use self::enrolment::Door;
use self::identities::Issuer;
use self::keeper::Keeper;
use self::kernel::{Conflict, KernelError};
use self::kubernetes::{Cluster, Ending};
use self::ladder::{Ladder, Occupied, Rung, Standing};
use self::metrics::Metrics;
use self::nftables::NftablesError;
use self::pods::{Changes, Pod, Pods};
use self::undescribed::{Stranger, Undescribed};
use crate::admin::{self, AdminError};
use crate::base::clock::WallClock;
use crate::base::drain::DrainGuard;
use crate::base::names::Named;
use crate::base::random::Dice;
use crate::identity::spiffe::SpiffeError;
use crate::model::capture::CaptureError;
use crate::model::pod_record::PodRecord;
use crate::telemetry::TelemetryError;

/// How the agent is set up.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// The mesh's state; the pods' records are in its folder `pods`.
    pub(crate) state: PathBuf,
    pub(crate) authority: authority::Config,
    /// The folder for pins; a bpffs is mounted on it.
    pub(crate) pins: PathBuf,
    pub(crate) doors: Doors,
    /// Where metrics and readiness are served.
    pub(crate) metrics: SocketAddr,
    /// Who gives pods their identities.
    pub(crate) issuer: Issuer,
    /// How the pods' connections are captured.
    pub(crate) ladder: Ladder,
    /// The kernel programs write rare events into the log.
    pub(crate) kernel_log: bool,
    /// How often it is looked whether every program is attached.
    pub(crate) attest_every: Duration,
    /// Of the jitter between attempts and renewals.
    pub(crate) seed: u64,
}

/// Where pods meet the agent.
#[derive(Clone, Debug)]
pub(crate) enum Doors {
    /// At two sockets for all of them.
    Node { enrolment: PathBuf, workload_api: PathBuf },
    /// Each at two of its own.
    Kubernetes(kubernetes::Config),
}

/// Why the agent cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeError {
    /// The environment: capture does not work here.
    #[error("the kernel programs cannot be used")]
    Kernel(#[from] KernelError),
    /// The environment: capture does not work here.
    #[error("nftables cannot be used")]
    Nftables(#[from] NftablesError),
    /// The user: pods that run are captured otherwise.
    #[error(transparent)]
    Occupied(#[from] Occupied),
    /// The user: a pod asks for what the explicit rung cannot do.
    #[error("nothing is captured, so what gets past the pod's sidecar cannot be dropped")]
    CannotEnforce,
    /// The environment: a folder, a socket or a port.
    #[error("cannot use {what}")]
    Place {
        what: String,
        #[source]
        source: io::Error,
    },
    /// The user: a pod of a mesh that is strict, where nothing captures.
    #[error("nothing is captured on this node, so the pod would be unprotected: what arrives meets its program in clear")]
    Unprotected,
    /// The user: a name that cannot stand in an identity.
    #[error(transparent)]
    Name(#[from] SpiffeError),
    /// The user: an annotation of a pod.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// Who passes for the pod's sidecar: the namespace that it showed is none of the pod's.
    #[error("the network namespace that was shown has no address of the pod")]
    Foreign,
    /// Who made the pod, or passes for its sidecar.
    #[error("the address {address} is that of {holder}, which runs")]
    Held { address: IpAddr, holder: String },
    /// Nobody has shown a socket of the pod's namespace, and nothing is attached there.
    #[error("nobody has shown yet that the pod's network namespace is the one described")]
    Unseen,
    /// The environment: nobody says where the API server is.
    #[error("the API server is not known: {0}")]
    Cluster(String),
    /// Ours.
    #[error(transparent)]
    Metrics(#[from] TelemetryError),
    /// Ours: a part of the agent ended.
    #[error("a part of the node agent ended: {0}")]
    Ended(String),
}

/// Why a pod that is described is not enrolled: it is closed, and its program is not started.
#[derive(Debug)]
pub(crate) struct Unenrolled {
    /// Of its network namespace: a pod that was made again under its name is another one.
    cookie: u64,
    pub(crate) text: String,
    pub(crate) remedy: String,
}

/// What the parts of the agent share.
pub(crate) struct Agent {
    pub(crate) pods: watch::Sender<Pods>,
    /// By pod. Who waits for one is woken by `pods`.
    pub(crate) unenrolled: Mutex<BTreeMap<Named, Unenrolled>>,
    /// Pods that run without a record.
    pub(crate) undescribed: Mutex<Undescribed>,
    /// The folder of the pods' records.
    pub(crate) records: PathBuf,
    pub(crate) capture: Capture,
    /// On which rung that is, and why.
    pub(crate) standing: Standing,
    /// Locked for a moment, never together with another lock.
    pub(crate) keeper: Mutex<Keeper<OwnedFd>>,
    /// Connections that ended of late. Locked for a moment, never together with another one.
    pub(crate) flows: Mutex<flows::Recent>,
    /// Told when a pod's connections begin to wait.
    pub(crate) held: Notify,
    pub(crate) cgroup_root: PathBuf,
    pub(crate) authority: Authority,
    pub(crate) issuer: Issuer,
    pub(crate) metrics: Metrics,
    /// What of the programs is not as it was attached.
    pub(crate) faults: watch::Sender<Faults>,
    /// What of it was put back.
    pub(crate) mends: Mutex<Mends>,
    /// Other people's programs at the same hooks.
    pub(crate) conflicts: watch::Sender<Vec<Conflict>>,
    pub(crate) namespaces: Mutex<Namespaces>,
    /// Told when the records should be looked at now.
    pub(crate) look: Notify,
    /// Counts the times that every sidecar was asked to probe now.
    pub(crate) prove: watch::Sender<u64>,
    pub(crate) proofs: Mutex<proof::Proofs>,
    /// Told with each proof.
    pub(crate) proven: Notify,
    /// Places to dial pods from.
    pub(crate) dialling: Semaphore,
    /// Pods of Kubernetes that are about to be forgotten.
    pub(crate) ending: Ending,
}

impl NodeError {
    /// What to do about it.
    pub(crate) fn remedy(&self) -> String {
        match self {
            Self::Kernel(error) => error.remedy(),
            Self::Nftables(error) => error.remedy().to_owned(),
            Self::Occupied(error) => error.remedy(),
            Self::CannotEnforce => NftablesError::CannotEnforce.remedy().to_owned(),
            Self::Unprotected => {
                "run it with --unprotected if it shall be, or have `outrigger doctor` tell what capture lacks".to_owned()
            }
            Self::Place { .. } => "run as root, and stop whatever else uses it".to_owned(),
            Self::Name(_) => "use letters, digits, '.', '-' and '_'".to_owned(),
            Self::Capture(_) => "start the pod again with another annotation".to_owned(),
            Self::Foreign => "let the pod's own sidecar ask, from the pod's network namespace".to_owned(),
            Self::Held { .. } => "give each pod an address of its own; one that has ended is forgotten by itself".to_owned(),
            Self::Unseen => "wait for the pod's sidecar, which shows it, or start the pod again".to_owned(),
            Self::Cluster(_) => "let the pod have its service account token, or set KUBECONFIG".to_owned(),
            Self::Metrics(_) | Self::Ended(_) => "report this with the log; a restart helps".to_owned(),
        }
    }

    /// The reason under which a pod that could not be enrolled is counted.
    const fn reason(&self) -> &'static str {
        match self {
            Self::Kernel(error) => error.reason(),
            Self::Nftables(_) | Self::CannotEnforce | Self::Occupied(_) => "capture",
            Self::Unprotected => "unprotected",
            Self::Place { .. } => "place",
            Self::Name(_) => "name",
            Self::Capture(_) => "annotation",
            Self::Foreign | Self::Held { .. } => "address",
            Self::Unseen => "unseen",
            Self::Cluster(_) => "cluster",
            Self::Metrics(_) | Self::Ended(_) => "internal",
        }
    }
}

/// What the agent's rung was stepped on with, by [`step`].
#[derive(Debug)]
pub(crate) struct Footing {
    capture: Capture,
    standing: Standing,
    cgroup_root: PathBuf,
}

impl Footing {
    /// Which rung that is.
    pub(crate) const fn rung(&self) -> Rung {
        self.standing.rung
    }
}

/// Steps on the ladder, and writes down where that is. It may take more rights than what follows.
///
/// # Errors
/// No rung holds, or a folder cannot be used.
pub(crate) fn step(config: &Config) -> Result<Footing, NodeError> {
    let records = config.state.join("pods");
    std::fs::create_dir_all(&records).map_err(place(&records))?;
    let cgroup_root = kernel::find_cgroup2()?;
    let found = pods::read(&records).map_err(place(&records))?;
    let running = found.records.iter().find(|record| record.meshed).map(PodRecord::named);
    let rungs = capture::rungs(config.ladder, &config.state, running)?;
    let ground = Ground { pins: &config.pins, options: kernel::Options { log: config.kernel_log, flows_bytes: None } };
    let (capture, fallen) = capture::climb(&rungs, &cgroup_root, ground)?;
    let standing = Standing { rung: capture.rung(), fallen, asked: config.ladder != Ladder::Auto };
    capture::write_down(&standing, &config.state).map_err(place(&config.state))?;
    info!(capture = standing.line(), adopted = capture.kernel().map(|kernel| kernel.lock().is_adopted()), "capture stands");
    Ok(Footing { capture, standing, cgroup_root })
}

/// Runs the agent until it is told to stop. What it enrolled stays enrolled afterwards.
///
/// # Errors
/// The kernel, a folder or a socket cannot be used; or a part of it ended.
pub(crate) async fn run(config: Config, footing: Footing, clock: WallClock, mut guard: DrainGuard) -> Result<(), NodeError> {
    let records = config.state.join("pods");
    let Footing { capture, standing, cgroup_root } = footing;
    let agent = Arc::new(Agent {
        pods: watch::Sender::default(),
        unenrolled: Mutex::default(),
        undescribed: Mutex::default(),
        records: records.clone(),
        capture,
        standing,
        keeper: Mutex::new(Keeper::new()),
        flows: Mutex::default(),
        held: Notify::new(),
        cgroup_root,
        authority: Authority::new(config.authority, clock.clone(), Dice::from_seed(config.seed))?,
        issuer: config.issuer,
        metrics: Metrics::new()?,
        faults: watch::Sender::default(),
        conflicts: watch::Sender::default(),
        mends: Mutex::default(),
        namespaces: Mutex::default(),
        look: Notify::new(),
        prove: watch::Sender::default(),
        proofs: Mutex::default(),
        proven: Notify::new(),
        dialling: Semaphore::new(proof::DIALLED_AT_ONCE),
        ending: Ending::default(),
    });
    undescribed::find(&agent, &records);
    let kernel_log = agent.capture.kernel().map_or(Ok(None), |kernel| kernel.lock().log())?;
    let flows = agent.capture.flows()?;

    // The pods first: a sidecar that comes back to an agent that was killed must find its pod known.
    let (mut fresh, mut faults) = (Renewals::default(), BTreeMap::new());
    reconcile(&agent, &records, &mut fresh, &mut faults);

    let metrics = listen(config.metrics).map_err(place(&config.metrics.to_string()))?;

    let mut parts = JoinSet::new();
    match &config.doors {
        Doors::Node { enrolment, workload_api } => {
            let (enrolment, workload_api) = (bind(enrolment)?, bind(workload_api)?);
            parts.spawn(enrolment::serve(Arc::clone(&agent), enrolment, Door::Node, enrolment::CONNECTIONS_MAX));
            parts.spawn(workload_api::serve(Arc::clone(&agent), workload_api, None, workload_api::CONNECTIONS_MAX));
        }
        Doors::Kubernetes(cluster) => {
            let client = kubernetes::client().await?;
            let heard = Arc::new(Cluster::new(client.clone()));
            kubernetes::start(&agent, &heard, client, cluster, &config.state, clock.clone(), &mut parts)?;
        }
    }
    let joined = agent.authority.clone();
    parts.spawn(async move { joined.keep_joined().await });
    let bundle = agent.authority.clone();
    parts.spawn(async move { bundle.follow_bundle().await });
    parts.spawn(enrolment::expire(Arc::clone(&agent)));
    let served = metrics::serve(Arc::clone(&agent), metrics);
    parts.spawn(async move { drop(served.await) });
    parts.spawn(follow(Arc::clone(&agent), records, fresh, faults));
    parts.spawn(attest::keep(Arc::clone(&agent), config.attest_every));
    parts.spawn(conflicts::follow(Arc::clone(&agent)));
    if let Some(kernel_log) = kernel_log {
        parts.spawn(kernel_log);
    }
    if let Some(flows) = flows {
        parts.spawn(flows::follow(Arc::clone(&agent), flows, clock));
    }
    info!("node agent ready for pods");

    // Cancel-safe: nothing is taken from either. None of the parts ever ends by itself.
    tokio::select! {
        () = guard.stopped() => {}
        ended = parts.join_next() => return Err(NodeError::Ended(why(ended))),
    }
    if let Doors::Kubernetes(cluster) = &config.doors {
        // Who would put back what is taken away, or take in another pod, ends first.
        parts.shutdown().await;
        kubernetes::leave(&agent, cluster, &config.pins, &config.state);
    }
    Ok(())
}

/// An error with its causes, on one line. What one says of its cause itself is not said twice.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let said = next.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = next.source();
    }
    text
}

/// Reconciles whenever the folder of records changes, and now and then all the same: a notification may be lost.
async fn follow(agent: Arc<Agent>, records: PathBuf, mut fresh: Renewals, mut faults: BTreeMap<String, String>) {
    // One pending notice is enough: a reconciliation reads the whole folder.
    let (notice, mut notices) = mpsc::channel(1);
    let told = move |event: notify::Result<notify::Event>| {
        // Reading the folder is an access that is told of as well: taken for news, it would be read without end.
        // Full means that a notice is already waiting.
        if !event.is_ok_and(|event| event.kind.is_access()) && notice.try_send(()).is_err() {}
    };
    let mut watcher = notify::recommended_watcher(told);
    let watched = watcher
        .as_mut()
        .map_err(|error| error.to_string())
        .and_then(|watcher| watcher.watch(&records, notify::RecursiveMode::NonRecursive).map_err(|error| error.to_string()));
    if let Err(error) = watched {
        warn!(error, folder = %records.display(), "cannot be told of new pods, looking for them every moment instead");
    }
    loop {
        // To lay a ruleset is to run a program and to wait for it: the thread's other tasks go on elsewhere.
        tokio::task::block_in_place(|| reconcile(&agent, &records, &mut fresh, &mut faults));
        let noticed = async {
            if tokio::time::timeout(LOOK_EVERY, notices.recv()).await == Ok(None) {
                // No watcher: the timer alone.
                tokio::time::sleep(LOOK_WITHOUT_NOTICE).await;
            }
        };
        // Cancel-safe: whichever it was, the whole folder is read.
        tokio::select! {
            () = agent.look.notified() => {}
            () = noticed => {}
        }
    }
}

fn reconcile(agent: &Agent, records: &Path, fresh: &mut Renewals, faults: &mut BTreeMap<String, String>) {
    let found = match pods::read(records) {
        Ok(found) => found,
        Err(error) => {
            // A folder that disappeared says nothing about the pods.
            warn_once(faults, "", &format!("cannot read {}: {error}", records.display()));
            return;
        }
    };
    let described: BTreeMap<Named, u64> = found.records.iter().map(|record| (record.named(), record.netns_cookie)).collect();
    agent.unenrolled.lock().retain(|pod, fault| described.get(pod) == Some(&fault.cookie));
    let cookies: BTreeSet<u64> = described.values().copied().collect();
    agent.namespaces.lock().keep(|cookie| cookies.contains(&cookie));
    let stems: BTreeSet<String> = described.keys().map(PodRecord::file_stem).collect();
    faults.retain(|stem, _text| found.faults.contains_key(stem) || stems.contains(stem));
    for (stem, fault) in &found.faults {
        warn_once(faults, stem, fault);
    }
    look_after_undescribed(agent, |cookie| described.values().any(|known| *known == cookie));
    let Changes { withdraw, enrol, describe } = pods::compare(&found, &agent.pods.borrow());
    for cookie in withdraw {
        let Some(pod) = forget(agent, fresh, cookie) else { continue };
        // Whoever ends a pod ends its processes before its record goes. What runs of one in its next sandbox is described.
        if !pod.is_left() && undescribed::is_populated(&pod.record.cgroup) {
            let PodRecord { cgroup, netns, .. } = &pod.record;
            let stranger = Stranger { who: pod.record.named().to_string(), cgroup: Some(cgroup.clone()), netns: netns.clone() };
            agent.undescribed.lock().add(cookie, stranger);
        } else {
            withdraw_pod(agent, cookie);
            info!(pod = %pod.record.named(), "pod withdrawn");
        }
    }
    for record in enrol {
        let (name, cookie) = (record.named(), record.netns_cookie);
        if admission::is_foreign(&record)
            && let Some(pod) = forget(agent, fresh, cookie)
        {
            pod.expelled.cancel();
        }
        match admission::add(agent, record, &found.records) {
            Ok(None) => debug!(pod = %name, "the pod waits until its namespace is shown"),
            Ok(Some(pod)) => {
                info!(pod = %name, id = %pod.id, "pod enrolled");
                faults.remove(&PodRecord::file_stem(&name));
                agent.unenrolled.lock().remove(&name);
                fresh.start(pod, agent);
            }
            Err(error) => {
                let text = chain(&error);
                if warn_once(faults, &PodRecord::file_stem(&name), &text) {
                    agent.metrics.refused.with_label_values(&[error.reason()]).inc();
                }
                agent.unenrolled.lock().insert(name, Unenrolled { cookie, text, remedy: error.remedy() });
                // Who waits for it looks again.
                agent.pods.send_modify(|_pods| {});
            }
        }
    }
    for record in describe {
        agent.pods.send_modify(|pods| {
            if let Some(pod) = pods.get_mut(&record.netns_cookie) {
                *pod = Arc::new(Pod {
                    record: record.clone(),
                    id: pod.id.clone(),
                    watch: pod.watch.clone(),
                    svid: pod.svid.clone(),
                    expelled: pod.expelled.clone(),
                });
            }
        });
    }
    agent.metrics.pods.set(i64::try_from(agent.pods.borrow().len()).unwrap_or(i64::MAX));
}

/// What is known of a pod and done for it ends, but for capture.
fn forget(agent: &Agent, fresh: &mut Renewals, cookie: u64) -> Option<Arc<Pod>> {
    fresh.stop(cookie);
    // A descriptor of the pod keeps its network namespace.
    agent.keeper.lock().forget(cookie);
    agent.proofs.lock().forget(cookie);
    agent.mends.lock().forget(cookie);
    let mut gone = None;
    agent.pods.send_modify(|pods| gone = pods.remove(&cookie));
    let pod = gone?;
    agent.flows.lock().went(&pod.record);
    agent.metrics.flows.forget(pod.record.namespace.as_str(), pod.record.name.as_str());
    Some(pod)
}

/// The tasks that keep the pods' certificates fresh, or only where the pods are known.
#[derive(Default)]
struct Renewals {
    tasks: JoinSet<()>,
    by_cookie: BTreeMap<u64, AbortHandle>,
}

impl Renewals {
    fn start(&mut self, pod: Arc<Pod>, agent: &Agent) {
        let cookie = pod.record.netns_cookie;
        self.stop(cookie);
        let authority = agent.authority.clone();
        let task = match agent.issuer {
            Issuer::Authority => self.tasks.spawn(identities::keep_fresh(pod, authority)),
            Issuer::Elsewhere => self.tasks.spawn(identities::keep_placed(pod, authority)),
        };
        self.by_cookie.insert(cookie, task);
    }

    fn stop(&mut self, cookie: u64) {
        if let Some(task) = self.by_cookie.remove(&cookie) {
            task.abort();
        }
        while self.tasks.try_join_next().is_some() {}
    }
}

/// Leaves pods that are described again to their records, and forgets those that are gone.
fn look_after_undescribed(agent: &Agent, described: impl Fn(u64) -> bool) {
    agent.undescribed.lock().retain(described);
    let ended = agent.undescribed.lock().ended();
    for cookie in ended {
        withdraw_pod(agent, cookie);
        agent.undescribed.lock().forget(cookie);
    }
    let Some(kernel) = agent.capture.kernel().filter(|_| !agent.undescribed.lock().is_empty()) else { return };
    let forgotten = kernel.lock().forget_gone();
    match forgotten {
        Ok(gone) => gone.into_iter().for_each(|cookie| agent.undescribed.lock().forget(cookie)),
        Err(error) => warn!(error = chain(&error), "cannot forget pods whose namespace is gone"),
    }
}

fn withdraw_pod(agent: &Agent, cookie: u64) {
    let withdrawn = agent.capture.withdraw(cookie);
    if let Err(error) = withdrawn {
        warn!(cookie, error = chain(&error), "cannot withdraw a pod");
    }
}

/// A socket at `path` that every process of the machine may connect to: who it is decides what it gets.
fn bind(path: &Path) -> Result<UnixListener, NodeError> {
    let bound = || {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _gone => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, Permissions::from_mode(0o666))?;
        Ok(listener)
    };
    bound().map_err(place(path))
}

/// Where metrics are asked for: `[::]` is IPv4 too.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = admin::listen(address).map_err(|error| match error {
        AdminError::Listen { source, .. } => source,
        other => io::Error::other(other),
    })?;
    TcpListener::from_std(listener)
}

fn place(what: &(impl AsRef<Path> + ?Sized)) -> impl FnOnce(io::Error) -> NodeError {
    let what = what.as_ref().display().to_string();
    move |source| NodeError::Place { what, source }
}

/// One line per fault, not one per look. Returns whether it is news.
fn warn_once(faults: &mut BTreeMap<String, String>, stem: &str, text: &str) -> bool {
    if faults.get(stem).is_some_and(|told| told == text) {
        return false;
    }
    warn!(pod = stem, error = text, "a pod's record is not in force");
    faults.insert(stem.to_owned(), text.to_owned());
    true
}

fn why(ended: Option<Result<(), JoinError>>) -> String {
    match ended {
        Some(Err(error)) => error.to_string(),
        _no_reason => "without a reason".to_owned(),
    }
}

const LOOK_EVERY: Duration = Duration::from_secs(5);
const LOOK_WITHOUT_NOTICE: Duration = Duration::from_millis(500);
