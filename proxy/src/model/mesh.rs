//! `Mesh`: what holds for the whole mesh. There is one; where several are written, the first by name counts.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use super::Kind;
use super::object::Spec;
use crate::base::units::Percent;
use crate::policy::limits::LimitsConfig;

/// The body of a Mesh.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct MeshSpec {
    /// Networks of pods and services. An address in one of them is never dialled in plaintext because its configuration is
    /// missing. At least one, and not every address there is. Default: `10.64.0.0/16`, `10.65.0.0/16`, `fd64::/64`, `fd65::/112`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Vec<String>")]
    pub(crate) ranges: Option<Vec<Network>>,
    /// May a pod dial an address outside the ranges? Default: `Allow`.
    #[serde(default, skip_serializing_if = "Choice::is_allow")]
    pub(crate) egress: Choice,
    /// What an authenticated peer may do at a port that no AuthorizationPolicy targets. Default: `Allow`.
    #[serde(default, skip_serializing_if = "Choice::is_allow")]
    pub(crate) default_authorization: Choice,
    /// The access log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) access_log: Option<Sampling>,
    /// Traces that the mesh begins itself; a trace that a caller began is carried on as the caller says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tracing: Option<Sampling>,
    /// What one client may ask of a sidecar: of those in the mesh, of those outside of it, and of the sidecar's own application.
    /// A connection keeps the limits with which it began, but for those on answers, which hold for the next one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) limits: Option<LimitsConfig>,
}

/// A network, as `10.64.0.0/16`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub(crate) struct Network(pub(crate) IpNet);

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map(Self).map_err(|_not_one| D::Error::custom(no_network(&text)))
    }
}

/// Why a text is not a network, and what to write.
fn no_network(text: &str) -> String {
    const REMEDY: &str = "write one as 10.64.0.0/16 or fd64::/64";
    let Some((address, prefix)) = text.split_once('/') else {
        return match text.parse::<IpAddr>() {
            Ok(address) => format!("{text:?} is an address without the length of its network; write {address}/{}", bits(address)),
            Err(_neither) => format!("{text:?} is not a network; {REMEDY}"),
        };
    };
    match address.parse::<IpAddr>() {
        Ok(address) => {
            let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
            let most = bits(address);
            format!("{prefix:?} is not the length of a network of {family}; write 1 to {most} behind the slash")
        }
        Err(_not_one) => format!("{address:?} is not an IP address; {REMEDY}"),
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Yes or no, in words.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub(crate) enum Choice {
    #[default]
    Allow,
    Deny,
}

/// Which share is recorded.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Sampling {
    /// Per cent of requests. Default of the access log: 100, of traces: 1.
    pub(crate) sample: Percent,
}

impl Spec for MeshSpec {
    const KIND: Kind = Kind::Mesh;
}

impl MeshSpec {
    /// The networks of pods and services.
    pub(crate) fn networks(&self) -> Vec<IpNet> {
        match &self.ranges {
            Some(ranges) if !ranges.is_empty() => ranges.iter().map(|Network(range)| *range).collect(),
            _none => default_ranges(),
        }
    }

    /// Share of requests in the access log.
    pub(crate) fn access_log_sample(&self) -> Percent {
        self.access_log.map_or(Percent::ALL, |sampling| sampling.sample)
    }

    /// Share of traces that the mesh begins.
    pub(crate) fn trace_sample(&self) -> Percent {
        self.tracing.map_or(Percent::ONE_OF_A_HUNDRED, |sampling| sampling.sample)
    }
}

/// The networks of a local mesh.
pub(crate) fn default_ranges() -> Vec<IpNet> {
    let mut ranges: Vec<IpNet> = pod_ranges().chain(service_ranges()).collect();
    ranges.sort();
    ranges
}

/// Of which a local mesh gives addresses to pods.
pub(crate) fn pod_ranges() -> impl Iterator<Item = IpNet> {
    range_pair(64, 0xfd64, 64)
}

/// Of which a control plane gives addresses to Services.
pub(crate) fn service_ranges() -> impl Iterator<Item = IpNet> {
    range_pair(65, 0xfd65, 112)
}

fn range_pair(second: u8, first: u16, prefix: u8) -> impl Iterator<Item = IpNet> {
    let v4 = Ipv4Net::new(Ipv4Addr::new(10, second, 0, 0), 16).map(IpNet::V4);
    let v6 = Ipv6Net::new(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0), prefix).map(IpNet::V6);
    [v4, v6].into_iter().flatten()
}

impl Choice {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde calls")]
    fn is_allow(&self) -> bool {
        *self == Self::Allow
    }
}
