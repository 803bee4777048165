//! What a pod's owner asks of its capture, as annotations of the pod: which connections pass its sidecar by, and what
//! becomes of those that get past it unasked.
//!
//! Invariant: an annotation of ours that nobody knows is a mistake, never a wish: `exclude-outbound-port` must not mean
//! silently what `exclude-outbound-ports` means.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proxy_common::{PORT_ADMIN, PORT_INBOUND, PORT_METRICS, PORT_OUTBOUND, PORT_PROBE};

use super::marks;
use crate::base::units::{Span, SpanError};

/// What is asked for one pod. Default: nothing is excluded, and what gets past the sidecar is counted.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct CaptureConfig {
    /// Ports that the app reaches without its sidecar.
    pub(crate) outbound_ports: BTreeSet<u16>,
    /// Networks that the app reaches without its sidecar.
    pub(crate) outbound_cidrs: BTreeSet<IpNet>,
    /// Ports at which others reach the app without its sidecar.
    pub(crate) inbound_ports: BTreeSet<u16>,
    /// What gets past the sidecar without being excluded is dropped, not only counted.
    pub(crate) enforce: bool,
}

/// Why an annotation says nothing. The user is at fault.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum CaptureError {
    #[error("annotation {0}: there is none of that name; write one of {MODE}, {ports}, {cidrs}, {inbound}", ports = OUTBOUND_PORTS, cidrs = OUTBOUND_CIDRS, inbound = INBOUND_PORTS)]
    Unknown(String),
    #[error("annotation {MODE}: {0:?} is no mode; write observe or enforce")]
    Mode(String),
    #[error("annotation {name}: {text:?} is not a port; write 1 to 65535, several with commas between them")]
    Port { name: &'static str, text: String },
    #[error(
        "annotation {name}: {text:?} is not a network; write for example 10.1.0.0/16 or fd00::/8, several with commas between them"
    )]
    Network { name: &'static str, text: String },
    #[error("annotation {name}: {port} is a port of the sidecar's own, which is never the app's")]
    OwnPort { name: &'static str, port: u16 },
    #[error("annotation {hold}: {0}", hold = marks::HOLD)]
    Hold(SpanError),
    #[error("annotation {name}: it names {found}, a pod may exclude {MOST}")]
    TooMany { name: &'static str, found: usize },
}

impl CaptureConfig {
    /// The annotations that are read here.
    pub(crate) const ANNOTATIONS: [&str; 4] = [MODE, OUTBOUND_PORTS, OUTBOUND_CIDRS, INBOUND_PORTS];

    /// Reads a pod's annotations. Those that are not ours are somebody else's, and those of the injection are read there.
    ///
    /// # Errors
    /// One of ours says nothing that can be done.
    pub(crate) fn of(annotations: &BTreeMap<String, String>) -> Result<Self, CaptureError> {
        let mut config = Self::default();
        for (name, text) in marks::ours(annotations).filter(|(name, _text)| !marks::OF_INJECTION.contains(&name.as_str())) {
            match name.as_str() {
                OUTBOUND_PORTS => config.outbound_ports = ports(OUTBOUND_PORTS, text)?,
                OUTBOUND_CIDRS => config.outbound_cidrs = networks(OUTBOUND_CIDRS, text)?,
                INBOUND_PORTS => {
                    config.inbound_ports = ports(INBOUND_PORTS, text)?;
                    if let Some(port) = config.inbound_ports.iter().find(|port| SIDECARS_PORTS.contains(port)) {
                        return Err(CaptureError::OwnPort { name: INBOUND_PORTS, port: *port });
                    }
                }
                MODE => {
                    config.enforce = match text.as_str() {
                        "enforce" => true,
                        "observe" => false,
                        _neither => return Err(CaptureError::Mode(text.clone())),
                    };
                }
                _unknown => return Err(CaptureError::Unknown(name.clone())),
            }
        }
        Ok(config)
    }

    /// One of everything, to try what it takes.
    pub(crate) fn example() -> Self {
        Self {
            outbound_ports: [1].into(),
            outbound_cidrs: [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())].into(),
            inbound_ports: [1].into(),
            enforce: false,
        }
    }

    /// Those of a pod's annotations that are ours.
    pub(crate) fn ours(annotations: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        marks::ours(annotations).map(|(name, text)| (name.clone(), text.clone())).collect()
    }

    /// How long connections wait for the pod's sidecar where its annotations say so.
    ///
    /// # Errors
    /// What they say is no duration.
    pub(crate) fn hold(annotations: &BTreeMap<String, String>) -> Result<Option<Duration>, CaptureError> {
        let Some(text) = annotations.get(marks::HOLD) else { return Ok(None) };
        // "0" says what it means; everything else has a unit.
        let span = if text == "0" { Ok(Span(Duration::ZERO)) } else { text.parse() };
        span.map(|Span(hold)| Some(hold)).map_err(CaptureError::Hold)
    }

    /// The annotation by which what the app sends to `target` passes its sidecar by. The port is asked first, as capture does.
    pub(crate) fn lets_out(&self, target: SocketAddr) -> Option<&'static str> {
        if self.outbound_ports.contains(&target.port()) {
            return Some(OUTBOUND_PORTS);
        }
        let ip = target.ip().to_canonical();
        self.outbound_cidrs.iter().any(|network| network.contains(&ip)).then_some(OUTBOUND_CIDRS)
    }

    /// The annotation by which what others send to `port` passes the sidecar by.
    pub(crate) fn lets_in(&self, port: u16) -> Option<&'static str> {
        self.inbound_ports.contains(&port).then_some(INBOUND_PORTS)
    }
}

fn ports(name: &'static str, text: &str) -> Result<BTreeSet<u16>, CaptureError> {
    let port = |text: &str| {
        let port = text.parse().ok().filter(|port| *port != 0);
        port.ok_or_else(|| CaptureError::Port { name, text: text.to_owned() })
    };
    few(name, items(text).map(port).collect::<Result<_, _>>()?)
}

fn networks(name: &'static str, text: &str) -> Result<BTreeSet<IpNet>, CaptureError> {
    let network = |text: &str| {
        // A single address stands for itself.
        let parsed = text.parse::<IpNet>().ok().or_else(|| text.parse::<std::net::IpAddr>().ok().map(IpNet::from));
        let plain = parsed.filter(|network| !matches!(network, IpNet::V6(v6) if v6.addr().to_ipv4_mapped().is_some()));
        plain.map(|network| network.trunc()).ok_or_else(|| CaptureError::Network { name, text: text.to_owned() })
    };
    few(name, items(text).map(network).collect::<Result<_, _>>()?)
}

fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim)
}

fn few<T>(name: &'static str, found: BTreeSet<T>) -> Result<BTreeSet<T>, CaptureError> {
    if found.len() > MOST as usize { Err(CaptureError::TooMany { name, found: found.len() }) } else { Ok(found) }
}

const MODE: &str = "outrigger.dev/capture";
const OUTBOUND_PORTS: &str = "outrigger.dev/exclude-outbound-ports";
const OUTBOUND_CIDRS: &str = "outrigger.dev/exclude-outbound-cidrs";
/// Ports at which others reach the app without its sidecar.
pub(crate) const INBOUND_PORTS: &str = "outrigger.dev/exclude-inbound-ports";
/// At which a pod's sidecar listens, and never its app.
pub(crate) const SIDECARS_PORTS: [u16; 5] = [PORT_OUTBOUND, PORT_INBOUND, PORT_PROBE, PORT_ADMIN, PORT_METRICS];
/// The kernel's tables hold what all pods of a node exclude.
pub(crate) const MOST: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Result<CaptureConfig, CaptureError> {
        CaptureConfig::of(&pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect())
    }

    #[test]
    fn lists_are_read_whatever_the_spaces_and_networks_are_cut_to_their_prefix() {
        let config = of(&[
            (OUTBOUND_PORTS, "3306, 5432,3306"),
            (OUTBOUND_CIDRS, "10.1.2.3/16,fd00::1/8 ,192.0.2.7"),
            (INBOUND_PORTS, "9100"),
            ("example.com/note", "anything"),
            (marks::LOG_LEVEL, "debug"),
        ])
        .unwrap();
        assert_eq!(config.outbound_ports, [3306, 5432].into());
        let networks = ["10.1.0.0/16", "192.0.2.7/32", "fd00::/8"].map(|text| text.parse().unwrap());
        assert_eq!(config.outbound_cidrs, networks.into());
        assert_eq!(config.inbound_ports, [9100].into());
        assert!(of(&[(MODE, "enforce")]).unwrap().enforce && !of(&[(MODE, "observe")]).unwrap().enforce);
        assert_eq!(of(&[]).unwrap(), CaptureConfig::default());
    }

    #[test]
    fn the_time_to_wait_for_a_sidecar_is_a_duration() {
        let hold = |text: &str| CaptureConfig::hold(&[(marks::HOLD.to_owned(), text.to_owned())].into());
        assert_eq!(CaptureConfig::hold(&BTreeMap::new()), Ok(None));
        assert_eq!(hold("1500ms"), Ok(Some(Duration::from_millis(1500))));
        assert_eq!(hold("0"), Ok(Some(Duration::ZERO)));
        assert!(hold("ten").unwrap_err().to_string().starts_with("annotation outrigger.dev/hold: \"ten\" is not a duration"));
    }

    #[test]
    fn what_says_nothing_is_refused_by_name() {
        for (name, text, told) in [
            (MODE, "drop", "\"drop\" is no mode; write observe or enforce"),
            (OUTBOUND_PORTS, "0", "\"0\" is not a port"),
            (OUTBOUND_PORTS, "80-90", "\"80-90\" is not a port"),
            (OUTBOUND_PORTS, "", "\"\" is not a port"),
            (INBOUND_PORTS, "70000", "\"70000\" is not a port"),
            (INBOUND_PORTS, "80,14021", "14021 is a port of the sidecar's own"),
            (OUTBOUND_CIDRS, "10.0.0.0/33", "\"10.0.0.0/33\" is not a network"),
            (OUTBOUND_CIDRS, "::ffff:10.0.0.0/104", "is not a network"),
            (
                "outrigger.dev/exclude-outbound-port",
                "80",
                "there is none of that name; write one of outrigger.dev/capture, outrigger.dev/exclude-outb",
            ),
        ] {
            let error = of(&[(name, text)]).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        }
        let many = (1..=65).map(|port| port.to_string()).collect::<Vec<_>>().join(",");
        assert_eq!(of(&[(OUTBOUND_PORTS, &many)]), Err(CaptureError::TooMany { name: OUTBOUND_PORTS, found: 65 }));
    }
}
