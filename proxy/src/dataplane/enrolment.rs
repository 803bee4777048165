//! Hands the pod's listeners to the node agent and keeps it enrolled: one connection per sidecar, kept open, made again
//! when the agent comes back. The hand-over is idempotent; meanwhile the kernel programs go on as they are.
//!
//! Before that it asks for what the agent kept of a former sidecar of the pod: connections may wait there.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use super::Window;
use crate::base::handover::{self, Answer, Purpose, Question};
use crate::base::names::Named;

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

/// Hands `listeners` over for whoever comes, and ends.
///
/// # Errors
/// The agent does not answer, or refuses them.
pub(crate) async fn hand_over(path: &Path, name: &Named, listeners: &[OwnedFd]) -> io::Result<()> {
    timeout(ANSWER_MAX, ask(path, name, Purpose::Enrol, listeners)).await?.map(drop)
}

/// Keeps the sidecar of `name` enrolled at the agent behind the socket `path`, for ever.
pub(crate) async fn keep(path: PathBuf, name: Named, listeners: Vec<OwnedFd>, window: Arc<Window>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let asked = timeout(ANSWER_MAX, ask(&path, &name, Purpose::Enrol, &listeners)).await;
        match asked.map_err(io::Error::from).flatten() {
            Ok(asked) => {
                let Asked { identity, addresses, capture, .. } = &asked;
                info!(identity, ?addresses, capture, "enrolled");
                window.enrolled.store(true, Ordering::Relaxed);
                pause = FIRST_PAUSE;
                until_closed(&asked.stream).await;
                // The kernel's side stays as it is: the sidecar is still enrolled, and readiness with it.
                warn!("the node agent is gone; what is captured stays captured");
            }
            Err(error) => warn!(%error, path = %path.display(), "not enrolled"),
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
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
    }
}

/// The agent says nothing more; the end of the stream is its end. To wait for it is what the connection is for.
async fn until_closed(stream: &UnixStream) {
    while matches!(handover::receive(stream).await, Ok(Some(_said))) {}
}

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// A sidecar that has nothing to take over shall not wait long for the agent to say so.
const RESUME_MAX: Duration = Duration::from_secs(1);
