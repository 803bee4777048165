//! Requests of HTTP/2 that the codec refuses before anybody else sees them: each is told once, with the limit or rule that
//! decided, and the connection serves on.

use std::sync::Arc;

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use super::attacks::{END_HEADERS, END_STREAM, HEAD, HEADERS, RST_STREAM, frame, frames, open_pair, preface};
use super::world::{World, app_at, text, vip};
use crate::dataplane::Proxy;

const CONTINUATION: u8 = 9;

fn world(limits: &serde_json::Value) -> (World, Arc<Proxy>, Arc<Proxy>) {
    let (world, web, api) = open_pair("http2", limits);
    world.slow_app(app_at(3), |request| async move {
        if request.uri().path() == "/never" {
            std::future::pending::<()>().await;
        }
        text("served")
    });
    (world, web, api)
}

/// A head in as many frames as it needs.
pub(super) fn head(stream: u32, block: &[u8]) -> Vec<u8> {
    let mut pieces = block.chunks(16_384).peekable();
    let mut bytes = Vec::new();
    let mut kind = HEADERS;
    while let Some(piece) = pieces.next() {
        let ends = if pieces.peek().is_none() { END_HEADERS } else { 0 };
        let flags = if kind == HEADERS { END_STREAM | ends } else { ends };
        bytes.extend(frame(kind, flags, stream, piece));
        kind = CONTINUATION;
    }
    bytes
}

/// A field that goes into no table: the start of its representation, and a value of so many letters.
pub(super) fn field(begin: &[u8], length: usize) -> Vec<u8> {
    let mut bytes = begin.to_vec();
    let mut rest = length;
    if rest < 127 {
        bytes.push(u8::try_from(rest).unwrap());
    } else {
        bytes.push(127);
        rest -= 127;
        while rest >= 128 {
            bytes.push(u8::try_from(rest % 128).unwrap() | 128);
            rest /= 128;
        }
        bytes.push(u8::try_from(rest).unwrap());
    }
    bytes.extend(std::iter::repeat_n(b'a', length));
    bytes
}

/// Reads until so many answers are there.
async fn served(stream: &mut DuplexStream, answers: usize) -> Vec<(u8, Vec<u8>)> {
    let mut heard = Vec::new();
    let mut buffer = vec![0; 16_384];
    loop {
        let read = stream.read(&mut buffer).await.unwrap();
        assert!(read > 0, "the connection lives");
        heard.extend_from_slice(&buffer[..read]);
        let found = frames(&heard);
        if found.iter().filter(|(_, payload)| payload == b"served").count() >= answers {
            return found;
        }
    }
}

pub(super) fn count(proxy: &Proxy, wanted: &[&str]) -> f64 {
    let metrics = proxy.telemetry.metrics.render();
    let lines = metrics.lines().filter(|line| line.starts_with("outrigger_requests_total{"));
    lines
        .filter(|line| wanted.iter().all(|part| line.contains(part)))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum()
}

#[tokio::test(start_paused = true)]
async fn a_head_that_the_codec_refuses_is_told_with_its_reason() {
    let large = [HEAD.to_vec(), field(b"\x00\x01x", 300 * 1024)].concat();
    let far = [b"\x82\x86\x01\x08api.shop".to_vec(), field(b"\x04", 70_000)].concat();
    let connection = [HEAD.to_vec(), b"\x00\x0aconnection\x05close".to_vec()].concat();
    let no_path = b"\x82\x86\x01\x08api.shop".to_vec();
    let length = [HEAD.to_vec(), b"\x00\x0econtent-length\x015".to_vec()].concat();
    for (block, status, reason) in [
        (large, "431", "headers_too_large"),
        (far, "414", "uri_too_long"),
        (connection, "400", "bad_request"),
        (no_path, "400", "bad_request"),
        (length, "400", "bad_request"),
    ] {
        let (world, web, api) = world(&json!({}));
        for (proxy, direction) in [(&web, "outbound"), (&api, "inbound")] {
            let mut stream =
                if direction == "outbound" { world.connect(&web, vip(1)) } else { world.connect_inbound(&api, app_at(3)) };
            // One that is good before and after, so that the streams are told apart.
            let good = |stream: u32| head(stream, HEAD);
            let bytes = [preface(&[]), good(1), head(3, &block), head(5, &block), good(7)].concat();
            stream.write_all(&bytes).await.unwrap();
            served(&mut stream, 2).await;
            let direction = format!("direction=\"{direction}\"");
            let told = || {
                let reason = format!("reason=\"{reason}\"");
                count(proxy, &[&direction, &reason, &format!("status=\"{status}\""), "shop/api"])
            };
            assert!((told() - 2.0).abs() < 0.1, "{direction} {reason}: {}", proxy.telemetry.metrics.render());
        }
        assert!(world.dialled().len() <= 1, "what was refused went nowhere");
    }
}

#[tokio::test(start_paused = true)]
async fn requests_beyond_the_limit_of_one_connection_are_told_and_the_others_served() {
    let (world, web, _api) = world(&json!({ "concurrentStreams": 3 }));
    let mut stream = world.connect(&web, vip(1));
    let never = b"\x82\x86\x01\x08api.shop\x04\x06/never";
    let mut bytes = preface(&[]);
    for index in 0..5 {
        bytes.extend(head(index * 2 + 1, never));
    }
    stream.write_all(&bytes).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert!((count(&web, &["outbound", "too_many_streams", "status=\"429\"", "shop/api"]) - 2.0).abs() < 0.1);
    // One is taken back, and there is place for another.
    stream.write_all(&[frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]), head(11, HEAD)].concat()).await.unwrap();
    let heard = served(&mut stream, 1).await;
    assert_eq!(heard.iter().filter(|(kind, payload)| *kind == RST_STREAM && payload == &[0, 0, 0, 7]).count(), 2);
}

#[tokio::test(start_paused = true)]
async fn as_many_as_are_refused_are_told_however_many_come_at_once() {
    for direction in ["outbound", "inbound"] {
        let (world, web, api) = world(&json!({}));
        let (proxy, mut stream) = match direction {
            "outbound" => (&web, world.connect(&web, vip(1))),
            _ => (&api, world.connect_inbound(&api, app_at(3))),
        };
        // `:method GET` and nothing else.
        let mut bytes = preface(&[]);
        bytes.extend((0..900_u32).flat_map(|index| head(index * 2 + 1, b"\x82")));
        bytes.extend(head(1_801, HEAD));
        stream.write_all(&bytes).await.unwrap();
        served(&mut stream, 1).await;
        let told = count(proxy, &[&format!("direction=\"{direction}\""), "reason=\"bad_request\"", "status=\"400\""]);
        assert!((told - 900.0).abs() < 0.1, "{direction}: {told} of 900");
    }
}
