//! Other people's programs that decide about the same connections as ours: where an app connects, and where a connection arrives in
//! its pod. Two owners may get along, as a filter does, or not, as what sends connections elsewhere: which one it is the kernel does
//! not tell, so each is named.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::KernelError;
use super::links::Hook;
use super::{Kernel, links, open_folder, program_pin, programs, survey};

/// Somebody else's program at a hook of ours.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub(crate) struct Conflict {
    /// A sentence: which program, where, and what that means.
    pub(crate) text: String,
    /// It may take a pod's connections from its sidecar.
    pub(crate) steals: bool,
}

impl Kernel {
    /// Who else is asked when a task of `cgroup`, an app's, connects: at the cgroup2 root, or anywhere between it and the app.
    ///
    /// # Errors
    /// The kernel does not tell, or the cgroup is gone.
    pub(crate) fn others_at_connect(&self, cgroup: &Path) -> Result<Vec<Conflict>, KernelError> {
        let folder = open_folder(cgroup)?;
        let mut found = Vec::new();
        for program in programs::NODE.into_iter().filter(|program| matches!(program.hook, Hook::Connect4 | Hook::Connect6)) {
            let failed = |error| KernelError::call("list the programs that run where an app connects", error);
            let ids = links::effective(folder.as_fd(), program.hook).map_err(failed)?;
            let Some(ours) = links::open(&self.pins.join(program_pin(program)))? else { continue };
            let ours = links::program_id(ours.as_fd()).map_err(failed)?;
            // Where ours is not among them, that is a fault of its own.
            let Some(place) = ids.iter().position(|id| *id == ours) else { continue };
            for (number, id) in ids.iter().enumerate().filter(|(number, _id)| *number != place) {
                let (when, meaning) = if number < place {
                    ("before", "an address that it changes is taken for the one that the app asked for")
                } else {
                    ("after", "a connection to the sidecar that it changes or refuses fails or gets past it")
                };
                let (name, hook) = (survey::name(*id), program.hook.name());
                found.push(Conflict { text: format!("{name} runs at {hook} {when} {}: {meaning}", program.name), steals: false });
            }
        }
        Ok(found)
    }

    /// Who else selects sockets for what arrives in the network namespace `netns`, a pod's.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(crate) fn others_at_arrival(&self, netns: BorrowedFd<'_>) -> Result<Vec<Conflict>, KernelError> {
        let others = survey::others_in_pod(netns, &self.pins)?;
        let programs = others.into_iter().flat_map(|others| others.programs);
        let text =
            |name| format!("{name} selects sockets in the pod's network namespace: connections may go to it past the sidecar");
        Ok(programs.map(|name| Conflict { text: text(name), steals: true }).collect())
    }
}
