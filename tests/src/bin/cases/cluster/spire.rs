//! Pods whose identities are a real SPIRE's: its server and its agent run on the node, SPIFFE's CSI driver brings the agent's
//! socket into pods, and the agent knows them by what the kubelet says.

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE, STATE};
use e2e::mesh::{finish, wait_for};
use e2e::runner::Case;
use e2e::spire::{Driver, Spire};

use super::pods::Namespace;
use super::{INSTALLED_WITHIN, OnCluster, SYSTEM};
use crate::world::own;

pub(super) const LONG: &[OnCluster] = &[Case {
    name: "with_spire_pods_call_each_other_by_certificates_out_of_its_csi_volume",
    run: |cluster, _| with_spire(cluster),
}];

/// The installation of the cases before and after, with another value until this is dropped.
struct Installed<'a>(&'a Cluster);

impl<'a> Installed<'a> {
    fn with(cluster: &'a Cluster, workload_api: &str) -> Result<Self> {
        let installed = Self(cluster);
        installed.set(workload_api)?;
        for part in ["deployment/control", "daemonset/node"] {
            cluster.rolled_out(SYSTEM, part, INSTALLED_WITHIN)?;
        }
        Ok(installed)
    }

    fn set(&self, workload_api: &str) -> Result<()> {
        let mut helm = self.0.helm(["upgrade", "outrigger", "deploy/chart", "--namespace", SYSTEM, "--reuse-values"]);
        finish(helm.arg(format!("--set=workloadApi={workload_api}")), PATIENCE)?.ok().map(drop)
    }
}

impl Drop for Installed<'_> {
    fn drop(&mut self) {
        self.set("").ok();
        for part in ["deployment/control", "daemonset/node"] {
            self.0.rolled_out(SYSTEM, part, INSTALLED_WITHIN).ok();
        }
    }
}

fn with_spire(cluster: &Cluster) -> Result<()> {
    e2e::spire::build()?;
    let sockets = tempfile::Builder::new().prefix("outrigger-spire-sockets-").tempdir()?;
    std::fs::set_permissions(sockets.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let mut spire = Spire::start()?;
    // A sidecar asks before its container stands in the pod's status.
    let attestor = format!(
        r#"WorkloadAttestor "k8s" {{ plugin_data {{
    skip_kubelet_verification = true
    certificate_path = "{STATE}/certificates/admin.crt"
    private_key_path = "{STATE}/certificates/admin.key"
    disable_container_selectors = true
  }} }}"#
    );
    spire.agent(&sockets.path().join("spire-agent.sock"), &attestor)?;
    let _driver = Driver::start(cluster, sockets.path())?;
    let account = |namespace: &str, account: &str| {
        let id = format!("spiffe://cluster.local/ns/{namespace}/sa/{account}");
        spire.entry(&id, &[&format!("k8s:ns:{namespace}"), &format!("k8s:sa:{account}")])
    };
    account(SYSTEM, "control")?;
    let told = || spire.log("agent");
    let _installed = Installed::with(cluster, "csi.spiffe.io").with_context(told)?;

    // A namespace that takes none but `restricted` pods.
    let shop = Namespace::injected(cluster, "spire")?;
    for name in ["web", "client", "other"] {
        account("spire", name)?;
    }
    shop.web(2)?;
    shop.client("client")?;
    shop.client("other")?;
    for name in ["web", "client", "other"] {
        shop.ready(name).with_context(told)?;
    }
    shop.until("client", &["http://web/"], 200)?;
    let caller = "spiffe://cluster.local/ns/spire/sa/client";
    wait_for("the caller's identity in a metric", PATIENCE, || {
        for _ in 0..6 {
            shop.curl("client", &["http://web/"])?;
        }
        let counted = shop.metrics("client", "web")?;
        let is_known = |line: &&str| {
            line.starts_with("outrigger_requests_total{") && line.contains(caller) && line.contains(r#"mtls="true""#)
        };
        counted.lines().find(is_known).map(drop).with_context(|| format!("{caller} is not in\n{counted}"))
    })?;
    let rule = format!(
        "{{ targetRefs: [{{ kind: Service, name: web }}], action: ALLOW, rules: [{{ from: [{{ principals: ['{caller}'] }}] }}] }}"
    );
    cluster.apply(&own("AuthorizationPolicy", "spire", "callers", &rule))?;
    shop.until("other", &["http://web/"], 403)?;
    shop.until("client", &["http://web/"], 200)?;
    // SPIRE's certificates are short here: the sidecar takes each that follows.
    let ends = || -> Result<f64> {
        let counted = shop.metrics("client", "web")?;
        let line = counted.lines().find_map(|line| line.strip_prefix("outrigger_certificate_expiry_timestamp_seconds "));
        Ok(line.context("no metric of the certificate's end")?.trim().parse()?)
    };
    let before = ends()?;
    wait_for("the next certificate", PATIENCE, || {
        let now = ends()?;
        ensure!(now > before, "it still ends at {now}");
        Ok(())
    })?;
    shop.until("client", &["http://web/"], 200).map(drop)
}
