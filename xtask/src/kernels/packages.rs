//! Debian's packaged kernels: found and fetched with a private state of apt, so that nothing of the host changes.
//!
//! The mirrors are the ones that this machine's own apt knows. What is kept is the kernel's image and its modules for the
//! tests, below `target/kernels/NAME`; it is asked for anew once a day, and goes on serving where the mirror does not answer.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::finish;

use super::Kernel;
use crate::{Stop, shell};

/// A fetched kernel.
#[derive(Debug)]
pub(super) struct Fetched {
    /// What it boots from.
    pub(super) image: PathBuf,
    /// The modules of [`MODULES`] that it has not built in, in the order in which they are loaded.
    pub(super) modules: Vec<PathBuf>,
}

/// What the tests need beyond what every kernel has built in.
const MODULES: [&str; 1] = ["veth"];
/// The package that depends on the newest kernel of a suite. The flavour for virtual machines needs no driver to be loaded.
const NEWEST: &str = "linux-image-cloud-amd64";
/// Where trust in the packages comes from, if this machine's apt has no keys that hold for every source.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

const FRESH: Duration = Duration::from_hours(24);
const ASKING: Duration = Duration::from_secs(120);
const FETCHING: Duration = Duration::from_secs(300);
const UNPACKING: Duration = Duration::from_secs(120);

/// Fetches the newest packaged kernel of its suite, unless it is here.
pub(super) fn fetch(root: &Path, kernel: &Kernel) -> Result<Fetched> {
    let folder = super::folder(root).join(kernel.name);
    let stamp = folder.join("packages");
    let here = std::fs::read_to_string(&stamp).ok();
    if here.is_some() && is_fresh(&stamp) {
        return fetched(&folder);
    }
    let apt = Apt::new(root, kernel, &folder)?;
    let packages = match (apt.newest(kernel), &here) {
        (Ok(packages), _) => packages,
        (Err(error), Some(here)) => {
            shell::say(&format!("kernel {}: {error:#}; taking what was fetched before ({})", kernel.name, here.trim()));
            return fetched(&folder);
        }
        (Err(error), None) => {
            return Err(Stop::Missing(format!("the suite {} cannot be asked for its kernel: {error:#}", kernel.suite)).into());
        }
    };
    let list: String = packages.iter().map(|package| format!("{package}\n")).collect();
    if here.as_deref() != Some(&list) {
        remove(&stamp)?;
        apt.unpack(&packages, &folder)
            .map_err(|error| Stop::Missing(format!("the kernel {} cannot be fetched: {error:#}", kernel.name)))?;
    }
    std::fs::write(&stamp, list)?;
    fetched(&folder)
}

/// What stands in the folder of a kernel.
fn fetched(folder: &Path) -> Result<Fetched> {
    let image = folder.join("vmlinuz");
    ensure!(image.is_file(), "{} is missing; remove {}", image.display(), folder.display());
    let modules = MODULES.iter().map(|name| folder.join(format!("{name}.ko"))).filter(|module| module.is_file()).collect();
    Ok(Fetched { image, modules })
}

/// apt with sources, lists and cache of its own.
struct Apt {
    root: PathBuf,
    /// Its configuration, which stands above the host's.
    configuration: PathBuf,
}

impl Apt {
    fn new(root: &Path, kernel: &Kernel, folder: &Path) -> Result<Self> {
        if !shell::has("apt-get") {
            return Err(Stop::Missing("the kernels are Debian's packages, and there is no apt here".to_owned()).into());
        }
        let state = folder.join("apt");
        for part in ["lists/partial", "cache/archives/partial", "none"] {
            std::fs::create_dir_all(state.join(part))?;
        }
        std::fs::write(state.join("status"), "")?;
        let keys = if Path::new(KEYS).is_file() { format!(" signed-by={KEYS}") } else { String::new() };
        let source = format!("deb [arch=amd64{keys}] {} {} main\n", mirror(root, kernel.suite)?, kernel.suite);
        std::fs::write(state.join("sources.list"), source)?;
        let at = |part: &str| state.join(part).display().to_string();
        let settings = [
            ("Dir::State", at("")),
            ("Dir::State::lists", at("lists")),
            ("Dir::State::status", at("status")),
            ("Dir::Cache", at("cache")),
            ("Dir::Etc::sourcelist", at("sources.list")),
            ("Dir::Etc::sourceparts", at("none")),
            ("Dir::Etc::preferences", at("no-preferences")),
            ("Dir::Etc::preferencesparts", at("none")),
            ("APT::Architecture", "amd64".to_owned()),
            // The folder below target/ may be one that the user _apt cannot write.
            ("APT::Sandbox::User", "root".to_owned()),
            ("Acquire::Languages", "none".to_owned()),
            ("Acquire::Retries", "2".to_owned()),
            // Else lists that cannot be fetched are a warning, and the old ones are taken.
            ("APT::Update::Error-Mode", "any".to_owned()),
            ("Acquire::http::Timeout", "20".to_owned()),
            // The suite of an old release is not signed anew for ever.
            ("Acquire::Check-Valid-Until", "false".to_owned()),
        ];
        let configuration = state.join("apt.conf");
        std::fs::write(&configuration, settings.map(|(name, value)| format!("{name} \"{value}\";\n")).concat())?;
        Ok(Self { root: root.to_owned(), configuration })
    }

    /// The packages of the suite's newest kernel, each as `NAME VERSION`.
    fn newest(&self, kernel: &Kernel) -> Result<Vec<String>> {
        self.run("apt-get", &["-qq", "update"], &self.root, ASKING)?;
        let newest = self.shown(NEWEST)?;
        let image = newest.depends("linux-image-").next().context("its newest kernel has no package")?.to_owned();
        let shown = self.shown(&image)?;
        // From 7.x on the image's package is empty and depends on these.
        let parts = shown.depends("linux-binary-").chain(shown.depends("linux-modules-"));
        let version = shown.field("Version").context("a package without a version")?;
        let expected = format!("linux-image-{}", kernel.series);
        ensure!(image.starts_with(&expected), "its newest kernel is {image}");
        Ok([image.as_str()].into_iter().chain(parts).map(|package| format!("{package} {version}")).collect())
    }

    fn shown(&self, package: &str) -> Result<Shown> {
        self.run("apt-cache", &["show", "--no-all-versions", package], &self.root, ASKING).map(Shown)
    }

    /// Puts the image and the modules of `packages` into `folder`.
    fn unpack(&self, packages: &[String], folder: &Path) -> Result<()> {
        let unpacked = folder.join("unpacked");
        if unpacked.exists() {
            std::fs::remove_dir_all(&unpacked)?;
        }
        std::fs::create_dir_all(&unpacked)?;
        let mut download = vec!["-qq", "download"];
        download.extend(packages.iter().filter_map(|package| package.split(' ').next()));
        self.run("apt-get", &download, &unpacked, FETCHING)?;
        for deb in files(&unpacked)?.iter().filter(|file| file.extension().is_some_and(|extension| extension == "deb")) {
            let deb = deb.display().to_string();
            self.run("dpkg", &["-x", &deb, "."], &unpacked, UNPACKING)?;
        }
        let files = files(&unpacked)?;
        let named = |begin: &str| {
            files.iter().find(|file| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(begin)))
        };
        std::fs::copy(named("vmlinuz").context("the packages hold no image")?, folder.join("vmlinuz"))?;
        for name in MODULES {
            let module = folder.join(format!("{name}.ko"));
            remove(&module)?;
            if let Some(packed) = named(&format!("{name}.ko")) {
                unpack_module(packed, &module)?;
            }
        }
        std::fs::remove_dir_all(&unpacked).context("cannot remove what was unpacked")
    }

    fn run(&self, program: &str, arguments: &[&str], folder: &Path, limit: Duration) -> Result<String> {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(folder).env("APT_CONFIG", &self.configuration).env("LC_ALL", "C");
        let said = finish(&mut command, limit)?;
        ensure!(said.code == 0, "`{program} {}` failed: {}", arguments.join(" "), said.stderr.trim());
        Ok(said.stdout)
    }
}

/// What apt shows of a package.
struct Shown(String);

impl Shown {
    fn field(&self, name: &str) -> Option<&str> {
        self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// The names that begin so among what it depends on.
    fn depends<'a>(&'a self, begin: &'a str) -> impl Iterator<Item = &'a str> {
        let packages = self.field("Depends").unwrap_or_default().split(',');
        packages.filter_map(|package| package.split_whitespace().next()).filter(move |name| name.starts_with(begin))
    }
}

/// The mirror of this machine that has the suite: Debian keeps the updates for security apart from everything else.
fn mirror(root: &Path, suite: &str) -> Result<String> {
    let format = "$(REPO_URI) $(RELEASE)";
    let mut command = shell::command(root, "apt-get", &["indextargets", "--format", format, "Created-By: Packages"]);
    command.env("LC_ALL", "C");
    let targets = finish(&mut command, ASKING)?.ok()?;
    mirror_in(&targets, suite)
        .with_context(|| format!("apt's sources of this machine name no mirror for {suite}"))
        .map(str::to_owned)
}

fn mirror_in<'a>(targets: &'a str, suite: &str) -> Option<&'a str> {
    let is_security = |suite: &str| suite.ends_with("-security");
    let mut targets = targets.lines().filter_map(|line| line.split_once(' '));
    targets.find(|(_mirror, has)| is_security(has) == is_security(suite)).map(|(mirror, _has)| mirror)
}

/// A module as the kernel takes it.
fn unpack_module(packed: &Path, module: &Path) -> Result<()> {
    let unpacker = match packed.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return std::fs::copy(packed, module).map(drop).context("cannot copy a module"),
    };
    let mut command = Command::new(unpacker);
    command.arg("-dc").arg(packed).stdout(std::fs::File::create(module)?);
    let status = command.status().with_context(|| format!("cannot run {unpacker}"))?;
    ensure!(status.success(), "{unpacker} cannot unpack {}", packed.display());
    Ok(())
}

/// Every file below `folder`, sorted.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    found.sort_unstable();
    Ok(found)
}

fn is_fresh(stamp: &Path) -> bool {
    let modified = std::fs::metadata(stamp).and_then(|metadata| metadata.modified());
    modified.ok().and_then(|at| at.elapsed().ok()).is_some_and(|age| age < FRESH)
}

fn remove(file: &Path) -> Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", file.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_for_security_come_from_the_mirror_for_security() {
        let targets = "http://one/debian/ stable\nhttp://one/debian/ stable-updates\nhttp://two/security/ stable-security\n";
        assert_eq!(mirror_in(targets, "old-security"), Some("http://two/security/"));
        assert_eq!(mirror_in(targets, "new-backports"), Some("http://one/debian/"));
        assert_eq!(mirror_in("", "new-backports"), None);
    }

    #[test]
    fn what_a_kernel_consists_of_is_read_from_what_its_package_depends_on() {
        let shown = Shown(
            "Package: linux-image-9\nVersion: 9.1-1\nDepends: linux-binary-9 (= 9.1-1), kmod, linux-modules-9\n".to_owned(),
        );
        assert_eq!(shown.field("Version"), Some("9.1-1"));
        assert_eq!(shown.depends("linux-").collect::<Vec<_>>(), ["linux-binary-9", "linux-modules-9"]);
    }
}
