//! What a proxy pays for services that it does not use: a control plane that knows many, of which five are called.
//!
//! Each number of services has a mesh of its own. The documents stand in its folder of resources before it comes up: a
//! Service and a Workload each. A change is one of a Service that nobody called. Beside it stands Envoy with all services as
//! clusters of a file that it watches, with a virtual host each; a change is the file written anew with one port changed.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, finish, wait_for};
use serde_json::{Value, json};

use super::bed::{Turn, good, hold, stop};
use super::peer::{Description, Places, Side};
use super::process::{Running, age, processor_time, resident};
use crate::setup::step;

/// How many of the services are called.
const USED: usize = 5;
/// The port at which Envoy listens.
const ENVOY_PORT: u16 = 10_000;
/// What a start needed alone is given back by then.
const SETTLED: Duration = Duration::from_millis(3_500);
/// What a proxy does of its own accord is measured for so long.
const BASE: Duration = Duration::from_secs(2);
/// Changes of Outrigger's configuration: one of them alone would be below what the kernel counts.
const CHANGES: u16 = 10;
/// Changes of Envoy's.
const CHANGES_ENVOY: u16 = 2;
/// No change takes longer to arrive.
const CHANGE_MAX: Duration = Duration::from_secs(20);
/// A process that used no time for so long has done with a change.
const QUIET: Duration = Duration::from_secs(1);

/// The pods of one number of services.
pub(crate) struct Scale {
    mesh: Mesh,
    services: usize,
    load: PathBuf,
    server: String,
    plain: Pod,
    /// The control plane watches it.
    _resources: tempfile::TempDir,
}

impl Scale {
    pub(crate) fn make(root: &Path, binary: PathBuf, services: usize) -> Result<Self> {
        let resources = tempfile::tempdir()?;
        std::fs::write(resources.path().join("services.yaml"), documents(services)?)?;
        let folder = resources.path().to_string_lossy().into_owned();
        let mesh = step(&format!("bringing up a mesh that knows {services} services"), || {
            Mesh::up_binary(binary.clone(), &["--resources", &folder])
        })?;
        let load = root.join("target/release/load");
        let words = [load.as_os_str(), "serve".as_ref(), "8080".as_ref(), "1024".as_ref()];
        let server = mesh.pod("bench/used").label("app", "used").outside().detach(words)?;
        server.wait_listening(8080)?;
        let plain = mesh.pod("bench/plain-client").outside().detach(["sleep", "1000000"])?;
        let address = server.address()?;
        // The one that changes is applied, so that it stands in no file.
        mesh.apply(&service(USED, 8080))?;
        // The control plane has read all of it when it knows the last one.
        wait_for("the documents", PATIENCE * 4, || {
            let all = mesh.api("/api/resources?kind=Service&namespace=bench")?;
            let count = all.get("items").and_then(Value::as_array).map_or(0, Vec::len);
            ensure!(count >= services, "the control plane knows {count} services");
            Ok(())
        })?;
        Ok(Self { mesh, services, load, server: address, plain, _resources: resources })
    }

    /// A fresh sidecar among them.
    pub(crate) fn outrigger(&self) -> Result<Turn> {
        let begun = Instant::now();
        let pod = self.mesh.pod("bench/scale").account("client").detach(["sleep", "1000000"])?;
        let run = begun.elapsed();
        let turn = self.sidecar(&pod, run);
        stop(&pod);
        turn
    }

    fn sidecar(&self, pod: &Pod, run: Duration) -> Result<Turn> {
        let sidecar = pod.sidecar()?;
        let ready = age(sidecar)?;
        hold(pod)?;
        let proxies = vec![sidecar];
        for service in 0..USED.min(self.services) {
            self.call(pod, &format!("s-{service}:80"))?;
        }
        std::thread::sleep(SETTLED);
        let (memory, stream) = (resident(&proxies)?, received(pod)?);
        let idle = Cost::of(
            || {
                std::thread::sleep(BASE);
                Ok(())
            },
            &proxies,
            pod,
        )?;
        let changes = Cost::of(
            || {
                for change in 0..CHANGES {
                    self.mesh.apply(&service(USED, 8080 + 1 + change))?;
                }
                std::thread::sleep(QUIET);
                Ok(())
            },
            &proxies,
            pod,
        )?;
        let share = changes.time.as_secs_f64() / idle.time.as_secs_f64();
        let each = |changed: f64, idle: f64| (changed - idle * share).max(0.0) / f64::from(CHANGES);
        Ok(vec![
            ("rss_mib", memory),
            ("ready_ms", ready.as_secs_f64() * 1e3),
            ("run_ms", run.as_secs_f64() * 1e3),
            ("stream_kib", stream / 1024.0),
            ("stream_bytes_per_change", each(changes.bytes, idle.bytes).round()),
            ("cpu_ms_per_change", each(changes.processor.as_secs_f64(), idle.processor.as_secs_f64()) * 1e3),
        ])
    }

    /// An Envoy that has all of them. `None` where the peers hold none.
    pub(crate) fn envoy(&self, peers: &[Description]) -> Result<Option<Turn>> {
        let hop = peers.iter().find(|peer| peer.name == "envoy").and_then(|envoy| envoy.process.get("hop"));
        let Some(hop) = hop.filter(|hop| hop.pod == Side::Client) else { return Ok(None) };
        let folder = self.mesh.folder();
        let places = Places { folder: folder.to_owned(), server: self.server.clone() };
        let config = folder.join("envoy-hop.yaml");
        std::fs::write(&config, envoy_bootstrap(folder, self.services).to_string())?;
        let write = |port: u16| -> Result<()> {
            let next = folder.join("next.json");
            std::fs::write(&next, envoy_clusters(&self.server, self.services, port).to_string())?;
            // Envoy watches for a file that is moved into its place.
            std::fs::rename(&next, folder.join("clusters.json")).context("cannot replace clusters.json")
        };
        write(8080)?;
        let begun = Instant::now();
        let running = Running::proxy(&self.plain, "envoy", &hop.line(&places), hop.counted.as_deref())?;
        let first = *running.processes.first().context("no process")?;
        wait_for("Envoy", PATIENCE * 2, || listens(first, ENVOY_PORT))?;
        let ready = begun.elapsed();
        self.call(&self.plain, &format!("127.0.0.1:{ENVOY_PORT}"))?;
        std::thread::sleep(QUIET);
        let memory = resident(&running.processes)?;
        let mut spent = Duration::ZERO;
        for change in 0..CHANGES_ENVOY {
            let before = processor_time(&running.processes)?;
            write(9_000 + change)?;
            spent += until_quiet(&running.processes)?.saturating_sub(before);
        }
        let each = spent.as_secs_f64() * 1e3 / f64::from(CHANGES_ENVOY);
        Ok(Some(vec![("rss_mib", memory), ("ready_ms", ready.as_secs_f64() * 1e3), ("cpu_ms_per_change", each)]))
    }

    fn call(&self, pod: &Pod, target: &str) -> Result<()> {
        let load = self.load.to_string_lossy();
        wait_for(target, PATIENCE, || {
            let said = pod.exec(["taskset", "-c", "0", &load, "drive", target, "--seconds", "0.1"])?.ok()?;
            let seen: Value = serde_json::from_str(&said)?;
            ensure!(good(&seen) > 0.0, "{target} does not answer: {seen}");
            Ok(())
        })
    }
}

/// What a time cost.
struct Cost {
    time: Duration,
    processor: Duration,
    bytes: f64,
}

impl Cost {
    fn of(work: impl FnOnce() -> Result<()>, proxies: &[u32], pod: &Pod) -> Result<Self> {
        let (begun, processor, bytes) = (Instant::now(), processor_time(proxies)?, received(pod)?);
        work()?;
        Ok(Self {
            time: begun.elapsed(),
            processor: processor_time(proxies)?.saturating_sub(processor),
            bytes: received(pod)? - bytes,
        })
    }
}

/// Waits until processes rest; the time that they have used by then.
fn until_quiet(processes: &[u32]) -> Result<Duration> {
    let begun = Instant::now();
    let mut last = processor_time(processes)?;
    loop {
        std::thread::sleep(QUIET);
        let now = processor_time(processes)?;
        if now == last || begun.elapsed() > CHANGE_MAX {
            return Ok(now);
        }
        last = now;
    }
}

/// Bytes that came to a pod from the control plane's stream, as the kernel counts them.
fn received(pod: &Pod) -> Result<f64> {
    let mut ask = Command::new("ip");
    ask.args(["netns", "exec", &pod.name.network(), "ss", "-tinH", "dport", "=", ":14010"]);
    let said = finish(&mut ask, PATIENCE)?.ok()?;
    let counts = said.split_whitespace().filter_map(|word| word.strip_prefix("bytes_received:")?.parse::<f64>().ok());
    let all: Vec<f64> = counts.collect();
    ensure!(!all.is_empty(), "no stream to the control plane: {said}");
    Ok(all.iter().sum())
}

/// Does a process' network have a listener there?
fn listens(process: u32, port: u16) -> Result<()> {
    let table = std::fs::read_to_string(format!("/proc/{process}/net/tcp")).context("it ended")?;
    let found = table.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&format!(":{port:04X}"))) && fields.nth(1) == Some("0A")
    });
    ensure!(found, "nothing listens yet");
    Ok(())
}

/// A Service for each number, and for each that nobody calls a Workload.
fn documents(services: usize) -> Result<String> {
    let mut text = String::new();
    for number in 0..services {
        if number != USED {
            text += &service(number, 8080);
        }
        if number >= USED {
            let address = std::net::Ipv4Addr::from(0xAC10_0000_u32 + u32::try_from(number)?);
            write!(
                text,
                "---\napiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{ name: w-{number}, namespace: bench, labels: {{ app: w-{number} }} }}\nspec: {{ addresses: [{address}] }}\n"
            )?;
        }
    }
    Ok(text)
}

fn service(number: usize, port: u16) -> String {
    let app = if number < USED { "used".to_owned() } else { format!("w-{number}") };
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{ name: s-{number}, namespace: bench }}\nspec:\n  selector: {{ app: {app} }}\n  ports: [{{ name: http, port: 80, targetPort: {port} }}]\n"
    )
}

fn envoy_bootstrap(folder: &Path, services: usize) -> Value {
    let hosts: Vec<Value> = (0..services)
        .map(|number| {
            // Whatever the load generator says, the first service answers.
            let domains = if number == 0 { json!(["*"]) } else { json!([format!("s-{number}"), format!("s-{number}.bench")]) };
            json!({ "name": format!("s-{number}"), "domains": domains,
                "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": format!("s-{number}") } }] })
        })
        .collect();
    json!({
        "node": { "id": "bench", "cluster": "bench" },
        "dynamic_resources": { "cds_config": { "resource_api_version": "V3", "path_config_source": { "path": folder.join("clusters.json") } } },
        "static_resources": { "listeners": [{
            "name": "in", "address": { "socket_address": { "address": "127.0.0.1", "port_value": ENVOY_PORT } },
            "filter_chains": [{ "filters": [{ "name": "http", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "stat_prefix": "bench",
                "route_config": { "virtual_hosts": hosts, "validate_clusters": false },
                "http_filters": [{ "name": "router", "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" } }],
            } }] }],
        }] },
    })
}

fn envoy_clusters(server: &str, services: usize, port: u16) -> Value {
    let clusters: Vec<Value> = (0..services)
        .map(|number| {
            let name = format!("s-{number}");
            // The last one is the one that changes.
            let port = if number + 1 == services { port } else { 8080 };
            json!({
                "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster",
                "name": name, "type": "STATIC", "connect_timeout": "5s",
                "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": [{ "endpoint": {
                    "address": { "socket_address": { "address": server, "port_value": port } } } }] }] },
            })
        })
        .collect();
    json!({ "version_info": port.to_string(), "resources": clusters })
}
