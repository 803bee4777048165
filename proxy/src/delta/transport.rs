//! Byte streams under the configuration stream: TCP and TLS 1.3, and who is at the other end.
//!
//! Which certificates count is decided by the rustls configurations that the caller brings; here only their outcome is
//! read: the SPIFFE ID in the leaf (X509-SVID standard, section 2: exactly one URI SAN) and when it expires.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::base::drain::DrainGuard;
use crate::base::net::BoxedIo;
use crate::identity::spiffe::SpiffeId;

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
}

/// An accepted stream with its peer.
pub(crate) struct ServerIo {
    io: BoxedIo,
    peer: PeerInfo,
}

/// Dials by TCP and TLS; `config` is asked for each connection, so that a rotated certificate is used at once.
pub(crate) fn tls_dial(config: impl Fn() -> io::Result<Arc<rustls::ClientConfig>> + Send + Sync + 'static) -> Dial {
    Arc::new(move |address| {
        let config = config();
        Box::pin(async move {
            let connector = TlsConnector::from(config?);
            let tcp = TcpStream::connect(&address).await?;
            tcp.set_nodelay(true)?;
            // The server is known by its SPIFFE ID, which the configuration's verifier checks; SNI carries no name of it.
            let name = ServerName::try_from(SERVER_NAME).map_err(io::Error::other)?;
            let tls = connector.connect(name, tcp).await?;
            Ok(Box::new(tls) as BoxedIo)
        })
    })
}

/// Accepts from `listeners` until stop is said. Each task is `owner`'s; handshakes run beside each other, each with a
/// deadline, so that a peer that says nothing holds up nobody.
pub(crate) fn accept(
    listeners: Vec<TcpListener>,
    config: impl Fn() -> Arc<rustls::ServerConfig> + Clone + Send + 'static,
    stop: &DrainGuard,
    owner: &mut JoinSet<()>,
) -> mpsc::Receiver<io::Result<ServerIo>> {
    let (accepted, stream) = mpsc::channel(64);
    for listener in listeners {
        owner.spawn(accept_from(listener, config.clone(), stop.clone(), accepted.clone()));
    }
    stream
}

async fn accept_from(
    listener: TcpListener,
    config: impl Fn() -> Arc<rustls::ServerConfig>,
    mut stop: DrainGuard,
    accepted: mpsc::Sender<io::Result<ServerIo>>,
) {
    let mut handshakes = JoinSet::new();
    loop {
        // Every arm is cancel-safe: an accepted socket is handed out in the same poll.
        tokio::select! {
            () = stop.stopped() => return,
            Some(_done) = handshakes.join_next() => {}
            connection = listener.accept(), if handshakes.len() < HANDSHAKES_MAX => match connection {
                Ok((tcp, address)) => {
                    let acceptor = TlsAcceptor::from(config());
                    let accepted = accepted.clone();
                    handshakes.spawn(async move {
                        match timeout(HANDSHAKE_MAX, handshake(acceptor, tcp, address)).await {
                            // An error means that the server is stopping: the connection is dropped.
                            Ok(Ok(io)) => drop(accepted.send(Ok(io)).await),
                            Ok(Err(error)) => debug!(%error, %address, "handshake failed"),
                            Err(_elapsed) => debug!(%address, "handshake took too long"),
                        }
                    });
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

async fn handshake(acceptor: TlsAcceptor, tcp: TcpStream, address: SocketAddr) -> io::Result<ServerIo> {
    tcp.set_nodelay(true)?;
    let tls = acceptor.accept(tcp).await?;
    let leaf = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let (identity, expires) = match leaf {
        Some(leaf) => {
            let (identity, expires) = read_leaf(leaf)?;
            (Some(identity), Some(expires))
        }
        None => (None, None),
    };
    Ok(ServerIo::new(Box::new(tls), PeerInfo { identity, expires, address: Some(address) }))
}

/// The identity of a leaf that was already verified, and when it expires.
pub(crate) fn read_leaf(leaf: &CertificateDer<'_>) -> io::Result<(SpiffeId, Duration)> {
    use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};
    let (_, certificate) = X509Certificate::from_der(leaf).map_err(io::Error::other)?;
    let names = certificate.subject_alternative_name().map_err(io::Error::other)?;
    let mut uris = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let (Some(uri), None) = (uris.next(), uris.next()) else {
        return Err(io::Error::other("the peer's certificate has not exactly one URI name"));
    };
    let identity = uri.parse().map_err(io::Error::other)?;
    let expires = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or_default();
    Ok((identity, Duration::from_secs(expires)))
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

/// What a client's handshake names as its server.
const SERVER_NAME: &str = "control.outrigger-system";

/// The longest that a peer may take for its handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);

/// Handshakes under way per listener; more wait in the kernel's queue.
const HANDSHAKES_MAX: usize = 256;
