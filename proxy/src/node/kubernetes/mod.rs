//! The node agent on Kubernetes: a CSI driver that brings each pod its own pair of sockets, and what it takes to know who asks
//! there.
//!
//! Three say who somebody is, and have to agree: the kubelet, whose volume a socket is (`volume`); the kernel, in which
//! container of which pod the caller runs, in which network namespace, and which addresses that has (`cgroup`, `netns`); the
//! API server, which container of the pod is the sidecar, and what its owner asks of capture (`described`). What a sidecar says of
//! itself is only compared with that. The record of a pod is then written as `outrigger run` would write it, and everything
//! else goes its usual way.

pub(crate) mod admission;
mod beginning;
mod cgroup;
pub(crate) mod cluster;
mod csi_proto;
mod described;
mod driver;
mod ending;
mod events;
mod folder;
mod kubelet_streams;
mod leaving;
mod quarantine;
mod registration_proto;
mod sandbox;
#[cfg(test)]
mod tests;
mod volume;
mod volumes;

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;

use self::beginning::Unclosed;
pub(crate) use self::cluster::Cluster;
use self::csi_proto::identity_server::IdentityServer;
use self::csi_proto::node_server::NodeServer;
use self::driver::{Driver, Introduction};
pub(crate) use self::ending::{Ending, app_runs};
use self::events::Events;
pub(crate) use self::leaving::leave;
use self::registration_proto::registration_server::RegistrationServer;
pub(crate) use self::volume::Owner;
use self::volumes::{Behind, Sockets, Volumes};
use super::enrolment::{self, Door};
use super::{Agent, NodeError, place, workload_api};
use crate::base::clock::WallClock;
use crate::model::marks::DRIVER;

/// Where the kubelet is met.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// The kubelet's folder.
    pub(crate) kubelet: PathBuf,
}

/// Asks for the API server, by KUBECONFIG or as a pod.
///
/// # Errors
/// Neither says where it is.
pub(crate) async fn client() -> Result<Client, NodeError> {
    let config = kube::Config::infer().await.map_err(|error| NodeError::Cluster(error.to_string()))?;
    Client::try_from(config).map_err(|error| NodeError::Cluster(error.to_string()))
}

/// The cgroup2 folder of the container that a `/proc/PID/cgroup` names, if it is one of a pod's.
pub(super) fn container_of(proc_cgroup: &str, root: &Path) -> Option<PathBuf> {
    Some(cgroup::Container::of(proc_cgroup)?.folders(root)?.container)
}

/// Serves the kubelet and its pods, as parts of the agent. Their sockets are bound before it returns.
///
/// # Errors
/// A folder or a socket cannot be used.
pub(crate) fn start(
    agent: &Arc<Agent>,
    cluster: &Arc<Cluster>,
    client: Client,
    config: &Config,
    state: &Path,
    clock: WallClock,
    parts: &mut JoinSet<()>,
) -> Result<(), NodeError> {
    let node = agent.authority.node().to_owned();
    let (pods, namespaces) = (Arc::clone(cluster), Arc::clone(cluster));
    let of = node.clone();
    let events = Events::new(client, node.clone(), clock);
    parts.spawn(async move { pods.follow_pods(&of).await });
    parts.spawn(async move { namespaces.follow_namespaces().await });
    parts.spawn(ending::follow(Arc::clone(agent), Arc::clone(cluster)));
    parts.spawn(sandbox::follow(Arc::clone(agent)));

    let written = state.join("volumes");
    let behind = Sidecars { agent: Arc::clone(agent), cluster: Arc::clone(cluster) };
    let volumes = Volumes::restore(config.kubelet.join("pods"), written.clone(), behind).map_err(place(&written))?;
    let volumes = Arc::new(volumes);
    parts.spawn(quarantine::follow(Arc::clone(agent), Arc::clone(cluster), Arc::clone(&volumes), events));
    // What cannot be read is told by whoever reconciles.
    let records = super::pods::read(&agent.records).map(|found| found.records).unwrap_or_default();
    for owner in ending::left_behind(&records, &volumes.owners()) {
        agent.ending.add(owner);
    }
    let driver = Driver { volumes, node };
    let endpoint = config.kubelet.join("plugins").join(DRIVER).join("csi.sock");
    let socket = bind(&endpoint).map_err(place(&endpoint))?;
    let router = Server::builder().add_service(IdentityServer::new(driver.clone())).add_service(NodeServer::new(driver));
    serve(socket, router, parts);
    // Last, for the kubelet calls the driver as soon as it knows of it.
    let introduction = config.kubelet.join("plugins_registry").join(format!("{DRIVER}-reg.sock"));
    let socket = bind(&introduction).map_err(place(&introduction))?;
    let router = Server::builder().add_service(RegistrationServer::new(Introduction { endpoint }));
    serve(socket, router, parts);
    Ok(())
}

fn serve(socket: UnixListener, router: tonic::transport::server::Router, parts: &mut JoinSet<()>) {
    let (accepted, readable) = mpsc::channel(1);
    parts.spawn(kubelet_streams::accept(socket, accepted));
    parts.spawn(async move {
        if let Err(error) = router.serve_with_incoming(ReceiverStream::new(readable)).await {
            tracing::error!(error = super::chain(&error), "serving the kubelet failed");
        }
    });
}

/// A socket for the kubelet alone.
fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _gone => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// What answers at the sockets of a pod: enrolment and the Workload API, each for that pod alone.
struct Sidecars {
    agent: Arc<Agent>,
    cluster: Arc<Cluster>,
}

#[tonic::async_trait]
impl Behind for Sidecars {
    async fn close(&self, owner: &Owner) -> Result<(), Unclosed> {
        beginning::close(&self.agent, owner).await
    }

    fn serve(&self, owner: Arc<Owner>, sockets: Sockets) -> JoinSet<()> {
        let mut served = JoinSet::new();
        let door = Door::Pod { owner: Arc::clone(&owner), cluster: Arc::clone(&self.cluster) };
        served.spawn(enrolment::serve(Arc::clone(&self.agent), sockets.enrolment, door, OF_ONE_POD_MAX));
        served.spawn(workload_api::serve(Arc::clone(&self.agent), sockets.workload_api, Some(owner), OF_ONE_POD_MAX));
        served
    }

    fn gone(&self, owner: &Owner) {
        self.agent.ending.add(owner.clone());
    }
}

/// Connections at once at one socket of a pod: a sidecar opens one, and another one while it takes over.
const OF_ONE_POD_MAX: usize = 64;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
