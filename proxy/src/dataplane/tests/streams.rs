//! Streams of HTTP/2 that end otherwise than with the end of a body: taken back halfway, or with their head.

use std::sync::Arc;
use std::time::Duration;

use http::Request;
use http_body_util::Full;
use parking_lot::Mutex;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::sleep;

use super::attacks::{DATA, END_HEADERS, HEADERS, RST_STREAM, frame, preface};
use super::world::{World, app_at, ask_h2, document, pod, service, text, vip};
use crate::dataplane::Proxy;

/// `:method POST`, `:scheme http`, `:path /`, `:authority api.shop` in HPACK.
const POST: &[u8] = b"\x83\x86\x84\x01\x08api.shop";
/// What a stream is taken back with.
const NO_ERROR: &[u8] = &[0, 0, 0, 0];

/// Two sidecars that take requests from everybody.
fn pair() -> (World, Arc<Proxy>, Arc<Proxy>) {
    let open = document("PeerAuthentication", "open", json!({ "mode": "Permissive" }));
    let world = World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), service("api", "api", 1), open]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    (world, web, api)
}

fn doors(world: &World, web: &Arc<Proxy>, api: &Arc<Proxy>) -> [DuplexStream; 2] {
    [world.connect(web, vip(1)), world.connect_inbound(api, app_at(3))]
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_taken_back_without_an_error_is_no_whole_one() {
    let (world, web, api) = pair();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&seen);
    world.raw_app(app_at(3), move |mut stream, _| {
        let kept = Arc::clone(&kept);
        tokio::spawn(async move {
            while let Ok(byte) = stream.read_u8().await {
                kept.lock().push(byte);
                if kept.lock().ends_with(b"abc\r\n") {
                    // From here on the request goes its way by itself.
                    stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n").await.unwrap();
                }
            }
        });
    });
    for mut stream in doors(&world, &web, &api) {
        let begun = [preface(&[]), frame(HEADERS, END_HEADERS, 1, POST), frame(DATA, 0, 1, b"abc")].concat();
        stream.write_all(&begun).await.unwrap();
        sleep(Duration::from_secs(1)).await;
        stream.write_all(&frame(RST_STREAM, 0, 1, NO_ERROR)).await.unwrap();
        sleep(Duration::from_secs(1)).await;
        let seen = String::from_utf8(std::mem::take(&mut *seen.lock())).unwrap();
        assert!(seen.ends_with("\r\n3\r\nabc\r\n"), "{seen}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_asks_for_a_head_hears_why_it_is_refused() {
    let denied = json!({ "action": "DENY", "rules": [{ "to": [{ "paths": ["/admin"] }] }] });
    let world = World::new(&[
        pod("web", "web-1", 2),
        pod("api", "api-1", 3),
        service("api", "api", 1),
        document("AuthorizationPolicy", "no-admin", denied),
    ]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |_| text("ok"));
    let head = |path: &str| Request::head(format!("http://api.shop{path}"));
    // By its own sidecar, by the one at the other end of a link, and by one that it reaches without a link.
    for (stream, request, status, reason) in [
        (world.connect(&web, vip(1)), head("/").header("outrigger-http-version", "2"), 400, "reserved_header"),
        (world.connect(&web, vip(1)), head("/admin"), 403, "denied"),
        (world.connect_inbound(&api, app_at(3)), head("/"), 403, "plaintext_refused"),
    ] {
        let heard = ask_h2(stream, request.body(Full::default()).unwrap()).await;
        assert_eq!((heard.status, heard.reason(), &*heard.body), (status, reason, ""));
        let length: u32 = heard.headers["content-length"].to_str().unwrap().parse().unwrap();
        assert!(length > 0, "as long as the answer to a GET");
    }
    let heard = ask_h2(world.connect(&web, vip(1)), head("/").body(Full::default()).unwrap()).await;
    assert_eq!((heard.status, &heard.headers["content-length"]), (200, &"2".parse().unwrap()));
}
