//! URL rewrite: host and path.
//!
//! Sources: Gateway API HTTPURLRewriteFilter and HTTPPathModifier, whose table of slashes is the test here.
//! A rewritten path begins with a slash, keeps the query, and replaces whole path elements.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::matcher::RequestMatch;
use crate::base::problems::{FieldPath, Problems};

/// What a user writes (Gateway API HTTPURLRewriteFilter).
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct RewriteConfig {
    /// The new host, without port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) hostname: Option<String>,
    /// The new path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<PathRewriteConfig>,
}

/// Which part of the path is replaced.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub(crate) enum PathRewriteType {
    /// All of it.
    ReplaceFullPath,
    /// The prefix that the rule matched.
    ReplacePrefixMatch,
}

/// A new path (Gateway API HTTPPathModifier).
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct PathRewriteConfig {
    /// Which of the two fields below is there.
    #[serde(rename = "type")]
    pub(crate) kind: PathRewriteType,
    /// The whole new path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) replace_full_path: Option<String>,
    /// What stands in the place of the matched prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) replace_prefix_match: Option<String>,
}

/// A compiled rewrite.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rewrite {
    pub(crate) authority: Option<Box<str>>,
    pub(crate) path: Option<PathRewrite>,
}

/// What happens to the path.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum PathRewrite {
    Full(Box<str>),
    /// Replaces the prefix that the route matched.
    Prefix {
        matched: Box<str>,
        with: Box<str>,
    },
}

impl RewriteConfig {
    /// Reports every fault under `at` and returns a rewrite only if there is none. `matches` are those of the rule that the
    /// filter stands in: a prefix can be replaced only where the rule has exactly one match and it is a prefix.
    pub(crate) fn compile(&self, matches: &[RequestMatch], at: &FieldPath, problems: &mut Problems) -> Option<Rewrite> {
        todo!()
    }
}

impl Rewrite {
    /// The new path-and-query; `None` where it stays.
    pub(crate) fn path(&self, _path: &str, _query: Option<&str>) -> Option<String> {
        todo!()
    }
}
