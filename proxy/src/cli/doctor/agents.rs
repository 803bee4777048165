//! Does every node on which one is wanted have an agent that is ready, and does its kubelet know the driver? Pure: objects as the
//! API server has them go in.
//!
//! The status of the DaemonSet alone does not say: it counts the nodes on which a pod is wanted, and a selector or a taint that
//! leaves all of them out makes "0 of 0" of that.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::storage::v1::CSINode;
use kube::ResourceExt;

use super::super::install::manifest::NAMESPACE;
use super::Finding;
use super::cluster::list;
use super::wanted::Wanted;
use crate::model::marks::DRIVER;

/// What is to be said of the `agents`; `why` tells what keeps those that do not run, where they say it.
pub(super) fn look(wanted: &Wanted, agents: &[Pod], why: &str) -> Vec<Finding> {
    let Wanted { on: nodes, left_out } = wanted;
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
    if !left_out.is_empty() {
        let text = format!(
            "the DaemonSet leaves {} out, by its node selector or for want of a toleration: a pod with a sidecar does not start there",
            list(left_out)
        );
        findings.push(Finding::ok("agents", text));
    }
    findings
}

/// What is to be said of the kubelets that know the driver.
pub(super) fn driver(wanted: &Wanted, kubelets: &[CSINode]) -> Vec<Finding> {
    let knows = |kubelet: &CSINode| kubelet.spec.drivers.iter().any(|driver| driver.name == DRIVER);
    let asked = kubelets.iter().filter(|kubelet| wanted.on.contains(&kubelet.name_any()));
    let (with, without): (Vec<&CSINode>, Vec<&CSINode>) = asked.partition(|kubelet| knows(kubelet));
    if without.is_empty() {
        return vec![Finding::ok("driver", format!("the kubelets of {} nodes know {DRIVER}", with.len()))];
    }
    let names: Vec<String> = without.into_iter().map(ResourceExt::name_any).collect();
    let text = format!("the kubelets of {} do not know {DRIVER}: pods that start there wait", list(&names));
    let remedy = "see that the agent runs there, and that kubeletDir (--kubelet-dir) is the kubelet's own";
    vec![Finding::fail("driver", text, remedy)]
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::Verdict;
    use super::*;

    fn agent(node: &str, ready: &str) -> Pod {
        let status = json!({ "conditions": [{ "type": "Ready", "status": ready }] });
        let spec = json!({ "nodeName": node, "containers": [{ "name": "node" }] });
        serde_json::from_value(json!({ "metadata": { "name": "node-1" }, "spec": spec, "status": status })).unwrap()
    }

    fn wanted(left_out: &[&str]) -> Wanted {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Wanted { on: names(&["a", "b"]), left_out: names(left_out) }
    }

    #[track_caller]
    fn check(agents: &[Pod], expected: &[(Verdict, &str)]) {
        let found = look(&wanted(&[]), agents, "; node-1: no room");
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

    #[test]
    fn a_node_that_the_daemon_set_leaves_out_is_told_and_is_no_failure() {
        let found = look(&wanted(&["c", "d"]), &[agent("a", "True"), agent("b", "True")], "");
        let found: Vec<_> = found.iter().map(|finding| (finding.verdict, finding.text.as_str())).collect();
        let told = "the DaemonSet leaves c, d out, by its node selector or for want of a toleration: a pod with a sidecar does not start there";
        assert_eq!(found, [(Verdict::Ok, "2 of 2 nodes have theirs"), (Verdict::Ok, told)]);
    }

    #[test]
    fn a_kubelet_has_to_know_the_driver_where_an_agent_is_wanted() {
        let kubelet = |node: &str, drivers: &[&str]| -> CSINode {
            let drivers: Vec<_> = drivers.iter().map(|name| json!({ "name": name, "nodeID": node })).collect();
            serde_json::from_value(json!({ "metadata": { "name": node }, "spec": { "drivers": drivers } })).unwrap()
        };
        let told = |kubelets: &[CSINode]| {
            let found = driver(&wanted(&["c"]), kubelets).remove(0);
            (found.verdict, found.text)
        };
        let (a, c) = (kubelet("a", &["other.example", DRIVER]), kubelet("c", &[]));
        let well = "the kubelets of 2 nodes know csi.outrigger.dev".to_owned();
        assert_eq!(told(&[a.clone(), kubelet("b", &[DRIVER]), c.clone()]), (Verdict::Ok, well));
        let ill = "the kubelets of b do not know csi.outrigger.dev: pods that start there wait".to_owned();
        assert_eq!(told(&[a, kubelet("b", &["other.example"]), c]), (Verdict::Fail, ill));
    }
}
