//! Many requests with large heads: what they hold together is bounded, and small ones go on.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::{sleep, timeout};

use super::attacks::{HEADERS, frame, frames, open_pair, preface};
use super::unseen::{count, field, head};
use super::world::{app_at, ask, get, text, told, vip};

/// `:path /never` of `api.shop`, and 60 KiB that come out of the table: fifteen times the field that the first of them puts there.
fn heads(many: u32) -> Vec<u8> {
    let names = b"\x82\x86\x01\x08api.shop\x04\x06/never";
    let first = [names.to_vec(), field(b"\x40\x01x", 3_900), vec![0xbe; 15]].concat();
    let more = [names.as_slice(), &[0xbe; 15]].concat();
    (0..many).flat_map(|index| head(index * 2 + 1, if index == 0 { &first } else { &more })).collect()
}

async fn answers(stream: &mut DuplexStream) -> usize {
    let mut heard = Vec::new();
    while let Ok(read) = timeout(Duration::from_millis(500), stream.read_buf(&mut heard)).await {
        assert!(read.unwrap() > 0, "the connection lives");
    }
    frames(&heard).iter().filter(|(kind, _)| *kind == HEADERS).count()
}

#[tokio::test(start_paused = true)]
async fn large_heads_beyond_what_they_may_hold_together_are_refused_and_small_ones_pass() {
    for direction in ["outbound", "inbound"] {
        let (world, web, api) = open_pair("http", &json!({ "largeHeadBytes": 1 << 20 }));
        world.slow_app(app_at(3), |request: Request<Bytes>| async move {
            if request.uri().path() == "/never" {
                std::future::pending::<()>().await;
            }
            text("served")
        });
        let open = || match direction {
            "outbound" => world.connect(&web, vip(1)),
            _ => world.connect_inbound(&api, app_at(3)),
        };
        let proxy = if direction == "outbound" { &web } else { &api };
        let mut streams = Vec::new();
        let mut refused = 0;
        for _ in 0..4 {
            let mut stream = open();
            stream.write_all(&[preface(&[]), heads(25)].concat()).await.unwrap();
            refused += answers(&mut stream).await;
            streams.push(stream);
        }
        // Of a MiB seventeen have room.
        assert_eq!(refused, 100 - 17, "{direction}");
        told(proxy, &["outrigger_requests_total", direction, "reason=\"overloaded\"", "status=\"503\""]);
        told(proxy, &["outrigger_large_heads_held_bytes 10"]);
        assert_eq!(ask(open(), get("/")).await.status, 200, "{direction}");
        drop(streams);
        sleep(Duration::from_secs(1)).await;
        told(proxy, &["outrigger_large_heads_held_bytes 0"]);
        let left = count(proxy, &[&format!("direction=\"{direction}\""), "reason=\"caller_left\""]);
        assert!((left - 17.0).abs() < 0.1, "{direction}: {left}");
        let mut stream = open();
        stream.write_all(&[preface(&[]), heads(5), frame(6, 0, 0, &[0; 8])].concat()).await.unwrap();
        assert_eq!(answers(&mut stream).await, 0, "{direction}");
    }
}
