//! Workloads that write the same address: which of them has it.
//!
//! An address leads to one host, which proves one identity. Anybody who may write in one namespace may write the address of
//! somebody else, and must lead nobody's calls away by that, nor take a policy off a pod. So one Workload has an address, and
//! whoever writes it as well is not in force as a whole. A pod that runs has its addresses before every document; of
//! documents one that proves an identity goes before one that is dialled in plaintext, and then the first by name counts.
//! Those that are dialled in plaintext share an address, as pods in their machine's network do: it leads to one host in any
//! case, and nothing that is said of them could be taken off. Invariant: the outcome depends on what is written, not on when.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::base::problems::{FieldPath, Problems};
use crate::model::object::Object;
use crate::model::workload::{WorkloadSpec, WorkloadTransport};
use crate::model::{ResourceKey, Resources};

/// A Workload with the addresses that it writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim<'a> {
    pub(crate) workload: &'a Object<WorkloadSpec>,
    /// Is it the record of a pod that runs here?
    pub(crate) runs: bool,
}

/// Why a Workload is not in force.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Lost {
    address: IpAddr,
    /// Its place among the Workload's addresses.
    index: usize,
    /// Who has it.
    owner: ResourceKey,
    /// Is that a pod that runs here?
    to_a_pod: bool,
}

impl Lost {
    /// Says so of the Workload.
    pub(crate) fn tell(&self, problems: &mut Problems) {
        let Self { address, index, owner, to_a_pod } = self;
        let text = if *to_a_pod {
            format!("{address} is the address of {owner}, a pod that runs here, and leads there")
        } else {
            format!("{address} is the address of {owner} too, which counts")
        };
        let at = FieldPath::root().field("spec").field("addresses").index(*index);
        problems.refuse(&at, text, format!("write the address at which the workload is, or take {owner} out"));
    }
}

/// Those of the Workloads that have not all addresses that they write.
pub(crate) fn lost<'a>(claims: impl IntoIterator<Item = Claim<'a>>) -> BTreeMap<ResourceKey, Lost> {
    let mut claims: Vec<Claim<'_>> = claims.into_iter().collect();
    claims.sort_by_cached_key(|Claim { workload, runs }| (!runs, !workload.spec.transport.has_sidecar(), workload.named()));
    let mut owners: BTreeMap<IpAddr, Claim<'_>> = BTreeMap::new();
    let mut lost = BTreeMap::new();
    for claim in claims {
        let addresses = || claim.workload.spec.addresses.iter().map(IpAddr::to_canonical);
        let is_plain = |claim: &Claim<'_>| claim.workload.spec.transport == WorkloadTransport::Plaintext;
        let shares = |owner: &Claim<'_>| is_plain(owner) && is_plain(&claim);
        let taken = addresses()
            .enumerate()
            .find_map(|(index, address)| Some((index, address, owners.get(&address).filter(|owner| !shares(owner))?)));
        match taken {
            Some((index, address, owner)) => {
                let (owner, to_a_pod) = (owner.workload.key(), owner.runs);
                lost.insert(claim.workload.key(), Lost { address, index, owner, to_a_pod });
            }
            None => {
                for address in addresses() {
                    owners.entry(address).or_insert(claim);
                }
            }
        }
    }
    lost
}

/// Of documents: no pod is known to run.
pub(super) fn lost_among(resources: &Resources) -> BTreeMap<ResourceKey, Lost> {
    let mut seen = BTreeSet::new();
    let mut addresses = resources.workloads().flat_map(|workload| &workload.spec.addresses);
    // As good as always, each address is written once.
    if addresses.all(|address| seen.insert(address.to_canonical())) {
        return BTreeMap::new();
    }
    lost(resources.workloads().map(|workload| Claim { workload, runs: false }))
}

/// The resources without the Workloads that are not in force.
pub(super) fn in_force(resources: &Resources) -> Cow<'_, Resources> {
    let lost = lost_among(resources);
    if lost.is_empty() {
        return Cow::Borrowed(resources);
    }
    let mut left = resources.clone();
    left.by_key.retain(|key, _| !lost.contains_key(key));
    Cow::Owned(left)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::names::Named;

    fn workload(name: &str, addresses: &[&str], transport: WorkloadTransport) -> Object<WorkloadSpec> {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let spec = WorkloadSpec { addresses, transport, ..WorkloadSpec::default() };
        Object::new(&name.parse::<Named>().unwrap(), BTreeMap::new(), spec)
    }

    #[test]
    fn one_workload_has_an_address_whatever_the_order_in_which_they_come() {
        use WorkloadTransport::{MutualTls, Plaintext};
        let all = [
            (workload("shop/pod", &["10.64.0.5", "fd64::5"], Plaintext), true),
            (workload("a/thief", &["10.64.9.1", "::ffff:10.64.0.5"], MutualTls), false),
            // Of who is not in force nothing is taken away.
            (workload("b/next", &["10.64.9.1"], MutualTls), false),
            (workload("a/plain", &["10.64.9.2"], Plaintext), false),
            (workload("c/proves", &["10.64.9.2"], MutualTls), false),
            (workload("d/later", &["10.64.9.1"], MutualTls), false),
        ];
        let told = |reversed: bool| {
            let claims = all.iter().map(|(workload, runs)| Claim { workload, runs: *runs });
            let lost = if reversed { lost(claims.rev()) } else { lost(claims) };
            let each = lost.into_iter().map(|(key, lost)| {
                let mut problems = Problems::of(key);
                lost.tell(&mut problems);
                problems.iter().map(ToString::to_string).collect::<String>()
            });
            each.collect::<Vec<_>>()
        };
        assert_eq!(
            told(false),
            [
                "Workload/a/plain: spec.addresses[0]: 10.64.9.2 is the address of Workload/c/proves too, which counts; \
                 write the address at which the workload is, or take Workload/c/proves out",
                "Workload/a/thief: spec.addresses[1]: 10.64.0.5 is the address of Workload/shop/pod, a pod that runs here, \
                 and leads there; write the address at which the workload is, or take Workload/shop/pod out",
                "Workload/d/later: spec.addresses[0]: 10.64.9.1 is the address of Workload/b/next too, which counts; \
                 write the address at which the workload is, or take Workload/b/next out",
            ]
        );
        assert_eq!(told(true), told(false));
    }

    #[test]
    fn workloads_in_plaintext_share_an_address_as_pods_in_their_machines_network_do() {
        use WorkloadTransport::{MutualTls, Plaintext};
        let claimed = |all: &[(Object<WorkloadSpec>, bool)]| {
            let lost = lost(all.iter().map(|(workload, runs)| Claim { workload, runs: *runs }));
            lost.into_keys().map(|key| key.name.to_string()).collect::<Vec<_>>()
        };
        let mut all = vec![
            (workload("infra/exporter", &["192.0.2.7"], Plaintext), true),
            (workload("infra/network", &["192.0.2.7"], Plaintext), true),
            (workload("infra/written", &["192.0.2.7"], Plaintext), false),
        ];
        assert!(claimed(&all).is_empty());
        all.push((workload("infra/meshed", &["192.0.2.7"], MutualTls), true));
        assert_eq!(claimed(&all), ["infra/exporter", "infra/network", "infra/written"]);
    }
}
