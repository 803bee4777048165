//! Is a namespace being deleted? Asked of the API server before a security policy is taken for gone.
//!
//! Each kind is watched by itself, and a namespace's own watch may tell later that it is being deleted than another one that its
//! policies are. A namespace is marked before anything in it is deleted (Kubernetes, "Namespaces walkthrough"; finalizers), and
//! a read without a version is of what is written at that moment, so that who asks after the one knows the other. Invariant:
//! a policy stands until the API server has said it, also while it refuses to; what else happens to its kind is told meanwhile.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use kube::api::{DynamicObject, ListParams, ObjectMeta, PartialObjectMeta, TypeMeta};
use kube::{Api, Client};
use tokio::time::Instant;

use super::cluster::News;
use super::object::Object;
use super::watched::Watched;
use super::{PAUSE_MAX, PAUSE_MIN};
use crate::base::names::Named;
use crate::base::random::Dice;

/// What a watch took for gone, until it is known which namespaces are being deleted.
#[derive(Debug)]
pub(super) struct Doubted {
    /// The last one of each name: one before it was gone when that was made.
    gone: BTreeMap<Named, Object>,
    /// Is a list over? What it did not hold is gone.
    is_list_over: bool,
    /// When the API server is asked next, and how long after that once more.
    ask: Instant,
    pause: Duration,
}

impl Doubted {
    /// Nothing.
    pub(super) fn new() -> Self {
        Self { gone: BTreeMap::new(), is_list_over: false, ask: Instant::now(), pause: PAUSE_MIN }
    }

    pub(super) fn is_any(&self) -> bool {
        self.is_list_over || !self.gone.is_empty()
    }

    pub(super) fn put(&mut self, gone: Object) {
        self.begin();
        self.gone.insert(gone.name.clone(), gone);
    }

    /// A list begins: until it is over, what it does not hold is not gone, and what the one before it did not hold is not in it.
    pub(super) fn list_begins(&mut self) {
        self.is_list_over = false;
    }

    pub(super) fn list_ends(&mut self) {
        self.begin();
        self.is_list_over = true;
    }

    /// The first of them is asked for at once.
    fn begin(&mut self) {
        if !self.is_any() {
            (self.ask, self.pause) = (Instant::now(), PAUSE_MIN);
        }
    }

    /// When the API server is to be asked.
    pub(super) fn ask(&self) -> Instant {
        self.ask
    }

    /// Asks. What is to be told then, in this order: which namespaces are being deleted, and what is gone.
    ///
    /// # Errors
    /// The API server is away, or refuses: all of it stays, and is asked for later.
    pub(super) async fn settle(
        &mut self,
        watched: Watched,
        client: &Client,
        dice: &mut Dice,
    ) -> kube::Result<Vec<(Watched, News)>> {
        let mut names = self.gone.keys().map(|name| &*name.namespace);
        let one = names.next().filter(|one| !self.is_list_over && names.all(|name| name == *one));
        let endings = match endings(client, one).await {
            Ok(endings) => endings,
            Err(error) => {
                self.ask = Instant::now() + self.pause.mul_f64(0.5 + dice.fraction() / 2.0);
                self.pause = (self.pause * 2).min(PAUSE_MAX);
                return Err(error);
            }
        };
        let endings = endings.into_iter().map(|namespace| (Watched::Namespaces, News::Is(namespace)));
        let gone = std::mem::take(&mut self.gone).into_values().map(News::Gone);
        let gone = gone.chain(std::mem::take(&mut self.is_list_over).then_some(News::Ends));
        Ok(endings.chain(gone.map(|news| (watched, news))).collect())
    }
}

/// The namespaces that are being deleted; with `one`, that one if it is. Of one a list is asked for, too: who may watch namespaces
/// may list them.
async fn endings(client: &Client, one: Option<&str>) -> kube::Result<Vec<Object>> {
    let asked = ListParams { field_selector: one.map(|name| format!("metadata.name={name}")), ..ListParams::default() };
    let found = Api::<Namespace>::all(client.clone()).list_metadata(&asked).await?;
    Ok(found.items.into_iter().filter_map(marked).collect())
}

fn marked(found: PartialObjectMeta<Namespace>) -> Option<Object> {
    let metadata: ObjectMeta = found.metadata;
    metadata.deletion_timestamp.as_ref()?;
    let types = TypeMeta { api_version: "v1".to_owned(), kind: Watched::Namespaces.kind().to_owned() };
    Object::read(DynamicObject { types: Some(types), metadata, data: serde_json::json!({}) })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

    use kube::client::Body;
    use serde_json::{Value, json};
    use tokio::sync::mpsc;
    use tokio::task::JoinSet;

    use super::super::health::Health;
    use super::super::{SETTLED, follow};
    use super::*;
    use crate::identity::testing::clock;
    use crate::model::Kind;

    const POLICIES: Watched = Watched::Documents(Kind::AuthorizationPolicy);

    fn policy(name: &str) -> Value {
        json!({ "apiVersion": "outrigger.dev/v1alpha1", "kind": "AuthorizationPolicy", "spec": {},
            "metadata": { "name": name, "namespace": "shop", "uid": name, "resourceVersion": "7" } })
    }

    fn namespace(name: &str, more: Value) -> Value {
        let mut metadata = json!({ "name": name, "uid": "0a-1", "resourceVersion": "7" });
        metadata.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": metadata })
    }

    fn list(kind: &str, items: &[Value]) -> Value {
        json!({ "apiVersion": "v1", "kind": kind, "metadata": { "resourceVersion": "9" }, "items": items })
    }

    /// An API server with two policies. One is deleted, and a third one made; then the server has forgotten what it told, and the
    /// second one is gone at the next list. Of namespaces it says this: 0 is no answer at all.
    fn server(status: &Arc<AtomicU16>) -> Client {
        let (status, lists, watches) = (Arc::clone(status), Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let serve = move |asked: http::Request<Body>| {
            let (status, lists, watches) = (status.load(Ordering::Relaxed), Arc::clone(&lists), Arc::clone(&watches));
            async move {
                let query = asked.uri().query().unwrap_or_default();
                let (status, text) = if asked.uri().path() == "/api/v1/namespaces" {
                    let ending = namespace("shop", json!({ "deletionTimestamp": "2026-01-01T01:00:00Z" }));
                    let all = [ending, namespace("bank", json!({}))];
                    let found = if query.contains("fieldSelector=metadata.name%3Dshop") { &all[..1] } else { &all[..] };
                    let refused = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Forbidden",
                        "message": "namespaces is forbidden", "code": status });
                    match status {
                        0 => return Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused)),
                        200 => (200, list("PartialObjectMetadataList", found).to_string()),
                        other => (other, refused.to_string()),
                    }
                } else if !query.contains("watch=true") {
                    let first = lists.fetch_add(1, Ordering::Relaxed) == 0;
                    let found = if first { vec![policy("none"), policy("older")] } else { vec![policy("other")] };
                    (200, list("AuthorizationPolicyList", &found).to_string())
                } else if watches.fetch_add(1, Ordering::Relaxed) == 0 {
                    let expired = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired",
                        "message": "too old", "code": 410 });
                    let events = [("DELETED", policy("none")), ("ADDED", policy("other")), ("ERROR", expired)];
                    (200, events.map(|(what, object)| format!("{}\n", json!({ "type": what, "object": object }))).concat())
                } else {
                    std::future::pending().await
                };
                Ok(http::Response::builder().status(status).body(Body::from(text.into_bytes())).unwrap())
            }
        };
        Client::new(tower::service_fn(serve), "default")
    }

    fn word((watched, news): (Watched, News)) -> String {
        let of = |object: Object| format!("{} {}", watched.kind(), object.name.name);
        match news {
            News::Begins => "begins".to_owned(),
            News::Is(object) => of(object),
            News::Gone(object) => format!("{} is gone", of(object)),
            News::Ends => "ends".to_owned(),
            News::Absent => "absent".to_owned(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_policy_stands_while_nobody_says_whether_its_namespace_is_being_deleted_and_the_watch_goes_on() {
        for refused in [403, 401, 500, 0] {
            let (status, health) = (Arc::new(AtomicU16::new(refused)), Arc::new(Health::new(clock())));
            let (sender, mut news) = mpsc::channel(64);
            let mut watches = JoinSet::new();
            watches.spawn(follow(server(&status), POLICIES, Arc::clone(&health), sender, Dice::from_seed(1)));
            let mut told = async |within: Duration| {
                tokio::time::sleep(within).await;
                std::iter::from_fn(|| news.try_recv().ok()).map(word).collect::<Vec<String>>()
            };
            let of_policies = || health.standings()["AuthorizationPolicy"].clone();
            let others = [
                "begins",
                "AuthorizationPolicy none",
                "AuthorizationPolicy older",
                "ends",
                "AuthorizationPolicy other",
                "begins",
                "AuthorizationPolicy other",
            ];
            assert_eq!(told(PAUSE_MAX * 4).await, others, "{refused}");
            let trouble = of_policies().trouble.unwrap_or_default();
            assert!(of_policies().silent_since.is_some() && trouble.starts_with("whether a namespace is being"), "{trouble}");
            status.store(200, Ordering::Relaxed);
            let settled = ["Namespace shop", "AuthorizationPolicy none is gone", "ends"];
            assert_eq!(told(PAUSE_MAX * 2).await, settled, "{refused}");
            assert_eq!(told(SETTLED * 2).await, [""; 0]);
            assert_eq!((of_policies().silent_since, of_policies().trouble), (None, None));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_namespace_that_is_being_deleted_is_told_before_its_policy_is_gone_and_one_that_is_not_is_none() {
        let client = server(&Arc::new(AtomicU16::new(200)));
        let settled = async |gone: &[&str]| {
            let mut doubted = Doubted::new();
            for namespace in gone {
                let mut object = policy("none");
                object["metadata"]["namespace"] = json!(namespace);
                doubted.put(Object::read(serde_json::from_value(object).unwrap()).unwrap());
            }
            let told = doubted.settle(POLICIES, &client, &mut Dice::from_seed(1)).await.unwrap();
            assert!(!doubted.is_any());
            told.into_iter().map(word).collect::<Vec<String>>()
        };
        let gone = "AuthorizationPolicy none is gone";
        assert_eq!(settled(&["shop"]).await, ["Namespace shop", gone]);
        assert_eq!(settled(&["shop", "bank"]).await, ["Namespace shop", gone, gone]);
    }
}
