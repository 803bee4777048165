//! `Expect`: what a caller asks for in any spelling, and what becomes of its connection when the application refuses.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{sleep, timeout};

use super::fidelity::{hop, pair, sidecars, until};
use super::world::{app_at, vip};

const CONTINUE: &str = "HTTP/1.1 100 Continue\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

#[tokio::test(start_paused = true)]
async fn who_expects_something_else_beside_is_told_what_the_application_says() {
    for expects in [
        "Expect: 100-continue, foo",
        "Expect: foo,100-Continue",
        "Expect: foo\r\nExpect: 100-continue",
        "Expect: 100-continue\r\nExpect: foo",
    ] {
        for world in [pair(), hop()] {
            let web = sidecars(&world);
            world.raw_app(app_at(3), move |mut stream, _| {
                tokio::spawn(async move {
                    let head = until(&mut stream, b"\r\n\r\n").await;
                    assert!(head.contains(&format!("\r\n{expects}\r\n")), "{head}");
                    sleep(Duration::from_millis(300)).await;
                    stream.write_all(CONTINUE.as_bytes()).await.unwrap();
                    assert_eq!(until(&mut stream, b"body").await, "body");
                    stream.write_all(OK.as_bytes()).await.unwrap();
                    until(&mut stream, b"\0").await;
                });
            });
            let mut stream = world.connect(&web, vip(1));
            let head = format!("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n{expects}\r\n\r\n");
            stream.write_all(head.as_bytes()).await.unwrap();
            let heard = timeout(Duration::from_secs(5), until(&mut stream, b"\r\n\r\n")).await.expect("a word");
            assert_eq!(heard, CONTINUE, "{expects}");
            stream.write_all(b"body").await.unwrap();
            assert_eq!(until(&mut stream, b"\r\n\r\nok").await, OK, "{expects}");
        }
    }
}

/// Nobody was told to send it, so nobody knows whether what comes next is the body or the next request (RFC 9110 10.1.1).
#[tokio::test(start_paused = true)]
async fn a_refusal_without_the_body_closes_the_connection_and_nothing_is_taken_for_a_request() {
    for (pause, next) in [
        (0, "GET /next HTTP/1.1\r\nHost: a\r\n\r\n"),
        (1_500, "GET /next HTTP/1.1\r\nHost: a\r\n\r\n"),
        (0, "bodyGET /next HTTP/1.1\r\nHost: a\r\n\r\n"),
        (1_500, "bodyGET /next HTTP/1.1\r\nHost: a\r\n\r\n"),
        (1_500, ""),
    ] {
        for world in [pair(), hop()] {
            let web = sidecars(&world);
            world.raw_app(app_at(3), move |mut stream, _| {
                tokio::spawn(async move {
                    let head = until(&mut stream, b"\r\n\r\n").await;
                    assert!(head.starts_with("PUT /up "), "{head}");
                    sleep(Duration::from_millis(pause)).await;
                    stream.write_all(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
                    let rest = until(&mut stream, b"\0").await;
                    assert!(!rest.contains("/next"), "{rest}");
                });
            });
            let mut stream = world.connect(&web, vip(1));
            stream.write_all(b"PUT /up HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n").await.unwrap();
            let heard = until(&mut stream, b"\r\n\r\nno").await;
            assert!(heard.starts_with("HTTP/1.1 417 Expectation Failed\r\n"), "{heard}");
            assert!(heard.to_ascii_lowercase().contains("\r\nconnection: close\r\n"), "{pause} {next:?} {heard}");
            // Whatever comes is read for a while: a reset would take the answer away from who has not read it yet.
            sleep(Duration::from_millis(500)).await;
            stream.write_all(next.as_bytes()).await.unwrap();
            let mut rest = Vec::new();
            timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await.expect("it stays open").unwrap();
            assert!(rest.is_empty(), "{}", String::from_utf8_lossy(&rest));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_behind_the_whole_body_leaves_the_connection_open() {
    for world in [pair(), hop()] {
        let web = sidecars(&world);
        world.raw_app(app_at(3), move |mut stream, _| {
            tokio::spawn(async move {
                until(&mut stream, b"\r\n\r\nbody").await;
                stream.write_all(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
                until(&mut stream, b"\r\n\r\n").await;
                stream.write_all(OK.as_bytes()).await.unwrap();
            });
        });
        let mut stream = world.connect(&web, vip(1));
        stream.write_all(b"PUT /up HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\nbody").await.unwrap();
        let heard = until(&mut stream, b"\r\n\r\nno").await;
        assert_eq!(heard, "HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno");
        stream.write_all(b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        assert_eq!(until(&mut stream, b"\r\n\r\nok").await, OK);
    }
}

/// The codec says `100 Continue` by itself when a body is asked for. Behind an answer that is still being read, its word is
/// not the first thing that it writes.
#[tokio::test(start_paused = true)]
async fn a_word_of_the_codecs_own_is_taken_away_behind_an_answer_that_is_read_slowly_too() {
    let large = "b".repeat(600 << 10);
    let first: &'static str = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{large}", large.len()).leak();
    for says in [true, false] {
        for world in [pair(), hop()] {
            let web = sidecars(&world);
            world.raw_app(app_at(3), move |mut stream, _| {
                tokio::spawn(async move {
                    loop {
                        let head = until(&mut stream, b"\r\n\r\n").await;
                        if head.starts_with("GET ") {
                            stream.write_all(first.as_bytes()).await.unwrap();
                        } else if head.starts_with("PUT ") {
                            if says {
                                stream.write_all(CONTINUE.as_bytes()).await.unwrap();
                            }
                            until(&mut stream, b"body").await;
                            stream.write_all(OK.as_bytes()).await.unwrap();
                        } else {
                            return;
                        }
                    }
                });
            });
            let mut stream = world.connect(&web, vip(1));
            let both = "GET / HTTP/1.1\r\nHost: a\r\n\r\nPUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\nbody";
            stream.write_all(both.as_bytes()).await.unwrap();
            // Long enough for everything to stand still.
            sleep(Duration::from_secs(10)).await;
            let expected = format!("{first}{}{OK}", if says { CONTINUE } else { "" });
            let mut heard = vec![0; expected.len()];
            for piece in heard.chunks_mut(10_000) {
                timeout(Duration::from_secs(60), stream.read_exact(piece)).await.expect("more").unwrap();
                sleep(Duration::from_millis(5)).await;
            }
            assert!(heard == expected.as_bytes(), "says: {says}: {:?}", String::from_utf8_lossy(&heard[first.len()..]));
        }
    }
}
