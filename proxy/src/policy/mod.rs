//! Policies: one file each, in the order config type, compiled type, decision, tests. Everything here is pure; the
//! caller brings the request, the time, the dice and the state.
//!
//! A request meets them in the order of [`RoutePolicies`]' fields. `dataplane/http/pipeline.rs` destructures that struct
//! exhaustively, so that a new policy does not compile until it has its place.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use http::{HeaderMap, Method};

use crate::identity::spiffe::SpiffeId;

/// The name of the rule that decided, as people know it: `KIND/NAMESPACE/NAME` with the place inside, as
/// `AuthorizationPolicy/shop/allow-web rules[0]`, or one of the built-in ones, as `default_allow`.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct RuleName(Arc<str>);

impl RuleName {
    /// A rule by its name.
    pub(crate) fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// The name.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Where the shared text lies: the same for clones of one value, for as long as one of them lives.
    pub(crate) fn address(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who is calling, and where it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    /// The identity that mutual TLS proved; none on a plaintext connection.
    pub(crate) identity: Option<SpiffeId>,
    /// The client's address.
    pub(crate) address: SocketAddr,
    /// The port that the client asked for, as the pod's workload knows it.
    pub(crate) port: u16,
}

/// What of a request a decision may look at. `path` is normalised and without query.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestView<'a> {
    pub(crate) method: &'a Method,
    pub(crate) authority: &'a str,
    pub(crate) path: &'a str,
    pub(crate) query: Option<&'a str>,
    pub(crate) headers: &'a HeaderMap,
}

pub(crate) mod authorization;
pub(crate) mod breaker;
pub(crate) mod cors;
pub(crate) mod fault;
pub(crate) mod grpc;
pub(crate) mod headers;
pub(crate) mod jwt;
pub(crate) mod limits;
pub(crate) mod matcher;
pub(crate) mod outlier;
pub(crate) mod path;
pub(crate) mod rate_limit;
pub(crate) mod redirect;
pub(crate) mod retry;
pub(crate) mod rewrite;
pub(crate) mod shadow;
pub(crate) mod timeout;
