//! `outrigger status` and `outrigger proxies`: whether the mesh is well, and who has acknowledged what.
//!
//! Exit codes of `status`: 0 all is well, 1 something is not (each is told on a line of its own), 3 the control plane does
//! not answer. Warnings of documents, and sidecars that are about to acknowledge, leave the mesh well.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::apply::line;
use super::local::{UpRecord, has_lost_supervisor, is_ending, read_up_record};
use super::mesh::{Mesh, MeshArgs};
use super::patience::Part;
use super::table::{self, Output, day, moment};
use super::{Failure, agent, print, warn};
use crate::control::api::Wrong;
use crate::node::report::{PodReport, Waiting};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  outrigger status -o json
  outrigger status --kubernetes

Exit codes: 0 all is well; 1 something is not: a document or a sidecar's configuration is refused, a security policy is for a Service or Workload that does not exist, denies whom no peer can be, or covers more than its Services ever led to, a pod's supervisor is gone, a pod's sidecar or the node agent is not connected, connections wait for a pod's sidecar, a kernel program is not attached, a certificate has ended, or the authority's ends within 30 days; 3 the control plane does not answer. With -o json, `unwell` lists it.

Of a control plane that was just started it waits up to 6 s for sidecars and the node agent to come back. With -o wide, pods are listed with all of their addresses. Of a cluster all replicas of the control plane are asked.")]
pub(crate) struct StatusArgs {
    /// How to write it
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) output: Option<Output>,
    #[command(flatten)]
    pub(crate) mesh: MeshArgs,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  outrigger proxies -o wide\n  outrigger proxies --kubernetes\n\nWith -o wide, each is told with its identity, software and address."
)]
pub(crate) struct ProxiesArgs {
    /// How to write it
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) output: Option<Output>,
    #[command(flatten)]
    pub(crate) mesh: MeshArgs,
}

/// Runs `outrigger status`.
pub(crate) fn status(args: &StatusArgs) -> Result<ExitCode, Failure> {
    let mesh = args.mesh.find()?;
    let mut answer = settled(&mesh)?;
    let up = mesh.is_of_this_machine().then(read_up_record).flatten();
    if mesh.is_of_this_machine() {
        note_ending(&mut answer, &is_ending);
    }
    let capture = mesh.is_of_this_machine().then(agent::capture);
    note_waiting(&mut answer, capture.iter().flatten().flat_map(|report| &report.pods));
    let mut unwell = unwell(&answer, &has_lost_supervisor);
    unwell.extend(capture.iter().flatten().flat_map(agent::unwell));
    unwell.extend(up.iter().flat_map(away));
    if let (Some(whole), Some(up)) = (answer.as_object_mut(), &up) {
        whole.insert("restarted".to_owned(), json!(up.restarted));
    }
    if let (Some(whole), Some(Ok(report))) = (answer.as_object_mut(), &capture) {
        whole.insert("capture".to_owned(), serde_json::to_value(report).map_err(anyhow::Error::from)?);
    }
    let code = if unwell.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) };
    if let Some(whole) = answer.as_object_mut() {
        whole.insert("unwell".to_owned(), unwell.clone().into());
    }
    if written(args.output, &answer)? {
        return Ok(code);
    }
    let now = number(&answer, "/control/now");
    let mut text = String::new();
    let width = table::width();
    let mut say = |title: &str, line: String| text.push_str(&table::fold(&format!("{title:<15}{line}"), width, 15));
    let control = |control: &Value| {
        format!(
            "up for {}, version {}, trust domain {}, revision {}",
            moment(number(control, "/started"), now).trim_end_matches(" ago"),
            string(control, "/version"),
            string(control, "/trustDomain"),
            number(control, "/revision"),
        )
    };
    let replicas = list(&answer, "/replicas");
    if replicas.is_empty() {
        let told = Part::Control.told(up.as_ref());
        say("control plane", answer.get("control").map(control).unwrap_or_default() + &told);
    }
    for replica in replicas {
        say("control plane", format!("{}: {}", string(replica, "/name"), control(replica)));
    }
    let nodes = list(&answer, "/nodes");
    if nodes.is_empty() {
        say("node agent", "none connected".to_owned() + &Part::Node.told(up.as_ref()));
    }
    for node in nodes {
        let expires = moment(number(node, "/certificateExpires"), now);
        let told = Part::Node.told(up.as_ref());
        say("node agent", format!("{} connected, certificate ends {expires}{told}", string(node, "/name")));
    }
    match &capture {
        Some(Ok(report)) => say("capture", agent::line(report)),
        Some(Err(error)) => say("capture", format!("the node agent does not tell: {error}")),
        None => {}
    }
    if let Some(identity) = answer.pointer("/workloadApi/identity").and_then(Value::as_str) {
        let expires = moment(number(&answer, "/workloadApi/certificateExpires"), now);
        say("workload API", format!("{identity}, certificate ends {expires}"));
    }
    say("authority", format!("root good until {}", day(number(&answer, "/control/rootExpires"))));
    let kinds = answer.pointer("/resources").and_then(Value::as_object);
    let kinds = kinds.into_iter().flatten().map(|(kind, count)| format!("{kind} {count}"));
    let kinds = kinds.collect::<Vec<_>>().join(", ");
    say("resources", if kinds.is_empty() { "none".to_owned() } else { kinds });
    say("problems", format!("{} refuse, {} warn", number(&answer, "/problems/refuses"), number(&answer, "/problems/warns")));
    print(&text)?;
    let wide = args.output == Some(Output::Wide);
    let rows = list(&answer, "/pods").iter().map(|pod| {
        let meshed = pod.pointer("/meshed").and_then(Value::as_bool) == Some(true);
        let connected = pod.pointer("/connected").and_then(Value::as_bool) == Some(true);
        let refused = number(pod, "/refused");
        let gone = !connected && is_local(pod) && has_lost_supervisor(&string(pod, "/namespace"), &string(pod, "/name"));
        let configuration = match (meshed, connected) {
            _any if gone => "supervisor gone".to_owned(),
            _any if pod.get("waiting").is_some() => "connections wait".to_owned(),
            (false, _) => "outside the mesh".to_owned(),
            (true, false) => "not connected".to_owned(),
            (true, true) if refused > 0 => format!("{refused} refused"),
            (true, true) if number(pod, "/acknowledged") < revision_for(&answer, pod) => "behind".to_owned(),
            (true, true) => "acknowledged".to_owned(),
        };
        let report = capture.iter().flatten().next().filter(|_report| is_local(pod));
        let unprotected =
            report.is_some_and(|report| agent::is_unprotected(report, &string(pod, "/namespace"), &string(pod, "/name")));
        let configuration = if unprotected { format!("{configuration}, unprotected") } else { configuration };
        let expires = pod.pointer("/certificateExpires").and_then(Value::as_u64);
        let addresses = list(pod, "/addresses").iter().filter_map(Value::as_str);
        vec![
            string(pod, "/namespace"),
            string(pod, "/name"),
            addresses.take(if wide { usize::MAX } else { 1 }).collect::<Vec<_>>().join(","),
            string(pod, "/serviceAccount"),
            configuration,
            expires.map_or_else(|| "-".to_owned(), |expires| moment(expires, now)),
        ]
    });
    let rows: Vec<_> = rows.collect();
    if !rows.is_empty() {
        print("\n")?;
        let addresses = if wide { "ADDRESSES" } else { "ADDRESS" };
        table::rows(&["NAMESPACE", "POD", addresses, "ACCOUNT", "CONFIGURATION", "CERTIFICATE"], rows)?;
    }
    let warnings = problems(&answer).into_iter().filter(|problem| !problem.refuses);
    let capture = capture.into_iter().flatten().flat_map(|report| agent::warnings(&report));
    let warnings = warnings.map(|problem| line(&problem)).chain(capture);
    let told: Vec<String> = warnings.map(|line| format!("warning: {line}")).chain(unwell).collect();
    if !told.is_empty() {
        print(&told.iter().fold("\n".to_owned(), |text, line| text + &table::fold(line, width, 2)))?;
    }
    Ok(code)
}

/// How the mesh stands. A control plane that was just started knows of nobody yet: those who are on their way back are given
/// their time, so that nobody is told to be missing who is not.
fn settled(mesh: &Mesh<'_>) -> Result<Value, Failure> {
    let mut told = false;
    loop {
        let answer = mesh.get("/api/status")?;
        let left = time_to_return(&answer);
        if left == 0 {
            return Ok(answer);
        }
        if !std::mem::replace(&mut told, true) && std::io::stderr().is_terminal() {
            warn(&format!("the control plane was just started; waiting for up to {left} s for who is not connected again yet"));
        }
        std::thread::sleep(POLL);
    }
}

/// For how many seconds more those who are not connected may be on their way back to a control plane that was just started.
fn time_to_return(answer: &Value) -> u64 {
    let up_for = number(answer, "/control/now").saturating_sub(number(answer, "/control/started"));
    let is = |pod: &Value, pointer: &str| pod.pointer(pointer).and_then(Value::as_bool) == Some(true);
    let pods = list(answer, "/pods").iter();
    let mut pods = pods.filter(|pod| is_looked_at(answer, pod) && is(pod, "/meshed") && !is(pod, "/terminating"));
    let is_missed = list(answer, "/nodes").is_empty() && pods.clone().next().is_some() || pods.any(|pod| !is(pod, "/connected"));
    if is_missed { RECONNECT_SECONDS.saturating_sub(up_for) } else { 0 }
}

/// Runs `outrigger proxies`.
pub(crate) fn proxies(args: &ProxiesArgs) -> Result<ExitCode, Failure> {
    let answer = args.mesh.find()?.get("/api/proxies")?;
    if written(args.output, &answer)? {
        return Ok(ExitCode::SUCCESS);
    }
    let wide = args.output == Some(Output::Wide);
    let mut titles = vec!["NAMESPACE", "POD", "CONFIGURATION", "RESOURCES", "REFUSED"];
    if wide {
        titles.extend(["IDENTITY", "SCOPES", "SOFTWARE", "ADDRESS"]);
    }
    let items = list(&answer, "/items");
    let rows = items.iter().map(|item| {
        let acknowledged = number(item, "/acknowledged");
        // Of several replicas each counts its own.
        let revision = number(if item.get("revision").is_some() { item } else { &answer }, "/revision");
        let configuration =
            if acknowledged >= revision { "acknowledged".to_owned() } else { format!("revision {acknowledged} of {revision}") };
        let mut row = vec![
            string(item, "/namespace"),
            string(item, "/name"),
            configuration,
            number(item, "/resources").to_string(),
            list(item, "/refused").len().to_string(),
        ];
        if wide {
            let scopes = list(item, "/scopes").iter().filter_map(Value::as_str).collect::<Vec<_>>().join(",");
            row.extend([string(item, "/identity"), scopes, string(item, "/software"), string(item, "/address")]);
        }
        row
    });
    let missing = list(&answer, "/notConnected").iter().map(|pod| {
        let mut row = vec![string(pod, "/namespace"), string(pod, "/name"), "not connected".to_owned()];
        row.resize(titles.len(), "-".to_owned());
        row
    });
    table::rows(&titles, rows.chain(missing).collect())?;
    for item in items {
        for refused in list(item, "/refused") {
            let line = format!(
                "{}/{} refuses {}: {}",
                string(item, "/namespace"),
                string(item, "/name"),
                string(refused, "/resource"),
                string(refused, "/reason"),
            );
            print(&format!("\n{}", table::fold(&line, table::width(), 2)))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// How long after the control plane's start a sidecar may be on its way back: the longest pause between two attempts.
const RECONNECT_SECONDS: u64 = 6;

const POLL: Duration = Duration::from_millis(100);

/// A pod whose sidecar is not connected may have ended since, and the control plane not have heard of it.
fn note_ending(answer: &mut Value, is_ending: &dyn Fn(&str, &str) -> bool) {
    for pod in answer.pointer_mut("/pods").and_then(Value::as_array_mut).into_iter().flatten() {
        let connected = pod.pointer("/connected").and_then(Value::as_bool) == Some(true);
        if !connected
            && is_local(pod)
            && is_ending(&string(pod, "/namespace"), &string(pod, "/name"))
            && let Some(pod) = pod.as_object_mut()
        {
            pod.insert("terminating".to_owned(), true.into());
        }
    }
}

/// The node agent knows of a sidecar's end first, and whether connections wait for the next one.
fn note_waiting<'a>(answer: &mut Value, reports: impl Iterator<Item = &'a PodReport>) {
    let waiting: BTreeMap<(&str, &str), Waiting> =
        reports.filter_map(|pod| Some(((pod.namespace.as_str(), pod.name.as_str()), pod.waiting?))).collect();
    for pod in answer.pointer_mut("/pods").and_then(Value::as_array_mut).into_iter().flatten().filter(|pod| is_local(pod)) {
        let (namespace, name) = (string(pod, "/namespace"), string(pod, "/name"));
        if let (Some(waiting), Some(pod)) = (waiting.get(&(namespace.as_str(), name.as_str())), pod.as_object_mut()) {
            pod.insert("waiting".to_owned(), json!(waiting));
        }
    }
}

/// Which parts of this machine's mesh have ended and are not back yet, each on a line.
fn away(up: &UpRecord) -> impl Iterator<Item = String> {
    let is_away = |part: &Part| up.restarted.get(part.role()).is_some_and(|told| told.next_at_ms.is_some());
    Part::ALL.into_iter().filter(is_away).map(|part| format!("the {} does not run{}", part.name(), part.told(Some(up))))
}

/// What is not well, each on a line.
fn unwell(answer: &Value, has_lost_supervisor: &dyn Fn(&str, &str) -> bool) -> Vec<String> {
    let now = number(answer, "/control/now");
    let mut lines: Vec<String> =
        problems(answer).iter().filter(|problem| problem.refuses).map(|problem| format!("refused: {}", line(problem))).collect();
    let told = ["/withoutTarget", "/denyingNobody", "/coverage"].iter().flat_map(|pointer| list(answer, pointer));
    lines.extend(told.filter_map(Value::as_str).map(str::to_owned));
    let is = |pod: &Value, pointer: &str| pod.pointer(pointer).and_then(Value::as_bool) == Some(true);
    let ended = |item: &Value| item.pointer("/certificateExpires").and_then(Value::as_u64).is_some_and(|ends| ends <= now);
    let mut local = false;
    for pod in list(answer, "/pods").iter().filter(|pod| is_looked_at(answer, pod)) {
        let (namespace, name) = (string(pod, "/namespace"), string(pod, "/name"));
        if !is(pod, "/connected") && is_local(pod) && has_lost_supervisor(&namespace, &name) {
            lines.push(format!(
                "{namespace}/{name} has lost its supervisor, `outrigger run`, and with it its program and sidecar: run it again \
                 under its name; what is left goes by itself in a moment, or by `outrigger stop {name} -n {namespace}`"
            ));
            continue;
        }
        if !is(pod, "/meshed") {
            continue;
        }
        local = true;
        let name = format!("{namespace}/{name}");
        if let Some(waiting) = pod.get("waiting").and_then(|waiting| serde_json::from_value::<Waiting>(waiting.clone()).ok()) {
            let Waiting { for_ms, at_most_ms } = waiting;
            let (so_far, at_most) = (for_ms / 1000, at_most_ms.div_ceil(1000));
            lines.push(format!("{name}: connections wait for its sidecar since {so_far} s (at most {at_most} s)"));
        } else if !is(pod, "/connected") && !is(pod, "/terminating") {
            lines.push(format!(
                "{name} is not connected: its sidecar keeps its last good configuration, or it is down, and connections wait for \
                 the next one until the pod's hold time is over; from then on they are refused"
            ));
        }
        if number(pod, "/refused") > 0 {
            lines.push(format!("{name} refuses {} documents; `outrigger proxies` tells why", number(pod, "/refused")));
        }
        if ended(pod) {
            lines.push(format!("the certificate of {name} has ended"));
        }
    }
    let nodes = list(answer, "/nodes");
    let silent = list(answer, "/silent");
    for replica in silent {
        let (name, reason) = (string(replica, "/name"), string(replica, "/reason"));
        lines.push(format!("{name} does not answer, and who is connected to it is not known here: {reason}"));
    }
    if local && nodes.is_empty() && silent.is_empty() {
        lines.push("no node agent is connected: no certificate is renewed, and no pod can enrol".to_owned());
    }
    for node in nodes.iter().filter(|node| ended(node)) {
        lines.push(format!("the certificate of the node agent {} has ended", string(node, "/name")));
    }
    let of_workload_api = |field: &str| answer.pointer("/workloadApi").and_then(|api| api.get(field)?.as_str());
    if let Some(missing) = of_workload_api("missing") {
        lines.push(format!("no sidecar can come to the control plane: {missing}"));
    } else if let Some(trouble) = of_workload_api("trouble") {
        lines.push(format!("the control plane's identity is not renewed: {trouble}"));
    }
    let root = number(answer, "/control/rootExpires");
    if root < now + ROOT_NEAR_S {
        lines.push(format!("the authority's root is good until {} only", day(root)));
    }
    lines
}

/// Is it told of this pod what is not well? Of pods of this machine; and of those of a cluster that are connected, or should
/// be: they are ready, and every replica was asked.
fn is_looked_at(answer: &Value, pod: &Value) -> bool {
    let is = |pointer: &str| pod.pointer(pointer).and_then(Value::as_bool) == Some(true);
    let is_missed = || {
        let runs = pod.get("node").is_some_and(Value::is_string) && !is("/unready") && !is("/finished");
        runs && list(answer, "/silent").is_empty()
    };
    is_local(pod) || (answer.get("replicas").is_some() && (is("/connected") || is_missed()))
}

/// The revision that the pod's sidecar is to have: of several control planes each counts its own.
fn revision_for(answer: &Value, pod: &Value) -> u64 {
    if pod.get("revision").is_some() { number(pod, "/revision") } else { number(answer, "/control/revision") }
}

/// Did `outrigger run` make the pod?
fn is_local(pod: &Value) -> bool {
    pod.pointer("/local").and_then(Value::as_bool) == Some(true)
}

fn problems(answer: &Value) -> Vec<Wrong> {
    let list = list(answer, "/problems/list").iter();
    list.filter_map(|problem| serde_json::from_value(problem.clone()).ok()).collect()
}

fn written(output: Option<Output>, answer: &Value) -> Result<bool, Failure> {
    match output {
        Some(Output::Json) => table::json(answer)?,
        Some(Output::Yaml) => table::yaml(answer)?,
        Some(Output::Wide) | None => return Ok(false),
    }
    Ok(true)
}

pub(super) fn string(item: &Value, pointer: &str) -> String {
    item.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

pub(super) fn number(item: &Value, pointer: &str) -> u64 {
    item.pointer(pointer).and_then(Value::as_u64).unwrap_or_default()
}

pub(super) fn list<'a>(item: &'a Value, pointer: &str) -> &'a [Value] {
    item.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// How long before its end the authority's root is told of: 30 days.
const ROOT_NEAR_S: u64 = 30 * 86_400;

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(change: impl FnOnce(&mut Value)) -> Vec<String> {
        answer_with(change, &|_, _| false)
    }

    fn answer_with(change: impl FnOnce(&mut Value), has_lost_supervisor: &dyn Fn(&str, &str) -> bool) -> Vec<String> {
        let mut answer = json!({
            "control": { "now": 1_000_000, "revision": 4, "rootExpires": 100_000_000 },
            "nodes": [{ "name": "vm", "certificateExpires": 1_003_000 }],
            "problems": { "refuses": 0, "warns": 1, "list": [{ "resource": "HTTPRoute/shop/r", "place": "r.yaml:4:1", "at": "spec", "text": "no such Service", "remedy": "create it", "refuses": false }] },
            "pods": [
                { "namespace": "shop", "name": "web-1", "local": true, "meshed": true, "connected": true, "acknowledged": 3, "refused": 0, "certificateExpires": 1_000_600 },
                { "namespace": "shop", "name": "out-1", "local": true, "meshed": false, "connected": false },
                { "namespace": "shop", "name": "vm-1", "local": false, "meshed": true, "connected": false },
                { "namespace": "shop", "name": "old-1", "local": true, "meshed": true, "connected": false, "terminating": true },
            ],
        });
        change(&mut answer);
        unwell(&answer, has_lost_supervisor)
    }

    #[test]
    fn a_pod_whose_supervisor_was_killed_is_told_with_what_to_do_and_not_as_one_that_serves_on() {
        let lost =
            |lost: &'static str| answer_with(|all| all["pods"][0]["connected"] = false.into(), &move |_, name| name == lost);
        let [web] = lost("web-1").try_into().unwrap();
        assert!(web.starts_with("shop/web-1 has lost its supervisor") && web.contains("`outrigger stop web-1 -n shop`"), "{web}");
        // A pod outside of the mesh is one as well; one that is connected has its sidecar.
        assert!(lost("out-1").iter().any(|line| line.starts_with("shop/out-1 has lost its supervisor")));
        assert_eq!(answer_with(|_| (), &|_, name| name == "web-1"), Vec::<String>::new());
    }

    #[test]
    fn a_pod_of_a_cluster_is_missed_if_it_is_ready_and_every_replica_was_asked() {
        let told = |silent: Value, pod: Value| {
            answer(|all| {
                all["replicas"] = json!([{ "name": "control-a" }]);
                all["silent"] = silent;
                all["pods"] = json!([pod]);
            })
        };
        let pod = |connected: bool, unready: bool, node: Option<&str>| json!({ "namespace": "shop", "name": "web", "meshed": true, "connected": connected, "unready": unready, "node": node });
        let [missed] = told(json!([]), pod(false, false, Some("one"))).try_into().unwrap();
        assert!(missed.starts_with("shop/web is not connected"), "{missed}");
        for well in [pod(true, false, Some("one")), pod(false, true, Some("one")), pod(false, false, None)] {
            assert_eq!(told(json!([]), well), Vec::<String>::new());
        }
        let silent = json!([{ "name": "control-b", "reason": "gone" }]);
        let [silent] = told(silent, pod(false, false, Some("one"))).try_into().unwrap();
        assert!(silent.starts_with("control-b does not answer"), "{silent}");
    }

    #[test]
    fn a_pod_whose_connections_wait_for_its_sidecar_is_told_with_how_long() {
        let report = |name: &str, waiting: Option<Waiting>| PodReport {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            waiting,
            ..PodReport::default()
        };
        let told = |connected: bool, waiting: Option<Waiting>| {
            answer(|all| {
                all["pods"][0]["connected"] = connected.into();
                note_waiting(all, [report("web-1", waiting), report("vm-1", waiting)].iter());
            })
        };
        let waiting = Waiting { for_ms: 3_900, at_most_ms: 10_000 };
        // Whether the control plane has seen its end or not.
        for connected in [true, false] {
            let line = "shop/web-1: connections wait for its sidecar since 3 s (at most 10 s)";
            assert_eq!(told(connected, Some(waiting)), [line]);
        }
        assert_eq!(told(true, None), Vec::<String>::new());
    }

    #[test]
    fn a_part_that_is_away_is_told_with_its_end_and_one_that_is_back_is_not() {
        let told = |next_at_ms: Option<u64>| {
            let restarted = json!({ "times": 2, "ended": "exit status: 1", "endedAtMs": 0, "nextAtMs": next_at_ms });
            let up = json!({
                "supervisor": 1, "control": 1, "node": 1, "state": "/", "trustDomain": "t", "stream": "127.0.0.1:1", "api": "", "dashboard": "",
                "restarted": { "node": restarted },
            });
            away(&serde_json::from_value(up).unwrap()).collect::<Vec<_>>()
        };
        let [line] = told(Some(5)).try_into().unwrap();
        assert!(line.starts_with("the node agent does not run; it ended ") && line.contains("(exit status: 1)"), "{line}");
        assert_eq!(told(None), Vec::<String>::new());
    }

    #[test]
    fn a_pod_that_ended_is_no_fault_before_the_control_plane_has_heard_of_it() {
        let ended = |pod: &'static str| {
            answer(|all| {
                all["pods"][0]["connected"] = false.into();
                note_ending(all, &|namespace, name| (namespace, name) == ("shop", pod));
            })
        };
        assert_eq!(ended("web-1"), Vec::<String>::new());
        assert_eq!(ended("out-1").len(), 1);
    }

    #[test]
    fn warnings_and_what_is_about_to_acknowledge_or_to_end_leave_the_mesh_well() {
        assert_eq!(answer(|_| ()), Vec::<String>::new());
    }

    #[test]
    fn who_is_on_the_way_back_to_a_control_plane_that_was_just_started_is_given_time() {
        let left = |change: &dyn Fn(&mut Value)| {
            let mut answer = json!({
                "control": { "now": 1_000_000, "started": 999_998 },
                "nodes": [{ "name": "vm" }],
                "pods": [
                    { "name": "web-1", "local": true, "meshed": true, "connected": true },
                    { "name": "out-1", "local": true, "meshed": false, "connected": false },
                    { "name": "old-1", "local": true, "meshed": true, "connected": false, "terminating": true },
                ],
            });
            change(&mut answer);
            time_to_return(&answer)
        };
        assert_eq!(left(&|_| ()), 0);
        assert_eq!(left(&|all| all["nodes"] = json!([])), 4);
        assert_eq!(left(&|all| all["pods"][0]["connected"] = false.into()), 4);
        assert_eq!(left(&|all| (all["nodes"], all["control"]["started"]) = (json!([]), 999_000.into())), 0);
        // Without a pod of the mesh nobody misses the node agent.
        assert_eq!(left(&|all| (all["nodes"], all["pods"]) = (json!([]), json!([]))), 0);
    }

    #[test]
    fn what_is_not_well_is_told_by_name() {
        let one = |change: &dyn Fn(&mut Value), told: &str| assert_eq!(answer(|all| change(all)), [told]);
        one(
            &|all| all["problems"]["list"][0]["refuses"] = true.into(),
            "refused: r.yaml:4:1: HTTPRoute/shop/r: spec: no such Service; create it",
        );
        one(&|all| all["coverage"] = json!(["the policy covers too much"]), "the policy covers too much");
        one(&|all| all["withoutTarget"] = json!(["the policy has none"]), "the policy has none");
        one(&|all| all["denyingNobody"] = json!(["the policy denies nobody"]), "the policy denies nobody");
        one(
            &|all| all["pods"][0]["connected"] = false.into(),
            "shop/web-1 is not connected: its sidecar keeps its last good configuration, or it is down, and connections wait for the next one until the pod's hold time is over; from then on they are refused",
        );
        one(&|all| all["pods"][0]["refused"] = 2.into(), "shop/web-1 refuses 2 documents; `outrigger proxies` tells why");
        one(&|all| all["pods"][0]["certificateExpires"] = 999_999.into(), "the certificate of shop/web-1 has ended");
        one(&|all| all["nodes"] = json!([]), "no node agent is connected: no certificate is renewed, and no pod can enrol");
        one(
            &|all| all["workloadApi"] = json!({ "missing": "no identity yet: nobody answers", "trouble": "nobody answers" }),
            "no sidecar can come to the control plane: no identity yet: nobody answers",
        );
        one(
            &|all| all["workloadApi"] = json!({ "missing": null, "trouble": "nobody answers" }),
            "the control plane's identity is not renewed: nobody answers",
        );
        one(&|all| all["control"]["rootExpires"] = 1_000_100.into(), "the authority's root is good until 1970-01-12 only");
    }
}
