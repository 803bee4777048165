//! Making a local pod and removing it, each step so that it may be repeated: what a crash left behind is removed by the
//! same code that removes a pod at its regular end.

use std::collections::BTreeMap;
use std::ffi::{CString, OsString};
use std::fs::{File, Permissions};
use std::io;
use std::net::IpAddr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use super::super::Failure;
use super::cgroup;
use super::links::{self, PodLink};
use super::places::{self, PodPlaces, UpRecord, folder, runtime, sidecar_id};
use super::user::User;
use crate::base::clock::WallClock;
use crate::base::state;
use crate::model::address_book::{AddressBook, pod_addresses};
use crate::model::pod_record::{PodPort, PodRecord};
use crate::node::netns::{self, Surroundings};

/// A pod that stands: namespace, link, cgroups, files. Not yet in the mesh: see [`Self::publish`].
#[derive(Debug)]
pub(crate) struct LocalPod {
    pub(crate) places: PodPlaces,
    pub(crate) record: PodRecord,
    pub(crate) netns: File,
    /// Of its address, and of its link.
    number: u16,
}

/// What a user says about a pod.
#[derive(Debug)]
pub(crate) struct Wish {
    pub(crate) service_account: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) ports: Vec<PodPort>,
    pub(crate) meshed: bool,
    /// Nothing captures its connections, and that is known.
    pub(crate) unprotected: bool,
    pub(crate) hold: Duration,
}

impl LocalPod {
    /// Makes the pod; removes what it made where a step fails.
    ///
    /// # Errors
    /// The environment refuses a step.
    pub(crate) fn make(places: PodPlaces, wish: Wish, mesh: &UpRecord, cgroup_root: &Path) -> Result<Self, Failure> {
        match Self::try_make(&places, wish, mesh, cgroup_root) {
            Ok(pod) => Ok(pod),
            Err(failure) => {
                // The first failure is the one to tell.
                drop(remove(&places, &mesh.state, cgroup_root));
                Err(failure)
            }
        }
    }

    fn try_make(places: &PodPlaces, wish: Wish, mesh: &UpRecord, cgroup_root: &Path) -> Result<Self, Failure> {
        let number =
            state::update(&mesh.state.join("addresses.json"), 0o600, |book: &mut AddressBook| book.allocate_pod(&places.owner()))
                .map_err(|error| cannot("read the address book", &error))?
                .map_err(|error| Failure::environment(error, "stop pods that are not needed"))?;
        let (v4, v6) = pod_addresses(number);
        let link = PodLink { number, v4, v6: links::has_v6().then_some(v6) };
        let (netns_name, netns_path) = places.netns();
        let netns = links::make_pod(&netns_name, &netns_path, &link)?;
        let cookie = netns::cookie(&netns).map_err(|error| {
            Failure::environment(
                format!("cannot enter the pod's network namespace: {error}"),
                "run as root on Linux 5.14 or newer",
            )
        })?;
        let cgroup = places.cgroup(cgroup_root);
        cgroup::make(&cgroup).map_err(|error| cannot("make the pod's cgroups", &error))?;
        let addresses: Vec<IpAddr> = [Some(v4.into()), link.v6.map(IpAddr::from)].into_iter().flatten().collect();
        make_files(places, &addresses).map_err(|error| cannot("make the pod's files", &error))?;
        let record = PodRecord {
            namespace: places.pod.namespace.to_string(),
            name: places.pod.name.to_string(),
            service_account: wish.service_account,
            labels: wish.labels,
            annotations: wish.annotations,
            ports: wish.ports,
            addresses,
            former_addresses: Vec::new(),
            uid: None,
            netns: Some(netns_path),
            netns_cookie: cookie,
            cgroup,
            sidecar: None,
            meshed: wish.meshed,
            unprotected: wish.unprotected,
            terminating: false,
            hold_ms: u64::try_from(wish.hold.as_millis()).unwrap_or(u64::MAX),
            supervisor: std::process::id(),
            started_ms: u64::try_from(WallClock::system().since_epoch().as_millis()).unwrap_or(u64::MAX),
        };
        Ok(Self { places: places.clone(), record, netns, number })
    }

    /// Writes the record: from here the node agent enrols the pod, and the control plane makes an endpoint of it.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn publish(&self) -> Result<(), Failure> {
        let written = folder(self.places.record().parent().unwrap_or(Path::new("/")), 0o700)
            .and_then(|()| state::write_atomic(&self.places.record(), &serde_json::to_vec_pretty(&self.record)?, 0o600));
        written.map_err(|error| cannot("write the pod's record", &error))
    }

    /// Opens the pod's link. A pod of the mesh must be enrolled by then: before that nothing captures what it sends.
    ///
    /// # Errors
    /// The environment refuses it.
    pub(crate) fn open(&self) -> Result<(), Failure> {
        links::open_pod(self.number)
    }

    /// Says that the pod is about to go.
    pub(crate) fn terminate(&mut self) {
        if !self.record.terminating && self.places.record().exists() {
            self.record.terminating = true;
            // The pod goes either way; who does not learn it early learns it when the record is gone.
            drop(self.publish());
        }
    }
}

/// What starts inside the pod, in its app's cgroup and with the pod's own idea of names. Not started yet.
///
/// # Errors
/// The pod does not stand.
pub(crate) fn app_command(
    places: &PodPlaces,
    record: &PodRecord,
    command: &[OsString],
    user: Option<&User>,
    when_orphaned: Option<Signal>,
) -> Result<Command, Failure> {
    let (program, arguments) = command.split_first().ok_or_else(|| Failure::invalid(["no command; write it behind `--`"]))?;
    let netns = File::open(places.netns().1).map_err(|error| cannot("open the pod's network namespace", &error))?;
    let cgroup = cgroup::entrance(&record.cgroup.join("app")).map_err(|error| cannot("open the pod's cgroup", &error))?;
    let shown = names_shown(places)?;
    let mut child = Command::new(program);
    child.args(arguments).env_remove(super::detach::MARK);
    if record.unprotected {
        child.envs(PROXY_VARIABLES);
    }
    if let Some(user) = user {
        user.tell(&mut child);
    }
    netns::surround(
        &mut child,
        Surroundings {
            netns: netns.into(),
            cgroup,
            shown,
            confined_to: user.map(|user| (user.id, user.group)),
            when_orphaned,
            // Without privileges and with root's terminal, a program could type into root's shell (TIOCSTI).
            own_session: user.is_some(),
        },
    );
    Ok(child)
}

/// The files by which the pod resolves names, each with the place where it is seen.
fn names_shown(places: &PodPlaces) -> Result<Vec<(CString, CString)>, Failure> {
    let mut shown = Vec::new();
    for (ours, theirs) in [("resolv.conf", "/etc/resolv.conf"), ("hosts", "/etc/hosts"), ("nsswitch.conf", NSSWITCH)] {
        if theirs == NSSWITCH && !places.runtime().join(ours).exists() {
            continue;
        }
        // A name service that answers from a link (as systemd-resolved does) is shadowed where the link leads.
        let target = std::fs::canonicalize(theirs).map_err(|error| {
            Failure::environment(
                format!("cannot show the pod its own {theirs}: {error}"),
                format!("make {theirs}, if only as an empty file"),
            )
        })?;
        shown.push((c_string(&places.runtime().join(ours))?, c_string(&target)?));
    }
    Ok(shown)
}

/// What makes the listeners of the pod's sidecar, so that connections wait for it. Not started yet.
///
/// # Errors
/// The pod does not stand.
pub(crate) fn listeners_command(pod: &LocalPod, mesh: &UpRecord) -> Result<Command, Failure> {
    let mut command = sidecar_command(pod, mesh)?;
    command.arg("--listen-only");
    Ok(command)
}

/// The pod's sidecar. Not started yet.
///
/// # Errors
/// The pod does not stand.
pub(crate) fn sidecar_command(pod: &LocalPod, mesh: &UpRecord) -> Result<Command, Failure> {
    let log = |kind: &str| {
        let path = pod.places.log(kind);
        File::options().create(true).append(true).open(&path).map_err(|error| cannot(&format!("open {}", path.display()), &error))
    };
    let cgroup = cgroup::entrance(&pod.record.cgroup.join("sidecar")).map_err(|error| cannot("open the pod's cgroup", &error))?;
    let netns = pod.netns.try_clone().map_err(|error| cannot("share the pod's network namespace", &error))?;
    // The state folder is closed to everybody but root: the sidecar sees its own part of it, at a place of its own.
    let mut shown = vec![(c_string(&pod.places.sidecar_state())?, c_string(&sidecar_view())?)];
    if pod.record.unprotected {
        // Its application leaves it to the sidecar to resolve the names that it asks for.
        shown.extend(names_shown(&pod.places)?);
    }
    let user = sidecar_id(&pod.record.addresses).ok_or_else(|| Failure::invalid(["the pod has no IPv4 address"]))?;
    // This very binary, wherever it lies: its path may lead through folders that the sidecar's user cannot pass.
    let mut child = Command::new("/proc/self/exe");
    child
        .arg("sidecar")
        .args(["--namespace", &pod.record.namespace, "--name", &pod.record.name])
        .args(["--control", &mesh.stream.to_string(), "--trust-domain", &mesh.trust_domain])
        .args([OsString::from("--workload-api"), runtime("workload.sock").into()])
        .args([OsString::from("--node"), places::node_socket().into()])
        .args([OsString::from("--state"), sidecar_view().into()])
        .args(["--access-log", "-"])
        .env_clear()
        // What the sidecar takes from its environment, as the user of `run` set it.
        .envs(std::env::vars_os().filter(|(name, _value)| SIDECAR_VARIABLES.iter().any(|known| name == known)))
        .stdin(Stdio::null())
        .stdout(log(".access")?)
        .stderr(log(".sidecar")?);
    if pod.record.unprotected {
        child.arg("--forward-proxy");
    }
    netns::surround(
        &mut child,
        Surroundings {
            netns: netns.into(),
            cgroup,
            shown,
            confined_to: Some((user, user)),
            when_orphaned: Some(Signal::TERM),
            own_session: true,
        },
    );
    Ok(child)
}

/// Removes a pod and everything of it, killing what still runs. Nothing where none stands.
///
/// # Errors
/// The first step that failed; the others were tried all the same.
pub(crate) fn remove(places: &PodPlaces, state: &Path, cgroup_root: &Path) -> Result<(), Failure> {
    let cgroup = places.cgroup(cgroup_root);
    let killed =
        cgroup::kill(&cgroup).and_then(|()| cgroup::remove(&cgroup)).map_err(|error| cannot("remove the pod's cgroups", &error));
    let record = absent(std::fs::remove_file(places.record())).map_err(|error| cannot("remove the pod's record", &error));
    let link = links::remove_pod(&places.netns().0);
    let sidecar =
        absent(std::fs::remove_dir_all(places.sidecar_state())).map_err(|error| cannot("remove the sidecar's state", &error));
    let book = state.join("addresses.json");
    let address = if book.exists() {
        state::update(&book, 0o600, |book: &mut AddressBook| book.pods.release(&places.owner()))
            .map_err(|error| cannot("return the pod's address", &error))
    } else {
        Ok(())
    };
    let files = absent(std::fs::remove_dir_all(places.runtime())).map_err(|error| cannot("remove the pod's files", &error));
    killed.and(record).and(link).and(sidecar).and(address).and(files)
}

fn make_files(places: &PodPlaces, addresses: &[IpAddr]) -> io::Result<()> {
    folder(&places.runtime(), 0o755)?;
    let write = |name: &str, text: String| {
        let path = places.runtime().join(name);
        std::fs::write(&path, text)?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o644))
    };
    write("state", places.state().display().to_string())?;
    write("resolv.conf", resolv_conf(&places.pod.namespace))?;
    write("hosts", hosts(&places.pod.name, &places.pod.namespace, addresses))?;
    if let Ok(text) = std::fs::read_to_string(NSSWITCH) {
        write("nsswitch.conf", nsswitch(&text))?;
    }
    folder(&sidecar_view(), 0o755)?;
    let user = sidecar_id(addresses).ok_or_else(|| io::Error::other("the pod has no IPv4 address"))?;
    make_sidecar_state(&places.sidecar_state(), user)?;
    folder(places.log("").parent().unwrap_or(Path::new("/")), 0o700)
}

/// What a crash left of the same user stays. Of another user, whose pod had another address, nothing is taken over: it is
/// neither readable to this one, nor known to be what a sidecar of this pod wrote.
fn make_sidecar_state(path: &Path, user: u32) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() && found.uid() == user => {}
        Ok(_another_users) => std::fs::remove_dir_all(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    folder(path, 0o700)?;
    chown(path, Some(user), Some(user))
}

/// Where every sidecar sees its own state, each in its own mount namespace.
fn sidecar_view() -> PathBuf {
    runtime("sidecar")
}

fn resolv_conf(namespace: &str) -> String {
    let (nameserver, _port) = super::dns::ADDRESS.split_once(':').unwrap_or((super::dns::ADDRESS, ""));
    format!("nameserver {nameserver}\nsearch {namespace}.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n")
}

fn hosts(name: &str, namespace: &str, addresses: &[IpAddr]) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    for address in addresses {
        text.push_str(&format!("{address}\t{name}.{namespace}.pod.cluster.local {name}\n"));
    }
    text
}

/// The machine's own, but that names come from `hosts` and from the pod's resolver alone: what else it may name (mDNS, a
/// resolver behind a socket) answers for the machine, and may claim every name below `.local`.
fn nsswitch(machine: &str) -> String {
    let others = machine.lines().filter(|line| !line.trim_start().starts_with("hosts:"));
    let mut text: String = others.flat_map(|line| [line, "\n"]).collect();
    text.push_str("hosts: files dns\n");
    text
}

fn absent(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

fn c_string(path: &Path) -> Result<CString, Failure> {
    CString::new(path.as_os_str().as_bytes()).map_err(|error| Failure::invalid([format!("{}: {error}", path.display())]))
}

/// `what` failed, with the remedy that fits nearly all of these.
pub(crate) fn cannot(what: &str, error: &io::Error) -> Failure {
    Failure::environment(format!("cannot {what}: {error}"), "run as root, and `outrigger down` after a crash")
}

/// What programs are told of their sidecar where nothing captures: each client reads some of these.
const PROXY_VARIABLES: [(&str, &str); 6] = [
    ("http_proxy", "http://127.0.0.1:14001"),
    ("HTTP_PROXY", "http://127.0.0.1:14001"),
    ("https_proxy", "http://127.0.0.1:14001"),
    ("HTTPS_PROXY", "http://127.0.0.1:14001"),
    ("no_proxy", "localhost,127.0.0.1,::1"),
    ("NO_PROXY", "localhost,127.0.0.1,::1"),
];
/// Where the C library reads who answers for names.
const NSSWITCH: &str = "/etc/nsswitch.conf";
const SIDECAR_VARIABLES: [&str; 5] =
    ["OUTRIGGER_OTLP", "OUTRIGGER_LOG", "OUTRIGGER_LOG_LEVEL", "OUTRIGGER_WORKERS", "RUST_BACKTRACE"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_searches_its_own_namespace_first() {
        assert_eq!(
            resolv_conf("shop"),
            "nameserver 127.0.0.53\nsearch shop.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
        );
    }

    #[test]
    fn only_the_pods_own_resolver_is_asked() {
        let machine = "passwd: files\nhosts: files mdns4_minimal [NOTFOUND=return] resolve [!UNAVAIL=return] dns\n";
        assert_eq!(nsswitch(machine), "passwd: files\nhosts: files dns\n");
    }

    #[test]
    fn a_sidecar_finds_its_own_state_and_nothing_of_another_user() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("sidecars/shop.web");
        // Only root may give a folder away.
        let (own, another) = if rustix::process::geteuid().is_root() {
            (1_900_000_002, 1_900_000_003)
        } else {
            (rustix::process::geteuid().as_raw(), rustix::process::geteuid().as_raw())
        };
        make_sidecar_state(&path, own).unwrap();
        std::fs::write(path.join("snapshot"), "kept").unwrap();
        make_sidecar_state(&path, own).unwrap();
        assert_eq!(std::fs::read(path.join("snapshot")).unwrap(), b"kept");
        make_sidecar_state(&path, another).unwrap();
        let found = std::fs::metadata(&path).unwrap();
        assert_eq!((found.uid(), found.mode() & 0o777), (another, 0o700));
        assert_eq!(path.join("snapshot").exists(), own == another);
    }

    #[test]
    fn a_pod_knows_its_own_name() {
        let text = hosts("web-1", "shop", &["10.64.0.5".parse().unwrap()]);
        assert!(text.ends_with("10.64.0.5\tweb-1.shop.pod.cluster.local web-1\n"), "{text}");
    }
}
