//! Memory that is not needed any more is given back.
//!
//! Starting walks through much of the program once: arguments, TLS set-up, the first handshakes. The pages of code that
//! this touched stay mapped for good, some ten megabytes of them, although an idle sidecar runs through one or two. They
//! are unmapped when the start is over, and again when many connections came to rest; what is run again comes back from the
//! page cache by a minor fault (`madvise(2)`, `MADV_DONTNEED` on a private file mapping that nobody wrote to).
#![expect(unsafe_code, reason = "neither madvise nor the allocator has a safe wrapper")]

use std::io;
use std::path::Path;

// The program's allocator; named so that it is linked wherever this is called.
use mimalloc as _;

unsafe extern "C" {
    /// Frees what the calling thread freed and kept, and purges it.
    fn mi_collect(force: bool);
}

/// Unmaps the code pages of this program. Returns the size of the mappings in bytes, not what was resident of them.
///
/// # Errors
/// `/proc` cannot be read, or the kernel refuses the advice. Nothing is lost then.
pub(crate) fn release_code() -> io::Result<usize> {
    let program = std::fs::read_link("/proc/self/exe")?;
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let mut released = 0;
    for (start, length) in code(&maps, &program) {
        // SAFETY: the range is a mapping of this program's file, private, executable and not writable, so no page of it
        // differs from the file: whoever runs or reads it afterwards finds the same bytes.
        let answer = unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(start), length, libc::MADV_DONTNEED) };
        if answer != 0 {
            return Err(io::Error::last_os_error());
        }
        released += length;
    }
    Ok(released)
}

/// Gives what the calling thread freed back to the system, which the allocator would do at some later allocation.
pub(crate) fn release_freed() {
    // SAFETY: the function has no precondition; it may be called in any thread, whether that ever allocated or not.
    unsafe { mi_collect(true) }
}

/// Start and length of the mappings of `program` in a `/proc/PID/maps` that hold code and are not writable. Data that is
/// read-only after relocation is no code: its pages differ from the file.
fn code(maps: &str, program: &Path) -> Vec<(usize, usize)> {
    let mapping = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (range, permissions) = (fields.next()?, fields.next()?);
        // Offset, device and inode stand between.
        let path = fields.nth(3)?;
        let (start, end) = range.split_once('-')?;
        let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
        (permissions == "r-xp" && Path::new(path) == program).then_some((start, end.checked_sub(start)?))
    };
    maps.lines().filter_map(mapping).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unwritable_code_of_the_program_itself_is_released() {
        let maps = "\
00400000-00500000 r--p 00000000 fe:00 12  /usr/bin/outrigger
00500000-00700000 r-xp 00100000 fe:00 12  /usr/bin/outrigger
00700000-00710000 r--p 00300000 fe:00 12  /usr/bin/outrigger
00710000-00711000 rwxp 00310000 fe:00 12  /usr/bin/outrigger
00800000-00900000 r-xp 00000000 fe:00 13  /usr/lib/libc.so.6
00a00000-00b00000 r-xp 00000000 00:00 0
";
        assert_eq!(code(maps, Path::new("/usr/bin/outrigger")), [(0x50_0000, 0x20_0000)]);
    }

    #[test]
    fn what_was_freed_is_given_back_from_any_thread() {
        release_freed();
        std::thread::spawn(release_freed).join().unwrap();
    }

    #[test]
    fn a_program_goes_on_after_its_code_was_released() {
        assert!(release_code().unwrap() > 0);
        assert_eq!("still here".to_uppercase(), "STILL HERE");
    }
}
