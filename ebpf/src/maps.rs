//! The maps, and the few ways in which every hook uses them. Keys, values and sizes are `proxy_common`'s.

use core::ffi::c_void;

use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuHashMap, RingBuf, SkStorage, SockHash};
use aya_ebpf::helpers::generated::bpf_sk_storage_get;
use aya_ebpf::macros::btf_map;
use proxy_common::address::Address;
use proxy_common::arrivals::{ARRIVALS_LEN, Arrived};
use proxy_common::counters::{Counter, Counters};
use proxy_common::decide::Excluded;
use proxy_common::exclusions::{EXCLUDED_CIDRS_MAX, EXCLUDED_PORTS_MAX, FAMILY_V4, FAMILY_V6, Network, PortKey};
use proxy_common::flows::{Direction, FLOWS_BYTES, Flow};
use proxy_common::originals::{ORIGINALS_MAX, Original, OriginalKey};
use proxy_common::owndials::{OWN_DIALS_MAX, OwnDial, OwnDialKey};
use proxy_common::pods::{
    ADDRESSES_MAX, EXCLUDES_INBOUND_PORTS, EXCLUDES_OUTBOUND_CIDRS, EXCLUDES_OUTBOUND_PORTS, LINKS_MAX, PODS_MAX, Pod,
};
use proxy_common::sockets::Socket;

#[btf_map]
pub(crate) static PODS: HashMap<u64, Pod, PODS_MAX> = HashMap::new();
#[btf_map]
pub(crate) static ADDRESSES: HashMap<Address, u64, ADDRESSES_MAX> = HashMap::new();
#[btf_map]
pub(crate) static LISTENERS: SockHash<Address, ADDRESSES_MAX> = SockHash::new();
#[btf_map]
pub(crate) static SOCKETS: SkStorage<Socket> = SkStorage::new();
#[btf_map]
pub(crate) static ORIGINALS: LruHashMap<OriginalKey, Original, ORIGINALS_MAX> = LruHashMap::new();
#[btf_map]
pub(crate) static OWN_DIALS: HashMap<OwnDialKey, OwnDial, OWN_DIALS_MAX> = HashMap::new();
#[btf_map]
pub(crate) static ARRIVALS: Array<Arrived, ARRIVALS_LEN> = Array::new();
#[btf_map]
pub(crate) static COUNTERS: PerCpuHashMap<u64, Counters, PODS_MAX> = PerCpuHashMap::new();
#[btf_map]
pub(crate) static EXCLUDED_PORTS: HashMap<PortKey, u32, EXCLUDED_PORTS_MAX> = HashMap::new();
#[btf_map]
pub(crate) static EXCLUDED_CIDRS: LpmTrie<Network, u32, EXCLUDED_CIDRS_MAX> = LpmTrie::new();
#[btf_map]
pub(crate) static LINKS: HashMap<u32, u64, LINKS_MAX> = HashMap::new();
/// Which connections without a socket were counted already, by their print.
#[btf_map]
pub(crate) static TOLD: Array<u64, 1024> = Array::new();
#[btf_map]
pub(crate) static FLOWS: RingBuf<Flow, FLOWS_BYTES> = RingBuf::new();

/// Reads one field of a context, once.
macro_rules! read {
    ($context:expr, $($field:tt)+) => {
        // SAFETY: the verifier checks that the field may be read; the pointer is the program's context.
        unsafe { core::ptr::read_volatile(&raw const (*$context).$($field)+) }
    };
}

/// Writes one field of a context. Volatile: LLVM merges stores to neighbours into one that is wider than the verifier
/// allows.
macro_rules! write {
    ($context:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: the verifier checks that the field may be written; the pointer is the program's context.
        unsafe { core::ptr::write_volatile(&raw mut (*$context).$($field)+, $value) }
    };
}

/// The four words of an address in a context, read as [`read!`] does.
macro_rules! read_words {
    ($context:expr, $field:ident) => {
        [read!($context, $field[0]), read!($context, $field[1]), read!($context, $field[2]), read!($context, $field[3])]
    };
}

pub(crate) use {read, read_words, write};

/// The pod in the network namespace with this cookie.
#[inline(always)]
pub(crate) fn pod(netns: u64) -> Option<&'static Pod> {
    // SAFETY: user space replaces an entry as a whole, and only while its pod is enrolled or withdrawn.
    unsafe { PODS.get(&netns) }
}

/// What of a connection of the pod's app to `target`:`port` the pod's owner took out of capture.
#[inline(always)]
pub(crate) fn excluded(netns: u64, pod: &Pod, target: &Address, port: u16) -> Excluded {
    if pod.has(EXCLUDES_OUTBOUND_PORTS) && is_excluded(netns, port, Direction::Outbound) {
        return Excluded::Port;
    }
    if pod.has(EXCLUDES_OUTBOUND_CIDRS) {
        let key = Key { prefix_len: Network::BITS, data: Network::new(netns, *target) };
        let family = if target.is_v4() { FAMILY_V4 } else { FAMILY_V6 };
        if EXCLUDED_CIDRS.get(&key).is_some_and(|found| *found == family) {
            return Excluded::Cidr;
        }
    }
    Excluded::No
}

/// Did the pod's owner take what arrives at `port` out of capture?
#[inline(always)]
pub(crate) fn excluded_inbound(netns: u64, pod: &Pod, port: u16) -> bool {
    pod.has(EXCLUDES_INBOUND_PORTS) && is_excluded(netns, port, Direction::Inbound)
}

#[inline(always)]
fn is_excluded(netns: u64, port: u16, direction: Direction) -> bool {
    let key = PortKey { netns, port: port.into(), direction: direction as u32 };
    // SAFETY: the value is not looked at.
    unsafe { EXCLUDED_PORTS.get(&key) }.is_some()
}

/// Counts for a pod. A count may be lost when two programs meet on one CPU; these are statistics.
#[inline(always)]
pub(crate) fn count(netns: u64, counter: Counter) {
    if let Some(counters) = COUNTERS.get_ptr_mut(&netns) {
        // SAFETY: the pointer is this CPU's value of a live entry; the index is below the array's length.
        unsafe { (*counters).0[counter as usize] += 1 }
    }
}

/// What is noted of `socket`, if anything.
#[inline(always)]
pub(crate) fn noted<'a>(socket: *mut bpf_sock) -> Option<&'a mut Socket> {
    storage(socket, 0)
}

/// What is noted of `socket`, made if missing; `None` when there is no memory.
#[inline(always)]
pub(crate) fn note<'a>(socket: *mut bpf_sock) -> Option<&'a mut Socket> {
    storage(socket, BPF_SK_STORAGE_GET_F_CREATE.into())
}

#[inline(always)]
fn storage<'a>(socket: *mut bpf_sock, flags: u64) -> Option<&'a mut Socket> {
    if socket.is_null() {
        return None;
    }
    let map = (&raw const SOCKETS).cast_mut().cast::<c_void>();
    // SAFETY: the kernel gives a pointer to this socket's own value or none; it lives as long as the socket.
    unsafe { bpf_sk_storage_get(map, socket.cast(), core::ptr::null_mut(), flags).cast::<Socket>().as_mut() }
}
