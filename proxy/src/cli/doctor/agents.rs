//! Does every node have an agent that is ready? Pure: nodes and pods as the API server has them go in.
//!
//! The status of the DaemonSet alone does not say: it counts the nodes on which a pod is wanted, and a selector or a taint that
//! leaves all of them out makes "0 of 0" of that.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;

use super::super::install::manifest::NAMESPACE;
use super::Finding;
use super::cluster::list;

/// What is to be said of the `agents` of `nodes`; `why` tells what keeps those that do not run, where they say it.
pub(super) fn look(nodes: &[Node], agents: &[Pod], why: &str) -> Vec<Finding> {
    let nodes: Vec<String> = nodes.iter().filter(|node| is_linux(node)).map(ResourceExt::name_any).collect();
    let mut on: BTreeMap<&str, bool> = BTreeMap::new();
    for agent in agents.iter().filter(|agent| agent.metadata.deletion_timestamp.is_none()) {
        let Some(node) = agent.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) else { continue };
        *on.entry(node).or_default() |= is_ready(agent);
    }
    let (there, lacking): (Vec<String>, Vec<String>) = nodes.iter().cloned().partition(|node| on.contains_key(node.as_str()));
    let (ready, unready): (Vec<String>, Vec<String>) = there.into_iter().partition(|node| on.get(node.as_str()) == Some(&true));
    let mut findings = Vec::new();
    if !lacking.is_empty() {
        let text = if lacking.len() == nodes.len() {
            format!("no node has one: no pod with a sidecar starts{why}")
        } else {
            format!("{} have none: pods with sidecars that start there wait{why}", list(&lacking))
        };
        let remedy = format!(
            "kubectl -n {NAMESPACE} describe daemonset node: see its node selector and tolerations (node.nodeSelector, node.tolerations \
             of the chart), and its events"
        );
        findings.push(Finding::fail("agents", text, remedy));
    }
    if !unready.is_empty() {
        let text = format!(
            "{} of {} nodes have one that is ready; that of {} is not, and pods with sidecars that start there wait{why}",
            ready.len(),
            nodes.len(),
            list(&unready)
        );
        let remedy = format!("kubectl -n {NAMESPACE} describe daemonset node; kubectl -n {NAMESPACE} logs daemonset/node");
        findings.push(Finding::fail("agents", text, remedy));
    }
    if findings.is_empty() {
        findings.push(Finding::ok("agents", format!("{} of {} nodes have theirs", ready.len(), nodes.len())));
    }
    findings
}

/// Others have no programs in their kernels.
fn is_linux(node: &Node) -> bool {
    let info = node.status.as_ref().and_then(|status| status.node_info.as_ref());
    info.is_none_or(|info| info.operating_system.is_empty() || info.operating_system == "linux")
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::Verdict;
    use super::*;

    fn node(name: &str, system: &str) -> Node {
        let info: Value =
            ["architecture", "bootID", "containerRuntimeVersion", "kernelVersion", "kubeProxyVersion", "kubeletVersion"]
                .into_iter()
                .chain(["machineID", "osImage", "systemUUID"])
                .map(|field| (field.to_owned(), json!("")))
                .chain([("operatingSystem".to_owned(), json!(system))])
                .collect();
        serde_json::from_value(json!({ "metadata": { "name": name }, "status": { "nodeInfo": info } })).unwrap()
    }

    fn agent(node: &str, ready: &str) -> Pod {
        let status = json!({ "conditions": [{ "type": "Ready", "status": ready }] });
        let spec = json!({ "nodeName": node, "containers": [{ "name": "node" }] });
        serde_json::from_value(json!({ "metadata": { "name": "node-1" }, "spec": spec, "status": status })).unwrap()
    }

    #[track_caller]
    fn check(agents: &[Pod], expected: &[(Verdict, &str)]) {
        let nodes = [node("a", "linux"), node("b", "linux"), node("w", "windows")];
        let found = look(&nodes, agents, "; node-1: no room");
        let found: Vec<_> = found.iter().map(|finding| (finding.verdict, finding.text.as_str())).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn every_node_that_can_has_an_agent_that_is_ready() {
        check(&[agent("a", "True"), agent("b", "True")], &[(Verdict::Ok, "2 of 2 nodes have theirs")]);
    }

    #[test]
    fn a_daemon_set_without_pods_is_no_agents() {
        check(&[], &[(Verdict::Fail, "no node has one: no pod with a sidecar starts; node-1: no room")]);
    }

    #[test]
    fn a_node_without_an_agent_or_with_one_that_is_not_ready_is_named() {
        let none = "b have none: pods with sidecars that start there wait; node-1: no room";
        check(&[agent("a", "True")], &[(Verdict::Fail, none)]);
        let unready = "1 of 2 nodes have one that is ready; that of b is not, and pods with sidecars that start there wait; node-1: no room";
        check(&[agent("a", "True"), agent("b", "False")], &[(Verdict::Fail, unready)]);
        check(
            &[agent("b", "False")],
            &[
                (Verdict::Fail, "a have none: pods with sidecars that start there wait; node-1: no room"),
                (
                    Verdict::Fail,
                    "0 of 2 nodes have one that is ready; that of b is not, and pods with sidecars that start there wait; node-1: no room",
                ),
            ],
        );
    }

    #[test]
    fn an_agent_on_its_way_out_is_none() {
        let mut leaving = agent("b", "True");
        leaving.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        let none = "b have none: pods with sidecars that start there wait; node-1: no room";
        check(&[agent("a", "True"), leaving], &[(Verdict::Fail, none)]);
    }
}
