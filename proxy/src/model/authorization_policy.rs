//! `AuthorizationPolicy`: who may ask what of a workload. What its rules mean stands in `policy/authorization`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Kind;
use super::object::Spec;
use super::target::TargetRef;
use crate::policy::authorization::{Action, RuleConfig};

/// The body of an AuthorizationPolicy. Without a target it is for every workload of its namespace; in the namespace
/// `outrigger-system`, of the mesh.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct AuthorizationPolicySpec {
    /// What it applies to; the namespace when absent.
    #[serde(default, deserialize_with = "super::target::some_targets", skip_serializing_if = "Vec::is_empty")]
    pub(crate) target_refs: Vec<TargetRef>,
    /// What is done with a request that a rule matches.
    pub(crate) action: Action,
    /// The policy matches a request that one of its rules matches. An ALLOW policy without rules allows nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) rules: Vec<RuleConfig>,
}

impl Spec for AuthorizationPolicySpec {
    const KIND: Kind = Kind::AuthorizationPolicy;
}
