//! The kernel programs. One file per kind of hook; each program fetches what its context says, asks
//! `proxy_common::decide` and acts.
//!
//! Sources: the kernel's `include/uapi/linux/bpf.h`, `net/core/filter.c`, `kernel/bpf/cgroup.c`.
//! Invariants: a pod is known by the cookie of its network namespace, its sidecar by its cgroup; a context's field is
//! read once, volatile and before any branch, because LLVM otherwise merges loads of two branches into one at a computed
//! offset, which the verifier refuses; no program takes its section's name.
#![no_std]
#![no_main]

mod arrivals;
mod bind;
mod connect;
mod inbound;
mod link;
mod maps;
mod names;
mod release;
mod sockops;
mod sockopt;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Every helper in use is free to programs of any licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";
