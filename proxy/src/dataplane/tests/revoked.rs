//! Policies that come while connections are open: what lives for days is judged again.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::{Duration, sleep};

use crate::dataplane::Proxy;
use crate::dataplane::world::{World, app_at, document, pod, service, told, vip};

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
    let mut heard = [0; 4];
    stream.write_all(b"ping").await.is_ok() && stream.read_exact(&mut heard).await.is_ok() && heard == *b"ping"
}

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
    world.app(app_at(3), |_| crate::dataplane::world::text("hello"));
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
