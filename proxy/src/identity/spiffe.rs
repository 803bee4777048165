//! SPIFFE IDs and trust domains (SPIFFE ID standard, sections 2.1 to 2.3). A value exists only if valid.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::base::names::Named;

/// The name of a trust domain, without scheme.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct TrustDomain(spiffe::TrustDomain);

/// `spiffe://TRUST-DOMAIN/PATH`. Cheap to clone.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct SpiffeId(Arc<Known>);

/// An ID and its text, which rules compare with every request.
#[derive(Eq, Hash, Ord, PartialEq, PartialOrd)]
struct Known {
    text: Box<str>,
    id: spiffe::SpiffeId,
}

/// Why a text is not a SPIFFE ID or a trust domain.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is not a {what}: {reason}")]
pub(crate) struct SpiffeError {
    what: &'static str,
    text: String,
    reason: String,
}

impl TrustDomain {
    /// The name.
    pub(crate) fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// The identity of service account `account` (a namespace and a name) in this trust domain.
    ///
    /// # Errors
    /// A part of the account's name is not a path segment.
    pub(crate) fn service_account(&self, account: &Named) -> Result<SpiffeId, SpiffeError> {
        format!("spiffe://{}/ns/{}/sa/{}", self.as_str(), account.namespace, account.name).parse()
    }

    /// The identity of the node agent on node `name`.
    ///
    /// # Errors
    /// The name is not a path segment.
    pub(crate) fn node(&self, name: &str) -> Result<SpiffeId, SpiffeError> {
        format!("spiffe://{}/node/{name}", self.as_str()).parse()
    }
}

impl SpiffeId {
    /// The trust domain that vouches for it.
    pub(crate) fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.0.id.trust_domain().clone())
    }

    /// The whole text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0.text
    }

    /// The path, with its leading slash.
    pub(crate) fn path(&self) -> &str {
        self.0.id.path()
    }

    /// The service account, where the path is `/ns/NAMESPACE/sa/NAME`.
    pub(crate) fn account(&self) -> Option<(&str, &str)> {
        let (namespace, name) = self.path().strip_prefix("/ns/")?.split_once("/sa/")?;
        (!namespace.contains('/') && !name.contains('/')).then_some((namespace, name))
    }
}

impl SpiffeId {
    /// Where the shared text lies: the same for clones of one value, for as long as one of them lives.
    pub(crate) fn address(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let fail = |reason| SpiffeError { what: "trust domain", text: text.to_owned(), reason };
        let domain = spiffe::TrustDomain::new(text).map_err(|error| fail(error.to_string()))?;
        // One trust domain, one spelling, as for identities.
        if domain.as_str() != text {
            return Err(fail(format!("write it as {}", domain.as_str())));
        }
        if text.split('.').any(str::is_empty) {
            return Err(fail("a part between its dots is empty".to_owned()));
        }
        Ok(Self(domain))
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let fail = |reason| SpiffeError { what: "SPIFFE ID", text: text.to_owned(), reason };
        let id = spiffe::SpiffeId::new(text).map_err(|error| fail(error.to_string()))?;
        // One identity, one spelling: rules compare texts, so a trust domain in capitals is refused, not folded.
        if id.to_string() != text {
            return Err(fail("its trust domain is not in lower case".to_owned()));
        }
        Ok(Self(Arc::new(Known { text: text.into(), id })))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.id, f)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for SpiffeId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SpiffeId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Cow::<'de, str>::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for SpiffeId {
    fn schema_name() -> Cow<'static, str> {
        "SpiffeId".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^spiffe://[a-z0-9._-]+(/[A-Za-z0-9._-]+)*$" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_account_has_an_identity_and_back() {
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        let id = domain.service_account(&Named::new("shop", "web")).unwrap();
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/shop/sa/web");
        assert_eq!(id.account(), Some(("shop", "web")));
        assert_eq!(id.trust_domain(), domain);
    }

    #[test]
    fn a_trust_domain_has_one_spelling() {
        for text in ["", "spiffe://cluster.local", "CLUSTER.local", "a..b", ".a", "a.", "a b", "a/b"] {
            assert!(text.parse::<TrustDomain>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_no_identity_is_refused() {
        for text in ["", "web", "https://cluster.local/a", "spiffe://", "spiffe://UPPER/a", "spiffe://td/a//b", "spiffe://td/a/"]
        {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }
}
