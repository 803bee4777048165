//! `PeerAuthentication`: who may reach a workload without mutual TLS. Without one, nobody may. Of several that apply, the
//! nearest counts: one with a target before one for the namespace before one for the mesh; of two alike the first by name.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Kind;
use super::object::Spec;
use super::target::TargetRef;

/// The body of a PeerAuthentication. Without a target it is for every workload of its namespace; in the namespace
/// `outrigger-system`, of the mesh.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct PeerAuthenticationSpec {
    /// What it applies to; the namespace when absent.
    #[serde(default, deserialize_with = "super::target::some_targets", skip_serializing_if = "Vec::is_empty")]
    pub(crate) target_refs: Vec<TargetRef>,
    /// For every port that `portLevel` does not name.
    pub(crate) mode: PeerMode,
    /// Ports of the workload with a mode of their own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) port_level: Vec<PortMode>,
}

/// The mode of one port.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct PortMode {
    pub(crate) port: u16,
    pub(crate) mode: PeerMode,
}

/// What a peer must show.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub(crate) enum PeerMode {
    /// Mutual TLS.
    Strict,
    /// Mutual TLS, or nothing: a plaintext connection is taken, and has no identity.
    Permissive,
}

impl Spec for PeerAuthenticationSpec {
    const KIND: Kind = Kind::PeerAuthentication;
}
