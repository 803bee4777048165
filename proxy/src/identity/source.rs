//! The own certificate, key and trust bundles: one cell that the Workload API fills, and the TLS configurations that
//! read it (SPIFFE Workload API standard, section 5.2).
//!
//! A rotation replaces the content of the cell: handshakes that begin later use the new certificate, connections that
//! stand go on. Sessions are never resumed, in either direction: a resumed session would carry on with the trust of a
//! bundle that may be gone.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use futures_util::StreamExt as _;
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::cipher_suite;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use tokio::sync::watch;
use tracing::{info, warn};
use webpki::KeyUsage;

use super::spiffe::{SpiffeId, TrustDomain};
use super::verify::{Bundles, ClientDemand, ClientVerifier, PeerError, ServerVerifier, identity_of};
use crate::base::clock::WallClock;

/// The own identity, as all TLS of this process uses it. Cheap to clone; all clones share one cell.
#[derive(Clone)]
pub(crate) struct Identity {
    trust_domain: TrustDomain,
    own: Arc<ArcSwapOption<Own>>,
    bundles: Arc<ArcSwap<Bundles>>,
    changed: watch::Sender<u64>,
    /// How often the own name or the authorities changed.
    trust: Arc<AtomicU64>,
    /// The only one that is taken from the Workload API, where it is known.
    only: Option<SpiffeId>,
    /// The authority that must not stand behind the Workload API, where there is one.
    apart_from: Option<CertificateDer<'static>>,
    /// Why the Workload API gives nothing just now.
    trouble: Arc<ArcSwapOption<String>>,
    clock: WallClock,
    provider: Arc<CryptoProvider>,
}

/// The own certificate.
#[derive(Debug)]
pub(crate) struct Own {
    pub(crate) id: SpiffeId,
    /// When it ends, since the epoch.
    pub(crate) expires: Duration,
    key: Arc<CertifiedKey>,
}

/// A peer's certificates, and when they were good.
#[derive(Clone, Debug)]
pub(crate) struct Vouched {
    chain: Vec<CertificateDer<'static>>,
    at: UnixTime,
    /// The [trust](Identity::trust_epoch) that they were looked at with, or an older one.
    epoch: u64,
}

/// Why an identity cannot be taken, or a TLS configuration not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    /// The Workload API does not answer. The environment is at fault: the node agent, or SPIRE.
    #[error("the workload API at {path} does not answer; is the node agent, or SPIRE's agent, running?")]
    WorkloadApi {
        path: String,
        #[source]
        source: Box<spiffe::WorkloadApiError>,
    },
    /// The Workload API answers, and gives nothing to this process.
    #[error("the workload API at {path} refuses this process: {said}")]
    Refused { path: String, said: String },
    /// The Workload API sent nothing to use.
    #[error("the workload API sent no certificate")]
    NoCertificate,
    /// A certificate that is not what it must be.
    #[error("the own certificate is not usable")]
    Certificate(#[from] PeerError),
    /// The key does not fit, or TLS refuses the parameters.
    #[error("TLS refuses the own certificate")]
    Tls(#[from] rustls::Error),
    /// The bundle holds something that is no authority.
    #[error("the trust bundle holds what is no authority")]
    Bundle(#[source] webpki::Error),
    /// The Workload API vouches for another trust domain.
    #[error("the own identity {0} is not of trust domain {1}")]
    ForeignTrustDomain(SpiffeId, TrustDomain),
    /// The Workload API names its workloads otherwise than the mesh does: nobody would expect this one anywhere.
    #[error("the own identity {0} is not of the form spiffe://{domain}/ns/NAMESPACE/sa/SERVICE-ACCOUNT", domain = .0.trust_domain())]
    Form(SpiffeId),
    /// The Workload API gives this process other identities than its own.
    #[error("the workload API gives this process {given}, and not {expected}")]
    AnotherIdentity { given: SpiffeId, expected: SpiffeId },
    /// What it signs for node agents would be believed of workloads, and the other way round.
    #[error(
        "the workload API vouches by the mesh's own authority, which signs for node agents; give SPIRE an authority of its own"
    )]
    SameAuthority,
}

impl IdentityError {
    fn of_workload_api(path: &std::path::Path, source: spiffe::WorkloadApiError) -> Self {
        let path = path.display().to_string();
        match source {
            // The client keeps nothing of the answer but this.
            spiffe::WorkloadApiError::NoIdentityIssued => Self::Refused {
                path,
                said: "no identity issued; it knows of no pod, or of no entry, that this process is of".to_owned(),
            },
            spiffe::WorkloadApiError::PermissionDenied(said) => Self::Refused { path, said },
            source if source.is_invalid_argument() => Self::Refused { path, said: source.to_string() },
            source => Self::WorkloadApi { path, source: Box::new(source) },
        }
    }
}

impl Identity {
    /// An identity that has nothing yet: every handshake fails until the first [`Self::publish`].
    pub(crate) fn new(trust_domain: TrustDomain, clock: WallClock) -> Self {
        Self {
            trust_domain,
            own: Arc::default(),
            bundles: Arc::default(),
            changed: watch::Sender::new(0),
            trust: Arc::default(),
            only: None,
            apart_from: None,
            trouble: Arc::default(),
            clock,
            provider: Arc::new(provider()),
        }
    }

    /// Takes no other identity than `id` from the Workload API, whatever else that has for this process.
    pub(crate) fn only(self, id: SpiffeId) -> Self {
        Self { only: Some(id), ..self }
    }

    /// Takes nothing from a Workload API that believes `authority`.
    pub(crate) fn apart_from(self, authority: &CertificateDer<'_>) -> Self {
        Self { apart_from: Some(authority.clone().into_owned()), ..self }
    }

    /// Why no peer would believe this process now; none where all is well.
    pub(crate) fn missing(&self) -> Option<String> {
        let why = |usual: &str| self.trouble.load_full().map_or_else(|| usual.to_owned(), |trouble| trouble.to_string());
        match self.own() {
            None => Some(format!("no identity yet: {}", why("the workload API has not answered"))),
            Some(own) if own.expires <= self.clock.since_epoch() => {
                Some(format!("the identity has ended: {}", why("the workload API has sent no other")))
            }
            Some(_good) => None,
        }
    }

    /// Why the Workload API gives nothing just now, whether what it gave is still good or not.
    pub(crate) fn trouble(&self) -> Option<Arc<String>> {
        self.trouble.load_full()
    }

    /// The own certificate, where there is one.
    pub(crate) fn own(&self) -> Option<Arc<Own>> {
        self.own.load_full()
    }

    /// Sees how often the identity changed.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Returns when there is a certificate. Cancel-safe.
    pub(crate) async fn arrived(&self) {
        if self.own.load().is_none() {
            // The sender is this one's own, so it is never gone.
            drop(self.changes().wait_for(|_count| self.own.load().is_some()).await);
        }
    }

    /// Counts changes of the own name and of the authorities that are believed. A certificate that is only renewed is none:
    /// what was opened under one count serves as long as the count stays.
    pub(crate) fn trust_epoch(&self) -> u64 {
        self.trust.load(Ordering::Acquire)
    }

    /// What a peer showed in a handshake that succeeded just now, and had not begun under a trust before `epoch`.
    pub(crate) fn vouch(&self, chain: Option<&[CertificateDer<'static>]>, epoch: u64) -> Vouched {
        Vouched { chain: chain.unwrap_or_default().to_vec(), at: UnixTime::since_unix_epoch(self.clock.since_epoch()), epoch }
    }

    /// Returns when no authority that is believed stands behind a peer any more. That its certificate ends while a
    /// connection stands is another matter: it was good when it was shown. Cancel-safe.
    pub(crate) async fn distrusted(&self, vouched: &Vouched) {
        let mut changes = self.changes();
        // The handshake verified them; to do it once more is a quarter of what a handshake costs.
        let mut epoch = vouched.epoch;
        loop {
            changes.mark_unchanged();
            let now = self.trust_epoch();
            if std::mem::replace(&mut epoch, now) != now && !self.believes(vouched) {
                return;
            }
            if changes.changed().await.is_err() {
                // The identity itself is gone, and with it whoever could change his mind.
                return std::future::pending().await;
            }
        }
    }

    fn believes(&self, vouched: &Vouched) -> bool {
        let Some((leaf, intermediates)) = vouched.chain.split_first() else { return false };
        let algorithms = &self.provider.signature_verification_algorithms;
        // A workload's certificate is good for both sides of a connection.
        self.bundles.load().verify(leaf, intermediates, KeyUsage::client_auth(), algorithms, vouched.at).is_ok()
    }

    /// Takes a certificate chain (leaf first), its PKCS#8 key, and bundles, all DER, from now on.
    ///
    /// # Errors
    /// Something of it is unusable; what was there before stays.
    pub(crate) fn publish(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: PrivatePkcs8KeyDer<'static>,
        bundles: Bundles,
    ) -> Result<(), IdentityError> {
        let leaf = chain.first().ok_or(IdentityError::NoCertificate)?;
        let id = identity_of(leaf)?;
        if id.trust_domain() != self.trust_domain {
            return Err(IdentityError::ForeignTrustDomain(id, self.trust_domain.clone()));
        }
        let expires = expiry(leaf)?;
        let key = CertifiedKey::from_der(chain, PrivateKeyDer::Pkcs8(key), &self.provider)?;
        let differs = *self.bundles.load_full() != bundles || self.own().is_none_or(|own| own.id != id);
        // Bundles first: a peer must never meet the new certificate while its issuer is still unknown here.
        self.bundles.store(Arc::new(bundles));
        self.own.store(Some(Arc::new(Own { id, expires, key: Arc::new(key) })));
        // Who read the new count has seen what it counts.
        if differs {
            self.trust.fetch_add(1, Ordering::Release);
        }
        self.changed.send_modify(|count| *count = count.wrapping_add(1));
        Ok(())
    }

    /// Trusts `bundles` from now on and shows no certificate: for a process that has none yet.
    pub(crate) fn trust(&self, bundles: Bundles) {
        self.bundles.store(Arc::new(bundles));
        self.trust.fetch_add(1, Ordering::Release);
        self.changed.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// For a server: TLS 1.3, a client certificate of the own trust domain as `demand` says, one of `alpn`.
    ///
    /// # Errors
    /// TLS refuses the parameters.
    pub(crate) fn server_config(&self, demand: ClientDemand, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, IdentityError> {
        let verifier = ClientVerifier::new(
            Arc::clone(&self.bundles),
            self.trust_domain.clone(),
            demand,
            self.provider.signature_verification_algorithms,
        );
        let mut config = ServerConfig::builder_with_details(Arc::clone(&self.provider), Arc::new(Time(self.clock.clone())))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(Resolver(Arc::clone(&self.own))));
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// For a client that dials exactly `expected`, with one of `alpn`.
    ///
    /// # Errors
    /// TLS refuses the parameters.
    pub(crate) fn client_config(&self, expected: &SpiffeId, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, IdentityError> {
        let verifier =
            ServerVerifier::new(Arc::clone(&self.bundles), expected.clone(), self.provider.signature_verification_algorithms);
        let mut config = ClientConfig::builder_with_details(Arc::clone(&self.provider), Arc::new(Time(self.clock.clone())))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(Resolver(Arc::clone(&self.own))));
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        config.resumption = Resumption::disabled();
        // Who the peer is stands in its certificate; a name in clear would only tell observers whom we call.
        config.enable_sni = false;
        Ok(Arc::new(config))
    }

    /// Follows the Workload API at the Unix socket `path` for ever: connects, takes every update, connects again. What
    /// was taken last stays in force meanwhile. Cancel-safe.
    pub(crate) async fn follow(&self, path: PathBuf) {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.follow_once(&path).await {
                Ok(updates) if updates > 0 => pause = FIRST_PAUSE,
                Ok(_nothing) => {}
                Err(error) => self.troubled(&error, "no identity from the workload API"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn follow_once(&self, path: &std::path::Path) -> Result<u64, IdentityError> {
        let failed = |source| IdentityError::of_workload_api(path, source);
        let client = spiffe::WorkloadApiClient::connect_to(format!("unix:{}", path.display())).await.map_err(failed)?;
        let mut contexts = std::pin::pin!(client.stream_x509_contexts().await.map_err(failed)?);
        let mut updates = 0;
        // The API pushes a rotation when there is one: waiting without a deadline is what it is for.
        while let Some(context) = contexts.next().await {
            let context = context.map_err(failed)?;
            match self.take(&context) {
                Ok(()) => {
                    updates += 1;
                    self.trouble.store(None);
                    if let Some(own) = self.own() {
                        info!(identity = %own.id, expires_unix = own.expires.as_secs(), "identity taken");
                    }
                }
                Err(error) => self.troubled(&error, "an identity was refused, the last one stays"),
            }
        }
        Ok(updates)
    }

    fn troubled(&self, error: &IdentityError, what: &str) {
        warn!(error = error as &dyn std::error::Error, "{what}");
        self.trouble.store(Some(Arc::new(error.to_string())));
    }

    fn take(&self, context: &spiffe::X509Context) -> Result<(), IdentityError> {
        let svid = self.choose(context.svids())?;
        let mut bundles = Bundles::default();
        // Others' bundles say nothing here: a peer of another trust domain is refused whatever vouches for it.
        let own = context.bundle_set().iter().filter(|(domain, _bundle)| domain.as_str() == self.trust_domain.as_str());
        for authority in own.flat_map(|(_domain, bundle)| bundle.authorities()) {
            bundles.add(&self.trust_domain, authority.as_bytes()).map_err(IdentityError::Bundle)?;
        }
        if let Some(authority) = &self.apart_from
            && bundles.hold_key_of(authority).map_err(IdentityError::Bundle)?
        {
            return Err(IdentityError::SameAuthority);
        }
        let chain = svid.cert_chain().iter().map(|certificate| CertificateDer::from(certificate.as_bytes().to_vec()));
        let key = PrivatePkcs8KeyDer::from(svid.private_key().as_bytes().to_vec());
        self.publish(chain.collect(), key, bundles)
    }

    /// Of what the Workload API has for this process, the one that it is in the mesh.
    fn choose<'a>(&self, given: &'a [Arc<spiffe::X509Svid>]) -> Result<&'a spiffe::X509Svid, IdentityError> {
        let mut fault = None;
        for svid in given {
            let Ok(id) = svid.spiffe_id().to_string().parse::<SpiffeId>() else { continue };
            let refused = if id.trust_domain() != self.trust_domain {
                IdentityError::ForeignTrustDomain(id, self.trust_domain.clone())
            } else if let Some(expected) = self.only.as_ref().filter(|only| **only != id) {
                IdentityError::AnotherIdentity { given: id, expected: expected.clone() }
            } else if id.account().is_none() {
                IdentityError::Form(id)
            } else {
                return Ok(svid);
            };
            fault.get_or_insert(refused);
        }
        Err(fault.unwrap_or(IdentityError::NoCertificate))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("trust_domain", &self.trust_domain)
            .field("id", &self.own.load().as_ref().map(|own| own.id.clone()))
            .finish_non_exhaustive()
    }
}

/// Shows whatever certificate the cell holds at that moment.
#[derive(Debug)]
struct Resolver(Arc<ArcSwapOption<Own>>);

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load().as_ref().map(|own| Arc::clone(&own.key))
    }
}

impl ResolvesClientCert for Resolver {
    fn resolve(&self, _root_hint_subjects: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.load().as_ref().map(|own| Arc::clone(&own.key))
    }

    fn has_certs(&self) -> bool {
        self.0.load().is_some()
    }
}

/// Wall time for rustls, through the one door.
#[derive(Debug)]
struct Time(WallClock);

impl TimeProvider for Time {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(self.0.since_epoch()))
    }
}

fn expiry(leaf: &CertificateDer<'_>) -> Result<Duration, IdentityError> {
    let (_rest, certificate) = x509_parser::parse_x509_certificate(leaf).map_err(|_not_der| PeerError::Unreadable)?;
    let seconds = certificate.validity().not_after.timestamp();
    // A date before 1970 has expired all the same.
    Ok(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

/// Between two tries to reach the Workload API.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What is offered, the cheapest first: a handshake hashes a few kilobytes, and processors do that for SHA-256 by themselves.
fn provider() -> CryptoProvider {
    let suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    CryptoProvider { cipher_suites: suites, ..rustls::crypto::aws_lc_rs::default_provider() }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    use super::super::testing::{Authority, Leaf, NOW, clock};
    use super::*;

    const ALPN: &[&[u8]] = &[b"outrigger-h2"];

    fn id(name: &str) -> SpiffeId {
        format!("spiffe://cluster.local/ns/shop/sa/{name}").parse().unwrap()
    }

    fn identity(authority: &Authority, leaf: &Leaf) -> Identity {
        let identity = Identity::new("cluster.local".parse().unwrap(), clock());
        authority.issue_to(&identity, leaf, &[authority]);
        identity
    }

    /// A handshake of `client`, which expects `expected`, with `server`; the ends, or what either side said.
    async fn shake(
        client: &Identity,
        expected: &SpiffeId,
        server: &Identity,
    ) -> Result<
        (tokio_rustls::client::TlsStream<tokio::io::DuplexStream>, tokio_rustls::server::TlsStream<tokio::io::DuplexStream>),
        String,
    > {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let name = rustls_pki_types::ServerName::try_from("outrigger").unwrap();
        let connector = TlsConnector::from(client.client_config(expected, ALPN).unwrap());
        let acceptor = TlsAcceptor::from(server.server_config(ClientDemand::Certificate, ALPN).unwrap());
        let (near, far) = tokio::join!(
            async {
                let mut stream = connector.connect(name, near).await.map_err(|error| format!("client: {}", said(&error)))?;
                // In TLS 1.3 the client is told of a refused certificate only when it reads.
                stream.write_all(b"?").await.map_err(|error| format!("client: {}", said(&error)))?;
                let mut answer = [0];
                stream.read_exact(&mut answer).await.map_err(|error| format!("client: {}", said(&error)))?;
                Ok::<_, String>(stream)
            },
            async {
                let mut stream = acceptor.accept(far).await.map_err(|error| format!("server: {}", said(&error)))?;
                let mut question = [0];
                stream.read_exact(&mut question).await.map_err(|error| format!("server: {}", said(&error)))?;
                stream.write_all(b"!").await.map_err(|error| format!("server: {}", said(&error)))?;
                Ok::<_, String>(stream)
            }
        );
        match (near, far) {
            (Ok(near), Ok(far)) => Ok((near, far)),
            // The side that refused knows why; the other one only hears an alert.
            (Err(near), Err(far)) => Err(if near.contains("Alert") { far } else { near }),
            (Err(one), Ok(_)) | (Ok(_), Err(one)) => Err(one),
        }
    }

    fn said(error: &std::io::Error) -> String {
        format!("{error:?}")
    }

    #[test]
    fn a_refusal_of_the_workload_api_is_told_as_one() {
        let told = |source| IdentityError::of_workload_api(std::path::Path::new("/run/w.sock"), source).to_string();
        assert!(told(spiffe::WorkloadApiError::NoIdentityIssued).contains("refuses this process: no identity issued"));
        assert!(told(spiffe::WorkloadApiError::PermissionDenied("not you".into())).ends_with("refuses this process: not you"));
        assert!(told(spiffe::WorkloadApiError::EmptyResponse).contains("is the node agent, or SPIRE's agent, running?"));
    }

    #[tokio::test]
    async fn two_workloads_of_one_trust_domain_meet() {
        let authority = Authority::new();
        let (web, api) = (identity(&authority, &Leaf::workload("web")), identity(&authority, &Leaf::workload("api")));
        let (near, far) = shake(&web, &id("api"), &api).await.unwrap();
        assert_eq!(identity_of(&near.get_ref().1.peer_certificates().unwrap()[0]).unwrap(), id("api"));
        assert_eq!(identity_of(&far.get_ref().1.peer_certificates().unwrap()[0]).unwrap(), id("web"));
        assert_eq!(near.get_ref().1.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
        assert_eq!(near.get_ref().1.alpn_protocol(), Some(b"outrigger-h2".as_slice()));
    }

    #[tokio::test]
    async fn a_server_with_another_identity_is_refused() {
        let authority = Authority::new();
        let (web, api) = (identity(&authority, &Leaf::workload("web")), identity(&authority, &Leaf::workload("api")));
        let error = shake(&web, &id("pay"), &api).await.unwrap_err();
        assert!(error.contains("client:") && error.contains("WrongIdentity"), "{error}");
    }

    #[tokio::test]
    async fn a_peer_of_another_trust_domain_is_refused() {
        let (ours, theirs) = (Authority::new(), Authority::new());
        let api = identity(&ours, &Leaf::workload("api"));
        let foreign = Identity::new("other.example".parse().unwrap(), clock());
        let leaf = Leaf { names: vec!["spiffe://other.example/ns/shop/sa/web".to_owned()], ..Leaf::workload("web") };
        theirs.issue_to(&foreign, &leaf, &[&ours, &theirs]);
        let error = shake(&foreign, &id("api"), &api).await.unwrap_err();
        assert!(error.contains("server:") && error.contains("ForeignTrustDomain"), "{error}");
    }

    #[tokio::test]
    async fn our_name_signed_by_another_authority_is_refused() {
        let (ours, theirs) = (Authority::new(), Authority::new());
        let api = identity(&ours, &Leaf::workload("api"));
        let forged = Identity::new("cluster.local".parse().unwrap(), clock());
        theirs.issue_to(&forged, &Leaf::workload("web"), &[&ours]);
        let error = shake(&forged, &id("api"), &api).await.unwrap_err();
        assert!(error.contains("server:") && (error.contains("UnknownIssuer") || error.contains("Signature")), "{error}");
    }

    #[tokio::test]
    async fn an_expired_certificate_is_refused() {
        let authority = Authority::new();
        let api = identity(&authority, &Leaf::workload("api"));
        let web = identity(&authority, &Leaf { until: NOW - 60, ..Leaf::workload("web") });
        let error = shake(&web, &id("api"), &api).await.unwrap_err();
        assert!(error.contains("server:") && error.contains("Expired"), "{error}");
    }

    #[tokio::test]
    async fn a_certificate_expires_by_the_wall_clock() {
        let authority = Authority::new();
        let clock = clock();
        let api = Identity::new("cluster.local".parse().unwrap(), clock.clone());
        authority.issue_to(&api, &Leaf::workload("api"), &[&authority]);
        let web = identity(&authority, &Leaf::workload("web"));
        assert!(shake(&web, &id("api"), &api).await.is_ok());
        clock.advance(Duration::from_secs(2 * 3600));
        let error = shake(&web, &id("api"), &api).await.unwrap_err();
        assert!(error.contains("server:") && error.contains("Expired"), "{error}");
    }

    #[tokio::test]
    async fn a_client_without_certificate_is_refused() {
        let authority = Authority::new();
        let api = identity(&authority, &Leaf::workload("api"));
        let nobody = Identity::new("cluster.local".parse().unwrap(), clock());
        nobody.trust(authority.bundles(&["cluster.local"]));
        let error = shake(&nobody, &id("api"), &api).await.unwrap_err();
        assert!(error.contains("server:") && error.contains("NoCertificatesPresented"), "{error}");
    }

    #[tokio::test]
    async fn a_certificate_with_two_names_or_none_is_refused() {
        let authority = Authority::new();
        let api = identity(&authority, &Leaf::workload("api"));
        for names in [vec!["spiffe://cluster.local/ns/a/sa/b".to_owned(), "spiffe://cluster.local/ns/a/sa/c".to_owned()], vec![]]
        {
            let count = names.len();
            let web = identity(&authority, &Leaf::workload("web"));
            let (chain, key) = authority.issue(&Leaf { names, ..Leaf::workload("web") });
            // Nobody may publish such a certificate, so it is slipped in behind the door.
            assert!(web.publish(chain.clone(), key.clone_key(), authority.bundles(&["cluster.local"])).is_err());
            let certified = CertifiedKey::from_der(chain, PrivateKeyDer::Pkcs8(key), &web.provider).unwrap();
            web.own.store(Some(Arc::new(Own { id: id("web"), expires: Duration::MAX, key: Arc::new(certified) })));
            let error = shake(&web, &id("api"), &api).await.unwrap_err();
            assert!(error.contains("server:") && error.contains(&format!("UriNames({count})")), "{error}");
        }
    }

    #[tokio::test]
    async fn a_live_connection_outlasts_rotations_and_new_ones_show_the_new_certificate() {
        let authority = Authority::new();
        let (web, api) = (identity(&authority, &Leaf::workload("web")), identity(&authority, &Leaf::workload("api")));
        let (mut near, mut far) = shake(&web, &id("api"), &api).await.unwrap();
        let first = near.get_ref().1.peer_certificates().unwrap()[0].clone();
        let next = Authority::new();
        for _ in 0..3 {
            next.issue_to(&api, &Leaf::workload("api"), &[&authority, &next]);
            next.issue_to(&web, &Leaf::workload("web"), &[&authority, &next]);
        }
        near.write_all(b"still").await.unwrap();
        near.flush().await.unwrap();
        let mut heard = [0; 5];
        far.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"still");
        let (near, _far) = shake(&web, &id("api"), &api).await.unwrap();
        assert_ne!(near.get_ref().1.peer_certificates().unwrap()[0], first);
    }

    #[tokio::test]
    async fn an_authority_that_left_the_bundle_is_refused_by_the_very_same_configuration() {
        let (old, new) = (Authority::new(), Authority::new());
        let (web, api) = (identity(&old, &Leaf::workload("web")), identity(&old, &Leaf::workload("api")));
        let config = web.client_config(&id("api"), ALPN).unwrap();
        let server = api.server_config(ClientDemand::Certificate, ALPN).unwrap();
        let connect = async || {
            let (near, far) = tokio::io::duplex(64 * 1024);
            let name = rustls_pki_types::ServerName::try_from("outrigger").unwrap();
            let (client, served) = tokio::join!(
                TlsConnector::from(Arc::clone(&config)).connect(name, near),
                TlsAcceptor::from(Arc::clone(&server)).accept(far)
            );
            client.is_ok() && served.is_ok()
        };
        assert!(connect().await);
        new.issue_to(&api, &Leaf::workload("api"), &[&new]);
        new.issue_to(&web, &Leaf::workload("web"), &[&new]);
        assert!(connect().await);
        old.issue_to(&web, &Leaf::workload("web"), &[&new]);
        assert!(!connect().await);
    }
}
