//! Inbound: whatever arrives in a pod's network namespace goes to its sidecar's one listener, or nowhere.
//!
//! Source: `Documentation/bpf/prog_sk_lookup.rst`. The accepted socket's local address is the true one, port included.

use aya_ebpf::bindings::{
    BPF_SK_LOOKUP_F_REPLACE,
    sk_action::{SK_DROP, SK_PASS},
};
use aya_ebpf::macros::sk_lookup;
use aya_ebpf::programs::SkLookupContext;
use aya_log_ebpf::warn;
use proxy_common::address::Address;
use proxy_common::counters::Counter;
use proxy_common::decide::{Arrival, OwnArrival, decide_arrival, decide_own};
use proxy_common::owndials::OwnDialKey;

use crate::maps::{ADDRESSES, LISTENERS, OWN_DIALS, count, excluded_inbound, pod, read, read_words};

/// AF_INET.
const V4: u32 = 2;
/// IPPROTO_TCP.
const TCP: u32 = 6;
/// The interface `lo`, in every network namespace.
const LOOPBACK_INTERFACE: u32 = 1;

#[sk_lookup]
pub fn or_inbound(ctx: SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    let protocol = read!(lookup, protocol);
    let over_loopback = read!(lookup, ingress_ifindex) == LOOPBACK_INTERFACE;
    if protocol != TCP || over_loopback {
        return SK_PASS;
    }
    let v4 = read!(lookup, family) == V4;
    let (local4, local6) = (read!(lookup, local_ip4), read_words!(lookup, local_ip6));
    let (remote4, remote6) = (read!(lookup, remote_ip4), read_words!(lookup, remote_ip6));
    let port = read!(lookup, local_port) as u16;
    let remote_port = u16::from_be(read!(lookup, remote_port));
    let local = if v4 { Address::v4(local4) } else { Address(local6) };
    let remote = if v4 { Address::v4(remote4) } else { Address(remote6) };
    // An address of no enrolled pod has no listener either: counted nowhere, dropped.
    // SAFETY: the value is copied at once.
    let netns = unsafe { ADDRESSES.get(&local) }.copied().unwrap_or(0);
    let excluded = pod(netns).is_some_and(|pod| excluded_inbound(netns, pod, port));
    match decide_arrival(&local, &remote, port, over_loopback, excluded) {
        Arrival::Pass => SK_PASS,
        Arrival::PassMetrics => {
            count(netns, Counter::Excluded);
            SK_PASS
        }
        Arrival::PassPort => {
            count(netns, Counter::ExcludedInboundPort);
            SK_PASS
        }
        Arrival::DropOwnPort => {
            count(netns, Counter::OwnPortRefused);
            SK_DROP
        }
        Arrival::Own => {
            let key = OwnDialKey { address: local, source_port: remote_port.into(), port: port.into() };
            // SAFETY: one word of it is copied at once.
            let declared = unsafe { OWN_DIALS.get(&key) }.map(|dial| dial.declared != 0);
            match decide_own(declared) {
                OwnArrival::Pass => {
                    count(netns, Counter::OwnDial);
                    SK_PASS
                }
                OwnArrival::Steer => steer(&ctx, netns, &local, Counter::SelfSteered),
                OwnArrival::Drop => {
                    count(netns, Counter::ForeignOwnDial);
                    warn!(
                        &ctx,
                        "dropped: a packet from the pod's own address that its sidecar did not send, namespace {}", netns
                    );
                    SK_DROP
                }
            }
        }
        Arrival::Steer => steer(&ctx, netns, &local, Counter::Steered),
    }
}

/// To the sidecar, or closed: passing here would hand the app unauthenticated traffic.
#[inline(always)]
fn steer(ctx: &SkLookupContext, netns: u64, local: &Address, counter: Counter) -> u32 {
    // Another program of the same namespace may have selected a socket before; ours has the last word.
    if LISTENERS.redirect_sk_lookup(ctx, local, BPF_SK_LOOKUP_F_REPLACE.into()).is_ok() {
        count(netns, counter);
        SK_PASS
    } else {
        count(netns, Counter::NoListener);
        SK_DROP
    }
}
