//! `outrigger get`: documents that the control plane holds.

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Args;

use super::Failure;

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  outrigger get services\n  outrigger get httproute web -n shop -o yaml\n  outrigger get all")]
pub(crate) struct GetArgs {
    /// A kind by its name, its plural or its short form, or `all`
    pub(crate) kind: String,
    /// One document of that kind
    pub(crate) name: Option<String>,
    /// Only this namespace
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
    /// yaml, json or wide
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) output: Option<String>,
    /// The control plane's API
    #[arg(long, env = "OUTRIGGER_API", value_name = "ADDR", default_value = "127.0.0.1:14080")]
    pub(crate) api: SocketAddr,
}

pub(crate) fn run(_args: &GetArgs) -> Result<ExitCode, Failure> {
    Err(Failure::environment("this build has no `get`", "use a later build"))
}
