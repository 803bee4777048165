//! The webhooks over real TLS, as the API server asks them.

use axum::http::{Request as HttpRequest, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::RootCertStore;
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::*;
use crate::base::clock::WallClock;
use crate::injection::{Outcome, inject};

/// Namespaces that a test names.
struct Table;

impl Namespaces for Table {
    fn of<'a>(&'a self, name: &'a str) -> Pin<Box<dyn Future<Output = Result<Namespace, String>> + Send + 'a>> {
        let label = |value: &str| [("outrigger.dev/inject".to_owned(), value.to_owned())].into();
        let named = |labels| Ok(Namespace { name: name.to_owned(), labels, annotations: [].into() });
        let found = match name {
            "shop" => named(label("enabled")),
            "plain" => named([].into()),
            _ => Err("there is none of that name".to_owned()),
        };
        Box::pin(async move { found })
    }
}

struct Bench {
    at: SocketAddr,
    ca: Arc<Authority>,
    metrics: Arc<Metrics>,
    _state: tempfile::TempDir,
    _tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
}

async fn bench() -> Bench {
    let state = tempfile::tempdir().unwrap();
    let clock = WallClock::system();
    let ca = Arc::new(Authority::open(&state.path().join("ca"), "cluster.local".parse().unwrap(), clock).unwrap());
    let metrics = Arc::new(Metrics::new().unwrap());
    let store = Arc::new(Store::new(state.path()));
    let webhook = Webhook::new(Settings::default(), Arc::new(Table), store, Arc::clone(&metrics));
    let mut tasks = JoinSet::new();
    let serving = serving::start(&ca, &mut tasks).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let (stop, stopped) = watch::channel(false);
    tasks.spawn(admin::serve_tls(listener, serving, routes(webhook), stopped));
    Bench { at, ca, metrics, _state: state, _tasks: tasks, stop }
}

impl Bench {
    async fn connect(&self, name: &'static str, alpn: &str) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.root().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let mut config = config.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        let stream = TcpStream::connect(self.at).await.unwrap();
        let name = ServerName::try_from(name).unwrap();
        tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }

    async fn post(&self, path: &str, body: Vec<u8>) -> (u16, String) {
        let stream = self.connect(HOST, "h2").await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        let request = HttpRequest::post(format!("https://{HOST}{path}")).header(header::CONTENT_TYPE, "application/json");
        let exchange = async {
            let answer = sender.send_request(request.body(Full::new(Bytes::from(body))).unwrap()).await.unwrap();
            let status = answer.status().as_u16();
            let text = answer.into_body().collect().await.unwrap().to_bytes();
            (status, String::from_utf8(text.to_vec()).unwrap())
        };
        tokio::select! {
            answer = exchange => answer,
            ended = async { drop(connection.await); std::future::pending().await } => ended,
        }
    }

    async fn ask(&self, path: &str, request: Value) -> Value {
        let review = json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request });
        let (status, text) = self.post(path, review.to_string().into_bytes()).await;
        assert_eq!(status, 200, "{text}");
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&answer["apiVersion"], &answer["kind"]), (&json!("admission.k8s.io/v1"), &json!("AdmissionReview")));
        assert_eq!(answer["response"]["uid"], "7");
        answer["response"].clone()
    }

    fn counted(&self, line: &str) -> bool {
        self.metrics.text().contains(line)
    }
}

const HOST: &str = "control.outrigger-system.svc";

fn pod() -> Value {
    json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "web-1" }, "spec": { "containers": [{ "name": "web" }] } })
}

fn creation(namespace: &str, object: &Value) -> Value {
    let version = object["apiVersion"].as_str().unwrap();
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    let kind = json!({ "group": group, "version": version, "kind": object["kind"] });
    json!({ "uid": "7", "kind": kind, "namespace": namespace, "name": object["metadata"]["name"], "operation": "CREATE", "object": object })
}

#[tokio::test]
async fn bodies_that_do_not_end_give_way_to_a_question_that_is_whole() {
    let bench = bench().await;
    let mut strangers = Vec::new();
    for _ in 0..6 {
        let mut stream = bench.connect(HOST, "http/1.1").await.unwrap();
        let head = format!("POST /mutate HTTP/1.1\r\nhost: {HOST}\r\ncontent-length: {REVIEW_BYTES_MAX}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&vec![b' '; REVIEW_BYTES_MAX - 1]).await.unwrap();
        stream.flush().await.unwrap();
        strangers.push(stream);
    }
    let response = bench.ask("/mutate", creation("shop", &pod())).await;
    assert_eq!(response["allowed"], true);
    let mut told = [0; 12];
    let read = tokio::time::timeout(READ_WITHIN / 2, strangers[0].read_exact(&mut told)).await;
    read.expect("the first of them is told at once").unwrap();
    assert_eq!(&told, b"HTTP/1.1 503");
    assert!(bench.counted(r#"reason="busy""#) || bench.counted(r#""busy""#));
}

#[tokio::test]
async fn who_comes_while_the_replica_stops_is_answered_yet() {
    let bench = bench().await;
    bench.stop.send_replace(true);
    assert_eq!(bench.ask("/mutate", creation("shop", &pod())).await["allowed"], true);
}

#[tokio::test]
async fn the_patch_of_the_webhook_makes_the_pod_that_the_command_prints() {
    let bench = bench().await;
    let response = bench.ask("/mutate", creation("shop", &pod())).await;
    assert_eq!((&response["allowed"], &response["patchType"]), (&json!(true), &json!("JSONPatch")));
    let patch = STANDARD.decode(response["patch"].as_str().unwrap()).unwrap();
    let patch: json_patch::Patch = serde_json::from_slice(&patch).unwrap();
    let mut patched = pod();
    json_patch::patch(&mut patched, &patch).unwrap();
    let namespace = Table.of("shop").await.unwrap();
    let Ok(Outcome::Injected(printed)) = inject(&pod(), &namespace, &Settings::default()) else { panic!() };
    assert_eq!(patched.to_string(), printed.pod.to_string());
    assert!(bench.counted(r#"outrigger_control_admissions_total{outcome="injected",webhook="mutate"} 1"#));

    // Asked again, as after another webhook.
    let again = bench.ask("/mutate", creation("shop", &patched)).await;
    assert_eq!((&again["allowed"], again.get("patch")), (&json!(true), None));
    assert_eq!(bench.ask("/validate", creation("shop", &patched)).await["allowed"], true);
}

#[tokio::test]
async fn pods_that_are_not_asked_for_stay_and_pods_that_cannot_be_are_refused_by_name() {
    let bench = bench().await;
    let response = bench.ask("/mutate", creation("plain", &pod())).await;
    assert_eq!(response, json!({ "uid": "7", "allowed": true }));
    let mut host = pod();
    host["spec"]["hostNetwork"] = true.into();
    let response = bench.ask("/mutate", creation("shop", &host)).await;
    assert_eq!((&response["allowed"], &response["status"]["code"]), (&json!(false), &json!(422)));
    assert!(response["status"]["message"].as_str().unwrap().starts_with("hostNetwork: "), "{response}");
    assert!(bench.counted(r#"outrigger_control_admissions_total{outcome="host_network",webhook="mutate"} 1"#));
    let response = bench.ask("/mutate", creation("gone", &pod())).await;
    let told = "the namespace gone cannot be looked at: there is none of that name";
    assert_eq!((&response["allowed"], &response["status"]["message"]), (&json!(false), &json!(told)));
    let mut update = creation("shop", &pod());
    update["operation"] = "UPDATE".into();
    assert_eq!(bench.ask("/mutate", update).await, json!({ "uid": "7", "allowed": true }));
}

#[tokio::test]
async fn reviews_of_another_version_size_or_kind_are_refused_by_name() {
    let bench = bench().await;
    let review = |version: &str, request: Value| {
        json!({ "apiVersion": version, "kind": "AdmissionReview", "request": request }).to_string().into_bytes()
    };
    for (body, status, told, word) in [
        (b"{".to_vec(), 400, "this is no admission review: ", "not_a_review"),
        (b"[]".to_vec(), 400, "this is no admission review: ", "not_a_review"),
        (review("admission.k8s.io/v1", json!({ "uid": 7 })), 400, "this is no admission review: ", "not_a_review"),
        (
            review("admission.k8s.io/v1beta1", json!({})),
            400,
            "\"admission.k8s.io/v1beta1 AdmissionReview\" is not read here",
            "version",
        ),
        (json!({}).to_string().into_bytes(), 400, "is not read here", "version"),
        (review("admission.k8s.io/v1", Value::Null), 400, "holds no request", "no_request"),
        (vec![b' '; REVIEW_BYTES_MAX + 1], 413, "an admission review of more than 8388608 bytes is not read", "too_large"),
    ] {
        for webhook in ["mutate", "validate"] {
            let (found, text) = bench.post(&format!("/{webhook}"), body.clone()).await;
            assert_eq!(found, status, "{text}");
            assert!(text.contains(told), "{text}");
            assert!(bench.counted(&format!(r#"outrigger_control_admissions_total{{outcome="{word}",webhook="{webhook}"}}"#)));
        }
    }
    let node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "n" } });
    for (webhook, told) in [("mutate", "pods get sidecars, not v1 Node"), ("validate", "v1 Node is nothing that is checked here")]
    {
        let response = bench.ask(&format!("/{webhook}"), creation("shop", &node)).await;
        assert_eq!(response["allowed"], false);
        assert!(response["status"]["message"].as_str().unwrap().starts_with(told), "{response}");
    }
    assert_eq!(bench.post("/elsewhere", Vec::new()).await.0, 404);
}

#[tokio::test]
async fn a_question_that_is_too_large_is_refused_in_the_form_that_the_api_server_hands_on() {
    let bench = bench().await;
    let mut pod = pod();
    pod["metadata"]["annotations"] = json!({ "large": "x".repeat(REVIEW_BYTES_MAX) });
    // As the API server writes it: the uid first, then whose object it is, then the object.
    let body = format!(
        r#"{{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{{"uid":"7","kind":{{"group":"","version":"v1","kind":"Pod"}},"namespace":"shop","operation":"CREATE","object":{pod}}}}}"#
    );
    for webhook in ["mutate", "validate"] {
        let (status, text) = bench.post(&format!("/{webhook}"), body.clone().into_bytes()).await;
        assert_eq!(status, 200, "{text}");
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&answer["response"]["uid"], &answer["response"]["allowed"]), (&json!("7"), &json!(false)));
        let told = answer["response"]["status"]["message"].as_str().unwrap();
        assert!(told.contains("more than 8388608 bytes"), "{told}");
        assert!(bench.counted(&format!(r#"outrigger_control_admissions_total{{outcome="too_large",webhook="{webhook}"}} 1"#)));
    }
}

#[test]
fn the_uid_of_a_question_is_found_in_its_beginning_alone() {
    for (beginning, uid) in [
        (
            r#"{"kind":"AdmissionReview","request":{"uid":"705ab4f5-6393-11e8-b7cc-42010a800002","kind":{"#,
            Some("705ab4f5-6393-11e8-b7cc-42010a800002"),
        ),
        (r#"{"request": {"uid" : "7", "#, Some("7")),
        (r#"{"request":{"uid":"7"#, None),
        (r#"{"request":{"uid":"a b"}"#, None),
        (r#"{"uid":"7","kind":"#, None),
        ("", None),
    ] {
        assert_eq!(review::uid(beginning.as_bytes()).as_deref(), uid, "{beginning}");
    }
}

#[tokio::test]
async fn documents_of_ours_are_compiled_and_routes_get_warnings() {
    let bench = bench().await;
    let object = |version: &str, kind: &str, spec: Value| {
        let metadata = json!({
            "name": "web", "namespace": "shop", "uid": "1", "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z",
            "managedFields": [{ "manager": "kubectl" }],
        });
        json!({ "apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec, "status": { "conditions": [] } })
    };
    let policy = |action: &str| object("outrigger.dev/v1alpha1", "AuthorizationPolicy", json!({ "action": action, "rules": [] }));
    let response = bench.ask("/validate", creation("shop", &policy("ALLOW"))).await;
    assert_eq!(response["allowed"], true, "{response}");
    let response = bench.ask("/validate", creation("shop", &policy("ALOW"))).await;
    assert_eq!(response["allowed"], false);
    assert!(
        response["status"]["message"].as_str().unwrap().contains("\"ALOW\" is not a value of this field; did you mean"),
        "{response}"
    );
    assert!(bench.counted(r#"outrigger_control_admissions_total{outcome="document",webhook="validate"} 1"#));

    let route = |parent: &str, rules: Value| {
        let parents = json!([{ "group": "", "kind": parent, "name": "web", "port": 80 }]);
        object("gateway.networking.k8s.io/v1", "HTTPRoute", json!({ "parentRefs": parents, "rules": rules }))
    };
    let broken = json!([{ "matches": [{ "path": { "type": "RegularExpression", "value": "(" } }], "backendRefs": [{ "name": "web", "port": 80 }] }]);
    let response = bench.ask("/validate", creation("shop", &route("Service", broken.clone()))).await;
    assert_eq!(response["allowed"], true);
    assert!(response["warnings"][0].as_str().unwrap().contains("spec.rules[0].matches[0]"), "{response}");
    // Another controller's.
    let response = bench.ask("/validate", creation("shop", &route("Gateway", broken))).await;
    assert_eq!(response, json!({ "uid": "7", "allowed": true }));
}

#[tokio::test]
async fn a_pod_that_forges_marks_is_refused_where_no_sidecar_was_asked_for() {
    let bench = bench().await;
    let mut forged = pod();
    forged["metadata"]["labels"] = json!({ "outrigger.dev/sidecar": "injected" });
    let response = bench.ask("/validate", creation("plain", &forged)).await;
    assert_eq!(response["allowed"], false);
    assert!(response["status"]["message"].as_str().unwrap().starts_with("label outrigger.dev/sidecar: "), "{response}");
    assert!(bench.counted(r#"outrigger_control_admissions_total{outcome="forged_mark",webhook="validate"} 1"#));
    assert_eq!(bench.ask("/validate", creation("plain", &pod())).await["allowed"], true);
}

#[tokio::test]
async fn the_webhooks_are_known_by_the_name_of_their_service_and_no_other() {
    let bench = bench().await;
    assert!(bench.connect(HOST, "http/1.1").await.is_ok());
    let error = bench.connect("elsewhere.outrigger-system.svc", "h2").await.unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
    let stream = bench.connect(HOST, "h2").await.unwrap();
    let leaf = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
    let (_, leaf) = x509_parser::parse_x509_certificate(&leaf).unwrap();
    let uses = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(uses.server_auth && !uses.client_auth, "it could pass for a workload");
    let lifetime = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
    assert!((86_400..86_600).contains(&lifetime), "{lifetime}");
}

#[tokio::test]
async fn a_namespace_that_cannot_be_one_is_asked_of_nobody() {
    let bench = bench().await;
    for name in ["outrigger-system/secrets/ca", "..", "shop?watch=1", "", "a b", "Shop"] {
        let response = bench.ask("/mutate", creation(name, &pod())).await;
        assert_eq!(response["allowed"], false, "{name}");
        let text = response["status"]["message"].as_str().unwrap();
        assert!(text.starts_with("namespace: "), "{text}");
    }
}

#[tokio::test]
async fn an_object_of_many_small_parts_is_refused_before_it_is_taken_in() {
    let bench = bench().await;
    let many = |count: usize| {
        let mut pod = pod();
        pod["spec"]["zzz"] = vec![json!({ "a": 0 }); count].into();
        creation("shop", &pod)
    };
    assert_eq!(bench.ask("/mutate", many(1_000)).await["allowed"], true);
    for path in ["/mutate", "/validate"] {
        let refused = bench.ask(path, many(100_000)).await;
        assert_eq!(refused["allowed"], false);
        let text = refused["status"]["message"].as_str().unwrap();
        assert!(text.starts_with("an admission review that takes more than 33554432 bytes to take in"), "{text}");
    }
}

#[test]
fn a_text_weighs_what_its_values_take_and_nothing_for_what_stands_in_quotes() {
    assert_eq!(review::weight(br#""{[,:\"{[,:""#), 12);
    let one = review::weight(br#"[{"a":0}]"#);
    assert!((640..1_000).contains(&one), "{one}");
    let more = review::weight(br#"[{"a":0},{"a":0}]"#);
    assert!(more > one + 640, "{more}");
}
