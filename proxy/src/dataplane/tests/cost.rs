//! What a request costs in memory: allocations while it passes, and the size of what is kept for it.
#![expect(unsafe_code, reason = "an allocator is unsafe to write; this one only counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use super::world::{World, app_at, document, get, pod, service, text, vip};
use crate::dataplane::connection::{inbound, outbound};
use crate::dataplane::http::{attempt, pipeline};
use crate::dataplane::pool::Pool;

/// The system's allocator, counted for each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    /// Bytes that are allocated.
    static HELD: Cell<usize> = const { Cell::new(0) };
}

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get().wrapping_add(1));
        HELD.set(HELD.get().wrapping_add(layout.size()));
        // SAFETY: as our caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        HELD.set(HELD.get().wrapping_sub(layout.size()));
        // SAFETY: as our caller promises.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get().wrapping_add(1));
        HELD.set(HELD.get().wrapping_sub(layout.size()).wrapping_add(size));
        // SAFETY: as our caller promises.
        unsafe { System.realloc(place, layout, size) }
    }
}

/// What an asynchronous function keeps while it runs.
fn kept<A, B, C, D, F: Future>(_function: impl Fn(A, B, C, D) -> F) -> usize {
    size_of::<F>()
}

#[tokio::test(start_paused = true)]
async fn a_request_through_the_pair_allocates_no_more_than_it_did() {
    let world = World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), service("api", "api", 1)]);
    let web = world.sidecar("web", "web-1", 2);
    world.sidecar("api", "api-1", 3);
    world.app(app_at(3), |_| text("api"));
    let io = TokioIo::new(world.connect(&web, vip(1)));
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let mut ask = async |count: u64| {
        let before = ALLOCATIONS.get();
        for _ in 0..count {
            sender.ready().await.unwrap();
            let answer = sender.send_request(get("/")).await.unwrap();
            assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "api");
        }
        (ALLOCATIONS.get() - before) / count
    };
    ask(200).await;
    let each = ask(200).await;
    assert!(each <= ALLOCATIONS_MAX, "{each} allocations, client and application among them");
}

/// Each turn of a connection's task ends with asking for bytes that are not there.
#[tokio::test(start_paused = true)]
async fn each_end_of_a_link_has_two_turns_for_a_request() {
    let world = World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), service("api", "api", 1)]);
    let web = world.sidecar("web", "web-1", 2);
    world.sidecar("api", "api-1", 3);
    world.app(app_at(3), |_| text("api"));
    let io = TokioIo::new(world.connect(&web, vip(1)));
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let mut asked = Vec::new();
    for _ in 0..20 {
        let [near, far] = world.asked();
        sender.ready().await.unwrap();
        let answer = sender.send_request(get("/")).await.unwrap();
        assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "api");
        tokio::time::sleep(Duration::from_millis(1)).await;
        let now = world.asked();
        asked.push([now[0] - near, now[1] - far]);
    }
    // In one turn there are bytes before that, and in the other there are none.
    assert_eq!(asked[10..], [[2 + 1, 2 + 1]; 10]);
}

#[test]
fn what_is_kept_for_a_request_is_small() {
    let kept = kept(pipeline::handle);
    assert!(kept <= KEPT_MAX, "{kept} bytes beside the line itself, which is boxed");
}

/// Both are a part of the line, which is boxed once for each request.
#[test]
fn what_is_kept_for_an_attempt_is_small() {
    fn of_attempt<A, B, C, D, E, F, G, O: Future>(_function: impl Fn(A, B, C, D, E, F, G) -> O) -> usize {
        size_of::<O>()
    }
    fn of_sending<A, B, C, D, E, F, O: Future>(_function: impl Fn(A, B, C, D, E, F) -> O) -> usize {
        size_of::<O>()
    }
    let (attempt, sending) = (of_attempt(attempt::attempt), of_sending(Pool::send));
    assert!(attempt <= ATTEMPT_MAX && sending <= SENDING_MAX, "{attempt} bytes, {sending} of them to send");
}

#[tokio::test(start_paused = true)]
async fn a_connection_at_rest_keeps_little() {
    let world = World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), service("api", "api", 1)]);
    let web = world.sidecar("web", "web-1", 2);
    world.sidecar("api", "api-1", 3);
    world.app(app_at(3), |_| text("api"));
    let open = async || {
        let mut stream = world.connect(&web, vip(1));
        stream.write_all(b"GET / HTTP/1.1\r\nhost: api.shop\r\n\r\n").await.unwrap();
        let mut heard = Vec::new();
        while !heard.ends_with(b"api") {
            assert_ne!(stream.read_buf(&mut heard).await.unwrap(), 0);
        }
        stream
    };
    // Pools and caches are filled, and the pools' connections are gone again.
    let first = open().await;
    tokio::time::sleep(AT_REST).await;
    // What is kept once, such as a table that grows or another link, is in one of the rounds, and what each connection keeps in both.
    let mut rounds = Vec::new();
    let mut streams = Vec::new();
    for _round in 0..2 {
        let before = HELD.get();
        for _ in 0..CONNECTIONS {
            streams.push(open().await);
        }
        let each = || HELD.get().saturating_sub(before) / CONNECTIONS;
        let busy = each();
        tokio::time::sleep(AT_REST).await;
        rounds.push((each(), busy, world.dialled().len()));
    }
    // What the test has of a connection in memory is among it.
    let rested = rounds.iter().map(|(rested, ..)| *rested).min();
    assert!(rested <= Some(RESTED_MAX), "bytes each at rest, and before; links so far: {rounds:?}");
    drop((first, streams));
}

/// Nobody says what the port speaks, and nobody says anything on it: client and server are both listened to.
#[tokio::test(start_paused = true)]
async fn a_silent_connection_of_an_undeclared_port_keeps_little() {
    let undeclared = |mut pod: serde_json::Value| {
        pod["spec"]["ports"] = json!([]);
        pod
    };
    let mut alone = undeclared(pod("old", "old-1", 4));
    alone["spec"]["transport"] = json!("Plaintext");
    let world = World::new(&[
        pod("web", "web-1", 2),
        undeclared(pod("api", "api-1", 3)),
        service("api", "api", 1),
        alone,
        service("old", "old", 2),
        document("PeerAuthentication", "open", json!({ "mode": "Permissive" })),
    ]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    for last in [3, 4] {
        world.raw_app(app_at(last), |mut stream, _| {
            tokio::spawn(async move { drop(stream.read(&mut [0; 1]).await) });
        });
    }
    let ways: [(&str, usize, &dyn Fn() -> DuplexStream); 3] = [
        ("in", SILENT_IN_MAX, &|| world.connect_inbound(&api, app_at(3))),
        ("out", SILENT_OUT_MAX, &|| world.connect(&web, vip(2))),
        ("over a link, at both of its ends", SILENT_LINK_MAX, &|| world.connect(&web, vip(1))),
    ];
    for (way, most, open) in ways {
        // Caches are filled.
        let first = open();
        tokio::time::sleep(AT_REST).await;
        let before = HELD.get();
        let streams: Vec<_> = (0..CONNECTIONS).map(|_| open()).collect();
        tokio::time::sleep(AT_REST).await;
        let each = (HELD.get() - before) / CONNECTIONS;
        // What the test and the application have of a connection in memory is among it.
        assert!(each <= most, "{way}: {each} bytes each");
        drop((first, streams));
        tokio::time::sleep(AT_REST).await;
    }
}

#[test]
fn what_is_kept_of_a_connection_is_small() {
    fn kept<A, B, F: Future>(_function: impl Fn(A, B) -> F) -> usize {
        size_of::<F>()
    }
    let sizes = [kept(outbound), kept(inbound)];
    assert!(sizes.iter().all(|size| *size <= CONNECTION_MAX), "{sizes:?} bytes");
}

/// Longer than it takes to come to rest, shorter than links are kept.
const AT_REST: Duration = Duration::from_secs(3);
const CONNECTIONS: usize = 100;
const RESTED_MAX: usize = 1_900;
/// A few more than were measured; over a link both ends have what a session of TLS keeps.
const SILENT_IN_MAX: usize = 7_500;
const SILENT_OUT_MAX: usize = 5_300;
const SILENT_LINK_MAX: usize = 70_000;
const CONNECTION_MAX: usize = 850;
/// A few more than were measured.
const ALLOCATIONS_MAX: u64 = 70;
const KEPT_MAX: usize = 1_400;
const ATTEMPT_MAX: usize = 4_700;
const SENDING_MAX: usize = 3_200;
