//! How many files this process may have open at once.
//!
//! A login gives 1,024, for the sake of programs that use select(2); who asks may have as many as the machine lets it
//! (getrlimit(2)). A sidecar holds two for each connection, the node agent four for each pod.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// How many connections this process takes, so that a quarter of the files that it may open now stays for where they lead to, beside
/// what it needs itself. Not a half: most connections wait for a request, and share the ways on with others.
pub(crate) fn connections_max() -> usize {
    connections_within(getrlimit(Resource::Nofile).current)
}

/// Of `limit` files; none: there is no limit.
fn connections_within(limit: Option<u64>) -> usize {
    let files = limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
    (files.saturating_sub(OWN_FILES) / 4 * 3).max(1)
}

/// Refuses a new file that is one of those that the process needs itself, as the kernel refuses one that is beyond its limit.
///
/// # Errors
/// `EMFILE`.
pub(crate) fn leave_own(file: &impl AsRawFd) -> io::Result<()> {
    if is_own(file.as_raw_fd(), getrlimit(Resource::Nofile).current) {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok(())
}

/// A new file gets the least number that is free (open(2)): one with a high number says that as many are open.
fn is_own(number: RawFd, limit: Option<u64>) -> bool {
    let files = limit.and_then(|limit| usize::try_from(limit).ok());
    // So few files are all its own: what they lead to is found out by the kernel's own refusal.
    let shared = files.map(|files| files.saturating_sub(OWN_FILES)).filter(|shared| *shared > 0);
    shared.is_some_and(|shared| usize::try_from(number).is_ok_and(|number| number >= shared))
}

/// Lets this process open as many files as it may. As the first thing of a role, which starts no other program.
pub(crate) fn open_as_many_as_allowed() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// What a sidecar opens besides: its listeners and what wakes its threads, the streams to the control plane and the node agent,
/// its log, who asks at its own port, and the connections to other pods that it keeps.
const OWN_FILES: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_the_files_stays_for_where_connections_lead_to_and_some_are_the_processs_own() {
        for (limit, connections) in [(Some(1_024), 672), (Some(20_000), 14_904), (Some(64), 1), (Some(0), 1)] {
            assert_eq!(connections_within(limit), connections, "{limit:?}");
        }
        for (number, limit, own) in [
            (19_871, Some(20_000), false),
            (19_872, Some(20_000), true),
            (19_999, Some(20_000), true),
            (60, Some(64), false),
            (1 << 20, None, false),
        ] {
            assert_eq!(is_own(number, limit), own, "{number} of {limit:?}");
        }
        assert!(connections_within(None) > 1 << 40 && connections_within(Some(u64::MAX)) > 1 << 40);
    }
}
