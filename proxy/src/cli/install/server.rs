//! The API server, as far as an installation needs it: objects of any kind are applied, looked at and deleted.

use std::time::Duration;

use kube::Client;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams};
use serde_json::Value;

use super::super::Failure;
use super::manifest::{kind, name};

/// Under which name fields are owned that an installation writes.
const MANAGER: &str = "outrigger-install";
/// How long the API server may take to answer.
const ANSWER_AT_MOST: Duration = Duration::from_secs(30);

/// An API server.
pub(in crate::cli) struct Server(pub(in crate::cli) Client);

impl Server {
    /// The one that `KUBECONFIG`, or the pod that this runs in, names.
    pub(in crate::cli) async fn connect() -> Result<Self, Failure> {
        let remedy = "name a cluster: KUBECONFIG, or ~/.kube/config";
        let client = Client::try_default().await.map_err(|error| Failure::environment(error, remedy))?;
        Ok(Self(client))
    }

    /// Makes it so, as the one who installs; of fields that others own as well, ours counts.
    pub(super) async fn apply(&self, object: &Value) -> Result<(), Failure> {
        let parameters = PatchParams::apply(MANAGER).force();
        let patch = Patch::Apply(object);
        let api = self.api(object);
        within(object, api.patch(&metadata(object, "name"), &parameters, &patch)).await.map(drop)
    }

    /// As it is; `None` where it is not there.
    pub(super) async fn get(&self, object: &Value) -> Result<Option<DynamicObject>, Failure> {
        within(object, self.api(object).get_opt(&metadata(object, "name"))).await
    }

    /// Deletes it; returns whether it was there.
    pub(super) async fn delete(&self, object: &Value) -> Result<bool, Failure> {
        let (api, name, parameters) = (self.api(object), metadata(object, "name"), DeleteParams::foreground());
        let deleted = api.delete(&name, &parameters);
        match tokio::time::timeout(ANSWER_AT_MOST, deleted).await {
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => Ok(false),
            Ok(answered) => answered.map(|_| true).map_err(|error| failed(object, &error)),
            Err(_elapsed) => Err(silent(object)),
        }
    }

    fn api(&self, object: &Value) -> Api<DynamicObject> {
        let version = object.get("apiVersion").and_then(Value::as_str).unwrap_or_default();
        let (group, version) = version.split_once('/').unwrap_or(("", version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind(object)));
        match metadata(object, "namespace") {
            namespace if namespace.is_empty() => Api::all_with(self.0.clone(), &resource),
            namespace => Api::namespaced_with(self.0.clone(), &namespace, &resource),
        }
    }
}

/// Waits for the API server, for a while.
async fn within<T>(object: &Value, asked: impl Future<Output = kube::Result<T>>) -> Result<T, Failure> {
    match tokio::time::timeout(ANSWER_AT_MOST, asked).await {
        Ok(answered) => answered.map_err(|error| failed(object, &error)),
        Err(_elapsed) => Err(silent(object)),
    }
}

fn failed(object: &Value, error: &kube::Error) -> Failure {
    Failure::environment(
        format!("{}: {}", name(object), super::checks::said(error)),
        "look at what the API server refuses, then run it again",
    )
}

fn silent(object: &Value) -> Failure {
    Failure::environment(format!("{}: the API server did not answer within {ANSWER_AT_MOST:?}", name(object)), "run it again")
}

fn metadata(object: &Value, field: &str) -> String {
    object.pointer(&format!("/metadata/{field}")).and_then(Value::as_str).unwrap_or_default().to_owned()
}
