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
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::kernel::{Kernel, KernelError, PodEntry, Watch};
use super::ladder::Rung;
use super::pods::{self, Pod};
use super::undescribed::is_populated;
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

/// Enrols a pod with the kernel, then makes it known. `described`: all pods that are. `None`: nobody has shown yet that its namespace is the one described.
pub(super) fn add(agent: &Agent, record: PodRecord, described: &[PodRecord]) -> Result<Option<Arc<Pod>>, NodeError> {
    let id = agent.authority.trust_domain().service_account(&record.account())?;
    if agent.standing.rung == Rung::Explicit && !record.unprotected {
        return Err(NodeError::Unprotected);
    }
    are_own(agent, &record, described)?;
    let Some(watch) = enrol(agent, &record)? else { return Ok(None) };
    if let Watch::Not(reason) = &watch
        && agent.standing.rung == Rung::Ebpf
    {
        warn!(pod = %record.named(), reason, "what gets past the pod's sidecar is not seen");
    }
    let cookie = record.netns_cookie;
    let former = agent.pods.borrow().get(&cookie).map(Arc::clone);
    if former.is_some_and(|former| former.record.sidecar == record.sidecar && former.record.addresses != record.addresses) {
        // An address that it did not have before leads to its listener too.
        let listener = agent.keeper.lock().listeners(cookie).first().map(OwnedFd::try_clone);
        if let Some(listener) = listener.transpose().map_err(place("the pod's listener"))? {
            agent.capture.register_listener(cookie, listener.as_fd())?;
        }
    }
    agent.flows.lock().came(&record);
    let pod = Arc::new(Pod { id, record, watch, svid: watch::Sender::new(None), expelled: CancellationToken::new() });
    agent.pods.send_modify(|pods| {
        pods.insert(cookie, Arc::clone(&pod));
    });
    Ok(Some(pod))
}

/// May this pod have these addresses? What arrives at an address goes by the entries of one pod: a namespace of somebody's own
/// making with the address of a neighbour would decide about the neighbour's connections.
fn are_own(agent: &Agent, record: &PodRecord, described: &[PodRecord]) -> Result<(), NodeError> {
    let Some(kernel) = agent.capture.kernel() else { return Ok(()) };
    if is_foreign(record) {
        expel(&mut kernel.lock(), record)?;
        return Err(NodeError::Foreign);
    }
    let held = held(&kernel.lock(), record)?;
    let holder = |cookie| running(cookie, described).or_else(|| agent.undescribed.lock().who(cookie));
    let held = held.into_iter().find_map(|(address, cookie)| Some((address, holder(cookie)?)));
    held.map_or(Ok(()), |(address, holder)| Err(NodeError::Held { address, holder }))
}

/// It was enrolled before it was known which addresses are the pod's, and none of those that its namespace has is.
pub(super) fn is_foreign(record: &PodRecord) -> bool {
    record.uid.is_some() && record.addresses.is_empty()
}

/// Lets go of a namespace that is not the pod's. What runs in the pod is closed before it would be open, until its sidecar has
/// shown the right one.
fn expel(kernel: &mut Kernel, record: &PodRecord) -> Result<(), KernelError> {
    let closed = record.uid.as_ref().map_or(Ok(()), |uid| kernel.close_pod(uid, &record.cgroup));
    kernel.withdraw(record.netns_cookie)?;
    match closed {
        // What has no cgroup any more has no process.
        Err(_gone) if !record.cgroup.exists() => Ok(()),
        closed => closed,
    }
}

/// Those of its addresses with which another pod is enrolled, each with the cookie of that.
fn held(kernel: &Kernel, record: &PodRecord) -> Result<Vec<(IpAddr, u64)>, KernelError> {
    let holders = record.addresses.iter().map(|address| Ok((*address, kernel.holder(*address)?)));
    let holders: Vec<(IpAddr, Option<u64>)> = holders.collect::<Result<_, _>>()?;
    let of_another = |cookie: &u64| *cookie != record.netns_cookie;
    Ok(holders.into_iter().filter_map(|(address, cookie)| Some((address, cookie.filter(of_another)?))).collect())
}

/// The pod with this cookie, if a process of it runs. An address is given again once a pod has ended.
fn running(cookie: u64, described: &[PodRecord]) -> Option<String> {
    let pod = described.iter().find(|pod| pod.netns_cookie == cookie)?;
    is_populated(&pod.cgroup).then(|| format!("the pod {}", pod.named()))
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
    use super::super::kernel::tests::{Side, Who, World};
    use super::super::pods::tests::record;
    use super::*;

    #[test]
    fn a_pod_holds_its_address_for_as_long_as_a_process_of_it_runs() {
        let cgroup = tempfile::tempdir().unwrap();
        let events = |text: &str| std::fs::write(cgroup.path().join("cgroup.events"), text).unwrap();
        let described = [PodRecord { cgroup: cgroup.path().to_owned(), ..record("web", 7) }];
        events("populated 1\nfrozen 0\n");
        assert_eq!(running(7, &described), Some("the pod shop/web".to_owned()));
        assert_eq!(running(8, &described), None, "of another namespace nobody is described");
        events("populated 0\nfrozen 0\n");
        assert_eq!(running(7, &described), None);
    }

    #[test]
    fn a_namespace_with_a_neighbours_address_is_told_from_the_neighbours_own() {
        let Some(world) = World::new() else { return };
        let mut kernel = world.open();
        let record = |side: &Side| PodRecord { addresses: vec![side.v4.into(), side.v6.into()], ..record("web", side.cookie) };
        let (own, forged) = (record(&world.b), PodRecord { netns_cookie: world.a.cookie, ..record(&world.b) });
        assert_eq!(held(&kernel, &own).unwrap(), []);
        world.b.enrol(&mut kernel);
        assert_eq!(held(&kernel, &own).unwrap(), [], "its own hold nobody up");
        let of_b = [world.b.v4.into(), world.b.v6.into()].map(|address: IpAddr| (address, world.b.cookie));
        assert_eq!(held(&kernel, &forged).unwrap(), of_b);
        kernel.withdraw(world.b.cookie).unwrap();
        assert_eq!(held(&kernel, &forged).unwrap(), []);
    }

    #[test]
    fn a_namespace_without_an_address_of_its_pod_is_let_go_of_and_the_pod_is_closed() {
        let Some(world) = World::new() else { return };
        let mut kernel = world.open();
        let pod = &world.a;
        pod.enrol(&mut kernel);
        let cgroup = pod.cgroup(Who::App).to_owned();
        let record = PodRecord { uid: Some("0a-1".to_owned()), addresses: Vec::new(), cgroup, ..record("web", pod.cookie) };
        assert!(is_foreign(&record) && !is_foreign(&PodRecord { uid: None, ..record.clone() }));
        expel(&mut kernel, &record).unwrap();
        assert!(kernel.find(pod.cookie).unwrap().is_none());
        assert_eq!(kernel.closed_pods().unwrap(), ["0a-1"]);
        kernel.open_pod("0a-1").unwrap();
        // Again, of one that has ended since.
        expel(&mut kernel, &PodRecord { cgroup: "/sys/fs/cgroup/gone".into(), ..record }).unwrap();
        assert!(kernel.closed_pods().unwrap().is_empty());
    }

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
