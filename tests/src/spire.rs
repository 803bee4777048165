//! A real SPIRE on this machine: its server and its agent, each a process of its own, ended when it is dropped.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::cluster::{Cluster, KUBELET, UP, programs, xtask};
use crate::mesh::{finish, kill, wait_for};

/// How long anything of SPIRE's may take before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// As what the agent is known, whose workloads entries are for.
const HOST: &str = "spiffe://cluster.local/host";
/// How long an SVID is good, in seconds. The agent asks for the next one at half of it.
const LIFETIME_S: &str = "60";

/// Server and agent.
pub struct Spire {
    folder: tempfile::TempDir,
    server: Child,
    agent: Option<Child>,
}

/// Builds it, where it is not there.
pub fn build() -> Result<()> {
    xtask(&["kube", "spire"], UP).map(drop)
}

impl Spire {
    /// Starts the server of `cluster.local`; the agent is [`Self::agent`]'s.
    pub fn start() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("outrigger-spire-").tempdir()?;
        let place = folder.path().display();
        // Free a moment ago; nobody else on the machine asks for a port without naming it.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let configuration = format!(
            r#"server {{
  bind_address = "127.0.0.1"
  bind_port = "{port}"
  socket_path = "{place}/server.sock"
  trust_domain = "cluster.local"
  data_dir = "{place}/server"
  default_x509_svid_ttl = "{LIFETIME_S}s"
}}
plugins {{
  DataStore "sql" {{ plugin_data {{ database_type = "sqlite3", connection_string = "{place}/store.sqlite3" }} }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "memory" {{ plugin_data {{}} }}
}}
"#
        );
        std::fs::write(folder.path().join("server.conf"), configuration)?;
        std::fs::write(folder.path().join("port"), port.to_string())?;
        let server = run(folder.path(), "server")?;
        let spire = Self { folder, server, agent: None };
        wait_for("SPIRE's server", PATIENCE, || spire.server(&["healthcheck"]))?;
        Ok(spire)
    }

    /// Starts an agent that serves the Workload API at `socket`. `attestor` is its plug-in of attestation, in its own words.
    pub fn agent(&mut self, socket: &Path, attestor: &str) -> Result<()> {
        let said = self.server(&["token", "generate", "-spiffeID", HOST])?;
        let token = said.split_whitespace().last().context("the server said no token")?;
        let (place, port) = (self.folder.path().display(), std::fs::read_to_string(self.folder.path().join("port"))?);
        let configuration = format!(
            r#"agent {{
  data_dir = "{place}/agent"
  server_address = "127.0.0.1"
  server_port = "{port}"
  socket_path = "{}"
  trust_domain = "cluster.local"
  insecure_bootstrap = true
  join_token = "{token}"
}}
plugins {{
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "memory" {{ plugin_data {{}} }}
  {attestor}
}}
"#,
            socket.display()
        );
        std::fs::write(self.folder.path().join("agent.conf"), configuration)?;
        self.agent = Some(run(self.folder.path(), "agent")?);
        let mut check = Command::new(program("agent"));
        check.args(["healthcheck", "-socketPath"]).arg(socket);
        wait_for("SPIRE's agent", PATIENCE, || finish(&mut check, PATIENCE)?.ok()).with_context(|| self.log("agent")).map(drop)
    }

    /// From now on what bears these selectors is `id`.
    pub fn entry(&self, id: &str, selectors: &[&str]) -> Result<()> {
        let mut words = vec!["entry", "create", "-parentID", HOST, "-spiffeID", id, "-x509SVIDTTL", LIFETIME_S];
        words.extend(selectors.iter().flat_map(|selector| ["-selector", selector]));
        self.server(&words).map(drop)
    }

    /// Makes another authority, and signs by it as soon as the agent at `socket` believes it; the former one stays believed.
    pub fn rotate(&self, socket: &Path) -> Result<()> {
        let prepared = self.server(&["localauthority", "x509", "prepare"])?;
        let id = prepared.lines().find_map(|line| line.trim().strip_prefix("Authority ID:")).map(str::trim);
        let id = id.with_context(|| format!("no authority in {prepared}"))?;
        // An agent that did not hear of it in time would not know its own server again.
        let authorities = self.authorities()?.len();
        let mut fetch = Command::new(program("agent"));
        fetch.args(["api", "fetch", "x509", "-socketPath"]).arg(socket).arg("-write").arg(self.folder.path());
        wait_for("the agent's trust in the new authority", PATIENCE, || {
            finish(&mut fetch, PATIENCE)?.ok()?;
            let bundle = std::fs::read_to_string(self.folder.path().join("bundle.0.pem"))?;
            let known = bundle.matches("BEGIN CERTIFICATE").count();
            ensure!(known == authorities, "it knows {known} of {authorities}");
            Ok(())
        })?;
        self.server(&["localauthority", "x509", "activate", "-authorityID", id]).map(drop)
    }

    /// Its authorities, as PEM.
    pub fn authorities(&self) -> Result<BTreeSet<String>> {
        let said = self.server(&["bundle", "show"])?;
        Ok(said.split("-----END CERTIFICATE-----").map(str::trim).filter(|text| !text.is_empty()).map(str::to_owned).collect())
    }

    /// Ends the agent without a word.
    pub fn lose_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            kill(agent.id(), rustix::process::Signal::KILL);
            agent.wait().ok();
        }
    }

    /// The last words of `server` or `agent`.
    pub fn log(&self, part: &str) -> String {
        let text = std::fs::read_to_string(self.folder.path().join(format!("{part}.log"))).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(30).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// The server's own command line.
    fn server(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new(program("server"));
        command.args(words).arg("-socketPath").arg(self.folder.path().join("server.sock"));
        let said = finish(&mut command, PATIENCE)?.ok();
        said.with_context(|| format!("spire-server {}: {}", words.join(" "), self.log("server")))
    }
}

impl Drop for Spire {
    fn drop(&mut self) {
        self.lose_agent();
        kill(self.server.id(), rustix::process::Signal::TERM);
        self.server.wait().ok();
    }
}

/// SPIFFE's CSI driver on the node of a cluster, and the process that tells the kubelet of it.
pub struct Driver<'a> {
    cluster: &'a Cluster,
    processes: Vec<Child>,
}

impl<'a> Driver<'a> {
    /// Serves pods the folder of an agent's socket, as the driver `csi.spiffe.io`.
    pub fn start(cluster: &'a Cluster, sockets: &Path) -> Result<Self> {
        let place = Path::new(KUBELET).join("plugins/csi.spiffe.io");
        std::fs::create_dir_all(&place)?;
        let endpoint = place.join("csi.sock");
        let mut driver = Command::new(programs().join("spire/spiffe-csi-driver"));
        driver.args(["-node-id=node1", "-workload-api-socket-dir"]).arg(sockets).arg("-csi-socket-path").arg(&endpoint);
        let mut registrar = Command::new(programs().join("spire/registrar"));
        registrar.arg("-endpoint").arg(&endpoint).arg("-registry").arg(Path::new(KUBELET).join("plugins_registry"));
        let mut started = Self { cluster, processes: Vec::new() };
        for mut command in [driver, registrar] {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            started.processes.push(command.spawn().with_context(|| format!("cannot run {command:?}"))?);
        }
        cluster.apply(
            "apiVersion: storage.k8s.io/v1
kind: CSIDriver
metadata: { name: csi.spiffe.io }
spec: { attachRequired: false, podInfoOnMount: true, fsGroupPolicy: None, volumeLifecycleModes: [Ephemeral] }
",
        )?;
        wait_for("the driver at the kubelet", PATIENCE, || {
            let nodes = cluster.get(&["csinodes"])?.to_string();
            ensure!(nodes.contains("csi.spiffe.io"), "it is not in {nodes}");
            Ok(())
        })?;
        Ok(started)
    }

    /// Is its volume in no pod any more?
    fn is_unused(&self) -> Result<()> {
        let pods = self.cluster.get(&["pods", "--all-namespaces"])?.to_string();
        ensure!(!pods.contains("csi.spiffe.io"), "pods have its volume");
        Ok(())
    }
}

impl Drop for Driver<'_> {
    fn drop(&mut self) {
        // The kubelet cannot end a pod whose volume nobody takes back.
        if let Err(error) = wait_for("the end of pods with SPIRE's volume", PATIENCE, || self.is_unused()) {
            eprintln!("{error:#}");
        }
        self.cluster.run(&["delete", "csidriver", "csi.spiffe.io"]).ok();
        for process in &mut self.processes {
            kill(process.id(), rustix::process::Signal::TERM);
            process.wait().ok();
        }
        std::fs::remove_file(Path::new(KUBELET).join("plugins_registry/csi.spiffe.io-reg.sock")).ok();
    }
}

fn program(part: &str) -> PathBuf {
    programs().join(format!("spire/spire-{part}"))
}

fn run(folder: &Path, part: &str) -> Result<Child> {
    let mut log = std::fs::File::create(folder.join(format!("{part}.log")))?;
    writeln!(log, "{part} starts")?;
    let mut command = Command::new(program(part));
    command.args(["run", "-config"]).arg(folder.join(format!("{part}.conf")));
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().with_context(|| format!("cannot run {}; `cargo xtask kube spire` builds it", program(part).display()))
}
