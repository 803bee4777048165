//! What every document has around its `spec`: `apiVersion`, `kind`, `metadata`. The shapes are Kubernetes' (API conventions,
//! "Metadata"), so that one YAML serves a folder and a cluster.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::de::{Error as _, IgnoredAny};
use serde::ser::SerializeStruct as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::target::Former;
use super::{Kind, ResourceKey};
use crate::base::names::{Named, check_name, check_part};

/// The namespace of a document that names none.
pub(crate) const DEFAULT_NAMESPACE: &str = "default";

/// The namespace of the mesh itself: a policy in it, without a target, holds for every workload.
pub(crate) const MESH_NAMESPACE: &str = "outrigger-system";

/// The body of a document of one kind.
pub(crate) trait Spec {
    /// The kind whose body this is.
    const KIND: Kind;
}

/// One document: its metadata and its `spec`. Serialised, it is canonical: what is at its default is left out.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Object<S> {
    pub(crate) metadata: Metadata,
    pub(crate) spec: S,
    pub(crate) status: Status,
}

/// What the control plane adds to a document on its way to the sidecars. It is not the writer's to say: what stands there in
/// a document of people's is dropped.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub(crate) struct Status {
    /// Of a security policy: what its Services led to, and lead to no longer. The policy goes on covering it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) kept: Vec<Former>,
}

/// A document's `metadata`. Kubernetes' own bookkeeping is read and dropped; a misspelt field is refused.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(from = "WrittenMetadata", rename_all = "camelCase")]
pub(crate) struct Metadata {
    /// The name, unique among the documents of its kind in its namespace.
    pub(crate) name: String,
    /// The namespace; `default` where none is written.
    pub(crate) namespace: String,
    /// What a Service selects on.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) labels: BTreeMap<String, String>,
    /// Notes for people and tools; of a Workload ours say what is asked of its capture.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) annotations: BTreeMap<String, String>,
    /// When the object was made (RFC 3339). Of two routes that match a request alike the older one is taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) creation_timestamp: Option<String>,
}

impl<S> Object<S> {
    /// A document of these parts.
    pub(crate) fn new(name: &Named, labels: BTreeMap<String, String>, spec: S) -> Self {
        let (namespace, name) = (name.namespace.to_string(), name.name.to_string());
        Self { metadata: Metadata { name, namespace, labels, ..Metadata::default() }, spec, status: Status::default() }
    }

    /// Namespace and name.
    pub(crate) fn named(&self) -> Named {
        Named::new(self.metadata.namespace.as_str(), self.metadata.name.as_str())
    }
}

impl<S: Spec> Object<S> {
    /// The document's key. `Mesh` stands in the mesh's own namespace, whatever was written.
    pub(crate) fn key(&self) -> ResourceKey {
        let name = match S::KIND {
            Kind::Mesh => Named::new(MESH_NAMESPACE, self.metadata.name.as_str()),
            Kind::Service
            | Kind::Workload
            | Kind::HttpRoute
            | Kind::GrpcRoute
            | Kind::TlsRoute
            | Kind::TcpRoute
            | Kind::ReferenceGrant
            | Kind::AuthorizationPolicy
            | Kind::RequestAuthentication
            | Kind::PeerAuthentication
            | Kind::TrafficPolicy => self.named(),
        };
        ResourceKey { kind: S::KIND, name }
    }
}

impl<S: Serialize + Spec> Serialize for Object<S> {
    fn serialize<T: Serializer>(&self, serializer: T) -> Result<T::Ok, T::Error> {
        let has_status = !self.status.kept.is_empty();
        let mut object = serializer.serialize_struct("Object", 4 + usize::from(has_status))?;
        object.serialize_field("apiVersion", S::KIND.api_version())?;
        object.serialize_field("kind", S::KIND.as_str())?;
        object.serialize_field("metadata", &self.metadata)?;
        object.serialize_field("spec", &self.spec)?;
        if has_status {
            object.serialize_field("status", &self.status)?;
        }
        object.end()
    }
}

impl<'de, S: Deserialize<'de> + Spec> Deserialize<'de> for Object<S> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = Written::<S>::deserialize(deserializer)?;
        if written.kind != S::KIND.as_str() || !S::KIND.reads(&written.api_version) {
            return Err(D::Error::custom(format!("this is not a {} ({})", S::KIND, S::KIND.api_version())));
        }
        Ok(Self { metadata: written.metadata, spec: written.spec, status: written.status })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Written<S> {
    api_version: String,
    kind: String,
    metadata: Metadata,
    spec: S,
    #[serde(default, deserialize_with = "nullable")]
    status: Status,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WrittenMetadata {
    #[serde(deserialize_with = "name")]
    name: String,
    #[serde(default = "default_namespace", deserialize_with = "namespace")]
    namespace: String,
    #[serde(default, deserialize_with = "nullable")]
    labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "nullable")]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    creation_timestamp: Option<String>,
    #[serde(default, rename = "deletionGracePeriodSeconds")]
    _deletion_grace_period_seconds: Option<IgnoredAny>,
    #[serde(default, rename = "deletionTimestamp")]
    _deletion_timestamp: Option<IgnoredAny>,
    #[serde(default, rename = "finalizers")]
    _finalizers: Option<IgnoredAny>,
    #[serde(default, rename = "generateName")]
    _generate_name: Option<IgnoredAny>,
    #[serde(default, rename = "generation")]
    _generation: Option<IgnoredAny>,
    #[serde(default, rename = "managedFields")]
    _managed_fields: Option<IgnoredAny>,
    #[serde(default, rename = "ownerReferences")]
    _owner_references: Option<IgnoredAny>,
    #[serde(default, rename = "resourceVersion")]
    _resource_version: Option<IgnoredAny>,
    #[serde(default, rename = "selfLink")]
    _self_link: Option<IgnoredAny>,
    #[serde(default, rename = "uid")]
    _uid: Option<IgnoredAny>,
}

impl From<WrittenMetadata> for Metadata {
    fn from(written: WrittenMetadata) -> Self {
        let WrittenMetadata { name, namespace, labels, annotations, creation_timestamp, .. } = written;
        Self { name, namespace, labels, annotations, creation_timestamp }
    }
}

fn default_namespace() -> String {
    DEFAULT_NAMESPACE.to_owned()
}

/// A name that Kubernetes would take.
fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = Cow::<'de, str>::deserialize(deserializer)?;
    check_name(&text).map_err(D::Error::custom)?;
    Ok(text.into_owned())
}

/// A namespace: it holds no dot, so that what is made of namespace and name (a file, a host) is of one pair alone.
fn namespace<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = Cow::<'de, str>::deserialize(deserializer)?;
    check_part(&text).map_err(D::Error::custom)?;
    Ok(text.into_owned())
}

/// A field that stands there without a value counts as not written.
pub(super) fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
