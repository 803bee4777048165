//! Pods that run although no record describes them (any more): a record was removed behind the mesh's back, or an agent was
//! started with the state of another mesh.
//!
//! Invariant: such a pod stays captured. It gets no certificate and no new sidecar, so it is closed sooner or later, and is
//! never opened: what the kernel knows of it goes when its network namespace has gone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Who they are, by the cookie of their network namespace.
#[derive(Debug, Default)]
pub(crate) struct Undescribed(BTreeMap<u64, Stranger>);

#[derive(Debug)]
struct Stranger {
    who: String,
    /// Of the pod, where it was known once.
    cgroup: Option<PathBuf>,
}

impl Undescribed {
    /// One more: its name or, where nobody knows that, its addresses.
    pub(crate) fn add(&mut self, cookie: u64, who: String, cgroup: Option<PathBuf>) {
        tracing::error!(pod = who, "no record describes this pod, which runs: it stays captured and gets no certificate");
        self.0.insert(cookie, Stranger { who, cgroup });
    }

    /// Those that are described again are left to their records.
    pub(crate) fn retain(&mut self, described: impl Fn(u64) -> bool) {
        self.0.retain(|cookie, _stranger| !described(*cookie));
    }

    pub(crate) fn forget(&mut self, cookie: u64) {
        self.0.remove(&cookie);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those of which it is known that no process runs any more.
    pub(crate) fn ended(&self) -> Vec<u64> {
        let ended = |stranger: &Stranger| stranger.cgroup.as_ref().is_some_and(|cgroup| !is_populated(cgroup));
        self.0.iter().filter(|(_, stranger)| ended(stranger)).map(|(cookie, _)| *cookie).collect()
    }

    /// Each in a sentence, for people.
    pub(crate) fn faults(&self) -> impl Iterator<Item = String> {
        let end = "it stays captured and gets no certificate; end it with `outrigger down`";
        self.0.values().map(move |stranger| format!("{}: it runs and no record describes it: {end}", stranger.who))
    }
}

/// Does any process live in the cgroup or below it? None does in one that is gone.
///
/// Source: the kernel's `Documentation/admin-guide/cgroup-v2.rst`, `cgroup.events`.
pub(crate) fn is_populated(cgroup: &Path) -> bool {
    std::fs::read_to_string(cgroup.join("cgroup.events")).is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
}
