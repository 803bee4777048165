//! Capture as a pod's programs meet it: nothing gets past the sidecar, and nobody has to know that it is there.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, finish};
use e2e::runner::{Case, Runner};

use crate::world::{client, echo, service, until};

struct World {
    web: Pod,
    caller: Pod,
    /// Takes the mesh down behind the pods.
    _mesh: Mesh,
}

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let make = || {
        let mesh = Mesh::up()?;
        mesh.apply(&service("capture", "web", 80, 8080))?;
        let world = World { web: echo(&mesh, "capture/web", "web")?, caller: client(&mesh, "capture/caller")?, _mesh: mesh };
        until(&world.caller, "http://web.capture/", 200)?;
        Ok(world)
    };
    runner.group(
        "capture",
        make,
        &[
            Case { name: "a_caller_sees_the_peer_that_it_asked_for", run: |world, _| true_peer(world) },
            Case { name: "a_pods_ipv6_address_is_reached_as_its_ipv4_address_is", run: |world, _| both_families(world) },
            Case { name: "a_pod_that_calls_itself_is_answered", run: |world, _| itself(world) },
            Case { name: "what_listens_on_loopback_is_reached_inside_the_pod_only", run: |world, _| loopback(world) },
            Case { name: "a_sidecars_own_ports_are_closed_to_everybody_outside", run: |world, _| own_ports(world) },
            Case { name: "the_agent_tells_what_the_kernel_did", run: |world, _| counted(world) },
        ],
    );
}

/// Connects to `host`:`port` inside `pod` and prints the peer that the socket names, or the error's number.
fn peer(pod: &Pod, host: &str, port: u16) -> Result<String> {
    let script = "import socket, sys\ntry:\n  s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)\n  \
                  print(*s.getpeername()[:2])\nexcept OSError as error:\n  print('errno', error.errno)";
    let said = pod.exec(["python3", "-c", script, host, &port.to_string()])?.ok()?;
    Ok(said.trim().to_owned())
}

/// The pod's IPv6 address.
fn v6(pod: &Pod) -> Result<String> {
    let network = pod.name.network();
    let list = ["-n", &network, "-6", "-o", "addr", "show", "dev", "eth0", "scope", "global"];
    let said = finish(Command::new("ip").args(list), PATIENCE)?.ok()?;
    let address = said.split_whitespace().skip_while(|word| *word != "inet6").nth(1);
    let address = address.and_then(|address| address.split('/').next()).with_context(|| format!("no address in {said}"))?;
    Ok(address.to_owned())
}

fn true_peer(world: &World) -> Result<()> {
    for address in [world.web.address()?, v6(&world.web)?] {
        let seen = peer(&world.caller, &address, 8080)?;
        ensure!(seen == format!("{address} 8080"), "asked for {address}, sees {seen}");
    }
    Ok(())
}

fn both_families(world: &World) -> Result<()> {
    until(&world.caller, &format!("http://{}:8080/", world.web.address()?), 200)?;
    until(&world.caller, &format!("http://[{}]:8080/", v6(&world.web)?), 200)?;
    Ok(())
}

fn itself(world: &World) -> Result<()> {
    until(&world.web, "http://web.capture/", 200)?;
    until(&world.web, &format!("http://{}:8080/", world.web.address()?), 200)?;
    Ok(())
}

fn loopback(world: &World) -> Result<()> {
    let mut server = world.web.spawn(["timeout", "20", "python3", "-m", "http.server", "--bind", "127.0.0.1", "7785"])?;
    let reached = || {
        world.web.wait_listening(7785)?;
        until(&world.web, "http://127.0.0.1:7785/", 200)?;
        let outside = world.caller.curl([&format!("http://{}:7785/", world.web.address()?)])?;
        ensure!(outside.status != 200, "the other pod was answered: {}", outside.body);
        Ok(())
    };
    let result = reached();
    server.kill().ok();
    server.wait()?;
    result
}

fn own_ports(world: &World) -> Result<()> {
    for address in [world.web.address()?, v6(&world.web)?] {
        for port in [14001, 14006, 14020] {
            // From the machine, whose processes no program redirects.
            let url =
                if address.contains(':') { format!("http://[{address}]:{port}/") } else { format!("http://{address}:{port}/") };
            let said = finish(Command::new("curl").args(["-sS", "--noproxy", "*", "--max-time", "5", &url]), PATIENCE)?;
            // 7: the connection was refused.
            ensure!(said.code == 7, "{url}: exit code {}: {}", said.code, said.all());
        }
    }
    Ok(())
}

fn counted(world: &World) -> Result<()> {
    until(&world.caller, "http://web.capture/", 200)?;
    let url = "http://127.0.0.1:14030/metrics";
    let text = finish(Command::new("curl").args(["-sS", "--fail", "--noproxy", "*", "--max-time", "5", url]), PATIENCE)?.ok()?;
    for (pod, event, some) in [
        ("caller", "redirected", true),
        ("caller", "original_found", true),
        ("caller", "original_missing", false),
        ("web", "steered", true),
        ("web", "client_shown", true),
        ("web", "own_port_refused", true),
        ("web", "foreign_own_dial", false),
    ] {
        let name = format!(r#"outrigger_capture_connections{{event="{event}",namespace="capture",pod="{pod}"}} "#);
        let line = text.lines().find(|line| line.starts_with(&name)).with_context(|| format!("no {name}in {text}"))?;
        ensure!(line.ends_with(" 0") != some, "{line}");
    }
    Ok(())
}
