//! A real Kubernetes, into which the mesh is installed as a user does it.

mod chart;
mod gateway_api;
mod injected;
mod pods;
mod rights;
mod route_status;

use std::time::Duration;

use anyhow::Result;
use e2e::cluster::{Cluster, PATIENCE, lacks};
use e2e::mesh::finish;
use e2e::runner::{Case, Runner};

/// Where the system lives.
const SYSTEM: &str = "outrigger-system";
/// Where this cluster's kubelet keeps pods.
const KUBELET: &str = "/var/lib/outrigger-kube/kubelet";
/// Control plane and node agent, from their images to their first answer.
const INSTALLED_WITHIN: Duration = Duration::from_secs(90);

/// A case of this group.
type OnCluster = Case<Cluster>;

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let cases: Vec<OnCluster> = [chart::CASES, injected::CASES, rights::CASES, route_status::CASES, gateway_api::CASES].concat();
    if let Some(what) = lacks() {
        return cases.iter().for_each(|case| runner.left_out("cluster", case.name, &what));
    }
    runner.group("cluster", world, &cases);
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
    helm.args([format!("--set=kubeletDir={KUBELET}"), format!("--set=node.stateDir={KUBELET}-outrigger")]);
    finish(&mut helm, PATIENCE)?.ok()?;
    for part in ["deployment/control", "daemonset/node"] {
        cluster.rolled_out(SYSTEM, part, INSTALLED_WITHIN)?;
    }
    Ok(())
}
