//! What the programs did, counted per pod and per CPU.

/// Cookie of a pod's network namespace -> [`Counters`] of each CPU. User space makes the entry at enrolment.
pub const COUNTERS: &str = "COUNTERS";

/// What is counted.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[repr(u32)]
pub enum Counter {
    /// A connection of the app sent to its sidecar.
    Redirected = 0,
    /// A connection of the app to an IPv6 link-local address, refused.
    LinkLocalRefused = 1,
    /// A connection refused because the kernel had no memory to note it.
    NotNoted = 2,
    /// A connection that the sidecar accepted, its original destination found.
    OriginalFound = 3,
    /// The same, the original destination missing.
    OriginalMissing = 4,
    /// A connection from outside given to the sidecar.
    Steered = 5,
    /// A connection from outside dropped because no sidecar listens.
    NoListener = 6,
    /// A connection from outside to a port of the sidecar's own, dropped.
    OwnPortRefused = 7,
    /// A connection from outside to a port that passes the sidecar by.
    Excluded = 8,
    /// A packet from the pod's address to itself that is no connection of its sidecar, dropped.
    ForeignOwnDial = 9,
    /// A connection of the sidecar to its app.
    OwnDial = 10,
    /// A connection of the sidecar to its app that the kernel had no room to note; it is dropped.
    OwnDialNotNoted = 11,
    /// A connection of the pod to itself given to its sidecar.
    SelfSteered = 12,
    /// The true client shown to the app.
    ClientShown = 13,
    /// The true client not shown, for want of memory.
    ClientLost = 14,
    /// A flow record lost because user space is slow, or not begun.
    FlowLost = 15,
    /// A connection of the app refused because its socket is bound to a device that it may not be taken from.
    DeviceRefused = 16,
    /// A connection of the app to an excluded port.
    ExcludedOutboundPort = 17,
    /// A connection of the app to an excluded network.
    ExcludedOutboundCidr = 18,
    /// A connection from outside to an excluded port.
    ExcludedInboundPort = 19,
    /// A connection that a raw or packet socket begins.
    RawSocket = 20,
    /// A connection of a TCP socket that no program saw connect.
    UncapturedSocket = 21,
    /// A connection that no socket of the pod begins: the pod forwards it.
    NoSocket = 22,
    /// One of the three above that was dropped.
    BypassDropped = 23,
    /// A listener of the app at a port of the sidecar's own, refused.
    OwnPortBindRefused = 24,
    /// A connection of the app that was sent to its sidecar and never began: no port was left for it.
    NoPort = 25,
}

/// How many there are.
pub const COUNTERS_LEN: usize = 26;

/// One count per [`Counter`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(transparent)]
pub struct Counters(pub [u64; COUNTERS_LEN]);

const _: () = assert!(size_of::<Counters>() == 8 * COUNTERS_LEN);

impl Counter {
    /// All of them, in order.
    pub const ALL: [Self; COUNTERS_LEN] = [
        Self::Redirected,
        Self::LinkLocalRefused,
        Self::NotNoted,
        Self::OriginalFound,
        Self::OriginalMissing,
        Self::Steered,
        Self::NoListener,
        Self::OwnPortRefused,
        Self::Excluded,
        Self::ForeignOwnDial,
        Self::OwnDial,
        Self::OwnDialNotNoted,
        Self::SelfSteered,
        Self::ClientShown,
        Self::ClientLost,
        Self::FlowLost,
        Self::DeviceRefused,
        Self::ExcludedOutboundPort,
        Self::ExcludedOutboundCidr,
        Self::ExcludedInboundPort,
        Self::RawSocket,
        Self::UncapturedSocket,
        Self::NoSocket,
        Self::BypassDropped,
        Self::OwnPortBindRefused,
        Self::NoPort,
    ];

    /// Those of connections that got past the sidecar. The sidecar's own port for metrics is none: it ends there.
    pub const BYPASSES: [Self; 6] = [
        Self::ExcludedOutboundPort,
        Self::ExcludedOutboundCidr,
        Self::ExcludedInboundPort,
        Self::RawSocket,
        Self::UncapturedSocket,
        Self::NoSocket,
    ];

    /// Its name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Redirected => "redirected",
            Self::LinkLocalRefused => "link_local_refused",
            Self::NotNoted => "not_noted",
            Self::OriginalFound => "original_found",
            Self::OriginalMissing => "original_missing",
            Self::Steered => "steered",
            Self::NoListener => "no_listener",
            Self::OwnPortRefused => "own_port_refused",
            Self::Excluded => "excluded",
            Self::ForeignOwnDial => "foreign_own_dial",
            Self::OwnDial => "own_dial",
            Self::OwnDialNotNoted => "own_dial_not_noted",
            Self::SelfSteered => "self_steered",
            Self::ClientShown => "client_shown",
            Self::ClientLost => "client_lost",
            Self::FlowLost => "flow_lost",
            Self::DeviceRefused => "device_refused",
            Self::ExcludedOutboundPort => "excluded_outbound_port",
            Self::ExcludedOutboundCidr => "excluded_outbound_cidr",
            Self::ExcludedInboundPort => "excluded_inbound_port",
            Self::RawSocket => "raw_socket",
            Self::UncapturedSocket => "uncaptured_socket",
            Self::NoSocket => "no_socket",
            Self::BypassDropped => "bypass_dropped",
            Self::OwnPortBindRefused => "own_port_bind_refused",
            Self::NoPort => "no_port",
        }
    }
}

impl Counters {
    /// Nothing counted.
    pub const ZERO: Self = Self([0; COUNTERS_LEN]);

    /// One count.
    pub fn of(&self, counter: Counter) -> u64 {
        self.0.get(counter as usize).copied().unwrap_or_default()
    }
}

#[cfg(feature = "user")]
// SAFETY: an array of integers.
#[expect(unsafe_code, reason = "aya asks for the promise that the type is plain bytes")]
unsafe impl aya::Pod for Counters {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_stands_at_its_own_index() {
        for (index, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, index);
        }
    }

    #[test]
    fn no_two_counters_share_a_name() {
        let mut names: Vec<_> = Counter::ALL.map(Counter::name).to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), COUNTERS_LEN);
    }
}
