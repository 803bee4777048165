//! Identities from a real SPIRE: its server and agent run on this machine, and the mesh has no other word on who is who. SPIRE
//! knows a process by its user here, which is another one for each sidecar; on Kubernetes it is by the pod.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::lacks;
use e2e::mesh::{Mesh, Pod, finish, wait_for};
use e2e::runner::{Case, Runner};
use e2e::spire::{PATIENCE, Spire};
use serde_json::Value;

use crate::world::{client, echo, expect, metric, own, service, until};

/// Where sidecars of a local mesh ask: its own agent makes way for SPIRE's.
const SOCKET: &str = "/run/outrigger/workload.sock";
const NAMESPACE: &str = "spire";
const CASES: &[Case<World>] = &[
    Case { name: "calls_are_mutual_tls_by_certificates_that_spire_issued", run: |world, _| called(world) },
    Case { name: "a_policy_knows_callers_by_the_ids_of_spires_entries", run: |world, _| refused(world) },
    Case { name: "what_spire_renews_is_taken_while_calls_go_on", run: |world, _| renewed(world) },
    Case { name: "another_authority_of_spires_is_believed_at_once", run: |world, _| rotated(world) },
];
const LAST: &[Case<World>] = &[Case { name: "calls_go_on_while_spires_agent_is_away", run: |world, _| alone(world) }];

/// A mesh with a server and two callers, each of which SPIRE has an entry for.
struct World {
    web: Pod,
    caller: Pod,
    other: Pod,
    mesh: Mesh,
    spire: RefCell<Spire>,
}

/// Runs the group, where full counts are asked for: SPIRE takes long to build.
pub(crate) fn run(runner: &mut Runner) {
    let cases = [CASES, LAST].concat();
    if !runner.is_long() {
        return;
    }
    if let Some(what) = lacks() {
        return cases.iter().for_each(|case| runner.left_out("spire", case.name, &what));
    }
    runner.group("spire", world, &cases);
}

fn world() -> Result<World> {
    e2e::spire::build()?;
    let mut spire = Spire::start()?;
    let environment = [("OUTRIGGER_CONTROL_WORKLOAD_API", SOCKET), ("OUTRIGGER_FOREIGN_IDENTITIES", "true")];
    let mesh = Mesh::up_in(&[], &environment)?;
    std::fs::remove_file(SOCKET)?;
    // The control plane runs as root; nobody else is asked for by that entry.
    spire.entry("spiffe://cluster.local/ns/outrigger-system/sa/control", &["unix:uid:0"])?;
    spire.agent(Path::new(SOCKET), r#"WorkloadAttestor "unix" { plugin_data {} }"#)?;
    wait_for("the control plane's identity", PATIENCE, || {
        let api = mesh.api("/api/status")?["workloadApi"].clone();
        ensure!(api["missing"].is_null(), "{api}");
        Ok(())
    })?;
    mesh.apply(&service(NAMESPACE, "web", 80, 8080))?;
    let name = |name: &str| format!("{NAMESPACE}/{name}");
    let web = known(&mesh, &spire, "web", || echo(&mesh, &name("web"), "web"))?;
    let caller = known(&mesh, &spire, "caller", || client(&mesh, &name("caller")))?;
    let other = known(&mesh, &spire, "other", || client(&mesh, &name("other")))?;
    until(&caller, "http://web/", 200)?;
    Ok(World { web, caller, other, mesh, spire: RefCell::new(spire) })
}

/// Runs a pod, and writes SPIRE an entry for it as soon as it is known which user its sidecar has.
fn known(mesh: &Mesh, spire: &Spire, name: &str, run: impl FnOnce() -> Result<Pod> + Send) -> Result<Pod> {
    let record = mesh.folder().join(format!("state/pods/{NAMESPACE}.{name}.json"));
    std::thread::scope(|threads| {
        let running = threads.spawn(run);
        let user = wait_for("the pod's record", PATIENCE, || {
            let record: Value = serde_json::from_slice(&std::fs::read(&record)?)?;
            let addresses = record["addresses"].as_array().context("it has no addresses")?.clone();
            let address = addresses.iter().filter_map(Value::as_str).find_map(|text| text.parse::<std::net::Ipv4Addr>().ok());
            let [.., high, low] = address.context("it has no IPv4 address")?.octets();
            Ok(1_900_000_000 + u32::from(high) * 256 + u32::from(low))
        })?;
        spire.entry(&format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/{name}"), &[&format!("unix:uid:{user}")])?;
        running.join().map_err(|_panic| anyhow::anyhow!("running the pod panicked"))?
    })
}

fn id(name: &str) -> String {
    format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/{name}")
}

/// The seconds at which a sidecar's certificate ends.
fn ends(pod: &Pod) -> Result<f64> {
    metric(pod, "outrigger_certificate_expiry_timestamp_seconds", &[])
}

fn called(world: &World) -> Result<()> {
    let caller = id("caller");
    wait_for("the caller's identity in a metric", PATIENCE, || {
        expect(&world.caller, &["http://web/"], 200)?;
        let counted = metric(&world.web, "outrigger_requests_total", &[&caller, r#"mtls="true""#])?;
        ensure!(counted > 0.0, "{caller} is not in\n{}", world.web.metrics()?);
        Ok(())
    })?;
    // In clear nobody comes in.
    let mut plain = std::process::Command::new("curl");
    plain.args([
        "-sS",
        "--noproxy",
        "*",
        "--max-time",
        "5",
        "-w",
        "%{http_code}",
        &format!("http://{}:8080/", world.web.address()?),
    ]);
    let said = finish(&mut plain, PATIENCE)?;
    ensure!(!said.stdout.ends_with("200"), "plaintext came in: {}", said.all());
    // The mesh's own authority signed for no workload.
    let status = world.mesh.api("/api/status")?;
    ensure!(status["workloadApi"]["identity"] == "spiffe://cluster.local/ns/outrigger-system/sa/control", "{status}");
    let mut scrape = std::process::Command::new("curl");
    scrape.args(["-sS", "--fail", "--noproxy", "*", "--max-time", "5", "http://127.0.0.1:14014/metrics"]);
    let counted = finish(&mut scrape, PATIENCE)?.ok()?;
    ensure!(!counted.contains(r#"subject="workload""#), "the own authority was asked for a workload:\n{counted}");
    Ok(())
}

fn refused(world: &World) -> Result<()> {
    let rule = format!(
        "{{ targetRefs: [{{ kind: Service, name: web }}], action: ALLOW, rules: [{{ from: [{{ principals: ['{}'] }}] }}] }}",
        id("caller")
    );
    let policy = own("AuthorizationPolicy", NAMESPACE, "callers", &rule);
    world.mesh.apply(&policy)?;
    until(&world.other, "http://web/", 403)?;
    until(&world.caller, "http://web/", 200)?;
    world.mesh.delete(&policy)?;
    until(&world.other, "http://web/", 200).map(drop)
}

fn renewed(world: &World) -> Result<()> {
    let before = [ends(&world.web)?, ends(&world.caller)?];
    wait_for("the next certificates", PATIENCE, || {
        expect(&world.caller, &["http://web/"], 200)?;
        let now = [ends(&world.web)?, ends(&world.caller)?];
        ensure!(now[0] > before[0] && now[1] > before[1], "{now:?} after {before:?}");
        Ok(())
    })
}

fn rotated(world: &World) -> Result<()> {
    let authorities = || -> Result<BTreeSet<String>> { world.spire.borrow().authorities() };
    let before = authorities()?;
    world.spire.borrow().rotate(Path::new(SOCKET))?;
    ensure!(authorities()?.len() > before.len(), "SPIRE has no further authority");
    // Each takes a certificate of the new one in its time; meanwhile some have the old one.
    renewed(world)?;
    renewed(world)
}

fn alone(world: &World) -> Result<()> {
    world.spire.borrow_mut().lose_agent();
    wait_for("the end of the agent, told", PATIENCE, || {
        let api = world.mesh.api("/api/status")?["workloadApi"].clone();
        ensure!(api["trouble"].is_string(), "{api}");
        Ok(())
    })?;
    for _ in 0..5 {
        expect(&world.caller, &["http://web/"], 200)?;
    }
    Ok(())
}
