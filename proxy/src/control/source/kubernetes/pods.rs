//! The pods of a cluster and the Workloads that they are, together with what EndpointSlices add. Pure.
//!
//! An address is given to the next pod once a pod's containers have ended, which may be told after the next pod is. Of two
//! pods of one address the one that is not about to end counts, and then the newer one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::pod::Pod;
use super::slices::Slice;
use crate::base::names::Named;
use crate::base::problems::{FieldPath, Problem, Severity};
use crate::model::Resource;
use crate::model::capture::SIDECARS_PORTS;
use crate::model::workload::WorkloadTransport;

/// All pods and slices.
#[derive(Debug, Default)]
pub(super) struct Pods {
    pods: BTreeMap<Named, Pod>,
    slices: BTreeMap<Named, Slice>,
    /// Who writes an address that is not its machine's.
    at: BTreeMap<IpAddr, BTreeSet<Named>>,
    /// Slices by the addresses that they hold.
    sliced: BTreeMap<IpAddr, BTreeSet<Named>>,
    /// Slices by their Service.
    behind: BTreeMap<Named, BTreeSet<Named>>,
    /// What was told of pods and of slices, by the name of the Workload.
    of_pods: BTreeMap<Named, Arc<Resource>>,
    of_slices: BTreeMap<Named, BTreeMap<Named, Arc<Resource>>>,
    /// What slices name and do not lead to: sidecars' pods of other namespaces.
    astray: BTreeMap<Named, BTreeMap<IpAddr, Named>>,
}

/// What became of a Workload. None: it is not there any more.
pub(super) type Told = (Named, Option<Arc<Resource>>);

impl Pods {
    /// A pod is there in this form, or not there any more (None). Returns the pods' Workloads that changed by it.
    pub(super) fn put_pod(&mut self, name: &Named, pod: Option<Pod>, told: &mut Vec<Told>, slices: &mut BTreeSet<Named>) {
        let before = self.pods.remove(name);
        if before == pod {
            self.pods.extend(pod.map(|pod| (name.clone(), pod)));
            return;
        }
        let addresses = |pod: &Option<Pod>| pod.as_ref().map(own_addresses).unwrap_or_default();
        let (old, new) = (addresses(&before), addresses(&pod));
        for address in &old {
            forget(&mut self.at, address, name);
        }
        for address in &new {
            self.at.entry(*address).or_default().insert(name.clone());
        }
        self.pods.extend(pod.map(|pod| (name.clone(), pod)));
        let concerned = old.union(&new);
        let rivals: BTreeSet<Named> = concerned.clone().filter_map(|address| self.at.get(address)).flatten().cloned().collect();
        for rival in rivals.iter().chain([name]).collect::<BTreeSet<_>>() {
            self.settle(rival, told);
        }
        slices.extend(concerned.filter_map(|address| self.sliced.get(address)).flatten().cloned());
    }

    /// A slice is there in this form, or not there any more (None). Returns by `services` whose endpoints it concerns; its own
    /// Workloads are told by [`Self::settle_slice`].
    pub(super) fn put_slice(&mut self, name: &Named, slice: Option<Slice>, told: &mut Vec<Told>, services: &mut BTreeSet<Named>) {
        let before = self.slices.remove(name);
        if before == slice {
            self.slices.extend(slice.map(|slice| (name.clone(), slice)));
            return;
        }
        let addresses = |slice: &Option<Slice>| -> BTreeSet<IpAddr> {
            let endpoints = slice.iter().flat_map(|slice| &slice.endpoints);
            endpoints.map(|endpoint| endpoint.address.to_canonical()).collect()
        };
        let (old, new) = (addresses(&before), addresses(&slice));
        for address in &old {
            forget(&mut self.sliced, address, name);
        }
        for address in &new {
            self.sliced.entry(*address).or_default().insert(name.clone());
        }
        if let Some(before) = &before {
            forget(&mut self.behind, &before.service, name);
            services.insert(before.service.clone());
        }
        if let Some(slice) = &slice {
            self.behind.entry(slice.service.clone()).or_default().insert(name.clone());
            services.insert(slice.service.clone());
        }
        self.slices.extend(slice.map(|slice| (name.clone(), slice)));
        let pods: BTreeSet<Named> = old.union(&new).filter_map(|address| self.at.get(address)).flatten().cloned().collect();
        for pod in pods {
            self.settle(&pod, told);
        }
    }

    /// Has this Service slices of its own?
    pub(super) fn has_slices(&self, service: &Named) -> bool {
        self.behind.contains_key(service)
    }

    /// The number of a port of this Service, where all slices with addresses give it the same one. None for those of a sidecar:
    /// what has none may have them, and is led to by the name.
    pub(super) fn number_of(&self, service: &Named, port: &str) -> Option<u16> {
        let slices = self.behind.get(service)?.iter().filter_map(|slice| self.slices.get(slice));
        let mut numbers = slices.filter(|slice| !slice.endpoints.is_empty()).map(|slice| slice.number_of(port));
        let first = numbers.next()??;
        (numbers.all(|number| number == Some(first)) && !SIDECARS_PORTS.contains(&first)).then_some(first)
    }

    /// Is a pod of this namespace there?
    pub(super) fn are_in(&self, namespace: &str) -> bool {
        let first = Named::new(namespace, "");
        self.pods.range(first..).next().is_some_and(|(name, _)| *name.namespace == *namespace)
    }

    /// What is wrong with slices.
    pub(super) fn problems(&self) -> impl Iterator<Item = Problem> {
        self.strays().chain(self.misnamed())
    }

    /// Pods of the Service's own namespace that a slice names, and whose ports have other names: the Service leads to names here.
    fn misnamed(&self) -> impl Iterator<Item = Problem> {
        self.slices.iter().flat_map(|(name, slice)| {
            let ports = slice.ports.iter().filter_map(|port| Some((port.name.as_deref()?, port.port)));
            let led_by_name: Vec<_> = ports.filter(|(port, _)| self.number_of(&slice.service, port).is_none()).collect();
            let addresses = slice.endpoints.iter().map(|endpoint| endpoint.address.to_canonical());
            let pods: BTreeSet<&Named> = addresses.filter_map(|address| self.at.get(&address)).flatten().collect();
            let pods = pods.into_iter().filter(|pod| pod.namespace == slice.service.namespace);
            let known = pods.filter_map(|pod| match self.of_pods.get(pod)?.as_ref() {
                Resource::Workload(workload) => Some((pod, workload)),
                _others => None,
            });
            let known: Vec<_> = known.collect();
            led_by_name.into_iter().flat_map(move |(port, number)| {
                let other = known.clone().into_iter().filter(move |(_, workload)| workload.spec.port_named(port) != Some(number));
                other.map(move |(pod, workload)| {
                    let led = workload.spec.port_named(port).map_or("the Service does not lead there".to_owned(), |led| format!("the Service leads to {led}"));
                    Problem {
                        resource: format!("EndpointSlice/{name}"),
                        at: FieldPath::root().field("ports"),
                        text: format!("the port {port:?} is {number}, but not so named in the pod {pod}, and the slices of {} do not agree on one number: {led}", slice.service),
                        remedy: format!("name the pod's port {number} {port}, or write one number in all slices of the Service"),
                        severity: Severity::Warns,
                        condition: None,
                    }
                })
            })
        })
    }

    fn strays(&self) -> impl Iterator<Item = Problem> {
        let all = self.astray.iter().flat_map(|(slice, astray)| astray.iter().map(move |(address, pod)| (slice, address, pod)));
        all.map(|(slice, address, pod)| Problem {
            resource: format!("EndpointSlice/{slice}"),
            at: FieldPath::root(),
            text: format!("{address} is the pod {pod} of another namespace, which has a sidecar; it is not led to, for a slice says nothing of whose identity is expected there"),
            remedy: "name the other namespace's Service where it is called, or in a route with a ReferenceGrant".to_owned(),
            severity: Severity::Warns,
            condition: None,
        })
    }

    /// Tells the Workloads of a slice anew: of the addresses that no pod of its namespace has. One that a sidecar's pod of
    /// another namespace has is left out: it would be dialled in plaintext. Returns whether there are others of these now.
    pub(super) fn settle_slice(&mut self, name: &Named, told: &mut Vec<Told>) -> bool {
        let (mut now, mut astray) = (BTreeMap::new(), BTreeMap::new());
        if let Some(slice) = self.slices.get(name) {
            for endpoint in &slice.endpoints {
                let address = endpoint.address.to_canonical();
                let pods = || self.at.get(&address).into_iter().flatten();
                if pods().any(|pod| pod.namespace == slice.service.namespace) {
                    continue;
                }
                if let Some(meshed) = pods().find(|pod| self.pods.get(*pod).is_some_and(has_sidecar)) {
                    astray.insert(address, meshed.clone());
                    continue;
                }
                let workload = slice.workload(endpoint);
                now.insert(workload.named(), Arc::new(Resource::Workload(workload)));
            }
        }
        let astray_before = self.astray.remove(name).unwrap_or_default();
        let is_new = astray_before != astray;
        if !astray.is_empty() {
            self.astray.insert(name.clone(), astray);
        }
        let before = if now.is_empty() {
            self.of_slices.remove(name).unwrap_or_default()
        } else {
            self.of_slices.insert(name.clone(), now.clone()).unwrap_or_default()
        };
        told.extend(before.keys().filter(|workload| !now.contains_key(*workload)).map(|workload| (workload.clone(), None)));
        let new = now.into_iter().filter(|(workload, form)| before.get(workload) != Some(form));
        told.extend(new.map(|(workload, form)| (workload, Some(form))));
        is_new
    }

    /// Tells the Workload of a pod anew, if it is another one than before.
    fn settle(&mut self, name: &Named, told: &mut Vec<Told>) {
        let form = self.pods.get(name).filter(|pod| !self.is_succeeded(name, pod)).map(|pod| {
            let mut workload = pod.workload.clone();
            let slices: BTreeSet<&Named> =
                own_addresses(pod).iter().filter_map(|address| self.sliced.get(address)).flatten().collect();
            for slice in slices.into_iter().filter_map(|slice| self.slices.get(slice)) {
                if slice.service.namespace == name.namespace {
                    slice.add_to(&mut workload);
                }
            }
            Arc::new(Resource::Workload(workload))
        });
        let before = self.of_pods.remove(name);
        if before == form {
            self.of_pods.extend(before.map(|before| (name.clone(), before)));
            return;
        }
        self.of_pods.extend(form.clone().map(|form| (name.clone(), form)));
        told.push((name.clone(), form));
    }

    /// Has another pod its address by now?
    fn is_succeeded(&self, name: &Named, pod: &Pod) -> bool {
        let rank = |name: &Named, pod: &Pod| (!pod.workload.spec.terminating, pod.created.clone(), name.clone());
        let own = rank(name, pod);
        own_addresses(pod)
            .iter()
            .filter_map(|address| self.at.get(address))
            .flatten()
            .filter_map(|rival| Some(rank(rival, self.pods.get(rival)?)))
            .any(|rival| rival > own)
    }
}

fn has_sidecar(pod: &Pod) -> bool {
    pod.workload.spec.transport == WorkloadTransport::MutualTls
}

/// The addresses that nobody else has at the same time.
fn own_addresses(pod: &Pod) -> BTreeSet<IpAddr> {
    if pod.is_in_hosts_network {
        return BTreeSet::new();
    }
    pod.workload.spec.addresses.iter().map(IpAddr::to_canonical).collect()
}

fn forget<K: Ord>(all: &mut BTreeMap<K, BTreeSet<Named>>, key: &K, name: &Named) {
    if let Some(names) = all.get_mut(key) {
        names.remove(name);
        if names.is_empty() {
            all.remove(key);
        }
    }
}
