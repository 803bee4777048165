//! Applications of HTTP/2 that take few requests at once, bursts of more than that, and what becomes of those that are refused.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use h2::client::SendRequest;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use parking_lot::Mutex;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::{Instant, sleep};

use super::attacks::{HEADERS, SETTINGS, frame, frames, open_pair};
use super::outbound::route;
use super::world::{World, app_at, ask_h2, vip};

const GOAWAY: u8 = 7;
/// How long an application's settings are on their way, and how long it takes to answer.
const AWAY: Duration = Duration::from_millis(20);

/// What an application saw.
#[derive(Debug, Default)]
struct Seen {
    connections: AtomicUsize,
    /// Requests for each thing that was asked for.
    asked: Mutex<BTreeMap<String, usize>>,
}

/// A pair, or one hop, before an application that takes `streams` requests at once on a connection, and says so late.
fn world(streams: u32) -> (World, [DuplexStream; 2], Arc<Seen>) {
    let (world, web, api) = open_pair("http2", &json!({}));
    let seen = Arc::<Seen>::default();
    let kept = Arc::clone(&seen);
    world.raw_app(app_at(3), move |stream, _| {
        let seen = Arc::clone(&kept);
        seen.connections.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            sleep(AWAY).await;
            let mut codec = h2::server::Builder::new();
            let Ok(mut codec) = codec.max_concurrent_streams(streams).handshake::<_, Bytes>(stream).await else { return };
            while let Some(Ok((request, mut respond))) = codec.accept().await {
                *seen.asked.lock().entry(request.uri().path().to_owned()).or_default() += 1;
                tokio::spawn(async move {
                    let mut body = request.into_body();
                    while let Some(Ok(_data)) = body.data().await {}
                    sleep(AWAY).await;
                    drop(respond.send_response(Response::new(()), true));
                });
            }
        });
    });
    let doors = [world.connect(&web, vip(1)), world.connect_inbound(&api, app_at(3))];
    (world, doors, seen)
}

async fn client(door: DuplexStream) -> SendRequest<Bytes> {
    let (sender, connection) = h2::client::handshake(door).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    sender.ready().await.unwrap()
}

/// The status of the answer to a request with a small body.
async fn post(sender: &SendRequest<Bytes>, path: &str) -> StatusCode {
    let request = Request::post(format!("http://api.shop{path}")).body(()).unwrap();
    let (answer, mut body) = sender.clone().ready().await.unwrap().send_request(request, false).unwrap();
    body.send_data(Bytes::from_static(b"abc"), true).unwrap();
    answer.await.unwrap().status()
}

/// "An endpoint MUST NOT exceed the limit set by its peer" (RFC 9113 5.1.2), which is not known before its settings came.
#[tokio::test(start_paused = true)]
async fn a_burst_waits_for_its_turn_at_an_application_that_takes_few_requests_at_once() {
    const BURST: usize = 300;
    for streams in [1, 10, 100] {
        let (_world, doors, seen) = world(streams);
        for door in doors {
            let sender = client(door).await;
            let paths: Vec<_> = (0..BURST).map(|index| format!("/{index}")).collect();
            let heard = join_all(paths.iter().map(|path| post(&sender, path))).await;
            let refused = heard.iter().filter(|status| **status != StatusCode::OK).count();
            assert_eq!(refused, 0, "of {BURST}, by one that takes {streams}");
            let asked = std::mem::take(&mut *seen.asked.lock());
            assert!(asked.len() == BURST && asked.values().all(|times| *times == 1), "{asked:?}");
            let connections = seen.connections.swap(0, Ordering::Relaxed);
            assert!(connections <= 16, "{connections}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_carries_one_request_until_its_peer_said_how_many_it_takes() {
    let (world, _web, api) = open_pair("http2", &json!({}));
    let heard = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&heard);
    world.raw_app(app_at(3), move |mut stream, _| {
        let index = kept.lock().len();
        kept.lock().push(Vec::new());
        let kept = Arc::clone(&kept);
        tokio::spawn(async move {
            let mut bytes = Vec::new();
            while stream.read_buf(&mut bytes).await.is_ok_and(|count| count > 0) {
                kept.lock()[index].clone_from(&bytes);
            }
        });
    });
    let sender = client(world.connect_inbound(&api, app_at(3))).await;
    for _ in 0..50 {
        let sender = sender.clone();
        tokio::spawn(async move { post(&sender, "/").await });
    }
    let asked = || -> Vec<usize> {
        let heads =
            |bytes: &Vec<u8>| frames(bytes.get(24..).unwrap_or_default()).iter().filter(|(kind, _)| *kind == HEADERS).count();
        heard.lock().iter().map(heads).collect()
    };
    sleep(Duration::from_millis(900)).await;
    assert_eq!(asked(), [1]);
    // One that never says it is no reason to wait for ever.
    sleep(Duration::from_millis(1_000)).await;
    assert_eq!(asked(), [1, 1]);
}

#[tokio::test(start_paused = true)]
async fn who_waits_to_hear_how_many_requests_an_application_takes_hears_that_it_does_not_speak_http_2() {
    let (world, _web, api) = open_pair("http2", &json!({}));
    let connections = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    world.raw_app(app_at(3), move |mut stream, _| {
        count.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            sleep(AWAY).await;
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await.ok();
            while matches!(stream.read(&mut [0; 1024]).await, Ok(1..)) {}
        });
    });
    let sender = client(world.connect_inbound(&api, app_at(3))).await;
    let begun = Instant::now();
    let heard = join_all((0..50).map(|_| post(&sender, "/"))).await;
    assert!(heard.iter().all(|status| *status == StatusCode::BAD_GATEWAY), "{heard:?}");
    assert!(begun.elapsed() < 3 * AWAY, "{:?}", begun.elapsed());
    assert_eq!(connections.load(Ordering::Relaxed), 1);
}

/// How an application leaves a request unprocessed (RFC 9113 8.7).
#[derive(Clone, Copy, Debug)]
enum Refuses {
    /// RST_STREAM with REFUSED_STREAM.
    Stream,
    /// GOAWAY with a lower stream.
    Goodbye,
}

/// An application that refuses the first `times` requests, and how many it was asked; `web` has no retry for it.
fn refusing(refuses: Refuses, times: usize) -> (World, [DuplexStream; 2], Arc<AtomicUsize>) {
    let (mut world, web, api) = open_pair("http2", &json!({}));
    let never = json!([{ "retry": { "attempts": 0 }, "backendRefs": [{ "name": "api", "port": 80 }] }]);
    world.change(&route(never), &web, "web-1");
    let asked = Arc::new(AtomicUsize::new(0));
    let kept = Arc::clone(&asked);
    world.raw_app(app_at(3), move |mut stream, _| {
        let asked = Arc::clone(&kept);
        tokio::spawn(async move {
            let goodbye = matches!(refuses, Refuses::Goodbye) && asked.load(Ordering::Relaxed) < times;
            if goodbye {
                asked.fetch_add(1, Ordering::Relaxed);
                stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
                let mut heard = Vec::new();
                let heads = |heard: &[u8]| frames(heard.get(24..).unwrap_or_default()).iter().any(|(kind, _)| *kind == HEADERS);
                while !heads(&heard) {
                    assert_ne!(stream.read_buf(&mut heard).await.unwrap(), 0);
                }
                stream.write_all(&frame(GOAWAY, 0, 0, &[0; 8])).await.unwrap();
                return sleep(AWAY).await;
            }
            let mut codec = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = codec.accept().await {
                if asked.fetch_add(1, Ordering::Relaxed) < times {
                    respond.send_reset(h2::Reason::REFUSED_STREAM);
                    continue;
                }
                tokio::spawn(async move {
                    let mut body = request.into_body();
                    let mut whole = Vec::new();
                    while let Some(Ok(data)) = body.data().await {
                        whole.extend_from_slice(&data);
                        body.flow_control().release_capacity(data.len()).unwrap();
                    }
                    let mut to = respond.send_response(Response::new(()), false).unwrap();
                    to.send_data(whole.into(), true).unwrap();
                });
            }
        });
    });
    let doors = [world.connect(&web, vip(1)), world.connect_inbound(&api, app_at(3))];
    (world, doors, asked)
}

#[tokio::test(start_paused = true)]
async fn what_was_refused_unprocessed_is_sent_again_without_a_retry_policy() {
    for refuses in [Refuses::Stream, Refuses::Goodbye] {
        for door in 0..2 {
            let (_world, doors, asked) = refusing(refuses, 2);
            let request = Request::post("http://api.shop/").body(Full::from("order")).unwrap();
            let heard = ask_h2(doors.into_iter().nth(door).unwrap(), request).await;
            assert_eq!((heard.status, &*heard.body), (200, "order"), "{refuses:?} {:?}", heard.reason());
            assert_eq!(asked.load(Ordering::Relaxed), 3, "{refuses:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn who_refuses_everything_is_asked_a_few_times_and_no_more() {
    for door in 0..2 {
        let (_world, doors, asked) = refusing(Refuses::Stream, usize::MAX);
        let request = Request::post("http://api.shop/").body(Full::from("order")).unwrap();
        let heard = ask_h2(doors.into_iter().nth(door).unwrap(), request).await;
        assert_eq!((heard.status, heard.reason()), (503, "upstream_refused"));
        assert_eq!(asked.load(Ordering::Relaxed), 4);
    }
}

/// Sixty-four KiB of a body are kept; of a longer one the beginning is gone when it is refused late.
#[tokio::test(start_paused = true)]
async fn what_was_refused_when_too_much_of_it_was_sent_is_not_sent_again() {
    let (world, _web, api) = open_pair("http2", &json!({}));
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    world.raw_app(app_at(3), move |stream, _| {
        let asked = Arc::clone(&count);
        tokio::spawn(async move {
            let mut codec = h2::server::Builder::new();
            codec.initial_window_size(1 << 20).initial_connection_window_size(1 << 20);
            let mut codec = codec.handshake::<_, Bytes>(stream).await.unwrap();
            while let Some(Ok((_request, mut respond))) = codec.accept().await {
                asked.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(async move {
                    sleep(AWAY).await;
                    respond.send_reset(h2::Reason::REFUSED_STREAM);
                });
            }
        });
    });
    let request = Request::post("http://api.shop/").body(Full::from(vec![b'x'; 200_000])).unwrap();
    let heard = ask_h2(world.connect_inbound(&api, app_at(3)), request).await;
    assert_eq!((heard.status, heard.reason(), asked.load(Ordering::Relaxed)), (503, "upstream_refused", 1));
}
