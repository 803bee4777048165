//! What an installation is made of: the manifest that the Helm chart renders with its own values, and the few settings by
//! which it may differ. Pure.

use std::path::PathBuf;

use clap::Args;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::identity::spiffe::TrustDomain;
use crate::injection::{WorkloadApi, WorkloadApiError, is_image};
use crate::telemetry::log::is_filter;

/// Where the system lives.
pub(in crate::cli) const NAMESPACE: &str = "outrigger-system";
/// Where the settings of an installation are kept: on its namespace.
pub(super) const SETTINGS: &str = "outrigger.dev/settings";

/// How an installation differs from the usual one. What is not said stays as it is.
#[derive(Args, Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Settings {
    /// The image of control plane, node agent and sidecars
    #[arg(long, value_name = "REFERENCE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) image: Option<String>,
    /// The trust domain of all identities
    #[arg(long, value_name = "TD")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) trust_domain: Option<String>,
    /// Where pods have their identities from, in the place of the mesh's own authority: SPIRE's CSI driver and the socket in
    /// its volumes, as csi.spiffe.io/spire-agent.sock; empty: from the mesh's own, also where that was set otherwise before
    #[arg(long, value_name = "DRIVER[/SOCKET]")]
    #[serde(skip_serializing_if = "is_unset")]
    pub(super) workload_api: Option<String>,
    /// How many replicas of the control plane run
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) replicas: Option<u32>,
    /// Where the kubelets keep pods and plugins
    #[arg(long, env = "OUTRIGGER_KUBELET_DIR", value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) kubelet_dir: Option<PathBuf>,
    /// Where node agents keep what must outlive them
    #[arg(long, env = "OUTRIGGER_NODE_STATE_DIR", value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) node_state_dir: Option<PathBuf>,
    /// What control plane and node agents log: a level, or a list as `info,outrigger::node=debug`
    #[arg(long = "system-log-level", value_name = "FILTER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) log_level: Option<String>,
}

impl Settings {
    /// These, and of `former` what these do not say.
    pub(super) fn over(self, former: Self) -> Self {
        Self {
            image: self.image.or(former.image),
            trust_domain: self.trust_domain.or(former.trust_domain),
            // An empty one takes back what was set.
            workload_api: self.workload_api.or(former.workload_api).filter(|api| !api.is_empty()),
            replicas: self.replicas.or(former.replicas),
            kubelet_dir: self.kubelet_dir.or(former.kubelet_dir),
            node_state_dir: self.node_state_dir.or(former.node_state_dir),
            log_level: self.log_level.or(former.log_level),
        }
    }

    /// Where pods have their identities from, if not from the mesh's own authority.
    fn workload_api(&self) -> Option<Result<WorkloadApi, WorkloadApiError>> {
        self.workload_api.as_deref().filter(|text| !text.is_empty()).map(str::parse)
    }

    /// What is wrong with them.
    pub(super) fn problem(&self) -> Option<String> {
        if let Some(Err(error)) = self.trust_domain.as_ref().map(|text| text.parse::<TrustDomain>()) {
            return Some(format!("--trust-domain: {error}"));
        }
        if let Some(Err(error)) = self.workload_api() {
            return Some(format!("--workload-api: {error}"));
        }
        if let Some(image) = self.image.as_deref().filter(|image| !is_image(image)) {
            return Some(format!("--image: {image:?} is no image; write one as registry.example/outrigger:1.0"));
        }
        if let Some(filter) = self.log_level.as_deref().filter(|filter| !is_filter(filter)) {
            return Some(format!(
                "--system-log-level: {filter:?} names no level; write one as info, or info,outrigger::node=debug"
            ));
        }
        let folders = [("--kubelet-dir", &self.kubelet_dir), ("--node-state-dir", &self.node_state_dir)];
        folders.into_iter().find_map(|(flag, folder)| {
            let folder = folder.as_ref()?;
            let is_plain =
                folder.is_absolute() && folder.to_str().is_some_and(|text| !text.ends_with('/') && !text.contains(':'));
            (!is_plain).then(|| format!("{flag}: {} is no absolute path without a slash at its end", folder.display()))
        })
    }
}

/// Is it not set, or set to nothing?
#[expect(clippy::ref_option, reason = "the shape that serde calls")]
fn is_unset(text: &Option<String>) -> bool {
    text.as_deref().is_none_or(str::is_empty)
}

/// The objects in the order in which they are applied.
///
/// # Errors
/// Ours: the text in this binary is not what it should be.
pub(super) fn objects(settings: &Settings) -> Result<Vec<Value>, serde_saphyr::Error> {
    let mut objects = Vec::new();
    for document in KINDS.split("\n---\n").chain(MANIFEST.split("\n---\n")) {
        let object: Value = serde_saphyr::from_str(document)?;
        if object.is_object() {
            objects.push(set(object, settings));
        }
    }
    // What others live in or are defined by comes first; the webhooks last, so that nobody is sent to what does not run yet.
    objects.sort_by_key(|object| rank(kind(object)));
    Ok(objects)
}

/// `KIND/NAME` as people write it.
pub(super) fn name(object: &Value) -> String {
    let name = object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
    format!("{}/{name}", kind(object).to_lowercase())
}

pub(super) fn kind(object: &Value) -> &str {
    object.get("kind").and_then(Value::as_str).unwrap_or_default()
}

fn rank(kind: &str) -> usize {
    match kind {
        "Namespace" => 0,
        "CustomResourceDefinition" => 1,
        "Deployment" | "DaemonSet" => 3,
        "MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration" => 4,
        _others => 2,
    }
}

fn set(mut object: Value, settings: &Settings) -> Value {
    if kind(&object) == "Namespace" {
        if let (Some(metadata), Ok(text)) = (object.get_mut("metadata"), serde_json::to_string(settings)) {
            put(metadata, "annotations", json!({ SETTINGS: text }));
        }
        return object;
    }
    if let (Some(replicas), Some(spec)) = (settings.replicas, object.get_mut("spec"))
        && spec.get("replicas").is_some()
    {
        put(spec, "replicas", json!(replicas));
    }
    if let Some(containers) = object.pointer_mut("/spec/template/spec/containers").and_then(Value::as_array_mut) {
        for container in containers {
            if let Some(image) = &settings.image {
                put(container, "image", json!(image));
            }
            let variables = [
                ("OUTRIGGER_SIDECAR_IMAGE", &settings.image),
                ("OUTRIGGER_TRUST_DOMAIN", &settings.trust_domain),
                ("OUTRIGGER_LOG_LEVEL", &settings.log_level),
            ];
            for (name, value) in variables {
                let known = container.get_mut("env").and_then(Value::as_array_mut).into_iter().flatten();
                if let (Some(variable), Some(value)) = (known.into_iter().find(|variable| variable["name"] == name), value) {
                    put(variable, "value", json!(value));
                }
            }
        }
    }
    if let Some(Ok(api)) = settings.workload_api() {
        take_identities_from(&mut object, &api);
    }
    if let Some(folder) = settings.kubelet_dir.as_ref().and_then(|folder| folder.to_str()) {
        move_folder(&mut object, KUBELET, folder);
    }
    if let Some(folder) = settings.node_state_dir.as_ref().and_then(|folder| folder.to_str()) {
        let volumes = object.pointer_mut("/spec/template/spec/volumes").and_then(Value::as_array_mut).into_iter().flatten();
        for path in volumes.filter_map(|volume| volume.pointer_mut("/hostPath/path")).filter(|path| **path == STATE) {
            *path = json!(folder);
        }
    }
    object
}

/// The control plane has the driver's volume, and tells the injection; the agents of nodes are told that they give nobody an
/// identity.
fn take_identities_from(object: &mut Value, api: &WorkloadApi) {
    let (variable, volumes, mounts) = match kind(object) {
        "Deployment" => (("OUTRIGGER_SIDECAR_WORKLOAD_API", api.to_string()), vec![api.volume()], vec![WorkloadApi::mount()]),
        "DaemonSet" => (("OUTRIGGER_FOREIGN_IDENTITIES", "true".to_owned()), Vec::new(), Vec::new()),
        _others => return,
    };
    let mut add = |list: &str, items: Vec<Value>| {
        let list = object.pointer_mut("/spec/template/spec").and_then(|spec| spec.pointer_mut(list));
        list.and_then(Value::as_array_mut).into_iter().for_each(|list| list.extend(items.iter().cloned()));
    };
    add("/containers/0/env", vec![json!({ "name": variable.0, "value": variable.1 })]);
    add("/containers/0/volumeMounts", mounts);
    add("/volumes", volumes);
}

/// Writes every path at or below `from` as one at or below `to`.
fn move_folder(value: &mut Value, from: &str, to: &str) {
    match value {
        Value::String(text) => {
            if let Some(rest) = text.strip_prefix(from).filter(|rest| rest.is_empty() || rest.starts_with('/')) {
                *text = format!("{to}{rest}");
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| move_folder(value, from, to)),
        Value::Object(fields) => fields.values_mut().for_each(|value| move_folder(value, from, to)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn put(value: &mut Value, field: &str, to: Value) {
    if let Some(fields) = value.as_object_mut() {
        fields.insert(field.to_owned(), to);
    }
}

/// The definitions of our kinds.
const KINDS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/crds/outrigger.yaml"));
/// The system, rendered from `deploy/chart`, which a test compares.
const MANIFEST: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/manifests/outrigger.yaml"));
/// The kubelet's usual folder, as the manifest has it.
const KUBELET: &str = "/var/lib/kubelet";
/// The agents' usual one.
const STATE: &str = "/var/lib/outrigger";

#[cfg(test)]
mod tests {
    use super::*;

    fn of(settings: &Settings) -> Vec<Value> {
        objects(settings).unwrap()
    }

    fn find(objects: &[Value], name_of: &str) -> Value {
        objects.iter().find(|object| name(object) == name_of).unwrap().clone()
    }

    #[test]
    fn the_namespace_comes_first_and_the_webhooks_last() {
        let objects = of(&Settings::default());
        assert_eq!(name(&objects[0]), format!("namespace/{NAMESPACE}"));
        assert_eq!(name(&objects[objects.len() - 1]), "validatingwebhookconfiguration/outrigger");
        let names: Vec<String> = objects.iter().map(name).collect();
        for part in ["deployment/control", "daemonset/node", "csidriver/csi.outrigger.dev", "serviceaccount/control"] {
            assert!(names.iter().any(|name| name == part), "{part} is not in {names:?}");
        }
    }

    #[test]
    fn settings_reach_every_place_that_they_mean_and_are_kept_on_the_namespace() {
        let settings = Settings {
            image: Some("registry.example/outrigger:2".to_owned()),
            trust_domain: Some("shop.example".to_owned()),
            workload_api: None,
            replicas: Some(3),
            kubelet_dir: Some("/data/kubelet".into()),
            node_state_dir: Some("/data/mesh".into()),
            log_level: Some("debug".to_owned()),
        };
        let objects = of(&settings);
        let kept = find(&objects, "namespace/outrigger-system")["metadata"]["annotations"][SETTINGS].clone();
        assert_eq!(serde_json::from_str::<Settings>(kept.as_str().unwrap()).unwrap(), settings);
        let control = find(&objects, "deployment/control");
        assert_eq!(control["spec"]["replicas"], 3);
        let text = control.to_string();
        assert!(text.contains(r#"{"name":"OUTRIGGER_SIDECAR_IMAGE","value":"registry.example/outrigger:2"}"#), "{text}");
        let node = find(&objects, "daemonset/node").to_string();
        for word in ["shop.example", r#""image":"registry.example/outrigger:2""#, "/data/kubelet/pods", r#""value":"debug""#] {
            assert!(node.contains(word), "{word} is not in {node}");
        }
        assert!(!node.contains(KUBELET) && !node.contains("cluster.local"), "{node}");
        // The agent's own path stays what it is, the machine's is another.
        assert!(
            node.contains(r#""hostPath":{"path":"/data/mesh""#) && node.contains(r#""mountPath":"/var/lib/outrigger""#),
            "{node}"
        );
    }

    #[test]
    fn with_spire_the_control_plane_has_the_drivers_volume_and_the_agents_give_nobody_an_identity() {
        let settings = Settings { workload_api: Some("csi.spiffe.io".to_owned()), ..Settings::default() };
        let (usual, objects) = (of(&Settings::default()), of(&settings));
        let differs = |name_of: &str| find(&usual, name_of) != find(&objects, name_of);
        let names: Vec<String> = objects.iter().map(name).filter(|name| differs(name)).collect();
        assert_eq!(names, ["namespace/outrigger-system", "daemonset/node", "deployment/control"]);
        let last = |object: &Value, list: &str| object.pointer(list).unwrap().as_array().unwrap().last().unwrap().clone();
        let control = find(&objects, "deployment/control")["spec"]["template"]["spec"].clone();
        assert_eq!(
            last(&control, "/volumes"),
            json!({ "name": "outrigger-workload-api", "csi": { "driver": "csi.spiffe.io", "readOnly": true } })
        );
        assert_eq!(
            last(&control, "/containers/0/volumeMounts"),
            json!({ "name": "outrigger-workload-api", "mountPath": "/spiffe-workload-api", "readOnly": true })
        );
        assert_eq!(
            last(&control, "/containers/0/env"),
            json!({ "name": "OUTRIGGER_SIDECAR_WORKLOAD_API", "value": "csi.spiffe.io/spire-agent.sock" })
        );
        let node = find(&objects, "daemonset/node")["spec"]["template"]["spec"].clone();
        assert_eq!(last(&node, "/containers/0/env"), json!({ "name": "OUTRIGGER_FOREIGN_IDENTITIES", "value": "true" }));
    }

    #[test]
    fn what_is_not_said_stays_as_it_was_installed() {
        let former = Settings { replicas: Some(3), image: Some("a:1".to_owned()), ..Settings::default() };
        let said = Settings { image: Some("a:2".to_owned()), ..Settings::default() };
        assert_eq!(said.over(former), Settings { replicas: Some(3), image: Some("a:2".to_owned()), ..Settings::default() });
    }

    #[test]
    fn identities_of_the_meshs_own_authority_are_had_again_by_an_empty_workload_api() {
        let api = |text: &str| Settings { workload_api: Some(text.to_owned()), ..Settings::default() };
        let former = Settings { replicas: Some(3), ..api("csi.spiffe.io") };
        assert_eq!(Settings::default().over(former.clone()).workload_api.as_deref(), Some("csi.spiffe.io"));
        let back = api("").over(former);
        assert_eq!(back, Settings { replicas: Some(3), ..Settings::default() });
        assert_eq!((api("").problem(), of(&api(""))), (None, of(&Settings::default())));
    }

    #[test]
    fn settings_that_mean_nothing_are_refused_by_name() {
        let folder = |text: &str| Settings { kubelet_dir: Some(text.into()), ..Settings::default() }.problem();
        assert_eq!(folder("/var/lib/k0s/kubelet"), None);
        assert!(folder("var/lib").is_some() && folder("/var/lib/").is_some() && folder("/a:b").is_some());
        let api = |text: &str| Settings { workload_api: Some(text.to_owned()), ..Settings::default() }.problem();
        assert_eq!(api("csi.spiffe.io/agent.sock"), None);
        assert!(api("/run/spire/agent.sock").unwrap().starts_with("--workload-api: /run/spire/agent.sock is a path on the node"));
        let level = |text: &str| Settings { log_level: Some(text.to_owned()), ..Settings::default() }.problem();
        assert_eq!(level("info,outrigger::node=debug"), None);
        assert!(level("loud").unwrap().starts_with("--system-log-level: \"loud\" names no level"));
        let image = |text: &str| Settings { image: Some(text.to_owned()), ..Settings::default() }.problem();
        assert_eq!(image(&format!("registry.example/outrigger:1.0@sha256:{}", "0".repeat(64))), None);
        assert!(image("a//b:c:d").unwrap().starts_with("--image: \"a//b:c:d\" is no image"));
        assert!(image("no image").unwrap().starts_with("--image: \"no image\" is no image"));
        let domain = Settings { trust_domain: Some("Not A Domain".to_owned()), ..Settings::default() };
        assert!(domain.problem().unwrap().starts_with("--trust-domain: "));
    }
}
