//! A virtual machine that starts a kernel, runs one program in it and ends: by software emulation, which every machine can.
//!
//! Its time is the number of instructions that it has run (`-icount`): a busy host makes it slow and no deadline in it
//! early, and while everything in it sleeps no time passes outside.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use e2e::mesh::finish;

use super::archive::Archive;
use super::packages::Fetched;
use super::{Kernel, RUNNER};
use crate::shell;

/// How a run went.
#[derive(Debug)]
pub(super) struct Ran {
    /// What the machine wrote to its console.
    pub(super) console: String,
    /// What the kernel says that it is.
    pub(super) release: String,
}

/// The console's line once the kernel is up, followed by its release.
const UP: &str = "UP ";
/// The line once the program has ended.
const ENDED: &str = "ENDED ";
/// How often a machine is started whose kernel does not come up: the emulator breaks some kernels now and then.
const STARTS: usize = 3;
const STARTING: Duration = Duration::from_secs(120);
/// Half a minute on a machine that does nothing else.
const RUNNING: Duration = Duration::from_secs(600);
const GLANCE: Duration = Duration::from_millis(100);
const MEMORY_MIB: &str = "1024";
/// 2^2 nanoseconds per instruction, which is about what an idle machine emulates; sleeping takes no time at all.
const CLOCK: &str = "shift=2,sleep=off";

/// The file system that the machine starts from: the runner with what its tests call.
pub(super) fn file_system(root: &Path, runner: &Path, fetched: &Fetched, filter: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "run", "sys", "tmp", "var"] {
        archive.folder(Path::new(folder))?;
    }
    archive.copy(&program("busybox")?, Path::new("/bin/busybox"))?;
    archive.copy(runner, Path::new("/bin/runner"))?;
    let ip = program("ip")?;
    archive.copy(&ip, Path::new("/bin/ip"))?;
    let mut libraries = libraries(root, runner)?;
    libraries.extend(self::libraries(root, &ip)?);
    libraries.sort_unstable();
    libraries.dedup();
    for library in &libraries {
        archive.copy(library, library)?;
    }
    let mut load = String::new();
    for module in &fetched.modules {
        let name = module.file_name().context("a module without a name")?.to_string_lossy();
        archive.copy(module, &Path::new("/modules").join(name.as_ref()))?;
        load.push_str(&format!("busybox insmod /modules/{name}\n"));
    }
    archive.file(Path::new("/init"), init(&load, filter).as_bytes())?;
    archive.end()
}

fn init(load: &str, filter: &str) -> String {
    // `ip` by its path: busybox has one of its own.
    format!(
        "#!/bin/busybox sh\n\
         export PATH=/bin\n\
         busybox mount -t proc proc /proc\n\
         busybox mount -t sysfs sys /sys\n\
         busybox mount -t devtmpfs dev /dev\n\
         busybox mount -t tmpfs tmp /tmp\n\
         busybox mount -t tmpfs run /run\n\
         busybox mount -t cgroup2 cgroup /sys/fs/cgroup\n\
         busybox mount -t bpf bpf /sys/fs/bpf\n\
         echo \"{UP}$(busybox uname -r)\"\n\
         {load}\
         /bin/ip link set lo up\n\
         /bin/runner {filter} --test-threads=1 --show-output\n\
         echo \"{ENDED}$?\"\n\
         busybox poweroff -f\n"
    )
}

/// Starts `kernel` and waits until the runner has ended. What the console said is kept in its folder, also of a machine
/// that did not come up.
pub(super) fn run(root: &Path, kernel: &Kernel, fetched: &Fetched, file_system: &[u8]) -> Result<Ran> {
    let folder = super::folder(root).join(kernel.name);
    let initial = folder.join("initramfs");
    std::fs::write(&initial, file_system)?;
    let log = folder.join("console.log");
    for start in 1..=STARTS {
        let console = start_once(kernel, fetched, &initial, &log)?;
        let release = console.lines().find_map(|line| line.strip_prefix(UP)).map(|release| release.trim().to_owned());
        if let Some(release) = release {
            std::fs::remove_file(&initial)?;
            return Ok(Ran { console, release });
        }
        shell::say(&format!("kernel {}: did not come up in start {start} of {STARTS}; see {}", kernel.name, log.display()));
    }
    bail!("the kernel did not come up in {STARTS} starts; see {}", log.display());
}

/// One start; returns what the console said, whatever that is.
fn start_once(kernel: &Kernel, fetched: &Fetched, initial: &Path, log: &Path) -> Result<String> {
    let mut command = Command::new(QEMU);
    command.args(["-accel", "tcg", "-cpu", kernel.processor, "-m", MEMORY_MIB]);
    command.args(["-icount", CLOCK]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.arg("-serial").arg(format!("file:{}", log.display()));
    command.arg("-kernel").arg(&fetched.image).arg("-initrd").arg(initial);
    // A panic ends the machine at once. Beyond that the kernel is silent: its lines would tear the runner's.
    command.args(["-append", "console=ttyS0 quiet loglevel=1 panic=-1"]);
    std::fs::write(log, "")?;
    let mut machine = Machine(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().context("cannot run qemu")?);
    let begun = Instant::now();
    loop {
        let ended = machine.0.try_wait()?.is_some();
        // A reader may see half of a character.
        let console = String::from_utf8_lossy(&std::fs::read(log)?).replace('\r', "");
        let limit = if console.lines().any(|line| line.starts_with(UP)) { RUNNING } else { STARTING };
        if ended || begun.elapsed() > limit {
            return Ok(console);
        }
        std::thread::sleep(GLANCE);
    }
}

/// It does not outlive the one who waits for it.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// The emulator.
pub(super) const QEMU: &str = "qemu-system-x86_64";

/// Where a program stands.
fn program(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    found.with_context(|| format!("there is no {name}"))
}

/// The dynamic loader and the libraries of a program, by the paths under which it looks for them.
fn libraries(root: &Path, program: &Path) -> Result<Vec<PathBuf>> {
    let mut command = shell::command(root, "ldd", &[]);
    let listed = finish(command.arg(program), STARTING)?.ok()?;
    Ok(libraries_in(&listed))
}

/// `NAME => PATH (ADDRESS)`, or `PATH (ADDRESS)` for the loader; what the kernel itself brings has no path.
fn libraries_in(listed: &str) -> Vec<PathBuf> {
    listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/'))).map(PathBuf::from).collect()
}

impl Ran {
    /// Did the runner come to its end?
    pub(super) fn is_whole(&self) -> bool {
        self.console.lines().any(|line| line.starts_with(ENDED))
    }

    /// Names of the tests that failed.
    pub(super) fn failed(&self) -> Vec<String> {
        let lines = self.console.lines();
        lines
            .filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"))
            .map(|name| name.strip_prefix(RUNNER).unwrap_or(name).to_owned())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loader_and_libraries_are_found_and_what_has_no_file_is_not() {
        let listed = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x00007f)\n\t/lib64/ld.so.2 (0x00007f)\n";
        assert_eq!(libraries_in(listed), [PathBuf::from("/lib/x/libc.so.6"), PathBuf::from("/lib64/ld.so.2")]);
    }

    #[test]
    fn failed_tests_are_named_and_a_run_that_broke_off_is_not_whole() {
        let console = "UP 6.1.0\ntest node::kernel::tests::one ... ok\ntest node::kernel::tests::two ... FAILED\n".to_owned();
        let ran = Ran { console, release: String::new() };
        assert_eq!(ran.failed(), ["tests::two"]);
        assert!(!ran.is_whole());
    }
}
