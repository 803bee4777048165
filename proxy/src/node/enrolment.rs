//! Enrolment: a sidecar hands its inbound listener over and is told its identity and addresses.
//!
//! One Unix socket for the node, or on Kubernetes one for each pod; one connection per sidecar, kept open for as long as the sidecar lives; the messages are
//! [`handover`]'s. Who asks is read from the kernel: the network namespace of the asking socket and of the listener
//! (`SO_NETNS_COOKIE`), the cgroup of the asking process (`peer.rs`). What the question says of itself is only compared
//! with that, so that a mistake is named. [`decide`] is the whole decision, without a system call in it. A sidecar that is
//! enrolled goes on to ask there to be dialled, and tells what came of its probes (`proof.rs`).

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proxy_common::{PORT_INBOUND, PORT_OUTBOUND};
use rustix::net::{AddressFamily, SocketType, sockopt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::Agent;
use super::callers::{Callers, Place};
use super::kubernetes::{self, Cluster, Owner};
use super::peer::Peer;
use super::pods::{self, Pod, Pods};
use super::refusal::Refusal;
use super::{admission, netns, proof};
use crate::base::handover::{self, Answer, Purpose, Question, TOKEN_LETTERS, VERSION};
use crate::base::names::Named;

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

/// May this caller do what it asks for: put these listeners in force, or have those back that are kept? Returns its pod.
///
/// # Errors
/// It may not.
pub(crate) fn decide<'a>(question: &Question, facts: &Facts, pods: &'a Pods) -> Result<&'a Arc<Pod>, Refusal> {
    if question.outrigger != VERSION {
        return Err(Refusal::Version(question.outrigger));
    }
    let asked = Named::new(question.namespace.as_str(), question.name.as_str());
    let pid = facts.caller_pid;
    let Some(pod) = pods.get(&facts.caller_cookie) else { return Err(Refusal::NoPod { pid, asked }) };
    let actual = pod.record.named();
    if actual != asked {
        return Err(Refusal::AnotherPod { pid, actual, asked });
    }
    is_sidecar(pod, pid, facts.caller_cgroup.as_deref())?;
    if question.purpose == Purpose::Enrol {
        are_listeners(facts, &actual)?
    } else if !facts.listeners.is_empty() {
        return Err(Refusal::Descriptors(facts.listeners.len()));
    }
    Ok(pod)
}

/// Does a process in `cgroup` speak for the sidecar of `pod`? No other process of the pod does, whatever it can reach.
///
/// # Errors
/// It does not.
pub(crate) fn is_sidecar(pod: &Pod, pid: u32, cgroup: Option<&Path>) -> Result<(), Refusal> {
    let expected = pod.record.sidecar_cgroup();
    if cgroup == Some(expected.as_path()) {
        return Ok(());
    }
    let actual = cgroup.map_or_else(|| "unknown".to_owned(), |cgroup| cgroup.display().to_string());
    Err(Refusal::NotTheSidecar { pid, actual, expected: expected.display().to_string() })
}

/// One inbound listener of the pod, first, and the outbound ones of one family or two.
fn are_listeners(facts: &Facts, pod: &Named) -> Result<(), Refusal> {
    let ports: Vec<u16> =
        facts.listeners.iter().map(|listener| listener_port(listener.as_ref(), facts, pod)).collect::<Result<_, _>>()?;
    match ports.as_slice() {
        [PORT_INBOUND] | [PORT_INBOUND, PORT_OUTBOUND] | [PORT_INBOUND, PORT_OUTBOUND, PORT_OUTBOUND] => Ok(()),
        others => Err(Refusal::Descriptors(others.len())),
    }
}

fn listener_port(listener: Option<&ListenerFacts>, facts: &Facts, pod: &Named) -> Result<u16, Refusal> {
    let listener = listener.filter(|listener| listener.tcp).ok_or(Refusal::NotTcp)?;
    if listener.cookie != facts.caller_cookie {
        return Err(Refusal::ForeignListener(pod.clone()));
    }
    if !listener.listening {
        return Err(Refusal::NotListening);
    }
    if ![PORT_INBOUND, PORT_OUTBOUND].contains(&listener.port) {
        return Err(Refusal::OtherPort(listener.port));
    }
    Ok(listener.port)
}

/// At whose socket somebody asks.
#[derive(Clone)]
pub(crate) enum Door {
    /// At the node's.
    Node,
    /// At the one that the kubelet brought this pod alone.
    Pod { owner: Arc<Owner>, cluster: Arc<Cluster> },
}

/// Answers on `socket` until the agent ends, `most` connections at once.
pub(crate) async fn serve(agent: Arc<Agent>, socket: UnixListener, door: Door, most: usize) {
    let mut connections = JoinSet::new();
    let callers = Callers::new(CALLER_MAX);
    // Whoever starts a pod waits from where the agent is.
    let own = netns::cookie_of_socket(&socket).ok();
    loop {
        // Cancel-safe: `accept` and `join_next` lose nothing when the other one is first.
        tokio::select! {
            accepted = socket.accept() => match accepted {
                Ok((stream, _unnamed)) => {
                    let caller = netns::cookie_of_socket(&stream).ok();
                    let is_known = |cookie| own == Some(cookie) || agent.pods.borrow().contains_key(&cookie);
                    let place = caller.filter(|_known| connections.len() < most);
                    let place = place.and_then(|cookie| callers.admit(cookie, is_known(cookie)));
                    match place {
                        Some(place) => {
                            connections.spawn(connection(Arc::clone(&agent), stream, place, door.clone()));
                        }
                        None => turn_away(&agent, &stream),
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

/// Says that there are too many connections, without waiting for anybody: the line fits into the socket's buffer.
fn turn_away(agent: &Agent, stream: &UnixStream) {
    agent.metrics.enrolments.with_label_values(&["too_many"]).inc();
    let refusal = Refusal::TooMany;
    debug!(error = %refusal, "enrolment refused");
    let answer = Answer::Error { text: refusal.to_string(), remedy: refusal.remedy().to_owned() };
    // Who is gone already needs no answer.
    if handover::try_send(stream, &answer).is_err() {}
}

async fn connection(agent: Arc<Agent>, stream: UnixStream, mut place: Place, door: Door) {
    let peer = match Peer::of(&stream) {
        Ok(peer) => peer,
        Err(error) => return debug!(%error, "who connected to the enrolment socket is not known"),
    };
    let mut enrolled: Option<Enrolment> = None;
    let mut prove = agent.prove.subscribe();
    loop {
        // A sidecar that is enrolled asks when it likes; before that it has a deadline.
        let received = if let Some(enrolment) = &enrolled {
            Ok(listen(&stream, &mut prove, &enrolment.pod.expelled).await)
        } else {
            timeout(QUESTION_AT_MOST, handover::receive(&stream)).await
        };
        let (answer, given) = match received {
            Ok(Ok(Some((line, descriptors)))) => match take(&agent, &door, (&stream, &peer), &line, descriptors).await {
                Ok(Taken { answer, enrolment, given }) => {
                    enrolled = enrolment.or(enrolled);
                    if enrolled.is_some() {
                        place.is_known();
                    }
                    (answer, given)
                }
                Err(refusal) => refuse(&agent, &refusal),
            },
            Ok(Ok(None)) => break,
            // A sidecar that was killed with an answer unread.
            Ok(Err(error)) if enrolled.is_some() => {
                debug!(%error, "the connection of an enrolled sidecar failed");
                break;
            }
            // Who closed only its sending half still hears why.
            Ok(Err(error)) => refuse(&agent, &Refusal::Unreadable(error.to_string())),
            Err(_elapsed) => refuse(&agent, &Refusal::Unreadable(format!("no whole line came within {QUESTION_AT_MOST:?}"))),
        };
        let given: Vec<BorrowedFd<'_>> = given.iter().map(OwnedFd::as_fd).collect();
        let sent = timeout(QUESTION_AT_MOST, handover::send(&stream, &answer, &given)).await;
        if !matches!(sent, Ok(Ok(()))) || matches!(answer, Answer::Error { .. }) {
            break;
        }
    }
    if let Some(enrolment) = enrolled {
        left(&agent, &enrolment);
    }
}

/// What an enrolled sidecar says next. It may be silent as long as it likes; what it begins to say has a deadline. Asks it to probe
/// whenever all are to, meanwhile.
async fn listen(
    stream: &UnixStream,
    prove: &mut watch::Receiver<u64>,
    expelled: &CancellationToken,
) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut read = std::pin::pin!(async {
        handover::begun(stream).await?;
        let whole = timeout(QUESTION_AT_MOST, handover::receive(stream)).await;
        whole.unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()))
    });
    loop {
        // Cancel-safe: the one read goes on, and a round that is not seen now is seen next time.
        tokio::select! {
            read = &mut read => return read,
            // It asks anew, and shows what it has now.
            () = expelled.cancelled() => return Ok(None),
            asked = prove.changed() => {
                let sent = timeout(QUESTION_AT_MOST, handover::send(stream, &Answer::Prove, &[])).await;
                if asked.is_err() || !matches!(sent, Ok(Ok(()))) {
                    return Ok(None);
                }
            }
        }
    }
}

/// Counts a refusal, logs it and says it.
fn refuse(agent: &Agent, refusal: &Refusal) -> (Answer, Vec<OwnedFd>) {
    agent.metrics.enrolments.with_label_values(&["refused"]).inc();
    warn!(error = %refusal, remedy = refusal.remedy(), "enrolment refused");
    (Answer::Error { text: refusal.to_string(), remedy: refusal.remedy().to_owned() }, Vec::new())
}

/// A sidecar that is enrolled, for as long as its connection stands.
struct Enrolment {
    pod: Arc<Pod>,
    number: u64,
}

/// What became of a question.
struct Taken {
    answer: Answer,
    /// Of a sidecar that handed its listeners over.
    enrolment: Option<Enrolment>,
    /// What goes back with the answer.
    given: Vec<OwnedFd>,
}

impl Taken {
    fn of(answer: Answer) -> Self {
        Self { answer, enrolment: None, given: Vec::new() }
    }

    /// For who asks about a pod that is enrolled.
    fn enrolled(agent: &Agent, pod: &Pod) -> Self {
        let (addresses, capture) = (pod.record.addresses.clone(), agent.standing.rung.word().to_owned());
        Self::of(Answer::Ok { spiffe_id: pod.id.to_string(), addresses, capture })
    }
}

async fn take(
    agent: &Agent,
    door: &Door,
    (stream, peer): (&UnixStream, &Peer),
    line: &[u8],
    descriptors: Vec<OwnedFd>,
) -> Result<Taken, Refusal> {
    let question: Question = serde_json::from_slice(line).map_err(|error| Refusal::Unreadable(error.to_string()))?;
    let asked = Named::new(question.namespace.as_str(), question.name.as_str());
    if let Door::Pod { owner, cluster } = door {
        if matches!(question.purpose, Purpose::Prove | Purpose::Wait) {
            return Err(Refusal::NotHere);
        }
        Box::pin(kubernetes::admission::admit(agent, cluster, owner, (stream, peer), &asked)).await?;
        if let Some(refusal) = unenrolled(agent, &asked) {
            return Err(refusal);
        }
    }
    match question.purpose {
        Purpose::Prove => {
            let peer = sockopt::socket_peercred(stream).map_err(|error| Refusal::Unreadable(error.to_string()))?;
            if !peer.uid.is_root() {
                return Err(Refusal::NotRoot(peer.uid.as_raw()));
            }
            proof::prove_now(agent).await;
            return Ok(Taken::of(Answer::Heard));
        }
        Purpose::Wait => {
            // Whose it is, is looked at; who shows it is all the same.
            if let [socket] = descriptors.as_slice() {
                admission::meet(agent, &asked, socket);
            }
            return Ok(Taken::enrolled(agent, &*wait_for(agent, &asked).await?));
        }
        Purpose::Enrol | Purpose::Resume | Purpose::Dial | Purpose::Last | Purpose::Told => {}
    }
    if let Some(listener) = descriptors.first()
        && admission::meet(agent, &asked, listener)
    {
        // It may be all that this pod waited for. What is not well is said below.
        drop(wait_for(agent, &asked).await);
    }
    let facts =
        facts((stream, peer), &descriptors, &agent.cgroup_root).map_err(|error| Refusal::Unreadable(error.to_string()))?;
    let pod = decide(&question, &facts, &agent.pods.borrow()).map(Arc::clone)?;
    let cookie = pod.record.netns_cookie;
    match question.purpose {
        Purpose::Resume => {
            let copies = agent.keeper.lock().listeners(cookie).iter().map(OwnedFd::try_clone).collect::<Result<Vec<_>, _>>();
            let given = copies.map_err(|error| Refusal::Kernel(error.to_string()))?;
            return Ok(Taken { given, ..Taken::enrolled(agent, &pod) });
        }
        Purpose::Dial => {
            let token = question.token.filter(|token| token.len() == TOKEN_LETTERS).ok_or(Refusal::NoToken)?;
            let unreached = proof::dial(agent, &pod, &token).await;
            let faults = agent.faults.borrow().of(&pod.record.named());
            return Ok(Taken::of(Answer::Dialled { unreached, faults }));
        }
        Purpose::Last => {
            let Door::Pod { owner, cluster } = door else { return Err(Refusal::OnlyOfKubernetes) };
            let app_runs = kubernetes::app_runs(cluster, owner, &pod.record.cgroup);
            return Ok(Taken::of(Answer::Last { app_runs }));
        }
        Purpose::Told => {
            let faults = question.faults.into_iter().take(FAULTS_MAX).collect();
            proof::told(agent, &pod, faults);
            return Ok(Taken::of(Answer::Heard));
        }
        Purpose::Enrol | Purpose::Wait | Purpose::Prove => {}
    }
    let [inbound, ..] = descriptors.as_slice() else { return Err(Refusal::Descriptors(descriptors.len())) };
    let registered = agent.capture.register_listener(cookie, inbound.as_fd());
    registered.map_err(|error| Refusal::Kernel(super::chain(&error)))?;
    agent.metrics.enrolments.with_label_values(&["enrolled"]).inc();
    // Without a hold time no copy stays here: the kernel then forgets a listener when its sidecar ends.
    let kept = if pod.record.hold().is_zero() { Vec::new() } else { descriptors };
    let (number, waited) = agent.keeper.lock().keep(cookie, kept, Instant::now());
    if waited {
        agent.metrics.holds.with_label_values(&["resumed"]).inc();
    }
    info!(pod = %pod.record.named(), pid = facts.caller_pid, waited, "sidecar enrolled");
    let answer = Taken::enrolled(agent, &pod);
    Ok(Taken { enrolment: Some(Enrolment { pod, number }), ..answer })
}

/// A sidecar is gone. What dials its pod, and what the pod dials, waits for the next one, unless the pod is about to go too.
fn left(agent: &Agent, enrolment: &Enrolment) {
    let cookie = enrolment.pod.record.netns_cookie;
    let pod = enrolment.pod.record.named();
    // The record as it is now.
    let record = agent.pods.borrow().get(&cookie).map(|pod| pod.record.clone());
    let Some(record) = record.filter(|record| !record.terminating) else {
        agent.keeper.lock().forget(cookie);
        debug!(%pod, "the sidecar of a pod that ends is gone");
        return;
    };
    let held = agent.keeper.lock().left(cookie, enrolment.number, record.hold(), Instant::now());
    if let Some(held) = held {
        agent.metrics.holds.with_label_values(&["begun"]).inc();
        agent.held.notify_one();
        warn!(%pod, at_most_ms = held.as_millis(), "the sidecar is gone, connections wait for the next one");
    } else {
        debug!(%pod, "enrolment connection closed");
    }
}

/// Closes listeners whose sidecar did not come back in time, until the agent ends.
pub(crate) async fn expire(agent: Arc<Agent>) {
    loop {
        let next = agent.keeper.lock().next();
        // Cancel-safe: both are asked again.
        tokio::select! {
            () = agent.held.notified() => {}
            () = sleep_until(next.unwrap_or_else(|| Instant::now() + LOOK_EVERY)) => {}
        }
        let expired = agent.keeper.lock().expire(Instant::now());
        for cookie in expired {
            agent.metrics.holds.with_label_values(&["expired"]).inc();
            let pod = agent.pods.borrow().get(&cookie).map(|pod| pod.record.named().to_string()).unwrap_or_default();
            warn!(pod, "no sidecar came back in time, connections are refused");
        }
    }
}

/// Waits until a pod of that name is enrolled, or cannot be.
async fn wait_for(agent: &Agent, asked: &Named) -> Result<Arc<Pod>, Refusal> {
    let mut pods = agent.pods.subscribe();
    let settled = async {
        loop {
            let found = pods.borrow_and_update().values().find(|pod| pod.record.named() == *asked).map(Arc::clone);
            if let Some(pod) = found {
                return Ok(pod);
            }
            if let Some(refusal) = unenrolled(agent, asked) {
                return Err(refusal);
            }
            if pods.changed().await.is_err() {
                return Err(Refusal::NotAppeared(asked.clone()));
            }
        }
    };
    timeout(APPEAR_AT_MOST, settled).await.unwrap_or_else(|_elapsed| Err(Refusal::NotAppeared(asked.clone())))
}

/// Why the pod that is described now under that name is not enrolled, if that was found out. What is known of an earlier pod
/// of the name says nothing about it.
fn unenrolled(agent: &Agent, asked: &Named) -> Option<Refusal> {
    let described = pods::cookie(&agent.records, asked)?;
    let unenrolled = agent.unenrolled.lock();
    let fault = unenrolled.get(asked).filter(|fault| fault.cookie == described)?;
    Some(Refusal::Unenrolled { pod: asked.clone(), why: fault.text.clone(), remedy: fault.remedy.clone() })
}

fn facts((stream, peer): (&UnixStream, &Peer), descriptors: &[OwnedFd], cgroup_root: &Path) -> io::Result<Facts> {
    Ok(Facts {
        caller_cookie: netns::cookie_of_socket(stream)?,
        caller_pid: peer.pid,
        caller_cgroup: peer.cgroup(cgroup_root),
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

/// Both ways, both families, and what the agent itself told.
const FAULTS_MAX: usize = 32;
/// Connections at once, of everybody.
pub(super) const CONNECTIONS_MAX: usize = 4096;
/// Those of one network namespace, and of all of which no pod is known.
pub(super) const CALLER_MAX: usize = CONNECTIONS_MAX / 4;
const QUESTION_AT_MOST: Duration = Duration::from_secs(5);
const APPEAR_AT_MOST: Duration = Duration::from_secs(10);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const LOOK_EVERY: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::super::pods::tests::{known, record};
    use super::*;

    fn web() -> Question {
        Question::new(&Named::new("shop", "web"), Purpose::Enrol)
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
        ListenerFacts { cookie: 1, tcp: true, listening: true, port: PORT_INBOUND }
    }

    #[track_caller]
    fn refused(question: &Question, facts: &Facts, text: &str) {
        let pods = known(&[record("web", 1), record("api", 2)]);
        let refusal = decide(question, facts, &pods).unwrap_err();
        assert_eq!(refusal.to_string(), text);
        assert!(!refusal.remedy().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_enrolled_sidecar_may_be_silent_and_not_stop_in_the_middle_of_a_line() {
        let (sidecar, agent) = UnixStream::pair().unwrap();
        let ((_round, mut prove), expelled) = (watch::channel(0), CancellationToken::new());
        let silent = timeout(Duration::from_secs(3_600), listen(&agent, &mut prove, &expelled)).await;
        assert!(silent.is_err(), "an hour of silence is no fault");
        sidecar.writable().await.unwrap();
        sidecar.try_write(b"{\"outrig").unwrap();
        let half = timeout(QUESTION_AT_MOST * 2, listen(&agent, &mut prove, &expelled)).await.expect("a deadline");
        assert_eq!(half.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_sidecar_whose_pod_is_enrolled_no_more_has_to_ask_anew() {
        let (_sidecar, agent) = UnixStream::pair().unwrap();
        let ((_round, mut prove), expelled) = (watch::channel(0), CancellationToken::new());
        let (heard, ()) = tokio::join!(listen(&agent, &mut prove, &expelled), async { expelled.cancel() });
        assert!(heard.unwrap().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_may_come_one_byte_at_a_time_and_with_no_more_descriptors_than_it_may_have() {
        let (sidecar, agent) = UnixStream::pair().unwrap();
        let ((_round, mut prove), expelled) = (watch::channel(0), CancellationToken::new());
        let line = b"{\"outrigger\":1}\n";
        let drip = async {
            for byte in line {
                sidecar.writable().await.unwrap();
                sidecar.try_write(&[*byte]).unwrap();
                tokio::task::yield_now().await;
            }
        };
        let (heard, ()) = tokio::join!(listen(&agent, &mut prove, &expelled), drip);
        assert_eq!(heard.unwrap().unwrap().0, line);
        // As another program sends it: five of them with one byte.
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        let five = [agent.as_fd(); 5];
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&five)));
        let byte = [io::IoSlice::new(b"{")];
        rustix::net::sendmsg(&sidecar, &byte, &mut control, rustix::net::SendFlags::empty()).unwrap();
        let told = listen(&agent, &mut prove, &expelled).await.unwrap_err().to_string();
        assert_eq!(told, "the message is too long");
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
        let outbound = || Some(ListenerFacts { port: PORT_OUTBOUND, ..inbound() });
        let pods = known(&[record("web", 1)]);
        for good in [vec![Some(inbound()), outbound()], vec![Some(inbound()), outbound(), outbound()]] {
            assert!(decide(&web(), &with(good), &pods).is_ok());
        }
        let none = "0 descriptors came with the question, and not the pod's listeners";
        refused(&web(), &with(vec![]), none);
        let two = "2 descriptors came with the question, and not the pod's listeners";
        refused(&web(), &with(vec![Some(inbound()), Some(inbound())]), two);
        refused(&web(), &with(vec![outbound(), Some(inbound())]), two);
        refused(&web(), &with(vec![None]), "the descriptor is no TCP socket");
        refused(&web(), &with(vec![Some(ListenerFacts { tcp: false, ..inbound() })]), "the descriptor is no TCP socket");
        refused(&web(), &with(vec![Some(ListenerFacts { listening: false, ..inbound() })]), "the socket does not listen");
        refused(
            &web(),
            &with(vec![Some(ListenerFacts { port: 8080, ..inbound() })]),
            "the listener is at port 8080, not at 14006 or 14001",
        );
        refused(
            &web(),
            &with(vec![Some(ListenerFacts { cookie: 2, ..inbound() })]),
            "the listener is from another network namespace than the pod shop/web",
        );
    }

    #[test]
    fn what_is_kept_is_given_to_the_pods_sidecar_alone() {
        let resume = Question::new(&Named::new("shop", "web"), Purpose::Resume);
        let asks = Facts { listeners: Vec::new(), ..sidecar() };
        let pods = known(&[record("web", 1), record("api", 2)]);
        assert_eq!(decide(&resume, &asks, &pods).unwrap().record.name, "web");
        let app = Facts { caller_cgroup: Some("/sys/fs/cgroup/outrigger/pods/shop.web/app".into()), ..asks.clone() };
        assert!(matches!(decide(&resume, &app, &pods), Err(Refusal::NotTheSidecar { .. })));
        let another = Facts { caller_cookie: 2, ..asks };
        assert!(matches!(decide(&resume, &another, &pods), Err(Refusal::AnotherPod { .. })));
        assert!(matches!(decide(&resume, &sidecar(), &pods), Err(Refusal::Descriptors(1))));
    }

    #[test]
    fn another_version_is_refused() {
        refused(&Question { outrigger: 2, ..web() }, &sidecar(), "the question is of version 2");
    }
}
