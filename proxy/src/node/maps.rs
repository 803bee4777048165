//! Typed views over the maps. Their names, keys and values are `proxy_common`'s.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuHashMap, PerCpuValues, RingBuf, SockHash};
use aya::pin::PinError;
use ipnet::IpNet;
use proxy_common::address::Address;
use proxy_common::arrivals::ARRIVALS;
use proxy_common::counters::{COUNTERS, COUNTERS_LEN, Counters};
use proxy_common::exclusions::{EXCLUDED_CIDRS, EXCLUDED_PORTS, FAMILY_V4, FAMILY_V6, Network, PortKey};
use proxy_common::flows::{Direction, FLOWS};
use proxy_common::originals::ORIGINALS;
use proxy_common::owndials::OWN_DIALS;
use proxy_common::pods::{
    ADDRESSES, EXCLUDES_INBOUND_PORTS, EXCLUDES_OUTBOUND_CIDRS, EXCLUDES_OUTBOUND_PORTS, LINKS, LISTENERS, PODS, Pod,
};
use proxy_common::sockets::SOCKETS;

use super::kernel::KernelError;
use crate::model::capture::{self, CaptureConfig};

/// Every map that is pinned, by name.
pub(super) const PINNED: [&str; 12] =
    [PODS, ADDRESSES, LISTENERS, SOCKETS, ORIGINALS, OWN_DIALS, ARRIVALS, COUNTERS, FLOWS, EXCLUDED_PORTS, EXCLUDED_CIDRS, LINKS];

/// Maps that changed since the first layout that is taken over, each with the layout of its last change.
const CHANGED: [(&str, u32); 1] = [(COUNTERS, 4)];

/// Where a map is pinned. The layout of its last change is part of the name: maps of two layouts stand side by side while
/// one is taken over.
pub(super) fn pin(pins: &Path, map: &str) -> PathBuf {
    pins.join(pin_name(map))
}

fn pin_name(map: &str) -> String {
    match CHANGED.iter().find(|(name, _since)| *name == map) {
        Some((name, since)) => format!("{name}_{since}"),
        None => map.to_owned(),
    }
}

/// Is `pin` the name of one of the maps as it was before it changed?
pub(super) fn is_former(pin: &str) -> bool {
    CHANGED.iter().any(|(name, _since)| {
        let rest = pin.strip_prefix(name).filter(|rest| rest.is_empty() || rest.starts_with('_'));
        rest.is_some() && pin != pin_name(name)
    })
}

/// What the pins are of: the number of their layout and the print of the object they were loaded from.
pub(super) const BUILD: &str = "BUILD";

/// Most pods of one node. The object, which says less, is told.
pub(super) const PODS_ROOM: u32 = 16_384;
/// Most addresses of the pods of one node: IPv4 and IPv6 of each.
pub(super) const ADDRESSES_ROOM: u32 = 2 * PODS_ROOM;

/// Most watched links of the pods of one node.
pub(super) const LINKS_ROOM: u32 = 2 * PODS_ROOM;

/// Pods that may exclude all that one pod may, and leave the others as much: several times what a kubelet runs. More of
/// them would have the kernel set aside more for the table itself, which is 2 MiB.
const EXCLUDING_ROOM: u32 = 1_024;
/// Most excluded ports of the pods of one node, out of and into each.
pub(super) const PORTS_ROOM: u32 = 2 * capture::MOST * EXCLUDING_ROOM;
/// Most excluded networks of the pods of one node.
pub(super) const CIDRS_ROOM: u32 = capture::MOST * EXCLUDING_ROOM;

/// Makes the maps that have entries for each pod, unless they stand. Their entries take memory as pods come
/// (`BPF_F_NO_PREALLOC`): the counters of each CPU for as many pods as there may be would be hundreds of megabytes on a
/// large machine. Only user space makes entries of them, so that no program ever waits for memory.
pub(super) fn make(pins: &Path) -> Result<(), KernelError> {
    make_one(pins, PODS, |at| Ok(HashMap::<MapData, u64, Pod>::create(PODS_ROOM, BPF_F_NO_PREALLOC)?.pin(at)))?;
    make_one(pins, ADDRESSES, |at| Ok(HashMap::<MapData, Address, u64>::create(ADDRESSES_ROOM, BPF_F_NO_PREALLOC)?.pin(at)))?;
    make_one(pins, LINKS, |at| Ok(HashMap::<MapData, u32, u64>::create(LINKS_ROOM, BPF_F_NO_PREALLOC)?.pin(at)))?;
    make_one(pins, EXCLUDED_PORTS, |at| Ok(HashMap::<MapData, PortKey, u32>::create(PORTS_ROOM, BPF_F_NO_PREALLOC)?.pin(at)))?;
    make_one(pins, COUNTERS, |at| Ok(PerCpuHashMap::<MapData, u64, Counters>::create(PODS_ROOM, BPF_F_NO_PREALLOC)?.pin(at)))
}

fn make_one(
    pins: &Path,
    name: &'static str,
    make: impl FnOnce(&Path) -> Result<Result<(), PinError>, MapError>,
) -> Result<(), KernelError> {
    let at = pin(pins, name);
    if at.exists() {
        return Ok(());
    }
    let pinned = make(&at).map_err(|error| KernelError::map(name, error))?;
    pinned.map_err(|error| KernelError::map(name, MapError::PinError { name: Some(name.to_owned()), error }))
}

/// Of `include/uapi/linux/bpf.h`.
const BPF_F_NO_PREALLOC: u32 = 1;

/// The maps that user space writes and reads.
pub(super) struct Maps {
    pods: HashMap<MapData, u64, Pod>,
    addresses: HashMap<MapData, Address, u64>,
    listeners: SockHash<MapData, Address>,
    counters: PerCpuHashMap<MapData, u64, Counters>,
    links: HashMap<MapData, u32, u64>,
    ports: HashMap<MapData, PortKey, u32>,
    cidrs: LpmTrie<MapData, Network, u32>,
}

impl Maps {
    /// Opens them where they are pinned.
    pub(super) fn open(pins: &Path) -> Result<Self, KernelError> {
        Ok(Self {
            pods: open(pins, PODS, Map::HashMap)?,
            addresses: open(pins, ADDRESSES, Map::HashMap)?,
            listeners: open(pins, LISTENERS, Map::SockHash)?,
            counters: open(pins, COUNTERS, Map::PerCpuHashMap)?,
            links: open(pins, LINKS, Map::HashMap)?,
            ports: open(pins, EXCLUDED_PORTS, Map::HashMap)?,
            cidrs: open(pins, EXCLUDED_CIDRS, Map::LpmTrie)?,
        })
    }

    pub(super) fn pod(&self, cookie: u64) -> Result<Option<Pod>, KernelError> {
        some(self.pods.get(&cookie, 0)).map_err(|error| KernelError::map(PODS, error))
    }

    /// All pods, by cookie.
    pub(super) fn pods(&self) -> Result<Vec<(u64, Pod)>, KernelError> {
        let mut pods: Vec<_> = self.pods.iter().collect::<Result<_, _>>().map_err(|error| KernelError::map(PODS, error))?;
        pods.sort_unstable_by_key(|(cookie, _)| *cookie);
        Ok(pods)
    }

    /// The cookie of the pod that has this address.
    pub(super) fn holder(&self, address: Address) -> Result<Option<u64>, KernelError> {
        some(self.addresses.get(&address, 0)).map_err(|error| KernelError::map(ADDRESSES, error))
    }

    /// Writes a pod and its addresses. Its counters begin at nothing if it is new.
    pub(super) fn put_pod(&mut self, cookie: u64, pod: Pod) -> Result<(), KernelError> {
        if let Some(former) = self.pod(cookie)? {
            // With another sidecar it loses its listener, with other addresses those that it has no more.
            let stay: Vec<Address> =
                if former.sidecar_cgroup == pod.sidecar_cgroup { addresses(pod).collect() } else { Vec::new() };
            self.remove_addresses(cookie, former, &stay)?;
            if former.links != pod.links {
                self.remove_links(cookie, former)?;
            }
        }
        if some(self.counters.get(&cookie, 0)).map_err(|error| KernelError::map(COUNTERS, error))?.is_none() {
            patiently(|| self.put_counters(cookie)).map_err(|error| KernelError::map(COUNTERS, error))?;
        }
        for address in addresses(pod) {
            patiently(|| self.addresses.insert(address, cookie, 0)).map_err(|error| KernelError::map(ADDRESSES, error))?;
        }
        for link in pod.links.into_iter().filter(|link| *link != 0) {
            patiently(|| self.links.insert(link, cookie, 0)).map_err(|error| KernelError::map(LINKS, error))?;
        }
        patiently(|| self.pods.insert(cookie, pod, 0)).map_err(|error| KernelError::map(PODS, error))
    }

    /// What is excluded for a pod. Looks only where its `flags` say that there is something.
    pub(super) fn excluded(&self, cookie: u64, flags: u32) -> Result<Exclusions, KernelError> {
        let mut found = Exclusions::default();
        if flags & (EXCLUDES_OUTBOUND_PORTS | EXCLUDES_INBOUND_PORTS) != 0 {
            let ports = self.ports.keys().filter(|key| key.as_ref().map_or(true, |key| key.netns == cookie));
            found.ports = ports.collect::<Result<_, _>>().map_err(|error| KernelError::map(EXCLUDED_PORTS, error))?;
        }
        if flags & EXCLUDES_OUTBOUND_CIDRS != 0 {
            for entry in self.cidrs.iter() {
                let (key, family) = entry.map_err(|error| KernelError::map(EXCLUDED_CIDRS, error))?;
                if key.data().pod() == cookie {
                    found.networks.push((key.prefix_len(), key.data(), family));
                }
            }
        }
        Ok(found)
    }

    /// Writes what is excluded for a pod and is not so already, `before`. After an error a part of it is written.
    pub(super) fn exclude(&mut self, asked: &Exclusions, before: &Exclusions) -> Result<(), KernelError> {
        for key in asked.ports.iter().filter(|key| !before.ports.contains(key)) {
            patiently(|| self.ports.insert(key, 1, 0)).map_err(|error| KernelError::map(EXCLUDED_PORTS, error))?;
        }
        for network in asked.networks.iter().filter(|network| !before.networks.contains(network)) {
            let (bits, address, family) = *network;
            let key = Key::new(bits, address);
            patiently(|| self.cidrs.insert(&key, family, 0)).map_err(|error| KernelError::map(EXCLUDED_CIDRS, error))?;
        }
        Ok(())
    }

    /// Removes what is excluded for a pod and is not among those that `stay`. Looks only where `flags` say that there is something.
    pub(super) fn keep_excluded(&mut self, cookie: u64, flags: u32, stay: &Exclusions) -> Result<(), KernelError> {
        let found = self.excluded(cookie, flags)?;
        for key in found.ports.iter().filter(|key| !stay.ports.contains(key)) {
            some(self.ports.remove(key)).map_err(|error| KernelError::map(EXCLUDED_PORTS, error))?;
        }
        let stays = |network: &(u32, Network, u32)| {
            stay.networks.iter().any(|(bits, address, _)| (*bits, *address) == (network.0, network.1))
        };
        for (bits, address, _family) in found.networks.into_iter().filter(|network| !stays(network)) {
            some(self.cidrs.remove(&Key::new(bits, address))).map_err(|error| KernelError::map(EXCLUDED_CIDRS, error))?;
        }
        Ok(())
    }

    /// What is excluded for a pod is what was excluded `before`, and nothing more.
    pub(super) fn restore_excluded(&mut self, cookie: u64, before: &Exclusions) -> Result<(), KernelError> {
        let all = EXCLUDES_OUTBOUND_PORTS | EXCLUDES_INBOUND_PORTS | EXCLUDES_OUTBOUND_CIDRS;
        self.keep_excluded(cookie, all, before)?;
        // A network of the other family may stand in the place of one.
        let now = self.excluded(cookie, all)?;
        self.exclude(before, &now)
    }

    /// Gives the pod's addresses to `listener`.
    pub(super) fn put_listener(&mut self, pod: Pod, listener: i32) -> Result<(), KernelError> {
        for address in addresses(pod) {
            self.listeners.insert(address, listener, 0).map_err(|error| KernelError::map(LISTENERS, error))?;
        }
        Ok(())
    }

    /// Removes a pod and what is keyed by it. What another pod has taken over stays.
    pub(super) fn remove_pod(&mut self, cookie: u64) -> Result<(), KernelError> {
        if let Some(pod) = self.pod(cookie)? {
            self.remove_addresses(cookie, pod, &[])?;
            self.remove_links(cookie, pod)?;
            self.keep_excluded(cookie, pod.flags, &Exclusions::default())?;
        }
        some(self.pods.remove(&cookie)).map_err(|error| KernelError::map(PODS, error))?;
        some(self.counters.remove(&cookie)).map_err(|error| KernelError::map(COUNTERS, error))?;
        Ok(())
    }

    /// Removes what is keyed by pods that there are not: a process that was killed while it enrolled or withdrew one left it.
    pub(super) fn sweep(&mut self) -> Result<(), KernelError> {
        let pods: BTreeSet<u64> = self.pods()?.into_iter().map(|(cookie, _)| cookie).collect();
        let failed = |error| KernelError::map(ADDRESSES, error);
        for found in self.addresses.iter().collect::<Vec<_>>() {
            let (address, cookie) = found.map_err(failed)?;
            if !pods.contains(&cookie) {
                some(self.listeners.remove(&address)).map_err(|error| KernelError::map(LISTENERS, error))?;
                some(self.addresses.remove(&address)).map_err(failed)?;
            }
        }
        let failed = |error| KernelError::map(LINKS, error);
        for found in self.links.iter().collect::<Vec<_>>() {
            let (link, cookie) = found.map_err(failed)?;
            if !pods.contains(&cookie) {
                some(self.links.remove(&link)).map_err(failed)?;
            }
        }
        let failed = |error| KernelError::map(COUNTERS, error);
        for found in self.counters.keys().collect::<Vec<_>>() {
            let cookie = found.map_err(failed)?;
            if !pods.contains(&cookie) {
                some(self.counters.remove(&cookie)).map_err(failed)?;
            }
        }
        let failed = |error| KernelError::map(EXCLUDED_PORTS, error);
        for found in self.ports.keys().collect::<Vec<_>>() {
            let key = found.map_err(failed)?;
            if !pods.contains(&key.netns) {
                some(self.ports.remove(&key)).map_err(failed)?;
            }
        }
        let failed = |error| KernelError::map(EXCLUDED_CIDRS, error);
        for found in self.cidrs.keys().collect::<Vec<_>>() {
            let key = found.map_err(failed)?;
            if !pods.contains(&key.data().pod()) {
                some(self.cidrs.remove(&key)).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// A pod's counters, summed over CPUs.
    pub(super) fn counters(&self, cookie: u64) -> Result<Option<Counters>, KernelError> {
        let values = some(self.counters.get(&cookie, 0)).map_err(|error| KernelError::map(COUNTERS, error))?;
        Ok(values.map(|values| {
            let mut sum = Counters::ZERO;
            for counters in values.iter() {
                for (total, count) in sum.0.iter_mut().zip(counters.0) {
                    *total = total.wrapping_add(count);
                }
            }
            sum
        }))
    }

    fn remove_addresses(&mut self, cookie: u64, pod: Pod, stay: &[Address]) -> Result<(), KernelError> {
        for address in addresses(pod).filter(|address| !stay.contains(address)) {
            let owner = some(self.addresses.get(&address, 0)).map_err(|error| KernelError::map(ADDRESSES, error))?;
            if owner == Some(cookie) {
                some(self.listeners.remove(&address)).map_err(|error| KernelError::map(LISTENERS, error))?;
                some(self.addresses.remove(&address)).map_err(|error| KernelError::map(ADDRESSES, error))?;
            }
        }
        Ok(())
    }

    fn remove_links(&mut self, cookie: u64, pod: Pod) -> Result<(), KernelError> {
        for link in pod.links {
            // A number may be another pod's by now.
            if some(self.links.get(&link, 0)).map_err(|error| KernelError::map(LINKS, error))? == Some(cookie) {
                some(self.links.remove(&link)).map_err(|error| KernelError::map(LINKS, error))?;
            }
        }
        Ok(())
    }

    fn put_counters(&mut self, cookie: u64) -> Result<(), MapError> {
        let cpus = aya::util::nr_cpus().map_err(|(_, source)| MapError::from(system_call("read the CPUs", source)))?;
        let zeros = PerCpuValues::try_from(vec![Counters([0; COUNTERS_LEN]); cpus])
            .map_err(|source| MapError::from(system_call("count the CPUs", source)))?;
        self.counters.insert(cookie, zeros, 0)
    }
}

/// Makes an entry, again for a moment where the kernel has no memory at hand: it keeps some ready for maps whose entries
/// are not set aside, and fills that up behind our back, so that who asks fast finds none now and plenty a millisecond later.
pub(super) fn patiently(mut make: impl FnMut() -> Result<(), MapError>) -> Result<(), MapError> {
    for _attempt in 0..ATTEMPTS {
        match make() {
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOMEM) => {
                std::thread::sleep(PAUSE)
            }
            outcome => return outcome,
        }
    }
    make()
}

const ATTEMPTS: usize = 100;
const PAUSE: Duration = Duration::from_millis(1);

/// The ring buffer of flow records.
pub(super) fn flows(pins: &Path) -> Result<RingBuf<MapData>, KernelError> {
    open(pins, FLOWS, Map::RingBuf)
}

/// What the pins are of, if the mark stands: layout and print.
pub(super) fn build(pins: &Path) -> Result<Option<(u64, u64)>, KernelError> {
    if !pins.join(BUILD).exists() {
        return Ok(None);
    }
    let mark: Array<MapData, u64> = open(pins, BUILD, Map::Array)?;
    let at = |index| mark.get(&index, 0).map_err(|error| KernelError::map(BUILD, error));
    Ok(Some((at(0)?, at(1)?)))
}

/// Marks the pins. A print of 0 says that they are being changed.
pub(super) fn mark_build(pins: &Path, layout: u64, print: u64) -> Result<(), KernelError> {
    let stands = pins.join(BUILD).exists();
    let mut mark: Array<MapData, u64> = if stands {
        open(pins, BUILD, Map::Array)?
    } else {
        Array::create(2, 0).map_err(|error| KernelError::map(BUILD, error))?
    };
    let write = || {
        // Whoever is killed in between leaves the print of nothing.
        mark.set(1, 0, 0)?;
        mark.set(0, layout, 0)?;
        mark.set(1, print, 0)?;
        if stands {
            return Ok(());
        }
        mark.pin(pins.join(BUILD)).map_err(|error| MapError::PinError { name: Some(BUILD.to_owned()), error })
    };
    write().map_err(|error| KernelError::map(BUILD, error))
}

fn open<T>(pins: &Path, name: &'static str, kind: impl FnOnce(MapData) -> Map) -> Result<T, KernelError>
where
    T: TryFrom<Map, Error = MapError>,
{
    MapData::from_pin(pin(pins, name)).and_then(|data| T::try_from(kind(data))).map_err(|error| KernelError::map(name, error))
}

fn addresses(pod: Pod) -> impl Iterator<Item = Address> {
    [pod.v4, pod.v6].into_iter().filter(|address| *address != Address::NONE)
}

/// What is excluded for one pod, as the programs look for it.
#[derive(Debug, Default)]
pub(super) struct Exclusions {
    ports: Vec<PortKey>,
    /// Each with the bits that are fixed, and its family.
    networks: Vec<(u32, Network, u32)>,
}

impl Exclusions {
    pub(super) fn new(netns: u64, capture: &CaptureConfig) -> Self {
        let key = |port: &u16, direction: Direction| PortKey { netns, port: u32::from(*port), direction: direction as u32 };
        let outbound = capture.outbound_ports.iter().map(|port| key(port, Direction::Outbound));
        let inbound = capture.inbound_ports.iter().map(|port| key(port, Direction::Inbound));
        let networks = capture.outbound_cidrs.iter().map(|network| {
            let (before, family) = match network {
                // Behind the prefix of mapped addresses.
                IpNet::V4(_) => (Network::NETNS_BITS + 96, FAMILY_V4),
                IpNet::V6(_) => (Network::NETNS_BITS, FAMILY_V6),
            };
            let address = Address::from(network.network());
            (before + u32::from(network.prefix_len()), Network::new(netns, address), family)
        });
        Self { ports: outbound.chain(inbound).collect(), networks: networks.collect() }
    }

    /// What tells the programs to look.
    pub(super) fn flags(&self) -> u32 {
        let port = |direction: Direction| self.ports.iter().any(|key| key.direction == direction as u32);
        let flag = |is_set: bool, flag: u32| if is_set { flag } else { 0 };
        flag(port(Direction::Outbound), EXCLUDES_OUTBOUND_PORTS)
            | flag(port(Direction::Inbound), EXCLUDES_INBOUND_PORTS)
            | flag(!self.networks.is_empty(), EXCLUDES_OUTBOUND_CIDRS)
    }
}

/// `None` where there is no such key.
fn some<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(None),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn system_call(call: &'static str, io_error: std::io::Error) -> aya::sys::SyscallError {
    aya::sys::SyscallError { call, io_error }
}
