//! Enrolment: a sidecar hands its inbound listener over and is told its identity and addresses.
//!
//! One Unix socket for the node, one connection per sidecar, kept open for as long as the sidecar lives. A request is one
//! JSON line together with the listener (`SCM_RIGHTS`, unix(7)); so is the answer, without a descriptor. Who asks is
//! read from the kernel: the network namespace of the asking socket and of the listener (`SO_NETNS_COOKIE`), the cgroup
//! of the asking process (`SO_PEERCRED`). What the request says of itself is only compared with that, so that a mistake
//! is named. [`decide`] is the whole decision, without a system call in it.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SocketType, sockopt};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use super::Agent;
use super::callers::{Callers, Place};
use super::netns;
use super::pods::{Pod, Pods};
use crate::base::names::Named;

/// Where a sidecar listens for its pod's inbound connections.
pub(crate) const INBOUND_PORT: u16 = 14_006;

/// What the agent answers, one line.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Answer {
    /// The pod is enrolled, and the listener, where one was handed over, is in force.
    #[serde(rename_all = "camelCase")]
    Ok { spiffe_id: String, addresses: Vec<IpAddr>, capture: String },
    /// Nothing was changed.
    Error { text: String, remedy: String },
}

/// What is asked, one line.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Question {
    /// The protocol's version: 1.
    pub(crate) outrigger: u32,
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Only tell when the pod is enrolled: asked by who starts the sidecar, without a listener.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) wait: bool,
}

/// What the kernel says about who asks.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// Of the namespace in which the asking socket was made.
    pub(crate) caller_cookie: u64,
    pub(crate) caller_pid: u32,
    /// The cgroup2 folder of the asking process, if that could be read.
    pub(crate) caller_cgroup: Option<PathBuf>,
    /// One entry per descriptor that came with the question.
    pub(crate) listeners: Vec<Option<ListenerFacts>>,
}

/// What the kernel says about a descriptor that is a socket.
#[derive(Clone, Debug)]
pub(crate) struct ListenerFacts {
    pub(crate) cookie: u64,
    /// A TCP socket of IPv4 or IPv6.
    pub(crate) tcp: bool,
    pub(crate) listening: bool,
    pub(crate) port: u16,
}

/// Why a pod is not enrolled. Whoever sent the question is at fault, or whoever configured it.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Refusal {
    /// Not the protocol.
    #[error("the question cannot be read: {0}")]
    Unreadable(String),
    /// A newer sidecar.
    #[error("the question is of version {0}")]
    Version(u32),
    /// The caller's namespace belongs to no pod of this node.
    #[error("the caller (pid {pid}) is in no pod of this node; it asked for {asked}")]
    NoPod { pid: u32, asked: Named },
    /// One pod asks for another.
    #[error("the caller (pid {pid}) is in the pod {actual}, but asked for {asked}")]
    AnotherPod { pid: u32, actual: Named, asked: Named },
    /// A process of the pod that is not its sidecar.
    #[error("the caller (pid {pid}) is in cgroup {actual}, not in the sidecar's {expected}")]
    NotTheSidecar { pid: u32, actual: String, expected: String },
    /// No descriptor, or several.
    #[error("{0} descriptors came with the question instead of one")]
    Descriptors(usize),
    /// Something else than a TCP socket.
    #[error("the descriptor is no TCP socket")]
    NotTcp,
    /// A listener made in another namespace.
    #[error("the listener is from another network namespace than the pod {0}")]
    ForeignListener(Named),
    /// A socket that does not listen.
    #[error("the socket does not listen")]
    NotListening,
    /// A listener at another port: it may be the app's.
    #[error("the listener is at port {0}, not at {INBOUND_PORT}")]
    OtherPort(u16),
    /// The pod that is waited for did not appear.
    #[error("no pod {0} appeared on this node")]
    NotAppeared(Named),
    /// The kernel did not take the listener.
    #[error("the kernel refuses the listener: {0}")]
    Kernel(String),
}

impl Refusal {
    /// What to do about it.
    pub(crate) fn remedy(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "send one JSON line with outrigger, namespace and name",
            Self::Version(_) => "run the sidecar and the node agent from one release",
            Self::NoPod { .. } => "start the sidecar inside a pod that `outrigger run` made",
            Self::AnotherPod { .. } => "give the sidecar the namespace and name of its own pod",
            Self::NotTheSidecar { .. } => "only the process in the pod's sidecar cgroup may enrol it",
            Self::Descriptors(_) => "send the inbound listener, and nothing else, with the question",
            Self::NotTcp | Self::NotListening => "send a TCP socket that listens",
            Self::ForeignListener(_) => "make the listener inside the pod",
            Self::OtherPort(_) => "send the inbound listener",
            Self::NotAppeared(_) => "look into the node agent's log for why the pod was not enrolled",
            Self::Kernel(_) => "look into the node agent's log",
        }
    }
}

/// May this caller put this listener in force? Returns its pod.
///
/// # Errors
/// It may not.
pub(crate) fn decide<'a>(question: &Question, facts: &Facts, pods: &'a Pods) -> Result<&'a Arc<Pod>, Refusal> {
    if question.outrigger != 1 {
        return Err(Refusal::Version(question.outrigger));
    }
    let asked = Named::new(question.namespace.as_str(), question.name.as_str());
    let pid = facts.caller_pid;
    let Some(pod) = pods.get(&facts.caller_cookie) else { return Err(Refusal::NoPod { pid, asked }) };
    let actual = pod.record.named();
    if actual != asked {
        return Err(Refusal::AnotherPod { pid, actual, asked });
    }
    let expected = pod.record.cgroup.join("sidecar");
    if facts.caller_cgroup.as_ref() != Some(&expected) {
        let actual = facts.caller_cgroup.as_ref().map_or_else(|| "unknown".to_owned(), |cgroup| cgroup.display().to_string());
        return Err(Refusal::NotTheSidecar { pid, actual, expected: expected.display().to_string() });
    }
    match facts.listeners.as_slice() {
        [None | Some(ListenerFacts { tcp: false, .. })] => Err(Refusal::NotTcp),
        [Some(listener)] if listener.cookie != facts.caller_cookie => Err(Refusal::ForeignListener(actual)),
        [Some(listener)] if !listener.listening => Err(Refusal::NotListening),
        [Some(listener)] if listener.port != INBOUND_PORT => Err(Refusal::OtherPort(listener.port)),
        [Some(_the_inbound_listener)] => Ok(pod),
        none_or_several => Err(Refusal::Descriptors(none_or_several.len())),
    }
}

/// Answers on `socket` until the agent ends.
pub(crate) async fn serve(agent: Arc<Agent>, socket: UnixListener) {
    let mut connections = JoinSet::new();
    let callers = Callers::new(CONNECTIONS_MAX / 4);
    loop {
        // Cancel-safe: `accept` and `join_next` lose nothing when the other one is first.
        tokio::select! {
            accepted = socket.accept() => match accepted {
                Ok((stream, _unnamed)) => {
                    let caller = netns::cookie_of_socket(&stream).ok();
                    let place = caller.filter(|_known| connections.len() < CONNECTIONS_MAX).and_then(|cookie| callers.admit(cookie));
                    match place {
                        Some(place) => {
                            connections.spawn(connection(Arc::clone(&agent), stream, place));
                        }
                        None => debug!(?caller, "an enrolment connection was refused, there are too many"),
                    }
                }
                Err(error) => {
                    // Out of descriptors: without a pause this would spin.
                    warn!(%error, "cannot accept on the enrolment socket");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_ended) = connections.join_next() => {}
        }
    }
}

async fn connection(agent: Arc<Agent>, mut stream: UnixStream, _place: Place) {
    let mut enrolled = None;
    loop {
        // A sidecar that is enrolled stays silent until it ends; before that it has a deadline.
        let read = read_question(&stream);
        let received = if enrolled.is_some() { Ok(read.await) } else { tokio::time::timeout(QUESTION_AT_MOST, read).await };
        let answer = match received {
            Ok(Ok(Some((line, descriptors)))) => match take(&agent, &stream, &line, descriptors).await {
                Ok(pod) => {
                    enrolled = Some(pod.record.named());
                    let addresses = pod.record.addresses.clone();
                    Answer::Ok { spiffe_id: pod.id.to_string(), addresses, capture: "ebpf".to_owned() }
                }
                Err(refusal) => {
                    agent.metrics.enrolments.with_label_values(&["refused"]).inc();
                    warn!(error = %refusal, remedy = refusal.remedy(), "enrolment refused");
                    Answer::Error { text: refusal.to_string(), remedy: refusal.remedy().to_owned() }
                }
            },
            Ok(Ok(None)) => break,
            Ok(Err(error)) => {
                debug!(%error, "an enrolment connection failed");
                break;
            }
            Err(_elapsed) => break,
        };
        let Ok(mut line) = serde_json::to_vec(&answer) else { break };
        line.push(b'\n');
        let written = tokio::time::timeout(QUESTION_AT_MOST, stream.write_all(&line)).await;
        if !matches!(written, Ok(Ok(()))) || matches!(answer, Answer::Error { .. }) {
            break;
        }
    }
    if let Some(pod) = enrolled {
        debug!(%pod, "enrolment connection closed");
    }
}

async fn take(agent: &Agent, stream: &UnixStream, line: &[u8], descriptors: Vec<OwnedFd>) -> Result<Arc<Pod>, Refusal> {
    let question: Question = serde_json::from_slice(line).map_err(|error| Refusal::Unreadable(error.to_string()))?;
    if question.wait {
        return wait_for(agent.pods.subscribe(), &Named::new(question.namespace, question.name)).await;
    }
    let facts = facts(stream, &descriptors, &agent.cgroup_root).map_err(|error| Refusal::Unreadable(error.to_string()))?;
    let pod = decide(&question, &facts, &agent.pods.borrow()).map(Arc::clone)?;
    let [listener] = descriptors.as_slice() else { return Err(Refusal::Descriptors(descriptors.len())) };
    let registered = agent.kernel.lock().register_listener(pod.record.netns_cookie, listener.as_fd());
    registered.map_err(|error| Refusal::Kernel(super::chain(&error)))?;
    agent.metrics.enrolments.with_label_values(&["enrolled"]).inc();
    // The agent's own copy of the listener is closed here: the kernel then forgets it when the sidecar ends, and a port
    // that nobody serves is not held against the next sidecar.
    info!(pod = %pod.record.named(), pid = facts.caller_pid, "sidecar enrolled");
    Ok(pod)
}

/// Waits until a pod of that name is enrolled.
async fn wait_for(mut pods: watch::Receiver<Pods>, asked: &Named) -> Result<Arc<Pod>, Refusal> {
    let find = |pods: &Pods| pods.values().find(|pod| pod.record.named() == *asked).map(Arc::clone);
    let appeared = pods.wait_for(|pods| find(pods).is_some());
    match tokio::time::timeout(APPEAR_AT_MOST, appeared).await {
        Ok(Ok(pods)) => find(&pods).ok_or_else(|| Refusal::NotAppeared(asked.clone())),
        Ok(Err(_agent_ends)) => Err(Refusal::NotAppeared(asked.clone())),
        Err(_elapsed) => Err(Refusal::NotAppeared(asked.clone())),
    }
}

/// One line and the descriptors that came with it; `None` when the other side closed. Cancelling loses what was read.
async fn read_question(stream: &UnixStream) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let (mut line, mut descriptors) = (Vec::new(), Vec::new());
    loop {
        stream.readable().await?;
        let mut chunk = [0; LINE_MAX];
        let (count, mut received) = match stream.try_io(tokio::io::Interest::READABLE, || receive(stream, &mut chunk)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            received => received?,
        };
        descriptors.append(&mut received);
        line.extend_from_slice(chunk.get(..count).unwrap_or_default());
        if count == 0 {
            return if line.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        if line.last() == Some(&b'\n') {
            return Ok(Some((line, descriptors)));
        }
        if line.len() > LINE_MAX || descriptors.len() > DESCRIPTORS_MAX {
            return Err(io::Error::other("the question is too long"));
        }
    }
}

fn receive(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("too many descriptors came with the question"));
    }
    Ok((received.bytes, descriptors))
}

fn facts(stream: &UnixStream, descriptors: &[OwnedFd], cgroup_root: &Path) -> io::Result<Facts> {
    let peer = sockopt::socket_peercred(stream)?;
    let caller_pid = peer.pid.as_raw_nonzero().get().unsigned_abs();
    Ok(Facts {
        caller_cookie: netns::cookie_of_socket(stream)?,
        caller_pid,
        caller_cgroup: std::fs::read_to_string(format!("/proc/{caller_pid}/cgroup"))
            .ok()
            .and_then(|text| cgroup_of(&text, cgroup_root)),
        listeners: descriptors.iter().map(|descriptor| listener_facts(descriptor).ok()).collect(),
    })
}

fn listener_facts(descriptor: &OwnedFd) -> io::Result<ListenerFacts> {
    let family = sockopt::socket_domain(descriptor)?;
    let address =
        SocketAddr::try_from(rustix::net::getsockname(descriptor)?).map_err(|_no_ip_address| io::ErrorKind::Unsupported);
    Ok(ListenerFacts {
        cookie: netns::cookie_of_socket(descriptor)?,
        tcp: [AddressFamily::INET, AddressFamily::INET6].contains(&family)
            && sockopt::socket_type(descriptor)? == SocketType::STREAM,
        listening: sockopt::socket_acceptconn(descriptor)?,
        port: address.map_or(0, |address| address.port()),
    })
}

/// The cgroup2 folder in a `/proc/PID/cgroup`: its line has hierarchy 0 and no controllers (cgroups(7)).
fn cgroup_of(proc_cgroup: &str, root: &Path) -> Option<PathBuf> {
    let path = proc_cgroup.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(root.join(path))
}

const CONNECTIONS_MAX: usize = 4096;
const LINE_MAX: usize = 4096;
const DESCRIPTORS_MAX: usize = 4;
const QUESTION_AT_MOST: Duration = Duration::from_secs(5);
const APPEAR_AT_MOST: Duration = Duration::from_secs(10);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use std::io::IoSlice;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

    use super::super::pods::tests::{known, record};
    use super::*;

    fn web() -> Question {
        Question { outrigger: 1, namespace: "shop".into(), name: "web".into(), wait: false }
    }

    fn sidecar() -> Facts {
        Facts {
            caller_cookie: 1,
            caller_pid: 7,
            caller_cgroup: Some("/sys/fs/cgroup/outrigger/pods/shop.web/sidecar".into()),
            listeners: vec![Some(inbound())],
        }
    }

    fn inbound() -> ListenerFacts {
        ListenerFacts { cookie: 1, tcp: true, listening: true, port: INBOUND_PORT }
    }

    #[track_caller]
    fn refused(question: &Question, facts: &Facts, text: &str) {
        let pods = known(&[record("web", 1), record("api", 2)]);
        let refusal = decide(question, facts, &pods).unwrap_err();
        assert_eq!(refusal.to_string(), text);
        assert!(!refusal.remedy().is_empty());
    }

    #[test]
    fn a_sidecar_that_hands_over_its_inbound_listener_is_enrolled() {
        let pods = known(&[record("web", 1), record("api", 2)]);
        assert_eq!(decide(&web(), &sidecar(), &pods).unwrap().record.name, "web");
    }

    #[test]
    fn a_caller_without_a_pod_is_refused() {
        let facts = Facts { caller_cookie: 9, ..sidecar() };
        refused(&web(), &facts, "the caller (pid 7) is in no pod of this node; it asked for shop/web");
    }

    #[test]
    fn another_pods_identity_is_refused() {
        let api = Question { name: "api".into(), ..web() };
        refused(&api, &sidecar(), "the caller (pid 7) is in the pod shop/web, but asked for shop/api");
    }

    #[test]
    fn the_app_cannot_enrol_itself() {
        let app = Facts { caller_cgroup: Some("/sys/fs/cgroup/outrigger/pods/shop.web/app".into()), ..sidecar() };
        refused(
            &web(),
            &app,
            "the caller (pid 7) is in cgroup /sys/fs/cgroup/outrigger/pods/shop.web/app, not in the sidecar's \
             /sys/fs/cgroup/outrigger/pods/shop.web/sidecar",
        );
        let gone = Facts { caller_cgroup: None, ..sidecar() };
        assert!(decide(&web(), &gone, &known(&[record("web", 1)])).is_err());
    }

    #[test]
    fn only_the_pods_own_inbound_listener_is_taken() {
        let with = |listeners: Vec<Option<ListenerFacts>>| Facts { listeners, ..sidecar() };
        refused(&web(), &with(vec![]), "0 descriptors came with the question instead of one");
        refused(&web(), &with(vec![Some(inbound()), Some(inbound())]), "2 descriptors came with the question instead of one");
        refused(&web(), &with(vec![None]), "the descriptor is no TCP socket");
        refused(&web(), &with(vec![Some(ListenerFacts { tcp: false, ..inbound() })]), "the descriptor is no TCP socket");
        refused(&web(), &with(vec![Some(ListenerFacts { listening: false, ..inbound() })]), "the socket does not listen");
        refused(
            &web(),
            &with(vec![Some(ListenerFacts { port: 8080, ..inbound() })]),
            "the listener is at port 8080, not at 14006",
        );
        refused(
            &web(),
            &with(vec![Some(ListenerFacts { cookie: 2, ..inbound() })]),
            "the listener is from another network namespace than the pod shop/web",
        );
    }

    #[test]
    fn another_version_is_refused() {
        refused(&Question { outrigger: 2, ..web() }, &sidecar(), "the question is of version 2");
    }

    #[test]
    fn a_process_is_found_in_its_cgroup_on_pure_and_hybrid_hosts() {
        let root = Path::new("/sys/fs/cgroup");
        assert_eq!(cgroup_of("0::/outrigger/pods/a.b/sidecar\n", root), Some(root.join("outrigger/pods/a.b/sidecar")));
        assert_eq!(cgroup_of("4:memory:/x\n1:name=systemd:/y\n0::/\n", root), Some(root.join("")));
        assert_eq!(cgroup_of("4:memory:/x\n", root), None);
    }

    #[test]
    fn the_answer_is_written_as_the_protocol_says() {
        let ok = Answer::Ok {
            spiffe_id: "spiffe://cluster.local/ns/shop/sa/web".into(),
            addresses: vec!["10.64.0.5".parse().unwrap(), "fd64::5".parse().unwrap()],
            capture: "ebpf".into(),
        };
        assert_eq!(
            serde_json::to_string(&ok).unwrap(),
            r#"{"ok":{"spiffeId":"spiffe://cluster.local/ns/shop/sa/web","addresses":["10.64.0.5","fd64::5"],"capture":"ebpf"}}"#
        );
        let error = Answer::Error { text: "no".into(), remedy: "yes".into() };
        assert_eq!(serde_json::to_string(&error).unwrap(), r#"{"error":{"text":"no","remedy":"yes"}}"#);
        let question: Question = serde_json::from_str(r#"{"outrigger":1,"namespace":"shop","name":"web-1"}"#).unwrap();
        assert!(!question.wait);
    }

    #[tokio::test]
    async fn a_question_arrives_with_its_descriptor_in_pieces_or_at_once() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let rights = [listener.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&rights)));
        rustix::net::sendmsg(&theirs, &[IoSlice::new(b"{\"outrigger\"")], &mut control, SendFlags::empty()).unwrap();
        let read = tokio::spawn(async move { read_question(&ours).await });
        tokio::task::yield_now().await;
        rustix::net::send(&theirs, b":1}\n", SendFlags::empty()).unwrap();
        let (line, descriptors) = read.await.unwrap().unwrap().unwrap();
        assert_eq!(line, b"{\"outrigger\":1}\n");
        let facts = listener_facts(&descriptors[0]).unwrap();
        assert!(facts.tcp && facts.listening && facts.port == port);
        assert_eq!(facts.cookie, netns::cookie_of_socket(&listener).unwrap());
    }
}
