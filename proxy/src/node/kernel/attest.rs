//! Attestation: is every program still where it was attached, and is it ours? The kernel is asked each time: whoever has the
//! capabilities can detach a program or put another one in its place, and nothing would tell.

use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use proxy_common::pods::WATCHED;

use super::links::{self, Target};
use super::programs::{self, Program};
use super::{Kernel, KernelError, link_pin, open_folder, program_pin};

impl Kernel {
    /// What of the programs of the node is not as it was attached, each in a sentence; nothing where all is well.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(crate) fn attest_node(&self) -> Result<Vec<String>, KernelError> {
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
    pub(crate) fn attest_pod(&self, cookie: u64) -> Result<Vec<String>, KernelError> {
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

    /// What is wrong with the link pinned at `pin`.
    fn fault(&self, program: Program, pin: &Path, expected: impl Fn(Target) -> bool) -> Result<Option<String>, KernelError> {
        let name = program.name;
        let Some(link) = links::open(pin)? else {
            return Ok(Some(format!("the program {name} is not attached, its pin is gone")));
        };
        let failed = |error| KernelError::call(format!("tell what {} is", pin.display()), error);
        let (target, attached) = links::info(link.as_fd()).map_err(failed)?;
        if !expected(target) {
            return Ok(Some(format!("the program {name} is not attached any more")));
        }
        let Some(ours) = links::open(&self.pins.join(program_pin(program)))? else {
            return Ok(Some(format!("the pin of the program {name} is gone")));
        };
        let ours = links::program_id(ours.as_fd()).map_err(failed)?;
        Ok((ours != attached).then(|| format!("another program is in the place of {name}")))
    }
}
