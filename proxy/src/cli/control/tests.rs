//! A control plane whose sidecars have their identities from another Workload API, with real sockets and real TLS. The
//! Workload API is one of another authority, which plays SPIRE.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::{UnixListenerStream, WatchStream};
use tonic::{Code, Request, Response, Status};

use crate::base::clock::WallClock;
use crate::base::drain::Drain;
use crate::base::net::BoxedIo;
use crate::control::ca::Authority;
use crate::control::webhook::WebhookConfig;
use crate::control::{Config, Control, SourceConfig};
use crate::delta::authority::authority_client::AuthorityClient;
use crate::delta::authority::{JoinNodeRequest, PlacePodRequest, Pod, SignWorkloadRequest};
use crate::delta::envelope::delta_client::DeltaClient;
use crate::delta::envelope::{DeltaRequest, Node};
use crate::delta::transport::{ALPN, ALPN_AUTHORITY, control_identity};
use crate::identity::source::Identity;
use crate::identity::spiffe::TrustDomain;
use crate::node::workload_proto::spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer};
use crate::node::workload_proto::{X509BundlesRequest, X509BundlesResponse, X509svid, X509svidRequest, X509svidResponse};

/// An authority of its own, and the Workload APIs that it serves.
struct Spire {
    folder: tempfile::TempDir,
    authority: Authority,
    served: JoinSet<()>,
}

/// What one socket says to whoever asks there; none: that it has nothing for him.
type Said = watch::Sender<Option<X509svidResponse>>;

struct Api(watch::Receiver<Option<X509svidResponse>>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl SpiffeWorkloadApi for Api {
    type FetchX509SVIDStream = Answers<X509svidResponse>;
    type FetchX509BundlesStream = Answers<X509BundlesResponse>;

    async fn fetch_x509svid(&self, _request: Request<X509svidRequest>) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let said = WatchStream::new(self.0.clone());
        Ok(Response::new(Box::pin(said.map(|said| said.ok_or_else(|| Status::permission_denied("no identity issued"))))))
    }

    async fn fetch_x509_bundles(
        &self,
        _request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }
}

impl Spire {
    fn of(trust_domain: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::open(&folder.path().join("ca"), trust_domain.parse().unwrap(), WallClock::system()).unwrap();
        Self { folder, authority, served: JoinSet::new() }
    }

    /// An SVID for each of these, with the bundle.
    fn issue(&self, ids: &[&str], lifetime: Duration) -> X509svidResponse {
        let bundle = self.authority.root().to_vec();
        let svids = ids.iter().map(|id| {
            let (signed, key) = self.authority.issue(&id.parse().unwrap(), lifetime).unwrap();
            X509svid {
                spiffe_id: (*id).to_owned(),
                x509_svid: signed.chain.iter().flat_map(|certificate| certificate.to_vec()).collect(),
                x509_svid_key: key.secret_pkcs8_der().to_vec(),
                bundle: bundle.clone(),
                hint: String::new(),
            }
        });
        X509svidResponse { svids: svids.collect(), crl: Vec::new(), federated_bundles: HashMap::new() }
    }

    /// A Workload API at `socket`.
    fn serve_at(&mut self, socket: &Path, first: Option<X509svidResponse>) -> Said {
        drop(std::fs::remove_file(socket));
        let listener = UnixListener::bind(socket).unwrap();
        let (said, says) = watch::channel(first);
        let server = tonic::transport::Server::builder().add_service(SpiffeWorkloadApiServer::new(Api(says)));
        self.served.spawn(async move { server.serve_with_incoming(UnixListenerStream::new(listener)).await.unwrap() });
        said
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// As a sidecar has its identity: by asking at a socket.
    async fn identity(&mut self, path: &str) -> Identity {
        let socket = self.socket(&path.replace('/', "-"));
        let first = self.issue(&[&format!("spiffe://{}{path}", self.authority.trust_domain())], HOUR);
        let said = self.serve_at(&socket, Some(first));
        let identity = Identity::new(self.authority.trust_domain().clone(), WallClock::system());
        let follow = identity.clone();
        self.served.spawn(async move {
            follow.follow(socket).await;
            drop(said);
        });
        timeout(PATIENCE, identity.arrived()).await.unwrap();
        identity
    }
}

/// A control plane that has its identity from a Workload API.
struct Mesh {
    root: tempfile::TempDir,
    address: SocketAddr,
    scrape: SocketAddr,
    drain: Drain,
    served: JoinSet<()>,
}

impl Mesh {
    async fn start(workload_api: &Path) -> Self {
        let root = tempfile::tempdir().unwrap();
        let documents = root.path().join("documents");
        std::fs::create_dir(&documents).unwrap();
        let workload = |name: &str, last: u8| {
            format!(
                "---\napiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{ name: {name}-1, namespace: shop }}\nspec: {{ addresses: [10.99.0.{last}], serviceAccount: {name} }}\n"
            )
        };
        std::fs::write(documents.join("shop.yaml"), workload("web", 1) + &workload("api", 2)).unwrap();
        let local = "127.0.0.1:0".parse().unwrap();
        let config = Config {
            source: SourceConfig::Folders(vec![documents]),
            state: root.path().join("state"),
            trust_domain: domain(),
            listen: vec![local],
            api: local,
            metrics: local,
            svid_lifetime: HOUR,
            workload_api: Some(workload_api.to_owned()),
            webhook: WebhookConfig::example(),
        };
        let control = Control::build(config, WallClock::system()).await.unwrap();
        let [address, scrape] = control.addresses();
        let (drain, guard) = Drain::new();
        let mut served = JoinSet::new();
        served.spawn(control.serve(guard));
        Self { root, address, scrape, drain, served }
    }

    /// An identity of the mesh's own authority.
    fn own(&self, path: &str) -> Identity {
        let authority = Authority::open(&self.root.path().join("state/ca"), domain(), WallClock::system()).unwrap();
        let identity = Identity::new(domain(), WallClock::system());
        if path.is_empty() {
            identity.trust(authority.bundles().unwrap());
        } else {
            let (signed, key) = authority.issue(&format!("spiffe://cluster.local{path}").parse().unwrap(), HOUR).unwrap();
            identity.publish(signed.chain, key, authority.bundles().unwrap()).unwrap();
        }
        identity
    }

    /// A connection that says that it will speak `alpn`.
    async fn channel(&self, identity: &Identity, alpn: &[u8]) -> io::Result<tonic::transport::Channel> {
        let config = identity.client_config(&control_identity(&domain()).unwrap(), &[alpn, ALPN]).map_err(io::Error::other)?;
        let tcp = TcpStream::connect(self.address).await?;
        let name = ServerName::try_from("control.outrigger-system").map_err(io::Error::other)?;
        let tls = TlsConnector::from(config).connect(name, tcp).await?;
        let mut io = Some(hyper_util::rt::TokioIo::new(Box::new(tls) as BoxedIo));
        let connector =
            tower::service_fn(move |_| std::future::ready(io.take().ok_or(io::Error::from(io::ErrorKind::NotConnected))));
        let endpoint = tonic::transport::Endpoint::from_static("http://control");
        endpoint.connect_with_connector(connector).await.map_err(io::Error::other)
    }

    /// Opens the configuration stream of a pod; what the first answer is, or why there is none.
    async fn stream(&self, identity: &Identity, alpn: &[u8], pod: &str) -> Result<(), Status> {
        let node = Some(Node { namespace: "shop".into(), name: pod.into(), version: "0".into() });
        let first = DeltaRequest { node, subscribe: vec![format!("workload/shop/{pod}")], ..DeltaRequest::default() };
        let requests = tokio_stream::StreamExt::chain(tokio_stream::once(first), tokio_stream::pending());
        let opened = async {
            let channel =
                self.channel(identity, alpn).await.map_err(|error| Status::unknown(format!("no connection: {error}")))?;
            let mut responses = DeltaClient::new(channel).stream(requests).await?.into_inner();
            let answer = responses.message().await?.ok_or_else(|| Status::unknown("it ended"))?;
            assert_eq!(answer.resources.len(), 1, "{answer:?}");
            Ok(())
        };
        timeout(PATIENCE, opened).await.unwrap()
    }

    async fn authority(&self, identity: &Identity, alpn: &[u8]) -> Result<AuthorityClient<tonic::transport::Channel>, Status> {
        let channel = self.channel(identity, alpn).await;
        channel.map(AuthorityClient::new).map_err(|error| Status::unknown(format!("no connection: {error}")))
    }

    /// What its readiness says.
    async fn ready(&self) -> (bool, String) {
        let mut stream = TcpStream::connect(self.scrape).await.unwrap();
        stream.write_all(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.starts_with("HTTP/1.1 200"), body.trim_end().to_owned())
    }

    async fn until_ready(&self, told: impl Fn(&(bool, String)) -> bool) -> String {
        let waited = async {
            loop {
                let ready = self.ready().await;
                if told(&ready) {
                    return ready.1;
                }
                tokio::time::sleep(AGAIN).await;
            }
        };
        timeout(PATIENCE, waited).await.unwrap()
    }

    async fn stop(self) {
        let Self { drain, served, .. } = self;
        assert!(drain.drain(PATIENCE).await, "the control plane did not stop");
        drop(served);
    }
}

fn domain() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

fn request() -> Vec<u8> {
    CertificateParams::default().serialize_request(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
}

/// SPIRE with an entry for the control plane, and a control plane that has taken it.
async fn world() -> (Spire, Said, Mesh) {
    let mut spire = Spire::of("cluster.local");
    let said = spire.serve_at(&spire.socket("control"), Some(spire.issue(&[CONTROL], HOUR)));
    let mesh = Mesh::start(&spire.socket("control")).await;
    mesh.until_ready(|(ready, _)| *ready).await;
    (spire, said, mesh)
}

#[tokio::test]
async fn a_sidecar_and_the_control_plane_know_each_other_by_the_workload_api_of_both() {
    let (mut spire, _said, mesh) = world().await;
    let web = spire.identity("/ns/shop/sa/web").await;
    mesh.stream(&web, ALPN, "web-1").await.unwrap();
    // Who speaks for which pod holds as ever.
    let status = mesh.stream(&web, ALPN, "api-1").await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    assert!(status.message().contains("another pod's identity"), "{status:?}");
    mesh.stop().await;
}

#[tokio::test]
async fn an_identity_of_the_meshs_own_authority_is_no_sidecars() {
    let (_spire, _said, mesh) = world().await;
    let forged = mesh.own("/ns/shop/sa/web");
    // It does not believe what it is shown, and would not be believed.
    let status = mesh.stream(&forged, ALPN, "web-1").await.unwrap_err();
    assert!(status.message().starts_with("no connection"), "{status:?}");
    // As an agent it is believed, and is nobody who has a configuration.
    let status = mesh.stream(&forged, ALPN_AUTHORITY, "web-1").await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    assert!(status.message().contains("from another Workload API"), "{status:?}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_sidecar_that_believes_both_and_shows_the_own_authoritys_certificate_is_refused_in_the_handshake() {
    let (spire, _said, mesh) = world().await;
    let authority = Authority::open(&mesh.root.path().join("state/ca"), domain(), WallClock::system()).unwrap();
    let (signed, key) = authority.issue(&"spiffe://cluster.local/ns/shop/sa/web".parse().unwrap(), HOUR).unwrap();
    let forged = Identity::new(domain(), WallClock::system());
    forged.publish(signed.chain, key, spire.authority.bundles().unwrap()).unwrap();
    // The handshake of the one who dials ends before the other one has looked.
    let status = mesh.stream(&forged, ALPN, "web-1").await.unwrap_err();
    assert!(!matches!(status.code(), Code::Ok | Code::NotFound), "{status:?}");
    assert!(!status.message().contains("another Workload API"), "it was let in as somebody: {status:?}");
    mesh.stop().await;
}

#[tokio::test]
async fn whom_the_workload_api_calls_a_node_is_none() {
    let (spire, _said, mesh) = world().await;
    // A Workload API that names its workloads otherwise is refused by its callers; so it is slipped in behind the door.
    let (signed, key) = spire.authority.issue(&"spiffe://cluster.local/node/n1".parse().unwrap(), HOUR).unwrap();
    let node = Identity::new(domain(), WallClock::system());
    node.publish(signed.chain, key, spire.authority.bundles().unwrap()).unwrap();
    let mut authority = mesh.authority(&node, ALPN).await.unwrap();
    let pod = Pod { uid: "u1".into(), ..Pod::default() };
    let status = authority.place_pod(PlacePodRequest { pod: Some(pod) }).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    let token = std::fs::read_to_string(mesh.root.path().join("state/join-token")).unwrap();
    let join = || JoinNodeRequest { token: token.trim().to_owned(), node: "n1".into(), csr: request() };
    let status = authority.join_node(join()).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    // As an agent it is not believed at all.
    assert!(mesh.authority(&node, ALPN_AUTHORITY).await.is_err());
    // An agent joins as ever, by its token and the mesh's own authority, and no workload is signed for.
    let mut authority = mesh.authority(&mesh.own(""), ALPN_AUTHORITY).await.unwrap();
    authority.join_node(join()).await.unwrap();
    let mut authority = mesh.authority(&mesh.own("/node/n1"), ALPN_AUTHORITY).await.unwrap();
    let place = |uid: &str| PlacePodRequest { pod: Some(Pod { uid: uid.into(), ..Pod::default() }) };
    for uid in ["", "u1", "../../etc", &"a".repeat(1_000_000)] {
        let status = authority.place_pod(place(uid)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains("is no UID of a pod") && status.message().len() < 200, "{status:?}");
    }
    let pod = Pod { uid: UID.into(), addresses: vec!["10.99.0.1".into()], ..Pod::default() };
    authority.place_pod(PlacePodRequest { pod: Some(pod) }).await.unwrap();
    let sign = SignWorkloadRequest { spiffe_id: "spiffe://cluster.local/ns/shop/sa/web".into(), csr: request(), pod: None };
    let status = authority.sign_workload(sign).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    assert!(status.message().contains("--foreign-identities"), "{status:?}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_new_authority_of_the_workload_api_is_believed_at_once_and_the_old_one_no_more() {
    let (mut old, said, mesh) = world().await;
    let before = old.identity("/ns/shop/sa/web").await;
    mesh.stream(&before, ALPN, "web-1").await.unwrap();
    let mut new = Spire::of("cluster.local");
    let after = new.identity("/ns/shop/sa/web").await;
    assert!(mesh.stream(&after, ALPN, "web-1").await.is_err());
    said.send_replace(Some(new.issue(&[CONTROL], HOUR)));
    let believed = async {
        while mesh.stream(&after, ALPN, "web-1").await.is_err() {
            tokio::time::sleep(AGAIN).await;
        }
    };
    timeout(PATIENCE, believed).await.unwrap();
    assert!(mesh.stream(&before, ALPN, "web-1").await.is_err());
    mesh.stop().await;
}

#[tokio::test]
async fn an_identity_that_is_not_the_control_planes_own_is_refused_by_name_and_told() {
    for (domain, ids, told) in [
        ("shop.example", &["spiffe://shop.example/ns/outrigger-system/sa/control"][..], "is not of trust domain cluster.local"),
        (
            "cluster.local",
            &["spiffe://cluster.local/control"][..],
            "and not spiffe://cluster.local/ns/outrigger-system/sa/control",
        ),
        (
            "cluster.local",
            &["spiffe://cluster.local/ns/shop/sa/web"][..],
            "gives this process spiffe://cluster.local/ns/shop/sa/web",
        ),
    ] {
        let mut spire = Spire::of(domain);
        let said = spire.serve_at(&spire.socket("control"), Some(spire.issue(ids, HOUR)));
        let mesh = Mesh::start(&spire.socket("control")).await;
        let missing = mesh.until_ready(|(ready, missing)| !ready && missing.contains("no identity yet: the ")).await;
        let missing = if missing.contains("has not answered") {
            mesh.until_ready(|(_, missing)| !missing.contains("has not answered")).await
        } else {
            missing
        };
        assert!(missing.contains(told), "{missing}");
        // Beside others, its own is found.
        if domain == "cluster.local" {
            said.send_replace(Some(spire.issue(&[ids[0], CONTROL], HOUR)));
            mesh.until_ready(|(ready, _)| *ready).await;
        }
        mesh.stop().await;
    }
}

#[tokio::test]
async fn a_sidecar_refuses_an_identity_of_another_form_and_takes_its_own_beside_it() {
    let mut spire = Spire::of("cluster.local");
    let socket = spire.socket("web");
    let said = spire.serve_at(&socket, Some(spire.issue(&["spiffe://cluster.local/web"], HOUR)));
    let identity = Identity::new(domain(), WallClock::system());
    let follow = identity.clone();
    spire.served.spawn(async move { follow.follow(socket).await });
    let told = async {
        while identity.trouble().is_none() {
            tokio::time::sleep(AGAIN).await;
        }
    };
    timeout(PATIENCE, told).await.unwrap();
    let missing = identity.missing().unwrap();
    assert!(
        missing.contains("spiffe://cluster.local/web is not of the form spiffe://cluster.local/ns/NAMESPACE/sa/"),
        "{missing}"
    );
    said.send_replace(Some(spire.issue(&["spiffe://cluster.local/web", "spiffe://cluster.local/ns/shop/sa/web"], HOUR)));
    timeout(PATIENCE, identity.arrived()).await.unwrap();
    assert_eq!(identity.own().unwrap().id.as_str(), "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(identity.missing(), None);
}

#[tokio::test]
async fn a_workload_api_behind_which_the_meshs_own_authority_stands_is_refused_by_name() {
    let mut spire = Spire::of("cluster.local");
    let socket = spire.socket("control");
    let mesh = Mesh::start(&socket).await;
    let open = |folder: &Path| Authority::open(folder, domain(), WallClock::system()).unwrap();
    let apart = std::mem::replace(&mut spire.authority, open(&mesh.root.path().join("state/ca")));
    let said = spire.serve_at(&socket, Some(spire.issue(&[CONTROL], HOUR)));
    let missing = mesh.until_ready(|(_, told)| told.contains("own authority")).await;
    assert!(missing.starts_with("no identity yet: the workload API vouches by the mesh's own authority"), "{missing}");
    spire.authority = apart;
    said.send_replace(Some(spire.issue(&[CONTROL], HOUR)));
    mesh.until_ready(|(ready, _)| *ready).await;
    mesh.stop().await;
}

#[test]
fn on_a_cluster_the_control_plane_is_not_told_alone_where_identities_come_from() {
    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: super::ControlArgs,
    }
    let problem = |line: &str| {
        let Line { args } = clap::Parser::try_parse_from(["control"].into_iter().chain(line.split_whitespace())).unwrap();
        super::half_set(&args, &args.sidecars.settings(&args.trust_domain))
    };
    assert!(problem("--kubernetes --workload-api /run/spire.sock").unwrap().contains("--sidecar-workload-api"));
    assert_eq!(problem("--kubernetes --workload-api /run/spire.sock --sidecar-workload-api csi.spiffe.io"), None);
    assert_eq!(problem("--kubernetes --sidecar-workload-api csi.spiffe.io"), None);
    // Whoever starts sidecars by hand tells them.
    assert_eq!(problem("--workload-api /run/spire.sock"), None);
}

#[tokio::test]
async fn without_its_workload_api_the_control_plane_serves_on_until_its_certificate_ends_and_tells() {
    let mut spire = Spire::of("cluster.local");
    let short = Duration::from_secs(3);
    let said = spire.serve_at(&spire.socket("control"), Some(spire.issue(&[CONTROL], short)));
    let mesh = Mesh::start(&spire.socket("control")).await;
    mesh.until_ready(|(ready, _)| *ready).await;
    let web = spire.identity("/ns/shop/sa/web").await;
    said.send_replace(None);
    mesh.stream(&web, ALPN, "web-1").await.unwrap();
    let missing = mesh.until_ready(|(ready, _)| !*ready).await;
    assert!(missing.starts_with("the identity has ended: the workload API at ") && missing.contains("refuses"), "{missing}");
    said.send_replace(Some(spire.issue(&[CONTROL], HOUR)));
    mesh.until_ready(|(ready, _)| *ready).await;
    mesh.stop().await;
}

const UID: &str = "3f2504e0-4f89-41d3-9a0c-0305e82c3301";
const CONTROL: &str = "spiffe://cluster.local/ns/outrigger-system/sa/control";
const HOUR: Duration = Duration::from_secs(3600);
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks.
const AGAIN: Duration = Duration::from_millis(10);
