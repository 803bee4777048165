//! Which folders of documents the mesh watches: those that `up` names, or those that it watched before.
//!
//! Pods outlive `up`, and what is allowed to them stands in these folders. An `up` that names none after a crash goes on
//! with the same ones; only `down` forgets them.

use std::io;
use std::path::{Path, PathBuf};

use crate::base::state;

/// What to watch, and what of it is worth a word.
#[derive(Debug, Default, Eq, PartialEq)]
pub(crate) struct Watched {
    pub(crate) folders: Vec<PathBuf>,
    /// Nobody named them this time.
    pub(crate) as_before: bool,
    /// Watched before and not any more: what stands in them is not in force now.
    pub(crate) left: Vec<PathBuf>,
}

/// Decides, and writes down what was decided.
///
/// # Errors
/// The state cannot be read or written.
pub(crate) fn decide(named: &[PathBuf], state: &Path) -> io::Result<Watched> {
    let named: Vec<PathBuf> = named.iter().map(|folder| whole(folder)).collect();
    state::update(&state.join(FILE), 0o600, |before: &mut Vec<PathBuf>| {
        if named.is_empty() {
            return Watched { folders: before.clone(), as_before: true, left: Vec::new() };
        }
        let left = std::mem::replace(before, named.clone()).into_iter().filter(|folder| !named.contains(folder)).collect();
        Watched { folders: named, as_before: false, left }
    })
}

/// Where it is remembered; `down` removes it.
pub(crate) const FILE: &str = "watched.json";

/// A detached supervisor may leave the folder that it was started in, and a link may lead elsewhere one day.
fn whole(folder: &Path) -> PathBuf {
    std::fs::canonicalize(folder).unwrap_or_else(|_gone| folder.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_names_no_folder_goes_on_with_those_of_before() {
        let place = tempfile::tempdir().unwrap();
        let (state, folder) = (place.path(), whole(place.path()).join("mesh"));
        assert_eq!(decide(&[], state).unwrap(), Watched { as_before: true, ..Watched::default() });
        std::fs::create_dir(&folder).unwrap();
        let first = decide(std::slice::from_ref(&folder), state).unwrap();
        assert_eq!(first, Watched { folders: vec![folder.clone()], ..Watched::default() });
        // A folder that has gone meanwhile keeps what was in force, so it stays named.
        std::fs::remove_dir(&folder).unwrap();
        assert_eq!(decide(&[], state).unwrap(), Watched { folders: vec![folder], as_before: true, left: Vec::new() });
    }

    #[test]
    fn who_names_others_is_told_of_those_that_are_left() {
        let state = tempfile::tempdir().unwrap();
        let (one, two) = (PathBuf::from("/nowhere/one"), PathBuf::from("/nowhere/two"));
        decide(&[one.clone(), two.clone()], state.path()).unwrap();
        let now = decide(std::slice::from_ref(&two), state.path()).unwrap();
        assert_eq!(now, Watched { folders: vec![two.clone()], as_before: false, left: vec![one] });
        assert_eq!(decide(&[], state.path()).unwrap().folders, [two]);
    }
}
