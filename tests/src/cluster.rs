//! The real Kubernetes of `cargo xtask kube`, as its user has it: kubectl and Helm. Brought up when it is made, taken down
//! when it is dropped.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::mesh::{Said, finish, kill, root, target, wait_for};

/// Where the cluster keeps its disks, certificates and logs.
pub const STATE: &str = "/var/lib/outrigger-kube";
/// Where its kubelet keeps pods and plugins.
pub const KUBELET: &str = "/var/lib/outrigger-kube/kubelet";
/// Where its node's agent keeps what must outlive it.
pub const AGENTS_STATE: &str = "/var/lib/outrigger-kube/agent";
/// How long anything of the cluster may take before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// What the images of the tests are called.
pub const TESTS_IMAGE: &str = concat!("outrigger-tests:", env!("CARGO_PKG_VERSION"));
/// Builds of Go's that nobody made before take minutes.
pub(crate) const UP: Duration = Duration::from_secs(30 * 60);

/// Where its programs stand.
pub fn programs() -> PathBuf {
    target().join("kube/bin")
}

/// The configuration of its administrator.
pub fn kubeconfig() -> PathBuf {
    Path::new(STATE).join("admin.conf")
}

/// The plain manifests, as they are committed.
pub const MANIFESTS: &str = "deploy/manifests/outrigger.yaml";

/// What renders them from the chart: as it is for whoever sets nothing, but for the definitions of kinds, which stand in
/// `deploy/crds` already.
pub fn rendered() -> Command {
    let mut helm = Command::new(programs().join("helm"));
    helm.args(["template", "outrigger", "deploy/chart", "--namespace=outrigger-system", "--set=namespace=true,crds=false"]);
    helm.current_dir(root());
    helm
}

/// What this machine lacks to have one.
pub fn lacks() -> Option<String> {
    let has_go =
        || std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join("go").is_file()));
    (!programs().join("kubelet").exists() && !has_go()).then(|| "a cluster is built with Go, which is not there".to_owned())
}

/// A running cluster.
pub struct Cluster(());

impl Cluster {
    /// Brings it up with the images of the tests, from what was built for development.
    pub fn up() -> Result<Self> {
        xtask(&["kube", "down"], PATIENCE)?;
        let cluster = Self(());
        let images = xtask(&["image", "--dev"], UP)?;
        let mut words = vec!["kube", "up"];
        for archive in images.lines().filter_map(|line| line.split("  ").next()).filter(|path| path.ends_with(".tar")) {
            words.extend(["--image", archive]);
        }
        xtask(&words, UP)?;
        xtask(&["kube", "gateway-api"], PATIENCE)?;
        Ok(cluster)
    }

    /// `kubectl` as the administrator.
    pub fn kubectl<I: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = I>) -> Command {
        self.with_configuration(Command::new(programs().join("kubectl")), words)
    }

    /// Helm as the administrator.
    pub fn helm<I: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = I>) -> Command {
        let mut helm = self.with_configuration(Command::new(programs().join("helm")), words);
        // Nothing of the user's that runs this.
        for folder in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            helm.env(folder, Path::new(STATE).join("helm"));
        }
        helm
    }

    /// The product's own command line as the administrator.
    pub fn outrigger<I: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = I>) -> Command {
        self.with_configuration(Command::new(crate::mesh::binary()), words)
    }

    fn with_configuration<I: AsRef<OsStr>>(&self, mut command: Command, words: impl IntoIterator<Item = I>) -> Command {
        command.args(words).env("KUBECONFIG", kubeconfig()).stdin(Stdio::null()).current_dir(root());
        command
    }

    /// Runs `kubectl`, which must succeed.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        finish(&mut self.kubectl(words), PATIENCE)?.ok().with_context(|| format!("kubectl {}", words.join(" ")))
    }

    /// Applies documents, whatever comes of it.
    pub fn try_apply(&self, yaml: &str) -> Result<Said> {
        self.try_apply_with(&[], yaml)
    }

    /// The same with documents that name no namespace: all are of this one.
    pub fn try_apply_in(&self, namespace: &str, yaml: &str) -> Result<Said> {
        self.try_apply_with(&["--namespace", namespace], yaml)
    }

    /// The same with further words for `kubectl apply`.
    pub fn try_apply_with(&self, words: &[&str], yaml: &str) -> Result<Said> {
        let mut file = tempfile::Builder::new().suffix(".yaml").tempfile()?;
        file.write_all(yaml.as_bytes())?;
        let mut apply = self.kubectl([words, &["apply", "--server-side", "--filename"]].concat());
        apply.arg(file.path());
        finish(&mut apply, PATIENCE)
    }

    /// Applies documents.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        self.try_apply(yaml)?.ok().map(drop)
    }

    /// Objects as JSON: `words` as for `kubectl get`.
    pub fn get(&self, words: &[&str]) -> Result<Value> {
        let said = self.run(&[&["get", "--output=json"], words].concat())?;
        serde_json::from_str(&said).with_context(|| format!("`kubectl get {}` said no JSON", words.join(" ")))
    }

    /// Ends a part of the cluster itself (`kubelet`, `etcd`) without a word, and starts it again after so long.
    pub fn fail(&self, part: &str, away: Duration) -> Result<()> {
        xtask(&["kube", "fail", part, "--away", &away.as_secs().to_string()], away + PATIENCE).map(drop)
    }

    /// Waits until a Deployment or DaemonSet runs as it is written; tells of its pods where it does not.
    pub fn rolled_out(&self, namespace: &str, what: &str, limit: Duration) -> Result<()> {
        let timeout = format!("--timeout={}s", limit.as_secs());
        let said = finish(&mut self.kubectl(["--namespace", namespace, "rollout", "status", what, &timeout]), limit + PATIENCE)?;
        if said.code == 0 {
            return Ok(());
        }
        anyhow::bail!("{namespace}/{what} does not come up: {}\n{}", said.all().trim(), self.story(namespace))
    }

    /// Runs a command in a pod's container (`POD`, or a name like `deployment/web`).
    pub fn exec(&self, namespace: &str, pod: &str, container: &str, words: &[&str]) -> Result<Said> {
        let mut command = self.kubectl(["--namespace", namespace, "exec", pod, "--container", container, "--"]);
        finish(command.args(words), PATIENCE)
    }

    /// What is to be known of a namespace's pods when something went wrong: their states, events and last words.
    pub fn story(&self, namespace: &str) -> String {
        let say = |words: &[&str]| {
            let words = [&["--namespace", namespace], words].concat();
            finish(&mut self.kubectl(words), PATIENCE).map(|said| said.all()).unwrap_or_else(|error| format!("{error:#}\n"))
        };
        let mut story = say(&["get", "pods", "--output=wide"]);
        story += &say(&[
            "get",
            "events",
            "--sort-by=.lastTimestamp",
            "--output=custom-columns=ON:.involvedObject.name,WHY:.reason,TEXT:.message",
        ]);
        for name in say(&["get", "pods", "--output=name"]).lines() {
            story += &format!("--- {name}\n");
            let log = say(&["logs", name, "--all-containers", "--prefix"]);
            let lines: Vec<&str> = log.lines().collect();
            let (earlier, last) = lines.split_at(lines.len().saturating_sub(15));
            // Who failed a request said so long before a load ends.
            let failed = earlier.iter().filter(|line| line.contains(r#""status":50"#)).take(15);
            failed.chain(last).for_each(|line| story += &format!("{line}\n"));
        }
        // A node that lacks something takes no pods, and the pods do not say what it lacks.
        let conditions = "custom-columns=NODE:.metadata.name,TAINTS:.spec.taints[*].key,CONDITIONS:.status.conditions[?(@.status!='False')].type";
        story + &say(&["get", "nodes", "--output", conditions])
    }

    /// The published suite of Gateway API as a program, not yet started. The node has what its tests run.
    pub fn gateway_suite(&self) -> Result<Command> {
        xtask(&["kube", "suite"], UP)?;
        Ok(self.with_configuration(Command::new(programs().join("gateway-api.test")), [] as [&str; 0]))
    }

    /// Connects a port of this machine with one of a pod or Service, until the guard is dropped.
    pub fn forward(&self, namespace: &str, what: &str, port: u16) -> Result<Forwarded> {
        let log = tempfile::NamedTempFile::new()?;
        let mut command = self.kubectl(["--namespace", namespace, "port-forward", what, &format!(":{port}")]);
        command.stdout(log.reopen()?).stderr(log.reopen()?);
        let process = command.spawn().context("cannot run kubectl port-forward")?;
        let mut forwarded = Forwarded { process, port: 0 };
        forwarded.port = wait_for("a forwarded port", PATIENCE, || {
            let said = std::fs::read_to_string(log.path())?;
            let port = said.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
            port.with_context(|| format!("kubectl port-forward says {said:?}"))
        })?;
        Ok(forwarded)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::env::var_os("OUTRIGGER_KEEP_CLUSTER").is_some() {
            eprintln!("the cluster stays; `cargo xtask kube down` takes it down");
        } else if let Err(error) = xtask(&["kube", "down"], PATIENCE * 2) {
            eprintln!("the cluster did not come down: {error:#}");
        }
    }
}

/// A port of this machine that leads into the cluster.
pub struct Forwarded {
    process: std::process::Child,
    pub port: u16,
}

impl Drop for Forwarded {
    fn drop(&mut self) {
        kill(self.process.id(), rustix::process::Signal::TERM);
        self.process.wait().ok();
    }
}

/// The project's automation, which was built together with this.
pub(crate) fn xtask(words: &[&str], limit: Duration) -> Result<String> {
    let program = target().join("debug/xtask");
    ensure!(program.exists(), "{} is not there; run `cargo xtask e2e cluster`", program.display());
    finish(Command::new(program).args(words).current_dir(root()), limit)?
        .ok()
        .with_context(|| format!("cargo xtask {}", words.join(" ")))
}
