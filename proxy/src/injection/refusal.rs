//! Why a pod that asks for a sidecar is not admitted: each with a name for logs and metrics, and with what to do about it.

use crate::model::app_doors::ProbeKind;
use crate::model::capture::CaptureError;
use crate::model::marks;

/// The pod's author is at fault, but for what another webhook did.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("this is no pod: {0}")]
    Shape(String),
    #[error("label {label} of the {of}: {value:?} says nothing; write enabled or disabled", label = marks::INJECT)]
    InjectLabel { of: &'static str, value: String },
    #[error(
        "annotation {label} of the {of}: it is a label, which the API server selects by; write it under metadata.labels",
        label = marks::INJECT
    )]
    InjectAnnotation { of: &'static str },
    #[error(
        "hostNetwork: the pod has its node's network, whose connections no sidecar can tell apart; run it without hostNetwork, or label it {}: disabled",
        marks::INJECT
    )]
    HostNetwork,
    #[error("{at}: windows: the sidecar runs on Linux; label the pod {}: disabled", marks::INJECT)]
    Windows { at: &'static str },
    #[error(
        "dnsPolicy: {policy}: the pod's resolver does not know {name}, the mesh's control plane; write ClusterFirst, or None with the cluster's DNS in dnsConfig.nameservers and its domains (NAMESPACE.svc.DOMAIN, svc.DOMAIN, DOMAIN) in dnsConfig.searches"
    )]
    DnsPolicy { policy: &'static str, name: String },
    #[error("annotation {name}: there is none of that name; {remedy}")]
    UnknownAnnotation { name: String, remedy: String },
    #[error("annotation {name}: {value:?} is no {what}; write {remedy}")]
    Annotation { name: &'static str, value: String, what: &'static str, remedy: &'static str },
    #[error("annotation {limit}: {limited} is less than {asked}, which {request} asks for; write at least as much")]
    Limit { request: &'static str, asked: String, limit: &'static str, limited: String },
    #[error(
        "resources.{field}.{name}: {value:?} cannot be added to, which the sidecar's share is; write one as 500m, 0.5 or 64Mi"
    )]
    PodResources { field: &'static str, name: &'static str, value: String },
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error("{kind} {name}: it is written by the injection, and this pod has no sidecar; leave it out")]
    Mark { kind: &'static str, name: &'static str },
    #[error("annotation {name}: it is written by the injection, and is not as that writes it: {fault}; leave it out", name = marks::STATUS)]
    Status { fault: String },
    #[error("container {name}: only the mesh's sidecar is called that; give it another name", name = marks::CONTAINER)]
    ContainerName,
    #[error("container {name}: it is not the sidecar that the injection makes: {fault}; take it out and let it be made", name = marks::CONTAINER)]
    NotOurs { fault: &'static str },
    #[error("volume {0}: only the sidecar's volumes are called that; give it another name")]
    VolumeName(&'static str),
    #[error("volume {0}: the driver {driver} gives its sockets to the sidecar alone; take the volume out", driver = marks::DRIVER)]
    Driver(String),
    #[error("container {container}: it mounts the volume {volume}, which is the sidecar's alone; take the mount out")]
    Mount { container: String, volume: String },
    #[error("container {container}: port {port} is one of the sidecar's, which is never the app's; choose another")]
    Port { container: String, port: i32 },
    #[error("container {container}: {field}: there is no port called {port:?}; name one of the container's ports, or write its number", field = kind.field())]
    NamedPort { container: String, kind: ProbeKind, port: String },
    #[error("container {container}: {field}: {port} is no port at which an app can be asked; write another", field = kind.field())]
    ProbePort { container: String, kind: ProbeKind, port: i32 },
    #[error(
        "container {container}: {field}: it leads to the sidecar, which knows of no such probe; write the probe of the app, as it was before any injection",
        field = kind.field()
    )]
    ProbeForged { container: String, kind: ProbeKind },
    #[error(
        "annotation prometheus.io/path: it leads to the sidecar, which knows of no metrics of the app; write the app's own port and path"
    )]
    MetricsForged,
    #[error(
        "container {container}: startupProbe: it is asked before the classic sidecar runs, without which the pod has no network; write annotation {mode}: native, or a probe with exec",
        mode = marks::SIDECAR_MODE
    )]
    StartsBefore { container: String },
    #[error("the pod's probes take {0} bytes to write down; the sidecar is given {max} at most", max = super::app::DOORS_BYTES_MAX)]
    TooManyProbes(usize),
}

impl Refusal {
    /// Its name in logs and metrics.
    pub(crate) const fn word(&self) -> &'static str {
        match self {
            Self::Shape(_) => "not_a_pod",
            Self::InjectLabel { .. } => "inject_label",
            Self::InjectAnnotation { .. } => "inject_annotation",
            Self::HostNetwork => "host_network",
            Self::Windows { .. } => "windows",
            Self::DnsPolicy { .. } => "dns_policy",
            Self::UnknownAnnotation { .. } => "unknown_annotation",
            Self::Annotation { .. } | Self::Limit { .. } | Self::Capture(_) => "annotation",
            Self::PodResources { .. } => "pod_resources",
            Self::Mark { .. } | Self::Status { .. } => "forged_mark",
            Self::ContainerName | Self::NotOurs { .. } => "forged_container",
            Self::VolumeName(_) | Self::Driver(_) | Self::Mount { .. } => "forged_volume",
            Self::Port { .. } => "own_port",
            Self::NamedPort { .. } | Self::ProbePort { .. } => "probe_port",
            Self::ProbeForged { .. } | Self::MetricsForged => "forged_probe",
            Self::StartsBefore { .. } => "starts_before",
            Self::TooManyProbes(_) => "too_many_probes",
        }
    }
}
