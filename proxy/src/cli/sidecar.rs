//! `outrigger sidecar`: builds the proxy of one pod and waits for its end.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::Failure;

#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  outrigger sidecar --namespace shop --name web-1 --control 10.64.0.1:14010 --state /var/lib/outrigger/sidecars/shop.web-1"
)]
pub(crate) struct SidecarArgs {
    /// The pod's namespace
    #[arg(long, env = "OUTRIGGER_NAMESPACE", value_name = "NS")]
    pub(crate) namespace: String,
    /// The pod's name
    #[arg(long, env = "OUTRIGGER_NAME", value_name = "NAME")]
    pub(crate) name: String,
    /// The control plane's stream; may be given several times
    #[arg(long, env = "OUTRIGGER_CONTROL", value_name = "ADDR", value_delimiter = ',', default_value = "10.64.0.1:14010")]
    pub(crate) control: Vec<String>,
    /// The SPIFFE Workload API
    #[arg(long, env = "OUTRIGGER_WORKLOAD_API", value_name = "PATH", default_value = "/run/outrigger/workload.sock")]
    pub(crate) workload_api: PathBuf,
    /// The node agent's enrolment socket
    #[arg(long, env = "OUTRIGGER_NODE", value_name = "PATH", default_value = "/run/outrigger/node.sock")]
    pub(crate) node: PathBuf,
    /// Where the last good configuration is kept
    #[arg(long, env = "OUTRIGGER_STATE", value_name = "DIR")]
    pub(crate) state: PathBuf,
    /// The trust domain of the own identity
    #[arg(long, env = "OUTRIGGER_TRUST_DOMAIN", value_name = "TD", default_value = "cluster.local")]
    pub(crate) trust_domain: String,
    /// Where spans are exported to (OTLP over gRPC)
    #[arg(long, env = "OUTRIGGER_OTLP", value_name = "URL")]
    pub(crate) otlp: Option<String>,
    /// The format of the log: text or json
    #[arg(long, env = "OUTRIGGER_LOG", value_name = "FORMAT", default_value = "text")]
    pub(crate) log: String,
    /// Where the access log goes; `-` is stdout
    #[arg(long, env = "OUTRIGGER_ACCESS_LOG", value_name = "PATH")]
    pub(crate) access_log: Option<PathBuf>,
}

pub(crate) fn run(_args: SidecarArgs) -> Result<ExitCode, Failure> {
    Err(Failure::environment("this build has no sidecar", "use a later build"))
}
