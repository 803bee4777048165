//! `cargo xtask release`: the binary as it is released, laid out by a profile of its own traffic.
//!
//! Which branches are taken and which functions belong together, the compiler guesses, or is told. A build that counts is
//! driven by the works of the benchmark, on this machine; what it counted is merged into a profile, and the binary is built
//! with it. The profile stays: the benchmark builds with it again, and so does whoever is given it.
//!
//! Source: the rustc book, "Profile-guided Optimization".

use std::fs::Permissions;
use std::hash::{DefaultHasher, Hasher as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::bench::bed::{Bed, target};
use crate::bench::works::WORKS;
use crate::setup::{self, step};
use crate::{Stop, shell};

/// What to build.
#[derive(clap::Args, Debug)]
pub(crate) struct Wish {
    /// Build with this profile instead of training a new one
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Seconds of each work that it is trained with
    #[arg(long, default_value_t = SECONDS, value_name = "S")]
    seconds: f64,
}

/// Trains where no profile is given, builds, and says where the binary is.
pub(crate) fn run(root: &Path, wish: &Wish) -> Result<()> {
    let compiler = Compiler::ask(root)?;
    let profile = match &wish.profile {
        Some(given) => compiler.keep(root, given)?,
        None => compiler.train(root, wish.seconds)?,
    };
    let binary = compiler.build(root, &profile)?;
    let bytes = std::fs::metadata(&binary).with_context(|| format!("there is no {}", binary.display()))?.len();
    shell::say(&format!("{}: {:.1} MiB, by the profile {}", binary.display(), bytes as f64 / 1_048_576.0, profile.display()));
    Ok(())
}

/// The released binary for whoever measures it: by the profile of the last release, or a new one where there is none. Where
/// none can be made it is said, and the binary is one without.
pub(crate) fn built(root: &Path) -> Result<PathBuf> {
    let compiler = Compiler::ask(root)?;
    let profile = match (profile(root), compiler.merger()) {
        (Some(profile), _) => profile,
        (None, Ok(_)) => compiler.train(root, SECONDS)?,
        (None, Err(missing)) => {
            shell::say(&format!("measured is a build without a profile, not what `cargo xtask release` makes: {missing}"));
            return setup::build_untrained(root);
        }
    };
    compiler.build(root, &profile)
}

/// The released binary for an image, in which nothing else is: with no library of the machine, and no word of where it was
/// built, so that equal sources make equal bytes. By the profile of the last release where there is one.
pub(crate) fn built_static(root: &Path) -> Result<PathBuf> {
    let compiler = Compiler::ask(root)?;
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned()];
    flags.extend(profile(root).map(|profile| format!("-Cprofile-use={}", profile.display())));
    let registry = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    for (folder, name) in registry.iter().map(|folder| (folder.as_path(), "cargo")).chain([(root, "outrigger")]) {
        flags.push(format!("--remap-path-prefix={}=/{name}", folder.display()));
    }
    compiler.cargo(root, &root.join("target/image"), &flags)
}

/// How long each work trains, where nobody says.
const SECONDS: f64 = 2.0;
/// Where a build that counts leaves its counts. Sidecars write into it as users of their own, for whom the way into the
/// workspace may be closed.
const COUNTS: &str = "/var/tmp/outrigger-training";

/// What a profile says is never taken is moved out of the functions that are, so that a request touches fewer pages of code:
/// a processor that switches between two processes reads their addresses anew each time.
const APART: &str = "-Cllvm-args=-enable-split-machine-functions";

/// The compiler, as far as it matters here.
struct Compiler {
    /// Its machine.
    host: String,
    /// The major version of its LLVM, whose profiles it reads.
    llvm: String,
    /// Where its own tools are.
    tools: PathBuf,
}

impl Compiler {
    fn ask(root: &Path) -> Result<Self> {
        let rustc = std::env::var("RUSTC").unwrap_or_else(|_unset| "rustc".to_owned());
        let said = shell::output(shell::command(root, &rustc, &["-vV"]))?;
        let (host, llvm) = understood(&said).with_context(|| format!("rustc does not say what it is: {said}"))?;
        let sysroot = shell::output(shell::command(root, &rustc, &["--print", "sysroot"]))?;
        let tools = Path::new(sysroot.trim()).join("lib/rustlib").join(&host).join("bin");
        Ok(Self { host, llvm, tools })
    }

    /// The binary by this profile.
    fn build(&self, root: &Path, profile: &Path) -> Result<PathBuf> {
        let flags = [format!("-Cprofile-use={}", profile.display()), APART.to_owned()];
        self.cargo(root, &root.join("target"), &flags)
    }

    /// Builds the product by itself, with more flags for what becomes part of it.
    fn cargo(&self, root: &Path, folder: &Path, more: &[String]) -> Result<PathBuf> {
        let mut command = shell::cargo(root, &["build", "--locked", "--release", "--package", "outrigger"]);
        command.args(["--target", &self.host, "--target-dir"]).arg(folder);
        let mut flags: Vec<String> = match (std::env::var("CARGO_ENCODED_RUSTFLAGS"), std::env::var("RUSTFLAGS")) {
            (Ok(flags), _) => flags.split('\x1f').map(str::to_owned).collect(),
            (_, Ok(flags)) => flags.split_whitespace().map(str::to_owned).collect(),
            (Err(_), Err(_)) => Vec::new(),
        };
        flags.extend_from_slice(more);
        command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        shell::run(command)?;
        Ok(folder.join(&self.host).join("release/outrigger"))
    }

    /// A profile of the benchmark's works.
    fn train(&self, root: &Path, seconds: f64) -> Result<PathBuf> {
        if !shell::is_root() {
            return Err(Stop::Missing(
                "a release is trained in a local mesh, which makes network namespaces: run as root, or give it a --profile"
                    .to_owned(),
            )
            .into());
        }
        // Asked for before anything that takes minutes.
        let merger = self.merger()?;
        setup::run(root, setup::Need::Mesh)?;
        let binary = self.cargo(root, &root.join("target/training"), &[format!("-Cprofile-generate={COUNTS}")])?;
        setup::build_around(root)?;
        let counts = Counts::begin(&binary)?;
        drive(root, binary, seconds)?;
        let merged = counts.merged(&merger)?;
        self.keep(root, &merged)
    }

    /// LLVM's tool that merges profiles: the toolchain's own, or the distribution's of the same version.
    fn merger(&self) -> Result<PathBuf> {
        let Self { llvm, tools, .. } = self;
        let debian = PathBuf::from(format!("/usr/lib/llvm-{llvm}/bin/llvm-profdata"));
        let found = [tools.join("llvm-profdata"), debian].into_iter().find(|program| program.is_file());
        found.ok_or_else(|| {
            Stop::Missing(format!(
                "llvm-profdata of LLVM {llvm}, which this rustc is built on, is missing: `rustup component add llvm-tools`, \
                 or Debian's package llvm-{llvm}"
            ))
            .into()
        })
    }

    /// Puts a profile where it stays, in the place of the one before. Its name is what is in it, so that a build with
    /// another one is known to cargo as another build.
    fn keep(&self, root: &Path, profile: &Path) -> Result<PathBuf> {
        let bytes = std::fs::read(profile).with_context(|| format!("cannot read {}", profile.display()))?;
        let mut hasher = DefaultHasher::new();
        hasher.write(&bytes);
        let folder = profiles(root);
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
        let kept = folder.join(format!("{:016x}.profdata", hasher.finish()));
        std::fs::write(&kept, bytes).with_context(|| format!("cannot write {}", kept.display()))?;
        Ok(kept)
    }
}

/// The machine and the major version of LLVM, of what `rustc -vV` says.
fn understood(said: &str) -> Option<(String, String)> {
    let field = |name: &str| said.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    Some((field("host:")?.to_owned(), field("LLVM version:")?.split('.').next()?.to_owned()))
}

/// Where the profile of the last release is.
fn profiles(root: &Path) -> PathBuf {
    root.join("target/trained")
}

/// The profile of the last release, where there is one.
pub(crate) fn profile(root: &Path) -> Option<PathBuf> {
    let files = std::fs::read_dir(profiles(root)).ok()?;
    files.filter_map(|entry| Some(entry.ok()?.path())).find(|path| path.extension().is_some_and(|end| end == "profdata"))
}

/// Requests of every kind that the benchmark knows, each for a while.
fn drive(root: &Path, binary: PathBuf, seconds: f64) -> Result<()> {
    let bed = Bed::make(root, binary, &[])?;
    for work in WORKS {
        if let Some(traffic) = work.traffic() {
            step(&format!("training: {}", work.text), || {
                let service = target(traffic.way);
                bed.warm(&bed.client, service, traffic)?;
                bed.drive(&bed.client, service, traffic, seconds).map(drop)
            })?;
        }
    }
    // What was counted is written when a process ends.
    step("taking the mesh down", || bed.down())
}

/// The folder of counts while a build trains. All processes add to one file, which is there before them: who else is on the
/// machine can make none.
struct Counts {
    folder: PathBuf,
    file: PathBuf,
}

impl Counts {
    fn begin(binary: &Path) -> Result<Self> {
        let folder = PathBuf::from(COUNTS);
        if folder.symlink_metadata().is_ok() {
            std::fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {COUNTS}"))?;
        }
        std::fs::create_dir(&folder).with_context(|| format!("cannot make {COUNTS}"))?;
        std::fs::set_permissions(&folder, Permissions::from_mode(0o711))?;
        let mut counts = Self { folder, file: PathBuf::new() };
        let mut first = Command::new(binary);
        first.arg("--version");
        shell::output(first)?;
        let mut files = std::fs::read_dir(&counts.folder)?.filter_map(|entry| Some(entry.ok()?.path()));
        counts.file = files.next().with_context(|| format!("{} leaves no counts in {COUNTS}", binary.display()))?;
        std::fs::set_permissions(&counts.file, Permissions::from_mode(0o666))?;
        Ok(counts)
    }

    /// The profile, in which a request's way must be: a sidecar that could not write leaves none.
    fn merged(&self, merger: &Path) -> Result<PathBuf> {
        let profile = self.folder.join("merged.profdata");
        let mut merge = Command::new(merger);
        merge.args(["merge", "--sparse", "--output"]).args([&profile, &self.file]);
        step("merging what was counted", || shell::output(merge).map(drop))?;
        let mut show = Command::new(merger);
        show.arg("show").arg(format!("--function={ON_THE_WAY}")).arg(&profile);
        let shown = shell::output(show)?;
        ensure!(shown.contains(ON_THE_WAY), "the sidecars did not write down what they counted");
        Ok(profile)
    }
}

/// Part of the name of every function that only a request runs.
const ON_THE_WAY: &str = "dataplane4http8pipeline";

impl Drop for Counts {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.folder).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compiler_is_known_by_what_it_says() {
        let said = "rustc 1.95.0 (59807616e 2026-04-14)\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\nrelease: 1.95.0\nLLVM version: 22.1.2\n";
        assert_eq!(understood(said), Some(("x86_64-unknown-linux-gnu".to_owned(), "22".to_owned())));
        assert_eq!(understood("rustc 1.95.0"), None);
    }

    #[test]
    fn without_the_tool_its_package_is_named() {
        let compiler = Compiler { host: "x".to_owned(), llvm: "7".to_owned(), tools: PathBuf::from("/nowhere") };
        let error = compiler.merger().unwrap_err();
        assert!(
            matches!(error.downcast_ref(), Some(Stop::Missing(text)) if text.contains("llvm-tools") && text.contains("llvm-7"))
        );
    }

    #[test]
    fn another_profile_takes_the_place_of_the_one_before() {
        let root = tempfile::tempdir().unwrap();
        let compiler = Compiler { host: "x".to_owned(), llvm: "7".to_owned(), tools: PathBuf::from("/nowhere") };
        assert_eq!(profile(root.path()), None);
        let given = root.path().join("given");
        let mut names = Vec::new();
        for text in ["one", "another"] {
            std::fs::write(&given, text).unwrap();
            let name = compiler.keep(root.path(), &given).unwrap();
            assert_eq!(profile(root.path()).as_ref(), Some(&name));
            assert_eq!(std::fs::read_to_string(&name).unwrap(), text);
            names.push(name);
        }
        assert_ne!(names[0], names[1]);
    }
}
