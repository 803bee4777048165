//! `outrigger node`: builds the node agent and waits for its end.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::Failure;

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  outrigger node --state /var/lib/outrigger --control 127.0.0.1:14010 --name laptop")]
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
}

pub(crate) fn run(_args: NodeArgs) -> Result<ExitCode, Failure> {
    Err(Failure::environment("this build has no node agent", "use a later build"))
}
