//! URL rewrite: host and path.
//!
//! Sources: Gateway API HTTPURLRewriteFilter and HTTPPathModifier, whose table of slashes is the test here.
//! A rewritten path begins with a slash, keeps the query, and replaces whole path elements.

use http::uri::PathAndQuery;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::matcher::{PathMatch, RequestMatch};
use crate::base::names::check_name;
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
    /// Replaces the prefix that the route matched. Both are without a slash at the end.
    Prefix {
        matched: Box<str>,
        with: Box<str>,
    },
}

impl RewriteConfig {
    /// Reports every fault under `at` and returns a rewrite only if there is none. `matches` are those of the rule that the
    /// filter stands in: a prefix can be replaced only where the rule has exactly one match and it is a prefix.
    pub(crate) fn compile(&self, matches: &[RequestMatch], at: &FieldPath, problems: &mut Problems) -> Option<Rewrite> {
        let mut good = true;
        let authority = self.hostname.as_ref().map(|name| name.to_ascii_lowercase().into_boxed_str());
        if let Some(name) = &authority
            && let Err(error) = check_name(name)
        {
            problems.refuse(&at.field("hostname"), error.to_string(), "write a host name without port");
            good = false;
        }
        let path = match &self.path {
            None => None,
            Some(path) => Some(path.compile(matches, &at.field("path"), problems)?),
        };
        if authority.is_none() && path.is_none() {
            problems.refuse(at, "the rewrite does nothing", "write hostname, path or both");
            good = false;
        }
        good.then_some(Rewrite { authority, path })
    }
}

impl PathRewriteConfig {
    /// Reports every fault under `at` and returns a path only if there is none.
    pub(super) fn compile(&self, matches: &[RequestMatch], at: &FieldPath, problems: &mut Problems) -> Option<PathRewrite> {
        match (self.kind, &self.replace_full_path, &self.replace_prefix_match) {
            (PathRewriteType::ReplaceFullPath, Some(path), None) => {
                check_path(path, &at.field("replaceFullPath"), problems)?;
                Some(PathRewrite::Full(path.as_str().into()))
            }
            (PathRewriteType::ReplacePrefixMatch, None, Some(with)) => {
                let place = at.field("replacePrefixMatch");
                if !with.is_empty() {
                    check_path(with, &place, problems)?;
                }
                let matched = match matches {
                    // A rule without matches, or a match without path, is one of the prefix `/`.
                    [] => "",
                    [RequestMatch { path: None, .. }] => "",
                    [RequestMatch { path: Some(PathMatch::Prefix(prefix)), .. }] => prefix,
                    [_] | [_, _, ..] => {
                        problems.refuse(
                            &place,
                            "the rule does not match by one prefix, so that there is none to replace",
                            "give the rule exactly one match, whose path is of the type PathPrefix",
                        );
                        return None;
                    }
                };
                let with = with.strip_suffix('/').unwrap_or(with);
                Some(PathRewrite::Prefix { matched: matched.into(), with: with.into() })
            }
            (PathRewriteType::ReplaceFullPath | PathRewriteType::ReplacePrefixMatch, _, _) => {
                problems.refuse(
                    at,
                    "type and fields do not fit together",
                    "write replaceFullPath with the type ReplaceFullPath, or replacePrefixMatch with ReplacePrefixMatch",
                );
                None
            }
        }
    }
}

impl Rewrite {
    /// The new path-and-query; `None` where it stays.
    pub(crate) fn path(&self, path: &str, query: Option<&str>) -> Option<String> {
        self.path.as_ref()?.apply(path, query)
    }
}

impl PathRewrite {
    /// The new path-and-query; `None` where it stays.
    pub(super) fn apply(&self, path: &str, query: Option<&str>) -> Option<String> {
        let mut new = match self {
            Self::Full(whole) => (**whole).to_owned(),
            Self::Prefix { matched, with } => {
                // The rule matched, so the prefix is there; a path that has none (`*`) stays as it is.
                let rest = path.strip_prefix(&**matched).filter(|rest| rest.is_empty() || rest.starts_with('/'))?;
                let new = format!("{with}{rest}");
                if new.is_empty() { "/".to_owned() } else { new }
            }
        };
        if let Some(query) = query {
            new.push('?');
            new.push_str(query);
        }
        Some(new)
    }
}

/// Refuses what is no path, or would bring a query or steps upwards with it.
fn check_path(path: &str, at: &FieldPath, problems: &mut Problems) -> Option<()> {
    let plain = path.starts_with('/') && path.len() <= PATH_MAX && !path.contains(['?', '#', '\\']);
    let steps = path.split('/').any(|element| matches!(element, "." | ".."));
    if plain && !steps && path.parse::<PathAndQuery>().is_ok_and(|parsed| parsed.as_str() == path) {
        return Some(());
    }
    problems.refuse(at, format!("{path:?} is no path"), "begin with /, leave out query, . and .., and encode other characters");
    None
}

/// Bytes of a path, as Gateway API has it.
const PATH_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::matcher::RequestMatchConfig;
    use proptest::prelude::*;
    use serde_json::json;

    fn compile(matches: serde_json::Value, config: serde_json::Value) -> Result<Rewrite, String> {
        let mut problems = Problems::of("HTTPRoute/shop/web");
        let matches: Vec<RequestMatchConfig> = serde_json::from_value(matches).unwrap();
        let matches: Vec<_> = matches.iter().map(|one| one.compile(&FieldPath::root(), &mut problems).unwrap()).collect();
        let config: RewriteConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
        let compiled = config.compile(&matches, &FieldPath::root(), &mut problems);
        assert_eq!(compiled.is_none(), problems.refused());
        compiled.ok_or_else(|| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    fn prefix(matched: &str, with: &str) -> Rewrite {
        let config = json!({"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": with}});
        compile(json!([{"path": {"value": matched}}]), config).unwrap()
    }

    /// The table of HTTPPathModifier, row by row.
    #[test]
    fn a_prefix_is_replaced_as_gateway_api_says() {
        for (path, matched, with, expected) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/bar", "/", "/xyz", "/xyz/bar"),
        ] {
            assert_eq!(prefix(matched, with).path(path, None).as_deref(), Some(expected), "{path} {matched} {with}");
        }
    }

    #[test]
    fn the_query_is_kept() {
        assert_eq!(prefix("/foo", "/xyz").path("/foo", Some("a=/foo")).as_deref(), Some("/xyz?a=/foo"));
        let full = compile(json!([]), json!({"path": {"type": "ReplaceFullPath", "replaceFullPath": "/all"}})).unwrap();
        assert_eq!(full.path("/foo/bar", Some("a=1")).as_deref(), Some("/all?a=1"));
        assert_eq!(full.path("/foo/bar", None).as_deref(), Some("/all"));
    }

    #[test]
    fn a_path_that_is_no_path_or_is_not_named_stays() {
        assert_eq!(prefix("/", "/xyz").path("*", None), None);
        let host = compile(json!([]), json!({"hostname": "Web.Shop"})).unwrap();
        assert_eq!(host.path("/a", Some("b")), None);
        assert_eq!(host.authority.as_deref(), Some("web.shop"));
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        let replace = |with: &str| json!({"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": with}});
        let exact = json!([{"path": {"type": "Exact", "value": "/a"}}]);
        let two = json!([{"path": {"value": "/a"}}, {"path": {"value": "/b"}}]);
        assert!(compile(exact, replace("/x")).is_err());
        assert!(compile(two, replace("/x")).is_err());
        for bad in ["x", "/a?b", "/a#b", "/a b", "/../a", "/a/..", "/a\r\nb", "http://evil/"] {
            assert!(compile(json!([]), replace(bad)).is_err(), "{bad}");
        }
        for config in [
            json!({}),
            json!({"hostname": "a:80"}),
            json!({"hostname": "*.a"}),
            json!({"path": {"type": "ReplaceFullPath"}}),
            json!({"path": {"type": "ReplaceFullPath", "replacePrefixMatch": "/"}}),
            json!({"path": {"replaceFullPath": "/"}}),
        ] {
            assert!(compile(json!([]), config.clone()).is_err(), "{config}");
        }
    }

    proptest! {
        #[test]
        fn a_new_path_is_always_a_path(elements in "(/[a-z]{0,3}){0,4}", matched in "(/[a-z]{1,3}){0,2}", with in "(/[a-z]{1,3}){0,2}/?") {
            let matched = if matched.is_empty() { "/".to_owned() } else { matched };
            let path = format!("{}{elements}", matched.trim_end_matches('/'));
            let path = if path.is_empty() { "/".to_owned() } else { path };
            let new = prefix(&matched, &with).path(&path, None).unwrap();
            prop_assert!(new.starts_with('/'));
            prop_assert!(new.parse::<PathAndQuery>().is_ok());
        }
    }
}
