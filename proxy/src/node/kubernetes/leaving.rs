//! What an agent takes along that ends on a node without a pod of the mesh: everything. The next one makes it anew.
//!
//! An agent does not know whether another one follows. Where pods are enrolled or closed, what captures and closes them has
//! to outlive it; where there are none, nothing is in force, and a node from which the mesh is uninstalled is as it was
//! before. Invariant: nothing is taken away while anything on the node says that a pod needs it.

use std::fs;
use std::io;
use std::path::Path;

use parking_lot::Mutex;
use tracing::{info, warn};

use super::Config;
use crate::model::marks::DRIVER;
use crate::node::capture::STANDING;
use crate::node::kernel::Kernel;
use crate::node::{Agent, chain};

/// Takes away pins, sockets and the state, unless the node has pods of the mesh. The agent's parts have ended.
pub(crate) fn leave(agent: &Agent, config: &Config, pins: &Path, state: &Path) {
    if let Some(reason) = needed(agent, state) {
        info!(reason, "what captures pods stays for the next agent");
        return;
    }
    // The kubelet first: whom it does not know, it does not call.
    let introduction = config.kubelet.join("plugins_registry").join(format!("{DRIVER}-reg.sock"));
    let socket = config.kubelet.join("plugins").join(DRIVER).join("csi.sock");
    let files = [introduction, socket, state.join(STANDING)];
    let mut failed: Vec<String> = files.iter().filter_map(|file| failed(file, fs::remove_file(file))).collect();
    if let Err(error) = Kernel::remove_all(pins) {
        failed.push(chain(&error));
    }
    let folders = [pins.to_owned(), state.join("volumes"), state.join("pods")];
    failed.extend(folders.iter().filter_map(|folder| self::failed(folder, fs::remove_dir(folder))));
    // Where it is mounted into the agent's container, it is not the agent's to remove.
    let of_driver = config.kubelet.join("plugins").join(DRIVER);
    let removed = fs::remove_dir(&of_driver);
    failed.extend(self::failed(&of_driver, removed.or_else(|error| if is_mounted(&error) { Ok(()) } else { Err(error) })));
    if failed.is_empty() {
        info!("no pod of the mesh is on this node: nothing of the agent stays on it");
    } else {
        warn!(failed = failed.join("; "), "no pod of the mesh is on this node, and not all of the agent's could be removed");
    }
}

/// Why what is there must stay.
fn needed(agent: &Agent, state: &Path) -> Option<&'static str> {
    let Some(kernel) = agent.capture.kernel().map(Mutex::lock) else { return Some("no programs capture") };
    let has_some = |name: &str| fs::read_dir(state.join(name)).map_or(true, |mut entries| entries.next().is_some());
    if has_some("volumes") {
        return Some("pods have volumes of the driver");
    }
    if has_some("pods") || kernel.enrolled().map_or(true, |pods| !pods.is_empty()) {
        return Some("pods are captured");
    }
    kernel.closed_pods().map_or(true, |pods| !pods.is_empty()).then_some("pods are in quarantine")
}

fn is_mounted(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ResourceBusy
}

fn failed(path: &Path, removed: io::Result<()>) -> Option<String> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Some(format!("{}: {error}", path.display())),
        _gone => None,
    }
}
