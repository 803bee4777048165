//! What routes of Gateway API say of themselves in their status, as the API server has it.

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE};
use e2e::mesh::wait_for;
use e2e::runner::Case;
use serde_json::Value;

use super::OnCluster;
use super::pods::Namespace;

pub(super) const CASES: &[OnCluster] = &[Case {
    name: "routes_say_for_each_parent_whether_they_count_and_where_they_do_not_lead",
    run: |cluster, _| conditions(cluster),
}];

const ACCEPTED: &str = "Accepted True Accepted";
const RESOLVED: &str = "ResolvedRefs True ResolvedRefs";
const OVERLAPPING: &str = "outrigger.dev/OverlappingMatches True OverlappingMatches";

fn conditions(cluster: &Cluster) -> Result<()> {
    let here = Namespace::injected(cluster, "conditions")?;
    let there = Namespace::injected(cluster, "conditions-far")?;
    for (namespace, name) in [(&here, "web"), (&here, "old"), (&there, "far")] {
        cluster.apply(&service(namespace.name, name))?;
    }
    let rules = |backend: &str| format!("rules: [{{ backendRefs: [{backend}] }}]");
    let web = rules("{ name: web, port: 80 }");
    let parent = "parentRefs: [{ group: '', kind: Service, name: web }]";
    let cases = [
        ("HTTPRoute", "good", format!("{parent}, {web}"), [ACCEPTED, RESOLVED]),
        (
            "HTTPRoute",
            "gone",
            format!("{parent}, {}", rules("{ name: gone, port: 80 }")),
            [ACCEPTED, "ResolvedRefs False BackendNotFound"],
        ),
        (
            "HTTPRoute",
            "bucket",
            format!("{parent}, {}", rules("{ group: storage.example.com, kind: Bucket, name: web }")),
            [ACCEPTED, "ResolvedRefs False InvalidKind"],
        ),
        (
            "HTTPRoute",
            "foreign",
            format!("{parent}, {}", rules("{ name: far, namespace: conditions-far, port: 80 }")),
            [ACCEPTED, "ResolvedRefs False RefNotPermitted"],
        ),
        (
            "HTTPRoute",
            "portless",
            format!("parentRefs: [{{ group: '', kind: Service, name: web, port: 81 }}], {web}"),
            ["Accepted False NoMatchingParent", RESOLVED],
        ),
        (
            "HTTPRoute",
            "extended",
            format!(
                "{parent}, rules: [{{ filters: [{{ type: ExtensionRef, extensionRef: {{ group: example.com, kind: Lua, name: a }} }}], backendRefs: [{{ name: web, port: 80 }}] }}]"
            ),
            [ACCEPTED, "ResolvedRefs False InvalidKind"],
        ),
        (
            "HTTPRoute",
            "extended-share",
            format!(
                "{parent}, rules: [{{ backendRefs: [{{ name: web, port: 80, filters: [{{ type: ExtensionRef, extensionRef: {{ group: example.com, kind: Lua, name: a }} }}] }}] }}]"
            ),
            [ACCEPTED, "ResolvedRefs False InvalidKind"],
        ),
        ("GRPCRoute", "calls", format!("parentRefs: [{{ group: '', kind: Service, name: old }}], {web}"), [ACCEPTED, RESOLVED]),
        (
            "TCPRoute",
            "late",
            format!("parentRefs: [{{ group: '', kind: Service, name: old }}], {web}"),
            ["Accepted False Conflicted", RESOLVED],
        ),
    ];
    for (kind, name, spec, _) in &cases {
        cluster.apply(&route(kind, name, spec))?;
    }
    for (kind, name, _, expected) in &cases {
        says(cluster, kind, name, expected)?;
    }
    // What is granted is resolved, and a new form of a route is spoken of as that.
    cluster.apply(
        "apiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\nmetadata: { name: here, namespace: conditions-far }\nspec:\n  from: [{ group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: conditions }]\n  to: [{ group: '', kind: Service, name: far }]\n",
    )?;
    says(cluster, "HTTPRoute", "foreign", &[ACCEPTED, RESOLVED])?;
    cluster.apply(&route("HTTPRoute", "gone", &format!("{parent}, {web}")))?;
    says(cluster, "HTTPRoute", "gone", &[ACCEPTED, RESOLVED])?;
    // Made last, it is asked last: nothing comes of it, which it says, until it matches something else.
    cluster.apply(&route("HTTPRoute", "again", &format!("{parent}, {web}")))?;
    says(cluster, "HTTPRoute", "again", &[ACCEPTED, RESOLVED, OVERLAPPING])?;
    let other = "rules: [{ matches: [{ path: { value: /again } }], backendRefs: [{ name: web, port: 80 }] }]";
    cluster.apply(&route("HTTPRoute", "again", &format!("{parent}, {other}")))?;
    says(cluster, "HTTPRoute", "again", &[ACCEPTED, RESOLVED])
}

fn service(namespace: &str, name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: {namespace} }}\nspec: {{ selector: {{ app: {name} }}, ports: [{{ name: http, port: 80 }}] }}\n"
    )
}

fn route(kind: &str, name: &str, spec: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{ name: {name}, namespace: conditions }}\nspec: {{ {spec} }}\n"
    )
}

/// Waits until the route says exactly that, of the form that it has, for its one parent.
fn says(cluster: &Cluster, kind: &str, name: &str, expected: &[&str]) -> Result<()> {
    wait_for(&format!("the status of {kind} {name}"), PATIENCE, || {
        let object = cluster.get(&["--namespace", "conditions", kind, name])?;
        let parents = object["status"]["parents"].as_array().context("no parents in the status")?;
        ensure!(parents.len() == 1, "not one parent: {parents:?}");
        let entry = parents.first().context("no parent")?;
        ensure!(entry["controllerName"] == "outrigger.dev/mesh", "{entry}");
        ensure!(entry["parentRef"] == object["spec"]["parentRefs"][0], "another parent: {entry}");
        let conditions = entry["conditions"].as_array().context("no conditions")?;
        let word = |condition: &Value, field: &str| condition[field].as_str().unwrap_or_default().to_owned();
        let said: Vec<String> =
            conditions.iter().map(|one| ["type", "status", "reason"].map(|field| word(one, field)).join(" ")).collect();
        // Of the others, which match the same, one is asked first.
        let said: Vec<String> = said.into_iter().filter(|one| name == "again" || one != OVERLAPPING).collect();
        ensure!(said == expected, "it says {said:?}, and not {expected:?}: {entry}");
        let of = |one: &Value| one["observedGeneration"] == object["metadata"]["generation"];
        ensure!(conditions.iter().all(of), "of another form of the route: {entry}");
        Ok(())
    })
}
