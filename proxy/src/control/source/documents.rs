//! The documents of one file: read, their key files taken in, each compiled by itself.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use super::Told;
use crate::base::problems::{FieldPath, Problem, Problems, Severity};
use crate::control::world::Form;
use crate::model::object::Object;
use crate::model::request_authentication::RequestAuthenticationSpec;
use crate::model::yaml::{self, Document, Fault};
use crate::model::{Resource, ResourceKey};
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
    path.extension().is_some_and(|ending| ending == "json") && serde_json::from_str(text).is_ok_and(is_set)
}

fn taken(path: &Path, mut document: Document, keys: &ReadKeys<'_>) -> Found {
    let key = document.resource.key();
    // What the control plane says of a document is read back by people who copy it, and is not theirs to say.
    document.resource.keep(Vec::new());
    let mut problems = Problems::of(&key);
    if let Resource::RequestAuthentication(policy) = &mut document.resource {
        take_in_keys(policy, keys, &mut problems);
    }
    // Keys that are missing would be told a second time.
    if !problems.refused() {
        problems.append(compile::alone(&key, &document.resource));
    }
    let good = !problems.refused();
    let told = |problem: Problem| {
        let position = Some(document.position(&problem.at));
        Told { path: path.to_owned(), position, problem }
    };
    let told = problems.into_vec().into_iter().map(told).collect();
    let form = (good || key.kind.is_security()).then(|| Form::Read(Arc::new(document.resource.clone())));
    Found { key: Some(key), form, good, document: Some(document), told }
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
