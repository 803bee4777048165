//! Header modifiers (Gateway API HTTPHeaderFilter): set, add, remove.

/// A compiled modifier.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeaderEdit {
    pub(crate) set: Vec<(http::HeaderName, http::HeaderValue)>,
    pub(crate) add: Vec<(http::HeaderName, http::HeaderValue)>,
    pub(crate) remove: Vec<http::HeaderName>,
}

impl HeaderEdit {
    /// Edits in place.
    pub(crate) fn apply(&self, _headers: &mut http::HeaderMap) {
        todo!()
    }
}
