//! What the caller's sidecar does: routes, splits, retries, ejections, shadows, deadlines, and what it never dials.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use http::Request;
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, sleep};

use super::world::{World, app_at, ask, ask_h2, document, get, pod, service, status, text, told, vip};
use crate::dataplane::Proxy;

pub(super) fn route(rules: Value) -> Value {
    document("HTTPRoute", "api", json!({ "parentRefs": [{ "group": "", "kind": "Service", "name": "api" }], "rules": rules }))
}

/// `web` calls `api`, which has two versions, each a service and a pod of its own.
fn versions(more: &[Value]) -> (World, Arc<Proxy>) {
    let mut documents = vec![
        pod("web", "web-1", 2),
        pod("v1", "v1-1", 3),
        pod("v2", "v2-1", 4),
        service("api", "v1", 1),
        service("v1", "v1", 2),
        service("v2", "v2", 3),
    ];
    documents.extend_from_slice(more);
    let world = World::new(&documents);
    let web = world.sidecar("web", "web-1", 2);
    world.sidecar("v1", "v1-1", 3);
    world.sidecar("v2", "v2-1", 4);
    world.app(app_at(3), |_| text("v1"));
    world.app(app_at(4), |_| text("v2"));
    (world, web)
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_called_by_a_service_without_an_address_is_called_by_the_services_rules() {
    let mut peers = service("peers", "v1", 9);
    peers["spec"]["clusterIP"] = json!("None");
    peers["spec"]["ports"] = json!([{ "port": 8080 }]);
    let edit =
        json!({ "type": "RequestHeaderModifier", "requestHeaderModifier": { "set": [{ "name": "x-edit", "value": "1" }] } });
    let rules = json!([{ "filters": [edit], "backendRefs": [{ "name": "peers", "port": 8080 }] }]);
    let mut route = route(rules);
    route["spec"]["parentRefs"][0]["name"] = json!("peers");
    let mut more = pod("v1", "v1-2", 5);
    more["metadata"]["labels"] = json!({ "app": "v1" });
    let (world, web) = versions(&[peers, route, more]);
    world.sidecar("v1", "v1-2", 5);
    let told = |pod: &'static str| move |request: Request<_>| text(format!("{pod} {:?}", request.headers().get("x-edit")));
    world.app(app_at(3), told("v1-1"));
    world.app(app_at(5), told("v1-2"));
    let asked = |host: &str| Request::get("/").header("host", host).body(Full::default()).unwrap();
    // Each is the pod that was dialled, whatever the balancer would choose.
    for _ in 0..4 {
        assert_eq!(ask(world.connect(&web, app_at(3)), asked("peers")).await.body, "v1-1 Some(\"1\")");
        assert_eq!(ask(world.connect(&web, app_at(5)), asked("v1-2.peers.shop")).await.body, "v1-2 Some(\"1\")");
    }
    assert_eq!(ask(world.connect(&web, app_at(5)), asked("10.64.0.5:8080")).await.body, "v1-2 None");
}

#[tokio::test(start_paused = true)]
async fn a_route_matches_and_edits() {
    let (world, web) = versions(&[route(json!([
        {
            "matches": [{ "path": { "type": "PathPrefix", "value": "/new" } }],
            "filters": [
                { "type": "RequestHeaderModifier", "requestHeaderModifier": { "set": [{ "name": "x-edit", "value": "1" }] } },
                { "type": "ResponseHeaderModifier", "responseHeaderModifier": { "set": [{ "name": "x-answer", "value": "2" }] } },
                { "type": "URLRewrite", "urlRewrite": { "path": { "type": "ReplacePrefixMatch", "replacePrefixMatch": "/" } } },
            ],
            "backendRefs": [{ "name": "v2", "port": 80 }],
        },
        { "matches": [{ "headers": [{ "name": "x-beta", "value": "yes" }] }], "backendRefs": [{ "name": "v2", "port": 80 }] },
        { "backendRefs": [{ "name": "v1", "port": 80 }] },
    ]))]);
    world.app(app_at(4), |request| text(format!("v2 {} {:?}", request.uri(), request.headers().get("x-edit"))));
    assert_eq!(ask(world.connect(&web, vip(1)), get("/old")).await.body, "v1");
    let heard = ask(world.connect(&web, vip(1)), get("/new/cart?a=b")).await;
    assert_eq!((&*heard.body, &heard.headers["x-answer"]), ("v2 /cart?a=b Some(\"1\")", &"2".parse().unwrap()));
    let beta = Request::get("/old").header("host", "api").header("x-beta", "yes").body(Full::default()).unwrap();
    assert!(ask(world.connect(&web, vip(1)), beta).await.body.starts_with("v2 /old"));
}

#[tokio::test(start_paused = true)]
async fn a_split_follows_its_weights() {
    let (world, web) = versions(&[route(json!([{
        "backendRefs": [{ "name": "v1", "port": 80, "weight": 90 }, { "name": "v2", "port": 80, "weight": 10 }],
    }]))]);
    let mut second = 0;
    for _ in 0..300 {
        second += u32::from(ask(world.connect(&web, vip(1)), get("/")).await.body == "v2");
    }
    // The dice are seeded, so the count is the same in every run; the law is that it is near a tenth.
    assert!((15..=45).contains(&second), "{second}");
}

#[tokio::test(start_paused = true)]
async fn a_broken_backend_gets_its_share_of_refusals() {
    let (world, web) = versions(&[route(json!([{
        "backendRefs": [{ "name": "nowhere", "port": 80, "weight": 1 }],
    }]))]);
    let heard = ask(world.connect(&web, vip(1)), get("/")).await;
    assert_eq!((heard.status, heard.reason()), (500, "no_backend"));
    assert!(heard.body.contains("HTTPRoute/shop/api"), "{}", heard.body);
}

/// `api` has one pod that works and one that fails as `broken` says.
fn flaky(more: &[Value]) -> (World, Arc<Proxy>) {
    let mut documents = vec![pod("web", "web-1", 2), pod("api", "api-1", 3), pod("api", "api-2", 4), service("api", "api", 1)];
    documents.extend_from_slice(more);
    let world = World::new(&documents);
    let web = world.sidecar("web", "web-1", 2);
    world.sidecar("api", "api-1", 3);
    world.sidecar("api", "api-2", 4);
    (world, web)
}

#[tokio::test(start_paused = true)]
async fn retries_hide_a_failing_endpoint_and_the_breaker_ejects_it() {
    let (world, web) = flaky(&[
        route(json!([{ "retry": { "attempts": 3, "codes": [503] }, "backendRefs": [{ "name": "api", "port": 80 }] }])),
        document(
            "TrafficPolicy",
            "api",
            json!({
                "targetRefs": [{ "kind": "Service", "name": "api" }],
                "retryBudget": { "percent": 100, "minRetriesPerSecond": 100 },
                "circuitBreaking": { "ejection": { "consecutiveFailures": 3, "baseEjection": "60s" } },
            }),
        ),
    ]);
    let failed = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&failed);
    world.app(app_at(3), |_| text("good"));
    world.app(app_at(4), move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        status(503)
    });
    for _ in 0..40 {
        let heard = ask(world.connect(&web, vip(1)), get("/")).await;
        assert_eq!((heard.status, &*heard.body), (200, "good"), "{heard:?}");
    }
    assert_eq!(failed.load(Ordering::Relaxed), 3, "it was left out after three failures");
    let metrics = web.telemetry.metrics.render();
    assert!(metrics.contains(r#"destination_workload="shop/api-2""#), "{metrics}");
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_keeps_failing_is_left_out_for_longer_each_time() {
    let (world, web) = flaky(&[
        route(json!([{ "retry": { "attempts": 3, "codes": [503] }, "backendRefs": [{ "name": "api", "port": 80 }] }])),
        document(
            "TrafficPolicy",
            "api",
            json!({
                "targetRefs": [{ "kind": "Service", "name": "api" }],
                "retryBudget": { "percent": 100, "minRetriesPerSecond": 100 },
                "circuitBreaking": { "ejection": { "consecutiveFailures": 2, "baseEjection": "10s", "maxEjection": "35s" } },
            }),
        ),
    ]);
    let failed: Arc<parking_lot::Mutex<Vec<Instant>>> = Arc::default();
    let noted = Arc::clone(&failed);
    world.app(app_at(3), |_| text("good"));
    world.app(app_at(4), move |_| {
        noted.lock().push(Instant::now());
        status(503)
    });
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(150) {
        let heard = ask(world.connect(&web, vip(1)), get("/")).await;
        assert_eq!((heard.status, &*heard.body), (200, "good"), "{heard:?}");
        sleep(Duration::from_millis(100)).await;
    }
    // Twice in a row at first; then once each time that it is back, until the next request that is sent to it.
    let gaps: Vec<u64> = failed.lock().windows(2).map(|pair| (pair[1] - pair[0]).as_secs()).collect();
    assert!(gaps.len() >= 5 && gaps[0] == 0, "{gaps:?}");
    for (gap, least) in gaps[1..].iter().zip([10, 20, 30, 35, 35]) {
        assert!((least..least + 3).contains(gap), "{gaps:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_sidecar_without_a_file_for_the_way_on_says_so_and_blames_no_endpoint() {
    let ejecting = document(
        "TrafficPolicy",
        "api",
        json!({
            "targetRefs": [{ "kind": "Service", "name": "api" }],
            "circuitBreaking": { "ejection": { "consecutiveFailures": 1, "baseEjection": "60s" } },
        }),
    );
    let (world, web) = flaky(&[ejecting]);
    world.app(app_at(3), |_| text("good"));
    world.app(app_at(4), |_| text("good"));
    world.exhaust(&[2]);
    for _ in 0..10 {
        let heard = ask(world.connect(&web, vip(1)), get("/")).await;
        assert_eq!((heard.status, heard.reason()), (503, "overloaded"), "{heard:?}");
    }
    told(&web, &["outrigger_requests_total", r#"reason="overloaded""#, r#"status="503""#, "} 10"]);
    let outside = ask(world.connect(&web, "192.0.2.7:80".parse().unwrap()), get("/")).await;
    assert_eq!((outside.status, outside.reason()), (503, "overloaded"), "{outside:?}");
    world.exhaust(&[]);
    let metrics = web.telemetry.metrics.render();
    assert!(!metrics.contains(r#"destination_workload="shop/api-"#), "somebody was left out: {metrics}");
    // The same of a sidecar at the other end, which did nothing for the request: another endpoint serves it.
    world.exhaust(&[4]);
    for _ in 0..10 {
        let heard = ask(world.connect(&web, vip(1)), get("/")).await;
        assert_eq!((heard.status, &*heard.body), (200, "good"), "{heard:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_cannot_be_reached_is_left_for_another_by_default() {
    let documents = [pod("web", "web-1", 2), pod("api", "api-1", 3), pod("api", "api-2", 4), service("api", "api", 1)];
    let world = World::new(&documents);
    let web = world.sidecar("web", "web-1", 2);
    world.sidecar("api", "api-1", 3);
    world.app(app_at(3), |_| text("good"));
    // The second pod has gone: nothing answers at its address, so nothing was sent and trying again is always safe.
    for index in 0..20 {
        let request = Request::post("/order").header("host", "api").body(Full::from(format!("order {index}"))).unwrap();
        let heard = ask(world.connect(&web, vip(1)), request).await;
        assert_eq!((heard.status, &*heard.body), (200, "good"), "{heard:?}");
    }
    assert!(world.dialled().contains(&app_at(4)));
}

#[tokio::test(start_paused = true)]
async fn a_sidecar_that_could_not_hand_a_request_on_is_left_for_another() {
    let (world, web) = flaky(&[]);
    world.app(app_at(3), |_| text("good"));
    // The second pod's application is not there yet; its sidecar says that nobody saw the request.
    for index in 0..20 {
        let request = Request::post("/order").header("host", "api").body(Full::from(format!("order {index}"))).unwrap();
        let heard = ask(world.connect(&web, vip(1)), request).await;
        assert_eq!((heard.status, &*heard.body), (200, "good"), "{heard:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_post_that_may_have_been_processed_is_not_sent_again() {
    let (world, web) = versions(&[route(json!([{ "retry": { "attempts": 3 }, "backendRefs": [{ "name": "v1", "port": 80 }] }]))]);
    let seen = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&seen);
    world.raw_app(app_at(3), move |mut stream, _| {
        let count = Arc::clone(&count);
        tokio::spawn(async move {
            let mut buffer = [0; 1024];
            // Takes the order and dies.
            drop(stream.read(&mut buffer).await);
            count.fetch_add(1, Ordering::Relaxed);
        });
    });
    let order = Request::post("/order").header("host", "api").body(Full::from("one")).unwrap();
    let heard = ask(world.connect(&web, vip(1)), order).await;
    assert_eq!((heard.status, heard.reason()), (502, "upstream_reset"));
    assert_eq!(seen.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_shadow_gets_copies_and_never_touches_the_caller() {
    let (world, web) = versions(&[route(json!([{
        "filters": [{ "type": "RequestMirror", "requestMirror": { "backendRef": { "name": "v2", "port": 80 } } }],
        "backendRefs": [{ "name": "v1", "port": 80 }],
    }]))]);
    let bodies: Arc<parking_lot::Mutex<Vec<String>>> = Arc::default();
    let heard_by_shadow = Arc::clone(&bodies);
    world.slow_app(app_at(4), move |request| {
        heard_by_shadow.lock().push(String::from_utf8(request.body().to_vec()).unwrap());
        async {
            sleep(Duration::from_secs(20)).await;
            status(500)
        }
    });
    let begin = Instant::now();
    for index in 0..3 {
        let request = Request::post("/").header("host", "api").body(Full::from(format!("order {index}"))).unwrap();
        let heard = ask(world.connect(&web, vip(1)), request).await;
        assert_eq!((heard.status, &*heard.body), (200, "v1"));
    }
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    sleep(Duration::from_secs(60)).await;
    let mut seen = bodies.lock().clone();
    seen.sort();
    assert_eq!(seen, ["order 0", "order 1", "order 2"]);
    assert!(web.telemetry.metrics.render().contains(r#"outcome="answered"} 3"#), "{}", web.telemetry.metrics.render());
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_the_mesh_refused_is_not_counted_as_answered() {
    let (world, web) = versions(&[route(json!([{
        "filters": [{ "type": "RequestMirror", "requestMirror": { "backendRef": { "name": "v2", "port": 80 } } }],
        "backendRefs": [{ "name": "v1", "port": 80 }],
    }]))]);
    // The shadow's application breaks off, so what answers is its sidecar.
    world.raw_app(app_at(4), |stream, _| drop(stream));
    let heard = ask(world.connect(&web, vip(1)), get("/")).await;
    assert_eq!((heard.status, &*heard.body), (200, "v1"));
    sleep(Duration::from_secs(60)).await;
    let metrics = web.telemetry.metrics.render();
    assert!(metrics.contains(r#"outcome="failed"} 1"#) && !metrics.contains(r#"outcome="answered""#), "{metrics}");
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_in_504() {
    let (world, web) = versions(&[route(json!([{
        "timeouts": { "request": "2s" },
        "backendRefs": [{ "name": "v1", "port": 80 }],
    }]))]);
    world.slow_app(app_at(3), |_| async {
        sleep(Duration::from_secs(30)).await;
        text("late")
    });
    let begin = Instant::now();
    let heard = ask(world.connect(&web, vip(1)), get("/")).await;
    assert_eq!((heard.status, heard.reason()), (504, "deadline_exceeded"));
    assert!(begin.elapsed() >= Duration::from_secs(2) && begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_fault_is_injected_by_its_rule() {
    let (world, web) = versions(&[document(
        "TrafficPolicy",
        "fault",
        json!({ "targetRefs": [{ "kind": "Service", "name": "api" }], "fault": { "abort": { "status": 418, "percent": 100 } } }),
    )]);
    let heard = ask(world.connect(&web, vip(1)), get("/")).await;
    assert_eq!((heard.status, heard.reason()), (418, "fault_injected"), "{heard:?}");
}

#[tokio::test(start_paused = true)]
async fn the_limit_on_requests_answers_503() {
    let (world, web) = versions(&[document(
        "TrafficPolicy",
        "limit",
        json!({ "targetRefs": [{ "kind": "Service", "name": "api" }], "circuitBreaking": { "limits": { "maxRequests": 1 } } }),
    )]);
    world.slow_app(app_at(3), |_| async {
        sleep(Duration::from_secs(5)).await;
        text("slow")
    });
    let (first, second) = tokio::join!(ask(world.connect(&web, vip(1)), get("/")), async {
        sleep(Duration::from_secs(1)).await;
        ask(world.connect(&web, vip(1)), get("/")).await
    });
    assert_eq!(first.status, 200);
    assert_eq!((second.status, second.reason()), (503, "breaker_rejected"));
    assert!(second.body.contains("TrafficPolicy/shop/limit"), "{}", second.body);
}

#[tokio::test(start_paused = true)]
async fn the_limit_on_waiting_requests_refuses_the_next_one_by_its_rule() {
    let (world, web) = versions(&[document(
        "TrafficPolicy",
        "limit",
        json!({
            "targetRefs": [{ "kind": "Service", "name": "api" }],
            "circuitBreaking": { "limits": { "maxPendingRequests": 2 } },
        }),
    )]);
    world.slow(app_at(3), Duration::from_secs(3));
    let begin = Instant::now();
    let timed = async |wait: u64| {
        sleep(Duration::from_millis(wait)).await;
        let heard = ask(world.connect(&web, vip(1)), get("/")).await;
        (heard, begin.elapsed().as_secs())
    };
    let ((first, at_first), (second, at_second), (third, at_third)) = tokio::join!(timed(0), timed(100), timed(200));
    // Two wait for the connection; the third does not even wait.
    assert_eq!((first.status, at_first, second.status, at_second), (200, 3, 200, 3));
    assert_eq!((third.status, third.reason(), at_third), (503, "breaker_rejected", 0));
    assert!(third.body.contains("TrafficPolicy/shop/limit circuitBreaking.limits"), "{}", third.body);
    // Who no longer waits counts no more: there is a connection now.
    for (heard, _) in [timed(0).await, timed(0).await, timed(0).await] {
        assert_eq!(heard.status, 200);
    }
    let metrics = web.telemetry.metrics.render();
    let told = |line: &str| line.starts_with("outrigger_refusals_total") && line.contains("TrafficPolicy/shop/limit");
    assert!(metrics.lines().any(|line| told(line) && line.contains("breaker_rejected") && line.ends_with(" 1")), "{metrics}");
}

#[tokio::test(start_paused = true)]
async fn an_unknown_address_of_the_mesh_is_never_dialled() {
    let (world, web) = versions(&[]);
    let begin = Instant::now();
    let heard = ask(world.connect(&web, "10.65.9.9:80".parse().unwrap()), get("/")).await;
    assert_eq!((heard.status, heard.reason()), (503, "no_configuration"));
    assert!(begin.elapsed() >= Duration::from_secs(2), "the control plane was asked first");
    assert!(world.dialled().is_empty());
    let mut opaque = world.connect(&web, "10.65.9.9:6379".parse().unwrap());
    opaque.write_all(b"PING\r\n").await.unwrap();
    let mut nothing = Vec::new();
    opaque.read_to_end(&mut nothing).await.unwrap();
    assert!(nothing.is_empty() && world.dialled().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_first_use_waits_for_the_configuration() {
    let (world, _web) = versions(&[]);
    let late = world.unconfigured("web", 2);
    let (heard, ()) = tokio::join!(ask(world.connect(&late, vip(1)), get("/")), async {
        sleep(Duration::from_millis(300)).await;
        world.configure(&late, "web-1");
    });
    assert_eq!((heard.status, &*heard.body), (200, "v1"));
}

#[tokio::test(start_paused = true)]
async fn a_pod_is_reached_by_its_address_with_its_identity() {
    let (world, web) = versions(&[]);
    let heard = ask(world.connect(&web, app_at(4)), get("/")).await;
    assert_eq!((heard.status, &*heard.body), (200, "v2"));
    assert!(web.telemetry.metrics.render().contains(r#"destination_identity="spiffe://cluster.local/ns/shop/sa/v2""#));
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_with_another_identity_is_refused() {
    let (world, web) = versions(&[]);
    // Another workload answers at the address of the first version.
    let _impostor = world.sidecar("thief", "v1-1", 3);
    let heard = ask(world.connect(&web, vip(1)), get("/")).await;
    assert_eq!((heard.status, heard.reason()), (503, "identity_mismatch"));
}

#[tokio::test(start_paused = true)]
async fn who_dials_the_sidecar_itself_is_refused() {
    let (world, web) = versions(&[]);
    let heard = ask(world.connect(&web, "127.0.0.1:14001".parse().unwrap()), get("/")).await;
    assert_eq!((heard.status, heard.reason()), (421, "own_port"));
}

#[tokio::test(start_paused = true)]
async fn a_service_that_leads_to_a_sidecar_itself_is_refused_as_that() {
    let mut own = service("own", "v1", 9);
    own["spec"]["ports"][0]["targetPort"] = json!(14020);
    let (mut world, web) = versions(&[]);
    world.add_unchecked(&own);
    world.configure(&web, "web-1");
    let heard = ask(world.connect(&web, vip(9)), get("/")).await;
    assert_eq!((heard.status, heard.reason()), (421, "own_port"));
    assert!(world.dialled().is_empty());
}

/// A pod names one of its sidecar's ports as its application's.
#[tokio::test(start_paused = true)]
async fn an_endpoint_that_is_a_sidecar_itself_is_left_for_another_and_refused_as_that() {
    let both = |port: u16, last: u8, name: &str| {
        let mut pod = pod("both", name, last);
        pod["spec"]["ports"][0]["port"] = json!(port);
        pod
    };
    let mut named = service("both", "both", 9);
    named["spec"]["ports"][0]["targetPort"] = json!("http");
    let (mut world, web) = versions(&[both(8080, 5, "both-1"), named]);
    world.add_unchecked(&both(14006, 6, "both-2"));
    world.configure(&web, "web-1");
    world.sidecar("both", "both-1", 5);
    world.app(app_at(5), |_| text("both"));
    for _ in 0..20 {
        let heard = ask(world.connect(&web, vip(9)), get("/")).await;
        assert_eq!((heard.status, &*heard.body), (200, "both"));
    }
    // Where the one that is an application is gone, the other one is told apart from one that does not answer.
    world.slow(app_at(5), Duration::from_secs(3_600));
    let heard = ask(world.connect(&web, vip(9)), get("/")).await;
    assert!(heard.reason() != "connect_failed", "{heard:?}");
    assert!(world.dialled().iter().all(|at| at.port() != 14006));
}

#[tokio::test(start_paused = true)]
async fn who_dials_another_pods_sidecar_itself_is_told_so_by_the_own_one() {
    let (world, web) = versions(&[]);
    for port in [14001, 14006, 14007, 14020] {
        let heard = ask(world.connect(&web, SocketAddr::new(app_at(4).ip(), port)), get("/")).await;
        assert_eq!((heard.status, heard.reason()), (421, "own_port"), "{port}");
    }
    let mut opaque = world.connect(&web, SocketAddr::new(app_at(4).ip(), 14006));
    opaque.write_all(b"PING\r\n").await.unwrap();
    let mut nothing = Vec::new();
    opaque.read_to_end(&mut nothing).await.unwrap();
    assert!(nothing.is_empty() && world.dialled().is_empty());
    assert!(web.telemetry.metrics.render().contains(r#"reason="own_port""#), "{}", web.telemetry.metrics.render());
}

#[tokio::test(start_paused = true)]
async fn a_pod_without_sidecar_may_listen_where_a_sidecar_would() {
    let plain = json!({ "addresses": ["10.64.0.9"], "transport": "Plaintext" });
    let (world, web) = versions(&[document("Workload", "plain-1", plain)]);
    let address = "10.64.0.9:14001".parse().unwrap();
    world.app(address, |_| text("plain"));
    let heard = ask(world.connect(&web, address), get("/")).await;
    assert_eq!((heard.status, &*heard.body), (200, "plain"));
}

#[tokio::test(start_paused = true)]
async fn addresses_outside_of_the_mesh_follow_egress() {
    let (mut world, web) = versions(&[]);
    let outside = "192.0.2.7:80".parse().unwrap();
    world.app(outside, |_| text("outside"));
    let heard = ask(world.connect(&web, outside), get("/")).await;
    assert_eq!(heard.body, "outside");
    assert!(web.telemetry.metrics.render().contains(r#"verdict="allowed"} 1"#), "{}", web.telemetry.metrics.render());
    world.change(&document("Mesh", "mesh", json!({ "egress": "Deny" })), &web, "web-1");
    let heard = ask(world.connect(&web, outside), get("/")).await;
    assert_eq!((heard.status, heard.reason()), (403, "egress_denied"));
}

#[tokio::test(start_paused = true)]
async fn a_request_to_an_address_outside_that_cannot_be_reached_is_answered() {
    let (world, web) = versions(&[]);
    let (silent, closed) = ("192.0.2.7:80".parse().unwrap(), "192.0.2.8:80".parse().unwrap());
    world.slow(silent, Duration::from_secs(3_600));
    for (outside, status, reason) in [(silent, 504, "connect_timeout"), (closed, 503, "connect_failed")] {
        let begun = Instant::now();
        let heard = ask(world.connect(&web, outside), get("/")).await;
        assert_eq!((heard.status, heard.reason()), (status, reason), "{heard:?}");
        // Whoever asks again finds out whether it is still so.
        assert_eq!(heard.headers["connection"], "close");
        // Two seconds for the control plane to say that it is outside, five to connect.
        assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
        let heard = ask_h2(world.connect(&web, outside), get("/")).await;
        assert_eq!((heard.status, heard.reason()), (status, reason), "{heard:?}");
        told(&web, &["outrigger_refusals_total", reason, r#"protocol="http1""#, "} 1"]);
        told(&web, &["outrigger_refusals_total", reason, r#"protocol="http2""#, "} 1"]);
    }
}

/// Connections and requests that were refused for this reason.
fn counted(proxy: &Proxy, reason: &str) -> u64 {
    let metrics = proxy.telemetry.metrics.render();
    let lines = metrics.lines().filter(|line| line.starts_with("outrigger_refusals_total{") && line.contains(reason));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

#[tokio::test(start_paused = true)]
async fn what_is_no_request_to_an_address_outside_that_cannot_be_reached_is_told() {
    let (world, web) = versions(&[]);
    let silent = "192.0.2.7:25".parse().unwrap();
    world.slow(silent, Duration::from_secs(3_600));
    for words in [b"\x16\x03\x01\0\x05\x01\0\0\x01\0".as_slice(), b"", b"HELO me\r\n"] {
        let before = counted(&web, "connect_timeout");
        let mut stream = world.connect(&web, silent);
        stream.write_all(words).await.unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        assert!(heard.is_empty(), "{heard:?}");
        assert_eq!(counted(&web, "connect_timeout"), before + 1);
    }
    // Nor is it forgotten when the client left before.
    drop(world.connect(&web, silent));
    sleep(Duration::from_secs(10)).await;
    assert_eq!(counted(&web, "connect_timeout"), 4);
}
