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
        self.push(at, text.into(), remedy.into(), Severity::Refuses);
    }

    /// The resource is in force all the same.
    pub(crate) fn warn(&mut self, at: &FieldPath, text: impl Into<String>, remedy: impl Into<String>) {
        self.push(at, text.into(), remedy.into(), Severity::Warns);
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

    fn push(&mut self, at: &FieldPath, text: String, remedy: String, severity: Severity) {
        self.list.push(Problem { resource: self.resource.clone(), at: at.clone(), text, remedy, severity });
    }
}
