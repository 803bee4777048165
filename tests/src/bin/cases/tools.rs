//! People's tools: listings of what is, in tables and as JSON.

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, finish, outrigger};
use e2e::runner::{Case, Runner};
use serde_json::Value;

use crate::world::{client, echo, service, until};

struct World {
    _pods: [Pod; 2],
    _mesh: Mesh,
}

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let make = || {
        let mesh = Mesh::up()?;
        let web = echo(&mesh, "seen/web", "web")?;
        let caller = client(&mesh, "seen/client")?;
        mesh.apply(&service("seen", "web", 80, 8080))?;
        until(&caller, "http://web/", 200)?;
        Ok(World { _pods: [web, caller], _mesh: mesh })
    };
    runner.group(
        "tools",
        make,
        &[
            Case { name: "status_and_proxies_tell_that_all_is_well", run: |world, _| listings(world) },
            Case { name: "get_shows_documents_in_three_forms", run: |world, _| get(world) },
        ],
    );
}

fn json(arguments: &[&str]) -> Result<Value> {
    let said = finish(&mut outrigger(arguments), PATIENCE)?.ok()?;
    serde_json::from_str(&said).with_context(|| format!("`outrigger {}` said no JSON: {said}", arguments.join(" ")))
}

fn listings(_world: &World) -> Result<()> {
    finish(&mut outrigger(["status"]), PATIENCE)?.ok()?;
    json(&["status", "-o", "json"])?;
    let table = finish(&mut outrigger(["proxies"]), PATIENCE)?.ok()?;
    ensure!(table.contains("web") && table.contains("client"), "proxies said {table}");
    let proxies = json(&["proxies", "-o", "json"])?.to_string();
    ensure!(proxies.contains("spiffe://cluster.local/ns/seen/sa/web"), "no identity in {proxies}");
    Ok(())
}

fn get(_world: &World) -> Result<()> {
    let table = finish(&mut outrigger(["get", "Service", "-n", "seen"]), PATIENCE)?.ok()?;
    ensure!(table.contains("web"), "get said {table}");
    let yaml = finish(&mut outrigger(["get", "Service", "web", "-n", "seen", "-o", "yaml"]), PATIENCE)?.ok()?;
    ensure!(yaml.contains("kind: Service") && yaml.contains("10.65."), "get said {yaml}");
    json(&["get", "Service", "web", "-n", "seen", "-o", "json"])?;
    let gone = finish(&mut outrigger(["get", "Service", "gone", "-n", "seen"]), PATIENCE)?;
    ensure!(gone.code == 1, "what is not there was answered with {}: {}", gone.code, gone.all());
    Ok(())
}
