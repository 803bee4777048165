//! Pods in, pods out.

mod apps;
mod refusals;
mod reinjection;
mod shape;

use serde_json::{Value, json};

use super::{Injected, Namespace, Outcome, Refusal, Settings, inject};
use crate::model::marks::{ENABLED, INJECT};

/// A namespace that wants sidecars.
fn shop() -> Namespace {
    Namespace { name: "shop".to_owned(), labels: [(INJECT.to_owned(), ENABLED.to_owned())].into(), ..Namespace::default() }
}

/// A pod of one container, with this over it.
fn pod(over: &Value) -> Value {
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": "web-1", "namespace": "shop" },
        "spec": { "containers": [{ "name": "web", "image": "web:1", "ports": [{ "name": "http", "containerPort": 8080 }] }] },
    });
    json_patch::merge(&mut pod, over);
    pod
}

fn annotated(name: &str, text: &str) -> Value {
    pod(&json!({ "metadata": { "annotations": { name: text } } }))
}

fn injected(pod: &Value) -> Injected {
    match inject(pod, &shop(), &Settings::default()) {
        Ok(Outcome::Injected(injected)) => injected,
        other => panic!("{other:?}"),
    }
}

fn refused(pod: &Value) -> Refusal {
    inject(pod, &shop(), &Settings::default()).expect_err("a refusal")
}

/// The container that is the sidecar of a pod.
fn sidecar(pod: &Value) -> &Value {
    let first = |list: &str| pod.pointer(&format!("/spec/{list}/0")).filter(|container| container["name"] == "outrigger");
    first("initContainers").or_else(|| first("containers")).expect("a sidecar")
}

/// A variable of the sidecar.
fn variable<'a>(pod: &'a Value, name: &str) -> Option<&'a str> {
    let list = sidecar(pod)["env"].as_array().unwrap();
    list.iter().find(|variable| variable["name"] == name).and_then(|variable| variable["value"].as_str())
}

/// What the sidecar was told of the app.
fn doors(pod: &Value) -> Value {
    serde_json::from_str(variable(pod, "OUTRIGGER_PROBES").unwrap()).unwrap()
}
