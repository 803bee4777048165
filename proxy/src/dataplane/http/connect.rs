//! Plain CONNECT (RFC 9110 9.3.6): who may have a tunnel through an application that is a forward proxy?
//!
//! What a tunnel carries is seen by nobody, and an application that answers every method with a success would take it for
//! requests. So this fails closed: a tunnel is made only where a rule asks for that method by name, and where nothing is in force
//! that would have to see requests. "A server MUST reject" only what names no port; that others are refused with 501 is RFC 9110
//! 9.1: who does not implement a method answers so.

use crate::policy::authorization::Verdict;
use crate::policy::{Peer, RuleName};
use crate::snapshot::RoutePolicies;

use super::reject::Reject;

/// Why there is no tunnel, though nobody is shut out.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum NoTunnel {
    /// No rule of the receiver's asks for that method by name.
    Unnamed,
    /// The receiver has no sidecar, and so no rules.
    Undecided,
    /// Rules about tokens are in force, which would not see what it carries.
    Tokens,
    /// A rate limit is in force, which would count it as one request.
    RateLimit,
}

impl NoTunnel {
    /// In one sentence.
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Unnamed => "no authorization rule allows the method CONNECT by name",
            Self::Undecided => "CONNECT goes only to a workload with a sidecar, whose rules allow it by name",
            Self::Tokens => "a tunnel by CONNECT would pass by the rules about tokens that are in force",
            Self::RateLimit => "a tunnel by CONNECT would pass by the rate limit that is in force",
        }
    }
}

/// May this peer have a tunnel through the application of a port with these policies? By which rule.
///
/// # Errors
/// A rule denies, none asks for it by name, or what is in force has to see requests.
pub(crate) fn permit(policies: &RoutePolicies, peer: &Peer) -> Result<RuleName, Reject> {
    let rule = match policies.authorization.as_ref().and_then(|authorization| authorization.decide_tunnel(peer)) {
        Some(Verdict::Allow(rule)) => rule,
        Some(Verdict::Deny(rule)) => return Err(Reject::Denied(rule)),
        None => return Err(Reject::NoTunnel(NoTunnel::Unnamed)),
    };
    if policies.jwt.is_some() {
        return Err(Reject::NoTunnel(NoTunnel::Tokens));
    }
    if policies.rate_limit.is_some() {
        return Err(Reject::NoTunnel(NoTunnel::RateLimit));
    }
    Ok(rule)
}
