//! The programs of the object: which there are, where each belongs, and loading them.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use aya::programs::{CgroupSock, CgroupSockAddr, CgroupSockopt, ProgramError, SchedClassifier, SkLookup, SockOps};
use aya::{Ebpf, EbpfLoader};
use proxy_common::exclusions::EXCLUDED_CIDRS;
use proxy_common::flows::FLOWS;
use proxy_common::pods::LISTENERS;

use super::Options;
use super::error::{KernelError, release};
use super::links::Hook;
use crate::node::maps;

/// The committed object; `cargo xtask ebpf` builds it and its check compares it byte by byte.
const OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../ebpf/prebuilt/outrigger.bpf.o"));

/// A program, by its name in the object.
#[derive(Clone, Copy, Debug)]
pub(super) struct Program {
    pub(super) name: &'static str,
    pub(super) hook: Hook,
}

/// Attached once, at the cgroup2 root: they tell pods apart by their namespace. In this order: what a program notes, the one that
/// reads it understands already when another build's are replaced.
pub(super) const NODE: [Program; 10] = [
    Program { name: "or_sockops", hook: Hook::SockOps },
    Program { name: "or_connect4", hook: Hook::Connect4 },
    Program { name: "or_connect6", hook: Hook::Connect6 },
    Program { name: "or_bind4", hook: Hook::Bind4 },
    Program { name: "or_bind6", hook: Hook::Bind6 },
    Program { name: "or_getpeername4", hook: Hook::Getpeername4 },
    Program { name: "or_getpeername6", hook: Hook::Getpeername6 },
    Program { name: "or_getsockname4", hook: Hook::Getsockname4 },
    Program { name: "or_getsockname6", hook: Hook::Getsockname6 },
    Program { name: "or_release", hook: Hook::SockRelease },
];

/// Attached at each sidecar's cgroup.
pub(super) const SIDECAR: [Program; 2] =
    [Program { name: "or_original", hook: Hook::Getsockopt }, Program { name: "or_declare", hook: Hook::Setsockopt }];

/// Attached at each pod's network namespace.
pub(super) const INBOUND: Program = Program { name: "or_inbound", hook: Hook::SkLookup };

/// Attached at the node's end of each pod's link.
pub(super) const LINK: Program = Program { name: "or_link", hook: Hook::TcxIngress };

/// All of them.
pub(super) fn all() -> impl Iterator<Item = Program> {
    NODE.into_iter().chain(SIDECAR).chain([INBOUND, LINK])
}

/// Where the program of that name belongs.
pub(super) fn hook(name: &str) -> Option<Hook> {
    all().find(|program| program.name == name).map(|program| program.hook)
}

/// What tells one build with one set of options from another: FNV-1a over the object. Not a proof against an adversary,
/// who could as well replace the pins.
pub(super) fn print(log: bool) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    OBJECT.iter().copied().chain([u8::from(log)]).fold(0xcbf2_9ce4_8422_2325, step)
}

/// Loads all programs. Maps that are pinned below `pins` are taken from there, the others are made and pinned.
pub(super) fn load(pins: &Path, options: Options) -> Result<Vec<(Program, OwnedFd)>, KernelError> {
    let mut loader = EbpfLoader::new();
    maps::make(pins)?;
    loader.map_max_entries(LISTENERS, maps::ADDRESSES_ROOM);
    // A trie takes memory as its entries come.
    loader.map_max_entries(EXCLUDED_CIDRS, maps::CIDRS_ROOM);
    if let Some(bytes) = options.flows_bytes {
        loader.map_max_entries(FLOWS, bytes);
    }
    for map in maps::PINNED {
        loader.map_pin_path(map, maps::pin(pins, map));
    }
    let mut ebpf = with_maps(&mut loader, options.log)?;
    all().map(|program| Ok((program, load_one(&mut ebpf, program)?))).collect()
}

/// Loads each program, with maps that go with it, and lets go of it; tells why the kernel does not take it. One that is
/// refused does not end the others' try.
pub(super) fn try_each() -> Result<Vec<(Program, Option<KernelError>)>, KernelError> {
    let mut ebpf = with_maps(&mut EbpfLoader::new(), false)?;
    Ok(all().map(|program| (program, load_one(&mut ebpf, program).err())).collect())
}

/// The object with its maps made, and no program loaded yet.
fn with_maps(loader: &mut EbpfLoader<'_>, log: bool) -> Result<Ebpf, KernelError> {
    // Read-only data of the programs: with 0 the verifier removes every line that would log.
    let level: &'static u8 = if log { &u8::MAX } else { &0 };
    loader.override_global("AYA_LOG_LEVEL", level, true);
    let at_accept: &'static u8 = if begins_at_accept(&release()) { &1 } else { &0 };
    loader.override_global("BEGINS_AT_ACCEPT", at_accept, true);
    loader.load(OBJECT).map_err(KernelError::object)
}

/// Can a program ask for a socket's events at `accept`? The option of `bpf_setsockopt` for that is there since Linux 6.12.
fn begins_at_accept(release: &str) -> bool {
    let mut numbers = release.split(|sign: char| !sign.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(12))
}

pub(super) fn load_one(ebpf: &mut Ebpf, program: Program) -> Result<OwnedFd, KernelError> {
    let mut load = || {
        let loaded = ebpf.program_mut(program.name).ok_or(ProgramError::NotLoaded)?;
        match program.hook {
            // No program of the object is for them: see `closed`.
            Hook::CgroupIngress | Hook::CgroupEgress => return Err(ProgramError::NotLoaded),
            Hook::SockOps => <&mut SockOps>::try_from(&mut *loaded)?.load()?,
            Hook::SockRelease => <&mut CgroupSock>::try_from(&mut *loaded)?.load()?,
            Hook::Getsockopt | Hook::Setsockopt => <&mut CgroupSockopt>::try_from(&mut *loaded)?.load()?,
            Hook::SkLookup => <&mut SkLookup>::try_from(&mut *loaded)?.load()?,
            Hook::TcxIngress => <&mut SchedClassifier>::try_from(&mut *loaded)?.load()?,
            Hook::Bind4
            | Hook::Bind6
            | Hook::Connect4
            | Hook::Connect6
            | Hook::Getpeername4
            | Hook::Getpeername6
            | Hook::Getsockname4
            | Hook::Getsockname6 => <&mut CgroupSockAddr>::try_from(&mut *loaded)?.load()?,
        }
        loaded.fd()?.as_fd().try_clone_to_owned().map_err(ProgramError::IOError)
    };
    load().map_err(|error| KernelError::refused(program.name, error))
}
