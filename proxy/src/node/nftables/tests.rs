//! Rulesets on the running kernel, with real sockets in two network namespaces.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::time::Duration;

use proxy_common::counters::Counter;
use proxy_common::{PORT_INBOUND, PORT_METRICS, PORT_OUTBOUND};
use socket2::{Domain, Socket, Type};

use super::*;
use crate::base::sockopt::declare_own_dial;
use crate::node::kernel::tests::{Side, Who, World};

/// `None` where this machine cannot.
fn world() -> Option<(World, Nftables)> {
    let world = World::new()?;
    match Nftables::open(&world.root) {
        Ok(nftables) => Some((world, nftables)),
        Err(NftablesError::Missing) => {
            io::stdout().write_all(b"\nleft out: the rulesets' tests, they need nft\n").unwrap();
            None
        }
        Err(error) => panic!("{}", crate::node::chain(&error)),
    }
}

fn lay(side: &Side, nftables: &Nftables, capture: &CaptureConfig) {
    let netns = File::open(netns_of(side)).unwrap();
    let entry = PodEntry {
        cookie: side.cookie,
        v4: Some(side.v4),
        v6: Some(side.v6),
        sidecar_cgroup: side.cgroup(Who::Sidecar),
        netns: netns.as_fd(),
        capture,
        links: &[],
    };
    nftables.enrol(&entry).unwrap();
}

fn netns_of(side: &Side) -> PathBuf {
    Path::new("/run/netns").join(&side.netns)
}

/// The sidecar's listeners: inbound, and outbound of both families.
fn listeners(side: &Side, nftables: &Nftables) -> [TcpListener; 3] {
    let inbound = side.listen(Who::Sidecar, "::", PORT_INBOUND);
    nftables.register_listener(inbound.as_fd()).unwrap();
    [inbound, side.listen(Who::Sidecar, "127.0.0.1", PORT_OUTBOUND), side.listen(Who::Sidecar, "::1", PORT_OUTBOUND)]
}

fn addresses(side: &Side) -> [IpAddr; 2] {
    [side.v4.into(), side.v6.into()]
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn original(stream: &TcpStream) -> SocketAddr {
    let socket = SockRef::from(stream);
    let told = if stream.local_addr().unwrap().is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    told.unwrap().as_socket().unwrap()
}

#[test]
fn what_an_app_dials_reaches_its_sidecar_which_knows_where_it_was_to_go() {
    let Some((world, nftables)) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    lay(a, &nftables, &CaptureConfig::default());
    let [_inbound, v4, v6] = listeners(a, &nftables);
    for (ip, listener) in addresses(b).into_iter().chain([IpAddr::from(b.v4.to_ipv6_mapped())]).zip([&v4, &v6, &v4]) {
        let asked = SocketAddr::new(ip, 9999);
        let app = a.connect(Who::App, asked).unwrap();
        let (accepted, _from) = listener.accept().unwrap();
        assert_eq!(original(&accepted), canonical(asked));
        assert_eq!(app.peer_addr().unwrap(), asked);
    }
    // The pod's own address is no exception, loopback is one.
    let own = SocketAddr::new(a.v4.into(), 8080);
    let _app = a.connect(Who::App, own).unwrap();
    assert_eq!(original(&v4.accept().unwrap().0), own);
    assert!(a.connect(Who::App, (Ipv4Addr::LOCALHOST, 8080)).is_err());
    assert!(a.connect(Who::App, (Ipv6Addr::LOCALHOST, 8080)).is_err());
    assert_eq!(nftables.attest(a.cookie, &netns_of(a)).unwrap(), None);
    assert_eq!(nftables.counters(a.cookie, &netns_of(a)).unwrap().of(Counter::Redirected), 4);
}

#[test]
fn a_sidecar_reaches_others_and_its_own_app_where_it_says_so() {
    let Some((world, nftables)) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    lay(a, &nftables, &CaptureConfig::default());
    let [inbound, ..] = listeners(a, &nftables);
    let theirs = b.listen(Who::App, "::", 8080);
    let own = a.listen(Who::App, "::", 8080);
    for ip in addresses(b) {
        let _dialled = a.connect(Who::Sidecar, (ip, 8080)).unwrap();
        theirs.accept().unwrap();
    }
    for ip in addresses(a) {
        let to = SocketAddr::new(ip, 8080);
        let _declared = a.as_(Who::Sidecar, || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
            declare_own_dial(&socket).unwrap();
            socket.connect_timeout(&to.into(), Duration::from_secs(5)).unwrap();
            socket
        });
        own.accept().unwrap();
        // Undeclared, the pod calls itself: that comes in as every call.
        let _undeclared = a.connect(Who::Sidecar, to).unwrap();
        assert_eq!(canonical(inbound.accept().unwrap().0.local_addr().unwrap()), to);
    }
}

#[test]
fn what_arrives_goes_to_the_sidecar_with_its_true_addresses_or_nowhere() {
    let Some((world, nftables)) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    lay(a, &nftables, &CaptureConfig::default());
    let _app = a.listen(Who::App, "::", 8080);
    // Before there is a sidecar, and after it.
    let closed = || {
        for ip in addresses(a) {
            let refused = b.connect(Who::App, (ip, 8080)).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        }
    };
    closed();
    let held = listeners(a, &nftables);
    for ip in addresses(a) {
        for port in [8080, 9999] {
            let mut caller = b.connect(Who::App, (ip, port)).unwrap();
            let (mut accepted, from) = held[0].accept().unwrap();
            assert_eq!(canonical(accepted.local_addr().unwrap()), SocketAddr::new(ip, port));
            assert_eq!(canonical(from), caller.local_addr().unwrap());
            // More than one segment each way.
            let bytes = vec![7; 100_000];
            caller.write_all(&bytes).unwrap();
            caller.shutdown(std::net::Shutdown::Write).unwrap();
            let mut read = Vec::new();
            accepted.read_to_end(&mut read).unwrap();
            assert!(read == bytes);
        }
        for own in [PORT_OUTBOUND, PORT_INBOUND] {
            assert!(b.connect(Who::App, (ip, own)).is_err());
        }
    }
    let metrics = a.listen(Who::Sidecar, "::", PORT_METRICS);
    let _scraper = b.connect(Who::App, (a.v4, PORT_METRICS)).unwrap();
    metrics.accept().unwrap();
    drop(held);
    closed();
}

#[test]
fn exclusions_pass_and_nothing_else_does() {
    let Some((world, nftables)) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    let capture = CaptureConfig {
        outbound_ports: [3306].into(),
        outbound_cidrs: [IpAddr::from(b.v6).into(), "fd77::/120".parse().unwrap()].into(),
        inbound_ports: [9100].into(),
        enforce: false,
    };
    lay(a, &nftables, &capture);
    let database = b.listen(Who::App, "::", 3306);
    let _passes = a.connect(Who::App, (b.v4, 3306)).unwrap();
    let _passes = a.connect(Who::App, (b.v6, 3306)).unwrap();
    database.accept().unwrap();
    assert!(a.connect(Who::App, (b.v4, 3307)).is_err());
    let scraped = a.listen(Who::App, "::", 9100);
    let _passes = b.connect(Who::App, (a.v4, 9100)).unwrap();
    scraped.accept().unwrap();
    nftables.attest(a.cookie, &netns_of(a)).unwrap();
    let counters = nftables.counters(a.cookie, &netns_of(a)).unwrap();
    assert_eq!(counters.of(Counter::ExcludedOutboundPort), 2);
    assert_eq!(counters.of(Counter::ExcludedInboundPort), 1);
}

#[test]
fn a_ruleset_that_somebody_changes_is_told_and_put_back() {
    let Some((world, nftables)) = world() else { return };
    let a = &world.a;
    lay(a, &nftables, &CaptureConfig::default());
    assert_eq!(nftables.attest(a.cookie, &netns_of(a)).unwrap(), None);
    for attack in ["flush ruleset\n", "flush chain inet outrigger outbound\n", "delete table inet outrigger\n"] {
        nftables.nft.load(File::open(netns_of(a)).unwrap(), attack).unwrap();
        let told = nftables.attest(a.cookie, &netns_of(a)).unwrap().expect(attack);
        assert!(told.contains("put back"), "{told}");
        assert_eq!(nftables.attest(a.cookie, &netns_of(a)).unwrap(), None);
    }
    // It holds again.
    assert!(a.connect(Who::App, (world.b.v4, 9999)).is_err());
    assert!(nftables.counters(a.cookie, &netns_of(a)).unwrap().of(Counter::Redirected) <= 1);
}

#[test]
fn a_pod_that_enforces_is_refused() {
    let Some((world, nftables)) = world() else { return };
    let netns = File::open(netns_of(&world.a)).unwrap();
    let capture = CaptureConfig { enforce: true, ..CaptureConfig::default() };
    let entry = PodEntry {
        cookie: world.a.cookie,
        v4: Some(world.a.v4),
        v6: None,
        sidecar_cgroup: world.a.cgroup(Who::Sidecar),
        netns: netns.as_fd(),
        capture: &capture,
        links: &[],
    };
    assert!(matches!(nftables.enrol(&entry), Err(NftablesError::CannotEnforce)));
}

#[test]
fn a_cgroup_is_named_from_where_nft_looks_for_it() {
    assert_eq!(
        below_cgroups(Path::new("/sys/fs/cgroup/unified/outrigger/pods/a.b/sidecar")).unwrap(),
        "unified/outrigger/pods/a.b/sidecar"
    );
    assert_eq!(below_cgroups(Path::new("/sys/fs/cgroup")).unwrap(), ".");
    let elsewhere = below_cgroups(Path::new("/mnt/cgroup2/x")).unwrap();
    assert_eq!(elsewhere, "../../../mnt/cgroup2/x");
    assert!(below_cgroups(Path::new("/sys/fs/cgroup/a\"b")).is_err());
}

#[test]
fn what_a_former_agent_laid_is_taken_over_without_a_record_and_put_back_without_exceptions() {
    let Some((world, former)) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    lay(a, &former, &CaptureConfig { outbound_ports: [9999].into(), ..CaptureConfig::default() });
    let next = Nftables::open(&world.root).unwrap();
    let open = |side: &Side| File::open(netns_of(side)).unwrap();
    assert!(!next.adopt(b.cookie, &open(b), b.cgroup(Who::Sidecar)).unwrap(), "nothing was laid there");
    assert!(next.adopt(a.cookie, &open(a), a.cgroup(Who::Sidecar)).unwrap());
    // What stands is left as it is.
    assert_eq!(next.attest(a.cookie, &netns_of(a)).unwrap(), None);
    let theirs = b.listen(Who::App, "::", 9999);
    let _excluded = a.connect(Who::App, (IpAddr::from(b.v4), 9999)).unwrap();
    theirs.accept().unwrap();
    next.nft.load(open(a), "flush ruleset\n").unwrap();
    let told = next.attest(a.cookie, &netns_of(a)).unwrap().unwrap();
    assert!(told.contains("put back"), "{told}");
    assert_eq!(next.attest(a.cookie, &netns_of(a)).unwrap(), None);
    assert!(a.connect(Who::App, (IpAddr::from(b.v4), 9999)).is_err(), "no sidecar listens, and nothing passes it by");
}

#[test]
fn what_is_for_loopback_and_would_leave_by_a_device_is_counted_and_dropped() {
    let Some((world, nftables)) = world() else { return };
    lay(&world.a, &nftables, &CaptureConfig::default());
    let _sidecar = listeners(&world.a, &nftables);
    let app = world.a.listen(Who::App, "::", 7777);
    for to in ["127.0.0.1:7777", "[::1]:7777"].map(|to| to.parse::<SocketAddr>().unwrap()) {
        let dialled = world.a.as_(Who::App, || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
            socket.bind_device(Some(b"eth0")).unwrap();
            // Before its first segment is sent again.
            socket.connect_timeout(&to.into(), Duration::from_millis(500))
        });
        assert!(dialled.is_err(), "{to}");
        // What stays on loopback passes.
        drop(world.a.connect(Who::App, to).unwrap());
    }
    drop(app);
    // There is no way to ::1 by a device: that one ended before it began.
    let counted = nftables.counters(world.a.cookie, &netns_of(&world.a)).unwrap();
    assert_eq!([Counter::UncapturedSocket, Counter::BypassDropped].map(|counter| counted.of(counter)), [1, 1]);
}
