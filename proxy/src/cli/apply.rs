//! `outrigger apply` and `outrigger delete`: what the control plane stores.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::Failure;

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  outrigger apply -f route.yaml\n  outrigger apply -f ./mesh --wait --timeout 10s")]
pub(crate) struct ApplyArgs {
    /// A file or a folder of documents; `-` is stdin; may be given several times
    #[arg(short, long = "file", value_name = "FILE|DIR|-", required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Return when every sidecar that should have it acknowledged it
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "30s", requires = "wait")]
    pub(crate) timeout: String,
    /// The control plane's API
    #[arg(long, env = "OUTRIGGER_API", value_name = "ADDR", default_value = "127.0.0.1:14080")]
    pub(crate) api: SocketAddr,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  outrigger delete -f route.yaml")]
pub(crate) struct DeleteArgs {
    /// A file or a folder of documents; `-` is stdin; may be given several times
    #[arg(short, long = "file", value_name = "FILE|DIR|-", required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// The control plane's API
    #[arg(long, env = "OUTRIGGER_API", value_name = "ADDR", default_value = "127.0.0.1:14080")]
    pub(crate) api: SocketAddr,
}

pub(crate) fn apply(_args: &ApplyArgs) -> Result<ExitCode, Failure> {
    Err(Failure::environment("this build has no `apply`", "use a later build"))
}

pub(crate) fn delete(_args: &DeleteArgs) -> Result<ExitCode, Failure> {
    Err(Failure::environment("this build has no `delete`", "use a later build"))
}
