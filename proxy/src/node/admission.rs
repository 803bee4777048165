//! How a pod that is described gets into the kernel: its network namespace is made sure of, its links are found, its programs
//! are attached; and the same again where something of it was taken off.
//!
//! A record says the cookie of the pod's namespace and the file that stands for it, and one that outlived its pod may be wrong
//! about either. That both are one namespace is seen by a socket of the pod's, which whoever makes the pod shows, and every
//! sidecar with its listeners; or by what was attached for that cookie before. So nobody has to enter the namespace, which
//! would take CAP_SYS_ADMIN.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::watch;
use tracing::{debug, warn};

use super::kernel::{PodEntry, Watch};
use super::ladder::Rung;
use super::pods::{self, Pod};
use super::{Agent, NodeError, device, netns, place};
use crate::base::names::Named;
use crate::model::pod_record::PodRecord;

/// Network namespaces of which a socket was seen, by their cookie.
#[derive(Debug, Default)]
pub(crate) struct Namespaces(BTreeMap<u64, Seen>);

#[derive(Debug)]
struct Seen {
    inode: u64,
    /// The namespace itself, where no file stands for it. It lives for as long as this is held.
    held: Option<Arc<File>>,
    /// No pod was described with it at the last look.
    missed: bool,
}

impl Namespaces {
    /// Whether it is news.
    fn meet(&mut self, cookie: u64, inode: u64, held: Option<Arc<File>>) -> bool {
        let before = self.0.remove(&cookie).filter(|before| before.inode == inode);
        let is_news = before.is_none();
        let held = held.or_else(|| before?.held);
        self.0.insert(cookie, Seen { inode, held, missed: false });
        is_news
    }

    fn held(&self, cookie: u64) -> Option<Arc<File>> {
        self.0.get(&cookie)?.held.as_ref().map(Arc::clone)
    }

    pub(super) fn forget(&mut self, cookie: u64) {
        self.0.remove(&cookie);
    }

    fn inode(&self, cookie: u64) -> Option<u64> {
        self.0.get(&cookie).map(|seen| seen.inode)
    }

    /// Forgets those that no pod is described with, at two looks: the records of the first one may have been read before the
    /// pod's was written and its socket seen.
    pub(super) fn keep(&mut self, is_described: impl Fn(u64) -> bool) {
        self.0.retain(|cookie, seen| {
            let missed = !is_described(*cookie);
            let stays = !(missed && seen.missed);
            seen.missed = missed;
            stays
        });
    }
}

/// Takes `socket` for a witness of the namespace of `pod`, if it is from there by what is described. Whether it is news.
pub(super) fn meet(agent: &Agent, pod: &Named, socket: impl AsFd) -> bool {
    let seen = || {
        let netns = netns::of_socket(&socket)?;
        Ok::<_, io::Error>((netns::cookie_of_socket(&socket)?, netns::inode(&netns)?))
    };
    let (cookie, inode) = match seen() {
        Ok(seen) => seen,
        Err(error) => {
            debug!(%pod, %error, "what was shown of a pod's namespace is no socket");
            return false;
        }
    };
    if pods::cookie(&agent.records, pod) != Some(cookie) {
        return false;
    }
    let is_news = agent.namespaces.lock().meet(cookie, inode, None);
    if is_news {
        agent.look.notify_one();
    }
    is_news
}

/// Enrols a pod with the kernel, then makes it known. `None`: nobody has shown yet that its namespace is the one described.
pub(super) fn add(agent: &Agent, record: PodRecord) -> Result<Option<Arc<Pod>>, NodeError> {
    let id = agent.authority.trust_domain().service_account(&record.account())?;
    if agent.standing.rung == Rung::Explicit && !record.unprotected {
        return Err(NodeError::Unprotected);
    }
    let Some(watch) = enrol(agent, &record)? else { return Ok(None) };
    if let Watch::Not(reason) = &watch
        && agent.standing.rung == Rung::Ebpf
    {
        warn!(pod = %record.named(), reason, "what gets past the pod's sidecar is not seen");
    }
    agent.flows.lock().came(&record);
    let cookie = record.netns_cookie;
    let pod = Arc::new(Pod { id, record, watch, svid: watch::Sender::new(None) });
    agent.pods.send_modify(|pods| {
        pods.insert(cookie, Arc::clone(&pod));
    });
    Ok(Some(pod))
}

/// Puts into the kernel what is described of a pod, as far as it is not there. `None`: see [`add`].
pub(super) fn enrol(agent: &Agent, record: &PodRecord) -> Result<Option<Watch>, NodeError> {
    let (cookie, capture) = (record.netns_cookie, record.capture()?);
    let Some(netns) = namespace(agent, record)? else { return Ok(None) };
    let place = || place(record.netns.as_deref().unwrap_or_else(|| Path::new("the pod's network namespace")));
    let met = agent.namespaces.lock().inode(cookie);
    let actual = netns::inode(&netns).map_err(place())?;
    let known = match (met, agent.capture.kernel()) {
        (Some(inode), _) => Some(inode),
        (None, Some(kernel)) => kernel.lock().netns_of(cookie)?,
        // Where rulesets are laid the namespace is entered all the same.
        (None, None) => netns::cookie(&netns).is_ok_and(|found| found == cookie).then_some(actual),
    };
    let Some(known) = known else { return Ok(None) };
    if actual != known {
        let text = format!("it is the namespace {actual}, and the record's cookie {cookie} is that of the namespace {known}");
        return Err(place()(io::Error::other(text)));
    }
    let cgroup = record.sidecar_cgroup();
    let links = device::nodes_ends(&netns).map_err(place())?;
    let entry = PodEntry {
        cookie,
        v4: address_of(record, |address| if let IpAddr::V4(v4) = address { Some(*v4) } else { None }),
        v6: address_of(record, |address| if let IpAddr::V6(v6) = address { Some(*v6) } else { None }),
        sidecar_cgroup: &cgroup,
        netns: netns.as_fd(),
        capture: &capture,
        links: &links,
    };
    agent.capture.enrol(&entry).map(Some)
}

/// Keeps a namespace that a socket of a pod has shown, for a pod that no file stands for the namespace of.
pub(super) fn hold(agent: &Agent, cookie: u64, netns: File) -> io::Result<()> {
    let inode = netns::inode(&netns)?;
    agent.namespaces.lock().meet(cookie, inode, Some(Arc::new(netns)));
    Ok(())
}

/// The network namespace of a pod. `None`: no file stands for it, and no socket has shown it yet.
pub(super) fn namespace(agent: &Agent, record: &PodRecord) -> Result<Option<Arc<File>>, NodeError> {
    match &record.netns {
        Some(path) => Ok(Some(Arc::new(File::open(path).map_err(place(path))?))),
        None => Ok(agent.namespaces.lock().held(record.netns_cookie)),
    }
}

/// The address of one family, if the pod has one.
fn address_of<T>(record: &PodRecord, pick: impl Fn(&IpAddr) -> Option<T>) -> Option<T> {
    record.addresses.iter().find_map(pick)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_is_not_forgotten_by_a_look_that_began_before() {
        let mut namespaces = Namespaces::default();
        assert!(namespaces.meet(7, 40, None) && !namespaces.meet(7, 40, None));
        // This look read the records before the pod's was there.
        namespaces.keep(|_cookie| false);
        assert_eq!(namespaces.inode(7), Some(40));
        namespaces.keep(|cookie| cookie == 7);
        namespaces.keep(|_cookie| false);
        assert!(namespaces.meet(7, 41, None), "another namespace of the cookie");
        namespaces.keep(|_cookie| false);
        namespaces.keep(|_cookie| false);
        assert_eq!(namespaces.inode(7), None);
    }
}
