//! Why capture does not work, and what helps. One message per cause, made for the operator.

use std::io;
use std::path::PathBuf;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;
use aya::sys::SyscallError;
use proxy_common::exclusions::{EXCLUDED_CIDRS, EXCLUDED_PORTS};
use proxy_common::pods::{ADDRESSES, LINKS, LISTENERS};

use super::programs;
use crate::node::ladder::{Fall, Rung};
use crate::node::maps::{ADDRESSES_ROOM, CIDRS_ROOM, LINKS_ROOM, PODS_ROOM, PORTS_ROOM};

/// Why capture does not work. Unless a variant says otherwise it is the environment's fault.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    /// There is no cgroup2 hierarchy.
    #[error("no cgroup2 hierarchy is mounted")]
    NoCgroup2,
    /// A file or folder cannot be used.
    #[error("cannot {what} {path}")]
    File {
        /// What was tried, as a verb.
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The folder of the pins is not on a bpffs.
    #[error("{path} is not on a bpf filesystem")]
    NotBpffs { path: PathBuf },
    /// No bpffs can be mounted.
    #[error("the kernel {release} mounts no bpf filesystem at {path}")]
    Mount {
        path: PathBuf,
        release: String,
        #[source]
        source: io::Error,
    },
    /// The kernel cannot make the maps, or does not understand the object.
    #[error("the kernel {release} takes no maps of the capture programs")]
    Object {
        release: String,
        #[source]
        source: Box<EbpfError>,
    },
    /// The kernel refuses a program.
    #[error("the kernel {release} refuses the program {program}: {source}{log}")]
    Refused {
        program: &'static str,
        release: String,
        source: io::Error,
        /// The verifier's last lines, or nothing.
        log: String,
    },
    /// The kernel has no such helper for a program of this kind.
    #[error("the kernel {release} lacks {what}, which the program {program} calls: {source}")]
    Lacks {
        program: &'static str,
        release: String,
        /// The helper, with its name or its number.
        what: String,
        source: io::Error,
    },
    /// A call of bpf(2) failed.
    #[error("the kernel {release} refuses to {what}")]
    Call {
        /// What was tried, as a verb with its object.
        what: String,
        release: String,
        #[source]
        source: io::Error,
    },
    /// A map cannot be read or written.
    #[error("the map {map} cannot be used")]
    Map {
        map: &'static str,
        #[source]
        source: Box<MapError>,
    },
    /// A map has no room for what is new; what stands in it stays in force.
    #[error("the map {map} is full: a node has room for {room}")]
    Full { map: &'static str, room: String },
    /// The kernel has no memory for it, or this process may not have it (a cgroup's limit).
    #[error("the kernel {release} has no memory for {what}")]
    NoMemory {
        what: String,
        release: String,
        #[source]
        source: io::Error,
    },
    /// Pins of a layout that is not known stand there: a later version's, or a very old one's.
    #[error("the pins in {path} are of layout {found}, this program's are of layout {}", proxy_common::LAYOUT)]
    Layout { path: PathBuf, found: u64 },
    /// Somebody else's program selects sockets in a pod's network namespace.
    #[error("other sk_lookup programs are attached in the pod's network namespace: {others}")]
    Foreign {
        /// Their names and numbers.
        others: String,
    },
    /// The pod's owner asks that what gets past its sidecar is dropped, and nothing here can.
    #[error("what gets past the pod's sidecar cannot be dropped: {reason}")]
    NotWatched { reason: String },
    /// The caller's fault: the pod was not enrolled before its listener came.
    #[error("no pod with the namespace cookie {cookie} is enrolled")]
    NotEnrolled { cookie: u64 },
    /// The caller's fault: the pod has no address.
    #[error("the pod with the namespace cookie {cookie} has no address")]
    NoAddress { cookie: u64 },
}

impl KernelError {
    /// What the operator can do about it: one sentence.
    pub(crate) fn remedy(&self) -> String {
        // To mount takes another capability, which its own remedy names.
        if self.is_permission() && !matches!(self, Self::Mount { .. }) {
            return "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON".to_owned();
        }
        match self {
            Self::NoCgroup2 => "mount one: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified",
            Self::File { .. } => "check that the path exists and that this process may use it",
            Self::Mount { .. } => "run as root (CAP_SYS_ADMIN) on a kernel with CONFIG_BPF_SYSCALL, or mount one there before",
            Self::NotBpffs { .. } => "mount one: mount -t bpf bpf FOLDER",
            Self::Object { .. } | Self::Refused { .. } => {
                "use Linux 6.1 or newer with CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF and CONFIG_DEBUG_INFO_BTF; if it is, report this message"
            }
            Self::Lacks { .. } => "the kernel is too old: use Linux 6.1 or newer",
            Self::Call { .. } => "use Linux 6.1 or newer with CONFIG_CGROUP_BPF, and check that no security module forbids bpf(2)",
            Self::Map { .. } => "`outrigger down` removes what is pinned",
            Self::Full { .. } => "stop pods that are not needed, or exclude less, or start the pod on another node",
            Self::NoMemory { .. } => "give the node agent's cgroup more memory, or stop pods that are not needed",
            Self::Layout { .. } => {
                "start the version that made them, or stop the pods and run `outrigger down` once: it removes the other version's pins"
            }
            Self::Foreign { .. } => "detach them (`bpftool net`, `bpftool link`): two owners cannot both have a pod's connections",
            Self::NotWatched { .. } => {
                "run the pod without the annotation outrigger.dev/capture=enforce, or on Linux 6.6 or newer with a veth link"
            }
            Self::NotEnrolled { .. } | Self::NoAddress { .. } => "start the pod again",
        }
        .to_owned()
    }

    /// The reason under which a pod that could not be enrolled is counted.
    pub(crate) const fn reason(&self) -> &'static str {
        match self {
            Self::Full { .. } => "full",
            Self::NoMemory { .. } => "no_memory",
            Self::Foreign { .. } => "foreign_program",
            _other => "kernel",
        }
    }

    /// Is it for another way to capture? What is full, pinned by another version or somebody else's is for the operator.
    pub(crate) const fn is_for_another_rung(&self) -> bool {
        match self {
            Self::NoCgroup2
            | Self::File { .. }
            | Self::NotBpffs { .. }
            | Self::Mount { .. }
            | Self::Object { .. }
            | Self::Refused { .. }
            | Self::Lacks { .. }
            | Self::Call { .. } => true,
            Self::Map { .. }
            | Self::Full { .. }
            | Self::NoMemory { .. }
            | Self::Layout { .. }
            | Self::Foreign { .. }
            | Self::NotWatched { .. }
            | Self::NotEnrolled { .. }
            | Self::NoAddress { .. } => false,
        }
    }

    /// As the reason why capture stands on a lower rung.
    pub(crate) fn fall(&self) -> Fall {
        let (program, verifier) = match self {
            Self::Refused { program, log, .. } => (Some(*program), log.strip_prefix(VERIFIER)),
            Self::Lacks { program, .. } => (Some(*program), None),
            _other => (None, None),
        };
        let hook = program.and_then(programs::hook).map(|hook| format!("{hook:?}").to_lowercase());
        Fall {
            rung: Rung::Ebpf,
            hook,
            errno: self.source_error().and_then(io::Error::raw_os_error),
            kernel: release(),
            verifier: verifier.map(str::to_owned),
            text: crate::node::chain(self),
            remedy: self.remedy(),
        }
    }

    fn is_permission(&self) -> bool {
        // EACCES is the verifier's word for a program that it does not believe.
        self.source_error().and_then(io::Error::raw_os_error) == Some(libc::EPERM)
    }

    /// What the kernel answered.
    fn source_error(&self) -> Option<&io::Error> {
        match self {
            Self::File { source, .. }
            | Self::Mount { source, .. }
            | Self::Refused { source, .. }
            | Self::Lacks { source, .. }
            | Self::Call { source, .. } => Some(source),
            // Without the capability the kernel refuses the first map.
            Self::Object { source, .. } => match source.as_ref() {
                EbpfError::MapError(MapError::CreateError { io_error, .. }) => Some(io_error),
                _other => None,
            },
            _other => None,
        }
    }

    /// From what aya says of a program that did not load.
    pub(super) fn refused(program: &'static str, error: ProgramError) -> Self {
        let (source, log) = match error {
            ProgramError::LoadError { io_error, verifier_log } => {
                let log = verifier_log.to_string();
                if let Some(what) = lacking_helper(&log) {
                    return Self::Lacks { program, release: release(), what, source: io_error };
                }
                (io_error, last_lines(&log))
            }
            ProgramError::SyscallError(error) => (error.io_error, String::new()),
            other => (io::Error::other(other), String::new()),
        };
        if is_no_memory(&source) {
            return Self::NoMemory { what: format!("the program {program}"), release: release(), source };
        }
        Self::Refused { program, release: release(), source, log }
    }

    /// From what aya says of an object that did not load.
    pub(super) fn object(error: EbpfError) -> Self {
        match error {
            EbpfError::MapError(MapError::CreateError { name, io_error }) if is_no_memory(&io_error) => {
                Self::NoMemory { what: format!("the map {name}"), release: release(), source: io_error }
            }
            other => Self::Object { release: release(), source: Box::new(other) },
        }
    }

    /// From the last call's errno.
    pub(super) fn call(what: impl Into<String>, source: io::Error) -> Self {
        let what = what.into();
        if is_no_memory(&source) {
            return Self::NoMemory { what: format!("this: {what}"), release: release(), source };
        }
        Self::Call { what, release: release(), source }
    }

    /// For a file or folder.
    pub(super) fn file(what: &'static str, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> Self {
        Self::File { what, path: path.into(), source: source.into() }
    }

    /// For a map.
    pub(in crate::node) fn map(map: &'static str, source: MapError) -> Self {
        match source {
            MapError::SyscallError(error) if is_full(&error.io_error) => Self::Full { map, room: room(map) },
            MapError::SyscallError(SyscallError { io_error, .. }) | MapError::CreateError { io_error, .. }
                if is_no_memory(&io_error) =>
            {
                Self::NoMemory { what: format!("the map {map}"), release: release(), source: io_error }
            }
            MapError::CreateError { io_error, .. } => Self::call(format!("make the map {map}"), io_error),
            other => Self::Map { map, source: Box::new(other) },
        }
    }
}

/// What a map without room says: E2BIG most of them, ENOSPC a trie.
fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC))
}

fn is_no_memory(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOMEM)
}

/// What a map has room for.
fn room(map: &str) -> String {
    match map {
        ADDRESSES | LISTENERS => format!("{ADDRESSES_ROOM} addresses of pods"),
        LINKS => format!("{LINKS_ROOM} links of pods"),
        EXCLUDED_PORTS => format!("{PORTS_ROOM} excluded ports"),
        EXCLUDED_CIDRS => format!("{CIDRS_ROOM} excluded networks"),
        _by_pod => format!("{PODS_ROOM} pods"),
    }
}

/// The running kernel's release.
pub(crate) fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// The verifier's last lines on one line: its verdict stands there, then its statistics.
fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let tail = lines.get(lines.len().saturating_sub(4)..).unwrap_or_default();
    if tail.is_empty() { String::new() } else { format!("{VERIFIER}{}", tail.join(" | ")) }
}

/// What stands before the verifier's last lines.
const VERIFIER: &str = "; verifier: ";

/// The helper that the verifier misses: it says `unknown func NAME#NUMBER` of one that other kinds of programs may call,
/// and `invalid func unknown#NUMBER` of one that it has never heard of.
fn lacking_helper(log: &str) -> Option<String> {
    log.lines().find_map(|line| {
        let (_, helper) = line.split_once("unknown func ").or_else(|| line.split_once("invalid func "))?;
        let (name, number) = helper.trim().split_once('#')?;
        Some(if name == "unknown" { format!("the helper of number {number}") } else { format!("the helper {name}") })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helper_that_a_kernel_lacks_is_named() {
        let missing = "12: (85) call bpf_get_netns_cookie#122\nunknown func bpf_get_netns_cookie#122\nprocessed 12 insns\n";
        assert_eq!(lacking_helper(missing).as_deref(), Some("the helper bpf_get_netns_cookie"));
        assert_eq!(lacking_helper("invalid func unknown#211\n").as_deref(), Some("the helper of number 211"));
        assert_eq!(lacking_helper("invalid bpf_context access off=68 size=4\n"), None);
    }

    #[test]
    fn refused_program_is_named_with_errno_kernel_and_the_verifiers_last_lines() {
        let error = KernelError::Refused {
            program: "or_connect4",
            release: "6.1.0".to_owned(),
            source: io::Error::from_raw_os_error(libc::EACCES),
            log: last_lines("0: r1\n\n1: r2\n2: r3\ninvalid access\nprocessed 3 insns\n"),
        };
        assert_eq!(
            error.to_string(),
            "the kernel 6.1.0 refuses the program or_connect4: Permission denied (os error 13); \
             verifier: 1: r2 | 2: r3 | invalid access | processed 3 insns"
        );
        assert!(error.remedy().contains("Linux 6.1 or newer"));
        let fall = error.fall();
        assert_eq!((fall.hook.as_deref(), fall.errno), (Some("connect4"), Some(libc::EACCES)));
        assert_eq!(fall.verifier.as_deref(), Some("1: r2 | 2: r3 | invalid access | processed 3 insns"));
        assert_eq!(fall.text, error.to_string());
    }

    #[test]
    fn what_another_rung_would_not_mend_keeps_the_agent_from_falling() {
        assert!(KernelError::NoCgroup2.is_for_another_rung());
        assert!(KernelError::call("attach", io::Error::from_raw_os_error(libc::EPERM)).is_for_another_rung());
        assert!(!KernelError::Layout { path: "/run".into(), found: 1 }.is_for_another_rung());
        assert!(!KernelError::call("attach", io::Error::from_raw_os_error(libc::ENOMEM)).is_for_another_rung());
    }

    #[test]
    fn missing_capability_names_the_capabilities() {
        let error = KernelError::call("attach a program", io::Error::from_raw_os_error(libc::EPERM));
        assert!(error.remedy().contains("CAP_BPF"));
    }
}
