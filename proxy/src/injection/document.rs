//! Pods inside the documents that people write: the template of a Deployment is a pod that is made later.

use serde_json::Value;

use super::{Namespace, Outcome, Reason, Refusal, Settings, inject};

/// What became of one pod of a document.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Told {
    /// Whose pod it is: `Deployment shop/web`.
    pub(crate) what: String,
    /// What its owner should know, or why it has no sidecar.
    pub(crate) result: Result<Result<Vec<String>, Reason>, Refusal>,
}

/// Gives every pod in `document` its sidecar. `namespace` tells of the namespace of a name. Nothing is told of a document
/// without pods, which stays as it is.
pub(crate) fn inject_document(document: &mut Value, namespace: &dyn Fn(&str) -> Namespace, settings: &Settings) -> Vec<Told> {
    if is(document, "v1", "List") {
        let items = document.get_mut("items").and_then(Value::as_array_mut).into_iter().flatten();
        return items.flat_map(|item| inject_document(item, namespace, settings)).collect();
    }
    let Some(path) = path(document) else { return Vec::new() };
    let text = |pointer: &str| document.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let (kind, own, name) = (text("/kind"), text("/metadata/namespace"), text("/metadata/name"));
    let what = if own.is_empty() { format!("{kind} {name}") } else { format!("{kind} {own}/{name}") };
    let namespace = namespace(own);
    let Some(pod) = document.pointer_mut(path) else {
        return vec![Told { what, result: Err(Refusal::Shape(format!("it has no {}", path.replace('/', ".")))) }];
    };
    let result = inject(pod, &namespace, settings).map(|outcome| match outcome {
        Outcome::Injected(injected) => {
            *pod = injected.pod;
            Ok(injected.warnings)
        }
        Outcome::Left(reason) => Err(reason),
    });
    vec![Told { what, result }]
}

/// Where the pod stands in a document of this kind; none: it has none.
fn path(document: &Value) -> Option<&'static str> {
    const KINDS: [(&str, &str, &str); 8] = [
        ("v1", "Pod", ""),
        ("v1", "ReplicationController", "/spec/template"),
        ("apps/v1", "DaemonSet", "/spec/template"),
        ("apps/v1", "Deployment", "/spec/template"),
        ("apps/v1", "ReplicaSet", "/spec/template"),
        ("apps/v1", "StatefulSet", "/spec/template"),
        ("batch/v1", "Job", "/spec/template"),
        ("batch/v1", "CronJob", "/spec/jobTemplate/spec/template"),
    ];
    KINDS.into_iter().find(|(version, kind, _)| is(document, version, kind)).map(|(.., path)| path)
}

fn is(document: &Value, version: &str, kind: &str) -> bool {
    let text = |field: &str| document.get(field).and_then(Value::as_str);
    text("apiVersion") == Some(version) && text("kind") == Some(kind)
}
