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

/// Parts of the cluster, and for how many seconds each is away.
const PARTS: [(&str, u64); 4] = [("kubelet", 10), ("containerd", 10), ("kube-apiserver", 20), ("etcd", 60)];

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
    for (part, away) in PARTS.into_iter().filter(|_| wish.long) {
        cluster.fail(part, Duration::from_secs(away))?;
        let answers = || cluster.run(&["get", "--raw", "/readyz"]).map(drop);
        wait_for("the API server", PATIENCE, answers).with_context(|| format!("after {part} was killed"))?;
        println!("    {part} was away for {away} s");
        std::thread::sleep(Duration::from_secs(5));
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
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let folder = entry?.path();
        let words = std::fs::read(folder.join("cmdline")).unwrap_or_default();
        if words.starts_with(format!("/outrigger\0{role}\0").as_bytes()) {
            found.extend(folder.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok()));
        }
    }
    Ok(found)
}
