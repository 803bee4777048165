//! Policies that cover a port which its pod takes out of capture: no sidecar is there to ask them, so they do nothing.
//!
//! A pod's owner excludes a port by an annotation, and whoever writes a policy need not know of it. That is no fault of the
//! policy, but it must not stay silent. A policy covers a port of a workload if it could refuse something there; which ones
//! those are is what the sidecar itself goes by ([`Reach`]).

use std::collections::{BTreeMap, BTreeSet};

use super::reach::{Level, Reach};
use super::{Plaintext, inbound, service};
use crate::base::names::Named;
use crate::base::problems::{FieldPath, Problems};
use crate::model::authorization_policy::AuthorizationPolicySpec;
use crate::model::capture::INBOUND_PORTS;
use crate::model::mesh::Choice;
use crate::model::object::Object;
use crate::model::target::TargetKind;
use crate::model::workload::{WorkloadSpec, WorkloadTransport};
use crate::model::{Kind, Resource, ResourceKey, Resources};
use crate::policy::authorization::Action;

/// What to do about a policy that does nothing at a port.
const REMEDY: &str = "take the port out of the annotation and start the pod anew, or let the policy cover other ports alone";

/// Of all workloads.
pub(super) fn check(resources: &Resources) -> Problems {
    tell(resources, &resources.workloads().filter_map(|workload| Open::of(resources, workload)).collect::<Vec<_>>())
}

/// Of one workload; none where it is not known.
pub(crate) fn of_workload(resources: &Resources, name: &Named) -> Option<Problems> {
    let workload = resources.workload(name)?;
    Some(tell(resources, &Open::of(resources, workload).into_iter().collect::<Vec<_>>()))
}

/// A workload with ports that are excluded from its capture.
struct Open<'a> {
    workload: &'a Object<WorkloadSpec>,
    name: Named,
    /// Those ports, each with the services that lead there.
    ports: BTreeMap<u16, BTreeSet<Named>>,
}

impl<'a> Open<'a> {
    fn of(resources: &Resources, workload: &'a Object<WorkloadSpec>) -> Option<Self> {
        // Without a sidecar nothing is captured anyway.
        let is_captured = workload.spec.transport == WorkloadTransport::MutualTls;
        let excluded = workload.capture().inbound_ports;
        if !is_captured || excluded.is_empty() {
            return None;
        }
        let mut ports: BTreeMap<u16, BTreeSet<Named>> = excluded.into_iter().map(|port| (port, BTreeSet::new())).collect();
        let namespace = &workload.metadata.namespace;
        for object in resources.services().filter(|object| object.metadata.namespace == *namespace) {
            if !object.spec.selects(&workload.metadata.labels) {
                continue;
            }
            for port in object.spec.ports.iter().filter(|port| port.is_tcp()) {
                let target = service::target_port(port, &workload.spec);
                if let Some(services) = target.and_then(|target| ports.get_mut(&target)) {
                    services.insert(object.named());
                }
            }
        }
        Some(Self { workload, name: workload.named(), ports })
    }

    /// From how near a policy reaches one of the ports: over the services that lead there, or kept from earlier.
    fn level(&self, reach: &Reach, port: u16) -> Option<Level> {
        let services: Vec<&Named> = self.ports.get(&port).into_iter().flatten().collect();
        let kept = || reach.keeps(&self.name, Some(port), &services).then_some(Level::Service);
        reach.level(&self.name, &services).or_else(kept)
    }
}

/// What a policy covers and is excluded: ports of workloads, and the services that lead there.
type Covered<'a> = BTreeMap<(BTreeSet<u16>, BTreeSet<&'a Named>), Vec<&'a Named>>;

fn tell(resources: &Resources, open: &[Open<'_>]) -> Problems {
    let mut all = Problems::default();
    if open.is_empty() {
        return all;
    }
    for (key, policy) in &resources.by_key {
        let mut covered: Covered<'_> = BTreeMap::new();
        for pod in open {
            let mut by_services: BTreeMap<BTreeSet<&Named>, BTreeSet<u16>> = BTreeMap::new();
            for (port, leading) in pod.ports.iter().filter(|(port, _)| covers(resources, key, policy, pod, **port)) {
                let is_target =
                    |service: &&Named| policy.targets().iter().any(|target| target.is(TargetKind::Service, &service.name));
                by_services.entry(leading.iter().filter(is_target).collect()).or_default().insert(*port);
            }
            for (services, ports) in by_services {
                covered.entry((ports, services)).or_default().push(&pod.name);
            }
        }
        if covered.is_empty() {
            continue;
        }
        let spec = FieldPath::root().field("spec");
        let at = match policy {
            _ if key.kind == Kind::Mesh => spec.field("defaultAuthorization"),
            policy if policy.targets().is_empty() => spec,
            _ => spec.field("targetRefs"),
        };
        let text = format!(
            "it does nothing at {}: the annotation {INBOUND_PORTS} takes that out of capture, and who connects there reaches the \
             application unasked",
            text(&covered)
        );
        let mut problems = Problems::of(key);
        problems.warn(&at, text, REMEDY);
        all.append(problems);
    }
    all
}

/// Could the policy refuse something at this port?
fn covers(resources: &Resources, key: &ResourceKey, policy: &Resource, pod: &Open<'_>, port: u16) -> bool {
    let reaches = |policy: &Resource| pod.level(&Reach::of(policy, pod.workload), port).is_some();
    match policy {
        Resource::AuthorizationPolicy(object) => reaches(policy) && may_refuse(&object.spec, port),
        Resource::RequestAuthentication(_) => reaches(policy),
        // Of several the nearest one decides, and one that permits plaintext refuses nothing.
        Resource::PeerAuthentication(object) => {
            let is_strict = matches!(inbound::plaintext_of(object, Some(port)), Plaintext::Refuse(_));
            is_strict && nearest_peers(resources, pod, port) == Some(key)
        }
        // All else of it is done by the callers.
        Resource::TrafficPolicy(object) => object.spec.rate_limit.is_some() && reaches(policy),
        Resource::Mesh(mesh) => {
            mesh.spec.default_authorization == Choice::Deny
                && !resources.of_kind(Kind::AuthorizationPolicy).any(|(_, policy)| reaches(policy))
        }
        Resource::Service(_)
        | Resource::Workload(_)
        | Resource::HttpRoute(_)
        | Resource::GrpcRoute(_)
        | Resource::TlsRoute(_)
        | Resource::TcpRoute(_)
        | Resource::ReferenceGrant(_) => false,
    }
}

/// An ALLOW refuses whatever none of its rules names; a DENY what one of them does, and a rule may name ports.
fn may_refuse(policy: &AuthorizationPolicySpec, port: u16) -> bool {
    match policy.action {
        Action::Allow => true,
        Action::Deny => policy.rules.iter().any(|rule| {
            let is_for = |ports: &Option<Vec<u16>>| ports.as_ref().is_none_or(|ports| ports.contains(&port));
            rule.to.as_ref().is_none_or(|to| to.iter().any(|to| is_for(&to.ports)))
        }),
    }
}

/// The PeerAuthentication that decides about plaintext at a port.
fn nearest_peers<'a>(resources: &'a Resources, pod: &Open<'_>, port: u16) -> Option<&'a ResourceKey> {
    let peers = resources.of_kind(Kind::PeerAuthentication);
    let reaching = peers.filter_map(|(key, policy)| Some((pod.level(&Reach::of(policy, pod.workload), port)?, key)));
    // The first of two alike counts, and they come in the order of their names.
    reaching.min_by(|(one, _), (other, _)| one.cmp(other)).map(|(_, key)| key)
}

fn text(covered: &Covered<'_>) -> String {
    let keys = |kind: Kind, names: &mut dyn Iterator<Item = &&Named>| {
        let keys = names.map(|name| ResourceKey { kind, name: (*name).clone() }.to_string());
        keys.collect::<Vec<_>>().join(", ")
    };
    let each = covered.iter().map(|((ports, services), workloads)| {
        let numbers = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
        let ports = if ports.len() == 1 { "port" } else { "ports" };
        let more = if workloads.len() > WORKLOADS_TOLD { ", …" } else { "" };
        let workloads = keys(Kind::Workload, &mut workloads.iter().take(WORKLOADS_TOLD));
        let led = if services.is_empty() {
            String::new()
        } else {
            format!(", to which {} leads", keys(Kind::Service, &mut services.iter()))
        };
        format!("{ports} {numbers} of {workloads}{more}{led}")
    });
    each.collect::<Vec<_>>().join("; ")
}

/// How many workloads a text names.
const WORKLOADS_TOLD: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::yaml;

    const POD: &str = "apiVersion: outrigger.dev/v1alpha1
kind: Workload
metadata: {name: web-1, namespace: shop, labels: {app: web}, annotations: {outrigger.dev/exclude-inbound-ports: '9100, 9200'}}
spec: {addresses: [10.64.0.5], ports: [{name: metrics, port: 9100}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}, {name: metrics, port: 81, targetPort: metrics}]}
---
";

    fn resources(texts: &[&str]) -> Resources {
        let documents = texts.iter().flat_map(|text| yaml::read(text)).map(|document| document.unwrap().resource);
        let by_key = documents.map(|resource| (resource.key(), resource.into())).collect();
        Resources { by_key, ..Resources::default() }
    }

    fn policy(kind: &str, name: &str, spec: &str) -> String {
        let (namespace, name) = name.split_once('/').unwrap();
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n---\n"
        )
    }

    /// Where these policies do nothing.
    fn told(policies: &[String]) -> Vec<String> {
        let problems = check(&resources(&[POD, &policies.concat()])).into_vec().into_iter();
        let place = |text: &str| {
            let place = text.strip_prefix("it does nothing at ").and_then(|rest| rest.split_once(": the annotation"));
            place.unwrap().0.to_owned()
        };
        problems.map(|problem| format!("{} {}: {}", problem.resource, problem.at, place(&problem.text))).collect()
    }

    fn one(kind: &str, name: &str, spec: &str) -> Option<String> {
        let mut told = told(&[policy(kind, name, spec)]);
        assert!(told.len() < 2, "{told:?}");
        let of = |text: String| text.split_once(": ").unwrap().1.to_owned();
        told.pop().map(of)
    }

    #[test]
    fn a_policy_covers_what_its_targets_lead_to() {
        let both = Some("ports 9100, 9200 of Workload/shop/web-1".to_owned());
        let by_service = Some("port 9100 of Workload/shop/web-1, to which Service/shop/web leads".to_owned());
        let allow = |targets: &str| format!("{{{targets} action: ALLOW, rules: [{{}}]}}");
        for (name, targets, expected) in [
            ("shop/p", "targetRefs: [{kind: Workload, name: web-1}],", &both),
            ("shop/p", "targetRefs: [{kind: Service, name: web}],", &by_service),
            ("shop/p", "", &both),
            ("outrigger-system/p", "", &both),
            ("shop/p", "targetRefs: [{kind: Workload, name: web-2}],", &None),
            ("shop/p", "targetRefs: [{kind: Service, name: other}],", &None),
            ("other/p", "", &None),
            ("other/p", "targetRefs: [{kind: Service, name: web}],", &None),
            ("outrigger-system/p", "targetRefs: [{kind: Workload, name: web-1}],", &None),
        ] {
            assert_eq!(one("AuthorizationPolicy", name, &allow(targets)), *expected, "{name} {targets}");
        }
    }

    #[test]
    fn a_policy_covers_a_port_at_which_it_could_refuse_something() {
        let both = Some("ports 9100, 9200 of Workload/shop/web-1".to_owned());
        let second = Some("port 9200 of Workload/shop/web-1".to_owned());
        for (kind, spec, expected) in [
            // An ALLOW that names a port refuses at all others.
            ("AuthorizationPolicy", "{action: ALLOW, rules: [{to: [{ports: [8080]}]}]}", &both),
            ("AuthorizationPolicy", "{action: ALLOW}", &both),
            ("AuthorizationPolicy", "{action: DENY}", &None),
            ("AuthorizationPolicy", "{action: DENY, rules: [{to: [{ports: [8080]}]}]}", &None),
            ("AuthorizationPolicy", "{action: DENY, rules: [{to: [{ports: [8080]}, {ports: [9200]}]}]}", &second),
            ("AuthorizationPolicy", "{action: DENY, rules: [{to: [{ports: [8080]}, {methods: [GET]}]}]}", &both),
            ("AuthorizationPolicy", "{action: DENY, rules: [{from: [{namespaces: [a]}]}]}", &both),
            ("RequestAuthentication", "{tokens: IfPresent, providers: []}", &both),
            ("PeerAuthentication", "{mode: Strict}", &both),
            ("PeerAuthentication", "{mode: Permissive}", &None),
            ("PeerAuthentication", "{mode: Permissive, portLevel: [{port: 9200, mode: Strict}]}", &second),
            ("TrafficPolicy", "{targetRefs: [{kind: Service, name: web}], connectTimeout: 1s}", &None),
        ] {
            assert_eq!(one(kind, "shop/p", spec), *expected, "{kind} {spec}");
        }
        let limit = "{targetRefs: [{kind: Service, name: web}], rateLimit: {requests: 1, per: 1s}}";
        let led = "port 9100 of Workload/shop/web-1, to which Service/shop/web leads";
        assert_eq!(one("TrafficPolicy", "shop/p", limit).as_deref(), Some(led));
    }

    #[test]
    fn of_policies_about_plaintext_only_the_one_that_decides_is_told() {
        let mesh = policy("PeerAuthentication", "outrigger-system/mesh", "{mode: Strict}");
        let web = policy("PeerAuthentication", "shop/web", "{targetRefs: [{kind: Service, name: web}], mode: Permissive}");
        assert_eq!(told(&[mesh, web]), ["PeerAuthentication/outrigger-system/mesh spec: port 9200 of Workload/shop/web-1"]);
    }

    #[test]
    fn a_default_that_refuses_covers_what_no_policy_reaches() {
        let mesh = policy("Mesh", "outrigger-system/mesh", "{defaultAuthorization: Deny}");
        let gate = policy("AuthorizationPolicy", "shop/gate", "{targetRefs: [{kind: Service, name: web}], action: DENY}");
        assert_eq!(
            told(&[mesh, gate]),
            ["Mesh/outrigger-system/mesh spec.defaultAuthorization: port 9200 of Workload/shop/web-1"]
        );
    }

    #[test]
    fn what_a_policy_goes_on_covering_is_covered() {
        let gate = policy("AuthorizationPolicy", "shop/gate", "{targetRefs: [{kind: Service, name: gone}], action: ALLOW}")
            .replace("\n---", "\nstatus: {kept: [{service: gone, selector: {app: web}, ports: [9200]}]}\n---");
        assert_eq!(told(&[gate]), ["AuthorizationPolicy/shop/gate spec.targetRefs: port 9200 of Workload/shop/web-1"]);
    }

    #[test]
    fn one_workload_is_asked_about_alone_and_one_outside_of_the_mesh_excludes_nothing() {
        let second = POD.replace("web-1", "web-2").replace("10.64.0.5", "10.64.0.6");
        let plain = second.replace("web-2", "web-3").replace("spec: {addresses", "spec: {transport: Plaintext, addresses");
        let gate = policy("AuthorizationPolicy", "shop/gate", "{targetRefs: [{kind: Service, name: web}], action: ALLOW}");
        let resources = resources(&[POD, &second, &plain, &gate]);
        let texts = |problems: Problems| problems.into_vec().into_iter().map(|problem| problem.text).collect::<String>();
        assert!(texts(check(&resources)).contains("port 9100 of Workload/shop/web-1, Workload/shop/web-2, to which"));
        let alone = texts(of_workload(&resources, &"shop/web-2".parse().unwrap()).unwrap());
        assert!(alone.contains("port 9100 of Workload/shop/web-2, to which"), "{alone}");
        assert!(of_workload(&resources, &"shop/web-9".parse().unwrap()).is_none());
    }
}
