//! Looks at what is about to be stored: documents of ours are compiled as the sidecars will compile them, routes too, and pods
//! that bear marks of the mesh must have them from the mesh.
//!
//! A document of ours that would not come into force is refused. A route is not: Gateway API has conditions for what is wrong
//! with one, and it may be for somebody else's Gateway as well. Its problems are warnings.

use super::place;
use super::review::{Answer, Request};
use crate::base::problems::Severity;
use crate::control::source::documents::documents;
use crate::control::world::Form;
use crate::injection::refuse_forged;
use crate::model::{Kind, Resources};
use crate::snapshot::compile;

/// What is to be said of it, beside the resources that are there.
pub(super) fn answer(request: &Request, resources: impl FnOnce() -> Resources) -> Answer {
    let kind = &request.kind;
    if request.operation == "DELETE" || request.sub_resource.as_deref().is_some_and(|part| !part.is_empty()) {
        return Answer::allowed("not_written");
    }
    if (kind.group.as_str(), kind.kind.as_str()) == ("", "Pod") {
        return match refuse_forged(&request.object) {
            Ok(()) => Answer::allowed("allowed"),
            Err(refusal) => Answer::refused(refusal.word(), refusal.to_string()),
        };
    }
    if !Kind::ALL.into_iter().any(|known| known.as_str() == kind.kind && group(known) == kind.group) {
        let text =
            format!("{kind} is nothing that is checked here; correct the rules of the ValidatingWebhookConfiguration outrigger");
        return if kind.group == GATEWAY { Answer::allowed("not_read") } else { Answer::refused("kind", text) };
    }
    if kind.group == GATEWAY && !is_ours(request) {
        return Answer::allowed("not_ours");
    }
    compiled(request, resources())
}

/// The API group of a kind, as the API server names it.
fn group(kind: Kind) -> &'static str {
    kind.api_version().split_once('/').map_or("", |(group, _version)| group)
}

fn compiled(request: &Request, mut resources: Resources) -> Answer {
    let mut object = request.object.clone();
    if let Some(fields) = object.as_object_mut() {
        // What is said of a document is no part of what it says.
        fields.remove("status");
    }
    let no_files = |_name: &str| Err("documents of a cluster name no files; write jwks".to_owned());
    let mut refusals = Vec::new();
    let mut warnings = Vec::new();
    for found in documents(place(request), &object.to_string(), &no_files) {
        for told in found.told {
            let problem = told.problem;
            let at = if problem.at.as_str().is_empty() { String::new() } else { format!("{}: ", problem.at) };
            let line = format!("{at}{}; {}", problem.text, problem.remedy);
            let refuses = problem.severity == Severity::Refuses && request.kind.group != GATEWAY;
            if refuses { &mut refusals } else { &mut warnings }.push(line);
        }
        let (Some(key), Some(Form::Read(resource)), true) = (found.key, found.form, found.good) else { continue };
        let name = key.to_string();
        resources.refused.remove(&key);
        resources.by_key.insert(key, resource);
        // What it leads to may still be on its way: in a cluster documents come in any order.
        let among = compile::references(&resources).into_vec();
        let own = among.into_iter().filter(|problem| problem.resource == name);
        warnings.extend(own.map(|problem| format!("{}: {}; {}", problem.at, problem.text, problem.remedy)));
    }
    if refusals.is_empty() {
        warnings.truncate(WARNINGS_MAX);
        Answer::Allowed { word: "allowed", patch: None, warnings }
    } else {
        Answer::refused("document", refusals.join("\n"))
    }
}

/// A route without a Service among its parents is for a Gateway of somebody else's.
fn is_ours(request: &Request) -> bool {
    let parents = request.object.pointer("/spec/parentRefs").and_then(serde_json::Value::as_array);
    let is_service = |parent: &serde_json::Value| parent.get("kind").is_some_and(|kind| kind == "Service");
    parents.is_none_or(|parents| parents.is_empty() || parents.iter().any(is_service))
}

const GATEWAY: &str = "gateway.networking.k8s.io";
/// The API server passes on 4 KiB of them.
const WARNINGS_MAX: usize = 16;
