//! `TrafficPolicy`: how a service is called and protected, where HTTPRoute has no field for it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Kind;
use super::object::Spec;
use super::target::TargetRef;
use crate::base::units::Span;
use crate::policy::breaker::BreakerConfig;
use crate::policy::fault::FaultConfig;
use crate::policy::outlier::OutlierConfig;
use crate::policy::rate_limit::RateLimitConfig;
use crate::policy::retry::RetryBudgetConfig;

/// The body of a TrafficPolicy. Where several name one service, each field is taken from the first by name that has it. One that
/// names none and has a `fault` alone is for the rules of routes that refer to it (`extensionRef`).
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct TrafficPolicySpec {
    /// Services of the policy's namespace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) target_refs: Vec<TargetRef>,
    /// How many of a caller's requests to the service may be retries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) retry_budget: Option<RetryBudgetConfig>,
    /// What keeps callers from a service, or one of its endpoints, that is in trouble.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) circuit_breaking: Option<CircuitBreakingConfig>,
    /// How much each of the service's workloads takes, counted where they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rate_limit: Option<RateLimitConfig>,
    /// Trouble that callers meet, to see whether they bear it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) fault: Option<FaultConfig>,
    /// How long a connection to an endpoint may take; `5s` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) connect_timeout: Option<Span>,
}

/// Circuit breaking: by limits, and by leaving out endpoints that fail.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct CircuitBreakingConfig {
    /// Limits on connections and requests, of each caller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) limits: Option<BreakerConfig>,
    /// When an endpoint that fails is left out, and for how long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ejection: Option<OutlierConfig>,
}

impl Spec for TrafficPolicySpec {
    const KIND: Kind = Kind::TrafficPolicy;
}
