//! Starts the cluster: each part once the one before it answers.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use e2e::cluster::KUBELET;
use e2e::mesh::{finish, wait_for};
use e2e::programs::{libraries, third};

use super::configuration::{self, SANDBOX_IMAGE};
use super::process::Process;
use super::{NODE, NODE_ADDRESS, NODE_LINK, PODS, RUN, SERVICES, STATE, build, certificates, ctr, kubectl, process, programs};
use crate::image::Image;
use crate::{Stop, setup, shell};

pub(super) const CONTAINERD_SOCKET: &str = "/run/outrigger-kube/containerd.sock";
/// Not etcd's usual one: another may run on the machine.
const ETCD: &str = "http://127.0.0.1:23790";
const ETCD_PEERS: &str = "http://127.0.0.1:23800";
const PATIENCE: Duration = Duration::from_secs(60);

/// Builds, starts and prints where the cluster is. One that runs already is left as it is.
pub(super) fn run(root: &Path) -> Result<()> {
    build::run(root)?;
    let processes = process::all()?;
    if !processes.is_empty() {
        let dead: Vec<&str> =
            processes.iter().filter(|process| !process.is_alive()).map(|process| process.name.as_str()).collect();
        if !dead.is_empty() {
            let text = format!("a cluster is there of which {} ended; `cargo xtask kube down` removes it", dead.join(", "));
            return Err(Stop::No(text).into());
        }
        shell::say("the cluster runs already");
    } else {
        let begun = Instant::now();
        start(root)?;
        shell::say(&format!("the node is ready after {:.1} s", begun.elapsed().as_secs_f64()));
    }
    super::print_variables();
    Ok(())
}

fn start(root: &Path) -> Result<()> {
    std::fs::create_dir_all(STATE)?;
    std::fs::create_dir_all(RUN)?;
    setup::step("making certificates", || certificates::make(root))?;
    configuration::write(&programs(root))?;
    network(root)?;
    setup::step("starting etcd and the API server", || api_server(root))?;
    setup::step("starting controllers, scheduler and names", || controllers(root))?;
    setup::step("starting containerd", || containerd(root))?;
    setup::step("starting the kubelet and kube-proxy", || node(root))
}

/// The node's address, forwarding between pods and it, and what an init of a machine mounts.
fn network(root: &Path) -> Result<()> {
    if !Path::new("/sys/class/net").join(NODE_LINK).exists() {
        let ip = |words: &[&str]| shell::output(shell::command(root, "ip", words)).map(drop);
        ip(&["link", "add", NODE_LINK, "type", "bridge"])?;
        ip(&["address", "add", &format!("{NODE_ADDRESS}/32"), "dev", NODE_LINK])?;
        ip(&["link", "set", NODE_LINK, "up"])?;
    }
    for switch in super::down::SWITCHES {
        super::down::remember(switch)?;
        std::fs::write(switch, "1").with_context(|| format!("cannot write {switch}"))?;
    }
    super::down::mount_bpf(root)
}

fn api_server(root: &Path) -> Result<()> {
    let data = format!("{STATE}/etcd");
    let mut etcd = Command::new(third("usr/bin/etcd")?);
    etcd.env("LD_LIBRARY_PATH", libraries());
    etcd.args(["--data-dir", &data, "--listen-client-urls", ETCD, "--advertise-client-urls", ETCD]);
    // Nothing here outlives the machine, and a disk that others use is slow to say that it wrote.
    etcd.args(["--listen-peer-urls", ETCD_PEERS, "--unsafe-no-fsync"]);
    Process::start("etcd", etcd)?;
    let mut api = program(root, "kube-apiserver");
    api.args([
        &format!("--etcd-servers={ETCD}"),
        &format!("--advertise-address={NODE_ADDRESS}"),
        &format!("--bind-address={NODE_ADDRESS}"),
        &format!("--service-cluster-ip-range={SERVICES}"),
        &file("tls-cert-file", "api.crt"),
        &file("tls-private-key-file", "api.key"),
        &file("client-ca-file", "ca.crt"),
        &file("service-account-key-file", "accounts.pub"),
        &file("service-account-signing-key-file", "accounts.key"),
        &file("kubelet-client-certificate", "admin.crt"),
        &file("kubelet-client-key", "admin.key"),
        &file("kubelet-certificate-authority", "ca.crt"),
        // Who asked for what: what a role allows is held against it.
        &format!("--audit-log-path={STATE}/log/audit.log"),
        &format!("--audit-policy-file={STATE}/audit.json"),
    ]);
    api.args([
        "--allow-privileged=true",
        "--audit-log-maxsize=100",
        "--audit-log-maxbackup=1",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--kubelet-preferred-address-types=InternalIP",
    ]);
    Process::start("kube-apiserver", api)?.wait(PATIENCE, || answers(kubectl(root, &["get", "--raw", "/readyz"])))
}

fn controllers(root: &Path) -> Result<()> {
    let mut manager = client(root, "kube-controller-manager", "controller-manager");
    manager.args([
        &file("service-account-private-key-file", "accounts.key"),
        &file("root-ca-file", "ca.crt"),
        &file("cluster-signing-cert-file", "ca.crt"),
        &file("cluster-signing-key-file", "ca.key"),
        &format!("--service-cluster-ip-range={SERVICES}"),
        &format!("--cluster-cidr={PODS}"),
        // Each node says which part of it is its pods', as nodes of most clusters do.
        "--allocate-node-cidrs=true",
    ]);
    manager.args(["--use-service-account-credentials", "--leader-elect=false", "--bind-address=127.0.0.1"]);
    Process::start("kube-controller-manager", manager)?;
    let mut scheduler = client(root, "kube-scheduler", "scheduler");
    scheduler.args(["--leader-elect=false", "--bind-address=127.0.0.1"]);
    Process::start("kube-scheduler", scheduler)?;
    let mut names = program(root, "coredns");
    names.arg("-conf").arg(Path::new(STATE).join("Corefile"));
    Process::start("coredns", names).map(drop)
}

fn containerd(root: &Path) -> Result<()> {
    let mut daemon = program(root, "containerd");
    daemon.arg("--config").arg(Path::new(STATE).join("containerd.toml"));
    // It starts its shim and the runtime by name.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(programs(root)).chain(std::env::split_paths(&path));
    daemon.env("PATH", std::env::join_paths(folders)?);
    Process::start("containerd", daemon)?.wait(PATIENCE, || answers(ctr(root, &["version"])))?;
    let pause = Image {
        name: SANDBOX_IMAGE.to_owned(),
        entrypoint: vec!["/bin/busybox".to_owned(), "sleep".to_owned(), "infinity".to_owned()],
        user: "65535:65535".to_owned(),
        folders: Vec::new(),
        files: vec![(PathBuf::from("/bin/busybox"), "bin/busybox".to_owned())],
    };
    load(root, &pause)
}

/// Makes an image and gives it to the node.
pub(super) fn load(root: &Path, image: &Image) -> Result<()> {
    let archive = Path::new(STATE).join("image.tar");
    image.write(root, &archive)?;
    let loaded = import(root, &archive);
    std::fs::remove_file(&archive)?;
    loaded
}

/// Gives the node the image in an archive.
pub(super) fn import(root: &Path, archive: &Path) -> Result<()> {
    let mut import = ctr(root, &["images", "import", "--local"]);
    import.arg(archive);
    let said = finish(&mut import, PATIENCE)?.ok();
    said.map(drop).with_context(|| format!("cannot load the image in {}", archive.display()))
}

fn node(root: &Path) -> Result<()> {
    let mut kubelet = program(root, "kubelet");
    kubelet.args([
        &format!("--config={STATE}/kubelet.json"),
        &format!("--kubeconfig={}", certificates::client("node").display()),
        &format!("--hostname-override={NODE}"),
        &format!("--node-ip={NODE_ADDRESS}"),
        &format!("--root-dir={KUBELET}"),
    ]);
    let kubelet = Process::start("kubelet", kubelet)?;
    let mut proxy = program(root, "kube-proxy");
    proxy.args([
        &format!("--kubeconfig={}", certificates::client("proxy").display()),
        &format!("--hostname-override={NODE}"),
        &format!("--cluster-cidr={PODS}"),
    ]);
    proxy.args(["--proxy-mode=nftables", "--bind-address=127.0.0.1"]);
    Process::start("kube-proxy", proxy)?;
    let ready = ["wait", "--for=condition=Ready", &format!("node/{NODE}"), "--timeout=1s"];
    kubelet.wait(PATIENCE, || answers(kubectl(root, &ready)))?;
    // Before it is there, no pod can be made.
    wait_for("the default service account", PATIENCE, || answers(kubectl(root, &["get", "serviceaccount", "default"])))
}

fn program(root: &Path, name: &str) -> Command {
    let mut command = Command::new(programs(root).join(name));
    command.current_dir(STATE);
    command
}

/// A part that asks the API server who may do what, for those who ask it.
fn client(root: &Path, name: &str, who: &str) -> Command {
    let mut command = program(root, name);
    for flag in ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"] {
        command.arg(format!("--{flag}={}", certificates::client(who).display()));
    }
    command
}

fn file(flag: &str, name: &str) -> String {
    format!("--{flag}={}", certificates::path(name))
}

fn answers(mut command: Command) -> Result<()> {
    finish(&mut command, Duration::from_secs(10))?.ok().map(drop)
}
