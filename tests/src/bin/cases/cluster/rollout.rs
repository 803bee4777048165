//! What is replaced while requests go on: an application's pods, the node agent, the control plane. And how one pod ends.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::cluster::{Cluster, PATIENCE};
use e2e::mesh::wait_for;
use e2e::runner::{Case, Wish};
use serde_json::json;

use super::load::{Load, Streams, rate, serving};
use super::pods::{Namespace, container, idle, pod, service};
use super::{OnCluster, SYSTEM};

pub(super) const CASES: &[OnCluster] = &[
    Case {
        name: "a_pod_that_ends_gets_no_new_calls_answers_the_old_ones_and_can_call_to_its_last_moment",
        run: |cluster, _| ending(cluster, "ending", "native"),
    },
    Case {
        name: "a_pod_with_a_classic_sidecar_that_ends_can_call_to_its_last_moment_too",
        run: |cluster, _| ending(cluster, "ending-classic", "classic"),
    },
];

/// They replace what all other cases use.
pub(super) const ALONE: &[OnCluster] = &[
    Case {
        name: "restarts_of_ten_pods_the_node_agent_and_the_control_plane_lose_no_request",
        run: |cluster, wish| restarts(cluster, wish),
    },
    Case {
        name: "pods_that_are_made_while_the_control_plane_is_replaced_are_all_taken_with_their_sidecars",
        run: |cluster, _| made_meanwhile(cluster),
    },
    Case {
        name: "the_last_good_form_of_a_refused_route_outlives_every_control_plane_that_saw_it",
        run: |cluster, _| last_good(cluster),
    },
];

/// More load than runs beside other cases.
pub(super) const LONG: &[OnCluster] = &[Case {
    name: "a_deployment_that_grows_and_shrinks_under_load_loses_no_request",
    run: |cluster, wish| scaled(cluster, wish),
}];

const REPLICAS: usize = 10;
/// For each of the three restarts.
const RESTARTED_WITHIN: Duration = Duration::from_secs(120);

fn restarts(cluster: &Cluster, wish: &Wish) -> Result<()> {
    let shop = Namespace::injected(cluster, "restarts")?;
    serving(&shop, REPLICAS)?;
    let load = Load::of_all_kinds(&shop, rate(wish))?;
    std::thread::sleep(Duration::from_secs(2));
    for (namespace, what) in [("restarts", "deployment/web"), (SYSTEM, "daemonset/node"), (SYSTEM, "deployment/control")] {
        let start = Instant::now();
        cluster.run(&["--namespace", namespace, "rollout", "restart", what])?;
        cluster.rolled_out(namespace, what, RESTARTED_WITHIN)?;
        println!("    {what} was replaced within {:.1?}", start.elapsed());
        // What comes late comes now.
        std::thread::sleep(Duration::from_secs(2));
    }
    load.end_of_all_kinds(Streams::WereClosed).with_context(|| cluster.story("restarts"))?;
    // And what comes after is served as before.
    shop.run(&["scale", "deployment/client", "--replicas=2"])?;
    shop.ready("client")?;
    shop.until("client", &["http://web/"], 200).map(drop)
}

/// The API server keeps its connections to the webhooks, and does not ask again what was under way when one is closed.
fn made_meanwhile(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "meanwhile")?;
    let is_over = AtomicBool::new(false);
    let make = |maker: usize| {
        let object = pod(&format!("made-{maker}"), &[idle("app")], json!({})).to_string();
        let mut made = 0;
        while !is_over.load(Ordering::Relaxed) {
            let words = ["--namespace", shop.name, "--dry-run=server", "--output=json"];
            let taken = cluster.try_apply_with(&words, &object)?.ok()?;
            ensure!(taken.contains(r#""outrigger.dev/sidecar": "injected""#), "{taken}");
            made += 1;
        }
        Ok(made)
    };
    let made: Result<u32> = std::thread::scope(|scope| {
        let makers: Vec<_> = (0..2).map(|maker| scope.spawn(move || make(maker))).collect();
        let replaced = replaced_twice(cluster);
        is_over.store(true, Ordering::Relaxed);
        let made = makers.into_iter().map(|maker| maker.join().unwrap_or_else(|_panic| bail!("a maker ended")));
        let made = made.sum();
        replaced.and(made)
    });
    println!("    {} pods were taken", made?);
    Ok(())
}

fn replaced_twice(cluster: &Cluster) -> Result<()> {
    for _ in 0..2 {
        std::thread::sleep(Duration::from_secs(1));
        cluster.run(&["--namespace", SYSTEM, "rollout", "restart", "deployment/control"])?;
        cluster.rolled_out(SYSTEM, "deployment/control", RESTARTED_WITHIN)?;
    }
    std::thread::sleep(Duration::from_secs(5));
    Ok(())
}

fn last_good(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "lastgood")?;
    shop.web(1)?;
    shop.client("client")?;
    shop.ready("web")?;
    shop.ready("client")?;
    let route = |rule: &str| {
        cluster.apply(&format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{ name: web, namespace: lastgood }}\nspec: {{ parentRefs: [{{ group: '', kind: Service, name: web }}], rules: [{{ {rule} }}] }}\n"
        ))
    };
    route("filters: [{ type: RequestRedirect, requestRedirect: { hostname: elsewhere.example, statusCode: 302 } }]")?;
    shop.until("client", &["http://web/"], 302)?;
    route("matches: [{ path: { type: RegularExpression, value: '/a(' } }], backendRefs: [{ name: web, port: 80 }]")?;
    let says = || {
        wait_for("the status of the route", PATIENCE, || {
            let status = cluster.get(&["--namespace", "lastgood", "httproute", "web"])?["status"].clone();
            let of = |number: usize| {
                let one = &status["parents"][0]["conditions"][number];
                format!("{} {} {}", one["type"], one["status"], one["observedGeneration"])
            };
            ensure!(of(0) == r#""Accepted" "False" 2"# && of(1) == r#""ResolvedRefs" "True" 1"#, "{status}");
            Ok(())
        })
    };
    says()?;
    // Twice: the second time, whoever wrote it down is gone as well.
    for _ in 0..2 {
        cluster.run(&["--namespace", SYSTEM, "rollout", "restart", "deployment/control"])?;
        cluster.rolled_out(SYSTEM, "deployment/control", RESTARTED_WITHIN)?;
    }
    // A sidecar that knows nothing of before.
    shop.run(&["rollout", "restart", "deployment/client"])?;
    shop.ready("client")?;
    shop.until("client", &["http://web/"], 302)?;
    says()?;
    cluster.run(&["--namespace", "lastgood", "delete", "httproute", "web"])?;
    wait_for("nothing is kept of what is gone", PATIENCE, || {
        let kept = cluster.get(&["--namespace", SYSTEM, "configmap", "outrigger-last-good"])?;
        ensure!(kept["data"].as_object().is_none_or(serde_json::Map::is_empty), "{kept}");
        Ok(())
    })
}

/// As an autoscaler does it: by the Deployment's scale alone.
fn scaled(cluster: &Cluster, wish: &Wish) -> Result<()> {
    let shop = Namespace::injected(cluster, "breathing")?;
    serving(&shop, 2)?;
    let load = Load::of_all_kinds(&shop, rate(wish))?;
    for _ in 0..2 {
        for replicas in [6, 2] {
            let start = Instant::now();
            shop.run(&["scale", "deployment/web", &format!("--replicas={replicas}")])?;
            shop.ready("web")?;
            wait_for("the end of those that are too many", PATIENCE, || {
                let list = cluster.get(&["--namespace", shop.name, "pods", "--selector=app=web"])?;
                let there = list["items"].as_array().map_or(0, Vec::len);
                ensure!(there == replicas, "there are {there}");
                Ok(())
            })?;
            println!("    {replicas} replicas after {:.1?}", start.elapsed());
            std::thread::sleep(Duration::from_secs(2));
        }
    }
    load.end_of_all_kinds(Streams::MayBeClosed).with_context(|| cluster.story("breathing"))
}

fn ending(cluster: &Cluster, namespace: &'static str, mode: &str) -> Result<()> {
    let shop = Namespace::injected(cluster, namespace)?;
    shop.web(1)?;
    let last = "/bin/busybox sleep 4; /bin/curl --silent --max-time 2 http://web/last-words";
    let serve = container(
        "app",
        json!({
            "args": ["echo"],
            "ports": [{ "containerPort": 8080 }],
            "lifecycle": { "preStop": { "exec": { "command": ["/bin/sh", "-c", last] } } },
        }),
    );
    let mut only = pod("only", &[serve], json!({ "terminationGracePeriodSeconds": 9 }));
    only["metadata"]["annotations"] = json!({ "outrigger.dev/sidecar-mode": mode });
    shop.make(&[only, service("only", "only", 80, &json!(8080), json!({})), pod("caller", &[idle("app")], json!({}))])?;
    shop.ready("web")?;
    shop.wait("Ready", PATIENCE, &["pod/only", "pod/caller"])?;
    let call = |path: &str| shop.ask("caller", "app", &["--max-time", "10", &format!("http://only{path}")]);
    wait_for("the first answer", PATIENCE, || {
        let (status, body) = call("/")?;
        ensure!(status == 200, "{status} {body}");
        Ok(())
    })?;
    std::thread::scope(|threads| {
        let slow = threads.spawn(|| call("/slow?delay=3000"));
        wait_for("the call that is under way", PATIENCE, || {
            let log = shop.run(&["logs", "only", "--container=app"])?;
            ensure!(log.contains("delay=3000"), "it has not come");
            Ok(())
        })?;
        let start = Instant::now();
        shop.run(&["delete", "pod", "only", "--wait=false"])?;
        // Though it is the only one, and would answer yet.
        let refused = wait_for("no new call goes there", Duration::from_secs(3), || {
            let (status, body) = call("/new")?;
            ensure!(status == 503, "{status} {body}");
            Ok(body)
        });
        refused.with_context(|| cluster.story(namespace))?;
        let (status, body) = slow.join().map_err(|_panic| anyhow::anyhow!("the slow call panicked"))??;
        ensure!(status == 200, "a call that was under way was answered with {status}: {body}");
        wait_for("the pod is gone", PATIENCE, || {
            let left = e2e::mesh::finish(&mut cluster.kubectl(["--namespace", namespace, "get", "pod", "only"]), PATIENCE)?;
            ensure!(left.stderr.contains("NotFound"), "{}", left.all());
            Ok(())
        })?;
        let took = start.elapsed();
        // The app takes no notice of its end, so the grace period is over when it is killed; two seconds are the kubelet's for
        // what is left then, two its own to see it.
        ensure!(took > Duration::from_secs(4) && took < Duration::from_secs(16), "it took {took:?}");
        let log = shop.run(&["logs", "deployment/web", "--container=web"])?;
        ensure!(log.contains("GET /last-words"), "its preStop hook reached nobody: {log}");
        Ok(())
    })
}
