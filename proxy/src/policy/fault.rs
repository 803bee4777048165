//! Fault injection: a drawn share of requests is delayed or aborted.

use std::time::Duration;

use super::RuleName;
use crate::base::random::Dice;

/// The compiled fault.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) rule: RuleName,
}

/// What is done to one request: first the delay, then the abort.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Injection {
    pub(crate) delay: Option<Duration>,
    pub(crate) abort: Option<http::StatusCode>,
}

impl Fault {
    /// Draws what is done to a request.
    pub(crate) fn draw(&self, _dice: &mut Dice) -> Injection {
        todo!()
    }
}
