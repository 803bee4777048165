//! Tokens that are good, and every way in which one is not.

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
    compiled.map(|policy| Jwt::new([Arc::new(policy)], [])).ok_or_else(|| said.join("\n"))
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
    for audience in [json!("other"), json!(["other"]), json!([]), json!({"web": 1}), json!(7), json!([["web"]]), Value::Null] {
        check_claims(json!({"aud": audience}), "token_wrong_audience");
    }
}

#[test]
fn the_issuer_chooses_the_keys() {
    check_claims(json!({"iss": "https://issuer/"}), "token_unknown_issuer");
    check_claims(json!({"iss": null}), "token_unknown_issuer");
    check_claims(json!({"iss": ["https://issuer"]}), "token_unknown_issuer");
    let second = Signer::ec();
    let provider = |issuer: &str, key: &Signer| json!({"issuer": issuer, "audiences": ["web"], "jwks": {"keys": [key.jwk()]}});
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
    let rest = |extra: Value, query: &str| compile(config(json!([EC.jwk()]), extra)).unwrap().strip_query(query);
    let from = json!({"from": {"queryParam": "token"}});
    assert_eq!(rest(from.clone(), "a=b&token=x&c=%20").as_deref(), Some("a=b&c=%20"));
    assert_eq!(rest(from.clone(), "%74oken=x").as_deref(), Some(""));
    assert_eq!(rest(from.clone(), "token&&a").as_deref(), Some("&a"));
    assert_eq!(rest(from, "a=token&tokens=x"), None);
    assert_eq!(rest(json!({"from": {"queryParam": "token"}, "forward": true}), "token=x"), None);
    assert_eq!(rest(json!({}), "token=x"), None);
}

#[test]
fn an_opaque_connection_brings_no_token() {
    let reason = |jwt: &Jwt| jwt.decide_opaque().map_err(|refused| refused.reason);
    assert_eq!(reason(&compile(config(json!([EC.jwk()]), json!({}))).unwrap()), Err("token_missing"));
    assert_eq!(reason(&compile(config(json!([EC.jwk()]), json!({"tokens": "IfPresent"}))).unwrap()), Ok(()));
    let broken = Jwt::new([Arc::new(JwtPolicy::refuse(RuleName::new("web")))], []);
    assert_eq!(reason(&broken), Err("policy_unreadable"));
    assert_eq!(ask(&broken, None, &[("authorization", &format!("Bearer {}", good_token()))]), "policy_unreadable");
}

#[test]
fn of_several_policies_every_one_must_be_fulfilled() {
    let policy = |extra: Value| {
        let config: JwtConfig = serde_json::from_value(config(json!([EC.jwk()]), extra)).unwrap();
        Arc::new(config.compile(RuleName::new("web"), &FieldPath::root(), &mut Problems::default()).unwrap())
    };
    let both = Jwt::new([policy(json!({})), policy(json!({"from": {"header": "x-token"}}))], []);
    let token = good_token();
    let bearer = format!("Bearer {token}");
    assert_eq!(ask(&both, None, &[("authorization", &bearer)]), "token_missing");
    assert_eq!(ask(&both, None, &[("authorization", &bearer), ("x-token", &token)]), "ann of https://issuer");
}

#[test]
fn a_kept_policy_demands_its_token_and_claims_nothing_beside_others() {
    let policy = |extra: Value| {
        let config: JwtConfig = serde_json::from_value(config(json!([EC.jwk()]), extra)).unwrap();
        Arc::new(config.compile(RuleName::new("web"), &FieldPath::root(), &mut Problems::default()).unwrap())
    };
    let kept = || policy(json!({"from": {"header": "x-token"}}));
    let token = good_token();
    let bearer = format!("Bearer {token}");
    let optional = Jwt::new([policy(json!({"tokens": "IfPresent"}))], [kept()]);
    assert_eq!(ask(&optional, None, &[("authorization", &bearer)]), "token_missing");
    assert_eq!(ask(&optional, None, &[("authorization", &bearer), ("x-token", &token)]), "ann of https://issuer");
    assert_eq!(ask(&optional, None, &[("x-token", &token)]), "nobody");
    // Where nothing else holds it goes on as it was.
    assert_eq!(ask(&Jwt::new([], [kept()]), None, &[("x-token", &token)]), "ann of https://issuer");
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
