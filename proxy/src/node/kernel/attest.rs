//! Attestation: is every program still where it was attached, and is it ours? The kernel is asked each time: whoever has the
//! capabilities can detach a program or put another one in its place, and nothing would tell. What is missing of the node is
//! put back by [`Kernel::mend_node`], what is missing of a pod by enrolling it again.

use std::fmt;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use proxy_common::pods::{POD_LINKS_MAX, WATCHED};

use super::links::{self, Place, Target};
use super::programs::{self, Program};
use super::{Kernel, KernelError, Options, attach, link_pin, open_folder, program_pin};
use crate::node::maps;

/// A program that is not as it was attached.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Fault {
    pub(crate) program: &'static str,
    pub(crate) kind: FaultKind,
}

/// In which way it is not.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum FaultKind {
    /// Nothing holds it.
    Unpinned,
    /// Its link leads nowhere, or elsewhere.
    Detached,
    /// What a new link would need is gone.
    ProgramGone,
    /// Somebody else's is there.
    Replaced,
    /// Somebody else's runs before it, and may keep from it what it should see.
    Preceded,
}

impl Fault {
    /// Is it of what hangs at the sidecar's cgroup, and goes with it?
    pub(crate) fn is_of_sidecar(&self) -> bool {
        programs::SIDECAR.iter().any(|program| program.name == self.program)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.program;
        match self.kind {
            FaultKind::Unpinned => write!(f, "the program {name} is not attached, its pin is gone"),
            FaultKind::Detached => write!(f, "the program {name} is not attached any more"),
            FaultKind::ProgramGone => write!(f, "the pin of the program {name} is gone"),
            FaultKind::Preceded => write!(f, "another program runs before {name}, at the node's end of the pod's link"),
            FaultKind::Replaced => write!(f, "another program is in the place of {name}"),
        }
    }
}

impl Kernel {
    /// What of the programs of the node is not as it was attached; nothing where all is well.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(crate) fn attest_node(&self) -> Result<Vec<Fault>, KernelError> {
        let root = open_folder(&self.cgroup_root)?.metadata();
        let root = root.map_err(|error| KernelError::file("look at", &self.cgroup_root, error))?.ino();
        let mut faults = Vec::new();
        for program in programs::NODE {
            faults.extend(self.fault(program, &self.pins.join(link_pin(program)), |target| target == Target::Cgroup(root))?);
        }
        Ok(faults)
    }

    /// The same of the programs of one pod; nothing of one that is not enrolled.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(crate) fn attest_pod(&self, cookie: u64) -> Result<Vec<Fault>, KernelError> {
        let Some(pod) = self.maps.pod(cookie)? else { return Ok(Vec::new()) };
        let inbound = |target| matches!(target, Target::Netns(_));
        let mut faults = Vec::from_iter(self.fault(programs::INBOUND, &self.pod_pin(programs::INBOUND, cookie), inbound)?);
        for program in programs::SIDECAR {
            let expected = |target| target == Target::Cgroup(pod.sidecar_cgroup);
            faults.extend(self.fault(program, &self.pod_pin(program, cookie), expected)?);
        }
        // What could not be watched was told of at the pod's enrolment.
        for (place, device) in pod.links.into_iter().enumerate().filter(|(_place, device)| *device != 0 && pod.has(WATCHED)) {
            let expected = |target| target == Target::Device(device);
            faults.extend(self.fault(programs::LINK, &self.device_pin(cookie, place), expected)?);
        }
        Ok(faults)
    }

    /// The node's ends of a pod's links, as they were at its enrolment; none of one that is not enrolled.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(crate) fn links_of(&self, cookie: u64) -> Result<Vec<u32>, KernelError> {
        let links = self.maps.pod(cookie)?.map_or([0; POD_LINKS_MAX], |pod| pod.links);
        Ok(links.into_iter().filter(|link| *link != 0).collect())
    }

    /// Attaches again what of the programs of the node is not attached, and puts ours in the place of others. Where a pin of a
    /// program is gone, all of them are loaded anew, as by an agent that starts.
    ///
    /// # Errors
    /// The kernel refuses; or the pin of a map is gone: programs with a new one would know no pod.
    pub(crate) fn mend_node(&self) -> Result<(), KernelError> {
        if let Some(map) = maps::PINNED.into_iter().find(|map| !maps::pin(&self.pins, map).exists()) {
            return Err(KernelError::file("open", maps::pin(&self.pins, map), io::Error::from(io::ErrorKind::NotFound)));
        }
        if !programs::all().all(|program| self.pins.join(program_pin(program)).exists()) {
            attach(&self.pins, &self.cgroup_root, Options { log: self.log, ..Options::default() })?;
        }
        let root = open_folder(&self.cgroup_root)?;
        let id = root.metadata().map_err(|error| KernelError::file("look at", &self.cgroup_root, error))?.ino();
        for program in programs::NODE {
            let pin = self.pins.join(link_pin(program));
            self.link(program, &pin, Place::Open(root.as_fd()), Target::Cgroup(id))?;
        }
        Ok(())
    }

    /// The inode of the network namespace whose connections the program for the pod `cookie` gets; none where it gets nobody's.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(crate) fn netns_of(&self, cookie: u64) -> Result<Option<u64>, KernelError> {
        let Some(link) = links::open(&self.pod_pin(programs::INBOUND, cookie))? else { return Ok(None) };
        Ok(links::target(link.as_fd()).ok().and_then(|target| if let Target::Netns(inode) = target { Some(inode) } else { None }))
    }

    /// What is wrong with the link pinned at `pin`.
    fn fault(&self, program: Program, pin: &Path, expected: impl Fn(Target) -> bool) -> Result<Option<Fault>, KernelError> {
        let fault = |kind| Ok(Some(Fault { program: program.name, kind }));
        let Some(link) = links::open(pin)? else { return fault(FaultKind::Unpinned) };
        let failed = |error| KernelError::call(format!("tell what {} is", pin.display()), error);
        let (target, attached) = links::info(link.as_fd()).map_err(failed)?;
        if !expected(target) {
            return fault(FaultKind::Detached);
        }
        let Some(ours) = links::open(&self.pins.join(program_pin(program)))? else { return fault(FaultKind::ProgramGone) };
        let ours = links::program_id(ours.as_fd()).map_err(failed)?;
        if ours != attached {
            return fault(FaultKind::Replaced);
        }
        match target {
            Target::Device(device) if links::first_at_device(device).map_err(failed)? != Some(ours) => fault(FaultKind::Preceded),
            _ => Ok(None),
        }
    }
}
