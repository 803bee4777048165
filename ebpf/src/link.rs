//! The node's end of a pod's link: what leaves a pod without having passed a connect hook, or takes a connection that no hook at
//! arrival gave it. Raw and packet sockets pass none, and neither does what a pod forwards for somebody else.
//!
//! Source: `Documentation/networking/filter.rst`, `include/uapi/linux/pkt_cls.h`. A packet keeps its socket on its way over
//! the link, so the note that the connect hook made at a socket is proof that its SYN may leave.

use aya_ebpf::bindings::{__sk_buff, bpf_sock};
use aya_ebpf::helpers::generated::{bpf_sk_fullsock, bpf_skb_load_bytes_relative};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::warn;
use proxy_common::address::Address;
use proxy_common::counters::Counter;
use proxy_common::decide::{Leaving, Sender, decide_accepting, decide_leaving};
use proxy_common::packets::{self, Next, Step};
use proxy_common::pods::ENFORCES;

use crate::maps::{LINKS, count, noted, pod, read};

/// The packet goes on to the next program, or on its way: `TC_ACT_UNSPEC`, which is `TCX_NEXT` too.
const GO_ON: i32 = -1;
/// The packet goes nowhere: `TC_ACT_SHOT`, which is `TCX_DROP` too.
const DROP: i32 = 2;
/// ETH_P_IP and ETH_P_IPV6.
const V4: u16 = 0x0800;
const V6: u16 = 0x86dd;
/// Offsets count from the network header.
const FROM_NETWORK: u32 = 1;

#[classifier]
pub fn or_link(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let (step, source) = step(skb);
    if matches!(step, Step::Other) {
        return GO_ON;
    }
    let device = read!(skb, ifindex);
    // SAFETY: the value is copied at once.
    let Some(netns) = unsafe { LINKS.get(&device) }.copied() else { return GO_ON };
    let Some(pod) = pod(netns) else { return GO_ON };
    // SAFETY: the verifier lets the field be read, as a socket or null.
    let socket = unsafe { (*skb).__bindgen_anon_2.sk };
    let sender = sender(socket);
    let leaving = match step {
        Step::Accepts => decide_accepting(sender, pod.owns(&source)),
        _ => decide_leaving(noted(socket).map(|socket| &*socket), sender),
    };
    let counter = match leaving {
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

/// What a frame does for a TCP connection, and from whom it says that it is. The kernel has taken off one tag at most.
#[inline(always)]
fn step(skb: *mut __sk_buff) -> (Step, Address) {
    let mut ether_type = u16::from_be(read!(skb, protocol) as u16);
    let mut at = 0;
    for _ in 0..packets::TAGS_MAX {
        if !packets::is_tag(ether_type) {
            break;
        }
        let Some(tag) = load::<4>(skb, at) else { return (Step::Other, Address::NONE) };
        ether_type = u16::from_be_bytes([tag[2], tag[3]]);
        at += 4;
    }
    match ether_type {
        V4 => step_v4(skb, at),
        V6 => step_v6(skb, at),
        _ if packets::is_tag(ether_type) => (Step::Begins, Address::NONE),
        _ => (Step::Other, Address::NONE),
    }
}

/// The same of an IPv4 packet that stands `at` so many bytes behind the network header.
#[inline(always)]
fn step_v4(skb: *mut __sk_buff, at: u32) -> (Step, Address) {
    let Some(head) = load::<20>(skb, at) else { return (Step::Other, Address::NONE) };
    let source = Address::v4(u32::from_ne_bytes([head[12], head[13], head[14], head[15]]));
    let step = match packets::v4(&head) {
        Next::Nothing | Next::Header(_, _) => Step::Other,
        Next::Fragment => Step::Begins,
        Next::Tcp(behind) => step_tcp(skb, at + behind),
    };
    (step, source)
}

/// The same of an IPv6 packet. One with more headers than are looked at may begin anything.
#[inline(always)]
fn step_v6(skb: *mut __sk_buff, at: u32) -> (Step, Address) {
    let Some(head) = load::<40>(skb, at) else { return (Step::Other, Address::NONE) };
    let word = |first: usize| u32::from_ne_bytes([head[first], head[first + 1], head[first + 2], head[first + 3]]);
    let source = Address([word(8), word(12), word(16), word(20)]);
    let mut next = packets::v6(&head);
    for _ in 0..packets::HEADERS_MAX {
        let (kind, behind) = match next {
            Next::Nothing => return (Step::Other, source),
            Next::Fragment => return (Step::Begins, source),
            Next::Tcp(behind) => return (step_tcp(skb, at + behind), source),
            Next::Header(kind, behind) => (kind, behind),
        };
        let Some(header) = load::<8>(skb, at + behind) else { return (Step::Other, source) };
        next = packets::v6_header(kind, behind, &header);
    }
    (Step::Begins, source)
}

#[inline(always)]
fn step_tcp(skb: *mut __sk_buff, at: u32) -> Step {
    load::<14>(skb, at).map_or(Step::Other, |head| packets::step(head[13]))
}

/// Bytes of the packet, from its network header on; `None` if it is shorter.
#[inline(always)]
fn load<const N: usize>(skb: *mut __sk_buff, at: u32) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: the helper writes exactly as many bytes as there are.
    let result = unsafe { bpf_skb_load_bytes_relative(skb.cast(), at, bytes.as_mut_ptr().cast(), N as u32, FROM_NETWORK) };
    (result == 0).then_some(bytes)
}
