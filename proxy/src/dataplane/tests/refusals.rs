//! What is refused before there is a request: said in our words, told with both ends, and closed so that it is read.

use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::Instant;

use super::world::{World, app_at, ask_h2, document, pod, service, text, told, vip};
use crate::dataplane::Proxy;

fn declared() -> Value {
    let mut api = service("api", "api", 1);
    api["spec"]["ports"][0]["appProtocol"] = json!("http");
    api
}

fn pair() -> (World, Arc<Proxy>, Arc<Proxy>) {
    let open = document("PeerAuthentication", "open", json!({ "mode": "Permissive" }));
    let world = World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), declared(), open]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |request| text(request.body().len().to_string()));
    (world, web, api)
}

/// A client's connection to `api`: the one of the application in `web`, or one from outside of the mesh.
fn opened(world: &World, proxy: &Arc<Proxy>, direction: &str) -> DuplexStream {
    if direction == "outbound" { world.connect(proxy, vip(1)) } else { world.connect_inbound(proxy, app_at(3)) }
}

/// Everything that a client hears until the end.
async fn rest(stream: &mut DuplexStream) -> String {
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).await.unwrap();
    String::from_utf8(heard).unwrap()
}

fn check_answer(heard: &str, status: &str, reason: &str, words: &str) {
    assert!(heard.starts_with(&format!("HTTP/1.1 {status}")), "{heard}");
    assert!(heard.contains(&format!("\r\noutrigger-reason: {reason}\r\n")), "{heard}");
    assert!(heard.contains("\r\nconnection: close\r\n") && heard.contains(words), "{heard}");
    assert_eq!(heard.matches("HTTP/1.1").count(), 1, "one answer: {heard}");
}

#[tokio::test(start_paused = true)]
async fn every_refusal_of_a_head_says_which_limit_decided() {
    let many = (0..300).map(|index| format!("x-{index}: 1\r\n")).collect::<String>();
    let cases = [
        (format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "a".repeat(80 * 1024)), "414", "uri_too_long", "65534 bytes"),
        (
            format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "a".repeat(80 * 1024)),
            "431",
            "headers_too_large",
            "larger than 65536 bytes",
        ),
        (format!("GET / HTTP/1.1\r\nhost: a\r\n{many}\r\n"), "431", "headers_too_large", "more than 256 headers"),
        (
            "GET / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab".into(),
            "400",
            "bad_request",
            "Content-Length",
        ),
        ("GET / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n".into(), "400", "bad_request", "Transfer-Encoding"),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 18446744073709551615\r\n\r\nab".into(),
            "400",
            "bad_request",
            "the Content-Length is larger than any body",
        ),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 18446744073709551616\r\n\r\nab".into(),
            "400",
            "bad_request",
            "the Content-Length is not valid",
        ),
        ("GET / HTTP/1.1\r\nhost : a\r\n\r\n".into(), "400", "bad_request", "header"),
        ("GET / HTTP/7.1\r\n\r\n".into(), "400", "bad_request", "version"),
        ("\u{0}\u{1}garbage\r\n\r\n".into(), "400", "bad_request", "method"),
    ];
    for (head, status, reason, words) in cases {
        let (world, web, api) = pair();
        for (proxy, direction) in [(&web, "outbound"), (&api, "inbound")] {
            let mut stream = opened(&world, proxy, direction);
            stream.write_all(head.as_bytes()).await.unwrap();
            check_answer(&rest(&mut stream).await, status, reason, words);
            let direction = format!("direction=\"{direction}\"");
            let reason = format!("reason=\"{reason}\"");
            told(proxy, &["outrigger_refusals_total", &direction, &reason, "destination_service=\"shop/api\""]);
            let status = format!("status=\"{status}\"");
            told(proxy, &["outrigger_requests_total", &direction, &reason, &status, "destination_service=\"shop/api\""]);
        }
        assert!(world.dialled().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_bad_head_after_good_requests_is_refused_and_their_answers_stay() {
    let (world, web, _api) = pair();
    let mut stream = world.connect(&web, vip(1));
    let ok = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc";
    stream.write_all(format!("{ok}{ok}GET / HTTP/1.1\r\nbad header: 1\r\n\r\n").as_bytes()).await.unwrap();
    let heard = rest(&mut stream).await;
    assert_eq!((heard.matches("HTTP/1.1 200").count(), heard.matches("HTTP/1.1 400").count()), (2, 1), "{heard}");
    assert!(heard.contains("outrigger-reason: bad_request"), "{heard}");
}

#[tokio::test(start_paused = true)]
async fn a_large_head_of_http_2_is_refused_in_our_words() {
    let (world, web, _api) = pair();
    let request = |value: usize, count: usize| {
        let mut request = Request::get("http://api.shop/");
        for index in 0..count {
            request = request.header(format!("x-{index}"), "a".repeat(value));
        }
        request.body(Full::default()).unwrap()
    };
    for (value, count, words) in [(80 * 1024, 1, "larger than 65536 bytes"), (1, 300, "more than 256 headers")] {
        let heard = ask_h2(world.connect(&web, vip(1)), request(value, count)).await;
        assert_eq!((heard.status, heard.reason()), (431, "headers_too_large"), "{heard:?}");
        assert!(heard.body.contains(words), "{}", heard.body);
    }
    told(&web, &["outrigger_refusals_total", "outbound", "headers_too_large", "shop/api"]);
}

#[tokio::test(start_paused = true)]
async fn what_breaks_the_rules_of_http_2_is_told() {
    let (world, web, _api) = pair();
    let mut stream = world.connect(&web, vip(1));
    // A DATA frame on stream 0.
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x01\0\0\0\0\0\0a").await.unwrap();
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).await.unwrap();
    told(&web, &["outrigger_refusals_total", "outbound", "bad_request", "http2", "shop/api"]);
}

#[tokio::test(start_paused = true)]
async fn a_head_that_does_not_end_is_given_up_after_ten_seconds() {
    let (world, web, api) = pair();
    for (proxy, direction) in [(&web, "outbound"), (&api, "inbound")] {
        let mut stream = opened(&world, proxy, direction);
        // One request goes well, and the connection may be idle for long after it.
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut answer = vec![0; 1024];
        let read = stream.read(&mut answer).await.unwrap();
        assert!(answer[..read].starts_with(b"HTTP/1.1 200"));
        tokio::time::sleep(Duration::from_secs(14 * 60)).await;
        let begin = Instant::now();
        let (mut hear, mut say) = tokio::io::split(stream);
        let trickle = tokio::spawn(async move {
            for byte in b"GET / HTTP/1.1\r\nx: ".iter().chain(std::iter::repeat(&b'a')) {
                if say.write_all(&[*byte]).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        });
        let mut heard = String::new();
        hear.read_to_string(&mut heard).await.unwrap();
        trickle.abort();
        check_answer(&heard, "408", "request_timeout", "in time");
        assert!(begin.elapsed() >= Duration::from_secs(10) && begin.elapsed() < Duration::from_secs(14), "{:?}", begin.elapsed());
        told(proxy, &["outrigger_refusals_total", direction, "request_timeout", "shop/api"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_client_of_a_declared_port_is_closed_after_ten_seconds() {
    let (world, web, api) = pair();
    for (proxy, direction) in [(&web, "outbound"), (&api, "inbound")] {
        let mut stream = opened(&world, proxy, direction);
        let begin = Instant::now();
        assert_eq!(rest(&mut stream).await, "");
        assert_eq!(begin.elapsed().as_secs(), 10);
        told(proxy, &["outrigger_refusals_total", direction, "request_timeout", "shop/api"]);
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_closed_after_a_quarter_of_an_hour_and_nobody_is_refused() {
    let (world, web, _api) = pair();
    let mut stream = world.connect(&web, vip(1));
    for _ in 0..2 {
        // Empty lines are no head that began.
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n\r\n").await.unwrap();
        let mut answer = vec![0; 1024];
        let read = stream.read(&mut answer).await.unwrap();
        assert!(answer[..read].starts_with(b"HTTP/1.1 200"));
        tokio::time::sleep(Duration::from_secs(14 * 60)).await;
    }
    let begin = Instant::now();
    assert_eq!(rest(&mut stream).await, "");
    assert!(begin.elapsed() <= Duration::from_secs(61), "{:?}", begin.elapsed());
    assert!(!web.telemetry.metrics.render().contains("request_timeout"));
}

#[tokio::test(start_paused = true)]
async fn a_slow_upload_and_a_slow_answer_have_no_clock_of_a_head() {
    let (world, web, _api) = pair();
    world.slow_app(app_at(3), |request| async move {
        tokio::time::sleep(Duration::from_secs(30)).await;
        Response::new(Full::from(request.body().len().to_string()))
    });
    let mut stream = world.connect(&web, vip(1));
    stream.write_all(b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 20\r\n\r\n").await.unwrap();
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_secs(3)).await;
        stream.write_all(b"a").await.unwrap();
    }
    let heard = rest(&mut stream).await;
    assert!(heard.starts_with("HTTP/1.1 200") && heard.ends_with("20"), "{heard}");
}

#[tokio::test(start_paused = true)]
async fn trailers_over_a_limit_are_refused_by_its_name() {
    let (world, web, api) = pair();
    for (direction, proxy) in [("outbound", &web), ("inbound", &api)] {
        for (trailers, limit) in
            [(format!("x: {}\r\n", "a".repeat(70_000)), "(headerBytes)"), ("x: a\r\n".repeat(300), "(headerCount)")]
        {
            let mut stream = opened(&world, proxy, direction);
            let head = "POST / HTTP/1.1\r\nhost: api.shop\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n";
            stream.write_all(format!("{head}{trailers}\r\n").as_bytes()).await.unwrap();
            let heard = rest(&mut stream).await;
            check_answer(&heard, "400", "bad_request", limit);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_none_is_the_callers_fault_and_ejects_nobody() {
    let (world, web, api) = pair();
    for (direction, proxy) in [("outbound", &web), ("inbound", &api)] {
        for chunks in [
            "ZZ\r\n",
            "ffffffffffffffffff\r\n",
            "FFFFFFFFFFFFFFFF\r\n",
            "8000000000000000\r\nabc",
            "1\r\na\r\n8000000000000000;a\r\n",
            "1\nx\n0\n\n",
            "1\r\nxx\r\n0\r\n\r\n",
        ] {
            for _ in 0..12 {
                let mut stream = opened(&world, proxy, direction);
                let request = format!("POST / HTTP/1.1\r\nhost: api.shop\r\ntransfer-encoding: chunked\r\n\r\n{chunks}");
                stream.write_all(request.as_bytes()).await.unwrap();
                if !chunks.contains("000000") && !chunks.contains("FFFFFF") {
                    stream.shutdown().await.unwrap();
                }
                let heard = rest(&mut stream).await;
                assert!(heard.starts_with("HTTP/1.1 400"), "{direction} {chunks:?}: {heard}");
                assert!(heard.contains("\r\noutrigger-reason: bad_request\r\n"), "{direction} {chunks:?}: {heard}");
            }
        }
    }
    assert!(!web.telemetry.metrics.render().lines().any(|line| line.starts_with("outrigger_ejections_total{")));
}

#[tokio::test(start_paused = true)]
async fn a_target_that_is_neither_path_nor_url_is_refused() {
    let (world, web, _api) = pair();
    for target in ["secret", "a:80"] {
        let mut stream = opened(&world, &web, "outbound");
        let request = format!("GET {target} HTTP/1.1\r\nhost: api.shop\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let heard = rest(&mut stream).await;
        assert!(heard.starts_with("HTTP/1.1 400") && heard.contains("outrigger-reason: bad_request"), "{heard}");
    }
}
