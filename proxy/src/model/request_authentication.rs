//! `RequestAuthentication`: which tokens a workload accepts. What its fields mean stands in `policy/jwt`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Kind;
use super::object::Spec;
use super::target::TargetRef;
use crate::policy::jwt::{JwtConfig, ProviderConfig, TokenSourceConfig, Tokens};

/// The body of a RequestAuthentication. Without a target it is for every workload of its namespace; in the namespace
/// `outrigger-system`, of the mesh. Of several on one target every one must be fulfilled.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct RequestAuthenticationSpec {
    /// What it applies to; the namespace when absent.
    #[serde(default, deserialize_with = "super::target::some_targets", skip_serializing_if = "Vec::is_empty")]
    pub(crate) target_refs: Vec<TargetRef>,
    /// Must a request bring a token? `Required` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tokens: Option<Tokens>,
    /// Where the token stands; `Authorization: Bearer TOKEN` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<TokenSourceConfig>,
    /// Whose tokens are accepted; the token's issuer chooses one.
    pub(crate) providers: Vec<ProviderConfig>,
    /// Does the application see the token? `false` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) forward: Option<bool>,
}

impl Spec for RequestAuthenticationSpec {
    const KIND: Kind = Kind::RequestAuthentication;
}

impl RequestAuthenticationSpec {
    /// What it says, without its target.
    pub(crate) fn config(&self) -> JwtConfig {
        JwtConfig { tokens: self.tokens, from: self.from.clone(), providers: self.providers.clone(), forward: self.forward }
    }
}
