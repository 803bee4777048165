//! Answers that are not what HTTP says an answer is: resolved as the RFCs say, or refused with a reason, and never cut short
//! without a word.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::{Request, Response};
use http_body_util::Full;
use serde_json::json;

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
