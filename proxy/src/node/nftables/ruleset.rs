//! The ruleset of a pod, as nft(8) reads it. Text in, nothing else: what is loaded is what the tests see.
//!
//! Sources: nft(8); the kernel's `Documentation/networking/tproxy.rst`. Decisions are those of `proxy_common::decide`, as
//! far as netfilter can make them. Invariants: what is not the sidecar's, loopback's or excluded goes to the sidecar or is
//! refused, also while no sidecar listens; what netfilter cannot place leaves the pod never.

use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proxy_common::counters::Counter;
use proxy_common::{PORT_ADMIN, PORT_INBOUND, PORT_METRICS, PORT_OUTBOUND};

use crate::base::sockopt::OWN_DIAL_PRIORITY;
use crate::model::capture::CaptureConfig;

/// The table of ours, in the family of both IPv4 and IPv6.
pub(super) const TABLE: &str = "outrigger";

/// What is counted here, by the names of [`Counter`].
pub(super) const COUNTED: [Counter; 14] = [
    Counter::Redirected,
    Counter::ExcludedOutboundPort,
    Counter::ExcludedOutboundCidr,
    Counter::LinkLocalRefused,
    Counter::UncapturedSocket,
    Counter::NoSocket,
    Counter::BypassDropped,
    Counter::Steered,
    Counter::SelfSteered,
    Counter::OwnDial,
    Counter::NoListener,
    Counter::OwnPortRefused,
    Counter::Excluded,
    Counter::ExcludedInboundPort,
];

/// What a pod's ruleset is made of.
#[derive(Clone, Debug)]
pub(super) struct Wanted<'a> {
    /// The sidecar's cgroup as nft(8) names it, below `/sys/fs/cgroup`.
    pub(super) sidecar: &'a str,
    /// How many folders below the cgroup2 root that is.
    pub(super) level: usize,
    /// The pod's own addresses.
    pub(super) addresses: &'a [IpAddr],
    pub(super) capture: &'a CaptureConfig,
}

/// A ruleset that takes the place of the former one at once, whether there was one or not.
pub(super) fn text(wanted: &Wanted<'_>) -> String {
    let mut text = format!("table inet {TABLE} {{}}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n");
    for counter in COUNTED {
        line(&mut text, 1, &format!("counter {} {{}}", counter.name()));
    }
    outbound(&mut text, wanted);
    leaving(&mut text, wanted);
    inbound(&mut text, wanted);
    text.push_str("}\n");
    text
}

/// What the app sends to others: rewritten to the sidecar, which asks the kernel where it was to go.
fn outbound(text: &mut String, wanted: &Wanted<'_>) {
    let sidecar = sidecar(wanted);
    let mut chain = Chain::begin(text, "astray", "type filter hook output priority -110; policy accept;");
    // As the programs of the kernel do: an original destination has no room for the interface that it needs.
    let link_local = "meta l4proto tcp ip6 daddr fe80::/10 ct state new";
    chain.rule(&format!("{link_local} {sidecar} accept"));
    chain.rule(&format!("{link_local} {} reject with icmpv6 admin-prohibited", count(Counter::LinkLocalRefused)));
    // Of a socket that is bound to a device. Asked before anything is rewritten: the device stays the one from before. No answer
    // to it can come.
    let (uncaptured, dropped) = (count(Counter::UncapturedSocket), count(Counter::BypassDropped));
    for loopback in ["ip daddr 127.0.0.0/8", "ip6 daddr ::1"] {
        chain.rule(&format!("oif != lo {loopback} {SYN} {uncaptured} {dropped} drop"));
    }
    chain.end();

    let mut chain = Chain::begin(text, "outbound", "type nat hook output priority -100; policy accept;");
    chain.rule("meta l4proto != tcp accept");
    chain.rule(&format!("{sidecar} accept"));
    chain.rule("ip daddr 127.0.0.0/8 accept");
    chain.rule("ip6 daddr ::1 accept");
    let redirect = format!("meta l4proto tcp {} redirect to :{PORT_OUTBOUND}", count(Counter::Redirected));
    // Of the pod's own address nothing is excluded.
    for own in addresses(wanted.addresses.iter().copied().map(IpNet::from)) {
        chain.rule(&format!("{} {redirect}", own.matching("daddr")));
    }
    if let Some(ports) = ports(&wanted.capture.outbound_ports) {
        chain.rule(&format!("tcp dport {ports} {} accept", count(Counter::ExcludedOutboundPort)));
    }
    for network in addresses(wanted.capture.outbound_cidrs.iter().copied()) {
        chain.rule(&format!("{} {} accept", network.matching("daddr"), count(Counter::ExcludedOutboundCidr)));
    }
    chain.rule(&redirect);
    chain.end();
}

/// What leaves all the same: of a state that netfilter cannot tell, it was not rewritten. Dropped whatever the pod asks for,
/// for it would go out in clear.
fn leaving(text: &mut String, wanted: &Wanted<'_>) {
    let mut chain = Chain::begin(text, "leaving", "type filter hook output priority 0; policy accept;");
    chain.rule("meta l4proto != tcp accept");
    chain.rule("ct state established,related accept");
    // The device is still the one from before the rewriting, the address is not.
    chain.rule("fib daddr type local accept");
    chain.rule(&format!("{} accept", sidecar(wanted)));
    if let Some(ports) = ports(&wanted.capture.outbound_ports) {
        chain.rule(&format!("tcp dport {ports} accept"));
    }
    for network in addresses(wanted.capture.outbound_cidrs.iter().copied()) {
        chain.rule(&format!("{} accept", network.matching("daddr")));
    }
    if let Some(ports) = ports(&wanted.capture.inbound_ports) {
        chain.rule(&format!("tcp sport {ports} accept"));
    }
    let (uncaptured, dropped) = (count(Counter::UncapturedSocket), count(Counter::BypassDropped));
    chain.rule(&format!("{SYN} {uncaptured} {dropped} drop"));
    chain.rule("meta l4proto tcp drop");
    chain.end();

    let mut chain = Chain::begin(text, "passing", "type filter hook forward priority 0; policy accept;");
    chain.rule(&format!("{SYN} {}", count(Counter::NoSocket)));
    chain.end();
}

/// What arrives: given to the sidecar's listener as it is, so that the accepted socket's address is the true one.
fn inbound(text: &mut String, wanted: &Wanted<'_>) {
    let mut chain = Chain::begin(text, "inbound", "type filter hook prerouting priority -150; policy accept;");
    chain.rule("meta l4proto != tcp accept");
    chain.rule("ct direction reply accept");
    chain.rule("ip daddr 127.0.0.0/8 accept");
    chain.rule("ip6 daddr ::1 accept");
    // Nobody else's connection to the pod's own address comes this far: an app's was rewritten.
    let own_dial = format!("iif lo meta priority 0:{OWN_DIAL_PRIORITY:x}");
    chain.rule(&format!("{own_dial} {SYN} {} accept", count(Counter::OwnDial)));
    chain.rule(&format!("{own_dial} accept"));
    let own_ports = format!("{{ {PORT_OUTBOUND}, {PORT_INBOUND}, {PORT_ADMIN} }}");
    chain.rule(&format!("tcp dport {own_ports} {SYN} {} reject with tcp reset", count(Counter::OwnPortRefused)));
    chain.rule(&format!("iif != lo tcp dport {PORT_METRICS} {SYN} {} accept", count(Counter::Excluded)));
    chain.rule(&format!("iif != lo tcp dport {PORT_METRICS} accept"));
    if let Some(ports) = ports(&wanted.capture.inbound_ports) {
        chain.rule(&format!("iif != lo tcp dport {ports} {SYN} {} accept", count(Counter::ExcludedInboundPort)));
        chain.rule(&format!("iif != lo tcp dport {ports} accept"));
    }
    for family in ["ip", "ip6"] {
        let of_family = if family == "ip" { "ipv4" } else { "ipv6" };
        let steer = format!("tproxy {family} to :{PORT_INBOUND}");
        // Where no listener takes it, the rule ends before it counts.
        chain.rule(&format!("iif lo meta nfproto {of_family} {SYN} {steer} {} accept", count(Counter::SelfSteered)));
        chain.rule(&format!("meta nfproto {of_family} {SYN} {steer} {} accept", count(Counter::Steered)));
        chain.rule(&format!("meta nfproto {of_family} meta l4proto tcp {steer} accept"));
    }
    chain.rule(&format!("{SYN} {} reject with tcp reset", count(Counter::NoListener)));
    chain.rule("ct state new drop");
    chain.end();
}

/// What begins a connection.
const SYN: &str = "tcp flags & (syn | ack) == syn";

fn sidecar(wanted: &Wanted<'_>) -> String {
    format!("socket cgroupv2 level {} \"{}\"", wanted.level, wanted.sidecar)
}

fn count(counter: Counter) -> String {
    format!("counter name {}", counter.name())
}

fn ports(ports: &std::collections::BTreeSet<u16>) -> Option<String> {
    let list: Vec<String> = ports.iter().map(u16::to_string).collect();
    (!list.is_empty()).then(|| format!("{{ {} }}", list.join(", ")))
}

/// Networks of one family.
struct Networks {
    family: &'static str,
    list: Vec<String>,
}

impl Networks {
    fn matching(&self, field: &str) -> String {
        format!("{} {field} {{ {} }}", self.family, self.list.join(", "))
    }
}

/// By family, those that hold no other; nft(8) takes no set whose networks overlap.
fn addresses(networks: impl Iterator<Item = IpNet>) -> Vec<Networks> {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for network in networks {
        match network {
            IpNet::V4(network) => v4.push(network),
            IpNet::V6(network) => v6.push(network),
        }
    }
    let v4: Vec<String> = Ipv4Net::aggregate(&v4).iter().map(ToString::to_string).collect();
    let v6: Vec<String> = Ipv6Net::aggregate(&v6).iter().map(ToString::to_string).collect();
    let families = [Networks { family: "ip", list: v4 }, Networks { family: "ip6", list: v6 }];
    families.into_iter().filter(|networks| !networks.list.is_empty()).collect()
}

/// A chain that is being written.
struct Chain<'a>(&'a mut String);

impl<'a> Chain<'a> {
    fn begin(text: &'a mut String, name: &str, hook: &str) -> Self {
        line(text, 1, &format!("chain {name} {{"));
        line(text, 2, hook);
        Self(text)
    }

    fn rule(&mut self, rule: &str) {
        line(self.0, 2, rule);
    }

    fn end(self) {
        line(self.0, 1, "}");
    }
}

fn line(text: &mut String, depth: usize, line: &str) {
    // Writing to a string does not fail.
    writeln!(text, "{:depth$}{line}", "", depth = 2 * depth).ok();
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn of(annotations: &[(&str, &str)]) -> String {
        let annotations: BTreeMap<_, _> =
            annotations.iter().map(|(name, value)| (format!("outrigger.dev/{name}"), (*value).to_owned())).collect();
        let capture = CaptureConfig::of(&annotations).unwrap();
        let addresses = ["10.64.0.5".parse().unwrap(), "fd64::5".parse().unwrap()];
        text(&Wanted { sidecar: "unified/outrigger/pods/shop.web/sidecar", level: 4, addresses: &addresses, capture: &capture })
    }

    #[track_caller]
    fn in_order(text: &str, lines: &[&str]) {
        let mut rest = text;
        for line in lines {
            let at = rest.find(line).unwrap_or_else(|| panic!("no {line:?} at its place in {text}"));
            rest = &rest[at + line.len()..];
        }
    }

    #[test]
    fn the_sidecar_is_exempt_by_its_cgroup_before_anything_is_redirected() {
        let text = of(&[]);
        assert!(text.starts_with("table inet outrigger {}\ndelete table inet outrigger\ntable inet outrigger {\n"));
        in_order(
            &text,
            &[
                "type nat hook output",
                "socket cgroupv2 level 4 \"unified/outrigger/pods/shop.web/sidecar\" accept",
                "ip daddr 127.0.0.0/8 accept",
                "redirect to :14001",
                "type filter hook prerouting",
                "tproxy ip to :14006",
                "tproxy ip6 to :14006",
                "counter name no_listener reject with tcp reset",
            ],
        );
    }

    #[test]
    fn what_is_for_loopback_and_leaves_by_a_device_is_dropped_before_anything_is_redirected() {
        in_order(
            &of(&[]),
            &[
                "type filter hook output priority -110",
                "oif != lo ip daddr 127.0.0.0/8 tcp flags & (syn | ack) == syn ",
                "counter name uncaptured_socket counter name bypass_dropped drop",
                "oif != lo ip6 daddr ::1 ",
                "type nat hook output",
            ],
        );
    }

    #[test]
    fn exclusions_stand_behind_the_own_address_and_before_the_rest() {
        let text = of(&[
            ("exclude-outbound-ports", "3306,5432"),
            ("exclude-outbound-cidrs", "10.0.0.0/8,10.1.0.0/16,fd00::/8"),
            ("exclude-inbound-ports", "9100"),
        ]);
        in_order(
            &text,
            &[
                "type nat hook output",
                "ip daddr { 10.64.0.5/32 } meta l4proto tcp counter name redirected redirect to :14001",
                "ip6 daddr { fd64::5/128 } meta l4proto tcp counter name redirected redirect to :14001",
                "tcp dport { 3306, 5432 } counter name excluded_outbound_port accept",
                "ip daddr { 10.0.0.0/8 } counter name excluded_outbound_cidr accept",
                "ip6 daddr { fd00::/8 } counter name excluded_outbound_cidr accept",
                "meta l4proto tcp counter name redirected redirect to :14001",
                "type filter hook prerouting",
                "iif != lo tcp dport { 9100 }",
                "tproxy ip to :14006",
            ],
        );
    }

    #[test]
    fn what_nothing_excludes_has_no_rule() {
        let text = of(&[]);
        assert!(!text.contains("excluded_outbound_port accept") && !text.contains("sport"), "{text}");
    }

    #[test]
    fn every_counter_that_is_named_is_declared() {
        let text = of(&[("exclude-inbound-ports", "1"), ("exclude-outbound-ports", "1"), ("exclude-outbound-cidrs", "::/0")]);
        for part in text.split("counter name ").skip(1) {
            let name = part.split(' ').next().unwrap_or_default().trim();
            assert!(text.contains(&format!("counter {name} {{}}")), "{name}");
        }
    }
}
