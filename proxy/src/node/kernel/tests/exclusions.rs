//! What a pod's owner takes out of capture passes its sidecar by, is counted by its reason, and is nothing more than that.

use super::*;

fn capture(outbound_ports: &[u16], outbound_cidrs: &[&str], inbound_ports: &[u16]) -> CaptureConfig {
    CaptureConfig {
        outbound_ports: outbound_ports.iter().copied().collect(),
        outbound_cidrs: outbound_cidrs.iter().map(|network| network.parse().unwrap()).collect(),
        inbound_ports: inbound_ports.iter().copied().collect(),
        enforce: false,
    }
}

/// Excluded connections of a pod: by outbound port, by outbound network, by inbound port.
fn counted(kernel: &Kernel, side: &Side) -> [u64; 3] {
    let counters = kernel.counters(side.cookie).unwrap().unwrap();
    [Counter::ExcludedOutboundPort, Counter::ExcludedOutboundCidr, Counter::ExcludedInboundPort]
        .map(|counter| counters.of(counter))
}

/// Goes past the sidecar, which answers nobody: whatever is not excluded is refused.
#[track_caller]
fn passes(world: &World, to: SocketAddr, expected: bool) {
    assert_eq!(world.a.greets(Who::App, to), expected, "{to}");
}

#[test]
fn excluded_ports_and_networks_pass_the_sidecar_by() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    greet(world.b.listen(Who::App, "::", 7777));
    greet(world.b.listen(Who::App, "::", 7778));
    let [v4, v6] = world.b.both(7777);
    let mapped = SocketAddr::from((world.b.v4.to_ipv6_mapped(), 7777));
    world.a.enrol(&mut kernel);
    for to in [v4, v6, mapped] {
        passes(&world, to, false);
    }
    world.a.enrol_as(&mut kernel, &capture(&[7777], &[], &[]));
    for to in [v4, v6, mapped] {
        passes(&world, to, true);
        passes(&world, SocketAddr::new(to.ip(), 7778), false);
    }
    assert_eq!(counted(&kernel, &world.a), [3, 0, 0]);
    // The longest prefix of the address's own family counts: all of IPv6 holds no IPv4.
    for (networks, expected) in [
        (&["10.77.0.0/24"][..], [true, false, true]),
        (&["10.77.0.2/32"], [true, false, true]),
        (&["10.77.0.3/32", "10.78.0.0/16"], [false, false, false]),
        (&["::/0"], [false, true, false]),
        (&["0.0.0.0/0"], [true, false, true]),
        (&["fd77::/64", "10.77.0.0/31"], [false, true, false]),
    ] {
        world.a.enrol_as(&mut kernel, &capture(&[], networks, &[]));
        for (to, expected) in [v4, v6, mapped].into_iter().zip(expected) {
            passes(&world, to, expected);
        }
    }
    assert_eq!(counted(&kernel, &world.a), [3, 8, 0]);
    // What is no longer excluded leaves nothing behind, and neither does a pod that goes.
    world.a.enrol_as(&mut kernel, &capture(&[1, 2], &["10.0.0.0/8"], &[3]));
    assert_eq!(left(&world), [3, 1]);
    world.a.enrol(&mut kernel);
    assert_eq!(left(&world), [0, 0]);
    world.a.enrol_as(&mut kernel, &capture(&[1], &["10.0.0.0/8"], &[]));
    kernel.withdraw(world.a.cookie).unwrap();
    assert_eq!(left(&world), [0, 0]);
}

#[test]
fn an_excluded_inbound_port_is_the_apps_and_no_other_pods() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    // Before the enrolment: afterwards no app gets a port of the sidecar's own.
    greet(world.b.listen(Who::App, "::", PORT_ADMIN));
    let inbound = world.b.enrol_with_listener(&mut kernel);
    world.b.enrol_as(&mut kernel, &capture(&[], &[], &[7777, PORT_ADMIN]));
    greet(world.b.listen(Who::App, "::", 7777));
    for to in world.b.both(7777) {
        passes(&world, to, true);
    }
    nobody_at(&inbound);
    // Even where the tables held one of them, a port of the sidecar's own stays closed.
    for to in world.b.both(PORT_ADMIN) {
        passes(&world, to, false);
    }
    for to in world.b.both(7778) {
        let _steered = world.a.connect(Who::App, to).unwrap();
        drop(accept(&inbound));
    }
    assert_eq!(counted(&kernel, &world.b), [0, 0, 2]);
    // A listener that was registered before stays so.
    world.b.enrol(&mut kernel);
    let _steered = world.a.connect(Who::App, world.b.both(7777)[0]).unwrap();
    drop(accept(&inbound));
    assert_eq!(counted(&kernel, &world.b), [0, 0, 2]);
}

#[test]
fn nothing_is_excluded_of_the_pods_own_address() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol_as(&mut kernel, &capture(&[7777], &["10.77.0.0/16", "fd77::/64"], &[]));
    let listeners = ["127.0.0.1", "::1"].map(|address| world.a.listen(Who::Sidecar, address, PORT_OUTBOUND));
    for (to, listener) in world.a.both(7777).into_iter().zip(&listeners) {
        let _app = world.a.connect(Who::App, to).unwrap();
        assert_eq!(accept(listener).0.local_addr().unwrap(), to);
    }
    assert_eq!(counted(&kernel, &world.a), [0, 0, 0]);
}

/// Entries of excluded ports and of excluded networks.
fn left(world: &World) -> [usize; 2] {
    let open = |name| aya::maps::MapData::from_pin(world.pins.join(name)).unwrap();
    let ports = aya::maps::Map::HashMap(open(proxy_common::exclusions::EXCLUDED_PORTS));
    let ports: aya::maps::HashMap<_, [u32; 4], u32> = ports.try_into().unwrap();
    let cidrs = aya::maps::Map::LpmTrie(open(proxy_common::exclusions::EXCLUDED_CIDRS));
    let cidrs: aya::maps::lpm_trie::LpmTrie<_, [u32; 6], u32> = cidrs.try_into().unwrap();
    [ports.keys().count(), cidrs.keys().count()]
}
