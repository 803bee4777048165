//! Which resources a sidecar may and must see. What was not asked for is never in an answer.
//!
//! The answer to a scope is a closure: everything that `compile` follows from there, and nothing beyond. `Mesh` is in all
//! of them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::world::World;
use crate::base::names::Named;
use crate::delta::Scope;
use crate::model::object::{MESH_NAMESPACE, Object};
use crate::model::route::{Lead, Route};
use crate::model::service::ServiceSpec;
use crate::model::target::TargetKind;
use crate::model::{Kind, Resource, ResourceKey};

/// What a scope consists of.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Selection {
    /// Nothing is known by this name. `Mesh` is in the answer all the same.
    pub(crate) absent: bool,
    pub(crate) keys: BTreeSet<ResourceKey>,
}

/// What the sidecar of pod `client` sees of `scope`. Whether the pod may ask for the scope is the session's to decide.
pub(crate) fn select(world: &World, client: &Named, scope: &Scope) -> Selection {
    let mut keys = BTreeSet::new();
    let absent = match scope {
        Scope::Workload(name) => !workload(world, name, &mut keys),
        Scope::Service(name) => !service(world, client, name, &mut keys),
        Scope::Address(address) => {
            let mut known = false;
            for key in world.at(address.to_canonical()) {
                known |= match key.kind {
                    // One that is written with an address of somebody else is not there.
                    Kind::Service => {
                        has(world, &key.name, address.to_canonical()) && service(world, client, &key.name, &mut keys)
                    }
                    _ => {
                        keys.insert(key.clone());
                        headless_services(world, client, &key.name, &mut keys);
                        true
                    }
                };
            }
            !known
        }
    };
    keys.extend(of_kind(world, Kind::Mesh).map(|(key, _)| key.clone()));
    Selection { absent, keys }
}

fn has(world: &World, service: &Named, address: IpAddr) -> bool {
    world.resources().service(service).is_some_and(|service| world.addresses_of(service).contains(&address))
}

/// The own pod: its Workload, the services that select it, and the policies for it, for them, its namespace and the mesh;
/// policies for services that selected it before, too.
fn workload(world: &World, name: &Named, keys: &mut BTreeSet<ResourceKey>) -> bool {
    let own = ResourceKey { kind: Kind::Workload, name: name.clone() };
    let Some(Resource::Workload(object)) = world.resources().get(&own).map(AsRef::as_ref) else { return false };
    for (key, resource) in of_namespace(world, Kind::Service, &name.namespace) {
        if let Resource::Service(service) = resource
            && service.spec.selects(&object.metadata.labels)
        {
            keys.extend(world.policies_of(TargetKind::Service, &key.name).cloned());
            keys.insert(key.clone());
        }
    }
    keys.extend(world.policies_of(TargetKind::Workload, name).cloned());
    let kept = world.coverage().kept_in(&name.namespace);
    keys.extend(kept.filter(|(_, forms)| forms.iter().any(|form| form.selects(object))).map(|(policy, _)| policy.clone()));
    keys.extend(world.policies_in(&name.namespace).cloned());
    keys.extend(world.policies_in(MESH_NAMESPACE).cloned());
    keys.insert(own);
    true
}

/// A service that the pod calls: itself, its routes, and where they lead.
fn service(world: &World, client: &Named, name: &Named, keys: &mut BTreeSet<ResourceKey>) -> bool {
    if !backend(world, name, keys) {
        return false;
    }
    for key in world.routes_of(name) {
        // A route of another namespace than the service's is for callers of the route's namespace alone (GEP-1426).
        if key.name.namespace != name.namespace && key.name.namespace != client.namespace {
            continue;
        }
        keys.insert(key.clone());
        if let Some(route) = world.resources().get(key).and_then(|resource| resource.route()) {
            let named = |name: &str| ResourceKey { kind: Kind::TrafficPolicy, name: Named::new(&*key.name.namespace, name) };
            let lent = route.extensions().into_iter().map(|(_, extension)| named(&extension.name));
            keys.extend(lent.filter(|policy| world.resources().get(policy).is_some()));
            for target in route.leads().into_iter().filter(Lead::is_service).map(|lead| lead.named(&route)) {
                // What was not granted is nobody's to see by way of this route.
                if world.resources().permits(&route, &target) {
                    backend(world, &target, keys);
                    keys.extend(grants(world, &route, &target).cloned());
                }
            }
        }
    }
    true
}

/// The services without an address of their own whose names lead to a workload: who dials the workload may mean one of them.
fn headless_services(world: &World, client: &Named, name: &Named, keys: &mut BTreeSet<ResourceKey>) {
    let Some(workload) = world.resources().workload(name) else { return };
    for (key, resource) in of_namespace(world, Kind::Service, &name.namespace) {
        if let Resource::Service(object) = resource
            && object.spec.is_headless()
            && object.spec.selects(&workload.metadata.labels)
        {
            service(world, client, &key.name, keys);
        }
    }
}

/// A service as somewhere to send requests: itself, its traffic policies and the workloads behind it.
fn backend(world: &World, name: &Named, keys: &mut BTreeSet<ResourceKey>) -> bool {
    let key = ResourceKey { kind: Kind::Service, name: name.clone() };
    let Some(Resource::Service(service)) = world.resources().get(&key).map(AsRef::as_ref) else { return false };
    keys.insert(key);
    let policies = world.policies_of(TargetKind::Service, name);
    keys.extend(policies.filter(|policy| policy.kind == Kind::TrafficPolicy).cloned());
    keys.extend(endpoints(world, service).cloned());
    true
}

/// What grants a route that it leads to a service of another namespace.
fn grants<'a>(world: &'a World, route: &Route<'_>, service: &Named) -> impl Iterator<Item = &'a ResourceKey> {
    let is_elsewhere = *service.namespace != *route.metadata.namespace;
    let namespace = is_elsewhere.then(|| service.namespace.to_string());
    let all = of_kind(world, Kind::ReferenceGrant).map(|(key, _)| key);
    all.filter(move |key| namespace.as_deref() == Some(&*key.name.namespace))
}

fn endpoints<'a>(world: &'a World, service: &'a Object<ServiceSpec>) -> impl Iterator<Item = &'a ResourceKey> {
    of_namespace(world, Kind::Workload, &service.metadata.namespace)
        .filter(|(_, resource)| service.spec.selects(&resource.metadata().labels))
        .map(|(key, _)| key)
}

fn of_kind(world: &World, kind: Kind) -> impl Iterator<Item = (&ResourceKey, &Resource)> {
    let first = ResourceKey { kind, name: Named::new("", "") };
    let all = world.resources().by_key.range(first..).take_while(move |(key, _)| key.kind == kind);
    all.map(|(key, resource)| (key, resource.as_ref()))
}

fn of_namespace<'a>(world: &'a World, kind: Kind, namespace: &'a str) -> impl Iterator<Item = (&'a ResourceKey, &'a Resource)> {
    let first = ResourceKey { kind, name: Named::new(namespace, "") };
    let all = world.resources().by_key.range(first..);
    all.take_while(move |(key, _)| key.kind == kind && *key.name.namespace == *namespace)
        .map(|(key, resource)| (key, resource.as_ref()))
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;
    use crate::control::world::{Change, Form, Origin};
    use crate::model::yaml::{self, Fault};

    fn world(texts: &[&str]) -> World {
        let mut world = World::default();
        let origin = Origin::File("mesh.yaml".into());
        for document in texts.iter().flat_map(|text| yaml::read(text)) {
            let (key, form) = match document {
                Ok(document) => (document.resource.key(), Form::Read(document.resource.into())),
                Err(fault) => {
                    let Fault { key, body, text, .. } = *fault;
                    (key.unwrap(), Form::Unreadable { body: body.unwrap(), reason: text })
                }
            };
            world.apply(Change::Put { key, form, origin: origin.clone() });
        }
        world
    }

    fn check(world: &World, client: &str, scope: &str, expected: Expect) {
        let Selection { absent, keys } = select(world, &client.parse().unwrap(), &scope.parse().unwrap());
        let lines = keys.iter().map(|key| format!("{key}\n")).collect::<String>();
        expected.assert_eq(&format!("{}{lines}", if absent { "absent\n" } else { "" }));
    }

    const SHOP: &str = include_str!("../../testdata/explain/shop.yaml");
    const MORE: &str = include_str!("../../testdata/compile/inbound.yaml");

    #[test]
    fn a_service_comes_with_its_routes_and_where_they_lead_and_nothing_else() {
        let world = world(&[SHOP]);
        check(
            &world,
            "shop/front-1",
            "service/shop/web",
            expect![[r#"
            Service/shop/db
            Service/shop/web
            Service/shop/web-v2
            Workload/shop/db-1
            Workload/shop/web-1
            HTTPRoute/shop/web
            TrafficPolicy/shop/web
        "#]],
        );
        check(
            &world,
            "shop/front-1",
            "service/shop/db",
            expect![[r#"
            Service/shop/db
            Workload/shop/db-1
        "#]],
        );
        check(
            &world,
            "shop/front-1",
            "service/shop/gone",
            expect![[r#"
            absent
        "#]],
        );
    }

    #[test]
    fn an_address_is_the_service_or_the_workload_that_has_it() {
        let world = world(&[SHOP]);
        check(
            &world,
            "shop/front-1",
            "address/10.65.0.2",
            expect![[r#"
            Service/shop/db
            Service/shop/web
            Service/shop/web-v2
            Workload/shop/db-1
            Workload/shop/web-1
            HTTPRoute/shop/web
            TrafficPolicy/shop/web
        "#]],
        );
        check(
            &world,
            "shop/front-1",
            "address/10.64.0.5",
            expect![[r#"
            Workload/shop/db-1
        "#]],
        );
        check(
            &world,
            "shop/front-1",
            "address/10.64.9.9",
            expect![[r#"
            absent
        "#]],
        );
    }

    #[test]
    fn a_pods_address_comes_with_the_services_whose_names_lead_to_it() {
        let world = world(&[include_str!("../../testdata/compile/headless.yaml")]);
        check(
            &world,
            "shop/client-1",
            "address/10.64.0.6",
            expect![[r#"
                Service/shop/db
                Service/shop/db-readers
                Service/shop/own
                Workload/shop/db-0
                Workload/shop/db-1
                Workload/shop/db-2
                HTTPRoute/shop/db
                TrafficPolicy/shop/db
            "#]],
        );
    }

    #[test]
    fn the_own_workload_comes_with_the_policies_that_may_apply_to_it() {
        let unreadable = "---\napiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: unreadable, namespace: shop}\nspec: {acton: DENY}\n";
        let world = world(&[MORE, unreadable]);
        check(
            &world,
            "shop/web-1",
            "workload/shop/web-1",
            expect![[r#"
            Mesh/outrigger-system/mesh
            Service/shop/metrics
            Service/shop/web
            Workload/shop/web-1
            AuthorizationPolicy/outrigger-system/mesh-wide
            AuthorizationPolicy/shop/front-only
            AuthorizationPolicy/shop/no-sql
            AuthorizationPolicy/shop/unreadable
            PeerAuthentication/outrigger-system/open
            PeerAuthentication/shop/shop
            PeerAuthentication/shop/web
            TrafficPolicy/shop/limit
        "#]],
        );
        check(
            &world,
            "shop/web-1",
            "workload/shop/gone",
            expect![[r#"
            absent
            Mesh/outrigger-system/mesh
        "#]],
        );
    }

    #[test]
    fn a_policy_without_a_target_comes_with_the_routes_that_refer_to_it_and_with_nothing_else() {
        let world = world(&[include_str!("../../testdata/compile/extension.yaml")]);
        check(
            &world,
            "shop/client-1",
            "service/shop/web",
            expect![[r#"
                Service/shop/web
                HTTPRoute/shop/foreign
                HTTPRoute/shop/shares
                HTTPRoute/shop/web
                TrafficPolicy/shop/slow
                TrafficPolicy/shop/usual
            "#]],
        );
        check(
            &world,
            "shop/client-1",
            "workload/shop/client-1",
            expect![[r#"
                absent
            "#]],
        );
    }

    #[test]
    fn where_a_route_leads_elsewhere_the_grant_comes_too_and_nothing_that_is_not_granted() {
        let world = world(&[include_str!("../../testdata/compile/grants.yaml")]);
        check(
            &world,
            "shop/client-1",
            "service/shop/web",
            expect![[r#"
            Service/lab/granted
            Service/shop/web
            HTTPRoute/shop/web
            ReferenceGrant/lab/others
            ReferenceGrant/lab/shop
        "#]],
        );
    }

    #[test]
    fn a_route_of_another_namespace_is_for_its_callers_alone() {
        let world = world(&[include_str!("../../testdata/compile/consumer.yaml")]);
        check(
            &world,
            "client/client-1",
            "service/shop/web",
            expect![[r#"
            Service/shop/web
            HTTPRoute/client/mine
            HTTPRoute/shop/producers
        "#]],
        );
        check(
            &world,
            "shop/web-1",
            "service/shop/web",
            expect![[r#"
            Service/shop/web
            HTTPRoute/shop/producers
        "#]],
        );
    }
}
