//! A pod is closed when the kubelet asks for its volume: who has one asks for a sidecar, whatever the API server has said so far.
//!
//! Source: `Kubelet.SyncPod` (pkg/kubelet/kubelet.go of Kubernetes 1.36): the kubelet makes the pod's cgroup, then waits for the
//! pod's volumes, and only then lets the runtime make its sandbox. It asks for the volumes in another loop, which may be ahead of
//! the cgroup for a moment, or for longer where the node's network is not ready. So the answer waits for the cgroup, and the
//! sandbox for the answer. Invariant: a pod with a volume of ours runs nothing before it is closed.

use std::path::PathBuf;
use std::time::Duration;

use super::volume::Owner;
use super::{cgroup, quarantine};
use crate::node::Agent;
use crate::node::kernel::KernelError;

/// Why a pod is not closed. It is not started then, and the kubelet asks again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unclosed {
    /// The environment.
    #[error(
        "the kubelet has made no cgroup of the pod below {root} within {} s; is the node's cgroup2 hierarchy mounted there?",
        MADE_WITHIN.as_secs()
    )]
    NoCgroup { root: String },
    /// The environment.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// Closes the pod, unless it is captured already. Idempotent. Cancel-safe: nothing is lost but the closing.
pub(super) async fn close(agent: &Agent, owner: &Owner) -> Result<(), Unclosed> {
    // On a rung without programs nothing closes pods.
    let Some(kernel) = agent.capture.kernel() else { return Ok(()) };
    let folder = made(|| cgroup::folder_of(&owner.uid, &agent.cgroup_root)).await;
    let folder = folder.ok_or_else(|| Unclosed::NoCgroup { root: agent.cgroup_root.display().to_string() })?;
    quarantine::close(agent, &kernel.lock(), owner, &folder)?;
    Ok(())
}

/// The pod's cgroup, as soon as there is one.
async fn made(find: impl Fn() -> Option<PathBuf>) -> Option<PathBuf> {
    let appeared = async {
        let mut looks = cgroup::LOOKS;
        loop {
            if let Some(folder) = find() {
                return folder;
            }
            tokio::time::sleep(looks.whole()).await;
        }
    };
    tokio::time::timeout(MADE_WITHIN, appeared).await.ok()
}

/// Less than the two minutes after which the kubelet gives up a call (`csiTimeout`): it would wait ever longer until the next one.
const MADE_WITHIN: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tokio::time::Instant;

    use super::*;

    const UID: &str = "6f1c2c3e-8a7e-4f5b-9a40-0d8a9d0f2b11";
    const FOLDER: &str = "kubepods/burstable/pod6f1c2c3e-8a7e-4f5b-9a40-0d8a9d0f2b11";

    async fn found(root: &Path) -> Option<PathBuf> {
        made(|| cgroup::folder_of(UID, root)).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_cgroup_that_is_there_is_not_waited_for() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join(FOLDER)).unwrap();
        let asked = Instant::now();
        assert_eq!(found(root.path()).await, Some(root.path().join(FOLDER)));
        assert_eq!(asked.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cgroup_that_comes_after_the_question_is_found_at_once_early_on_and_soon_later() {
        for (after_ms, late_ms_max) in [(3, 5), (20, 20), (8_000, 100)] {
            let root = tempfile::tempdir().unwrap();
            let folder = root.path().join(FOLDER);
            let (asked, after) = (Instant::now(), Duration::from_millis(after_ms));
            let making = async {
                tokio::time::sleep(after).await;
                // Another pod's is none.
                std::fs::create_dir_all(root.path().join("kubepods/besteffort/pod0a-1")).unwrap();
                std::fs::create_dir_all(&folder).unwrap();
            };
            let (found, ()) = tokio::join!(found(root.path()), making);
            assert_eq!(found, Some(folder));
            let late = asked.elapsed() - after;
            assert!(late <= Duration::from_millis(late_ms_max), "{late:?} after it was made");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_cgroup_that_never_comes_is_an_answer_before_the_kubelet_gives_up() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(found(root.path()).await, None);
        let refused = Unclosed::NoCgroup { root: "/sys/fs/cgroup".to_owned() }.to_string();
        assert!(refused.starts_with("the kubelet has made no cgroup of the pod below /sys/fs/cgroup within 30 s; "), "{refused}");
    }
}
