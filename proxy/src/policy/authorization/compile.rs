//! A rule as it is written, compiled. What says nothing or could never fit is refused: in a DENY it would be a hole.

use super::{Action, Asked, Caller, FromConfig, Path, Rule, RuleConfig, ToConfig, When};
use crate::base::names::check_name;
use crate::base::problems::{FieldPath, Problems};
use crate::identity::spiffe::SpiffeId;
use crate::policy::RuleName;
use crate::policy::matcher::{StringMatch, compile_method};
use crate::policy::path::{Part, check_spelling, check_unambiguous, decoded};

/// Reports every fault of a rule under `at` and returns it only if there is none.
pub(super) fn compile_rule(
    action: Action,
    rule: &RuleConfig,
    name: RuleName,
    at: &FieldPath,
    problems: &mut Problems,
) -> Option<Rule> {
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
            compile_namespace(text, at, problems)
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
        StringMatch::Exact(id) => {
            let id = id.parse::<SpiffeId>().ok().filter(is_a_peers);
            id.map(|id| StringMatch::Exact(id.to_string().into()))
        }
        // A trust domain is in lower case (SPIFFE ID 2.1).
        StringMatch::Prefix(start) => start
            .strip_prefix("spiffe://")
            .is_some_and(|rest| {
                let (domain, path) = rest.split_once('/').map_or((rest, None), |(domain, path)| (domain, Some(path)));
                !domain.bytes().any(|byte| byte.is_ascii_uppercase()) && path.is_none_or(begins_a_peers)
            })
            .then_some(StringMatch::Prefix(start)),
        StringMatch::Suffix(_) | StringMatch::Present | StringMatch::Regex(_) => Some(pattern),
    };
    let Some(pattern) = pattern else {
        problems.refuse(
            at,
            format!("{text:?} is no SPIFFE ID that a peer may have, so that none would ever fit"),
            "write spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/NAME, or spiffe://TRUST-DOMAIN/node/NAME",
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

/// Is it the identity of a service account or of a node agent? No other is ever issued.
fn is_a_peers(id: &SpiffeId) -> bool {
    let account = id.account().is_some_and(|(namespace, name)| check_name(namespace).is_ok() && check_name(name).is_ok());
    account || id.path().strip_prefix("/node/").is_some_and(|node| !node.is_empty() && !node.contains('/'))
}

/// May a path that a peer has begin so? It is without its slash.
fn begins_a_peers(path: &str) -> bool {
    let mut parts = path.split('/');
    let is_known = match (parts.next().unwrap_or_default(), parts.next(), parts.next(), parts.next()) {
        (first, None, ..) => "ns".starts_with(first) || "node".starts_with(first),
        ("node", Some(_), None, _) => true,
        ("ns", Some(namespace), None, _) => is_of_names(namespace),
        ("ns", Some(namespace), Some(third), None) => check_name(namespace).is_ok() && "sa".starts_with(third),
        ("ns", Some(namespace), Some("sa"), Some(name)) => check_name(namespace).is_ok() && is_of_names(name),
        _ => false,
    };
    is_known && parts.next().is_none()
}

/// Can it be a part of a name?
fn is_of_names(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.'))
}

fn compile_namespace(text: &str, at: &FieldPath, problems: &mut Problems) -> Option<StringMatch> {
    let pattern = StringMatch::pattern(text, at, problems)?;
    let good = match &pattern {
        StringMatch::Exact(name) => check_name(name).is_ok(),
        StringMatch::Prefix(part) | StringMatch::Suffix(part) => is_of_names(part),
        StringMatch::Present | StringMatch::Regex(_) => true,
    };
    if !good {
        let remedy = "use lower-case letters, digits and '-', as shop";
        problems.refuse(at, format!("{text:?} is a name that no namespace has"), remedy);
    }
    good.then_some(pattern)
}

fn compile_path(text: &str, at: &FieldPath, problems: &mut Problems) -> Option<Path> {
    let written = StringMatch::pattern(text, at, problems)?;
    let (inner, part, again): (_, _, fn(Box<str>) -> StringMatch) = match &written {
        StringMatch::Exact(path) => (path, Part::Whole, StringMatch::Exact),
        StringMatch::Prefix(path) => (path, Part::Begin, StringMatch::Prefix),
        StringMatch::Suffix(path) => (path, Part::End, StringMatch::Suffix),
        StringMatch::Present | StringMatch::Regex(_) => return Some(Path { written, decoded: None }),
    };
    if inner.contains(['?', '#']) || part != Part::End && !inner.starts_with('/') {
        problems.refuse(at, format!("{text:?} is a path that no request has"), "begin with / and leave out the query");
        return None;
    }
    let good = check_spelling(inner, part, at, problems) && check_unambiguous(inner, part, at, problems);
    let decoded = decoded(inner).map(|text| again(text.into()));
    good.then_some(Path { written, decoded })
}
