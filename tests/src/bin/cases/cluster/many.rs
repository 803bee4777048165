//! Much at once, much in one piece, and things in an order that nobody would write them in: all of it is admitted, or refused
//! by name, and the others go on.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE, STATE};
use e2e::mesh::finish;
use e2e::runner::Case;
use serde_json::{Value, json};

use super::OnCluster;
use super::load::Load;
use super::pods::{Namespace, container, idle, pod, service};
use crate::world::own;

pub(super) const CASES: &[OnCluster] = &[
    Case { name: "objects_of_a_megabyte_come_into_force_or_are_refused_by_name", run: |cluster, _| large(cluster) },
    Case { name: "what_is_applied_before_what_it_leads_to_comes_into_force_with_it", run: |cluster, _| reversed(cluster) },
];

pub(super) const LONG: &[OnCluster] =
    &[Case { name: "a_thousand_pods_at_once_are_all_admitted_or_refused_by_name", run: |cluster, _| thousand(cluster) }];

const MEGABYTE: usize = 1_000_000;
const PODS: usize = 1_000;
/// Requests that curl has under way.
const AT_ONCE: usize = 200;
/// No node has it, so that the pods are objects and nothing else.
const NOWHERE: &str = "nobody";

/// A pod that no node takes.
fn nowhere(name: &str, container: Value) -> Value {
    pod(name, &[container], json!({ "nodeSelector": { "node": NOWHERE } }))
}

fn large(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "large")?;
    shop.web(1)?;
    shop.client("client")?;
    let text = "x".repeat(MEGABYTE);
    // A pod of that size gets its sidecar.
    shop.make(&[nowhere("pod", container("app", json!({ "env": [{ "name": "TEXT", "value": text }] })))])?;
    ensure!(shop.get("pod/pod")?["spec"]["initContainers"][0]["name"] == "outrigger", "it has no sidecar");
    shop.ready("web")?;
    shop.ready("client")?;
    shop.until("client", &["http://web/open"], 200)?;
    // So large a policy closes what it says, or never comes into force, and says why.
    for (count, length) in [(50_000, 9), (1_000, 985)] {
        let paths: String = (0..count).map(|number| format!("'/closed/{number:0length$}', ")).collect();
        let rule = format!(
            "{{ targetRefs: [{{ kind: Service, name: web }}], action: DENY, rules: [{{ to: [{{ paths: [{paths}] }}] }}] }}"
        );
        let start = Instant::now();
        let said = cluster.try_apply(&own("AuthorizationPolicy", "large", "many", &rule))?;
        let what = format!("a policy of {count} paths in {} bytes", rule.len());
        if said.code == 0 {
            shop.until("client", &[&format!("http://web/closed/{:0length$}", count - 1)], 403)?;
            println!("    {what} is in force after {:.1?}", start.elapsed());
        } else {
            let told = said.stderr.lines().find(|line| line.contains("paths") || line.contains("outrigger"));
            let told =
                told.with_context(|| format!("{what}: no reason: {}", said.all().chars().take(2_000).collect::<String>()))?;
            println!("    {what} is refused: {}", told.trim().chars().take(200).collect::<String>());
        }
    }
    // The next one, of usual size, is like any other.
    let rule = "{ targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{ to: [{ paths: ['/secret*'] }] }] }";
    cluster.apply(&own("AuthorizationPolicy", "large", "few", rule))?;
    shop.until("client", &["http://web/secret"], 403)?;
    shop.until("client", &["http://web/open"], 200).map(drop)
}

fn reversed(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "reversed")?;
    shop.make(&[pod("caller", &[idle("app")], json!({}))])?;
    let route = "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: web, namespace: reversed }
spec:
  parentRefs: [{ group: '', kind: Service, name: front, port: 80 }]
  rules: [{ backendRefs: [{ name: back, port: 80 }] }]
";
    let rule = "{ targetRefs: [{ kind: Service, name: back }], action: DENY, rules: [{ to: [{ paths: ['/secret*'] }] }] }";
    cluster.apply(route)?;
    cluster.apply(&own("AuthorizationPolicy", "reversed", "no-secrets", rule))?;
    let of_back = |name: &str| service(name, name, 80, &json!(8080), json!({}));
    shop.make(&[of_back("front")])?;
    shop.make(&[of_back("back")])?;
    shop.wait("Ready", PATIENCE, &["pod/caller"])?;
    // The pod's address is in its slice before its sidecar says a word, and once more when another pod of that name follows.
    for round in 0..2 {
        let serve = container("app", json!({ "args": ["echo"], "ports": [{ "containerPort": 8080 }] }));
        shop.make(&[pod("back", &[serve], json!({}))])?;
        for (path, status) in [("open", 200), ("secret", 403)] {
            let url = format!("http://front/{path}");
            let answered = e2e::mesh::wait_for("the answer", PATIENCE, || {
                let (seen, body) = shop.ask("caller", "app", &[&url])?;
                ensure!(seen == status, "round {round}: {path}: {seen} {body}");
                Ok(())
            });
            answered.with_context(|| cluster.story("reversed"))?;
        }
        shop.run(&["delete", "pod", "back"])?;
    }
    Ok(())
}

fn thousand(cluster: &Cluster) -> Result<()> {
    let _crowd = Namespace::injected(cluster, "thousand")?;
    let calm = Namespace::injected(cluster, "calm")?;
    calm.web(1)?;
    calm.client("client")?;
    calm.ready("web")?;
    calm.ready("client")?;
    calm.until("client", &["http://web/"], 200)?;
    let load = Load::start(&calm, vec!["drive web:80 --connections 4 --rate 40".to_owned()])?;
    let folder = tempfile::tempdir()?;
    let mut object = nowhere("", idle("app"));
    object["metadata"] = json!({ "generateName": "one-", "labels": { "app": "one" } });
    let body = folder.path().join("pod.json");
    std::fs::write(&body, object.to_string())?;
    // One curl for all, which opens a stream for each.
    let server = cluster.get(&["--namespace", "default", "endpoints", "kubernetes"])?;
    let server = server["subsets"][0]["addresses"][0]["ip"].as_str().context("no API server")?.to_owned();
    let url = format!("https://{server}:6443/api/v1/namespaces/thousand/pods");
    let mut lines = String::new();
    for number in 0..PODS {
        let answer = folder.path().join(format!("answer-{number}"));
        lines += &format!("url = \"{url}\"\noutput = \"{}\"\n", answer.display());
    }
    let config = folder.path().join("config");
    std::fs::write(&config, lines)?;
    let of_admin = |file: &str| format!("{STATE}/certificates/{file}");
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--parallel", "--parallel-max", &AT_ONCE.to_string()]);
    curl.args(["--cert", &of_admin("admin.crt"), "--key", &of_admin("admin.key"), "--cacert", &of_admin("ca.crt")]);
    curl.args(["--header", "content-type: application/json", "--data", &format!("@{}", body.display())]);
    curl.args(["--write-out", "%{http_code} %{time_total}\n", "--config"]).arg(&config);
    let start = Instant::now();
    let said = finish(&mut curl, PATIENCE * 5)?.ok()?;
    let took = start.elapsed();
    let mut codes: BTreeMap<&str, usize> = BTreeMap::new();
    let mut times: Vec<f64> = Vec::new();
    for (code, time) in said.lines().filter_map(|line| line.split_once(' ')) {
        *codes.entry(code).or_default() += 1;
        times.push(time.parse()?);
    }
    times.sort_unstable_by(f64::total_cmp);
    let at = |share: usize| times.get(times.len() * share / 100).or(times.last()).copied().unwrap_or_default();
    println!(
        "    {PODS} pods, {AT_ONCE} at a time, within {took:.1?}: {codes:?}; answered after {:.2} s (p50), {:.2} s (p99), {:.2} s",
        at(50),
        at(99),
        at(100)
    );
    let refused = (0..PODS).filter_map(|number| {
        let answer = std::fs::read(folder.path().join(format!("answer-{number}"))).unwrap_or_default();
        let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
        (answer["kind"] != "Pod").then(|| answer["message"].as_str().unwrap_or("nothing").to_owned())
    });
    let refused: Vec<String> = refused.collect();
    let unnamed = refused.iter().find(|text| !text.contains("inject.outrigger.dev"));
    ensure!(unnamed.is_none(), "refused without a name: {unnamed:?}");
    let made =
        cluster.run(&["--namespace", "thousand", "get", "pods", "--selector=outrigger.dev/sidecar=injected", "--output=name"])?;
    ensure!(
        made.lines().count() + refused.len() == PODS,
        "{} have a sidecar, {} were refused",
        made.lines().count(),
        refused.len()
    );
    println!("    {} of them were refused by name", refused.len());
    // What comes then is like any other, and those that call meanwhile noticed nothing.
    calm.run(&["scale", "deployment/client", "--replicas=2"])?;
    calm.ready("client")?;
    load.end().with_context(|| cluster.story("calm"))?;
    // Gone before the next case: it would wait for them.
    let delete = ["--namespace", "thousand", "delete", "pods", "--all", "--grace-period=0", "--force", "--wait=false"];
    finish(&mut cluster.kubectl(delete), Duration::from_secs(120))?.ok().map(drop)
}
