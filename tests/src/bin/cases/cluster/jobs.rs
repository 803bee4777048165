//! Pods that end by themselves, and what runs before their apps.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE};
use e2e::mesh::wait_for;
use e2e::runner::Case;
use serde_json::{Value, json};

use super::OnCluster;
use super::pods::{Namespace, container, idle, pod};

pub(super) const CASES: &[OnCluster] = &[
    Case { name: "jobs_end_as_their_apps_do_and_no_sidecar_keeps_them", run: |cluster, _| jobs(cluster) },
    Case {
        name: "init_containers_call_through_a_native_sidecar_and_have_no_network_before_a_classic_one",
        run: |cluster, _| prepared(cluster),
    },
];

/// The forms of a sidecar.
const MODES: [&str; 2] = ["native", "classic"];
const CALL: &str = "/bin/curl --silent --show-error --fail --max-time 5 http://web/";
/// From the first container's start to what the Job says.
const ENDED_WITHIN: Duration = Duration::from_secs(45);

/// The template of a Job's pods, with a sidecar of this form.
fn template(mode: &str, script: &str) -> Value {
    let runs = container("app", json!({ "command": ["/bin/sh", "-c", script] }));
    json!({
        "metadata": { "annotations": { "outrigger.dev/sidecar-mode": mode } },
        "spec": { "restartPolicy": "Never", "terminationGracePeriodSeconds": 5, "containers": [runs] },
    })
}

fn job(name: &str, mode: &str, script: &str) -> Value {
    json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": { "name": name },
        "spec": { "backoffLimit": 0, "template": template(mode, script) },
    })
}

fn jobs(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "jobs")?;
    shop.web(1)?;
    shop.ready("web")?;
    let mut all = Vec::new();
    for mode in MODES {
        all.push(job(&format!("{mode}-well"), mode, CALL));
        all.push(job(&format!("{mode}-ill"), mode, &format!("{CALL} && exit 3")));
    }
    let nightly = json!({ "backoffLimit": 0, "template": template("native", CALL) });
    all.push(json!({
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": { "name": "nightly" },
        "spec": { "schedule": "0 3 * * *", "jobTemplate": { "spec": nightly } },
    }));
    shop.make(&all)?;
    // As its controller makes one each night.
    shop.run(&["create", "job", "nightly-1", "--from=cronjob/nightly"])?;
    shop.wait("Complete", ENDED_WITHIN, &["job/native-well", "job/classic-well", "job/nightly-1"])?;
    shop.wait("Failed", ENDED_WITHIN, &["job/native-ill", "job/classic-ill"])?;
    for (job, field) in
        [("native-well", "initContainerStatuses"), ("classic-well", "containerStatuses"), ("classic-ill", "containerStatuses")]
    {
        let pods = cluster.get(&["--namespace", "jobs", "pods", "--selector", &format!("job-name={job}")])?;
        let statuses = &pods["items"][0]["status"][field];
        let sidecar = statuses.as_array().into_iter().flatten().find(|one| one["name"] == "outrigger");
        let sidecar = sidecar.with_context(|| format!("{job} has no sidecar in {pods}"))?;
        ensure!(sidecar["state"]["terminated"]["exitCode"] == 0, "{job}: {sidecar}");
    }
    Ok(())
}

/// Which init containers come behind the sidecar is the one difference that a pod's author sees between its forms.
fn prepared(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "prepared")?;
    // Something in clear that is in no mesh, so that nobody but the pod itself keeps a call from it.
    let outside = Namespace::labelled(cluster, "unprepared", "team: none")?;
    let serve = container("open", json!({ "args": ["echo"] }));
    outside.make(&[pod("open", &[serve], json!({}))])?;
    shop.web(1)?;
    shop.ready("web")?;
    outside.wait("Ready", PATIENCE, &["pod/open"])?;
    let open = outside.address_of("open")?;
    let script = format!("/bin/curl --silent --max-time 3 --output /dev/null http://{open}:8080/; test $? -ne 0 || exit 1");
    let before = [("native", CALL.to_owned()), ("classic", script)].map(|(mode, script)| {
        let first = container("before", json!({ "command": ["/bin/sh", "-c", script] }));
        let mut pod = pod(mode, &[idle("app")], json!({ "initContainers": [first], "restartPolicy": "Never" }));
        pod["metadata"]["annotations"] = json!({ "outrigger.dev/sidecar-mode": mode });
        pod
    });
    shop.make(&before)?;
    shop.wait("Ready", PATIENCE, &["pod/native", "pod/classic"])?;
    // Both go on as every pod does.
    for mode in MODES {
        let reached = wait_for("a call of the app", PATIENCE, || {
            let (status, body) = shop.ask(mode, "app", &["http://web/"])?;
            ensure!(status == 200, "{status} {body}");
            Ok(())
        });
        reached.with_context(|| format!("{mode}\n{}", cluster.story("prepared")))?;
    }
    Ok(())
}
