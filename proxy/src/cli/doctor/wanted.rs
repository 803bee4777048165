//! On which nodes agents are wanted: all that run Linux, but for those that the DaemonSet leaves out by its own node selector and
//! tolerations. Pure: objects as the API server has them go in.
//!
//! Sources: Kubernetes, "Assigning Pods to Nodes", "Taints and Tolerations", "DaemonSet".
//!
//! Invariant: a node on which pods with sidecars run is not left out, whatever the DaemonSet says.

use std::collections::BTreeSet;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, Pod, PodSpec, Taint, Toleration};
use kube::ResourceExt;

/// Nodes by their names.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct Wanted {
    pub(super) on: Vec<String>,
    pub(super) left_out: Vec<String>,
}

impl Wanted {
    /// Sorts the `nodes`. Those with one of the `agents` or a pod that is `meshed` are not left out.
    pub(super) fn of(nodes: &[Node], set: Option<&DaemonSet>, agents: &[Pod], meshed: &[Pod]) -> Self {
        let spec = set.and_then(|set| set.spec.as_ref()?.template.spec.as_ref());
        let serving: BTreeSet<&str> =
            agents.iter().chain(meshed.iter().filter(|pod| !has_ended(pod))).filter_map(node_of).collect();
        let is_left_out = |node: &&Node| {
            let name = node.metadata.name.as_deref().unwrap_or_default();
            !serving.contains(name) && spec.is_some_and(|spec| !takes(spec, node))
        };
        let (left_out, on): (Vec<&Node>, Vec<&Node>) = nodes.iter().filter(|node| is_linux(node)).partition(is_left_out);
        let names = |nodes: Vec<&Node>| nodes.into_iter().map(ResourceExt::name_any).collect();
        // Agents that are wanted nowhere are a slip, and no mesh.
        if on.is_empty() {
            return Self { on: names(left_out), left_out: Vec::new() };
        }
        Self { on: names(on), left_out: names(left_out) }
    }
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// Others have no programs in their kernels.
fn is_linux(node: &Node) -> bool {
    let info = node.status.as_ref().and_then(|status| status.node_info.as_ref());
    info.is_none_or(|info| info.operating_system.is_empty() || info.operating_system == "linux")
}

/// Would the DaemonSet's pods, as they are written, be put onto this node?
fn takes(agents: &PodSpec, node: &Node) -> bool {
    let mut selected = agents.node_selector.iter().flatten();
    let tolerations = agents.tolerations.as_deref().unwrap_or_default();
    let mut taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    selected.all(|(label, value)| node.labels().get(label) == Some(value))
        && taints.all(|taint| !keeps_away(taint) || tolerations.iter().any(|toleration| tolerates(toleration, taint)))
}

/// What a node says of its own state passes, and is tolerated by the pods of a DaemonSet for the most part.
fn keeps_away(taint: &Taint) -> bool {
    matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute") && !taint.key.starts_with(STATE_OF_A_NODE)
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let said = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    if said(&toleration.effect).is_some_and(|effect| effect != taint.effect) {
        return false;
    }
    let is_key = said(&toleration.key).is_none_or(|key| key == taint.key);
    match said(&toleration.operator).as_deref() {
        Some("Exists") => is_key,
        None | Some("Equal") => {
            toleration.key.as_deref() == Some(&taint.key)
                && toleration.value.clone().unwrap_or_default() == taint.value.clone().unwrap_or_default()
        }
        Some(_other) => false,
    }
}

const STATE_OF_A_NODE: &str = "node.kubernetes.io/";

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(name: &str, labels: &Value, taints: &Value) -> Node {
        serde_json::from_value(json!({ "metadata": { "name": name, "labels": labels }, "spec": { "taints": taints } })).unwrap()
    }

    fn set(of_pods: &Value) -> DaemonSet {
        let mut spec = json!({ "containers": [] });
        json_patch::merge(&mut spec, of_pods);
        let spec = json!({ "selector": {}, "template": { "spec": spec } });
        serde_json::from_value(json!({ "metadata": { "name": "node" }, "spec": spec })).unwrap()
    }

    fn pod(node: &str, phase: &str) -> Pod {
        let spec = json!({ "nodeName": node, "containers": [] });
        serde_json::from_value(json!({ "metadata": { "name": "web" }, "spec": spec, "status": { "phase": phase } })).unwrap()
    }

    fn nodes() -> [Node; 3] {
        let taint = json!([{ "key": "gpu", "value": "yes", "effect": "NoSchedule" }]);
        let ill = json!([{ "key": "node.kubernetes.io/not-ready", "effect": "NoSchedule" }]);
        [
            node("a", &json!({ "mesh": "yes" }), &json!([])),
            node("b", &json!({ "mesh": "yes" }), &taint),
            node("c", &json!({}), &ill),
        ]
    }

    #[track_caller]
    fn check(of_pods: &Value, expected: [&[&str]; 2]) {
        let Wanted { on, left_out } = Wanted::of(&nodes(), Some(&set(of_pods)), &[], &[]);
        assert_eq!([on, left_out], expected.map(|names| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()));
    }

    #[test]
    fn nodes_are_left_out_by_the_selector_and_by_taints_that_nothing_tolerates() {
        let everything = json!([{ "operator": "Exists" }]);
        check(&json!({ "tolerations": everything }), [&["a", "b", "c"], &[]]);
        check(&json!({ "tolerations": everything, "nodeSelector": { "mesh": "yes" } }), [&["a", "b"], &["c"]]);
        check(&json!({}), [&["a", "c"], &["b"]]);
        for tolerated in [
            json!({ "key": "gpu", "operator": "Exists" }),
            json!({ "key": "gpu", "value": "yes" }),
            json!({ "key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule" }),
        ] {
            check(&json!({ "tolerations": [tolerated] }), [&["a", "b", "c"], &[]]);
        }
        for other in [
            json!({ "key": "gpu", "value": "no" }),
            json!({ "key": "cpu", "operator": "Exists" }),
            json!({ "key": "gpu", "operator": "Exists", "effect": "NoExecute" }),
        ] {
            check(&json!({ "tolerations": [other] }), [&["a", "c"], &["b"]]);
        }
    }

    #[test]
    fn a_selector_that_leaves_out_every_node_leaves_out_none() {
        check(&json!({ "nodeSelector": { "mesh": "no" } }), [&["a", "b", "c"], &[]]);
    }

    #[test]
    fn a_node_with_pods_of_the_mesh_or_an_agent_is_not_left_out() {
        let set = set(&json!({ "nodeSelector": { "mesh": "yes" }, "tolerations": [{ "operator": "Exists" }] }));
        let left_out = |agents: &[Pod], meshed: &[Pod]| Wanted::of(&nodes(), Some(&set), agents, meshed).left_out;
        assert_eq!(left_out(&[], &[pod("a", "Running")]), ["c"]);
        assert_eq!(left_out(&[], &[pod("c", "Succeeded"), pod("c", "Failed")]), ["c"]);
        assert!(left_out(&[], &[pod("c", "Pending")]).is_empty());
        assert!(left_out(&[pod("c", "Running")], &[]).is_empty());
    }

    #[test]
    fn without_a_daemon_set_agents_are_wanted_on_every_node_with_linux() {
        assert!(Wanted::of(&nodes(), None, &[], &[]).left_out.is_empty());
        let info: Value =
            ["architecture", "bootID", "containerRuntimeVersion", "kernelVersion", "kubeProxyVersion", "kubeletVersion"]
                .into_iter()
                .chain(["machineID", "osImage", "systemUUID"])
                .map(|field| (field.to_owned(), json!("")))
                .chain([("operatingSystem".to_owned(), json!("windows"))])
                .collect();
        let windows = json!({ "metadata": { "name": "w" }, "status": { "nodeInfo": info } });
        let [a, ..] = nodes();
        let all = [a, serde_json::from_value(windows).unwrap()];
        assert_eq!(Wanted::of(&all, None, &[], &[]).on, ["a"]);
    }
}
