//! `outrigger sidecar`: builds the proxy of one pod and waits for its end.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::Failure;
use crate::admin::{Admin, AdminError, Door, listen, listen_operator, routes};
use crate::base::clock::WallClock;
use crate::base::names::{Named, check_name};
use crate::base::units::Span;
use crate::dataplane::{Settings, Sidecar, StartError, TcpDial, Way, Window, Workers, app, listen_only, resume};
use crate::identity::source::Identity;
use crate::identity::spiffe::TrustDomain;
use crate::model::app_doors::AppDoors;
use crate::telemetry::Telemetry;
use crate::telemetry::access_log::{AccessLog, AccessLogTarget};
use crate::telemetry::export::SpanExport;
use crate::telemetry::log::{self, LogFormat};
use crate::telemetry::metrics::Metrics;

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  outrigger sidecar --namespace shop --name web-1 --state ./web-1")]
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
    pub(crate) trust_domain: TrustDomain,
    /// Where spans are exported to (OTLP over gRPC)
    #[arg(long, env = "OUTRIGGER_OTLP", value_name = "URL")]
    pub(crate) otlp: Option<String>,
    /// The format of the log: text, json or auto
    #[arg(long, env = "OUTRIGGER_LOG", value_name = "FORMAT", default_value = "auto")]
    pub(crate) log: LogFormat,
    /// What is logged: a level, or a list as `info,outrigger::dataplane=debug`
    #[arg(long, env = "OUTRIGGER_LOG_LEVEL", value_name = "FILTER", default_value = "info")]
    pub(crate) log_level: String,
    /// What is asked of the own application in the place of others, as the injection writes it (JSON)
    #[arg(long, env = "OUTRIGGER_PROBES", value_name = "JSON", default_value = "{}")]
    pub(crate) probes: AppDoors,
    /// Where the access log goes; `-` is stdout
    #[arg(long, env = "OUTRIGGER_ACCESS_LOG", value_name = "PATH")]
    pub(crate) access_log: Option<PathBuf>,
    /// How long connections may go on when the sidecar stops
    #[arg(long, env = "OUTRIGGER_DRAIN_TIMEOUT", value_name = "DURATION", default_value = "30s")]
    pub(crate) drain_timeout: Span,
    /// Threads that carry traffic; `auto`: as many as the processors that the CPU limit has room for
    #[arg(long, env = "OUTRIGGER_WORKERS", value_name = "NUMBER|auto", default_value = "1")]
    pub(crate) workers: Workers,
    /// Make the pod's listeners, hand them to the node agent, where connections wait in them for the sidecar, and end
    #[arg(long)]
    pub(crate) listen_only: bool,
    /// Be a proxy that the own application asks, for nothing captures its connections
    #[arg(long)]
    pub(crate) forward_proxy: bool,
    /// Repeats the random choices of another run; drawn and logged when absent
    #[arg(long, env = "OUTRIGGER_SEED", value_name = "NUMBER")]
    pub(crate) seed: Option<u64>,
}

pub(crate) fn run(args: SidecarArgs) -> Result<ExitCode, Failure> {
    super::keep_to_itself()?;
    crate::base::descriptors::open_as_many_as_allowed();
    log::start(args.log, &args.log_level).map_err(|error| Failure::invalid([error]))?;
    for name in [&args.namespace, &args.name] {
        check_name(name).map_err(|error| Failure::invalid([error]))?;
    }
    let name = Named::new(args.namespace, args.name);
    if args.listen_only {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(listen_only(&args.node, &name)).map_err(anyhow::Error::from)?;
        return Ok(ExitCode::SUCCESS);
    }
    let clock = WallClock::system();
    let seed = args.seed.unwrap_or_else(|| {
        let time = u64::try_from(clock.since_epoch().as_nanos() & u128::from(u64::MAX)).unwrap_or(0);
        time ^ u64::from(std::process::id()).rotate_left(32)
    });
    tracing::info!(sidecar = %name, seed, "starting");

    let metrics = Arc::new(Metrics::new().map_err(anyhow::Error::from)?);
    let access_log = match args.access_log {
        Some(path) => {
            let target = if path.as_os_str() == "-" { AccessLogTarget::Stdout } else { AccessLogTarget::File(path) };
            let log = AccessLog::start(&target, metrics.access_log_dropped.clone());
            Some(Arc::new(log.map_err(anyhow::Error::from)?))
        }
        None => None,
    };
    let spans = match args.otlp {
        Some(url) => Some(Arc::new(SpanExport::start(&url, &name, &metrics).map_err(|error| Failure::invalid([error]))?)),
        None => None,
    };
    let telemetry = Telemetry { metrics, access_log, spans };
    let identity = Identity::new(args.trust_domain.clone(), clock);
    let window = Window::new(identity.clone(), telemetry.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (kept, public) = runtime.block_on(let_in(&args.node, &name)).map_err(anyhow::Error::from)?;
    let loopback = listen(SocketAddr::from((Ipv4Addr::LOCALHOST, proxy_common::PORT_ADMIN))).map_err(anyhow::Error::from)?;
    let shown = || Arc::clone(&window) as Arc<dyn routes::Inspect>;
    let dial = Arc::new(TcpDial::new(telemetry.metrics.clients_undeclared.clone()));
    let apps = app::routes(args.probes, &window, &telemetry.metrics, dial);
    let mut doors =
        vec![(Door::Address(public), routes::public(shown()).merge(apps)), (Door::Address(loopback), routes::loopback(shown()))];
    match listen_operator(&args.state.join(routes::OPERATOR_SOCKET)) {
        Ok(socket) => doors.push((Door::Operator(socket), routes::operator(shown()))),
        // A folder that cannot be written to costs the kept configuration as well, and is no reason to close the pod.
        Err(error) => tracing::warn!(error = %format!("{:#}", anyhow::Error::from(error)), "operators can change nothing here"),
    }
    let _admin = Admin::start(doors).map_err(anyhow::Error::from)?;

    let settings = Settings {
        name,
        trust_domain: args.trust_domain,
        control: args.control,
        workload_api: args.workload_api,
        node: args.node,
        kept,
        state: args.state,
        drain: args.drain_timeout.0,
        workers: args.workers,
        way: if args.forward_proxy { Way::Asked } else { Way::Captured },
        seed,
    };
    runtime.block_on(async {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        // Nothing was taken yet that would have to end well.
        let mut sidecar = tokio::select! {
            started = Sidecar::start(settings, identity, telemetry, &window) => started.map_err(anyhow::Error::from)?,
            _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
            _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
        };
        let serve = async {
            sidecar.open().await?;
            // Until it is told to stop.
            std::future::pending().await
        };
        // A signal may come while it still waits for its identity.
        let served: Result<(), StartError> = tokio::select! {
            failed = serve => failed,
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
            () = window.drain_asked() => Ok(()),
        };
        served.map_err(anyhow::Error::from)?;
        sidecar.stop().await;
        Ok(ExitCode::SUCCESS)
    })
}

/// Takes over what a former sidecar of the pod left, and the first of the own ports. The kernel gives those of a pod that is
/// enrolled to its sidecar's container alone, and the one that takes another's place is known once the node agent was asked.
async fn let_in(node: &Path, name: &Named) -> Result<(Vec<OwnedFd>, std::net::TcpListener), AdminError> {
    let mut told = false;
    loop {
        let kept = resume(node, name).await;
        match listen(SocketAddr::from((Ipv6Addr::UNSPECIFIED, proxy_common::PORT_METRICS))) {
            Ok(public) => return Ok((kept, public)),
            Err(error) if error.is_denied() => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(
                        node = %node.display(),
                        "the pod's ports are its former sidecar's until the node agent lets this one in; it is asked again"
                    );
                }
                tokio::time::sleep(ASKED_AGAIN_AFTER).await;
            }
            Err(error) => return Err(error),
        }
    }
}

const ASKED_AGAIN_AFTER: Duration = Duration::from_millis(200);
