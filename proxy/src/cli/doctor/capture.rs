//! What capture needs: a cgroup2 hierarchy, a kernel that takes every program, and nobody else at the same hooks.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;

use super::super::local;
use super::Finding;
use crate::node::kernel::{self, KernelError, Others};

pub(super) fn look() -> Vec<Finding> {
    let root = match kernel::find_cgroup2() {
        Ok(root) => root,
        Err(error) => return vec![Finding::of_kernel("cgroup2", &error)],
    };
    let mut findings = vec![Finding::ok("cgroup2", root.display().to_string())];
    if !rustix::process::geteuid().is_root() {
        findings.push(Finding::warn("programs", "not asked: only root may load them", "run it as root"));
        return findings;
    }
    findings.extend(programs());
    findings.extend(hooks(&root));
    findings.extend(pods());
    findings
}

/// Does the kernel take each program?
fn programs() -> Vec<Finding> {
    let tried = match kernel::try_programs() {
        Ok(tried) => tried,
        Err(error) => return vec![Finding::of_kernel("programs", &error)],
    };
    let refused: Vec<Finding> =
        tried.iter().filter_map(|one| Some(Finding::of_kernel("programs", one.refusal.as_ref()?))).collect();
    if !refused.is_empty() {
        return refused;
    }
    let names: Vec<&str> = tried.iter().map(|one| one.program).collect();
    vec![Finding::ok("programs", format!("the kernel takes {}: {}", names.len(), names.join(", ")))]
}

/// Who else is at the hooks of the machine?
fn hooks(root: &Path) -> Vec<Finding> {
    let others = match kernel::others_at_root(root, &local::pins()) {
        Ok(others) => others,
        Err(error) => return vec![Finding::of_kernel("hooks", &error)],
    };
    if others.is_empty() {
        return vec![Finding::ok("hooks", "nobody else's programs are at the hooks of the cgroup2 root")];
    }
    let remedy =
        format!("whose they are: bpftool cgroup show {}; one that redirects connections as well is a conflict", root.display());
    others.iter().map(|others| Finding::warn("hooks", at(others), remedy.clone())).collect()
}

/// Who else selects sockets in the pods?
fn pods() -> Vec<Finding> {
    let entries = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| name.starts_with("outrigger-"));
    names.sort_unstable();
    let mut findings = Vec::new();
    for name in &names {
        match in_pod(name) {
            Ok(None) => {}
            Ok(Some(others)) => findings.push(Finding::fail(
                "pods",
                format!("in {name}, {}", at(&others)),
                "detach them (`bpftool net`, `bpftool link`): two owners cannot both have a pod's connections",
            )),
            Err(error) => findings.push(Finding::of_kernel("pods", &error)),
        }
    }
    if findings.is_empty() && !names.is_empty() {
        findings.push(Finding::ok("pods", format!("nobody else selects sockets in {} namespaces", names.len())));
    }
    findings
}

fn in_pod(name: &str) -> Result<Option<Others>, KernelError> {
    match File::open(Path::new("/run/netns").join(name)) {
        Ok(netns) => kernel::others_in_pod(netns.as_fd(), &local::pins()),
        // It went meanwhile.
        Err(_gone) => Ok(None),
    }
}

fn at(others: &Others) -> String {
    format!("at {} there is also {}", others.hook, others.programs.join(", "))
}
