//! Marks of the mesh at a pod that comes in: left by an earlier injection, or somebody else's who calls himself so.
//!
//! Who may create pods may run what he likes in them, so this guards nobody's secrets: the node agent asks the kernel who
//! calls. It keeps names from meaning two things, and tells what would fail later, far from where it was written.

use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, PodSpec};
use serde_json::{Value, json};

use super::{Refusal, pod_resources};
use crate::model::app_doors::AppDoors;
use crate::model::capture::SIDECARS_PORTS;
use crate::model::marks::{self, Mode};

/// What an earlier injection left.
#[derive(Debug)]
pub(super) struct Earlier {
    pub(super) mode: Mode,
    /// What it wrote down about itself.
    pub(super) status: Value,
    /// What it led to the sidecar.
    pub(super) doors: AppDoors,
}

/// Reads what an earlier injection left; none where there was none.
pub(super) fn earlier(pod: &Pod) -> Result<Option<Earlier>, Refusal> {
    let Some(spec) = &pod.spec else { return Ok(None) };
    let label = pod.metadata.labels.as_ref().and_then(|labels| labels.get(marks::SIDECAR));
    let status = pod.metadata.annotations.as_ref().and_then(|annotations| annotations.get(marks::STATUS));
    let earlier = match (marks::container(spec), label, status) {
        (None, Some(_), _) => return Err(Refusal::Mark { kind: "label", name: marks::SIDECAR }),
        (None, None, Some(_)) => return Err(Refusal::Mark { kind: "annotation", name: marks::STATUS }),
        (None, None, None) => None,
        (Some((mode, container)), Some(label), Some(status)) if label == marks::INJECTED => {
            Some(read_earlier(spec, mode, container, status)?)
        }
        // A copy of a pod (`kubectl debug --copy-to`) has its containers and neither its labels nor its annotations. What it was
        // asked for is not known any more, so it is made as for a new pod.
        (Some((mode, container)), None, None) if looks_made(container) => {
            // But that what it asks for is in what its pod asks for as a whole, or that would have been refused.
            let resources = serde_json::to_value(&container.resources).unwrap_or_default();
            let status = json!({ pod_resources::ADDED: pod_resources::share(&resources) });
            Some(read_earlier(spec, mode, container, &status.to_string())?)
        }
        (Some(_), ..) => return Err(Refusal::ContainerName),
    };
    refuse_others(spec, earlier.is_some())?;
    Ok(earlier)
}

/// A pod that got no sidecar from here must not look as if it had; one that did must have it whole. To be asked of every pod
/// that bears a mark, when all webhooks have changed what they will.
///
/// # Errors
/// It is a forgery.
pub(crate) fn refuse_forged(pod: &Value) -> Result<(), Refusal> {
    let read: Pod = serde_json::from_value(pod.clone()).map_err(|error| Refusal::Shape(error.to_string()))?;
    let Some(earlier) = earlier(&read)? else { return Ok(()) };
    // A copy that nobody has made a pod of the mesh again.
    if read.metadata.labels.as_ref().is_none_or(|labels| !labels.contains_key(marks::SIDECAR)) {
        return Err(Refusal::ContainerName);
    }
    let first = match earlier.mode {
        Mode::Native => read.spec.as_ref().and_then(|spec| spec.init_containers.as_ref()).and_then(|list| list.first()),
        Mode::Classic => read.spec.as_ref().and_then(|spec| spec.containers.first()),
    };
    if first.is_none_or(|first| first.name != marks::CONTAINER) {
        return Err(Refusal::NotOurs { fault: "it is not the first, so what stands before it would have no network" });
    }
    Ok(())
}

/// Has the container what only the injection writes? Whether it is whole is looked at by [`read_earlier`].
fn looks_made(container: &Container) -> bool {
    container.env.iter().flatten().any(|variable| variable.name == super::sidecar::PROBES)
}

fn read_earlier(spec: &PodSpec, mode: Mode, container: &Container, status: &str) -> Result<Earlier, Refusal> {
    let not_ours = |fault| Err(Refusal::NotOurs { fault });
    if container.args.as_deref() != Some(&["sidecar".to_owned()]) || container.command.is_some() {
        return not_ours("it runs something else");
    }
    if mode == Mode::Native && container.restart_policy.as_deref() != Some("Always") {
        return not_ours("it is an init container that ends");
    }
    if !container.volume_mounts.iter().flatten().any(|mount| mount.name == marks::SOCKETS) {
        return not_ours("it has no sockets of the node agent");
    }
    if !marks::has_sockets(spec) {
        return not_ours("its volume is not the node agent's");
    }
    let status: Value = serde_json::from_str(status).map_err(|error| Refusal::Status { fault: error.to_string() })?;
    if !status.is_object() {
        return Err(Refusal::Status { fault: "it is no object".to_owned() });
    }
    let variable = container.env.iter().flatten().find(|variable| variable.name == super::sidecar::PROBES);
    let text = variable.and_then(|variable| variable.value.as_deref()).unwrap_or("{}");
    match super::sidecar::given(text).parse() {
        Ok(doors) => Ok(Earlier { mode, status, doors }),
        Err(_not_doors) => not_ours("its OUTRIGGER_PROBES cannot be read"),
    }
}

/// Volumes that pass for the sidecar's, and containers that reach for them or for its ports.
fn refuse_others(spec: &PodSpec, injected: bool) -> Result<(), Refusal> {
    for volume in spec.volumes.iter().flatten() {
        let ours = SIDECARS.into_iter().find(|ours| *ours == volume.name);
        if let Some(ours) = ours.filter(|_| !injected) {
            return Err(Refusal::VolumeName(ours));
        }
        if ours != Some(marks::SOCKETS) && volume.csi.as_ref().is_some_and(|csi| csi.driver == marks::DRIVER) {
            return Err(Refusal::Driver(volume.name.clone()));
        }
    }
    for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
        if container.name == marks::CONTAINER {
            continue;
        }
        let mounted = container.volume_mounts.iter().flatten().map(|mount| &mount.name);
        refuse_mounts(&container.name, mounted, &SIDECARS)?;
        for port in container.ports.iter().flatten() {
            if SIDECARS_PORTS.iter().any(|own| i32::from(*own) == port.container_port) {
                return Err(Refusal::Port { container: container.name.clone(), port: port.container_port });
            }
        }
    }
    for EphemeralContainer { name, volume_mounts, .. } in spec.ephemeral_containers.iter().flatten() {
        refuse_mounts(name, volume_mounts.iter().flatten().map(|mount| &mount.name), &SIDECARS)?;
    }
    Ok(())
}

/// The volumes that are the sidecar's alone.
const SIDECARS: [&str; 3] = [marks::SOCKETS, marks::STATE, marks::WORKLOAD_API];

fn refuse_mounts<'a>(container: &str, mut mounted: impl Iterator<Item = &'a String>, sidecars: &[&str]) -> Result<(), Refusal> {
    match mounted.find(|name| sidecars.contains(&name.as_str())) {
        Some(volume) => Err(Refusal::Mount { container: container.to_owned(), volume: volume.clone() }),
        None => Ok(()),
    }
}
