//! `outrigger explain`: what would happen to a request, and by which rule.
//!
//! It compiles the very snapshots that the two sidecars would read, and asks the very decisions that they would ask; nothing
//! is sent. What is drawn by chance (a backend, a fault, a copy) is told as its share; what depends on the past (budgets,
//! limits, ejections) is told by its rule. Exit codes: 0 the request would be let in wherever it may go, 1 it would be refused
//! somewhere, 2 the question is wrong, 3 the control plane does not answer.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use http::Method;

use super::mesh::MeshArgs;
use super::table::{self, JsonOutput};
use super::{Failure, print};
use crate::base::clock::WallClock;
use crate::base::names::Named;
use crate::identity::spiffe::TrustDomain;

mod documents;
mod passed;
mod question;
mod shares;
#[cfg(test)]
mod tests;
mod told;
mod walk;

use documents::{ask, load, prepare};
use question::Question;
use told::Told;
use walk::explain;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  outrigger explain --from shop/front-1 --to payments --method POST --path /pay
  outrigger explain --from shop/front-1 --to reviews.shop:80 -f ./mesh -o json
  outrigger explain --from shop/front-1 --to web --header 'x-user: ada'
  outrigger explain --kubernetes --from shop/front-7d9-abcde --to web

The request is read as one of HTTP/1.1. Whether a program listens at the port, and whether it answers, is not asked.

Exit codes: 0 it would be let in wherever it may go; 1 it would be refused somewhere; 2 the question is wrong; 3 the control plane does not answer.")]
pub(crate) struct ExplainArgs {
    /// The pod that calls
    #[arg(long, value_name = "NS/POD")]
    pub(crate) from: Named,
    /// What it calls: a Service by name (`web`, `web.shop`) or an address, with a port where it has several
    #[arg(long, value_name = "HOST[:PORT]")]
    pub(crate) to: String,
    #[arg(long, default_value = "GET")]
    pub(crate) method: Method,
    /// With its query; `*` and a whole URL are targets too
    #[arg(long, default_value = "/")]
    pub(crate) path: String,
    /// A header of the request; may be given several times
    #[arg(long = "header", value_name = "NAME: VALUE")]
    pub(crate) headers: Vec<String>,
    /// A file with a token, sent as `Authorization: Bearer`
    #[arg(long, value_name = "FILE")]
    pub(crate) token: Option<PathBuf>,
    /// Ask documents instead of the control plane: a file or a folder; may be given several times
    #[arg(short, long = "file", value_name = "DIR|FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// With -f: the account of a calling pod that the documents do not hold
    #[arg(long, default_value = "default")]
    pub(crate) service_account: String,
    /// With -f: the trust domain
    #[arg(long, default_value = "cluster.local")]
    pub(crate) trust_domain: String,
    /// How to write it
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) output: Option<JsonOutput>,
    #[command(flatten)]
    pub(crate) mesh: MeshArgs,
}

/// Runs `outrigger explain`.
pub(crate) fn run(args: ExplainArgs) -> Result<ExitCode, Failure> {
    let (mut resources, domain) =
        if args.files.is_empty() { ask(&args.mesh.find()?)? } else { (load(&args.files)?, args.trust_domain.clone()) };
    let trust_domain: TrustDomain = domain.parse().map_err(|error| Failure::invalid([error]))?;
    let question = Question::read(&args)?;
    let mut told = Told::default();
    prepare(&mut resources, &args.from, &args.service_account, !args.files.is_empty(), &mut told)?;
    let now = WallClock::system().since_epoch();
    explain(&resources, &args.from, &question, &trust_domain, now, &mut told)?;
    match args.output {
        None => print(&told.text(table::width()))?,
        Some(JsonOutput::Json) => table::json(&told.json())?,
    }
    Ok(if told.refused { ExitCode::from(1) } else { ExitCode::SUCCESS })
}
