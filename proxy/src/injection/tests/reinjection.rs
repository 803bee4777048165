//! Pods that come again: after another webhook, out of `outrigger inject`, copied from a live pod.

use serde_json::{Value, json};

use super::{annotated, doors, injected, pod, refused, shop, sidecar, variable};
use crate::injection::{Outcome, Refusal, Settings, inject, refuse_forged};
use crate::model::marks::Mode;

fn busy() -> Value {
    pod(&json!({
        "metadata": { "annotations": { "prometheus.io/scrape": "true", "prometheus.io/port": "9102" } },
        "spec": {
            "containers": [{
                "name": "web",
                "ports": [{ "name": "http", "containerPort": 8080 }],
                "livenessProbe": { "httpGet": { "port": "http", "path": "/healthz" }, "timeoutSeconds": 2 },
                "readinessProbe": { "grpc": { "port": 50051 } },
            }],
            "volumes": [{ "name": "data", "emptyDir": {} }],
        },
    }))
}

#[test]
fn injecting_an_injected_pod_changes_nothing() {
    for original in [pod(&json!({})), busy(), annotated("outrigger.dev/sidecar-mode", "classic")] {
        let once = injected(&original);
        let twice = injected(&once.pod);
        assert_eq!(twice, once);
        assert!(twice.patch(&once.pod).0.is_empty());
        assert_eq!(refuse_forged(&once.pod), Ok(()));
    }
}

#[test]
fn what_another_webhook_adds_is_covered_and_stays() {
    let mut pod = injected(&busy()).pod;
    // Another sidecar, first in its list, with a probe of its own; a container more; a variable and a volume for everybody; a mirror.
    let agent = json!({ "name": "agent", "restartPolicy": "Always", "startupProbe": { "httpGet": { "port": 4000 } } });
    pod["spec"]["initContainers"].as_array_mut().unwrap().insert(0, agent);
    pod["spec"]["containers"]
        .as_array_mut()
        .unwrap()
        .push(json!({ "name": "late", "livenessProbe": { "tcpSocket": { "port": 5 } } }));
    let ours = &mut pod["spec"]["initContainers"][1];
    assert_eq!(ours["name"], "outrigger");
    ours["image"] = "mirror.example/outrigger:1".into();
    ours["resources"]["limits"] = json!({ "memory": "128Mi" });
    ours["imagePullPolicy"] = "IfNotPresent".into();
    ours["securityContext"]["privileged"] = true.into();
    ours["env"].as_array_mut().unwrap().push(json!({ "name": "CLUSTER", "value": "one" }));
    let token = json!({ "name": "token", "mountPath": "/var/run/secrets", "readOnly": true });
    ours["volumeMounts"].as_array_mut().unwrap().push(token.clone());
    assert!(refuse_forged(&pod).unwrap_err().to_string().contains("not the first"));

    let again = injected(&pod).pod;
    let names: Vec<_> = again["spec"]["initContainers"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["outrigger", "agent"]);
    assert_eq!(sidecar(&again)["image"], "mirror.example/outrigger:1");
    assert_eq!(sidecar(&again)["resources"]["limits"]["memory"], "128Mi");
    assert_eq!(sidecar(&again)["imagePullPolicy"], "IfNotPresent");
    assert_eq!(sidecar(&again)["securityContext"]["privileged"], false);
    assert_eq!(variable(&again, "CLUSTER"), Some("one"));
    assert_eq!(sidecar(&again)["volumeMounts"][3], token);
    let known: Vec<_> = doors(&again)["probes"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(known, ["agent/startup", "late/liveness", "web/liveness", "web/readiness"]);
    assert_eq!(doors(&again)["metrics"]["port"], 9102);
    assert_eq!(refuse_forged(&again), Ok(()));
    assert_eq!(injected(&again).pod, again);
}

/// As `kubectl debug --copy-to` makes it: without labels and annotations, and with what the API server wrote into the pod.
fn copied(injected: &Value, keeps: &[&str]) -> Value {
    let mut copy = injected.clone();
    copy["metadata"] = json!({ "name": "web-copy", "namespace": "shop" });
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"].iter().filter(|probe| !keeps.contains(probe)) {
        copy["spec"]["containers"][0].as_object_mut().unwrap().remove(*probe);
    }
    copy["spec"]["containers"].as_array_mut().unwrap().push(json!({ "name": "dbg", "image": "busybox" }));
    copy
}

#[test]
fn a_copy_of_a_pod_that_lost_its_marks_gets_a_sidecar_of_its_own() {
    for original in [busy(), annotated("outrigger.dev/sidecar-mode", "classic")] {
        let first = injected(&original).pod;
        assert_eq!(refuse_forged(&copied(&first, &[])), Err(Refusal::ContainerName), "as it stands it is none");
        let copy = injected(&copied(&first, &[])).pod;
        assert_eq!(copy["metadata"]["labels"]["outrigger.dev/sidecar"], "injected");
        assert_eq!(doors(&copy), json!({}), "its probes were left behind");
        assert_eq!(refuse_forged(&copy), Ok(()));
        assert_eq!(injected(&copy).pod, copy);
        let names = |list: &str| -> Vec<Value> {
            copy["spec"][list].as_array().into_iter().flatten().map(|one| one["name"].clone()).collect()
        };
        let all = [names("initContainers"), names("containers")].concat();
        assert_eq!(all, ["outrigger", "web", "dbg"]);
    }
    let kept = injected(&copied(&injected(&busy()).pod, &["livenessProbe"])).pod;
    assert_eq!(doors(&kept)["probes"].as_object().unwrap().keys().collect::<Vec<_>>(), ["web/liveness"]);
}

#[test]
fn what_is_called_like_the_sidecar_and_is_not_what_the_injection_makes_is_no_copy_of_one() {
    let forged = |change: &dyn Fn(&mut Value)| {
        let mut copy = copied(&injected(&busy()).pod, &[]);
        change(&mut copy["spec"]);
        refused(&copy).to_string()
    };
    let image = |spec: &mut Value| spec["initContainers"][0]["args"] = json!(["sh"]);
    assert!(forged(&image).contains("it runs something else; take it out"), "{}", forged(&image));
    let volume = |spec: &mut Value| spec["volumes"].as_array_mut().unwrap().retain(|volume| volume["name"] != "outrigger");
    assert!(forged(&volume).contains("its volume is not the node agent's"), "{}", forged(&volume));
}

#[test]
fn a_probe_that_was_changed_since_is_led_anew_and_one_that_went_is_forgotten() {
    let mut pod = injected(&busy()).pod;
    let web = &mut pod["spec"]["containers"][0];
    web["livenessProbe"] = json!({ "tcpSocket": { "port": 7 } });
    web["readinessProbe"] = Value::Null;
    assert_eq!(
        doors(&injected(&pod).pod)["probes"],
        json!({ "web/liveness": { "ask": { "tcp": { "port": 7 } }, "timeoutSeconds": 1 } })
    );
}

#[test]
fn what_is_asked_for_now_counts_before_what_an_earlier_injection_asked_for() {
    let mut pod = injected(&busy()).pod;
    pod["metadata"]["annotations"]["outrigger.dev/sidecar-memory"] = "64Mi".into();
    let again = injected(&pod).pod;
    assert_eq!(sidecar(&again)["resources"]["requests"]["memory"], "64Mi");

    let newer = Settings { image: "outrigger:next".to_owned(), mode: Mode::Classic, ..Settings::default() };
    let Outcome::Injected(moved) = inject(&again, &shop(), &newer).unwrap() else { panic!() };
    assert_eq!(moved.pod["spec"].get("initContainers"), None);
    assert_eq!(moved.pod["spec"]["containers"][0]["image"], "outrigger:next");
    assert_eq!(moved.pod["spec"]["containers"].as_array().unwrap().len(), 2);
    assert_eq!(moved.pod["spec"]["volumes"].as_array().unwrap().len(), 3);
    assert_eq!(doors(&moved.pod), doors(&again));
}

#[test]
fn a_pod_that_comes_again_asks_at_the_workload_api_that_is_set_now() {
    let settings = |text: &str| Settings { workload_api: text.parse().ok(), ..Settings::default() };
    let again = |pod: &Value, settings: &Settings| match inject(pod, &shop(), settings).unwrap() {
        Outcome::Injected(injected) => injected.pod,
        left => panic!("{left:?}"),
    };
    let original = busy();
    let (usual, spire, other) = (settings(""), settings("csi.spiffe.io"), settings("csi.other.example/agent.sock"));
    for (before, now) in [(&usual, &spire), (&spire, &spire), (&spire, &other), (&spire, &usual)] {
        assert_eq!(again(&again(&original, before), now), again(&original, now), "{before:?} {now:?}");
    }
}

/// As an app has it whose containers use up what their pod asks for as a whole.
fn bounded(requests: &Value, limits: &Value) -> Value {
    let container = json!({ "name": "web", "image": "web:1", "resources": { "requests": requests } });
    pod(&json!({ "spec": { "containers": [container], "resources": { "requests": requests, "limits": limits } } }))
}

fn whole(pod: &Value) -> &Value {
    &pod["spec"]["resources"]
}

#[test]
fn what_a_pod_asks_for_as_a_whole_grows_by_its_sidecars_share_and_by_it_once() {
    let requests = json!({ "cpu": "50m", "memory": "64Mi" });
    let limits = json!({ "cpu": "1", "memory": "1Gi", "hugepages-2Mi": "4Mi" });
    let grown = json!({
        "requests": { "cpu": "60m", "memory": "96Mi" },
        "limits": { "cpu": "1010m", "memory": "1056Mi", "hugepages-2Mi": "4Mi" },
    });
    let mut original = bounded(&requests, &limits);
    let once = injected(&original).pod;
    assert_eq!(whole(&once), &grown);
    assert_eq!(injected(&once).pod, once);

    // Its own limits, where it has some.
    original["metadata"]["annotations"] =
        json!({ "outrigger.dev/sidecar-cpu-limit": "500m", "outrigger.dev/sidecar-memory-limit": "128Mi" });
    let limited = injected(&original).pod;
    assert_eq!(whole(&limited)["limits"], json!({ "cpu": "1500m", "memory": "1152Mi", "hugepages-2Mi": "4Mi" }));
    assert_eq!(injected(&limited).pod, limited);

    // What nobody asked for as a whole is not made up.
    for none in [json!({}), json!({ "requests": {} }), Value::Null] {
        let pod = injected(&pod(&json!({ "spec": { "resources": none } }))).pod;
        assert!(!pod["metadata"]["annotations"]["outrigger.dev/status"].as_str().unwrap().contains("podResources"));
    }
    let cpu = injected(&bounded(&json!({ "cpu": "50m" }), &json!({}))).pod;
    assert_eq!(whole(&cpu), &json!({ "requests": { "cpu": "60m" }, "limits": {} }));
}

#[test]
fn what_a_sidecar_asks_for_now_takes_the_place_of_what_was_added_for_it() {
    let amounts = json!({ "cpu": "50m", "memory": "64Mi" });
    let once = injected(&bounded(&amounts, &amounts)).pod;
    let mut asked = once.clone();
    asked["metadata"]["annotations"]["outrigger.dev/sidecar-memory"] = "64Mi".into();
    assert_eq!(whole(&injected(&asked).pod)["requests"], json!({ "cpu": "60m", "memory": "128Mi" }));

    // Another webhook tunes the sidecar, and the whole.
    let mut tuned = once;
    tuned["spec"]["initContainers"][0]["resources"] =
        json!({ "requests": { "cpu": "30m", "memory": "32Mi" }, "limits": { "cpu": "40m" } });
    tuned["spec"]["resources"]["requests"]["memory"] = "1Gi".into();
    let again = injected(&tuned).pod;
    assert_eq!(whole(&again)["requests"], json!({ "cpu": "80m", "memory": "1Gi" }));
    assert_eq!(whole(&again)["limits"], json!({ "cpu": "90m", "memory": "96Mi" }));
    assert_eq!(injected(&again).pod, again);
}

#[test]
fn a_request_that_the_api_server_wrote_since_has_the_sidecars_share_in_it() {
    let mut pod = injected(&bounded(&json!({}), &json!({ "memory": "256Mi" }))).pod;
    assert_eq!(whole(&pod)["limits"]["memory"], "288Mi");
    pod["spec"]["resources"]["requests"] = json!({ "cpu": "10m", "memory": "32Mi" });
    let again = injected(&pod).pod;
    assert_eq!(whole(&again), whole(&pod));
    assert_eq!(injected(&again).pod, again);
    // A limit it does not write: that is somebody else's, without the sidecar's share.
    pod["spec"]["resources"]["limits"]["cpu"] = "1".into();
    assert_eq!(whole(&injected(&pod).pod)["limits"]["cpu"], "1010m");
}

#[test]
fn a_copy_of_a_pod_has_the_share_of_its_sidecar_already() {
    let amounts = json!({ "cpu": "50m", "memory": "64Mi" });
    let first = injected(&bounded(&amounts, &amounts)).pod;
    assert_eq!(whole(&injected(&copied(&first, &[])).pod), whole(&first));
}

#[test]
fn an_amount_that_cannot_be_added_to_is_refused_by_its_place() {
    let text = refused(&bounded(&json!({ "memory": "1e9" }), &json!({}))).to_string();
    assert!(text.starts_with("resources.requests.memory: \"1e9\" cannot be added to"), "{text}");
}
