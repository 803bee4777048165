//! The last rung of capture, on which nothing is captured: what programs that ask their sidecar as a proxy get, and that
//! nobody comes to stand there unawares.

use anyhow::{Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, Said, finish, outrigger, wait_for};
use e2e::programs;
use e2e::runner::{Case, Runner};

use crate::world::service;

struct World {
    caller: Pod,
    _web: Pod,
    _other: Pod,
    /// Takes the mesh down behind the pods.
    mesh: Mesh,
}

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let make = || {
        let mesh = Mesh::up_with(&["--capture", "explicit"])?;
        mesh.apply(&(service("explicit", "web", 80, 8080) + &service("explicit", "other", 80, 8080)))?;
        let echo = |name: &str| {
            let pod = mesh.pod(&format!("explicit/{name}")).label("app", name).env("NAME", name).unprotected();
            let pod = pod.run([programs::shop().into_os_string(), "echo".into()])?;
            pod.wait_listening(8080)?;
            Ok::<Pod, anyhow::Error>(pod)
        };
        let (web, other) = (echo("web")?, echo("other")?);
        let caller = mesh.pod("explicit/caller").account("caller").unprotected().idle()?;
        let world = World { caller, _web: web, _other: other, mesh };
        wait_for("the first answer", PATIENCE, || answered(&world.caller, &["http://web/"], "200"))?;
        Ok(world)
    };
    runner.group(
        "explicit",
        make,
        &[
            Case { name: "a_strict_mesh_refuses_a_pod_that_is_not_told_to_be_unprotected", run: |world, _| refused(world) },
            Case { name: "status_calls_such_a_pod_unprotected", run: |world, _| status(world) },
            Case { name: "a_get_by_each_of_a_services_names", run: |world, _| names(world) },
            Case { name: "a_large_body_there_and_back", run: |world, _| body(world) },
            Case { name: "one_client_and_several_hosts", run: |world, _| hosts(world) },
            Case { name: "a_tunnel_by_connect", run: |world, _| tunnel(world) },
            Case { name: "a_client_of_python", run: |world, _| python(world) },
            Case { name: "routes_and_their_headers", run: |world, _| routes(world) },
            Case { name: "a_name_that_leads_nowhere", run: |world, _| nowhere(world) },
            Case { name: "an_address_without_configuration", run: |world, _| unknown(world) },
            Case { name: "what_is_no_request_to_a_proxy", run: |world, _| no_proxy_request(world) },
            Case { name: "every_request_is_counted_by_the_sidecar", run: |world, _| counted(world) },
        ],
    );
}

/// As a program does that was told nothing but what its environment says.
fn curl(pod: &Pod, arguments: &[&str]) -> Result<Said> {
    let line = ["curl", "-sS", "--max-time", "10", "-w", "\n%{http_code}"];
    pod.exec(line.iter().chain(arguments))
}

fn answered(pod: &Pod, arguments: &[&str], status: &str) -> Result<Said> {
    let said = curl(pod, arguments)?;
    ensure!(said.stdout.lines().last() == Some(status), "curl {} was answered {}", arguments.join(" "), said.all());
    Ok(said)
}

fn refused(world: &World) -> Result<()> {
    let said = finish(&mut outrigger(["run", "unasked", "-n", "explicit", "--", "true"]), PATIENCE)?;
    ensure!(said.code == 3 && said.stderr.contains("the pod would be unprotected"), "{}", said.all());
    ensure!(said.stderr.contains("remedy: run it with --unprotected"), "{}", said.stderr);
    let enforcing =
        ["run", "x", "-n", "explicit", "--unprotected", "--annotation", "outrigger.dev/capture=enforce", "--", "true"];
    let said = finish(&mut outrigger(enforcing), PATIENCE)?;
    ensure!(said.code == 3 && said.stderr.contains("nothing is captured"), "{}", said.all());
    answered(&world.caller, &["http://web/"], "200").map(drop)
}

fn status(_world: &World) -> Result<()> {
    let said = finish(&mut outrigger(["status"]), PATIENCE)?;
    ensure!(said.stdout.contains("explicit proxy on Linux") && said.stdout.contains("nothing is captured"), "{}", said.all());
    let rows = said.stdout.lines().filter(|line| line.contains(" unprotected") && line.starts_with("explicit "));
    ensure!(rows.count() == 3, "{}", said.all());
    ensure!(said.stdout.contains("warning: explicit/web is unprotected"), "{}", said.all());
    Ok(())
}

fn names(world: &World) -> Result<()> {
    for name in ["web", "web.explicit", "web.explicit.svc.cluster.local"] {
        let said = answered(&world.caller, &[&format!("http://{name}/path?a=b")], "200")?;
        ensure!(said.stdout.contains("\"path\":\"/path\"") && said.stdout.contains("\"service\":\"web\""), "{}", said.all());
    }
    Ok(())
}

fn body(world: &World) -> Result<()> {
    let script =
        "head -c 3000000 /dev/zero | curl -sS --max-time 20 --data-binary @- http://web/ | grep -a -o '\"bytes\":[0-9]*'";
    let said = world.caller.exec(["sh", "-c", script])?.ok()?;
    ensure!(said.trim() == "\"bytes\":3000000", "{said}");
    Ok(())
}

fn hosts(world: &World) -> Result<()> {
    let said = answered(&world.caller, &["http://web/1", "http://other/2", "http://web/3"], "200")?;
    let services: Vec<&str> = said.stdout.split("\"service\":\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    ensure!(services == ["web", "other", "web"], "{services:?}: {}", said.all());
    Ok(())
}

fn tunnel(world: &World) -> Result<()> {
    let said = answered(&world.caller, &["--proxytunnel", "http://web/inside"], "200")?;
    ensure!(said.stdout.contains("\"path\":\"/inside\""), "{}", said.all());
    Ok(())
}

fn python(world: &World) -> Result<()> {
    let script = "import urllib.request; print(urllib.request.urlopen('http://web/python', timeout=10).read().decode())";
    let said = world.caller.exec(["python3", "-c", script])?.ok()?;
    ensure!(said.contains("\"path\":\"/python\""), "{said}");
    Ok(())
}

fn routes(world: &World) -> Result<()> {
    let route = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: { name: web, namespace: explicit }\nspec:\n  \
                 parentRefs: [{ group: \"\", kind: Service, name: web, port: 80 }]\n  rules:\n  - matches: [{ path: { type: PathPrefix, value: /told } }]\n    \
                 filters: [{ type: RequestHeaderModifier, requestHeaderModifier: { set: [{ name: x-told, value: \"yes\" }] } }]\n    \
                 backendRefs: [{ name: web, port: 80 }]\n";
    world.mesh.apply(route)?;
    let said = answered(&world.caller, &["http://web/told"], "200");
    let missed = answered(&world.caller, &["http://web/else"], "404");
    world.mesh.delete(route)?;
    ensure!(said?.stdout.contains("\"x-told\":\"yes\""), "the header was not set");
    missed.map(drop)
}

fn nowhere(world: &World) -> Result<()> {
    let said = answered(&world.caller, &["-i", "http://nobody.explicit/"], "502")?;
    ensure!(said.stdout.contains("outrigger-reason: connect_failed"), "{}", said.all());
    Ok(())
}

fn unknown(world: &World) -> Result<()> {
    let said = answered(&world.caller, &["-i", "http://10.64.255.250/"], "503")?;
    ensure!(said.stdout.contains("outrigger-reason: no_configuration"), "{}", said.all());
    Ok(())
}

fn no_proxy_request(world: &World) -> Result<()> {
    let said = answered(&world.caller, &["-i", "--noproxy", "*", "http://127.0.0.1:14001/"], "400")?;
    ensure!(said.stdout.contains("outrigger-reason: bad_request"), "{}", said.all());
    Ok(())
}

fn counted(world: &World) -> Result<()> {
    let metrics = world.caller.metrics()?;
    let requests = metrics.lines().any(|line| line.starts_with("outrigger_requests_total{") && line.contains("\"outbound\""));
    ensure!(requests, "no request of the caller's is counted");
    Ok(())
}
