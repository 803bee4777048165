//! Resources as users write them. No IO, no clock: a document is read, named and kept.
//!
//! One set of structs is the YAML of a folder, the JSON on the configuration stream and the schema of the CRDs. Our own
//! kinds and routes refuse unknown fields; Kubernetes' own kinds may carry fields that mean nothing here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize as _, Deserializer, Serialize, Serializer};

use self::authorization_policy::AuthorizationPolicySpec;
use self::grpc_route::GrpcRouteSpec;
use self::http_route::HttpRouteSpec;
use self::mesh::MeshSpec;
use self::object::{Metadata, Object};
use self::peer_authentication::PeerAuthenticationSpec;
use self::reference_grant::ReferenceGrantSpec;
use self::request_authentication::RequestAuthenticationSpec;
use self::service::ServiceSpec;
use self::target::{Former, TargetRef};
use self::tcp_route::TcpRouteSpec;
use self::tls_route::TlsRouteSpec;
use self::traffic_policy::TrafficPolicySpec;
use self::workload::WorkloadSpec;
use crate::base::names::Named;

pub(crate) mod address_book;
pub(crate) mod app_doors;
pub(crate) mod authorization_policy;
pub(crate) mod capture;
#[cfg(test)]
mod definition;
pub(crate) mod grpc_route;
pub(crate) mod http_route;
pub(crate) mod marks;
pub(crate) mod mesh;
pub(crate) mod name_table;
pub(crate) mod object;
pub(crate) mod peer_authentication;
pub(crate) mod pod_record;
#[cfg(test)]
mod reference;
pub(crate) mod reference_grant;
pub(crate) mod request_authentication;
pub(crate) mod route;
pub(crate) mod service;
pub(crate) mod target;
pub(crate) mod tcp_route;
pub(crate) mod tls_route;
pub(crate) mod traffic_policy;
pub(crate) mod workload;
pub(crate) mod yaml;

/// The kinds that mean something here.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Kind {
    Mesh,
    Service,
    Workload,
    HttpRoute,
    GrpcRoute,
    TlsRoute,
    TcpRoute,
    ReferenceGrant,
    AuthorizationPolicy,
    RequestAuthentication,
    PeerAuthentication,
    TrafficPolicy,
}

impl Kind {
    /// All of them, in the order of listings.
    pub(crate) const ALL: [Self; 12] = [
        Self::Mesh,
        Self::Service,
        Self::Workload,
        Self::HttpRoute,
        Self::GrpcRoute,
        Self::TlsRoute,
        Self::TcpRoute,
        Self::ReferenceGrant,
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
            Self::GrpcRoute => "GRPCRoute",
            Self::TlsRoute => "TLSRoute",
            Self::TcpRoute => "TCPRoute",
            Self::ReferenceGrant => "ReferenceGrant",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::RequestAuthentication => "RequestAuthentication",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::TrafficPolicy => "TrafficPolicy",
        }
    }

    /// As in the paths of a Kubernetes API.
    pub(crate) fn plural(self) -> &'static str {
        match self {
            Self::Mesh => "meshes",
            Self::Service => "services",
            Self::Workload => "workloads",
            Self::HttpRoute => "httproutes",
            Self::GrpcRoute => "grpcroutes",
            Self::TlsRoute => "tlsroutes",
            Self::TcpRoute => "tcproutes",
            Self::ReferenceGrant => "referencegrants",
            Self::AuthorizationPolicy => "authorizationpolicies",
            Self::RequestAuthentication => "requestauthentications",
            Self::PeerAuthentication => "peerauthentications",
            Self::TrafficPolicy => "trafficpolicies",
        }
    }

    /// A word for it on the command line.
    pub(crate) fn short(self) -> &'static str {
        match self {
            Self::Mesh => "mesh",
            Self::Service => "svc",
            Self::Workload => "wl",
            Self::HttpRoute => "route",
            Self::GrpcRoute => "grpc",
            Self::TlsRoute => "tls",
            Self::TcpRoute => "tcp",
            Self::ReferenceGrant => "refgrant",
            Self::AuthorizationPolicy => "authz",
            Self::RequestAuthentication => "authn",
            Self::PeerAuthentication => "peer",
            Self::TrafficPolicy => "tp",
        }
    }

    /// As in `apiVersion:` of a document.
    pub(crate) fn api_version(self) -> &'static str {
        match self {
            Self::Service => "v1",
            Self::HttpRoute | Self::GrpcRoute | Self::TlsRoute | Self::TcpRoute | Self::ReferenceGrant => {
                "gateway.networking.k8s.io/v1"
            }
            Self::Mesh
            | Self::Workload
            | Self::AuthorizationPolicy
            | Self::RequestAuthentication
            | Self::PeerAuthentication
            | Self::TrafficPolicy => "outrigger.dev/v1alpha1",
        }
    }

    /// Is a document of this kind read as this `apiVersion`? Earlier ones of the same shape are, and are written as the
    /// newest.
    pub(crate) fn reads(self, api_version: &str) -> bool {
        self.api_versions().any(|known| known == api_version)
    }

    /// As what a document of this kind is read, the newest first.
    pub(crate) fn api_versions(self) -> impl Iterator<Item = &'static str> {
        let earlier: &[&str] = match self {
            Self::TlsRoute => &["gateway.networking.k8s.io/v1alpha3", "gateway.networking.k8s.io/v1alpha2"],
            Self::TcpRoute => &["gateway.networking.k8s.io/v1alpha2"],
            Self::ReferenceGrant => &["gateway.networking.k8s.io/v1beta1"],
            _ => &[],
        };
        std::iter::once(self.api_version()).chain(earlier.iter().copied())
    }
}

impl Kind {
    /// Is a document of this kind dangerous to leave out?
    pub(crate) fn is_security(self) -> bool {
        match self {
            Self::AuthorizationPolicy | Self::RequestAuthentication | Self::PeerAuthentication => true,
            Self::Mesh
            | Self::Service
            | Self::Workload
            | Self::HttpRoute
            | Self::GrpcRoute
            | Self::TlsRoute
            | Self::TcpRoute
            | Self::ReferenceGrant
            | Self::TrafficPolicy => false,
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
#[error("{0:?} is not KIND/NAMESPACE/NAME; write it as Service/shop/web")]
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
    /// What was refused and has no last good form, as far as it could be read. A security policy among them closes its
    /// target, or, where even that could not be read, every workload that it may have been for.
    pub(crate) refused: BTreeMap<ResourceKey, Option<Arc<Resource>>>,
    /// Which services were asked for. None: everything is known of every service (as in the control plane).
    pub(crate) called: Option<Called>,
}

/// The services of which everything is known that their callers need. Another service may be known in part, because it
/// selects the own workload or a route leads there; nothing is sent to its address before the rest is known.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Called {
    /// Asked for by name.
    pub(crate) services: BTreeSet<Named>,
    /// Asked for by address.
    pub(crate) addresses: BTreeSet<IpAddr>,
}

/// One resource, as written. (Each variant is the document of its file in this room.)
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Resource {
    Mesh(Object<MeshSpec>),
    Service(Object<ServiceSpec>),
    Workload(Object<WorkloadSpec>),
    HttpRoute(Object<HttpRouteSpec>),
    GrpcRoute(Object<GrpcRouteSpec>),
    TlsRoute(Object<TlsRouteSpec>),
    TcpRoute(Object<TcpRouteSpec>),
    ReferenceGrant(Object<ReferenceGrantSpec>),
    AuthorizationPolicy(Object<AuthorizationPolicySpec>),
    RequestAuthentication(Object<RequestAuthenticationSpec>),
    PeerAuthentication(Object<PeerAuthenticationSpec>),
    TrafficPolicy(Object<TrafficPolicySpec>),
}

/// Why a body is not a resource of its kind.
#[derive(Debug, thiserror::Error)]
#[error("not a {kind}")]
pub(crate) struct BodyError {
    kind: Kind,
    #[source]
    source: serde_json::Error,
}

/// Does the same with every kind's document.
macro_rules! each {
    ($resource:expr, $object:ident => $done:expr) => {
        match $resource {
            Resource::Mesh($object) => $done,
            Resource::Service($object) => $done,
            Resource::Workload($object) => $done,
            Resource::HttpRoute($object) => $done,
            Resource::GrpcRoute($object) => $done,
            Resource::TlsRoute($object) => $done,
            Resource::TcpRoute($object) => $done,
            Resource::ReferenceGrant($object) => $done,
            Resource::AuthorizationPolicy($object) => $done,
            Resource::RequestAuthentication($object) => $done,
            Resource::PeerAuthentication($object) => $done,
            Resource::TrafficPolicy($object) => $done,
        }
    };
}

impl Resource {
    /// Reads the canonical JSON of one document of this kind. A field that this version does not know is an error, so that
    /// no condition of a policy is lost.
    ///
    /// # Errors
    /// The body is not JSON, not of the kind, or has an unknown field.
    pub(crate) fn from_json(kind: Kind, body: &[u8]) -> Result<Self, BodyError> {
        Self::read(kind, &mut serde_json::Deserializer::from_slice(body)).map_err(|source| BodyError { kind, source })
    }

    /// Reads one document of this kind from any format.
    pub(crate) fn read<'de, D: Deserializer<'de>>(kind: Kind, from: D) -> Result<Self, D::Error> {
        Ok(match kind {
            Kind::Mesh => Self::Mesh(Object::deserialize(from)?),
            Kind::Service => Self::Service(Object::deserialize(from)?),
            Kind::Workload => Self::Workload(Object::deserialize(from)?),
            Kind::HttpRoute => Self::HttpRoute(Object::deserialize(from)?),
            Kind::GrpcRoute => Self::GrpcRoute(Object::deserialize(from)?),
            Kind::TlsRoute => Self::TlsRoute(Object::deserialize(from)?),
            Kind::TcpRoute => Self::TcpRoute(Object::deserialize(from)?),
            Kind::ReferenceGrant => Self::ReferenceGrant(Object::deserialize(from)?),
            Kind::AuthorizationPolicy => Self::AuthorizationPolicy(Object::deserialize(from)?),
            Kind::RequestAuthentication => Self::RequestAuthentication(Object::deserialize(from)?),
            Kind::PeerAuthentication => Self::PeerAuthentication(Object::deserialize(from)?),
            Kind::TrafficPolicy => Self::TrafficPolicy(Object::deserialize(from)?),
        })
    }

    /// Its name.
    pub(crate) fn key(&self) -> ResourceKey {
        each!(self, object => object.key())
    }

    /// Its metadata.
    pub(crate) fn metadata(&self) -> &Metadata {
        each!(self, object => &object.metadata)
    }

    /// What a policy is for, as it is written: empty is its namespace. Of anything else: nothing.
    pub(crate) fn targets(&self) -> &[TargetRef] {
        match self {
            Self::AuthorizationPolicy(policy) => &policy.spec.target_refs,
            Self::RequestAuthentication(policy) => &policy.spec.target_refs,
            Self::PeerAuthentication(policy) => &policy.spec.target_refs,
            Self::TrafficPolicy(policy) => &policy.spec.target_refs,
            Self::Mesh(_)
            | Self::Service(_)
            | Self::Workload(_)
            | Self::HttpRoute(_)
            | Self::GrpcRoute(_)
            | Self::TlsRoute(_)
            | Self::TcpRoute(_)
            | Self::ReferenceGrant(_) => &[],
        }
    }

    /// What a security policy goes on covering though its Services lead there no longer.
    pub(crate) fn kept(&self) -> &[Former] {
        each!(self, object => &object.status.kept)
    }

    /// Says what the policy goes on covering.
    pub(crate) fn keep(&mut self, kept: Vec<Former>) {
        each!(self, object => object.status.kept = kept);
    }

    /// The canonical JSON of the document: what is at its default is left out, and equal documents have equal texts.
    pub(crate) fn to_json(&self) -> String {
        // The documents are made of maps with text keys, lists and numbers: all of it has a JSON form.
        each!(self, object => serde_json::to_string(object)).unwrap_or_default()
    }
}

impl Serialize for Resource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        each!(self, object => object.serialize(serializer))
    }
}

impl Resources {
    /// The resource of this key.
    pub(crate) fn get(&self, key: &ResourceKey) -> Option<&Arc<Resource>> {
        self.by_key.get(key)
    }

    /// All resources of a kind, by name.
    pub(crate) fn of_kind(&self, kind: Kind) -> impl Iterator<Item = (&ResourceKey, &Resource)> {
        let first = ResourceKey { kind, name: Named::new("", "") };
        let all = self.by_key.range(first..).take_while(move |(key, _)| key.kind == kind);
        all.map(|(key, resource)| (key, resource.as_ref()))
    }

    /// All services, by name.
    pub(crate) fn services(&self) -> impl Iterator<Item = &Object<ServiceSpec>> {
        self.of_kind(Kind::Service).filter_map(|(_, resource)| match resource {
            Resource::Service(service) => Some(service),
            _ => None,
        })
    }

    /// All workloads, by name.
    pub(crate) fn workloads(&self) -> impl Iterator<Item = &Object<WorkloadSpec>> {
        self.of_kind(Kind::Workload).filter_map(|(_, resource)| match resource {
            Resource::Workload(workload) => Some(workload),
            _ => None,
        })
    }

    /// The workloads of a namespace, by name.
    pub(crate) fn workloads_in(&self, namespace: &str) -> impl Iterator<Item = &Object<WorkloadSpec>> {
        let first = ResourceKey { kind: Kind::Workload, name: Named::new(namespace, "") };
        let all = self.by_key.range(first..);
        let ours = all.take_while(move |(key, _)| key.kind == Kind::Workload && *key.name.namespace == *namespace);
        ours.filter_map(|(_, resource)| match resource.as_ref() {
            Resource::Workload(workload) => Some(workload),
            _ => None,
        })
    }

    /// The service of this name.
    pub(crate) fn service(&self, name: &Named) -> Option<&Object<ServiceSpec>> {
        match self.by_key.get(&ResourceKey { kind: Kind::Service, name: name.clone() })?.as_ref() {
            Resource::Service(service) => Some(service),
            _ => None,
        }
    }

    /// The workload of this name.
    pub(crate) fn workload(&self, name: &Named) -> Option<&Object<WorkloadSpec>> {
        match self.by_key.get(&ResourceKey { kind: Kind::Workload, name: name.clone() })?.as_ref() {
            Resource::Workload(workload) => Some(workload),
            _ => None,
        }
    }
}
