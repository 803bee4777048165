//! Services without an address of their own (`clusterIP: None`): who calls one has resolved its name to the addresses of the
//! workloads behind it, and dials one of them.
//!
//! So the connection stays with that workload, and no port is translated (Kubernetes, "Headless Services"); for all else it
//! is one to the Service: its routes, and the limits, budgets and breakers of its policies, which all its workloads share.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::compile::Own;
use super::service::{endpoint_at, is_sidecars, target_port};
use super::{Backend, Endpoint, RouteRule, ServicePort, WeightedBackend};
use crate::base::names::Named;
use crate::model::Resources;
use crate::model::object::Object;
use crate::model::service::{ServicePortSpec, ServiceSpec};
use crate::model::workload::WorkloadSpec;

/// The workloads to which the name of a Service without an address leads, by each of their addresses. Others have none.
pub(super) fn workloads<'a>(
    resources: &'a Resources,
    service: &Object<ServiceSpec>,
) -> impl Iterator<Item = (IpAddr, &'a Object<WorkloadSpec>)> {
    let all = service.spec.is_headless().then(|| resources.workloads_in(&service.metadata.namespace));
    let selected = service.spec.leads_to(all.into_iter().flatten());
    selected.flat_map(|workload| workload.spec.addresses.iter().map(move |address| (address.to_canonical(), workload)))
}

/// What is dialled there, and the Service's port as this one of the workloads behind it has it; none where that is no port of an application.
pub(super) fn at(
    port: &ServicePort,
    written: &ServicePortSpec,
    (address, workload): (IpAddr, &Object<WorkloadSpec>),
    own: &Own,
) -> Option<(SocketAddr, ServicePort)> {
    let endpoint = endpoint_at(workload, address, target_port(written, &workload.spec)?, own)?;
    (!is_sidecars(&endpoint)).then(|| (endpoint.address, pinned(port, endpoint)))
}

/// The port with one endpoint in the place of all that the Service has.
fn pinned(port: &ServicePort, endpoint: Endpoint) -> ServicePort {
    let ServicePort { service, port: number, protocol, rules, streams, default_backend } = port;
    let Backend { service: of, port: at, protocol: speaks, endpoints: _, connect_timeout, budget, breaker, ejections } =
        default_backend.as_ref();
    let alone = Arc::new(Backend {
        service: of.clone(),
        port: *at,
        protocol: *speaks,
        endpoints: vec![Arc::new(endpoint)],
        connect_timeout: *connect_timeout,
        budget: Arc::clone(budget),
        breaker: Arc::clone(breaker),
        ejections: Arc::clone(ejections),
    });
    let is_own = |backend: &WeightedBackend| backend.backend.as_ref().is_some_and(|known| Arc::ptr_eq(known, default_backend));
    let rules = rules.iter().map(|rule| {
        if !rule.backends.iter().any(is_own) {
            return Arc::clone(rule);
        }
        let RouteRule { name, hosts, matches, backends, policies } = rule.as_ref();
        let mut backends = backends.clone();
        for backend in backends.iter_mut().filter(|backend| is_own(backend)) {
            backend.backend = Some(Arc::clone(&alone));
        }
        let (name, hosts, matches, policies) = (name.clone(), hosts.clone(), matches.clone(), policies.clone());
        Arc::new(RouteRule { name, hosts, matches, backends, policies })
    });
    let rules = rules.collect();
    let mut streams = streams.clone();
    for backend in streams.iter_mut().flat_map(|rule| &mut rule.backends).filter(|backend| is_own(backend)) {
        backend.backend = Some(Arc::clone(&alone));
    }
    ServicePort { service: service.clone(), port: *number, protocol: *protocol, rules, streams, default_backend: alone }
}

/// Which of the Services at a workload's port a request for `host` (lower case, without port) is for: the one that it names,
/// else the first. One for an address is for the workload itself.
pub(super) fn called<'a>(ports: &'a [Arc<ServicePort>], host: &str) -> Option<&'a Arc<ServicePort>> {
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    if address.parse::<IpAddr>().is_ok() {
        return None;
    }
    let host = host.strip_suffix('.').unwrap_or(host);
    ports.iter().find(|port| is_name(host, port)).or_else(|| ports.first())
}

/// Is the host a name of the Service, or of its workload below it?
fn is_name(host: &str, port: &ServicePort) -> bool {
    let of_workload = |endpoint: &Arc<Endpoint>| {
        let Named { name, .. } = &endpoint.workload;
        host.strip_prefix(&**name).and_then(|rest| rest.strip_prefix('.')).is_some_and(|rest| super::names(rest, &port.service))
    };
    super::names(host, &port.service) || port.default_backend.endpoints.iter().any(of_workload)
}
