//! Proof of capture: what the pod's app dials comes to this sidecar, and so does what others dial at the pod.
//!
//! Out: the sidecar dials an address that nobody has ([`Address::PROBE_V4`], [`Address::PROBE_V6`]), which the kernel programs
//! treat like its app's connections, though it is the sidecar's: they send it to the sidecar's own outbound listener, where it
//! must arrive with that address as its original destination. In: the node agent dials the pod at [`PORT_PROBE`], as
//! anybody does, and that must arrive at the inbound listener with that port. A token that is new for each round, and that nobody but the
//! agent hears, tells these connections from others'.
//!
//! Invariant: a connection for a reserved address ends here, whoever dialled it: dialled on, it would come back without end.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use parking_lot::Mutex;
use proxy_common::PORT_PROBE;
use proxy_common::address::Address;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};

use crate::base::handover::TOKEN_LETTERS;
use crate::base::net::BoxedIo;

/// A way into the sidecar that is proven by itself.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Way {
    OutboundV4,
    OutboundV6,
    InboundV4,
    InboundV6,
}

/// The probes that are under way.
#[derive(Debug, Default)]
pub(crate) struct Probes {
    round: Mutex<Round>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct Round {
    /// Nobody's, while there is none.
    token: Option<[u8; TOKEN_LETTERS]>,
    seen: BTreeSet<Way>,
}

impl Way {
    /// The way out that a connection of the own app came, if it is for an address that is there for probes.
    pub(super) fn out(original: SocketAddr) -> Option<Self> {
        let ip = original.ip();
        Address::from(ip).is_probe().then_some(if ip.is_ipv4() { Self::OutboundV4 } else { Self::OutboundV6 })
    }

    /// The way in that a connection to the pod came, if it is for the port that is there for probes.
    pub(super) fn into_pod(original: SocketAddr) -> Option<Self> {
        (original.port() == PORT_PROBE).then_some(Self::of_pods(original.ip()))
    }

    /// The way in of connections to an address of the pod.
    pub(super) const fn of_pods(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::InboundV4 } else { Self::InboundV6 }
    }

    /// The way out of connections that end at an outbound listener at `ip`.
    pub(super) const fn of_listener(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::OutboundV4 } else { Self::OutboundV6 }
    }

    /// Can a probe go this way where the node agent captures by that means? A ruleset lets whatever a sidecar dials out, and
    /// without capture nothing comes to it unasked.
    pub(super) fn is_provable(self, capture: &str) -> bool {
        match self {
            Self::OutboundV4 | Self::OutboundV6 => capture == "ebpf",
            Self::InboundV4 | Self::InboundV6 => capture != "explicit",
        }
    }

    /// What the sidecar dials to prove it; a way in is dialled from elsewhere.
    fn target(self) -> Option<SocketAddr> {
        let address = match self {
            Self::OutboundV4 => Address::PROBE_V4,
            Self::OutboundV6 => Address::PROBE_V6,
            Self::InboundV4 | Self::InboundV6 => return None,
        };
        Some(SocketAddr::new(address.into(), PORT_PROBE))
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutboundV4 => "outbound IPv4",
            Self::OutboundV6 => "outbound IPv6",
            Self::InboundV4 => "inbound IPv4",
            Self::InboundV6 => "inbound IPv6",
        })
    }
}

impl Probes {
    /// Begins a round; what is under way of a former one counts no more. Returns its token.
    ///
    /// # Errors
    /// There is no randomness.
    pub(super) fn begin(&self) -> io::Result<String> {
        let mut bytes = [0; TOKEN_LETTERS / 2];
        aws_lc_rs::rand::fill(&mut bytes).map_err(|_unspecified| io::Error::other("no randomness"))?;
        let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        *self.round.lock() = Round { token: token.as_bytes().try_into().ok(), seen: BTreeSet::new() };
        Ok(token)
    }

    /// Takes a connection that came by `way`, and closes it. Only one that is for the very port, and shows this round's token,
    /// proves something.
    pub(super) async fn take(&self, mut io: BoxedIo, way: Way, original: SocketAddr) {
        let mut token = [0; TOKEN_LETTERS];
        let read = timeout(READ_AT_MOST, io.read_exact(&mut token)).await;
        if !matches!(read, Ok(Ok(_whole))) || original.port() != PORT_PROBE {
            return;
        }
        let mut round = self.round.lock();
        if round.token == Some(token) {
            round.seen.insert(way);
            drop(round);
            self.arrived.notify_waiters();
        }
    }

    /// Dials for one way out.
    ///
    /// # Errors
    /// The dial failed. That it did not says nothing: it may have gone elsewhere.
    pub(super) async fn dial(&self, way: Way, token: &str) -> io::Result<()> {
        let Some(target) = way.target() else { return Ok(()) };
        let dialled = async {
            let mut stream = TcpStream::connect(target).await?;
            stream.write_all(token.as_bytes()).await?;
            // Held until it was read.
            drop(stream.read(&mut [0]).await);
            Ok(())
        };
        timeout(DIAL_AT_MOST, dialled).await.map_err(|_elapsed| io::Error::other("no answer"))?
    }

    /// Those of `ways` by which nothing came in this round, after a moment for what is still on its way. Ends the round.
    pub(super) async fn missing(&self, ways: &BTreeSet<Way>) -> BTreeSet<Way> {
        let deadline = Instant::now() + ARRIVE_AT_MOST;
        loop {
            // Before the look: what arrives between it and the wait wakes it too.
            let mut arrived = std::pin::pin!(self.arrived.notified());
            arrived.as_mut().enable();
            let missing: BTreeSet<Way> = ways.difference(&self.round.lock().seen).copied().collect();
            if missing.is_empty() || timeout_at(deadline, arrived).await.is_err() {
                self.round.lock().token = None;
                return missing;
            }
        }
    }
}

/// An own probe is read at once; others may be anybody's.
const READ_AT_MOST: Duration = Duration::from_secs(2);
const DIAL_AT_MOST: Duration = Duration::from_secs(2);
/// Between the last dial's end and its arrival at another thread of this process.
const ARRIVE_AT_MOST: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    async fn come(probes: &Probes, token: &[u8], way: Way, original: &str) {
        let (near, mut far) = duplex(64);
        far.write_all(token).await.unwrap();
        drop(far);
        probes.take(Box::new(near), way, at(original)).await;
    }

    #[test]
    fn probes_are_known_by_where_they_are_for() {
        assert_eq!(Way::out(at("192.0.2.14:14007")), Some(Way::OutboundV4));
        assert_eq!(Way::out(at("[100::14]:80")), Some(Way::OutboundV6));
        assert_eq!(Way::out(at("192.0.2.15:14007")), None);
        assert_eq!(Way::into_pod(at("10.64.0.5:14007")), Some(Way::InboundV4));
        assert_eq!(Way::into_pod(at("[fd64::5]:14007")), Some(Way::InboundV6));
        assert_eq!(Way::into_pod(at("10.64.0.5:14006")), None);
        for way in [Way::OutboundV4, Way::OutboundV6] {
            assert_eq!(Way::out(way.target().unwrap()), Some(way));
        }
    }

    #[test]
    fn only_programs_send_a_sidecars_own_dials_back_to_it() {
        let provable = |capture| [Way::OutboundV4, Way::InboundV6].map(|way| way.is_provable(capture));
        assert_eq!([provable("ebpf"), provable("nftables"), provable("explicit")], [[true, true], [false, true], [false, false]]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_shows_the_rounds_token_proves_its_way_and_nothing_else() {
        let probes = Probes::default();
        let token = probes.begin().unwrap();
        assert_eq!(token.len(), TOKEN_LETTERS);
        let all = BTreeSet::from([Way::OutboundV4, Way::OutboundV6, Way::InboundV4]);
        come(&probes, token.as_bytes(), Way::OutboundV4, "192.0.2.14:14007").await;
        // An app's own dials: without the token, with a part of it, to another port of the address.
        come(&probes, &[b'0'; TOKEN_LETTERS], Way::OutboundV6, "[100::14]:14007").await;
        come(&probes, &token.as_bytes()[1..], Way::OutboundV6, "[100::14]:14007").await;
        come(&probes, token.as_bytes(), Way::OutboundV6, "[100::14]:80").await;
        assert_eq!(probes.missing(&all).await, [Way::OutboundV6, Way::InboundV4].into());
        // Of a round that is over, and of one before it, nothing counts.
        come(&probes, token.as_bytes(), Way::InboundV4, "10.64.0.5:14007").await;
        assert_ne!(probes.begin().unwrap(), token);
        come(&probes, token.as_bytes(), Way::InboundV4, "10.64.0.5:14007").await;
        assert_eq!(probes.missing(&all).await, all);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_is_given_up() {
        let (near, _far) = duplex(64);
        let begun = Instant::now();
        Probes::default().take(Box::new(near), Way::InboundV4, at("10.64.0.5:14007")).await;
        assert_eq!(begun.elapsed(), READ_AT_MOST);
    }
}
