//! Two socket options, for sidecars alone: where an accepted connection wanted to go, and whom the app shall see.
//!
//! The programs are attached at the sidecar's cgroup, not at the root, where every socket option of the machine would
//! pay for them. Invariant: what is not ours goes on to the kernel untouched.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_sockopt;
use aya_ebpf::helpers::generated::{bpf_get_current_cgroup_id, bpf_get_netns_cookie};
use aya_ebpf::macros::cgroup_sockopt;
use aya_ebpf::programs::SockoptContext;
use proxy_common::address::Address;
use proxy_common::sockets::{DECLARED, Role};
use proxy_common::{MESH_CLIENT, SO_ORIGINAL_DST, SOCKADDR_IN6_BYTES, SOL_MESH};

use crate::maps::{note, noted, pod, read, write};

/// The call goes on.
const ALLOW: i32 = 1;
/// The call fails with EPERM.
const REFUSE: i32 = 0;
const SOL_IP: i32 = 0;
const SOL_IPV6: i32 = 41;
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
/// A program sees no more of an option than a page.
const PAGE_BYTES: i32 = 4096;

/// Answers SO_ORIGINAL_DST as connection tracking would.
#[cgroup_sockopt(getsockopt)]
pub fn or_original(ctx: SockoptContext) -> i32 {
    let (level, name) = (read!(ctx.sockopt, level), read!(ctx.sockopt, optname));
    if too_big(ctx.sockopt) || name != SO_ORIGINAL_DST {
        return ALLOW;
    }
    // SAFETY: the three unions hold these pointers in this kind of program.
    let (socket, value, end) = unsafe { ends(ctx.sockopt) };
    let Some(socket) = noted(socket) else { return ALLOW };
    if !socket.is(Role::Outbound) {
        return ALLOW;
    }
    let (address, port) = (socket.address.0, u32::from(socket.port.to_be()) << 16);
    if level == SOL_IP && socket.address.is_v4() && value + 16 <= end {
        let words = value as *mut u32;
        // SAFETY: the comparison above proves to the verifier that these 16 bytes are there.
        unsafe {
            *words = AF_INET | port;
            *words.add(1) = address[3];
            *words.add(2) = 0;
            *words.add(3) = 0;
        }
        write!(ctx.sockopt, 16, optlen);
        write!(ctx.sockopt, 0, retval);
    } else if level == SOL_IPV6 && value + SOCKADDR_IN6_BYTES as usize <= end {
        let words = value as *mut u32;
        // SAFETY: the comparison above proves to the verifier that these 28 bytes are there.
        unsafe {
            *words = AF_INET6 | port;
            *words.add(1) = 0;
            *words.add(2) = address[0];
            *words.add(3) = address[1];
            *words.add(4) = address[2];
            *words.add(5) = address[3];
            *words.add(6) = 0;
        }
        write!(ctx.sockopt, SOCKADDR_IN6_BYTES, optlen);
        write!(ctx.sockopt, 0, retval);
    }
    ALLOW
}

/// Takes the declaration of a connection's true client from the pod's own sidecar. Anybody else's call goes on to the
/// kernel, which knows no such option.
#[cgroup_sockopt(setsockopt)]
pub fn or_declare(ctx: SockoptContext) -> i32 {
    let (level, name, length) = (read!(ctx.sockopt, level), read!(ctx.sockopt, optname), read!(ctx.sockopt, optlen));
    // A length of -1: another copy of this program took it, as happens while one replaces the other.
    if too_big(ctx.sockopt) || level != SOL_MESH || name != MESH_CLIENT || length == -1 {
        return ALLOW;
    }
    // SAFETY: both helpers are free to this kind of program.
    let (netns, cgroup) = unsafe { (bpf_get_netns_cookie(ctx.as_ptr()), bpf_get_current_cgroup_id()) };
    if !pod(netns).is_some_and(|pod| pod.sidecar_cgroup == cgroup) {
        return ALLOW;
    }
    // SAFETY: the three unions hold these pointers in this kind of program.
    let (socket, value, end) = unsafe { ends(ctx.sockopt) };
    if length != SOCKADDR_IN6_BYTES || value + SOCKADDR_IN6_BYTES as usize > end {
        return REFUSE;
    }
    let words = value as *const u32;
    // SAFETY: the comparison above proves to the verifier that these 28 bytes are there.
    let (head, address) = unsafe { (*words, Address([*words.add(2), *words.add(3), *words.add(4), *words.add(5)])) };
    if head & 0xffff != AF_INET6 {
        return REFUSE;
    }
    let Some(socket) = note(socket) else { return REFUSE };
    // Only before the socket connects for somebody: what it is afterwards is not declared.
    if !socket.is(Role::None) && !socket.is(Role::Upstream) {
        return REFUSE;
    }
    socket.address = address;
    socket.port = u16::from_be((head >> 16) as u16);
    socket.role = Role::Upstream as u8;
    socket.flags |= DECLARED;
    // Taken: the kernel shall not see it.
    write!(ctx.sockopt, -1, optlen);
    ALLOW
}

/// Waves a long option on. Before Linux 6.5 the kernel answers EFAULT to one above a page unless the program sets its
/// length to 0: <https://git.kernel.org/linus/29ebbba7d461>.
#[inline(always)]
fn too_big(sockopt: *mut bpf_sockopt) -> bool {
    let big = read!(sockopt, optlen) > PAGE_BYTES;
    if big {
        write!(sockopt, 0, optlen);
    }
    big
}

/// The socket, the value's first byte and the byte after its last.
#[inline(always)]
unsafe fn ends(sockopt: *mut bpf_sockopt) -> (*mut aya_ebpf::bindings::bpf_sock, usize, usize) {
    // SAFETY: the caller's.
    unsafe {
        (
            (*sockopt).__bindgen_anon_1.sk,
            (*sockopt).__bindgen_anon_2.optval as usize,
            (*sockopt).__bindgen_anon_3.optval_end as usize,
        )
    }
}
