//! A node agent proves its node with a service account token that is bound to its own pod.
//!
//! Sources: the API server's `TokenReview` (authentication.k8s.io/v1) and "Managing Service Accounts" of the Kubernetes
//! documentation, which names the extras of a bound token. The API server says whose token it is and to which pod it is
//! bound; that pod is looked at once more, by name and uid, and its node must be the one that the token says.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, PostParams};

use super::NotJoined;

/// Asks the API server.
pub(crate) struct Reviewer {
    client: Client,
    /// The namespace and service account of the node agent.
    agent: (String, String),
}

/// What a token proves, by the API server's word.
#[derive(Debug, Eq, PartialEq)]
struct Proven {
    pod: String,
    uid: String,
    node: String,
}

impl Reviewer {
    /// `namespace` is the system's own: the agent's pods run there.
    pub(crate) fn new(client: Client, namespace: &str) -> Self {
        Self { client, agent: (namespace.to_owned(), ACCOUNT.to_owned()) }
    }

    /// The node on which the pod runs that `token` is bound to.
    ///
    /// # Errors
    /// It is none of the agent's, or the API server cannot be asked.
    pub(super) async fn node(&self, token: &str) -> Result<String, NotJoined> {
        let (namespace, account) = &self.agent;
        let question = TokenReview {
            spec: TokenReviewSpec { audiences: Some(vec![AUDIENCE.to_owned()]), token: token.to_owned() },
            ..TokenReview::default()
        };
        let reviews = Api::<TokenReview>::all(self.client.clone());
        let parameters = PostParams::default();
        let reviewed = within(reviews.create(&parameters, &question)).await?;
        let proven = judge(reviewed.status.unwrap_or_default(), namespace, account).map_err(NotJoined::Account)?;
        let pods = Api::<Pod>::namespaced(self.client.clone(), namespace);
        let pod = within(pods.get_opt(&proven.pod)).await?;
        stands(pod.as_ref(), &proven).map_err(NotJoined::Account)?;
        Ok(proven.node)
    }
}

/// Waits for the API server, for a while.
async fn within<T>(asked: impl Future<Output = kube::Result<T>>) -> Result<T, NotJoined> {
    match tokio::time::timeout(ANSWER_AT_MOST, asked).await {
        Ok(answered) => answered.map_err(|error| NotJoined::NotReviewed(error.to_string())),
        Err(_elapsed) => Err(NotJoined::NotReviewed(format!("the API server did not answer within {ANSWER_AT_MOST:?}"))),
    }
}

/// What the API server's answer proves.
fn judge(status: TokenReviewStatus, namespace: &str, account: &str) -> Result<Proven, String> {
    if status.authenticated != Some(true) {
        return Err(status.error.unwrap_or_else(|| "the API server does not know it".to_owned()));
    }
    if !status.audiences.unwrap_or_default().iter().any(|audience| audience == AUDIENCE) {
        return Err(format!("it is not for the audience {AUDIENCE}"));
    }
    let user = status.user.unwrap_or_default();
    let expected = format!("system:serviceaccount:{namespace}:{account}");
    let actual = user.username.unwrap_or_default();
    if actual != expected {
        return Err(format!("it is of {actual}, not of {expected}"));
    }
    let extra = user.extra.unwrap_or_default();
    let one = |key: &str| single(&extra, key).ok_or_else(|| format!("it is bound to no pod: it lacks {key}"));
    Ok(Proven { pod: one(POD_NAME)?, uid: one(POD_UID)?, node: one(NODE_NAME)? })
}

fn single(extra: &BTreeMap<String, Vec<String>>, key: &str) -> Option<String> {
    match extra.get(key).map(Vec::as_slice) {
        Some([one]) if !one.is_empty() => Some(one.clone()),
        _none_or_several => None,
    }
}

/// Is the pod that the token is bound to there, and where the token says?
fn stands(pod: Option<&Pod>, proven: &Proven) -> Result<(), String> {
    let uid = pod.and_then(|pod| pod.metadata.uid.as_deref());
    if uid != Some(proven.uid.as_str()) {
        return Err(format!("the pod {} that it is bound to is gone", proven.pod));
    }
    let node = pod.and_then(|pod| pod.spec.as_ref()?.node_name.as_deref()).unwrap_or_default();
    if node != proven.node {
        return Err(format!("its pod runs on the node {node:?}, and it says {:?}", proven.node));
    }
    Ok(())
}

/// Whom the token must be for.
const AUDIENCE: &str = "outrigger";
/// The service account of the node agent.
const ACCOUNT: &str = "node";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const ANSWER_AT_MOST: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn review(change: impl FnOnce(&mut serde_json::Value)) -> Result<Proven, String> {
        let mut status = json!({
            "authenticated": true,
            "audiences": ["outrigger"],
            "user": {
                "username": "system:serviceaccount:outrigger-system:node",
                "extra": { POD_NAME: ["node-x7"], POD_UID: ["u1"], NODE_NAME: ["n1"] },
            },
        });
        change(&mut status);
        judge(serde_json::from_value(status).unwrap(), "outrigger-system", "node")
    }

    fn pod(uid: &str, node: &str) -> Pod {
        serde_json::from_value(json!({ "metadata": { "uid": uid }, "spec": { "nodeName": node, "containers": [] } })).unwrap()
    }

    #[test]
    fn a_token_of_the_agents_pod_proves_the_node_that_it_runs_on() {
        let proven = review(|_same| {}).unwrap();
        assert_eq!(proven, Proven { pod: "node-x7".into(), uid: "u1".into(), node: "n1".into() });
        assert_eq!(stands(Some(&pod("u1", "n1")), &proven), Ok(()));
    }

    #[test]
    fn what_proves_no_agent_is_refused_by_name() {
        let refused = |change: fn(&mut serde_json::Value)| review(change).unwrap_err();
        assert_eq!(refused(|status| status["authenticated"] = json!(false)), "the API server does not know it");
        assert_eq!(
            refused(|status| {
                status["authenticated"] = json!(false);
                status["error"] = json!("token has expired");
            }),
            "token has expired"
        );
        assert_eq!(refused(|status| status["audiences"] = json!(["api"])), "it is not for the audience outrigger");
        assert_eq!(
            refused(|status| status["user"]["username"] = json!("system:serviceaccount:shop:node")),
            "it is of system:serviceaccount:shop:node, not of system:serviceaccount:outrigger-system:node"
        );
        for key in [POD_NAME, POD_UID, NODE_NAME] {
            let lacks = review(|status| status["user"]["extra"][key] = json!([])).unwrap_err();
            assert_eq!(lacks, format!("it is bound to no pod: it lacks {key}"));
        }
    }

    #[test]
    fn a_token_of_a_pod_that_went_or_is_elsewhere_proves_nothing() {
        let proven = review(|_same| {}).unwrap();
        assert_eq!(stands(None, &proven).unwrap_err(), "the pod node-x7 that it is bound to is gone");
        assert!(stands(Some(&pod("u2", "n1")), &proven).is_err());
        assert_eq!(stands(Some(&pod("u1", "n2")), &proven).unwrap_err(), r#"its pod runs on the node "n2", and it says "n1""#);
    }
}
