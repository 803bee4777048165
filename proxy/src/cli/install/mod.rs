//! `outrigger install`, `upgrade` and `uninstall`: the manifests that the Helm chart renders, applied by the API server.
//!
//! Nothing is changed before every check has passed; what is done is told step by step, and at the end whether it runs.

pub(super) mod checks;
pub(super) mod manifest;
pub(super) mod server;

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DynamicObject, ListParams};
use serde_json::Value;
use tokio::time::Instant;

use self::checks::Verdict;
use self::manifest::{NAMESPACE, SETTINGS, Settings, kind, name};
use self::server::Server;
use super::{Failure, print};
use crate::base::units::Span;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  outrigger install
  outrigger install --trust-domain shop.example --replicas 3
  outrigger install --print | kubectl diff -f -

It applies what the Helm chart in deploy/chart renders; whoever uses Helm installs with Helm. The cluster is the one that KUBECONFIG names.")]
pub(crate) struct InstallArgs {
    #[command(flatten)]
    settings: Settings,
    /// Print the manifests, and change nothing
    #[arg(long)]
    print: bool,
    /// How long it may take until everything runs
    #[arg(long, value_name = "DURATION", default_value = "3m")]
    timeout: Span,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  outrigger upgrade
  outrigger upgrade --replicas 3

What was set when it was installed stays set, except for what is said here. Running pods keep their sidecars until they are restarted.")]
pub(crate) struct UpgradeArgs {
    #[command(flatten)]
    settings: Settings,
    /// How long it may take until everything runs
    #[arg(long, value_name = "DURATION", default_value = "3m")]
    timeout: Span,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  outrigger uninstall
  outrigger uninstall --check
  outrigger uninstall --force --crds

It refuses while pods have sidecars, which could not renew their certificates any more, and where Helm installed the mesh, which is to take it away. The definitions of our kinds stay, and with them what was written of them.")]
pub(crate) struct UninstallArgs {
    /// Only say whether pods have sidecars, and change nothing
    #[arg(long, conflicts_with_all = ["force", "crds"])]
    check: bool,
    /// Also while pods have sidecars, and also what Helm installed
    #[arg(long)]
    force: bool,
    /// The definitions of our kinds as well, and everything that was written of them
    #[arg(long)]
    crds: bool,
    /// How long it may take until everything is gone
    #[arg(long, value_name = "DURATION", default_value = "3m")]
    timeout: Span,
}

/// What an injected pod carries.
const INJECTED: &str = "outrigger.dev/sidecar=injected";
/// Between two looks at what is not as it shall be yet.
const LOOK_EVERY: Duration = Duration::from_millis(500);

pub(crate) fn install(args: InstallArgs) -> Result<ExitCode, Failure> {
    let objects = wanted(&args.settings)?;
    if args.print {
        return print(&written(&objects)?).map(|()| ExitCode::SUCCESS);
    }
    run(async {
        let server = Server::connect().await?;
        put(&server, &objects, args.timeout.0).await?;
        print(
            "outrigger is installed. Have the pods of a namespace injected when they are made next:\n  kubectl label namespace NAMESPACE outrigger.dev/inject=enabled\n  kubectl -n NAMESPACE rollout restart deployment\n",
        )
    })
}

pub(crate) fn upgrade(args: UpgradeArgs) -> Result<ExitCode, Failure> {
    run(async {
        let server = Server::connect().await?;
        let former = former(&server).await?;
        let objects = wanted(&args.settings.over(former))?;
        put(&server, &objects, args.timeout.0).await?;
        print("outrigger is upgraded. Pods get its sidecar when they are restarted.\n")
    })
}

pub(crate) fn uninstall(args: UninstallArgs) -> Result<ExitCode, Failure> {
    let mut objects = wanted(&Settings::default())?;
    objects.retain(|object| args.crds || kind(object) != "CustomResourceDefinition");
    run(async {
        let server = Server::connect().await?;
        // Who only looks may be Helm's own guard, which may ask for no more than pods.
        if !args.check {
            let control = control(&server).await?;
            if let Some(release) = control.as_ref().and_then(checks::release) {
                helms(release, args.force)?;
            }
        }
        let injected = injected(&server).await?;
        if !args.force && !injected.is_empty() {
            let count = injected.len();
            let shown: Vec<String> = injected.into_iter().take(5).collect();
            return Err(Failure::refused([
                format!("{count} pods have sidecars: {}{}", shown.join(", "), if count > shown.len() { ", ..." } else { "" }),
                "remedy: take the label outrigger.dev/inject off and restart them, or say --force (with Helm: --no-hooks)"
                    .to_owned(),
            ]));
        }
        if args.check {
            return print("no pod has a sidecar\n");
        }
        // In the reverse order: nobody is sent to a webhook that has gone.
        for object in objects.iter().rev() {
            let was_there = server.delete(object).await?;
            tell(if was_there { "deleted" } else { "absent" }, &name(object))?;
        }
        let deadline = Instant::now() + args.timeout.0;
        for object in objects.iter().rev() {
            while server.get(object).await?.is_some() {
                late(
                    deadline,
                    &name(object),
                    "is still there",
                    "see what holds it: its finalizers, or what is in the namespace",
                )?;
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
        print("outrigger is uninstalled\n")
    })
}

/// Taken away behind Helm's back, a release would still be there for Helm, and be refused when it is installed again.
fn helms(release: &str, force: bool) -> Result<(), Failure> {
    let what = format!("the mesh was installed by Helm, as the release {release}");
    let way = format!("helm uninstall {release} --namespace {NAMESPACE}");
    if force {
        return tell("warn", &format!("{what}: it is taken away all the same, and Helm does not know; {way} ends the release"));
    }
    Err(Failure::refused([what, format!("remedy: {way}, or say --force")]))
}

fn wanted(settings: &Settings) -> Result<Vec<Value>, Failure> {
    if let Some(problem) = settings.problem() {
        return Err(Failure::invalid([problem]));
    }
    manifest::objects(settings)
        .map_err(|error| Failure::environment(error, "report this: the manifests in this binary are broken"))
}

fn run(work: impl Future<Output = Result<(), Failure>>) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(work).map(|()| ExitCode::SUCCESS)
}

/// Checks, applies, and waits until all of it runs.
async fn put(server: &Server, objects: &[Value], timeout: Duration) -> Result<(), Failure> {
    let mut in_the_way = Vec::new();
    for (check, verdict) in checks::all(server, objects).await {
        match verdict {
            Verdict::Ok(text) => tell("ok", &format!("{check}: {text}"))?,
            Verdict::Warn(text) => tell("warn", &format!("{check}: {text}"))?,
            Verdict::Fail(text, remedy) => {
                tell("fail", &format!("{check}: {text}"))?;
                in_the_way.extend([format!("{check}: {text}"), format!("remedy: {remedy}")]);
            }
        }
    }
    if !in_the_way.is_empty() {
        return Err(Failure::environment_of(in_the_way));
    }
    let deadline = Instant::now() + timeout;
    for object in objects {
        server.apply(object).await?;
        tell("applied", &name(object))?;
    }
    for object in objects {
        loop {
            let Some(missing) = server.get(object).await?.as_ref().map_or(Some("is gone".to_owned()), unready) else {
                break;
            };
            let remedy = format!("kubectl -n {NAMESPACE} describe {}", name(object));
            late(deadline, &name(object), &missing, &remedy)?;
            tokio::time::sleep(LOOK_EVERY).await;
        }
        if matches!(kind(object), "Deployment" | "DaemonSet") {
            tell("runs", &name(object))?;
        }
    }
    Ok(())
}

/// What an object lacks that something shall run by.
fn unready(object: &DynamicObject) -> Option<String> {
    let number = |pointer: &str| object.data.pointer(pointer).and_then(Value::as_i64).unwrap_or_default();
    let is_seen = number("/status/observedGeneration") >= object.metadata.generation.unwrap_or_default();
    let (wanted, updated, available) = match object.types.as_ref()?.kind.as_str() {
        "Deployment" => (number("/spec/replicas"), number("/status/updatedReplicas"), number("/status/availableReplicas")),
        "DaemonSet" => (
            number("/status/desiredNumberScheduled"),
            number("/status/updatedNumberScheduled"),
            number("/status/numberAvailable"),
        ),
        "CustomResourceDefinition" => {
            let conditions = object.data.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
            let is_served = conditions.into_iter().any(|one| is_true(one, "Established"));
            return (!is_served).then(|| "is not served yet".to_owned());
        }
        _others => return None,
    };
    let is_there = is_seen && updated >= wanted && available >= wanted;
    (!is_there).then(|| format!("{available} of {wanted} are available, {updated} of them are of this version"))
}

fn is_true(condition: &Value, name: &str) -> bool {
    let is = |field: &str, text: &str| condition.get(field).is_some_and(|value| value == text);
    is("type", name) && is("status", "True")
}

/// How it was installed.
async fn former(server: &Server) -> Result<Settings, Failure> {
    let asked = Api::<Namespace>::all(server.0.clone()).get_opt(NAMESPACE).await;
    let namespace = asked.map_err(|error| Failure::environment(error, "see that the API server answers"))?;
    let kept = namespace.and_then(|namespace| namespace.metadata.annotations?.remove(SETTINGS));
    let kept = kept.ok_or_else(|| {
        Failure::refused([
            "nothing is installed that `outrigger install` made",
            "remedy: outrigger install, or helm upgrade where Helm did it",
        ])
    })?;
    serde_json::from_str(&kept).map_err(|error| {
        Failure::environment(
            format!("the annotation {SETTINGS} of {NAMESPACE} is unreadable: {error}"),
            "install anew with all settings",
        )
    })
}

/// What is said of the Deployment of the control plane; none where there is none.
async fn control(server: &Server) -> Result<Option<ObjectMeta>, Failure> {
    let control = Api::<Deployment>::namespaced(server.0.clone(), NAMESPACE).get_metadata_opt("control").await;
    let control = control.map_err(|error| Failure::environment(checks::said(&error), "see that the API server answers"))?;
    Ok(control.map(|control| control.metadata))
}

/// The pods with sidecars, as `NAMESPACE/NAME`.
async fn injected(server: &Server) -> Result<Vec<String>, Failure> {
    let pods = Api::<Pod>::all(server.0.clone()).list(&ListParams::default().labels(INJECTED)).await;
    let pods = pods.map_err(|error| Failure::environment(error, "see that the API server answers, and may be asked for pods"))?;
    Ok(pods
        .items
        .iter()
        .map(|pod| {
            let [namespace, name] = [&pod.metadata.namespace, &pod.metadata.name].map(|part| part.as_deref().unwrap_or_default());
            format!("{namespace}/{name}")
        })
        .collect())
}

fn late(deadline: Instant, what: &str, missing: &str, remedy: &str) -> Result<(), Failure> {
    if Instant::now() < deadline { Ok(()) } else { Err(Failure::environment(format!("{what}: {missing}"), remedy)) }
}

fn tell(word: &str, text: &str) -> Result<(), Failure> {
    print(&format!("{word:<9}{text}\n"))
}

fn written(objects: &[Value]) -> Result<String, Failure> {
    let mut text = String::new();
    for object in objects {
        let document = serde_saphyr::to_string(object).map_err(anyhow::Error::from)?;
        text.push_str("---\n");
        text.push_str(document.trim_end());
        text.push('\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(kind: &str, generation: i64, body: Value) -> DynamicObject {
        let mut object =
            json!({ "apiVersion": "apps/v1", "kind": kind, "metadata": { "name": "one", "generation": generation } });
        object.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn a_deployment_runs_once_all_of_this_version_are_available() {
        let of = |seen: i64, updated: i64, available: i64| {
            let status = json!({ "observedGeneration": seen, "updatedReplicas": updated, "availableReplicas": available });
            unready(&object("Deployment", 2, json!({ "spec": { "replicas": 2 }, "status": status })))
        };
        assert_eq!(of(2, 2, 2), None);
        assert!(of(1, 2, 2).is_some() && of(2, 1, 2).is_some() && of(2, 2, 1).is_some());
    }

    #[test]
    fn what_nothing_runs_by_is_there_once_it_is_applied_and_a_definition_once_it_is_served() {
        assert_eq!(unready(&object("ServiceAccount", 1, json!({}))), None);
        let conditions =
            |status: &str| json!({ "status": { "conditions": [{ "type": "Established", "status": status, "reason": "x" }] } });
        assert_eq!(unready(&object("CustomResourceDefinition", 1, conditions("True"))), None);
        assert!(unready(&object("CustomResourceDefinition", 1, conditions("False"))).is_some());
    }

    #[test]
    fn a_release_of_helms_is_left_to_helm_unless_somebody_insists() {
        let told = helms("mesh", false).unwrap_err().to_string();
        assert!(told.contains("installed by Helm, as the release mesh"), "{told}");
        assert!(told.contains("remedy: helm uninstall mesh --namespace outrigger-system, or say --force"), "{told}");
        assert!(helms("mesh", true).is_ok());
    }

    #[test]
    fn what_is_printed_is_what_is_applied() {
        let objects = wanted(&Settings::default()).unwrap();
        let text = written(&objects).unwrap();
        let read: Vec<Value> = text.split("---\n").skip(1).map(|document| serde_saphyr::from_str(document).unwrap()).collect();
        assert_eq!(read, objects);
    }
}
