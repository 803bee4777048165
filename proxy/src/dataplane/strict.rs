//! An application that takes only what has one meaning, for tests and fuzz targets: whatever two readers could read
//! differently ends it with a panic.
//!
//! Sources: RFC 9112 2.2, 3, 5, 6 and 7.1; RFC 9113 8.2, 8.3 and 8.5; RFC 9110 9.3.6. It is a forward proxy, too: what comes behind a
//! CONNECT is for somebody else, and may be anything.
#![expect(clippy::panic, reason = "a broken promise is told by a panic")]

use std::convert::Infallible;
use std::sync::Arc;

use bytes::BytesMut;
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use super::sniff::Prefixed;
use bytes::Bytes;

/// What it saw: `METHOD TARGET BODY` of each whole request.
pub(super) type Seen = Arc<Mutex<Vec<String>>>;

/// An application that takes only what has one meaning, and answers each request.
pub(super) async fn strict_app(mut stream: DuplexStream, seen: Seen) {
    let mut bytes = BytesMut::new();
    while bytes.len() < PREFACE_LINE.len() {
        if !matches!(stream.read_buf(&mut bytes).await, Ok(1..)) {
            return;
        }
    }
    if bytes.starts_with(PREFACE_LINE) {
        // What a caller speaks is spoken to the application.
        let service = service_fn(|mut request: Request<Incoming>| {
            let answer = strict_answer(&request);
            if *request.method() == Method::CONNECT {
                let tunnel = hyper::upgrade::on(&mut request);
                tokio::spawn(async move {
                    if let Ok(tunnel) = tunnel.await {
                        drop(tokio::io::copy(&mut TokioIo::new(tunnel), &mut tokio::io::sink()).await);
                    }
                });
            }
            let asked = format!("{} {}", request.method(), request.uri().path_and_query().map_or("", |path| path.as_str()));
            let seen = Arc::clone(&seen);
            async move {
                // A body that breaks off is a request that was not whole.
                if let Ok(body) = request.into_body().collect().await {
                    let body = String::from_utf8_lossy(&body.to_bytes()).into_owned();
                    seen.lock().push(format!("{asked} {body}"));
                }
                Ok::<_, Infallible>(answer)
            }
        });
        let stream = Prefixed::join(bytes.freeze(), Box::new(stream));
        drop(http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await);
        return;
    }
    loop {
        let Some((asked, framing)) = head(&mut stream, &mut bytes).await else { return };
        if asked.starts_with("CONNECT ") {
            assert!(matches!(framing, Framing::Length(0)), "a CONNECT with a body");
            seen.lock().push(asked);
            if stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.is_ok() {
                drop(tokio::io::copy(&mut stream, &mut tokio::io::sink()).await);
            }
            return;
        }
        let mut body = String::new();
        let whole = match framing {
            Framing::Length(length) => take(&mut stream, &mut bytes, length, &mut body).await,
            Framing::Chunked => chunks(&mut stream, &mut bytes, &mut body).await,
        };
        if whole.is_none() {
            return;
        }
        seen.lock().push(format!("{asked} {body}"));
        if stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.is_err() {
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
    let uri = request.uri();
    assert!(uri.authority().is_some(), "no authority");
    if *request.method() == Method::CONNECT {
        assert!(uri.port_u16().is_some_and(|port| port > 0) && uri.scheme().is_none(), "a tunnel to {uri}");
        assert!(!request.headers().contains_key("content-length"), "a CONNECT with a body");
        return Response::default();
    }
    assert!(request.headers().get_all("content-length").iter().count() <= 1, "two lengths");
    assert!(!request.headers().keys().any(|name| name.as_str().starts_with("outrigger-")), "a reserved name");
    Response::new(Full::from("ok"))
}

enum Framing {
    Length(usize),
    Chunked,
}

/// Reads one head; `None` at the end of the connection.
async fn head(stream: &mut DuplexStream, bytes: &mut BytesMut) -> Option<(String, Framing)> {
    let (mut length, mut chunked, mut hosts) = (None, false, 0);
    let first = line(stream, bytes).await?;
    let words: Vec<&str> = first.split(' ').collect();
    let [method, target, version] = *words.as_slice() else { panic!("a request line of {} words: {first:?}", words.len()) };
    assert!(!method.is_empty() && method.bytes().all(token), "the method {method:?}");
    assert!(!target.is_empty() && target.bytes().all(|byte| byte > b' ' && byte != 0x7f), "the target {target:?}");
    if method == "CONNECT" {
        let port = target.rsplit_once(':').filter(|(host, _)| !host.is_empty() && !host.contains(['/', '@', '?', '#']));
        assert!(port.is_some_and(|(_, port)| port.parse::<u16>().is_ok_and(|port| port > 0)), "a tunnel to {target:?}");
    }
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
    let asked = format!("{method} {target}");
    Some((asked, if chunked { Framing::Chunked } else { Framing::Length(length.unwrap_or(0)) }))
}

async fn chunks(stream: &mut DuplexStream, bytes: &mut BytesMut, body: &mut String) -> Option<()> {
    loop {
        let size = line(stream, bytes).await?;
        assert!((1..=8).contains(&size.len()) && size.bytes().all(|byte| byte.is_ascii_hexdigit()), "the chunk size {size:?}");
        let size = usize::from_str_radix(&size, 16).ok()?;
        if size == 0 {
            break;
        }
        take(stream, bytes, size, body).await?;
        assert_eq!(line(stream, bytes).await?, "", "a chunk longer than it says");
    }
    while !line(stream, bytes).await?.is_empty() {}
    Some(())
}

async fn take(stream: &mut DuplexStream, bytes: &mut BytesMut, mut length: usize, body: &mut String) -> Option<()> {
    while length > 0 {
        if bytes.is_empty() && stream.read_buf(bytes).await.ok()? == 0 {
            return None;
        }
        let part = length.min(bytes.len());
        body.push_str(&String::from_utf8_lossy(&bytes.split_to(part)));
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
