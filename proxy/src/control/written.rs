//! The places where one resource is written, the one in force first. Pure.
//!
//! The record of a local pod comes first, then what was applied, then files, then a cluster's objects. Of two files the one that came first stays in
//! force until it goes, whichever name is sorted before: who writes a file displaces nobody's policy by that.

use super::world::{Form, Origin};

/// Never empty but for a moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Places(Vec<(Origin, Form)>);

impl Places {
    /// It is written there, or is written otherwise now.
    pub(super) fn put(&mut self, origin: Origin, form: Form) {
        if let Some((_, known)) = self.0.iter_mut().find(|(place, _)| *place == origin) {
            *known = form;
            return;
        }
        let at = self.0.partition_point(|(place, _)| rank(place) <= rank(&origin));
        self.0.insert(at, (origin, form));
    }

    /// It is not written there any more.
    pub(super) fn remove(&mut self, origin: &Origin) {
        self.0.retain(|(place, _)| place != origin);
    }

    /// The one in force.
    pub(super) fn first(&self) -> Option<(&Origin, &Form)> {
        self.iter().next()
    }

    /// All of them, the one in force first.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Origin, &Form)> {
        self.0.iter().map(|(origin, form)| (origin, form))
    }

    /// Where they are, the one in force first.
    pub(super) fn origins(&self) -> impl Iterator<Item = &Origin> {
        self.0.iter().map(|(origin, _)| origin)
    }

    /// Is it written at more than one place?
    pub(super) fn is_contested(&self) -> bool {
        self.0.len() > 1
    }

    /// Is it written nowhere?
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Who goes before whom.
fn rank(origin: &Origin) -> u8 {
    match origin {
        Origin::Pod(_) => 0,
        Origin::Applied(_) => 1,
        Origin::File(_) => 2,
        Origin::Object(_) => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_files_the_first_that_came_stays_in_force_until_it_goes() {
        let form = |text: &str| Form::Unreadable { body: text.to_owned(), reason: String::new() };
        let [a, m, z] = ["a", "m", "z"].map(|path| Origin::File(path.into()));
        let (applied, pod) = (Origin::Applied("a".into()), Origin::Pod("a".into()));
        let mut places = Places::default();
        for origin in [&m, &z, &a, &applied, &pod] {
            places.put(origin.clone(), form("1"));
        }
        places.put(z.clone(), form("2"));
        assert_eq!(places.origins().collect::<Vec<_>>(), [&pod, &applied, &m, &z, &a]);
        for origin in [&pod, &applied, &m] {
            places.remove(origin);
        }
        assert_eq!(places.first(), Some((&z, &form("2"))));
        // Who comes back waits.
        places.put(m.clone(), form("3"));
        assert!(places.first().is_some_and(|(origin, _)| *origin == z) && places.is_contested() && !places.is_empty());
    }
}
