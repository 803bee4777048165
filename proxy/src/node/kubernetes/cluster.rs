//! What the API server says of this node's pods, kept up to date by a watch; and which namespaces ask for sidecars.
//!
//! An API server that is away or slow costs nobody who is known: what was heard stays. Only what is asked for here is kept.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::ListParams;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, DefaultBackoff, Event, watcher};
use kube::{Api, Client};
use tokio::sync::watch;
use tracing::{info, warn};

use super::described::Described;
use super::volume::Owner;
use crate::injection;
use crate::model::marks;

/// Pods by UID.
pub(crate) type PodsByUid = BTreeMap<String, Arc<Described>>;
/// Namespaces by name.
pub(crate) type Namespaces = BTreeMap<String, injection::Namespace>;

/// What was heard.
pub(crate) struct Cluster {
    client: Client,
    /// `None` before the first whole list.
    pub(crate) pods: watch::Sender<Option<PodsByUid>>,
    pub(crate) namespaces: watch::Sender<Option<Namespaces>>,
}

impl Cluster {
    /// Nothing was heard yet.
    pub(crate) fn new(client: Client) -> Self {
        Self { client, pods: watch::Sender::new(None), namespaces: watch::Sender::new(None) }
    }

    /// The pod of `owner`, in which the container `id` asks. What was heard of it is enough where it names that container. Where
    /// it does not, the API server is asked for the pod as it is now: a container may have been added that this watch has
    /// not heard of, and the kubelet has.
    pub(crate) async fn pod(&self, owner: &Owner, id: &str) -> Option<Arc<Described>> {
        let heard = self.pods.borrow().as_ref().and_then(|pods| pods.get(&owner.uid).map(Arc::clone));
        match heard.filter(|pod| pod.names_sidecar(id)) {
            Some(pod) => Some(pod),
            None => tokio::time::timeout(HEARD_WITHIN, self.pod_now(owner)).await.unwrap_or_default().map(Arc::new),
        }
    }

    /// A list without a version is of what is written at that moment (Kubernetes' API concepts, "resource versions").
    async fn pod_now(&self, owner: &Owner) -> Option<Described> {
        let api = Api::<Pod>::namespaced(self.client.clone(), &owner.namespace);
        let of_name = ListParams::default().fields(&format!("metadata.name={}", owner.name));
        match api.list(&of_name).await {
            Ok(listed) => listed.items.iter().filter_map(Described::of).find(|pod| pod.owner.uid == owner.uid),
            Err(error) => {
                warn!(pod = %owner.named(), error = super::super::chain(&error), "the API server does not say what the pod is");
                None
            }
        }
    }

    /// Follows the pods of `node` for ever.
    pub(crate) async fn follow_pods(&self, node: &str) {
        let client = self.client.clone();
        let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
        let entry = |pod: &Pod| Described::of(pod).map(|described| (described.owner.uid.clone(), Arc::new(described)));
        follow(Api::<Pod>::all(client), config, "pods", entry, &self.pods).await;
    }

    /// Follows the namespaces for ever.
    pub(crate) async fn follow_namespaces(&self) {
        let client = self.client.clone();
        let entry = |namespace: &Namespace| {
            let metadata = &namespace.metadata;
            let name = metadata.name.clone()?;
            let ours = |texts: &Option<BTreeMap<String, String>>| texts.iter().flat_map(marks::ours).map(owned).collect();
            let (labels, annotations) = (ours(&metadata.labels), ours(&metadata.annotations));
            Some((name.clone(), injection::Namespace { name, labels, annotations }))
        };
        follow(Api::<Namespace>::all(client), watcher::Config::default(), "namespaces", entry, &self.namespaces).await;
    }
}

fn owned((name, text): (&String, &String)) -> (String, String) {
    (name.clone(), text.clone())
}

/// Watches one kind, lists it anew where the API server says that what is known is too old, and says what is there.
async fn follow<K, V: Clone + PartialEq>(
    api: Api<K>,
    config: watcher::Config,
    what: &'static str,
    entry: impl Fn(&K) -> Option<(String, V)>,
    heard: &watch::Sender<Option<BTreeMap<String, V>>>,
) where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let mut events = std::pin::pin!(watcher(api, config).backoff(Pauses::default()));
    let (mut listed, mut is_away) = (BTreeMap::new(), false);
    // A watch has no end by itself: what ends it is followed by another one.
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                if std::mem::take(&mut is_away) {
                    info!(what, "the API server is heard again");
                }
                heard.send_if_modified(|known| apply(event, &entry, &mut listed, known));
            }
            // One line for each time that it goes away, not for each attempt.
            Err(error) if !std::mem::replace(&mut is_away, true) => {
                warn!(what, error = super::super::chain(&error), "the API server is not heard; what it said last stays");
            }
            Err(_again) => {}
        }
    }
}

/// Takes one event in. Did it change what is there?
fn apply<K, V: PartialEq>(
    event: Event<K>,
    entry: &impl Fn(&K) -> Option<(String, V)>,
    listed: &mut BTreeMap<String, V>,
    known: &mut Option<BTreeMap<String, V>>,
) -> bool {
    match event {
        Event::Init => {
            listed.clear();
            false
        }
        Event::InitApply(object) => {
            listed.extend(entry(&object));
            false
        }
        Event::InitDone => {
            let fresh = Some(std::mem::take(listed));
            let changed = *known != fresh;
            *known = fresh;
            changed
        }
        Event::Apply(object) => {
            let Some((key, value)) = entry(&object) else { return false };
            let known = known.get_or_insert_default();
            let changed = known.get(&key) != Some(&value);
            known.insert(key, value);
            changed
        }
        Event::Delete(object) => {
            let gone = entry(&object).and_then(|(key, _value)| known.as_mut()?.remove(&key));
            gone.is_some()
        }
    }
}

/// Between two attempts to hear the API server: as its clients usually wait, and never longer than [`PAUSE_MAX`], a half of it by chance.
/// They wait a minute, in which pods come that nobody has heard of.
#[derive(Default)]
struct Pauses(DefaultBackoff);

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let usual = self.0.next()?;
        let chance = f64::from(usual.subsec_nanos()) / 1e9;
        Some(usual.min(PAUSE_MAX.mul_f64(0.5 + chance / 2.0)))
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.0.reset();
    }
}

const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How long an enrolment waits for the API server's word on its pod.
const HEARD_WITHIN: Duration = Duration::from_secs(4);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::described::NotSidecar;
    use super::*;

    type Known = Option<BTreeMap<String, u8>>;

    fn taken(events: Vec<Event<(&str, u8)>>) -> (Known, Vec<bool>) {
        let entry = |object: &(&str, u8)| (object.1 != 0).then(|| (object.0.to_owned(), object.1));
        let (mut listed, mut known) = (BTreeMap::new(), None);
        let changed = events.into_iter().map(|event| apply(event, &entry, &mut listed, &mut known)).collect();
        (known, changed)
    }

    /// A pod with its sidecar, and the ephemeral containers of that name that mount its volume.
    fn pod(debugging: Option<&str>) -> serde_json::Value {
        let mounts = json!([{ "name": "outrigger", "mountPath": "/run/outrigger" }]);
        let debugging: Vec<_> = debugging.iter().map(|name| json!({ "name": name, "volumeMounts": mounts })).collect();
        json!({
            "metadata": { "namespace": "shop", "name": "web-1", "uid": "0a-1" },
            "spec": {
                "initContainers": [{ "name": "outrigger", "restartPolicy": "Always", "volumeMounts": mounts }],
                "containers": [{ "name": "app" }],
                "ephemeralContainers": debugging,
                "volumes": [{ "name": "outrigger", "csi": { "driver": "csi.outrigger.dev", "readOnly": true } }],
            },
        })
    }

    /// An API server that says of every list that this is in it; none: it is away.
    fn server(listed: Option<serde_json::Value>) -> Client {
        let answer = move |_asked: http::Request<kube::client::Body>| {
            let listed = listed.clone();
            async move {
                let pod = listed.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::ConnectionRefused))?;
                let list = json!({ "apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": [pod] });
                Ok::<_, std::io::Error>(http::Response::new(kube::client::Body::from(list.to_string().into_bytes())))
            }
        };
        Client::new(tower::service_fn(answer), "default")
    }

    #[tokio::test]
    async fn a_container_that_was_added_and_not_heard_of_yet_is_not_taken_for_the_sidecar() {
        let described = |pod| Described::of(&serde_json::from_value(pod).unwrap()).unwrap();
        let heard = described(pod(None));
        let owner = heard.owner.clone();
        let asked = async |now: Option<serde_json::Value>| {
            let cluster = Cluster::new(server(now));
            cluster.pods.send_replace(Some([(owner.uid.clone(), Arc::new(heard.clone()))].into()));
            cluster.pod(&owner, "cc33").await.map(|pod| pod.check_sidecar("cc33"))
        };
        assert_eq!(asked(Some(pod(Some("look")))).await, Some(Err(NotSidecar::Shared("look".into()))));
        assert_eq!(asked(Some(pod(None))).await, Some(Ok(())));
        assert_eq!(asked(None).await, None, "while nobody says what the pod is now, nobody new is let in");
    }

    #[test]
    fn an_api_server_that_is_away_is_looked_for_every_few_seconds_however_long_it_is() {
        let mut pauses = Pauses::default();
        let later: Vec<Duration> = pauses.by_ref().skip(8).take(50).collect();
        assert!(later.iter().all(|pause| (PAUSE_MAX / 2..=PAUSE_MAX).contains(pause)), "{later:?}");
        assert!(later.iter().any(|pause| *pause != later[0]), "not all nodes at once");
        pauses.reset();
        assert!(pauses.next().unwrap() < Duration::from_secs(2));
    }

    #[test]
    fn nothing_is_known_before_the_first_list_is_whole() {
        let (known, _) = taken(vec![Event::Init, Event::InitApply(("a", 1))]);
        assert_eq!(known, None);
        let (known, changed) = taken(vec![Event::Init, Event::InitApply(("a", 1)), Event::InitDone]);
        assert_eq!((known, changed), (Some([("a".to_owned(), 1)].into()), vec![false, false, true]));
    }

    #[test]
    fn a_list_that_is_made_anew_forgets_what_went_meanwhile_and_a_repetition_is_no_news() {
        let list = |names: &[&'static str]| {
            let mut events = vec![Event::Init];
            events.extend(names.iter().map(|name| Event::InitApply((*name, 1))));
            events.push(Event::InitDone);
            events
        };
        let (known, changed) = taken([list(&["a", "b"]), list(&["b"]), list(&["b"])].concat());
        assert_eq!(known, Some([("b".to_owned(), 1)].into()));
        assert_eq!(changed.iter().filter(|changed| **changed).count(), 2);
        let (known, changed) = taken(vec![
            Event::Apply(("a", 1)),
            Event::Apply(("a", 1)),
            Event::Apply(("a", 2)),
            Event::Delete(("a", 2)),
            Event::Delete(("a", 2)),
        ]);
        assert_eq!((known, changed), (Some(BTreeMap::new()), vec![true, false, true, true, false]));
        let (known, changed) = taken(vec![Event::Apply(("nothing", 0))]);
        assert_eq!((known, changed), (None, vec![false]));
    }
}
