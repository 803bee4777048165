//! Authorization: may this peer make this request?
//!
//! Sources: the truth table below; RFC 9110 15.5.4 (403); SPIFFE ID 2 (principals).
//! Deny rules are asked first, then allow rules, then the default. Where there is an allow policy and none of its rules
//! matches, the answer is no. What cannot be evaluated never opens anything: on an opaque connection, or for a peer without
//! identity, a DENY whose condition is about what is missing matches, and an ALLOW whose condition is about it does not.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::jwt::Claims;
use super::matcher::StringMatch;
use super::{Peer, RequestView, RuleName};
use crate::base::problems::{FieldPath, Problems};

/// What a policy does with the requests that its rules match.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub(crate) enum Action {
    /// They are allowed, and what no ALLOW policy of the target matches is refused.
    #[serde(rename = "ALLOW")]
    Allow,
    /// They are refused, whatever an ALLOW policy says.
    #[serde(rename = "DENY")]
    Deny,
}

/// What an AuthorizationPolicy says, without its target.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct AuthorizationConfig {
    /// ALLOW or DENY.
    pub(crate) action: Action,
    /// The policy matches a request that one of its rules matches. An ALLOW policy without rules allows nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) rules: Vec<RuleConfig>,
}

/// One rule: the peer, the request and the claims must all fit. A rule without any condition matches everything.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct RuleConfig {
    /// Who calls: one of these must fit; anybody when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<Vec<FromConfig>>,
    /// What is asked: one of these must fit; anything when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) to: Option<Vec<ToConfig>>,
    /// What the caller's token claims: all of these must fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) when: Option<Vec<WhenConfig>>,
}

/// A kind of caller. Every field that is there must fit; of a field's values, one.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct FromConfig {
    /// SPIFFE IDs as mutual TLS proved them: `spiffe://TD/ns/NS/sa/SA`, or a pattern `prefix*`, `*suffix`, `*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) principals: Option<Vec<String>>,
    /// Namespaces of service accounts: exact, `prefix*`, `*suffix`, `*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) namespaces: Option<Vec<String>>,
}

/// A kind of request. Every field that is there must fit; of a field's values, one.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ToConfig {
    /// HTTP methods, upper case, or `*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) methods: Option<Vec<String>>,
    /// Paths without query: exact, `prefix*`, `*suffix`, `*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) paths: Option<Vec<String>>,
    /// Ports of the workload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ports: Option<Vec<u16>>,
}

/// A condition on the claims of the accepted token.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct WhenConfig {
    /// The claim's name, as `groups`; of a claim inside an object, as `realm_access.roles`.
    pub(crate) claim: String,
    /// The claim, or one element of it where it is a list, must fit one of these: exact, `prefix*`, `*suffix`, `*`.
    pub(crate) values: Vec<String>,
}

/// One compiled policy.
#[derive(Clone, Debug)]
pub(crate) struct AuthorizationPolicy {}

/// What is answered where no policy decides.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum DefaultAction {
    #[default]
    Allow,
    Deny,
}

/// The compiled rules that apply to one port of the own workload.
#[derive(Clone, Debug)]
pub(crate) struct Authorization {}

/// What was decided, and the rule that decided it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    Allow(RuleName),
    Deny(RuleName),
}

impl AuthorizationConfig {
    /// Reports every fault under `at` and returns a policy only if there is none. `policy` is the name by which people know
    /// the policy, as `AuthorizationPolicy/shop/allow-web`.
    pub(crate) fn compile(&self, policy: &str, at: &FieldPath, problems: &mut Problems) -> Option<AuthorizationPolicy> {
        compile_rules(self.action, &self.rules, policy, at, problems)
    }
}

/// As [`AuthorizationConfig::compile`], for a document that has the two fields in its own spec; `at` is the spec.
pub(crate) fn compile_rules(
    action: Action,
    rules: &[RuleConfig],
    policy: &str,
    at: &FieldPath,
    problems: &mut Problems,
) -> Option<AuthorizationPolicy> {
    todo!()
}

impl AuthorizationPolicy {
    /// Stands in for a policy that cannot be read: it denies everything under the policy's name.
    pub(crate) fn refuse(rule: RuleName) -> Self {
        todo!()
    }
}

impl Authorization {
    /// All policies of one port. The order of policies with the same action decides only which of them is named.
    pub(crate) fn new(policies: impl IntoIterator<Item = Arc<AuthorizationPolicy>>, default: DefaultAction) -> Self {
        todo!()
    }

    /// Denies everything, by this rule: for a target whose policy cannot be read.
    pub(crate) fn refuse(rule: RuleName) -> Self {
        todo!()
    }

    /// Decides a request: deny rules, then allow rules, then the default.
    pub(crate) fn decide(&self, _peer: &Peer, _request: RequestView<'_>, _claims: Option<&Claims>) -> Verdict {
        todo!()
    }

    /// Decides an opaque connection: a DENY that names an HTTP field matches, an ALLOW that names one never does.
    pub(crate) fn decide_opaque(&self, _peer: &Peer) -> Verdict {
        todo!()
    }
}
