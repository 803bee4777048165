//! Connections that carry no request.

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Duration, sleep};

use super::world::{World, app_at, document, pod, service, vip};

fn pair(more: &[serde_json::Value]) -> World {
    let mut documents = vec![pod("web", "web-1", 2), pod("api", "api-1", 3), service("api", "api", 1)];
    documents.extend_from_slice(more);
    let world = World::new(&documents);
    world.raw_app(app_at(3), |mut stream, _| {
        tokio::spawn(async move {
            let mut heard = Vec::new();
            drop(stream.read_to_end(&mut heard).await);
            heard.reverse();
            drop(stream.write_all(&heard).await);
            drop(stream.shutdown().await);
        });
    });
    world
}

#[tokio::test(start_paused = true)]
async fn bytes_pass_the_pair_and_a_half_close_with_them() {
    let world = pair(&[]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    let mut stream = world.connect(&web, vip(1));
    stream.write_all(b"*1\r\n$4\r\nPING\r\n").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard, b"\n\rGNIP\n\r4$\n\r1*");
    sleep(Duration::from_secs(1)).await;
    for metrics in [web.telemetry.metrics.render(), api.telemetry.metrics.render()] {
        let source = r#"source_identity="spiffe://cluster.local/ns/shop/sa/web""#;
        assert!(metrics.lines().any(|line| line.contains("bytes") && line.contains(source)), "{metrics}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_speaks_first_is_heard() {
    let world = pair(&[]);
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.raw_app(app_at(3), |mut stream, _| {
        tokio::spawn(async move { stream.write_all(b"220 ready\r\n").await });
    });
    let mut stream = world.connect(&web, vip(1));
    let mut heard = [0; 11];
    stream.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"220 ready\r\n");
}

#[tokio::test(start_paused = true)]
async fn silence_does_not_get_round_a_rule_about_requests() {
    let world = pair(&[document(
        "AuthorizationPolicy",
        "reads",
        json!({
            "targetRefs": [{ "kind": "Service", "name": "api" }],
            "action": "ALLOW",
            "rules": [{ "to": [{ "methods": ["GET"] }] }],
        }),
    )]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    let mut stream = world.connect(&web, vip(1));
    sleep(Duration::from_millis(300)).await;
    drop(stream.write_all(b"DELETE /all HTTP/1.1\r\nhost: api\r\n\r\n").await);
    let mut heard = Vec::new();
    drop(stream.read_to_end(&mut heard).await);
    assert!(heard.is_empty(), "{:?}", String::from_utf8_lossy(&heard));
    sleep(Duration::from_secs(1)).await;
    let metrics = api.telemetry.metrics.render();
    assert!(metrics.lines().any(|line| line.contains("refus") && line.contains("AuthorizationPolicy/shop/reads")), "{metrics}");
}

#[tokio::test(start_paused = true)]
async fn a_foreign_hello_is_passed_on_untouched() {
    let world = pair(&[]);
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    let mut stream = world.connect(&web, vip(1));
    let hello = b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00";
    stream.write_all(hello).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).await.unwrap();
    heard.reverse();
    assert_eq!(heard, hello);
}

#[tokio::test(start_paused = true)]
async fn garbage_instead_of_a_handshake_is_refused() {
    let world = pair(&[]);
    let api = world.sidecar("api", "api-1", 3);
    for garbage in [b"\x00\x01\x02\x03".as_slice(), b"\x16\x03\x01\xff\xff\x01\x00", b""] {
        let mut stream = world.connect_inbound(&api, app_at(3));
        stream.write_all(garbage).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        assert!(heard.is_empty());
    }
}
