//! The API for people and their tools, on a loopback address only: what is desired, what is refused, who has acknowledged.
//!
//! Whoever is listened to here rules the mesh, so every request must show the API's token, but for looking at the
//! dashboard (RFC 6750, `Authorization: Bearer`). A browser must not be made to ask for others: a request must name a
//! loopback host (a page of another origin cannot, whatever its name resolves to) and a change must carry a content type
//! that pages cannot send unasked. A change is taken as a whole or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::{Duration, timeout};

use super::authority::Nodes;
use super::ca::Authority;
use super::sessions::{Sessions, SidecarReport};
use super::source::documents::documents;
use super::source::file::place_of;
use super::store::{self, Store};
use super::token::Token;
use super::world::{Change, Form, Origin};
use super::{API_TOKEN, Config, STORED};
use crate::base::clock::WallClock;
use crate::base::problems::{FieldPath, Problem, Severity};
use crate::base::state::write_atomic;
use crate::model::workload::WorkloadTransport;
use crate::model::yaml::{self, Document};
use crate::model::{Kind, Resource, ResourceKey, Resources};
use crate::snapshot::{compile, kept};

/// What the API answers from.
pub(crate) struct Api {
    store: Arc<Store>,
    sessions: Arc<Sessions>,
    nodes: Arc<Nodes>,
    ca: Arc<Authority>,
    clock: WallClock,
    config: Config,
    started: u64,
    /// Held while a change is checked and stored: two changes at once would each be checked without the other.
    changing: Mutex<()>,
}

impl Api {
    /// Answers from these parts of the control plane.
    pub(crate) fn new(
        config: &Config,
        store: Arc<Store>,
        sessions: Arc<Sessions>,
        nodes: Arc<Nodes>,
        ca: Arc<Authority>,
        clock: WallClock,
    ) -> Arc<Self> {
        let started = clock.since_epoch().as_secs();
        Arc::new(Self { store, sessions, nodes, ca, clock, config: config.clone(), started, changing: Mutex::new(()) })
    }

    /// The file of a stored document.
    fn stored(&self, key: &ResourceKey) -> PathBuf {
        self.config.state.join(STORED).join(format!("{}.{}.{}.yaml", key.kind, key.name.namespace, key.name.name))
    }
}

/// One text of documents, as `apply` and `delete` send it.
#[derive(Deserialize, Serialize)]
pub(crate) struct Text {
    /// How the user knows it: a file's name.
    pub(crate) name: String,
    pub(crate) text: String,
    /// Key files that the documents name, which only the user's side can read.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) keys: BTreeMap<String, String>,
}

/// What was done with one document.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Done {
    pub(crate) resource: String,
    /// `created`, `changed`, `unchanged`, `deleted`, or `gone`: deleted before.
    pub(crate) action: String,
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

/// The answer to a change.
#[derive(Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Answer {
    /// The revision of the desired state after it.
    pub(crate) revision: u64,
    pub(crate) results: Vec<Done>,
    pub(crate) problems: Vec<Wrong>,
}

/// All paths of the API.
pub(crate) fn routes(api: Arc<Api>) -> Router {
    Router::new()
        .route("/api/resources", get(resources))
        .route("/api/apply", post(apply))
        .route("/api/delete", post(delete))
        .route("/api/proxies", get(proxies))
        .route("/api/status", get(status))
        .route("/ready", get(ready))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(api)
}

/// Wraps everything that is served beside the API too.
pub(crate) fn guarded(routes: Router, token: Token) -> Router {
    routes.layer(middleware::from_fn_with_state(Arc::new(token), guard))
}

async fn guard(State(token): State<Arc<Token>>, request: Request, next: Next) -> Response {
    match objection(&request, &token) {
        Some((StatusCode::UNAUTHORIZED, text)) => {
            let remedy =
                format!("send `Authorization: Bearer TOKEN`; TOKEN stands in {API_TOKEN} in the state folder, for root alone");
            let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
            (StatusCode::UNAUTHORIZED, challenge, Json(json!({ "error": text, "remedy": remedy }))).into_response()
        }
        Some((status, text)) => refusal(status, text),
        None => next.run(request).await,
    }
}

fn objection(request: &Request, token: &Token) -> Option<(StatusCode, String)> {
    let text = |name| request.headers().get(name).and_then(|value| value.to_str().ok());
    let host = text(header::HOST).unwrap_or_default();
    if !is_loopback(host) {
        return Some((StatusCode::FORBIDDEN, format!("{host:?} is not this machine; call 127.0.0.1 or localhost")));
    }
    let is_safe = request.method().is_safe();
    if is_safe && OPEN.contains(&request.uri().path()) {
        return None;
    }
    match text(header::AUTHORIZATION).map(|credentials| credentials.split_once(' ').unwrap_or((credentials, ""))) {
        Some((scheme, guess)) if scheme.eq_ignore_ascii_case("bearer") && token.fits(guess) => {}
        Some(_) => return Some((StatusCode::UNAUTHORIZED, "this is not the token of the API, or no longer".to_owned())),
        None => return Some((StatusCode::UNAUTHORIZED, "the API answers whoever shows its token alone".to_owned())),
    }
    if is_safe {
        return None;
    }
    if text(header::ORIGIN).is_some_and(|origin| origin != format!("http://{host}")) {
        return Some((StatusCode::FORBIDDEN, "a page of another origin may not change the mesh".to_owned()));
    }
    let kind = text(header::CONTENT_TYPE).and_then(|kind| kind.split(';').next()).unwrap_or_default().trim();
    if matches!(kind, "application/yaml" | "application/json") {
        return None;
    }
    Some((StatusCode::UNSUPPORTED_MEDIA_TYPE, "send application/yaml or application/json".to_owned()))
}

fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
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

async fn apply(State(api): State<Arc<Api>>, headers: HeaderMap, body: Bytes) -> Response {
    let texts = match texts(&headers, &body) {
        Ok(texts) => texts,
        Err(reason) => return refusal(StatusCode::BAD_REQUEST, reason),
    };
    let _turn = api.changing.lock().await;
    let worker = Arc::clone(&api);
    // Reading, compiling and writing take their time; streams must not wait for it.
    match tokio::task::spawn_blocking(move || worker.apply(&texts)).await {
        Ok(answer) if answer.problems.iter().any(|problem| problem.refuses) => {
            (StatusCode::UNPROCESSABLE_ENTITY, Json(answer)).into_response()
        }
        Ok(answer) => Json(answer).into_response(),
        Err(error) => refusal(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

/// Is it asked once more, because nobody heard the first answer?
#[derive(Clone, Copy, Default, Deserialize)]
struct Again {
    #[serde(default)]
    again: bool,
}

async fn delete(State(api): State<Arc<Api>>, Query(again): Query<Again>, headers: HeaderMap, body: Bytes) -> Response {
    let texts = match texts(&headers, &body) {
        Ok(texts) => texts,
        Err(reason) => return refusal(StatusCode::BAD_REQUEST, reason),
    };
    let _turn = api.changing.lock().await;
    let worker = Arc::clone(&api);
    match tokio::task::spawn_blocking(move || worker.delete(&texts, again)).await {
        Ok(answer) => Json(answer).into_response(),
        Err(error) => refusal(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

/// A body of YAML is one text; a body of JSON is a list of named ones.
fn texts(headers: &HeaderMap, body: &[u8]) -> Result<Vec<Text>, String> {
    let is_json = headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .is_some_and(|kind| kind.starts_with("application/json"));
    if is_json {
        return serde_json::from_slice(body).map_err(|error| format!("not a list of texts: {error}"));
    }
    let text = std::str::from_utf8(body).map_err(|error| format!("the body is not UTF-8: {error}"))?;
    Ok(vec![Text { name: "body".to_owned(), text: text.to_owned(), keys: BTreeMap::new() }])
}

impl Api {
    fn apply(&self, texts: &[Text]) -> Answer {
        let mut answer = Answer::default();
        let mut written: BTreeMap<ResourceKey, (&str, Document)> = BTreeMap::new();
        for text in texts {
            let keys = |name: &str| text.keys.get(name).cloned().ok_or_else(|| "the file was not sent along".to_owned());
            for found in documents(Path::new(&text.name), &text.text, &keys) {
                answer.problems.extend(found.told.into_iter().map(|told| {
                    let known = store::Wrong::from(told);
                    wrong(&known.problem, known.place)
                }));
                let Some(document) = found.document.filter(|_| found.good) else { continue };
                let key = document.resource.key();
                let place = format!("{}:{}", text.name, document.position(&FieldPath::root()));
                if self.store.world().is_local_pod(&key) {
                    let (text, remedy) = store::runs_here(&key);
                    answer.problems.push(Wrong::refusing(Some(key.to_string()), Some(place), text, &remedy));
                    continue;
                }
                if let Some(folder) = self.folder_of(&key) {
                    let text =
                        format!("{folder} holds this document, in a folder that is watched; applied, it would be shadowed");
                    let remedy = "change it there, or give this one another name";
                    answer.problems.push(Wrong::refusing(Some(key.to_string()), Some(place), text, remedy));
                    continue;
                }
                if let Some((other, _)) = written.insert(key.clone(), (&text.name, document)) {
                    let text = format!("the document is written twice, also in {other}");
                    answer.problems.push(Wrong::refusing(Some(key.to_string()), Some(place), text, "keep one of them"));
                }
            }
        }
        // What the documents would be beside everything that is there.
        let mut candidate = self.store.world().clone();
        candidate.coverage_mut().released();
        for (key, (_, document)) in &written {
            let form = Form::Read(Arc::new(document.resource.clone()));
            candidate.apply(Change::Put { key: key.clone(), form, origin: Origin::Applied(self.stored(key)) });
        }
        let by_name: BTreeMap<String, _> = written.iter().map(|(key, written)| (key.to_string(), written)).collect();
        for problem in compile::check(candidate.resources()).iter() {
            let found = match by_name.get(&problem.resource) {
                Some((name, document)) => wrong(problem, Some(format!("{name}:{}", document.position(&problem.at)))),
                // Of two that want one address the other may be the one that is told; the change is the cause all the same.
                None if problem.severity == Severity::Warns && names_one(&problem.text, &by_name) => wrong(problem, None),
                None => continue,
            };
            if !answer.problems.contains(&found) {
                answer.problems.push(found);
            }
        }
        answer.problems.extend(candidate.coverage_mut().released().iter().flat_map(|(policy, forms)| {
            let place = by_name
                .get(&policy.to_string())
                .map(|(name, document)| format!("{name}:{}", document.position(&FieldPath::root())));
            let resource = candidate.resources().get(policy);
            let lost = resource.map(|resource| kept::beyond(candidate.resources(), resource, forms)).unwrap_or_default();
            lost.into_iter().map(move |(service, covered)| Wrong {
                resource: Some(policy.to_string()),
                place: place.clone(),
                at: String::new(),
                text: format!("the policy was changed: it lets go of {covered}, to which Service/{service} led before"),
                remedy: "target those pods (kind: Workload) where it is to go on covering them".to_owned(),
                refuses: false,
            })
        }));
        answer.revision = self.store.world().revision();
        if answer.problems.iter().any(|problem| problem.refuses) {
            return answer;
        }
        let mut changes = Vec::new();
        for (key, (_, document)) in written {
            let path = self.stored(&key);
            let mut text = serde_json::to_vec_pretty(&document.resource).unwrap_or_default();
            text.push(b'\n');
            let before = std::fs::read(&path).ok();
            let action = match &before {
                None => "created",
                Some(before) if *before == text => "unchanged",
                Some(_) => "changed",
            };
            if action != "unchanged"
                && let Err(error) = write_atomic(&path, &text, 0o600)
            {
                let text = format!("cannot write {}: {error}", path.display());
                answer.problems.push(Wrong::refusing(Some(key.to_string()), None, text, "make room in the state folder"));
                break;
            }
            answer.results.push(Done { resource: key.to_string(), action: action.to_owned() });
            let form = Form::Read(Arc::new(document.resource));
            changes.push(Change::Put { key, form, origin: Origin::Applied(path) });
        }
        answer.revision = self.store.apply(changes);
        answer
    }

    /// The place in a watched folder where this document is written, if it is.
    fn folder_of(&self, key: &ResourceKey) -> Option<String> {
        let path = self.store.world().origins(key).find_map(|origin| match origin {
            Origin::File(path) => Some(path.clone()),
            Origin::Applied(_) | Origin::Pod(_) => None,
        })?;
        Some(place_of(&path, key))
    }

    fn delete(&self, texts: &[Text], Again { again }: Again) -> Answer {
        let mut answer = Answer::default();
        let before = self.store.world().resources().clone();
        let mut changes = Vec::new();
        for text in texts {
            for document in yaml::read(&text.text) {
                let (key, place) = match document {
                    Ok(document) => {
                        let position = document.position(&FieldPath::root());
                        (Some(document.resource.key()), format!("{}:{position}", text.name))
                    }
                    // A document that is no good any more can still name what is to go.
                    Err(fault) => (fault.key, format!("{}:{}", text.name, fault.at)),
                };
                let mut wrong = |resource: Option<String>, text: String, remedy: &str| {
                    answer.problems.push(Wrong::refusing(resource, Some(place.clone()), text, remedy));
                };
                let Some(key) = key else {
                    wrong(None, "the document names no resource".to_owned(), "write its kind and its name");
                    continue;
                };
                let path = self.stored(&key);
                match std::fs::remove_file(&path) {
                    Ok(()) => {
                        answer.results.push(Done { resource: key.to_string(), action: "deleted".to_owned() });
                        changes.push(Change::Remove { key, origin: Origin::Applied(path) });
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                        let origin = self.store.world().origin(&key).map(ToString::to_string);
                        match origin {
                            Some(origin) => wrong(Some(key.to_string()), format!("it stands in {origin}"), "remove it there"),
                            // The first time, which ended before its answer, or somebody else.
                            None if again => {
                                answer.results.push(Done { resource: key.to_string(), action: "gone".to_owned() });
                            }
                            None => {
                                wrong(Some(key.to_string()), "there is no such resource".to_owned(), "see `outrigger get all`")
                            }
                        }
                    }
                    Err(error) => wrong(
                        Some(key.to_string()),
                        format!("cannot remove {}: {error}", path.display()),
                        "look at the state folder",
                    ),
                }
            }
        }
        answer.revision = self.store.apply(changes);
        let left = compile::without_target(self.store.world().resources());
        let lost = compile::without_target(&before);
        let new = left.into_iter().filter(|(policy, _)| !lost.contains_key(policy));
        answer.problems.extend(new.map(|((policy, service), means)| target_lost(&before, &policy, &service, means)));
        answer
    }
}

/// Does a text name one of these resources?
fn names_one<T>(text: &str, by_name: &BTreeMap<String, T>) -> bool {
    text.split_whitespace().any(|word| by_name.contains_key(word.trim_end_matches([',', ';', ':'])))
}

/// What is said of a security policy whose Service went.
fn target_lost(before: &Resources, policy: &ResourceKey, service: &ResourceKey, means: &str) -> Wrong {
    let object = before.service(&service.name);
    let pods = object.into_iter().flat_map(|object| {
        let workloads = before.workloads_in(&service.name.namespace);
        workloads.filter(|workload| object.spec.selects(&workload.metadata.labels)).map(|workload| workload.named().to_string())
    });
    let pods: Vec<String> = pods.take(PODS_TOLD).collect();
    let pods = if pods.is_empty() { String::new() } else { format!("; it was for {}", pods.join(", ")) };
    Wrong {
        resource: Some(policy.to_string()),
        place: None,
        at: String::new(),
        text: format!("{service} does not exist any more: {means}{pods}"),
        remedy: "bring the Service back, or name the pods as the policy's targets (kind: Workload)".to_owned(),
        refuses: false,
    }
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
        let world = self.store.world();
        let missing = world.local_pods().filter_map(|pod| {
            let (namespace, name) = (pod.metadata.namespace.as_str(), pod.metadata.name.as_str());
            let expected = pod.spec.transport == WorkloadTransport::MutualTls
                && !pod.spec.terminating
                && !connected.contains(&(namespace, name));
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
        .map(|((policy, service), means)| format!("{policy}: {service} does not exist; {means}"))
        .collect();
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
            "meshed": workload.spec.transport == WorkloadTransport::MutualTls,
            "terminating": workload.spec.terminating,
            "local": world.is_local_pod(key),
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
        "nodes": api.nodes.reports(),
        "resources": kinds,
        "problems": {
            "refuses": count(Severity::Refuses),
            "warns": count(Severity::Warns),
            "list": problems.iter().map(|known| wrong(&known.problem, known.place.clone())).collect::<Vec<_>>(),
        },
        "withoutTarget": without_target,
        "pods": pods,
    }))
    .into_response()
}

/// A kind by its name, its plural or its short form.
pub(crate) fn kind_named(text: &str) -> Option<Kind> {
    let text = text.to_ascii_lowercase();
    Kind::ALL.into_iter().find(|kind| {
        let name = kind.as_str().to_ascii_lowercase();
        let (plural, short) = match kind {
            Kind::Mesh => ("meshes", "mesh"),
            Kind::Service => ("services", "svc"),
            Kind::Workload => ("workloads", "wl"),
            Kind::HttpRoute => ("httproutes", "route"),
            Kind::AuthorizationPolicy => ("authorizationpolicies", "authz"),
            Kind::RequestAuthentication => ("requestauthentications", "authn"),
            Kind::PeerAuthentication => ("peerauthentications", "peer"),
            Kind::TrafficPolicy => ("trafficpolicies", "tp"),
        };
        text == name || text == plural || text == short
    })
}

/// What anybody on this machine may look at, so that a browser shows the dashboard.
const OPEN: [&str; 3] = ["/", "/api/graph", "/ready"];

/// How many pods a warning names.
const PODS_TOLD: usize = 8;

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

    const SERVICE: &str =
        "apiVersion: v1\nkind: Service\nmetadata: { name: web, namespace: shop }\nspec: { ports: [{ port: 80 }] }\n";

    fn api(state: &Path) -> Arc<Api> {
        let clock = crate::identity::testing::clock();
        let trust_domain: crate::identity::spiffe::TrustDomain = "cluster.local".parse().unwrap();
        let local = "127.0.0.1:0".parse().unwrap();
        std::fs::create_dir_all(state.join(STORED)).unwrap();
        let config = Config {
            resources: Vec::new(),
            state: state.to_owned(),
            trust_domain: trust_domain.clone(),
            listen: Vec::new(),
            api: local,
            metrics: local,
            svid_lifetime: Duration::from_secs(3600),
        };
        let store = Arc::new(Store::new(state));
        let metrics = Arc::new(crate::control::metrics::Metrics::new().unwrap());
        let sessions = Arc::new(Sessions::new(Arc::clone(&store), trust_domain.clone(), clock.clone(), metrics));
        let ca = Arc::new(Authority::open(&state.join("ca"), trust_domain, clock.clone()).unwrap());
        Api::new(&config, store, sessions, Arc::default(), ca, clock)
    }

    fn texts(text: &str) -> Vec<Text> {
        vec![Text { name: "web.yaml".to_owned(), text: text.to_owned(), keys: BTreeMap::new() }]
    }

    fn actions(answer: &Answer) -> Vec<(&str, &str)> {
        answer.results.iter().map(|done| (done.resource.as_str(), done.action.as_str())).collect()
    }

    #[test]
    fn a_document_is_applied_changed_and_deleted() {
        let state = tempfile::tempdir().unwrap();
        let api = api(state.path());
        assert_eq!(actions(&api.apply(&texts(SERVICE))), [("Service/shop/web", "created")]);
        assert_eq!(actions(&api.apply(&texts(SERVICE))), [("Service/shop/web", "unchanged")]);
        let answer = api.apply(&texts(&SERVICE.replace("80", "81")));
        assert_eq!(actions(&answer), [("Service/shop/web", "changed")]);
        let key: ResourceKey = "Service/shop/web".parse().unwrap();
        assert!(api.store.world().body(&key).unwrap().json.contains(r#""clusterIP":"10.65.0.2""#));
        assert_eq!(actions(&api.delete(&texts(SERVICE), Again::default())), [("Service/shop/web", "deleted")]);
        assert!(api.store.world().body(&key).is_none());
        assert!(std::fs::read_dir(state.path().join(STORED)).unwrap().next().is_none());
        let again = api.delete(&texts(SERVICE), Again::default());
        assert_eq!(again.problems[0].text, "there is no such resource");
        let again = api.delete(&texts(SERVICE), Again { again: true });
        assert!(again.problems.is_empty());
        assert_eq!(actions(&again), [("Service/shop/web", "gone")]);
    }

    #[test]
    fn one_bad_document_keeps_all_others_out() {
        let state = tempfile::tempdir().unwrap();
        let api = api(state.path());
        let bad = "---\napiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec:\n  action: DENY\n  ruels: []\n";
        let answer = api.apply(&texts(&(SERVICE.to_owned() + bad)));
        let problem = answer.problems.iter().find(|problem| problem.refuses).unwrap();
        assert!(problem.text.contains("ruels"), "{problem:?}");
        assert!(problem.place.as_deref().unwrap().starts_with("web.yaml:11:"), "{problem:?}");
        assert!(answer.results.is_empty());
        assert_eq!(api.store.world().revision(), 0);
        assert!(std::fs::read_dir(state.path().join(STORED)).unwrap().next().is_none());
    }

    #[test]
    fn a_refused_change_leaves_the_last_good_form() {
        let state = tempfile::tempdir().unwrap();
        let api = api(state.path());
        api.apply(&texts(SERVICE));
        let before = api.store.world().body(&"Service/shop/web".parse().unwrap()).unwrap().clone();
        let answer = api.apply(&texts(&SERVICE.replace("port: 80", "port: 70000")));
        assert!(answer.problems.iter().any(|problem| problem.refuses));
        assert_eq!(api.store.world().body(&"Service/shop/web".parse().unwrap()), Some(&before));
    }

    #[test]
    fn a_document_of_a_watched_folder_is_not_deleted_but_found() {
        let state = tempfile::tempdir().unwrap();
        let api = api(state.path());
        let document = yaml::read(SERVICE).remove(0).unwrap();
        let key = document.resource.key();
        let origin = Origin::File("/etc/mesh/web.yaml".into());
        api.store.apply(vec![Change::Put { key, form: Form::Read(Arc::new(document.resource)), origin }]);
        let answer = api.delete(&texts(SERVICE), Again::default());
        assert!(answer.results.is_empty());
        assert_eq!(answer.problems[0].text, "it stands in /etc/mesh/web.yaml");
    }

    #[tokio::test]
    async fn a_local_pod_whose_sidecar_is_not_connected_is_waited_for_and_named() {
        let state = tempfile::tempdir().unwrap();
        let api = api(state.path());
        let pod = |name: &str, spec: &str, origin: Origin| {
            let text = format!(
                "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{ name: {name}, namespace: shop }}\nspec: {{ addresses: [10.64.0.9]{spec} }}\n"
            );
            let resource = yaml::read(&text).remove(0).unwrap().resource;
            Change::Put { key: resource.key(), form: Form::Read(Arc::new(resource)), origin }
        };
        let record = || Origin::Pod("pods/shop.json".into());
        api.store.apply(vec![
            pod("web-1", "", record()),
            pod("plain-1", ", transport: Plaintext", record()),
            pod("ending-1", ", terminating: true", record()),
            pod("elsewhere-1", "", Origin::File("vm.yaml".into())),
        ]);
        let response = proxies(State(Arc::clone(&api)), Query(Until { revision: Some(1), within: 50 })).await;
        let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        let answer: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(answer["notConnected"], json!([{ "namespace": "shop", "name": "web-1" }]));
        // Who ends while it is waited for is waited for no longer.
        let waiting = tokio::spawn(proxies(State(Arc::clone(&api)), Query(Until { revision: Some(1), within: 20_000 })));
        tokio::task::yield_now().await;
        api.store.apply(vec![pod("web-1", ", terminating: true", record())]);
        timeout(Duration::from_secs(10), waiting).await.expect("the answer comes when nobody is missing").unwrap();
    }

    /// What a watched folder says of a file.
    fn in_folder(api: &Api, path: &Path, text: &str) {
        std::fs::write(path, text).unwrap();
        let changes = yaml::read(text).into_iter().map(|document| {
            let resource = document.unwrap().resource;
            Change::Put { key: resource.key(), form: Form::Read(Arc::new(resource)), origin: Origin::File(path.to_owned()) }
        });
        api.store.apply(changes.collect());
    }

    #[test]
    fn a_document_of_a_watched_folder_is_not_applied_over() {
        let state = tempfile::tempdir().unwrap();
        let api = api(state.path());
        let path = state.path().join("mesh.yaml");
        in_folder(&api, &path, &format!("# the shop\n---\n{SERVICE}"));
        let answer = api.apply(&texts(&SERVICE.replace("80", "81")));
        assert!(answer.results.is_empty());
        let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
        assert_eq!(problem.place.as_deref(), Some("web.yaml:1:1"));
        let place = format!("{}:3:1", path.display());
        assert!(problem.refuses && problem.text.starts_with(&place), "{problem:?}");
        assert!(std::fs::read_dir(state.path().join(STORED)).unwrap().next().is_none());
    }

    #[test]
    fn a_security_policy_that_loses_its_service_is_told_of() {
        let state = tempfile::tempdir().unwrap();
        let api = api(state.path());
        let policy = "---\napiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec:\n  targetRefs: [{ kind: Service, name: web }]\n  action: DENY\n  rules: [{}]\n";
        let pod = "---\napiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: { name: web-1, namespace: shop, labels: { app: web } }\nspec: { addresses: [10.64.0.9] }\n";
        let service = SERVICE.replace("ports", "selector: { app: web }, ports");
        let answer = api.apply(&texts(&(service.clone() + policy + pod)));
        assert!(answer.problems.is_empty(), "{:?}", answer.problems);
        let answer = api.delete(&texts(&service), Again::default());
        let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
        assert!(!problem.refuses && problem.resource.as_deref() == Some("AuthorizationPolicy/shop/gate"), "{problem:?}");
        assert!(problem.text.contains("goes on covering what it led to, and nothing else; it was for shop/web-1"), "{problem:?}");
        // Both at once leave nothing behind.
        api.apply(&texts(&service));
        assert!(api.delete(&texts(&(service + policy)), Again::default()).problems.is_empty());
    }

    const POD: &str = "---\napiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: { name: web-1, namespace: shop, labels: { app: web } }\nspec: { addresses: [10.64.0.9] }\n";

    #[test]
    fn who_changes_a_service_does_not_take_its_policy_off_the_pods() {
        let state = tempfile::tempdir().unwrap();
        let policy = "---\napiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec:\n  targetRefs: [{ kind: Service, name: web }]\n  action: DENY\n  rules: [{}]\n";
        let service = SERVICE.replace("ports", "selector: { app: web }, ports");
        let decides = |api: &Api, port: u16| {
            // What the pod's sidecar is sent, and what it makes of it.
            let pod = "shop/web-1".parse().unwrap();
            let world = api.store.world();
            let mut resources = Resources::default();
            for key in crate::control::select::select(&world, &pod, &"workload/shop/web-1".parse().unwrap()).keys {
                let body = world.body(&key).unwrap();
                let resource = Resource::from_json(key.kind, body.json.as_bytes()).unwrap();
                assert!(!compile::admit(&mut resources, key, Ok(Arc::new(resource))).refused());
            }
            let own = compile::Own { workload: pod, trust_domain: "cluster.local".parse().unwrap() };
            let (snapshot, _) = compile::compile(&resources, &own, &crate::snapshot::Snapshot::empty());
            let identity = "spiffe://cluster.local/ns/shop/sa/any".parse().unwrap();
            let peer = crate::policy::Peer { identity: Some(identity), address: "10.64.0.3:1".parse().unwrap(), port };
            format!("{:?}", snapshot.inbound.port(port).policies.authorization.as_ref().unwrap().decide_opaque(&peer))
        };
        let denied = |api: &Api, port| {
            let verdict = decides(api, port);
            assert!(verdict.contains("AuthorizationPolicy/shop/gate"), "{port}: {verdict}");
        };
        {
            let api = api(state.path());
            let answer = api.apply(&texts(&(service.clone() + policy + POD)));
            assert!(answer.problems.is_empty(), "{:?}", answer.problems);
            denied(&api, 80);
            // Another port, and the policy beside it as it was.
            let answer = api.apply(&texts(&(service.replace("port: 80", "port: 80, targetPort: 81") + policy)));
            denied(&api, 80);
            denied(&api, 81);
            let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
            assert!(!problem.refuses && problem.resource.as_deref() == Some("AuthorizationPolicy/shop/gate"), "{problem:?}");
            let text = "the policy goes on covering port 80 of shop/web-1: Service/shop/web led there, and leads there no longer";
            assert_eq!(problem.text, text);
            // Other pods.
            let answer = api.apply(&texts(&service.replace("app: web", "app: nobody")));
            assert!(
                answer.problems.iter().any(|problem| problem.text.contains("ports 80, 81 of shop/web-1")),
                "{:?}",
                answer.problems
            );
            denied(&api, 80);
            denied(&api, 81);
        }
        {
            // While nobody looks, and without the Service.
            let api = api(state.path());
            let stored = yaml::read(&(policy.to_owned() + POD)).into_iter().map(|document| document.unwrap().resource);
            let put = |resource: Resource| {
                let origin = Origin::Applied(api.stored(&resource.key()));
                Change::Put { key: resource.key(), form: Form::Read(Arc::new(resource)), origin }
            };
            api.store.apply(stored.map(put).collect());
            api.store.forget_gone_policies();
            denied(&api, 80);
            denied(&api, 81);
            let told = compile::without_target(api.store.world().resources());
            assert!(told.values().all(|means| means.contains("goes on covering")) && told.len() == 1, "{told:?}");
            // Who may change the policy lets go, and is told of what.
            let answer = api.apply(&texts(&policy.replace("name: gate,", "name: gate, annotations: { reviewed: today },")));
            let said = |text: &str| answer.problems.iter().any(|problem| problem.text.contains(text));
            assert!(said("lets go of ports 80, 81 of shop/web-1"), "{:?}", answer.problems);
            assert!(decides(&api, 80).contains("default_allow"));
        }
    }

    #[test]
    fn what_people_write_of_the_control_planes_own_word_is_dropped() {
        let state = tempfile::tempdir().unwrap();
        let api = api(state.path());
        let policy = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: gate, namespace: shop }\nspec: { action: DENY, rules: [{}] }\nstatus: { accepted: true, kept: [{ service: web, ports: [80] }] }\n";
        assert!(api.apply(&texts(policy)).problems.is_empty());
        let key: ResourceKey = "AuthorizationPolicy/shop/gate".parse().unwrap();
        let body = api.store.world().body(&key).unwrap().json.to_string();
        assert!(!body.contains("status"), "{body}");
    }

    #[test]
    fn a_problem_that_a_change_makes_for_another_document_is_told_with_the_change() {
        let state = tempfile::tempdir().unwrap();
        let api = api(state.path());
        let service =
            |name: &str| SERVICE.replace("name: web", &format!("name: {name}")).replace("ports", "clusterIP: 10.65.7.7, ports");
        assert!(api.apply(&texts(&service("web"))).problems.is_empty());
        for name in ["zoo", "api"] {
            let answer = api.apply(&texts(&service(name)));
            assert!(answer.problems.iter().any(|problem| problem.text.contains("10.65.7.7") && !problem.refuses), "{name}");
        }
    }

    #[test]
    fn the_record_of_a_running_pod_counts_before_every_document_of_its_name() {
        let state = tempfile::tempdir().unwrap();
        let api = api(state.path());
        let claim = |address: &str| {
            format!(
                "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{ name: web, namespace: shop }}\nspec: {{ addresses: [{address}] }}\n"
            )
        };
        let key: ResourceKey = "Workload/shop/web".parse().unwrap();
        let in_force = |address: &str| api.store.world().body(&key).unwrap().json.contains(address);
        // A document that is there before the pod gives way to it.
        assert_eq!(actions(&api.apply(&texts(&claim("10.64.0.9")))), [("Workload/shop/web", "created")]);
        let record = yaml::read(&claim("10.64.0.2")).remove(0).unwrap().resource;
        let origin = Origin::Pod("pods/shop.web.json".into());
        api.store.apply(vec![Change::Put { key: key.clone(), form: Form::Read(Arc::new(record)), origin: origin.clone() }]);
        assert!(in_force("10.64.0.2"));
        let path = state.path().join("mesh.yaml");
        in_folder(&api, &path, &claim("10.64.0.8"));
        assert!(in_force("10.64.0.2"));
        assert_eq!(api.sidecars().1, [NotConnected { namespace: "shop".to_owned(), name: "web".to_owned() }]);
        let told: Vec<_> = api.store.problems().iter().cloned().collect();
        let places: Vec<_> = told.iter().filter_map(|wrong| wrong.place.as_deref()).collect();
        let stored = api.stored(&key);
        assert_eq!(places, [format!("{}:1:1", path.display()), format!("{}:1:1", stored.display())]);
        for wrong in &told {
            assert!(wrong.problem.text.starts_with("the pod shop/web is running here"), "{wrong:?}");
            assert!(wrong.problem.severity == Severity::Refuses && wrong.problem.remedy == "choose another name", "{wrong:?}");
        }
        let answer = api.apply(&texts(&claim("10.64.0.7")));
        let [problem] = answer.problems.as_slice() else { panic!("{:?}", answer.problems) };
        assert!(problem.refuses && problem.text.starts_with("the pod shop/web is running here"), "{problem:?}");
        assert!(answer.results.is_empty() && in_force("10.64.0.2"));
        // It goes, and the documents are what there is.
        api.store.apply(vec![Change::Remove { key: key.clone(), origin }]);
        assert!(in_force("10.64.0.9"));
    }

    #[test]
    fn a_folder_that_gains_what_was_applied_is_told_of_and_the_applied_form_stays() {
        let state = tempfile::tempdir().unwrap();
        let api = api(state.path());
        api.apply(&texts(SERVICE));
        let key: ResourceKey = "Service/shop/web".parse().unwrap();
        let before = api.store.world().body(&key).unwrap().clone();
        assert!(api.store.problems().is_empty());
        let path = state.path().join("mesh.yaml");
        in_folder(&api, &path, &SERVICE.replace("80", "81"));
        let problems = api.store.problems();
        let [wrong] = &*problems else { panic!("{problems:?}") };
        assert_eq!(wrong.place, Some(format!("{}:1:1", path.display())));
        let stored = api.stored(&key).display().to_string();
        assert!(wrong.problem.severity == Severity::Refuses && wrong.problem.text.contains(&stored), "{wrong:?}");
        assert_eq!(api.store.world().body(&key), Some(&before));
        let origin = api.store.world().origin(&key).map(ToString::to_string);
        assert_eq!(standing(&key, &before.version, origin, &problems, &[])["accepted"], true);
        // Without the stored one, the folder's counts.
        api.delete(&texts(SERVICE), Again::default());
        assert!(api.store.problems().is_empty() && api.store.world().body(&key) != Some(&before));
    }

    #[test]
    fn only_this_machine_is_a_loopback_host() {
        for host in ["127.0.0.1:14080", "localhost:14080", "localhost", "[::1]:14080", "127.0.0.1"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["", "mesh.example:14080", "127.0.0.1.example", "localhost.example", "10.0.0.1:14080", "[::2]:80"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
