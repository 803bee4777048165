//! The volumes of this node's pods: each a folder with a pair of sockets of its own, so that it is known from the kubelet
//! which pod is behind a socket.
//!
//! What was made is written down in the agent's state, so that the next agent binds the sockets anew in the same folders: a
//! sidecar has its folder mounted, and finds the new socket there. Every step may be repeated.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::beginning::Unclosed;
use super::folder::Folder;
use super::volume::{Owner, Place, Wrong, is_plain};
use crate::base::state;

/// What answers at a pod's sockets.
#[tonic::async_trait]
pub(super) trait Behind: Send + Sync + 'static {
    /// Returns when nothing gets into the pod or out of it, until it is captured. Idempotent.
    async fn close(&self, owner: &Owner) -> Result<(), Unclosed>;

    /// Serves both until the tasks are dropped. Inside a runtime.
    fn serve(&self, owner: Arc<Owner>, sockets: Sockets) -> JoinSet<()>;

    /// The pod's volume is gone, and with it its containers.
    fn gone(&self, owner: &Owner);
}

/// The sockets of one pod.
#[derive(Debug)]
pub(super) struct Sockets {
    pub(super) enrolment: UnixListener,
    pub(super) workload_api: UnixListener,
}

/// All of them.
pub(super) struct Volumes {
    /// The kubelet's folder of pods.
    pods: PathBuf,
    /// Where it is written down which there are.
    written: PathBuf,
    behind: Box<dyn Behind>,
    /// Held for some calls of the file system, never across a wait.
    open: Mutex<BTreeMap<String, Volume>>,
}

struct Volume {
    record: Record,
    _served: JoinSet<()>,
}

/// As it is written down.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Record {
    owner: Owner,
    place: Place,
}

/// Why a volume was not made or removed.
#[derive(Debug, thiserror::Error)]
pub(super) enum VolumeError {
    /// The pod's author or the caller.
    #[error(transparent)]
    Wrong(#[from] Wrong),
    /// The environment.
    #[error("cannot {what}")]
    Failed {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    /// The environment.
    #[error("the pod is not started, for it cannot be closed until its sidecar is enrolled")]
    Unclosed(#[source] Unclosed),
}

impl Volumes {
    /// Those that a former agent made are served again; what of them is gone is forgotten. Inside a runtime.
    ///
    /// # Errors
    /// The folder in which they are written down cannot be used.
    pub(super) fn restore(pods: PathBuf, written: PathBuf, behind: impl Behind) -> io::Result<Self> {
        std::fs::create_dir_all(&written)?;
        let volumes = Self { pods, written, behind: Box::new(behind), open: Mutex::default() };
        for entry in std::fs::read_dir(&volumes.written)? {
            let path = entry?.path();
            let Some(id) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".json")).filter(|id| is_plain(id))
            else {
                continue;
            };
            let read = std::fs::read(&path).and_then(|bytes| Ok(serde_json::from_slice::<Record>(&bytes)?));
            let record = match read {
                Ok(record) => record,
                Err(error) => {
                    warn!(volume = id, %error, "what was written down of a volume cannot be read; its pod is served when the kubelet asks again");
                    continue;
                }
            };
            if let Err(error) = volumes.resume(id, record) {
                warn!(volume = id, error = super::super::chain(&error), "a pod's sockets cannot be bound again");
            }
        }
        Ok(volumes)
    }

    /// Makes a volume, and closes its pod. One that is there already stays. Cancel-safe: who asks again finds what was done.
    pub(super) async fn publish(
        &self,
        id: &str,
        target: &str,
        readonly: bool,
        context: &HashMap<String, String>,
    ) -> Result<(), VolumeError> {
        // Who opens pods finds it here before it is closed.
        let owner = self.make(id, target, readonly, context)?;
        self.behind.close(&owner).await.map_err(VolumeError::Unclosed)
    }

    fn make(&self, id: &str, target: &str, readonly: bool, context: &HashMap<String, String>) -> Result<Owner, VolumeError> {
        if !is_plain(id) {
            return Err(Wrong::Id(id.to_owned()).into());
        }
        let record = Record { owner: Owner::of(context)?, place: Place::of(target, &self.pods)? };
        if record.owner.uid != record.place.uid {
            return Err(Wrong::AnotherPod { place: record.place.uid, owner: record.owner.uid }.into());
        }
        if !readonly {
            return Err(Wrong::Writable.into());
        }
        let mut open = self.open.lock();
        if let Some(known) = open.get(id) {
            if known.record != record {
                return Err(Wrong::Taken(id.to_owned()).into());
            }
            if Folder::is_whole(&self.pods, &record.place) {
                return Ok(record.owner);
            }
        }
        let text = serde_json::to_vec(&record).map_err(|error| failed("write a volume down")(error.into()))?;
        state::write_atomic(&self.file(id), &text, 0o600).map_err(failed("write a volume down"))?;
        let folder = Folder::make(&self.pods, &record.place).map_err(failed("make the volume's folder"))?;
        let volume = self.serve(&folder, record)?;
        let owner = volume.record.owner.clone();
        info!(pod = %owner.named(), uid = owner.uid, volume = id, "a pod has its sockets");
        open.insert(id.to_owned(), volume);
        Ok(owner)
    }

    /// Removes a volume. One that is not there was removed before.
    pub(super) fn unpublish(&self, id: &str, target: &str) -> Result<(), VolumeError> {
        if !is_plain(id) {
            return Err(Wrong::Id(id.to_owned()).into());
        }
        let place = Place::of(target, &self.pods)?;
        let mut open = self.open.lock();
        if open.get(id).is_some_and(|known| known.record.place != place) {
            return Err(Wrong::Taken(id.to_owned()).into());
        }
        Folder::remove(&self.pods, &place).map_err(failed("remove the volume's folder"))?;
        remove_file(&self.file(id)).map_err(failed("forget a volume"))?;
        if let Some(volume) = open.get(id) {
            info!(pod = %volume.record.owner.named(), volume = id, "a pod's sockets are removed");
            // Before it is none of these any more: whoever opens pods finds it in one place or the other.
            self.behind.gone(&volume.record.owner);
        }
        open.remove(id);
        Ok(())
    }

    /// The pods of all that are there.
    pub(super) fn owners(&self) -> Vec<Owner> {
        self.open.lock().values().map(|volume| volume.record.owner.clone()).collect()
    }

    /// Serves what a former agent made.
    fn resume(&self, id: &str, record: Record) -> Result<(), VolumeError> {
        match Folder::open(&self.pods, &record.place) {
            Ok(folder) => {
                let volume = self.serve(&folder, record)?;
                self.open.lock().insert(id.to_owned(), volume);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                remove_file(&self.file(id)).map_err(failed("forget a volume"))?;
                self.behind.gone(&record.owner);
            }
            Err(error) => return Err(failed("open the volume's folder")(error)),
        }
        Ok(())
    }

    fn serve(&self, folder: &Folder, record: Record) -> Result<Volume, VolumeError> {
        let bind = |name| folder.bind(name).map_err(failed("bind a pod's socket"));
        let sockets = Sockets { enrolment: bind(super::folder::ENROLMENT)?, workload_api: bind(super::folder::WORKLOAD_API)? };
        let served = self.behind.serve(Arc::new(record.owner.clone()), sockets);
        Ok(Volume { record, _served: served })
    }

    fn file(&self, id: &str) -> PathBuf {
        self.written.join(format!("{id}.json"))
    }
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> VolumeError {
    move |source| VolumeError::Failed { what, source }
}

fn remove_file(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _gone => Ok(()),
    }
}
