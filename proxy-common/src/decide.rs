//! Every decision of the kernel programs, as functions of what a context says. The programs fetch, ask here and act.

use crate::address::Address;
use crate::flows::End;
use crate::pods::Pod;
use crate::sockets::{ESTABLISHED, OWN, Role, Socket, UNSENT};
use crate::{PORT_ADMIN, PORT_INBOUND, PORT_METRICS, PORT_OUTBOUND, PORT_PROBE};

/// Who connects.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Caller {
    /// A task of the sidecar's cgroup.
    Sidecar,
    /// Any other task in the pod's network namespace.
    App,
}

impl Caller {
    /// The task of this cgroup.
    #[inline(always)]
    pub const fn of(pod: &Pod, cgroup: u64) -> Self {
        if pod.sidecar_cgroup == cgroup { Self::Sidecar } else { Self::App }
    }
}

/// What the pod's owner took out of capture, of all that a connection may match.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Excluded {
    /// Nothing.
    No,
    /// The port.
    Port,
    /// A network that holds the address.
    Cidr,
}

/// What becomes of a `connect`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Connect {
    /// It is not the mesh's business: loopback.
    Pass,
    /// It passes because its port is excluded.
    PassPort,
    /// It passes because its address is excluded.
    PassCidr,
    /// It goes to the sidecar at [`Address::LOOPBACK_V4`].
    RedirectV4,
    /// It goes to the sidecar at [`Address::LOOPBACK_V6`].
    RedirectV6,
    /// It is refused: an original destination has no room for the interface that a link-local address needs.
    RefuseLinkLocal,
    /// The sidecar connects elsewhere: it passes.
    Dial,
    /// The sidecar connects to its own pod: it passes, and is noted so that the packet's way back in is known.
    DialOwn,
}

/// Which socket sends a packet over a pod's link.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Sender {
    /// None of this machine any more, or none ever.
    Nobody,
    /// One for a stream, as TCP is.
    Stream,
    /// Any other: raw or packet.
    Other,
}

/// What a pod's TCP has for a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Held {
    /// Nobody could ask it.
    Unasked,
    /// No socket.
    Nothing,
    /// A socket that listens at this port, and accepts it or would.
    Listener(u16),
    /// A socket of its own.
    Connection,
}

/// What a packet of a TCP connection is that leaves a pod.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Leaving {
    /// The sidecar's, or excluded.
    Pass,
    /// Made by hand.
    RawSocket,
    /// Of a socket that no program saw connect: it is older than the pod's enrolment, or a program was detached.
    UncapturedSocket,
    /// Forwarded, for a namespace behind the pod.
    NoSocket,
}

/// What becomes of a TCP connection that arrives in a pod's network namespace.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Arrival {
    /// It comes from inside the pod over loopback.
    Pass,
    /// Its port is the sidecar's for everybody: metrics.
    PassMetrics,
    /// Its port is excluded.
    PassPort,
    /// Its port is one of the sidecar's own.
    DropOwnPort,
    /// It comes from the pod's own address: only with a note of its sidecar's dial, see [`decide_own`].
    Own,
    /// It goes to the sidecar, or nowhere.
    Steer,
}

/// What becomes of a packet from a pod's own address to itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OwnArrival {
    /// Its sidecar dials the app.
    Pass,
    /// The pod calls itself through its sidecar: the call comes in as every other.
    Steer,
    /// Nobody made it: a forged source, which IPv6 lets come this far, or a dial that no program saw.
    Drop,
}

/// What a socket is whose handshake was done at the accepting end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Accepted {
    /// The sidecar took a connection of its app.
    Outbound,
    /// Somebody took a connection that the sidecar made to its own pod.
    Own,
    /// The sidecar took a connection from outside.
    Inbound,
    /// Nothing of interest.
    Other,
}

/// What a socket says of its own end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OwnName {
    /// What the kernel says.
    Kernel,
    /// Where the connection that the sidecar accepted wanted to go.
    Original,
    /// The pod's address, with the kernel's port: nobody but the sidecar sees that the connection goes over loopback.
    Pod,
}

/// What is done about a socket that closes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Closed {
    /// The note of the sidecar's dial is withdrawn, if it is still there.
    ForgetOwnDial,
    /// A flow record is written, for a connection that came in.
    RecordInbound,
    /// A flow record is written, for a connection that went out.
    RecordOutbound,
    /// Nothing.
    Nothing,
}

/// Decides on a TCP `connect` in the network namespace of `pod`. Of its own address nothing is excluded: what a pod sends
/// to itself past its sidecar would be dropped at its arrival. A sidecar's own probe goes the way of its app's connections, so
/// that it proves it.
#[inline(always)]
pub fn decide_connect(pod: &Pod, caller: Caller, target: &Address, excluded: Excluded) -> Connect {
    match caller {
        Caller::Sidecar if pod.owns(target) => Connect::DialOwn,
        Caller::Sidecar if target.same(&Address::PROBE_V4) => Connect::RedirectV4,
        Caller::Sidecar if target.same(&Address::PROBE_V6) => Connect::RedirectV6,
        Caller::Sidecar => Connect::Dial,
        Caller::App if target.is_loopback() || target.is_unspecified() => Connect::Pass,
        Caller::App if excluded as u32 == Excluded::Port as u32 && !pod.owns(target) => Connect::PassPort,
        Caller::App if excluded as u32 == Excluded::Cidr as u32 && !pod.owns(target) => Connect::PassCidr,
        Caller::App if target.is_link_local_v6() => Connect::RefuseLinkLocal,
        Caller::App if target.is_v4() => Connect::RedirectV4,
        Caller::App => Connect::RedirectV6,
    }
}

/// Is `port` one of the sidecar's own?
#[inline(always)]
pub const fn is_own_port(port: u16) -> bool {
    matches!(port, PORT_OUTBOUND | PORT_INBOUND | PORT_PROBE | PORT_ADMIN | PORT_METRICS)
}

/// Decides what a packet is that begins a TCP connection over the pod's link; `noted` of the socket that sends it.
#[inline(always)]
pub fn decide_leaving(noted: Option<&Socket>, sender: Sender) -> Leaving {
    if noted.is_some_and(|socket| socket.is(Role::Upstream) || socket.is(Role::Excluded)) {
        return Leaving::Pass;
    }
    match sender {
        Sender::Nobody => Leaving::NoSocket,
        Sender::Stream => Leaving::UncapturedSocket,
        Sender::Other => Leaving::RawSocket,
    }
}

/// Decides what a packet is that accepts a TCP connection over the pod's link; `own`: from an address of the pod. What the pod's own
/// TCP accepts was let in or steered at its arrival: `held` is the sidecar's then, or `excluded`. Under a flood of connections it
/// answers without a socket (SYN cookies), by the same listener.
#[inline(always)]
pub const fn decide_accepting(sender: Sender, own: bool, held: Held, excluded: bool) -> Leaving {
    match (sender, held) {
        (Sender::Other, _) => Leaving::RawSocket,
        (Sender::Stream, _) if own => Leaving::Pass,
        (Sender::Stream, _) => Leaving::UncapturedSocket,
        (Sender::Nobody, _) if !own => Leaving::NoSocket,
        (Sender::Nobody, Held::Nothing) => Leaving::NoSocket,
        (Sender::Nobody, Held::Listener(PORT_INBOUND | PORT_METRICS) | Held::Unasked | Held::Connection) => Leaving::Pass,
        (Sender::Nobody, Held::Listener(_)) if excluded => Leaving::Pass,
        (Sender::Nobody, Held::Listener(_)) => Leaving::UncapturedSocket,
    }
}

/// Decides what a packet is of a TCP connection that stands, from the pod's own address over its link. Where a device leaves it to
/// the kernel to cut what is sent, all segments but the last lose their socket, and the pod's TCP has one for them; for what
/// is forwarded with the pod's address in place of another's it has none.
#[inline(always)]
pub const fn decide_continuing(sender: Sender, held: Held) -> Leaving {
    match (sender, held) {
        (Sender::Stream, _) | (_, Held::Connection | Held::Unasked) => Leaving::Pass,
        (Sender::Nobody, _) => Leaving::NoSocket,
        (Sender::Other, _) => Leaving::RawSocket,
    }
}

/// Decides on a TCP connection from `remote` to `local`:`port`. `over_loopback`: it came in over `lo`, which 127.0.0.0/8
/// and `::1` alone do; a connection to the pod's own address shows that address's interface. `excluded`: the pod's owner
/// took the port out of capture.
#[inline(always)]
pub fn decide_arrival(local: &Address, remote: &Address, port: u16, over_loopback: bool, excluded: bool) -> Arrival {
    if over_loopback {
        return Arrival::Pass;
    }
    match port {
        PORT_OUTBOUND | PORT_INBOUND | PORT_ADMIN => Arrival::DropOwnPort,
        _ if local.same(remote) => Arrival::Own,
        PORT_METRICS => Arrival::PassMetrics,
        _ if excluded => Arrival::PassPort,
        _ => Arrival::Steer,
    }
}

/// Decides on a packet from a pod's own address to itself; `declared` of the sidecar's note, if there is one.
#[inline(always)]
pub fn decide_own(declared: Option<bool>) -> OwnArrival {
    match declared {
        Some(true) => OwnArrival::Pass,
        Some(false) => OwnArrival::Steer,
        None => OwnArrival::Drop,
    }
}

/// Decides what a freshly accepted socket at `local`:`port` is, in the network namespace of an enrolled pod; `excluded` as
/// for [`decide_arrival`].
#[inline(always)]
pub fn decide_accepted(local: &Address, remote: &Address, port: u16, excluded: bool) -> Accepted {
    if local.is_loopback() {
        return if port == PORT_OUTBOUND { Accepted::Outbound } else { Accepted::Other };
    }
    if local.same(remote) {
        return Accepted::Own;
    }
    if port == PORT_METRICS || excluded { Accepted::Other } else { Accepted::Inbound }
}

/// Is what a sidecar accepts at `local`:`port` a connection from outside?
#[inline(always)]
pub fn decide_came_in(local: &Address, remote: &Address, port: u16) -> bool {
    matches!(decide_accepted(local, remote, port, false), Accepted::Inbound)
}

/// Is a socket whose SYN leaves for `remote`:`port` still the connection that was sent to the sidecar?
#[inline(always)]
pub fn decide_redirected(socket: &Socket, remote: &Address, port: u16) -> bool {
    socket.is(Role::App) && port == PORT_OUTBOUND && remote.is_loopback()
}

/// Decides what a socket whose own end is at `local` says of it. An app that bound its socket to an address sees that one.
#[inline(always)]
pub fn decide_own_name(socket: &Socket, local: &Address) -> OwnName {
    if socket.is(Role::Outbound) {
        OwnName::Original
    } else if socket.is(Role::App) && (local.same(&Address::LOOPBACK_V4) || local.same(&Address::LOOPBACK_V6)) {
        OwnName::Pod
    } else {
        OwnName::Kernel
    }
}

/// Is a socket that its owner lets go one that was sent to the sidecar and found no port to begin from?
#[inline(always)]
pub fn decide_unsent(socket: &Socket) -> bool {
    socket.is(Role::App) && socket.has(UNSENT)
}

/// Decides what is done about a socket that closes.
#[inline(always)]
pub fn decide_closed(socket: &Socket) -> Closed {
    if socket.is(Role::Upstream) && socket.has(OWN) {
        Closed::ForgetOwnDial
    } else if !socket.has(ESTABLISHED) {
        Closed::Nothing
    } else if socket.is(Role::Upstream) {
        Closed::RecordOutbound
    } else if socket.is(Role::Inbound) {
        Closed::RecordInbound
    } else {
        Closed::Nothing
    }
}

/// Decides how a recorded connection ended. `timed_out`: the kernel gave it up. `before` is the state that it left for CLOSE, in the kernel's numbers: in that of
/// a connection that both sides ended, or in one in the middle of it.
#[inline(always)]
pub const fn decide_end(timed_out: bool, before: u32) -> End {
    /// `include/net/tcp_states.h`.
    const FIN_WAIT2: u32 = 5;
    const TIME_WAIT: u32 = 6;
    const LAST_ACK: u32 = 9;
    const CLOSING: u32 = 11;
    if timed_out {
        End::TimedOut
    } else if matches!(before, FIN_WAIT2 | TIME_WAIT | LAST_ACK | CLOSING) {
        End::Finished
    } else {
        End::Reset
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::tests::address;
    use crate::sockets::DECLARED;

    fn pod() -> Pod {
        Pod { sidecar_cgroup: 7, v4: address("10.64.0.5"), v6: address("fd64::5"), flags: 0, number: 0, links: [0; 4] }
    }

    fn connect(caller: Caller, target: &str) -> Connect {
        decide_connect(&pod(), caller, &address(target), Excluded::No)
    }

    fn socket(role: Role, flags: u8) -> Socket {
        Socket { address: Address::NONE, since_ns: 0, port: 0, role: role as u8, flags, reserved: 0 }
    }

    #[test]
    fn an_app_goes_to_its_sidecar_in_the_family_it_speaks() {
        assert_eq!(connect(Caller::App, "10.64.0.9"), Connect::RedirectV4);
        assert_eq!(connect(Caller::App, "::ffff:10.64.0.9"), Connect::RedirectV4);
        assert_eq!(connect(Caller::App, "fd64::9"), Connect::RedirectV6);
        assert_eq!(connect(Caller::App, "169.254.169.254"), Connect::RedirectV4);
    }

    #[test]
    fn an_app_that_calls_its_own_pod_goes_to_its_sidecar() {
        assert_eq!(connect(Caller::App, "10.64.0.5"), Connect::RedirectV4);
        assert_eq!(connect(Caller::App, "fd64::5"), Connect::RedirectV6);
    }

    #[test]
    fn loopback_passes_also_by_the_unspecified_address() {
        for target in ["127.0.0.1", "127.8.8.8", "::1", "0.0.0.0", "::", "::ffff:0.0.0.0"] {
            assert_eq!(connect(Caller::App, target), Connect::Pass, "{target}");
        }
    }

    #[test]
    fn link_local_is_refused_to_apps_and_not_to_the_sidecar() {
        assert_eq!(connect(Caller::App, "fe80::1"), Connect::RefuseLinkLocal);
        assert_eq!(connect(Caller::Sidecar, "fe80::1"), Connect::Dial);
    }

    #[test]
    fn what_is_excluded_passes_but_for_the_pods_own_address() {
        let decide = |caller, target: &str, excluded| decide_connect(&pod(), caller, &address(target), excluded);
        for target in ["10.64.0.9", "fd64::9", "fe80::1"] {
            assert_eq!(decide(Caller::App, target, Excluded::Port), Connect::PassPort, "{target}");
            assert_eq!(decide(Caller::App, target, Excluded::Cidr), Connect::PassCidr, "{target}");
        }
        assert_eq!(decide(Caller::App, "10.64.0.5", Excluded::Cidr), Connect::RedirectV4);
        assert_eq!(decide(Caller::App, "fd64::5", Excluded::Port), Connect::RedirectV6);
        assert_eq!(decide(Caller::App, "127.0.0.1", Excluded::Cidr), Connect::Pass);
        assert_eq!(decide(Caller::Sidecar, "10.64.0.9", Excluded::Port), Connect::Dial);
    }

    #[test]
    fn an_excluded_port_is_the_apps_and_never_one_of_the_sidecars() {
        let (own, peer) = (address("10.64.0.5"), address("10.64.0.9"));
        assert_eq!(decide_arrival(&own, &peer, 5432, false, true), Arrival::PassPort);
        assert_eq!(decide_arrival(&own, &own, 5432, false, true), Arrival::Own);
        for port in [14001, 14006, 14020] {
            assert_eq!(decide_arrival(&own, &peer, port, false, true), Arrival::DropOwnPort, "{port}");
        }
        assert_eq!(decide_accepted(&own, &peer, 5432, true), Accepted::Other);
    }

    #[test]
    fn only_what_the_sidecar_begins_or_the_owner_excluded_leaves_unasked() {
        for sender in [Sender::Nobody, Sender::Stream, Sender::Other] {
            for role in [Role::Upstream, Role::Excluded] {
                assert_eq!(decide_leaving(Some(&socket(role, 0)), sender), Leaving::Pass);
            }
        }
        assert_eq!(decide_leaving(Some(&socket(Role::App, 0)), Sender::Stream), Leaving::UncapturedSocket);
        assert_eq!(decide_leaving(Some(&socket(Role::None, 0)), Sender::Stream), Leaving::UncapturedSocket);
        assert_eq!(decide_leaving(None, Sender::Stream), Leaving::UncapturedSocket);
        assert_eq!(decide_leaving(None, Sender::Other), Leaving::RawSocket);
        assert_eq!(decide_leaving(None, Sender::Nobody), Leaving::NoSocket);
    }

    #[test]
    fn what_accepts_a_connection_is_the_pods_own_tcp_at_its_own_address() {
        let accepting = |sender, own, held| decide_accepting(sender, own, held, false);
        let all = [Held::Unasked, Held::Nothing, Held::Connection, Held::Listener(PORT_INBOUND)];
        for held in all {
            assert_eq!([true, false].map(|own| accepting(Sender::Other, own, held)), [Leaving::RawSocket; 2]);
            assert_eq!(accepting(Sender::Stream, true, held), Leaving::Pass);
            assert_eq!(accepting(Sender::Stream, false, held), Leaving::UncapturedSocket);
            assert_eq!(accepting(Sender::Nobody, false, held), Leaving::NoSocket);
        }
        let passing = all.map(|held| accepting(Sender::Nobody, true, held) == Leaving::Pass);
        assert_eq!(passing, [true, false, true, true]);
    }

    #[test]
    fn a_listener_that_is_not_the_sidecars_accepts_what_is_excluded_alone() {
        let accepting = |port, excluded| decide_accepting(Sender::Nobody, true, Held::Listener(port), excluded);
        assert_eq!([PORT_INBOUND, PORT_METRICS].map(|port| accepting(port, false)), [Leaving::Pass; 2]);
        assert_eq!([80, PORT_OUTBOUND, PORT_ADMIN].map(|port| accepting(port, false)), [Leaving::UncapturedSocket; 3]);
        assert_eq!(accepting(80, true), Leaving::Pass);
        assert_eq!(decide_accepting(Sender::Nobody, true, Held::Nothing, true), Leaving::NoSocket);
    }

    #[test]
    fn what_continues_a_connection_is_of_a_socket_of_the_pods_tcp() {
        for held in [Held::Unasked, Held::Connection] {
            for sender in [Sender::Nobody, Sender::Stream, Sender::Other] {
                assert_eq!(decide_continuing(sender, held), Leaving::Pass);
            }
        }
        for held in [Held::Nothing, Held::Listener(PORT_INBOUND), Held::Listener(80)] {
            assert_eq!(decide_continuing(Sender::Stream, held), Leaving::Pass);
            assert_eq!(decide_continuing(Sender::Nobody, held), Leaving::NoSocket);
            assert_eq!(decide_continuing(Sender::Other, held), Leaving::RawSocket);
        }
    }

    #[test]
    fn a_sidecar_is_never_sent_to_itself() {
        for target in ["10.64.0.9", "fd64::9", "127.0.0.1", "::"] {
            assert_eq!(connect(Caller::Sidecar, target), Connect::Dial, "{target}");
        }
        assert_eq!(connect(Caller::Sidecar, "10.64.0.5"), Connect::DialOwn);
        assert_eq!(connect(Caller::Sidecar, "fd64::5"), Connect::DialOwn);
    }

    #[test]
    fn a_sidecars_probe_goes_where_its_apps_connections_go() {
        assert_eq!(connect(Caller::Sidecar, "192.0.2.14"), Connect::RedirectV4);
        assert_eq!(connect(Caller::Sidecar, "100::14"), Connect::RedirectV6);
        for port in [14001, 14006, 14007, 14020, 14021] {
            assert!(is_own_port(port), "{port}");
        }
        // It comes in as any other connection does: no port of its own is let pass or dropped.
        let (pod, node) = (address("10.64.0.5"), address("10.64.0.1"));
        assert_eq!(decide_arrival(&pod, &node, 14007, false, false), Arrival::Steer);
    }

    #[test]
    fn a_pod_without_a_family_owns_no_unspecified_address() {
        let pod = Pod { v6: Address::NONE, ..pod() };
        assert_eq!(decide_connect(&pod, Caller::Sidecar, &address("::"), Excluded::No), Connect::Dial);
    }

    #[test]
    fn what_arrives_goes_to_the_sidecar() {
        let (pod, peer) = (address("10.64.0.5"), address("10.64.0.9"));
        for port in [80, 22, 14010, 65535] {
            assert_eq!(decide_arrival(&pod, &peer, port, false, false), Arrival::Steer, "{port}");
        }
    }

    #[test]
    fn the_sidecars_own_ports_are_refused_from_outside_and_from_the_pods_own_address() {
        let pod = address("10.64.0.5");
        for remote in [address("10.64.0.9"), pod] {
            for port in [14001, 14006, 14020] {
                assert_eq!(decide_arrival(&pod, &remote, port, false, false), Arrival::DropOwnPort, "{port}");
            }
        }
    }

    #[test]
    fn a_sidecars_ports_are_those_that_are_listed() {
        assert!(crate::OWN_PORTS.into_iter().all(is_own_port));
        assert_eq!((0..=u16::MAX).filter(|port| is_own_port(*port)).count(), crate::OWN_PORTS.len());
    }

    #[test]
    fn metrics_pass_by_name_only() {
        let (pod, peer) = (address("10.64.0.5"), address("10.64.0.9"));
        assert_eq!(decide_arrival(&pod, &peer, 14021, false, false), Arrival::PassMetrics);
        assert_eq!(decide_arrival(&pod, &pod, 14021, false, false), Arrival::Own);
    }

    #[test]
    fn loopback_inside_the_pod_passes() {
        let own = address("127.0.0.1");
        assert_eq!(decide_arrival(&own, &own, 14001, true, false), Arrival::Pass);
    }

    #[test]
    fn a_packet_from_the_pods_own_address_needs_the_sidecars_note() {
        let pod = address("fd64::5");
        assert_eq!(decide_arrival(&pod, &pod, 80, false, false), Arrival::Own);
        assert_eq!(decide_own(None), OwnArrival::Drop);
        assert_eq!(decide_own(Some(true)), OwnArrival::Pass);
        assert_eq!(decide_own(Some(false)), OwnArrival::Steer);
    }

    #[test]
    fn an_accepted_socket_is_known_by_its_ends() {
        let (lo, pod, peer) = (address("127.0.0.1"), address("10.64.0.5"), address("10.64.0.9"));
        assert_eq!(decide_accepted(&lo, &lo, 14001, false), Accepted::Outbound);
        assert_eq!(decide_accepted(&lo, &pod, 14001, false), Accepted::Outbound);
        assert_eq!(decide_accepted(&lo, &lo, 5432, false), Accepted::Other);
        assert_eq!(decide_accepted(&pod, &pod, 80, false), Accepted::Own);
        assert_eq!(decide_accepted(&pod, &peer, 80, false), Accepted::Inbound);
        assert_eq!(decide_accepted(&pod, &peer, 14021, false), Accepted::Other);
    }

    #[test]
    fn only_a_redirected_connection_carries_its_destination() {
        let lo = address("127.0.0.1");
        assert!(decide_redirected(&socket(Role::App, 0), &lo, 14001));
        assert!(!decide_redirected(&socket(Role::App, 0), &lo, 5432));
        assert!(!decide_redirected(&socket(Role::Upstream, 0), &lo, 14001));
        assert!(!decide_redirected(&socket(Role::App, 0), &address("10.0.0.1"), 14001));
    }

    #[test]
    fn an_app_sees_the_pods_address_where_its_connection_goes_over_loopback() {
        for own in ["127.0.0.1", "::1"] {
            assert_eq!(decide_own_name(&socket(Role::App, 0), &address(own)), OwnName::Pod, "{own}");
            assert_eq!(decide_own_name(&socket(Role::None, 0), &address(own)), OwnName::Kernel, "{own}");
            assert_eq!(decide_own_name(&socket(Role::Outbound, 0), &address(own)), OwnName::Original, "{own}");
        }
        assert_eq!(decide_own_name(&socket(Role::App, 0), &address("10.64.0.5")), OwnName::Kernel);
        assert_eq!(pod().end_towards(&address("192.0.2.1")), Some(address("10.64.0.5")));
        assert_eq!(pod().end_towards(&address("2001:db8::1")), Some(address("fd64::5")));
        assert_eq!(Pod { v6: Address::NONE, ..pod() }.end_towards(&address("2001:db8::1")), None);
    }

    #[test]
    fn only_established_connections_with_the_outside_are_recorded() {
        assert_eq!(decide_closed(&socket(Role::Upstream, ESTABLISHED)), Closed::RecordOutbound);
        assert_eq!(decide_closed(&socket(Role::Inbound, ESTABLISHED)), Closed::RecordInbound);
        assert_eq!(decide_closed(&socket(Role::Upstream, DECLARED)), Closed::Nothing);
        assert_eq!(decide_closed(&socket(Role::Upstream, OWN | ESTABLISHED)), Closed::ForgetOwnDial);
        assert_eq!(decide_closed(&socket(Role::App, ESTABLISHED)), Closed::Nothing);
    }

    #[test]
    fn a_connection_that_is_left_in_its_middle_was_reset() {
        const STATES: [&str; 12] = [
            "",
            "established",
            "syn-sent",
            "syn-recv",
            "fin-wait-1",
            "fin-wait-2",
            "time-wait",
            "close",
            "close-wait",
            "last-ack",
            "listen",
            "closing",
        ];
        let finished: Vec<&str> = (0u32..)
            .zip(STATES)
            .filter(|(before, _)| decide_end(false, *before) == End::Finished)
            .map(|(_, name)| name)
            .collect();
        assert_eq!(finished, ["fin-wait-2", "time-wait", "last-ack", "closing"]);
        assert_eq!(decide_end(false, 1), End::Reset);
        assert_eq!(decide_end(true, 1), End::TimedOut);
    }
}
