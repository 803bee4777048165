//! What does not fit: maps that are full, a kernel without memory, a pod without ports; and what a thousand pods cost that
//! come and go.

use std::process::Stdio;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, Map, MapData};
use proxy_common::counters::COUNTERS;
use proxy_common::exclusions::{EXCLUDED_CIDRS, EXCLUDED_PORTS, FAMILY_V4, Network, PortKey};
use proxy_common::originals::{ORIGINALS, ORIGINALS_MAX};
use proxy_common::owndials::{OWN_DIALS, OWN_DIALS_MAX};
use proxy_common::pods::{ADDRESSES, LINKS, LISTENERS, PODS};
use tokio::time::Instant;

use super::*;
use crate::model::capture;
use crate::node::maps::{CIDRS_ROOM, Exclusions, PODS_ROOM, PORTS_ROOM};

/// Enrols `side`, and says what came of it.
fn try_enrol(side: &Side, kernel: &mut Kernel) -> Result<(), KernelError> {
    side.try_enrol(kernel, &CaptureConfig::default(), &[]).map(drop)
}

/// The pins that are of pods.
fn pod_pins(world: &World) -> usize {
    let names = fs::read_dir(&world.pins).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("or_")).count()
}

#[test]
fn a_pod_too_many_is_refused_by_name_and_those_that_are_enrolled_stay_so() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let listener = world.b.enrol_with_listener(&mut kernel);
    let data = MapData::from_pin(world.pins.join(PODS)).unwrap();
    let mut pods: HashMap<_, u64, Pod> = Map::HashMap(data).try_into().unwrap();
    let other = Pod { sidecar_cgroup: 1, v4: Address::NONE, v6: Address::NONE, flags: 0, number: 0, links: ends(&[]) };
    for number in 1..u64::from(PODS_ROOM) {
        pods.insert(u64::MAX - number, other, 0).unwrap();
    }
    let error = try_enrol(&world.a, &mut kernel).unwrap_err();
    assert_eq!(error.to_string(), format!("the map PODS is full: a node has room for {PODS_ROOM} pods"));
    assert_eq!((error.reason(), error.remedy().contains("stop pods")), ("full", true));
    // Nothing of it stays, nor takes the place of another one.
    assert_eq!(pod_pins(&world), 3);
    assert!(kernel.counters(world.a.cookie).unwrap().is_none());
    // What changes about a pod that is enrolled finds room.
    let capture = CaptureConfig { outbound_ports: [80].into(), ..CaptureConfig::default() };
    world.b.enrol_as(&mut kernel, &capture);
    let _client = world.a.connect(Who::App, world.b.both(7777)[0]).unwrap();
    assert_eq!(accept(&listener).0.local_addr().unwrap().port(), 7777);
    pods.remove(&(u64::MAX - 1)).unwrap();
    try_enrol(&world.a, &mut kernel).unwrap();
}

/// A map of the programs, to be filled.
fn filled<K: aya::Pod, V: aya::Pod>(world: &World, map: &str, entries: impl Iterator<Item = (K, V)>) -> HashMap<MapData, K, V> {
    let mut map: HashMap<_, K, V> = Map::HashMap(MapData::from_pin(world.pins.join(map)).unwrap()).try_into().unwrap();
    entries.for_each(|(key, value)| map.insert(key, value, 0).unwrap());
    map
}

#[test]
fn a_pod_with_an_exclusion_too_many_is_refused_by_name_and_one_without_is_not() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let others = (1..PORTS_ROOM).map(|port| (PortKey { netns: u64::MAX, port, direction: 0 }, 1_u32));
    let _ports = filled(&world, EXCLUDED_PORTS, others);
    let two = CaptureConfig { outbound_ports: [80, 443].into(), ..CaptureConfig::default() };
    let error = world.b.try_enrol(&mut kernel, &two, &[]).unwrap_err();
    assert_eq!(error.to_string(), format!("the map EXCLUDED_PORTS is full: a node has room for {PORTS_ROOM} excluded ports"));
    assert_eq!((error.reason(), pod_pins(&world), kernel.enrolled().unwrap().len()), ("full", 0, 0));
    // What it had is free again: another one has room.
    let one = CaptureConfig { outbound_ports: [22].into(), ..CaptureConfig::default() };
    world.b.enrol_as(&mut kernel, &one);
    try_enrol(&world.a, &mut kernel).unwrap();
}

#[test]
fn a_thousand_pods_may_exclude_all_that_one_may_and_each_more_is_refused_by_name() {
    const MANY: u64 = 1_023;
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let most = u16::try_from(capture::MOST).unwrap();
    let all = |second: u8| CaptureConfig {
        outbound_ports: (1..=most).collect(),
        outbound_cidrs: (1..=most).map(|third| format!("10.{second}.{third}.0/24").parse().unwrap()).collect(),
        inbound_ports: (1..=most).collect(),
        enforce: false,
    };
    for number in 1..=MANY {
        let asked = Exclusions::new(1 << 40 | number, &all(1));
        kernel.maps.exclude(&asked, &Exclusions::default()).unwrap();
    }
    // The last one of them has its room, and so has what it changes its mind to.
    world.a.enrol_as(&mut kernel, &all(1));
    world.a.enrol_as(&mut kernel, &CaptureConfig::default());
    world.a.enrol_as(&mut kernel, &all(2));
    let error = world.b.try_enrol(&mut kernel, &all(1), &[]).unwrap_err();
    assert_eq!((error.reason(), error.to_string().contains("room for 131072 excluded ports")), ("full", true), "{error}");
    let networks = CaptureConfig { outbound_ports: [].into(), inbound_ports: [].into(), ..all(1) };
    let error = world.b.try_enrol(&mut kernel, &networks, &[]).unwrap_err();
    assert_eq!((error.reason(), error.to_string().contains("room for 65536 excluded networks")), ("full", true), "{error}");
    // Who excludes nothing has room.
    try_enrol(&world.b, &mut kernel).unwrap();
}

#[test]
fn after_a_re_enrolment_that_found_no_room_the_former_exclusions_are_in_force_and_no_others() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    greet(world.b.listen(Who::App, "::", 7777));
    greet(world.b.listen(Who::App, "::", 7778));
    let capture = |ports: &[u16], networks: &[&str]| CaptureConfig {
        outbound_ports: ports.iter().copied().collect(),
        outbound_cidrs: networks.iter().map(|network| network.parse().unwrap()).collect(),
        ..CaptureConfig::default()
    };
    let to = |port| SocketAddr::from((world.b.v4, port));
    let passing = |port| world.a.greets(Who::App, to(port));
    world.a.enrol_as(&mut kernel, &capture(&[7777], &["192.0.2.0/24"]));
    // Of ports there is room for one more, of networks for none.
    let others = (2..PORTS_ROOM).map(|port| (PortKey { netns: u64::MAX, port, direction: 0 }, 1_u32));
    let ports = filled(&world, EXCLUDED_PORTS, others);
    let networks = MapData::from_pin(world.pins.join(EXCLUDED_CIDRS)).unwrap();
    let mut networks: LpmTrie<_, Network, u32> = Map::LpmTrie(networks).try_into().unwrap();
    for number in 1..CIDRS_ROOM {
        let other = Network::new(u64::MAX, Address([0, 0, 0, number]));
        networks.insert(&Key::new(Network::BITS, other), FAMILY_V4, 0).unwrap();
    }
    for asked in [capture(&[7778, 7779], &[]), capture(&[7778], &["10.77.0.0/24"]), capture(&[], &["10.77.0.0/24"])] {
        let error = world.a.try_enrol(&mut kernel, &asked, &[]).unwrap_err();
        assert_eq!(error.reason(), "full", "{error}");
        assert_eq!((passing(7777), passing(7778)), (true, false), "{asked:?}");
        let left = [
            ports.keys().filter(|key| key.as_ref().unwrap().netns == world.a.cookie).count(),
            networks.keys().filter(|key| key.as_ref().unwrap().data().pod() == world.a.cookie).count(),
        ];
        assert_eq!(left, [1, 1], "{asked:?}");
    }
    // What stays finds room.
    world.a.enrol_as(&mut kernel, &capture(&[7777], &["192.0.2.0/24"]));
    // Where another one goes, too.
    world.a.enrol_as(&mut kernel, &capture(&[7778], &[]));
    assert_eq!((passing(7777), passing(7778)), (false, true));
}

#[test]
fn a_sidecars_dial_that_cannot_be_noted_does_not_reach_its_app_and_is_counted() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let _inbound = world.b.enrol_with_listener(&mut kernel);
    let app = world.b.listen(Who::App, "::", 7777);
    let client = "192.0.2.9:9".parse().unwrap();
    let key = |number| [number, 0, 0, 0, 0, 0_u32];
    let others = (0..u32::try_from(OWN_DIALS_MAX).unwrap()).map(|number| (key(number), [u64::MAX, 0, 0, 0]));
    let mut dials = filled(&world, OWN_DIALS, others);
    for to in world.b.both(7777) {
        assert_eq!(world.b.dial(to, Some(client)).unwrap_err().kind(), io::ErrorKind::ConnectionRefused, "{to}");
    }
    nobody_at(&app);
    let counters = kernel.counters(world.b.cookie).unwrap().unwrap();
    assert_eq!((counters.of(Counter::OwnDialNotNoted), counters.of(Counter::ForeignOwnDial)), (2, 2));
    dials.remove(&key(0)).unwrap();
    let _dialled = world.b.dial(world.b.both(7777)[0], Some(client)).unwrap();
    let (_, from) = accept(&app);
    assert_eq!(SocketAddr::new(from.ip().to_canonical(), from.port()), client);
}

#[test]
fn a_connection_whose_note_was_pushed_out_is_told_no_destination_rather_than_another_ones() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    // With room for one that waits: the next one's first segment is dropped, and sent again after a second.
    let sidecar = world.a.as_(Who::Sidecar, || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], PORT_OUTBOUND)).into()).unwrap();
        socket.listen(0).unwrap();
        TcpListener::from(socket)
    });
    let to = world.b.both(7777)[0];
    let first = world.a.connect(Who::App, to).unwrap();
    let missing = || kernel.counters(world.a.cookie).unwrap().unwrap().of(Counter::OriginalMissing);
    thread::scope(|scope| {
        let late = scope.spawn(|| world.a.connect(Who::App, to));
        let data = MapData::from_pin(world.pins.join(ORIGINALS)).unwrap();
        let mut notes: HashMap<_, [u32; 8], [u32; 5]> = Map::LruHashMap(data).try_into().unwrap();
        while notes.keys().next().is_none() {
            thread::sleep(Duration::from_millis(1));
        }
        // What a processor noted last waits in a list of its own: nothing that others note pushes it out.
        for processor in 0..thread::available_parallelism().unwrap().get() {
            let mut only = rustix::thread::CpuSet::new();
            only.set(processor);
            rustix::thread::sched_setaffinity(None, &only).unwrap();
            for number in 0..2 * u32::try_from(ORIGINALS_MAX).unwrap() {
                notes.insert([u32::MAX, number, 0, 0, 0, 0, 0, 0], [0; 5], 0).unwrap();
            }
        }
        assert_eq!((accept(&sidecar).0.local_addr().unwrap(), missing()), (to, 0));
        // The sidecar refuses whoever asks for its own port.
        assert_eq!(accept(&sidecar).0.local_addr().unwrap(), SocketAddr::from(([127, 0, 0, 1], PORT_OUTBOUND)));
        late.join().unwrap().unwrap();
    });
    assert_eq!(missing(), 1);
    drop(first);
}

#[test]
fn a_connection_for_which_no_port_is_left_fails_and_does_not_get_out() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let sidecar = world.a.listen(Who::Sidecar, "127.0.0.1", PORT_OUTBOUND);
    let outside = world.b.listen(Who::App, "::", 7777);
    let few = "41000 41009";
    world.a.as_(Who::App, || fs::write("/proc/sys/net/ipv4/ip_local_port_range", few).unwrap());
    let to = world.b.both(7777)[0];
    let held: Vec<TcpStream> = (0..10).map(|_| world.a.connect(Who::App, to).unwrap()).collect();
    for _ in 0..3 {
        assert_eq!(world.a.connect(Who::App, to).unwrap_err().raw_os_error(), Some(libc::EADDRNOTAVAIL));
    }
    assert_eq!(kernel.counters(world.a.cookie).unwrap().unwrap().of(Counter::NoPort), 3);
    for _ in &held {
        assert_eq!(accept(&sidecar).0.local_addr().unwrap(), to);
    }
    nobody_at(&outside);
    // One that ends makes room for another.
    drop(held);
    world.a.as_(Who::App, || fs::write("/proc/sys/net/ipv4/ip_local_port_range", "41000 41019").unwrap());
    let _again = world.a.connect(Who::App, to).unwrap();
    // What began is no such connection when it ends.
    assert_eq!(kernel.counters(world.a.cookie).unwrap().unwrap().of(Counter::NoPort), 3);
}

#[test]
fn pods_that_come_and_go_cost_the_same_each_and_leave_nothing() {
    const PODS: usize = 200;
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let listener = world.b.listen(Who::Sidecar, "::", PORT_INBOUND);
    let capture = CaptureConfig { outbound_ports: [80, 443].into(), inbound_ports: [22].into(), ..CaptureConfig::default() };
    let took: Vec<Duration> = (0..PODS)
        .map(|_| {
            let begun = Instant::now();
            world.b.enrol_as(&mut kernel, &capture);
            kernel.register_listener(world.b.cookie, listener.as_fd()).unwrap();
            kernel.withdraw(world.b.cookie).unwrap();
            begun.elapsed()
        })
        .collect();
    assert_eq!(kernel.enrolled().unwrap(), []);
    assert_eq!(pod_pins(&world), 0);
    let netns = File::open(Path::new("/run/netns").join(&world.b.netns)).unwrap();
    assert_eq!(links::ids(netns.as_fd(), programs::INBOUND.hook).unwrap().len(), 0);
    // The least of many: what else the machine does adds to some, and a cost that grows to all.
    let (first, last) = took.split_at(PODS / 2);
    let (first, last) = (first.iter().min().unwrap(), last.iter().min().unwrap());
    assert!(*last < *first * 3, "{first:?} each at first, {last:?} in the end");
}

#[test]
fn what_a_killed_agent_left_of_half_a_pod_goes_with_the_next_one() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let listener = world.b.enrol_with_listener(&mut kernel);
    // Its link and an address, and not yet its entry.
    let netns = File::open(Path::new("/run/netns").join(&world.a.netns)).unwrap();
    let target = Target::Netns(netns.metadata().unwrap().ino());
    let pin = kernel.pod_pin(programs::INBOUND, world.a.cookie);
    kernel.link(programs::INBOUND, &pin, Place::Open(netns.as_fd()), target).unwrap();
    let data = MapData::from_pin(world.pins.join(ADDRESSES)).unwrap();
    let mut addresses: HashMap<_, Address, u64> = Map::HashMap(data).try_into().unwrap();
    addresses.insert(Address::from(IpAddr::from(world.a.v4)), world.a.cookie, 0).unwrap();
    drop(kernel);
    let mut kernel = world.open();
    assert_eq!((pod_pins(&world), addresses.keys().count()), (3, 2));
    assert_eq!(links::ids(netns.as_fd(), programs::INBOUND.hook).unwrap().len(), 0);
    // The whole pod beside it was not touched, and the half one can be enrolled.
    let _client = world.a.connect(Who::App, world.b.both(7777)[0]).unwrap();
    assert_eq!(accept(&listener).0.local_addr().unwrap().port(), 7777);
    try_enrol(&world.a, &mut kernel).unwrap();
}

#[test]
fn pins_without_a_bpffs_are_refused_by_name_and_nothing_is_attached() {
    if !may_load() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let pins = folder.path().join("bpf");
    // The capability is the calling thread's own.
    let mount = || {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(rustix::thread::CapabilitySet::SYS_ADMIN);
        rustix::thread::set_capabilities(None, sets).unwrap();
        mount_bpffs(&pins).unwrap_err()
    };
    let error = thread::scope(|scope| scope.spawn(mount).join().unwrap());
    assert!(matches!(error, KernelError::Mount { .. }), "{error}");
    assert!(error.to_string().contains(&format!("mounts no bpf filesystem at {}", pins.display())), "{error}");
    assert!(error.remedy().contains("CAP_SYS_ADMIN"), "{}", error.remedy());
    let error = Kernel::open(&pins, &find_cgroup2().unwrap(), Options::default()).unwrap_err();
    assert!(matches!(error, KernelError::NotBpffs { .. }), "{error}");
    assert_eq!(fs::read_dir(&pins).unwrap().count(), 0);
    // A file where the folder should be.
    fs::remove_dir(&pins).unwrap();
    fs::write(&pins, "").unwrap();
    let error = mount_bpffs(&pins).unwrap_err();
    assert!(matches!(error, KernelError::File { .. }), "{error}");
}

/// What the kernel says that the maps of pods take.
fn taken(world: &World) -> usize {
    let bytes = |map: &str| -> usize {
        let data = MapData::from_pin(maps::pin(&world.pins, map)).unwrap();
        let said = fs::read_to_string(format!("/proc/self/fdinfo/{}", data.fd().as_fd().as_raw_fd())).unwrap();
        let line = said.lines().find_map(|line| line.strip_prefix("memlock:")).unwrap();
        line.trim().parse().unwrap()
    };
    [PODS, ADDRESSES, LISTENERS, LINKS, COUNTERS].map(bytes).iter().sum()
}

#[test]
fn ten_thousand_pods_have_room_and_take_memory_as_they_come() {
    const MANY: u32 = 10_000;
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let listener = world.b.listen(Who::Sidecar, "::", PORT_INBOUND);
    // The least of some: what else the machine does adds to the others.
    let cycle = |kernel: &mut Kernel| {
        let took = (0..21).map(|_| {
            let begun = Instant::now();
            world.b.enrol(kernel);
            kernel.register_listener(world.b.cookie, listener.as_fd()).unwrap();
            kernel.withdraw(world.b.cookie).unwrap();
            begun.elapsed()
        });
        took.min().unwrap()
    };
    let alone = cycle(&mut kernel);
    let empty = taken(&world);
    for number in 1..=MANY {
        let (v4, v6) = (Ipv4Addr::from(0x0a80_0000 + number), Ipv6Addr::from(0xfd78_u128 << 112 | u128::from(number)));
        let addresses = [IpAddr::from(v4), IpAddr::from(v6)].map(Address::from);
        let pod = Pod { sidecar_cgroup: 1, v4: addresses[0], v6: addresses[1], flags: 0, number: 0, links: ends(&[10 * number]) };
        kernel.maps.put_pod(1 << 40 | u64::from(number), pod).unwrap();
    }
    let (full, among) = (taken(&world), cycle(&mut kernel));
    assert_eq!(kernel.enrolled().unwrap().len(), 10_000);
    let each = (full - empty) / 10_000;
    let told = format!("{alone:?} alone and {among:?} among 10,000; the maps {empty} bytes and {each} a pod");
    // Past the harness, which keeps what a test that succeeds prints to itself.
    io::stdout().write_all(format!("\nan enrolment and withdrawal takes {told}\n").as_bytes()).unwrap();
    let cpus = aya::util::nr_cpus().unwrap();
    // Before Linux 6.4 the kernel tells how much room a map has, full or empty.
    let counts_use = full > empty;
    assert!(!counts_use || empty < 4 << 20 && each < 512 + 256 * cpus, "{empty} bytes, {each} a pod");
    // What grows with the pods would be a thousand times as slow.
    assert!(among < alone * 10, "{alone:?} alone, {among:?} among 10,000");
}

/// Its own process: a thread has no memory limit of its own.
#[test]
#[ignore = "run by the test below, in a cgroup of little memory"]
fn opened_without_memory() {
    let Some(limited) = std::env::var_os(LIMITED) else { return };
    let Some(world) = World::new() else { return };
    // What this process itself needs it has by now, at the account of another cgroup.
    drop(world.open());
    Kernel::remove_all(&world.pins).unwrap();
    fs::write(Path::new(&limited).join("cgroup.procs"), "0").unwrap();
    let opened = Kernel::open(&world.pins, &world.root, Options::default());
    fs::write(Path::new(&limited).parent().unwrap().join("cgroup.procs"), "0").unwrap();
    let error = opened.unwrap_err();
    assert!(matches!(error, KernelError::NoMemory { .. }), "{error}");
    assert!(error.to_string().contains("has no memory for the map"), "{error}");
    assert!(error.remedy().contains("more memory"));
    assert_eq!(links_left(&world), 0, "something is attached");
    // With memory again, it comes up over what is left of the first attempt.
    drop(world.open());
}

fn links_left(world: &World) -> usize {
    programs::NODE.into_iter().filter(|program| world.pins.join(link_pin(*program)).exists()).count()
}

#[test]
fn a_kernel_without_memory_for_the_maps_is_told_of_by_name() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let (root, file) = [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")]
        .into_iter()
        .find(|(root, _)| Path::new(root).join("memory.stat").exists())
        .unwrap_or_default();
    let limited = Path::new(root).join(sweep::name());
    if root.is_empty() || fs::create_dir(&limited).is_err() || fs::write(limited.join(file), MEMORY).is_err() {
        io::stdout().write_all(b"\nleft out: a kernel without memory, no cgroup limits it here\n").unwrap();
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "--ignored", "--nocapture", "node::kernel::tests::limits::opened_without_memory"]);
    // It gives nothing back of what it had.
    child.envs([("MALLOC_TRIM_THRESHOLD_", "1000000000"), ("MALLOC_MMAP_THRESHOLD_", "1000000000"), ("MALLOC_ARENA_MAX", "1")]);
    let output = child.env(LIMITED, &limited).stdin(Stdio::null()).output().unwrap();
    fs::remove_dir(&limited).unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

const LIMITED: &str = "OUTRIGGER_TEST_LIMITED";
/// Less than the maps take, more than the process does that makes them.
const MEMORY: &str = "4000000";
