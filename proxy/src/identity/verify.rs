//! Holds a TLS peer to the identity it must have (X.509-SVID standard, sections 2, 4.1 and 5).
//!
//! A peer's chain must lead to an authority of its own trust domain, its leaf must carry exactly one URI name, and that
//! name must be the one that is expected: exactly one workload on the side that dials, any workload of the own trust
//! domain on the side that answers. Only TLS 1.3 is spoken, so the peer's certificate never crosses the wire in clear.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyUsage};
use x509_parser::extensions::GeneralName;

use super::spiffe::{SpiffeId, TrustDomain};
use super::verified::Verified;

/// Authorities of each trust domain. Replaced as a whole when one of them changes.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Bundles {
    by_domain: BTreeMap<TrustDomain, Vec<TrustAnchor<'static>>>,
}

/// Why a peer is not who it must be. The peer, or whoever signed for it, is at fault.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerError {
    /// The leaf is no certificate.
    #[error("the certificate cannot be read")]
    Unreadable,
    /// The leaf has no URI name, or several, or one that cannot be read.
    #[error("the certificate carries {0} URI names instead of one")]
    UriNames(usize),
    /// The URI name is no SPIFFE ID.
    #[error("the certificate's name is no SPIFFE ID")]
    NotSpiffe(#[source] super::spiffe::SpiffeError),
    /// Nobody gave us authorities of the peer's trust domain.
    #[error("trust domain {0} is not trusted here")]
    ForeignTrustDomain(TrustDomain),
    /// The peer is somebody, but no workload of the mesh: policies have no word for it.
    #[error("{0} is not of the form spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT")]
    NoAccount(SpiffeId),
    /// The peer proved another identity.
    #[error("the peer is {actual}, not {expected}")]
    WrongIdentity { expected: String, actual: SpiffeId },
}

/// Verifies a server: it must be exactly one workload.
pub(crate) struct ServerVerifier {
    bundles: Arc<ArcSwap<Bundles>>,
    expected: SpiffeId,
    algorithms: WebPkiSupportedAlgorithms,
    verified: Verified,
}

/// Verifies a client: it must be of the own trust domain.
pub(crate) struct ClientVerifier {
    bundles: Arc<ArcSwap<Bundles>>,
    domain: TrustDomain,
    demand: ClientDemand,
    algorithms: WebPkiSupportedAlgorithms,
    verified: Verified,
}

/// Must a client show a certificate?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ClientDemand {
    /// A handshake without one fails.
    Certificate,
    /// A client may come without one; one that it shows must be good. For a server that also meets clients that have no
    /// certificate yet.
    CertificateIfAny,
}

impl Bundles {
    /// Adds an authority (DER) of `domain`.
    ///
    /// # Errors
    /// It is no certificate that can be a trust anchor.
    pub(crate) fn add(&mut self, domain: &TrustDomain, authority: &[u8]) -> Result<(), webpki::Error> {
        let certificate = CertificateDer::from(authority);
        let anchor = webpki::anchor_from_trusted_cert(&certificate)?.to_owned();
        self.by_domain.entry(domain.clone()).or_default().push(anchor);
        Ok(())
    }

    /// Is an authority among them that has the key of `authority`, under whatever name?
    ///
    /// # Errors
    /// That is no certificate that can be a trust anchor.
    pub(crate) fn hold_key_of(&self, authority: &CertificateDer<'_>) -> Result<bool, webpki::Error> {
        let key = webpki::anchor_from_trusted_cert(authority)?.subject_public_key_info;
        Ok(self.by_domain.values().flatten().any(|known| known.subject_public_key_info == key))
    }

    /// Verifies that a chain leads to an authority of the leaf's own trust domain and is good at `now`. Returns the
    /// leaf's identity.
    ///
    /// # Errors
    /// As rustls reports them: [`CertificateError`], with a [`PeerError`] inside where TLS has no word for it.
    pub(crate) fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: impl ExtendedKeyUsageValidator,
        algorithms: &WebPkiSupportedAlgorithms,
        now: UnixTime,
    ) -> Result<SpiffeId, rustls::Error> {
        let id = identity_of(leaf).map_err(refused)?;
        let domain = id.trust_domain();
        let anchors = self.by_domain.get(&domain).ok_or_else(|| refused(PeerError::ForeignTrustDomain(domain)))?;
        let leaf = EndEntityCert::try_from(leaf).map_err(chain_error)?;
        leaf.verify_for_usage(algorithms.all, anchors, intermediates, now, usage, None, None).map_err(chain_error)?;
        Ok(id)
    }
}

/// The SPIFFE ID of a certificate that a handshake already verified, or that only has to be named.
///
/// # Errors
/// It does not carry exactly one URI name that is a SPIFFE ID.
pub(crate) fn identity_of(leaf: &CertificateDer<'_>) -> Result<SpiffeId, PeerError> {
    let (_rest, certificate) = x509_parser::parse_x509_certificate(leaf).map_err(|_not_der| PeerError::Unreadable)?;
    let names = certificate.subject_alternative_name().map_err(|_not_der| PeerError::Unreadable)?;
    let mut uris = Vec::new();
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        match name {
            GeneralName::URI(uri) => uris.push(*uri),
            // A name that cannot be read might be a second URI name: nothing is guessed about an identity.
            GeneralName::Invalid(..) => return Err(PeerError::Unreadable),
            _other_kinds => {}
        }
    }
    match uris.as_slice() {
        [uri] => uri.parse().map_err(PeerError::NotSpiffe),
        _none_or_several => Err(PeerError::UriNames(uris.len())),
    }
}

impl ServerVerifier {
    /// Verifies that a server is `expected`.
    pub(crate) fn new(bundles: Arc<ArcSwap<Bundles>>, expected: SpiffeId, algorithms: WebPkiSupportedAlgorithms) -> Self {
        Self { bundles, expected, algorithms, verified: Verified::default() }
    }
}

impl ClientVerifier {
    /// Verifies that a client belongs to `domain`.
    pub(crate) fn new(
        bundles: Arc<ArcSwap<Bundles>>,
        domain: TrustDomain,
        demand: ClientDemand,
        algorithms: WebPkiSupportedAlgorithms,
    ) -> Self {
        Self { bundles, domain, demand, algorithms, verified: Verified::default() }
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verify =
            |bundles: &Bundles| bundles.verify(end_entity, intermediates, KeyUsage::server_auth(), &self.algorithms, now);
        let actual = once(&self.verified, &self.bundles, end_entity, intermediates, now, verify)?;
        if actual == self.expected {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(refused(PeerError::WrongIdentity { expected: self.expected.to_string(), actual }))
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.demand == ClientDemand::Certificate
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A client has one identity to show; hints would only tell a stranger about our authorities.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verify =
            |bundles: &Bundles| bundles.verify(end_entity, intermediates, KeyUsage::client_auth(), &self.algorithms, now);
        let actual = once(&self.verified, &self.bundles, end_entity, intermediates, now, verify)?;
        let domain = actual.trust_domain();
        if domain == self.domain {
            Ok(ClientCertVerified::assertion())
        } else {
            Err(refused(PeerError::ForeignTrustDomain(domain)))
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl fmt::Debug for ServerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServerVerifier({})", self.expected)
    }
}

impl fmt::Debug for ClientVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClientVerifier({})", self.domain)
    }
}

/// Verifies a chain, unless it is known to be good.
fn once(
    verified: &Verified,
    bundles: &ArcSwap<Bundles>,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
    verify: impl FnOnce(&Bundles) -> Result<SpiffeId, rustls::Error>,
) -> Result<SpiffeId, rustls::Error> {
    let bundles = bundles.load_full();
    if let Some(id) = verified.find(leaf, intermediates, &bundles, now) {
        return Ok(id);
    }
    let id = verify(&bundles)?;
    verified.keep(leaf, intermediates, &bundles, &id);
    Ok(id)
}

fn only_tls13() -> rustls::Error {
    rustls::Error::General("only TLS 1.3 is spoken here".to_owned())
}

fn refused(error: PeerError) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

fn chain_error(error: webpki::Error) -> rustls::Error {
    let reason = match error {
        webpki::Error::BadDer | webpki::Error::BadDerTime => CertificateError::BadEncoding,
        webpki::Error::CertExpired { .. } | webpki::Error::InvalidCertValidity => CertificateError::Expired,
        webpki::Error::CertNotValidYet { .. } => CertificateError::NotValidYet,
        webpki::Error::UnknownIssuer => CertificateError::UnknownIssuer,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    };
    rustls::Error::InvalidCertificate(reason)
}
