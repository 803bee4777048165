//! Follows the configuration stream: takes what comes, compiles, publishes, acknowledges, and keeps the last good form on
//! disk so that a sidecar that starts while the control plane is away still serves.
//!
//! Invariants: an acknowledgement is sent after publishing; a resource that is refused keeps its last good form; one update
//! is published by one swap.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use super::http::pipeline::ORDER;
use super::{Proxy, Window};
use crate::admin::routes::Inspect as _;
use crate::base::problems::{Problem, Severity};
use crate::base::state::write_atomic;
use crate::delta::Scope;
use crate::delta::client::{Rejection, Update};
use crate::delta::grpc::{DeltaClient, UpdateStream};
use crate::model::{Called, Resource, ResourceKey, Resources};
use crate::snapshot::Snapshot;
use crate::snapshot::compile::{Own, admit, compile, forget};

/// What a sidecar holds, and in which versions.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    pub(crate) resources: Resources,
    pub(crate) versions: BTreeMap<ResourceKey, Arc<str>>,
    pub(crate) scopes: BTreeSet<Scope>,
}

/// The file, as JSON.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    resources: Vec<FileResource>,
    /// What was refused and has no last good form, as far as it could be read: a refused security policy closes its target
    /// after a restart too.
    #[serde(default)]
    refused: BTreeMap<String, Option<Box<serde_json::value::RawValue>>>,
    /// What was asked for and answered. That nothing is at an address is not kept: it would not be heard when that changes.
    scopes: BTreeSet<String>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct FileResource {
    key: String,
    version: String,
    body: Box<serde_json::value::RawValue>,
}

/// Follows the stream.
#[derive(Debug)]
pub(crate) struct Follower {
    proxy: Arc<Proxy>,
    window: Arc<Window>,
    own: Own,
    kept: Kept,
    state: PathBuf,
    problems: Vec<Problem>,
}

impl Follower {
    /// Puts what was kept into force at once.
    pub(crate) fn new(proxy: Arc<Proxy>, window: Arc<Window>, own: Own, kept: Kept, state: PathBuf) -> Self {
        let mut follower = Self { proxy, window, own, kept, state, problems: Vec::new() };
        if !follower.kept.resources.by_key.is_empty() {
            info!(resources = follower.kept.resources.by_key.len(), "the last good configuration is in force");
            follower.publish("kept");
        }
        follower
    }

    /// Asks for the own workload and for what an earlier life asked for.
    pub(crate) fn subscribe(&self, client: &DeltaClient) {
        client.subscribe(Scope::Workload(self.own.workload.clone()));
        for scope in &self.kept.scopes {
            client.subscribe(scope.clone());
        }
    }

    /// Takes updates for as long as the stream's driver lives.
    pub(crate) async fn run(mut self, client: DeltaClient, mut updates: UpdateStream) {
        let mut connected = client.connected();
        loop {
            // Both arms are cancel-safe.
            tokio::select! {
                update = updates.recv() => match update {
                    Some(update) => self.take(update),
                    None => return,
                },
                changed = connected.changed() => match changed {
                    Ok(()) => self.proxy.telemetry.metrics.control_connected(*connected.borrow_and_update()),
                    Err(_gone) => return,
                },
            }
        }
    }

    pub(super) fn take(&mut self, update: Update) {
        let Update { version, resources, removed, scopes, ack } = update;
        let mut rejections = Vec::new();
        for key in &removed {
            forget(&mut self.kept.resources, key);
            self.kept.versions.remove(key);
        }
        self.problems.retain(|problem| !removed.iter().any(|key| key.to_string() == problem.resource));
        for delivered in resources {
            let name = delivered.key.to_string();
            self.problems.retain(|problem| problem.resource != name);
            let problems = admit(&mut self.kept.resources, delivered.key.clone(), delivered.body);
            if problems.refused() {
                let reason = problems.iter().filter(|problem| problem.severity == Severity::Refuses).map(ToString::to_string);
                let reason = reason.collect::<Vec<_>>().join("\n");
                warn!(resource = name, reason, "a resource was refused; its last good form stays");
                rejections.push(Rejection { key: delivered.key, reason });
            } else {
                self.kept.versions.insert(delivered.key, delivered.version);
            }
            self.problems.extend(problems.into_vec());
        }
        for state in scopes {
            if let Scope::Address(ip) = state.scope {
                if state.absent {
                    self.kept.resources.absent.insert(ip);
                } else {
                    self.kept.resources.absent.remove(&ip);
                }
            }
            if state.absent {
                self.kept.scopes.remove(&state.scope);
            } else {
                self.kept.scopes.insert(state.scope);
            }
        }
        self.publish(&version);
        self.proxy.telemetry.metrics.config_published(
            self.proxy.published.current().generation,
            &version,
            self.kept.resources.refused.len(),
        );
        ack.accept(rejections);
        if self.kept.resources.workload(&self.own.workload).is_some_and(|own| own.spec.finished) {
            info!("the application has ended for good: the sidecar leaves");
            self.window.drain();
        }
        if let Err(error) = self.save() {
            warn!(%error, folder = %self.state.display(), "the configuration could not be kept; a restart needs the control plane");
        }
    }

    fn publish(&mut self, version: &str) {
        self.kept.resources.called = Some(called(&self.kept.scopes));
        let previous = self.proxy.published.current();
        let (snapshot, problems) = compile(&self.kept.resources, &self.own, &previous);
        for problem in problems.iter() {
            debug!(%problem, "problem");
        }
        let endpoints = endpoints(&snapshot);
        let generation = snapshot.generation;
        // An ejection of an endpoint that left would count against those that are there.
        for backend in snapshot.outbound.backends.values() {
            let there: Vec<_> = backend.endpoints.iter().map(|endpoint| endpoint.address).collect();
            backend.ejections.retain(&there);
        }
        self.proxy.publish(snapshot);
        self.proxy.pool.prune(&endpoints);
        debug!(generation, version, "published");
        let problems: Vec<String> = self.problems.iter().chain(problems.iter()).map(ToString::to_string).collect();
        let held: Vec<serde_json::Value> =
            self.kept.resources.by_key.values().filter_map(|resource| serde_json::to_value(&**resource).ok()).collect();
        *self.window.held.lock() = serde_json::json!({
            "generation": generation,
            "version": version,
            "order": ORDER,
            "resources": held,
            "problems": problems,
        });
    }

    /// Writes what is in force, at once and readable by nobody else.
    ///
    /// # Errors
    /// The folder is missing, full or not writable.
    pub(crate) fn save(&self) -> std::io::Result<()> {
        let scopes = self.kept.scopes.iter().map(ToString::to_string).collect();
        let mut file = File { scopes, ..File::default() };
        for (key, resource) in &self.kept.resources.by_key {
            let Some(version) = self.kept.versions.get(key) else { continue };
            file.resources.push(FileResource {
                key: key.to_string(),
                version: version.to_string(),
                body: serde_json::value::RawValue::from_string(resource.to_json())?,
            });
        }
        for (key, resource) in &self.kept.resources.refused {
            let body = resource.as_ref().map(|resource| serde_json::value::RawValue::from_string(resource.to_json()));
            file.refused.insert(key.to_string(), body.transpose()?);
        }
        write_atomic(&self.state.join(FILE), &serde_json::to_vec(&file)?, 0o600)
    }
}

/// What an earlier life kept; nothing, and why, where it cannot be read.
pub(crate) fn load(folder: &Path) -> Kept {
    let path = folder.join(FILE);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Kept::default(),
        Err(error) => {
            warn!(%error, file = %path.display(), "the kept configuration cannot be read");
            return Kept::default();
        }
    };
    let file: File = match serde_json::from_slice(&bytes) {
        Ok(file) => file,
        Err(error) => {
            warn!(%error, file = %path.display(), "the kept configuration cannot be read");
            return Kept::default();
        }
    };
    let scopes = file.scopes.iter().filter_map(|scope| scope.parse().ok()).collect();
    let mut kept = Kept { scopes, ..Kept::default() };
    for (key, body) in file.refused {
        let Ok(key) = key.parse::<ResourceKey>() else { continue };
        let form = body.and_then(|body| Resource::from_json(key.kind, body.get().as_bytes()).ok()).map(Arc::new);
        kept.resources.refused.insert(key, form);
    }
    for FileResource { key, version, body } in file.resources {
        let Ok(key) = key.parse::<ResourceKey>() else { continue };
        let form = Resource::from_json(key.kind, body.get().as_bytes()).map(Arc::new).map_err(|error| error.to_string());
        // A form that this version does not take counts as not held: the control plane sends it again.
        if !admit(&mut kept.resources, key.clone(), form).refused() {
            kept.versions.insert(key, version.into());
        }
    }
    kept
}

/// The services of which everything was asked for and answered.
fn called(scopes: &BTreeSet<Scope>) -> Called {
    let mut called = Called::default();
    for scope in scopes {
        match scope {
            Scope::Service(name) => drop(called.services.insert(name.clone())),
            Scope::Address(address) => drop(called.addresses.insert(*address)),
            Scope::Workload(_) => {}
        }
    }
    called
}

fn endpoints(snapshot: &Snapshot) -> BTreeSet<SocketAddr> {
    let backends = snapshot.outbound.backends.values().flat_map(|backend| &backend.endpoints);
    let headless = snapshot.outbound.headless.values().flatten();
    let defaults = snapshot.outbound.services.values().chain(headless).flat_map(|port| &port.default_backend.endpoints);
    let direct = snapshot.outbound.workloads.values();
    backends.chain(defaults).chain(direct).map(|endpoint| endpoint.address).collect()
}

const FILE: &str = "configuration.json";
