//! Changes: what `apply` stores and `delete` takes away, as a whole or not at all, with what it does to other documents.

use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::{Api, Wrong, refusal, wrong};
use crate::base::names::Named;
use crate::base::problems::{FieldPath, Severity};
use crate::base::state;
use crate::control::STORED;
use crate::control::source::documents::documents;
use crate::control::source::file::place_of;
use crate::control::store;
use crate::control::world::{Change, Form, Origin};
use crate::model::yaml::{self, Document};
use crate::model::{Kind, ResourceKey, Resources};
use crate::snapshot::{compile, kept};

#[cfg(test)]
mod tests;

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

/// The answer to a change.
#[derive(Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Answer {
    /// The revision of the desired state after it.
    pub(crate) revision: u64,
    pub(crate) results: Vec<Done>,
    pub(crate) problems: Vec<Wrong>,
}

/// What the API answers to a change where the documents are a cluster's.
fn is_the_clusters(api: &Api) -> Option<Response> {
    let text = "the documents of this mesh are objects of Kubernetes: change them with kubectl";
    api.cluster.is_some().then(|| refusal(StatusCode::CONFLICT, text.to_owned()))
}

pub(super) async fn apply(State(api): State<Arc<Api>>, headers: HeaderMap, body: Bytes) -> Response {
    if let Some(refused) = is_the_clusters(&api) {
        return refused;
    }
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
pub(super) struct Again {
    #[serde(default)]
    again: bool,
}

pub(super) async fn delete(State(api): State<Arc<Api>>, Query(again): Query<Again>, headers: HeaderMap, body: Bytes) -> Response {
    if let Some(refused) = is_the_clusters(&api) {
        return refused;
    }
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
    /// The file of a stored document.
    fn stored(&self, key: &ResourceKey) -> PathBuf {
        self.config.state.join(STORED).join(format!("{}.{}.{}.yaml", key.kind, key.name.namespace, key.name.name))
    }

    /// What was answered is on the disk. Once for all documents of a change, since each wait takes milliseconds.
    fn settle(&self, answer: &mut Answer) {
        let folder = self.config.state.join(STORED);
        let is_changed = answer.results.iter().any(|done| done.action != "unchanged");
        if is_changed && let Err(error) = state::sync_folder(&folder) {
            let text = format!("{} may lose this when the power is lost: {error}", folder.display());
            answer.problems.push(Wrong::refusing(None, None, text, "look at the disk, then send it again"));
        }
    }

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
        candidate.hold_addresses();
        let by_name: BTreeMap<String, _> = written.iter().map(|(key, written)| (key.to_string(), written)).collect();
        let before = LazyCell::new(|| self.store.world().faults().into_vec());
        for problem in candidate.faults().iter() {
            let found = match by_name.get(&problem.resource) {
                Some((name, document)) => wrong(problem, Some(format!("{name}:{}", document.position(&problem.at)))),
                // Of two that want one address the other may be the one that is told; the change is the cause all the same.
                None if names_one(&problem.text, &by_name)
                    && (problem.severity == Severity::Warns || !before.contains(problem)) =>
                {
                    wrong(problem, None)
                }
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
            lost.into_iter().map(move |beyond| Wrong {
                resource: Some(policy.to_string()),
                place: place.clone(),
                at: String::new(),
                text: format!("the policy was changed: it lets go of {}", let_go(&beyond)),
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
                && let Err(error) = state::write_synced(&path, &text, 0o600)
            {
                let text = format!("cannot write {}: {error}", path.display());
                answer.problems.push(Wrong::refusing(Some(key.to_string()), None, text, "make room in the state folder"));
                break;
            }
            answer.results.push(Done { resource: key.to_string(), action: action.to_owned() });
            let form = Form::Read(Arc::new(document.resource));
            changes.push(Change::Put { key, form, origin: Origin::Applied(path) });
        }
        self.settle(&mut answer);
        answer.revision = self.store.apply(changes);
        answer
    }

    /// The place in a watched folder where this document is written, if it is.
    fn folder_of(&self, key: &ResourceKey) -> Option<String> {
        let path = self.store.world().origins(key).find_map(|origin| match origin {
            Origin::File(path) => Some(path.clone()),
            Origin::Applied(_) | Origin::Pod(_) | Origin::Object(_) => None,
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
                    // What means nothing here is not stored either.
                    Err(fault) if fault.severity == Severity::Warns => {
                        let place = Some(format!("{}:{}", text.name, fault.at));
                        let told = Wrong { refuses: false, ..Wrong::refusing(None, place, fault.text, &fault.remedy) };
                        answer.problems.push(told);
                        continue;
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
                            // Its record goes with it, and without it nothing would be known of what runs.
                            Some(_) if self.store.world().is_local_pod(&key) => {
                                let Named { namespace, name } = &key.name;
                                let remedy = format!("stop it: `outrigger stop {name} -n {namespace}`");
                                wrong(Some(key.to_string()), format!("it is the pod {} that runs here", key.name), &remedy);
                            }
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
        for done in &answer.results {
            let Ok(key) = done.resource.parse::<ResourceKey>() else { continue };
            let policy = before.get(&key).filter(|_| done.action == "deleted");
            let kept = policy.map(|policy| kept::beyond(&before, policy, policy.kept())).unwrap_or_default();
            answer.problems.extend(kept.into_iter().map(|beyond| Wrong {
                resource: Some(done.resource.clone()),
                place: None,
                at: String::new(),
                text: format!("the policy is deleted: it lets go of {} too", let_go(&beyond)),
                remedy: "write another policy for those pods where they are to stay covered".to_owned(),
                refuses: false,
            }));
        }
        self.settle(&mut answer);
        answer.revision = self.store.apply(changes);
        let left = compile::without_target(self.store.world().resources());
        let lost = compile::without_target(&before);
        // A workload that is gone leaves nothing open.
        let new = left.into_iter().filter(|(pair, _)| pair.1.kind == Kind::Service && !lost.contains_key(pair));
        answer.problems.extend(new.map(|((policy, service), means)| target_lost(&before, &policy, &service, means)));
        answer
    }
}

/// What a policy covered and covers no longer.
fn let_go(beyond: &kept::Beyond) -> String {
    format!("{}, to which Service/{} {} before", beyond.covered, beyond.service, beyond.led())
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

/// How many pods a warning names.
const PODS_TOLD: usize = 8;
