//! The public keys of an issuer, each with the one algorithm that it is used with.
//!
//! Sources: RFC 7517 and 7518. The algorithm belongs to the key: a token's header chooses a key by `kid` and never an
//! algorithm. Only asymmetric keys are taken, so that whoever can verify a token cannot make one.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ParsedPublicKey, VerificationAlgorithm};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::base::problems::{FieldPath, Problems};

/// A JWK Set (RFC 7517 section 5). Members that mean nothing here may be there, as the RFC demands; private ones may not.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub(crate) struct JwksConfig {
    /// The keys.
    pub(crate) keys: Vec<Map<String, Value>>,
}

/// One public key, and the one algorithm that it is used with.
#[derive(Clone, Debug)]
pub(super) struct Key {
    id: Option<Box<str>>,
    algorithm: Algorithm,
    key: DecodingKey,
}

impl JwksConfig {
    /// Reports every fault under `at` and returns the keys only if there is none.
    pub(super) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<Vec<Key>> {
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

/// Did one of the keys sign the message, as the token's header says?
pub(super) fn check_signature(
    keys: &[Key],
    header: &Map<String, Value>,
    message: &str,
    signature: &str,
) -> Result<(), &'static str> {
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
    let mut candidates = keys.iter().filter(by_id).peekable();
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

/// What an RSA key may be used with; the first, where it does not say, as most issuers leave it out.
const RSA: &[Algorithm] =
    &[Algorithm::RS256, Algorithm::RS384, Algorithm::RS512, Algorithm::PS256, Algorithm::PS384, Algorithm::PS512];

/// Members of private and shared keys (RFC 7518 6.2.2, 6.3.2, 6.4.1).
const PRIVATE_MEMBERS: &[&str] = &["d", "p", "q", "dp", "dq", "qi", "oth", "k"];

const KEY_REMEDY: &str = "write public keys of the type RSA, EC (P-256, P-384) or OKP (Ed25519)";

/// 2048 bits, which is what the library verifies with.
const RSA_BYTES_MIN: usize = 256;

/// 8192 bits, which is what the library verifies with.
const RSA_BYTES_MAX: usize = 1024;

/// Keys of one issuer: a token without kid is tried with each.
const KEYS_MAX: usize = 16;
