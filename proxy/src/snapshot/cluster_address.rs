//! Which addresses a Service can have.
//!
//! Anybody who may write in one namespace writes the cluster address of a Service, and it holds for all callers. It must not
//! lead calls of others away: neither from a pod nor from a host outside of the mesh.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::compile;
use crate::model::Resources;
use crate::model::mesh::service_ranges;
use crate::model::object::Object;
use crate::model::service::ServiceSpec;

/// The networks in which a Service has its address.
#[derive(Debug)]
pub(crate) struct ClusterAddresses {
    ranges: Vec<IpNet>,
}

impl ClusterAddresses {
    /// Those of the mesh, and those from which the control plane gives.
    pub(crate) fn of(resources: &Resources) -> Self {
        Self { ranges: compile::mesh_of(resources).networks() }
    }

    /// Is it an address of the mesh, so that nothing outside of it can have it?
    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        is_given(address) || self.ranges.iter().any(|range| range.contains(&address))
    }

    /// The addresses by which a service is called: those of the mesh that no workload has.
    pub(crate) fn of_service(&self, service: &Object<ServiceSpec>, is_workloads: impl Fn(IpAddr) -> bool) -> BTreeSet<IpAddr> {
        let mut addresses = compile::addresses(service);
        addresses.retain(|address| self.contains(*address) && (is_given(*address) || !is_workloads(*address)));
        addresses
    }
}

/// Is it an address that the control plane gives to Services? No pod is ever given one, so a Workload that has one is wrong;
/// everywhere else it is the Service that is.
pub(crate) fn is_given(address: IpAddr) -> bool {
    service_ranges().any(|range| range.contains(&address))
}
