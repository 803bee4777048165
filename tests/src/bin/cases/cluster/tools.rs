//! What people do with pods: look into them, copy, connect, debug, scale; and ask the mesh of them from a machine of their own.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE, TESTS_IMAGE, programs};
use e2e::mesh::{Said, finish, wait_for};
use e2e::runner::Case;
use serde_json::{Value, json};

use super::pods::{Namespace, container, from_node, idle, pod};
use super::{OnCluster, SYSTEM};

pub(super) const CASES: &[OnCluster] = &[
    Case { name: "exec_logs_cp_port_forward_and_debug_work_with_injected_pods_of_both_forms", run: |cluster, _| tools(cluster) },
    Case { name: "a_deployment_is_scaled_to_zero_and_back", run: |cluster, _| scaled(cluster) },
    Case {
        name: "status_get_and_explain_ask_all_replicas_of_the_cluster_that_the_kubeconfig_names",
        run: |cluster, _| asked(cluster),
    },
    Case {
        name: "who_may_not_enter_the_control_planes_pods_is_told_which_rights_it_takes",
        run: |cluster, _| permitted(cluster),
    },
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

/// The product's command line where kubectl is in PATH, as a user has it.
fn outrigger(cluster: &Cluster, words: &[&str]) -> Result<Said> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(programs()).chain(std::env::split_paths(&path)))?;
    finish(cluster.outrigger(words).env("PATH", path), PATIENCE)
}

fn asked(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "asked")?;
    shop.web(1)?;
    shop.make(&[pod("caller", &[idle("app")], json!({}))])?;
    cluster.apply(
        "apiVersion: outrigger.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: no-secrets, namespace: asked }
spec:
  targetRefs: [{ kind: Service, name: web }]
  action: DENY
  rules: [{ to: [{ paths: ['/secret*'] }] }]
",
    )?;
    shop.ready("web")?;
    shop.wait("Ready", PATIENCE, &["pod/caller"])?;
    // What other cases do at the same time may not be well; these pods are.
    let status = wait_for("a mesh that has these pods", PATIENCE, || {
        let said = outrigger(cluster, &["status", "--output", "json"])?;
        ensure!(said.code <= 1 && said.stderr.contains("no mesh is up on this machine"), "{}", said.all());
        let status: Value = serde_json::from_str(&said.stdout)?;
        let pods = status["pods"].as_array().context("no pods")?;
        let ours = pods.iter().filter(|pod| pod["namespace"] == "asked" && pod["connected"] == true).count();
        ensure!(ours == 2, "{ours} of 2 pods are connected: {status}");
        Ok(status)
    })
    .with_context(|| cluster.story("asked"))?;
    let replicas = status["replicas"].as_array().context("no replicas")?;
    ensure!(replicas.len() == 2 && status["silent"] == json!([]), "not all replicas were asked: {status}");
    ensure!(
        status["unwell"].as_array().is_some_and(|lines| !lines.iter().any(|line| line.to_string().contains("asked/"))),
        "{status}"
    );
    let text = outrigger(cluster, &["status", "--kubernetes"])?;
    ensure!(
        text.code <= 1 && text.stderr.is_empty() && text.stdout.matches("control plane  control-").count() == 2,
        "{}",
        text.all()
    );
    ensure!(text.stdout.lines().any(|line| line.contains("caller") && line.contains("acknowledged")), "{}", text.all());
    let listed = outrigger(cluster, &["get", "authz", "--kubernetes", "--namespace", "asked"])?.ok()?;
    ensure!(listed.contains("no-secrets") && listed.contains("accepted"), "{listed}");
    let sidecars = outrigger(cluster, &["proxies", "--kubernetes"])?.ok()?;
    ensure!(sidecars.lines().any(|line| line.starts_with("asked") && line.contains("caller")), "{sidecars}");
    let explain =
        |path: &str| outrigger(cluster, &["explain", "--kubernetes", "--from", "asked/caller", "--to", "web", "--path", path]);
    let (let_in, refused) = (explain("/")?, explain("/secret")?);
    ensure!(let_in.code == 0, "{}", let_in.all());
    ensure!(refused.code == 1 && refused.stdout.contains("AuthorizationPolicy/asked/no-secrets"), "{}", refused.all());
    let without = finish(cluster.outrigger(["status"]).env("PATH", "/nowhere"), PATIENCE)?;
    ensure!(without.code == 3 && without.stderr.contains("kubectl is not in PATH"), "{}", without.all());
    Ok(())
}

fn permitted(cluster: &Cluster) -> Result<()> {
    let mut config: Value = serde_json::from_str(&cluster.run(&["config", "view", "--raw", "--output=json"])?)?;
    config["users"][0]["user"]["as"] = json!("visitor");
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), config.to_string())?;
    let kubeconfig = file.path().to_string_lossy().into_owned();
    let ask = || {
        let path = std::env::join_paths([programs()])?;
        let mut command = cluster.outrigger(["get", "mesh", "--kubernetes"]);
        finish(command.env("PATH", path).env("KUBECONFIG", &kubeconfig), PATIENCE)
    };
    let role = |pods_exec: &str| {
        cluster.apply(&format!(
            "apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {{ name: visitor, namespace: {SYSTEM} }}
rules:
  - {{ apiGroups: [''], resources: [pods], verbs: [get, list] }}
{pods_exec}---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {{ name: visitor, namespace: {SYSTEM} }}
roleRef: {{ apiGroup: rbac.authorization.k8s.io, kind: Role, name: visitor }}
subjects: [{{ apiGroup: rbac.authorization.k8s.io, kind: User, name: visitor }}]
"
        ))
    };
    let refused = |what: &str| {
        let said = ask()?;
        ensure!(said.code == 3 && said.stderr.contains("forbidden") && said.stderr.contains(what), "{}", said.all());
        ensure!(said.stderr.contains("remedy: it takes the rights"), "{}", said.all());
        Ok(())
    };
    refused("pods")?;
    role("")?;
    refused("pods/exec")?;
    role("  - { apiGroups: [''], resources: [pods/exec], verbs: [get, create] }\n")?;
    let said = wait_for("an answer", PATIENCE, || ask()?.ok())?;
    cluster.run(&["--namespace", SYSTEM, "delete", "role,rolebinding", "visitor"])?;
    ensure!(said.contains("STATUS"), "{said}");
    Ok(())
}
