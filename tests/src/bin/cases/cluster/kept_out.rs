//! Pods that are not what they pass for, or not what their owner asked for: refused by name, or closed.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE};
use e2e::mesh::{kill, wait_for};
use e2e::runner::Case;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::OnCluster;
use super::injected::process_of;
use super::pods::{Namespace, container, from_node, idle, pod};

pub(super) const CASES: &[OnCluster] = &[
    Case {
        name: "a_pod_that_asks_for_a_sidecar_and_has_none_is_closed_until_it_asks_no_more",
        run: |cluster, _| quarantine(cluster),
    },
    Case { name: "pods_that_bear_marks_of_the_mesh_or_cannot_be_served_are_refused_by_name", run: |cluster, _| refused(cluster) },
    Case { name: "a_debugging_container_gets_neither_its_pods_key_nor_its_sidecars_place", run: |cluster, _| debugging(cluster) },
    Case { name: "a_namespace_that_is_being_deleted_is_guarded_to_its_last_pod", run: |cluster, _| deleted(cluster) },
    Case {
        name: "what_comes_before_a_classic_sidecar_sends_nothing_in_its_pods_next_sandbox_either",
        run: |cluster, _| next_sandbox(cluster),
    },
];

/// They take away the webhook, or the API server, which all other cases use.
pub(super) const ALONE: &[OnCluster] = &[
    Case {
        name: "what_only_passes_for_a_sidecar_has_no_moment_in_which_its_pod_is_open",
        run: |cluster, _| passes_for_one(cluster),
    },
    Case {
        name: "a_pod_that_comes_while_the_agent_does_not_hear_the_api_server_is_closed_until_it_is_captured",
        run: |cluster, _| unheard(cluster),
    },
];

/// Both are called `outrigger`.
const HOOKS: [&str; 2] = ["mutatingwebhookconfiguration", "validatingwebhookconfiguration"];

/// Bytes that a pod's link has carried out; what is not IP (who has which address) passes a closed one too.
const TRANSMITTED: &str = "/sys/class/net/eth0/statistics/tx_bytes";

fn quarantine(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::labelled(cluster, "late", "team: none")?;
    let outside = Namespace::labelled(cluster, "elsewhere", "team: none")?;
    let serve = || container("app", json!({ "args": ["echo"] }));
    shop.make(&[pod("late", &[serve()], json!({}))])?;
    outside.make(&[pod("open", &[serve()], json!({}))])?;
    shop.wait("Ready", PATIENCE, &["pod/late"])?;
    outside.wait("Ready", PATIENCE, &["pod/open"])?;
    let (late, open) = (shop.address_of("late")?, outside.address_of("open")?);
    let to = |address: &str| format!("http://{address}:8080/");
    let call = |url: &str| cluster.exec("late", "late", "app", &["/bin/curl", "--silent", "--max-time", "2", url]);
    ensure!(from_node(&to(&late))?.code == 0 && call(&to(&open))?.code == 0, "it is closed before anybody asked");
    shop.run(&["label", "namespace", "late", "outrigger.dev/inject=enabled"])?;
    closed(&shop, "late", &to(&open))?;
    let quarantined = metric_of_agent(cluster)?;
    ensure!(quarantined >= 1.0, "the agent counts {quarantined} in quarantine");
    shop.run(&["label", "--overwrite", "namespace", "late", "outrigger.dev/inject=disabled"])?;
    wait_for("the pod is let out", PATIENCE, || {
        ensure!(from_node(&to(&late))?.code == 0 && call(&to(&open))?.code == 0, "it is closed");
        Ok(())
    })
}

/// Nothing of IP gets into a pod's container `app`, which listens at 8080, or out of it; not to `outside` either.
pub(super) fn closed(namespace: &Namespace<'_>, pod: &str, outside: &str) -> Result<()> {
    let own = format!("http://{}:8080/", namespace.address_of(pod)?);
    wait_for("the pod is closed", PATIENCE, || {
        ensure!(from_node(&own)?.code != 0, "it still answers");
        Ok(())
    })
    .with_context(|| namespace.cluster.story(namespace.name))?;
    let run = |words: &[&str]| namespace.cluster.exec(namespace.name, pod, "app", words);
    let sent = || -> Result<u64> { Ok(run(&["/bin/busybox", "cat", TRANSMITTED])?.ok()?.trim().parse()?) };
    let before = sent()?;
    for url in [outside, "https://10.96.0.1/"] {
        let said = run(&["/bin/curl", "--silent", "--insecure", "--max-time", "2", url])?;
        ensure!(said.code != 0 && said.stdout.is_empty(), "{url} is answered: {}", said.all());
    }
    // Names are asked for by UDP.
    let name = run(&["/bin/busybox", "timeout", "3", "/bin/busybox", "nslookup", "kubernetes.default"])?;
    ensure!(name.code != 0, "a name resolves: {}", name.all());
    let frames = sent()? - before;
    ensure!(frames < 600, "{frames} bytes left the pod");
    Ok(())
}

/// The webhook is away, and a container that is called like the sidecar has its volume. Its app sends from its first moment on.
fn passes_for_one(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::labelled(cluster, "passes", "outrigger.dev/inject: enabled")?;
    let [mutating, validating] = HOOKS.map(|kind| cluster.get(&[kind, "outrigger"]));
    let kept = [mutating?, validating?].map(|mut hook| {
        for field in ["resourceVersion", "uid", "creationTimestamp", "generation", "managedFields"] {
            hook["metadata"].as_object_mut().map(|metadata| metadata.remove(field));
        }
        // The control plane's own.
        for one in hook["webhooks"].as_array_mut().into_iter().flatten() {
            one["clientConfig"].as_object_mut().map(|config| config.remove("caBundle"));
        }
        hook
    });
    let mounts = json!([{ "name": "outrigger", "mountPath": "/run/outrigger", "readOnly": true }]);
    let forged = container(
        "outrigger",
        json!({ "command": ["/bin/busybox", "sleep", "infinity"], "restartPolicy": "Always", "volumeMounts": mounts }),
    );
    let volumes = json!([{ "name": "outrigger", "csi": { "driver": "csi.outrigger.dev", "readOnly": true } }]);
    let app = container("app", json!({ "command": sends("exec /bin/busybox sleep infinity") }));
    let forged = pod("forged", &[app], json!({ "initContainers": [forged], "volumes": volumes }));
    let made = (|| {
        cluster.run(&["delete", &HOOKS.join(","), "outrigger"])?;
        // An agent that has yet to find the API server again, which other cases took away, would hear too late of any pod.
        shop.make(&[pod("bare", &[idle("app")], json!({}))])?;
        told_of(&shop, "bare")?;
        shop.make(&[forged])
    })();
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": kept }).to_string();
    // In the name of who owns its fields, or nobody could upgrade it.
    cluster.try_apply_with(&["--field-manager=helm"], &list)?.ok()?;
    made?;
    wait_for("the webhooks are known again", PATIENCE, || {
        for kind in HOOKS {
            let hook = cluster.get(&[kind, "outrigger"])?;
            let webhooks = hook["webhooks"].as_array().context("a configuration without webhooks")?;
            ensure!(webhooks.iter().all(|one| one["clientConfig"]["caBundle"].is_string()), "{hook}");
        }
        Ok(())
    })?;
    sent_nothing(&shop, "forged", "app")?;
    told_of(&shop, "forged")?;
    shop.run(&["delete", "pods", "--all", "--now"]).map(drop)
}

/// Sends from its first moment on: a hundred SYNs and more, of 66 bytes and more each. Then it tells how many bytes left the pod.
/// What is not IP, and what the kernel itself says of its IPv6 addresses, is not held back.
fn sends(then: &str) -> Value {
    let send = "i=0; while [ $i -lt 100 ]; do /bin/curl --silent --max-time 2 http://10.99.0.1/ & i=$((i+1)); done";
    let tell = format!("/bin/busybox sleep 4; /bin/busybox cat {TRANSMITTED}");
    json!(["/bin/busybox", "sh", "-c", format!("{send}; {tell}; {then}")])
}

/// Waits for what a container that [`sends`] tells.
fn sent_nothing(namespace: &Namespace<'_>, pod: &str, container: &str) -> Result<()> {
    let sent: u64 = wait_for("what left the pod", PATIENCE, || {
        let said = namespace.run(&["logs", pod, "--container", container])?;
        said.trim().parse().with_context(|| format!("it says {said:?}"))
    })?;
    println!("    {sent} bytes left the pod");
    ensure!(sent < 2_048, "{sent} bytes left the pod");
    Ok(())
}

/// The kubelet has the API server, and the agent has not: it may ask for namespaces, and for pods no more. What the pod begins with
/// does not wait for its sidecar, which is enrolled when the agent hears again.
fn unheard(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "unheard")?;
    let role = cluster.get(&["clusterrole", "outrigger-node"])?;
    let kinds = &role["rules"][0]["resources"];
    ensure!(*kinds == json!(["pods", "namespaces"]), "the role says {kinds}");
    let may_hear = |kinds: &Value| {
        let patch = json!([{ "op": "replace", "path": "/rules/0/resources", "value": kinds }]).to_string();
        cluster.run(&["patch", "clusterrole", "outrigger-node", "--type=json", "--patch", &patch])
    };
    let first = container("first", json!({ "command": sends("exit 0") }));
    let mut web = pod("web", &[idle("app")], json!({ "initContainers": [first] }));
    web["metadata"]["annotations"] = json!({ "outrigger.dev/sidecar-mode": "classic" });
    // Whoever gives pods to nodes may be as slow to hear again as the agent is.
    let nodes = cluster.get(&["nodes"])?;
    web["spec"]["nodeName"] = nodes["items"][0]["metadata"]["name"].clone();
    let made = (|| {
        may_hear(&json!(["namespaces"]))?;
        // What is watched is not asked for again before it ends.
        cluster.fail("kube-apiserver", Duration::from_secs(1))?;
        wait_for("the pod is made", PATIENCE, || shop.make(std::slice::from_ref(&web)))?;
        sent_nothing(&shop, "web", "first")
    })();
    let hears = may_hear(kinds);
    made.with_context(|| cluster.story("unheard"))?;
    hears?;
    shop.wait("Ready", PATIENCE, &["pod/web"])?;
    let ready = format!("http://{}:14021/ready", shop.address_of("web")?);
    wait_for("the pod is let out", PATIENCE, || from_node(&ready)?.ok())?;
    shop.run(&["delete", "pods", "--all", "--now"]).map(drop)
}

/// The pod was captured in its first network, and is heard of by the same name and UID in the next.
fn next_sandbox(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "next-sandbox")?;
    let first = container("first", json!({ "command": sends("exit 0") }));
    let mut web = pod("web", &[idle("app")], json!({ "initContainers": [first] }));
    web["metadata"]["annotations"] = json!({ "outrigger.dev/sidecar-mode": "classic" });
    shop.make(&[web])?;
    shop.wait("Ready", PATIENCE, &["pod/web"])?;
    sent_nothing(&shop, "web", "first")?;
    let life = |pod: &Value| pod["status"]["initContainerStatuses"][0]["state"]["terminated"]["containerID"].clone();
    let former = shop.get("pod/web")?;
    // Of a pod's processes the one that holds its namespaces is the first.
    kill(process_of(&former, |_words| true)?, Signal::KILL);
    let next = wait_for("the init container's next life", PATIENCE, || {
        let now = shop.get("pod/web")?;
        ensure!(life(&now).is_string() && life(&now) != life(&former), "{}", now["status"]);
        Ok(())
    });
    next.with_context(|| cluster.story("next-sandbox"))?;
    sent_nothing(&shop, "web", "first")?;
    shop.wait("Ready", PATIENCE, &["pod/web"])?;
    let ready = format!("http://{}:14021/ready", shop.address_of("web")?);
    wait_for("the pod is let out", PATIENCE, || from_node(&ready)?.ok()).map(drop)
}

/// Waits until the agent tells the owner of a pod that it has no sidecar.
fn told_of(namespace: &Namespace<'_>, pod: &str) -> Result<()> {
    let of = format!("--field-selector=involvedObject.name={pod},reason=NoSidecar");
    wait_for("the pod's owner is told", PATIENCE, || {
        let events = namespace.run(&["get", "events", &of, "--output=name"])?;
        ensure!(!events.is_empty(), "no event");
        Ok(())
    })
}

/// It is in the pod's network namespace, and its author has it mount the sidecar's volume.
fn debugging(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "debugging")?;
    shop.web(1)?;
    shop.client("client")?;
    shop.ready("web")?;
    shop.ready("client")?;
    let name = shop.pods("web")?[0]["metadata"]["name"].as_str().context("a pod without a name")?.to_owned();
    let mounts = json!([{ "name": "outrigger", "mountPath": "/run/outrigger" }]);
    let command = json!(["/bin/busybox", "sleep", "infinity"]);
    let more = json!({ "command": command, "volumeMounts": mounts, "targetContainerName": "outrigger" });
    let patch = json!({ "spec": { "ephemeralContainers": [container("look", more)] } }).to_string();
    shop.run(&["patch", "pod", &name, "--subresource=ephemeralcontainers", "--type=strategic", "--patch", &patch])?;
    wait_for("the debugging container", PATIENCE, || {
        let status = &shop.get(&format!("pod/{name}"))?["status"]["ephemeralContainerStatuses"][0];
        ensure!(!status["state"]["running"].is_null(), "{status}");
        Ok(())
    })?;
    let call = "printf '\\0\\0\\0\\0\\0' | /bin/curl -sS -i --max-time 5 --http2-prior-knowledge --unix-socket /run/outrigger/workload.sock \
        -H 'content-type: application/grpc' -H 'te: trailers' -H 'workload.spiffe.io: true' --data-binary @- \
        http://localhost/SpiffeWorkloadAPI/FetchX509SVID";
    let said = cluster.exec(shop.name, &name, "look", &["/bin/busybox", "sh", "-c", call])?;
    let all = said.all();
    ensure!(all.contains("grpc-status: 7") && !all.contains("spiffe://"), "the debugging container is told {all}");
    shop.until("client", &["http://web/"], 200)?;
    // It does not keep the sidecar from its own place either.
    super::injected::killed_and_back(&shop, "web")?;
    shop.until("client", &["http://web/"], 200).map(drop)
}

fn metric_of_agent(cluster: &Cluster) -> Result<f64> {
    let agents = cluster.get(&["--namespace", super::SYSTEM, "pods", "--selector", "app.kubernetes.io/name=node"])?;
    let address = agents["items"][0]["status"]["podIP"].as_str().context("the agent has no address")?;
    let counted = from_node(&format!("http://{address}:14030/metrics"))?.ok()?;
    Ok(super::probes::counter(&counted, "outrigger_node_quarantined_pods", &[]))
}

fn refused(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::labelled(cluster, "forged", "outrigger.dev/inject: enabled")?;
    let forged = |change: &dyn Fn(&mut Value)| {
        let mut pod = pod("one", &[idle("app")], json!({}));
        change(&mut pod);
        pod
    };
    let volume = json!({ "name": "outrigger", "emptyDir": {} });
    let driver = json!({ "name": "mine", "csi": { "driver": "csi.outrigger.dev", "readOnly": true } });
    let label = forged(&|pod| pod["metadata"]["labels"]["outrigger.dev/sidecar"] = json!("injected"));
    let note = forged(&|pod| pod["metadata"]["annotations"] = json!({ "outrigger.dev/status": "{}" }));
    let named = forged(&|pod| pod["spec"]["containers"] = json!([idle("outrigger")]));
    let held = forged(&|pod| pod["spec"]["volumes"] = json!([volume]));
    let driven = forged(&|pod| pod["spec"]["volumes"] = json!([driver]));
    let of_node = forged(&|pod| pod["spec"]["hostNetwork"] = json!(true));
    let port = forged(&|pod| pod["spec"]["containers"][0]["ports"] = json!([{ "containerPort": 14006 }]));
    let unknown = forged(&|pod| pod["metadata"]["annotations"] = json!({ "outrigger.dev/sidecar-mod": "native" }));
    for (pod, named) in [
        (&label, "label outrigger.dev/sidecar"),
        (&note, "annotation outrigger.dev/status"),
        (&named, "container outrigger: only the mesh's sidecar is called that"),
        (&held, "volume outrigger"),
        (&driven, "the driver csi.outrigger.dev gives its sockets to the sidecar alone"),
        (&of_node, "hostNetwork: the pod has its node's network"),
        (&port, "port 14006 is one of the sidecar's"),
        (&unknown, "annotation outrigger.dev/sidecar-mod"),
    ] {
        let said = shop.try_make(std::slice::from_ref(pod))?;
        ensure!(said.code != 0 && said.stderr.contains("outrigger") && said.stderr.contains(named), "{named}: {}", said.all());
    }
    // Where nobody asks for sidecars, marks are looked at all the same.
    let plain = Namespace::labelled(cluster, "forged-plain", "team: none")?;
    let said = plain.try_make(&[label])?;
    ensure!(said.code != 0 && said.stderr.contains("label outrigger.dev/sidecar"), "{}", said.all());
    shop.make(&[pod("one", &[idle("app")], json!({}))])?;
    shop.wait("Ready", PATIENCE, &["pod/one"])
}

/// What is refused there stays refused while the namespace's documents go one by one.
fn deleted(cluster: &Cluster) -> Result<()> {
    let staying = Namespace::injected(cluster, "staying")?;
    let leaving = Namespace::injected(cluster, "leaving")?;
    staying.make(&[pod("caller", &[idle("app")], json!({}))])?;
    // It has a while to end, and goes on serving in it.
    let serve = container("app", json!({ "args": ["echo"], "ports": [{ "containerPort": 8080 }] }));
    let serve = pod("web", &[serve], json!({ "terminationGracePeriodSeconds": 8 }));
    let rule = "{ action: DENY, rules: [{ to: [{ paths: ['/secret*'] }] }] }";
    leaving.make(&[serve])?;
    cluster.apply(&crate::world::own("AuthorizationPolicy", "leaving", "no-secrets", rule))?;
    staying.wait("Ready", PATIENCE, &["pod/caller"])?;
    leaving.wait("Ready", PATIENCE, &["pod/web"])?;
    let secret = format!("http://{}:8080/secret", leaving.address_of("web")?);
    let call = || staying.ask("caller", "app", &["--max-time", "2", &secret]);
    wait_for("the refusal", PATIENCE, || {
        let (status, body) = call()?;
        ensure!(status == 403, "{status} {body}");
        Ok(())
    })?;
    leaving.run(&["delete", "namespace", "leaving", "--wait=false"])?;
    let gone = wait_for("the namespace is gone", PATIENCE, || {
        let (status, body) = call()?;
        ensure!(status != 200, "what was refused is answered while its namespace goes: {body}");
        let left = e2e::mesh::finish(&mut cluster.kubectl(["get", "namespace", "leaving"]), PATIENCE)?;
        ensure!(left.stderr.contains("NotFound"), "{}", left.all());
        Ok(())
    });
    gone.with_context(|| cluster.story("leaving"))
}
