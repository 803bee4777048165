//! The control plane's end of the configuration stream, as a state machine without sockets, clock or tasks.
//!
//! The machine compares what one sidecar was sent with what it should have, and lets one response be under way at a time:
//! changes that come meanwhile coalesce into the next one, and a slow sidecar holds up nobody but itself. Invariants:
//! only what a subscribed scope leads to is sent; a version that was sent or is held is not sent again; an
//! acknowledgement counts only with the nonce of the response under way.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

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
    pub(crate) body: Bytes,
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
                resources.push(Resource { key: wire.clone(), version: item.version.to_string(), body: item.body.to_vec() });
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
