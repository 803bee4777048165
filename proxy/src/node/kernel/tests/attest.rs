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
    [kernel.attest_node().unwrap(), kernel.attest_pod(world.a.cookie).unwrap()].concat()
}

#[test]
fn each_program_that_is_taken_off_is_missed_by_name() {
    let Some(world) = World::with_watched_links() else { return };
    let mut kernel = world.open();
    let attached = attached(&world, &mut kernel);
    assert_eq!((attached.len(), faults(&kernel, &world)), (14, Vec::new()));
    for (missing, (program, pin)) in attached.iter().enumerate() {
        let link = links::open(pin).unwrap().unwrap();
        // Detached, the pin left where it is; then without its pin.
        links::detach(pin).unwrap();
        links::pin(link.as_fd(), pin).unwrap();
        let found = faults(&kernel, &world);
        assert_eq!(found.len(), missing + 1, "{found:?}");
        let gone = format!("the program {} is not attached any more", program.name);
        assert!(found.contains(&gone), "no {gone} in {found:?}");
        links::unpin(pin).unwrap();
        let gone = format!("the program {} is not attached, its pin is gone", program.name);
        assert!(faults(&kernel, &world).contains(&gone), "no {gone}");
    }
    // An agent that starts attaches all of it again, also where a pin holds a link that leads nowhere.
    let detached = || {
        let pin = world.pins.join("link_or_connect4");
        let link = links::open(&pin).unwrap().unwrap();
        links::detach(&pin).unwrap();
        links::pin(link.as_fd(), &pin).unwrap();
    };
    for again in 0..2 {
        if again == 1 {
            detached();
        }
        kernel = world.open();
        self::attached(&world, &mut kernel);
        assert_eq!(faults(&kernel, &world), Vec::<String>::new(), "{again}");
    }
    // Another pod's are its own, and one that is not enrolled has none.
    assert_eq!(kernel.attest_pod(world.b.cookie).unwrap(), Vec::<String>::new());
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
