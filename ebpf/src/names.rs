//! What sockets say of their ends: an app sees the peer it asked for and the pod's address as its own, and its true
//! client; a sidecar's accepted socket says where its client wanted to go. `accept` asks the same way as `getpeername`.
//!
//! These hooks run for every socket of the node, hence no more than one look at the socket's own storage, and one at the pods where
//! there is nothing in it. Of a sidecar's `accept` they begin the flow record, when no caller waits any more.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{BPF_TCP_CLOSE, bpf_sock};
use aya_ebpf::helpers::generated::{
    bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_getsockopt, bpf_setsockopt,
};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use proxy_common::PORT_OUTBOUND;
use proxy_common::address::Address;
use proxy_common::counters::Counter;
use proxy_common::decide::{Caller, OwnName, decide_came_in, decide_own_name};
use proxy_common::sockets::{Role, Socket};

use crate::arrivals::{RECORDED, begin, begins_at_accept};
use crate::maps::{count, noted, pod, read, read_words, write};

/// IPPROTO_TCP.
const TCP: u32 = 6;
const SOL_TCP: i32 = 6;
/// The events that a socket is asked for, as an option of programs: since Linux 6.12.
const TCP_BPF_SOCK_OPS_CB_FLAGS: i32 = 1008;

#[cgroup_sock_addr(getpeername4)]
pub fn or_getpeername4(ctx: SockAddrContext) -> i32 {
    let remote = Address::v4(read!(ctx.sock_addr, user_ip4));
    let socket = socket(&ctx);
    let local = Address::v4(read!(socket, src_ip4));
    match noted(socket) {
        Some(noted) if shows_peer(&ctx, noted) => show4(&ctx, noted),
        Some(_) => {}
        None => accepted(&ctx, socket, &local, &remote),
    }
    1
}

#[cgroup_sock_addr(getpeername6)]
pub fn or_getpeername6(ctx: SockAddrContext) -> i32 {
    let remote = Address(read_words!(ctx.sock_addr, user_ip6));
    let socket = socket(&ctx);
    let local = Address(read_words!(socket, src_ip6));
    match noted(socket) {
        Some(noted) if shows_peer(&ctx, noted) => show6(&ctx, noted),
        Some(_) => {}
        None => accepted(&ctx, socket, &local, &remote),
    }
    1
}

#[cgroup_sock_addr(getsockname4)]
pub fn or_getsockname4(ctx: SockAddrContext) -> i32 {
    let local = Address::v4(read!(ctx.sock_addr, user_ip4));
    let Some(socket) = of(&ctx) else { return 1 };
    match decide_own_name(socket, &local) {
        OwnName::Kernel => {}
        OwnName::Original => show4(&ctx, socket),
        OwnName::Pod => {
            if let Some(own) = pods_end(&ctx, socket).filter(Address::is_v4) {
                write!(ctx.sock_addr, own.0[3], user_ip4);
            }
        }
    }
    1
}

#[cgroup_sock_addr(getsockname6)]
pub fn or_getsockname6(ctx: SockAddrContext) -> i32 {
    let local = Address(read_words!(ctx.sock_addr, user_ip6));
    let Some(socket) = of(&ctx) else { return 1 };
    match decide_own_name(socket, &local) {
        OwnName::Kernel => {}
        OwnName::Original => show6(&ctx, socket),
        OwnName::Pod => {
            if let Some(own) = pods_end(&ctx, socket) {
                write!(ctx.sock_addr, own.0[0], user_ip6[0]);
                write!(ctx.sock_addr, own.0[1], user_ip6[1]);
                write!(ctx.sock_addr, own.0[2], user_ip6[2]);
                write!(ctx.sock_addr, own.0[3], user_ip6[3]);
            }
        }
    }
    1
}

/// Shall the app see another peer than the kernel says?
#[inline(always)]
fn shows_peer(ctx: &SockAddrContext, socket: &Socket) -> bool {
    let port = u16::from_be(read!(ctx.sock_addr, user_port) as u16);
    socket.is(Role::Served) || socket.is(Role::App) && port == PORT_OUTBOUND
}

/// Begins the flow record of what a sidecar accepts from outside. Asked for again, as by `getpeername`, it is begun already.
#[inline(always)]
fn accepted(ctx: &SockAddrContext, socket: *mut bpf_sock, local: &Address, remote: &Address) {
    let port = read!(socket, src_port) as u16;
    let (protocol, state) = (read!(ctx.sock_addr, protocol), read!(socket, state));
    if !begins_at_accept() || protocol != TCP || !decide_came_in(local, remote, port) {
        return;
    }
    // SAFETY: both helpers are free to this kind of program.
    let (netns, cgroup) = unsafe { (bpf_get_netns_cookie(ctx.as_ptr()), bpf_get_current_cgroup_id()) };
    let Some(pod) = pod(netns) else { return };
    if Caller::of(pod, cgroup) != Caller::Sidecar {
        return;
    }
    // SAFETY: the helper is free to this kind of program.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // Its caller cut it short while it waited: nothing more is told of it.
    if state == BPF_TCP_CLOSE || !begin(socket, cookie, || watch(ctx)) {
        count(netns, Counter::FlowLost);
    }
}

/// Asks for the events of a flow record, beside what other programs asked for. The kernel holds the socket's lock.
#[inline(always)]
fn watch(ctx: &SockAddrContext) -> bool {
    let mut flags = [0_u8; 4];
    // SAFETY: both helpers are free to this kind of program, and use the four bytes that they are given.
    unsafe {
        let (at, ctx) = (flags.as_mut_ptr().cast(), ctx.as_ptr());
        if bpf_getsockopt(ctx, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, at, 4) != 0 {
            return false;
        }
        flags = (u32::from_ne_bytes(flags) | RECORDED).to_ne_bytes();
        bpf_setsockopt(ctx, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, flags.as_mut_ptr().cast(), 4) == 0
    }
}

/// The pod's address, as an app's connection has it that went to the sidecar over loopback instead.
#[inline(always)]
fn pods_end(ctx: &SockAddrContext, socket: &Socket) -> Option<Address> {
    // SAFETY: the helper is free to this kind of program.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    pod(netns)?.end_towards(&socket.address)
}

#[inline(always)]
fn of(ctx: &SockAddrContext) -> Option<&Socket> {
    noted(socket(ctx)).map(|socket| &*socket)
}

#[inline(always)]
fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: the context of these programs always has its socket.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}

#[inline(always)]
fn show4(ctx: &SockAddrContext, socket: &Socket) {
    // An IPv4 socket cannot say an IPv6 address; the true tuple stays.
    if socket.address.is_v4() {
        write!(ctx.sock_addr, socket.address.0[3], user_ip4);
        write!(ctx.sock_addr, u32::from(socket.port.to_be()), user_port);
    }
}

#[inline(always)]
fn show6(ctx: &SockAddrContext, socket: &Socket) {
    write!(ctx.sock_addr, socket.address.0[0], user_ip6[0]);
    write!(ctx.sock_addr, socket.address.0[1], user_ip6[1]);
    write!(ctx.sock_addr, socket.address.0[2], user_ip6[2]);
    write!(ctx.sock_addr, socket.address.0[3], user_ip6[3]);
    write!(ctx.sock_addr, u32::from(socket.port.to_be()), user_port);
}
