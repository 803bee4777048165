//! Parts that die: what goes on, what is refused, what never opens.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, finish, kill, outrigger, target, wait_for};
use e2e::programs;
use e2e::runner::{Case, Runner, Wish};
use rustix::process::Signal;
use serde_json::Value;

use crate::world::{client, echo, expect, service, until};

struct World {
    client: Pod,
    web: Pod,
    mesh: Mesh,
}

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let make = || {
        let mesh = Mesh::up()?;
        let web = echo(&mesh, "fault/web", "web")?;
        let caller = client(&mesh, "fault/client")?;
        mesh.apply(&(service("fault", "web", 80, 8080) + &service("fault", "other", 80, 8080)))?;
        until(&caller, "http://web/", 200)?;
        Ok(World { client: caller, web, mesh })
    };
    runner.group(
        "faults",
        make,
        &[
            Case { name: "an_idle_sidecar_is_small", run: |world, _| idle(world) },
            Case { name: "a_sidecar_is_ready_soon", run: |world, _| ready(world) },
            Case { name: "killing_the_control_plane_loses_no_request", run: |world, wish| killed(world, wish, "control") },
            Case { name: "killing_the_node_agent_loses_no_request", run: |world, wish| killed(world, wish, "node") },
            Case { name: "commands_wait_for_a_control_plane_that_is_started_again", run: |world, _| commands(world) },
            Case { name: "an_agent_of_another_build_takes_over_and_loses_no_request", run: another_build },
            Case { name: "a_first_use_without_control_plane_is_refused_by_name", run: |world, _| first_use(world) },
            Case { name: "names_resolve_without_control_plane_and_node_agent", run: |world, _| names(world) },
            Case { name: "killing_a_sidecar_closes_its_pod_and_never_opens_it", run: |world, _| sidecar(world) },
        ],
    );
}

/// Keeps the client busy with the service `web`.
fn load(world: &World, seconds: f64) -> Result<Child> {
    let program = target().join("debug/load");
    let seconds = seconds.to_string();
    let mut command = world.client.name.exec([program.as_os_str()]);
    command.args(["drive", "web:80", "--connections", "4", "--pause", "3", "--seconds", &seconds]);
    command.stdout(Stdio::piped()).spawn().context("cannot run the load generator")
}

pub(crate) fn verdict(load: Child) -> Result<Value> {
    let output = load.wait_with_output()?;
    serde_json::from_slice(&output.stdout).with_context(|| format!("the load generator said {output:?}"))
}

pub(crate) fn no_loss(seen: &Value) -> Result<()> {
    let good = seen["statuses"]["200"].as_u64().unwrap_or(0);
    ensure!(good > 100, "hardly any request went through: {seen}");
    ensure!(
        seen["requests"].as_u64() == Some(good) && seen["failures"].as_object().is_some_and(serde_json::Map::is_empty),
        "requests were lost: {seen}"
    );
    Ok(())
}

fn killed(world: &World, wish: &Wish, role: &str) -> Result<()> {
    // Longer than all of the kills take: the pause before the next start doubles with each, up to 5 s.
    let (times, seconds) = if wish.long { (20, 102.0) } else { (5, 12.0) };
    let running = load(world, seconds)?;
    for number in 0..times {
        let process = world.mesh.process(role)?;
        // No pattern: the wait is drawn from the clock.
        let wait = std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.subsec_nanos() % 400);
        std::thread::sleep(Duration::from_millis(100 + u64::from(wait)));
        kill(process, Signal::KILL);
        wait_for(&format!("{role} runs again after kill {number}"), PATIENCE, || {
            let now = world.mesh.process(role)?;
            ensure!(now != process && alive(now), "it does not");
            Ok(())
        })?;
    }
    no_loss(&verdict(running)?)?;
    // And what comes after is served as before.
    until(&world.client, "http://web/", 200).map(drop)
}

/// Options are part of a build's print: an agent that writes the kernel's rare events into its log replaces every program
/// of one that does not, link by link, and the other way round. Meanwhile requests on connections that stand and requests
/// on connections of their own are driven at a fixed rate, so that one that would be held up is not simply left out.
fn another_build(world: &World, wish: &Wish) -> Result<()> {
    // The pause before the first build's agent is started anew doubles with each round.
    let (rounds, rate) = if wish.long { (8, 1_000) } else { (2, 150) };
    let program = target().join("debug/load");
    let seconds = (rounds * 5 + 4).to_string();
    let drive = |more: &[&str]| {
        let mut command = world.client.name.exec([program.as_os_str()]);
        command.args(["drive", "web:80", "--connections", "16", "--rate", &rate.to_string(), "--seconds", &seconds]).args(more);
        command.stdout(Stdio::piped()).spawn().context("cannot run the load generator")
    };
    let running = [drive(&[])?, drive(&["--reconnect"])?];
    for round in 0..rounds {
        let former = world.mesh.process("node")?;
        let arguments = std::fs::read(format!("/proc/{former}/cmdline"))?;
        let words: Vec<&str> = std::str::from_utf8(&arguments)?.split_terminator('\0').skip(1).collect();
        let log = world.mesh.folder().join(format!("another-{round}.log"));
        let mut another = outrigger(words);
        another
            .env("OUTRIGGER_KERNEL_LOG", "true")
            .env("OUTRIGGER_LOG", "text")
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log)?);
        let dead = Dead::now(&world.mesh, &["node"])?;
        let mut another = another.spawn()?;
        let stands = |log: &std::path::Path, adopted: bool| {
            wait_for("the programs of another build", PATIENCE, || {
                let said = std::fs::read_to_string(log)?;
                ensure!(said.contains("capture stands") && said.contains(&format!("adopted={adopted}")), "{said}");
                Ok(())
            })
        };
        let taken = stands(&log, false);
        std::thread::sleep(Duration::from_secs(1));
        another.kill()?;
        another.wait()?;
        taken?;
        // The supervisor starts one of the first build again, which takes over in its turn.
        drop(dead);
        std::thread::sleep(Duration::from_secs(1));
    }
    for load in running {
        no_loss(&verdict(load)?)?;
    }
    until(&world.client, "http://web/", 200).map(drop)
}

fn commands(world: &World) -> Result<()> {
    let document = world.mesh.folder().join("more.yaml");
    std::fs::write(&document, service("fault", "more", 80, 8080))?;
    let document = document.to_string_lossy().into_owned();
    let (status, apply, delete) = (vec!["status"], vec!["apply", "-f", &document], vec!["delete", "-f", &document]);
    let mut kills = 0;
    for delay_ms in [300, 150, 0] {
        for command in [&status, &apply, &delete] {
            let process = world.mesh.process("control")?;
            kill(process, Signal::KILL);
            kills += 1;
            // From after it may be there again to before its end is noticed.
            std::thread::sleep(Duration::from_millis(delay_ms));
            let said = finish(&mut outrigger(command), PATIENCE)?;
            ensure!(said.code == 0, "{command:?}, {delay_ms} ms after: {}", said.all());
            wait_for("the restart", PATIENCE, || {
                ensure!(world.mesh.process("control")? != process, "it is not there");
                Ok(())
            })?;
        }
    }
    let told = finish(&mut outrigger(["status", "-o", "json"]), PATIENCE)?.ok()?;
    let told: Value = serde_json::from_str(&told)?;
    let of_control = &told["restarted"]["control"];
    ensure!(of_control["times"].as_u64() >= Some(kills) && of_control["nextAtMs"].is_null(), "{of_control}");
    ensure!(of_control["ended"].as_str().is_some_and(|ended| ended.contains("SIGKILL")), "{of_control}");
    let told = finish(&mut outrigger(["status"]), PATIENCE)?.ok()?;
    ensure!(told.contains("(signal: 9 (SIGKILL)), started anew "), "{told}");
    Ok(())
}

fn alive(process: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{process}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// Stops the supervisor, so that what is killed stays dead until this is dropped.
pub(crate) struct Dead<'a> {
    mesh: &'a Mesh,
    supervisor: u32,
    killed: Vec<(&'static str, u32)>,
}

impl<'a> Dead<'a> {
    pub(crate) fn now(mesh: &'a Mesh, roles: &[&'static str]) -> Result<Self> {
        let supervisor = mesh.process("supervisor")?;
        let killed = roles.iter().map(|role| Ok((*role, mesh.process(role)?))).collect::<Result<Vec<_>>>()?;
        kill(supervisor, Signal::STOP);
        killed.iter().for_each(|(_, process)| kill(*process, Signal::KILL));
        Ok(Self { mesh, supervisor, killed })
    }
}

impl Drop for Dead<'_> {
    fn drop(&mut self) {
        kill(self.supervisor, Signal::CONT);
        for (role, process) in &self.killed {
            wait_for("the supervisor's restart", PATIENCE, || {
                ensure!(self.mesh.process(role)? != *process, "{role} does not run again");
                Ok(())
            })
            .ok();
        }
    }
}

fn first_use(world: &World) -> Result<()> {
    {
        let _dead = Dead::now(&world.mesh, &["control"])?;
        let answer = world.client.curl(["-i", "http://other/"])?;
        ensure!(
            answer.status == 503,
            "a first use without configuration was answered with {}: {}",
            answer.status,
            answer.said.all()
        );
        ensure!(answer.body.contains("no_configuration"), "the refusal does not say no_configuration: {}", answer.body);
        // What is in use goes on.
        expect(&world.client, &["http://web/"], 200)?;
    }
    until(&world.client, "http://web/", 200).map(drop)
}

fn names(world: &World) -> Result<()> {
    let _dead = Dead::now(&world.mesh, &["control", "node"])?;
    for name in ["web", "web.fault", "web.fault.svc.cluster.local"] {
        let said = world.client.exec(["getent", "ahosts", name])?.ok().with_context(|| format!("{name} does not resolve"))?;
        ensure!(said.contains("10.65."), "{name} resolved to {said}");
        expect(&world.client, &[&format!("http://{name}/")], 200)?;
    }
    Ok(())
}

fn sidecar(world: &World) -> Result<()> {
    let pod = echo(&world.mesh, "fault/victim", "victim")?;
    world.mesh.apply(&service("fault", "victim", 80, 8080))?;
    until(&world.client, "http://victim/", 200)?;
    let process = pod.sidecar()?;
    // Held, not killed: whoever restarts it must not win the race against the assertions below.
    let web = world.web.address()?;
    kill(process, Signal::KILL);
    let end = Instant::now() + Duration::from_millis(300);
    let outsider = world.mesh.pod("fault/outsider").outside().idle()?;
    let address = pod.address()?;
    loop {
        // Inbound: plaintext past the sidecar would be answered.
        let answer = outsider.curl(["--max-time", "1", &format!("http://{address}:8080/")])?;
        ensure!(answer.status == 0 || answer.status >= 400, "the pod of a killed sidecar was open to plaintext");
        // Outbound: plaintext to another pod would be refused there, so to a pod outside the mesh.
        let out = pod.curl(["--max-time", "1", &format!("http://{web}:8080/")]);
        ensure!(
            out.is_err()
                || out.is_ok_and(|answer| answer.status == 0
                    || answer.status >= 400
                    || pod.sidecar().is_ok_and(|now| now != process)),
            "traffic left the pod"
        );
        if Instant::now() > end {
            return Ok(());
        }
    }
}

/// What an idle sidecar may have resident: 15 MB.
pub(crate) const IDLE_KIB_MAX: u64 = 15_000_000 / 1024;
/// How much of that counts as the binary's at most: an idle release build has 4 to 7 MiB of it.
const FILE_KIB_MAX: u64 = 8 << 10;

fn idle(world: &World) -> Result<()> {
    let pod = client(&world.mesh, "fault/idle")?;
    // What only the start needed was given back by then, and the control plane has read the metrics once.
    std::thread::sleep(Duration::from_secs(5));
    let (counted, resident, file) = resident(pod.sidecar()?)?;
    ensure!(counted < IDLE_KIB_MAX, "an idle sidecar has {resident} KiB resident, {file} of them the binary's");
    Ok(())
}

/// What a sidecar has resident, in KiB: as a release build would have it, in fact, and how much of that is the binary's.
pub(crate) fn resident(process: u32) -> Result<(u64, u64, u64)> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let field = |name: &str| -> Option<u64> {
        status.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
    };
    let resident = field("VmRSS:").context("no VmRSS")?;
    let file = field("RssFile:").unwrap_or(0);
    // A debug binary has several times the pages of a release build, which is what users run.
    Ok((resident - file + file.min(FILE_KIB_MAX), resident, file))
}

fn ready(world: &World) -> Result<()> {
    let mut best = Duration::MAX;
    for number in 0..3 {
        let name = format!("fault/soon-{number}");
        let start = Instant::now();
        let pod = world.mesh.pod(&name);
        let pod = pod.run([programs::shop().into_os_string(), "echo".into()])?;
        best = best.min(start.elapsed());
        drop(pod);
    }
    // The pod's namespace, its link and `exec` are in it as well.
    ensure!(best < Duration::from_millis(if cfg!(debug_assertions) { 1500 } else { 300 }), "a pod was ready after {best:?}");
    Ok(())
}
