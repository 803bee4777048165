//! What changes are taken and refused, and what is said of them.

use serde_json::{Value, json};
use tokio::time::{Duration, timeout};

use super::super::{NotConnected, Until, Which, proxies, resources, standing};
use super::*;
use crate::base::problems::Severity;
use crate::control::Config;
use crate::control::ca::Authority;
use crate::control::select::select;
use crate::control::sessions::Sessions;
use crate::control::store::Store;
use crate::model::Resource;

const SERVICE: &str =
    "apiVersion: v1\nkind: Service\nmetadata: { name: web, namespace: shop }\nspec: { ports: [{ port: 80 }] }\n";

fn api(state: &Path) -> Arc<Api> {
    let clock = crate::identity::testing::clock();
    let trust_domain: crate::identity::spiffe::TrustDomain = "cluster.local".parse().unwrap();
    let local = "127.0.0.1:0".parse().unwrap();
    std::fs::create_dir_all(state.join(STORED)).unwrap();
    let config = Config {
        resources: Vec::new(),
        state: state.to_owned(),
        trust_domain: trust_domain.clone(),
        listen: Vec::new(),
        api: local,
        metrics: local,
        svid_lifetime: Duration::from_secs(3600),
    };
    let store = Arc::new(Store::new(state));
    let metrics = Arc::new(crate::control::metrics::Metrics::new().unwrap());
    let sessions = Arc::new(Sessions::new(Arc::clone(&store), trust_domain.clone(), clock.clone(), metrics));
    let ca = Arc::new(Authority::open(&state.join("ca"), trust_domain, clock.clone()).unwrap());
    Api::new(&config, store, sessions, Arc::default(), ca, clock)
}

fn texts(text: &str) -> Vec<Text> {
    vec![Text { name: "web.yaml".to_owned(), text: text.to_owned(), keys: BTreeMap::new() }]
}

fn actions(answer: &Answer) -> Vec<(&str, &str)> {
    answer.results.iter().map(|done| (done.resource.as_str(), done.action.as_str())).collect()
}

#[test]
fn a_document_is_applied_changed_and_deleted() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    assert_eq!(actions(&api.apply(&texts(SERVICE))), [("Service/shop/web", "created")]);
    assert_eq!(actions(&api.apply(&texts(SERVICE))), [("Service/shop/web", "unchanged")]);
    let answer = api.apply(&texts(&SERVICE.replace("80", "81")));
    assert_eq!(actions(&answer), [("Service/shop/web", "changed")]);
    let key: ResourceKey = "Service/shop/web".parse().unwrap();
    assert!(api.store.world().body(&key).unwrap().json.contains(r#""clusterIP":"10.65.0.2""#));
    assert_eq!(actions(&api.delete(&texts(SERVICE), Again::default())), [("Service/shop/web", "deleted")]);
    assert!(api.store.world().body(&key).is_none());
    assert!(std::fs::read_dir(state.path().join(STORED)).unwrap().next().is_none());
    let again = api.delete(&texts(SERVICE), Again::default());
    assert_eq!(again.problems[0].text, "there is no such resource");
    let again = api.delete(&texts(SERVICE), Again { again: true });
    assert!(again.problems.is_empty());
    assert_eq!(actions(&again), [("Service/shop/web", "gone")]);
}

#[test]
fn one_bad_document_keeps_all_others_out() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let bad = "---\napiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec:\n  action: DENY\n  ruels: []\n";
    let answer = api.apply(&texts(&(SERVICE.to_owned() + bad)));
    let problem = answer.problems.iter().find(|problem| problem.refuses).unwrap();
    assert!(problem.text.contains("ruels"), "{problem:?}");
    assert!(problem.place.as_deref().unwrap().starts_with("web.yaml:11:"), "{problem:?}");
    assert!(answer.results.is_empty());
    assert_eq!(api.store.world().revision(), 0);
    assert!(std::fs::read_dir(state.path().join(STORED)).unwrap().next().is_none());
}

#[test]
fn a_refused_change_leaves_the_last_good_form() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    api.apply(&texts(SERVICE));
    let before = api.store.world().body(&"Service/shop/web".parse().unwrap()).unwrap().clone();
    let answer = api.apply(&texts(&SERVICE.replace("port: 80", "port: 70000")));
    assert!(answer.problems.iter().any(|problem| problem.refuses));
    assert_eq!(api.store.world().body(&"Service/shop/web".parse().unwrap()), Some(&before));
}

#[test]
fn a_document_of_a_watched_folder_is_not_deleted_but_found() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let document = yaml::read(SERVICE).remove(0).unwrap();
    let key = document.resource.key();
    let origin = Origin::File("/etc/mesh/web.yaml".into());
    api.store.apply(vec![Change::Put { key, form: Form::Read(Arc::new(document.resource)), origin }]);
    let answer = api.delete(&texts(SERVICE), Again::default());
    assert!(answer.results.is_empty());
    assert_eq!(answer.problems[0].text, "it stands in /etc/mesh/web.yaml");
}

#[test]
fn a_pod_that_runs_is_not_deleted_but_stopped() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let resource = yaml::read(POD).remove(0).unwrap().resource;
    let key = resource.key();
    let origin = Origin::Pod("pods/shop.web-1.json".into());
    api.store.apply(vec![Change::Put { key, form: Form::Read(Arc::new(resource)), origin }]);
    let answer = api.delete(&texts(POD), Again::default());
    let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
    assert_eq!(problem.text, "it is the pod shop/web-1 that runs here");
    assert_eq!(problem.remedy, "stop it: `outrigger stop web-1 -n shop`");
}

#[tokio::test]
async fn a_local_pod_whose_sidecar_is_not_connected_is_waited_for_and_named() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let pod = |name: &str, spec: &str, origin: Origin| {
        let text = format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{ name: {name}, namespace: shop }}\nspec: {{ addresses: [10.64.0.9]{spec} }}\n"
        );
        let resource = yaml::read(&text).remove(0).unwrap().resource;
        Change::Put { key: resource.key(), form: Form::Read(Arc::new(resource)), origin }
    };
    let record = || Origin::Pod("pods/shop.json".into());
    api.store.apply(vec![
        pod("web-1", "", record()),
        pod("plain-1", ", transport: Plaintext", record()),
        pod("ending-1", ", terminating: true", record()),
        pod("elsewhere-1", "", Origin::File("vm.yaml".into())),
    ]);
    let response = proxies(State(Arc::clone(&api)), Query(Until { revision: Some(1), within: 50 })).await;
    let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
    let answer: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(answer["notConnected"], json!([{ "namespace": "shop", "name": "web-1" }]));
    // Who ends while it is waited for is waited for no longer.
    let waiting = tokio::spawn(proxies(State(Arc::clone(&api)), Query(Until { revision: Some(1), within: 20_000 })));
    tokio::task::yield_now().await;
    api.store.apply(vec![pod("web-1", ", terminating: true", record())]);
    timeout(Duration::from_secs(10), waiting).await.expect("the answer comes when nobody is missing").unwrap();
}

/// What a watched folder says of a file.
fn in_folder(api: &Api, path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    let changes = yaml::read(text).into_iter().map(|document| {
        let resource = document.unwrap().resource;
        Change::Put { key: resource.key(), form: Form::Read(Arc::new(resource)), origin: Origin::File(path.to_owned()) }
    });
    api.store.apply(changes.collect());
}

#[test]
fn a_document_of_a_watched_folder_is_not_applied_over() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let path = state.path().join("mesh.yaml");
    in_folder(&api, &path, &format!("# the shop\n---\n{SERVICE}"));
    let answer = api.apply(&texts(&SERVICE.replace("80", "81")));
    assert!(answer.results.is_empty());
    let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
    assert_eq!(problem.place.as_deref(), Some("web.yaml:1:1"));
    let place = format!("{}:3:1", path.display());
    assert!(problem.refuses && problem.text.starts_with(&place), "{problem:?}");
    assert!(std::fs::read_dir(state.path().join(STORED)).unwrap().next().is_none());
}

#[test]
fn a_security_policy_that_loses_its_service_is_told_of() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let policy = "---\napiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec:\n  targetRefs: [{ kind: Service, name: web }]\n  action: DENY\n  rules: [{}]\n";
    let pod = "---\napiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: { name: web-1, namespace: shop, labels: { app: web } }\nspec: { addresses: [10.64.0.9] }\n";
    let service = SERVICE.replace("ports", "selector: { app: web }, ports");
    let answer = api.apply(&texts(&(service.clone() + policy + pod)));
    assert!(answer.problems.is_empty(), "{:?}", answer.problems);
    let answer = api.delete(&texts(&service), Again::default());
    let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
    assert!(!problem.refuses && problem.resource.as_deref() == Some("AuthorizationPolicy/shop/gate"), "{problem:?}");
    assert!(problem.text.contains("goes on covering what it led to, and nothing else; it was for shop/web-1"), "{problem:?}");
    // Both at once leave nothing behind.
    api.apply(&texts(&service));
    assert!(api.delete(&texts(&(service + policy)), Again::default()).problems.is_empty());
}

const POD: &str = "---\napiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: { name: web-1, namespace: shop, labels: { app: web } }\nspec: { addresses: [10.64.0.9] }\n";

/// A Service of another namespace that writes these addresses.
fn thief(namespace: &str, addresses: &str) -> String {
    SERVICE
        .replace("namespace: shop", &format!("namespace: {namespace}"))
        .replace("spec: {", &format!("spec: {{ clusterIPs: [{addresses}],"))
}

#[test]
fn a_service_that_writes_the_address_of_another_one_is_refused_with_its_place() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let refused = |namespace: &str, text: &str, place: &str| {
        let answer = api.apply(&texts(text));
        let [problem] = answer.problems.as_slice() else { panic!("{namespace}: {:?}", answer.problems) };
        assert!(problem.refuses && answer.results.is_empty(), "{problem:?}");
        assert_eq!(problem.resource.as_deref(), Some(format!("Service/{namespace}/web").as_str()));
        assert!(problem.text.contains("is the address of Service/shop/web, which had it first"), "{problem:?}");
        assert_eq!(problem.place.as_deref(), Some(place));
    };
    api.apply(&texts(SERVICE));
    // The first by name too: what counts is who had it.
    refused("zevil", &thief("zevil", "\"fd65::3\", 10.65.0.2"), "web.yaml:4:33");
    refused("aevil", &thief("aevil", "\"fd65::2\""), "web.yaml:4:22");
    // Also beside the victim, once more.
    refused("aevil", &format!("{}---\n{SERVICE}", thief("aevil", "\"::ffff:10.65.0.2\"")), "web.yaml:4:22");
    // Of one that writes its own, and from then on beside one that is gone.
    let own = SERVICE.replace("spec: {", "spec: { clusterIP: 10.65.7.7,");
    assert_eq!(actions(&api.apply(&texts(&own))), [("Service/shop/web", "changed")]);
    refused("aevil", &thief("aevil", "10.65.7.7"), "web.yaml:4:22");
    refused("aevil", &thief("aevil", "10.65.0.2"), "web.yaml:4:22");
    api.delete(&texts(SERVICE), Again::default());
    assert_eq!(actions(&api.apply(&texts(&thief("aevil", "10.65.7.7")))), [("Service/aevil/web", "created")]);
    // Two at once: what is written is given to nobody else, and of two that write one the first by name has it.
    let both = format!("{}---\n{}", thief("a", "10.65.8.8"), thief("b", "10.65.8.8"));
    let answer = api.apply(&texts(&both));
    let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
    assert_eq!((problem.resource.as_deref(), problem.refuses), (Some("Service/b/web"), true));
    let twice = api.apply(&texts(&thief("c", "10.65.9.9, \"::ffff:10.65.9.9\"")));
    assert!(twice.problems[0].text.contains("is there already"), "{:?}", twice.problems);
}

#[test]
fn who_changes_a_service_does_not_take_its_policy_off_the_pods() {
    let state = tempfile::tempdir().unwrap();
    let policy = "---\napiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec:\n  targetRefs: [{ kind: Service, name: web }]\n  action: DENY\n  rules: [{}]\n";
    let service = SERVICE.replace("ports", "selector: { app: web }, ports");
    let decides = |api: &Api, port: u16| {
        // What the pod's sidecar is sent, and what it makes of it.
        let pod = "shop/web-1".parse().unwrap();
        let world = api.store.world();
        let mut resources = Resources::default();
        for key in select(&world, &pod, &"workload/shop/web-1".parse().unwrap()).keys {
            let body = world.body(&key).unwrap();
            let resource = Resource::from_json(key.kind, body.json.as_bytes()).unwrap();
            assert!(!compile::admit(&mut resources, key, Ok(Arc::new(resource))).refused());
        }
        let own = compile::Own { workload: pod, trust_domain: "cluster.local".parse().unwrap() };
        let (snapshot, _) = compile::compile(&resources, &own, &crate::snapshot::Snapshot::empty());
        let identity = "spiffe://cluster.local/ns/shop/sa/any".parse().unwrap();
        let peer = crate::policy::Peer { identity: Some(identity), address: "10.64.0.3:1".parse().unwrap(), port };
        format!("{:?}", snapshot.inbound.port(port).policies.authorization.as_ref().unwrap().decide_opaque(&peer))
    };
    let denied = |api: &Api, port| {
        let verdict = decides(api, port);
        assert!(verdict.contains("AuthorizationPolicy/shop/gate"), "{port}: {verdict}");
    };
    {
        let api = api(state.path());
        let answer = api.apply(&texts(&(service.clone() + policy + POD)));
        assert!(answer.problems.is_empty(), "{:?}", answer.problems);
        denied(&api, 80);
        // Another port, and the policy beside it as it was.
        let answer = api.apply(&texts(&(service.replace("port: 80", "port: 80, targetPort: 81") + policy)));
        denied(&api, 80);
        denied(&api, 81);
        let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
        assert!(!problem.refuses && problem.resource.as_deref() == Some("AuthorizationPolicy/shop/gate"), "{problem:?}");
        let text = "the policy goes on covering port 80 of shop/web-1: Service/shop/web led there, and leads there no longer";
        assert_eq!(problem.text, text);
        // Other pods.
        let answer = api.apply(&texts(&service.replace("app: web", "app: nobody")));
        assert!(
            answer.problems.iter().any(|problem| problem.text.contains("ports 80, 81 of shop/web-1")),
            "{:?}",
            answer.problems
        );
        denied(&api, 80);
        denied(&api, 81);
    }
    {
        // While nobody looks, and without the Service.
        let api = api(state.path());
        let stored = yaml::read(&(policy.to_owned() + POD)).into_iter().map(|document| document.unwrap().resource);
        let put = |resource: Resource| {
            let origin = Origin::Applied(api.stored(&resource.key()));
            Change::Put { key: resource.key(), form: Form::Read(Arc::new(resource)), origin }
        };
        api.store.apply(stored.map(put).collect());
        api.store.forget_gone();
        denied(&api, 80);
        denied(&api, 81);
        let told = compile::without_target(api.store.world().resources());
        assert!(told.values().all(|means| means.contains("goes on covering")) && told.len() == 1, "{told:?}");
        // Who may change the policy lets go, and is told of what.
        let answer = api.apply(&texts(&policy.replace("name: gate,", "name: gate, annotations: { reviewed: today },")));
        let said = |text: &str| answer.problems.iter().any(|problem| problem.text.contains(text));
        assert!(said("lets go of ports 80, 81 of shop/web-1"), "{:?}", answer.problems);
        assert!(decides(&api, 80).contains("default_allow"));
    }
}

#[test]
fn a_policy_at_a_port_that_its_pod_excludes_is_told_of_whichever_comes_last() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let pod = POD.replace("labels:", "annotations: { outrigger.dev/exclude-inbound-ports: '80' }, labels:");
    let policy = "---\napiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec:\n  targetRefs: [{ kind: Service, name: web }]\n  action: DENY\n  rules: [{}]\n";
    let service = SERVICE.replace("ports", "selector: { app: web }, ports");
    let text = "it does nothing at port 80 of Workload/shop/web-1, to which Service/shop/web leads: the annotation outrigger.dev/exclude-inbound-ports takes that out of capture";
    let documents = [policy.to_owned(), pod, format!("---\n{service}")];
    for last in 0..documents.len() {
        for (index, document) in documents.iter().enumerate() {
            if index != last {
                api.apply(&texts(document));
            }
        }
        let answer = api.apply(&texts(&documents[last]));
        let told: Vec<_> = answer.problems.iter().filter(|problem| problem.text.starts_with(text)).collect();
        let [problem] = told.as_slice() else { panic!("{last}: {:?}", answer.problems) };
        assert!(!problem.refuses && problem.resource.as_deref() == Some("AuthorizationPolicy/shop/gate"), "{problem:?}");
        // The policy's own standing has it, and the mesh's.
        let known = api.store.problems();
        let standing = standing(&"AuthorizationPolicy/shop/gate".parse().unwrap(), "1", None, &known, &[]);
        assert!(standing["accepted"] == true && standing["problems"].to_string().contains(text), "{standing}");
        api.delete(&texts(&documents.concat()), Again::default());
    }
}

#[test]
fn what_people_write_of_the_control_planes_own_word_is_dropped() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let policy = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec: { action: DENY, rules: [{}] }\nstatus: { accepted: true, kept: [{ service: web, ports: [80] }] }\n";
    assert!(api.apply(&texts(policy)).problems.is_empty());
    let key: ResourceKey = "AuthorizationPolicy/shop/gate".parse().unwrap();
    let body = api.store.world().body(&key).unwrap().json.to_string();
    assert!(!body.contains("status"), "{body}");
}

#[test]
fn a_problem_that_a_change_makes_for_another_document_is_told_with_the_change() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let route = |name: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{ name: {name}, namespace: shop }}\nspec: {{ parentRefs: [{{ kind: Service, name: web }}], rules: [{{ backendRefs: [{{ name: web, port: 80 }}] }}] }}\n"
        )
    };
    assert!(api.apply(&texts(&format!("{SERVICE}---\n{}", route("web")))).problems.is_empty());
    for name in ["zoo", "api"] {
        let answer = api.apply(&texts(&route(name)));
        let told = |text: &str| text.contains("matches the same requests");
        assert!(answer.problems.iter().any(|problem| told(&problem.text) && !problem.refuses), "{name}");
    }
}

#[test]
fn a_service_takes_no_address_of_a_pod_or_of_a_host_outside_of_the_mesh() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let pod = "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: { name: srv, namespace: shop }\nspec: { addresses: [10.64.0.2, \"fd64::2\"] }\n";
    let pod = yaml::read(pod).remove(0).unwrap().resource;
    let (key, origin) = (pod.key(), Origin::Pod("pods/shop.srv.json".into()));
    api.store.apply(vec![Change::Put { key: key.clone(), form: Form::Read(Arc::new(pod)), origin: origin.clone() }]);
    let attack = |address: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: aab, namespace: attack }}\nspec: {{ clusterIP: \"{address}\", selector: {{ app: bad }}, ports: [{{ port: 8080 }}] }}\n"
        )
    };
    for (address, why) in [
        ("10.64.0.2", "is the address of Workload/shop/srv"),
        ("::ffff:10.64.0.2", "is the address of Workload/shop/srv"),
        ("fd64::2", "is the address of Workload/shop/srv"),
        ("8.8.8.8", "is outside of the mesh's ranges"),
    ] {
        let answer = api.apply(&texts(&attack(address)));
        let [problem] = answer.problems.as_slice() else { panic!("{address}: {:?}", answer.problems) };
        assert!(problem.refuses && problem.text.contains(why) && !problem.remedy.is_empty(), "{problem:?}");
        assert_eq!(problem.place.as_deref(), Some("web.yaml:4:9"));
        // In a folder it is told, and leads nobody away.
        let path = state.path().join("mesh.yaml");
        in_folder(&api, &path, &attack(address).replace("aab", "aac"));
        let told = api.store.problems();
        assert!(told.iter().any(|wrong| wrong.problem.text.contains(why)), "{told:?}");
        let world = api.store.world();
        let body = world.body(&"Service/attack/aac".parse().unwrap()).unwrap().json.to_string();
        assert!(!body.contains(address), "{body}");
        let scope = crate::delta::Scope::Address(address.parse().unwrap());
        let seen = select(&world, &"shop/client".parse().unwrap(), &scope);
        let expected: Vec<&ResourceKey> = if address == "8.8.8.8" { Vec::new() } else { vec![&key] };
        assert_eq!(seen.keys.iter().collect::<Vec<_>>(), expected);
        assert_eq!(seen.absent, address == "8.8.8.8");
    }
    // One that a Mesh names, and no pod has, is the Service's; it gives way once a pod comes.
    let mesh = "apiVersion: outrigger.dev/v1alpha1\nkind: Mesh\nmetadata: { name: mesh }\nspec: { ranges: [10.0.0.0/8] }\n---\n";
    api.store.apply(vec![Change::Remove { key: key.clone(), origin }]);
    let path = state.path().join("mesh.yaml");
    let leads = || api.store.world().body(&"Service/attack/aac".parse().unwrap()).unwrap().json.contains("10.96.0.1");
    in_folder(&api, &path, &attack("10.96.0.1").replace("aab", "aac"));
    assert!(!leads());
    in_folder(&api, &path, &format!("{mesh}{}", attack("10.96.0.1").replace("aab", "aac")));
    assert!(leads() && api.store.problems().is_empty(), "{:?}", api.store.problems());
    let late = "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: { name: late, namespace: shop }\nspec: { addresses: [10.96.0.1] }\n";
    let late = yaml::read(late).remove(0).unwrap().resource;
    let form = Form::Read(Arc::new(late));
    let (late, origin) = ("Workload/shop/late".parse().unwrap(), Origin::Pod("pods/shop.late.json".into()));
    api.store.apply(vec![Change::Put { key: late, form, origin }]);
    assert!(!leads());
}

#[test]
fn a_policys_file_that_is_renamed_or_written_anew_takes_nothing_off() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let gate = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec: { targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{}] }\n";
    let service = |app: &str| SERVICE.replace("spec: {", &format!("spec: {{ selector: {{ app: {app} }},"));
    let key: ResourceKey = "AuthorizationPolicy/shop/gate".parse().unwrap();
    let [path, renamed] = ["pol.yaml", "pol2.yaml"].map(|name| state.path().join(name));
    let covers = || api.store.world().body(&key).unwrap().json.contains(r#""app":"web""#);
    let gone = |path: &Path| {
        api.store.apply(vec![Change::Remove { key: key.clone(), origin: Origin::File(path.to_owned()) }]);
    };
    api.apply(&texts(&service("web")));
    in_folder(&api, &path, gate);
    api.apply(&texts(&service("nobody")));
    assert!(covers());
    gone(&path);
    assert!(api.store.world().body(&key).is_none());
    in_folder(&api, &renamed, gate);
    assert!(covers());
    // Who deletes it by name means it.
    gone(&renamed);
    api.apply(&texts(gate));
    assert!(covers());
    api.delete(&texts(gate), Again::default());
    api.apply(&texts(gate));
    assert!(!covers());
}

#[test]
fn where_what_policies_covered_cannot_be_read_they_cover_all_that_they_may_have_covered() {
    let state = tempfile::tempdir().unwrap();
    let gate = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec: { targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{}] }\n";
    let pod = "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: { name: web-1, namespace: shop, labels: { app: web } }\nspec: { addresses: [10.64.0.5] }\n";
    let service = |app: &str| SERVICE.replace("spec: {", &format!("spec: {{ selector: {{ app: {app} }},"));
    let first = api(state.path());
    for text in [gate, pod, &service("web"), &service("nobody")] {
        assert!(!first.apply(&texts(text)).problems.iter().any(|problem| problem.refuses));
    }
    drop(first);
    let covered = state.path().join("covered.json");
    // The next life reads what is stored, and takes it for all there is.
    let next = || {
        let api = api(state.path());
        let documents = [gate.to_owned(), pod.to_owned(), service("nobody")];
        let stored = documents.iter().map(|text| {
            let resource = yaml::read(text).remove(0).unwrap().resource;
            let (key, form) = (resource.key(), Form::Read(Arc::new(resource)));
            Change::Put { origin: Origin::Applied(api.stored(&key)), key, form }
        });
        api.store.apply(stored.collect());
        api.store.forget_gone();
        api
    };
    let refuses = |api: &Api, port: u16| {
        let world = api.store.world();
        let keys = select(&world, &"shop/web-1".parse().unwrap(), &"workload/shop/web-1".parse().unwrap()).keys;
        let mut resources = Resources::default();
        for key in keys {
            let resource = Resource::from_json(key.kind, world.body(&key).unwrap().json.as_bytes()).unwrap();
            compile::admit(&mut resources, key, Ok(Arc::new(resource)));
        }
        let own = compile::Own { workload: "shop/web-1".parse().unwrap(), trust_domain: "cluster.local".parse().unwrap() };
        let (snapshot, _) = compile::compile(&resources, &own, &crate::snapshot::Snapshot::empty());
        let rules = format!("{:?}", snapshot.inbound.port(port).policies.authorization);
        rules.contains("AuthorizationPolicy/shop/gate")
    };
    let wide = |api: &Api| api.store.world().coverage().wide().count();
    let known = next();
    assert_eq!((refuses(&known, 80), refuses(&known, 81), wide(&known)), (true, false, 0));
    for garbage in ["", "{\"AuthorizationPolicy/shop/gate\":{\"policy\":\"x\",\"forms\":[{\"service\":\"we"] {
        std::fs::write(&covered, garbage).unwrap();
        let lost = next();
        assert_eq!((refuses(&lost, 80), refuses(&lost, 81), wide(&lost)), (true, true, 1));
        assert!(lost.store.problems().iter().any(|wrong| wrong.problem.text.contains("is not known any more")));
        assert_eq!(std::fs::read_to_string(state.path().join("covered.json.unreadable")).unwrap(), garbage);
        // It is remembered that nothing is known, until the policy is changed.
        let again = next();
        assert_eq!((refuses(&again, 81), wide(&again)), (true, 1));
    }
    let api = next();
    let answer = api.apply(&texts(&gate.replace("name: gate,", "name: gate, annotations: { reviewed: today },")));
    assert!(
        answer.problems.iter().any(|problem| problem.text.contains("lets go of every port of shop/web-1")),
        "{:?}",
        answer.problems
    );
    assert_eq!((refuses(&api, 80), wide(&api)), (false, 0));
}

#[test]
fn a_service_that_led_to_more_than_can_be_remembered_is_told_of() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let gate = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec: { targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{}] }\n";
    api.apply(&texts(gate));
    let service = |n: usize| SERVICE.replace("spec: {", &format!("spec: {{ selector: {{ release: r{n} }},"));
    let told = |n: usize| api.apply(&texts(&service(n))).problems.iter().any(|problem| problem.text.contains("led to more"));
    assert_eq!((0..257).map(told).position(|told| told), Some(256));
    assert!(api.store.problems().iter().any(|wrong| wrong.problem.text.contains("led to more")));
}

#[test]
fn a_workload_takes_no_address_that_a_service_was_given() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    api.apply(&texts(SERVICE));
    let thief = "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: { name: thief, namespace: attack }\nspec: { addresses: [10.65.0.2] }\n";
    let answer = api.apply(&texts(thief));
    assert!(answer.problems.iter().any(|problem| problem.refuses && problem.text.contains("Service/shop/web")));
    in_folder(&api, &state.path().join("mesh.yaml"), thief);
    assert!(api.store.world().body(&"Service/shop/web".parse().unwrap()).unwrap().json.contains("10.65.0.2"));
}

#[test]
fn the_record_of_a_running_pod_counts_before_every_document_of_its_name() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    let claim = |address: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{ name: web, namespace: shop }}\nspec: {{ addresses: [{address}] }}\n"
        )
    };
    let key: ResourceKey = "Workload/shop/web".parse().unwrap();
    let in_force = |address: &str| api.store.world().body(&key).unwrap().json.contains(address);
    // A document that is there before the pod gives way to it.
    assert_eq!(actions(&api.apply(&texts(&claim("10.64.0.9")))), [("Workload/shop/web", "created")]);
    let record = yaml::read(&claim("10.64.0.2")).remove(0).unwrap().resource;
    let origin = Origin::Pod("pods/shop.web.json".into());
    api.store.apply(vec![Change::Put { key: key.clone(), form: Form::Read(Arc::new(record)), origin: origin.clone() }]);
    assert!(in_force("10.64.0.2"));
    let path = state.path().join("mesh.yaml");
    in_folder(&api, &path, &claim("10.64.0.8"));
    assert!(in_force("10.64.0.2"));
    assert_eq!(api.sidecars().1, [NotConnected { namespace: "shop".to_owned(), name: "web".to_owned() }]);
    let told: Vec<_> = api.store.problems().iter().cloned().collect();
    let places: Vec<_> = told.iter().filter_map(|wrong| wrong.place.as_deref()).collect();
    let stored = api.stored(&key);
    assert_eq!(places, [format!("{}:1:1", path.display()), format!("{}:1:1", stored.display())]);
    for wrong in &told {
        assert!(wrong.problem.text.starts_with("the pod shop/web is running here"), "{wrong:?}");
        assert!(wrong.problem.severity == Severity::Refuses && wrong.problem.remedy == "choose another name", "{wrong:?}");
    }
    let answer = api.apply(&texts(&claim("10.64.0.7")));
    let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
    assert!(problem.refuses && problem.text.starts_with("the pod shop/web is running here"), "{problem:?}");
    assert!(answer.results.is_empty() && in_force("10.64.0.2"));
    // It goes, and the documents are what there is.
    api.store.apply(vec![Change::Remove { key: key.clone(), origin }]);
    assert!(in_force("10.64.0.9"));
}

#[test]
fn nobody_takes_an_address_from_a_pod_that_runs_or_a_policy_off_it() {
    let workload = |name: &str, spec: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{ name: {name}, namespace: shop, labels: {{ app: {name} }} }}\nspec: {{ serviceAccount: {name}, {spec} }}\n"
        )
    };
    let [thief, pod] = [
        workload("a-thief", "transport: Plaintext, addresses: [10.64.9.9, 10.64.0.5]"),
        workload("web-1", "addresses: [10.64.0.5, \"fd64::5\"]"),
    ];
    let gate = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec: { targetRefs: [{ kind: Workload, name: web-1 }], action: DENY, rules: [{}] }\n";
    let key: ResourceKey = "Workload/shop/web-1".parse().unwrap();
    let thiefs: ResourceKey = "Workload/shop/a-thief".parse().unwrap();
    let record = Origin::Pod("pods/shop.web-1.json".into());
    // Whoever comes first, the pod or the document.
    for pod_first in [true, false] {
        let state = tempfile::tempdir().unwrap();
        let api = api(state.path());
        let path = state.path().join("mesh.yaml");
        let start = || {
            let form = Form::Read(Arc::new(yaml::read(&pod).remove(0).unwrap().resource));
            api.store.apply(vec![Change::Put { key: key.clone(), form, origin: record.clone() }]);
        };
        let seen = |scope: &str| {
            let world = api.store.world();
            let keys = select(&world, &"shop/client".parse().unwrap(), &scope.parse().unwrap()).keys;
            let mut resources = Resources::default();
            for key in keys {
                let resource = Resource::from_json(key.kind, world.body(&key).unwrap().json.as_bytes()).unwrap();
                compile::admit(&mut resources, key, Ok(Arc::new(resource)));
            }
            resources
        };
        let compiled = |scope: &str, own: &str| {
            let own = compile::Own { workload: own.parse().unwrap(), trust_domain: "cluster.local".parse().unwrap() };
            compile::compile(&seen(scope), &own, &crate::snapshot::Snapshot::empty()).0
        };
        api.apply(&texts(gate));
        if pod_first {
            start();
        }
        in_folder(&api, &path, &thief);
        start();
        for address in ["10.64.0.5", "fd64::5"] {
            let snapshot = compiled(&format!("address/{address}"), "shop/client");
            let endpoint = &snapshot.outbound.workloads[&address.parse().unwrap()];
            let identity = "spiffe://cluster.local/ns/shop/sa/web-1".parse().unwrap();
            assert_eq!(endpoint.transport, crate::snapshot::Transport::MutualTls(identity), "{address}");
        }
        // Its other address is not the document's either, nobody is led to it by a name, and it gets no stream.
        assert!(!seen("address/10.64.9.9").by_key.contains_key(&thiefs));
        assert!(api.store.world().resources().workload(&thiefs.name).is_none());
        let own = seen("workload/shop/web-1");
        assert!(own.by_key.contains_key(&"AuthorizationPolicy/shop/gate".parse().unwrap()) && own.by_key.contains_key(&key));
        let told = api.store.problems();
        let [wrong] = &*told else { panic!("{told:?}") };
        assert_eq!(wrong.place, Some(format!("{}:4:79", path.display())));
        assert!(wrong.problem.severity == Severity::Refuses && wrong.problem.resource == thiefs.to_string(), "{wrong:?}");
        assert!(wrong.problem.text.contains("is the address of Workload/shop/web-1, a pod that runs here"), "{wrong:?}");
        // Applied, it is refused at once.
        let answer = api.apply(&texts(&thief.replace("a-thief", "b-thief")));
        let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
        assert!(problem.refuses && problem.place.as_deref() == Some("web.yaml:4:79") && answer.results.is_empty());
        // The pod goes, and the document is what there is.
        api.store.apply(vec![Change::Remove { key: key.clone(), origin: record.clone() }]);
        assert!(api.store.world().resources().workload(&thiefs.name).is_some());
        assert!(api.store.problems().iter().all(|wrong| wrong.problem.severity == Severity::Warns));
    }
}

#[test]
fn a_service_leads_no_calls_away_from_the_address_of_another_one() {
    let victim = "apiVersion: v1\nkind: Service\nmetadata: { name: db, namespace: shop }\nspec: { selector: { app: db }, ports: [{ port: 80 }] }\n";
    let thief = "apiVersion: v1\nkind: Service\nmetadata: { name: bad, namespace: NAMESPACE }\nspec: { clusterIPs: [\"fd65::2\", 10.65.0.2], selector: { app: bad }, ports: [{ port: 80 }] }\n";
    let gate = "---\napiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: NAMESPACE }\nspec: { targetRefs: [{ kind: Service, name: bad }], action: DENY, rules: [{}] }\n";
    let pod = |namespace: &str, name: &str, host: u8| {
        format!(
            "---\napiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{ name: {name}-1, namespace: {namespace}, labels: {{ app: {name} }} }}\nspec: {{ addresses: [10.64.0.{host}], serviceAccount: {name} }}\n"
        )
    };
    let told = |api: &Api, address: &str| {
        let world = api.store.world();
        let scope = crate::delta::Scope::Address(address.parse().unwrap());
        let mut resources = Resources::default();
        for key in select(&world, &"shop/client".parse().unwrap(), &scope).keys {
            let resource = Resource::from_json(key.kind, world.body(&key).unwrap().json.as_bytes()).unwrap();
            compile::admit(&mut resources, key, Ok(Arc::new(resource)));
        }
        let own = compile::Own { workload: "shop/client".parse().unwrap(), trust_domain: "cluster.local".parse().unwrap() };
        let snapshot = compile::compile(&resources, &own, &crate::snapshot::Snapshot::empty()).0;
        let port = &snapshot.outbound.services[&std::net::SocketAddr::new(address.parse().unwrap(), 80)];
        port.default_backend.endpoints.iter().map(|endpoint| endpoint.workload.to_string()).collect::<Vec<_>>()
    };
    for namespace in ["aevil", "zevil"] {
        for written in [false, true] {
            let state = tempfile::tempdir().unwrap();
            let first = api(state.path());
            // Written, it is the Service's own from the first word on; else it was given.
            let victim = if written { victim.replace("spec: {", "spec: { clusterIP: 10.65.0.2,") } else { victim.to_owned() };
            let victim = format!("{victim}{}", pod("shop", "db", 2));
            let thief = format!("{thief}{gate}").replace("NAMESPACE", namespace) + &pod(namespace, "bad", 3);
            let [db, bad] = ["db.yaml", "bad.yaml"].map(|name| state.path().join(name));
            let addresses: &[&str] = if written { &["10.65.0.2"] } else { &["10.65.0.2", "fd65::2"] };
            in_folder(&first, &db, &victim);
            in_folder(&first, &bad, &thief);
            let check = |api: &Api, when: &str| {
                for address in addresses {
                    assert_eq!(told(api, address), ["shop/db-1"], "{namespace} {written} {when}");
                }
                let problems = api.store.problems();
                let refused: Vec<_> = problems.iter().filter(|told| told.problem.severity == Severity::Refuses).collect();
                let [refused] = refused.as_slice() else { panic!("{problems:?}") };
                assert_eq!(refused.problem.resource, format!("Service/{namespace}/bad"), "{when}");
                assert!(refused.place.as_deref().unwrap().ends_with("bad.yaml:4:33"), "{refused:?}");
                // What its policy covers is covered all the same.
                let world = api.store.world();
                let pod = format!("{namespace}/bad-1");
                let scope = format!("workload/{pod}").parse().unwrap();
                let seen = select(&world, &pod.parse().unwrap(), &scope).keys;
                assert!(seen.contains(&format!("AuthorizationPolicy/{namespace}/gate").parse().unwrap()));
                assert!(seen.contains(&format!("Service/{namespace}/bad").parse().unwrap()));
            };
            check(&first, "at once");
            in_folder(&first, &bad, &thief.replace("port: 80", "port: 80, name: http"));
            in_folder(&first, &db, &victim.replace("port: 80", "port: 80, name: http"));
            // After a restart, whoever is read first.
            for thief_first in [true, false] {
                let again = api(state.path());
                let mut both = [(&db, &victim), (&bad, &thief)];
                if thief_first {
                    both.reverse();
                }
                for (path, text) in both {
                    in_folder(&again, path, text);
                }
                again.store.forget_gone();
                check(&again, "after a restart");
            }
            // Whose Service is gone at the restart lets go of what it wrote; what was given is kept for it.
            let last = api(state.path());
            in_folder(&last, &bad, &thief);
            assert_eq!(last.store.problems().len(), 1);
            last.store.forget_gone();
            assert_eq!(last.store.problems().len(), usize::from(!written), "{:?}", last.store.problems());
            if written {
                assert_eq!(told(&last, "10.65.0.2"), [format!("{namespace}/bad-1")]);
            }
        }
    }
}

#[tokio::test]
async fn a_service_whose_address_is_another_ones_is_shown_as_not_in_force_with_the_reason() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    api.apply(&texts(SERVICE));
    in_folder(&api, &state.path().join("thief.yaml"), &thief("zevil", "10.65.0.2"));
    let shown = |namespace: &str| {
        let which = Which { kind: Some("service".to_owned()), namespace: Some(namespace.to_owned()), name: None };
        let api = Arc::clone(&api);
        async move {
            let body = axum::body::to_bytes(resources(State(api), Query(which)).await.into_body(), 1 << 20).await.unwrap();
            serde_json::from_slice::<Value>(&body).unwrap()["items"][0]["status"].clone()
        }
    };
    let status = shown("zevil").await;
    assert_eq!((&status["inForce"], &status["accepted"]), (&json!(false), &json!(false)), "{status}");
    assert_eq!(status["addressTakenBy"], "Service/shop/web");
    let reason = status["problems"][0]["text"].as_str().unwrap();
    assert!(reason.starts_with("10.65.0.2 is the address of Service/shop/web, which had it first"), "{status}");
    let status = shown("shop").await;
    assert!(status["inForce"] == true && status["addressTakenBy"].is_null(), "{status}");
}

#[test]
fn what_a_policy_covered_is_not_told_as_known_where_the_memory_of_it_is_lost() {
    let state = tempfile::tempdir().unwrap();
    std::fs::write(state.path().join("covered.json"), "{").unwrap();
    let api = api(state.path());
    let policy = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec: { targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{}] }\n---\n";
    let service = SERVICE.replace("ports", "selector: { app: web }, ports");
    in_folder(&api, &state.path().join("shop.yaml"), &format!("{policy}{service}{POD}"));
    api.store.forget_gone();
    let texts: Vec<String> = api.store.problems().iter().map(|wrong| wrong.problem.text.clone()).collect();
    let told = "the policy goes on covering every port of shop/web-1: Service/shop/web may have led there";
    assert!(texts.iter().any(|text| text == told), "{texts:?}");
    assert!(texts.iter().all(|text| !text.contains(" led there, and")), "{texts:?}");
    // Who lets go of it is told no more than is known.
    let changed = policy.replace("name: gate,", "name: gate, annotations: { reviewed: today },");
    let mut candidate = api.store.world().clone();
    let resource = yaml::read(&changed).remove(0).unwrap().resource;
    let origin = Origin::File(state.path().join("shop.yaml"));
    let key = resource.key();
    candidate.apply(Change::Put { key: key.clone(), form: Form::Read(Arc::new(resource)), origin });
    let [(_, forms)] = candidate.coverage_mut().released().try_into().unwrap();
    let beyond = kept::beyond(candidate.resources(), candidate.resources().get(&key).unwrap(), &forms);
    assert_eq!(
        beyond.iter().map(let_go).collect::<Vec<_>>(),
        ["every port of shop/web-1, to which Service/shop/web may have led before"]
    );
}

#[test]
fn of_two_documents_with_one_address_the_one_that_is_applied_later_is_refused() {
    let workload = |name: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{ name: {name} }}\nspec: {{ addresses: [10.64.99.5] }}\n"
        )
    };
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    assert!(api.apply(&texts(&workload("m"))).problems.is_empty());
    // By its name the first would count; what is applied takes nothing away all the same.
    for name in ["a", "z"] {
        let answer = api.apply(&texts(&workload(name)));
        let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
        assert!(problem.refuses && problem.text.contains("10.64.99.5 is the address of Workload/default/"), "{problem:?}");
        assert!(api.store.world().resources().workload(&"default/m".parse().unwrap()).is_some());
    }
}

#[test]
fn a_folder_that_gains_what_was_applied_is_told_of_and_the_applied_form_stays() {
    let state = tempfile::tempdir().unwrap();
    let api = api(state.path());
    api.apply(&texts(SERVICE));
    let key: ResourceKey = "Service/shop/web".parse().unwrap();
    let before = api.store.world().body(&key).unwrap().clone();
    assert!(api.store.problems().is_empty());
    let path = state.path().join("mesh.yaml");
    in_folder(&api, &path, &SERVICE.replace("80", "81"));
    let problems = api.store.problems();
    let [wrong] = &*problems else { panic!("{problems:?}") };
    assert_eq!(wrong.place, Some(format!("{}:1:1", path.display())));
    let stored = api.stored(&key).display().to_string();
    assert!(wrong.problem.severity == Severity::Refuses && wrong.problem.text.contains(&stored), "{wrong:?}");
    assert_eq!(api.store.world().body(&key), Some(&before));
    let origin = api.store.world().origin(&key).map(ToString::to_string);
    assert_eq!(standing(&key, &before.version, origin, &problems, &[])["accepted"], true);
    // Without the stored one, the folder's counts.
    api.delete(&texts(SERVICE), Again::default());
    assert!(api.store.problems().is_empty() && api.store.world().body(&key) != Some(&before));
}
