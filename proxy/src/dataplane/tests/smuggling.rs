//! Every published shape of request smuggling, sent raw: each is refused, or resolved as RFC 9112 says and written anew, so
//! that an application that takes only what has one meaning sees what is in the table and nothing else.
//!
//! Sources: RFC 9112 2.2, 3.2, 5, 6.1, 6.3, 7.1, 11.2; RFC 9113 8.1.1, 8.2.1, 8.2.2, 8.3.1, 10.3; "HTTP Desync Attacks" and
//! "HTTP/2: The Sequel is Always Worse" (J. Kettle).

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::timeout;

use super::super::strict::{Seen, strict_app};
use super::attacks::{DATA, END_HEADERS, END_STREAM, HEADERS, RST_STREAM, frame, frames, preface};
use super::world::{World, app_at, document, pod, service, vip};
use crate::dataplane::Proxy;

/// What becomes of it: the statuses that the client hears, and what the application sees.
struct Shape {
    name: &'static str,
    sent: &'static str,
    statuses: &'static [u16],
    seen: &'static [&'static str],
}

const fn refused(name: &'static str, sent: &'static str) -> Shape {
    Shape { name, sent, statuses: &[400], seen: &[] }
}

const fn resolved(name: &'static str, sent: &'static str, statuses: &'static [u16], seen: &'static [&'static str]) -> Shape {
    Shape { name, sent, statuses, seen }
}

const HIDDEN: &str = "GET /hidden HTTP/1.1\r\nhost: a\r\n\r\n";

const SHAPES: &[Shape] = &[
    // Framing.
    refused("CL.TE", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 6\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nG"),
    refused(
        "TE.CL",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n8\r\nSMUGGLED\r\n0\r\n\r\n",
    ),
    refused("CL.CL", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab"),
    refused("CL list of different lengths", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1, 2\r\n\r\nab"),
    refused("CL list of one length twice", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2, 2\r\n\r\nab"),
    resolved(
        "CL twice the same",
        "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nab",
        &[200],
        &["POST / ab"],
    ),
    refused("CL with a plus", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +2\r\n\r\nab"),
    refused("CL with a minus", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -2\r\n\r\nab"),
    refused("CL in hexadecimal", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0x2\r\n\r\nab"),
    refused("CL with a blank inside", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1 0\r\n\r\nab"),
    refused("CL empty", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length:\r\n\r\nab"),
    refused("CL beyond 64 bits", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999999\r\n\r\nab"),
    refused(
        "TE of two codings, the last of which is not chunked",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    ),
    refused("TE.TE: xchunked", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n"),
    refused(
        "TE.TE: chunked and another one",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ntransfer-encoding: x\r\n\r\n0\r\n\r\n",
    ),
    refused(
        "TE.TE: chunked twice, in what looks like gRPC",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    ),
    refused("TE.TE: chunked twice", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
    refused(
        "TE.TE: chunked on two lines",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n",
    ),
    refused(
        "TE.TE: chunked before and behind another one",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, gzip, chunked\r\n\r\n0\r\n\r\n",
    ),
    resolved(
        "TE with empty elements before chunked",
        "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: ,, chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        &[200],
        &["POST / ab"],
    ),
    refused(
        "TE with an empty element behind chunked",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked,\r\n\r\n0\r\n\r\n",
    ),
    refused("TE of nothing", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: ,\r\n\r\n0\r\n\r\n"),
    refused("TE.TE: a blank before the colon", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n"),
    refused("TE.TE: a vertical tab", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding:\x0bchunked\r\n\r\n0\r\n\r\n"),
    refused("TE.TE: in quotes", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: \"chunked\"\r\n\r\n0\r\n\r\n"),
    refused("TE.TE: folded", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n"),
    refused("TE.TE: a line feed before", "POST / HTTP/1.1\r\nhost: a\r\nx: y\n transfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    resolved(
        "TE in capitals with a tab",
        "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\nTRANSFER-ENCODING:\tChunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        &[200],
        &["POST / ab"],
    ),
    refused("TE of HTTP/1.0", "POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    resolved(
        "0.CL: a body of a GET is its own",
        "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 33\r\n\r\nGET /hidden HTTP/1.1\r\nhost: a\r\n\r\n",
        &[200],
        &["GET / GET /hidden HTTP/1.1\r\nhost: a\r\n\r\n"],
    ),
    // Chunks.
    resolved(
        "a chunk extension",
        "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n2;a=b\r\nab\r\n0;c\r\n\r\n",
        &[200],
        &["POST / ab"],
    ),
    refused(
        "a chunk extension that ends with a bare line feed",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2;\nxx\r\n0\r\n\r\n",
    ),
    refused(
        "a chunk size beyond 64 bits",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1ffffffffffffffff\r\nab\r\n0\r\n\r\n",
    ),
    refused("a chunk size with a sign", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n+2\r\nab\r\n0\r\n\r\n"),
    refused("a chunk size with 0x", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0x2\r\nab\r\n0\r\n\r\n"),
    refused(
        "a chunk that ends with a bare line feed",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\nab\n0\n\n",
    ),
    refused(
        "a chunk longer than it says",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\nabcd\r\n0\r\n\r\n",
    ),
    resolved(
        "a trailer that ends with a bare line feed, and what may be a request or another trailer",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\na: 1\n\r\nGET /2 HTTP/1.1\r\nhost: a\r\n\r\n",
        &[200],
        &["POST / ab"],
    ),
    // Lines and fields.
    refused("a bare carriage return in a value", "GET / HTTP/1.1\r\nhost: a\r\nx: a\rb\r\n\r\n"),
    refused("a NUL in a value", "GET / HTTP/1.1\r\nhost: a\r\nx: a\0b\r\n\r\n"),
    refused("a NUL in a name", "GET / HTTP/1.1\r\nhost: a\r\nx\0y: a\r\n\r\n"),
    refused("obs-fold", "GET / HTTP/1.1\r\nhost: a\r\nx: a\r\n b\r\n\r\n"),
    refused("a fold in the first field", "GET / HTTP/1.1\r\n x: a\r\nhost: a\r\n\r\n"),
    refused("a blank before the colon", "GET / HTTP/1.1\r\nhost : a\r\n\r\n"),
    refused("a field without a name", "GET / HTTP/1.1\r\nhost: a\r\n: x\r\n\r\n"),
    refused("a field without a colon", "GET / HTTP/1.1\r\nhost: a\r\ncontent-length\r\n\r\n"),
    refused("a tab in the request line", "GET\t/\tHTTP/1.1\r\nhost: a\r\n\r\n"),
    refused("two blanks in the request line", "GET  / HTTP/1.1\r\nhost: a\r\n\r\n"),
    refused("a blank in the target", "GET /a b HTTP/1.1\r\nhost: a\r\n\r\n"),
    refused("a blank before the method", " GET / HTTP/1.1\r\nhost: a\r\n\r\n"),
    refused("an unknown version", "GET / HTTP/1.2\r\nhost: a\r\n\r\n"),
    refused("no version", "GET /\r\nhost: a\r\n\r\n"),
    resolved("bare line feeds", "GET / HTTP/1.1\nhost: a\nconnection: close\n\n", &[200], &["GET / "]),
    // Hosts and targets.
    refused("two hosts", "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n"),
    refused("the same host twice", "GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n"),
    refused("no host", "GET / HTTP/1.1\r\nx: a\r\n\r\n"),
    refused("a host with a user", "GET / HTTP/1.1\r\nhost: a@b\r\n\r\n"),
    refused("a host with a path", "GET / HTTP/1.1\r\nhost: a/b\r\n\r\n"),
    resolved(
        "absolute form with another host: the target's counts",
        "GET http://a/x HTTP/1.1\r\nhost: b\r\nconnection: close\r\n\r\n",
        &[200],
        &["GET /x "],
    ),
    refused("a target without a slash", "GET a HTTP/1.1\r\nhost: a\r\n\r\n"),
    refused("CONNECT with a body", "CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\ncontent-length: 2\r\n\r\nab"),
    refused("CONNECT of a path", "CONNECT / HTTP/1.1\r\nhost: a:80\r\n\r\n"),
    resolved(
        "Connection names Content-Length, which stays",
        "POST / HTTP/1.1\r\nhost: a\r\nconnection: close, content-length\r\ncontent-length: 2\r\n\r\nab",
        &[200],
        &["POST / ab"],
    ),
    resolved(
        "a request behind another one is one of its own",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nabGET /next HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        &[200, 200],
        &["POST / ab", "GET /next "],
    ),
];

struct Bench {
    world: World,
    web: Arc<Proxy>,
    api: Arc<Proxy>,
    seen: Seen,
    apps: Arc<Mutex<Vec<tokio::task::JoinHandle<()>>>>,
}

fn bench() -> Bench {
    let mut declared = service("api", "api", 1);
    declared["spec"]["ports"][0]["appProtocol"] = json!("http");
    let open = document("PeerAuthentication", "open", json!({ "mode": "Permissive" }));
    let world = World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), declared, open]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    let (seen, apps) = (Seen::default(), Arc::new(Mutex::new(Vec::new())));
    let (see, run) = (Arc::clone(&seen), Arc::clone(&apps));
    world.raw_app(app_at(3), move |stream, _client| run.lock().push(tokio::spawn(strict_app(stream, Arc::clone(&see)))));
    Bench { world, web, api, seen, apps }
}

impl Bench {
    /// Through one sidecar and through two.
    fn open(&self, hops: u32) -> DuplexStream {
        if hops == 1 { self.world.connect_inbound(&self.api, app_at(3)) } else { self.world.connect(&self.web, vip(1)) }
    }

    /// The application met nothing that has two meanings.
    async fn unbroken(&self, name: &str) {
        let apps = std::mem::take(&mut *self.apps.lock());
        for app in apps {
            if app.is_finished()
                && let Err(error) = app.await
            {
                panic!("{name}: the application met what has two meanings: {error}");
            }
        }
    }
}

fn statuses(heard: &str) -> Vec<u16> {
    heard
        .match_indices("HTTP/1.")
        .filter(|(at, _)| *at == 0 || heard.as_bytes()[at - 1] != b' ')
        .filter_map(|(at, _)| heard.get(at + 9..at + 12)?.parse().ok())
        .collect()
}

#[tokio::test(start_paused = true)]
async fn every_shape_of_http_1_is_refused_or_resolved() {
    let mut wrong = Vec::new();
    for hops in [1, 2] {
        for shape in SHAPES {
            let bench = bench();
            let mut stream = bench.open(hops);
            let (mut read, mut write) = tokio::io::split(&mut stream);
            let mut heard = Vec::new();
            let talk = async {
                write.write_all(shape.sent.as_bytes()).await.ok();
                // What a reader that was led astray would take for the next request.
                if shape.statuses == [400] {
                    write.write_all(HIDDEN.as_bytes()).await.ok();
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
                write.shutdown().await.ok();
            };
            let hear = read.read_to_end(&mut heard);
            timeout(Duration::from_secs(1_000), async { tokio::join!(talk, hear) }).await.expect("an end").1.ok();
            bench.unbroken(shape.name).await;
            let heard = String::from_utf8_lossy(&heard).into_owned();
            let (statuses, seen) = (statuses(&heard), bench.seen.lock().clone());
            if statuses != shape.statuses || seen != shape.seen {
                wrong.push(format!("{} over {hops}: {statuses:?} {seen:?}", shape.name));
            }
            if shape.statuses == [400] && !heard.contains("outrigger-reason: bad_request") {
                wrong.push(format!("{} over {hops}: no reason: {heard}", shape.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Some wait for the next trailer behind it, and some for the next request.
#[tokio::test(start_paused = true)]
async fn a_trailer_that_ends_with_a_bare_line_feed_keeps_nobody_waiting() {
    for hops in [1, 2] {
        let bench = bench();
        let mut stream = bench.open(hops);
        let request = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\na: 1\n\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut heard = String::new();
        timeout(Duration::from_secs(1), stream.read_to_string(&mut heard)).await.expect("an end").unwrap();
        assert!(heard.starts_with("HTTP/1.1 400 ") && heard.contains("outrigger-reason: bad_request"), "{heard}");
    }
}

/// A field of HPACK that is written out and not indexed.
fn field(name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut field = vec![0, u8::try_from(name.len()).unwrap()];
    field.extend_from_slice(name);
    field.push(u8::try_from(value.len()).unwrap());
    field.extend_from_slice(value);
    field
}

/// A field's name and value.
type Field<'a> = (&'a [u8], &'a [u8]);

#[tokio::test(start_paused = true)]
async fn what_http_2_can_carry_and_http_1_cannot_is_refused() {
    let shapes: &[(&str, &[Field<'_>], &[u8])] = &[
        ("a line break in a value", &[(b"x", b"a\r\nhidden: b")], b""),
        ("a line feed in a value", &[(b"x", b"a\nb")], b""),
        ("a carriage return in a value", &[(b"x", b"a\rb")], b""),
        ("a NUL in a value", &[(b"x", b"a\0b")], b""),
        ("a blank before a value", &[(b"x", b" a")], b""),
        ("a tab behind a value", &[(b"x", b"a\t")], b""),
        ("a line break in a name", &[(b"x\r\nhidden", b"a")], b""),
        ("a colon in a name", &[(b"x:y", b"a")], b""),
        ("a blank in a name", &[(b"x y", b"a")], b""),
        ("a capital in a name", &[(b"X", b"a")], b""),
        ("a name without letters", &[(b"", b"a")], b""),
        ("transfer-encoding", &[(b"transfer-encoding", b"chunked")], b"0\r\n\r\n"),
        ("connection", &[(b"connection", b"close")], b""),
        ("a pseudo-header behind a field", &[(b"x", b"a"), (b":path", b"/hidden")], b""),
        ("a pseudo-header that is unknown", &[(b":hidden", b"a")], b""),
        ("a path twice", &[(b":path", b"/hidden")], b""),
        ("a line break in the path", &[(b":path", b"/a HTTP/1.1\r\nhidden: b")], b""),
        ("another host", &[(b"host", b"b")], b""),
        ("two hosts", &[(b"host", b"a"), (b"host", b"a")], b""),
        ("a length beyond the body", &[(b"content-length", b"5")], b"ab"),
        ("a length below the body", &[(b"content-length", b"1")], b"ab"),
        ("two lengths", &[(b"content-length", b"2"), (b"content-length", b"3")], b"ab"),
        ("a length that is none", &[(b"content-length", b"+2")], b"ab"),
        ("te of another coding", &[(b"te", b"chunked")], b""),
    ];
    let mut wrong = Vec::new();
    for hops in [1, 2] {
        for (name, fields, body) in shapes {
            let bench = bench();
            let mut stream = bench.open(hops);
            // Four pseudo-headers; a path of the shape's own comes in the place of ours only where it is malformed.
            let mut block = vec![0x83, 0x86];
            let own_path = *name == "a line break in the path";
            if !own_path {
                block.push(0x84);
            }
            block.extend_from_slice(b"\x01\x01a");
            block.extend(fields.iter().flat_map(|(name, value)| field(name, value)));
            let mut sent = preface(&[]);
            sent.extend(frame(HEADERS, END_HEADERS | if body.is_empty() { END_STREAM } else { 0 }, 1, &block));
            if !body.is_empty() {
                sent.extend(frame(DATA, END_STREAM, 1, body));
            }
            stream.write_all(&sent).await.unwrap();
            let mut heard = Vec::new();
            let hear = async {
                let mut buffer = vec![0; 4_096];
                while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                    heard.extend_from_slice(&buffer[..read]);
                }
            };
            timeout(Duration::from_secs(5), hear).await.ok();
            bench.unbroken(name).await;
            let seen = bench.seen.lock().clone();
            let heard = frames(&heard);
            let reset = heard.iter().any(|(kind, _)| matches!(*kind, RST_STREAM | 7));
            // `:status 400` is number 12 of the static table; any other refusal is no answer but a reset.
            let refused = heard.iter().any(|(kind, payload)| *kind == HEADERS && payload.first() == Some(&0x8c));
            // What TE may say is cut down to what HTTP/2 knows (RFC 9113 8.2.2) or refused.
            let cut = *name == "te of another coding" && seen == ["POST / "];
            if !(seen.is_empty() && (reset || refused) || cut) {
                wrong.push(format!("{name} over {hops}: {seen:?} {heard:x?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The codec drops it, and nobody behind us hears of it.
#[tokio::test(start_paused = true)]
async fn a_pseudo_header_in_trailers_goes_no_further() {
    for hops in [1, 2] {
        let bench = bench();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&seen);
        bench.world.raw_app(app_at(3), move |mut stream, _client| {
            let kept = Arc::clone(&kept);
            tokio::spawn(async move {
                let mut bytes = [0; 4_096];
                while let Ok(read @ 1..) = stream.read(&mut bytes).await {
                    kept.lock().extend_from_slice(&bytes[..read]);
                }
            });
        });
        let mut stream = bench.open(hops);
        let head = [b"\x83\x86\x84\x01\x01a".to_vec(), field(b"trailer", b"x-sum")].concat();
        let trailers = [field(b":path", b"/hidden"), b"\x83\x01\x01b".to_vec(), field(b"x-sum", b"1")].concat();
        let sent = [
            preface(&[]),
            frame(HEADERS, END_HEADERS, 1, &head),
            frame(DATA, 0, 1, b"ab"),
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &trailers),
        ];
        stream.write_all(&sent.concat()).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let seen = String::from_utf8_lossy(&seen.lock()).into_owned();
        assert!(seen.starts_with("POST / HTTP/1.1\r\n") && seen.contains("\r\nhost: a\r\n"), "{seen}");
        assert!(seen.ends_with("\r\n\r\n2\r\nab\r\n0\r\nx-sum: 1\r\n\r\n") && !seen.contains("hidden"), "{seen}");
    }
}
