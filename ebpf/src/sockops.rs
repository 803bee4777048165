//! A connection's life: carries the original destination and the true client from the socket that connects to the socket
//! that is accepted, and writes a flow record at the end.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTO_CB, BPF_SOCK_OPS_RTO_CB_FLAG,
    BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, bpf_sock,
};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_ktime_get_ns};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use aya_log_ebpf::warn;
use proxy_common::address::Address;
use proxy_common::counters::Counter;
use proxy_common::decide::{Accepted, Closed, decide_accepted, decide_closed, decide_end, decide_redirected};
use proxy_common::flows::{Direction, Flow};
use proxy_common::originals::{Original, OriginalKey};
use proxy_common::owndials::{OwnDial, OwnDialKey};
use proxy_common::sockets::{DECLARED, ESTABLISHED, OWN, Role, Socket, TIMED_OUT, UNSENT};

use crate::maps::{FLOWS, ORIGINALS, OWN_DIALS, count, excluded_inbound, note, noted, pod, read, read_words};

/// AF_INET6.
const V6: u32 = 10;

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
    let wanted = matches!(
        op,
        BPF_SOCK_OPS_TCP_CONNECT_CB
            | BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB
            | BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB
            | BPF_SOCK_OPS_STATE_CB
            | BPF_SOCK_OPS_RTO_CB
    );
    // SAFETY: the kernel gives the socket or null, which the storage's users check.
    let socket = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if !wanted || socket.is_null() {
        return 0;
    }
    // SAFETY: the helper is free to this kind of program.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    if pod(netns).is_none() {
        return 0;
    }
    let v6 = read!(ctx.ops, family) == V6;
    let (local4, local6) = (read!(ctx.ops, local_ip4), read_words!(ctx.ops, local_ip6));
    let (remote4, remote6) = (read!(ctx.ops, remote_ip4), read_words!(ctx.ops, remote_ip6));
    let event = Event {
        ctx: &ctx,
        socket,
        netns,
        local: if v6 { Address(local6) } else { Address::v4(local4) },
        remote: if v6 { Address(remote6) } else { Address::v4(remote4) },
        local_port: read!(ctx.ops, local_port) as u16,
        // The one field that the kernel keeps in network byte order, as 32 bits.
        remote_port: u32::from_be(read!(ctx.ops, remote_port)) as u16,
    };
    match op {
        BPF_SOCK_OPS_TCP_CONNECT_CB => event.connecting(),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => event.connected(),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => event.accepted(),
        BPF_SOCK_OPS_RTO_CB if ctx.arg(2) != 0 => event.gives_up(),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => event.closed(ctx.arg(0)),
        _ => {}
    }
    0
}

impl Event<'_> {
    /// The source port is known, the SYN has not left.
    #[inline(always)]
    fn connecting(&self) {
        let Some(socket) = noted(self.socket) else { return };
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
    fn connected(&self) {
        let Some(socket) = noted(self.socket) else { return };
        if socket.is(Role::Upstream) && !socket.has(OWN) && !self.remote.is_loopback() {
            self.begin(socket);
        }
    }

    /// The handshake is done at the end that accepts.
    #[inline(always)]
    fn accepted(&self) {
        let excluded = pod(self.netns).is_some_and(|pod| excluded_inbound(self.netns, pod, self.local_port));
        match decide_accepted(&self.local, &self.remote, self.local_port, excluded) {
            Accepted::Outbound => self.take_original(),
            Accepted::Own => self.take_own_dial(),
            Accepted::Inbound => {
                if let Some(socket) = note(self.socket) {
                    socket.role = Role::Inbound as u8;
                    self.begin(socket);
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

    /// The kernel sent again for the last time, and closes the socket next.
    #[inline(always)]
    fn gives_up(&self) {
        if let Some(socket) = noted(self.socket) {
            socket.flags |= TIMED_OUT;
        }
    }

    /// The socket is closed for good, from the state `before`.
    #[inline(always)]
    fn closed(&self, before: u32) {
        let Some(socket) = noted(self.socket) else { return };
        match decide_closed(socket) {
            Closed::ForgetOwnDial => {
                // Refused, given up or never accepted; an accepted one has taken its note.
                let _ = OWN_DIALS.remove(self.dialled());
            }
            Closed::RecordInbound => self.record(socket, Direction::Inbound, before),
            Closed::RecordOutbound => self.record(socket, Direction::Outbound, before),
            Closed::Nothing => {}
        }
    }

    #[inline(always)]
    fn record(&self, socket: &mut Socket, direction: Direction, before: u32) {
        let end = decide_end(socket, before);
        socket.flags &= !ESTABLISHED;
        let ops = self.ctx.ops;
        let flow = Flow {
            netns: self.netns,
            sent_bytes: read!(ops, bytes_acked),
            received_bytes: read!(ops, bytes_received),
            duration_ns: now().saturating_sub(socket.since_ns),
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
        self.watch(BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG);
    }

    /// Asks for events of the socket: its changes of state, its close above all, and what it sends again.
    #[inline(always)]
    fn watch(&self, events: u32) {
        let _ = self.ctx.set_cb_flags(events as i32);
    }

    #[inline(always)]
    fn dialled(&self) -> OwnDialKey {
        OwnDialKey { address: self.local, source_port: self.local_port.into(), port: self.remote_port.into() }
    }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper is free to every program.
    unsafe { bpf_ktime_get_ns() }
}
