//! What capture needs: a cgroup2 hierarchy, a kernel that takes every program, and nobody else at the same hooks.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;

use super::super::{agent, local};
use super::{Finding, Verdict};
use crate::node::kernel::{self, KernelError, Others};
use crate::node::ladder::{Rung, Standing};
use crate::node::nftables::{Nftables, NftablesError};

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
    let programs = programs();
    let taken = programs.iter().all(|finding| finding.verdict == Verdict::Ok);
    let nftables = Nftables::open(&root);
    findings.push(rung(taken, nftables.is_ok()));
    // Where nftables takes their place, a mesh works without them.
    findings.extend(programs.into_iter().map(|finding| if nftables.is_ok() { finding.bearable() } else { finding }));
    findings.push(rules(taken, nftables));
    findings.extend(hooks(&root));
    findings.extend(pods());
    findings
}

/// On which rung would a mesh stand here, or which does the one stand on that is up?
fn rung(takes_programs: bool, takes_rules: bool) -> Finding {
    let (rung, line) = match agent::capture() {
        Ok(report) => (report.standing.rung, agent::line(&report)),
        Err(_none) => {
            let rung = if takes_programs {
                Rung::Ebpf
            } else if takes_rules {
                Rung::Nftables
            } else {
                Rung::Explicit
            };
            (rung, format!("a mesh would stand on {}", Standing { rung, ..Standing::default() }.line()))
        }
    };
    match rung {
        Rung::Ebpf => Finding::ok("rung", line),
        Rung::Nftables | Rung::Explicit => Finding::warn("rung", line, "docs/capture.md tells what each rung needs and costs"),
    }
}

/// Does the kernel take a ruleset? Where it takes the programs nobody needs one.
fn rules(takes_programs: bool, tried: Result<Nftables, NftablesError>) -> Finding {
    match tried {
        Ok(_taken) => Finding::ok("nftables", "nft and the kernel take a pod's ruleset, should the programs not be taken"),
        Err(error) if takes_programs => {
            Finding::ok("nftables", format!("{}; the programs are taken, so nobody needs it", crate::node::chain(&error)))
        }
        Err(error) => Finding::warn("nftables", crate::node::chain(&error), error.remedy()),
    }
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
