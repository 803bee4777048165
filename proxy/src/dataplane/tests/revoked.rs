//! Policies that come while connections are open: what lives for days is judged again.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::{Duration, sleep, timeout};

use crate::dataplane::Proxy;
use crate::dataplane::world::{World, app_at, ask, ask_h2, document, get, pod, service, text, told, vip};

/// An application that says every byte back, behind its own answer to an upgrade where one is asked for.
fn pair(protocol: Option<&str>) -> (World, Arc<Proxy>, Arc<Proxy>) {
    let mut api = pod("api", "api-1", 3);
    api["spec"]["ports"] = match protocol {
        Some(protocol) => json!([{ "name": "port", "port": 80, "appProtocol": protocol }]),
        None => json!([]),
    };
    let world = World::new(&[pod("web", "web-1", 2), api, service("api", "api", 1), mode("Permissive")]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    (world, web, api)
}

fn mode(mode: &str) -> Value {
    document("PeerAuthentication", "open", json!({ "mode": mode }))
}

fn denial(rules: &Value) -> Value {
    let targets = json!([{ "kind": "Service", "name": "api" }]);
    document("AuthorizationPolicy", "shut", json!({ "targetRefs": targets, "action": "DENY", "rules": rules }))
}

fn echo(world: &World, greeting: &'static [u8], before: &'static [u8]) {
    world.raw_app(app_at(3), move |mut stream, _| {
        tokio::spawn(async move {
            let mut asked = Vec::new();
            while !asked.ends_with(before) {
                asked.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(greeting).await.unwrap();
            let mut bytes = [0; 64];
            while let Ok(count @ 1..) = stream.read(&mut bytes).await {
                if stream.write_all(&bytes[..count]).await.is_err() {
                    return;
                }
            }
        });
    });
}

/// Is what is said said back?
async fn answers(stream: &mut DuplexStream) -> bool {
    echoes(stream, *b"ping").await
}

async fn echoes<const N: usize>(stream: &mut DuplexStream, said: [u8; N]) -> bool {
    let mut heard = [0; N];
    stream.write_all(&said).await.is_ok() && stream.read_exact(&mut heard).await.is_ok() && heard == said
}

/// A request and its answer that have no end: what the one brings, the other says back.
async fn talks(mut stream: DuplexStream) -> DuplexStream {
    let request = b"POST /talk HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(request).await.unwrap();
    assert!(until(&mut stream, b"\r\n\r\n").await.starts_with("HTTP/1.1 200"));
    assert!(talk_goes_on(&mut stream).await);
    stream
}

async fn talk_goes_on(stream: &mut DuplexStream) -> bool {
    echoes(stream, *b"4\r\nping\r\n").await
}

const TALK: &[u8] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

async fn until(stream: &mut DuplexStream, end: &[u8]) -> String {
    let mut heard = Vec::new();
    while !heard.ends_with(end) {
        heard.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(heard).unwrap()
}

/// The stream ends, and the callee says why.
async fn is_cut(mut stream: DuplexStream, callee: &Proxy, why: &[&str]) {
    let mut rest = Vec::new();
    drop(stream.read_to_end(&mut rest).await);
    assert!(rest.is_empty(), "{:?}", String::from_utf8_lossy(&rest));
    sleep(Duration::from_millis(10)).await;
    told(callee, why);
}

#[tokio::test(start_paused = true)]
async fn a_request_on_an_old_connection_is_judged_by_the_mode_of_now() {
    let (mut world, _web, api) = pair(Some("http"));
    world.app(app_at(3), |_| text("hello"));
    let mut stream = world.connect_inbound(&api, app_at(3));
    let request = b"GET / HTTP/1.1\r\nHost: api\r\n\r\n";
    stream.write_all(request).await.unwrap();
    assert!(until(&mut stream, b"hello").await.starts_with("HTTP/1.1 200"));
    world.change(&mode("Strict"), &api, "api-1");
    stream.write_all(request).await.unwrap();
    let heard = until(&mut stream, b"\r\n\r\n").await;
    assert!(heard.starts_with("HTTP/1.1 403") && heard.contains("outrigger-reason: plaintext_refused"), "{heard}");
}

#[tokio::test(start_paused = true)]
async fn bytes_in_plaintext_end_when_their_mode_does() {
    let (mut world, _web, api) = pair(None);
    echo(&world, b"", b"first");
    let mut stream = world.connect_inbound(&api, app_at(3));
    stream.write_all(b"first").await.unwrap();
    assert!(answers(&mut stream).await);
    world.change(&mode("Strict"), &api, "api-1");
    is_cut(stream, &api, &["outrigger_opaque_connections_total", "plaintext_refused"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_link_with_bytes_ends_when_its_caller_is_shut_out() {
    let (mut world, web, api) = pair(None);
    echo(&world, b"", b"first");
    let mut stream = world.connect(&web, vip(1));
    stream.write_all(b"first").await.unwrap();
    assert!(answers(&mut stream).await);
    world.change(&mode("Strict"), &api, "api-1");
    assert!(answers(&mut stream).await, "a link is no plaintext");
    world.change(&denial(&json!([{ "from": [{ "namespaces": ["elsewhere"] }] }])), &api, "api-1");
    assert!(answers(&mut stream).await, "a policy about somebody else");
    world.change(&denial(&json!([{ "from": [{ "namespaces": ["shop"] }] }])), &api, "api-1");
    is_cut(stream, &api, &["outrigger_opaque_connections_total", r#"reason="denied""#]).await;
}

#[tokio::test(start_paused = true)]
async fn a_websocket_ends_when_whatever_its_caller_asks_for_is_denied() {
    let (mut world, web, api) = pair(Some("http"));
    let accepted = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";
    echo(&world, accepted, b"\r\n\r\n");
    let mut stream = world.connect(&web, vip(1));
    let request = b"GET /ws HTTP/1.1\r\nHost: api\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    stream.write_all(request).await.unwrap();
    assert!(until(&mut stream, b"\r\n\r\n").await.starts_with("HTTP/1.1 101"));
    assert!(answers(&mut stream).await);
    // What it asked for is not known any more, so a rule about some requests does not end it.
    world.change(&denial(&json!([{ "to": [{ "paths": ["/ws"] }] }])), &api, "api-1");
    assert!(answers(&mut stream).await);
    world.change(&denial(&json!([{}])), &api, "api-1");
    is_cut(stream, &api, &["outrigger_requests_total", r#"reason="denied""#, r#"status="101""#]).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_in_plaintext_that_does_not_end_is_ended_when_its_mode_is() {
    let (mut world, _web, api) = pair(Some("http"));
    echo(&world, TALK, b"\r\n\r\n");
    let mut stream = talks(world.connect_inbound(&api, app_at(3))).await;
    world.change(&denial(&json!([{ "to": [{ "paths": ["/talk"] }] }])), &api, "api-1");
    assert!(talk_goes_on(&mut stream).await, "what was let in is not judged by its path again");
    world.change(&mode("Strict"), &api, "api-1");
    is_cut(stream, &api, &["outrigger_requests_total", r#"reason="plaintext_refused""#, r#"status="200""#]).await;
}

#[tokio::test(start_paused = true)]
async fn requests_on_a_link_are_ended_when_whatever_their_caller_asks_for_is_denied() {
    let (mut world, web, api) = pair(Some("http"));
    echo(&world, TALK, b"\r\n\r\n");
    let mut streams = [talks(world.connect(&web, vip(1))).await, talks(world.connect(&web, vip(1))).await];
    let others = [
        mode("Strict"),
        denial(&json!([{ "from": [{ "namespaces": ["elsewhere"] }] }])),
        denial(&json!([{ "to": [{ "methods": ["POST"] }] }])),
        denial(&json!([{ "to": [{ "ports": [9] }] }])),
    ];
    for other in others {
        world.change(&other, &api, "api-1");
        for stream in &mut streams {
            assert!(talk_goes_on(stream).await, "{other}");
        }
    }
    world.change(&denial(&json!([{ "from": [{ "principals": ["spiffe://cluster.local/ns/shop/sa/web"] }] }])), &api, "api-1");
    for stream in streams {
        is_cut(stream, &api, &["outrigger_requests_total", r#"reason="denied""#, r#"status="200""#]).await;
    }
    told(&api, &["outrigger_refusals_total", r#"reason="denied""#, r#"rule="AuthorizationPolicy/shop/shut rules[0]""#, "} 2"]);
    assert_eq!(world.dialled().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_not_answered_yet_is_ended_as_well() {
    let (mut world, web, api) = pair(Some("http"));
    world.slow_app(app_at(3), |_| async {
        sleep(Duration::from_secs(3600)).await;
        text("late")
    });
    let mut plain = world.connect_inbound(&api, app_at(3));
    plain.write_all(b"GET / HTTP/1.1\r\nHost: api\r\n\r\n").await.unwrap();
    let linked = tokio::spawn(ask(world.connect(&web, vip(1)), get("/")));
    let prior = tokio::spawn(ask_h2(world.connect(&web, vip(1)), get("/")));
    sleep(Duration::from_secs(1)).await;
    world.change(&denial(&json!([{}])), &api, "api-1");
    is_cut(plain, &api, &["outrigger_requests_total", r#"source_identity="""#, r#"reason="denied""#]).await;
    for asked in [linked, prior] {
        let heard = timeout(Duration::from_secs(5), asked).await.expect("it is cut, and not waited for").unwrap();
        assert_eq!((heard.status, heard.reason()), (502, "upstream_reset"));
    }
    let source = r#"source_identity="spiffe://cluster.local/ns/shop/sa/web""#;
    told(&api, &["outrigger_requests_total", source, r#"reason="denied""#, "} 2"]);
}

#[tokio::test(start_paused = true)]
async fn a_link_on_which_nothing_is_under_way_stays_and_its_next_request_is_refused() {
    let (mut world, web, api) = pair(Some("http"));
    world.app(app_at(3), |_| text("hello"));
    assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.status, 200);
    for _ in 0..2 {
        // Whatever else changes does not take a refusal away.
        world.change(&denial(&json!([{}])), &api, "api-1");
        sleep(Duration::from_millis(10)).await;
        let heard = ask(world.connect(&web, vip(1)), get("/")).await;
        assert_eq!((heard.status, heard.reason()), (403, "denied"));
    }
    assert_eq!(world.dialled().len(), 1);
}
