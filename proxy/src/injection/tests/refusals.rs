//! Every refusal, by name.

use serde_json::{Value, json};

use super::{annotated, injected, pod, refused, shop};
use crate::injection::{Outcome, Refusal, Settings, inject, refuse_forged};

fn check(pod: &Value, word: &str, told: &str) {
    let refusal = refused(pod);
    assert_eq!(refusal.word(), word, "{refusal}");
    assert!(refusal.to_string().contains(told), "{refusal}");
}

fn container(over: &Value) -> Value {
    let mut container = json!({ "name": "web", "ports": [{ "name": "http", "containerPort": 8080 }] });
    json_patch::merge(&mut container, over);
    pod(&json!({ "spec": { "containers": [container] } }))
}

#[test]
fn what_is_no_pod_is_refused() {
    check(&json!([]), "not_a_pod", "this is no pod");
    check(&json!({ "metadata": {} }), "not_a_pod", "it has no spec");
    check(&pod(&json!({ "spec": { "containers": "web" } })), "not_a_pod", "this is no pod");
    check(&pod(&json!({ "spec": { "hostNetwork": "yes" } })), "not_a_pod", "this is no pod");
}

#[test]
fn a_pod_that_no_sidecar_can_serve_is_refused_with_what_to_do() {
    check(&pod(&json!({ "spec": { "hostNetwork": true } })), "host_network", "label it outrigger.dev/inject: disabled");
    check(&pod(&json!({ "spec": { "os": { "name": "windows" } } })), "windows", "os.name: windows: the sidecar runs on Linux");
    for label in ["kubernetes.io/os", "beta.kubernetes.io/os"] {
        let chosen = |system: &str| pod(&json!({ "spec": { "nodeSelector": { "disk": "ssd", label: system } } }));
        check(
            &chosen("windows"),
            "windows",
            &format!("nodeSelector[{label}]: windows: the sidecar runs on Linux; label the pod"),
        );
        injected(&chosen("linux"));
    }
    let disabled = json!({ "metadata": { "labels": { "outrigger.dev/inject": "disabled" } }, "spec": { "hostNetwork": true } });
    assert!(matches!(inject(&pod(&disabled), &shop(), &Settings::default()), Ok(Outcome::Left(_))));
}

#[test]
fn a_pod_whose_resolver_does_not_know_the_control_plane_is_refused_and_would_never_start() {
    let asks = |spec: Value| pod(&json!({ "spec": spec }));
    let node = asks(json!({ "dnsPolicy": "Default" }));
    check(&node, "dns_policy", "dnsPolicy: Default: the pod's resolver does not know control.outrigger-system.svc");
    let servers = json!({ "nameservers": ["169.254.20.10"] });
    check(&asks(json!({ "dnsPolicy": "None", "dnsConfig": servers })), "dns_policy", "in dnsConfig.searches");
    let whole = json!({ "nameservers": ["169.254.20.10"], "searches": ["svc.cluster.local", "cluster.local"] });
    injected(&asks(json!({ "dnsPolicy": "None", "dnsConfig": whole })));
    injected(&asks(json!({ "dnsPolicy": "ClusterFirst" })));
    // Where the control plane is known otherwise, it is the pod's own affair how it resolves names.
    for control in ["10.96.0.7:14010", "[fd00::7]:14010", "control.mesh.example:14010"] {
        let settings = Settings { control: control.to_owned(), ..Settings::default() };
        assert!(inject(&node, &shop(), &settings).is_ok(), "{control}");
    }
}

#[test]
fn a_label_that_says_nothing_is_refused() {
    let labelled = pod(&json!({ "metadata": { "labels": { "outrigger.dev/inject": "true" } } }));
    check(&labelled, "inject_label", "of the pod: \"true\" says nothing; write enabled or disabled");
    let mut namespace = shop();
    namespace.labels.insert("outrigger.dev/inject".to_owned(), "yes".to_owned());
    let refusal = inject(&pod(&json!({})), &namespace, &Settings::default()).unwrap_err();
    assert_eq!(refusal, Refusal::InjectLabel { of: "namespace", value: "yes".to_owned() });
    check(&annotated("outrigger.dev/inject", "enabled"), "inject_annotation", "write it under metadata.labels");
}

#[test]
fn an_annotation_that_says_nothing_is_refused() {
    for (name, text, word, told) in [
        ("sidecar-mod", "native", "unknown_annotation", "did you mean outrigger.dev/sidecar-mode?"),
        ("xyzzy", "1", "unknown_annotation", "write one of outrigger.dev/status, "),
        ("sidecar-mode", "sidecar", "annotation", "\"sidecar\" is no mode; write native or classic"),
        ("sidecar-image", "", "annotation", "\"\" is no image"),
        ("sidecar-image", "a b", "annotation", "\"a b\" is no image"),
        ("sidecar-image", "a//b:c:d", "annotation", "\"a//b:c:d\" is no image; write one as registry.example/outrigger:1.0"),
        ("sidecar-cpu", "0", "annotation", "\"0\" is no amount for a sidecar; write one of at most 8, as 50m or 0.5"),
        ("sidecar-cpu", "64Mi", "annotation", "\"64Mi\" is no amount for a sidecar; write one of at most 8"),
        ("sidecar-cpu", "100", "annotation", "\"100\" is no amount for a sidecar; write one of at most 8, as 50m or 0.5"),
        ("sidecar-cpu-limit", "many", "annotation", "\"many\" is no amount for a sidecar"),
        ("sidecar-cpu-limit", "9m", "annotation", "\"9m\" is no amount for a sidecar; write one of at least 10m, as 500m or 1"),
        ("sidecar-memory", "64MB", "annotation", "\"64MB\" is no amount for a sidecar; write one from 1M to 8Gi, as 64Mi"),
        ("sidecar-memory", "64", "annotation", "\"64\" is no amount for a sidecar; write one from 1M to 8Gi, as 64Mi"),
        ("sidecar-memory", "64m", "annotation", "\"64m\" is no amount for a sidecar"),
        ("sidecar-memory", "64Gi", "annotation", "\"64Gi\" is no amount for a sidecar"),
        ("sidecar-memory-limit", "-1", "annotation", "\"-1\" is no amount for a sidecar"),
        ("sidecar-memory-limit", "1Mi", "annotation", "\"1Mi\" is no amount for a sidecar; write one of at least 24Mi, as 128Mi"),
        ("sidecar-memory-limit", "23.9Mi", "annotation", "\"23.9Mi\" is no amount for a sidecar"),
        ("log-level", "loud", "annotation", "\"loud\" is no level"),
        ("capture", "drop", "annotation", "\"drop\" is no mode; write observe or enforce"),
        ("exclude-inbound-ports", "14021", "annotation", "14021 is a port of the sidecar's own"),
        ("exclude-outbound-cidrs", "all", "annotation", "\"all\" is not a network"),
        ("hold", "ten", "annotation", "\"ten\" is not a duration"),
    ] {
        let name = format!("outrigger.dev/{name}");
        check(&annotated(&name, text), word, told);
        assert!(refused(&annotated(&name, text)).to_string().starts_with(&format!("annotation {name}: ")));
    }
    for (name, text) in
        [("cpu", "8"), ("cpu", "1m"), ("cpu-limit", "64"), ("cpu-limit", "10m"), ("memory", "1M"), ("memory", "8Gi")]
    {
        injected(&annotated(&format!("outrigger.dev/sidecar-{name}"), text));
    }
    let more =
        json!({ "metadata": { "annotations": { "outrigger.dev/sidecar-cpu": "2", "outrigger.dev/sidecar-cpu-limit": "500m" } } });
    check(&pod(&more), "annotation", "500m is less than 2, which outrigger.dev/sidecar-cpu asks for");
}

#[test]
fn a_pod_that_shows_marks_without_a_sidecar_is_refused() {
    let label = pod(&json!({ "metadata": { "labels": { "outrigger.dev/sidecar": "injected" } } }));
    check(&label, "forged_mark", "label outrigger.dev/sidecar: it is written by the injection");
    check(
        &annotated("outrigger.dev/status", "{}"),
        "forged_mark",
        "annotation outrigger.dev/status: it is written by the injection",
    );
    assert_eq!(refuse_forged(&label), Err(refused(&label)));
    assert_eq!(refuse_forged(&pod(&json!({}))), Ok(()));
}

#[test]
fn a_container_that_calls_itself_the_sidecar_is_refused() {
    check(&container(&json!({ "name": "outrigger" })), "forged_container", "only the mesh's sidecar is called that");
    let init = pod(&json!({ "spec": { "initContainers": [{ "name": "outrigger", "restartPolicy": "Always" }] } }));
    check(&init, "forged_container", "only the mesh's sidecar is called that");
    type Forge = fn(&mut Value);
    let forgeries: [(Forge, &str, &str); 8] = [
        (|pod| pod["spec"]["initContainers"][0]["args"] = json!(["sh"]), "forged_container", "it runs something else"),
        (|pod| pod["spec"]["initContainers"][0]["command"] = json!(["/sh"]), "forged_container", "it runs something else"),
        (
            |pod| pod["spec"]["initContainers"][0]["restartPolicy"] = Value::Null,
            "forged_container",
            "an init container that ends",
        ),
        (|pod| pod["spec"]["initContainers"][0]["volumeMounts"] = json!([]), "forged_container", "no sockets of the node agent"),
        (
            |pod| pod["spec"]["volumes"][0] = json!({ "name": "outrigger", "emptyDir": {} }),
            "forged_container",
            "not the node agent's",
        ),
        (
            |pod| pod["spec"]["initContainers"][0]["env"][5]["value"] = "no".into(),
            "forged_container",
            "OUTRIGGER_PROBES cannot be read",
        ),
        (
            |pod| pod["metadata"]["annotations"]["outrigger.dev/status"] = "yes".into(),
            "forged_mark",
            "annotation outrigger.dev/status",
        ),
        (|pod| pod["metadata"]["labels"]["outrigger.dev/sidecar"] = "yes".into(), "forged_container", "only the mesh's sidecar"),
    ];
    for (forge, word, told) in forgeries {
        let mut pod = injected(&pod(&json!({}))).pod;
        forge(&mut pod);
        check(&pod, word, told);
        assert_eq!(refuse_forged(&pod), Err(refused(&pod)));
    }
}

#[test]
fn nobody_but_the_sidecar_gets_its_volumes() {
    for name in ["outrigger", "outrigger-state", "outrigger-workload-api"] {
        check(
            &pod(&json!({ "spec": { "volumes": [{ "name": name, "emptyDir": {} }] } })),
            "forged_volume",
            "give it another name",
        );
    }
    let other = json!({ "spec": { "volumes": [{ "name": "mine", "csi": { "driver": "csi.outrigger.dev" } }] } });
    check(&pod(&other), "forged_volume", "volume mine: the driver csi.outrigger.dev gives its sockets to the sidecar alone");
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        let mut pod = injected(&pod(&json!({}))).pod;
        let thief = json!({ "name": "thief", "volumeMounts": [{ "name": "outrigger", "mountPath": "/x" }] });
        match pod["spec"][list].as_array_mut() {
            Some(list) => list.push(thief),
            None => pod["spec"][list] = json!([thief]),
        }
        check(&pod, "forged_volume", "container thief: it mounts the volume outrigger, which is the sidecar's alone");
    }
}

#[test]
fn a_port_of_the_sidecars_is_never_the_apps() {
    for port in [14001, 14006, 14007, 14020, 14021] {
        let pod = container(&json!({ "ports": [{ "containerPort": port }] }));
        check(&pod, "own_port", &format!("container web: port {port} is one of the sidecar's"));
    }
}

#[test]
fn a_probe_that_cannot_be_led_is_refused() {
    for (probe, word, told) in [
        (json!({ "httpGet": { "port": "grpc" } }), "probe_port", "readinessProbe: there is no port called \"grpc\""),
        (json!({ "tcpSocket": { "port": 0 } }), "probe_port", "readinessProbe: 0 is no port"),
        (json!({ "grpc": { "port": 70000 } }), "probe_port", "readinessProbe: 70000 is no port"),
        (json!({ "tcpSocket": { "port": 14021 } }), "probe_port", "readinessProbe: 14021 is no port at which an app"),
        (json!({ "httpGet": { "port": 14021, "path": "/probe/web/readiness" } }), "forged_probe", "it leads to the sidecar"),
    ] {
        check(&container(&json!({ "readinessProbe": probe })), word, told);
    }
    // A probe of another container is not this one's.
    let mut pod = injected(&container(&json!({ "livenessProbe": { "tcpSocket": { "port": 1 } } }))).pod;
    pod["spec"]["containers"][0]["readinessProbe"] = pod["spec"]["containers"][0]["livenessProbe"].clone();
    check(&pod, "forged_probe", "container web: readinessProbe: it leads to the sidecar");
    let notes = json!({ "prometheus.io/scrape": "true", "prometheus.io/port": "14021", "prometheus.io/path": "/metrics/app" });
    check(&super::pod(&json!({ "metadata": { "annotations": notes } })), "forged_probe", "prometheus.io/path");
}

#[test]
fn more_probes_than_a_sidecar_can_be_told_are_refused() {
    let long = "/".repeat(40_000);
    let probe = json!({ "httpGet": { "port": 1, "path": long } });
    check(&container(&json!({ "livenessProbe": probe, "readinessProbe": probe })), "too_many_probes", "65536 at most");
}

#[test]
fn a_start_that_is_asked_for_before_a_classic_sidecar_runs_is_refused() {
    let other = |probe: Value| {
        json!({ "metadata": { "name": "web-1", "annotations": { "outrigger.dev/sidecar-mode": "classic" } }, "spec": {
            "initContainers": [{ "name": "other", "restartPolicy": "Always", "startupProbe": probe }],
            "containers": [{ "name": "web" }],
        } })
    };
    let pod = other(json!({ "httpGet": { "port": 8080 } }));
    assert!(refused(&pod).to_string().starts_with("container other: startupProbe: it is asked before the classic sidecar runs"));
    injected(&other(json!({ "exec": { "command": ["true"] } })));
    let mut native = pod;
    native["metadata"]["annotations"] = json!({ "outrigger.dev/sidecar-mode": "native" });
    injected(&native);
}
