//! What a pod asks for as a whole (`spec.resources`), of which its sidecar has a share.
//!
//! Source: Kubernetes' API (core/v1 PodSpec, KEP 2837). The API server refuses a pod that asks for less than its containers do
//! together, or that has a limit below one of theirs. Where such a pod leaves a request out, the API server writes one: what the
//! containers ask for together.
//!
//! Invariant: what the app has of it is the same with a sidecar as without one. What is added is written down, so that it is added
//! once.

use serde_json::{Map, Value, json};

use super::Refusal;
use super::quantity;

/// What a container with these `resources` takes of its pod's.
pub(super) fn share(resources: &Value) -> Value {
    let of = |field: &str, other: &str| -> Map<String, Value> {
        let amount = |name: &str| [field, other].iter().find_map(|field| resources.get(field)?.get(name)).cloned();
        NAMES.into_iter().filter_map(|name| Some((name.to_owned(), amount(name)?))).collect()
    };
    // A pod's limit is never below its request.
    json!({ REQUESTS: of(REQUESTS, LIMITS), LIMITS: of(LIMITS, REQUESTS) })
}

/// Adds the sidecar's `share` to what the pod's `body` asks for as a whole, in the place of what an earlier injection `added`.
/// Returns what to write down; none where the pod asks for nothing as a whole.
///
/// # Errors
/// An amount cannot be read.
pub(super) fn add(body: &mut Map<String, Value>, share: &Value, added: Option<&Value>) -> Result<Option<Value>, Refusal> {
    let Some(whole) = body.get_mut("resources").filter(|whole| is_set(whole)) else { return Ok(None) };
    let mut written = Map::new();
    for field in [REQUESTS, LIMITS] {
        let mut of_field = Map::new();
        for name in NAMES {
            let amount = |of: &Value| of.get(field)?.get(name).cloned();
            let (Some(own), Some(now)) = (amount(share), whole.get_mut(field).and_then(|amounts| amounts.get_mut(name))) else {
                continue;
            };
            let earlier = match added {
                // The API server wrote it since, of what all containers ask for, the sidecar too.
                Some(added) if field == REQUESTS => Some(amount(added).unwrap_or_else(|| own.clone())),
                Some(added) => amount(added),
                None => None,
            };
            if earlier.as_ref() != Some(&own) {
                let texts = [Some(&*now), earlier.as_ref(), Some(&own)].map(|amount| amount.and_then(Value::as_str));
                let [Some(text), earlier, Some(more)] = texts else { return Err(unread(field, name, now)) };
                let sum = quantity::instead(text, earlier.unwrap_or("0"), more).ok_or_else(|| unread(field, name, now))?;
                *now = sum.into();
            }
            of_field.insert(name.to_owned(), own);
        }
        written.insert(field.to_owned(), of_field.into());
    }
    Ok(Some(written.into()))
}

fn is_set(whole: &Value) -> bool {
    [REQUESTS, LIMITS].iter().any(|field| whole.get(field).and_then(Value::as_object).is_some_and(|amounts| !amounts.is_empty()))
}

fn unread(field: &'static str, name: &'static str, value: &Value) -> Refusal {
    Refusal::PodResources { field, name, value: value.as_str().map_or_else(|| value.to_string(), str::to_owned) }
}

const REQUESTS: &str = "requests";
const LIMITS: &str = "limits";
/// What a sidecar asks for.
const NAMES: [&str; 2] = ["cpu", "memory"];
/// Where in the status it is written down what was added.
pub(super) const ADDED: &str = "podResources";
