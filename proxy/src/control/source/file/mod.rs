//! Watched folders: documents that people write, documents that `apply` stored, records of local pods.
//!
//! A change is noticed by the kernel's notifications, and at the latest by a slow look at everything, because a
//! notification can be lost. What was good stays in force, across a restart as well (`kept.rs`): a document that turned bad
//! keeps its last good form, a file that cannot be read or holds no document any more and a folder that is gone keep all of
//! theirs. Only a file that is gone from a folder that is there takes its documents with it, and one that names fewer takes
//! those. What has the name of a file and is none (a link that leads nowhere, a folder) is a file that cannot be read.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::documents::{Found, documents};
use super::kept::{self, Forms, Kept, Since};
use super::{Batch, Told};
use crate::base::drain::DrainGuard;
use crate::base::problems::{FieldPath, Problem, Severity};
use crate::control::world::{Change, Form, Origin};
use crate::model::object::Object;
use crate::model::pod_record::PodRecord;
use crate::model::{Resource, ResourceKey, yaml};

/// The largest file that is read.
pub(crate) const FILE_BYTES_MAX: u64 = 64 << 20;

/// The largest key file.
const KEYS_BYTES_MAX: u64 = 1 << 20;

/// How deep folders are followed.
const DEPTH_MAX: usize = 16;

/// After a notification of documents: writers often write several times.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// Between two looks at everything.
const RESCAN: Duration = Duration::from_secs(5);

/// What is watched.
#[derive(Clone, Debug)]
pub(crate) struct Watched {
    /// Folders (or single files) that people keep.
    pub(crate) folders: Vec<PathBuf>,
    /// Where `apply` stores.
    pub(crate) applied: PathBuf,
    /// Where the records of local pods are.
    pub(crate) pods: PathBuf,
    /// Where the last good forms of what people keep are remembered across a restart.
    pub(crate) kept: PathBuf,
}

/// What is to be looked at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Look {
    /// The records of pods alone. Each is written in one step and a pod waits for it, so nothing else is waited for.
    Records,
    Everything,
}

/// Watches until `stop` says so or nobody listens any more. The first batch holds everything and comes at once.
pub(crate) async fn watch(watched: Watched, batches: mpsc::Sender<Batch>, mut stop: DrainGuard) {
    let (notices, mut noticed) = mpsc::channel(1);
    let (records, mut recorded) = mpsc::channel(1);
    let pods = watched.pods.clone();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // One waiting notice is enough: what comes after it is seen by the look that it causes.
        match event.ok().and_then(|event| news(&event, &pods)) {
            Some(Look::Everything) => notices.try_send(()).unwrap_or_default(),
            Some(Look::Records) => records.try_send(()).unwrap_or_default(),
            None => {}
        }
    })
    .inspect_err(|error| warn!(%error, "folders are looked at slowly, because the system does not tell of changes"))
    .ok();
    let mut folders = Some(Folders::new(watched));
    let mut first = true;
    let mut look = Look::Everything;
    let mut rescan = Instant::now();
    loop {
        let Some(mut now) = folders.take() else { return };
        if let Some(watcher) = &mut watcher {
            now.subscribe(watcher);
        }
        if look == Look::Everything {
            rescan = Instant::now() + RESCAN;
        }
        // Reading files blocks; the state travels there and back.
        let looked = tokio::task::spawn_blocking(move || {
            let batch = now.look(look);
            (now, batch)
        });
        let Ok((now, batch)) = looked.await else {
            warn!("looking at the folders failed; they are looked at no more");
            return;
        };
        folders = Some(now);
        if let Some(batch) = batch.or_else(|| first.then(Batch::default)) {
            first = false;
            debug!(changes = batch.changes.len(), problems = batch.problems.len(), "folders changed");
            if batches.send(batch).await.is_err() {
                return;
            }
        }
        look = tokio::select! {
            () = stop.stopped() => return,
            _ = recorded.recv(), if watcher.is_some() => Look::Records,
            _ = noticed.recv(), if watcher.is_some() => {
                tokio::time::sleep(DEBOUNCE).await;
                // What came meanwhile is seen by the look that follows.
                noticed.try_recv().unwrap_or_default();
                Look::Everything
            }
            () = tokio::time::sleep_until(rescan) => Look::Everything,
        };
    }
}

/// What a notification is a reason to look at.
fn news(event: &notify::Event, pods: &Path) -> Option<Look> {
    if event.kind.is_access() {
        return None;
    }
    let in_folder = |path: &PathBuf| path.parent() == Some(pods);
    // What was lost names no file.
    if event.paths.is_empty() || !event.paths.iter().all(in_folder) {
        return Some(Look::Everything);
    }
    event.paths.iter().any(|path| !is_hidden(path)).then_some(Look::Records)
}

/// Reads the keys that a document beside `path` names.
pub(crate) fn read_keys(path: &Path, name: &str) -> Result<String, String> {
    let file = path.parent().unwrap_or(Path::new(".")).join(name);
    read_at_most(&file, KEYS_BYTES_MAX).map_err(|error| error.to_string())
}

/// Reads a text file that is not too large.
pub(crate) fn read_at_most(path: &Path, bytes_max: u64) -> io::Result<String> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file"));
    }
    if metadata.len() > bytes_max {
        let text = format!("it has {} bytes; at most {bytes_max} are read", metadata.len());
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    let bytes = std::fs::read(path)?;
    String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("it is no UTF-8 text: {error}")))
}

/// Where a document stands in a file, as `FILE:LINE:COLUMN`; the file alone where it cannot be found in it any more.
pub(crate) fn place_of(path: &Path, key: &ResourceKey) -> String {
    place_in(path, key, &FieldPath::root())
}

/// Where a field of a document stands in a file.
pub(crate) fn place_in(path: &Path, key: &ResourceKey, at: &FieldPath) -> String {
    let text = read_at_most(path, FILE_BYTES_MAX).unwrap_or_default();
    let position = yaml::read(&text).into_iter().find_map(|document| match document {
        Ok(document) => (document.resource.key() == *key).then(|| document.position(at)),
        Err(fault) => (fault.key.as_ref() == Some(key)).then_some(fault.at),
    });
    position.map_or_else(|| path.display().to_string(), |position| format!("{}:{position}", path.display()))
}

/// The files of documents in a folder, or the file itself, by name.
pub(crate) fn document_files(folder: &Path) -> io::Result<BTreeSet<PathBuf>> {
    files(folder, &["yaml", "yml", "json"])
}

fn files(root: &Path, endings: &[&str]) -> io::Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    if std::fs::metadata(root)?.is_file() {
        found.insert(root.to_owned());
        return Ok(found);
    }
    let mut folders = vec![(root.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            // A folder inside may go while it is looked at; the one that was asked for must be there.
            Err(error) if depth == 0 => return Err(error),
            Err(_) => continue,
        };
        for entry in entries {
            let path = entry?.path();
            let is_named =
                || path.extension().is_some_and(|ending| endings.iter().any(|known| ending.eq_ignore_ascii_case(known)));
            match std::fs::metadata(&path) {
                _any if is_hidden(&path) => {}
                Ok(metadata) if metadata.is_dir() && depth < DEPTH_MAX => folders.push((path, depth + 1)),
                Ok(metadata) if metadata.is_file() && is_named() => {
                    found.insert(path);
                }
                // A link that leads nowhere; who reads it says so.
                Err(_) if is_named() && is_there(&path) => {
                    found.insert(path);
                }
                Ok(_) | Err(_) => {}
            }
        }
    }
    Ok(found)
}

/// Does something stand there, whether it can be read or not? Only what is known to be gone is gone.
fn is_there(path: &Path) -> bool {
    match std::fs::symlink_metadata(path) {
        Ok(_) => true,
        Err(error) => !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory),
    }
}

/// Hidden files are editors' and ours, half written ones among them.
fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// What kind of folder it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Documents,
    Applied,
    Pods,
}

/// One folder, as it was seen last.
#[derive(Debug)]
struct Folder {
    kind: Kind,
    path: PathBuf,
    files: BTreeMap<PathBuf, Seen>,
    trouble: Option<Told>,
    /// Does the system tell of its changes?
    subscribed: bool,
    /// Where last good forms are remembered.
    kept: PathBuf,
    /// What an earlier process remembered of its files, until the first look.
    earlier: BTreeMap<PathBuf, Kept>,
}

/// One file, as it was seen last.
#[derive(Debug, Default)]
struct Seen {
    /// None: it could not be read, or it names other files, which may have changed.
    text: Option<String>,
    forms: BTreeMap<ResourceKey, Form>,
    /// When its documents came.
    since: Since,
    told: Vec<Told>,
}

/// All folders.
#[derive(Debug)]
struct Folders {
    all: Vec<Folder>,
    /// How many documents came so far, in all lives.
    came: u64,
    /// Was everything looked at once?
    looked: bool,
}

impl Folders {
    fn new(watched: Watched) -> Self {
        let mut earlier = kept::read(&watched.kept);
        let came = earlier.values().flat_map(|kept| kept.since.values()).max().copied().unwrap_or_default();
        let mut folder = |kind, path: PathBuf| {
            let own = |file: &PathBuf| kind == Kind::Documents && file.starts_with(&path);
            let earlier = earlier.extract_if(.., |file, _| own(file)).collect();
            let (files, kept) = (BTreeMap::new(), watched.kept.clone());
            Folder { kind, path, files, trouble: None, subscribed: false, kept, earlier }
        };
        let mut all = vec![folder(Kind::Applied, watched.applied)];
        all.extend(watched.folders.into_iter().map(|path| folder(Kind::Documents, path)));
        all.push(folder(Kind::Pods, watched.pods));
        Self { all, came, looked: false }
    }

    /// Asks for notices of folders of which there are none yet.
    fn subscribe(&mut self, watcher: &mut RecommendedWatcher) {
        for folder in &mut self.all {
            if !folder.path.exists() {
                folder.subscribed = false;
            } else if !folder.subscribed {
                folder.subscribed = watcher.watch(&folder.path, RecursiveMode::Recursive).is_ok();
            }
        }
    }

    /// Looks at what is asked for. None: nothing is different.
    fn look(&mut self, look: Look) -> Option<Batch> {
        let before = self.told();
        let mut changes = Vec::new();
        for folder in self.all.iter_mut().filter(|folder| look == Look::Everything || folder.kind == Kind::Pods) {
            folder.look(&mut changes, &mut self.came);
        }
        if look == Look::Everything && !std::mem::replace(&mut self.looked, true) {
            // What was there first in an earlier life is there first in this one.
            changes.sort_by_key(|change| self.since(change));
        }
        let problems = self.told();
        (!changes.is_empty() || problems != before).then(|| Batch { changes, problems, ..Batch::default() })
    }

    /// When a document of a file that people keep came; others have no such order.
    fn since(&self, change: &Change) -> u64 {
        let (Change::Put { key, origin: Origin::File(path), .. } | Change::Remove { key, origin: Origin::File(path) }) = change
        else {
            return 0;
        };
        self.all.iter().find_map(|folder| folder.files.get(path)?.since.get(key).copied()).unwrap_or_default()
    }

    fn told(&self) -> Vec<Told> {
        let all = self.all.iter();
        all.flat_map(|folder| folder.trouble.iter().chain(folder.files.values().flat_map(|seen| &seen.told))).cloned().collect()
    }
}

impl Folder {
    fn look(&mut self, changes: &mut Vec<Change>, came: &mut u64) {
        let endings: &[&str] = if self.kind == Kind::Pods { &["json"] } else { &["yaml", "yml", "json"] };
        let found = match files(&self.path, endings) {
            Ok(mut found) => {
                // What took the place of a file takes none of its documents.
                let known = self.files.keys().chain(self.earlier.keys());
                found.extend(known.filter(|path| is_there(path)).cloned());
                found
            }
            // Folders of ours are made when they are first needed.
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.kind != Kind::Documents && self.files.is_empty() => {
                return;
            }
            Err(error) => {
                // Gone since before this process: as if it had been seen.
                for (path, Kept { forms, since }) in std::mem::take(&mut self.earlier) {
                    let origin = self.origin(&path);
                    changes.extend(put(&forms, &origin));
                    self.files.insert(path, Seen { forms, since, ..Seen::default() });
                }
                let remedy = if self.files.is_empty() { "make it" } else { "bring it back; its documents stay in force" };
                self.trouble = Some(trouble(&self.path, format!("the folder cannot be read: {error}"), remedy));
                return;
            }
        };
        self.trouble = None;
        let gone: Vec<PathBuf> = self.files.keys().filter(|path| !found.contains(*path)).cloned().collect();
        let mut earlier = std::mem::take(&mut self.earlier);
        for path in earlier.keys().filter(|path| !found.contains(*path)) {
            self.keep(path, &Forms::new(), &Since::new());
        }
        for path in gone {
            let seen = self.files.remove(&path).unwrap_or_default();
            self.keep(&path, &Forms::new(), &Since::new());
            let origin = self.origin(&path);
            changes.extend(seen.forms.into_keys().map(|key| Change::Remove { key, origin: origin.clone() }));
        }
        for path in found {
            let mut seen = self.files.remove(&path).unwrap_or_default();
            let Kept { forms: earlier, since } = earlier.remove(&path).unwrap_or_default();
            seen.since.extend(since);
            let bytes_max = if self.kind == Kind::Pods { KEYS_BYTES_MAX } else { FILE_BYTES_MAX };
            match read_at_most(&path, bytes_max) {
                Err(error) => {
                    seen.told =
                        vec![trouble(&path, format!("the file cannot be read: {error}"), "make it readable, or remove it")];
                    seen.text = None;
                    changes.extend(put(&earlier, &self.origin(&path)));
                    seen.forms.extend(earlier);
                }
                Ok(text) if seen.text.as_ref() == Some(&text) => {}
                Ok(text) => {
                    let before = if earlier.is_empty() { &seen.forms } else { &earlier };
                    let (forms, told) = self.read(&path, &text, before);
                    let mut when = |key: &ResourceKey| {
                        seen.since.get(key).copied().unwrap_or_else(|| {
                            *came = came.saturating_add(1);
                            *came
                        })
                    };
                    let since: Since = forms.keys().map(|key| (key.clone(), when(key))).collect();
                    if forms != *before || since != seen.since {
                        self.keep(&path, &forms, &since);
                    }
                    let origin = self.origin(&path);
                    for key in seen.forms.keys().filter(|key| !forms.contains_key(key)) {
                        info!(path = %path.display(), %key, "the file no longer holds this document, which ends it");
                        changes.push(Change::Remove { key: key.clone(), origin: origin.clone() });
                    }
                    for (key, form) in forms.iter().filter(|(key, form)| seen.forms.get(key) != Some(form)) {
                        changes.push(Change::Put { key: key.clone(), form: form.clone(), origin: origin.clone() });
                    }
                    let again = text.contains("jwksFile");
                    seen = Seen { text: (!again).then_some(text), forms, since, told };
                }
            }
            self.files.insert(path, seen);
        }
    }

    /// What the file says now, and what it said where it says nothing good any more.
    fn read(&self, path: &Path, text: &str, before: &BTreeMap<ResourceKey, Form>) -> (BTreeMap<ResourceKey, Form>, Vec<Told>) {
        if self.kind == Kind::Pods {
            return match PodRecord::parse(text.as_bytes()) {
                Ok(record) => {
                    let workload = Resource::Workload(Object::of_pod(&record));
                    (BTreeMap::from([(workload.key(), Form::Read(workload.into()))]), Vec::new())
                }
                Err(error) => (before.clone(), vec![trouble(path, error.to_string(), "start the pod anew")]),
            };
        }
        let keys = |name: &str| match self.kind {
            // A stored document is not where it was written.
            Kind::Applied => Err("a stored document has no files beside it; write jwks".to_owned()),
            Kind::Documents | Kind::Pods => read_keys(path, name),
        };
        let mut forms = BTreeMap::new();
        let mut all_told = Vec::new();
        let mut nameless = false;
        let found = documents(path, text, &keys);
        if found.is_empty() && !before.is_empty() {
            // What a writer leaves that has truncated and not yet written, or had no room to.
            let remedy = "write them again, or remove the file to take them away; they stay in force";
            return (before.clone(), vec![trouble(path, "the file holds no document, and held some before".to_owned(), remedy)]);
        }
        for Found { key, form, good, document: _, told } in found {
            // Warnings about what is in force are told by who sees all of it.
            all_told.extend(told.into_iter().filter(|told| !good || told.problem.resource.is_empty()));
            nameless |= key.is_none() && !good;
            let Some(key) = key else { continue };
            let form = if good { form } else { before.get(&key).filter(|form| is_good(form)).cloned().or(form) };
            if let Some(form) = form {
                forms.insert(key, form);
            }
        }
        if nameless {
            // One of those that are missing may be the one that cannot be read.
            for (key, form) in before {
                forms.entry(key.clone()).or_insert_with(|| form.clone());
            }
        }
        (forms, all_told)
    }

    /// Remembers what is good of a file's documents.
    fn keep(&self, path: &Path, forms: &Forms, since: &Since) {
        if self.kind != Kind::Documents {
            return;
        }
        let good = forms.iter().filter(|(_, form)| is_good(form)).map(|(key, form)| (key.clone(), form.clone())).collect();
        if let Err(error) = kept::write(&self.kept, path, &good, since) {
            warn!(%error, path = %path.display(), "last good documents cannot be remembered");
        }
    }

    fn origin(&self, path: &Path) -> Origin {
        let path = path.to_owned();
        match self.kind {
            Kind::Documents => Origin::File(path),
            Kind::Applied => Origin::Applied(path),
            Kind::Pods => Origin::Pod(path),
        }
    }
}

fn put(forms: &Forms, origin: &Origin) -> impl Iterator<Item = Change> {
    forms.iter().map(|(key, form)| Change::Put { key: key.clone(), form: form.clone(), origin: origin.clone() })
}

/// Was this form good when it was taken?
fn is_good(form: &Form) -> bool {
    match form {
        Form::Read(resource) => !crate::snapshot::compile::alone(&resource.key(), resource).refused(),
        Form::Unreadable { .. } => false,
    }
}

fn trouble(path: &Path, text: String, remedy: &str) -> Told {
    let problem = Problem {
        resource: String::new(),
        at: FieldPath::root(),
        text,
        remedy: remedy.to_owned(),
        severity: Severity::Refuses,
        condition: None,
    };
    Told { path: path.to_owned(), position: None, problem }
}
