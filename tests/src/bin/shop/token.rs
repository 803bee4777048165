//! Signed tokens (RFC 7519) with ES256 (RFC 7518, section 3.4), made by hand, so that a test does not check the product's
//! library with itself.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value, json};

/// Writes a new key and the key set with its public half.
pub(crate) fn make_keys(folder: &str) -> Result<()> {
    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)?;
    // The point as X9.62 writes it: 4, then x, then y.
    let point = pair.public_key().as_ref();
    let (x, y) = point.get(1..).context("an empty point")?.split_at_checked(32).context("a short point")?;
    let set = json!({ "keys": [{
        "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": "shop",
        "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y),
    }] });
    std::fs::write(Path::new(folder).join("key.pk8"), pair.to_pkcs8v1()?.as_ref())?;
    std::fs::write(Path::new(folder).join("jwks.json"), set.to_string())?;
    Ok(())
}

/// A token that expires in `seconds` (before now if negative).
pub(crate) fn sign(folder: &str, issuer: &str, audience: &str, subject: &str, seconds: i64, claims: &[&str]) -> Result<String> {
    let key = std::fs::read(Path::new(folder).join("key.pk8")).context("no key; run `shop keys FOLDER` first")?;
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key)?;
    let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?;
    let mut all = Map::new();
    all.insert("iss".to_owned(), issuer.into());
    all.insert("aud".to_owned(), audience.into());
    all.insert("sub".to_owned(), subject.into());
    all.insert("iat".to_owned(), (now - 3600).into());
    all.insert("exp".to_owned(), (now + seconds).into());
    for claim in claims {
        let (name, value) = claim.split_once('=').context("a claim is CLAIM=VALUE")?;
        all.insert(name.to_owned(), value.into());
    }
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let header = json!({ "alg": "ES256", "typ": "JWT", "kid": "shop" });
    let signed = format!("{}.{}", encode(&header), encode(&Value::Object(all)));
    let signature = pair.sign(&SystemRandom::new(), signed.as_bytes())?;
    Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
}
