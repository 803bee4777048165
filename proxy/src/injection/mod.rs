//! How a pod of Kubernetes gets its sidecar: a pod in, the pod with its sidecar out, or the reason why not. No IO, no clock:
//! the webhook, `outrigger inject` and their tests call the same [`inject`].
//!
//! Sources: Kubernetes' API (core/v1 Pod; native sidecars, KEP 753; Pod Security Standards, restricted), the kubelet's prober
//! and Prometheus' pod annotations.
//!
//! Invariant: injecting what was injected changes nothing, and what another webhook changed since is covered as well. A pod is
//! worked on as JSON, so that fields stay that this version does not know; a typed copy is only read.
//!
//! `wish` is what the pod and its namespace ask for, `image` tells which texts are references of images, `marks` tells an earlier
//! injection from a forgery, `app` leads the kubelet and Prometheus to the sidecar, `sidecar` is the container, `pod_resources`
//! its share of the pod's, `document` finds pods in what people write.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Map, Value};

mod app;
pub(crate) mod document;
mod forged;
mod image;
mod pod_resources;
mod quantity;
mod refusal;
mod sidecar;
#[cfg(test)]
mod tests;
mod wish;
mod workload_api;

pub(crate) use self::forged::refuse_forged;
pub(crate) use self::image::is_image;
pub(crate) use self::refusal::Refusal;
use self::wish::Wishes;
pub(crate) use self::wish::{CPU_REMEDY, MEMORY_REMEDY, MIRROR, is_cpu, is_memory};
pub(crate) use self::workload_api::{WorkloadApi, WorkloadApiError};
use crate::model::marks::{self, Mode};

/// What whoever installed the mesh says of every sidecar; annotations say otherwise for one pod.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Settings {
    /// The image of the sidecar.
    pub(crate) image: String,
    /// Where sidecars find the control plane's stream.
    pub(crate) control: String,
    pub(crate) trust_domain: String,
    /// Where sidecars have their identities from; none: from their node's agent.
    pub(crate) workload_api: Option<WorkloadApi>,
    pub(crate) mode: Mode,
    pub(crate) log_level: String,
    /// What a sidecar asks of its node.
    pub(crate) cpu: String,
    pub(crate) memory: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            image: format!("outrigger:{VERSION}"),
            control: format!("control.{}.svc:14010", marks::SYSTEM),
            trust_domain: "cluster.local".to_owned(),
            workload_api: None,
            mode: Mode::Native,
            log_level: "info".to_owned(),
            cpu: "10m".to_owned(),
            memory: "32Mi".to_owned(),
        }
    }
}

/// What a pod's namespace says.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Namespace {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    /// Those of the mesh hold for its pods that say nothing else.
    pub(crate) annotations: BTreeMap<String, String>,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    Injected(Injected),
    /// The pod stays as it is.
    Left(Reason),
}

/// A pod with its sidecar.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Injected {
    pub(crate) pod: Value,
    /// What its owner should know, one sentence each.
    pub(crate) warnings: Vec<String>,
}

/// Why a pod stays without a sidecar, which is as it should be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Reason {
    /// Neither it nor its namespace asks for one.
    NotAsked,
    /// It says so itself.
    Disabled,
    /// Its namespace is the cluster's or the mesh's own.
    SystemNamespace,
    /// It runs from a file of the kubelet; the API server shows it and changes nothing.
    Mirror,
}

impl Reason {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::NotAsked => "neither the pod nor its namespace is labelled outrigger.dev/inject: enabled",
            Self::Disabled => "the pod is labelled outrigger.dev/inject: disabled",
            Self::SystemNamespace => "no pod of this namespace gets a sidecar: it is the cluster's or the mesh's own",
            Self::Mirror => "the pod is a file of its kubelet, which nothing can be put into",
        }
    }
}

/// Does the pod ask for a sidecar? One that asks in words that say nothing does: the injection would have refused it.
pub(crate) fn is_asked(pod: &ObjectMeta, namespace: &Namespace) -> bool {
    !wish::SYSTEM_NAMESPACES.contains(&namespace.name.as_str()) && !matches!(wish::left(pod, namespace), Ok(Some(_)))
}

/// Why nobody can tell whether the pod is to have a sidecar: a label of its own, or of its namespace, says nothing.
pub(crate) fn unclear(pod: &ObjectMeta, namespace: &Namespace) -> Option<Refusal> {
    wish::left(pod, namespace).err()
}

/// Gives the pod its sidecar, if it is to have one. `pod` is a Pod, or the template of one.
///
/// # Errors
/// The pod asks for one and cannot have it, or shows marks of the mesh that it did not get from it.
pub(crate) fn inject(pod: &Value, namespace: &Namespace, settings: &Settings) -> Result<Outcome, Refusal> {
    let read: Pod = serde_json::from_value(pod.clone()).map_err(|error| Refusal::Shape(error.to_string()))?;
    let Some(spec) = &read.spec else { return Err(Refusal::Shape("it has no spec".to_owned())) };
    if let Some(reason) = wish::left(&read.metadata, namespace)? {
        return Ok(Outcome::Left(reason));
    }
    refuse_unfit(spec, settings)?;
    let earlier = forged::earlier(&read)?;
    let inherited = inherited(&read, namespace);
    let annotations: BTreeMap<_, _> = read.metadata.annotations.iter().flatten().chain(&inherited).collect();
    let wishes = Wishes::of(&annotations.into_iter().map(|(name, text)| (name.clone(), text.clone())).collect(), settings)?;

    if wishes.mode == Mode::Classic {
        app::refuse_probed_before(spec)?;
    }

    let mut pod = object(pod);
    let mut metadata = take_object(&mut pod, "metadata");
    let mut body = take_object(&mut pod, "spec");
    let mut labels = take_object(&mut metadata, "labels");
    let mut notes = take_object(&mut metadata, "annotations");
    for (name, text) in inherited {
        notes.insert(name, text.into());
    }

    let asked = app::lead_to_sidecar(spec, &mut body, &mut notes, earlier.as_ref().map(|earlier| &earlier.doors))?;
    let sidecar = sidecar::Sidecar { wishes: &wishes, settings, doors: &asked.doors };
    let resources = sidecar.place(&mut body, earlier.as_ref());
    let added = earlier.as_ref().and_then(|earlier| earlier.status.get(pod_resources::ADDED));
    let added = pod_resources::add(&mut body, &pod_resources::share(&resources), added)?;
    labels.insert(marks::SIDECAR.to_owned(), marks::INJECTED.into());
    notes.insert(marks::STATUS.to_owned(), sidecar.status(added).to_string().into());
    if wishes.mode == Mode::Classic
        && let Some(app) = spec.containers.iter().find(|container| container.name != marks::CONTAINER)
    {
        // `kubectl exec` and `logs` take the first container where nothing is said, which is the sidecar then.
        notes.entry(DEFAULT_CONTAINER).or_insert_with(|| app.name.clone().into());
    }

    metadata.insert("labels".to_owned(), labels.into());
    metadata.insert("annotations".to_owned(), notes.into());
    pod.insert("metadata".to_owned(), metadata.into());
    pod.insert("spec".to_owned(), body.into());
    Ok(Outcome::Injected(Injected { pod: pod.into(), warnings: asked.warnings }))
}

impl Injected {
    /// What makes it of `original`.
    pub(crate) fn patch(&self, original: &Value) -> json_patch::Patch {
        json_patch::diff(original, &self.pod)
    }
}

/// A pod that no sidecar can serve.
fn refuse_unfit(spec: &PodSpec, settings: &Settings) -> Result<(), Refusal> {
    if spec.host_network == Some(true) {
        return Err(Refusal::HostNetwork);
    }
    if let Some(at) = on_windows(spec) {
        return Err(Refusal::Windows { at });
    }
    refuse_deaf(spec, &settings.control)
}

/// By what field the pod runs on Windows: what it says of itself, or the nodes that it chooses.
fn on_windows(spec: &PodSpec) -> Option<&'static str> {
    if spec.os.as_ref().is_some_and(|os| os.name == WINDOWS) {
        return Some("os.name");
    }
    let chosen = spec.node_selector.as_ref()?;
    let is_chosen = |(label, _field): &(&str, &str)| chosen.get(*label).is_some_and(|system| system == WINDOWS);
    NODE_SYSTEM.into_iter().find(is_chosen).map(|(_label, field)| field)
}

/// A pod whose resolver does not know where the control plane is: its sidecar would never have a configuration, and the pod never
/// start. A name `X.NAMESPACE.svc` is one of the cluster's DNS, which a search domain makes whole.
fn refuse_deaf(spec: &PodSpec, control: &str) -> Result<(), Refusal> {
    let (name, _port) = control.rsplit_once(':').unwrap_or((control, ""));
    let is_relative = name.ends_with(".svc");
    let searches =
        spec.dns_config.as_ref().and_then(|config| config.searches.as_ref()).is_some_and(|searches| !searches.is_empty());
    let policy = match spec.dns_policy.as_deref() {
        Some("Default") if is_relative || name.contains(".svc.") => "Default",
        Some("None") if is_relative && !searches => "None",
        _knows_it => return Ok(()),
    };
    Err(Refusal::DnsPolicy { policy, name: name.to_owned() })
}

/// Annotations of the mesh that the namespace has and the pod has not. They are written at the pod: whoever reads them later
/// has no need to know the namespace, and what held when the pod was made can be seen.
fn inherited(pod: &Pod, namespace: &Namespace) -> BTreeMap<String, String> {
    let own = pod.metadata.annotations.as_ref();
    let of_namespace = marks::ours(&namespace.annotations).filter(|(name, _text)| name.as_str() != marks::STATUS);
    let missing = of_namespace.filter(|(name, _text)| own.is_none_or(|own| !own.contains_key(*name)));
    missing.map(|(name, text)| (name.clone(), text.clone())).collect()
}

fn object(value: &Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}

/// Takes a field out to be worked on; empty if it is not there, or null.
fn take_object(from: &mut Map<String, Value>, field: &str) -> Map<String, Value> {
    match from.remove(field) {
        Some(Value::Object(object)) => object,
        _absent => Map::new(),
    }
}

/// Takes a field out to be worked on; empty if it is not there, or null.
fn take_list(from: &mut Map<String, Value>, field: &str) -> Vec<Value> {
    match from.remove(field) {
        Some(Value::Array(list)) => list,
        _absent => Vec::new(),
    }
}

/// Puts a list back; an empty one is left out.
fn put_list(to: &mut Map<String, Value>, field: &str, list: Vec<Value>) {
    if !list.is_empty() {
        to.insert(field.to_owned(), list.into());
    }
}

fn name_of(value: &Value) -> Option<&str> {
    value.get("name").and_then(Value::as_str)
}

/// Which injection it was.
const VERSION: &str = env!("CARGO_PKG_VERSION");
const WINDOWS: &str = "windows";
/// The labels by which a node says its system, the kubelet's own and the one before it; and where a pod chooses by them.
const NODE_SYSTEM: [(&str, &str); 2] =
    [("kubernetes.io/os", "nodeSelector[kubernetes.io/os]"), ("beta.kubernetes.io/os", "nodeSelector[beta.kubernetes.io/os]")];
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";
