//! Names of resources: a name inside a namespace, as Kubernetes spells them.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A namespace and a name in it, written `NAMESPACE/NAME`. Both are DNS labels or subdomains (RFC 1123), at most 253 bytes.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct Named {
    /// The namespace.
    pub(crate) namespace: Arc<str>,
    /// The name inside the namespace.
    pub(crate) name: Arc<str>,
}

/// Why a text is not a name.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a name; use lower-case letters, digits, '-' and '.', starting and ending with a letter or digit")]
pub(crate) struct NameError(String);

impl Named {
    /// Takes both parts as they are; whoever reads them from a user checks them with [`check_name`].
    pub(crate) fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for Named {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let (namespace, name) = text.split_once('/').ok_or_else(|| NameError(text.to_owned()))?;
        check_name(namespace)?;
        check_name(name)?;
        Ok(Self::new(namespace, name))
    }
}

/// Accepts a DNS subdomain (RFC 1123): what Kubernetes takes for the name of an object.
///
/// # Errors
/// The text is empty, longer than 253 bytes, or holds another character.
pub(crate) fn check_name(text: &str) -> Result<(), NameError> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let label = |label: &str| {
        let bytes = label.as_bytes();
        bytes.first().copied().is_some_and(plain)
            && bytes.last().copied().is_some_and(plain)
            && bytes.iter().all(|b| plain(*b) || *b == b'-')
    };
    if text.len() <= 253 && text.split('.').all(label) { Ok(()) } else { Err(NameError(text.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_dns_subdomain() {
        for good in ["web", "web-1", "a.b", "0"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "Web", "-a", "a-", "a..b", "a/b", "a_b", &"a".repeat(254)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
