//! `outrigger run`: a program as a local pod, from its first system call to its exit code.
//!
//! This process supervises the pod: it answers the pod's questions for names, keeps its sidecar running, passes signals
//! on and removes the pod when the program has ended. Invariant: the program starts after its sidecar is ready, or after
//! the listeners where its connections wait for it stand, and ends before it; a pod without a sidecar is closed, never open.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::process::Child;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{info, warn};

use super::super::{self as cli, Failure, agent};
use super::cgroup::MovesAhead;
use super::places::{self, PodPlaces, UpRecord};
use super::pod::{LocalPod, Wish, cannot};
use super::restarts::Restarts;
use super::user::User;
use super::{RunArgs, cgroup, detach, dns, enrolment, exclusions, pod, visit};
use crate::base::clock::WallClock;
use crate::base::names::{Named, check_part};
use crate::base::problems::{FieldPath, Problem, Severity};
use crate::base::random::Dice;
use crate::base::state;
use crate::model::capture::CaptureConfig;
use crate::model::object::Object;
use crate::model::pod_record::{HOLD, PodPort, PodRecord};
use crate::model::workload::{WorkloadPort, WorkloadSpec, WorkloadTransport};
use crate::node::kernel;
use crate::node::ladder::Rung;
use crate::snapshot::compile;
use crate::telemetry::log::{self, LogFormat};

pub(crate) fn run(args: RunArgs) -> Result<ExitCode, Failure> {
    let wish = wish(&args)?;
    let env = args.env.iter().map(|pair| split(pair, "--env", "K=V")).collect::<Result<Vec<_>, _>>()?;
    let user = args.user.as_deref().map(User::find).transpose()?;
    let mesh = places::mesh()?;
    let places = PodPlaces::new(&mesh.state, &args.namespace, &args.name)?;
    let cgroup_root = cgroup_root()?;
    if args.detach && !detach::is_detached() {
        return detach::go_on();
    }
    detach::leave_the_terminal();
    let _alive = take(&places, &mesh, &cgroup_root)?;
    let moves = MovesAhead::expect(&cgroup_root);
    let pod = LocalPod::make(places.clone(), wish, &mesh, &cgroup_root)?;
    // What the supervisor has to say goes to the pod's log; the terminal is the program's.
    log::start(LogFormat::Text, "off").map_err(|error| Failure::environment(error, "report this"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(supervise(pod, &args, Program { env, user }, &mesh, moves));
    let removed = pod::remove(&places, &mesh.state, &cgroup_root);
    let code = outcome?;
    removed?;
    Ok(code)
}

/// Where cgroup2 is, for commands that need a pod's cgroup.
pub(crate) fn cgroup_root() -> Result<PathBuf, Failure> {
    kernel::find_cgroup2().map_err(|error| Failure::environment(crate::node::chain(&error), error.remedy()))
}

/// The lock that says that the pod lives; what a crash left of an earlier one is removed.
fn take(places: &PodPlaces, mesh: &UpRecord, cgroup_root: &std::path::Path) -> Result<File, Failure> {
    let locked = || {
        places::folder(&places.runtime(), 0o755)?;
        state::try_lock(&places.lock())
    };
    let running = || {
        let name = &places.pod.name;
        Failure::environment(
            format!("the pod {} is running already", places.pod),
            format!("stop it with `outrigger stop {name} -n {}`, or choose another name", places.pod.namespace),
        )
    };
    let held = locked().map_err(|error| cannot("make the pod's folder", &error))?.ok_or_else(running)?;
    if places.record().exists() || places.netns().1.exists() || places.cgroup(cgroup_root).exists() {
        pod::remove(places, &mesh.state, cgroup_root)?;
        // The lock went with the folder.
        drop(held);
        return locked().map_err(|error| cannot("make the pod's folder", &error))?.ok_or_else(running);
    }
    Ok(held)
}

/// What was asked for the program beyond its command.
struct Program {
    env: Vec<(String, String)>,
    user: Option<User>,
}

async fn supervise(
    mut pod: LocalPod,
    args: &RunArgs,
    program: Program,
    mesh: &UpRecord,
    moves: Option<MovesAhead>,
) -> Result<ExitCode, Failure> {
    // Signals first: from here one of them ends the pod in order.
    let mut signals = Signals::listen().map_err(|error| cannot("listen for signals", &error))?;
    let sockets = dns::Sockets::bind(&pod.netns).map_err(|error| cannot("answer for names inside the pod", &error))?;
    let view = if pod.record.meshed { dns::View::Meshed } else { dns::View::Outside };
    let names = mesh.state.join("names.json");
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { drop(dns::serve(sockets, names, view).await) });
    pod.publish()?;

    let mut sidecar = Sidecar::none(Dice::from_seed(u64::from(std::process::id())));
    if pod.record.meshed {
        let started = async {
            match args.sidecar_after {
                None => start_sidecar(&pod, mesh, &mut sidecar).await?,
                Some(after) => {
                    make_listeners(&pod, mesh).await?;
                    sidecar.start_at(Instant::now() + after.0);
                }
            }
            exclusions::tell(&pod.record, mesh).await;
            Ok::<(), Failure>(())
        };
        // Cancel-safe: a signal ends the pod, whatever was reached.
        tokio::select! {
            started = started => started?,
            signal = signals.next() => {
                stop_sidecar(&mut sidecar).await;
                return Ok(ExitCode::from(exit_code_of_signal(signal)));
            }
        }
    } else {
        pod.open()?;
    }
    let outcome = run_app(&mut pod, args, program, mesh, &mut sidecar, &mut signals, moves).await;
    // The program has ended; what it left running ends with it.
    if let Err(error) = cgroup::kill(&pod.record.cgroup.join("app")) {
        warn!(%error, "cannot end what the program left running");
    }
    stop_sidecar(&mut sidecar).await;
    outcome
}

async fn run_app(
    pod: &mut LocalPod,
    args: &RunArgs,
    program: Program,
    mesh: &UpRecord,
    sidecar: &mut Sidecar,
    signals: &mut Signals,
    moves: Option<MovesAhead>,
) -> Result<ExitCode, Failure> {
    let mut command = pod::app_command(&pod.places, &pod.record, &args.command, program.user.as_ref(), Some(Signal::KILL))?;
    command.envs(program.env);
    if detach::is_detached() {
        let log = pod.places.log("");
        let out = File::options().create(true).append(true).open(&log).map_err(|error| cannot("open the pod's log", &error))?;
        let err = out.try_clone().map_err(|error| cannot("open the pod's log", &error))?;
        command.stdin(std::process::Stdio::null()).stdout(out).stderr(err);
    }
    let mut app = match tokio::process::Command::from(command).spawn() {
        Ok(app) => app,
        Err(error) => return not_started(&args.command, &error),
    };
    drop(moves);
    // From here `exec` finds the pod: its sidecar is ready.
    File::create(pod.places.started()).map_err(|error| cannot("write into the pod's folder", &error))?;
    if detach::is_detached() {
        detach::report(&ready(&pod.record), &pod.places.log(".supervisor"))?;
        if let Err(error) = log::set_filter("info") {
            warn!(%error, "the log stays off");
        }
    }
    loop {
        // Cancel-safe: each arm may be asked again.
        tokio::select! {
            status = app.wait() => {
                pod.terminate();
                let status = status.map_err(|error| cannot("wait for the program", &error))?;
                return Ok(ExitCode::from(exit_code(status)));
            }
            signal = signals.next() => {
                if signal == Signal::TERM || signal == Signal::INT {
                    pod.terminate();
                }
                if let Some(pid) = app.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw)
                    && let Err(error) = kill_process(pid, signal)
                {
                    warn!(%error, "cannot pass a signal on");
                }
            }
            ended = sidecar.turn() => match ended {
                Some(status) => sidecar.start_later(&status),
                None => if let Err(failure) = sidecar.start(pod, mesh) {
                    sidecar.start_later(&failure);
                }
            },
        }
    }
}

/// Enrols the pod and starts its sidecar; returns when the sidecar is ready.
async fn start_sidecar(pod: &LocalPod, mesh: &UpRecord, sidecar: &mut Sidecar) -> Result<(), Failure> {
    enrolment::wait_for(pod).await?;
    pod.open()?;
    sidecar.start(pod, mesh)?;
    let address = pod.record.addresses.first().copied().ok_or_else(|| Failure::invalid(["the pod has no address"]))?;
    let server = SocketAddr::new(address, SIDECAR_READY_PORT);
    let begun = Instant::now();
    let log = pod.places.log(".sidecar");
    let mut told = false;
    loop {
        if answers(server, "/ready").await {
            info!(after_ms = begun.elapsed().as_millis(), "sidecar ready");
            return Ok(());
        }
        if let Some(status) = sidecar.has_ended() {
            let why = last_line(&log);
            return Err(Failure::environment(
                format!("the sidecar ended before it was ready ({status}){why}"),
                format!("look into {}", log.display()),
            ));
        }
        if begun.elapsed() > USUALLY_READY && !std::mem::replace(&mut told, true) {
            let (at_most, why) = (READY_AT_MOST.as_secs(), last_line(&log));
            cli::warn(&format!("the sidecar is not ready yet; waiting for it, {at_most} s at most{why}"));
        }
        if begun.elapsed() > READY_AT_MOST {
            let why = last_line(&log);
            return Err(Failure::environment(
                format!("the sidecar was not ready after {} s{why}", READY_AT_MOST.as_secs()),
                format!("look into {}, and whether `outrigger status` is well", log.display()),
            ));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Enrols the pod and makes its sidecar's listeners: connections wait there from now on.
async fn make_listeners(pod: &LocalPod, mesh: &UpRecord) -> Result<(), Failure> {
    enrolment::wait_for(pod).await?;
    pod.open()?;
    let mut maker = tokio::process::Command::from(pod::listeners_command(pod, mesh)?);
    let log = pod.places.log(".sidecar");
    let not_made = |why: String| {
        let text = format!("the sidecar's listeners could not be made ({why}){}", last_line(&log));
        Failure::environment(text, format!("look into {}", log.display()))
    };
    match tokio::time::timeout(enrolment::AT_MOST, maker.kill_on_drop(true).status()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(not_made(status.to_string())),
        Ok(Err(error)) => Err(not_made(error.to_string())),
        Err(_elapsed) => Err(not_made("it took too long".to_owned())),
    }
}

/// Does a GET of `path` answer 200?
pub(crate) async fn answers(server: SocketAddr, path: &str) -> bool {
    let asked = async {
        let mut stream = TcpStream::connect(server).await?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: {server}\r\nconnection: close\r\n\r\n").as_bytes()).await?;
        let mut head = [0; 12];
        stream.read_exact(&mut head).await?;
        Ok::<bool, io::Error>(head.ends_with(b" 200"))
    };
    matches!(tokio::time::timeout(ASK_AT_MOST, asked).await, Ok(Ok(true)))
}

/// The pod's sidecar, which is started anew whenever it ends. Pods outside the mesh have none, and it is never due.
struct Sidecar {
    child: Option<Child>,
    restarts: Restarts,
}

impl Sidecar {
    const fn none(dice: Dice) -> Self {
        Self { child: None, restarts: Restarts::new(dice) }
    }

    fn start(&mut self, pod: &LocalPod, mesh: &UpRecord) -> Result<(), Failure> {
        let command = pod::sidecar_command(pod, mesh)?;
        let child = tokio::process::Command::from(command).spawn();
        self.child = Some(child.map_err(|error| cannot("start the sidecar", &error))?);
        self.restarts.started(Instant::now());
        Ok(())
    }

    /// It is not there yet: [`Self::turn`] says when it is due.
    const fn start_at(&mut self, due: Instant) {
        self.restarts.first_at(due);
    }

    fn has_ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(|child| child.try_wait().ok().flatten())
    }

    /// Returns how it ended, or nothing when it is due. Cancel-safe.
    async fn turn(&mut self) -> Option<ExitStatus> {
        if let Some(child) = &mut self.child {
            let status = child.wait().await.unwrap_or_default();
            self.child = None;
            return Some(status);
        }
        let Some(due) = self.restarts.due() else { return std::future::pending().await };
        tokio::time::sleep_until(due).await;
        None
    }

    fn start_later(&mut self, why: &dyn fmt::Display) {
        let clock = WallClock::system();
        let told = self.restarts.ended(Instant::now(), &clock, why);
        warn!(sidecar = told.clause(clock.since_epoch()), "the sidecar is started anew");
    }
}

/// Lets the sidecar finish what it carries, then ends it.
async fn stop_sidecar(sidecar: &mut Sidecar) {
    let Some(mut child) = sidecar.child.take() else { return };
    visit::signal(child.id().unwrap_or(0).cast_signed(), Signal::TERM);
    if tokio::time::timeout(DRAIN_AT_MOST, child.wait()).await.is_err() {
        drop(child.kill().await);
    }
}

/// The signals that are passed on to the program.
struct Signals {
    received: mpsc::Receiver<Signal>,
    _listeners: JoinSet<()>,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        let (send, received) = mpsc::channel(8);
        let mut listeners = JoinSet::new();
        // A key pressed at the terminal reaches the program by itself: passing it on would make two of one.
        let at_the_terminal = in_front_of_a_terminal();
        for (kind, number, from_a_key) in [
            (SignalKind::terminate(), Signal::TERM, false),
            (SignalKind::hangup(), Signal::HUP, false),
            (SignalKind::user_defined1(), Signal::USR1, false),
            (SignalKind::user_defined2(), Signal::USR2, false),
            (SignalKind::interrupt(), Signal::INT, true),
            (SignalKind::quit(), Signal::QUIT, true),
        ] {
            let (mut arrivals, send) = (signal(kind)?, send.clone());
            listeners.spawn(async move {
                while arrivals.recv().await.is_some() {
                    if !(from_a_key && at_the_terminal) && send.send(number).await.is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Self { received, _listeners: listeners })
    }

    /// The next one. Cancel-safe.
    async fn next(&mut self) -> Signal {
        match self.received.recv().await {
            Some(signal) => signal,
            None => std::future::pending().await,
        }
    }
}

/// Is this process in the group that the keys of a terminal reach?
fn in_front_of_a_terminal() -> bool {
    let Ok(terminal) = File::open("/dev/tty") else { return false };
    rustix::termios::tcgetpgrp(terminal).is_ok_and(|front| front == rustix::process::getpgrp())
}

fn wish(args: &RunArgs) -> Result<Wish, Failure> {
    let annotations = pairs(&args.annotations, "--annotation")?;
    CaptureConfig::of(&annotations).map_err(|error| Failure::invalid([error]))?;
    let annotated = CaptureConfig::hold(&annotations).map_err(|error| Failure::invalid([error]))?;
    let wish = Wish {
        service_account: args.service_account.clone(),
        labels: pairs(&args.labels, "--label")?,
        annotations,
        ports: args.ports.iter().map(|text| port(text)).collect::<Result<_, _>>()?,
        meshed: !args.no_sidecar,
        unprotected: args.unprotected && captures_nothing()?,
        hold: args.hold.map(|hold| hold.0).or(annotated).unwrap_or(HOLD),
    };
    let faults = faults(&Named::new(args.namespace.as_str(), args.name.as_str()), &wish);
    if faults.is_empty() { Ok(wish) } else { Err(Failure::invalid(faults)) }
}

/// Does the agent stand on the rung on which nothing is captured? Where it captures, nobody is left unprotected.
fn captures_nothing() -> Result<bool, Failure> {
    let report = agent::capture().map_err(|error| {
        let remedy = "look into the log folder of the mesh's state, file node.log";
        Failure::environment(format!("the node agent does not tell how it captures: {error}"), remedy)
    })?;
    Ok(report.standing.rung == Rung::Explicit)
}

/// What is wrong with the pod by the rules of every Workload, in the words of the command line.
fn faults(pod: &Named, wish: &Wish) -> Vec<String> {
    let spec = WorkloadSpec {
        service_account: Some(wish.service_account.clone()),
        ports: wish.ports.iter().map(WorkloadPort::from).collect(),
        transport: if wish.meshed { WorkloadTransport::MutualTls } else { WorkloadTransport::Plaintext },
        ..WorkloadSpec::default()
    };
    let problems = compile::pod(&Object::new(pod, wish.labels.clone(), spec)).into_vec().into_iter();
    let refused = problems.filter(|problem| problem.severity == Severity::Refuses);
    let flag = |at: &FieldPath| match at.as_str() {
        "metadata.name" => "NAME".to_owned(),
        "metadata.labels" => "--label".to_owned(),
        "spec.serviceAccount" => "--service-account".to_owned(),
        port => {
            let ports = FieldPath::root().field("spec").field("ports");
            let is_at = |index: &usize| port.starts_with(ports.index(*index).as_str());
            let written = (0..wish.ports.len()).find(is_at).and_then(|index| wish.ports.get(index));
            written.map_or_else(|| "--port".to_owned(), |port| format!("--port {}:{}", port.name, port.port))
        }
    };
    refused.map(|Problem { at, text, remedy, .. }| format!("{}: {text}; {remedy}", flag(&at))).collect()
}

/// Each key once: of two the user means one, and nobody else knows which.
fn pairs(texts: &[String], flag: &str) -> Result<BTreeMap<String, String>, Failure> {
    let mut pairs = BTreeMap::new();
    for text in texts {
        let (key, value) = split(text, flag, "K=V")?;
        if let Some(before) = pairs.insert(key.clone(), value) {
            return Err(Failure::invalid([format!("{flag} {key} is written twice, first as {before:?}; write each key once")]));
        }
    }
    Ok(pairs)
}

fn split(pair: &str, flag: &str, form: &str) -> Result<(String, String), Failure> {
    match pair.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _no_pair => Err(Failure::invalid([format!("{flag} {pair:?}: write it as {form}")])),
    }
}

fn port(text: &str) -> Result<PodPort, Failure> {
    let fail =
        || Failure::invalid([format!("--port {text:?}: write it as NAME:PORT or NAME:PORT:APPPROTOCOL, for example http:8080")]);
    let (name, rest) = text.split_once(':').ok_or_else(fail)?;
    let (number, app_protocol) = match rest.split_once(':') {
        Some((number, protocol)) if !protocol.is_empty() => (number, Some(protocol.to_owned())),
        Some(_empty) => return Err(fail()),
        None => (rest, None),
    };
    let not_a_port = || Failure::invalid([format!("--port {text:?}: {number:?} is not a port; write 1 to 65535")]);
    let port = number.parse().ok().filter(|port| *port != 0).ok_or_else(not_a_port)?;
    check_part(name).map_err(|_not_a_name| fail())?;
    if let Some(word) = app_protocol.as_deref().filter(|word| !compile::is_protocol(word)) {
        return Err(Failure::invalid([format!(
            "--port {text:?}: {word:?} is no protocol that means something here; {}",
            compile::PROTOCOLS
        )]));
    }
    Ok(PodPort { name: name.to_owned(), port, app_protocol })
}

fn ready(record: &PodRecord) -> String {
    let addresses: Vec<String> = record.addresses.iter().map(ToString::to_string).collect();
    format!("{} is running at {}\n", record.named(), addresses.join(" "))
}

/// As a shell says it: 127 for a program that is not there, 126 for one that cannot be run.
fn not_started(command: &[std::ffi::OsString], error: &io::Error) -> Result<ExitCode, Failure> {
    let program = command.first().map(|program| program.to_string_lossy().into_owned()).unwrap_or_default();
    let code = match error.kind() {
        io::ErrorKind::NotFound => 127,
        io::ErrorKind::PermissionDenied => 126,
        _other => return Err(cannot(&format!("start {program}"), error)),
    };
    cli::warn(&format!("outrigger: cannot start {program}: {error}"));
    Ok(ExitCode::from(code))
}

pub(super) fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(u8::MAX)
}

fn exit_code_of_signal(signal: Signal) -> u8 {
    u8::try_from(128 + signal.as_raw()).unwrap_or(u8::MAX)
}

/// The last line of a log, to say with a failure.
fn last_line(log: &std::path::Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines().rev().find(|line| !line.trim().is_empty()).map(|line| format!(": {}", line.trim())).unwrap_or_default()
}

const SIDECAR_READY_PORT: u16 = 14_021;
const POLL: Duration = Duration::from_millis(5);
const ASK_AT_MOST: Duration = Duration::from_secs(1);
const READY_AT_MOST: Duration = Duration::from_secs(20);
/// A control plane or a node agent that is away keeps it from that.
const USUALLY_READY: Duration = Duration::from_secs(2);
const DRAIN_AT_MOST: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_has_a_name_a_number_and_perhaps_a_protocol() {
        assert_eq!(port("http:8080").unwrap(), PodPort { name: "http".into(), port: 8080, app_protocol: None });
        assert_eq!(port("api:9000:kubernetes.io/h2c").unwrap().app_protocol.as_deref(), Some("kubernetes.io/h2c"));
        for bad in ["8080", "http", "http:0", "http:70000", "http:80:", ":80", "HTTP:80"] {
            assert!(port(bad).is_err(), "{bad}");
        }
        let told = format!("{:?}", port("http:80:x").unwrap_err());
        assert!(told.contains("is no protocol") && told.contains("write http, http2, grpc, tcp"), "{told}");
        for bad in ["http:99999", "http:0", "http:x"] {
            let told = format!("{:?}", port(bad).unwrap_err());
            assert!(told.contains("write 1 to 65535"), "{told}");
        }
    }

    #[test]
    fn a_pod_is_refused_by_the_rules_of_every_workload_before_it_is_made() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: RunArgs,
        }
        let told = |line: &str| {
            let words = std::iter::once("run").chain(line.split(' ')).chain(["--", "true"]);
            let args = <Line as clap::Parser>::try_parse_from(words).unwrap().args;
            wish(&args).err().map(|failure| (failure.code, format!("{failure:?}")))
        };
        assert_eq!(told("web-1 -n shop --label app=web --label example.com/tier= --port http:8080 --port db:5432"), None);
        let hold = |line: &str| {
            let words = std::iter::once("run").chain(line.split(' ')).chain(["--", "true"]);
            wish(&<Line as clap::Parser>::try_parse_from(words).unwrap().args).unwrap().hold
        };
        assert_eq!(hold("web"), HOLD);
        assert_eq!(hold("web --annotation outrigger.dev/hold=0"), Duration::ZERO);
        assert_eq!(hold("web --annotation outrigger.dev/hold=2s --hold 3s"), Duration::from_secs(3));
        // Where there is no sidecar, it has no ports.
        assert_eq!(told("web-1 --no-sidecar --port a:14021"), None);
        let long = "a".repeat(80);
        for (line, part) in [
            ("web --label app=a,b", "--label: \\\"a,b\\\" is not the value of a label"),
            ("web --label=-=b", "is not the key of a label"),
            ("web --annotation outrigger.dev/hold=soon", "annotation outrigger.dev/hold: "),
            ("web --label app=a --label app=b", "--label app is written twice"),
            (&*long, "has 80 letters"),
            ("web --port http:80 --port http:81", "--port http:81: a port is named"),
            ("web --port a:80 --port b:80", "--port b:80: port 80 is there already"),
            ("web --port a:80 --port b:14001", "--port b:14001: 14001 is a port of the sidecar's own"),
            ("web --port a:14006", "never the application's; write a port of the application"),
            ("web --port a:14020", "--port a:14020: 14020 is"),
            ("web --port a:14021", "--port a:14021: 14021 is"),
            ("web --service-account A", "--service-account: "),
        ] {
            let (code, text) = told(line).unwrap();
            assert!(code == 2 && text.contains(part), "{line}: {text}");
        }
    }

    #[test]
    fn a_label_is_a_pair() {
        assert_eq!(split("app=web=1", "--label", "K=V").unwrap(), ("app".into(), "web=1".into()));
        assert!(split("app", "--label", "K=V").is_err());
        assert!(split("=web", "--label", "K=V").is_err());
    }

    #[test]
    fn a_program_ended_by_a_signal_exits_as_a_shell_says_it() {
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(15)), 143);
    }
}
