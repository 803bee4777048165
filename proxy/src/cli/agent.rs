//! What the node agent of this machine says of capture and of recent connections, for people's commands.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;

use crate::node::flows::{FlowsReport, Question};
use crate::node::ladder::Rung;
use crate::node::report::{CaptureReport, Mended, PodReport};

/// Asks the agent how capture stands.
///
/// # Errors
/// It does not answer, or not as an agent of this version does.
pub(crate) fn capture() -> io::Result<CaptureReport> {
    ask("/capture")
}

/// Asks the agent for recent connections.
///
/// # Errors
/// It does not answer, or not as an agent of this version does.
pub(crate) fn flows(question: &Question) -> io::Result<FlowsReport> {
    let Question { namespace, pod, after } = question;
    let after = after.map(|after| after.to_string());
    let words = [("namespace", namespace), ("pod", pod), ("after", &after)];
    let query: Vec<String> = words
        .into_iter()
        .filter_map(|(word, value)| Some(format!("{word}={}", utf8_percent_encode(value.as_ref()?, NON_ALPHANUMERIC))))
        .collect();
    ask(&format!("/flows?{}", query.join("&")))
}

fn ask<T: DeserializeOwned>(path: &str) -> io::Result<T> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, PORT)), ANSWER_AT_MOST)?;
    stream.set_read_timeout(Some(ANSWER_AT_MOST))?;
    // HTTP/1.0: the answer is whole and ends with the connection.
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::InvalidData)?;
    if head.split(' ').nth(1) != Some("200") {
        return Err(io::Error::other(format!("it answers {:?}", head.lines().next().unwrap_or_default())));
    }
    Ok(serde_json::from_str(body)?)
}

/// On one line.
pub(crate) fn line(report: &CaptureReport) -> String {
    let (pods, watched) = (report.pods.len(), report.pods.iter().filter(|pod| pod.not_watched.is_none()).count());
    let enforcing = report.pods.iter().filter(|pod| pod.enforce).count();
    let rung = report.standing.rung;
    let mut line = format!("{} on Linux {}, {pods} pods", rung.name(), report.kernel);
    if rung == Rung::Ebpf {
        line.push_str(&format!(", {watched} links watched, {enforcing} pods enforce"));
    }
    line + report.standing.line().strip_prefix(rung.name()).unwrap_or_default()
}

/// What is not well: a program that is not attached leaves pods open, or closed; so does what a sidecar's probes say.
pub(crate) fn unwell(report: &CaptureReport) -> Vec<String> {
    let programs = report.faults.iter().map(|fault| format!("capture is not complete: {fault}"));
    let thieves = report.conflicts.iter().filter(|one| one.steals);
    let thieves = thieves.map(|one| format!("another program takes connections: {}; detach it (`bpftool link`)", one.text));
    programs.chain(thieves).chain(unproven(report)).collect()
}

/// What the probes of pods said. What is known of the programs themselves is not said again for each pod.
pub(crate) fn unproven(report: &CaptureReport) -> impl Iterator<Item = String> {
    report.pods.iter().flat_map(|pod| {
        let faults = pod.proven.iter().flat_map(|proven| &proven.faults);
        let own = faults.filter(|fault| !report.faults.iter().any(|known| known.ends_with(fault.as_str())));
        own.map(|fault| format!("{}/{} is not ready: {fault}", pod.namespace, pod.name))
    })
}

/// Does nothing capture the connections of that pod?
pub(crate) fn is_unprotected(report: &CaptureReport, namespace: &str, name: &str) -> bool {
    report.pods.iter().any(|pod| pod.unprotected && pod.namespace == namespace && pod.name == name)
}

/// What somebody should know of: pods whose sidecar is passed by, or of which nobody would see it.
pub(crate) fn warnings(report: &CaptureReport) -> Vec<String> {
    let mut lines: Vec<String> = report.mended.iter().map(mended).collect();
    let neighbours = report.conflicts.iter().filter(|one| !one.steals);
    lines.extend(neighbours.map(|one| format!("another program decides about connections: {}", one.text)));
    for pod in &report.pods {
        let name = format!("{}/{}", pod.namespace, pod.name);
        if pod.unprotected {
            lines.push(format!(
                "{name} is unprotected: what arrives meets its program in clear, past its sidecar and every policy"
            ));
        }
        if let Some(told) = passed_by(pod) {
            lines.push(format!("connections of {name} got past its sidecar: {told}"));
        }
        if pod.no_port > 0 {
            lines.push(format!("{} connections of {name} failed: no port was left for them (EADDRNOTAVAIL)", pod.no_port));
        }
        // A lower rung says so once, for all of them.
        if let Some(reason) = pod.not_watched.as_ref().filter(|_reason| report.standing.rung == Rung::Ebpf) {
            lines.push(format!("what raw sockets of {name} send is not seen: {reason}"));
        }
    }
    lines
}

/// What was wrong for a while.
pub(crate) fn mended(mended: &Mended) -> String {
    let Mended { fault, seconds_ago } = mended;
    format!(
        "{fault}, and was put back {seconds_ago} s ago: connections that were opened in between may have got past their sidecars, \
         and stay so until they end"
    )
}

/// What an exclusion let pass is as its owner wants it.
fn passed_by(pod: &PodReport) -> Option<String> {
    let unasked = pod.bypass.iter().filter(|(reason, _count)| !reason.starts_with("excluded_"));
    let told: Vec<String> = unasked.map(|(reason, count)| format!("{reason} {count}")).collect();
    let dropped = if pod.dropped > 0 { format!(" ({} dropped)", pod.dropped) } else { String::new() };
    (!told.is_empty()).then(|| told.join(", ") + &dropped)
}

const PORT: u16 = 14_030;
const ANSWER_AT_MOST: Duration = Duration::from_secs(2);
const ANSWER_BYTES_MAX: u64 = 4 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::kernel::Conflict;
    use crate::node::ladder::{Fall, Standing};
    use crate::node::report::Proven;

    #[test]
    fn a_lower_rung_is_told_in_one_line_with_why_and_what_it_costs() {
        let fall = Fall { text: "the kernel 5.10 refuses the program or_connect4".into(), ..Fall::default() };
        let standing = Standing { rung: Rung::Nftables, fallen: vec![fall], asked: false };
        let pods = vec![PodReport { not_watched: Some("no".into()), ..PodReport::default() }];
        let report = CaptureReport { kernel: "5.10".into(), standing, pods, ..CaptureReport::default() };
        let line = line(&report);
        let told = "nftables on Linux 5.10, 1 pods; no eBPF: the kernel 5.10 refuses the program or_connect4; it costs: every ";
        assert!(line.starts_with(told), "{line}");
        assert!(warnings(&report).is_empty());
    }

    #[test]
    fn what_an_owner_excluded_is_no_warning_and_what_nobody_asked_for_is() {
        let pod = |name: &str, bypass: &[(&str, u64)]| PodReport {
            namespace: "shop".into(),
            name: name.into(),
            bypass: bypass.iter().map(|(reason, count)| ((*reason).to_owned(), *count)).collect(),
            ..PodReport::default()
        };
        let mut report = CaptureReport {
            kernel: "6.12.0".into(),
            standing: Standing::default(),
            faults: vec!["the program or_connect4 is not attached any more".into()],
            conflicts: [("lb (program 7) runs", false), ("shop/web: thief (program 8) selects", true)]
                .map(|(text, steals)| Conflict { text: text.into(), steals })
                .into(),
            pods: vec![
                pod("web", &[("excluded_outbound_port", 9)]),
                pod("api", &[("no_socket", 1), ("raw_socket", 2)]),
                pod("db", &[]),
            ],
            mended: Vec::new(),
        };
        report.pods[1].dropped = 3;
        report.pods[1].enforce = true;
        report.pods[2].not_watched = Some("no tcx".into());
        report.pods[2].no_port = 4;
        assert_eq!(
            warnings(&report),
            [
                "another program decides about connections: lb (program 7) runs",
                "connections of shop/api got past its sidecar: no_socket 1, raw_socket 2 (3 dropped)",
                "4 connections of shop/db failed: no port was left for them (EADDRNOTAVAIL)",
                "what raw sockets of shop/db send is not seen: no tcx",
            ]
        );
        assert_eq!(
            unwell(&report),
            [
                "capture is not complete: the program or_connect4 is not attached any more",
                "another program takes connections: shop/web: thief (program 8) selects; detach it (`bpftool link`)",
            ]
        );
        assert_eq!(line(&report), "eBPF on Linux 6.12.0, 3 pods, 2 links watched, 1 pods enforce");
    }

    #[test]
    fn what_probes_said_is_told_by_pod_and_a_programs_fault_once() {
        let gone = "the program or_bind4 is not attached any more; it is put back, and looked at again";
        let proven =
            |faults: &[&str]| Some(Proven { seconds_ago: 3, faults: faults.iter().map(|fault| (*fault).to_owned()).collect() });
        let pod = |name: &str, proven| PodReport { namespace: "shop".into(), name: name.into(), proven, ..PodReport::default() };
        let report = CaptureReport {
            faults: vec![gone.into()],
            mended: vec![Mended { fault: "the program or_bind4 is not attached any more".into(), seconds_ago: 3 }],
            pods: vec![pod("web", proven(&["outbound IPv4: it went elsewhere", gone])), pod("api", proven(&[])), pod("db", None)],
            ..CaptureReport::default()
        };
        let complete = format!("capture is not complete: {gone}");
        assert_eq!(unwell(&report), [complete.as_str(), "shop/web is not ready: outbound IPv4: it went elsewhere"]);
        assert!(warnings(&report)[0].contains("put back 3 s ago"));
    }
}
