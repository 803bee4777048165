//! Services of every shape, as an app in the mesh calls them.

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE};
use e2e::mesh::wait_for;
use e2e::runner::Case;
use serde_json::{Value, json};

use super::OnCluster;
use super::pods::{Namespace, container, idle, pod, service};

pub(super) const CASES: &[OnCluster] =
    &[Case { name: "services_of_every_shape_lead_where_they_say", run: |cluster, _| shapes(cluster) }];

fn shapes(cluster: &Cluster) -> Result<()> {
    let shop = Namespace::injected(cluster, "shapes")?;
    let outside = Namespace::labelled(cluster, "shapeless", "team: none")?;
    let serve = || {
        let name = json!([{ "name": "NAME", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } }]);
        container("app", json!({ "args": ["echo"], "env": name, "ports": [{ "name": "web", "containerPort": 8080 }] }))
    };
    let stateful = json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": { "name": "web" },
        "spec": {
            "serviceName": "web",
            "replicas": 2,
            "podManagementPolicy": "Parallel",
            "selector": { "matchLabels": { "app": "web" } },
            "template": {
                "metadata": { "labels": { "app": "web" } },
                "spec": { "terminationGracePeriodSeconds": 2, "containers": [serve()] },
            },
        },
    });
    let dual = json!({ "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"] });
    let elsewhere = json!({ "type": "ExternalName", "externalName": "outside.shapeless.svc.cluster.local" });
    shop.make(&[
        stateful,
        // Headless: its name has the addresses of the pods themselves.
        service("web", "web", 8080, &json!("web"), json!({ "clusterIP": "None" })),
        service("named", "web", 80, &json!("web"), json!({})),
        service("dual", "web", 80, &json!("web"), dual),
        service("near", "web", 80, &json!("web"), json!({ "internalTrafficPolicy": "Local" })),
        json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "elsewhere" }, "spec": elsewhere }),
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": "written" },
            "spec": { "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }] },
        }),
        pod("caller", &[idle("app")], json!({})),
    ])?;
    outside.make(&[pod("outside", &[serve()], json!({})), service("outside", "outside", 80, &json!("web"), json!({}))])?;
    shop.run(&["rollout", "status", "statefulset/web", "--timeout=50s"]).with_context(|| cluster.story("shapes"))?;
    shop.wait("Ready", PATIENCE, &["pod/caller"])?;
    outside.wait("Ready", PATIENCE, &["pod/outside"])?;
    // Whoever writes endpoints himself.
    let open = outside.address_of("outside")?;
    shop.make(&[json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": { "name": "written-1", "labels": { "kubernetes.io/service-name": "written" } },
        "addressType": "IPv4",
        "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
        "endpoints": [{ "addresses": [open] }],
    })])?;
    let answers = |url: &str, names: &[&str]| {
        let mut seen = std::collections::BTreeSet::new();
        wait_for(&format!("answers of {names:?} at {url}"), PATIENCE, || {
            let (status, body) = shop.ask("caller", "app", &[url])?;
            ensure!(status == 200, "{status} {body}");
            let said: Value = serde_json::from_str(&body).with_context(|| body.clone())?;
            seen.insert(said["service"].as_str().context("nobody's answer")?.to_owned());
            ensure!(seen.iter().eq(names.iter()), "so far: {seen:?}");
            Ok(())
        })
        .with_context(|| cluster.story("shapes"))
    };
    let both = ["web-0", "web-1"];
    // Which pod it is, its caller chooses: `curl` takes the first address that the name has.
    let (status, body) = shop.ask("caller", "app", &["http://web:8080/"])?;
    ensure!(status == 200, "{status} {body}");
    for one in both {
        answers(&format!("http://{one}.web:8080/"), &[one])?;
    }
    for name in ["named", "dual", "near"] {
        answers(&format!("http://{name}/"), &both)?;
    }
    let dual = shop.get("service/dual")?;
    for address in dual["spec"]["clusterIPs"].as_array().context("no addresses")?.iter().filter_map(Value::as_str) {
        let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        answers(&format!("http://{host}/"), &both)?;
    }
    answers("http://elsewhere/", &["outside"])?;
    answers("http://written/", &["outside"])
}
