//! Leads the kubelet's probes and Prometheus to the sidecar, and notes for it what they asked of the app.
//!
//! Sources: Kubernetes' core/v1 Probe and the kubelet's prober (`pkg/probe`); the annotations of Prometheus' Kubernetes
//! examples. A probe that runs a program stays as it is: it runs inside the app's container.

use k8s_openapi::api::core::v1::{Container, LifecycleHandler, PodSpec, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use proxy_common::PORT_METRICS;
use serde_json::{Map, Value, json};

use super::{Refusal, put_list, take_list};
use crate::model::app_doors::{AppDoors, AppProbe, Ask, GrpcDoor, HttpDoor, METRICS_PATH, PROBE_PATH, ProbeKind, TcpDoor, door};
use crate::model::capture::SIDECARS_PORTS;
use crate::model::marks;

/// What the sidecar is asked in the app's place.
#[derive(Debug, Default)]
pub(super) struct Asked {
    pub(super) doors: AppDoors,
    pub(super) warnings: Vec<String>,
}

/// The largest text of [`AppDoors`]: a variable of the environment has 128 KiB of room.
pub(super) const DOORS_BYTES_MAX: usize = 64 << 10;

/// Changes the probes of the app's containers in `body` and the annotations of Prometheus in `notes`. `earlier` is what an
/// earlier injection noted.
pub(super) fn lead_to_sidecar(
    spec: &PodSpec,
    body: &mut Map<String, Value>,
    notes: &mut Map<String, Value>,
    earlier: Option<&AppDoors>,
) -> Result<Asked, Refusal> {
    let mut asked = Asked::default();
    // Only those init containers that stay are probed.
    let init = spec.init_containers.as_deref().unwrap_or_default();
    for (field, containers) in [("initContainers", init), ("containers", &spec.containers)] {
        let mut list = take_list(body, field);
        for (container, value) in containers.iter().zip(&mut list) {
            if container.name != marks::CONTAINER {
                asked.lead_probes(container, value, earlier)?;
                asked.warn_of_hooks(container);
            }
        }
        put_list(body, field, list);
    }
    asked.lead_metrics(spec, notes, earlier)?;
    match asked.doors.to_string().len() {
        length if length > DOORS_BYTES_MAX => Err(Refusal::TooManyProbes(length)),
        _fits => Ok(asked),
    }
}

/// Refuses an init container that stays and whose start is asked for over the network: containers behind it, as a classic sidecar,
/// begin when it has started.
pub(super) fn refuse_probed_before(spec: &PodSpec) -> Result<(), Refusal> {
    let is_asked = |container: &&Container| {
        let probe = container.startup_probe.as_ref().filter(|_probe| container.restart_policy.as_deref() == Some("Always"));
        probe.is_some_and(|probe| probe.exec.is_none())
    };
    match spec.init_containers.iter().flatten().find(is_asked) {
        Some(container) => Err(Refusal::StartsBefore { container: container.name.clone() }),
        None => Ok(()),
    }
}

impl Asked {
    fn lead_probes(&mut self, container: &Container, value: &mut Value, earlier: Option<&AppDoors>) -> Result<(), Refusal> {
        for kind in ProbeKind::ALL {
            let probe = match kind {
                ProbeKind::Liveness => &container.liveness_probe,
                ProbeKind::Readiness => &container.readiness_probe,
                ProbeKind::Startup => &container.startup_probe,
            };
            let Some(probe) = probe else { continue };
            if probe.http_get.as_ref().is_some_and(|get| get.host.as_deref().is_some_and(|host| !host.is_empty())) {
                let (name, field) = (&container.name, kind.field());
                self.warnings.push(format!(
                    "container {name}: {field} asks a host of its own, as the node sees it, and stays as it is: the mesh refuses it if it is the pod"
                ));
                continue;
            }
            let name = door(&container.name, kind);
            let Some(ask) = ask(container, kind, probe, &name, earlier)? else { continue };
            let timeout_seconds = probe.timeout_seconds.and_then(|seconds| u32::try_from(seconds).ok()).filter(|s| *s > 0);
            if let Some(Value::Object(probe)) = value.get_mut(kind.field()) {
                for action in ["httpGet", "tcpSocket", "grpc"] {
                    probe.remove(action);
                }
                let get = json!({ "path": format!("{PROBE_PATH}{name}"), "port": PORT_METRICS, "scheme": "HTTP" });
                probe.insert("httpGet".to_owned(), get);
            }
            self.doors.probes.insert(name, AppProbe { ask, timeout_seconds: timeout_seconds.unwrap_or(1) });
        }
        Ok(())
    }

    /// The kubelet's calls at a container's start and end come from outside the mesh too. They are not led to the sidecar: what
    /// an app does at its end is nothing for everybody who reaches the pod to ask.
    fn warn_of_hooks(&mut self, container: &Container) {
        let Some(lifecycle) = &container.lifecycle else { return };
        for (hook, handler) in [("postStart", &lifecycle.post_start), ("preStop", &lifecycle.pre_stop)] {
            let Some(LifecycleHandler { http_get, tcp_socket, .. }) = handler else { continue };
            if http_get.is_some() || tcp_socket.is_some() {
                let name = &container.name;
                self.warnings.push(format!(
                    "container {name}: lifecycle.{hook} is a connection of the kubelet, which the mesh refuses unless a PeerAuthentication permits plaintext; use exec"
                ));
            }
        }
    }

    fn lead_metrics(
        &mut self,
        spec: &PodSpec,
        notes: &mut Map<String, Value>,
        earlier: Option<&AppDoors>,
    ) -> Result<(), Refusal> {
        let note = |name: &str| notes.get(name).and_then(Value::as_str);
        if note(SCRAPE) != Some("true") {
            return Ok(());
        }
        let path = note(PATH).unwrap_or("/metrics");
        if path == METRICS_PATH && note(PORT) == Some(PORT_METRICS.to_string().as_str()) {
            self.doors.metrics = Some(earlier.and_then(|earlier| earlier.metrics.clone()).ok_or(Refusal::MetricsForged)?);
            return Ok(());
        }
        // Without the annotation Prometheus takes each port that the containers name; the sidecar takes the first.
        let first = spec.containers.iter().flat_map(|container| container.ports.iter().flatten()).next();
        let port = match note(PORT) {
            Some(port) => port.parse().ok(),
            None => first.and_then(|port| u16::try_from(port.container_port).ok()),
        };
        let Some(port) = port.filter(|port| *port != 0 && !SIDECARS_PORTS.contains(port)) else {
            self.warnings
                .push(format!("annotation {PORT}: it names no port of the app, so its metrics are not led to the sidecar"));
            return Ok(());
        };
        let tls = note(SCHEME) == Some("https");
        self.doors.metrics = Some(HttpDoor { port, path: rooted(path), tls, headers: Vec::new() });
        if tls {
            notes.insert(SCHEME.to_owned(), "http".into());
        }
        notes.insert(PORT.to_owned(), PORT_METRICS.to_string().into());
        notes.insert(PATH.to_owned(), METRICS_PATH.into());
        Ok(())
    }
}

/// What the kubelet would ask; none where the probe stays as it is.
fn ask(
    container: &Container,
    kind: ProbeKind,
    probe: &Probe,
    name: &str,
    earlier: Option<&AppDoors>,
) -> Result<Option<Ask>, Refusal> {
    if let Some(get) = &probe.http_get {
        let path = get.path.as_deref().unwrap_or_default();
        if get.port == IntOrString::Int(i32::from(PORT_METRICS)) {
            if !path.starts_with(PROBE_PATH) {
                // The sidecar's own readiness, say.
                return Ok(None);
            }
            let known = earlier.filter(|_| path.strip_prefix(PROBE_PATH) == Some(name));
            let known = known.and_then(|earlier| earlier.probes.get(name)).map(|probe| probe.ask.clone());
            return known.map(Some).ok_or_else(|| Refusal::ProbeForged { container: container.name.clone(), kind });
        }
        let headers = get.http_headers.iter().flatten().map(|header| (header.name.clone(), header.value.clone())).collect();
        let port = port(container, kind, &get.port)?;
        return Ok(Some(Ask::Http(HttpDoor { port, path: rooted(path), tls: get.scheme.as_deref() == Some("HTTPS"), headers })));
    }
    if let Some(socket) = &probe.tcp_socket {
        if socket.host.as_deref().is_some_and(|host| !host.is_empty()) {
            return Ok(None);
        }
        return Ok(Some(Ask::Tcp(TcpDoor { port: port(container, kind, &socket.port)? })));
    }
    let Some(grpc) = &probe.grpc else { return Ok(None) };
    let port = port(container, kind, &IntOrString::Int(grpc.port))?;
    Ok(Some(Ask::Grpc(GrpcDoor { port, service: grpc.service.clone().unwrap_or_default() })))
}

fn port(container: &Container, kind: ProbeKind, written: &IntOrString) -> Result<u16, Refusal> {
    let number = match written {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            let mut ports = container.ports.iter().flatten();
            let named = ports.find(|port| port.name.as_deref() == Some(name)).map(|port| port.container_port);
            named.or_else(|| name.parse().ok()).ok_or_else(|| Refusal::NamedPort {
                container: container.name.clone(),
                kind,
                port: name.clone(),
            })?
        }
    };
    let port = u16::try_from(number).ok().filter(|port| *port != 0 && !SIDECARS_PORTS.contains(port));
    port.ok_or_else(|| Refusal::ProbePort { container: container.name.clone(), kind, port: number })
}

fn rooted(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

const SCRAPE: &str = "prometheus.io/scrape";
const PORT: &str = "prometheus.io/port";
const PATH: &str = "prometheus.io/path";
const SCHEME: &str = "prometheus.io/scheme";
