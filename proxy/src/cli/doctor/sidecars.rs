//! Which pods of a cluster have a sidecar, which should, of which version they are, and which of them do not serve. Pure: pods
//! and namespaces as the API server has them go in.
//!
//! Invariant: who waits for somebody else is not blamed. A sidecar is told of when it has had its time to start, counted from
//! when it was its turn: a classic one comes after the pod's init containers, and those may take long.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Namespace, Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;
use serde_json::Value;

use super::super::table;
use super::Finding;
use super::cluster::list;
use crate::injection;
use crate::model::marks::{self, Mode};

/// What is to be said of all `pods`, `now` (seconds since the epoch).
pub(super) fn look(namespaces: &[Namespace], pods: &[Pod], now: i64) -> Vec<Finding> {
    let (mut with, mut without, mut unclear, mut old) = (0_usize, Vec::new(), Vec::new(), Vec::new());
    let (mut idle, mut restarting) = (Vec::new(), Vec::new());
    for pod in pods {
        let name = format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any());
        if pod.labels().get(marks::SIDECAR).is_some_and(|mark| mark == marks::INJECTED) {
            with += 1;
            match fault(pod, now) {
                Some(Fault::Idle(why)) => idle.push(format!("{name} ({why})")),
                Some(Fault::Restarts(why)) => restarting.push(format!("{name} ({why})")),
                None => {}
            }
            let status = pod.annotations().get("outrigger.dev/status");
            let status = status.and_then(|text| serde_json::from_str::<Value>(text).ok()).unwrap_or_default();
            if status.get("version").and_then(Value::as_str).is_some_and(|version| version != env!("CARGO_PKG_VERSION")) {
                old.push(name);
            }
        } else if !has_ended(pod) && pod.spec.as_ref().is_none_or(|spec| spec.host_network != Some(true)) {
            let namespace = namespaces.iter().find(|one| one.metadata.name == pod.metadata.namespace);
            let namespace = namespace.map(|one| injection::Namespace {
                name: one.name_any(),
                labels: one.labels().clone(),
                annotations: one.annotations().clone(),
            });
            let namespace = namespace.unwrap_or_default();
            if injection::is_asked(&pod.metadata, &namespace) {
                match injection::unclear(&pod.metadata, &namespace) {
                    Some(refusal) => unclear.push(format!("{name} ({refusal})")),
                    None => without.push(name),
                }
            }
        }
    }
    let mut findings = vec![Finding::ok("sidecars", format!("{with} pods have one"))];
    if !idle.is_empty() {
        let text = format!("they do not serve, and their pods wait: {}", list(&idle));
        let remedy = format!(
            "kubectl describe pod POD tells its events (volume, image, postStart hook), kubectl logs POD -c {} what it waits for",
            marks::CONTAINER
        );
        findings.push(Finding::fail("sidecars", text, remedy));
    }
    if !restarting.is_empty() {
        let text = format!("they end again and again: {}", list(&restarting));
        let remedy = format!("kubectl logs POD -c {} --previous tells why", marks::CONTAINER);
        findings.push(Finding::fail("sidecars", text, remedy));
    }
    if !without.is_empty() {
        let text = format!("{} ask for one and have none: they are in quarantine", list(&without));
        findings.push(Finding::fail("sidecars", text, "restart them (kubectl rollout restart), or take their label off"));
    }
    if !unclear.is_empty() {
        let text = format!("nobody can tell whether they are to have one, so they are in quarantine: {}", list(&unclear));
        let remedy = "correct the label, of a pod in the template that it is made of; where that is enabled, restart them (kubectl rollout restart)";
        findings.push(Finding::fail("sidecars", text, remedy));
    }
    if !old.is_empty() {
        let text = format!("{} have one of another version", list(&old));
        findings.push(Finding::warn("sidecars", text, "restart them when it suits (kubectl rollout restart)"));
    }
    findings
}

/// What is wrong with a sidecar, with why.
#[derive(Debug, Eq, PartialEq)]
enum Fault {
    /// It does not serve, though it has had its time.
    Idle(String),
    /// It was started, and ended, again and again.
    Restarts(String),
}

fn fault(pod: &Pod, now: i64) -> Option<Fault> {
    let (spec, status) = (pod.spec.as_ref()?, pod.status.as_ref()?);
    if has_ended(pod) || pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let (mode, _container) = marks::container(spec)?;
    let statuses = match mode {
        Mode::Native => &status.init_container_statuses,
        Mode::Classic => &status.container_statuses,
    };
    // Before it has one, the pod has no node.
    let sidecar = statuses.iter().flatten().find(|one| one.name == marks::CONTAINER)?;
    let state = sidecar.state.clone().unwrap_or_default();
    let last_end = state.terminated.as_ref().or(sidecar.last_state.as_ref().and_then(|last| last.terminated.as_ref()));
    let end = last_end.map(|end| {
        let reason = end.reason.as_deref().filter(|reason| *reason != "Error").map(|reason| format!(", {reason}"));
        format!("it ended with {}{}", end.exit_code, reason.unwrap_or_default())
    });
    let ended_at = last_end.and_then(|end| second(end.finished_at.as_ref()));
    let is_backing_off = state.waiting.as_ref().is_some_and(|waiting| waiting.reason.as_deref() == Some("CrashLoopBackOff"));
    let is_recent = ended_at.is_some_and(|at| now.saturating_sub(at) < RECENT_S);
    if sidecar.restart_count > 0 && (is_backing_off || sidecar.restart_count >= RESTARTS && is_recent) {
        let times = format!("started anew {}", table::times(u64::from(sidecar.restart_count.unsigned_abs())));
        return Some(Fault::Restarts(end.into_iter().chain([times]).collect::<Vec<_>>().join(", ")));
    }
    if sidecar.ready {
        return None;
    }
    let since = since(mode, status, sidecar, &state)?;
    let waited = now.saturating_sub(since);
    if waited < STARTS_WITHIN_S {
        return None;
    }
    let why = if state.running.is_some() {
        "it runs, and is not ready".to_owned()
    } else if let Some(waiting) = &state.waiting {
        let [reason, message] = [&waiting.reason, &waiting.message].map(|text| text.as_deref().unwrap_or_default());
        format!("{reason} {message}").trim().to_owned()
    } else {
        end.unwrap_or_else(|| "nothing is said of it".to_owned())
    };
    Some(Fault::Idle(format!("{why}, for {waited} s")))
}

/// Since when it has been the turn of a sidecar that is not ready. None: it waits for others.
fn since(mode: Mode, status: &PodStatus, sidecar: &ContainerStatus, state: &ContainerState) -> Option<i64> {
    let condition = |of: &str| status.conditions.iter().flatten().find(|one| one.type_ == of);
    let changed = |of: &str, to: &str| {
        let condition = condition(of).filter(|one| one.status == to)?;
        second(condition.last_transition_time.as_ref())
    };
    let begun = second(status.start_time.as_ref())?;
    if let Some(running) = &state.running {
        // It may have been ready until a moment ago; then the pod was as well, or others keep that from it anyway.
        return Some(begun.max(second(running.started_at.as_ref())?).max(changed("ContainersReady", "False").unwrap_or(begun)));
    }
    if let Some(ended) = &state.terminated {
        return second(ended.finished_at.as_ref());
    }
    let comes_later = mode == Mode::Classic && status.init_container_statuses.as_ref().is_some_and(|all| !all.is_empty());
    if !comes_later || sidecar.restart_count > 0 {
        return Some(begun);
    }
    changed("Initialized", "True")
}

fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    phase.is_some_and(|phase| phase == "Succeeded" || phase == "Failed")
}

fn second(time: Option<&Time>) -> Option<i64> {
    time.map(|time| time.0.as_second())
}

/// Until then a sidecar may be starting, seconds.
const STARTS_WITHIN_S: i64 = 60;
/// One that was started anew so often, and ended last within so many seconds, has no accident behind it.
const RESTARTS: i32 = 3;
const RECENT_S: i64 = 600;

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;
    use serde_json::json;

    use super::super::Verdict;
    use super::*;

    /// 2026-01-01T00:00:00Z.
    const BEGUN: i64 = 1_767_225_600;

    fn at(second: i64) -> String {
        Timestamp::from_second(BEGUN + second).unwrap().to_string()
    }

    /// A pod of the namespace shop that began at second 0, with this status of its sidecar in that list.
    fn pod(list: &str, sidecar: &Value, status: &Value) -> Pod {
        let (spec_list, other) = match list {
            "initContainerStatuses" => ("initContainers", "containers"),
            _ => ("containers", "initContainers"),
        };
        let mut one = json!({ "name": "outrigger", "image": "outrigger", "imageID": "", "ready": false, "restartCount": 0 });
        one.as_object_mut().unwrap().extend(sidecar.as_object().unwrap().clone());
        let mut whole = json!({ "phase": "Pending", "startTime": at(0), list: [one] });
        whole.as_object_mut().unwrap().extend(status.as_object().unwrap().clone());
        serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": "web", "namespace": "shop", "labels": { "outrigger.dev/sidecar": "injected" } },
            "spec": { spec_list: [{ "name": "outrigger" }], other: [{ "name": "app" }] },
            "status": whole,
        }))
        .unwrap()
    }

    /// What is told, but for how many there are, `now` seconds after the pod's start.
    fn told(pod: &Pod, now: i64) -> Option<String> {
        let mut findings = look(&[], std::slice::from_ref(pod), BEGUN + now).into_iter();
        assert_eq!(findings.next().unwrap(), Finding::ok("sidecars", "1 pods have one"));
        let finding = findings.next()?;
        assert_eq!((finding.verdict, finding.remedy.is_some(), findings.next()), (Verdict::Fail, true, None));
        Some(finding.text)
    }

    #[test]
    fn a_sidecar_that_waits_for_its_volume_is_told_a_minute_after_the_pods_start() {
        let waiting = json!({ "state": { "waiting": { "reason": "PodInitializing" } } });
        let pod = pod("initContainerStatuses", &waiting, &json!({}));
        assert_eq!(told(&pod, 59), None, "it is still starting");
        let text = "they do not serve, and their pods wait: shop/web (PodInitializing, for 60 s)";
        assert_eq!(told(&pod, 60).unwrap(), text);
    }

    #[test]
    fn a_sidecar_that_runs_and_is_not_ready_is_told_a_minute_after_it_was() {
        let running = json!({ "state": { "running": { "startedAt": at(5) } } });
        let never = pod("initContainerStatuses", &running, &json!({}));
        assert_eq!(told(&never, 64), None);
        assert!(told(&never, 65).unwrap().contains("shop/web (it runs, and is not ready, for 60 s)"));
        let unready = json!([{ "type": "ContainersReady", "status": "False", "lastTransitionTime": at(1_000) }]);
        let lately = pod("initContainerStatuses", &running, &json!({ "phase": "Running", "conditions": unready }));
        assert_eq!(told(&lately, 1_059), None, "it was ready until a moment ago");
        assert!(told(&lately, 1_060).unwrap().contains("not ready"));
        let ready = json!({ "ready": true, "state": { "running": { "startedAt": at(5) } } });
        assert_eq!(told(&pod("initContainerStatuses", &ready, &json!({ "phase": "Running" })), 1_000), None);
    }

    #[test]
    fn a_classic_sidecar_is_not_blamed_for_the_time_that_init_containers_take() {
        let waiting = json!({ "state": { "waiting": { "reason": "PodInitializing" } } });
        let migrate = json!([{ "name": "migrate", "image": "app", "imageID": "", "ready": false, "restartCount": 0 }]);
        let initialized = |status: &str| json!([{ "type": "Initialized", "status": status, "lastTransitionTime": at(900) }]);
        let of = |status: &str| json!({ "initContainerStatuses": migrate, "conditions": initialized(status) });
        assert_eq!(told(&pod("containerStatuses", &waiting, &of("False")), 1_000), None);
        assert_eq!(told(&pod("containerStatuses", &waiting, &of("True")), 959), None);
        assert!(told(&pod("containerStatuses", &waiting, &of("True")), 960).unwrap().contains("(PodInitializing, for 60 s)"));
        assert!(told(&pod("containerStatuses", &waiting, &json!({})), 60).is_some(), "it comes after nobody");
    }

    #[test]
    fn a_sidecar_that_is_started_again_and_again_is_told_with_how_it_ends() {
        let ended = |second: i64| json!({ "terminated": { "exitCode": 3, "reason": "Error", "finishedAt": at(second) } });
        let backing_off =
            json!({ "restartCount": 1, "lastState": ended(8), "state": { "waiting": { "reason": "CrashLoopBackOff" } } });
        let text = "they end again and again: shop/web (it ended with 3, started anew once)";
        assert_eq!(told(&pod("initContainerStatuses", &backing_off, &json!({})), 10).unwrap(), text);
        // Between two ends it may well be ready.
        let up = json!({ "ready": true, "restartCount": 3, "lastState": ended(500), "state": { "running": { "startedAt": at(501) } } });
        let up = pod("containerStatuses", &up, &json!({ "phase": "Running" }));
        assert!(told(&up, 510).unwrap().contains("started anew 3 times"));
        assert_eq!(told(&up, 1_100), None, "it has stood for ten minutes");
        let once = json!({ "ready": true, "restartCount": 1, "lastState": ended(500), "state": { "running": { "startedAt": at(501) } } });
        assert_eq!(told(&pod("containerStatuses", &once, &json!({ "phase": "Running" })), 510), None);
    }

    #[test]
    fn a_pod_that_has_ended_or_is_on_its_way_out_needs_no_sidecar() {
        let ended = json!({ "state": { "terminated": { "exitCode": 0, "finishedAt": at(20) } } });
        assert_eq!(told(&pod("containerStatuses", &ended, &json!({ "phase": "Succeeded" })), 1_000), None);
        assert!(
            told(&pod("containerStatuses", &ended, &json!({ "phase": "Running" })), 1_000).unwrap().contains("it ended with 0")
        );
        let mut leaving = pod("containerStatuses", &ended, &json!({ "phase": "Running" }));
        leaving.metadata.deletion_timestamp = leaving.status.as_ref().unwrap().start_time.clone();
        assert_eq!(told(&leaving, 1_000), None);
    }

    #[test]
    fn a_pod_that_asks_for_one_and_has_none_is_told() {
        let namespace = json!({ "metadata": { "name": "shop", "labels": { "outrigger.dev/inject": "enabled" } } });
        let namespaces = [serde_json::from_value(namespace).unwrap()];
        let pod = |phase: &str| {
            let pod = json!({ "metadata": { "name": "late", "namespace": "shop" }, "status": { "phase": phase } });
            serde_json::from_value::<Pod>(pod).unwrap()
        };
        let found = look(&namespaces, &[pod("Running"), pod("Failed")], BEGUN);
        assert_eq!((found.len(), found[0].text.as_str()), (2, "0 pods have one"));
        assert_eq!(found[1].text, "shop/late ask for one and have none: they are in quarantine");
    }

    #[test]
    fn a_pod_whose_label_says_nothing_is_told_which_it_is_and_not_to_be_made_anew_as_it_is() {
        let namespace = |value: &str| {
            let namespace = json!({ "metadata": { "name": "shop", "labels": { "outrigger.dev/inject": value } } });
            serde_json::from_value::<Namespace>(namespace).unwrap()
        };
        let told = |of_namespace: &str, labels: Value| {
            let pod = json!({ "metadata": { "name": "late", "namespace": "shop", "labels": labels }, "status": { "phase": "Running" } });
            let found = look(&[namespace(of_namespace)], &[serde_json::from_value(pod).unwrap()], BEGUN);
            assert_eq!((found.len(), found[1].verdict), (2, Verdict::Fail));
            assert!(found[1].remedy.as_ref().unwrap().starts_with("correct the label"));
            found[1].text.clone()
        };
        let text = "nobody can tell whether they are to have one, so they are in quarantine: shop/late (label outrigger.dev/inject of the";
        assert_eq!(told("true", json!({})), format!("{text} namespace: \"true\" says nothing; write enabled or disabled)"));
        let own = json!({ "outrigger.dev/inject": "Enabled" });
        assert_eq!(told("enabled", own), format!("{text} pod: \"Enabled\" says nothing; write enabled or disabled)"));
    }
}
