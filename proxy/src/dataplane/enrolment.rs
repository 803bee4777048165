//! Hands the pod's listeners to the node agent and keeps it enrolled: one connection per sidecar, kept open, made again
//! when the agent comes back. The hand-over is idempotent; meanwhile the kernel programs go on as they are.
//!
//! On that connection it proves capture as well: it asks to be dialled, and tells what came of its probes. While there is no
//! agent, readiness stays as it was last proven.
//!
//! Before that it asks for what the agent kept of a former sidecar of the pod: connections may wait there.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::Window;
use super::probe::{Probes, Way};
use crate::base::handover::{self, Answer, Purpose, Question};
use crate::base::names::Named;
use crate::base::random::Dice;

/// The listeners that are kept for the pod `name` by the agent behind the socket `path`. None where it does not answer:
/// the sidecar makes its own then.
pub(crate) async fn resume(path: &Path, name: &Named) -> Vec<OwnedFd> {
    match timeout(RESUME_MAX, ask(path, name, Purpose::Resume, &[])).await {
        Ok(Ok(asked)) => {
            if !asked.given.is_empty() {
                info!(listeners = asked.given.len(), "a former sidecar's listeners are taken over");
            }
            asked.given
        }
        Ok(Err(error)) => {
            debug!(%error, "no listeners to take over");
            Vec::new()
        }
        Err(_elapsed) => Vec::new(),
    }
}

/// Does the application of the pod `name` run? Asked of the agent behind the socket `path`, by its sidecar's container.
///
/// # Errors
/// The agent does not answer, or refuses to.
pub(crate) async fn app_runs(path: &Path, name: &Named) -> io::Result<bool> {
    let asked = async {
        let stream = UnixStream::connect(path).await?;
        match (Agent { stream, said: VecDeque::new() }).ask(&Question::new(name, Purpose::Last)).await? {
            Answer::Last { app_runs } => Ok(app_runs),
            _another => Err(io::ErrorKind::InvalidData.into()),
        }
    };
    timeout(ANSWER_MAX, asked).await?
}

/// Hands `listeners` over for whoever comes, and ends.
///
/// # Errors
/// The agent does not answer, or refuses them.
pub(crate) async fn hand_over(path: &Path, name: &Named, listeners: &[OwnedFd]) -> io::Result<()> {
    timeout(ANSWER_MAX, ask(path, name, Purpose::Enrol, listeners)).await?.map(drop)
}

/// A sidecar's standing with the node agent.
#[derive(Debug)]
pub(crate) struct Enrolment {
    /// The agent's socket.
    pub(crate) path: PathBuf,
    pub(crate) name: Named,
    pub(crate) listeners: Vec<OwnedFd>,
    /// By which its app's connections come, one for each outbound listener.
    pub(crate) ways_out: BTreeSet<Way>,
    pub(crate) probes: Arc<Probes>,
    pub(crate) window: Arc<Window>,
    /// Of the time between probes.
    pub(crate) dice: Dice,
}

impl Enrolment {
    /// Keeps the sidecar enrolled, and capture proven, for ever.
    pub(crate) async fn keep(mut self) {
        let mut pause = FIRST_PAUSE;
        loop {
            let asked = timeout(ANSWER_MAX, ask(&self.path, &self.name, Purpose::Enrol, &self.listeners)).await;
            match asked.map_err(io::Error::from).flatten() {
                Ok(asked) => {
                    let Asked { identity, addresses, capture, .. } = &asked;
                    info!(identity, ?addresses, capture, "enrolled");
                    self.window.addresses.lock().clone_from(addresses);
                    self.window.enrolled.store(true, Ordering::Relaxed);
                    pause = FIRST_PAUSE;
                    let ended = self.prove_until_closed(asked).await;
                    // The kernel's side stays as it is: the sidecar is still enrolled, and readiness with it.
                    warn!(error = ended.to_string(), "the node agent is gone; what is captured stays captured");
                }
                Err(error) => warn!(%error, path = %self.path.display(), "not enrolled"),
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Probes as soon as the doors are open, and then every now and then; again soon while something fails, and at once when
    /// the agent says so. Returns why the connection ended.
    async fn prove_until_closed(&mut self, asked: Asked) -> io::Error {
        let mut agent = Agent { stream: asked.stream, said: VecDeque::new() };
        let all = self.ways_out.iter().copied().chain(asked.addresses.into_iter().map(Way::of_pods));
        let (ways, left): (BTreeSet<Way>, BTreeSet<Way>) = all.partition(|way| way.is_provable(&asked.capture));
        if !left.is_empty() {
            let left = left.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            info!(left, capture = asked.capture, "ways that no probe can go here are not proven");
        }
        let mut doors = self.window.open.subscribe();
        // None until the doors are open.
        let mut due = None;
        loop {
            let is_due = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    // The sender lives as long as the window does.
                    None => drop(doors.wait_for(|open| *open).await),
                }
            };
            // Cancel-safe: nothing is read, and the time stays the same.
            let heard = tokio::select! {
                () = is_due => true,
                heard = agent.hears() => match heard {
                    Ok(asked) => asked,
                    Err(error) => return error,
                },
            };
            if !*self.window.open.borrow() {
                // A sidecar that stops takes nothing more; what is not taken proves nothing.
                due = None;
                continue;
            }
            if !heard {
                continue;
            }
            match timeout(ROUND_MAX, self.prove(&mut agent, &ways)).await.map_err(io::Error::from).flatten() {
                Ok(faults) => {
                    let span =
                        if faults.is_empty() { PROBE_EVERY.mul_f64(0.9 + 0.2 * self.dice.fraction()) } else { AGAIN_AFTER };
                    due = Some(Instant::now() + span);
                }
                Err(error) => return error,
            }
        }
    }

    /// One round: each way is dialled, what did not arrive is told to the agent and turns readiness off.
    async fn prove(&self, agent: &mut Agent, ways: &BTreeSet<Way>) -> io::Result<Vec<String>> {
        let token = self.probes.begin()?;
        let dials = self.ways_out.intersection(ways).map(|way| async { (*way, self.probes.dial(*way, &token).await.err()) });
        let dialled = join_all(dials).await;
        let asked = Question { token: Some(token.clone()), ..Question::new(&self.name, Purpose::Dial) };
        let Answer::Dialled { unreached, faults } = agent.ask(&asked).await? else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let missing = self.probes.missing(ways).await;
        let faults = faults_of(&missing, &dialled, &unreached).into_iter().chain(faults).collect::<Vec<_>>();
        if self.window.proven(faults.clone()) {
            for fault in &faults {
                warn!(fault, "capture is not complete, the pod is not ready");
            }
            if faults.is_empty() {
                info!("capture is proven");
            }
        }
        agent.ask(&Question { faults: faults.clone(), ..Question::new(&self.name, Purpose::Told) }).await?;
        Ok(faults)
    }
}

/// What is said of ways by which nothing came.
fn faults_of(missing: &BTreeSet<Way>, dialled: &[(Way, Option<io::Error>)], unreached: &[String]) -> Vec<String> {
    let sentence = |way: &Way| {
        let why = dialled.iter().find(|(dialled, _)| dialled == way).map(|(_, error)| error.as_ref().map(ToString::to_string));
        match why {
            Some(Some(error)) => format!("{way}: a connection of the pod does not come to its sidecar ({error})"),
            Some(None) => format!("{way}: a connection of the pod went elsewhere than to its sidecar"),
            None => {
                let family = |told: &&String| told.starts_with('[') == (*way == Way::InboundV6);
                let why = unreached.iter().find(family).map_or_else(|| "it went elsewhere".to_owned(), Clone::clone);
                format!("{way}: a connection to the pod does not come to its sidecar ({why})")
            }
        }
    };
    missing.iter().map(sentence).collect()
}

/// The agent at the other end of the enrolment connection.
struct Agent {
    stream: UnixStream,
    /// What it said and nobody has heard yet: two of its lines may arrive as one.
    said: VecDeque<Answer>,
}

impl Agent {
    /// Waits until it says something unasked. Did it ask for probes? Cancel-safe but for the rest of a line of which the begin has arrived, and
    /// the agent sends whole lines.
    async fn hears(&mut self) -> io::Result<bool> {
        if self.said.is_empty() {
            self.stream.readable().await?;
        }
        Ok(matches!(self.next().await?, Answer::Prove))
    }

    /// Asks, and returns the answer. What the agent wanted meanwhile is what is being done.
    async fn ask(&mut self, question: &Question) -> io::Result<Answer> {
        handover::send(&self.stream, question, &[]).await?;
        loop {
            match self.next().await? {
                Answer::Prove => {}
                Answer::Error { text, remedy } => return Err(io::Error::other(format!("{text}; {remedy}"))),
                answer => return Ok(answer),
            }
        }
    }

    async fn next(&mut self) -> io::Result<Answer> {
        loop {
            if let Some(answer) = self.said.pop_front() {
                return Ok(answer);
            }
            let (lines, _none) = handover::receive(&self.stream).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
            for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                self.said.push_back(serde_json::from_slice(line)?);
            }
        }
    }
}

/// What the agent answered, and the connection on which it did.
struct Asked {
    stream: UnixStream,
    identity: String,
    addresses: Vec<std::net::IpAddr>,
    capture: String,
    given: Vec<OwnedFd>,
}

async fn ask(path: &Path, name: &Named, purpose: Purpose, listeners: &[OwnedFd]) -> io::Result<Asked> {
    let stream = UnixStream::connect(path).await?;
    let descriptors: Vec<_> = listeners.iter().map(OwnedFd::as_fd).collect();
    handover::send(&stream, &Question::new(name, purpose), &descriptors).await?;
    let (line, given) = handover::receive(&stream).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
    match serde_json::from_slice(&line)? {
        Answer::Ok { spiffe_id, addresses, capture } => Ok(Asked { stream, identity: spiffe_id, addresses, capture, given }),
        Answer::Error { text, remedy } => Err(io::Error::other(format!("{text}; {remedy}"))),
        Answer::Dialled { .. } | Answer::Last { .. } | Answer::Heard | Answer::Prove => Err(io::ErrorKind::InvalidData.into()),
    }
}

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// A sidecar that has nothing to take over shall not wait long for the agent to say so.
const RESUME_MAX: Duration = Duration::from_secs(1);
/// A round takes two dials' time at most, and the agent dials so many pods at once only.
const ROUND_MAX: Duration = Duration::from_secs(60);
const PROBE_EVERY: Duration = Duration::from_secs(60);
const AGAIN_AFTER: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[test]
    fn each_way_that_is_missing_is_told_with_what_its_dial_said() {
        let refused = || Some(io::Error::from_raw_os_error(111));
        let dialled = [(Way::OutboundV4, refused()), (Way::OutboundV6, None)];
        let unreached = ["10.64.0.5:14007: no answer within 2s".to_owned()];
        let missing = [Way::OutboundV4, Way::OutboundV6, Way::InboundV4, Way::InboundV6].into();
        assert_eq!(
            faults_of(&missing, &dialled, &unreached),
            [
                "outbound IPv4: a connection of the pod does not come to its sidecar (Connection refused (os error 111))",
                "outbound IPv6: a connection of the pod went elsewhere than to its sidecar",
                "inbound IPv4: a connection to the pod does not come to its sidecar (10.64.0.5:14007: no answer within 2s)",
                "inbound IPv6: a connection to the pod does not come to its sidecar (it went elsewhere)",
            ]
        );
        assert!(faults_of(&BTreeSet::new(), &dialled, &unreached).is_empty());
    }

    #[tokio::test]
    async fn what_the_agent_wants_meanwhile_is_no_answer_to_what_was_asked() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut agent = Agent { stream: ours, said: VecDeque::new() };
        // Two lines that arrive as one.
        theirs.write_all(b"\"prove\"\n\"heard\"\n").await.unwrap();
        let question = Question::new(&Named::new("shop", "web"), Purpose::Told);
        assert_eq!(agent.ask(&question).await.unwrap(), Answer::Heard);
        theirs.write_all(b"\"prove\"\n").await.unwrap();
        assert!(agent.hears().await.unwrap());
        drop(theirs);
        assert!(agent.hears().await.is_err());
    }
}
