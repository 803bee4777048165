//! `outrigger node`: builds the node agent and waits for its end.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use rustix::thread::CapabilitySet;
use tokio::signal::unix::{SignalKind, signal};

use super::Failure;
use crate::base::clock::WallClock;
use crate::base::drain::Drain;
use crate::base::units::Span;
use crate::node::identities::Issuer;
use crate::node::ladder::{Ladder, Rung};
use crate::node::{Config, Doors, authority, chain, kubernetes, netns};
use crate::telemetry::log::{self, LogFormat};

#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  outrigger node --control 127.0.0.1:14010 --name laptop\n  outrigger node --control 127.0.0.1:14010 --name laptop --capture nftables\n  outrigger node --kubernetes --control control.outrigger-system.svc:14010"
)]
pub(crate) struct NodeArgs {
    /// Where the mesh keeps its state
    #[arg(long, env = "OUTRIGGER_STATE", value_name = "DIR", default_value = "/var/lib/outrigger")]
    pub(crate) state: PathBuf,
    /// The control plane's stream
    #[arg(long, env = "OUTRIGGER_CONTROL", value_name = "ADDR", default_value = "127.0.0.1:14010")]
    pub(crate) control: String,
    /// The node's name
    #[arg(long, env = "OUTRIGGER_NODE_NAME", value_name = "NODE")]
    pub(crate) name: String,
    /// Be a CSI driver of the kubelet: each pod gets sockets of its own in place of the node's two (docs/node.md)
    #[arg(long, env = "OUTRIGGER_KUBERNETES")]
    pub(crate) kubernetes: bool,
    /// The kubelet's folder
    #[arg(long, env = "OUTRIGGER_KUBELET", value_name = "DIR", default_value = "/var/lib/kubelet")]
    pub(crate) kubelet: PathBuf,
    /// What proves the node to the authority [default: STATE/join-token; with --kubernetes /var/run/secrets/outrigger/token]
    #[arg(long, env = "OUTRIGGER_JOIN_TOKEN", value_name = "PATH")]
    pub(crate) join_token: Option<PathBuf>,
    /// The authority's certificate [default: STATE/ca/root.pem; with --kubernetes /etc/outrigger/root.pem]
    #[arg(long, env = "OUTRIGGER_ROOT", value_name = "PATH")]
    pub(crate) root: Option<PathBuf>,
    /// Where sidecars enrol
    #[arg(long, env = "OUTRIGGER_NODE_SOCKET", value_name = "PATH", default_value = "/run/outrigger/node.sock")]
    pub(crate) node_socket: PathBuf,
    /// Where the SPIFFE Workload API is served
    #[arg(long, env = "OUTRIGGER_WORKLOAD_API", value_name = "PATH", default_value = "/run/outrigger/workload.sock")]
    pub(crate) workload_api: PathBuf,
    /// Ask for no identity of a pod and serve none: pods have theirs from another Workload API, SPIRE's (docs/security.md)
    #[arg(long, env = "OUTRIGGER_FOREIGN_IDENTITIES")]
    pub(crate) foreign_identities: bool,
    /// The trust domain of all identities
    #[arg(long, env = "OUTRIGGER_TRUST_DOMAIN", value_name = "TD", default_value = "cluster.local")]
    pub(crate) trust_domain: String,
    /// Where the kernel programs are pinned; a bpffs is mounted there, but with --kubernetes, where the machine's is used
    /// [default: /run/outrigger/bpf; with --kubernetes /sys/fs/bpf/outrigger]
    #[arg(long, env = "OUTRIGGER_PINS", value_name = "DIR")]
    pub(crate) pins: Option<PathBuf>,
    /// Where the own metrics and readiness are served
    #[arg(long, env = "OUTRIGGER_METRICS", value_name = "ADDR", default_value = "0.0.0.0:14030")]
    pub(crate) metrics: SocketAddr,
    /// How the pods' connections are captured: auto (the first that works here), ebpf, nftables or explicit (docs/capture.md)
    #[arg(long, env = "OUTRIGGER_CAPTURE", value_name = "HOW", default_value = "auto")]
    pub(crate) capture: Ladder,
    /// How often it is looked whether every kernel program is attached
    #[arg(long, env = "OUTRIGGER_ATTEST_EVERY", value_name = "DURATION", default_value = "10s")]
    pub(crate) attest_every: Span,
    /// Let the kernel programs write rare events into the log
    #[arg(long, env = "OUTRIGGER_KERNEL_LOG")]
    pub(crate) kernel_log: bool,
    /// The format of the log: text, json or auto
    #[arg(long, env = "OUTRIGGER_LOG", value_name = "FORMAT", default_value = "auto")]
    pub(crate) log: LogFormat,
    /// What is logged: a level, or a list as `info,outrigger::node=debug`
    #[arg(long, env = "OUTRIGGER_LOG_LEVEL", value_name = "FILTER", default_value = "info")]
    pub(crate) log_level: String,
}

pub(crate) fn run(args: NodeArgs) -> Result<ExitCode, Failure> {
    super::keep_to_itself()?;
    crate::base::descriptors::open_as_many_as_allowed();
    log::start(args.log, &args.log_level).map_err(|error| Failure::invalid([chain(&error)]))?;
    let trust_domain = args.trust_domain.parse().map_err(|error| Failure::invalid([error]))?;
    let seed = u64::from(std::process::id())
        ^ u64::try_from(WallClock::system().since_epoch().as_nanos() & u128::from(u64::MAX)).unwrap_or(0);
    let places = Places::of(&args);
    let config = Config {
        authority: authority::Config {
            control: args.control,
            trust_domain,
            node: args.name,
            token: args.join_token.unwrap_or(places.token),
            root: args.root.unwrap_or(places.root),
        },
        state: args.state,
        pins: args.pins.unwrap_or(places.pins),
        doors: if args.kubernetes {
            Doors::Kubernetes(kubernetes::Config { kubelet: args.kubelet })
        } else {
            Doors::Node { enrolment: args.node_socket, workload_api: args.workload_api }
        },
        metrics: args.metrics,
        issuer: if args.foreign_identities { Issuer::Elsewhere } else { Issuer::Authority },
        ladder: ladder(args.capture, args.kubernetes)?,
        kernel_log: args.kernel_log,
        attest_every: args.attest_every.0.max(ATTEST_EVERY_LEAST),
        seed,
    };
    let footing = crate::node::step(&config).map_err(|error| Failure::environment(chain(&error), error.remedy()))?;
    keep_rights(&config, footing.rung())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
    runtime.block_on(async {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let (drain, guard) = Drain::new();
        let agent = crate::node::run(config, footing, WallClock::system(), guard);
        let mut agent = std::pin::pin!(agent);
        // Cancel-safe: the agent is only dropped when the process ends.
        let ended = tokio::select! {
            outcome = &mut agent => Some(outcome),
            _signal = terminate.recv() => None,
            _signal = interrupt.recv() => None,
        };
        let outcome = match ended {
            Some(outcome) => outcome,
            None => {
                drop(drain);
                tokio::time::timeout(END_WITHIN, &mut agent).await.unwrap_or(Ok(()))
            }
        };
        outcome.map(|()| ExitCode::SUCCESS).map_err(|error| Failure::environment(chain(&error), error.remedy()))
    })
}

/// Where things are of which nobody says it.
struct Places {
    token: PathBuf,
    root: PathBuf,
    pins: PathBuf,
}

impl Places {
    fn of(args: &NodeArgs) -> Self {
        let at = |local: PathBuf, pod: &str| if args.kubernetes { PathBuf::from(pod) } else { local };
        Self {
            token: at(args.state.join("join-token"), "/var/run/secrets/outrigger/token"),
            root: at(args.state.join("ca/root.pem"), "/etc/outrigger/root.pem"),
            pins: at("/run/outrigger/bpf".into(), "/sys/fs/bpf/outrigger"),
        }
    }
}

/// On Kubernetes a pod is captured by programs or stays closed: what lays rulesets would have to enter its namespace, and
/// nobody there says that a pod shall be unprotected.
fn ladder(asked: Ladder, kubernetes: bool) -> Result<Ladder, Failure> {
    match asked {
        asked if !kubernetes => Ok(asked),
        Ladder::Auto | Ladder::Only(Rung::Ebpf) => Ok(Ladder::Only(Rung::Ebpf)),
        Ladder::Only(other) => {
            Err(Failure::invalid([format!("--capture {} does not go with --kubernetes; use ebpf", other.word())]))
        }
    }
}

/// Lets go of the rights that the agent does not need any more on its rung.
fn keep_rights(config: &Config, rung: Rung) -> Result<(), Failure> {
    let mut kept = needed(rung);
    if config.kernel_log && rung == Rung::Ebpf {
        // Their log is found by the programs' ids, which nobody else may ask for.
        kept |= CapabilitySet::SYS_ADMIN;
    }
    if !lets_root_pass(&config.state) {
        tracing::info!(state = %config.state.display(), "the state lies in a folder that is another user's alone, CAP_DAC_READ_SEARCH is kept");
        kept |= CapabilitySet::DAC_READ_SEARCH;
    }
    // What is not there is missed, and named, where it is needed.
    let held = rustix::thread::capabilities(None).map_err(io::Error::from)?.permitted;
    netns::keep_capabilities(kept & held).map_err(|error| {
        let remedy = "let the filter of system calls permit prctl(2) and capset(2)";
        Failure::environment(format!("cannot let go of rights that are not needed: {error}"), remedy)
    })
}

/// What capture takes, once the agent stands on that rung.
pub(crate) const fn needed(rung: Rung) -> CapabilitySet {
    match rung {
        Rung::Ebpf => CapabilitySet::BPF.union(CapabilitySet::NET_ADMIN).union(CapabilitySet::PERFMON),
        // Rulesets are laid inside the pods' network namespaces.
        Rung::Nftables => CapabilitySet::NET_ADMIN.union(CapabilitySet::SYS_ADMIN),
        Rung::Explicit => CapabilitySet::NET_ADMIN,
    }
}

/// Can user 0 go to `folder` without any capability?
fn lets_root_pass(folder: &Path) -> bool {
    let folder = std::fs::canonicalize(folder).unwrap_or_else(|_none| folder.to_owned());
    folder.ancestors().all(|above| {
        let Ok(found) = std::fs::metadata(above) else { return true };
        let mine = match (found.uid(), found.gid()) {
            (0, _) => 0o500,
            (_, 0) => 0o050,
            _others => 0o005,
        };
        found.mode() & mine == mine
    })
}

/// How long the agent may take to end by itself.
const END_WITHIN: Duration = Duration::from_secs(5);
/// Some ten calls for each pod.
const ATTEST_EVERY_LEAST: Duration = Duration::from_millis(100);
/// The agent waits most of the time; a second worker keeps one slow system call from holding everybody up.
const WORKERS: usize = 2;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn on_kubernetes_programs_capture_or_nothing_runs() {
        assert!(matches!(ladder(Ladder::Auto, true), Ok(Ladder::Only(Rung::Ebpf))));
        assert!(matches!(ladder(Ladder::Auto, false), Ok(Ladder::Auto)));
        for rung in [Rung::Nftables, Rung::Explicit] {
            assert!(ladder(Ladder::Only(rung), true).is_err() && ladder(Ladder::Only(rung), false).is_ok());
        }
    }

    #[test]
    fn a_folder_of_somebody_elses_alone_is_passed_by_a_capability_only() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().join("home");
        let state = home.join("state");
        std::fs::create_dir_all(&state).unwrap();
        assert!(lets_root_pass(&state) && lets_root_pass(&home.join("none-yet")));
        let own = |user, mode| {
            std::os::unix::fs::chown(&home, Some(user), Some(user)).unwrap();
            std::fs::set_permissions(&home, std::fs::Permissions::from_mode(mode)).unwrap();
            lets_root_pass(&state)
        };
        assert!(!own(1000, 0o700) && own(1000, 0o755) && own(0, 0o700));
    }
}
