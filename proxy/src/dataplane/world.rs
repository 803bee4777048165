//! A small mesh in memory: documents are compiled as ever, sidecars dial each other through pipes, applications are
//! scripts.
#![expect(clippy::indexing_slicing, clippy::unwrap_used, reason = "tests and fuzz targets use it")]
#![cfg_attr(not(test), expect(dead_code, reason = "fuzz targets use a part of what tests use"))]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::base::drain::{Drain, DrainGuard};
use crate::base::names::Named;
use crate::base::net::BoxedIo;
use crate::dataplane::config::Kept;
use crate::dataplane::connection::{self, Accepted};
use crate::dataplane::pool::connect::{Dial, Dialling};
use crate::dataplane::tls::Alpn;
use crate::dataplane::{Demand, Proxy};
use crate::identity::source::Identity;
use crate::identity::testing::{Authority, Leaf, clock};
use crate::model::{Resource, Resources};
use crate::snapshot::compile::{Own, admit, compile};
use crate::snapshot::publish::Published;
use crate::telemetry::Telemetry;
use crate::telemetry::metrics::Metrics;

/// What happens with a connection that reaches an application: the stream, and the client that it is shown.
type App = Arc<dyn Fn(DuplexStream, Option<SocketAddr>) + Send + Sync>;

/// A mesh.
pub(super) struct World {
    authority: Authority,
    resources: Resources,
    net: Arc<Net>,
    drain: Drain,
    guard: DrainGuard,
}

/// Who listens where.
#[derive(Default)]
pub(super) struct Net {
    sidecars: Mutex<BTreeMap<IpAddr, (Arc<Proxy>, DrainGuard)>>,
    apps: Mutex<BTreeMap<SocketAddr, App>>,
    /// What was dialled between pods.
    dialled: Mutex<Vec<SocketAddr>>,
    /// How long it takes to connect to a pod.
    slow: Mutex<BTreeMap<SocketAddr, Duration>>,
    /// Whose sidecars have no file left.
    exhausted: Mutex<BTreeSet<IpAddr>>,
    ports: AtomicU16,
    /// How often pipes between pods were asked for bytes: by who dialled, and by who was dialled.
    asked: [Arc<AtomicU64>; 2],
}

/// One end of a pipe between pods.
struct Asked {
    io: DuplexStream,
    asked: Arc<AtomicU64>,
}

impl AsyncRead for Asked {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Asked {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// The network as one pod's sidecar sees it.
struct PodDial {
    own: IpAddr,
    net: Arc<Net>,
}

impl std::fmt::Debug for PodDial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PodDial({})", self.own)
    }
}

impl Dial for PodDial {
    fn dial(&self, to: SocketAddr, client: Option<SocketAddr>) -> Dialling {
        let (own, net) = (self.own, Arc::clone(&self.net));
        if to.ip() != own {
            net.dialled.lock().push(to);
        }
        let slow = net.slow.lock().get(&to).copied().filter(|_| to.ip() != own);
        let exhausted = net.exhausted.lock().contains(&own);
        Box::pin(async move {
            if exhausted {
                return Err(io::Error::from_raw_os_error(libc::EMFILE));
            }
            if let Some(slow) = slow {
                tokio::time::sleep(slow).await;
            }
            let (near, far) = tokio::io::duplex(64 * 1024);
            let sidecar = net.sidecars.lock().get(&to.ip()).filter(|_| to.ip() != own).cloned();
            if let Some((proxy, drain)) = sidecar {
                let port = 40_000 + net.ports.fetch_add(1, Ordering::Relaxed) % 20_000;
                let peer = SocketAddr::new(own, port);
                let [near_asked, far_asked] = net.asked.each_ref().map(Arc::clone);
                let far = Box::new(Asked { io: far, asked: far_asked });
                tokio::spawn(connection::inbound(proxy, Accepted { io: far, peer, original: to, drain }));
                return Ok(Box::new(Asked { io: near, asked: near_asked }) as BoxedIo);
            }
            let app = net.apps.lock().get(&to).cloned().ok_or(io::ErrorKind::ConnectionRefused)?;
            app(far, client);
            Ok(Box::new(near) as BoxedIo)
        })
    }
}

fn read(document: &Value) -> Arc<Resource> {
    let kind = crate::model::Kind::ALL.into_iter().find(|kind| kind.as_str() == document["kind"]).unwrap();
    Arc::new(Resource::from_json(kind, document.to_string().as_bytes()).unwrap())
}

/// A document in the namespace `shop`.
pub(super) fn document(kind: &str, name: &str, spec: Value) -> Value {
    let version = match kind {
        "Service" => "v1",
        "HTTPRoute" | "GRPCRoute" | "TLSRoute" | "TCPRoute" | "ReferenceGrant" => "gateway.networking.k8s.io/v1",
        _ => "outrigger.dev/v1alpha1",
    };
    json!({ "apiVersion": version, "kind": kind, "metadata": { "namespace": "shop", "name": name }, "spec": spec })
}

/// A pod of the service `account`, at `10.64.0.LAST`.
pub(super) fn pod(account: &str, name: &str, last: u8) -> Value {
    let mut document = document(
        "Workload",
        name,
        json!({ "addresses": [format!("10.64.0.{last}")], "serviceAccount": account, "ports": [{ "name": "http", "port": 8080 }] }),
    );
    document["metadata"]["labels"] = json!({ "app": account });
    document
}

/// A service that selects the pods of `account`, at `10.65.0.LAST`, port 80 for their port 8080.
pub(super) fn service(name: &str, account: &str, last: u8) -> Value {
    document(
        "Service",
        name,
        json!({
            "selector": { "app": account },
            "clusterIP": format!("10.65.0.{last}"),
            "ports": [{ "name": "any", "port": 80, "targetPort": 8080 }],
        }),
    )
}

/// The address of a service of [`service`].
pub(super) fn vip(last: u8) -> SocketAddr {
    SocketAddr::from(([10, 65, 0, last], 80))
}

/// The address of an application of [`pod`].
pub(super) fn app_at(last: u8) -> SocketAddr {
    SocketAddr::from(([10, 64, 0, last], 8080))
}

impl World {
    /// A mesh of these documents.
    pub(super) fn new(documents: &[Value]) -> Self {
        let (drain, guard) = Drain::new();
        let mut world = Self { authority: Authority::new(), resources: Resources::default(), net: Arc::default(), drain, guard };
        for document in documents {
            world.add(document);
        }
        world
    }

    /// Every sidecar stops; `false` if connections were left after `at_most`.
    pub(super) async fn drain(self, at_most: Duration) -> bool {
        let Self { net, drain, guard, .. } = self;
        drop(guard);
        let sidecars = std::mem::take(&mut *net.sidecars.lock());
        drop(sidecars);
        drain.drain(at_most).await
    }

    /// Takes a document that nobody would be sent now, as a sidecar may hold it from before.
    pub(super) fn add_unchecked(&mut self, document: &Value) {
        let resource = read(document);
        self.resources.by_key.insert(resource.key(), resource);
    }

    fn add(&mut self, document: &Value) {
        let resource = read(document);
        let problems = admit(&mut self.resources, resource.key(), Ok(resource));
        assert!(!problems.refused(), "{:?}", problems.into_vec());
    }

    /// Starts the sidecar of a pod.
    pub(super) fn sidecar(&self, account: &str, name: &str, last: u8) -> Arc<Proxy> {
        let proxy = self.unconfigured(account, last);
        self.configure(&proxy, name);
        proxy
    }

    /// Starts a sidecar that has an identity and no configuration.
    pub(super) fn unconfigured(&self, account: &str, last: u8) -> Arc<Proxy> {
        let ip = IpAddr::from([10, 64, 0, last]);
        let identity = Identity::new("cluster.local".parse().unwrap(), clock());
        self.authority.issue_to(&identity, &Leaf::workload(account), &[&self.authority]);
        let telemetry = Telemetry { metrics: Arc::new(Metrics::new().unwrap()), access_log: None, spans: None };
        let dial = Arc::new(PodDial { own: ip, net: Arc::clone(&self.net) });
        let demand = Demand::Test(Mutex::default());
        let proxy = Arc::new(Proxy::new(identity, Published::new(), telemetry, dial, clock(), 7, demand).unwrap());
        self.net.sidecars.lock().insert(ip, (Arc::clone(&proxy), self.guard.clone()));
        proxy
    }

    /// Gives `account`, the sidecar of a pod, a new certificate. `of_theirs`: of another authority, which from now on is all
    /// that it believes.
    pub(super) fn renew(&self, proxy: &Proxy, account: &str, of_theirs: Option<&Authority>) {
        let authority = of_theirs.unwrap_or(&self.authority);
        authority.issue_to(&proxy.identity, &Leaf::workload(account), &[authority]);
    }

    /// Gives a sidecar the world's documents.
    pub(super) fn configure(&self, proxy: &Proxy, name: &str) {
        let own = Own { workload: Named::new("shop", name), trust_domain: "cluster.local".parse().unwrap() };
        let (snapshot, _problems) = compile(&self.resources, &own, &proxy.published.current());
        proxy.publish(snapshot);
    }

    /// The world's documents, as a sidecar holds them.
    pub(super) fn kept(&self) -> Kept {
        let versions = self.resources.by_key.keys().map(|key| (key.clone(), Arc::from("1"))).collect();
        Kept { resources: self.resources.clone(), versions, ..Kept::default() }
    }

    /// Takes another document, and gives all of them to a sidecar.
    pub(super) fn change(&mut self, document: &Value, proxy: &Proxy, name: &str) {
        self.add(document);
        self.configure(proxy, name);
    }

    /// An HTTP application at `at`.
    pub(super) fn app<F>(&self, at: SocketAddr, answer: F)
    where
        F: Fn(Request<Bytes>) -> Response<Full<Bytes>> + Clone + Send + Sync + 'static,
    {
        self.slow_app(at, move |request| std::future::ready(answer(request)));
    }

    /// An HTTP application that takes its time.
    pub(super) fn slow_app<F, A>(&self, at: SocketAddr, answer: F)
    where
        F: Fn(Request<Bytes>) -> A + Clone + Send + Sync + 'static,
        A: Future<Output = Response<Full<Bytes>>> + Send + 'static,
    {
        self.raw_app(at, move |stream, client| {
            let answer = answer.clone();
            let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                let answer = answer.clone();
                async move {
                    let (mut parts, body) = request.into_parts();
                    let body = body.collect().await.map_or_else(|_| Bytes::new(), http_body_util::Collected::to_bytes);
                    if let Some(client) = client {
                        parts.extensions.insert(client);
                    }
                    Ok::<_, std::convert::Infallible>(answer(Request::from_parts(parts, body)).await)
                }
            });
            tokio::spawn(async move {
                let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                drop(server.serve_connection_with_upgrades(TokioIo::new(stream), service).await);
            });
        });
    }

    /// An application that does what it likes with its connections.
    pub(super) fn raw_app(&self, at: SocketAddr, app: impl Fn(DuplexStream, Option<SocketAddr>) + Send + Sync + 'static) {
        self.net.apps.lock().insert(at, Arc::new(app));
    }

    /// Connecting to `at` takes that long.
    pub(super) fn slow(&self, at: SocketAddr, long: Duration) {
        self.net.slow.lock().insert(at, long);
    }

    /// Do these sidecars have no file left, from now on?
    pub(super) fn exhaust(&self, last: &[u8]) {
        *self.net.exhausted.lock() = last.iter().map(|last| IpAddr::from([10, 64, 0, *last])).collect();
    }

    /// What was dialled between pods so far.
    pub(super) fn dialled(&self) -> Vec<SocketAddr> {
        self.net.dialled.lock().clone()
    }

    /// How often connections between pods were asked for bytes so far: by who dialled, and by who was dialled.
    pub(super) fn asked(&self) -> [u64; 2] {
        self.net.asked.each_ref().map(|asked| asked.load(Ordering::Relaxed))
    }

    /// A connection that the application of `proxy` opens to `to`.
    pub(super) fn connect(&self, proxy: &Arc<Proxy>, to: SocketAddr) -> DuplexStream {
        let (near, far) = tokio::io::duplex(64 * 1024);
        self.serve(proxy, to, Box::new(far));
        near
    }

    /// Has `proxy` serve a connection that its application opened to `to`.
    pub(super) fn serve(&self, proxy: &Arc<Proxy>, to: SocketAddr, io: BoxedIo) {
        let peer = SocketAddr::from(([10, 64, 0, 2], 50_000));
        let accepted = Accepted { io, peer, original: to, drain: self.guard.clone() };
        tokio::spawn(connection::outbound(Arc::clone(proxy), accepted));
    }

    /// A link to a pod, opened by whoever has the identity of `account` and need not be a sidecar otherwise.
    pub(super) async fn link(&self, account: &str, peer: &str, proxy: &Arc<Proxy>, to: SocketAddr) -> TlsStream<DuplexStream> {
        self.link_of(Alpn::H2, account, peer, proxy, to).await
    }

    /// A link that carries one connection, opened likewise.
    pub(super) async fn opaque_link(
        &self,
        account: &str,
        peer: &str,
        proxy: &Arc<Proxy>,
        to: SocketAddr,
    ) -> TlsStream<DuplexStream> {
        self.link_of(Alpn::Tcp, account, peer, proxy, to).await
    }

    async fn link_of(
        &self,
        alpn: Alpn,
        account: &str,
        peer: &str,
        proxy: &Arc<Proxy>,
        to: SocketAddr,
    ) -> TlsStream<DuplexStream> {
        let identity = Identity::new("cluster.local".parse().unwrap(), clock());
        self.authority.issue_to(&identity, &Leaf::workload(account), &[&self.authority]);
        let expected = format!("spiffe://cluster.local/ns/shop/sa/{peer}").parse().unwrap();
        let config = identity.client_config(&expected, &[alpn.as_bytes()]).unwrap();
        let name = ServerName::try_from("sidecar.mesh").unwrap();
        TlsConnector::from(config).connect(name, self.connect_inbound(proxy, to)).await.unwrap()
    }

    /// A connection from outside of the mesh to a pod.
    pub(super) fn connect_inbound(&self, proxy: &Arc<Proxy>, to: SocketAddr) -> DuplexStream {
        let (near, far) = tokio::io::duplex(64 * 1024);
        self.serve_inbound(proxy, to, Box::new(far));
        near
    }

    /// Has `proxy` serve a connection from outside of the mesh to its pod.
    pub(super) fn serve_inbound(&self, proxy: &Arc<Proxy>, to: SocketAddr, io: BoxedIo) {
        let peer = SocketAddr::from(([192, 0, 2, 9], 51_000));
        let accepted = Accepted { io, peer, original: to, drain: self.guard.clone() };
        tokio::spawn(connection::inbound(Arc::clone(proxy), accepted));
    }
}

/// What a caller got.
#[derive(Debug)]
pub(super) struct Heard {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) body: String,
    pub(super) trailers: Option<HeaderMap>,
}

impl Heard {
    /// The word of a refusal.
    pub(super) fn reason(&self) -> &str {
        self.headers.get("outrigger-reason").map_or("", |word| word.to_str().unwrap())
    }
}

/// Asserts that some line of a sidecar's metrics holds all of this.
#[cfg(test)]
#[track_caller]
pub(super) fn told(proxy: &Proxy, wanted: &[&str]) {
    let metrics = proxy.telemetry.metrics.render();
    let found = metrics.lines().any(|line| wanted.iter().all(|part| line.contains(part)));
    assert!(found, "{wanted:?}\n{metrics}");
}

/// Both ends of a connection that shows how it ended: the client's, and the one that is served.
pub(super) async fn over_tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (client, served) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (client.unwrap(), served.unwrap().0)
}

/// Sends one request over HTTP/1.1.
pub(super) async fn ask(stream: DuplexStream, request: Request<Full<Bytes>>) -> Heard {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    heard(sender.send_request(request).await.unwrap()).await
}

/// Sends one request over HTTP/2 with prior knowledge.
pub(super) async fn ask_h2(stream: DuplexStream, request: Request<Full<Bytes>>) -> Heard {
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    heard(sender.send_request(request).await.unwrap()).await
}

async fn heard(response: Response<Incoming>) -> Heard {
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap();
    let trailers = body.trailers().cloned();
    let text = String::from_utf8(body.to_bytes().to_vec()).unwrap();
    Heard { status: parts.status.as_u16(), headers: parts.headers, body: text, trailers }
}

/// `GET path` of the host `web`.
pub(super) fn get(path: &str) -> Request<Full<Bytes>> {
    Request::get(path).header("host", "api.shop").body(Full::default()).unwrap()
}

/// An answer with a text.
pub(super) fn text(body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    Response::new(Full::new(body.into()))
}

/// An answer of a status alone.
pub(super) fn status(code: u16) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response
}
