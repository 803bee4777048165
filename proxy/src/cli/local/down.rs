//! `outrigger down`: stops the local mesh and removes everything that it made. Each step stands alone and may find
//! nothing, so that it cleans up after any crash, and twice.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use rustix::process::Signal;

use super::super::{Failure, print};
use super::places::{self, PodPlaces, RUNTIME, UpRecord, runtime};
use super::pod::cannot;
use super::run::cgroup_root;
use super::visit::{signal, wait_until};
use super::{DownArgs, cgroup, links, pod, up, watched};
use crate::base::state;
use crate::model::address_book::{AddressBook, Range};
use crate::node::kernel::{Kernel, unmount_bpffs};

pub(crate) fn down(args: DownArgs) -> Result<ExitCode, Failure> {
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::environment("only root may remove what the mesh made", "run it as root, for example with sudo"));
    }
    let record = places::read_up_record();
    let cgroup_root = cgroup_root()?;
    let known = record.as_ref().map(|record| record.state.clone()).or_else(|| up::state_of_pods(&cgroup_root));
    is_meant(args.state.as_deref(), known.as_deref())?;
    let state = args.state.or(known).unwrap_or_else(|| places::STATE.into());
    // The pods first: a pod that outlived its capture would be open.
    let pods = stop_pods(&state, &cgroup_root);
    let mesh = stop_mesh(record.as_ref());
    let pins = places::pins();
    let kernel = Kernel::remove_all(&pins)
        .and_then(|()| unmount_bpffs(&pins))
        .map_err(|error| Failure::environment(crate::node::chain(&error), error.remedy()));
    let cgroups = cgroup::remove(&cgroup_root.join("outrigger")).map_err(|error| cannot("remove the cgroups", &error));
    let bridge = links::remove_bridge();
    let files = remove_files(&state).map_err(|error| cannot("remove files", &error));
    pods.and(mesh).and(kernel).and(cgroups).and(bridge).and(files)?;
    print("outrigger is down\n")?;
    Ok(ExitCode::SUCCESS)
}

/// Whoever names a state means the mesh that has it, not whichever one is up or has left its pods.
fn is_meant(named: Option<&Path>, known: Option<&Path>) -> Result<(), Failure> {
    let (Some(named), Some(state)) = (named, known) else { return Ok(()) };
    let whole = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_missing| path.to_owned());
    if whole(named) == whole(state) {
        return Ok(());
    }
    Err(Failure::invalid([format!(
        "the mesh of this machine has its state in {}, not in {}; name that folder, or none",
        state.display(),
        named.display()
    )]))
}

fn stop_pods(state: &Path, cgroup_root: &Path) -> Result<(), Failure> {
    let pods = every_pod(state, cgroup_root);
    for places in &pods {
        if places.is_alive().unwrap_or(false)
            && let Ok(Some(record)) = places.read_record()
        {
            signal(record.supervisor.cast_signed(), Signal::TERM);
        }
    }
    let gone = || Ok(pods.iter().all(|places| !places.is_alive().unwrap_or(false)));
    if !wait_until(POD_GRACE, gone)? {
        // The programs that did not end by themselves; their supervisors see it and clean up.
        for places in &pods {
            cgroup::kill(&places.cgroup(cgroup_root)).map_err(|error| cannot("end a pod", &error))?;
        }
        if !wait_until(POD_KILL, gone)? {
            for places in pods.iter().filter(|places| places.is_alive().unwrap_or(false)) {
                if let Ok(Some(record)) = places.read_record() {
                    signal(record.supervisor.cast_signed(), Signal::KILL);
                }
            }
            wait_until(POD_KILL, gone)?;
        }
    }
    let mut outcome = Ok(());
    for places in &pods {
        outcome = outcome.and(pod::remove(places, state, cgroup_root));
    }
    outcome
}

/// Every pod that anything tells of: a record, a folder, a cgroup.
fn every_pod(state: &Path, cgroup_root: &Path) -> Vec<PodPlaces> {
    let mut pods = up::pods_of(state);
    let folders = std::fs::read_dir(runtime("pods")).into_iter().flatten().flatten().map(|entry| entry.path());
    for folder in folders.chain(cgroup::children(&cgroup_root.join("outrigger/pods"))) {
        let stem = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(places) = PodPlaces::of_stem(state, &stem)
            && pods.iter().all(|known| known.pod != places.pod)
        {
            pods.push(places);
        }
    }
    pods
}

fn stop_mesh(record: Option<&UpRecord>) -> Result<(), Failure> {
    let free = || Ok(places::take_mesh_lock().map_err(|error| cannot("look at the mesh's lock", &error))?.is_some());
    if !free()? {
        let supervisor = places::mesh_lock_holder();
        signal(supervisor, Signal::TERM);
        if !wait_until(MESH_GRACE, free)? {
            signal(supervisor, Signal::KILL);
            wait_until(MESH_KILL, free)?;
        }
    }
    // Children of a supervisor that was killed end by themselves; one that hangs is ended here, if it is still the one.
    for (process, role) in record.into_iter().flat_map(|record| [(record.control, "control"), (record.node, "node")]) {
        let ours = || {
            let line = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).nth(1) == Some(role.as_bytes())
        };
        if process != 0 && ours() && !wait_until(MESH_KILL, || Ok(!ours()))? {
            signal(process.cast_signed(), Signal::KILL);
            wait_until(MESH_KILL, || Ok(!ours()))?;
        }
    }
    Ok(())
}

/// What does not outlive the mesh. Authority, documents, join token and logs stay.
fn remove_files(state: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        // One whose pod nothing tells of any more.
        if name.starts_with("outrigger-") && links::remove_pod(&name).is_err() {
            return Err(io::Error::other(format!("the network namespace {name} cannot be removed")));
        }
    }
    let book = state.join("addresses.json");
    if book.exists() {
        state::update(&book, 0o600, |book: &mut AddressBook| book.pods = Range { last: book.pods.last, ..Range::default() })?;
    }
    for path in [state.join("names.json"), state.join(watched::FILE), state.join("sidecars"), PathBuf::from(RUNTIME)] {
        let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _gone => {}
        }
    }
    Ok(())
}

const POD_GRACE: Duration = Duration::from_secs(3);
const POD_KILL: Duration = Duration::from_secs(5);
const MESH_GRACE: Duration = Duration::from_secs(15);
const MESH_KILL: Duration = Duration::from_secs(2);
