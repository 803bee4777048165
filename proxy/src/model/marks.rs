//! What a pod of Kubernetes carries that is of the mesh: labels, annotations, a container, volumes, and their names.
//!
//! Whoever writes them (the injection) and whoever reads them (the node agent, the control plane) finds them here, so that
//! a name cannot differ between the two.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

/// Labels and annotations of ours begin with it.
pub(crate) const OURS: &str = "outrigger.dev/";
/// On a namespace or a pod: does it want a sidecar? The pod's own counts first.
pub(crate) const INJECT: &str = "outrigger.dev/inject";
pub(crate) const ENABLED: &str = "enabled";
pub(crate) const DISABLED: &str = "disabled";
/// The label of a pod that got its sidecar, with the value [`INJECTED`].
pub(crate) const SIDECAR: &str = "outrigger.dev/sidecar";
pub(crate) const INJECTED: &str = "injected";
/// The annotation that says which injection it was.
pub(crate) const STATUS: &str = "outrigger.dev/status";
/// How long connections wait for a sidecar that is not there.
pub(crate) const HOLD: &str = "outrigger.dev/hold";
pub(crate) const SIDECAR_MODE: &str = "outrigger.dev/sidecar-mode";
pub(crate) const SIDECAR_IMAGE: &str = "outrigger.dev/sidecar-image";
pub(crate) const SIDECAR_CPU: &str = "outrigger.dev/sidecar-cpu";
pub(crate) const SIDECAR_CPU_LIMIT: &str = "outrigger.dev/sidecar-cpu-limit";
pub(crate) const SIDECAR_MEMORY: &str = "outrigger.dev/sidecar-memory";
pub(crate) const SIDECAR_MEMORY_LIMIT: &str = "outrigger.dev/sidecar-memory-limit";
pub(crate) const LOG_LEVEL: &str = "outrigger.dev/log-level";

/// Annotations that are asked of the injection and the sidecar's life, not of capture.
pub(crate) const OF_INJECTION: [&str; 9] =
    [STATUS, HOLD, SIDECAR_MODE, SIDECAR_IMAGE, SIDECAR_CPU, SIDECAR_CPU_LIMIT, SIDECAR_MEMORY, SIDECAR_MEMORY_LIMIT, LOG_LEVEL];

/// The sidecar's container.
pub(crate) const CONTAINER: &str = "outrigger";
/// The volume with the node agent's sockets.
pub(crate) const SOCKETS: &str = "outrigger";
/// The volume in which the sidecar keeps its last good configuration.
pub(crate) const STATE: &str = "outrigger-state";
/// The volume with the socket of a Workload API that is not the node agent's.
pub(crate) const WORKLOAD_API: &str = "outrigger-workload-api";
/// Whose ephemeral volume [`SOCKETS`] is.
pub(crate) const DRIVER: &str = "csi.outrigger.dev";
/// Where the mesh's own parts run, and where nothing is injected.
pub(crate) const SYSTEM: &str = "outrigger-system";

/// Where a pod's sidecar stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Mode {
    /// The first init container, restarted for as long as the pod lives (Kubernetes 1.29): it starts first and ends last.
    Native,
    /// The first container, for older clusters.
    Classic,
}

impl Mode {
    /// As in [`SIDECAR_MODE`].
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Classic => "classic",
        }
    }

    /// Reads [`SIDECAR_MODE`].
    pub(crate) fn parse(text: &str) -> Option<Self> {
        [Self::Native, Self::Classic].into_iter().find(|mode| mode.as_str() == text)
    }
}

/// The pod's sidecar and where it stands, if the pod says that it has one and it really does: it is labelled, and its
/// container has the volume with the node agent's sockets. A label alone proves nothing, for anybody can write one.
pub(crate) fn sidecar(pod: &Pod) -> Option<(Mode, &Container)> {
    let labelled = pod.metadata.labels.as_ref().and_then(|labels| labels.get(SIDECAR)).is_some_and(|value| value == INJECTED);
    let spec = pod.spec.as_ref().filter(|_| labelled)?;
    let (mode, container) = container(spec)?;
    let mounts = container.volume_mounts.iter().flatten();
    (mounts.map(|mount| mount.name.as_str()).any(|name| name == SOCKETS) && has_sockets(spec)).then_some((mode, container))
}

/// The container that is named as a sidecar is.
pub(crate) fn container(spec: &PodSpec) -> Option<(Mode, &Container)> {
    let native = spec.init_containers.iter().flatten().map(|container| (Mode::Native, container));
    let classic = spec.containers.iter().map(|container| (Mode::Classic, container));
    native.chain(classic).find(|(_, container)| container.name == CONTAINER)
}

/// Is the volume of the sockets there, and the node agent's?
pub(crate) fn has_sockets(spec: &PodSpec) -> bool {
    let mut volumes = spec.volumes.iter().flatten();
    volumes.any(|volume| volume.name == SOCKETS && volume.csi.as_ref().is_some_and(|csi| csi.driver == DRIVER))
}

/// Has all of the pod's app ended for good, so that only its sidecar keeps the pod from ending? A native sidecar is ended by
/// the kubelet; a classic one is a container like the app's, of which a Job waits for each.
pub(crate) fn app_has_ended(pod: &Pod) -> bool {
    let (Some((Mode::Classic, _)), Some(spec)) = (sidecar(pod), &pod.spec) else { return false };
    let failures_end_it = match spec.restart_policy.as_deref() {
        Some("Never") => true,
        Some("OnFailure") => false,
        _always => return false,
    };
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_deref()).unwrap_or_default();
    let has_ended = |container: &Container| {
        let status = statuses.iter().find(|status| status.name == container.name);
        let ended = status.and_then(|status| status.state.as_ref()).and_then(|state| state.terminated.as_ref());
        ended.is_some_and(|ended| failures_end_it || ended.exit_code == 0)
    };
    spec.containers.iter().filter(|container| container.name != CONTAINER).all(has_ended)
}

/// Those of `annotations` that are ours.
pub(crate) fn ours(annotations: &BTreeMap<String, String>) -> impl Iterator<Item = (&String, &String)> {
    annotations.iter().filter(|(name, _text)| name.starts_with(OURS))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_app_has_ended_when_none_of_its_containers_will_run_again() {
        let pod = |list: &str, policy: &str, states: &[serde_json::Value]| -> Pod {
            let names = ["web", "second"];
            let mut containers: Vec<_> = names.iter().map(|name| json!({ "name": name })).collect();
            let ours = json!({ "name": CONTAINER, "volumeMounts": [{ "name": SOCKETS, "mountPath": "/run/outrigger" }] });
            let mut init = Vec::new();
            if list == "containers" { &mut containers } else { &mut init }.insert(0, ours);
            let mut statuses = vec![json!({ "name": CONTAINER, "state": { "running": {} } })];
            statuses.extend(names.iter().zip(states).map(|(name, state)| json!({ "name": name, "state": state })));
            for status in &mut statuses {
                for (field, value) in
                    [("image", json!("")), ("imageID", json!("")), ("ready", json!(false)), ("restartCount", json!(0))]
                {
                    status[field] = value;
                }
            }
            serde_json::from_value(json!({
                "metadata": { "labels": { SIDECAR: INJECTED } },
                "spec": {
                    "restartPolicy": policy,
                    "initContainers": init,
                    "containers": containers,
                    "volumes": [{ "name": SOCKETS, "csi": { "driver": DRIVER } }],
                },
                "status": { "containerStatuses": statuses },
            }))
            .unwrap()
        };
        let ended = |code: i32| json!({ "terminated": { "exitCode": code } });
        let (running, waiting) = (json!({ "running": {} }), json!({ "waiting": { "reason": "CrashLoopBackOff" } }));
        for (list, policy, states, expected) in [
            ("containers", "Never", vec![ended(0), ended(0)], true),
            ("containers", "Never", vec![ended(0), ended(1)], true),
            ("containers", "OnFailure", vec![ended(0), ended(0)], true),
            ("containers", "OnFailure", vec![ended(0), ended(1)], false),
            ("containers", "OnFailure", vec![ended(0), waiting], false),
            ("containers", "Never", vec![ended(0), running], false),
            ("containers", "Never", vec![ended(0)], false),
            ("containers", "Always", vec![ended(0), ended(0)], false),
            ("initContainers", "Never", vec![ended(0), ended(0)], false),
        ] {
            assert_eq!(app_has_ended(&pod(list, policy, &states)), expected, "{list} {policy} {states:?}");
        }
    }

    #[test]
    fn a_pod_has_a_sidecar_that_is_labelled_there_and_has_the_sockets() {
        let pod = |label: &str, driver: &str, mount: &str| -> Pod {
            serde_json::from_value(json!({
                "metadata": { "labels": { SIDECAR: label } },
                "spec": {
                    "initContainers": [{ "name": CONTAINER, "volumeMounts": [{ "name": mount, "mountPath": "/run/outrigger" }] }],
                    "containers": [{ "name": "web" }],
                    "volumes": [{ "name": SOCKETS, "csi": { "driver": driver } }],
                }
            }))
            .unwrap()
        };
        assert_eq!(sidecar(&pod(INJECTED, DRIVER, SOCKETS)).map(|(mode, _)| mode), Some(Mode::Native));
        for (label, driver, mount) in
            [("yes", DRIVER, SOCKETS), (INJECTED, "csi.example.com", SOCKETS), (INJECTED, DRIVER, "elsewhere")]
        {
            assert!(sidecar(&pod(label, driver, mount)).is_none(), "{label} {driver} {mount}");
        }
    }
}
