//! One answer out of those of several replicas. Pure.
//!
//! All replicas know the same documents and pods; which sidecars and node agents are connected, and what they acknowledged,
//! only the replica knows to which they are connected. Revisions are each replica's own.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::super::status::{list, number, string};

/// What all of them say to the question `path`, each by its pod's name. `silent` did not answer, each with why.
pub(super) fn merged(path: &str, answers: Vec<(String, Value)>, silent: Vec<(String, String)>) -> Value {
    let question = path.split('?').next().unwrap_or_default();
    // The youngest is the base: whoever is on the way back to a control plane is given time from its start.
    let base = answers.iter().max_by_key(|(_pod, answer)| number(answer, "/control/started"));
    let mut whole = base.map(|(_pod, answer)| answer.clone()).unwrap_or_default();
    let Some(fields) = whole.as_object_mut() else { return whole };
    match question {
        STATUS => statuses(fields, &answers),
        "/api/resources" => resources(fields, &answers),
        "/api/proxies" => proxies(fields, &answers),
        _ => {}
    }
    let silent = silent.into_iter().map(|(pod, reason)| json!({ "name": pod, "reason": reason }));
    fields.insert("silent".to_owned(), silent.collect());
    whole
}

/// The question of which the answer itself tells who is silent.
pub(super) const STATUS: &str = "/api/status";

fn statuses(whole: &mut Map<String, Value>, answers: &[(String, Value)]) {
    let replicas = answers.iter().map(|(pod, answer)| with(answer.get("control"), "name", pod.as_str().into()));
    whole.insert("replicas".to_owned(), replicas.collect());
    let mut connected = BTreeMap::new();
    let mut nodes = BTreeMap::new();
    for (_pod, answer) in answers {
        let revision = number(answer, "/control/revision");
        let pods = list(answer, "/pods").iter().filter(|pod| pod.get("connected") == Some(&Value::Bool(true)));
        connected.extend(pods.map(|pod| (named(pod), with(Some(pod), "revision", revision.into()))));
        nodes.extend(list(answer, "/nodes").iter().map(|node| (string(node, "/name"), node.clone())));
    }
    for pod in whole.get_mut("pods").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(known) = connected.remove(&named(pod)) {
            *pod = known;
        }
    }
    whole.insert("nodes".to_owned(), nodes.into_values().collect());
    for lines in ["withoutTarget", "denyingNobody", "coverage"] {
        let mut seen = BTreeSet::new();
        let all = answers.iter().filter_map(|(_pod, answer)| answer.get(lines)?.as_array()).flatten();
        let all: Vec<Value> = all.filter(|line| seen.insert(line.to_string())).cloned().collect();
        whole.insert(lines.to_owned(), all.into());
    }
}

/// A document is as it stands with all sidecars, whichever replica they are connected to.
fn resources(whole: &mut Map<String, Value>, answers: &[(String, Value)]) {
    let mut refused: BTreeMap<_, Vec<Value>> = BTreeMap::new();
    for (_pod, answer) in answers {
        for item in list(answer, "/items") {
            let by = list(item, "/status/refusedBy").iter().cloned();
            refused.entry(document(item)).or_default().extend(by);
        }
    }
    for item in whole.get_mut("items").and_then(Value::as_array_mut).into_iter().flatten() {
        let by = refused.remove(&document(item)).filter(|by| !by.is_empty());
        if let (Some(by), Some(status)) = (by, item.get_mut("status").and_then(Value::as_object_mut)) {
            status.insert("accepted".to_owned(), false.into());
            status.insert("refusedBy".to_owned(), by.into());
        }
    }
}

fn proxies(whole: &mut Map<String, Value>, answers: &[(String, Value)]) {
    let items = answers.iter().flat_map(|(_pod, answer)| {
        let revision = number(answer, "/revision");
        list(answer, "/items").iter().map(move |item| with(Some(item), "revision", revision.into()))
    });
    let mut items: Vec<Value> = items.collect();
    items.sort_by_key(named);
    whole.insert("items".to_owned(), items.into());
}

fn with(value: Option<&Value>, field: &str, is: Value) -> Value {
    let mut fields = value.and_then(Value::as_object).cloned().unwrap_or_default();
    fields.insert(field.to_owned(), is);
    fields.into()
}

fn named(item: &Value) -> (String, String) {
    (string(item, "/namespace"), string(item, "/name"))
}

fn document(item: &Value) -> (String, String, String) {
    (string(item, "/kind"), string(item, "/metadata/namespace"), string(item, "/metadata/name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(path: &str, first: Value, second: Value) -> Value {
        merged(path, vec![("control-a".to_owned(), first), ("control-b".to_owned(), second)], Vec::new())
    }

    #[test]
    fn a_pod_is_as_the_replica_knows_it_to_which_it_is_connected() {
        let replica = |started: u64, revision: u64, mine: &str, node: &str| {
            let pods = ["web", "api"].map(|name| {
                json!({ "namespace": "shop", "name": name, "connected": name == mine, "acknowledged": (name == mine).then_some(revision) })
            });
            json!({
                "control": { "started": started, "revision": revision },
                "nodes": [{ "name": node }, { "name": "shared" }],
                "withoutTarget": ["the same", mine],
                "pods": pods,
            })
        };
        let whole = both("/api/status", replica(20, 7, "web", "one"), replica(10, 90, "api", "two"));
        let pods = list(&whole, "/pods").iter();
        let pods: Vec<_> =
            pods.map(|pod| (string(pod, "/name"), number(pod, "/acknowledged"), number(pod, "/revision"))).collect();
        assert_eq!(pods, [("web".to_owned(), 7, 7), ("api".to_owned(), 90, 90)]);
        assert_eq!(whole["control"]["started"], 20, "the youngest");
        let names = |of: &str| list(&whole, of).iter().map(|one| string(one, "/name")).collect::<Vec<_>>();
        assert_eq!(names("/nodes"), ["one", "shared", "two"]);
        assert_eq!(names("/replicas"), ["control-a", "control-b"]);
        assert_eq!(whole["withoutTarget"], json!(["the same", "web", "api"]));
        assert_eq!(whole["silent"], json!([]));
    }

    #[test]
    fn a_document_is_refused_by_the_sidecars_of_all_replicas() {
        let replica = |by: Value| {
            let status = json!({ "accepted": by == json!([]), "refusedBy": by });
            json!({ "items": [{ "kind": "Mesh", "metadata": { "name": "mesh" }, "status": status }] })
        };
        let whole = both("/api/resources?kind=Mesh", replica(json!([])), replica(json!([{ "sidecar": "shop/web" }])));
        assert_eq!(whole["items"][0]["status"], json!({ "accepted": false, "refusedBy": [{ "sidecar": "shop/web" }] }));
        let whole = both("/api/resources", replica(json!([])), replica(json!([])));
        assert_eq!(whole["items"][0]["status"], json!({ "accepted": true, "refusedBy": [] }));
    }

    #[test]
    fn sidecars_of_all_replicas_are_listed_each_with_its_replicas_revision() {
        let replica =
            |name: &str, revision: u64| json!({ "revision": revision, "items": [{ "namespace": "shop", "name": name }] });
        let whole = both("/api/proxies", replica("web", 3), replica("api", 9));
        let items = list(&whole, "/items").iter().map(|item| (string(item, "/name"), number(item, "/revision")));
        assert_eq!(items.collect::<Vec<_>>(), [("api".to_owned(), 9), ("web".to_owned(), 3)]);
    }

    #[test]
    fn a_replica_that_does_not_answer_is_told() {
        let answers = vec![("control-a".to_owned(), json!({ "revision": 1, "items": [] }))];
        let whole = merged("/api/proxies", answers, vec![("control-b".to_owned(), "gone".to_owned())]);
        assert_eq!(whole["silent"], json!([{ "name": "control-b", "reason": "gone" }]));
    }
}
