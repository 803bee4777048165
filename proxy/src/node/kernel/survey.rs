//! What `outrigger doctor` asks the kernel: whether it takes each program, and who else is at the hooks of ours. Nothing is
//! attached, pinned or left.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use aya::programs::{ProgramInfo, loaded_programs};

use super::error::KernelError;
use super::{links, open_folder, program_pin, programs};

/// What the kernel says of one program.
#[derive(Debug)]
pub(crate) struct Tried {
    pub(crate) program: &'static str,
    /// Why it does not take it.
    pub(crate) refusal: Option<KernelError>,
}

/// Programs of somebody else's at one hook.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Others {
    /// The hook, as bpftool(8) says it.
    pub(crate) hook: String,
    /// The programs' names, as far as they have one.
    pub(crate) programs: Vec<String>,
}

/// Loads each program by itself, and lets go of it.
pub(crate) fn try_programs() -> Result<Vec<Tried>, KernelError> {
    let tried = programs::try_each()?.into_iter();
    Ok(tried.map(|(program, refusal)| Tried { program: program.name, refusal }).collect())
}

/// Who else is attached to the machine's cgroup2 root where the programs pinned below `pins` belong: they decide about the
/// same connections.
pub(crate) fn others_at_root(cgroup_root: &Path, pins: &Path) -> Result<Vec<Others>, KernelError> {
    let root = open_folder(cgroup_root)?;
    let own: Vec<u32> = programs::NODE.into_iter().filter_map(|program| pinned_id(pins, program.name)).collect();
    let mut others = Vec::new();
    for program in programs::NODE {
        let ids = links::ids(root.as_fd(), program.hook)
            .map_err(|error| KernelError::call("list the programs of the cgroup2 root", error))?;
        others.extend(named(program.hook, ids.into_iter().filter(|id| !own.contains(id)).collect()));
    }
    Ok(others)
}

/// Who else selects sockets in a pod's network namespace.
pub(crate) fn others_in_pod(netns: BorrowedFd<'_>, pins: &Path) -> Result<Option<Others>, KernelError> {
    let own = pinned_id(pins, programs::INBOUND.name);
    let ids = links::ids(netns, programs::INBOUND.hook)
        .map_err(|error| KernelError::call("list the programs of a pod's network namespace", error))?;
    Ok(named(programs::INBOUND.hook, ids.into_iter().filter(|id| own != Some(*id)).collect()))
}

fn pinned_id(pins: &Path, program: &str) -> Option<u32> {
    let program = programs::all().find(|one| one.name == program)?;
    ProgramInfo::from_pin(pins.join(program_pin(program))).ok().map(|info| info.id())
}

fn named(hook: links::Hook, ids: Vec<u32>) -> Option<Others> {
    if ids.is_empty() {
        return None;
    }
    Some(Others { hook: hook.name(), programs: ids.into_iter().map(name).collect() })
}

/// What people call a program: by its name, as far as it has one and this process may ask for it, and by its number.
pub(super) fn name(id: u32) -> String {
    // Only CAP_SYS_ADMIN may; a number is better than nothing.
    let info = loaded_programs().filter_map(Result::ok).find(|info| info.id() == id);
    let name = info.as_ref().and_then(ProgramInfo::name_as_str).filter(|name| !name.is_empty());
    name.map_or_else(|| format!("program {id}"), |name| format!("{name} (program {id})"))
}
