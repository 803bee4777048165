//! Who has which address in the local mesh: `STATE/addresses.json`. Pods are written by `outrigger run`, cluster
//! addresses of Services by the control plane, each under the lock of `base::state::update`.
//!
//! An address that was given back is not given out again until the range has been walked round: who still remembers
//! the old owner meets nobody rather than a stranger.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// The file's content. Keys are `NAMESPACE/NAME`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct AddressBook {
    pub(crate) pods: Range,
    pub(crate) services: Range,
    /// Cluster addresses that are written in documents, by the Service that had each of them first.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) held: BTreeMap<IpAddr, String>,
}

/// One kind of owner. A number from 2 to 65534 stands for an address of each family.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Range {
    pub(crate) owners: BTreeMap<String, u16>,
    /// The number given out last.
    pub(crate) last: u16,
}

/// Every number is taken.
#[derive(Debug, thiserror::Error)]
#[error("all {} addresses of the range are taken", LAST - FIRST + 1)]
pub(crate) struct Exhausted;

const FIRST: u16 = 2;
const LAST: u16 = u16::MAX - 1;

impl Range {
    /// The number of `owner`, which keeps it if it has one.
    ///
    /// # Errors
    /// Every number is taken.
    pub(crate) fn allocate(&mut self, owner: &str) -> Result<u16, Exhausted> {
        self.allocate_of(owner, |_| true)
    }

    /// The number of `owner`, which keeps it if it has one, or else one of those that are free.
    ///
    /// # Errors
    /// Every number is taken.
    pub(crate) fn allocate_of(&mut self, owner: &str, is_free: impl Fn(u16) -> bool) -> Result<u16, Exhausted> {
        if let Some(number) = self.owners.get(owner) {
            return Ok(*number);
        }
        let taken: BTreeSet<u16> = self.owners.values().copied().collect();
        let start = if (FIRST..LAST).contains(&self.last) { self.last + 1 } else { FIRST };
        let free =
            (start..=LAST).chain(FIRST..start).find(|number| !taken.contains(number) && is_free(*number)).ok_or(Exhausted)?;
        self.owners.insert(owner.to_owned(), free);
        self.last = free;
        Ok(free)
    }

    /// `owner` gives its number back.
    pub(crate) fn release(&mut self, owner: &str) {
        self.owners.remove(owner);
    }
}

/// The pod addresses of `number`: in 10.64.0.0/16 and fd64::/64.
pub(crate) fn pod_addresses(number: u16) -> (Ipv4Addr, Ipv6Addr) {
    let [high, low] = number.to_be_bytes();
    (Ipv4Addr::new(10, 64, high, low), Ipv6Addr::new(0xfd64, 0, 0, 0, 0, 0, high.into(), low.into()))
}

/// The cluster addresses of `number`: in 10.65.0.0/16 and fd65::/112.
pub(crate) fn service_addresses(number: u16) -> [IpAddr; 2] {
    let [high, low] = number.to_be_bytes();
    [Ipv4Addr::new(10, 65, high, low).into(), Ipv6Addr::new(0xfd65, 0, 0, 0, 0, 0, 0, number).into()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_keeps_its_number_and_a_returned_one_rests() {
        let mut range = Range::default();
        assert_eq!(range.allocate("shop/a").unwrap(), 2);
        assert_eq!(range.allocate("shop/b").unwrap(), 3);
        assert_eq!(range.allocate("shop/a").unwrap(), 2);
        range.release("shop/a");
        assert_eq!(range.allocate("shop/c").unwrap(), 4);
        range.last = LAST;
        assert_eq!(range.allocate("shop/d").unwrap(), 2);
        assert_eq!(range.allocate("shop/e").unwrap(), 5);
    }

    #[test]
    fn a_full_range_says_so() {
        let owners = (FIRST..=LAST).map(|number| (number.to_string(), number)).collect();
        let mut range = Range { owners, last: 7 };
        assert!(range.allocate("one more").is_err());
        range.release("9");
        assert_eq!(range.allocate("one more").unwrap(), 9);
    }

    #[test]
    fn a_number_is_an_address_of_each_family() {
        assert_eq!(pod_addresses(261), ("10.64.1.5".parse().unwrap(), "fd64::1:5".parse().unwrap()));
        assert_eq!(service_addresses(261), ["10.65.1.5".parse::<IpAddr>().unwrap(), "fd65::105".parse().unwrap()]);
    }
}
