//! Shared connections: how many there are and when, what becomes of old ones, and of peers that say nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use http::Response;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::{Instant, advance, sleep, timeout};

use super::world::{Heard, World, app_at, ask, ask_h2, document, get, pod, service, text, vip};
use crate::dataplane::Proxy;

/// `web` calls `api`, which takes its time when it is asked for `/slow`, and that many requests at once on a connection.
fn pair(streams: u32) -> (World, Arc<Proxy>) {
    let world = World::new(&[
        pod("web", "web-1", 2),
        pod("api", "api-1", 3),
        service("api", "api", 1),
        document("Mesh", "mesh", json!({ "limits": { "concurrentStreams": streams } })),
    ]);
    let web = world.sidecar("web", "web-1", 2);
    world.sidecar("api", "api-1", 3);
    world.slow_app(app_at(3), |request| async move {
        if request.uri().path() == "/slow" {
            sleep(Duration::from_secs(1)).await;
        }
        text("api")
    });
    (world, web)
}

/// That many slow requests at once, behind one that made the peer's limits known.
async fn at_once(world: &World, web: &Arc<Proxy>, count: usize) -> Vec<Heard> {
    assert_eq!(ask(world.connect(web, vip(1)), get("/")).await.status, 200);
    join_all((0..count).map(|_| ask(world.connect(web, vip(1)), get("/slow")))).await
}

#[tokio::test(start_paused = true)]
async fn another_connection_is_opened_when_no_stream_is_left_and_no_sooner() {
    let (world, web) = pair(2);
    for (count, connections) in [(2, 1), (5, 3), (6, 3)] {
        assert!(at_once(&world, &web, count).await.iter().all(|heard| heard.status == 200), "{count}");
        assert_eq!(world.dialled().len(), connections, "{count}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_finds_no_place_on_any_connection_waits_for_one() {
    let (world, web) = pair(1);
    let begun = Instant::now();
    assert!(at_once(&world, &web, 40).await.iter().all(|heard| heard.status == 200));
    assert_eq!(world.dialled().len(), 16);
    let long = begun.elapsed();
    assert!((Duration::from_secs(3)..Duration::from_secs(4)).contains(&long), "16, 16 and 8 at a time took {long:?}");
}

#[tokio::test(start_paused = true)]
async fn no_more_wait_for_a_place_than_there_is_room_for() {
    let (world, web) = pair(1);
    assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.status, 200);
    let begun = Instant::now();
    // By the pod's address, so that no service's limits decide before.
    let one = async || {
        let heard = ask(world.connect(&web, app_at(3)), get("/slow")).await;
        (heard, begun.elapsed())
    };
    // One is carried, and who dials for all waits as well.
    let mut all: Vec<_> = join_all((0..1 + 1_024 + 5).map(|_| one())).await;
    all.sort_by_key(|(_, long)| *long);
    let refused: Vec<_> = all.extract_if(.., |(heard, _)| heard.status == 503).collect();
    assert_eq!(refused.len(), 5);
    for (heard, long) in refused {
        assert_eq!(heard.reason(), "breaker_rejected", "{heard:?}");
        assert!(heard.body.contains("waiting_for_streams"), "{heard:?}");
        assert!(long < Duration::from_millis(100), "{long:?}: it does not wait to be refused");
    }
    assert!(all.iter().all(|(heard, _)| heard.status == 200), "whoever waits is served");
    // The places of those who waited are there again.
    assert!(at_once(&world, &web, 40).await.iter().all(|heard| heard.status == 200));
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_opened_later_wakes_who_waits_for_a_place() {
    let (mut world, web) = pair(2);
    let at_most = |connections: u32| {
        let limits = json!({ "limits": { "maxConnections": connections } });
        document(
            "TrafficPolicy",
            "api",
            json!({ "targetRefs": [{ "kind": "Service", "name": "api" }], "circuitBreaking": limits }),
        )
    };
    world.change(&at_most(1), &web, "web-1");
    assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.status, 200);
    let slow = [(); 2].map(|()| tokio::spawn(ask(world.connect(&web, vip(1)), get("/slow"))));
    sleep(Duration::from_millis(100)).await;
    let waits = tokio::spawn(ask(world.connect(&web, vip(1)), get("/")));
    sleep(Duration::from_millis(100)).await;
    assert!(!waits.is_finished() && world.dialled().len() == 1, "the service may have no more connections");
    world.change(&at_most(2), &web, "web-1");
    // Whoever opens the second one stays on it.
    let opens = tokio::spawn(ask(world.connect(&web, vip(1)), get("/slow")));
    assert_eq!(timeout(Duration::from_millis(100), waits).await.expect("it is woken").unwrap().status, 200);
    assert_eq!(world.dialled().len(), 2);
    assert!(slow.iter().chain([&opens]).all(|one| !one.is_finished()), "none of them made room");
    for one in slow.into_iter().chain([opens]) {
        assert_eq!(one.await.unwrap().status, 200);
    }
}

#[tokio::test(start_paused = true)]
async fn an_old_connection_ends_what_it_carries_and_takes_nothing_new() {
    let (world, web) = pair(100);
    assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.status, 200);
    for _ in 0..2 {
        // Shorter than the time after which an idle connection is closed.
        advance(Duration::from_secs(11 * 60)).await;
        assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.status, 200);
    }
    assert_eq!(world.dialled().len(), 1, "no connection is old before four fifths of half an hour");
    let slow = ask(world.connect(&web, vip(1)), get("/slow"));
    let (slow, ()) = tokio::join!(slow, async {
        sleep(Duration::from_millis(10)).await;
        advance(Duration::from_secs(9 * 60)).await;
        assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.status, 200);
    });
    assert_eq!(slow.status, 200);
    assert_eq!(world.dialled().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_nothing_any_more_is_given_up() {
    let mut silent = pod("api", "api-1", 3);
    // Not declared: the application is spoken to as its caller speaks.
    silent["spec"]["ports"][0]["name"] = json!("main");
    let world = World::new(&[pod("web", "web-1", 2), silent, service("api", "api", 1)]);
    let web = world.sidecar("web", "web-1", 2);
    world.sidecar("api", "api-1", 3);
    world.raw_app(app_at(3), |mut stream, _| {
        tokio::spawn(async move {
            // The empty settings of a server, and then silence.
            stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
            while matches!(stream.read(&mut [0; 1024]).await, Ok(1..)) {}
        });
    });
    let begun = Instant::now();
    let heard = ask_h2(world.connect(&web, vip(1)), get("/")).await;
    assert_eq!((heard.status, heard.reason()), (502, "upstream_reset"), "{}", heard.body);
    let long = begun.elapsed();
    assert!((Duration::from_secs(7)..Duration::from_secs(15)).contains(&long), "{long:?}");
}

/// A tunnel from end to end.
async fn tunnel(world: &World, web: &Arc<Proxy>) -> DuplexStream {
    let mut stream = world.connect(web, vip(1));
    let request = b"GET /chat HTTP/1.1\r\nHost: api.shop\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
    stream
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_keeps_its_place_until_it_ends() {
    let (world, web) = pair(2);
    world.raw_app(app_at(3), |mut stream, _| {
        tokio::spawn(async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let tunnel = head.starts_with(b"GET /chat");
            let answer: &[u8] = if tunnel {
                b"HTTP/1.1 101 Switching Protocols\r\nupgrade: echo\r\nconnection: Upgrade\r\n\r\n"
            } else {
                b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"
            };
            stream.write_all(answer).await.unwrap();
            while tunnel && matches!(stream.read(&mut [0; 64]).await, Ok(1..)) {}
        });
    });
    let ask_once = async || timeout(Duration::from_secs(5), ask(world.connect(&web, vip(1)), get("/"))).await.unwrap().status;
    assert_eq!(ask_once().await, 200);
    let tunnels = [tunnel(&world, &web).await, tunnel(&world, &web).await];
    assert_eq!(world.dialled().len(), 1);
    assert_eq!(ask_once().await, 200, "where the tunnels are there is no room");
    assert_eq!(world.dialled().len(), 2);
    drop(tunnels);
    sleep(Duration::from_millis(10)).await;
    // As many as have room on both, so the places are there again.
    assert!(join_all((0..4).map(|_| ask_once())).await.iter().all(|status| *status == 200));
    assert_eq!(world.dialled().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_connection_to_the_application_that_nobody_uses_is_closed() {
    let mut api = pod("api", "api-1", 3);
    // Not declared: the application is spoken to as its caller speaks.
    api["spec"]["ports"][0]["name"] = json!("main");
    let world = World::new(&[pod("web", "web-1", 2), api, service("api", "api", 1)]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    let open = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&open);
    world.raw_app(app_at(3), move |stream, _| {
        count.fetch_add(1, Ordering::Relaxed);
        let count = Arc::clone(&count);
        tokio::spawn(async move {
            let mut codec = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = codec.accept().await {
                tokio::spawn(async move {
                    sleep(Duration::from_secs(if request.uri().path() == "/slow" { 200 } else { 0 })).await;
                    respond.send_response(Response::new(()), true).unwrap();
                });
            }
            count.fetch_sub(1, Ordering::Relaxed);
        });
    });
    let pass = async |seconds: u64| {
        for _ in 0..seconds / 2 {
            sleep(Duration::from_secs(2)).await;
            api.pool.sweep();
        }
    };
    let call = async |path: &str| ask_h2(world.connect(&web, vip(1)), get(path)).await.status;
    for _ in 0..3 {
        assert_eq!(call("/").await, 200);
        pass(50).await;
        assert_eq!(open.load(Ordering::Relaxed), 1, "it is used now and then");
    }
    let (slow, ()) = tokio::join!(call("/slow"), pass(190));
    assert_eq!((slow, open.load(Ordering::Relaxed)), (200, 1), "it is in use");
    pass(70).await;
    assert_eq!(open.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_dial_that_fails_hears_it_together_with_who_dials() {
    let (world, web) = pair(100);
    world.slow(app_at(3), Duration::from_secs(60));
    let begun = Instant::now();
    // By its address, so that nothing is tried again.
    let heard = join_all((0..20).map(|_| ask(world.connect(&web, app_at(3)), get("/")))).await;
    assert!(heard.iter().all(|heard| heard.reason() == "connect_timeout"), "{heard:?}");
    assert!(begun.elapsed() < Duration::from_secs(7), "{:?}", begun.elapsed());
    assert_eq!(world.dialled().len(), 1);
}
