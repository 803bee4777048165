//! What is fuzzed of the data plane: first bytes, paths, and whole connections through a sidecar to an application that
//! takes nothing which two readers could read differently.
#![expect(clippy::unwrap_used, reason = "a broken promise is told by a panic")]

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::runtime::Runtime;

use super::strict::strict_app;
use super::world::{World, app_at, document, pod, service};
use crate::dataplane::Proxy;
use crate::dataplane::sniff::{Sniffed, classify, settle};
use crate::policy::path::normal_path;

/// First bytes: an answer never changes when more of them come, and the end of the time changes none either.
pub fn sniff(bytes: &[u8]) {
    let mut given = None;
    for end in 0..=bytes.len().min(512) {
        let head = bytes.get(..end).unwrap_or_default();
        let answer = classify(head);
        assert!(given.is_none() || answer == given, "an answer changed");
        assert!(answer.is_none_or(|answer| settle(head) == answer), "the end of the time changed an answer");
        given = answer;
    }
    crate::dataplane::tls::hello_offers_link(bytes);
}

/// Paths: a normal form is its own normal form, and one that all servers read alike has no dot segments.
pub fn path(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(uri) = format!("/{text}").parse::<http::Uri>() else { return };
    let (once, ambiguous) = normal_path(uri.path());
    let (twice, still) = normal_path(&once);
    assert_eq!(once, twice, "a normal form that is none");
    assert!(ambiguous || !still, "ambiguous only when read twice");
    assert!(once.starts_with('/'), "a path without a beginning");
    assert!(ambiguous || once.split('/').all(|segment| segment != "." && segment != ".."), "a dot segment is left");
}

/// A connection from outside, HTTP/1.1: what reaches the application is strict.
pub fn http1(bytes: &[u8]) {
    // What is no HTTP is passed on as it is.
    if settle(bytes) == Sniffed::Http1 {
        connection(bytes);
    }
}

/// A connection from outside, HTTP/2: the preface is given, frames are not.
pub fn http2(bytes: &[u8]) {
    connection(&[PREFACE, bytes].concat());
}

/// By the clock that jumps.
const ANSWERS_MAX: Duration = Duration::from_secs(1);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// A sidecar whose pod takes plaintext, and its runtime, whose clock jumps over every wait.
struct Bench {
    runtime: Runtime,
    world: World,
    proxy: Arc<Proxy>,
}

impl Bench {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let world = World::new(&[
            pod("api", "api-1", 3),
            service("api", "api", 1),
            document("PeerAuthentication", "open", json!({ "mode": "Permissive" })),
            // Tunnels are asked for, so that they are fuzzed, too.
            document(
                "AuthorizationPolicy",
                "all",
                json!({ "action": "ALLOW", "rules": [{}, { "to": [{ "methods": ["CONNECT"] }] }] }),
            ),
        ]);
        let entered = runtime.enter();
        let proxy = world.sidecar("api", "api-1", 3);
        world.raw_app(app_at(3), |stream, _client| drop(tokio::spawn(strict_app(stream, Arc::default()))));
        drop(entered);
        Self { runtime, world, proxy }
    }
}

thread_local! {
    static BENCH: RefCell<Bench> = RefCell::new(Bench::new());
}

fn connection(bytes: &[u8]) {
    BENCH.with_borrow_mut(|bench| {
        let Bench { runtime, world, proxy } = bench;
        runtime.block_on(async {
            let mut stream = world.connect_inbound(proxy, app_at(3));
            let (mut read, mut write) = tokio::io::split(&mut stream);
            let sent = async {
                // A sidecar may close at any byte.
                drop(write.write_all(bytes).await);
                // To HTTP/2 the end of a client's bytes is the end of the connection, so its answers come first.
                tokio::time::sleep(ANSWERS_MAX).await;
                drop(write.shutdown().await);
            };
            let heard = async {
                let mut answers = Vec::new();
                drop(read.read_to_end(&mut answers).await);
            };
            tokio::join!(sent, heard);
        });
    });
}
