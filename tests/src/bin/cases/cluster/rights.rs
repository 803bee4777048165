//! What the parts of the mesh hold: the agent's capabilities, read from its process, and the API server's record of who asked
//! for what, held against what their roles grant.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE, STATE};
use e2e::mesh::wait_for;
use e2e::runner::Case;
use serde_json::Value;

use super::OnCluster;
use super::pods::Namespace;
use super::source::quarantined;
use crate::world::own;

pub(super) const CASES: &[OnCluster] = &[
    Case { name: "the_node_agent_holds_three_capabilities_and_the_control_plane_none", run: |_, _| capabilities() },
    Case { name: "every_right_is_used_and_nothing_is_asked_for_without_one", run: |cluster, _| rights(cluster) },
];

/// CAP_NET_ADMIN, CAP_PERFMON and CAP_BPF, by their numbers.
const OF_THE_AGENT: u64 = 1 << 12 | 1 << 38 | 1 << 39;

/// The accounts, and the roles that are theirs.
const ROLES: [(&str, &[&str]); 3] = [
    ("control", &["clusterrole", "outrigger-control"]),
    ("control", &["--namespace", "outrigger-system", "role", "control"]),
    ("node", &["clusterrole", "outrigger-node"]),
];

/// A verb on a resource of a group, asked for or granted.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Right {
    account: String,
    verb: String,
    resource: String,
    group: String,
}

impl std::fmt::Display for Right {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dot = if self.group.is_empty() { "" } else { "." };
        write!(f, "{}: {} {}{dot}{}", self.account, self.verb, self.resource, self.group)
    }
}

fn capabilities() -> Result<()> {
    for (role, expected) in [("node", OF_THE_AGENT), ("control", 0)] {
        let mut found = false;
        for entry in std::fs::read_dir("/proc")? {
            let folder = entry?.path();
            let words = std::fs::read(folder.join("cmdline")).unwrap_or_default();
            if !words.starts_with(format!("/outrigger\0{role}\0--kubernetes\0").as_bytes()) {
                continue;
            }
            found = true;
            let status = std::fs::read_to_string(folder.join("status"))?;
            for set in ["CapPrm", "CapEff", "CapBnd"] {
                let held =
                    status.lines().find_map(|line| line.strip_prefix(set)?.strip_prefix(":")).context("no capabilities")?;
                let held = u64::from_str_radix(held.trim(), 16)?;
                ensure!(held == expected, "{role} holds {set} {held:#x}, not {expected:#x}");
            }
            ensure!(status.contains("NoNewPrivs:\t1"), "{role} may gain rights");
        }
        ensure!(found, "no process of {role} runs");
    }
    Ok(())
}

fn rights(cluster: &Cluster) -> Result<()> {
    everything_is_done(cluster)?;
    let granted = granted(cluster)?;
    let (used, refused) = asked()?;
    let list = |rights: Vec<&Right>| rights.into_iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let unknown = list(used.difference(&granted).collect());
    let refused = list(refused.difference(&used).collect());
    let unused = list(granted.difference(&used).collect());
    ensure!(refused.is_empty(), "the API server refuses {refused}");
    ensure!(unknown.is_empty(), "somebody else's role grants {unknown}");
    ensure!(unused.is_empty(), "granted and never used: {unused}");
    Ok(())
}

/// A document of each kind that has a status, a pod with a sidecar, and one in quarantine.
fn everything_is_done(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "rights")?;
    shop.client("client")?;
    quarantined(cluster, "rights-late")?;
    shop.ready("client")?;
    let target = "targetRefs: [{ kind: Service, name: web }]";
    cluster
        .apply("apiVersion: v1\nkind: Service\nmetadata: { name: web, namespace: rights }\nspec: { ports: [{ port: 80 }] }\n")?;
    let mut all = vec![
        ("authorizationpolicy", own("AuthorizationPolicy", "rights", "all", &format!("{{ {target}, action: DENY, rules: [] }}"))),
        (
            "requestauthentication",
            own(
                "RequestAuthentication",
                "rights",
                "all",
                &format!(
                    "{{ {target}, providers: [{{ issuer: a, audiences: [b], jwks: {{ keys: [{{ kid: a, kty: OKP, crv: Ed25519, alg: EdDSA, x: 11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo }}] }} }}] }}"
                ),
            ),
        ),
        ("peerauthentication", own("PeerAuthentication", "rights", "all", "{ mode: Strict }")),
        ("trafficpolicy", own("TrafficPolicy", "rights", "all", &format!("{{ {target}, retryBudget: {{ percent: 20 }} }}"))),
        ("workload", own("Workload", "rights", "all", "{ addresses: [192.0.2.9] }")),
        ("mesh", "apiVersion: outrigger.dev/v1alpha1\nkind: Mesh\nmetadata: { name: rights }\nspec: {}\n".to_owned()),
    ];
    for (name, kind) in
        [("httproute", "HTTPRoute"), ("grpcroute", "GRPCRoute"), ("tcproute", "TCPRoute"), ("tlsroute", "TLSRoute")]
    {
        let hostnames = if kind == "TLSRoute" { "hostnames: [web.example], " } else { "" };
        let text = format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{ name: all, namespace: rights }}\nspec: {{ {hostnames}parentRefs: [{{ group: '', kind: Service, name: web }}], rules: [{{ backendRefs: [{{ name: web, port: 80 }}] }}] }}\n"
        );
        all.push((name, text));
    }
    for (kind, text) in &all {
        cluster.apply(text).with_context(|| (*kind).to_owned())?;
    }
    for (kind, _text) in &all {
        let name = if *kind == "mesh" { "rights" } else { "all" };
        let told = wait_for("a status", PATIENCE, || {
            let object = cluster.get(&["--namespace", "rights", kind, name])?;
            ensure!(object["status"]["conditions"].is_array() || object["status"]["parents"].is_array(), "{object}");
            Ok(())
        });
        told.with_context(|| format!("{kind}: {}", cluster.story(super::SYSTEM)))?;
    }
    cluster.run(&["delete", "mesh", "rights"]).map(drop)
}

/// Every verb on every resource that a role grants.
fn granted(cluster: &Cluster) -> Result<BTreeSet<Right>> {
    let mut granted = BTreeSet::new();
    for (account, words) in ROLES {
        let role = cluster.get(words)?;
        for rule in role["rules"].as_array().context("no rules")? {
            let list = |field: &str| rule[field].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned);
            for group in list("apiGroups") {
                for resource in list("resources") {
                    ensure!(!resource.contains('*') && !group.contains('*'), "{account} is granted {resource}.{group}");
                    granted.extend(list("verbs").map(|verb| Right {
                        account: account.to_owned(),
                        verb,
                        resource: resource.clone(),
                        group: group.clone(),
                    }));
                }
            }
        }
    }
    Ok(granted)
}

/// What the mesh's accounts asked for and were given, and what they were refused.
fn asked() -> Result<(BTreeSet<Right>, BTreeSet<Right>)> {
    let text = std::fs::read_to_string(format!("{STATE}/log/audit.log")).context("the API server keeps no record")?;
    let (mut used, mut refused) = (BTreeSet::new(), BTreeSet::new());
    let ours = "system:serviceaccount:outrigger-system:";
    for line in text.lines().filter(|line| line.contains(ours)) {
        let event: Value = serde_json::from_str(line)?;
        let word = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        let user = word("/user/username");
        let Some(account) = user.strip_prefix(ours).filter(|_| !event["objectRef"].is_null()) else { continue };
        let resource = match word("/objectRef/subresource") {
            part if part.is_empty() => word("/objectRef/resource"),
            part => format!("{}/{part}", word("/objectRef/resource")),
        };
        let right = |verb: String| Right {
            account: account.to_owned(),
            verb,
            resource: resource.clone(),
            group: word("/objectRef/apiGroup"),
        };
        match event.pointer("/responseStatus/code").and_then(Value::as_u64) {
            Some(403) => drop(refused.insert(right(word("/verb")))),
            code => {
                // Who applies what is not there makes it, for which the API server wants that right too.
                if code == Some(201) {
                    used.insert(right("create".to_owned()));
                }
                used.insert(right(word("/verb")));
            }
        }
    }
    Ok((used, refused))
}
