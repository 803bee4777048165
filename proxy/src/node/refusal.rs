//! Why the agent refuses what is asked of it at the enrolment socket, each reason with what to do about it.

use proxy_common::{PORT_INBOUND, PORT_OUTBOUND};

use super::enrolment::{CALLER_MAX, CONNECTIONS_MAX};
use super::kubernetes::admission::Refused;
use crate::base::names::Named;

/// Why a pod is not enrolled. Whoever sent the question is at fault, or whoever configured it.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Refusal {
    /// Not the protocol.
    #[error("the question cannot be read: {0}")]
    Unreadable(String),
    /// A newer sidecar.
    #[error("the question is of version {0}")]
    Version(u32),
    /// The caller's namespace belongs to no pod of this node.
    #[error("the caller (pid {pid}) is in no pod of this node; it asked for {asked}")]
    NoPod { pid: u32, asked: Named },
    /// One pod asks for another.
    #[error("the caller (pid {pid}) is in the pod {actual}, but asked for {asked}")]
    AnotherPod { pid: u32, actual: Named, asked: Named },
    /// A process of the pod that is not its sidecar.
    #[error("the caller (pid {pid}) is in cgroup {actual}, not in the sidecar's {expected}")]
    NotTheSidecar { pid: u32, actual: String, expected: String },
    /// Not one inbound listener and at most two outbound ones.
    #[error("{0} descriptors came with the question, and not the pod's listeners")]
    Descriptors(usize),
    /// Something else than a TCP socket.
    #[error("the descriptor is no TCP socket")]
    NotTcp,
    /// A listener made in another namespace.
    #[error("the listener is from another network namespace than the pod {0}")]
    ForeignListener(Named),
    /// A socket that does not listen.
    #[error("the socket does not listen")]
    NotListening,
    /// A listener at another port: it may be the app's.
    #[error("the listener is at port {0}, not at {PORT_INBOUND} or {PORT_OUTBOUND}")]
    OtherPort(u16),
    /// One namespace asks too often at once, or all of them do.
    #[error("too many connections at once: {CALLER_MAX} from one network namespace, {CONNECTIONS_MAX} in all")]
    TooMany,
    /// The pod that is waited for did not appear.
    #[error("no pod {0} appeared on this node")]
    NotAppeared(Named),
    /// The pod that is waited for is described, and cannot be enrolled.
    #[error("the pod {pod} cannot be enrolled, it stays closed: {why}")]
    Unenrolled { pod: Named, why: String, remedy: String },
    /// A question that needs a token came without one, or with one that is none.
    #[error("the question names no token")]
    NoToken,
    /// Somebody else than root asks for what is root's to ask.
    #[error("user {0} may not ask for that")]
    NotRoot(u32),
    /// What is asked for at the node's own socket, and not at a pod's.
    #[error("a pod's socket is not for that")]
    NotHere,
    /// What is asked for at a pod's socket on Kubernetes, and elsewhere.
    #[error("which containers of a pod run is known on Kubernetes alone")]
    OnlyOfKubernetes,
    /// Who asks at a pod's socket on Kubernetes.
    #[error(transparent)]
    Kubernetes(#[from] Refused),
    /// The kernel did not take the listener.
    #[error("the kernel refuses the listener: {0}")]
    Kernel(String),
}

impl Refusal {
    /// What to do about it.
    pub(crate) fn remedy(&self) -> &str {
        match self {
            Self::Unreadable(_) => "send one JSON line with outrigger, namespace and name",
            Self::NoToken => "send a token of 32 letters",
            Self::NotRoot(_) => "ask as root",
            Self::NotHere => "ask the node agent itself",
            Self::OnlyOfKubernetes => "ask at the socket of a pod of a cluster",
            Self::Kubernetes(refused) => refused.remedy(),
            Self::Version(_) => "run the sidecar and the node agent from one release",
            Self::NoPod { .. } => "start the sidecar inside a pod that `outrigger run` made",
            Self::AnotherPod { .. } => "give the sidecar the namespace and name of its own pod",
            Self::NotTheSidecar { .. } => "only the pod's sidecar may ask, in the cgroup in which it was enrolled",
            Self::Descriptors(_) => "send the inbound listener, the outbound ones, and nothing else with the question",
            Self::NotTcp | Self::NotListening => "send a TCP socket that listens",
            Self::ForeignListener(_) => "make the listener inside the pod",
            Self::OtherPort(_) => "send the sidecar's own listeners",
            Self::NotAppeared(_) => "look into the node agent's log for why the pod was not enrolled",
            Self::TooMany => "wait until others were answered, and ask again",
            Self::Unenrolled { remedy, .. } => remedy,
            Self::Kernel(_) => "look into the node agent's log",
        }
    }
}
