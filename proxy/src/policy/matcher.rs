//! String, path, header and query matchers that routes and policies share.
//!
//! Sources: Gateway API HTTPRouteMatch (GEP-1426), RFC 3986 (percent-encoding), RFC 9110 5.3 (several lines of one header).
//! A condition is compiled once and is then total: it answers for every text, takes linear time, and never fails. A regular
//! expression covers the whole text, so that `v1` does not match `/admin?v1`.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RequestView;
use crate::base::problems::{FieldPath, Problems};

/// How a path is compared.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub(crate) enum PathMatchType {
    /// The whole path.
    Exact,
    /// Whole path elements from the left: `/shop` is the prefix of `/shop/cart`, not of `/shopping`.
    #[default]
    PathPrefix,
    /// A regular expression over the whole path.
    RegularExpression,
}

/// How a header or a query parameter is compared.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub(crate) enum ValueMatchType {
    /// The whole value.
    #[default]
    Exact,
    /// A regular expression over the whole value.
    RegularExpression,
}

/// A path condition (Gateway API HTTPPathMatch).
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct PathMatchConfig {
    /// How the path is compared; `PathPrefix` when absent.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<PathMatchType>,
    /// What it is compared with; `/` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) value: Option<String>,
}

/// A header condition (Gateway API HTTPHeaderMatch).
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct HeaderMatchConfig {
    /// How the value is compared; `Exact` when absent.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<ValueMatchType>,
    /// The header, upper or lower case.
    pub(crate) name: String,
    /// What its value is compared with.
    pub(crate) value: String,
}

/// A query parameter condition (Gateway API HTTPQueryParamMatch).
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct QueryParamMatchConfig {
    /// How the value is compared; `Exact` when absent.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<ValueMatchType>,
    /// The parameter, in exactly this case.
    pub(crate) name: String,
    /// What its value is compared with.
    pub(crate) value: String,
}

/// All conditions of one `matches` entry of a rule (Gateway API HTTPRouteMatch); every one must hold.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct RequestMatchConfig {
    /// The path; every path when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<PathMatchConfig>,
    /// Headers, at most 16; of two entries for one name the first counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) headers: Vec<HeaderMatchConfig>,
    /// Query parameters, at most 16; of two entries for one name the first counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) query_params: Vec<QueryParamMatchConfig>,
    /// The method, upper case; every method when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) method: Option<String>,
}

/// A compiled string condition.
#[derive(Clone, Debug)]
pub(crate) enum StringMatch {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    /// Any value at all, but a value.
    Present,
    Regex(regex::Regex),
}

/// A compiled path condition. A prefix matches whole path elements: `/shop` matches `/shop` and `/shop/cart`, not `/shopping`.
#[derive(Clone, Debug)]
pub(crate) enum PathMatch {
    Exact(Box<str>),
    /// Without a slash at the end; empty for `/`.
    Prefix(Box<str>),
    Regex(regex::Regex),
}

/// All conditions of one `matches` entry of an HTTPRoute rule; every one must hold.
#[derive(Clone, Debug, Default)]
pub(crate) struct RequestMatch {
    pub(crate) path: Option<PathMatch>,
    pub(crate) method: Option<http::Method>,
    pub(crate) headers: Vec<(HeaderName, StringMatch)>,
    pub(crate) query: Vec<(Box<str>, StringMatch)>,
}

/// How specific a match is, by Gateway API precedence: the greater one is asked first. Between equal ones the older route
/// wins, then the name, then the order of rules.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Precedence {
    /// Exact, then regular expression, then prefix.
    path: u8,
    /// Characters of the path's value.
    length: usize,
    method: bool,
    headers: usize,
    query: usize,
}

impl RequestMatchConfig {
    /// Reports every fault under `at` and returns a match only if there is none.
    pub(crate) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<RequestMatch> {
        todo!()
    }
}

impl PathMatchConfig {
    /// Reports every fault under `at` and returns a match only if there is none.
    pub(crate) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<PathMatch> {
        todo!()
    }
}

impl StringMatch {
    /// Reads a pattern as policies write it: `text`, `text*`, `*text`, or `*` for any value.
    pub(crate) fn pattern(text: &str, at: &FieldPath, problems: &mut Problems) -> Option<Self> {
        todo!()
    }

    /// Does `text` fulfil the condition?
    pub(crate) fn matches(&self, _text: &str) -> bool {
        todo!()
    }
}

impl PathMatch {
    /// Does the path (without query) fulfil the condition?
    pub(crate) fn matches(&self, _path: &str) -> bool {
        todo!()
    }
}

impl RequestMatch {
    /// Does the request fulfil every condition?
    pub(crate) fn matches(&self, _request: RequestView<'_>) -> bool {
        todo!()
    }

    /// Its place among others.
    pub(crate) fn precedence(&self) -> Precedence {
        todo!()
    }
}

/// The value of a header as a condition sees it: several lines are one, joined by `, ` (RFC 9110 5.3). `None` where there
/// is none, or where it holds bytes that are not text, which no condition can be about.
pub(crate) fn header_text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, str>> {
    todo!()
}

/// The decoded value of the first query parameter called `name`.
pub(crate) fn query_value<'a>(query: &'a str, name: &str) -> Option<Cow<'a, str>> {
    todo!()
}
