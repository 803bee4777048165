//! People's tools: listings of what is, in tables and as JSON.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, binary, finish, outrigger, wait_for};
use e2e::runner::{Case, Runner};
use serde_json::Value;

use crate::world::{Nobody, client, echo, own, service, until};

struct World {
    _web: Pod,
    caller: Pod,
    mesh: Mesh,
}

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let make = || {
        let mesh = Mesh::up()?;
        let web = echo(&mesh, "seen/web", "web")?;
        let caller = client(&mesh, "seen/client")?;
        mesh.apply(&service("seen", "web", 80, 8080))?;
        until(&caller, "http://web/", 200)?;
        Ok(World { _web: web, caller, mesh })
    };
    runner.group(
        "tools",
        make,
        &[
            Case { name: "status_and_proxies_tell_that_all_is_well", run: |world, _| listings(world) },
            Case { name: "doctor_finds_a_mesh_well_and_tells_who_is_not_root", run: |world, _| doctor(world) },
            Case { name: "get_shows_documents_in_three_forms", run: |world, _| get(world) },
            Case { name: "get_flows_names_both_ends_of_a_connection_that_ended", run: |world, _| flows(world) },
            Case { name: "another_user_may_look_at_the_dashboard_and_at_nothing_else", run: |world, _| another_user(world) },
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

fn doctor(_world: &World) -> Result<()> {
    let seen = json(&["doctor", "-o", "json"])?;
    ensure!(seen["well"] == true, "doctor said {seen}");
    let checks = seen["checks"].as_array().context("no checks")?;
    for name in ["kernel", "capabilities", "btf", "bpffs", "cgroup2", "programs", "nftables", "pods", "mesh"] {
        let is_ok = checks.iter().any(|check| check["check"] == name && check["verdict"] == "ok");
        ensure!(is_ok, "{name} is not ok: {seen}");
    }
    let said = Nobody::new()?.finish(&["doctor"])?;
    ensure!(said.code == 1, "doctor ended with {}: {}", said.code, said.all());
    ensure!(said.stdout.contains("fail  capabilities") && said.stdout.contains("remedy: run it as root"), "{}", said.all());
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

/// A pod that ends: what others had with it closes, and is known by its name still.
fn flows(world: &World) -> Result<()> {
    let brief = echo(&world.mesh, "seen/brief", "brief")?;
    world.mesh.apply(&service("seen", "brief", 80, 8080))?;
    until(&world.caller, "http://brief/", 200)?;
    let address = brief.address()?;
    brief.stop()?;
    let flow = wait_for("the flow's record", PATIENCE, || {
        let told = json(&["get", "flows", "client", "-n", "seen", "-o", "json"])?;
        let flows = told["flows"].as_array().context("no flows")?;
        let found = flows.iter().find(|flow| flow["peer"] == "seen/brief" && flow["direction"] == "outbound");
        found.cloned().with_context(|| format!("none with seen/brief in {told}"))
    })?;
    ensure!(flow["remote"] == format!("{address}:8080"), "it was with {flow}");
    let least = |field: &str| flow[field].as_u64().unwrap_or(0);
    ensure!(least("sentBytes") > 100 && least("receivedBytes") > 100 && least("roundTripUs") > 0, "it tells {flow}");
    ensure!(least("durationUs") > 0 && ["finished", "reset"].iter().any(|end| flow["end"] == *end), "it tells {flow}");
    let table = finish(&mut outrigger(["get", "flows", "-n", "seen"]), PATIENCE)?.ok()?;
    // The other end's record may come first.
    let is_told = |line: &str| ["seen/client", "seen/brief", " out ", " 8080 "].iter().all(|word| line.contains(word));
    ensure!(table.lines().any(is_told), "get flows said {table}");
    // As they come: the reader leaves when it has seen one.
    let stream = format!("{} get flows -n seen --watch -o json | head -n 1", binary().display());
    let one = finish(Command::new("sh").args(["-c", &stream]), PATIENCE)?.ok()?;
    let one: Value = serde_json::from_str(&one).with_context(|| format!("get flows --watch said {one}"))?;
    ensure!(one["number"].is_u64(), "get flows --watch said {one}");
    // Who talks with whom is no one else's business.
    let asked = world.caller.curl(["http://10.64.0.1:14030/flows", "-m", "5"])?;
    ensure!(asked.status != 200, "a pod is told: {}", asked.body);
    let answer =
        finish(Command::new("curl").args(["-s", "-o", "-", "-w", "%{http_code}", "http://10.64.0.1:14030/flows"]), PATIENCE)?;
    ensure!(answer.stdout.ends_with("403"), "it is told at the bridge: {}", answer.all());
    Ok(())
}

fn another_user(world: &World) -> Result<()> {
    let nobody = Nobody::new()?;
    let documents = nobody.file("open.yaml", &own("PeerAuthentication", "seen", "open", "{ mode: Permissive }"))?;
    let asked: [&[&str]; 6] = [
        &["apply", "-f", &documents],
        &["delete", "-f", &documents],
        &["get", "all"],
        &["status"],
        &["proxies"],
        &["explain", "--from", "seen/client", "--to", "web"],
    ];
    for arguments in asked {
        let said = nobody.finish(arguments)?;
        ensure!(said.code == 3, "{arguments:?} ended with {}: {}", said.code, said.all());
        ensure!(said.stderr.contains("api-token") && said.stderr.contains("remedy: run as root"), "no remedy: {}", said.stderr);
        ensure!(said.stderr.lines().count() == 2, "not one clear message: {}", said.stderr);
    }
    // Without the command too, and with a token that was guessed.
    for path in ["apply", "delete", "resources", "status", "proxies"] {
        let url = format!("http://127.0.0.1:14080/api/{path}");
        let change = ["--data-binary", &format!("@{documents}"), "-H", "content-type: application/yaml"];
        for guess in ["accept: */*", "authorization: Bearer 0000000000000000000000000000000000000000000000000000000000000000"] {
            let mut command = Command::new("curl");
            command.args(["-sS", "--max-time", "5", "-w", "\n%{http_code}", "-H", guess]);
            if matches!(path, "apply" | "delete") {
                command.args(change);
            }
            let said = finish(command.arg(&url), PATIENCE)?.ok()?;
            ensure!(said.ends_with("\n401") && said.contains("remedy"), "{url} said {said}");
        }
    }
    let found = finish(&mut outrigger(["get", "PeerAuthentication", "-n", "seen", "-o", "json"]), PATIENCE)?.ok()?;
    ensure!(!found.contains("Permissive"), "the mesh was opened: {found}");
    // Whom root gives the token, may.
    let token = nobody.file("token", &std::fs::read_to_string(world.mesh.token_file())?)?;
    nobody.finish(&["status", "--token-file", &token])?.ok()?;
    nobody.finish(&["apply", "-f", &documents, "--token-file", &token])?.ok()?;
    nobody.finish(&["delete", "-f", &documents, "--token-file", &token])?.ok()?;
    let page = finish(Command::new("curl").args(["-sS", "--fail", "http://127.0.0.1:14080/api/graph"]), PATIENCE)?.ok()?;
    ensure!(page.contains("edges"), "the dashboard has no data: {page}");
    Ok(())
}
