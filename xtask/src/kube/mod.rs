//! `cargo xtask kube`: a real Kubernetes of one node, made of the parts that others run, each built from its Go module.
//!
//! Its control plane, kubelet and containerd run as processes of this machine, its pods as pods do; nothing of it is a
//! stand-in. What it writes stands below [`STATE`], what it binds below [`RUN`], so that `down` finds it from any clone.

pub(crate) mod build;
mod certificates;
mod configuration;
mod down;
mod process;
mod suite;
mod up;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use clap::Subcommand;
use e2e::cluster::{AGENTS_STATE, KUBELET, STATE, kubeconfig};

use crate::{Stop, setup, shell};

/// Sockets, and which processes run.
const RUN: &str = "/run/outrigger-kube";
/// The node's address, on a bridge of its own.
const NODE_ADDRESS: &str = "10.99.0.1";
const NODE_LINK: &str = "orkube-node";
/// The bridge that the pods' links are ports of.
const PODS_LINK: &str = "orkube-pods";
const NODE: &str = "node1";
const SERVICES: &str = "10.96.0.0/16,fd96::/112";
const PODS: &str = "10.244.0.0/16,fd44::/48";
/// The parts of [`PODS`] that are this node's.
const NODE_PODS: [&str; 2] = ["10.244.0.0/24", "fd44::/64"];

/// What is asked of the cluster.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Wish {
    /// Build what is missing, start it, and print the KUBECONFIG; the first build takes minutes, a start seconds
    ///
    /// Example: eval "$(cargo xtask kube up)"
    Up {
        /// An archive of an image to give to the node; may be given several times
        #[arg(long, value_name = "FILE")]
        image: Vec<PathBuf>,
    },
    /// Build its programs from their modules, and start nothing
    Build,
    /// Give archives of images to its node
    ///
    /// Example: cargo xtask kube load target/images/outrigger.tar
    Load {
        /// Archives, as `cargo xtask image` writes them
        #[arg(required = true, value_name = "FILE")]
        images: Vec<PathBuf>,
    },
    /// Define the kinds of Gateway API in it, as its module publishes them
    GatewayApi,
    /// Build the published suite of Gateway API, and give its node the image that the mesh tests run
    Suite,
    /// Build SPIRE, of which cases of `cargo xtask e2e spire --long` take identities
    Spire,
    /// Render the plain manifests, deploy/manifests, from the Helm chart
    Manifests,
    /// End it and remove all that it made: processes, mounts, namespaces, links, rules, files
    Down,
    /// Kill one of its parts (SIGKILL), start it again after a while, and see that it stays; one that is dead is started
    ///
    /// Example: cargo xtask kube fail etcd --away 60
    Fail {
        /// Its name, as `status` says it
        #[arg(value_name = "PART")]
        part: String,
        /// Seconds until it is started again
        #[arg(long, value_name = "SECONDS", default_value = "0")]
        away: u64,
    },
    /// Which of its parts run, and its pods
    Status,
}

/// Does what is asked.
pub(crate) fn run(root: &Path, wish: Wish) -> Result<()> {
    if !matches!(wish, Wish::Build | Wish::Spire | Wish::Manifests) && !shell::is_root() {
        return Err(Stop::Missing("a cluster makes namespaces, mounts and cgroups: run as root".to_owned()).into());
    }
    match wish {
        Wish::Up { image } => {
            up::run(root)?;
            image.iter().try_for_each(|archive| up::import(root, archive))
        }
        Wish::Build => build::run(root),
        Wish::Load { images } => images.iter().try_for_each(|archive| up::import(root, archive)),
        Wish::GatewayApi => gateway_api(root),
        Wish::Suite => suite::run(root),
        Wish::Spire => build::spire(root),
        Wish::Manifests => manifests(root),
        Wish::Down => down::run(root),
        Wish::Fail { part, away } => {
            let process = process::all()?.into_iter().find(|process| process.name == part);
            let process = process.ok_or_else(|| Stop::Usage(format!("the cluster has no part {part}")))?;
            process.fail(Duration::from_secs(away))
        }
        Wish::Status => status(root),
    }
}

/// Where the programs stand that are built from Go modules.
fn programs(root: &Path) -> PathBuf {
    root.join("target/kube/bin")
}

/// `kubectl` as the cluster's administrator.
fn kubectl(root: &Path, words: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new(programs(root).join("kubectl"));
    command.arg("--kubeconfig").arg(kubeconfig()).args(words);
    command
}

/// `ctr` in the namespace of the kubelet's containers.
fn ctr(root: &Path, words: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new(programs(root).join("ctr"));
    command.arg("--address").arg(up::CONTAINERD_SOCKET).args(["--namespace", "k8s.io"]).args(words);
    command
}

/// What a shell has to know of it.
fn print_variables() {
    println!("export KUBECONFIG={}", kubeconfig().display());
    println!("export OUTRIGGER_KUBELET_DIR={KUBELET}");
    println!("export OUTRIGGER_NODE_STATE_DIR={AGENTS_STATE}");
}

fn gateway_api(root: &Path) -> Result<()> {
    let mut apply = kubectl(root, &["apply", "--server-side", "--filename"]);
    apply.arg(build::sources(root, "gateway", "sigs.k8s.io/gateway-api")?.join("config/crd/standard"));
    setup::step("defining the kinds of Gateway API", || shell::output(apply).map(drop))
}

fn manifests(root: &Path) -> Result<()> {
    build::run(root)?;
    let text = shell::output(e2e::cluster::rendered())?;
    Ok(std::fs::write(root.join(e2e::cluster::MANIFESTS), text)?)
}

fn status(root: &Path) -> Result<()> {
    let processes = process::all()?;
    if processes.is_empty() {
        return Err(Stop::No("no cluster runs; `cargo xtask kube up` starts one".to_owned()).into());
    }
    let mut dead = 0;
    for process in &processes {
        let alive = process.is_alive();
        dead += usize::from(!alive);
        let stands =
            if alive { "runs".to_owned() } else { format!("is dead; the last that it said is: {}", process.last_words()) };
        println!("{:<24} {:>8}  {stands}", process.name, process.id);
    }
    println!();
    match shell::output(kubectl(root, &["get", "nodes,pods", "--all-namespaces"])) {
        Ok(listed) => print!("{listed}"),
        // Without the part that is dead nobody may answer.
        Err(error) if dead > 0 => println!("its pods are not told: {error:#}"),
        Err(error) => return Err(error),
    }
    println!();
    print_variables();
    if dead > 0 {
        let remedy = "`cargo xtask kube fail PART` starts one again, unless one is at work that killed it";
        return Err(Stop::No(format!("{dead} parts are dead; {remedy}; their logs stand in {STATE}/log")).into());
    }
    Ok(())
}
