//! `outrigger status` and `outrigger proxies`: whether the mesh is well, and who has acknowledged what.

use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::client::{self, ApiArgs};
use super::table::{self, Output, day, moment};
use super::{Failure, print};

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  outrigger status -o json")]
pub(crate) struct StatusArgs {
    /// How to write it
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) output: Option<Output>,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  outrigger proxies -o wide")]
pub(crate) struct ProxiesArgs {
    /// How to write it
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) output: Option<Output>,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

/// Runs `outrigger status`.
pub(crate) fn status(args: &StatusArgs) -> Result<ExitCode, Failure> {
    let answer = client::get(&args.api, "/api/status")?;
    if written(args.output, &answer)? {
        return Ok(ExitCode::SUCCESS);
    }
    let now = number(&answer, "/control/now");
    let mut text = String::new();
    let mut say = |title: &str, line: String| text.push_str(&format!("{title:<15}{line}\n"));
    let control = format!(
        "up for {}, version {}, trust domain {}, revision {}",
        moment(number(&answer, "/control/started"), now).trim_end_matches(" ago"),
        string(&answer, "/control/version"),
        string(&answer, "/control/trustDomain"),
        number(&answer, "/control/revision"),
    );
    say("control plane", control);
    let nodes = list(&answer, "/nodes");
    if nodes.is_empty() {
        say("node agent", "none connected".to_owned());
    }
    for node in nodes {
        let expires = moment(number(node, "/certificateExpires"), now);
        say("node agent", format!("{} connected, certificate ends {expires}", string(node, "/name")));
    }
    say("authority", format!("root good until {}", day(number(&answer, "/control/rootExpires"))));
    let kinds = answer.pointer("/resources").and_then(Value::as_object);
    let kinds = kinds.into_iter().flatten().map(|(kind, count)| format!("{kind} {count}"));
    let kinds = kinds.collect::<Vec<_>>().join(", ");
    say("resources", if kinds.is_empty() { "none".to_owned() } else { kinds });
    say("problems", format!("{} refuse, {} warn", number(&answer, "/problems/refuses"), number(&answer, "/problems/warns")));
    print(&text)?;
    let rows = list(&answer, "/pods").iter().map(|pod| {
        let meshed = pod.pointer("/meshed").and_then(Value::as_bool) == Some(true);
        let connected = pod.pointer("/connected").and_then(Value::as_bool) == Some(true);
        let refused = number(pod, "/refused");
        let configuration = match (meshed, connected) {
            (false, _) => "outside the mesh".to_owned(),
            // Sidecars find a control plane that was away within a moment.
            (true, false) if now.saturating_sub(number(&answer, "/control/started")) < RECONNECT_SECONDS => {
                "reconnecting".to_owned()
            }
            (true, false) => "not connected".to_owned(),
            (true, true) if refused > 0 => format!("{refused} refused"),
            (true, true) if number(pod, "/acknowledged") < number(&answer, "/control/revision") => "behind".to_owned(),
            (true, true) => "acknowledged".to_owned(),
        };
        let expires = pod.pointer("/certificateExpires").and_then(Value::as_u64);
        vec![
            string(pod, "/namespace"),
            string(pod, "/name"),
            list(pod, "/addresses").iter().filter_map(Value::as_str).collect::<Vec<_>>().join(","),
            string(pod, "/serviceAccount"),
            configuration,
            expires.map_or_else(|| "-".to_owned(), |expires| moment(expires, now)),
        ]
    });
    let rows: Vec<_> = rows.collect();
    if !rows.is_empty() {
        print("\n")?;
        table::rows(&["NAMESPACE", "POD", "ADDRESSES", "ACCOUNT", "CONFIGURATION", "CERTIFICATE ENDS"], rows)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs `outrigger proxies`.
pub(crate) fn proxies(args: &ProxiesArgs) -> Result<ExitCode, Failure> {
    let answer = client::get(&args.api, "/api/proxies")?;
    if written(args.output, &answer)? {
        return Ok(ExitCode::SUCCESS);
    }
    let wide = args.output == Some(Output::Wide);
    let revision = number(&answer, "/revision");
    let mut titles = vec!["NAMESPACE", "POD", "IDENTITY", "CONFIGURATION", "RESOURCES", "REFUSED"];
    if wide {
        titles.extend(["SCOPES", "SOFTWARE", "ADDRESS"]);
    }
    let items = list(&answer, "/items");
    let rows = items.iter().map(|item| {
        let acknowledged = number(item, "/acknowledged");
        let configuration =
            if acknowledged >= revision { "acknowledged".to_owned() } else { format!("revision {acknowledged} of {revision}") };
        let mut row = vec![
            string(item, "/namespace"),
            string(item, "/name"),
            string(item, "/identity"),
            configuration,
            number(item, "/resources").to_string(),
            list(item, "/refused").len().to_string(),
        ];
        if wide {
            let scopes = list(item, "/scopes").iter().filter_map(Value::as_str).collect::<Vec<_>>().join(",");
            row.extend([scopes, string(item, "/software"), string(item, "/address")]);
        }
        row
    });
    let missing = list(&answer, "/notConnected").iter().map(|pod| {
        let mut row = vec![string(pod, "/namespace"), string(pod, "/name"), "-".to_owned(), "not connected".to_owned()];
        row.resize(titles.len(), "-".to_owned());
        row
    });
    table::rows(&titles, rows.chain(missing).collect())?;
    for item in items {
        for refused in list(item, "/refused") {
            print(&format!(
                "\n{}/{} refuses {}: {}\n",
                string(item, "/namespace"),
                string(item, "/name"),
                string(refused, "/resource"),
                string(refused, "/reason"),
            ))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// How long after the control plane's start a sidecar may be on its way back: the longest pause between two attempts.
const RECONNECT_SECONDS: u64 = 6;

fn written(output: Option<Output>, answer: &Value) -> Result<bool, Failure> {
    match output {
        Some(Output::Json) => table::json(answer)?,
        Some(Output::Yaml) => table::yaml(answer)?,
        Some(Output::Wide) | None => return Ok(false),
    }
    Ok(true)
}

fn string(item: &Value, pointer: &str) -> String {
    item.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn number(item: &Value, pointer: &str) -> u64 {
    item.pointer(pointer).and_then(Value::as_u64).unwrap_or_default()
}

fn list<'a>(item: &'a Value, pointer: &str) -> &'a [Value] {
    item.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}
