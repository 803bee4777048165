//! What a hostile process tries in order to get past its pod's sidecar: it is seen, and dropped where the pod's owner insists.

use proxy_common::counters::Counters;

use super::foreign::{attach_first_at_device, attach_last_at_device, tag_what_leaves};
use super::*;
use crate::node::device;

/// The other side of the link is the node of `a` here: at its end the link is watched.
fn enrol_watched(world: &World, kernel: &mut Kernel, capture: &CaptureConfig) {
    let netns = File::open(Path::new("/run/netns").join(&world.a.netns)).unwrap();
    let watch = world.b.as_(Who::App, || {
        let links = device::nodes_ends(&netns).unwrap();
        assert_eq!(links.len(), 1);
        world.a.try_enrol(kernel, capture, &links)
    });
    assert_eq!(watch.unwrap(), Watch::Watched);
    // Both know each other's address from here on: no packet waits for that.
    for to in world.b.both(0) {
        assert!(world.a.as_(Who::App, || complete::answers_a_ping(to)), "{to}");
    }
}

fn mode(enforce: bool) -> CaptureConfig {
    CaptureConfig { enforce, ..CaptureConfig::default() }
}

/// Connections that got past the sidecar of `a`: of raw sockets, of uncaptured ones, of none; and how many were dropped.
fn seen(kernel: &Kernel, world: &World) -> [u64; 4] {
    let counters = kernel.counters(world.a.cookie).unwrap().unwrap();
    [Counter::RawSocket, Counter::UncapturedSocket, Counter::NoSocket, Counter::BypassDropped].map(|counter| counters.of(counter))
}

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xb];

/// A SYN from `a` to port 7777 of `b`, without its IP header.
fn syn(world: &World, v6: bool) -> Vec<u8> {
    let mut segment = vec![0_u8; 20];
    segment[0..2].copy_from_slice(&5555_u16.to_be_bytes());
    segment[2..4].copy_from_slice(&7777_u16.to_be_bytes());
    (segment[12], segment[13], segment[14]) = (5 << 4, 0x02, 0x20);
    let ends = if v6 {
        [world.a.v6.octets(), world.b.v6.octets()].concat()
    } else {
        [world.a.v4.octets(), world.b.v4.octets()].concat()
    };
    // The pseudo header's protocol and length (RFC 9293 3.1).
    let sum = sum(&ends) + 6 + 20 + sum(&segment);
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    segment[16..18].copy_from_slice(&(!u16::try_from(folded).unwrap()).to_be_bytes());
    segment
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum()
}

/// An IPv4 packet of protocol TCP that is a fragment as `fragment` says.
fn packet_v4(world: &World, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let [high, low] = fragment.to_be_bytes();
    let mut head = vec![0x45, 0, length[0], length[1], 0, 7, high, low, 64, 6, 0, 0];
    head.extend(world.a.v4.octets().into_iter().chain(world.b.v4.octets()));
    let sum = sum(&head);
    let check = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    head[10..12].copy_from_slice(&check.to_be_bytes());
    [&head, payload].concat()
}

/// An IPv6 packet whose first header behind the fixed one is of kind `next`.
fn packet_v6(world: &World, next: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [0x60, 0, 0, 0, length[0], length[1], next, 64];
    [&head[..], &world.a.v6.octets(), &world.b.v6.octets(), payload].concat()
}

/// Sends a packet by a packet socket of the pod `a`.
fn send_frame(world: &World, packet: &[u8]) {
    send_tagged(world, &[], packet);
}

/// The same behind tags of VLAN 0, which say a priority and no network.
fn send_tagged(world: &World, tags: &[u16], packet: &[u8]) {
    world.a.as_(Who::App, || {
        let protocol: u16 = if packet[0] >> 4 == 4 { 0x0800 } else { 0x86dd };
        let tags: Vec<u8> = tags.iter().flat_map(|tag| [tag.to_be_bytes(), [0, 0]].concat()).collect();
        let frame = [&MAC[..], &[2, 0, 0, 0, 0, 0xa], &tags, &protocol.to_be_bytes(), packet].concat();
        let protocol = u16::from_be_bytes([frame[12], frame[13]]);
        let socket = Socket::new(Domain::PACKET, Type::RAW, None).unwrap();
        // SAFETY: a structure of integers, of which all zero is a value.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        (to.sll_family, to.sll_protocol, to.sll_halen) = (17, protocol.to_be(), 6);
        to.sll_ifindex = eth0().cast_signed();
        // SAFETY: the structure outlives the call that is told its size.
        let sent = unsafe {
            let size = libc::socklen_t::try_from(size_of_val(&to)).unwrap();
            libc::sendto(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, (&raw const to).cast(), size)
        };
        assert_eq!(usize::try_from(sent).ok(), Some(frame.len()), "{}", io::Error::last_os_error());
    });
}

/// The device of a pod, by its number, to a task of it.
fn eth0() -> u32 {
    // SAFETY: the name is a C string.
    unsafe { libc::if_nametoindex(c"eth0".as_ptr()) }
}

/// Sends a SYN by a raw socket of the pod `a`, by whatever task it is.
fn send_raw(world: &World, v6: bool) {
    let to = world.b.both(0)[usize::from(v6)];
    let segment = syn(world, v6);
    world.a.as_(Who::App, || {
        let socket = Socket::new(Domain::for_address(to), Type::RAW, Some(Protocol::TCP)).unwrap();
        assert_eq!(socket.send_to(&segment, &to.into()).unwrap(), 20);
    });
}

#[test]
fn connection_that_a_raw_or_packet_socket_begins_is_counted_and_dropped_where_the_owner_insists() {
    for enforce in [false, true] {
        let Some(world) = World::with_watched_links() else { return };
        let mut kernel = world.open();
        ip(&["-n", &world.b.netns, "link", "set", "eth0", "address", "02:00:00:00:00:0b"]);
        let _inbound = world.b.enrol_with_listener(&mut kernel);
        enrol_watched(&world, &mut kernel, &mode(enforce));
        send_raw(&world, false);
        send_raw(&world, true);
        send_frame(&world, &packet_v4(&world, 0, &syn(&world, false)));
        send_frame(&world, &packet_v6(&world, 6, &syn(&world, true)));
        within_a_second(|| seen(&kernel, &world), [4, 0, 0, if enforce { 4 } else { 0 }]);
        // What arrived at the peer was steered to its sidecar; the second of each family is the first one again.
        let arrived = || kernel.counters(world.b.cookie).unwrap().unwrap().of(Counter::Steered);
        if enforce {
            assert_eq!(arrived(), 0);
        } else {
            within_a_second(|| [u64::from(arrived() >= 2), 0, 0, 0], [1, 0, 0, 0]);
        }
    }
}

#[test]
fn program_that_lets_packets_pass_before_ours_looks_is_a_fault_until_ours_is_the_first_again() {
    let Some(world) = World::with_watched_links() else { return };
    let mut kernel = world.open();
    let netns = File::open(Path::new("/run/netns").join(&world.a.netns)).unwrap();
    let faults = |kernel: &Kernel| world.b.as_(Who::App, || kernel.attest_pod(world.a.cookie).unwrap());
    // One that was there before, as of the network's plugin; then one that comes later.
    let device = world.b.as_(Who::App, || device::nodes_ends(&netns).unwrap()[0]);
    let plugin = world.b.as_(Who::App, || attach_first_at_device(device));
    enrol_watched(&world, &mut kernel, &mode(true));
    assert_eq!(faults(&kernel), []);
    send_raw(&world, false);
    within_a_second(|| seen(&kernel, &world), [1, 0, 0, 1]);
    let later = world.b.as_(Who::App, || attach_first_at_device(device));
    let [fault] = &faults(&kernel)[..] else { panic!("{:?}", faults(&kernel)) };
    assert_eq!(fault.to_string(), "another program runs before or_link, at the node's end of the pod's link");
    enrol_watched(&world, &mut kernel, &mode(true));
    assert_eq!(faults(&kernel), []);
    send_raw(&world, false);
    within_a_second(|| seen(&kernel, &world), [2, 0, 0, 2]);
    drop((plugin, later));
}

#[test]
fn program_behind_ours_lets_nothing_pass_that_ours_drops_and_is_no_fault() {
    let Some(world) = World::with_watched_links() else { return };
    let mut kernel = world.open();
    enrol_watched(&world, &mut kernel, &mode(true));
    let device = kernel.links_of(world.a.cookie).unwrap()[0];
    let last = world.b.as_(Who::App, || attach_last_at_device(device));
    assert_eq!(world.b.as_(Who::App, || kernel.attest_pod(world.a.cookie).unwrap()), []);
    send_raw(&world, false);
    send_raw(&world, true);
    within_a_second(|| seen(&kernel, &world), [2, 0, 0, 2]);
    drop(last);
}

#[test]
fn what_leaves_by_a_vlan_of_the_pods_is_seen_and_the_sidecars_is_known() {
    for tags in [1, 2] {
        let Some(world) = World::with_watched_links() else { return };
        let mut kernel = world.open();
        enrol_watched(&world, &mut kernel, &mode(true));
        let device = world.a.as_(Who::App, eth0);
        let tagger = world.a.as_(Who::App, || tag_what_leaves(device, tags));
        send_raw(&world, false);
        send_raw(&world, true);
        within_a_second(|| seen(&kernel, &world), [2, 0, 0, 2]);
        // It leaves, and nobody is in that network.
        for to in world.b.both(7777) {
            let dialled = world.a.as_(Who::Sidecar, || TcpStream::connect_timeout(&to, Duration::from_millis(300)));
            assert_eq!(dialled.unwrap_err().kind(), io::ErrorKind::TimedOut, "{to}, {tags} tags");
        }
        assert_eq!(seen(&kernel, &world), [2, 0, 0, 2], "{tags} tags");
        drop(tagger);
    }
}

#[test]
fn what_hides_its_first_segment_behind_fragments_or_headers_is_seen_and_nothing_else() {
    let Some(world) = World::with_watched_links() else { return };
    let mut kernel = world.open();
    ip(&["-n", &world.b.netns, "link", "set", "eth0", "address", "02:00:00:00:00:0b"]);
    enrol_watched(&world, &mut kernel, &mode(false));
    let (v4, v6) = (syn(&world, false), syn(&world, true));
    // The first eight bytes of the segment hold no flags.
    send_frame(&world, &packet_v4(&world, 0x2000, &v4[..8]));
    send_frame(&world, &packet_v4(&world, 1, &v4[8..]));
    let options = [6, 0, 1, 4, 0, 0, 0, 0];
    send_frame(&world, &packet_v6(&world, 60, &[&options[..], &v6].concat()));
    send_frame(&world, &packet_v6(&world, 44, &[&[6, 0, 0, 1, 0, 0, 0, 9][..], &v6[..8]].concat()));
    // More headers than anybody looks at.
    send_frame(&world, &packet_v6(&world, 60, &[&[60, 0, 1, 4, 0, 0, 0, 0].repeat(9)[..], &options, &v6].concat()));
    within_a_second(|| seen(&kernel, &world), [5, 0, 0, 0]);
    // Tags of 802.1Q and 802.1ad: a receiver without devices for them takes off all.
    for tags in [&[0x8100_u16][..], &[0x8100, 0x8100], &[0x88a8, 0x8100], &[0x8100; 4], &[0x88a8; 9]] {
        send_tagged(&world, tags, &packet_v4(&world, 0, &v4));
        send_tagged(&world, tags, &packet_v6(&world, 6, &v6));
    }
    within_a_second(|| seen(&kernel, &world), [15, 0, 0, 0]);
    // Datagrams whole and in fragments, what is too short for a header, and the end of a connection.
    let mut reset = v4.clone();
    reset[13] = 0x14;
    send_frame(&world, &packet_v4(&world, 0, &reset));
    send_frame(&world, &packet_v4(&world, 0, &v4[..8]));
    world.a.as_(Who::App, || {
        for to in world.b.both(7777) {
            let socket = std::net::UdpSocket::bind((if to.is_ipv4() { "0.0.0.0" } else { "::" }, 0)).unwrap();
            socket.send_to(&[7; 4000], to).unwrap();
        }
    });
    send_tagged(&world, &[0x8100; 3], &packet_v4(&world, 0, &reset));
    thread::sleep(Duration::from_millis(200));
    assert_eq!(seen(&kernel, &world), [15, 0, 0, 0]);
    // An acknowledgement for a connection that the pod's TCP does not know: one of it is enough.
    let mut acknowledgement = v4;
    acknowledgement[13] = 0x10;
    send_frame(&world, &packet_v4(&world, 0, &acknowledgement));
    send_tagged(&world, &[0x8100; 3], &packet_v4(&world, 0, &acknowledgement));
    within_a_second(|| seen(&kernel, &world), [16, 0, 0, 0]);
}

#[test]
fn connection_that_no_tcp_of_the_pod_accepts_is_counted_and_dropped_where_the_owner_insists() {
    for enforce in [false, true] {
        let Some(world) = World::with_watched_links() else { return };
        let mut kernel = world.open();
        ip(&["-n", &world.b.netns, "link", "set", "eth0", "address", "02:00:00:00:00:0b"]);
        enrol_watched(&world, &mut kernel, &mode(enforce));
        for v6 in [false, true] {
            let mut answer = syn(&world, v6);
            answer[13] = 0x12;
            send_frame(&world, &if v6 { packet_v6(&world, 6, &answer) } else { packet_v4(&world, 0, &answer) });
        }
        within_a_second(|| seen(&kernel, &world), [2, 0, 0, if enforce { 2 } else { 0 }]);
        // Of the sidecar's it passes.
        let listener = world.a.listen(Who::Sidecar, "::", 7779);
        let excluded = CaptureConfig { inbound_ports: [7779].into(), ..mode(enforce) };
        enrol_watched(&world, &mut kernel, &excluded);
        for to in world.a.both(7779) {
            let _caller = world.b.connect(Who::App, to).unwrap();
            accept(&listener);
        }
        assert_eq!(seen(&kernel, &world)[..3], [2, 0, 0]);
    }
}

#[test]
fn connection_that_the_app_takes_itself_is_counted_and_dropped_where_the_owner_insists() {
    for enforce in [false, true] {
        let Some(world) = World::with_watched_links() else { return };
        let mut kernel = world.open();
        greet(world.a.listen(Who::App, "::", 7777));
        greet(world.a.listen(Who::App, "::", 7778));
        let excluded = CaptureConfig { inbound_ports: [7778].into(), ..mode(enforce) };
        enrol_watched(&world, &mut kernel, &excluded);
        // Somebody takes off the program that would have given it to the sidecar.
        links::detach(&world.pins.join(format!("or_inbound_{}", world.a.cookie))).unwrap();
        for [to, excluded] in [0, 1].map(|family| [7777, 7778].map(|port| world.a.both(port)[family])) {
            let called = world.b.as_(Who::App, || TcpStream::connect_timeout(&to, Duration::from_millis(300)));
            assert_eq!(called.is_ok(), !enforce, "{to}");
            assert!(world.b.greets(Who::App, excluded), "{excluded}");
        }
        let [raw, uncaptured, none, dropped] = seen(&kernel, &world);
        assert!(raw == 0 && none == 0 && uncaptured >= 2, "{raw} raw, {uncaptured} uncaptured, {none} of none");
        assert_eq!(dropped, if enforce { uncaptured } else { 0 });
    }
}

/// Sends a mebibyte from one end to the other, and the other way.
fn exchange([one, other]: [TcpStream; 2]) {
    for [mut from, mut to] in [[&one, &other], [&other, &one]] {
        to.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        thread::scope(|scope| {
            scope.spawn(move || from.write_all(&vec![7; 1 << 20]).unwrap());
            to.read_exact(&mut vec![0; 1 << 20]).unwrap();
        });
    }
}

#[test]
fn what_a_device_has_the_kernel_cut_leaves_an_enforcing_pod() {
    let Some(world) = World::with_watched_links() else { return };
    let mut kernel = world.open();
    let inbound = world.a.enrol_with_listener(&mut kernel);
    enrol_watched(&world, &mut kernel, &mode(true));
    world.a.as_(Who::App, || without_segmentation(c"eth0"));
    let server = world.b.listen(Who::App, "::", 7777);
    for (to, back) in world.b.both(7777).into_iter().zip(world.a.both(80)) {
        exchange([world.a.connect(Who::Sidecar, to).unwrap(), accept(&server).0]);
        exchange([world.b.connect(Who::App, back).unwrap(), accept(&inbound).0]);
    }
    assert_eq!(seen(&kernel, &world), [0; 4]);
}

/// Has the kernel cut what this namespace's `device` sends into segments itself: `ethtool -K DEVICE tso off gso off`.
fn without_segmentation(device: &std::ffi::CStr) {
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        value: *mut [u32; 2],
        rest: [u64; 2],
    }
    /// Of `include/uapi/linux/{sockios,ethtool}.h`.
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    const ETHTOOL_STSO: u32 = 0x1f;
    const ETHTOOL_SGSO: u32 = 0x24;
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for command in [ETHTOOL_STSO, ETHTOOL_SGSO] {
        let mut value = [command, 0];
        let mut request = Request { name: [0; 16], value: &raw mut value, rest: [0; 2] };
        request.name[..device.count_bytes()].copy_from_slice(device.to_bytes());
        // SAFETY: the kernel reads the request and the value that it points to, which outlive the call.
        let done = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    }
}

#[test]
fn connection_that_a_cookie_accepts_is_the_pods_own() {
    let Some(world) = World::with_watched_links() else { return };
    let mut kernel = world.open();
    let inbound = world.a.enrol_with_listener(&mut kernel);
    enrol_watched(&world, &mut kernel, &mode(true));
    // Every one, and not only under a flood.
    world.a.as_(Who::App, || fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").unwrap());
    for to in world.a.both(80) {
        exchange([world.b.connect(Who::App, to).unwrap(), accept(&inbound).0]);
    }
    assert_eq!(seen(&kernel, &world), [0; 4]);
}

#[test]
fn what_the_sidecar_dials_and_what_is_excluded_leaves_an_enforcing_pod() {
    let Some(world) = World::with_watched_links() else { return };
    let mut kernel = world.open();
    greet(world.b.listen(Who::App, "::", 7777));
    let excluded =
        CaptureConfig { outbound_cidrs: ["fd77::/64".parse().unwrap()].into(), outbound_ports: [7778].into(), ..mode(true) };
    greet(world.b.listen(Who::App, "::", 7778));
    enrol_watched(&world, &mut kernel, &excluded);
    for to in world.b.both(7777) {
        assert!(world.a.greets(Who::Sidecar, to), "{to}");
    }
    assert!(world.a.greets(Who::App, world.b.both(7777)[1]));
    assert!(world.a.greets(Who::App, world.b.both(7778)[0]));
    assert!(!world.a.greets(Who::App, world.b.both(7777)[0]));
    assert_eq!(seen(&kernel, &world), [0; 4]);
}

#[test]
fn connection_that_no_program_saw_is_counted_and_dropped_where_the_owner_insists() {
    for enforce in [false, true] {
        let Some(world) = World::with_watched_links() else { return };
        let mut kernel = world.open();
        greet(world.b.listen(Who::App, "::", 7777));
        enrol_watched(&world, &mut kernel, &mode(enforce));
        // Somebody takes the programs off: what they would have sent to the sidecar goes straight on.
        for program in ["or_connect4", "or_connect6"] {
            links::detach(&world.pins.join(format!("link_{program}"))).unwrap();
        }
        for to in world.b.both(7777) {
            // Before the kernel sends its first segment again.
            let connected = world.a.as_(Who::App, || TcpStream::connect_timeout(&to, Duration::from_millis(700)));
            assert_eq!(connected.is_ok(), !enforce, "{to}");
        }
        within_a_second(|| seen(&kernel, &world), [0, 2, 0, if enforce { 2 } else { 0 }]);
    }
}

#[test]
fn what_a_pod_forwards_for_a_namespace_behind_it_is_no_connection_of_its_own() {
    let Some(world) = World::with_watched_links() else { return };
    let mut kernel = world.open();
    enrol_watched(&world, &mut kernel, &mode(true));
    let behind = behind(&world);
    let to = world.b.both(7777)[0];
    let dialled = netns::inside(File::open(Path::new("/run/netns").join(&behind)).unwrap(), || {
        TcpStream::connect_timeout(&to, Duration::from_millis(300))
    });
    assert_eq!(dialled.unwrap_err().kind(), io::ErrorKind::TimedOut);
    within_a_second(|| seen(&kernel, &world), [0, 0, 1, 1]);
    // Nor does it accept one past the sidecar.
    ip(&["-n", &world.b.netns, "route", "add", "10.78.0.0/24", "via", &world.a.v4.to_string()]);
    let server =
        netns::inside(File::open(Path::new("/run/netns").join(&behind)).unwrap(), || TcpListener::bind("10.78.0.2:7777"));
    let called = world
        .b
        .as_(Who::App, || TcpStream::connect_timeout(&SocketAddr::from(([10, 78, 0, 2], 7777)), Duration::from_millis(300)));
    drop(server);
    ip(&["netns", "del", &behind]);
    assert_eq!(called.unwrap_err().kind(), io::ErrorKind::TimedOut);
    let [raw, uncaptured, none, dropped] = seen(&kernel, &world);
    assert!(raw == 0 && uncaptured == 0 && none >= 2 && none == dropped, "{none} of none, {dropped} dropped");
}

/// A namespace behind `a`, with a link from its `eth0` to `eth1` of `a`, which forwards.
fn behind(world: &World) -> String {
    let behind = format!("{}n", world.a.netns);
    ip(&["netns", "add", &behind]);
    ip(&["link", "add", "eth1", "netns", &world.a.netns, "type", "veth", "peer", "name", "eth0", "netns", &behind]);
    for (netns, device, last) in [(&world.a.netns, "eth1", "1"), (&behind, "eth0", "2")] {
        ip(&["-n", netns, "addr", "add", &format!("10.78.0.{last}/24"), "dev", device]);
        ip(&["-n", netns, "addr", "add", &format!("fd78::{last}/64"), "dev", device, "nodad"]);
        ip(&["-n", netns, "link", "set", device, "up"]);
    }
    ip(&["-n", &behind, "-4", "route", "add", "default", "via", "10.78.0.1"]);
    ip(&["-n", &behind, "-6", "route", "add", "default", "via", "fd78::1"]);
    world.a.as_(Who::App, || {
        for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(Path::new("/proc/sys/net").join(setting), "1").unwrap();
        }
    });
    behind
}

/// Gives it the address of `a`, and what comes to port 7777 there.
fn make_double(world: &World, behind: &str) {
    let routes = [("-4", world.a.v4.to_string(), "10.78.0.2"), ("-6", world.a.v6.to_string(), "fd78::2")];
    for (family, own, there) in routes {
        ip(&["-n", behind, "addr", "add", &own, "dev", "lo"]);
        let rule =
            |words: &str| ip(&[&["-n", &world.a.netns, family, "rule"], &words.split(' ').collect::<Vec<_>>()[..]].concat());
        // Before the table of what is local, which says that the address is of `a` itself.
        rule("add pref 10 lookup local");
        rule("add pref 5 iif eth0 ipproto 6 dport 7777 lookup 78");
        rule("del pref 0");
        ip(&["-n", &world.a.netns, family, "route", "add", "default", "via", there, "table", "78"]);
    }
    ip(&["-n", behind, "link", "set", "lo", "up"]);
    world.a.as_(Who::App, || {
        // From an address that is its own, by another way than back.
        for (setting, value) in
            [("eth1/accept_local", "1"), ("eth1/rp_filter", "0"), ("eth0/rp_filter", "0"), ("all/rp_filter", "0")]
        {
            fs::write(Path::new("/proc/sys/net/ipv4/conf").join(setting), value).unwrap();
        }
    });
}

/// Is a caller from `b` told something at `to`?
fn is_told_something(world: &World, to: SocketAddr) -> bool {
    world.b.connect(Who::App, to).is_ok_and(|mut caller| {
        caller.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        caller.read_exact(&mut [0; 5]).is_ok()
    })
}

#[test]
fn what_a_pod_forwards_as_its_own_is_counted_once_and_dropped_where_the_owner_insists() {
    for enforce in [false, true] {
        let Some(world) = World::with_watched_links() else { return };
        let mut kernel = world.open();
        let behind = behind(&world);
        make_double(&world, &behind);
        let _inbound = world.a.enrol_with_listener(&mut kernel);
        enrol_watched(&world, &mut kernel, &mode(enforce));
        let inside = File::open(Path::new("/run/netns").join(&behind)).unwrap();
        greet(netns::inside(inside, || TcpListener::bind("[::]:7777")).unwrap());
        for to in world.a.both(7777) {
            assert_eq!(is_told_something(&world, to), !enforce, "{to}");
        }
        let [raw, uncaptured, none, dropped] = seen(&kernel, &world);
        ip(&["netns", "del", &behind]);
        assert_eq!((raw, uncaptured), (0, 0));
        if enforce {
            assert!(none >= 2 && none == dropped, "{none} of none, {dropped} dropped");
        } else {
            assert_eq!((none, dropped), (2, 0));
        }
    }
}

#[test]
fn what_rules_in_the_pod_lead_away_is_seen_and_what_they_lead_aside_comes_to_the_sidecar() {
    if Command::new("nft").arg("--version").output().is_err() {
        io::stdout().write_all(b"\nleft out: rules in the pod, they need nft\n").unwrap();
        return;
    }
    for enforce in [false, true] {
        let Some(world) = World::with_watched_links() else { return };
        let mut kernel = world.open();
        let behind = behind(&world);
        world.a.nft(
            "table ip rules {
                 chain away { type nat hook prerouting priority dstnat; iif eth0 tcp dport 7777 dnat to 10.78.0.2; }
                 chain aside { type filter hook prerouting priority mangle; iif eth0 tcp dport 7778 tproxy to :7779 accept; }
             }",
        );
        let inbound = world.a.enrol_with_listener(&mut kernel);
        enrol_watched(&world, &mut kernel, &mode(enforce));
        let inside = File::open(Path::new("/run/netns").join(&behind)).unwrap();
        greet(netns::inside(inside, || TcpListener::bind("[::]:7777")).unwrap());
        let [away, aside] = [7777, 7778].map(|port| world.a.both(port)[0]);
        assert_eq!(is_told_something(&world, away), !enforce);
        let [raw, uncaptured, none, dropped] = seen(&kernel, &world);
        assert!(raw == 0 && uncaptured == 0 && none >= 1, "{raw} raw, {uncaptured} uncaptured, {none} of none");
        assert_eq!(dropped, if enforce { none } else { 0 });
        let transparent = world.a.listen(Who::App, "0.0.0.0", 7779);
        SockRef::from(&transparent).set_ip_transparent_v4(true).unwrap();
        let caller = world.b.connect(Who::App, aside).unwrap();
        assert_eq!(accept(&inbound).1.port(), caller.local_addr().unwrap().port());
        nobody_at(&transparent);
        ip(&["netns", "del", &behind]);
    }
}

#[test]
fn device_that_the_pods_root_moves_away_is_astray_until_it_is_back() {
    let Some(world) = World::with_watched_links() else { return };
    let mut kernel = world.open();
    enrol_watched(&world, &mut kernel, &mode(false));
    let netns = File::open(Path::new("/run/netns").join(&world.a.netns)).unwrap();
    let ends = kernel.links_of(world.a.cookie).unwrap();
    let astray = || world.b.as_(Who::App, || device::Links::of_node().unwrap().astray(&netns, &ends).unwrap());
    assert_eq!((ends.len(), astray()), (1, vec![]));
    let behind = format!("{}n", world.a.netns);
    ip(&["netns", "add", &behind]);
    ip(&["-n", &world.a.netns, "link", "set", "eth0", "netns", &behind]);
    let moved = astray();
    ip(&["-n", &behind, "link", "set", "eth0", "netns", &world.a.netns]);
    let back = astray();
    ip(&["netns", "del", &behind]);
    assert_eq!((moved, back), (ends.clone(), vec![]));
    // Nothing leaves by a pair that is gone.
    ip(&["-n", &world.a.netns, "link", "del", "eth0"]);
    assert!(astray().is_empty());
}

#[test]
fn app_gets_none_of_the_sidecars_ports() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let ports = [PORT_OUTBOUND, PORT_INBOUND, PORT_ADMIN, PORT_METRICS];
    for port in ports {
        for address in ["127.0.0.1", "0.0.0.0", "::1", "::", "::ffff:10.77.0.1"] {
            let refused = world.a.as_(Who::App, || TcpListener::bind((address, port)).unwrap_err());
            assert_eq!(refused.raw_os_error(), Some(libc::EPERM), "{address} {port}");
            drop(world.a.listen(Who::Sidecar, address, port));
        }
        drop(world.a.as_(Who::App, || std::net::UdpSocket::bind(("0.0.0.0", port)).unwrap()));
        drop(world.b.listen(Who::App, "::", port));
    }
    drop(world.a.listen(Who::App, "::", 0));
    assert_eq!(kernel.counters(world.a.cookie).unwrap().unwrap().of(Counter::OwnPortBindRefused), 20);
}

#[test]
fn the_sidecars_user_is_nobody_without_its_cgroup() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let to = world.b.both(7777)[0];
    let user = rustix::process::Uid::from_raw(1_900_000_001);
    // Nobody listens for the pod's connections, so each is refused; and nobody may declare a client.
    let refused = world.a.as_(Who::App, || {
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        let declared = declare(&Socket::new(Domain::IPV4, Type::STREAM, None).unwrap(), to).unwrap_err();
        assert_eq!(declared.raw_os_error(), Some(libc::ENOPROTOOPT));
        TcpStream::connect_timeout(&to, Duration::from_secs(5)).unwrap_err()
    });
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(kernel.counters(world.a.cookie).unwrap().unwrap().of(Counter::Redirected), 1);
}

#[test]
fn pod_whose_link_cannot_be_watched_says_why_and_does_not_enforce() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    for (links, told) in [
        (&[][..], "no device of this node"),
        (&[999_999], "or_link"),
        (&[999_991, 999_992, 999_993, 999_994, 999_995], "5 links"),
    ] {
        let watch = world.a.try_enrol(&mut kernel, &mode(false), links).unwrap();
        assert!(matches!(&watch, Watch::Not(reason) if reason.contains(told)), "{watch:?}");
    }
    // One that was enrolled stays so; one that is new is not enrolled without what its owner insists on.
    let refused = world.a.try_enrol(&mut kernel, &mode(true), &[]).unwrap_err();
    assert!(refused.remedy().contains("outrigger.dev/capture"), "{refused}");
    assert_eq!(kernel.enrolled().unwrap().len(), 1);
    kernel.withdraw(world.a.cookie).unwrap();
    assert!(matches!(world.a.try_enrol(&mut kernel, &mode(true), &[999_999]), Err(KernelError::NotWatched { .. })));
    assert_eq!(kernel.enrolled().unwrap(), []);
}

#[test]
fn nothing_of_a_watched_link_stays_behind_and_the_agents_restart_leaves_it_watched() {
    let Some(world) = World::with_watched_links() else { return };
    let mut kernel = world.open();
    let links = || {
        let data = aya::maps::MapData::from_pin(world.pins.join(proxy_common::pods::LINKS)).unwrap();
        let links: aya::maps::HashMap<_, u32, u64> = aya::maps::Map::HashMap(data).try_into().unwrap();
        links.keys().count()
    };
    enrol_watched(&world, &mut kernel, &mode(false));
    drop(kernel);
    send_raw(&world, false);
    // Other options are another build, whose program takes the place of the former.
    let mut kernel = Kernel::open(&world.pins, &world.root, Options { log: true, ..Options::default() }).unwrap();
    send_raw(&world, false);
    within_a_second(|| seen(&kernel, &world), [2, 0, 0, 0]);
    enrol_watched(&world, &mut kernel, &mode(true));
    send_raw(&world, false);
    within_a_second(|| seen(&kernel, &world), [3, 0, 0, 1]);
    assert_eq!(links(), 1);
    kernel.withdraw(world.a.cookie).unwrap();
    assert_eq!(links(), 0);
    assert!(!world.pins.join(format!("or_link_{}_0", world.a.cookie)).exists());
    assert_eq!(kernel.counters(world.a.cookie).unwrap().map(|counters: Counters| counters.0.len()), None);
}
