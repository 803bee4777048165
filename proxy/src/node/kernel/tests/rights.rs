//! What the agent may do with three capabilities: everything that a pod needs which is enrolled by hand-over.

use rustix::thread::{CapabilitySet, CapabilitySets};

use super::*;
use crate::node::device;

/// Takes all but these from this thread.
fn keep(kept: CapabilitySet) {
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: none }).unwrap();
    assert_eq!(rustix::thread::capabilities(None).unwrap().permitted, kept);
}

#[test]
fn three_capabilities_are_enough_to_attach_enrol_attest_mend_and_withdraw() {
    let Some(world) = World::with_watched_links() else { return };
    let agents = CapabilitySet::BPF | CapabilitySet::NET_ADMIN | CapabilitySet::PERFMON;
    let listener = world.a.listen(Who::Sidecar, "::", PORT_INBOUND);
    let outbound = world.a.listen(Who::Sidecar, "127.0.0.1", PORT_OUTBOUND);
    // A thread of the node, which is where the pod's link ends here.
    world.b.as_(Who::App, || {
        keep(agents);
        let mut kernel = world.open();
        let inode = fs::metadata(Path::new("/run/netns").join(&world.a.netns)).unwrap().ino();
        assert_eq!(
            (netns::cookie_of_socket(&listener).unwrap(), netns::inode(netns::of_socket(&listener).unwrap()).unwrap()),
            (world.a.cookie, inode)
        );
        let links = device::nodes_ends(&File::open(Path::new("/run/netns").join(&world.a.netns)).unwrap()).unwrap();
        assert_eq!(world.a.try_enrol(&mut kernel, &CaptureConfig::default(), &links).unwrap(), Watch::Watched);
        kernel.register_listener(world.a.cookie, listener.as_fd()).unwrap();
        assert_eq!(kernel.netns_of(world.a.cookie).unwrap(), Some(inode));
        links::detach(&world.pins.join("link_or_connect4")).unwrap();
        links::detach(&kernel.pod_pin(programs::INBOUND, world.a.cookie)).unwrap();
        assert_eq!((kernel.attest_node().unwrap().len(), kernel.attest_pod(world.a.cookie).unwrap().len()), (1, 1));
        kernel.mend_node().unwrap();
        assert_eq!(world.a.try_enrol(&mut kernel, &CaptureConfig::default(), &links).unwrap(), Watch::Watched);
        // Another one, as after an upgrade, finds all of it.
        let kernel = world.open();
        assert!(kernel.is_adopted());
        assert_eq!((kernel.attest_node().unwrap(), kernel.attest_pod(world.a.cookie).unwrap()), (vec![], vec![]));
        assert!(kernel.counters(world.a.cookie).unwrap().is_some());
    });
    let to = world.b.both(7777)[0];
    let _app = world.a.connect(Who::App, to).unwrap();
    assert_eq!(accept(&outbound).0.local_addr().unwrap(), to);
    let _client = world.b.connect(Who::App, world.a.both(7777)[0]).unwrap();
    assert_eq!(accept(&listener).0.local_addr().unwrap().port(), 7777);
    world.b.as_(Who::App, || {
        keep(agents);
        let mut kernel = world.open();
        kernel.withdraw(world.a.cookie).unwrap();
        assert_eq!(kernel.enrolled().unwrap(), []);
    });
}

#[test]
fn a_sidecars_probe_comes_to_its_own_listener_as_its_apps_connections_do() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let listeners =
        [world.a.listen(Who::Sidecar, "127.0.0.1", PORT_OUTBOUND), world.a.listen(Who::Sidecar, "::1", PORT_OUTBOUND)];
    let probes = [Address::PROBE_V4, Address::PROBE_V6].map(|address| SocketAddr::new(address.into(), proxy_common::PORT_PROBE));
    for (to, listener) in probes.into_iter().zip(&listeners) {
        for who in [Who::Sidecar, Who::App] {
            let _probe = world.a.connect(who, to).unwrap();
            assert_eq!(accept(listener).0.local_addr().unwrap(), to, "{who:?}");
        }
        // What the sidecar dials else goes there: here nobody is.
        let beside = SocketAddr::new(to.ip(), 80);
        let _probe = world.a.connect(Who::Sidecar, beside).unwrap();
        assert_eq!(accept(listener).0.local_addr().unwrap(), beside);
        nobody_at(listener);
    }
    // Without the program it comes to nobody.
    links::detach(&world.pins.join("link_or_connect4")).unwrap();
    assert!(world.a.connect(Who::Sidecar, probes[0]).is_err());
    nobody_at(&listeners[0]);
}

#[test]
fn no_app_has_the_port_that_probes_come_to() {
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let listener = world.b.enrol_with_listener(&mut kernel);
    let refused = world.b.as_(Who::App, || TcpListener::bind(("::", proxy_common::PORT_PROBE)).unwrap_err());
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
    for to in world.b.both(proxy_common::PORT_PROBE) {
        let _dial = world.a.connect(Who::App, to).unwrap();
        assert_eq!(accept(&listener).0.local_addr().unwrap().port(), proxy_common::PORT_PROBE);
    }
}
