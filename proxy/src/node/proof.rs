//! What the sidecars prove of capture: that what their app dials, and what others dial at their pod, comes to them.
//!
//! A sidecar probes both ways (`dataplane/probe.rs`) and says what came of it on its enrolment connection, which nobody else
//! has. The agent's part is the connections from outside: it dials the pod from the node and shows the token that it was given.
//! Only the sidecar knows that token, so only what arrives there counts.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use proxy_common::PORT_PROBE;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tracing::{error, info};

use super::Agent;
use super::pods::Pod;

/// What sidecars said last, by the cookie of their pod.
#[derive(Debug, Default)]
pub(crate) struct Proofs(BTreeMap<u64, Proof>);

#[derive(Debug)]
struct Proof {
    at: Instant,
    faults: Vec<String>,
}

/// For people.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Proven {
    pub(crate) seconds_ago: u64,
    /// Which connections did not come to the sidecar, each in a sentence; empty: all did.
    pub(crate) faults: Vec<String>,
}

impl Proofs {
    /// The pod is gone.
    pub(super) fn forget(&mut self, pod: u64) {
        self.0.remove(&pod);
    }

    pub(super) fn of(&self, pod: u64, now: Instant) -> Option<Proven> {
        let Proof { at, faults } = self.0.get(&pod)?;
        Some(Proven { seconds_ago: now.duration_since(*at).as_secs(), faults: faults.clone() })
    }

    /// Pods whose last probes did not all come through.
    pub(super) fn failing(&self) -> usize {
        self.0.values().filter(|proof| !proof.faults.is_empty()).count()
    }

    /// Was everything of these pods that is to be known said since `then`?
    fn are_since(&self, pods: impl IntoIterator<Item = u64>, then: Instant) -> bool {
        pods.into_iter().all(|pod| self.0.get(&pod).is_some_and(|proof| proof.at >= then))
    }
}

/// Dials each address of the pod and shows `token` there. Says where that came to nothing; that it did not says nothing yet.
pub(super) async fn dial(agent: &Agent, pod: &Pod, token: &str) -> Vec<String> {
    // Nobody closes it.
    let Ok(_place) = agent.dialling.acquire().await else { return Vec::new() };
    join_all(pod.record.addresses.iter().map(|address| show(*address, token))).await.into_iter().flatten().collect()
}

async fn show(address: IpAddr, token: &str) -> Option<String> {
    let to = SocketAddr::new(address, PORT_PROBE);
    let shown = async {
        let mut stream = TcpStream::connect(to).await?;
        stream.write_all(token.as_bytes()).await?;
        // The sidecar closes when it has read it, perhaps with a reset.
        drop(stream.read(&mut [0]).await);
        Ok::<_, std::io::Error>(())
    };
    match timeout(DIAL_AT_MOST, shown).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(format!("{to}: {error}")),
        Err(_elapsed) => Some(format!("{to}: no answer within {DIAL_AT_MOST:?}")),
    }
}

/// A sidecar says what came of its probes.
pub(super) fn told(agent: &Agent, pod: &Arc<Pod>, faults: Vec<String>) {
    let (name, outcome) = (pod.record.named(), if faults.is_empty() { "passed" } else { "failed" });
    agent.metrics.probes.with_label_values(&[outcome]).inc();
    let proof = Proof { at: Instant::now(), faults: faults.clone() };
    let before = agent.proofs.lock().0.insert(pod.record.netns_cookie, proof).map(|before| before.faults).unwrap_or_default();
    // Each once, not with every probe.
    for fault in faults.iter().filter(|fault| !before.contains(fault)) {
        error!(pod = %name, fault, "a probe of capture failed, the pod is not ready");
    }
    if faults.is_empty() && !before.is_empty() {
        info!(pod = %name, "the probes of capture come through again");
    }
    agent.proven.notify_waiters();
}

/// Has every sidecar that is there probe now, and waits until all of them have said what came of it, or for as long as that
/// may take.
pub(super) async fn prove_now(agent: &Agent) {
    let begun = Instant::now();
    agent.prove.send_modify(|round| *round += 1);
    let all_told = async {
        loop {
            // Before the look: what is told between it and the wait wakes it too.
            let mut told = std::pin::pin!(agent.proven.notified());
            told.as_mut().enable();
            let served: Vec<u64> = agent.keeper.lock().served().collect();
            if agent.proofs.lock().are_since(served, begun) {
                return;
            }
            told.await;
        }
    };
    // Who is late is told with what it said last.
    drop(timeout(PROVEN_AT_MOST, all_told).await);
}

/// Pods that are dialled at once, each at two addresses at most.
pub(super) const DIALLED_AT_ONCE: usize = 32;
const DIAL_AT_MOST: Duration = Duration::from_secs(2);
const PROVEN_AT_MOST: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_have_told_when_each_told_after_it_was_asked() {
        let (begin, mut proofs) = (Instant::now(), Proofs::default());
        let at = |second: u64| begin + Duration::from_secs(second);
        let mut tell = |pod, second, faults: &[&str]| {
            proofs.0.insert(pod, Proof { at: at(second), faults: faults.iter().map(|fault| (*fault).to_owned()).collect() });
        };
        tell(1, 0, &[]);
        tell(2, 10, &["outbound IPv4"]);
        assert!(proofs.are_since([1, 2], at(0)) && proofs.are_since([2], at(10)) && !proofs.are_since([1, 2], at(10)));
        assert!(!proofs.are_since([3], at(0)) && proofs.are_since([], at(20)));
        assert_eq!(proofs.failing(), 1);
        assert_eq!(proofs.of(2, at(12)).unwrap(), Proven { seconds_ago: 2, faults: vec!["outbound IPv4".to_owned()] });
        proofs.forget(2);
        assert_eq!((proofs.failing(), proofs.of(2, at(12))), (0, None));
    }

    #[tokio::test]
    async fn nobody_at_the_address_is_told() {
        let told = show("127.0.0.1".parse().unwrap(), "token").await.unwrap();
        assert!(told.starts_with("127.0.0.1:14007: Connection refused"), "{told}");
    }
}
