//! Other people's programs at our hooks: one that sends connections elsewhere as a socket load balancer does, and ones that select
//! sockets in a pod.

use super::foreign::{Timekeeper, attach, balancer, onlooker, patient, thief};
use super::*;

/// Since Linux 6.17 a program can ask to be the first one.
fn may_be_first() -> bool {
    let release = release();
    let mut numbers = release.split(|sign: char| !sign.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(17))
}

#[test]
fn balancer_at_connect_is_named_and_the_address_that_was_asked_for_is_read_before_it_changes() {
    let Some(world) = World::new() else { return };
    let (asked, backend) = (Ipv4Addr::new(10, 77, 0, 99), SocketAddr::from((world.b.v4, 7777)));
    let balancer = balancer(asked, world.b.v4, 7777);
    for at_root in [true, false] {
        let place = if at_root { &world.root } else { world.a.cgroup(Who::App) };
        let place = File::open(place).unwrap();
        for comes_first in [true, false] {
            let mut foreign = comes_first.then(|| attach(&balancer, &place, Hook::Connect4));
            let mut kernel = world.open();
            world.a.enrol(&mut kernel);
            if foreign.is_none() {
                foreign = Some(attach(&balancer, &place, Hook::Connect4));
            }
            let told: Vec<Conflict> = kernel.others_at_connect(world.a.cgroup(Who::App)).unwrap();
            let told: Vec<&str> =
                told.iter().map(|one| one.text.as_str()).filter(|text| text.starts_with("socket_lb (program ")).collect();
            let [told] = told.as_slice() else { panic!("{told:?}") };
            let is_first = at_root && (may_be_first() || !comes_first);
            let expected = if is_first { "runs at connect4 after or_connect4" } else { "runs at connect4 before or_connect4" };
            assert!(told.contains(expected), "{told}, at the root: {at_root}, comes first: {comes_first}");
            let sidecar = world.a.listen(Who::Sidecar, "127.0.0.1", PORT_OUTBOUND);
            let app = world.a.connect(Who::App, (asked, 80)).unwrap();
            let (taken, _) = accept(&sidecar);
            let wanted = if is_first { SocketAddr::from((asked, 80)) } else { backend };
            assert_eq!((taken.local_addr().unwrap(), app.peer_addr().unwrap()), (wanted, wanted), "{told}");
            drop((taken, app, sidecar, foreign, kernel));
            Kernel::remove_all(&world.pins).unwrap();
        }
    }
}

#[test]
fn onlooker_in_a_pod_changes_nothing_a_thief_is_told_of_and_neither_is_let_in_before() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let netns = File::open(Path::new("/run/netns").join(&world.b.netns)).unwrap();
    let told = |kernel: &Kernel| -> Vec<Conflict> { kernel.others_at_arrival(netns.as_fd()).unwrap() };
    let stranger = attach(&onlooker(), &netns, Hook::SkLookup);
    let error = world.b.try_enrol(&mut kernel, &CaptureConfig::default(), &[]).unwrap_err();
    assert_eq!(error.reason(), "foreign_program");
    assert!(error.to_string().contains(": onlooker (program "), "{error}");
    links_gone(stranger, &netns);
    let inbound = world.b.enrol_with_listener(&mut kernel);
    assert_eq!(told(&kernel), []);
    let to = world.b.both(7777)[0];
    let stranger = attach(&onlooker(), &netns, Hook::SkLookup);
    let one = told(&kernel);
    assert!(one.len() == 1 && one[0].steals && one[0].text.starts_with("onlooker (program "), "{one:?}");
    let _client = world.a.connect(Who::App, to).unwrap();
    assert_eq!(accept(&inbound).0.local_addr().unwrap().port(), 7777);
    links_gone(stranger, &netns);
    let stolen = world.b.listen(Who::App, "::", 9999);
    let stranger = attach(&thief(&stolen), &netns, Hook::SkLookup);
    let one = told(&kernel);
    assert!(one.len() == 1 && one[0].text.starts_with("thief (program "), "{one:?}");
    let _client = world.a.connect(Who::App, to).unwrap();
    assert_eq!(accept(&stolen).0.local_addr().unwrap().port(), 7777);
    nobody_at(&inbound);
    links_gone(stranger, &netns);
    assert_eq!(told(&kernel), []);
    let _client = world.a.connect(Who::App, to).unwrap();
    assert_eq!(accept(&inbound).0.local_addr().unwrap().port(), 7777);
}

#[test]
fn a_program_of_tcp_events_below_the_root_keeps_what_it_asked_for() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let listener = world.b.enrol_with_listener(&mut kernel);
    let timekeeper = Timekeeper::load();
    let place = File::open(world.b.cgroup(Who::Sidecar)).unwrap();
    let _link = attach(&timekeeper.program, &place, Hook::SockOps);
    let mut caller = world.a.connect(Who::App, world.b.both(7777)[0]).unwrap();
    let (mut called, _) = accept(&listener);
    for _ in 0..10 {
        called.write_all(b"x").unwrap();
        caller.read_exact(&mut [0]).unwrap();
        caller.write_all(b"x").unwrap();
        called.read_exact(&mut [0]).unwrap();
    }
    assert!(timekeeper.count() >= 9, "{} round trips were told", timekeeper.count());
}

#[test]
fn what_a_program_of_tcp_events_answers_the_kernel_counts() {
    let Some(world) = World::new() else { return };
    let root = File::open(&world.root).unwrap();
    let _link = attach(&patient(3000), &root, Hook::SockOps);
    let alone = first_timeout(&world);
    assert_ne!(alone, 1_000_000, "as if nobody had answered");
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    assert_eq!(first_timeout(&world), alone);
}

/// In microseconds, of a connection to nobody.
fn first_timeout(world: &World) -> u32 {
    let nobody = SocketAddr::from((Ipv4Addr::new(10, 77, 0, 98), 80));
    let socket = world.a.as_(Who::Sidecar, || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.connect(&nobody.into()).unwrap_err();
        socket
    });
    // SAFETY: all zeros are one.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut size = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).unwrap();
    // SAFETY: the kernel writes no more than `size` bytes.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut size) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    info.tcpi_rto
}

/// Closes the last descriptor of a link; the kernel detaches in its own time.
fn links_gone(link: OwnedFd, netns: &File) {
    let before = links::ids(netns.as_fd(), Hook::SkLookup).unwrap().len();
    drop(link);
    for _ in 0..200 {
        if links::ids(netns.as_fd(), Hook::SkLookup).unwrap().len() < before {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("the program stays attached");
}
