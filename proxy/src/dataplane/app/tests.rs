//! Apps on real sockets, asked through the sidecar's door.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::Body;
use axum::http::Request;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use rcgen::{CertificateParams, KeyPair, PublicKeyData as _};
use rustls_pki_types::PrivatePkcs8KeyDer;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt as _;

use super::*;
use crate::dataplane::TcpDial;
use crate::identity::source::Identity;
use crate::identity::testing::clock;
use crate::telemetry::Telemetry;

const OWN: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// The doors of a pod at loopback.
fn doors(doors: serde_json::Value) -> (Router, Arc<Metrics>) {
    let metrics = Arc::new(Metrics::new().unwrap());
    let telemetry = Telemetry { metrics: Arc::clone(&metrics), access_log: None, spans: None };
    let window = Window::new(Identity::new("cluster.local".parse().unwrap(), clock()), telemetry);
    window.addresses.lock().push(OWN);
    let dial = Arc::new(TcpDial::new(metrics.clients_undeclared.clone()));
    (routes(serde_json::from_value(doors).unwrap(), &window, &metrics, dial), metrics)
}

async fn ask(routes: &Router, path: &str) -> (u16, String) {
    let mut request = Request::get(path).header("accept", "text/x").body(Body::empty()).unwrap();
    request.extensions_mut().insert(Caller("192.0.2.1:7".parse().unwrap()));
    let answer = routes.clone().oneshot(request).await.unwrap();
    let status = answer.status().as_u16();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

/// Serves connections one by one, each with what `answer` makes of its number and of the head that came.
async fn app(answer: impl Fn(usize, &str) -> String + Send + 'static) -> (u16, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind((OWN, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = async move {
        let asked = AtomicUsize::new(0);
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            while let Some(head) = head(&mut stream).await {
                let answer = answer(asked.fetch_add(1, Ordering::Relaxed), &head);
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        }
    };
    (port, tokio::spawn(serve))
}

async fn head(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    Some(String::from_utf8(head).unwrap())
}

fn http(door: serde_json::Value) -> serde_json::Value {
    json!({ "probes": { "web/liveness": { "ask": { "http": door }, "timeoutSeconds": 1 } } })
}

#[tokio::test]
async fn an_app_is_asked_as_the_kubelet_would_and_judged_by_its_status() {
    for (status, expected, told) in [
        ("200 OK", 200, "the app is well\n"),
        ("399 Odd\r\nlocation: /elsewhere", 503, "the app redirected more than 10 times\n"),
        ("302 Found\r\nlocation: http://elsewhere.example/", 200, "the app is well\n"),
        ("404 Not Found", 503, "the app answered with status 404\n"),
        ("500 Broken", 503, "the app answered with status 500\n"),
    ] {
        let (port, _app) = app(move |_, _| format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n")).await;
        let (routes, _) = doors(http(json!({ "port": port, "path": "/healthz" })));
        assert_eq!(ask(&routes, "/probe/web/liveness").await, (expected, told.to_owned()), "{status}");
    }
}

#[tokio::test]
async fn path_and_headers_are_those_that_were_written_down_and_redirections_to_the_app_are_followed() {
    let (port, _app) = app(|number, head| match number {
        0 => {
            assert!(head.starts_with("GET /healthz?deep=1 HTTP/1.1\r\n"), "{head}");
            assert!(head.contains("host: web.shop\r\n") && head.contains("x-key: a\r\n"), "{head}");
            assert!(head.contains("user-agent: kube-probe/outrigger-"), "{head}");
            assert!(!head.contains("text/x"), "{head}");
            "HTTP/1.1 301 Moved\r\nlocation: /ok\r\ncontent-length: 2\r\n\r\nno".to_owned()
        }
        _ => {
            assert!(head.starts_with("GET /ok HTTP/1.1\r\n"), "{head}");
            "HTTP/1.1 204 No Content\r\n\r\n".to_owned()
        }
    })
    .await;
    let headers = [["Host", "web.shop"], ["X-Key", "a"]];
    let (routes, metrics) = doors(http(json!({ "port": port, "path": "/healthz?deep=1", "headers": headers })));
    assert_eq!(ask(&routes, "/probe/web/liveness?path=/admin").await.0, 200);
    assert!(metrics.render().contains(r#"outrigger_app_asked_total{outcome="passed",what="liveness"} 1"#));
}

#[tokio::test]
async fn nothing_but_what_was_written_down_can_be_asked() {
    let (port, _app) = app(|_, _| panic!("the app was asked")).await;
    let (routes, _) = doors(http(json!({ "port": port, "path": "/" })));
    for path in
        ["/probe/web/readiness", "/probe/other/liveness", "/probe/web", "/probe/web/liveness/x", "/metrics/app", "/probe/"]
    {
        assert_eq!(ask(&routes, path).await.0, 404, "{path}");
    }
}

#[tokio::test]
async fn an_app_that_is_away_or_silent_is_told_in_the_time_that_its_probe_has() {
    let gone = TcpListener::bind((OWN, 0)).await.unwrap().local_addr().unwrap().port();
    let (routes, metrics) = doors(http(json!({ "port": gone, "path": "/" })));
    let (status, why) = ask(&routes, "/probe/web/liveness").await;
    assert!(status == 503 && why.starts_with(&format!("cannot connect to 127.0.0.1:{gone}: ")), "{status} {why}");
    assert!(metrics.render().contains(r#"outrigger_app_asked_total{outcome="failed",what="liveness"} 1"#));

    let silent = TcpListener::bind((OWN, 0)).await.unwrap();
    let (routes, _) = doors(http(json!({ "port": silent.local_addr().unwrap().port(), "path": "/" })));
    assert_eq!(ask(&routes, "/probe/web/liveness").await, (503, "the app did not answer within 1s\n".to_owned()));
}

#[tokio::test]
async fn whoever_asks_meanwhile_gets_the_answer_that_is_on_its_way() {
    let listener = TcpListener::bind((OWN, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (routes, _) = doors(http(json!({ "port": port, "path": "/" })));
    let crowd = futures_util::future::join_all((0..50).map(|_| ask(&routes, "/probe/web/liveness")));
    let serve = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        head(&mut stream).await.unwrap();
        // All of them have asked by now.
        tokio::time::sleep(Duration::from_millis(50)).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        stream
    };
    let (answers, _stream) = tokio::join!(crowd, serve);
    assert!(answers.iter().all(|(status, _)| *status == 200));
    let more = timeout(Duration::from_millis(50), listener.accept()).await;
    assert!(more.is_err(), "the app was asked twice");
    // The next question is a new one.
    let (answer, ()) = tokio::join!(ask(&routes, "/probe/web/liveness"), async { drop(listener.accept().await.unwrap()) });
    assert_eq!(answer.0, 503);
}

#[tokio::test]
async fn a_redirection_is_followed_whether_the_app_keeps_its_connection_or_not() {
    let listener = TcpListener::bind((OWN, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = async {
        for (path, answer) in [("/d", "HTTP/1.0 302 Found\r\nlocation: /d/\r\n\r\n"), ("/d/", "HTTP/1.0 200 OK\r\n\r\nwell")] {
            let (mut stream, _) = listener.accept().await.unwrap();
            let head = head(&mut stream).await.unwrap();
            assert!(head.starts_with(&format!("GET {path} HTTP/1.1\r\n")) && head.contains("connection: close\r\n"), "{head}");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    };
    let (routes, _) = doors(http(json!({ "port": port, "path": "/d" })));
    let (answer, ()) = tokio::join!(ask(&routes, "/probe/web/liveness"), serve);
    assert_eq!(answer, (200, "the app is well\n".to_owned()));
}

#[tokio::test]
async fn a_path_is_written_as_the_kubelet_writes_it() {
    for (path, expected) in [
        ("/he alth", "/he%20alth"),
        ("/a<b>", "/a%3Cb%3E"),
        ("/gesund/ü", "/gesund/%C3%BC"),
        ("/a%20b/[c]?x=%zz&y=/?", "/a%20b/[c]?x=%zz&y=/?"),
        ("/50%/%41", "/50%25/%2541"),
        ("/well#there", "/well"),
        ("/a$$b", "/a$$b"),
    ] {
        let (port, _app) = app(move |_, head| {
            assert!(head.starts_with(&format!("GET {expected} HTTP/1.1\r\n")), "{head}");
            "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_owned()
        })
        .await;
        let (routes, _) = doors(http(json!({ "port": port, "path": path })));
        assert_eq!(ask(&routes, "/probe/web/liveness").await.0, 200, "{path}");
    }
}

/// A certificate of X.509's first version (RFC 5280 4.1, without version and extensions), for the key whose public half is `key`.
fn first_version(key: &[u8]) -> Vec<u8> {
    let der = |tag: u8, parts: &[&[u8]]| {
        let body = parts.concat();
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [&[tag, 0x82][..], &length, &body].concat()
    };
    let algorithm = der(0x30, &[&[0x06, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2]]);
    let (nobody, time) = (der(0x30, &[]), |text: &str| der(0x17, &[text.as_bytes()]));
    let validity = der(0x30, &[&time("260101000000Z"), &time("490101000000Z")]);
    let body = der(0x30, &[&[2, 1, 1], &algorithm, &nobody, &validity, &nobody, key]);
    der(0x30, &[&body, &algorithm, &der(0x03, &[&[0, 1, 2, 3]])])
}

#[tokio::test]
async fn a_certificate_of_the_first_version_is_taken_from_the_own_app() {
    #[derive(Debug)]
    struct Shows(Arc<rustls::sign::CertifiedKey>);
    impl rustls::server::ResolvesServerCert for Shows {
        fn resolve(&self, _hello: rustls::server::ClientHello<'_>) -> Option<Arc<rustls::sign::CertifiedKey>> {
            Some(Arc::clone(&self.0))
        }
    }
    let key = KeyPair::generate().unwrap();
    let signing = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&PrivatePkcs8KeyDer::from(key.serialize_der()).into()).unwrap();
    let certificate = first_version(&key.subject_public_key_info()).into();
    let shows = Arc::new(Shows(Arc::new(rustls::sign::CertifiedKey::new(vec![certificate], signing))));
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider).with_protocol_versions(&[version]).unwrap();
        let config = config.with_no_client_auth().with_cert_resolver(Arc::clone(&shows) as _);
        assert_eq!(ask_over_tls(config).await, (200, "the app is well\n".to_owned()));
    }
}

#[tokio::test]
async fn a_certificate_of_nobodys_is_taken_from_the_own_app() {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["elsewhere.example".to_owned()]).unwrap().self_signed(&key).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let config = config.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap();
    assert_eq!(ask_over_tls(config).await, (200, "the app is well\n".to_owned()));
}

/// What a probe of an app that serves this way comes to.
async fn ask_over_tls(config: rustls::ServerConfig) -> (u16, String) {
    let listener = TcpListener::bind((OWN, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = tokio_rustls::TlsAcceptor::from(Arc::new(config)).accept(stream).await.unwrap();
        head(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        stream
    };
    let (routes, _) = doors(http(json!({ "port": port, "path": "/", "tls": true })));
    let (answer, _stream) = tokio::join!(ask(&routes, "/probe/web/liveness"), serve);
    answer
}

#[tokio::test]
async fn a_tcp_probe_is_content_with_a_connection() {
    let listener = TcpListener::bind((OWN, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (routes, _) = doors(json!({ "probes": { "db/startup": { "ask": { "tcp": { "port": port } }, "timeoutSeconds": 1 } } }));
    assert_eq!(ask(&routes, "/probe/db/startup").await.0, 200);
    drop(listener);
    assert_eq!(ask(&routes, "/probe/db/startup").await.0, 503);
}

/// A health service that answers one call with this message and status.
async fn health(stream: TcpStream, message: &'static [u8], status: &'static str) -> Vec<u8> {
    let mut codec = h2::server::handshake(stream).await.unwrap();
    let (request, mut respond) = codec.accept().await.unwrap().unwrap();
    assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
    assert_eq!(request.headers()["content-type"], "application/grpc");
    let exchange = async {
        let mut body = request.into_body();
        let mut asked = Vec::new();
        while let Some(piece) = body.data().await {
            asked.extend_from_slice(&piece.unwrap());
        }
        let answer = axum::http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
        let mut stream = respond.send_response(answer, false).unwrap();
        stream.send_data(Bytes::from_static(message), false).unwrap();
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", status.parse().unwrap());
        stream.send_trailers(trailers).unwrap();
        asked
    };
    let asked = exchange.await;
    // Until the asker has gone.
    drop(codec.accept().await);
    asked
}

#[tokio::test]
async fn a_grpc_probe_asks_the_health_service() {
    for (message, status, expected, told) in [
        (&[0, 0, 0, 0, 2, 8, 1][..], "0", 200, "the app is well\n"),
        (&[0, 0, 0, 0, 2, 8, 2], "0", 503, "the app is not serving\n"),
        (&[0, 0, 0, 0, 0], "0", 503, "the app's health is unknown\n"),
        (&[], "12", 503, "the app has no gRPC health service (grpc.health.v1)\n"),
        (&[], "5", 503, "the app's health service knows no such service\n"),
        (&[0, 0], "0", 503, "the app's answer is no gRPC message\n"),
    ] {
        let listener = TcpListener::bind((OWN, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let probe = json!({ "ask": { "grpc": { "port": port, "service": "shop.Cart" } }, "timeoutSeconds": 1 });
        let (routes, _) = doors(json!({ "probes": { "cart/readiness": probe } }));
        let serve = async { health(listener.accept().await.unwrap().0, message, status).await };
        let (answer, asked) = tokio::join!(ask(&routes, "/probe/cart/readiness"), serve);
        assert_eq!(answer, (expected, told.to_owned()));
        assert_eq!(asked, b"\0\0\0\0\x0b\x0a\x09shop.Cart");
    }
}

#[tokio::test]
async fn the_apps_metrics_are_passed_on_and_nobody_says_where_they_are_read() {
    let (port, _app) = app(|_, head| {
        assert!(head.starts_with("GET /stats HTTP/1.1\r\n"), "{head}");
        assert!(head.contains("accept: text/x\r\n"), "{head}");
        let body = "carts_total 3\n".repeat(10_000);
        format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    })
    .await;
    let (routes, _) = doors(json!({ "metrics": { "port": port, "path": "/stats" } }));
    let (status, body) = ask(&routes, "/metrics/app?collect[]=all").await;
    assert_eq!((status, body.len()), (200, 140_000));

    let gone = TcpListener::bind((OWN, 0)).await.unwrap().local_addr().unwrap().port();
    let (routes, _) = doors(json!({ "metrics": { "port": gone, "path": "/stats" } }));
    let (status, why) = ask(&routes, "/metrics/app").await;
    assert!(status == 502 && why.starts_with("the app's metrics cannot be read: cannot connect"), "{status} {why}");
}

#[tokio::test]
async fn a_reader_holds_its_place_until_it_has_read_and_no_longer_than_a_minute() {
    let (port, _app) = app(|_, _| format!("HTTP/1.1 200 OK\r\ncontent-length: 8000000\r\n\r\n{}", "x".repeat(8_000_000))).await;
    let (routes, _) = doors(json!({ "metrics": { "port": port, "path": "/stats" } }));
    let get = || {
        let mut request = Request::get("/metrics/app").body(Body::empty()).unwrap();
        request.extensions_mut().insert(Caller("192.0.2.1:7".parse().unwrap()));
        routes.clone().oneshot(request)
    };
    let first = get().await.unwrap();
    assert_eq!(first.status(), 200);
    // This app serves one after the other, so one place is all there is to see.
    let held = first.into_body();
    let others = futures_util::future::join_all((0..READERS_MAX).map(|_| timeout(Duration::from_millis(100), get()))).await;
    let refused = others.into_iter().flatten().flatten().filter(|answer| answer.status() == 429).count();
    assert_eq!(refused, 1, "of four places one is held by who does not read");
    drop(held);
}
