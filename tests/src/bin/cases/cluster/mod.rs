//! A real Kubernetes, into which the mesh is installed as a user does it.

mod away;
mod chart;
mod document;
mod failing;
mod gateway_api;
mod injected;
mod jobs;
mod kept_out;
mod load;
mod many;
mod measured;
mod pods;
mod probes;
mod rights;
mod rollout;
mod route_status;
mod services;
mod source;
mod spire;
mod tools;
mod tutorial;
mod without_helm;

use std::time::Duration;

use anyhow::Result;
use e2e::cluster::{AGENTS_STATE, Cluster, KUBELET, PATIENCE, lacks};
use e2e::mesh::finish;
use e2e::runner::{Case, Runner};

/// Where the system lives.
const SYSTEM: &str = "outrigger-system";
/// Control plane and node agent, from their images to their first answer.
const INSTALLED_WITHIN: Duration = Duration::from_secs(90);

/// A case of this group.
type OnCluster = Case<Cluster>;

/// Cases that run beside each other: as a rule they wait for the kubelet.
const AT_ONCE: usize = 4;

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    // Each in a namespace of its own.
    let together: Vec<OnCluster> = [
        chart::CASES,
        injected::CASES,
        probes::CASES,
        jobs::CASES,
        kept_out::CASES,
        rollout::CASES,
        tools::CASES,
        services::CASES,
        route_status::CASES,
        source::CASES,
        many::CASES,
    ]
    .concat();
    // They change the mesh itself, or look at all that was done before them.
    let mut alone: Vec<OnCluster> =
        [rollout::ALONE, failing::ALONE, away::ALONE, kept_out::ALONE, rights::CASES, without_helm::CASES].concat();
    if runner.is_long() {
        alone.splice(0..0, [measured::ALONE, gateway_api::CASES, rollout::LONG, many::LONG, spire::LONG].concat());
    }
    if let Some(what) = lacks() {
        return together.iter().chain(&alone).for_each(|case| runner.left_out("cluster", case.name, &what));
    }
    runner.crowd("cluster", world, (AT_ONCE, &together), &alone);
}

/// A cluster with the mesh in it.
fn world() -> Result<Cluster> {
    let cluster = Cluster::up()?;
    install(&cluster)?;
    Ok(cluster)
}

/// Installs the chart as its documentation says.
fn install(cluster: &Cluster) -> Result<()> {
    let mut helm = cluster.helm(["install", "outrigger", "deploy/chart", "--namespace", SYSTEM, "--create-namespace"]);
    helm.args([format!("--set=kubeletDir={KUBELET}"), format!("--set=node.stateDir={AGENTS_STATE}")]);
    finish(&mut helm, PATIENCE)?.ok()?;
    for part in ["deployment/control", "daemonset/node"] {
        cluster.rolled_out(SYSTEM, part, INSTALLED_WITHIN)?;
    }
    Ok(())
}
