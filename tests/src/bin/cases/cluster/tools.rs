//! What people do with pods: look into them, copy, connect, debug, scale.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE, TESTS_IMAGE};
use e2e::mesh::{finish, wait_for};
use e2e::runner::Case;
use serde_json::json;

use super::OnCluster;
use super::pods::{Namespace, container, from_node, idle, pod};

pub(super) const CASES: &[OnCluster] = &[
    Case { name: "exec_logs_cp_port_forward_and_debug_work_with_injected_pods_of_both_forms", run: |cluster, _| tools(cluster) },
    Case { name: "a_deployment_is_scaled_to_zero_and_back", run: |cluster, _| scaled(cluster) },
];

fn tools(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "tools")?;
    let pods = ["native", "classic"].map(|mode| {
        let mut pod = pod(mode, &[container("app", json!({ "args": ["echo"] }))], json!({}));
        pod["metadata"]["annotations"] = json!({ "outrigger.dev/sidecar-mode": mode });
        pod
    });
    shop.web(1)?;
    shop.make(&pods)?;
    shop.ready("web")?;
    shop.wait("Ready", PATIENCE, &["pod/native", "pod/classic"])?;
    let folder = tempfile::tempdir()?;
    for mode in ["native", "classic"] {
        // None says which container: it is the app's.
        let said = shop.run(&["exec", mode, "--", "/bin/busybox", "test", "-x", "/bin/shop"]);
        said.with_context(|| format!("{mode}: exec"))?;
        let log = shop.run(&["logs", mode])?;
        ensure!(log.contains("echo listens on port 8080"), "{mode}: {log}");
        let (there, back) = (folder.path().join(format!("{mode}-there")), folder.path().join(format!("{mode}-back")));
        std::fs::write(&there, mode)?;
        let (there, back) = (there.to_string_lossy().into_owned(), back.to_string_lossy().into_owned());
        shop.run(&["cp", &there, &format!("{mode}:/tmp/copied")])?;
        shop.run(&["cp", &format!("{mode}:/tmp/copied"), &back])?;
        ensure!(std::fs::read_to_string(&back)? == mode, "{mode}: what was copied there and back is another text");
        let forwarded = cluster.forward("tools", &format!("pod/{mode}"), 8080)?;
        let page = from_node(&format!("http://127.0.0.1:{}/forwarded", forwarded.port))?.ok()?;
        ensure!(page.contains("/forwarded"), "{mode}: {page}");
        debugged(&shop, mode)?;
        copied(&shop, mode)?;
    }
    Ok(())
}

/// A copy of a pod to look into is a pod of the mesh with a sidecar of its own.
fn copied(shop: &Namespace<'_>, pod: &str) -> Result<()> {
    let (copy, image) = (format!("{pod}-copy"), format!("--image={TESTS_IMAGE}"));
    let to = format!("--copy-to={copy}");
    let debug = ["debug", pod, &to, &image, "--image-pull-policy=Never", "--profile=restricted", "--container=look", "--"];
    shop.run(&[&debug[..], &["/bin/busybox", "sleep", "infinity"]].concat())?;
    shop.wait("Ready", PATIENCE, &[&format!("pod/{copy}")])?;
    let called = wait_for("a call of the copy's", PATIENCE, || {
        let (status, body) = shop.ask(&copy, "look", &["http://web/"])?;
        ensure!(status == 200, "{status} {body}");
        Ok(())
    });
    called.with_context(|| shop.cluster.story(shop.name))
}

/// A container that comes later is of the pod as all others are: it calls through the mesh.
fn debugged(shop: &Namespace<'_>, pod: &str) -> Result<()> {
    let image = format!("--image={TESTS_IMAGE}");
    let debug = ["debug", pod, &image, "--image-pull-policy=Never", "--profile=restricted", "--container=look", "--"];
    let call = ["/bin/curl", "--silent", "--show-error", "--fail", "--max-time", "5", "http://web/looked"];
    shop.run(&[&debug[..], &call].concat())?;
    wait_for("what the debugging container came to", PATIENCE, || {
        let now = shop.get(&format!("pod/{pod}"))?;
        let ended = &now["status"]["ephemeralContainerStatuses"][0]["state"]["terminated"];
        ensure!(ended["exitCode"] == 0, "{}", now["status"]["ephemeralContainerStatuses"]);
        Ok(())
    })
    .with_context(|| format!("{pod}\n{}", shop.cluster.story(shop.name)))
}

fn scaled(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "scaled")?;
    shop.web(1)?;
    shop.make(&[pod("caller", &[idle("app")], json!({}))])?;
    shop.ready("web")?;
    shop.wait("Ready", PATIENCE, &["pod/caller"])?;
    let until = |status: u16| {
        wait_for(&format!("status {status}"), PATIENCE, || {
            let (seen, body) = shop.ask("caller", "app", &["http://web/"])?;
            ensure!(seen == status, "{seen} {body}");
            Ok(body)
        })
        .with_context(|| cluster.story("scaled"))
    };
    until(200)?;
    for round in 0..2 {
        shop.run(&["scale", "deployment/web", "--replicas=0"])?;
        let refused = until(503)?;
        ensure!(refused.contains("web"), "round {round}: the refusal does not say of what: {refused}");
        shop.run(&["scale", "deployment/web", "--replicas=3"])?;
        let mut rolled = cluster.kubectl(["--namespace", "scaled", "rollout", "status", "deployment/web", "--timeout=60s"]);
        finish(&mut rolled, PATIENCE + Duration::from_secs(5))?.ok()?;
        until(200)?;
    }
    Ok(())
}
