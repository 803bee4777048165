//! One object as the API server sends it: what is known of any kind, and the rest as JSON without what nobody here reads.

use kube::api::DynamicObject;
use serde_json::Value;

use crate::base::names::Named;

/// One object.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    /// The namespace is empty where the kind has none.
    pub(crate) name: Named,
    /// Another object of the same name has another one.
    pub(crate) uid: String,
    /// Grows with each change of an object. None: the server counts in another way.
    pub(crate) version: Option<u64>,
    /// Counts the changes of what is desired.
    pub(crate) generation: Option<i64>,
    pub(crate) body: Value,
}

impl Object {
    /// None: it has no name, which no server sends.
    pub(crate) fn read(mut object: DynamicObject) -> Option<Self> {
        let metadata = &mut object.metadata;
        // Most of an object may be who wrote which field, and the text of what was applied last.
        metadata.managed_fields = None;
        metadata.owner_references = None;
        if let Some(annotations) = &mut metadata.annotations {
            annotations.remove(LAST_APPLIED);
        }
        let name = Named::new(metadata.namespace.clone().unwrap_or_default(), metadata.name.clone()?);
        Some(Self {
            name,
            uid: metadata.uid.clone().unwrap_or_default(),
            version: metadata.resource_version.as_ref().and_then(|version| version.parse().ok()),
            generation: metadata.generation,
            body: serde_json::to_value(object).ok()?,
        })
    }
}

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

#[cfg(test)]
pub(super) mod testing {
    use serde_json::json;

    use super::*;

    /// An object out of YAML, as a server would send it.
    pub(in super::super) fn object(text: &str) -> Object {
        let mut value: Value = serde_saphyr::from_str(text).unwrap();
        let metadata = value["metadata"].as_object_mut().unwrap();
        let uid = format!("uid-of-{}", metadata["name"].as_str().unwrap());
        metadata.entry("uid").or_insert(json!(uid));
        metadata.entry("managedFields").or_insert(json!([{ "manager": "kubectl", "operation": "Update" }]));
        Object::read(serde_json::from_value(value).unwrap()).unwrap()
    }

    #[test]
    fn who_wrote_a_field_is_not_kept() {
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: shop, resourceVersion: '7', annotations: {kubectl.kubernetes.io/last-applied-configuration: '{}', a: b}}\n";
        let object = object(text);
        assert_eq!((object.name.to_string(), object.version), ("shop/a".to_owned(), Some(7)));
        let metadata = &object.body["metadata"];
        assert!(metadata.get("managedFields").is_none() && metadata["annotations"] == json!({ "a": "b" }), "{metadata}");
    }
}
