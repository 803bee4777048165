//! What is fuzzed of the data plane: first bytes, paths, and whole connections through a sidecar to an application that
//! takes nothing which two readers could read differently.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a broken promise is told by a panic")]

use std::cell::RefCell;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::runtime::Runtime;

use super::world::{World, app_at, document, pod, service};
use crate::dataplane::Proxy;
use crate::dataplane::http::normalize::normal_path;
use crate::dataplane::sniff::{Prefixed, Sniffed, classify, settle};

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
        ]);
        let entered = runtime.enter();
        let proxy = world.sidecar("api", "api-1", 3);
        world.raw_app(app_at(3), |stream, _client| drop(tokio::spawn(strict_app(stream))));
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

/// An application that takes only what has one meaning, and answers each request.
async fn strict_app(mut stream: DuplexStream) {
    let mut bytes = BytesMut::new();
    while bytes.len() < PREFACE_LINE.len() {
        if !matches!(stream.read_buf(&mut bytes).await, Ok(1..)) {
            return;
        }
    }
    if bytes.starts_with(PREFACE_LINE) {
        // What a caller speaks is spoken to the application.
        let service = service_fn(|request| std::future::ready(Ok::<_, Infallible>(strict_answer(&request))));
        let stream = Prefixed::join(bytes.freeze(), Box::new(stream));
        drop(http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await);
        return;
    }
    loop {
        let Some(body) = head(&mut stream, &mut bytes).await else { return };
        let whole = match body {
            Framing::Length(length) => skip(&mut stream, &mut bytes, length).await,
            Framing::Chunked => chunks(&mut stream, &mut bytes).await,
        };
        if whole.is_none() || stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.is_err() {
            return;
        }
    }
}

const PREFACE_LINE: &[u8] = b"PRI * HTTP/2.0\r\n";

/// RFC 9113 8.2 and 8.3: what a request in HTTP/2 must not have.
fn strict_answer(request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let names = ["connection", "transfer-encoding", "keep-alive", "upgrade", "proxy-connection", "http2-settings"];
    for name in names {
        assert!(!request.headers().contains_key(name), "the field {name:?}");
    }
    assert!(request.uri().authority().is_some(), "no authority");
    assert!(request.headers().get_all("content-length").iter().count() <= 1, "two lengths");
    assert!(!request.headers().keys().any(|name| name.as_str().starts_with("outrigger-")), "a reserved name");
    Response::new(Full::from("ok"))
}

enum Framing {
    Length(usize),
    Chunked,
}

/// Reads one head; `None` at the end of the connection.
async fn head(stream: &mut DuplexStream, bytes: &mut BytesMut) -> Option<Framing> {
    let (mut length, mut chunked, mut hosts) = (None, false, 0);
    let first = line(stream, bytes).await?;
    let words: Vec<&str> = first.split(' ').collect();
    let [method, target, version] = *words.as_slice() else { panic!("a request line of {} words: {first:?}", words.len()) };
    assert!(!method.is_empty() && method.bytes().all(token), "the method {method:?}");
    assert!(!target.is_empty() && target.bytes().all(|byte| byte > b' ' && byte != 0x7f), "the target {target:?}");
    assert!(matches!(version, "HTTP/1.1" | "HTTP/1.0"), "the version {version:?}");
    loop {
        let field = line(stream, bytes).await?;
        if field.is_empty() {
            break;
        }
        let (name, value) = field.split_once(':').unwrap_or_else(|| panic!("a field without colon: {field:?}"));
        assert!(!name.is_empty() && name.bytes().all(token), "the field name {name:?}");
        assert!(value.bytes().all(|byte| byte == b'\t' || byte >= b' ' && byte != 0x7f), "the value {value:?}");
        let value = value.trim();
        match &*name.to_ascii_lowercase() {
            "content-length" => {
                assert!(length.is_none(), "two lengths");
                assert!(value.bytes().all(|byte| byte.is_ascii_digit()), "the length {value:?}");
                length = value.parse().ok();
                assert!(length.is_some(), "the length {value:?}");
            }
            "transfer-encoding" => {
                assert!(!chunked && value.eq_ignore_ascii_case("chunked"), "the coding {value:?}");
                chunked = true;
            }
            "host" => hosts += 1,
            name => assert!(!name.starts_with("outrigger-"), "a reserved name: {name:?}"),
        }
    }
    assert!(hosts == 1 || hosts == 0 && version == "HTTP/1.0", "{hosts} hosts");
    assert!(length.is_none() || !chunked, "two framings");
    Some(if chunked { Framing::Chunked } else { Framing::Length(length.unwrap_or(0)) })
}

async fn chunks(stream: &mut DuplexStream, bytes: &mut BytesMut) -> Option<()> {
    loop {
        let size = line(stream, bytes).await?;
        assert!((1..=8).contains(&size.len()) && size.bytes().all(|byte| byte.is_ascii_hexdigit()), "the chunk size {size:?}");
        let size = usize::from_str_radix(&size, 16).ok()?;
        if size == 0 {
            break;
        }
        skip(stream, bytes, size).await?;
        assert_eq!(line(stream, bytes).await?, "", "a chunk longer than it says");
    }
    while !line(stream, bytes).await?.is_empty() {}
    Some(())
}

async fn skip(stream: &mut DuplexStream, bytes: &mut BytesMut, mut length: usize) -> Option<()> {
    while length > 0 {
        if bytes.is_empty() && stream.read_buf(bytes).await.ok()? == 0 {
            return None;
        }
        let part = length.min(bytes.len());
        bytes.advance(part);
        length -= part;
    }
    Some(())
}

/// The next line without its end; Latin-1 is widened, so that every byte stays one character.
async fn line(stream: &mut DuplexStream, bytes: &mut BytesMut) -> Option<String> {
    loop {
        if let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let line = bytes.split_to(end + 1);
            let line = line.strip_suffix(b"\r\n").unwrap_or_else(|| panic!("a bare line feed"));
            assert!(!line.contains(&b'\r') && !line.contains(&0), "a control byte: {line:?}");
            return Some(line.iter().map(|byte| char::from(*byte)).collect());
        }
        if stream.read_buf(bytes).await.ok()? == 0 {
            return None;
        }
    }
}

fn token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}
