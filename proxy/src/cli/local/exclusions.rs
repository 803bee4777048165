//! What `run` says of a pod that takes ports out of its capture which policies cover.
//!
//! Whoever starts the pod is the one who opens the port, and learns of it there and then. The pod starts all the same: what
//! its owner excludes is excluded.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use super::super::apply::line;
use super::super::client::{self, ApiArgs};
use super::super::{Failure, warn};
use super::places::UpRecord;
use crate::control::api::Wrong;
use crate::model::pod_record::PodRecord;

/// Asks the control plane and says it. Cancel-safe.
pub(super) async fn tell(pod: &PodRecord, mesh: &UpRecord) {
    if pod.capture().is_ok_and(|capture| capture.inbound_ports.is_empty()) {
        return;
    }
    match ask(pod, mesh).await {
        Ok(Some(problems)) => problems.iter().for_each(|problem| warn(&format!("warning: {}", line(problem)))),
        Ok(None) => warn(&format!("warning: {UNKNOWN}: the control plane has not heard of the pod yet; {LATER}")),
        Err(failure) => warn(&format!("warning: {UNKNOWN}: {}; {LATER}", failure.causes.join("; "))),
    }
}

/// The policies that do nothing at a port of the pod; none where the control plane does not come to know the pod.
async fn ask(pod: &PodRecord, mesh: &UpRecord) -> Result<Option<Vec<Wrong>>, Failure> {
    let api = ApiArgs::of_mesh(mesh)?;
    // Names of pods and namespaces need no escape.
    let path = format!("/api/excluded?namespace={}&name={}", pod.namespace, pod.name);
    let deadline = Instant::now() + KNOWN_WITHIN;
    loop {
        if let Some(problems) = read(client::fetch(&api, &path).await?)? {
            return Ok(Some(problems));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        tokio::time::sleep(POLL).await;
    }
}

fn read(mut answer: Value) -> Result<Option<Vec<Wrong>>, Failure> {
    if answer.get("known").and_then(Value::as_bool) != Some(true) {
        return Ok(None);
    }
    let problems = answer.get_mut("problems").map(Value::take).unwrap_or_default();
    serde_json::from_value(problems).map(Some).map_err(|error| Failure::from(anyhow::Error::from(error)))
}

const UNKNOWN: &str = "whether policies cover the ports that the pod takes out of capture is not known";
const LATER: &str = "`outrigger status` tells";
/// A sidecar that is ready has its configuration from a control plane that knows its pod; one that comes later has not.
const KNOWN_WITHIN: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_control_plane_says_of_a_pod_that_it_does_not_know_yet_is_no_answer() {
        assert_eq!(read(json!({ "known": false, "problems": [] })).unwrap(), None);
        let problem =
            json!({ "resource": "PeerAuthentication/shop/p", "at": "spec", "text": "it does nothing", "refuses": false });
        let told = read(json!({ "known": true, "problems": [problem] })).unwrap().unwrap();
        assert_eq!(line(&told[0]), "PeerAuthentication/shop/p: spec: it does nothing");
    }
}
