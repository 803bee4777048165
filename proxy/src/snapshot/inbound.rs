//! The own workload as others reach it: which policies apply to each of its ports.
//!
//! Whatever could have been meant for a port and cannot be read closes the port: an unreadable policy may have been the one
//! that refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::compile::Own;
use super::reach::Reach;
use super::{Inbound, InboundPort, InboundService, Plaintext, RoutePolicies, live, service};
use crate::base::names::Named;
use crate::base::problems::{FieldPath, Problems};
use crate::model::authorization_policy::AuthorizationPolicySpec;
use crate::model::mesh::Choice;
use crate::model::object::Object;
use crate::model::peer_authentication::{PeerAuthenticationSpec, PeerMode};
use crate::model::request_authentication::RequestAuthenticationSpec;
use crate::model::service::ServicePortSpec;
use crate::model::target::{TargetKind, TargetRef};
use crate::model::workload::WorkloadSpec;
use crate::model::{Kind, Resource, ResourceKey, Resources};
use crate::policy::RuleName;
use crate::policy::authorization::{Authorization, AuthorizationPolicy, DefaultAction, compile_rules};
use crate::policy::jwt::{Jwt, JwtPolicy};

/// Reports every fault of the policy and returns it only if there is none.
pub(super) fn compile_authorization(
    policy: &Object<AuthorizationPolicySpec>,
    problems: &mut Problems,
) -> Option<AuthorizationPolicy> {
    let at = FieldPath::root().field("spec");
    check_targets(&policy.spec.target_refs, &at, problems);
    let compiled = compile_rules(policy.spec.action, &policy.spec.rules, &policy.key().to_string(), &at, problems);
    compiled.filter(|_| !problems.refused())
}

/// Reports every fault of the policy and returns it only if there is none.
pub(super) fn compile_tokens(policy: &Object<RequestAuthenticationSpec>, problems: &mut Problems) -> Option<JwtPolicy> {
    let at = FieldPath::root().field("spec");
    check_targets(&policy.spec.target_refs, &at, problems);
    let compiled = policy.spec.config().compile(RuleName::new(policy.key().to_string()), &at, problems);
    compiled.filter(|_| !problems.refused())
}

/// Reports every fault of the policy. Says whether there is none.
pub(super) fn check_peers(policy: &Object<PeerAuthenticationSpec>, problems: &mut Problems) -> bool {
    let at = FieldPath::root().field("spec");
    check_targets(&policy.spec.target_refs, &at, problems);
    let mut seen = BTreeSet::new();
    for (index, level) in policy.spec.port_level.iter().enumerate() {
        let at = at.field("portLevel").index(index).field("port");
        if level.port == 0 {
            problems.refuse(&at, "0 is not a port", "write a port of the workload");
        } else if !seen.insert(level.port) {
            problems.refuse(&at, format!("port {} has a mode already", level.port), "write each port once");
        }
    }
    !problems.refused()
}

fn check_targets(targets: &[TargetRef], at: &FieldPath, problems: &mut Problems) {
    for (index, target) in targets.iter().enumerate() {
        let at = at.field("targetRefs").index(index);
        let group = match target.kind {
            TargetKind::Service => "",
            TargetKind::Workload => "outrigger.dev",
        };
        // The group may be left out: both kinds are told apart by their names.
        if !target.group.is_empty() && target.group != group && !(group.is_empty() && target.group == "core") {
            let text = format!("there is no {:?} in the group {}", target.kind, target.group);
            problems.refuse(&at.field("group"), text, "leave group out");
        }
    }
}

/// Builds the inbound side of `own`; none where its Workload is not known.
pub(super) fn build(resources: &Resources, own: &Own, default: Choice, previous: &Inbound) -> Option<Inbound> {
    let workload = resources.workload(&own.workload)?;
    let selecting = resources.services().filter(|service| {
        service.metadata.namespace == workload.metadata.namespace && service.spec.selects(&workload.metadata.labels)
    });
    let mut services: BTreeMap<u16, Vec<(Named, &ServicePortSpec)>> = BTreeMap::new();
    let mut addresses: BTreeMap<Named, Vec<IpAddr>> = BTreeMap::new();
    for object in selecting {
        let written = object.spec.cluster_ips.iter().chain(&object.spec.cluster_ip);
        addresses.insert(object.named(), written.filter_map(|address| address.parse().ok()).collect());
        for port in object.spec.ports.iter().filter(|port| port.is_tcp()) {
            if let Some(target) = service::target_port(port, &workload.spec) {
                services.entry(target).or_default().push((object.named(), port));
            }
        }
    }
    let policies = Policies::new(resources, own, workload);
    let mut numbers: BTreeSet<u16> = services.keys().copied().collect();
    numbers.extend(workload.spec.ports.iter().map(|port| port.port));
    numbers.extend(policies.peers.iter().flat_map(|(_, policy)| policy.spec.port_level.iter().map(|level| level.port)));
    numbers.extend(policies.kept());

    let mut limits = BTreeMap::new();
    let mut port = |number: Option<u16>, services: &[(Named, &ServicePortSpec)]| {
        let names: Vec<&Named> = services.iter().map(|(name, _)| name).collect();
        let limit = names.iter().find_map(|name| service::traffic_of(resources, name).rate_limit);
        // One policy is one bucket, however many ports it is for.
        let rate_limit = limit.map(|limit| {
            let carried = limits.entry(limit.rule.clone()).or_insert_with(|| live::carry_limit(limit, previous));
            carried.clone()
        });
        Arc::new(InboundPort {
            service: names.first().map(|name| (*name).clone()),
            services: called(&names, &addresses),
            protocol: protocol_of(number, services, &workload.spec),
            plaintext: policies.plaintext(number, &names),
            policies: RoutePolicies {
                jwt: policies.jwt(number, &names).map(Arc::new),
                authorization: Some(Arc::new(policies.authorization(number, &names, default))),
                rate_limit,
                ..RoutePolicies::default()
            },
        })
    };
    let ports = numbers.into_iter().map(|number| {
        let of_port = services.get(&number).map_or(&[][..], Vec::as_slice);
        (number, port(Some(number), of_port))
    });
    let ports = ports.collect();
    let other = port(None, &[]);
    Some(Inbound { ports, other })
}

/// The services among which a request chooses; none where there is no choice.
fn called(names: &[&Named], addresses: &BTreeMap<Named, Vec<IpAddr>>) -> Vec<InboundService> {
    let distinct: BTreeSet<&Named> = names.iter().copied().collect();
    if distinct.len() < 2 {
        return Vec::new();
    }
    let service =
        |name: &Named| InboundService { name: name.clone(), addresses: addresses.get(name).cloned().unwrap_or_default() };
    distinct.into_iter().map(service).collect()
}

fn protocol_of(number: Option<u16>, services: &[(Named, &ServicePortSpec)], workload: &WorkloadSpec) -> super::AppProtocol {
    let by_services = services.iter().map(|(_, port)| service::protocol(port.app_protocol.as_deref(), port.name.as_deref()));
    let own = workload.ports.iter().filter(|port| Some(port.port) == number);
    let by_workload = own.map(|port| service::protocol(port.app_protocol.as_deref(), port.name.as_deref()));
    by_services.chain(by_workload).find(|protocol| *protocol != super::AppProtocol::Detect).unwrap_or_default()
}

/// Those that may apply to the own workload.
struct Policies<'a> {
    own: &'a Named,
    authorization: Vec<(Reach, Arc<AuthorizationPolicy>)>,
    tokens: Vec<(Reach, Arc<JwtPolicy>)>,
    peers: Vec<(Reach, &'a Object<PeerAuthenticationSpec>)>,
    /// PeerAuthentications that cannot be read.
    strict: Vec<(Reach, RuleName)>,
}

impl<'a> Policies<'a> {
    fn new(resources: &'a Resources, own: &'a Own, workload: &Object<WorkloadSpec>) -> Self {
        let mut all =
            Self { own: &own.workload, authorization: Vec::new(), tokens: Vec::new(), peers: Vec::new(), strict: Vec::new() };
        for (key, resource) in &resources.by_key {
            let mut problems = Problems::of(key);
            match resource.as_ref() {
                Resource::AuthorizationPolicy(policy) => {
                    match compile_authorization(policy, &mut problems) {
                        Some(policy) => all.authorization.push((Reach::of(resource, workload), Arc::new(policy))),
                        None => all.close(key, Some(resource), workload),
                    };
                }
                Resource::RequestAuthentication(policy) => {
                    match compile_tokens(policy, &mut problems) {
                        Some(policy) => all.tokens.push((Reach::of(resource, workload), Arc::new(policy))),
                        None => all.close(key, Some(resource), workload),
                    };
                }
                Resource::PeerAuthentication(policy) => {
                    if check_peers(policy, &mut problems) {
                        all.peers.push((Reach::of(resource, workload), policy));
                    } else {
                        all.close(key, Some(resource), workload);
                    }
                }
                Resource::Mesh(_)
                | Resource::Service(_)
                | Resource::Workload(_)
                | Resource::HttpRoute(_)
                | Resource::GrpcRoute(_)
                | Resource::TlsRoute(_)
                | Resource::TcpRoute(_)
                | Resource::ReferenceGrant(_)
                | Resource::TrafficPolicy(_) => {}
            }
        }
        for (key, resource) in &resources.refused {
            all.close(key, resource.as_deref(), workload);
        }
        all
    }

    /// Closes what a refused policy may have been for.
    fn close(&mut self, key: &ResourceKey, resource: Option<&Resource>, workload: &Object<WorkloadSpec>) {
        let reach = resource.map_or_else(|| Reach::unread(key), |resource| Reach::of(resource, workload));
        let rule = RuleName::new(format!("{key} (refused)"));
        match key.kind {
            Kind::AuthorizationPolicy => self.authorization.push((reach, Arc::new(AuthorizationPolicy::refuse(rule)))),
            Kind::RequestAuthentication => self.tokens.push((reach, Arc::new(JwtPolicy::refuse(rule)))),
            Kind::PeerAuthentication => self.strict.push((reach, rule)),
            Kind::Mesh
            | Kind::Service
            | Kind::Workload
            | Kind::HttpRoute
            | Kind::GrpcRoute
            | Kind::TlsRoute
            | Kind::TcpRoute
            | Kind::ReferenceGrant
            | Kind::TrafficPolicy => {}
        }
    }

    /// Ports that policies go on covering.
    fn kept(&self) -> impl Iterator<Item = u16> {
        let authorization = self.authorization.iter().map(|(reach, _)| reach);
        let tokens = self.tokens.iter().map(|(reach, _)| reach);
        let peers = self.peers.iter().map(|(reach, _)| reach);
        let strict = self.strict.iter().map(|(reach, _)| reach);
        authorization.chain(tokens).chain(peers).chain(strict).flat_map(Reach::kept_numbers)
    }

    fn authorization(&self, port: Option<u16>, services: &[&Named], default: Choice) -> Authorization {
        let reaching = self.authorization.iter().filter(|(reach, _)| reach.level(self.own, services).is_some());
        let mut policies: Vec<_> = reaching.map(|(_, policy)| Arc::clone(policy)).collect();
        let default = match default {
            Choice::Allow => DefaultAction::Allow,
            Choice::Deny => DefaultAction::Deny,
        };
        // An ALLOW policy that once led here keeps out who would be let in by default; it lets nobody in beside the ALLOW
        // policies that lead here now, or against a default that refuses.
        let opens = default == DefaultAction::Allow && !policies.iter().any(|policy| policy.allows());
        let kept = self.authorization.iter().filter(|(reach, _)| reach.keeps(self.own, port, services));
        policies.extend(kept.filter(|(_, policy)| opens || !policy.allows()).map(|(_, policy)| Arc::clone(policy)));
        Authorization::new(policies, default)
    }

    fn jwt(&self, port: Option<u16>, services: &[&Named]) -> Option<Jwt> {
        let here = self.tokens.iter().filter(|(reach, _)| reach.level(self.own, services).is_some());
        let kept = self.tokens.iter().filter(|(reach, _)| reach.keeps(self.own, port, services));
        let policy = |(_, policy): &(_, Arc<_>)| Arc::clone(policy);
        Some(Jwt::new(here.map(policy), kept.map(policy))).filter(|jwt| !jwt.is_empty())
    }

    fn plaintext(&self, port: Option<u16>, services: &[&Named]) -> Plaintext {
        let covers = |reach: &Reach| reach.level(self.own, services).is_some() || reach.keeps(self.own, port, services);
        if let Some((_, rule)) = self.strict.iter().find(|(reach, _)| covers(reach)) {
            return Plaintext::Refuse(rule.clone());
        }
        // One that once led here refuses, and permits nothing.
        let kept = self.peers.iter().filter(|(reach, _)| reach.keeps(self.own, port, services));
        let mut kept = kept.map(|(_, policy)| plaintext_of(policy, port));
        if let Some(refused) = kept.find(|kept| matches!(kept, Plaintext::Refuse(_))) {
            return refused;
        }
        let reaching =
            self.peers.iter().filter_map(|(reach, policy)| reach.level(self.own, services).map(|level| (level, policy)));
        // `min_by_key` takes the first of two alike, and they stand in the order of their names.
        match reaching.min_by_key(|(level, _)| level.clone()) {
            Some((_, policy)) => plaintext_of(policy, port),
            None => Plaintext::Refuse(RuleName::new("strict_default")),
        }
    }
}

/// What one policy says of plaintext at a port that it covers.
pub(super) fn plaintext_of(policy: &Object<PeerAuthenticationSpec>, port: Option<u16>) -> Plaintext {
    let mut levels = policy.spec.port_level.iter().enumerate();
    let (rule, mode) = match levels.find(|(_, level)| Some(level.port) == port) {
        Some((index, level)) => (format!("{} portLevel[{index}]", policy.key()), level.mode),
        None => (policy.key().to_string(), policy.spec.mode),
    };
    match mode {
        PeerMode::Strict => Plaintext::Refuse(RuleName::new(rule)),
        PeerMode::Permissive => Plaintext::Permit(RuleName::new(rule)),
    }
}
