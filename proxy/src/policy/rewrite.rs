//! URL rewrite (Gateway API HTTPURLRewriteFilter): host and path.

/// A compiled rewrite.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rewrite {
    pub(crate) authority: Option<Box<str>>,
    pub(crate) path: Option<PathRewrite>,
}

/// What happens to the path.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum PathRewrite {
    Full(Box<str>),
    /// Replaces the prefix that the route matched.
    Prefix {
        matched: Box<str>,
        with: Box<str>,
    },
}

impl Rewrite {
    /// The new path-and-query; `None` where it stays.
    pub(crate) fn path(&self, _path: &str, _query: Option<&str>) -> Option<String> {
        todo!()
    }
}
