//! A pod's sidecar asks at the pod's own socket: who that is, is made sure of, and the pod's record is written.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;
use tracing::info;

use super::cgroup::{Container, Folders};
use super::cluster::Cluster;
use super::described::{Described, NotSidecar};
use super::quarantine;
use super::volume::Owner;
use crate::base::clock::WallClock;
use crate::base::names::Named;
use crate::base::state;
use crate::model::capture::CaptureError;
use crate::model::pod_record::PodRecord;
use crate::node::peer::Peer;
use crate::node::pods::{Pod, Pods};
use crate::node::{Agent, addresses, admission, device, netns};

/// Why a caller at a pod's socket is not its sidecar, or its pod is not enrolled.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Refused {
    /// The caller.
    #[error("the caller (pid {pid}) asked for {asked}, and the socket is of the pod {actual}")]
    AnotherName { pid: u32, asked: Named, actual: Named },
    /// The caller: a process of the node, or of another pod.
    #[error("the caller (pid {pid}) runs in cgroup {cgroup}, which is no container of the pod {pod} (UID {uid})")]
    NotOfPod { pid: u32, cgroup: String, pod: Named, uid: String },
    /// The environment.
    #[error("the container's cgroup is not where cgroup2 is mounted here")]
    NoCgroup,
    /// The environment: the API server is away, or does not know the pod.
    #[error("the API server has not said anything of the pod {0}")]
    Unheard(Named),
    /// The caller: another container is the sidecar, and runs.
    #[error("the caller (pid {pid}) is another container than the sidecar of the pod {pod}, which runs")]
    Beside { pid: u32, pod: Named },
    /// The environment: one of them speaks of another pod.
    #[error("the kubelet and the API server do not agree about the pod {0}")]
    Disagree(Named),
    /// The pod's author.
    #[error("the pod {0} is in its node's network, where nothing can be captured for it alone")]
    HostNetwork(Named),
    /// The pod's author, or the caller.
    #[error("{0}")]
    NotSidecar(#[from] NotSidecar),
    /// The pod's author.
    #[error("{0}")]
    Capture(#[from] CaptureError),
    /// The environment.
    #[error("the kernel does not tell about the pod's network namespace: {0}")]
    Kernel(String),
    /// The environment.
    #[error("the pod's network namespace has no address")]
    NoAddress,
    /// The caller: it made a network namespace of its own.
    #[error(
        "the caller (pid {pid}) shows a network namespace that somebody made for himself, not the one that the node made for the pod {pod}"
    )]
    Decoy { pid: u32, pod: Named },
    /// The caller.
    #[error("the caller (pid {pid}) shows the network namespace of the pod {actual}, and the socket is of the pod {pod}")]
    AnotherNetwork { pid: u32, pod: Named, actual: Named },
    /// The caller: it made a network namespace of its own.
    #[error("the caller (pid {pid}) shows a network namespace with {shown:?}, none of which is an address of the pod {pod}")]
    Foreign { pid: u32, shown: Vec<IpAddr>, pod: Named },
    /// The environment.
    #[error("the pod's record cannot be written: {0}")]
    Record(String),
}

impl Refused {
    /// What to do about it.
    pub(crate) fn remedy(&self) -> &'static str {
        match self {
            Self::AnotherName { .. } => "give the sidecar its own pod's namespace and name (the downward API)",
            Self::Beside { .. } => "let no other container mount the sidecar's volume",
            Self::NotOfPod { .. } => "only the pod's own sidecar may ask there",
            Self::NoCgroup => "mount the node's cgroup2 hierarchy at /sys/fs/cgroup of the node agent's container",
            Self::Unheard(_) => {
                "look whether the API server answers and the node agent may list and watch pods; the sidecar asks again"
            }
            Self::Disagree(_) => "delete the pod, so that it is made anew",
            Self::HostNetwork(_) => "take hostNetwork out of the pod, or the label outrigger.dev/inject",
            Self::NotSidecar(_) => "let the injection make the sidecar, and let no other container mount its volume",
            Self::Capture(_) => "correct the annotation, and make the pod anew",
            Self::Kernel(_) => "give the node agent CAP_NET_ADMIN",
            Self::NoAddress => "look whether the network plugin of the node works",
            Self::Foreign { .. } | Self::Decoy { .. } | Self::AnotherNetwork { .. } => "ask from the pod's own network namespace",
            Self::Record(_) => "look whether the node agent's state folder can be written to",
        }
    }
}

/// Who asks, by the kernel's word.
struct Caller {
    pid: u32,
    cookie: u64,
    container: Container,
    folders: Folders,
}

/// Makes sure that who asks is the sidecar of the pod that the socket is of, and that the pod is described to the agent.
/// Returns when the agent has taken that in, or could not.
pub(crate) async fn admit(
    agent: &Agent,
    cluster: &Cluster,
    owner: &Owner,
    (stream, peer): (&UnixStream, &Peer),
    asked: &Named,
) -> Result<(), Refused> {
    let caller = caller(agent, owner, stream, peer)?;
    if *asked != owner.named() {
        return Err(Refused::AnotherName { pid: caller.pid, asked: asked.clone(), actual: owner.named() });
    }
    if agent.pods.borrow().get(&caller.cookie).is_some_and(|pod| is_his(pod, owner, &caller)) {
        // It may have been taken in after who asked first had waited in vain.
        quarantine::let_out(agent, owner);
        return Ok(());
    }
    of_nobody_else(&agent.pods.borrow(), owner, &caller)?;
    let record = match cluster.pod(owner, &caller.container.id).await {
        Some(described) => {
            beside(agent, owner, &caller, &described)?;
            let before = recorded(agent, owner).filter(|before| !is_populated(&before.sidecar_cgroup()));
            let former = before.as_ref().map_or(&[][..], |before| described.former_addresses(before, caller.cookie));
            record(owner, &caller, (&described, former), stream)?
        }
        // An agent that comes back while the API server is away: the same container was made sure of before.
        None => written(agent, owner, &caller).ok_or_else(|| Refused::Unheard(owner.named()))?,
    };
    write(agent, &record).map_err(|error| Refused::Record(error.to_string()))?;
    // Afterwards: of a namespace that nobody is described with the agent lets go.
    let held = netns::of_socket(stream).map(File::from).and_then(|netns| admission::hold(agent, caller.cookie, netns));
    held.map_err(|error| Refused::Kernel(error.to_string()))?;
    info!(pod = %owner.named(), pid = caller.pid, container = caller.container.id, addresses = ?record.addresses, "a sidecar asks for the first time");
    taken_in(agent, owner, &caller).await;
    quarantine::let_out(agent, owner);
    Ok(())
}

/// Waits until the agent knows the pod as it is described now, or has found that it cannot be enrolled. What it is, is told
/// by who asks next.
async fn taken_in(agent: &Agent, owner: &Owner, caller: &Caller) {
    let mut pods = agent.pods.subscribe();
    agent.look.notify_one();
    let settled = async {
        loop {
            let is_known = pods.borrow_and_update().get(&caller.cookie).is_some_and(|pod| is_his(pod, owner, caller));
            let is_refused = agent.unenrolled.lock().get(&owner.named()).is_some_and(|fault| fault.cookie == caller.cookie);
            if is_known || is_refused || pods.changed().await.is_err() {
                return;
            }
        }
    };
    // Who waited in vain is refused by the decision that follows.
    if tokio::time::timeout(TAKEN_IN_WITHIN, settled).await.is_err() {}
}

/// Is this the pod as its present sidecar has it?
fn is_his(pod: &Pod, owner: &Owner, caller: &Caller) -> bool {
    pod.record.uid.as_ref() == Some(&owner.uid) && pod.record.sidecar.as_ref() == Some(&caller.folders.container)
}

fn caller(agent: &Agent, owner: &Owner, stream: &UnixStream, peer: &Peer) -> Result<Caller, Refused> {
    let kernel = |error: io::Error| Refused::Kernel(error.to_string());
    let pid = peer.pid;
    let text = peer.proc_cgroup().unwrap_or_default();
    let container = container(&text, pid, owner)?;
    let folders = container.folders(&agent.cgroup_root).ok_or(Refused::NoCgroup)?;
    Ok(Caller { pid, cookie: netns::cookie_of_socket(stream).map_err(kernel)?, container, folders })
}

/// The container in which the caller runs, which has to be one of the pod.
fn container(proc_cgroup: &str, pid: u32, owner: &Owner) -> Result<Container, Refused> {
    Container::of(proc_cgroup).filter(|container| container.uid == owner.uid).ok_or_else(|| {
        let cgroup = proc_cgroup.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("unknown").to_owned();
        Refused::NotOfPod { pid, cgroup, pod: owner.named(), uid: owner.uid.clone() }
    })
}

/// The pod's record, of what all three say.
fn record(
    owner: &Owner,
    caller: &Caller,
    (described, former): (&Described, &[IpAddr]),
    stream: &UnixStream,
) -> Result<PodRecord, Refused> {
    check(owner, &caller.container, described)?;
    let kernel = |error: io::Error| Refused::Kernel(error.to_string());
    let namespace = netns::of_socket(stream).map(File::from).map_err(kernel)?;
    if !is_the_nodes(&namespace).map_err(kernel)? {
        return Err(Refused::Decoy { pid: caller.pid, pod: owner.named() });
    }
    let shown = addresses::of(&namespace).map_err(kernel)?;
    if shown.is_empty() {
        return Err(Refused::NoAddress);
    }
    let addresses = described.own(&shown, former);
    if addresses.is_empty() {
        return Err(Refused::Foreign { pid: caller.pid, shown, pod: owner.named() });
    }
    let record = PodRecord {
        namespace: owner.namespace.clone(),
        name: owner.name.clone(),
        service_account: owner.service_account.clone(),
        labels: described.labels.clone(),
        annotations: described.capture(),
        // Who makes endpoints of pods hears of their ports from the API server.
        ports: Vec::new(),
        addresses,
        former_addresses: former.to_vec(),
        uid: Some(owner.uid.clone()),
        netns: None,
        netns_cookie: caller.cookie,
        cgroup: caller.folders.pod.clone(),
        sidecar: Some(caller.folders.container.clone()),
        meshed: true,
        unprotected: false,
        terminating: described.terminating,
        hold_ms: u64::try_from(described.hold().as_millis()).unwrap_or(u64::MAX),
        supervisor: 0,
        started_ms: u64::try_from(WallClock::system().since_epoch().as_millis()).unwrap_or(u64::MAX),
    };
    record.capture()?;
    Ok(record)
}

/// Was the namespace made by the node? Who may make namespaces for himself, in a user namespace of his own, has none that leads out. That of a pod
/// with users of its own (`hostUsers: false`) is owned by these, and has a link of the node's.
fn is_the_nodes(netns: &File) -> io::Result<bool> {
    Ok(netns::is_of_own_user_namespace(netns)? || !device::nodes_ends(netns)?.is_empty())
}

/// A socket says where it was made, not who asks by it: one may come from another pod, whose namespace has its own sidecar.
fn of_nobody_else(pods: &Pods, owner: &Owner, caller: &Caller) -> Result<(), Refused> {
    let another = pods.get(&caller.cookie).map(|pod| &pod.record).filter(|record| record.uid.as_ref() != Some(&owner.uid));
    match another.filter(|record| is_populated(&record.cgroup)) {
        Some(record) => Err(Refused::AnotherNetwork { pid: caller.pid, pod: owner.named(), actual: record.named() }),
        None => Ok(()),
    }
}

/// Do the kubelet, the kernel and the API server speak of one pod, and of its sidecar?
fn check(owner: &Owner, container: &Container, described: &Described) -> Result<(), Refused> {
    if described.owner != *owner {
        return Err(Refused::Disagree(owner.named()));
    }
    if described.host_network {
        return Err(Refused::HostNetwork(owner.named()));
    }
    Ok(described.check_sidecar(&container.id)?)
}

/// A container that the status does not name yet takes nobody's place that is taken: the kubelet starts a sidecar anew when
/// its former container has ended.
fn beside(agent: &Agent, owner: &Owner, caller: &Caller, described: &Described) -> Result<(), Refused> {
    let former = agent.pods.borrow().get(&caller.cookie).and_then(|pod| pod.record.sidecar.clone());
    let former = former.filter(|former| *former != caller.folders.container);
    if !described.names_sidecar(&caller.container.id) && former.is_some_and(|former| is_populated(&former)) {
        return Err(Refused::Beside { pid: caller.pid, pod: owner.named() });
    }
    Ok(())
}

/// Does a process run in this cgroup, or in one below it? One of which that cannot be told is not taken for empty.
pub(super) fn is_populated(cgroup: &Path) -> bool {
    match std::fs::read_to_string(cgroup.join("cgroup.events")) {
        Ok(events) => !events.lines().any(|line| line == "populated 0"),
        // It went with its container. One that goes while it is read is told by another error.
        Err(error) => error.kind() != io::ErrorKind::NotFound && error.raw_os_error() != Some(libc::ENODEV),
    }
}

/// The record of the pod, if it is of the very container that asks.
fn written(agent: &Agent, owner: &Owner, caller: &Caller) -> Option<PodRecord> {
    let is_same =
        |record: &PodRecord| record.sidecar.as_ref() == Some(&caller.folders.container) && record.netns_cookie == caller.cookie;
    recorded(agent, owner).filter(is_same)
}

/// What was written down when a sidecar of this pod asked to be enrolled, in this life of the agent or before.
pub(super) fn recorded(agent: &Agent, owner: &Owner) -> Option<PodRecord> {
    let record = PodRecord::parse(&std::fs::read(file(agent, owner)).ok()?).ok()?;
    (record.uid.as_ref() == Some(&owner.uid)).then_some(record)
}

/// Writes a pod's record; what was found of the one before counts no more.
pub(super) fn write(agent: &Agent, record: &PodRecord) -> io::Result<()> {
    agent.unenrolled.lock().remove(&record.named());
    let path = agent.records.join(format!("{}.json", PodRecord::file_stem(&record.named())));
    state::write_atomic(&path, &serde_json::to_vec(record)?, 0o600)
}

/// Where a pod's record is.
pub(super) fn file(agent: &Agent, owner: &Owner) -> std::path::PathBuf {
    agent.records.join(format!("{}.json", PodRecord::file_stem(&owner.named())))
}

/// Of a program that is attached at a few hooks.
const TAKEN_IN_WITHIN: Duration = Duration::from_secs(4);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::described::tests::pod;
    use super::*;
    use crate::node::pods::tests::{known, record};

    fn owner() -> Owner {
        Owner { namespace: "shop".into(), name: "web-1".into(), uid: "0a-1".into(), service_account: "web".into() }
    }

    fn of(uid: &str, id: &str) -> Result<Container, Refused> {
        container(&format!("0::/kubepods/besteffort/pod{uid}/{id}\n"), 7, &owner())
    }

    const ID: &str = "aa11aa11aa11";

    #[test]
    fn kubelet_kernel_and_api_server_have_to_speak_of_one_pod() {
        let container = of("0a-1", ID).unwrap();
        assert_eq!(check(&owner(), &container, &pod(|_same| {})), Ok(()));
        let of_another = of("0b-2", ID).unwrap_err();
        assert_eq!(
            of_another.to_string(),
            "the caller (pid 7) runs in cgroup /kubepods/besteffort/pod0b-2/aa11aa11aa11, which is no container of the pod shop/web-1 (UID 0a-1)"
        );
        for change in [
            |pod: &mut serde_json::Value| pod["metadata"]["uid"] = json!("0b-2"),
            |pod: &mut serde_json::Value| pod["metadata"]["name"] = json!("web-2"),
            |pod: &mut serde_json::Value| pod["spec"]["serviceAccountName"] = json!("admin"),
        ] {
            assert_eq!(check(&owner(), &container, &pod(change)), Err(Refused::Disagree(owner().named())));
        }
    }

    #[test]
    fn a_process_of_the_node_or_of_the_nodes_network_is_refused() {
        assert!(matches!(container("0::/user.slice/session-1.scope\n", 7, &owner()), Err(Refused::NotOfPod { .. })));
        assert!(matches!(container("", 7, &owner()), Err(Refused::NotOfPod { .. })));
        let host = pod(|pod| pod["spec"]["hostNetwork"] = json!(true));
        assert_eq!(check(&owner(), &of("0a-1", ID).unwrap(), &host), Err(Refused::HostNetwork(owner().named())));
    }

    #[test]
    fn a_namespace_that_another_pod_has_shown_is_that_pods_for_as_long_as_it_runs() {
        let cgroup = tempfile::tempdir().unwrap();
        let events = |text: &str| std::fs::write(cgroup.path().join("cgroup.events"), text).unwrap();
        let of = |uid: &str| {
            let record = record("api", 7);
            known(&[PodRecord { uid: Some(uid.to_owned()), cgroup: cgroup.path().to_owned(), ..record }])
        };
        let container = container("0::/kubepods/besteffort/pod0a-1/aa11aa11aa11\n", 7, &owner()).unwrap();
        let folders = Folders { pod: "/none".into(), container: "/none".into() };
        let caller = Caller { pid: 7, cookie: 7, container, folders };
        events("populated 1\n");
        assert_eq!(of_nobody_else(&of("0a-1"), &owner(), &caller), Ok(()));
        let refused = of_nobody_else(&of("0b-2"), &owner(), &caller).unwrap_err();
        assert!(refused.to_string().contains("the network namespace of the pod shop/api"), "{refused}");
        assert_eq!(of_nobody_else(&Pods::new(), &owner(), &caller), Ok(()));
        events("populated 0\n");
        assert_eq!(of_nobody_else(&of("0b-2"), &owner(), &caller), Ok(()), "an ended pod has none");
    }

    #[test]
    fn a_namespace_that_somebody_made_for_himself_is_told_from_the_nodes() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let mut own = std::process::Command::new("unshare").args(["-Urn", "sleep", "60"]).spawn().unwrap();
        let path = format!("/proc/{}/ns/net", own.id());
        let here = netns::inode(File::open("/proc/self/ns/net").unwrap()).unwrap();
        let made = (0..500).find_map(|_| {
            std::thread::sleep(Duration::from_millis(10));
            File::open(&path).ok().filter(|netns| netns::inode(netns).is_ok_and(|inode| inode != here))
        });
        let told = made.map(|netns| (netns::is_of_own_user_namespace(&netns), is_the_nodes(&netns)));
        own.kill().unwrap();
        own.wait().unwrap();
        let (is_own, is_nodes) = told.expect("a namespace within five seconds");
        assert!(!is_own.unwrap() && !is_nodes.unwrap());
        assert!(is_the_nodes(&File::open("/proc/self/ns/net").unwrap()).unwrap());
    }

    #[test]
    fn a_sidecars_place_is_taken_for_as_long_as_a_process_runs_in_its_cgroup() {
        let cgroup = tempfile::tempdir().unwrap();
        let says = |text: &str| {
            std::fs::write(cgroup.path().join("cgroup.events"), text).unwrap();
            is_populated(cgroup.path())
        };
        assert!(says("populated 1\nfrozen 0\n"));
        assert!(!says("populated 0\nfrozen 0\n"));
        assert!(says(""), "what says nothing is not taken for empty");
        assert!(!is_populated(&cgroup.path().join("gone")));
    }

    #[test]
    fn a_container_that_is_not_the_sidecar_is_refused_by_name() {
        let running = pod(|pod| {
            pod["status"] = json!({ "containerStatuses": [
                { "name": "app", "containerID": format!("containerd://{ID}"), "image": "", "imageID": "", "ready": true, "restartCount": 0 },
            ] });
        });
        let refused = check(&owner(), &of("0a-1", ID).unwrap(), &running).unwrap_err();
        assert_eq!(refused, Refused::NotSidecar(NotSidecar::Another("app".into())));
        assert!(!refused.remedy().is_empty());
    }
}
