//! The pods that traffic and idle connections are measured in, and one turn of a candidate.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, finish, outrigger, wait_for};
use serde_json::Value;

use super::peer::{Description, Places, Side, Way};
use super::process::{Running, processor_time, resident};
use super::works::{Kind, Traffic, Work};
use crate::setup::step;

/// A turn's metrics.
pub(crate) type Turn = Vec<(&'static str, f64)>;

/// Who has a turn.
#[derive(Clone, Copy)]
pub(crate) enum Candidate<'a> {
    Direct,
    Peer(&'a Description),
    Outrigger,
}

impl<'a> Candidate<'a> {
    pub(crate) fn name(self) -> &'a str {
        match self {
            Self::Direct => "direct",
            Self::Peer(peer) => &peer.name,
            Self::Outrigger => "outrigger",
        }
    }
}

/// Those that have a part in a work, in the order of their turns.
pub(crate) fn candidates<'a>(work: &Work, peers: &'a [Description]) -> Vec<Candidate<'a>> {
    let knows = |way: Way| {
        let able = move |peer: &&Description| peer.way.contains_key(&way) && !peer.skip.iter().any(|name| work.is_called(name));
        peers.iter().filter(able).map(Candidate::Peer)
    };
    match &work.kind {
        Kind::Traffic(traffic) => {
            // A connection in one of TLS has no counterpart without a proxy.
            let direct = (traffic.way != Way::PairTcp).then_some(Candidate::Direct);
            direct.into_iter().chain(knows(traffic.way)).chain([Candidate::Outrigger]).collect()
        }
        Kind::Idle { .. } => knows(Way::Hop).chain([Candidate::Outrigger]).collect(),
        Kind::Scale { .. } | Kind::Alone => Vec::new(),
    }
}

pub(crate) struct Bed {
    mesh: Mesh,
    /// The product, as it is released.
    pub(crate) binary: PathBuf,
    load: PathBuf,
    pub(crate) places: Places,
    /// Outside the mesh: for direct, the peers, and as the server behind one Outrigger hop.
    plain_client: Pod,
    plain_server: Pod,
    /// In the mesh.
    pub(crate) client: Pod,
    pub(crate) server: Pod,
}

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
";

/// Bytes of an answer.
const BODY: &str = "1024";
/// What a start needed alone is given back by then.
const SETTLED: Duration = Duration::from_millis(3_500);
/// Connections that were just opened have come to rest by then.
const RESTED: Duration = Duration::from_millis(1_500);

impl Bed {
    pub(crate) fn make(root: &Path, binary: PathBuf, peers: &[Description]) -> Result<Self> {
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
            for server in [&plain_server, &server] {
                server.wait_listening(8080)?;
                server.wait_listening(8081)?;
            }
            mesh.apply(&(service("plain") + &service("meshed") + POLICIES))?;
            Ok((plain_server, server, plain_client, client))
        })?;
        let (plain_server, server, plain_client, client) = bed;
        let places = Places { folder: mesh.folder().to_owned(), server: plain_server.address()? };
        certificates(&release, &places.folder)?;
        for peer in peers {
            peer.write(&places)?;
        }
        let bed = Self { mesh, binary, load, places, plain_client, plain_server, client, server };
        for pod in [&bed.client, &bed.server] {
            hold(pod)?;
        }
        Ok(bed)
    }

    /// Takes the mesh down, as dropping it does, but says what went wrong.
    pub(crate) fn down(self) -> Result<()> {
        self.mesh.down()
    }

    /// One turn of a candidate.
    pub(crate) fn turn(&self, candidate: Candidate<'_>, work: &Work, seconds: f64) -> Result<Turn> {
        match &work.kind {
            Kind::Traffic(traffic) => self.traffic(candidate, traffic, seconds),
            Kind::Idle { connections } => self.idle(candidate, *connections),
            Kind::Scale { .. } | Kind::Alone => Ok(Turn::new()),
        }
    }

    /// The proxies' share of the processor, and what the load generator saw.
    fn traffic(&self, candidate: Candidate<'_>, traffic: &Traffic, seconds: f64) -> Result<Turn> {
        let peers = self.start(candidate, traffic.way)?;
        let direct = match traffic.way {
            Way::Hop | Way::Pair | Way::PairTcp => "8080",
            Way::HopGrpc | Way::PairH2 => "8081",
        };
        let (pod, target) = match candidate {
            Candidate::Direct => (&self.plain_client, format!("{}:{direct}", self.places.server)),
            Candidate::Outrigger => (&self.client, target(traffic.way).to_owned()),
            Candidate::Peer(peer) => (&self.plain_client, road(peer, traffic.way)?),
        };
        let proxies = match candidate {
            Candidate::Outrigger => self.sidecars(traffic.way).into_iter().map(Pod::sidecar).collect::<Result<Vec<_>>>()?,
            Candidate::Direct | Candidate::Peer(_) => peers.iter().flat_map(|peer| peer.processes.iter().copied()).collect(),
        };
        self.warm(pod, &target, traffic)?;
        let before = processor_time(&proxies)?;
        let seen = self.drive(pod, &target, traffic, seconds)?;
        let used = processor_time(&proxies)?.saturating_sub(before);
        let resident = resident(&proxies)?;
        drop(peers);
        let number = |field: &str| seen.get(field).and_then(Value::as_f64).with_context(|| format!("no {field} in {seen}"));
        let requests = number("requests")?;
        let failed = seen.get("failures").and_then(Value::as_object).is_some_and(|failures| !failures.is_empty());
        ensure!(
            requests > 0.0 && (good(&seen) - requests).abs() < 0.5 && !failed,
            "not every request was answered with 200: {seen}"
        );
        let mut turn = vec![("rps", number("rps")?), ("p50_us", number("p50_us")?), ("p99_us", number("p99_us")?)];
        if !proxies.is_empty() {
            turn.push(("cpu_us_per_request", used.as_secs_f64() * 1e6 / requests));
            turn.push(("rss_mib", resident));
        }
        Ok(turn)
    }

    /// A fresh proxy's memory, before and with so many idle connections to it.
    fn idle(&self, candidate: Candidate<'_>, connections: usize) -> Result<Turn> {
        let plain = Traffic { way: Way::Hop, load: &[] };
        let peers = self.start(candidate, plain.way)?;
        let fresh = if let Candidate::Outrigger = candidate { Some(Fresh::start(&self.mesh)?) } else { None };
        let (pod, target) = match (candidate, &fresh) {
            (Candidate::Peer(peer), _) => (&self.plain_client, road(peer, plain.way)?),
            (_, Some(fresh)) => (&fresh.pod, target(plain.way).to_owned()),
            (_, None) => return Ok(Turn::new()),
        };
        let proxies = match &fresh {
            Some(fresh) => vec![fresh.pod.sidecar()?],
            None => peers.iter().flat_map(|peer| peer.processes.iter().copied()).collect(),
        };
        self.warm(pod, &target, &plain)?;
        std::thread::sleep(SETTLED);
        let before = resident(&proxies)?;
        if connections == 0 {
            return Ok(vec![("rss_mib", before)]);
        }
        let line =
            ["taskset", "-c", "0", &self.load.to_string_lossy(), "hold", &target, &connections.to_string()].map(str::to_owned);
        let mut holding = Running::start(pod, "load", &line, Some("load"))?;
        let said = holding.first_line().with_context(|| format!("{connections} connections cannot be held"))?;
        ensure!(said.contains(&format!("holding {connections} ")), "the load generator said {said}");
        std::thread::sleep(RESTED);
        let with = resident(&proxies)?;
        drop(holding);
        let count = u32::try_from(connections).map_or(f64::MAX, f64::from);
        Ok(vec![("rss_mib", with), ("kib_per_idle_connection", (with - before).max(0.0) * 1024.0 / count)])
    }

    fn start(&self, candidate: Candidate<'_>, way: Way) -> Result<Vec<Running>> {
        let Candidate::Peer(peer) = candidate else { return Ok(Vec::new()) };
        let road = peer.way.get(&way).with_context(|| format!("{} knows no such way", peer.name))?;
        let processes = road.processes.iter().filter_map(|name| peer.process.get(name));
        processes
            .map(|process| {
                let pod = match process.pod {
                    Side::Client => &self.plain_client,
                    Side::Server => &self.plain_server,
                };
                Running::proxy(pod, &peer.name, &process.line(&self.places), process.counted.as_deref())
            })
            .collect()
    }

    /// The sidecars that a request of Outrigger's passes.
    pub(crate) fn sidecars(&self, way: Way) -> Vec<&Pod> {
        match way {
            Way::Hop | Way::HopGrpc => vec![&self.client],
            Way::Pair | Way::PairH2 | Way::PairTcp => vec![&self.client, &self.server],
        }
    }

    /// Ready is what answers; the same run fills pools and caches.
    pub(crate) fn warm(&self, pod: &Pod, target: &str, traffic: &Traffic) -> Result<()> {
        wait_for("an answer", PATIENCE, || {
            let seen = self.drive(pod, target, traffic, 0.5)?;
            ensure!(good(&seen) > 0.0, "{target} does not answer: {seen}");
            Ok(())
        })
    }

    /// Runs the load generator; its line of JSON.
    pub(crate) fn drive(&self, pod: &Pod, target: &str, traffic: &Traffic, seconds: f64) -> Result<Value> {
        let (load, seconds) = (self.load.to_string_lossy(), seconds.to_string());
        let mut line = vec!["taskset", "-c", "0", &load, "drive", target, "--seconds", &seconds];
        line.extend(traffic.load);
        let said = pod.exec(line)?.ok()?;
        serde_json::from_str(&said).with_context(|| format!("the load generator said {said}"))
    }
}

/// A pod of the mesh with a sidecar that has done nothing yet.
struct Fresh {
    pod: Pod,
}

impl Fresh {
    fn start(mesh: &Mesh) -> Result<Self> {
        let pod = mesh.pod("bench/fresh").account("client").detach(["sleep", "1000000"])?;
        let fresh = Self { pod };
        hold(&fresh.pod)?;
        Ok(fresh)
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        stop(&self.pod);
    }
}

/// Stops a detached pod. What is left of it goes with the mesh.
pub(crate) fn stop(pod: &Pod) {
    let words = ["stop", &pod.name.name, "-n", &pod.name.namespace, "--grace", "1s"];
    finish(&mut outrigger(words), PATIENCE).ok();
}

/// Holds a pod's sidecar on processor 1, as the peers are.
pub(crate) fn hold(pod: &Pod) -> Result<()> {
    let process = pod.sidecar()?.to_string();
    finish(Command::new("taskset").args(["-acp", "1", &process]), PATIENCE)?.ok().map(drop)
}

/// Where a client of the mesh sends what goes this way.
pub(crate) fn target(way: Way) -> &'static str {
    match way {
        Way::Hop => "plain:80",
        Way::HopGrpc => "plain:82",
        Way::Pair => "meshed:80",
        Way::PairTcp => "meshed:81",
        Way::PairH2 => "meshed:82",
    }
}

fn road(peer: &Description, way: Way) -> Result<String> {
    peer.way.get(&way).map(|road| road.to.clone()).with_context(|| format!("{} knows no such way", peer.name))
}

/// Answers with 200 of what the load generator saw.
pub(crate) fn good(seen: &Value) -> f64 {
    seen.get("statuses").and_then(|statuses| statuses.get("200")).and_then(Value::as_f64).unwrap_or(0.0)
}

/// An authority, and what the peers show each other.
fn certificates(release: &Path, folder: &Path) -> Result<()> {
    finish(Command::new(release.join("shop")).arg("certificates").arg(folder), PATIENCE)?.ok()?;
    for name in ["client", "server"] {
        // HAProxy wants both in one file.
        let [certificate, key] = ["crt", "key"].map(|kind| std::fs::read_to_string(folder.join(format!("{name}.{kind}"))));
        std::fs::write(folder.join(format!("{name}.both.pem")), certificate? + &key?)?;
    }
    Ok(())
}

/// A Service with a port for HTTP/1.1, one that is not looked into, and one for HTTP/2, and with retries for the HTTP ones.
fn service(name: &str) -> String {
    let route = |port: u16| {
        format!(
            "---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{ name: {name}-{port}, namespace: bench }}
spec:
  parentRefs: [{{ group: \"\", kind: Service, name: {name}, port: {port} }}]
  rules:
    - retry: {{ codes: [503], attempts: 2 }}
      backendRefs: [{{ name: {name}, port: {port} }}]
"
        )
    };
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{ name: {name}, namespace: bench }}
spec:
  selector: {{ app: {name} }}
  ports:
    - {{ name: http, port: 80, targetPort: 8080 }}
    - {{ name: tcp, port: 81, targetPort: 8080 }}
    - {{ name: http2, port: 82, targetPort: 8081, appProtocol: kubernetes.io/h2c }}
{}{}",
        route(80),
        route(82)
    )
}
