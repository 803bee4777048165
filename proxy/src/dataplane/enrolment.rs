//! Hands the inbound listener to the node agent and keeps it enrolled: one connection per sidecar, kept open, made again
//! when the agent comes back. The hand-over is idempotent; meanwhile the kernel programs go on as they are.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::Window;
use crate::base::names::Named;

/// What the sidecar says.
#[derive(Serialize)]
struct Hello<'a> {
    outrigger: u32,
    namespace: &'a str,
    name: &'a str,
}

/// What the agent answers.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Answer {
    Ok(Enrolled),
    Error(Refused),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Enrolled {
    spiffe_id: String,
    #[serde(default)]
    addresses: Vec<std::net::IpAddr>,
    #[serde(default)]
    capture: String,
}

#[derive(Debug, Deserialize)]
struct Refused {
    text: String,
    #[serde(default)]
    remedy: String,
}

/// Keeps the sidecar of `name` enrolled at the agent behind the socket `path`, for ever.
pub(crate) async fn keep(path: PathBuf, name: Named, listener: OwnedFd, window: Arc<Window>) {
    let mut pause = FIRST_PAUSE;
    loop {
        match enrol(&path, &name, &listener).await {
            Ok((stream, enrolled)) => {
                info!(identity = enrolled.spiffe_id, addresses = ?enrolled.addresses, capture = enrolled.capture, "enrolled");
                window.enrolled.store(true, Ordering::Relaxed);
                pause = FIRST_PAUSE;
                until_closed(stream).await;
                // The kernel's side stays as it is: the sidecar is still enrolled, and readiness with it.
                warn!("the node agent is gone; what is captured stays captured");
            }
            Err(error) => warn!(%error, path = %path.display(), "not enrolled"),
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn enrol(path: &std::path::Path, name: &Named, listener: &OwnedFd) -> io::Result<(BufReader<UnixStream>, Enrolled)> {
    let stream = timeout(ANSWER_MAX, UnixStream::connect(path)).await??;
    let mut line = serde_json::to_vec(&Hello { outrigger: 1, namespace: &name.namespace, name: &name.name })?;
    line.push(b'\n');
    timeout(ANSWER_MAX, stream.async_io(Interest::WRITABLE, || send(&stream, &line, listener))).await??;
    let mut reader = BufReader::new(stream);
    let mut answer = String::new();
    let mut bounded = (&mut reader).take(ANSWER_BYTES_MAX);
    let read = bounded.read_line(&mut answer);
    // Nothing is lost with a cancelled read: the connection is given up with it.
    if timeout(ANSWER_MAX, read).await?? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    match serde_json::from_str(&answer)? {
        Answer::Ok(enrolled) => Ok((reader, enrolled)),
        Answer::Error(refused) => Err(io::Error::other(format!("{}; {}", refused.text, refused.remedy))),
    }
}

fn send(stream: &UnixStream, line: &[u8], listener: &OwnedFd) -> io::Result<()> {
    let descriptors = [listener.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(line)], &mut ancillary, SendFlags::NOSIGNAL)?;
    // The line is far smaller than any socket's buffer.
    if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// The agent says nothing more; the end of the stream is its end. To wait for it is what the connection is for.
async fn until_closed(mut stream: BufReader<UnixStream>) {
    let mut ignored = [0; 64];
    while matches!(stream.read(&mut ignored).await, Ok(read) if read > 0) {}
}

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
const ANSWER_MAX: Duration = Duration::from_secs(5);
const ANSWER_BYTES_MAX: u64 = 64 * 1024;
