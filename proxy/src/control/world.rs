//! Everything that the control plane knows: the newest form of each resource, where it came from, and who refers to whom.
//! Pure: a change goes in, the keys whose effective form changed come out.
//!
//! One key may be written at several places (two files, a file and `apply`). The first place (`written.rs`) is in force, the
//! others are reported and wait: when the first goes, the next takes its place. The record of a local pod comes before all
//! documents: its sidecar speaks for what runs, and a document of the same name would cut it off. A security policy that cannot be read is
//! kept as text and sent as it is: its sidecars refuse it by name and close its target.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};

use super::contest::Contest;
use super::coverage::Coverage;
use super::holders::Holders;
use super::references::{References, closed, places};
use super::written::Places;
use crate::base::names::Named;
use crate::base::problems::{FieldPath, Problem, Problems, Severity};
use crate::identity::spiffe::TrustDomain;
use crate::model::mesh::pod_ranges;
use crate::model::object::Object;
use crate::model::service::ServiceSpec;
use crate::model::target::{Former, TargetKind};
use crate::model::workload::WorkloadSpec;
use crate::model::{Kind, Resource, ResourceKey, Resources};
use crate::snapshot::claims::{self, Claim, Lost};
use crate::snapshot::cluster_address::ClusterAddresses;
use crate::snapshot::compile;

/// What happened to one resource at one place.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// It is written there, or is written otherwise now.
    Put { key: ResourceKey, form: Form, origin: Origin },
    /// It is not written there any more.
    Remove { key: ResourceKey, origin: Origin },
}

/// A resource as far as it could be read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Form {
    Read(Arc<Resource>),
    /// A security policy of which only the key could be read. `body` is the document as JSON, whatever it says.
    Unreadable {
        body: String,
        reason: String,
    },
}

/// Where a resource is written.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Origin {
    /// The record of a local pod.
    Pod(PathBuf),
    /// Stored by `outrigger apply`.
    Applied(PathBuf),
    /// A file of a watched folder.
    File(PathBuf),
    /// An object of a cluster, as `KIND/NAMESPACE/NAME`.
    Object(PathBuf),
}

/// What is sent of one resource.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Body {
    /// A digest of the body: equal bodies have equal versions, in every control plane.
    pub(crate) version: Arc<str>,
    /// The canonical JSON.
    pub(crate) json: Arc<str>,
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct World {
    written: BTreeMap<ResourceKey, Places>,
    /// The effective forms that could be read, and the refused ones.
    resources: Resources,
    bodies: BTreeMap<ResourceKey, Body>,
    references: References,
    /// Workloads that write addresses; those that lost one are not in force.
    workloads: Contest<ResourceKey, Lost>,
    /// Which Service has a cluster address.
    holders: Holders,
    coverage: Coverage,
    /// That of all who can come in.
    trust_domain: Option<TrustDomain>,
    revision: u64,
}

impl World {
    /// Takes a change. Returns the keys whose effective form is new, changed or gone.
    pub(crate) fn apply(&mut self, change: Change) -> BTreeSet<ResourceKey> {
        let mut is_deleted = false;
        let (Change::Put { key, .. } | Change::Remove { key, .. }) = &change;
        let addresses_before = self.addresses_written(key);
        let key = match change {
            Change::Put { key, form, origin } => {
                self.written.entry(key.clone()).or_default().put(origin, form);
                key
            }
            Change::Remove { key, origin } => {
                is_deleted = matches!(origin, Origin::Applied(_) | Origin::Object(_));
                if let Some(places) = self.written.get_mut(&key) {
                    places.remove(&origin);
                    if places.is_empty() {
                        self.written.remove(&key);
                    }
                }
                key
            }
        };
        let mut concerned = self.contest(&key, addresses_before);
        concerned.insert(key.clone());
        let mut called: BTreeSet<ResourceKey> = concerned.iter().flat_map(|key| self.services_by(key)).collect();
        let mut changed = concerned;
        changed.retain(|key| self.settle(key));
        // What is deleted by name does not come back as what it was; a file that goes may just be written anew.
        if is_deleted && !self.written.contains_key(&key) {
            self.coverage.let_go(&key);
        }
        if changed.is_empty() {
            return changed;
        }
        called.extend(changed.iter().flat_map(|key| self.services_by(key)));
        changed.extend(called.into_iter().filter(|service| self.settle(service)));
        if key.kind == Kind::Service {
            let policies: Vec<ResourceKey> = self.policies_of(TargetKind::Service, &key.name).cloned().collect();
            changed.extend(policies.into_iter().filter(|policy| policy.kind.is_security() && self.settle(policy)));
        }
        changed
    }

    /// The addresses that a Workload or a Service writes, if it is good by itself.
    fn addresses_written(&self, key: &ResourceKey) -> BTreeSet<IpAddr> {
        if key.kind == Kind::Service {
            return service_written(&self.written, &key.name).map(compile::addresses).unwrap_or_default();
        }
        let workload = self.claim(key).map(|claim| claim.workload);
        workload.into_iter().flat_map(|workload| &workload.spec.addresses).map(IpAddr::to_canonical).collect()
    }

    fn claim(&self, key: &ResourceKey) -> Option<Claim<'_>> {
        let (origin, form) = self.written.get(key)?.first()?;
        let Form::Read(resource) = form else { return None };
        let Resource::Workload(workload) = resource.as_ref() else { return None };
        let is_good = !compile::alone(key, resource).refused();
        is_good.then_some(Claim { workload, runs: matches!(origin, Origin::Pod(_)) })
    }

    /// Settles anew who has the addresses that a Workload or a Service writes or wrote before. Returns the Workloads that come
    /// into force or go out of it by that, or the Services that come to their addresses or lose them.
    fn contest(&mut self, key: &ResourceKey, before: BTreeSet<IpAddr>) -> BTreeSet<ResourceKey> {
        if key.kind == Kind::Service {
            let written = &self.written;
            let services = self.holders.contest(&key.name, &before, |name| service_written(written, name));
            return services.into_iter().map(service_key).collect();
        }
        if key.kind != Kind::Workload {
            return BTreeSet::new();
        }
        let now = self.addresses_written(key);
        self.workloads.write(key, &before, &now);
        let written = |rival: &ResourceKey| self.addresses_written(rival);
        let rivals = self.workloads.rivals(BTreeSet::from([key.clone()]), before.union(&now).copied(), written);
        let lost = claims::lost(rivals.iter().filter_map(|rival| self.claim(rival)));
        self.workloads.settle(rivals, lost)
    }

    /// The Services whose addresses depend on a resource: which of them are theirs is the Mesh's and the Workloads' to say.
    fn services_by(&self, key: &ResourceKey) -> BTreeSet<ResourceKey> {
        match self.resources.get(key).map(AsRef::as_ref) {
            Some(Resource::Mesh(_)) => self.resources.of_kind(Kind::Service).map(|(service, _)| service.clone()).collect(),
            Some(Resource::Workload(workload)) => {
                let at = workload.spec.addresses.iter().flat_map(|address| self.at(address.to_canonical()));
                at.filter(|key| key.kind == Kind::Service).cloned().collect()
            }
            _ => BTreeSet::new(),
        }
    }

    /// The addresses by which a service is called.
    pub(super) fn addresses_of(&self, service: &Object<ServiceSpec>) -> BTreeSet<IpAddr> {
        if self.holders.lost(&service.named()).is_some() {
            return BTreeSet::new();
        }
        let is_workloads = |address| self.at(address).any(|key| key.kind == Kind::Workload);
        ClusterAddresses::of(&self.resources).of_service(service, is_workloads)
    }

    /// What is sent of a form: of a Service no address that is not its own, so that it is nobody's way to it, whatever else
    /// who reads it knows.
    fn sent(&self, form: &Form) -> Body {
        if let Form::Read(resource) = form
            && let Resource::Service(service) = resource.as_ref()
        {
            let own = self.addresses_of(service);
            if own != compile::addresses(service) {
                let mut service = service.clone();
                service.spec.cluster_ip = own.first().map(IpAddr::to_string);
                service.spec.cluster_ips = own.iter().map(IpAddr::to_string).collect();
                return Body::of(&Form::Read(Arc::new(Resource::Service(service))));
            }
        }
        Body::of(form)
    }

    /// Goes on with what the policies of an earlier life covered.
    pub(crate) fn remember(&mut self, coverage: Coverage) {
        self.coverage = coverage;
    }

    /// Security policies that cover more than their Services lead to, each with that.
    pub(crate) fn covers(&self) -> impl Iterator<Item = (&ResourceKey, &[Former])> {
        self.coverage.kept()
    }

    /// What security policies covered.
    pub(crate) fn coverage(&self) -> &Coverage {
        &self.coverage
    }

    /// To be written and told.
    pub(crate) fn coverage_mut(&mut self) -> &mut Coverage {
        &mut self.coverage
    }

    /// Whoever comes in is of this trust domain.
    pub(crate) fn set_trust_domain(&mut self, own: TrustDomain) {
        self.trust_domain = Some(own);
    }

    /// Goes on with who held which cluster address in an earlier life.
    pub(crate) fn remember_holders(&mut self, holders: Holders) {
        self.holders = holders;
    }

    /// To be given to and written.
    pub(crate) fn holders_mut(&mut self) -> &mut Holders {
        &mut self.holders
    }

    /// A batch is over: the Services have what was found to be theirs. Returns the keys whose effective form changed.
    pub(crate) fn hold_addresses(&mut self) -> BTreeSet<ResourceKey> {
        let written = &self.written;
        let services = self.holders.hold(|name| service_written(written, name));
        services.into_iter().map(service_key).filter(|key| self.settle(key)).collect()
    }

    /// Everything that there is was read once: what an earlier life covered or held and is not there is gone. Returns the keys
    /// whose effective form changed.
    pub(crate) fn forget_gone(&mut self) -> BTreeSet<ResourceKey> {
        let there = &self.written;
        self.coverage.retain(|policy| there.contains_key(policy));
        let services = self.holders.forget_gone(|name| service_written(there, name));
        services.into_iter().map(service_key).filter(|key| self.settle(key)).collect()
    }

    /// The resources in force.
    pub(crate) fn resources(&self) -> &Resources {
        &self.resources
    }

    /// Is it in force as it is written? A Service without its addresses is not, though what it selects is known.
    pub(crate) fn is_in_force(&self, key: &ResourceKey) -> bool {
        self.resources.by_key.contains_key(key) && self.address_taken_by(key).is_none()
    }

    /// The Service that has an address which this Service writes, so that this one has none.
    pub(crate) fn address_taken_by(&self, key: &ResourceKey) -> Option<ResourceKey> {
        let taken = (key.kind == Kind::Service).then(|| self.holders.lost(&key.name)).flatten();
        taken.map(|taken| service_key(taken.owner().clone()))
    }

    /// What is sent of one resource.
    pub(crate) fn body(&self, key: &ResourceKey) -> Option<&Body> {
        self.bodies.get(key)
    }

    /// Where the form in force is written.
    pub(crate) fn origin(&self, key: &ResourceKey) -> Option<&Origin> {
        self.written.get(key)?.origins().next()
    }

    /// All places where a resource is written, the one in force first.
    pub(crate) fn origins(&self, key: &ResourceKey) -> impl Iterator<Item = &Origin> {
        self.written.get(key).into_iter().flat_map(Places::origins)
    }

    /// Documents of folders that are not in force because they stand elsewhere too: the key, where what counts is written, and
    /// where the other one is.
    pub(crate) fn shadowed(&self) -> impl Iterator<Item = (&ResourceKey, &Origin, &Path)> {
        self.written.iter().filter(|(_, places)| places.is_contested()).flat_map(|(key, places)| {
            let first = places.origins().next().filter(|first| !matches!(first, Origin::Pod(_)));
            first.into_iter().flat_map(move |first| {
                places.origins().skip(1).filter_map(move |other| match other {
                    Origin::File(path) => Some((key, first, path.as_path())),
                    Origin::Applied(_) | Origin::Pod(_) | Origin::Object(_) => None,
                })
            })
        })
    }

    /// The local pods by their own records, whatever documents say.
    pub(crate) fn local_pods(&self) -> impl Iterator<Item = &Object<WorkloadSpec>> {
        self.written.values().flat_map(Places::iter).filter_map(|(origin, form)| match (origin, form) {
            (Origin::Pod(_), Form::Read(resource)) => match resource.as_ref() {
                Resource::Workload(workload) => Some(workload),
                _ => None,
            },
            _ => None,
        })
    }

    /// The addresses in the range of local pods that documents write for Workloads.
    pub(crate) fn claimed_by_documents(&self) -> BTreeSet<IpAddr> {
        let in_range = self.workloads.claims().iter().filter(|(address, _)| pod_ranges().any(|range| range.contains(*address)));
        in_range.filter(|(_, keys)| keys.iter().any(|key| !self.is_local_pod(key))).map(|(address, _)| *address).collect()
    }

    /// Is it the Workload of a pod that runs here?
    pub(crate) fn is_local_pod(&self, key: &ResourceKey) -> bool {
        matches!(self.origin(key), Some(Origin::Pod(_)))
    }

    /// Documents that are named like a pod that runs here, and are not in force.
    pub(crate) fn claimed(&self) -> impl Iterator<Item = (&ResourceKey, &Path)> {
        self.written.iter().filter(|(key, places)| places.is_contested() && self.is_local_pod(key)).flat_map(|(key, places)| {
            places.origins().filter_map(move |place| match place {
                Origin::Applied(path) | Origin::File(path) | Origin::Object(path) => Some((key, path.as_path())),
                Origin::Pod(_) => None,
            })
        })
    }

    /// Counts the changes.
    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    /// What is wrong with what is in force, and with Workloads that are not because of their addresses.
    pub(crate) fn faults(&self) -> Problems {
        let mut problems = compile::check(&self.resources, self.holders.all_lost());
        if let Some(own) = &self.trust_domain {
            problems.append(compile::check_domains(&self.resources, own));
        }
        for (key, lost) in self.workloads.lost() {
            let mut one = Problems::of(key);
            lost.tell(&mut one);
            problems.append(one);
        }
        problems
    }

    /// What is wrong with what is in force, and what is written twice. What could not be taken is told by its source, what
    /// another place of a document overrides by [`World::shadowed`], what a running pod overrides by [`World::claimed`].
    pub(crate) fn problems(&self) -> Vec<Problem> {
        let mut problems = self.faults().into_vec();
        for (key, places) in &self.written {
            let mut origins = places.origins();
            if let Some(first) = origins.next() {
                let told = |other: &&Origin| match (first, other) {
                    (Origin::Applied(_) | Origin::File(_), Origin::File(_)) => false,
                    (Origin::Pod(_), other) => matches!(other, Origin::Pod(_)),
                    (Origin::Applied(_) | Origin::File(_) | Origin::Object(_), _) => true,
                };
                problems.extend(origins.filter(told).map(|other| Problem {
                    resource: key.to_string(),
                    at: FieldPath::root(),
                    text: format!("{other} also writes it, and is not in force"),
                    remedy: format!("keep it in one place; {first} counts"),
                    severity: Severity::Warns,
                    condition: None,
                }));
            }
        }
        problems.sort();
        problems.dedup();
        problems
    }

    /// Routes that are attached to a service.
    pub(super) fn routes_of(&self, service: &Named) -> impl Iterator<Item = &ResourceKey> {
        self.references.routes.get(service).into_iter().flatten()
    }

    /// Policies that target a service or a workload.
    pub(super) fn policies_of(&self, kind: TargetKind, name: &Named) -> impl Iterator<Item = &ResourceKey> {
        self.references.targets.get(&(kind, name.clone())).into_iter().flatten()
    }

    /// Policies for every workload of a namespace.
    pub(super) fn policies_in(&self, namespace: &str) -> impl Iterator<Item = &ResourceKey> {
        self.references.namespaces.get(namespace).into_iter().flatten()
    }

    /// Services and workloads at an address.
    pub(super) fn at(&self, address: IpAddr) -> impl Iterator<Item = &ResourceKey> {
        self.references.addresses.get(&address).into_iter().flatten()
    }

    /// Makes the first place of `key` the one in force. Says whether that changed anything.
    fn settle(&mut self, key: &ResourceKey) -> bool {
        let mut form = self.written.get(key).and_then(Places::first).map(|(_, form)| form.clone());
        match &mut form {
            Some(Form::Read(policy)) if key.kind.is_security() => {
                if !policy.kept().is_empty() {
                    let kept = policy.kept().to_vec();
                    Arc::make_mut(policy).keep(Vec::new());
                    self.coverage.recall(policy, kept);
                }
                let kept = self.coverage.keep(policy, &self.resources);
                if !kept.is_empty() {
                    Arc::make_mut(policy).keep(kept);
                }
            }
            Some(_) => {}
            None => self.coverage.set_aside(key),
        }
        let body = form.as_ref().map(|form| self.sent(form));
        // Two Services may be sent alike and be written otherwise: with addresses that are not theirs.
        let is_written_alike = match (&form, self.resources.get(key)) {
            (Some(Form::Read(resource)), Some(known)) => key.kind != Kind::Service || resource == known,
            _ => true,
        };
        let stands_alike = key.kind != Kind::Workload || {
            let stands =
                |resource: &Resource| !self.workloads.lost().contains_key(key) && !compile::alone(key, resource).refused();
            let will_stand = matches!(&form, Some(Form::Read(resource)) if stands(resource));
            will_stand == self.resources.by_key.contains_key(key)
        };
        if body.as_ref() == self.bodies.get(key) && is_written_alike && stands_alike {
            return false;
        }
        self.revision += 1;
        let before = self.resources.by_key.remove(key).or_else(|| self.resources.refused.remove(key).flatten());
        for place in before.iter().flat_map(|resource| places(resource)).chain([closed(key)]) {
            self.references.forget(&place, key);
        }
        match body {
            Some(body) => self.bodies.insert(key.clone(), body),
            None => self.bodies.remove(key),
        };
        match form {
            // It is shown, and nobody is led there.
            Some(Form::Read(resource)) if self.workloads.lost().contains_key(key) => {
                self.resources.refused.insert(key.clone(), Some(resource));
            }
            Some(Form::Read(resource)) => {
                for place in places(&resource) {
                    self.references.remember(place, key);
                }
                // A security policy that does not compile is sent all the same, and closes its target.
                if compile::alone(key, &resource).refused() {
                    self.resources.refused.insert(key.clone(), Some(resource));
                } else {
                    self.resources.by_key.insert(key.clone(), resource);
                }
            }
            Some(Form::Unreadable { .. }) => {
                // Its target is not known: it may be for any workload of its namespace.
                self.references.remember(closed(key), key);
                self.resources.refused.insert(key.clone(), None);
            }
            None => {}
        }
        true
    }
}

/// A Service as its first place writes it, if it is good by itself.
fn service_written<'a>(written: &'a BTreeMap<ResourceKey, Places>, name: &Named) -> Option<&'a Object<ServiceSpec>> {
    let key = service_key(name.clone());
    let (_, Form::Read(resource)) = written.get(&key)?.first()? else { return None };
    let Resource::Service(service) = resource.as_ref() else { return None };
    (!compile::alone(&key, resource).refused()).then_some(service)
}

fn service_key(name: Named) -> ResourceKey {
    ResourceKey { kind: Kind::Service, name }
}

impl Body {
    fn of(form: &Form) -> Self {
        let json: Arc<str> = match form {
            Form::Read(resource) => resource.to_json().into(),
            Form::Unreadable { body, .. } => body.as_str().into(),
        };
        let digest = digest(&SHA256, json.as_bytes());
        let version: String = digest.as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Self { version: version.into(), json }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Applied(path) | Self::File(path) | Self::Pod(path) | Self::Object(path) => path.display().fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::yaml;

    fn service(address: &str) -> (ResourceKey, Form) {
        let text =
            format!("apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec: {{clusterIP: {address}}}\n");
        let resource = yaml::read(&text).remove(0).unwrap().resource;
        (resource.key(), Form::Read(resource.into()))
    }

    fn put(world: &mut World, address: &str, origin: &Origin) -> usize {
        let (key, form) = service(address);
        world.apply(Change::Put { key, form, origin: origin.clone() }).len()
    }

    #[test]
    fn the_first_place_is_in_force_and_the_next_takes_over() {
        let mut world = World::default();
        let (applied, file) = (Origin::Applied("a".into()), Origin::File("b".into()));
        assert_eq!(put(&mut world, "10.65.0.2", &file), 1);
        assert_eq!(put(&mut world, "10.65.0.2", &file), 0, "the same again is no change");
        assert_eq!(put(&mut world, "10.65.0.3", &applied), 1);
        assert_eq!(put(&mut world, "10.65.0.4", &file), 0, "who waits changes nothing");
        let shadowed: Vec<_> = world.shadowed().map(|(key, first, other)| (key.to_string(), first, other)).collect();
        assert_eq!(shadowed, [("Service/shop/web".to_owned(), &applied, Path::new("b"))]);
        let (key, _) = service("10.65.0.2");
        assert_eq!(world.origin(&key), Some(&applied));
        assert_eq!(world.apply(Change::Remove { key: key.clone(), origin: applied }).len(), 1);
        let at = |world: &World, address: &str| world.at(address.parse().unwrap()).count();
        assert_eq!((at(&world, "10.65.0.3"), at(&world, "10.65.0.4")), (0, 1));
        world.apply(Change::Remove { key: key.clone(), origin: file });
        assert!(world.body(&key).is_none() && world.shadowed().count() == 0 && at(&world, "10.65.0.4") == 0);
    }

    #[test]
    fn of_two_files_the_one_in_force_stays_so_until_it_goes() {
        let mut world = World::default();
        let (earlier, later) = (Origin::File("m".into()), Origin::File("a".into()));
        assert_eq!(put(&mut world, "10.65.0.2", &earlier), 1);
        assert_eq!(put(&mut world, "10.65.0.3", &later), 0);
        let (key, _) = service("10.65.0.2");
        assert_eq!(world.origin(&key), Some(&earlier));
        let shadowed: Vec<_> = world.shadowed().map(|(_, first, other)| (first, other)).collect();
        assert_eq!(shadowed, [(&earlier, Path::new("a"))]);
        assert!(world.problems().is_empty(), "{:?}", world.problems());
        assert_eq!(world.apply(Change::Remove { key: key.clone(), origin: earlier }).len(), 1);
        assert_eq!(world.origin(&key), Some(&later));
    }

    #[test]
    fn equal_documents_have_equal_versions() {
        let mut versions = Vec::new();
        for address in ["10.65.0.2", "10.65.0.2", "10.65.0.3"] {
            let mut world = World::default();
            put(&mut world, address, &Origin::File("a".into()));
            versions.push(world.body(&service(address).0).unwrap().version.to_string());
        }
        assert!(versions[0] == versions[1] && versions[1] != versions[2]);
    }

    #[test]
    fn a_policy_that_cannot_be_read_is_sent_as_it_is_and_found_in_its_namespace() {
        let mut world = World::default();
        let key: ResourceKey = "AuthorizationPolicy/shop/a".parse().unwrap();
        let form = Form::Unreadable { body: "{}".to_owned(), reason: "unknown field".to_owned() };
        world.apply(Change::Put { key: key.clone(), form, origin: Origin::File("a".into()) });
        assert_eq!(&*world.body(&key).unwrap().json, "{}");
        assert_eq!(world.policies_in("shop").count(), 1);
        world.apply(Change::Remove { key, origin: Origin::File("a".into()) });
        assert_eq!(world.policies_in("shop").count(), 0);
    }
}
