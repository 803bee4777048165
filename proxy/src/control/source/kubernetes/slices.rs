//! EndpointSlices that no controller made of pods: where a Service without a selector leads. Pure.
//!
//! Sources: Kubernetes API, EndpointSlice; "Services without selectors". The mesh finds what is behind a Service by labels. So
//! such a Service is given a selector of ours, and each address of its slices a label that it selects: a pod that has the
//! address, or else a Workload of its own, which is dialled in plaintext. Where all slices give a port of the Service the same
//! number, it leads to that number, whatever a pod calls its ports. Elsewhere it leads to a name, which differs in number from
//! address to address, and a port of a slice is named as the Service's port.

use std::collections::BTreeMap;
use std::net::IpAddr;

use aws_lc_rs::digest::{SHA256, digest};
use serde::Deserialize;
use serde_json::Value;

use crate::base::names::Named;
use crate::model::object::Object;
use crate::model::service::{PortRef, ServiceSpec};
use crate::model::workload::{WorkloadPort, WorkloadSpec, WorkloadTransport};

/// What is kept of one slice.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Slice {
    name: String,
    /// The Service whose endpoints it holds, in its own namespace.
    pub(super) service: Named,
    pub(super) endpoints: Vec<Endpoint>,
    /// By the Service's name of the port.
    pub(super) ports: Vec<WorkloadPort>,
}

/// One address of a slice.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Endpoint {
    pub(super) address: IpAddr,
    node: Option<String>,
    is_ready: bool,
    is_terminating: bool,
}

impl Slice {
    /// None: it is of no Service, of names instead of addresses, or no slice.
    pub(super) fn read(body: &Value) -> Option<Self> {
        let Written { metadata, endpoints, ports } = Written::deserialize(body).ok()?;
        let service = Named::new(metadata.namespace, metadata.labels.get(SERVICE_NAME)?.as_str());
        let endpoints = endpoints.unwrap_or_default().into_iter().filter_map(|written| {
            let Conditions { ready, terminating } = written.conditions.unwrap_or_default();
            // The addresses of one endpoint are the same thing; consumers may take the first alone.
            let address = written.addresses.first()?.parse().ok()?;
            let is_terminating = terminating.unwrap_or_default();
            // What is not said counts as ready.
            Some(Endpoint { address, node: written.node_name, is_ready: ready.unwrap_or(true), is_terminating })
        });
        let tcp = ports.unwrap_or_default().into_iter().filter(|port| port.protocol.as_deref().is_none_or(|of| of == "TCP"));
        let ports = tcp.filter_map(|port| {
            Some(WorkloadPort { name: Some(port_name(port.name.as_deref())), port: port.port?, app_protocol: port.app_protocol })
        });
        Some(Self { name: metadata.name, service, endpoints: endpoints.collect(), ports: ports.collect() })
    }

    /// The Workload of one of its addresses, which no pod has. A Service names a port, and the port a protocol, so the slice's
    /// ports go along.
    pub(super) fn workload(&self, endpoint: &Endpoint) -> Object<WorkloadSpec> {
        let name = Named::new(&*self.service.namespace, self.name_of(endpoint.address));
        let spec = WorkloadSpec {
            addresses: vec![endpoint.address],
            ports: self.ports.clone(),
            transport: WorkloadTransport::Plaintext,
            terminating: endpoint.is_terminating,
            unready: !endpoint.is_ready,
            node: endpoint.node.clone(),
            ..WorkloadSpec::default()
        };
        Object::new(&name, self.labels(), spec)
    }

    /// Adds to the Workload of a pod that has one of its addresses what makes it this Service's, too.
    pub(super) fn add_to(&self, workload: &mut Object<WorkloadSpec>) {
        workload.metadata.labels.extend(self.labels());
        for port in &self.ports {
            let known = &mut workload.spec.ports;
            if let Some(same) = known.iter_mut().find(|known| known.port == port.port) {
                // A port has one name here. What is written for this Service alone is not needed where the pod names it as well.
                if same.name.is_none() {
                    same.name.clone_from(&port.name);
                }
            } else if known.iter().all(|known| known.name != port.name) {
                known.push(port.clone());
            }
        }
    }

    /// The number of the Service's port of this name.
    pub(super) fn number_of(&self, port: &str) -> Option<u16> {
        self.ports.iter().find(|known| known.name.as_deref() == Some(port)).map(|known| known.port)
    }

    /// A name of its own for each address of each slice. Names of slices may be too long to be a part of one.
    fn name_of(&self, address: IpAddr) -> String {
        let digest = digest(&SHA256, format!("{} {address}", self.name).as_bytes());
        let digest: String = digest.as_ref().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        let slice: String = self.name.chars().take(SHOWN).collect();
        format!("{slice}-{digest}")
    }

    fn labels(&self) -> BTreeMap<String, String> {
        BTreeMap::from([(format!("{BEHIND}{}", self.service.name), "true".to_owned())])
    }
}

/// Makes a Service without a selector one that leads to what its slices hold. `number`: that of a port, where they agree on it.
pub(super) fn lead(service: &mut Object<ServiceSpec>, number: impl Fn(&str) -> Option<u16>) {
    service.spec.selector = BTreeMap::from([(format!("{BEHIND}{}", service.metadata.name), "true".to_owned())]);
    for port in &mut service.spec.ports {
        let name = port_name(port.name.as_deref());
        port.target_port = Some(number(&name).map_or(PortRef::Name(name), PortRef::Number));
    }
}

/// A port without a name has the empty one, which is no name here.
fn port_name(name: Option<&str>) -> String {
    name.filter(|name| !name.is_empty()).unwrap_or("port").to_owned()
}

#[derive(Deserialize)]
struct Written {
    metadata: Metadata,
    #[serde(default)]
    endpoints: Option<Vec<WrittenEndpoint>>,
    #[serde(default)]
    ports: Option<Vec<Port>>,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
    namespace: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WrittenEndpoint {
    #[serde(default)]
    addresses: Vec<String>,
    conditions: Option<Conditions>,
    node_name: Option<String>,
}

#[derive(Default, Deserialize)]
struct Conditions {
    ready: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Port {
    name: Option<String>,
    port: Option<u16>,
    protocol: Option<String>,
    app_protocol: Option<String>,
}

const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// How much of a slice's name is seen in the name of its Workload.
const SHOWN: usize = 40;

/// What the label begins with that leads to an address of a Service's slices.
const BEHIND: &str = "service.outrigger.dev/";
