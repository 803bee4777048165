//! The node's end of a pod's link: what leaves a pod without having passed a connect hook. Raw and packet sockets pass none,
//! and neither does what a pod forwards for somebody else.
//!
//! Source: `Documentation/networking/filter.rst`, `include/uapi/linux/pkt_cls.h`. A packet keeps its socket on its way over
//! the link, so the note that the connect hook made at a socket is proof that its SYN may leave.

use aya_ebpf::bindings::{__sk_buff, bpf_sock};
use aya_ebpf::helpers::generated::{bpf_sk_fullsock, bpf_skb_load_bytes_relative};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::warn;
use proxy_common::counters::Counter;
use proxy_common::decide::{Leaving, Sender, decide_leaving};
use proxy_common::packets::{self, Next};
use proxy_common::pods::ENFORCES;

use crate::maps::{LINKS, count, noted, pod, read};

/// The packet goes on to the next program, or on its way: `TC_ACT_UNSPEC`, which is `TCX_NEXT` too.
const GO_ON: i32 = -1;
/// The packet goes nowhere: `TC_ACT_SHOT`, which is `TCX_DROP` too.
const DROP: i32 = 2;
/// ETH_P_IP and ETH_P_IPV6, as the context holds them.
const V4: u32 = 0x0800_u16.to_be() as u32;
const V6: u32 = 0x86dd_u16.to_be() as u32;
/// Offsets count from the network header.
const FROM_NETWORK: u32 = 1;

#[classifier]
pub fn or_link(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let (protocol, device) = (read!(skb, protocol), read!(skb, ifindex));
    let begins = match protocol {
        V4 => begins_v4(skb),
        V6 => begins_v6(skb),
        _ => false,
    };
    if !begins {
        return GO_ON;
    }
    // SAFETY: the value is copied at once.
    let Some(netns) = unsafe { LINKS.get(&device) }.copied() else { return GO_ON };
    let Some(pod) = pod(netns) else { return GO_ON };
    // SAFETY: the verifier lets the field be read, as a socket or null.
    let socket = unsafe { (*skb).__bindgen_anon_2.sk };
    let sender = sender(socket);
    let counter = match decide_leaving(noted(socket).map(|socket| &*socket), sender) {
        Leaving::Pass => return GO_ON,
        Leaving::RawSocket => Counter::RawSocket,
        Leaving::UncapturedSocket => Counter::UncapturedSocket,
        Leaving::NoSocket => Counter::NoSocket,
    };
    count(netns, counter);
    if !pod.has(ENFORCES) {
        warn!(&ctx, "a connection gets past its sidecar, namespace {}", netns);
        return GO_ON;
    }
    count(netns, Counter::BypassDropped);
    warn!(&ctx, "dropped: a connection that gets past its sidecar, namespace {}", netns);
    DROP
}

#[inline(always)]
fn sender(socket: *mut bpf_sock) -> Sender {
    if socket.is_null() {
        return Sender::Nobody;
    }
    // SAFETY: the socket is not null; the helper gives it with all of its fields, or null.
    let full = unsafe { bpf_sk_fullsock(socket) };
    if full.is_null() {
        return Sender::Nobody;
    }
    // SAFETY: not null, and the verifier lets this field be read.
    let kind = unsafe { core::ptr::read_volatile(&raw const (*full).type_) };
    if kind == SOCK_STREAM { Sender::Stream } else { Sender::Other }
}

const SOCK_STREAM: u32 = 1;

/// Does this IPv4 packet begin a TCP connection, or may it?
#[inline(always)]
fn begins_v4(skb: *mut __sk_buff) -> bool {
    let Some(head) = load::<20>(skb, 0) else { return false };
    match packets::v4(&head) {
        Next::Nothing => false,
        Next::Fragment => true,
        Next::Tcp(at) => begins(skb, at),
        Next::Header(_, _) => false,
    }
}

/// The same of an IPv6 packet. One with more headers than are looked at may begin anything.
#[inline(always)]
fn begins_v6(skb: *mut __sk_buff) -> bool {
    let Some(head) = load::<40>(skb, 0) else { return false };
    let mut next = packets::v6(&head);
    for _ in 0..packets::HEADERS_MAX {
        let (kind, at) = match next {
            Next::Nothing => return false,
            Next::Fragment => return true,
            Next::Tcp(at) => return begins(skb, at),
            Next::Header(kind, at) => (kind, at),
        };
        let Some(header) = load::<8>(skb, at) else { return false };
        next = packets::v6_header(kind, at, &header);
    }
    true
}

#[inline(always)]
fn begins(skb: *mut __sk_buff, at: u32) -> bool {
    load::<14>(skb, at).is_some_and(|head| packets::is_first(head[13]))
}

/// Bytes of the packet, from its network header on; `None` if it is shorter.
#[inline(always)]
fn load<const N: usize>(skb: *mut __sk_buff, at: u32) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: the helper writes exactly as many bytes as there are.
    let result = unsafe {
        bpf_skb_load_bytes_relative(skb.cast(), at, bytes.as_mut_ptr().cast(), N as u32, FROM_NETWORK)
    };
    (result == 0).then_some(bytes)
}
