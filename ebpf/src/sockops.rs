//! A connection's life: carries the original destination and the true client from the socket that connects to the socket
//! that is accepted, and writes a flow record at the end.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTO_CB, BPF_SOCK_OPS_STATE_CB,
    BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, bpf_sock,
};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use aya_log_ebpf::warn;
use proxy_common::address::Address;
use proxy_common::counters::Counter;
use proxy_common::decide::{Accepted, Closed, decide_accepted, decide_closed, decide_end, decide_redirected};
use proxy_common::flows::{Direction, End, Flow};
use proxy_common::originals::{Original, OriginalKey};
use proxy_common::owndials::{OwnDial, OwnDialKey};
use proxy_common::pods::Pod;
use proxy_common::sockets::{DECLARED, ESTABLISHED, OWN, Role, Socket, TIMED_OUT, UNSENT};

use crate::arrivals::{RECORDED, begin, begins_at_accept, now, place};
use crate::maps::{FLOWS, ORIGINALS, OWN_DIALS, count, excluded_inbound, note, noted, pod, read, read_words};

/// AF_INET6.
const V6: u32 = 10;

/// What the program returns, always: the kernel takes another program's reply (the first timeout, the first window) only if all of
/// a socket's programs return 1.
const HEARD: u32 = 1;

/// What an event tells beside its kind, read as a field is.
macro_rules! arg {
    ($context:expr, $number:literal) => {
        read!($context, __bindgen_anon_1.args[$number])
    };
}

/// One event of one socket in an enrolled pod.
struct Event<'a> {
    ctx: &'a SockOpsContext,
    socket: *mut bpf_sock,
    netns: u64,
    local: Address,
    remote: Address,
    local_port: u16,
    remote_port: u16,
}

#[sock_ops]
pub fn or_sockops(ctx: SockOpsContext) -> u32 {
    let op = read!(ctx.ops, op);
    let (before, after, given_up) = (arg!(ctx.ops, 0), arg!(ctx.ops, 1), arg!(ctx.ops, 2));
    // Of a dozen events of every connection of the machine these alone matter, and the others pay for being told.
    let wanted = match op {
        BPF_SOCK_OPS_TCP_CONNECT_CB | BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB | BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => true,
        BPF_SOCK_OPS_STATE_CB => after == BPF_TCP_CLOSE,
        BPF_SOCK_OPS_RTO_CB => given_up != 0,
        _ => false,
    };
    if !wanted {
        return HEARD;
    }
    // SAFETY: the kernel gives the socket or null, which the storage's users check.
    let socket = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if socket.is_null() {
        return HEARD;
    }
    // Who connects for the mesh has a note by now: to ask for one that there is not costs less than to ask for the pod. Without a
    // note is what was accepted; only of that is the end told.
    let accepted = op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB;
    let noted = if accepted { None } else { noted(socket) };
    let connects = matches!(op, BPF_SOCK_OPS_TCP_CONNECT_CB | BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB);
    if connects && noted.is_none() {
        return HEARD;
    }
    let v6 = read!(ctx.ops, family) == V6;
    let (local4, local6) = (read!(ctx.ops, local_ip4), read_words!(ctx.ops, local_ip6));
    let (remote4, remote6) = (read!(ctx.ops, remote_ip4), read_words!(ctx.ops, remote_ip6));
    let local = if v6 { Address(local6) } else { Address::v4(local4) };
    let remote = if v6 { Address(remote6) } else { Address::v4(remote4) };
    // What came in from outside is met again at `accept`.
    if accepted && begins_at_accept() && !within(&local, &remote) {
        return HEARD;
    }
    // SAFETY: the helper is free to this kind of program.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let pod = if accepted { pod(netns) } else { None };
    if accepted && pod.is_none() {
        return HEARD;
    }
    let event = Event {
        ctx: &ctx,
        socket,
        netns,
        local,
        remote,
        local_port: read!(ctx.ops, local_port) as u16,
        // The one field that the kernel keeps in network byte order, as 32 bits.
        remote_port: u32::from_be(read!(ctx.ops, remote_port)) as u16,
    };
    match (noted, pod) {
        (None, Some(pod)) => event.accepted(pod),
        (Some(socket), _) => match op {
            BPF_SOCK_OPS_TCP_CONNECT_CB => event.connecting(socket),
            BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => event.connected(socket),
            // The kernel sent again for the last time, and closes the socket next.
            BPF_SOCK_OPS_RTO_CB => socket.flags |= TIMED_OUT,
            _ => event.closed(socket, before),
        },
        (None, None) if op == BPF_SOCK_OPS_RTO_CB => event.arrived_gives_up(),
        (None, None) => event.arrived_closed(before),
    }
    HEARD
}

impl Event<'_> {
    /// The source port is known, the SYN has not left.
    #[inline(always)]
    fn connecting(&self, socket: &mut Socket) {
        socket.flags &= !UNSENT;
        if decide_redirected(socket, &self.remote, self.remote_port) {
            let key = OriginalKey { netns: self.netns, source: self.local, port: self.local_port.into(), reserved: 0 };
            let original = Original { address: socket.address, port: socket.port.into() };
            let _ = ORIGINALS.insert(&key, &original, 0);
        } else if socket.is(Role::Upstream) && socket.has(OWN) {
            let dial = OwnDial {
                netns: self.netns,
                client: socket.address,
                client_port: socket.port.into(),
                declared: u32::from(socket.has(DECLARED)),
            };
            if OWN_DIALS.insert(self.dialled(), &dial, 0).is_err() {
                // Its SYN will be dropped: nothing says that the sidecar sent it.
                count(self.netns, Counter::OwnDialNotNoted);
                warn!(self.ctx, "dropped: no room to note a sidecar's dial to its app, namespace {}", self.netns);
            }
            self.watch(BPF_SOCK_OPS_STATE_CB_FLAG);
        }
    }

    /// The handshake is done at the end that connects.
    #[inline(always)]
    fn connected(&self, socket: &mut Socket) {
        if socket.is(Role::Upstream) && !socket.has(OWN) && !self.remote.is_loopback() {
            self.begin(socket);
        }
    }

    /// The handshake is done at the end that accepts.
    #[inline(always)]
    fn accepted(&self, pod: &Pod) {
        let excluded = excluded_inbound(self.netns, pod, self.local_port);
        match decide_accepted(&self.local, &self.remote, self.local_port, excluded) {
            Accepted::Outbound => self.take_original(),
            Accepted::Own => self.take_own_dial(),
            Accepted::Inbound => {
                let watch = || {
                    self.watch(RECORDED);
                    true
                };
                if !begin(self.socket, self.cookie(), watch) {
                    count(self.netns, Counter::FlowLost);
                }
            }
            Accepted::Other => {}
        }
    }

    #[inline(always)]
    fn take_original(&self) {
        let key = OriginalKey { netns: self.netns, source: self.remote, port: self.remote_port.into(), reserved: 0 };
        // SAFETY: the value is copied at once; it belongs to this one connection.
        let found = unsafe { ORIGINALS.get(&key) }.copied();
        let counter = match (found, note(self.socket)) {
            (Some(original), Some(socket)) => {
                socket.address = original.address;
                socket.port = original.port as u16;
                socket.role = Role::Outbound as u8;
                Counter::OriginalFound
            }
            (_, _) => Counter::OriginalMissing,
        };
        let _ = ORIGINALS.remove(&key);
        count(self.netns, counter);
    }

    #[inline(always)]
    fn take_own_dial(&self) {
        let key = OwnDialKey { address: self.local, source_port: self.remote_port.into(), port: self.local_port.into() };
        // SAFETY: the value is copied at once; it belongs to this one connection.
        let Some(dial) = (unsafe { OWN_DIALS.get(&key) }).copied() else { return };
        if dial.netns != self.netns {
            return;
        }
        if dial.declared != 0 {
            let counter = match note(self.socket) {
                Some(socket) => {
                    socket.address = dial.client;
                    socket.port = dial.client_port as u16;
                    socket.role = Role::Served as u8;
                    Counter::ClientShown
                }
                None => Counter::ClientLost,
            };
            count(self.netns, counter);
        }
        let _ = OWN_DIALS.remove(&key);
    }

    /// The socket is closed for good, from the state `before`.
    #[inline(always)]
    fn closed(&self, socket: &mut Socket, before: u32) {
        match decide_closed(socket) {
            Closed::ForgetOwnDial => {
                // Refused, given up or never accepted; an accepted one has taken its note.
                let _ = OWN_DIALS.remove(self.dialled());
            }
            Closed::RecordInbound => self.record_noted(socket, Direction::Inbound, before),
            Closed::RecordOutbound => self.record_noted(socket, Direction::Outbound, before),
            Closed::Nothing => {}
        }
    }

    /// As for a socket with a note.
    #[inline(always)]
    fn arrived_gives_up(&self) {
        let cookie = self.cookie();
        if let Some(place) = place(cookie).filter(|place| place.cookie == cookie) {
            place.timed_out = 1;
        }
    }

    /// What was accepted from outside is closed for good, from the state `before`.
    #[inline(always)]
    fn arrived_closed(&self, before: u32) {
        let cookie = self.cookie();
        if let Some(place) = place(cookie).filter(|place| place.cookie == cookie) {
            // SAFETY: the place is the map's. Read before the place is free: another processor may take it at once.
            let arrived = unsafe { core::ptr::read_volatile(place) };
            // SAFETY: as above.
            unsafe { core::ptr::write_volatile(&raw mut place.cookie, 0) };
            self.record(Direction::Inbound, arrived.since_ns, decide_end(arrived.timed_out != 0, before));
        } else if read!(self.ctx.ops, bpf_sock_ops_cb_flags) & RECORDED == RECORDED && !within(&self.local, &self.remote) {
            // Two took one place in one moment, and the other was the later. Of a connection within the pod that another's program
            // asked about, it is that program's business.
            count(self.netns, Counter::FlowLost);
        }
    }

    #[inline(always)]
    fn record_noted(&self, socket: &mut Socket, direction: Direction, before: u32) {
        socket.flags &= !ESTABLISHED;
        self.record(direction, socket.since_ns, decide_end(socket.has(TIMED_OUT), before));
    }

    #[inline(always)]
    fn record(&self, direction: Direction, since_ns: u64, end: End) {
        let ops = self.ctx.ops;
        let flow = Flow {
            netns: self.netns,
            sent_bytes: read!(ops, bytes_acked),
            received_bytes: read!(ops, bytes_received),
            duration_ns: now().saturating_sub(since_ns),
            local: self.local,
            remote: self.remote,
            // The kernel keeps eight times the value.
            srtt_us: read!(ops, srtt_us) >> 3,
            retransmits: read!(ops, total_retrans),
            local_port: self.local_port,
            remote_port: self.remote_port,
            direction: direction as u16,
            end: end as u16,
        };
        if FLOWS.output(&flow, 0).is_err() {
            count(self.netns, Counter::FlowLost);
        }
    }

    /// From now on a flow that ends in a record.
    #[inline(always)]
    fn begin(&self, socket: &mut Socket) {
        socket.since_ns = now();
        socket.flags |= ESTABLISHED;
        self.watch(RECORDED);
    }

    /// Asks for events of the socket, beside what other programs asked for.
    #[inline(always)]
    fn watch(&self, events: u32) {
        let _ = self.ctx.set_cb_flags((read!(self.ctx.ops, bpf_sock_ops_cb_flags) | events) as i32);
    }

    /// The socket's own, for as long as it lives.
    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: the helper is free to this kind of program.
        unsafe { bpf_get_socket_cookie(self.ctx.as_ptr()) }
    }

    #[inline(always)]
    fn dialled(&self) -> OwnDialKey {
        OwnDialKey { address: self.local, source_port: self.local_port.into(), port: self.remote_port.into() }
    }
}

/// Are both ends in one pod?
#[inline(always)]
fn within(local: &Address, remote: &Address) -> bool {
    local.is_loopback() || local.same(remote)
}
