//! What is kept on disk, and a start from it.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

use serde_json::{Value, json};

use super::world::{World, app_at, ask, document, get, pod, service, text, vip};
use crate::base::names::Named;
use crate::dataplane::config::{Follower, Kept, load};
use crate::dataplane::{Proxy, Window};
use crate::delta::client::{AckHandle, Delivered, Rejection, Update};
use crate::model::Resource;
use crate::snapshot::compile::Own;

fn follower(proxy: &Arc<Proxy>, kept: Kept, folder: &std::path::Path) -> Follower {
    follower_of("web-1", proxy, kept, folder)
}

fn follower_of(name: &str, proxy: &Arc<Proxy>, kept: Kept, folder: &std::path::Path) -> Follower {
    let window = Window::new(proxy.identity.clone(), proxy.telemetry.clone());
    let own = Own { workload: Named::new("shop", name), trust_domain: "cluster.local".parse().unwrap() };
    Follower::new(Arc::clone(proxy), window, own, kept, folder.to_owned())
}

#[tokio::test(start_paused = true)]
async fn a_sidecar_that_starts_without_a_control_plane_serves_from_what_was_kept() {
    let world = World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), service("api", "api", 1)]);
    world.sidecar("api", "api-1", 3);
    world.app(app_at(3), |_| text("ok"));
    let folder = tempfile::tempdir().unwrap();
    let first = world.unconfigured("web", 2);
    let mut kept = world.kept();
    kept.scopes.insert("service/shop/api".parse().unwrap());
    follower(&first, kept, folder.path()).save().unwrap();
    let file = folder.path().join("configuration.json");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);

    let second = world.unconfigured("web", 2);
    let kept = load(folder.path());
    assert_eq!((kept.resources.by_key.len(), kept.versions.len(), kept.scopes.len()), (3, 3, 1));
    drop(follower(&second, kept, folder.path()));
    let heard = ask(world.connect(&second, vip(1)), get("/")).await;
    assert_eq!((heard.status, &*heard.body), (200, "ok"));
}

#[tokio::test(start_paused = true)]
async fn a_sidecar_whose_app_has_ended_for_good_leaves() {
    let world = World::new(&[pod("web", "web-1", 2)]);
    let web = world.unconfigured("web", 2);
    let folder = tempfile::tempdir().unwrap();
    let window = Window::new(web.identity.clone(), web.telemetry.clone());
    let own = Own { workload: Named::new("shop", "web-1"), trust_domain: "cluster.local".parse().unwrap() };
    let mut following = Follower::new(Arc::clone(&web), Arc::clone(&window), own, world.kept(), folder.path().to_owned());
    for (finished, leaves) in [(false, false), (true, true)] {
        let mut document = pod("web", "web-1", 2);
        document["spec"]["finished"] = finished.into();
        let key = "Workload/shop/web-1".parse::<crate::model::ResourceKey>().unwrap();
        let body =
            Resource::from_json(key.kind, document.to_string().as_bytes()).map(Arc::new).map_err(|error| error.to_string());
        let (ack, mut heard) = AckHandle::heard();
        following.take(Update {
            version: "2".into(),
            resources: vec![Delivered { key, version: "2".into(), body }],
            removed: Vec::new(),
            scopes: Vec::new(),
            ack,
        });
        assert!(heard.try_recv().unwrap().is_empty());
        let asked = tokio::time::timeout(std::time::Duration::from_secs(1), window.drain_asked()).await.is_ok();
        assert_eq!(asked, leaves);
    }
}

/// A policy of `api` that keeps everybody from `/closed`, and how a change of it comes.
fn gate(rules: Value) -> Value {
    document(
        "AuthorizationPolicy",
        "gate",
        json!({ "targetRefs": [{ "kind": "Service", "name": "api" }], "action": "DENY", "rules": rules }),
    )
}

fn deliver(follower: &mut Follower, document: &Value) -> Vec<Rejection> {
    let key = "AuthorizationPolicy/shop/gate".parse::<crate::model::ResourceKey>().unwrap();
    let form = Resource::from_json(key.kind, document.to_string().as_bytes()).map(Arc::new);
    let (ack, mut heard) = AckHandle::heard();
    follower.take(Update {
        version: "2".into(),
        resources: vec![Delivered { key, version: "2".into(), body: form.map_err(|error| error.to_string()) }],
        removed: Vec::new(),
        scopes: Vec::new(),
        ack,
    });
    heard.try_recv().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_refused_security_policy_leaves_its_last_good_form_in_force_after_a_restart_too() {
    let good = gate(json!([{ "to": [{ "paths": ["/closed*"] }] }]));
    // One that cannot be read, and one that can and makes no sense.
    for bad in [json!([{ "to": [{ "pahts": ["/other*"] }] }]), json!([{ "from": [{ "ipBlocks": ["no address"] }] }])] {
        let world = World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), service("api", "api", 1), good.clone()]);
        let web = world.sidecar("web", "web-1", 2);
        world.app(app_at(3), |_| text("ok"));
        let holds = async || {
            let (closed, open) =
                (ask(world.connect(&web, vip(1)), get("/closed")).await, ask(world.connect(&web, vip(1)), get("/other")).await);
            assert_eq!((closed.status, closed.reason(), open.status), (403, "denied", 200));
            assert!(closed.body.contains("AuthorizationPolicy/shop/gate rules[0]"), "{}", closed.body);
        };
        let folder = tempfile::tempdir().unwrap();
        let first = world.unconfigured("api", 3);
        let mut following = follower_of("api-1", &first, world.kept(), folder.path());
        holds().await;
        let rejections = deliver(&mut following, &gate(bad));
        assert_eq!(
            rejections.iter().map(|rejection| rejection.key.to_string()).collect::<Vec<_>>(),
            ["AuthorizationPolicy/shop/gate"]
        );
        holds().await;

        let second = world.unconfigured("api", 3);
        let kept = load(folder.path());
        // What is held is the version before: the control plane hears of it and sends the newest again.
        assert!(kept.versions.iter().any(|(key, version)| key.to_string().ends_with("/gate") && &**version == "1"));
        drop(follower_of("api-1", &second, kept, folder.path()));
        holds().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_security_policy_that_was_never_good_closes_its_target_after_a_restart_too() {
    let world = World::new(&[pod("web", "web-1", 2), pod("api", "api-1", 3), service("api", "api", 1)]);
    let web = world.sidecar("web", "web-1", 2);
    world.app(app_at(3), |_| text("ok"));
    let closed = async || {
        let heard = ask(world.connect(&web, vip(1)), get("/")).await;
        assert_eq!((heard.status, heard.reason()), (403, "denied"));
        assert!(heard.body.contains("AuthorizationPolicy/shop/gate (refused)"), "{}", heard.body);
    };
    let folder = tempfile::tempdir().unwrap();
    let first = world.unconfigured("api", 3);
    let mut following = follower_of("api-1", &first, world.kept(), folder.path());
    assert_eq!(ask(world.connect(&web, vip(1)), get("/")).await.status, 200);
    assert_eq!(deliver(&mut following, &gate(json!([{ "to": [{ "pahts": ["/other*"] }] }]))).len(), 1);
    closed().await;
    let second = world.unconfigured("api", 3);
    drop(follower_of("api-1", &second, load(folder.path()), folder.path()));
    closed().await;
}

#[test]
fn a_file_that_cannot_be_read_is_as_none() {
    let folder = tempfile::tempdir().unwrap();
    for content in ["", "{", "[]", r#"{"resources":[{"key":"x"}],"scopes":[]}"#, "\u{0}\u{1}"] {
        std::fs::write(folder.path().join("configuration.json"), content).unwrap();
        assert!(load(folder.path()).resources.by_key.is_empty());
    }
    assert!(load(std::path::Path::new("/nowhere")).resources.by_key.is_empty());
}
