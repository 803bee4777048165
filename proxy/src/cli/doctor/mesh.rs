//! The local mesh: is it whole, and if there is none, could one start?

use std::path::{Path, PathBuf};

use super::super::patience::Part;
use super::super::{Failure, local};
use super::Finding;
use crate::node::kernel;

pub(super) fn look() -> Vec<Finding> {
    match local::is_up() {
        Ok(true) => vec![running()],
        Ok(false) => {
            let mut findings = vec![Finding::ok("mesh", "none is up")];
            findings.extend(ports());
            findings.push(remains());
            findings
        }
        Err(error) => vec![Finding::warn("mesh", format!("cannot tell whether one is up: {error}"), "run it as root")],
    }
}

fn running() -> Finding {
    let Some(record) = local::read_up_record() else {
        return Finding::warn("mesh", "one is up and not ready yet", "wait until `outrigger up` says that it is");
    };
    let is_gone = |id: u32| !Path::new("/proc").join(id.to_string()).exists();
    let parts = [(record.control, Part::Control), (record.node, Part::Node)].into_iter();
    let supervisor = is_gone(record.supervisor).then(|| "supervisor".to_owned());
    let parts = parts.filter(|(id, _part)| is_gone(*id)).map(|(_id, part)| part.name().to_owned() + &part.told(Some(&record)));
    let gone: Vec<String> = supervisor.into_iter().chain(parts).collect();
    if gone.is_empty() {
        return Finding::ok("mesh", format!("up, dashboard {}; `outrigger status` tells how its pods are", record.dashboard));
    }
    let remedy = format!("it is started again; where not, look into {}", record.state.join("log").display());
    Finding::fail("mesh", format!("up, and not running: {}", gone.join(", ")), remedy)
}

/// The ports that one would listen at.
fn ports() -> Vec<Finding> {
    let taken = local::taken_ports();
    if taken.is_empty() {
        return vec![Finding::ok("ports", "those that a mesh listens at are free")];
    }
    taken.into_iter().map(finding).collect()
}

fn finding(failure: Failure) -> Finding {
    let mut causes = failure.causes.into_iter();
    let text = causes.next().unwrap_or_default();
    let remedy = causes.next().unwrap_or_default();
    Finding::fail("ports", text, remedy.strip_prefix("remedy: ").unwrap_or(&remedy))
}

/// What an earlier mesh left.
fn remains() -> Finding {
    let cgroup = kernel::find_cgroup2().ok().map(|root| root.join("outrigger"));
    let bridge = Path::new("/sys/class/net").join(local::BRIDGE);
    let pods = PathBuf::from(local::RUNTIME).join("pods");
    let places = [Some(local::pins()), Some(pods), cgroup, Some(bridge)];
    let mut left: Vec<String> =
        places.into_iter().flatten().filter(|place| place.exists()).map(|place| place.display().to_string()).collect();
    let namespaces = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    left.extend(namespaces.map(|entry| entry.path()).filter(|path| is_pods(path)).map(|path| path.display().to_string()));
    left.sort_unstable();
    if left.is_empty() {
        return Finding::ok("remains", "nothing of an earlier mesh is left");
    }
    let text = format!("of an earlier mesh there is {}", left.join(", "));
    Finding::warn("remains", text, "`outrigger up` takes it over, `outrigger down` removes it")
}

fn is_pods(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("outrigger-"))
}
