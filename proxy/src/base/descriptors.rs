//! How many files this process may have open at once.
//!
//! A login gives 1,024, for the sake of programs that use select(2); who asks may have as many as the machine lets it
//! (getrlimit(2)). A sidecar holds two for each connection, the node agent four for each pod.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Lets this process open as many files as it may. As the first thing of a role, which starts no other program.
pub(crate) fn open_as_many_as_allowed() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}
