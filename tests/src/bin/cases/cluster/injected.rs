//! Pods that get a sidecar because their namespace says so, and what they do with it.

use anyhow::{Context as _, Result, bail, ensure};
use e2e::cluster::{Cluster, PATIENCE};
use e2e::mesh::{kill, start_time, wait_for};
use e2e::runner::Case;
use rustix::process::Signal;

use super::failing::processes;
use super::pods::{Namespace, from_node};
use super::{OnCluster, SYSTEM};
use crate::world::own;

pub(super) const CASES: &[OnCluster] = &[
    Case {
        name: "pods_of_a_labelled_namespace_speak_mutual_tls_by_their_service_accounts",
        run: |cluster, _| identities(cluster),
    },
    Case { name: "a_policy_refuses_a_call_and_the_refusal_names_it", run: |cluster, _| refused(cluster) },
    Case { name: "a_sidecar_that_is_killed_is_back_at_once_and_its_pod_serves", run: |cluster, _| comes_back(cluster) },
    Case {
        name: "a_pod_whose_sandbox_is_killed_has_another_network_and_is_of_the_mesh_again",
        run: |cluster, _| another_network(cluster),
    },
];

/// The sidecar stands where it belongs, and both ends of a call know each other.
fn identities(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "identities")?;
    shop.web(2)?;
    shop.client("client")?;
    shop.ready("web")?;
    shop.ready("client")?;
    for pod in shop.pods("web")? {
        ensure!(pod["metadata"]["labels"]["outrigger.dev/sidecar"] == "injected", "{pod}");
        let sidecar = &pod["spec"]["initContainers"][0];
        ensure!(sidecar["name"] == "outrigger" && sidecar["restartPolicy"] == "Always", "{sidecar}");
        // The API server gives its token to the app alone.
        let has_token = |container: &serde_json::Value| container["volumeMounts"].to_string().contains("kube-api-access");
        ensure!(!has_token(sidecar) && has_token(&pod["spec"]["containers"][0]), "{}", pod["spec"]);
    }
    shop.until("client", &["http://web/"], 200)?;
    let caller = "spiffe://cluster.local/ns/identities/sa/client";
    wait_for("the caller's identity in a metric", PATIENCE, || {
        for _ in 0..6 {
            shop.curl("client", &["http://web/"])?;
        }
        let counted = shop.metrics("client", "web")?;
        let is_known = |line: &&str| {
            line.starts_with("outrigger_requests_total{") && line.contains(caller) && line.contains(r#"mtls="true""#)
        };
        counted.lines().find(is_known).map(drop).with_context(|| format!("{caller} is not in\n{counted}"))
    })
}

fn refused(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "refused")?;
    shop.web(1)?;
    shop.client("client")?;
    shop.ready("web")?;
    shop.ready("client")?;
    shop.until("client", &["http://web/open"], 200)?;
    let rule = "{ targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{ to: [{ paths: ['/secret*'] }] }] }";
    cluster.apply(&own("AuthorizationPolicy", "refused", "no-secrets", rule))?;
    shop.until("client", &["http://web/secret"], 403)?;
    shop.until("client", &["http://web/open"], 200)?;
    let counted = shop.metrics("client", "web")?;
    let named = counted.lines().find(|line| line.starts_with("outrigger_refusals_total{") && line.contains("no-secrets"));
    named.map(drop).with_context(|| format!("no refusal names its rule:\n{counted}"))
}

/// The container that takes its place is another one to the kernel, in which the pod is enrolled.
fn comes_back(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "comes-back")?;
    shop.web(1)?;
    shop.client("client")?;
    shop.ready("web")?;
    shop.ready("client")?;
    shop.until("client", &["http://web/"], 200)?;
    for app in ["web", "client"] {
        killed_and_back(&shop, app)?;
        shop.until("client", &["http://web/"], 200)?;
    }
    cluster.rolled_out(SYSTEM, "daemonset/node", PATIENCE)
}

/// The kubelet makes its network anew, with other addresses, and the API server says the former ones for a while.
fn another_network(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "another-network")?;
    shop.web(1)?;
    shop.client("client")?;
    shop.ready("web")?;
    shop.ready("client")?;
    shop.until("client", &["http://web/"], 200)?;
    for app in ["web", "client"] {
        let address = |pod: &serde_json::Value| pod["status"]["podIP"].clone();
        let former = shop.pods(app)?.remove(0);
        // Of a pod's processes the one that holds its namespaces is the first.
        kill(process_of(&former, |_words| true)?, Signal::KILL);
        wait_for("the pod's next network", PATIENCE, || {
            let pods = shop.pods(app)?;
            let [now] = pods.as_slice() else { bail!("{} pods of {app}", pods.len()) };
            ensure!(now["metadata"]["uid"] == former["metadata"]["uid"] && address(now) != address(&former), "{}", now["status"]);
            Ok(())
        })?;
        shop.ready(app)?;
        shop.until("client", &["http://web/"], 200)?;
    }
    let plain = from_node(&format!("http://{}:8080/", shop.pods("web")?[0]["status"]["podIP"].as_str().unwrap_or_default()))?;
    ensure!(plain.code != 0, "who is not of the mesh is answered: {}", plain.stdout);
    Ok(())
}

/// Kills the sidecar of an app's one pod, and waits for the next one.
pub(super) fn killed_and_back(shop: &Namespace<'_>, app: &str) -> Result<()> {
    kill(sidecar_of(shop, app)?, Signal::KILL);
    wait_for("the sidecar's next life", PATIENCE, || {
        let status = &shop.pods(app)?[0]["status"];
        let sidecar = &status["initContainerStatuses"][0];
        ensure!(sidecar["restartCount"] == 1 && sidecar["ready"] == true, "{sidecar}");
        Ok(())
    })
}

/// The process of the sidecar of an app's one pod.
fn sidecar_of(shop: &Namespace<'_>, app: &str) -> Result<u32> {
    process_of(&shop.pods(app)?[0], |words| words.starts_with(b"/outrigger\0sidecar\0"))
}

/// The first process of a pod that was started with such words.
pub(super) fn process_of(pod: &serde_json::Value, is_meant: impl Fn(&[u8]) -> bool) -> Result<u32> {
    let uid = pod["metadata"]["uid"].as_str().context("a pod without a UID")?;
    let is_of_pod = |process: &u32| {
        let cgroup = std::fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap_or_default();
        cgroup.contains(uid) || cgroup.contains(&uid.replace('-', "_"))
    };
    let of_pod = processes(is_meant)?.into_iter().filter(is_of_pod);
    let first = of_pod.filter_map(|process| Some((start_time(process)?, process))).min();
    first.map(|(_started, process)| process).with_context(|| format!("no such process is in a cgroup of {uid}"))
}
