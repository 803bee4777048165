//! Answers on the connections that a sidecar opens: how fast they come to those who read, and how much is held for those who do
//! not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use h2::RecvStream;
use h2::client::SendRequest;
use http::{Request, Response};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::attacks::open_pair;
use super::world::{World, app_at, document};
use crate::dataplane::Proxy;

const MIB: usize = 1 << 20;
/// What a connection may always send, and what a stream may.
const BASE: usize = MIB;
const STREAM: usize = 256 << 10;
/// What `/large` is answered with.
const LARGE: usize = 4 * MIB;

/// What an application sent, on how many connections.
#[derive(Debug, Default)]
struct App {
    sent: AtomicUsize,
    connections: AtomicUsize,
}

impl App {
    fn sent(&self) -> usize {
        self.sent.load(Ordering::Relaxed)
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

/// A sidecar that takes requests from everybody, before an application of HTTP/2 that is so far away.
fn world(limits: &Value, away: Duration) -> (World, Arc<Proxy>, Arc<App>) {
    let (world, _web, api) = open_pair("http2", limits);
    let app = Arc::<App>::default();
    let told = Arc::clone(&app);
    let large = Bytes::from(vec![b'a'; LARGE]);
    world.raw_app(app_at(3), move |stream, _| {
        let (near, far) = tokio::io::duplex(64 * MIB);
        let (from, to) = tokio::io::split(stream);
        let (from_app, to_app) = tokio::io::split(near);
        told.connections.fetch_add(1, Ordering::Relaxed);
        relay(from, to_app, away, Arc::default());
        relay(from_app, to, away, Arc::clone(&told));
        let large = large.clone();
        tokio::spawn(async move {
            let mut codec = h2::server::Builder::new();
            codec.max_concurrent_streams(64);
            let mut codec = codec.handshake::<_, Bytes>(far).await.unwrap();
            while let Some(Ok((request, mut respond))) = codec.accept().await {
                if request.uri().path() == "/close" {
                    // What was handed to the codec goes out before.
                    codec.abrupt_shutdown(h2::Reason::NO_ERROR);
                    continue;
                }
                let body = if request.uri().path() == "/large" { large.clone() } else { Bytes::from_static(b"small") };
                respond.send_response(Response::new(()), false).unwrap().send_data(body, true).unwrap();
            }
        });
    });
    (world, api, app)
}

/// Passes bytes on, each of them so much later, and counts them.
fn relay(
    mut from: impl AsyncRead + Send + Unpin + 'static,
    mut to: impl AsyncWrite + Send + Unpin + 'static,
    later: Duration,
    app: Arc<App>,
) {
    let (pass, mut passed) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    tokio::spawn(async move {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(length @ 1..) = from.read(&mut bytes).await {
            app.sent.fetch_add(length, Ordering::Relaxed);
            pass.send((Instant::now() + later, bytes[..length].to_vec())).unwrap();
        }
    });
    tokio::spawn(async move {
        while let Some((due, bytes)) = passed.recv().await {
            sleep_until(due).await;
            to.write_all(&bytes).await.unwrap_or_default();
        }
        to.shutdown().await.unwrap_or_default();
    });
}

/// A client whose streams are granted so much.
async fn client(world: &World, api: &Arc<Proxy>, window: u32) -> (SendRequest<Bytes>, JoinHandle<()>) {
    let io = world.connect_inbound(api, app_at(3));
    let mut codec = h2::client::Builder::new();
    codec.initial_window_size(window).initial_connection_window_size(1 << 30);
    let (sender, connection) = codec.handshake(io).await.unwrap();
    (sender, tokio::spawn(async move { drop(connection.await) }))
}

/// The answer to a request, of which nothing was read.
async fn begun(sender: &SendRequest<Bytes>, path: &str) -> RecvStream {
    let mut sender = sender.clone().ready().await.unwrap();
    let (answer, _) = sender.send_request(Request::get(format!("http://api.shop{path}")).body(()).unwrap(), true).unwrap();
    timeout(Duration::from_secs(10), answer).await.expect("an answer").unwrap().into_body()
}

/// How long what is left of an answer is.
async fn read(mut body: RecvStream) -> usize {
    let mut length = 0;
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        length += data.len();
        body.flow_control().release_capacity(data.len()).unwrap_or_default();
    }
    length
}

fn granted(proxy: &Proxy) -> usize {
    usize::try_from(proxy.telemetry.metrics.answers_granted.get()).unwrap()
}

/// On a connection that is granted the windows of all its streams at once each of these takes 21 round trips, for the codec grants
/// anew when half of a window is read. Two more are for what many have to be granted first.
#[tokio::test(start_paused = true)]
async fn who_reads_is_answered_as_fast_as_the_windows_of_streams_allow() {
    for streams in [16, 64] {
        let (world, api, _app) = world(&json!({}), Duration::from_millis(10));
        let (sender, _driven) = client(&world, &api, 1 << 24).await;
        assert_eq!(read(begun(&sender, "/").await).await, 5);
        let started = Instant::now();
        let read = join_all((0..streams).map(async |_| read(begun(&sender, "/large").await).await)).await;
        let long = started.elapsed();
        assert!(read.iter().all(|length| *length == LARGE));
        assert!(long <= 23 * Duration::from_millis(20), "{streams} streams took {long:?}");
    }
}

/// As many answers that nobody reads, each connection of the client with some of them.
async fn stuck(world: &World, api: &Arc<Proxy>, clients: usize, answers: usize) -> Vec<(Vec<RecvStream>, JoinHandle<()>)> {
    let mut all = Vec::new();
    for _ in 0..clients {
        let (sender, driven) = client(world, api, 0).await;
        all.push((join_all((0..answers).map(|_| begun(&sender, "/large"))).await, driven));
    }
    sleep(Duration::from_secs(1)).await;
    all
}

#[tokio::test(start_paused = true)]
async fn what_nobody_reads_is_bounded_for_the_whole_sidecar() {
    let limit = 16 * MIB;
    let (world, api, app) = world(&json!({ "answerBytes": limit }), Duration::ZERO);
    let stuck = stuck(&world, &api, 20, 30).await;
    let (connections, sent) = (app.connections(), app.sent());
    assert_eq!(connections, 10);
    // Frames have heads, and so have answers.
    assert!(sent <= connections * BASE + limit + MIB / 4, "{sent}");
    assert!(sent > connections * BASE + limit - MIB, "the credit is used: {sent}");
    assert!((limit - STREAM..=limit).contains(&granted(&api)), "{}", granted(&api));
    // Whoever leaves, leaves what it held to the others.
    drop(stuck);
    let (sender, _driven) = client(&world, &api, 1 << 24).await;
    let read = join_all((0..64).map(async |_| read(begun(&sender, "/large").await).await));
    let read = timeout(Duration::from_secs(10), read).await.expect("they are served");
    assert!(read.iter().all(|length| *length == LARGE));
    // What is granted comes back with connections that nobody uses.
    sleep(Duration::from_secs(60)).await;
    api.pool.sweep();
    sleep(Duration::from_secs(61)).await;
    api.pool.sweep();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(granted(&api), 0);
}

/// Readers of HTTP/2 that grant nothing, or next to nothing, and of HTTP/1 that do not read.
#[tokio::test(start_paused = true)]
async fn answers_that_nobody_reads_do_not_stall_the_next_of_their_connection() {
    let (world, api, app) = world(&json!({}), Duration::ZERO);
    let mut stuck = Vec::new();
    let mut silent = Vec::new();
    let (reader, _driven) = client(&world, &api, 1 << 24).await;
    for count in 0..20 {
        for window in [0, 65_535] {
            let (sender, driven) = client(&world, &api, window).await;
            stuck.push((window, begun(&sender, "/large").await, driven));
        }
        let mut io = world.connect_inbound(&api, app_at(3));
        io.write_all(b"GET /large HTTP/1.1\r\nhost: api.shop\r\n\r\n").await.unwrap();
        silent.push(io);
        sleep(Duration::from_millis(10)).await;
        let served = timeout(Duration::from_secs(1), async { read(begun(&reader, "/large").await).await });
        assert_eq!(served.await.unwrap_or_else(|_| panic!("{count} are stuck")), LARGE);
    }
    assert!(granted(&api) >= 60 * STREAM, "{}", granted(&api));
    assert_eq!(app.connections(), 1);
    // Who begins to read, and may be sent something, has all of it.
    for (_, body, _driven) in stuck.into_iter().filter(|(window, ..)| *window > 0) {
        assert_eq!(timeout(Duration::from_secs(1), read(body)).await.unwrap(), LARGE);
    }
}

/// What came on connections that ended is still held for who may read it.
#[tokio::test(start_paused = true)]
async fn connections_that_end_before_their_answers_are_read_keep_their_credit() {
    let limit = 8 * MIB;
    let (world, api, app) = world(&json!({ "answerBytes": limit }), Duration::ZERO);
    let mut all = Vec::new();
    for round in 1..=6 {
        all.push(stuck(&world, &api, 1, 40).await);
        let (sender, _driven) = client(&world, &api, 65_535).await;
        let mut sender = sender.ready().await.unwrap();
        let (answer, _) = sender.send_request(Request::get("http://api.shop/close").body(()).unwrap(), true).unwrap();
        drop(timeout(Duration::from_secs(10), answer).await);
        sleep(Duration::from_secs(1)).await;
        let (connections, sent) = (app.connections(), app.sent());
        assert!(connections >= round, "{connections}");
        assert!(sent <= connections * BASE + limit + MIB / 4, "{round}: {sent} on {connections}");
    }
    drop(all);
    sleep(Duration::from_secs(1)).await;
    assert!(granted(&api) <= 3 * MIB, "{}", granted(&api));
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_changes_holds_for_connections_that_stand() {
    let (mut world, api, app) = world(&json!({ "answerBytes": 0 }), Duration::ZERO);
    let _stuck = stuck(&world, &api, 1, 40).await;
    assert!(app.sent() <= BASE + STREAM / 4, "{app:?}");
    world.change(&document("Mesh", "mesh", json!({ "limits": { "answerBytes": 4 * MIB } })), &api, "api-1");
    sleep(Duration::from_secs(1)).await;
    assert!((5 * MIB - STREAM..=5 * MIB + STREAM / 4).contains(&app.sent()), "{app:?}");
}
