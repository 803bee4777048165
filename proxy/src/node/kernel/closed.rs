//! Pods that are closed as a whole, both ways, by two programs at their cgroup that drop every packet.
//!
//! Source: the kernel's `BPF_PROG_TYPE_CGROUP_SKB`: it sees what the sockets of the cgroup's tasks, and of those below it, send and
//! receive of IPv4 and IPv6, whenever they were made; nobody has to show the pod's network namespace. Loading it takes CAP_BPF and
//! CAP_NET_ADMIN. What a task sends past IP, by a packet socket (CAP_NET_RAW), is not seen there.

use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::error::KernelError;
use super::links::{self, Hook, Place, Target};
use super::{Kernel, open_folder};

const WAYS: [(Hook, &str); 2] = [(Hook::CgroupIngress, "closed_in"), (Hook::CgroupEgress, "closed_out")];

impl Kernel {
    /// Closes the pod `uid`, whose cgroup is `cgroup`. Idempotent.
    pub(crate) fn close_pod(&self, uid: &str, cgroup: &Path) -> Result<(), KernelError> {
        let folder = open_folder(cgroup)?;
        let id = folder.metadata().map_err(|error| KernelError::file("look at", cgroup, error))?.ino();
        for (hook, name) in WAYS {
            let pin = self.closed_pin(name, uid);
            if let Some(link) = links::open(&pin)? {
                if links::target(link.as_fd()).is_ok_and(|target| target == Target::Cgroup(id)) {
                    continue;
                }
                links::detach(&pin)?;
            }
            let refused = |error| KernelError::call(format!("attach the program {name}"), error);
            let program = links::load_dropping(hook).map_err(refused)?;
            let link = links::create(program.as_fd(), Place::Open(folder.as_fd()), hook).map_err(refused)?;
            links::pin(link.as_fd(), &pin)?;
        }
        Ok(())
    }

    /// Opens the pod `uid` again, or forgets one that is gone. Idempotent.
    pub(crate) fn open_pod(&self, uid: &str) -> Result<(), KernelError> {
        WAYS.iter().try_for_each(|(_hook, name)| links::detach(&self.closed_pin(name, uid)))
    }

    /// The pods that are closed, by their pins.
    pub(crate) fn closed_pods(&self) -> Result<Vec<String>, KernelError> {
        let entries = fs::read_dir(&self.pins).map_err(|error| KernelError::file("list", &self.pins, error))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut uids: Vec<String> = names
            .filter_map(|name| WAYS.iter().find_map(|(_hook, way)| Some(name.strip_prefix(way)?.strip_prefix('_')?.to_owned())))
            .collect();
        uids.sort_unstable();
        uids.dedup();
        Ok(uids)
    }

    fn closed_pin(&self, name: &str, uid: &str) -> PathBuf {
        self.pins.join(format!("{name}_{uid}"))
    }
}
