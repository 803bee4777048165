//! The enrolment protocol: one line of JSON each way over a Unix socket, with descriptors beside it (`SCM_RIGHTS`,
//! unix(7)).
//!
//! A sidecar, and whoever starts one, ask; the node agent answers. What a question says of its sender is only compared
//! with what the kernel says of it. One thing the agent says unasked: [`Answer::Prove`], to a sidecar that is enrolled.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::names::Named;

/// The version that is spoken here.
pub(crate) const VERSION: u32 = 1;

/// Of a token, see [`Purpose::Dial`].
pub(crate) const TOKEN_LETTERS: usize = 32;

/// What is asked.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Question {
    /// The protocol's version, see [`VERSION`].
    pub(crate) outrigger: u32,
    pub(crate) namespace: String,
    pub(crate) name: String,
    #[serde(default, skip_serializing_if = "Purpose::is_enrol")]
    pub(crate) purpose: Purpose,
    /// What the agent shows where it dials the pod, see [`Purpose::Dial`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) token: Option<String>,
    /// What did not come to the sidecar, see [`Purpose::Told`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) faults: Vec<String>,
}

/// What a question is for.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Purpose {
    /// Put the listeners that come with it in force. The connection that asked stands for the sidecar's life.
    #[default]
    Enrol,
    /// Give back the listeners that are kept for this sidecar's pod. They come with the answer.
    Resume,
    /// Only tell when the pod is enrolled: asked by who starts the sidecar, with a socket of the pod's network namespace.
    Wait,
    /// Dial the pod, and show the token there: asked by a sidecar that looks whether what is dialled comes to it.
    Dial,
    /// Hear what came of a sidecar's probes.
    Told,
    /// Tell whether containers of the pod's application run: asked by its sidecar, which is to end after them.
    Last,
    /// Have every sidecar probe now, and tell when they have: asked by root.
    Prove,
}

/// What the agent answers.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Answer {
    /// The pod is enrolled, and what came with the question is in force.
    #[serde(rename_all = "camelCase")]
    Ok { spiffe_id: String, addresses: Vec<IpAddr>, capture: String },
    /// The pod was dialled.
    Dialled {
        /// Where that came to nothing, and why.
        unreached: Vec<String>,
        /// What of the kernel programs that bear upon the pod is not attached.
        faults: Vec<String>,
    },
    /// Does the pod's application run?
    #[serde(rename_all = "camelCase")]
    Last { app_runs: bool },
    /// It was heard, or done.
    Heard,
    /// Probe now, before it is due.
    Prove,
    /// Nothing was changed.
    Error { text: String, remedy: String },
}

impl Question {
    /// About the pod `name`.
    pub(crate) fn new(name: &Named, purpose: Purpose) -> Self {
        let (namespace, name) = (name.namespace.to_string(), name.name.to_string());
        Self { outrigger: VERSION, namespace, name, purpose, token: None, faults: Vec::new() }
    }
}

impl Purpose {
    fn is_enrol(&self) -> bool {
        *self == Self::Enrol
    }
}

/// Sends one message. Cancelling may have sent it.
///
/// # Errors
/// The other side is gone, or does not read.
pub(crate) async fn send(stream: &UnixStream, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.async_io(Interest::WRITABLE, || transmit(stream, &line, descriptors)).await
}

/// Sends one message without descriptors, now or not at all.
///
/// # Errors
/// The other side is gone, or its buffer is full.
pub(crate) fn try_send(stream: &UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    transmit(stream, &line, &[])
}

/// Returns when something of the next message is there, or the other side has closed. Nothing is read. Cancel-safe.
///
/// # Errors
/// The connection failed.
pub(crate) async fn begun(stream: &UnixStream) -> io::Result<()> {
    let look = || Ok(rustix::net::recv(stream, &mut [0], RecvFlags::PEEK)?);
    stream.async_io(Interest::READABLE, look).await.map(drop)
}

/// One line and the descriptors that came with it; `None` when the other side closed. Cancelling loses what was read.
///
/// # Errors
/// The other side ended in the middle of a line, or sent more than one message may hold.
pub(crate) async fn receive(stream: &UnixStream) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let (mut line, mut descriptors) = (Vec::new(), Vec::new());
    loop {
        // On the heap: it would be a large part of whatever future waits for this.
        let mut chunk = vec![0; LINE_MAX];
        let (count, mut received) = stream.async_io(Interest::READABLE, || take(stream, &mut chunk)).await?;
        descriptors.append(&mut received);
        line.extend_from_slice(chunk.get(..count).unwrap_or_default());
        if count == 0 {
            return if line.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        if line.len() > LINE_MAX || descriptors.len() > DESCRIPTORS_MAX {
            return Err(io::Error::other("the message is too long"));
        }
        if line.last() == Some(&b'\n') {
            return Ok(Some((line, descriptors)));
        }
    }
}

fn transmit(socket: impl AsFd, line: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?;
    // The line is far smaller than any socket's buffer.
    if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

fn take(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
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
        return Err(io::Error::other("more descriptors came with the message than it may have, or than this process can open"));
    }
    Ok((received.bytes, descriptors))
}

const LINE_MAX: usize = 4096;
const DESCRIPTORS_MAX: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_written_as_the_protocol_says() {
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
        let asked = |purpose| serde_json::to_string(&Question::new(&Named::new("shop", "web-1"), purpose)).unwrap();
        assert_eq!(asked(Purpose::Enrol), r#"{"outrigger":1,"namespace":"shop","name":"web-1"}"#);
        assert_eq!(asked(Purpose::Resume), r#"{"outrigger":1,"namespace":"shop","name":"web-1","purpose":"resume"}"#);
        let dial = Question { token: Some("7f".into()), ..Question::new(&Named::new("shop", "web-1"), Purpose::Dial) };
        assert_eq!(
            serde_json::to_string(&dial).unwrap(),
            r#"{"outrigger":1,"namespace":"shop","name":"web-1","purpose":"dial","token":"7f"}"#
        );
        assert_eq!(serde_json::to_string(&Answer::Prove).unwrap(), r#""prove""#);
        let dialled = Answer::Dialled { unreached: vec!["10.64.0.5:14007: refused".into()], faults: Vec::new() };
        assert_eq!(
            serde_json::to_string(&dialled).unwrap(),
            r#"{"dialled":{"unreached":["10.64.0.5:14007: refused"],"faults":[]}}"#
        );
        let question: Question = serde_json::from_str(&asked(Purpose::Enrol)).unwrap();
        assert_eq!(question.purpose, Purpose::Enrol);
    }

    #[tokio::test]
    async fn a_message_arrives_with_its_descriptors() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        send(&theirs, &7, &[listener.as_fd(), listener.as_fd()]).await.unwrap();
        let (line, descriptors) = receive(&ours).await.unwrap().unwrap();
        assert_eq!((line.as_slice(), descriptors.len()), (b"7\n".as_slice(), 2));
        let copy = std::net::TcpListener::from(descriptors.into_iter().next().unwrap());
        assert_eq!(copy.local_addr().unwrap(), listener.local_addr().unwrap());
        drop(theirs);
        assert!(receive(&ours).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_message_may_arrive_in_pieces() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        transmit(&theirs, b"{\"outrigger\"", &[listener.as_fd()]).unwrap();
        let read = tokio::spawn(async move { receive(&ours).await });
        tokio::task::yield_now().await;
        transmit(&theirs, b":1}\n", &[]).unwrap();
        let (line, descriptors) = read.await.unwrap().unwrap().unwrap();
        assert_eq!((line.as_slice(), descriptors.len()), (b"{\"outrigger\":1}\n".as_slice(), 1));
    }

    #[tokio::test]
    async fn more_than_a_message_may_hold_is_refused() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        transmit(&theirs, &[b'x'; LINE_MAX + 1], &[]).unwrap();
        assert_eq!(receive(&ours).await.unwrap_err().to_string(), "the message is too long");
        // Also one that ends.
        let (ours, theirs) = UnixStream::pair().unwrap();
        let whole: Vec<u8> = std::iter::repeat_n(b'x', LINE_MAX + 1).chain([b'\n']).collect();
        transmit(&theirs, &whole, &[]).unwrap();
        assert_eq!(receive(&ours).await.unwrap_err().to_string(), "the message is too long");
        let (ours, theirs) = UnixStream::pair().unwrap();
        transmit(&theirs, b"{", &[]).unwrap();
        drop(theirs);
        assert_eq!(receive(&ours).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
