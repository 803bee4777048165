//! Connections of HTTP/1 that are put to rest between requests, on both sides of a pair.

use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::{Instant, sleep, timeout};

use super::world::{World, app_at, document, pod, service, text, vip};
use crate::dataplane::Proxy;
use crate::dataplane::http::guard::REST_AFTER;

fn pair(limits: &Value) -> (World, Arc<Proxy>, Arc<Proxy>) {
    let open = document("PeerAuthentication", "open", json!({ "mode": "Permissive" }));
    let mesh = document("Mesh", "mesh", json!({ "limits": limits }));
    let world = World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), service("api", "api", 1), open, mesh]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.app(app_at(3), |request: Request<_>| text(format!("<{} {}>", request.uri(), request.body().len())));
    (world, web, api)
}

/// A client's connections to `api`: one of the application in `web`, then one from outside of the mesh.
fn both<'a>(world: &'a World, web: &'a Arc<Proxy>, api: &'a Arc<Proxy>) -> impl Iterator<Item = DuplexStream> + 'a {
    [true, false].into_iter().map(|own| if own { world.connect(web, vip(1)) } else { world.connect_inbound(api, app_at(3)) })
}

async fn say(stream: &mut DuplexStream, bytes: &str) {
    stream.write_all(bytes.as_bytes()).await.unwrap();
}

/// Reads until so many answers came, and gives their bodies.
async fn hear(stream: &mut DuplexStream, answers: usize) -> String {
    let mut heard = String::new();
    while heard.matches('>').count() < answers {
        let mut bytes = vec![0; 4096];
        let read = timeout(Duration::from_secs(20), stream.read(&mut bytes)).await.expect(&heard).unwrap();
        assert_ne!(read, 0, "closed after {heard}");
        heard.push_str(std::str::from_utf8(&bytes[..read]).unwrap());
    }
    let bodies = heard.split('<').skip(1).filter_map(|part| part.split_once('>'));
    bodies.map(|(body, _)| body).collect::<Vec<_>>().join(" ")
}

async fn at_rest() {
    sleep(REST_AFTER * 3).await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_rested_answers_its_next_request() {
    let (world, web, api) = pair(&json!({}));
    for mut stream in both(&world, &web, &api) {
        for round in 0..5 {
            say(&mut stream, &format!("GET /{round} HTTP/1.1\r\nHost: api.shop\r\n\r\n")).await;
            assert_eq!(hear(&mut stream, 1).await, format!("/{round} 0"));
            at_rest().await;
            say(&mut stream, "POST /up HTTP/1.1\r\nhost: api.shop\r\ncontent-length: 3\r\n\r\nabc").await;
            assert_eq!(hear(&mut stream, 1).await, "/up 3");
            at_rest().await;
            say(&mut stream, "POST /up HTTP/1.1\r\nhost: api.shop\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n")
                .await;
            assert_eq!(hear(&mut stream, 1).await, "/up 2");
            at_rest().await;
        }
        drop(stream);
    }
}

#[tokio::test(start_paused = true)]
async fn requests_that_come_together_are_all_answered_whenever_a_connection_rests() {
    let (world, web, api) = pair(&json!({}));
    for mut stream in both(&world, &web, &api) {
        for round in 0..20 {
            let three = ["a", "b", "c"].map(|name| format!("GET /{name}{round} HTTP/1.1\r\nhost: api.shop\r\n\r\n")).concat();
            say(&mut stream, &three).await;
            assert_eq!(hear(&mut stream, 3).await, format!("/a{round} 0 /b{round} 0 /c{round} 0"));
            // Around the moment in which a connection is put to rest, and after it.
            sleep(REST_AFTER - Duration::from_millis(10) + Duration::from_millis(round)).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_in_pieces_is_read_whole_wherever_the_rest_falls_into_it() {
    let (world, web, api) = pair(&json!({}));
    let head = "POST /cut HTTP/1.1\r\nhost: api.shop\r\ncontent-length: 5\r\n\r\nhello";
    for mut stream in both(&world, &web, &api) {
        say(&mut stream, "GET /first HTTP/1.1\r\nhost: api.shop\r\n\r\n").await;
        assert_eq!(hear(&mut stream, 1).await, "/first 0");
        for cut in 1..head.len() {
            let pause = if cut % 2 == 0 { REST_AFTER } else { REST_AFTER * 3 };
            sleep(pause).await;
            say(&mut stream, &head[..cut]).await;
            sleep(pause).await;
            say(&mut stream, &head[cut..]).await;
            assert_eq!(hear(&mut stream, 1).await, "/cut 5", "{cut}");
        }
    }
}

/// The beginning of a head comes with the request before it, and its end after the time in which a connection comes to rest.
#[tokio::test(start_paused = true)]
async fn a_connection_with_half_a_head_in_its_codec_does_not_rest() {
    let (world, web, api) = pair(&json!({}));
    let head = "GET /second HTTP/1.1\r\nhost: api.shop\r\n\r\n";
    for cut in 1..head.len() {
        for mut stream in both(&world, &web, &api) {
            say(&mut stream, &format!("GET /first HTTP/1.1\r\nhost: api.shop\r\n\r\n{}", &head[..cut])).await;
            assert_eq!(hear(&mut stream, 1).await, "/first 0");
            at_rest().await;
            say(&mut stream, &head[cut..]).await;
            assert_eq!(hear(&mut stream, 1).await, "/second 0", "{cut}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_answer_and_a_slow_body_are_no_rest() {
    let (world, web, api) = pair(&json!({}));
    world.slow_app(app_at(3), |request: Request<_>| async move {
        sleep(REST_AFTER * 10).await;
        Response::new(Full::from(format!("<{}>", request.body().len())))
    });
    for mut stream in both(&world, &web, &api) {
        for _ in 0..2 {
            say(&mut stream, "POST / HTTP/1.1\r\nhost: api.shop\r\ncontent-length: 4\r\n\r\n").await;
            for _ in 0..4 {
                at_rest().await;
                say(&mut stream, "a").await;
            }
            assert_eq!(hear(&mut stream, 1).await, "4");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_idle_limit_holds_while_a_connection_rests_and_empty_lines_do_not_move_it() {
    let (world, web, api) = pair(&json!({ "idleTimeout": "1m" }));
    for (mut stream, lines) in both(&world, &web, &api).chain(both(&world, &web, &api)).zip([false, false, true, true]) {
        say(&mut stream, "GET /a HTTP/1.1\r\nhost: api.shop\r\n\r\n").await;
        assert_eq!(hear(&mut stream, 1).await, "/a 0");
        let begin = Instant::now();
        for _ in 0..if lines { 5 } else { 0 } {
            sleep(Duration::from_secs(10)).await;
            say(&mut stream, "\r\n").await;
        }
        assert_eq!(stream.read(&mut [0; 64]).await.unwrap(), 0);
        assert_eq!(begin.elapsed().as_secs(), 60, "empty lines: {lines}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_that_begins_at_rest_has_the_time_of_a_head() {
    let (world, web, api) = pair(&json!({}));
    for mut stream in both(&world, &web, &api) {
        say(&mut stream, "GET /a HTTP/1.1\r\nhost: api.shop\r\n\r\n").await;
        assert_eq!(hear(&mut stream, 1).await, "/a 0");
        sleep(Duration::from_secs(30)).await;
        let begin = Instant::now();
        say(&mut stream, "GET /b HT").await;
        let mut heard = String::new();
        stream.read_to_string(&mut heard).await.unwrap();
        assert!(heard.starts_with("HTTP/1.1 408") && heard.contains("outrigger-reason: request_timeout"), "{heard}");
        assert_eq!(begin.elapsed().as_secs(), 10);
    }
}

#[tokio::test(start_paused = true)]
async fn what_breaks_the_rules_after_a_rest_is_refused_in_our_words() {
    let (world, web, api) = pair(&json!({}));
    for mut stream in both(&world, &web, &api) {
        say(&mut stream, "GET /a HTTP/1.1\r\nhost: api.shop\r\n\r\n").await;
        assert_eq!(hear(&mut stream, 1).await, "/a 0");
        at_rest().await;
        say(&mut stream, "GET /b HTTP/7.1\r\n\r\n").await;
        let mut heard = String::new();
        stream.read_to_string(&mut heard).await.unwrap();
        assert!(heard.starts_with("HTTP/1.1 400") && heard.contains("outrigger-reason: bad_request"), "{heard}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_closes_connections_at_rest_at_once() {
    let (world, web, api) = pair(&json!({}));
    let mut streams = Vec::new();
    for mut stream in both(&world, &web, &api) {
        say(&mut stream, "GET /a HTTP/1.1\r\nhost: api.shop\r\n\r\n").await;
        assert_eq!(hear(&mut stream, 1).await, "/a 0");
        streams.push(stream);
    }
    at_rest().await;
    drop((web, api));
    let begin = Instant::now();
    assert!(world.drain(Duration::from_secs(30)).await);
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    for mut stream in streams {
        assert_eq!(stream.read(&mut [0; 64]).await.unwrap(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_while_its_connection_rests_is_let_go() {
    let (world, web, api) = pair(&json!({}));
    for (mut stream, proxy) in both(&world, &web, &api).zip([&web, &api]) {
        say(&mut stream, "GET /a HTTP/1.1\r\nhost: api.shop\r\n\r\n").await;
        assert_eq!(hear(&mut stream, 1).await, "/a 0");
        at_rest().await;
        let open = |proxy: &Proxy| {
            let metrics = proxy.telemetry.metrics.render();
            let lines = metrics.lines().filter(|line| line.starts_with("outrigger_connections_open{") && line.contains("http1"));
            lines.filter(|line| !line.ends_with(" 0")).count()
        };
        assert_eq!(open(proxy), 1, "{}", proxy.telemetry.metrics.render());
        drop(stream);
        sleep(Duration::from_secs(1)).await;
        assert_eq!(open(proxy), 0);
    }
}
