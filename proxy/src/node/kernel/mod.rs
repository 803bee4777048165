//! The kernel programs: load, attach once at the cgroup2 root, pin, enrol pods, take listeners, remove. With `maps.rs`
//! the only room that knows aya.
//!
//! Sources: the kernel's `Documentation/bpf/{prog_sk_lookup,prog_cgroup_sockopt}.rst` and `include/uapi/linux/bpf.h`.
//! Invariant: what is pinned goes on without this process; a pod is enrolled before its sidecar starts, so that nothing
//! of it is ever uncaptured, and nothing is detached while its pod runs.
#![expect(unsafe_code, reason = "bpf(2) where aya has no function for it, and records that the kernel lays out")]

mod attest;
mod closed;
mod conflicts;
mod error;
mod layout;
mod links;
mod programs;
mod records;
mod survey;

#[cfg(test)]
pub(in crate::node) mod tests;
#[cfg(test)]
mod verdicts;

use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use aya::programs::ProgramInfo;
use proxy_common::address::Address;
use proxy_common::counters::Counters;
use proxy_common::pods::{ENFORCES, POD_LINKS_MAX, Pod, WATCHED};
use rustix::mount::{MountFlags, UnmountFlags};

pub(crate) use attest::Fault;
pub(crate) use conflicts::Conflict;
pub(crate) use error::{KernelError, release};
use links::{Place, Target};
use programs::Program;
pub(crate) use records::Flows;
pub(crate) use survey::{Others, others_at_root, others_in_pod, try_programs};

use super::maps::{self, Exclusions, Maps};
use super::rtnetlink::{give_number, number_of};
use crate::model::capture::CaptureConfig;

/// The loaded programs and their maps, pinned. Dropping it detaches nothing.
pub(crate) struct Kernel {
    pins: PathBuf,
    cgroup_root: PathBuf,
    maps: Maps,
    /// Whether this process attached programs, or found them attached.
    adopted: bool,
    log: bool,
}

/// How to load.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    /// The programs write rare events into the log, see [`Kernel::log`].
    pub(crate) log: bool,
    /// Bytes of the flow records that wait to be read, a power of two of pages; none: as many as the object says.
    pub(crate) flows_bytes: Option<u32>,
}

/// A pod to enrol.
#[derive(Debug)]
pub(crate) struct PodEntry<'a> {
    /// Cookie of its network namespace (`SO_NETNS_COOKIE` of a socket made in it).
    pub(crate) cookie: u64,
    /// Its IPv4 address.
    pub(crate) v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub(crate) v6: Option<Ipv6Addr>,
    /// The cgroup2 folder whose tasks are its sidecar; the folder's inode is the cgroup's id.
    pub(crate) sidecar_cgroup: &'a Path,
    /// Its network namespace (`/run/netns/…`, `/proc/PID/ns/net`, or `SIOCGSKNS` of a socket).
    pub(crate) netns: BorrowedFd<'a>,
    /// What its owner asks of its capture.
    pub(crate) capture: &'a CaptureConfig,
    /// The node's ends of its links, by number in this process's network namespace.
    pub(crate) links: &'a [u32],
}

/// Whether a pod's link is watched for what gets past its sidecar.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Watch {
    Watched,
    /// Why it is not.
    Not(String),
}

/// A pod that is enrolled, as the maps say.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Enrolled {
    /// Cookie of its network namespace.
    pub(crate) cookie: u64,
    /// Its IPv4 address.
    pub(crate) v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub(crate) v6: Option<Ipv6Addr>,
    /// Id of its sidecar's cgroup.
    pub(crate) sidecar_cgroup_id: u64,
}

impl Enrolled {
    fn of((cookie, pod): (u64, Pod)) -> Self {
        let ip = |address: Address| (address != Address::NONE).then(|| IpAddr::from(address));
        Self {
            cookie,
            v4: ip(pod.v4).and_then(|ip| if let IpAddr::V4(v4) = ip { Some(v4) } else { None }),
            v6: ip(pod.v6).and_then(|ip| if let IpAddr::V6(v6) = ip { Some(v6) } else { None }),
            sidecar_cgroup_id: pod.sidecar_cgroup,
        }
    }
}

impl Kernel {
    /// Loads the programs, attaches them once at `cgroup_root` and pins all of it under `pins`, a folder on a bpffs (see
    /// [`mount_bpffs`]). Where pins stand, adopts them: attached programs of this build go on untouched, those of another
    /// build or of an earlier layout are replaced in place. Pods whose namespace is gone are forgotten.
    pub(crate) fn open(pins: &Path, cgroup_root: &Path, options: Options) -> Result<Self, KernelError> {
        fs::create_dir_all(pins).map_err(|error| KernelError::file("make", pins, error))?;
        if !is_bpffs(pins)? {
            return Err(KernelError::NotBpffs { path: pins.to_owned() });
        }
        let (layout, print) = (u64::from(proxy_common::LAYOUT), programs::print(options.log));
        let found = layout::found(pins)?;
        let adopted = found == Some((layout, print)) && is_complete(pins);
        if !adopted {
            if let Some((found, _)) = found {
                // The mark says so first, and is good again last: a crash in between is found out.
                maps::mark_build(pins, found, 0)?;
                layout::take_over(pins, found)?;
            }
            attach(pins, cgroup_root, options)?;
            maps::mark_build(pins, layout, print)?;
        }
        layout::forget_former(pins)?;
        let mut kernel = Self {
            pins: pins.to_owned(),
            cgroup_root: cgroup_root.to_owned(),
            maps: Maps::open(pins)?,
            adopted,
            log: options.log,
        };
        kernel.forget_half()?;
        kernel.forget_gone()?;
        Ok(kernel)
    }

    /// Did it find its programs attached already?
    pub(crate) const fn is_adopted(&self) -> bool {
        self.adopted
    }

    /// Enrols a pod: from here its connections go to its sidecar, and what arrives is dropped until a listener is
    /// registered. Idempotent; a changed address or cgroup replaces the former. After an error a pod that is new is not
    /// enrolled, and one that was enrolled stays so as far as it goes: to withdraw it would open it.
    pub(crate) fn enrol(&mut self, pod: &PodEntry<'_>) -> Result<Watch, KernelError> {
        if pod.v4.is_none() && pod.v6.is_none() {
            return Err(KernelError::NoAddress { cookie: pod.cookie });
        }
        let new = self.maps.pod(pod.cookie)?.is_none();
        let result = self.try_enrol(pod);
        if result.is_err()
            && new
            && let Err(error) = self.withdraw(pod.cookie)
        {
            tracing::warn!(%error, cookie = pod.cookie, "a half enrolled pod could not be withdrawn");
        }
        result
    }

    /// Gives what arrives at the pod's addresses to `listener`, which must be listening. The kernel forgets it when its
    /// last descriptor closes.
    pub(crate) fn register_listener(&mut self, cookie: u64, listener: BorrowedFd<'_>) -> Result<(), KernelError> {
        let pod = self.maps.pod(cookie)?.ok_or(KernelError::NotEnrolled { cookie })?;
        self.maps.put_listener(pod, listener.as_raw_fd())
    }

    /// Forgets a pod. Only for a pod that is gone: a running one would be open afterwards. Idempotent.
    pub(crate) fn withdraw(&mut self, cookie: u64) -> Result<(), KernelError> {
        for program in pod_programs() {
            links::detach(&self.pod_pin(program, cookie))?;
        }
        for place in 0..POD_LINKS_MAX {
            links::detach(&self.device_pin(cookie, place))?;
        }
        self.maps.remove_pod(cookie)
    }

    /// The enrolled pods, by cookie.
    pub(crate) fn enrolled(&self) -> Result<Vec<Enrolled>, KernelError> {
        Ok(self.maps.pods()?.into_iter().map(Enrolled::of).collect())
    }

    /// The pod that is enrolled with this cookie.
    pub(crate) fn find(&self, cookie: u64) -> Result<Option<Enrolled>, KernelError> {
        Ok(self.maps.pod(cookie)?.map(|pod| Enrolled::of((cookie, pod))))
    }

    /// The cookie of the pod that is enrolled with this address.
    pub(crate) fn holder(&self, address: IpAddr) -> Result<Option<u64>, KernelError> {
        self.maps.holder(Address::from(address))
    }

    /// Withdraws every pod whose network namespace is gone; its link points nowhere, but its pins would stay for ever.
    /// Returns their cookies.
    pub(crate) fn forget_gone(&mut self) -> Result<Vec<u64>, KernelError> {
        let mut gone = Vec::new();
        for (cookie, _) in self.maps.pods()? {
            let alive = match links::open(&self.pod_pin(programs::INBOUND, cookie))? {
                Some(link) => matches!(links::target(link.as_fd()), Ok(Target::Netns(_))),
                None => false,
            };
            if !alive {
                self.withdraw(cookie)?;
                gone.push(cookie);
            }
        }
        Ok(gone)
    }

    /// Removes what a process left that was killed while it enrolled or withdrew a pod: links without a pod, and what else
    /// is keyed by it. The programs know pods by the map of them, so nothing that is in force ends here.
    fn forget_half(&mut self) -> Result<(), KernelError> {
        for program in pod_programs().chain([programs::LINK]) {
            for pin in pins_of_pods(&self.pins, program)? {
                let is_pod = cookie_of(&pin, program).map_or(Ok(None), |cookie| self.maps.pod(cookie))?.is_some();
                if !is_pod {
                    links::detach(&pin)?;
                }
            }
        }
        self.maps.sweep()
    }

    /// What the programs counted for a pod since its enrolment, summed over CPUs; `None` if it is not enrolled.
    pub(crate) fn counters(&self, cookie: u64) -> Result<Option<Counters>, KernelError> {
        self.maps.counters(cookie)
    }

    /// The flow records, for one reader; inside a runtime.
    pub(crate) fn flows(&self) -> Result<Flows, KernelError> {
        Flows::open(&self.pins)
    }

    /// The programs' rare events, if [`Options::log`] is on: a future that writes them into the log until it is dropped.
    /// Inside a runtime.
    pub(crate) fn log(&self) -> Result<Option<impl Future<Output = ()> + Send + use<>>, KernelError> {
        if !self.log {
            return Ok(None);
        }
        let path = self.pins.join(program_pin(programs::INBOUND));
        let info = ProgramInfo::from_pin(&path).map_err(|error| KernelError::file("open", path, io::Error::other(error)))?;
        records::log(info.id()).map(Some)
    }

    /// Detaches every program and removes every pin below `pins`. Safe after a crash and where nothing stands.
    /// Only when no pod runs any more: a running one would be open afterwards.
    pub(crate) fn remove_all(pins: &Path) -> Result<(), KernelError> {
        let entries = match fs::read_dir(pins) {
            Ok(entries) => entries,
            // A file in its place keeps pins from being there.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(()),
            Err(error) => return Err(KernelError::file("list", pins, error)),
        };
        if !is_bpffs(pins)? {
            return Ok(());
        }
        for entry in entries {
            let entry = entry.map_err(|error| KernelError::file("list", pins, error))?;
            // The kernel's own files (`maps.debug`, `progs.debug`) stay; no pin of ours has a dot.
            if !entry.file_name().as_encoded_bytes().contains(&b'.') {
                links::detach(&entry.path())?;
            }
        }
        Ok(())
    }

    fn try_enrol(&mut self, pod: &PodEntry<'_>) -> Result<Watch, KernelError> {
        let cgroup = open_folder(pod.sidecar_cgroup)?;
        let cgroup_id = cgroup.metadata().map_err(|error| KernelError::file("look at", pod.sidecar_cgroup, error))?.ino();
        let netns =
            rustix::fs::fstat(pod.netns).map_err(|error| KernelError::file("look at", "the pod's namespace", error))?.st_ino;
        let pin = |program| self.pod_pin(program, pod.cookie);
        self.link(programs::INBOUND, &pin(programs::INBOUND), Place::Open(pod.netns), Target::Netns(netns))?;
        if let Some(others) = others_in_pod(pod.netns, &self.pins)? {
            return Err(KernelError::Foreign { others: others.programs.join(", ") });
        }
        for program in programs::SIDECAR {
            self.link(program, &pin(program), Place::Open(cgroup.as_fd()), Target::Cgroup(cgroup_id))?;
        }
        let (watch, number) = self.watch(pod)?;
        let address = |ip: Option<IpAddr>| ip.map_or(Address::NONE, Address::from);
        let former = self.maps.pod(pod.cookie)?.map_or(0, |former| former.flags);
        let before = self.maps.excluded(pod.cookie, former)?;
        let asked = Exclusions::new(pod.cookie, pod.capture);
        let watched = if watch == Watch::Watched { WATCHED } else { 0 };
        let flags = asked.flags() | watched | if pod.capture.enforce { ENFORCES } else { 0 };
        let (v4, v6) = (address(pod.v4.map(IpAddr::V4)), address(pod.v6.map(IpAddr::V6)));
        let entry = Pod { sidecar_cgroup: cgroup_id, v4, v6, flags, number, links: ends(pod.links) };
        // What is excluded from now on stands before the pod says that there is some; what no longer is goes afterwards.
        let put = self.maps.exclude(&asked, &before).and_then(|()| self.maps.put_pod(pod.cookie, entry));
        if let Err(error) = put {
            // What found room would be in force by what the pod says already.
            self.maps.restore_excluded(pod.cookie, &before)?;
            return Err(error);
        }
        self.maps.keep_excluded(pod.cookie, former, &asked)?;
        Ok(watch)
    }

    /// Has the node's ends of a pod's links watched, and says by which [`Pod::number`] the programs there ask the pod's TCP. Where
    /// that cannot be, a pod whose owner insists on it is refused.
    fn watch(&self, pod: &PodEntry<'_>) -> Result<(Watch, u32), KernelError> {
        let mut watch = match pod.links.len() {
            0 => Watch::Not("no device of this node is paired with one of the pod".to_owned()),
            1..=POD_LINKS_MAX => Watch::Watched,
            more => Watch::Not(format!("the pod has {more} links, of which {POD_LINKS_MAX} are watched")),
        };
        for place in 0..POD_LINKS_MAX {
            let pin = self.device_pin(pod.cookie, place);
            match pod.links.get(place) {
                None => links::detach(&pin)?,
                Some(device) => {
                    let linked = self.link(programs::LINK, &pin, Place::Device(*device), Target::Device(*device));
                    if let Err(error) = linked
                        && watch == Watch::Watched
                    {
                        watch = Watch::Not(crate::node::chain(&error));
                    }
                }
            }
        }
        let mut number = 0;
        if watch == Watch::Watched {
            match give_number(&pod.netns).and_then(|()| number_of(&pod.netns)) {
                Ok(known) => number = known.map_or(0, |known| known.saturating_add(1)),
                Err(error) => watch = Watch::Not(format!("the pod's network namespace gets no number of the node's: {error}")),
            }
        }
        match watch {
            Watch::Not(reason) if pod.capture.enforce => Err(KernelError::NotWatched { reason }),
            watch => Ok((watch, number)),
        }
    }

    /// Attaches `program` and pins the link at `pin`, unless that is so already. A link that has another program gets ours.
    fn link(&self, program: Program, pin: &Path, to: Place<'_>, target: Target) -> Result<(), KernelError> {
        let pinned = self.pins.join(program_pin(program));
        let loaded =
            links::open(&pinned)?.ok_or_else(|| KernelError::file("open", &pinned, io::Error::from(io::ErrorKind::NotFound)))?;
        if let Some(link) = links::open(pin)? {
            match links::info(link.as_fd()) {
                Ok((found, attached)) if found == target => {
                    let is_ours = links::program_id(loaded.as_fd()).is_ok_and(|ours| ours == attached);
                    let is_first = |device| links::first_at_device(device).is_ok_and(|first| first == Some(attached));
                    match to {
                        // There is no moving a link; for a moment neither is asked.
                        Place::Device(device) if is_ours && !is_first(device) => links::detach(pin)?,
                        _ if is_ours => return Ok(()),
                        _ => return replace(pin, &loaded).map(drop),
                    }
                }
                _elsewhere => links::detach(pin)?,
            }
        }
        let link = links::create(loaded.as_fd(), to, program.hook)
            .map_err(|error| KernelError::call(format!("attach the program {}", program.name), error))?;
        links::pin(link.as_fd(), pin)
    }

    /// The pin of the program at one of the node's ends of a pod's links.
    fn device_pin(&self, cookie: u64, place: usize) -> PathBuf {
        self.pins.join(format!("{}_{cookie}_{place}", programs::LINK.name))
    }

    fn pod_pin(&self, program: Program, cookie: u64) -> PathBuf {
        self.pins.join(format!("{}_{cookie}", program.name))
    }
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel").field("pins", &self.pins).finish_non_exhaustive()
    }
}

/// Where cgroup2 is mounted: `/sys/fs/cgroup` on most systems, `/sys/fs/cgroup/unified` on hybrid ones.
pub(crate) fn find_cgroup2() -> Result<PathBuf, KernelError> {
    let path = "/proc/self/mountinfo";
    let mounts = fs::read_to_string(path).map_err(|error| KernelError::file("read", path, error))?;
    cgroup2_in(&mounts).ok_or(KernelError::NoCgroup2)
}

/// Mounts a bpffs of our own at `folder`, which is made if missing; nothing where one stands.
pub(crate) fn mount_bpffs(folder: &Path) -> Result<(), KernelError> {
    if let Err(error) = fs::create_dir_all(folder) {
        // In a file system of the kernel's that has no folders but its own, as `/sys/fs` is without a bpffs at `/sys/fs/bpf`.
        let above = folder.parent().filter(|above| above.starts_with("/sys") && is_bpffs(above).is_ok_and(|is_one| !is_one));
        return Err(match above {
            Some(above) => KernelError::NotBpffs { path: above.to_owned() },
            None => KernelError::file("make", folder, error),
        });
    }
    if is_bpffs(folder)? {
        return Ok(());
    }
    rustix::mount::mount("bpf", folder, "bpf", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, c"mode=0700")
        .map_err(|error| KernelError::Mount { path: folder.to_owned(), release: release(), source: error.into() })
}

/// Unmounts what [`mount_bpffs`] mounted; nothing where none stands. Whoever still looks at it keeps what they see.
pub(crate) fn unmount_bpffs(folder: &Path) -> Result<(), KernelError> {
    if !folder.exists() || !is_bpffs(folder)? {
        return Ok(());
    }
    rustix::mount::unmount(folder, UnmountFlags::DETACH).map_err(|error| KernelError::file("unmount", folder, error))
}

/// Loads the programs, attaches those of the node, pins them all. A link that stands gets the new program in place.
fn attach(pins: &Path, cgroup_root: &Path, options: Options) -> Result<(), KernelError> {
    let root = open_folder(cgroup_root)?;
    for (program, loaded) in programs::load(pins, options)? {
        links::pin(loaded.as_fd(), &pins.join(program_pin(program)))?;
        if programs::NODE.iter().any(|node| node.name == program.name) {
            let pin = pins.join(link_pin(program));
            if !replace(&pin, &loaded)? {
                let link = links::create(loaded.as_fd(), Place::Open(root.as_fd()), program.hook)
                    .map_err(|error| KernelError::call(format!("attach the program {}", program.name), error))?;
                links::pin(link.as_fd(), &pin)?;
            }
        } else {
            for pin in pins_of_pods(pins, program)? {
                replace(&pin, &loaded)?;
            }
        }
    }
    Ok(())
}

/// Puts `program` in the place of the one that the link pinned at `pin` has. `false` if there is none, or it points nowhere.
fn replace(pin: &Path, program: &OwnedFd) -> Result<bool, KernelError> {
    let Some(link) = links::open(pin)? else { return Ok(false) };
    if links::target(link.as_fd()).is_ok_and(|target| target == Target::Gone) {
        return Ok(false);
    }
    links::update(link.as_fd(), program.as_fd())
        .map_err(|error| KernelError::call(format!("replace the program at {}", pin.display()), error))?;
    Ok(true)
}

/// Pins of the links of `program` to pods.
fn pins_of_pods(pins: &Path, program: Program) -> Result<Vec<PathBuf>, KernelError> {
    let prefix = format!("{}_", program.name);
    let mut found = Vec::new();
    for entry in fs::read_dir(pins).map_err(|error| KernelError::file("list", pins, error))? {
        let entry = entry.map_err(|error| KernelError::file("list", pins, error))?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix)) {
            found.push(entry.path());
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// As many of a pod's links as are watched.
fn ends(links: &[u32]) -> [u32; POD_LINKS_MAX] {
    let mut ends = [0; POD_LINKS_MAX];
    for (end, link) in ends.iter_mut().zip(links) {
        *end = *link;
    }
    ends
}

/// Does every pin of the node stand, and is every program of the node attached?
fn is_complete(pins: &Path) -> bool {
    maps::PINNED.into_iter().all(|map| maps::pin(pins, map).exists())
        && programs::all().all(|program| pins.join(program_pin(program)).exists())
        && programs::NODE.into_iter().all(|program| is_attached(&pins.join(link_pin(program))))
}

/// Does the link pinned there lead anywhere?
fn is_attached(pin: &Path) -> bool {
    let link = links::open(pin).ok().flatten();
    link.is_some_and(|link| links::target(link.as_fd()).is_ok_and(|target| target != Target::Gone))
}

/// The pod whose pin this is of `program`: the cookie stands behind the name, perhaps with more behind it.
fn cookie_of(pin: &Path, program: Program) -> Option<u64> {
    let rest = pin.file_name()?.to_str()?.strip_prefix(program.name)?.strip_prefix('_')?;
    rest.split('_').next()?.parse().ok()
}

fn pod_programs() -> impl Iterator<Item = Program> {
    [programs::INBOUND].into_iter().chain(programs::SIDECAR)
}

fn program_pin(program: Program) -> String {
    format!("program_{}", program.name)
}

fn link_pin(program: Program) -> String {
    format!("link_{}", program.name)
}

fn open_folder(path: &Path) -> Result<File, KernelError> {
    File::open(path).map_err(|error| KernelError::file("open", path, error))
}

fn is_bpffs(path: &Path) -> Result<bool, KernelError> {
    /// `BPF_FS_MAGIC` of `include/uapi/linux/magic.h`.
    const MAGIC: u64 = 0xcafe_4a11;
    let found = rustix::fs::statfs(path).map_err(|error| KernelError::file("look at", path, error))?;
    Ok(u64::try_from(found.f_type).is_ok_and(|kind| kind & 0xffff_ffff == MAGIC))
}

/// A mount of the whole cgroup2 hierarchy in the text of `mountinfo` (proc_pid_mountinfo(5)): the first one with the machine's own
/// root. In a cgroup namespace that is written as the way up to it (`/../..`), and `/` is then the namespace's part alone.
fn cgroup2_in(mounts: &str) -> Option<PathBuf> {
    let found = mounts.lines().filter_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, at) = (fields.next()?, fields.next()?);
        // A container's view of a part of the hierarchy has another root, and its id would not be the machine's.
        let is_up = root == "/" || root.split('/').skip(1).all(|part| part == "..");
        (filesystem.starts_with("cgroup2 ") && is_up).then(|| (root.len(), PathBuf::from(at)))
    });
    // The first one of those that lead up the farthest.
    found.rev().max_by_key(|(length, _at)| *length).map(|(_length, at)| at)
}
