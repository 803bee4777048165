//! What a sidecar costs a pod, in figures: the time until it is ready, and memory.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE};
use e2e::mesh::finish;
use e2e::runner::Case;
use serde_json::{Value, json};

use super::OnCluster;
use super::pods::{Namespace, container, idle, pod};
use crate::faults::{IDLE_KIB_MAX, resident};

pub(super) const ALONE: &[OnCluster] =
    &[Case { name: "a_pod_with_a_sidecar_is_ready_soon_and_the_sidecar_is_small", run: |cluster, _| measured(cluster) }];

/// What an injected pod may be ready later at most. A build for development starts several times slower.
const LATER_AT_MOST: Duration = Duration::from_millis(if cfg!(debug_assertions) { 1_500 } else { 300 });

const ROUNDS: usize = 20;

/// The same pod in four forms, of which one follows the other, so that none has the machine at a better moment.
///
/// The kubelet looks at its containers once a second, and starts what follows a native sidecar only after a look, whatever
/// that sidecar is. One that does nothing shows how much of the delay is that.
fn measured(cluster: &Cluster) -> Result<()> {
    let (plain, meshed) = (Namespace::labelled(cluster, "plain", "team: none")?, Namespace::injected(cluster, "measured")?);
    let stays = container("stays", json!({ "command": ["/bin/busybox", "sleep", "infinity"], "restartPolicy": "Always" }));
    let of = |name: &str, mode: &str| {
        let mut pod = pod(name, &[idle("app")], json!({ "terminationGracePeriodSeconds": 0 }));
        pod["metadata"]["annotations"] = json!({ "outrigger.dev/sidecar-mode": mode });
        pod
    };
    let mut took: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    let mut sizes = Vec::new();
    for round in 0..ROUNDS {
        for form in ["none", "classic", "stays", "native"] {
            let name = format!("{form}-{round}");
            let (namespace, object) = match form {
                "none" => (&plain, pod(&name, &[idle("app")], json!({ "terminationGracePeriodSeconds": 0 }))),
                "stays" => {
                    let more = json!({ "terminationGracePeriodSeconds": 0, "initContainers": [stays] });
                    (&plain, pod(&name, &[idle("app")], more))
                }
                mode => (&meshed, of(&name, mode)),
            };
            took.entry(form).or_default().push(ready_after(namespace, &name, &object)?);
            if form == "native" {
                sizes.push((name.clone(), namespace.get(&format!("pod/{name}"))?["metadata"]["uid"].clone()));
            }
        }
    }
    let mut p50 = BTreeMap::new();
    for (form, mut times) in took {
        times.sort_unstable();
        let middle = *times.get(times.len() / 2).context("no pod was measured")?;
        println!(
            "    {form}: ready after {middle:.2?} (p50 of {}, from {:.2?} to {:.2?})",
            times.len(),
            times[0],
            times[times.len() - 1]
        );
        p50.insert(form, middle);
    }
    for (form, held) in [("classic", true), ("native", true), ("stays", false)] {
        let later = p50[form].saturating_sub(p50["none"]);
        println!("    {form} is ready {later:.2?} after none");
        ensure!(!held || later <= LATER_AT_MOST, "a pod with a {form} sidecar is ready {later:?} later than one without");
    }
    // What only the start needed was given back by then.
    std::thread::sleep(Duration::from_secs(5));
    for (name, uid) in sizes {
        let (counted, resident, file) = resident(sidecar_of(uid.as_str().context("no uid")?)?)?;
        println!("    the sidecar of {name} has {resident} KiB resident, {file} of them the binary's");
        ensure!(counted < IDLE_KIB_MAX, "the sidecar of {name} has {resident} KiB resident, {file} of them the binary's");
    }
    Ok(())
}

/// From the command that makes the pod to the news that it is ready.
fn ready_after(namespace: &Namespace<'_>, name: &str, object: &Value) -> Result<Duration> {
    let mut file = tempfile::Builder::new().suffix(".json").tempfile()?;
    serde_json::to_writer(&mut file, object)?;
    let path = file.path().to_string_lossy().into_owned();
    let start = Instant::now();
    namespace.run(&["create", "--filename", &path])?;
    namespace.wait("Ready", PATIENCE, &[&format!("pod/{name}")])?;
    let took = start.elapsed();
    let mut delete = namespace.cluster.kubectl(["--namespace", namespace.name, "delete", "pod", name, "--wait=false"]);
    // Those whose sidecars are measured stay.
    if !name.starts_with("native") {
        finish(&mut delete, PATIENCE)?.ok()?;
    }
    Ok(took)
}

/// The process of a pod's sidecar on this machine.
fn sidecar_of(uid: &str) -> Result<u32> {
    for entry in std::fs::read_dir("/proc")? {
        let folder = entry?.path();
        let read = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap_or_default();
        if read("cmdline").starts_with("/outrigger\0sidecar\0") && read("cgroup").contains(uid) {
            return folder.file_name().and_then(|name| name.to_str()?.parse().ok()).context("no process id");
        }
    }
    anyhow::bail!("no sidecar of the pod {uid} runs")
}
