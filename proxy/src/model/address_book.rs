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
    /// Addresses of pods that documents write for Workloads.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub(crate) claimed: BTreeSet<IpAddr>,
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

impl AddressBook {
    /// The number of the pod `owner`, which keeps it if it has one. A new one is of addresses that no document writes: whoever
    /// wrote it means somebody else.
    ///
    /// # Errors
    /// Every number is taken.
    pub(crate) fn allocate_pod(&mut self, owner: &str) -> Result<u16, Exhausted> {
        let Self { pods, held, claimed, .. } = self;
        pods.allocate_of(owner, |number| {
            let (v4, v6) = pod_addresses(number);
            [v4.into(), v6.into()].iter().all(|address| !held.contains_key(address) && !claimed.contains(address))
        })
    }
}

impl Range {
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
        let mut book = AddressBook::default();
        assert_eq!(book.allocate_pod("shop/a").unwrap(), 2);
        assert_eq!(book.allocate_pod("shop/b").unwrap(), 3);
        assert_eq!(book.allocate_pod("shop/a").unwrap(), 2);
        book.pods.release("shop/a");
        assert_eq!(book.allocate_pod("shop/c").unwrap(), 4);
        book.pods.last = LAST;
        assert_eq!(book.allocate_pod("shop/d").unwrap(), 2);
        assert_eq!(book.allocate_pod("shop/e").unwrap(), 5);
    }

    #[test]
    fn a_pod_is_given_no_address_that_a_document_writes_and_keeps_its_own() {
        let mut book = AddressBook::default();
        assert_eq!(book.allocate_pod("shop/a").unwrap(), 2);
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        book.claimed = ["10.64.0.2", "10.64.0.3", "fd64::4", "192.0.2.5"].map(address).into();
        book.held = [(address("10.64.0.5"), "shop/web".to_owned())].into();
        assert_eq!(book.allocate_pod("shop/a").unwrap(), 2);
        assert_eq!(book.allocate_pod("shop/b").unwrap(), 6);
    }

    #[test]
    fn a_full_range_says_so() {
        let owners = (FIRST..=LAST).map(|number| (number.to_string(), number)).collect();
        let mut book = AddressBook { pods: Range { owners, last: 7 }, ..AddressBook::default() };
        assert!(book.allocate_pod("one more").is_err());
        book.pods.release("9");
        assert_eq!(book.allocate_pod("one more").unwrap(), 9);
    }

    #[test]
    fn a_number_is_an_address_of_each_family() {
        assert_eq!(pod_addresses(261), ("10.64.1.5".parse().unwrap(), "fd64::1:5".parse().unwrap()));
        assert_eq!(service_addresses(261), ["10.65.1.5".parse::<IpAddr>().unwrap(), "fd65::105".parse().unwrap()]);
    }
}
