//! String, path, header and query matchers that routes and policies share.
//!
//! Sources: Gateway API HTTPRouteMatch (GEP-1426), RFC 3986 (percent-encoding), RFC 9110 5.3 (several lines of one header).
//! A condition is compiled once and is then total: it answers for every text, takes linear time, and never fails. A regular
//! expression covers the whole text, so that `v1` does not match `/admin?v1`.

use std::borrow::Cow;

use http::header::{COOKIE, HOST};
use http::{HeaderMap, HeaderName, Method};
use percent_encoding::percent_decode;
use regex::{Regex, RegexBuilder};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RequestView;
use super::grpc::CallMatch;
use super::path::{Part, check_spelling};
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
    Regex(Regex),
}

/// A compiled path condition. A prefix matches whole path elements: `/shop` matches `/shop` and `/shop/cart`, not `/shopping`.
#[derive(Clone, Debug)]
pub(crate) enum PathMatch {
    Exact(Box<str>),
    /// Without a slash at the end; empty for `/`.
    Prefix(Box<str>),
    Regex(Regex),
}

/// All conditions of one `matches` entry of a rule; every one must hold.
#[derive(Clone, Debug, Default)]
pub(crate) struct RequestMatch {
    /// Of a rule for calls of gRPC, and of no other.
    pub(crate) call: Option<CallMatch>,
    pub(crate) path: Option<PathMatch>,
    pub(crate) method: Option<Method>,
    pub(crate) headers: Vec<(HeaderName, StringMatch)>,
    pub(crate) query: Vec<(Box<str>, StringMatch)>,
}

/// How specific a match is, by Gateway API precedence: the greater one is asked first. Between equal ones the older route
/// wins, then the name, then the order of rules.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Precedence {
    /// Exact, then regular expression, then prefix.
    path: u8,
    /// Characters of the path's value, or of a call's service.
    length: usize,
    /// Characters of a call's method.
    call: usize,
    method: bool,
    headers: usize,
    query: usize,
}

impl RequestMatchConfig {
    /// Reports every fault under `at` and returns a match only if there is none.
    pub(crate) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<RequestMatch> {
        let mut good = true;
        let mut found = RequestMatch::default();
        if let Some(path) = &self.path {
            found.path = path.compile(&at.field("path"), problems);
            good &= found.path.is_some();
        }
        if let Some(method) = &self.method {
            found.method = compile_method(method, &at.field("method"), problems);
            good &= found.method.is_some();
        }
        for (list, count) in [("headers", self.headers.len()), ("queryParams", self.query_params.len())] {
            if count > CONDITIONS_MAX {
                problems.refuse(&at.field(list), format!("{count} conditions"), format!("write at most {CONDITIONS_MAX}"));
                good = false;
            }
        }
        for (index, header) in self.headers.iter().enumerate() {
            let at = at.field("headers").index(index);
            let Ok(name) = HeaderName::from_bytes(header.name.as_bytes()) else {
                problems.refuse(&at.field("name"), format!("{:?} is no header name", header.name), "write a name as X-Version");
                good = false;
                continue;
            };
            let Some(value) = compile_value(header.kind, &header.value, &at, problems) else {
                good = false;
                continue;
            };
            // "If multiple entries specify equivalent header names, only the first entry with an equivalent name MUST be
            // considered for a match." (Gateway API HTTPHeaderMatch)
            if found.headers.iter().all(|(known, _)| *known != name) {
                found.headers.push((name, value));
            }
        }
        for (index, param) in self.query_params.iter().enumerate() {
            let at = at.field("queryParams").index(index);
            if param.name.is_empty() {
                problems.refuse(&at.field("name"), "the parameter has no name", "write the name of a query parameter");
                good = false;
                continue;
            }
            let Some(value) = compile_value(param.kind, &param.value, &at, problems) else {
                good = false;
                continue;
            };
            // "If multiple entries specify equivalent query param names, only the first entry with an equivalent name MUST be
            // considered for a match." (Gateway API HTTPQueryParamMatch)
            if found.query.iter().all(|(known, _)| **known != *param.name) {
                found.query.push((param.name.as_str().into(), value));
            }
        }
        good.then_some(found)
    }
}

impl PathMatchConfig {
    /// Reports every fault under `at` and returns a match only if there is none.
    pub(crate) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<PathMatch> {
        let value = self.value.as_deref().unwrap_or("/");
        let place = at.field("value");
        let kind = self.kind.unwrap_or_default();
        if kind == PathMatchType::RegularExpression {
            return compile_regex(value, &place, problems).map(PathMatch::Regex);
        }
        check_path(value, &place, problems)?;
        if !check_spelling(value, Part::Whole, &place, problems) {
            return None;
        }
        Some(match kind {
            PathMatchType::Exact => PathMatch::Exact(value.into()),
            // "/abc", "/abc/" and "/abc//" name the same elements; the last is refused above.
            PathMatchType::PathPrefix | PathMatchType::RegularExpression => {
                PathMatch::Prefix(value.strip_suffix('/').unwrap_or(value).into())
            }
        })
    }
}

impl StringMatch {
    /// Reads a pattern as policies write it: `text`, `text*`, `*text`, or `*` for any value.
    pub(crate) fn pattern(text: &str, at: &FieldPath, problems: &mut Problems) -> Option<Self> {
        let (start, end) = (text.starts_with('*'), text.ends_with('*'));
        let inner = text.strip_prefix('*').unwrap_or(text);
        let inner = if end { inner.strip_suffix('*').unwrap_or(inner) } else { inner };
        if text == "*" {
            return Some(Self::Present);
        }
        if inner.is_empty() || inner.contains('*') || (start && end) || text.len() > PATTERN_MAX {
            problems.refuse(
                at,
                format!("{text:?} is not a pattern"),
                "write text, text*, *text, or * for any value; * stands only at one end",
            );
            return None;
        }
        let inner = inner.into();
        Some(match (start, end) {
            (true, _) => Self::Suffix(inner),
            (false, true) => Self::Prefix(inner),
            (false, false) => Self::Exact(inner),
        })
    }

    /// Does `text` fulfil the condition?
    pub(crate) fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(whole) => **whole == *text,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Present => !text.is_empty(),
            Self::Regex(regex) => regex.is_match(text),
        }
    }
}

impl PathMatch {
    /// Does the path (without query) fulfil the condition?
    pub(crate) fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(whole) => **whole == *path,
            // The empty prefix is that of `OPTIONS *` too, which has no elements.
            Self::Prefix(prefix) => {
                prefix.is_empty() || path.strip_prefix(&**prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Self::Regex(regex) => regex.is_match(path),
        }
    }
}

impl RequestMatch {
    /// Does the request fulfil every condition?
    pub(crate) fn matches(&self, request: RequestView<'_>) -> bool {
        let Self { call, path, method, headers, query } = self;
        call.as_ref().is_none_or(|call| call.matches(request))
            && method.as_ref().is_none_or(|method| method == request.method)
            && path.as_ref().is_none_or(|path| path.matches(request.path))
            && headers.iter().all(|(name, wanted)| header_seen(request, name).is_some_and(|value| wanted.matches(&value)))
            && query.iter().all(|(name, wanted)| {
                request.query.and_then(|query| query_value(query, name)).is_some_and(|value| wanted.matches(&value))
            })
    }

    /// Its place among others.
    pub(crate) fn precedence(&self) -> Precedence {
        let (path, length) = match (&self.call, &self.path) {
            (Some(call), _) => (1, call.lengths.0),
            (None, Some(PathMatch::Exact(whole))) => (3, whole.len()),
            (None, Some(PathMatch::Regex(regex))) => (2, regex.as_str().len()),
            // The slash that compiling took away is counted again.
            (None, Some(PathMatch::Prefix(prefix))) => (1, prefix.len().max(1)),
            (None, None) => (1, 1),
        };
        Precedence {
            path,
            length,
            call: self.call.as_ref().map_or(0, |call| call.lengths.1),
            method: self.method.is_some(),
            headers: self.headers.len(),
            query: self.query.len(),
        }
    }
}

/// The header `name` of a request. HTTP/2 says by `:authority` what HTTP/1 says by `Host` (RFC 9113 8.3.1).
fn header_seen<'a>(request: RequestView<'a>, name: &HeaderName) -> Option<Cow<'a, str>> {
    if *name == HOST && !request.headers.contains_key(HOST) {
        return (!request.authority.is_empty()).then_some(Cow::Borrowed(request.authority));
    }
    header_text(request.headers, name)
}

/// The value of a header as a condition sees it: several lines are one, joined by `, ` (RFC 9110 5.3), those of `Cookie` by
/// `; ` (RFC 9113 8.2.3). `None` where there is none, or where it holds bytes that are not text, which no condition can be
/// about.
pub(crate) fn header_text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, str>> {
    let mut lines = headers.get_all(name).iter().map(|line| str::from_utf8(line.as_bytes()).ok());
    let first = lines.next()??;
    let Some(second) = lines.next() else { return Some(Cow::Borrowed(first)) };
    let joint = if name == COOKIE { "; " } else { ", " };
    let mut all = first.to_owned();
    for line in std::iter::once(second).chain(lines) {
        all.push_str(joint);
        all.push_str(line?);
    }
    Some(Cow::Owned(all))
}

/// The decoded value of the first query parameter called `name`; empty where it has none. `None` where there is no such
/// parameter, or where the first one is not text: a later one is never taken in its place, because the application may not
/// do so either.
pub(crate) fn query_value<'a>(query: &'a str, name: &str) -> Option<Cow<'a, str>> {
    query_values(query, name).next()?
}

/// The decoded values of all query parameters called `name`; `None` for one that is not text.
pub(crate) fn query_values<'a>(query: &'a str, name: &str) -> impl Iterator<Item = Option<Cow<'a, str>>> {
    query.split('&').filter(|pair| !pair.is_empty()).filter_map(move |pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        decode(key).is_some_and(|key| key == name).then(|| decode(value))
    })
}

/// Undoes percent-encoding and `+` for a space, as forms write a query. A broken escape stands for itself.
fn decode(text: &str) -> Option<Cow<'_, str>> {
    if !text.bytes().any(|byte| matches!(byte, b'%' | b'+')) {
        return Some(Cow::Borrowed(text));
    }
    let spaced = text.replace('+', " ");
    percent_decode(spaced.as_bytes()).decode_utf8().ok().map(|text| Cow::Owned(text.into_owned()))
}

/// Reads a method: `None` and a problem if it is none, or not in upper case, in which it would never match.
pub(super) fn compile_method(text: &str, at: &FieldPath, problems: &mut Problems) -> Option<Method> {
    let method = Method::from_bytes(text.as_bytes()).ok().filter(|_| !text.bytes().any(|byte| byte.is_ascii_lowercase()));
    if method.is_none() {
        problems.refuse(at, format!("{text:?} is not a method"), "write a method in upper case, as GET");
    }
    method
}

fn compile_value(kind: Option<ValueMatchType>, value: &str, at: &FieldPath, problems: &mut Problems) -> Option<StringMatch> {
    let place = at.field("value");
    match kind.unwrap_or_default() {
        ValueMatchType::RegularExpression => compile_regex(value, &place, problems).map(StringMatch::Regex),
        ValueMatchType::Exact if value.is_empty() || value.len() > VALUE_MAX => {
            problems.refuse(&place, format!("the value has {} bytes", value.len()), format!("write 1 to {VALUE_MAX}"));
            None
        }
        ValueMatchType::Exact => Some(StringMatch::Exact(value.into())),
    }
}

/// Compiles an expression that must cover the whole text. It is read alone first: `a)|(b` must not escape from the frame.
pub(super) fn compile_regex(text: &str, at: &FieldPath, problems: &mut Problems) -> Option<Regex> {
    let build = |text: &str| RegexBuilder::new(text).size_limit(REGEX_SIZE_MAX).dfa_size_limit(REGEX_SIZE_MAX).build();
    if text.len() > PATTERN_MAX {
        problems.refuse(at, format!("the expression has {} bytes", text.len()), format!("write at most {PATTERN_MAX}"));
        return None;
    }
    match build(text).and_then(|_alone| build(&format!(r"\A(?:{text})\z"))) {
        Ok(regex) => Some(regex),
        Err(error) => {
            // The library draws the expression over several lines; the last one says what is wrong.
            let error = error.to_string();
            let what = error.lines().last().unwrap_or_default().trim().trim_start_matches("error: ").to_owned();
            problems.refuse(at, format!("{text:?} is not a regular expression that can be used: {what}"), "write RE2 syntax");
            None
        }
    }
}

/// Refuses what Gateway API refuses in a path that is compared literally: it could never match a normalised path.
fn check_path(path: &str, at: &FieldPath, problems: &mut Problems) -> Option<()> {
    let lower = path.to_ascii_lowercase();
    let bad = !path.starts_with('/')
        || path.len() > PATTERN_MAX
        || ["//", "/./", "/../", "%2f", "#", "?"].iter().any(|part| lower.contains(part))
        || path.ends_with("/..")
        || path.ends_with("/.");
    if bad {
        problems.refuse(
            at,
            format!("{path:?} is a path that no request has"),
            "begin with / and leave out //, /./, /../, %2F, # and ?",
        );
        return None;
    }
    Some(())
}

/// Conditions of one kind in one match, as Gateway API has it.
const CONDITIONS_MAX: usize = 16;

/// Bytes of a value that is compared literally, as Gateway API has it.
const VALUE_MAX: usize = 4096;

/// Bytes of a path, a pattern or an expression, as Gateway API has it.
const PATTERN_MAX: usize = 1024;

/// Memory of one compiled expression: enough for `\w{100}`, too little to fill a sidecar.
const REGEX_SIZE_MAX: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn compile(yaml: serde_json::Value) -> Result<RequestMatch, String> {
        let config: RequestMatchConfig = serde_json::from_value(yaml).map_err(|error| error.to_string())?;
        let mut problems = Problems::of("HTTPRoute/shop/web");
        let found = config.compile(&FieldPath::root().field("matches").index(0), &mut problems);
        let said: Vec<_> = problems.iter().map(ToString::to_string).collect();
        found.ok_or_else(|| said.join("\n"))
    }

    /// Is a request, given as `METHOD path?query` and header lines, matched?
    fn check(config: serde_json::Value, request: &str, lines: &[(&str, &str)], expected: bool) {
        let found = compile(config.clone()).unwrap();
        let (method, target) = request.split_once(' ').unwrap();
        let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
        }
        let method: Method = method.parse().unwrap();
        let view = RequestView { method: &method, authority: "web", path, query, headers: &headers };
        assert_eq!(found.matches(view), expected, "{config} {request} {lines:?}");
    }

    #[test]
    fn a_match_without_conditions_matches_everything() {
        check(serde_json::json!({}), "GET /", &[], true);
        check(serde_json::json!({"path": {}}), "OPTIONS *", &[], true);
    }

    #[test]
    fn a_prefix_matches_whole_path_elements() {
        for value in ["/shop", "/shop/"] {
            let config = serde_json::json!({"path": {"value": value}});
            for (path, expected) in
                [("/shop", true), ("/shop/", true), ("/shop/cart", true), ("/shopping", false), ("/", false), ("/a/shop", false)]
            {
                check(config.clone(), &format!("GET {path}"), &[], expected);
            }
        }
    }

    #[test]
    fn an_exact_path_is_exact() {
        let config = serde_json::json!({"path": {"type": "Exact", "value": "/shop"}});
        check(config.clone(), "GET /shop", &[], true);
        check(config.clone(), "GET /shop?a=b", &[], true);
        check(config.clone(), "GET /shop/", &[], false);
        check(config, "GET /Shop", &[], false);
    }

    #[test]
    fn an_expression_covers_the_whole_text() {
        let config = serde_json::json!({"path": {"type": "RegularExpression", "value": "/v[0-9]|/w"}});
        check(config.clone(), "GET /v1", &[], true);
        check(config.clone(), "GET /w", &[], true);
        check(config.clone(), "GET /v1/admin", &[], false);
        check(config.clone(), "GET /a/w", &[], false);
        check(config, "GET /v1%0A", &[], false);
        assert!(compile(serde_json::json!({"path": {"type": "RegularExpression", "value": "a)|(b"}})).is_err());
    }

    #[test]
    fn a_method_is_compared_as_it_is() {
        check(serde_json::json!({"method": "GET"}), "GET /", &[], true);
        check(serde_json::json!({"method": "GET"}), "POST /", &[], false);
    }

    #[test]
    fn lines_of_one_header_are_one_value() {
        let config = serde_json::json!({"headers": [{"name": "X-Version", "value": "1, 2"}]});
        check(config.clone(), "GET /", &[("x-version", "1"), ("x-version", "2")], true);
        check(config.clone(), "GET /", &[("x-version", "1, 2")], true);
        check(config, "GET /", &[("x-version", "2"), ("x-version", "1")], false);
        let cookies = serde_json::json!({"headers": [{"name": "cookie", "value": "a=1; b=2"}]});
        check(cookies, "GET /", &[("cookie", "a=1"), ("cookie", "b=2")], true);
    }

    #[test]
    fn of_two_entries_for_one_name_the_first_counts() {
        let config = serde_json::json!({"headers": [{"name": "a", "value": "1"}, {"name": "A", "value": "2"}]});
        check(config.clone(), "GET /", &[("a", "1")], true);
        check(config, "GET /", &[("a", "2")], false);
        let config = serde_json::json!({"queryParams": [{"name": "a", "value": "1"}, {"name": "a", "value": "2"}]});
        check(config, "GET /?a=1", &[], true);
    }

    #[test]
    fn a_header_that_is_absent_or_no_text_matches_nothing() {
        let config = serde_json::json!({"headers": [{"name": "a", "type": "RegularExpression", "value": ".*"}]});
        check(config.clone(), "GET /", &[], false);
        check(config.clone(), "GET /", &[("a", "")], true);
        let found = compile(config).unwrap();
        let mut headers = HeaderMap::new();
        headers.insert("a", http::HeaderValue::from_bytes(&[0xff]).unwrap());
        let view = RequestView { method: &Method::GET, authority: "", path: "/", query: None, headers: &headers };
        assert!(!found.matches(view));
    }

    #[test]
    fn a_query_is_decoded_and_its_first_value_wins() {
        for (query, name, expected) in [
            ("a=1&b=2", "b", Some("2")),
            ("a=1&a=2", "a", Some("1")),
            ("a=x%20y+z", "a", Some("x y z")),
            ("%61=1", "a", Some("1")),
            ("a", "a", Some("")),
            ("a=", "a", Some("")),
            ("a=1=2", "a", Some("1=2")),
            ("&&a=1", "a", Some("1")),
            ("a=%zz", "a", Some("%zz")),
            ("a=%ff&a=1", "a", None),
            ("b=1", "a", None),
            ("", "a", None),
        ] {
            assert_eq!(query_value(query, name).as_deref(), expected, "{query}");
        }
    }

    #[test]
    fn patterns_have_one_star_at_one_end() {
        let read = |text: &str| {
            let mut problems = Problems::default();
            let found = StringMatch::pattern(text, &FieldPath::root(), &mut problems);
            assert_eq!(found.is_none(), problems.refused());
            found
        };
        for (pattern, text, expected) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("a*", "ab", true),
            ("a*", "a", true),
            ("a*", "ba", false),
            ("*a", "ba", true),
            ("*a", "ab", false),
            ("*", "x", true),
            ("*", "", false),
        ] {
            assert_eq!(read(pattern).unwrap().matches(text), expected, "{pattern} {text}");
        }
        for pattern in ["", "**", "a*b", "*a*", "a**", "**a"] {
            assert!(read(pattern).is_none(), "{pattern}");
        }
    }

    #[test]
    fn what_could_never_match_is_refused() {
        let path = |value: &str| compile(serde_json::json!({"path": {"value": value}}));
        for bad in ["shop", "", "/a//b", "/a/../b", "/a/./b", "/a/..", "/a/.", "/a%2Fb", "/a#b", "/a?b"] {
            assert!(path(bad).is_err(), "{bad}");
        }
        assert!(path("/a..b/.c").is_ok());
        // A request's path is in its normal form when it is compared.
        for kind in ["Exact", "PathPrefix"] {
            let path = |value: &str| compile(serde_json::json!({"path": {"type": kind, "value": value}}));
            for bad in ["/m%c3%bc", "/a b", "/ü", "/%61x", "/%2e%2e/x"] {
                assert!(path(bad).is_err(), "{bad}");
            }
            assert!(path("/m%C3%BC").is_ok());
        }
        assert!(compile(serde_json::json!({"method": "get"})).is_err());
        assert!(compile(serde_json::json!({"headers": [{"name": "a b", "value": "1"}]})).is_err());
        assert!(compile(serde_json::json!({"headers": [{"name": "a", "value": ""}]})).is_err());
        assert!(compile(serde_json::json!({"path": {"type": "RegularExpression", "value": "\\w{1000}{1000}"}})).is_err());
    }

    #[test]
    fn a_problem_says_where_it_is() {
        let said = compile(serde_json::json!({"path": {"type": "RegularExpression", "value": "("}})).unwrap_err();
        expect_test::expect![[r#"HTTPRoute/shop/web: matches[0].path.value: "(" is not a regular expression that can be used: unclosed group; write RE2 syntax"#]].assert_eq(&said);
    }

    #[test]
    fn precedence_is_that_of_gateway_api() {
        let in_order = [
            serde_json::json!({"path": {"type": "Exact", "value": "/a"}}),
            serde_json::json!({"path": {"type": "RegularExpression", "value": "/a.*"}}),
            serde_json::json!({"path": {"value": "/a/b"}, "method": "GET"}),
            serde_json::json!({"path": {"value": "/a/b"}, "headers": [{"name": "x", "value": "1"}]}),
            serde_json::json!({"path": {"value": "/a/b"}, "queryParams": [{"name": "x", "value": "1"}]}),
            serde_json::json!({"path": {"value": "/a/b"}}),
            serde_json::json!({"path": {"value": "/a"}, "method": "GET"}),
            serde_json::json!({}),
        ];
        let places: Vec<_> = in_order.into_iter().map(|config| compile(config).unwrap().precedence()).collect();
        assert!(places.is_sorted_by(|a, b| a > b), "{places:?}");
    }

    proptest! {
        #[test]
        fn any_query_can_be_asked(query in ".*", name in ".*") {
            let _value = query_value(&query, &name);
        }

        #[test]
        fn a_value_survives_encoding(value in ".*", before in "[b-z=&%+]{0,20}") {
            let encoded = percent_encoding::utf8_percent_encode(&value, percent_encoding::NON_ALPHANUMERIC);
            let query = format!("{before}&a={encoded}");
            let found = query_value(&query, "a");
            prop_assert_eq!(found.as_deref(), Some(&*value));
        }

        #[test]
        fn any_pattern_and_expression_answers(pattern in ".{0,40}", text in ".*") {
            let mut problems = Problems::default();
            for found in [
                StringMatch::pattern(&pattern, &FieldPath::root(), &mut problems),
                compile_regex(&pattern, &FieldPath::root(), &mut problems).map(StringMatch::Regex),
            ] {
                let _answer = found.map(|found| found.matches(&text));
            }
        }

        #[test]
        fn a_prefix_matches_what_lies_under_it(prefix in "(/[a-z]{1,5}){1,3}", rest in "(/[a-z]{0,5}){0,3}", tail in "[a-z]{1,3}") {
            let config = PathMatchConfig { kind: None, value: Some(prefix.clone()) };
            let found = config.compile(&FieldPath::root(), &mut Problems::default()).unwrap();
            let under = format!("{prefix}{rest}");
            let beside = format!("{prefix}{tail}");
            prop_assert!(found.matches(&under));
            prop_assert!(!found.matches(&beside));
        }
    }
}
