//! What is said, step by step, as text for people and as JSON for programs.

use serde_json::{Value, json};

use super::super::table::fold;

/// What is said, step by step.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) steps: Vec<Step>,
    pub(super) refused: bool,
}

#[derive(Debug)]
pub(super) struct Step {
    what: &'static str,
    says: String,
    /// The rule that decided, where one did.
    rule: Option<String>,
    /// The endpoint that it is about, where it is about one.
    endpoint: Option<String>,
}

impl Told {
    pub(super) fn say(&mut self, what: &'static str, says: impl Into<String>, rule: Option<String>) {
        self.steps.push(Step { what, says: says.into(), rule, endpoint: None });
    }

    pub(super) fn refuse(&mut self, what: &'static str, says: impl Into<String>, rule: Option<String>) {
        self.say(what, says, rule);
        self.refused = true;
    }

    /// What was said from this step on is about one endpoint.
    pub(super) fn about(&mut self, from: usize, endpoint: &str) {
        for step in self.steps.iter_mut().skip(from) {
            step.endpoint = Some(endpoint.to_owned());
        }
    }

    /// A line for each step, or several where it is wider than `width`.
    pub(super) fn text(&self, width: Option<usize>) -> String {
        let lines = self.steps.iter().map(|Step { what, says, rule, endpoint }| {
            let indent = if endpoint.is_some() && *what != "endpoint" { "  " } else { "" };
            let rule = rule.as_ref().map(|rule| format!("  [{rule}]")).unwrap_or_default();
            fold(&format!("{:<15} {says}{rule}", format!("{indent}{what}")), width, INDENT)
        });
        let outcome = if self.refused { "refused" } else { "let in" };
        format!("{}{:<15} {outcome}\n", lines.collect::<String>(), "outcome")
    }

    pub(super) fn json(&self) -> Value {
        let steps = self
            .steps
            .iter()
            .map(|Step { what, says, rule, endpoint }| json!({ "step": what, "says": says, "rule": rule, "endpoint": endpoint }));
        json!({ "allowed": !self.refused, "steps": steps.collect::<Vec<_>>() })
    }
}

/// Where what is said begins.
const INDENT: usize = 16;
