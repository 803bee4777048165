//! Byte streams under the configuration stream: TCP and TLS 1.3, and who is at the other end.
//!
//! Which certificates count is decided in `identity`; here only the outcome is read: the peer's SPIFFE ID and when its
//! certificate ends.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::server::{Acceptor, ClientHello};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector};
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::base::drain::DrainGuard;
use crate::base::names::Named;
use crate::base::net::BoxedIo;
use crate::base::room::{Room, Work};
use crate::identity::source::Identity;
use crate::identity::spiffe::{SpiffeError, SpiffeId, TrustDomain};
use crate::identity::verify::identity_of;

/// Dials the control plane at an address (`HOST:PORT`) and returns an authenticated stream: in production TCP and mutual
/// TLS with the certificate of the moment ([`tls_dial`]), in tests a pipe.
pub(crate) type Dial = Arc<dyn Fn(String) -> Pin<Box<dyn Future<Output = io::Result<BoxedIo>> + Send>> + Send + Sync>;

/// Who is at the other end of a stream that the control plane accepted.
#[derive(Clone, Debug)]
pub(crate) struct PeerInfo {
    /// What its certificate proved; none without a certificate.
    pub(crate) identity: Option<SpiffeId>,
    /// When the certificate expires, as time since 1970-01-01T00:00:00Z.
    pub(crate) expires: Option<Duration>,
    pub(crate) address: Option<SocketAddr>,
    /// Who vouches for it.
    pub(crate) voucher: Voucher,
}

/// Whose authorities a peer's certificate was verified by.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Voucher {
    /// The mesh's own.
    Authority,
    /// Those that another Workload API names.
    WorkloadApi,
}

/// What peers are shown, and verified by.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    /// By the mesh's own authority: node agents always, and sidecars where nothing else is said of them.
    pub(crate) authority: Arc<ServerConfig>,
    /// By another Workload API: sidecars whose identities come from there.
    pub(crate) sidecars: Option<Arc<ServerConfig>>,
}

impl Terms {
    /// For a peer that says what it will speak. It chooses by that for whom it is taken and proves itself accordingly; what
    /// it may ask depends on who then vouches for it.
    fn of(&self, hello: &ClientHello<'_>) -> (Arc<ServerConfig>, Voucher) {
        let is_agent = hello.alpn().is_some_and(|mut names| names.any(|name| name == ALPN_AUTHORITY));
        match &self.sidecars {
            Some(sidecars) if !is_agent => (Arc::clone(sidecars), Voucher::WorkloadApi),
            _agent_or_all_alike => (Arc::clone(&self.authority), Voucher::Authority),
        }
    }
}

/// An accepted stream with its peer.
pub(crate) struct ServerIo {
    io: BoxedIo,
    peer: PeerInfo,
}

/// Dials by TCP and TLS as `identity` of the moment; the other end must be `control`.
pub(crate) fn tls_dial(identity: Identity, control: SpiffeId) -> Dial {
    Arc::new(move |address| {
        let config = identity.client_config(&control, &[ALPN]).map_err(io::Error::other);
        Box::pin(async move {
            let connector = TlsConnector::from(config?);
            let tcp = TcpStream::connect(&address).await?;
            tcp.set_nodelay(true)?;
            // The server is known by its SPIFFE ID, which the configuration's verifier checks; this name is not sent.
            let name = ServerName::try_from(SERVER_NAME).map_err(io::Error::other)?;
            let tls = connector.connect(name, tcp).await?;
            Ok(Box::new(tls) as BoxedIo)
        })
    })
}

/// The SPIFFE ID of the control plane of a trust domain.
///
/// # Errors
/// Never for a valid trust domain.
pub(crate) fn control_identity(domain: &TrustDomain) -> Result<SpiffeId, SpiffeError> {
    domain.service_account(&Named::new("outrigger-system", "control"))
}

/// Accepts from `listeners` until stop is said. Each task is `owner`'s; handshakes run beside each other, each with a
/// deadline, so that a peer that says nothing holds up nobody.
pub(crate) fn accept(
    listeners: Vec<TcpListener>,
    terms: &Terms,
    stop: &DrainGuard,
    owner: &mut JoinSet<()>,
) -> mpsc::Receiver<io::Result<ServerIo>> {
    let (accepted, stream) = mpsc::channel(64);
    for listener in listeners {
        owner.spawn(accept_from(listener, terms.clone(), stop.clone(), accepted.clone()));
    }
    stream
}

async fn accept_from(listener: TcpListener, terms: Terms, mut stop: DrainGuard, accepted: mpsc::Sender<io::Result<ServerIo>>) {
    let (mut handshakes, mut room) = (JoinSet::new(), Room::new(HANDSHAKES_MAX));
    loop {
        // Every arm is cancel-safe: an accepted socket is handed out in the same poll.
        tokio::select! {
            () = stop.stopped() => return,
            Some(_done) = handshakes.join_next() => {}
            connection = listener.accept() => match connection {
                Ok((tcp, address)) => {
                    let terms = terms.clone();
                    let accepted = accepted.clone();
                    // The one that is under way the longest makes room: who says nothing keeps nobody out.
                    room.make();
                    let task = handshakes.spawn(async move {
                        match timeout(HANDSHAKE_MAX, handshake(terms, tcp, address)).await {
                            // An error means that the server is stopping: the connection is dropped.
                            Ok(Ok(io)) => drop(accepted.send(Ok(io)).await),
                            Ok(Err(error)) => debug!(%error, %address, "handshake failed"),
                            Err(_elapsed) => debug!(%address, "handshake took too long"),
                        }
                    });
                    room.add(task, Work::new());
                }
                Err(error) => {
                    // Out of descriptors or memory: accepting again at once would spin.
                    warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
}

async fn handshake(terms: Terms, tcp: TcpStream, address: SocketAddr) -> io::Result<ServerIo> {
    tcp.set_nodelay(true)?;
    let begun = LazyConfigAcceptor::new(Acceptor::default(), tcp).await?;
    let (config, voucher) = terms.of(&begun.client_hello());
    let tls = begun.into_stream(config).await?;
    let leaf = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let (identity, expires) = match leaf {
        Some(leaf) => (Some(identity_of(leaf).map_err(io::Error::other)?), Some(expiry(leaf)?)),
        None => (None, None),
    };
    Ok(ServerIo::new(Box::new(tls), PeerInfo { identity, expires, address: Some(address), voucher }))
}

/// When a certificate ends, as time since 1970-01-01T00:00:00Z.
fn expiry(leaf: &CertificateDer<'_>) -> io::Result<Duration> {
    let (_rest, certificate) = x509_parser::parse_x509_certificate(leaf).map_err(io::Error::other)?;
    Ok(Duration::from_secs(u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or_default()))
}

impl ServerIo {
    /// A stream with a known peer.
    pub(crate) fn new(io: BoxedIo, peer: PeerInfo) -> Self {
        Self { io, peer }
    }
}

impl Connected for ServerIo {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.peer.clone()
    }
}

impl AsyncRead for ServerIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for ServerIo {
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

/// What is spoken inside TLS.
pub(crate) const ALPN: &[u8] = b"h2";

/// What a node agent says that it will speak: the same, with the authority.
pub(crate) const ALPN_AUTHORITY: &[u8] = b"outrigger-authority";

/// What a client's handshake names as its server.
const SERVER_NAME: &str = "control.outrigger-system";

/// The longest that a peer may take for its handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);

/// Handshakes under way per listener.
const HANDSHAKES_MAX: usize = 256;
