//! What is known of a cluster, and what each piece of news of it changes. Pure: an object goes in, changes come out.
//!
//! Watches tell of one kind each, and nothing orders one before another: a route may come before its Service, a namespace's
//! end after the end of what is in it. So every change is worked out from all that is known. Invariant: nothing is told
//! before every watch has told what there is, and what a watch has told stays until it says otherwise.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use super::document;
use super::object::Object;
use super::pod::Pod;
use super::pods::{self, Pods};
use super::ranges::{self, Ranges};
use super::returning::Returning;
use super::slices::{self, Slice};
use super::watched::Watched;
use super::written::{self, Written};
use crate::base::names::Named;
use crate::control::cluster::last_good::{LastGood, Standing};
use crate::control::cluster::writer::Objects;
use crate::control::placed::Placed;
use crate::control::source::{Batch, Told};
use crate::control::world::{Change, Form, Origin};
use crate::model::object::DEFAULT_NAMESPACE;
use crate::model::{Kind, Resource, ResourceKey};

/// A piece of news of one watch.
#[derive(Debug)]
pub(super) enum News {
    /// A list begins.
    Begins,
    /// An object is there, in this form.
    Is(Object),
    Gone(Object),
    /// The list is over: what it did not hold is gone.
    Ends,
    /// The API server does not know the kind.
    Absent,
}

/// All that is known.
#[derive(Debug, Default)]
pub(super) struct Cluster {
    seen: BTreeMap<Watched, Seen>,
    /// Documents as they were told, those whose form depends on others as they are written.
    documents: BTreeMap<ResourceKey, Known>,
    pods: Pods,
    /// Pods of which the API server says no address yet.
    nowhere: BTreeMap<Named, Pod>,
    returning: Returning,
    ranges: Ranges,
    /// Namespaces that are being deleted.
    ending: BTreeSet<String>,
    /// What stood in the place of refused documents, as an earlier life or another replica knew it.
    remembered: BTreeMap<ResourceKey, LastGood>,
    /// Security policies that went with their namespace, before its last pod.
    left: BTreeSet<ResourceKey>,
    is_mesh_nobodys: bool,
    changes: Vec<Change>,
    objects: Objects,
    is_told_anew: bool,
    stands_anew: bool,
}

/// The objects of one watch.
#[derive(Debug, Default)]
struct Seen {
    /// Was there a whole list?
    is_listed: bool,
    /// Counts the lists.
    list: u64,
    objects: BTreeMap<Named, Version>,
}

/// Which form of an object was seen last, and in which list.
#[derive(Debug)]
struct Version {
    uid: String,
    version: Option<u64>,
    list: u64,
}

#[derive(Debug)]
struct Known {
    uid: String,
    /// What is in force, as it is written. None: nothing of it.
    form: Option<Form>,
    stands: Stands,
    told: Vec<Told>,
}

/// Which form of a document is in force, by its generation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stands {
    /// The newest one, which is good.
    Newest(Option<i64>),
    /// An earlier one, which was good: the newest is refused.
    LastGood(Option<i64>),
    /// None that is good.
    None,
}

impl Known {
    /// What was good of the object `uid`, and which form of it that is.
    fn good(self, uid: &str) -> Option<(Form, Option<i64>)> {
        let (Stands::Newest(generation) | Stands::LastGood(generation)) = self.stands else { return None };
        self.form.filter(|_| self.uid == uid).map(|form| (form, generation))
    }
}

impl Cluster {
    /// Takes a piece of news.
    pub(super) fn take(&mut self, watched: Watched, news: News, placed: &Placed) {
        match news {
            News::Begins => self.seen.entry(watched).or_default().list += 1,
            News::Is(object) => self.put(watched, &object, placed),
            News::Gone(object) => {
                let seen = self.seen.entry(watched).or_default();
                // What was made anew under the same name is told by an event of its own, before or after.
                if seen.objects.get(&object.name).is_some_and(|known| known.uid == object.uid) {
                    seen.objects.remove(&object.name);
                    self.remove(watched, &object.name);
                }
            }
            News::Ends => {
                let seen = self.seen.entry(watched).or_default();
                seen.is_listed = true;
                let list = seen.list;
                let gone: Vec<Named> = seen.objects.extract_if(.., |_, known| known.list != list).map(|(name, _)| name).collect();
                for name in gone {
                    self.remove(watched, &name);
                }
            }
            News::Absent => self.seen.entry(watched).or_default().is_listed = true,
        }
    }

    /// Nodes told where pods of theirs are.
    pub(super) fn place(&mut self, placed: &Placed) {
        for (name, pod) in self.nowhere.clone() {
            self.put_pod(&name, Some(placed_by_node(pod, placed)));
        }
    }

    /// Is there a pod whose kubelet had no time yet to see how it is?
    pub(super) fn is_returning(&self) -> bool {
        self.returning.is_awaited()
    }

    /// To be asked now and then while there is: see [`Returning::look`].
    pub(super) fn look_at_returning(&mut self, placed: &Placed) {
        for (name, pod) in self.returning.look() {
            self.put_pod(&name, Some(placed_by_node(pod, placed)));
        }
    }

    /// Is it a pod whose node alone says where it is?
    pub(super) fn is_nowhere(&self, uid: &str) -> bool {
        self.nowhere.values().any(|pod| pod.uid == uid)
    }

    /// Which watches have not told yet what there is?
    pub(super) fn awaited(&self) -> impl Iterator<Item = Watched> {
        Watched::all().filter(|watched| self.seen.get(watched).is_none_or(|seen| !seen.is_listed))
    }

    /// What changed since the last batch; None: nothing did.
    pub(super) fn batch(&mut self) -> Option<Batch> {
        let is_new = std::mem::take(&mut self.is_told_anew);
        let standing = std::mem::take(&mut self.stands_anew).then(|| self.standing());
        if self.changes.is_empty() && self.objects.is_empty() && !is_new && standing.is_none() {
            return None;
        }
        let mut problems: Vec<Told> = self.documents.values().flat_map(|known| &known.told).cloned().collect();
        let of_ranges = self.ranges.problems().into_iter();
        problems.extend(of_ranges.map(|problem| Told { path: PathBuf::from("Node"), position: None, problem }));
        let of_slices = self.pods.problems();
        problems.extend(of_slices.map(|problem| Told { path: PathBuf::from(&problem.resource), position: None, problem }));
        let (changes, objects) = (std::mem::take(&mut self.changes), std::mem::take(&mut self.objects));
        Some(Batch { changes, problems, objects, standing })
    }

    /// Learns what stood in the place of refused documents.
    pub(super) fn remember(&mut self, known: BTreeMap<ResourceKey, LastGood>) {
        for (key, good) in known {
            if let Some(document) = self.documents.get_mut(&key)
                && document.stands == Stands::None
                && document.uid == good.uid
            {
                document.form = Some(Form::Read(Arc::clone(&good.resource)));
                document.stands = Stands::LastGood(good.generation);
                self.stands_anew = true;
                self.tell(&key);
            }
            self.remembered.insert(key, good);
        }
    }

    /// Is there a refused document of which no good form is known?
    pub(super) fn is_without(&self) -> bool {
        self.documents.values().any(|known| known.stands == Stands::None)
    }

    /// How refused documents stand.
    fn standing(&self) -> Standing {
        let mut standing = Standing::default();
        for (key, known) in &self.documents {
            match (known.stands, &known.form) {
                (Stands::LastGood(generation), Some(Form::Read(resource))) => {
                    let (uid, resource) = (known.uid.clone(), Arc::clone(resource));
                    standing.last_good.insert(key.clone(), LastGood { uid, generation, resource });
                }
                (Stands::None, _) => drop(standing.without.insert(known.uid.clone())),
                (Stands::Newest(_) | Stands::LastGood(_), _) => {}
            }
        }
        standing
    }

    fn put(&mut self, watched: Watched, object: &Object, placed: &Placed) {
        let seen = self.seen.entry(watched).or_default();
        let list = seen.list;
        if let Some(known) = seen.objects.get_mut(&object.name) {
            let is_older = known.uid == object.uid && known.version.zip(object.version).is_some_and(|(known, new)| new < known);
            let is_same = known.uid == object.uid && known.version.is_some() && known.version == object.version;
            known.list = list;
            if is_older || is_same {
                return;
            }
        }
        let version = Version { uid: object.uid.clone(), version: object.version, list };
        seen.objects.insert(object.name.clone(), version);
        match watched {
            Watched::Documents(kind) => self.put_document(kind, object),
            Watched::Pods => {
                let mut pod = Pod::read(&object.body);
                match &mut pod {
                    Some(pod) => self.returning.see(&object.name, pod),
                    None => self.returning.forget(&object.name),
                }
                let is_nowhere = |pod: &&Pod| pod.workload.spec.addresses.is_empty();
                match pod.as_ref().filter(is_nowhere) {
                    Some(pod) => drop(self.nowhere.insert(object.name.clone(), pod.clone())),
                    None => drop(self.nowhere.remove(&object.name)),
                }
                self.put_pod(&object.name, pod.map(|pod| placed_by_node(pod, placed)));
            }
            Watched::EndpointSlices => self.put_slice(&object.name, Slice::read(&object.body)),
            Watched::Nodes | Watched::ServiceCidrs => {
                if self.ranges.put(watched == Watched::Nodes, &object.name, &object.body) {
                    self.meshes();
                }
            }
            Watched::Namespaces => {
                let is_ending = object.body.pointer("/metadata/deletionTimestamp").is_some_and(|when| !when.is_null());
                if is_ending {
                    self.ending.insert(object.name.name.to_string());
                } else {
                    self.namespace_gone(&object.name.name);
                }
            }
        }
    }

    fn remove(&mut self, watched: Watched, name: &Named) {
        match watched {
            Watched::Documents(kind) => {
                let key = document_key(kind, name);
                self.objects.push((key.clone(), None));
                self.remove_document(&key);
            }
            Watched::Pods => {
                self.nowhere.remove(name);
                self.returning.forget(name);
                self.put_pod(name, None);
            }
            Watched::EndpointSlices => self.put_slice(name, None),
            Watched::Nodes | Watched::ServiceCidrs => {
                if self.ranges.remove(watched == Watched::Nodes, name) {
                    self.meshes();
                }
            }
            Watched::Namespaces => self.namespace_gone(&name.name),
        }
    }

    fn put_document(&mut self, kind: Kind, object: &Object) {
        let key = document_key(kind, &object.name);
        self.objects.push((key.clone(), Written::read(kind, object)));
        let Some(found) = document::read(kind, &key, object) else { return self.remove_document(&key) };
        self.left.remove(&key);
        let before = self.documents.remove(&key);
        let old_told = before.as_ref().map(|known| known.told.as_slice()).unwrap_or_default();
        self.is_told_anew |= old_told != found.told;
        let was_refused = before.as_ref().is_some_and(|known| !matches!(known.stands, Stands::Newest(_)));
        let (form, stands) = if found.good {
            self.remembered.remove(&key);
            (found.form, Stands::Newest(object.generation))
        } else {
            // What was good stays in force while the new form is not.
            match before.and_then(|known| known.good(&object.uid)).or_else(|| self.recall(&key, object)) {
                Some((form, generation)) => (Some(form), Stands::LastGood(generation)),
                None => (found.form, Stands::None),
            }
        };
        self.stands_anew |= was_refused || !found.good;
        self.documents.insert(key.clone(), Known { uid: object.uid.clone(), form, stands, told: found.told });
        self.tell(&key);
    }

    /// The good form of this object that an earlier life or another replica knew.
    fn recall(&self, key: &ResourceKey, object: &Object) -> Option<(Form, Option<i64>)> {
        let good = self.remembered.get(key).filter(|good| good.uid == object.uid)?;
        let mut resource = Arc::clone(&good.resource);
        if key.kind.is_security() {
            Arc::make_mut(&mut resource).keep(written::kept_by_what_stood(object));
        }
        Some((Form::Read(resource), good.generation))
    }

    fn remove_document(&mut self, key: &ResourceKey) {
        let namespace = &*key.name.namespace;
        // Its pods still run for as long as they take to end, and what they refused they go on refusing.
        if key.kind.is_security() && self.ending.contains(namespace) && self.pods.are_in(namespace) {
            if self.documents.contains_key(key) {
                self.left.insert(key.clone());
            }
            return;
        }
        let Some(known) = self.documents.remove(key) else { return };
        self.remembered.remove(key);
        self.is_told_anew |= !known.told.is_empty();
        self.stands_anew |= !matches!(known.stands, Stands::Newest(_));
        if known.form.is_some() {
            self.changes.push(Change::Remove { key: key.clone(), origin: origin(key) });
        }
        if key.kind == Kind::Mesh {
            self.meshes();
        }
    }

    /// Says how a document stands now.
    fn tell(&mut self, key: &ResourceKey) {
        let Some(known) = self.documents.get(key) else { return };
        let form = match &known.form {
            Some(Form::Read(resource)) => Some(Form::Read(self.complete(resource))),
            other => other.clone(),
        };
        let origin = origin(key);
        self.changes.push(match form {
            Some(form) => Change::Put { key: key.clone(), form, origin },
            None => Change::Remove { key: key.clone(), origin },
        });
        if key.kind == Kind::Mesh {
            self.nobodys_mesh();
        }
    }

    /// The document with what only the cluster knows.
    fn complete(&self, resource: &Arc<Resource>) -> Arc<Resource> {
        let mut resource = Arc::clone(resource);
        match resource.as_ref() {
            Resource::Mesh(_) => {
                if let Resource::Mesh(mesh) = Arc::make_mut(&mut resource) {
                    self.ranges.fill(&mut mesh.spec);
                }
            }
            Resource::Service(service) if service.spec.selector.is_empty() && self.pods.has_slices(&service.named()) => {
                if let Resource::Service(service) = Arc::make_mut(&mut resource) {
                    let name = service.named();
                    slices::lead(service, |port| self.pods.number_of(&name, port));
                }
            }
            _ => {}
        }
        resource
    }

    /// Says how every Mesh stands now: the networks are others.
    fn meshes(&mut self) {
        let meshes: Vec<ResourceKey> = self.documents.keys().filter(|key| key.kind == Kind::Mesh).cloned().collect();
        for mesh in &meshes {
            self.tell(mesh);
        }
        self.is_told_anew = true;
        self.nobodys_mesh();
    }

    /// Where nobody writes a Mesh, there is one of the cluster's networks.
    fn nobodys_mesh(&mut self) {
        let is_written = self.documents.iter().any(|(key, known)| key.kind == Kind::Mesh && known.form.is_some());
        let mesh = if is_written { None } else { self.ranges.mesh() };
        let key = ranges::nobodys();
        let origin = Origin::Object(PathBuf::from("Node"));
        let was_nobodys = std::mem::replace(&mut self.is_mesh_nobodys, mesh.is_some());
        match mesh {
            Some(mesh) => self.changes.push(Change::Put { key, form: Form::Read(Arc::new(mesh)), origin }),
            None if was_nobodys => self.changes.push(Change::Remove { key, origin }),
            None => {}
        }
    }

    fn put_pod(&mut self, name: &Named, pod: Option<Pod>) {
        let (mut told, mut slices) = (Vec::new(), BTreeSet::new());
        self.pods.put_pod(name, pod, &mut told, &mut slices);
        self.tell_workloads(told, |name| Origin::Pod(place("Pod", name)));
        for slice in slices {
            self.tell_slice(&slice);
        }
        self.release(&name.namespace);
    }

    fn put_slice(&mut self, name: &Named, slice: Option<Slice>) {
        let (mut told, mut services) = (Vec::new(), BTreeSet::new());
        self.pods.put_slice(name, slice, &mut told, &mut services);
        self.tell_workloads(told, |name| Origin::Pod(place("Pod", name)));
        self.tell_slice(name);
        for service in services {
            self.tell(&ResourceKey { kind: Kind::Service, name: service });
        }
    }

    fn tell_slice(&mut self, name: &Named) {
        let mut told = Vec::new();
        self.is_told_anew |= self.pods.settle_slice(name, &mut told);
        let origin = Origin::Object(place("EndpointSlice", name));
        self.tell_workloads(told, |_| origin.clone());
    }

    fn tell_workloads(&mut self, told: Vec<pods::Told>, origin: impl Fn(&Named) -> Origin) {
        self.changes.extend(told.into_iter().map(|(name, form)| {
            let origin = origin(&name);
            let key = ResourceKey { kind: Kind::Workload, name };
            match form {
                Some(workload) => Change::Put { key, form: Form::Read(workload), origin },
                None => Change::Remove { key, origin },
            }
        }));
    }

    /// A namespace is not being deleted, or not there any more.
    fn namespace_gone(&mut self, namespace: &str) {
        if self.ending.remove(namespace) {
            self.let_go(namespace);
        }
    }

    /// The last pod of a namespace that is being deleted may be gone.
    fn release(&mut self, namespace: &str) {
        if !self.left.is_empty() && !self.pods.are_in(namespace) {
            self.let_go(namespace);
        }
    }

    fn let_go(&mut self, namespace: &str) {
        let left: Vec<ResourceKey> = self.left.extract_if(.., |key| *key.name.namespace == *namespace).collect();
        for key in left {
            if self.documents.remove(&key).is_some_and(|known| known.form.is_some()) {
                self.changes.push(Change::Remove { origin: origin(&key), key });
            }
        }
    }
}

/// A pod where its node says that it is, while the API server does not say it.
fn placed_by_node(mut pod: Pod, placed: &Placed) -> Pod {
    if pod.workload.spec.addresses.is_empty() && !pod.is_in_hosts_network {
        let node = pod.workload.spec.node.as_deref().unwrap_or_default();
        pod.workload.spec.addresses = placed.addresses(&pod.uid, node);
    }
    pod
}

/// The key of a document. A kind without namespaces has its documents where the model has them.
fn document_key(kind: Kind, name: &Named) -> ResourceKey {
    let namespace = match kind {
        Kind::Mesh => crate::model::object::MESH_NAMESPACE,
        _ if name.namespace.is_empty() => DEFAULT_NAMESPACE,
        _ => &name.namespace,
    };
    ResourceKey { kind, name: Named::new(namespace, &*name.name) }
}

fn origin(key: &ResourceKey) -> Origin {
    Origin::Object(place(key.kind.as_str(), &key.name))
}

/// How a place in a cluster is named.
pub(super) fn place(kind: &str, name: &Named) -> PathBuf {
    PathBuf::from(format!("{kind}/{name}"))
}
