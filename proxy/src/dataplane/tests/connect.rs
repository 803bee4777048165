//! Tunnels by CONNECT through a pair of sidecars and through one hop: a protocol that is asked for by an extended CONNECT
//! (RFC 8441), whatever both ends speak, and a way through an application that is a forward proxy (RFC 9110 9.3.6).

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use h2::client::SendRequest;
use h2::ext::Protocol;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request, Response, StatusCode};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::{sleep, timeout};

use super::fidelity::{sidecars, until};
use crate::dataplane::Proxy;
use crate::dataplane::world::{World, app_at, document, pod, service, told, vip};

/// A pair of sidecars, and one hop, to an application whose port is declared so.
fn worlds(protocol: Option<&str>) -> [World; 2] {
    ["MutualTls", "Plaintext"].map(|transport| {
        let mut api = service("api", "api", 1);
        let mut app = pod("api", "api-1", 3);
        match protocol {
            Some(protocol) => api["spec"]["ports"][0]["appProtocol"] = json!(protocol),
            None => app["spec"]["ports"] = json!([]),
        }
        if transport == "Plaintext" {
            app["spec"]["transport"] = json!("Plaintext");
        }
        World::new(&[pod("web", "web-1", 2), app, api])
    })
}

/// The end of a tunnel in HTTP/2.
struct Stream {
    from: RecvStream,
    to: SendStream<Bytes>,
}

impl Stream {
    /// Reads so many bytes, or to the end.
    async fn hear(&mut self, count: usize) -> Result<String, h2::Error> {
        let mut heard = Vec::new();
        while heard.len() < count {
            let Some(data) = self.from.data().await else { break };
            let data = data?;
            self.from.flow_control().release_capacity(data.len()).unwrap();
            heard.extend_from_slice(&data);
        }
        Ok(String::from_utf8(heard).unwrap())
    }

    async fn echoes(&mut self) -> bool {
        self.to.send_data(Bytes::from_static(b"ping"), false).is_ok() && self.hear(4).await.is_ok_and(|heard| heard == "ping")
    }
}

/// A client of HTTP/2 that knows what its server offers.
async fn client(stream: DuplexStream) -> SendRequest<Bytes> {
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut sender = sender.ready().await.unwrap();
    for _ in 0..100 {
        if sender.is_extended_connect_protocol_enabled() {
            break;
        }
        sleep(Duration::from_millis(1)).await;
        sender = sender.ready().await.unwrap();
    }
    sender
}

/// Asks for another protocol by an extended CONNECT.
async fn asks(web: &Arc<Proxy>, world: &World, protocol: &str) -> (Response<()>, Stream) {
    let mut sender = client(world.connect(web, vip(1))).await;
    assert!(sender.is_extended_connect_protocol_enabled(), "it is not offered");
    let request = Request::connect("http://api.shop/chat?room=1")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "not for HTTP/2")
        .extension(Protocol::from(protocol))
        .body(())
        .unwrap();
    let (answer, to) = sender.send_request(request, false).unwrap();
    let (head, from) = timeout(Duration::from_secs(60), answer).await.expect("there is an answer").unwrap().into_parts();
    (Response::from_parts(head, ()), Stream { from, to })
}

fn accept(key: &str) -> String {
    let text = format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    STANDARD.encode(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes()))
}

async fn echo(mut stream: DuplexStream) {
    let mut bytes = [0; 64];
    while let Ok(count @ 1..) = stream.read(&mut bytes).await {
        if stream.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}

/// An application of HTTP/1 that answers what `answer` makes of a head, and says everything back after that.
fn http1(world: &World, answer: impl Fn(&str) -> String + Send + Sync + 'static) -> Arc<Mutex<String>> {
    let seen = Arc::new(Mutex::new(String::new()));
    let (kept, answer) = (Arc::clone(&seen), Arc::new(answer));
    world.raw_app(app_at(3), move |mut stream, _| {
        let (kept, answer) = (Arc::clone(&kept), Arc::clone(&answer));
        tokio::spawn(async move {
            let head = until(&mut stream, b"\r\n\r\n").await;
            if head.starts_with("PRI ") {
                // As an application that knows nothing of HTTP/2.
                drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await);
                return;
            }
            let said = answer(&head);
            *kept.lock() = head;
            stream.write_all(said.as_bytes()).await.unwrap();
            echo(stream).await;
        });
    });
    seen
}

fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = head.lines().filter_map(|line| line.split_once(": "));
    lines.find(|(named, _)| named.eq_ignore_ascii_case(name)).map(|(_, value)| value)
}

/// Takes what is asked for, as RFC 6455 has it.
fn switches(head: &str) -> String {
    let key =
        field(head, "sec-websocket-key").map_or_else(String::new, |key| format!("Sec-WebSocket-Accept: {}\r\n", accept(key)));
    let protocol = field(head, "upgrade").unwrap_or("nothing");
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: {protocol}\r\nConnection: Upgrade\r\nSec-WebSocket-Protocol: chat\r\n{key}\r\n"
    )
}

/// What an application of HTTP/2 was asked.
type Asked = Arc<Mutex<Option<(http::request::Parts, Option<String>)>>>;

/// An application of HTTP/2 alone that answers with `status`, and says everything back after that where it is a success.
fn http2(world: &World, extended: bool, status: u16) -> Asked {
    let asked = Asked::default();
    let kept = Arc::clone(&asked);
    world.raw_app(app_at(3), move |stream, _| {
        let kept = Arc::clone(&kept);
        tokio::spawn(async move {
            let mut codec = h2::server::Builder::new();
            if extended {
                codec.enable_connect_protocol();
            }
            let Ok(mut codec) = codec.handshake::<_, Bytes>(stream).await else { return };
            while let Some(Ok((request, mut respond))) = codec.accept().await {
                let (mut head, mut from) = request.into_parts();
                let protocol = head.extensions.remove::<Protocol>().map(|protocol| protocol.as_str().to_owned());
                *kept.lock() = Some((head, protocol));
                let answer = Response::builder().status(status).header("sec-websocket-protocol", "chat").body(()).unwrap();
                let end = !answer.status().is_success();
                let mut to = respond.send_response(answer, end).unwrap();
                if end {
                    continue;
                }
                tokio::spawn(async move {
                    while let Some(Ok(data)) = from.data().await {
                        from.flow_control().release_capacity(data.len()).unwrap();
                        to.send_data(data, false).unwrap();
                    }
                    drop(to.send_data(Bytes::new(), true));
                });
            }
        });
    });
    asked
}

fn without_hops(headers: &HeaderMap) -> bool {
    let gone = ["connection", "upgrade", "sec-websocket-key", "sec-websocket-accept"];
    !headers.keys().any(|name| gone.contains(&name.as_str()) || name.as_str().starts_with("outrigger-"))
}

#[tokio::test(start_paused = true)]
async fn a_websocket_of_http2_is_an_upgrade_to_an_application_of_http1() {
    for protocol in [Some("http"), Some("h2c"), None] {
        for world in worlds(protocol) {
            let web = sidecars(&world);
            let seen = http1(&world, switches);
            let (answer, mut stream) = asks(&web, &world, "websocket").await;
            let seen = seen.lock().clone();
            assert_eq!(answer.status(), 200, "{answer:?} {seen}");
            assert!(without_hops(answer.headers()) && answer.headers()["sec-websocket-protocol"] == "chat", "{answer:?}");
            assert!(seen.starts_with("GET /chat?room=1 HTTP/1.1\r\n"), "{seen}");
            assert_eq!((field(&seen, "host"), field(&seen, "connection")), (Some("api.shop"), Some("Upgrade")), "{seen}");
            assert_eq!(
                (field(&seen, "upgrade"), field(&seen, "sec-websocket-version")),
                (Some("websocket"), Some("13")),
                "{seen}"
            );
            let keys = seen.to_ascii_lowercase().matches("sec-websocket-key").count();
            let key = field(&seen, "sec-websocket-key").and_then(|key| STANDARD.decode(key).ok());
            assert!(keys == 1 && key.is_some_and(|key| key.len() == 16), "{seen}");
            assert!(stream.echoes().await);
            // END_STREAM is the end of one direction, and the application ends the other (RFC 8441 5).
            stream.to.send_data(Bytes::from_static(b"bye"), true).unwrap();
            assert_eq!(stream.hear(100).await.unwrap(), "bye");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_websocket_has_a_key_of_its_own() {
    for world in worlds(Some("http")) {
        let web = sidecars(&world);
        let seen = http1(&world, switches);
        let mut keys = Vec::new();
        for _ in 0..3 {
            let (answer, _stream) = asks(&web, &world, "websocket").await;
            assert_eq!(answer.status(), 200);
            keys.extend(field(&seen.lock(), "sec-websocket-key").map(str::to_owned));
        }
        keys.dedup();
        assert_eq!(keys.len(), 3);
    }
}

#[tokio::test(start_paused = true)]
async fn an_application_that_does_not_know_the_key_is_no_websocket() {
    for said in ["", "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"] {
        for world in worlds(Some("http")) {
            let web = sidecars(&world);
            http1(&world, move |_| {
                format!("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{said}\r\n")
            });
            let (answer, _) = asks(&web, &world, "websocket").await;
            assert_eq!(
                (answer.status(), &answer.headers()["outrigger-reason"]),
                (StatusCode::BAD_GATEWAY, &"upstream_protocol".parse().unwrap())
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_application_that_does_not_take_it_answers_in_http_or_is_answered_for() {
    for (said, status, body) in [("404 Not Found", 404, "no\n"), ("426 Upgrade Required", 426, "no\n"), ("200 OK", 501, "")] {
        for world in worlds(Some("http")) {
            let web = sidecars(&world);
            http1(&world, move |_| format!("HTTP/1.1 {said}\r\nContent-Length: 3\r\n\r\nno\n"));
            let (answer, mut stream) = asks(&web, &world, "websocket").await;
            assert_eq!(answer.status(), status, "{answer:?}");
            let heard = stream.hear(1_000).await.unwrap();
            // A success would say to the client that its tunnel stands.
            match status {
                501 => assert_eq!(answer.headers()["outrigger-reason"], "upgrade_declined", "{heard}"),
                _its_own => assert_eq!(heard, body),
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn between_two_ends_of_http2_it_stays_an_extended_connect() {
    for protocol in [Some("kubernetes.io/h2c"), None] {
        for name in ["websocket", "connect-udp"] {
            for world in worlds(protocol) {
                let web = sidecars(&world);
                let asked = http2(&world, true, 200);
                let (answer, mut stream) = asks(&web, &world, name).await;
                assert_eq!(answer.status(), 200, "{answer:?}");
                assert!(without_hops(answer.headers()) && answer.headers()["sec-websocket-protocol"] == "chat", "{answer:?}");
                let (head, asked) = asked.lock().take().unwrap();
                assert_eq!((head.method.as_str(), asked.as_deref()), ("CONNECT", Some(name)));
                assert_eq!(head.uri, "http://api.shop/chat?room=1");
                assert!(without_hops(&head.headers) || name != "websocket", "{head:?}");
                assert!(stream.echoes().await);
                stream.to.send_data(Bytes::from_static(b"bye"), true).unwrap();
                assert_eq!(stream.hear(100).await.unwrap(), "bye");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_upgrade_is_an_extended_connect_to_an_application_of_http2() {
    for world in worlds(Some("h2c")) {
        let web = sidecars(&world);
        let asked = http2(&world, true, 200);
        let mut stream = world.connect(&web, vip(1));
        let request = "GET /chat HTTP/1.1\r\nHost: api.shop\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\nping";
        stream.write_all(request.as_bytes()).await.unwrap();
        let heard = until(&mut stream, b"\r\n\r\n").await;
        assert!(heard.starts_with("HTTP/1.1 101 Switching Protocols\r\n"), "{heard}");
        // The example of RFC 6455 1.3.
        assert_eq!(field(&heard, "sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{heard}");
        assert_eq!((field(&heard, "upgrade"), field(&heard, "connection")), (Some("WebSocket"), Some("Upgrade")), "{heard}");
        assert_eq!(until(&mut stream, b"ping").await, "ping");
        let (head, asked) = asked.lock().take().unwrap();
        assert_eq!((head.method.as_str(), asked.as_deref(), head.uri.path()), ("CONNECT", Some("websocket"), "/chat"));
        assert!(without_hops(&head.headers), "{head:?}");
        stream.shutdown().await.unwrap();
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn who_hears_http2_alone_and_offers_nothing_has_its_caller_told_so() {
    for world in worlds(Some("h2c")) {
        let web = sidecars(&world);
        let asked = http2(&world, false, 200);
        let begun = tokio::time::Instant::now();
        let (answer, _) = asks(&web, &world, "websocket").await;
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["outrigger-reason"]),
            (501, &"upgrade_declined".parse().unwrap())
        );
        let request =
            "GET /chat HTTP/1.1\r\nHost: api.shop\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\n\r\n";
        let mut stream = world.connect(&web, vip(1));
        stream.write_all(request.as_bytes()).await.unwrap();
        let heard = until(&mut stream, b"\r\n\r\n").await;
        assert!(heard.starts_with("HTTP/1.1 501 ") && heard.contains("outrigger-reason: upgrade_declined\r\n"), "{heard}");
        assert!(asked.lock().is_none());
        assert!(begun.elapsed() < Duration::from_millis(500), "what it offers is known once it spoke: {:?}", begun.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn an_application_of_http2_may_decline() {
    for world in worlds(None) {
        let web = sidecars(&world);
        http2(&world, true, 403);
        let (answer, _) = asks(&web, &world, "websocket").await;
        assert_eq!(answer.status(), 403);
        assert!(!answer.headers().contains_key("outrigger-reason"));
    }
}

#[tokio::test(start_paused = true)]
async fn another_protocol_has_no_key() {
    for world in worlds(Some("http")) {
        let web = sidecars(&world);
        let seen = http1(&world, switches);
        let (answer, mut stream) = asks(&web, &world, "Echo/1").await;
        let seen = seen.lock().clone();
        assert_eq!((answer.status().as_u16(), field(&seen, "upgrade")), (200, Some("Echo/1")), "{seen}");
        assert!(stream.echoes().await);
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_no_protocol_to_ask_for_is_refused() {
    for protocol in ["h2c", "TLS/1.2", "a b", "web,socket", ""] {
        for world in worlds(Some("http")) {
            let web = sidecars(&world);
            let seen = http1(&world, switches);
            let (answer, _) = asks(&web, &world, protocol).await;
            assert_eq!((answer.status().as_u16(), &answer.headers()["outrigger-reason"]), (400, &"bad_request".parse().unwrap()));
            assert_eq!(*seen.lock(), "");
        }
    }
}

fn denial(rules: &Value) -> Value {
    let targets = json!([{ "kind": "Service", "name": "api" }]);
    document("AuthorizationPolicy", "shut", json!({ "targetRefs": targets, "action": "DENY", "rules": rules }))
}

/// A pair whose application is declared so, and its own sidecar.
fn guarded(protocol: &str) -> (World, Arc<Proxy>, Arc<Proxy>) {
    let mut api = pod("api", "api-1", 3);
    api["spec"]["ports"] = json!([{ "name": "port", "port": 80, "appProtocol": protocol }, { "name": "app", "port": 8080, "appProtocol": protocol }]);
    let world = World::new(&[pod("web", "web-1", 2), api, service("api", "api", 1)]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    (world, web, api)
}

#[tokio::test(start_paused = true)]
async fn to_policies_an_extended_connect_is_a_get_of_its_path() {
    for (rule, status) in [
        (json!({ "to": [{ "methods": ["CONNECT"] }] }), 200),
        (json!({ "to": [{ "paths": ["/other"] }] }), 200),
        (json!({ "to": [{ "methods": ["GET"], "paths": ["/chat"] }] }), 403),
    ] {
        let (mut world, web, api) = guarded("http");
        http1(&world, switches);
        world.change(&denial(&json!([rule])), &api, "api-1");
        let (answer, _) = asks(&web, &world, "websocket").await;
        assert_eq!(answer.status(), status, "{rule}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_of_http2_ends_when_its_caller_is_shut_out() {
    let (mut world, web, api) = guarded("http");
    http1(&world, switches);
    let (_, mut stream) = asks(&web, &world, "websocket").await;
    world.change(&denial(&json!([{ "to": [{ "paths": ["/chat"] }] }])), &api, "api-1");
    assert!(stream.echoes().await, "what it asked for is not judged again");
    world.change(&denial(&json!([{}])), &api, "api-1");
    sleep(Duration::from_secs(1)).await;
    assert!(!stream.echoes().await);
    sleep(Duration::from_secs(1)).await;
    told(&api, &["outrigger_requests_total", r#"reason="denied""#, r#"status="101""#]);
}

#[tokio::test(start_paused = true)]
async fn a_silent_tunnel_keeps_the_connection_that_it_is_a_stream_of() {
    for world in worlds(Some("http")) {
        let web = sidecars(&world);
        http1(&world, switches);
        let (_, mut stream) = asks(&web, &world, "websocket").await;
        sleep(Duration::from_secs(100 * 60)).await;
        assert!(stream.echoes().await, "six times the idle time of a connection");
        sleep(Duration::from_secs(5 * 3600)).await;
        assert!(!stream.echoes().await, "beyond that of a tunnel");
    }
}

const CONNECT: &str = "CONNECT Example.com:443 HTTP/1.1\r\nHost: Example.com:443\r\nProxy-Authorization: Basic YQ==\r\n\r\n";

/// A way to the application: through a pair of sidecars, or its own alone.
struct Way {
    world: World,
    web: Arc<Proxy>,
    api: Arc<Proxy>,
    pair: bool,
}

impl Way {
    /// Rules allow what `rules` say; what more is in force stands in `more`.
    fn both(protocol: Option<&str>, rules: Option<&Value>, more: &[Value]) -> [Self; 2] {
        [true, false].map(|pair| {
            let (mut declared, mut app) = (service("api", "api", 1), pod("api", "api-1", 3));
            match protocol {
                Some(protocol) => {
                    declared["spec"]["ports"][0]["appProtocol"] = json!(protocol);
                    app["spec"]["ports"] = json!([{ "name": "app", "port": 8080, "appProtocol": protocol }]);
                }
                None => app["spec"]["ports"] = json!([]),
            }
            let open = document("PeerAuthentication", "open", json!({ "mode": "Permissive" }));
            let mut documents = vec![pod("web", "web-1", 2), app, declared, open];
            documents.extend(rules.map(allowing));
            documents.extend_from_slice(more);
            let world = World::new(&documents);
            let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
            Self { world, web, api, pair }
        })
    }

    /// Ways to an application whose rules ask for tunnels.
    fn asked_for(protocol: Option<&str>) -> [Self; 2] {
        Self::both(protocol, Some(&named()), &[])
    }

    fn open(&self) -> DuplexStream {
        if self.pair { self.world.connect(&self.web, vip(1)) } else { self.world.connect_inbound(&self.api, app_at(3)) }
    }

    /// Asks in HTTP/1.1 and hears the head of the answer.
    async fn asks(&self) -> (String, DuplexStream) {
        let mut stream = self.open();
        stream.write_all(CONNECT.as_bytes()).await.unwrap();
        (until(&mut stream, b"\r\n\r\n").await, stream)
    }

    /// Asks in HTTP/2, with this header.
    async fn asks_in_http2(&self, header: (&str, &str)) -> (http::response::Parts, Stream) {
        let mut sender = client(self.open()).await;
        let request = Request::connect("example.com:443").header(header.0, header.1).body(()).unwrap();
        let (answer, to) = sender.send_request(request, false).unwrap();
        let (head, from) = timeout(Duration::from_secs(60), answer).await.expect("there is an answer").unwrap().into_parts();
        (head, Stream { from, to })
    }
}

fn allowing(rules: &Value) -> Value {
    let targets = json!([{ "kind": "Service", "name": "api" }]);
    document("AuthorizationPolicy", "allowed", json!({ "targetRefs": targets, "action": "ALLOW", "rules": rules }))
}

/// Rules that let everything through and ask for tunnels.
fn named() -> Value {
    json!([{}, { "to": [{ "methods": ["CONNECT"] }] }])
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_through_a_forward_proxy_passes_where_a_rule_names_it() {
    for way in Way::asked_for(Some("http")) {
        // "A client MUST ignore any Content-Length or Transfer-Encoding header fields received in a successful response to
        // CONNECT" (RFC 9110 9.3.6).
        let seen = http1(&way.world, |_| {
            "HTTP/1.1 200 Connection Established\r\nProxy-Agent: a\r\nTransfer-Encoding: gzip\r\nContent-Length: 7\r\nContent-Length: 8\r\n\r\nfirst".to_owned()
        });
        let mut stream = way.open();
        stream.write_all(CONNECT.as_bytes()).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: hidden\r\n\r\n").await.unwrap();
        let heard = until(&mut stream, b"\r\n\r\n").await;
        assert_eq!(heard, "HTTP/1.1 200 Connection Established\r\nProxy-Agent: a\r\n\r\n");
        assert_eq!(until(&mut stream, b"hidden\r\n\r\n").await, "firstGET / HTTP/1.1\r\nHost: hidden\r\n\r\n");
        let seen = seen.lock().clone();
        assert!(
            seen.starts_with("CONNECT example.com:443 HTTP/1.1\r\nHost: Example.com:443\r\nProxy-Authorization: Basic YQ==\r\n"),
            "{seen}"
        );
        stream.shutdown().await.unwrap();
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
        sleep(Duration::from_secs(1)).await;
        told(&way.api, &["outrigger_requests_total", r#"reason="answered""#, r#"status="200""#]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_in_http_1_0_that_names_no_host_has_its_tunnel_where_it_asked_for_it() {
    for way in Way::asked_for(Some("http")) {
        let seen = http1(&way.world, |_| "HTTP/1.0 200 OK\r\n\r\n".to_owned());
        let mut stream = way.open();
        stream.write_all(b"CONNECT example.com:443 HTTP/1.0\r\n\r\n").await.unwrap();
        let heard = until(&mut stream, b"\r\n\r\n").await;
        stream.write_all(b"ping").await.unwrap();
        assert!(heard.starts_with("HTTP/1.0 200 "), "{heard}");
        assert_eq!(until(&mut stream, b"ping").await, "ping");
        assert!(seen.lock().starts_with("CONNECT example.com:443 HTTP/1.0\r\n"), "{}", seen.lock());
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_declines_a_tunnel_answers_as_usual_and_the_connection_closes() {
    // What a client sent ahead into the tunnel would be read as requests.
    for way in Way::asked_for(Some("http")) {
        let seen = http1(&way.world, |_| {
            "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\nContent-Length: 3\r\n\r\nno\n".to_owned()
        });
        let mut stream = way.open();
        stream.write_all(format!("{CONNECT}GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).await.unwrap();
        let heard = until(&mut stream, b"\0 never").await;
        assert!(heard.starts_with("HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n"), "{heard}");
        assert!(heard.contains("onnection: close\r\n") && heard.ends_with("\r\n\r\nno\n"), "{heard}");
        assert!(seen.lock().starts_with("CONNECT ") && !seen.lock().contains("smuggled"), "{}", seen.lock());
    }
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_may_begin_and_end_in_http2() {
    for way in Way::asked_for(Some("http")) {
        let seen = http1(&way.world, |_| "HTTP/1.1 200 OK\r\n\r\n".to_owned());
        let (head, mut stream) = way.asks_in_http2(("x-a", "1")).await;
        let seen = seen.lock().clone();
        assert!(head.status == 200 && seen.starts_with("CONNECT example.com:443 HTTP/1.1\r\n"), "{seen}");
        assert_eq!((field(&seen, "host"), field(&seen, "x-a")), (Some("example.com:443"), Some("1")), "{seen}");
        assert!(stream.echoes().await);
    }
    for way in Way::asked_for(None) {
        let asked = http2(&way.world, false, 200);
        let (answer, mut stream) = way.asks_in_http2(("x-a", "1")).await;
        let (head, protocol) = asked.lock().take().unwrap();
        assert_eq!((answer.status.as_u16(), head.method.as_str(), protocol), (200, "CONNECT", None));
        assert_eq!(head.uri, "example.com:443");
        assert!(stream.echoes().await);
    }
    for way in Way::asked_for(Some("h2c")) {
        let asked = http2(&way.world, false, 200);
        let (heard, mut stream) = way.asks().await;
        assert!(heard.starts_with("HTTP/1.1 200 "), "{heard}");
        stream.write_all(b"ping").await.unwrap();
        assert_eq!(until(&mut stream, b"ping").await, "ping");
        assert_eq!(asked.lock().take().unwrap().0.uri, "example.com:443");
    }
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_to_nowhere_is_refused() {
    for (target, more) in [
        ("example.com", ""),
        ("example.com:", ""),
        ("example.com:0", ""),
        ("example.com:65536", ""),
        (":443", ""),
        ("/a", ""),
        ("*", ""),
        ("http://example.com:443/", ""),
        ("a@example.com:443", ""),
        ("example.com:443", "Content-Length: 3\r\n"),
        ("example.com:443", "Transfer-Encoding: chunked\r\n"),
    ] {
        for way in Way::asked_for(Some("http")) {
            let seen = http1(&way.world, |_| "HTTP/1.1 200 OK\r\n\r\n".to_owned());
            let mut stream = way.open();
            let request = format!("CONNECT {target} HTTP/1.1\r\nHost: example.com:443\r\n{more}\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let heard = until(&mut stream, b"\r\n\r\n").await;
            assert!(seen.lock().is_empty() && heard.starts_with("HTTP/1.1 400 "), "{target} {more} {heard}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_is_refused_where_nobody_asked_for_it_or_something_has_to_see_requests() {
    let at_api = |kind, mut spec: Value| {
        spec["targetRefs"] = json!([{ "kind": "Service", "name": "api" }]);
        document(kind, "more", spec)
    };
    let deny = |to: Value| vec![at_api("AuthorizationPolicy", json!({ "action": "DENY", "rules": [{ "to": [to] }] }))];
    let provider = json!({ "issuer": "https://issuer.example", "audiences": ["shop"], "jwks": { "keys": [{ "kty": "EC", "crv": "P-256",
        "alg": "ES256", "kid": "one", "x": "QvDCCqDE6ouUaDupz3Yxq1xxuq1aTnH432lLd2sh7L4",
        "y": "lgxuwf2G6T17ZgrDF1lpzopbdKkYK40qO5ehAQXb_UI" }] } });
    let tokens = vec![at_api("RequestAuthentication", json!({ "tokens": "IfPresent", "providers": [provider] }))];
    let limit = vec![at_api("TrafficPolicy", json!({ "rateLimit": { "requests": 100, "per": "1h" } }))];
    for (rules, more, status, reason) in [
        (None, vec![], 501, "connect_refused"),
        (None, deny(json!({ "ports": [9] })), 501, "connect_refused"),
        (None, deny(json!({ "methods": ["DELETE"] })), 403, "denied"),
        (Some(json!([{}])), vec![], 403, "denied"),
        (Some(json!([{ "to": [{ "methods": ["*"] }] }])), vec![], 403, "denied"),
        (Some(json!([{ "to": [{ "methods": ["CONNECT"], "paths": ["/*"] }] }])), vec![], 403, "denied"),
        (Some(named()), deny(json!({ "methods": ["CONNECT"] })), 403, "denied"),
        (Some(named()), deny(json!({ "paths": ["/admin"] })), 403, "denied"),
        (Some(named()), tokens, 403, "connect_refused"),
        (Some(named()), limit, 403, "connect_refused"),
        (Some(named()), deny(json!({ "ports": [9] })), 200, ""),
    ] {
        for way in Way::both(Some("http"), rules.as_ref(), &more) {
            // As an application does that answers every method.
            let seen = http1(&way.world, |_| "HTTP/1.1 200 OK\r\n\r\n".to_owned());
            let (heard, _stream) = way.asks().await;
            assert!(heard.starts_with(&format!("HTTP/1.1 {status} ")), "{rules:?} {more:?} {heard}");
            assert_eq!(field(&heard, "outrigger-reason").unwrap_or_default(), reason, "{rules:?} {more:?}");
            // What looks like a call of gRPC is refused by a status too: a success would be the tunnel.
            let (head, _stream) = way.asks_in_http2(("content-type", "application/grpc")).await;
            assert_eq!(head.status, status, "{rules:?} {more:?}");
            assert_eq!(seen.lock().is_empty(), status != 200, "{rules:?} {more:?}");
            if status != 200 {
                sleep(Duration::from_secs(1)).await;
                told(&way.api, &["outrigger_refusals_total", &format!(r#"reason="{reason}""#)]);
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_to_whom_no_sidecar_decides_for_is_refused_by_its_callers() {
    let [_pair, world] = worlds(Some("http"));
    let web = sidecars(&world);
    let seen = http1(&world, |_| "HTTP/1.1 200 OK\r\n\r\n".to_owned());
    for to in [vip(1), app_at(3)] {
        let mut stream = world.connect(&web, to);
        stream.write_all(CONNECT.as_bytes()).await.unwrap();
        let heard = until(&mut stream, b"\n\0 never").await;
        assert!(heard.starts_with("HTTP/1.1 501 ") && heard.contains("outrigger-reason: connect_refused\r\n"), "{heard}");
        assert!(heard.contains("CONNECT goes only to a workload with a sidecar"), "{heard}");
    }
    assert_eq!(*seen.lock(), "");
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_ends_when_what_asked_for_it_is_gone() {
    let targets = json!([{ "kind": "Service", "name": "api" }]);
    for (change, reason) in [
        (denial(&json!([{}])), "denied"),
        (allowing(&json!([{}])), "denied"),
        (
            document("TrafficPolicy", "more", json!({ "targetRefs": targets, "rateLimit": { "requests": 9, "per": "1h" } })),
            "connect_refused",
        ),
    ] {
        for mut way in Way::asked_for(Some("http")) {
            http1(&way.world, |_| "HTTP/1.1 200 OK\r\n\r\n".to_owned());
            let (_head, mut stream) = way.asks().await;
            stream.write_all(b"ping").await.unwrap();
            assert_eq!(until(&mut stream, b"ping").await, "ping");
            way.world.change(&change, &way.api, "api-1");
            assert_eq!(until(&mut stream, b"\0 never").await, "");
            sleep(Duration::from_secs(1)).await;
            told(&way.api, &["outrigger_requests_total", &format!(r#"reason="{reason}""#), r#"status="200""#]);
        }
    }
}
