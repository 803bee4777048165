//! What changes are taken and refused, and what is said of them.

mod addresses;
mod coverage;

use serde_json::{Value, json};
use tokio::time::{Duration, timeout};

use super::super::{NotConnected, Until, Which, proxies, resources, standing};
use super::*;
use crate::base::problems::Severity;
use crate::control::ca::Authority;
use crate::control::select::select;
use crate::control::sessions::Sessions;
use crate::control::store::Store;
use crate::control::webhook::WebhookConfig;
use crate::control::{Config, SourceConfig};
use crate::delta::transport::Voucher;
use crate::model::Resource;

const SERVICE: &str =
    "apiVersion: v1\nkind: Service\nmetadata: { name: web, namespace: shop }\nspec: { ports: [{ port: 80 }] }\n";

fn api(state: &Path) -> Arc<Api> {
    let clock = crate::identity::testing::clock();
    let trust_domain: crate::identity::spiffe::TrustDomain = "cluster.local".parse().unwrap();
    let local = "127.0.0.1:0".parse().unwrap();
    std::fs::create_dir_all(state.join(STORED)).unwrap();
    let config = Config {
        source: SourceConfig::Folders(Vec::new()),
        state: state.to_owned(),
        trust_domain: trust_domain.clone(),
        listen: Vec::new(),
        api: local,
        metrics: local,
        svid_lifetime: Duration::from_secs(3600),
        workload_api: None,
        webhook: WebhookConfig::example(),
    };
    let store = Arc::new(Store::new(state));
    let metrics = Arc::new(crate::control::metrics::Metrics::new().unwrap());
    let sessions = Arc::new(Sessions::new(Arc::clone(&store), trust_domain.clone(), Voucher::Authority, clock.clone(), metrics));
    let ca = Arc::new(Authority::open(&state.join("ca"), trust_domain, clock.clone()).unwrap());
    Api::new(&config, store, sessions, Arc::default(), ca, None, clock, None)
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

const POD: &str = "---\napiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: { name: web-1, namespace: shop, labels: { app: web } }\nspec: { addresses: [10.64.0.9] }\n";

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
