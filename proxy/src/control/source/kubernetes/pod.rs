//! What a pod is to the mesh: a Workload. Pure.
//!
//! Sources: Kubernetes API, PodSpec and PodStatus; "Pod lifecycle" (phases, conditions). A pod has a Workload from the moment
//! that it has a machine, before it has an address: its sidecar starts before the address is told, and asks for its
//! identity and its configuration at once. One whose containers have all ended has none: its address is another's by then.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Pod as Object, PodCondition, PodSpec};
use serde::Deserialize as _;
use serde_json::Value;

use crate::base::names::Named;
use crate::model::capture::{CaptureConfig, SIDECARS_PORTS};
use crate::model::marks;
use crate::model::object;
use crate::model::workload::{WorkloadPort, WorkloadSpec, WorkloadTransport};

/// What is kept of a pod.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Pod {
    pub(super) workload: object::Object<WorkloadSpec>,
    /// Another pod of the same name has another one.
    pub(super) uid: String,
    /// Its address is its machine's, which others have too.
    pub(super) is_in_hosts_network: bool,
    /// When it was made (RFC 3339), so that of two the newer is known.
    pub(super) created: String,
}

impl Pod {
    /// None: it is nowhere yet, or has ended, or it is no pod.
    pub(super) fn read(body: &Value) -> Option<Self> {
        let pod = Object::deserialize(body).ok()?;
        let is_meshed = marks::sidecar(&pod).is_some() && !pod.spec.as_ref().is_some_and(is_in_hosts_network);
        let finished = is_meshed && marks::app_has_ended(&pod);
        let Object { metadata, spec, status } = pod;
        let (spec, status) = (spec?, status.unwrap_or_default());
        if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            return None;
        }
        let node = spec.node_name.clone().filter(|node| !node.is_empty())?;
        let conditions = status.conditions.unwrap_or_default();
        let is_ready = is_met(&conditions, "Ready");
        let unheard = !is_ready && is_unheard(&spec, &conditions);
        let addresses = status.pod_ips.unwrap_or_default().into_iter().filter_map(|address| address.ip.parse().ok()).collect();
        let workload = WorkloadSpec {
            addresses,
            service_account: spec.service_account_name.clone().filter(|account| !account.is_empty()),
            ports: ports(&spec),
            transport: if is_meshed { WorkloadTransport::MutualTls } else { WorkloadTransport::Plaintext },
            terminating: metadata.deletion_timestamp.is_some(),
            finished,
            unready: !is_ready,
            unheard,
            node: Some(node),
        };
        let name = Named::new(metadata.namespace?, metadata.name?);
        let mut workload = object::Object::new(&name, metadata.labels.unwrap_or_default(), workload);
        if is_meshed {
            let mut annotations = metadata.annotations.unwrap_or_default();
            annotations.retain(|name, _text| CaptureConfig::ANNOTATIONS.contains(&name.as_str()));
            workload.metadata.annotations = annotations;
        }
        let created = metadata.creation_timestamp.map(|created| created.0.to_string()).unwrap_or_default();
        let uid = metadata.uid.unwrap_or_default();
        Some(Self { workload, uid, is_in_hosts_network: is_in_hosts_network(&spec), created })
    }
}

fn is_in_hosts_network(spec: &PodSpec) -> bool {
    spec.host_network == Some(true)
}

fn is_met(conditions: &[PodCondition], kind: &str) -> bool {
    conditions.iter().any(|condition| condition.type_ == kind && condition.status == "True")
}

/// Was it said of a pod that it is not ready because nobody hears of its machine? The node controller takes `Ready` alone back, and
/// gives no reason; the kubelet gives one, and says the same of what it is made of.
fn is_unheard(spec: &PodSpec, conditions: &[PodCondition]) -> bool {
    let has_reason = |condition: &PodCondition| condition.reason.as_ref().is_some_and(|reason| !reason.is_empty());
    let is_taken_back = conditions.iter().any(|condition| condition.type_ == "Ready" && !has_reason(condition));
    let mut gates = spec.readiness_gates.iter().flatten();
    is_taken_back && is_met(conditions, "ContainersReady") && gates.all(|gate| is_met(conditions, &gate.condition_type))
}

/// The ports that a Service may name. Of two of one name or number the first counts; none is the sidecar's.
fn ports(spec: &PodSpec) -> Vec<WorkloadPort> {
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    let all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let all = all.filter(|container| container.name != marks::CONTAINER).flat_map(|container| container.ports.iter().flatten());
    let tcp = all.filter(|port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP"));
    let mut ports = Vec::new();
    for port in tcp {
        let Some(number) = u16::try_from(port.container_port).ok().filter(|number| *number != 0) else { continue };
        let name = port.name.clone().filter(|name| !name.is_empty());
        let is_new = name.as_ref().is_none_or(|name| !names.contains(name)) && !numbers.contains(&number);
        if is_new && !SIDECARS_PORTS.contains(&number) {
            names.extend(name.clone());
            numbers.insert(number);
            ports.push(WorkloadPort { name, port: number, app_protocol: None });
        }
    }
    ports
}

#[cfg(test)]
mod tests {
    use super::super::object::testing::object;
    use super::*;

    const INJECTED_POD: &str = "
apiVersion: v1
kind: Pod
metadata:
  name: web-7d9-abcde
  namespace: shop
  labels: { app: web, outrigger.dev/sidecar: injected }
  annotations: { outrigger.dev/exclude-inbound-ports: '9100', outrigger.dev/sidecar-cpu: 10m, example.com/note: mine }
  creationTimestamp: '2026-01-01T00:00:00Z'
spec:
  nodeName: one
  serviceAccountName: web
  initContainers:
  - { name: outrigger, restartPolicy: Always, ports: [{name: metrics, containerPort: 14021}], volumeMounts: [{name: outrigger, mountPath: /run/outrigger}] }
  containers:
  - { name: web, ports: [{name: http, containerPort: 8080, protocol: TCP}, {name: dns, containerPort: 53, protocol: UDP}, {containerPort: 8080}] }
  - { name: second, ports: [{name: http, containerPort: 9090}, {name: admin, containerPort: 14020}] }
  volumes:
  - { name: outrigger, csi: { driver: csi.outrigger.dev } }
status:
  phase: Running
  podIPs: [{ip: 10.244.0.7}, {ip: 'fd44::7'}]
  conditions: [{type: Ready, status: 'True'}]
";

    fn read(text: &str) -> Option<Pod> {
        Pod::read(&object(text).body)
    }

    #[test]
    fn a_pod_with_a_sidecar_of_ours_is_a_workload_that_proves_its_identity() {
        let workload = read(INJECTED_POD).unwrap().workload;
        assert_eq!(
            serde_json::to_value(&workload).unwrap(),
            serde_json::json!({
                "apiVersion": "outrigger.dev/v1alpha1",
                "kind": "Workload",
                "metadata": {
                    "name": "web-7d9-abcde",
                    "namespace": "shop",
                    "labels": { "app": "web", "outrigger.dev/sidecar": "injected" },
                    "annotations": { "outrigger.dev/exclude-inbound-ports": "9100" },
                },
                "spec": {
                    "addresses": ["10.244.0.7", "fd44::7"],
                    "serviceAccount": "web",
                    "ports": [{ "name": "http", "port": 8080 }],
                    "node": "one",
                },
            })
        );
    }

    #[test]
    fn a_pod_that_only_says_that_it_has_a_sidecar_is_dialled_in_plaintext() {
        for (from, to) in [
            ("outrigger.dev/sidecar: injected", "a: b"),
            ("name: outrigger,", "name: other,"),
            ("driver: csi.outrigger.dev", "driver: csi.example.com"),
            ("volumeMounts: [{name: outrigger,", "volumeMounts: [{name: none,"),
            ("  nodeName: one", "  hostNetwork: true\n  nodeName: one"),
        ] {
            let workload = read(&INJECTED_POD.replacen(from, to, 1)).unwrap().workload;
            assert_eq!(workload.spec.transport, WorkloadTransport::Plaintext, "{to}");
        }
    }

    #[test]
    fn what_the_node_controller_takes_back_is_told_from_what_the_kubelet_says() {
        let said = |conditions: &str| {
            let gated =
                INJECTED_POD.replace("  nodeName: one", "  nodeName: one\n  readinessGates: [{conditionType: example.com/in}]");
            let spec = read(&gated.replace("{type: Ready, status: 'True'}", conditions)).unwrap().workload.spec;
            (spec.unready, spec.unheard)
        };
        let within = "{type: ContainersReady, status: 'True'}, {type: example.com/in, status: 'True'}";
        assert_eq!(said(&format!("{{type: Ready, status: 'True'}}, {within}")), (false, false));
        assert_eq!(said(&format!("{{type: Ready, status: 'False'}}, {within}")), (true, true));
        assert_eq!(said(&format!("{{type: Ready, status: 'Unknown'}}, {within}")), (true, true));
        let gate = format!(
            "{{type: Ready, status: 'False', reason: ReadinessGatesNotReady}}, {}",
            within.replace("in, status: 'True'", "in, status: 'False'")
        );
        assert_eq!(said(&gate), (true, false));
        assert_eq!(said(&gate.replace(", reason: ReadinessGatesNotReady", "")), (true, false));
        assert_eq!(
            said(
                "{type: Ready, status: 'False', reason: ContainersNotReady}, {type: ContainersReady, status: 'False', reason: ContainersNotReady}"
            ),
            (true, false)
        );
        assert_eq!(said("{type: Ready, status: 'False'}, {type: ContainersReady, status: 'False'}"), (true, false));
        assert_eq!(said(within), (true, false), "of what was never ready nobody took anything back");
    }

    #[test]
    fn a_pod_is_a_workload_from_its_machine_on_until_its_last_container_ended() {
        let waiting = INJECTED_POD.replace("  nodeName: one\n", "");
        assert_eq!(read(&waiting), None);
        let placed = INJECTED_POD.split("status:").next().unwrap();
        let workload = read(placed).unwrap().workload;
        assert!(workload.spec.addresses.is_empty() && workload.spec.unready);
        let ending =
            INJECTED_POD.replace("  creationTimestamp", "  deletionTimestamp: '2026-01-01T00:10:00Z'\n  creationTimestamp");
        assert!(read(&ending).unwrap().workload.spec.terminating);
        for phase in ["Succeeded", "Failed"] {
            assert_eq!(read(&INJECTED_POD.replace("phase: Running", &format!("phase: {phase}"))), None);
        }
    }
}
