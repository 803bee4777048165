//! `outrigger node`: builds the node agent and waits for its end.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::Failure;
use crate::base::clock::WallClock;
use crate::base::drain::Drain;
use crate::node::ladder::Ladder;
use crate::node::{Config, authority, chain};
use crate::telemetry::log::{self, LogFormat};

#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  outrigger node --control 127.0.0.1:14010 --name laptop\n  outrigger node --control 127.0.0.1:14010 --name laptop --capture nftables"
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
    /// Where sidecars enrol
    #[arg(long, env = "OUTRIGGER_NODE_SOCKET", value_name = "PATH", default_value = "/run/outrigger/node.sock")]
    pub(crate) node_socket: PathBuf,
    /// Where the SPIFFE Workload API is served
    #[arg(long, env = "OUTRIGGER_WORKLOAD_API", value_name = "PATH", default_value = "/run/outrigger/workload.sock")]
    pub(crate) workload_api: PathBuf,
    /// The trust domain of all identities
    #[arg(long, env = "OUTRIGGER_TRUST_DOMAIN", value_name = "TD", default_value = "cluster.local")]
    pub(crate) trust_domain: String,
    /// Where the kernel programs are pinned; a bpffs is mounted there
    #[arg(long, env = "OUTRIGGER_PINS", value_name = "DIR", default_value = "/run/outrigger/bpf")]
    pub(crate) pins: PathBuf,
    /// Where the own metrics and readiness are served
    #[arg(long, env = "OUTRIGGER_METRICS", value_name = "ADDR", default_value = "0.0.0.0:14030")]
    pub(crate) metrics: SocketAddr,
    /// How the pods' connections are captured: auto (the first that works here), ebpf, nftables or explicit (docs/capture.md)
    #[arg(long, env = "OUTRIGGER_CAPTURE", value_name = "HOW", default_value = "auto")]
    pub(crate) capture: Ladder,
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
    let config = Config {
        authority: authority::Config {
            control: args.control,
            trust_domain,
            node: args.name,
            token: args.state.join("join-token"),
            root: args.state.join("ca/root.pem"),
        },
        state: args.state,
        pins: args.pins,
        node_socket: args.node_socket,
        workload_api: args.workload_api,
        metrics: args.metrics,
        ladder: args.capture,
        kernel_log: args.kernel_log,
        seed,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
    runtime.block_on(async {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let (drain, guard) = Drain::new();
        let agent = crate::node::run(config, WallClock::system(), guard);
        let mut agent = std::pin::pin!(agent);
        // Cancel-safe: the agent is only dropped when the process ends.
        let outcome = tokio::select! {
            outcome = &mut agent => outcome,
            _signal = terminate.recv() => Ok(()),
            _signal = interrupt.recv() => Ok(()),
        };
        drop(drain);
        outcome.map(|()| ExitCode::SUCCESS).map_err(|error| Failure::environment(chain(&error), error.remedy()))
    })
}

/// The agent waits most of the time; a second worker keeps one slow system call from holding everybody up.
const WORKERS: usize = 2;
