//! `outrigger control`: builds the control plane and waits for its end.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::Failure;

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  outrigger control --resources ./mesh --listen 127.0.0.1:14010")]
pub(crate) struct ControlArgs {
    /// A folder of documents that is watched; may be given several times
    #[arg(long, env = "OUTRIGGER_RESOURCES", value_name = "DIR", value_delimiter = ',')]
    pub(crate) resources: Vec<PathBuf>,
    /// Where the mesh keeps its state
    #[arg(long, env = "OUTRIGGER_STATE", value_name = "DIR", default_value = "/var/lib/outrigger")]
    pub(crate) state: PathBuf,
    /// The trust domain of all identities
    #[arg(long, env = "OUTRIGGER_TRUST_DOMAIN", value_name = "TD", default_value = "cluster.local")]
    pub(crate) trust_domain: String,
    /// Where sidecars and node agents reach the control plane; may be given several times
    #[arg(long, env = "OUTRIGGER_LISTEN", value_name = "ADDR", value_delimiter = ',', default_value = "127.0.0.1:14010")]
    pub(crate) listen: Vec<SocketAddr>,
    /// Where the API and the dashboard are served; a loopback address
    #[arg(long, env = "OUTRIGGER_API", value_name = "ADDR", default_value = "127.0.0.1:14080")]
    pub(crate) api: SocketAddr,
    /// Where the own metrics are served
    #[arg(long, env = "OUTRIGGER_METRICS", value_name = "ADDR", default_value = "0.0.0.0:14014")]
    pub(crate) metrics: SocketAddr,
    /// How long a workload's certificate is valid
    #[arg(long, env = "OUTRIGGER_SVID_TTL", value_name = "DURATION", default_value = "1h")]
    pub(crate) svid_ttl: String,
}

pub(crate) fn run(_args: ControlArgs) -> Result<ExitCode, Failure> {
    Err(Failure::environment("this build has no control plane", "use a later build"))
}
