//! `outrigger up`: the control plane and the node agent of this machine, each a process of this binary under one
//! supervisor, which starts them again when they end.
//!
//! Stopping it leaves the pods running, captured and closed to what is new to them: the next `up` finds them again.
//! `outrigger down` removes everything.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::process::Signal;
use rustix::thread::CapabilitySet;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, ChildStderr};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::super::patience::Part;
use super::super::{Failure, print, warn};
use super::places::{self, GATEWAY_V4, PodPlaces, UpRecord, folder, runtime};
use super::pod::cannot;
use super::ports::{API_PORT, CONTROL_METRICS_PORT, NODE_METRICS_PORT, STREAM_PORT};
use super::restarts::Restarts;
use super::run::{answers, cgroup_root};
use super::watched::{self, Watched};
use super::{UpArgs, cgroup, detach, links, pod, ports, visit};
use crate::base::clock::WallClock;
use crate::base::random::Dice;
use crate::base::state;
use crate::identity::spiffe::TrustDomain;
use crate::node::ladder::{Ladder, Rung};
use crate::node::undescribed::is_populated;

pub(crate) fn up(args: UpArgs) -> Result<ExitCode, Failure> {
    let _checked: TrustDomain = args.trust_domain.parse().map_err(|error| Failure::invalid([error]))?;
    for folder in &args.resources {
        if !folder.is_dir() {
            return Err(Failure::invalid([format!("--resources {}: there is no such folder", folder.display())]));
        }
    }
    check_capabilities(args.capture)?;
    let cgroup_root = cgroup_root()?;
    if args.detach && !detach::is_detached() {
        return detach::go_on();
    }
    detach::leave_the_terminal();
    let mut lock = places::take_mesh_lock().map_err(|error| cannot("lock the mesh", &error))?.ok_or_else(already_up)?;
    // For `down`, which may come before the record is written.
    lock.set_len(0).and_then(|()| write!(lock, "{}", std::process::id())).map_err(|error| cannot("lock the mesh", &error))?;
    let state = prepare(&args, &cgroup_root)?;
    let watched = watched::decide(&args.resources, &state).map_err(|error| cannot("remember what is watched", &error))?;
    for folder in &watched.left {
        warn(&format!("{} is watched no more: what stands in it is not in force now", folder.display()));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(supervise(&args, &watched, &state, &cgroup_root));
    // Absent, where the mesh was never ready.
    drop(std::fs::remove_file(places::runtime("up.json")));
    outcome
}

fn already_up() -> Failure {
    let place = places::read_up_record().map(|record| format!(", with its state in {}", record.state.display()));
    let text = format!("a mesh is up on this machine already{}", place.unwrap_or_default());
    Failure::environment(text, "use it, or stop it with `outrigger down`")
}

/// What the supervisor, the agent and `run` need, by the names of capabilities(7).
fn check_capabilities(ladder: Ladder) -> Result<(), Failure> {
    let missing = missing_capabilities(ladder).map_err(|error| cannot("ask for own capabilities", &error))?;
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::environment(format!("this process lacks {}", missing.join(", ")), "run it as root, for example with sudo"))
}

/// Those that this process does not have.
///
/// # Errors
/// The kernel does not tell.
pub(crate) fn missing_capabilities(ladder: Ladder) -> io::Result<Vec<&'static str>> {
    let held = rustix::thread::capabilities(None)?.effective;
    let loads = matches!(ladder, Ladder::Auto | Ladder::Only(Rung::Ebpf));
    let programs = loads.then_some(PROGRAMS).into_iter().flatten();
    Ok(NEEDED
        .into_iter()
        .chain(programs)
        .filter(|(capability, _name)| !held.contains(*capability))
        .map(|(_capability, name)| name)
        .collect())
}

/// Folders, token, bridge; and what a crash left of pods whose supervisor is gone is removed.
fn prepare(args: &UpArgs, cgroup_root: &Path) -> Result<PathBuf, Failure> {
    let made = || {
        folder(&args.state, 0o700)?;
        let state = std::fs::canonicalize(&args.state)?;
        for name in ["pods", "log", "ca", "resources"] {
            folder(&state.join(name), 0o700)?;
        }
        // Sidecars find their own folder in it, by its name alone.
        folder(&state.join("sidecars"), 0o711)?;
        folder(&runtime("pods"), 0o755)?;
        let token = state.join("join-token");
        if !token.exists() {
            let mut bytes = [0; 32];
            aws_lc_rs::rand::fill(&mut bytes).map_err(|_unspecified| io::Error::other("no randomness"))?;
            let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            state::write_durable(&token, text.as_bytes(), 0o600)?;
        }
        Ok(state)
    };
    let state = made().map_err(|error: io::Error| {
        let remedy = "run as root, or name another folder with --state";
        Failure::environment(format!("cannot prepare {}: {error}", args.state.display()), remedy)
    })?;
    check_no_other_mesh(&state, cgroup_root)?;
    sweep(&state, cgroup_root)?;
    links::make_bridge()?;
    Ok(state)
}

/// Pods in which a process lives, whoever's they are, with their places in `state`.
fn running(state: &Path, cgroup_root: &Path) -> impl Iterator<Item = PodPlaces> {
    let entries = std::fs::read_dir(cgroup_root.join(cgroup::PODS)).into_iter().flatten().flatten();
    let stems = entries.filter(|entry| is_populated(&entry.path())).filter_map(|entry| entry.file_name().into_string().ok());
    stems.filter_map(|stem| PodPlaces::of_stem(state, &stem))
}

/// The state that pods which run were started with.
pub(crate) fn state_of_pods(cgroup_root: &Path) -> Option<PathBuf> {
    running(Path::new(places::STATE), cgroup_root)
        .find_map(|places| std::fs::read_to_string(places.state_note()).ok())
        .map(PathBuf::from)
}

/// Pods outlive the mesh that they belong to. One that knows nothing of them would leave them without identity and policy.
fn check_no_other_mesh(state: &Path, cgroup_root: &Path) -> Result<(), Failure> {
    let strangers: Vec<PodPlaces> = running(state, cgroup_root).filter(|places| !places.record().exists()).collect();
    let Some(first) = strangers.first() else { return Ok(()) };
    let names: Vec<String> = strangers.iter().take(NAMED_MAX).map(|places| places.pod.to_string()).collect();
    let more = if strangers.len() > NAMED_MAX { format!(" and {} more", strangers.len() - NAMED_MAX) } else { String::new() };
    let theirs = std::fs::read_to_string(first.state_note()).unwrap_or_else(|_none| "DIR".to_owned());
    let end = format!("`outrigger down --state {theirs}` ends them");
    Err(Failure::environment(
        format!("pods run that {} knows nothing of: {}{more}", state.display(), names.join(", ")),
        if Path::new(&theirs) == state { end } else { format!("`outrigger up --state {theirs}` takes them over, {end}") },
    ))
}

/// Removes pods whose supervisor is gone: nobody else would end what is left of them, or take them out of their Services.
fn sweep(state: &Path, cgroup_root: &Path) -> Result<(), Failure> {
    for places in pods_of(state) {
        if !places.is_alive().map_err(|error| cannot("look at a pod's lock", &error))? {
            pod::remove(&places, state, cgroup_root)?;
        }
    }
    Ok(())
}

async fn sweep_for_ever(state: PathBuf, cgroup_root: PathBuf) {
    loop {
        tokio::time::sleep(SWEEP_EVERY).await;
        let (state, cgroup_root) = (state.clone(), cgroup_root.clone());
        // It waits for processes to be gone; the supervisor has others to look after meanwhile.
        let swept = tokio::task::spawn_blocking(move || sweep(&state, &cgroup_root)).await;
        if let Ok(Err(failure)) = swept {
            warn(&format!("a pod without supervisor was not removed: {failure:?}"));
        }
    }
}

/// Every pod that a record tells of.
pub(crate) fn pods_of(state: &Path) -> Vec<PodPlaces> {
    let entries = std::fs::read_dir(state.join("pods")).into_iter().flatten().flatten();
    let stems = entries.filter_map(|entry| entry.file_name().to_string_lossy().strip_suffix(".json").map(str::to_owned));
    stems.filter_map(|stem| PodPlaces::of_stem(state, &stem)).collect()
}

async fn supervise(args: &UpArgs, watched: &Watched, state: &Path, cgroup_root: &Path) -> Result<ExitCode, Failure> {
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| cannot("listen for signals", &error))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| cannot("listen for signals", &error))?;
    let mut dice = Dice::from_seed(u64::from(std::process::id()));
    let mut control = Role::new(Part::Control, control_arguments(args, watched, state), state, &mut dice);
    let mut node = Role::new(Part::Node, node_arguments(args, state), state, &mut dice);
    ports::all_free().await?;
    let begun = Instant::now();
    control.start()?;
    node.start()?;
    let mut record = UpRecord {
        supervisor: std::process::id(),
        control: 0,
        node: 0,
        state: state.to_owned(),
        trust_domain: args.trust_domain.clone(),
        stream: SocketAddr::new(GATEWAY_V4.into(), STREAM_PORT),
        api: format!("http://127.0.0.1:{API_PORT}"),
        dashboard: format!("http://127.0.0.1:{API_PORT}/"),
        restarted: BTreeMap::new(),
    };
    let mut sweeper = JoinSet::new();
    sweeper.spawn(sweep_for_ever(state.to_owned(), cgroup_root.to_owned()));
    let (mut ready, clock) = (false, WallClock::system());
    let outcome = loop {
        // Cancel-safe: each arm may be asked again.
        let turn = tokio::select! {
            _signal = terminate.recv() => break Ok(ExitCode::SUCCESS),
            _signal = interrupt.recv() => break Ok(ExitCode::SUCCESS),
            turn = control.turn() => Some((&mut control, turn)),
            turn = node.turn() => Some((&mut node, turn)),
            () = are_ready(), if !ready => {
                ready = true;
                None
            }
            () = tokio::time::sleep_until(begun + READY_AT_MOST), if !ready => {
                break Err(Failure::environment(
                    format!("the mesh was not ready after {} s", READY_AT_MOST.as_secs()),
                    format!("look into {}", state.join("log").display()),
                ));
            }
        };
        let is_first = turn.is_none();
        match turn {
            Some((role, Turn::Ended(status))) if !ready && matches!(status.code(), Some(2 | 3)) => break Err(role.failure()),
            Some((role, Turn::Ended(status))) => role.start_later(status, &clock),
            Some((role, Turn::Due)) => {
                if let Err(failure) = role.start() {
                    break Err(failure);
                }
            }
            None => {}
        }
        if ready {
            let published = publish(&mut record, [&control, &node]);
            if let Err(failure) = published.and_then(|()| if is_first { announce(&record, watched) } else { Ok(()) }) {
                break Err(failure);
            }
        }
    };
    node.stop().await;
    control.stop().await;
    outcome
}

/// Returns when both answer; each by what it serves to people.
async fn are_ready() {
    let here = IpAddr::from(Ipv4Addr::LOCALHOST);
    let (node, api) = (SocketAddr::new(here, NODE_METRICS_PORT), SocketAddr::new(here, API_PORT));
    while !(answers(node, "/ready").await && answers(api, "/ready").await) {
        tokio::time::sleep(POLL).await;
    }
}

fn publish(record: &mut UpRecord, roles: [&Role; 2]) -> Result<(), Failure> {
    for role in roles {
        // Until the next one is there the last one's number stands: by it whoever waits sees that another one came.
        let process = role.child.as_ref().and_then(Child::id);
        match role.part {
            Part::Control => record.control = process.unwrap_or(record.control),
            Part::Node => record.node = process.unwrap_or(record.node),
        }
        record.restarted.extend(role.restarts.told().map(|told| (role.part.role().to_owned(), told.clone())));
    }
    serde_json::to_vec_pretty(record)
        .map_err(io::Error::from)
        .and_then(|bytes| state::write_atomic(&runtime("up.json"), &bytes, 0o644))
        .map_err(|error| cannot("write up.json", &error))
}

fn announce(record: &UpRecord, watched: &Watched) -> Result<(), Failure> {
    let mut text = format!("outrigger is up\n  api        {}\n  dashboard  {}\n", record.api, record.dashboard);
    let again = if watched.as_before { " (as before)" } else { "" };
    for folder in &watched.folders {
        // Writing to a string does not fail.
        let _written = writeln!(text, "  watching   {}{again}", folder.display());
    }
    if detach::is_detached() { detach::report(&text, &record.state.join("log/up.log")) } else { print(&text) }
}

fn control_arguments(args: &UpArgs, watched: &Watched, state: &Path) -> Vec<std::ffi::OsString> {
    let mut arguments: Vec<std::ffi::OsString> = vec!["control".into(), "--state".into(), state.into()];
    for folder in &watched.folders {
        arguments.extend(["--resources".into(), folder.into()]);
    }
    for (flag, value) in [
        ("--trust-domain", args.trust_domain.clone()),
        ("--listen", format!("{GATEWAY_V4}:{STREAM_PORT}")),
        ("--listen", format!("127.0.0.1:{STREAM_PORT}")),
        ("--api", format!("127.0.0.1:{API_PORT}")),
        ("--metrics", format!("0.0.0.0:{CONTROL_METRICS_PORT}")),
    ] {
        arguments.extend([flag.into(), value.into()]);
    }
    arguments
}

fn node_arguments(args: &UpArgs, state: &Path) -> Vec<std::ffi::OsString> {
    let mut arguments: Vec<std::ffi::OsString> = vec!["node".into(), "--state".into(), state.into()];
    for (flag, value) in [
        ("--control", format!("127.0.0.1:{STREAM_PORT}").into()),
        ("--name", node_name().into()),
        ("--node-socket", places::node_socket().into()),
        ("--workload-api", runtime("workload.sock").into()),
        ("--pins", places::pins().into()),
        ("--trust-domain", args.trust_domain.clone().into()),
        ("--capture", args.capture.to_string().into()),
    ] {
        arguments.extend([flag.into(), value]);
    }
    arguments
}

/// The machine's name, as far as it can stand in an identity.
fn node_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let name: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).collect();
    if name.trim_matches('.').is_empty() { "local".to_owned() } else { name }
}

/// One child: how it is started, and what it said last.
struct Role {
    part: Part,
    arguments: Vec<std::ffi::OsString>,
    log: PathBuf,
    child: Option<Child>,
    restarts: Restarts,
    said: Arc<Mutex<VecDeque<String>>>,
    readers: JoinSet<()>,
}

/// What comes next of a child.
enum Turn {
    /// It has ended.
    Ended(ExitStatus),
    /// It is to be started anew.
    Due,
}

impl Role {
    fn new(part: Part, arguments: Vec<std::ffi::OsString>, state: &Path, dice: &mut Dice) -> Self {
        Self {
            part,
            arguments,
            log: state.join("log").join(format!("{}.log", part.role())),
            child: None,
            restarts: Restarts::new(Dice::from_seed(dice.bits())),
            said: Arc::default(),
            readers: JoinSet::new(),
        }
    }

    fn start(&mut self) -> Result<(), Failure> {
        self.restarts.started(Instant::now());
        let name = self.part.role();
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .map_err(|error| cannot(&format!("open {}", self.log.display()), &error))?;
        let out = log.try_clone().map_err(|error| cannot("share a log", &error))?;
        let mut command = Command::new("/proc/self/exe");
        command.args(&self.arguments).env_remove(detach::MARK).stdin(Stdio::null()).stdout(out).stderr(Stdio::piped());
        if std::env::var_os("OUTRIGGER_LOG").is_none() {
            command.env("OUTRIGGER_LOG", "text");
        }
        // Own session: a key pressed at the terminal ends the supervisor, which ends its children in order.
        crate::node::netns::orphan_with(&mut command, Signal::TERM);
        let mut child = tokio::process::Command::from(command)
            .spawn()
            .map_err(|error| cannot(&format!("start the {name} process"), &error))?;
        if let Some(stderr) = child.stderr.take() {
            self.readers.spawn(follow(name, stderr, log, Arc::clone(&self.said)));
        }
        self.child = Some(child);
        Ok(())
    }

    /// Returns when it has ended and all of its words are read, or when it is due. Cancel-safe.
    async fn turn(&mut self) -> Turn {
        if let Some(child) = &mut self.child {
            let status = child.wait().await.unwrap_or_default();
            while self.readers.join_next().await.is_some() {}
            self.child = None;
            return Turn::Ended(status);
        }
        let Some(due) = self.restarts.due() else { return std::future::pending().await };
        tokio::time::sleep_until(due).await;
        Turn::Due
    }

    fn start_later(&mut self, status: ExitStatus, clock: &WallClock) {
        let told = self.restarts.ended(Instant::now(), clock, status);
        warn(&format!("{}: {}", self.part.role(), told.clause(clock.since_epoch())));
    }

    /// What it said at its end, as this command's own failure.
    fn failure(&self) -> Failure {
        let said = self.said.lock();
        let begin = said.iter().rposition(|line| line.starts_with(OWN_FAILURE));
        let causes: Vec<String> = match begin {
            Some(begin) => said.iter().skip(begin).map(|line| line.trim_start_matches(OWN_FAILURE).trim().to_owned()).collect(),
            None => vec![format!("the {} process ended", self.part.role()), format!("remedy: look into {}", self.log.display())],
        };
        drop(said);
        Failure::environment_of(causes)
    }

    async fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        visit::signal(child.id().unwrap_or(0).cast_signed(), Signal::TERM);
        if tokio::time::timeout(STOP_AT_MOST, child.wait()).await.is_err() {
            drop(child.kill().await);
        }
    }
}

/// Keeps a child's words in its log, the last of them in mind, and tells the person at the terminal what matters.
async fn follow(name: &'static str, stderr: ChildStderr, mut log: File, said: Arc<Mutex<VecDeque<String>>>) {
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        // A full disk must not end the mesh.
        drop(writeln!(log, "{line}"));
        if is_news(&line) && !detach::is_detached() {
            warn(&format!("{name}: {line}"));
        }
        let mut said = said.lock();
        if said.len() == SAID_MAX {
            said.pop_front();
        }
        said.push_back(line);
    }
}

fn is_news(line: &str) -> bool {
    [" WARN ", " ERROR "].iter().any(|level| line.contains(level))
}

const NEEDED: [(CapabilitySet, &str); 8] = [
    (CapabilitySet::SYS_ADMIN, "CAP_SYS_ADMIN"),
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
    (CapabilitySet::DAC_OVERRIDE, "CAP_DAC_OVERRIDE"),
    (CapabilitySet::CHOWN, "CAP_CHOWN"),
    (CapabilitySet::KILL, "CAP_KILL"),
    (CapabilitySet::SETUID, "CAP_SETUID"),
    (CapabilitySet::SETGID, "CAP_SETGID"),
    (CapabilitySet::SETPCAP, "CAP_SETPCAP"),
];
/// To load the kernel programs.
const PROGRAMS: [(CapabilitySet, &str); 2] = [(CapabilitySet::BPF, "CAP_BPF"), (CapabilitySet::PERFMON, "CAP_PERFMON")];
/// How a command of this binary begins to tell why it failed.
const OWN_FAILURE: &str = "outrigger: ";
const SWEEP_EVERY: Duration = Duration::from_secs(2);
const SAID_MAX: usize = 20;
/// Pods that a refusal names.
const NAMED_MAX: usize = 5;
const POLL: Duration = Duration::from_millis(20);
const READY_AT_MOST: Duration = Duration::from_secs(30);
const STOP_AT_MOST: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_childs_own_failure_is_told_whole() {
        let role = Role::new(Part::Node, Vec::new(), Path::new("/x"), &mut Dice::from_seed(1));
        for line in ["2026 INFO begins", "outrigger: the kernel refuses connect4: EPERM", "  remedy: run as root"] {
            role.said.lock().push_back(line.to_owned());
        }
        let told = format!("{:?}", role.failure());
        assert!(told.contains(r#"["the kernel refuses connect4: EPERM", "remedy: run as root"]"#), "{told}");
    }

    #[test]
    fn a_machines_name_can_stand_in_an_identity() {
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        assert!(domain.node(&node_name()).is_ok());
    }
}
