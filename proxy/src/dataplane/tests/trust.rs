//! What stands when the own certificate or the trust in others changes.

use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;

use super::world::{World, app_at, ask, get, pod, service, text, vip};
use crate::dataplane::Proxy;
use crate::dataplane::tls::{Alpn, accept};
use crate::identity::source::Identity;
use crate::identity::testing::{Authority, Leaf, NOW, clock};
use crate::telemetry::handshake::HandshakeFault;

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

/// What a server of `authority` says of a peer that does this with its connection.
async fn refused<P: Future<Output = ()>>(authority: &Authority, peer: impl FnOnce(DuplexStream) -> P) -> HandshakeFault {
    let identity = Identity::new("cluster.local".parse().unwrap(), clock());
    authority.issue_to(&identity, &Leaf::workload("api"), &[authority]);
    let demand = crate::identity::verify::ClientDemand::Certificate;
    let config = identity.server_config(demand, &Alpn::OFFERED).unwrap();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (accepted, ()) = tokio::join!(accept(config, Box::new(far), Duration::from_secs(5)), peer(near));
    let Err(error) = accepted else { panic!("it is let in") };
    error.fault()
}

/// A peer that wants a link by this configuration, and waits for what comes of it.
async fn links(config: Arc<rustls::ClientConfig>, stream: DuplexStream) {
    let name = ServerName::try_from("sidecar.mesh").unwrap();
    if let Ok(mut link) = TlsConnector::from(config).connect(name, stream).await {
        drop(link.read(&mut [0]).await);
    }
}

/// How a peer with this identity opens links.
fn with_identity(identity: &Identity) -> Arc<rustls::ClientConfig> {
    identity.client_config(&"spiffe://cluster.local/ns/shop/sa/api".parse().unwrap(), &Alpn::OFFERED).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_peer_with_a_bad_certificate_is_told_by_what_is_wrong_with_it() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let of = |domain: &str, name: &str, until| Leaf { names: vec![format!("spiffe://{domain}/ns/shop/sa/{name}")], until };
    for (signer, domain, until, fault) in [
        (&ours, "cluster.local", NOW - 10, HandshakeFault::CertificateExpired),
        (&ours, "other.example", NOW + 10, HandshakeFault::TrustDomain),
        (&theirs, "cluster.local", NOW + 10, HandshakeFault::UnknownAuthority),
    ] {
        let identity = Identity::new(domain.parse().unwrap(), clock());
        signer.issue_to(&identity, &of(domain, "web", until), &[&ours]);
        assert_eq!(refused(&ours, |stream| links(with_identity(&identity), stream)).await, fault);
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_of_the_own_trust_domain_that_is_no_workload_opens_no_link() {
    let ours = Authority::new();
    for name in ["spiffe://cluster.local/node/n1", "spiffe://cluster.local/vm/x", "spiffe://cluster.local/spire/agent/a"] {
        let identity = Identity::new("cluster.local".parse().unwrap(), clock());
        ours.issue_to(&identity, &Leaf { names: vec![name.to_owned()], until: NOW + 10 }, &[&ours]);
        let fault = refused(&ours, |stream| links(with_identity(&identity), stream)).await;
        assert_eq!(fault, HandshakeFault::NoSpiffeId, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_without_a_certificate_or_with_another_tls_is_told_by_that() {
    let ours = Authority::new();
    let nobody = Identity::new("cluster.local".parse().unwrap(), clock());
    nobody.trust(ours.bundles(&["cluster.local"]));
    let fault = refused(&ours, |stream| links(with_identity(&nobody), stream)).await;
    assert_eq!(fault, HandshakeFault::NoCertificate);

    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let old = rustls::ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS12]).unwrap();
    let mut old = old.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
    old.alpn_protocols = vec![b"outrigger-h2".to_vec()];
    assert_eq!(refused(&ours, |stream| links(Arc::new(old), stream)).await, HandshakeFault::ProtocolVersion);

    let web = Identity::new("cluster.local".parse().unwrap(), clock());
    ours.issue_to(&web, &Leaf::workload("web"), &[&ours]);
    let mut another = Arc::unwrap_or_clone(with_identity(&web));
    another.alpn_protocols = vec![b"h2".to_vec()];
    assert_eq!(refused(&ours, |stream| links(Arc::new(another), stream)).await, HandshakeFault::NoCommonProtocol);

    // It expects somebody else at this address.
    let elsewhere = web.client_config(&"spiffe://cluster.local/ns/shop/sa/other".parse().unwrap(), &Alpn::OFFERED).unwrap();
    assert_eq!(refused(&ours, |stream| links(elsewhere, stream)).await, HandshakeFault::RefusedByPeer);
}

#[tokio::test(start_paused = true)]
async fn who_says_no_hello_leaves_or_says_nothing_is_told_by_that() {
    let ours = Authority::new();
    let garbage = async |mut stream: DuplexStream| {
        stream.write_all(b"\x16\x03\x01\x02\x00garbage garbage garbage").await.unwrap();
        stream.write_all(&[b'x'; 1024]).await.unwrap();
        drop(stream.read(&mut [0; 64]).await);
    };
    assert_eq!(refused(&ours, garbage).await, HandshakeFault::Malformed);
    assert_eq!(refused(&ours, async |stream| drop(stream)).await, HandshakeFault::PeerLeft);
    assert_eq!(refused(&ours, async |_stream| sleep(Duration::from_secs(9)).await).await, HandshakeFault::Timeout);
}
