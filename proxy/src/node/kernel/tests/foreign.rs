//! Programs of nobody of ours, written as instructions, so that nothing of ours is in them.

use std::os::fd::FromRawFd as _;

use super::*;

/// Commands of bpf(2).
const MAP_CREATE: libc::c_int = 0;
const MAP_LOOKUP_ELEM: libc::c_int = 1;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const RAW_TRACEPOINT_OPEN: libc::c_int = 17;
/// Types of programs and maps.
const SCHED_CLS: u32 = 3;
const SOCK_OPS: u32 = 13;
const RAW_TRACEPOINT: u32 = 17;
const CGROUP_SOCK_ADDR: u32 = 18;
const SK_LOOKUP: u32 = 30;
const SOCKMAP: u32 = 15;
const ARRAY: u32 = 2;

fn bpf(command: libc::c_int, attributes: &mut [u64; 16]) -> i64 {
    // SAFETY: the attributes are initialised, of the size that is passed, and what they point to lives through the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), 128) };
    assert!(result >= 0, "bpf({command}): {}", io::Error::last_os_error());
    result
}

fn made(number: i64) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(number.try_into().unwrap()) }
}

fn words(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// One instruction: operation, destination, source, offset, constant.
const fn step(operation: u8, to: u8, from: u8, offset: i16, constant: u32) -> u64 {
    operation as u64 | ((to | from << 4) as u64) << 8 | (offset as u16 as u64) << 16 | (constant as u64) << 32
}

fn load(kind: u32, hook: Hook, name: &str, steps: &[u64]) -> OwnedFd {
    load_for(kind, hook as u32, name, steps)
}

fn load_for(kind: u32, hook: u32, name: &str, steps: &[u64]) -> OwnedFd {
    let mut attributes = [0; 16];
    attributes[0] = words(kind, steps.len().try_into().unwrap());
    attributes[1] = steps.as_ptr().expose_provenance() as u64;
    attributes[2] = c"GPL".as_ptr().expose_provenance() as u64;
    let mut letters = [0; 16];
    letters[..name.len()].copy_from_slice(name.as_bytes());
    attributes[6] = u64::from_ne_bytes(letters[..8].try_into().unwrap());
    attributes[7] = u64::from_ne_bytes(letters[8..].try_into().unwrap());
    attributes[8] = words(0, hook);
    made(bpf(PROG_LOAD, &mut attributes))
}

/// Sends who asks for `asked`, at whatever port, to `backend`.
pub(super) fn balancer(asked: Ipv4Addr, backend: Ipv4Addr, port: u16) -> OwnedFd {
    let word = |address: Ipv4Addr| u32::from_ne_bytes(address.octets());
    let steps = [
        step(0x61, 2, 1, 4, 0),
        step(0x56, 2, 0, 4, word(asked)),
        step(0xb4, 3, 0, 0, word(backend)),
        step(0x63, 1, 3, 4, 0),
        step(0xb4, 3, 0, 0, port.to_be().into()),
        step(0x63, 1, 3, 24, 0),
        step(0xb7, 0, 0, 0, 1),
        step(0x95, 0, 0, 0, 0),
    ];
    load(CGROUP_SOCK_ADDR, Hook::Connect4, "socket_lb", &steps)
}

/// Lets everything pass and does nothing.
const PASSING: [u64; 2] = [step(0xb7, 0, 0, 0, 1), step(0x95, 0, 0, 0, 0)];

/// Selects nothing.
pub(super) fn onlooker() -> OwnedFd {
    load(SK_LOOKUP, Hook::SkLookup, "onlooker", &PASSING)
}

/// Lets every IPv4 connection begin where it wants to.
pub(super) fn passer_by() -> OwnedFd {
    load(CGROUP_SOCK_ADDR, Hook::Connect4, "passer_by", &PASSING)
}

/// Is told of every event of a TCP socket's life, and does nothing about it.
pub(super) fn listener_in() -> OwnedFd {
    load(SOCK_OPS, Hook::SockOps, "listener_in", &PASSING)
}

/// Answers the kernel's question for the first timeout of a socket that connects: so many of the kernel's clock ticks.
pub(super) fn patient(ticks: u32) -> OwnedFd {
    const TIMEOUT_INIT: u32 = 1;
    let steps = [
        step(0x61, 2, 1, 0, 0),
        step(0x56, 2, 0, 2, TIMEOUT_INIT),
        step(0xb4, 3, 0, 0, ticks),
        step(0x63, 1, 3, 4, 0),
        step(0xb7, 0, 0, 0, 1),
        step(0x95, 0, 0, 0, 0),
    ];
    load(SOCK_OPS, Hook::SockOps, "patient", &steps)
}

/// Asks for the event of each round trip, when a handshake is done, and counts what it gets.
pub(super) struct Timekeeper {
    pub(super) program: OwnedFd,
    count: OwnedFd,
}

impl Timekeeper {
    pub(super) fn load() -> Self {
        const PASSIVE_ESTABLISHED: u32 = 5;
        const RTT: u32 = 12;
        const RTT_FLAG: u32 = 1 << 3;
        let (look_up, set_flags) = (1, 59);
        let mut attributes = [0; 16];
        attributes[0] = words(ARRAY, 4);
        attributes[1] = words(8, 1);
        let count = made(bpf(MAP_CREATE, &mut attributes));
        let steps = [
            step(0x61, 2, 1, 0, 0),
            step(0x16, 2, 0, 4, RTT),
            step(0x56, 2, 0, 12, PASSIVE_ESTABLISHED),
            step(0xb7, 2, 0, 0, RTT_FLAG),
            step(0x85, 0, 0, 0, set_flags),
            step(0x05, 0, 0, 9, 0),
            step(0x62, 10, 0, -4, 0),
            step(0xbf, 2, 10, 0, 0),
            step(0x07, 2, 0, 0, (-4_i32).cast_unsigned()),
            step(0x18, 1, 1, 0, count.as_raw_fd().cast_unsigned()),
            0,
            step(0x85, 0, 0, 0, look_up),
            step(0x15, 0, 0, 2, 0),
            step(0xb7, 1, 0, 0, 1),
            step(0xdb, 0, 1, 0, 0),
            step(0xb7, 0, 0, 0, 1),
            step(0x95, 0, 0, 0, 0),
        ];
        Self { program: load(SOCK_OPS, Hook::SockOps, "timekeeper", &steps), count }
    }

    pub(super) fn count(&self) -> u64 {
        let (key, mut value) = (0_u32, 0_u64);
        let mut attributes = [0; 16];
        attributes[0] = words(self.count.as_raw_fd().cast_unsigned(), 0);
        attributes[1] = (&raw const key).expose_provenance() as u64;
        attributes[2] = (&raw mut value).expose_provenance() as u64;
        bpf(MAP_LOOKUP_ELEM, &mut attributes);
        value
    }
}

/// Is told of each change of a TCP socket's state, wherever on the machine, and does nothing about it. Attached until it is dropped.
pub(super) fn tracer() -> OwnedFd {
    let program = load_for(RAW_TRACEPOINT, 0, "tracer", &PASSING);
    let mut attributes = [0; 16];
    attributes[0] = c"inet_sock_set_state".as_ptr().expose_provenance() as u64;
    attributes[1] = words(program.as_raw_fd().cast_unsigned(), 0);
    made(bpf(RAW_TRACEPOINT_OPEN, &mut attributes))
}

/// Gives everything that arrives to `listener`.
pub(super) fn thief(listener: &TcpListener) -> OwnedFd {
    let mut attributes = [0; 16];
    attributes[0] = words(SOCKMAP, 4);
    attributes[1] = words(4, 1);
    let map = made(bpf(MAP_CREATE, &mut attributes));
    let (key, value) = (0_u32, listener.as_raw_fd());
    let mut attributes = [0; 16];
    attributes[0] = words(map.as_raw_fd().cast_unsigned(), 0);
    attributes[1] = (&raw const key).expose_provenance() as u64;
    attributes[2] = (&raw const value).expose_provenance() as u64;
    bpf(MAP_UPDATE_ELEM, &mut attributes);
    let (look_up, release, assign) = (1, 86, 124);
    let steps = [
        step(0xbf, 6, 1, 0, 0),
        step(0x62, 10, 0, -4, 0),
        step(0xbf, 2, 10, 0, 0),
        step(0x07, 2, 0, 0, (-4_i32).cast_unsigned()),
        step(0x18, 1, 1, 0, map.as_raw_fd().cast_unsigned()),
        0,
        step(0x85, 0, 0, 0, look_up),
        step(0x15, 0, 0, 7, 0),
        step(0xbf, 7, 0, 0, 0),
        step(0xbf, 1, 6, 0, 0),
        step(0xbf, 2, 7, 0, 0),
        step(0xb7, 3, 0, 0, 1),
        step(0x85, 0, 0, 0, assign),
        step(0xbf, 1, 7, 0, 0),
        step(0x85, 0, 0, 0, release),
        step(0xb7, 0, 0, 0, 1),
        step(0x95, 0, 0, 0, 0),
    ];
    load(SK_LOOKUP, Hook::SkLookup, "thief", &steps)
}

pub(super) fn attach(program: &OwnedFd, to: &File, hook: Hook) -> OwnedFd {
    // Not by `links::create`, which asks for the first place.
    let mut attributes = [0; 16];
    attributes[0] = words(program.as_raw_fd().cast_unsigned(), to.as_raw_fd().cast_unsigned());
    attributes[1] = words(hook as u32, 0);
    made(bpf(28, &mut attributes))
}

/// Lets everything that enters the device pass, before whatever else is there is asked.
pub(super) fn attach_first_at_device(device: u32) -> OwnedFd {
    attach_at_device(&doorkeeper(), device, Hook::TcxIngress as u32, BPF_F_BEFORE)
}

/// The same after whatever else is there was asked.
pub(super) fn attach_last_at_device(device: u32) -> OwnedFd {
    attach_at_device(&doorkeeper(), device, Hook::TcxIngress as u32, BPF_F_AFTER)
}

fn doorkeeper() -> OwnedFd {
    // TCX_PASS.
    load(SCHED_CLS, Hook::TcxIngress, "doorkeeper", &[step(0xb7, 0, 0, 0, 0), step(0x95, 0, 0, 0, 0)])
}

/// Puts tags of 802.1Q before whatever leaves by the device: as a VLAN device on it does, the last one beside the packet's bytes.
pub(super) fn tag_what_leaves(device: u32, tags: usize) -> OwnedFd {
    const TCX_EGRESS: u32 = 47;
    const NUMBER: u32 = 7;
    let vlan_push = 18;
    let tag = [
        step(0xbf, 1, 6, 0, 0),
        step(0xb7, 2, 0, 0, 0x8100_u16.to_be().into()),
        step(0xb7, 3, 0, 0, NUMBER),
        step(0x85, 0, 0, 0, vlan_push),
    ];
    let steps = [&[step(0xbf, 6, 1, 0, 0)][..], &tag.repeat(tags), &[step(0xb7, 0, 0, 0, 0), step(0x95, 0, 0, 0, 0)]].concat();
    let program = load_for(SCHED_CLS, TCX_EGRESS, "tagger", &steps);
    attach_at_device(&program, device, TCX_EGRESS, BPF_F_BEFORE)
}

/// Places among the programs of one device.
const BPF_F_BEFORE: u32 = 1 << 3;
const BPF_F_AFTER: u32 = 1 << 4;

fn attach_at_device(program: &OwnedFd, device: u32, hook: u32, place: u32) -> OwnedFd {
    let mut attributes = [0; 16];
    attributes[0] = words(program.as_raw_fd().cast_unsigned(), device);
    attributes[1] = words(hook, place);
    made(bpf(28, &mut attributes))
}
