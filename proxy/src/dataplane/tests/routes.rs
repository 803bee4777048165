//! What routes do beside choosing a backend: redirects, answers to browsers, calls of gRPC, connections by their TLS.

use std::sync::Arc;

use http::Request;
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Duration;

use crate::dataplane::Proxy;
use crate::dataplane::tls::tests::hello_for;
use crate::dataplane::world::{World, app_at, ask, ask_h2, document, get, pod, service, text, told, vip};

/// `web` calls `api`, whose pods are those of `v1`; `v2` is there too.
fn versions(more: &[Value]) -> (World, Arc<Proxy>) {
    let mut documents = vec![
        pod("web", "web-1", 2),
        pod("v1", "v1-1", 3),
        pod("v2", "v2-1", 4),
        service("api", "v1", 1),
        service("v1", "v1", 2),
        service("v2", "v2", 3),
    ];
    documents.extend_from_slice(more);
    let world = World::new(&documents);
    let web = world.sidecar("web", "web-1", 2);
    world.sidecar("v1", "v1-1", 3);
    world.sidecar("v2", "v2-1", 4);
    for (last, name) in [(3, "v1"), (4, "v2")] {
        world.app(app_at(last), move |_| text(name));
    }
    (world, web)
}

fn route(kind: &str, rules: Value) -> Value {
    document(kind, "api", json!({ "parentRefs": [{ "group": "", "kind": "Service", "name": "api" }], "rules": rules }))
}

#[tokio::test(start_paused = true)]
async fn a_redirect_is_the_answer_and_goes_nowhere() {
    let redirect = json!({ "scheme": "https", "hostname": "shop.example", "statusCode": 308 });
    let edit =
        json!({ "type": "ResponseHeaderModifier", "responseHeaderModifier": { "set": [{ "name": "x-answer", "value": "1" }] } });
    let filters = json!([{ "type": "RequestRedirect", "requestRedirect": redirect }, edit]);
    let (world, web) = versions(&[route("HTTPRoute", json!([{ "filters": filters }]))]);
    let heard = ask(world.connect(&web, vip(1)), get("/cart?a=b")).await;
    assert_eq!((heard.status, heard.reason()), (308, "redirected"));
    assert_eq!(heard.headers["location"], "https://shop.example/cart?a=b");
    assert_eq!(heard.headers["x-answer"], "1");
    assert_eq!(heard.body, "");
    assert_eq!(world.dialled(), []);
    told(&web, &["redirected"]);
}

#[tokio::test(start_paused = true)]
async fn a_preflight_is_answered_here_and_an_answer_says_who_may_read_it() {
    let cors = json!({ "allowOrigins": ["https://shop.example"], "allowMethods": ["PUT"], "maxAge": 60 });
    let rules = json!([
        { "matches": [{ "path": { "value": "/gone" } }], "filters": [{ "type": "CORS", "cors": cors }], "backendRefs": [{ "name": "gone", "port": 80 }] },
        { "filters": [{ "type": "CORS", "cors": cors }], "backendRefs": [{ "name": "v2", "port": 80 }] },
    ]);
    let (world, web) = versions(&[route("HTTPRoute", rules)]);
    let from = |path: &str, origin: &str| Request::get(path).header("host", "api").header("origin", origin);
    let plain = |origin: &str| from("/", origin).body(Full::default()).unwrap();
    let preflight = |origin: &str| {
        from("/", origin).method("OPTIONS").header("access-control-request-method", "PUT").body(Full::default()).unwrap()
    };
    let heard = ask(world.connect(&web, vip(1)), preflight("https://shop.example")).await;
    assert_eq!((heard.status, heard.reason(), &*heard.body), (204, "preflight", ""));
    assert_eq!(heard.headers["access-control-allow-origin"], "https://shop.example");
    assert_eq!(
        (&heard.headers["access-control-allow-methods"], &heard.headers["access-control-max-age"]),
        (&"PUT".parse().unwrap(), &"60".parse().unwrap())
    );
    let heard = ask(world.connect(&web, vip(1)), preflight("https://evil.example")).await;
    assert_eq!((heard.status, heard.headers.get("access-control-allow-origin")), (204, None));
    assert_eq!(world.dialled(), []);
    let heard = ask(world.connect(&web, vip(1)), plain("https://shop.example")).await;
    assert_eq!((&*heard.body, &heard.headers["access-control-allow-origin"]), ("v2", &"https://shop.example".parse().unwrap()));
    assert_eq!(heard.headers["vary"], "Origin");
    let heard = ask(world.connect(&web, vip(1)), plain("https://evil.example")).await;
    assert_eq!((&*heard.body, heard.headers.get("access-control-allow-origin")), ("v2", None));
    // A page may read why it got no answer, too.
    let heard = ask(world.connect(&web, vip(1)), from("/gone", "https://shop.example").body(Full::default()).unwrap()).await;
    assert_eq!((heard.status, &heard.headers["access-control-allow-origin"]), (500, &"https://shop.example".parse().unwrap()));
}

fn call(path: &str) -> Request<Full<bytes::Bytes>> {
    Request::post(format!("http://api{path}")).header("content-type", "application/grpc").body(Full::default()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_call_goes_by_service_and_method_and_is_refused_as_grpc_is() {
    let to = |name: &str| json!([{ "name": name, "port": 80 }]);
    let rules = json!([
        { "matches": [{ "method": { "service": "shop.Cart", "method": "Add" } }], "backendRefs": to("v1") },
        { "matches": [{ "method": { "service": "shop.Cart" } }], "backendRefs": to("v2") },
        { "matches": [{ "method": { "service": "shop.Gone" } }], "backendRefs": to("gone") },
    ]);
    let (world, web) = versions(&[route("GRPCRoute", rules)]);
    for (path, expected) in [("/shop.Cart/Add", "v1"), ("/shop.Cart/Remove", "v2")] {
        assert_eq!(ask_h2(world.connect(&web, vip(1)), call(path)).await.body, expected, "{path}");
    }
    for (path, reason, grpc) in [("/shop.Other/Add", "no_route", "12"), ("/shop.Gone/Add", "no_backend", "14")] {
        let heard = ask_h2(world.connect(&web, vip(1)), call(path)).await;
        assert_eq!(
            (heard.status, heard.reason(), &heard.headers["grpc-status"]),
            (200, reason, &grpc.parse().unwrap()),
            "{path}"
        );
    }
    // What is no call is none of the route's.
    let heard = ask(world.connect(&web, vip(1)), get("/shop.Cart/Add")).await;
    assert_eq!((heard.status, heard.reason()), (404, "no_route"));
}

#[tokio::test(start_paused = true)]
async fn a_backend_has_a_rewrite_and_copies_of_its_own() {
    let filters = json!([
        { "type": "URLRewrite", "urlRewrite": {
            "hostname": "old.example", "path": { "type": "ReplacePrefixMatch", "replacePrefixMatch": "/legacy" } } },
        { "type": "RequestMirror", "requestMirror": { "backendRef": { "name": "v2", "port": 80 } } },
    ]);
    let matches = |prefix: &str| json!([{ "path": { "value": prefix } }]);
    let (world, web) = versions(&[route(
        "HTTPRoute",
        json!([
            { "matches": matches("/api"), "backendRefs": [{ "name": "v1", "port": 80, "filters": filters }] },
            { "matches": matches("/"), "backendRefs": [{ "name": "v1", "port": 80 }] },
        ]),
    )]);
    let seen: Arc<parking_lot::Mutex<Vec<String>>> = Arc::default();
    for (last, name) in [(3, "v1"), (4, "v2")] {
        let seen = Arc::clone(&seen);
        world.app(app_at(last), move |request| {
            seen.lock().push(format!("{name} {} {}", request.headers()["host"].to_str().unwrap(), request.uri()));
            text(name)
        });
    }
    assert_eq!(ask(world.connect(&web, vip(1)), get("/api/cart?a=b")).await.body, "v1");
    assert_eq!(ask(world.connect(&web, vip(1)), get("/other")).await.body, "v1");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut seen = seen.lock().clone();
    seen.sort();
    assert_eq!(seen, ["v1 api.shop /other", "v1 old.example /legacy/cart?a=b", "v2 old.example /legacy/cart?a=b"]);
}

#[tokio::test(start_paused = true)]
async fn what_another_namespace_does_not_grant_is_not_sent_to() {
    let mut route = route("HTTPRoute", json!([{ "backendRefs": [{ "name": "far", "namespace": "lab", "port": 80 }] }]));
    route["spec"]["rules"][0]["filters"] = json!([{
        "type": "RequestMirror", "requestMirror": { "backendRef": { "name": "far", "namespace": "lab", "port": 80 } },
    }]);
    let in_lab = |mut document: Value| {
        document["metadata"]["namespace"] = json!("lab");
        document
    };
    let mut far = in_lab(pod("far", "far-1", 5));
    far["spec"]["transport"] = json!("Plaintext");
    let (mut world, web) = versions(&[route, in_lab(service("far", "far", 9)), far]);
    world.app(app_at(5), |_| text("far"));
    let heard = ask(world.connect(&web, vip(1)), get("/")).await;
    assert_eq!((heard.status, heard.reason()), (500, "no_backend"));
    assert_eq!(world.dialled(), []);
    let grant = in_lab(document(
        "ReferenceGrant",
        "shop",
        json!({
            "from": [{ "group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "shop" }],
            "to": [{ "group": "", "kind": "Service", "name": "far" }],
        }),
    ));
    world.change(&grant, &web, "web-1");
    assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.body, "far");
}

/// What a plain application that greets says to who connects and sends these bytes; nothing where it was closed.
async fn greeted(world: &World, web: &Arc<Proxy>, bytes: &[u8]) -> String {
    let mut stream = world.connect(web, vip(1));
    stream.write_all(bytes).await.unwrap();
    let mut heard = [0; 2];
    match tokio::time::timeout(Duration::from_secs(60), stream.read_exact(&mut heard)).await {
        Ok(Ok(_)) => String::from_utf8_lossy(&heard).into_owned(),
        _closed_or_silent => String::new(),
    }
}

fn greeters(world: &World) {
    for (last, name) in [(3, b"v1"), (4, b"v2")] {
        world.raw_app(app_at(last), move |mut stream, _| {
            tokio::spawn(async move {
                drop(stream.write_all(name).await);
                drop(stream.read(&mut [0; 1024]).await);
            });
        });
    }
}

/// "GAMMA implementations SHOULD NOT infer any functionality from the `hostnames` field on `xRoute`s" (GEP-1294).
#[tokio::test(start_paused = true)]
async fn a_route_is_for_every_host_whatever_hostnames_it_names() {
    let to = |name: &str| json!([{ "name": name, "port": 80 }]);
    let mut named = route("HTTPRoute", json!([{ "backendRefs": to("v2") }]));
    named["spec"]["hostnames"] = json!(["shop.example"]);
    let (world, web) = versions(&[named]);
    for host in ["shop.example", "api", "other.example"] {
        let request = Request::get("/").header("host", host).body(Full::default()).unwrap();
        let heard = ask(world.connect(&web, vip(1)), request).await;
        assert_eq!((heard.status, &*heard.body), (200, "v2"), "{host}: {heard:?}");
    }
}

/// "it is recommended to guide users toward configuring `HTTPHeaderMatch` rules for the `Host` header" (GEP-1294).
#[tokio::test(start_paused = true)]
async fn hosts_are_told_apart_by_the_header_host_in_either_version_of_http() {
    let to = |name: &str| json!([{ "name": name, "port": 80 }]);
    let host = json!([{ "headers": [{ "name": "Host", "value": "new.example" }] }]);
    let rules = json!([{ "matches": host, "backendRefs": to("v2") }, { "backendRefs": to("v1") }]);
    let (world, web) = versions(&[route("HTTPRoute", rules)]);
    for (host, version) in [("new.example", "v2"), ("old.example", "v1")] {
        let request = Request::get("/").header("host", host).body(Full::default()).unwrap();
        let heard = ask(world.connect(&web, vip(1)), request).await;
        assert_eq!((heard.status, &*heard.body), (200, version), "{host}: {heard:?}");
        let request = Request::get(format!("http://{host}/")).body(Full::default()).unwrap();
        let heard = ask_h2(world.connect(&web, vip(1)), request).await;
        assert_eq!((heard.status, &*heard.body), (200, version), "{host}: {heard:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_tcp_route_takes_every_connection_whatever_it_carries() {
    let (world, web) = versions(&[route("TCPRoute", json!([{ "backendRefs": [{ "name": "v2", "port": 80 }] }]))]);
    greeters(&world);
    // The server speaks first, and is not waited for.
    assert_eq!(greeted(&world, &web, b"").await, "v2");
    assert_eq!(greeted(&world, &web, b"GET / HTTP/1.1\r\nhost: api\r\n\r\n").await, "v2");
    let (world, web) = versions(&[route("TCPRoute", json!([{ "backendRefs": [{ "name": "gone", "port": 80 }] }]))]);
    greeters(&world);
    assert_eq!(greeted(&world, &web, b"").await, "");
    told(&web, &["no_backend"]);
}

#[tokio::test(start_paused = true)]
async fn a_tls_route_goes_by_the_name_that_is_asked_for() {
    let tls = |name: &str, host: &str, to: &str| {
        document(
            "TLSRoute",
            name,
            json!({
                "parentRefs": [{ "group": "", "kind": "Service", "name": "api" }],
                "hostnames": [host],
                "rules": [{ "backendRefs": [{ "name": to, "port": 80 }] }],
            }),
        )
    };
    let (world, web) = versions(&[tls("all", "*.shop.example", "v1"), tls("one", "new.shop.example", "v2")]);
    greeters(&world);
    assert_eq!(greeted(&world, &web, &hello_for("a.shop.example", &[])).await, "v1");
    assert_eq!(greeted(&world, &web, &hello_for("NEW.shop.example", &[b"h2"])).await, "v2");
    assert_eq!(world.dialled().len(), 2);
    for bytes in [hello_for("other.example", &[]), b"GET / HTTP/1.1\r\n\r\n".to_vec(), b"\x16\x03\x01".to_vec()] {
        assert_eq!(greeted(&world, &web, &bytes).await, "");
    }
    assert_eq!(world.dialled().len(), 2, "what no route is for is sent nowhere");
    told(&web, &["no_route"]);
}
