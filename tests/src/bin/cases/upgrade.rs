//! The node agent of another version on the pins of this one: `OUTRIGGER_BIN` is the version that is there, `OUTRIGGER_NEXT` the one
//! that takes over. What it needs is a binary of an earlier version, so these cases run where they are asked for.

use std::ffi::OsString;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, target, wait_for};
use e2e::runner::{Case, Runner, Wish};

use crate::faults::{Dead, no_loss, verdict};
use crate::world::{client, echo, service, until};

struct World {
    client: Pod,
    _web: Pod,
    mesh: Mesh,
}

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let name = "an_agent_of_another_version_takes_over_and_loses_no_request";
    if std::env::var_os("OUTRIGGER_NEXT").is_none() {
        return runner.by_hand("upgrade", name, "OUTRIGGER_BIN and OUTRIGGER_NEXT name the two builds");
    }
    let make = || {
        let mesh = Mesh::up()?;
        let web = echo(&mesh, "upgrade/web", "web")?;
        let caller = client(&mesh, "upgrade/client")?;
        mesh.apply(&service("upgrade", "web", 80, 8080))?;
        until(&caller, "http://web/", 200)?;
        Ok(World { client: caller, _web: web, mesh })
    };
    runner.group("upgrade", make, &[Case { name, run: taken_over }]);
}

/// An agent of the other version, with the arguments of the one that was there, until this is dropped.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Requests on connections that stand, and requests on connections of their own, at a fixed rate; then the former version's agent
/// comes back, which may refuse the pins, and the traffic goes on all the same.
fn taken_over(world: &World, wish: &Wish) -> Result<()> {
    let (seconds, rate) = if wish.long { (30, 1_000) } else { (12, 150) };
    let drive = |more: &[&str]| {
        let mut command = world.client.name.exec([target().join("debug/load")]);
        command.args(["drive", "web:80", "--connections", "16", "--rate", &rate.to_string()]);
        command.args(["--seconds", &seconds.to_string()]).args(more);
        command.stdout(Stdio::piped()).spawn().context("cannot run the load generator")
    };
    let running = [drive(&[])?, drive(&["--reconnect"])?];
    std::thread::sleep(Duration::from_secs(2));
    let former = world.mesh.process("node")?;
    let arguments = std::fs::read(format!("/proc/{former}/cmdline"))?;
    let words: Vec<&str> = std::str::from_utf8(&arguments)?.split_terminator('\0').skip(1).collect();
    let next: OsString = std::env::var_os("OUTRIGGER_NEXT").context("OUTRIGGER_NEXT")?;
    let log = world.mesh.folder().join("next.log");
    let dead = Dead::now(&world.mesh, &["node"])?;
    let mut command = Command::new(next);
    command.args(words).env("OUTRIGGER_LOG", "text").stdout(Stdio::null()).stderr(std::fs::File::create(&log)?);
    let agent = Agent(command.spawn()?);
    let stands = || {
        let said = std::fs::read_to_string(&log)?;
        ensure!(said.contains("capture stands"), "{said}");
        // Both sidecars hand their listeners over again.
        ensure!(said.matches("sidecar enrolled").count() >= 2, "{said}");
        Ok(said)
    };
    let said = wait_for("the next version's agent", PATIENCE, stands)?;
    for line in said.lines().filter(|line| line.contains("layout") || line.contains("programs stand")) {
        println!("upgrade: {line}");
    }
    std::thread::sleep(Duration::from_secs(3));
    drop(agent);
    drop(dead);
    for load in running {
        let seen = verdict(load)?;
        println!("upgrade: {seen}");
        no_loss(&seen)?;
    }
    until(&world.client, "http://web/", 200).map(drop)
}
