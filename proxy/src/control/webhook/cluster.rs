//! The API server, as the webhooks need it: a pod's namespace, and the two objects that say by which authority the webhooks are
//! known.

use std::pin::Pin;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration, WebhookClientConfig,
};
use k8s_openapi::api::core::v1 as core;
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::timeout;
use tracing::{info, warn};

use super::Namespaces;
use crate::injection::Namespace;
use crate::model::marks::{self, Mode};

/// Asks the API server.
pub(super) struct Cluster {
    client: Client,
}

impl Cluster {
    pub(super) const fn new(client: Client) -> Self {
        Self { client }
    }

    /// Where sidecars stand: as `wished`, or as the cluster can if it is too old for that or nobody can say.
    pub(super) async fn mode(&self, wished: Mode) -> Mode {
        let version = timeout(ANSWER_MAX, self.client.apiserver_version()).await;
        let minor = version.ok().and_then(Result::ok).and_then(|version| minor(&version.major, &version.minor));
        match minor {
            Some(minor) if minor < NATIVE_SINCE && wished == Mode::Native => {
                warn!(minor, "this Kubernetes has no native sidecars yet: pods get classic ones");
                Mode::Classic
            }
            _can_or_unknown => wished,
        }
    }

    /// Keeps the authority written where the API server looks for it, for ever: whoever installs anew writes it away.
    pub(super) async fn keep_known(&self, pem: &str) {
        let pem = pem.as_bytes();
        let mut told = String::new();
        loop {
            let faults = [
                self.write::<MutatingWebhookConfiguration>(pem, |found| {
                    let webhooks = found.webhooks.into_iter().flatten();
                    webhooks.map(|webhook| (webhook.name, webhook.client_config)).collect()
                })
                .await,
                self.write::<ValidatingWebhookConfiguration>(pem, |found| {
                    let webhooks = found.webhooks.into_iter().flatten();
                    webhooks.map(|webhook| (webhook.name, webhook.client_config)).collect()
                })
                .await,
            ];
            let faults = faults.into_iter().filter_map(Result::err).collect::<Vec<_>>().join("; ");
            if !faults.is_empty() && faults != told {
                warn!(faults, "the API server does not know by which authority the webhooks are to be known");
            }
            told = faults;
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn write<K>(&self, pem: &[u8], of: fn(K) -> Vec<(String, WebhookClientConfig)>) -> Result<(), String>
    where
        K: Clone + std::fmt::Debug + DeserializeOwned + Resource<DynamicType = (), Scope = k8s_openapi::ClusterResourceScope>,
    {
        let kind = K::kind(&());
        let api = Api::<K>::all(self.client.clone());
        let within = async |asked: Pin<Box<dyn Future<Output = kube::Result<Option<K>>> + Send + '_>>| {
            timeout(ANSWER_MAX, asked)
                .await
                .map_err(|_elapsed| format!("{kind} {NAME}: no answer"))?
                .map_err(|error| format!("{kind} {NAME}: {error}"))
        };
        let found = within(Box::pin(api.get_opt(NAME))).await?;
        let Some(found) = found else { return Err(format!("there is no {kind} {NAME}")) };
        let changes = changes(&of(found), pem);
        if changes.is_empty() {
            return Ok(());
        }
        let patch: json_patch::Patch = serde_json::from_value(changes.into()).map_err(|error| error.to_string())?;
        let parameters = PatchParams::default();
        let patch = Patch::<()>::Json(patch);
        within(Box::pin(async { api.patch(NAME, &parameters, &patch).await.map(Some) })).await?;
        info!(kind = %kind, "the API server was told by which authority the webhooks are known");
        Ok(())
    }
}

impl Namespaces for Cluster {
    fn of<'a>(&'a self, name: &'a str) -> Pin<Box<dyn Future<Output = Result<Namespace, String>> + Send + 'a>> {
        Box::pin(async move {
            let api = Api::<core::Namespace>::all(self.client.clone());
            let found = timeout(ANSWER_MAX, api.get_opt(name)).await;
            let found = found.map_err(|_elapsed| "the API server does not answer".to_owned())?;
            let metadata = found.map_err(|error| error.to_string())?.ok_or("there is none of that name")?.metadata;
            Ok(Namespace {
                name: name.to_owned(),
                labels: metadata.labels.unwrap_or_default(),
                annotations: metadata.annotations.unwrap_or_default(),
            })
        })
    }
}

/// What has to be changed so that each of our webhooks is known by `pem`: operations of a JSON patch.
fn changes(webhooks: &[(String, WebhookClientConfig)], pem: &[u8]) -> Vec<Value> {
    let ours = |config: &WebhookClientConfig| {
        config.service.as_ref().is_some_and(|service| service.name == SERVICE && service.namespace == marks::SYSTEM)
    };
    let stale = webhooks
        .iter()
        .enumerate()
        .filter(|(_, (_, config))| ours(config) && config.ca_bundle.as_ref().is_none_or(|ByteString(there)| there != pem));
    stale
        .flat_map(|(index, (name, _))| {
            let at = format!("/webhooks/{index}");
            // Somebody else may have changed the list meanwhile.
            [
                json!({ "op": "test", "path": format!("{at}/name"), "value": name }),
                json!({ "op": "add", "path": format!("{at}/clientConfig/caBundle"), "value": STANDARD.encode(pem) }),
            ]
        })
        .collect()
}

fn minor(major: &str, minor: &str) -> Option<u32> {
    // Providers write "29+".
    let digits = minor.trim_end_matches(|character: char| !character.is_ascii_digit());
    (major == "1").then(|| digits.parse().ok())?
}

/// Both objects are called that.
const NAME: &str = "outrigger";
/// The Service that leads to the control plane.
const SERVICE: &str = "control";
/// The API server waits ten seconds for us.
const ANSWER_MAX: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Sidecar containers are on by default from this minor version of Kubernetes 1 on.
const NATIVE_SINCE: u32 = 29;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_authority_is_written_at_our_webhooks_alone_and_only_when_it_is_not_there() {
        let webhook = |name: &str, config: Value| (name.to_owned(), serde_json::from_value(config).unwrap());
        let service = json!({ "name": "control", "namespace": "outrigger-system", "path": "/mutate" });
        let known = STANDARD.encode("root");
        let webhooks = [
            webhook("known", json!({ "service": service, "caBundle": known })),
            webhook("other", json!({ "service": { "name": "other", "namespace": "outrigger-system" } })),
            webhook("elsewhere", json!({ "url": "https://example.com" })),
            webhook("new", json!({ "service": service })),
            webhook("old", json!({ "service": service, "caBundle": STANDARD.encode("former") })),
        ];
        let changed: Vec<_> =
            changes(&webhooks, b"root").iter().map(|change| (change["path"].clone(), change["value"].clone())).collect();
        assert_eq!(
            changed,
            [
                (json!("/webhooks/3/name"), json!("new")),
                (json!("/webhooks/3/clientConfig/caBundle"), json!(known)),
                (json!("/webhooks/4/name"), json!("old")),
                (json!("/webhooks/4/clientConfig/caBundle"), json!(known)),
            ]
        );
        assert!(changes(&webhooks[..1], b"root").is_empty());
    }

    #[test]
    fn versions_of_kubernetes_are_read_as_providers_write_them() {
        for (major, text, expected) in [("1", "36", Some(36)), ("1", "28+", Some(28)), ("1", "", None), ("2", "1", None)] {
            assert_eq!(minor(major, text), expected, "{major}.{text}");
        }
    }
}
