//! Outbound: `connect` of an app goes to its sidecar, `connect` of a sidecar passes.
//!
//! The hook also sees TCP Fast Open, the subflows of MPTCP, a socket bound to the pod's address, and a task of any other
//! cgroup that entered the namespace.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::generated::{bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_setsockopt};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::{info, warn};
use proxy_common::PORT_OUTBOUND;
use proxy_common::address::Address;
use proxy_common::counters::Counter;
use proxy_common::decide::{Caller, Connect, Excluded, decide_connect};
use proxy_common::sockets::{DECLARED, OWN, Role, UNSENT};

use crate::maps::{count, excluded, note, noted, pod, read, read_words, write};

/// `connect` goes on.
const ALLOW: i32 = 1;
/// `connect` fails with EPERM.
const REFUSE: i32 = 0;
/// IPPROTO_TCP.
const TCP: u32 = 6;
/// The interface `lo`, in every network namespace.
const LOOPBACK_INTERFACE: u32 = 1;
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
/// The sidecar's port as the context's field holds it.
const REDIRECT_PORT: u32 = PORT_OUTBOUND.to_be() as u32;

#[cgroup_sock_addr(connect4)]
pub fn or_connect4(ctx: SockAddrContext) -> i32 {
    let address = Address::v4(read!(ctx.sock_addr, user_ip4));
    let (verdict, redirect) = connect(&ctx, address);
    if redirect.is_some() {
        write!(ctx.sock_addr, Address::LOOPBACK_V4.0[3], user_ip4);
        write!(ctx.sock_addr, REDIRECT_PORT, user_port);
    }
    verdict
}

#[cgroup_sock_addr(connect6)]
pub fn or_connect6(ctx: SockAddrContext) -> i32 {
    let address = Address(read_words!(ctx.sock_addr, user_ip6));
    let (verdict, redirect) = connect(&ctx, address);
    if let Some(sidecar) = redirect {
        write!(ctx.sock_addr, sidecar.0[0], user_ip6[0]);
        write!(ctx.sock_addr, sidecar.0[1], user_ip6[1]);
        write!(ctx.sock_addr, sidecar.0[2], user_ip6[2]);
        write!(ctx.sock_addr, sidecar.0[3], user_ip6[3]);
        write!(ctx.sock_addr, REDIRECT_PORT, user_port);
    }
    verdict
}

/// The verdict, and where the connection goes instead.
#[inline(always)]
fn connect(ctx: &SockAddrContext, target: Address) -> (i32, Option<Address>) {
    let port = u16::from_be(read!(ctx.sock_addr, user_port) as u16);
    let protocol = read!(ctx.sock_addr, protocol);
    // SAFETY: a cgroup/connect program's context always has its socket.
    let socket = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    if protocol != TCP {
        return (ALLOW, None);
    }
    // SAFETY: the helper is free to this kind of program.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let Some(pod) = pod(netns) else { return (ALLOW, None) };
    // SAFETY: as above.
    let caller = Caller::of(pod, unsafe { bpf_get_current_cgroup_id() });
    let excluded = if caller == Caller::App { excluded(netns, pod, &target, port) } else { Excluded::No };
    match decide_connect(pod, caller, &target, excluded) {
        Connect::Pass => {
            // The socket may have been sent to the sidecar before, in vain.
            if let Some(noted) = noted(socket) {
                noted.role = Role::None as u8;
            }
            (ALLOW, None)
        }
        Connect::PassPort => pass_excluded(ctx, socket, netns, Counter::ExcludedOutboundPort),
        Connect::PassCidr => pass_excluded(ctx, socket, netns, Counter::ExcludedOutboundCidr),
        Connect::RefuseLinkLocal => {
            count(netns, Counter::LinkLocalRefused);
            info!(ctx, "refused: connect to a link-local address, namespace {}", netns);
            (REFUSE, None)
        }
        decision @ (Connect::RedirectV4 | Connect::RedirectV6) => {
            if !released(ctx, socket) {
                count(netns, Counter::DeviceRefused);
                info!(ctx, "refused: connect of a socket that is bound to a device, namespace {}", netns);
                return (REFUSE, None);
            }
            let Some(noted) = note(socket) else { return (not_noted(ctx, netns), None) };
            noted.address = target;
            noted.port = port;
            noted.flags = UNSENT;
            noted.role = Role::App as u8;
            count(netns, Counter::Redirected);
            let sidecar = if decision == Connect::RedirectV4 { Address::LOOPBACK_V4 } else { Address::LOOPBACK_V6 };
            (ALLOW, Some(sidecar))
        }
        Connect::Dial => {
            if let Some(noted) = note(socket) {
                noted.flags &= DECLARED;
                noted.role = Role::Upstream as u8;
            }
            (ALLOW, None)
        }
        Connect::DialOwn => {
            let Some(noted) = note(socket) else { return (not_noted(ctx, netns), None) };
            noted.flags = noted.flags & DECLARED | OWN;
            noted.role = Role::Upstream as u8;
            (ALLOW, None)
        }
    }
}

/// Lets go of the device that an app bound its socket to: over that device its sidecar at the loopback address cannot be
/// reached, and a SYN for it would leave the pod instead. Only a task with CAP_NET_RAW may have it changed.
#[inline(always)]
fn released(ctx: &SockAddrContext, socket: *mut bpf_sock) -> bool {
    // SAFETY: the context's socket is always there, and the verifier lets this field be read.
    let device = unsafe { core::ptr::read_volatile(&raw const (*socket).bound_dev_if) };
    if device == 0 || device == LOOPBACK_INTERFACE {
        return true;
    }
    let mut none = [0_u8; 4];
    // SAFETY: the helper is free to this kind of program, and reads the four bytes that it is given.
    unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, SO_BINDTODEVICE, none.as_mut_ptr().cast(), 4) == 0 }
}

/// Lets a connection go where its pod's owner wants it past the sidecar, and notes that it is one of those.
#[inline(always)]
fn pass_excluded(ctx: &SockAddrContext, socket: *mut bpf_sock, netns: u64, counter: Counter) -> (i32, Option<Address>) {
    let Some(noted) = note(socket) else { return (not_noted(ctx, netns), None) };
    noted.flags = 0;
    noted.role = Role::Excluded as u8;
    count(netns, counter);
    (ALLOW, None)
}

#[inline(always)]
fn not_noted(ctx: &SockAddrContext, netns: u64) -> i32 {
    count(netns, Counter::NotNoted);
    warn!(ctx, "refused: no memory to note a connection, namespace {}", netns);
    REFUSE
}
