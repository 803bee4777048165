//! String, path, header and query matchers that routes and policies share (Gateway API GEP-1426, HTTPRouteMatch).

use super::RequestView;

/// A compiled string condition.
#[derive(Clone, Debug)]
pub(crate) enum StringMatch {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    /// Any value at all, but a value.
    Present,
    Regex(regex::Regex),
}

impl StringMatch {
    /// Does `text` fulfil the condition?
    pub(crate) fn matches(&self, _text: &str) -> bool {
        todo!()
    }
}

/// A compiled path condition. A prefix matches whole path elements: `/shop` matches `/shop` and `/shop/cart`, not `/shopping`.
#[derive(Clone, Debug)]
pub(crate) enum PathMatch {
    Exact(Box<str>),
    Prefix(Box<str>),
    Regex(regex::Regex),
}

impl PathMatch {
    /// Does the path (without query) fulfil the condition?
    pub(crate) fn matches(&self, _path: &str) -> bool {
        todo!()
    }
}

/// All conditions of one `matches` entry of an HTTPRoute rule; every one must hold.
#[derive(Clone, Debug, Default)]
pub(crate) struct RequestMatch {
    pub(crate) path: Option<PathMatch>,
    pub(crate) method: Option<http::Method>,
    pub(crate) headers: Vec<(http::HeaderName, StringMatch)>,
    pub(crate) query: Vec<(Box<str>, StringMatch)>,
}

impl RequestMatch {
    /// Does the request fulfil every condition?
    pub(crate) fn matches(&self, _request: RequestView<'_>) -> bool {
        todo!()
    }
}
