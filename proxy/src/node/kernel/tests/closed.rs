//! A pod in quarantine: nothing of IP comes in or goes out, by whatever socket, until it is let out.

use std::io::{Read as _, Write as _};
use std::net::UdpSocket;
use std::time::Duration;

use super::*;

#[test]
fn a_closed_pod_neither_sends_nor_receives_and_what_was_open_stands_still() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let (pod, peer) = (&world.a, &world.b);
    let inside = pod.listen(Who::App, "::", 8080);
    let outside = peer.listen(Who::App, "::", 8080);
    let mut open = pod.connect(Who::App, peer.both(8080)[0]).unwrap();
    let (mut other_end, _) = outside.accept().unwrap();
    let datagrams = peer.as_(Who::App, || UdpSocket::bind("0.0.0.0:5300").unwrap());
    datagrams.set_read_timeout(Some(Duration::from_millis(300))).unwrap();

    kernel.close_pod("0a-1", pod.cgroup(Who::App)).unwrap();
    kernel.close_pod("0a-1", pod.cgroup(Who::App)).unwrap();
    assert_eq!(kernel.closed_pods().unwrap(), ["0a-1"]);
    for to in peer.both(8080) {
        let refused = pod.as_(Who::App, || TcpStream::connect_timeout(&to, Duration::from_millis(300)));
        assert!(refused.is_err(), "{to}");
    }
    for to in pod.both(8080) {
        let refused = peer.as_(Who::App, || TcpStream::connect_timeout(&to, Duration::from_millis(300)));
        assert!(refused.is_err(), "{to}");
    }
    let sent = pod.as_(Who::App, || UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"out", (peer.v4, 5300)));
    assert!(sent.is_err() && datagrams.recv_from(&mut [0; 8]).is_err());
    drop(open.write_all(b"out"));
    other_end.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(other_end.read(&mut [0; 8]).is_err(), "a connection from before carries nothing");

    // It needs no agent, and another one finds it.
    drop(kernel);
    let kernel = world.open();
    assert_eq!(kernel.closed_pods().unwrap(), ["0a-1"]);
    kernel.open_pod("0a-1").unwrap();
    kernel.open_pod("0a-1").unwrap();
    assert!(kernel.closed_pods().unwrap().is_empty());
    assert!(peer.connect(Who::App, pod.both(8080)[1]).is_ok());
    drop(inside);
}
