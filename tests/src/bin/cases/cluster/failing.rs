//! Parts of the cluster and of the mesh that die under load, without a word: running pods lose nothing.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE};
use e2e::mesh::{kill, wait_for};
use e2e::runner::{Case, Wish};
use rustix::process::Signal;

use super::load::{Load, Streams, rate, serving};
use super::pods::Namespace;
use super::{OnCluster, SYSTEM};

pub(super) const ALONE: &[OnCluster] = &[Case {
    name: "killing_parts_of_the_cluster_and_of_the_mesh_under_load_loses_no_request",
    run: |cluster, wish| killed(cluster, wish),
}];

/// Parts of the cluster.
const PARTS: [&str; 4] = ["kubelet", "containerd", "kube-apiserver", "etcd"];
/// How long each is away. The node controller takes a machine for lost after 40 s to 50 s, and its pods for not ready.
const AWAY: Duration = Duration::from_secs(60);
/// The API server hears of a machine again when its kubelet's turn comes, and takes all of them for lost before that.
const AFTERWARDS: Duration = Duration::from_secs(60);

fn killed(cluster: &Cluster, wish: &Wish) -> Result<()> {
    let shop = Namespace::injected(cluster, "killed")?;
    serving(&shop, if wish.long { 10 } else { 2 })?;
    let load = Load::of_all_kinds(&shop, rate(wish))?;
    for role in ["node", "control"] {
        for process in of_mesh(role)? {
            kill(process, Signal::KILL);
            wait_for(&format!("{role} runs again"), PATIENCE, || {
                let now = of_mesh(role)?;
                ensure!(!now.is_empty() && !now.contains(&process), "{now:?}");
                Ok(())
            })?;
        }
    }
    // Minutes, most of which somebody is away.
    for part in PARTS.into_iter().filter(|_| wish.long) {
        cluster.fail(part, AWAY)?;
        println!("    {part} was away for {AWAY:?}");
        let answers = || cluster.run(&["get", "--raw", "/readyz"]).map(drop);
        wait_for("the API server", PATIENCE, answers).with_context(|| format!("after {part} was killed"))?;
        std::thread::sleep(AFTERWARDS);
        let ready = || cluster.run(&["wait", "--for=condition=Ready", "node", "--all", "--timeout=5s"]).map(drop);
        wait_for("the machine", PATIENCE, ready).with_context(|| format!("after {part} was killed"))?;
    }
    for what in ["daemonset/node", "deployment/control"] {
        cluster.rolled_out(SYSTEM, what, PATIENCE)?;
    }
    load.end_of_all_kinds(Streams::Stayed).with_context(|| cluster.story("killed"))?;
    // And what comes after is served as before.
    shop.run(&["scale", "deployment/client", "--replicas=2"])?;
    shop.ready("client")?;
    shop.until("client", &["http://web/"], 200).map(drop)
}

/// The processes of a part of the mesh that runs in pods.
pub(super) fn of_mesh(role: &str) -> Result<Vec<u32>> {
    processes(|words| words.starts_with(format!("/outrigger\0{role}\0").as_bytes()))
}

/// The processes that were started with such words, each with a NUL behind it.
pub(super) fn processes(is_meant: impl Fn(&[u8]) -> bool) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let folder = entry?.path();
        if is_meant(&std::fs::read(folder.join("cmdline")).unwrap_or_default()) {
            found.extend(folder.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok()));
        }
    }
    Ok(found)
}
