//! Does the API server know the webhooks of the mesh, and by the root that the mesh has now? Pure: the configurations and the
//! root as the API server has them go in.
//!
//! A configuration that knows them by another root is worse than none: the API server takes no answer of theirs, so that what
//! they look at is refused, or let pass unseen, by its failure policy.

use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration, WebhookClientConfig,
};

use super::super::install::manifest::NAMESPACE;
use super::Finding;

/// The configurations that there are, and the root that the mesh tells everybody (PEM).
pub(super) struct Webhooks {
    pub(super) of_pods: Option<MutatingWebhookConfiguration>,
    pub(super) of_documents: Option<ValidatingWebhookConfiguration>,
    pub(super) root: Option<String>,
}

/// What is to be said of them.
pub(super) fn look(found: Webhooks) -> Vec<Finding> {
    let Webhooks { of_pods, of_documents, root } = found;
    let of_pods = of_pods.map(|found| found.webhooks.into_iter().flatten().map(|one| one.client_config).collect());
    let of_documents = of_documents.map(|found| found.webhooks.into_iter().flatten().map(|one| one.client_config).collect());
    let each = [
        ("pods", "MutatingWebhookConfiguration", "no pod gets a sidecar", of_pods),
        ("documents", "ValidatingWebhookConfiguration", "no document is checked before it is stored", of_documents),
    ];
    let mut findings: Vec<Finding> =
        each.into_iter().filter_map(|(of, kind, so, configs)| known(of, kind, so, configs, root.as_deref())).collect();
    if root.is_none() {
        let text = "the ConfigMap outrigger-root does not tell the mesh's root: no node agent starts";
        findings.push(Finding::fail(CHECK, text, format!("kubectl -n {NAMESPACE} logs deployment/control: it writes it")));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, "the API server knows their certificate, by the root that the mesh has"));
    }
    findings
}

/// What is wrong with one configuration.
fn known(of: &str, kind: &str, so: &str, configs: Option<Vec<WebhookClientConfig>>, root: Option<&str>) -> Option<Finding> {
    let Some(configs) = configs else {
        let text = format!("there are none for {of}: {so}");
        return Some(Finding::fail(CHECK, text, "outrigger upgrade, or helm upgrade"));
    };
    let remedy = format!(
        "kubectl -n {NAMESPACE} logs deployment/control: it writes caBundle of {kind}/outrigger every five seconds, unless it may \
         not, or does not run"
    );
    // Others that stand in the same object are known as their owners say.
    let ours = configs.into_iter().filter(|config| {
        let service = config.service.as_ref();
        service.is_some_and(|service| service.namespace == NAMESPACE && service.name == "control")
    });
    let bundles: Vec<ByteString> = ours.map(|config| config.ca_bundle.unwrap_or_default()).collect();
    if bundles.is_empty() {
        let text = format!("none of those for {of} leads to the control plane: {so}");
        return Some(Finding::fail(CHECK, text, "outrigger upgrade, or helm upgrade"));
    }
    if bundles.iter().any(|bundle| bundle.0.is_empty()) {
        let text = format!("the API server does not know the certificate of those for {of}: {so}");
        return Some(Finding::fail(CHECK, text, remedy));
    }
    if root.is_none_or(|root| bundles.iter().all(|bundle| bundle.0 == root.as_bytes())) {
        return None;
    }
    let text = format!("the API server knows those for {of} by another root than the mesh's (ConfigMap outrigger-root): {so}");
    Some(Finding::fail(CHECK, text, remedy))
}

const CHECK: &str = "webhooks";

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The texts, of configurations with these webhooks.
    fn told(of_pods: &Value, of_documents: &Value, root: Option<&str>) -> Vec<String> {
        let found = Webhooks {
            of_pods: serde_json::from_value(of_pods.clone()).unwrap(),
            of_documents: serde_json::from_value(of_documents.clone()).unwrap(),
            root: root.map(str::to_owned),
        };
        let findings = look(found);
        assert!(findings.iter().all(|finding| finding.remedy.is_some() == (finding.verdict == super::super::Verdict::Fail)));
        findings.into_iter().map(|finding| finding.text).collect()
    }

    /// A configuration whose webhooks have these bundles (base64).
    fn knows(bundles: &[&str]) -> Value {
        let webhooks: Vec<Value> = bundles
            .iter()
            .map(|bundle| {
                let service = json!({ "name": "control", "namespace": "outrigger-system", "path": "/mutate" });
                let config = json!({ "service": service, "caBundle": bundle });
                json!({ "name": "a.outrigger.dev", "admissionReviewVersions": ["v1"], "sideEffects": "None", "clientConfig": config })
            })
            .collect();
        json!({ "metadata": { "name": "outrigger" }, "webhooks": webhooks })
    }

    // "root" and "former".
    const ROOT: &str = "cm9vdA==";
    const FORMER: &str = "Zm9ybWVy";

    #[test]
    fn webhooks_are_known_by_the_root_of_the_mesh_and_by_no_other() {
        let well = told(&knows(&[ROOT, ROOT]), &knows(&[ROOT]), Some("root"));
        assert_eq!(well, ["the API server knows their certificate, by the root that the mesh has"]);
        let ill = told(&knows(&[ROOT, FORMER]), &knows(&[ROOT]), Some("root"));
        let text = "the API server knows those for pods by another root than the mesh's (ConfigMap outrigger-root): no pod gets a sidecar";
        assert_eq!(ill, [text]);
        let ill = told(&knows(&[ROOT]), &knows(&[""]), Some("root"));
        assert_eq!(ill.len(), 1);
        assert!(ill[0].contains("does not know the certificate of those for documents"), "{ill:?}");
    }

    #[test]
    fn what_is_not_there_is_told_by_what_it_costs() {
        assert_eq!(
            told(&Value::Null, &Value::Null, Some("root")),
            [
                "there are none for pods: no pod gets a sidecar",
                "there are none for documents: no document is checked before it is stored"
            ]
        );
        let untold = told(&knows(&[ROOT]), &knows(&[ROOT]), None);
        assert_eq!(untold, ["the ConfigMap outrigger-root does not tell the mesh's root: no node agent starts"]);
    }

    #[test]
    fn a_webhook_of_somebody_else_in_the_same_object_is_theirs() {
        let mut shared = knows(&[ROOT, FORMER]);
        shared["webhooks"][1]["clientConfig"]["service"]["namespace"] = "theirs".into();
        assert_eq!(told(&shared, &knows(&[ROOT]), Some("root")).len(), 1);
        let foreign = json!({ "metadata": {}, "webhooks": [shared["webhooks"][1].clone()] });
        let text = "none of those for pods leads to the control plane: no pod gets a sidecar";
        assert_eq!(told(&foreign, &knows(&[ROOT]), Some("root")), [text]);
    }
}
