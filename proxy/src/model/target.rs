//! What a policy applies to (Gateway API GEP-713, LocalPolicyTargetReference): an object in the policy's own namespace.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One target of a policy.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct TargetRef {
    /// The API group: empty for a Service, `outrigger.dev` for a Workload.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) group: String,
    /// `Service`: the ports that it leads to, on every workload that it selects. `Workload`: all of its ports.
    pub(crate) kind: TargetKind,
    /// Its name, in the policy's namespace.
    pub(crate) name: String,
}

/// What can be a target.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize)]
pub(crate) enum TargetKind {
    Service,
    Workload,
}

impl TargetRef {
    /// Does it name this object of its kind?
    pub(crate) fn is(&self, kind: TargetKind, name: &str) -> bool {
        self.kind == kind && self.name == name
    }
}
