//! What a user wrote wrong: which resource, where in it, what is wrong, and what to do about it.

use std::fmt;

/// A place inside a document, as `spec.rules[0].backendRefs[1].name`.
#[derive(Clone, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct FieldPath(String);

impl FieldPath {
    /// The document itself.
    pub(crate) fn root() -> Self {
        Self::default()
    }

    /// The field `name` of this place.
    pub(crate) fn field(&self, name: &str) -> Self {
        Self(if self.0.is_empty() { name.to_owned() } else { format!("{}.{name}", self.0) })
    }

    /// The element `index` of this list.
    pub(crate) fn index(&self, index: usize) -> Self {
        Self(format!("{}[{index}]", self.0))
    }

    /// The path as written.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Does a problem keep its resource out of force?
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Severity {
    /// The resource is refused; its last good form stays in force.
    Refuses,
    /// The resource is in force; what the problem names is not, or not yet.
    Warns,
}

/// What a problem means for the status of a route (Gateway API "Route status"): the condition of its parents that it makes
/// `False` (or, where the condition is of something bad, `True`), and why.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Condition {
    /// `Accepted`: there is no such parent, or it has no such port.
    NoMatchingParent,
    /// `Accepted`: the route says something that is not carried out.
    UnsupportedValue,
    /// `Accepted`: filters of one rule that cannot stand together.
    IncompatibleFilters,
    /// `Accepted`: a route of another kind has the parent.
    Conflicted,
    /// `ResolvedRefs`: what the route leads to is not there.
    BackendNotFound,
    /// `ResolvedRefs`: what the route leads to is of a kind that nothing can be sent to.
    InvalidKind,
    /// `ResolvedRefs`: what the route leads to is in another namespace, which does not grant it.
    RefNotPermitted,
    /// A condition of our own: another route, or an earlier rule, matches the same requests and is asked first.
    OverlappingMatches,
}

impl Condition {
    /// The condition's `type`.
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Self::NoMatchingParent | Self::UnsupportedValue | Self::IncompatibleFilters | Self::Conflicted => "Accepted",
            Self::BackendNotFound | Self::InvalidKind | Self::RefNotPermitted => "ResolvedRefs",
            // Types of an implementation's own bear its domain (Kubernetes API conventions).
            Self::OverlappingMatches => "outrigger.dev/OverlappingMatches",
        }
    }

    /// The condition's `reason`.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::NoMatchingParent => "NoMatchingParent",
            Self::UnsupportedValue => "UnsupportedValue",
            Self::IncompatibleFilters => "IncompatibleFilters",
            Self::Conflicted => "Conflicted",
            Self::BackendNotFound => "BackendNotFound",
            Self::InvalidKind => "InvalidKind",
            Self::RefNotPermitted => "RefNotPermitted",
            Self::OverlappingMatches => "OverlappingMatches",
        }
    }
}

/// One thing that is wrong with one resource.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Problem {
    /// `KIND/NAMESPACE/NAME`, or `KIND/NAME` for a kind without namespace.
    pub(crate) resource: String,
    /// Where in the resource.
    pub(crate) at: FieldPath,
    /// Lower case, no full stop.
    pub(crate) text: String,
    /// What to do about it; lower case, no full stop.
    pub(crate) remedy: String,
    /// Whether the resource is refused for it.
    pub(crate) severity: Severity,
    /// Which condition of a route it is about, where it is written down; see [`Problem::condition`].
    pub(crate) condition: Option<Condition>,
}

impl Problem {
    /// Which condition of a route it is about; none: it is no route's, or a warning that no condition is about. A
    /// refusal that says nothing of its own is about a value that is not carried out.
    pub(crate) fn condition(&self) -> Option<Condition> {
        let is_routes = self.resource.split('/').next().is_some_and(|kind| kind.ends_with("Route"));
        let unsaid = (is_routes && self.severity == Severity::Refuses).then_some(Condition::UnsupportedValue);
        self.condition.or(unsaid)
    }

    /// The place in a route's `parentRefs` of the parent that it is about; none: it is about every parent.
    pub(crate) fn parent(&self) -> Option<usize> {
        let rest = self.at.0.strip_prefix("spec.parentRefs[")?;
        rest.split_once(']')?.0.parse().ok()
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.resource)?;
        if !self.at.0.is_empty() {
            write!(f, "{}: ", self.at)?;
        }
        write!(f, "{}; {}", self.text, self.remedy)
    }
}

/// Collects the problems of one resource, or of several.
#[derive(Debug, Default)]
pub(crate) struct Problems {
    resource: String,
    list: Vec<Problem>,
}

impl Problems {
    /// For problems of `resource` (its key).
    pub(crate) fn of(resource: impl fmt::Display) -> Self {
        Self { resource: resource.to_string(), list: Vec::new() }
    }

    /// The resource is refused.
    pub(crate) fn refuse(&mut self, at: &FieldPath, text: impl Into<String>, remedy: impl Into<String>) {
        self.push(at, text.into(), remedy.into(), Severity::Refuses, None);
    }

    /// The route is refused, and its status says it in these words.
    pub(crate) fn refuse_as(&mut self, condition: Condition, at: &FieldPath, text: impl Into<String>, remedy: impl Into<String>) {
        self.push(at, text.into(), remedy.into(), Severity::Refuses, Some(condition));
    }

    /// The resource is in force all the same.
    pub(crate) fn warn(&mut self, at: &FieldPath, text: impl Into<String>, remedy: impl Into<String>) {
        self.push(at, text.into(), remedy.into(), Severity::Warns, None);
    }

    /// The route is in force all the same, and its status says it in these words.
    pub(crate) fn warn_as(&mut self, condition: Condition, at: &FieldPath, text: impl Into<String>, remedy: impl Into<String>) {
        self.push(at, text.into(), remedy.into(), Severity::Warns, Some(condition));
    }

    /// Takes over the problems of another collection.
    pub(crate) fn append(&mut self, other: Self) {
        self.list.extend(other.list);
    }

    /// Is the resource refused?
    pub(crate) fn refused(&self) -> bool {
        self.list.iter().any(|problem| problem.severity == Severity::Refuses)
    }

    /// In the order in which they were found.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.list.iter()
    }

    /// In the order in which they were found.
    pub(crate) fn into_vec(self) -> Vec<Problem> {
        self.list
    }

    fn push(&mut self, at: &FieldPath, text: String, remedy: String, severity: Severity, condition: Option<Condition>) {
        self.list.push(Problem { resource: self.resource.clone(), at: at.clone(), text, remedy, severity, condition });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_says_which_condition_of_which_parent_is_false_for_it() {
        let mut problems = Problems::of("HTTPRoute/shop/web");
        let spec = FieldPath::root().field("spec");
        problems.refuse(&spec.field("rules").index(0), "it is wrong", "correct it");
        problems.warn(&spec, "it may be wrong", "look at it");
        let parent = spec.field("parentRefs").index(12).field("name");
        problems.warn_as(Condition::NoMatchingParent, &parent, "it is not there", "create it");
        let said: Vec<_> = problems.iter().map(|problem| (problem.condition(), problem.parent())).collect();
        let wanted = [(Some(Condition::UnsupportedValue), None), (None, None), (Some(Condition::NoMatchingParent), Some(12))];
        assert_eq!(said, wanted);
    }
}
