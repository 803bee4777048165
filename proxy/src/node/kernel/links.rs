//! Attachments by bpf(2) itself: aya 0.14 can neither pin a sockopt link nor replace the program of a cgroup or namespace
//! link in place. Source: `include/uapi/linux/bpf.h`, `union bpf_attr`.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::error::KernelError;

/// Commands of bpf(2).
const PROG_LOAD: libc::c_int = 5;
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const PROG_QUERY: libc::c_int = 16;
const LINK_CREATE: libc::c_int = 28;
const LINK_UPDATE: libc::c_int = 29;
const LINK_DETACH: libc::c_int = 34;

/// `BPF_LINK_TYPE_CGROUP`, `BPF_LINK_TYPE_NETNS` and `BPF_LINK_TYPE_TCX`.
const TYPE_CGROUP: u32 = 3;
const TYPE_NETNS: u32 = 5;
const TYPE_TCX: u32 = 11;

/// Where a program is attached: `enum bpf_attach_type`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub(super) enum Hook {
    CgroupIngress = 0,
    CgroupEgress = 1,
    SockOps = 3,
    Bind4 = 8,
    Bind6 = 9,
    Connect4 = 10,
    Connect6 = 11,
    Getsockopt = 21,
    Setsockopt = 22,
    Getpeername4 = 29,
    Getpeername6 = 30,
    Getsockname4 = 31,
    Getsockname6 = 32,
    SockRelease = 34,
    SkLookup = 36,
    TcxIngress = 46,
}

impl Hook {
    /// As bpftool(8) says it.
    pub(super) fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Target {
    /// A cgroup, by its id.
    Cgroup(u64),
    /// A network namespace, by its inode.
    Netns(u64),
    /// A device, by its number in the namespace of whoever attached to it.
    Device(u32),
    /// Nothing any more: it went before the link.
    Gone,
}

/// The memory of `union bpf_attr`, large enough for every command here; what a command does not use is 0.
type Attributes = [u64; 16];

/// To what a program is attached.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place<'a> {
    /// A cgroup or a namespace.
    Open(BorrowedFd<'a>),
    /// A device of the caller's namespace, by its number.
    Device(u32),
}

/// `BPF_F_BEFORE`: before the other programs of the same cgroup. `BPF_F_PREORDER`, which would come before those of its children too,
/// is left alone: up to Linux 6.18.39 and 7.1.4 the kernel then replaces and removes other programs than it is told to (CVE-2026-72427).
const BEFORE: u32 = 1 << 3;

/// Attaches `program` to `place`. Where an app connects it runs before the others that are there, so that it reads the address that
/// the app asked for; before Linux 6.17 it runs after those that came first. At a device it runs before the others always, so that
/// nothing is let pass, redirected or changed before it looks.
pub(super) fn create(program: BorrowedFd<'_>, place: Place<'_>, hook: Hook) -> io::Result<OwnedFd> {
    let target = match place {
        Place::Open(target) => word(target),
        Place::Device(number) => number,
    };
    let mut attributes = [0; 16];
    put(&mut attributes, 0, word(program), target);
    let first = matches!(hook, Hook::Connect4 | Hook::Connect6 | Hook::TcxIngress);
    put(&mut attributes, 1, hook as u32, if first { BEFORE } else { 0 });
    let created = match bpf(LINK_CREATE, &mut attributes) {
        Err(error) if first && error.raw_os_error() == Some(libc::EINVAL) => {
            put(&mut attributes, 1, hook as u32, 0);
            bpf(LINK_CREATE, &mut attributes)
        }
        created => created,
    };
    descriptor(created?)
}

/// Loads a program for one of the two hooks of a cgroup's packets that drops each of them.
pub(super) fn load_dropping(hook: Hook) -> io::Result<OwnedFd> {
    /// `BPF_PROG_TYPE_CGROUP_SKB`.
    const CGROUP_SKB: u32 = 8;
    // `r0 = 0` (`BPF_ALU64 | BPF_MOV | BPF_K`) and `exit` (`BPF_JMP | BPF_EXIT`): 0 drops. `struct bpf_insn` has its code first.
    let program: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, 0, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];
    let license = c"Apache-2.0";
    let mut attributes = [0; 16];
    put(&mut attributes, 0, CGROUP_SKB, 2);
    put_pointer(&mut attributes, 1, program.as_ptr().cast_mut().cast());
    put_pointer(&mut attributes, 2, license.as_ptr().cast_mut().cast());
    // The device that it would be offloaded to, of which there is none, and the hook.
    put(&mut attributes, 8, 0, hook as u32);
    descriptor(bpf(PROG_LOAD, &mut attributes)?)
}

/// Replaces the program of `link`; no connection sees neither or both.
pub(super) fn update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = [0; 16];
    put(&mut attributes, 0, word(link), word(program));
    bpf(LINK_UPDATE, &mut attributes).map(drop)
}

/// What `link` is attached to.
pub(super) fn target(link: BorrowedFd<'_>) -> io::Result<Target> {
    info(link).map(|(target, _program)| target)
}

/// The id of `program`.
pub(super) fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    // `struct bpf_prog_info`: type, id, and more.
    let [first, ..] = describe(program)?;
    Ok(high(first))
}

/// What `link` is attached to, and the id of its program.
pub(super) fn info(link: BorrowedFd<'_>) -> io::Result<(Target, u32)> {
    // `struct bpf_link_info`: type, id, program's id, 4 bytes of nothing, then what depends on the type.
    let [first, second, third, ..] = describe(link)?;
    let target = match (low(first), third) {
        (TYPE_CGROUP, id) if id != 0 => Target::Cgroup(id),
        // The inode and the number are 32 bits, the hook follows it.
        (TYPE_NETNS, netns) if low(netns) != 0 => Target::Netns(low(netns).into()),
        (TYPE_TCX, device) if low(device) != 0 => Target::Device(low(device)),
        (_, _) => Target::Gone,
    };
    Ok((target, low(second)))
}

/// The begin of what the kernel says of a link or a program.
fn describe(object: BorrowedFd<'_>) -> io::Result<[u64; 16]> {
    let mut info = [0_u64; 16];
    let mut attributes = [0; 16];
    put(&mut attributes, 0, word(object), size(&info));
    put_pointer(&mut attributes, 1, info.as_mut_ptr().cast());
    bpf(OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(info)
}

/// The programs that are attached to the cgroup or namespace `target` itself at `hook`, by their ids.
pub(super) fn ids(target: BorrowedFd<'_>, hook: Hook) -> io::Result<Vec<u32>> {
    query(word(target), hook, 0)
}

/// The program that runs first of those at the entry of the device with this number of the caller's namespace.
pub(super) fn first_at_device(device: u32) -> io::Result<Option<u32>> {
    query(device, Hook::TcxIngress, 0).map(|ids| ids.first().copied())
}

/// `BPF_F_QUERY_EFFECTIVE`.
const EFFECTIVE: u32 = 1;

/// The programs that run for tasks of `cgroup` at `hook`, wherever above it they are attached, in the order in which they run.
pub(super) fn effective(cgroup: BorrowedFd<'_>, hook: Hook) -> io::Result<Vec<u32>> {
    query(word(cgroup), hook, EFFECTIVE)
}

fn query(target: u32, hook: Hook, flags: u32) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; 64];
    let mut attributes = [0; 16];
    put(&mut attributes, 0, target, hook as u32);
    put(&mut attributes, 1, flags, 0);
    put_pointer(&mut attributes, 2, ids.as_mut_ptr().cast());
    put(&mut attributes, 3, 64, 0);
    bpf(PROG_QUERY, &mut attributes)?;
    let [_, _, _, count, ..] = attributes;
    Ok(ids.into_iter().take(usize::try_from(low(count)).unwrap_or_default()).collect())
}

/// Opens what is pinned at `path`; `None` if nothing is.
pub(super) fn open(path: &Path) -> Result<Option<OwnedFd>, KernelError> {
    let name = c_path(path)?;
    let mut attributes = [0; 16];
    put_pointer(&mut attributes, 0, name.as_ptr().cast_mut().cast());
    match bpf(OBJ_GET, &mut attributes).and_then(descriptor) {
        Ok(object) => Ok(Some(object)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(KernelError::call(format!("open the pin {}", path.display()), error)),
    }
}

/// Pins `object` at `path`; what stood there is replaced.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> Result<(), KernelError> {
    unpin(path)?;
    let name = c_path(path)?;
    let mut attributes = [0; 16];
    put_pointer(&mut attributes, 0, name.as_ptr().cast_mut().cast());
    put(&mut attributes, 1, word(object), 0);
    bpf(OBJ_PIN, &mut attributes).map(drop).map_err(|error| KernelError::call(format!("pin {}", path.display()), error))
}

/// Detaches the link pinned at `path` and removes the pin. Removing the pin alone would detach some time later, from a
/// worker of the kernel: 64 of them waiting fill a namespace.
pub(super) fn detach(path: &Path) -> Result<(), KernelError> {
    if let Some(link) = open(path)? {
        let mut attributes = [0; 16];
        put(&mut attributes, 0, word(link.as_fd()), 0);
        match bpf(LINK_DETACH, &mut attributes) {
            Ok(_) => {}
            // What it was attached to is gone, and with it the attachment.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOLINK | libc::EINVAL | libc::EOPNOTSUPP)) => {}
            Err(error) => return Err(KernelError::call(format!("detach {}", path.display()), error)),
        }
    }
    unpin(path)
}

/// Removes a pin.
pub(super) fn unpin(path: &Path) -> Result<(), KernelError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(KernelError::file("remove", path, error)),
        _ => Ok(()),
    }
}

fn bpf(command: libc::c_int, attributes: &mut Attributes) -> io::Result<i32> {
    // SAFETY: the attributes are initialised, of the size that is passed, and outlive the call; pointers in them are to
    // memory of the caller that outlives it too, and of the sizes that go with them.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of::<Attributes>()) };
    match i32::try_from(result) {
        Ok(value) if value >= 0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}

fn descriptor(number: i32) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn c_path(path: &Path) -> Result<CString, KernelError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|error| KernelError::file("name", path, io::Error::from(error)))
}

/// Two fields of 32 bits in one word of the attributes, as this machine lays them out.
fn put(attributes: &mut Attributes, index: usize, first: u32, second: u32) {
    if let Some(field) = attributes.get_mut(index) {
        let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
        *field = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
    }
}

fn put_pointer(attributes: &mut Attributes, index: usize, pointer: *mut libc::c_void) {
    if let Some(field) = attributes.get_mut(index) {
        *field = pointer.expose_provenance() as u64;
    }
}

/// The first field of 32 bits in a word.
fn low(field: u64) -> u32 {
    let [a, b, c, d, ..] = field.to_ne_bytes();
    u32::from_ne_bytes([a, b, c, d])
}

/// The second one.
fn high(field: u64) -> u32 {
    let [_, _, _, _, a, b, c, d] = field.to_ne_bytes();
    u32::from_ne_bytes([a, b, c, d])
}

fn word(descriptor: impl AsRawFd) -> u32 {
    descriptor.as_raw_fd().cast_unsigned()
}

fn size(info: &[u64; 16]) -> u32 {
    u32::try_from(size_of_val(info)).unwrap_or_default()
}
