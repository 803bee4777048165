//! Other people's programs at our hooks: one that sends connections elsewhere as a socket load balancer does, and ones that select
//! sockets in a pod. Each is written as instructions, so that nothing of ours is in it.

use std::os::fd::FromRawFd as _;

use super::*;

/// Commands of bpf(2).
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
/// Types of programs and maps.
const CGROUP_SOCK_ADDR: u32 = 18;
const SK_LOOKUP: u32 = 30;
const SOCKMAP: u32 = 15;

fn bpf(command: libc::c_int, attributes: &mut [u64; 16]) -> i64 {
    // SAFETY: the attributes are initialised, of the size that is passed, and what they point to lives through the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), 128) };
    assert!(result >= 0, "bpf({command}): {}", io::Error::last_os_error());
    result
}

fn made(number: i64) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(number.try_into().unwrap()) }
}

fn words(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// One instruction: operation, destination, source, offset, constant.
fn step(operation: u8, to: u8, from: u8, offset: i16, constant: u32) -> u64 {
    u64::from(operation) | u64::from(to | from << 4) << 8 | u64::from(offset as u16) << 16 | u64::from(constant) << 32
}

fn load(kind: u32, hook: Hook, name: &str, steps: &[u64]) -> OwnedFd {
    let mut attributes = [0; 16];
    attributes[0] = words(kind, steps.len().try_into().unwrap());
    attributes[1] = steps.as_ptr().expose_provenance() as u64;
    attributes[2] = c"GPL".as_ptr().expose_provenance() as u64;
    let mut letters = [0; 16];
    letters[..name.len()].copy_from_slice(name.as_bytes());
    attributes[6] = u64::from_ne_bytes(letters[..8].try_into().unwrap());
    attributes[7] = u64::from_ne_bytes(letters[8..].try_into().unwrap());
    attributes[8] = words(0, hook as u32);
    made(bpf(PROG_LOAD, &mut attributes))
}

/// Sends who asks for `asked`, at whatever port, to `backend`.
fn balancer(asked: Ipv4Addr, backend: Ipv4Addr, port: u16) -> OwnedFd {
    let word = |address: Ipv4Addr| u32::from_ne_bytes(address.octets());
    let steps = [
        step(0x61, 2, 1, 4, 0),
        step(0x56, 2, 0, 4, word(asked)),
        step(0xb4, 3, 0, 0, word(backend)),
        step(0x63, 1, 3, 4, 0),
        step(0xb4, 3, 0, 0, port.to_be().into()),
        step(0x63, 1, 3, 24, 0),
        step(0xb7, 0, 0, 0, 1),
        step(0x95, 0, 0, 0, 0),
    ];
    load(CGROUP_SOCK_ADDR, Hook::Connect4, "socket_lb", &steps)
}

/// Lets everything pass and selects nothing.
fn onlooker() -> OwnedFd {
    load(SK_LOOKUP, Hook::SkLookup, "onlooker", &[step(0xb7, 0, 0, 0, 1), step(0x95, 0, 0, 0, 0)])
}

/// Gives everything that arrives to `listener`.
fn thief(listener: &TcpListener) -> OwnedFd {
    let mut attributes = [0; 16];
    attributes[0] = words(SOCKMAP, 4);
    attributes[1] = words(4, 1);
    let map = made(bpf(MAP_CREATE, &mut attributes));
    let (key, value) = (0_u32, listener.as_raw_fd());
    let mut attributes = [0; 16];
    attributes[0] = words(map.as_raw_fd().cast_unsigned(), 0);
    attributes[1] = (&raw const key).expose_provenance() as u64;
    attributes[2] = (&raw const value).expose_provenance() as u64;
    bpf(MAP_UPDATE_ELEM, &mut attributes);
    let (look_up, release, assign) = (1, 86, 124);
    let steps = [
        step(0xbf, 6, 1, 0, 0),
        step(0x62, 10, 0, -4, 0),
        step(0xbf, 2, 10, 0, 0),
        step(0x07, 2, 0, 0, (-4_i32).cast_unsigned()),
        step(0x18, 1, 1, 0, map.as_raw_fd().cast_unsigned()),
        0,
        step(0x85, 0, 0, 0, look_up),
        step(0x15, 0, 0, 7, 0),
        step(0xbf, 7, 0, 0, 0),
        step(0xbf, 1, 6, 0, 0),
        step(0xbf, 2, 7, 0, 0),
        step(0xb7, 3, 0, 0, 1),
        step(0x85, 0, 0, 0, assign),
        step(0xbf, 1, 7, 0, 0),
        step(0x85, 0, 0, 0, release),
        step(0xb7, 0, 0, 0, 1),
        step(0x95, 0, 0, 0, 0),
    ];
    load(SK_LOOKUP, Hook::SkLookup, "thief", &steps)
}

fn attach(program: &OwnedFd, to: &File, hook: Hook) -> OwnedFd {
    // Not by `links::create`, which asks for the first place.
    let mut attributes = [0; 16];
    attributes[0] = words(program.as_raw_fd().cast_unsigned(), to.as_raw_fd().cast_unsigned());
    attributes[1] = words(hook as u32, 0);
    made(bpf(28, &mut attributes))
}

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
