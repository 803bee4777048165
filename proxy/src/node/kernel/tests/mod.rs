//! The programs on the running kernel, with real sockets in two network namespaces; and what needs no kernel.
//!
//! Every test makes a world of its own: two namespaces with a link between them, a bpffs, and threaded cgroups, in which a
//! thread can be an app or a sidecar. They need root, and say so where they have to stand aside. A running mesh is not
//! disturbed: the programs know their own pods only.

mod attest;
mod bypass;
mod closed;
mod complete;
mod exclusions;
mod flows;
mod foreign;
mod latency;
mod layout;
mod limits;
mod neighbours;
mod nested;
mod rights;
mod sweep;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Once;
use std::thread;
use std::time::Duration;

use proxy_common::counters::Counter;
use proxy_common::{MESH_CLIENT, PORT_ADMIN, PORT_INBOUND, PORT_METRICS, PORT_OUTBOUND, SOL_MESH};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

use super::links::Hook;
use super::*;
use crate::node::netns;

/// A pod's two kinds of tasks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::node) enum Who {
    App,
    Sidecar,
}

/// One side of the link.
pub(in crate::node) struct Side {
    pub(in crate::node) netns: String,
    /// The cgroup below which both of its kinds of tasks are.
    above: PathBuf,
    cgroups: [PathBuf; 2],
    pub(in crate::node) v4: Ipv4Addr,
    pub(in crate::node) v6: Ipv6Addr,
    pub(in crate::node) cookie: u64,
}

/// Two sides, `a` and `b`, and a folder for pins. Everything goes when it is dropped.
pub(in crate::node) struct World {
    pub(in crate::node) a: Side,
    pub(in crate::node) b: Side,
    pins: PathBuf,
    pub(in crate::node) root: PathBuf,
}

impl World {
    /// `None` where this machine or this user cannot make one.
    pub(in crate::node) fn new() -> Option<Self> {
        if !may_load() {
            return None;
        }
        let root = find_cgroup2().unwrap();
        static SWEPT: Once = Once::new();
        SWEPT.call_once(|| sweep::sweep(&root));
        let name = sweep::name();
        let pins = sweep::pins(&name);
        mount_bpffs(&pins).unwrap();
        // Only from the root's own domain may a thread enter a threaded cgroup below it.
        static MOVED: Once = Once::new();
        // Once: it moves every thread of this process, also those that are somebody in another test's world by then.
        MOVED.call_once(|| fs::write(root.join("cgroup.procs"), "0").unwrap());
        let (a, b) = (format!("{name}a"), format!("{name}b"));
        ip(&["netns", "add", &a]);
        ip(&["netns", "add", &b]);
        ip(&["link", "add", "eth0", "netns", &a, "type", "veth", "peer", "name", "eth0", "netns", &b]);
        let side = |netns: String, last: u8| Side::new(netns, &root, last);
        Some(Self { a: side(a, 1), b: side(b, 2), pins, root })
    }

    /// One whose links can be watched: tcx is there since Linux 6.6.
    fn with_watched_links() -> Option<Self> {
        let release = release();
        let mut numbers = release.split(|sign: char| !sign.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
        if (numbers.next(), numbers.next()) < (Some(6), Some(6)) {
            io::stdout().write_all(b"\nleft out: watched links, which need Linux 6.6\n").unwrap();
            return None;
        }
        Self::new()
    }

    pub(in crate::node) fn open(&self) -> Kernel {
        Kernel::open(&self.pins, &self.root, Options::default()).unwrap()
    }
}

/// Only root may load programs; says so where a test has to stand aside.
pub(super) fn may_load() -> bool {
    let may = rustix::process::geteuid().is_root();
    if !may {
        // Past the harness, which keeps what a test that succeeds prints to itself.
        io::stdout().write_all(b"\nleft out: the kernel's tests, they need root\n").unwrap();
    }
    may
}

impl Drop for World {
    fn drop(&mut self) {
        Kernel::remove_all(&self.pins).unwrap();
        unmount_bpffs(&self.pins).unwrap();
        for side in [&self.a, &self.b] {
            side.remove();
        }
        sweep::remove_folder(&self.pins);
    }
}

impl Side {
    fn new(netns: String, root: &Path, last: u8) -> Self {
        let (v4, v6) = (Ipv4Addr::new(10, 77, 0, last), Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, last.into()));
        ip(&["-n", &netns, "addr", "add", &format!("{v4}/24"), "dev", "eth0"]);
        ip(&["-n", &netns, "addr", "add", &format!("{v6}/64"), "dev", "eth0", "nodad"]);
        ip(&["-n", &netns, "link", "set", "lo", "up"]);
        ip(&["-n", &netns, "link", "set", "eth0", "up"]);
        let above = root.join(&netns);
        let cgroups = ["app", "sidecar"].map(|who| above.join(who));
        for cgroup in [&above].into_iter().chain(&cgroups) {
            fs::create_dir(cgroup).unwrap();
            fs::write(cgroup.join("cgroup.type"), "threaded").unwrap();
        }
        let cookie = netns::cookie(&File::open(Path::new("/run/netns").join(&netns)).unwrap()).unwrap();
        Self { netns, above, cgroups, v4, v6, cookie }
    }

    /// Runs `work` as a task of this pod.
    pub(in crate::node) fn as_<T: Send>(&self, who: Who, work: impl FnOnce() -> T + Send) -> T {
        self.with_cgroup(self.cgroup(who), work)
    }

    /// Runs `work` on a thread of this namespace and of `cgroup`.
    fn with_cgroup<T: Send>(&self, cgroup: &Path, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let task = scope.spawn(|| {
                fs::write(cgroup.join("cgroup.threads"), "0").unwrap();
                let netns = File::open(Path::new("/run/netns").join(&self.netns)).unwrap();
                rustix::thread::move_into_link_name_space(netns.as_fd(), Some(rustix::thread::LinkNameSpaceType::Network))
                    .unwrap();
                work()
            });
            task.join().unwrap()
        })
    }

    pub(in crate::node) fn cgroup(&self, who: Who) -> &Path {
        match who {
            Who::App => &self.cgroups[0],
            Who::Sidecar => &self.cgroups[1],
        }
    }

    fn nft(&self, rules: &str) {
        let mut nft = Command::new("ip");
        nft.args(["netns", "exec", &self.netns, "nft", "-f", "-"]).stdin(Stdio::piped());
        let mut running = nft.spawn().unwrap();
        running.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
        assert!(running.wait().unwrap().success(), "nft: {rules}");
    }

    pub(in crate::node) fn enrol(&self, kernel: &mut Kernel) {
        self.enrol_as(kernel, &CaptureConfig::default());
    }

    /// Without a device of the node: its link is not watched.
    fn enrol_as(&self, kernel: &mut Kernel, capture: &CaptureConfig) {
        assert!(matches!(self.try_enrol(kernel, capture, &[]).unwrap(), Watch::Not(_)));
    }

    fn try_enrol(&self, kernel: &mut Kernel, capture: &CaptureConfig, links: &[u32]) -> Result<Watch, KernelError> {
        let netns = File::open(Path::new("/run/netns").join(&self.netns)).unwrap();
        kernel.enrol(&PodEntry {
            cookie: self.cookie,
            v4: Some(self.v4),
            v6: Some(self.v6),
            sidecar_cgroup: self.cgroup(Who::Sidecar),
            netns: netns.as_fd(),
            capture,
            links,
        })
    }

    /// Enrols it, with a listener for what comes in.
    fn enrol_with_listener(&self, kernel: &mut Kernel) -> TcpListener {
        self.enrol(kernel);
        let listener = self.listen(Who::Sidecar, "::", PORT_INBOUND);
        kernel.register_listener(self.cookie, listener.as_fd()).unwrap();
        listener
    }

    pub(in crate::node) fn listen(&self, who: Who, address: &str, port: u16) -> TcpListener {
        self.as_(who, || {
            for _ in 0..100 {
                match TcpListener::bind((address, port)) {
                    // A child of another test, on its way to its program, may hold a listener that was just closed.
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse => thread::sleep(Duration::from_millis(10)),
                    bound => return bound.unwrap(),
                }
            }
            panic!("{address}:{port} stays in use");
        })
    }

    pub(in crate::node) fn connect(&self, who: Who, to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        let to = to.into();
        self.as_(who, || TcpStream::connect_timeout(&to, Duration::from_secs(5)))
    }

    /// Connects and says whether somebody answered `hello`.
    fn greets(&self, who: Who, to: impl Into<SocketAddr>) -> bool {
        let Ok(mut stream) = self.connect(who, to) else { return false };
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).is_ok() && answer == "hello"
    }

    /// The sidecar dials, for `client` if there is one.
    fn dial(&self, to: SocketAddr, client: Option<SocketAddr>) -> io::Result<TcpStream> {
        self.as_(Who::Sidecar, || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            if let Some(client) = client {
                declare(&socket, client)?;
            }
            socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
            Ok(socket.into())
        })
    }

    fn both(&self, port: u16) -> [SocketAddr; 2] {
        [(self.v4, port).into(), (self.v6, port).into()]
    }

    fn remove(&self) {
        ip(&["netns", "del", &self.netns]);
        self.cgroups.iter().chain([&self.above]).for_each(|cgroup| remove_cgroup(cgroup));
    }
}

/// Sockets and tasks on their way out may hold it for a moment: a thread that was waited for leaves its cgroup afterwards.
fn remove_cgroup(cgroup: &Path) {
    for _ in 0..200 {
        if !cgroup.exists() || fs::remove_dir(cgroup).is_ok() {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Declares a connection's client as a sidecar does.
fn declare(socket: &Socket, client: SocketAddr) -> io::Result<()> {
    let v6 = match client.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let value = SockAddr::from(SocketAddr::from((v6, client.port())));
    // SAFETY: the value is a `sockaddr_in6` of the length that is passed.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), SOL_MESH, MESH_CLIENT, value.as_ptr().cast(), value.len()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Accepts one connection, within a deadline.
fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    SockRef::from(listener).set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    listener.accept().unwrap()
}

/// Notes of sidecars' dials to their own pods.
fn own_dials(world: &World) -> usize {
    let data = aya::maps::MapData::from_pin(world.pins.join(proxy_common::owndials::OWN_DIALS)).unwrap();
    let notes: aya::maps::HashMap<_, [u32; 6], [u32; 8]> = aya::maps::Map::HashMap(data).try_into().unwrap();
    notes.keys().count()
}

/// Nobody is waiting to be accepted.
fn nobody_at(listener: &TcpListener) {
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    listener.set_nonblocking(false).unwrap();
}

/// Says `hello` to everybody from a thread that ends with the listener's peerless death, the test's end.
fn greet(listener: TcpListener) {
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            if stream.write_all(b"hello").is_err() {}
        }
    });
}

/// Waits for an answer for no longer than a second.
#[track_caller]
fn within_a_second<T: PartialEq + std::fmt::Debug>(what: impl Fn() -> T, expected: T) {
    for _ in 0..100 {
        if what() == expected {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(what(), expected);
}

#[test]
fn cgroup2_is_found_where_it_is_mounted() {
    let hybrid = "30 25 0:26 / /sys/fs/cgroup rw,relatime shared:9 - tmpfs tmpfs rw\n\
                  31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                  32 30 0:28 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
    assert_eq!(cgroup2_in(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
    let part = "32 30 0:28 /docker/1 /sys/fs/cgroup ro,relatime - cgroup2 cgroup2 rw\n";
    assert_eq!(cgroup2_in(part), None);
    assert_eq!(cgroup2_in(""), None);
    // A container in a cgroup namespace of its own, which sees its own part and the machine's hierarchy.
    let both = "40 39 0:28 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n41 39 0:28 /../../.. /host/cgroup ro - cgroup2 cgroup rw\n";
    assert_eq!(cgroup2_in(both), Some(PathBuf::from("/host/cgroup")));
}

#[test]
fn app_goes_to_its_sidecar_and_both_know_where_it_wanted_to_go() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let v4 = world.a.listen(Who::Sidecar, "127.0.0.1", PORT_OUTBOUND);
    let v6 = world.a.listen(Who::Sidecar, "::1", PORT_OUTBOUND);
    let mapped = SocketAddr::from((world.b.v4.to_ipv6_mapped(), 7777));
    let [to_v4, to_v6] = world.b.both(7777);
    for (to, listener, original) in [(to_v4, &v4, to_v4), (mapped, &v4, to_v4), (to_v6, &v6, to_v6)] {
        let app = world.a.connect(Who::App, to).unwrap();
        let (taken, from) = accept(listener);
        assert_eq!(app.peer_addr().unwrap(), to);
        assert_eq!(taken.local_addr().unwrap(), original, "getsockname");
        assert_eq!(from.port(), app.local_addr().unwrap().port());
        let asked =
            if original.is_ipv4() { SockRef::from(&taken).original_dst_v4() } else { SockRef::from(&taken).original_dst_v6() };
        assert_eq!(asked.unwrap().as_socket().unwrap(), original, "SO_ORIGINAL_DST");
    }
    let counters = kernel.counters(world.a.cookie).unwrap().unwrap();
    assert_eq!((counters.of(Counter::Redirected), counters.of(Counter::OriginalFound)), (3, 3));
    assert_eq!(counters.of(Counter::OriginalMissing), 0);
}

#[test]
fn loopback_and_link_local_are_not_sent_to_the_sidecar() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let sidecar = world.a.listen(Who::Sidecar, "127.0.0.1", PORT_OUTBOUND);
    greet(world.a.listen(Who::App, "::", 7777));
    for to in ["127.0.0.1:7777", "[::1]:7777", "0.0.0.0:7777"] {
        assert!(world.a.greets(Who::App, to.parse::<SocketAddr>().unwrap()), "{to}");
    }
    let error = world.a.connect(Who::App, "[fe80::1]:7777".parse::<SocketAddr>().unwrap()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    nobody_at(&sidecar);
    assert_eq!(kernel.counters(world.a.cookie).unwrap().unwrap().of(Counter::LinkLocalRefused), 1);
}

#[test]
fn what_arrives_goes_to_the_sidecar_with_its_true_port() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let listener = world.b.enrol_with_listener(&mut kernel);
    let app = world.b.listen(Who::App, "::", 7777);
    for (to, own) in world.b.both(7777).into_iter().zip([IpAddr::from(world.a.v4), world.a.v6.into()]) {
        let client = world.a.connect(Who::App, to).unwrap();
        let (taken, from) = accept(&listener);
        let local = taken.local_addr().unwrap();
        assert_eq!((local.ip().to_canonical(), local.port()), (to.ip(), 7777));
        assert_eq!((from.ip().to_canonical(), from.port()), (own, client.local_addr().unwrap().port()));
    }
    nobody_at(&app);
}

#[test]
fn app_sees_the_client_that_its_own_sidecar_declared_and_nobody_else_may() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let _inbound = world.b.enrol_with_listener(&mut kernel);
    world.a.enrol(&mut kernel);
    let app = world.b.listen(Who::App, "::", 7777);
    let only_v4 = world.b.listen(Who::App, "0.0.0.0", 7778);
    let clients = ["192.0.2.9:9", "[2001:db8::9]:99"].map(|client| client.parse::<SocketAddr>().unwrap());
    for client in clients {
        for to in world.b.both(7777) {
            let _upstream = world.b.dial(to, Some(client)).unwrap();
            let (taken, from) = accept(&app);
            assert_eq!(SocketAddr::new(from.ip().to_canonical(), from.port()), client, "accept");
            assert_eq!(taken.peer_addr().unwrap(), from, "getpeername");
        }
    }
    let _upstream = world.b.dial((world.b.v4, 7778).into(), Some(clients[0])).unwrap();
    assert_eq!(accept(&only_v4).1, clients[0]);
    let refused = |side: &Side, who| {
        side.as_(who, || declare(&Socket::new(Domain::IPV4, Type::STREAM, None).unwrap(), clients[0])).unwrap_err().raw_os_error()
    };
    assert_eq!(refused(&world.b, Who::App), Some(libc::ENOPROTOOPT), "the pod's app");
    // The other pod's sidecar, in this pod's namespace.
    let intruder = world.b.with_cgroup(world.a.cgroup(Who::Sidecar), || {
        declare(&Socket::new(Domain::IPV4, Type::STREAM, None).unwrap(), clients[0]).unwrap_err().raw_os_error()
    });
    assert_eq!(intruder, Some(libc::ENOPROTOOPT), "another pod's sidecar");
}

#[test]
fn without_a_sidecar_nothing_gets_in_and_nothing_gets_out() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    greet(world.a.listen(Who::App, "::", 7777));
    greet(world.b.listen(Who::App, "::", 7777));
    assert!(world.a.greets(Who::App, world.b.both(7777)[0]), "before enrolment");
    world.b.enrol(&mut kernel);
    for to in world.b.both(7777) {
        assert_eq!(world.a.connect(Who::App, to).unwrap_err().kind(), io::ErrorKind::ConnectionRefused, "in, {to}");
    }
    for to in world.a.both(7777) {
        assert_eq!(world.b.connect(Who::App, to).unwrap_err().kind(), io::ErrorKind::ConnectionRefused, "out, {to}");
    }
    assert_eq!(kernel.counters(world.b.cookie).unwrap().unwrap().of(Counter::NoListener), 2);
    // A listener that dies takes its registration with it.
    let listener = world.b.enrol_with_listener(&mut kernel);
    let _steered = world.a.connect(Who::App, world.b.both(7777)[0]).unwrap();
    drop(listener);
    for to in world.b.both(7777) {
        // A child of another test, on its way to its program, may hold the listener a moment longer.
        within_a_second(|| world.a.connect(Who::App, to).err().map(|error| error.kind()), Some(io::ErrorKind::ConnectionRefused));
    }
}

#[test]
fn the_sidecars_own_ports_are_closed_to_the_outside_and_its_metrics_are_open() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let inbound = world.b.enrol_with_listener(&mut kernel);
    greet(world.b.listen(Who::Sidecar, "::", PORT_OUTBOUND));
    greet(world.b.listen(Who::Sidecar, "::", PORT_ADMIN));
    greet(world.b.listen(Who::Sidecar, "::", PORT_METRICS));
    for port in [PORT_OUTBOUND, PORT_INBOUND, PORT_ADMIN] {
        for to in world.b.both(port) {
            assert_eq!(world.a.connect(Who::App, to).unwrap_err().kind(), io::ErrorKind::ConnectionRefused, "{to}");
        }
    }
    for to in world.b.both(PORT_METRICS) {
        assert!(world.a.greets(Who::App, to), "{to}");
    }
    nobody_at(&inbound);
    let counters = kernel.counters(world.b.cookie).unwrap().unwrap();
    assert_eq!((counters.of(Counter::OwnPortRefused), counters.of(Counter::Excluded)), (6, 2));
}

#[test]
fn pod_that_calls_itself_goes_through_its_sidecar_once() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let inbound = world.b.enrol_with_listener(&mut kernel);
    let outbound = [world.b.listen(Who::Sidecar, "127.0.0.1", PORT_OUTBOUND), world.b.listen(Who::Sidecar, "::1", PORT_OUTBOUND)];
    let app = world.b.listen(Who::App, "::", 7777);
    for (to, outbound) in world.b.both(7777).into_iter().zip(&outbound) {
        let _caller = world.b.connect(Who::App, to).unwrap();
        let (taken, _) = accept(outbound);
        assert_eq!(taken.local_addr().unwrap(), to);
        // The sidecar goes on as to any other pod: it declares nobody, and comes in at its own front door.
        let _link = world.b.dial(to, None).unwrap();
        let (arrived, from) = accept(&inbound);
        assert_eq!((arrived.local_addr().unwrap().port(), from.ip().to_canonical()), (7777, to.ip()));
        nobody_at(&app);
        // There it declares the client, and that connection is the app's.
        let _served = world.b.dial(to, Some(from)).unwrap();
        assert_eq!(accept(&app).1, from);
        nobody_at(&inbound);
    }
    // A socket at the pod's address that connects to "any" ends at that address, seen by no sidecar.
    let refused = world.b.as_(Who::App, || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((world.b.v4, 0)).into()).unwrap();
        socket.connect_timeout(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, 7777)).into(), Duration::from_secs(5)).unwrap_err()
    });
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    nobody_at(&app);
    let counters = kernel.counters(world.b.cookie).unwrap().unwrap();
    assert_eq!((counters.of(Counter::SelfSteered), counters.of(Counter::ClientShown)), (2, 2));
    assert_eq!(counters.of(Counter::ForeignOwnDial), 1);
}

#[test]
fn a_pod_that_loses_one_of_its_addresses_is_served_at_the_other_and_closed_at_the_one() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let inbound = world.b.enrol_with_listener(&mut kernel);
    greet(inbound);
    let [v4, v6] = world.b.both(7777);
    assert!(world.a.greets(Who::Sidecar, v4) && world.a.greets(Who::Sidecar, v6));
    let netns = File::open(Path::new("/run/netns").join(&world.b.netns)).unwrap();
    let capture = CaptureConfig::default();
    let narrowed = PodEntry {
        cookie: world.b.cookie,
        v4: None,
        v6: Some(world.b.v6),
        sidecar_cgroup: world.b.cgroup(Who::Sidecar),
        netns: netns.as_fd(),
        capture: &capture,
        links: &[],
    };
    kernel.enrol(&narrowed).unwrap();
    assert!(!world.a.greets(Who::Sidecar, v4) && world.a.greets(Who::Sidecar, v6));
}

#[test]
fn what_listens_on_loopback_stays_unreachable() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let _inbound = world.b.enrol_with_listener(&mut kernel);
    let client = "192.0.2.9:9".parse().unwrap();
    for address in ["127.0.0.1", "::1"] {
        greet(world.b.listen(Who::App, address, 7785));
        for to in world.b.both(7785) {
            assert_eq!(world.b.dial(to, Some(client)).unwrap_err().kind(), io::ErrorKind::ConnectionRefused, "{to}");
        }
    }
}

#[test]
fn many_connections_at_once_keep_their_own_destinations() {
    const EACH: u16 = 250;
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let listeners = ["127.0.0.1", "::1"].map(|address| world.a.listen(Who::Sidecar, address, PORT_OUTBOUND));
    for listener in listeners {
        thread::spawn(move || {
            while let Ok((mut taken, _)) = listener.accept() {
                let port = taken.local_addr().map(|address| address.port()).unwrap_or_default();
                if taken.write_all(&port.to_be_bytes()).is_err() {}
            }
        });
    }
    thread::scope(|scope| {
        for thread in 0..4_u16 {
            let world = &world;
            scope.spawn(move || {
                world.a.as_(Who::App, || {
                    for turn in 0..EACH {
                        let port = 1000 + thread * EACH + turn;
                        let to = world.b.both(port)[usize::from(turn % 2)];
                        let mut stream = TcpStream::connect(to).unwrap();
                        let mut answer = [0; 2];
                        stream.read_exact(&mut answer).unwrap();
                        assert_eq!(u16::from_be_bytes(answer), port);
                        assert_eq!(stream.peer_addr().unwrap(), to);
                    }
                });
            });
        }
    });
    let counters = kernel.counters(world.a.cookie).unwrap().unwrap();
    assert_eq!(counters.of(Counter::OriginalMissing), 0);
    assert_eq!(own_dials(&world), 0);
}

#[test]
fn no_note_of_a_dial_stays_behind() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let _inbound = world.b.enrol_with_listener(&mut kernel);
    let client = "192.0.2.9:9".parse().unwrap();
    for _ in 0..50 {
        for to in world.b.both(7799) {
            assert_eq!(world.b.dial(to, Some(client)).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        }
    }
    assert_eq!(own_dials(&world), 0, "refused");
    let app = world.b.listen(Who::App, "::", 7777);
    for to in world.b.both(7777) {
        let upstream = world.b.dial(to, Some(client)).unwrap();
        let (taken, _) = accept(&app);
        drop((upstream, taken));
    }
    assert_eq!(own_dials(&world), 0, "served");
    // Nobody answers a dial whose app has a full backlog; its note goes with the socket.
    let full = world.b.as_(Who::App, || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, 7778)).into()).unwrap();
        socket.listen(0).unwrap();
        socket
    });
    let waiting: Vec<Socket> = world.b.as_(Who::Sidecar, || {
        let dial = || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            declare(&socket, client).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket.connect(&SocketAddr::from((world.b.v4, 7778)).into()).unwrap_err();
            socket
        };
        (0..4).map(|_| dial()).collect()
    });
    assert!(own_dials(&world) > 0, "waiting");
    drop(waiting);
    drop(full);
    // A dial that saw its handshake answered says goodbye first, and is closed when nobody answers that: some 200 ms later.
    for _ in 0..500 {
        if own_dials(&world) == 0 {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(own_dials(&world), 0, "given up");
}

#[test]
fn mptcp_goes_to_the_sidecar_as_well() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let sidecar = world.a.listen(Who::Sidecar, "127.0.0.1", PORT_OUTBOUND);
    let to = world.b.both(7777)[0];
    let dialled = world.a.as_(Who::App, || {
        let socket = match Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::ENOPROTOOPT)) => return None,
            made => made.unwrap(),
        };
        socket.connect(&to.into()).unwrap();
        Some(socket)
    });
    if dialled.is_some() {
        assert_eq!(accept(&sidecar).0.local_addr().unwrap(), to);
    }
}

#[test]
fn traffic_goes_on_while_the_agent_restarts_and_while_it_replaces_the_programs() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    assert!(!kernel.is_adopted());
    let listener = world.b.enrol_with_listener(&mut kernel);
    greet(listener);
    let enrolled = kernel.enrolled().unwrap();
    drop(kernel);
    assert!(world.a.greets(Who::App, world.b.both(7777)[0]), "no agent");
    let mut kernel = world.open();
    assert!(kernel.is_adopted());
    assert_eq!(kernel.enrolled().unwrap(), enrolled);
    world.b.enrol(&mut kernel);
    assert!(world.a.greets(Who::App, world.b.both(7777)[1]), "adopted");
    drop(kernel);
    // Other options are another build.
    let replaced = Kernel::open(&world.pins, &world.root, Options { log: true, ..Options::default() }).unwrap();
    assert!(!replaced.is_adopted());
    assert!(world.a.greets(Who::App, world.b.both(7777)[0]), "replaced");
    assert_eq!(replaced.counters(world.b.cookie).unwrap().unwrap().of(Counter::Steered), 3);
    let netns = File::open(Path::new("/run/netns").join(&world.b.netns)).unwrap();
    assert_eq!(links::ids(netns.as_fd(), programs::INBOUND.hook).unwrap().len(), 1);
}

#[test]
fn pins_of_another_layout_are_refused_with_the_way_out() {
    let Some(world) = World::new() else { return };
    drop(world.open());
    for other in [u64::from(proxy_common::LAYOUT) + 1, u64::from(proxy_common::LAYOUT_OLDEST) - 1] {
        maps::mark_build(&world.pins, other, 0).unwrap();
        let error = Kernel::open(&world.pins, &world.root, Options::default()).unwrap_err();
        assert!(matches!(error, KernelError::Layout { found, .. } if found == other), "{error}");
        assert!(error.remedy().contains("outrigger down"));
    }
}

#[test]
fn pod_whose_namespace_is_gone_is_forgotten() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let gone = format!("{}g", world.a.netns);
    ip(&["netns", "add", &gone]);
    let netns = File::open(Path::new("/run/netns").join(&gone)).unwrap();
    let capture = CaptureConfig { outbound_ports: [80].into(), ..CaptureConfig::default() };
    let entry = |netns| PodEntry {
        cookie: 4711,
        v4: Some(Ipv4Addr::new(10, 77, 0, 9)),
        v6: None,
        sidecar_cgroup: world.a.cgroup(Who::Sidecar),
        netns,
        capture: &capture,
        links: &[],
    };
    kernel.enrol(&entry(netns.as_fd())).unwrap();
    kernel.enrol(&entry(netns.as_fd())).unwrap();
    assert_eq!(kernel.forget_gone().unwrap(), Vec::<u64>::new());
    drop(netns);
    ip(&["netns", "del", &gone]);
    // The kernel takes a namespace down in its own time.
    let mut forgotten = Vec::new();
    for _ in 0..500 {
        forgotten = kernel.forget_gone().unwrap();
        if !forgotten.is_empty() {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(forgotten, [4711]);
    assert_eq!(kernel.enrolled().unwrap(), []);
    assert!(!world.pins.join("or_inbound_4711").exists());
}

#[test]
fn remove_all_leaves_no_pin_no_link_and_no_program() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let _listener = world.b.enrol_with_listener(&mut kernel);
    let ids: Vec<u32> =
        programs::all().map(|program| ProgramInfo::from_pin(world.pins.join(program_pin(program))).unwrap().id()).collect();
    drop(kernel);
    Kernel::remove_all(&world.pins).unwrap();
    Kernel::remove_all(&world.pins).unwrap();
    let stays = |name: &str| name.ends_with(".debug");
    let pins = fs::read_dir(&world.pins).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(pins.filter(|name| !stays(name)).collect::<Vec<_>>(), Vec::<String>::new());
    greet(world.b.listen(Who::App, "::", 7777));
    assert!(world.a.greets(Who::App, world.b.both(7777)[0]), "open again");
    let left = || aya::programs::loaded_programs().filter_map(Result::ok).filter(|info| ids.contains(&info.id())).count();
    for _ in 0..200 {
        if left() == 0 {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(left(), 0);
}

#[tokio::test]
async fn rare_events_reach_the_log_only_where_asked_for() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    assert!(kernel.log().unwrap().is_none());
    drop(kernel);
    let kernel = Kernel::open(&world.pins, &world.root, Options { log: true, ..Options::default() }).unwrap();
    let log = kernel.log().unwrap().unwrap();
    // It runs until it is dropped.
    assert!(tokio::time::timeout(Duration::from_millis(50), log).await.is_err());
}

#[test]
fn a_folder_on_another_file_system_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let error = Kernel::open(folder.path(), Path::new("/"), Options::default()).unwrap_err();
    assert!(matches!(error, KernelError::NotBpffs { .. }), "{error}");
}
