//! What a pod and its namespace ask for: a sidecar or none, and which.

use std::collections::BTreeMap;
use std::ops::RangeBounds;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::quantity::thousandths;
use super::{Namespace, Reason, Refusal, Settings, is_image};
use crate::base::names::nearest;
use crate::model::capture::CaptureConfig;
use crate::model::marks::{self, DISABLED, ENABLED, INJECT, Mode};
use crate::telemetry::log;

/// The sidecar that is asked for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Wishes {
    pub(super) mode: Mode,
    pub(super) image: String,
    pub(super) log_level: String,
    pub(super) cpu: String,
    pub(super) memory: String,
    pub(super) cpu_limit: Option<String>,
    pub(super) memory_limit: Option<String>,
}

/// Why the pod is to stay without a sidecar; none if it is to have one. The pod's label counts before its namespace's.
pub(super) fn left(pod: &ObjectMeta, namespace: &Namespace) -> Result<Option<Reason>, Refusal> {
    for (of, annotations) in [("pod", pod.annotations.as_ref()), ("namespace", Some(&namespace.annotations))] {
        if annotations.is_some_and(|annotations| annotations.contains_key(INJECT)) {
            return Err(Refusal::InjectAnnotation { of });
        }
    }
    if SYSTEM_NAMESPACES.contains(&namespace.name.as_str()) {
        return Ok(Some(Reason::SystemNamespace));
    }
    let own = pod.labels.as_ref().and_then(|labels| labels.get(INJECT));
    let asked = match own {
        Some(value) => enabled("pod", value)?,
        None => namespace.labels.get(INJECT).is_some_and(|value| value == ENABLED),
    };
    let is_mirror = pod.annotations.as_ref().is_some_and(|annotations| annotations.contains_key(MIRROR));
    Ok(match (asked, own) {
        (true, _) if is_mirror => Some(Reason::Mirror),
        (true, _) => None,
        (false, Some(_)) => Some(Reason::Disabled),
        (false, None) => match namespace.labels.get(INJECT) {
            Some(value) => Some(reason_of_namespace(value)?),
            None => Some(Reason::NotAsked),
        },
    })
}

fn enabled(of: &'static str, value: &str) -> Result<bool, Refusal> {
    match value {
        ENABLED => Ok(true),
        DISABLED => Ok(false),
        _neither => Err(Refusal::InjectLabel { of, value: value.to_owned() }),
    }
}

fn reason_of_namespace(value: &str) -> Result<Reason, Refusal> {
    enabled("namespace", value).map(|_disabled| Reason::NotAsked)
}

impl Wishes {
    /// Reads the annotations of the mesh.
    ///
    /// # Errors
    /// One is unknown, or says nothing that can be done.
    pub(super) fn of(annotations: &BTreeMap<String, String>, settings: &Settings) -> Result<Self, Refusal> {
        refuse_unknown(annotations)?;
        CaptureConfig::of(annotations)?;
        CaptureConfig::hold(annotations)?;
        let read = |name: &'static str, default: &str, what: &'static str, remedy: &'static str, fits: &dyn Fn(&str) -> bool| {
            match annotations.get(name) {
                None => Ok(default.to_owned()),
                Some(value) if fits(value) => Ok(value.clone()),
                Some(value) => Err(Refusal::Annotation { name, value: value.clone(), what, remedy }),
            }
        };
        let is_cpu_limit = |text: &str| is_cpu_of(text, CPU_LIMIT_MIN..);
        let is_memory_limit = |text: &str| is_within(text, MEMORY_LIMIT_MIN..);
        let mode =
            read(marks::SIDECAR_MODE, settings.mode.as_str(), "mode", "native or classic", &|text| Mode::parse(text).is_some())?;
        let wished = |text: String| Some(text).filter(|text| !text.is_empty());
        let wishes = Self {
            mode: Mode::parse(&mode).unwrap_or(settings.mode),
            image: read(marks::SIDECAR_IMAGE, &settings.image, "image", "one as registry.example/outrigger:1.0", &is_image)?,
            log_level: read(
                marks::LOG_LEVEL,
                &settings.log_level,
                "level",
                "error, warn, info, debug or trace, or a list as info,outrigger::dataplane=debug",
                &|text| log::is_filter(text),
            )?,
            cpu: read(marks::SIDECAR_CPU, &settings.cpu, AMOUNT, CPU_REMEDY, &is_cpu)?,
            memory: read(marks::SIDECAR_MEMORY, &settings.memory, AMOUNT, MEMORY_REMEDY, &is_memory)?,
            cpu_limit: wished(read(marks::SIDECAR_CPU_LIMIT, "", AMOUNT, CPU_LIMIT_REMEDY, &is_cpu_limit)?),
            memory_limit: wished(read(marks::SIDECAR_MEMORY_LIMIT, "", AMOUNT, MEMORY_LIMIT_REMEDY, &is_memory_limit)?),
        };
        wishes.within_limits(annotations)
    }

    /// The API server would refuse a pod that asks for more than its limit, in words that do not lead to the annotation. What
    /// the pod did not ask for itself gives way to the limit.
    fn within_limits(mut self, annotations: &BTreeMap<String, String>) -> Result<Self, Refusal> {
        let pairs = [
            (marks::SIDECAR_CPU, &mut self.cpu, marks::SIDECAR_CPU_LIMIT, &self.cpu_limit),
            (marks::SIDECAR_MEMORY, &mut self.memory, marks::SIDECAR_MEMORY_LIMIT, &self.memory_limit),
        ];
        for (request, asked, limit, limited) in pairs {
            let Some(limited) = limited.as_ref().filter(|limited| thousandths(asked) > thousandths(limited)) else { continue };
            if annotations.contains_key(request) {
                return Err(Refusal::Limit { request, asked: asked.clone(), limit, limited: limited.clone() });
            }
            asked.clone_from(limited);
        }
        Ok(self)
    }
}

/// A slip must not leave a pod open, nor closed, unawares.
fn refuse_unknown(annotations: &BTreeMap<String, String>) -> Result<(), Refusal> {
    let known = || marks::OF_INJECTION.into_iter().chain(CaptureConfig::ANNOTATIONS);
    // What all have in common would make all of them alike.
    let own_part = |name: &'static str| name.strip_prefix(marks::OURS).unwrap_or(name);
    for (name, _text) in marks::ours(annotations) {
        if !known().any(|known| known == name) {
            let written = name.strip_prefix(marks::OURS).unwrap_or(name);
            let remedy = match nearest(written, known().map(own_part)) {
                Some(meant) => format!("did you mean {}{meant}?", marks::OURS),
                None => format!("write one of {}", known().collect::<Vec<_>>().join(", ")),
            };
            return Err(Refusal::UnknownAnnotation { name: name.clone(), remedy });
        }
    }
    Ok(())
}

/// Is it an amount of processors that a sidecar can ask of its node?
pub(crate) fn is_cpu(text: &str) -> bool {
    is_cpu_of(text, 1..=CPU_MAX)
}

/// Kubernetes takes an amount of bytes for one of processors, with which no pod finds a node.
fn is_cpu_of(text: &str, bounds: impl RangeBounds<u128>) -> bool {
    is_within(text, bounds) && text.ends_with(|last: char| last.is_ascii_digit() || last == 'm')
}

/// Is it an amount of memory that a sidecar can ask of its node?
pub(crate) fn is_memory(text: &str) -> bool {
    is_within(text, MEMORY_MIN..=MEMORY_MAX)
}

fn is_within(text: &str, bounds: impl RangeBounds<u128>) -> bool {
    thousandths(text).is_some_and(|amount| bounds.contains(&amount))
}

/// Whose pods the cluster itself, or the mesh, stands on.
pub(crate) const SYSTEM_NAMESPACES: [&str; 4] = ["kube-system", "kube-public", "kube-node-lease", marks::SYSTEM];
/// The kubelet writes it at pods that it has from a file.
pub(crate) const MIRROR: &str = "kubernetes.io/config.mirror";
const AMOUNT: &str = "amount for a sidecar";
/// More than any sidecar has use for, in thousandths: whoever asks for that has forgotten the unit, and no node has room for the pod.
const CPU_MAX: u128 = 8_000;
/// The kubelet does not hold a container to less (a millisecond of each tenth of a second), nor would its sidecar shake hands in time.
const CPU_LIMIT_MIN: u128 = 10;
/// Less is an amount without its unit, in thousandths of a byte.
const MEMORY_MIN: u128 = 1_000_000 * 1_000;
const MEMORY_MAX: u128 = (8 << 30) * 1_000;
/// A sidecar holds up to 15 MB at rest: with less than this the kernel ends it before it serves.
const MEMORY_LIMIT_MIN: u128 = (24 << 20) * 1_000;
pub(crate) const CPU_REMEDY: &str = "one of at most 8, as 50m or 0.5";
const CPU_LIMIT_REMEDY: &str = "one of at least 10m, as 500m or 1";
pub(crate) const MEMORY_REMEDY: &str = "one from 1M to 8Gi, as 64Mi";
const MEMORY_LIMIT_REMEDY: &str = "one of at least 24Mi, as 128Mi";
