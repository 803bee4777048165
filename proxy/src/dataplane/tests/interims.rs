//! What an application says before its answer, heard by callers of every version: at once, in order, and no more than is
//! good for anybody.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::{Instant, sleep, timeout};

use super::answers::of_http2;
use super::attacks::open_pair;
use super::fidelity::{hop, pair, sidecars, until};
use super::world::{World, app_at, document, service, told, vip};

const HINTS: &str = "HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\n\r\n";
const ANSWER: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const ALL: &str = "HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\nConnection: x-hop\r\nX-Hop: 1\r\nOutrigger-Reason: denied\r\n\r\n\
    HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </b>\r\nlink: </c>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const GET: &str = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";

/// An application in HTTP/1 that says these, with a second behind each, to every request.
fn says(world: &World, words: &'static [&'static str]) {
    world.raw_app(app_at(3), move |mut stream, _| {
        tokio::spawn(async move {
            while !until(&mut stream, b"\r\n\r\n").await.is_empty() {
                for words in words {
                    if stream.write_all(words.as_bytes()).await.is_err() {
                        return;
                    }
                    sleep(Duration::from_secs(1)).await;
                }
            }
        });
    });
}

/// An application in HTTP/2 that says hints and, a second later, answers.
fn says_http2(world: &World) {
    world.raw_app(app_at(3), move |stream, _| {
        tokio::spawn(async move {
            let mut codec = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((_request, mut respond))) = codec.accept().await {
                tokio::spawn(async move {
                    let hints = Response::builder().status(103).header("link", "</a>; rel=preload").body(()).unwrap();
                    respond.send_informational(hints).unwrap();
                    sleep(Duration::from_secs(1)).await;
                    let answer = Response::builder().header("content-length", "2").body(()).unwrap();
                    respond.send_response(answer, false).unwrap().send_data(Bytes::from_static(b"ok"), true).unwrap();
                });
            }
        });
    });
}

/// What a caller in HTTP/2 hears: each status with its link and when it came, to the answer.
async fn heard_in_http2(stream: DuplexStream, request: Request<()>, body: Option<&'static str>) -> Vec<(u16, String, u64)> {
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    let driven = tokio::spawn(connection);
    let begun = Instant::now();
    let (mut answer, mut to) = sender.ready().await.unwrap().send_request(request, body.is_none()).unwrap();
    let mut heard = Vec::new();
    let mut note = |response: &http::response::Parts| {
        let link = response.headers.get("link").map_or("", |link| link.to_str().unwrap()).to_owned();
        heard.push((response.status.as_u16(), link, begun.elapsed().as_secs()));
    };
    while let Some(interim) = poll_fn(|cx| answer.poll_informational(cx)).await {
        let interim = interim.unwrap().into_parts().0;
        note(&interim);
        if let (StatusCode::CONTINUE, Some(body)) = (interim.status, body) {
            to.send_data(Bytes::from_static(body.as_bytes()), true).unwrap();
        }
    }
    note(&answer.await.unwrap().into_parts().0);
    driven.abort();
    heard
}

fn get() -> Request<()> {
    Request::get("http://api.shop/").body(()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn early_hints_are_heard_in_http_1_before_the_answer_is_made() {
    for world in [pair(), hop()] {
        let web = sidecars(&world);
        says(&world, &[HINTS, "HTTP/1.1 102 Processing\r\n\r\n", ANSWER]);
        let mut stream = world.connect(&web, vip(1));
        // The connection serves on, and its next answer is preceded by what is said before it.
        for _turn in 0..3 {
            let begun = Instant::now();
            stream.write_all(GET.as_bytes()).await.unwrap();
            assert_eq!(until(&mut stream, b"\r\n\r\n").await, HINTS);
            assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
            assert_eq!(until(&mut stream, b"ok").await, format!("HTTP/1.1 102 Processing\r\n\r\n{ANSWER}"));
            sleep(Duration::from_secs(2)).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn early_hints_are_heard_in_http_2_before_the_answer_is_made() {
    for world in [pair(), hop()] {
        let mut declared = service("api", "api", 1);
        declared["spec"]["ports"][0]["appProtocol"] = json!("http");
        let mut world = world;
        let web = sidecars(&world);
        world.change(&declared, &web, "web-1");
        says(&world, &[HINTS, ANSWER]);
        let heard = heard_in_http2(world.connect(&web, vip(1)), get(), None).await;
        assert_eq!(heard, [(103, "</a>; rel=preload".into(), 0), (200, String::new(), 1)]);
    }
}

#[tokio::test(start_paused = true)]
async fn early_hints_of_an_application_in_http_2_are_heard_in_either_version() {
    for world in of_http2() {
        let web = sidecars(&world);
        says_http2(&world);
        let heard = heard_in_http2(world.connect(&web, vip(1)), get(), None).await;
        assert_eq!(heard, [(103, "</a>; rel=preload".into(), 0), (200, String::new(), 1)]);
        let mut stream = world.connect(&web, vip(1));
        let begun = Instant::now();
        stream.write_all(GET.as_bytes()).await.unwrap();
        assert_eq!(until(&mut stream, b"\r\n\r\n").await, HINTS);
        assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
        assert_eq!(until(&mut stream, b"ok").await, ANSWER);
    }
}

#[tokio::test(start_paused = true)]
async fn what_comes_in_one_piece_with_the_answer_is_heard_before_it() {
    for world in [pair(), hop()] {
        let web = sidecars(&world);
        says(&world, &[ALL]);
        let mut stream = world.connect(&web, vip(1));
        let second = "HTTP/1.1 103 Early Hints\r\nlink: </b>\r\nlink: </c>\r\n\r\n";
        stream.write_all(GET.repeat(2).as_bytes()).await.unwrap();
        for _request in 0..2 {
            // Nobody expected a `100 Continue`.
            assert_eq!(until(&mut stream, b"ok").await, format!("{HINTS}{second}{ANSWER}"));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_in_http_1_0_hears_the_answer_alone() {
    for world in [pair(), hop()] {
        let web = sidecars(&world);
        says(&world, &[HINTS, ANSWER]);
        let mut stream = world.connect(&web, vip(1));
        stream.write_all(b"GET / HTTP/1.0\r\nhost: a\r\n\r\n").await.unwrap();
        let heard = until(&mut stream, b"ok").await;
        assert!(heard.starts_with("HTTP/1.0 200 OK\r\n"), "{heard}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_upgrade_may_be_preceded_by_hints() {
    for world in [pair(), hop()] {
        let web = sidecars(&world);
        says(&world, &[HINTS, "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\nhello"]);
        let mut stream = world.connect(&web, vip(1));
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n").await.unwrap();
        let heard = until(&mut stream, b"hello").await;
        assert!(heard.starts_with(HINTS) && heard.contains("\r\n\r\nHTTP/1.1 101 "), "{heard}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_route_takes_from_answers_is_not_said_before_them() {
    let edit = json!([{ "type": "ResponseHeaderModifier", "responseHeaderModifier": { "remove": ["Link"] } }]);
    let route = document(
        "HTTPRoute",
        "quiet",
        json!({
            "parentRefs": [{ "kind": "Service", "group": "", "name": "api" }],
            "rules": [{ "filters": edit, "backendRefs": [{ "name": "api", "port": 80 }] }],
        }),
    );
    let mut world = pair();
    let web = sidecars(&world);
    world.change(&route, &web, "web-1");
    says(&world, &[HINTS, ANSWER]);
    let mut stream = world.connect(&web, vip(1));
    stream.write_all(GET.as_bytes()).await.unwrap();
    assert_eq!(until(&mut stream, b"ok").await, format!("HTTP/1.1 103 Early Hints\r\n\r\n{ANSWER}"));
}

#[tokio::test(start_paused = true)]
async fn an_application_that_says_too_much_is_answered_for_by_the_limits_name() {
    let many: &'static str = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n".repeat(101).leak();
    let long: &'static str = format!("HTTP/1.1 103 Early Hints\r\nlink: {}\r\n\r\n", "a".repeat(70 << 10)).leak();
    let endless: &'static str = format!("HTTP/1.1 103 Early Hints\r\nlink: {}", "a".repeat(70 << 10)).leak();
    for words in [many, long, endless] {
        for world in [pair(), hop()] {
            let web = sidecars(&world);
            let words: &'static [&'static str] = vec![words].leak();
            says(&world, words);
            let mut stream = world.connect(&web, vip(1));
            stream.write_all(GET.as_bytes()).await.unwrap();
            let heard = timeout(Duration::from_secs(5), until(&mut stream, b"bytes of them\n")).await.unwrap();
            assert!(heard.matches("HTTP/1.1 103 ").count() <= 100, "{}", heard.len());
            let (_, refusal) = heard.split_once("HTTP/1.1 502 ").unwrap();
            assert!(refusal.contains("outrigger-reason: upstream_protocol\r\n"), "{refusal}");
            assert!(refusal.contains("more than 100 interim answers (1xx)"), "{refusal}");
        }
    }
    for world in of_http2() {
        let web = sidecars(&world);
        world.raw_app(app_at(3), move |stream, _| {
            tokio::spawn(async move {
                let mut codec = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((_request, mut respond))) = codec.accept().await {
                    tokio::spawn(async move {
                        for _ in 0..1_000 {
                            let hints = Response::builder().status(103).body(()).unwrap();
                            if respond.send_informational(hints).is_err() {
                                return;
                            }
                        }
                        sleep(Duration::from_secs(60)).await;
                    });
                }
            });
        });
        let heard = timeout(Duration::from_secs(5), heard_in_http2(world.connect(&web, vip(1)), get(), None)).await.unwrap();
        assert!(heard.len() <= 101, "{}", heard.len());
        assert_eq!(heard.last().unwrap().0, 502);
    }
}

/// A client that asks ahead and reads nothing: what is said before its second answer comes behind the first one all the same.
#[tokio::test(start_paused = true)]
async fn what_is_said_to_a_slow_reader_keeps_its_place() {
    let body = "b".repeat(300 << 10);
    let first: &'static str = format!("{HINTS}HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).leak();
    let words: &'static [&'static str] = vec![first].leak();
    for world in [pair(), hop()] {
        let web = sidecars(&world);
        says(&world, words);
        let mut stream = world.connect(&web, vip(1));
        stream.write_all(GET.repeat(3).as_bytes()).await.unwrap();
        sleep(Duration::from_secs(30)).await;
        let mut heard = vec![0; 3 * first.len()];
        timeout(Duration::from_secs(60), stream.read_exact(&mut heard)).await.unwrap().unwrap();
        assert!(heard == first.repeat(3).as_bytes(), "another order");
    }
}

/// An application that answers without a word leaves nobody waiting, and half of another request keeps nothing open.
#[tokio::test(start_paused = true)]
async fn a_connection_ends_whatever_its_last_request_expected() {
    for world in [pair(), hop()] {
        let web = sidecars(&world);
        world.raw_app(app_at(3), |mut stream, _| {
            tokio::spawn(async move {
                until(&mut stream, b"body").await;
                stream.write_all(ANSWER.as_bytes()).await.unwrap();
                until(&mut stream, b"\0").await;
            });
        });
        let mut stream = world.connect(&web, vip(1));
        let asked = b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\nbodyG";
        stream.write_all(asked).await.unwrap();
        assert_eq!(until(&mut stream, b"ok").await, ANSWER);
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        timeout(Duration::from_secs(60), stream.read_to_end(&mut rest)).await.expect("it stays open").unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_in_http_2_is_told_that_its_body_is_wanted() {
    for world in [pair(), hop()] {
        let web = sidecars(&world);
        let seen = Arc::new(parking_lot::Mutex::new(String::new()));
        let kept = Arc::clone(&seen);
        let mut declared = service("api", "api", 1);
        declared["spec"]["ports"][0]["appProtocol"] = json!("http");
        let mut world = world;
        world.change(&declared, &web, "web-1");
        world.raw_app(app_at(3), move |mut stream, _| {
            let kept = Arc::clone(&kept);
            tokio::spawn(async move {
                until(&mut stream, b"\r\n\r\n").await;
                sleep(Duration::from_secs(3)).await;
                stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
                let body = until(&mut stream, b"body").await;
                *kept.lock() = body;
                stream.write_all(ANSWER.as_bytes()).await.unwrap();
                until(&mut stream, b"\0").await;
            });
        });
        let request =
            Request::put("http://api.shop/").header("expect", "100-continue").header("content-length", "4").body(()).unwrap();
        let heard = heard_in_http2(world.connect(&web, vip(1)), request, Some("body")).await;
        assert_eq!(heard, [(100, String::new(), 3), (200, String::new(), 3)]);
        assert_eq!(*seen.lock(), "body");
    }
}

/// Each is small on the wire of HTTP/1, and its fields are many: HTTP/2 counts 32 bytes more of each (RFC 9113 10.5.1).
fn of_many_fields(count: usize) -> String {
    format!("HTTP/1.1 103 Early Hints\r\n{}\r\n", "a: b\r\n".repeat(20)).repeat(count)
}

#[tokio::test(start_paused = true)]
async fn what_is_said_before_an_answer_counts_the_same_at_every_hop() {
    // 20 fields of 34 bytes.
    let most = (64 << 10) / (20 * 34);
    for (words, passes) in
        [(HINTS.repeat(100), 100), (HINTS.repeat(101), 0), (of_many_fields(most), most), (of_many_fields(100), 0)]
    {
        let all: &'static str = format!("{words}{ANSWER}").leak();
        let all: &'static [&'static str] = vec![all].leak();
        for inbound in [false, true] {
            let (world, web, api) = open_pair("http", &json!({}));
            says(&world, all);
            let mut stream = if inbound { world.connect_inbound(&api, app_at(3)) } else { world.connect(&web, vip(1)) };
            stream.write_all(GET.as_bytes()).await.unwrap();
            let end = if passes > 0 { "\r\n\r\nok" } else { "bytes of them\n" };
            let heard = timeout(Duration::from_secs(5), until(&mut stream, end.as_bytes())).await.unwrap();
            let (said, answer) = (heard.matches("HTTP/1.1 103 ").count(), heard.contains("HTTP/1.1 200 "));
            if passes > 0 {
                assert_eq!((said, answer), (passes, true), "inbound: {inbound}");
            } else {
                assert!(said <= 100 && !answer, "inbound: {inbound}: {said}");
                // The hop that the application answers is the one that decides.
                told(&api, &["outrigger_refusals_total", "inbound", "upstream_protocol", "shop/api"]);
            }
        }
    }
}
