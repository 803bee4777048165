//! Ends the cluster and removes what it made. What is not there is no error, so that it also ends half of one.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use e2e::mesh::{cgroup_root, finish, kill, wait_for};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;

use super::{NODE_LINK, PODS_LINK, RUN, STATE, ctr, process};
use crate::{setup, shell};

/// What the cluster switches on in the kernel.
pub(super) const SWITCHES: [&str; 2] = ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"];
const PATIENCE: Duration = Duration::from_secs(20);

/// Notes what a switch said before the cluster.
pub(super) fn remember(switch: &str) -> Result<()> {
    let note = noted(switch);
    if !note.exists() {
        std::fs::copy(switch, &note).with_context(|| format!("cannot note {switch}"))?;
    }
    Ok(())
}

/// Where the machine's init mounts the pins of kernel programs, which one without an init lacks.
const PINS: &str = "/sys/fs/bpf";

/// Mounts it where it is not, and notes that.
pub(super) fn mount_bpf(root: &Path) -> Result<()> {
    if mounts_of(|path| path == Path::new(PINS))?.is_empty() {
        shell::output(shell::command(root, "mount", &["-t", "bpf", "bpf", PINS]))?;
        std::fs::write(noted(PINS), "")?;
    }
    Ok(())
}

/// Ends what runs, in the order in which nobody starts anything anew.
pub(super) fn run(root: &Path) -> Result<()> {
    if !Path::new(STATE).exists() && !Path::new(RUN).exists() {
        shell::say("no cluster is there");
        return Ok(());
    }
    setup::step("ending the cluster", || {
        end(&["kubelet", "kube-proxy", "kube-scheduler", "kube-controller-manager"])?;
        let mut namespaces = end_pods(root)?;
        end(&["coredns", "containerd", "kube-apiserver", "etcd"])?;
        namespaces.extend(end_orphans()?);
        remove(root, &namespaces)
    })
}

fn end(names: &[&str]) -> Result<()> {
    for process in process::all()?.iter().filter(|process| names.contains(&process.name.as_str())) {
        process.end()?;
    }
    Ok(())
}

/// Ends all containers; returns the network namespaces that they had.
fn end_pods(root: &Path) -> Result<BTreeSet<String>> {
    let mut namespaces = BTreeSet::new();
    if !process::all()?.iter().any(|process| process.name == "containerd" && process.is_alive()) {
        return Ok(namespaces);
    }
    let listed = finish(&mut ctr(root, &["containers", "ls", "-q"]), PATIENCE)?.ok()?;
    for id in listed.split_whitespace() {
        let said = finish(&mut ctr(root, &["containers", "info", id]), PATIENCE)?.stdout;
        let names = said.split('"').filter_map(|word| word.split_once("netns/")).map(|(_, name)| name.to_owned());
        namespaces.extend(names.filter(|name| name.starts_with("cni-")));
    }
    let tasks = finish(&mut ctr(root, &["tasks", "ls", "-q"]), PATIENCE)?.ok()?;
    for id in tasks.split_whitespace() {
        // One that has just ended is refused, which is as good.
        finish(&mut ctr(root, &["tasks", "delete", "--force", id]), PATIENCE)?;
    }
    Ok(namespaces)
}

/// Ends what a containerd left that was killed: pods that run, and their shims. Returns the network namespaces that they had.
fn end_orphans() -> Result<BTreeSet<String>> {
    let pods = cgroup_root()?.join("kubepods");
    let mut held = BTreeSet::new();
    for id in tasks_below(&pods)? {
        held.extend(std::fs::metadata(format!("/proc/{id}/ns/net")).map(|namespace| namespace.ino()));
    }
    let mut namespaces = BTreeSet::new();
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten() {
        let entry = entry?;
        // What is mounted there: an entry's own metadata are of the file below.
        let inode = std::fs::metadata(entry.path()).map(|namespace| namespace.ino());
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("cni-") && inode.is_ok_and(|inode| held.contains(&inode)) {
            namespaces.insert(name);
        }
    }
    if pods.exists() {
        std::fs::write(pods.join("cgroup.kill"), "1").with_context(|| format!("cannot end what runs in {}", pods.display()))?;
    }
    for shim in shims()? {
        kill(shim, Signal::KILL);
    }
    wait_for("the end of the pods", PATIENCE, || {
        let (tasks, shims) = (tasks_below(&pods)?, shims()?);
        if tasks.is_empty() && shims.is_empty() { Ok(()) } else { bail!("they still run: {tasks:?}, shims {shims:?}") }
    })?;
    Ok(namespaces)
}

/// The processes in a cgroup and in those below it.
fn tasks_below(cgroup: &Path) -> Result<Vec<u32>> {
    if !cgroup.exists() {
        return Ok(Vec::new());
    }
    let own = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let mut tasks: Vec<u32> = own.lines().filter_map(|id| id.parse().ok()).collect();
    for entry in std::fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            tasks.extend(tasks_below(&entry.path())?);
        }
    }
    Ok(tasks)
}

/// The shims that a containerd of ours started: they name its socket.
fn shims() -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // Nothing of one that ends in between.
        let words = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        let program = words.split('\0').next().unwrap_or_default();
        if program.ends_with("containerd-shim-runc-v2") && words.contains(&format!("{RUN}/")) {
            found.push(id);
        }
    }
    Ok(found)
}

fn remove(root: &Path, namespaces: &BTreeSet<String>) -> Result<()> {
    let try_to = |program: &str, words: &[&str]| finish(&mut shell::command(root, program, words), PATIENCE).map(drop);
    for namespace in namespaces {
        try_to("ip", &["netns", "delete", namespace])?;
    }
    let mut mounts = mounts_of(|path| path.starts_with(STATE) || path.starts_with(RUN))?;
    if noted(PINS).exists() {
        mounts.extend(mounts_of(|path| path == Path::new(PINS))?);
    }
    for mount in mounts {
        unmount(&mount, UnmountFlags::DETACH).with_context(|| format!("cannot unmount {}", mount.display()))?;
    }
    for link in [PODS_LINK, NODE_LINK] {
        if Path::new("/sys/class/net").join(link).exists() {
            try_to("ip", &["link", "delete", link])?;
        }
    }
    for family in ["ip", "ip6"] {
        try_to("nft", &["delete", "table", family, "kube-proxy"])?;
    }
    cgroups()?;
    for switch in SWITCHES {
        if let Ok(before) = std::fs::read(noted(switch)) {
            std::fs::write(switch, before).with_context(|| format!("cannot write {switch}"))?;
        }
    }
    for folder in [STATE, RUN] {
        if Path::new(folder).exists() {
            std::fs::remove_dir_all(folder).with_context(|| format!("cannot remove {folder}"))?;
        }
    }
    Ok(())
}

/// What is mounted at such paths, the innermost first.
fn mounts_of(wanted: impl Fn(&Path) -> bool) -> Result<Vec<PathBuf>> {
    let text = std::fs::read_to_string("/proc/self/mounts")?;
    let paths = text.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    let mut ours: Vec<PathBuf> = paths.filter(|path| wanted(path)).collect();
    ours.sort_unstable();
    ours.reverse();
    Ok(ours)
}

/// The kubelet's cgroups, in every hierarchy, the innermost first.
fn cgroups() -> Result<()> {
    let unified = cgroup_root()?;
    let mut roots = vec![unified.clone()];
    if let Some(parent) = unified.parent().filter(|parent| parent.ends_with("cgroup")) {
        roots.extend(std::fs::read_dir(parent)?.filter_map(|entry| Some(entry.ok()?.path())));
    }
    for root in roots {
        remove_cgroup(&root.join("kubepods"))?;
    }
    Ok(())
}

fn remove_cgroup(folder: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    std::fs::remove_dir(folder).with_context(|| format!("cannot remove {}", folder.display()))
}

fn noted(switch: &str) -> PathBuf {
    Path::new(RUN).join(switch.replace('/', "_"))
}
