//! Chains that were verified a moment ago, so that a peer that opens many connections is verified once.
//!
//! To verify a chain costs as much as to prove the possession of its key, which every handshake still asks for. What a
//! verification found depends on the chain, on the authorities and on the time, and on nothing else: it holds again while
//! the chain is the same to the byte, the authorities are those very ones, and all its certificates are in their time.
//! Invariant: only what was verified is kept, and whatever is not found here is verified.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use rustls_pki_types::{CertificateDer, UnixTime};

use super::spiffe::SpiffeId;
use super::verify::Bundles;

/// The last good chains, the latest in front.
#[derive(Default)]
pub(super) struct Verified(Mutex<Vec<Entry>>);

struct Entry {
    leaf: CertificateDer<'static>,
    intermediates: Vec<CertificateDer<'static>>,
    /// Kept alive, so that no other authorities can lie at its address.
    bundles: Arc<Bundles>,
    id: SpiffeId,
    from: u64,
    until: u64,
}

impl Verified {
    /// Whose this chain is, if it is known to be good.
    pub(super) fn find(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        bundles: &Arc<Bundles>,
        now: UnixTime,
    ) -> Option<SpiffeId> {
        let mut entries = self.0.lock();
        let found = entries.iter().position(|entry| {
            Arc::ptr_eq(&entry.bundles, bundles)
                && entry.leaf.as_ref() == leaf.as_ref()
                && entry.intermediates.len() == intermediates.len()
                && entry.intermediates.iter().zip(intermediates).all(|(one, other)| one.as_ref() == other.as_ref())
                && (entry.from..=entry.until).contains(&now.as_secs())
        })?;
        entries.get_mut(..=found)?.rotate_right(1);
        entries.first().map(|entry| entry.id.clone())
    }

    /// Keeps a chain that was found good.
    pub(super) fn keep(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        bundles: &Arc<Bundles>,
        id: &SpiffeId,
    ) {
        let Some((from, until)) = times(std::iter::once(leaf).chain(intermediates)) else { return };
        let entry = Entry {
            leaf: leaf.clone().into_owned(),
            intermediates: intermediates.iter().map(|certificate| certificate.clone().into_owned()).collect(),
            bundles: Arc::clone(bundles),
            id: id.clone(),
            from,
            until,
        };
        let mut entries = self.0.lock();
        entries.truncate(KEPT_MAX - 1);
        entries.insert(0, entry);
    }
}

impl fmt::Debug for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Verified({})", self.0.lock().len())
    }
}

/// From when to when all of them are good.
fn times<'a>(certificates: impl Iterator<Item = &'a CertificateDer<'a>>) -> Option<(u64, u64)> {
    let mut all = (0, u64::MAX);
    for certificate in certificates {
        let (_rest, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
        let validity = certificate.validity();
        let from = u64::try_from(validity.not_before.timestamp()).ok()?;
        let until = u64::try_from(validity.not_after.timestamp()).ok()?;
        all = (all.0.max(from), all.1.min(until));
    }
    Some(all)
}

/// How many there are: a chain has about a kilobyte.
const KEPT_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::identity::testing::{Authority, Leaf, NOW};

    #[test]
    fn a_chain_is_known_to_the_byte_by_those_authorities_and_in_its_time() {
        let authority = Authority::new();
        let (bundles, others) =
            (Arc::new(authority.bundles(&["cluster.local"])), Arc::new(authority.bundles(&["cluster.local"])));
        let (chain, _key) = authority.issue(&Leaf::workload("web"));
        let (other, _key) = authority.issue(&Leaf::workload("web"));
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        let at = |seconds: i64| UnixTime::since_unix_epoch(Duration::from_secs((NOW + seconds).unsigned_abs()));
        let verified = Verified::default();
        assert_eq!(verified.find(&chain[0], &[], &bundles, at(0)), None);
        verified.keep(&chain[0], &[], &bundles, &id);
        assert_eq!(verified.find(&chain[0], &[], &bundles, at(0)), Some(id));
        assert_eq!(verified.find(&other[0], &[], &bundles, at(0)), None, "another certificate of the same name");
        assert_eq!(verified.find(&chain[0], &other, &bundles, at(0)), None, "with an intermediate");
        assert_eq!(verified.find(&chain[0], &[], &others, at(0)), None, "under bundles that were read anew");
        for late in [-3601, 3601] {
            assert_eq!(verified.find(&chain[0], &[], &bundles, at(late)), None, "{late}");
        }
    }

    #[test]
    fn the_chains_that_are_used_stay() {
        let authority = Authority::new();
        let bundles = Arc::new(authority.bundles(&["cluster.local"]));
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        let now = UnixTime::since_unix_epoch(Duration::from_secs(NOW.unsigned_abs()));
        let (used, _key) = authority.issue(&Leaf::workload("web"));
        let verified = Verified::default();
        verified.keep(&used[0], &[], &bundles, &id);
        for _ in 0..2 * KEPT_MAX {
            let (other, _key) = authority.issue(&Leaf::workload("web"));
            verified.keep(&other[0], &[], &bundles, &id);
            assert!(verified.find(&used[0], &[], &bundles, now).is_some());
        }
        assert_eq!(verified.0.lock().len(), KEPT_MAX);
    }
}
