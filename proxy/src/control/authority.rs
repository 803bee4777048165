//! The authority as node agents reach it: joining by the operator's token, certificates for the workloads of a node.
//!
//! A token proves a node (`join`); the node's certificate proves every later call; the world says which identities there are to
//! sign for, and on Kubernetes on which node. What a caller says about itself is only compared with that. Where workloads have
//! their identities from another Workload API, none of them is signed for, and node agents alone are listened to.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use parking_lot::Mutex;
use serde::Serialize;
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::ca::{Authority as Ca, CaError, Signed};
use super::join::{Join, NotJoined};
use super::metrics::Metrics;
use super::placed::Placed;
use super::store::Store;
use crate::base::clock::WallClock;
use crate::base::drain::DrainGuard;
use crate::base::names::check_uid;
use crate::delta::authority::authority_server::Authority;
use crate::delta::authority::{
    Bundle, Certificate, JoinNodeRequest, PlacePodRequest, PlacePodResponse, Pod, SignWorkloadRequest, WatchBundleRequest,
};
use crate::delta::transport::{PeerInfo, Voucher};
use crate::identity::spiffe::SpiffeId;
use crate::model::{Kind, Resource};

/// Serves the authority.
pub(crate) struct Signer {
    pub(crate) ca: Arc<Ca>,
    pub(crate) store: Arc<Store>,
    /// What proves a new node.
    pub(crate) join: Join,
    /// Where pods are by their nodes' word.
    pub(crate) placed: Arc<Placed>,
    /// How long a workload's certificate is good; none is signed where workloads have theirs from elsewhere.
    pub(crate) svid_lifetime: Option<Duration>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) nodes: Arc<Nodes>,
    pub(crate) clock: WallClock,
    pub(crate) stop: DrainGuard,
}

/// The node agents that follow the trust bundle: those that are there.
#[derive(Debug, Default)]
pub(crate) struct Nodes(Mutex<BTreeMap<u64, NodeReport>>);

/// One connected node agent.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NodeReport {
    pub(crate) name: String,
    pub(crate) address: Option<String>,
    /// Seconds since 1970-01-01T00:00:00Z.
    pub(crate) connected_since: u64,
    pub(crate) certificate_expires: Option<u64>,
}

impl Nodes {
    /// Who is connected, each node once.
    pub(crate) fn reports(&self) -> Vec<NodeReport> {
        let newest: BTreeMap<String, NodeReport> =
            self.0.lock().values().map(|report| (report.name.clone(), report.clone())).collect();
        newest.into_values().collect()
    }
}

/// A node's place among those that are connected; given up when it is dropped.
struct NodeSeat {
    number: u64,
    nodes: Arc<Nodes>,
}

impl NodeSeat {
    fn take(nodes: &Arc<Nodes>, report: NodeReport) -> Self {
        let mut open = nodes.0.lock();
        let number = open.last_key_value().map_or(0, |(last, _)| last + 1);
        open.insert(number, report);
        Self { number, nodes: Arc::clone(nodes) }
    }
}

impl Drop for NodeSeat {
    fn drop(&mut self) {
        self.nodes.0.lock().remove(&self.number);
    }
}

impl Signer {
    fn certificate(&self, signed: Signed) -> Certificate {
        Certificate { chain: signed.chain.iter().map(|der| der.to_vec()).collect(), bundle: Some(self.bundle()) }
    }

    fn bundle(&self) -> Bundle {
        Bundle { trust_domain: self.ca.trust_domain().to_string(), authorities: vec![self.ca.root().to_vec()] }
    }

    /// `node` says where a pod of its own is.
    fn place(&self, pod: &Pod, node: &str) -> Result<(), Status> {
        check_uid(&pod.uid).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let addresses: Vec<IpAddr> =
            pod.addresses.iter().take(ADDRESSES_MAX).filter_map(|address| address.parse().ok()).collect();
        self.placed.put(&pod.uid, node, addresses);
        Ok(())
    }

    /// Does a workload with a sidecar have this identity, on that node if each is bound to one?
    fn known(&self, identity: &SpiffeId, node: &str) -> bool {
        let is_there = |at: Option<&str>| at.map_or(!self.join.binds_to_nodes(), |at| at == node);
        let world = self.store.world();
        world.resources().by_key.iter().any(|(key, resource)| {
            key.kind == Kind::Workload
                && matches!(resource.as_ref(), Resource::Workload(workload)
                    if workload.spec.transport.has_sidecar()
                        && is_there(workload.spec.node.as_deref())
                        && identity.account() == Some((&key.name.namespace, workload.spec.account())))
        })
    }

    /// Waits for a workload of this identity: a pod's node may ask before the pod's record was read.
    async fn wait_until_known(&self, identity: &SpiffeId, node: &str) -> bool {
        let mut changes = self.store.changes();
        let known = async {
            loop {
                changes.mark_unchanged();
                if self.known(identity, node) {
                    return true;
                }
                if changes.changed().await.is_err() {
                    return false;
                }
            }
        };
        tokio::time::timeout(KNOWN_WITHIN, known).await.unwrap_or(false)
    }
}

#[tonic::async_trait]
impl Authority for Signer {
    type WatchBundleStream = Pin<Box<dyn Stream<Item = Result<Bundle, Status>> + Send>>;

    async fn join_node(&self, request: Request<JoinNodeRequest>) -> Result<Response<Certificate>, Status> {
        let address = peer(&request)?.address;
        let JoinNodeRequest { token, node, csr } = request.into_inner();
        let node = match self.join.node(&token, &node).await {
            Ok(node) => node,
            Err(error) => {
                warn!(address = address.map(display), %error, "a node may not join");
                self.metrics.signed("node", false);
                return Err(not_joined(&error));
            }
        };
        let identity = self.ca.trust_domain().node(&node).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let signed = self.ca.sign(&csr, &identity, NODE_LIFETIME).map_err(refused)?;
        info!(%identity, address = address.map(display), expires_unix = signed.expires.as_secs(), "a node joined");
        self.metrics.signed("node", true);
        Ok(Response::new(self.certificate(signed)))
    }

    async fn sign_workload(&self, request: Request<SignWorkloadRequest>) -> Result<Response<Certificate>, Status> {
        let node = node_of(peer(&request)?, &self.ca)?;
        let SignWorkloadRequest { spiffe_id, csr, pod } = request.into_inner();
        let identity: SpiffeId = spiffe_id
            .parse()
            .map_err(|error: crate::identity::spiffe::SpiffeError| Status::invalid_argument(error.to_string()))?;
        let ours = identity.trust_domain() == *self.ca.trust_domain();
        if !ours || identity.account().is_none() || identity.account() == Some((MESH_NAMESPACE, CONTROL_ACCOUNT)) {
            self.metrics.signed("workload", false);
            return Err(Status::permission_denied(format!(
                "{identity} is not a workload's identity in trust domain {}",
                self.ca.trust_domain()
            )));
        }
        let Some(lifetime) = self.svid_lifetime else {
            self.metrics.signed("workload", false);
            return Err(Status::permission_denied(
                "workloads have their identities from another Workload API; start the node agent with --foreign-identities",
            ));
        };
        if let Some(pod) = pod {
            self.place(&pod, &node)?;
        }
        if !self.wait_until_known(&identity, &node).await {
            self.metrics.signed("workload", false);
            let place = if self.join.binds_to_nodes() { format!(" on the node {node}") } else { String::new() };
            return Err(Status::not_found(format!("no workload with a sidecar has the identity {identity}{place}")));
        }
        let signed = self.ca.sign(&csr, &identity, lifetime).map_err(refused)?;
        info!(%identity, %node, expires_unix = signed.expires.as_secs(), "signed a workload's certificate");
        self.metrics.signed("workload", true);
        Ok(Response::new(self.certificate(signed)))
    }

    async fn place_pod(&self, request: Request<PlacePodRequest>) -> Result<Response<PlacePodResponse>, Status> {
        let node = node_of(peer(&request)?, &self.ca)?;
        if let Some(pod) = request.into_inner().pod {
            self.place(&pod, &node)?;
        }
        Ok(Response::new(PlacePodResponse {}))
    }

    async fn watch_bundle(&self, request: Request<WatchBundleRequest>) -> Result<Response<Self::WatchBundleStream>, Status> {
        let peer = peer(&request)?;
        let Some(identity) = &peer.identity else { return Err(Status::unauthenticated(NO_CERTIFICATE)) };
        let seat = identity.path().strip_prefix("/node/").map(|name| {
            let report = NodeReport {
                name: name.to_owned(),
                address: peer.address.map(|address| address.to_string()),
                connected_since: self.clock.since_epoch().as_secs(),
                certificate_expires: peer.expires.map(|expires| expires.as_secs()),
            };
            NodeSeat::take(&self.nodes, report)
        });
        // The root of a running control plane does not change: the stream says it once and stands until the stop.
        let stream = futures_util::stream::unfold(Some((self.bundle(), seat, self.stop.clone())), |state| async move {
            let (bundle, seat, mut stop) = state?;
            if bundle.authorities.is_empty() {
                stop.stopped().await;
                return None;
            }
            Some((Ok(bundle), Some((Bundle::default(), seat, stop))))
        });
        Ok(Response::new(Box::pin(stream)))
    }
}

/// Who is calling. Whom another Workload API vouches for is a workload, whatever it is called.
fn peer<T>(request: &Request<T>) -> Result<PeerInfo, Status> {
    let peer = request.extensions().get::<PeerInfo>().cloned().ok_or_else(|| Status::internal("the connection has no peer"))?;
    match peer.voucher {
        Voucher::Authority => Ok(peer),
        Voucher::WorkloadApi => Err(Status::permission_denied("the authority serves node agents, by its own certificates alone")),
    }
}

/// The name of the node that is calling.
fn node_of(peer: PeerInfo, ca: &Ca) -> Result<String, Status> {
    let identity = peer.identity.ok_or_else(|| Status::unauthenticated(NO_CERTIFICATE))?;
    match identity.path().strip_prefix("/node/") {
        Some(node) if identity.trust_domain() == *ca.trust_domain() => Ok(node.to_owned()),
        _ => Err(Status::permission_denied(format!("{identity} is not a node; only nodes ask for workloads' certificates"))),
    }
}

fn not_joined(error: &NotJoined) -> Status {
    let text = error.to_string();
    match error {
        NotJoined::Token | NotJoined::Account(_) => Status::unauthenticated(text),
        NotJoined::Name(_) => Status::invalid_argument(text),
        NotJoined::NotReviewed(_) => Status::unavailable(text),
    }
}

fn refused(error: CaError) -> Status {
    match error {
        CaError::Request(_) => Status::invalid_argument(error.to_string()),
        CaError::Folder { .. } | CaError::Root { .. } | CaError::Sign(_) | CaError::Random => Status::internal(error.to_string()),
    }
}

/// What a caller without a certificate is told.
pub(super) const NO_CERTIFICATE: &str = "show a certificate of the mesh; only joining a node works without one";

/// The account of the control plane itself, for which nobody else is signed.
const MESH_NAMESPACE: &str = crate::model::object::MESH_NAMESPACE;
const CONTROL_ACCOUNT: &str = "control";

/// Of a pod: a few of each family.
const ADDRESSES_MAX: usize = 16;

/// How long a node's certificate is good; the node joins again before.
const NODE_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// How long a request for a certificate waits for its workload to be known.
const KNOWN_WITHIN: Duration = Duration::from_secs(2);
