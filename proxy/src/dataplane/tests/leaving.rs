//! Callers in HTTP/1 that leave while their answer is made: they are missed, and the application is told.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::attacks::open_pair;
use super::world::{World, app_at, over_tcp, told, vip};
use crate::dataplane::Proxy;

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: api.shop\r\n\r\n";
const POST: &[u8] = b"POST / HTTP/1.1\r\nHost: api.shop\r\nContent-Length: 100000000\r\n\r\n";
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const EVENTS: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n5\r\nevent\r\n";

/// Two sidecars, and an application that tells of each connection how it begins and that it ended.
struct Pair {
    world: World,
    web: Arc<Proxy>,
    api: Arc<Proxy>,
    seen: mpsc::UnboundedReceiver<String>,
}

impl Pair {
    /// The application hears on, or only the head, and says `first` at once and `last` after `pause`.
    fn new(reads: bool, first: &'static [u8], pause: Duration, last: &'static [u8]) -> Self {
        let (world, web, api) = open_pair("http", &json!({}));
        let (tell, seen) = mpsc::unbounded_channel();
        world.raw_app(app_at(3), move |mut stream, _| {
            let tell = tell.clone();
            tokio::spawn(async move {
                let mut head = vec![0; 4_096];
                let length = stream.read(&mut head).await.unwrap();
                tell.send(String::from_utf8_lossy(&head[..length]).into_owned()).ok();
                stream.write_all(first).await.unwrap();
                let (mut read, mut write) = tokio::io::split(stream);
                let says = async {
                    sleep(pause).await;
                    write.write_all(last).await.ok();
                    std::future::pending::<()>().await;
                };
                let hears = async {
                    let mut rest = Vec::new();
                    if reads {
                        read.read_to_end(&mut rest).await.ok();
                    } else {
                        std::future::pending::<()>().await;
                    }
                };
                tokio::select! {
                    () = says => {}
                    () = hears => {}
                }
                tell.send("its end".to_owned()).ok();
            });
        });
        Self { world, web, api, seen }
    }

    async fn caller(&self) -> TcpStream {
        let (client, served) = over_tcp().await;
        self.world.serve(&self.web, vip(1), Box::new(served));
        client
    }

    async fn seen(&mut self) -> String {
        timeout(Duration::from_secs(10), self.seen.recv()).await.expect("nothing was seen").unwrap()
    }

    /// Both sidecars tell of a caller that left, before somebody's patience is over.
    async fn left(&self) {
        for (proxy, direction) in [(&self.web, "outbound"), (&self.api, "inbound")] {
            let begun = Instant::now();
            let is_told = || {
                let metrics = proxy.telemetry.metrics.render();
                metrics.lines().any(|line| {
                    line.starts_with("outrigger_requests_total") && line.contains(direction) && line.contains("caller_left")
                })
            };
            while !is_told() && begun.elapsed() < Duration::from_secs(10) {
                sleep(Duration::from_millis(10)).await;
            }
            told(proxy, &["outrigger_requests_total", direction, "reason=\"caller_left\""]);
        }
    }
}

const LONG: Duration = Duration::from_secs(3_600);

fn reset(client: TcpStream) {
    client.set_zero_linger().unwrap();
    drop(client);
}

#[tokio::test]
async fn a_caller_that_resets_its_connection_is_missed_at_once_and_the_application_is_told() {
    for first in [b"".as_slice(), EVENTS] {
        let mut pair = Pair::new(true, first, LONG, b"");
        let mut client = pair.caller().await;
        client.write_all(GET).await.unwrap();
        assert!(pair.seen().await.starts_with("GET / HTTP/1.1\r\n"));
        if !first.is_empty() {
            assert!(client.read(&mut [0; 512]).await.unwrap() > 0);
        }
        let left = Instant::now();
        reset(client);
        assert_eq!(pair.seen().await, "its end");
        assert!(left.elapsed() < Duration::from_secs(1), "{:?}", left.elapsed());
        pair.left().await;
    }
}

/// Nobody is woken by an end behind bytes that nobody reads.
#[tokio::test]
async fn a_caller_that_sent_the_next_request_ahead_or_whose_body_is_not_taken_is_missed_soon() {
    let mut pair = Pair::new(true, b"", LONG, b"");
    let mut client = pair.caller().await;
    client.write_all(GET).await.unwrap();
    pair.seen().await;
    client.write_all(GET).await.unwrap();
    sleep(Duration::from_millis(100)).await;
    reset(client);
    assert_eq!(pair.seen().await, "its end");
    pair.left().await;

    let mut pair = Pair::new(false, b"", LONG, b"");
    let mut client = pair.caller().await;
    client.write_all(POST).await.unwrap();
    pair.seen().await;
    let fills = async { while client.write_all(&[b'b'; 65_536]).await.is_ok() {} };
    timeout(Duration::from_secs(1), fills).await.expect_err("the application takes nothing");
    reset(client);
    pair.left().await;
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_only_sends_no_more_has_its_answer_and_is_not_waited_for_without_end() {
    let pair = Pair::new(true, b"", Duration::from_secs(4), ANSWER);
    let mut client = pair.caller().await;
    client.write_all(GET).await.unwrap();
    client.shutdown().await.unwrap();
    let mut heard = String::new();
    client.read_to_string(&mut heard).await.unwrap();
    assert!(heard.starts_with("HTTP/1.1 200 OK\r\n") && heard.ends_with("ok"), "{heard}");

    let mut pair = Pair::new(true, b"", LONG, b"");
    let mut client = pair.caller().await;
    client.write_all(GET).await.unwrap();
    client.shutdown().await.unwrap();
    let begun = Instant::now();
    pair.seen().await;
    assert_eq!(pair.seen().await, "its end");
    assert!((4..8).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    pair.left().await;
    assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_goes_on_has_no_end_for_a_caller_that_sends_no_more() {
    let (world, web, _api) = open_pair("http", &json!({}));
    world.raw_app(app_at(3), |mut stream, _| {
        tokio::spawn(async move {
            assert!(stream.read(&mut [0; 4_096]).await.unwrap() > 0);
            stream.write_all(EVENTS).await.unwrap();
            for _ in 0..20 {
                sleep(Duration::from_secs(3)).await;
                stream.write_all(b"5\r\nevent\r\n").await.unwrap();
            }
            stream.write_all(b"0\r\n\r\n").await.unwrap();
            stream.read_to_end(&mut Vec::new()).await.ok();
        });
    });
    let (mut client, served) = over_tcp().await;
    world.serve(&web, vip(1), Box::new(served));
    client.write_all(GET).await.unwrap();
    client.shutdown().await.unwrap();
    let mut heard = String::new();
    client.read_to_string(&mut heard).await.unwrap();
    assert_eq!(heard.matches("event\r\n").count(), 21, "{heard}");
}

/// What it sent is read first, however slowly it is taken.
#[tokio::test]
async fn a_caller_whose_body_is_whole_and_who_sends_no_more_is_heard_to_the_end() {
    let (world, web, _api) = open_pair("http", &json!({}));
    world.raw_app(app_at(3), |mut stream, _| {
        tokio::spawn(async move {
            let mut read = Vec::new();
            while !read.ends_with(b"!") {
                sleep(Duration::from_millis(40)).await;
                stream.read_buf(&mut read).await.unwrap();
            }
            stream.write_all(ANSWER).await.unwrap();
            stream.read_to_end(&mut Vec::new()).await.ok();
        });
    });
    let (mut client, served) = over_tcp().await;
    world.serve(&web, vip(1), Box::new(served));
    let body = [vec![b'b'; 2 << 20], b"!".to_vec()].concat();
    let head = format!("POST / HTTP/1.1\r\nHost: api.shop\r\nContent-Length: {}\r\n\r\n", body.len());
    client.write_all(head.as_bytes()).await.unwrap();
    client.write_all(&body).await.unwrap();
    client.shutdown().await.unwrap();
    let mut heard = String::new();
    timeout(Duration::from_secs(60), client.read_to_string(&mut heard)).await.expect("an end").unwrap();
    assert!(heard.starts_with("HTTP/1.1 200 OK\r\n"), "{heard}");
}
