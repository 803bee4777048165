//! What is kept on disk, and a start from it.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

use super::world::{World, app_at, ask, get, pod, service, text, vip};
use crate::base::names::Named;
use crate::dataplane::config::{Follower, load};
use crate::dataplane::{Proxy, Window};
use crate::snapshot::compile::Own;

fn follower(proxy: &Arc<Proxy>, kept: crate::dataplane::config::Kept, folder: &std::path::Path) -> Follower {
    let window = Window::new(proxy.identity.clone(), proxy.telemetry.clone());
    let own = Own { workload: Named::new("shop", "web-1"), trust_domain: "cluster.local".parse().unwrap() };
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

#[test]
fn a_file_that_cannot_be_read_is_as_none() {
    let folder = tempfile::tempdir().unwrap();
    for content in ["", "{", "[]", r#"{"resources":[{"key":"x"}],"scopes":[]}"#, "\u{0}\u{1}"] {
        std::fs::write(folder.path().join("configuration.json"), content).unwrap();
        assert!(load(folder.path()).resources.by_key.is_empty());
    }
    assert!(load(std::path::Path::new("/nowhere")).resources.by_key.is_empty());
}
