//! Connections that carry no request.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::{Duration, Instant, sleep};

use crate::dataplane::Proxy;
use crate::dataplane::tls::tests::hello_for;
use crate::dataplane::world::{World, app_at, ask, document, get, pod, service, text, told, vip};

fn pair(more: &[serde_json::Value]) -> World {
    let mut api = pod("api", "api-1", 3);
    // Nobody says what it speaks.
    api["spec"]["ports"] = json!([]);
    let mut documents = vec![pod("web", "web-1", 2), api, service("api", "api", 1)];
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

/// A pod without a sidecar, and its service.
fn alone(name: &str) -> [serde_json::Value; 2] {
    let mut pod = pod(name, &format!("{name}-1"), 4);
    pod["spec"]["transport"] = json!("Plaintext");
    [pod, service(name, name, 2)]
}

/// An application that greets its clients, and counts those that it saw.
fn greeter(world: &World, last: u8) -> Arc<AtomicUsize> {
    let seen = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&seen);
    world.raw_app(app_at(last), move |mut stream, _| {
        count.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            drop(stream.write_all(GREETING).await);
            drop(stream.read(&mut [0; 64]).await);
        });
    });
    seen
}

/// How long a silent client waits for the greeting.
async fn greeted(mut stream: DuplexStream) -> Duration {
    let begin = Instant::now();
    let mut heard = [0; GREETING.len()];
    stream.read_exact(&mut heard).await.unwrap();
    assert_eq!(heard, GREETING);
    begin.elapsed()
}

const GREETING: &[u8] = b"220 ready\r\n";
/// What a server that speaks first may lose.
const LOSS_MAX: Duration = Duration::from_millis(5);

#[tokio::test(start_paused = true)]
async fn a_server_that_speaks_first_is_heard_at_once() {
    let [mail, service] = alone("mail");
    let world = pair(&[mail, service, document("PeerAuthentication", "open", json!({ "mode": "Permissive" }))]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    greeter(&world, 3);
    greeter(&world, 4);
    for stream in [
        world.connect(&web, vip(1)),
        world.connect(&web, app_at(3)),
        world.connect(&web, vip(2)),
        world.connect_inbound(&api, app_at(3)),
    ] {
        let took = greeted(stream).await;
        assert!(took < LOSS_MAX, "{took:?}");
    }
    // By now it is known who speaks first there.
    assert_eq!(greeted(world.connect(&web, vip(1))).await, Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_client_teaches_nothing_about_a_port() {
    let world = pair(&[]);
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    greeter(&world, 3);
    for _ in 0..3 {
        let heard = ask(world.connect(&web, vip(1)), get("/")).await;
        assert!(heard.status >= 500, "{heard:?}");
        let silent = world.connect(&web, vip(2));
        sleep(Duration::from_millis(300)).await;
        drop(silent);
    }
    let took = greeted(world.connect(&web, vip(1))).await;
    assert!(took < LOSS_MAX, "{took:?}");
    // Nor does what is known of the port take its word from a client that speaks first.
    let heard = ask(world.connect(&web, vip(1)), get("/")).await;
    assert!(heard.status >= 500, "{heard:?}");
}

/// A request on a connection that was silent for a while.
async fn ask_late(stream: DuplexStream) -> u16 {
    sleep(Duration::from_millis(100)).await;
    ask(stream, get("/")).await.status
}

#[tokio::test(start_paused = true)]
async fn a_request_after_a_short_silence_is_a_request() {
    let world = pair(&[document("PeerAuthentication", "open", json!({ "mode": "Permissive" }))]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |_| text("hello"));
    assert_eq!(ask_late(world.connect(&web, vip(1))).await, 200);
    assert_eq!(ask_late(world.connect_inbound(&api, app_at(3))).await, 200);
    let opaque = |proxy: &Arc<Proxy>| proxy.telemetry.metrics.render().contains("outrigger_opaque_connections_total{");
    assert!(!opaque(&web), "{}", web.telemetry.metrics.render());
    // The server answers requests: its next silent client is waited for, and it sees no connection of nobody's.
    let dialled = world.dialled().len();
    let silent = world.connect(&web, vip(1));
    sleep(Duration::from_millis(200)).await;
    assert_eq!(world.dialled().len(), dialled);
    drop(silent);
}

#[tokio::test(start_paused = true)]
async fn what_servers_of_http_say_unasked_makes_no_connection_opaque() {
    for unasked in [b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64".as_slice(), b"HTTP/1.1 408 Request Timeout\r\n\r\n"] {
        let world = pair(&[]);
        let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
        world.raw_app(app_at(3), move |mut stream, _| {
            tokio::spawn(async move {
                let mut request = [0; 1024];
                tokio::select! {
                    _ = stream.read(&mut request) => {
                        drop(stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await);
                        sleep(Duration::from_secs(1)).await;
                    }
                    () = sleep(Duration::from_millis(1)) => drop(stream.write_all(unasked).await),
                }
            });
        });
        assert_eq!(ask_late(world.connect(&web, vip(1))).await, 200);
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_is_let_through_ahead_of_the_rules() {
    let world = pair(&[
        document("PeerAuthentication", "open", json!({ "mode": "Permissive" })),
        document(
            "AuthorizationPolicy",
            "reads",
            json!({
                "targetRefs": [{ "kind": "Service", "name": "api" }],
                "action": "ALLOW",
                "rules": [{ "to": [{ "methods": ["GET"] }] }],
            }),
        ),
    ]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    let seen = greeter(&world, 3);
    for mut stream in [world.connect_inbound(&api, app_at(3)), world.connect(&web, vip(1))] {
        let mut heard = Vec::new();
        drop(stream.read_to_end(&mut heard).await);
        assert!(heard.is_empty(), "{:?}", String::from_utf8_lossy(&heard));
    }
    assert_eq!(seen.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn a_database_that_refuses_tls_is_talked_to_in_clear() {
    let world = pair(&alone("db"));
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    let (ask_for_tls, begin) = (b"\0\0\0\x08\x04\xd2\x16\x2f", b"\0\0\0\x09\0\x03\0\0\0");
    for last in [3, 4] {
        world.raw_app(app_at(last), move |mut stream, _| {
            tokio::spawn(async move {
                let mut asked = [0; 8];
                drop(stream.read_exact(&mut asked).await);
                assert_eq!(&asked, ask_for_tls);
                drop(stream.write_all(b"N").await);
                let mut begun = [0; 9];
                drop(stream.read_exact(&mut begun).await);
                assert_eq!(&begun, begin);
                drop(stream.write_all(b"R").await);
            });
        });
    }
    for to in [vip(1), vip(2)] {
        let mut stream = world.connect(&web, to);
        let start = Instant::now();
        let mut answer = [0];
        stream.write_all(ask_for_tls).await.unwrap();
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"N");
        stream.write_all(begin).await.unwrap();
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"R");
        assert!(start.elapsed() < LOSS_MAX, "{:?}", start.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn the_name_that_foreign_tls_asks_for_is_told() {
    let world = pair(&[]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    for (host, size) in [("api.shop.svc.cluster.local", 7), ("elsewhere.example", 1_000)] {
        let hello = hello_for(host, &[b"h2"]);
        let mut stream = world.connect(&web, vip(1));
        for part in hello.chunks(size) {
            stream.write_all(part).await.unwrap();
            sleep(Duration::from_millis(1)).await;
        }
        stream.shutdown().await.unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        heard.reverse();
        assert!(heard == hello, "the hello of {host} arrived otherwise");
    }
    sleep(Duration::from_secs(1)).await;
    let told = |proxy: &Arc<Proxy>| {
        let text = proxy.telemetry.metrics.render();
        let lines = text.lines().filter_map(|line| line.strip_prefix("outrigger_tls_passed_connections_total"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(
        told(&web),
        [r#"{direction="outbound",server_name="api.shop"} 1"#, r#"{direction="outbound",server_name="elsewhere.example"} 1"#]
    );
    assert_eq!(
        told(&api),
        [r#"{direction="inbound",server_name="api.shop"} 1"#, r#"{direction="inbound",server_name="other"} 1"#]
    );
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

/// It is a link that did not come about, and says nothing of plaintext.
#[tokio::test(start_paused = true)]
async fn half_a_hello_is_a_handshake_that_failed() {
    let hello = hello_for("example.org", &[b"outrigger-h2"]);
    for ends in [false, true] {
        let world = pair(&[]);
        let api = world.sidecar("api", "api-1", 3);
        let mut stream = world.connect_inbound(&api, app_at(3));
        stream.write_all(&hello[..hello.len() / 2]).await.unwrap();
        if ends {
            stream.shutdown().await.unwrap();
        }
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        assert!(heard.is_empty());
        sleep(Duration::from_secs(1)).await;
        told(&api, &["outrigger_refusals_total", "inbound", "reason=\"handshake_failed\""]);
        assert!(!api.telemetry.metrics.render().contains("plaintext_refused"), "{ends}");
    }
}

/// Not a byte of a request reaches the application past a rule that looks into requests, whenever and behind whatever it comes.
#[tokio::test(start_paused = true)]
async fn no_request_passes_for_something_else_where_a_rule_would_look_at_it() {
    let requests = [(0, b"".as_slice()), (300, b""), (60_000, b""), (0, b"\n"), (0, b"\r\n\r\n"), (300, b"\n"), (0, b" \t")];
    let limited = json!({ "targetRefs": [{ "kind": "Service", "name": "api" }], "rateLimit": { "requests": 1, "per": "1h" } });
    let world = pair(&[
        document("TrafficPolicy", "limit", limited),
        document("PeerAuthentication", "open", json!({ "mode": "Permissive" })),
    ]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |_| text("api"));
    assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.status, 200);
    for (late, before) in requests {
        for mut stream in [world.connect(&web, vip(1)), world.connect_inbound(&api, app_at(3))] {
            stream.write_all(before).await.unwrap();
            sleep(Duration::from_millis(late)).await;
            stream.write_all(b"GET / HTTP/1.1\r\nHost: api\r\nConnection: close\r\n\r\n").await.unwrap();
            let mut heard = Vec::new();
            stream.read_to_end(&mut heard).await.unwrap();
            let heard = String::from_utf8_lossy(&heard);
            let expected = if before == b" \t" { "HTTP/1.1 400 " } else { "HTTP/1.1 429 " };
            assert!(heard.starts_with(expected), "{late} {before:?}: {heard}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_peer_calls_no_request_is_looked_at_where_a_rule_would_look_at_it() {
    let limited = json!({ "targetRefs": [{ "kind": "Service", "name": "api" }], "rateLimit": { "requests": 1, "per": "1h" } });
    for (policies, expected) in [(vec![document("TrafficPolicy", "limit", limited)], "HTTP/1.1 429 "), (vec![], "HTTP/1.1 200 ")]
    {
        let world = pair(&policies);
        let (_web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
        world.app(app_at(3), |_| text("api"));
        let mut heard = String::new();
        for _ in 0..2 {
            let mut stream = world.opaque_link("web", "api", &api, app_at(3)).await;
            stream.write_all(b"GET / HTTP/1.1\r\nHost: api\r\nConnection: close\r\n\r\n").await.unwrap();
            heard.clear();
            drop(stream.read_to_string(&mut heard).await);
        }
        assert!(heard.starts_with(expected), "{heard}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_on_both_sides_hears_the_other_one_leave() {
    let world = pair(&[]);
    let (web, _api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.raw_app(app_at(3), |stream, _| {
        tokio::spawn(async move {
            sleep(Duration::from_secs(60)).await;
            drop(stream);
        });
    });
    let begin = Instant::now();
    let mut stream = world.connect(&web, vip(1));
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
    assert_eq!(begin.elapsed().as_secs(), 60);
}
