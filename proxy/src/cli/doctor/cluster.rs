//! A mesh on Kubernetes, as its API server tells of it: can the cluster have one, is it installed, does each part run, which
//! pods ask for a sidecar and have none or one that does not serve, which documents and routes are refused or lead nowhere.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::BoxFuture;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Secret};
use k8s_openapi::api::storage::v1::CSINode;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, ListParams};
use kube::{Client, ResourceExt};
use serde_json::Value;

use super::super::Failure;
use super::super::install::checks::{self, Verdict};
use super::super::install::manifest::NAMESPACE;
use super::super::install::server::Server;
use super::authority::{self, Told};
use super::wanted::Wanted;
use super::webhooks::{self, Webhooks};
use super::{Finding, agents, sidecars};
use crate::base::clock::WallClock;
use crate::control::cluster::root;
use crate::control::source::kubernetes::written::is_of_ours;
use crate::model::Kind;
use crate::model::marks;

/// One look at the cluster. Boxed, for what is asked of an API server is large while it waits.
type Look = for<'a> fn(&'a Client) -> BoxFuture<'a, kube::Result<Vec<Finding>>>;

/// What is looked at in any case.
const ALWAYS: [(&str, Look); 3] = [
    ("server", |client| Box::pin(async { Ok(vec![judged("server", checks::version(client).await?)]) })),
    ("nodes", |client| Box::pin(async { Ok(vec![judged("nodes", checks::nodes(client).await?)]) })),
    (INSTALLED, |client| Box::pin(installed(client))),
];

/// What is looked at where a mesh is installed.
const OF_A_MESH: [(&str, Look); 10] = [
    ("control", |client| Box::pin(control(client))),
    ("agents", |client| Box::pin(agents(client))),
    ("authority", |client| Box::pin(authority(client))),
    ("driver", |client| Box::pin(driver(client))),
    ("webhooks", |client| Box::pin(webhooks(client))),
    ("status", |client| Box::pin(writer(client))),
    ("sidecars", |client| Box::pin(sidecars(client))),
    ("documents", |client| Box::pin(documents(client))),
    ("gateway api", |client| Box::pin(gateway_api(client))),
    ("routes", |client| Box::pin(routes(client))),
];

/// Looks at the cluster that KUBECONFIG names.
pub(super) fn look() -> Result<Vec<Finding>, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let server = Server::connect().await?;
        let mut findings = asked(&server.0, &ALWAYS).await;
        if findings.iter().any(|finding| finding.check == INSTALLED && finding.verdict == super::Verdict::Ok) {
            findings.extend(asked(&server.0, &OF_A_MESH).await);
        }
        Ok(findings)
    })
}

/// What the questions came to; one that is not answered is told as such.
async fn asked(client: &Client, looks: &[(&'static str, Look)]) -> Vec<Finding> {
    let remedy = "see that the API server answers, and what this user may read";
    let mut findings = Vec::new();
    for (check, look) in looks {
        match tokio::time::timeout(ANSWER_AT_MOST, look(client)).await {
            Ok(Ok(found)) => findings.extend(found),
            Ok(Err(error)) => findings.push(Finding::fail(check, checks::said(&error), remedy)),
            Err(_elapsed) => {
                let text = format!("the API server did not answer within {ANSWER_AT_MOST:?}");
                findings.push(Finding::fail(check, text, remedy));
            }
        }
    }
    findings
}

fn judged(check: &'static str, verdict: Verdict) -> Finding {
    match verdict {
        Verdict::Ok(text) => Finding::ok(check, text),
        Verdict::Warn(text) => Finding::warn(check, text, "docs/kubernetes.md tells what a cluster needs"),
        Verdict::Fail(text, remedy) => Finding::fail(check, text, remedy),
    }
}

async fn installed(client: &Client) -> kube::Result<Vec<Finding>> {
    let control = Api::<Deployment>::namespaced(client.clone(), NAMESPACE).get_opt("control").await?;
    let Some(control) = control else {
        return Ok(vec![Finding::fail(INSTALLED, "no control plane is installed", "outrigger install")]);
    };
    let label = |name: &str| control.labels().get(name).cloned().unwrap_or_else(|| "?".to_owned());
    let (version, by) = (label("app.kubernetes.io/version"), label("app.kubernetes.io/managed-by"));
    let mut findings = vec![Finding::ok(INSTALLED, format!("version {version}, by {by}"))];
    if version != env!("CARGO_PKG_VERSION") {
        let text = format!("the mesh is of version {version}, this command of {}", env!("CARGO_PKG_VERSION"));
        findings.push(Finding::warn("version", text, "use the command of the mesh's version, or upgrade the mesh"));
    }
    Ok(findings)
}

async fn control(client: &Client) -> kube::Result<Vec<Finding>> {
    let control = Api::<Deployment>::namespaced(client.clone(), NAMESPACE).get("control").await?;
    let wanted = control.spec.and_then(|spec| spec.replicas).unwrap_or(1);
    let there = control.status.and_then(|status| status.available_replicas).unwrap_or(0);
    if wanted > 0 && there >= wanted {
        return Ok(vec![Finding::ok("control", format!("{there} of {wanted} replicas answer"))]);
    }
    let text = format!("{there} of {wanted} replicas answer{}", why(&pods_of(client, "control").await?));
    let remedy = format!("kubectl -n {NAMESPACE} describe deployment control; kubectl -n {NAMESPACE} logs deployment/control");
    Ok(vec![if there > 0 { Finding::warn("control", text, remedy) } else { Finding::fail("control", text, remedy) }])
}

async fn agents(client: &Client) -> kube::Result<Vec<Finding>> {
    let Some(set) = Api::<DaemonSet>::namespaced(client.clone(), NAMESPACE).get_opt("node").await? else {
        return Ok(vec![Finding::fail("agents", "there are none", "outrigger upgrade, or helm upgrade")]);
    };
    let pods = pods_of(client, "node").await?;
    Ok(agents::look(&wanted(client, Some(&set), &pods).await?, &pods, &why(&pods)))
}

/// Where agents are wanted.
async fn wanted(client: &Client, set: Option<&DaemonSet>, agents: &[Pod]) -> kube::Result<Wanted> {
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await?;
    let of_mesh = ListParams::default().labels(&format!("{}={}", marks::SIDECAR, marks::INJECTED));
    let meshed = Api::<Pod>::all(client.clone()).list(&of_mesh).await?;
    Ok(Wanted::of(&nodes.items, set, agents, &meshed.items))
}

async fn authority(client: &Client) -> kube::Result<Vec<Finding>> {
    let secret = match Api::<Secret>::namespaced(client.clone(), NAMESPACE).get_metadata_opt(root::SECRET).await {
        Ok(secret) => secret.map_or(Told::Absent, |secret| Told::There(secret.metadata.creation_timestamp)),
        Err(kube::Error::Api(status)) if status.code == 403 => Told::Unknown,
        Err(error) => return Err(error),
    };
    let root = Api::<ConfigMap>::namespaced(client.clone(), NAMESPACE).get_metadata_opt(root::CONFIG).await?;
    Ok(authority::look(&secret, root.as_ref().map(|root| &root.metadata), &pods_of(client, "node").await?))
}

/// The pods of a part of the mesh.
async fn pods_of(client: &Client, part: &str) -> kube::Result<Vec<Pod>> {
    let of_part = ListParams::default().labels(&format!("app.kubernetes.io/part-of=outrigger,app.kubernetes.io/name={part}"));
    Ok(Api::<Pod>::namespaced(client.clone(), NAMESPACE).list(&of_part).await?.items)
}

/// What keeps a part's pods, as far as they say it.
fn why(pods: &[Pod]) -> String {
    let reasons: BTreeSet<String> = pods.iter().filter_map(reason).collect();
    reasons.into_iter().take(SHOWN).map(|reason| format!("; {reason}")).collect()
}

/// Why a pod does not run.
fn reason(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let conditions = status.conditions.iter().flatten();
    let unscheduled = conditions.clone().find(|one| one.type_ == "PodScheduled" && one.status == "False");
    if let Some(condition) = unscheduled {
        return Some(format!("{}: {}", pod.name_any(), condition.message.as_deref().unwrap_or("not scheduled")));
    }
    let waiting = status.container_statuses.iter().flatten().find_map(|one| one.state.as_ref()?.waiting.as_ref());
    if let Some(waiting) = waiting {
        let [reason, message] = [&waiting.reason, &waiting.message].map(|text| text.as_deref().unwrap_or_default());
        return Some(format!("{}: {reason} {message}", pod.name_any()).trim_end().to_owned());
    }
    let unready = conditions.into_iter().find(|one| one.type_ == "Ready" && one.status == "False")?;
    Some(format!("{}: {}", pod.name_any(), unready.message.as_deref().unwrap_or("not ready")))
}

async fn driver(client: &Client) -> kube::Result<Vec<Finding>> {
    let set = Api::<DaemonSet>::namespaced(client.clone(), NAMESPACE).get_opt("node").await?;
    let wanted = wanted(client, set.as_ref(), &pods_of(client, "node").await?).await?;
    let kubelets = Api::<CSINode>::all(client.clone()).list(&ListParams::default()).await?;
    Ok(agents::driver(&wanted, &kubelets.items))
}

async fn webhooks(client: &Client) -> kube::Result<Vec<Finding>> {
    let root = Api::<ConfigMap>::namespaced(client.clone(), NAMESPACE).get_opt(root::CONFIG).await?;
    Ok(webhooks::look(Webhooks {
        of_pods: Api::all(client.clone()).get_opt("outrigger").await?,
        of_documents: Api::all(client.clone()).get_opt("outrigger").await?,
        root: root.and_then(|root| root.data?.remove(root::CERTIFICATE)),
    }))
}

async fn writer(client: &Client) -> kube::Result<Vec<Finding>> {
    let lease = Api::<Lease>::namespaced(client.clone(), NAMESPACE).get_opt("outrigger-control").await?;
    let holder = lease.and_then(|lease| lease.spec?.holder_identity).filter(|holder| !holder.is_empty());
    Ok(vec![match holder {
        Some(holder) => Finding::ok("status", format!("{holder} writes it")),
        None => Finding::warn("status", "no replica of the control plane writes it", "it is taken up within 15 s; look again"),
    }])
}

async fn sidecars(client: &Client) -> kube::Result<Vec<Finding>> {
    let namespaces = Api::<Namespace>::all(client.clone()).list(&ListParams::default()).await?;
    let pods = Api::<Pod>::all(client.clone()).list(&ListParams::default()).await?;
    let now = i64::try_from(WallClock::system().since_epoch().as_secs()).unwrap_or(i64::MAX);
    Ok(sidecars::look(&namespaces.items, &pods.items, now))
}

/// Documents of our kinds that are not in force, or are for what is not there.
async fn documents(client: &Client) -> kube::Result<Vec<Finding>> {
    let (mut count, mut found) = (0_usize, Vec::new());
    for kind in Kind::ALL.into_iter().filter(|kind| kind.api_version().starts_with("outrigger.dev/")) {
        for object in served(client, kind).await? {
            count += 1;
            found.extend(standing("documents", kind, &object));
        }
    }
    let well = Finding::ok("documents", format!("{count} of our kinds, none is refused"));
    Ok(summed(well, found))
}

/// Routes that count for nothing, in part or as a whole, or lead to what is not there.
async fn routes(client: &Client) -> kube::Result<Vec<Finding>> {
    let (mut count, mut found) = (0_usize, Vec::new());
    for kind in [Kind::HttpRoute, Kind::GrpcRoute, Kind::TlsRoute, Kind::TcpRoute] {
        for object in served(client, kind).await? {
            let parents = object.data.pointer("/status/parents").and_then(Value::as_array).into_iter().flatten();
            count += usize::from(parents.into_iter().any(is_of_ours));
            found.extend(standing("routes", kind, &object));
        }
    }
    let well = Finding::ok("routes", format!("{count} of Services, each is accepted and leads somewhere"));
    Ok(summed(well, found))
}

/// All objects of a kind, of the first of its versions that the API server has; none where it knows none of them.
async fn served(client: &Client, kind: Kind) -> kube::Result<Vec<DynamicObject>> {
    for version in kind.api_versions() {
        let (group, short) = version.split_once('/').unwrap_or(("", version));
        let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, short, kind.as_str()), kind.plural());
        match Api::<DynamicObject>::all_with(client.clone(), &resource).list(&ListParams::default()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            listed => return listed.map(|listed| listed.items),
        }
    }
    Ok(Vec::new())
}

/// What the conditions of a document say that is not as its author wants it. A route has some for each of its parents; what
/// other controllers say of it is theirs.
fn standing(check: &'static str, kind: Kind, object: &DynamicObject) -> Vec<Finding> {
    let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
    let text = |value: &Value, field: &str| value.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
    let place = object.namespace().map(|namespace| format!("{namespace}/")).unwrap_or_default();
    let name = format!("{} {place}{}", kind.as_str(), object.name_any());
    let own = list(object.data.pointer("/status/conditions")).into_iter().map(|condition| (name.clone(), condition));
    let parents = list(object.data.pointer("/status/parents")).into_iter().filter(is_of_ours);
    let of_parents = parents.flat_map(|parent| {
        let of = parent.pointer("/parentRef/name").and_then(Value::as_str).unwrap_or_default();
        let named = format!("{name} at Service {of}");
        list(parent.get("conditions")).into_iter().map(move |condition| (named.clone(), condition)).collect::<Vec<_>>()
    });
    let conditions = own.chain(of_parents).filter_map(|(named, condition)| {
        let [of, status, reason, message] = ["type", "status", "reason", "message"].map(|field| text(&condition, field));
        let told = format!("{named}: {of} is {status}, {reason}: {message}");
        match (of.as_str(), status.as_str()) {
            ("Accepted", "False") | ("PartiallyInvalid", "True") => {
                Some(Finding::fail(check, told, "correct it; what was good before stays in force"))
            }
            ("ResolvedRefs", "False") => Some(Finding::warn(check, told, "make what it names, or name something else")),
            _ => None,
        }
    });
    conditions.collect()
}

/// The worst, as many as are shown, and how many more there are; or that all is well.
fn summed(well: Finding, mut found: Vec<Finding>) -> Vec<Finding> {
    if found.is_empty() {
        return vec![well];
    }
    found.sort_by_key(|finding| finding.verdict != super::Verdict::Fail);
    let more = found.len().saturating_sub(SHOWN);
    found.truncate(SHOWN);
    if more > 0 {
        found.push(Finding::warn(well.check, format!("{more} more are not shown"), "correct these first"));
    }
    found
}

async fn gateway_api(client: &Client) -> kube::Result<Vec<Finding>> {
    let groups = client.list_api_groups().await?;
    let is_there = groups.groups.iter().any(|group| group.name == "gateway.networking.k8s.io");
    Ok(vec![if is_there {
        Finding::ok("gateway api", "its kinds are defined")
    } else {
        let remedy = "install the definitions of Gateway API, if routes are wanted";
        Finding::warn("gateway api", "its kinds are not defined: there are no routes", remedy)
    }])
}

/// Of many names the first few, and how many more there are.
pub(super) fn list(names: &[String]) -> String {
    let shown = names.get(..SHOWN.min(names.len())).unwrap_or_default().join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}

const INSTALLED: &str = "installed";

/// Of a long list, so many.
const SHOWN: usize = 5;
const ANSWER_AT_MOST: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_says_why_it_does_not_run() {
        let of = |status: Value| {
            let pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "node-1" }, "status": status });
            reason(&serde_json::from_value(pod).unwrap())
        };
        let unscheduled = json!({ "conditions": [{ "type": "PodScheduled", "status": "False", "message": "no room" }] });
        assert_eq!(of(unscheduled).unwrap(), "node-1: no room");
        let container = |state: Value| json!({ "containerStatuses": [{ "name": "node", "image": "i", "imageID": "", "ready": false, "restartCount": 0, "state": state }] });
        let waiting = json!({ "waiting": { "reason": "ErrImagePull", "message": "no such image" } });
        assert_eq!(of(container(waiting)).unwrap(), "node-1: ErrImagePull no such image");
        assert_eq!(of(container(json!({ "running": {} }))), None);
    }

    fn of(kind: Kind, status: &Value) -> Vec<Finding> {
        let object = json!({ "metadata": { "name": "web", "namespace": "shop" }, "status": status });
        standing("routes", kind, &serde_json::from_value(object).unwrap())
    }

    fn condition(of: &str, status: &str) -> Value {
        json!({ "type": of, "status": status, "reason": "Why", "message": "because" })
    }

    #[test]
    fn a_route_is_told_for_each_parent_at_which_it_is_not_as_written() {
        let parent = |controller: &str, name: &str, conditions: Value| json!({ "controllerName": controller, "parentRef": { "name": name }, "conditions": conditions });
        let found = of(
            Kind::HttpRoute,
            &json!({ "parents": [
                parent("outrigger.dev/mesh", "good", json!([condition("Accepted", "True"), condition("ResolvedRefs", "True")])),
                parent("outrigger.dev/mesh", "no", json!([condition("Accepted", "False"), condition("ResolvedRefs", "Unknown")])),
                parent("outrigger.dev/mesh", "part", json!([condition("Accepted", "True"), condition("PartiallyInvalid", "True")])),
                parent("outrigger.dev/mesh", "gone", json!([condition("ResolvedRefs", "False")])),
                parent("example.com/gateway", "edge", json!([condition("Accepted", "False")])),
            ] }),
        );
        let told: Vec<_> = found.iter().map(|finding| (finding.verdict, finding.text.as_str())).collect();
        assert_eq!(
            told,
            [
                (super::super::Verdict::Fail, "HTTPRoute shop/web at Service no: Accepted is False, Why: because"),
                (super::super::Verdict::Fail, "HTTPRoute shop/web at Service part: PartiallyInvalid is True, Why: because"),
                (super::super::Verdict::Warn, "HTTPRoute shop/web at Service gone: ResolvedRefs is False, Why: because"),
            ]
        );
    }

    #[test]
    fn a_document_of_ours_is_told_by_its_own_conditions() {
        let found = of(Kind::AuthorizationPolicy, &json!({ "conditions": [condition("Accepted", "False")] }));
        assert_eq!(found[0].text, "AuthorizationPolicy shop/web: Accepted is False, Why: because");
        assert_eq!(of(Kind::AuthorizationPolicy, &json!({ "conditions": [condition("Accepted", "True")] })), []);
    }

    #[test]
    fn failures_are_shown_before_warnings_and_the_rest_is_counted() {
        let found = (0..6).map(|_| Finding::warn("routes", "w", "r")).chain([Finding::fail("routes", "f", "r")]).collect();
        let shown = summed(Finding::ok("routes", "all"), found);
        assert_eq!((shown[0].text.as_str(), shown.len(), shown[5].text.as_str()), ("f", 6, "2 more are not shown"));
        assert_eq!(summed(Finding::ok("routes", "all"), Vec::new())[0].text, "all");
    }

    #[test]
    fn a_long_list_is_cut() {
        let names: Vec<String> = (1..=7).map(|number| format!("p{number}")).collect();
        assert_eq!(list(&names), "p1, p2, p3, p4, p5 and 2 more");
        assert_eq!(list(&names[..1]), "p1");
    }
}
