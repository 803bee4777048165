//! The sidecar's own ports are the sidecar's alone: an app that had one of them would take its pod's connections, or, at the
//! port of the metrics, those of everybody outside that no policy judges.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::{bpf_get_current_cgroup_id, bpf_get_netns_cookie};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::info;
use proxy_common::counters::Counter;
use proxy_common::decide::{Caller, is_own_port};

use crate::maps::{count, pod, read};

/// `bind` goes on.
const ALLOW: i32 = 1;
/// `bind` fails with EPERM.
const REFUSE: i32 = 0;
/// SOCK_STREAM: TCP, and MPTCP whose protocol is another.
const STREAM: u32 = 1;

#[cgroup_sock_addr(bind4)]
pub fn or_bind4(ctx: SockAddrContext) -> i32 {
    bind(&ctx)
}

#[cgroup_sock_addr(bind6)]
pub fn or_bind6(ctx: SockAddrContext) -> i32 {
    bind(&ctx)
}

#[inline(always)]
fn bind(ctx: &SockAddrContext) -> i32 {
    let port = u16::from_be(read!(ctx.sock_addr, user_port) as u16);
    if read!(ctx.sock_addr, type_) != STREAM || !is_own_port(port) {
        return ALLOW;
    }
    // SAFETY: both helpers are free to this kind of program.
    let (netns, cgroup) = unsafe { (bpf_get_netns_cookie(ctx.as_ptr()), bpf_get_current_cgroup_id()) };
    let Some(pod) = pod(netns) else { return ALLOW };
    if Caller::of(pod, cgroup) == Caller::Sidecar {
        return ALLOW;
    }
    count(netns, Counter::OwnPortBindRefused);
    info!(ctx, "refused: bind to a port of the sidecar's own, namespace {}", netns);
    REFUSE
}
