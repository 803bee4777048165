//! A cgroup2 root that is not the machine's: a container's that has a cgroup namespace of its own sees its part as the whole.

use std::process::Stdio;

use rustix::mount::{MountPropagationFlags, mount_change};

use super::*;

/// The cgroup that is to be the root.
const NEST: &str = "OUTRIGGER_TEST_NEST";

/// Its own process, since all threads of one are in the same cgroup that is no threaded one.
#[test]
#[ignore = "run by the test below, in a cgroup that becomes the root"]
fn inside_the_nest() {
    let Some(nest) = std::env::var_os(NEST) else { return };
    let outside = find_cgroup2().unwrap();
    fs::write(Path::new(&nest).join("cgroup.procs"), "0").unwrap();
    // SAFETY: the call takes a number, and is this thread's own business and of those that it starts.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWCGROUP | libc::CLONE_NEWNS) }, 0, "{}", io::Error::last_os_error());
    // Nothing that is mounted or unmounted here is so anywhere else.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    rustix::mount::unmount(&outside, UnmountFlags::DETACH).unwrap();
    rustix::mount::mount("none", &outside, "cgroup2", MountFlags::empty(), c"").unwrap();
    let Some(world) = World::new() else { return };
    let above = Path::new(&nest).file_name().unwrap();
    assert!(!world.root.join(above).exists(), "the whole hierarchy is seen");
    let mut kernel = world.open();
    world.a.enrol(&mut kernel);
    let inbound = world.b.enrol_with_listener(&mut kernel);
    let sidecar = world.a.listen(Who::Sidecar, "127.0.0.1", PORT_OUTBOUND);
    let to = world.b.both(7777)[0];
    let app = world.a.connect(Who::App, to).unwrap();
    let (taken, _) = accept(&sidecar);
    assert_eq!((app.peer_addr().unwrap(), taken.local_addr().unwrap()), (to, to));
    let _dialled = world.a.dial(to, None).unwrap();
    assert_eq!(accept(&inbound).0.local_addr().unwrap().port(), 7777);
    let client = "192.0.2.9:9".parse().unwrap();
    let served = world.b.listen(Who::App, "::", 7777);
    let _upstream = world.b.dial(to, Some(client)).unwrap();
    let (_, from) = accept(&served);
    assert_eq!(SocketAddr::new(from.ip().to_canonical(), from.port()), client);
}

#[test]
fn below_a_nested_cgroup_root_a_pod_is_captured_as_below_the_machines() {
    if !may_load() {
        return;
    }
    let nest = find_cgroup2().unwrap().join(sweep::name());
    fs::create_dir(&nest).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "--ignored", "--nocapture", "node::kernel::tests::nested::inside_the_nest"]);
    let output = child.env(NEST, &nest).stdin(Stdio::null()).output().unwrap();
    remove_cgroup(&nest);
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    assert!(!nest.exists(), "something of it is left");
}
