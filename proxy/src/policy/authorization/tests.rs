//! The truth tables: what is known, what is not, and who gets in.

use super::*;
use http::{HeaderMap, Method};
use proptest::prelude::*;
use serde_json::json;
use std::slice;

/// What an AuthorizationPolicy says, without its target.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Config {
    action: Action,
    #[serde(default)]
    rules: Vec<RuleConfig>,
}

fn policy(name: &str, config: Value) -> Result<AuthorizationPolicy, String> {
    let config: Config = serde_json::from_value(config).map_err(|error| error.to_string())?;
    let mut problems = Problems::of(name);
    let compiled = compile_rules(config.action, &config.rules, name, &FieldPath::root().field("spec"), &mut problems);
    let said: Vec<_> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(compiled.is_none(), problems.refused(), "{said:?}");
    compiled.ok_or_else(|| said.join("\n"))
}

fn authorization(policies: &[Value]) -> Authorization {
    let compiled =
        policies.iter().enumerate().map(|(index, config)| Arc::new(policy(&format!("p{index}"), config.clone()).unwrap()));
    Authorization::new(compiled, DefaultAction::Allow)
}

fn peer(identity: Option<&str>) -> Peer {
    Peer { identity: identity.map(|id| id.parse().unwrap()), address: "10.64.0.9:4000".parse().unwrap(), port: 80 }
}

fn claims(all: Value) -> Claims {
    let Value::Object(all) = all else { panic!("claims are an object") };
    Claims { issuer: "https://issuer".into(), all: Arc::new(all) }
}

fn word(verdict: Verdict) -> String {
    match verdict {
        Verdict::Allow(rule) => format!("allow {rule}"),
        Verdict::Deny(rule) => format!("deny {rule}"),
    }
}

fn decide(authorization: &Authorization, identity: Option<&str>, request: &str, token: Option<Value>) -> String {
    let headers = HeaderMap::new();
    let (method, path) = request.split_once(' ').unwrap();
    let method: Method = method.parse().unwrap();
    let view = RequestView { method: &method, authority: "web", path, query: None, headers: &headers };
    word(authorization.decide(&peer(identity), view, token.map(claims).as_ref()))
}

/// What `policies` answer to a request of `identity`.
fn check(policies: &[Value], identity: Option<&str>, request: &str, expected: &str) {
    assert_eq!(decide(&authorization(policies), identity, request, None), expected, "{policies:?} {identity:?} {request}");
}

/// What `policies` answer to an opaque connection of `identity`.
fn check_opaque(policies: &[Value], identity: Option<&str>, expected: &str) {
    assert_eq!(word(authorization(policies).decide_opaque(&peer(identity))), expected, "{policies:?} {identity:?}");
}

/// What a rule on claims answers, as ALLOW and as DENY.
fn check_claim(when: Value, token: Option<Value>, allowed: bool, denied: bool) {
    for (action, matches) in [("ALLOW", allowed), ("DENY", denied)] {
        let rules = authorization(&[json!({"action": action, "rules": [{"when": [when]}]})]);
        let got = decide(&rules, Some(WEB), "GET /", token.clone());
        assert_eq!(got.ends_with("p0 rules[0]"), matches, "{action} {when} {token:?}: {got}");
    }
}

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const EVIL: &str = "spiffe://cluster.local/ns/shop-evil/sa/web";
const NODE: &str = "spiffe://cluster.local/node/a";

#[test]
fn without_policies_the_default_decides() {
    check(&[], Some(WEB), "GET /", "allow default_allow");
    let deny = Authorization::new([], DefaultAction::Deny);
    assert_eq!(decide(&deny, Some(WEB), "GET /", None), "deny default_deny");
    assert_eq!(word(deny.decide_opaque(&peer(Some(WEB)))), "deny default_deny");
}

#[test]
fn deny_goes_before_allow_and_allow_before_the_default() {
    let allow = json!({"action": "ALLOW", "rules": [{}]});
    let deny = json!({"action": "DENY", "rules": [{"to": [{"paths": ["/admin*"]}]}]});
    check(&[allow.clone(), deny.clone()], Some(WEB), "GET /admin/x", "deny p1 rules[0]");
    check(&[allow, deny.clone()], Some(WEB), "GET /", "allow p0 rules[0]");
    check(&[deny], Some(WEB), "GET /", "allow default_allow");
}

#[test]
fn an_allow_policy_refuses_what_it_does_not_match() {
    let allow = json!({"action": "ALLOW", "rules": [{"to": [{"methods": ["GET"]}]}]});
    check(slice::from_ref(&allow), Some(WEB), "GET /", "allow p0 rules[0]");
    check(&[allow], Some(WEB), "POST /", "deny no_rule_matched: p0");
}

#[test]
fn an_allow_policy_without_rules_allows_nothing() {
    check(&[json!({"action": "ALLOW"})], Some(WEB), "GET /", "deny no_rule_matched: p0");
    check_opaque(&[json!({"action": "ALLOW"})], Some(WEB), "deny no_rule_matched: p0");
}

#[test]
fn conditions_of_a_rule_must_all_hold_and_of_a_list_one() {
    let allow = json!({"action": "ALLOW", "rules": [
        {"from": [{"principals": [WEB], "namespaces": ["shop"]}], "to": [{"methods": ["GET", "HEAD"], "ports": [80, 81]}]},
        {"from": [{"namespaces": ["a"]}, {"namespaces": ["shop-*"]}]},
    ]});
    check(slice::from_ref(&allow), Some(WEB), "HEAD /", "allow p0 rules[0]");
    check(slice::from_ref(&allow), Some(WEB), "POST /", "deny no_rule_matched: p0");
    check(slice::from_ref(&allow), Some(EVIL), "POST /", "allow p0 rules[1]");
    let port = json!({"action": "ALLOW", "rules": [{"to": [{"ports": [81]}]}]});
    check(&[port], Some(WEB), "GET /", "deny no_rule_matched: p0");
}

#[test]
fn a_peer_without_identity_fits_no_allow_and_every_deny_that_names_one() {
    for from in [json!({"principals": [WEB]}), json!({"namespaces": ["shop"]}), json!({"principals": ["*"]})] {
        check(&[json!({"action": "ALLOW", "rules": [{"from": [from]}]})], None, "GET /", "deny no_rule_matched: p0");
        check(&[json!({"action": "DENY", "rules": [{"from": [from]}]})], None, "GET /", "deny p0 rules[0]");
    }
    // Another condition that is known to be false settles it.
    let deny = json!({"action": "DENY", "rules": [{"from": [{"principals": [EVIL]}], "to": [{"paths": ["/admin"]}]}]});
    check(slice::from_ref(&deny), None, "GET /", "allow default_allow");
    check(&[deny], None, "GET /admin", "deny p0 rules[0]");
}

#[test]
fn an_identity_that_is_no_service_account_has_no_known_namespace() {
    check(
        &[json!({"action": "ALLOW", "rules": [{"from": [{"namespaces": ["*"]}]}]})],
        Some(NODE),
        "GET /",
        "deny no_rule_matched: p0",
    );
    check(&[json!({"action": "DENY", "rules": [{"from": [{"namespaces": ["shop"]}]}]})], Some(NODE), "GET /", "deny p0 rules[0]");
}

#[test]
fn on_an_opaque_connection_deny_matches_http_fields_and_allow_does_not() {
    for rule in [
        json!({"to": [{"methods": ["GET"]}]}),
        json!({"to": [{"paths": ["/admin"]}]}),
        json!({"to": [{"paths": ["*"], "ports": [80]}]}),
        json!({"when": [{"claim": "sub", "values": ["*"]}]}),
        json!({"from": [{"principals": [WEB]}], "to": [{"paths": ["/x"]}]}),
    ] {
        check_opaque(&[json!({"action": "ALLOW", "rules": [rule]})], Some(WEB), "deny no_rule_matched: p0");
        check_opaque(&[json!({"action": "DENY", "rules": [rule]})], Some(WEB), "deny p0 rules[0]");
    }
    let elsewhere = json!({"to": [{"paths": ["/admin"], "ports": [81]}]});
    check_opaque(&[json!({"action": "DENY", "rules": [elsewhere]})], Some(WEB), "allow default_allow");
    let either = json!({"to": [{"paths": ["/admin"]}, {"ports": [80]}]});
    check_opaque(&[json!({"action": "ALLOW", "rules": [either]})], Some(WEB), "allow p0 rules[0]");
    check_opaque(&[json!({"action": "ALLOW", "rules": [{"from": [{"principals": [WEB]}]}]})], Some(WEB), "allow p0 rules[0]");
}

/// Behind the answer of an application that is no forward proxy, requests of whatever method and path may follow.
#[test]
fn a_tunnel_is_allowed_by_who_names_its_method_and_denied_by_whatever_decides_about_requests() {
    for (to, allowed, denied) in [
        (json!([{"methods": ["CONNECT"]}]), true, true),
        (json!([{"methods": ["GET", "CONNECT"], "ports": [80]}]), true, true),
        (json!([{"methods": ["CONNECT"], "ports": [9]}]), false, false),
        (json!([{"methods": ["*"]}]), false, true),
        (json!([{"methods": ["GET"]}]), false, true),
        (json!([{"paths": ["/a"]}]), false, true),
        (json!([{"paths": ["*"]}]), false, true),
        (json!([{"methods": ["CONNECT"], "paths": ["*"]}]), false, true),
        (json!([{"methods": ["GET"], "ports": [9]}]), false, false),
        (json!([{"ports": [80]}]), false, true),
        (json!([{"ports": [80]}, {"methods": ["CONNECT"]}]), true, true),
    ] {
        let verdict = |policies: &[Value]| authorization(policies).decide_tunnel(&peer(None));
        let allow = verdict(&[json!({"action": "ALLOW", "rules": [{"to": to}]})]);
        // With a rule beside it that allows.
        let deny = verdict(&[
            json!({"action": "ALLOW", "rules": [{"to": [{"methods": ["CONNECT"]}]}]}),
            json!({"action": "DENY", "rules": [{"to": to}]}),
        ]);
        assert_eq!((matches!(allow, Some(Verdict::Allow(_))), matches!(deny, Some(Verdict::Deny(_)))), (allowed, denied), "{to}");
    }
    let everybody = authorization(&[json!({"action": "ALLOW", "rules": [{}]})]);
    assert!(matches!(everybody.decide_tunnel(&peer(None)), Some(Verdict::Deny(_))));
    let others = authorization(&[json!({"action": "DENY", "rules": [{"to": [{"ports": [9]}]}]})]);
    assert_eq!((authorization(&[]).decide_tunnel(&peer(None)), others.decide_tunnel(&peer(None))), (None, None));
}

#[test]
fn it_is_known_whether_a_rule_decides_about_paths() {
    assert!(!authorization(&[]).names_paths());
    assert!(!authorization(&[json!({"action": "ALLOW", "rules": [{"to": [{"methods": ["GET"]}]}]})]).names_paths());
    for action in ["ALLOW", "DENY"] {
        let rules = json!([{}, {"to": [{"ports": [80]}, {"paths": ["/admin"]}]}]);
        assert!(authorization(&[json!({"action": action, "rules": rules})]).names_paths());
    }
}

#[test]
fn claims_are_text_numbers_truth_values_and_lists() {
    let when = |claim: &str, value: &str| json!({"claim": claim, "values": ["nobody", value]});
    check_claim(when("sub", "ann"), Some(json!({"sub": "ann"})), true, true);
    check_claim(when("sub", "ann"), Some(json!({"sub": "bob"})), false, false);
    check_claim(when("sub", "ann"), Some(json!({})), false, false);
    check_claim(when("groups", "adm*"), Some(json!({"groups": ["x", "admin"]})), true, true);
    check_claim(when("groups", "adm*"), Some(json!({"groups": ["x"]})), false, false);
    check_claim(when("level", "3"), Some(json!({"level": 3})), true, true);
    check_claim(when("email_verified", "true"), Some(json!({"email_verified": true})), true, true);
    check_claim(when("scope", "read"), Some(json!({"scope": "write read"})), true, true);
    check_claim(when("sub", "read"), Some(json!({"sub": "write read"})), false, false);
}

#[test]
fn claims_inside_objects_are_found_by_dots_and_names_with_dots_as_they_are() {
    let when = |claim: &str| json!({"claim": claim, "values": ["admin"]});
    check_claim(when("realm.roles"), Some(json!({"realm": {"roles": ["admin"]}})), true, true);
    check_claim(when("realm.roles"), Some(json!({"realm.roles": "admin", "realm": {"roles": []}})), true, true);
    check_claim(when("https://a.b/roles"), Some(json!({"https://a.b/roles": "admin"})), true, true);
    check_claim(when("realm.roles"), Some(json!({"realm": "admin"})), false, false);
}

#[test]
fn a_claim_that_cannot_be_compared_and_a_missing_token_fit_deny_only() {
    let when = json!({"claim": "sub", "values": ["*"]});
    for token in [None, Some(json!({"sub": {}})), Some(json!({"sub": null})), Some(json!({"sub": [["a"]]}))] {
        check_claim(when.clone(), token, false, true);
    }
}

#[test]
fn a_policy_that_cannot_be_read_denies() {
    let refused = Authorization::refuse(RuleName::new("AuthorizationPolicy/shop/broken"));
    assert_eq!(decide(&refused, Some(WEB), "GET /", None), "deny AuthorizationPolicy/shop/broken");
    assert_eq!(word(refused.decide_opaque(&peer(Some(WEB)))), "deny AuthorizationPolicy/shop/broken");
    let all = Arc::new(policy("p0", json!({"action": "ALLOW", "rules": [{}]})).unwrap());
    let broken = Arc::new(AuthorizationPolicy::refuse(RuleName::new("p1")));
    let both = Authorization::new([all, broken], DefaultAction::Allow);
    assert_eq!(decide(&both, Some(WEB), "GET /", None), "deny p1");
}

#[test]
fn what_says_nothing_or_could_never_fit_is_refused() {
    let refused = |rule: Value| policy("p", json!({"action": "DENY", "rules": [rule]})).unwrap_err();
    for rule in [
        json!({"from": []}),
        json!({"from": [{}]}),
        json!({"from": [{"principals": []}]}),
        json!({"from": [{"principals": ["cluster.local/ns/shop/sa/web"]}]}),
        json!({"from": [{"principals": ["cluster.local/*"]}]}),
        json!({"from": [{"principals": ["spiffe://Cluster.local/ns/*"]}]}),
        json!({"from": [{"principals": ["spiffe://Cluster.local/ns/shop/sa/web"]}]}),
        json!({"from": [{"principal": ["x"]}]}),
        json!({"from": [{"principals": ["spiffe://cluster.local/shop/web"]}]}),
        json!({"from": [{"principals": ["spiffe://cluster.local/ns/Shop/sa/web"]}]}),
        json!({"from": [{"principals": ["spiffe://cluster.local/ns/shop"]}]}),
        json!({"from": [{"principals": ["spiffe://cluster.local/shop/*"]}]}),
        json!({"from": [{"principals": ["spiffe://cluster.local/ns/Shop*"]}]}),
        json!({"from": [{"principals": ["spiffe://cluster.local/ns/shop/web/*"]}]}),
        json!({"from": [{"namespaces": ["Shop"]}]}),
        json!({"from": [{"namespaces": ["shop/*"]}]}),
        json!({"to": [{"methods": ["get"]}]}),
        json!({"to": [{"paths": ["admin"]}]}),
        json!({"to": [{"paths": ["/admin?x=1"]}]}),
        json!({"to": [{"paths": ["/a*b"]}]}),
        json!({"to": [{"paths": ["/m%c3%bc"]}]}),
        json!({"to": [{"paths": ["/a b*"]}]}),
        json!({"to": [{"paths": ["/ü"]}]}),
        json!({"to": [{"paths": ["/c/../d"]}]}),
        json!({"to": [{"paths": ["*/%61x"]}]}),
        json!({"to": [{"paths": ["/a//b"]}]}),
        json!({"to": [{"ports": [0]}]}),
        json!({"when": [{"claim": "", "values": ["x"]}]}),
        json!({"when": [{"claim": "x", "values": []}]}),
        json!({"when": [{"claim": "x"}]}),
        json!({"unless": []}),
    ] {
        let said = refused(rule.clone());
        assert!(!said.is_empty(), "{rule}");
    }
    assert!(policy("p", json!({"rules": [{}]})).is_err(), "an action is never guessed");
    expect_test::expect![[r#"p: spec.rules[0].to[0].methods[0]: "get" is not a method; write a method in upper case, as GET"#]]
        .assert_eq(&refused(json!({"to": [{"methods": ["get"]}]})));
    expect_test::expect![[r#"p: spec.rules[0].to[0].paths[0]: a request's path is never spelt as "/m%c3%bc"; write /m%C3%BC"#]]
        .assert_eq(&refused(json!({"to": [{"paths": ["/m%c3%bc"]}]})));
}

#[test]
fn what_a_peer_may_have_is_taken() {
    for principal in [
        WEB,
        NODE,
        "spiffe://cluster.local/node/*",
        "spiffe://cluster.local/*",
        "spiffe://cluster*",
        "spiffe://cluster.local/n*",
        "spiffe://cluster.local/ns/sh*",
        "spiffe://cluster.local/ns/shop/*",
        "spiffe://cluster.local/ns/shop/sa/we*",
        "*/sa/web",
        "*",
    ] {
        let config = json!({"action": "DENY", "rules": [{"from": [{"principals": [principal]}]}]});
        assert!(policy("p", config).is_ok(), "{principal}");
    }
    for namespace in ["shop", "shop-*", "*-prod", "*", "a.b"] {
        assert!(policy("p", json!({"action": "DENY", "rules": [{"from": [{"namespaces": [namespace]}]}]})).is_ok());
    }
}

#[test]
fn an_open_pattern_of_an_allowed_principal_is_warned_of() {
    let mut problems = Problems::of("p");
    let config: Config = serde_json::from_value(
            json!({"action": "ALLOW", "rules": [{"from": [{"principals": ["spiffe://cluster.local/ns/shop*", "*web", "*/sa/web"]}]}]}),
        )
        .unwrap();
    assert!(compile_rules(config.action, &config.rules, "p", &FieldPath::root(), &mut problems).is_some());
    expect_test::expect![[r#"p: rules[0].from[0].principals[0]: "spiffe://cluster.local/ns/shop*" fits "spiffe://cluster.local/ns/shop-other" too; end the prefix with / before the *"#]]
            .assert_eq(&problems.iter().next().unwrap().to_string());
    let at: Vec<_> = problems.iter().map(|problem| problem.at.as_str()).collect();
    assert_eq!(at, ["rules[0].from[0].principals[0]", "rules[0].from[0].principals[1]"]);
}

#[test]
fn what_is_absent_is_not_written() {
    let config: Config = serde_json::from_value(json!({"action": "ALLOW", "rules": [{}]})).unwrap();
    assert_eq!(serde_json::to_value(&config).unwrap(), json!({"action": "ALLOW", "rules": [{}]}));
}

fn some_rule() -> impl Strategy<Value = Value> {
    let from = prop_oneof![
        Just(json!({})),
        Just(json!({"from": [{"principals": [WEB]}]})),
        Just(json!({"from": [{"namespaces": ["shop"]}, {"principals": [EVIL]}]})),
    ];
    let to = prop_oneof![
        Just(json!({})),
        Just(json!({"to": [{"paths": ["/a"], "methods": ["GET"]}]})),
        Just(json!({"to": [{"ports": [80]}]})),
    ];
    let when = prop_oneof![Just(json!({})), Just(json!({"when": [{"claim": "sub", "values": ["ann"]}]}))];
    (from, to, when).prop_map(|parts| {
        let mut rule = Map::new();
        for part in [parts.0, parts.1, parts.2] {
            rule.extend(part.as_object().cloned().unwrap_or_default());
        }
        Value::Object(rule)
    })
}

proptest! {
    /// To know less about a caller never opens what was closed to it.
    #[test]
    fn to_hide_something_never_helps(
        deny in proptest::collection::vec(some_rule(), 0..3),
        allow in proptest::collection::vec(some_rule(), 0..3),
        identity in prop_oneof![Just(WEB), Just(EVIL)],
        path in prop_oneof![Just("/a"), Just("/b")],
        method in prop_oneof![Just("GET"), Just("POST")],
        subject in prop_oneof![Just("ann"), Just("bob")],
    ) {
        let rules = authorization(&[json!({"action": "DENY", "rules": deny}), json!({"action": "ALLOW", "rules": allow})]);
        let request = format!("{method} {path}");
        let open = decide(&rules, Some(identity), &request, Some(json!({"sub": subject})));
        if open.starts_with("deny") {
            for verdict in [
                decide(&rules, None, &request, Some(json!({"sub": subject}))),
                decide(&rules, Some(identity), &request, None),
                decide(&rules, None, &request, None),
                word(rules.decide_opaque(&peer(Some(identity)))),
                word(rules.decide_opaque(&peer(None))),
            ] {
                prop_assert!(verdict.starts_with("deny"), "{} became {}", open, verdict);
            }
        }
    }
}

#[test]
fn principals_of_another_trust_domain_are_found() {
    let principals =
        [WEB, "spiffe://other.td/ns/shop/sa/me", "spiffe://other.td/*", "spiffe://clus*", "spiffe://oth*", "*/sa/me", "*"];
    let config: Config =
        serde_json::from_value(json!({"action": "DENY", "rules": [{}, {"from": [{"principals": principals}]}]})).unwrap();
    let found = foreign_principals(&config.rules, "cluster.local", &FieldPath::root().field("spec"));
    let found: Vec<_> = found.iter().map(|(at, _)| at.as_str()).collect();
    let at = |index: usize| format!("spec.rules[1].from[0].principals[{index}]");
    assert_eq!(found, [at(1), at(2), at(4)]);
}

#[test]
fn an_escape_that_some_servers_decode_opens_nothing() {
    let by = |action: &str, path: &str| authorization(&[json!({"action": action, "rules": [{"to": [{"paths": [path]}]}]})]);
    for (path, asked, certain) in [
        ("/users:delete", "/users:delete", true),
        ("/users:delete", "/users%3Adelete", false),
        ("/users%3Adelete", "/users:delete", false),
        ("/users%3Adelete", "/users%3Adelete", true),
        ("/a+b*", "/a%2Bb/c", false),
        ("*@me", "/x/%40me", false),
        // What is escaped elsewhere changes nothing.
        ("/users/*", "/users/a%40b", true),
        ("*", "/%3A", true),
    ] {
        let request = format!("GET {asked}");
        let denied = decide(&by("DENY", path), Some(WEB), &request, None);
        assert_eq!(denied, "deny p0 rules[0]", "{path} {asked}");
        let allowed = decide(&by("ALLOW", path), Some(WEB), &request, None);
        assert_eq!(allowed == "allow p0 rules[0]", certain, "{path} {asked}: {allowed}");
    }
    check(&[json!({"action": "DENY", "rules": [{"to": [{"paths": ["/a:b"]}]}]})], Some(WEB), "GET /a%2Fb", "allow default_allow");
}
