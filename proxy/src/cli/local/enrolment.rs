//! Waiting for the node agent to enrol a pod that `run` has described.

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;

use super::super::Failure;
use super::super::patience::{Part, Patience};
use super::places;
use super::pod::{LocalPod, cannot};
use crate::base::handover::{self, Answer, Purpose, Question};
use crate::base::names::Named;
use crate::node::netns;

/// How long the agent may take.
pub(super) const AT_MOST: Duration = Duration::from_secs(12);

/// Returns when the pod is enrolled. An agent that is being started again is waited for. Cancel-safe.
///
/// A socket of the pod's goes with the question: by it the agent knows the pod's network namespace, and need not enter it.
///
/// # Errors
/// It cannot be enrolled, or nobody does it.
pub(super) async fn wait_for(pod: &LocalPod) -> Result<(), Failure> {
    let witness = netns::inside(&pod.netns, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)));
    let witness = witness.map_err(|error| cannot("make a socket in the pod's network namespace", &error))?;
    // Who may not look at the mesh's lock does not know of a supervisor.
    ask(&places::node_socket(), &pod.record.named(), &witness, || places::is_up().unwrap_or(false)).await
}

async fn ask(socket: &Path, pod: &Named, witness: &UdpSocket, is_supervised: impl Fn() -> bool) -> Result<(), Failure> {
    let asked = || async {
        let stream = UnixStream::connect(socket).await?;
        handover::send(&stream, &Question::new(pod, Purpose::Wait), &[witness.as_fd()]).await?;
        let (line, _none) = handover::receive(&stream).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok::<Answer, io::Error>(serde_json::from_slice(&line)?)
    };
    let not_answering = |why: String| {
        Failure::environment(
            format!("the node agent did not enrol the pod: {why}"),
            "look into the log folder of the mesh's state, file node.log",
        )
    };
    let mut patience = Patience::with(Part::Node);
    loop {
        match tokio::time::timeout(AT_MOST, asked()).await {
            Ok(Ok(Answer::Ok { .. })) => return Ok(()),
            Ok(Ok(Answer::Error { text, remedy })) => return Err(Failure::environment(text, remedy)),
            Ok(Ok(other)) => return Err(not_answering(format!("it answers {other:?}"))),
            Ok(Err(error)) => {
                if !is_away(&error) || !is_supervised() || !patience.wait().await {
                    return Err(not_answering(error.to_string()));
                }
            }
            Err(_elapsed) => return Err(not_answering("it does not answer".to_owned())),
        }
    }
}

/// Nobody listens, or who did ended before it answered.
fn is_away(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
    matches!(error.kind(), NotFound | ConnectionRefused | ConnectionReset | BrokenPipe | UnexpectedEof)
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    fn witness() -> UdpSocket {
        UdpSocket::bind("127.0.0.1:0").unwrap()
    }

    async fn answer(listener: &UnixListener, answer: Option<&Answer>) {
        let (stream, _) = listener.accept().await.unwrap();
        handover::receive(&stream).await.unwrap();
        if let Some(answer) = answer {
            handover::send(&stream, answer, &[]).await.unwrap();
        }
    }

    #[tokio::test]
    async fn an_agent_that_ends_before_it_answers_is_waited_for_until_it_is_back() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("node.sock");
        let first = UnixListener::bind(&socket).unwrap();
        let agent = async {
            answer(&first, None).await;
            drop(first);
            // Its socket is refused, then it is gone, then the next one's is there.
            tokio::time::sleep(Duration::from_millis(70)).await;
            std::fs::remove_file(&socket).unwrap();
            tokio::time::sleep(Duration::from_millis(70)).await;
            let next = UnixListener::bind(&socket).unwrap();
            let enrolled = Answer::Ok { spiffe_id: "spiffe://t/x".into(), addresses: Vec::new(), capture: "ebpf".into() };
            answer(&next, Some(&enrolled)).await;
        };
        let (pod, witness) = ("shop/web".parse().unwrap(), witness());
        let (asked, ()) = tokio::join!(ask(&socket, &pod, &witness, || true), agent);
        asked.unwrap();
    }

    #[tokio::test]
    async fn nobody_is_waited_for_where_no_mesh_is_up_or_the_agent_says_no() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("node.sock");
        let (pod, witness) = ("shop/web".parse().unwrap(), witness());
        let told = format!("{:?}", ask(&socket, &pod, &witness, || false).await.unwrap_err());
        assert!(told.contains("did not enrol the pod: No such file"), "{told}");
        let listener = UnixListener::bind(&socket).unwrap();
        let no = Answer::Error { text: "no room".into(), remedy: "make some".into() };
        let (asked, ()) = tokio::join!(ask(&socket, &pod, &witness, || true), answer(&listener, Some(&no)));
        assert!(format!("{:?}", asked.unwrap_err()).contains("no room"));
    }
}
