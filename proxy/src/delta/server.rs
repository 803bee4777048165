//! The control plane's end of the configuration stream, as a state machine without sockets, clock or tasks.
//!
//! The machine compares what one sidecar was sent with what it should have, and lets one response be under way at a time:
//! changes that come meanwhile coalesce into the next one, and a slow sidecar holds up nobody but itself. Invariants:
//! only what a subscribed scope leads to is sent; a version that was sent or is held is not sent again; an
//! acknowledgement counts only with the nonce of the response under way.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::base::names::{Named, check_name};
use crate::delta::envelope::{DeltaRequest, DeltaResponse, Resource, Scope as WireScope};
use crate::delta::{SCOPES_MAX, Scope, ScopeError};
use crate::model::ResourceKey;

/// One resource as it goes over the wire.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Item {
    /// Tells two contents of one resource apart, also across restarts of the control plane.
    pub(crate) version: Arc<str>,
    /// Canonical JSON.
    pub(crate) body: Arc<str>,
}

/// What one sidecar should have.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    /// Counts the changes of the whole desired state.
    pub(crate) version: u64,
    /// Each subscribed scope with what it leads to; `None`: nothing is known by this name.
    pub(crate) scopes: BTreeMap<Scope, Option<BTreeSet<ResourceKey>>>,
    /// Everything that the scopes lead to.
    pub(crate) resources: BTreeMap<ResourceKey, Item>,
}

/// A resource that a sidecar refused.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Refused {
    /// The version that is not in force.
    pub(crate) version: Arc<str>,
    pub(crate) reason: String,
}

/// Why a stream has to end. The peer is at fault.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProtocolError {
    #[error("the first request of a stream must name the sidecar's pod")]
    NoNode,
    #[error("only the first request of a stream may name the pod or the versions held")]
    NotFirst,
    #[error("{0:?} is no name of a pod")]
    BadNode(String),
    #[error(transparent)]
    BadScope(#[from] ScopeError),
    #[error("the sidecar of pod {node} may not subscribe to {scope}, which is another pod's")]
    AnotherPod { node: Named, scope: Scope },
    #[error("more than {SCOPES_MAX} scopes; unsubscribe from those that are out of use")]
    TooManyScopes,
}

/// What a request changed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Heard {
    /// It answered the response under way.
    pub(crate) acknowledged: bool,
    /// It answered a response that is not under way (any more); the answer was ignored.
    pub(crate) stale: bool,
    /// It subscribed or unsubscribed.
    pub(crate) scopes: bool,
}

/// One sidecar's stream.
#[derive(Debug)]
pub(crate) struct Session {
    node: Named,
    software: String,
    /// Subscribed scopes, each with what the sidecar was last told of it.
    scopes: BTreeMap<Scope, Option<Told>>,
    /// What the sidecar was sent or holds, by wire key: a key of a kind that this control plane does not know must still
    /// be taken away.
    sent: BTreeMap<String, Arc<str>>,
    refused: BTreeMap<String, Refused>,
    under_way: Option<UnderWay>,
    nonces: u64,
    settled: u64,
}

#[derive(Debug, Eq, PartialEq)]
struct Told {
    absent: bool,
    keys: BTreeSet<ResourceKey>,
}

#[derive(Debug)]
struct UnderWay {
    nonce: String,
    version: u64,
    resources: Vec<(String, Arc<str>)>,
    removed: Vec<String>,
}

impl Session {
    /// Begins with the first request of a stream.
    ///
    /// # Errors
    /// The request names no pod, or asks for what it may not.
    pub(crate) fn open(first: DeltaRequest) -> Result<Self, ProtocolError> {
        let node = first.node.ok_or(ProtocolError::NoNode)?;
        if check_name(&node.namespace).is_err() || check_name(&node.name).is_err() {
            return Err(ProtocolError::BadNode(format!("{}/{}", node.namespace, node.name)));
        }
        let mut session = Self {
            node: Named::new(node.namespace, node.name),
            software: node.version,
            scopes: BTreeMap::new(),
            sent: first.initial_versions.into_iter().map(|(key, version)| (key, version.into())).collect(),
            refused: BTreeMap::new(),
            under_way: None,
            nonces: 0,
            settled: 0,
        };
        session.subscriptions(&first.subscribe, &first.unsubscribe)?;
        Ok(session)
    }

    /// A later request of the stream.
    ///
    /// # Errors
    /// The request asks for what it may not; the stream has to end.
    pub(crate) fn request(&mut self, request: DeltaRequest) -> Result<Heard, ProtocolError> {
        if request.node.is_some() || !request.initial_versions.is_empty() {
            return Err(ProtocolError::NotFirst);
        }
        let mut heard = Heard { scopes: self.subscriptions(&request.subscribe, &request.unsubscribe)?, ..Heard::default() };
        if request.nonce.is_empty() {
            return Ok(heard);
        }
        match self.under_way.take_if(|under_way| under_way.nonce == request.nonce) {
            Some(under_way) => {
                heard.acknowledged = true;
                let mut reasons: BTreeMap<String, String> =
                    request.rejected.into_iter().map(|rejection| (rejection.key, rejection.reason)).collect();
                for (key, version) in under_way.resources {
                    match reasons.remove(&key) {
                        Some(reason) => self.refused.insert(key, Refused { version, reason }),
                        None => self.refused.remove(&key),
                    };
                }
                for key in under_way.removed {
                    self.refused.remove(&key);
                }
                self.settled = under_way.version;
            }
            None => heard.stale = true,
        }
        Ok(heard)
    }

    /// The response that brings the sidecar to `view`; none while one is under way, or if there is nothing to say.
    pub(crate) fn respond(&mut self, view: &View) -> Option<DeltaResponse> {
        if self.under_way.is_some() {
            return None;
        }
        let mut resources = Vec::new();
        let mut seen = BTreeSet::new();
        for (key, item) in &view.resources {
            let wire = key.to_string();
            if self.sent.get(&wire) != Some(&item.version) {
                resources.push(Resource {
                    key: wire.clone(),
                    version: item.version.to_string(),
                    body: item.body.as_bytes().to_vec(),
                });
            }
            seen.insert(wire);
        }
        let removed: Vec<String> = self.sent.keys().filter(|key| !seen.contains(*key)).cloned().collect();
        let mut scopes = Vec::new();
        for (scope, told) in &mut self.scopes {
            // A scope that the view was not computed for is told of by the next one.
            let Some(keys) = view.scopes.get(scope) else { continue };
            let now = Told { absent: keys.is_none(), keys: keys.clone().unwrap_or_default() };
            if told.as_ref() != Some(&now) {
                scopes.push(WireScope {
                    name: scope.to_string(),
                    absent: now.absent,
                    keys: now.keys.iter().map(ResourceKey::to_string).collect(),
                });
                *told = Some(now);
            }
        }
        if resources.is_empty() && removed.is_empty() && scopes.is_empty() {
            self.settled = view.version;
            return None;
        }
        self.nonces += 1;
        let nonce = self.nonces.to_string();
        let mut under_way =
            UnderWay { nonce: nonce.clone(), version: view.version, resources: Vec::new(), removed: removed.clone() };
        for resource in &resources {
            let version: Arc<str> = resource.version.as_str().into();
            self.sent.insert(resource.key.clone(), Arc::clone(&version));
            under_way.resources.push((resource.key.clone(), version));
        }
        for key in &removed {
            self.sent.remove(key);
        }
        self.under_way = Some(under_way);
        Some(DeltaResponse { nonce, version: view.version.to_string(), resources, removed, scopes })
    }

    /// Whose stream it says it is.
    pub(crate) fn node(&self) -> &Named {
        &self.node
    }

    /// The sidecar's software version.
    pub(crate) fn software(&self) -> &str {
        &self.software
    }

    /// What is subscribed to.
    pub(crate) fn scopes(&self) -> impl Iterator<Item = &Scope> {
        self.scopes.keys()
    }

    /// What the sidecar refused and does not have in force, by wire key.
    pub(crate) fn refused(&self) -> &BTreeMap<String, Refused> {
        &self.refused
    }

    /// The newest version of the desired state that the sidecar is known to stand at, refused resources aside.
    pub(crate) fn settled(&self) -> u64 {
        self.settled
    }

    /// Is a response waiting to be acknowledged?
    pub(crate) fn waits(&self) -> bool {
        self.under_way.is_some()
    }

    /// How many resources the sidecar has been sent or holds.
    pub(crate) fn resources(&self) -> usize {
        self.sent.len()
    }

    fn subscriptions(&mut self, subscribe: &[String], unsubscribe: &[String]) -> Result<bool, ProtocolError> {
        for name in unsubscribe {
            self.scopes.remove(&name.parse()?);
        }
        for name in subscribe {
            let scope: Scope = name.parse()?;
            if let Scope::Workload(pod) = &scope
                && *pod != self.node
            {
                return Err(ProtocolError::AnotherPod { node: self.node.clone(), scope });
            }
            // Who subscribes again has forgotten what it was told.
            self.scopes.insert(scope, None);
        }
        if self.scopes.len() > SCOPES_MAX {
            return Err(ProtocolError::TooManyScopes);
        }
        Ok(!subscribe.is_empty() || !unsubscribe.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::random::Dice;
    use crate::delta::client::Machine;
    use crate::delta::envelope::{Node, Rejection as WireRejection};

    fn key(name: &str) -> ResourceKey {
        format!("Service/shop/{name}").parse().unwrap()
    }

    fn item(name: &str, version: &str) -> Item {
        let body =
            format!(r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"{name}","namespace":"shop"}},"spec":{{}}}}"#);
        Item { version: version.into(), body: body.into() }
    }

    /// A world in which each service leads to itself alone.
    fn view(session: &Session, version: u64, world: &[(&str, &str)]) -> View {
        let mut view = View { version, ..View::default() };
        for scope in session.scopes() {
            let Scope::Service(name) = scope else { continue };
            let found = world.iter().find(|(service, _)| *service == name.name.as_ref());
            view.scopes.insert(scope.clone(), found.map(|(service, _)| BTreeSet::from([key(service)])));
            if let Some((service, version)) = found {
                view.resources.insert(key(service), item(service, version));
            }
        }
        view
    }

    fn open(subscribe: &[&str], held: &[(&str, &str)]) -> Session {
        Session::open(DeltaRequest {
            node: Some(Node { namespace: "shop".into(), name: "web-1".into(), version: "0".into() }),
            subscribe: subscribe.iter().map(|name| format!("service/shop/{name}")).collect(),
            initial_versions: held.iter().map(|(key, version)| ((*key).to_owned(), (*version).to_owned())).collect(),
            ..DeltaRequest::default()
        })
        .unwrap()
    }

    fn ack(nonce: &str) -> DeltaRequest {
        DeltaRequest { nonce: nonce.to_owned(), ..DeltaRequest::default() }
    }

    fn keys(response: &DeltaResponse) -> Vec<&str> {
        response.resources.iter().map(|resource| resource.key.as_str()).collect()
    }

    #[test]
    fn what_was_never_asked_for_is_never_sent() {
        let mut session = open(&["a"], &[]);
        let world = [("a", "1"), ("b", "1")];
        let response = session.respond(&view(&session, 1, &world)).unwrap();
        assert_eq!(keys(&response), ["Service/shop/a"]);
        session.request(ack(&response.nonce)).unwrap();
        assert_eq!(session.respond(&view(&session, 2, &world)), None);
        assert_eq!(session.settled(), 2);
    }

    #[test]
    fn a_name_that_nobody_knows_is_said_to_be_absent_and_comes_when_it_appears() {
        let mut session = open(&["a"], &[]);
        let response = session.respond(&view(&session, 1, &[])).unwrap();
        assert!(response.scopes[0].absent && response.resources.is_empty());
        session.request(ack(&response.nonce)).unwrap();
        let response = session.respond(&view(&session, 2, &[("a", "1")])).unwrap();
        assert!(!response.scopes[0].absent);
        assert_eq!(keys(&response), ["Service/shop/a"]);
    }

    #[test]
    fn changes_while_a_response_is_under_way_coalesce() {
        let mut session = open(&["a"], &[]);
        let first = session.respond(&view(&session, 1, &[("a", "1")])).unwrap();
        assert_eq!(session.respond(&view(&session, 2, &[("a", "2")])), None);
        assert_eq!(session.respond(&view(&session, 3, &[("a", "3")])), None);
        session.request(ack(&first.nonce)).unwrap();
        assert_eq!(session.settled(), 1);
        let second = session.respond(&view(&session, 3, &[("a", "3")])).unwrap();
        assert_eq!(second.resources[0].version, "3");
        assert!(second.scopes.is_empty());
    }

    #[test]
    fn an_answer_to_an_old_nonce_is_ignored() {
        let mut session = open(&["a"], &[]);
        let response = session.respond(&view(&session, 1, &[("a", "1")])).unwrap();
        let stale = session.request(ack("no such nonce")).unwrap();
        assert!(stale.stale && !stale.acknowledged && session.waits());
        assert!(session.request(ack(&response.nonce)).unwrap().acknowledged);
        assert!(session.request(ack(&response.nonce)).unwrap().stale);
    }

    #[test]
    fn a_refused_version_is_remembered_and_not_sent_again_until_it_changes() {
        let mut session = open(&["a", "b"], &[]);
        let response = session.respond(&view(&session, 1, &[("a", "1"), ("b", "1")])).unwrap();
        let rejected = vec![
            WireRejection { key: "Service/shop/a".into(), reason: "bad".into() },
            WireRejection { key: "Service/shop/never-sent".into(), reason: "bad".into() },
        ];
        session.request(DeltaRequest { nonce: response.nonce, rejected, ..DeltaRequest::default() }).unwrap();
        let refused: Vec<_> = session.refused().iter().map(|(key, refused)| (key.as_str(), refused.version.as_ref())).collect();
        assert_eq!(refused, [("Service/shop/a", "1")]);
        assert_eq!(session.respond(&view(&session, 2, &[("a", "1"), ("b", "1")])), None);
        let response = session.respond(&view(&session, 3, &[("a", "2"), ("b", "1")])).unwrap();
        assert_eq!(keys(&response), ["Service/shop/a"]);
        session.request(ack(&response.nonce)).unwrap();
        assert!(session.refused().is_empty());
    }

    #[test]
    fn what_a_sidecar_holds_is_not_sent_again_and_what_is_gone_is_taken_away() {
        let mut session =
            open(&["a", "b"], &[("Service/shop/a", "1"), ("Service/shop/b", "1"), ("Service/shop/c", "1"), ("Gadget/x", "1")]);
        let response = session.respond(&view(&session, 9, &[("a", "1"), ("b", "2")])).unwrap();
        assert_eq!(keys(&response), ["Service/shop/b"]);
        assert_eq!(response.removed, ["Gadget/x", "Service/shop/c"]);
        assert_eq!(response.scopes.len(), 2);
    }

    #[test]
    fn what_only_an_unsubscribed_scope_needed_is_taken_away() {
        let mut session = open(&["a", "b"], &[]);
        let world = [("a", "1"), ("b", "1")];
        let response = session.respond(&view(&session, 1, &world)).unwrap();
        let request = DeltaRequest { unsubscribe: vec!["service/shop/b".into()], ..ack(&response.nonce) };
        assert!(session.request(request).unwrap().scopes);
        let response = session.respond(&view(&session, 1, &world)).unwrap();
        assert_eq!(response.removed, ["Service/shop/b"]);
        assert!(response.resources.is_empty() && response.scopes.is_empty());
    }

    #[test]
    fn another_pods_workload_cannot_be_subscribed_to() {
        let mut session = open(&[], &[]);
        let own = DeltaRequest { subscribe: vec!["workload/shop/web-1".into()], ..DeltaRequest::default() };
        assert!(session.request(own).unwrap().scopes);
        let other = DeltaRequest { subscribe: vec!["workload/shop/api-1".into()], ..DeltaRequest::default() };
        let error = session.request(other).unwrap_err();
        assert!(error.to_string().contains("another pod's"), "{error}");
    }

    #[test]
    fn a_stream_begins_with_the_pods_name_and_says_it_once() {
        assert!(matches!(Session::open(DeltaRequest::default()), Err(ProtocolError::NoNode)));
        let bad = Node { namespace: "../x".into(), name: "web".into(), version: String::new() };
        assert!(matches!(
            Session::open(DeltaRequest { node: Some(bad.clone()), ..DeltaRequest::default() }),
            Err(ProtocolError::BadNode(_))
        ));
        let again = DeltaRequest { node: Some(bad), ..DeltaRequest::default() };
        assert!(matches!(open(&[], &[]).request(again), Err(ProtocolError::NotFirst)));
    }

    #[test]
    fn scopes_are_limited() {
        let subscribe = (0..=SCOPES_MAX).map(|n| format!("service/shop/s{n}")).collect();
        let request = DeltaRequest { subscribe, ..DeltaRequest::default() };
        assert!(matches!(open(&[], &[]).request(request), Err(ProtocolError::TooManyScopes)));
    }

    /// Whatever happens, in the end the sidecar holds what it is subscribed to, and nothing was sent twice.
    #[test]
    fn both_ends_agree_after_any_history() {
        for seed in 0..200 {
            let mut dice = Dice::from_seed(seed);
            let names = ["a", "b", "c", "d"];
            let mut world = BTreeMap::from([("a", 1_u64)]);
            let mut wanted = BTreeSet::new();
            let mut machine = Machine::new(Named::new("shop", "web-1"), "0", &BTreeMap::new());
            let mut session: Option<Session> = None;
            let mut to_client: Option<DeltaResponse> = None;
            let mut version = 1;
            for step in 0..400 {
                let quiet = step >= 360;
                match dice.below(if quiet { 4 } else { 9 }) {
                    0 if session.is_none() => session = Some(Session::open(machine.connected(&wanted)).unwrap()),
                    1 => {
                        if let (Some(session), Some(request)) = (&mut session, machine.request(&wanted)) {
                            session.request(request).unwrap();
                        }
                    }
                    2 => {
                        if let (Some(session), None) = (&mut session, &to_client) {
                            let versions: Vec<(&str, String)> = world.iter().map(|(name, v)| (*name, v.to_string())).collect();
                            let borrowed: Vec<(&str, &str)> = versions.iter().map(|(name, v)| (*name, v.as_str())).collect();
                            to_client = session.respond(&view(session, version, &borrowed));
                        }
                    }
                    3 => match to_client.take() {
                        Some(response) if machine.takes_response() => {
                            for resource in &response.resources {
                                let held = machine.held().get(&resource.key).map(AsRef::as_ref);
                                assert_ne!(held, Some(resource.version.as_str()), "seed {seed}: {} was sent again", resource.key);
                            }
                            machine.response(response);
                            machine.published(Some(Vec::new()));
                        }
                        other => to_client = other,
                    },
                    4 => {
                        wanted.insert(Scope::Service(Named::new("shop", names[dice.below(4)])));
                    }
                    5 => {
                        wanted.remove(&Scope::Service(Named::new("shop", names[dice.below(4)])));
                    }
                    6 => {
                        version += 1;
                        world.insert(names[dice.below(4)], version);
                    }
                    7 => {
                        version += 1;
                        world.remove(names[dice.below(4)]);
                    }
                    8 if dice.below(4) == 0 => {
                        session = None;
                        to_client = None;
                        machine.disconnected();
                    }
                    _ => {}
                }
            }
            // Let what is under way arrive.
            for _ in 0..8 {
                let session = session.get_or_insert_with(|| Session::open(machine.connected(&wanted)).unwrap());
                if let Some(request) = machine.request(&wanted) {
                    session.request(request).unwrap();
                }
                let versions: Vec<(&str, String)> = world.iter().map(|(name, v)| (*name, v.to_string())).collect();
                let borrowed: Vec<(&str, &str)> = versions.iter().map(|(name, v)| (*name, v.as_str())).collect();
                if let Some(response) = to_client.take().or_else(|| session.respond(&view(session, version, &borrowed))) {
                    machine.response(response);
                    machine.published(Some(Vec::new()));
                }
            }
            let held: BTreeMap<String, String> =
                machine.held().iter().map(|(key, version)| (key.clone(), version.to_string())).collect();
            let due: BTreeMap<String, String> = world
                .iter()
                .filter(|(name, _)| wanted.contains(&Scope::Service(Named::new("shop", **name))))
                .map(|(name, version)| (key(name).to_string(), version.to_string()))
                .collect();
            assert_eq!(held, due, "seed {seed}");
            assert_eq!(session.map(|session| session.settled()), Some(version), "seed {seed}");
        }
    }
}
