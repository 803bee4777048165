//! The chart, by a real Helm.

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, MANIFESTS, PATIENCE, rendered};
use e2e::mesh::{finish, root};
use e2e::runner::Case;

use super::{OnCluster, SYSTEM};

pub(super) const CASES: &[OnCluster] = &[
    Case { name: "helm_finds_nothing_to_say_about_the_chart", run: |cluster, _| lint(cluster) },
    Case { name: "a_value_that_does_not_exist_or_means_nothing_is_refused_by_name", run: |cluster, _| values(cluster) },
    Case { name: "the_plain_manifests_are_what_the_chart_renders", run: |_, _| manifests() },
];

fn lint(cluster: &Cluster) -> Result<()> {
    finish(&mut cluster.helm(["lint", "--strict", "--namespace", SYSTEM, "deploy/chart"]), PATIENCE)?.ok().map(drop)
}

fn values(cluster: &Cluster) -> Result<()> {
    for (value, named) in [
        ("control.replica=1", "replica"),
        ("control.replicas=0", "/control/replicas"),
        ("webhook.failurePolicy=Maybe", "/webhook/failurePolicy"),
    ] {
        let said =
            finish(&mut cluster.helm(["template", "one", "deploy/chart", "--namespace", SYSTEM, "--set", value]), PATIENCE)?;
        ensure!(said.code != 0 && said.stderr.contains(named), "{value}: {}", said.all());
    }
    let elsewhere = finish(&mut cluster.helm(["template", "one", "deploy/chart", "--namespace", "mesh"]), PATIENCE)?;
    ensure!(elsewhere.code != 0 && elsewhere.stderr.contains("outrigger-system"), "{}", elsewhere.all());
    Ok(())
}

fn manifests() -> Result<()> {
    let text = finish(&mut rendered(), PATIENCE)?.ok()?;
    let committed = std::fs::read_to_string(root().join(MANIFESTS)).context(MANIFESTS)?;
    ensure!(text == committed, "{MANIFESTS} is stale; run `cargo xtask kube manifests`");
    Ok(())
}
