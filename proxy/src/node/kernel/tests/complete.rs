//! Every way to begin a TCP connection ends at the sidecar, and nothing but TCP does.

use std::mem::MaybeUninit;
use std::net::UdpSocket;
use std::os::fd::{AsFd, FromRawFd as _};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;

use super::*;

/// The sidecar's outbound listeners, for IPv4 and IPv6.
struct Outbound([TcpListener; 2]);

impl Outbound {
    fn new(side: &Side) -> Self {
        Self(["127.0.0.1", "::1"].map(|address| side.listen(Who::Sidecar, address, PORT_OUTBOUND)))
    }

    /// Takes the connection that somebody made to `to`, and checks that both ends tell the truth of it.
    #[track_caller]
    fn takes(&self, app: &Socket, to: SocketAddr, side: &Side) -> TcpStream {
        let truly = SocketAddr::new(to.ip().to_canonical(), to.port());
        let (taken, from) = accept(&self.0[usize::from(truly.is_ipv6())]);
        assert_eq!(taken.local_addr().unwrap(), truly, "where it wanted to go");
        let [peer, own] = [app.peer_addr(), app.local_addr()].map(|end| end.unwrap().as_socket().unwrap());
        assert_eq!(peer, to, "getpeername");
        let pods = if truly.is_ipv4() { IpAddr::from(side.v4) } else { side.v6.into() };
        assert_eq!((own.ip().to_canonical(), own.port()), (pods, from.port()), "getsockname");
        taken
    }
}

/// `to` in both families, and its IPv4 form as a socket of IPv6 says it.
fn every_form(side: &Side, port: u16) -> [SocketAddr; 3] {
    let [v4, v6] = side.both(port);
    [v4, v6, SocketAddr::from((side.v4.to_ipv6_mapped(), port))]
}

fn stream(to: SocketAddr) -> Socket {
    Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap()
}

fn set(socket: impl AsFd, level: i32, name: i32, value: i32) {
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the value is an `int` of four bytes that outlives the call.
    let result = unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), 4) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// Did the connection's first packet carry data?
fn sent_data_with_its_syn(socket: &Socket) -> bool {
    const TCPI_OPT_SYN_DATA: u8 = 32;
    let mut info = [0_u8; 256];
    let mut length: libc::socklen_t = 256;
    let fd = socket.as_raw_fd();
    // SAFETY: the kernel writes at most `length` bytes into the array.
    let result = unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut length) };
    assert_eq!(result, 0);
    // `struct tcp_info`: five bytes before the options.
    info[5] & TCPI_OPT_SYN_DATA != 0
}

#[test]
fn fast_open_by_either_way_goes_to_the_sidecar() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let outbound = Outbound::new(&world.a);
    world.a.as_(Who::Sidecar, || fs::write("/proc/sys/net/ipv4/tcp_fastopen", "3").unwrap());
    for listener in &outbound.0 {
        set(listener, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 16);
    }
    for by_connect in [false, true] {
        // The first connection asks for the cookie that the second one sends data with.
        for with_data in [false, true] {
            for to in every_form(&world.b, 7777) {
                let app = world.a.as_(Who::App, || {
                    let socket = stream(to);
                    if by_connect {
                        set(&socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1);
                        socket.connect(&to.into()).unwrap();
                        (&socket).write_all(b"hello").unwrap();
                    } else {
                        assert_eq!(socket.send_to_with_flags(b"hello", &to.into(), libc::MSG_FASTOPEN).unwrap(), 5);
                    }
                    socket
                });
                let mut hello = [0; 5];
                outbound.takes(&app, to, &world.a).read_exact(&mut hello).unwrap();
                assert_eq!(&hello, b"hello");
                assert!(sent_data_with_its_syn(&app) || !with_data, "{to}: no data in the first packet");
            }
        }
    }
    assert_eq!(kernel.counters(world.a.cookie).unwrap().unwrap().of(Counter::OriginalMissing), 0);
}

#[test]
fn socket_that_is_bound_first_goes_to_the_sidecar() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let outbound = Outbound::new(&world.a);
    let own = world.a.both(0);
    let any: [SocketAddr; 2] = ["0.0.0.0:40001", "[::]:40002"].map(|address| address.parse().unwrap());
    for (to, bound) in world.b.both(7777).into_iter().zip(own).chain(world.b.both(7777).into_iter().zip(any)) {
        let app = world.a.as_(Who::App, || {
            let socket = stream(to);
            socket.bind(&bound.into()).unwrap();
            socket.connect_timeout(&to.into(), Duration::from_secs(5)).unwrap();
            socket
        });
        drop(outbound.takes(&app, to, &world.a));
    }
}

#[test]
fn socket_that_is_bound_to_the_pods_address_reaches_its_own_pod_through_the_sidecar_or_over_loopback() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let inbound = world.a.enrol_with_listener(&mut kernel);
    let outbound = Outbound::new(&world.a);
    let app = world.a.listen(Who::App, "::", 7777);
    let bound = |own: SocketAddr, to: SocketAddr| {
        world.a.as_(Who::App, || {
            let socket = stream(own);
            socket.bind(&own.into()).unwrap();
            let outcome = socket.connect_timeout(&to.into(), Duration::from_secs(5));
            outcome.map(|()| socket)
        })
    };
    let mapped = SocketAddr::from((world.a.v4.to_ipv6_mapped(), 0));
    let [v4, v6] = world.a.both(0);
    let asked = every_form(&world.a, 7777);
    for (own, to) in [(v4, asked[0]), (v6, asked[1]), (mapped, asked[2])] {
        drop(outbound.takes(&bound(own, to).unwrap(), to, &world.a));
        nobody_at(&app);
    }
    let local = |text: &str| text.parse::<SocketAddr>().unwrap();
    let loopback = [
        (v4, local("127.0.0.1:7777")),
        (v6, local("[::1]:7777")),
        (v6, local("[::]:7777")),
        (mapped, local("[::ffff:127.0.0.1]:7777")),
        (mapped, local("[::]:7777")),
    ];
    for (own, to) in loopback {
        let _caller = bound(own, to).unwrap_or_else(|error| panic!("{own} to {to}: {error}"));
        assert_eq!(accept(&app).1.ip().to_canonical(), own.ip().to_canonical(), "{own} to {to}");
    }
    let foreign = || kernel.counters(world.a.cookie).unwrap().unwrap().of(Counter::ForeignOwnDial);
    assert_eq!(foreign(), 0);
    // The kernel takes "any" of IPv4 for the address that the socket is bound to, where no sidecar would see what comes.
    for (number, (own, to)) in [(v4, local("0.0.0.0:7777")), (mapped, local("[::ffff:0.0.0.0]:7777"))].into_iter().enumerate() {
        assert_eq!(bound(own, to).unwrap_err().kind(), io::ErrorKind::ConnectionRefused, "{own} to {to}");
        assert_eq!(foreign(), number as u64 + 1);
    }
    nobody_at(&app);
    nobody_at(&inbound);
}

#[test]
fn socket_of_ipv6_alone_goes_to_the_sidecar_and_to_no_ipv4_address() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let outbound = Outbound::new(&world.a);
    let outside = world.b.listen(Who::App, "::", 7777);
    let alone = |side: &Side, to: SocketAddr| {
        side.as_(Who::App, || {
            let socket = stream(to);
            socket.set_only_v6(true).unwrap();
            let outcome = socket.connect_timeout(&to.into(), Duration::from_secs(5));
            outcome.map(|()| socket)
        })
    };
    let [_v4, v6, mapped] = every_form(&world.b, 7777);
    drop(outbound.takes(&alone(&world.a, v6).unwrap(), v6, &world.a));
    let no_port = || kernel.counters(world.a.cookie).unwrap().unwrap().of(Counter::NoPort);
    assert_eq!(no_port(), 0);
    // The other pod is not enrolled: so it fails without a mesh, too.
    let without = alone(&world.b, SocketAddr::from((world.a.v4.to_ipv6_mapped(), 7777))).unwrap_err();
    assert_eq!(without.raw_os_error(), Some(libc::ENETUNREACH));
    assert_eq!(alone(&world.a, mapped).unwrap_err().raw_os_error(), Some(libc::ENETUNREACH));
    outbound.0.iter().chain([&outside]).for_each(nobody_at);
    // It began and never sent anything, which is what is counted.
    assert_eq!(no_port(), 1);
}

#[test]
fn socket_that_is_bound_to_a_device_goes_to_the_sidecar_or_nowhere() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let outbound = Outbound::new(&world.a);
    for to in world.b.both(7777) {
        let app = world.a.as_(Who::App, || {
            let socket = stream(to);
            socket.bind_device(Some(b"eth0")).unwrap();
            socket.connect_timeout(&to.into(), Duration::from_secs(5)).unwrap();
            socket
        });
        drop(outbound.takes(&app, to, &world.a));
    }
    // Without CAP_NET_RAW a device can be chosen but not changed.
    for to in world.b.both(7777) {
        let refused = world.a.as_(Who::App, || {
            let socket = stream(to);
            let none = rustix::thread::CapabilitySet::empty();
            let sets = rustix::thread::CapabilitySets { effective: none, permitted: none, inheritable: none };
            rustix::thread::set_capabilities(None, sets).unwrap();
            socket.bind_device(Some(b"eth0")).unwrap();
            socket.connect_timeout(&to.into(), Duration::from_secs(5)).unwrap_err()
        });
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
    }
    assert_eq!(kernel.counters(world.a.cookie).unwrap().unwrap().of(Counter::DeviceRefused), 2);
}

#[test]
fn io_uring_goes_to_the_sidecar() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let outbound = Outbound::new(&world.a);
    // At once, and by one of the kernel's own threads.
    for flags in [0, IOSQE_ASYNC] {
        for to in every_form(&world.b, 7777) {
            let app = world.a.as_(Who::App, || {
                let socket = stream(to);
                match io_uring_connect(&socket, to, flags) {
                    // Not built in, or forbidden on this machine.
                    Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => return None,
                    result => result.unwrap(),
                }
                Some(socket)
            });
            let Some(app) = app else { return };
            drop(outbound.takes(&app, to, &world.a));
        }
    }
}

const IOSQE_ASYNC: u8 = 1 << 4;

/// One IORING_OP_CONNECT, waited for. Layouts: `include/uapi/linux/io_uring.h`.
fn io_uring_connect(socket: &Socket, to: SocketAddr, flags: u8) -> io::Result<()> {
    const OP_CONNECT: u8 = 16;
    const GETEVENTS: libc::c_uint = 1;
    const OFF_SQES: libc::off_t = 0x1000_0000;
    const PAGE: usize = 4096;
    // `struct io_uring_params`: 10 words, then the offsets of the two rings, of 10 words each.
    let mut params = [0_u32; 30];
    // SAFETY: the kernel writes the 120 bytes of the structure.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    let Ok(ring @ 0..) = i32::try_from(ring) else { return Err(io::Error::last_os_error()) };
    // SAFETY: the kernel has just made it for us.
    let ring = unsafe { OwnedFd::from_raw_fd(ring) };
    let map = |offset| {
        let (access, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
        // SAFETY: a new mapping, wherever the kernel likes; rings of one entry need less than a page each.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, access, shared, ring.as_raw_fd(), offset) };
        assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        at.cast::<u8>()
    };
    // Since Linux 5.4 one mapping holds both rings.
    let (rings, entry) = (map(0), map(OFF_SQES));
    let field = |index: usize| rings.wrapping_add(params[index] as usize).cast::<u32>();
    let (submission_tail, submission_array) = (field(11), field(16));
    let (completion_head, completion_entries) = (field(20), field(25).cast::<u8>());
    let address = SockAddr::from(to);
    // `struct io_uring_sqe`: operation, flags, priority, descriptor, offset (here the address's length), address.
    let mut written = [0_u8; 64];
    (written[0], written[1]) = (OP_CONNECT, flags);
    written[4..8].copy_from_slice(&socket.as_raw_fd().to_ne_bytes());
    written[8..16].copy_from_slice(&u64::from(address.len()).to_ne_bytes());
    written[16..24].copy_from_slice(&(address.as_ptr().expose_provenance() as u64).to_ne_bytes());
    // SAFETY: all four lie inside the mappings, and nobody else uses this ring; the address outlives the operation.
    unsafe {
        std::ptr::copy_nonoverlapping(written.as_ptr(), entry, 64);
        submission_array.write_volatile(0);
        (*submission_tail.cast::<AtomicU32>()).store(1, Ordering::Release);
        let entered = libc::syscall(libc::SYS_io_uring_enter, ring.as_raw_fd(), 1, 1, GETEVENTS, 0, 0);
        assert_eq!(entered, 1, "{}", io::Error::last_os_error());
        // `struct io_uring_cqe`: user data, result, flags.
        let head = (*completion_head.cast::<AtomicU32>()).load(Ordering::Acquire);
        assert_eq!(head, 0);
        let result = completion_entries.wrapping_add(8).cast::<i32>().read_volatile();
        libc::munmap(rings.cast(), PAGE);
        libc::munmap(entry.cast(), PAGE);
        if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-result)) }
    }
}

#[test]
fn wherever_a_task_comes_from_its_connections_go_to_the_sidecar() {
    let Some(world) = World::new() else { return };
    let to = world.b.both(7777)[0];
    // A task that is older than the programs.
    let (begin, begins) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let side = &world.a;
        let older = move || {
            let socket = stream(to);
            begins.recv().unwrap();
            socket.connect_timeout(&to.into(), Duration::from_secs(5)).unwrap();
            socket
        };
        let older = scope.spawn(move || side.as_(Who::App, older));
        let mut kernel = world.open();
        world.a.enrol(&mut kernel);
        let outbound = Outbound::new(&world.a);
        begin.send(()).unwrap();
        drop(outbound.takes(&older.join().unwrap(), to, &world.a));

        // A task of a cgroup below the app's, and below the sidecar's own, for which nobody vouches.
        for who in [Who::App, Who::Sidecar] {
            let below = world.a.cgroup(who).join("below");
            fs::create_dir(&below).unwrap();
            fs::write(below.join("cgroup.type"), "threaded").unwrap();
            let app = world.a.with_cgroup(&below, || {
                let socket = stream(to);
                socket.connect_timeout(&to.into(), Duration::from_secs(5)).unwrap();
                socket
            });
            drop(outbound.takes(&app, to, &world.a));
            remove_cgroup(&below);
        }

        // A task of the machine that enters the namespace, and one that stays outside with a socket that was made inside.
        let entered = world.a.with_cgroup(&world.root, || {
            let socket = stream(to);
            socket.connect_timeout(&to.into(), Duration::from_secs(5)).unwrap();
            socket
        });
        drop(outbound.takes(&entered, to, &world.a));
        let outside = world.a.as_(Who::App, || stream(to));
        outside.connect_timeout(&to.into(), Duration::from_secs(5)).unwrap();
        drop(outbound.takes(&outside, to, &world.a));

        // A process that an app forked.
        let forked = world.a.as_(Who::App, || {
            let (socket, address) = (stream(to), SockAddr::from(to));
            // SAFETY: the child makes two system calls on what was made before, and ends.
            unsafe {
                let child = libc::fork();
                if child == 0 {
                    libc::_exit(libc::connect(socket.as_raw_fd(), address.as_ptr().cast(), address.len()));
                }
                let mut status = 0;
                assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
                assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status:#x}");
            }
            socket
        });
        drop(outbound.takes(&forked, to, &world.a));
        assert_eq!(kernel.counters(world.a.cookie).unwrap().unwrap().of(Counter::Redirected), 6);
    });
}

#[test]
fn datagrams_and_pings_are_none_of_the_sidecars_business() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let _inbound = [world.a.enrol_with_listener(&mut kernel), world.b.enrol_with_listener(&mut kernel)];
    for [here, there] in [[&world.a, &world.b], [&world.b, &world.a]] {
        for to in there.both(7777) {
            let server = there.as_(Who::App, || UdpSocket::bind(to).unwrap());
            let client = here.as_(Who::App, || {
                let client = UdpSocket::bind((if to.is_ipv4() { "0.0.0.0" } else { "::" }, 0)).unwrap();
                client.connect(to).unwrap();
                client
            });
            assert_eq!(client.peer_addr().unwrap(), to);
            client.send(b"hello").unwrap();
            for socket in [&server, &client] {
                socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            }
            let mut bytes = [0; 9];
            let (length, from) = server.recv_from(&mut bytes).unwrap();
            assert_eq!((&bytes[..length], from), (&b"hello"[..], client.local_addr().unwrap()));
            server.send_to(b"goodbye", from).unwrap();
            assert_eq!(client.recv(&mut bytes).unwrap(), 7);
            assert!(here.as_(Who::App, || answers_a_ping(to)), "{to}");
        }
    }
    let counted = |side: &Side| kernel.counters(side.cookie).unwrap().unwrap();
    assert_eq!([counted(&world.a), counted(&world.b)].map(|counters| counters.0.iter().sum::<u64>()), [0, 0]);
}

pub(super) fn answers_a_ping(to: SocketAddr) -> bool {
    fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
    let (domain, protocol, request, reply) =
        if to.is_ipv4() { (Domain::IPV4, Protocol::ICMPV4, 8, 0) } else { (Domain::IPV6, Protocol::ICMPV6, 128, 129) };
    let socket = Socket::new(domain, Type::DGRAM, Some(protocol)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket.connect(&to.into()).unwrap();
    // An echo request of eight bytes; the kernel fills in checksum and identifier.
    socket.send(&[request, 0, 0, 0, 0, 0, 0, 1]).unwrap();
    let mut answer = [MaybeUninit::new(0_u8); 8];
    let length = socket.recv(&mut answer).unwrap();
    // SAFETY: initialised when it was made.
    length == 8 && unsafe { answer[0].assume_init() } == reply
}
