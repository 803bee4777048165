//! Connections in HTTP/1 that clients of HTTP/2 make their sidecar open: how many there are, and who waits for one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use h2::client::SendRequest;
use http::{Request, Response};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::{Instant, sleep, timeout};

use super::attacks::open_pair;
use super::world::{World, app_at, ask, document, get, vip};
use crate::dataplane::Proxy;

/// How long the application takes to answer.
const SLOW: Duration = Duration::from_secs(1);
/// Requests of one client at once.
const MANY: usize = 100;
const WAITING_MAX: usize = 1_024;

/// Connections of the application: how many there are, and how many there ever were at once.
#[derive(Debug, Default)]
struct Open {
    now: AtomicUsize,
    most: AtomicUsize,
}

/// A pair with a limit, before an application of HTTP/1 that keeps its connections, or closes each after its answer. `/chat` is
/// a tunnel.
fn world(connections: usize, keeps: bool) -> (World, Arc<Proxy>, Arc<Proxy>, Arc<Open>) {
    let limits = json!({ "upstreamConnections": connections, "concurrentStreams": 10_000 });
    let (world, web, api) = open_pair("http", &limits);
    let open = Arc::<Open>::default();
    let kept = Arc::clone(&open);
    world.raw_app(app_at(3), move |mut stream, _| {
        let open = Arc::clone(&kept);
        tokio::spawn(async move {
            let now = open.now.fetch_add(1, Ordering::Relaxed) + 1;
            open.most.fetch_max(now, Ordering::Relaxed);
            serve(&mut stream, keeps).await;
            open.now.fetch_sub(1, Ordering::Relaxed);
        });
    });
    (world, web, api, open)
}

async fn serve(stream: &mut DuplexStream, keeps: bool) {
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let Ok(byte) = stream.read_u8().await else { return };
            head.push(byte);
        }
        if head.starts_with(b"GET /chat") {
            let answer = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: echo\r\nconnection: Upgrade\r\n\r\n";
            stream.write_all(answer).await.unwrap();
            while matches!(stream.read(&mut [0; 64]).await, Ok(1..)) {}
            return;
        }
        // It leaves as soon as it is left.
        if timeout(SLOW, stream.read_u8()).await.is_ok() {
            return;
        }
        let connection = if keeps { "keep-alive" } else { "close" };
        let answer = format!("HTTP/1.1 200 OK\r\nconnection: {connection}\r\ncontent-length: 2\r\n\r\nok");
        if stream.write_all(answer.as_bytes()).await.is_err() || !keeps {
            return;
        }
    }
}

async fn client(door: DuplexStream) -> SendRequest<Bytes> {
    let (sender, connection) = h2::client::handshake(door).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    sender.ready().await.unwrap()
}

async fn ask_once(sender: &SendRequest<Bytes>) -> Response<h2::RecvStream> {
    let request = Request::get("http://api.shop/").body(()).unwrap();
    let (answer, _body) = sender.clone().ready().await.unwrap().send_request(request, true).unwrap();
    let (head, mut body) = answer.await.unwrap().into_parts();
    while let Some(Ok(data)) = body.data().await {
        body.flow_control().release_capacity(data.len()).unwrap();
    }
    Response::from_parts(head, body)
}

#[tokio::test(start_paused = true)]
async fn one_client_has_as_many_connections_as_the_limit_says_and_the_rest_of_its_requests_wait() {
    for keeps in [true, false] {
        for through_pair in [true, false] {
            let (world, web, api, open) = world(4, keeps);
            let door = if through_pair { world.connect(&web, vip(1)) } else { world.connect_inbound(&api, app_at(3)) };
            let sender = client(door).await;
            let begun = Instant::now();
            let heard = join_all((0..MANY).map(|_| ask_once(&sender))).await;
            assert!(heard.iter().all(|answer| answer.status() == 200));
            assert_eq!(open.most.load(Ordering::Relaxed), 4, "{keeps}");
            let long = begun.elapsed();
            assert!((SLOW * 25..SLOW * 26).contains(&long), "four at a time took {long:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn no_more_wait_for_a_connection_than_there_is_room_for() {
    let (world, _web, api, open) = world(100, true);
    let sender = client(world.connect_inbound(&api, app_at(3))).await;
    let begun = Instant::now();
    let one = async || {
        let answer = ask_once(&sender).await;
        (answer, begun.elapsed())
    };
    let mut all = join_all((0..100 + WAITING_MAX + 5).map(|_| one())).await;
    let refused: Vec<_> = all.extract_if(.., |(answer, _)| answer.status() == 503).collect();
    assert_eq!(refused.len(), 5);
    for (answer, long) in refused {
        assert_eq!(answer.headers()["outrigger-reason"], "breaker_rejected");
        assert!(long < SLOW, "{long:?}: it does not wait to be refused");
    }
    assert!(all.iter().all(|(answer, _)| answer.status() == 200), "whoever waits is served");
    assert_eq!(open.most.load(Ordering::Relaxed), 100);
}

#[tokio::test(start_paused = true)]
async fn other_clients_do_not_wait_behind_one_that_has_all_of_its_connections() {
    let (world, web, api, _open) = world(4, true);
    let sender = client(world.connect_inbound(&api, app_at(3))).await;
    let busy = tokio::spawn(async move { join_all((0..MANY).map(|_| ask_once(&sender))).await.len() });
    sleep(SLOW / 2).await;
    let other = timeout(SLOW + SLOW / 10, ask(world.connect(&web, vip(1)), get("/"))).await.expect("at once");
    assert_eq!(other.status, 200);
    assert_eq!(busy.await.unwrap(), MANY);
}

#[tokio::test(start_paused = true)]
async fn who_waits_behind_a_tunnel_is_served_when_it_ends() {
    let (world, _web, api, open) = world(1, true);
    let mut tunnel = world.connect_inbound(&api, app_at(3));
    let asks = b"GET /chat HTTP/1.1\r\nHost: api.shop\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n";
    tunnel.write_all(asks).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(tunnel.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
    let waits = tokio::spawn(ask(world.connect_inbound(&api, app_at(3)), get("/")));
    sleep(10 * SLOW).await;
    assert!(!waits.is_finished());
    drop(tunnel);
    assert_eq!(timeout(2 * SLOW, waits).await.expect("the place is free").unwrap().status, 200);
    assert_eq!(open.most.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn those_who_leave_while_they_wait_take_nothing_with_them() {
    let (world, _web, api, open) = world(2, true);
    for _ in 0..20 {
        let sender = client(world.connect_inbound(&api, app_at(3))).await;
        let leaves = tokio::spawn(async move { join_all((0..MANY).map(|_| ask_once(&sender))).await.len() });
        sleep(SLOW * 3 / 2).await;
        leaves.abort();
    }
    sleep(SLOW).await;
    let sender = client(world.connect_inbound(&api, app_at(3))).await;
    let heard = timeout(SLOW * 12, join_all((0..20).map(|_| ask_once(&sender)))).await.expect("both connections are there");
    assert!(heard.iter().all(|answer| answer.status() == 200));
    assert_eq!(open.most.load(Ordering::Relaxed), 2);
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_is_raised_holds_for_those_who_wait() {
    let (mut world, _web, api, open) = world(1, true);
    let sender = client(world.connect_inbound(&api, app_at(3))).await;
    let busy = tokio::spawn(async move { join_all((0..MANY).map(|_| ask_once(&sender))).await.len() });
    sleep(SLOW / 2).await;
    assert_eq!(open.now.load(Ordering::Relaxed), 1);
    let limits = json!({ "limits": { "upstreamConnections": 50, "concurrentStreams": 10_000 } });
    world.change(&document("Mesh", "mesh", limits), &api, "api-1");
    sleep(SLOW / 10).await;
    assert_eq!(open.now.load(Ordering::Relaxed), 50);
    assert_eq!(busy.await.unwrap(), MANY);
}
