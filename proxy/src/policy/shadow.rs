//! Request shadowing (Gateway API HTTPRequestMirrorFilter): a fraction of requests is copied to another service.

use crate::base::names::Named;
use crate::base::random::Dice;

/// The compiled shadow.
#[derive(Clone, Debug)]
pub(crate) struct Shadow {
    /// The service that gets the copies, and its port.
    pub(crate) service: Named,
    pub(crate) port: u16,
}

impl Shadow {
    /// Draws whether this request is copied.
    pub(crate) fn draw(&self, _dice: &mut Dice) -> bool {
        todo!()
    }
}
