//! A document as a cluster holds it: the same that a folder would, read by the same model.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use super::cluster::place;
use super::object::Object;
use super::written::{self, is_service};
use crate::control::source::documents::{Found, of_cluster};
use crate::control::world::Form;
use crate::model::service::NO_ADDRESS;
use crate::model::{Kind, ResourceKey};

/// Reads it. None: it is another one's, and means nothing here.
pub(super) fn read(kind: Kind, key: &ResourceKey, object: &Object) -> Option<Found> {
    if !is_ours(&object.body) {
        return None;
    }
    let mut body = object.body.clone();
    if let Some(fields) = body.as_object_mut() {
        // What is said of it is no part of what it says, and may be large.
        fields.remove("status");
    }
    if kind == Kind::Service {
        lead_nowhere(&mut body);
    }
    let path: PathBuf = place(kind.as_str(), &key.name);
    let mut found = of_cluster(&path, kind, key, &body.to_string());
    let kept = written::kept(object);
    if kind.is_security()
        && !kept.is_empty()
        && let Some(Form::Read(policy)) = &mut found.form
    {
        Arc::make_mut(policy).keep(kept);
    }
    Some(found)
}

/// A route without a Service among its parents is another controller's, whatever it says.
fn is_ours(body: &Value) -> bool {
    let Some(parents) = body.pointer("/spec/parentRefs").and_then(Value::as_array) else { return true };
    parents.is_empty() || parents.iter().any(is_service)
}

/// A Service that stands for a name elsewhere (`ExternalName`) has no address, and what it selects is not asked for.
fn lead_nowhere(body: &mut Value) {
    let Some(spec) = body.get_mut("spec").and_then(Value::as_object_mut) else { return };
    if spec.get("type").is_some_and(|of| of == "ExternalName") {
        spec.remove("selector");
        spec.remove("clusterIPs");
        spec.insert("clusterIP".to_owned(), NO_ADDRESS.into());
    }
}
