//! How the watches stand: since when the API server gives no news of a kind, and why.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use serde::Serialize;

use super::watched::Watched;
use crate::base::clock::WallClock;

/// How every watch stands.
#[derive(Debug)]
pub(crate) struct Health {
    clock: WallClock,
    watches: Mutex<BTreeMap<Watched, Standing>>,
}

/// How one watch stands.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Standing {
    /// Has it told what there is?
    pub(crate) listed: bool,
    /// Does the API server know the kind?
    pub(crate) absent: bool,
    /// Since when there has been no news, in seconds since 1970-01-01T00:00:00Z, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) silent_since: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) trouble: Option<String>,
}

impl Health {
    /// Nothing is known of any watch.
    pub(crate) fn new(clock: WallClock) -> Self {
        let watches = Watched::all().map(|watched| (watched, Standing::default())).collect();
        Self { clock, watches: Mutex::new(watches) }
    }

    /// How each watch stands, by kind.
    pub(crate) fn standings(&self) -> BTreeMap<&'static str, Standing> {
        self.watches.lock().iter().map(|(watched, standing)| (watched.kind(), standing.clone())).collect()
    }

    /// There is news. Returns whether there was none before.
    pub(super) fn heard(&self, watched: Watched) -> bool {
        let mut watches = self.watches.lock();
        let standing = watches.entry(watched).or_default();
        standing.trouble = None;
        standing.absent = false;
        standing.silent_since.take().is_some()
    }

    /// A whole list was told. Returns whether one was before.
    pub(super) fn listed(&self, watched: Watched) -> bool {
        std::mem::replace(&mut self.watches.lock().entry(watched).or_default().listed, true)
    }

    /// The API server does not know the kind. Returns whether that is new.
    pub(super) fn absent(&self, watched: Watched) -> bool {
        let mut watches = self.watches.lock();
        let standing = watches.entry(watched).or_default();
        let was_absent = std::mem::replace(standing, Standing { listed: true, absent: true, ..Standing::default() }).absent;
        !was_absent
    }

    /// There is no news. Returns whether that is new.
    pub(super) fn silent(&self, watched: Watched, trouble: String) -> bool {
        let now = self.clock.since_epoch().as_secs();
        let mut watches = self.watches.lock();
        let standing = watches.entry(watched).or_default();
        standing.trouble = Some(trouble);
        let is_new = standing.silent_since.is_none();
        standing.silent_since.get_or_insert(now);
        is_new
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::identity::testing::clock;
    use crate::model::Kind;

    #[test]
    fn silence_counts_from_its_first_moment_until_the_next_news() {
        let clock = clock();
        let health = Health::new(clock.clone());
        let (watched, begun) = (Watched::Documents(Kind::Service), clock.since_epoch().as_secs());
        assert!(health.silent(watched, "refused".to_owned()));
        clock.advance(Duration::from_secs(60));
        assert!(!health.silent(watched, "slow".to_owned()), "it is silent already");
        let standing = health.standings()["Service"].clone();
        assert_eq!((standing.silent_since, standing.trouble.as_deref()), (Some(begun), Some("slow")));
        assert!(health.heard(watched) && !health.heard(watched));
        assert_eq!(health.standings()["Service"].silent_since, None);
        assert!(health.absent(watched) && !health.absent(watched), "it is told once that the kind is not known");
    }
}
