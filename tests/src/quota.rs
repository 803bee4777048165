//! A quota of processor time for pods that start while it lives, in whichever hierarchy of cgroups this machine has the
//! controller: version 1, where a pod is in the group of whoever started it, or version 2, where it is in the mesh's.
//!
//! Source: the kernel's `admin-guide/cgroup-v1/cgroups.rst`, `scheduler/sched-bwc.rst` and `admin-guide/cgroup-v2.rst`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::mesh::cgroup_root;

/// The quota; dropping it lifts it.
pub enum Quota {
    /// The group that was made, and the one that this process came from.
    V1 { made: PathBuf, from: PathBuf },
    /// The group of all pods.
    V2(PathBuf),
}

/// In microseconds.
const PERIOD: u32 = 100_000;

impl Quota {
    /// So many hundredths of a processor, once a mesh is up.
    pub fn of(percent: u32) -> Result<Self> {
        let quota = percent * (PERIOD / 100);
        let cpu = Path::new("/sys/fs/cgroup/cpu");
        if cpu.join("cpu.cfs_quota_us").exists() {
            let groups = std::fs::read_to_string("/proc/self/cgroup")?;
            let own = groups.lines().find_map(|line| {
                let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
                controllers.split(',').any(|name| name == "cpu").then(|| path.trim_start_matches('/').to_owned())
            });
            let from = cpu.join(own.context("this process is in no group of the cpu controller")?);
            let made = from.join("outrigger-e2e");
            std::fs::create_dir_all(&made)?;
            write(&made.join("cpu.cfs_period_us"), &PERIOD.to_string())?;
            write(&made.join("cpu.cfs_quota_us"), &quota.to_string())?;
            write(&made.join("cgroup.procs"), "0")?;
            return Ok(Self::V1 { made, from });
        }
        let root = cgroup_root()?;
        write(&root.join("cgroup.subtree_control"), "+cpu")?;
        let group = root.join("outrigger");
        write(&group.join("cpu.max"), &format!("{quota} {PERIOD}"))?;
        Ok(Self::V2(group))
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        let lifted = match self {
            Self::V1 { made, from } => write(&from.join("cgroup.procs"), "0")
                // The pods that started in it go on, without it.
                .and_then(|()| write(&made.join("cpu.cfs_quota_us"), "-1"))
                .and_then(|()| {
                    for process in std::fs::read_to_string(made.join("cgroup.procs"))?.lines() {
                        write(&from.join("cgroup.procs"), process)?;
                    }
                    Ok(std::fs::remove_dir(&*made)?)
                }),
            Self::V2(group) => write(&group.join("cpu.max"), "max"),
        };
        if let Err(error) = lifted {
            eprintln!("the quota was not lifted: {error:#}");
        }
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {text} into {}", path.display()))
}
