//! The control plane's certificate authority, as the agent uses it: proves the node with its join token (on Kubernetes its
//! service account token, which the kubelet replaces), keeps the
//! node's own certificate fresh, has workloads' certificates signed with it, and follows the trust bundle.
//!
//! The control plane proves its identity in every handshake, by a chain to the bundle and its SPIFFE ID. Everything
//! here tries again for ever, with a growing pause: what was obtained stays in use meanwhile.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};
use tracing::{info, warn};

use super::identities::{self, IssueError, Request, Svid};
use crate::base::backoff::Backoff;
use crate::base::clock::WallClock;
use crate::base::random::Dice;
use crate::delta::authority as proto;
use crate::delta::transport::{ALPN, ALPN_AUTHORITY};
use crate::identity::source::Identity;
use crate::identity::spiffe::{SpiffeId, TrustDomain};
use crate::identity::verify::Bundles;
use crate::model::pod_record::PodRecord;

/// The agent's way to the authority. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Authority(Arc<Shared>);

/// How to reach it.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// `HOST:PORT`.
    pub(crate) control: String,
    pub(crate) trust_domain: TrustDomain,
    /// The node's name.
    pub(crate) node: String,
    /// The file with the join token.
    pub(crate) token: PathBuf,
    /// The file with the certificate that the first handshake trusts.
    pub(crate) root: PathBuf,
}

/// Authorities of the own trust domain, DER.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Bundle(pub(crate) Vec<Vec<u8>>);

/// Why the authority did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AuthorityError {
    /// The environment: a file of the mesh's state.
    #[error("cannot read {path}; the control plane makes it when it starts")]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The environment: the control plane is away, or not who it must be.
    #[error("the control plane at {control} does not answer as {expected}")]
    Unreachable {
        control: String,
        expected: SpiffeId,
        #[source]
        source: tonic::transport::Error,
    },
    /// The control plane said no.
    #[error("the control plane refuses: {0}")]
    Refused(String),
    /// A certificate or bundle that cannot be used.
    #[error("the control plane's answer is not usable")]
    Answer(#[from] IssueError),
    /// Ours: the parameters of TLS.
    #[error("cannot speak TLS to the control plane")]
    Tls(#[from] crate::identity::source::IdentityError),
}

struct Shared {
    config: Config,
    identity: Identity,
    control_id: SpiffeId,
    node_id: SpiffeId,
    /// A connection that shows the node's certificate; `None` before the node joined.
    joined: watch::Sender<Option<Channel>>,
    bundle: watch::Sender<Bundle>,
    clock: WallClock,
    dice: Mutex<Dice>,
}

impl Shared {
    /// Agents of many nodes must not come back in step.
    async fn pause(&self, backoff: &mut Backoff) {
        let chance = self.dice.lock().fraction();
        tokio::time::sleep(backoff.jittered(chance)).await;
    }
}

impl Authority {
    /// Reaches for nothing yet: [`Self::keep_joined`] does.
    ///
    /// # Errors
    /// The node's name cannot stand in an identity.
    pub(crate) fn new(config: Config, clock: WallClock, dice: Dice) -> Result<Self, crate::identity::spiffe::SpiffeError> {
        let control = crate::base::names::Named::new("outrigger-system", "control");
        let control_id = config.trust_domain.service_account(&control)?;
        let node_id = config.trust_domain.node(&config.node)?;
        let identity = Identity::new(config.trust_domain.clone(), clock.clone());
        let (joined, bundle) = (watch::Sender::new(None), watch::Sender::default());
        Ok(Self(Arc::new(Shared { config, identity, control_id, node_id, joined, bundle, clock, dice: Mutex::new(dice) })))
    }

    /// The trust bundle, once there is one, and its changes.
    pub(crate) fn bundle(&self) -> watch::Receiver<Bundle> {
        self.0.bundle.subscribe()
    }

    /// The node's name.
    pub(crate) fn node(&self) -> &str {
        &self.0.config.node
    }

    /// Did the node join?
    pub(crate) fn is_joined(&self) -> bool {
        self.0.joined.borrow().is_some()
    }

    /// The trust domain of everything that it signs.
    pub(crate) fn trust_domain(&self) -> &TrustDomain {
        &self.0.config.trust_domain
    }

    /// Joins, and joins again with a new key at half of the certificate's life, for ever. Cancel-safe.
    pub(crate) async fn keep_joined(&self) {
        let mut backoff = BACKOFF;
        loop {
            match self.join().await {
                Ok(svid) => {
                    info!(id = %svid.id, "node joined");
                    backoff.reset();
                    let fraction = self.0.dice.lock().fraction();
                    tokio::time::sleep(svid.renew_in(self.0.clock.since_epoch(), fraction)).await;
                }
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "the node could not join");
                    self.0.pause(&mut backoff).await;
                }
            }
        }
    }

    /// Follows the trust bundle for ever. Cancel-safe.
    pub(crate) async fn follow_bundle(&self) {
        let mut backoff = BACKOFF;
        loop {
            match self.follow_bundle_once().await {
                Ok(updates) if updates > 0 => backoff.reset(),
                Ok(_nothing) => {}
                Err(error) => warn!(error = &error as &dyn std::error::Error, "the trust bundle is not followed"),
            }
            self.0.pause(&mut backoff).await;
        }
    }

    /// A certificate for the workload `id`, with a key that is made here. Waits for the node to join, and tries until it
    /// succeeds. Cancel-safe.
    pub(crate) async fn issue(&self, id: &SpiffeId, record: &PodRecord) -> Svid {
        let mut backoff = BACKOFF;
        loop {
            match self.issue_once(id, record).await {
                Ok(svid) => return svid,
                Err(error) => {
                    warn!(%id, error = &error as &dyn std::error::Error, "no certificate for a pod");
                    self.0.pause(&mut backoff).await;
                }
            }
        }
    }

    /// Tells where a pod of Kubernetes is reached. Waits for the node to join, and tries until it succeeds. Cancel-safe.
    pub(crate) async fn place(&self, record: &PodRecord) {
        let Some(pod) = told(record) else { return };
        let mut backoff = BACKOFF;
        loop {
            let asked = self.client().await.place_pod(proto::PlacePodRequest { pod: Some(pod.clone()) }).await;
            let Err(status) = asked else { return };
            warn!(pod = %record.named(), error = %refused(&status), "the control plane is not told where a pod is");
            self.0.pause(&mut backoff).await;
        }
    }

    /// When a certificate is to be replaced, from now.
    pub(crate) fn renew_in(&self, svid: &Svid) -> Duration {
        svid.renew_in(self.0.clock.since_epoch(), self.0.dice.lock().fraction())
    }

    async fn join(&self) -> Result<Svid, AuthorityError> {
        let Shared { config, identity, node_id, .. } = &*self.0;
        let read =
            |path: &PathBuf| std::fs::read_to_string(path).map_err(|source| AuthorityError::File { path: path.clone(), source });
        let token = read(&config.token)?;
        if self.0.bundle.borrow().0.is_empty() {
            let pem = read(&config.root)?;
            let root = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_not_pem| IssueError::NoCertificate)?;
            identity.trust(self.bundles(&Bundle(vec![root.to_vec()]))?);
        }
        let request = Request::new(node_id)?;
        // A connection of its own: the one in use shows the former certificate until its last call has ended.
        let mut client = proto::authority_client::AuthorityClient::new(self.dial().await?);
        let question =
            proto::JoinNodeRequest { token: token.trim().to_owned(), node: config.node.clone(), csr: request.csr.clone() };
        let answer = client.join_node(question).await.map_err(|status| refused(&status))?.into_inner();
        let bundle = answer.bundle.map(|bundle| Bundle(bundle.authorities)).unwrap_or_default();
        let svid = request.accept(answer.chain)?;
        let chain = svid.chain.iter().map(|der| CertificateDer::from(der.clone())).collect();
        identity.publish(chain, PrivatePkcs8KeyDer::from(svid.key.clone()), self.bundles(&bundle)?)?;
        self.0.bundle.send_if_modified(|current| replace(current, bundle));
        let channel = self.dial().await?;
        self.0.joined.send_replace(Some(channel));
        Ok(svid)
    }

    async fn issue_once(&self, id: &SpiffeId, record: &PodRecord) -> Result<Svid, AuthorityError> {
        let mut client = self.client().await;
        let request = Request::new(id)?;
        let question = proto::SignWorkloadRequest { spiffe_id: id.to_string(), csr: request.csr.clone(), pod: told(record) };
        let answer = client.sign_workload(question).await.map_err(|status| refused(&status))?.into_inner();
        Ok(request.accept(answer.chain)?)
    }

    async fn follow_bundle_once(&self) -> Result<u64, AuthorityError> {
        let mut client = self.client().await;
        let answer = client.watch_bundle(proto::WatchBundleRequest {}).await.map_err(|status| refused(&status))?;
        let mut stream = answer.into_inner();
        let mut updates = 0;
        // Pushed when it changes, which may be in a year; the connection's own keep-alive tells whether it still stands.
        while let Some(bundle) = stream.message().await.map_err(|status| refused(&status))? {
            let bundle = Bundle(bundle.authorities);
            self.0.identity.trust(self.bundles(&bundle)?);
            if self.0.bundle.send_if_modified(|current| replace(current, bundle)) {
                info!("trust bundle changed");
            }
            updates += 1;
        }
        Ok(updates)
    }

    /// A client that shows the node's certificate. Waits for the node to join.
    async fn client(&self) -> proto::authority_client::AuthorityClient<Channel> {
        let mut joined = self.0.joined.subscribe();
        loop {
            if let Some(channel) = &*joined.borrow_and_update() {
                return proto::authority_client::AuthorityClient::new(channel.clone());
            }
            if joined.changed().await.is_err() {
                // The sender is ours and lives as long as we do.
                std::future::pending::<()>().await;
            }
        }
    }

    async fn dial(&self) -> Result<Channel, AuthorityError> {
        let unreachable = |source| AuthorityError::Unreachable {
            control: self.0.config.control.clone(),
            expected: self.0.control_id.clone(),
            source,
        };
        let endpoint = Endpoint::from_shared(format!("http://{}", self.0.config.control))
            .map_err(unreachable)?
            .connect_timeout(CONNECT_AT_MOST)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        let shared = Arc::clone(&self.0);
        let connector = tower::service_fn(move |_uri: http::Uri| {
            let shared = Arc::clone(&shared);
            async move {
                let config =
                    shared.identity.client_config(&shared.control_id, &[ALPN_AUTHORITY, ALPN]).map_err(std::io::Error::other)?;
                let tcp = TcpStream::connect(&shared.config.control).await?;
                tcp.set_nodelay(true)?;
                let name = ServerName::try_from("control.outrigger-system").map_err(std::io::Error::other)?;
                let tls = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await?;
                Ok::<_, std::io::Error>(TokioIo::new(tls))
            }
        });
        endpoint.connect_with_connector(connector).await.map_err(unreachable)
    }

    fn bundles(&self, bundle: &Bundle) -> Result<Bundles, IssueError> {
        identities::bundles(self.trust_domain(), bundle.0.iter().map(Vec::as_slice))
    }
}

/// What the control plane hears of a pod of Kubernetes sooner from here than from the API server.
fn told(record: &PodRecord) -> Option<proto::Pod> {
    let uid = record.uid.clone()?;
    let addresses = record.addresses.iter().map(ToString::to_string).collect();
    Some(proto::Pod { namespace: record.namespace.clone(), name: record.name.clone(), uid, addresses })
}

fn replace(current: &mut Bundle, new: Bundle) -> bool {
    let changed = *current != new;
    *current = new;
    changed
}

fn refused(status: &tonic::Status) -> AuthorityError {
    AuthorityError::Refused(format!("{}: {}", status.code(), status.message()))
}

const BACKOFF: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
const CONNECT_AT_MOST: Duration = Duration::from_secs(5);
const KEEP_ALIVE: Duration = Duration::from_secs(10);
