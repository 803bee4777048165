//! Is the mesh's authority still the one that the node agents joined? Pure: what the API server tells of the Secret, of the root
//! that everybody is told, and of the agents goes in. The Secret's key is not asked for.
//!
//! An agent reads the root when it starts. A control plane that finds no Secret makes another authority, whose certificate no
//! agent of before takes: identities of pods are signed no more, and no new pod starts.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::ResourceExt;

use super::super::install::manifest::NAMESPACE;
use super::Finding;
use super::cluster::list;
use crate::control::cluster::root::{MANAGER, SECRET};

/// What the API server tells of the Secret.
pub(super) enum Told {
    Absent,
    /// With when it was made.
    There(Option<Time>),
    /// This user may not ask.
    Unknown,
}

/// What is to be said of it. `root` is the ConfigMap, `agents` the pods of the node agents.
pub(super) fn look(secret: &Told, root: Option<&ObjectMeta>, agents: &[Pod]) -> Vec<Finding> {
    let made = match secret {
        Told::Absent => {
            let text =
                format!("the Secret {SECRET} is gone: the next replica of the control plane that starts makes another authority");
            let remedy = format!(
                "write it again from a copy, before a replica starts; without one, kubectl -n {NAMESPACE} rollout restart \
                 deployment/control, and when that is done daemonset/node"
            );
            return vec![Finding::fail(CHECK, text, remedy)];
        }
        Told::Unknown => return Vec::new(),
        Told::There(made) => made.as_ref(),
    };
    // A Secret that was written again from a copy is younger than its root, and a ConfigMap may be written for other reasons.
    let Some(since) = made.min(root.and_then(written)) else { return Vec::new() };
    let former: Vec<String> =
        agents.iter().filter(|agent| started(agent).is_some_and(|at| at < since)).map(ResourceExt::name_any).collect();
    if former.is_empty() {
        return vec![Finding::ok(CHECK, "every node agent started since its root was made")];
    }
    let text =
        format!("it was made anew, and {} started before: they take no certificate of its, and no new pod starts", list(&former));
    vec![Finding::fail(CHECK, text, format!("kubectl -n {NAMESPACE} rollout restart daemonset/node"))]
}

/// When the control plane last wrote another root.
fn written(config: &ObjectMeta) -> Option<&Time> {
    let entries = config.managed_fields.iter().flatten();
    entries.filter(|entry| entry.manager.as_deref() == Some(MANAGER)).filter_map(|entry| entry.time.as_ref()).max()
}

/// Since when the agent's process runs.
fn started(pod: &Pod) -> Option<&Time> {
    let statuses = pod.status.as_ref()?.container_statuses.iter().flatten();
    statuses.filter_map(|one| one.state.as_ref()?.running.as_ref()?.started_at.as_ref()).min()
}

const CHECK: &str = "authority";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::Verdict;
    use super::*;
    use crate::control::cluster::root::CONFIG;

    const AT: [&str; 3] = ["2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z", "2026-01-01T00:02:00Z"];

    /// The Secret made, the ConfigMap written, the agent started at these minutes.
    fn told(made: usize, written: usize, started: usize) -> Vec<Finding> {
        let made = serde_json::from_value(json!(AT[made])).unwrap();
        look(&Told::There(made), Some(&config(written)), &[agent(started)])
    }

    fn config(written: usize) -> ObjectMeta {
        // Who else wrote something there says nothing of the root.
        let other = json!({ "manager": "kubectl", "operation": "Update", "time": "2026-01-02T00:00:00Z" });
        let own = json!({ "manager": MANAGER, "operation": "Apply", "time": AT[written] });
        serde_json::from_value(json!({ "name": CONFIG, "managedFields": [own, other] })).unwrap()
    }

    fn agent(started: usize) -> Pod {
        let running = json!({ "running": { "startedAt": AT[started] } });
        let status = json!({ "name": "node", "image": "i", "imageID": "", "ready": true, "restartCount": 0, "state": running });
        serde_json::from_value(json!({ "metadata": { "name": "node-1" }, "status": { "containerStatuses": [status] } })).unwrap()
    }

    fn is_well(findings: &[Finding]) -> bool {
        findings.iter().all(|finding| finding.verdict == Verdict::Ok)
    }

    #[test]
    fn an_agent_that_started_before_the_authority_was_made_anew_is_told_with_what_mends_it() {
        let found = told(1, 1, 0);
        let text = "it was made anew, and node-1 started before: they take no certificate of its, and no new pod starts";
        assert_eq!((found.len(), found[0].text.as_str()), (1, text));
        assert_eq!(found[0].remedy.as_deref(), Some("kubectl -n outrigger-system rollout restart daemonset/node"));
        assert!(is_well(&told(1, 1, 2)), "it was restarted");
        assert!(is_well(&told(0, 0, 0)), "all began together");
    }

    #[test]
    fn a_secret_that_was_written_again_from_a_copy_is_no_other_authority() {
        assert!(is_well(&told(2, 0, 1)));
        assert!(is_well(&told(0, 2, 1)), "the ConfigMap was written anew, of the same Secret");
    }

    #[test]
    fn a_secret_that_is_gone_is_told_before_the_control_plane_starts_anew() {
        let found = look(&Told::Absent, Some(&config(0)), &[agent(1)]);
        assert_eq!((found.len(), found[0].verdict), (1, Verdict::Fail));
        assert!(found[0].text.starts_with("the Secret outrigger-ca is gone"), "{}", found[0].text);
        assert_eq!(look(&Told::Unknown, Some(&config(0)), &[agent(1)]), []);
    }
}
