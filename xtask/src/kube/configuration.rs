//! The files that the cluster's parts are configured by.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::certificates;
use super::{NODE_ADDRESS, NODE_PODS, PODS_LINK, RUN, STATE};

/// What every pod's first container runs.
pub(super) const SANDBOX_IMAGE: &str = "localhost/outrigger-kube/pause:1";

/// Writes them; `programs` is where the runtime finds its own.
pub(super) fn write(programs: &Path) -> Result<()> {
    let state = Path::new(STATE);
    std::fs::create_dir_all(state.join("cni"))?;
    std::fs::write(state.join("containerd.toml"), containerd(&programs.to_string_lossy()))?;
    std::fs::write(state.join("cni/10-pods.conflist"), network()?)?;
    std::fs::write(state.join("kubelet.json"), kubelet()?)?;
    std::fs::write(state.join("audit.json"), audit()?)?;
    std::fs::write(state.join("Corefile"), names())?;
    Ok(())
}

fn containerd(programs: &str) -> String {
    format!(
        r#"version = 3
root = "{STATE}/containerd"
state = "{RUN}/containerd"

[grpc]
address = "{RUN}/containerd.sock"

[ttrpc]
address = "{RUN}/containerd.sock.ttrpc"

[plugins.'io.containerd.nri.v1.nri']
disable = false
socket_path = "{RUN}/nri.sock"

[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "{SANDBOX_IMAGE}"

[plugins.'io.containerd.cri.v1.runtime']
# Not every machine may lower a process' score.
restrict_oom_score_adj = true

[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["{programs}"]
conf_dir = "{STATE}/cni"

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = "{programs}/runc"
"#
    )
}

fn network() -> Result<String> {
    let ranges: Vec<_> = NODE_PODS.iter().map(|range| json!([{ "subnet": range }])).collect();
    Ok(serde_json::to_string_pretty(&json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [{
            "type": "bridge",
            "bridge": PODS_LINK,
            "isGateway": true,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "dataDir": format!("{STATE}/addresses"),
                "ranges": ranges,
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            },
        }],
    }))?)
}

fn kubelet() -> Result<String> {
    // A test's machine may be short of anything; what it cannot hold fails by its own error. A node under pressure takes
    // no pods, and says so of none of them.
    let never =
        json!({ "memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%" });
    Ok(serde_json::to_string_pretty(&json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        // Where version 1 and 2 of cgroups stand side by side, the runtime places containers in both.
        "failCgroupV1": false,
        "cgroupDriver": "cgroupfs",
        "containerRuntimeEndpoint": format!("unix://{RUN}/containerd.sock"),
        "authentication": {
            "anonymous": { "enabled": false },
            "webhook": { "enabled": true },
            "x509": { "clientCAFile": certificates::path("ca.crt") },
        },
        "authorization": { "mode": "Webhook" },
        "tlsCertFile": certificates::path("kubelet.crt"),
        "tlsPrivateKeyFile": certificates::path("kubelet.key"),
        "clusterDNS": [NODE_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": "",
        "evictionHard": never,
        // A test's machine builds while the cluster runs; images that nobody uses just then are still wanted.
        "imageGCHighThresholdPercent": 100,
    }))?)
}

fn audit() -> Result<String> {
    Ok(serde_json::to_string_pretty(&json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [{ "level": "Metadata" }],
    }))?)
}

fn names() -> String {
    format!(
        ".:53 {{\n  bind {NODE_ADDRESS}\n  kubernetes cluster.local in-addr.arpa ip6.arpa {{\n    kubeconfig {}\n  }}\n}}\n",
        certificates::client("admin").display()
    )
}
