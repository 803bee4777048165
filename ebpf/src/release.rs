//! What an app lets go before it began: `connect` passed its hook, and then the kernel found no port for it (EADDRNOTAVAIL), which
//! no hook is told of. Nothing else comes between the two but another program that refuses, and a Fast Open that was deferred.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use aya_ebpf::macros::cgroup_sock;
use aya_ebpf::programs::SockContext;
use aya_log_ebpf::warn;
use proxy_common::counters::Counter;
use proxy_common::decide::decide_unsent;

use crate::maps::{count, noted};

#[cgroup_sock(sock_release)]
pub fn or_release(ctx: SockContext) -> i32 {
    if noted(ctx.sock).is_some_and(|socket| decide_unsent(socket)) {
        // SAFETY: the helper is free to this kind of program.
        let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
        count(netns, Counter::NoPort);
        warn!(&ctx, "a connection found no port, namespace {}", netns);
    }
    1
}
