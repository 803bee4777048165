//! How soon a sidecar answers that finds its last good configuration: it is killed, its supervisor starts it again, and a
//! client in its pod asks a service outside of the mesh all the while.

use std::path::Path;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, Pod, finish, kill, wait_for};
use e2e::programs;
use rustix::process::Signal;

use crate::setup::step;
use crate::shell;

/// Milliseconds from the sidecar's process to the first answer, of each round.
pub(crate) fn measure(root: &Path, mesh: &Mesh, rounds: usize) -> Result<Vec<f64>> {
    shell::run(shell::cargo(root, &["build", "--locked", "--workspace", "--features", "e2e/programs", "--bin", "ledger"]))?;
    let ledger = programs::ledger().to_string_lossy().into_owned();
    let serve = [ledger.as_str(), "serve", "8080", "60000", "60000"];
    let server = mesh.pod("bench/plain").label("app", "plain").outside().run(serve)?;
    server.wait_listening(8080)?;
    let client = mesh.pod("bench/asker").detach(["sleep", "1000000"])?;
    mesh.apply(
        "apiVersion: v1\nkind: Service\nmetadata: { namespace: bench, name: plain }\n\
         spec: { selector: { app: plain }, ports: [{ name: http, port: 80, targetPort: 8080 }] }\n",
    )?;
    let ask = [ledger.as_str(), "first", "plain.bench:80"];
    // From now on it is known what the pod calls, and kept.
    client.exec(ask)?.ok()?;
    let mut took = Vec::new();
    for round in 0..rounds {
        took.push(step(&format!("round {} of {rounds}: first answer", round + 1), || again(&client, &ask))?);
    }
    Ok(took)
}

fn again(client: &Pod, ask: &[&str]) -> Result<f64> {
    // It has kept what it was told, and given back what its start needed.
    std::thread::sleep(SETTLED);
    let old = client.sidecar()?;
    kill(old, Signal::KILL);
    wait_for("the sidecar's end", PATIENCE, || {
        ensure!(!client.processes("sidecar")?.contains(&old), "it is still there");
        Ok(())
    })?;
    let mut asking = client.name.exec(ask);
    let asking = std::thread::spawn(move || finish(&mut asking, PATIENCE));
    let deadline = Instant::now() + PATIENCE;
    // The child enters its cgroup before it becomes the sidecar.
    while client.processes("sidecar")?.is_empty() {
        ensure!(Instant::now() < deadline, "the sidecar was not started again");
        std::thread::sleep(GLANCE);
    }
    let begun = UNIX_EPOCH.elapsed()?.as_secs_f64() * 1000.0;
    let said = asking.join().ok().context("the asker broke down")??.ok()?;
    let answered: f64 = said.trim().parse().context("the asker said no time")?;
    let took = answered / 1000.0 - begun;
    ensure!(took > 0.0, "an answer before the sidecar was there");
    Ok(took)
}

const SETTLED: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(30);
const GLANCE: Duration = Duration::from_micros(200);
