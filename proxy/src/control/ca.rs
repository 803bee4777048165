//! The certificate authority: one root per trust domain, which signs leaves for identities that somebody else proved.
//!
//! Sources: X.509-SVID standard, sections 2 to 4; RFC 5280, section 4. Of a certificate signing request only the public
//! key is taken, after its signature proved that the asker has the private one; names, uses and dates are ours. The root's
//! key never leaves the state folder, or the Secret of a cluster.

use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aws_lc_rs::rand::{SecureRandom as _, SystemRandom};
use base64::Engine as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber, date_time_ymd,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer};

use crate::base::clock::WallClock;
use crate::base::state::write_durable;
use crate::identity::spiffe::{SpiffeId, TrustDomain};
use crate::identity::verify::Bundles;

/// The authority of one trust domain.
pub(crate) struct Authority {
    trust_domain: TrustDomain,
    root: CertificateDer<'static>,
    root_expires: Duration,
    issuer: Issuer<'static, KeyPair>,
    clock: WallClock,
}

/// A root and its key, as PEM.
pub(crate) struct Root {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Root {
    /// A new one.
    ///
    /// # Errors
    /// The environment has no randomness.
    pub(crate) fn new(trust_domain: &TrustDomain, clock: &WallClock) -> Result<Self, CaError> {
        let now = clock.since_epoch();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(CaError::Sign)?;
        let mut params = params(now.saturating_sub(SKEW), now + ROOT_LIFETIME)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, format!("Outrigger authority of {trust_domain}"));
        let name = format!("spiffe://{trust_domain}");
        params.subject_alt_names = vec![SanType::URI(name.try_into().map_err(CaError::Sign)?)];
        let root = params.self_signed(&key).map_err(CaError::Sign)?;
        Ok(Self { certificate: root.pem(), key: key.serialize_pem() })
    }
}

/// A signed leaf, as a chain without the root.
#[derive(Debug)]
pub(crate) struct Signed {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    /// When the leaf ends, as time since 1970-01-01T00:00:00Z.
    pub(crate) expires: Duration,
}

/// Why the authority cannot open or sign.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaError {
    /// The environment is at fault.
    #[error("cannot keep the authority in {}", path.display())]
    Folder {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The user is at fault: the state belongs to something else.
    #[error("{} is not usable: {reason}", path.display())]
    Root { path: PathBuf, reason: String },
    /// The peer is at fault.
    #[error("the certificate signing request is not one, or its signature does not fit its key")]
    Request(#[source] rcgen::Error),
    /// The environment is at fault: there is no randomness, or the library refuses.
    #[error("cannot make a certificate")]
    Sign(#[source] rcgen::Error),
    #[error("the system has no random numbers")]
    Random,
}

impl Authority {
    /// Loads the root from `folder`, or makes one there.
    ///
    /// # Errors
    /// The folder cannot be read or written, or holds the root of something else.
    pub(crate) fn open(folder: &Path, trust_domain: TrustDomain, clock: WallClock) -> Result<Self, CaError> {
        let failed = |path: &Path, source| CaError::Folder { path: path.to_owned(), source };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|error| failed(folder, error))?;
        let (certificate_path, key_path) = (folder.join(CERTIFICATE), folder.join(KEY));
        if !certificate_path.exists() {
            let root = Root::new(&trust_domain, &clock)?;
            // The certificate is written last: where it stands, its key stands.
            write_durable(&key_path, root.key.as_bytes(), 0o600).map_err(|error| failed(&key_path, error))?;
            write_durable(&certificate_path, root.certificate.as_bytes(), 0o644)
                .map_err(|error| failed(&certificate_path, error))?;
        }
        let certificate = std::fs::read_to_string(&certificate_path).map_err(|error| failed(&certificate_path, error))?;
        let key = std::fs::read_to_string(&key_path).map_err(|error| failed(&key_path, error))?;
        Self::from_root(certificate_path, &Root { certificate, key }, trust_domain, clock)
    }

    /// The authority of a root that is kept at `path`.
    ///
    /// # Errors
    /// It is the root of something else, or none.
    pub(crate) fn from_root(path: PathBuf, root: &Root, trust_domain: TrustDomain, clock: WallClock) -> Result<Self, CaError> {
        let bad = |reason: &dyn std::fmt::Display| CaError::Root { path: path.clone(), reason: reason.to_string() };
        let key = KeyPair::from_pem(&root.key).map_err(|error| bad(&error))?;
        let root = CertificateDer::from_pem_slice(root.certificate.as_bytes()).map_err(|error| bad(&error))?;
        let root_expires = check_root(&root, &key, &trust_domain, &clock).map_err(|reason| bad(&reason))?;
        let issuer = Issuer::from_ca_cert_der(&root, key).map_err(|error| bad(&error))?;
        Ok(Self { trust_domain, root, root_expires, issuer, clock })
    }

    /// Signs a leaf for `identity`, of which the caller knows that the asker is it.
    ///
    /// # Errors
    /// The request's signature does not fit its key.
    pub(crate) fn sign(&self, request: &[u8], identity: &SpiffeId, lifetime: Duration) -> Result<Signed, CaError> {
        // Reading a request verifies its signature.
        let request =
            CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request)).map_err(CaError::Request)?;
        self.leaf(&request.public_key, vec![uri(identity)?], PEER.to_vec(), lifetime)
    }

    /// A key and a leaf for `identity`, which is of this process itself.
    ///
    /// # Errors
    /// The environment has no randomness.
    pub(crate) fn issue(
        &self,
        identity: &SpiffeId,
        lifetime: Duration,
    ) -> Result<(Signed, PrivatePkcs8KeyDer<'static>), CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(CaError::Sign)?;
        let signed = self.leaf(&key, vec![uri(identity)?], PEER.to_vec(), lifetime)?;
        Ok((signed, PrivatePkcs8KeyDer::from(key.serialize_der())))
    }

    /// A key and a leaf for a server of this process's own, which is known by the names of hosts: for callers that are not of the mesh.
    ///
    /// # Errors
    /// The environment has no randomness, or a host's name is none.
    pub(crate) fn issue_for_hosts(
        &self,
        hosts: &[String],
        lifetime: Duration,
    ) -> Result<(Signed, PrivatePkcs8KeyDer<'static>), CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(CaError::Sign)?;
        let names = hosts.iter().map(|host| Ok(SanType::DnsName(host.as_str().try_into().map_err(CaError::Sign)?)));
        let signed =
            self.leaf(&key, names.collect::<Result<_, CaError>>()?, vec![ExtendedKeyUsagePurpose::ServerAuth], lifetime)?;
        Ok((signed, PrivatePkcs8KeyDer::from(key.serialize_der())))
    }

    /// The trust domain that it vouches for.
    pub(crate) fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The root, DER.
    pub(crate) fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// The root, PEM (RFC 7468).
    pub(crate) fn root_pem(&self) -> String {
        let base64 = base64::engine::general_purpose::STANDARD.encode(&self.root);
        let lines = base64.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok());
        let body: String = lines.map(|line| format!("{line}\n")).collect();
        format!("-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n")
    }

    /// When the root ends, as time since 1970-01-01T00:00:00Z.
    pub(crate) fn root_expires(&self) -> Duration {
        self.root_expires
    }

    /// Trust in this authority.
    ///
    /// # Errors
    /// Never: the root was checked when it was opened.
    pub(crate) fn bundles(&self) -> Result<Bundles, webpki::Error> {
        let mut bundles = Bundles::default();
        bundles.add(&self.trust_domain, &self.root)?;
        Ok(bundles)
    }

    fn leaf(
        &self,
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        uses: Vec<ExtendedKeyUsagePurpose>,
        lifetime: Duration,
    ) -> Result<Signed, CaError> {
        let now = self.clock.since_epoch();
        let expires = (now + lifetime).min(self.root_expires);
        let mut params = params(now.saturating_sub(SKEW), expires)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = uses;
        params.use_authority_key_identifier_extension = true;
        params.subject_alt_names = names;
        let leaf = params.signed_by(key, &self.issuer).map_err(CaError::Sign)?;
        Ok(Signed { chain: vec![leaf.der().clone()], expires: Duration::from_secs(expires.as_secs()) })
    }
}

fn uri(identity: &SpiffeId) -> Result<SanType, CaError> {
    Ok(SanType::URI(identity.to_string().try_into().map_err(CaError::Sign)?))
}

fn params(from: Duration, until: Duration) -> Result<CertificateParams, CaError> {
    let mut serial = [0_u8; 16];
    SystemRandom::new().fill(&mut serial).map_err(|_unspecified| CaError::Random)?;
    // RFC 5280, section 4.1.2.2: the serial number MUST be a positive integer.
    serial[0] = serial[0] & 0x7f | 0x40;
    let epoch = date_time_ymd(1970, 1, 1);
    let mut params = CertificateParams::default();
    params.not_before = epoch + Duration::from_secs(from.as_secs());
    params.not_after = epoch + Duration::from_secs(until.as_secs());
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name = DistinguishedName::new();
    Ok(params)
}

/// Says why a root cannot be used, or when it ends.
fn check_root(
    root: &CertificateDer<'_>,
    key: &KeyPair,
    trust_domain: &TrustDomain,
    clock: &WallClock,
) -> Result<Duration, String> {
    let (_rest, certificate) = x509_parser::parse_x509_certificate(root).map_err(|_not_der| "it is no certificate".to_owned())?;
    let names = certificate.subject_alternative_name().map_err(|_not_der| "its names cannot be read".to_owned())?;
    let expected = format!("spiffe://{trust_domain}");
    let mut names = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
        x509_parser::extensions::GeneralName::URI(uri) => Some(*uri),
        _other => None,
    });
    let found = names.next().unwrap_or("nothing");
    if found != expected {
        return Err(format!("it is the root of {found}, not of {expected}"));
    }
    if certificate.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
        return Err(format!("its key is not the one in {KEY}"));
    }
    let expires = Duration::from_secs(u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or_default());
    if expires <= clock.since_epoch() {
        return Err("it has expired".to_owned());
    }
    Ok(expires)
}

/// Workloads are servers and clients of each other.
const PEER: [ExtendedKeyUsagePurpose; 2] = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];

/// Files of the authority's folder.
const CERTIFICATE: &str = "root.pem";
const KEY: &str = "root.key";

const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// How far a certificate begins in the past, for clocks that are behind.
const SKEW: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use rustls::crypto::aws_lc_rs::default_provider;
    use rustls_pki_types::UnixTime;
    use webpki::KeyUsage;

    use super::*;
    use crate::identity::testing::clock;

    fn domain() -> TrustDomain {
        "cluster.local".parse().unwrap()
    }

    fn web() -> SpiffeId {
        "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
    }

    fn request(names: &[&str]) -> Vec<u8> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.subject_alt_names = names.iter().map(|name| SanType::URI((*name).try_into().unwrap())).collect();
        params.serialize_request(&key).unwrap().der().to_vec()
    }

    fn verified(authority: &Authority, signed: &Signed, clock: &WallClock) -> Result<SpiffeId, rustls::Error> {
        authority.bundles().unwrap().verify(
            &signed.chain[0],
            &signed.chain[1..],
            KeyUsage::client_auth(),
            &default_provider().signature_verification_algorithms,
            UnixTime::since_unix_epoch(clock.since_epoch()),
        )
    }

    #[test]
    fn a_root_is_made_once_and_kept_for_its_owner_alone() {
        let state = tempfile::tempdir().unwrap();
        let folder = state.path().join("ca");
        let first = Authority::open(&folder, domain(), clock()).unwrap();
        let signed = first.sign(&request(&[]), &web(), Duration::from_secs(60)).unwrap();
        let second = Authority::open(&folder, domain(), clock()).unwrap();
        assert_eq!(first.root(), second.root());
        assert_eq!(verified(&second, &signed, &clock()).unwrap(), web());
        assert_eq!(folder.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(folder.join(KEY).metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_leaf_says_what_we_say_whatever_its_request_asked_for() {
        let state = tempfile::tempdir().unwrap();
        let authority = Authority::open(state.path(), domain(), clock()).unwrap();
        let request = request(&["spiffe://cluster.local/ns/outrigger-system/sa/control"]);
        let signed = authority.sign(&request, &web(), Duration::from_secs(3600)).unwrap();
        assert_eq!(verified(&authority, &signed, &clock()).unwrap(), web());
        let (_, leaf) = x509_parser::parse_x509_certificate(&signed.chain[0]).unwrap();
        assert!(!leaf.is_ca());
        assert!(leaf.basic_constraints().unwrap().is_some());
        assert_eq!(signed.expires, clock().since_epoch() + Duration::from_secs(3600));
        let later = clock();
        later.advance(Duration::from_secs(3601));
        assert!(verified(&authority, &signed, &later).is_err());
    }

    #[test]
    fn a_request_whose_signature_does_not_fit_is_refused() {
        let state = tempfile::tempdir().unwrap();
        let authority = Authority::open(state.path(), domain(), clock()).unwrap();
        let mut forged = request(&[]);
        *forged.last_mut().unwrap() ^= 1;
        for bad in [forged, Vec::new(), b"garbage".to_vec()] {
            assert!(matches!(authority.sign(&bad, &web(), Duration::from_secs(60)), Err(CaError::Request(_))));
        }
    }

    #[test]
    fn the_root_of_another_trust_domain_is_not_taken_over() {
        let state = tempfile::tempdir().unwrap();
        Authority::open(state.path(), domain(), clock()).unwrap();
        let error = Authority::open(state.path(), "other.example".parse().unwrap(), clock()).err().unwrap().to_string();
        assert!(error.contains("it is the root of spiffe://cluster.local, not of spiffe://other.example"), "{error}");
        std::fs::write(state.path().join(KEY), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let error = Authority::open(state.path(), domain(), clock()).err().unwrap().to_string();
        assert!(error.contains("its key is not the one"), "{error}");
    }
}
