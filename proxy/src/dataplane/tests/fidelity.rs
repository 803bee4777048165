//! What an application sees of a message, and what it does not: bytes at one end of a pair of sidecars, bytes at the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use crate::dataplane::Proxy;
use crate::snapshot::Transport;

use super::world::{World, app_at, ask_h2, pod, service, vip};

pub(super) fn pair() -> World {
    let mut api = service("api", "api", 1);
    api["spec"]["ports"][0]["appProtocol"] = json!("http");
    World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), api])
}

/// The same without a sidecar at the application.
pub(super) fn hop() -> World {
    let mut api = pod("api", "api-1", 3);
    api["spec"]["transport"] = json!("Plaintext");
    World::new(&[pod("web", "web-1", 2), api, service("api", "api", 1)])
}

/// Starts the sidecar of the client, and that of the application where it has one.
pub(super) fn sidecars(world: &World) -> Arc<Proxy> {
    let web = world.sidecar("web", "web-1", 2);
    let mutual = web.published.current().outbound.services.get(&vip(1)).is_some_and(|port| {
        port.default_backend.endpoints.iter().any(|endpoint| matches!(endpoint.transport, Transport::MutualTls(_)))
    });
    if mutual {
        world.sidecar("api", "api-1", 3);
    }
    web
}

/// Reads up to and with `end`.
pub(super) async fn until(stream: &mut DuplexStream, end: &[u8]) -> String {
    let mut read = Vec::new();
    while !read.ends_with(end) {
        match stream.read_u8().await {
            Ok(byte) => read.push(byte),
            Err(_closed) => break,
        }
    }
    String::from_utf8_lossy(&read).into_owned()
}

/// Sends `request` through the pair to an application that reads up to `end` and answers with `answer`; what the
/// application saw, less what every request gets, and what the client heard up to its end or `heard_end`.
pub(super) async fn exchange(
    world: &World,
    request: &str,
    end: &'static str,
    answer: &'static str,
    heard_end: &str,
) -> (String, String) {
    let web = sidecars(world);
    let seen = Arc::new(Mutex::new(String::new()));
    let kept = Arc::clone(&seen);
    world.raw_app(app_at(3), move |mut stream, _| {
        let kept = Arc::clone(&kept);
        tokio::spawn(async move {
            let read = until(&mut stream, end.as_bytes()).await;
            *kept.lock() = read;
            stream.write_all(answer.as_bytes()).await.unwrap();
            // What a client has to wait for the end of ends.
            if !answer.to_ascii_lowercase().contains("content-length") && !answer.contains("chunked") {
                return;
            }
            until(&mut stream, b"\0 never").await;
        });
    });
    let mut stream = world.connect(&web, vip(1));
    stream.write_all(request.as_bytes()).await.unwrap();
    let heard = tokio::time::timeout(Duration::from_secs(60), until(&mut stream, heard_end.as_bytes())).await;
    let heard = heard.unwrap_or_else(|_elapsed| panic!("no {heard_end:?} is heard for {:.200?}", seen.lock()));
    let seen = std::mem::take(&mut *seen.lock());
    // The only thing that is added to a request of whatever form.
    let seen: Vec<&str> = seen.split_inclusive("\r\n").filter(|line| !line.starts_with("traceparent: ")).collect();
    (seen.concat(), heard)
}

#[tokio::test(start_paused = true)]
async fn names_keep_their_spelling_and_order_in_both_directions() {
    let request = "GET /a HTTP/1.1\r\nX-First: 1\r\nHost: Api.Shop\r\nUser-agent: a\r\nConnection: keep-alive\r\n\
        X-DUP: 1\r\nx-Dup: 2\r\nACCEPT: */*\r\nX-eMPTY:\r\nlower: Case\r\n\r\n";
    let answer = "HTTP/1.1 200 Fine By Me\r\nserver: a\r\nX-Zulu: 1\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\nKeep-Alive: timeout=5\r\n\
        ETag: \"A\"\r\nContent-length: 2\r\nDATE: today\r\n\r\nok";
    for world in [pair(), hop()] {
        let (seen, heard) = exchange(&world, request, "\r\n\r\n", answer, "\r\n\r\nok").await;
        assert_eq!(
            seen,
            "GET /a HTTP/1.1\r\nX-First: 1\r\nHost: Api.Shop\r\nUser-agent: a\r\nX-DUP: 1\r\nx-Dup: 2\r\nACCEPT: */*\r\nX-eMPTY:\r\nlower: Case\r\n\r\n"
        );
        assert_eq!(
            heard,
            "HTTP/1.1 200 Fine By Me\r\nserver: a\r\nX-Zulu: 1\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\nETag: \"A\"\r\nContent-length: 2\r\nDATE: today\r\n\r\nok"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn lower_case_keeps_its_order_and_carries_nothing() {
    let world = pair();
    let request = "GET / HTTP/1.1\r\nhost: api.shop\r\nconnection: keep-alive\r\na: 1\r\nb: 2\r\nc: 3\r\n\r\n";
    let answer = "HTTP/1.1 200 OK\r\nz: 1\r\nconnection: keep-alive\r\ny: 2\r\nx: 3\r\ncontent-length: 2\r\n\r\nok";
    let (seen, heard) = exchange(&world, request, "\r\n\r\n", answer, "\r\n\r\nok").await;
    assert_eq!(seen, "GET / HTTP/1.1\r\nhost: api.shop\r\na: 1\r\nb: 2\r\nc: 3\r\n\r\n");
    assert_eq!(heard, "HTTP/1.1 200 OK\r\nz: 1\r\ny: 2\r\nx: 3\r\ncontent-length: 2\r\n\r\nok");
}

#[tokio::test(start_paused = true)]
async fn requests_sent_ahead_keep_each_its_own_spelling() {
    let world = pair();
    let web = sidecars(&world);
    world.raw_app(app_at(3), |mut stream, _| {
        tokio::spawn(async move {
            loop {
                let head = until(&mut stream, b"\r\n\r\n").await;
                let host = head.lines().find(|line| line.to_ascii_lowercase().starts_with("host")).unwrap_or_default();
                if head.contains("ontent-") {
                    until(&mut stream, b"1234").await;
                }
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{host}", host.len());
                if stream.write_all(answer.as_bytes()).await.is_err() {
                    return;
                }
            }
        });
    });
    let mut stream = world.connect(&web, vip(1));
    let three = "GET / HTTP/1.1\r\nHost: a\r\n\r\nPOST / HTTP/1.1\r\nHOST: b\r\nContent-Length: 4\r\n\r\n1234GET / HTTP/1.1\r\nhost: c\r\n\r\nGET / HTTP/1.1\r\nhoST: d\r\n\r\n";
    stream.write_all(three.as_bytes()).await.unwrap();
    for host in ["Host: a", "HOST: b", "host: c", "hoST: d"] {
        let heard = until(&mut stream, host.as_bytes()).await;
        assert!(heard.starts_with("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"), "{heard}");
    }
}

#[tokio::test(start_paused = true)]
async fn trailers_of_chunked_messages_pass_both_ways() {
    let request = "POST /a HTTP/1.1\r\nHost: api\r\nTE: trailers\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n";
    let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 2\r\n\r\n";
    for world in [pair(), hop()] {
        let (seen, heard) = exchange(&world, request, "x-sum: 1\r\n\r\n", answer, "x-sum: 2\r\n\r\n").await;
        assert_eq!(
            seen,
            "POST /a HTTP/1.1\r\nHost: api\r\nTE: trailers\r\nTrailer: X-Sum\r\nconnection: TE\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n"
        );
        assert_eq!(
            heard,
            "HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-sum: 2\r\n\r\n"
        );
    }
}

/// "A sender of TE MUST also send a `TE` connection option" (RFC 9110 10.1.4).
#[tokio::test(start_paused = true)]
async fn leave_for_trailers_is_named_as_what_concerns_one_connection() {
    for (asks, heard_of) in [
        ("TE: trailers\r\n", "TE: trailers\r\nconnection: TE\r\n"),
        ("TE: deflate, trailers;q=0.5\r\nConnection: TE\r\n", "TE: trailers\r\nConnection: TE\r\n"),
        ("TE: deflate\r\n", ""),
        ("TE: deflate\r\nConnection: TE\r\n", ""),
    ] {
        for world in [pair(), hop()] {
            let request = format!("GET / HTTP/1.1\r\nHost: a\r\n{asks}\r\n");
            let answer = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
            let (seen, _) = exchange(&world, &request, "\r\n\r\n", answer, "\r\n\r\n").await;
            assert_eq!(seen, format!("GET / HTTP/1.1\r\nHost: a\r\n{heard_of}\r\n"));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_may_name_any_port() {
    // "uri-host [ `:` port ]" (RFC 9110 7.2), and a port is any number of digits (RFC 3986 3.2.3).
    let answer = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    for host in [
        "api.shop:81",
        "api:",
        "api.shop:65535",
        "api.shop:99999999",
        "API.Shop:080",
        "[fd65::1]:81",
        "[fd65::1]",
        "10.65.0.1:8080",
        "a_b~c!$&'()*+,;=:1",
        "api.shop.:80",
    ] {
        for world in [pair(), hop()] {
            let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
            let (seen, heard) = exchange(&world, &request, "\r\n\r\n", answer, "\r\n\r\n").await;
            assert_eq!((&*seen, &*heard), (&*request, answer), "{host}");
        }
    }
    for host in ["api:abc", "api:8x", "a:b:80", "api:-1", "[fd65::1", "[fd65::1]81", "fd65::1", "api:80:"] {
        for world in [pair(), hop()] {
            let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
            let (seen, heard) = exchange(&world, &request, "\r\n\r\n", answer, "\r\n\r\n").await;
            assert!(seen.is_empty() && heard.starts_with("HTTP/1.1 400 "), "{host} {seen} {heard}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn trailers_of_a_request_need_no_leave() {
    for world in [pair(), hop()] {
        let request = "POST /a HTTP/1.1\r\nHost: api\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n";
        let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 2\r\n\r\n";
        let (seen, heard) = exchange(&world, request, "x-sum: 1\r\n\r\n", answer, "\r\n0\r\n").await;
        assert_eq!(seen, request.replace("X-Sum: 1", "x-sum: 1"));
        // A caller that did not say that it takes trailers gets none (RFC 9110 6.5.1).
        assert_eq!(heard, "HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n");
    }
}

#[tokio::test(start_paused = true)]
async fn trailers_carry_nothing_that_is_for_a_hop_or_for_sidecars() {
    let trailer = "Trailer: X-Sum, Connection, X-Hop, Outrigger-Reason\r\n";
    let foreign = "Connection: x-hop\r\nX-Hop: 1\r\nOutrigger-Reason: denied\r\n";
    for kept in ["x-sum: 1\r\n", ""] {
        let request = format!(
            "POST /a HTTP/1.1\r\nHost: api\r\nTE: trailers\r\n{trailer}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n{foreign}{kept}\r\n"
        );
        let answer =
            format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{trailer}\r\n2\r\nok\r\n0\r\n{foreign}{kept}\r\n").leak();
        let end = format!("\r\n0\r\n{kept}\r\n").leak();
        for world in [pair(), hop()] {
            let (seen, heard) = exchange(&world, &request, end, answer, end).await;
            assert!(seen.ends_with(&format!("3\r\nabc{end}")), "{seen}");
            assert!(heard.ends_with(&format!("2\r\nok{end}")), "{heard}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_get_may_have_chunks() {
    for world in [pair(), hop()] {
        for method in ["GET", "POST", "HEAD", "DELETE"] {
            let request = format!("{method} /a HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
            let answer = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
            let (seen, _) = exchange(&world, &request, "\r\n0\r\n\r\n", answer, "\r\n\r\n").await;
            assert_eq!(seen, request);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_status_without_a_body_keeps_what_is_said_of_one() {
    for (method, status, length) in [
        ("HEAD", "200 OK", "\r\nContent-Length: 7"),
        ("GET", "304 Not Modified", "\r\nContent-Length: 7\r\nETag: \"a\""),
        ("GET", "204 No Content", ""),
        ("HEAD", "404 Not Found", "\r\nContent-Length: 12"),
        ("DELETE", "204 Gone For Good", ""),
    ] {
        for world in [pair(), hop()] {
            let answer: &'static str = format!("HTTP/1.1 {status}\r\nX-A: 1{length}\r\n\r\n").leak();
            let request = format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n");
            // A 304 need not say it (RFC 9110 8.6 and 15.4.5), and the codec does not.
            let wanted = if status.starts_with("304") { answer.replace("Content-Length: 7\r\n", "") } else { answer.to_owned() };
            let (seen, heard) = exchange(&world, &request, "\r\n\r\n", answer, "\r\n\r\n").await;
            assert_eq!(seen, request);
            assert_eq!(heard, wanted);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn targets_of_every_form_have_one_meaning() {
    for (request, wanted) in [
        ("OPTIONS * HTTP/1.1\r\nHost: api\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: api\r\n\r\n"),
        // The target's host counts (RFC 9112 3.2.2), and an origin is asked in origin-form (3.2.1).
        (
            "GET http://Api.Shop/a?b HTTP/1.1\r\nHost: other\r\nA: 1\r\n\r\n",
            "GET /a?b HTTP/1.1\r\nHost: Api.Shop\r\nA: 1\r\n\r\n",
        ),
        ("GET http://api HTTP/1.1\r\nHost: api\r\n\r\n", "GET / HTTP/1.1\r\nHost: api\r\n\r\n"),
        ("GET /a%2Fb?c=%zz;[1]{} HTTP/1.1\r\nHost: a\r\n\r\n", "GET /a%2Fb?c=%zz;[1]{} HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("BREW /pot HTTP/1.1\r\nHost: a\r\n\r\n", "BREW /pot HTTP/1.1\r\nHost: a\r\n\r\n"),
    ] {
        for world in [pair(), hop()] {
            let answer = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
            let (seen, heard) = exchange(&world, request, "\r\n\r\n", answer, "\r\n\r\nok").await;
            assert_eq!(seen, wanted, "{request} {heard}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_target_that_is_none_goes_nowhere() {
    for (request, words) in [
        ("GET * HTTP/1.1\r\nHost: a\r\n\r\n", "only OPTIONS"),
        ("GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", "fragment"),
        ("GET /a?b#c HTTP/1.1\r\nHost: a\r\n\r\n", "fragment"),
        ("GET http://a/b#c HTTP/1.1\r\nHost: a\r\n\r\n", "fragment"),
        ("GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", "neither http nor https"),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n", "a Host that is empty"),
        ("GET / HTTP/1.1\r\nHost: :80\r\n\r\n", "a Host that is empty"),
        ("GET / HTTP/1.0\r\nHost: \r\n\r\n", "a Host that is empty"),
    ] {
        for world in [pair(), hop()] {
            let (seen, heard) = exchange(&world, request, "\r\n\r\n", "", "\0").await;
            assert_eq!(seen, "", "{request}");
            let wanted = heard.contains(" 400 ") && heard.contains("outrigger-reason: bad_request") && heard.contains(words);
            assert!(wanted, "{request} {heard}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn http_1_0_is_spoken_to_the_end_and_kept_alive_where_it_asks() {
    for world in [pair(), hop()] {
        let answer = "HTTP/1.0 200 OK\r\nServer: old\r\n\r\nuntil the end";
        let (seen, heard) = exchange(&world, "GET / HTTP/1.0\r\nX-A: 1\r\n\r\n", "\r\n\r\n", answer, "\0").await;
        assert_eq!(seen, "GET / HTTP/1.0\r\nX-A: 1\r\n\r\n");
        assert_eq!(heard, "HTTP/1.0 200 OK\r\nServer: old\r\n\r\nuntil the end");
        let answer = "HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok";
        let (_, heard) =
            exchange(&world, "GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n", "\r\n\r\n", answer, "ok").await;
        assert_eq!(heard, "HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok");
        // An answer that ends with the connection: nobody says that the connection stays.
        let asks = "GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n";
        let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n";
        let (_, heard) = exchange(&world, asks, "\r\n\r\n", answer, "\0").await;
        assert_eq!(heard, "HTTP/1.0 200 OK\r\n\r\nok");
    }
}

#[tokio::test(start_paused = true)]
async fn grpc_says_its_status_in_trailers_or_in_the_head() {
    let world = pair();
    let web = sidecars(&world);
    world.raw_app(app_at(3), |stream, _| {
        tokio::spawn(async move {
            let service = hyper::service::service_fn(|request: Request<hyper::body::Incoming>| async move {
                let head = http::HeaderValue::from_static("5");
                let answer = http::Response::builder().header("content-type", "application/grpc");
                if request.uri().path().ends_with("Missing") {
                    let body = Full::new(Bytes::new()).map_err(|never| match never {}).boxed();
                    return Ok::<_, hyper::Error>(answer.header("grpc-status", head).body(body).unwrap());
                }
                let body = request.into_body().collect().await?;
                let mut trailers = body.trailers().cloned().unwrap_or_default();
                trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
                let body = Full::new(body.to_bytes()).with_trailers(std::future::ready(Some(Ok(trailers))));
                Ok(answer.body(body.map_err(|never| match never {}).boxed()).unwrap())
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            drop(server.serve_connection(TokioIo::new(stream), service).await);
        });
    });
    let call = |path: &str| {
        let call = Request::post(format!("http://api.shop/shop.Cart/{path}")).header("te", "trailers");
        call.header("content-type", "application/grpc").body(Full::from("m")).unwrap()
    };
    let heard = ask_h2(world.connect(&web, vip(1)), call("Missing")).await;
    assert_eq!((heard.status, heard.trailers.is_none()), (200, true));
    assert_eq!(heard.headers["grpc-status"], "5");
    let heard = ask_h2(world.connect(&web, vip(1)), call("Add")).await;
    assert_eq!((&*heard.body, heard.headers.contains_key("grpc-status")), ("m", false));
    assert_eq!(heard.trailers.unwrap()["grpc-status"], "0");
}

#[tokio::test(start_paused = true)]
async fn what_is_sent_right_behind_an_upgrade_arrives() {
    for world in [pair(), hop()] {
        let web = sidecars(&world);
        let seen = Arc::new(Mutex::new(String::new()));
        let kept = Arc::clone(&seen);
        world.raw_app(app_at(3), move |mut stream, _| {
            let kept = Arc::clone(&kept);
            tokio::spawn(async move {
                *kept.lock() = until(&mut stream, b"\r\n\r\n").await;
                let answer = b"HTTP/1.1 101 Go Ahead\r\nUpgrade: Echo/1\r\nConnection: upgrade\r\nX-Word: Given\r\n\r\nfirst from the app,";
                stream.write_all(answer).await.unwrap();
                let said = until(&mut stream, b"client").await;
                stream.write_all(said.as_bytes()).await.unwrap();
            });
        });
        let mut stream = world.connect(&web, vip(1));
        // A client that knows what it talks to does not wait for the answer.
        let request = "GET /echo HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: Echo/1\r\n\r\nfirst from the client";
        stream.write_all(request.as_bytes()).await.unwrap();
        let heard = until(&mut stream, b"client").await;
        assert!(heard.starts_with("HTTP/1.1 101 Go Ahead\r\n"), "{heard}");
        assert!(heard.contains("\r\nX-Word: Given\r\n") && heard.contains("\r\nUpgrade: Echo/1\r\n"), "{heard}");
        assert!(heard.ends_with("\r\n\r\nfirst from the app,first from the client"), "{heard}");
        let seen = seen.lock().clone();
        assert!(seen.contains("\r\nUpgrade: Echo/1\r\n") && seen.contains("\r\nConnection: Upgrade\r\n"), "{seen}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_stops_a_fast_sender_in_both_directions() {
    for world in [pair(), hop()] {
        let web = sidecars(&world);
        let given = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&given);
        world.raw_app(app_at(3), move |mut stream, _| {
            let count = Arc::clone(&count);
            tokio::spawn(async move {
                // It reads no more than the head of an upload, and sends a download as fast as it can.
                let head = until(&mut stream, b"\r\n\r\n").await;
                if head.starts_with("GET") {
                    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n").await.unwrap();
                    while stream.write_all(&[b'a'; 1 << 14]).await.is_ok() {
                        count.fetch_add(1 << 14, Ordering::Relaxed);
                    }
                }
                std::future::pending::<()>().await;
            });
        });
        let mut stream = world.connect(&web, vip(1));
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_secs(5)).await;
        let down = given.load(Ordering::Relaxed);
        assert!((1..IN_FLIGHT_MAX).contains(&down), "{down} bytes were taken for nobody who reads");
        // It goes on as soon as somebody does.
        let mut buffer = vec![0; 1 << 22];
        stream.read_exact(&mut buffer).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(given.load(Ordering::Relaxed) > down + (1 << 21));

        let mut stream = world.connect(&web, vip(1));
        stream.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n").await.unwrap();
        let mut up = 0;
        while let Ok(Ok(())) = tokio::time::timeout(Duration::from_secs(5), stream.write_all(&[b'a'; 1 << 14])).await {
            up += 1 << 14;
            assert!(up < IN_FLIGHT_MAX, "{up} bytes were taken for nobody who reads");
        }
        assert!(up > 0);
    }
}

/// Windows, buffers of codecs and of the pipes between them: far less than the bodies of this size.
const IN_FLIGHT_MAX: usize = 8 << 20;

const EXPECTING: &str = "PUT /up HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n";

#[tokio::test(start_paused = true)]
async fn an_expectation_that_the_application_refuses_costs_no_body() {
    for world in [pair(), hop()] {
        let answer = "HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno";
        let begin = tokio::time::Instant::now();
        let (seen, heard) = exchange(&world, EXPECTING, "\r\n\r\n", answer, "\r\n\r\nno").await;
        // Nobody knows whether the body comes next or another request.
        let closes = answer.replace("\r\n\r\n", "\r\nconnection: close\r\n\r\n");
        assert_eq!((&*seen, &*heard), (EXPECTING, &*closes));
        assert!(begin.elapsed() < Duration::from_millis(900), "it came after {:?}", begin.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn an_expectation_is_met_when_the_application_meets_it() {
    for (world, pause) in [(pair(), 300), (hop(), 300), (pair(), 3000), (hop(), 3000)] {
        let web = sidecars(&world);
        world.raw_app(app_at(3), move |mut stream, _| {
            tokio::spawn(async move {
                let head = until(&mut stream, b"\r\n\r\n").await;
                assert_eq!(head.split("traceparent").next().unwrap(), EXPECTING.trim_end_matches("\r\n").to_owned() + "\r\n");
                let answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
                tokio::time::sleep(Duration::from_millis(pause)).await;
                stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
                assert_eq!(until(&mut stream, b"body").await, "body");
                stream.write_all(answer.as_bytes()).await.unwrap();
                until(&mut stream, b"\0").await;
            });
        });
        let mut stream = world.connect(&web, vip(1));
        let begin = tokio::time::Instant::now();
        stream.write_all(EXPECTING.as_bytes()).await.unwrap();
        assert_eq!(until(&mut stream, b"\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
        let waited = begin.elapsed();
        // However long it takes the application to decide, nobody decides in its place.
        assert!((pause..pause + 300).contains(&u64::try_from(waited.as_millis()).unwrap()), "{waited:?} of {pause}");
        stream.write_all(b"body").await.unwrap();
        assert_eq!(until(&mut stream, b"\r\n\r\nok").await, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    }
}

#[tokio::test(start_paused = true)]
async fn an_application_that_says_nothing_gets_the_body_of_a_client_that_sends_it_anyway() {
    for world in [pair(), hop()] {
        let web = sidecars(&world);
        world.raw_app(app_at(3), move |mut stream, _| {
            tokio::spawn(async move {
                until(&mut stream, b"\r\n\r\nbody").await;
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
                until(&mut stream, b"\0").await;
            });
        });
        let mut stream = world.connect(&web, vip(1));
        stream.write_all(EXPECTING.as_bytes()).await.unwrap();
        // As curl does, and others: nobody told it to.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        stream.write_all(b"body").await.unwrap();
        assert_eq!(until(&mut stream, b"\r\n\r\nok").await, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    }
}

#[tokio::test(start_paused = true)]
async fn an_application_that_refuses_an_expectation_late_is_heard_and_nobody_before_it() {
    for world in [pair(), hop()] {
        let web = sidecars(&world);
        world.raw_app(app_at(3), move |mut stream, _| {
            tokio::spawn(async move {
                until(&mut stream, b"\r\n\r\n").await;
                tokio::time::sleep(Duration::from_secs(4)).await;
                stream.write_all(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
                assert_eq!(until(&mut stream, b"\0").await, "", "nothing of the body was sent");
            });
        });
        let mut stream = world.connect(&web, vip(1));
        stream.write_all(EXPECTING.as_bytes()).await.unwrap();
        let heard = until(&mut stream, b"\r\n\r\nno").await;
        assert!(heard.starts_with("HTTP/1.1 417 Expectation Failed\r\n"), "{heard}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_coding_that_only_a_neighbour_could_undo_is_refused() {
    for world in [pair(), hop()] {
        let request = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        let (seen, heard) = exchange(&world, request, "\r\n\r\n", "", "\r\n\r\n").await;
        assert!(seen.is_empty() && heard.starts_with("HTTP/1.1 501 "), "{seen} {heard}");
        let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        let (_, heard) = exchange(&world, "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "\r\n\r\n", answer, "\r\n\r\n").await;
        assert!(heard.starts_with("HTTP/1.1 502 "), "{heard}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_upgrade_that_the_application_does_not_take_is_answered_in_http() {
    for world in [pair(), hop()] {
        let request = "GET /ws HTTP/1.1\r\nHost: api.shop\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Kept: 1\r\n\r\nhello";
        let begun = tokio::time::Instant::now();
        let (seen, heard) = exchange(&world, request, "\r\n\r\n", answer, "hello").await;
        assert!(begun.elapsed() < Duration::from_millis(100), "a fresh link: {:?}", begun.elapsed());
        assert!(seen.to_lowercase().contains("upgrade: websocket"), "{seen}");
        assert!(heard.starts_with("HTTP/1.1 200 OK\r\n") && heard.ends_with("\r\n\r\nhello"), "{heard}");
        assert!(heard.contains("X-Kept: 1") && !heard.contains("outrigger-"), "{heard}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_upgrade_may_say_that_it_has_no_body() {
    for world in [pair(), hop()] {
        let request =
            "GET /ws HTTP/1.1\r\nHost: api.shop\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n";
        let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello";
        let (seen, heard) = exchange(&world, request, "\r\n\r\n", answer, "hello").await;
        assert!(seen.to_lowercase().contains("upgrade: websocket"), "{seen} {heard}");
        assert!(heard.starts_with("HTTP/1.1 101 ") && heard.ends_with("\r\n\r\nhello"), "{heard}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_offer_of_tls_or_with_a_body_or_for_another_method_is_left_aside() {
    for (method, head, body) in [
        ("GET", "Upgrade: TLS/1.2\r\n", ""),
        ("GET", "Upgrade: websocket\r\nContent-Length: 2\r\n", "ab"),
        ("DELETE", "Upgrade: websocket\r\n", ""),
    ] {
        let request = format!("{method} / HTTP/1.1\r\nHost: api.shop\r\nConnection: Upgrade\r\n{head}\r\n{body}");
        let end = if body.is_empty() { "\r\n\r\n" } else { "ab" };
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        let (seen, heard) = exchange(&pair(), &request, end, answer, "ok").await;
        assert!(seen.starts_with(method) && !seen.to_lowercase().contains("upgrade"), "{seen}");
        assert!(heard.starts_with("HTTP/1.1 200 OK\r\n"), "{heard}");
    }
}
