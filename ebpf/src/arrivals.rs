//! Begins the flow record of a connection that came in. A kernel that lets it be asked for a socket's events at `accept` is asked
//! then, when no caller waits; any other when the handshake is done, in that caller's time.

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_SOCK_OPS_RTO_CB_FLAG, BPF_SOCK_OPS_STATE_CB_FLAG, bpf_sock};
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use proxy_common::arrivals::Arrived;
use proxy_common::sockets::{ESTABLISHED, Role};

use crate::maps::{ARRIVALS, note};

/// The events of a connection that ends in a flow record: its changes of state, its close above all, and what it sends again.
pub(crate) const RECORDED: u32 = BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG;

/// Set as the programs are loaded: 1 where records begin at `accept`.
#[unsafe(no_mangle)]
static BEGINS_AT_ACCEPT: Global<u8> = Global::new(0);

/// Do records begin at `accept`?
#[inline(always)]
pub(crate) fn begins_at_accept() -> bool {
    BEGINS_AT_ACCEPT.load() != 0
}

/// Begins the record of `socket`, unless that is done already; `watch` asks for [`RECORDED`]. `false` if it cannot be begun.
#[inline(always)]
pub(crate) fn begin(socket: *mut bpf_sock, cookie: u64, watch: impl FnOnce() -> bool) -> bool {
    let since_ns = now();
    let found = place(cookie);
    if found.as_ref().is_some_and(|place| place.cookie == cookie) {
        return true;
    }
    if let Some(place) = found.filter(|place| place.cookie == 0) {
        let watched = watch();
        if watched {
            *place = Arrived { cookie, since_ns, timed_out: 0 };
        }
        return watched;
    }
    let Some(socket) = note(socket) else { return false };
    socket.role = Role::Inbound as u8;
    socket.since_ns = since_ns;
    socket.flags |= ESTABLISHED;
    watch()
}

/// The place of the accepted socket with this cookie, free, its own or another's.
#[inline(always)]
pub(crate) fn place<'a>(cookie: u64) -> Option<&'a mut Arrived> {
    // SAFETY: the map stands for as long as the programs. Who finds a place that is neither free nor its own leaves it alone.
    ARRIVALS.get_ptr_mut(Arrived::place(cookie)).map(|place| unsafe { &mut *place })
}

#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: the helper is free to every program.
    unsafe { bpf_ktime_get_ns() }
}
