//! JSON Web Tokens: which bearer tokens a workload accepts, and what they claim.
//!
//! Sources: RFC 7519 (JWT), RFC 7515 (JWS), RFC 7517 and 7518 (keys and algorithms), RFC 8725 (best practice), RFC 6750 (bearer).
//! The algorithm belongs to the key: a token's header chooses a key by `kid` and never an algorithm. Only asymmetric keys
//! are taken, so that whoever can verify a token cannot make one. What cannot be verified is refused, never passed on.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ParsedPublicKey, VerificationAlgorithm};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName};
use jsonwebtoken::{Algorithm, DecodingKey};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

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

/// A JWK Set (RFC 7517 section 5). Members that mean nothing here may be there, as the RFC demands; private ones may not.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub(crate) struct JwksConfig {
    /// The keys.
    pub(crate) keys: Vec<Map<String, Value>>,
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

/// One public key, and the one algorithm that it is used with.
#[derive(Clone, Debug)]
struct Key {
    id: Option<Box<str>>,
    algorithm: Algorithm,
    key: DecodingKey,
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

impl JwksConfig {
    fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<Vec<Key>> {
        let list = at.field("keys");
        if self.keys.len() > KEYS_MAX {
            problems.refuse(&list, format!("{} keys", self.keys.len()), format!("write at most {KEYS_MAX}"));
            return None;
        }
        let mut keys: Vec<Key> = Vec::new();
        let mut good = true;
        for (index, jwk) in self.keys.iter().enumerate() {
            let at = list.index(index);
            match read_key(jwk) {
                Ok(key)
                    if keys.iter().any(|known| key.id.is_some() && known.id == key.id && known.algorithm == key.algorithm) =>
                {
                    problems.refuse(&at.field("kid"), "another key has the same kid and algorithm", "keep one of them");
                    good = false;
                }
                Ok(key) => keys.push(key),
                Err(KeyFault::Ignored(why)) => problems.warn(&at, format!("the key is not used: {why}"), KEY_REMEDY),
                Err(KeyFault::Refused(why)) => {
                    problems.refuse(&at, why, KEY_REMEDY);
                    good = false;
                }
            }
        }
        if good && keys.is_empty() {
            problems.refuse(&list, "no key is left to verify with", KEY_REMEDY);
        }
        (good && !keys.is_empty()).then_some(keys)
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
    /// All policies of one port, of which every one must be fulfilled. The claims are those of the first that found a token.
    pub(crate) fn new(policies: impl IntoIterator<Item = Arc<JwtPolicy>>) -> Self {
        Self { policies: policies.into_iter().collect() }
    }

    /// The claims of the request's token; `None` where no token is needed and none was sent. `now` is since the epoch.
    pub(crate) fn verify(&self, request: RequestView<'_>, now: Duration) -> Result<Option<Claims>, TokenRefused> {
        let mut claims = None;
        for policy in &self.policies {
            let found = policy.verify(request, now).map_err(|reason| TokenRefused { rule: policy.rule.clone(), reason })?;
            claims = claims.or(found);
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
        provider.check_signature(&header, message, signature)?;
        provider.check_claims(&claims, now)?;
        Ok(Claims { issuer: Arc::clone(&provider.issuer), all: Arc::new(claims) })
    }
}

impl Provider {
    fn check_signature(&self, header: &Map<String, Value>, message: &str, signature: &str) -> Result<(), &'static str> {
        let algorithm = header.get("alg").and_then(Value::as_str).ok_or("token_malformed")?;
        let wanted = match header.get("kid") {
            None => None,
            Some(Value::String(id)) => Some(id.as_str()),
            Some(_) => return Err("token_malformed"),
        };
        // A token without kid may be by any key; a key without kid may be that of any token.
        let by_id = |key: &&Key| match (wanted, key.id.as_deref()) {
            (Some(wanted), Some(id)) => wanted == id,
            (None, _) | (_, None) => true,
        };
        let mut candidates = self.keys.iter().filter(by_id).peekable();
        if candidates.peek().is_none() {
            return Err("token_unknown_key");
        }
        // The algorithm is the key's; what the token says must agree with it, and decides nothing.
        let mut candidates = candidates.filter(|key| algorithm_name(key.algorithm) == Some(algorithm)).peekable();
        if candidates.peek().is_none() {
            return Err("token_wrong_algorithm");
        }
        let good = candidates
            .any(|key| jsonwebtoken::crypto::verify(signature, message.as_bytes(), &key.key, key.algorithm).unwrap_or(false));
        if good { Ok(()) } else { Err("token_bad_signature") }
    }

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

/// Why a key of a set is not taken.
enum KeyFault {
    /// It is good for something else: RFC 7517 section 5 has it ignored.
    Ignored(String),
    /// It must not stand there.
    Refused(String),
}

/// Reads a public key and pins its algorithm: the one it names, or the one that its type is used with.
fn read_key(jwk: &Map<String, Value>) -> Result<Key, KeyFault> {
    let text = |member: &str| jwk.get(member).and_then(Value::as_str);
    let ignored = |why: &str| KeyFault::Ignored(why.to_owned());
    let refused = |why: &str| KeyFault::Refused(why.to_owned());
    if PRIVATE_MEMBERS.iter().any(|member| jwk.contains_key(*member)) || text("kty") == Some("oct") {
        return Err(refused("this is a secret key, and everybody who reads this document could make tokens"));
    }
    if text("use").is_some_and(|usage| usage != "sig") {
        return Err(ignored("its use is not sig"));
    }
    let verifies = |list: &Value| list.as_array().is_some_and(|list| list.iter().any(|op| op.as_str() == Some("verify")));
    if jwk.get("key_ops").is_some_and(|list| !verifies(list)) {
        return Err(ignored("its key_ops have no verify"));
    }
    let bytes = |member: &str| {
        let found = text(member).and_then(|text| URL_SAFE_NO_PAD.decode(text).ok());
        found.ok_or_else(|| KeyFault::Refused(format!("its member {member} is missing, or not base64url")))
    };
    let (algorithms, key): (&[Algorithm], DecodingKey) = match (text("kty"), text("crv")) {
        (Some("RSA"), _) => {
            let (n, e) = (bytes("n")?, bytes("e")?);
            let leading = n.iter().take_while(|byte| **byte == 0).count();
            if !(RSA_BYTES_MIN..=RSA_BYTES_MAX).contains(&n.len().saturating_sub(leading)) || e.is_empty() {
                return Err(refused("an RSA key must have 2048 to 8192 bits"));
            }
            (RSA, DecodingKey::from_rsa_raw_components(&n, &e))
        }
        (Some("EC"), Some(curve @ ("P-256" | "P-384"))) => {
            let (length, algorithms, check): (usize, &[Algorithm], &'static dyn VerificationAlgorithm) = match curve {
                "P-256" => (32, &[Algorithm::ES256], &ECDSA_P256_SHA256_FIXED),
                _ => (48, &[Algorithm::ES384], &ECDSA_P384_SHA384_FIXED),
            };
            let (x, y) = (bytes("x")?, bytes("y")?);
            // SEC 1 2.3.3: an uncompressed point.
            let point = [&[4][..], &x, &y].concat();
            if x.len() != length || y.len() != length || ParsedPublicKey::new(check, &point).is_err() {
                return Err(refused("its x and y are no point of its curve"));
            }
            (algorithms, DecodingKey::from_ec_der(&point))
        }
        (Some("OKP"), Some("Ed25519")) => {
            let x = bytes("x")?;
            if x.len() != 32 {
                return Err(refused("its x has not 32 bytes"));
            }
            (&[Algorithm::EdDSA], DecodingKey::from_ed_der(&x))
        }
        (Some("EC" | "OKP"), _) => return Err(ignored("its curve is not known here")),
        (Some(_), _) => return Err(ignored("its kty is not known here")),
        (None, _) => return Err(refused("it has no kty")),
    };
    let named = match text("alg") {
        None => algorithms.first().copied(),
        Some(name) => algorithms.iter().copied().find(|algorithm| algorithm_name(*algorithm) == Some(name)),
    };
    let algorithm = named.ok_or_else(|| ignored("its alg does not go with its type, or is not for signatures"))?;
    let id = match jwk.get("kid") {
        None => None,
        Some(Value::String(id)) => Some(id.as_str().into()),
        Some(_) => return Err(refused("its kid is not text")),
    };
    Ok(Key { id, algorithm, key })
}

/// The name of an algorithm that is used here, as `alg` has it.
fn algorithm_name(algorithm: Algorithm) -> Option<&'static str> {
    match algorithm {
        Algorithm::RS256 => Some("RS256"),
        Algorithm::RS384 => Some("RS384"),
        Algorithm::RS512 => Some("RS512"),
        Algorithm::PS256 => Some("PS256"),
        Algorithm::PS384 => Some("PS384"),
        Algorithm::PS512 => Some("PS512"),
        Algorithm::ES256 => Some("ES256"),
        Algorithm::ES384 => Some("ES384"),
        Algorithm::EdDSA => Some("EdDSA"),
        // Shared secrets, and whatever a later library adds.
        _ => None,
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

/// What an RSA key may be used with; the first, where it does not say, as most issuers leave it out.
const RSA: &[Algorithm] =
    &[Algorithm::RS256, Algorithm::RS384, Algorithm::RS512, Algorithm::PS256, Algorithm::PS384, Algorithm::PS512];

/// Members of private and shared keys (RFC 7518 6.2.2, 6.3.2, 6.4.1).
const PRIVATE_MEMBERS: &[&str] = &["d", "p", "q", "dp", "dq", "qi", "oth", "k"];

/// The reason of a request that brought no token where one is needed.
pub(crate) const TOKEN_MISSING: &str = "token_missing";

const KEY_REMEDY: &str = "write public keys of the type RSA, EC (P-256, P-384) or OKP (Ed25519)";

/// 2048 bits, which is what the library verifies with.
const RSA_BYTES_MIN: usize = 256;

/// 8192 bits, which is what the library verifies with.
const RSA_BYTES_MAX: usize = 1024;

/// Issuers of one policy.
const PROVIDERS_MAX: usize = 16;

/// Keys of one issuer: a token without kid is tried with each.
const KEYS_MAX: usize = 16;

/// Longer ones are not looked into.
const TOKEN_BYTES_MAX: usize = 16 * 1024;

const LEEWAY: Duration = Duration::from_secs(60);

const LEEWAY_MAX: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::rsa::KeySize;
    use aws_lc_rs::signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaKeyPair,
    };
    use http::Method;
    use proptest::prelude::*;
    use serde_json::json;
    use std::sync::LazyLock;

    /// Signs as the issuer does.
    enum Signer {
        Ec(EcdsaKeyPair),
        Rsa(RsaKeyPair),
        Ed(Ed25519KeyPair),
    }

    impl Signer {
        fn ec() -> Self {
            Self::Ec(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap())
        }

        fn sign(&self, message: &[u8], algorithm: &str) -> Vec<u8> {
            let random = SystemRandom::new();
            match self {
                Self::Ec(key) => key.sign(&random, message).unwrap().as_ref().to_vec(),
                Self::Ed(key) => key.sign(message).as_ref().to_vec(),
                Self::Rsa(key) => {
                    let mut signature = vec![0; key.public_modulus_len()];
                    let padding: &'static dyn aws_lc_rs::signature::RsaEncoding =
                        if algorithm == "PS256" { &RSA_PSS_SHA256 } else { &RSA_PKCS1_SHA256 };
                    key.sign(padding, &random, message, &mut signature).unwrap();
                    signature
                }
            }
        }

        fn jwk(&self) -> Value {
            match self {
                Self::Ec(key) => {
                    let (x, y) = key.public_key().as_ref()[1..].split_at(32);
                    json!({"kty": "EC", "crv": "P-256", "x": text(x), "y": text(y)})
                }
                Self::Ed(key) => json!({"kty": "OKP", "crv": "Ed25519", "x": text(key.public_key().as_ref())}),
                Self::Rsa(key) => {
                    let (n, e) = (key.public_key().modulus(), key.public_key().exponent());
                    let (n, e) = (n.big_endian_without_leading_zero(), e.big_endian_without_leading_zero());
                    json!({"kty": "RSA", "n": text(n), "e": text(e)})
                }
            }
        }

        fn token(&self, header: &Value, claims: &Value) -> String {
            let message = format!("{}.{}", text(header.to_string()), text(claims.to_string()));
            let signature = self.sign(message.as_bytes(), header["alg"].as_str().unwrap_or_default());
            format!("{message}.{}", text(signature))
        }
    }

    fn text(bytes: impl AsRef<[u8]>) -> String {
        URL_SAFE_NO_PAD.encode(bytes)
    }

    static EC: LazyLock<Signer> = LazyLock::new(Signer::ec);
    static RSA_KEY: LazyLock<Signer> = LazyLock::new(|| Signer::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).unwrap()));

    /// When the tests are.
    const NOW: u64 = 1_800_000_000;

    fn with(base: Value, extra: &Value) -> Value {
        let mut base = base;
        for (name, value) in extra.as_object().unwrap() {
            match value {
                Value::Null => drop(base.as_object_mut().unwrap().remove(name)),
                value => base[name] = value.clone(),
            }
        }
        base
    }

    fn claims(extra: Value) -> Value {
        with(json!({"iss": "https://issuer", "aud": "web", "exp": NOW + 600, "sub": "ann"}), &extra)
    }

    fn good_token() -> String {
        EC.token(&json!({"alg": "ES256"}), &claims(json!({})))
    }

    fn config(keys: Value, extra: Value) -> Value {
        with(json!({"providers": [{"issuer": "https://issuer", "audiences": ["web", "api"], "jwks": {"keys": keys}}]}), &extra)
    }

    fn compile(config: Value) -> Result<Jwt, String> {
        let config: JwtConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
        let mut problems = Problems::of("RequestAuthentication/shop/web");
        let compiled = config.compile(RuleName::new("web"), &FieldPath::root().field("spec"), &mut problems);
        assert_eq!(compiled.is_none(), problems.refused());
        let said: Vec<_> = problems.iter().map(ToString::to_string).collect();
        compiled.map(|policy| Jwt::new([Arc::new(policy)])).ok_or_else(|| said.join("\n"))
    }

    fn ask(jwt: &Jwt, query: Option<&str>, lines: &[(&'static str, &str)]) -> String {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().unwrap());
        }
        let view = RequestView { method: &Method::GET, authority: "web", path: "/", query, headers: &headers };
        match jwt.verify(view, Duration::from_secs(NOW)) {
            Ok(Some(claims)) => format!("{} of {}", claims.all["sub"].as_str().unwrap_or("nobody"), claims.issuer),
            Ok(None) => "nobody".to_owned(),
            Err(TokenRefused { rule, reason }) => {
                assert_eq!(rule.as_str(), "web");
                reason.to_owned()
            }
        }
    }

    /// What a policy with these keys says to this token.
    fn check(keys: Value, token: &str, expected: &str) {
        let jwt = compile(config(keys, json!({}))).unwrap();
        assert_eq!(ask(&jwt, None, &[("authorization", &format!("Bearer {token}"))]), expected, "{token}");
    }

    /// What a policy with the usual key says to a token with these claims.
    fn check_claims(extra: Value, expected: &str) {
        check(json!([EC.jwk()]), &EC.token(&json!({"alg": "ES256"}), &claims(extra)), expected);
    }

    #[test]
    fn a_good_token_of_every_kind_of_key_is_accepted() {
        let ed = Signer::Ed(Ed25519KeyPair::generate().unwrap());
        for (signer, algorithm) in [(&*EC, "ES256"), (&*RSA_KEY, "RS256"), (&ed, "EdDSA")] {
            check(json!([signer.jwk()]), &signer.token(&json!({"alg": algorithm}), &claims(json!({}))), "ann of https://issuer");
        }
        let pss = with(RSA_KEY.jwk(), &json!({"alg": "PS256"}));
        check(json!([pss]), &RSA_KEY.token(&json!({"alg": "PS256"}), &claims(json!({}))), "ann of https://issuer");
    }

    /// The example of RFC 7515 A.3. It has no audience, which is asked after the signature.
    #[test]
    fn the_standards_own_token_has_a_good_signature() {
        let key = json!({"kty": "EC", "crv": "P-256", "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
            "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"});
        let token = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q";
        let jwt = compile(json!({"providers": [{"issuer": "joe", "audiences": ["web"], "jwks": {"keys": [key]}}]})).unwrap();
        assert_eq!(ask(&jwt, None, &[("authorization", &format!("Bearer {token}"))]), "token_wrong_audience");
        let forged = token.replace("DtEh", "DtEi");
        assert_eq!(ask(&jwt, None, &[("authorization", &format!("Bearer {forged}"))]), "token_bad_signature");
    }

    #[test]
    fn the_header_of_a_token_never_chooses_the_algorithm() {
        let unsigned = |header: Value| format!("{}.{}.", text(header.to_string()), text(claims(json!({})).to_string()));
        for name in ["none", "None", "HS256", "RS256", "ES384", "es256", ""] {
            check(json!([EC.jwk()]), &unsigned(json!({"alg": name})), "token_wrong_algorithm");
        }
        check(json!([EC.jwk()]), &unsigned(json!({})), "token_malformed");
        // A MAC made with the public key as its secret, for a verifier that believes the header.
        let Signer::Rsa(pair) = &*RSA_KEY else { panic!("it is RSA") };
        let message = format!("{}.{}", text(r#"{"alg":"HS256"}"#), text(claims(json!({})).to_string()));
        let secret = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, pair.public_key().as_ref());
        let forged = format!("{message}.{}", text(aws_lc_rs::hmac::sign(&secret, message.as_bytes())));
        check(json!([RSA_KEY.jwk()]), &forged, "token_wrong_algorithm");
        // A signature of the right key, but with a padding that the key is not for.
        let padded = RSA_KEY.token(&json!({"alg": "PS256"}), &claims(json!({})));
        check(json!([RSA_KEY.jwk()]), &padded, "token_wrong_algorithm");
    }

    #[test]
    fn a_key_is_chosen_by_its_name() {
        let other = Signer::ec();
        let keys = json!([with(other.jwk(), &json!({"kid": "old"})), with(EC.jwk(), &json!({"kid": "new"}))]);
        let token = |kid: Value| EC.token(&with(json!({"alg": "ES256"}), &json!({"kid": kid})), &claims(json!({})));
        check(keys.clone(), &token(json!("new")), "ann of https://issuer");
        check(keys.clone(), &token(json!("old")), "token_bad_signature");
        check(keys.clone(), &token(json!("other")), "token_unknown_key");
        check(keys.clone(), &token(json!(7)), "token_malformed");
        check(keys, &good_token(), "ann of https://issuer");
        check(json!([EC.jwk()]), &token(json!("any")), "ann of https://issuer");
    }

    #[test]
    fn a_token_of_another_key_or_a_changed_one_is_refused() {
        let other = Signer::ec().token(&json!({"alg": "ES256"}), &claims(json!({})));
        check(json!([EC.jwk()]), &other, "token_bad_signature");
        let token = good_token();
        let parts: Vec<_> = token.split('.').collect();
        let changed = format!("{}.{}.{}", parts[0], text(claims(json!({"sub": "root"})).to_string()), parts[2]);
        check(json!([EC.jwk()]), &changed, "token_bad_signature");
        check(json!([EC.jwk()]), &format!("{}.{}.", parts[0], parts[1]), "token_bad_signature");
    }

    #[test]
    fn a_key_in_the_tokens_own_header_is_not_looked_at() {
        let other = Signer::ec();
        let header = json!({"alg": "ES256", "jwk": other.jwk(), "jku": "https://evil/keys"});
        check(json!([EC.jwk()]), &other.token(&header, &claims(json!({}))), "token_bad_signature");
        let critical = EC.token(&json!({"alg": "ES256", "crit": ["b64"], "b64": false}), &claims(json!({})));
        check(json!([EC.jwk()]), &critical, "token_unsupported");
    }

    #[test]
    fn a_token_is_good_from_nbf_to_exp_with_leeway() {
        check_claims(json!({"exp": NOW - 59}), "ann of https://issuer");
        check_claims(json!({"exp": NOW - 60}), "token_expired");
        check_claims(json!({"exp": 0}), "token_expired");
        check_claims(json!({"exp": -1}), "token_expired");
        check_claims(json!({"exp": null}), "token_without_expiry");
        check_claims(json!({"exp": "2100-01-01"}), "token_malformed");
        check_claims(json!({"exp": 1e300}), "ann of https://issuer");
        check_claims(json!({"exp": 1_800_000_000.5}), "ann of https://issuer");
        check_claims(json!({"nbf": NOW + 60}), "ann of https://issuer");
        check_claims(json!({"nbf": NOW + 61}), "token_not_yet_valid");
        check_claims(json!({"nbf": "soon"}), "token_malformed");
        let provider = json!([{"issuer": "https://issuer", "audiences": ["web"], "jwks": {"keys": [EC.jwk()]}, "leeway": "0s"}]);
        let strict = compile(json!({"providers": provider})).unwrap();
        let token = EC.token(&json!({"alg": "ES256"}), &claims(json!({"exp": NOW})));
        assert_eq!(ask(&strict, None, &[("authorization", &format!("Bearer {token}"))]), "token_expired");
    }

    #[test]
    fn a_token_for_somebody_else_is_refused() {
        check_claims(json!({"aud": ["other", "api"]}), "ann of https://issuer");
        for audience in [json!("other"), json!(["other"]), json!([]), json!({"web": 1}), json!(7), json!([["web"]]), Value::Null]
        {
            check_claims(json!({"aud": audience}), "token_wrong_audience");
        }
    }

    #[test]
    fn the_issuer_chooses_the_keys() {
        check_claims(json!({"iss": "https://issuer/"}), "token_unknown_issuer");
        check_claims(json!({"iss": null}), "token_unknown_issuer");
        check_claims(json!({"iss": ["https://issuer"]}), "token_unknown_issuer");
        let second = Signer::ec();
        let provider =
            |issuer: &str, key: &Signer| json!({"issuer": issuer, "audiences": ["web"], "jwks": {"keys": [key.jwk()]}});
        let jwt = compile(json!({"providers": [provider("https://issuer", &EC), provider("https://second", &second)]})).unwrap();
        let token = |signer: &Signer, issuer: &str| {
            format!("Bearer {}", signer.token(&json!({"alg": "ES256"}), &claims(json!({"iss": issuer}))))
        };
        assert_eq!(ask(&jwt, None, &[("authorization", &token(&second, "https://second"))]), "ann of https://second");
        assert_eq!(ask(&jwt, None, &[("authorization", &token(&second, "https://issuer"))]), "token_bad_signature");
    }

    #[test]
    fn exactly_one_token_is_looked_for() {
        let required = compile(config(json!([EC.jwk()]), json!({}))).unwrap();
        let optional = compile(config(json!([EC.jwk()]), json!({"tokens": "IfPresent"}))).unwrap();
        let token = good_token();
        let good = format!("bearer   {token} ");
        for (lines, with_required, with_optional) in [
            (vec![], "token_missing", "nobody"),
            (vec![("authorization", "Basic YTpi")], "token_missing", "nobody"),
            (vec![("authorization", "Bearerx")], "token_missing", "nobody"),
            (vec![("authorization", "Bearer")], "token_malformed", "token_malformed"),
            (vec![("authorization", "Bearer a.b")], "token_malformed", "token_malformed"),
            (vec![("authorization", &*good)], "ann of https://issuer", "ann of https://issuer"),
            (vec![("authorization", &*good), ("authorization", &*good)], "token_ambiguous", "token_ambiguous"),
            (vec![("authorization", "Basic YTpi"), ("authorization", &*good)], "token_ambiguous", "token_ambiguous"),
        ] {
            assert_eq!(ask(&required, None, &lines), with_required, "{lines:?}");
            assert_eq!(ask(&optional, None, &lines), with_optional, "{lines:?}");
        }
        let long = format!("Bearer {}", "a".repeat(TOKEN_BYTES_MAX + 1));
        assert_eq!(ask(&optional, None, &[("authorization", &long)]), "token_too_long");
    }

    #[test]
    fn a_token_may_stand_in_a_header_or_in_the_query() {
        let token = good_token();
        let header = compile(config(json!([EC.jwk()]), json!({"from": {"header": "X-Token"}}))).unwrap();
        assert_eq!(ask(&header, None, &[("x-token", &token)]), "ann of https://issuer");
        assert_eq!(ask(&header, None, &[("authorization", &format!("Bearer {token}"))]), "token_missing");
        assert_eq!(ask(&header, None, &[("x-token", &token), ("x-token", &token)]), "token_ambiguous");
        let query = compile(config(json!([EC.jwk()]), json!({"from": {"queryParam": "token"}}))).unwrap();
        assert_eq!(ask(&query, Some(&format!("a=b&token={token}")), &[]), "ann of https://issuer");
        assert_eq!(ask(&query, Some(&format!("token={token}&%74oken={token}")), &[]), "token_ambiguous");
        assert_eq!(ask(&query, None, &[]), "token_missing");
        assert_eq!(ask(&query, Some("token=%ff"), &[]), "token_malformed");
    }

    #[test]
    fn a_verified_token_is_taken_away_unless_it_is_forwarded() {
        let strip = |extra: Value, name: &'static str, value: &str| {
            let jwt = compile(config(json!([EC.jwk()]), extra)).unwrap();
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            jwt.strip(&mut headers);
            headers.is_empty()
        };
        assert!(strip(json!({}), "authorization", "Bearer a"));
        assert!(!strip(json!({"forward": true}), "authorization", "Bearer a"));
        assert!(!strip(json!({"tokens": "IfPresent"}), "authorization", "Basic a"));
        assert!(strip(json!({"from": {"header": "x-token"}}), "x-token", "a"));
        assert!(!strip(json!({"from": {"queryParam": "token"}}), "authorization", "Bearer a"));
    }

    #[test]
    fn an_opaque_connection_brings_no_token() {
        let reason = |jwt: &Jwt| jwt.decide_opaque().map_err(|refused| refused.reason);
        assert_eq!(reason(&compile(config(json!([EC.jwk()]), json!({}))).unwrap()), Err("token_missing"));
        assert_eq!(reason(&compile(config(json!([EC.jwk()]), json!({"tokens": "IfPresent"}))).unwrap()), Ok(()));
        let broken = Jwt::new([Arc::new(JwtPolicy::refuse(RuleName::new("web")))]);
        assert_eq!(reason(&broken), Err("policy_unreadable"));
        assert_eq!(ask(&broken, None, &[("authorization", &format!("Bearer {}", good_token()))]), "policy_unreadable");
    }

    #[test]
    fn of_several_policies_every_one_must_be_fulfilled() {
        let policy = |extra: Value| {
            let config: JwtConfig = serde_json::from_value(config(json!([EC.jwk()]), extra)).unwrap();
            Arc::new(config.compile(RuleName::new("web"), &FieldPath::root(), &mut Problems::default()).unwrap())
        };
        let both = Jwt::new([policy(json!({})), policy(json!({"from": {"header": "x-token"}}))]);
        let token = good_token();
        let bearer = format!("Bearer {token}");
        assert_eq!(ask(&both, None, &[("authorization", &bearer)]), "token_missing");
        assert_eq!(ask(&both, None, &[("authorization", &bearer), ("x-token", &token)]), "ann of https://issuer");
    }

    #[test]
    fn keys_that_are_secret_weak_or_broken_are_refused() {
        let point = EC.jwk();
        for key in [
            json!({"kty": "oct", "k": "c2VjcmV0"}),
            with(EC.jwk(), &json!({"d": "AAAA"})),
            with(EC.jwk(), &json!({"x": point["y"], "y": point["x"]})),
            with(EC.jwk(), &json!({"x": "AAAA"})),
            with(EC.jwk(), &json!({"x": "not base64!"})),
            with(EC.jwk(), &json!({"kid": 7})),
            json!({"kty": "RSA", "n": text([0xff; 128]), "e": "AQAB"}),
            json!({"kty": "OKP", "crv": "Ed25519", "x": "AAAA"}),
            json!({}),
        ] {
            assert!(compile(config(json!([key, EC.jwk()]), json!({}))).is_err(), "{key}");
        }
        // These are for something else. They are left out, and a set of nothing else is refused.
        for key in [
            with(EC.jwk(), &json!({"use": "enc"})),
            with(EC.jwk(), &json!({"key_ops": ["sign"]})),
            with(EC.jwk(), &json!({"alg": "ECDH-ES"})),
            with(EC.jwk(), &json!({"crv": "P-521"})),
            with(RSA_KEY.jwk(), &json!({"alg": "RSA-OAEP"})),
            json!({"kty": "new"}),
        ] {
            assert!(compile(config(json!([key]), json!({}))).is_err(), "{key}");
            check(json!([key, EC.jwk()]), &good_token(), "ann of https://issuer");
        }
        let twice = json!([with(EC.jwk(), &json!({"kid": "a"})), with(Signer::ec().jwk(), &json!({"kid": "a"}))]);
        assert!(compile(config(twice, json!({}))).is_err());
        assert!(compile(config(json!([]), json!({}))).is_err());
    }

    #[test]
    fn what_would_accept_too_much_is_refused() {
        let provider = |extra: Value| {
            let provider = with(json!({"issuer": "a", "audiences": ["web"], "jwks": {"keys": [EC.jwk()]}}), &extra);
            compile(json!({"providers": [provider]}))
        };
        assert!(provider(json!({})).is_ok());
        for extra in [
            json!({"audiences": []}),
            json!({"audiences": [""]}),
            json!({"audiences": null}),
            json!({"issuer": ""}),
            json!({"leeway": "1h"}),
            json!({"jwks": null}),
            json!({"jwks": null, "jwksFile": "keys.json"}),
            json!({"jwksFile": "keys.json"}),
            json!({"algorithm": "none"}),
        ] {
            assert!(provider(extra.clone()).is_err(), "{extra}");
        }
        assert!(compile(json!({"providers": []})).is_err());
        for from in
            [json!({}), json!({"header": "a", "queryParam": "b"}), json!({"header": "Authorization"}), json!({"header": "a b"})]
        {
            assert!(compile(config(json!([EC.jwk()]), json!({"from": from}))).is_err(), "{from}");
        }
        let one = json!({"issuer": "a", "audiences": ["web"], "jwks": {"keys": [EC.jwk()]}});
        assert!(compile(json!({"providers": [one, one]})).is_err());
        let said = provider(json!({"jwks": {"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}})).unwrap_err();
        expect_test::expect![[r#"RequestAuthentication/shop/web: spec.providers[0].jwks.keys[0]: this is a secret key, and everybody who reads this document could make tokens; write public keys of the type RSA, EC (P-256, P-384) or OKP (Ed25519)"#]].assert_eq(&said);
    }

    proptest! {
        #[test]
        fn any_text_is_refused_as_a_token(token in ".*") {
            let jwt = compile(config(json!([EC.jwk()]), json!({}))).unwrap();
            let mut headers = HeaderMap::new();
            if let Ok(value) = http::HeaderValue::from_str(&format!("Bearer {token}")) {
                headers.insert(AUTHORIZATION, value);
            }
            let view = RequestView { method: &Method::GET, authority: "", path: "/", query: Some(&token), headers: &headers };
            prop_assert!(jwt.verify(view, Duration::from_secs(NOW)).is_err());
        }

        #[test]
        fn any_header_and_claims_without_the_key_are_refused(
            algorithm in "(none|HS256|RS256|ES256|EdDSA|.{0,8})",
            expires in any::<f64>(),
            signature in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            let header = json!({"alg": algorithm});
            let token = format!("{}.{}.{}", text(header.to_string()), text(claims(json!({"exp": expires})).to_string()), text(signature));
            let jwt = compile(config(json!([EC.jwk(), RSA_KEY.jwk()]), json!({}))).unwrap();
            let refused = ask(&jwt, None, &[("authorization", &format!("Bearer {token}"))]);
            prop_assert!(refused.starts_with("token_"));
        }

        #[test]
        fn one_changed_byte_is_refused(at in any::<proptest::sample::Index>(), to in "[A-Za-z0-9_.-]") {
            let token = good_token();
            let mut changed = token.clone();
            let at = at.index(token.len());
            changed.replace_range(at..=at, &to);
            prop_assume!(changed != token);
            let jwt = compile(config(json!([EC.jwk()]), json!({}))).unwrap();
            let refused = ask(&jwt, None, &[("authorization", &format!("Bearer {changed}"))]);
            prop_assert!(refused.starts_with("token_"), "{}", refused);
        }
    }
}
