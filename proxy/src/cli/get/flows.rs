//! `outrigger get flows`: connections of this machine's pods that ended of late, as the node agent holds them.
//!
//! The agent names the pods of this machine. An address that it does not know may be a Workload of the control plane's
//! documents; where nobody answers for it, it stays an address.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use serde_json::Value;

use super::GetArgs;
use crate::base::clock::WallClock;
use crate::cli::table::{self, Output};
use crate::cli::{Failure, agent, client, offer, warn};
use crate::node::flows::{FlowReport, FlowsReport, Question};

/// Runs it.
pub(super) fn run(args: &GetArgs) -> Result<ExitCode, Failure> {
    if args.mesh.api().is_none() {
        return Err(Failure::invalid([
            "flows are held by the agent of each node, and are asked for on that node, without --kubernetes",
        ]));
    }
    let mut question = Question { namespace: args.namespace.clone(), pod: args.name.clone(), after: None };
    let mut report = agent::flows(&question).map_err(|error| {
        Failure::environment(format!("the node agent does not tell of flows: {error}"), "start the mesh with `outrigger up`")
    })?;
    name(&mut report, args);
    tell_losses(&report, 0);
    if !args.watch {
        list(&report, args.output)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut is_away = false;
    if args.output.is_none_or(|output| output == Output::Wide) && !offer(&line(&titles(args.output), args.output))? {
        return Ok(ExitCode::SUCCESS);
    }
    loop {
        for flow in &report.flows {
            if !offer(&one(flow, args.output)?)? {
                // Nobody reads it any more.
                return Ok(ExitCode::SUCCESS);
            }
        }
        if !is_read(ASK_EVERY)? {
            return Ok(ExitCode::SUCCESS);
        }
        question.after = Some(report.last);
        match agent::flows(&question) {
            Ok(next) => {
                is_away = false;
                tell_losses(&next, report.lost);
                report = next;
                name(&mut report, args);
            }
            Err(error) => {
                if !is_away {
                    warn(&format!("the node agent does not tell of flows, asking again: {error}"));
                }
                is_away = true;
                report.flows.clear();
            }
        }
    }
}

/// Waits, unless the reader leaves meanwhile.
fn is_read(time: Duration) -> Result<bool, Failure> {
    let stdout = std::io::stdout();
    // Asked for nothing, the kernel tells of a pipe whose other end is closed all the same.
    let mut polled = [PollFd::new(&stdout, PollFlags::empty())];
    let time = Timespec::try_from(time).unwrap_or_default();
    match rustix::event::poll(&mut polled, Some(&time)) {
        Ok(_count) => Ok(polled.iter().all(|polled| !polled.revents().intersects(PollFlags::ERR | PollFlags::NVAL))),
        Err(error) => Err(std::io::Error::from(error).into()),
    }
}

/// Names of Workloads for addresses that are no pod's of this machine, as far as somebody tells them.
fn name(report: &mut FlowsReport, args: &GetArgs) {
    if report.flows.iter().all(|flow| flow.peer.is_some()) {
        return;
    }
    let Some(Ok(workloads)) = args.mesh.api().map(|api| client::get(api, "/api/resources?kind=Workload")) else { return };
    let names = workloads_by_address(&workloads);
    for flow in report.flows.iter_mut().filter(|flow| flow.peer.is_none()) {
        flow.peer = names.get(&flow.remote.ip()).cloned();
    }
}

fn workloads_by_address(answer: &Value) -> BTreeMap<IpAddr, String> {
    let list = |value: &Value, pointer: &str| value.pointer(pointer).and_then(Value::as_array).cloned().unwrap_or_default();
    let mut names = BTreeMap::new();
    for workload in list(answer, "/items") {
        let name = format!("{}/{}", super::text(&workload, "/metadata/namespace"), super::text(&workload, "/metadata/name"));
        for address in list(&workload, "/spec/addresses") {
            if let Some(address) = address.as_str().and_then(|address| address.parse::<IpAddr>().ok()) {
                names.insert(address.to_canonical(), name.clone());
            }
        }
    }
    names
}

fn tell_losses(report: &FlowsReport, known: u64) {
    if report.missed > 0 {
        warn(&format!("{} flows are not shown: more ended than the node agent holds", report.missed));
    }
    if report.lost > known {
        let more = report.lost - known;
        warn(&format!("{more} flow records were lost, which docs/capture.md says the reasons of (flow_lost, unnamed)"));
    }
}

fn list(report: &FlowsReport, output: Option<Output>) -> Result<(), Failure> {
    let value = || serde_json::to_value(report).map_err(|error| Failure::from(anyhow::Error::from(error)));
    match output {
        Some(Output::Json) => table::json(&value()?),
        Some(Output::Yaml) => table::yaml(&value()?),
        Some(Output::Wide) | None => {
            let now = WallClock::system().since_epoch().as_secs();
            let rows = report.flows.iter().map(|flow| row(flow, table::moment(flow.closed_ms / 1_000, now), output));
            table::rows(&titles(output), rows.collect())
        }
    }
}

/// One flow of many that are still to come.
fn one(flow: &FlowReport, output: Option<Output>) -> Result<String, Failure> {
    let failed = |error: serde_json::Error| Failure::from(anyhow::Error::from(error));
    Ok(match output {
        Some(Output::Json) => serde_json::to_string(flow).map_err(failed)? + "\n",
        Some(Output::Yaml) => {
            let value = serde_json::to_value(flow).map_err(failed)?;
            let text = serde_saphyr::to_string(&value).map_err(|error| Failure::invalid([error]))?;
            format!("---\n{}\n", text.trim_end())
        }
        Some(Output::Wide) | None => {
            let row = row(flow, table::time_of_day(flow.closed_ms / 1_000), output);
            line(&row.iter().map(String::as_str).collect::<Vec<_>>(), output)
        }
    })
}

/// A row whose neighbours are not known yet: each cell has the room that it usually needs.
fn line(cells: &[&str], output: Option<Output>) -> String {
    let mut line = String::new();
    for (cell, room) in cells.iter().zip(ROOM) {
        line.push_str(&format!("{cell:<room$}  "));
    }
    table::fold(line.trim_end(), table::width().filter(|_| output.is_none()), 2)
}

fn titles(output: Option<Output>) -> Vec<&'static str> {
    let mut titles = vec!["CLOSED", "POD", "WAY", "PEER", "PORT", "SENT", "RECEIVED", "END"];
    if output == Some(Output::Wide) {
        titles.extend(["LASTED", "ROUND TRIP", "RETRANSMITS"]);
    }
    titles
}

fn row(flow: &FlowReport, closed: String, output: Option<Output>) -> Vec<String> {
    // Whoever was called has the port that says something.
    let (way, port) = if flow.direction == "inbound" { ("in", flow.local.port()) } else { ("out", flow.remote.port()) };
    let peer = flow.peer.clone().unwrap_or_else(|| flow.remote.ip().to_string());
    let mut row = vec![
        closed,
        format!("{}/{}", flow.namespace, flow.pod),
        way.to_owned(),
        peer,
        port.to_string(),
        amount(flow.sent_bytes),
        amount(flow.received_bytes),
        flow.end.clone().into_owned(),
    ];
    if output == Some(Output::Wide) {
        row.extend([span(flow.duration_us), span(flow.round_trip_us.into()), flow.retransmits.to_string()]);
    }
    row
}

/// Bytes, as people say them.
fn amount(bytes: u64) -> String {
    match bytes {
        0..10_000 => bytes.to_string(),
        10_000..10_000_000 => format!("{} KiB", bytes >> 10),
        10_000_000..10_000_000_000 => format!("{} MiB", bytes >> 20),
        _ => format!("{} GiB", bytes >> 30),
    }
}

/// Microseconds, as people say them.
fn span(us: u64) -> String {
    match us {
        0..10_000 => format!("{us}us"),
        10_000..10_000_000 => format!("{}ms", us / 1_000),
        _ => format!("{}s", us / 1_000_000),
    }
}

/// How long the agent is left alone in between.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Of each cell of a row that is printed before the next one is known.
const ROOM: [usize; 11] = [8, 12, 3, 12, 5, 8, 8, 9, 7, 10, 11];

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn flow(direction: &'static str, peer: Option<&str>) -> FlowReport {
        FlowReport {
            number: 7,
            closed_ms: 1_000,
            namespace: "shop".into(),
            pod: "web-1".into(),
            direction: direction.into(),
            local: "10.64.0.2:8080".parse().unwrap(),
            remote: "10.64.0.3:9090".parse().unwrap(),
            peer: peer.map(str::to_owned),
            sent_bytes: 812,
            received_bytes: 35_000_000,
            duration_us: 2_100_000,
            round_trip_us: 71,
            retransmits: 1,
            end: "reset".into(),
        }
    }

    #[test]
    fn a_row_names_the_peer_and_the_port_that_was_called() {
        let cells = |direction, peer, output| row(&flow(direction, peer), "3s ago".to_owned(), output).join(" ");
        assert_eq!(cells("outbound", Some("shop/api-1"), None), "3s ago shop/web-1 out shop/api-1 9090 812 33 MiB reset");
        assert_eq!(
            cells("inbound", None, Some(Output::Wide)),
            "3s ago shop/web-1 in 10.64.0.3 8080 812 33 MiB reset 2100ms 71us 1"
        );
    }

    #[test]
    fn a_line_of_a_stream_stands_under_its_titles_and_fits() {
        let titles = line(&titles(None), None);
        let row = one(&flow("outbound", Some("shop/api-1")), None).unwrap();
        assert!(row.starts_with("00:00:01  shop/web-1 "), "{row}");
        for column in ["WAY", "PEER", "PORT"] {
            let at = titles.find(column).unwrap();
            assert!(row.as_bytes()[at] != b' ' && row.as_bytes()[at - 1] == b' ', "{column}\n{titles}{row}");
        }
        assert!(titles.len() <= 81 && row.len() <= 81, "{titles}{row}");
        let json: Value = serde_json::from_str(&one(&flow("outbound", None), Some(Output::Json)).unwrap()).unwrap();
        assert_eq!((&json["remote"], json.get("peer")), (&json!("10.64.0.3:9090"), None));
    }

    #[test]
    fn workloads_are_found_by_every_address() {
        let answer = json!({ "items": [
            { "metadata": { "namespace": "shop", "name": "db" }, "spec": { "addresses": ["10.64.0.1", "fd64::1"] } },
            { "metadata": { "namespace": "shop", "name": "odd" }, "spec": {} },
        ] });
        let names: Vec<String> = workloads_by_address(&answer).into_iter().map(|(at, name)| format!("{at} {name}")).collect();
        assert_eq!(names, ["10.64.0.1 shop/db", "fd64::1 shop/db"]);
    }
}
