//! Cross-origin requests: a preflight is answered here, and an answer says which pages may read it.
//!
//! Sources: Gateway API HTTPCORSFilter (GEP-1767), Fetch ("CORS protocol"). A browser is who obeys: a request of an origin
//! that is not allowed is carried like any other, and its answer says nothing of who may read it.

use std::sync::Arc;

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN,
    VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RuleName;
use super::matcher::compile_method;
use crate::base::problems::{FieldPath, Problems};

/// What a user writes (Gateway API HTTPCORSFilter).
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct CorsConfig {
    /// Origins whose pages may read answers, as `https://shop.example`, `https://*.shop.example:8443`, `https://*`; `*` alone
    /// is every origin.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) allow_origins: Vec<String>,
    /// May the pages' requests carry cookies and the like?
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) allow_credentials: Option<bool>,
    /// Methods beside GET, HEAD and POST; `*` alone is every method.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) allow_methods: Vec<String>,
    /// Headers that requests may bring; `*` alone is every header.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) allow_headers: Vec<String>,
    /// Headers of answers that pages may read; `*` is every header, where no credentials are allowed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) expose_headers: Vec<String>,
    /// Seconds for which a preflight holds; 5 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_age: Option<u32>,
}

/// The compiled policy.
#[derive(Clone, Debug)]
pub(crate) struct Cors {
    pub(crate) rule: RuleName,
    origins: Origins,
    credentials: bool,
    methods: Listed,
    headers: Listed,
    expose: Option<HeaderValue>,
    max_age: HeaderValue,
}

/// What is to be done about one request.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Nothing: it comes from no page of another origin, or of one that is not allowed.
    Nothing,
    /// It is a preflight, and these headers are its answer.
    Preflight(HeaderMap),
    /// It is carried, and its answer says who may read it.
    Readable(Readable),
}

/// Who may read an answer.
#[derive(Clone, Debug)]
pub(crate) struct Readable {
    cors: Arc<Cors>,
    origin: HeaderValue,
}

#[derive(Clone, Debug)]
enum Origins {
    Any,
    These(Vec<Origin>),
}

/// One origin; the port is that of the scheme where none is written.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Origin {
    secure: bool,
    /// Lower case, with `*` for everything left of what follows.
    host: Box<str>,
    port: u16,
}

/// What a preflight is told is allowed.
#[derive(Clone, Debug)]
enum Listed {
    /// Nothing was written.
    Nothing,
    Any,
    These(HeaderValue),
}

impl CorsConfig {
    /// Reports every fault under `at` and returns a policy only if there is none.
    pub(crate) fn compile(&self, rule: RuleName, at: &FieldPath, problems: &mut Problems) -> Option<Cors> {
        let Self { allow_origins, allow_credentials, allow_methods, allow_headers, expose_headers, max_age } = self;
        let credentials = allow_credentials.unwrap_or(false);
        let mut good = true;
        let lists = [
            ("allowOrigins", allow_origins),
            ("allowMethods", allow_methods),
            ("allowHeaders", allow_headers),
            ("exposeHeaders", expose_headers),
        ];
        for (field, list) in lists {
            if list.len() > LIST_MAX {
                problems.refuse(&at.field(field), format!("{} are too many", list.len()), format!("write at most {LIST_MAX}"));
                good = false;
            }
            if field != "exposeHeaders" && list.len() > 1 && list.iter().any(|one| one == "*") {
                problems.refuse(
                    &at.field(field),
                    "* stands beside others, which it is already",
                    "write * alone, or leave it out",
                );
                good = false;
            }
        }
        if allow_origins.is_empty() {
            problems.warn(&at.field("allowOrigins"), "no origin is allowed", "name the origins whose pages may read answers");
        }
        let mut origins = Vec::new();
        for (index, text) in allow_origins.iter().enumerate().filter(|(_, text)| *text != "*") {
            match Origin::read(text).filter(|origin| !origin.host.trim_start_matches('*').contains('*')) {
                Some(origin) => origins.push(origin),
                None => {
                    let text = format!("{text:?} is not an origin");
                    problems.refuse(&at.field("allowOrigins").index(index), text, "write it as https://shop.example:8443, or *");
                    good = false;
                }
            }
        }
        let any = allow_origins.iter().any(|origin| origin == "*");
        for (index, method) in allow_methods.iter().enumerate().filter(|(_, method)| *method != "*") {
            good &= compile_method(method, &at.field("allowMethods").index(index), problems).is_some();
        }
        for (field, list) in [("allowHeaders", allow_headers), ("exposeHeaders", expose_headers)] {
            for (index, name) in list.iter().enumerate().filter(|(_, name)| *name != "*") {
                if HeaderName::from_bytes(name.as_bytes()).is_err() {
                    let text = format!("{name:?} is no header name");
                    problems.refuse(&at.field(field).index(index), text, "write a name as X-Version");
                    good = false;
                }
            }
        }
        if *max_age == Some(0) {
            problems.refuse(&at.field("maxAge"), "0 seconds are no time to keep an answer", "write 1 or more, or leave it out");
            good = false;
        }
        if !good {
            return None;
        }
        // With credentials a browser reads `*` as a header of that name.
        let exposed: Vec<&str> =
            expose_headers.iter().map(String::as_str).filter(|name| !(credentials && *name == "*")).collect();
        Some(Cors {
            rule,
            origins: if any { Origins::Any } else { Origins::These(origins) },
            credentials,
            methods: Listed::of(allow_methods),
            headers: Listed::of(allow_headers),
            expose: (!exposed.is_empty()).then(|| HeaderValue::try_from(exposed.join(", ")).ok()).flatten(),
            max_age: HeaderValue::from(max_age.unwrap_or(MAX_AGE)),
        })
    }
}

impl Cors {
    /// What a request means by these headers.
    pub(crate) fn decide(self: &Arc<Self>, method: &Method, headers: &HeaderMap) -> Verdict {
        let Some(origin) = headers.get(ORIGIN) else { return Verdict::Nothing };
        let allowed = match &self.origins {
            Origins::Any => true,
            Origins::These(these) => {
                let asked = origin.to_str().ok().and_then(Origin::read);
                asked.is_some_and(|asked| these.iter().any(|one| one.allows(&asked)))
            }
        };
        let readable = allowed.then(|| Readable { cors: Arc::clone(self), origin: origin.clone() });
        match headers.get(ACCESS_CONTROL_REQUEST_METHOD).filter(|_| method == Method::OPTIONS) {
            Some(asked) => Verdict::Preflight(readable.map(|readable| readable.preflight(asked, headers)).unwrap_or_default()),
            None => readable.map_or(Verdict::Nothing, Verdict::Readable),
        }
    }
}

impl Readable {
    /// Says so in an answer.
    pub(crate) fn write(&self, headers: &mut HeaderMap) {
        let Cors { credentials, expose, .. } = self.cors.as_ref();
        self.write_origin(headers);
        if *credentials {
            headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
        if let Some(expose) = expose {
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone());
        }
    }

    fn preflight(&self, method: &HeaderValue, asked: &HeaderMap) -> HeaderMap {
        let Cors { credentials, methods, headers: wanted, max_age, .. } = self.cors.as_ref();
        let mut headers = HeaderMap::new();
        self.write_origin(&mut headers);
        if *credentials {
            headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
        let allowed = [
            (ACCESS_CONTROL_ALLOW_METHODS, methods.told(*credentials, Some(method))),
            (ACCESS_CONTROL_ALLOW_HEADERS, wanted.told(*credentials, asked.get(ACCESS_CONTROL_REQUEST_HEADERS))),
        ];
        for (name, value) in allowed {
            if let Some(value) = value {
                headers.insert(name, value);
            }
        }
        headers.insert(ACCESS_CONTROL_MAX_AGE, max_age.clone());
        headers
    }

    fn write_origin(&self, headers: &mut HeaderMap) {
        if matches!(self.cors.origins, Origins::Any) && !self.cors.credentials {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
        } else {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, self.origin.clone());
            // A cache must not give one page's answer to another.
            headers.append(VARY, HeaderValue::from_static("Origin"));
        }
    }
}

impl Listed {
    fn of(list: &[String]) -> Self {
        match list {
            [] => Self::Nothing,
            [any] if any == "*" => Self::Any,
            // Each of them is a token, so that all of them are text.
            these => HeaderValue::try_from(these.join(", ")).map_or(Self::Nothing, Self::These),
        }
    }

    /// What is answered to who asked for `asked`: with credentials never the star, which would be a name then.
    fn told(&self, credentials: bool, asked: Option<&HeaderValue>) -> Option<HeaderValue> {
        match self {
            Self::Nothing => None,
            Self::Any if credentials => asked.cloned(),
            Self::Any => Some(HeaderValue::from_static("*")),
            Self::These(these) => Some(these.clone()),
        }
    }
}

impl Origin {
    fn read(text: &str) -> Option<Self> {
        let text = text.to_ascii_lowercase();
        let (scheme, rest) = text.split_once("://")?;
        let secure = match scheme {
            "http" => false,
            "https" => true,
            _neither => return None,
        };
        // The colons of an address stand in brackets.
        let begin = rest.rfind(']').map_or(0, |end| end + 1);
        let (host, port) = match rest.get(begin..)?.find(':') {
            Some(colon) => {
                let (host, port) = rest.split_at_checked(begin + colon)?;
                (host, port.get(1..)?.parse().ok().filter(|port| *port > 0)?)
            }
            None => (rest, if secure { 443 } else { 80 }),
        };
        let is_host = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'*' | b'_' | b'[' | b']' | b':');
        (!host.is_empty() && host.bytes().all(is_host)).then(|| Self { secure, host: host.into(), port })
    }

    /// Is the page's origin this one? A star is everything to the left of what follows.
    fn allows(&self, page: &Self) -> bool {
        let same_host = match self.host.strip_prefix('*') {
            Some(rest) => page.host.len() > rest.len() && page.host.ends_with(rest),
            None => self.host == page.host,
        };
        same_host && self.secure == page.secure && self.port == page.port
    }
}

/// Entries of one list, as Gateway API has it.
const LIST_MAX: usize = 64;

/// Seconds for which a preflight holds where nothing is written, as Gateway API has it.
const MAX_AGE: u32 = 5;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn compile(config: Value) -> Result<Arc<Cors>, String> {
        let mut problems = Problems::of("HTTPRoute/shop/web");
        let config: CorsConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
        let compiled = config.compile(RuleName::new("web"), &FieldPath::root(), &mut problems);
        assert_eq!(compiled.is_none(), problems.refused());
        compiled.map(Arc::new).ok_or_else(|| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    fn ask(config: &Value, method: Method, headers: &[(&'static str, &str)]) -> String {
        let headers: HeaderMap =
            headers.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect();
        let mut answer = HeaderMap::new();
        let what = match compile(config.clone()).unwrap().decide(&method, &headers) {
            Verdict::Nothing => "nothing",
            Verdict::Preflight(told) => {
                answer = told;
                "preflight"
            }
            Verdict::Readable(readable) => {
                readable.write(&mut answer);
                "readable"
            }
        };
        let mut lines: Vec<_> = answer.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        lines.sort();
        format!("{what}{}", lines.iter().map(|line| format!("; {line}")).collect::<String>())
    }

    fn allowed(origins: &Value, origin: &str) -> bool {
        ask(&json!({"allowOrigins": origins}), Method::GET, &[("origin", origin)]).starts_with("readable")
    }

    #[test]
    fn an_origin_is_scheme_host_and_port_and_a_star_is_everything_to_its_left() {
        for (pattern, origin, expected) in [
            ("https://shop.example", "https://shop.example", true),
            ("https://shop.example", "https://SHOP.example", true),
            ("https://shop.example", "https://shop.example:443", true),
            ("https://shop.example", "http://shop.example", false),
            ("https://shop.example", "https://shop.example:8443", false),
            ("https://shop.example", "https://shop.example.evil", false),
            ("http://shop.example:8080", "http://shop.example:8080", true),
            ("https://*.shop.example", "https://a.shop.example", true),
            ("https://*.shop.example", "https://a.b.shop.example", true),
            ("https://*.shop.example", "https://shop.example", false),
            ("https://*.shop.example", "https://evilshop.example", false),
            ("https://*", "https://anything.example", true),
            ("https://*", "http://anything.example", false),
            ("https://*:8443", "https://a:8443", true),
            ("*", "http://a:1", true),
            ("*", "null", true),
            ("https://*", "null", false),
            ("http://[fd64::1]:81", "http://[fd64::1]:81", true),
        ] {
            assert_eq!(allowed(&json!([pattern]), origin), expected, "{pattern} {origin}");
        }
        assert!(allowed(&json!(["https://a.example", "https://b.example"]), "https://b.example"));
        assert!(!allowed(&json!([]), "https://b.example"));
    }

    #[test]
    fn a_preflight_is_answered_with_what_is_allowed() {
        let config = json!({
            "allowOrigins": ["https://shop.example"], "allowCredentials": true, "allowMethods": ["PUT", "DELETE"],
            "allowHeaders": ["X-Token"], "exposeHeaders": ["X-Id"], "maxAge": 60,
        });
        let asked = [("origin", "https://shop.example"), ("access-control-request-method", "PUT")];
        expect_test::expect!["preflight; access-control-allow-credentials: true; access-control-allow-headers: X-Token; access-control-allow-methods: PUT, DELETE; access-control-allow-origin: https://shop.example; access-control-max-age: 60; vary: Origin"].assert_eq(&ask(&config, Method::OPTIONS, &asked));
        let stranger = [("origin", "https://evil.example"), ("access-control-request-method", "PUT")];
        assert_eq!(ask(&config, Method::OPTIONS, &stranger), "preflight");
        // OPTIONS that asks for nothing is the application's.
        assert!(ask(&config, Method::OPTIONS, &asked[..1]).starts_with("readable"));
        assert_eq!(ask(&config, Method::OPTIONS, &[("access-control-request-method", "PUT")]), "nothing");
    }

    #[test]
    fn an_answer_says_who_may_read_it() {
        let config = json!({"allowOrigins": ["https://shop.example"], "exposeHeaders": ["X-Id", "X-More"]});
        expect_test::expect!["readable; access-control-allow-origin: https://shop.example; access-control-expose-headers: X-Id, X-More; vary: Origin"].assert_eq(&ask(&config, Method::GET, &[("origin", "https://shop.example")]));
        assert_eq!(ask(&config, Method::GET, &[("origin", "https://evil.example")]), "nothing");
        assert_eq!(ask(&config, Method::GET, &[]), "nothing");
    }

    #[test]
    fn with_credentials_no_star_is_answered() {
        let star = |credentials: bool| {
            json!({
                "allowOrigins": ["*"], "allowMethods": ["*"], "allowHeaders": ["*"], "exposeHeaders": ["*"],
                "allowCredentials": credentials,
            })
        };
        let asked = [
            ("origin", "https://shop.example"),
            ("access-control-request-method", "PUT"),
            ("access-control-request-headers", "x-a, x-b"),
        ];
        expect_test::expect!["preflight; access-control-allow-headers: *; access-control-allow-methods: *; access-control-allow-origin: *; access-control-max-age: 5"].assert_eq(&ask(&star(false), Method::OPTIONS, &asked));
        expect_test::expect!["preflight; access-control-allow-credentials: true; access-control-allow-headers: x-a, x-b; access-control-allow-methods: PUT; access-control-allow-origin: https://shop.example; access-control-max-age: 5; vary: Origin"].assert_eq(&ask(&star(true), Method::OPTIONS, &asked));
        expect_test::expect!["preflight; access-control-allow-credentials: true; access-control-allow-methods: PUT; access-control-allow-origin: https://shop.example; access-control-max-age: 5; vary: Origin"].assert_eq(&ask(&star(true), Method::OPTIONS, &asked[..2]));
        expect_test::expect!["readable; access-control-allow-origin: *; access-control-expose-headers: *"].assert_eq(&ask(
            &star(false),
            Method::GET,
            &asked[..1],
        ));
        expect_test::expect![
            "readable; access-control-allow-credentials: true; access-control-allow-origin: https://shop.example; vary: Origin"
        ]
        .assert_eq(&ask(&star(true), Method::GET, &asked[..1]));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for config in [
            json!({"allowOrigins": ["shop.example"]}),
            json!({"allowOrigins": ["ftp://shop.example"]}),
            json!({"allowOrigins": ["https://"]}),
            json!({"allowOrigins": ["https://a/b"]}),
            json!({"allowOrigins": ["https://a.*.example"]}),
            json!({"allowOrigins": ["https://a:0"]}),
            json!({"allowOrigins": ["*", "https://a"]}),
            json!({"allowOrigins": ["*"], "allowMethods": ["*", "PUT"]}),
            json!({"allowOrigins": ["*"], "allowMethods": ["put"]}),
            json!({"allowOrigins": ["*"], "allowHeaders": ["a b"]}),
            json!({"allowOrigins": ["*"], "maxAge": 0}),
            json!({"allowOrigins": ["*"], "maxAge": -1}),
            json!({"allowOrigin": ["*"]}),
        ] {
            assert!(compile(config.clone()).is_err(), "{config}");
        }
    }
}
