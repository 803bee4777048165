//! What a pod looks like with its sidecar, and which pods get one.

use serde_json::{Value, json};

use super::{annotated, injected, pod, shop, sidecar, variable};
use crate::injection::document::inject_document;
use crate::injection::{Namespace, Outcome, Reason, Settings, inject, refuse_forged};
use crate::model::marks::{INJECT, Mode, SYSTEM};

#[test]
fn a_pod_of_a_labelled_namespace_gets_a_native_sidecar_before_its_other_init_containers() {
    let original = pod(&json!({ "spec": { "initContainers": [{ "name": "migrate", "image": "web:1" }] } }));
    let pod = injected(&original).pod;
    assert_eq!(
        sidecar(&pod),
        &json!({
            "name": "outrigger",
            "image": concat!("outrigger:", env!("CARGO_PKG_VERSION")),
            "args": ["sidecar"],
            "env": [
                { "name": "OUTRIGGER_NAMESPACE", "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": "metadata.namespace" } } },
                { "name": "OUTRIGGER_NAME", "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": "metadata.name" } } },
                { "name": "OUTRIGGER_CONTROL", "value": "control.outrigger-system.svc:14010" },
                { "name": "OUTRIGGER_TRUST_DOMAIN", "value": "cluster.local" },
                { "name": "OUTRIGGER_STATE", "value": "/var/lib/outrigger" },
                { "name": "OUTRIGGER_PROBES", "value": "{}" },
                { "name": "OUTRIGGER_LOG", "value": "json" },
                { "name": "OUTRIGGER_LOG_LEVEL", "value": "info" },
                { "name": "OUTRIGGER_ACCESS_LOG", "value": "-" },
            ],
            "lifecycle": { "postStart": { "exec": { "command": ["/outrigger", "wait"] } } },
            "resources": { "requests": { "cpu": "10m", "memory": "32Mi" } },
            "restartPolicy": "Always",
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "capabilities": { "drop": ["ALL"] },
                "privileged": false,
                "readOnlyRootFilesystem": true,
                "runAsGroup": 14000,
                "runAsNonRoot": true,
                "runAsUser": 14000,
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": [
                { "name": "outrigger", "mountPath": "/run/outrigger", "readOnly": true },
                { "name": "outrigger-state", "mountPath": "/var/lib/outrigger" },
                {
                    "name": "outrigger-state",
                    "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount",
                    "readOnly": true,
                    "subPath": "no-token",
                },
            ],
        })
    );
    assert_eq!(pod["spec"]["initContainers"][1]["name"], "migrate");
    assert_eq!(pod["spec"]["containers"], original["spec"]["containers"]);
    assert_eq!(
        pod["spec"]["volumes"],
        json!([
            { "name": "outrigger", "csi": { "driver": "csi.outrigger.dev", "readOnly": true } },
            { "name": "outrigger-state", "emptyDir": { "medium": "Memory", "sizeLimit": "64Mi" } },
        ])
    );
    assert_eq!(pod["metadata"]["labels"]["outrigger.dev/sidecar"], "injected");
    let status: Value = serde_json::from_str(pod["metadata"]["annotations"]["outrigger.dev/status"].as_str().unwrap()).unwrap();
    assert_eq!((&status["mode"], &status["version"]), (&json!("native"), &json!(env!("CARGO_PKG_VERSION"))));
}

#[test]
fn the_classic_sidecar_is_the_first_container_and_commands_go_to_the_app_all_the_same() {
    let pod = injected(&annotated("outrigger.dev/sidecar-mode", "classic")).pod;
    assert_eq!(pod["spec"].get("initContainers"), None);
    assert_eq!(pod["spec"]["containers"][0]["name"], "outrigger");
    assert_eq!(pod["spec"]["containers"][0].get("restartPolicy"), None);
    assert_eq!(pod["spec"]["containers"][0]["lifecycle"]["postStart"]["exec"]["command"], json!(["/outrigger", "wait"]));
    let last = json!(["/outrigger", "wait", "--app-ended"]);
    assert_eq!(pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"], last);
    assert_eq!(pod["spec"]["containers"][1]["name"], "web");
    assert_eq!(pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"], "web");
}

#[test]
fn the_patch_makes_of_the_pod_what_was_printed() {
    for original in [
        pod(&json!({})),
        pod(&json!({ "spec": { "initContainers": null, "volumes": null }, "metadata": { "labels": null, "annotations": null } })),
        annotated("outrigger.dev/sidecar-mode", "classic"),
        pod(&json!({ "spec": { "volumes": [{ "name": "data", "emptyDir": {} }], "unheardOf": { "field": [1, 2] } } })),
    ] {
        let injected = injected(&original);
        let mut patched = original.clone();
        json_patch::patch(&mut patched, &injected.patch(&original)).unwrap();
        assert_eq!(patched, injected.pod);
        assert_eq!(patched["spec"].get("unheardOf"), original["spec"].get("unheardOf"));
    }
}

#[test]
fn a_label_decides_the_pods_before_its_namespaces() {
    let of = |name: &str, namespace: Option<&str>, own: Option<&str>| {
        let label = |value: Option<&str>| value.map(|value| (INJECT.to_owned(), value.to_owned()));
        let namespace =
            Namespace { name: name.to_owned(), labels: label(namespace).into_iter().collect(), ..Namespace::default() };
        let own = own.map_or(json!({}), |own| json!({ "metadata": { "labels": { INJECT: own } } }));
        match inject(&pod(&own), &namespace, &Settings::default()).unwrap() {
            Outcome::Injected(_) => None,
            Outcome::Left(reason) => Some(reason),
        }
    };
    for (name, namespace, own, expected) in [
        ("shop", Some("enabled"), None, None),
        ("shop", None, Some("enabled"), None),
        ("shop", Some("disabled"), Some("enabled"), None),
        ("shop", Some("enabled"), Some("disabled"), Some(Reason::Disabled)),
        ("shop", Some("disabled"), None, Some(Reason::NotAsked)),
        ("shop", None, None, Some(Reason::NotAsked)),
        ("kube-system", Some("enabled"), Some("enabled"), Some(Reason::SystemNamespace)),
        (SYSTEM, None, Some("enabled"), Some(Reason::SystemNamespace)),
    ] {
        assert_eq!(of(name, namespace, own), expected, "{name} {namespace:?} {own:?}");
    }
    let mirror = annotated("kubernetes.io/config.mirror", "0");
    assert_eq!(inject(&mirror, &shop(), &Settings::default()), Ok(Outcome::Left(Reason::Mirror)));
}

#[test]
fn annotations_choose_image_resources_and_log_level_and_a_namespaces_hold_for_its_pods() {
    let mut namespace = shop();
    namespace.annotations = [
        ("outrigger.dev/sidecar-cpu", "200m"),
        ("outrigger.dev/log-level", "debug"),
        ("outrigger.dev/exclude-outbound-ports", "3306"),
        ("outrigger.dev/status", "{}"),
        ("example.com/note", "of the namespace"),
    ]
    .map(|(name, text)| (name.to_owned(), text.to_owned()))
    .into();
    let own = json!({ "metadata": { "annotations": {
        "outrigger.dev/sidecar-image": "registry.example/outrigger:2@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "outrigger.dev/sidecar-memory-limit": "24Mi",
        "outrigger.dev/sidecar-cpu-limit": "1",
        "outrigger.dev/log-level": "warn,outrigger::dataplane=debug",
    } } });
    let Outcome::Injected(injected) = inject(&pod(&own), &namespace, &Settings::default()).unwrap() else { panic!() };
    let pod = injected.pod;
    assert_eq!(
        sidecar(&pod)["image"],
        "registry.example/outrigger:2@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
    );
    // What the pod did not ask for itself gives way to its limit.
    assert_eq!(
        sidecar(&pod)["resources"],
        json!({ "requests": { "cpu": "200m", "memory": "24Mi" }, "limits": { "cpu": "1", "memory": "24Mi" } })
    );
    assert_eq!(variable(&pod, "OUTRIGGER_LOG_LEVEL"), Some("warn,outrigger::dataplane=debug"));
    // Who reads them later looks at the pod alone.
    assert_eq!(pod["metadata"]["annotations"]["outrigger.dev/exclude-outbound-ports"], "3306");
    assert_eq!(pod["metadata"]["annotations"].get("example.com/note"), None);
    assert_ne!(pod["metadata"]["annotations"]["outrigger.dev/status"], "{}");
}

#[test]
fn settings_are_those_of_the_mesh() {
    let settings = Settings {
        image: "mirror.example/outrigger:9".to_owned(),
        control: "control.mesh.example:14010".to_owned(),
        trust_domain: "shop.example".to_owned(),
        mode: Mode::Classic,
        ..Settings::default()
    };
    let Outcome::Injected(injected) = inject(&pod(&json!({})), &shop(), &settings).unwrap() else { panic!() };
    assert_eq!(injected.pod["spec"]["containers"][0]["image"], "mirror.example/outrigger:9");
    assert_eq!(variable(&injected.pod, "OUTRIGGER_CONTROL"), Some("control.mesh.example:14010"));
    assert_eq!(variable(&injected.pod, "OUTRIGGER_TRUST_DOMAIN"), Some("shop.example"));
}

#[test]
fn with_another_workload_api_the_sidecar_has_its_volume_beside_the_agents_and_asks_there() {
    let settings = Settings { workload_api: Some("csi.spiffe.io".parse().unwrap()), ..Settings::default() };
    let original = pod(&json!({}));
    let Outcome::Injected(injected) = inject(&original, &shop(), &settings).unwrap() else { panic!() };
    let mut usual = super::injected(&original).pod;
    let add = |list: &mut Value, item: Value| list.as_array_mut().unwrap().push(item);
    let container = &mut usual["spec"]["initContainers"][0];
    add(&mut container["env"], json!({ "name": "OUTRIGGER_WORKLOAD_API", "value": "/spiffe-workload-api/spire-agent.sock" }));
    add(
        &mut container["volumeMounts"],
        json!({ "name": "outrigger-workload-api", "mountPath": "/spiffe-workload-api", "readOnly": true }),
    );
    add(
        &mut usual["spec"]["volumes"],
        json!({ "name": "outrigger-workload-api", "csi": { "driver": "csi.spiffe.io", "readOnly": true } }),
    );
    assert_eq!(injected.pod, usual);
    assert_eq!(refuse_forged(&injected.pod), Ok(()));
}

#[test]
fn the_pods_of_every_kind_that_makes_pods_are_found_and_nothing_else_is_touched() {
    let template = json!({ "metadata": { "labels": { "app": "web" } }, "spec": pod(&json!({}))["spec"] });
    let expected = injected(&template).pod;
    let document = |version: &str, kind: &str, spec: Value| json!({ "apiVersion": version, "kind": kind, "metadata": { "name": "web", "namespace": "shop" }, "spec": spec });
    let of_template = |template: &Value| json!({ "replicas": 2, "template": template });
    let of_cron_job = |template: &Value| json!({ "schedule": "@daily", "jobTemplate": { "spec": { "template": template } } });
    let namespace = |_name: &str| shop();
    let settings = Settings::default();
    let kinds = [("v1", "ReplicationController"), ("batch/v1", "Job")].into_iter();
    let kinds = kinds.chain(["DaemonSet", "Deployment", "ReplicaSet", "StatefulSet"].map(|kind| ("apps/v1", kind)));
    let mut items = Vec::new();
    let mut expected_items = Vec::new();
    for (version, kind) in kinds {
        items.push(document(version, kind, of_template(&template)));
        expected_items.push(document(version, kind, of_template(&expected)));
    }
    items.push(document("batch/v1", "CronJob", of_cron_job(&template)));
    expected_items.push(document("batch/v1", "CronJob", of_cron_job(&expected)));
    let others = [
        document("v1", "Service", json!({ "selector": { "app": "web" } })),
        document("example.com/v1", "Deployment", of_template(&template)),
    ];
    items.extend(others.clone());
    expected_items.extend(others);
    let mut list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
    let told = inject_document(&mut list, &namespace, &settings);
    assert_eq!(list["items"], Value::Array(expected_items));
    assert_eq!(told.len(), 7);
    assert_eq!(told[6].what, "CronJob shop/web");
    assert!(told.iter().all(|told| told.result == Ok(Ok(Vec::new()))), "{told:?}");

    let mut broken = document("apps/v1", "Deployment", json!({}));
    let told = inject_document(&mut broken, &namespace, &settings);
    assert!(told[0].result.as_ref().unwrap_err().to_string().contains("no .spec.template"), "{told:?}");
}
