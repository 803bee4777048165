//! What is looked at before anything is changed: may the user, can the cluster, and who else is there.

use std::collections::BTreeSet;

use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::api::storage::v1::CSINode;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Client;
use kube::api::{Api, ApiResource, GroupVersionKind, ListParams, PostParams};
use serde_json::Value;

use super::manifest::{NAMESPACE, kind};
use super::server::Server;

/// What a check came to.
#[derive(Debug, PartialEq)]
pub(in crate::cli) enum Verdict {
    Ok(String),
    /// It works, and somebody should know.
    Warn(String),
    /// It would not work: what is in the way, and what to do.
    Fail(String, String),
}

/// The oldest minor version of Kubernetes 1 whose inline CSI volumes are stable, and the oldest with native sidecars.
const OLDEST: u32 = 25;
const NATIVE_SIDECARS: u32 = 29;
/// The oldest kernel that the programs are made for.
const OLDEST_KERNEL: (u32, u32) = (6, 1);
const PRIVILEGE: &str = "pod-security.kubernetes.io/enforce";

/// Other meshes, by the webhooks that inject their sidecars.
const OTHERS: [(&str, &str); 5] =
    [("istio", "Istio"), ("linkerd", "Linkerd"), ("kuma", "Kuma"), ("consul", "Consul"), ("osm-", "Open Service Mesh")];

/// All checks, each under its name.
pub(super) async fn all(server: &Server, objects: &[Value]) -> Vec<(&'static str, Verdict)> {
    vec![
        ("server", version(&server.0).await.unwrap_or_else(unasked)),
        ("nodes", nodes(&server.0).await.unwrap_or_else(unasked)),
        ("volumes", volumes(server).await.unwrap_or_else(unasked)),
        ("pod security", privilege(server).await.unwrap_or_else(unasked)),
        ("rights", rights(server, objects).await.unwrap_or_else(unasked)),
        ("other meshes", others(server).await.unwrap_or_else(unasked)),
        ("former", former(server).await.unwrap_or_else(unasked)),
    ]
}

pub(in crate::cli) async fn version(client: &Client) -> kube::Result<Verdict> {
    let told = client.apiserver_version().await?;
    let minor = told.minor.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0);
    Ok(of_version(&told.git_version, minor))
}

fn of_version(version: &str, minor: u32) -> Verdict {
    if minor < OLDEST {
        return Verdict::Fail(
            format!("{version} is older than 1.{OLDEST}, since when pods may have volumes of our driver"),
            "upgrade Kubernetes".to_owned(),
        );
    }
    if minor < NATIVE_SIDECARS {
        return Verdict::Warn(format!("{version} has no native sidecars: an application starts and ends beside its sidecar"));
    }
    Verdict::Ok(version.to_owned())
}

pub(in crate::cli) async fn nodes(client: &Client) -> kube::Result<Verdict> {
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await?;
    let mut old = BTreeSet::new();
    for node in &nodes.items {
        let Some(info) = node.status.as_ref().and_then(|status| status.node_info.as_ref()) else { continue };
        let mut numbers = info.kernel_version.split(|sign: char| !sign.is_ascii_digit()).map(str::parse::<u32>);
        if let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next())
            && info.operating_system == "linux"
            && (major, minor) < OLDEST_KERNEL
        {
            old.insert(format!("{} ({})", node.metadata.name.clone().unwrap_or_default(), info.kernel_version));
        }
    }
    let old: Vec<String> = old.into_iter().collect();
    Ok(if old.is_empty() {
        Verdict::Ok(format!("{} of them, with kernels that take the programs", nodes.items.len()))
    } else {
        Verdict::Warn(format!("kernels older than 6.1 take no programs: {}", old.join(", ")))
    })
}

async fn volumes(server: &Server) -> kube::Result<Verdict> {
    // The kubelet makes one of its node as soon as it serves drivers.
    let served = Api::<CSINode>::all(server.0.clone()).list(&ListParams::default().limit(1)).await?;
    Ok(if served.items.is_empty() {
        let text = "no node serves volumes of drivers (there is no CSINode)".to_owned();
        Verdict::Fail(text, "let the kubelets run with their CSI plugin".to_owned())
    } else {
        Verdict::Ok("nodes serve volumes of drivers".to_owned())
    })
}

async fn privilege(server: &Server) -> kube::Result<Verdict> {
    let namespace = Api::<Namespace>::all(server.0.clone()).get_opt(NAMESPACE).await?;
    let labels = namespace.and_then(|namespace| namespace.metadata.labels).unwrap_or_default();
    Ok(match labels.get(PRIVILEGE).map(String::as_str) {
        None | Some("privileged") => Verdict::Ok(format!("{NAMESPACE} takes the node agent")),
        Some(level) => Verdict::Warn(format!("{NAMESPACE} enforces {level}; it is set to privileged, for the node agent")),
    })
}

/// May the user make each kind of object?
async fn rights(server: &Server, objects: &[Value]) -> kube::Result<Verdict> {
    let reviews = Api::<SelfSubjectAccessReview>::all(server.0.clone());
    let mut asked = BTreeSet::new();
    let mut refused = Vec::new();
    for object in objects {
        let version = object.get("apiVersion").and_then(Value::as_str).unwrap_or_default();
        let (group, version) = version.split_once('/').unwrap_or(("", version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind(object))).plural;
        let namespace = object.pointer("/metadata/namespace").and_then(Value::as_str);
        for verb in ["create", "patch"] {
            if !asked.insert((group, resource.clone(), namespace, verb)) {
                continue;
            }
            let attributes = ResourceAttributes {
                group: Some(group.to_owned()),
                resource: Some(resource.clone()),
                namespace: namespace.map(str::to_owned),
                verb: Some(verb.to_owned()),
                ..ResourceAttributes::default()
            };
            let review = SelfSubjectAccessReview {
                spec: SelfSubjectAccessReviewSpec {
                    resource_attributes: Some(attributes),
                    ..SelfSubjectAccessReviewSpec::default()
                },
                ..SelfSubjectAccessReview::default()
            };
            let answer = reviews.create(&PostParams::default(), &review).await?;
            if !answer.status.is_some_and(|status| status.allowed) {
                refused.push(format!("{verb} {resource}"));
            }
        }
    }
    Ok(if refused.is_empty() {
        Verdict::Ok("this user may make all of it".to_owned())
    } else {
        Verdict::Fail(
            format!("this user may not: {}", refused.join(", ")),
            "install as an administrator of the cluster".to_owned(),
        )
    })
}

async fn others(server: &Server) -> kube::Result<Verdict> {
    let webhooks = Api::<MutatingWebhookConfiguration>::all(server.0.clone()).list(&ListParams::default()).await?;
    let found = other_meshes(webhooks.items.iter().filter_map(|webhook| webhook.metadata.name.as_deref()));
    Ok(if found.is_empty() {
        Verdict::Ok("none".to_owned())
    } else {
        let names: Vec<&str> = found.into_iter().collect();
        Verdict::Warn(format!("{} injects pods here: label no namespace for both", names.join(" and ")))
    })
}

fn other_meshes<'a>(webhooks: impl Iterator<Item = &'a str>) -> BTreeSet<&'static str> {
    webhooks.filter_map(|webhook| OTHERS.iter().find(|(mark, _)| webhook.contains(mark)).map(|(_, name)| *name)).collect()
}

/// An installation of Helm's is Helm's: it would take our changes for somebody's mistakes.
async fn former(server: &Server) -> kube::Result<Verdict> {
    let control = Api::<Deployment>::namespaced(server.0.clone(), NAMESPACE).get_opt("control").await?;
    let Some(control) = control.map(|control| control.metadata) else {
        return Ok(Verdict::Ok("nothing is installed yet".to_owned()));
    };
    let labels = control.labels.as_ref();
    let version = labels.and_then(|labels| labels.get("app.kubernetes.io/version")).map_or("?", String::as_str);
    Ok(if release(&control).is_some() {
        Verdict::Fail(format!("version {version} is there, installed by Helm"), "go on with helm upgrade".to_owned())
    } else {
        Verdict::Ok(format!("version {version} is there, and is brought to this one"))
    })
}

/// The release of Helm's to which an object belongs; none if Helm has not made it.
pub(super) fn release(metadata: &ObjectMeta) -> Option<&str> {
    let is_helms = metadata.labels.as_ref().and_then(|labels| labels.get("app.kubernetes.io/managed-by"))? == "Helm";
    let name = metadata.annotations.as_ref().and_then(|annotations| annotations.get("meta.helm.sh/release-name"));
    is_helms.then(|| name.map_or("outrigger", String::as_str))
}

/// What the API server says. Its error's own text has the whole answer behind it, as a program writes it.
pub(in crate::cli) fn said(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

fn unasked(error: kube::Error) -> Verdict {
    Verdict::Fail(said(&error), "see that the API server answers, and what this user may read".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_of_the_api_servers_is_told_in_its_own_words() {
        let status = kube::core::Status::failure("nodes is forbidden", "Forbidden").with_code(403).boxed();
        let Verdict::Fail(told, _remedy) = unasked(kube::Error::Api(status)) else { panic!() };
        assert_eq!(told, "nodes is forbidden");
    }

    #[test]
    fn a_server_without_our_volumes_is_refused_and_one_without_native_sidecars_is_told() {
        assert!(matches!(of_version("v1.24.9", 24), Verdict::Fail(..)));
        assert!(matches!(of_version("v1.28.1", 28), Verdict::Warn(_)));
        assert_eq!(of_version("v1.36.3", 36), Verdict::Ok("v1.36.3".to_owned()));
    }

    #[test]
    fn an_object_of_helms_is_known_by_its_label_and_names_its_release() {
        let of = |by: &str, named: Option<&str>| {
            let annotations = named.map(|name| [("meta.helm.sh/release-name".to_owned(), name.to_owned())].into());
            let labels = Some([("app.kubernetes.io/managed-by".to_owned(), by.to_owned())].into());
            release(&ObjectMeta { labels, annotations, ..ObjectMeta::default() }).map(str::to_owned)
        };
        assert_eq!(of("Helm", Some("mesh")).as_deref(), Some("mesh"));
        assert_eq!(of("Helm", None).as_deref(), Some("outrigger"));
        assert_eq!((of("outrigger", Some("mesh")), release(&ObjectMeta::default())), (None, None));
    }

    #[test]
    fn other_meshes_are_known_by_their_webhooks() {
        let found =
            other_meshes(["istio-sidecar-injector", "cert-manager-webhook", "linkerd-proxy-injector-webhook-config"].into_iter());
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["Istio", "Linkerd"]);
    }
}
