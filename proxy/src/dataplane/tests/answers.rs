//! Answers that are not what HTTP says an answer is: resolved as the RFCs say, or refused with a reason, and never cut short
//! without a word.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use std::time::Duration;

use http::{Request, Response};
use http_body_util::Full;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::attacks::{GOAWAY, HEADERS, SETTINGS, frame, frames, open_pair};
use super::fidelity::{exchange, hop, pair, sidecars};
use super::world::{World, app_at, ask_h2, pod, service, vip};

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
                tokio::time::sleep(Duration::from_millis(50)).await;
            });
        });
        let ask = || {
            let request = Request::post("http://api.shop/").body(Full::default()).unwrap();
            tokio::spawn(ask_h2(world.connect(&web, vip(1)), request))
        };
        let one = ask();
        tokio::time::sleep(Duration::from_millis(10)).await;
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
        let end = if words.is_some() { " bytes\n" } else { "\r\n\r\nok" };
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
