//! `outrigger check`: compiles documents offline and prints their problems, with the same function that the sidecar runs.
//!
//! Exit codes: 0 when every document would be in force (warnings are printed all the same), 1 when one would be refused,
//! 2 when a file cannot be read, or when there is no document at all: as `apply` says it.

#[cfg(test)]
mod routes;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};

use super::given::{Given, texts};
use super::table::{self, JsonOutput};
use super::{Failure, print};
use crate::base::problems::{Problem, Severity};
use crate::control::source::Told;
use crate::control::source::documents::{ReadKeys, documents};
use crate::control::source::file::read_keys;
use crate::control::world::Form;
use crate::model::yaml::Document;
use crate::model::{ResourceKey, Resources};
use crate::snapshot::compile;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  outrigger check -f ./mesh
  outrigger check -f route.yaml -f policies/ -o json

Exit codes: 0 every document would be in force; 1 one would be refused; 2 a file cannot be read, or there is no document to check (what is left to Kubernetes is none).")]
pub(crate) struct CheckArgs {
    /// A file or a folder of documents; `-` is stdin; may be given several times
    #[arg(short, long = "file", value_name = "DIR|FILE|-", default_value = ".")]
    pub(crate) files: Vec<PathBuf>,
    /// How to write it
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) output: Option<JsonOutput>,
}

/// Runs `outrigger check`.
pub(crate) fn run(args: CheckArgs) -> Result<ExitCode, Failure> {
    let loaded = Loaded::read(&args.files);
    let told = loaded.problems();
    let refused = told.iter().filter(|told| told.problem.severity == Severity::Refuses).count();
    let warned = told.len() - refused;
    match args.output {
        Some(JsonOutput::Json) => {
            let problems: Vec<Value> = told.iter().map(machine_readable).collect();
            let summary = json!({ "documents": loaded.count, "refused": refused, "warnings": warned });
            table::json(&json!({ "problems": problems, "unreadable": loaded.unreadable, "summary": summary }))?;
        }
        None => {
            let mut text = String::new();
            for told in &told {
                // Writing into a text does not fail.
                writeln!(text, "{told}\n    {}", told.problem.remedy).unwrap_or_default();
            }
            let plural = |number: usize, word: &str| format!("{number} {word}{}", if number == 1 { "" } else { "s" });
            let documents = plural(loaded.count, "document");
            let (errors, warnings) = (plural(refused, "error"), plural(warned, "warning"));
            writeln!(text, "{documents}, {errors}, {warnings}").unwrap_or_default();
            print(&text)?;
        }
    }
    if !loaded.unreadable.is_empty() {
        return Err(Failure::invalid(&loaded.unreadable));
    }
    // A check of nothing would pass whatever is wrong, and a name that is mistyped would be found at `apply` only.
    if refused == 0 && loaded.places.is_empty() {
        return Err(Failure::invalid(["there is no document to check"]));
    }
    Ok(if refused > 0 { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

/// Documents of files and folders.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    /// The good ones, and the refused ones as far as they could be read.
    pub(crate) resources: Resources,
    /// What is wrong with each by itself.
    told: Vec<Told>,
    /// Why files could not be read.
    pub(crate) unreadable: Vec<String>,
    count: usize,
    places: BTreeMap<ResourceKey, (PathBuf, Document)>,
}

impl Loaded {
    /// Reads them all; what cannot be read is remembered.
    pub(crate) fn read(files: &[PathBuf]) -> Self {
        let mut loaded = Self::default();
        for given in texts(files) {
            match given {
                Ok(Given { path, text }) => loaded.take(&path, &text, &|name| read_keys(&path, name)),
                Err(told) => loaded.unreadable.push(told),
            }
        }
        loaded
    }

    /// All problems: of each document by itself and of what they say about each other, in the order of files.
    pub(crate) fn problems(&self) -> Vec<Told> {
        let among = compile::references(&self.resources).into_vec().into_iter();
        let mut told: Vec<Told> = among.map(|problem| self.place(problem)).collect();
        told.extend(self.told.iter().cloned());
        told.sort();
        told
    }

    fn take(&mut self, path: &Path, text: &str, keys: &ReadKeys<'_>) {
        for found in documents(path, text, keys) {
            self.count += 1;
            self.told.extend(found.told);
            let Some(key) = found.key else { continue };
            if let Some((other, _)) = self.places.get(&key) {
                let problem = Problem {
                    resource: key.to_string(),
                    at: crate::base::problems::FieldPath::root(),
                    text: format!("{} holds this document too, and counts", other.display()),
                    remedy: "keep one of the two".to_owned(),
                    severity: Severity::Warns,
                    condition: None,
                };
                let position = found.document.map(|document| document.position(&problem.at));
                self.told.push(Told { path: path.to_owned(), position, problem });
                continue;
            }
            match found.form {
                Some(Form::Read(resource)) if found.good => {
                    self.resources.by_key.insert(key.clone(), resource);
                }
                Some(Form::Read(resource)) => {
                    self.resources.refused.insert(key.clone(), Some(Arc::clone(&resource)));
                }
                Some(Form::Unreadable { .. }) => {
                    self.resources.refused.insert(key.clone(), None);
                }
                None => {}
            }
            if let Some(document) = found.document {
                self.places.insert(key, (path.to_owned(), document));
            }
        }
    }

    fn place(&self, problem: Problem) -> Told {
        let place = problem.resource.parse().ok().and_then(|key: ResourceKey| self.places.get(&key));
        match place {
            Some((path, document)) => Told { path: path.clone(), position: Some(document.position(&problem.at)), problem },
            None => Told { path: PathBuf::new(), position: None, problem },
        }
    }
}

fn machine_readable(told: &Told) -> Value {
    let Told { path, position, problem } = told;
    json!({
        "file": path.display().to_string(),
        "line": position.map(|position| position.line),
        "column": position.map(|position| position.column),
        "resource": problem.resource,
        "field": problem.at.as_str(),
        "severity": match problem.severity { Severity::Refuses => "error", Severity::Warns => "warning" },
        "text": problem.text,
        "remedy": problem.remedy,
        // What the status of a route would say in a cluster.
        "condition": problem.condition().map(|condition| {
            json!({ "type": condition.kind(), "reason": condition.reason(), "parent": problem.parent() })
        }),
    })
}
