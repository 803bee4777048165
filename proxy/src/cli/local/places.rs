//! Where the local mesh keeps what it makes, and which of it stands now.
//!
//! Whether something lives is told by a lock that its owner holds until it ends, however it ends: a process number in a
//! file may be somebody else's by now.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::super::Failure;
use super::restarts::Restarted;
use crate::base::names::{Named, check_host, check_part};
use crate::base::state;
use crate::model::pod_record::{NAMESPACES, PodRecord};

/// What `outrigger up` wrote when it was ready, and writes whenever a process of its own ends or is started anew:
/// `/run/outrigger/up.json`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct UpRecord {
    pub(crate) supervisor: u32,
    pub(crate) control: u32,
    pub(crate) node: u32,
    pub(crate) state: PathBuf,
    pub(crate) trust_domain: String,
    /// The stream, as sidecars reach it.
    pub(crate) stream: SocketAddr,
    pub(crate) api: String,
    pub(crate) dashboard: String,
    /// What was started anew since, by its role: `control`, `node`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) restarted: BTreeMap<String, Restarted>,
}

/// Where the mesh keeps its state unless told otherwise.
pub(crate) const STATE: &str = "/var/lib/outrigger";
/// The folder for what does not outlive a boot.
pub(crate) const RUNTIME: &str = "/run/outrigger";
/// The bridge that joins the pods.
pub(crate) const BRIDGE: &str = "outrigger0";
pub(crate) const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(10, 64, 0, 1);
pub(crate) const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd64, 0, 0, 0, 0, 0, 0, 1);
/// Both.
pub(crate) const GATEWAYS: [IpAddr; 2] = [IpAddr::V4(GATEWAY_V4), IpAddr::V6(GATEWAY_V6)];
/// The users and groups of sidecars: one for each address that a pod can have, so that no two sidecars share one.
/// Distributions give these numbers to nobody.
pub(crate) const SIDECAR_IDS: RangeInclusive<u32> = 1_900_000_000..=1_900_065_535;

/// The runtime folder, or a file in it.
pub(crate) fn runtime(name: &str) -> PathBuf {
    Path::new(RUNTIME).join(name)
}

/// The user and group of the sidecar of the pod at `addresses`: told by what its IPv4 address has of its own in the pods'
/// range, so that a sidecar that is started again is the same user.
pub(crate) fn sidecar_id(addresses: &[IpAddr]) -> Option<u32> {
    addresses.iter().find_map(|address| match address {
        IpAddr::V4(address) => {
            let [_, _, high, low] = address.octets();
            Some(SIDECAR_IDS.start() + u32::from(u16::from_be_bytes([high, low])))
        }
        IpAddr::V6(_) => None,
    })
}

/// Where the kernel programs are pinned.
pub(crate) fn pins() -> PathBuf {
    runtime("bpf")
}

/// Where sidecars enrol.
pub(crate) fn node_socket() -> PathBuf {
    runtime("node.sock")
}

/// What belongs to one local pod.
#[derive(Clone, Debug)]
pub(crate) struct PodPlaces {
    pub(crate) pod: Named,
    stem: String,
    state: PathBuf,
}

impl PodPlaces {
    /// # Errors
    /// The namespace or the name is none.
    pub(crate) fn new(state: &Path, namespace: &str, name: &str) -> Result<Self, Failure> {
        // The file name of a record has the namespace up to the first dot.
        check_part(namespace).and_then(|()| check_host(name)).map_err(|error| Failure::invalid([error]))?;
        Ok(Self::of(state, &Named::new(namespace, name)))
    }

    /// The places of a pod whose name is known to be good.
    pub(crate) fn of(state: &Path, pod: &Named) -> Self {
        Self { pod: pod.clone(), stem: PodRecord::file_stem(pod), state: state.to_owned() }
    }

    /// The places of the pod whose files bear `stem`, if that can be a pod's.
    pub(crate) fn of_stem(state: &Path, stem: &str) -> Option<Self> {
        let (namespace, name) = stem.split_once('.')?;
        Self::new(state, namespace, name).ok()
    }

    /// The mesh's state folder.
    pub(crate) fn state(&self) -> &Path {
        &self.state
    }

    /// Its record.
    pub(crate) fn record(&self) -> PathBuf {
        self.state.join("pods").join(format!("{}.json", self.stem))
    }

    /// Its network namespace's name for ip(8), and its file. No namespace of pods holds a dot, so no two pods share one;
    /// at most 137 bytes, of the 255 that a file's name may have.
    pub(crate) fn netns(&self) -> (String, PathBuf) {
        let (folder, prefix) = NAMESPACES;
        let name = format!("{prefix}{}", self.stem);
        let path = Path::new(folder).join(&name);
        (name, path)
    }

    /// Its cgroup, below `root`, the cgroup2 mount.
    pub(crate) fn cgroup(&self, root: &Path) -> PathBuf {
        root.join(super::cgroup::PODS).join(&self.stem)
    }

    /// Its folder below the runtime folder: lock, resolv.conf, hosts.
    pub(crate) fn runtime(&self) -> PathBuf {
        runtime("pods").join(&self.stem)
    }

    /// Tells which state it belongs to, where that is not known otherwise.
    pub(crate) fn state_note(&self) -> PathBuf {
        self.runtime().join("state")
    }

    /// Held by the pod's supervisor for as long as it lives.
    pub(crate) fn lock(&self) -> PathBuf {
        self.runtime().join("lock")
    }

    /// Made when its program starts, after its sidecar is ready.
    pub(crate) fn started(&self) -> PathBuf {
        self.runtime().join("started")
    }

    /// Where its sidecar keeps the last good configuration.
    pub(crate) fn sidecar_state(&self) -> PathBuf {
        self.state.join("sidecars").join(&self.stem)
    }

    /// A log of it; `kind` is empty for the program's own.
    pub(crate) fn log(&self, kind: &str) -> PathBuf {
        self.state.join("log").join(format!("{}{kind}.log", self.stem))
    }

    /// Its key in the address book.
    pub(crate) fn owner(&self) -> String {
        self.pod.to_string()
    }

    /// Does a supervisor hold it?
    ///
    /// # Errors
    /// The lock cannot be looked at.
    pub(crate) fn is_alive(&self) -> io::Result<bool> {
        if self.lock().exists() { Ok(state::try_lock(&self.lock())?.is_none()) } else { Ok(false) }
    }

    /// Its record, if it has one.
    ///
    /// # Errors
    /// The record cannot be read.
    pub(crate) fn read_record(&self) -> io::Result<Option<PodRecord>> {
        match std::fs::read(self.record()) {
            Ok(bytes) => PodRecord::parse(&bytes).map(Some).map_err(io::Error::other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The mesh that is up.
///
/// # Errors
/// None is.
pub(crate) fn mesh() -> Result<UpRecord, Failure> {
    let none = || Failure::environment("no mesh is up on this machine", "start it with `outrigger up`");
    if take_mesh_lock().map_err(|error| reading(&up_lock(), &error))?.is_some() {
        return Err(none());
    }
    let path = runtime("up.json");
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| reading(&path, &error.into())),
        // The lock is held and the record is missing: the mesh is about to be up, or about to be gone.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(Failure::environment("the mesh is not ready", "wait until `outrigger up` says that it is"))
        }
        Err(error) => Err(reading(&path, &error)),
    }
}

/// What the mesh that is up wrote, or the last one that was killed.
pub(crate) fn read_up_record() -> Option<UpRecord> {
    serde_json::from_slice(&std::fs::read(runtime("up.json")).ok()?).ok()
}

/// Is a mesh up? Asking leaves nothing behind.
///
/// # Errors
/// The lock cannot be looked at.
pub(crate) fn is_up() -> io::Result<bool> {
    if up_lock().exists() { Ok(take_mesh_lock()?.is_none()) } else { Ok(false) }
}

/// The mesh that is up and serves its API at `api`.
pub(crate) fn supervised(api: SocketAddr) -> Option<UpRecord> {
    let record = read_up_record().filter(|record| record.api == format!("http://{api}"))?;
    let alive = match take_mesh_lock() {
        Ok(free) => free.is_none(),
        // The lock is root's; others see the process.
        Err(_not_ours) => Path::new("/proc").join(record.supervisor.to_string()).exists(),
    };
    alive.then_some(record)
}

/// Where the mesh keeps its state: the one that is up, or was last.
pub(crate) fn known_state() -> PathBuf {
    read_up_record().map_or_else(|| STATE.into(), |record| record.state)
}

/// The process that holds the lock of the mesh, while it is held.
pub(crate) fn mesh_lock_holder() -> i32 {
    std::fs::read_to_string(up_lock()).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// The lock that `outrigger up` holds; `None` while it does.
///
/// # Errors
/// The lock cannot be looked at.
pub(crate) fn take_mesh_lock() -> io::Result<Option<File>> {
    match state::try_lock(&up_lock()) {
        // Nobody ever was up here.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            folder(Path::new(RUNTIME), 0o755)?;
            state::try_lock(&up_lock())
        }
        taken => taken,
    }
}

fn up_lock() -> PathBuf {
    runtime("up.lock")
}

/// Makes a folder and those above it; an existing one stays as it is.
///
/// # Errors
/// It cannot be made.
pub(crate) fn folder(path: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(path)
}

fn reading(path: &Path, error: &io::Error) -> Failure {
    Failure::environment(format!("cannot read {}: {error}", path.display()), "run as root")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_places_bear_its_name() {
        let places = PodPlaces::new(Path::new("/var/lib/outrigger"), "shop", "web-1").unwrap();
        assert_eq!(places.record(), Path::new("/var/lib/outrigger/pods/shop.web-1.json"));
        assert_eq!(places.netns().1, Path::new("/run/netns/outrigger-shop.web-1"));
        assert_eq!(places.cgroup(Path::new("/sys/fs/cgroup")), Path::new("/sys/fs/cgroup/outrigger/pods/shop.web-1"));
        assert_eq!(places.log(".sidecar"), Path::new("/var/lib/outrigger/log/shop.web-1.sidecar.log"));
    }

    #[test]
    fn no_two_pods_share_a_place() {
        let at = |namespace: &str, name: &str| PodPlaces::new(Path::new("/var/lib/outrigger"), namespace, name).unwrap();
        let (one, other) = (at("shop-x", "web"), at("shop", "x-web"));
        assert_ne!(one.netns(), other.netns());
        assert_ne!(one.record(), other.record());
        assert_ne!(one.runtime(), other.runtime());
        let longest = at(&"n".repeat(63), &"p".repeat(63));
        assert!(longest.netns().0.len() <= 255);
    }

    #[test]
    fn every_pod_address_has_a_sidecar_user_of_its_own() {
        let id = |text: &str| sidecar_id(&[text.parse().unwrap()]);
        assert_eq!(id("10.64.0.2"), Some(1_900_000_002));
        assert_eq!(id("10.64.1.2"), Some(1_900_000_258));
        assert_eq!(id("10.64.255.255"), Some(*SIDECAR_IDS.end()));
        assert_eq!(sidecar_id(&["fd64::2".parse().unwrap(), "10.64.0.7".parse().unwrap()]), Some(1_900_000_007));
        assert_eq!(id("fd64::2"), None);
    }

    #[test]
    fn a_name_that_could_leave_its_folder_is_refused() {
        for (namespace, name) in [("..", "web"), ("shop", "../web"), ("a.b", "web"), ("shop", ""), ("Shop", "web")] {
            assert!(PodPlaces::new(Path::new("/x"), namespace, name).is_err(), "{namespace} {name}");
        }
    }
}
