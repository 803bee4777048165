//! Requests of HTTP/2 whose head is good and what comes behind it is not, and answers likewise: each is told by its own name, and the
//! connection serves on.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::{sleep, timeout};

use super::attacks::{DATA, END_HEADERS, END_STREAM, HEAD, HEADERS, RST_STREAM, frame, frames, open_pair, preface};
use super::fidelity::until;
use super::unseen::{count, field, head};
use super::world::{World, app_at, text, vip};
use crate::dataplane::Proxy;

const PROTOCOL_ERROR: [u8; 4] = [0, 0, 0, 1];
/// `:method POST`, `:scheme http`, `:path /`, `:authority api.shop`, `content-length: 5`.
const FIVE: &[u8] = b"\x83\x86\x84\x01\x08api.shop\x00\x0econtent-length\x015";
/// The same without a length.
const SOME: &[u8] = b"\x83\x86\x84\x01\x08api.shop";
/// `x-sum: 1`.
const TRAILER: &[u8] = b"\x00\x05x-sum\x011";

/// Each of the pair by itself, and how a client reaches it.
async fn at_each_door(protocol: &str, prepare: impl Fn(&World), check: impl AsyncFn(&'static str, DuplexStream, Arc<Proxy>)) {
    for direction in ["outbound", "inbound"] {
        let (world, web, api) = open_pair(protocol, &json!({}));
        prepare(&world);
        match direction {
            "outbound" => check(direction, world.connect(&web, vip(1)), web).await,
            _ => check(direction, world.connect_inbound(&api, app_at(3)), api).await,
        }
    }
}

/// Everything that is heard until nothing comes for a second.
async fn heard(stream: &mut DuplexStream) -> Vec<(u8, Vec<u8>)> {
    let mut heard = Vec::new();
    while let Ok(read) = timeout(Duration::from_secs(1), stream.read_buf(&mut heard)).await {
        assert!(read.unwrap() > 0, "the connection lives");
    }
    frames(&heard)
}

fn told_once(proxy: &Proxy, direction: &str, reason: &str, status: &str) {
    let direction = format!("direction=\"{direction}\"");
    let of = |reason: &str| count(proxy, &[&direction, &format!("reason=\"{reason}\""), &format!("status=\"{status}\"")]);
    assert!((of(reason) - 1.0).abs() < 0.1, "{direction} {reason}: {}", proxy.telemetry.metrics.render());
    for other in ["bad_request", "caller_left"] {
        assert!(other == reason || of(other) < 0.1, "{direction} {other}: {}", proxy.telemetry.metrics.render());
    }
}

/// "A request or response that is defined as having content when it contains a Content-Length header field is malformed if the
/// value of the Content-Length header field does not equal the sum of the DATA frame payload lengths" (RFC 9113 8.1.1).
#[tokio::test(start_paused = true)]
async fn a_body_that_is_not_as_long_as_it_says_is_told_as_malformed() {
    for protocol in ["http", "http2"] {
        for rest in [
            frame(DATA, 0, 3, b"sevens!"),
            frame(DATA, END_STREAM, 3, b"abc"),
            [frame(DATA, 0, 3, b"ab"), frame(DATA, 0, 3, b"cdef")].concat(),
            [frame(DATA, 0, 3, b"abc"), frame(HEADERS, END_HEADERS | END_STREAM, 3, TRAILER)].concat(),
            // Trailers that end nothing.
            [frame(DATA, 0, 3, b"abcde"), frame(HEADERS, END_HEADERS, 3, TRAILER)].concat(),
        ] {
            let prepare = |world: &World| world.slow_app(app_at(3), |_| async { text("served") });
            at_each_door(protocol, prepare, async |direction, mut stream, proxy| {
                // One that is good before and after, so that the streams are told apart.
                let bytes = [preface(&[]), head(1, HEAD), frame(HEADERS, END_HEADERS, 3, FIVE)].concat();
                stream.write_all(&bytes).await.unwrap();
                // The request is on its way, and its body is waited for.
                sleep(Duration::from_secs(1)).await;
                stream.write_all(&[rest.clone(), head(5, HEAD)].concat()).await.unwrap();
                let heard = heard(&mut stream).await;
                let resets: Vec<_> = heard.iter().filter(|(kind, _)| *kind == RST_STREAM).map(|(_, why)| &**why).collect();
                assert_eq!(resets, [&PROTOCOL_ERROR], "{protocol} {direction}");
                assert_eq!(heard.iter().filter(|(_, payload)| payload == b"served").count(), 2, "{protocol} {direction}");
                told_once(&proxy, direction, "bad_request", "400");
            })
            .await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_breaks_the_rules_while_it_is_answered_is_told_as_malformed() {
    let prepare = |world: &World| {
        world.raw_app(app_at(3), |mut stream, _| {
            tokio::spawn(async move {
                until(&mut stream, b"ab").await;
                stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n!\r\n").await.unwrap();
                until(&mut stream, b"\0").await;
            });
        });
    };
    at_each_door("http", prepare, async |direction, mut stream, proxy| {
        let bytes = [preface(&[]), frame(HEADERS, END_HEADERS, 1, FIVE), frame(DATA, 0, 1, b"ab")].concat();
        stream.write_all(&bytes).await.unwrap();
        assert!(heard(&mut stream).await.iter().any(|(kind, payload)| *kind == DATA && payload == b"!"), "{direction}");
        stream.write_all(&frame(DATA, 0, 1, b"cdef")).await.unwrap();
        let heard = heard(&mut stream).await;
        assert!(heard.iter().any(|(kind, why)| *kind == RST_STREAM && *why == PROTOCOL_ERROR), "{direction}");
        told_once(&proxy, direction, "bad_request", "200");
    })
    .await;
}

/// The word that the codec has for a client that breaks the rules may be the client's own.
#[tokio::test(start_paused = true)]
async fn a_client_that_says_that_we_broke_the_rules_left() {
    let prepare = |world: &World| world.slow_app(app_at(3), |_| std::future::pending());
    at_each_door("http2", prepare, async |direction, mut stream, proxy| {
        let bytes = [preface(&[]), frame(HEADERS, END_HEADERS, 1, FIVE), frame(DATA, 0, 1, b"ab")].concat();
        stream.write_all(&bytes).await.unwrap();
        sleep(Duration::from_secs(2)).await;
        stream.write_all(&frame(RST_STREAM, 0, 1, &PROTOCOL_ERROR)).await.unwrap();
        heard(&mut stream).await;
        told_once(&proxy, direction, "caller_left", "");
    })
    .await;
}

/// The codec drops what is beyond its own limit, and what is left would pass for all of them.
#[tokio::test(start_paused = true)]
async fn trailers_over_a_limit_are_refused_by_its_name() {
    for protocol in ["http", "http2"] {
        for (block, limit) in [
            (field(b"\x00\x05x-sum", 70_000), "(headerBytes)"),
            ([field(b"\x00\x05x-sum", 300 << 10), TRAILER.to_vec()].concat(), "(headerBytes)"),
            ([TRAILER.to_vec(), field(b"\x00\x05x-sum", 300 << 10)].concat(), "(headerBytes)"),
            (b"\x00\x01a\x011".repeat(300), "(headerCount)"),
        ] {
            let prepare = |world: &World| world.slow_app(app_at(3), |_| async { text("served") });
            at_each_door(protocol, prepare, async |direction, mut stream, proxy| {
                let bytes =
                    [preface(&[]), frame(HEADERS, END_HEADERS, 1, SOME), frame(DATA, 0, 1, b"ab"), head(1, &block)].concat();
                stream.write_all(&[bytes, head(3, HEAD)].concat()).await.unwrap();
                let heard = heard(&mut stream).await;
                let texts: Vec<_> =
                    heard.iter().filter(|(kind, _)| *kind == DATA).map(|(_, text)| String::from_utf8_lossy(text)).collect();
                assert!(texts.iter().any(|text| text.contains(limit)), "{protocol} {direction}: {texts:?}");
                assert!(texts.iter().any(|text| text == "served"), "{protocol} {direction}: {texts:?}");
                told_once(&proxy, direction, "bad_request", "400");
            })
            .await;
        }
    }
}

/// An application of HTTP/2 whose trailers, of a request and of its answer, are that long.
fn trails(world: &World, length: usize) {
    world.raw_app(app_at(3), move |stream, _| {
        tokio::spawn(async move {
            let mut codec = h2::server::Builder::new();
            codec.max_header_list_size(1 << 20);
            let mut codec = codec.handshake::<_, Bytes>(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = codec.accept().await {
                tokio::spawn(async move {
                    let mut body = request.into_body();
                    let trailers = body.trailers().await.unwrap().unwrap_or_default();
                    let heard = trailers.get("x-sum").map_or(0, HeaderValue::len);
                    let mut to = respond.send_response(Response::new(()), false).unwrap();
                    to.send_data(Bytes::from(heard.to_string()), false).unwrap();
                    to.send_trailers(sum(length)).unwrap();
                });
            }
        });
    });
}

fn sum(length: usize) -> HeaderMap {
    [(http::HeaderName::from_static("x-sum"), HeaderValue::try_from("a".repeat(length)).unwrap())].into_iter().collect()
}

#[tokio::test(start_paused = true)]
async fn trailers_within_the_limits_pass_and_those_of_an_answer_over_them_break_it_off() {
    for (length, passes) in [(100_000, true), (150_000, false), (280_000, false)] {
        let prepare = |world: &World| trails(world, length);
        at_each_door("http2", prepare, async |direction, stream, proxy| {
            let mut codec = h2::client::Builder::new();
            codec.max_header_list_size(1 << 20);
            let (mut sender, connection) = codec.handshake::<_, Bytes>(stream).await.unwrap();
            let driven = tokio::spawn(connection);
            let (answer, mut to) = sender.send_request(Request::post("http://api.shop/").body(()).unwrap(), false).unwrap();
            to.send_trailers(sum(60_000)).unwrap();
            let mut body = answer.await.unwrap().into_body();
            let data = body.data().await;
            let trailers = body.trailers().await;
            if passes {
                assert_eq!(data.unwrap().unwrap(), "60000", "{direction}");
                assert_eq!(trailers.unwrap().unwrap()["x-sum"].len(), length, "{direction}");
            } else {
                assert!(trailers.is_err(), "{direction} {length}");
                sleep(Duration::from_secs(1)).await;
                // Who reads them knows why; on a link the stream is reset.
                let reason = if direction == "inbound" { "upstream_protocol" } else { "upstream_reset" };
                told_once(&proxy, direction, reason, "200");
            }
            driven.abort();
        })
        .await;
    }
}
