//! The second rung of capture: a ruleset of nftables in each pod's network namespace, for kernels that do not take the
//! programs, and agents that may not load them.
//!
//! It stands in the pod's namespace and goes with it; nothing of it is on the machine. A sidecar needs no capability here
//! either: the agent makes the listener that it is given transparent (`IP_TRANSPARENT`), so that netfilter may hand it what
//! was sent to others. Invariant: a ruleset takes the place of its former one in one transaction, never with a moment without.

mod listing;
mod program;
mod ruleset;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::path::{Component, Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use proxy_common::counters::{Counter, Counters};
use socket2::SockRef;
use tokio::time::Instant;
use tracing::debug;

use self::listing::Listing;
use self::program::Nft;
use self::ruleset::{TABLE, Wanted};
use super::kernel::{PodEntry, Watch, release};
use super::netns;
use crate::model::capture::CaptureConfig;

/// The rulesets of this machine's pods.
#[derive(Debug)]
pub(crate) struct Nftables {
    nft: Nft,
    cgroup_root: PathBuf,
    /// By the cookie of the pod's namespace. The map is locked for a moment; one pod's ruleset for as long as it is laid or
    /// looked at, so that nobody waits for another pod's.
    pods: Mutex<BTreeMap<u64, Arc<Mutex<Laid>>>>,
}

/// What was laid into one pod.
#[derive(Debug)]
struct Laid {
    text: String,
    listing: Listing,
    /// Counted by rulesets that were replaced.
    before: Counters,
    /// Counted by this one, when it was last looked at.
    now: Counters,
    /// When somebody asked for it last.
    looked: Option<Instant>,
}

/// Why a ruleset is not in force. Unless a variant says otherwise it is the environment's fault.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NftablesError {
    /// The program is not there.
    #[error("the program nft is not there")]
    Missing,
    /// The program does not start, or does not end.
    #[error("the program nft cannot be used")]
    Program {
        #[source]
        source: io::Error,
    },
    /// It says no.
    #[error("nft cannot {what} on the kernel {release}: {said}")]
    Refused { what: &'static str, release: String, said: String },
    /// The namespace cannot be entered.
    #[error("a network namespace cannot be entered")]
    Namespace {
        #[source]
        source: io::Error,
    },
    /// The listener cannot be made one that takes what was sent to others.
    #[error("the listener cannot be made transparent")]
    Listener {
        #[source]
        source: io::Error,
    },
    /// A rule cannot name such a cgroup.
    #[error("no rule can name the cgroup {0}")]
    Cgroup(PathBuf),
    /// The user: the pod asks for what this rung cannot do.
    #[error("nftables does not see what packet sockets send, so it cannot drop what gets past the pod's sidecar")]
    CannotEnforce,
}

impl Nftables {
    /// Finds the program and tries a whole ruleset in a namespace of its own, which is gone afterwards.
    ///
    /// # Errors
    /// The program, the kernel or this process's rights are not enough.
    pub(crate) fn open(cgroup_root: &Path) -> Result<Self, NftablesError> {
        let nft = Nft::find()?;
        let all = CaptureConfig::example();
        let addresses = [IpAddr::from([10, 0, 0, 1]), IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 1])];
        // There is no pod yet: the root stands for a sidecar's cgroup.
        let sidecar = below_cgroups(cgroup_root)?;
        let text = ruleset::text(&Wanted { sidecar: &sidecar, level: 1, addresses: &addresses, capture: &all });
        let tried = netns::in_a_new_one(|| Ok(nft.load_here(&text).and_then(|()| read(&nft.list_here(TABLE)?).map(drop))));
        tried.map_err(|source| NftablesError::Namespace { source })??;
        Ok(Self { nft, cgroup_root: cgroup_root.to_owned(), pods: Mutex::default() })
    }

    /// Lays the ruleset of a pod, in the place of the one that stands there.
    ///
    /// # Errors
    /// The pod keeps what it has.
    pub(crate) fn enrol(&self, pod: &PodEntry<'_>) -> Result<Watch, NftablesError> {
        if pod.capture.enforce {
            return Err(NftablesError::CannotEnforce);
        }
        let addresses: Vec<IpAddr> = pod.v4.map(IpAddr::V4).into_iter().chain(pod.v6.map(IpAddr::V6)).collect();
        let text = self.text(pod.sidecar_cgroup, &addresses, pod.capture)?;
        self.nft.load(pod.netns, &text)?;
        let netns = pod.netns.try_clone_to_owned().map_err(|source| NftablesError::Namespace { source })?;
        let (listing, now) = read(&self.nft.list(&File::from(netns), TABLE)?)?;
        let before = self.laid(pod.cookie).map_or(Counters::ZERO, |laid| laid.lock().counters());
        let laid = Laid { text, listing, before, now, looked: None };
        self.pods.lock().insert(pod.cookie, Arc::new(Mutex::new(laid)));
        Ok(Watch::Not("nftables does not see packet sockets".to_owned()))
    }

    /// Takes over what a former agent laid into a pod whose record is gone. It stays as it is; what is taken away of it is
    /// laid again without exceptions, for nobody tells any more which there were. `false`: nothing of ours stands there.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub(crate) fn adopt(&self, cookie: u64, netns: &File, sidecar_cgroup: &Path) -> Result<bool, NftablesError> {
        // The own addresses matter to exceptions alone.
        let text = self.text(sidecar_cgroup, &[], &CaptureConfig::default())?;
        let (listing, now) = match self.nft.list(netns, TABLE) {
            Ok(found) => read(&found)?,
            // There is no such table.
            Err(NftablesError::Refused { .. }) => return Ok(false),
            Err(error) => return Err(error),
        };
        let laid = Laid { text, listing, before: Counters::ZERO, now, looked: None };
        self.pods.lock().insert(cookie, Arc::new(Mutex::new(laid)));
        Ok(true)
    }

    /// The ruleset of a pod.
    fn text(&self, sidecar_cgroup: &Path, addresses: &[IpAddr], capture: &CaptureConfig) -> Result<String, NftablesError> {
        let sidecar = below_cgroups(sidecar_cgroup)?;
        let level = sidecar_cgroup.strip_prefix(&self.cgroup_root).map(|below| below.components().count());
        let level = level.map_err(|_elsewhere| NftablesError::Cgroup(sidecar_cgroup.to_owned()))?;
        Ok(ruleset::text(&Wanted { sidecar: &sidecar, level, addresses, capture }))
    }

    /// Lets `listener` take what arrives for others: the rules name it by its port.
    ///
    /// # Errors
    /// This process may not.
    pub(crate) fn register_listener(&self, listener: BorrowedFd<'_>) -> Result<(), NftablesError> {
        // One flag of the socket for both families, as the kernel keeps it.
        SockRef::from(&listener).set_ip_transparent_v4(true).map_err(|source| NftablesError::Listener { source })
    }

    /// Forgets a pod that is gone. Its ruleset goes with its namespace.
    pub(crate) fn forget(&self, cookie: u64) {
        self.pods.lock().remove(&cookie);
    }

    /// Looks whether the pod's ruleset is as it was laid, lays it again where it is not, and reads what was counted. Tells
    /// what was wrong.
    ///
    /// # Errors
    /// It cannot be looked at, or not be laid again.
    pub(crate) fn attest(&self, cookie: u64, netns: &Path) -> Result<Option<String>, NftablesError> {
        let Some(laid) = self.laid(cookie) else { return Ok(None) };
        let mut laid = laid.lock();
        let netns = File::open(netns).map_err(|source| NftablesError::Namespace { source })?;
        let found = self.nft.list(&netns, TABLE).and_then(|text| read(&text));
        if let Ok((listing, now)) = &found
            && *listing == laid.listing
        {
            laid.now = *now;
            return Ok(None);
        }
        self.nft.load(&netns, &laid.text)?;
        // What a ruleset had counted that somebody took away is what was last seen of it.
        let last = found.map_or(laid.now, |(_changed, now)| now);
        laid.before = sum(&laid.before, &last);
        let (listing, now) = read(&self.nft.list(&netns, TABLE)?)?;
        laid.listing = listing;
        laid.now = now;
        Ok(Some("somebody changed the pod's ruleset of nftables; it was put back".to_owned()))
    }

    /// What was counted for a pod, as of a moment ago. Where it cannot be looked at, as of the last time that it could.
    pub(crate) fn counters(&self, cookie: u64, netns: &Path) -> Option<Counters> {
        let laid = self.laid(cookie)?;
        let mut laid = laid.lock();
        if laid.looked.is_none_or(|looked| looked.elapsed() > FRESH) {
            let counted = File::open(netns)
                .map_err(|source| NftablesError::Namespace { source })
                .and_then(|netns| self.nft.count(&netns, TABLE))
                .and_then(|text| read(&text));
            match counted {
                Ok((_counters, now)) => laid.now = now,
                Err(error) => debug!(error = super::chain(&error), cookie, "a pod's counters cannot be read"),
            }
            laid.looked = Some(Instant::now());
        }
        Some(laid.counters())
    }

    fn laid(&self, cookie: u64) -> Option<Arc<Mutex<Laid>>> {
        self.pods.lock().get(&cookie).map(Arc::clone)
    }
}

impl Laid {
    fn counters(&self) -> Counters {
        sum(&self.before, &self.now)
    }
}

impl NftablesError {
    /// What the operator can do about it.
    pub(crate) const fn remedy(&self) -> &'static str {
        match self {
            Self::Missing => "install it (Debian: apt-get install nftables)",
            Self::Program { .. } => "run `nft --version` to see what is wrong with it",
            Self::Refused { .. } => {
                "use a kernel with CONFIG_NFT_TPROXY, CONFIG_NFT_REDIR, CONFIG_NFT_SOCKET, CONFIG_NFT_FIB_INET and \
                 CONFIG_NFT_REJECT_INET, nft 1.0 or newer with JSON, and CAP_NET_ADMIN"
            }
            Self::Namespace { .. } => "run as root, or with CAP_SYS_ADMIN and CAP_NET_ADMIN",
            Self::Listener { .. } => "run as root, or with CAP_NET_ADMIN",
            Self::Cgroup(_) => "mount cgroup2 where its path has neither quotes nor line ends",
            Self::CannotEnforce => "run the pod without the annotation outrigger.dev/capture=enforce, or where eBPF captures",
        }
    }

    fn refused(what: &'static str, output: &Output) -> Self {
        let said = String::from_utf8_lossy(&output.stderr);
        let first = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
        Self::Refused { what, release: release(), said: first.trim().to_owned() }
    }
}

fn read(text: &str) -> Result<(Listing, Counters), NftablesError> {
    listing::parse(text).map_err(|source| NftablesError::Program { source })
}

fn sum(one: &Counters, other: &Counters) -> Counters {
    let mut sum = *one;
    for counter in Counter::ALL {
        if let Some(place) = sum.0.get_mut(counter as usize) {
            *place = place.saturating_add(other.of(counter));
        }
    }
    sum
}

/// A cgroup's folder as nft(8) names it: as seen from [`CGROUPS`], wherever the hierarchy is mounted.
fn below_cgroups(cgroup: &Path) -> Result<String, NftablesError> {
    let path = match cgroup.strip_prefix(CGROUPS) {
        Ok(below) => below.to_owned(),
        Err(_elsewhere) => {
            let up = Path::new(CGROUPS).components().filter(|part| matches!(part, Component::Normal(_))).map(|_part| "..");
            up.collect::<PathBuf>().join(cgroup.strip_prefix("/").unwrap_or(cgroup))
        }
    };
    let text = if path.as_os_str().is_empty() { Some(".") } else { path.to_str() };
    let plain = text.filter(|text| !text.contains(['"', '\\', '\n']));
    plain.map(str::to_owned).ok_or_else(|| NftablesError::Cgroup(cgroup.to_owned()))
}

/// To look is to run a program: those who ask for every pod at once shall not wait twice.
const FRESH: Duration = Duration::from_millis(100);
/// Where nft(8) looks for cgroups.
const CGROUPS: &str = "/sys/fs/cgroup";
