//! Authorization: may this peer make this request?

use super::jwt::Claims;
use super::{Peer, RequestView, RuleName};

/// The compiled rules that apply to one port of the own workload.
#[derive(Clone, Debug)]
pub(crate) struct Authorization {}

/// What was decided, and the rule that decided it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    Allow(RuleName),
    Deny(RuleName),
}

impl Authorization {
    /// Decides a request: deny rules, then allow rules, then the default.
    pub(crate) fn decide(&self, _peer: &Peer, _request: RequestView<'_>, _claims: Option<&Claims>) -> Verdict {
        todo!()
    }

    /// Decides an opaque connection: a DENY that names an HTTP field matches, an ALLOW that names one never does.
    pub(crate) fn decide_opaque(&self, _peer: &Peer) -> Verdict {
        todo!()
    }
}
