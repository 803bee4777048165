//! What the kubelet and Prometheus ask of apps, led to their sidecars.

use serde_json::{Value, json};

use super::{doors, injected, pod, variable};

fn probed(probe: &Value) -> Value {
    pod(
        &json!({ "spec": { "containers": [{ "name": "web", "ports": [{ "name": "http", "containerPort": 8080 }], "livenessProbe": probe }] } }),
    )
}

#[test]
fn every_probe_that_comes_over_the_network_is_led_to_the_sidecar() {
    for (probe, asked) in [
        (
            json!({ "httpGet": { "port": "http", "path": "/healthz?deep=1" }, "periodSeconds": 2, "timeoutSeconds": 3 }),
            json!({ "ask": { "http": { "port": 8080, "path": "/healthz?deep=1" } }, "timeoutSeconds": 3 }),
        ),
        (
            json!({ "httpGet": { "port": 8443, "path": "ok", "scheme": "HTTPS", "httpHeaders": [{ "name": "Host", "value": "web.shop" }] } }),
            json!({ "ask": { "http": { "port": 8443, "path": "/ok", "tls": true, "headers": [["Host", "web.shop"]] } }, "timeoutSeconds": 1 }),
        ),
        (
            json!({ "httpGet": { "port": "9000" } }),
            json!({ "ask": { "http": { "port": 9000, "path": "/" } }, "timeoutSeconds": 1 }),
        ),
        (json!({ "tcpSocket": { "port": "http" } }), json!({ "ask": { "tcp": { "port": 8080 } }, "timeoutSeconds": 1 })),
        (json!({ "grpc": { "port": 50051 } }), json!({ "ask": { "grpc": { "port": 50051 } }, "timeoutSeconds": 1 })),
        (
            json!({ "grpc": { "port": 50051, "service": "shop.Cart" }, "failureThreshold": 9 }),
            json!({ "ask": { "grpc": { "port": 50051, "service": "shop.Cart" } }, "timeoutSeconds": 1 }),
        ),
    ] {
        let pod = injected(&probed(&probe)).pod;
        assert_eq!(doors(&pod), json!({ "probes": { "web/liveness": asked } }));
        let led = &pod["spec"]["containers"][0]["livenessProbe"];
        assert_eq!(led["httpGet"], json!({ "path": "/probe/web/liveness", "port": 14021, "scheme": "HTTP" }));
        for action in ["tcpSocket", "grpc"] {
            assert_eq!(led.get(action), None);
        }
        for kept in ["periodSeconds", "timeoutSeconds", "failureThreshold"] {
            assert_eq!(led.get(kept), probe.get(kept), "{kept}");
        }
    }
}

#[test]
fn probes_that_need_no_network_of_the_pod_stay() {
    for probe in [
        json!({ "exec": { "command": ["true"] } }),
        json!({ "httpGet": { "port": 14021, "path": "/ready" } }),
        json!({ "httpGet": { "port": 80, "host": "example.com" } }),
        json!({ "tcpSocket": { "port": 80, "host": "example.com" } }),
    ] {
        let original = probed(&probe);
        let injected = injected(&original);
        assert_eq!(injected.pod["spec"]["containers"], original["spec"]["containers"]);
        assert_eq!(doors(&injected.pod), json!({}));
        assert_eq!(injected.warnings.len(), usize::from(probe["httpGet"].get("host").is_some()), "{probe}");
    }
}

#[test]
fn all_kinds_of_probes_of_all_containers_that_stay_are_led() {
    let probe = |port: u16| json!({ "tcpSocket": { "port": port } });
    let pod = pod(&json!({ "spec": {
        "initContainers": [
            { "name": "migrate", "image": "web:1" },
            { "name": "logs", "restartPolicy": "Always", "startupProbe": probe(1) },
        ],
        "containers": [
            { "name": "web", "readinessProbe": probe(2), "startupProbe": probe(3) },
            { "name": "cache", "readinessProbe": probe(4) },
        ],
    } }));
    let pod = injected(&pod).pod;
    let doors = doors(&pod);
    let ports: Vec<_> =
        doors["probes"].as_object().unwrap().iter().map(|(name, probe)| (name.as_str(), &probe["ask"]["tcp"]["port"])).collect();
    assert_eq!(
        ports,
        [("cache/readiness", &json!(4)), ("logs/startup", &json!(1)), ("web/readiness", &json!(2)), ("web/startup", &json!(3))]
    );
    assert_eq!(pod["spec"]["initContainers"][2]["startupProbe"]["httpGet"]["path"], "/probe/logs/startup");
}

#[test]
fn prometheus_is_led_to_the_sidecar() {
    let annotated = |notes: Value| pod(&json!({ "metadata": { "annotations": notes } }));
    for (notes, asked, left) in [
        (
            json!({ "prometheus.io/scrape": "true", "prometheus.io/port": "9102" }),
            json!({ "metrics": { "port": 9102, "path": "/metrics" } }),
            json!({ "prometheus.io/port": "14021", "prometheus.io/path": "/metrics/app" }),
        ),
        (
            json!({ "prometheus.io/scrape": "true", "prometheus.io/path": "stats", "prometheus.io/scheme": "https" }),
            json!({ "metrics": { "port": 8080, "path": "/stats", "tls": true } }),
            json!({ "prometheus.io/port": "14021", "prometheus.io/path": "/metrics/app", "prometheus.io/scheme": "http" }),
        ),
        (
            json!({ "prometheus.io/scrape": "false", "prometheus.io/port": "9102" }),
            json!({}),
            json!({ "prometheus.io/port": "9102" }),
        ),
        (
            json!({ "prometheus.io/scrape": "true", "prometheus.io/port": "metrics" }),
            json!({}),
            json!({ "prometheus.io/port": "metrics" }),
        ),
    ] {
        let injected = injected(&annotated(notes.clone()));
        assert_eq!(doors(&injected.pod), asked, "{notes}");
        for (name, text) in left.as_object().unwrap() {
            assert_eq!(&injected.pod["metadata"]["annotations"][name], text, "{notes}");
        }
        assert_eq!(injected.warnings.len(), usize::from(notes["prometheus.io/port"] == "metrics"));
    }
}

#[test]
fn hooks_that_come_over_the_network_are_warned_of() {
    let hooked = |hook: Value| pod(&json!({ "spec": { "containers": [{ "name": "web", "lifecycle": { "preStop": hook } }] } }));
    let warnings = injected(&hooked(json!({ "httpGet": { "port": 8080, "path": "/quit" } }))).warnings;
    assert!(warnings[0].starts_with("container web: lifecycle.preStop is a connection of the kubelet"), "{warnings:?}");
    assert!(injected(&hooked(json!({ "exec": { "command": ["true"] } }))).warnings.is_empty());
}

#[test]
fn a_dollar_of_a_probe_is_kept_from_the_kubelet_who_replaces_variables() {
    let web = |path: &str| json!({ "name": "web", "livenessProbe": { "httpGet": { "path": path, "port": 8080 } } });
    for path in ["/$(OUTRIGGER_NAMESPACE)", "/a$$b", "/$"] {
        let pod = json!({ "metadata": { "name": "web-1" }, "spec": { "containers": [web(path)] } });
        let once = injected(&pod).pod;
        let value = variable(&once, "OUTRIGGER_PROBES").unwrap();
        assert_eq!(value.matches('$').count(), 2 * path.matches('$').count(), "{value}");
        let given = crate::injection::sidecar::given(value);
        let asked: Value = serde_json::from_str(&given).unwrap();
        assert_eq!(asked["probes"]["web/liveness"]["ask"]["http"]["path"], path);
        assert_eq!(injected(&once).pod, once, "the next injection reads what it is given");
    }
}
