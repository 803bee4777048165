//! `outrigger get`: documents that the control plane holds, and how each of them stands; and `get flows`, see [`flows`].

mod flows;

use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::Failure;
use super::mesh::MeshArgs;
use super::table::{self, Output};
use crate::control::api::kind_named;
use crate::model::Kind;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  outrigger get services
  outrigger get httproute web -n shop -o yaml
  outrigger get all -o wide
  outrigger get flows web-1 -n shop --watch
  outrigger get authz --kubernetes
  outrigger get --raw /api/status

`flows` are connections of this machine's pods that ended of late, as the kernel saw them.

Kinds: mesh, service (svc), workload (wl), httproute (route), authorizationpolicy (authz), requestauthentication (authn), peerauthentication (peer), trafficpolicy (tp); plurals too.")]
pub(crate) struct GetArgs {
    /// A kind by its name, its plural or its short form, `all`, or `flows`
    #[arg(required_unless_present = "raw")]
    pub(crate) kind: Option<String>,
    /// Only documents of this name; only flows of this pod
    pub(crate) name: Option<String>,
    /// Only this namespace
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
    /// How to write it
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) output: Option<Output>,
    /// Go on with flows as they end, until interrupted
    #[arg(short, long)]
    pub(crate) watch: bool,
    /// What the API answers to this path, in its own form and nothing else
    #[arg(long, value_name = "PATH", value_parser = path, conflicts_with_all = ["kind", "name", "namespace", "output", "watch"])]
    pub(crate) raw: Option<String>,
    #[command(flatten)]
    pub(crate) mesh: MeshArgs,
}

/// What is no path would be sent as it is, and be refused by whoever is asked in words of its own.
fn path(text: &str) -> Result<String, String> {
    let is_path = text.starts_with('/') && text.parse::<http::uri::PathAndQuery>().is_ok();
    is_path.then(|| text.to_owned()).ok_or_else(|| "it is no path of the API; write one as /api/status".to_owned())
}

/// Runs `outrigger get`.
pub(crate) fn run(args: &GetArgs) -> Result<ExitCode, Failure> {
    if let Some(path) = &args.raw {
        let answer = args.mesh.find()?.get(path)?;
        super::print(&format!("{answer}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let named = args.kind.as_deref().unwrap_or(ALL);
    if named == "flows" {
        return flows::run(args);
    }
    if args.watch {
        return Err(Failure::invalid(["only flows can be watched"]));
    }
    let mut query = Vec::new();
    if named != ALL {
        let Some(kind) = kind_named(named) else {
            let known: Vec<&str> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
            return Err(Failure::invalid([format!(
                "there is no kind {named:?}; there are {}, `{ALL}` and `flows`",
                known.join(", ")
            )]));
        };
        query.push(("kind", kind.as_str().to_owned()));
    }
    query.extend(args.namespace.clone().map(|namespace| ("namespace", namespace)));
    query.extend(args.name.clone().map(|name| ("name", name)));
    let query: Vec<String> = query
        .into_iter()
        .map(|(key, value)| {
            format!("{key}={}", percent_encoding::utf8_percent_encode(&value, percent_encoding::NON_ALPHANUMERIC))
        })
        .collect();
    let answer = args.mesh.find()?.get(&format!("/api/resources?{}", query.join("&")))?;
    let none = Vec::new();
    let items = answer.get("items").and_then(Value::as_array).unwrap_or(&none);
    if items.is_empty() && args.name.is_some() {
        return Err(Failure::refused([format!("there is no {named} of this name")]));
    }
    match (args.output, items.as_slice()) {
        (Some(Output::Json), [item]) if args.name.is_some() => table::json(item)?,
        (Some(Output::Json), _) => table::json(&answer)?,
        (Some(Output::Yaml), items) => {
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    super::print("---\n")?;
                }
                table::yaml(item)?;
            }
        }
        (output, items) => list(items, named == ALL, output == Some(Output::Wide))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Every kind.
const ALL: &str = "all";

fn list(items: &[Value], kinds: bool, wide: bool) -> Result<(), Failure> {
    let mut titles = vec!["NAMESPACE", "NAME", "WHAT", "STATUS"];
    if kinds {
        titles.insert(0, "KIND");
    }
    if wide {
        titles.extend(["VERSION", "ORIGIN"]);
    }
    let rows = items.iter().map(|item| {
        // A Mesh is in none.
        let namespace = Some(text(item, "/metadata/namespace")).filter(|namespace| !namespace.is_empty());
        let mut row = vec![namespace.unwrap_or_else(|| "-".to_owned()), text(item, "/metadata/name"), what(item), standing(item)];
        if kinds {
            row.insert(0, text(item, "/kind"));
        }
        if wide {
            row.extend([text(item, "/status/version"), text(item, "/status/origin")]);
        }
        row
    });
    table::rows(&titles, rows.collect())
}

/// The one thing that a person looks for in a document of this kind.
fn what(item: &Value) -> String {
    let each = |pointer: &str, text: &dyn Fn(&Value) -> String| -> String {
        let none = Vec::new();
        let list = item.pointer(pointer).and_then(Value::as_array).unwrap_or(&none);
        list.iter().map(text).collect::<Vec<_>>().join(",")
    };
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let reference = |value: &Value| format!("{}/{}", text(value, "/kind"), text(value, "/name"));
    match text(item, "/kind").as_str() {
        "Service" => {
            let address = text(item, "/spec/clusterIP");
            format!("{address} {}", each("/spec/ports", &|port| port.get("port").map(plain).unwrap_or_default()))
                .trim()
                .to_owned()
        }
        "Workload" => each("/spec/addresses", &plain),
        kind if kind.ends_with("Route") => {
            let parents = each("/spec/parentRefs", &|parent| format!("Service/{}", text(parent, "/name")));
            let hosts = each("/spec/hostnames", &plain);
            format!("{parents} {hosts}").trim().to_owned()
        }
        "AuthorizationPolicy" => {
            format!("{} {}", text(item, "/spec/action"), each("/spec/targetRefs", &reference)).trim().to_owned()
        }
        "PeerAuthentication" => {
            format!("{} {}", text(item, "/spec/mode"), each("/spec/targetRefs", &reference)).trim().to_owned()
        }
        _ => each("/spec/targetRefs", &reference),
    }
}

fn standing(item: &Value) -> String {
    let list = |pointer: &str| item.pointer(pointer).and_then(Value::as_array).map_or(0, Vec::len);
    let refused_by = list("/status/refusedBy");
    if refused_by > 0 {
        return format!("refused by {refused_by}");
    }
    match (item.pointer("/status/accepted").and_then(Value::as_bool), list("/status/problems")) {
        (Some(false), _) => "refused".to_owned(),
        (_, 0) => "accepted".to_owned(),
        (_, 1) => "accepted, 1 warning".to_owned(),
        (_, problems) => format!("accepted, {problems} warnings"),
    }
}

fn text(item: &Value, pointer: &str) -> String {
    item.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_no_path_is_not_asked_for() {
        assert_eq!(super::path("/api/resources?kind=Service"), Ok("/api/resources?kind=Service".to_owned()));
        for text in ["http://x", "x", "", "/a b"] {
            assert!(super::path(text).unwrap_err().contains("write one as /api/status"), "{text}");
        }
    }
}
