//! What the agent tells a pod's owner where he looks: an event of the pod (`kubectl describe pod`).
//!
//! Source: Kubernetes API, events.k8s.io/v1. An event is a courtesy: the log and a metric say the same. So nobody waits for the
//! API server, and what it does not take is told once and not again.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::task::JoinSet;
use tracing::warn;

use super::volume::Owner;
use crate::base::clock::WallClock;
use crate::node::chain;

/// Tells events, until it is dropped.
pub(super) struct Events {
    client: Client,
    node: String,
    clock: WallClock,
    under_way: JoinSet<()>,
}

impl Events {
    /// Of the agent of this node.
    pub(super) fn new(client: Client, node: String, clock: WallClock) -> Self {
        Self { client, node, clock, under_way: JoinSet::new() }
    }

    /// Tells that a pod is in quarantine. The same of the same pod is one event, whichever agent tells it.
    pub(super) fn quarantined(&mut self, owner: &Owner, remedy: &str) {
        while self.under_way.try_join_next().is_some() {}
        if self.under_way.len() >= AT_ONCE {
            return;
        }
        let since_epoch = i64::try_from(self.clock.since_epoch().as_micros()).unwrap_or_default();
        let event = quarantined(owner, &self.node, Timestamp::from_microsecond(since_epoch).ok(), remedy);
        let events: Api<Event> = Api::namespaced(self.client.clone(), &owner.namespace);
        let pod = owner.named();
        self.under_way.spawn(async move {
            let parameters = PostParams::default();
            match tokio::time::timeout(ANSWER_AT_MOST, events.create(&parameters, &event)).await {
                Ok(Ok(_made)) => {}
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => {}
                Ok(Err(error)) => warn!(%pod, error = chain(&error), "an event cannot be told"),
                Err(_elapsed) => warn!(%pod, "an event cannot be told: the API server does not answer"),
            }
        });
    }
}

fn quarantined(owner: &Owner, node: &str, now: Option<Timestamp>, remedy: &str) -> Event {
    let shown: String = owner.name.chars().take(NAME_MAX).collect();
    let name = format!("{}.{}", shown.trim_end_matches(['-', '.']), owner.uid);
    Event {
        metadata: ObjectMeta { name: Some(name), namespace: Some(owner.namespace.clone()), ..ObjectMeta::default() },
        event_time: now.map(MicroTime),
        type_: Some("Warning".to_owned()),
        action: Some("Quarantine".to_owned()),
        reason: Some("NoSidecar".to_owned()),
        note: Some(format!("the pod asks for a sidecar and has none, so nothing gets in or out of it; {remedy}")),
        regarding: Some(ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(owner.namespace.clone()),
            name: Some(owner.name.clone()),
            uid: Some(owner.uid.clone()),
            ..ObjectReference::default()
        }),
        reporting_controller: Some("outrigger.dev/node".to_owned()),
        reporting_instance: Some(node.chars().take(INSTANCE_MAX).collect()),
        ..Event::default()
    }
}

/// A thousand pods may be made at once while the webhook is away.
const AT_ONCE: usize = 32;
const ANSWER_AT_MOST: Duration = Duration::from_secs(10);
/// What leaves room for the UID in a name of 253 characters.
const NAME_MAX: usize = 200;
/// As the API server has it.
const INSTANCE_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::described::tests::pod;
    use super::*;

    #[test]
    fn an_event_names_the_pod_what_happened_and_what_to_do() {
        let long = "x".repeat(199) + "-" + &"y".repeat(53);
        for (name, shown) in [("web", "web"), (long.as_str(), long.get(..199).unwrap())] {
            let pod = pod(|pod| pod["metadata"]["name"] = json!(name));
            let event = serde_json::to_value(quarantined(&pod.owner, "node1", None, "delete the pod")).unwrap();
            assert_eq!(event["metadata"]["name"], format!("{shown}.{}", pod.owner.uid));
            assert_eq!(event["regarding"]["uid"], pod.owner.uid);
            assert_eq!((&event["type"], &event["reason"]), (&json!("Warning"), &json!("NoSidecar")));
            assert!(event["note"].as_str().unwrap().ends_with("; delete the pod"));
        }
    }
}
