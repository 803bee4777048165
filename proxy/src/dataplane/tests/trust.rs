//! What stands when the own certificate or the trust in others changes.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{sleep, timeout};

use super::world::{World, app_at, ask, get, pod, service, text, vip};
use crate::dataplane::Proxy;
use crate::identity::testing::Authority;

fn pair() -> (World, Arc<Proxy>, Arc<Proxy>) {
    let world = World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), service("api", "api", 1)]);
    let (web, api) = (world.sidecar("web", "web-1", 2), world.sidecar("api", "api-1", 3));
    world.slow_app(app_at(3), |request| async move {
        if request.uri().path() == "/slow" {
            sleep(Duration::from_secs(5)).await;
        }
        text("api")
    });
    (world, web, api)
}

#[tokio::test(start_paused = true)]
async fn a_certificate_that_is_only_renewed_keeps_the_link() {
    let (world, web, api) = pair();
    assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.status, 200);
    world.renew(&web, "web", None);
    world.renew(&api, "api", None);
    assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.status, 200);
    assert_eq!(world.dialled().len(), 1, "one link carries all");
}

#[tokio::test(start_paused = true)]
async fn who_gets_another_name_opens_links_of_that_name() {
    let (world, web, _api) = pair();
    let slow = ask(world.connect(&web, vip(1)), get("/slow"));
    let (slow, ()) = tokio::join!(slow, async {
        sleep(Duration::from_secs(1)).await;
        world.renew(&web, "other", None);
        assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.status, 200);
    });
    assert_eq!(slow.status, 200, "what is under way ends in peace");
    assert_eq!(world.dialled().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_peer_whose_authority_is_removed_is_cut_off_on_either_side() {
    for caller in [true, false] {
        let (world, web, api) = pair();
        let other = Authority::new();
        let slow = ask(world.connect(&web, vip(1)), get("/slow"));
        let (slow, refused) = tokio::join!(timeout(Duration::from_secs(4), slow), async {
            sleep(Duration::from_secs(1)).await;
            if caller {
                world.renew(&web, "web", Some(&other));
            } else {
                world.renew(&api, "api", Some(&other));
            }
            sleep(Duration::from_millis(1)).await;
            ask(world.connect(&web, vip(1)), get("/")).await
        });
        let slow = slow.expect("the request under way is cut, and not waited for");
        assert_eq!((slow.status, slow.reason()), (502, "upstream_reset"), "caller: {caller}");
        assert_eq!(refused.status, 503, "caller: {caller}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_opaque_connection_is_cut_off_too() {
    for caller in [true, false] {
        let (world, web, api) = pair();
        world.raw_app(app_at(3), |stream, _| {
            tokio::spawn(async move {
                sleep(Duration::from_secs(3600)).await;
                drop(stream);
            });
        });
        let mut stream = world.connect(&web, vip(1));
        stream.write_all(b"PING\r\n").await.unwrap();
        sleep(Duration::from_secs(1)).await;
        let other = Authority::new();
        world.renew(if caller { &web } else { &api }, if caller { "web" } else { "api" }, Some(&other));
        let ended = timeout(Duration::from_secs(5), stream.read(&mut [0; 1])).await.expect("it is cut");
        assert!(matches!(ended, Ok(0) | Err(_)), "caller: {caller}");
    }
}
