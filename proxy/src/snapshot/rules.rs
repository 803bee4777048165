//! What the rules of authorization policies say of the mesh and is not so: trust domains of which nobody comes in, ports of a
//! Service where those of its workloads are meant.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::service;
use crate::base::names::Named;
use crate::base::problems::{FieldPath, Problems};
use crate::model::authorization_policy::AuthorizationPolicySpec;
use crate::model::object::Object;
use crate::model::service::{PortRef, ServicePortSpec, ServiceSpec};
use crate::model::target::TargetKind;
use crate::model::{Resource, ResourceKey, Resources};
use crate::policy::authorization::{Action, foreign_principals};

/// Warns of principals that no peer of the mesh with the trust domain `own` can have.
pub(super) fn check_domains(resources: &Resources, own: &str) -> Problems {
    let mut all = Problems::default();
    for (key, policy) in policies(resources) {
        let mut problems = Problems::of(key);
        for (at, text) in foreign_principals(&policy.spec.rules, own, &FieldPath::root().field("spec")) {
            let means = means(policy.spec.action);
            problems.warn(
                &at,
                format!("{text:?} fits nobody: only peers of the trust domain {own} come in; {means}"),
                format!("write spiffe://{own}/ns/NAMESPACE/sa/NAME"),
            );
        }
        all.append(problems);
    }
    all
}

/// The DENY policies with such a principal, and what that means.
pub(super) fn denying_nobody(resources: &Resources, own: &str) -> BTreeSet<(ResourceKey, String)> {
    let denying = policies(resources).filter(|(_, policy)| policy.spec.action == Action::Deny);
    denying
        .flat_map(|(key, policy)| {
            let found = foreign_principals(&policy.spec.rules, own, &FieldPath::root());
            found.into_iter().map(|(_, text)| {
                let means = means(policy.spec.action);
                (key.clone(), format!("{text} fits nobody: only peers of the trust domain {own} come in; {means}"))
            })
        })
        .collect()
}

/// Warns of a port of the Service that the policy is for, where that leads to another one: rules name the workload's.
pub(super) fn check_ports(resources: &Resources, policy: &Object<AuthorizationPolicySpec>, problems: &mut Problems) {
    let namespace: Arc<str> = policy.metadata.namespace.as_str().into();
    let targets = policy.spec.target_refs.iter().filter(|target| target.kind == TargetKind::Service);
    let services: Vec<&Object<ServiceSpec>> =
        targets.filter_map(|target| resources.service(&Named::new(Arc::clone(&namespace), target.name.as_str()))).collect();
    if services.len() != policy.spec.target_refs.len() {
        return;
    }
    for (index, rule) in policy.spec.rules.iter().enumerate() {
        for (to_index, to) in rule.to.iter().flatten().enumerate() {
            let at = FieldPath::root().field("spec").field("rules").index(index).field("to").index(to_index).field("ports");
            for (index, port) in to.ports.iter().flatten().enumerate() {
                let Some((service, leads)) = mistaken(resources, &services, *port) else { continue };
                problems.warn(
                    &at.index(index),
                    format!("{port} is the port of Service/{service}, and rules name the workload's: it leads to {leads}"),
                    format!("write ports: [{leads}]"),
                );
            }
        }
    }
}

/// The Service of which this is a port, and the port to which it leads, where none of them leads to this one.
fn mistaken(resources: &Resources, services: &[&Object<ServiceSpec>], port: u16) -> Option<(Named, u16)> {
    let ports = || services.iter().flat_map(|service| service.spec.ports.iter().map(move |port| (service, port)));
    let leads = |object: &Object<ServiceSpec>, written: &ServicePortSpec| match written.target() {
        PortRef::Number(number) => Some(number),
        PortRef::Name(_) => {
            let workloads = resources.workloads_in(&object.metadata.namespace);
            let mut selected = workloads.filter(|workload| object.spec.selects(&workload.metadata.labels));
            selected.find_map(|workload| service::target_port(written, &workload.spec))
        }
    };
    // Where it is not known whereto one leads, it may lead to this one.
    if ports().any(|(service, written)| leads(service, written).is_none_or(|leads| leads == port)) {
        return None;
    }
    let (service, written) = ports().find(|(_, written)| written.port == port)?;
    Some((service.named(), leads(service, written)?))
}

fn policies(resources: &Resources) -> impl Iterator<Item = (&ResourceKey, &Object<AuthorizationPolicySpec>)> {
    resources.by_key.iter().filter_map(|(key, resource)| match resource.as_ref() {
        Resource::AuthorizationPolicy(policy) => Some((key, policy)),
        _ => None,
    })
}

fn means(action: Action) -> &'static str {
    match action {
        Action::Deny => "whom it was to keep out may be let in",
        Action::Allow => "it lets nobody in",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::yaml;
    use crate::snapshot::compile;

    fn resources(text: &str) -> Resources {
        let mut resources = Resources::default();
        for document in yaml::read(text) {
            let resource = document.unwrap().resource;
            compile::admit(&mut resources, resource.key(), Ok(resource.into()));
        }
        resources
    }

    fn policy(action: &str, rule: &str) -> String {
        format!(
            "---\napiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: gate, namespace: shop}}\n\
             spec: {{targetRefs: [{{kind: Service, name: web}}], action: {action}, rules: [{rule}]}}\n"
        )
    }

    const SERVICE: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n\
        spec: {selector: {app: web}, ports: [{name: a, port: 80, targetPort: 8080}, {name: b, port: 81}]}\n";

    #[test]
    fn a_principal_of_another_trust_domain_is_warned_of() {
        let rule = "{from: [{principals: ['spiffe://other.td/ns/shop/sa/me', 'spiffe://cluster.local/ns/shop/sa/me']}]}";
        for (action, denies) in [("DENY", 1), ("ALLOW", 0)] {
            let resources = resources(&policy(action, rule));
            let found: Vec<_> = check_domains(&resources, "cluster.local").into_vec();
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].at.as_str(), "spec.rules[0].from[0].principals[0]");
            assert_eq!(found[0].remedy, "write spiffe://cluster.local/ns/NAMESPACE/sa/NAME");
            assert_eq!(denying_nobody(&resources, "cluster.local").len(), denies);
        }
    }

    #[test]
    fn a_port_of_the_service_that_leads_elsewhere_is_warned_of() {
        let told = |port: u16| {
            let text = policy("DENY", &format!("{{to: [{{ports: [{port}]}}]}}")) + SERVICE;
            let mut problems = compile::references(&resources(&text)).into_vec();
            problems.retain(|problem| problem.resource.starts_with("AuthorizationPolicy"));
            problems
                .into_iter()
                .map(|problem| format!("{}: {}; {}", problem.at, problem.text, problem.remedy))
                .collect::<Vec<_>>()
        };
        expect_test::expect![[r#"spec.rules[0].to[0].ports[0]: 80 is the port of Service/shop/web, and rules name the workload's: it leads to 8080; write ports: [8080]"#]]
            .assert_eq(&told(80).join("\n"));
        for port in [8080, 81, 9000] {
            assert!(told(port).is_empty(), "{port} {:?}", told(port));
        }
    }
}
