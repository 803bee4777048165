//! JSON Web Tokens: which bearer tokens a workload accepts, and what they claim.
//!
//! Sources: RFC 7519 (JWT), RFC 7515 (JWS), RFC 7517 and 7518 (keys and algorithms), RFC 8725 (best practice), RFC 6750 (bearer).
//! The algorithm belongs to the key: a token's header chooses a key by `kid` and never an algorithm. Only asymmetric keys
//! are taken, so that whoever can verify a token cannot make one. What cannot be verified is refused, never passed on.

mod keys;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub(crate) use keys::JwksConfig;
use keys::{Key, check_signature};

use super::matcher::query_values;
use super::{RequestView, RuleName};
use crate::base::problems::{FieldPath, Problems};
use crate::base::units::Span;

/// Must a request bring a token?
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub(crate) enum Tokens {
    /// A request without a token is refused.
    #[default]
    Required,
    /// A request without a token goes on without claims; a bad token is refused all the same.
    IfPresent,
}

/// What a RequestAuthentication says, without its target. Of several policies on one target every one must be fulfilled;
/// several issuers of which any will do are providers of one policy.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct JwtConfig {
    /// Must a request bring a token? `Required` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tokens: Option<Tokens>,
    /// Where the token stands; `Authorization: Bearer TOKEN` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<TokenSourceConfig>,
    /// Whose tokens are accepted; the token's issuer chooses one.
    pub(crate) providers: Vec<ProviderConfig>,
    /// Does the application see the token? `false` when absent: its header is taken away once it is verified. A token in the
    /// query stays where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) forward: Option<bool>,
}

/// Where a token stands: in one place, so that two tokens are never mixed up.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct TokenSourceConfig {
    /// The whole value of this header, without scheme.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) header: Option<String>,
    /// This query parameter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) query_param: Option<String>,
}

/// One issuer and its keys.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ProviderConfig {
    /// The exact `iss` of its tokens.
    pub(crate) issuer: String,
    /// The token's `aud` must hold one of these. Empty is refused: a token for somebody else would be accepted.
    pub(crate) audiences: Vec<String>,
    /// Its public keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) jwks: Option<JwksConfig>,
    /// A file with its public keys, relative to the document; it is read where the document is, and stands in `jwks` then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) jwks_file: Option<String>,
    /// How far the clocks may differ when `exp` and `nbf` are checked; `60s` when absent, at most `5m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) leeway: Option<Span>,
}

/// One compiled policy.
#[derive(Clone, Debug)]
pub(crate) struct JwtPolicy {
    rule: RuleName,
    /// None stands for a policy that cannot be read: nothing fulfils it.
    accepts: Option<Accepts>,
}

/// The compiled token rules of one port.
#[derive(Clone, Debug)]
pub(crate) struct Jwt {
    policies: Vec<Arc<JwtPolicy>>,
    /// Of how many of them, from the first, the claims count.
    claiming: usize,
}

/// The claims of an accepted token.
#[derive(Clone, Debug)]
pub(crate) struct Claims {
    pub(crate) issuer: Arc<str>,
    pub(crate) all: Arc<Map<String, Value>>,
}

/// Why a token was refused: the rule, and a reason fit for the caller (never the token).
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct TokenRefused {
    pub(crate) rule: RuleName,
    pub(crate) reason: &'static str,
}

/// What a policy accepts.
#[derive(Clone, Debug)]
struct Accepts {
    tokens: Tokens,
    source: Source,
    forward: bool,
    providers: Vec<Provider>,
}

/// Where the token stands.
#[derive(Clone, Debug)]
enum Source {
    /// `Authorization: Bearer TOKEN` (RFC 6750 2.1).
    Bearer,
    Header(HeaderName),
    Query(Box<str>),
}

/// One issuer.
#[derive(Clone, Debug)]
struct Provider {
    issuer: Arc<str>,
    audiences: Vec<Box<str>>,
    leeway: Duration,
    keys: Vec<Key>,
}

impl JwtConfig {
    /// Reports every fault under `at` and returns a policy only if there is none.
    pub(crate) fn compile(&self, rule: RuleName, at: &FieldPath, problems: &mut Problems) -> Option<JwtPolicy> {
        let Self { tokens, from, providers, forward } = self;
        let source = match from {
            None => Some(Source::Bearer),
            Some(from) => from.compile(&at.field("from"), problems),
        };
        let list = at.field("providers");
        if providers.is_empty() || providers.len() > PROVIDERS_MAX {
            problems.refuse(&list, format!("{} providers", providers.len()), format!("write 1 to {PROVIDERS_MAX}"));
            return None;
        }
        let mut compiled: Vec<Provider> = Vec::new();
        for (index, provider) in providers.iter().enumerate() {
            let at = list.index(index);
            if compiled.iter().any(|known| *known.issuer == *provider.issuer) {
                problems.refuse(
                    &at.field("issuer"),
                    format!("the issuer {:?} is there twice", provider.issuer),
                    "write all its keys and audiences into one provider",
                );
                continue;
            }
            compiled.extend(provider.compile(&at, problems));
        }
        let accepts = Accepts {
            tokens: tokens.unwrap_or_default(),
            source: source?,
            forward: forward.unwrap_or(false),
            providers: (compiled.len() == providers.len()).then_some(compiled)?,
        };
        Some(JwtPolicy { rule, accepts: Some(accepts) })
    }
}

impl TokenSourceConfig {
    fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<Source> {
        match (&self.header, &self.query_param) {
            (Some(name), None) => match HeaderName::from_bytes(name.as_bytes()) {
                // The header's value would be `Bearer TOKEN`, which is what leaving `from` out means.
                Ok(AUTHORIZATION) => {
                    problems.refuse(&at.field("header"), "this header has a scheme before its token", "leave from out");
                    None
                }
                Ok(name) => Some(Source::Header(name)),
                Err(_no_name) => {
                    problems.refuse(&at.field("header"), format!("{name:?} is no header name"), "write a name as X-Token");
                    None
                }
            },
            (None, Some(name)) if !name.is_empty() => Some(Source::Query(name.as_str().into())),
            (None, Some(_)) | (None, None) | (Some(_), Some(_)) => {
                problems.refuse(at, "the place of the token is not one place", "write header or queryParam, one of them");
                None
            }
        }
    }
}

impl ProviderConfig {
    fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<Provider> {
        let Self { issuer, audiences, jwks, jwks_file, leeway } = self;
        let mut good = true;
        if issuer.is_empty() {
            problems.refuse(&at.field("issuer"), "the issuer has no name", "write the exact iss of its tokens");
            good = false;
        }
        if audiences.is_empty() || audiences.iter().any(String::is_empty) {
            problems.refuse(
                &at.field("audiences"),
                "without an audience, tokens that were made for others are accepted too",
                "write the aud that the issuer puts into tokens for this workload",
            );
            good = false;
        }
        let leeway = leeway.map_or(LEEWAY, |leeway| leeway.0);
        if leeway > LEEWAY_MAX {
            let text = format!("clocks do not differ by {}", Span(leeway));
            problems.refuse(&at.field("leeway"), text, format!("write at most {}", Span(LEEWAY_MAX)));
            good = false;
        }
        let keys = match (jwks, jwks_file) {
            (Some(jwks), None) => jwks.compile(&at.field("jwks"), problems),
            (None, Some(file)) => {
                problems.refuse(&at.field("jwksFile"), format!("the keys of {file:?} were not read"), "write them into jwks");
                None
            }
            (Some(_), Some(_)) => {
                problems.refuse(at, "jwks and jwksFile are both there", "keep one of them");
                None
            }
            (None, None) => {
                problems.refuse(at, "the issuer has no keys", "write its public keys into jwks or name their jwksFile");
                None
            }
        };
        let audiences = audiences.iter().map(|audience| audience.as_str().into()).collect();
        let provider = Provider { issuer: issuer.as_str().into(), audiences, leeway, keys: keys? };
        good.then_some(provider)
    }
}

impl JwtPolicy {
    /// Stands in for a policy that cannot be read: it refuses every request and connection, with `policy_unreadable`.
    pub(crate) fn refuse(rule: RuleName) -> Self {
        Self { rule, accepts: None }
    }

    fn verify(&self, request: RequestView<'_>, now: Duration) -> Result<Option<Claims>, &'static str> {
        let accepts = self.accepts.as_ref().ok_or("policy_unreadable")?;
        match (accepts.source.find(request)?, accepts.tokens) {
            (Some(token), _) => accepts.check(&token, now).map(Some),
            (None, Tokens::Required) => Err(TOKEN_MISSING),
            (None, Tokens::IfPresent) => Ok(None),
        }
    }
}

impl Jwt {
    /// All policies of one port, of which every one must be fulfilled: those that hold there, and those by which it is still
    /// covered. The claims are those of the first that found a token. What is kept only restricts: beside policies that hold,
    /// its tokens are demanded and their claims are nobody's, or a caller who brings two tokens would choose by which of them
    /// it is judged.
    pub(crate) fn new(
        policies: impl IntoIterator<Item = Arc<JwtPolicy>>,
        kept: impl IntoIterator<Item = Arc<JwtPolicy>>,
    ) -> Self {
        let mut policies: Vec<_> = policies.into_iter().collect();
        let held = policies.len();
        policies.extend(kept);
        let claiming = if held == 0 { policies.len() } else { held };
        Self { policies, claiming }
    }

    /// Does no policy cover the port?
    pub(crate) fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// The claims of the request's token; `None` where no token is needed and none was sent. `now` is since the epoch.
    pub(crate) fn verify(&self, request: RequestView<'_>, now: Duration) -> Result<Option<Claims>, TokenRefused> {
        let mut claims = None;
        for (index, policy) in self.policies.iter().enumerate() {
            let found = policy.verify(request, now).map_err(|reason| TokenRefused { rule: policy.rule.clone(), reason })?;
            if index < self.claiming {
                claims = claims.or(found);
            }
        }
        Ok(claims)
    }

    /// Takes verified tokens away before the application sees the request, unless its policy forwards them. What is no token
    /// (another scheme of `Authorization`) stays.
    pub(crate) fn strip(&self, headers: &mut HeaderMap) {
        for accepts in self.policies.iter().filter_map(|policy| policy.accepts.as_ref()) {
            match &accepts.source {
                Source::Bearer if !accepts.forward => {
                    if headers.get(AUTHORIZATION).is_some_and(|value| bearer(value.as_bytes()).is_some()) {
                        headers.remove(AUTHORIZATION);
                    }
                }
                Source::Header(name) if !accepts.forward => {
                    headers.remove(name);
                }
                Source::Bearer | Source::Header(_) | Source::Query(_) => {}
            }
        }
    }

    /// The query without the parameters that tokens stand in, unless their policy forwards them; `None` where it stays.
    pub(crate) fn strip_query(&self, query: &str) -> Option<String> {
        let accepting = self.policies.iter().filter_map(|policy| policy.accepts.as_ref()).filter(|accepts| !accepts.forward);
        let names: Vec<&str> = accepting
            .filter_map(|accepts| match &accepts.source {
                Source::Query(name) => Some(&**name),
                Source::Bearer | Source::Header(_) => None,
            })
            .collect();
        let is_token = |parameter: &&str| names.iter().any(|name| query_values(parameter, name).next().is_some());
        let rest: Vec<&str> = query.split('&').filter(|parameter| !is_token(parameter)).collect();
        // A parameter that stays is not touched, so that equal lengths are equal texts.
        (rest.len() < query.split('&').count()).then(|| rest.join("&"))
    }

    /// Does an opaque connection, which can bring no token, break a rule?
    pub(crate) fn decide_opaque(&self) -> Result<(), TokenRefused> {
        let broken = self.policies.iter().find_map(|policy| match &policy.accepts {
            None => Some((policy, "policy_unreadable")),
            Some(accepts) => (accepts.tokens == Tokens::Required).then_some((policy, TOKEN_MISSING)),
        });
        broken.map_or(Ok(()), |(policy, reason)| Err(TokenRefused { rule: policy.rule.clone(), reason }))
    }
}

impl Source {
    /// The request's token. More than one is refused: the application may look at another than we do.
    fn find<'a>(&self, request: RequestView<'a>) -> Result<Option<Cow<'a, str>>, &'static str> {
        let one_line = |name: &HeaderName| {
            let mut lines = request.headers.get_all(name).iter();
            let first = lines.next();
            if lines.next().is_some() { Err("token_ambiguous") } else { Ok(first) }
        };
        let text = |bytes: &'a [u8]| str::from_utf8(bytes).map(Cow::Borrowed).map_err(|_no_text| "token_malformed");
        match self {
            Self::Bearer => one_line(&AUTHORIZATION)?.and_then(|line| bearer(line.as_bytes())).map(text).transpose(),
            Self::Header(name) => one_line(name)?.map(|line| text(line.as_bytes())).transpose(),
            Self::Query(name) => {
                let mut values = query_values(request.query.unwrap_or_default(), name);
                match (values.next(), values.next()) {
                    (None, _) => Ok(None),
                    (Some(value), None) => value.map(Some).ok_or("token_malformed"),
                    (Some(_), Some(_)) => Err("token_ambiguous"),
                }
            }
        }
    }
}

impl Accepts {
    /// The claims of a token that is good now.
    fn check(&self, token: &str, now: Duration) -> Result<Claims, &'static str> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err("token_too_long");
        }
        let (message, signature) = token.rsplit_once('.').ok_or("token_malformed")?;
        // A JWE has five parts; more dots are in neither alphabet, so that decoding refuses them.
        let (header, payload) = message.split_once('.').ok_or("token_malformed")?;
        let header = decode(header)?;
        let claims = decode(payload)?;
        // RFC 7515 4.1.11: an extension that must be understood and is not makes the token invalid. None is understood.
        if header.contains_key("crit") {
            return Err("token_unsupported");
        }
        let issuer = claims.get("iss").and_then(Value::as_str).ok_or("token_unknown_issuer")?;
        // Who is said to have issued it chooses the keys, and only its own keys can prove it.
        let provider = self.providers.iter().find(|provider| *provider.issuer == *issuer).ok_or("token_unknown_issuer")?;
        check_signature(&provider.keys, &header, message, signature)?;
        provider.check_claims(&claims, now)?;
        Ok(Claims { issuer: Arc::clone(&provider.issuer), all: Arc::new(claims) })
    }
}

impl Provider {
    fn check_claims(&self, claims: &Map<String, Value>, now: Duration) -> Result<(), &'static str> {
        // RFC 7519 4.1.3: who is not named by the audience MUST reject the token.
        let for_us = |value: &Value| value.as_str().is_some_and(|name| self.audiences.iter().any(|known| **known == *name));
        let named = claims.get("aud").is_some_and(|value| match value {
            Value::Array(list) => list.iter().any(for_us),
            value => for_us(value),
        });
        if !named {
            return Err("token_wrong_audience");
        }
        // A NumericDate may have a fraction (RFC 7519 2); one that is no number is no date.
        let date = |name: &str| match claims.get(name) {
            None => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or("token_malformed"),
        };
        let (now, leeway) = (now.as_secs_f64(), self.leeway.as_secs_f64());
        // RFC 7519 leaves exp out at will; a token that is good for ever is not accepted here.
        let expires = date("exp")?.ok_or("token_without_expiry")?;
        if now >= expires + leeway {
            return Err("token_expired");
        }
        if date("nbf")?.is_some_and(|from| now + leeway < from) {
            return Err("token_not_yet_valid");
        }
        Ok(())
    }
}

/// What stands after the scheme of a bearer token; `None` for another scheme (RFC 9110 11.1: schemes have no case).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, rest) = value.split_at_checked("bearer".len())?;
    if !scheme.eq_ignore_ascii_case(b"bearer") {
        return None;
    }
    match rest {
        [] | [b' ', ..] => Some(rest.trim_ascii()),
        _ => None,
    }
}

/// One part of a token: base64url of a JSON object.
fn decode(part: &str) -> Result<Map<String, Value>, &'static str> {
    let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_no_base64| "token_malformed")?;
    serde_json::from_slice(&bytes).map_err(|_no_object| "token_malformed")
}

/// The reason of a request that brought no token where one is needed.
pub(crate) const TOKEN_MISSING: &str = "token_missing";

/// Issuers of one policy.
const PROVIDERS_MAX: usize = 16;

/// Longer ones are not looked into.
const TOKEN_BYTES_MAX: usize = 16 * 1024;

const LEEWAY: Duration = Duration::from_secs(60);

const LEEWAY_MAX: Duration = Duration::from_secs(300);
