//! What the node agent of this machine says of capture, for people's commands.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use crate::node::report::{CaptureReport, PodReport};

/// Asks the agent.
///
/// # Errors
/// It does not answer, or not as an agent of this version does.
pub(crate) fn capture() -> io::Result<CaptureReport> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, PORT)), ANSWER_AT_MOST)?;
    stream.set_read_timeout(Some(ANSWER_AT_MOST))?;
    // HTTP/1.0: the answer is whole and ends with the connection.
    stream.write_all(b"GET /capture HTTP/1.0\r\n\r\n")?;
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
    format!("eBPF on Linux {}, {pods} pods, {watched} links watched, {enforcing} pods enforce", report.kernel)
}

/// What is not well: a program that is not attached leaves pods open, or closed.
pub(crate) fn unwell(report: &CaptureReport) -> impl Iterator<Item = String> {
    let faults = report.faults.iter().map(|fault| format!("capture is not complete: {fault}; start the mesh again"));
    let thieves = report.conflicts.iter().filter(|one| one.steals);
    faults.chain(thieves.map(|one| format!("another program takes connections: {}; detach it (`bpftool link`)", one.text)))
}

/// What somebody should know of: pods whose sidecar is passed by, or of which nobody would see it.
pub(crate) fn warnings(report: &CaptureReport) -> Vec<String> {
    let neighbours = report.conflicts.iter().filter(|one| !one.steals);
    let mut lines: Vec<String> =
        neighbours.map(|one| format!("another program decides about connections: {}", one.text)).collect();
    for pod in &report.pods {
        let name = format!("{}/{}", pod.namespace, pod.name);
        if let Some(told) = passed_by(pod) {
            lines.push(format!("connections of {name} got past its sidecar: {told}"));
        }
        if pod.no_port > 0 {
            lines.push(format!("{} connections of {name} failed: no port was left for them (EADDRNOTAVAIL)", pod.no_port));
        }
        if let Some(reason) = &pod.not_watched {
            lines.push(format!("what raw sockets of {name} send is not seen: {reason}"));
        }
    }
    lines
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
            faults: vec!["the program or_connect4 is not attached any more".into()],
            conflicts: [("lb (program 7) runs", false), ("shop/web: thief (program 8) selects", true)]
                .map(|(text, steals)| Conflict { text: text.into(), steals })
                .into(),
            pods: vec![
                pod("web", &[("excluded_outbound_port", 9)]),
                pod("api", &[("no_socket", 1), ("raw_socket", 2)]),
                pod("db", &[]),
            ],
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
        let unwell: Vec<String> = unwell(&report).collect();
        assert_eq!(
            unwell,
            [
                "capture is not complete: the program or_connect4 is not attached any more; start the mesh again",
                "another program takes connections: shop/web: thief (program 8) selects; detach it (`bpftool link`)",
            ]
        );
        assert_eq!(line(&report), "eBPF on Linux 6.12.0, 3 pods, 2 links watched, 1 pods enforce");
    }
}
