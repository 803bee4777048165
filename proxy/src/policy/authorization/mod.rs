//! Authorization: may this peer make this request?
//!
//! Sources: the truth tables in the tests; Kleene's strong logic of three values; RFC 9110 15.5.4 (403).
//! Deny rules are asked first, then allow rules, then the default. Where there is an allow policy and none of its rules
//! matches, the answer is no. What cannot be known never opens anything: a condition is true, false or unknown, a DENY
//! matches unless its rule is false, an ALLOW only if its rule is true. Unknown are
//!
//! * methods, paths and claims on an opaque connection, which has no request;
//! * methods, paths and claims of what a tunnel by CONNECT carries (RFC 9110 9.3.6), so that a DENY that names one denies the
//!   tunnel; an ALLOW must name that method, and no paths;
//! * principals and namespaces of a peer without identity: otherwise a caller that is denied would come in plaintext;
//! * namespaces of an identity that is no service account;
//! * claims of a request without a token: otherwise a caller that is denied would leave its token at home;
//! * claims that are neither text, number nor truth value, nor a list of them;
//! * a path that fits only as it is written, or only with its escapes decoded (`/a%3Ab` and `/a:b`): one server takes them for
//!   one, another for two.

mod compile;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use http::Method;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use compile::compile_rule;

use super::jwt::Claims;
use super::matcher::StringMatch;
use super::path;
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
    paths: Option<Vec<Path>>,
    ports: Option<Vec<u16>>,
}

#[derive(Clone, Debug)]
struct Path {
    written: StringMatch,
    /// With its escapes decoded, where that is another text.
    decoded: Option<StringMatch>,
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
    act: Act<'a>,
    /// The request's path with its escapes decoded, where that is another text.
    decoded: Option<&'a str>,
    claims: Option<&'a Claims>,
}

/// What a peer is about to do.
#[derive(Clone, Copy)]
enum Act<'a> {
    Request(RequestView<'a>),
    /// To send bytes that are no request.
    Opaque,
    /// To send bytes through a tunnel that a CONNECT asked for. Behind an application that is no forward proxy they may be requests
    /// of any method and path.
    Tunnel,
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

/// The principals of rules that name another trust domain than `own`: no peer of theirs is ever let in, so that they fit
/// nobody. Each with its place under `at`, the policy's spec.
pub(crate) fn foreign_principals<'a>(rules: &'a [RuleConfig], own: &str, at: &FieldPath) -> Vec<(FieldPath, &'a str)> {
    let mut found = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        for (from_index, from) in rule.from.iter().flatten().enumerate() {
            let at = at.field("rules").index(index).field("from").index(from_index).field("principals");
            let principals = from.principals.iter().flatten().enumerate();
            found.extend(
                principals.filter(|(_, text)| is_foreign(text, own)).map(|(index, text)| (at.index(index), text.as_str())),
            );
        }
    }
    found
}

/// Does the pattern fit identities of another trust domain alone?
fn is_foreign(pattern: &str, own: &str) -> bool {
    let Some(rest) = pattern.strip_prefix("spiffe://") else { return false };
    match rest.split_once('/') {
        Some((domain, _)) => domain != own,
        None => rest.strip_suffix('*').is_some_and(|begin| !own.starts_with(begin)),
    }
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
        self.answer(peer, Act::Request(request), claims)
    }

    /// Decides an opaque connection: a DENY that names an HTTP field matches, an ALLOW that names one never does.
    pub(crate) fn decide_opaque(&self, peer: &Peer) -> Verdict {
        self.answer(peer, Act::Opaque, None)
    }

    /// Decides a CONNECT: a DENY that names anything else of HTTP matches, an ALLOW only if it names that method. None: there is no
    /// ALLOW, so nobody asked for tunnels.
    pub(crate) fn decide_tunnel(&self, peer: &Peer) -> Option<Verdict> {
        Some(self.answer(peer, Act::Tunnel, None)).filter(|verdict| matches!(verdict, Verdict::Deny(_)) || !self.allow.is_empty())
    }

    /// Decides for a stream of bytes that began as a request which is not known any more: it is denied where no request of this
    /// peer would be let through.
    pub(crate) fn decide_any(&self, peer: &Peer) -> Verdict {
        self.judge(peer, Act::Opaque, None, (Truth::True, Truth::Unknown))
    }

    /// Does a rule decide about paths? Then a path that servers read differently cannot be decided about.
    pub(crate) fn names_paths(&self) -> bool {
        self.deny.iter().chain(&self.allow).flat_map(|policy| &policy.rules).any(Rule::names_paths)
    }

    fn answer(&self, peer: &Peer, act: Act<'_>, claims: Option<&Claims>) -> Verdict {
        self.judge(peer, act, claims, (Truth::Unknown, Truth::True))
    }

    /// `least` says how true a rule must be that denies, and one that allows.
    fn judge(&self, peer: &Peer, act: Act<'_>, claims: Option<&Claims>, least: (Truth, Truth)) -> Verdict {
        if self.deny.is_empty() && self.allow.is_empty() {
            return self.otherwise.clone();
        }
        let decoded = act.request().and_then(|request| path::decoded(request.path));
        let principal = peer.identity.as_ref().map(SpiffeId::as_str);
        let question = Question { peer, principal, act, decoded: decoded.as_deref(), claims };
        let find = |policies: &[Arc<AuthorizationPolicy>], least| {
            policies.iter().find_map(|policy| policy.find(question, least).cloned())
        };
        let (deny, allow) = least;
        if let Some(rule) = find(&self.deny, deny) {
            return Verdict::Deny(rule);
        }
        find(&self.allow, allow).map_or_else(|| self.otherwise.clone(), Verdict::Allow)
    }
}

impl<'a> Act<'a> {
    fn request(self) -> Option<RequestView<'a>> {
        match self {
            Self::Request(request) => Some(request),
            Self::Opaque | Self::Tunnel => None,
        }
    }
}

impl Rule {
    fn names_paths(&self) -> bool {
        self.to.iter().flatten().any(|asked| asked.paths.is_some())
    }

    fn truth(&self, question: Question<'_>) -> Truth {
        let from = any_of(self.from.as_deref(), |from| from.truth(question));
        let to = match (&self.to, question.act) {
            (None, Act::Tunnel) => Truth::Unknown,
            (to, _) => any_of(to.as_deref(), |to| to.truth(question)),
        };
        self.when.iter().map(|when| when.truth(question)).fold(from.min(to), Truth::min)
    }
}

impl Caller {
    fn truth(&self, question: Question<'_>) -> Truth {
        let namespaces = self.namespaces.as_deref().map_or(Truth::True, |namespaces| {
            let namespace = question.peer.identity.as_ref().and_then(SpiffeId::account).map(|(namespace, _)| namespace);
            text_truth(Some(namespaces), namespace)
        });
        text_truth(self.principals.as_deref(), question.principal).min(namespaces)
    }
}

impl Asked {
    fn truth(&self, question: Question<'_>) -> Truth {
        let methods = match question.act {
            Act::Request(request) => text_truth(self.methods.as_deref(), Some(request.method.as_str())),
            Act::Opaque => text_truth(self.methods.as_deref(), None),
            Act::Tunnel if self.methods.iter().flatten().any(names_connect) => Truth::True,
            Act::Tunnel => Truth::Unknown,
        };
        let paths = any_of(self.paths.as_deref(), |path| path.truth(question));
        let ports = any_of(self.ports.as_deref(), |port| Truth::of(*port == question.peer.port));
        methods.min(paths).min(ports)
    }
}

impl Path {
    fn truth(&self, question: Question<'_>) -> Truth {
        let Some(request) = question.act.request() else { return Truth::Unknown };
        let decoded = self.decoded.as_ref().unwrap_or(&self.written);
        let as_written = Truth::of(self.written.matches(request.path));
        let as_decoded = Truth::of(decoded.matches(question.decoded.unwrap_or(request.path)));
        if as_written == as_decoded { as_written } else { Truth::Unknown }
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

/// A pattern for every method names none.
fn names_connect(pattern: &StringMatch) -> bool {
    matches!(pattern, StringMatch::Exact(method) if **method == *Method::CONNECT.as_str())
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

/// How many policies a refusal names.
const NAMED_MAX: usize = 3;
