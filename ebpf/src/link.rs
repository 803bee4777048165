//! The node's end of a pod's link: what leaves a pod without having passed a connect hook, or takes a connection that no hook at
//! arrival gave it. Raw and packet sockets pass none, and neither does what a pod forwards for somebody else. What is forwarded with
//! the pod's address in place of another's looks as the pod's own, and the pod's TCP knows nothing of it.
//!
//! Source: `Documentation/networking/filter.rst`, `include/uapi/linux/pkt_cls.h`. A packet keeps its socket on its way over
//! the link, so the note that the connect hook made at a socket is proof that its SYN may leave.

use core::ffi::c_void;

use aya_ebpf::bindings::{__sk_buff, bpf_sock, bpf_sock_tuple};
use aya_ebpf::helpers::generated::{
    bpf_sk_fullsock, bpf_sk_lookup_tcp, bpf_sk_release, bpf_skb_load_bytes_relative, bpf_skc_lookup_tcp,
};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::warn;
use proxy_common::address::Address;
use proxy_common::counters::Counter;
use proxy_common::decide::{Held, Leaving, Sender, decide_accepting, decide_continuing, decide_leaving};
use proxy_common::packets::{self, Next, Step};
use proxy_common::pods::{ENFORCES, Pod};

use crate::maps::{LINKS, TOLD, count, excluded_inbound, noted, pod, read};

/// The packet goes on to the next program, or on its way: `TC_ACT_UNSPEC`, which is `TCX_NEXT` too.
const GO_ON: i32 = -1;
/// The packet goes nowhere: `TC_ACT_SHOT`, which is `TCX_DROP` too.
const DROP: i32 = 2;
/// ETH_P_IP and ETH_P_IPV6.
const V4: u16 = 0x0800;
const V6: u16 = 0x86dd;
/// Offsets count from the network header.
const FROM_NETWORK: u32 = 1;

/// What a frame does for a TCP connection, and between whom it says that it is.
struct Segment {
    step: Step,
    source: Address,
    target: Address,
    /// Its source and target, in network byte order.
    ports: [u16; 2],
}

impl Segment {
    const OTHER: Self = Self { step: Step::Other, source: Address::NONE, target: Address::NONE, ports: [0; 2] };
    const BEGINS: Self = Self { step: Step::Begins, ..Self::OTHER };
}

#[classifier]
pub fn or_link(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let segment = segment(skb);
    // SAFETY: the verifier lets the field be read, as a socket or null.
    let socket = unsafe { (*skb).__bindgen_anon_2.sk };
    let sender = match segment.step {
        Step::Other => return GO_ON,
        Step::Begins | Step::Accepts => sender(socket),
        // Nearly every packet: a socket of TCP sends for its own connection.
        Step::Continues => match sender(socket) {
            Sender::Stream => return GO_ON,
            other => other,
        },
    };
    let device = read!(skb, ifindex);
    // SAFETY: the value is copied at once.
    let Some(netns) = unsafe { LINKS.get(&device) }.copied() else { return GO_ON };
    let Some(pod) = pod(netns) else { return GO_ON };
    let own = pod.owns(&segment.source);
    let leaving = match segment.step {
        Step::Accepts if own => {
            let excluded = excluded_inbound(netns, pod, u16::from_be(segment.ports[0]));
            decide_accepting(sender, own, held::<true>(skb, pod, &segment), excluded)
        }
        Step::Accepts => decide_accepting(sender, own, Held::Unasked, false),
        Step::Continues if own => decide_continuing(sender, held::<false>(skb, pod, &segment)),
        // Of others than the pod itself the begin was seen.
        Step::Continues => return GO_ON,
        _ => decide_leaving(noted(socket).map(|socket| &*socket), sender),
    };
    let counter = match leaving {
        Leaving::Pass => return GO_ON,
        Leaving::RawSocket => Counter::RawSocket,
        Leaving::UncapturedSocket => Counter::UncapturedSocket,
        Leaving::NoSocket => Counter::NoSocket,
    };
    let enforces = pod.has(ENFORCES);
    if !enforces && matches!(segment.step, Step::Continues) && is_told(&segment) {
        return GO_ON;
    }
    count(netns, counter);
    if !enforces {
        warn!(&ctx, "a connection gets past its sidecar, namespace {}", netns);
        return GO_ON;
    }
    count(netns, Counter::BypassDropped);
    warn!(&ctx, "dropped: a connection that gets past its sidecar, namespace {}", netns);
    DROP
}

/// Was this connection's counted already? Two that share a place are counted again in turn.
#[inline(always)]
fn is_told(segment: &Segment) -> bool {
    let [a, b, c, d] = segment.target.0;
    let peer = u64::from(a ^ c).rotate_left(32) ^ u64::from(b ^ d);
    let ports = u64::from(segment.ports[0]) << 16 | u64::from(segment.ports[1]);
    // Never 0, which a place holds that nobody took.
    let print = (peer ^ ports.rotate_left(24) ^ u64::from(segment.source.0[3])).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let Some(place) = TOLD.get_ptr_mut((print >> 54) as u32) else { return false };
    // SAFETY: the map stands for as long as the program; a word is read and written whole.
    unsafe { core::ptr::replace(place, print) == print }
}

/// What the pod's TCP has for a connection of which it sends `segment`, by what it would find for the answer. `OR_LISTENER`: of one
/// that is being accepted the listener, which the handshake's own socket stands for otherwise.
#[inline(always)]
fn held<const OR_LISTENER: bool>(skb: *mut __sk_buff, pod: &Pod, segment: &Segment) -> Held {
    let Some(number) = pod.number.checked_sub(1) else { return Held::Unasked };
    let (tuple, bytes) = Tuple::of_answer(segment);
    let tuple = (&raw const tuple).cast_mut().cast::<bpf_sock_tuple>();
    let look_up = if OR_LISTENER { bpf_sk_lookup_tcp } else { bpf_skc_lookup_tcp };
    // SAFETY: the tuple has the size that tells its kind.
    let found = unsafe { look_up(skb.cast(), tuple, bytes, number.into(), 0) };
    if found.is_null() {
        return Held::Nothing;
    }
    let (state, port) = (read!(found, state), read!(found, src_port));
    // SAFETY: it was found above, and is given back once.
    unsafe { bpf_sk_release(found.cast::<c_void>()) };
    if state == LISTENS { Held::Listener(port as u16) } else { Held::Connection }
}

/// TCP_LISTEN of `include/net/tcp_states.h`.
const LISTENS: u32 = 10;

/// `struct bpf_sock_tuple`: its kind is told by its size.
#[repr(C)]
struct Tuple([u32; 9]);

impl Tuple {
    const BYTES_V4: u32 = 12;
    const BYTES_V6: u32 = 36;

    /// That of the answer to a segment, and its size.
    #[inline(always)]
    fn of_answer(segment: &Segment) -> (Self, u32) {
        let (peer, own) = (segment.target.0, segment.source.0);
        let [from, to] = segment.ports;
        let ports = u32::from_ne_bytes([to.to_ne_bytes()[0], to.to_ne_bytes()[1], from.to_ne_bytes()[0], from.to_ne_bytes()[1]]);
        if segment.source.is_v4() {
            (Self([peer[3], own[3], ports, 0, 0, 0, 0, 0, 0]), Self::BYTES_V4)
        } else {
            (Self([peer[0], peer[1], peer[2], peer[3], own[0], own[1], own[2], own[3], ports]), Self::BYTES_V6)
        }
    }
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

/// The segment of TCP in a frame, which may be hidden. The kernel has taken off one tag at most.
#[inline(always)]
fn segment(skb: *mut __sk_buff) -> Segment {
    let mut ether_type = u16::from_be(read!(skb, protocol) as u16);
    let mut at = 0;
    for _ in 0..packets::TAGS_MAX {
        if !packets::is_tag(ether_type) {
            break;
        }
        let Some(tag) = load::<4>(skb, at) else { return Segment::OTHER };
        ether_type = u16::from_be_bytes([tag[2], tag[3]]);
        at += 4;
    }
    match ether_type {
        V4 => segment_v4(skb, at),
        V6 => segment_v6(skb, at),
        _ if packets::is_tag(ether_type) => Segment::BEGINS,
        _ => Segment::OTHER,
    }
}

/// The same of an IPv4 packet that stands `at` so many bytes behind the network header.
#[inline(always)]
fn segment_v4(skb: *mut __sk_buff, at: u32) -> Segment {
    let Some(head) = load::<20>(skb, at) else { return Segment::OTHER };
    match packets::v4(&head) {
        Next::Nothing | Next::Header(_, _) => Segment::OTHER,
        Next::Fragment => Segment::BEGINS,
        Next::Tcp(behind) => {
            let address = |first: usize| {
                Address::v4(u32::from_ne_bytes([head[first], head[first + 1], head[first + 2], head[first + 3]]))
            };
            segment_tcp(skb, at + behind, address(12), address(16))
        }
    }
}

/// The same of an IPv6 packet. One with more headers than are looked at may begin anything.
#[inline(always)]
fn segment_v6(skb: *mut __sk_buff, at: u32) -> Segment {
    let Some(head) = load::<40>(skb, at) else { return Segment::OTHER };
    let word = |first: usize| u32::from_ne_bytes([head[first], head[first + 1], head[first + 2], head[first + 3]]);
    let address = |first: usize| Address([word(first), word(first + 4), word(first + 8), word(first + 12)]);
    let mut next = packets::v6(&head);
    for _ in 0..packets::HEADERS_MAX {
        let (kind, behind) = match next {
            Next::Nothing => return Segment::OTHER,
            Next::Fragment => return Segment::BEGINS,
            Next::Tcp(behind) => return segment_tcp(skb, at + behind, address(8), address(24)),
            Next::Header(kind, behind) => (kind, behind),
        };
        let Some(header) = load::<8>(skb, at + behind) else { return Segment::OTHER };
        next = packets::v6_header(kind, behind, &header);
    }
    Segment::BEGINS
}

#[inline(always)]
fn segment_tcp(skb: *mut __sk_buff, at: u32, source: Address, target: Address) -> Segment {
    let Some(head) = load::<14>(skb, at) else { return Segment::OTHER };
    let port = |first: usize| u16::from_ne_bytes([head[first], head[first + 1]]);
    Segment { step: packets::step(head[13]), source, target, ports: [port(0), port(2)] }
}

/// Bytes of the packet, from its network header on; `None` if it is shorter.
#[inline(always)]
fn load<const N: usize>(skb: *mut __sk_buff, at: u32) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: the helper writes exactly as many bytes as there are.
    let result = unsafe { bpf_skb_load_bytes_relative(skb.cast(), at, bytes.as_mut_ptr().cast(), N as u32, FROM_NETWORK) };
    (result == 0).then_some(bytes)
}
