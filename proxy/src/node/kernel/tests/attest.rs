//! Whoever takes a program off, or puts another one in its place, is found out at the next look.

use super::*;
use crate::node::device;

/// A pod with a watched link; the pins of everything that is attached for it and for the node.
fn attached(world: &World, kernel: &mut Kernel) -> Vec<(Program, PathBuf)> {
    let netns = File::open(Path::new("/run/netns").join(&world.a.netns)).unwrap();
    world.b.as_(Who::App, || {
        let links = device::nodes_ends(&netns).unwrap();
        assert_eq!(world.a.try_enrol(kernel, &CaptureConfig::default(), &links).unwrap(), Watch::Watched);
    });
    let of_node = programs::NODE.map(|program| (program, world.pins.join(link_pin(program))));
    let of_pod = pod_programs().map(|program| (program, kernel.pod_pin(program, world.a.cookie)));
    let link = (programs::LINK, kernel.device_pin(world.a.cookie, 0));
    of_node.into_iter().chain(of_pod).chain([link]).collect()
}

fn faults(kernel: &Kernel, world: &World) -> Vec<String> {
    // Where the node's ends of the links are.
    let of_pod = world.b.as_(Who::App, || kernel.attest_pod(world.a.cookie).unwrap());
    let found = [kernel.attest_node().unwrap(), of_pod].concat();
    found.iter().map(ToString::to_string).collect()
}

/// Detaches what is pinned there, and leaves the pin.
fn take_off(pin: &Path) {
    let link = links::open(pin).unwrap().unwrap();
    links::detach(pin).unwrap();
    links::pin(link.as_fd(), pin).unwrap();
}

#[test]
fn each_program_that_is_taken_off_is_missed_by_name() {
    let Some(world) = World::with_watched_links() else { return };
    let mut kernel = world.open();
    let attached = attached(&world, &mut kernel);
    assert_eq!((attached.len(), faults(&kernel, &world)), (14, Vec::new()));
    for (missing, (program, pin)) in attached.iter().enumerate() {
        // Detached, the pin left where it is; then without its pin.
        take_off(pin);
        let found = faults(&kernel, &world);
        assert_eq!(found.len(), missing + 1, "{found:?}");
        let gone = format!("the program {} is not attached any more", program.name);
        assert!(found.contains(&gone), "no {gone} in {found:?}");
        links::unpin(pin).unwrap();
        let gone = format!("the program {} is not attached, its pin is gone", program.name);
        assert!(faults(&kernel, &world).contains(&gone), "no {gone}");
    }
    // An agent that starts attaches all of it again, also where a pin holds a link that leads nowhere.
    for again in 0..2 {
        if again == 1 {
            take_off(&world.pins.join("link_or_connect4"));
        }
        kernel = world.open();
        self::attached(&world, &mut kernel);
        assert_eq!(faults(&kernel, &world), Vec::<String>::new(), "{again}");
    }
    // Another pod's are its own, and one that is not enrolled has none.
    assert_eq!(kernel.attest_pod(world.b.cookie).unwrap(), []);
}

#[test]
fn whatever_is_taken_off_or_replaced_is_put_back_and_captures() {
    let Some(world) = World::with_watched_links() else { return };
    let mut kernel = world.open();
    let attached = attached(&world, &mut kernel);
    let other = World::new().unwrap();
    drop(other.open());
    let v4 = world.a.listen(Who::Sidecar, "127.0.0.1", PORT_OUTBOUND);
    for (program, pin) in &attached {
        let foreign = links::open(&other.pins.join(program_pin(*program))).unwrap().unwrap();
        let off = || take_off(pin);
        let replaced = || links::update(links::open(pin).unwrap().unwrap().as_fd(), foreign.as_fd()).unwrap();
        // Without its pin alone it would be gone a moment later.
        let unpinned = || links::detach(pin).unwrap();
        let forgotten = || links::unpin(&world.pins.join(program_pin(*program))).unwrap();
        let harms: [&dyn Fn(); 4] = [&off, &replaced, &unpinned, &forgotten];
        for harm in harms {
            harm();
            assert_eq!(faults(&kernel, &world).len(), 1, "{}", program.name);
            kernel.mend_node().unwrap();
            self::attached(&world, &mut kernel);
            assert_eq!(faults(&kernel, &world), Vec::<String>::new(), "{}", program.name);
        }
    }
    let to = world.b.both(7777)[0];
    let _app = world.a.connect(Who::App, to).unwrap();
    assert_eq!(accept(&v4).0.local_addr().unwrap(), to);
}

#[test]
fn programs_that_would_know_no_pod_are_not_attached() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    links::unpin(&world.pins.join(proxy_common::pods::PODS)).unwrap();
    links::unpin(&world.pins.join("link_or_connect4")).unwrap();
    assert!(kernel.mend_node().unwrap_err().to_string().contains("PODS"));
    assert_eq!(kernel.attest_node().unwrap().len(), 1);
}

#[test]
fn another_program_in_the_place_of_ours_is_found_out() {
    let Some(world) = World::with_watched_links() else { return };
    let mut kernel = world.open();
    let attached = attached(&world, &mut kernel);
    let other = World::new().unwrap();
    drop(other.open());
    for (count, (program, pin)) in attached.iter().enumerate() {
        let foreign = links::open(&other.pins.join(program_pin(*program))).unwrap().unwrap();
        links::update(links::open(pin).unwrap().unwrap().as_fd(), foreign.as_fd()).unwrap();
        let found = faults(&kernel, &world);
        assert_eq!(found.len(), count + 1);
        assert!(found.contains(&format!("another program is in the place of {}", program.name)), "{found:?}");
    }
}
