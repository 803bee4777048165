//! The last good forms of the documents in watched folders, on disk: a document that is bad when the control plane starts
//! keeps the form that it had before, as it does while the control plane runs.
//!
//! One file of ours for each file that people keep, named by a digest of its path and written when its documents change. Of
//! each document it says as the how-manieth it came, bad ones among them: of two with one key the earlier one is in force, also
//! after a restart. Stored documents are not here: `apply` refuses what is bad before it is stored. Invariant: what cannot be read
//! here is as if it had never been kept; nothing else depends on it.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use crate::base::state;
use crate::control::world::Form;
use crate::model::{Resource, ResourceKey};

/// Good documents of one file, by key.
pub(super) type Forms = BTreeMap<ResourceKey, Form>;

/// As the how-manieth of all documents each of one file came.
pub(super) type Since = BTreeMap<ResourceKey, u64>;

/// What is kept of one file.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pub(super) forms: Forms,
    pub(super) since: Since,
}

/// One file of ours.
#[derive(Deserialize, Serialize)]
struct KeptFile {
    path: PathBuf,
    /// The canonical JSON by key.
    documents: BTreeMap<String, String>,
    #[serde(default)]
    since: BTreeMap<String, u64>,
}

/// Reads everything that is kept in `folder`, by the file that it was read from.
pub(super) fn read(folder: &Path) -> BTreeMap<PathBuf, Kept> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let files = entries.filter_map(|entry| serde_json::from_slice::<KeptFile>(&std::fs::read(entry.path()).ok()?).ok());
    let kept = |file: &KeptFile| Kept {
        forms: file.documents.iter().filter_map(|(key, body)| form(key, body)).collect(),
        since: file.since.iter().filter_map(|(key, since)| Some((key.parse().ok()?, *since))).collect(),
    };
    files.map(|file| (file.path.clone(), kept(&file))).collect()
}

/// Keeps the good documents of the file at `path`, and when each of its documents came; where there are none, nothing is kept.
///
/// # Errors
/// The folder cannot be written.
pub(super) fn write(folder: &Path, path: &Path, forms: &Forms, since: &Since) -> io::Result<()> {
    let documents: BTreeMap<String, String> = forms
        .iter()
        .filter_map(|(key, form)| match form {
            Form::Read(resource) => Some((key.to_string(), resource.to_json())),
            Form::Unreadable { .. } => None,
        })
        .collect();
    let name: String =
        digest(&SHA256, path.as_os_str().as_encoded_bytes()).as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let at = folder.join(format!("{name}.json"));
    let since: BTreeMap<String, u64> = since.iter().map(|(key, since)| (key.to_string(), *since)).collect();
    if documents.is_empty() && since.is_empty() {
        return match std::fs::remove_file(&at) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _gone => Ok(()),
        };
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    state::write_durable(&at, &serde_json::to_vec(&KeptFile { path: path.to_owned(), documents, since })?, 0o600)
}

/// A form as it was kept. A version that does not know its fields any more does without.
fn form(key: &str, body: &str) -> Option<(ResourceKey, Form)> {
    let key: ResourceKey = key.parse().ok()?;
    let resource = Resource::from_json(key.kind, body.as_bytes()).ok()?;
    (resource.key() == key).then(|| (key, Form::Read(Arc::new(resource))))
}
