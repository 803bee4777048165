//! `Service` (Kubernetes v1): a name and an address for the workloads that a selector picks. Of its many fields the ones
//! below mean something here; the others that Kubernetes knows are taken and left out, and what it does not know either is
//! a slip of the pen and refused. Source: Kubernetes API v1.34, ServiceSpec and ServicePort.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{IgnoredAny, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Kind;
use super::object::{Object, Spec, nullable};
use super::workload::WorkloadSpec;

/// What a Service without an address says in the place of one.
pub(crate) const NO_ADDRESS: &str = "None";

/// The body of a Service.
#[derive(Clone, Debug, Default, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ServiceSpec {
    /// Labels that a workload of the same namespace must have. Empty: it selects nothing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) selector: BTreeMap<String, String>,
    /// What it offers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) ports: Vec<ServicePortSpec>,
    /// The address by which it is called; given by the control plane where none is written. One that is written lies in the
    /// ranges of `Mesh` (or in 10.65.0.0/16, fd65::/112), and neither a Workload nor another Service has it: any other is refused, and who had one first keeps it. `None`: it has none, and
    /// its name resolves to the addresses of the workloads behind it.
    #[serde(default, rename = "clusterIP", skip_serializing_if = "Option::is_none")]
    pub(crate) cluster_ip: Option<String>,
    /// All addresses, where there are several. The first one is the `clusterIP`.
    #[serde(default, rename = "clusterIPs", skip_serializing_if = "Vec::is_empty")]
    pub(crate) cluster_ips: Vec<String>,
    /// Of which families the addresses of pods are to which its name leads: the first one, or each where there are several.
    /// Default: IPv4.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) ip_families: Vec<IpFamily>,
    /// `SingleStack`, the default: one family. `PreferDualStack` and `RequireDualStack`: both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ip_family_policy: Option<IpFamilyPolicy>,
    /// `Cluster`, the default: it leads to all its workloads. `Local`: to those on the caller's machine alone, and nowhere
    /// where there is none.
    #[serde(default, skip_serializing_if = "InternalTrafficPolicy::is_cluster")]
    pub(crate) internal_traffic_policy: InternalTrafficPolicy,
    /// It leads to workloads that are not ready, too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) publish_not_ready_addresses: bool,
}

/// To which of its workloads a Service leads.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub(crate) enum InternalTrafficPolicy {
    #[default]
    Cluster,
    Local,
}

impl InternalTrafficPolicy {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde calls")]
    fn is_cluster(&self) -> bool {
        *self == Self::Cluster
    }
}

/// A family of addresses.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub(crate) enum IpFamily {
    IPv4,
    IPv6,
}

/// How many families a Service has.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[expect(clippy::enum_variant_names, reason = "the words of Kubernetes")]
pub(crate) enum IpFamilyPolicy {
    SingleStack,
    PreferDualStack,
    RequireDualStack,
}

/// One port of a Service.
#[derive(Clone, Debug, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ServicePortSpec {
    /// Its name, which each has where there are several; up to the first dash it may say what the port speaks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// The port that callers use.
    pub(crate) port: u16,
    /// The workload's port, by number or name; none of the sidecar's own (14001, 14006, 14007, 14020, 14021). Default: the same number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) target_port: Option<PortRef>,
    /// What the port speaks: `http`, `kubernetes.io/h2c`, `grpc`, `tcp`. Not written: the name, else the first bytes, tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) app_protocol: Option<String>,
    /// `TCP`, the default. A UDP port means nothing here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) protocol: Option<String>,
}

/// A workload's port, by number or by name.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum PortRef {
    Number(u16),
    Name(String),
}

impl Spec for ServiceSpec {
    const KIND: Kind = Kind::Service;
}

impl ServiceSpec {
    /// Its addresses as written, each once; none for a headless service.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = &str> {
        let single = self.cluster_ip.as_deref().filter(|ip| !self.cluster_ips.iter().any(|other| other == ip));
        single.into_iter().chain(self.cluster_ips.iter().map(String::as_str)).filter(|ip| !ip.is_empty() && *ip != NO_ADDRESS)
    }

    /// Forgets the addresses that it was given; that it is to have none is its writer's word, and stays.
    pub(crate) fn leave_address_to_control(&mut self) {
        if !self.is_headless() {
            self.cluster_ip = None;
            self.cluster_ips.clear();
        }
    }

    /// Has it no address of its own, by its writer's word (`clusterIP: None`)? Who calls it calls the workloads behind it, each
    /// at its own address.
    pub(crate) fn is_headless(&self) -> bool {
        self.cluster_ip.iter().chain(&self.cluster_ips).any(|address| address == NO_ADDRESS) && self.addresses().next().is_none()
    }

    /// Does its name lead to this address of a pod? A program that listens at one family alone is not reached at the other, and
    /// callers ask IPv6 first: so it is one family unless both are asked for, as in Kubernetes.
    pub(crate) fn is_of_family(&self, address: IpAddr) -> bool {
        let is_single = match self.ip_family_policy {
            Some(IpFamilyPolicy::SingleStack) => true,
            Some(IpFamilyPolicy::PreferDualStack | IpFamilyPolicy::RequireDualStack) => false,
            None => self.ip_families.len() < 2,
        };
        let first = self.ip_families.first().copied().unwrap_or(IpFamily::IPv4);
        let family = if address.to_canonical().is_ipv4() { IpFamily::IPv4 } else { IpFamily::IPv6 };
        !is_single || family == first
    }

    /// Does it select a workload with these labels?
    pub(crate) fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        !self.selector.is_empty() && self.selector.iter().all(|(key, value)| labels.get(key) == Some(value))
    }

    /// With which of these workloads of its namespace something new is begun. Never with one that is about to end, also where there is no
    /// other. With one that was ready when its machine was last heard of, where there is no other: when the API server was away, all
    /// machines are unheard of at first, and their pods unready, whatever they do.
    pub(crate) fn leads_to<'a>(
        &self,
        workloads: impl Iterator<Item = &'a Object<WorkloadSpec>>,
    ) -> impl Iterator<Item = &'a Object<WorkloadSpec>> {
        let is_led = |workload: &&Object<WorkloadSpec>| {
            let WorkloadSpec { terminating, unready, unheard, .. } = workload.spec;
            let may_be = !unready || unheard || self.publish_not_ready_addresses;
            !terminating && may_be && self.selects(&workload.metadata.labels)
        };
        let led: Vec<_> = workloads.filter(is_led).collect();
        let is_sure = |workload: &&Object<WorkloadSpec>| !workload.spec.unready || self.publish_not_ready_addresses;
        let are_sure = led.iter().any(is_sure);
        led.into_iter().filter(move |workload| !are_sure || is_sure(workload))
    }
}

impl ServicePortSpec {
    /// The workload's port to which it leads.
    pub(crate) fn target(&self) -> PortRef {
        self.target_port.clone().unwrap_or(PortRef::Number(self.port))
    }

    /// Is it a TCP port?
    pub(crate) fn is_tcp(&self) -> bool {
        self.protocol.as_deref().is_none_or(|protocol| protocol == "TCP")
    }
}

impl fmt::Display for PortRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(port) => port.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// What a document may say: the fields that mean something here, and those that Kubernetes alone reads.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WrittenService {
    #[serde(default, deserialize_with = "nullable")]
    selector: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "nullable")]
    ports: Vec<ServicePortSpec>,
    #[serde(default, rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(default, rename = "clusterIPs", deserialize_with = "nullable")]
    cluster_ips: Vec<String>,
    #[serde(default, rename = "allocateLoadBalancerNodePorts")]
    _allocate_load_balancer_node_ports: Option<IgnoredAny>,
    #[serde(default, rename = "externalIPs")]
    _external_ips: Option<IgnoredAny>,
    #[serde(default, rename = "externalName")]
    _external_name: Option<IgnoredAny>,
    #[serde(default, rename = "externalTrafficPolicy")]
    _external_traffic_policy: Option<IgnoredAny>,
    #[serde(default, rename = "healthCheckNodePort")]
    _health_check_node_port: Option<IgnoredAny>,
    #[serde(default, rename = "internalTrafficPolicy", deserialize_with = "nullable")]
    internal_traffic_policy: InternalTrafficPolicy,
    #[serde(default, rename = "ipFamilies", deserialize_with = "nullable")]
    ip_families: Vec<IpFamily>,
    #[serde(default, rename = "ipFamily")]
    _ip_family: Option<IgnoredAny>,
    #[serde(default, rename = "ipFamilyPolicy")]
    ip_family_policy: Option<IpFamilyPolicy>,
    #[serde(default, rename = "loadBalancerClass")]
    _load_balancer_class: Option<IgnoredAny>,
    #[serde(default, rename = "loadBalancerIP")]
    _load_balancer_ip: Option<IgnoredAny>,
    #[serde(default, rename = "loadBalancerSourceRanges")]
    _load_balancer_source_ranges: Option<IgnoredAny>,
    #[serde(default, rename = "publishNotReadyAddresses", deserialize_with = "nullable")]
    publish_not_ready_addresses: bool,
    #[serde(default, rename = "sessionAffinity")]
    _session_affinity: Option<IgnoredAny>,
    #[serde(default, rename = "sessionAffinityConfig")]
    _session_affinity_config: Option<IgnoredAny>,
    #[serde(default, rename = "topologyKeys")]
    _topology_keys: Option<IgnoredAny>,
    #[serde(default, rename = "trafficDistribution")]
    _traffic_distribution: Option<IgnoredAny>,
    #[serde(default, rename = "type")]
    _type: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WrittenPort {
    #[serde(default)]
    name: Option<String>,
    port: u16,
    #[serde(default)]
    target_port: Option<PortRef>,
    #[serde(default)]
    app_protocol: Option<String>,
    #[serde(default)]
    protocol: Option<String>,
    #[serde(default, rename = "nodePort")]
    _node_port: Option<IgnoredAny>,
}

impl<'de> Deserialize<'de> for ServiceSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let WrittenService {
            selector,
            ports,
            cluster_ip,
            cluster_ips,
            ip_families,
            ip_family_policy,
            internal_traffic_policy,
            publish_not_ready_addresses,
            ..
        } = WrittenService::deserialize(deserializer)?;
        Ok(Self {
            selector,
            ports,
            cluster_ip,
            cluster_ips,
            ip_families,
            ip_family_policy,
            internal_traffic_policy,
            publish_not_ready_addresses,
        })
    }
}

impl<'de> Deserialize<'de> for ServicePortSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let WrittenPort { name, port, target_port, app_protocol, protocol, .. } = WrittenPort::deserialize(deserializer)?;
        Ok(Self { name, port, target_port, app_protocol, protocol })
    }
}

impl Serialize for PortRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Number(port) => serializer.serialize_u16(*port),
            Self::Name(name) => serializer.serialize_str(name),
        }
    }
}

impl<'de> Deserialize<'de> for PortRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Port;

        impl Visitor<'_> for Port {
            type Value = PortRef;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port number or a port name")
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<PortRef, E> {
                u16::try_from(number)
                    .map(PortRef::Number)
                    .map_err(|_too_large| E::custom(format!("{number} is not a port; write 1 to 65535, or a port's name")))
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<PortRef, E> {
                u16::try_from(number)
                    .map(PortRef::Number)
                    .map_err(|_no_port| E::custom(format!("{number} is not a port; write 1 to 65535, or a port's name")))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<PortRef, E> {
                Ok(text.parse().map_or_else(|_not_a_number| PortRef::Name(text.to_owned()), PortRef::Number))
            }
        }

        deserializer.deserialize_any(Port)
    }
}

impl JsonSchema for PortRef {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Port".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "integer", "minimum": 1, "maximum": 65535 }, { "type": "string" }], "x-kubernetes-int-or-string": true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels() -> BTreeMap<String, String> {
        [("app".to_owned(), "web".to_owned())].into()
    }

    fn workload(spec: WorkloadSpec) -> Object<WorkloadSpec> {
        Object::new(&crate::base::names::Named::new("shop", "web-1"), labels(), spec)
    }

    #[test]
    fn a_machine_that_nobody_hears_of_keeps_its_workloads_where_there_is_no_other() {
        let service = ServiceSpec { selector: labels(), ..ServiceSpec::default() };
        let [ready, unready, unheard, ending] =
            [(false, false, false), (true, false, false), (true, true, false), (true, true, true)].map(
                |(unready, unheard, terminating)| {
                    workload(WorkloadSpec { unready, unheard, terminating, ..WorkloadSpec::default() })
                },
            );
        let led = |all: &[&Object<WorkloadSpec>]| {
            let led: Vec<bool> = service.leads_to(all.iter().copied()).map(|workload| workload.spec.unheard).collect();
            led
        };
        assert_eq!(led(&[&unheard, &unready, &unheard, &ending]), [true, true]);
        assert_eq!(led(&[&unheard, &unready, &ready]), [false]);
        assert_eq!(led(&[&unready, &ending]), [] as [bool; 0]);
    }

    #[test]
    fn nothing_new_is_begun_with_what_ends_nor_with_what_is_not_ready_unless_the_service_says_so() {
        let workload = |terminating, unready| workload(WorkloadSpec { terminating, unready, ..WorkloadSpec::default() });
        let mut service = ServiceSpec { selector: labels(), ..ServiceSpec::default() };
        let leads = |service: &ServiceSpec| {
            [(false, false), (false, true), (true, false), (true, true)]
                .map(|(terminating, unready)| service.leads_to([&workload(terminating, unready)].into_iter()).count() == 1)
        };
        assert_eq!(leads(&service), [true, false, false, false]);
        service.publish_not_ready_addresses = true;
        assert_eq!(leads(&service), [true, true, false, false]);
    }
}
