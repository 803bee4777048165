//! What resolves inside pods, as the world stands. Pure.

use std::collections::BTreeMap;

use super::world::World;
use crate::base::names::check_part;
use crate::model::Resource;
use crate::model::name_table::{NameAnswer, NameTable};
use crate::model::object::Object;
use crate::model::workload::WorkloadSpec;

/// Every Service by its full name; workloads below Services without an address.
pub(super) fn table(world: &World) -> NameTable {
    let resources = &world.resources().by_key;
    // By label, so that a service looks at the workloads that it may select instead of at all of them.
    let mut labelled: BTreeMap<(&str, &str, &str), Vec<&Object<WorkloadSpec>>> = BTreeMap::new();
    for resource in resources.values() {
        let Resource::Workload(workload) = resource.as_ref() else { continue };
        for (label, value) in &workload.metadata.labels {
            labelled.entry((&workload.metadata.namespace, label, value)).or_default().push(workload);
        }
    }
    let mut table = BTreeMap::new();
    for resource in resources.values() {
        let Resource::Service(service) = resource.as_ref() else { continue };
        let first = service.spec.selector.first_key_value();
        let candidates = first.and_then(|(label, value)| labelled.get(&(service.metadata.namespace.as_str(), label, value)));
        let behind: Vec<&Object<WorkloadSpec>> = service.spec.leads_to(candidates.into_iter().flatten().copied()).collect();
        let of_families = |workload: &Object<WorkloadSpec>| {
            let addresses = workload.spec.addresses.iter().copied();
            addresses.filter(|address| service.spec.is_of_family(*address)).collect::<Vec<_>>()
        };
        let mut answer = NameAnswer {
            service: world.addresses_of(service).into_iter().collect(),
            endpoints: behind.iter().flat_map(|workload| of_families(workload)).collect(),
        };
        let full = format!("{}.{}.svc.cluster.local", service.metadata.name, service.metadata.namespace);
        if service.spec.is_headless() {
            // Without an address of its own it is all of its workloads, and each of them has a name below it.
            answer.service.clone_from(&answer.endpoints);
            let named = behind.into_iter().filter(|workload| check_part(&workload.metadata.name).is_ok());
            table.extend(named.map(|workload| {
                let addresses = of_families(workload);
                let answer = NameAnswer { service: addresses.clone(), endpoints: addresses };
                (format!("{}.{full}", workload.metadata.name), answer)
            }));
        }
        table.insert(full, answer);
    }
    NameTable(table)
}
