//! Pods that run although no record describes them (any more): a record was removed behind the mesh's back, or an agent was
//! started with the state of another mesh.
//!
//! Invariant: such a pod stays captured. It gets no certificate and no new sidecar, so it is closed sooner or later, and is
//! never opened: what the kernel knows of it goes when its network namespace has gone.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use tracing::warn;

use super::capture::Capture;
use super::kernel::{Kernel, KernelError};
use super::nftables::Nftables;
use super::{Agent, chain, netns, pods};
use crate::base::names::Named;
use crate::model::pod_record::{CGROUPS, NAMESPACES, PodRecord};

/// Who they are, by the cookie of their network namespace.
#[derive(Debug, Default)]
pub(crate) struct Undescribed(BTreeMap<u64, Stranger>);

/// One of them.
#[derive(Clone, Debug)]
pub(crate) struct Stranger {
    /// Its name or, where nobody knows that, its addresses.
    pub(crate) who: String,
    /// Of the pod, where it is known.
    pub(crate) cgroup: Option<PathBuf>,
    /// Stands for its network namespace, where that has a name.
    pub(crate) netns: Option<PathBuf>,
}

impl Undescribed {
    /// One more.
    pub(crate) fn add(&mut self, cookie: u64, stranger: Stranger) {
        let pod = &stranger.who;
        tracing::error!(pod, "no record describes this pod, which runs: it stays captured and gets no certificate");
        self.0.insert(cookie, stranger);
    }

    /// All of them.
    pub(crate) fn all(&self) -> Vec<(u64, Stranger)> {
        self.0.iter().map(|(cookie, stranger)| (*cookie, stranger.clone())).collect()
    }

    /// Those that are described again are left to their records.
    pub(crate) fn retain(&mut self, described: impl Fn(u64) -> bool) {
        self.0.retain(|cookie, _stranger| !described(*cookie));
    }

    pub(crate) fn forget(&mut self, cookie: u64) {
        self.0.remove(&cookie);
    }

    /// The pod with this cookie, if it is one of them.
    pub(crate) fn who(&self, cookie: u64) -> Option<String> {
        self.0.get(&cookie).map(|stranger| stranger.who.clone())
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

/// Finds what a former agent enrolled and nobody describes any more.
pub(super) fn find(agent: &Agent, records: &Path) {
    let found = pods::read(records).map(|found| found.records).unwrap_or_default();
    let described = |cookie: u64| found.iter().any(|record| record.meshed && record.netns_cookie == cookie);
    let strangers = match &agent.capture {
        Capture::Ebpf(kernel) => enrolled(kernel, described).inspect_err(|error| {
            warn!(error = chain(error), "cannot tell which pods are enrolled");
        }),
        Capture::Nftables(nftables) => Ok(captured(nftables, &agent.cgroup_root, described)),
        Capture::Explicit => return,
    };
    for (cookie, stranger) in strangers.into_iter().flatten() {
        agent.undescribed.lock().add(cookie, stranger);
    }
}

/// What the kernel's part knows. What of it is gone was forgotten when that was opened, so all of it runs.
fn enrolled(kernel: &Mutex<Kernel>, described: impl Fn(u64) -> bool) -> Result<Vec<(u64, Stranger)>, KernelError> {
    let mut enrolled = kernel.lock().enrolled()?;
    enrolled.retain(|pod| !described(pod.cookie));
    let strangers = enrolled.into_iter().map(|pod| {
        let addresses = pod.v4.map(IpAddr::from).into_iter().chain(pod.v6.map(IpAddr::from));
        let addresses: Vec<String> = addresses.map(|address| address.to_string()).collect();
        (pod.cookie, Stranger { who: format!("the pod at {}", addresses.join(", ")), cgroup: None, netns: None })
    });
    Ok(strangers.collect())
}

/// Pods with a ruleset of ours. It stands in the pod's namespace and nowhere else; those of local pods have names.
fn captured(nftables: &Nftables, cgroup_root: &Path, described: impl Fn(u64) -> bool) -> Vec<(u64, Stranger)> {
    let (folder, prefix) = NAMESPACES;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(stem) = name.strip_prefix(prefix) else { continue };
        let Some((namespace, pod)) = stem.split_once('.') else { continue };
        let cgroup = cgroup_root.join(CGROUPS).join(stem);
        if !is_populated(&cgroup) {
            continue;
        }
        let adopt = || {
            let netns = File::open(entry.path())?;
            let cookie = netns::cookie(&netns)?;
            if described(cookie) {
                return Ok(None);
            }
            let adopted = nftables.adopt(cookie, &netns, &PodRecord::local_sidecar_cgroup(&cgroup));
            Ok::<_, io::Error>(adopted.map_err(|error| io::Error::other(chain(&error)))?.then_some(cookie))
        };
        match adopt() {
            Ok(Some(cookie)) => {
                let who = Named::new(namespace, pod).to_string();
                found.push((cookie, Stranger { who, cgroup: Some(cgroup), netns: Some(entry.path()) }));
            }
            Ok(None) => {}
            Err(error) => warn!(%error, netns = name, "cannot tell whether a pod runs here without a record"),
        }
    }
    found
}

/// Does any process live in the cgroup or below it? None does in one that is gone.
///
/// Source: the kernel's `Documentation/admin-guide/cgroup-v2.rst`, `cgroup.events`.
pub(crate) fn is_populated(cgroup: &Path) -> bool {
    std::fs::read_to_string(cgroup.join("cgroup.events")).is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
}
