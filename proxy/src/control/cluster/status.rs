//! What is said of a document in its status. Pure: what is written, and what is wrong with it, go in.
//!
//! Sources: Gateway API "Route status" (RouteParentStatus: entries of other controllers are left as they are; `PartiallyInvalid`),
//! Kubernetes API conventions ("Typical status properties": a condition's time changes with its status alone, its
//! `observedGeneration` is that of the form that it speaks of). Invariant: what stands there already is not written again.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::base::problems::{Condition, Problem, Severity};
use crate::control::source::kubernetes::written::{CONTROLLER, Written, is_of_ours};

/// What is known of one document.
#[derive(Debug, Default)]
pub(super) struct Known<'a> {
    /// Of the newest form, as it was read.
    pub(super) problems: Vec<&'a Problem>,
    /// Of what is in force, among all else.
    pub(super) of_what_is_in_force: Vec<&'a Problem>,
    /// The newest form is refused, and an earlier one of this generation stands.
    pub(super) last_good: Option<Option<i64>>,
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
            let said = of_parent(written, *index, known).into_iter().chain(overlapping(written, known));
            let conditions: Vec<Value> = said.map(|said| said.condition(before, now)).collect();
            json!({ "parentRef": parent, "controllerName": CONTROLLER, "conditions": conditions })
        })
        .collect();
    if entries == ours {
        return None;
    }
    all.extend(entries);
    Some(json!({ "parents": all }))
}

/// What is said of a route to one of its parents.
fn of_parent<'a>(written: &Written, index: usize, known: &Known<'a>) -> Vec<Said<'a>> {
    let is_refused = known.problems.iter().any(|problem| problem.severity == Severity::Refuses);
    // A refusal is of the whole route, wherever its cause stands.
    let about = |problem: &&&Problem| problem.severity == Severity::Refuses || problem.parent().is_none_or(|of| of == index);
    let of_kind = |kind: &'static str, problems: Vec<&'a Problem>, generation: Option<i64>| {
        let of_kind = problems.iter().filter(about);
        let of_kind = of_kind.filter(|problem| problem.condition().is_some_and(|condition| condition.kind() == kind));
        let mut of_kind = of_kind.peekable();
        let reason = of_kind.peek().and_then(|problem| problem.condition()).map(|condition| condition.reason());
        let status = if reason.is_none() { "True" } else { "False" };
        Said { kind, status, reason: reason.unwrap_or(kind), message: texts(of_kind), generation }
    };
    let newest = written.generation;
    if !is_refused {
        let all: Vec<&Problem> = known.problems.iter().chain(&known.of_what_is_in_force).copied().collect();
        return vec![of_kind("Accepted", all.clone(), newest), of_kind("ResolvedRefs", all, newest)];
    }
    let accepted = of_kind("Accepted", known.problems.clone(), newest);
    let Some(good) = known.last_good else {
        // Nobody looks where it leads.
        let message = "the route is not in force".to_owned();
        return vec![accepted, Said { kind: "ResolvedRefs", status: "Unknown", reason: "Pending", message, generation: newest }];
    };
    let resolved = of_kind("ResolvedRefs", known.of_what_is_in_force.clone(), good);
    if !is_in_part(written.rules, &known.problems) {
        let message = format!("{}; {}", accepted.message, stands(good));
        return vec![Said { message, ..accepted }, resolved];
    }
    // "The message for this condition MUST start with the prefix "Fall Back" and include information about why the current Rule(s)
    // are invalid. To represent this, the "Accepted" condition MUST be set to "True" with the generation of the last known good
    // state of the resource."
    let message = shortened(&format!("Fall Back: {}; {}", accepted.message, stands(good)));
    let reason = accepted.reason;
    vec![
        Said { kind: "Accepted", status: "True", reason: "Accepted", message: String::new(), generation: good },
        resolved,
        Said { kind: "PartiallyInvalid", status: "True", reason, message, generation: newest },
    ]
}

/// Said where there are such matches alone: nobody else knows the condition, nor would miss it. It is of what is in force.
fn overlapping<'a>(written: &Written, known: &Known<'a>) -> Option<Said<'a>> {
    let condition = Condition::OverlappingMatches;
    let all = known.problems.iter().chain(&known.of_what_is_in_force);
    let mut of_it = all.filter(|problem| problem.condition() == Some(condition)).peekable();
    of_it.peek()?;
    let generation = known.last_good.unwrap_or(written.generation);
    Some(Said { kind: condition.kind(), status: "True", reason: condition.reason(), message: texts(of_it), generation })
}

/// Are some of the rules good, and nothing wrong beyond the others?
fn is_in_part(rules: usize, problems: &[&Problem]) -> bool {
    let refusals = problems.iter().filter(|problem| problem.severity == Severity::Refuses);
    let of_rules: Option<BTreeSet<usize>> = refusals
        .map(|problem| {
            let (rule, _) = problem.at.as_str().strip_prefix("spec.rules[")?.split_once(']')?;
            rule.parse().ok()
        })
        .collect();
    of_rules.is_some_and(|bad| bad.len() < rules)
}

fn stands(generation: Option<i64>) -> String {
    let named = generation.map(|generation| format!(", generation {generation},")).unwrap_or_default();
    format!("its last good form{named} stays in force")
}

fn of_own(written: &Written, known: &Known<'_>, now: &str) -> Option<Value> {
    let all = || known.problems.iter().chain(&known.of_what_is_in_force);
    let refusals = || all().filter(|problem| problem.severity == Severity::Refuses);
    let newest = written.generation;
    let accepted = if refusals().next().is_none() {
        let message = texts(all().filter(|problem| problem.severity == Severity::Warns));
        Said { kind: "Accepted", status: "True", reason: "Accepted", message, generation: newest }
    } else {
        let stands = known.last_good.map(|good| format!("; {}", stands(good))).unwrap_or_default();
        let message = texts(refusals()) + &stands;
        Said { kind: "Accepted", status: "False", reason: "Invalid", message, generation: newest }
    };
    let is_resolved = known.without_target.is_empty();
    let resolved = Said {
        kind: "ResolvedRefs",
        status: if is_resolved { "True" } else { "False" },
        reason: if is_resolved { "ResolvedRefs" } else { "TargetNotFound" },
        message: shortened(&known.without_target.join("; ")),
        // Of what is in force.
        generation: known.last_good.unwrap_or(newest),
    };
    let before = Some(&written.status);
    let conditions = [accepted, resolved].map(|said| said.condition(before, now));
    let is_new = conditions.as_slice() != written.status || known.kept != written.kept;
    // In a merge patch null takes a field away.
    let kept = if known.kept.is_empty() { Value::Null } else { json!(known.kept) };
    is_new.then(|| json!({ "conditions": conditions, "kept": kept }))
}

/// One condition, without when it came about.
struct Said<'a> {
    kind: &'a str,
    status: &'a str,
    reason: &'a str,
    message: String,
    /// Of which form it is said.
    generation: Option<i64>,
}

impl Said<'_> {
    fn condition(self, before: Option<&Vec<Value>>, now: &str) -> Value {
        let Self { kind, status, reason, message, generation } = self;
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
    use crate::base::problems::{FieldPath, Problems};

    const NOW: &str = "2026-01-02T00:00:00Z";
    const BEFORE: &str = "2026-01-01T00:00:00Z";

    fn route(status: Vec<Value>) -> Written {
        let parents = Some(vec![(1, json!({ "group": "", "kind": "Service", "name": "web", "port": 80 }))]);
        Written {
            api_version: "v1".to_owned(),
            version: "7".to_owned(),
            generation: Some(3),
            parents,
            rules: 2,
            status,
            kept: Vec::new(),
        }
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

    /// What the one parent is told: each condition with its reason and the form that it speaks of, and the messages.
    fn told(known: &Known<'_>) -> (Vec<String>, Vec<String>) {
        let entry = parents(&wanted(&route(Vec::new()), known, NOW).unwrap()).remove(0);
        let conditions = entry["conditions"].as_array().unwrap();
        let word = |one: &Value, field: &str| one[field].as_str().unwrap().to_owned();
        let said = |one: &Value| {
            format!("{} {} {} of {}", word(one, "type"), word(one, "status"), word(one, "reason"), one["observedGeneration"])
        };
        (conditions.iter().map(said).collect(), conditions.iter().map(|one| word(one, "message")).collect())
    }

    #[test]
    fn of_a_route_that_is_refused_each_condition_speaks_of_the_form_that_it_is_about() {
        let at = FieldPath::root().field("spec");
        let mut newest = Problems::of("HTTPRoute/shop/r");
        newest.refuse(&at.field("rules").index(0).field("matches"), "it is wrong", "correct it");
        newest.refuse(&at.field("rules").index(1).field("matches"), "it is wrong too", "correct it");
        let mut former = Problems::of("HTTPRoute/shop/r");
        former.warn_as(Condition::BackendNotFound, &at.field("rules"), "Service/shop/x does not exist", "create it");
        // A place among the parents of that form.
        former.warn_as(Condition::NoMatchingParent, &at.field("parentRefs").index(1), "no such Service", "make it");
        let (newest, former) = (newest.into_vec(), former.into_vec());
        let mut known = Known { problems: newest.iter().collect(), ..Known::default() };
        let (said, messages) = told(&known);
        assert_eq!(said, ["Accepted False UnsupportedValue of 3", "ResolvedRefs Unknown Pending of 3"]);
        assert!(!messages[0].contains("stays in force"), "{messages:?}");

        (known.of_what_is_in_force, known.last_good) = (former.iter().collect(), Some(Some(2)));
        let (said, messages) = told(&known);
        assert_eq!(said, ["Accepted False UnsupportedValue of 3", "ResolvedRefs False BackendNotFound of 2"]);
        assert!(messages[0].ends_with("; its last good form, generation 2, stays in force"), "{messages:?}");

        // One of the two rules is good: what stands is told as Gateway API has it.
        known.problems.truncate(1);
        let (said, messages) = told(&known);
        assert_eq!(
            said,
            [
                "Accepted True Accepted of 2",
                "ResolvedRefs False BackendNotFound of 2",
                "PartiallyInvalid True UnsupportedValue of 3"
            ]
        );
        assert!(messages[2].starts_with("Fall Back: spec.rules[0].matches: it is wrong (correct it); its last"), "{messages:?}");
    }

    #[test]
    fn matches_that_another_route_has_before_it_are_a_condition_and_the_route_is_accepted() {
        let mut problems = Problems::of("HTTPRoute/shop/r");
        let at = FieldPath::root().field("spec").field("rules").index(1);
        problems.warn_as(
            Condition::OverlappingMatches,
            &at,
            "HTTPRoute/bank/q spec.rules[0] is asked first",
            "keep one of the two",
        );
        let problems = problems.into_vec();
        let in_force = Known { of_what_is_in_force: problems.iter().collect(), ..Known::default() };
        let overlapping = |generation| format!("outrigger.dev/OverlappingMatches True OverlappingMatches of {generation}");
        let (said, messages) = told(&in_force);
        assert_eq!(
            said,
            ["Accepted True Accepted of 3".to_owned(), "ResolvedRefs True ResolvedRefs of 3".to_owned(), overlapping(3)]
        );
        assert_eq!(messages[2], "spec.rules[1]: HTTPRoute/bank/q spec.rules[0] is asked first (keep one of the two)");

        // Of a route whose newest form is refused, it is of the form that stands.
        let mut newest = Problems::of("HTTPRoute/shop/r");
        newest.refuse(&FieldPath::root().field("spec"), "it is wrong", "correct it");
        let newest = newest.into_vec();
        let (said, _) = told(&Known { problems: newest.iter().collect(), last_good: Some(Some(2)), ..in_force });
        assert_eq!(said[2..], [overlapping(2)]);
    }

    #[test]
    fn a_refusal_that_stands_at_one_parent_is_every_parents() {
        let mut problems = Problems::of("HTTPRoute/shop/r");
        problems.refuse(
            &FieldPath::root().field("spec").field("parentRefs").index(0).field("port"),
            "0 is not a port",
            "write one",
        );
        let problems = problems.into_vec();
        let (said, _) = told(&Known { problems: problems.iter().collect(), ..Known::default() });
        assert_eq!(said[0], "Accepted False UnsupportedValue of 3");
    }

    #[test]
    fn a_policy_that_is_refused_says_what_stands_in_its_place() {
        let policy = Written {
            api_version: "v1".to_owned(),
            version: "7".to_owned(),
            generation: Some(3),
            parents: None,
            rules: 0,
            status: Vec::new(),
            kept: Vec::new(),
        };
        let mut problems = Problems::of("AuthorizationPolicy/shop/a");
        problems.refuse(&FieldPath::root().field("spec"), "nothing is asked", "ask something");
        let problems = problems.into_vec();
        let known = Known { problems: problems.iter().collect(), last_good: Some(Some(2)), ..Known::default() };
        let conditions = wanted(&policy, &known, NOW).unwrap()["conditions"].clone();
        assert_eq!((&conditions[0]["observedGeneration"], &conditions[1]["observedGeneration"]), (&json!(3), &json!(2)));
        let told = "spec: nothing is asked (ask something); its last good form, generation 2, stays in force";
        assert_eq!(conditions[0]["message"], told);
    }

    #[test]
    fn what_a_policy_goes_on_covering_is_written_down_and_taken_away() {
        let covers = vec![json!({ "service": "web", "selector": { "app": "old" }, "ports": [80] })];
        let policy = |kept| Written {
            api_version: "v1".to_owned(),
            version: "7".to_owned(),
            generation: Some(1),
            parents: None,
            rules: 0,
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
            rules: 0,
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
        let known = Known { problems: problems.iter().collect(), without_target: missing, ..Known::default() };
        let status = wanted(&policy(conditions), &known, NOW).unwrap();
        assert_eq!(shown(&status), [format!("Accepted False Invalid {NOW}"), format!("ResolvedRefs False TargetNotFound {NOW}")]);
    }
}
