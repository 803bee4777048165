//! What `compile` makes of whole sets of documents, and what outlives a change.
//!
//! Each `testdata/compile/*.yaml` has a text beside it that shows what was built and what was found wrong;
//! `UPDATE_EXPECT=1 cargo test` writes it anew.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use expect_test::expect_file;
use http::{HeaderMap, Method};
use tokio::time::Instant;

use super::compile::{Own, admit, compile, forget};
use super::{
    Backend, BackendPolicies, InboundPort, Plaintext, RoutePolicies, RouteRule, Snapshot, StreamRule, WeightedBackend,
    host_matches,
};
use crate::base::names::Named;
use crate::base::problems::FieldPath;
use crate::model::yaml;
use crate::model::{Called, Kind, Resource, ResourceKey, Resources};
use crate::policy::outlier::Outcome;
use crate::policy::{Peer, RequestView};

/// What a sidecar makes of documents that come to it one after the other.
fn admit_all(text: &str, resources: &mut Resources) -> String {
    let mut said = String::new();
    for document in yaml::read(text) {
        let (key, form) = match document {
            Ok(document) => (document.resource.key(), Ok(Arc::new(document.resource))),
            Err(fault) => (fault.key.unwrap(), Err(fault.text)),
        };
        for problem in admit(resources, key, form).iter() {
            writeln!(said, "{:?} {problem}", problem.severity).unwrap();
        }
    }
    said
}

fn own(name: &str) -> Own {
    Own { workload: name.parse().unwrap(), trust_domain: "cluster.local".parse().unwrap() }
}

fn golden(name: &str) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/compile");
    let text = std::fs::read_to_string(folder.join(format!("{name}.yaml"))).unwrap();
    let own = own(text.lines().next().unwrap().strip_prefix("# own: ").unwrap());
    let mut resources = Resources::default();
    let mut dump = admit_all(&text, &mut resources);
    let (snapshot, problems) = compile(&resources, &own, &Snapshot::empty());
    for problem in problems.iter() {
        writeln!(dump, "{:?} {problem}", problem.severity).unwrap();
    }
    show(&snapshot, &mut dump);
    expect_file![folder.join(format!("{name}.txt"))].assert_eq(&dump);
}

#[test]
fn rules_stand_in_the_order_of_gateway_api() {
    golden("precedence");
}

#[test]
fn backends_are_weighed_and_broken_ones_are_kept_as_broken() {
    golden("backends");
}

#[test]
fn routes_of_the_callers_namespace_stand_for_those_of_the_services() {
    golden("consumer");
}

#[test]
fn one_kind_of_route_counts_at_a_port() {
    golden("kinds");
}

#[test]
fn a_rule_takes_the_fault_of_the_policy_that_it_refers_to_and_leads_nowhere_without_it() {
    golden("extension");
}

#[test]
fn a_backend_of_another_namespace_takes_a_grant() {
    golden("grants");
}

#[test]
fn policies_meet_at_the_ports_of_the_own_workload() {
    golden("inbound");
}

#[test]
fn a_service_for_the_callers_machine_leads_to_the_workloads_there_alone() {
    let workload = |name: &str, last: u8, node: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}\nspec: {{addresses: [10.64.0.{last}], node: {node}}}\n---\n"
        )
    };
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {clusterIP: 10.65.0.9, ports: [{port: 80}], selector: {app: web}, internalTrafficPolicy: Local}\n---\n";
    let led = |node: &str| {
        let text = service.to_owned() + &workload("web", 2, "one") + &workload("caller", 3, node);
        let mut resources = Resources::default();
        assert_eq!(admit_all(&text, &mut resources), "");
        let (snapshot, _problems) = compile(&resources, &own("shop/caller"), &Snapshot::empty());
        snapshot.outbound.backends.values().flat_map(|backend| &backend.endpoints).count()
    };
    assert_eq!((led("one"), led("two")), (1, 0));
}

#[test]
fn a_request_is_for_the_service_that_it_names() {
    let service = |name: &str, last: u8| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: shop, name: {name}}}\nspec: {{selector: {{app: web}}, \
             clusterIP: 10.65.0.{last}, clusterIPs: [\"10.65.0.{last}\", \"fd65::{last}\"], ports: [{{port: 80, targetPort: 8080}}]}}\n"
        )
    };
    let workload = "---\napiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {namespace: shop, name: web-1, labels: {app: web}}\n\
                    spec: {addresses: [10.64.0.5], serviceAccount: web, ports: [{name: http, port: 8080}]}\n";
    let mut resources = Resources::default();
    let said =
        admit_all(&format!("{workload}{}{}{}", service("web", 1), service("web-v2", 2), service("edge", 3)), &mut resources);
    assert_eq!(said, "");
    let (snapshot, _) = compile(&resources, &own("shop/web-1"), &Snapshot::empty());
    let port = snapshot.inbound.port(8080);
    for (host, expected) in [
        ("web", "shop/web"),
        ("web-v2", "shop/web-v2"),
        ("web.shop", "shop/web"),
        ("web-v2.shop.svc", "shop/web-v2"),
        ("web-v2.shop.svc.cluster.local", "shop/web-v2"),
        ("web.shop.svc.cluster.local.", "shop/web"),
        ("10.65.0.2", "shop/web-v2"),
        ("[fd65::1]", "shop/web"),
        // Who names none of them is booked to the first.
        ("web.other", "shop/edge"),
        ("web.shopping", "shop/edge"),
        ("10.64.0.5", "shop/edge"),
        ("", "shop/edge"),
    ] {
        assert_eq!(port.service_of(host).unwrap().to_string(), expected, "{host}");
    }
    assert_eq!(snapshot.inbound.port(1).service_of("web"), None);
}

#[test]
fn the_only_service_of_a_port_is_known_by_name_to_a_sidecar_that_calls_nobody() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/compile/headless.yaml")).unwrap();
    let mut resources = Resources::default();
    admit_all(&text, &mut resources);
    let (mut snapshot, _) = compile(&resources, &own("shop/db-0"), &Snapshot::empty());
    snapshot.outbound = Snapshot::empty().outbound;
    let called = snapshot.service_called("db.shop.svc.cluster.local").map(ToString::to_string);
    assert_eq!(called.as_deref(), Some("shop/db"));
}

#[test]
fn a_service_without_an_address_is_called_at_its_pods() {
    golden("headless");
}

#[test]
fn what_pods_of_a_service_without_an_address_share_is_the_services() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/compile/headless.yaml")).unwrap();
    let mut resources = Resources::default();
    admit_all(&text, &mut resources);
    let (snapshot, _) = compile(&resources, &own("shop/client-1"), &Snapshot::empty());
    let outbound = &snapshot.outbound;
    let [first, second] = ["10.64.0.5:8080", "10.64.0.6:8080"].map(|at| at.parse::<SocketAddr>().unwrap());
    let backend = |at: SocketAddr| Arc::clone(&outbound.service_at(at).unwrap().default_backend);
    assert!(Arc::ptr_eq(&backend(first).breaker, &backend(second).breaker));
    assert!(Arc::ptr_eq(&backend(first).budget, &outbound.backends[&("shop/db".parse().unwrap(), 8080)].budget));
    let called = |host: &str| outbound.service_called(second, host).map(|port| port.service.to_string());
    for (host, expected) in [
        ("db", Some("shop/db")),
        ("db-readers.shop.svc.cluster.local.", Some("shop/db-readers")),
        ("db-1.db-readers.shop", Some("shop/db-readers")),
        // Who names neither calls the first all the same, and who names an address calls the pod.
        ("db-0.db-readers.shop", Some("shop/db")),
        ("example.com", Some("shop/db")),
        ("", Some("shop/db")),
        ("10.64.0.6", None),
        ("[fd64::6]", None),
    ] {
        assert_eq!(called(host).as_deref(), expected, "{host}");
    }
    // Only what was asked for by the pod's address is known in full.
    let known = |addresses: &[&str]| {
        let called = Called { addresses: addresses.iter().map(|it| it.parse().unwrap()).collect(), ..Called::default() };
        let resources = Resources { called: Some(called), ..resources.clone() };
        let (snapshot, _) = compile(&resources, &own("shop/client-1"), &Snapshot::empty());
        (snapshot.outbound.headless.len(), snapshot.outbound.workloads.len())
    };
    assert_eq!([known(&[]), known(&["10.64.0.6"]), known(&["fd64::5"])], [(0, 0), (2, 1), (2, 1)]);
}

#[test]
fn of_two_workloads_with_one_address_one_is_reached_there_and_the_other_lets_nobody_in() {
    let workload = |name: &str, transport: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{addresses: [10.64.0.5], serviceAccount: {name}, transport: {transport}}}\n---\n"
        )
    };
    for (first, second, owner) in
        [("MutualTls", "MutualTls", "a"), ("MutualTls", "Plaintext", "a"), ("Plaintext", "MutualTls", "b")]
    {
        let mut resources = Resources::default();
        admit_all(&format!("{}{}", workload("a", first), workload("b", second)), &mut resources);
        let of = |name: &str| compile(&resources, &own(name), &Snapshot::empty()).0;
        let endpoint = &of("shop/client").outbound.workloads[&"10.64.0.5".parse().unwrap()];
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{owner}").parse().unwrap();
        assert_eq!(endpoint.transport, super::Transport::MutualTls(identity));
        for name in ["a", "b"] {
            let port = of(&format!("shop/{name}")).inbound.port(80).plaintext.clone();
            let is_closed = matches!(port, Plaintext::Refuse(rule) if rule.as_str() == "no_configuration");
            assert_eq!(is_closed, name != owner, "{name} of {first}, {second}");
        }
    }
}

#[test]
fn an_unreadable_security_policy_closes_its_target() {
    golden("refused");
}

#[test]
fn nobody_is_sent_to_a_port_of_a_sidecar_where_others_lead_to_an_application() {
    let workload = |name: &str, last: u8, port: u16| {
        format!(
            "---\napiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{namespace: shop, name: {name}, labels: {{app: web}}}}\n\
             spec: {{addresses: [10.64.0.{last}], ports: [{{name: http, port: {port}}}]}}\n"
        )
    };
    let service = "---\napiVersion: v1\nkind: Service\nmetadata: {namespace: shop, name: web}\nspec: {selector: {app: web}, clusterIP: 10.65.0.2, ports: [{port: 80, targetPort: http}]}\n";
    let addresses = |text: &str| {
        // A sidecar may hold such a workload from before, when it was none to refuse.
        let mut resources = Resources::default();
        for document in yaml::read(text) {
            let resource = document.unwrap().resource;
            resources.by_key.insert(resource.key(), Arc::new(resource));
        }
        let (snapshot, _) = compile(&resources, &own("shop/client"), &Snapshot::empty());
        backend(&snapshot).endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect::<Vec<_>>()
    };
    let own = [workload("a", 2, 14006), workload("b", 3, 14021)].concat();
    assert_eq!(addresses(&format!("{service}{own}{}", workload("c", 4, 8080))), ["10.64.0.4:8080"]);
    assert_eq!(addresses(&format!("{service}{own}")), ["10.64.0.2:14006", "10.64.0.3:14021"]);
    // Without a sidecar the port is an application's like any other.
    let plain = workload("d", 5, 14006).replace("spec: {", "spec: {transport: Plaintext, ");
    assert_eq!(addresses(&format!("{service}{own}{plain}")), ["10.64.0.5:14006"]);
}

#[test]
fn an_address_of_a_pod_leads_to_the_pod_whatever_service_is_written_with_it() {
    let text = |address: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{namespace: attack, name: aab}}\nspec: {{selector: {{app: bad}}, clusterIP: {address}, ports: [{{port: 8080}}]}}\n---\n\
             apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{namespace: shop, name: srv}}\nspec: {{addresses: [10.64.0.2]}}\n"
        )
    };
    let services = |address: &str| {
        let mut resources = Resources::default();
        assert_eq!(admit_all(&text(address), &mut resources), "");
        let (snapshot, _) = compile(&resources, &own("shop/client"), &Snapshot::empty());
        assert!(snapshot.outbound.workloads.contains_key(&"10.64.0.2".parse().unwrap()));
        snapshot.outbound.services.len()
    };
    assert_eq!(["10.64.0.2", "8.8.8.8", "10.65.0.2"].map(services), [0, 0, 1]);
}

#[test]
fn what_a_policy_goes_on_covering_is_restricted_and_never_opened_by_it() {
    golden("kept");
}

#[test]
fn a_default_that_refuses_is_not_opened_by_an_allow_policy_whose_service_leads_elsewhere() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/compile/kept.yaml")).unwrap();
    let mesh =
        "---\napiVersion: outrigger.dev/v1alpha1\nkind: Mesh\nmetadata: {name: mesh}\nspec: {defaultAuthorization: Deny}\n";
    let mut resources = Resources::default();
    assert_eq!(admit_all(&(text + mesh), &mut resources), "");
    let (snapshot, _) = compile(&resources, &own("shop/web-1"), &Snapshot::empty());
    let mut dump = String::new();
    show_port("8080", 8080, snapshot.inbound.port(8080), &mut dump);
    assert!(dump.contains(r#"by shop/sa/front: Deny(RuleName("default_deny"))"#), "{dump}");
}

fn show(snapshot: &Snapshot, dump: &mut String) {
    let mesh = &snapshot.mesh;
    writeln!(dump, "mesh {:?} egress {:?} log {} trace {}", mesh.ranges, mesh.egress, mesh.access_log, mesh.trace_sample)
        .unwrap();
    let ports = snapshot.inbound.ports.iter().map(|(number, port)| (number.to_string(), *number, port));
    for (name, number, port) in ports.chain([("other".to_owned(), 1, &snapshot.inbound.other)]) {
        show_port(&name, number, port, dump);
    }
    for (address, port) in &snapshot.outbound.services {
        writeln!(dump, "service {address} is {}:{} {:?}", port.service, port.port, port.protocol).unwrap();
        for rule in &port.rules {
            show_rule(rule, dump);
        }
        for StreamRule { name, hosts, backends } in &port.streams {
            writeln!(dump, "  connections by {name} {hosts:?}").unwrap();
            show_backends(backends, dump);
        }
    }
    for (address, ports) in &snapshot.outbound.headless {
        for port in ports {
            writeln!(dump, "pod {address} is {}:{} {:?}", port.service, port.port, port.protocol).unwrap();
            for rule in &port.rules {
                show_rule(rule, dump);
                for backend in rule.backends.iter().filter_map(|backend| backend.backend.as_ref()) {
                    let to = backend.endpoints.iter().map(|endpoint| endpoint.address.to_string());
                    writeln!(dump, "      at {}", to.collect::<Vec<_>>().join(" ")).unwrap();
                }
            }
        }
    }
    for (address, endpoint) in &snapshot.outbound.workloads {
        writeln!(dump, "workload {address} is {} {:?}", endpoint.workload, endpoint.transport).unwrap();
    }
    for backend in snapshot.outbound.backends.values() {
        let Backend { service, port, protocol, endpoints, connect_timeout, .. } = backend.as_ref();
        writeln!(dump, "backend {service}:{port} {protocol:?} connect {connect_timeout:?} {}", backend.breaker.rule).unwrap();
        for endpoint in endpoints {
            writeln!(dump, "  {} {} {:?}", endpoint.workload, endpoint.address, endpoint.transport).unwrap();
        }
    }
}

fn show_port(name: &str, number: u16, port: &InboundPort, dump: &mut String) {
    let service = port.service.as_ref().map_or_else(|| "-".to_owned(), Named::to_string);
    let plaintext = match &port.plaintext {
        Plaintext::Refuse(rule) => format!("no plaintext by {rule}"),
        Plaintext::Permit(rule) => format!("plaintext by {rule}"),
    };
    writeln!(dump, "port {name} of {service} {:?}, {plaintext}", port.protocol).unwrap();
    let RoutePolicies { jwt, authorization, rate_limit, .. } = &port.policies;
    if let Some(jwt) = jwt {
        writeln!(dump, "  token: {:?}", jwt.verify(get(&HeaderMap::new()), Duration::ZERO)).unwrap();
    }
    if let Some(limit) = rate_limit {
        writeln!(dump, "  limit: {}", limit.rule).unwrap();
    }
    for caller in ["shop/sa/front", "shop/sa/other", "evil/sa/other"] {
        let identity = format!("spiffe://cluster.local/ns/{caller}").parse().unwrap();
        let peer = Peer { identity: Some(identity), address: "10.64.0.9:1".parse().unwrap(), port: number };
        let verdict = authorization.as_ref().unwrap().decide(&peer, get(&HeaderMap::new()), None);
        writeln!(dump, "  GET / by {caller}: {verdict:?}").unwrap();
    }
}

fn get(headers: &HeaderMap) -> RequestView<'_> {
    RequestView { method: &Method::GET, authority: "web", path: "/", query: None, headers }
}

fn show_rule(rule: &RouteRule, dump: &mut String) {
    let RouteRule { name, hosts, matches, backends, policies } = rule;
    writeln!(dump, "  {name}").unwrap();
    for one in matches {
        let host = hosts.first().map(|host| format!("{host} ")).unwrap_or_default();
        writeln!(dump, "    if {host}{one:?}").unwrap();
    }
    let RoutePolicies {
        cors,
        jwt: _,
        authorization: _,
        rate_limit: _,
        fault,
        redirect,
        request_headers,
        rewrite,
        shadow,
        timeouts,
        retry,
        response_headers,
    } = policies;
    for (what, text) in [
        ("cors", cors.as_ref().map(|cors| format!("{cors:?}"))),
        ("redirect", redirect.as_ref().map(|redirect| format!("{redirect:?}"))),
        ("fault", fault.as_ref().map(|fault| fault.rule.to_string())),
        ("request headers", request_headers.as_ref().map(|edit| format!("{edit:?}"))),
        ("rewrite", rewrite.as_ref().map(|rewrite| format!("{rewrite:?}"))),
        ("timeouts", (*timeouts != Default::default()).then(|| format!("{timeouts:?}"))),
        ("retry", retry.as_ref().map(|retry| format!("{retry:?}"))),
        ("response headers", response_headers.as_ref().map(|edit| format!("{edit:?}"))),
    ] {
        if let Some(text) = text {
            writeln!(dump, "    {what} {text}").unwrap();
        }
    }
    for shadow in shadow {
        writeln!(dump, "    copies to {}:{}", shadow.service, shadow.port).unwrap();
    }
    show_backends(backends, dump);
}

fn show_backends(backends: &[WeightedBackend], dump: &mut String) {
    for backend in backends {
        let target = backend
            .backend
            .as_ref()
            .map_or_else(|| "nowhere: 500".to_owned(), |backend| format!("{}:{}", backend.service, backend.port));
        writeln!(dump, "    to {target} weight {}", backend.weight).unwrap();
        let BackendPolicies { request_headers, rewrite, shadow, response_headers } = &backend.policies;
        for edit in [request_headers, response_headers].into_iter().flatten() {
            writeln!(dump, "      {edit:?}").unwrap();
        }
        if let Some(rewrite) = rewrite {
            writeln!(dump, "      {rewrite:?}").unwrap();
        }
        for shadow in shadow {
            writeln!(dump, "      copies to {}:{}", shadow.service, shadow.port).unwrap();
        }
    }
}

/// A service, its only workload, and a policy with this spec.
fn shop(policy: &str) -> Resources {
    let mut resources = Resources::default();
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec: {{clusterIP: 10.65.0.2, selector: {{app: web}}, ports: [{{port: 80}}]}}\n---\n\
         apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: web-1, namespace: shop, labels: {{app: web}}}}\nspec: {{addresses: [10.64.0.2]}}\n---\n\
         apiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: t, namespace: shop}}\nspec:\n  targetRefs: [{{kind: Service, name: web}}]\n{policy}"
    );
    assert_eq!(admit_all(&text, &mut resources), "");
    resources
}

fn backend(snapshot: &Snapshot) -> &Arc<Backend> {
    &snapshot.outbound.backends[&("shop/web".parse().unwrap(), 80)]
}

#[tokio::test(start_paused = true)]
async fn changing_a_timeout_does_not_refill_the_bucket() {
    let own = own("shop/web-1");
    let limit = "  rateLimit: {requests: 1, per: 1h}\n";
    let (first, _) = compile(&shop(limit), &own, &Snapshot::empty());
    let admit = |snapshot: &Snapshot| snapshot.inbound.ports[&80].policies.rate_limit.as_ref().unwrap().admit(Instant::now());
    assert!(admit(&first).is_ok() && admit(&first).is_err());
    let (second, _) = compile(&shop(&format!("{limit}  connectTimeout: 3s\n")), &own, &first);
    assert!(admit(&second).is_err(), "the bucket was refilled");
    assert_eq!(backend(&second).connect_timeout, Duration::from_secs(3));
    let (third, _) = compile(&shop("  rateLimit: {requests: 2, per: 1h}\n"), &own, &second);
    assert!(admit(&third).is_ok(), "another limit is another bucket");
}

#[tokio::test(start_paused = true)]
async fn an_ejected_endpoint_stays_ejected_when_another_comes() {
    let own = own("shop/client");
    let policy = "  circuitBreaking: {ejection: {consecutiveFailures: 1}}\n";
    let (first, _) = compile(&shop(policy), &own, &Snapshot::empty());
    let bad = "10.64.0.2:80".parse().unwrap();
    assert!(backend(&first).ejections.report(bad, Outcome::Failure, 2, Instant::now()).is_some());
    let mut resources = shop(policy);
    let more = "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {name: web-2, namespace: shop, labels: {app: web}}\nspec: {addresses: [10.64.0.3]}\n";
    admit_all(more, &mut resources);
    let (second, _) = compile(&resources, &own, &first);
    assert_eq!(backend(&second).endpoints.len(), 2);
    assert!(backend(&second).ejections.is_ejected(bad, Instant::now()));
}

#[test]
fn slots_in_use_stay_counted_over_a_change() {
    let own = own("shop/client");
    let policy = "  circuitBreaking: {limits: {maxRequests: 1}}\n";
    let (first, _) = compile(&shop(policy), &own, &Snapshot::empty());
    let slot = backend(&first).breaker.admit_request();
    assert!(slot.is_some());
    let (second, _) = compile(&shop(&format!("{policy}  retryBudget: {{percent: 10}}\n")), &own, &first);
    assert!(backend(&second).breaker.admit_request().is_none());
    drop(slot);
    assert!(backend(&second).breaker.admit_request().is_some());
}

#[test]
fn what_did_not_change_is_shared() {
    let own = own("shop/client");
    let (first, _) = compile(&shop("  connectTimeout: 1s\n"), &own, &Snapshot::empty());
    let (second, _) = compile(&shop("  connectTimeout: 1s\n"), &own, &first);
    assert!(Arc::ptr_eq(backend(&first), backend(&second)));
    assert_eq!((first.generation, second.generation), (1, 2));
}

#[test]
fn only_services_that_were_asked_for_are_called() {
    let own = own("shop/web-1");
    let mut resources = shop("  connectTimeout: 1s\n");
    let callable = |resources: &Resources| compile(resources, &own, &Snapshot::empty()).0.outbound.services.len();
    assert_eq!(callable(&resources), 1);
    resources.called = Some(Called::default());
    assert_eq!(callable(&resources), 0);
    resources.called = Some(Called { addresses: ["10.65.0.2".parse().unwrap()].into(), ..Called::default() });
    assert_eq!(callable(&resources), 1);
}

#[test]
fn a_form_that_does_not_compile_leaves_the_last_good_one_in_force() {
    let mut resources = shop("  connectTimeout: 1s\n");
    let key = ResourceKey { kind: Kind::TrafficPolicy, name: "shop/t".parse().unwrap() };
    let good = Arc::clone(&resources.by_key[&key]);
    let Resource::TrafficPolicy(mut policy) = good.as_ref().clone() else { panic!("{good:?}") };
    policy.spec.connect_timeout = Some("0s".parse().unwrap());
    let problems = admit(&mut resources, key.clone(), Ok(Arc::new(Resource::TrafficPolicy(policy))));
    assert!(problems.refused());
    assert_eq!(resources.by_key[&key], good);
    assert!(admit(&mut resources, key.clone(), Err("unknown field".to_owned())).refused());
    assert_eq!(resources.by_key[&key], good);
    assert!(resources.refused.is_empty());
    forget(&mut resources, &key);
    assert!(!resources.by_key.contains_key(&key));
}

#[test]
fn before_the_first_configuration_nothing_is_let_in_and_nothing_is_known() {
    let snapshot = Snapshot::empty();
    let mut dump = String::new();
    show(&snapshot, &mut dump);
    assert_eq!(dump.matches("Deny(RuleName(\"no_configuration\"))").count(), 3, "{dump}");
    let without_own_workload = compile(&shop("  connectTimeout: 1s\n"), &own("shop/unknown"), &snapshot).0;
    assert!(without_own_workload.inbound.ports.is_empty());
    assert!(
        matches!(&without_own_workload.inbound.other.plaintext, Plaintext::Refuse(rule) if rule.as_str() == "no_configuration")
    );
    assert_eq!(FieldPath::root().as_str(), "");
}

#[test]
fn a_host_pattern_is_a_name_or_everything_below_one() {
    let hosts = |names: &[&str]| names.iter().map(|name| Box::<str>::from(*name)).collect::<Vec<_>>();
    assert!(host_matches(&[], "anything"));
    assert!(host_matches(&hosts(&["web.shop"]), "web.shop"));
    assert!(!host_matches(&hosts(&["web.shop"]), "api.web.shop"));
    assert!(host_matches(&hosts(&["*.shop"]), "a.b.shop"));
    assert!(!host_matches(&hosts(&["*.shop"]), "shop"));
    assert!(!host_matches(&hosts(&["*.shop"]), ".shop"));
}
