//! A whole control plane on loopback, with real folders, real TLS and the sidecars' own end of the stream.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::{Code, Status};

use super::ca::Authority;
use super::sessions::Sessions;
use super::webhook::WebhookConfig;
use super::{Config, Control, SourceConfig};
use crate::base::clock::WallClock;
use crate::base::drain::Drain;
use crate::base::names::Named;
use crate::delta::Scope;
use crate::delta::authority::authority_client::AuthorityClient;
use crate::delta::authority::{JoinNodeRequest, SignWorkloadRequest, WatchBundleRequest};
use crate::delta::client::{Rejection, Update};
use crate::delta::envelope::delta_client::DeltaClient as WireClient;
use crate::delta::envelope::{DeltaRequest, Node};
use crate::delta::grpc::{ClientConfig, DeltaClient, UpdateStream};
use crate::delta::transport::{Dial, control_identity, tls_dial};
use crate::identity::source::Identity;
use crate::identity::spiffe::TrustDomain;
use crate::model::ResourceKey;

struct Mesh {
    _root: tempfile::TempDir,
    folder: std::path::PathBuf,
    state: std::path::PathBuf,
    address: SocketAddr,
    api: SocketAddr,
    config: Config,
    sessions: Arc<Sessions>,
    drain: Option<Drain>,
    tasks: JoinSet<()>,
}

fn domain() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

fn service(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: shop }}\nspec: {{ selector: {{ app: {name} }}, ports: [{{ port: 80 }}] }}\n---\n"
    )
}

fn workload(name: &str, account: &str) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{ name: {name}, namespace: shop, labels: {{ app: {account} }} }}\nspec: {{ addresses: [10.99.0.{}], serviceAccount: {account} }}\n---\n",
        name.len()
    )
}

impl Control {
    /// Where streams and metrics are served.
    pub(crate) fn addresses(&self) -> [SocketAddr; 2] {
        [&self.streams[0], &self.scrape].map(|listener| listener.local_addr().unwrap())
    }
}

impl Mesh {
    async fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        let (folder, state) = (root.path().join("documents"), root.path().join("state"));
        std::fs::create_dir(&folder).unwrap();
        let documents = [service("web"), service("api"), workload("web-1", "web"), workload("client", "client")].concat();
        std::fs::write(folder.join("shop.yaml"), documents).unwrap();
        let local = "127.0.0.1:0".parse().unwrap();
        let config = Config {
            source: SourceConfig::Folders(vec![folder.clone()]),
            state: state.clone(),
            trust_domain: domain(),
            listen: vec![local],
            api: local,
            metrics: local,
            svid_lifetime: Duration::from_secs(3600),
            workload_api: None,
            webhook: WebhookConfig::example(),
        };
        let control = Control::build(config.clone(), WallClock::system()).await.unwrap();
        let address = control.streams[0].local_addr().unwrap();
        let api = control.api.local_addr().unwrap();
        let sessions = Arc::clone(&control.sessions);
        let (drain, guard) = Drain::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(control.serve(guard));
        Self { _root: root, folder, state, address, api, config, sessions, drain: Some(drain), tasks }
    }

    fn write(&self, file: &str, text: &str) {
        let fresh = self.folder.join(format!(".{file}"));
        std::fs::write(&fresh, text).unwrap();
        std::fs::rename(fresh, self.folder.join(file)).unwrap();
    }

    /// An identity signed by the mesh's own authority, as of `clock`.
    fn identity(&self, path: &str, clock: &WallClock) -> Identity {
        self.identity_for(path, clock, Duration::from_secs(3600))
    }

    fn identity_for(&self, path: &str, clock: &WallClock, lifetime: Duration) -> Identity {
        let ca = Authority::open(&self.state.join("ca"), domain(), clock.clone()).unwrap();
        let (signed, key) = ca.issue(&format!("spiffe://cluster.local{path}").parse().unwrap(), lifetime).unwrap();
        let identity = Identity::new(domain(), WallClock::system());
        identity.publish(signed.chain, key, ca.bundles().unwrap()).unwrap();
        identity
    }

    fn dial(&self, identity: Identity) -> Dial {
        tls_dial(identity, control_identity(&domain()).unwrap())
    }

    fn sidecar(&mut self, control: SocketAddr) -> (DeltaClient, UpdateStream) {
        let identity = self.identity("/ns/shop/sa/client", &WallClock::system());
        let config = ClientConfig {
            control: vec![control.to_string()],
            node: Named::new("shop", "client"),
            held: Default::default(),
            dial: self.dial(identity),
            seed: 1,
        };
        DeltaClient::start(config, &mut self.tasks)
    }

    async fn channel(&self, identity: Identity) -> io::Result<tonic::transport::Channel> {
        let io = self.dial(identity)(self.address.to_string()).await?;
        let mut io = Some(hyper_util::rt::TokioIo::new(io));
        let connector =
            tower::service_fn(move |_| std::future::ready(io.take().ok_or(io::Error::from(io::ErrorKind::NotConnected))));
        let endpoint = tonic::transport::Endpoint::from_static("http://control");
        endpoint.connect_with_connector(connector).await.map_err(io::Error::other)
    }

    /// Opens a stream for pod `name` and returns why it was refused.
    async fn refusal(&self, identity: Identity, name: &str) -> Status {
        let node = Some(Node { namespace: "shop".into(), name: name.into(), version: "0".into() });
        let first = DeltaRequest { node, ..DeltaRequest::default() };
        let opened = async {
            let channel = self.channel(identity).await.map_err(|error| Status::unknown(format!("no connection: {error}")))?;
            let mut responses = WireClient::new(channel).stream(tokio_stream::once(first)).await?.into_inner();
            responses.message().await
        };
        timeout(PATIENCE, opened).await.unwrap().expect_err("the stream was refused")
    }

    async fn stop(mut self) {
        assert!(self.drain.take().unwrap().drain(PATIENCE).await, "the control plane did not stop");
    }
}

async fn next(updates: &mut UpdateStream) -> Update {
    timeout(PATIENCE, updates.recv()).await.expect("an update came in time").expect("the stream goes on")
}

fn keys(update: &Update) -> Vec<String> {
    update.resources.iter().map(|resource| resource.key.to_string()).collect()
}

fn scope(text: &str) -> Scope {
    text.parse().unwrap()
}

/// Forwards to `to` until its connections are cut.
async fn wire(to: SocketAddr, tasks: &mut JoinSet<()>) -> (SocketAddr, tokio::sync::watch::Sender<u32>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (cut, cuts) = tokio::sync::watch::channel(0);
    tasks.spawn(async move {
        let mut open = JoinSet::new();
        while let Ok((mut near, _)) = listener.accept().await {
            let mut cuts = cuts.clone();
            cuts.mark_unchanged();
            open.spawn(async move {
                let mut far = TcpStream::connect(to).await.unwrap();
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                    _ = cuts.changed() => {}
                }
            });
        }
    });
    (address, cut)
}

#[tokio::test]
async fn a_stream_that_breaks_is_resumed_and_what_is_held_is_not_sent_again() {
    let mut mesh = Mesh::start().await;
    let (wire, cut) = wire(mesh.address, &mut mesh.tasks).await;
    let (client, mut updates) = mesh.sidecar(wire);
    client.subscribe(scope("workload/shop/client"));
    client.subscribe(scope("service/shop/web"));
    let update = next(&mut updates).await;
    // Nobody asked for `api`.
    assert_eq!(keys(&update), ["Service/shop/web", "Workload/shop/client", "Workload/shop/web-1"]);
    update.ack.accept(Vec::new());
    let mut connected = client.connected();
    assert!(*connected.borrow_and_update());

    cut.send_replace(1);
    let update = next(&mut updates).await;
    assert!(update.resources.is_empty() && update.removed.is_empty(), "{update:?}");
    assert_eq!(update.scopes.len(), 2);
    update.ack.accept(Vec::new());

    mesh.write("more.yaml", &workload("web-222", "web"));
    let update = next(&mut updates).await;
    assert_eq!(keys(&update), ["Workload/shop/web-222"]);
    assert_eq!(update.scopes.iter().map(|state| state.scope.clone()).collect::<Vec<_>>(), [scope("service/shop/web")]);
    // The stream breaks while the update is being published: it counts all the same.
    cut.send_replace(2);
    update.ack.accept(Vec::new());
    let update = next(&mut updates).await;
    assert!(update.resources.is_empty(), "{update:?}");
    update.ack.accept(Vec::new());

    client.unsubscribe(&scope("service/shop/web"));
    let update = next(&mut updates).await;
    assert_eq!(update.removed.len(), 3, "{update:?}");
    update.ack.accept(Vec::new());
    drop(updates);
    mesh.stop().await;
}

#[tokio::test]
async fn a_refusal_is_shown_with_its_reason_until_the_resource_changes() {
    let mut mesh = Mesh::start().await;
    let (client, mut updates) = mesh.sidecar(mesh.address);
    client.subscribe(scope("service/shop/web"));
    let key: ResourceKey = "Service/shop/web".parse().unwrap();
    let update = next(&mut updates).await;
    update.ack.accept(vec![Rejection { key: key.clone(), reason: "this sidecar cannot".to_owned() }]);
    let mut changes = mesh.sessions.changes();
    let refused = async {
        loop {
            let sidecars = mesh.sessions.sidecars();
            if let Some(refused) = sidecars.first().and_then(|sidecar| sidecar.refused.first()) {
                return (sidecars[0].clone(), refused.clone());
            }
            changes.changed().await.unwrap();
        }
    };
    let (sidecar, refused) = timeout(PATIENCE, refused).await.unwrap();
    assert_eq!((refused.resource.as_str(), refused.reason.as_str()), ("Service/shop/web", "this sidecar cannot"));
    assert_eq!(sidecar.identity, "spiffe://cluster.local/ns/shop/sa/client");
    // Another service changes: the refused version does not come again.
    mesh.write("more.yaml", &workload("web-222", "web"));
    let update = next(&mut updates).await;
    assert_eq!(keys(&update), ["Workload/shop/web-222"]);
    update.ack.accept(Vec::new());
    mesh.write(
        "shop.yaml",
        &[service("web").replace("80", "81"), workload("web-1", "web"), workload("client", "client")].concat(),
    );
    let update = next(&mut updates).await;
    assert_eq!(keys(&update), ["Service/shop/web"]);
    update.ack.accept(Vec::new());
    let settled = async {
        while !mesh.sessions.sidecars().iter().all(|sidecar| sidecar.refused.is_empty() && !sidecar.waits) {
            changes.changed().await.unwrap();
        }
    };
    timeout(PATIENCE, settled).await.unwrap();
    drop(updates);
    mesh.stop().await;
}

#[tokio::test]
async fn a_sidecar_asking_for_another_pods_identity_is_refused_by_name() {
    let mesh = Mesh::start().await;
    let status = mesh.refusal(mesh.identity("/ns/shop/sa/client", &WallClock::system()), "web-1").await;
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    assert!(status.message().contains("another pod's identity"), "{status:?}");
    assert!(mesh.sessions.sidecars().is_empty());
    mesh.stop().await;
}

#[tokio::test]
async fn a_peer_without_a_good_certificate_gets_no_stream() {
    let mesh = Mesh::start().await;
    // None.
    let nobody = Identity::new(domain(), WallClock::system());
    let ca = Authority::open(&mesh.state.join("ca"), domain(), WallClock::system()).unwrap();
    nobody.trust(ca.bundles().unwrap());
    let status = mesh.refusal(nobody, "client").await;
    assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
    // An expired one.
    let long_ago = WallClock::fixed(WallClock::system().since_epoch() - Duration::from_secs(7_200));
    let status = mesh.refusal(mesh.identity("/ns/shop/sa/client", &long_ago), "client").await;
    assert_ne!(status.code(), Code::Ok, "{status:?}");
    // One of another trust domain, and one of another authority of the same name.
    for name in ["other.example", "cluster.local"] {
        let elsewhere = tempfile::tempdir().unwrap();
        let foreign: TrustDomain = name.parse().unwrap();
        let other = Authority::open(elsewhere.path(), foreign.clone(), WallClock::system()).unwrap();
        let id = foreign.service_account(&Named::new("shop", "client")).unwrap();
        let (signed, key) = other.issue(&id, Duration::from_secs(3600)).unwrap();
        let identity = Identity::new(foreign, WallClock::system());
        identity.publish(signed.chain, key, ca.bundles().unwrap()).unwrap();
        let status = mesh.refusal(identity, "client").await;
        assert_ne!(status.code(), Code::Ok, "{status:?}");
    }
    assert!(mesh.sessions.sidecars().is_empty());
    mesh.stop().await;
}

#[tokio::test]
async fn a_stream_ends_with_the_certificate_that_opened_it() {
    let mesh = Mesh::start().await;
    let identity = mesh.identity_for("/ns/shop/sa/client", &WallClock::system(), Duration::from_secs(2));
    let node = Some(Node { namespace: "shop".into(), name: "client".into(), version: "0".into() });
    let channel = mesh.channel(identity).await.unwrap();
    let first = DeltaRequest { node, ..DeltaRequest::default() };
    // The sidecar goes on listening: its own end stays open.
    let requests = tokio_stream::StreamExt::chain(tokio_stream::once(first), tokio_stream::pending());
    let mut responses = WireClient::new(channel).stream(requests).await.unwrap().into_inner();
    let status = timeout(PATIENCE, responses.message()).await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(status.message().contains("expired"), "{status:?}");
    mesh.stop().await;
}

#[tokio::test]
async fn a_document_of_almost_a_megabyte_arrives_whole() {
    let mut mesh = Mesh::start().await;
    let (client, mut updates) = mesh.sidecar(mesh.address);
    client.subscribe(scope("service/shop/large"));
    let update = next(&mut updates).await;
    assert!(update.scopes[0].absent);
    update.ack.accept(Vec::new());
    let note = "x".repeat(1_000_000);
    mesh.write(
        "large.yaml",
        &service("large").replace("namespace: shop", &format!("namespace: shop, annotations: {{ note: {note} }}")),
    );
    let update = next(&mut updates).await;
    let body = update.resources[0].body.as_ref().unwrap();
    assert_eq!(body.metadata().annotations["note"].len(), 1_000_000);
    update.ack.accept(Vec::new());
    drop(updates);
    mesh.stop().await;
}

#[tokio::test]
async fn a_folder_that_disappears_takes_nothing_with_it() {
    let mut mesh = Mesh::start().await;
    let (client, mut updates) = mesh.sidecar(mesh.address);
    client.subscribe(scope("service/shop/web"));
    next(&mut updates).await.ack.accept(Vec::new());
    std::fs::remove_dir_all(&mesh.folder).unwrap();
    // A pod's record is a change of another folder; when it arrives, the loss of the first was seen.
    let record = r#"{"namespace":"shop","name":"web-222","serviceAccount":"web","labels":{"app":"web"},"addresses":["10.64.0.9"],"netns":"/run/netns/x","netnsCookie":1,"cgroup":"/sys/fs/cgroup/x","meshed":true,"supervisor":1,"startedMs":0}"#;
    write_whole(&mesh.state.join("pods"), "shop.web-22.json", record);
    let update = next(&mut updates).await;
    assert_eq!(keys(&update), ["Workload/shop/web-222"]);
    assert!(update.removed.is_empty());
    update.ack.accept(Vec::new());
    drop(updates);
    mesh.stop().await;
}

fn write_whole(folder: &Path, file: &str, text: &str) {
    let fresh = folder.join(format!(".{file}"));
    std::fs::write(&fresh, text).unwrap();
    std::fs::rename(fresh, folder.join(file)).unwrap();
}

#[tokio::test]
async fn a_node_joins_by_its_token_and_gets_certificates_for_known_workloads_alone() {
    let mesh = Mesh::start().await;
    let ca = Authority::open(&mesh.state.join("ca"), domain(), WallClock::system()).unwrap();
    let nobody = Identity::new(domain(), WallClock::system());
    nobody.trust(ca.bundles().unwrap());
    let key = rcgen::KeyPair::generate().unwrap();
    let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
    let join = |token: &str| JoinNodeRequest { token: token.to_owned(), node: "vm".to_owned(), csr: csr.clone() };
    let sign = |id: &str| SignWorkloadRequest { spiffe_id: id.to_owned(), csr: csr.clone(), pod: None };

    let mut client = AuthorityClient::new(mesh.channel(nobody.clone()).await.unwrap());
    let status = client.join_node(join("guess")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    let status = client.sign_workload(sign("spiffe://cluster.local/ns/shop/sa/web")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!(client.watch_bundle(WatchBundleRequest {}).await.unwrap_err().code(), Code::Unauthenticated);

    let token = std::fs::read_to_string(mesh.state.join("join-token")).unwrap();
    let joined = client.join_node(join(&token)).await.unwrap().into_inner();
    let chain = joined.chain.into_iter().map(Into::into).collect();
    let node = Identity::new(domain(), WallClock::system());
    node.publish(chain, key.serialize_der().into(), ca.bundles().unwrap()).unwrap();
    assert_eq!(node.own().unwrap().id.to_string(), "spiffe://cluster.local/node/vm");

    let mut client = AuthorityClient::new(mesh.channel(node).await.unwrap());
    client.sign_workload(sign("spiffe://cluster.local/ns/shop/sa/web")).await.unwrap();
    for (id, code) in [
        ("spiffe://cluster.local/ns/outrigger-system/sa/control", Code::PermissionDenied),
        ("spiffe://other.example/ns/shop/sa/web", Code::PermissionDenied),
        ("spiffe://cluster.local/node/vm", Code::PermissionDenied),
        ("spiffe://cluster.local/ns/shop/sa/nobody", Code::NotFound),
        ("web", Code::InvalidArgument),
    ] {
        assert_eq!(client.sign_workload(sign(id)).await.unwrap_err().code(), code, "{id}");
    }
    // A workload is no node.
    let mut workload = AuthorityClient::new(mesh.channel(mesh.identity("/ns/shop/sa/web", &WallClock::system())).await.unwrap());
    let status = workload.sign_workload(sign("spiffe://cluster.local/ns/shop/sa/client")).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    let bundle = workload.watch_bundle(WatchBundleRequest {}).await.unwrap().into_inner().message().await.unwrap().unwrap();
    assert_eq!(bundle.authorities, [ca.root().to_vec()]);
    mesh.stop().await;
}

/// What the API answers to one request: the status and the body.
async fn ask(api: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, String) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut text = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in
        [("host", "localhost")].iter().filter(|(name, _)| headers.iter().all(|(own, _)| own != name)).chain(headers)
    {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    let exchange = async {
        let mut stream = TcpStream::connect(api).await.unwrap();
        stream.write_all(format!("{text}\r\n{body}").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let answer = timeout(PATIENCE, exchange).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

#[tokio::test]
async fn the_api_answers_whoever_shows_its_token_alone() {
    let mesh = Mesh::start().await;
    let path = mesh.state.join("api-token");
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions()) & 0o777, 0o600);
    let token = format!("Bearer {}", std::fs::read_to_string(&path).unwrap().trim());
    let (known, yaml) = (("authorization", token.as_str()), ("content-type", "application/yaml"));
    let asked = ["/api/resources", "/api/proxies", "/api/status", "/api/nothing", "/nothing"].map(|path| ("GET", path));
    let changed = ["/api/apply", "/api/delete", "/", "/api/graph"].map(|path| ("POST", path));
    let wrong = token.replace(|digit: char| digit.is_ascii_digit(), "a");
    let wrongs = ["", "Bearer", "Bearer ", &token[7..], &token.replace("Bearer", "Basic"), &wrong, &format!("{token}0")];
    for (method, path) in asked.into_iter().chain(changed) {
        let (status, body) = ask(mesh.api, method, path, &[yaml], &service("more")).await;
        assert_eq!(status, 401, "{method} {path}: {body}");
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert!(body["error"].is_string() && body["remedy"].as_str().unwrap().contains("api-token"), "{body}");
        for wrong in wrongs {
            assert_eq!(
                ask(mesh.api, method, path, &[yaml, ("authorization", wrong)], "").await.0,
                401,
                "{method} {path} {wrong}"
            );
        }
    }
    for (method, path, status) in asked.map(|(method, path)| (method, path, if path.ends_with("nothing") { 404 } else { 200 })) {
        assert_eq!(ask(mesh.api, method, path, &[known], "").await.0, status, "{method} {path}");
    }
    let resources = ask(mesh.api, "GET", "/api/resources?name=more", &[known], "").await.1;
    assert!(resources.contains(r#""items":[]"#), "{resources}");
    let (status, body) = ask(mesh.api, "POST", "/api/apply", &[known, yaml], &service("more")).await;
    assert_eq!(status, 200, "{body}");
    // The token is no leave for a page: neither of another name of this machine, nor of another origin.
    let page = ("origin", "http://evil.example");
    assert_eq!(ask(mesh.api, "POST", "/api/apply", &[known, yaml, page], &service("more")).await.0, 403);
    assert_eq!(ask(mesh.api, "POST", "/api/apply", &[known], &service("more")).await.0, 415);
    assert_eq!(ask(mesh.api, "GET", "/api/status", &[known, ("host", "evil.example")], "").await.0, 403);
    mesh.stop().await;
}

#[tokio::test]
async fn anybody_on_this_machine_may_look_at_the_dashboard_but_no_page_of_elsewhere() {
    let mesh = Mesh::start().await;
    for path in ["/", "/api/graph", "/ready"] {
        assert_eq!(ask(mesh.api, "GET", path, &[], "").await.0, 200, "{path}");
        assert_eq!(ask(mesh.api, "GET", path, &[("host", "evil.example:14080")], "").await.0, 403, "{path}");
    }
    mesh.stop().await;
}

#[tokio::test]
async fn a_token_is_good_for_one_life_of_the_control_plane() {
    let mesh = Mesh::start().await;
    let read = |mesh: &Mesh| std::fs::read_to_string(mesh.state.join("api-token")).unwrap();
    let old = read(&mesh);
    let config = mesh.config.clone();
    let again = Control::build(config, WallClock::system()).await.unwrap();
    assert!(again.api_token.fits(&read(&mesh)) && !again.api_token.fits(&old));
    mesh.stop().await;
}

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(20);
