//! What the kernel and this process' rights have to be.

use std::path::Path;

use super::super::local;
use super::Finding;
use crate::node::ladder::Ladder;

/// The oldest kernel that the programs are made for.
const OLDEST: (u32, u32) = (6, 1);
/// The oldest that tells network namespaces apart (`SO_NETNS_COOKIE`): no rung of capture stands on an older one.
const OLDEST_OF_ALL: (u32, u32) = (5, 14);

pub(super) fn look() -> Vec<Finding> {
    vec![kernel(&rustix::system::uname().release().to_string_lossy()), capabilities(), btf(), file_system()]
}

fn kernel(release: &str) -> Finding {
    match series(release) {
        Some(series) if series < OLDEST_OF_ALL => {
            Finding::fail("kernel", format!("{release} is older than 5.14"), "the kernel is too old: use Linux 6.1 or newer")
        }
        Some(series) if series < OLDEST => {
            Finding::warn("kernel", format!("{release} is older than 6.1"), "it takes no programs: use Linux 6.1 or newer")
        }
        Some(_) => Finding::ok("kernel", release),
        None => Finding::warn("kernel", format!("{release} is no release that tells its age"), "use Linux 6.1 or newer"),
    }
}

/// Major and minor number of a release.
fn series(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|sign: char| !sign.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn capabilities() -> Finding {
    match local::missing_capabilities(Ladder::Auto) {
        Ok(missing) if missing.is_empty() => Finding::ok("capabilities", "this user may start a mesh"),
        Ok(missing) => Finding::fail("capabilities", format!("this process lacks {}", missing.join(", ")), "run it as root"),
        Err(error) => Finding::fail("capabilities", format!("cannot ask for them: {error}"), "run it as root"),
    }
}

fn btf() -> Finding {
    let path = "/sys/kernel/btf/vmlinux";
    if Path::new(path).exists() {
        Finding::ok("btf", path)
    } else {
        Finding::fail("btf", format!("{path} is missing"), "use a kernel with CONFIG_DEBUG_INFO_BTF, and mount sysfs at /sys")
    }
}

fn file_system() -> Finding {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.split_whitespace().last() == Some("bpf")) {
        Finding::ok("bpffs", "the kernel has the bpf filesystem")
    } else {
        Finding::fail(
            "bpffs",
            "the kernel has no bpf filesystem",
            "use a kernel with CONFIG_BPF_SYSCALL, and mount procfs at /proc",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn kernel_is_told_to_be_too_old_by_its_numbers() {
        assert_eq!(kernel("5.10.0-46-cloud-amd64").verdict, Verdict::Fail);
        assert_eq!(kernel("5.15.0-101-generic").verdict, Verdict::Warn);
        assert_eq!(kernel("6.1.0-56-cloud-amd64").verdict, Verdict::Ok);
        assert_eq!(kernel("6.12.95+deb12").verdict, Verdict::Ok);
        assert_eq!(kernel("10.0").verdict, Verdict::Ok);
        assert_eq!(kernel("vanilla").verdict, Verdict::Warn);
    }
}
