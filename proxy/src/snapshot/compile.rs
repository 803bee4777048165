//! From resources to a snapshot: the same function in the sidecar that runs them and in the tools that check them.
//!
//! Pure and total. Each resource compiles by itself; one that does not is a list of problems and leaves the others alone.
//! A security policy that does not compile closes what it is for: who cannot be told whom to let in lets nobody in.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::attached::{self, Attached};
use super::cluster_address::ClusterAddresses;
use super::route_table::{self, Table};
use super::service::{self, Backends};
use super::service_claims::{self, Taken};
use super::{
    AppProtocol, Egress, Inbound, MeshSettings, Outbound, ServicePort, Snapshot, claims, headless, inbound, references, route,
    rules,
};
use crate::base::names::{LABELS, NameError, Named, check_host, check_name, check_part, label_fault};
use crate::base::problems::{FieldPath, Problems};
use crate::identity::spiffe::TrustDomain;
use crate::model::capture::SIDECARS_PORTS;
use crate::model::mesh::{Choice, MeshSpec, Network};
use crate::model::object::Object;
use crate::model::reference_grant::ReferenceGrantSpec;
use crate::model::service::{NO_ADDRESS, PortRef, ServiceSpec};
use crate::model::workload::{WorkloadSpec, WorkloadTransport};
use crate::model::{Kind, Resource, ResourceKey, Resources};
use crate::policy::limits::Limits;

/// For whom a snapshot is compiled.
#[derive(Clone, Debug)]
pub(crate) struct Own {
    /// The sidecar's own pod.
    pub(crate) workload: Named,
    /// Of which the identities of the mesh's workloads are.
    pub(crate) trust_domain: TrustDomain,
}

/// Takes a new form of one resource into `resources`, or why it could not be read. A form that does not compile leaves the
/// last good one in force; where there is none, the resource counts as refused, which closes the target of a security
/// policy. The problems of this one resource are returned; `refused()` of them says that the form was not taken.
pub(crate) fn admit(resources: &mut Resources, key: ResourceKey, form: Result<Arc<Resource>, String>) -> Problems {
    let (problems, form) = match form {
        Ok(resource) => (alone(&key, &resource), Some(resource)),
        Err(reason) => {
            let mut problems = Problems::of(&key);
            problems.refuse(&FieldPath::root(), reason, "correct the document, or let both sides run the same version");
            (problems, None)
        }
    };
    match form {
        Some(resource) if !problems.refused() => {
            resources.refused.remove(&key);
            resources.by_key.insert(key, resource);
        }
        form if !resources.by_key.contains_key(&key) => {
            resources.refused.insert(key, form);
        }
        _ => {}
    }
    problems
}

/// The resource is no longer there.
pub(crate) fn forget(resources: &mut Resources, key: &ResourceKey) {
    resources.by_key.remove(key);
    resources.refused.remove(key);
}

/// Builds what the sidecar of `own` reads. Total: what is wrong is a problem, never a panic or a missing snapshot. State
/// (buckets, budgets, breakers, ejections) is carried over from `previous` where its configuration is the same.
///
/// The problems are those of the resources that are given; for what they refer to and is not there, see [`check`].
pub(crate) fn compile(resources: &Resources, own: &Own, previous: &Snapshot) -> (Snapshot, Problems) {
    let mut problems = Problems::default();
    for (key, resource) in &resources.by_key {
        problems.append(alone(key, resource));
    }
    // Who passes the documents on sends one Workload of an address. Where there are two all the same, as between two parts of
    // an answer, one counts.
    let in_force = claims::in_force(resources);
    let resources = in_force.as_ref();
    let mesh = mesh_of(resources);
    // Without the own Workload nothing is known of the pod: nobody is let in, as before the first configuration.
    let inbound = inbound::build(resources, own, mesh.default_authorization, &previous.inbound).unwrap_or_else(closed);
    let settings = MeshSettings {
        ranges: mesh.networks(),
        egress: match mesh.egress {
            Choice::Allow => Egress::Allow,
            Choice::Deny => Egress::Deny,
        },
        access_log: mesh.access_log_sample(),
        trace_sample: mesh.trace_sample(),
        limits: limits_of(&mesh, &mut Problems::default()),
    };
    let outbound = outbound(resources, own, &previous.outbound);
    (Snapshot { generation: previous.generation.saturating_add(1), mesh: settings, inbound, outbound }, problems)
}

fn limits_of(mesh: &MeshSpec, problems: &mut Problems) -> Limits {
    let at = FieldPath::root().field("spec").field("limits");
    mesh.limits.as_ref().map_or_else(Limits::default, |limits| limits.compile(&at, problems))
}

/// All problems of a set of documents, as `outrigger check` and the control plane tell them: those of each by itself, and
/// those of what they say about each other. `lost_services` have none of the addresses that they write.
pub(crate) fn check(resources: &Resources, lost_services: &BTreeMap<Named, Taken>) -> Problems {
    let mut problems = Problems::default();
    for (key, resource) in &resources.by_key {
        problems.append(alone(key, resource));
    }
    problems.append(references::check(resources, lost_services));
    problems
}

/// The problems of what the documents say about each other: names that nothing has, two that want the same.
pub(crate) fn references(resources: &Resources) -> Problems {
    references::check(resources, &service_claims::lost_among(resources))
}

/// The security policies of which a target does not exist, each with that target and what it means.
pub(crate) fn without_target(resources: &Resources) -> BTreeMap<(ResourceKey, ResourceKey), &'static str> {
    references::without_target(resources)
}

/// The problems of principals that no peer of the mesh with this trust domain can have.
pub(crate) fn check_domains(resources: &Resources, own: &TrustDomain) -> Problems {
    rules::check_domains(resources, own.as_str())
}

/// The DENY policies with such a principal, and what that means.
pub(crate) fn denying_nobody(resources: &Resources, own: &TrustDomain) -> BTreeSet<(ResourceKey, String)> {
    rules::denying_nobody(resources, own.as_str())
}

/// The problems of one resource by itself.
pub(crate) fn alone(key: &ResourceKey, resource: &Resource) -> Problems {
    let mut problems = Problems::of(key);
    match resource {
        Resource::Mesh(mesh) => {
            check_mesh(&mesh.spec, &mut problems);
            limits_of(&mesh.spec, &mut problems);
        }
        Resource::Service(service) => check_service(service, &mut problems),
        Resource::Workload(workload) => check_workload(workload, &mut problems),
        Resource::HttpRoute(_) | Resource::GrpcRoute(_) | Resource::TlsRoute(_) | Resource::TcpRoute(_) => {
            drop(route::compile(resource, &mut problems));
        }
        Resource::ReferenceGrant(grant) => check_grant(&grant.spec, &mut problems),
        Resource::AuthorizationPolicy(policy) => drop(inbound::compile_authorization(policy, &mut problems)),
        Resource::RequestAuthentication(policy) => drop(inbound::compile_tokens(policy, &mut problems)),
        Resource::PeerAuthentication(policy) => {
            inbound::check_peers(policy, &mut problems);
        }
        Resource::TrafficPolicy(policy) => drop(service::compile_traffic(policy, &mut problems)),
    }
    problems
}

fn check_grant(grant: &ReferenceGrantSpec, problems: &mut Problems) {
    let at = FieldPath::root().field("spec");
    for (field, is_empty) in [("from", grant.from.is_empty()), ("to", grant.to.is_empty())] {
        if is_empty {
            problems.warn(&at.field(field), "nothing is named, so that nothing is granted", "name whom and what it is for");
        }
    }
}

/// The one Mesh that counts.
pub(crate) fn mesh_of(resources: &Resources) -> MeshSpec {
    let mut meshes = resources.of_kind(Kind::Mesh).filter_map(|(_, resource)| match resource {
        Resource::Mesh(mesh) => Some(mesh.spec.clone()),
        _ => None,
    });
    meshes.next().unwrap_or_default()
}

fn closed() -> Inbound {
    Snapshot::empty().inbound
}

fn outbound(resources: &Resources, own: &Own, previous: &Outbound) -> Outbound {
    let routes: Vec<Attached<'_>> = attached::compile_all(resources);
    let mut backends = Backends::new(resources, own, previous);
    let mut services = BTreeMap::new();
    let mut headless: BTreeMap<SocketAddr, Vec<Arc<ServicePort>>> = BTreeMap::new();
    let asked = resources.called.as_ref();
    let is_asked = |address: &IpAddr| asked.is_none_or(|called| called.addresses.contains(address));
    let cluster = ClusterAddresses::of(resources);
    let workloads = resources.workloads().flat_map(|workload| &workload.spec.addresses);
    let taken: BTreeSet<IpAddr> = workloads.map(IpAddr::to_canonical).collect();
    // Who passes the documents on sends one Service of an address, as with Workloads.
    let lost = service_claims::lost_among(resources);
    for object in resources.services() {
        let name = object.named();
        let mut addresses = cluster.of_service(object, |address| taken.contains(&address));
        if lost.contains_key(&name) {
            addresses.clear();
        }
        let is_named = asked.is_some_and(|called| called.services.contains(&name));
        let behind: Vec<_> =
            headless::workloads(resources, object).filter(|(address, _)| is_named || is_asked(address)).collect();
        if !is_named && asked.is_some() && behind.is_empty() && !addresses.iter().any(is_asked) {
            continue;
        }
        let fault = service::traffic_of(resources, &name).fault;
        for port in object.spec.ports.iter().filter(|port| port.is_tcp()) {
            let Some(default_backend) = backends.backend(&name, port.port) else { continue };
            let Table { rules, streams } = route_table::build(&routes, &name, port, fault.as_ref(), own, &mut backends);
            let protocol = if streams.is_empty() { default_backend.protocol } else { AppProtocol::Opaque };
            let (service, port_number) = (name.clone(), port.port);
            let built = Arc::new(ServicePort { service, port: port_number, protocol, rules, streams, default_backend });
            for address in &addresses {
                services.insert(SocketAddr::new(*address, port.port), Arc::clone(&built));
            }
            for workload in &behind {
                if let Some((dialled, built)) = headless::at(&built, port, *workload, own) {
                    headless.entry(dialled).or_default().push(Arc::new(built));
                }
            }
        }
    }
    let mut workloads = BTreeMap::new();
    for workload in resources.workloads() {
        for address in &workload.spec.addresses {
            let address = address.to_canonical();
            // Services without an address may lead to one that is known in part, as an endpoint of another service.
            if !is_asked(&address) {
                continue;
            }
            if let Some(endpoint) = service::endpoint_at(workload, address, 0, own) {
                let previous = previous.workloads.get(&address).filter(|known| ***known == endpoint);
                workloads.insert(address, previous.map_or_else(|| Arc::new(endpoint), Arc::clone));
            }
        }
    }
    Outbound { services, headless, workloads, backends: backends.finish(), absent: resources.absent.clone() }
}

/// The cluster addresses of a service, as they are written.
pub(crate) fn addresses(service: &Object<ServiceSpec>) -> BTreeSet<IpAddr> {
    service.spec.addresses().filter_map(|address| address.parse().ok()).map(|address: IpAddr| address.to_canonical()).collect()
}

/// What an address is that stands for no host that others could reach, or for more than one; none where it may be a host's.
fn no_host(address: IpAddr) -> Option<&'static str> {
    let address = address.to_canonical();
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if address.is_unspecified() {
        Some("no address at all")
    } else if matches!(address, IpAddr::V4(v4) if v4.octets()[0] == 0) {
        Some("no address of a host: 0.0.0.0/8 means this network (RFC 1122 3.2.1.3)")
    } else if matches!(address, IpAddr::V4(v4) if v4.octets()[0] >= 240 && v4 != Ipv4Addr::BROADCAST) {
        Some("reserved: nothing is reached in 240.0.0.0/4 (RFC 1112 4)")
    } else if address.is_loopback() {
        Some("a loopback address: on every machine it is the machine itself")
    } else if address.is_multicast() || address == IpAddr::V4(Ipv4Addr::BROADCAST) {
        Some("the address of many, not of one")
    } else if link_local {
        Some("a link-local address: it means something on one link alone")
    } else {
        None
    }
}

/// Is it a port of the sidecar's own, to which nobody is proxied: outbound, inbound, probes, administration?
pub(crate) fn is_own_port(port: u16) -> bool {
    use proxy_common::{PORT_ADMIN, PORT_INBOUND, PORT_OUTBOUND, PORT_PROBE};
    [PORT_OUTBOUND, PORT_INBOUND, PORT_PROBE, PORT_ADMIN].contains(&port)
}

/// Is it a port at which a sidecar listens for itself, so that no service leads to an application there? Beside its own ports,
/// its metrics: whoever wants those dials them at the pod, in plaintext.
pub(super) fn is_sidecars(port: u16) -> bool {
    SIDECARS_PORTS.contains(&port)
}

/// What is said of a service that leads to one.
pub(super) fn own_port_text(port: u16) -> String {
    let outcome = if is_own_port(port) { "421 own_port" } else { "503, the sidecar's metrics are there" };
    format!("{port} is a port of the sidecar's own; a pod that has one is not reached there: {outcome}")
}

/// Does a word say what a port speaks?
pub(crate) fn is_protocol(word: &str) -> bool {
    service::protocol_named(word).is_some()
}

/// What to write instead of a word that does not.
pub(crate) const PROTOCOLS: &str = "write http, http2, grpc, tcp, or leave it out";

fn check_mesh(mesh: &MeshSpec, problems: &mut Problems) {
    let at = FieldPath::root().field("spec").field("ranges");
    let remedy = "write the networks of pods and services, or leave it out for those of a local mesh";
    for (index, Network(range)) in mesh.ranges.iter().flatten().enumerate() {
        if range.prefix_len() == 0 {
            let text = format!("{range} is every address there is: nothing would be outside of the mesh");
            problems.refuse(&at.index(index), text, remedy);
        }
    }
    if let Some(every) = every_address(&mesh.networks())
        && !problems.refused()
    {
        let text = format!("the ranges together are every address of {every}: nothing would be outside of the mesh");
        problems.refuse(&at, text, remedy);
    }
    if mesh.ranges.as_ref().is_some_and(Vec::is_empty) {
        problems.refuse(&at, "the mesh has no range: nothing would be in the mesh", remedy);
    }
}

/// The family of which these networks hold every address, if they do. An address of IPv4 may be written as one of IPv6.
fn every_address(ranges: &[IpNet]) -> Option<&'static str> {
    let v4 = ranges.iter().filter_map(|range| match range {
        IpNet::V4(v4) => Some(*v4),
        IpNet::V6(v6) => {
            let address = v6.network().to_ipv4_mapped()?;
            Ipv4Net::new(address, v6.prefix_len().checked_sub(96)?).ok()
        }
    });
    let v6 = ranges.iter().filter_map(|range| if let IpNet::V6(v6) = range { Some(*v6) } else { None });
    if Ipv4Net::aggregate(&v4.collect()).iter().any(|range| range.prefix_len() == 0) {
        Some("IPv4")
    } else if Ipv6Net::aggregate(&v6.collect()).iter().any(|range| range.prefix_len() == 0) {
        Some("IPv6")
    } else {
        None
    }
}

fn check_service(service: &Object<ServiceSpec>, problems: &mut Problems) {
    let at = FieldPath::root().field("spec");
    if let Err(error) = check_part(&service.metadata.name) {
        told(&FieldPath::root().field("metadata").field("name"), &error, problems);
    }
    check_labels(&service.spec.selector, &at.field("selector"), problems);
    check_cluster_ips(&service.spec, &at, problems);
    let mut names = BTreeSet::new();
    let mut seen = BTreeSet::new();
    for (index, port) in service.spec.ports.iter().enumerate() {
        let at = at.field("ports").index(index);
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        check_port(port.name.as_deref(), (protocol, port.port), &at, (&mut names, &mut seen), problems);
        let number = match &port.target_port {
            None => Some(port.port),
            Some(PortRef::Number(number)) => Some(*number),
            Some(PortRef::Name(_)) => None,
        };
        if number == Some(0) && port.target_port.is_some() {
            problems.refuse(&at.field("targetPort"), "0 is not a port", "write 1 to 65535, or a port's name");
        }
        if let Some(number) = number.filter(|number| is_sidecars(*number) && port.is_tcp()) {
            let field = at.field(if port.target_port.is_some() { "targetPort" } else { "port" });
            // Who reads the metrics of pods from outside of the mesh finds them by such a Service, and dials them there.
            if service.spec.is_headless() && number == proxy_common::PORT_METRICS {
                problems.warn(&field, own_port_text(number), "leave it to callers outside of the mesh");
            } else {
                let remedy = "write a port of the application, or, where it is one of workloads without a sidecar, its name";
                problems.refuse(&field, own_port_text(number), remedy);
            }
        }
        if port.name.is_none() && service.spec.ports.len() > 1 {
            let text = "the port has no name, and is one of several";
            problems.refuse(&at.field("name"), text, "give each port a name of its own, as Kubernetes demands it");
        }
        if !port.is_tcp() {
            problems.warn(&at.field("protocol"), "the port is not TCP and means nothing here", "leave it to others");
        }
        check_protocol(port.app_protocol.as_deref(), &at, problems);
    }
}

/// Kubernetes writes one address into both fields: what differs says two things.
fn check_cluster_ips(service: &ServiceSpec, at: &FieldPath, problems: &mut Problems) {
    for address in service.addresses() {
        let field = at.field(if service.cluster_ips.is_empty() { "clusterIP" } else { "clusterIPs" });
        let remedy = "write one as 10.65.1.1, or leave it out";
        match address.parse::<IpAddr>() {
            Ok(ip) => {
                if let Some(what) = no_host(ip) {
                    problems.refuse(&field, format!("{address} is {what}"), remedy);
                }
            }
            Err(_not_one) => problems.refuse(&field, format!("{address:?} is not an IP address"), remedy),
        }
    }
    let canonical = |text: &str| text.parse::<IpAddr>().map_or_else(|_| text.to_owned(), |ip| ip.to_canonical().to_string());
    let single = service.cluster_ip.as_deref().filter(|address| !address.is_empty());
    let mut seen = BTreeSet::new();
    for (index, address) in service.cluster_ips.iter().enumerate() {
        if !seen.insert(canonical(address)) {
            let text = format!("the address {address} is there already");
            problems.refuse(&at.field("clusterIPs").index(index), text, "write each address once");
        }
    }
    if let (Some(single), Some(first)) = (single, service.cluster_ips.first())
        && canonical(single) != canonical(first)
    {
        let text = format!("clusterIP is {single} and the first of clusterIPs is {first}: they are one address");
        problems.refuse(&at.field("clusterIP"), text, "write the same in both, or leave one of them out");
    } else if service.cluster_ips.len() > 1 && service.cluster_ips.iter().any(|address| address == NO_ADDRESS) {
        let text = "a Service has no address (None) or it has some";
        problems.refuse(&at.field("clusterIPs"), text, "write None alone, or the addresses without it");
    }
}

fn check_workload(workload: &Object<WorkloadSpec>, problems: &mut Problems) {
    let at = FieldPath::root().field("spec").field("addresses");
    if workload.spec.addresses.is_empty() && workload.spec.node.is_none() {
        problems.refuse(&at, "the workload has no address", "write at least one");
    }
    let mut seen = BTreeSet::new();
    for (index, address) in workload.spec.addresses.iter().enumerate() {
        let at = at.index(index);
        if let Some(what) = no_host(*address) {
            problems.refuse(&at, format!("{address} is {what}"), "write the address at which others reach it");
        } else if !seen.insert(address.to_canonical()) {
            problems.refuse(&at, format!("the address {address} is there already"), "write each address once");
        }
    }
    problems.append(pod(workload));
}

/// What is wrong with a workload but for its addresses: with what its writer says of it, or who runs a pod.
pub(crate) fn pod(workload: &Object<WorkloadSpec>) -> Problems {
    let mut problems = Problems::of(workload.key());
    let (metadata, at) = (FieldPath::root().field("metadata"), FieldPath::root().field("spec"));
    // A cluster cuts the host's name of a pod by itself.
    if workload.spec.node.is_none()
        && let Err(error) = check_host(&workload.metadata.name)
    {
        told(&metadata.field("name"), &error, &mut problems);
    }
    check_labels(&workload.metadata.labels, &metadata.field("labels"), &mut problems);
    if let Err(error) = check_name(workload.spec.account()) {
        problems.refuse(&at.field("serviceAccount"), error.to_string(), "write the name of a service account");
    }
    let mut names = BTreeSet::new();
    let mut seen = BTreeSet::new();
    for (index, port) in workload.spec.ports.iter().enumerate() {
        let at = at.field("ports").index(index);
        check_port(port.name.as_deref(), ("TCP", port.port), &at, (&mut names, &mut seen), &mut problems);
        if is_sidecars(port.port) && workload.spec.transport == WorkloadTransport::MutualTls {
            let text = format!("{} is a port of the sidecar's own, which is never the application's", port.port);
            problems.refuse(&at.field("port"), text, "write a port of the application");
        }
        check_protocol(port.app_protocol.as_deref(), &at, &mut problems);
    }
    problems
}

/// One port of a Service or a workload: named as no other and numbered as no other.
fn check_port<'a>(
    name: Option<&'a str>,
    port: (&'a str, u16),
    at: &FieldPath,
    (names, seen): (&mut BTreeSet<&'a str>, &mut BTreeSet<(&'a str, u16)>),
    problems: &mut Problems,
) {
    if let Some(name) = name {
        if let Err(error) = check_part(name) {
            told(&at.field("name"), &error, problems);
        }
        if !names.insert(name) {
            problems.refuse(&at.field("name"), format!("a port is named {name:?} already"), "give each port a name of its own");
        }
    }
    if port.1 == 0 {
        problems.refuse(&at.field("port"), "0 is not a port", "write 1 to 65535");
    } else if !seen.insert(port) {
        problems.refuse(&at.field("port"), format!("port {} is there already", port.1), "write each port once");
    }
}

fn check_protocol(word: Option<&str>, at: &FieldPath, problems: &mut Problems) {
    if let Some(word) = word.filter(|word| !is_protocol(word)) {
        problems.warn(&at.field("appProtocol"), format!("{word:?} means nothing here; the first bytes tell"), PROTOCOLS);
    }
}

fn check_labels(labels: &BTreeMap<String, String>, at: &FieldPath, problems: &mut Problems) {
    for text in labels.iter().filter_map(|(key, value)| label_fault(key, value)) {
        problems.refuse(at, text, LABELS);
    }
}

/// A name's error, which says what to write behind what is wrong.
fn told(at: &FieldPath, error: &NameError, problems: &mut Problems) {
    let text = error.to_string();
    let (text, remedy) = text.split_once("; ").unwrap_or((&text, "choose another name"));
    problems.refuse(at, text, remedy);
}
