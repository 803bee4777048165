//! The mesh on one machine without Kubernetes: `up`, `down`, `run`, `exec`, `stop`.
//!
//! `up` supervises the control plane and the node agent, `run` one pod each. They know of each other by files alone, so
//! any of them may be killed at any moment, and `down` removes what is left.

mod cgroup;
mod detach;
mod dns;
mod down;
mod enrolment;
mod exclusions;
mod links;
mod places;
mod pod;
mod ports;
mod restarts;
mod run;
mod up;
mod user;
mod visit;
mod watched;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

pub(crate) use down::down;
pub(crate) use places::{BRIDGE, GATEWAYS, RUNTIME, STATE, UpRecord, is_up, node_socket, pins, read_up_record, supervised};
pub(crate) use ports::taken as taken_ports;
pub(crate) use restarts::{LONGEST_PAUSE, Restarted};
pub(crate) use up::missing_capabilities;
pub(crate) use visit::stop;
pub(crate) use visit::{has_lost_supervisor, is_ending};

use super::Failure;
use crate::base::units::Span;
use crate::node::ladder::Ladder;

/// Runs `outrigger up`.
pub(crate) fn up(args: UpArgs) -> Result<ExitCode, Failure> {
    let_go()?;
    up::up(args)
}

/// Runs `outrigger run`.
pub(crate) fn run(args: RunArgs) -> Result<ExitCode, Failure> {
    let_go()?;
    run::run(args)
}

/// Runs `outrigger exec`.
pub(crate) fn exec(args: ExecArgs) -> Result<ExitCode, Failure> {
    let_go()?;
    visit::exec(args)
}

/// Before anything is opened: what the caller has open beyond the standard streams stays the caller's alone. Neither the
/// mesh may hold its locks and pipes for as long as it is up, nor a pod have a socket of the machine.
fn let_go() -> Result<(), Failure> {
    crate::node::netns::close_inherited().map_err(|error| pod::cannot("close what the caller has open", &error))
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  outrigger up --resources ./mesh --detach
  outrigger up --capture nftables

Pods' connections are captured by the first of these that works on this machine: kernel programs (ebpf), a ruleset in each pod's network namespace (nftables), nothing (explicit: programs are told of a proxy). `outrigger status` tells which it is, why it is none of the others, and what that costs; --capture asks for one by name, and the mesh does not start where it does not work.")]
pub(crate) struct UpArgs {
    /// A folder of documents that is watched; may be given several times. Without one, those of the last `up` are watched
    /// again, unless `down` came between
    #[arg(long, value_name = "DIR")]
    pub(crate) resources: Vec<PathBuf>,
    /// Where the mesh keeps its state
    #[arg(long, value_name = "DIR", default_value = "/var/lib/outrigger")]
    pub(crate) state: PathBuf,
    /// The trust domain of all identities
    #[arg(long, value_name = "TD", default_value = "cluster.local")]
    pub(crate) trust_domain: String,
    /// How the pods' connections are captured: auto (the first that works here), ebpf, nftables or explicit (docs/capture.md)
    #[arg(long, env = "OUTRIGGER_CAPTURE", value_name = "HOW", default_value = "auto")]
    pub(crate) capture: Ladder,
    /// Return once the mesh is up
    #[arg(long)]
    pub(crate) detach: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  outrigger down")]
pub(crate) struct DownArgs {
    /// Where the mesh keeps its state; by default where the mesh that is up keeps it
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:
  outrigger run web-1 -n shop --label app=web --port http:8080 -- ./web 8080

A local pod reaches the other pods, the services of the mesh and this machine, but not the internet: nothing translates its address, and only names of the mesh resolve (docs/operations.md).

A pod has a network of its own, and shares processes, files and users with the machine: a program that root runs without --user is root on this machine, can enter other pods and read the mesh's keys. Give what you do not trust a user of its own (docs/security.md).")]
pub(crate) struct RunArgs {
    /// The pod's name
    pub(crate) name: String,
    /// The pod's namespace
    #[arg(short, long, default_value = "default")]
    pub(crate) namespace: String,
    /// The pod's service account, which is its identity
    #[arg(long, value_name = "SA", default_value = "default")]
    pub(crate) service_account: String,
    /// What a Service selects on
    #[arg(long = "label", value_name = "K=V")]
    pub(crate) labels: Vec<String>,
    /// What is asked of the pod's capture: outrigger.dev/exclude-outbound-ports, outrigger.dev/exclude-outbound-cidrs,
    /// outrigger.dev/exclude-inbound-ports, each a list with commas; outrigger.dev/capture, which is observe or enforce;
    /// outrigger.dev/hold, as --hold (docs/capture.md)
    #[arg(long = "annotation", value_name = "K=V")]
    pub(crate) annotations: Vec<String>,
    /// A port that the program listens on
    #[arg(long = "port", value_name = "NAME:PORT[:APPPROTOCOL]")]
    pub(crate) ports: Vec<String>,
    /// An environment variable of the program
    #[arg(long = "env", value_name = "K=V")]
    pub(crate) env: Vec<String>,
    /// The user that the program runs as, without any privilege; by default who runs this command
    #[arg(long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// A pod outside the mesh
    #[arg(long)]
    pub(crate) no_sidecar: bool,
    /// Start the pod also where nothing captures its connections (`up --capture explicit`): its sidecar is the proxy of programs that
    /// read http_proxy, and nothing that arrives passes it
    #[arg(long, conflicts_with = "no_sidecar")]
    pub(crate) unprotected: bool,
    /// How long connections wait while the pod's sidecar is away, before they are refused; 0s: not at all [default: what the
    /// annotation outrigger.dev/hold says, else 10s]
    #[arg(long, value_name = "DURATION", conflicts_with = "no_sidecar")]
    pub(crate) hold: Option<Span>,
    /// Start the program at once, and its sidecar this much later; its connections wait
    #[arg(long, value_name = "DURATION", conflicts_with = "no_sidecar")]
    pub(crate) sidecar_after: Option<Span>,
    /// Return once the program runs
    #[arg(long)]
    pub(crate) detach: bool,
    /// The program and its arguments; of what its caller has open it gets the standard streams alone
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  outrigger exec web-1 -n shop -- curl -s http://api/")]
pub(crate) struct ExecArgs {
    /// The pod's name
    pub(crate) name: String,
    /// The pod's namespace
    #[arg(short, long, default_value = "default")]
    pub(crate) namespace: String,
    /// The user that the command runs as, without any privilege; by default who runs this command, whoever the pod's program is
    #[arg(long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  outrigger stop web-1 -n shop --grace 5s")]
pub(crate) struct StopArgs {
    /// The pod's name
    pub(crate) name: String,
    /// The pod's namespace
    #[arg(short, long, default_value = "default")]
    pub(crate) namespace: String,
    /// How long the program may take to end
    #[arg(long, value_name = "DURATION", default_value = "10s")]
    pub(crate) grace: String,
}
