//! Files that several processes share: a reader sees the old content or the new one, never half of it, and two writers
//! take turns.
//!
//! A write goes to a neighbour file that is renamed over the old one (POSIX rename is atomic). The turn is a lock on a
//! third file: the data file itself is replaced by each write, so a lock on it would be a lock on a file that is gone.
//!
//! What must be there after the machine lost its power is written by [`write_durable`]: a rename alone may reach the disk
//! before the bytes do, and leave an empty file. It waits for the disk twice, some milliseconds each.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Replaces `path` by `bytes`, at once, readable by `mode`. For what another write or another start makes good: the loss
/// of power may leave the old content, or none.
///
/// # Errors
/// The folder is missing, full or not writable.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    replace(path, bytes, mode, |_file| Ok(()))
}

/// Does what [`write_atomic`] does and waits until the disk holds it: when this returns, the loss of power leaves the new
/// content, before that the old one or the new one. For what nothing makes good: keys, what was applied, what was given away.
///
/// # Errors
/// The folder is missing, full or not writable, or the disk fails. The new content may be there all the same.
pub(crate) fn write_durable(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    write_synced(path, bytes, mode)?;
    sync_folder(path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

/// The first half of [`write_durable`]: the loss of power leaves the old content or the new one, never less. For many files
/// of one folder, [`sync_folder`] ends it once.
///
/// # Errors
/// The folder is missing, full or not writable, or the disk fails.
pub(crate) fn write_synced(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    replace(path, bytes, mode, File::sync_all)
}

/// Waits until the disk holds which files are in `folder`.
///
/// # Errors
/// It is missing, or the disk fails.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Changes the JSON file at `path` (absent: the default value) while nobody else does, and returns what `change` returns.
/// Synced, as [`write_synced`] does it: what is given away here ends with the machine, but the file must not be found empty.
/// Blocks while another process has its turn.
///
/// # Errors
/// The file cannot be read or written, or does not hold a `T`.
pub(crate) fn update<T: Default + DeserializeOwned + Serialize, R>(
    path: &Path,
    mode: u32,
    change: impl FnOnce(&mut T) -> R,
) -> io::Result<R> {
    let _turn = lock(&beside(path, "lock"))?;
    let mut value: T = match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => T::default(),
        Err(error) => return Err(error),
    };
    let answer = change(&mut value);
    write_synced(path, &serde_json::to_vec_pretty(&value)?, mode)?;
    Ok(answer)
}

/// Waits for the lock of `path`, which is made if it is missing. Dropping the file gives the lock back, as does the
/// end of the process.
///
/// # Errors
/// The file cannot be made or locked.
pub(crate) fn lock(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

/// Takes the lock of `path` if it is free; `None` while another process holds it.
///
/// # Errors
/// The file cannot be made or locked.
pub(crate) fn try_lock(path: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn replace(path: &Path, bytes: &[u8], mode: u32, settle: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    let fresh = beside(path, &format!("tmp{}", std::process::id()));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&fresh)?;
    let written = file.write_all(bytes).and_then(|()| settle(&file)).and_then(|()| std::fs::rename(&fresh, path));
    if written.is_err() {
        // The write's own error is the one to tell; a file that cannot be removed either is covered by it.
        drop(std::fs::remove_file(&fresh));
    }
    written
}

/// A hidden file next to `path`: watchers of the folder look for the names that they know.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{suffix}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn writers_take_turns_and_nothing_is_left_beside_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("numbers.json");
        let writers: Vec<_> = (0..8)
            .map(|_| {
                let path = path.clone();
                std::thread::spawn(move || update::<u32, _>(&path, 0o600, |n| *n += 1).unwrap())
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        assert_eq!(update::<u32, _>(&path, 0o600, |n| *n).unwrap(), 8);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let mut names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [".numbers.json.lock", "numbers.json"]);
    }

    #[test]
    fn a_durable_write_replaces_the_file_as_a_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        write_durable(&path, b"old", 0o600).unwrap();
        write_durable(&path, b"new", 0o600).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        // A disk that does not take the bytes: the old content stays in force, and nothing beside it.
        let failed = replace(&path, b"lost", 0o600, |_file| Err(io::ErrorKind::StorageFull.into()));
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(write_durable(&folder.path().join("missing/key"), b"", 0o600).is_err());
    }

    #[test]
    fn a_held_lock_is_seen_as_held() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = try_lock(&path).unwrap();
        assert!(held.is_some());
        assert!(try_lock(&path).unwrap().is_none());
        drop(held);
        assert!(try_lock(&path).unwrap().is_some());
    }
}
