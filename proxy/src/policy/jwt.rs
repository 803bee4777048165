//! JSON Web Tokens: which bearer tokens a workload accepts, and what they claim.
//!
//! Sources: RFC 7519 (JWT), RFC 7515 (JWS), RFC 7517 and 7518 (keys and algorithms), RFC 8725 (best practice), RFC 6750 (bearer).
//! The algorithm belongs to the key: a token's header chooses a key by `kid` and never an algorithm. Only asymmetric keys
//! are taken, so that whoever can verify a token cannot make one. What cannot be verified is refused, never passed on.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{RequestView, RuleName};
use crate::base::problems::{FieldPath, Problems};
use crate::base::units::Span;

/// Must a request bring a token?
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub(crate) enum Tokens {
    /// A request without a token is refused.
    #[default]
    Required,
    /// A request without a token goes on without claims; a bad token is refused all the same.
    IfPresent,
}

/// What a RequestAuthentication says, without its target. Of several policies on one target every one must be fulfilled;
/// several issuers of which any will do are providers of one policy.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct JwtConfig {
    /// Must a request bring a token? `Required` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tokens: Option<Tokens>,
    /// Where the token stands; `Authorization: Bearer TOKEN` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<TokenSourceConfig>,
    /// Whose tokens are accepted; the token's issuer chooses one.
    pub(crate) providers: Vec<ProviderConfig>,
    /// Does the application see the token? `false` when absent: its header is taken away once it is verified. A token in the
    /// query stays where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) forward: Option<bool>,
}

/// Where a token stands: in one place, so that two tokens are never mixed up.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct TokenSourceConfig {
    /// The whole value of this header, without scheme.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) header: Option<String>,
    /// This query parameter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) query_param: Option<String>,
}

/// One issuer and its keys.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ProviderConfig {
    /// The exact `iss` of its tokens.
    pub(crate) issuer: String,
    /// The token's `aud` must hold one of these. Empty is refused: a token for somebody else would be accepted.
    pub(crate) audiences: Vec<String>,
    /// Its public keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) jwks: Option<JwksConfig>,
    /// A file with its public keys, relative to the document; it is read where the document is, and stands in `jwks` then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) jwks_file: Option<String>,
    /// How far the clocks may differ when `exp` and `nbf` are checked; `60s` when absent, at most `5m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) leeway: Option<Span>,
}

/// A JWK Set (RFC 7517 section 5). Members that mean nothing here may be there, as the RFC demands; private ones may not.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub(crate) struct JwksConfig {
    /// The keys.
    pub(crate) keys: Vec<Map<String, Value>>,
}

/// One compiled policy.
#[derive(Clone, Debug)]
pub(crate) struct JwtPolicy {}

/// The compiled token rules of one port.
#[derive(Clone, Debug)]
pub(crate) struct Jwt {}

/// The claims of an accepted token.
#[derive(Clone, Debug)]
pub(crate) struct Claims {
    pub(crate) issuer: Arc<str>,
    pub(crate) all: Arc<Map<String, Value>>,
}

/// Why a token was refused: the rule, and a reason fit for the caller (never the token).
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct TokenRefused {
    pub(crate) rule: RuleName,
    pub(crate) reason: &'static str,
}

impl JwtConfig {
    /// Reports every fault under `at` and returns a policy only if there is none.
    pub(crate) fn compile(&self, rule: RuleName, at: &FieldPath, problems: &mut Problems) -> Option<JwtPolicy> {
        todo!()
    }
}

impl JwtPolicy {
    /// Stands in for a policy that cannot be read: it refuses every request and connection, with `policy_unreadable`.
    pub(crate) fn refuse(rule: RuleName) -> Self {
        todo!()
    }
}

impl Jwt {
    /// All policies of one port, of which every one must be fulfilled. The claims are those of the first that found a token.
    pub(crate) fn new(policies: impl IntoIterator<Item = Arc<JwtPolicy>>) -> Self {
        todo!()
    }

    /// The claims of the request's token; `None` where no token is needed and none was sent. `now` is since the epoch.
    pub(crate) fn verify(&self, _request: RequestView<'_>, _now: Duration) -> Result<Option<Claims>, TokenRefused> {
        todo!()
    }

    /// Takes verified tokens away before the application sees the request, unless its policy forwards them.
    pub(crate) fn strip(&self, _headers: &mut HeaderMap) {
        todo!()
    }

    /// Does an opaque connection, which can bring no token, break a rule?
    pub(crate) fn decide_opaque(&self) -> Result<(), TokenRefused> {
        todo!()
    }
}
