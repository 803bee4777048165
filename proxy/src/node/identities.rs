//! X.509-SVIDs of the pods: keys made here, certificates asked for and checked before they are used, replaced around half
//! of their life.
//!
//! Source: the X.509-SVID standard. Invariant: a private key leaves this process only over the Workload API, to the pod
//! that it belongs to.

use std::sync::Arc;
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair, PublicKeyData as _, SanType};
use rustls_pki_types::CertificateDer;

use super::authority::Authority;
use super::pods::Pod;
use crate::identity::spiffe::{SpiffeId, TrustDomain};
use crate::identity::verify::{Bundles, PeerError, identity_of};

/// Who gives the pods of this node their identities.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Issuer {
    /// The control plane's authority, through this agent.
    Authority,
    /// Another Workload API, at which their sidecars ask by themselves.
    Elsewhere,
}

/// A certificate with its key.
pub(crate) struct Svid {
    pub(crate) id: SpiffeId,
    /// Leaf first, DER.
    pub(crate) chain: Vec<Vec<u8>>,
    /// PKCS#8, DER.
    pub(crate) key: Vec<u8>,
    /// Since the epoch.
    pub(crate) not_before: Duration,
    /// Since the epoch.
    pub(crate) not_after: Duration,
}

/// A key, and the request to have it certified.
pub(crate) struct Request {
    id: SpiffeId,
    key: KeyPair,
    /// PKCS#10, DER.
    pub(crate) csr: Vec<u8>,
}

/// Why a certificate could not be asked for, or cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IssueError {
    /// Ours: no key or no request could be made.
    #[error("cannot make a key or a signing request")]
    Request(#[from] rcgen::Error),
    /// The authority sent nothing, or no certificate.
    #[error("there is no certificate in the answer")]
    NoCertificate,
    /// The authority's certificate carries no identity.
    #[error("the certificate carries no identity")]
    NoIdentity(#[from] PeerError),
    /// The authority certified somebody else.
    #[error("the certificate is for {actual}, not for {expected}")]
    OtherIdentity { expected: SpiffeId, actual: SpiffeId },
    /// The authority certified another key.
    #[error("the certificate is for another key")]
    OtherKey,
    /// The authority sent a bundle that cannot be used.
    #[error("the bundle holds what is no authority")]
    Bundle(#[from] webpki::Error),
}

impl Request {
    /// Makes a P-256 key and a request for `id`.
    ///
    /// # Errors
    /// There is no randomness, or the identity cannot stand in a certificate.
    pub(crate) fn new(id: &SpiffeId) -> Result<Self, IssueError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
        let csr = params.serialize_request(&key)?.der().to_vec();
        Ok(Self { id: id.clone(), key, csr })
    }

    /// Takes the authority's answer, leaf first.
    ///
    /// # Errors
    /// It is not the certificate that was asked for.
    pub(crate) fn accept(&self, chain: Vec<Vec<u8>>) -> Result<Svid, IssueError> {
        let leaf = CertificateDer::from(chain.first().ok_or(IssueError::NoCertificate)?.as_slice());
        let actual = identity_of(&leaf)?;
        if actual != self.id {
            return Err(IssueError::OtherIdentity { expected: self.id.clone(), actual });
        }
        let (_rest, parsed) = x509_parser::parse_x509_certificate(&leaf).map_err(|_not_der| IssueError::NoCertificate)?;
        if parsed.public_key().raw != self.key.subject_public_key_info() {
            return Err(IssueError::OtherKey);
        }
        let since_epoch = |time: x509_parser::time::ASN1Time| Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0));
        let (not_before, not_after) = (since_epoch(parsed.validity().not_before), since_epoch(parsed.validity().not_after));
        Ok(Svid { id: actual, key: self.key.serialize_der(), not_before, not_after, chain })
    }
}

impl Svid {
    /// How long from `now` until it is to be replaced: half of its life, spread by a tenth in each direction so that
    /// certificates made in one moment are not renewed in one moment. `fraction` lies between 0 and 1.
    pub(crate) fn renew_in(&self, now: Duration, fraction: f64) -> Duration {
        let life = self.not_after.saturating_sub(self.not_before);
        let renewal = self.not_before + life.mul_f64(0.4 + 0.2 * fraction.clamp(0.0, 1.0));
        renewal.saturating_sub(now).max(SOONEST)
    }
}

impl std::fmt::Debug for Svid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Svid").field("id", &self.id).field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// Trust anchors of `domain`.
///
/// # Errors
/// One of them is no certificate.
pub(crate) fn bundles<'a>(domain: &TrustDomain, authorities: impl Iterator<Item = &'a [u8]>) -> Result<Bundles, IssueError> {
    let mut bundles = Bundles::default();
    for authority in authorities {
        bundles.add(domain, authority)?;
    }
    Ok(bundles)
}

/// Keeps a pod's certificate fresh, for ever. Cancel-safe.
pub(crate) async fn keep_fresh(pod: Arc<Pod>, authority: Authority) {
    loop {
        let svid = authority.issue(&pod.id, &pod.record).await;
        let renewal = authority.renew_in(&svid);
        pod.svid.send_replace(Some(Arc::new(svid)));
        tokio::time::sleep(renewal).await;
    }
}

/// Tells the control plane where a pod is reached, of which no certificate is asked for, for ever: soon again at first, for the
/// one that was told may have ended before the pod's sidecar came to it, and ever more seldom. Cancel-safe.
pub(crate) async fn keep_placed(pod: Arc<Pod>, authority: Authority) {
    let mut pause = PLACED_AGAIN;
    loop {
        authority.place(&pod.record).await;
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PLACED_AGAIN_MAX);
    }
}

const PLACED_AGAIN: Duration = Duration::from_secs(5);
const PLACED_AGAIN_MAX: Duration = Duration::from_secs(30 * 60);
/// A certificate that is already past its renewal is not asked for in a tight circle.
const SOONEST: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use rcgen::{CertificateSigningRequestParams, IsCa, Issuer};
    use rustls_pki_types::CertificateSigningRequestDer;

    use super::*;

    fn sign(csr: &[u8]) -> Vec<Vec<u8>> {
        let key = KeyPair::generate().unwrap();
        let issuer = Issuer::new(CertificateParams::default(), key);
        let mut request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr)).unwrap();
        request.params.is_ca = IsCa::ExplicitNoCa;
        request.params.not_before = rcgen::date_time_ymd(2026, 1, 1);
        request.params.not_after = rcgen::date_time_ymd(2026, 1, 2);
        vec![request.signed_by(&issuer).unwrap().der().to_vec()]
    }

    #[test]
    fn a_certificate_is_taken_only_for_the_own_identity_and_key() {
        let (web, api): (SpiffeId, SpiffeId) =
            ("spiffe://cluster.local/ns/shop/sa/web".parse().unwrap(), "spiffe://cluster.local/ns/shop/sa/api".parse().unwrap());
        let request = Request::new(&web).unwrap();
        let svid = request.accept(sign(&request.csr)).unwrap();
        assert_eq!((svid.id.clone(), svid.not_after - svid.not_before), (web.clone(), Duration::from_secs(86_400)));
        assert!(matches!(request.accept(sign(&Request::new(&api).unwrap().csr)), Err(IssueError::OtherIdentity { .. })));
        assert!(matches!(request.accept(sign(&Request::new(&web).unwrap().csr)), Err(IssueError::OtherKey)));
        assert!(matches!(request.accept(vec![]), Err(IssueError::NoCertificate)));
    }

    #[test]
    fn a_certificate_is_renewed_around_half_of_its_life() {
        let request = Request::new(&"spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()).unwrap();
        let svid = Svid {
            not_before: Duration::from_secs(1000),
            not_after: Duration::from_secs(2000),
            ..request.accept(sign(&request.csr)).unwrap()
        };
        let at = Duration::from_secs(1000);
        assert_eq!(svid.renew_in(at, 0.0), Duration::from_secs(400));
        assert_eq!(svid.renew_in(at, 0.5), Duration::from_secs(500));
        assert_eq!(svid.renew_in(Duration::from_secs(1900), 0.5), SOONEST);
    }
}
