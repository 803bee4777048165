//! The server's side of links between sidecars: told apart from an application's own TLS by ALPN, and accepted.
//!
//! Sources: RFC 7301 (ALPN), RFC 8446. A ClientHello that offers none of our protocols is never answered: it belongs to
//! the application, and its bytes are passed on untouched.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rustls::server::ClientHello;
use rustls::{CertificateError, PeerIncompatible};
use tokio::io::AsyncReadExt as _;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::sniff::{BYTES_MAX, Sniffed, classify};
use crate::base::net::BoxedIo;
use crate::identity::spiffe::SpiffeId;
use crate::identity::verify::{PeerError, identity_of};
use crate::telemetry::handshake::HandshakeFault;

/// What a link carries.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Alpn {
    /// Requests over one shared HTTP/2 connection.
    H2,
    /// One opaque connection.
    Tcp,
}

/// Why a link was not made. The peer is at fault.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AcceptError {
    #[error("the TLS handshake failed")]
    Handshake(#[source] io::Error),
    #[error("the TLS handshake took too long")]
    Timeout,
    #[error("the peer has no identity")]
    Peer(#[from] PeerError),
    #[error("the peer chose none of our protocols")]
    Protocol,
}

impl Alpn {
    /// Both, as a server offers them.
    pub(crate) const OFFERED: [&'static [u8]; 2] = [Self::H2.as_bytes(), Self::Tcp.as_bytes()];

    /// As on the wire.
    pub(crate) const fn as_bytes(self) -> &'static [u8] {
        match self {
            Self::H2 => b"outrigger-h2",
            Self::Tcp => b"outrigger-tcp",
        }
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        [Self::H2, Self::Tcp].into_iter().find(|alpn| alpn.as_bytes() == bytes)
    }
}

impl AcceptError {
    /// What the peer did, or is.
    pub(crate) fn fault(&self) -> HandshakeFault {
        match self {
            Self::Handshake(error) => {
                let said = error.get_ref().and_then(|source| source.downcast_ref::<rustls::Error>());
                said.map_or(HandshakeFault::PeerLeft, fault_of)
            }
            Self::Timeout => HandshakeFault::Timeout,
            Self::Peer(error) => fault_of_peer(error),
            Self::Protocol => HandshakeFault::NoCommonProtocol,
        }
    }
}

/// Reads the rest of a ClientHello and says whether it wants a link, or why it did not become whole. What was read is given back.
///
/// # Errors
/// The connection broke.
pub(crate) async fn offers_link(
    io: &mut BoxedIo,
    first: Bytes,
    at_most: Duration,
) -> io::Result<(Result<bool, HandshakeFault>, Bytes)> {
    read_hello(io, first, at_most, hello_offers_link).await
}

/// Reads a ClientHello, if one comes, and says which name it asks for, in lower case. What was read is given back.
///
/// # Errors
/// The connection broke.
pub(crate) async fn server_name(io: &mut BoxedIo, at_most: Duration) -> io::Result<(Option<Box<str>>, Bytes)> {
    let (name, bytes) = read_hello(io, Bytes::new(), at_most, |bytes| {
        if matches!(classify(bytes), Some(known) if known != Sniffed::Tls) {
            return Some(None);
        }
        hello(bytes, |hello| hello.server_name().map(|name| name.to_ascii_lowercase().into_boxed_str())).map(Option::flatten)
    })
    .await?;
    Ok((name.ok().flatten(), bytes))
}

/// Reads until `told` knows what it is asked, or says why it will not: a hello that never becomes whole tells nothing.
async fn read_hello<T>(
    io: &mut BoxedIo,
    first: Bytes,
    at_most: Duration,
    told: impl Fn(&[u8]) -> Option<T>,
) -> io::Result<(Result<T, HandshakeFault>, Bytes)> {
    let mut bytes = BytesMut::from(&first[..]);
    let read = async {
        loop {
            if let Some(answer) = told(&bytes) {
                return Ok::<_, io::Error>(Ok(answer));
            }
            if bytes.len() >= BYTES_MAX {
                return Ok(Err(HandshakeFault::Malformed));
            }
            if io.read_buf(&mut bytes).await? == 0 {
                return Ok(Err(HandshakeFault::PeerLeft));
            }
        }
    };
    let answer = match timeout(at_most, read).await {
        Ok(answer) => answer?,
        Err(_elapsed) => Err(HandshakeFault::Timeout),
    };
    Ok((answer, bytes.freeze()))
}

/// Does a ClientHello offer one of our protocols? `None` while it is not whole.
pub(super) fn hello_offers_link(bytes: &[u8]) -> Option<bool> {
    let ours = hello(bytes, |hello| hello.alpn().is_some_and(|mut names| names.any(|name| Alpn::from_bytes(name).is_some())));
    ours.map(Option::unwrap_or_default)
}

/// What is to be known of a ClientHello: `None` while it is not whole, `Some(None)` of what is none.
#[expect(clippy::option_option, reason = "three answers: this, nothing, not yet")]
fn hello<T>(bytes: &[u8], of: impl Fn(&ClientHello<'_>) -> T) -> Option<Option<T>> {
    let mut acceptor = rustls::server::Acceptor::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        if acceptor.read_tls(&mut rest).is_err() {
            return Some(None);
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => return Some(Some(of(&accepted.client_hello()))),
            Ok(None) => {}
            Err(_not_a_hello) => return Some(None),
        }
    }
    None
}

/// Accepts a link.
///
/// # Errors
/// See [`AcceptError`].
pub(crate) async fn accept(
    config: Arc<rustls::ServerConfig>,
    io: BoxedIo,
    at_most: Duration,
) -> Result<(TlsStream<BoxedIo>, SpiffeId, Alpn), AcceptError> {
    let stream = match timeout(at_most, TlsAcceptor::from(config).accept(io)).await {
        Ok(stream) => stream.map_err(AcceptError::Handshake)?,
        Err(_elapsed) => return Err(AcceptError::Timeout),
    };
    let (_, session) = stream.get_ref();
    let alpn = session.alpn_protocol().and_then(Alpn::from_bytes).ok_or(AcceptError::Protocol)?;
    let leaf = session.peer_certificates().and_then(|chain| chain.first()).ok_or(PeerError::Unreadable)?;
    let id = identity_of(leaf)?;
    // The mesh's authority signs for node agents as well, and SPIRE for whomever its entries name.
    if id.account().is_none() {
        return Err(PeerError::NoAccount(id).into());
    }
    Ok((stream, id, alpn))
}

fn fault_of(error: &rustls::Error) -> HandshakeFault {
    match error {
        rustls::Error::NoCertificatesPresented => HandshakeFault::NoCertificate,
        rustls::Error::InvalidCertificate(error) => fault_of_certificate(error),
        rustls::Error::PeerIncompatible(
            PeerIncompatible::SupportedVersionsExtensionRequired
            | PeerIncompatible::ServerDoesNotSupportTls12Or13
            | PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled,
        ) => HandshakeFault::ProtocolVersion,
        rustls::Error::PeerIncompatible(_) => HandshakeFault::NoCommonAlgorithm,
        rustls::Error::NoApplicationProtocol => HandshakeFault::NoCommonProtocol,
        rustls::Error::AlertReceived(_) => HandshakeFault::RefusedByPeer,
        _another => HandshakeFault::Malformed,
    }
}

fn fault_of_certificate(error: &CertificateError) -> HandshakeFault {
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => HandshakeFault::CertificateExpired,
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => HandshakeFault::CertificateNotYetValid,
        CertificateError::UnknownIssuer => HandshakeFault::UnknownAuthority,
        CertificateError::BadEncoding => HandshakeFault::CertificateUnreadable,
        CertificateError::Other(other) => {
            let peer = other.0.downcast_ref().map(fault_of_peer);
            // An authority of the same name as ours, with another key.
            let forged = matches!(other.0.downcast_ref(), Some(webpki::Error::InvalidSignatureForPublicKey));
            let otherwise = if forged { HandshakeFault::UnknownAuthority } else { HandshakeFault::CertificateInvalid };
            peer.unwrap_or(otherwise)
        }
        _another => HandshakeFault::CertificateInvalid,
    }
}

fn fault_of_peer(error: &PeerError) -> HandshakeFault {
    match error {
        PeerError::Unreadable => HandshakeFault::CertificateUnreadable,
        PeerError::UriNames(_) | PeerError::NotSpiffe(_) | PeerError::NoAccount(_) => HandshakeFault::NoSpiffeId,
        PeerError::ForeignTrustDomain(_) => HandshakeFault::TrustDomain,
        // Of a server alone: a client is whoever it is.
        PeerError::WrongIdentity { .. } => HandshakeFault::CertificateInvalid,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn hello(alpn: &[&[u8]]) -> Vec<u8> {
        hello_for("example.org", alpn)
    }

    /// A ClientHello that asks for a name.
    pub(in crate::dataplane) fn hello_for(name: &'static str, alpn: &[&[u8]]) -> Vec<u8> {
        let identity =
            crate::identity::source::Identity::new("cluster.local".parse().unwrap(), crate::identity::testing::clock());
        let config = identity.client_config(&"spiffe://cluster.local/ns/a/sa/b".parse().unwrap(), alpn).unwrap();
        let mut config = Arc::unwrap_or_clone(config);
        // Links do not name their peers; applications do.
        config.enable_sni = true;
        let name = rustls_pki_types::ServerName::try_from(name).unwrap();
        let mut connection = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        connection.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_link_is_known_by_its_protocol() {
        assert_eq!(hello_offers_link(&hello(&[b"outrigger-h2"])), Some(true));
        assert_eq!(hello_offers_link(&hello(&[b"outrigger-tcp"])), Some(true));
        assert_eq!(hello_offers_link(&hello(&[b"h2", b"http/1.1"])), Some(false));
        assert_eq!(hello_offers_link(&hello(&[])), Some(false));
        let whole = hello(&[b"outrigger-h2"]);
        assert_eq!(hello_offers_link(&whole[..whole.len() - 1]), None);
        assert_eq!(hello_offers_link(b"\x16\x03\x01\x00\x04\x01\x00\x00\x00garbage"), Some(false));
    }
}
