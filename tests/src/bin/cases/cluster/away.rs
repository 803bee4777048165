//! A control plane of which one replica is killed, and an API server that is away.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE, STATE};
use e2e::mesh::{finish, kill, wait_for};
use e2e::runner::{Case, Wish};
use rustix::process::Signal;
use serde_json::Value;

use super::load::Load;
use super::pods::Namespace;

use super::{OnCluster, SYSTEM};
use crate::world::own;

/// They take away what all other cases use.
pub(super) const ALONE: &[OnCluster] = &[
    Case { name: "another_replica_writes_status_when_the_one_that_did_is_gone", run: |cluster, wish| successor(cluster, wish) },
    Case { name: "an_api_server_that_was_away_and_forgot_costs_nobody_anything", run: |cluster, wish| away(cluster, wish) },
];

/// Where this cluster's etcd answers.
const ETCD: &str = "http://127.0.0.1:23790";
const RULE: &str = "{ targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{ to: [{ paths: ['/secret*'] }] }] }";

/// Who writes status.
fn holder(cluster: &Cluster) -> Result<String> {
    let lease = cluster.get(&["--namespace", SYSTEM, "lease", "outrigger-control"])?;
    let holder = lease["spec"]["holderIdentity"].as_str().filter(|holder| !holder.is_empty());
    holder.map(str::to_owned).with_context(|| format!("nobody holds {lease}"))
}

/// One that ends in peace hands over at once. In a long run it is killed instead, and has to be missed first.
fn successor(cluster: &Cluster, wish: &Wish) -> Result<()> {
    let before = wait_for("one who writes status", PATIENCE, || holder(cluster))?;
    // POD-NUMBER
    let pod = before.rsplit_once('-').map(|(pod, _number)| pod.to_owned()).context("a holder without a number")?;
    if wish.long {
        let process = process_of(&pod)?;
        kill(process, Signal::KILL);
    } else {
        cluster.run(&["--namespace", SYSTEM, "delete", "pod", &pod, "--wait=false"])?;
    }
    let shop = Namespace::plain(cluster, "successor")?;
    cluster.apply(&own("AuthorizationPolicy", shop.name, "no-secrets", RULE))?;
    let after = wait_for("another one who writes status", PATIENCE, || {
        let after = holder(cluster)?;
        ensure!(after != before, "{after} still does");
        Ok(after)
    })?;
    wait_for("a status", PATIENCE, || {
        let policy = cluster.get(&["--namespace", shop.name, "authorizationpolicy", "no-secrets"])?;
        ensure!(policy["status"]["conditions"].is_array(), "{after} writes none: {policy}");
        Ok(())
    })?;
    cluster.rolled_out(SYSTEM, "deployment/control", PATIENCE)
}

/// The control plane's process in a pod.
fn process_of(pod: &str) -> Result<u32> {
    let host = format!("HOSTNAME={pod}");
    for entry in std::fs::read_dir("/proc")? {
        let folder = entry?.path();
        let read = |file: &str| std::fs::read(folder.join(file)).unwrap_or_default();
        let is_its = read("environ").split(|byte| *byte == 0).any(|variable| variable == host.as_bytes());
        if is_its && read("cmdline").starts_with(b"/outrigger\0control\0") {
            let id = folder.file_name().and_then(|name| name.to_str()?.parse().ok());
            return id.context("a process without a number");
        }
    }
    anyhow::bail!("no process runs in {pod}")
}

/// It comes back without a memory of what was before: watches are refused (410) and everything is listed anew.
fn away(cluster: &Cluster, wish: &Wish) -> Result<()> {
    let gone = Duration::from_secs(if wish.long { 20 } else { 4 });
    let line = "drive web:80 --connections 4 --rate 40".to_owned();
    let shop = Namespace::injected(cluster, "away")?;
    shop.web(1)?;
    shop.client("client")?;
    shop.ready("web")?;
    shop.ready("client")?;
    shop.until("client", &["http://web/open"], 200)?;
    let load = Load::start(&shop, vec![line])?;
    let record = format!("{STATE}/log/audit.log");
    let mut known = 0;
    std::thread::scope(|threads| {
        let failing = threads.spawn(|| cluster.fail("kube-apiserver", gone));
        wait_for("the end of the API server", PATIENCE, || {
            ensure!(cluster.run(&["get", "--raw", "/livez"]).is_err(), "it answers");
            Ok(())
        })?;
        known = std::fs::metadata(&record)?.len();
        let forgotten = forget();
        failing.join().map_err(|_panic| anyhow::anyhow!("a panic"))??;
        forgotten
    })?;
    wait_for("the API server", PATIENCE, || cluster.run(&["get", "--raw", "/readyz"]))?;
    cluster.apply(&own("AuthorizationPolicy", "away", "no-secrets", RULE))?;
    shop.until("client", &["http://web/secret"], 403)?;
    load.end().with_context(|| cluster.story("away")).map(drop)?;
    let since = std::fs::read(&record)?.split_off(usize::try_from(known)?);
    let lists = String::from_utf8_lossy(&since)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|event| event["verb"] == "list" && event["user"]["username"] == "system:serviceaccount:outrigger-system:control")
        .count();
    ensure!(lists > 0, "the control plane listed nothing anew: its watches went on, so nothing was forgotten");
    Ok(())
}

/// Has etcd forget all former versions, so that no watch can go on where it was.
fn forget() -> Result<()> {
    let ask = |path: &str, body: &str| -> Result<Value> {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--fail", "--max-time", "10", &format!("{ETCD}{path}"), "--data", body]);
        Ok(serde_json::from_str(&finish(&mut curl, PATIENCE)?.ok()?)?)
    };
    let now = ask("/v3/kv/range", r#"{"key":"AA=="}"#)?;
    let revision = now["header"]["revision"].as_str().with_context(|| format!("no revision in {now}"))?;
    ask("/v3/kv/compaction", &format!(r#"{{"revision":"{revision}","physical":true}}"#)).map(drop)
}
