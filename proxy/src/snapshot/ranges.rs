//! Addresses and the mesh's ranges: what lies outside of them, and what in them no host has.
//!
//! Whether an address is of the mesh is known by the ranges where nothing else is known of it: in them it is never dialled in
//! plaintext. One outside is found as long as the control plane answers, and taken for somebody else's as long as it does not.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::cluster_address::{ClusterAddresses, is_given};
use super::compile;
use crate::base::problems::{FieldPath, Problems};
use crate::model::object::Object;
use crate::model::service::ServiceSpec;
use crate::model::workload::WorkloadTransport;
use crate::model::{Kind, Resource, ResourceKey, Resources};

/// An address outside of the mesh's ranges belongs to a host somewhere, and one of a pod to the pod: a Service does not lead
/// calls away from them. One that the control plane gives is taken though the Mesh does not name its range; where its service
/// is not known, as before the first answer of the control plane, nothing keeps plaintext from it.
pub(super) fn check_ranges(
    ranges: &[IpNet],
    cluster: &ClusterAddresses,
    pods: &BTreeMap<IpAddr, &ResourceKey>,
    service: &Object<ServiceSpec>,
    problems: &mut Problems,
) {
    let at = FieldPath::root().field("spec").field("clusterIP");
    let remedy = "leave it out, and the Service is given an address of its own";
    for address in compile::addresses(service) {
        if let Some(owner) = pods.get(&address)
            && !is_given(address)
        {
            problems.refuse(&at, format!("{address} is the address of {owner}, and leads there"), remedy);
        } else if !cluster.contains(address) {
            let text = format!("{address} is outside of the mesh's ranges, and leads to whatever host has it");
            problems.refuse(&at, text, "leave it out, or write the range into the Mesh's ranges");
        } else if !ranges.iter().any(|range| range.contains(&address)) {
            let text = format!("{address} is outside of the mesh's ranges: while it is not known, it is dialled as no service's");
            problems.warn(&at, text, "write the range into the Mesh's ranges");
        }
    }
}

/// The first address of a range is the network's own and the last one of IPv4 goes to all of its hosts (RFC 1122 3.2.1.3, RFC
/// 4291 2.6.1).
pub(super) fn check_edges(
    ranges: &[IpNet],
    addresses: impl IntoIterator<Item = IpAddr>,
    at: &FieldPath,
    problems: &mut Problems,
) {
    for address in addresses {
        let address = address.to_canonical();
        let edge = ranges.iter().filter(|range| range.prefix_len() + 1 < range.max_prefix_len()).find_map(|range| match range {
            range if range.network() == address => Some(("the network's own address", range)),
            IpNet::V4(v4) if IpAddr::V4(v4.broadcast()) == address => Some(("the broadcast address", range)),
            IpNet::V4(_) | IpNet::V6(_) => None,
        });
        if let Some((what, range)) = edge {
            problems.refuse(at, format!("{address} is {what} of the mesh's range {range}"), "write the address of a host");
        }
    }
}

/// Workloads of the mesh at addresses that its ranges do not hold. Who writes ranges is told of all of them at once; where
/// nobody does, each Workload is told.
pub(super) fn held(resources: &Resources, ranges: &[IpNet], is_lost: impl Fn(&ResourceKey) -> bool) -> Problems {
    let mut outside: BTreeMap<&ResourceKey, Vec<(usize, IpAddr)>> = BTreeMap::new();
    for (key, resource) in resources.of_kind(Kind::Workload).filter(|(key, _)| !is_lost(key)) {
        let Resource::Workload(workload) = resource else { continue };
        // Without a sidecar it is dialled in plaintext anyway.
        if workload.spec.transport == WorkloadTransport::Plaintext {
            continue;
        }
        for (index, address) in workload.spec.addresses.iter().enumerate() {
            let address = address.to_canonical();
            if !ranges.iter().any(|range| range.contains(&address)) {
                outside.entry(key).or_default().push((index, address));
            }
        }
    }
    let mut all = Problems::default();
    let writer = resources.of_kind(Kind::Mesh).next();
    match writer {
        Some((mesh, Resource::Mesh(object))) if object.spec.ranges.is_some() && !outside.is_empty() => {
            let each = outside.iter().take(WORKLOADS_TOLD).map(|(key, addresses)| {
                let addresses: Vec<String> = addresses.iter().map(|(_, address)| address.to_string()).collect();
                format!("{} of {key}", addresses.join(", "))
            });
            let mut told = each.collect::<Vec<_>>().join("; ");
            if outside.len() > WORKLOADS_TOLD {
                told.push_str(&format!("; and those of {} others", outside.len() - WORKLOADS_TOLD));
            }
            let mut problems = Problems::of(mesh);
            let at = FieldPath::root().field("spec").field("ranges");
            problems.warn(
                &at,
                format!("they do not hold {told}: {OUTSIDE}"),
                "write the networks of the pods too, of both families",
            );
            all.append(problems);
        }
        _nobody_writes_ranges => {
            for (key, addresses) in outside {
                let mut problems = Problems::of(key);
                for (index, address) in addresses {
                    let at = FieldPath::root().field("spec").field("addresses").index(index);
                    let text = format!("{address} is outside of the mesh's ranges: {OUTSIDE}");
                    problems.warn(&at, text, "write its network into the ranges of a Mesh, beside those of pods and services");
                }
                all.append(problems);
            }
        }
    }
    all
}

/// What it means.
const OUTSIDE: &str = "while such an address is not known to a caller's sidecar, it is dialled as one outside of the mesh, in \
                       plaintext where egress is allowed";
/// How many workloads a text names.
const WORKLOADS_TOLD: usize = 8;
