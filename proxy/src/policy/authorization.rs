//! Authorization: may this peer make this request?
//!
//! Sources: the truth tables in the tests; Kleene's strong logic of three values; RFC 9110 15.5.4 (403).
//! Deny rules are asked first, then allow rules, then the default. Where there is an allow policy and none of its rules
//! matches, the answer is no. What cannot be known never opens anything: a condition is true, false or unknown, a DENY
//! matches unless its rule is false, an ALLOW only if its rule is true. Unknown are
//!
//! * methods, paths and claims on an opaque connection, which has no request;
//! * principals and namespaces of a peer without identity: otherwise a caller that is denied would come in plaintext;
//! * namespaces of an identity that is no service account;
//! * claims of a request without a token: otherwise a caller that is denied would leave its token at home;
//! * claims that are neither text, number nor truth value, nor a list of them.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::jwt::Claims;
use super::matcher::{StringMatch, compile_method};
use super::{Peer, RequestView, RuleName};
use crate::base::problems::{FieldPath, Problems};
use crate::identity::spiffe::SpiffeId;

/// What a policy does with the requests that its rules match.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub(crate) enum Action {
    /// They are allowed, and what no ALLOW policy of the target matches is refused.
    #[serde(rename = "ALLOW")]
    Allow,
    /// They are refused, whatever an ALLOW policy says.
    #[serde(rename = "DENY")]
    Deny,
}

/// One rule: the peer, the request and the claims must all fit. A rule without any condition matches everything.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct RuleConfig {
    /// Who calls: one of these must fit; anybody when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<Vec<FromConfig>>,
    /// What is asked: one of these must fit; anything when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) to: Option<Vec<ToConfig>>,
    /// What the caller's token claims: all of these must fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) when: Option<Vec<WhenConfig>>,
}

/// A kind of caller. Every field that is there must fit; of a field's values, one.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct FromConfig {
    /// SPIFFE IDs as mutual TLS proved them: `spiffe://TD/ns/NS/sa/SA`, or a pattern `prefix*`, `*suffix`, `*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) principals: Option<Vec<String>>,
    /// Namespaces of service accounts: exact, `prefix*`, `*suffix`, `*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) namespaces: Option<Vec<String>>,
}

/// A kind of request. Every field that is there must fit; of a field's values, one.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ToConfig {
    /// HTTP methods, upper case, or `*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) methods: Option<Vec<String>>,
    /// Paths without query: exact, `prefix*`, `*suffix`, `*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) paths: Option<Vec<String>>,
    /// Ports of the workload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ports: Option<Vec<u16>>,
}

/// A condition on the claims of the accepted token.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct WhenConfig {
    /// The claim's name, as `groups`; of a claim inside an object, as `realm_access.roles`.
    pub(crate) claim: String,
    /// The claim, or one element of it where it is a list, must fit one of these: exact, `prefix*`, `*suffix`, `*`.
    pub(crate) values: Vec<String>,
}

/// One compiled policy.
#[derive(Clone, Debug)]
pub(crate) struct AuthorizationPolicy {
    /// The policy's own name, for what no rule of it decides.
    name: RuleName,
    action: Action,
    rules: Vec<Rule>,
}

/// What is answered where no policy decides.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum DefaultAction {
    #[default]
    Allow,
    Deny,
}

/// The compiled rules that apply to one port of the own workload.
#[derive(Clone, Debug)]
pub(crate) struct Authorization {
    deny: Vec<Arc<AuthorizationPolicy>>,
    allow: Vec<Arc<AuthorizationPolicy>>,
    /// The answer where no rule matches.
    otherwise: Verdict,
}

/// What was decided, and the rule that decided it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    Allow(RuleName),
    Deny(RuleName),
}

/// One compiled rule. `None` is no condition; a list matches if one of its elements does.
#[derive(Clone, Debug)]
struct Rule {
    name: RuleName,
    from: Option<Vec<Caller>>,
    to: Option<Vec<Asked>>,
    when: Vec<When>,
}

#[derive(Clone, Debug)]
struct Caller {
    principals: Option<Vec<StringMatch>>,
    namespaces: Option<Vec<StringMatch>>,
}

#[derive(Clone, Debug)]
struct Asked {
    methods: Option<Vec<StringMatch>>,
    paths: Option<Vec<StringMatch>>,
    ports: Option<Vec<u16>>,
}

#[derive(Clone, Debug)]
struct When {
    claim: Box<str>,
    values: Vec<StringMatch>,
}

/// What a rule is asked about.
#[derive(Clone, Copy)]
struct Question<'a> {
    peer: &'a Peer,
    /// The peer's SPIFFE ID, written out.
    principal: Option<&'a str>,
    /// None on an opaque connection.
    request: Option<RequestView<'a>>,
    claims: Option<&'a Claims>,
}

/// The truth of a condition. The order makes `min` the conjunction and `max` the disjunction.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Truth {
    False,
    Unknown,
    True,
}

/// Compiles a policy: reports every fault under `at`, its spec, and returns it only if there is none. `policy` is the name by
/// which people know it, as `AuthorizationPolicy/shop/allow-web`.
pub(crate) fn compile_rules(
    action: Action,
    rules: &[RuleConfig],
    policy: &str,
    at: &FieldPath,
    problems: &mut Problems,
) -> Option<AuthorizationPolicy> {
    let at = at.field("rules");
    if rules.is_empty() {
        match action {
            Action::Deny => {
                problems.warn(&at, "a DENY policy without rules denies nothing", "write rules: [{}] to deny everything")
            }
            Action::Allow => {
                problems.warn(
                    &at,
                    "an ALLOW policy without rules allows nothing",
                    "write rules, or rules: [{}] to allow everything",
                );
            }
        }
    }
    let compiled: Vec<_> = rules
        .iter()
        .enumerate()
        .filter_map(|(index, rule)| {
            let name = RuleName::new(format!("{policy} rules[{index}]"));
            compile_rule(action, rule, name, &at.index(index), problems)
        })
        .collect();
    // A policy is in force as a whole or not at all: without one rule it would say something else.
    (compiled.len() == rules.len()).then(|| AuthorizationPolicy { name: RuleName::new(policy), action, rules: compiled })
}

impl AuthorizationPolicy {
    /// Stands in for a policy that cannot be read: it denies everything under the policy's name.
    pub(crate) fn refuse(rule: RuleName) -> Self {
        let everything = Rule { name: rule.clone(), from: None, to: None, when: Vec::new() };
        Self { name: rule, action: Action::Deny, rules: vec![everything] }
    }

    /// Is it an ALLOW policy?
    pub(crate) fn allows(&self) -> bool {
        self.action == Action::Allow
    }

    /// The first rule whose truth is at least `least`.
    fn find(&self, question: Question<'_>, least: Truth) -> Option<&RuleName> {
        self.rules.iter().find(|rule| rule.truth(question) >= least).map(|rule| &rule.name)
    }
}

impl Authorization {
    /// All policies of one port. The order of policies with the same action decides only which of them is named.
    pub(crate) fn new(policies: impl IntoIterator<Item = Arc<AuthorizationPolicy>>, default: DefaultAction) -> Self {
        let (allow, deny): (Vec<_>, Vec<_>) = policies.into_iter().partition(|policy| policy.action == Action::Allow);
        let otherwise = match (allow.as_slice(), default) {
            ([], DefaultAction::Allow) => Verdict::Allow(RuleName::new("default_allow")),
            ([], DefaultAction::Deny) => Verdict::Deny(RuleName::new("default_deny")),
            (some, DefaultAction::Allow | DefaultAction::Deny) => Verdict::Deny(no_rule_matched(some)),
        };
        Self { deny, allow, otherwise }
    }

    /// Denies everything, by this rule: for a target whose policy cannot be read.
    pub(crate) fn refuse(rule: RuleName) -> Self {
        Self { deny: Vec::new(), allow: Vec::new(), otherwise: Verdict::Deny(rule) }
    }

    /// Decides a request: deny rules, then allow rules, then the default.
    pub(crate) fn decide(&self, peer: &Peer, request: RequestView<'_>, claims: Option<&Claims>) -> Verdict {
        self.answer(peer, Some(request), claims)
    }

    /// Decides an opaque connection: a DENY that names an HTTP field matches, an ALLOW that names one never does.
    pub(crate) fn decide_opaque(&self, peer: &Peer) -> Verdict {
        self.answer(peer, None, None)
    }

    /// Does a rule decide about paths? Then a path that servers read differently cannot be decided about.
    pub(crate) fn names_paths(&self) -> bool {
        self.deny.iter().chain(&self.allow).flat_map(|policy| &policy.rules).any(Rule::names_paths)
    }

    fn answer(&self, peer: &Peer, request: Option<RequestView<'_>>, claims: Option<&Claims>) -> Verdict {
        if self.deny.is_empty() && self.allow.is_empty() {
            return self.otherwise.clone();
        }
        let principal = peer.identity.as_ref().map(ToString::to_string);
        let question = Question { peer, principal: principal.as_deref(), request, claims };
        let find = |policies: &[Arc<AuthorizationPolicy>], least| {
            policies.iter().find_map(|policy| policy.find(question, least).cloned())
        };
        if let Some(rule) = find(&self.deny, Truth::Unknown) {
            return Verdict::Deny(rule);
        }
        find(&self.allow, Truth::True).map_or_else(|| self.otherwise.clone(), Verdict::Allow)
    }
}

impl Rule {
    fn names_paths(&self) -> bool {
        self.to.iter().flatten().any(|asked| asked.paths.is_some())
    }

    fn truth(&self, question: Question<'_>) -> Truth {
        let from = any_of(self.from.as_deref(), |from| from.truth(question));
        let to = any_of(self.to.as_deref(), |to| to.truth(question));
        self.when.iter().map(|when| when.truth(question)).fold(from.min(to), Truth::min)
    }
}

impl Caller {
    fn truth(&self, question: Question<'_>) -> Truth {
        let namespace = question.peer.identity.as_ref().and_then(SpiffeId::account).map(|(namespace, _)| namespace);
        text_truth(self.principals.as_deref(), question.principal).min(text_truth(self.namespaces.as_deref(), namespace))
    }
}

impl Asked {
    fn truth(&self, question: Question<'_>) -> Truth {
        let methods = text_truth(self.methods.as_deref(), question.request.map(|request| request.method.as_str()));
        let paths = text_truth(self.paths.as_deref(), question.request.map(|request| request.path));
        let ports = any_of(self.ports.as_deref(), |port| Truth::of(*port == question.peer.port));
        methods.min(paths).min(ports)
    }
}

impl When {
    fn truth(&self, question: Question<'_>) -> Truth {
        let Some(claims) = question.claims else { return Truth::Unknown };
        // A token that was verified and lacks the claim is known not to claim it.
        find_claim(&claims.all, &self.claim).map_or(Truth::False, |value| self.value_truth(value))
    }

    fn value_truth(&self, value: &Value) -> Truth {
        match value {
            Value::String(text) => self.text_truth(text),
            Value::Bool(_) | Value::Number(_) => self.text_truth(&value.to_string()),
            Value::Array(list) => list
                .iter()
                .map(|value| match value {
                    // A list inside a list means nothing that a pattern could be about.
                    Value::Array(_) => Truth::Unknown,
                    value => self.value_truth(value),
                })
                .fold(Truth::False, Truth::max),
            Value::Null | Value::Object(_) => Truth::Unknown,
        }
    }

    fn text_truth(&self, text: &str) -> Truth {
        let fits = |text: &str| self.values.iter().any(|value| value.matches(text));
        // RFC 8693 4.2: the claim `scope` is a list of words with spaces between them.
        Truth::of(if *self.claim == *"scope" { text.split(' ').any(fits) } else { fits(text) })
    }
}

impl Truth {
    fn of(fact: bool) -> Self {
        if fact { Self::True } else { Self::False }
    }
}

/// The truth of "one of these fits"; no list is no condition.
fn any_of<T>(list: Option<&[T]>, truth: impl FnMut(&T) -> Truth) -> Truth {
    list.map_or(Truth::True, |list| list.iter().map(truth).fold(Truth::False, Truth::max))
}

/// The truth of "one of these patterns fits the text"; a text that is not there is not known.
fn text_truth(patterns: Option<&[StringMatch]>, text: Option<&str>) -> Truth {
    any_of(patterns, |pattern| text.map_or(Truth::Unknown, |text| Truth::of(pattern.matches(text))))
}

/// A claim by its name. A name that is there as written is meant before dots lead into objects: issuers use names such as
/// `https://example.com/groups`.
fn find_claim<'a>(claims: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    claims.get(name).or_else(|| {
        let mut steps = name.split('.');
        let first = claims.get(steps.next()?)?;
        steps.try_fold(first, |value, step| value.as_object()?.get(step))
    })
}

/// The rule name of "there are allow policies, and none of them allows this".
fn no_rule_matched(allow: &[Arc<AuthorizationPolicy>]) -> RuleName {
    let named: Vec<_> = allow.iter().take(NAMED_MAX).map(|policy| policy.name.as_str()).collect();
    let more = allow.len().saturating_sub(NAMED_MAX);
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    RuleName::new(format!("no_rule_matched: {}{rest}", named.join(", ")))
}

fn compile_rule(action: Action, rule: &RuleConfig, name: RuleName, at: &FieldPath, problems: &mut Problems) -> Option<Rule> {
    let RuleConfig { from, to, when } = rule;
    let from = compile_list(from.as_deref(), &at.field("from"), problems, |from, at, problems| {
        let FromConfig { principals, namespaces } = from;
        if principals.is_none() && namespaces.is_none() {
            problems.refuse(at, "the caller is not described", "write principals or namespaces, or leave from out");
            return None;
        }
        let principals = compile_list(principals.as_deref(), &at.field("principals"), problems, |text, at, problems| {
            compile_principal(action, text, at, problems)
        });
        let namespaces = compile_list(namespaces.as_deref(), &at.field("namespaces"), problems, |text, at, problems| {
            compile_text(text, at, problems)
        });
        Some(Caller { principals: principals?, namespaces: namespaces? })
    });
    let to = compile_list(to.as_deref(), &at.field("to"), problems, |to, at, problems| {
        let ToConfig { methods, paths, ports } = to;
        if methods.is_none() && paths.is_none() && ports.is_none() {
            problems.refuse(at, "the request is not described", "write methods, paths or ports, or leave to out");
            return None;
        }
        let methods = compile_list(methods.as_deref(), &at.field("methods"), problems, |text, at, problems| {
            if text == "*" {
                return Some(StringMatch::Present);
            }
            compile_method(text, at, problems).map(|method| StringMatch::Exact(method.as_str().into()))
        });
        let paths =
            compile_list(paths.as_deref(), &at.field("paths"), problems, |text, at, problems| compile_path(text, at, problems));
        let ports = compile_list(ports.as_deref(), &at.field("ports"), problems, |port, at, problems| {
            if *port == 0 {
                problems.refuse(at, "0 is not a port", "write 1 to 65535");
            }
            (*port != 0).then_some(*port)
        });
        Some(Asked { methods: methods?, paths: paths?, ports: ports? })
    });
    let when = compile_list(when.as_deref(), &at.field("when"), problems, |when, at, problems| {
        let named = !when.claim.is_empty();
        if !named {
            problems.refuse(&at.field("claim"), "the claim has no name", "write the name of a claim, as groups");
        }
        let values = compile_list(Some(&when.values), &at.field("values"), problems, |text, at, problems| {
            compile_text(text, at, problems)
        })??;
        named.then(|| When { claim: when.claim.as_str().into(), values })
    });
    Some(Rule { name, from: from?, to: to?, when: when?.unwrap_or_default() })
}

/// Compiles every element; `None` after a problem, `Some(None)` where there is no list.
fn compile_list<C, T>(
    list: Option<&[C]>,
    at: &FieldPath,
    problems: &mut Problems,
    mut compile: impl FnMut(&C, &FieldPath, &mut Problems) -> Option<T>,
) -> Option<Option<Vec<T>>> {
    let Some(list) = list else { return Some(None) };
    if list.is_empty() {
        // Nobody can tell whether "none of them" or "any of them" is meant, and for DENY and ALLOW either may be a hole.
        problems.refuse(at, "the list is empty", "write at least one value, or leave the field out");
        return None;
    }
    let compiled: Vec<_> = list.iter().enumerate().filter_map(|(index, one)| compile(one, &at.index(index), problems)).collect();
    (compiled.len() == list.len()).then_some(Some(compiled))
}

fn compile_text(text: &str, at: &FieldPath, problems: &mut Problems) -> Option<StringMatch> {
    StringMatch::pattern(text, at, problems)
}

fn compile_principal(action: Action, text: &str, at: &FieldPath, problems: &mut Problems) -> Option<StringMatch> {
    let pattern = StringMatch::pattern(text, at, problems)?;
    let pattern = match pattern {
        // As a peer's own is written out, so that both are one text.
        StringMatch::Exact(id) => id.parse::<SpiffeId>().ok().map(|id| StringMatch::Exact(id.to_string().into())),
        // A trust domain is in lower case (SPIFFE ID 2.1).
        StringMatch::Prefix(start) => start
            .strip_prefix("spiffe://")
            .and_then(|rest| rest.split('/').next())
            .is_some_and(|domain| !domain.bytes().any(|byte| byte.is_ascii_uppercase()))
            .then_some(StringMatch::Prefix(start)),
        StringMatch::Suffix(_) | StringMatch::Present | StringMatch::Regex(_) => Some(pattern),
    };
    let Some(pattern) = pattern else {
        problems.refuse(
            at,
            format!("{text:?} is no SPIFFE ID, so that no peer would ever fit"),
            "write spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/NAME",
        );
        return None;
    };
    let (longer, remedy) = match &pattern {
        StringMatch::Prefix(start) if !start.ends_with('/') => (format!("{start}-other"), "end the prefix with / before the *"),
        StringMatch::Suffix(end) if !end.starts_with('/') => (format!("other-{end}"), "begin the suffix with / after the *"),
        StringMatch::Exact(_)
        | StringMatch::Prefix(_)
        | StringMatch::Suffix(_)
        | StringMatch::Present
        | StringMatch::Regex(_) => {
            return Some(pattern);
        }
    };
    if action == Action::Allow {
        problems.warn(at, format!("{text:?} fits {longer:?} too"), remedy);
    }
    Some(pattern)
}

fn compile_path(text: &str, at: &FieldPath, problems: &mut Problems) -> Option<StringMatch> {
    let pattern = StringMatch::pattern(text, at, problems)?;
    let good = match &pattern {
        StringMatch::Exact(path) | StringMatch::Prefix(path) => path.starts_with('/') && !path.contains(['?', '#']),
        StringMatch::Suffix(path) => !path.contains(['?', '#']),
        StringMatch::Present | StringMatch::Regex(_) => true,
    };
    if !good {
        problems.refuse(at, format!("{text:?} is a path that no request has"), "begin with / and leave out the query");
    }
    good.then_some(pattern)
}

/// How many policies a refusal names.
const NAMED_MAX: usize = 3;

#[cfg(test)]
mod tests {
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
        check(
            &[json!({"action": "DENY", "rules": [{"from": [{"namespaces": ["shop"]}]}]})],
            Some(NODE),
            "GET /",
            "deny p0 rules[0]",
        );
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
            json!({"to": [{"methods": ["get"]}]}),
            json!({"to": [{"paths": ["admin"]}]}),
            json!({"to": [{"paths": ["/admin?x=1"]}]}),
            json!({"to": [{"paths": ["/a*b"]}]}),
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
        expect_test::expect![[
            r#"p: spec.rules[0].to[0].methods[0]: "get" is not a method; write a method in upper case, as GET"#
        ]]
        .assert_eq(&refused(json!({"to": [{"methods": ["get"]}]})));
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
}
