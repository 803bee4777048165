//! Capture that proves itself: what is taken off is told everywhere and put back, a pod whose connections do not come to its
//! sidecar is not ready, and nobody has more rights than that takes.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, Said, finish, outrigger, wait_for};
use e2e::runner::{Case, Runner};
use serde_json::Value;

use crate::world::{Pair, client, until};

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let make = || Pair::make(Mesh::up_in(&[], &[("OUTRIGGER_ATTEST_EVERY", "2s")])?, "proof");
    runner.group(
        "proof",
        make,
        &[
            Case { name: "agent_and_sidecars_have_the_rights_that_they_need_and_no_more", run: |world, _| rights(world) },
            Case { name: "a_pod_that_runs_has_proven_both_ways_and_doctor_says_so", run: |world, _| proven(world) },
            Case {
                name: "a_pod_whose_connections_do_not_come_to_its_sidecar_is_not_ready_until_they_do",
                run: |world, _| unready(world),
            },
            Case {
                name: "each_program_that_is_taken_off_is_told_everywhere_within_an_interval_and_put_back",
                run: |world, _| put_back(world),
            },
            Case { name: "what_is_taken_off_again_and_again_stays_off_after_three_times_and_is_told", run: |_, _| given_up() },
        ],
    );
}

/// A set of capabilities of a process: `CapEff`, `CapPrm` or `CapBnd`.
fn capabilities(process: u32, set: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let mask = status.lines().find_map(|line| line.strip_prefix(&format!("{set}:"))).context("no such set")?;
    Ok(u64::from_str_radix(mask.trim(), 16)?)
}

fn rights(world: &Pair) -> Result<()> {
    // CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF, by their numbers in capabilities(7).
    let agents = 1 << 12 | 1 << 38 | 1 << 39;
    let agent = world.mesh.process("node")?;
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        let held = capabilities(agent, set)?;
        ensure!(held == agents, "{set} of the agent is {held:016x}");
        for pod in [&world.web, &world.caller] {
            let held = capabilities(pod.sidecar()?, set)?;
            ensure!(held == 0, "{set} of a sidecar is {held:016x}");
        }
    }
    // With these alone it enrols who comes; one that is started again, too.
    e2e::mesh::kill(agent, rustix::process::Signal::KILL);
    wait_for("another agent", PATIENCE, || {
        ensure!(world.mesh.process("node")? != agent, "the same");
        ensure!(get("http://127.0.0.1:14030/ready")?.stdout.ends_with("200"), "not ready");
        Ok(())
    })?;
    ensure!(capabilities(world.mesh.process("node")?, "CapEff")? == agents, "another set");
    let late = client(&world.mesh, "proof/late")?;
    until(&late, "http://web.proof/", 200)?;
    until(&world.caller, "http://web.proof/", 200).map(drop)
}

/// A GET from the machine: the body, and the status behind it.
fn get(url: &str) -> Result<Said> {
    finish(Command::new("curl").args(["-sS", "--noproxy", "*", "--max-time", "5", "-w", "%{http_code}", url]), PATIENCE)
}

fn ready(pod: &Pod) -> Result<String> {
    get(&format!("http://{}:14021/ready", pod.address()?))?.ok()
}

fn capture() -> Result<Value> {
    let said = finish(Command::new("curl").args(["-sS", "--noproxy", "*", "http://127.0.0.1:14030/capture"]), PATIENCE)?.ok()?;
    Ok(serde_json::from_str(&said)?)
}

fn agents_metric(name: &str) -> Result<f64> {
    let text = get("http://127.0.0.1:14030/metrics")?.ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.parse().ok()).with_context(|| format!("no {name}"))
}

/// The doctor's findings of one check, each with its verdict and text.
fn doctor(check: &str) -> Result<(i32, Vec<String>)> {
    let said = finish(&mut outrigger(["doctor", "--output", "json"]), PATIENCE)?;
    let seen: Value = serde_json::from_str(&said.stdout).with_context(|| said.all())?;
    let found = seen["checks"].as_array().context("no checks")?.iter().filter(|found| found["check"] == check);
    Ok((said.code, found.map(|found| format!("{} {} {}", found["verdict"], found["text"], found["remedy"])).collect()))
}

fn proven(world: &Pair) -> Result<()> {
    let seen = capture()?;
    for pod in seen["pods"].as_array().context("no pods")? {
        ensure!(pod["proven"]["faults"] == Value::Array(Vec::new()), "{pod}");
    }
    for pod in [&world.web, &world.caller] {
        ensure!(ready(pod)? == "ready\n200", "{}", ready(pod)?);
    }
    for check in ["probes", "attested", "agent"] {
        let (code, found) = doctor(check)?;
        ensure!(code == 0 && found.len() == 1 && found[0].starts_with("\"ok\""), "{check}: {code}: {found:?}");
    }
    ensure!(agents_metric("outrigger_capture_probes_total{outcome=\"passed\"}")? >= 2.0, "none has passed");
    // An app that dials what is there for probes gets nothing, and changes nothing.
    let script = "import socket\nfor to in (('192.0.2.14', 14007), ('192.0.2.14', 80), ('100::14', 14007)):\n  \
                  s = socket.create_connection(to, 5)\n  s.send(b'0' * 32)\n  \
                  try:\n    print(len(s.recv(9)))\n  except ConnectionResetError:\n    print(0)";
    let said = world.caller.exec(["python3", "-c", script])?.ok()?;
    ensure!(said == "0\n0\n0\n", "{said}");
    ensure!(ready(&world.caller)? == "ready\n200", "not ready any more");
    Ok(())
}

/// Waits until the pod is not ready, with these words, and doctor, status and the metric say so too.
fn told(world: &Pair, words: &str) -> Result<()> {
    let (code, found) = doctor("probes")?;
    let named = found.iter().any(|found| found.starts_with("\"fail\"") && found.contains("proof/web") && found.contains(words));
    ensure!(code == 1 && named, "doctor ended with {code}: {found:?}");
    let ready = ready(&world.web)?;
    ensure!(ready.ends_with("503") && ready.contains(words), "{ready}");
    let status = finish(&mut outrigger(["status"]), PATIENCE)?;
    ensure!(
        status.code == 1 && status.stdout.contains("proof/web is not ready") && status.stdout.contains(words),
        "{}",
        status.all()
    );
    ensure!(agents_metric("outrigger_capture_unproven_pods")? == 1.0, "the metric does not say so");
    ensure!(self::ready(&world.caller)? == "ready\n200", "another pod is concerned");
    Ok(())
}

fn recovers(world: &Pair) -> Result<()> {
    // By itself: nobody asks.
    wait_for("the pod is ready again", Duration::from_secs(15), || {
        let ready = ready(&world.web)?;
        ensure!(ready == "ready\n200", "{ready}");
        Ok(())
    })?;
    until(&world.caller, "http://web.proof/", 200).map(drop)
}

fn unready(world: &Pair) -> Result<()> {
    let network = world.web.name.network();
    let ip = |line: &str| {
        let words = ["-n", network.as_str()].into_iter().chain(line.split(' '));
        finish(Command::new("ip").args(words), PATIENCE)?.ok()
    };
    // Without its loopback nothing that the app dials comes to the sidecar.
    ip("link set lo down")?;
    let outbound = told(world, "outbound IPv4");
    ip("link set lo up")?;
    outbound?;
    recovers(world)?;
    // Without the address nothing that is dialled there does.
    let said = ip("-6 -o addr show dev eth0 scope global")?;
    let address = said.split_whitespace().skip_while(|word| *word != "inet6").nth(1).context("no address")?.to_owned();
    ip(&format!("addr del {address} dev eth0"))?;
    let inbound = told(world, "inbound IPv6");
    ip(&format!("addr add {address} dev eth0 nodad"))?;
    inbound?;
    recovers(world)
}

/// What is attached for the node and for one pod: the programs, each with the name of its pin.
fn attached(world: &Pair) -> Result<Vec<(String, String)>> {
    let record = world.mesh.folder().join("state/pods/proof.web.json");
    let record: Value = serde_json::from_str(&std::fs::read_to_string(record)?)?;
    let cookie = record["netnsCookie"].to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir(PINS)? {
        let pin = entry?.file_name().to_string_lossy().into_owned();
        let of_node = pin.strip_prefix("link_").map(str::to_owned);
        let of_pod = pin.split_once(&format!("_{cookie}")).map(|(program, _place)| program.to_owned());
        found.extend(of_node.or(of_pod).map(|program| (program, pin)));
    }
    found.sort();
    Ok(found)
}

fn put_back(world: &Pair) -> Result<()> {
    let attached = attached(world)?;
    ensure!(attached.len() == 14, "attached are {attached:?}");
    for (program, pin) in &attached {
        std::fs::remove_file(format!("{PINS}/{pin}"))?;
        // All at once: before the next look, which finds it in its place again.
        wait_for(&format!("{program} is missed"), INTERVAL + SLACK, || {
            let faults = capture()?["faults"].to_string();
            ensure!(faults.contains(program) && faults.contains("is put back"), "/capture says {faults}");
            ensure!(agents_metric("outrigger_capture_faults")? == 1.0, "the metric does not say so");
            let agent = get("http://127.0.0.1:14030/ready")?.ok()?;
            ensure!(agent.contains(program.as_str()) && agent.ends_with("503"), "the agent says {agent}");
            let pod = ready(&world.web)?;
            ensure!(pod.contains(program.as_str()) && pod.ends_with("503"), "the pod says {pod}");
            let status = finish(&mut outrigger(["status"]), PATIENCE)?;
            let told = format!("capture is not complete: {}", if pin.starts_with("link_") { "" } else { "proof/web: " });
            let named = status.stdout.lines().any(|line| line.starts_with(&told) && line.contains(program.as_str()));
            ensure!(status.code == 1 && named, "{}", status.all());
            Ok(())
        })?;
        wait_for(&format!("{program} is back"), 2 * INTERVAL + SLACK, || {
            ensure!(std::path::Path::new(PINS).join(pin).exists(), "its pin is gone");
            let faults = capture()?["faults"].to_string();
            ensure!(faults == "[]", "/capture says {faults}");
            for pod in [&world.web, &world.caller] {
                ensure!(ready(pod)? == "ready\n200", "the pod says {}", ready(pod)?);
            }
            Ok(())
        })?;
    }
    let status = finish(&mut outrigger(["status"]), PATIENCE)?;
    let told = status.stdout.lines().filter(|line| line.starts_with("warning: ") && line.contains("was put back")).count();
    ensure!(status.code == 0 && told == attached.len(), "{}", status.all());
    until(&world.caller, "http://web.proof/", 200).map(drop)
}

/// The last case: the mesh goes on without that program.
fn given_up() -> Result<()> {
    let pin = format!("{PINS}/link_or_getsockname6");
    let said = || Ok::<_, anyhow::Error>(capture()?["faults"].to_string());
    // It was put back once before.
    for _ in 0..2 {
        std::fs::remove_file(&pin)?;
        wait_for("it is missed", INTERVAL + SLACK, || {
            let said = said()?;
            ensure!(said.contains("getsockname6"), "{said}");
            Ok(())
        })?;
        wait_for("it is back", 2 * INTERVAL + SLACK, || {
            let said = said()?;
            ensure!(said == "[]", "{said}");
            Ok(())
        })?;
    }
    std::fs::remove_file(&pin)?;
    wait_for("it is given up", INTERVAL + SLACK, || {
        let said = said()?;
        ensure!(said.contains("or_getsockname6") && said.contains("3 times within an hour"), "{said}");
        Ok(())
    })?;
    std::thread::sleep(INTERVAL + SLACK);
    ensure!(!std::path::Path::new(&pin).exists() && said()?.contains("or_getsockname6"), "it was put back once more");
    let (code, found) = doctor("attested")?;
    let told =
        found.iter().any(|found| found.starts_with("\"fail\"") && found.contains("or_getsockname6") && found.contains("bpftool"));
    ensure!(code == 1 && told, "doctor ended with {code}: {found:?}");
    Ok(())
}

const PINS: &str = "/run/outrigger/bpf";
/// At which the agent looks.
const INTERVAL: Duration = Duration::from_secs(2);
/// For a machine that has other things to do.
const SLACK: Duration = Duration::from_secs(3);
