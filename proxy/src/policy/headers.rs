//! Header modifiers: set, add, remove.
//!
//! Sources: Gateway API HTTPHeaderFilter; RFC 9110 7.6.1 (hop-by-hop fields); RFC 9110 5.5 (field values).
//! A modifier cannot touch what frames a message (`Content-Length`, hop-by-hop fields), what names its receiver (`Host`, which
//! URLRewrite changes), or what the sidecars tell each other (`outrigger-…`): whoever could would smuggle requests past them.

use std::collections::BTreeSet;

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
        let Self { set, add, remove } = self;
        let mut good = true;
        for (field, count) in [("set", set.len()), ("add", add.len()), ("remove", remove.len())] {
            if count > HEADERS_MAX {
                problems.refuse(
                    &at.field(field),
                    format!("{count} headers are too many"),
                    format!("write at most {HEADERS_MAX}"),
                );
                good = false;
            }
        }
        let (in_set, in_add, in_remove) = (at.field("set"), at.field("add"), at.field("remove"));
        let set = compile_headers(set, &in_set, problems);
        let add = compile_headers(add, &in_add, problems);
        let mut gone = Vec::new();
        for (index, name) in remove.iter().enumerate() {
            match compile_name(name, &in_remove.index(index), problems) {
                Some(name) => gone.push(name),
                None => good = false,
            }
        }
        let edit = HeaderEdit { set: set?, add: add?, remove: gone };
        // Two entries of one list contradict each other; across lists the order of `apply` tells which is meant.
        let twice = [
            repeated(edit.set.iter().map(|(name, _)| name)),
            repeated(edit.add.iter().map(|(name, _)| name)),
            repeated(edit.remove.iter()),
        ];
        for (field, name) in [in_set, in_add, in_remove].iter().zip(twice) {
            if let Some(name) = name {
                problems.refuse(field, format!("the header {name} is there twice"), "write each header once");
                good = false;
            }
        }
        good.then_some(edit)
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

fn repeated<'a>(names: impl Iterator<Item = &'a HeaderName>) -> Option<&'a HeaderName> {
    let mut seen = BTreeSet::new();
    names.into_iter().find(|name| !seen.insert(name.as_str()))
}

fn compile_headers(list: &[HeaderConfig], at: &FieldPath, problems: &mut Problems) -> Option<Vec<(HeaderName, HeaderValue)>> {
    let compiled: Vec<_> = list
        .iter()
        .enumerate()
        .filter_map(|(index, HeaderConfig { name, value })| {
            let at = at.index(index);
            let name = compile_name(name, &at.field("name"), problems)?;
            let found = HeaderValue::from_str(value).ok().filter(|found| found.len() <= VALUE_MAX && value.trim() == value);
            if found.is_none() {
                let remedy = "write plain text in one line, without spaces at its ends, at most 4096 bytes";
                // The value itself may be a secret.
                let text = format!("this value of {} bytes cannot stand in a header", value.len());
                problems.refuse(&at.field("value"), text, remedy);
            }
            found.map(|value| (name, value))
        })
        .collect();
    (compiled.len() == list.len()).then_some(compiled)
}

fn compile_name(text: &str, at: &FieldPath, problems: &mut Problems) -> Option<HeaderName> {
    let Ok(name) = HeaderName::from_bytes(text.as_bytes()) else {
        problems.refuse(at, format!("{text:?} is no header name"), "write a name as X-Version");
        return None;
    };
    if name.as_str() == "host" {
        problems.refuse(at, "the host is no header to edit", "write an URLRewrite filter with hostname");
        return None;
    }
    if RESERVED.contains(&name.as_str()) || name.as_str().starts_with("outrigger-") {
        problems.refuse(at, format!("{name} belongs to the connection, or to the sidecars"), "leave it out");
        return None;
    }
    Some(name)
}

/// What frames a message or belongs to one connection (RFC 9110 7.6.1, RFC 9113 8.2.2).
const RESERVED: &[&str] = &[
    "connection",
    "content-length",
    "expect",
    "http2-settings",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Headers of one list, as Gateway API has it.
const HEADERS_MAX: usize = 16;

/// Bytes of a value, as Gateway API has it.
const VALUE_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn compile(config: serde_json::Value) -> Result<HeaderEdit, String> {
        let config: HeaderEditConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
        let mut problems = Problems::of("HTTPRoute/shop/web");
        let compiled = config.compile(&FieldPath::root(), &mut problems);
        assert_eq!(compiled.is_none(), problems.refused());
        compiled.ok_or_else(|| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    /// What becomes of `before`, written as `name: value` lines.
    fn check(config: serde_json::Value, before: &[&str], after: &[&str]) {
        let mut headers = HeaderMap::new();
        for line in before {
            let (name, value) = line.split_once(": ").unwrap();
            headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
        }
        compile(config).unwrap().apply(&mut headers);
        let mut got: Vec<_> = headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        got.sort();
        assert_eq!(got, after);
    }

    #[test]
    fn set_replaces_add_appends_and_remove_takes_every_line() {
        check(json!({"set": [{"name": "A", "value": "1"}]}), &["a: 0", "a: 2"], &["a: 1"]);
        check(json!({"add": [{"name": "a", "value": "1"}]}), &["a: 0"], &["a: 0", "a: 1"]);
        check(json!({"add": [{"name": "a", "value": "1"}]}), &[], &["a: 1"]);
        check(json!({"remove": ["A"]}), &["a: 0", "a: 2", "b: 1"], &["b: 1"]);
        check(json!({}), &["a: 0"], &["a: 0"]);
    }

    #[test]
    fn what_frames_a_message_or_is_ours_cannot_be_edited() {
        for name in
            ["Transfer-Encoding", "content-length", "Connection", "te", "upgrade", "Outrigger-Upgrade", "host", ":path", ""]
        {
            for config in [
                json!({"set": [{"name": name, "value": "1"}]}),
                json!({"add": [{"name": name, "value": "1"}]}),
                json!({"remove": [name]}),
            ] {
                assert!(compile(config.clone()).is_err(), "{config}");
            }
        }
    }

    #[test]
    fn a_value_cannot_break_out_of_its_line() {
        for value in ["a\r\nb: c", "a\nb", "\0", " a", "a "] {
            assert!(compile(json!({"set": [{"name": "a", "value": value}]})).is_err(), "{value:?}");
        }
        assert!(compile(json!({"set": [{"name": "a", "value": ""}]})).is_ok());
    }

    #[test]
    fn a_list_names_a_header_once() {
        let said = compile(json!({"set": [{"name": "a", "value": "1"}, {"name": "A", "value": "2"}]})).unwrap_err();
        expect_test::expect!["HTTPRoute/shop/web: set: the header a is there twice; write each header once"].assert_eq(&said);
        check(json!({"remove": ["a"], "add": [{"name": "a", "value": "1"}]}), &["a: 0"], &["a: 1"]);
    }
}
