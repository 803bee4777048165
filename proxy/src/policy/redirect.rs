//! Redirects: a request is answered with another place to ask.
//!
//! Sources: Gateway API HTTPRequestRedirectFilter, whose rules about the port are the test here; RFC 9110 10.2.2 and 15.4.
//! The place is always whole (scheme, host, port where it is not the scheme's own, path and query), so that no path of a
//! caller's can make it another host's.

use http::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::matcher::RequestMatch;
use super::rewrite::{PathRewrite, PathRewriteConfig};
use crate::base::names::check_name;
use crate::base::problems::{FieldPath, Problems};

/// What a user writes (Gateway API HTTPRequestRedirectFilter).
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct RedirectConfig {
    /// `http` or `https`; the request's own when absent, which is `http`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scheme: Option<SchemeConfig>,
    /// The host; the request's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) hostname: Option<String>,
    /// The path; the request's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<PathRewriteConfig>,
    /// The port; when absent, that of `scheme` where one is written, else the one that was called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) port: Option<u16>,
    /// 301, 302, 303, 307 or 308; 302 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) status_code: Option<u16>,
}

/// A scheme that can be redirected to.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum SchemeConfig {
    Http,
    Https,
}

/// A compiled redirect.
#[derive(Clone, Debug)]
pub(crate) struct Redirect {
    scheme: Option<SchemeConfig>,
    host: Option<Box<str>>,
    port: Option<u16>,
    path: Option<PathRewrite>,
    pub(crate) status: StatusCode,
}

impl RedirectConfig {
    /// Reports every fault under `at` and returns a redirect only if there is none. `matches` are those of the rule that the
    /// filter stands in.
    pub(crate) fn compile(&self, matches: &[RequestMatch], at: &FieldPath, problems: &mut Problems) -> Option<Redirect> {
        let Self { scheme, hostname, path, port, status_code } = self;
        let mut good = true;
        let host = hostname.as_ref().map(|name| name.to_ascii_lowercase().into_boxed_str());
        if let Some(name) = &host
            && let Err(error) = check_name(name)
        {
            problems.refuse(&at.field("hostname"), error.to_string(), "write a host name without port");
            good = false;
        }
        let path = match path {
            None => None,
            Some(path) => {
                let path = path.compile(matches, &at.field("path"), problems);
                good &= path.is_some();
                path
            }
        };
        if *port == Some(0) {
            problems.refuse(&at.field("port"), "0 is not a port", "write 1 to 65535, or leave it out");
            good = false;
        }
        let code = status_code.unwrap_or(302);
        let status = STATUSES.into_iter().find(|status| status.as_u16() == code);
        if status.is_none() {
            let text = format!("{code} is no status of a redirect");
            problems.refuse(&at.field("statusCode"), text, "write 301, 302, 303, 307 or 308");
        }
        let redirect = Redirect { scheme: *scheme, host, port: *port, path, status: status? };
        good.then_some(redirect)
    }
}

impl Redirect {
    /// Where a request for `host` (without port) at the Service's `port` is sent.
    pub(crate) fn location(&self, host: &str, port: u16, path: &str, query: Option<&str>) -> String {
        let scheme = self.scheme.unwrap_or(SchemeConfig::Http);
        let port = self.port.or_else(|| self.scheme.map(SchemeConfig::port)).unwrap_or(port);
        let host = self.host.as_deref().unwrap_or(host);
        let mut location = format!("{}://{host}", scheme.as_str());
        if port != scheme.port() {
            location.push(':');
            location.push_str(&port.to_string());
        }
        match self.path.as_ref().and_then(|new| new.apply(path, query)) {
            Some(new) => location.push_str(&new),
            // The target of `OPTIONS *` has no path.
            None if !path.starts_with('/') => {}
            None => {
                location.push_str(path);
                if let Some(query) = query {
                    location.push('?');
                    location.push_str(query);
                }
            }
        }
        location
    }
}

impl SchemeConfig {
    fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    fn port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

const STATUSES: [StatusCode; 5] = [
    StatusCode::MOVED_PERMANENTLY,
    StatusCode::FOUND,
    StatusCode::SEE_OTHER,
    StatusCode::TEMPORARY_REDIRECT,
    StatusCode::PERMANENT_REDIRECT,
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::matcher::RequestMatchConfig;
    use serde_json::{Value, json};

    fn compile(config: Value) -> Result<Redirect, String> {
        let mut problems = Problems::of("HTTPRoute/shop/web");
        let matches: RequestMatchConfig = serde_json::from_value(json!({"path": {"value": "/old"}})).unwrap();
        let matches = [matches.compile(&FieldPath::root(), &mut problems).unwrap()];
        let config: RedirectConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
        let compiled = config.compile(&matches, &FieldPath::root(), &mut problems);
        assert_eq!(compiled.is_none(), problems.refused());
        compiled.ok_or_else(|| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    /// Where `GET /old/a?b=c` of the host `web` at this port is sent.
    fn check(config: Value, port: u16, expected: &str) {
        let location = compile(config.clone()).unwrap().location("web", port, "/old/a", Some("b=c"));
        assert_eq!(location, expected, "{config}");
    }

    #[test]
    fn what_is_not_written_stays_as_it_was_asked() {
        check(json!({}), 80, "http://web/old/a?b=c");
        check(json!({"hostname": "Example.org"}), 80, "http://example.org/old/a?b=c");
        check(json!({"path": {"type": "ReplaceFullPath", "replaceFullPath": "/new"}}), 80, "http://web/new?b=c");
        check(json!({"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}}), 80, "http://web/new/a?b=c");
        check(json!({"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}}), 80, "http://web/a?b=c");
        assert_eq!(compile(json!({})).unwrap().location("web", 80, "*", None), "http://web");
    }

    /// The paragraph about ports, sentence by sentence.
    #[test]
    fn the_port_is_the_one_that_gateway_api_derives() {
        check(json!({"port": 8083}), 80, "http://web:8083/old/a?b=c");
        check(json!({"port": 8083, "scheme": "https"}), 80, "https://web:8083/old/a?b=c");
        check(json!({"scheme": "https"}), 8080, "https://web/old/a?b=c");
        check(json!({"scheme": "http"}), 8080, "http://web/old/a?b=c");
        check(json!({}), 8080, "http://web:8080/old/a?b=c");
        check(json!({"hostname": "example.org"}), 8080, "http://example.org:8080/old/a?b=c");
        check(json!({"port": 80}), 8080, "http://web/old/a?b=c");
        check(json!({"port": 443, "scheme": "https"}), 80, "https://web/old/a?b=c");
        check(json!({"port": 443, "scheme": "http"}), 80, "http://web:443/old/a?b=c");
        check(json!({"port": 80, "scheme": "https"}), 80, "https://web:80/old/a?b=c");
    }

    #[test]
    fn the_status_is_one_of_five_and_302_by_default() {
        assert_eq!(compile(json!({})).unwrap().status, StatusCode::FOUND);
        for code in [301, 302, 303, 307, 308] {
            assert_eq!(compile(json!({"statusCode": code})).unwrap().status.as_u16(), code);
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        for config in [
            json!({"statusCode": 300}),
            json!({"statusCode": 200}),
            json!({"scheme": "ftp"}),
            json!({"hostname": "a:80"}),
            json!({"hostname": "*.a"}),
            json!({"port": 0}),
            json!({"path": {"type": "ReplaceFullPath", "replaceFullPath": "new"}}),
        ] {
            assert!(compile(config.clone()).is_err(), "{config}");
        }
    }

    #[test]
    fn no_path_of_a_callers_leads_to_another_host() {
        let redirect = compile(json!({"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}})).unwrap();
        assert_eq!(redirect.location("web", 80, "/old//evil.example", None), "http://web//evil.example");
    }
}
