//! The chart, by a real Helm.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, MANIFESTS, PATIENCE, rendered};
use e2e::mesh::{finish, root};
use e2e::runner::Case;

use super::{OnCluster, SYSTEM};

pub(super) const CASES: &[OnCluster] = &[
    Case { name: "helm_finds_nothing_to_say_about_the_chart", run: |cluster, _| lint(cluster) },
    Case { name: "a_value_that_does_not_exist_or_means_nothing_is_refused_by_name", run: |cluster, _| values(cluster) },
    Case { name: "the_plain_manifests_are_what_the_chart_renders", run: |_, _| manifests() },
    Case { name: "the_api_server_knows_every_object_and_every_field_of_the_chart", run: |cluster, _| every_object(cluster) },
    Case { name: "what_may_be_wanted_of_the_chart_is_there_by_its_value_alone", run: |cluster, _| optional(cluster) },
];

fn lint(cluster: &Cluster) -> Result<()> {
    finish(&mut cluster.helm(["lint", "--strict", "--namespace", SYSTEM, "deploy/chart"]), PATIENCE)?.ok().map(drop)
}

/// What Helm renders of the chart, set so.
fn template(cluster: &Cluster, namespace: &str, set: &[&str]) -> Command {
    let mut helm = cluster.helm(["template", "outrigger", "deploy/chart", "--namespace", namespace]);
    helm.args(set.iter().flat_map(|value| ["--set", value]));
    helm
}

fn values(cluster: &Cluster) -> Result<()> {
    for (value, named) in [
        ("control.replica=1", "replica"),
        ("control.replicas=0", "/control/replicas"),
        ("node.metricsPort=80", "/node/metricsPort"),
        ("webhook.failurePolicy=Maybe", "/webhook/failurePolicy"),
        ("sidecar.cpu=foo", "/sidecar/cpu"),
        ("sidecar.cpu=100", "/sidecar/cpu"),
        ("sidecar.memory=1Ki", "/sidecar/memory"),
        ("control.maxUnavailable=200%", "/control/maxUnavailable"),
        ("node.capabilities={CAP_BPF}", "/node/capabilities/0"),
        ("sidecar.memory=-1", "/sidecar/memory"),
        ("sidecar.logLevel=loud", "/sidecar/logLevel"),
        ("logLevel=loud", "/logLevel"),
        ("image.repository=no image", "/image/repository"),
        ("image.repository=a//b:c:d", "/image/repository"),
        ("image.tag=1@sha256:0a", "/image/tag"),
        ("control.resources.limits.memory=lots", "/control/resources/limits/memory"),
        ("control.certificateLifetime=1s", "/control/certificateLifetime"),
        ("workloadApi=CSI spiffe", "/workloadApi"),
        ("workloadApi=/run/spire/agent-sockets/spire-agent.sock", "hostPath"),
        ("workloadApi=csi.outrigger.dev", "the node agent's own driver"),
    ] {
        let said = finish(&mut template(cluster, SYSTEM, &[value]), PATIENCE)?;
        ensure!(said.code != 0 && said.stderr.contains(named), "{value}: {}", said.all());
    }
    let elsewhere = finish(&mut template(cluster, "mesh", &[]), PATIENCE)?;
    ensure!(elsewhere.code != 0 && elsewhere.stderr.contains("outrigger-system"), "{}", elsewhere.all());
    Ok(())
}

fn manifests() -> Result<()> {
    let text = finish(&mut rendered(), PATIENCE)?.ok()?;
    let committed = std::fs::read_to_string(root().join(MANIFESTS)).context(MANIFESTS)?;
    ensure!(text == committed, "{MANIFESTS} is stale; run `cargo xtask kube manifests`");
    Ok(())
}

/// Asks the API server whether it would take a file's objects, with every field of them.
fn taken(cluster: &Cluster, file: &str) -> Result<String> {
    cluster.run(&["apply", "--server-side", "--dry-run=server", "--validate=strict", "--force-conflicts", "--filename", file])
}

fn every_object(cluster: &Cluster) -> Result<()> {
    let said = taken(cluster, MANIFESTS)? + &taken(cluster, "deploy/crds")?;
    for object in [
        "customresourcedefinition.apiextensions.k8s.io/meshes.outrigger.dev",
        "deployment.apps/control",
        "daemonset.apps/node",
        "csidriver.storage.k8s.io/csi.outrigger.dev",
        "poddisruptionbudget.policy/control",
        "networkpolicy.networking.k8s.io/control",
    ] {
        ensure!(said.contains(object), "{object} is not in {said}");
    }
    Ok(())
}

/// A line that names an object's kind.
const MONITORS: [&str; 3] = ["kind: ServiceMonitor", "kind: PodMonitor", "kind: PrometheusRule"];

fn optional(cluster: &Cluster) -> Result<()> {
    let render = |set: &[&str], more: &[&str]| finish(template(cluster, SYSTEM, set).args(more), PATIENCE)?.ok();
    let wanted = ["monitoring.serviceMonitor=true", "monitoring.prometheusRule=true", "monitoring.labels.team=web"];
    // The kinds of the operator, where the cluster has them: nobody else knows them.
    let with = render(&wanted, &["--api-versions", "monitoring.coreos.com/v1"])?;
    let without = render(&wanted, &[])?;
    for kind in MONITORS {
        ensure!(with.contains(kind), "{kind} is not rendered:\n{with}");
        ensure!(!without.contains(kind), "{kind} is rendered for a cluster that does not know it");
    }
    ensure!(with.matches("    team: web\n").count() == 4, "the labels of the monitors are not in\n{with}");
    let none = render(&["podDisruptionBudget=false", "networkPolicy=false"], &[])?;
    for kind in ["kind: PodDisruptionBudget", "kind: NetworkPolicy"] {
        ensure!(without.contains(kind) && !none.contains(kind), "{kind} does not follow its value");
    }
    // What `outrigger install` makes of the same setting is held against these by its own test.
    let spire = render(&["workloadApi=csi.spiffe.io"], &[])?;
    for line in [
        r#"- { name: OUTRIGGER_SIDECAR_WORKLOAD_API, value: "csi.spiffe.io/spire-agent.sock" }"#,
        r#"- { name: OUTRIGGER_FOREIGN_IDENTITIES, value: "true" }"#,
        "- { name: outrigger-workload-api, mountPath: /spiffe-workload-api, readOnly: true }",
        "- name: outrigger-workload-api\n          csi: { driver: csi.spiffe.io, readOnly: true }",
    ] {
        ensure!(spire.matches(line).count() == 1 && !without.contains(line), "{line} does not follow its value:\n{spire}");
    }
    // Every other value in a form that is not its own: what it becomes is an object all the same.
    let all = render(
        &[
            "imagePullSecrets[0].name=registry",
            "control.replicas=3",
            "control.maxUnavailable=50%",
            "control.nodeSelector.disk=ssd",
            "control.tolerations[0].operator=Exists",
            "node.nodeSelector.disk=ssd",
            "sidecar.mode=classic",
            "sidecar.cpu=50m",
            "sidecar.memory=67108864",
            "webhook.failurePolicy=Ignore",
            "workloadApi=csi.spiffe.io/agent.sock",
            "crds=false",
        ],
        &[],
    )?;
    let mut file = tempfile::Builder::new().suffix(".yaml").tempfile()?;
    std::io::Write::write_all(&mut file, all.as_bytes())?;
    let said = taken(cluster, &file.path().to_string_lossy())?;
    ensure!(said.contains("daemonset.apps/node"), "{said}");
    Ok(())
}
