//! Names that write the same addresses: who is concerned when one of them writes others, and who comes to its addresses or
//! loses them by that. Pure.
//!
//! Who loses one address leaves its others to the next, so that all are concerned that are tied by addresses. Who of them has
//! what is for the caller to decide.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Names `K`, and of those that do not have what they write, why: `L`.
#[derive(Clone, Debug)]
pub(super) struct Contest<K, L> {
    /// Who writes an address, whether it is theirs or not.
    claims: BTreeMap<IpAddr, BTreeSet<K>>,
    lost: BTreeMap<K, L>,
}

impl<K, L> Default for Contest<K, L> {
    fn default() -> Self {
        Self { claims: BTreeMap::new(), lost: BTreeMap::new() }
    }
}

impl<K: Clone + Ord, L> Contest<K, L> {
    /// Who writes which address.
    pub(super) fn claims(&self) -> &BTreeMap<IpAddr, BTreeSet<K>> {
        &self.claims
    }

    /// Who does not have what it writes, and why.
    pub(super) fn lost(&self) -> &BTreeMap<K, L> {
        &self.lost
    }

    /// `name` wrote these addresses `before`, and writes others `now`.
    pub(super) fn write(&mut self, name: &K, before: &BTreeSet<IpAddr>, now: &BTreeSet<IpAddr>) {
        for address in before.difference(now) {
            if let Some(names) = self.claims.get_mut(address) {
                names.remove(name);
                if names.is_empty() {
                    self.claims.remove(address);
                }
            }
        }
        for address in now {
            self.claims.entry(*address).or_default().insert(name.clone());
        }
    }

    /// These and all who are tied to them by `addresses`; `written` tells what each one writes.
    pub(super) fn rivals(
        &self,
        mut rivals: BTreeSet<K>,
        addresses: impl IntoIterator<Item = IpAddr>,
        written: impl Fn(&K) -> BTreeSet<IpAddr>,
    ) -> BTreeSet<K> {
        let mut addresses: Vec<IpAddr> = addresses.into_iter().collect();
        while let Some(address) = addresses.pop() {
            for rival in self.claims.get(&address).into_iter().flatten() {
                if rivals.insert(rival.clone()) {
                    addresses.extend(written(rival));
                }
            }
        }
        rivals
    }

    /// Of these rivals, those that are in `lost` do not have what they write, and the others do. Returns those of whom that is
    /// new.
    pub(super) fn settle(&mut self, mut rivals: BTreeSet<K>, mut lost: BTreeMap<K, L>) -> BTreeSet<K> {
        rivals.retain(|rival| {
            let (before, now) = (self.lost.remove(rival), lost.remove(rival));
            let is_other = before.is_some() != now.is_some();
            self.lost.extend(now.map(|now| (rival.clone(), now)));
            is_other
        });
        rivals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(hosts: &[u8]) -> BTreeSet<IpAddr> {
        hosts.iter().map(|host| IpAddr::from([10, 65, 0, *host])).collect()
    }

    #[test]
    fn who_is_tied_by_addresses_is_concerned_and_nobody_else() {
        let written = BTreeMap::from([
            ("a", addresses(&[1, 2])),
            ("b", addresses(&[2, 3])),
            ("c", addresses(&[3])),
            ("d", addresses(&[4])),
        ]);
        let mut contest: Contest<&str, ()> = Contest::default();
        for (name, now) in &written {
            contest.write(name, &BTreeSet::new(), now);
        }
        let tied = |contest: &Contest<&'static str, ()>, host| {
            contest.rivals(BTreeSet::new(), addresses(&[host]), |name| written[name].clone()).into_iter().collect::<Vec<_>>()
        };
        assert_eq!(tied(&contest, 1), ["a", "b", "c"]);
        assert_eq!(tied(&contest, 4), ["d"]);
        contest.write(&"b", &written["b"], &BTreeSet::new());
        assert_eq!(tied(&contest, 1), ["a"]);
        contest.write(&"d", &written["d"], &BTreeSet::new());
        assert!(!contest.claims().contains_key(&IpAddr::from([10, 65, 0, 4])), "nobody is forgotten as somebody");
    }

    #[test]
    fn only_who_comes_to_its_addresses_or_loses_them_is_news() {
        let mut contest: Contest<&str, u8> = Contest::default();
        let all = || BTreeSet::from(["a", "b", "c"]);
        assert_eq!(contest.settle(all(), [("b", 1)].into()), ["b"].into());
        // For another reason, and somebody of another contest.
        assert_eq!(contest.settle(all(), [("b", 2), ("d", 3)].into()), BTreeSet::new());
        assert_eq!(contest.lost(), &BTreeMap::from([("b", 2)]));
        assert_eq!(contest.settle(all(), [("c", 1)].into()), ["b", "c"].into());
    }
}
