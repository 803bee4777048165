//! What the request line reads: immutable, built by `compile` from resources alone, published by one atomic swap.
//!
//! Unchanged parts are shared between snapshots. State that must outlive a swap (buckets, budgets, breakers, ejections)
//! is carried over by `live`.

pub(crate) mod claims;
pub(crate) mod cluster_address;
pub(crate) mod compile;
pub(crate) mod publish;
pub(crate) mod service_claims;

mod attached;
pub(crate) mod excluded;
mod headless;
mod inbound;
pub(crate) mod kept;
mod live;
mod ranges;
mod reach;
mod references;
mod route;
mod route_references;
mod route_table;
mod rules;
mod selected;
mod service;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::base::names::Named;
use crate::base::units::Percent;
use crate::identity::spiffe::SpiffeId;
use crate::model::mesh;
use crate::policy::authorization::Authorization;
use crate::policy::breaker::Breaker;
use crate::policy::cors::Cors;
use crate::policy::fault::Fault;
use crate::policy::headers::HeaderEdit;
use crate::policy::jwt::Jwt;
use crate::policy::limits::Limits;
use crate::policy::matcher::RequestMatch;
use crate::policy::outlier::Ejections;
use crate::policy::rate_limit::RateLimit;
use crate::policy::redirect::Redirect;
use crate::policy::retry::{Retry, RetryBudget};
use crate::policy::rewrite::Rewrite;
use crate::policy::shadow::Shadow;
use crate::policy::timeout::Timeouts;
use crate::policy::{RequestView, RuleName};

/// All that one sidecar knows. A request reads it once.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// Counts the snapshots that this process published, from 1; 0 is the empty one that it starts with.
    pub(crate) generation: u64,
    pub(crate) mesh: MeshSettings,
    pub(crate) inbound: Inbound,
    pub(crate) outbound: Outbound,
}

/// What holds for the whole mesh.
#[derive(Clone, Debug)]
pub(crate) struct MeshSettings {
    /// Addresses of pods and services. One of them is never dialled in plaintext for want of configuration.
    pub(crate) ranges: Vec<IpNet>,
    /// May an address outside the ranges be dialled?
    pub(crate) egress: Egress,
    /// Share of requests that get a line in the access log.
    pub(crate) access_log: Percent,
    /// Share of traces that are begun and exported; a trace that a caller began is carried on as the caller says.
    pub(crate) trace_sample: Percent,
    /// What one client may ask.
    pub(crate) limits: Limits,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Egress {
    Allow,
    Deny,
}

/// The own workload, as others reach it.
#[derive(Debug)]
pub(crate) struct Inbound {
    /// Policies of a port that a policy or a service names.
    pub(crate) ports: BTreeMap<u16, Arc<InboundPort>>,
    /// Policies of every other port. Before the first configuration: nothing is allowed.
    pub(crate) other: Arc<InboundPort>,
}

/// What applies to one port of the own workload.
#[derive(Debug)]
pub(crate) struct InboundPort {
    /// The service by which the port is known, for metrics and logs: the first by name, where there are several.
    pub(crate) service: Option<Named>,
    /// All of them, where there are several: a request says which one it is for. Only what is told depends on that. The
    /// policies of all of them apply to every request, or naming another service would be a way around them.
    pub(crate) services: Vec<InboundService>,
    pub(crate) protocol: AppProtocol,
    pub(crate) plaintext: Plaintext,
    pub(crate) policies: RoutePolicies,
}

/// A service that leads to a port of the own workload.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct InboundService {
    pub(crate) name: Named,
    /// By which it is called too.
    pub(crate) addresses: Vec<IpAddr>,
}

/// May a peer without mutual TLS reach the port?
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Plaintext {
    /// Refused, by this rule: `strict_default` or the PeerAuthentication's.
    Refuse(RuleName),
    /// Taken, by this PeerAuthentication.
    Permit(RuleName),
}

/// What a port speaks (Kubernetes `appProtocol`, or the port's name up to the first dash).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum AppProtocol {
    /// Not declared: the first bytes tell.
    #[default]
    Detect,
    /// HTTP, in which a client may speak HTTP/1 or HTTP/2; the application hears HTTP/1, but for gRPC.
    Http,
    /// HTTP/2 without TLS, gRPC among it.
    Http2,
    /// Never looked into.
    Opaque,
}

/// Where the own pod's connections go.
#[derive(Debug)]
pub(crate) struct Outbound {
    /// By the address and port that the application dialled: a service's cluster IP.
    pub(crate) services: BTreeMap<SocketAddr, Arc<ServicePort>>,
    /// By the address and port that the application dialled: those of a pod, to which the names of these services without an
    /// address lead. None is empty.
    pub(crate) headless: BTreeMap<SocketAddr, Vec<Arc<ServicePort>>>,
    /// By the address that the application dialled: a pod, reached directly.
    pub(crate) workloads: BTreeMap<IpAddr, Arc<Endpoint>>,
    /// Services by name and port: backends of routes and shadows.
    pub(crate) backends: BTreeMap<(Named, u16), Arc<Backend>>,
    /// Addresses at which the control plane says nothing of the mesh is.
    pub(crate) absent: BTreeSet<IpAddr>,
}

/// One port of a service that the own pod calls.
#[derive(Debug)]
pub(crate) struct ServicePort {
    pub(crate) service: Named,
    pub(crate) port: u16,
    pub(crate) protocol: AppProtocol,
    /// Rules in the order of Gateway API precedence; the last one, which matches everything, leads to the service itself
    /// unless a route is attached.
    pub(crate) rules: Vec<Arc<RouteRule>>,
    /// Rules for connections, in the order of Gateway API precedence, where a TLSRoute or a TCPRoute is attached: the port is
    /// opaque by that.
    pub(crate) streams: Vec<StreamRule>,
    /// Where other opaque connections go.
    pub(crate) default_backend: Arc<Backend>,
}

/// One rule of a route for connections.
#[derive(Clone, Debug)]
pub(crate) struct StreamRule {
    pub(crate) name: RuleName,
    /// Server names that the rule is for, as [`RouteRule::hosts`]; empty: every connection, TLS or not.
    pub(crate) hosts: Vec<Box<str>>,
    /// As [`RouteRule::backends`]; the share of one that is broken is closed.
    pub(crate) backends: Vec<WeightedBackend>,
}

/// One rule of a route.
#[derive(Debug)]
pub(crate) struct RouteRule {
    /// `KIND/NAMESPACE/NAME rules[I]` and the rule's name where it has one, or `default` for the service's own.
    pub(crate) name: RuleName,
    /// Hosts that the rule is for, lower case, `*.` first for a suffix; empty: all.
    pub(crate) hosts: Vec<Box<str>>,
    /// One of them must match; empty: every request.
    pub(crate) matches: Vec<RequestMatch>,
    /// Backends and their weights; drawn anew for each request. Empty, or all weights 0: 500 by Gateway API.
    pub(crate) backends: Vec<WeightedBackend>,
    pub(crate) policies: RoutePolicies,
}

/// A backend of a rule.
#[derive(Clone, Debug)]
pub(crate) struct WeightedBackend {
    pub(crate) weight: u32,
    /// None: the reference is broken (Gateway API: its share of requests is answered with 500).
    pub(crate) backend: Option<Arc<Backend>>,
    pub(crate) policies: BackendPolicies,
}

/// Policies for the requests that are drawn for one backend, behind those of the rule.
#[derive(Clone, Debug, Default)]
pub(crate) struct BackendPolicies {
    pub(crate) request_headers: Option<HeaderEdit>,
    /// Where the rule has one, none.
    pub(crate) rewrite: Option<Arc<Rewrite>>,
    pub(crate) shadow: Vec<Arc<Shadow>>,
    pub(crate) response_headers: Option<HeaderEdit>,
}

/// One port of a service, as somewhere to send requests.
#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) service: Named,
    pub(crate) port: u16,
    pub(crate) protocol: AppProtocol,
    pub(crate) endpoints: Vec<Arc<Endpoint>>,
    pub(crate) connect_timeout: std::time::Duration,
    /// Spent by retries of requests to this backend.
    pub(crate) budget: Arc<RetryBudget>,
    pub(crate) breaker: Arc<Breaker>,
    pub(crate) ejections: Arc<Ejections>,
}

/// One workload behind a service.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Endpoint {
    pub(crate) workload: Named,
    /// Where to dial; for a workload that is reached directly the port is 0 and the application's own is taken.
    pub(crate) address: SocketAddr,
    pub(crate) transport: Transport,
}

/// How an endpoint is reached.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Transport {
    /// Mutual TLS with exactly this peer.
    MutualTls(SpiffeId),
    /// It has no sidecar, and its Workload document says so.
    Plaintext,
}

/// Policies in the order in which a request meets them. Outbound rules and inbound ports fill what is theirs.
#[derive(Clone, Debug, Default)]
pub(crate) struct RoutePolicies {
    pub(crate) cors: Option<Arc<Cors>>,
    pub(crate) jwt: Option<Arc<Jwt>>,
    pub(crate) authorization: Option<Arc<Authorization>>,
    pub(crate) rate_limit: Option<RateLimit>,
    pub(crate) fault: Option<Arc<Fault>>,
    pub(crate) redirect: Option<Arc<Redirect>>,
    pub(crate) request_headers: Option<Arc<HeaderEdit>>,
    pub(crate) rewrite: Option<Arc<Rewrite>>,
    pub(crate) shadow: Vec<Arc<Shadow>>,
    pub(crate) timeouts: Timeouts,
    pub(crate) retry: Option<Arc<Retry>>,
    pub(crate) response_headers: Option<Arc<HeaderEdit>>,
}

impl Endpoint {
    /// Is it a sidecar itself, and not the application behind it? That one takes no connection there.
    pub(crate) fn is_own_port(&self) -> bool {
        compile::is_own_port(self.address.port()) && matches!(self.transport, Transport::MutualTls(_))
    }
}

impl ServicePort {
    /// The rule that decides about a request for `host` (lower case, without port): the first that matches. None: there are
    /// routes, and the request is none of theirs (404 by Gateway API).
    pub(crate) fn rule(&self, host: &str, request: RequestView<'_>) -> Option<&Arc<RouteRule>> {
        self.rules.iter().find(|rule| {
            host_matches(&rule.hosts, host)
                && (rule.matches.is_empty() || rule.matches.iter().any(|wanted| wanted.matches(request)))
        })
    }

    /// Does it depend on the name that a client's TLS asks for where its connection goes?
    pub(crate) fn asks_for_server_name(&self) -> bool {
        self.streams.iter().any(|rule| !rule.hosts.is_empty())
    }

    /// The rule that decides about a connection that asks for `server_name` (lower case), if it asks for one. None: there are
    /// rules for connections, and it is none of theirs.
    pub(crate) fn stream(&self, server_name: Option<&str>) -> Option<&StreamRule> {
        self.streams.iter().find(|rule| match server_name {
            Some(name) => host_matches(&rule.hosts, name),
            None => rule.hosts.is_empty(),
        })
    }
}

/// Draws one of a rule's backends by weight; `below` draws a number below another. None: none has a weight.
pub(crate) fn draw(backends: &[WeightedBackend], below: impl FnOnce(usize) -> usize) -> Option<&WeightedBackend> {
    let weight = |weight: u32| usize::try_from(weight).unwrap_or(usize::MAX);
    let total = backends.iter().fold(0_usize, |total, backend| total.saturating_add(weight(backend.weight)));
    if total == 0 {
        return None;
    }
    // One backend, as usual, needs no dice.
    let mut left = if backends.len() == 1 { 0 } else { below(total) };
    for backend in backends {
        match left.checked_sub(weight(backend.weight)) {
            Some(rest) => left = rest,
            None => return Some(backend),
        }
    }
    // The weights add up to more than what was drawn, so one of them was met above.
    debug_assert!(false, "a backend was drawn");
    None
}

impl Outbound {
    /// The service that a connection to this address and port is for, before anything is known of what it asks.
    pub(crate) fn service_at(&self, dialled: SocketAddr) -> Option<&Arc<ServicePort>> {
        self.services.get(&dialled).or_else(|| self.headless.get(&dialled)?.first())
    }

    /// The service that a request for `host` (lower case, without port) on such a connection is for. None: the pod itself.
    pub(crate) fn service_called(&self, dialled: SocketAddr, host: &str) -> Option<&Arc<ServicePort>> {
        self.services.get(&dialled).or_else(|| headless::called(self.headless.get(&dialled)?, host))
    }
}

impl Inbound {
    /// What applies to a port of the own workload.
    pub(crate) fn port(&self, number: u16) -> &Arc<InboundPort> {
        self.ports.get(&number).unwrap_or(&self.other)
    }
}

impl InboundPort {
    /// The service that a request for `host` (lower case, without port) is for.
    pub(crate) fn service_of(&self, host: &str) -> Option<&Named> {
        let called = self.services.iter().find(|service| service.is_called(host));
        called.map(|service| &service.name).or(self.service.as_ref())
    }
}

impl InboundService {
    /// Is it meant by this host: `NAME`, `NAME.NAMESPACE`, that with `.svc` and the cluster's domain, or an address?
    fn is_called(&self, host: &str) -> bool {
        let host = host.strip_suffix('.').unwrap_or(host);
        if names(host, &self.name) {
            return true;
        }
        let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).parse::<IpAddr>();
        address.is_ok_and(|address| self.addresses.contains(&address))
    }
}

/// Is this host a name of the service: its own, that with its namespace, or with `.svc` and the cluster's domain?
fn names(host: &str, service: &Named) -> bool {
    let Some(rest) = host.strip_prefix(&*service.name) else { return false };
    if rest.is_empty() {
        return true;
    }
    let rest = rest.strip_prefix('.').and_then(|rest| rest.strip_prefix(&*service.namespace));
    rest.is_some_and(|rest| rest.is_empty() || rest == ".svc" || rest.starts_with(".svc."))
}

/// Is the rule for this host? A pattern that begins with `*.` is for every host below it (Gateway API Hostname).
pub(crate) fn host_matches(hosts: &[Box<str>], host: &str) -> bool {
    hosts.is_empty()
        || hosts.iter().any(|pattern| match pattern.strip_prefix('*') {
            Some(suffix) => host.len() > suffix.len() && host.ends_with(suffix),
            None => **pattern == *host,
        })
}

impl Snapshot {
    /// The service that is known here by this name, lower case: one that the own application calls, or its own.
    pub(crate) fn service_called(&self, host: &str) -> Option<&Named> {
        let host = host.strip_suffix('.').unwrap_or(host);
        let headless = self.outbound.headless.values().flatten();
        let called = self.outbound.services.values().chain(headless).map(|port| &port.service);
        let ports = self.inbound.ports.values().chain(std::iter::once(&self.inbound.other));
        // Where one service alone leads to a port, there is no choice to list.
        let own = ports.flat_map(|port| port.services.iter().map(|service| &service.name).chain(&port.service));
        called.chain(own).find(|service| names(host, service))
    }

    /// What a sidecar starts with: nothing is allowed in, and nothing is known outside.
    pub(crate) fn empty() -> Self {
        let refuse = RuleName::new("no_configuration");
        Self {
            generation: 0,
            mesh: MeshSettings {
                ranges: mesh::default_ranges(),
                egress: Egress::Deny,
                access_log: Percent::ALL,
                trace_sample: Percent::NONE,
                limits: Limits::default(),
            },
            inbound: Inbound {
                ports: BTreeMap::new(),
                other: Arc::new(InboundPort {
                    service: None,
                    services: Vec::new(),
                    protocol: AppProtocol::Detect,
                    plaintext: Plaintext::Refuse(refuse.clone()),
                    policies: RoutePolicies {
                        authorization: Some(Arc::new(Authorization::refuse(refuse))),
                        ..RoutePolicies::default()
                    },
                }),
            },
            outbound: Outbound {
                services: BTreeMap::new(),
                headless: BTreeMap::new(),
                workloads: BTreeMap::new(),
                backends: BTreeMap::new(),
                absent: BTreeSet::new(),
            },
        }
    }
}
