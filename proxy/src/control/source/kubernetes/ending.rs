//! Is a namespace being deleted? Asked of the API server before a security policy is taken for gone.
//!
//! Each kind is watched by itself, and a namespace's own watch may tell later that it is being deleted than another one that its
//! policies are. A namespace is marked before anything in it is deleted (Kubernetes, "Namespaces walkthrough"; finalizers), and
//! a read without a version is of what is written at that moment, so that who asks after the one knows the other.

use k8s_openapi::api::core::v1::Namespace;
use kube::api::{DynamicObject, ListParams, ObjectMeta, PartialObjectMeta, TypeMeta};
use kube::{Api, Client};
use tracing::warn;

use super::object::Object;
use super::watched::Watched;
use super::{PAUSE_MAX, PAUSE_MIN, told};
use crate::base::random::Dice;

/// The namespace, if it is being deleted. Waits until the API server says it: until then nothing goes.
pub(super) async fn one(client: &Client, namespace: &str, dice: &mut Dice) -> Option<Object> {
    let api = Api::<Namespace>::all(client.clone());
    answered(dice, || api.get_metadata_opt(namespace)).await.and_then(marked)
}

/// All namespaces that are being deleted.
pub(super) async fn all(client: &Client, dice: &mut Dice) -> Vec<Object> {
    let (api, every) = (Api::<Namespace>::all(client.clone()), ListParams::default());
    let all = answered(dice, || api.list_metadata(&every)).await;
    all.items.into_iter().filter_map(marked).collect()
}

async fn answered<T, F: Future<Output = kube::Result<T>>>(dice: &mut Dice, ask: impl Fn() -> F) -> T {
    let mut pause = PAUSE_MIN;
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(error) => {
                warn!(error = told(&error), "whether a namespace is being deleted is not known: its policies stand meanwhile");
            }
        }
        tokio::time::sleep(pause.mul_f64(0.5 + dice.fraction() / 2.0)).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

fn marked(found: PartialObjectMeta<Namespace>) -> Option<Object> {
    let metadata: ObjectMeta = found.metadata;
    metadata.deletion_timestamp.as_ref()?;
    let types = TypeMeta { api_version: "v1".to_owned(), kind: Watched::Namespaces.kind().to_owned() };
    Object::read(DynamicObject { types: Some(types), metadata, data: serde_json::json!({}) })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use kube::client::Body;
    use serde_json::{Value, json};

    use super::*;

    /// An API server that is away for the first questions, and then says this of each.
    fn server(away: u32, status: u16, answer: &Value) -> Client {
        let (asked, answer) = (Arc::new(AtomicU32::new(0)), answer.to_string());
        let serve = move |_question: http::Request<Body>| {
            let (is_away, answer) = (asked.fetch_add(1, Ordering::Relaxed) < away, answer.clone());
            async move {
                if is_away {
                    return Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
                }
                Ok(http::Response::builder().status(status).body(Body::from(answer.into_bytes())).unwrap())
            }
        };
        Client::new(tower::service_fn(serve), "default")
    }

    fn namespace(name: &str, ending: bool) -> Value {
        let mut namespace = json!({ "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata",
            "metadata": { "name": name, "uid": "0a-1", "resourceVersion": "7" } });
        if ending {
            namespace["metadata"]["deletionTimestamp"] = json!("2026-01-01T01:00:00Z");
        }
        namespace
    }

    async fn asked(away: u32, status: u16, answer: &Value) -> Option<(String, Option<u64>)> {
        let found = one(&server(away, status, answer), "shop", &mut Dice::from_seed(1)).await?;
        Some((found.name.to_string(), found.version))
    }

    #[tokio::test(start_paused = true)]
    async fn a_namespace_is_being_deleted_if_it_is_marked_and_nothing_is_said_before_the_server_answers() {
        let begun = tokio::time::Instant::now();
        assert_eq!(asked(0, 200, &namespace("shop", true)).await, Some(("/shop".to_owned(), Some(7))));
        assert_eq!(asked(0, 200, &namespace("shop", false)).await, None);
        let gone = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "", "reason": "NotFound", "code": 404 });
        assert_eq!(asked(0, 404, &gone).await, None);
        assert_eq!(begun.elapsed(), Duration::ZERO);
        assert!(asked(5, 200, &namespace("shop", true)).await.is_some());
        assert!(begun.elapsed() > PAUSE_MIN * 5);
        let list = json!({ "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadataList", "metadata": {},
            "items": [namespace("shop", true), namespace("bank", false)] });
        let ending = all(&server(1, 200, &list), &mut Dice::from_seed(1)).await;
        assert_eq!(ending.iter().map(|one| &*one.name.name).collect::<Vec<_>>(), ["shop"]);
    }
}
