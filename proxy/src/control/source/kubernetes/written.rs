//! What an object of a cluster carries that its status is made of, and the status that stands there already.

use serde_json::Value;

use super::object::Object;
use crate::model::Kind;
use crate::model::target::Former;

/// One object whose status is ours to write, or partly.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Written {
    pub(crate) api_version: String,
    /// A write that names another version is refused.
    pub(crate) version: String,
    /// Which form of the object a condition speaks of.
    pub(crate) generation: Option<i64>,
    /// Of a route: its parents as they are written, each Service with its place among all.
    pub(crate) parents: Option<Vec<(usize, Value)>>,
    /// Of a route: how many rules it has.
    pub(crate) rules: usize,
    /// `status.parents` of a route, `status.conditions` of another kind.
    pub(crate) status: Vec<Value>,
    /// Of a security policy: what it covers beyond where its Services lead, as it stands there.
    pub(crate) kept: Vec<Value>,
}

impl Written {
    /// None: nobody says anything of the kind here, or the route is another controller's alone.
    pub(super) fn read(kind: Kind, object: &Object) -> Option<Self> {
        let list = |path: &str| object.body.pointer(path).and_then(Value::as_array).cloned();
        let is_route = kind.as_str().ends_with("Route");
        if !is_route && !kind.api_version().starts_with("outrigger.dev/") {
            return None;
        }
        let status = list(if is_route { "/status/parents" } else { "/status/conditions" }).unwrap_or_default();
        let parents = is_route.then(|| {
            let all = list("/spec/parentRefs").unwrap_or_default().into_iter().enumerate();
            all.filter(|(_, parent)| is_service(parent)).collect::<Vec<_>>()
        });
        let is_ours = parents.as_ref().is_none_or(|parents| !parents.is_empty()) || status.iter().any(is_of_ours);
        let text = |path: &str| object.body.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (api_version, version) = (text("/apiVersion"), text("/metadata/resourceVersion"));
        let kept = list("/status/kept").unwrap_or_default();
        let rules = list("/spec/rules").map_or(0, |rules| rules.len());
        is_ours.then_some(Self { api_version, version, generation: object.generation, parents, rules, status, kept })
    }
}

/// What a control plane wrote down that the policy goes on covering, in this very form: one that was written anew since covers
/// what it says.
pub(super) fn kept(object: &Object) -> Vec<Former> {
    let conditions = object.body.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
    let observed = conditions.filter_map(|condition| condition.get("observedGeneration")?.as_i64()).max();
    if observed.is_none() || observed != object.generation {
        return Vec::new();
    }
    kept_by_what_stood(object)
}

/// The same, in whatever form the policy was then.
pub(super) fn kept_by_what_stood(object: &Object) -> Vec<Former> {
    let kept = object.body.pointer("/status/kept").cloned().unwrap_or_default();
    serde_json::from_value(kept).unwrap_or_default()
}

/// Is this parent of a route a Service? The API server writes the group where people do not.
pub(super) fn is_service(parent: &Value) -> bool {
    let group = parent.get("group").and_then(Value::as_str);
    parent.get("kind").is_some_and(|kind| kind == "Service") && matches!(group, None | Some("" | "core"))
}

/// Did a control plane of ours write this entry of a route's status?
pub(crate) fn is_of_ours(entry: &Value) -> bool {
    entry.get("controllerName").is_some_and(|name| name == CONTROLLER)
}

/// As which the mesh is known to routes.
pub(crate) const CONTROLLER: &str = "outrigger.dev/mesh";
