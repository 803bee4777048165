//! Gives a pod its sidecar while the API server makes it.

use super::review::{Answer, Request};
use crate::injection::{Namespace, Outcome, Settings, inject};

/// The pod with its sidecar, as a patch.
pub(super) fn answer(request: &Request, namespace: &Namespace, settings: &Settings) -> Answer {
    let kind = &request.kind;
    if (kind.group.as_str(), kind.version.as_str(), kind.kind.as_str()) != ("", "v1", "Pod") {
        let text = format!("pods get sidecars, not {kind}; correct the rules of the MutatingWebhookConfiguration outrigger");
        return Answer::refused("kind", text);
    }
    if request.operation != "CREATE" || request.sub_resource.as_deref().is_some_and(|part| !part.is_empty()) {
        // A pod's containers are what they are once it is there.
        return Answer::allowed("not_created");
    }
    match inject(&request.object, namespace, settings) {
        Ok(Outcome::Injected(injected)) => {
            let patch = injected.patch(&request.object);
            Answer::Allowed { word: "injected", patch: Some(patch), warnings: injected.warnings }
        }
        Ok(Outcome::Left(reason)) => {
            let generated = || request.object.pointer("/metadata/generateName").and_then(serde_json::Value::as_str);
            let pod = if request.name.is_empty() { generated().unwrap_or_default() } else { &request.name };
            tracing::debug!(namespace = namespace.name, pod, reason = reason.as_str(), "a pod stays as it is");
            Answer::allowed("left")
        }
        Err(refusal) => Answer::refused(refusal.word(), refusal.to_string()),
    }
}
