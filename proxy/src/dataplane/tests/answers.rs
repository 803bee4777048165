//! Answers that are not what HTTP says an answer is: resolved as the RFCs say, or refused with a reason, and never cut short
//! without a word.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::{sleep, timeout};

use super::attacks::{DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, SETTINGS, frame, frames, open_pair};
use super::fidelity::{exchange, hop, pair, sidecars, until};
use super::world::{World, app_at, ask_h2, document, get, over_tcp, pod, service, told, vip};
use crate::dataplane::Proxy;

const GET: &str = "GET / HTTP/1.1\r\nHost: api.shop\r\nConnection: keep-alive\r\n\r\n";

/// What a client hears of an answer, by a sidecar alone and by a pair.
async fn check(request: &str, answer: &'static str, heard_end: &str, expected: &str) {
    for world in [hop(), pair()] {
        let (_seen, heard) = exchange(&world, request, "\r\n\r\n", answer, heard_end).await;
        assert!(heard.to_ascii_lowercase().starts_with(&expected.to_ascii_lowercase()), "{answer:?} is heard as {heard:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_transfer_encoding_goes_before_a_content_length() {
    for answer in [
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 30\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ] {
        let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
        check(GET, answer, "0\r\n\r\n", chunked).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_length_that_is_said_several_times_is_said_once_and_several_lengths_are_refused() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    ] {
        check(GET, answer, "hello", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await;
    }
    check(GET, "HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nhello", "not valid HTTP\n", "HTTP/1.1 502 ").await;
}

#[tokio::test(start_paused = true)]
async fn what_is_no_length_is_refused_where_there_is_no_content_too() {
    let head = "HEAD / HTTP/1.1\r\nHost: api.shop\r\n\r\n";
    for length in ["+5", "xyz", "5 5", "-1", "0x5", ""] {
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").leak();
        check(head, answer, "\r\n\r\n", "HTTP/1.1 502 ").await;
    }
    check(head, "HTTP/1.1 200 OK\r\nContent-Length: 05\r\n\r\n", "\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 05\r\n\r\n")
        .await;
}

/// "A server that sends a 426 response MUST send an Upgrade header field in the response" (RFC 9110 15.5.22).
#[tokio::test(start_paused = true)]
async fn a_server_that_demands_another_protocol_says_which() {
    for lines in ["Upgrade: HTTP/3.0, websocket\r\n", "Upgrade: HTTP/3.0\r\nUpgrade: websocket\r\n"] {
        let answer = format!("HTTP/1.1 426 Upgrade Required\r\nConnection: Upgrade\r\n{lines}Content-Length: 0\r\n\r\n").leak();
        for world in [hop(), pair()] {
            let (_seen, heard) = exchange(&world, GET, "\r\n\r\n", answer, "\r\n\r\n").await;
            let heard = heard.to_ascii_lowercase();
            assert!(heard.starts_with("http/1.1 426 "), "{heard}");
            assert!(
                heard.contains("\r\nupgrade: http/3.0, websocket\r\n") && heard.contains("\r\nconnection: upgrade\r\n"),
                "{heard}"
            );
            assert!(!heard.contains("outrigger"), "{heard}");
        }
    }
    // There is no such header in HTTP/2 (RFC 9113 8.2.2).
    for world in [hop(), pair()] {
        let web = sidecars(&world);
        world.app(app_at(3), |_| {
            let builder = Response::builder().status(426).header("upgrade", "websocket").header("connection", "upgrade");
            builder.body(Full::default()).unwrap()
        });
        let request = Request::get("http://api.shop/").body(Full::default()).unwrap();
        let heard = ask_h2(world.connect(&web, vip(1)), request).await;
        assert_eq!((heard.status, heard.headers.get("upgrade"), heard.headers.get("outrigger-upgrade")), (426, None, None));
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_without_content_has_no_length_for_callers_of_either_version() {
    check(
        GET,
        "HTTP/1.1 204 No Content\r\nContent-Length: 3\r\nA: b\r\n\r\n",
        "\r\n\r\n",
        "HTTP/1.1 204 No Content\r\na: b\r\n\r\n",
    )
    .await;
    for world in [hop(), pair()] {
        let web = sidecars(&world);
        world.app(app_at(3), |_| Response::builder().status(204).header("content-length", "3").body(Full::default()).unwrap());
        let request = Request::get("http://api.shop/").body(Full::default()).unwrap();
        let heard = ask_h2(world.connect(&web, vip(1)), request).await;
        assert_eq!((heard.status, heard.headers.get("content-length")), (204, None));
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_is_switched_to_what_was_not_asked_for() {
    let switched = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n";
    check(GET, switched, "not valid HTTP\n", "HTTP/1.1 502 Bad Gateway\r\n").await;
    let asks = |offer: &str| format!("GET / HTTP/1.1\r\nHost: api.shop\r\nConnection: upgrade\r\nUpgrade: {offer}\r\n\r\n");
    check(&asks("websocket"), switched, "not valid HTTP\n", "HTTP/1.1 502 Bad Gateway\r\n").await;
    let silent = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n\r\n";
    check(&asks("websocket"), silent, "not valid HTTP\n", "HTTP/1.1 502 Bad Gateway\r\n").await;
    for (offer, offered) in [("h2c, WebSocket, foo", "WebSocket"), ("TLS/1.2, h2c/1, foo/2", "foo/2")] {
        let world = pair();
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
        let (seen, _heard) = exchange(&world, &asks(offer), "\r\n\r\n", answer, "\r\n\r\n").await;
        assert!(seen.to_ascii_lowercase().contains(&format!("upgrade: {}\r\n", offered.to_ascii_lowercase())), "{seen:?}");
    }
    for offer in ["h2c", "h2c,", "h2c/1", "TLS/1.0, h2c", ", ,"] {
        let world = pair();
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
        let (seen, _heard) = exchange(&world, &asks(offer), "\r\n\r\n", answer, "\r\n\r\n").await;
        assert!(!seen.to_ascii_lowercase().contains("upgrade"), "{seen:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_an_application_says_that_it_did_not_process_is_tried_again_through_the_pair_too() {
    let mut api = service("api", "api", 1);
    api["spec"]["ports"][0]["appProtocol"] = json!("kubernetes.io/h2c");
    let world = World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), api]);
    let web = sidecars(&world);
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    world.raw_app(app_at(3), move |stream, _| {
        let asked = Arc::clone(&counted);
        tokio::spawn(async move {
            let mut codec = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((_request, mut respond))) = codec.accept().await {
                if asked.fetch_add(1, Ordering::Relaxed) == 0 {
                    respond.send_reset(h2::Reason::REFUSED_STREAM);
                } else {
                    respond.send_response(Response::new(()), true).unwrap();
                }
            }
        });
    });
    let request = Request::post("http://api.shop/").body(Full::from("once")).unwrap();
    let heard = ask_h2(world.connect(&web, vip(1)), request).await;
    assert_eq!((heard.status, asked.load(Ordering::Relaxed)), (200, 2));
}

/// A pair whose application speaks HTTP/2, and the same without a sidecar at the application.
pub(super) fn of_http2() -> [World; 2] {
    let mut api = service("api", "api", 1);
    api["spec"]["ports"][0]["appProtocol"] = json!("kubernetes.io/h2c");
    let mut bare = pod("api", "api-1", 3);
    bare["spec"]["transport"] = json!("Plaintext");
    let web = pod("web", "web-1", 2);
    [World::new(&[web.clone(), pod("api", "api-1", 3), api.clone()]), World::new(&[web, bare, api])]
}

/// "Streams with higher identifiers ... are not or will not be processed" (RFC 9113 6.8), whatever the error is.
#[tokio::test(start_paused = true)]
async fn what_a_goodbye_with_an_error_leaves_out_is_tried_again_and_nothing_else_is() {
    for world in of_http2() {
        let web = sidecars(&world);
        let opened = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&opened);
        world.raw_app(app_at(3), move |mut stream, _| {
            let first = counted.fetch_add(1, Ordering::Relaxed) == 0;
            tokio::spawn(async move {
                if !first {
                    let mut codec = h2::server::handshake(stream).await.unwrap();
                    while let Some(Ok((_request, mut respond))) = codec.accept().await {
                        respond.send_response(Response::new(()), true).unwrap();
                    }
                    return;
                }
                stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
                let mut heard = Vec::new();
                let asked = |heard: &[u8]| {
                    frames(heard.get(24..).unwrap_or_default()).iter().filter(|(kind, _)| *kind == HEADERS).count()
                };
                while asked(&heard) < 2 {
                    assert_ne!(stream.read_buf(&mut heard).await.unwrap(), 0);
                }
                // The first stream was looked at; INTERNAL_ERROR.
                stream.write_all(&frame(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 2])).await.unwrap();
                sleep(Duration::from_millis(50)).await;
            });
        });
        let ask = || {
            let request = Request::post("http://api.shop/").body(Full::default()).unwrap();
            tokio::spawn(ask_h2(world.connect(&web, vip(1)), request))
        };
        let one = ask();
        sleep(Duration::from_millis(10)).await;
        let other = ask();
        let (one, other) = (one.await.unwrap(), other.await.unwrap());
        assert_eq!((one.status, one.reason(), other.status), (502, "upstream_reset", 200));
        assert_eq!(opened.load(Ordering::Relaxed), 2);
    }
}

/// "A proxy MUST remove any such whitespace from a response message before forwarding" (RFC 9112 5.1).
#[tokio::test(start_paused = true)]
async fn a_blank_behind_a_name_in_an_answer_goes() {
    for (answer, end, expected) in [
        (
            "HTTP/1.1 200 OK\r\nX-A : 1\r\nContent-Length \t: 2\r\n\r\nok",
            "\r\n\r\nok",
            "HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: 2\r\n\r\nok",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding : chunked\r\nX-B: 1\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            "0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nX-B: 1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        ),
    ] {
        for world in [hop(), pair()] {
            let (_seen, heard) = exchange(&world, GET, "\r\n\r\n", answer, end).await;
            assert_eq!(heard, expected);
        }
    }
    check(GET, "HTTP/1.1 200 OK\r\nX A: 1\r\nContent-Length: 2\r\n\r\nok", "not valid HTTP\n", "HTTP/1.1 502 ").await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_may_have_as_many_headers_as_is_configured_and_the_refusal_names_the_limit() {
    let many = |count: usize| -> &'static str {
        format!("HTTP/1.1 200 OK\r\n{}content-length: 2\r\n\r\nok", "x: 1\r\n".repeat(count - 1)).leak()
    };
    let long = |length: usize| -> &'static str {
        format!("HTTP/1.1 200 OK\r\nx: {}\r\ncontent-length: 2\r\n\r\nok", "a".repeat(length)).leak()
    };
    check(GET, many(100), "\r\n\r\nok", "HTTP/1.1 200 OK\r\n").await;
    for (limits, answer, words) in [
        (json!({}), many(101), Some("more than 100 headers")),
        (json!({}), long(80 << 10), Some("larger than 73728 bytes")),
        (json!({ "headerCount": 300 }), many(300), None),
        (json!({ "headerCount": 300 }), many(301), Some("more than 300 headers")),
        (json!({ "headerBytes": 200 << 10 }), long(150 << 10), None),
        (json!({ "headerBytes": 200 << 10 }), long(210 << 10), Some("larger than 204800 bytes")),
    ] {
        let (world, ..) = open_pair("http", &limits);
        let end = if words.is_some() { " bytes (headerBytes)\n" } else { "\r\n\r\nok" };
        let (_seen, heard) = exchange(&world, GET, "\r\n\r\n", answer, end).await;
        let begins = heard.get(..heard.len().min(300)).unwrap();
        match words {
            None => assert!(heard.starts_with("HTTP/1.1 200 OK\r\n"), "{limits} {begins}"),
            Some(words) => {
                assert!(heard.starts_with("HTTP/1.1 502 "), "{limits} {begins}");
                assert!(heard.contains("outrigger-reason: upstream_protocol\r\n") && heard.contains(words), "{limits} {heard}");
            }
        }
    }
}

/// An application that speaks HTTP/1, keeps its connections, and answers `/N` with a header of N bytes.
async fn large_heads(mut stream: DuplexStream) {
    loop {
        let head = until(&mut stream, b"\r\n\r\n").await;
        let Some(length) = head.split([' ', '/']).nth(2).and_then(|length| length.parse().ok()) else { return };
        let answer = format!("HTTP/1.1 200 OK\r\nx: {}\r\ncontent-length: 2\r\n\r\nok", "a".repeat(length));
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// The same in HTTP/2.
async fn large_heads_http2(stream: DuplexStream) {
    let mut codec = h2::server::Builder::new().max_header_list_size(1 << 20).handshake::<_, Bytes>(stream).await.unwrap();
    while let Some(Ok((request, mut respond))) = codec.accept().await {
        let length = request.uri().path().trim_start_matches('/').parse().unwrap();
        let answer = Response::builder().header("x", "a".repeat(length)).body(()).unwrap();
        respond.send_response(answer, true).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_limit_on_answers_holds_for_the_next_one_whatever_stands_already() {
    for (protocol, fits, beyond, named) in
        [("http", 60 << 10, 150 << 10, "73728 bytes"), ("http2", 130 << 10, 200 << 10, "147456 bytes")]
    {
        let (mut world, web, api) = open_pair(protocol, &json!({}));
        world.raw_app(app_at(3), move |stream, _| {
            if protocol == "http" {
                tokio::spawn(large_heads(stream));
            } else {
                tokio::spawn(large_heads_http2(stream));
            }
        });
        let ask = async |world: &World, length: usize| {
            // A caller that takes heads of any size.
            let builder = hyper::client::conn::http1::Builder::new().max_buf_size(4 << 20).max_header_size(4 << 20).to_owned();
            let (mut sender, connection) = builder.handshake(TokioIo::new(world.connect(&web, vip(1)))).await.unwrap();
            tokio::spawn(connection);
            let (parts, body) = sender.send_request(get(&format!("/{length}"))).await.unwrap().into_parts();
            let reason = parts.headers.get("outrigger-reason").map_or("", |reason| reason.to_str().unwrap()).to_owned();
            let body = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
            (parts.status.as_u16(), reason, body)
        };
        assert_eq!(ask(&world, fits).await.0, 200, "{protocol}");
        let (status, reason, text) = ask(&world, beyond).await;
        assert_eq!((status, &*reason), (502, "upstream_protocol"), "{protocol} {text}");
        assert!(text.contains(named) && text.contains("headerBytes"), "{protocol} {text}");
        told(&api, &["outrigger_refusals_total", "inbound", "upstream_protocol", "shop/api"]);
        assert_eq!(ask(&world, fits).await.0, 200, "{protocol}");
        for (proxy, name) in [(&web, "web-1"), (&api, "api-1")] {
            world.change(&document("Mesh", "mesh", json!({ "limits": { "headerBytes": 400 << 10 } })), proxy, name);
        }
        assert_eq!(ask(&world, beyond).await.0, 200, "{protocol}: it was raised");
        for (proxy, name) in [(&web, "web-1"), (&api, "api-1")] {
            world.change(&document("Mesh", "mesh", json!({})), proxy, name);
        }
        assert_eq!(ask(&world, beyond).await.0, 502, "{protocol}: it was lowered");
        assert_eq!(world.dialled().len(), 2, "{protocol}: one link for the lower limit, and one that serves both");
    }
}

/// A field of HPACK that is written out and goes into no table.
fn field(name: &str, value: &str) -> Vec<u8> {
    let length = |text: &str| u8::try_from(text.len()).unwrap();
    [&[0, length(name)], name.as_bytes(), &[length(value)], value.as_bytes()].concat()
}

/// An application that answers each connection's first request with these frames behind its settings.
fn answers_with(world: &World, answer: &[u8]) {
    let answer = answer.to_vec();
    world.raw_app(app_at(3), move |mut stream, _| {
        let answer = answer.clone();
        tokio::spawn(async move {
            stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
            let mut heard = Vec::new();
            while !frames(heard.get(24..).unwrap_or_default()).iter().any(|(kind, _)| *kind == HEADERS) {
                assert_ne!(stream.read_buf(&mut heard).await.unwrap(), 0);
            }
            stream.write_all(&answer).await.unwrap();
            while matches!(stream.read(&mut [0; 4_096]).await, Ok(1..)) {}
        });
    });
}

/// `:status 200` in HPACK.
const STATUS_200: &[u8] = b"\x88";

#[tokio::test(start_paused = true)]
async fn an_answer_that_breaks_the_rules_of_http_2_is_told_by_that() {
    let status = |fields: &[Vec<u8>]| [STATUS_200.to_vec(), fields.concat()].concat();
    for (name, block) in [
        ("no status", field("x", "1")),
        ("a status twice", status(&[STATUS_200.to_vec()])),
        ("a status that is none", field(":status", "abc")),
        ("a status below all", field(":status", "099")),
        ("a status behind a header", [field("x", "1"), STATUS_200.to_vec()].concat()),
        ("a pseudo-header that nobody knows", status(&[field(":hidden", "1")])),
        ("a capital", status(&[field("X", "1")])),
        ("a line break in a value", status(&[field("x", "a\r\nb")])),
        ("a header of connections", status(&[field("connection", "close")])),
        ("a transfer coding", status(&[field("transfer-encoding", "chunked")])),
        ("several lengths", status(&[field("content-length", "1"), field("content-length", "2")])),
        ("a length that is none", status(&[field("content-length", "+1")])),
        ("a length without a body", status(&[field("content-length", "5")])),
    ] {
        let [pair, hop] = of_http2();
        let (api, bare) = (pair.sidecar("api", "api-1", 3), hop.sidecar("web", "web-1", 2));
        let web = pair.sidecar("web", "web-1", 2);
        for (world, web, sees, direction) in [(&pair, &web, &api, "inbound"), (&hop, &bare, &bare, "outbound")] {
            answers_with(world, &frame(HEADERS, END_HEADERS | END_STREAM, 1, &block));
            let heard = ask_h2(world.connect(web, vip(1)), get("http://api.shop/")).await;
            assert_eq!((heard.status, heard.reason()), (502, "upstream_protocol"), "{name}: {}", heard.body);
            told(sees, &["outrigger_refusals_total", direction, "reason=\"upstream_protocol\"", "shop/api"]);
        }
    }
}

/// A caller in HTTP/2: what it hears of a body, and whether that ends as a body does.
async fn body_of(world: &World, web: &Arc<Proxy>) -> (u16, String, bool) {
    let (sender, connection) = h2::client::handshake(world.connect(web, vip(1))).await.unwrap();
    tokio::spawn(connection);
    let request = Request::get("http://api.shop/").body(()).unwrap();
    let (answer, _) = sender.ready().await.unwrap().send_request(request, true).unwrap();
    let (parts, mut body) = answer.await.unwrap().into_parts();
    let mut heard = Vec::new();
    let whole = loop {
        match body.data().await {
            Some(Ok(data)) => heard.extend_from_slice(&data),
            Some(Err(_reset)) => break false,
            None => break true,
        }
    };
    (parts.status.as_u16(), String::from_utf8(heard).unwrap(), whole)
}

#[tokio::test(start_paused = true)]
async fn a_body_of_another_length_than_its_head_says_is_told_as_no_valid_http() {
    let head = frame(HEADERS, END_HEADERS, 1, &[STATUS_200.to_vec(), field("content-length", "5")].concat());
    for body in [frame(DATA, END_STREAM, 1, b"abc"), [frame(DATA, 0, 1, b"abc"), frame(DATA, END_STREAM, 1, b"defg")].concat()] {
        let [pair, hop] = of_http2();
        let (api, bare) = (pair.sidecar("api", "api-1", 3), hop.sidecar("web", "web-1", 2));
        let web = pair.sidecar("web", "web-1", 2);
        for (world, web, sees, direction) in [(&pair, &web, &api, "inbound"), (&hop, &bare, &bare, "outbound")] {
            answers_with(world, &[head.clone(), body.clone()].concat());
            let (status, _heard, whole) = body_of(world, web).await;
            assert_eq!((status, whole), (200, false));
            told(sees, &["outrigger_requests_total", direction, "reason=\"upstream_protocol\"", "status=\"200\""]);
        }
    }
}

/// Whoever breaks off, what came before it is heard, and nobody takes it for the whole.
#[tokio::test(start_paused = true)]
async fn an_answer_that_breaks_off_is_heard_so_far_and_never_taken_for_a_whole_one() {
    const CHUNKED: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    for (answer, reason) in [
        (format!("{CHUNKED}5\r\nhello\r\n"), "upstream_reset"),
        (format!("{CHUNKED}5\r\nhello\r\n5\r\nwo"), "upstream_reset"),
        (format!("{CHUNKED}9\r\nhello"), "upstream_reset"),
        (format!("{CHUNKED}5\r\nhello\r\n0\r\n"), "upstream_reset"),
        (format!("{CHUNKED}5\r\nhello\r\nZZ\r\n"), "upstream_protocol"),
        (format!("{CHUNKED}5\r\nhelloo\r\n"), "upstream_protocol"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello".to_owned(), "upstream_reset"),
    ] {
        let answer: &'static str = answer.leak();
        let breaks = |world: &World| {
            world.raw_app(app_at(3), move |mut stream, _| {
                tokio::spawn(async move {
                    until(&mut stream, b"\r\n\r\n").await;
                    stream.write_all(answer.as_bytes()).await.unwrap();
                });
            });
        };
        for hops in [1, 2] {
            let (world, web, api) = open_pair("http", &json!({}));
            breaks(&world);
            let open = || if hops == 1 { world.connect_inbound(&api, app_at(3)) } else { world.connect(&web, vip(1)) };
            let mut stream = open();
            stream.write_all(GET.as_bytes()).await.unwrap();
            let mut heard = Vec::new();
            timeout(Duration::from_secs(5), stream.read_to_end(&mut heard)).await.expect("an end").unwrap();
            let heard = String::from_utf8(heard).unwrap().to_ascii_lowercase();
            assert!(heard.starts_with("http/1.1 200 ok\r\n") && heard.contains("hello"), "{hops} {answer:?}: {heard:?}");
            assert!(!heard.ends_with("0\r\n\r\n"), "{hops} {answer:?}: {heard:?}");
            told(&api, &["outrigger_requests_total", "inbound", &format!("reason=\"{reason}\""), "status=\"200\""]);
            if hops == 2 {
                let (status, heard, whole) = body_of(&world, &web).await;
                assert_eq!((status, heard.get(..5), whole), (200, Some("hello"), false), "{answer:?}");
            }
        }
    }
}

/// What waits for a slow reader when the answer breaks off is not dropped with it.
#[tokio::test(start_paused = true)]
async fn a_slow_reader_hears_all_that_came_before_an_answer_broke_off() {
    const LENGTH: usize = 200_000;
    for end in ["", "\r\nZZ\r\n"] {
        for hops in [1, 2] {
            let (world, web, api) = open_pair("http", &json!({}));
            world.raw_app(app_at(3), move |mut stream, _| {
                tokio::spawn(async move {
                    until(&mut stream, b"\r\n\r\n").await;
                    let chunk = format!("{LENGTH:x}\r\n{}{end}", "b".repeat(LENGTH));
                    let answer = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{chunk}");
                    stream.write_all(answer.as_bytes()).await.unwrap();
                });
            });
            let mut stream = if hops == 1 { world.connect_inbound(&api, app_at(3)) } else { world.connect(&web, vip(1)) };
            stream.write_all(GET.as_bytes()).await.unwrap();
            sleep(Duration::from_secs(20)).await;
            let mut heard = Vec::new();
            timeout(Duration::from_secs(5), stream.read_to_end(&mut heard)).await.expect("an end").unwrap();
            assert_eq!(heard.iter().filter(|byte| **byte == b'b').count(), LENGTH, "{hops} {end:?}");
            assert!(!heard.ends_with(b"0\r\n\r\n"), "{hops} {end:?}");
        }
    }
}

/// HTTP/1.0 knows no chunks: the answer would end where the connection does.
#[tokio::test]
async fn a_caller_in_http_1_0_is_cut_off_from_an_answer_that_breaks_off() {
    for broken in [false, true] {
        let (world, web, _api) = open_pair("http2", &json!({}));
        world.raw_app(app_at(3), move |stream, _| {
            tokio::spawn(async move {
                let mut codec = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((_request, mut respond))) = codec.accept().await {
                    tokio::spawn(async move {
                        let mut to = respond.send_response(Response::new(()), false).unwrap();
                        to.send_data(Bytes::from_static(b"hello"), !broken).unwrap();
                        sleep(Duration::from_millis(20)).await;
                        if broken {
                            to.send_reset(h2::Reason::INTERNAL_ERROR);
                        }
                    });
                }
            });
        });
        let (mut client, served) = over_tcp().await;
        world.serve(&web, vip(1), Box::new(served));
        client.write_all(GET_1_0).await.unwrap();
        let mut heard = Vec::new();
        let ended = timeout(Duration::from_secs(10), client.read_to_end(&mut heard)).await.expect("an end");
        let heard = String::from_utf8(heard).unwrap();
        assert!(heard.starts_with("HTTP/1.0 200 OK\r\n") && heard.ends_with("\r\n\r\nhello"), "{heard}");
        assert_eq!(ended.map_err(|error| error.kind()).err(), broken.then_some(std::io::ErrorKind::ConnectionReset));
    }
}

#[tokio::test]
async fn a_caller_in_http_1_0_that_is_given_up_is_cut_off() {
    // Because it reads nothing, or because nobody may ask in plaintext any more.
    for revoked in [false, true] {
        let (mut world, _web, api) = open_pair("http", &json!({ "streamTimeout": "1s" }));
        world.raw_app(app_at(3), move |mut stream, _| {
            tokio::spawn(async move {
                until(&mut stream, b"\r\n\r\n").await;
                stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").await.unwrap();
                let step = Duration::from_millis(if revoked { 100 } else { 0 });
                while stream.write_all(&[b'a'; 60_000]).await.is_ok() {
                    sleep(step).await;
                }
            });
        });
        let (mut client, served) = over_tcp().await;
        world.serve_inbound(&api, app_at(3), Box::new(served));
        client.write_all(GET_1_0).await.unwrap();
        if revoked {
            assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 8);
            world.change(&document("PeerAuthentication", "open", json!({ "mode": "Strict" })), &api, "api-1");
        } else {
            sleep(Duration::from_secs(2)).await;
        }
        let mut heard = Vec::new();
        let ended = timeout(Duration::from_secs(10), client.read_to_end(&mut heard)).await.expect("an end");
        assert_eq!(ended.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset, "revoked: {revoked}");
        let why = if revoked { "plaintext_refused" } else { "slow_reader" };
        told(&api, &["outrigger_requests_total", "inbound", &format!("reason=\"{why}\"")]);
    }
}

const GET_1_0: &[u8] = b"GET / HTTP/1.0\r\nhost: api.shop\r\n\r\n";

#[tokio::test(start_paused = true)]
async fn an_answer_that_broke_off_holds_no_place_while_its_reader_is_slow() {
    // More than the connection takes, and less than what the codec holds with it.
    const LENGTH: usize = 100_000;
    let (mut world, web, _api) = open_pair("http", &json!({}));
    let only_one = json!({
        "targetRefs": [{ "kind": "Service", "name": "api" }],
        "circuitBreaking": { "limits": { "maxRequests": 1 } },
    });
    world.change(&document("TrafficPolicy", "limit", only_one), &web, "web-1");
    world.raw_app(app_at(3), move |mut stream, _| {
        tokio::spawn(async move {
            until(&mut stream, b"\r\n\r\n").await;
            let chunk = format!("{LENGTH:x}\r\n{}\r\n", "b".repeat(LENGTH));
            let answer = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{chunk}");
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
    });
    let mut slow = world.connect(&web, vip(1));
    slow.write_all(GET.as_bytes()).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    let mut next = world.connect(&web, vip(1));
    next.write_all(GET.as_bytes()).await.unwrap();
    assert!(until(&mut next, b"\r\n").await.starts_with("HTTP/1.1 200 "));
    let mut heard = Vec::new();
    slow.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard.iter().filter(|byte| **byte == b'b').count(), LENGTH);
}

#[tokio::test(start_paused = true)]
async fn a_coding_that_is_said_twice_is_no_answer() {
    for answer in [
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ] {
        check(GET, answer, "not valid HTTP\n", "HTTP/1.1 502 ").await;
    }
}
