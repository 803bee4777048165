//! What sockets say of their ends: an app sees the peer it asked for and the pod's address as its own, and its true
//! client; a sidecar's accepted socket says where its client wanted to go. `accept` asks the same way as `getpeername`.
//!
//! These hooks run for every socket of the node, hence no more than one look at the socket's own storage.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use proxy_common::PORT_OUTBOUND;
use proxy_common::address::Address;
use proxy_common::decide::{OwnName, decide_own_name};
use proxy_common::sockets::{Role, Socket};

use crate::maps::{noted, pod, read, read_words, write};

#[cgroup_sock_addr(getpeername4)]
pub fn or_getpeername4(ctx: SockAddrContext) -> i32 {
    if let Some(socket) = peer(&ctx) {
        show4(&ctx, socket);
    }
    1
}

#[cgroup_sock_addr(getpeername6)]
pub fn or_getpeername6(ctx: SockAddrContext) -> i32 {
    if let Some(socket) = peer(&ctx) {
        show6(&ctx, socket);
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

/// The peer that the app shall see, if another than the kernel says.
#[inline(always)]
fn peer(ctx: &SockAddrContext) -> Option<&Socket> {
    let port = u16::from_be(read!(ctx.sock_addr, user_port) as u16);
    let socket = of(ctx)?;
    (socket.is(Role::Served) || socket.is(Role::App) && port == PORT_OUTBOUND).then_some(socket)
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
    // SAFETY: the context of these programs always has its socket.
    noted(unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }).map(|socket| &*socket)
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
