//! What clients of HTTP/2 send and nobody takes: how much of it a sidecar holds, and what becomes of it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, SendStream};
use http::{Request, Response};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::attacks::{DATA, END_HEADERS, HEADERS, SETTINGS, frame, open_pair, preface};
use super::world::{World, app_at, ask_h2, document, get};
use crate::dataplane::Proxy;

const WINDOW_UPDATE: u8 = 8;
const MIB: usize = 1 << 20;
/// What a connection and a stream may always send.
const BASE: usize = MIB;
const STREAM: usize = 256 << 10;
const PIECE: usize = 16_000;
/// `:method POST`, `:scheme http`, `:path /stuck`, `:authority api.shop`.
const STUCK: &[u8] = b"\x83\x86\x04\x06/stuck\x01\x08api.shop";

/// What the application does with bodies at `/stuck`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Order {
    Nothing,
    Read,
    Answer,
}

/// A sidecar that takes requests from everybody, before an application of HTTP/2 that grants each stream so much.
fn world(limit: usize, window: u32) -> (World, Arc<Proxy>, watch::Sender<Order>) {
    let (world, _web, api) = open_pair("http2", &json!({ "uploadBytes": limit }));
    let (order, orders) = watch::channel(Order::Nothing);
    world.raw_app(app_at(3), move |stream, _| {
        let orders = orders.clone();
        tokio::spawn(async move {
            let mut codec = h2::server::Builder::new();
            codec.initial_window_size(window).initial_connection_window_size(1 << 30);
            let mut codec = codec.handshake::<_, Bytes>(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = codec.accept().await {
                let mut orders = orders.clone();
                tokio::spawn(async move {
                    let stuck = request.uri().path() == "/stuck";
                    let mut body = request.into_body();
                    let waited = orders.wait_for(|order| !stuck || *order != Order::Nothing).await.map(|order| *order);
                    if waited.unwrap_or(Order::Answer) != Order::Answer {
                        while let Some(Ok(data)) = body.data().await {
                            body.flow_control().release_capacity(data.len()).unwrap();
                        }
                    }
                    drop(respond.send_response(Response::new(()), true));
                });
            }
        });
    });
    (world, api, order)
}

fn held(proxy: &Proxy) -> usize {
    usize::try_from(proxy.telemetry.metrics.uploads_held.get()).unwrap()
}

/// A client that sends all that it may.
struct Uploads {
    stream: DuplexStream,
    window: usize,
    left: Vec<usize>,
    sent: usize,
    heard: Vec<u8>,
}

impl Uploads {
    async fn begin(world: &World, api: &Arc<Proxy>, streams: usize) -> Self {
        let stream = world.connect_inbound(api, app_at(3));
        let mut uploads = Self { stream, window: 65_535, left: Vec::new(), sent: 0, heard: Vec::new() };
        uploads.stream.write_all(&[preface(&[]), frame(SETTINGS, 1, 0, &[])].concat()).await.unwrap();
        uploads.hear().await;
        for index in 0..streams {
            uploads.stream.write_all(&frame(HEADERS, END_HEADERS, id(index), STUCK)).await.unwrap();
        }
        uploads.left = vec![STREAM; streams];
        uploads.send().await;
        uploads
    }

    async fn send(&mut self) {
        loop {
            for index in 0..self.left.len() {
                while self.window >= PIECE && self.left[index] >= PIECE {
                    self.stream.write_all(&frame(DATA, 0, id(index), &[b'x'; PIECE])).await.unwrap();
                    self.window -= PIECE;
                    self.left[index] -= PIECE;
                    self.sent += PIECE;
                }
            }
            if !self.hear().await {
                return;
            }
        }
    }

    /// Is there anything to hear within a second?
    async fn hear(&mut self) -> bool {
        let Ok(read) = timeout(Duration::from_secs(1), self.stream.read_buf(&mut self.heard)).await else { return false };
        assert!(read.unwrap() > 0, "the connection lives");
        while let Some(length) = self.heard.get(..9).map(|head| usize::from(head[1]) << 8 | usize::from(head[2])) {
            if self.heard.len() < 9 + length {
                break;
            }
            let bytes: Vec<u8> = self.heard.drain(..9 + length).collect();
            if bytes[3] == WINDOW_UPDATE && bytes[5..9] == [0; 4] {
                self.window += usize::try_from(u32::from_be_bytes(bytes[9..13].try_into().unwrap())).unwrap();
            }
        }
        true
    }
}

fn id(index: usize) -> u32 {
    u32::try_from(index * 2 + 1).unwrap()
}

#[tokio::test(start_paused = true)]
async fn what_nobody_takes_is_bounded_for_the_whole_sidecar() {
    const CONNECTIONS: usize = 20;
    let limit = 8 * MIB;
    let (world, api, _order) = world(limit, 0);
    let mut all = Vec::new();
    for _ in 0..CONNECTIONS {
        all.push(Uploads::begin(&world, &api, 64).await);
    }
    let sent: usize = all.iter().map(|uploads| uploads.sent).sum();
    let granted: usize = all.iter().map(|uploads| uploads.sent + uploads.window).sum();
    assert!(granted <= CONNECTIONS * BASE + limit, "{granted}");
    assert!(sent > CONNECTIONS * (BASE - PIECE) + limit - MIB, "the credit is used: {sent}");
    assert!((limit - MIB..=limit).contains(&held(&api)), "{}", held(&api));
    // Others are served, and so is what has no body on a connection that holds much.
    assert_eq!(ask_h2(world.connect_inbound(&api, app_at(3)), get("/")).await.status, 200);
    drop(all);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(held(&api), 0);
}

/// A client that leaves windows to its codec.
async fn client(world: &World, api: &Arc<Proxy>) -> (SendRequest<Bytes>, JoinHandle<()>) {
    let io = world.connect_inbound(api, app_at(3));
    let (sender, connection) = h2::client::Builder::new().max_send_buffer_size(64 * MIB).handshake(io).await.unwrap();
    (sender, tokio::spawn(async move { drop(connection.await) }))
}

fn post(sender: &mut SendRequest<Bytes>, path: &str, length: usize) -> (ResponseFuture, SendStream<Bytes>) {
    let request = Request::post(format!("http://api.shop{path}")).body(()).unwrap();
    let (answer, mut body) = sender.send_request(request, false).unwrap();
    body.send_data(Bytes::from(vec![b'x'; length]), true).unwrap();
    (answer, body)
}

#[tokio::test(start_paused = true)]
async fn stuck_uploads_do_not_stall_the_next_of_their_connection() {
    let (world, api, _order) = world(64 * MIB, 65_535);
    let (mut sender, _driven) = client(&world, &api).await;
    let mut stuck = Vec::new();
    for count in 0..40 {
        stuck.push(post(&mut sender, "/stuck", MIB));
        sleep(Duration::from_millis(10)).await;
        let (answer, _body) = post(&mut sender, "/", 2 * STREAM);
        let answer = timeout(Duration::from_secs(1), answer).await.unwrap_or_else(|_| panic!("{count} are stuck"));
        assert_eq!(answer.unwrap().status(), 200);
    }
    assert!(held(&api) > 40 * STREAM / 2, "{}", held(&api));
}

#[tokio::test(start_paused = true)]
async fn what_was_held_is_given_back_however_a_request_ends() {
    for way in ["read", "answered", "taken back", "closed"] {
        let (world, api, order) = world(64 * MIB, 65_535);
        let (mut sender, driven) = client(&world, &api).await;
        let mut stuck: Vec<_> = (0..20).map(|_| post(&mut sender, "/stuck", MIB)).collect();
        sleep(Duration::from_secs(1)).await;
        assert!(held(&api) > 20 * STREAM / 2, "{way}: {}", held(&api));
        match way {
            "read" => order.send(Order::Read).unwrap(),
            "answered" => order.send(Order::Answer).unwrap(),
            "taken back" => stuck.iter_mut().for_each(|(_, body)| body.send_reset(Reason::CANCEL)),
            _ => driven.abort(),
        }
        sleep(Duration::from_secs(20)).await;
        assert_eq!(held(&api), 0, "{way}");
        if way != "closed" {
            let (answer, _body) = post(&mut sender, "/", MIB);
            assert_eq!(timeout(Duration::from_secs(1), answer).await.unwrap().unwrap().status(), 200, "{way}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_changes_holds_for_connections_that_stand() {
    let (mut world, api, _order) = world(0, 0);
    let mut standing = Uploads::begin(&world, &api, 64).await;
    assert!((BASE - PIECE..=BASE).contains(&standing.sent), "{}", standing.sent);
    let limits = |bytes: usize| document("Mesh", "mesh", json!({ "limits": { "uploadBytes": bytes } }));
    world.change(&limits(4 * MIB), &api, "api-1");
    standing.send().await;
    assert!((5 * MIB - PIECE..=5 * MIB).contains(&standing.sent), "{}", standing.sent);
    world.change(&limits(2 * MIB), &api, "api-1");
    let new = Uploads::begin(&world, &api, 64).await;
    assert!((BASE - PIECE..=BASE).contains(&new.sent), "{}", new.sent);
}
