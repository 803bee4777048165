//! A service as its callers see it: the workloads behind each port, and the policies of the service.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::compile::Own;
use super::live::{Carried, Cells};
use super::{AppProtocol, Backend, Endpoint, Outbound, Transport, compile, live};
use crate::base::names::Named;
use crate::base::problems::{FieldPath, Problems};
use crate::model::object::Object;
use crate::model::route::Route;
use crate::model::service::{InternalTrafficPolicy, ServicePortSpec, ServiceSpec};
use crate::model::target::TargetKind;
use crate::model::traffic_policy::TrafficPolicySpec;
use crate::model::workload::{WorkloadSpec, WorkloadTransport};
use crate::model::{Kind, Resource, ResourceKey, Resources};
use crate::policy::RuleName;
use crate::policy::breaker::Breaker;
use crate::policy::fault::{Fault, FaultConfig};
use crate::policy::outlier::Ejections;
use crate::policy::rate_limit::RateLimit;
use crate::policy::retry::RetryBudget;

/// How long a connection to an endpoint may take where no policy says it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A TrafficPolicy by itself.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    pub(super) budget: Option<RetryBudget>,
    pub(super) breaker: Option<Breaker>,
    pub(super) ejections: Option<Ejections>,
    pub(super) rate_limit: Option<RateLimit>,
    pub(super) fault: Option<Arc<Fault>>,
    pub(super) connect_timeout: Option<Duration>,
}

/// Reports every fault of the policy and returns it only if there is none.
pub(super) fn compile_traffic(policy: &Object<TrafficPolicySpec>, problems: &mut Problems) -> Option<Traffic> {
    let at = FieldPath::root().field("spec");
    let rule = |field: &str| RuleName::new(format!("TrafficPolicy/{} {field}", policy.named()));
    let spec = &policy.spec;
    if spec.target_refs.is_empty() && lent(policy).is_none() {
        let remedy = "name the Services that it is for, or say nothing but a fault, which rules of routes may refer to";
        problems.refuse(&at.field("targetRefs"), "the policy names no Service", remedy);
    }
    for (index, target) in spec.target_refs.iter().enumerate() {
        if target.kind != TargetKind::Service {
            let at = at.field("targetRefs").index(index).field("kind");
            problems.refuse(&at, "a TrafficPolicy is for Services", "write kind: Service");
        }
    }
    let mut traffic = Traffic::default();
    if let Some(budget) = &spec.retry_budget {
        traffic.budget = budget.compile(&at.field("retryBudget"), problems);
    }
    if let Some(breaking) = &spec.circuit_breaking {
        let at = at.field("circuitBreaking");
        if let Some(limits) = &breaking.limits {
            traffic.breaker = limits.compile(rule("circuitBreaking.limits"), &at.field("limits"), problems);
        }
        if let Some(ejection) = &breaking.ejection {
            traffic.ejections = ejection.compile(&at.field("ejection"), problems);
        }
        if breaking.limits.is_none() && breaking.ejection.is_none() {
            problems.warn(&at, "circuitBreaking says nothing", "write limits, ejection or both, or leave it out");
        }
    }
    if let Some(limit) = &spec.rate_limit {
        traffic.rate_limit = limit.compile(rule("rateLimit"), &at.field("rateLimit"), problems);
    }
    if let Some(fault) = &spec.fault {
        traffic.fault = fault.compile(rule("fault"), &at.field("fault"), problems).map(Arc::new);
    }
    if let Some(timeout) = spec.connect_timeout {
        if timeout.0.is_zero() {
            problems.refuse(&at.field("connectTimeout"), "0s is no time to connect in", "write at least 1ms, or leave it out");
        }
        traffic.connect_timeout = Some(timeout.0);
    }
    (!problems.refused()).then_some(traffic)
}

/// What a policy lends a rule of a route that refers to it: its fault, if it says nothing else.
fn lent(policy: &Object<TrafficPolicySpec>) -> Option<&FaultConfig> {
    let TrafficPolicySpec { target_refs: _, retry_budget, circuit_breaking, rate_limit, fault, connect_timeout } = &policy.spec;
    let says_more = retry_budget.is_some() || circuit_breaking.is_some() || rate_limit.is_some() || connect_timeout.is_some();
    fault.as_ref().filter(|_| !says_more)
}

/// Why a rule takes nothing from a policy.
pub(super) enum NotLent {
    Missing,
    SaysMore,
}

/// What the policy lends a rule of a route.
pub(super) fn lent_by(resources: &Resources, policy: &Named) -> Result<Arc<Fault>, NotLent> {
    let key = ResourceKey { kind: Kind::TrafficPolicy, name: policy.clone() };
    let Some(Resource::TrafficPolicy(object)) = resources.get(&key).map(AsRef::as_ref) else { return Err(NotLent::Missing) };
    lent(object).ok_or(NotLent::SaysMore)?;
    compile_traffic(object, &mut Problems::of(&key)).and_then(|traffic| traffic.fault).ok_or(NotLent::Missing)
}

/// What the policies of a service say together: each field from the first by name that has it.
pub(super) fn traffic_of(resources: &Resources, service: &Named) -> Traffic {
    let mut all = Traffic::default();
    for (key, resource) in resources.of_kind(Kind::TrafficPolicy) {
        let Resource::TrafficPolicy(policy) = resource else { continue };
        let is_target = |target: &crate::model::target::TargetRef| target.is(TargetKind::Service, &service.name);
        if key.name.namespace != service.namespace || !policy.spec.target_refs.iter().any(is_target) {
            continue;
        }
        let mut ignored = Problems::of(key);
        let Some(Traffic { budget, breaker, ejections, rate_limit, fault, connect_timeout }) =
            compile_traffic(policy, &mut ignored)
        else {
            continue;
        };
        all.budget = all.budget.or(budget);
        all.breaker = all.breaker.or(breaker);
        all.ejections = all.ejections.or(ejections);
        all.rate_limit = all.rate_limit.or(rate_limit);
        all.fault = all.fault.or(fault);
        all.connect_timeout = all.connect_timeout.or(connect_timeout);
    }
    all
}

/// The workload's port to which a service's port leads.
pub(super) fn target_port(port: &ServicePortSpec, workload: &WorkloadSpec) -> Option<u16> {
    workload.port(&port.target())
}

/// What a port speaks: `appProtocol`, else the port's name up to the first dash.
pub(super) fn protocol(app_protocol: Option<&str>, name: Option<&str>) -> AppProtocol {
    match app_protocol {
        Some(declared) => protocol_named(declared).unwrap_or_default(),
        None => name.and_then(|name| name.split('-').next()).and_then(protocol_named).unwrap_or_default(),
    }
}

/// What a word for a protocol means; none where it means nothing here.
pub(super) fn protocol_named(word: &str) -> Option<AppProtocol> {
    match word.to_ascii_lowercase().as_str() {
        "http" | "http1" | "kubernetes.io/ws" => Some(AppProtocol::Http),
        "http2" | "h2c" | "kubernetes.io/h2c" | "grpc" => Some(AppProtocol::Http2),
        "tcp" | "tls" | "https" | "kubernetes.io/wss" | "mongo" | "mysql" | "postgres" | "postgresql" | "redis" => {
            Some(AppProtocol::Opaque)
        }
        _ => None,
    }
}

/// Builds backends, each once.
pub(super) struct Backends<'a> {
    resources: &'a Resources,
    own: &'a Own,
    previous: &'a Outbound,
    built: BTreeMap<(Named, u16), Arc<Backend>>,
}

impl<'a> Backends<'a> {
    pub(super) fn new(resources: &'a Resources, own: &'a Own, previous: &'a Outbound) -> Self {
        Self { resources, own, previous, built: BTreeMap::new() }
    }

    /// One port of a service as somewhere to send requests; none where there is no such service or port.
    pub(super) fn backend(&mut self, service: &Named, port: u16) -> Option<Arc<Backend>> {
        let key = (service.clone(), port);
        if let Some(backend) = self.built.get(&key) {
            return Some(Arc::clone(backend));
        }
        let object = self.resources.service(service)?;
        let spec = object.spec.ports.iter().find(|spec| spec.port == port && spec.is_tcp())?;
        let endpoints = self.endpoints(object, spec);
        let traffic = traffic_of(self.resources, service);
        let previous = self.previous.backends.get(&key);
        let cells = Cells {
            budget: traffic.budget.unwrap_or_default(),
            breaker: traffic.breaker.unwrap_or_else(Breaker::by_default),
            ejections: traffic.ejections.unwrap_or_default(),
        };
        let Carried { budget, breaker, ejections } = cells.carried_from(previous);
        ejections.retain(&endpoints.iter().map(|endpoint| endpoint.address).collect::<Vec<_>>());
        let backend = Backend {
            service: service.clone(),
            port,
            protocol: protocol(spec.app_protocol.as_deref(), spec.name.as_deref()),
            endpoints,
            connect_timeout: traffic.connect_timeout.unwrap_or(CONNECT_TIMEOUT),
            budget,
            breaker,
            ejections,
        };
        let backend = live::share(backend, previous);
        self.built.insert(key, Arc::clone(&backend));
        Some(backend)
    }

    /// What a policy lends a rule that refers to it.
    pub(super) fn fault_of(&self, policy: &Named) -> Option<Arc<Fault>> {
        lent_by(self.resources, policy).ok()
    }

    /// May the route lead to this service?
    pub(super) fn permits(&self, route: &Route<'_>, service: &Named) -> bool {
        self.resources.permits(route, service)
    }

    /// All that were built.
    pub(super) fn finish(self) -> BTreeMap<(Named, u16), Arc<Backend>> {
        self.built
    }

    fn endpoints(&self, service: &Object<ServiceSpec>, port: &ServicePortSpec) -> Vec<Arc<Endpoint>> {
        let workloads = self.resources.workloads_in(&service.metadata.namespace);
        let node = self.resources.workload(&self.own.workload).and_then(|own| own.spec.node.as_deref());
        let is_near = |workload: &Object<WorkloadSpec>| match service.spec.internal_traffic_policy {
            InternalTrafficPolicy::Cluster => true,
            InternalTrafficPolicy::Local => workload.spec.node.as_deref() == node,
        };
        let selected = service.spec.leads_to(workloads.filter(|workload| is_near(workload)));
        let found = selected.filter_map(|workload| endpoint(workload, target_port(port, &workload.spec)?, self.own));
        let (theirs, own): (Vec<_>, Vec<_>) = found.map(Arc::new).partition(|endpoint| !is_sidecars(endpoint));
        // Where some lead to an application, nobody is sent to a sidecar's own port. Where none does, the callers are told.
        if theirs.is_empty() { own } else { theirs }
    }
}

/// Is it a port of the endpoint's sidecar?
pub(super) fn is_sidecars(endpoint: &Endpoint) -> bool {
    matches!(endpoint.transport, Transport::MutualTls(_)) && compile::is_sidecars(endpoint.address.port())
}

/// A workload as somewhere to dial; none where it has no address or no identity.
pub(super) fn endpoint(workload: &Object<WorkloadSpec>, port: u16, own: &Own) -> Option<Endpoint> {
    endpoint_at(workload, workload.spec.addresses.first()?.to_canonical(), port, own)
}

/// A workload as somewhere to dial, by one of its addresses.
pub(super) fn endpoint_at(workload: &Object<WorkloadSpec>, address: IpAddr, port: u16, own: &Own) -> Option<Endpoint> {
    let transport = match workload.spec.transport {
        WorkloadTransport::Plaintext | WorkloadTransport::Unprotected => Transport::Plaintext,
        WorkloadTransport::MutualTls => {
            let account = Named::new(workload.metadata.namespace.as_str(), workload.spec.account());
            Transport::MutualTls(own.trust_domain.service_account(&account).ok()?)
        }
    };
    Some(Endpoint { workload: workload.named(), address: SocketAddr::new(address, port), transport })
}
