//! The end of Helm's installation, and the life of one without Helm. Last, for they take away what the cases before them use.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{AGENTS_STATE, Cluster, KUBELET, PATIENCE};
use e2e::mesh::{finish, wait_for};
use e2e::runner::{Case, Wish};
use serde_json::json;

use super::kept_out::closed;
use super::pods::{Namespace, container, pod};
use super::{INSTALLED_WITHIN, OnCluster, SYSTEM, tutorial};

pub(super) const CASES: &[OnCluster] = &[
    Case { name: "the_doctor_says_that_a_cluster_is_well_and_what_is_not", run: |cluster, _| doctor(cluster) },
    Case { name: "an_installation_of_helms_is_left_to_helm", run: |cluster, _| helms(cluster) },
    Case { name: "helm_upgrades_what_it_installed_and_takes_it_away", run: |cluster, _| helms_end(cluster) },
    Case { name: "the_tutorial_holds_from_an_empty_cluster_to_an_empty_cluster", run: followed },
    Case { name: "an_upgrade_keeps_what_was_set", run: |cluster, _| upgraded(cluster) },
    Case {
        name: "without_a_control_plane_a_labelled_pod_is_refused_or_as_was_set_comes_up_closed",
        run: |cluster, _| unattended(cluster),
    },
    Case { name: "an_installation_stays_while_pods_have_sidecars_and_then_goes", run: |cluster, _| uninstalled(cluster) },
];

fn doctor(cluster: &Cluster) -> Result<()> {
    // Documents and routes of other cases may be on their way out.
    let well = wait_for("a cluster that is well", PATIENCE, || {
        let well = finish(&mut cluster.outrigger(["doctor", "--kubernetes"]), PATIENCE)?;
        ensure!(well.code == 0 && well.stdout.contains("ok    routes"), "{}", well.all());
        Ok(well)
    })?;
    for check in ["server", "control", "agents", "driver", "webhooks", "documents", "routes"] {
        ensure!(well.stdout.lines().any(|line| line.starts_with(&format!("ok    {check}"))), "{check}: {}", well.all());
    }
    // What is well is so by what stands there, and not because nothing was compared.
    for line in [
        "1 of 1 nodes have theirs",
        "every node agent started since its root was made",
        "the API server knows their certificate, by the root that the mesh has",
    ] {
        ensure!(well.stdout.contains(line), "{line}: {}", well.all());
    }
    let shop = Namespace::plain(cluster, "late-again")?;
    shop.client("client")?;
    shop.ready("client")?;
    cluster.run(&["label", "namespace", shop.name, "outrigger.dev/inject=enabled"])?;
    let ill = finish(&mut cluster.outrigger(["doctor", "--kubernetes", "--output", "json"]), PATIENCE)?;
    ensure!(ill.code == 1 && ill.stdout.contains("late-again/client-") && ill.stdout.contains("quarantine"), "{}", ill.all());
    cluster.run(&["label", "namespace", shop.name, "outrigger.dev/inject-"])?;
    routes(cluster, &shop)
}

/// What the conditions of routes say stands in what the doctor says.
fn routes(cluster: &Cluster, shop: &Namespace<'_>) -> Result<()> {
    let route = |name: &str, port: &str, rules: &str| {
        cluster.apply(&format!(
            "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{ name: {name}, namespace: {} }}
spec: {{ parentRefs: [{{ group: '', kind: Service, name: web{port} }}], rules: [{rules}] }}
",
            shop.name
        ))
    };
    let told = |lines: &[&str]| {
        wait_for("what the doctor says of routes", PATIENCE, || {
            let said = finish(&mut cluster.outrigger(["doctor", "--kubernetes"]), PATIENCE)?;
            for line in lines {
                ensure!(said.stdout.contains(line), "{line}: {}", said.all());
            }
            Ok(said.code)
        })
    };
    shop.web(1)?;
    route("nowhere", "", "{ backendRefs: [{ name: gone, port: 80 }] }")?;
    told(&["warn  routes        HTTPRoute late-again/nowhere at Service web: ResolvedRefs is False, BackendNotFound: "])?;
    route("portless", ", port: 81", "{ backendRefs: [{ name: web, port: 80 }] }")?;
    let portless = "fail  routes        HTTPRoute late-again/portless at Service web: Accepted is False, NoMatchingParent: ";
    ensure!(told(&[portless])? == 1, "a route that is not accepted leaves the mesh well");
    // A form that was good, then one of which a rule is not.
    let good = "{ backendRefs: [{ name: web, port: 80 }] }";
    route("part", "", good)?;
    wait_for("a route that is accepted", PATIENCE, || {
        let accepted = &shop.get("httproute/part")?["status"]["parents"][0]["conditions"][0];
        ensure!(accepted["type"] == "Accepted" && accepted["status"] == "True", "{accepted}");
        Ok(())
    })?;
    route(
        "part",
        "",
        &format!(
            "{good}, {{ matches: [{{ path: {{ type: RegularExpression, value: '/a(' }} }}], backendRefs: [{{ name: web, port: 80 }}] }}"
        ),
    )?;
    told(&["fail  routes        HTTPRoute late-again/part at Service web: PartiallyInvalid is True, "]).map(drop)
}

fn helms(cluster: &Cluster) -> Result<()> {
    let said = finish(&mut cluster.outrigger(["install"]), PATIENCE)?;
    ensure!(said.code == 3 && said.stderr.contains("helm upgrade"), "{}", said.all());
    let said = finish(&mut cluster.outrigger(["upgrade"]), PATIENCE)?;
    ensure!(said.code == 1 && said.stderr.contains("helm upgrade"), "{}", said.all());
    let said = finish(&mut cluster.outrigger(["uninstall"]), PATIENCE)?;
    ensure!(said.code == 1 && said.stderr.contains("helm uninstall outrigger"), "{}", said.all());
    Ok(())
}

/// Waits until no pod has a sidecar: the namespaces of other cases may be on their way out, and their pods need the agent.
fn nobody_has_a_sidecar(cluster: &Cluster) -> Result<()> {
    wait_for("the end of all pods with sidecars", PATIENCE, || {
        let left = cluster.run(&["get", "pods", "-A", "--selector=outrigger.dev/sidecar=injected", "--output=name"])?;
        ensure!(left.is_empty(), "there are {left}");
        Ok(())
    })
}

fn helms_end(cluster: &Cluster) -> Result<()> {
    let limit = INSTALLED_WITHIN + PATIENCE;
    let mut upgrade = cluster.helm(["upgrade", "outrigger", "deploy/chart", "--namespace", SYSTEM, "--reuse-values"]);
    finish(upgrade.args(["--set", "control.replicas=1", "--wait"]), limit)?.ok()?;
    let control = cluster.get(&["--namespace", SYSTEM, "deployment", "control"])?;
    ensure!(control["spec"]["replicas"] == 1 && control["status"]["readyReplicas"] == 1, "{control}");
    guarded(cluster)?;
    emptied(cluster)
}

/// A release is not taken away from under pods that have sidecars.
fn guarded(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "guarded")?;
    shop.client("client")?;
    shop.ready("client")?;
    let mut uninstall = cluster.helm(["uninstall", "outrigger", "--namespace", SYSTEM]);
    let said = finish(&mut uninstall, INSTALLED_WITHIN + PATIENCE)?;
    ensure!(said.code != 0 && said.stderr.contains("guard"), "{}", said.all());
    let log = cluster.run(&["--namespace", SYSTEM, "logs", "job/guard"])?;
    ensure!(log.contains("guarded/client-") && log.contains("remedy: "), "{log}");
    let control = cluster.get(&["--namespace", SYSTEM, "deployment", "control"])?;
    ensure!(control["status"]["readyReplicas"] == 1, "it took something away: {control}");
    // Pods are made as before.
    shop.run(&["rollout", "restart", "deployment/client"])?;
    shop.ready("client")
}

/// Takes Helm's installation away, where there is one.
fn emptied(cluster: &Cluster) -> Result<()> {
    let releases = finish(&mut cluster.helm(["list", "--namespace", SYSTEM, "--short"]), PATIENCE)?.ok()?;
    if releases.trim().is_empty() {
        return Ok(());
    }
    nobody_has_a_sidecar(cluster)?;
    let mut uninstall = cluster.helm(["uninstall", "outrigger", "--namespace", SYSTEM, "--wait"]);
    finish(&mut uninstall, INSTALLED_WITHIN + PATIENCE)?.ok()?;
    // Helm makes namespaces and does not end them, and keeps what people wrote by our kinds.
    cluster.run(&["delete", "namespace", SYSTEM])?;
    cluster.run(&["delete", "--filename", "deploy/crds"])?;
    wait_for("an empty cluster", PATIENCE, || left(cluster))
}

/// What is there of a mesh, on the API server and on the node.
fn left(cluster: &Cluster) -> Result<()> {
    let ours: Vec<String> = objects(cluster)?.into_iter().filter(|object| object.contains("outrigger")).collect();
    ensure!(ours.is_empty(), "on the API server there is {}", ours.join(", "));
    let places = [
        "/sys/fs/bpf/outrigger".to_owned(),
        format!("{KUBELET}/plugins/csi.outrigger.dev/csi.sock"),
        format!("{KUBELET}/plugins_registry/csi.outrigger.dev-reg.sock"),
    ];
    let mut there: Vec<String> = places.into_iter().filter(|place| Path::new(place).exists()).collect();
    let state = std::fs::read_dir(AGENTS_STATE).into_iter().flatten().flatten();
    there.extend(state.map(|entry| entry.path().display().to_string()));
    ensure!(there.is_empty(), "on the node there is {}", there.join(", "));
    Ok(())
}

/// All objects, but for those that come and go by themselves.
fn objects(cluster: &Cluster) -> Result<BTreeSet<String>> {
    let kinds = cluster.run(&["api-resources", "--verbs=list", "--output=name"])?;
    let passing = ["events", "events.events.k8s.io", "leases.coordination.k8s.io", "endpoints"];
    let kinds: Vec<&str> = kinds.lines().filter(|kind| !passing.contains(kind)).collect();
    let columns = "custom-columns=KIND:.kind,NAMESPACE:.metadata.namespace,NAME:.metadata.name";
    let listed =
        cluster.run(&["get", &kinds.join(","), "--all-namespaces", "--no-headers", "--ignore-not-found", "--output", columns])?;
    Ok(listed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect())
}

fn followed(cluster: &Cluster, wish: &Wish) -> Result<()> {
    emptied(cluster)?;
    let before = objects(cluster)?;
    // Should it end in the middle, its pods go with this.
    let _shop = Namespace { cluster, name: "shop" };
    tutorial::follow(wish)?;
    wait_for("an empty cluster", PATIENCE, || left(cluster))?;
    let new: Vec<String> = objects(cluster)?.difference(&before).cloned().collect();
    ensure!(new.is_empty(), "the mesh went and there is {}", new.join(", "));
    Ok(())
}

/// Has the mesh there as `outrigger install` installs it.
fn installed(cluster: &Cluster) -> Result<()> {
    emptied(cluster)?;
    if finish(&mut cluster.kubectl(["get", "namespace", SYSTEM]), PATIENCE)?.code == 0 {
        return Ok(());
    }
    let folders = ["--kubelet-dir", KUBELET, "--node-state-dir", AGENTS_STATE];
    let mut install = cluster.outrigger(["install", "--replicas", "1"]);
    let said = finish(install.args(folders), INSTALLED_WITHIN + PATIENCE)?.ok()?;
    ensure!(said.contains("runs     daemonset/node") && said.contains("outrigger is installed"), "{said}");
    Ok(())
}

fn upgraded(cluster: &Cluster) -> Result<()> {
    installed(cluster)?;
    let mut upgrade = cluster.outrigger(["upgrade", "--system-log-level", "debug"]);
    let again = finish(&mut upgrade, INSTALLED_WITHIN + PATIENCE)?.ok()?;
    ensure!(again.contains("outrigger is upgraded"), "{again}");
    let control = cluster.get(&["--namespace", SYSTEM, "deployment", "control"])?;
    ensure!(control["spec"]["replicas"] == 1, "what was set when it was installed is lost: {control}");
    Ok(())
}

fn unattended(cluster: &Cluster) -> Result<()> {
    installed(cluster)?;
    let (shop, outside) = (Namespace::injected(cluster, "unattended")?, Namespace::plain(cluster, "not-of-it")?);
    let serve = |name: &str| pod(name, &[container("app", json!({ "args": ["echo"] }))], json!({}));
    outside.make(&[serve("open")])?;
    outside.wait("Ready", PATIENCE, &["pod/open"])?;
    let open = format!("http://{}:8080/", outside.address_of("open")?);
    let scale = |replicas: &str| {
        cluster.run(&["--namespace", SYSTEM, "scale", "deployment/control", &format!("--replicas={replicas}")])?;
        wait_for("the control plane", INSTALLED_WITHIN, || {
            let list = cluster.get(&["--namespace", SYSTEM, "pods", "--selector=app.kubernetes.io/name=control"])?;
            let there = list["items"].as_array().context("no items")?;
            ensure!(there.len().to_string() == replicas, "there are {}", there.len());
            Ok(())
        })
    };
    let policy = |policy: &str| {
        let change =
            |number: u8| json!({ "op": "replace", "path": format!("/webhooks/{number}/failurePolicy"), "value": policy });
        let change = json!([change(0), change(1)]).to_string();
        cluster.run(&["patch", "mutatingwebhookconfiguration", "outrigger", "--type=json", "--patch", &change])
    };
    scale("0")?;
    let refused = shop.try_make(&[serve("one")])?;
    ensure!(refused.code != 0 && refused.stderr.contains("namespace.inject.outrigger.dev"), "{}", refused.all());
    policy("Ignore")?;
    shop.make(&[serve("one")])?;
    shop.wait("Ready", PATIENCE, &["pod/one"])?;
    let one = shop.get("pod/one")?;
    ensure!(one["spec"]["initContainers"].is_null(), "it has a sidecar, though nobody was there to give it one: {one}");
    closed(&shop, "one", &open)?;
    policy("Fail")?;
    scale("1")?;
    cluster.rolled_out(SYSTEM, "deployment/control", INSTALLED_WITHIN)?;
    // Made anew, it is like any other.
    shop.run(&["delete", "pod", "one"])?;
    shop.make(&[serve("one")])?;
    shop.wait("Ready", PATIENCE, &["pod/one"])
}

fn uninstalled(cluster: &Cluster) -> Result<()> {
    installed(cluster)?;
    let limit = INSTALLED_WITHIN + PATIENCE;
    let shop = Namespace::injected(cluster, "bought")?;
    shop.client("client")?;
    shop.ready("client")?;
    let said = finish(&mut cluster.outrigger(["uninstall"]), limit)?;
    ensure!(said.code == 1 && said.stderr.contains("bought/client-"), "{}", said.all());
    cluster.run(&["delete", "namespace", "bought"]).context("the namespace does not end")?;
    nobody_has_a_sidecar(cluster)?;
    let said = finish(&mut cluster.outrigger(["uninstall"]), limit)?.ok()?;
    ensure!(said.contains("outrigger is uninstalled"), "{said}");
    let left = finish(&mut cluster.kubectl(["get", "namespace", SYSTEM]), PATIENCE)?;
    ensure!(left.code != 0 && left.stderr.contains("NotFound"), "{}", left.all());
    // What was written stays, as its definitions do.
    cluster.run(&["get", "crd", "authorizationpolicies.outrigger.dev"]).map(drop)
}
