//! The local mesh behind a guard: `up` when it is made, `down` when it is dropped.

use std::ffi::OsStr;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

/// How long anything of the mesh may take before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Which binary this process drives, where it is not the usual one.
static BINARY: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();

/// The `outrigger` binary under test: what [`Mesh::up_binary`] was told, `OUTRIGGER_BIN`, or the debug build.
pub fn binary() -> PathBuf {
    BINARY
        .get()
        .cloned()
        .or_else(|| std::env::var_os("OUTRIGGER_BIN").map(PathBuf::from))
        .unwrap_or_else(|| target().join("debug/outrigger"))
}

/// The workspace's folder.
pub fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_path_buf()
}

/// The build folder.
pub fn target() -> PathBuf {
    root().join("target")
}

/// `outrigger` with these arguments, not yet started.
pub fn outrigger<I: AsRef<OsStr>>(arguments: impl IntoIterator<Item = I>) -> Command {
    let mut command = Command::new(binary());
    // An interrupt from the terminal is for the one who drives the mesh, who then takes it down in order.
    command.args(arguments).stdin(Stdio::null()).process_group(0);
    command
}

/// What a finished command said.
#[derive(Clone, Debug)]
pub struct Said {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Said {
    /// The standard output of a command that must have succeeded.
    pub fn ok(self) -> Result<String> {
        ensure!(self.code == 0, "exit code {}: {}{}", self.code, self.stdout, self.stderr);
        Ok(self.stdout)
    }

    /// Both outputs, for messages.
    pub fn all(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            // A command that a signal ended has no code: shells say 128 and the signal, no test expects it.
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Runs a command to its end, with a time limit.
pub fn finish(command: &mut Command, limit: Duration) -> Result<Said> {
    let shown = format!("{command:?}");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().with_context(|| format!("cannot run {shown}"))?;
    let id = child.id();
    let (sender, receiver) = std::sync::mpsc::channel();
    // The outputs are read by a thread of their own, so that a full pipe cannot hold the program.
    std::thread::spawn(move || sender.send(child.wait_with_output()).ok());
    match receiver.recv_timeout(limit) {
        Ok(output) => Ok(output.with_context(|| format!("cannot wait for {shown}"))?.into()),
        Err(_late) => {
            kill(id, rustix::process::Signal::KILL);
            bail!("{shown} did not end within {limit:?}");
        }
    }
}

/// Sends a signal to a process of ours; one that is gone already is no error.
pub fn kill(process: u32, signal: rustix::process::Signal) {
    if let Some(id) = i32::try_from(process).ok().and_then(rustix::process::Pid::from_raw) {
        rustix::process::kill_process(id, signal).ok();
    }
}

/// When a process was started, in clock ticks after the machine's start; `None` for one that is gone or not yet waited for. It is
/// field 22 of proc_pid_stat(5), counted behind the name, which may hold anything.
pub fn start_time(id: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Waits until `ready` says so; the last of its errors tells what was missing.
pub fn wait_for<T>(what: &str, limit: Duration, mut ready: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match ready() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() > limit => return Err(error.context(format!("{what}: not within {limit:?}"))),
            Err(_not_yet) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// A running local mesh.
pub struct Mesh {
    supervisor: Option<Child>,
    folder: tempfile::TempDir,
    /// What `up` printed.
    pub said: String,
}

impl Mesh {
    /// Takes down whatever is left from before, then brings a mesh up.
    pub fn up() -> Result<Self> {
        Self::up_with(&[])
    }

    /// The same with another binary, for the whole of this process.
    pub fn up_binary(binary: PathBuf, arguments: &[&str]) -> Result<Self> {
        let chosen = BINARY.get_or_init(|| binary.clone());
        ensure!(*chosen == binary, "this process drives {} already", chosen.display());
        Self::up_with(arguments)
    }

    /// The same with further arguments of `up`.
    pub fn up_with(arguments: &[&str]) -> Result<Self> {
        Self::up_in(arguments, &[])
    }

    /// The same with variables of the roles' environment.
    pub fn up_in(arguments: &[&str], environment: &[(&str, &str)]) -> Result<Self> {
        finish(&mut outrigger(["down"]), PATIENCE)?;
        let folder = tempfile::Builder::new().prefix("outrigger-e2e-").tempdir()?;
        // A state of its own, which no earlier mesh wrote into; programs that drop root must be let through to theirs.
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let log = folder.path().join("up.log");
        let mut command = outrigger(["up", "--state"]);
        command.arg(folder.path().join("state")).args(arguments).envs(environment.iter().copied());
        command.stdout(std::fs::File::create(&log)?).stderr(std::fs::File::create(folder.path().join("up.err"))?);
        let mut supervisor = command.spawn().with_context(|| format!("cannot run {}", binary().display()))?;
        let said = wait_for("`outrigger up`", PATIENCE, || {
            let said = std::fs::read_to_string(&log)?;
            if said.contains("outrigger is up") {
                return Ok(Ok(said));
            }
            if let Some(status) = supervisor.try_wait()? {
                let error = std::fs::read_to_string(folder.path().join("up.err")).unwrap_or_default();
                return Ok(Err(anyhow::anyhow!("`outrigger up` ended with {status}: {said}{error}")));
            }
            bail!("it did not say that it is up: {said}")
        })??;
        Ok(Self { supervisor: Some(supervisor), folder, said })
    }

    /// A folder that lives as long as the mesh.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What the supervisor and its processes wrote to their log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("up.err")).unwrap_or_default()
    }

    /// Applies documents and waits until every sidecar that should have them does.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        self.try_apply(yaml)?.ok().map(drop)
    }

    /// The same, whatever comes of it.
    pub fn try_apply(&self, yaml: &str) -> Result<Said> {
        self.with_documents(&["apply", "--wait", "--timeout", "20s", "-f"], yaml)
    }

    /// Deletes what the documents name.
    pub fn delete(&self, yaml: &str) -> Result<()> {
        self.with_documents(&["delete", "-f"], yaml)?.ok().map(drop)
    }

    fn with_documents(&self, arguments: &[&str], yaml: &str) -> Result<Said> {
        let mut file = tempfile::Builder::new().suffix(".yaml").tempfile_in(self.folder.path())?;
        file.write_all(yaml.as_bytes())?;
        let mut command = outrigger(arguments);
        command.arg(file.path());
        finish(&mut command, PATIENCE)
    }

    /// A pod to be run, named `NAMESPACE/NAME`.
    pub fn pod(&self, name: &str) -> PodBuilder<'_> {
        PodBuilder { mesh: self, name: PodName::parse(name), arguments: Vec::new(), variables: Vec::new() }
    }

    /// The file of the API's token, which is another one whenever the control plane starts.
    pub fn token_file(&self) -> PathBuf {
        self.folder.path().join("state/api-token")
    }

    /// What a GET of the control plane's API answers.
    pub fn api(&self, path: &str) -> Result<Value> {
        let url = format!("http://127.0.0.1:14080{path}");
        let token = std::fs::read_to_string(self.token_file()).context("the mesh left no token of its API")?;
        let mut command = Command::new("curl");
        command.args(["-sS", "--fail", "--max-time", "5", "-H", &format!("authorization: Bearer {}", token.trim()), &url]);
        let text = finish(&mut command, PATIENCE)?.ok().with_context(|| format!("GET {url}"))?;
        serde_json::from_str(&text).with_context(|| format!("GET {url} answered no JSON"))
    }

    /// The process of a role: `supervisor`, `control` or `node`.
    pub fn process(&self, role: &str) -> Result<u32> {
        let text = std::fs::read_to_string("/run/outrigger/up.json").context("the mesh left no /run/outrigger/up.json")?;
        let up: Value = serde_json::from_str(&text)?;
        up.get(role)
            .and_then(|value| value.get("pid").unwrap_or(value).as_u64())
            .and_then(|id| u32::try_from(id).ok())
            .with_context(|| format!("up.json names no process of {role}: {text}"))
    }

    /// Takes the mesh down, as dropping it does, but says what went wrong.
    pub fn down(mut self) -> Result<()> {
        self.stop()
    }

    fn stop(&mut self) -> Result<()> {
        let Some(mut supervisor) = self.supervisor.take() else { return Ok(()) };
        let said = finish(&mut outrigger(["down"]), PATIENCE);
        kill(supervisor.id(), rustix::process::Signal::TERM);
        let ended = wait_for("the supervisor's end", Duration::from_secs(10), || supervisor.try_wait()?.context("it still runs"));
        if ended.is_err() {
            supervisor.kill().ok();
            supervisor.wait().ok();
        }
        said?.ok()?;
        ended.map(drop)
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("the mesh did not come down: {error:#}");
        }
    }
}

/// A pod's namespace and name.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PodName {
    pub namespace: String,
    pub name: String,
}

impl PodName {
    /// From `NAMESPACE/NAME`; without a slash the namespace is `default`.
    pub fn parse(text: &str) -> Self {
        let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }

    /// The pod's network namespace, as `ip netns` knows it.
    pub fn network(&self) -> String {
        format!("outrigger-{}.{}", self.namespace, self.name)
    }

    /// A command inside the pod.
    pub fn exec<I: AsRef<OsStr>>(&self, command: impl IntoIterator<Item = I>) -> Command {
        let mut line = outrigger(["exec", &self.name, "-n", &self.namespace, "--"]);
        line.args(command);
        line
    }
}

/// What a pod shall be.
pub struct PodBuilder<'a> {
    mesh: &'a Mesh,
    name: PodName,
    arguments: Vec<String>,
    variables: Vec<(String, String)>,
}

impl PodBuilder<'_> {
    /// A label that a Service may select on.
    #[must_use]
    pub fn label(self, key: &str, value: &str) -> Self {
        self.argument("--label", &format!("{key}={value}"))
    }

    /// An annotation, by which capture is asked for something.
    #[must_use]
    pub fn annotation(self, key: &str, value: &str) -> Self {
        self.argument("--annotation", &format!("{key}={value}"))
    }

    /// A named port, `NAME:PORT` or `NAME:PORT:APPPROTOCOL`.
    #[must_use]
    pub fn port(self, port: &str) -> Self {
        self.argument("--port", port)
    }

    /// The service account, by which the pod's identity is named.
    #[must_use]
    pub fn account(self, account: &str) -> Self {
        self.argument("--service-account", account)
    }

    /// A variable of the application's environment.
    #[must_use]
    pub fn env(self, key: &str, value: &str) -> Self {
        self.argument("--env", &format!("{key}={value}"))
    }

    /// A variable of the sidecar's environment, as the user of `run` sets it.
    #[must_use]
    pub fn sidecar_env(mut self, key: &str, value: &str) -> Self {
        self.variables.push((key.to_owned(), value.to_owned()));
        self
    }

    /// The user that the program runs as.
    #[must_use]
    pub fn user(self, user: &str) -> Self {
        self.argument("--user", user)
    }

    /// How long connections wait while the sidecar is away.
    #[must_use]
    pub fn hold(self, time: &str) -> Self {
        self.argument("--hold", time)
    }

    /// Starts the program at once and its sidecar this much later.
    #[must_use]
    pub fn sidecar_after(self, time: &str) -> Self {
        self.argument("--sidecar-after", time)
    }

    /// A pod outside the mesh.
    #[must_use]
    pub fn outside(mut self) -> Self {
        self.arguments.push("--no-sidecar".to_owned());
        self
    }

    /// Also where nothing captures its connections.
    #[must_use]
    pub fn unprotected(mut self) -> Self {
        self.arguments.push("--unprotected".to_owned());
        self
    }

    /// Runs the pod by `outrigger run --detach`: nothing waits for it, and the mesh's `down` ends it.
    pub fn detach<I: AsRef<OsStr>>(self, command: impl IntoIterator<Item = I>) -> Result<Pod> {
        let log = self.mesh.folder().join(format!("{}.log", self.name.network()));
        let mut line = outrigger(["run", &self.name.name, "-n", &self.name.namespace, "--detach"]);
        line.args(&self.arguments).arg("--").args(command);
        line.envs(self.variables.iter().map(|(key, value)| (key, value)));
        finish(&mut line, PATIENCE)?
            .ok()
            .with_context(|| format!("cannot run pod {}/{}", self.name.namespace, self.name.name))?;
        Ok(Pod { name: self.name, runner: None, log })
    }

    fn argument(mut self, flag: &str, value: &str) -> Self {
        self.arguments.extend([flag.to_owned(), value.to_owned()]);
        self
    }

    /// Runs the pod; its output goes to a file in the mesh's folder.
    pub fn run<I: AsRef<OsStr>>(self, command: impl IntoIterator<Item = I>) -> Result<Pod> {
        let log = self.mesh.folder().join(format!("{}.log", self.name.network()));
        let mut line = outrigger(["run", &self.name.name, "-n", &self.name.namespace]);
        line.args(&self.arguments).arg("--").args(command);
        line.envs(self.variables.iter().map(|(key, value)| (key, value)));
        let file = std::fs::File::create(&log)?;
        line.stdout(file.try_clone()?).stderr(file);
        let runner = line.spawn().context("cannot run `outrigger run`")?;
        let mut pod = Pod { name: self.name, runner: Some(runner), log };
        // The pod is there when a command runs inside it.
        wait_for("the pod", PATIENCE, || {
            if let Some(status) = pod.runner.as_mut().map(Child::try_wait).transpose()?.flatten() {
                return Ok(Err(anyhow::anyhow!("pod {:?} ended with {status}: {}", pod.name, pod.log())));
            }
            finish(&mut pod.name.exec(["true"]), PATIENCE)?.ok().map(|_| Ok(()))
        })??;
        Ok(pod)
    }

    /// A pod in which nothing runs but a long sleep: a place for commands.
    pub fn idle(self) -> Result<Pod> {
        self.run(["sleep", "100000"])
    }
}

/// A running pod; dropping it stops it, unless it was detached.
pub struct Pod {
    pub name: PodName,
    runner: Option<Child>,
    log: PathBuf,
}

impl Pod {
    /// Runs a command inside the pod to its end.
    pub fn exec<I: AsRef<OsStr>>(&self, command: impl IntoIterator<Item = I>) -> Result<Said> {
        finish(&mut self.name.exec(command), PATIENCE)
    }

    /// Starts a command inside the pod and leaves it running.
    pub fn spawn<I: AsRef<OsStr>>(&self, command: impl IntoIterator<Item = I>) -> Result<Child> {
        self.name.exec(command).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().context("cannot run `outrigger exec`")
    }

    /// `curl` inside the pod with these arguments: the answer's status and body.
    pub fn curl<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Result<Answer> {
        let mut line: Vec<std::ffi::OsString> =
            ["curl", "-sS", "--noproxy", "*", "--max-time", "10", "-w", "\n%{http_code}"].iter().map(Into::into).collect();
        line.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        let said = self.exec(line)?;
        let (body, status) = said.stdout.rsplit_once('\n').unwrap_or(("", "0"));
        Ok(Answer { status: status.trim().parse().unwrap_or(0), body: body.to_owned(), said: said.clone() })
    }

    /// Waits until the service at `address` (`HOST:PORT`) takes connections from inside this very pod.
    pub fn wait_listening(&self, port: u16) -> Result<()> {
        let needle = format!(":{port:04X} ");
        wait_for(&format!("port {port} of {:?}", self.name), PATIENCE, || {
            let said = self.exec(["cat", "/proc/net/tcp", "/proc/net/tcp6"])?.ok()?;
            // A line's second field is the local address, its fourth the state: 0A listens.
            let listens = said.lines().any(|line| {
                let mut fields = line.split_whitespace().skip(1);
                let local = format!("{} ", fields.next().unwrap_or_default());
                local.ends_with(&needle) && fields.nth(1) == Some("0A")
            });
            ensure!(listens, "nothing listens; the pod said: {}", self.log());
            Ok(())
        })
    }

    /// What the pod's program wrote.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The pod's own address (IPv4).
    pub fn address(&self) -> Result<String> {
        let said =
            finish(Command::new("ip").args(["-n", &self.name.network(), "-4", "-o", "addr", "show", "dev", "eth0"]), PATIENCE)?
                .ok()?;
        said.split_whitespace()
            .skip_while(|word| *word != "inet")
            .nth(1)
            .and_then(|address| address.split('/').next())
            .map(str::to_owned)
            .with_context(|| format!("no address in {said}"))
    }

    /// What the pod's sidecar exposes at its metrics port.
    pub fn metrics(&self) -> Result<String> {
        let url = format!("http://{}:14021/metrics", self.address()?);
        finish(Command::new("curl").args(["-sS", "--fail", "--noproxy", "*", "--max-time", "5", &url]), PATIENCE)?.ok()
    }

    /// The processes of one of the pod's cgroups: `app` or `sidecar`.
    pub fn processes(&self, part: &str) -> Result<Vec<u32>> {
        let root = cgroup_root()?;
        let folder = root.join(format!("outrigger/pods/{}.{}/{part}", self.name.namespace, self.name.name));
        let text = std::fs::read_to_string(folder.join("cgroup.procs")).with_context(|| format!("no {}", folder.display()))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// The sidecar's process.
    pub fn sidecar(&self) -> Result<u32> {
        self.processes("sidecar")?.first().copied().context("no process in the pod's sidecar cgroup")
    }

    /// The process that supervises the pod, unless it was detached.
    pub fn supervisor(&self) -> Result<u32> {
        self.runner.as_ref().map(Child::id).context("a detached pod's supervisor is nobody's child")
    }

    /// Stops the pod as a user does.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(mut runner) = self.runner.take() else { return Ok(()) };
        if runner.try_wait()?.is_some() {
            return Ok(());
        }
        let stop = ["stop", &self.name.name, "-n", &self.name.namespace, "--grace", "2s"];
        let said = finish(&mut outrigger(stop), PATIENCE);
        let ended =
            wait_for("the pod's end", Duration::from_secs(10), || runner.try_wait()?.context("`outrigger run` still runs"));
        if ended.is_err() {
            runner.kill().ok();
            runner.wait().ok();
        }
        said?.ok()?;
        ended.map(drop)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("pod {:?} did not stop: {error:#}", self.name);
        }
    }
}

/// An HTTP answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// 0 where there was none.
    pub status: u16,
    pub body: String,
    pub said: Said,
}

/// Where this machine has cgroup v2 mounted.
pub fn cgroup_root() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"))
        .and_then(|fields| fields.get(1).map(PathBuf::from))
        .context("no cgroup v2 is mounted")
}
