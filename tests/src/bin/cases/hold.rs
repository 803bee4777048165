//! While a pod's sidecar is away: connections wait for it, for a named time, and nothing goes past it.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, finish, kill, outrigger, wait_for};
use e2e::programs;
use e2e::runner::{Case, Runner, Wish};
use rustix::process::Signal;

use crate::world::{client, echo, expect, said, service, until};

struct World {
    _web: Pod,
    caller: Pod,
    mesh: Mesh,
}

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let make = || {
        let mesh = Mesh::up()?;
        mesh.apply(&service("hold", "web", 80, 8080))?;
        let world = World { _web: echo(&mesh, "hold/web", "web")?, caller: client(&mesh, "hold/caller")?, mesh };
        until(&world.caller, "http://web/", 200)?;
        Ok(world)
    };
    runner.group(
        "hold",
        make,
        &[
            Case { name: "a_program_that_dials_before_its_sidecar_is_there_waits_for_it", run: late_callers },
            Case { name: "who_dials_a_pod_before_its_sidecar_is_there_waits_for_it", run: |world, _| late_server(world) },
            Case { name: "connections_wait_while_a_killed_sidecar_is_started_again", run: |world, _| killed(world) },
            Case { name: "nobody_waits_longer_than_the_hold_time", run: |world, _| bounded(world) },
            Case { name: "without_a_hold_time_connections_are_refused_at_once", run: |world, _| refused(world) },
            Case { name: "who_asks_how_the_mesh_is_learns_whose_connections_wait", run: |world, _| told(world) },
        ],
    );
}

/// Pods at once in the first case.
const AT_ONCE: usize = 8;

/// Strict mutual TLS makes the proof: plaintext that went past the sidecar would be refused by the other one.
fn late_callers(_world: &World, wish: &Wish) -> Result<()> {
    let runs = if wish.long { 1_000 } else { 24 };
    let call = |number: usize| {
        let name = format!("late-{number}");
        let mut run = outrigger(["run", &name, "-n", "hold", "--sidecar-after", "500ms", "--"]);
        run.args(["curl", "-sS", "--fail-with-body", "--noproxy", "*", "--max-time", "20", "http://web/"]);
        let begun = Instant::now();
        let answered = finish(&mut run, PATIENCE)?.ok().with_context(|| format!("call {number}"))?;
        ensure!(answered.contains("hold/web"), "call {number} was answered by {answered}");
        ensure!(begun.elapsed() >= Duration::from_millis(500), "call {number} did not wait for its sidecar");
        Ok(())
    };
    let numbers: Vec<usize> = (0..runs).collect();
    for some in numbers.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            let calls: Vec<_> = some.iter().map(|number| scope.spawn(move || call(*number))).collect();
            calls.into_iter().try_for_each(|call| call.join().unwrap_or_else(|_panic| Err(anyhow::anyhow!("a call panicked"))))
        })?;
    }
    Ok(())
}

fn late_server(world: &World) -> Result<()> {
    let pod = world.mesh.pod("hold/late").account("late").env("NAME", "hold/late").hold("60s").sidecar_after("3s");
    let late = pod.run([programs::shop().into_os_string(), "echo".into()])?;
    let url = format!("http://{}:8080/", late.address()?);
    // The caller's sidecar may have to learn of the pod first.
    let answer = wait_for("an answer of the pod", PATIENCE, || {
        let is_there = late.sidecar().is_ok();
        let answer = expect(&world.caller, &[&url], 200)?;
        Ok((!is_there).then_some(answer))
    })?;
    let answer = answer.context("the sidecar was there already, which proves nothing")?;
    ensure!(said(&answer)?["service"] == "hold/late", "answered by {}", answer.body);
    ensure!(late.sidecar().is_ok(), "answered without a sidecar");
    Ok(())
}

fn killed(world: &World) -> Result<()> {
    // Sidecars that end again and again share one hold time, so that has to last for all of them.
    let web = world.mesh.pod("hold/often-web").label("app", "often").env("NAME", "often").hold("60s");
    let web = web.run([programs::shop().into_os_string(), "echo".into()])?;
    let caller = world.mesh.pod("hold/often-caller").hold("60s").idle()?;
    world.mesh.apply(&service("hold", "often", 80, 8080))?;
    until(&caller, "http://often/", 200)?;
    for _again in 0..4 {
        for pod in [&web, &caller] {
            let before = pod.sidecar()?;
            kill(before, Signal::KILL);
            wait_for("the sidecar's end", PATIENCE, || {
                ensure!(!std::path::Path::new(&format!("/proc/{before}/exe")).exists(), "it still runs");
                Ok(())
            })?;
            // A request that still went to the one that was killed, before its end was noticed, may fail: 502. One that had
            // to connect waits.
            let first = caller.curl(["http://often/"])?;
            ensure!([200, 502].contains(&first.status), "answered with {}: {}", first.status, first.body);
            expect(&caller, &["http://often/"], 200)?;
            wait_for("the sidecar is started again", PATIENCE, || {
                ensure!(pod.sidecar()? != before && pod.metrics().is_ok(), "it is not");
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// A pod whose sidecar is killed and not started again: its supervisor is stopped meanwhile.
struct Abandoned<'a> {
    pod: &'a Pod,
    supervisor: u32,
    since: Instant,
}

impl<'a> Abandoned<'a> {
    fn now(pod: &'a Pod) -> Result<Self> {
        let supervisor = pod.supervisor()?;
        let sidecar = pod.sidecar()?;
        kill(supervisor, Signal::STOP);
        let abandoned = Self { pod, supervisor, since: Instant::now() };
        kill(sidecar, Signal::KILL);
        Ok(abandoned)
    }

    /// How long a connection of the pod to anywhere takes until it is refused.
    fn refused_after(&self) -> Result<Duration> {
        let answer = self.pod.curl(["http://10.65.0.1/"])?;
        // 7: refused; 52 and 56: taken, and closed without an answer.
        ensure!([7, 52, 56].contains(&answer.said.code), "not refused: {} {}", answer.said.code, answer.said.all());
        Ok(self.since.elapsed())
    }
}

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        kill(self.supervisor, Signal::CONT);
    }
}

fn bounded(world: &World) -> Result<()> {
    let pod = world.mesh.pod("hold/bounded").account("bounded").env("NAME", "hold/bounded").hold("2s");
    let pod = pod.run([programs::shop().into_os_string(), "echo".into()])?;
    pod.wait_listening(8080)?;
    let url = format!("http://{}:8080/", pod.address()?);
    until(&world.caller, &url, 200)?;
    let abandoned = Abandoned::now(&pod)?;
    let outside: Child = world.caller.spawn(["curl", "-sS", "--noproxy", "*", "--max-time", "10", "-o", "/dev/null", &url])?;
    let waited = abandoned.refused_after()?;
    ensure!(waited >= Duration::from_millis(1_900), "refused after {waited:?} already");
    ensure!(waited < Duration::from_secs(4), "refused after {waited:?} only");
    outside.wait_with_output()?;
    // Now nothing waits any more, from neither side.
    let again = Instant::now();
    abandoned.refused_after()?;
    let answer = world.caller.curl([&url])?;
    ensure!(answer.status == 503, "the pod without a sidecar answered {}: {}", answer.status, answer.body);
    ensure!(again.elapsed() < Duration::from_secs(4), "refused after {:?} only", again.elapsed());
    drop(abandoned);
    until(&world.caller, &url, 200)?;
    Ok(())
}

fn refused(world: &World) -> Result<()> {
    let pod = world.mesh.pod("hold/none").hold("0s").idle()?;
    let abandoned = Abandoned::now(&pod)?;
    let waited = abandoned.refused_after()?;
    ensure!(waited < Duration::from_secs(1), "refused after {waited:?}");
    Ok(())
}

fn told(world: &World) -> Result<()> {
    let pod = world.mesh.pod("hold/told").hold("30s").idle()?;
    let abandoned = Abandoned::now(&pod)?;
    wait_for("status tells of the pod", Duration::from_secs(20), || {
        let status = finish(&mut outrigger(["status"]), PATIENCE)?;
        let line = status.stdout.lines().find(|line| line.starts_with("hold/told: connections wait for its sidecar since "));
        let line = line.with_context(|| status.all())?;
        ensure!(line.ends_with(" s (at most 30 s)") && status.code == 1, "{line}, {}", status.code);
        Ok(())
    })?;
    drop(abandoned);
    wait_for("nothing waits any more", PATIENCE, || {
        let status = finish(&mut outrigger(["status"]), PATIENCE)?;
        ensure!(!status.stdout.contains("connections wait"), "{}", status.all());
        Ok(())
    })
}
