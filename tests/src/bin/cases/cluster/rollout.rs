//! What is replaced while requests go on: an application's pods, the node agent, the control plane. And how one pod ends.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE};
use e2e::mesh::wait_for;
use e2e::runner::{Case, Wish};
use serde_json::json;

use super::pods::{Namespace, container, idle, pod, service};
use super::{OnCluster, SYSTEM};
use crate::faults::no_loss;

pub(super) const CASES: &[OnCluster] = &[Case {
    name: "a_pod_that_ends_gets_no_new_calls_answers_the_old_ones_and_can_call_to_its_last_moment",
    run: |cluster, _| ending(cluster),
}];

/// They replace what all other cases use.
pub(super) const ALONE: &[OnCluster] = &[Case {
    name: "restarts_of_ten_pods_the_node_agent_and_the_control_plane_lose_no_request",
    run: |cluster, wish| restarts(cluster, wish),
}];

const REPLICAS: usize = 10;
const LOAD_AT_LEAST: Duration = Duration::from_secs(15);
/// For each of the three restarts.
const RESTARTED_WITHIN: Duration = Duration::from_secs(120);

/// Load from a pod of its own, until it is told to end: what goes between this machine and the pod may break meanwhile.
pub(super) struct Load<'a> {
    namespace: &'a Namespace<'a>,
    lines: Vec<String>,
    begun: Instant,
}

impl<'a> Load<'a> {
    /// One driver for each of these lines: `web:80 --connections 4 --rate 20`.
    pub(super) fn start(namespace: &'a Namespace<'a>, lines: Vec<String>) -> Result<Self> {
        let driver = |(number, line): (usize, &String)| {
            // An end for whoever is forgotten.
            let words = ["/bin/load", "drive"].into_iter().chain(line.split(' ')).chain(["--seconds", "900"]);
            container(&format!("load-{number}"), json!({ "command": words.collect::<Vec<_>>() }))
        };
        let drivers: Vec<_> = lines.iter().enumerate().map(driver).collect();
        namespace.make(&[pod("load", &drivers, json!({ "restartPolicy": "Never", "terminationGracePeriodSeconds": 20 }))])?;
        namespace.wait("Ready", PATIENCE, &["pod/load"])?;
        Ok(Self { namespace, lines, begun: Instant::now() })
    }

    /// Ends it; nothing may have been lost.
    pub(super) fn end(self) -> Result<()> {
        let Self { namespace, lines, begun } = self;
        // What was done meanwhile may have taken hardly any time, and the least of these rates is a few requests a second.
        std::thread::sleep(LOAD_AT_LEAST.saturating_sub(begun.elapsed()));
        for (number, line) in lines.iter().enumerate() {
            let name = format!("load-{number}");
            let killed = namespace.cluster.exec(namespace.name, "load", &name, &["/bin/busybox", "kill", "-TERM", "1"])?;
            killed.ok().with_context(|| format!("load drive {line} has ended before"))?;
        }
        wait_for("the end of the load", PATIENCE, || {
            let phase = namespace.get("pod/load")?["status"]["phase"].clone();
            ensure!(phase == "Succeeded", "the pod is {phase}");
            Ok(())
        })?;
        for (number, line) in lines.iter().enumerate() {
            let said = namespace.run(&["logs", "load", &format!("--container=load-{number}")])?;
            let seen = serde_json::from_str(said.trim()).with_context(|| format!("load drive {line} said {said:?}"))?;
            println!("    {line}: {seen}");
            no_loss(&seen).with_context(|| format!("load drive {line}"))?;
        }
        Ok(())
    }
}

/// Pods that answer at 80 in HTTP/1.1 and at 81 in HTTP/2 and gRPC, and a client.
pub(super) fn serving(namespace: &Namespace<'_>, replicas: usize) -> Result<()> {
    let serves = "command: [/bin/load, serve, '8080', '64']
ports: [{ name: http, containerPort: 8080 }, { name: http2, containerPort: 8081 }]
readinessProbe: { tcpSocket: { port: http }, periodSeconds: 1 }
lifecycle: { preStop: { sleep: { seconds: 3 } } }";
    namespace.deployment("web", replicas, serves)?;
    let ports = json!([
        { "name": "http", "port": 80, "targetPort": "http" },
        { "name": "http2", "port": 81, "targetPort": "http2", "appProtocol": "kubernetes.io/h2c" },
    ]);
    namespace.make(&[service("web", "web", 80, &json!("http"), json!({ "ports": ports }))])?;
    namespace.client("client")?;
    namespace.ready("web")?;
    namespace.ready("client")?;
    namespace.until("client", &["http://web/"], 200).map(drop)
}

/// What is driven at them, at this rate altogether.
pub(super) fn lines(rate: u32) -> Vec<String> {
    let (half, quarter) = (rate / 2, rate / 4);
    vec![
        format!("web:80 --connections 16 --rate {half}"),
        format!("web:81 --h2 --connections 4 --streams 4 --rate {quarter}"),
        format!("web:81 --grpc --connections 4 --streams 4 --rate {quarter}"),
    ]
}

fn restarts(cluster: &Cluster, wish: &Wish) -> Result<()> {
    let shop = Namespace::injected(cluster, "restarts")?;
    serving(&shop, REPLICAS)?;
    let load = Load::start(&shop, lines(if wish.long { 1_000 } else { 80 }))?;
    std::thread::sleep(Duration::from_secs(2));
    for (namespace, what) in [("restarts", "deployment/web"), (SYSTEM, "daemonset/node"), (SYSTEM, "deployment/control")] {
        let start = Instant::now();
        cluster.run(&["--namespace", namespace, "rollout", "restart", what])?;
        cluster.rolled_out(namespace, what, RESTARTED_WITHIN)?;
        println!("    {what} was replaced within {:.1?}", start.elapsed());
        // What comes late comes now.
        std::thread::sleep(Duration::from_secs(2));
    }
    load.end().with_context(|| cluster.story("restarts"))?;
    // And what comes after is served as before.
    shop.run(&["scale", "deployment/client", "--replicas=2"])?;
    shop.ready("client")?;
    shop.until("client", &["http://web/"], 200).map(drop)
}

fn ending(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "ending")?;
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
    shop.make(&[
        pod("only", &[serve], json!({ "terminationGracePeriodSeconds": 9 })),
        service("only", "only", 80, &json!(8080), json!({})),
        pod("caller", &[idle("app")], json!({})),
    ])?;
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
        refused.with_context(|| cluster.story("ending"))?;
        let (status, body) = slow.join().map_err(|_panic| anyhow::anyhow!("the slow call panicked"))??;
        ensure!(status == 200, "a call that was under way was answered with {status}: {body}");
        wait_for("the pod is gone", PATIENCE, || {
            let left = e2e::mesh::finish(&mut cluster.kubectl(["--namespace", "ending", "get", "pod", "only"]), PATIENCE)?;
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
