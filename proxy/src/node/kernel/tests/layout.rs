//! Pins of layout 3, made by its own object, taken over while connections go all the way through two pods.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use aya::EbpfLoader;
use aya::maps::{HashMap, Map, MapData, MapInfo, PerCpuHashMap, PerCpuValues, SockHash};
use proxy_common::counters::COUNTERS;
use proxy_common::originals::ORIGINALS;
use proxy_common::owndials::OWN_DIALS;
use proxy_common::pods::{ADDRESSES, LISTENERS, PODS};
use proxy_common::sockets::SOCKETS;
use tokio::time::Instant;

use super::*;

/// The object that was committed while pins were of layout 3.
const OBJECT_3: &[u8] = aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/layout-3.bpf.o"));

fn map<T: TryFrom<Map>>(world: &World, name: &str, kind: impl FnOnce(MapData) -> Map) -> T {
    T::try_from(kind(MapData::from_pin(world.pins.join(name)).unwrap())).ok().unwrap()
}

/// Everything that an agent of layout 3 leaves.
fn open_3(world: &World) {
    PerCpuHashMap::<MapData, u64, [u64; 25]>::create(1024, 1).unwrap().pin(world.pins.join(COUNTERS)).unwrap();
    let mut loader = EbpfLoader::new();
    loader.override_global("AYA_LOG_LEVEL", &0_u8, true);
    for map in maps::PINNED {
        loader.map_pin_path(map, world.pins.join(map));
    }
    let mut ebpf = loader.load(OBJECT_3).unwrap();
    let root = File::open(&world.root).unwrap();
    for program in programs::all().filter(|program| program.name != "or_release") {
        let loaded = programs::load_one(&mut ebpf, program).unwrap();
        links::pin(loaded.as_fd(), &world.pins.join(program_pin(program))).unwrap();
        if programs::NODE.iter().any(|node| node.name == program.name) {
            let link = links::create(loaded.as_fd(), Place::Open(root.as_fd()), program.hook).unwrap();
            links::pin(link.as_fd(), &world.pins.join(link_pin(program))).unwrap();
        }
    }
    maps::mark_build(&world.pins, 3, 77).unwrap();
}

/// Enrols a pod as that agent does.
fn enrol_3(world: &World, side: &Side, listener: &TcpListener) {
    let (netns, cgroup) =
        (File::open(Path::new("/run/netns").join(&side.netns)).unwrap(), File::open(side.cgroup(Who::Sidecar)).unwrap());
    for program in pod_programs() {
        let place = if program.name == programs::INBOUND.name { netns.as_fd() } else { cgroup.as_fd() };
        let loaded = links::open(&world.pins.join(program_pin(program))).unwrap().unwrap();
        let link = links::create(loaded.as_fd(), Place::Open(place), program.hook).unwrap();
        links::pin(link.as_fd(), &world.pins.join(format!("{}_{}", program.name, side.cookie))).unwrap();
    }
    let [v4, v6] = [IpAddr::from(side.v4), side.v6.into()].map(Address::from);
    let pod = Pod { sidecar_cgroup: cgroup.metadata().unwrap().ino(), v4, v6, flags: 0, number: 0, links: ends(&[]) };
    let zeros = PerCpuValues::try_from(vec![[0; 25]; aya::util::nr_cpus().unwrap()]).unwrap();
    map::<PerCpuHashMap<_, u64, [u64; 25]>>(world, COUNTERS, Map::PerCpuHashMap).insert(side.cookie, zeros, 0).unwrap();
    for address in [v4, v6] {
        map::<HashMap<_, Address, u64>>(world, ADDRESSES, Map::HashMap).insert(address, side.cookie, 0).unwrap();
        map::<SockHash<_, Address>>(world, LISTENERS, Map::SockHash).insert(address, listener.as_raw_fd(), 0).unwrap();
    }
    map::<HashMap<_, u64, Pod>>(world, PODS, Map::HashMap).insert(side.cookie, pod, 0).unwrap();
}

/// Two sidecars and an app, each as simple as can be: what the app in `a` sends to `b` goes through both sidecars to the app in `b`,
/// which answers with who it believes to have called.
struct Mesh<'a> {
    world: &'a World,
    outbound: TcpListener,
    inbound: TcpListener,
    app: TcpListener,
    hung_up: AtomicBool,
    ended: AtomicBool,
    answered: AtomicU64,
}

impl<'a> Mesh<'a> {
    fn new(world: &'a World) -> Self {
        let outbound = world.a.listen(Who::Sidecar, "127.0.0.1", PORT_OUTBOUND);
        let inbound = world.b.listen(Who::Sidecar, "::", PORT_INBOUND);
        let app = world.b.listen(Who::App, "0.0.0.0", 7777);
        let (hung_up, ended) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { world, outbound, inbound, app, hung_up, ended, answered: AtomicU64::new(0) }
    }

    /// Answers whoever comes until the end.
    fn serve(&self, listener: &TcpListener, answer: impl Fn(&TcpStream, SocketAddr) -> io::Result<String>) {
        SockRef::from(listener).set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        while !self.ended.load(Ordering::Relaxed) {
            let Ok((mut stream, from)) = listener.accept() else { continue };
            let said = answer(&stream, from).unwrap_or_else(|error| error.to_string());
            if stream.write_all(said.as_bytes()).is_err() {}
        }
    }

    /// Calls again and again until the end; every call must be answered rightly.
    fn call(&self) {
        let to = SocketAddr::from((self.world.b.v4, 7777));
        let expected = format!("{} 7777", self.world.a.v4);
        while !self.hung_up.load(Ordering::Relaxed) {
            let mut stream = TcpStream::connect(to).unwrap();
            assert_eq!(stream.peer_addr().unwrap(), to);
            assert_eq!(whole(&mut stream).unwrap(), expected, "call {}", self.answered.load(Ordering::Relaxed));
            self.answered.fetch_add(1, Ordering::Relaxed);
            // Some two thousand calls a second in all, and not all of an emulated machine's time.
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Runs `work` while calls go on, and returns how many were answered in which time.
    fn during(&self, work: impl FnOnce()) -> (u64, Duration) {
        let begun = Instant::now();
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    self.world.a.as_(Who::Sidecar, || {
                        self.serve(&self.outbound, |stream, _from| {
                            let to = SockRef::from(stream).original_dst_v4()?.as_socket().unwrap();
                            whole(&mut TcpStream::connect(to)?)
                        })
                    })
                });
                scope.spawn(|| {
                    self.world.b.as_(Who::Sidecar, || {
                        self.serve(&self.inbound, |stream, from| {
                            let local = stream.local_addr()?;
                            let to = SocketAddr::new(local.ip().to_canonical(), local.port());
                            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
                            declare(&socket, from)?;
                            socket.connect(&to.into())?;
                            whole(&mut socket.into())
                        })
                    })
                });
                scope
                    .spawn(|| self.serve(&self.app, |stream, from| Ok(format!("{} {}", from.ip(), stream.local_addr()?.port()))));
            }
            let callers = [(); 3].map(|()| scope.spawn(|| self.world.a.as_(Who::App, || self.call())));
            thread::sleep(Duration::from_millis(150));
            work();
            thread::sleep(Duration::from_millis(150));
            self.hung_up.store(true, Ordering::Relaxed);
            let outcomes = callers.map(thread::ScopedJoinHandle::join);
            // Who is asked goes after who asks.
            self.ended.store(true, Ordering::Relaxed);
            assert!(outcomes.iter().all(Result::is_ok), "a call failed");
        });
        (self.answered.load(Ordering::Relaxed), begun.elapsed())
    }
}

fn whole(stream: &mut TcpStream) -> io::Result<String> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}

#[test]
fn pins_of_an_earlier_layout_are_taken_over_and_no_connection_notices() {
    let Some(world) = World::new() else { return };
    open_3(&world);
    let mesh = Mesh::new(&world);
    enrol_3(&world, &world.a, &mesh.outbound);
    enrol_3(&world, &world.b, &mesh.inbound);
    // A connection that was there before, and stays.
    let to = SocketAddr::from((world.b.v4, 7777));
    let standing = world.a.connect(Who::App, to).unwrap();
    let mut before = 0;
    let (answered, took) = mesh.during(|| {
        let former: PerCpuHashMap<_, u64, [u64; 25]> = map(&world, COUNTERS, Map::PerCpuHashMap);
        before = former.get(&world.a.cookie, 0).unwrap().iter().map(|cpu| cpu[Counter::Redirected as usize]).sum();
        let mut kernel = world.open();
        assert!(!kernel.is_adopted());
        thread::sleep(Duration::from_millis(50));
        // As the agent does with every pod that it finds described.
        world.a.enrol(&mut kernel);
        world.b.enrol(&mut kernel);
        kernel.register_listener(world.b.cookie, mesh.inbound.as_fd()).unwrap();
    });
    io::stdout().write_all(format!("\n{answered} connections in {took:?} while pins were taken over\n").as_bytes()).unwrap();
    assert!(before > 0 && answered > before, "{before} before, {answered} in all");
    assert_eq!(standing.peer_addr().unwrap(), to);
    let kernel = world.open();
    assert!(kernel.is_adopted());
    let counters = kernel.counters(world.a.cookie).unwrap().unwrap();
    let redirected = counters.of(Counter::Redirected);
    assert!((before..=answered + 3).contains(&redirected), "{redirected}, {before} before, {answered} in all");
    assert_eq!((counters.of(Counter::OriginalMissing), counters.of(Counter::NoPort)), (0, 0));
    assert_eq!(kernel.attest_node().unwrap(), []);
    assert_eq!(kernel.attest_pod(world.b.cookie).unwrap(), []);
    assert!(!world.pins.join(COUNTERS).exists(), "the former map stays");
}

#[test]
fn an_agent_that_was_killed_while_it_took_pins_over_is_followed_by_one_that_does() {
    let Some(world) = World::new() else { return };
    open_3(&world);
    let mesh = Mesh::new(&world);
    enrol_3(&world, &world.a, &mesh.outbound);
    enrol_3(&world, &world.b, &mesh.inbound);
    // So far: the maps, and the first of the programs.
    maps::mark_build(&world.pins, 3, 0).unwrap();
    super::super::layout::take_over(&world.pins, 3).unwrap();
    let (program, loaded) = programs::load(&world.pins, Options::default()).unwrap().swap_remove(0);
    links::pin(loaded.as_fd(), &world.pins.join(program_pin(program))).unwrap();
    assert!(replace(&world.pins.join(link_pin(program)), &loaded).unwrap());
    // An agent of layout 3 takes the mark away while it works.
    links::unpin(&world.pins.join(maps::BUILD)).unwrap();
    let (answered, _took) = mesh.during(|| drop(world.open()));
    assert!(answered > 0);
    let kernel = world.open();
    assert!(kernel.is_adopted() && !world.pins.join(COUNTERS).exists());
    assert_eq!(kernel.attest_node().unwrap(), []);
}

/// Nobody can copy them while connections go on, so they are what they were in the first layout that is taken over.
#[test]
fn maps_of_what_is_on_its_way_are_as_they_ever_were() {
    let Some((former, now)) = World::new().zip(World::new()) else { return };
    open_3(&former);
    drop(now.open());
    let definitions = |world: &World| {
        [LISTENERS, SOCKETS, ORIGINALS, OWN_DIALS].map(|name| {
            let map = MapInfo::from_pin(world.pins.join(name)).unwrap();
            (name, map.map_type().unwrap(), map.key_size(), map.value_size(), map.map_flags())
        })
    };
    assert_eq!(definitions(&former), definitions(&now));
}
