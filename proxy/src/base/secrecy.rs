//! What this process holds in memory stays its own.
//!
//! A process that is not dumpable (prctl(2), `PR_SET_DUMPABLE`) leaves no core, and to others its entries in `/proc` belong
//! to root: another process of the same user can neither trace it nor go through its `mem`, `root`, `cwd` or `fd` (proc(5),
//! ptrace(2)). It may still read its own. Executing a program undoes it, so that each role asks for itself.

use std::io;

/// Keeps every process but root's out of this one, and its memory out of cores. As the first thing of a role.
///
/// # Errors
/// A filter of system calls is in the way.
pub(crate) fn keep_to_itself() -> io::Result<()> {
    Ok(rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?)
}
