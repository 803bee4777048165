//! The sidecars that are connected: who may open a stream, what each should have, and what each has acknowledged.
//!
//! A sidecar may speak for a pod only with the identity of the service account that the pod's Workload names; asking for
//! another pod's is refused by name. A refusal by a sidecar is kept with its reason until the resource changes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::watch;
use tonic::Status;
use tracing::{info, warn};

use super::authority::NO_CERTIFICATE;
use super::metrics::Metrics;
use super::select::select;
use super::store::Store;
use crate::base::clock::WallClock;
use crate::base::names::Named;
use crate::delta::Scope;
use crate::delta::grpc::Desired;
use crate::delta::server::{Item, Session, View};
use crate::delta::transport::{PeerInfo, Voucher};
use crate::identity::spiffe::{SpiffeId, TrustDomain};
use crate::model::{Kind, Resource, ResourceKey};

/// All connected sidecars.
pub(crate) struct Sessions {
    store: Arc<Store>,
    trust_domain: TrustDomain,
    /// Who vouches for sidecars: nobody else is believed about one.
    voucher: Voucher,
    clock: WallClock,
    metrics: Arc<Metrics>,
    open: Arc<Mutex<BTreeMap<u64, SidecarReport>>>,
    next: AtomicU64,
    changed: watch::Sender<u64>,
}

/// What is known of one connected sidecar; an element of `GET /api/proxies`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SidecarReport {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) identity: String,
    /// The sidecar's software version.
    pub(crate) software: String,
    pub(crate) address: Option<String>,
    /// When its stream was opened, as seconds since 1970-01-01T00:00:00Z.
    pub(crate) connected_since: u64,
    /// When the certificate ends with which it was opened.
    pub(crate) certificate_expires: Option<u64>,
    /// The newest revision of the desired state that it stands at, what it refused aside.
    pub(crate) acknowledged: u64,
    /// Is a response waiting for its acknowledgement?
    pub(crate) waits: bool,
    /// What it subscribed to.
    pub(crate) scopes: Vec<String>,
    /// How many resources it has.
    pub(crate) resources: usize,
    pub(crate) refused: Vec<RefusedReport>,
}

/// A resource that a sidecar refused.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RefusedReport {
    pub(crate) resource: String,
    pub(crate) version: String,
    pub(crate) reason: String,
}

/// A place among the connected sidecars; given up when it is dropped.
pub(crate) struct Seat {
    number: u64,
    pod: Named,
    identity: SpiffeId,
    open: Arc<Mutex<BTreeMap<u64, SidecarReport>>>,
    changed: watch::Sender<u64>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.open.lock().remove(&self.number);
        self.changed.send_modify(|count| *count += 1);
        info!(pod = %self.pod, "a sidecar's stream ended");
    }
}

impl Sessions {
    /// Nobody is connected yet.
    pub(crate) fn new(
        store: Arc<Store>,
        trust_domain: TrustDomain,
        voucher: Voucher,
        clock: WallClock,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            store,
            trust_domain,
            voucher,
            clock,
            metrics,
            open: Arc::default(),
            next: AtomicU64::new(1),
            changed: watch::Sender::new(0),
        }
    }

    /// Connected sidecars by pod. Of two streams of one pod the newer one counts: the older is a connection whose end was
    /// not noticed yet.
    pub(crate) fn sidecars(&self) -> Vec<SidecarReport> {
        let newest: BTreeMap<(String, String), SidecarReport> =
            self.open.lock().values().map(|report| ((report.namespace.clone(), report.name.clone()), report.clone())).collect();
        newest.into_values().collect()
    }

    /// Tells when a sidecar came, went, acknowledged or refused.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Is `identity` the one of `pod`? `None`: no such workload is known.
    fn speaks_for(&self, identity: &SpiffeId, pod: &Named) -> Option<Result<(), SpiffeId>> {
        let key = ResourceKey { kind: Kind::Workload, name: pod.clone() };
        let world = self.store.world();
        let Some(Resource::Workload(workload)) = world.resources().get(&key).map(AsRef::as_ref) else { return None };
        let account = Named::new(&*pod.namespace, workload.spec.account());
        match self.trust_domain.service_account(&account) {
            Ok(expected) if expected == *identity => Some(Ok(())),
            Ok(expected) => Some(Err(expected)),
            Err(_no_identity) => None,
        }
    }

    fn check(&self, identity: &SpiffeId, pod: &Named) -> Result<(), Status> {
        match self.speaks_for(identity, pod) {
            Some(Ok(())) => Ok(()),
            Some(Err(expected)) => Err(Status::permission_denied(format!(
                "a sidecar asking for another pod's identity: {identity} may not speak for pod {pod}, which is {expected}"
            ))),
            None => Err(Status::not_found(format!("no workload {pod} is known"))),
        }
    }

    /// A seat for the sidecar of the pod that the session names, if the peer is it.
    async fn seat(&self, peer: &PeerInfo, session: &Session) -> Result<Seat, Status> {
        let pod = session.node().clone();
        if peer.voucher != self.voucher {
            let (identity, address) = (peer.identity.as_ref(), peer.address);
            warn!(%pod, identity = identity.map(display), address = address.map(display), "a sidecar of another voucher came");
            return Err(Status::permission_denied(NOT_THE_VOUCHER));
        }
        let Some(identity) = &peer.identity else {
            warn!(%pod, address = peer.address.map(display), "a sidecar came without a certificate");
            return Err(Status::unauthenticated(NO_CERTIFICATE));
        };
        // A pod's sidecar may come before the pod's record was read.
        let mut changes = self.store.changes();
        let deadline = tokio::time::Instant::now() + KNOWN_WITHIN;
        loop {
            changes.mark_unchanged();
            match self.check(identity, &pod) {
                Ok(()) => break,
                Err(status) if status.code() == tonic::Code::NotFound => {
                    if !matches!(tokio::time::timeout_at(deadline, changes.changed()).await, Ok(Ok(()))) {
                        return Err(status);
                    }
                }
                Err(status) => {
                    warn!(%pod, %identity, address = peer.address.map(display), "a sidecar asked for another pod's identity");
                    return Err(status);
                }
            }
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let report = SidecarReport {
            namespace: pod.namespace.to_string(),
            name: pod.name.to_string(),
            identity: identity.to_string(),
            software: session.software().to_owned(),
            address: peer.address.map(|address| address.to_string()),
            connected_since: self.clock.since_epoch().as_secs(),
            certificate_expires: peer.expires.map(|expires| expires.as_secs()),
            acknowledged: 0,
            waits: false,
            scopes: Vec::new(),
            resources: 0,
            refused: Vec::new(),
        };
        self.open.lock().insert(number, report);
        self.changed.send_modify(|count| *count += 1);
        info!(%pod, %identity, "a sidecar's stream opened");
        Ok(Seat { number, pod, identity: identity.clone(), open: Arc::clone(&self.open), changed: self.changed.clone() })
    }
}

impl Desired for Sessions {
    type Seat = Seat;

    async fn admit(&self, peer: &PeerInfo, session: &Session) -> Result<Seat, Status> {
        let seat = self.seat(peer, session).await;
        self.metrics.stream(seat.is_ok());
        seat
    }

    fn view(&self, seat: &Seat, session: &Session) -> Result<View, Status> {
        // The pod may have another account by now, or be gone: then the sidecar keeps what it has and gets no more.
        self.check(&seat.identity, &seat.pod)?;
        let world = self.store.world();
        let mut view = View { version: world.revision(), ..View::default() };
        for scope in session.scopes() {
            let selection = select(&world, session.node(), scope);
            for key in &selection.keys {
                if let Some(body) = world.body(key) {
                    view.resources
                        .entry(key.clone())
                        .or_insert_with(|| Item { version: Arc::clone(&body.version), body: Arc::clone(&body.json) });
                }
            }
            view.scopes.insert(scope.clone(), (!selection.absent).then_some(selection.keys));
        }
        Ok(view)
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.store.changes()
    }

    fn report(&self, seat: &Seat, session: &Session) {
        let refused: Vec<RefusedReport> = session
            .refused()
            .iter()
            .map(|(resource, refused)| RefusedReport {
                resource: resource.clone(),
                version: refused.version.to_string(),
                reason: refused.reason.clone(),
            })
            .collect();
        let mut open = self.open.lock();
        let Some(report) = open.get_mut(&seat.number) else { return };
        for new in &refused {
            if !report.refused.iter().any(|old| old.resource == new.resource && old.version == new.version) {
                warn!(pod = %seat.pod, resource = new.resource, reason = new.reason, "a sidecar refused a resource");
            }
        }
        report.acknowledged = session.settled();
        report.waits = session.waits();
        report.scopes = session.scopes().map(Scope::to_string).collect();
        report.resources = session.resources();
        report.refused = refused;
        drop(open);
        self.changed.send_modify(|count| *count += 1);
    }
}

/// What a sidecar is told that has its identity from elsewhere than the mesh says.
const NOT_THE_VOUCHER: &str =
    "sidecars of this mesh have their identities from another Workload API; make the pod anew, so that its sidecar asks there";

/// How long a stream waits for its pod's workload to be known.
const KNOWN_WITHIN: std::time::Duration = std::time::Duration::from_secs(2);
