//! Where resources come from. A source tells what changed as a batch, and what it could not take.
//!
//! The first batch holds everything that is there: nothing is served before it.

pub(crate) mod documents;
pub(crate) mod file;
mod kept;
pub(crate) mod kubernetes;

use std::fmt;
use std::path::PathBuf;

use super::cluster::last_good::Standing;
use super::cluster::writer::Objects;
use super::world::Change;
use crate::base::problems::{Problem, Severity};
use crate::model::yaml::Position;

/// What a source has to say.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) changes: Vec<Change>,
    /// Everything that the source could not take, now; it replaces what an earlier batch said.
    pub(crate) problems: Vec<Told>,
    /// Of a cluster: the objects whose status is to be written.
    pub(crate) objects: Objects,
    /// Of a cluster: how refused documents stand, where that changed.
    pub(crate) standing: Option<Standing>,
}

/// A problem and the place in a file where it is.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Told {
    pub(crate) path: PathBuf,
    /// None: the file or the folder itself.
    pub(crate) position: Option<Position>,
    /// Its `resource` is empty where it could not be read.
    pub(crate) problem: Problem,
}

impl fmt::Display for Told {
    /// `file:line:column: text`; the remedy is for a line of its own.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.path.display())?;
        if let Some(position) = self.position {
            write!(f, "{position}:")?;
        }
        if self.problem.severity == Severity::Warns {
            write!(f, " warning:")?;
        }
        if !self.problem.resource.is_empty() {
            write!(f, " {}:", self.problem.resource)?;
        }
        let at = self.problem.at.as_str();
        if !at.is_empty() {
            write!(f, " {at}:")?;
        }
        write!(f, " {}", self.problem.text)
    }
}
