//! JSON Web Tokens (RFC 7519): which bearer tokens a workload accepts, and what they claim.

use std::sync::Arc;
use std::time::Duration;

use super::{RequestView, RuleName};

/// The compiled token rules of one port.
#[derive(Clone, Debug)]
pub(crate) struct Jwt {}

/// The claims of an accepted token.
#[derive(Clone, Debug)]
pub(crate) struct Claims {
    pub(crate) issuer: Arc<str>,
    pub(crate) all: Arc<serde_json::Map<String, serde_json::Value>>,
}

/// Why a token was refused: the rule, and a reason fit for the caller (never the token).
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct TokenRefused {
    pub(crate) rule: RuleName,
    pub(crate) reason: &'static str,
}

impl Jwt {
    /// The claims of the request's token; `None` where no token is needed and none was sent. `now` is since the epoch.
    pub(crate) fn verify(&self, _request: RequestView<'_>, _now: Duration) -> Result<Option<Claims>, TokenRefused> {
        todo!()
    }

    /// Does an opaque connection, which can bring no token, break a rule?
    pub(crate) fn decide_opaque(&self) -> Result<(), TokenRefused> {
        todo!()
    }
}
