//! Dials: TCP with the true client declared, TLS that holds the peer to its identity, all within one timeout.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use prometheus::IntCounter;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use socket2::SockRef;
use tokio::net::TcpSocket;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tracing::warn;

use crate::base::descriptors;
use crate::base::net::BoxedIo;
use crate::base::sockopt::{declare_client, declare_own_dial};
use crate::dataplane::tls::Alpn;
use crate::identity::source::Identity;
use crate::identity::spiffe::SpiffeId;

/// A connection on its way.
pub(crate) type Dialling = Pin<Box<dyn Future<Output = io::Result<BoxedIo>> + Send>>;

/// Opens connections: sockets in production, pipes in tests.
pub(crate) trait Dial: fmt::Debug + Send + Sync + 'static {
    /// Connects to `to`. `client` is the true client, for the own application to see.
    fn dial(&self, to: SocketAddr, client: Option<SocketAddr>) -> Dialling;
}

/// Why there is no connection. Nothing of a request was sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The other side, or the way to it, is at fault.
    #[error("cannot connect to {to}")]
    Failed {
        to: SocketAddr,
        #[source]
        source: io::Error,
    },
    /// This process or its machine has nothing left to connect with.
    #[error("the system gives no socket to connect to {to} with")]
    Exhausted {
        to: SocketAddr,
        #[source]
        source: io::Error,
    },
    /// It took too long.
    #[error("connecting to {0} took too long")]
    Timeout(SocketAddr),
    /// The peer is not who it must be, or could not prove it.
    #[error("{to} is not {expected}")]
    Identity {
        to: SocketAddr,
        expected: SpiffeId,
        #[source]
        source: io::Error,
    },
    /// The peer speaks TLS, but not ours.
    #[error("{0} is no sidecar of this mesh")]
    NotOurs(SocketAddr),
    /// HTTP could not be begun on it.
    #[error("cannot speak HTTP with {to}")]
    Http {
        to: SocketAddr,
        #[source]
        source: super::WireError,
    },
    /// Our TLS configuration could not be made.
    #[error("no TLS of our own")]
    Own(#[from] crate::identity::source::IdentityError),
    /// The breaker of the service has no connection left.
    #[error("the limit on connections is reached")]
    Limit(crate::policy::RuleName),
}

impl ConnectError {
    /// A dial failed: for want of something here, which is not the other side's fault, or otherwise.
    fn of_dial(to: SocketAddr, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => Self::Exhausted { to, source },
            _other => Self::Failed { to, source },
        }
    }

    /// The same for somebody else who waited for the same connection; none: it concerns nobody else.
    pub(super) fn again(&self) -> Option<Self> {
        let copy = |source: &io::Error| io::Error::new(source.kind(), source.to_string());
        Some(match self {
            Self::Failed { to, source } => Self::Failed { to: *to, source: copy(source) },
            Self::Exhausted { to, source } => Self::Exhausted { to: *to, source: copy(source) },
            Self::Timeout(to) => Self::Timeout(*to),
            Self::Identity { to, expected, source } => {
                Self::Identity { to: *to, expected: expected.clone(), source: copy(source) }
            }
            Self::NotOurs(to) => Self::NotOurs(*to),
            Self::Http { to, source } => Self::Failed { to: *to, source: io::Error::other(source.to_string()) },
            Self::Own(_) | Self::Limit(_) => return None,
        })
    }
}

/// Dials TCP.
#[derive(Debug)]
pub(crate) struct TcpDial {
    /// It was said that capture is missing.
    warned: Arc<AtomicBool>,
    /// How often it was.
    undeclared: IntCounter,
}

impl TcpDial {
    /// `undeclared` counts connections to the own application that were opened without their true client.
    pub(crate) fn new(undeclared: IntCounter) -> Self {
        Self { warned: Arc::default(), undeclared }
    }
}

impl Dial for TcpDial {
    fn dial(&self, to: SocketAddr, client: Option<SocketAddr>) -> Dialling {
        let (warned, undeclared) = (Arc::clone(&self.warned), self.undeclared.clone());
        Box::pin(async move {
            let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            descriptors::leave_own(&socket)?;
            socket.set_nodelay(true)?;
            if let Some(client) = client
                && let Err(error) = declare_client(&socket, client)
            {
                // Capture is there and refuses: undeclared, the dial would come back in at this sidecar's own door.
                if error.raw_os_error() != Some(libc::ENOPROTOOPT) {
                    return Err(error);
                }
                // The application still gets its request; it only sees the sidecar as the client. Said once, counted always.
                undeclared.inc();
                if !warned.swap(true, Ordering::Relaxed) {
                    warn!(%error, "the application cannot be shown its true clients: the kernel programs do not answer");
                }
                declare_own_dial(&socket)?;
            }
            // Who asked may leave meanwhile, and the kernel may be done already: closed in order, it would keep the port for a minute
            // (TIME-WAIT), and who leaves in masses would use up all of them.
            SockRef::from(&socket).set_linger(Some(Duration::ZERO))?;
            let stream = socket.connect(to).await?;
            SockRef::from(&stream).set_linger(None)?;
            Ok(Box::new(stream) as BoxedIo)
        })
    }
}

/// Configurations of links, made once for each peer: they follow certificates and authorities by themselves.
#[derive(Debug, Default)]
pub(super) struct Configs(Mutex<BTreeMap<(SpiffeId, Alpn), Arc<ClientConfig>>>);

impl Configs {
    fn of(&self, identity: &Identity, expected: &SpiffeId, alpn: Alpn) -> Result<Arc<ClientConfig>, ConnectError> {
        let key = (expected.clone(), alpn);
        if let Some(config) = self.0.lock().get(&key) {
            return Ok(Arc::clone(config));
        }
        let config = identity.client_config(expected, &[alpn.as_bytes()])?;
        let mut known = self.0.lock();
        if known.len() >= CONFIGS_MAX {
            known.clear();
        }
        known.insert(key, Arc::clone(&config));
        Ok(config)
    }
}

/// Connects to a peer's sidecar and holds it to `expected`.
///
/// # Errors
/// See [`ConnectError`].
pub(super) async fn link(
    dial: &dyn Dial,
    identity: &Identity,
    configs: &Configs,
    to: SocketAddr,
    expected: &SpiffeId,
    alpn: Alpn,
    at_most: Duration,
) -> Result<TlsStream<BoxedIo>, ConnectError> {
    let config = configs.of(identity, expected, alpn)?;
    let connecting = async {
        // At the start, the application may be faster than the identity.
        identity.arrived().await;
        let io = dial.dial(to, None).await.map_err(|source| ConnectError::of_dial(to, source))?;
        // The name is not sent and not looked at; rustls wants one.
        let name = ServerName::from(std::net::IpAddr::from(std::net::Ipv4Addr::UNSPECIFIED));
        let stream = TlsConnector::from(config).connect(name, io).await.map_err(|source| {
            let tls = source.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
            match tls {
                Some(rustls::Error::InvalidCertificate(_)) => ConnectError::Identity { to, expected: expected.clone(), source },
                _other => ConnectError::Failed { to, source },
            }
        })?;
        if stream.get_ref().1.alpn_protocol() == Some(alpn.as_bytes()) { Ok(stream) } else { Err(ConnectError::NotOurs(to)) }
    };
    timeout(at_most, connecting).await.unwrap_or(Err(ConnectError::Timeout(to)))
}

/// Connects in clear: to the own application, or to an endpoint that has no sidecar.
///
/// # Errors
/// See [`ConnectError`].
pub(crate) async fn plain(
    dial: &dyn Dial,
    to: SocketAddr,
    client: Option<SocketAddr>,
    at_most: Duration,
) -> Result<BoxedIo, ConnectError> {
    match timeout(at_most, dial.dial(to, client)).await {
        Ok(Ok(io)) => Ok(io),
        Ok(Err(source)) => Err(ConnectError::of_dial(to, source)),
        Err(_elapsed) => Err(ConnectError::Timeout(to)),
    }
}

/// Peers of which a configuration is kept.
const CONFIGS_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn a_dial_that_is_given_up_leaves_nothing_behind_and_another_ends_in_order() {
        let app = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dial = TcpDial::new(IntCounter::new("undeclared", "undeclared").unwrap());
        for given_up in [true, false] {
            let mut dialling = dial.dial(app.local_addr().unwrap(), None);
            if given_up {
                assert!(dialling.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
                drop(dialling);
            } else {
                drop(dialling.await.unwrap());
            }
            let (mut accepted, _from) = app.accept().await.unwrap();
            let end = accepted.read(&mut [0; 1]).await.map_err(|error| error.kind());
            assert_eq!(end, if given_up { Err(io::ErrorKind::ConnectionReset) } else { Ok(0) });
        }
    }

    #[tokio::test]
    async fn a_dial_without_capture_is_made_and_counted() {
        let app = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let undeclared = IntCounter::new("undeclared", "undeclared").unwrap();
        let dial = TcpDial::new(undeclared.clone());
        let to = app.local_addr().unwrap();
        for (client, expected) in [(None, 0), (Some("192.0.2.1:80".parse().unwrap()), 1)] {
            dial.dial(to, client).await.unwrap();
            assert_eq!(undeclared.get(), expected, "{client:?}");
        }
    }
}
