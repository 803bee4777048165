//! Requests through a pair of sidecars, and what an inbound sidecar refuses.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::world::{World, app_at, ask, ask_h2, document, get, pod, service, text, vip};

fn pair() -> World {
    World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), service("api", "api", 1)])
}

#[tokio::test(start_paused = true)]
async fn a_request_goes_through_both_sidecars_and_shows_its_true_client() {
    let world = pair();
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |request| {
        let client = request.extensions().get::<std::net::SocketAddr>().map(|client| client.ip().to_string());
        assert!(!request.headers().keys().any(|name| name.as_str().starts_with("outrigger-")));
        text(format!("{} {} {:?} {client:?}", request.method(), request.uri(), request.headers()["host"]))
    });
    let heard = ask(world.connect(&web, vip(1)), get("/cart?item=1")).await;
    assert_eq!((heard.status, &*heard.body), (200, "GET /cart?item=1 \"api.shop\" Some(\"10.64.0.2\")"));
    let (ours, theirs) = (web.telemetry.metrics.render(), api.telemetry.metrics.render());
    for (metrics, wanted) in [
        (&ours, r#"direction="outbound""#),
        (&ours, r#"destination_identity="spiffe://cluster.local/ns/shop/sa/api""#),
        (&ours, r#"destination_service="shop/api""#),
        (&theirs, r#"source_identity="spiffe://cluster.local/ns/shop/sa/web""#),
        (&theirs, r#"reason="default_allow""#),
    ] {
        assert!(
            metrics.lines().any(|line| line.starts_with("outrigger_requests_total") && line.contains(wanted)),
            "{wanted}\n{metrics}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_is_booked_to_the_service_that_it_names() {
    let world =
        World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), service("api", "api", 1), service("api-old", "api", 2)]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |_| text("ok"));
    for (last, host, count) in [(1, "api.shop", 3), (2, "api-old.shop.svc.cluster.local:80", 2)] {
        for _ in 0..count {
            let request = Request::get("/").header("host", host).body(Full::default()).unwrap();
            assert_eq!(ask(world.connect(&web, vip(last)), request).await.status, 200);
        }
    }
    let metrics = api.telemetry.metrics.render();
    for (service, count) in [("shop/api", 3), ("shop/api-old", 2)] {
        let wanted = format!("destination_service=\"{service}\"");
        let booked = |line: &str| line.starts_with("outrigger_requests_total") && line.contains(&wanted);
        let line = metrics.lines().find(|line| booked(line)).unwrap();
        assert!(line.ends_with(&format!(" {count}")), "{line}");
    }
}

#[tokio::test(start_paused = true)]
async fn requests_to_one_endpoint_share_one_link() {
    let world = pair();
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |_| text("ok"));
    for _ in 0..3 {
        assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.status, 200);
    }
    assert_eq!(world.dialled(), [app_at(3)]);
}

/// A pod of `api` whose port does not say what it speaks.
fn undeclared(name: &str, last: u8) -> serde_json::Value {
    let mut pod = pod("api", name, last);
    pod["spec"]["ports"][0]["name"] = json!("any");
    pod
}

#[tokio::test(start_paused = true)]
async fn what_the_caller_speaks_is_spoken_to_an_application_that_declares_nothing() {
    let world = World::new(&[pod("web", "web-1", 2), undeclared("api-1", 3), service("api", "api", 1)]);
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |request| text(format!("{:?}", request.version())));
    assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.body, "HTTP/1.1");
    let request = Request::get("http://api.shop/").body(Full::default()).unwrap();
    assert_eq!(ask_h2(world.connect(&web, vip(1)), request).await.body, "HTTP/2.0");
}

#[tokio::test(start_paused = true)]
async fn a_port_that_is_declared_http_hears_http_1_from_every_caller_and_grpc_in_http_2() {
    let mut declared = service("api", "api", 1);
    declared["spec"]["ports"][0]["appProtocol"] = json!("http");
    let mut plain = pod("api", "api-1", 3);
    plain["spec"]["transport"] = json!("Plaintext");
    for api in [pod("api", "api-1", 3), plain] {
        let bare = api["spec"]["transport"] == "Plaintext";
        let world = World::new(&[pod("web", "web-1", 2), api, declared.clone()]);
        let web = world.sidecar("web", "web-1", 2);
        if !bare {
            world.sidecar("api", "api-1", 3);
        }
        world.app(app_at(3), |request| {
            let header = |name| request.headers().get(name).map_or("", |value| value.to_str().unwrap());
            text(format!("{:?} {} {} {}", request.version(), header("host"), header("cookie"), request.body().len()))
        });
        let request = || Request::post("http://api.shop/").header("cookie", "a=1").header("cookie", "b=2");
        let heard = ask_h2(world.connect(&web, vip(1)), request().body(Full::from("abc")).unwrap()).await;
        assert_eq!(heard.body, "HTTP/1.1 api.shop a=1; b=2 3");
        let call = request().header("content-type", "application/grpc").body(Full::from("abc")).unwrap();
        assert!(ask_h2(world.connect(&web, vip(1)), call).await.body.starts_with("HTTP/2.0"));
    }
}

/// As servers of HTTP/1 answer the preface of HTTP/2.
#[tokio::test(start_paused = true)]
async fn an_application_that_does_not_speak_http_2_is_told_apart_and_not_ejected() {
    let mut plain = undeclared("api-1", 3);
    plain["spec"]["transport"] = json!("Plaintext");
    for api in [undeclared("api-1", 3), plain] {
        let bare = api["spec"]["transport"] == "Plaintext";
        let other = undeclared("api-2", 4);
        let world = World::new(&[pod("web", "web-1", 2), api, other, service("api", "api", 1)]);
        let web = world.sidecar("web", "web-1", 2);
        // Whoever dials the application tells.
        let mut tell = vec![Arc::clone(&web), world.sidecar("api", "api-2", 4)];
        if !bare {
            tell.push(world.sidecar("api", "api-1", 3));
        }
        for at in [app_at(3), app_at(4)] {
            world.raw_app(at, |mut stream, _| {
                tokio::spawn(async move {
                    let mut line = [0; 64];
                    drop(stream.read(&mut line).await);
                    drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await);
                });
            });
        }
        for _ in 0..12 {
            let request = Request::get("http://api.shop/").body(Full::default()).unwrap();
            let heard = ask_h2(world.connect(&web, vip(1)), request).await;
            assert_eq!((heard.status, heard.reason()), (502, "app_not_http2"), "{heard:?}");
            assert!(heard.body.contains("unless the calls are gRPC, declare its port as `http`"), "{heard:?}");
            assert!(heard.body.contains("`appProtocol: kubernetes.io/h2c` or a name that begins with `grpc`"), "{heard:?}");
        }
        assert!(tell.iter().any(|proxy| proxy.telemetry.metrics.render().contains("reason=\"app_not_http2\"")));
        let metrics = web.telemetry.metrics.render();
        assert!(!metrics.lines().any(|line| line.starts_with("outrigger_ejections_total{")), "{metrics}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_and_grpc_trailers_pass() {
    let world = pair();
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.raw_app(app_at(3), |stream, _| {
        tokio::spawn(async move {
            let service = hyper::service::service_fn(|request: Request<hyper::body::Incoming>| async move {
                use http_body_util::BodyExt as _;
                assert_eq!(request.headers()["te"], "trailers");
                let body = request.into_body().collect().await?.to_bytes();
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
                let body = Full::new(body).with_trailers(std::future::ready(Some(Ok(trailers))));
                Ok::<_, hyper::Error>(Response::builder().header("content-type", "application/grpc").body(body).unwrap())
            });
            let server = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
            drop(server.serve_connection(hyper_util::rt::TokioIo::new(stream), service).await);
        });
    });
    let request = Request::post("http://api.shop/shop.Cart/Add")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::from("message"))
        .unwrap();
    let heard = ask_h2(world.connect(&web, vip(1)), request).await;
    assert_eq!((heard.status, &*heard.body), (200, "message"));
    assert_eq!(heard.trailers.unwrap()["grpc-status"], "0");
    assert!(web.telemetry.metrics.render().contains(r#"grpc_status="0""#));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_ends_with_an_empty_piece_costs_nobody_the_link() {
    use http_body_util::StreamBody;
    use hyper::body::Frame;
    use hyper_util::rt::{TokioExecutor, TokioIo};

    let world = pair();
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |_| text("ok"));
    // Peers close a connection after a hundred DATA frames that are empty and end nothing.
    for number in 0..250 {
        let pieces = [Bytes::from_static(b"m"), Bytes::new()].map(|piece| Ok::<_, std::convert::Infallible>(Frame::data(piece)));
        let request = Request::post("http://api.shop/").body(StreamBody::new(futures_util::stream::iter(pieces))).unwrap();
        let stream = TokioIo::new(world.connect(&web, vip(1)));
        let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
        tokio::spawn(connection);
        assert_eq!(sender.send_request(request).await.unwrap().status(), 200, "request {number}");
    }
    assert_eq!(world.dialled().len(), 1, "one link and no other");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_names_the_rule_on_both_sides() {
    let world = World::new(&[
        pod("web", "web-1", 2),
        pod("api", "api-1", 3),
        service("api", "api", 1),
        document(
            "AuthorizationPolicy",
            "no-admin",
            json!({
                "targetRefs": [{ "kind": "Service", "name": "api" }],
                "action": "DENY",
                "rules": [{ "to": [{ "paths": ["/admin*"] }] }],
            }),
        ),
    ]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |_| text("ok"));
    assert_eq!(ask(world.connect(&web, vip(1)), get("/cart")).await.status, 200);
    for path in ["/admin", "/%61dmin", "/cart/../admin", "/./admin"] {
        let heard = ask(world.connect(&web, vip(1)), get(path)).await;
        assert_eq!((heard.status, heard.reason()), (403, "denied"), "{path}");
        assert!(heard.body.contains("AuthorizationPolicy/shop/no-admin"), "{}", heard.body);
    }
    // What servers read differently is refused where a policy decides.
    let heard = ask(world.connect(&web, vip(1)), get("/x%2f..%2fadmin")).await;
    assert_eq!((heard.status, heard.reason()), (400, "bad_request"));
    let metrics = api.telemetry.metrics.render();
    assert!(
        metrics.lines().any(|line| line.contains("refus") && line.contains("AuthorizationPolicy/shop/no-admin")),
        "{metrics}"
    );
}

#[tokio::test(start_paused = true)]
async fn grpc_is_refused_in_its_own_shape() {
    let world = World::new(&[
        pod("web", "web-1", 2),
        pod("api", "api-1", 3),
        service("api", "api", 1),
        document(
            "AuthorizationPolicy",
            "nobody",
            json!({ "targetRefs": [{ "kind": "Service", "name": "api" }], "action": "ALLOW", "rules": [] }),
        ),
    ]);
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |_| text("ok"));
    let request =
        Request::post("http://api.shop/shop.Cart/Add").header("content-type", "application/grpc").body(Full::from("m")).unwrap();
    let heard = ask_h2(world.connect(&web, vip(1)), request).await;
    assert_eq!((heard.status, heard.reason()), (200, "denied"));
    assert_eq!(heard.headers["grpc-status"], "7");
    assert!(heard.headers["grpc-message"].to_str().unwrap().contains("AuthorizationPolicy/shop/nobody"));
}

#[tokio::test(start_paused = true)]
async fn a_missing_token_is_refused_by_its_rule() {
    let key = json!({ "kty": "EC", "crv": "P-256", "alg": "ES256", "kid": "1", "use": "sig",
        "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0" });
    let world = World::new(&[
        pod("web", "web-1", 2),
        pod("api", "api-1", 3),
        service("api", "api", 1),
        document(
            "RequestAuthentication",
            "token",
            json!({
                "targetRefs": [{ "kind": "Service", "name": "api" }],
                "providers": [{ "issuer": "https://issuer.example", "audiences": ["api"], "jwks": { "keys": [key] } }],
            }),
        ),
    ]);
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |_| text("ok"));
    let heard = ask(world.connect(&web, vip(1)), get("/")).await;
    assert_eq!((heard.status, heard.reason()), (401, "token_missing"));
    assert!(heard.body.contains("RequestAuthentication/shop/token"), "{}", heard.body);
    assert_eq!(heard.headers["www-authenticate"], "Bearer");
}

#[tokio::test(start_paused = true)]
async fn plaintext_from_outside_is_refused_unless_a_rule_permits_it() {
    let mut world = pair();
    let api = world.sidecar("api", "api-1", 3);
    world.app(app_at(3), |_| text("ok"));
    let heard = ask(world.connect_inbound(&api, app_at(3)), get("/")).await;
    assert_eq!((heard.status, heard.reason()), (403, "plaintext_refused"));
    // An application's own TLS is plaintext in this sense: nobody proved who it is.
    let mut stream = world.connect_inbound(&api, app_at(3));
    stream.write_all(b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00").await.unwrap();
    let mut nothing = Vec::new();
    stream.read_to_end(&mut nothing).await.unwrap();
    assert!(nothing.is_empty());

    let permissive = document(
        "PeerAuthentication",
        "open",
        json!({ "targetRefs": [{ "kind": "Service", "name": "api" }], "mode": "Permissive" }),
    );
    world.change(&permissive, &api, "api-1");
    let heard = ask(world.connect_inbound(&api, app_at(3)), get("/")).await;
    assert_eq!((heard.status, &*heard.body), (200, "ok"), "{heard:?}");
}

#[tokio::test(start_paused = true)]
async fn own_ports_are_refused() {
    let world = pair();
    let api = world.sidecar("api", "api-1", 3);
    for port in [14001, 14006, 14020] {
        let mut stream = world.connect_inbound(&api, std::net::SocketAddr::from(([10, 64, 0, 3], port)));
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.ok();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        assert!(heard.is_empty(), "{port}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_rate_limit_answers_429_until_a_token_is_there() {
    let world = World::new(&[
        pod("web", "web-1", 2),
        pod("api", "api-1", 3),
        service("api", "api", 1),
        document(
            "TrafficPolicy",
            "slow",
            json!({ "targetRefs": [{ "kind": "Service", "name": "api" }], "rateLimit": { "requests": 2, "per": "10s" } }),
        ),
    ]);
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |_| text("ok"));
    for _ in 0..2 {
        assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.status, 200);
    }
    let heard = ask(world.connect(&web, vip(1)), get("/")).await;
    assert_eq!((heard.status, heard.reason()), (429, "rate_limited"));
    assert!(heard.headers.contains_key("retry-after"));
    tokio::time::sleep(std::time::Duration::from_secs(6)).await;
    assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.status, 200);
}

#[tokio::test(start_paused = true)]
async fn a_header_block_over_the_limit_is_answered_431() {
    let world = pair();
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |_| text("ok"));
    let request =
        Request::get("/").header("host", "api.shop").header("x-large", "a".repeat(80 * 1024)).body(Full::default()).unwrap();
    let stream = world.connect(&web, vip(1));
    assert_eq!(ask(stream, request).await.status, 431);
    let mut many = Request::get("/").header("host", "api.shop");
    for index in 0..300 {
        many = many.header(format!("x-{index}"), "1");
    }
    assert_eq!(ask(world.connect(&web, vip(1)), many.body(Full::default()).unwrap()).await.status, 431);
}

#[tokio::test(start_paused = true)]
async fn garbage_on_a_port_that_speaks_http_is_answered_400() {
    let mut api = service("api", "api", 1);
    api["spec"]["ports"][0]["appProtocol"] = json!("http");
    let world = World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), api]);
    let web = world.sidecar("web", "web-1", 2);
    let mut stream = world.connect(&web, vip(1));
    stream.write_all(b"\x00\x01garbage\r\n\r\n").await.unwrap();
    let mut heard = String::new();
    stream.read_to_string(&mut heard).await.unwrap();
    assert!(heard.starts_with("HTTP/1.1 400"), "{heard}");
    assert!(world.dialled().is_empty());
}

#[tokio::test(start_paused = true)]
async fn nobody_but_a_sidecar_sets_what_crosses_a_link() {
    let open = document("PeerAuthentication", "open", json!({ "mode": "Permissive" }));
    let world = World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), service("api", "api", 1), open]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |request| {
        assert!(!request.headers().keys().any(|name| name.as_str().starts_with("outrigger-")));
        // An application's word about a refusal is none.
        let mut answer = text("ok");
        answer.headers_mut().insert("outrigger-reason", http::HeaderValue::from_static("connect_failed"));
        answer.headers_mut().insert("outrigger-upgrade", http::HeaderValue::from_static("websocket"));
        answer
    });
    for (proxy, outbound) in [(&web, true), (&api, false)] {
        let open = || if outbound { world.connect(proxy, vip(1)) } else { world.connect_inbound(proxy, app_at(3)) };
        for name in ["outrigger-http-version", "Outrigger-Upgrade"] {
            let mut request = get("/");
            request.headers_mut().insert(http::HeaderName::try_from(name).unwrap(), http::HeaderValue::from_static("2"));
            let heard = ask(open(), request).await;
            assert_eq!((heard.status, heard.reason()), (400, "reserved_header"), "{heard:?}");
            assert!(heard.body.contains(&name.to_ascii_lowercase()), "{}", heard.body);
        }
        // Others of the prefix mean nothing and go no further, in either direction.
        let mut request = get("/");
        request.headers_mut().insert("outrigger-reason", http::HeaderValue::from_static("denied"));
        let heard = ask(open(), request).await;
        assert_eq!((heard.status, &*heard.body, heard.reason()), (200, "ok", ""), "{heard:?}");
        assert!(!heard.headers.keys().any(|name| name.as_str().starts_with("outrigger-")), "{heard:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_websocket_passes_the_pair() {
    let world = pair();
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.raw_app(app_at(3), |mut stream, _| {
        tokio::spawn(async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
            assert!(head.starts_with("get /chat http/1.1\r\n") && head.contains("upgrade: websocket\r\n"), "{head}");
            assert!(head.contains("connection: upgrade\r\n") && head.contains("sec-websocket-key: k\r\n"), "{head}");
            let answer = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-accept: a\r\n\r\nhello ";
            stream.write_all(answer).await.unwrap();
            let mut buffer = [0; 64];
            loop {
                let read = stream.read(&mut buffer).await.unwrap();
                if read == 0 {
                    break;
                }
                stream.write_all(&buffer[..read]).await.unwrap();
            }
        });
    });
    let mut stream = world.connect(&web, vip(1));
    stream
        .write_all(
            b"GET /chat HTTP/1.1\r\nHost: api.shop\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: k\r\n\r\n",
        )
        .await
        .unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101") && head.contains("sec-websocket-accept: a"), "{head}");
    stream.write_all(b"world").await.unwrap();
    let mut echoed = [0; 11];
    stream.read_exact(&mut echoed).await.unwrap();
    assert_eq!(&echoed, b"hello world");
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut echoed).await.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_of_the_application_that_closed_hurts_nobody() {
    let world = pair();
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    let opened = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&opened);
    world.raw_app(app_at(3), move |mut stream, _| {
        count.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            // Says keep-alive and closes all the same.
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        });
    });
    for _ in 0..5 {
        assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.body, "ok");
    }
    assert_eq!(opened.load(Ordering::Relaxed), 5);
}

#[tokio::test(start_paused = true)]
async fn the_application_s_connection_is_kept_for_the_same_client() {
    let world = pair();
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    let opened = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&opened);
    world.raw_app(app_at(3), move |mut stream, _| {
        count.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            let mut head = Vec::new();
            loop {
                match stream.read_u8().await {
                    Ok(byte) => head.push(byte),
                    Err(_closed) => return,
                }
                if head.ends_with(b"\r\n\r\n") {
                    head.clear();
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
                }
            }
        });
    });
    for _ in 0..5 {
        assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.body, Bytes::from_static(b"ok"));
    }
    assert_eq!(opened.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_head_request_has_a_length_and_no_body() {
    let world = pair();
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |_| text("seven b"));
    let request = Request::head("/").header("host", "api.shop").body(Full::default()).unwrap();
    let heard = ask(world.connect(&web, vip(1)), request).await;
    assert_eq!((heard.status, &*heard.body, &heard.headers["content-length"]), (200, "", &"7".parse().unwrap()));
}

#[tokio::test(start_paused = true)]
async fn an_expectation_is_answered_and_a_large_body_passes() {
    let world = pair();
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |request| text(request.body().len().to_string()));
    let mut stream = world.connect(&web, vip(1));
    stream
        .write_all(b"POST /up HTTP/1.1\r\nHost: api.shop\r\nContent-Length: 3000000\r\nExpect: 100-continue\r\n\r\n")
        .await
        .unwrap();
    let mut head = [0; 25];
    stream.read_exact(&mut head).await.unwrap();
    assert_eq!(&head, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(&vec![b'a'; 3_000_000]).await.unwrap();
    let mut answer = vec![0; 64];
    let read = stream.read(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer[..read]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test(start_paused = true)]
async fn http_1_0_is_answered_and_closed() {
    let world = pair();
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |request| text(format!("{:?}", request.version())));
    let mut stream = world.connect(&web, vip(1));
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.0 200") && answer.ends_with("HTTP/1.0"), "{answer}");
}

#[tokio::test(start_paused = true)]
async fn a_stop_lets_the_request_under_way_end_and_closes_idle_connections() {
    let world = pair();
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.slow_app(app_at(3), |_| async {
        tokio::time::sleep(std::time::Duration::from_secs(5)).await;
        text("done")
    });
    let mut idle = world.connect(&web, vip(1));
    idle.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut first = [0; 15];
    idle.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200 OK");
    let asked = tokio::spawn(ask(world.connect(&web, vip(1)), get("/")));
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let begin = tokio::time::Instant::now();
    drop((web, api));
    assert!(world.drain(std::time::Duration::from_secs(30)).await);
    assert!(begin.elapsed() < std::time::Duration::from_secs(10), "{:?}", begin.elapsed());
    assert_eq!(asked.await.unwrap().body, "done");
}

#[tokio::test(start_paused = true)]
async fn a_refused_upgrade_is_answered_in_http() {
    let world = pair();
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    for answer in [426, 404, 200] {
        world.app(app_at(3), move |_| super::world::status(answer));
        let request = Request::get("/chat")
            .header("host", "api.shop")
            .header("connection", "Upgrade")
            .header("upgrade", "websocket")
            .body(Full::default())
            .unwrap();
        assert_eq!(ask(world.connect(&web, vip(1)), request).await.status, answer);
        // The kept connection to the application's earlier form goes with its idle time.
        tokio::time::sleep(std::time::Duration::from_secs(10)).await;
    }
}
