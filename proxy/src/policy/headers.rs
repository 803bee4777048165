//! Header modifiers: set, add, remove.
//!
//! Sources: Gateway API HTTPHeaderFilter; RFC 9110 7.6.1 (hop-by-hop fields); RFC 9110 5.5 (field values).
//! A modifier cannot touch what frames a message (`Content-Length`, hop-by-hop fields), what names its receiver (`Host`, which
//! URLRewrite changes), or what the sidecars tell each other (`outrigger-…`): whoever could would smuggle requests past them.

use http::{HeaderMap, HeaderName, HeaderValue};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::problems::{FieldPath, Problems};

/// What a user writes (Gateway API HTTPHeaderFilter).
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct HeaderEditConfig {
    /// The header has this value only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) set: Vec<HeaderConfig>,
    /// The header has this value too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) add: Vec<HeaderConfig>,
    /// The header is gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) remove: Vec<String>,
}

/// A header (Gateway API HTTPHeader).
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct HeaderConfig {
    /// Upper or lower case.
    pub(crate) name: String,
    /// At most 4096 bytes.
    pub(crate) value: String,
}

/// A compiled modifier.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeaderEdit {
    pub(crate) set: Vec<(HeaderName, HeaderValue)>,
    pub(crate) add: Vec<(HeaderName, HeaderValue)>,
    pub(crate) remove: Vec<HeaderName>,
}

impl HeaderEditConfig {
    /// Reports every fault under `at` and returns a modifier only if there is none.
    pub(crate) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<HeaderEdit> {
        todo!()
    }
}

impl HeaderEdit {
    /// Edits in place: removes, then sets, then adds.
    pub(crate) fn apply(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name.clone(), value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name.clone(), value.clone());
        }
    }
}
