//! Streams of HTTP/2 that end otherwise than with the end of a body: taken back halfway, or with their head.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use parking_lot::Mutex;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::{Instant, sleep, timeout};

use super::attacks::{DATA, END_HEADERS, END_STREAM, HEAD, HEADERS, PING, RST_STREAM, frame, frames, preface};
use super::world::{World, app_at, ask_h2, document, pod, service, text, vip};
use crate::dataplane::Proxy;

/// `:status 200` in HPACK.
const OK: &[u8] = b"\x88";
/// `:method POST`, `:scheme http`, `:path /`, `:authority api.shop`.
const POST: &[u8] = b"\x83\x86\x84\x01\x08api.shop";
/// What a stream is taken back with.
const NO_ERROR: &[u8] = &[0, 0, 0, 0];
const PREFACE: usize = 24;

/// Two sidecars that take requests from everybody; the application speaks HTTP/2, or HTTP/1.
fn pair(http2: bool) -> (World, Arc<Proxy>, Arc<Proxy>) {
    let mut api = pod("api", "api-1", 3);
    if http2 {
        api["spec"]["ports"][0]["name"] = json!("http2");
    }
    let open = document("PeerAuthentication", "open", json!({ "mode": "Permissive" }));
    let world = World::new(&[pod("web", "web-1", 2), api, service("api", "api", 1), open]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    (world, web, api)
}

fn doors(world: &World, web: &Arc<Proxy>, api: &Arc<Proxy>) -> [DuplexStream; 2] {
    [world.connect(web, vip(1)), world.connect_inbound(api, app_at(3))]
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_taken_back_without_an_error_is_no_whole_one() {
    let (world, web, api) = pair(false);
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
async fn an_answer_that_is_taken_back_without_an_error_is_no_whole_one() {
    let (world, web, api) = pair(true);
    world.raw_app(app_at(3), |mut stream, _| {
        tokio::spawn(async move {
            // Who speaks first is taken for something else than HTTP.
            let mut heard = vec![0; PREFACE];
            if stream.read_exact(&mut heard).await.is_err() {
                return;
            }
            stream.write_all(&preface(&[])[PREFACE..]).await.unwrap();
            while !frames(heard.get(PREFACE..).unwrap_or_default()).iter().any(|(kind, _)| *kind == HEADERS) {
                if !matches!(stream.read_buf(&mut heard).await, Ok(1..)) {
                    return;
                }
            }
            let begun = [frame(HEADERS, END_HEADERS, 1, OK), frame(DATA, 0, 1, b"abc")].concat();
            stream.write_all(&begun).await.unwrap();
            sleep(Duration::from_secs(1)).await;
            stream.write_all(&frame(RST_STREAM, 0, 1, NO_ERROR)).await.unwrap();
            while matches!(stream.read_buf(&mut heard).await, Ok(1..)) {}
        });
    });
    for mut stream in doors(&world, &web, &api) {
        let request = frame(HEADERS, END_HEADERS | END_STREAM, 1, HEAD);
        stream.write_all(&[preface(&[]), request].concat()).await.unwrap();
        let mut heard = Vec::new();
        while !frames(&heard).iter().any(|(kind, _)| *kind == RST_STREAM) {
            assert_ne!(
                timeout(Duration::from_secs(9), stream.read_buf(&mut heard)).await.expect("a reset").unwrap(),
                0,
                "{heard:?}"
            );
        }
        let heard: Vec<_> = frames(&heard).into_iter().filter(|(kind, _)| [DATA, RST_STREAM].contains(kind)).collect();
        assert_eq!(heard, [(DATA, b"abc".to_vec()), (RST_STREAM, vec![0, 0, 0, 2])]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_ends_with_the_last_piece_of_its_body() {
    let (world, web, api) = pair(true);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&seen);
    world.raw_app(app_at(3), move |mut stream, _| {
        let kept = Arc::clone(&kept);
        tokio::spawn(async move {
            if stream.read_exact(&mut [0; PREFACE]).await.is_err() {
                return;
            }
            stream.write_all(&preface(&[])[PREFACE..]).await.unwrap();
            while let Ok(byte) = stream.read_u8().await {
                kept.lock().push(byte);
            }
        });
    });
    for mut stream in doors(&world, &web, &api) {
        let whole = [preface(&[]), frame(HEADERS, END_HEADERS, 1, POST), frame(DATA, END_STREAM, 1, b"abc")].concat();
        stream.write_all(&whole).await.unwrap();
        sleep(Duration::from_secs(1)).await;
        let seen = std::mem::take(&mut *seen.lock());
        let data: Vec<_> = frames(&seen).into_iter().filter(|(kind, _)| *kind == DATA).collect();
        assert_eq!(data, [(DATA, b"abc".to_vec())], "and no empty one behind it");
        assert!(seen.windows(5).any(|begin| begin == [0, 0, 3, DATA, END_STREAM]), "{seen:?}");
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

/// A watch of etcd and a chat over gRPC may be silent for hours, on both sides.
#[tokio::test(start_paused = true)]
async fn a_talk_in_which_both_are_silent_goes_on() {
    const SILENCE: Duration = Duration::from_secs(20 * 60);
    for grpc in [true, false] {
        let (world, web, api) = pair(true);
        world.raw_app(app_at(3), move |stream, _| {
            tokio::spawn(async move {
                let mut codec = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((request, mut respond))) = codec.accept().await {
                    tokio::spawn(async move {
                        // Servers of gRPC begin their answer with the first message of it.
                        if grpc {
                            sleep(SILENCE).await;
                        }
                        let mut to = respond.send_response(Response::new(()), false).unwrap();
                        let said = request.into_body().data().await.unwrap().unwrap();
                        to.send_data(said, true).unwrap();
                    });
                }
            });
        });
        for far in [true, false] {
            let stream = if far { world.connect(&web, vip(1)) } else { world.connect_inbound(&api, app_at(3)) };
            let (sender, connection) = h2::client::handshake(stream).await.unwrap();
            tokio::spawn(connection);
            let request = Request::post("http://api.shop/").header("te", "trailers");
            let kind = if grpc { "application/grpc" } else { "text/plain" };
            let request = request.header("content-type", kind).body(()).unwrap();
            let (answer, mut to) = sender.ready().await.unwrap().send_request(request, false).unwrap();
            let answer = answer.await.unwrap();
            assert_eq!(answer.status(), 200);
            sleep(SILENCE).await;
            to.send_data(Bytes::from_static(b"hello"), true).unwrap();
            assert_eq!(answer.into_body().data().await.unwrap().unwrap(), "hello", "grpc: {grpc}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_silent_and_does_not_say_whether_it_is_there_is_let_go_of() {
    let (world, web, api) = pair(true);
    world.slow_app(app_at(3), |_| std::future::pending());
    for far in [true, false] {
        let mut stream = if far { world.connect(&web, vip(1)) } else { world.connect_inbound(&api, app_at(3)) };
        stream.write_all(&[preface(&[]), frame(HEADERS, END_HEADERS | END_STREAM, 1, POST)].concat()).await.unwrap();
        let begin = Instant::now();
        let mut heard = Vec::new();
        timeout(Duration::from_secs(3_600), stream.read_to_end(&mut heard)).await.expect("an end").ok();
        assert_eq!(begin.elapsed().as_secs() / 60, 30, "twice as long as an idle one");
        assert_eq!(frames(&heard).iter().filter(|(kind, _)| *kind == PING).count(), 1);
    }
}
