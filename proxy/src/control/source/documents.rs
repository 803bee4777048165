//! The documents of one file: read, their key files taken in, each compiled by itself.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use super::Told;
use crate::base::problems::{FieldPath, Problem, Problems, Severity};
use crate::control::world::Form;
use crate::model::object::Object;
use crate::model::request_authentication::RequestAuthenticationSpec;
use crate::model::yaml::{self, Document, Fault, Position};
use crate::model::{Kind, Resource, ResourceKey};
use crate::snapshot::compile;

/// One document of a file.
#[derive(Debug)]
pub(crate) struct Found {
    /// None: not even its name could be read.
    pub(crate) key: Option<ResourceKey>,
    /// What comes into force where nothing good is in force yet: the document if it is good, and what closes its target if
    /// it is a security policy that is not. None: it is left out.
    pub(crate) form: Option<Form>,
    /// Is the document as it should be?
    pub(crate) good: bool,
    /// To find places in it.
    pub(crate) document: Option<Document>,
    pub(crate) told: Vec<Told>,
}

/// Reads a key file, whose name is as written in the document. The error is for people.
pub(crate) type ReadKeys<'a> = dyn Fn(&str) -> Result<String, String> + 'a;

/// All documents of the text at `path`. Of two with one key the first counts.
pub(crate) fn documents(path: &Path, text: &str, keys: &ReadKeys<'_>) -> Vec<Found> {
    if is_key_file(path, text) {
        return Vec::new();
    }
    let mut seen = BTreeSet::new();
    let read = yaml::read(text).into_iter().map(|document| match document {
        Ok(document) => taken(path, document, keys),
        Err(fault) => refused(path, *fault),
    });
    read.map(|mut found| {
        if let Some(key) = &found.key
            && !seen.insert(key.clone())
        {
            let position = found.document.as_ref().map(|document| document.position(&FieldPath::root()));
            let problem = Problem {
                resource: key.to_string(),
                at: FieldPath::root(),
                text: "the file holds this document already; the first one counts".to_owned(),
                remedy: "keep one of the two".to_owned(),
                severity: Severity::Refuses,
                condition: None,
            };
            found.told = vec![Told { path: path.to_owned(), position, problem }];
            (found.key, found.form, found.good) = (None, None, false);
        }
        found
    })
    .collect()
}

/// Is it a JWK Set that stands beside the documents that name it?
fn is_key_file(path: &Path, text: &str) -> bool {
    let is_set = |value: serde_json::Value| value.get("kind").is_none() && value.get("keys").is_some_and(|keys| keys.is_array());
    path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("json")) && serde_json::from_str(text).is_ok_and(is_set)
}

/// The document of this key in a cluster, as JSON. It has no place in a file, and no files beside it.
pub(super) fn of_cluster(path: &Path, kind: Kind, key: &ResourceKey, text: &str) -> Found {
    if text.len() > yaml::DOCUMENT_BYTES_MAX {
        return too_large(path, key, text.len());
    }
    let no_files = |_: &str| Err("a document of a cluster has no files beside it; write the keys into jwks".to_owned());
    let mut found = match Resource::from_json(kind, text.as_bytes()) {
        Ok(mut resource) => {
            let (problems, form, good) = judged(&mut resource, &no_files);
            let told = |problem| Told { path: path.to_owned(), position: None, problem };
            let told = problems.into_vec().into_iter().map(told).collect();
            Found { key: None, form, good, document: None, told }
        }
        // Read once more for the words in which people are told. JSON is YAML.
        Err(error) => match documents(path, text, &no_files).pop() {
            Some(found) if !found.good => found,
            _ => refused(path, in_json(kind, &error.to_string())),
        },
    };
    // The key stands in the path by which the API server has it, whatever else could be read.
    if found.form.is_none() && !found.good && kind.is_security() {
        found.form = Some(unreadable(key, found.told.first().map(|told| told.problem.text.clone()).unwrap_or_default()));
    }
    for told in &mut found.told {
        told.position = None;
        told.problem.resource = key.to_string();
    }
    found.key = Some(key.clone());
    found
}

fn too_large(path: &Path, key: &ResourceKey, bytes: usize) -> Found {
    let most = yaml::DOCUMENT_BYTES_MAX;
    let text = format!("the document has {bytes} bytes; at most {most} are read");
    let problem = Problem {
        resource: key.to_string(),
        at: FieldPath::root(),
        text: text.clone(),
        remedy: "split it into several documents".to_owned(),
        severity: Severity::Refuses,
        condition: None,
    };
    let form = key.kind.is_security().then(|| unreadable(key, text));
    let told = vec![Told { path: path.to_owned(), position: None, problem }];
    Found { key: Some(key.clone()), form, good: false, document: None, told }
}

/// A security policy of which nothing but the name could be read, so that those who are sent it refuse it, too.
fn unreadable(key: &ResourceKey, reason: String) -> Form {
    let metadata = serde_json::json!({ "name": &*key.name.name, "namespace": &*key.name.namespace });
    let body = serde_json::json!({ "apiVersion": key.kind.api_version(), "kind": key.kind.as_str(), "metadata": metadata });
    Form::Unreadable { body: body.to_string(), reason }
}

fn in_json(kind: Kind, error: &str) -> Fault {
    let at = Position { line: 1, column: 1 };
    let text = format!("it cannot be read as a {kind}: {error}");
    let remedy = "correct it, or delete it".to_owned();
    Fault { at, text, remedy, severity: Severity::Refuses, key: None, body: None }
}

fn taken(path: &Path, mut document: Document, keys: &ReadKeys<'_>) -> Found {
    let key = document.resource.key();
    if let Resource::Service(service) = &mut document.resource
        && document.is_given
    {
        // What the API server filled in is of the ranges of its cluster, which no file says.
        service.spec.leave_address_to_control();
    }
    let (problems, form, good) = judged(&mut document.resource, keys);
    let told = |problem: Problem| {
        let position = Some(document.position(&problem.at));
        Told { path: path.to_owned(), position, problem }
    };
    let told = problems.into_vec().into_iter().map(told).collect();
    Found { key: Some(key), form, good, document: Some(document), told }
}

/// What is wrong with a document by itself, what comes into force of it, and whether it is as it should be.
fn judged(resource: &mut Resource, keys: &ReadKeys<'_>) -> (Problems, Option<Form>, bool) {
    let key = resource.key();
    // What the control plane says of a document is read back by people who copy it, and is not theirs to say.
    resource.keep(Vec::new());
    let mut problems = Problems::of(&key);
    if let Resource::RequestAuthentication(policy) = resource {
        take_in_keys(policy, keys, &mut problems);
    }
    // Keys that are missing would be told a second time.
    if !problems.refused() {
        problems.append(compile::alone(&key, resource));
    }
    let good = !problems.refused();
    let form = (good || key.kind.is_security()).then(|| Form::Read(Arc::new(resource.clone())));
    (problems, form, good)
}

fn refused(path: &Path, fault: Fault) -> Found {
    let Fault { at, text, remedy, severity, key, body } = fault;
    let form = match (&key, body) {
        (Some(key), Some(body)) if key.kind.is_security() => Some(Form::Unreadable { body, reason: text.clone() }),
        _ => None,
    };
    let resource = key.as_ref().map(ResourceKey::to_string).unwrap_or_default();
    let problem = Problem { resource, at: FieldPath::root(), text, remedy, severity, condition: None };
    let told = vec![Told { path: path.to_owned(), position: Some(at), problem }];
    // What was skipped is none of ours, and as it should be.
    Found { key, form, good: severity == Severity::Warns, document: None, told }
}

/// Replaces the names of key files by what stands in them: the policy goes to machines that have no such file.
fn take_in_keys(policy: &mut Object<RequestAuthenticationSpec>, keys: &ReadKeys<'_>, problems: &mut Problems) {
    let at = FieldPath::root().field("spec").field("providers");
    for (index, provider) in policy.spec.providers.iter_mut().enumerate() {
        let at = at.index(index);
        let Some(file) = provider.jwks_file.take() else { continue };
        if provider.jwks.is_some() {
            problems.refuse(&at.field("jwksFile"), "jwks and jwksFile are both there", "keep one of them");
            continue;
        }
        let keys = keys(&file).and_then(|text| serde_json::from_str(&text).map_err(|error| format!("it is no JWK Set: {error}")));
        match keys {
            Ok(keys) => provider.jwks = Some(keys),
            Err(error) => {
                let text = format!("the keys in {file:?} cannot be read: {error}");
                problems.refuse(&at.field("jwksFile"), text, "name a file with a JWK Set (RFC 7517), relative to the document");
            }
        }
    }
}
