//! What the news of a cluster change, without a cluster.

use std::collections::BTreeMap;

use super::cluster::{Cluster, News};
use super::object::testing::object;
use super::watched::Watched;
use crate::control::cluster::last_good::{LastGood, Standing};
use crate::control::placed::Placed;
use crate::control::world::{Change, Form, World};
use crate::model::{Kind, ResourceKey};

/// A cluster and the world that it makes.
#[derive(Default)]
struct Scene {
    cluster: Cluster,
    world: World,
    problems: Vec<String>,
    standing: Standing,
}

impl Scene {
    /// Everything was listed, and there was nothing.
    fn empty() -> Self {
        let mut scene = Self::default();
        for watched in Watched::all() {
            scene.cluster.take(watched, News::Begins, &Placed::default());
            scene.cluster.take(watched, News::Ends, &Placed::default());
        }
        scene
    }

    fn is(&mut self, text: &str) -> usize {
        let object = object(text);
        let watched = watched(&object.body);
        self.cluster.take(watched, News::Is(object), &Placed::default());
        self.settle()
    }

    fn gone(&mut self, text: &str) -> usize {
        let object = object(text);
        let watched = watched(&object.body);
        self.cluster.take(watched, News::Gone(object), &Placed::default());
        self.settle()
    }

    /// Brings the world up to date; returns how many changes came.
    fn settle(&mut self) -> usize {
        let Some(batch) = self.cluster.batch() else { return 0 };
        self.problems = batch.problems.iter().map(ToString::to_string).collect();
        if let Some(standing) = batch.standing {
            self.standing = standing;
        }
        let count = batch.changes.len();
        for change in batch.changes {
            self.world.apply(change);
        }
        count
    }

    /// Everything was listed anew by a control plane that knows what this one kept.
    fn restarted(&mut self, kept: BTreeMap<ResourceKey, LastGood>, objects: &[&str]) {
        let mut scene = Self::default();
        scene.cluster.remember(kept);
        for watched in Watched::all() {
            scene.cluster.take(watched, News::Begins, &Placed::default());
        }
        for text in objects {
            scene.is(text);
        }
        for watched in Watched::all() {
            scene.cluster.take(watched, News::Ends, &Placed::default());
        }
        scene.settle();
        *self = scene;
    }

    fn json(&self, key: &str) -> serde_json::Value {
        let key: ResourceKey = key.parse().unwrap();
        self.world.body(&key).map_or(serde_json::Value::Null, |body| serde_json::from_str(&body.json).unwrap())
    }

    fn keys(&self, kind: Kind) -> Vec<String> {
        self.world.resources().of_kind(kind).map(|(key, _)| key.name.to_string()).collect()
    }
}

fn watched(body: &serde_json::Value) -> Watched {
    let kind = body["kind"].as_str().unwrap();
    Watched::all().find(|watched| watched.kind() == kind).unwrap()
}

fn pod(name: &str, address: &str, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}, creationTimestamp: '2026-01-01T00:00:00Z'{more}}}\nspec: {{nodeName: one, containers: [{{name: c, ports: [{{name: http, containerPort: 8080}}]}}]}}\nstatus: {{phase: Running, podIPs: [{{ip: {address}}}], conditions: [{{type: Ready, status: 'True'}}]}}\n"
    )
}

fn service(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}}}\nstatus: {{loadBalancer: {{}}}}\n"
    )
}

const POLICY: &str = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: none, namespace: shop}\nspec: {action: DENY, rules: [{}]}\n";

#[test]
fn nothing_is_complete_before_every_watch_has_listed() {
    let mut cluster = Cluster::default();
    for watched in Watched::all() {
        assert!(cluster.awaited().any(|awaited| awaited == watched));
        cluster.take(watched, News::Begins, &Placed::default());
        assert!(cluster.awaited().any(|awaited| awaited == watched));
        // A kind that the server does not know has no objects.
        cluster.take(watched, if watched == Watched::ServiceCidrs { News::Absent } else { News::Ends }, &Placed::default());
    }
    assert_eq!(cluster.awaited().count(), 0);
}

#[test]
fn pods_and_services_of_a_cluster_are_in_the_world() {
    let mut scene = Scene::empty();
    scene.is("apiVersion: v1\nkind: Node\nmetadata: {name: one}\nspec: {podCIDRs: [10.244.0.0/24, 'fd44::/64']}\n");
    scene
        .is("apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\nspec: {cidrs: [10.96.0.0/16]}\n");
    scene.is(&service("web", "clusterIP: 10.96.0.9, clusterIPs: [10.96.0.9], type: ClusterIP, selector: {app: web}, ports: [{port: 80, targetPort: http}]"));
    scene.is(&pod("web", "10.244.0.7", ""));
    assert_eq!(scene.json("Workload/shop/web")["spec"]["addresses"], serde_json::json!(["10.244.0.7"]));
    assert_eq!(scene.json("Workload/shop/web")["spec"]["transport"], "Plaintext");
    assert_eq!(scene.json("Service/shop/web")["spec"]["clusterIP"], "10.96.0.9");
    assert!(scene.world.is_in_force(&"Service/shop/web".parse().unwrap()));
    let ranges = &scene.json("Mesh/outrigger-system/cluster-networks")["spec"]["ranges"];
    assert_eq!(*ranges, serde_json::json!(["10.96.0.0/16", "10.244.0.0/24", "fd44::/64"]));
    assert_eq!(scene.problems, [""; 0]);
    scene.gone(&pod("web", "10.244.0.7", ""));
    assert_eq!(scene.keys(Kind::Workload), [""; 0]);
}

#[test]
fn a_mesh_that_says_no_networks_is_given_those_of_the_cluster() {
    let mut scene = Scene::empty();
    scene.is("apiVersion: v1\nkind: Node\nmetadata: {name: one}\nspec: {podCIDRs: [10.244.0.0/24]}\n");
    let mesh =
        |spec: &str| format!("apiVersion: outrigger.dev/v1alpha1\nkind: Mesh\nmetadata: {{name: mesh}}\nspec: {{{spec}}}\n");
    scene.is(&mesh("egress: Deny"));
    assert_eq!(scene.keys(Kind::Mesh), ["outrigger-system/mesh"]);
    assert_eq!(
        scene.json("Mesh/outrigger-system/mesh")["spec"],
        serde_json::json!({ "egress": "Deny", "ranges": ["10.244.0.0/24"] })
    );
    // A neighbour's network makes one with it; a network of the mesh's own is not touched.
    scene.is("apiVersion: v1\nkind: Node\nmetadata: {name: two}\nspec: {podCIDRs: [10.244.1.0/24]}\n");
    assert_eq!(scene.json("Mesh/outrigger-system/mesh")["spec"]["ranges"], serde_json::json!(["10.244.0.0/23"]));
    scene.is(&mesh("ranges: [10.0.0.0/8]"));
    assert_eq!(scene.json("Mesh/outrigger-system/mesh")["spec"]["ranges"], serde_json::json!(["10.0.0.0/8"]));
    scene.gone(&mesh(""));
    assert_eq!(scene.keys(Kind::Mesh), ["outrigger-system/cluster-networks"]);
}

#[test]
fn a_network_that_the_mesh_gives_services_addresses_of_is_told() {
    let mut scene = Scene::empty();
    scene.is("apiVersion: v1\nkind: Node\nmetadata: {name: one}\nspec: {podCIDRs: [10.65.3.0/24]}\n");
    assert!(scene.problems[0].contains("the cluster's networks hold 10.65.0.0/16"), "{:?}", scene.problems);
}

#[test]
fn of_two_pods_with_one_address_the_one_that_lives_counts() {
    let mut scene = Scene::empty();
    let ending = ", deletionTimestamp: '2026-01-01T01:00:00Z'";
    scene.is(&pod("old", "10.244.0.7", ""));
    scene.is(&pod("new", "10.244.0.7", ", uid: second"));
    scene.is(&pod("old", "10.244.0.7", ending));
    assert_eq!(scene.keys(Kind::Workload), ["shop/new"]);
    scene.gone(&pod("new", "10.244.0.7", ", uid: second"));
    assert_eq!(scene.keys(Kind::Workload), ["shop/old"]);
}

#[test]
fn a_service_without_a_selector_leads_to_its_slices() {
    let mut scene = Scene::empty();
    let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: db-1, namespace: shop, labels: {kubernetes.io/service-name: db}}\naddressType: IPv4\nendpoints: [{addresses: [192.0.2.5]}, {addresses: [10.244.0.7]}, {addresses: [192.0.2.6], conditions: {ready: false}}]\nports: [{name: sql, port: 5432}]\n";
    scene.is(slice);
    scene.is(&pod("web", "10.244.0.7", ""));
    scene.is(&service("db", "clusterIP: 10.65.0.9, ports: [{name: sql, port: 3306}]"));
    let behind = |scene: &Scene| {
        let resources = scene.world.resources();
        let service = resources.service(&"shop/db".parse().unwrap()).unwrap();
        let led = service.spec.leads_to(resources.workloads());
        led.map(|workload| {
            let port = workload.spec.port(&service.spec.ports[0].target()).unwrap();
            format!("{} {port}", workload.spec.addresses[0])
        })
        .collect::<std::collections::BTreeSet<String>>()
    };
    let all = ["10.244.0.7 5432", "192.0.2.5 5432"].map(str::to_owned);
    assert_eq!(behind(&scene), all.clone().into());
    // The pod's address stays where the slice says it is when the pod goes.
    scene.gone(&pod("web", "10.244.0.7", ""));
    assert_eq!(behind(&scene), all.into());
    scene.gone(slice);
    assert!(behind(&scene).is_empty() && scene.keys(Kind::Workload).is_empty());
}

/// Where the first port of a Service leads.
fn led(scene: &Scene, service: &str) -> Vec<String> {
    let resources = scene.world.resources();
    let service = resources.service(&service.parse().unwrap()).unwrap();
    let target = service.spec.ports[0].target();
    let behind = service.spec.leads_to(resources.workloads());
    let mut led: Vec<String> =
        behind.filter_map(|workload| Some(format!("{}:{}", workload.spec.addresses[0], workload.spec.port(&target)?))).collect();
    led.sort();
    led
}

fn slice(name: &str, address: &str, ports: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: db}}}}\naddressType: IPv4\nendpoints: [{{addresses: [{address}]}}]\nports: [{ports}]\n"
    )
}

#[test]
fn a_slice_leads_to_a_pods_port_by_its_number_whatever_the_pod_calls_it() {
    // The pod calls its 8080 http.
    for ports in ["{name: sql, port: 8080}", "{name: http, port: 9090}", "{name: sql, port: 5432}", "{port: 8080}"] {
        let mut scene = Scene::empty();
        let name = if ports.contains("name") { &ports[1..ports.find(',').unwrap()] } else { "protocol: TCP" };
        scene.is(&service("db", &format!("clusterIP: 10.65.0.9, ports: [{{{name}, port: 3306}}]")));
        scene.is(&slice("db-1", "10.244.0.7", ports));
        scene.is(&pod("web", "10.244.0.7", ""));
        let number = ports.split("port: ").nth(1).unwrap().trim_end_matches('}');
        assert_eq!(led(&scene, "shop/db"), [format!("10.244.0.7:{number}")], "{ports}");
        assert_eq!(scene.problems, [""; 0], "{ports}");
    }
}

#[test]
fn slices_that_give_a_port_two_numbers_lead_by_name_and_a_pod_that_calls_its_own_otherwise_is_told() {
    let mut scene = Scene::empty();
    scene.is(&service("db", "clusterIP: 10.65.0.9, ports: [{name: http, port: 3306}]"));
    scene.is(&slice("db-1", "10.244.0.7", "{name: http, port: 9090}"));
    scene.is(&slice("db-2", "192.0.2.5", "{name: http, port: 80}"));
    scene.is(&pod("web", "10.244.0.7", ""));
    assert_eq!(led(&scene, "shop/db"), ["10.244.0.7:8080", "192.0.2.5:80"]);
    let told = "the port \"http\" is 9090, but not so named in the pod shop/web, and the slices of shop/db do not agree on one number: the Service leads to 8080";
    assert!(scene.problems.len() == 1 && scene.problems[0].contains(told), "{:?}", scene.problems);
    // With one number there is no question.
    scene.is(&slice("db-2", "192.0.2.5", "{name: http, port: 9090}"));
    assert_eq!(led(&scene, "shop/db"), ["10.244.0.7:9090", "192.0.2.5:9090"]);
    assert_eq!(scene.problems, [""; 0]);
}

#[test]
fn a_slice_that_names_a_sidecars_pod_of_another_namespace_does_not_lead_there() {
    let mut scene = Scene::empty();
    scene.is(&service("db", "clusterIP: 10.65.0.9, ports: [{port: 80}]"));
    let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: db-1, namespace: shop, labels: {kubernetes.io/service-name: db}}\naddressType: IPv4\nendpoints: [{addresses: [10.244.0.7]}, {addresses: [10.244.0.8]}]\nports: [{port: 8080}]\n";
    scene.is(slice);
    assert_eq!(scene.keys(Kind::Workload).len(), 2);
    let elsewhere = |address: &str, meshed: bool| {
        let pod = pod("vault", address, "").replace("namespace: shop", "namespace: bank");
        if !meshed {
            return pod;
        }
        let volume = "volumes: [{name: outrigger, csi: {driver: csi.outrigger.dev, readOnly: true}}], initContainers: [{name: outrigger, restartPolicy: Always, volumeMounts: [{name: outrigger, mountPath: /run/outrigger}]}], containers:";
        pod.replace("labels: {", "labels: {outrigger.dev/sidecar: injected, ").replace("containers:", volume)
    };
    scene.is(&elsewhere("10.244.0.7", true));
    // What is not said of its transport is mutual TLS.
    assert_eq!(scene.json("Workload/bank/vault")["spec"]["transport"], serde_json::Value::Null);
    let left = scene.keys(Kind::Workload);
    assert!(left.len() == 2 && left.contains(&"bank/vault".to_owned()), "{left:?}");
    assert!(scene.problems[0].contains("10.244.0.7 is the pod bank/vault of another namespace"), "{:?}", scene.problems);
    // One without a sidecar is dialled as anything else outside the mesh is.
    scene.gone(&elsewhere("10.244.0.7", true));
    assert_eq!((scene.keys(Kind::Workload).len(), scene.problems.len()), (2, 0));
    scene.is(&elsewhere("10.244.0.7", false));
    assert_eq!((scene.keys(Kind::Workload).len(), scene.problems.len()), (3, 0));
}

#[test]
fn a_service_that_stands_for_another_name_has_no_address_and_nothing_behind_it() {
    let mut scene = Scene::empty();
    scene.is(&service("ext", "type: ExternalName, externalName: example.com, selector: {app: web}, ports: [{port: 80}]"));
    assert_eq!(scene.json("Service/shop/ext")["spec"], serde_json::json!({ "clusterIP": "None", "ports": [{ "port": 80 }] }));
}

#[test]
fn a_list_takes_away_what_it_does_not_hold() {
    let mut scene = Scene::empty();
    let services = Watched::Documents(Kind::Service);
    scene.is(&service("a", "clusterIP: 10.65.0.9"));
    scene.is(&service("b", "clusterIP: 10.65.0.10"));
    scene.cluster.take(services, News::Begins, &Placed::default());
    scene.cluster.take(services, News::Is(object(&service("b", "clusterIP: 10.65.0.10"))), &Placed::default());
    assert_eq!((scene.settle(), scene.keys(Kind::Service).len()), (1, 2), "a half of a list takes nothing away");
    scene.cluster.take(services, News::Ends, &Placed::default());
    scene.settle();
    assert_eq!(scene.keys(Kind::Service), ["shop/b"]);
}

#[test]
fn an_event_that_comes_late_changes_nothing() {
    let mut scene = Scene::empty();
    let versioned = |version: u64, uid: &str, address: &str| {
        service("web", &format!("clusterIP: {address}"))
            .replace("{name: web,", &format!("{{name: web, uid: {uid}, resourceVersion: '{version}',"))
    };
    scene.is(&versioned(7, "a", "10.65.0.7"));
    assert_eq!(scene.is(&versioned(6, "a", "10.65.0.6")), 0);
    assert_eq!(scene.is(&versioned(7, "a", "10.65.0.7")), 0);
    scene.is(&versioned(3, "b", "10.65.0.3"));
    // The end of the one before does not end the one that took its name.
    assert_eq!(scene.gone(&versioned(8, "a", "10.65.0.7")), 0);
    assert_eq!(scene.json("Service/shop/web")["spec"]["clusterIP"], "10.65.0.3");
}

#[test]
fn a_document_that_turns_bad_keeps_its_last_good_form_and_is_told() {
    let mut scene = Scene::empty();
    scene.is(POLICY);
    let before = scene.json("AuthorizationPolicy/shop/none");
    scene.is(&POLICY.replace("action: DENY", "action: FORBID"));
    assert_eq!(scene.json("AuthorizationPolicy/shop/none"), before);
    assert!(scene.problems[0].contains("\"FORBID\" is not a value of this field"), "{:?}", scene.problems);
    scene.is(POLICY);
    assert_eq!(scene.problems, [""; 0]);
}

#[test]
fn a_security_policy_that_cannot_be_read_closes_its_namespace_however_large_it_is() {
    let note = "x".repeat(1 << 20);
    for bad in [
        POLICY.replace("action: DENY", "action: FORBID"),
        POLICY.replace("name: none,", &format!("name: none, annotations: {{note: {note}}},")),
    ] {
        let mut scene = Scene::empty();
        let told = scene.cluster.batch();
        assert!(told.is_none());
        let object = object(&bad);
        scene.cluster.take(Watched::Documents(Kind::AuthorizationPolicy), News::Is(object), &Placed::default());
        let batch = scene.cluster.batch().unwrap();
        assert!(matches!(&batch.changes[0], Change::Put { form: Form::Unreadable { .. }, .. }), "{:?}", batch.problems);
    }
}

#[test]
fn a_route_of_another_controller_is_left_alone_whatever_it_says() {
    let mut scene = Scene::empty();
    let route = |parent: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: shop}}\nspec: {{parentRefs: [{parent}], aFieldOfTomorrow: 1}}\n"
        )
    };
    assert_eq!(scene.is(&route("{kind: Gateway, name: edge}")), 0);
    assert_eq!(scene.problems, [""; 0]);
    scene.is(&route("{group: '', kind: Service, name: web}"));
    assert!(scene.problems[0].contains("unknown field \"aFieldOfTomorrow\""), "{:?}", scene.problems);
    scene.is(&route("{kind: Gateway, name: edge}"));
    assert_eq!(scene.problems, [""; 0]);
}

#[test]
fn the_policies_of_a_namespace_that_is_deleted_stand_until_its_last_pod_is_gone() {
    let mut scene = Scene::empty();
    let namespace = |more: &str| format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop{more}}}\n");
    scene.is(&namespace(""));
    scene.is(&pod("web", "10.244.0.7", ""));
    scene.is(POLICY);
    scene.is(&namespace(", deletionTimestamp: '2026-01-01T01:00:00Z'"));
    scene.gone(POLICY);
    assert_eq!(scene.keys(Kind::AuthorizationPolicy), ["shop/none"]);
    scene.gone(&pod("web", "10.244.0.7", ""));
    assert_eq!(scene.keys(Kind::AuthorizationPolicy), [""; 0]);
    // Elsewhere a policy that is deleted is gone at once.
    let mut scene = Scene::empty();
    scene.is(&pod("web", "10.244.0.7", ""));
    scene.is(POLICY);
    scene.gone(POLICY);
    assert_eq!(scene.keys(Kind::AuthorizationPolicy), [""; 0]);
}

#[test]
fn the_order_in_which_kinds_are_told_does_not_matter() {
    let texts = [
        "apiVersion: v1\nkind: Node\nmetadata: {name: one}\nspec: {podCIDRs: [10.244.0.0/24]}\n".to_owned(),
        "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\nspec: {cidrs: [10.96.0.0/16]}\n"
            .to_owned(),
        service("web", "clusterIP: 10.96.0.9, selector: {app: web}, ports: [{port: 80, targetPort: http}]"),
        pod("web", "10.244.0.7", ""),
        POLICY.to_owned(),
    ];
    let bodies = |order: &[usize]| {
        let mut scene = Scene::empty();
        for index in order {
            scene.is(&texts[*index]);
        }
        let keys = scene.world.resources().by_key.keys();
        keys.map(|key| (key.to_string(), scene.world.body(key).unwrap().json.to_string())).collect::<BTreeMap<_, _>>()
    };
    let expected = bodies(&[0, 1, 2, 3, 4]);
    assert_eq!(expected.len(), 4);
    for order in [[4, 3, 2, 1, 0], [2, 0, 4, 1, 3], [3, 2, 1, 0, 4]] {
        assert_eq!(bodies(&order), expected, "{order:?}");
    }
}

#[test]
fn a_pod_is_where_its_node_says_until_the_api_server_says_it() {
    let mut scene = Scene::empty();
    let nowhere = pod("web", "10.244.0.7", "").replace("podIPs: [{ip: 10.244.0.7}]", "podIPs: []");
    scene.is(&nowhere);
    let addresses = |scene: &Scene| scene.json("Workload/shop/web")["spec"]["addresses"].clone();
    assert_eq!(addresses(&scene), serde_json::json!([]));
    let placed = Placed::default();
    placed.put("uid-of-web", "another", vec!["10.244.0.8".parse().unwrap()]);
    scene.cluster.place(&placed);
    assert_eq!((scene.settle(), addresses(&scene)), (0, serde_json::json!([])), "another node is not believed");
    placed.put("uid-of-web", "one", vec!["10.244.0.7".parse().unwrap()]);
    scene.cluster.place(&placed);
    scene.settle();
    assert_eq!(addresses(&scene), serde_json::json!(["10.244.0.7"]));
    assert!(scene.cluster.is_nowhere("uid-of-web"));
    scene.is(&pod("web", "10.244.0.9", ""));
    assert_eq!(addresses(&scene), serde_json::json!(["10.244.0.9"]));
    assert!(!scene.cluster.is_nowhere("uid-of-web"));
}

#[test]
fn a_policy_covers_what_an_earlier_control_plane_wrote_down_unless_it_was_written_anew_since() {
    let policy = |generation: u32| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: none, namespace: shop, generation: {generation}}}\nspec: {{action: DENY, targetRefs: [{{kind: Service, name: web}}], rules: [{{}}]}}\nstatus: {{conditions: [{{type: Accepted, observedGeneration: 1}}], kept: [{{service: web, selector: {{app: old}}, ports: [80]}}]}}\n"
        )
    };
    for (generation, kept) in [
        (1, serde_json::json!([{ "service": "web", "selector": { "app": "old" }, "ports": [80] }])),
        (2, serde_json::Value::Null),
    ] {
        let mut scene = Scene::empty();
        scene.is(&policy(generation));
        scene.is(&service("web", "clusterIP: 10.65.0.9, selector: {app: web}, ports: [{port: 80}]"));
        assert_eq!(scene.json("AuthorizationPolicy/shop/none")["status"]["kept"], kept, "{generation}");
    }
}

fn route(generation: u64, path: &str, more: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web, namespace: shop, generation: {generation}{more}}}\nspec: {{parentRefs: [{{kind: Service, name: web}}], rules: [{{matches: [{{path: {path}}}], backendRefs: [{{name: web, port: 80}}]}}]}}\n"
    )
}

const BROKEN: &str = "{type: RegularExpression, value: '/a('}";

/// The path that the route in force matches.
fn path_in_force(scene: &Scene) -> serde_json::Value {
    scene.json("HTTPRoute/shop/web").pointer("/spec/rules/0/matches/0/path/value").cloned().unwrap_or_default()
}

#[test]
fn a_route_whose_update_is_refused_has_its_last_good_form_after_a_restart_too() {
    let mut scene = Scene::empty();
    scene.is(&route(1, "{value: /good}", ""));
    assert_eq!(scene.standing, Standing::default());
    let broken = route(2, BROKEN, "");
    scene.is(&broken);
    assert_eq!(path_in_force(&scene), "/good");
    let kept = scene.standing.last_good.clone();
    let key: ResourceKey = "HTTPRoute/shop/web".parse().unwrap();
    assert_eq!((kept[&key].generation, kept[&key].uid.as_str()), (Some(1), "uid-of-web"));
    scene.restarted(kept.clone(), &[&broken]);
    assert_eq!(path_in_force(&scene), "/good");
    assert_eq!(scene.standing.last_good, kept, "what stands is kept for the next life as well");

    // One that began before the others wrote it down learns of it later.
    scene.restarted(BTreeMap::new(), &[&broken]);
    assert_eq!(path_in_force(&scene), serde_json::Value::Null);
    assert!(scene.cluster.is_without() && scene.standing.without.contains("uid-of-web"));
    scene.cluster.remember(kept.clone());
    scene.settle();
    assert_eq!((path_in_force(&scene), scene.cluster.is_without()), ("/good".into(), false));

    // What is good again is what is written.
    scene.is(&route(3, "{value: /better}", ""));
    assert_eq!((path_in_force(&scene), &scene.standing), ("/better".into(), &Standing::default()));

    // An object that was deleted and made anew has no earlier form.
    scene.restarted(kept, &[&route(1, BROKEN, ", uid: another")]);
    assert_eq!(path_in_force(&scene), serde_json::Value::Null);
}

#[test]
fn a_policy_that_was_never_good_closes_what_its_newest_form_names() {
    let policy = |target: &str| {
        POLICY.replace(
            "{action: DENY, rules: [{}]}",
            &format!(
                "{{targetRefs: [{{kind: Service, name: {target}}}], action: DENY, rules: [{{to: [{{paths: [no-slash]}}]}}]}}"
            ),
        )
    };
    let mut scene = Scene::empty();
    scene.is(&policy("web"));
    scene.is(&policy("other"));
    assert_eq!(scene.json("AuthorizationPolicy/shop/none").pointer("/spec/targetRefs/0/name").unwrap(), "other");
    assert!(scene.standing.last_good.is_empty() && scene.standing.without.contains("uid-of-none"));
}
