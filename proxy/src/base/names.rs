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

/// Why a text is not a name. The user is at fault.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NameError {
    #[error(
        "{0:?} is not a name; use lower-case letters, digits, '-' and '.', starting and ending with a letter or digit, as web-1"
    )]
    Name(String),
    #[error(
        "{0:?} is not a name of one part; use at most {LABEL_MAX} lower-case letters, digits and '-', starting and ending with a letter or digit, as web-1"
    )]
    Part(String),
    #[error("{0:?} has {1} letters; use at most {LABEL_MAX}, as a host's name has")]
    Long(String, usize),
    /// Not repeated: it may be as long as a message.
    #[error("a text of {0} bytes is no UID of a pod: that is a UUID, or 32 hexadecimal digits of a static pod")]
    Uid(usize),
    /// There is one part, or there are three.
    #[error("{0:?} is not a namespace and a name; write NAMESPACE/NAME, as {1}")]
    Named(String, String),
}

impl Named {
    /// Takes both parts as they are; whoever reads them from a user checks them with [`check_name`].
    pub(crate) fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// Where the shared texts lie: the same for clones of one value, for as long as one of them lives.
    pub(crate) fn addresses(&self) -> (usize, usize) {
        (Arc::as_ptr(&self.namespace).addr(), Arc::as_ptr(&self.name).addr())
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
        let Some((namespace, name)) = text.split_once('/').filter(|(_, name)| !name.contains('/')) else {
            // What was probably meant: a host's name says the same the other way round, and a name alone lacks a namespace.
            let meant = match text.split_once('.') {
                Some((name, namespace)) if check_name(text).is_ok() => {
                    format!("{}/{name}", namespace.split('.').next().unwrap_or_default())
                }
                None if check_name(text).is_ok() => format!("default/{text}"),
                _ => "shop/web-1".to_owned(),
            };
            return Err(NameError::Named(text.to_owned(), meant));
        };
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
    if text.len() <= 253 && text.split('.').all(label) { Ok(()) } else { Err(NameError::Name(text.to_owned())) }
}

/// Accepts a DNS label (RFC 1123): what Kubernetes takes for the name of a namespace, of a Service and of a port.
///
/// # Errors
/// The text is empty, longer than 63 bytes, or holds another character.
pub(crate) fn check_part(text: &str) -> Result<(), NameError> {
    let is_part = text.len() <= LABEL_MAX && !text.contains('.') && check_name(text).is_ok();
    if is_part { Ok(()) } else { Err(NameError::Part(text.to_owned())) }
}

/// Accepts what can be the name of a host (RFC 1123 2.1, RFC 1035 2.3.4): a name of at most 63 bytes, so that it is good as
/// one part of a longer one.
///
/// # Errors
/// It is no name, or it is longer.
pub(crate) fn check_host(text: &str) -> Result<(), NameError> {
    check_name(text)?;
    if text.len() <= LABEL_MAX { Ok(()) } else { Err(NameError::Long(text.to_owned(), text.len())) }
}

/// Accepts the UID of a pod of Kubernetes. Sources: Kubernetes, "Object Names and IDs": a UUID (RFC 9562 4), which the API server
/// writes with small letters; a pod that a kubelet reads from a file or URL (static) has the digest of its source there, MD5.
///
/// # Errors
/// It has another form.
pub(crate) fn check_uid(text: &str) -> Result<(), NameError> {
    let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let is_uuid = text.len() == 36
        && text
            .bytes()
            .enumerate()
            .all(|(place, byte)| if matches!(place, 8 | 13 | 18 | 23) { byte == b'-' } else { is_hex(byte) });
    let is_digest = text.len() == 32 && text.bytes().all(is_hex);
    if is_uuid || is_digest { Ok(()) } else { Err(NameError::Uid(text.len())) }
}

/// Why a text cannot be a label of an object, which selectors look for; none where it can. Source: Kubernetes, "Labels and
/// Selectors": a key is a name of at most 63 bytes, perhaps with a DNS subdomain and a slash in front; a value is one or
/// empty.
pub(crate) fn label_fault(key: &str, value: &str) -> Option<String> {
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let is_word = |text: &str| {
        let bytes = text.as_bytes();
        let inner = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
        bytes.len() <= LABEL_MAX && edge(bytes.first()) && edge(bytes.last()) && bytes.iter().all(inner)
    };
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    if !is_word(name) || prefix.is_some_and(|prefix| check_name(prefix).is_err()) {
        return Some(format!("{key:?} is not the key of a label"));
    }
    (!value.is_empty() && !is_word(value)).then(|| format!("{value:?} is not the value of a label"))
}

/// What to write instead of what [`label_fault`] names.
pub(crate) const LABELS: &str = "use at most 63 letters, digits, '-', '_' and '.', starting and ending with a letter or digit, as app: web or example.com/tier: front";

/// The most bytes of one part of a name (RFC 1035 2.3.4).
const LABEL_MAX: usize = 63;

/// The name that was probably meant: the one that differs least, if it differs in no more than a third of its letters.
pub(crate) fn nearest<'a>(wrong: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wrong = wrong.to_ascii_lowercase();
    let candidates = known.into_iter().map(|name| (distance(&wrong, &name.to_ascii_lowercase()), name));
    candidates.filter(|(distance, name)| *distance <= name.len().div_ceil(3)).min().map(|(_, name)| name)
}

/// How many letters must be inserted, deleted, replaced or swapped with their neighbour to make one text of the other
/// (restricted Damerau-Levenshtein distance).
fn distance(from: &str, to: &str) -> usize {
    let (from, to): (Vec<char>, Vec<char>) = (from.chars().take(64).collect(), to.chars().take(64).collect());
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=to.len()).collect();
    for (row, a) in from.iter().enumerate() {
        let mut line = vec![row + 1];
        for (column, b) in to.iter().enumerate() {
            let at = |line: &[usize], column: usize| line.get(column).copied().unwrap_or(usize::MAX / 2);
            let mut best = (at(&above, column) + usize::from(a != b)).min(at(&above, column + 1) + 1).min(at(&line, column) + 1);
            let swapped = row > 0 && column > 0 && from.get(row - 1) == Some(b) && to.get(column - 1) == Some(a);
            if swapped {
                best = best.min(at(&before, column - 1) + 1);
            }
            line.push(best);
        }
        before = above;
        above = line;
    }
    above.last().copied().unwrap_or_default()
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

    #[test]
    fn a_part_of_a_name_holds_no_dot_and_a_host_is_no_longer_than_one() {
        let long = "a".repeat(64);
        for (text, part, host) in
            [("web-1", true, true), ("a.b", false, true), ("Web", false, false), ("", false, false), (&long, false, false)]
        {
            assert_eq!((check_part(text).is_ok(), check_host(text).is_ok()), (part, host), "{text}");
        }
        assert!(check_host(&long).unwrap_err().to_string().contains("has 64 letters"));
    }

    #[test]
    fn a_pods_uid_is_a_uuid_or_the_digest_of_a_static_pod() {
        for good in ["3f2504e0-4f89-41d3-9a0c-0305e82c3301", "d41d8cd98f00b204e9800998ecf8427e"] {
            assert!(check_uid(good).is_ok(), "{good}");
        }
        let (long, upper) = ("a".repeat(33), "3F2504E0-4F89-41D3-9A0C-0305E82C3301");
        for bad in ["", "0a-1", upper, "3f2504e04f89-41d3-9a0c-0305e82c33011-", "../../../../../../../etc/passwd/", &long] {
            assert!(check_uid(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_label_is_a_key_and_a_value_that_kubernetes_takes() {
        let long = "a".repeat(64);
        for (key, value) in [("app", "web"), ("App_1", ""), ("example.com/tier", "v1.2_x"), ("a", "A")] {
            assert_eq!(label_fault(key, value), None, "{key}={value}");
        }
        for key in ["", "/a", "a/", "-a", "a b", "Example.com/a", "a/b/c", "ä", &long] {
            assert_eq!(label_fault(key, "x"), Some(format!("{key:?} is not the key of a label")));
        }
        for value in ["-", "a b", "a,b", "a=b", "x!", &long] {
            assert_eq!(label_fault("app", value), Some(format!("{value:?} is not the value of a label")));
        }
    }

    #[test]
    fn what_is_no_namespace_and_name_is_told_with_the_right_form() {
        for (text, meant) in [("web-1", "default/web-1"), ("web.shop", "shop/web"), ("a/b/c", "shop/web-1"), ("", "shop/web-1")] {
            let error = text.parse::<Named>().unwrap_err().to_string();
            assert!(error.ends_with(&format!("write NAMESPACE/NAME, as {meant}")), "{error}");
        }
        assert!("shop/Web".parse::<Named>().unwrap_err().to_string().ends_with(", as web-1"));
    }

    #[test]
    fn a_misspelt_name_is_recognised() {
        let known = ["backendRefs", "filters", "matches", "name", "retry", "timeouts"];
        for (wrong, meant) in [("backendRef", "backendRefs"), ("macthes", "matches"), ("timeout", "timeouts"), ("Name", "name")] {
            assert_eq!(nearest(wrong, known), Some(meant), "{wrong}");
        }
        assert_eq!(nearest("cors", known), None);
    }
}
