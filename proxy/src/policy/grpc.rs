//! What a rule for calls of gRPC matches: service, method and headers.
//!
//! Sources: Gateway API GRPCRouteMatch and GRPCMethodMatch; gRPC over HTTP/2 (a call is `POST /SERVICE/METHOD` with a
//! content type of its own). What is no call of gRPC matches no such rule.

use http::HeaderMap;
use http::header::CONTENT_TYPE;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RequestView;
use super::matcher::{HeaderMatchConfig, RequestMatch, RequestMatchConfig, StringMatch, ValueMatchType, compile_regex};
use crate::base::problems::{FieldPath, Problems};

/// All conditions of one `matches` entry of a rule (Gateway API GRPCRouteMatch); every one must hold.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct CallMatchConfig {
    /// Service and method; every call when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) method: Option<MethodMatchConfig>,
    /// Headers, at most 16; of two entries for one name the first counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) headers: Vec<HeaderMatchConfig>,
}

/// A condition about what is called (Gateway API GRPCMethodMatch); one of the two must be there.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct MethodMatchConfig {
    /// How they are compared; `Exact` when absent.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<ValueMatchType>,
    /// The service, with its package; every service when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) service: Option<String>,
    /// The method; every method when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) method: Option<String>,
}

/// What is called.
#[derive(Clone, Debug, Default)]
pub(crate) struct CallMatch {
    service: Option<StringMatch>,
    method: Option<StringMatch>,
    /// Characters of both as they are written, by which one match goes before another.
    pub(super) lengths: (usize, usize),
}

/// Is it a call of gRPC, or the answer to one?
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

impl CallMatchConfig {
    /// Reports every fault under `at` and returns a match only if there is none.
    pub(crate) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<RequestMatch> {
        let headers = RequestMatchConfig { headers: self.headers.clone(), ..RequestMatchConfig::default() };
        let headers = headers.compile(at, problems);
        let call = match &self.method {
            Some(method) => method.compile(&at.field("method"), problems),
            None => Some(CallMatch::default()),
        };
        Some(RequestMatch { call: Some(call?), ..headers? })
    }
}

impl MethodMatchConfig {
    fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<CallMatch> {
        let written = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let (service, method) = (written(&self.service), written(&self.method));
        if service.is_none() && method.is_none() {
            problems.refuse(at, "neither service nor method is there", "write one of them, or leave method out");
            return None;
        }
        let mut good = true;
        let mut read = |field: &str, text: &Option<String>| {
            let text = text.as_ref()?;
            let at = at.field(field);
            let found = match self.kind.unwrap_or_default() {
                ValueMatchType::RegularExpression => compile_regex(text, &at, problems).map(StringMatch::Regex),
                ValueMatchType::Exact if text.contains('/') || text.len() > NAME_MAX => {
                    problems.refuse(&at, format!("{text:?} is the name of no {field}"), "write a name without /");
                    None
                }
                ValueMatchType::Exact => Some(StringMatch::Exact(text.as_str().into())),
            };
            good &= found.is_some();
            found
        };
        let lengths = [&service, &method].map(|text| text.as_ref().map_or(0, String::len));
        let found = CallMatch { service: read("service", &service), method: read("method", &method), lengths: lengths.into() };
        good.then_some(found)
    }
}

impl CallMatch {
    /// Is the request such a call?
    pub(super) fn matches(&self, request: RequestView<'_>) -> bool {
        let Self { service, method, lengths: _ } = self;
        if !is_grpc(request.headers) {
            return false;
        }
        if service.is_none() && method.is_none() {
            return true;
        }
        let called = request.path.strip_prefix('/').and_then(|path| path.rsplit_once('/'));
        called.is_some_and(|(called, name)| {
            service.as_ref().is_none_or(|wanted| wanted.matches(called))
                && method.as_ref().is_none_or(|wanted| wanted.matches(name))
        })
    }
}

/// Bytes of a name, as Gateway API has it.
const NAME_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderValue, Method};
    use serde_json::{Value, json};

    fn compile(config: Value) -> Result<RequestMatch, String> {
        let config: CallMatchConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
        let mut problems = Problems::of("GRPCRoute/shop/web");
        let compiled = config.compile(&FieldPath::root(), &mut problems);
        assert_eq!(compiled.is_none(), problems.refused());
        compiled.ok_or_else(|| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    fn check(config: Value, path: &str, expected: bool) {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc+proto"));
        headers.insert("x-version", HeaderValue::from_static("one"));
        let mut view = RequestView { method: &Method::POST, authority: "web", path, query: None, headers: &headers };
        let found = compile(config.clone()).unwrap();
        assert_eq!(found.matches(view), expected, "{config} {path}");
        let none = HeaderMap::new();
        view.headers = &none;
        assert!(!found.matches(view), "what is no call matches no rule for calls");
    }

    #[test]
    fn a_call_is_matched_by_service_method_and_headers() {
        for (config, path, expected) in [
            (json!({}), "/shop.Cart/Add", true),
            (json!({}), "/", true),
            (json!({"method": {"service": "shop.Cart", "method": "Add"}}), "/shop.Cart/Add", true),
            (json!({"method": {"service": "shop.Cart", "method": "Add"}}), "/shop.Cart/Remove", false),
            (json!({"method": {"service": "shop.Cart"}}), "/shop.Cart/Remove", true),
            (json!({"method": {"service": "shop.Cart"}}), "/shop.Carts/Remove", false),
            (json!({"method": {"service": "shop.cart"}}), "/shop.Cart/Remove", false),
            (json!({"method": {"method": "Add"}}), "/shop.Any/Add", true),
            (json!({"method": {"method": "Add"}}), "/Add", false),
            (json!({"method": {"type": "RegularExpression", "service": "shop\\..*"}}), "/shop.Cart/Add", true),
            (json!({"method": {"type": "RegularExpression", "service": "shop"}}), "/shop.Cart/Add", false),
            (json!({"method": {"type": "RegularExpression", "service": "shop.*", "method": "A.*"}}), "/shop.Cart/Remove", false),
            (json!({"headers": [{"name": "X-Version", "value": "one"}]}), "/shop.Cart/Add", true),
            (json!({"headers": [{"name": "X-Version", "value": "two"}]}), "/shop.Cart/Add", false),
            (json!({"method": {"method": "Add"}, "headers": [{"name": "x-version", "value": "two"}]}), "/shop.Cart/Add", false),
        ] {
            check(config, path, expected);
        }
    }

    #[test]
    fn the_longer_service_goes_first_then_the_longer_method_then_more_headers() {
        let in_order = [
            json!({"method": {"service": "shop.CartAndMore"}}),
            json!({"method": {"service": "shop.Cart", "method": "Remove"}}),
            json!({"method": {"service": "shop.Cart", "method": "Add"}}),
            json!({"method": {"service": "shop.Cart"}, "headers": [{"name": "a", "value": "1"}]}),
            json!({"method": {"service": "shop.Cart"}}),
            json!({"method": {"method": "Remove"}}),
            json!({"headers": [{"name": "a", "value": "1"}, {"name": "b", "value": "1"}]}),
            json!({}),
        ];
        let places: Vec<_> = in_order.into_iter().map(|config| compile(config).unwrap().precedence()).collect();
        assert!(places.is_sorted_by(|a, b| a > b), "{places:?}");
    }

    #[test]
    fn what_could_never_match_is_refused() {
        for config in [
            json!({"method": {}}),
            json!({"method": {"service": "", "method": ""}}),
            json!({"method": {"service": "a/b"}}),
            json!({"method": {"type": "RegularExpression", "method": "("}}),
            json!({"path": {"value": "/"}}),
        ] {
            assert!(compile(config.clone()).is_err(), "{config}");
        }
    }
}
