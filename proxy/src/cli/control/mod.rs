//! `outrigger control`: builds the control plane and waits for its end.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

#[cfg(test)]
mod tests;

use super::Failure;
use super::holder::holder;
use super::inject::SidecarsArgs;
use crate::admin::AdminError;
use crate::base::clock::WallClock;
use crate::base::drain::Drain;
use crate::base::units::Span;
use crate::control::ca::CaError;
use crate::control::webhook::WebhookConfig;
use crate::control::{Config, Control, ControlError, SourceConfig};
use crate::identity::spiffe::SpiffeError;
use crate::injection::Settings;
use crate::telemetry::log;

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  outrigger control --resources ./mesh --listen 127.0.0.1:14010")]
pub(crate) struct ControlArgs {
    /// A folder of documents that is watched; may be given several times
    #[arg(long, env = "OUTRIGGER_RESOURCES", value_name = "DIR", value_delimiter = ',')]
    pub(crate) resources: Vec<PathBuf>,
    /// Take documents and pods from the API server of the cluster that this runs in, or that KUBECONFIG names
    #[arg(long, env = "OUTRIGGER_KUBERNETES", conflicts_with = "resources")]
    pub(crate) kubernetes: bool,
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
    pub(crate) svid_ttl: Span,
    /// Where sidecars, and as they see it this process, have their identities from, in the place of the own authority: the socket
    /// of a SPIFFE Workload API, SPIRE's [default: with --sidecar-workload-api, where sidecars have it]
    #[arg(long, env = "OUTRIGGER_CONTROL_WORKLOAD_API", value_name = "PATH")]
    pub(crate) workload_api: Option<PathBuf>,
    /// Where the API server of a cluster finds the webhooks
    #[arg(long, env = "OUTRIGGER_WEBHOOK", value_name = "ADDR", default_value = "[::]:14443")]
    pub(crate) webhook: SocketAddr,
    #[command(flatten)]
    pub(crate) sidecars: SidecarsArgs,
    /// The format of the log: text, json or auto
    #[arg(long, env = "OUTRIGGER_LOG", value_name = "FORMAT", default_value = "auto")]
    pub(crate) log: String,
    /// What is logged: a level, or a list as info,outrigger::control=debug
    #[arg(long, env = "OUTRIGGER_LOG_LEVEL", value_name = "FILTER", default_value = "info")]
    pub(crate) log_level: String,
}

/// Runs the control plane until SIGTERM or SIGINT.
pub(crate) fn run(args: ControlArgs) -> Result<ExitCode, Failure> {
    super::keep_to_itself()?;
    crate::base::descriptors::open_as_many_as_allowed();
    let format = args.log.parse().map_err(|error: String| Failure::invalid([error]))?;
    log::start(format, &args.log_level).map_err(|error| Failure::invalid([error]))?;
    let trust_domain = args.trust_domain.parse().map_err(|error: SpiffeError| Failure::invalid([error]))?;
    let settings = args.sidecars.settings(&args.trust_domain);
    if let Some(problem) = half_set(&args, &settings) {
        return Err(Failure::invalid([problem]));
    }
    let config = Config {
        source: if args.kubernetes { SourceConfig::Kubernetes } else { SourceConfig::Folders(args.resources) },
        state: args.state,
        trust_domain,
        listen: args.listen,
        api: args.api,
        metrics: args.metrics,
        svid_lifetime: args.svid_ttl.0,
        // Sidecars that are given one do not believe a control plane that is not.
        workload_api: args.workload_api.or_else(|| settings.workload_api.as_ref().map(|api| api.path().into())),
        webhook: WebhookConfig { listen: args.webhook, settings },
    };
    if config.svid_lifetime < SVID_MIN {
        return Err(Failure::invalid([format!("--svid-ttl must be at least {} seconds", SVID_MIN.as_secs())]));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
    runtime.block_on(async {
        let control = Control::build(config, WallClock::system()).await.map_err(refused)?;
        let (drain, guard) = Drain::new();
        let mut terminated = signal(SignalKind::terminate())?;
        let mut interrupted = signal(SignalKind::interrupt())?;
        let mut serving = tokio::spawn(control.serve(guard));
        tokio::select! {
            _ = terminated.recv() => {}
            _ = interrupted.recv() => {}
            ended = &mut serving => {
                ended.map_err(|error| Failure::from(anyhow::Error::from(error)))?;
                return Err(Failure::environment("the control plane ended by itself", "look at its log"));
            }
        }
        if !drain.drain(STOP_MAX).await {
            serving.abort();
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// On a cluster both sides are told where identities come from, or neither: sidecars that were not told would ask their node's agent,
/// for which nothing is signed then, and no pod would start. What is no pod is told by whoever starts it.
fn half_set(args: &ControlArgs, settings: &Settings) -> Option<String> {
    (args.kubernetes && args.workload_api.is_some() && settings.workload_api.is_none()).then(|| {
        "--workload-api: the sidecars that are put into pods would not have their identities from there; write --sidecar-workload-api DRIVER[/SOCKET] too, as csi.spiffe.io"
            .to_owned()
    })
}

fn refused(error: ControlError) -> Failure {
    let remedy = match &error {
        ControlError::Cluster(_) => "run it in a pod of the cluster, or name a configuration in KUBECONFIG",
        ControlError::Authority(CaError::Root { .. }) => {
            "name the trust domain that it is of with --trust-domain, or another folder with --state"
        }
        ControlError::State { .. } | ControlError::Authority(_) => "run as root, or name a folder of your own with --state",
        ControlError::Listen { .. } | ControlError::Door(_) => {
            "stop what listens there, or name another address with --listen, --api or --metrics"
        }
        ControlError::ApiNotLocal(_) | ControlError::TrustDomain(_) => return Failure::invalid([error.to_string()]),
        ControlError::Identity(_) | ControlError::Metrics(_) => "report this with the log",
    };
    let address = match &error {
        ControlError::Listen { address, .. } | ControlError::Door(AdminError::Listen { address, .. }) => Some(*address),
        _ => None,
    };
    let holder = address.and_then(holder).map(|holder| format!(": {holder} listens there")).unwrap_or_default();
    let mut causes = anyhow::Error::from(error).chain().map(ToString::to_string).collect::<Vec<_>>().join(": ");
    causes.truncate(2_000);
    Failure::environment(causes + &holder, remedy)
}

/// The work of the control plane is small beside that of the sidecars on the same machine.
const WORKERS: usize = 2;

/// The shortest life of a certificate: renewal must have time to try again.
const SVID_MIN: Duration = Duration::from_secs(10);

const STOP_MAX: Duration = Duration::from_secs(5);
