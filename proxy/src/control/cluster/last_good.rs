//! What stands in the place of refused documents, kept in the cluster: a control plane that starts finds a refused document and
//! not the form that was good before it, which every sidecar goes by.
//!
//! Source: Gateway API, `PartiallyInvalid` ("Reverting to the last known good state should only be done by implementations that have
//! a means of restoring that state if/when they are restarted"). One ConfigMap, written by the one who leads and read by whoever
//! starts; what stands in it is of refused documents alone, so it is empty as a rule. Invariant: a form is that of the very object
//! (its UID): what was deleted and written anew has none. What cannot be read here is as if it had never been kept.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::warn;

use super::root::{MANAGER, metadata};
use crate::base::drain::DrainGuard;
use crate::control::source::kubernetes::told;
use crate::model::object::MESH_NAMESPACE;
use crate::model::{Resource, ResourceKey};
use crate::snapshot::compile;

/// The good form of a document whose newest one is refused.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LastGood {
    /// The object's.
    pub(crate) uid: String,
    /// Which form of the object it is.
    pub(crate) generation: Option<i64>,
    pub(crate) resource: Arc<Resource>,
}

/// How refused documents stand.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Standing {
    /// Those of which an earlier form is in force.
    pub(crate) last_good: BTreeMap<ResourceKey, LastGood>,
    /// The UIDs of those of which nobody here knows an earlier form.
    pub(crate) without: BTreeSet<String>,
}

/// One entry of the ConfigMap, under the object's UID.
#[derive(Deserialize, Serialize)]
struct Entry {
    resource: String,
    generation: Option<i64>,
    /// The canonical JSON.
    document: String,
}

/// Reads what is kept.
///
/// # Errors
/// The API server does not say. Who may not read it finds nothing.
pub(crate) async fn read(client: &Client) -> Result<BTreeMap<ResourceKey, LastGood>, String> {
    let configs: Api<ConfigMap> = Api::namespaced(client.clone(), MESH_NAMESPACE);
    match tokio::time::timeout(ANSWER_MAX, configs.get_opt(CONFIG)).await {
        Ok(Ok(config)) => Ok(forms(&config.and_then(|config| config.data).unwrap_or_default())),
        Ok(Err(kube::Error::Api(status))) if status.code == 403 => {
            warn!(config_map = CONFIG, error = status.message, "last good forms are not read: upgrade the chart too");
            Ok(BTreeMap::new())
        }
        Ok(Err(error)) => Err(told(&error)),
        Err(_elapsed) => Err("the API server does not answer".to_owned()),
    }
}

/// Keeps what stands, while this control plane `leads`, until `stop` says so.
pub(crate) async fn keep(
    client: Client,
    mut standing: watch::Receiver<Standing>,
    mut leads: watch::Receiver<bool>,
    mut stop: DrainGuard,
) {
    let mut left_out = BTreeSet::new();
    loop {
        let is_leader = *leads.borrow_and_update();
        let now = standing.borrow_and_update().clone();
        let mut failed = false;
        if is_leader {
            match tokio::time::timeout(ANSWER_MAX, write(&client, &now)).await {
                Ok(Ok(too_much)) => {
                    for resource in too_much.difference(&left_out) {
                        warn!(%resource, "its last good form is too large to be kept over a restart; correct the document");
                    }
                    left_out = too_much;
                }
                Ok(Err(error)) => {
                    warn!(error = told(&error), "last good forms are not kept over a restart yet");
                    failed = true;
                }
                Err(_elapsed) => failed = true,
            }
        }
        tokio::select! {
            () = stop.stopped() => return,
            led = leads.changed() => if led.is_err() { return },
            changed = standing.changed(), if is_leader => if changed.is_err() { return },
            () = tokio::time::sleep(AGAIN), if failed => {}
        }
    }
}

/// Writes what is not written yet. Returns what there is no room for.
async fn write(client: &Client, standing: &Standing) -> Result<BTreeSet<ResourceKey>, kube::Error> {
    let configs: Api<ConfigMap> = Api::namespaced(client.clone(), MESH_NAMESPACE);
    let there = configs.get_opt(CONFIG).await?.and_then(|config| config.data).unwrap_or_default();
    let (wanted, too_much) = entries(standing, &there);
    if wanted != there {
        let config = ConfigMap { metadata: metadata(CONFIG), data: Some(wanted), ..ConfigMap::default() };
        configs.patch(CONFIG, &PatchParams::apply(MANAGER).force(), &Patch::Apply(config)).await?;
    }
    Ok(too_much)
}

/// What is to stand in the ConfigMap, and what there is no room for. An entry of a refused document of which nobody here knows an
/// earlier form is another replica's knowledge, and stays.
fn entries(standing: &Standing, there: &BTreeMap<String, String>) -> (BTreeMap<String, String>, BTreeSet<ResourceKey>) {
    let others = there.iter().filter(|(uid, _)| standing.without.contains(*uid));
    let mut wanted: BTreeMap<String, String> = others.map(|(uid, entry)| (uid.clone(), entry.clone())).collect();
    let mut bytes: usize = wanted.values().map(String::len).sum();
    let mut too_much = BTreeSet::new();
    for (key, good) in &standing.last_good {
        let entry = Entry { resource: key.to_string(), generation: good.generation, document: good.resource.to_json() };
        // Text and numbers: all of it has a JSON form.
        let entry = serde_json::to_string(&entry).unwrap_or_default();
        if bytes + entry.len() > BYTES_MAX {
            too_much.insert(key.clone());
            continue;
        }
        bytes += entry.len();
        wanted.insert(good.uid.clone(), entry);
    }
    (wanted, too_much)
}

/// The forms that stand there, those that are still good here.
fn forms(data: &BTreeMap<String, String>) -> BTreeMap<ResourceKey, LastGood> {
    let read = |uid: &str, entry: &str| {
        let Entry { resource, generation, document } = serde_json::from_str(entry).ok()?;
        let key: ResourceKey = resource.parse().ok()?;
        let resource = Resource::from_json(key.kind, document.as_bytes()).ok()?;
        let is_good = resource.key() == key && !compile::alone(&key, &resource).refused();
        is_good.then(|| (key, LastGood { uid: uid.to_owned(), generation, resource: Arc::new(resource) }))
    };
    data.iter().filter_map(|(uid, entry)| read(uid, entry)).collect()
}

const CONFIG: &str = "outrigger-last-good";

/// The API server takes 1 MiB of an object.
const BYTES_MAX: usize = 900 << 10;

const ANSWER_MAX: Duration = Duration::from_secs(5);

/// After a write that the API server could not do.
const AGAIN: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::yaml;

    fn route(name: &str, path: &str) -> (ResourceKey, LastGood) {
        let text = format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{parentRefs: [{{kind: Service, name: web}}], rules: [{{matches: [{{path: {{value: {path}}}}}], backendRefs: [{{name: web, port: 80}}]}}]}}\n"
        );
        let resource = yaml::read(&text).remove(0).unwrap().resource;
        (resource.key(), LastGood { uid: format!("uid-of-{name}"), generation: Some(3), resource: Arc::new(resource) })
    }

    #[test]
    fn what_is_kept_is_read_back_and_what_is_broken_is_as_if_it_had_never_been() {
        let standing = Standing { last_good: [route("a", "/a"), route("b", "/b")].into(), without: BTreeSet::new() };
        let (mut data, too_much) = entries(&standing, &BTreeMap::new());
        assert_eq!((forms(&data), too_much.len()), (standing.last_good.clone(), 0));
        data.insert("uid-of-b".to_owned(), "{".to_owned());
        assert_eq!(forms(&data).len(), 1);
        // A version that refuses what an earlier one took does without.
        let entry = data["uid-of-a"].replace("/a", "no-slash");
        assert!(forms(&[("uid-of-a".to_owned(), entry)].into()).is_empty());
    }

    #[test]
    fn what_another_replica_knows_stays_and_what_is_refused_no_more_goes() {
        let (_, other) = route("other", "/o");
        let there: BTreeMap<String, String> =
            [("uid-of-other".to_owned(), "theirs".to_owned()), ("uid-of-gone".to_owned(), "old".to_owned())].into();
        let standing = Standing { last_good: [route("a", "/a")].into(), without: [other.uid].into() };
        let (wanted, _) = entries(&standing, &there);
        assert_eq!(wanted.keys().collect::<Vec<_>>(), ["uid-of-a", "uid-of-other"]);
        assert_eq!(entries(&Standing::default(), &there).0, BTreeMap::new());
    }

    #[test]
    fn what_there_is_no_room_for_is_named() {
        let large = format!("/{}", "a".repeat(1_000));
        let all: BTreeMap<ResourceKey, LastGood> = (0..1_000).map(|number| route(&format!("r{number}"), &large)).collect();
        let (wanted, too_much) = entries(&Standing { last_good: all, without: BTreeSet::new() }, &BTreeMap::new());
        assert!(wanted.values().map(String::len).sum::<usize>() <= BYTES_MAX);
        assert_eq!(wanted.len() + too_much.len(), 1_000);
        assert!(!wanted.is_empty() && !too_much.is_empty());
    }
}
