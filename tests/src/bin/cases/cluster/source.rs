//! What the control plane and the agents make of a real API server: what it refuses, what it is told, and what becomes of
//! everybody while it is away.

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE};
use e2e::mesh::{finish, outrigger, wait_for};
use e2e::runner::Case;

use super::OnCluster;
use super::pods::Namespace;
use crate::world::own;

pub(super) const CASES: &[OnCluster] = &[
    Case { name: "the_api_server_refuses_what_check_refuses", run: |cluster, _| bad_documents(cluster) },
    Case {
        name: "a_pod_whose_label_came_later_is_in_quarantine_and_its_events_say_so",
        run: |cluster, _| quarantined(cluster, "late"),
    },
    Case { name: "a_slice_that_names_a_sidecars_pod_of_another_namespace_leads_nowhere", run: |cluster, _| astray(cluster) },
];

/// Documents that do not come into force: the kind, its spec, and a word of why.
const BAD: [(&str, &str, &str); 22] = [
    ("AuthorizationPolicy", "{ action: FORBID, rules: [] }", "FORBID"),
    ("AuthorizationPolicy", "{ action: DENY, rulez: [] }", "rulez"),
    ("AuthorizationPolicy", "{ action: ALLOW, rules: [{ to: [{ paths: [/x], methodz: [PUT] }] }] }", "methodz"),
    ("AuthorizationPolicy", "{ action: ALLOW, rules: [{ from: [{ namespaces: [two], principalz: [a] }] }] }", "principalz"),
    ("AuthorizationPolicy", "{ action: DENY, rules: [{ to: [{ paths: [no-slash] }] }] }", "no-slash"),
    ("AuthorizationPolicy", "{ action: DENY, rules: [{ to: [{ methods: ['G E T'] }] }] }", "G E T"),
    ("AuthorizationPolicy", "{ action: DENY, rules: [{ to: [{ ports: [0] }] }] }", "ports"),
    ("AuthorizationPolicy", "{ action: DENY, rules: [{ from: [{ principals: ['not a spiffe id'] }] }] }", "not a spiffe id"),
    ("AuthorizationPolicy", "{ action: DENY, rules: [{ when: [{ claim: '', values: [a] }] }] }", "claim"),
    ("AuthorizationPolicy", "{ action: DENY, targetRefs: [{ kind: Pod, name: web }], rules: [{}] }", "Pod"),
    ("RequestAuthentication", "{ providers: [{ issuer: '', audiences: [b], jwks: { keys: [] } }] }", "issuer"),
    ("RequestAuthentication", "{ providers: [{ issuer: a, audiences: [b] }] }", "keys"),
    ("RequestAuthentication", "{ providers: [{ issuer: a, audiences: [b], jwks: { keys: [] } }] }", "keys"),
    ("PeerAuthentication", "{ mode: Sometimes }", "Sometimes"),
    ("PeerAuthentication", "{ mode: Strict, ports: {} }", "ports"),
    ("TrafficPolicy", "{ targetRefs: [], retryBudget: { percent: 10 } }", "targetRefs"),
    ("TrafficPolicy", "{ targetRefs: [{ kind: Service, name: web }], retryBudget: { percent: 101 } }", "percent"),
    ("TrafficPolicy", "{ targetRefs: [{ kind: Service, name: web }], rateLimit: { requests: 0, per: 1s } }", "rateLimit"),
    ("TrafficPolicy", "{ targetRefs: [{ kind: Service, name: web }], rateLimit: { requests: 5, per: soon } }", "soon"),
    (
        "TrafficPolicy",
        "{ targetRefs: [{ kind: Service, name: web }], fault: { delay: { duration: 200ms, percent: 500 } } }",
        "percent",
    ),
    ("Workload", "{ addresses: [300.1.1.1] }", "300.1.1.1"),
    ("Workload", "{ addresses: [192.0.2.9], ports: [{ port: 70000 }] }", "70000"),
];

/// Documents that both take.
const GOOD: [(&str, &str); 4] = [
    ("AuthorizationPolicy", "{ action: DENY, rules: [{ to: [{ paths: ['/secret*'], methods: [GET] }] }] }"),
    ("PeerAuthentication", "{ mode: Permissive }"),
    ("TrafficPolicy", "{ targetRefs: [{ kind: Service, name: web }], retryBudget: { percent: 20 } }"),
    ("Workload", "{ addresses: [192.0.2.9] }"),
];

fn bad_documents(cluster: &Cluster) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let both = |kind: &str, spec: &str| -> Result<_> {
        let file = folder.path().join("one.yaml");
        std::fs::write(&file, own(kind, "default", "one", spec))?;
        let file = file.to_string_lossy().into_owned();
        let checked = finish(&mut outrigger(["check", "--file", &file]), PATIENCE)?;
        // Of a field that is unknown the API server is told to say nothing, as it is by most programs: what refuses it is ours.
        let words = ["apply", "--server-side", "--dry-run=server", "--validate=ignore", "--filename", &file];
        let applied = finish(&mut cluster.kubectl(words), PATIENCE)?;
        Ok((checked, applied))
    };
    for (kind, spec) in GOOD {
        let (checked, applied) = both(kind, spec)?;
        ensure!(checked.code == 0 && applied.code == 0, "{kind} {spec}: {}{}", checked.all(), applied.all());
    }
    for (kind, spec, word) in BAD {
        let (checked, applied) = both(kind, spec)?;
        ensure!(checked.code == 1 && checked.all().contains(word), "{kind} {spec}: check says {}", checked.all());
        ensure!(applied.code != 0 && applied.all().contains(word), "{kind} {spec}: the API server says {}", applied.all());
    }
    Ok(())
}

/// A pod that is there before its namespace is labelled.
pub(super) fn quarantined(cluster: &Cluster, namespace: &'static str) -> Result<()> {
    let shop = Namespace::plain(cluster, namespace)?;
    shop.client("client")?;
    shop.ready("client")?;
    cluster.run(&["label", "namespace", namespace, "outrigger.dev/inject=enabled"])?;
    let pods = shop.pods("client")?;
    let pod = pods.first().and_then(|pod| pod["metadata"]["name"].as_str()).context("no pod")?;
    let told = wait_for("an event of the pod", PATIENCE, || {
        let said = cluster.run(&["--namespace", namespace, "describe", "pod", pod])?;
        let line = said.lines().find(|line| line.contains("NoSidecar")).map(str::to_owned);
        line.with_context(|| format!("no event tells it:\n{said}"))
    })?;
    ensure!(told.contains("delete the pod"), "{told}");
    let code = |words: &[&str]| shop.exec("client", words).map(|said| said.code);
    let api = ["/bin/curl", "--silent", "--insecure", "--max-time", "2", "https://10.96.0.1/version"];
    ensure!(code(&api)? == 28, "what asks for a sidecar and has none reaches the API server");
    cluster.run(&["label", "namespace", namespace, "outrigger.dev/inject-"])?;
    wait_for("the end of the quarantine", PATIENCE, || {
        let code = code(&api)?;
        ensure!(code == 0, "curl ends with {code}");
        Ok(())
    })
}

fn astray(cluster: &Cluster) -> Result<()> {
    let bank = Namespace::injected(cluster, "bank")?;
    bank.web(1)?;
    let shop = Namespace::injected(cluster, "astray")?;
    shop.client("client")?;
    bank.ready("web")?;
    shop.ready("client")?;
    let address = bank.address("web")?;
    cluster.apply(&format!(
        "apiVersion: v1
kind: Service
metadata: {{ name: bank, namespace: astray }}
spec: {{ ports: [{{ port: 80, targetPort: 8080 }}] }}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{ name: bank-1, namespace: astray, labels: {{ kubernetes.io/service-name: bank }} }}
addressType: IPv4
endpoints: [{{ addresses: [{address}] }}]
ports: [{{ port: 8080 }}]
"
    ))?;
    shop.until("client", &["http://web.bank/"], 200)?;
    shop.until("client", &["http://bank/"], 503)?;
    let (_, counted) = shop.curl("client", &[&format!("http://{address}:14021/metrics")])?;
    let plaintext = counted.lines().find(|line| line.contains("plaintext") && line.starts_with("outrigger_refusals_total{"));
    ensure!(plaintext.is_none(), "the pod of the other namespace was dialled in clear: {plaintext:?}");
    Ok(())
}
