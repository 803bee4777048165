//! Which Service has a cluster address, for as long as the mesh lives: who had it first keeps it. Pure.
//!
//! Addresses that the control plane gave stay with whom they were given to; one that is written is held until its Service
//! goes or writes another. Who holds what is kept over restarts in the address book, and until everything was read once a
//! holder that is not there yet keeps its own. Invariant: an address that is held leads to nobody else.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::contest::Contest;
use crate::base::names::Named;
use crate::model::address_book::{AddressBook, service_addresses};
use crate::model::object::Object;
use crate::model::service::ServiceSpec;
use crate::snapshot::compile;
use crate::snapshot::service_claims::{self, Taken};

/// Of all cluster addresses.
#[derive(Clone, Debug, Default)]
pub(crate) struct Holders {
    held: BTreeMap<IpAddr, Holder>,
    /// Services that write addresses, theirs or another one's.
    contest: Contest<Named, Taken>,
    /// Services of which it was settled anew what they have, since [`Holders::hold`].
    settled: BTreeSet<Named>,
    changed: bool,
}

#[derive(Clone, Debug, Eq, PartialEq)]
struct Holder {
    name: Named,
    /// Did the control plane give it the address?
    is_given: bool,
}

impl Holders {
    /// As an earlier life left them.
    pub(crate) fn read(book: &AddressBook) -> Self {
        let mut holders = Self::default();
        let written = book.held.iter().filter_map(|(address, name)| Some((*address, name.parse().ok()?)));
        holders.held.extend(written.map(|(address, name)| (address, Holder { name, is_given: false })));
        for (name, number) in &book.services.owners {
            if let Ok(name) = name.parse() {
                holders.give(*number, &name);
            }
        }
        holders
    }

    /// The control plane gave a Service the addresses of `number`.
    pub(crate) fn give(&mut self, number: u16, name: &Named) {
        let holder = Holder { name: name.clone(), is_given: true };
        self.held.extend(service_addresses(number).map(|address| (address, holder.clone())));
    }

    /// Does a Service have this address or write it?
    pub(crate) fn is_known(&self, address: IpAddr) -> bool {
        self.held.contains_key(&address) || self.contest.claims().contains_key(&address)
    }

    /// Why a Service has none of the addresses that it writes, if that is so.
    pub(crate) fn lost(&self, service: &Named) -> Option<&Taken> {
        self.contest.lost().get(service)
    }

    /// All that have none of theirs.
    pub(crate) fn all_lost(&self) -> &BTreeMap<Named, Taken> {
        self.contest.lost()
    }

    /// Takes in what a Service writes; `service` reads what is written. Returns the Services that come to their addresses or
    /// lose them by that.
    pub(crate) fn contest<'a>(
        &mut self,
        name: &Named,
        before: &BTreeSet<IpAddr>,
        service: impl Fn(&Named) -> Option<&'a Object<ServiceSpec>>,
    ) -> BTreeSet<Named> {
        let now = service(name).map(compile::addresses).unwrap_or_default();
        self.contest.write(name, before, &now);
        self.settle(BTreeSet::from([name.clone()]), before.union(&now).copied(), service)
    }

    /// Everything that there is was read once: who does not write an address of an earlier life any more lets go of it. Returns
    /// the Services that come to theirs by that.
    pub(crate) fn forget_gone<'a>(&mut self, service: impl Fn(&Named) -> Option<&'a Object<ServiceSpec>>) -> BTreeSet<Named> {
        self.let_go(|_| true, service)
    }

    /// From now on the Services have the addresses that were found to be theirs, and no others. Only at the end of a batch, so
    /// that of its Services the first by name has an address and not the first one read, and one that is written in another file now
    /// keeps its own. Returns the Services that come to theirs because others let go of them.
    pub(crate) fn hold<'a>(&mut self, service: impl Fn(&Named) -> Option<&'a Object<ServiceSpec>>) -> BTreeSet<Named> {
        let settled = std::mem::take(&mut self.settled);
        let changed = self.let_go(|name| settled.contains(name), &service);
        let further = std::mem::take(&mut self.settled);
        for name in settled.into_iter().chain(further) {
            let Some(object) = service(&name).filter(|_| self.lost(&name).is_none()) else { continue };
            for address in compile::addresses(object) {
                self.held.entry(address).or_insert_with(|| {
                    self.changed = true;
                    Holder { name: name.clone(), is_given: false }
                });
            }
        }
        changed
    }

    /// Who holds what is written, for the next life. None: nothing is different since the last time, and that was not in vain.
    pub(crate) fn write(&self) -> Option<BTreeMap<IpAddr, String>> {
        let written = self.held.iter().filter(|(_, holder)| !holder.is_given);
        self.changed.then(|| written.map(|(address, holder)| (*address, holder.name.to_string())).collect())
    }

    /// That was written.
    pub(crate) fn written(&mut self) {
        self.changed = false;
    }

    /// What these Services hold and do not write any more is free again.
    fn let_go<'a>(
        &mut self,
        is_one: impl Fn(&Named) -> bool,
        service: impl Fn(&Named) -> Option<&'a Object<ServiceSpec>>,
    ) -> BTreeSet<Named> {
        let claims = self.contest.claims();
        let is_written = |address: &IpAddr, name: &Named| claims.get(address).is_some_and(|names| names.contains(name));
        let gone = self
            .held
            .iter()
            .filter(|(address, Holder { name, is_given })| !is_given && is_one(name) && !is_written(address, name));
        let gone: Vec<IpAddr> = gone.map(|(address, _)| *address).collect();
        self.changed |= !gone.is_empty();
        for address in &gone {
            self.held.remove(address);
        }
        self.settle(BTreeSet::new(), gone, service)
    }

    fn settle<'a>(
        &mut self,
        names: BTreeSet<Named>,
        addresses: impl IntoIterator<Item = IpAddr>,
        service: impl Fn(&Named) -> Option<&'a Object<ServiceSpec>>,
    ) -> BTreeSet<Named> {
        let written = |name: &Named| service(name).map(compile::addresses).unwrap_or_default();
        let rivals = self.contest.rivals(names, addresses, written);
        self.settled.extend(rivals.iter().cloned());
        let holder = |address: IpAddr| self.held.get(&address).map(|holder| &holder.name);
        let lost = service_claims::lost(rivals.iter().filter_map(&service), holder);
        self.contest.settle(rivals, lost)
    }
}
