//! What the kernel says of connections when they close, and what it could not say.

use std::cell::Cell;

use aya::maps::{Array, Map, MapData};
use proxy_common::arrivals::{ARRIVALS, Arrived};
use proxy_common::flows::{End, Flow};

use super::*;

#[tokio::test]
async fn flow_record_tells_of_both_ends_when_a_connection_closes() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let listener = world.b.enrol_with_listener(&mut kernel);
    let mut flows = kernel.flows().unwrap();
    let to = world.b.both(7777)[0];
    let mut caller = world.a.dial(to, None).unwrap();
    let port = caller.local_addr().unwrap().port();
    let (mut called, _) = accept(&world, &listener);
    caller.write_all(&[7; 1000]).unwrap();
    called.read_exact(&mut [0; 1000]).unwrap();
    called.write_all(&[7; 300]).unwrap();
    caller.read_exact(&mut [0; 300]).unwrap();
    drop((caller, called));
    let [inbound, outbound] = two_records(&mut flows).await;
    assert_eq!((inbound.netns, outbound.netns), (world.b.cookie, world.a.cookie));
    // SYN and FIN count for a byte each, as far as they were acknowledged.
    for (bytes, least) in
        [(inbound.received_bytes, 1000), (outbound.sent_bytes, 1000), (inbound.sent_bytes, 300), (outbound.received_bytes, 300)]
    {
        assert!((least..=least + 2).contains(&bytes), "{bytes} of {least}");
    }
    assert_eq!((IpAddr::from(inbound.local), inbound.local_port), (to.ip(), 7777));
    assert_eq!((IpAddr::from(outbound.remote), outbound.remote_port), (to.ip(), 7777));
    assert_eq!((inbound.remote_port, outbound.local_port), (port, port));
    assert!(outbound.srtt_us > 0 && outbound.duration_ns > 0);
    assert_eq!((inbound.end, outbound.end), (End::Finished as u16, End::Finished as u16));
}

/// Taken as a sidecar takes it.
fn accept(world: &World, listener: &TcpListener) -> (TcpStream, SocketAddr) {
    world.b.as_(Who::Sidecar, || super::accept(listener))
}

/// The places for connections that came in.
fn arrivals(world: &World) -> Array<MapData, [u64; 3]> {
    Map::Array(MapData::from_pin(world.pins.join(ARRIVALS)).unwrap()).try_into().unwrap()
}

/// How many of them are taken.
fn taken(arrivals: &Array<MapData, [u64; 3]>) -> usize {
    arrivals.iter().map(Result::unwrap).filter(|place| place[0] != 0).count()
}

#[test]
fn nothing_is_kept_of_a_connection_that_is_closed() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let listener = world.b.enrol_with_listener(&mut kernel);
    let arrivals = arrivals(&world);
    let call = |port| (world.a.connect(Who::App, (world.b.v4, port)).unwrap(), accept(&world, &listener).0);
    let open: Vec<_> = (7000..7020).map(call).collect();
    assert_eq!(taken(&arrivals), 20);
    // Half of them by the one side first, half by the other.
    for (number, (caller, called)) in open.into_iter().enumerate() {
        if number % 2 == 0 {
            drop((caller, called));
        } else {
            drop((called, caller));
        }
    }
    for _ in 0..100 {
        if taken(&arrivals) == 0 {
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
    panic!("{} are kept", taken(&arrivals));
}

#[tokio::test]
async fn a_connection_that_is_cut_short_before_it_is_accepted_is_told_of_once_and_nothing_is_kept_of_it() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let listener = world.b.enrol_with_listener(&mut kernel);
    let mut flows = kernel.flows().unwrap();
    let caller = world.a.connect(Who::App, world.b.both(7777)[0]).unwrap();
    SockRef::from(&caller).set_linger(Some(Duration::ZERO)).unwrap();
    drop(caller);
    let (called, _) = accept(&world, &listener);
    drop(called);
    let lost = || kernel.counters(world.b.cookie).unwrap().unwrap().of(Counter::FlowLost);
    let mut records = 0;
    for _ in 0..100 {
        records += u64::from(flows.take().is_some());
        if records + lost() > 0 && taken(&arrivals(&world)) == 0 {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!((records + lost(), taken(&arrivals(&world))), (1, 0));
}

/// Of nobody's socket.
const ANOTHER: [u64; 3] = [u64::MAX, 0, 0];

/// A connection into `b`: who calls, who is called, and the place that is the latter's by its cookie.
fn call(world: &World, listener: &TcpListener) -> (TcpStream, TcpStream, u32) {
    let caller = world.a.connect(Who::App, world.b.both(7777)[0]).unwrap();
    let (called, _) = accept(world, listener);
    let place = Arrived::place(rustix::net::sockopt::socket_cookie(&called).unwrap());
    (caller, called, place)
}

#[tokio::test]
async fn a_connection_whose_place_is_taken_ends_in_a_record_as_well() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let listener = world.b.enrol_with_listener(&mut kernel);
    let mut flows = kernel.flows().unwrap();
    let mut arrivals = arrivals(&world);
    // The next cookie is the last one and one more, unless the next connection is met by another processor.
    for _ in 0..200 {
        let (caller, called, last) = call(&world, &listener);
        drop((caller, called));
        assert_eq!(record(&mut flows).await.netns, world.b.cookie);
        let next = (1..=128).map(|ahead| Arrived::place(u64::from(last) + ahead));
        next.clone().for_each(|place| arrivals.set(place, ANOTHER, 0).unwrap());
        let (caller, called, place) = call(&world, &listener);
        let is_taken = arrivals.get(&place, 0).unwrap() == ANOTHER;
        let port = caller.local_addr().unwrap().port();
        drop((caller, called));
        let flow = record(&mut flows).await;
        assert_eq!((flow.netns, flow.remote_port, flow.end), (world.b.cookie, port, End::Finished as u16));
        assert!(flow.duration_ns > 0 && flow.duration_ns < 10_000_000_000, "{}", flow.duration_ns);
        assert_eq!(arrivals.get(&place, 0).unwrap()[0], if is_taken { u64::MAX } else { 0 });
        next.for_each(|place| arrivals.set(place, [0; 3], 0).unwrap());
        if is_taken {
            assert_eq!(kernel.counters(world.b.cookie).unwrap().unwrap().of(Counter::FlowLost), 0);
            return;
        }
    }
    panic!("no connection met a place that is taken");
}

#[test]
fn a_connection_that_lost_its_place_to_another_one_is_counted_and_leaves_that_one_alone() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let listener = world.b.enrol_with_listener(&mut kernel);
    let mut arrivals = arrivals(&world);
    let (caller, called, place) = call(&world, &listener);
    arrivals.set(place, ANOTHER, 0).unwrap();
    drop((caller, called));
    let lost = || kernel.counters(world.b.cookie).unwrap().unwrap().of(Counter::FlowLost);
    for _ in 0..100 {
        if lost() == 1 {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!((lost(), arrivals.get(&place, 0).unwrap()), (1, ANOTHER));
}

/// The next record.
async fn record(flows: &mut Flows) -> Flow {
    tokio::time::timeout(Duration::from_secs(10), flows.next()).await.unwrap().unwrap()
}

/// The next records, the one of who was called first.
async fn two_records(flows: &mut Flows) -> [Flow; 2] {
    let mut records = Vec::new();
    for _ in 0..2 {
        records.push(record(flows).await);
    }
    records.sort_unstable_by_key(|flow| flow.direction);
    records.try_into().unwrap()
}

#[tokio::test]
async fn a_flow_record_tells_whether_a_connection_was_cut_short_or_given_up() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let listener = world.b.enrol_with_listener(&mut kernel);
    let mut flows = kernel.flows().unwrap();
    let to = world.b.both(7777)[0];
    // Closed with bytes that nobody read.
    let mut caller = world.a.dial(to, None).unwrap();
    let (called, _) = accept(&world, &listener);
    caller.write_all(&[7; 1000]).unwrap();
    thread::sleep(Duration::from_millis(100));
    drop(called);
    thread::sleep(Duration::from_millis(100));
    drop(caller);
    assert_eq!(two_records(&mut flows).await.map(|flow| flow.end), [End::Reset as u16; 2]);
    // The other side is not there any more.
    let mut caller = world.a.dial(to, None).unwrap();
    let (called, _) = accept(&world, &listener);
    SockRef::from(&caller).set_tcp_user_timeout(Some(Duration::from_millis(500))).unwrap();
    ip(&["-n", &world.b.netns, "addr", "del", &format!("{}/24", world.b.v4), "dev", "eth0"]);
    caller.write_all(&[7; 1000]).unwrap();
    let flow = record(&mut flows).await;
    assert_eq!((flow.netns, flow.end), (world.a.cookie, End::TimedOut as u16));
    assert!(flow.retransmits > 0);
    drop(called);
}

#[tokio::test]
async fn flow_records_that_nobody_reads_in_time_are_counted_and_later_ones_come() {
    let Some(world) = World::new() else { return };
    let tiny = 4096;
    let options = Options { flows_bytes: Some(tiny), ..Options::default() };
    let mut kernel = Kernel::open(&world.pins, &world.root, options).unwrap();
    world.a.enrol(&mut kernel);
    let mut flows = kernel.flows().unwrap();
    greet(world.b.listen(Who::App, "::", 7777));
    let to = world.b.both(7777)[0];
    let many = 200;
    let dial = |times: usize| {
        world.a.as_(Who::Sidecar, || {
            for _ in 0..times {
                let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5)).unwrap();
                stream.read_exact(&mut [0; 5]).unwrap();
            }
        });
    };
    dial(many);
    // Sockets that wait for the other side's end close a little later.
    let lost = |kernel: &Kernel| kernel.counters(world.a.cookie).unwrap().unwrap().of(Counter::FlowLost);
    let taken = Cell::new(0);
    let mut complete = || {
        while flows.take().is_some() {
            taken.set(taken.get() + 1);
        }
        taken.get() + usize::try_from(lost(&kernel)).unwrap()
    };
    thread::sleep(Duration::from_millis(200));
    for _ in 0..100 {
        if complete() == many {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(complete(), many, "{} lost", lost(&kernel));
    let before = lost(&kernel);
    // As many as fit came, and no more.
    let fit = usize::try_from(tiny).unwrap() / size_of::<Flow>();
    assert!((many - fit..many).contains(&usize::try_from(before).unwrap()), "{before} of {many}");
    dial(10);
    thread::sleep(Duration::from_millis(200));
    assert_eq!((complete(), lost(&kernel)), (many + 10, before));
}
