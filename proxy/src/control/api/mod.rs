//! The API for people and their tools, on a loopback address only: what is desired, what is refused, who has acknowledged.
//!
//! `door` lets in, `change` applies and deletes; here is what is only read.

mod change;
mod door;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
pub(crate) use change::{Answer, Text};
pub(crate) use door::guarded;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::{Duration, timeout};

use super::Config;
use super::authority::Nodes;
use super::ca::Authority;
use super::sessions::{Sessions, SidecarReport};
use super::source::kubernetes::health::Health;
use super::store::{self, Store};
use crate::base::clock::WallClock;
use crate::base::names::Named;
use crate::base::problems::{Problem, Problems, Severity};
use crate::identity::source::Identity;
use crate::model::{Kind, Resource, ResourceKey};
use crate::snapshot::{compile, excluded};

/// What the API answers from.
pub(crate) struct Api {
    store: Arc<Store>,
    sessions: Arc<Sessions>,
    nodes: Arc<Nodes>,
    ca: Arc<Authority>,
    /// As sidecars see this process, where another Workload API vouches for both.
    foreign: Option<Identity>,
    clock: WallClock,
    config: Config,
    /// How the cluster's source stands, where there is one.
    cluster: Option<Arc<Health>>,
    started: u64,
    /// Held while a change is checked and stored: two changes at once would each be checked without the other.
    changing: Mutex<()>,
}

impl Api {
    /// Answers from these parts of the control plane.
    #[expect(clippy::too_many_arguments, reason = "each is a part of the control plane, named once where it is built")]
    pub(crate) fn new(
        config: &Config,
        store: Arc<Store>,
        sessions: Arc<Sessions>,
        nodes: Arc<Nodes>,
        ca: Arc<Authority>,
        foreign: Option<Identity>,
        clock: WallClock,
        cluster: Option<Arc<Health>>,
    ) -> Arc<Self> {
        let started = clock.since_epoch().as_secs();
        let (config, changing) = (config.clone(), Mutex::new(()));
        Arc::new(Self { store, sessions, nodes, ca, foreign, clock, config, cluster, started, changing })
    }
}

/// What is wrong with one document.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Wrong {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) resource: Option<String>,
    /// `FILE:LINE:COLUMN`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) place: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) at: String,
    pub(crate) text: String,
    #[serde(default)]
    pub(crate) remedy: String,
    /// Is the document refused for it?
    pub(crate) refuses: bool,
}

impl Wrong {
    fn refusing(resource: Option<String>, place: Option<String>, text: String, remedy: &str) -> Self {
        Self { resource, place, at: String::new(), text, remedy: remedy.to_owned(), refuses: true }
    }
}

/// All paths of the API.
pub(crate) fn routes(api: Arc<Api>) -> Router {
    Router::new()
        .route("/api/resources", get(resources))
        .route("/api/apply", post(change::apply))
        .route("/api/delete", post(change::delete))
        .route("/api/excluded", get(excluded_of_pod))
        .route("/api/proxies", get(proxies))
        .route("/api/status", get(status))
        .route("/ready", get(ready))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(api)
}

fn refusal(status: StatusCode, text: String) -> Response {
    (status, Json(json!({ "error": text }))).into_response()
}

/// For `up`, which has to know when the mesh is there before it knows anything else.
async fn ready() -> &'static str {
    "ready\n"
}

#[derive(Deserialize)]
struct Which {
    kind: Option<String>,
    namespace: Option<String>,
    name: Option<String>,
}

async fn resources(State(api): State<Arc<Api>>, Query(which): Query<Which>) -> Response {
    let kind = match which.kind.as_deref().map(kind_named) {
        Some(None) => {
            let known: Vec<&str> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
            return refusal(StatusCode::BAD_REQUEST, format!("no such kind; there are {}", known.join(", ")));
        }
        Some(Some(kind)) => Some(kind),
        None => None,
    };
    let problems = api.store.problems();
    let sidecars = api.sessions.sidecars();
    let world = api.store.world();
    let known: BTreeSet<&ResourceKey> = world.resources().by_key.keys().chain(world.resources().refused.keys()).collect();
    let items: Vec<Value> = known
        .into_iter()
        .filter(|key| kind.is_none_or(|kind| key.kind == kind))
        // A Mesh is in no namespace: who asks for it by its kind finds it in any.
        .filter(|key| {
            let found = |namespace: &str| *key.name.namespace == *namespace || kind == Some(Kind::Mesh);
            which.namespace.as_deref().is_none_or(found)
        })
        .filter(|key| which.name.as_deref().is_none_or(|name| *key.name.name == *name))
        .filter_map(|key| {
            let body = world.body(key)?;
            let mut document = serde_json::from_str::<Value>(&body.json).ok()?;
            let origin = world.origin(key).map(ToString::to_string);
            let mut standing = standing(key, &body.version, origin, &problems, &sidecars);
            if let Some(standing) = standing.as_object_mut() {
                standing.insert("inForce".to_owned(), world.is_in_force(key).into());
                standing.extend(world.address_taken_by(key).map(|owner| ("addressTakenBy".to_owned(), owner.to_string().into())));
            }
            // What the control plane added to the document stays with it.
            if let (Some(standing), Some(kept)) = (standing.as_object_mut(), document.pointer("/status/kept")) {
                standing.insert("kept".to_owned(), kept.clone());
            }
            document.as_object_mut()?.insert("status".to_owned(), standing);
            if key.kind == Kind::Mesh {
                document.get_mut("metadata")?.as_object_mut()?.remove("namespace");
            }
            Some(document)
        })
        .collect();
    Json(json!({ "revision": world.revision(), "items": items })).into_response()
}

/// How one resource stands: where it is written, what is wrong with it, and which sidecars refuse it.
fn standing(
    key: &ResourceKey,
    version: &str,
    origin: Option<String>,
    problems: &[store::Wrong],
    sidecars: &[SidecarReport],
) -> Value {
    let name = key.to_string();
    let problems: Vec<_> = problems.iter().filter(|wrong| wrong.problem.resource == name).collect();
    // What is wrong with a form of it that is written elsewhere does not touch the one in force.
    let refuses_this = |wrong: &&store::Wrong| {
        let elsewhere = wrong.place.as_ref().zip(origin.as_ref()).is_some_and(|(place, origin)| !place.starts_with(origin));
        wrong.problem.severity == Severity::Refuses && !elsewhere
    };
    let refused_by: Vec<Value> = sidecars
        .iter()
        .flat_map(|sidecar| sidecar.refused.iter().map(move |refused| (sidecar, refused)))
        .filter(|(_, refused)| refused.resource == name)
        .map(|(sidecar, refused)| {
            json!({ "sidecar": format!("{}/{}", sidecar.namespace, sidecar.name), "reason": refused.reason })
        })
        .collect();
    json!({
        "accepted": !problems.iter().any(refuses_this) && refused_by.is_empty(),
        "origin": origin,
        "version": version,
        "problems": problems.iter().map(|known| wrong(&known.problem, known.place.clone())).collect::<Vec<_>>(),
        "refusedBy": refused_by,
    })
}

fn wrong(problem: &Problem, place: Option<String>) -> Wrong {
    Wrong {
        resource: Some(problem.resource.clone()),
        place,
        at: problem.at.to_string(),
        text: problem.text.clone(),
        remedy: problem.remedy.clone(),
        refuses: problem.severity == Severity::Refuses,
    }
}

#[derive(Deserialize)]
struct Pod {
    namespace: String,
    name: String,
}

/// The policies that do nothing at ports which one pod takes out of capture: asked by who starts it.
async fn excluded_of_pod(State(api): State<Arc<Api>>, Query(Pod { namespace, name }): Query<Pod>) -> Response {
    let world = api.store.world();
    let found = excluded::of_workload(world.resources(), &Named::new(namespace, name));
    let is_known = found.is_some();
    let problems = found.into_iter().flat_map(Problems::into_vec).map(|problem| wrong(&problem, None));
    Json(json!({ "known": is_known, "problems": problems.collect::<Vec<_>>() })).into_response()
}

#[derive(Deserialize)]
struct Until {
    /// Answer when every sidecar stands at this revision, and every local pod's sidecar is connected,
    revision: Option<u64>,
    /// or after so many milliseconds.
    #[serde(default)]
    within: u64,
}

/// A local pod that should have a sidecar connected, and has none.
#[derive(Debug, Eq, PartialEq, Serialize)]
struct NotConnected {
    namespace: String,
    name: String,
}

async fn proxies(State(api): State<Arc<Api>>, Query(until): Query<Until>) -> Response {
    let (mut sessions, mut world) = (api.sessions.changes(), api.store.changes());
    let settled = async {
        loop {
            sessions.mark_unchanged();
            world.mark_unchanged();
            let (sidecars, missing) = api.sidecars();
            let stands = missing.is_empty() && sidecars.iter().all(|sidecar| Some(sidecar.acknowledged) >= until.revision);
            // Cancel-safe: both only wait for a number to change.
            let ended = stands
                || tokio::select! {
                    changed = sessions.changed() => changed.is_err(),
                    changed = world.changed() => changed.is_err(),
                };
            if ended {
                return;
            }
        }
    };
    // Whether they are or not, the answer tells how they stand.
    drop(timeout(Duration::from_millis(until.within).min(WAIT_MAX), settled).await);
    let (sidecars, missing) = api.sidecars();
    Json(json!({ "revision": api.store.world().revision(), "items": sidecars, "notConnected": missing })).into_response()
}

impl Api {
    /// The connected sidecars, and the local pods whose sidecar is not among them. A pod that is about to end is not
    /// missed.
    fn sidecars(&self) -> (Vec<SidecarReport>, Vec<NotConnected>) {
        let sidecars = self.sessions.sidecars();
        let connected: BTreeSet<(&str, &str)> =
            sidecars.iter().map(|sidecar| (sidecar.namespace.as_str(), sidecar.name.as_str())).collect();
        // In a cluster a sidecar follows one of several control planes: that it is not with this one says nothing.
        if self.cluster.is_some() {
            return (sidecars, Vec::new());
        }
        let world = self.store.world();
        let missing = world.local_pods().filter_map(|pod| {
            let (namespace, name) = (pod.metadata.namespace.as_str(), pod.metadata.name.as_str());
            let expected = pod.spec.transport.has_sidecar() && !pod.spec.terminating && !connected.contains(&(namespace, name));
            expected.then(|| NotConnected { namespace: namespace.to_owned(), name: name.to_owned() })
        });
        let missing = missing.collect();
        (sidecars, missing)
    }
}

async fn status(State(api): State<Arc<Api>>) -> Response {
    let problems = api.store.problems();
    let count = |severity| problems.iter().filter(|wrong| wrong.problem.severity == severity).count();
    let sidecars: BTreeMap<(String, String), SidecarReport> =
        api.sessions.sidecars().into_iter().map(|sidecar| ((sidecar.namespace.clone(), sidecar.name.clone()), sidecar)).collect();
    let world = api.store.world();
    let without_target: Vec<String> = compile::without_target(world.resources())
        .into_iter()
        .map(|((policy, target), means)| format!("{policy}: {target} does not exist; {means}"))
        .collect();
    let denying_nobody = compile::denying_nobody(world.resources(), &api.config.trust_domain);
    let denying_nobody: Vec<String> = denying_nobody.into_iter().map(|(policy, means)| format!("{policy}: {means}")).collect();
    let widened = world
        .coverage()
        .wide()
        .map(|(policy, why)| format!("{policy}: {}; change the policy: an annotation will do", why.told()));
    let widened: Vec<String> = widened.chain(api.store.unwritten()).collect();
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    let mut pods = Vec::new();
    for (key, resource) in &world.resources().by_key {
        *kinds.entry(key.kind.as_str()).or_default() += 1;
        let Resource::Workload(workload) = resource.as_ref() else { continue };
        let sidecar = sidecars.get(&(key.name.namespace.to_string(), key.name.name.to_string()));
        pods.push(json!({
            "namespace": &*key.name.namespace,
            "name": &*key.name.name,
            "serviceAccount": workload.spec.account(),
            "addresses": workload.spec.addresses,
            "meshed": workload.spec.transport.has_sidecar(),
            "terminating": workload.spec.terminating,
            "local": world.is_local_pod(key),
            "node": workload.spec.node,
            "unready": workload.spec.unready,
            "unheard": workload.spec.unheard,
            "finished": workload.spec.finished,
            "connected": sidecar.is_some(),
            "acknowledged": sidecar.map(|sidecar| sidecar.acknowledged),
            "refused": sidecar.map_or(0, |sidecar| sidecar.refused.len()),
            "certificateExpires": sidecar.and_then(|sidecar| sidecar.certificate_expires),
        }));
    }
    Json(json!({
        "control": {
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "started": api.started,
            "now": api.clock.since_epoch().as_secs(),
            "trustDomain": api.config.trust_domain.as_str(),
            "revision": world.revision(),
            "rootExpires": api.ca.root_expires().as_secs(),
            "listen": api.config.listen,
        },
        "workloadApi": api.foreign.as_ref().map(|foreign| json!({
            "socket": api.config.workload_api,
            "identity": foreign.own().map(|own| own.id.to_string()),
            "certificateExpires": foreign.own().map(|own| own.expires.as_secs()),
            "missing": foreign.missing(),
            "trouble": foreign.trouble(),
        })),
        "nodes": api.nodes.reports(),
        "kubernetes": api.cluster.as_ref().map(|health| health.standings()),
        "resources": kinds,
        "problems": {
            "refuses": count(Severity::Refuses),
            "warns": count(Severity::Warns),
            "list": problems.iter().map(|known| wrong(&known.problem, known.place.clone())).collect::<Vec<_>>(),
        },
        "withoutTarget": without_target,
        "denyingNobody": denying_nobody,
        "coverage": widened,
        "pods": pods,
    }))
    .into_response()
}

/// A kind by its name, its plural or its short form.
pub(crate) fn kind_named(text: &str) -> Option<Kind> {
    let text = text.to_ascii_lowercase();
    Kind::ALL.into_iter().find(|kind| text == kind.as_str().to_ascii_lowercase() || text == kind.plural() || text == kind.short())
}

/// The longest that an answer is waited for.
const WAIT_MAX: Duration = Duration::from_secs(20);

/// The largest change: a folder of some thousand documents.
const BODY_BYTES_MAX: usize = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_goes_by_name_plural_and_short_form() {
        for text in ["AuthorizationPolicy", "authorizationpolicies", "authz"] {
            assert_eq!(kind_named(text), Some(Kind::AuthorizationPolicy), "{text}");
        }
        assert_eq!(kind_named("pods"), None);
    }
}
