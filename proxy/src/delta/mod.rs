//! The configuration stream: its messages, and both ends of it as state machines without sockets.
//!
//! Semantics follow xDS incremental (<https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol>, "incremental xDS"):
//! subscribe by name, version, nonce, acknowledge or refuse by name, resume by the versions held. A sidecar subscribes to
//! scopes; a scope's answer is a set of small resources. Invariants: what was never asked for is never sent, and an
//! acknowledgement says that the configuration is in force, not that it was read.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::base::names::Named;

pub(crate) mod client;
pub(crate) mod grpc;
pub(crate) mod server;
pub(crate) mod transport;

pub(crate) mod authority;
pub(crate) mod envelope;

/// What a sidecar can subscribe to, written `workload/NAMESPACE/NAME`, `service/NAMESPACE/NAME` or `address/IP`.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Scope {
    /// The sidecar's own pod: its Workload, the services that select it and the policies that apply to it.
    Workload(Named),
    /// A service that the pod calls: its routes, policies and endpoints.
    Service(Named),
    /// An address that the pod dialled: the service or the workload that has it.
    Address(IpAddr),
}

/// Why a text is not a [`Scope`]. The peer is at fault.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a scope; it is workload/NAMESPACE/NAME, service/NAMESPACE/NAME or address/IP")]
pub(crate) struct ScopeError(String);

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(name) => write!(f, "workload/{name}"),
            Self::Service(name) => write!(f, "service/{name}"),
            Self::Address(address) => write!(f, "address/{address}"),
        }
    }
}

impl FromStr for Scope {
    type Err = ScopeError;

    fn from_str(text: &str) -> Result<Self, ScopeError> {
        let fail = || ScopeError(text.to_owned());
        match text.split_once('/').ok_or_else(fail)? {
            ("workload", name) => name.parse().map(Self::Workload).map_err(|_not_a_name| fail()),
            ("service", name) => name.parse().map(Self::Service).map_err(|_not_a_name| fail()),
            // An IPv4 address in IPv6 clothes is the same address; one spelling keeps one subscription.
            ("address", ip) => ip.parse().map(|ip: IpAddr| Self::Address(ip.to_canonical())).map_err(|_not_an_address| fail()),
            _ => Err(fail()),
        }
    }
}

/// The most scopes that one sidecar may be subscribed to: a pod that dials its way through an address range must not
/// make the control plane remember each one.
pub(crate) const SCOPES_MAX: usize = 16_384;

/// The largest message. Everything that one response brings is published at once, so a response is never split.
pub(crate) const MESSAGE_BYTES_MAX: usize = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_is_read_as_it_is_written() {
        for text in ["workload/shop/web-1", "service/shop/web", "address/10.64.0.5", "address/fd64::5"] {
            assert_eq!(text.parse::<Scope>().unwrap().to_string(), text);
        }
        assert_eq!("address/::ffff:10.64.0.5".parse::<Scope>().unwrap().to_string(), "address/10.64.0.5");
    }

    #[test]
    fn what_is_no_scope_is_refused() {
        for text in ["", "workload", "workload/web", "pod/shop/web", "service/shop/Web", "address/10.64", "service/shop/a/b"] {
            assert!(text.parse::<Scope>().is_err(), "{text}");
        }
    }
}
