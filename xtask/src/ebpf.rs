//! `cargo xtask ebpf`: the kernel programs' object, built from `ebpf/` and compared with the committed one.
//!
//! The object is committed so that building Outrigger needs stable Rust alone, and it can be because its build is
//! reproducible: Debian's rustc with a prebuilt `core` for BPF, bpf-linker of one version on the same LLVM, a lock file, and
//! no path of this machine in it. What the chain consisted of stands beside the object.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{Stop, shell};

/// The linker, whose output depends on its version.
const LINKER: &str = "0.13.0";
/// Debian's compiler for what it must build from source, and its `core` for BPF.
const PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];
const RUSTC: &str = "/usr/bin/rustc";
const TARGET: &str = "bpfel-unknown-none";
const OBJECT: &str = "ebpf/prebuilt/outrigger.bpf.o";
const VERSIONS: &str = "ebpf/prebuilt/versions.txt";

/// Builds the object into `ebpf/prebuilt`; with `check` compares instead.
pub(crate) fn run(root: &Path, check: bool) -> Result<()> {
    let chain = Chain::ready(root)?;
    let built = chain.build()?;
    if !check {
        std::fs::write(root.join(OBJECT), &built)?;
        std::fs::write(root.join(VERSIONS), &chain.versions)?;
        shell::say(&format!("{OBJECT}: {} bytes", built.len()));
        return Ok(());
    }
    let committed = std::fs::read(root.join(OBJECT)).with_context(|| format!("cannot read {OBJECT}"))?;
    if built == committed {
        shell::say(&format!("{OBJECT} is what ebpf/ gives: {} bytes, identical", built.len()));
        return Ok(());
    }
    let recorded = std::fs::read_to_string(root.join(VERSIONS)).unwrap_or_default();
    if recorded == chain.versions {
        return Err(Stop::No(format!("{OBJECT} is not what ebpf/ gives; run `cargo xtask ebpf` and commit the result")).into());
    }
    shell::say("the chain is not the recorded one, so its object is another; what it gives has to pass the capture tests");
    println!("recorded:\n{recorded}here:\n{}", chain.versions);
    chain.try_out(&built, &committed)?;
    shell::say(&format!("{OBJECT} wants a fresh commit by this chain: run `cargo xtask ebpf` and commit the result"));
    Ok(())
}

/// Compiler, linker and stripper, installed.
struct Chain<'a> {
    root: &'a Path,
    /// Where what we install for ourselves stands.
    tools: PathBuf,
    strip: Strip,
    /// What is recorded beside the object.
    versions: String,
}

/// What removes debug information and leaves BTF.
struct Strip {
    program: PathBuf,
    /// Where the program finds its libraries.
    libraries: Option<PathBuf>,
}

impl<'a> Chain<'a> {
    /// Installs what is missing. Needs neither network nor root where all of it stands.
    fn ready(root: &'a Path) -> Result<Self> {
        let tools = root.join("target/tools");
        std::fs::create_dir_all(&tools)?;
        if !has_core() {
            install_compiler(root, &tools)?;
        }
        let llvm = llvm_version(root)?;
        if !linker_works(&tools) {
            install_linker(root, &tools, &llvm)?;
        }
        let strip = Strip::find(root)?;
        let mut versions = String::new();
        // The bindings of aya-ebpf are this machine's.
        writeln!(versions, "machine {}", std::env::consts::ARCH)?;
        writeln!(versions, "rustc {}", version(shell::command(root, RUSTC, &["--version"]))?)?;
        writeln!(versions, "llvm {llvm}")?;
        writeln!(versions, "bpf-linker {}", version(linker(root, &tools))?)?;
        writeln!(versions, "cargo {}", version(shell::cargo(root, &["--version"]))?)?;
        Ok(Self { root, tools, strip, versions })
    }

    /// The object's bytes.
    fn build(&self) -> Result<Vec<u8>> {
        let target = self.root.join("target/ebpf");
        let mut build = shell::cargo(self.root, &["build", "--release", "--locked", "--target", TARGET]);
        build.current_dir(self.root.join("ebpf"));
        // What the cargo that runs this says about its own workspace is not meant for this one.
        for name in ["RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_TARGET"] {
            build.env_remove(name);
        }
        build.env("RUSTC_WRAPPER", named_alike(&target)?);
        build.env("CARGO_TARGET_DIR", &target);
        build.env("RUSTC", RUSTC);
        build.env("RUSTC_BOOTSTRAP", "aya_ebpf");
        build.env("CARGO_ENCODED_RUSTFLAGS", self.flags()?.join("\x1f"));
        build.env("PATH", with_tools(&self.tools)?);
        shell::run(build)?;
        let linked = target.join(TARGET).join("release/outrigger");
        let stripped = target.join("outrigger.bpf.o");
        let object = std::fs::read(&linked).with_context(|| format!("cannot read {}", linked.display()))?;
        let names = numbered(&object);
        let list = target.join("names");
        std::fs::write(&list, names.iter().map(|(old, new)| format!("{old} {new}\n")).collect::<String>())?;
        shell::run(self.strip.command(self.root, &list, &linked, &stripped))?;
        let mut object = std::fs::read(&stripped).with_context(|| format!("cannot read {}", stripped.display()))?;
        replace(&mut object, &names);
        Ok(object)
    }

    /// The compiler's flags. No path of this machine may reach the object.
    fn flags(&self) -> Result<Vec<String>> {
        let cargo_home = match std::env::var_os("CARGO_HOME") {
            Some(home) => PathBuf::from(home),
            None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cargo"),
        };
        let mut flags = vec![
            format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
            // Without debug information there is no BTF.
            "-Cdebuginfo=2".to_owned(),
            "-Clinker=bpf-linker".to_owned(),
            "-Clink-arg=--btf".to_owned(),
            format!("--remap-path-prefix={}=/outrigger", self.root.display()),
        ];
        // A crate's source stands below a folder that is named after where it came from.
        if let Ok(sources) = std::fs::read_dir(cargo_home.join("registry/src")) {
            let mut folders: Vec<PathBuf> = sources.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
            folders.sort_unstable();
            flags.extend(folders.iter().map(|folder| format!("--remap-path-prefix={}=/crates", folder.display())));
        }
        Ok(flags)
    }

    /// Runs the capture tests with another object in the committed one's place.
    fn try_out(&self, built: &[u8], committed: &[u8]) -> Result<()> {
        if !shell::is_root() {
            return Err(Stop::Missing("the capture tests of another chain's object need root".to_owned()).into());
        }
        let object = self.root.join(OBJECT);
        std::fs::write(&object, built)?;
        let result = shell::run(shell::cargo(self.root, &["test", "--locked", "-p", "outrigger", "--lib", "node::kernel"]));
        std::fs::write(&object, committed)?;
        result
    }
}

impl Strip {
    /// The objcopy that comes with the workspace's compiler, else LLVM's own. Their results are the same.
    fn find(root: &Path) -> Result<Self> {
        let sysroot = PathBuf::from(shell::output(shell::command(root, "rustc", &["--print", "sysroot"]))?.trim());
        let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let program = sysroot.join("lib/rustlib").join(host).join("bin/rust-objcopy");
        if program.is_file() {
            return Ok(Self { program, libraries: Some(sysroot.join("lib")) });
        }
        if shell::has("llvm-objcopy") {
            return Ok(Self { program: PathBuf::from("llvm-objcopy"), libraries: None });
        }
        Err(Stop::Missing(
            "neither rust-objcopy (part of rustup's rustc) nor llvm-objcopy is here: apt-get install llvm".to_owned(),
        )
        .into())
    }

    fn command(&self, root: &Path, names: &Path, from: &Path, to: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.current_dir(root).arg("--strip-debug").arg("--redefine-syms").args([names, from, to]);
        if let Some(libraries) = &self.libraries {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        command
    }
}

/// Writes what runs the compiler: cargo names a crate of another workspace, and whoever uses it, by its absolute path, and by
/// their names the linker orders constants. Here both get names that are the same in every folder.
fn named_alike(target: &Path) -> Result<PathBuf> {
    let path = target.join("rustc");
    std::fs::create_dir_all(target)?;
    std::fs::write(&path, NAMED_ALIKE)?;
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(path)
}

const NAMED_ALIKE: &str = r#"#!/bin/sh
rustc=$1
shift
case " $* " in
*" --crate-name proxy_common "* | *" --crate-name outrigger "*)
    for argument do
        shift
        case $argument in
        metadata=*) argument=metadata=outrigger ;;
        esac
        set -- "$@" "$argument"
    done
    ;;
esac
exec "$rustc" "$@"
"#;

/// The mangled names in an object (`_ZN…17h0123456789abcdefE`), each with one that has a number in the place of its hash.
/// Cargo hashes the absolute path of a path dependency, so that these hashes tell where the sources stood; nothing else does.
fn numbered(object: &[u8]) -> Vec<(String, String)> {
    let mut names: Vec<(&str, &str)> = Vec::new();
    for text in object.split(|byte| *byte == 0).filter_map(|bytes| std::str::from_utf8(bytes).ok()) {
        let Some((path, hash)) = text.strip_suffix('E').and_then(|text| text.rsplit_once("17h")) else { continue };
        let is_hash = hash.len() == 16 && hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if is_hash && path.starts_with("_ZN") && !names.contains(&(path, hash)) {
            names.push((path, hash));
        }
    }
    // By what does not depend on the place; the sort is stable, so namesakes stay in the linker's order.
    names.sort_by_key(|(path, _hash)| *path);
    let numbered = names.iter().enumerate();
    numbered.map(|(number, (path, hash))| (format!("{path}17h{hash}E"), format!("{path}17h{number:016x}E"))).collect()
}

/// Replaces names where they stand outside the symbol table, in BTF above all. The length stays.
fn replace(object: &mut [u8], names: &[(String, String)]) {
    for (old, new) in names {
        let mut at = 0;
        while let Some(window) = object.get_mut(at..at + old.len()) {
            if window == old.as_bytes() {
                window.copy_from_slice(new.as_bytes());
            }
            at += 1;
        }
    }
}

/// Does Debian's compiler stand here, with its `core` for BPF?
fn has_core() -> bool {
    Command::new(RUSTC)
        .args(["--print", "sysroot"])
        .output()
        .is_ok_and(|output| Path::new(String::from_utf8_lossy(&output.stdout).trim()).join("lib/rustlib").join(TARGET).is_dir())
}

fn install_compiler(root: &Path, tools: &Path) -> Result<()> {
    let remedy = format!("apt-get install --no-install-recommends {}", PACKAGES.join(" "));
    if !shell::has("apt-get") || !shell::is_root() {
        return Err(Stop::Missing(format!("no rustc with core for {TARGET} at {RUSTC}; as root: {remedy}")).into());
    }
    shell::say("installing the compiler of the kernel programs (about 120 MB to fetch, once)");
    let archives = tools.join("apt");
    std::fs::create_dir_all(archives.join("partial"))?;
    let cache = format!("Dir::Cache::Archives={}", archives.display());
    shell::run(shell::command(root, "apt-get", &["update", "-qq"]))?;
    let mut install = shell::command(root, "apt-get", &["install", "-y", "-qq", "--no-install-recommends", "-o", &cache]);
    install.args(PACKAGES).env("DEBIAN_FRONTEND", "noninteractive");
    shell::run(install)?;
    std::fs::remove_dir_all(&archives)?;
    if has_core() { Ok(()) } else { Err(Stop::Missing(format!("{RUSTC} has no core for {TARGET}; {remedy}")).into()) }
}

/// The version of LLVM that the compiler is made of: `22.1.8`.
fn llvm_version(root: &Path) -> Result<String> {
    let text = shell::output(shell::command(root, RUSTC, &["-vV"]))?;
    let version = text.lines().find_map(|line| line.strip_prefix("LLVM version: ")).context("rustc does not say its LLVM")?;
    Ok(version.to_owned())
}

fn linker(root: &Path, tools: &Path) -> Command {
    let mut command = Command::new(tools.join("bin/bpf-linker"));
    command.current_dir(root).arg("--version");
    command
}

fn linker_works(tools: &Path) -> bool {
    Command::new(tools.join("bin/bpf-linker"))
        .arg("--version")
        .output()
        .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).trim() == format!("bpf-linker {LINKER}"))
}

/// Builds the linker against the compiler's own LLVM, whose library has no development package.
fn install_linker(root: &Path, tools: &Path, llvm: &str) -> Result<()> {
    let mut parts = llvm.split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let library = PathBuf::from(format!("/usr/lib/{}-linux-gnu/libLLVM.so.{major}.{minor}", std::env::consts::ARCH));
    anyhow::ensure!(library.is_file(), "{} is missing, though {RUSTC} is made of it", library.display());
    let prefix = tools.join("llvm");
    std::fs::create_dir_all(prefix.join("lib"))?;
    let link = prefix.join("lib/libLLVM.so");
    if link.symlink_metadata().is_ok() {
        std::fs::remove_file(&link)?;
    }
    std::os::unix::fs::symlink(&library, &link)?;
    shell::say("building the linker of the kernel programs (about 2 minutes, once)");
    let feature = format!("llvm-{major}");
    let mut install = shell::cargo(root, &["install", "bpf-linker", "--version", LINKER, "--locked", "--force"]);
    install.args(["--no-default-features", "--features", &feature, "--root"]).arg(tools);
    install.arg("--target-dir").arg(tools.join("build")).env("LLVM_PREFIX", &prefix);
    shell::run(install)?;
    // A gigabyte that nothing needs any more.
    std::fs::remove_dir_all(tools.join("build"))?;
    Ok(())
}

fn with_tools(tools: &Path) -> Result<std::ffi::OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    Ok(std::env::join_paths([tools.join("bin")].into_iter().chain(std::env::split_paths(&path)))?)
}

/// What a program says of its version, without its name.
fn version(command: Command) -> Result<String> {
    let text = shell::output(command)?;
    let line = text.lines().next().unwrap_or_default();
    Ok(line.split_once(' ').map_or(line, |(_name, version)| version).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_their_hashes_and_nothing_else_changes() {
        let mut object = *b"\x007\0_ZN1b17hdcba19229f874a79E\0_ZN1a17h0000000000000fffE\0_ZN1b17hdcba19229f874a79E\x0017hX";
        let names = numbered(&object);
        assert_eq!(names.len(), 2);
        replace(&mut object, &names);
        let expected = b"\x007\0_ZN1b17h0000000000000001E\0_ZN1a17h0000000000000000E\0_ZN1b17h0000000000000001E\x0017hX";
        assert_eq!(&object, expected);
    }
}
