//! Resources as users write them. No IO, no clock: a document is read, named and kept.
//!
//! One set of structs is the YAML of a folder, the JSON on the configuration stream and the schema of the CRDs. Our own
//! kinds and routes refuse unknown fields; Kubernetes' own kinds may carry fields that mean nothing here.

pub(crate) mod address_book;
pub(crate) mod name_table;
pub(crate) mod pod_record;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use crate::base::names::Named;

/// The kinds that mean something here.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Kind {
    Mesh,
    Service,
    Workload,
    HttpRoute,
    AuthorizationPolicy,
    RequestAuthentication,
    PeerAuthentication,
    TrafficPolicy,
}

impl Kind {
    /// All of them, in the order of listings.
    pub(crate) const ALL: [Self; 8] = [
        Self::Mesh,
        Self::Service,
        Self::Workload,
        Self::HttpRoute,
        Self::AuthorizationPolicy,
        Self::RequestAuthentication,
        Self::PeerAuthentication,
        Self::TrafficPolicy,
    ];

    /// As in `kind:` of a document.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Mesh => "Mesh",
            Self::Service => "Service",
            Self::Workload => "Workload",
            Self::HttpRoute => "HTTPRoute",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::RequestAuthentication => "RequestAuthentication",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::TrafficPolicy => "TrafficPolicy",
        }
    }

    /// As in `apiVersion:` of a document.
    pub(crate) fn api_version(self) -> &'static str {
        match self {
            Self::Service => "v1",
            Self::HttpRoute => "gateway.networking.k8s.io/v1",
            Self::Mesh
            | Self::Workload
            | Self::AuthorizationPolicy
            | Self::RequestAuthentication
            | Self::PeerAuthentication
            | Self::TrafficPolicy => "outrigger.dev/v1alpha1",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The name of one resource: its kind, namespace and name, written `KIND/NAMESPACE/NAME`. `Mesh` stands in the
/// namespace `outrigger-system`, whatever a document says.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct ResourceKey {
    pub(crate) kind: Kind,
    pub(crate) name: Named,
}

/// Why a text is not a [`ResourceKey`].
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not KIND/NAMESPACE/NAME")]
pub(crate) struct KeyError(String);

impl fmt::Display for ResourceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind, self.name)
    }
}

impl FromStr for ResourceKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let fail = || KeyError(text.to_owned());
        let (kind, name) = text.split_once('/').ok_or_else(fail)?;
        let kind = Kind::ALL.into_iter().find(|known| known.as_str() == kind).ok_or_else(fail)?;
        let name = name.parse().map_err(|_not_a_name| fail())?;
        Ok(Self { kind, name })
    }
}

/// A set of resources, and what is known not to exist: all that `compile` reads.
#[derive(Clone, Debug, Default)]
pub(crate) struct Resources {
    pub(crate) by_key: BTreeMap<ResourceKey, Arc<Resource>>,
    /// Addresses of which the control plane said that nothing of the mesh is there.
    pub(crate) absent: BTreeSet<IpAddr>,
}

/// One resource, as written. (Each variant is the document of its file in this room.)
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Resource {}
