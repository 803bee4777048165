//! Services that write the same cluster address: which of them has it.
//!
//! A cluster address holds for all callers of the mesh, and anybody who may write in one namespace may write the one of
//! somebody else's Service. It must not lead anybody's calls away: who had the address first keeps it, and of those of whom
//! that is not known the first by namespace and name has it. The other Service has none of its addresses, so that nobody is led to it; what
//! it selects stays known, so that its policies go on covering that. Invariant: of what is held nothing depends on an order.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::compile;
use crate::base::names::Named;
use crate::base::problems::{FieldPath, Problems};
use crate::model::object::Object;
use crate::model::service::ServiceSpec;
use crate::model::{Kind, ResourceKey, Resources};

/// Why a Service has none of the addresses that it writes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Taken {
    address: IpAddr,
    /// Who has it.
    owner: Named,
    /// Is it known that this one had it first?
    is_held: bool,
}

impl Taken {
    /// Who has the address.
    pub(crate) fn owner(&self) -> &Named {
        &self.owner
    }

    /// Says so of the Service.
    pub(crate) fn tell(&self, service: &ServiceSpec, problems: &mut Problems) {
        let Self { address, owner, is_held } = self;
        let owner = ResourceKey { kind: Kind::Service, name: owner.clone() };
        let text = if *is_held {
            format!("{address} is the address of {owner}, which had it first: this Service is not in force")
        } else {
            format!("{address} is the address of {owner} too, which counts: this Service is not in force")
        };
        let is_it = |text: &String| text.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical() == *address);
        let spec = FieldPath::root().field("spec");
        let at = match service.cluster_ips.iter().position(is_it) {
            Some(index) => spec.field("clusterIPs").index(index),
            None => spec.field("clusterIP"),
        };
        problems.refuse(&at, text, "leave it out, and the Service is given an address of its own");
    }
}

/// Those of the Services that write an address which is another one's. `holder` tells who is known to have one.
pub(crate) fn lost<'a, 'b>(
    services: impl IntoIterator<Item = &'a Object<ServiceSpec>>,
    holder: impl Fn(IpAddr) -> Option<&'b Named>,
) -> BTreeMap<Named, Taken> {
    let claims: BTreeMap<Named, BTreeSet<IpAddr>> =
        services.into_iter().map(|service| (service.named(), compile::addresses(service))).collect();
    let mut owners: BTreeMap<IpAddr, Named> = BTreeMap::new();
    let mut lost = BTreeMap::new();
    for (name, addresses) in claims {
        let taken = addresses.iter().find_map(|address| {
            let held = holder(*address);
            let owner = held.or_else(|| owners.get(address)).filter(|owner| **owner != name)?;
            Some(Taken { address: *address, owner: owner.clone(), is_held: held.is_some() })
        });
        match taken {
            Some(taken) => {
                lost.insert(name, taken);
            }
            None => owners.extend(addresses.into_iter().map(|address| (address, name.clone()))),
        }
    }
    lost
}

/// Of documents: nobody is known to have had an address before.
pub(super) fn lost_among(resources: &Resources) -> BTreeMap<Named, Taken> {
    lost(resources.services(), |_| None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, addresses: &[&str]) -> Object<ServiceSpec> {
        let cluster_ips = addresses.iter().map(|&address| address.to_owned()).collect();
        Object::new(&name.parse::<Named>().unwrap(), BTreeMap::new(), ServiceSpec { cluster_ips, ..ServiceSpec::default() })
    }

    #[test]
    fn who_holds_an_address_keeps_it_and_else_the_first_by_name_has_it() {
        let all = [
            service("a/thief", &["fd65::2", "::ffff:10.65.0.2"]),
            service("b/next", &["fd65::2"]),
            service("c/later", &["fd65::2"]),
            service("shop/db", &["10.65.0.2"]),
        ];
        let db: Named = "shop/db".parse().unwrap();
        let told = |reversed: bool| {
            let holder = |address: IpAddr| (address == IpAddr::from([10, 65, 0, 2])).then_some(&db);
            let lost = if reversed { lost(all.iter().rev(), holder) } else { lost(&all, holder) };
            let each = lost.into_iter().map(|(name, taken)| {
                let mut problems = Problems::of(name.to_string());
                let object = all.iter().find(|object| object.named() == name).unwrap();
                taken.tell(&object.spec, &mut problems);
                problems.iter().map(ToString::to_string).collect::<String>()
            });
            each.collect::<Vec<_>>()
        };
        assert_eq!(
            told(false),
            [
                "a/thief: spec.clusterIPs[1]: 10.65.0.2 is the address of Service/shop/db, which had it first: this Service is \
                 not in force; leave it out, and the Service is given an address of its own",
                "c/later: spec.clusterIPs[0]: fd65::2 is the address of Service/b/next too, which counts: this Service is not \
                 in force; leave it out, and the Service is given an address of its own",
            ]
        );
        assert_eq!(told(true), told(false));
    }
}
