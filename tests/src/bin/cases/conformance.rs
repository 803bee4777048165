//! HTTP/2 to the letter, by a published tool (h2spec, strict cases among them) that is put before both doors of a sidecar
//! and before Envoy in the same run: what Envoy passes, we pass.
//!
//! Where Envoy is not there, its list of another run counts, which is committed; `cargo xtask conformance` writes it anew.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, finish, root, target, wait_for};
use e2e::programs;
use e2e::runner::{Case, Runner};
use serde_json::json;

use crate::world::{client, own, service, until};

struct World {
    client: Pod,
    outsider: Pod,
    web: Pod,
    _plain: Pod,
    envoy: Option<Child>,
    mesh: Mesh,
}

/// Runs the group, where the tool is.
pub(crate) fn run(runner: &mut Runner) {
    let name = "what_envoy_passes_of_h2spec_passes_at_both_doors_of_a_sidecar";
    if !tool().exists() {
        return runner.left_out("conformance", name, "h2spec is not there, which `cargo xtask setup` builds where Go is");
    }
    runner.group("conformance", make, &[Case { name, run: |world, _| h2spec(world) }]);
}

fn make() -> Result<World> {
    let mesh = Mesh::up()?;
    // An application that speaks HTTP/2 without TLS; Envoy gets one that speaks HTTP/1.1, as it asks its upstreams.
    let web = nginx(&mesh, "door/web", "listen 8080 http2;", false)?;
    let plain = nginx(&mesh, "door/plain", "listen 8080;", true)?;
    let caller = client(&mesh, "door/client")?;
    let outsider = mesh.pod("door/outsider").outside().idle()?;
    mesh.apply(&service("door", "web", 80, 8080))?;
    mesh.apply(&own("PeerAuthentication", "door", "open", "{ mode: Permissive }"))?;
    let envoy = match target().join("venv/bin/envoy") {
        envoy if envoy.exists() => {
            let file = mesh.folder().join("envoy.json");
            std::fs::write(&file, envoy_config(&plain.address()?).to_string())?;
            let file = file.to_string_lossy().into_owned();
            let mut line =
                outsider.name.exec([&*envoy.to_string_lossy(), "-c", &file, "--concurrency", "1", "--log-level", "error"]);
            Some(line.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("cannot run Envoy")?)
        }
        _not_there => None,
    };
    if envoy.is_some() {
        until(&outsider, "http://127.0.0.1:10000/", 200)?;
    }
    let knows = || -> Result<()> {
        let answer = caller.curl(["--http2-prior-knowledge", "http://web/"])?;
        ensure!(answer.status == 200, "the service answers {}: {}", answer.status, answer.said.all());
        Ok(())
    };
    wait_for("the service", PATIENCE, knows)?;
    Ok(World { client: caller, outsider, web, _plain: plain, envoy, mesh })
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(envoy) = &mut self.envoy {
            envoy.kill().ok();
            envoy.wait().ok();
        }
    }
}

/// Each case by its section and its sentence, and whether it passed.
type Outcome = BTreeMap<String, bool>;

fn h2spec(world: &World) -> Result<()> {
    let address = world.web.address()?;
    // The tool cuts a head of its own in pieces, for which a short name does not suffice.
    let doors: [(&Pod, &str, &str, &str); 2] =
        [(&world.client, "outbound", "web.door.svc.cluster.local", "80"), (&world.outsider, "inbound", &address, "8080")];
    let (envoy, ours) = std::thread::scope(|scope| -> Result<_> {
        let ask = |pod: &Pod, name: &str, host: &str, port: &str| ask(world, pod, name, host, port, &[]);
        let envoy = world.envoy.as_ref().map(|_| scope.spawn(move || ask(&world.outsider, "envoy", "127.0.0.1", "10000")));
        let ours: Vec<_> = doors.iter().map(|(pod, name, host, port)| scope.spawn(move || ask(pod, name, host, port))).collect();
        let gone = |_| anyhow::anyhow!("a run of h2spec panicked");
        let envoy = envoy.map(|envoy| envoy.join().map_err(gone)?).transpose()?;
        let ours = ours.into_iter().map(|ours| ours.join().map_err(gone)?).collect::<Result<Vec<_>>>()?;
        Ok((envoy, ours))
    })?;
    let passed = match &envoy {
        Some(outcome) => {
            let passed: BTreeSet<String> = outcome.iter().filter(|(_, passed)| **passed).map(|(case, _)| case.clone()).collect();
            if std::env::var_os("OUTRIGGER_CONFORMANCE_RECORD").is_some() {
                let list: String = passed.iter().map(|case| format!("{case}\n")).collect();
                std::fs::write(committed(), format!("{HEADER}{list}"))?;
            }
            passed
        }
        None => {
            let text = std::fs::read_to_string(committed()).with_context(|| format!("no {}", committed().display()))?;
            text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
        }
    };
    ensure!(passed.len() >= CASES_LEAST, "Envoy passed only {} cases", passed.len());
    let mut wrong = Vec::new();
    for ((pod, name, host, port), outcome) in doors.into_iter().zip(ours) {
        let failed = |outcome: &Outcome| -> Vec<String> {
            passed.iter().filter(|case| !outcome.get(*case).copied().unwrap_or(false)).cloned().collect()
        };
        let mut left = failed(&outcome);
        println!("    {name}: {} of {} cases pass", outcome.values().filter(|passed| **passed).count(), outcome.len());
        let beyond: Vec<_> = outcome.iter().filter(|(case, passed)| !**passed && !left.contains(case)).collect();
        beyond.iter().for_each(|(case, _)| println!("    {name}: fails, as Envoy does: {case}"));
        if !left.is_empty() {
            // The tool waits for two seconds at most: on a machine that is busy, a section is asked once more by itself.
            let sections: BTreeSet<&str> = left.iter().filter_map(|case| case.split(' ').next()).collect();
            let again = ask(world, pod, name, host, port, &sections.into_iter().collect::<Vec<_>>())?;
            left.retain(|case| !again.get(case).copied().unwrap_or(false));
        }
        wrong.extend(left.into_iter().map(|case| format!("{name}: {case}")));
    }
    ensure!(wrong.is_empty(), "Envoy passes and we fail:\n{}", wrong.join("\n"));
    Ok(())
}

/// Runs the tool inside a pod.
fn ask(world: &World, pod: &Pod, name: &str, host: &str, port: &str, sections: &[&str]) -> Result<Outcome> {
    let report = world.mesh.folder().join(format!("h2spec-{name}-{}.xml", sections.len()));
    let path = report.to_string_lossy().into_owned();
    let tool = tool();
    // The report is written by whoever runs the tool, which inside a pod is nobody special.
    std::fs::write(&report, "")?;
    std::fs::set_permissions(&report, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    let mut line = vec![&*tool.to_string_lossy(), "-h", host, "-p", port, "--strict", "-j", &path]
        .into_iter()
        .map(str::to_owned)
        .collect::<Vec<_>>();
    line.extend(sections.iter().map(|section| (*section).to_owned()));
    // It ends with 1 where a case failed.
    let said = finish(&mut pod.name.exec(line), Duration::from_secs(400))?;
    let text = std::fs::read(&report).with_context(|| format!("h2spec wrote no report: {}", said.all()))?;
    let outcome = outcome(&String::from_utf8_lossy(&text));
    ensure!(!outcome.is_empty(), "h2spec's report is empty: {}", said.all());
    Ok(outcome)
}

/// Reads a report by its lines: what a server sent stands in it as it came, so that it is not always valid XML.
fn outcome(report: &str) -> Outcome {
    let attribute = |line: &str, name: &str| -> Option<String> {
        line.split_once(&format!(" {name}=\"")).and_then(|(_, rest)| rest.split_once('"')).map(|(value, _)| value.to_owned())
    };
    report
        .lines()
        .filter(|line| line.trim_start().starts_with("<testcase "))
        .filter_map(|line| {
            let case = format!("{} {}", attribute(line, "package")?, attribute(line, "classname")?);
            Some((case, line.trim_end().ends_with("></testcase>")))
        })
        .collect()
}

fn nginx(mesh: &Mesh, name: &str, listen: &str, outside: bool) -> Result<Pod> {
    let app = name.rsplit('/').next().unwrap_or(name);
    let folder = mesh.folder().join(format!("nginx-{app}"));
    std::fs::create_dir_all(folder.join("logs"))?;
    let path = folder.display();
    let config = format!(
        "daemon off; master_process off; pid {path}/pid; error_log /dev/null;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\n\
           access_log off;\n\
           client_body_temp_path {path}/a; proxy_temp_path {path}/b; fastcgi_temp_path {path}/c; uwsgi_temp_path {path}/d; scgi_temp_path {path}/e;\n\
           server {{ {listen} location / {{ return 200 'an answer of some length'; }} }}\n\
         }}\n"
    );
    let file = folder.join("nginx.conf");
    std::fs::write(&file, config)?;
    let libraries = format!("LD_LIBRARY_PATH={}", programs::libraries());
    let program = programs::third("usr/sbin/nginx")?;
    let pod = mesh.pod(name).label("app", app);
    let pod = if outside { pod.outside() } else { pod };
    let pod = pod.run(["env", &libraries, &program.to_string_lossy(), "-c", &file.to_string_lossy()])?;
    pod.wait_listening(8080)?;
    Ok(pod)
}

fn envoy_config(server: &str) -> serde_json::Value {
    let socket = |address: &str, port: u16| json!({ "socket_address": { "address": address, "port_value": port } });
    let manager = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "conformance",
        "route_config": { "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": "server" } }] }] },
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" },
        }],
    });
    json!({
        "node": { "id": "conformance", "cluster": "conformance" },
        "static_resources": {
            "listeners": [{
                "name": "in",
                "address": socket("127.0.0.1", 10000),
                "filter_chains": [{ "filters": [{ "name": "envoy.filters.network.http_connection_manager", "typed_config": manager }] }],
            }],
            "clusters": [{
                "name": "server", "type": "STATIC", "connect_timeout": "5s",
                "load_assignment": { "cluster_name": "server", "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": socket(server, 8080) } }] }] },
            }],
        },
    })
}

fn tool() -> PathBuf {
    target().join("third-party/bin/h2spec")
}

fn committed() -> PathBuf {
    root().join(Path::new("tests/conformance/envoy.txt"))
}

const HEADER: &str =
    "# Cases of h2spec 2.2.1 (strict ones among them) that Envoy 1.40.0 passes; `cargo xtask conformance` writes it anew.\n";
/// Of 146; fewer would say that Envoy did not run as it should.
const CASES_LEAST: usize = 120;
