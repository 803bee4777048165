//! `outrigger apply` and `outrigger delete`: what the control plane stores.
//!
//! A change is taken as a whole or not at all; a document that is refused is named with its file, line and column.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::Value;
use tokio::time::{Duration, Instant};

use super::client::{self, ApiArgs};
use super::given::{Given, texts};
use super::{Failure, print, warn};
use crate::base::units::Span;
use crate::control::api::{Answer, Text, Wrong};
use crate::control::source::documents::documents;
use crate::control::source::file::read_keys;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  outrigger apply -f route.yaml
  outrigger apply -f ./mesh --wait --timeout 10s
  cat route.yaml | outrigger apply -f -

Exit codes: 0 applied (with --wait: and acknowledged); 1 --wait ended with sidecars that refused, did not answer or are not connected; 2 a document is refused, nothing was applied; 3 the control plane does not run, or its token may not be read.")]
pub(crate) struct ApplyArgs {
    /// A file or a folder of documents; `-` is stdin; may be given several times
    #[arg(short, long = "file", value_name = "FILE|DIR|-", required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Return when the sidecar of every local pod is connected and acknowledged it
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    pub(crate) timeout: Span,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:
  outrigger delete -f route.yaml

A security policy that loses the Service that it is for is told of; it goes on covering what the Service led to.

Exit codes: 0 deleted; 1 a document is not there, or stands in a watched folder; 2 there is no document to delete; 3 the control plane does not run, or its token may not be read.")]
pub(crate) struct DeleteArgs {
    /// A file or a folder of documents; `-` is stdin; may be given several times
    #[arg(short, long = "file", value_name = "FILE|DIR|-", required = true)]
    pub(crate) files: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

/// Runs `outrigger apply`.
pub(crate) fn apply(args: &ApplyArgs) -> Result<ExitCode, Failure> {
    let answer = change(&args.api, "/api/apply", &args.files)?;
    let (refusing, warning): (Vec<&Wrong>, Vec<&Wrong>) = answer.problems.iter().partition(|problem| problem.refuses);
    for problem in warning {
        warn(&format!("warning: {}", line(problem)));
    }
    if !refusing.is_empty() {
        let first = if answer.results.is_empty() { "nothing was applied" } else { "not everything was applied" };
        return Err(Failure::invalid(std::iter::once(first.to_owned()).chain(refusing.into_iter().map(line))));
    }
    if answer.results.is_empty() {
        return Err(Failure::invalid(["there is no document to apply"]));
    }
    tell(&answer)?;
    if args.wait { wait(args, &answer) } else { Ok(ExitCode::SUCCESS) }
}

/// Runs `outrigger delete`.
pub(crate) fn delete(args: &DeleteArgs) -> Result<ExitCode, Failure> {
    let answer = change(&args.api, "/api/delete", &args.files)?;
    tell(&answer)?;
    deleted(&answer)
}

fn deleted(answer: &Answer) -> Result<ExitCode, Failure> {
    let (refusing, warning): (Vec<&Wrong>, Vec<&Wrong>) = answer.problems.iter().partition(|problem| problem.refuses);
    for problem in warning {
        warn(&format!("warning: {}", line(problem)));
    }
    if refusing.is_empty() && answer.results.is_empty() {
        return Err(Failure::invalid(["there is no document to delete"]));
    }
    if refusing.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let first = if answer.results.is_empty() { "nothing was deleted" } else { "not everything was deleted" };
    Err(Failure::refused(std::iter::once(first.to_owned()).chain(refusing.into_iter().map(line))))
}

fn change(api: &ApiArgs, path: &str, files: &[PathBuf]) -> Result<Answer, Failure> {
    let texts = read(files)?;
    let answer = client::post(api, path, &texts)?;
    serde_json::from_value(answer).map_err(|error| Failure::from(anyhow::Error::from(error)))
}

fn tell(answer: &Answer) -> Result<(), Failure> {
    let lines = answer.results.iter().map(|done| format!("{} {}\n", done.resource, done.action));
    print(&lines.collect::<String>())
}

/// A problem of a document as one line, with its place and its remedy.
pub(super) fn line(problem: &Wrong) -> String {
    let parts = [problem.place.as_deref(), problem.resource.as_deref(), Some(problem.at.as_str())];
    let mut line: String =
        parts.into_iter().flatten().filter(|part| !part.is_empty()).fold(String::new(), |line, part| line + part + ": ");
    line.push_str(&problem.text);
    if !problem.remedy.is_empty() {
        line.push_str("; ");
        line.push_str(&problem.remedy);
    }
    line
}

/// The texts, each with the key files that its documents name.
fn read(files: &[PathBuf]) -> Result<Vec<Text>, Failure> {
    let text = |Given { path, text }| {
        let keys = keys_beside(&path, &text);
        Text { name: path.display().to_string(), text, keys }
    };
    let texts: Result<_, String> = texts(files).into_iter().map(|given| given.map(text)).collect();
    texts.map_err(|told| Failure::invalid([told]))
}

/// Key files that the documents of a text name, read with the user's own rights. One that cannot be read is left out; the
/// answer names it.
fn keys_beside(path: &Path, text: &str) -> BTreeMap<String, String> {
    let keys = RefCell::new(BTreeMap::new());
    documents(path, text, &|name| {
        let text = read_keys(path, name)?;
        keys.borrow_mut().insert(name.to_owned(), text.clone());
        Ok(text)
    });
    keys.into_inner()
}

/// Waits until the sidecar of every local pod is connected and stands at the change's revision, and tells who refused any
/// of its documents, or what is lacking.
fn wait(args: &ApplyArgs, answer: &Answer) -> Result<ExitCode, Failure> {
    let applied: BTreeSet<&str> = answer.results.iter().map(|done| done.resource.as_str()).collect();
    let deadline = Instant::now() + args.timeout.0;
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).min(AT_ONCE).as_millis();
        let proxies = client::get(&args.api, &format!("/api/proxies?revision={}&within={left}", answer.revision))?;
        let Standing { acknowledged, refused, lacking } = Standing::of(&proxies, answer.revision, &applied);
        if lacking.is_empty() && refused.is_empty() {
            print(&format!("acknowledged by {acknowledged} sidecars\n"))?;
            return Ok(ExitCode::SUCCESS);
        }
        if lacking.is_empty() {
            return Err(Failure::refused(std::iter::once("some sidecars keep their last good form".to_owned()).chain(refused)));
        }
        if Instant::now() >= deadline {
            let first = format!("not every sidecar acknowledged within {}; what was applied stays", args.timeout);
            return Err(Failure::refused(std::iter::once(first).chain(refused).chain(lacking)));
        }
    }
}

/// How the sidecars stand to a change.
#[derive(Debug, Default, PartialEq)]
struct Standing {
    acknowledged: usize,
    /// Who refuses which of the change's documents, and why.
    refused: Vec<String>,
    /// Who has not answered yet, and what each lacks.
    lacking: Vec<String>,
}

impl Standing {
    fn of(proxies: &Value, revision: u64, applied: &BTreeSet<&str>) -> Self {
        let mut standing = Self::default();
        let list = |item: &Value, field: &str| item.get(field).and_then(Value::as_array).cloned().unwrap_or_default();
        let name = |item: &Value| format!("{}/{}", text(item, "namespace"), text(item, "name"));
        for item in list(proxies, "items") {
            let stands = item.get("acknowledged").and_then(Value::as_u64).unwrap_or_default();
            if stands >= revision {
                standing.acknowledged += 1;
            } else {
                standing.lacking.push(format!("{} has acknowledged revision {stands}, not {revision}", name(&item)));
            }
            let of_these = list(&item, "refused").into_iter().filter(|refused| applied.contains(text(refused, "resource")));
            standing.refused.extend(
                of_these.map(|refused| {
                    format!("{} refuses {}: {}", name(&item), text(&refused, "resource"), text(&refused, "reason"))
                }),
            );
        }
        standing.lacking.extend(list(proxies, "notConnected").iter().map(|pod| format!("{} is not connected", name(pod))));
        standing
    }
}

fn text<'a>(item: &'a Value, field: &str) -> &'a str {
    item.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// The longest that the control plane is asked to wait at once.
const AT_ONCE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nothing_to_delete_is_wrong_input_and_nothing_deleted_is_a_refusal() {
        let wrong = |refuses: bool| json!({ "text": "it is not there", "refuses": refuses });
        let code = |answer: Value| deleted(&serde_json::from_value(answer).unwrap()).err().map(|failure| failure.code);
        assert_eq!(code(json!({})), Some(2));
        assert_eq!(code(json!({ "problems": [wrong(false)] })), Some(2));
        assert_eq!(code(json!({ "problems": [wrong(true)] })), Some(1));
        let done = json!([{ "resource": "Service/shop/web", "action": "deleted" }]);
        assert_eq!(code(json!({ "results": done, "problems": [wrong(true)] })), Some(1));
        assert_eq!(code(json!({ "results": done, "problems": [wrong(false)] })), None);
    }

    #[test]
    fn a_wait_counts_every_pod_and_says_what_each_lacks() {
        let sidecar = |name: &str, acknowledged: u64, refused: &[&str]| {
            let refused: Vec<Value> = refused
                .iter()
                .map(|resource| json!({ "resource": resource, "version": "1", "reason": "no such field" }))
                .collect();
            json!({ "namespace": "shop", "name": name, "acknowledged": acknowledged, "refused": refused })
        };
        let proxies = json!({
            "items": [
                sidecar("a", 7, &[]),
                sidecar("b", 8, &["Service/shop/web", "Service/shop/old"]),
                sidecar("c", 6, &[]),
            ],
            "notConnected": [{ "namespace": "shop", "name": "d" }],
        });
        let standing = Standing::of(&proxies, 7, &BTreeSet::from(["Service/shop/web"]));
        assert_eq!(standing.acknowledged, 2);
        assert_eq!(standing.refused, ["shop/b refuses Service/shop/web: no such field"]);
        assert_eq!(standing.lacking, ["shop/c has acknowledged revision 6, not 7", "shop/d is not connected"]);
    }
}
