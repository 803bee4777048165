//! `outrigger status` and `outrigger proxies`: whether the mesh is well.

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Args;

use super::Failure;

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  outrigger status -o json")]
pub(crate) struct StatusArgs {
    /// json
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) output: Option<String>,
    /// The control plane's API
    #[arg(long, env = "OUTRIGGER_API", value_name = "ADDR", default_value = "127.0.0.1:14080")]
    pub(crate) api: SocketAddr,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  outrigger proxies -o json")]
pub(crate) struct ProxiesArgs {
    /// json
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) output: Option<String>,
    /// The control plane's API
    #[arg(long, env = "OUTRIGGER_API", value_name = "ADDR", default_value = "127.0.0.1:14080")]
    pub(crate) api: SocketAddr,
}

pub(crate) fn status(_args: &StatusArgs) -> Result<ExitCode, Failure> {
    Err(Failure::environment("this build has no `status`", "use a later build"))
}

pub(crate) fn proxies(_args: &ProxiesArgs) -> Result<ExitCode, Failure> {
    Err(Failure::environment("this build has no `proxies`", "use a later build"))
}
