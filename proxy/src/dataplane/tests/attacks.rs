//! Clients that cost more than they ask for: floods, bombs, and ones that stand still. Each is ended with a reason that is
//! told, while others are served by the same sidecar, and where it is one stream of many, by the same connection.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream};
use tokio::time::{Instant, sleep, timeout};

use super::world::{World, app_at, ask, document, get, pod, service, text, told, vip};
use crate::dataplane::Proxy;

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
pub(super) const END_STREAM: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
/// `:method GET`, `:scheme http`, `:path /`, `:authority api.shop` in HPACK.
pub(super) const HEAD: &[u8] = b"\x82\x86\x84\x01\x08api.shop";
/// The same with POST.
const POST_HEAD: &[u8] = b"\x83\x86\x84\x01\x08api.shop";

pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend_from_slice(&[kind, flags]);
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

pub(super) fn preface(settings: &[u8]) -> Vec<u8> {
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &frame(SETTINGS, 0, 0, settings)].concat()
}

/// The frames of a stream of bytes: type and payload.
pub(super) fn frames(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut frames = Vec::new();
    while bytes.len() >= 9 {
        let length = usize::from(bytes[0]) << 16 | usize::from(bytes[1]) << 8 | usize::from(bytes[2]);
        let Some(payload) = bytes.get(9..9 + length) else { break };
        frames.push((bytes[3], payload.to_vec()));
        bytes = &bytes[9 + length..];
    }
    frames
}

struct Bench {
    world: World,
    web: Arc<Proxy>,
    api: Arc<Proxy>,
}

/// Two sidecars that let everybody in, of which `web` calls `api` by this protocol.
pub(super) fn open_pair(protocol: &str, limits: &serde_json::Value) -> (World, Arc<Proxy>, Arc<Proxy>) {
    let mut declared = service("api", "api", 1);
    declared["spec"]["ports"][0]["appProtocol"] = json!(protocol);
    let world = World::new(&[
        pod("web", "web-1", 2),
        pod("api", "api-1", 3),
        declared,
        document("PeerAuthentication", "open", json!({ "mode": "Permissive" })),
        document("Mesh", "mesh", json!({ "limits": limits })),
    ]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    (world, web, api)
}

/// Two sidecars; the application answers `/never` never, `/large` with a megabyte and everything else at once.
fn bench(limits: &serde_json::Value) -> Bench {
    let (world, web, api) = open_pair("http", limits);
    let large = Bytes::from(vec![b'a'; 1 << 20]);
    world.slow_app(app_at(3), move |request: Request<Bytes>| {
        let large = large.clone();
        async move {
            match request.uri().path() {
                "/never" => std::future::pending().await,
                "/large" => text(large),
                "/small" => text("small"),
                _ => text(request.body().len().to_string()),
            }
        }
    });
    Bench { world, web, api }
}

impl Bench {
    fn sides(&self) -> [(&Arc<Proxy>, &'static str); 2] {
        [(&self.web, "outbound"), (&self.api, "inbound")]
    }

    fn open(&self, direction: &str) -> DuplexStream {
        match direction {
            "outbound" => self.world.connect(&self.web, vip(1)),
            _ => self.world.connect_inbound(&self.api, app_at(3)),
        }
    }

    async fn others_are_served(&self) {
        for direction in ["outbound", "inbound"] {
            let heard = timeout(Duration::from_secs(2), ask(self.open(direction), get("/"))).await.unwrap();
            assert_eq!(heard.status, 200, "{direction}");
        }
    }
}

/// Sends the preface and then `attack` over and over, at most so many times, until the sidecar closes. What it says.
async fn flood<S>(stream: S, mut attack: impl FnMut(u32) -> Vec<u8>, times: u32) -> Vec<(u8, Vec<u8>)>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut read, mut write) = tokio::io::split(stream);
    let send = async {
        write.write_all(&preface(&[])).await.ok();
        for index in 0..times {
            if write.write_all(&attack(index)).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    let hear = async {
        let mut heard = Vec::new();
        read.read_to_end(&mut heard).await.ok();
        heard
    };
    let ((), heard) = timeout(Duration::from_secs(60), async { tokio::join!(send, hear) }).await.expect("the flood is ended");
    frames(&heard)
}

fn goodbye(heard: &[(u8, Vec<u8>)]) -> (u32, String) {
    let (_, payload) = heard.iter().rev().find(|(kind, _)| *kind == GOAWAY).expect("a GOAWAY");
    let code = u32::from_be_bytes(payload[4..8].try_into().unwrap());
    (code, String::from_utf8_lossy(&payload[8..]).into_owned())
}

const CALM: u32 = 11;
const LARGE: u32 = 200_000;

async fn check_flood(reason: &str, words: &str, times: u32, attack: impl Fn(u32) -> Vec<u8>) {
    let bench = bench(&json!({}));
    for (proxy, direction) in bench.sides() {
        let heard = flood(bench.open(direction), &attack, times).await;
        let (code, text) = goodbye(&heard);
        assert_eq!(code, CALM, "{direction} {text}");
        assert!(text.contains(words), "{direction} {text}");
        let reason = format!("reason=\"{reason}\"");
        told(proxy, &["outrigger_refusals_total", direction, &reason, "shop/api"]);
        bench.others_are_served().await;
    }
}

/// Fifty requests that are taken back in the same breath.
fn rapid_reset(index: u32) -> Vec<u8> {
    let streams = (0..50).map(|more| (index * 50 + more) * 2 + 1);
    streams
        .flat_map(|stream| {
            [frame(HEADERS, END_HEADERS | END_STREAM, stream, HEAD), frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat()
        })
        .collect()
}

#[tokio::test(start_paused = true)]
async fn a_rapid_reset_is_ended_before_it_costs_anything() {
    check_flood("too_many_resets", "too_many_resets", 1_000, rapid_reset).await;
}

/// Nothing is taken back by these: the request that they name is over.
#[tokio::test(start_paused = true)]
async fn resets_of_what_is_over_are_counted_too() {
    let late = |index| match index {
        0 => frame(HEADERS, END_HEADERS | END_STREAM, 1, HEAD),
        _ => frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]),
    };
    check_flood("too_many_resets", "(resets)", LARGE, late).await;
    check_flood_on_link(&json!({ "resets": 50 }), "too_many_resets", "more than 500", late).await;
}

/// A client that takes back each of its requests when it has read enough of the answer is no flood.
#[tokio::test(start_paused = true)]
async fn a_reset_behind_each_answer_is_no_flood() {
    let bench = bench(&json!({ "resets": 10 }));
    for (proxy, direction) in bench.sides() {
        let mut stream = bench.open(direction);
        stream.write_all(&preface(&[])).await.unwrap();
        let mut buffer = vec![0; 16_384];
        for index in 0..500 {
            let stream_id = index * 2 + 1;
            stream.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, stream_id, HEAD)).await.unwrap();
            loop {
                let read = timeout(Duration::from_secs(1), stream.read(&mut buffer)).await.expect("an answer").unwrap();
                assert!(read > 0, "{direction}: it was closed after {index}");
                if frames(&buffer[..read]).iter().any(|(kind, _)| *kind == DATA) {
                    break;
                }
            }
            stream.write_all(&frame(RST_STREAM, 0, stream_id, &[0, 0, 0, 8])).await.unwrap();
        }
        assert!(!proxy.telemetry.metrics.render().contains("too_many_resets"), "{direction}");
    }
}

/// A pod that was taken over speaks as its sidecar, and is none.
async fn check_flood_on_link(limits: &serde_json::Value, reason: &str, words: &str, attack: impl Fn(u32) -> Vec<u8>) {
    let bench = bench(limits);
    // The link that others use stands already.
    bench.others_are_served().await;
    let link = bench.world.link("web", "api", &bench.api, app_at(3)).await;
    let (code, text) = goodbye(&flood(link, attack, 10 * LARGE).await);
    assert_eq!(code, CALM, "{text}");
    assert!(text.contains(words), "{text}");
    told(&bench.api, &["outrigger_refusals_total", "inbound", &format!("reason=\"{reason}\""), "sa/web"]);
    bench.others_are_served().await;
    assert_eq!(bench.world.dialled().len(), 1, "the others' link is the same as before");
}

#[tokio::test(start_paused = true)]
async fn a_rapid_reset_on_a_link_is_ended_too() {
    check_flood_on_link(&json!({}), "too_many_resets", "more than 50000", rapid_reset).await;
}

#[tokio::test(start_paused = true)]
async fn who_leaves_with_many_requests_under_way_takes_no_link_away_from_others() {
    let bench = bench(&json!({}));
    bench.others_are_served().await;
    // `:path /never`, so that all of them are under way when their client leaves.
    let head = b"\x82\x86\x01\x08api.shop\x04\x06/never";
    for _ in 0..5 {
        let mut stream = bench.open("outbound");
        let heads = (0..1_000_u32).flat_map(|index| frame(HEADERS, END_HEADERS | END_STREAM, index * 2 + 1, head));
        stream.write_all(&[preface(&[]), heads.collect()].concat()).await.unwrap();
        sleep(Duration::from_millis(100)).await;
        drop(stream);
        sleep(Duration::from_millis(100)).await;
        bench.others_are_served().await;
    }
    assert!(!bench.api.telemetry.metrics.render().contains("too_many_resets"));
}

/// They are of many clients: the application has to be told of each, and nobody is to blame for all.
#[tokio::test(start_paused = true)]
async fn requests_that_are_taken_back_in_one_breath_on_a_link_take_nothing_away_from_others() {
    // A hundred times that on a link.
    let bench = bench(&json!({ "pendingResets": 10 }));
    let mut link = bench.world.link("web", "api", &bench.api, app_at(3)).await;
    let mut words = preface(&[]);
    for index in 0..4_000_u32 {
        words.extend(frame(HEADERS, END_HEADERS | END_STREAM, index * 2 + 1, HEAD));
        words.extend(frame(RST_STREAM, 0, index * 2 + 1, &[0, 0, 0, 8]));
    }
    words.extend(frame(HEADERS, END_HEADERS | END_STREAM, 8_001, HEAD));
    let (mut read, mut write) = tokio::io::split(&mut link);
    let hear = async {
        let mut heard = Vec::new();
        let mut buffer = vec![0; 16_384];
        loop {
            let count = read.read(&mut buffer).await.unwrap();
            assert!(count > 0, "the link was closed: {:?}", goodbye(&frames(&heard)));
            heard.extend_from_slice(&buffer[..count]);
            if frames(&heard).iter().any(|(kind, _)| *kind == DATA) {
                break;
            }
        }
    };
    let both = async { tokio::join!(write.write_all(&words), hear) };
    let (sent, ()) = timeout(Duration::from_secs(10), both).await.expect("the last request is answered");
    sent.unwrap();
    assert!(!bench.api.telemetry.metrics.render().contains("too_many_resets"));
}

#[tokio::test(start_paused = true)]
async fn frames_that_carry_nothing_are_counted_on_a_link_as_those_of_many_clients() {
    let limits = json!({ "controlFrames": 1_000 });
    for kind in [frame(PING, 0, 0, &[0; 8]), frame(SETTINGS, 0, 0, &[])] {
        check_flood_on_link(&limits, "too_many_frames", "more than 10000", |_| kind.clone()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_reset_that_waits_until_the_request_is_under_way_is_counted_too() {
    let bench = bench(&json!({ "resets": 100 }));
    for (proxy, direction) in bench.sides() {
        // `:path /never`, so that no answer comes first.
        let head = b"\x82\x86\x01\x08api.shop\x04\x06/never";
        let (mut read, mut write) = tokio::io::split(bench.open(direction));
        let send = async {
            write.write_all(&preface(&[])).await.unwrap();
            for index in 0..1_000_u32 {
                let stream = index * 2 + 1;
                if write.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, stream, head)).await.is_err() {
                    return index;
                }
                sleep(Duration::from_millis(5)).await;
                if write.write_all(&frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])).await.is_err() {
                    return index;
                }
            }
            1_000
        };
        let hear = async {
            let mut heard = Vec::new();
            read.read_to_end(&mut heard).await.ok();
            heard
        };
        let (sent, heard) = tokio::join!(send, hear);
        // It is told at once, and heard out for two seconds, so that it can read why.
        assert!((100..=510).contains(&sent), "{direction}: {sent} requests");
        let metrics = proxy.telemetry.metrics.render();
        let line = metrics.lines().find(|line| line.starts_with("outrigger_requests_total{") && line.contains("caller_left"));
        let begun: u32 = line.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
        assert!((100..=103).contains(&begun), "{begun} requests came further");
        let (code, text) = goodbye(&frames(&heard));
        assert_eq!(code, CALM);
        assert!(text.contains("more than 100 requests") && text.contains("(resets)"), "{text}");
        told(proxy, &["outrigger_refusals_total", direction, "too_many_resets", "shop/api"]);
        bench.others_are_served().await;
    }
}

#[tokio::test(start_paused = true)]
async fn frames_that_carry_nothing_are_counted() {
    check_flood("too_many_frames", "controlFrames", LARGE, |_| frame(PING, 0, 0, &[0; 8])).await;
    check_flood("too_many_frames", "controlFrames", LARGE, |_| frame(SETTINGS, 0, 0, &[])).await;
    check_flood("too_many_frames", "controlFrames", LARGE, |_| frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 1])).await;
    check_flood("too_many_frames", "controlFrames", LARGE, |_| frame(0xfa, 0, 1, b"unknown")).await;
    check_flood("too_many_frames", "controlFrames", LARGE, |_| frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1])).await;
    let request_and_grants = |index| match index {
        0 => frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x82\x86\x04\x06/never\x01\x08api.shop"),
        _ => frame(WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1]),
    };
    check_flood("too_many_frames", "controlFrames", LARGE, request_and_grants).await;
}

/// As many frames as a client may send that grants anew what it read, and grants it in small pieces.
#[tokio::test(start_paused = true)]
async fn a_reader_that_grants_in_small_pieces_is_no_flood() {
    let bench = bench(&json!({ "controlFrames": 100 }));
    for (_, direction) in bench.sides() {
        let mut stream = bench.open(direction);
        let large = b"\x82\x86\x04\x06/large\x01\x08api.shop";
        stream.write_all(&[preface(&[]), frame(HEADERS, END_HEADERS | END_STREAM, 1, large)].concat()).await.unwrap();
        let (mut read, mut met) = (0, Vec::new());
        while read < 1 << 20 {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await.unwrap();
            let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let mut payload = vec![0; length];
            stream.read_exact(&mut payload).await.unwrap();
            met.push(head[3]);
            assert_ne!(head[3], GOAWAY, "{direction} {read} {}", String::from_utf8_lossy(&payload));
            if head[3] == DATA {
                read += length;
                for piece in payload.chunks(512) {
                    let grant = u32::try_from(piece.len()).unwrap().to_be_bytes();
                    let both = [frame(WINDOW_UPDATE, 0, 1, &grant), frame(WINDOW_UPDATE, 0, 0, &grant)];
                    stream.write_all(&both.concat()).await.unwrap();
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_of_empty_frames_is_ended() {
    let attack = |index| match index {
        0 => frame(HEADERS, END_HEADERS, 1, POST_HEAD),
        _ => frame(DATA, 0, 1, &[]),
    };
    check_flood("too_many_frames", "too_many_data_frames", LARGE, attack).await;
}

/// Frames of one byte cost the sidecar as much as those of 256, and the client's window counts them as one byte.
#[tokio::test(start_paused = true)]
async fn a_body_of_tiny_frames_that_nobody_takes_is_ended() {
    let (world, web, api) = open_pair("http2", &json!({}));
    world.raw_app(app_at(3), |stream, _| {
        tokio::spawn(async move {
            let mut codec = h2::server::Builder::new();
            codec.initial_window_size(0);
            let mut codec = codec.handshake::<_, Bytes>(stream).await.unwrap();
            let mut held = Vec::new();
            while let Some(Ok(request)) = codec.accept().await {
                held.push(request);
            }
        });
    });
    let tiny = frame(DATA, 0, 1, b"x").repeat(100);
    let attack = |index| match index {
        0 => frame(HEADERS, END_HEADERS, 1, POST_HEAD),
        _ => tiny.clone(),
    };
    for (stream, proxy, direction) in
        [(world.connect(&web, vip(1)), &web, "outbound"), (world.connect_inbound(&api, app_at(3)), &api, "inbound")]
    {
        let (code, text) = goodbye(&flood(stream, attack, LARGE / 100).await);
        assert_eq!((code, &*text), (CALM, "too_many_data_frames"), "{direction}");
        told(proxy, &["outrigger_refusals_total", direction, "reason=\"too_many_frames\"", "shop/api"]);
    }
}

/// Padding is no part of what a piece carries: without it these are empty.
#[tokio::test(start_paused = true)]
async fn a_body_of_padding_is_ended_and_told_as_a_flood_of_frames() {
    for padding in [0_u8, 255] {
        let piece = [vec![padding], vec![0; usize::from(padding)]].concat();
        let attack = |index| match index {
            0 => frame(HEADERS, END_HEADERS, 1, POST_HEAD),
            _ => frame(DATA, PADDED, 1, &piece),
        };
        check_flood("too_many_frames", "too_many_data_frames", 1_000, attack).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_of_endless_continuations_is_ended() {
    for piece in [&b""[..], b"\x00\x01a\x01b"] {
        let attack = |index| match index {
            0 => frame(HEADERS, END_STREAM, 1, HEAD),
            _ => frame(CONTINUATION, 0, 1, piece),
        };
        check_flood("too_many_frames", "too_many_continuations", LARGE, attack).await;
    }
}

/// A header's name and the length of its value, of so many bytes.
fn begun(length: usize) -> Vec<u8> {
    let mut bytes = b"\x00\x01x\x7f".to_vec();
    let mut rest = length - 127;
    while rest >= 128 {
        bytes.push(u8::try_from(rest % 128).unwrap() | 128);
        rest /= 128;
    }
    bytes.push(u8::try_from(rest).unwrap());
    bytes
}

#[tokio::test(start_paused = true)]
async fn a_head_that_goes_on_beyond_all_measure_is_answered_and_told_by_its_size() {
    let header = [begun(16_000), vec![b'a'; 16_000]].concat();
    let endless = |index| if index == 1 { [begun(1 << 24), vec![b'a'; 16_000]].concat() } else { vec![b'a'; 16_000] };
    for each_its_own in [true, false] {
        let bench = bench(&json!({}));
        for (proxy, direction) in bench.sides() {
            let attack = |index| match index {
                0 => frame(HEADERS, END_STREAM, 1, HEAD),
                _ if each_its_own => frame(CONTINUATION, 0, 1, &header),
                _ => frame(CONTINUATION, 0, 1, &endless(index)),
            };
            let heard = flood(bench.open(direction), attack, 200).await;
            let answer = heard.iter().find(|(kind, _)| *kind == HEADERS).map(|(_, payload)| String::from_utf8_lossy(payload));
            let answer = answer.expect("an answer");
            assert!(answer.contains("431") && answer.contains("headers_too_large"), "{direction} {answer:?}");
            let (code, text) = goodbye(&heard);
            assert!(code == CALM && text.contains("larger than 65536 bytes (headerBytes)"), "{direction} {code} {text}");
            told(proxy, &["outrigger_refusals_total", direction, "headers_too_large", "shop/api"]);
            told(proxy, &["outrigger_requests_total", direction, "headers_too_large", "status=\"431\""]);
            assert!(!proxy.telemetry.metrics.render().contains("too_many_frames"), "{direction}");
            bench.others_are_served().await;
        }
    }
}

/// The codec ends these by itself, by three different words.
#[tokio::test(start_paused = true)]
async fn a_head_over_its_limit_is_told_by_its_size_whatever_the_codec_ends_it_for() {
    let small = [begun(4_000), vec![b'a'; 4_000]].concat();
    let in_the_table = [b"\x40".to_vec(), begun(4_000)[1..].to_vec(), vec![b'a'; 4_000]].concat();
    let string = [begun(1 << 24), vec![b'a'; 100]].concat();
    let many_frames = |_| small.clone();
    let unfolded = |index| match index {
        1 => in_the_table.clone(),
        2..=6 => vec![0xbe],
        _ => vec![0xbe; 1_000],
    };
    let string_beyond = |index| match index {
        1 => in_the_table.clone(),
        2 => vec![0xbe; 70],
        3 => string.clone(),
        _ => vec![b'a'; 16_384],
    };
    for piece in [&many_frames as &dyn Fn(u32) -> Vec<u8>, &unfolded, &string_beyond] {
        let bench = bench(&json!({}));
        for (proxy, direction) in bench.sides() {
            let attack = |index| match index {
                0 => frame(HEADERS, END_STREAM, 1, HEAD),
                _ => frame(CONTINUATION, 0, 1, &piece(index)),
            };
            flood(bench.open(direction), attack, 200).await;
            told(proxy, &["outrigger_refusals_total", direction, "headers_too_large", "shop/api"]);
            assert!(!proxy.telemetry.metrics.render().contains("too_many_frames"), "{direction}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_bomb_of_headers_is_refused_and_never_unfolded() {
    let bench = bench(&json!({}));
    for (proxy, direction) in bench.sides() {
        // A header of 4000 bytes goes into the table, and then a byte each stands for it: 48 MB of headers in 16 KB.
        let mut block = HEAD.to_vec();
        block.extend_from_slice(b"\x40\x01x\x7f\xa1\x1e");
        block.extend_from_slice(&[b'a'; 4_000]);
        block.resize(16_000, 0xbe);
        let mut stream = bench.open(direction);
        let mut attack = preface(&[]);
        attack.extend(frame(HEADERS, END_STREAM | END_HEADERS, 1, &block));
        stream.write_all(&attack).await.unwrap();
        first(&mut stream, GOAWAY).await;
        stream.read_to_end(&mut Vec::new()).await.ok();
        told(proxy, &["outrigger_refusals_total", direction, "headers_too_large", "shop/api"]);
        // And over several frames.
        let mut attack = preface(&[]);
        attack.extend(frame(HEADERS, END_STREAM, 1, &block));
        attack.extend(frame(CONTINUATION, 0, 1, &[0xbe; 16_000]));
        attack.extend(frame(CONTINUATION, END_HEADERS, 1, &[0xbe; 16_000]));
        let mut stream = bench.open(direction);
        stream.write_all(&attack).await.unwrap();
        first(&mut stream, GOAWAY).await;
        stream.read_to_end(&mut Vec::new()).await.ok();
        told(proxy, &["outrigger_refusals_total", direction, "headers_too_large", "} 2"]);
        bench.others_are_served().await;
    }
}

/// The first frame of this type that a sidecar sends.
async fn first(stream: &mut DuplexStream, wanted: u8) -> Vec<u8> {
    let mut heard = Vec::new();
    let mut buffer = vec![0; 4_096];
    loop {
        if let Some((_, payload)) = frames(&heard).into_iter().find(|(kind, _)| *kind == wanted) {
            return payload;
        }
        let read = timeout(Duration::from_secs(100), stream.read(&mut buffer)).await.expect("a frame").unwrap();
        assert!(read > 0, "it was closed without: {heard:?}");
        heard.extend_from_slice(&buffer[..read]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_of_http_2_that_does_not_end_is_given_up_in_time() {
    let bench = bench(&json!({ "headerTimeout": "4s" }));
    let half = frame(HEADERS, END_STREAM, 1, HEAD);
    let torn = frame(HEADERS, END_STREAM | END_HEADERS, 1, HEAD)[..15].to_vec();
    for head in [&half, &torn] {
        for (proxy, direction) in bench.sides() {
            let mut stream = bench.open(direction);
            stream.write_all(&preface(&[])).await.unwrap();
            sleep(Duration::from_secs(60)).await;
            let begin = Instant::now();
            stream.write_all(head).await.unwrap();
            let mut heard = Vec::new();
            stream.read_to_end(&mut heard).await.ok();
            assert_eq!(begin.elapsed().as_secs(), 4, "{direction}");
            told(proxy, &["outrigger_refusals_total", direction, "request_timeout", "shop/api"]);
            bench.others_are_served().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_stands_still_is_answered_408() {
    let bench = bench(&json!({ "streamTimeout": "30s" }));
    for (proxy, direction) in bench.sides() {
        let mut stream = bench.open(direction);
        stream.write_all(b"POST / HTTP/1.1\r\nhost: api.shop\r\ncontent-length: 100\r\n\r\na").await.unwrap();
        for _ in 0..5 {
            // A slow body is none that stands still.
            sleep(Duration::from_secs(29)).await;
            stream.write_all(b"a").await.unwrap();
        }
        let begin = Instant::now();
        let mut answer = vec![0; 4_096];
        let read = stream.read(&mut answer).await.unwrap();
        let answer = String::from_utf8_lossy(&answer[..read]);
        assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("outrigger-reason: request_timeout"), "{answer}");
        assert_eq!(begin.elapsed().as_secs(), 30);
        told(proxy, &["outrigger_refusals_total", direction, "request_timeout", "shop/api"]);
        bench.others_are_served().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_reads_is_let_go_of() {
    let bench = bench(&json!({ "streamTimeout": "30s" }));
    for (proxy, direction) in bench.sides() {
        let mut stream = bench.open(direction);
        let begin = Instant::now();
        stream.write_all(b"GET /large HTTP/1.1\r\nhost: api.shop\r\n\r\n").await.unwrap();
        sleep(Duration::from_secs(29)).await;
        assert!(!proxy.telemetry.metrics.render().contains("slow_reader"));
        sleep(Duration::from_secs(2)).await;
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.ok();
        assert!(heard.len() < 1 << 20, "the rest was not kept for it");
        assert_eq!(begin.elapsed().as_secs(), 31);
        told(proxy, &["outrigger_refusals_total", direction, "slow_reader", "shop/api"]);
        bench.others_are_served().await;
    }
}

#[tokio::test(start_paused = true)]
async fn streams_without_a_window_are_reset_and_the_connection_lives() {
    // However much there is to send, and whether some of it may be.
    for (path, window) in [(b"/large", 0), (b"/small", 0), (b"/small", 1)] {
        check_window(path, window).await;
    }
}

/// `window` is SETTINGS_INITIAL_WINDOW_SIZE: so many bytes may be sent.
async fn check_window(path: &[u8; 6], window: u8) {
    let bench = bench(&json!({ "streamTimeout": "30s" }));
    for (proxy, direction) in bench.sides() {
        let mut stream = bench.open(direction);
        stream.write_all(&preface(&[0, 4, 0, 0, 0, window])).await.unwrap();
        let head = [b"\x82\x86\x01\x08api.shop\x04\x06", path.as_slice()].concat();
        for index in 0..100 {
            stream.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, index * 2 + 1, &head)).await.unwrap();
        }
        let mut heard = Vec::new();
        let mut buffer = vec![0; 16_384];
        let begin = Instant::now();
        let resets = |heard: &[u8]| frames(heard).iter().filter(|(kind, _)| *kind == RST_STREAM).count();
        while resets(&heard) < 100 {
            let read = timeout(Duration::from_secs(60), stream.read(&mut buffer)).await.expect("resets").unwrap();
            assert!(read > 0, "the connection lives");
            heard.extend_from_slice(&buffer[..read]);
        }
        assert_eq!(begin.elapsed().as_secs(), 30);
        assert!(!frames(&heard).iter().any(|(kind, payload)| *kind == DATA && payload.len() > usize::from(window)));
        told(proxy, &["outrigger_refusals_total", direction, "slow_reader", "shop/api", "} 100"]);
        // The connection is as good as before.
        stream.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 1_001, HEAD)).await.unwrap();
        let read = timeout(Duration::from_secs(1), stream.read(&mut buffer)).await.expect("an answer").unwrap();
        assert!(frames(&buffer[..read]).iter().any(|(kind, _)| *kind == HEADERS));
        bench.others_are_served().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_of_http_2_is_closed_and_nobody_is_refused() {
    let bench = bench(&json!({ "idleTimeout": "1m" }));
    for (proxy, direction) in bench.sides() {
        let mut stream = bench.open(direction);
        stream.write_all(&preface(&[])).await.unwrap();
        let begin = Instant::now();
        let hear = async {
            let mut heard = vec![0; 4_096];
            let mut length = 0;
            while !frames(&heard[..length]).iter().any(|(kind, _)| *kind == GOAWAY) {
                let read = stream.read(&mut heard[length..]).await.unwrap();
                assert!(read > 0, "it is told");
                length += read;
            }
        };
        timeout(Duration::from_secs(90), hear).await.expect("it is closed");
        assert_eq!(begin.elapsed().as_secs(), 60);
        assert!(!proxy.telemetry.metrics.render().lines().any(|line| line.starts_with("outrigger_refusals_total{")));
    }
}

#[tokio::test(start_paused = true)]
async fn an_old_connection_of_http_2_takes_nothing_new_and_loses_nothing() {
    let bench = bench(&json!({ "connectionAge": "10m", "streamTimeout": "1h" }));
    for (proxy, direction) in bench.sides() {
        let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(64 << 10)
            .handshake(TokioIo::new(bench.open(direction)))
            .await
            .unwrap();
        tokio::spawn(connection);
        let open = || {
            let metrics = proxy.telemetry.metrics.render();
            let own = [direction, "protocol=\"http2\"", "} 1"];
            let mut lines = metrics.lines().filter(|line| line.starts_with("outrigger_connections_open{"));
            lines.any(|line| own.iter().all(|part| line.contains(part)))
        };
        let begin = Instant::now();
        let send = |path: &str| {
            let request = Request::get(format!("http://api.shop{path}")).body(Full::<Bytes>::default()).unwrap();
            sender.clone().send_request(request)
        };
        // One that is under way when the connection grows old, read only long after.
        let slow = send("/large").await.unwrap();
        let mut answered = 0;
        while let Ok(answer) = send("/small").await {
            assert_eq!(answer.status(), 200, "{direction}");
            answered += 1;
            sleep(Duration::from_secs(5)).await;
        }
        let age = begin.elapsed().as_secs();
        assert!((480..=605).contains(&age) && answered >= 96, "{direction}: {answered} in {age} seconds");
        sleep(Duration::from_secs(60)).await;
        assert!(open(), "{direction}: somebody still reads");
        assert_eq!(slow.into_body().collect().await.unwrap().to_bytes().len(), 1 << 20, "{direction}");
        sleep(Duration::from_secs(1)).await;
        assert!(!open(), "{direction}: its last request ended");
        assert!(!proxy.telemetry.metrics.render().lines().any(|line| line.starts_with("outrigger_refusals_total{")));
        bench.others_are_served().await;
    }
}

/// On the link all of them share one connection, and so do they between client and sidecar.
#[tokio::test(start_paused = true)]
async fn readers_that_stand_still_stall_nobody_on_their_connection_and_on_the_link() {
    let bench = bench(&json!({}));
    let connection = bench.world.connect(&bench.web, vip(1));
    let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        // The client's own windows are its own affair.
        .initial_stream_window_size(64 << 10)
        .initial_connection_window_size(1 << 30)
        .handshake(TokioIo::new(connection))
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = |path: &str| Request::get(format!("http://api.shop{path}")).body(Full::<Bytes>::default()).unwrap();
    let send = |path: &str| {
        let (mut sender, request) = (sender.clone(), request(path));
        async move { timeout(Duration::from_secs(10), sender.send_request(request)).await.expect("an answer").unwrap() }
    };
    let mut stalled: Vec<Response<hyper::body::Incoming>> = Vec::new();
    for _ in 0..20 {
        stalled.push(send("/large").await);
    }
    sleep(Duration::from_secs(1)).await;
    let large = futures_util::future::join_all((0..100).map(|_| async {
        let answer = send("/large").await;
        timeout(Duration::from_secs(10), answer.into_body().collect()).await.expect("a body").unwrap().to_bytes().len()
    }))
    .await;
    assert!(large.iter().all(|length| *length == 1 << 20), "{large:?}");
    // Another client of the same sidecar goes over the same link.
    bench.others_are_served().await;
    assert_eq!(bench.world.dialled().iter().filter(|to| **to == app_at(3)).count(), 1, "one link");
    // And who stood still gets the rest once it reads.
    for answer in stalled {
        assert_eq!(answer.into_body().collect().await.unwrap().to_bytes().len(), 1 << 20);
    }
}

/// More than have room on one link.
#[tokio::test(start_paused = true)]
async fn many_readers_that_stand_still_stall_nobody_on_the_links() {
    let bench = bench(&json!({}));
    let connection = bench.world.connect(&bench.web, vip(1));
    let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(64 << 10)
        .initial_connection_window_size(1 << 30)
        .handshake(TokioIo::new(connection))
        .await
        .unwrap();
    tokio::spawn(connection);
    let mut stalled = Vec::new();
    for _ in 0..400 {
        let (mut sender, request) =
            (sender.clone(), Request::get("http://api.shop/large").body(Full::<Bytes>::default()).unwrap());
        let sent = async move { sender.send_request(request).await };
        stalled.push(timeout(Duration::from_secs(10), sent).await.expect("an answer").unwrap());
    }
    // As much of them as may be on its way is on its way.
    sleep(Duration::from_secs(1)).await;
    bench.others_are_served().await;
    assert_eq!(bench.world.dialled().iter().filter(|to| **to == app_at(3)).count(), 2, "two links");
    drop(stalled);
}
