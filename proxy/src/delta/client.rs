//! The sidecar's end of the configuration stream, as a state machine without sockets, clock or tasks.
//!
//! `grpc` drives it: it says when a stream opened or broke, hands over what arrived, and sends what the machine wants
//! sent. Invariants: what is held counts as held only once it was published; a refused resource keeps the version that
//! was held before, so that a later stream is told the truth; only one response is in the owner's hands at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::sync::Arc;

use tokio::sync::oneshot;

use crate::base::names::Named;
use crate::delta::envelope::{DeltaRequest, DeltaResponse, Node, Rejection as WireRejection};
use crate::delta::{SCOPES_MAX, Scope};
use crate::model::{Resource, ResourceKey};

/// Everything that one response brings; to be published at once.
#[derive(Debug)]
pub(crate) struct Update {
    /// Version of the whole desired state that the control plane stands at.
    pub(crate) version: Arc<str>,
    /// New or changed.
    pub(crate) resources: Vec<Delivered>,
    /// No longer visible to this sidecar.
    pub(crate) removed: Vec<ResourceKey>,
    /// Scopes whose content changed.
    pub(crate) scopes: Vec<ScopeState>,
    /// Says that the update is published.
    pub(crate) ack: AckHandle,
}

/// One resource of an update.
#[derive(Debug)]
pub(crate) struct Delivered {
    pub(crate) key: ResourceKey,
    pub(crate) version: Arc<str>,
    /// The document, or why its body could not be read: such a resource is refused already, its last good form stays.
    pub(crate) body: Result<Arc<Resource>, String>,
}

/// What a scope consists of now.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct ScopeState {
    pub(crate) scope: Scope,
    /// The control plane knows nothing by this name.
    pub(crate) absent: bool,
    pub(crate) keys: BTreeSet<ResourceKey>,
}

/// A resource that is not in force, and why; its last good form is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Rejection {
    pub(crate) key: ResourceKey,
    pub(crate) reason: String,
}

/// Answers one update. Dropped without an answer, everything in the update counts as refused.
#[derive(Debug)]
pub(crate) struct AckHandle(pub(super) oneshot::Sender<Vec<Rejection>>);

impl AckHandle {
    /// An answer that a test hears.
    #[cfg(test)]
    pub(crate) fn heard() -> (Self, oneshot::Receiver<Vec<Rejection>>) {
        let (answer, heard) = oneshot::channel();
        (Self(answer), heard)
    }

    /// The update is in force, but for `rejections`. To be called after publishing.
    pub(crate) fn accept(self, rejections: Vec<Rejection>) {
        // The stream's driver is gone only when the process ends; nobody is left to be told.
        drop(self.0.send(rejections));
    }
}

/// The machine.
#[derive(Debug)]
pub(crate) struct Machine {
    node: Named,
    software: String,
    /// What is in force, by the key as it stands on the wire.
    held: BTreeMap<String, Arc<str>>,
    /// What the stream was told of; none while there is no stream.
    asked: Option<BTreeSet<Scope>>,
    /// The response in the owner's hands.
    pending: Option<Pending>,
    /// Answers that the stream still has to be sent.
    answer: Option<(String, Vec<WireRejection>)>,
}

#[derive(Debug)]
struct Pending {
    /// None once the stream on which it came is gone.
    nonce: Option<String>,
    versions: Vec<(String, Arc<str>)>,
    removed: Vec<String>,
    unreadable: BTreeMap<String, String>,
}

/// A response as the owner sees it; [`Update`] without its handle.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) version: Arc<str>,
    pub(crate) resources: Vec<Delivered>,
    pub(crate) removed: Vec<ResourceKey>,
    pub(crate) scopes: Vec<ScopeState>,
}

impl Machine {
    /// For the sidecar of pod `node`, which holds `held` from an earlier life.
    pub(crate) fn new(node: Named, software: impl Into<String>, held: &BTreeMap<ResourceKey, Arc<str>>) -> Self {
        let held = held.iter().map(|(key, version)| (key.to_string(), Arc::clone(version))).collect();
        Self { node, software: software.into(), held, asked: None, pending: None, answer: None }
    }

    /// A stream is open; the request to begin it with.
    pub(crate) fn connected(&mut self, wanted: &BTreeSet<Scope>) -> DeltaRequest {
        let wanted = limited(wanted);
        let request = DeltaRequest {
            node: Some(Node {
                namespace: self.node.namespace.to_string(),
                name: self.node.name.to_string(),
                version: self.software.clone(),
            }),
            subscribe: wanted.iter().map(Scope::to_string).collect(),
            initial_versions: self.held.iter().map(|(key, version)| (key.clone(), version.to_string())).collect(),
            ..DeltaRequest::default()
        };
        self.asked = Some(wanted);
        self.answer = None;
        request
    }

    /// The stream is gone. What is held stays held; answers to it have nobody left to go to.
    pub(crate) fn disconnected(&mut self) {
        self.asked = None;
        self.answer = None;
        if let Some(pending) = &mut self.pending {
            pending.nonce = None;
        }
    }

    /// May the next response be taken from the stream? Not while one is with the owner.
    pub(crate) fn takes_response(&self) -> bool {
        self.pending.is_none()
    }

    /// What the stream has to be told now, if anything: an acknowledgement, a change of subscriptions, or both.
    pub(crate) fn request(&mut self, wanted: &BTreeSet<Scope>) -> Option<DeltaRequest> {
        let asked = self.asked.as_mut()?;
        let wanted = limited(wanted);
        let subscribe: Vec<String> = wanted.difference(asked).map(Scope::to_string).collect();
        let unsubscribe: Vec<String> = asked.difference(&wanted).map(Scope::to_string).collect();
        let answer = self.answer.take();
        if subscribe.is_empty() && unsubscribe.is_empty() && answer.is_none() {
            return None;
        }
        *asked = wanted;
        let (nonce, rejected) = answer.unwrap_or_default();
        Some(DeltaRequest { subscribe, unsubscribe, nonce, rejected, ..DeltaRequest::default() })
    }

    /// A response arrived. Taken only while [`Self::takes_response`].
    pub(crate) fn response(&mut self, response: DeltaResponse) -> Parts {
        let mut pending =
            Pending { nonce: Some(response.nonce), versions: Vec::new(), removed: Vec::new(), unreadable: BTreeMap::new() };
        let mut resources = Vec::new();
        for resource in response.resources {
            let version: Arc<str> = resource.version.into();
            match resource.key.parse::<ResourceKey>() {
                Ok(key) => {
                    let body = read(&key, &resource.body).map(Arc::new);
                    if let Err(reason) = &body {
                        pending.unreadable.insert(resource.key.clone(), reason.clone());
                    }
                    resources.push(Delivered { key, version: Arc::clone(&version), body });
                }
                // A kind of a newer control plane: refused by name, so that an operator sees it.
                Err(error) => {
                    pending.unreadable.insert(resource.key.clone(), format!("{error}; this sidecar knows no such kind"));
                }
            }
            pending.versions.push((resource.key, version));
        }
        let removed = response.removed.iter().filter_map(|key| key.parse().ok()).collect();
        pending.removed = response.removed;
        let scopes = response
            .scopes
            .into_iter()
            .filter_map(|scope| {
                Some(ScopeState {
                    scope: scope.name.parse().ok()?,
                    absent: scope.absent,
                    keys: scope.keys.iter().filter_map(|key| key.parse().ok()).collect(),
                })
            })
            .collect();
        self.pending = Some(pending);
        Parts { version: response.version.into(), resources, removed, scopes }
    }

    /// The owner published the response in its hands, but for `rejections`; `None`: it was dropped unpublished.
    pub(crate) fn published(&mut self, rejections: Option<Vec<Rejection>>) {
        let Some(pending) = self.pending.take() else { return };
        let mut refused = pending.unreadable;
        match rejections {
            Some(rejections) => {
                // What could not be read keeps the reason that says so.
                for rejection in rejections {
                    refused.entry(rejection.key.to_string()).or_insert(rejection.reason);
                }
                for key in &pending.removed {
                    self.held.remove(key);
                }
                for (key, version) in &pending.versions {
                    if !refused.contains_key(key) {
                        self.held.insert(key.clone(), Arc::clone(version));
                    }
                }
            }
            None => {
                for (key, _) in &pending.versions {
                    refused.entry(key.clone()).or_insert_with(|| "the sidecar could not publish it".to_owned());
                }
            }
        }
        if let Some(nonce) = pending.nonce {
            let rejected = refused.into_iter().map(|(key, reason)| WireRejection { key, reason }).collect();
            self.answer = Some((nonce, rejected));
        }
    }

    /// What is in force, by wire key.
    #[cfg(test)]
    pub(crate) fn held(&self) -> &BTreeMap<String, Arc<str>> {
        &self.held
    }
}

/// Reads a body, which must be the document that its key names.
fn read(key: &ResourceKey, body: &[u8]) -> Result<Resource, String> {
    let resource = Resource::from_json(key.kind, body).map_err(|error| match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    })?;
    let named = resource.key();
    if named == *key { Ok(resource) } else { Err(format!("the document of {key} names itself {named}")) }
}

/// The first scopes up to the limit; the workload's own sorts first of all kinds that grow.
fn limited(wanted: &BTreeSet<Scope>) -> BTreeSet<Scope> {
    wanted.iter().take(SCOPES_MAX).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::envelope::Resource as WireResource;

    fn machine(held: &[(&str, &str)]) -> Machine {
        let held = held.iter().map(|(key, version)| (key.parse().unwrap(), (*version).into())).collect();
        let mut machine = Machine::new(Named::new("shop", "web-1"), "0", &held);
        machine.connected(&BTreeSet::new());
        machine
    }

    fn service(name: &str, version: &str) -> WireResource {
        let body = format!(
            r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"{name}","namespace":"shop"}},"spec":{{"selector":{{"v":"{version}"}}}}}}"#
        );
        WireResource { key: format!("Service/shop/{name}"), version: version.to_owned(), body: body.into() }
    }

    fn refusal(key: &str) -> Rejection {
        Rejection { key: key.parse().unwrap(), reason: "bad".to_owned() }
    }

    #[test]
    fn nothing_is_acknowledged_before_it_is_published() {
        let mut machine = machine(&[]);
        let wanted = BTreeSet::from(["service/shop/web".parse().unwrap()]);
        assert_eq!(machine.request(&wanted).unwrap().subscribe, ["service/shop/web"]);
        let response = DeltaResponse { nonce: "7".into(), resources: vec![service("web", "1")], ..DeltaResponse::default() };
        let parts = machine.response(response);
        assert!(parts.resources[0].body.is_ok());
        assert!(!machine.takes_response());
        assert_eq!(machine.request(&wanted), None);
        assert!(machine.held().is_empty());
        machine.published(Some(Vec::new()));
        let ack = machine.request(&wanted).unwrap();
        assert_eq!((ack.nonce.as_str(), ack.rejected.len(), ack.subscribe.len()), ("7", 0, 0));
        assert_eq!(machine.request(&wanted), None);
        assert_eq!(machine.held()["Service/shop/web"].as_ref(), "1");
    }

    #[test]
    fn a_refused_resource_keeps_the_version_that_was_held() {
        let mut machine = machine(&[("Service/shop/web", "1")]);
        let resources = vec![service("web", "2"), service("api", "1")];
        machine.response(DeltaResponse { nonce: "1".into(), resources, ..DeltaResponse::default() });
        machine.published(Some(vec![refusal("Service/shop/web")]));
        let nack = machine.request(&BTreeSet::new()).unwrap();
        assert_eq!(nack.rejected, [WireRejection { key: "Service/shop/web".into(), reason: "bad".into() }]);
        machine.disconnected();
        let held = machine.connected(&BTreeSet::new()).initial_versions;
        assert_eq!((held["Service/shop/web"].as_str(), held["Service/shop/api"].as_str()), ("1", "1"));
    }

    #[test]
    fn a_body_that_cannot_be_read_is_refused_by_name_and_the_rest_is_taken() {
        let mut machine = machine(&[]);
        let unknown = WireResource { key: "Gadget/shop/x".into(), version: "1".into(), body: b"{}".to_vec() };
        let mut misnamed = service("web", "1");
        misnamed.key = "Service/shop/other".into();
        let field = WireResource {
            key: "PeerAuthentication/shop/p".into(),
            version: "1".into(),
            body: br#"{"apiVersion":"outrigger.dev/v1alpha1","kind":"PeerAuthentication","metadata":{"name":"p","namespace":"shop"},"spec":{"surprise":1}}"#.to_vec(),
        };
        let resources = vec![unknown, misnamed, field, service("api", "1")];
        let parts = machine.response(DeltaResponse { nonce: "1".into(), resources, ..DeltaResponse::default() });
        // Of the unknown kind the owner hears nothing: it could not name it.
        assert_eq!(parts.resources.iter().map(|resource| resource.body.is_ok()).collect::<Vec<_>>(), [false, false, true]);
        machine.published(Some(Vec::new()));
        let rejected = machine.request(&BTreeSet::new()).unwrap().rejected;
        let reasons: Vec<_> = rejected.iter().map(|rejection| (rejection.key.as_str(), rejection.reason.as_str())).collect();
        assert!(reasons[0].0 == "Gadget/shop/x" && reasons[0].1.contains("no such kind"), "{reasons:?}");
        assert!(reasons[1].0 == "PeerAuthentication/shop/p" && reasons[1].1.contains("unknown field `surprise`"), "{reasons:?}");
        assert!(reasons[2].0 == "Service/shop/other" && reasons[2].1.contains("names itself"), "{reasons:?}");
        assert_eq!(machine.held().keys().collect::<Vec<_>>(), ["Service/shop/api"]);
    }

    #[test]
    fn an_update_that_outlives_its_stream_is_held_but_not_acknowledged_on_the_next() {
        let mut machine = machine(&[("Service/shop/old", "1")]);
        let response = DeltaResponse {
            nonce: "1".into(),
            resources: vec![service("web", "1")],
            removed: vec!["Service/shop/old".into()],
            ..DeltaResponse::default()
        };
        machine.response(response);
        machine.disconnected();
        machine.published(Some(Vec::new()));
        let first = machine.connected(&BTreeSet::new());
        assert_eq!(first.initial_versions.keys().collect::<Vec<_>>(), ["Service/shop/web"]);
        assert_eq!(machine.request(&BTreeSet::new()), None);
    }

    #[test]
    fn an_update_that_was_dropped_unpublished_is_refused_as_a_whole() {
        let mut machine = machine(&[("Service/shop/old", "1")]);
        let response = DeltaResponse {
            nonce: "1".into(),
            resources: vec![service("web", "1")],
            removed: vec!["Service/shop/old".into()],
            ..DeltaResponse::default()
        };
        machine.response(response);
        machine.published(None);
        assert_eq!(machine.request(&BTreeSet::new()).unwrap().rejected.len(), 1);
        assert_eq!(machine.held().keys().collect::<Vec<_>>(), ["Service/shop/old"]);
    }

    #[test]
    fn subscriptions_are_told_once_and_all_of_them_again_on_a_new_stream() {
        let mut machine = machine(&[]);
        let a: Scope = "service/shop/a".parse().unwrap();
        let b: Scope = "service/shop/b".parse().unwrap();
        let request = machine.request(&BTreeSet::from([a.clone(), b.clone()])).unwrap();
        assert_eq!(request.subscribe, ["service/shop/a", "service/shop/b"]);
        let request = machine.request(&BTreeSet::from([b.clone()])).unwrap();
        assert_eq!((request.subscribe.len(), request.unsubscribe), (0, vec!["service/shop/a".to_owned()]));
        machine.disconnected();
        assert_eq!(machine.request(&BTreeSet::from([a.clone()])), None);
        assert_eq!(machine.connected(&BTreeSet::from([a, b])).subscribe, ["service/shop/a", "service/shop/b"]);
    }

    #[test]
    fn the_own_workload_is_never_crowded_out() {
        let addresses = (0..u32::try_from(SCOPES_MAX).unwrap() + 10).map(|n| Scope::Address(std::net::Ipv4Addr::from(n).into()));
        let mut wanted: BTreeSet<Scope> = addresses.collect();
        wanted.insert("workload/shop/web-1".parse().unwrap());
        let request = machine(&[]).request(&wanted).unwrap();
        assert_eq!(request.subscribe.len(), SCOPES_MAX);
        assert!(request.subscribe.contains(&"workload/shop/web-1".to_owned()));
    }
}
