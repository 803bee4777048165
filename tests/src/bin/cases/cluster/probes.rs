//! What the kubelet and Prometheus ask of apps whose pods let nobody in but the mesh.

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE};
use e2e::mesh::wait_for;
use e2e::runner::Case;
use serde_json::{Value, json};

use super::OnCluster;
use super::pods::{Namespace, container, from_node, pod, with};

pub(super) const CASES: &[OnCluster] = &[
    Case { name: "the_kubelets_probes_of_every_kind_reach_apps_that_let_only_the_mesh_in", run: |cluster, _| well(cluster) },
    Case { name: "an_app_that_fails_its_probes_is_restarted_or_not_ready_and_its_sidecar_stays", run: |cluster, _| ill(cluster) },
];

const KINDS: [&str; 3] = ["startupProbe", "readinessProbe", "livenessProbe"];
/// Each way in which the kubelet asks, as the name of a container that is asked so.
const WAYS: [&str; 4] = ["http", "tcp", "grpc", "exec"];

/// The container that is asked in this way: what it runs, and the action of its probes.
fn asked(way: &str, is_well: bool) -> (Value, Value) {
    let port = match way {
        "http" => 8081,
        "tcp" => 8082,
        "grpc" => 8083,
        _exec => 8084,
    };
    let runs = |role: &str, variable: &str| {
        let health = if is_well { "SERVING" } else { "NOT_SERVING" };
        json!({
            "args": [role],
            "env": [{ "name": variable, "value": port.to_string() }, { "name": "HEALTH", "value": health }],
            "ports": [{ "name": way, "containerPort": port }],
        })
    };
    match way {
        // By the name of its port, and with a field of its own.
        "http" => {
            let path = if is_well { "/well" } else { "/well?status=503" };
            let fields = [json!({ "name": "x-asked-by", "value": "the kubelet" })];
            (runs("echo", "PORT"), json!({ "httpGet": { "path": path, "port": "http", "httpHeaders": fields } }))
        }
        "tcp" => (runs("echo", "PORT"), json!({ "tcpSocket": { "port": if is_well { port } else { 9 } } })),
        "grpc" => (runs("reflect", "PORTS"), json!({ "grpc": { "port": port } })),
        _exec => {
            let word = if is_well { "true" } else { "false" };
            (runs("echo", "PORT"), json!({ "exec": { "command": ["/bin/busybox", word] } }))
        }
    }
}

fn well(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "well")?;
    let containers = WAYS.map(|way| {
        let (runs, action) = asked(way, true);
        let probe = with(action, json!({ "periodSeconds": 1, "timeoutSeconds": 2, "failureThreshold": 10 }));
        let probes = KINDS.map(|kind| (kind.to_owned(), probe.clone()));
        container(way, with(runs, Value::Object(probes.into_iter().collect())))
    });
    let mut all = pod("all", &containers, json!({}));
    all["metadata"]["annotations"] =
        json!({ "prometheus.io/scrape": "true", "prometheus.io/port": "8081", "prometheus.io/path": "/counts" });
    shop.make(&[all])?;
    shop.wait("Ready", PATIENCE, &["pod/all"])?;
    let metrics = format!("http://{}:14021", shop.address_of("all")?);
    // Three ways of each kind are the sidecar's to ask; liveness and readiness go on for ever.
    wait_for("probes that the sidecar made", PATIENCE, || {
        let counted = from_node(&format!("{metrics}/metrics"))?.ok()?;
        for (kind, at_least) in [("startup", 3.0), ("readiness", 9.0), ("liveness", 9.0)] {
            let seen = counter(&counted, "outrigger_app_asked_total", &[("what", kind), ("outcome", "passed")]);
            ensure!(seen >= at_least, "{seen} of {kind} passed");
        }
        Ok(())
    })?;
    let now = shop.get("pod/all")?;
    for field in ["containerStatuses", "initContainerStatuses"] {
        for status in now["status"][field].as_array().context("no containers")? {
            ensure!(status["ready"] == true && status["restartCount"] == 0, "{status}{}", cluster.story("well"));
        }
    }
    scraped(&shop, &now)
}

/// Prometheus is led to the sidecar, which hands on the app's own page; the app itself is out of its reach.
fn scraped(shop: &Namespace<'_>, pod: &Value) -> Result<()> {
    let notes = &pod["metadata"]["annotations"];
    let (port, path) = (&notes["prometheus.io/port"], &notes["prometheus.io/path"]);
    ensure!(port == "14021" && path == "/metrics/app", "Prometheus is led to {port} {path}");
    let address = shop.address_of("all")?;
    let page = from_node(&format!("http://{address}:14021/metrics/app"))?.ok()?;
    let page: Value = serde_json::from_str(&page).with_context(|| page.clone())?;
    ensure!(page["path"] == "/counts" && page["peer"] != address.as_str(), "the app was asked {page}");
    let past = from_node(&format!("http://{address}:8081/counts"))?;
    ensure!(past.code != 0 && !past.stdout.contains("\"service\""), "plaintext was answered: {}", past.all());
    Ok(())
}

fn ill(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "ill")?;
    let pods = KINDS.map(|kind| {
        let containers = WAYS.map(|way| {
            let (runs, action) = asked(way, false);
            let probe = with(action, json!({ "periodSeconds": 1, "timeoutSeconds": 2, "failureThreshold": 2 }));
            container(way, with(runs, Value::Object([(kind.to_owned(), probe)].into_iter().collect())))
        });
        pod(&kind.to_lowercase(), &containers, json!({ "terminationGracePeriodSeconds": 1 }))
    });
    shop.make(&pods)?;
    for kind in KINDS {
        let name = kind.to_lowercase();
        let restarts = kind != "readinessProbe";
        let settled = wait_for(&format!("what comes of a {kind} that fails"), PATIENCE, || {
            let now = shop.get(&format!("pod/{name}"))?;
            for status in now["status"]["containerStatuses"].as_array().context("nothing runs yet")? {
                let restarted = status["restartCount"].as_u64().context("no count")? > 0;
                ensure!(restarted == restarts && status["state"]["waiting"]["reason"] != "ContainerCreating", "{status}");
            }
            Ok(now)
        });
        let now = settled.with_context(|| cluster.story("ill"))?;
        let sidecar = &now["status"]["initContainerStatuses"][0];
        ensure!(sidecar["restartCount"] == 0 && sidecar["started"] == true, "{sidecar}");
    }
    // Longer than it takes the others.
    let now = shop.get("pod/readinessprobe")?;
    for status in now["status"]["containerStatuses"].as_array().context("nothing runs")? {
        ensure!(status["ready"] == false && status["restartCount"] == 0, "{status}");
    }
    let events = shop.run(&["get", "events", "--output=custom-columns=WHY:.reason,TEXT:.message", "--no-headers"])?;
    for kind in ["Startup", "Readiness", "Liveness"] {
        ensure!(events.contains(&format!("{kind} probe failed: HTTP probe failed with statuscode: 503")), "{kind}:\n{events}");
    }
    // Why the app was found ill stands in the log of who asked it.
    let log = shop.run(&["logs", "livenessprobe", "--container=outrigger"])?;
    for way in ["http/liveness", "tcp/liveness", "grpc/liveness"] {
        ensure!(log.lines().any(|line| line.contains("the app fails its probe") && line.contains(way)), "{way}:\n{log}");
    }
    // Pods of the next cases shall not share the machine with containers that are started over and over.
    shop.run(&["delete", "pod", "--all", "--wait=false", "--grace-period=1"]).map(drop)
}

/// The sum of a counter's series with these labels.
pub(super) fn counter(text: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    let series = text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
    let wanted = series.filter(|line| labels.iter().all(|(key, value)| line.contains(&format!("{key}=\"{value}\""))));
    wanted.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}
