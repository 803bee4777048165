//! What is said of a document in its status. Pure: what is written, and what is wrong with it, go in.
//!
//! Sources: Gateway API "Route status" (RouteParentStatus: entries of other controllers are left as they are), Kubernetes API
//! conventions ("Typical status properties": a condition's time changes with its status alone). Invariant: what stands there
//! already is not written again.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::base::problems::{Problem, Severity};
use crate::control::source::kubernetes::written::{CONTROLLER, Written, is_of_ours};

/// What is known of one document.
#[derive(Debug, Default)]
pub(super) struct Known<'a> {
    pub(super) problems: Vec<&'a Problem>,
    /// Services that its targets name and that are not there, with what that means.
    pub(super) without_target: Vec<String>,
    /// What a security policy covers beyond where its Services lead now: the next life of a control plane reads it back.
    pub(super) kept: Vec<Value>,
}

/// The status as it should be; none: it is.
pub(super) fn wanted(written: &Written, known: &Known<'_>, now: &str) -> Option<Value> {
    match &written.parents {
        Some(parents) => of_route(written, parents, known, now),
        None => of_own(written, known, now),
    }
}

fn of_route(written: &Written, parents: &[(usize, Value)], known: &Known<'_>, now: &str) -> Option<Value> {
    let (ours, mut all): (Vec<Value>, Vec<Value>) = written.status.iter().cloned().partition(is_of_ours);
    let entries: Vec<Value> = parents
        .iter()
        .map(|(index, parent)| {
            let before = ours.iter().find(|entry| entry.get("parentRef") == Some(parent));
            let before = before.and_then(|entry| entry.get("conditions")?.as_array());
            let about = |problem: &&&Problem| problem.parent().is_none_or(|of| of == *index);
            let conditions = ["Accepted", "ResolvedRefs"].map(|kind| {
                let of_kind = known.problems.iter().filter(about);
                let of_kind = of_kind.filter(|problem| problem.condition().is_some_and(|condition| condition.kind() == kind));
                let mut of_kind = of_kind.peekable();
                let reason = of_kind.peek().and_then(|problem| problem.condition()).map(|condition| condition.reason());
                let said = Said { kind, is_true: reason.is_none(), reason: reason.unwrap_or(kind), message: texts(of_kind) };
                said.condition(before, written.generation, now)
            });
            json!({ "parentRef": parent, "controllerName": CONTROLLER, "conditions": conditions })
        })
        .collect();
    if entries == ours {
        return None;
    }
    all.extend(entries);
    Some(json!({ "parents": all }))
}

fn of_own(written: &Written, known: &Known<'_>, now: &str) -> Option<Value> {
    let of = |severity| known.problems.iter().filter(move |problem| problem.severity == severity);
    let is_accepted = of(Severity::Refuses).next().is_none();
    let accepted = Said {
        kind: "Accepted",
        is_true: is_accepted,
        reason: if is_accepted { "Accepted" } else { "Invalid" },
        message: if is_accepted { texts(of(Severity::Warns)) } else { texts(of(Severity::Refuses)) },
    };
    let is_resolved = known.without_target.is_empty();
    let resolved = Said {
        kind: "ResolvedRefs",
        is_true: is_resolved,
        reason: if is_resolved { "ResolvedRefs" } else { "TargetNotFound" },
        message: shortened(&known.without_target.join("; ")),
    };
    let before = Some(&written.status);
    let conditions = [accepted, resolved].map(|said| said.condition(before, written.generation, now));
    let is_new = conditions.as_slice() != written.status || known.kept != written.kept;
    // In a merge patch null takes a field away.
    let kept = if known.kept.is_empty() { Value::Null } else { json!(known.kept) };
    is_new.then(|| json!({ "conditions": conditions, "kept": kept }))
}

/// One condition, without when it came about.
struct Said<'a> {
    kind: &'a str,
    is_true: bool,
    reason: &'a str,
    message: String,
}

impl Said<'_> {
    fn condition(self, before: Option<&Vec<Value>>, generation: Option<i64>, now: &str) -> Value {
        let Self { kind, is_true, reason, message } = self;
        let status = if is_true { "True" } else { "False" };
        let of_kind = |condition: &&Value| condition.get("type").is_some_and(|of| of == kind);
        let before = before.into_iter().flatten().find(of_kind);
        let unchanged = before.filter(|condition| condition.get("status").is_some_and(|of| of == status));
        let since = unchanged.and_then(|condition| condition.get("lastTransitionTime")?.as_str()).unwrap_or(now);
        let mut condition = json!({
            "type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": since,
        });
        if let (Some(fields), Some(generation)) = (condition.as_object_mut(), generation) {
            fields.insert("observedGeneration".to_owned(), generation.into());
        }
        condition
    }
}

/// Problems in one line.
fn texts<'a, 'b: 'a>(problems: impl Iterator<Item = &'a &'b Problem>) -> String {
    let mut text = String::new();
    for problem in problems {
        let at = problem.at.as_str();
        let place = if at.is_empty() { String::new() } else { format!("{at}: ") };
        // A String takes whatever is written.
        write!(text, "{}{place}{} ({})", if text.is_empty() { "" } else { "; " }, problem.text, problem.remedy)
            .unwrap_or_default();
    }
    shortened(&text)
}

fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(MESSAGE_MAX).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// Letters of a message; Kubernetes takes 32768.
const MESSAGE_MAX: usize = 2_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::problems::{Condition, FieldPath, Problems};

    const NOW: &str = "2026-01-02T00:00:00Z";
    const BEFORE: &str = "2026-01-01T00:00:00Z";

    fn route(status: Vec<Value>) -> Written {
        let parents = Some(vec![(1, json!({ "group": "", "kind": "Service", "name": "web", "port": 80 }))]);
        Written { api_version: "v1".to_owned(), version: "7".to_owned(), generation: Some(3), parents, status, kept: Vec::new() }
    }

    fn parents(status: &Value) -> Vec<Value> {
        status["parents"].as_array().unwrap().clone()
    }

    fn shown(entry: &Value) -> Vec<String> {
        let conditions = entry["conditions"].as_array().unwrap().iter();
        conditions
            .map(|one| {
                let text = |field: &str| one[field].as_str().unwrap().to_owned();
                format!("{} {} {} {}", text("type"), text("status"), text("reason"), text("lastTransitionTime"))
            })
            .collect()
    }

    #[test]
    fn a_route_is_told_per_parent_and_other_controllers_keep_their_entries() {
        let theirs = json!({ "parentRef": { "name": "edge" }, "controllerName": "example.com/gateway", "conditions": [] });
        let status = wanted(&route(vec![theirs.clone()]), &Known::default(), NOW).unwrap();
        let all = parents(&status);
        assert_eq!((all.len(), &all[0]), (2, &theirs));
        assert_eq!(all[1]["parentRef"]["port"], 80);
        assert_eq!(all[1]["conditions"][0]["observedGeneration"], 3);
        assert_eq!(shown(&all[1]), [format!("Accepted True Accepted {NOW}"), format!("ResolvedRefs True ResolvedRefs {NOW}")]);
        // What stands is not written again.
        assert_eq!(wanted(&route(all.clone()), &Known::default(), "later"), None);
        // Another form of the route is spoken of, and nothing else changed: the time stays.
        let newer = Written { generation: Some(4), ..route(all.clone()) };
        let status = wanted(&newer, &Known::default(), "later").unwrap();
        assert_eq!(shown(&parents(&status)[1])[0], format!("Accepted True Accepted {NOW}"));
        // Without a Service among its parents it is no more of ours.
        let gone = Written { parents: Some(Vec::new()), ..route(all) };
        assert_eq!(wanted(&gone, &Known::default(), NOW), Some(json!({ "parents": [theirs] })));
    }

    #[test]
    fn what_is_wrong_with_a_route_makes_the_condition_false_that_it_is_about() {
        let mut problems = Problems::of("HTTPRoute/shop/r");
        let at = FieldPath::root().field("spec");
        problems.warn_as(Condition::BackendNotFound, &at.field("rules"), "Service shop/x does not exist", "make it");
        // A parent elsewhere in the list has its own entry.
        problems.warn_as(Condition::NoMatchingParent, &at.field("parentRefs").index(0), "no such Service", "make it");
        problems.warn(&at, "something", "else");
        let problems = problems.into_vec();
        let known = Known { problems: problems.iter().collect(), ..Known::default() };
        let entry = parents(&wanted(&route(Vec::new()), &known, NOW).unwrap()).remove(0);
        assert_eq!(shown(&entry), [format!("Accepted True Accepted {NOW}"), format!("ResolvedRefs False BackendNotFound {NOW}")]);
        assert_eq!(entry["conditions"][1]["message"], "spec.rules: Service shop/x does not exist (make it)");
    }

    #[test]
    fn what_a_policy_goes_on_covering_is_written_down_and_taken_away() {
        let covers = vec![json!({ "service": "web", "selector": { "app": "old" }, "ports": [80] })];
        let policy = |kept| Written {
            api_version: "v1".to_owned(),
            version: "7".to_owned(),
            generation: Some(1),
            parents: None,
            status: Vec::new(),
            kept,
        };
        let known = |kept| Known { kept, ..Known::default() };
        let status = wanted(&policy(Vec::new()), &known(covers.clone()), NOW).unwrap();
        assert_eq!(status["kept"], json!(covers));
        let conditions = status["conditions"].as_array().unwrap().clone();
        let stands = Written { status: conditions, ..policy(covers.clone()) };
        assert_eq!(wanted(&stands, &known(covers), NOW), None);
        assert_eq!(wanted(&stands, &known(Vec::new()), NOW).unwrap()["kept"], Value::Null);
    }

    #[test]
    fn a_policy_is_accepted_or_told_why_not() {
        let policy = |status| Written {
            api_version: "v1".to_owned(),
            version: "7".to_owned(),
            generation: Some(1),
            parents: None,
            status,
            kept: Vec::new(),
        };
        let status = wanted(&policy(Vec::new()), &Known::default(), BEFORE).unwrap();
        let conditions = status["conditions"].as_array().unwrap().clone();
        assert_eq!(wanted(&policy(conditions.clone()), &Known::default(), NOW), None);
        let mut problems = Problems::of("AuthorizationPolicy/shop/a");
        problems.refuse(&FieldPath::root().field("spec"), "nothing is asked", "ask something");
        let problems = problems.into_vec();
        let missing = vec!["Service/shop/web does not exist".to_owned()];
        let known = Known { problems: problems.iter().collect(), without_target: missing, kept: Vec::new() };
        let status = wanted(&policy(conditions), &known, NOW).unwrap();
        assert_eq!(shown(&status), [format!("Accepted False Invalid {NOW}"), format!("ResolvedRefs False TargetNotFound {NOW}")]);
    }
}
