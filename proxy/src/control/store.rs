//! The one place where the world changes: a change goes in, everybody who follows the world hears of it.
//!
//! A Service that names no address is given one here, before it enters the world, so that sidecars and the pods' resolvers
//! read the same. Invariant: readers see whole batches, never half of one.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use tokio::sync::watch;
use tracing::{error, info, warn};

use super::coverage::Coverage;
use super::holders::Holders;
use super::names;
use super::source::Told;
use super::source::file::{place_in, place_of};
use super::world::{Change, Form, Origin, World};
use crate::base::problems::{FieldPath, Problem, Severity};
use crate::base::state;
use crate::identity::spiffe::TrustDomain;
use crate::model::address_book::{AddressBook, service_addresses};
use crate::model::name_table::NameTable;
use crate::model::{Kind, Resource, ResourceKey};
use crate::snapshot::compile;

/// What the control plane knows, shared by all who answer from it.
#[derive(Debug)]
pub(crate) struct Store {
    world: RwLock<World>,
    revision: watch::Sender<u64>,
    addresses: PathBuf,
    /// None: names are resolved by others.
    names: Option<PathBuf>,
    /// What security policies covered, for the next life.
    covered: PathBuf,
    /// The addresses of pods that documents write, as the address book has them.
    claimed: Mutex<BTreeSet<IpAddr>>,
    /// Why what policies covered could not be written the last time.
    unwritten: Mutex<Option<String>>,
    /// Held while a batch is applied, so that addresses, world and names change in one order.
    writing: Mutex<NameTable>,
    /// What is wrong, and at which revision that was found.
    problems: Mutex<(Option<u64>, Arc<[Wrong]>)>,
    told: Mutex<Vec<Wrong>>,
    news: watch::Sender<u64>,
}

/// A problem, and where its document stands.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Wrong {
    /// A file, with line and column where they are known.
    pub(crate) place: Option<String>,
    pub(crate) problem: Problem,
}

impl From<Told> for Wrong {
    fn from(told: Told) -> Self {
        let path = told.path.display();
        let place = told.position.map_or_else(|| path.to_string(), |position| format!("{path}:{position}"));
        Self { place: Some(place), problem: told.problem }
    }
}

impl Store {
    /// Nothing known yet. Addresses and names are kept in `folder`.
    pub(crate) fn new(folder: &Path) -> Self {
        let covered = folder.join("covered.json");
        let mut world = World::default();
        world.remember(read_coverage(&covered));
        let addresses = folder.join("addresses.json");
        let book = read_addresses(&addresses);
        world.remember_holders(Holders::read(&book));
        Self {
            world: RwLock::new(world),
            revision: watch::Sender::new(0),
            addresses,
            names: Some(folder.join("names.json")),
            covered,
            claimed: Mutex::new(book.claimed),
            unwritten: Mutex::default(),
            writing: Mutex::default(),
            problems: Mutex::new((None, Arc::new([]))),
            told: Mutex::default(),
            news: watch::Sender::new(0),
        }
    }

    /// Of a cluster, whose own servers resolve names.
    pub(crate) fn of_cluster(folder: &Path) -> Self {
        Self { names: None, ..Self::new(folder) }
    }

    /// Tells of principals of other trust domains than this one.
    pub(crate) fn of_trust_domain(self, own: TrustDomain) -> Self {
        self.world.write().set_trust_domain(own);
        self
    }

    /// Takes a batch of changes and returns the revision that they made. Blocks for the state folder's locks.
    pub(crate) fn apply(&self, mut changes: Vec<Change>) -> u64 {
        let mut names = self.writing.lock();
        if let Err(error) = self.give_addresses(&mut changes) {
            error!(%error, path = %self.addresses.display(), "services cannot be given addresses");
        }
        let some = !changes.is_empty();
        let claims = changes.iter().any(is_of_workload_document);
        let (revision, changed) = {
            let mut world = self.world.write();
            let mut changed = 0;
            for change in changes {
                changed += world.apply(change).len();
            }
            changed += world.hold_addresses().len();
            self.write_coverage(world.coverage_mut());
            self.write_holders(world.holders_mut());
            if claims {
                self.write_claimed(world.claimed_by_documents());
            }
            (world.revision(), changed)
        };
        self.publish(&mut names, revision, changed);
        if some {
            // A document that is not in force changes no revision, and may be wrong all the same.
            self.problems.lock().0 = None;
            self.news.send_modify(|count| *count += 1);
        }
        revision
    }

    /// Everything that there is was read once.
    pub(crate) fn forget_gone(&self) {
        let mut names = self.writing.lock();
        let (revision, changed) = {
            let mut world = self.world.write();
            let mut changed = world.forget_gone().len();
            changed += world.hold_addresses().len();
            self.write_coverage(world.coverage_mut());
            self.write_holders(world.holders_mut());
            self.write_claimed(world.claimed_by_documents());
            (world.revision(), changed)
        };
        self.publish(&mut names, revision, changed);
        if changed > 0 {
            self.news.send_modify(|count| *count += 1);
        }
    }

    /// Lets everybody know of so many changes.
    fn publish(&self, names: &mut NameTable, revision: u64, changed: usize) {
        if changed > 0 {
            info!(revision, changed, "the desired state changed");
            // Sidecars first: a pod that starts waits for its identity and its configuration, and all names are much to write.
            self.revision.send_replace(revision);
            let Some(path) = &self.names else { return };
            let table = names::table(&self.world.read());
            if table != *names {
                *names = table;
                if let Err(error) = write_names(path, names) {
                    error!(%error, path = %path.display(), "names cannot be written");
                }
            }
        }
    }

    /// The world as it is. Hold it shortly: changes wait.
    pub(crate) fn world(&self) -> RwLockReadGuard<'_, World> {
        self.world.read()
    }

    /// What the folders could not take now; it replaces what was told before.
    pub(crate) fn tell(&self, told: Vec<Told>) {
        *self.told.lock() = told.into_iter().map(Wrong::from).collect();
        self.problems.lock().0 = None;
        self.news.send_modify(|count| *count += 1);
    }

    /// What the source could not take, or not whole.
    pub(crate) fn told(&self) -> Vec<Wrong> {
        self.told.lock().clone()
    }

    /// Everything that is wrong with the resources, in order. Found once for each revision.
    pub(crate) fn problems(&self) -> Arc<[Wrong]> {
        let mut found = self.problems.lock();
        let world = self.world.read();
        if found.0 != Some(world.revision()) {
            let told = self.told.lock();
            let mut all: BTreeSet<Wrong> = told.iter().cloned().collect();
            // What the folders told with its place is not told again without.
            let known: BTreeSet<&Problem> = told.iter().map(|wrong| &wrong.problem).collect();
            let others = world.problems().into_iter().filter(|problem| !known.contains(problem));
            all.extend(others.map(|problem| {
                let key: Option<ResourceKey> = problem.resource.parse().ok();
                let place = key.as_ref().and_then(|key| match world.origin(key)? {
                    // What is kept out by another document is told with its line, as what is kept out by itself is.
                    Origin::File(path) | Origin::Applied(path) if problem.severity == Severity::Refuses => {
                        Some(place_in(path, key, &problem.at))
                    }
                    origin => Some(origin.to_string()),
                });
                Wrong { place, problem }
            }));
            all.extend(world.shadowed().map(|(key, first, other)| {
                let (text, remedy) = match first {
                    Origin::File(path) => (
                        format!("it is not in force: {} writes it already, and counts", place_of(path, key)),
                        "keep it in one place; when it is gone there, this one counts",
                    ),
                    Origin::Applied(_) | Origin::Pod(_) | Origin::Object(_) => (
                        format!("it is not in force: `outrigger apply` stored another form in {first}, which counts"),
                        "take it out here, or `outrigger delete` the stored one; then this one counts",
                    ),
                };
                Wrong {
                    place: Some(place_of(other, key)),
                    problem: Problem {
                        resource: key.to_string(),
                        at: FieldPath::root(),
                        text,
                        remedy: remedy.to_owned(),
                        severity: Severity::Refuses,
                        condition: None,
                    },
                }
            }));
            all.extend(world.claimed().map(|(key, other)| {
                let (text, remedy) = runs_here(key);
                let resource = key.to_string();
                let problem =
                    Problem { resource, at: FieldPath::root(), text, remedy, severity: Severity::Refuses, condition: None };
                Wrong { place: Some(place_of(other, key)), problem }
            }));
            *found = (Some(world.revision()), all.into_iter().collect());
        }
        Arc::clone(&found.1)
    }

    /// Tells when something may be wrong that was not, or the other way round.
    pub(crate) fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    /// Tells when the world changes.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    fn give_addresses(&self, changes: &mut [Change]) -> io::Result<()> {
        if !changes.iter().any(needs_address) {
            return Ok(());
        }
        // What a Service of the same batch writes is its own before it is given to another one.
        let written: BTreeSet<IpAddr> = changes.iter().flat_map(addresses_written).collect();
        let mut world = self.world.write();
        let holders = world.holders_mut();
        state::update(&self.addresses, 0o644, |book: &mut AddressBook| {
            for change in changes.iter_mut() {
                give_address(change, book, holders, &written);
            }
        })
    }

    /// Keeps who has which address that documents write.
    fn write_holders(&self, holders: &mut Holders) {
        let Some(held) = holders.write() else { return };
        match state::update(&self.addresses, 0o644, |book: &mut AddressBook| book.held = held) {
            Ok(()) => holders.written(),
            Err(error) => {
                error!(%error, path = %self.addresses.display(), "which Service had an address first is not kept over a restart");
            }
        }
    }

    /// Keeps which addresses no later pod is to be given.
    fn write_claimed(&self, now: BTreeSet<IpAddr>) {
        let mut claimed = self.claimed.lock();
        if *claimed == now {
            return;
        }
        match state::update(&self.addresses, 0o644, |book: &mut AddressBook| book.claimed.clone_from(&now)) {
            Ok(()) => *claimed = now,
            Err(error) => {
                error!(%error, path = %self.addresses.display(), "a pod may be given an address that a document writes");
            }
        }
    }

    /// Keeps what security policies covered, and tells what they let go of.
    fn write_coverage(&self, coverage: &mut Coverage) {
        for (policy, forms) in coverage.released() {
            warn!(%policy, forms = forms.len(), "the policy was changed or deleted: it covers what its Services lead to now, if it is there, and lets go of what it kept");
        }
        for (policy, why) in coverage.widened() {
            warn!(%policy, reason = why.as_str(), "{} until it is changed", why.told());
        }
        let mut unwritten = self.unwritten.lock();
        if coverage.write(unwritten.is_some()).is_some_and(|bytes| {
            let written = state::write_durable(&self.covered, &bytes, 0o600);
            *unwritten = written.as_ref().err().map(ToString::to_string);
            unwritten.is_some()
        }) {
            let error = unwritten.as_deref().unwrap_or_default();
            error!(error, path = %self.covered.display(), "what policies covered is not kept over a restart");
        }
    }

    /// Why what policies covered is not kept over a restart, where that is so.
    pub(crate) fn unwritten(&self) -> Option<String> {
        let path = self.covered.display();
        self.unwritten.lock().as_ref().map(|error| format!("{path} cannot be written: {error}"))
    }
}

fn write_names(path: &Path, names: &NameTable) -> io::Result<()> {
    state::write_atomic(path, &serde_json::to_vec(names)?, 0o644)
}

/// What an earlier life kept. A file that was never written is a first life; one that is there and cannot be read is put
/// aside for people to look at.
fn read_coverage(path: &Path) -> Coverage {
    let error = match std::fs::read(path).and_then(|bytes| Ok(Coverage::read(&bytes)?)) {
        Ok(coverage) => return coverage,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Coverage::default(),
        Err(error) => error,
    };
    // A copy: were the file itself gone before the next one is written, the next life would be taken for the first.
    let aside = path.with_extension("json.unreadable");
    if let Err(error) = std::fs::copy(path, &aside) {
        warn!(%error, path = %aside.display(), "the file cannot be put aside");
    }
    error!(
        %error,
        path = %path.display(),
        aside = %aside.display(),
        "what policies covered cannot be read: each policy for a Service covers every port of every pod of its namespace until it is changed"
    );
    Coverage::lost()
}

/// What is said of a document that is named like a pod that runs here, and what to do about it.
pub(crate) fn runs_here(key: &ResourceKey) -> (String, String) {
    (format!("the pod {} is running here, and its own record counts", key.name), "choose another name".to_owned())
}

/// Who had which address in an earlier life.
fn read_addresses(path: &Path) -> AddressBook {
    match std::fs::read(path).and_then(|bytes| Ok(serde_json::from_slice::<AddressBook>(&bytes)?)) {
        Ok(book) => book,
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                error!(%error, path = %path.display(), "which Service had an address first is not known any more");
            }
            AddressBook::default()
        }
    }
}

/// Is it about a Workload that no pod of this machine is?
fn is_of_workload_document(change: &Change) -> bool {
    let (Change::Put { key, origin, .. } | Change::Remove { key, origin }) = change;
    key.kind == Kind::Workload && !matches!(origin, Origin::Pod(_))
}

/// The addresses that the document of a Service writes.
fn addresses_written(change: &Change) -> BTreeSet<IpAddr> {
    match change {
        Change::Put { form: Form::Read(resource), .. } => match resource.as_ref() {
            Resource::Service(service) => compile::addresses(service),
            _ => BTreeSet::new(),
        },
        Change::Put { .. } | Change::Remove { .. } => BTreeSet::new(),
    }
}

fn needs_address(change: &Change) -> bool {
    let Change::Put { form: Form::Read(resource), .. } = change else { return false };
    matches!(resource.as_ref(), Resource::Service(service)
        if service.spec.cluster_ips.is_empty() && service.spec.cluster_ip.as_deref().is_none_or(str::is_empty))
}

fn give_address(change: &mut Change, book: &mut AddressBook, holders: &mut Holders, written: &BTreeSet<IpAddr>) {
    if !needs_address(change) {
        return;
    }
    let Change::Put { key, form, .. } = change else { return };
    let Form::Read(resource) = form else { return };
    let is_free =
        |number| service_addresses(number).iter().all(|address| !written.contains(address) && !holders.is_known(*address));
    match book.services.allocate_of(&key.name.to_string(), is_free) {
        Ok(number) => {
            holders.give(number, &key.name);
            let addresses = service_addresses(number);
            if let Resource::Service(service) = Arc::make_mut(resource) {
                service.spec.cluster_ip = addresses.first().map(IpAddr::to_string);
                service.spec.cluster_ips = addresses.iter().map(IpAddr::to_string).collect();
            }
        }
        Err(error) => error!(%error, service = %key.name, "a service is left without an address"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::names::Named;
    use crate::model::yaml;

    fn put(text: &str) -> Vec<Change> {
        let documents = yaml::read(text).into_iter().map(|document| document.unwrap().resource);
        documents
            .map(|resource| Change::Put {
                key: resource.key(),
                form: Form::Read(Arc::new(resource)),
                origin: Origin::File("test.yaml".into()),
            })
            .collect()
    }

    fn service(name: &str, more: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: shop }}\nspec: {{ selector: {{ app: web }}{more} }}\n---\n"
        )
    }

    const WORKLOAD: &str = "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: { name: web-1, namespace: shop, labels: { app: web } }\nspec: { addresses: [10.64.0.5] }\n";

    fn addresses(store: &Store, name: &str) -> Vec<String> {
        let key = ResourceKey { kind: Kind::Service, name: Named::new("shop", name) };
        match store.world().resources().get(&key).map(AsRef::as_ref) {
            Some(Resource::Service(service)) => service.spec.addresses().map(str::to_owned).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_service_keeps_its_address_across_restarts_and_one_that_is_written_stays() {
        let state = tempfile::tempdir().unwrap();
        let documents = service("web", "") + &service("api", ", clusterIP: 10.65.7.7") + &service("none", ", clusterIP: None");
        let store = Store::new(state.path());
        store.apply(put(&documents));
        let given = addresses(&store, "web");
        assert_eq!(given, ["10.65.0.2", "fd65::2"]);
        assert_eq!(addresses(&store, "api"), ["10.65.7.7"]);
        assert_eq!(addresses(&store, "none"), Vec::<String>::new());
        let again = Store::new(state.path());
        again.apply(put(&(service("other", "") + &documents)));
        assert_eq!(addresses(&again, "web"), given);
        assert_eq!(addresses(&again, "other"), ["10.65.0.3", "fd65::3"]);
    }

    #[test]
    fn addresses_of_pods_that_documents_write_are_kept_from_later_pods() {
        let state = tempfile::tempdir().unwrap();
        let store = Store::new(state.path());
        let next = |owner: &str| {
            let given = |book: &mut AddressBook| book.allocate_pod(owner).unwrap();
            state::update(&state.path().join("addresses.json"), 0o600, given).unwrap()
        };
        assert_eq!(next("shop/first"), 2);
        let document = WORKLOAD.replace("10.64.0.5", "10.64.0.3, 192.0.2.1");
        store.apply(put(&document));
        // The record of a pod writes what the pod was given.
        let mut pod = put(&WORKLOAD.replace("web-1", "first").replace("10.64.0.5", "10.64.0.2"));
        if let [Change::Put { origin, .. }] = pod.as_mut_slice() {
            *origin = Origin::Pod("pods/shop.first.json".into());
        }
        store.apply(pod);
        assert_eq!(next("shop/second"), 4);
        let book = read_addresses(&state.path().join("addresses.json"));
        assert_eq!(book.claimed, ["10.64.0.3".parse().unwrap()].into());
        // What went while nobody looked is free again, once everything was read.
        let again = Store::new(state.path());
        again.forget_gone();
        assert!(read_addresses(&state.path().join("addresses.json")).claimed.is_empty());
    }

    #[test]
    fn of_two_files_that_write_one_document_the_later_one_is_told_with_both_places() {
        let state = tempfile::tempdir().unwrap();
        let store = Store::new(state.path());
        for name in ["m.yaml", "a.yaml"] {
            let path = state.path().join(name);
            std::fs::write(&path, format!("# The pod.\n{WORKLOAD}")).unwrap();
            let mut changes = put(WORKLOAD);
            for change in &mut changes {
                let (Change::Put { origin, .. } | Change::Remove { origin, .. }) = change;
                *origin = Origin::File(path.clone());
            }
            store.apply(changes);
        }
        let problems = store.problems();
        let [Wrong { place: Some(place), problem }] = &*problems else { panic!("{problems:?}") };
        let said = format!("{place}: {problem}").replace(&format!("{}/", state.path().display()), "");
        expect_test::expect!["a.yaml:2:1: Workload/shop/web-1: it is not in force: m.yaml:2:1 writes it already, and counts; keep it in one place; when it is gone there, this one counts"].assert_eq(&said);
        assert_eq!(problem.severity, Severity::Refuses);
    }

    #[test]
    fn names_are_written_when_they_change() {
        let state = tempfile::tempdir().unwrap();
        let store = Store::new(state.path());
        store.apply(put(&(service("web", "") + WORKLOAD)));
        let names = std::fs::read_to_string(state.path().join("names.json")).unwrap();
        let expected = r#"{"web.shop.svc.cluster.local":{"service":["10.65.0.2","fd65::2"],"endpoints":["10.64.0.5"]}}"#;
        assert_eq!(names, expected);
        store.apply(put(&WORKLOAD.replace("addresses", "terminating: true, addresses")));
        let names = std::fs::read_to_string(state.path().join("names.json")).unwrap();
        assert!(names.contains(r#""endpoints":[]"#), "{names}");
    }

    #[test]
    fn a_service_without_an_address_is_named_as_its_pods_are() {
        let state = tempfile::tempdir().unwrap();
        let store = Store::new(state.path());
        let other = WORKLOAD.replace("web-1", "web.2").replace("10.64.0.5", "10.64.0.6, \"fd64::6\"");
        let ended =
            WORKLOAD.replace("web-1", "web-3").replace("addresses: [10.64.0.5]", "terminating: true, addresses: [10.64.0.7]");
        store.apply(put(&[service("web", ", clusterIP: None"), WORKLOAD.to_owned(), other, ended].join("---\n")));
        let names = std::fs::read_to_string(state.path().join("names.json")).unwrap();
        let below = r#""web-1.web.shop.svc.cluster.local":{"service":["10.64.0.5"],"endpoints":["10.64.0.5"]}"#;
        let expected =
            |all: &str| format!("{{{below},\"web.shop.svc.cluster.local\":{{\"service\":{all},\"endpoints\":{all}}}}}");
        assert_eq!(names, expected(r#"["10.64.0.5","10.64.0.6"]"#));
        for families in ["ipFamilyPolicy: PreferDualStack", "ipFamilyPolicy: RequireDualStack", "ipFamilies: [IPv4, IPv6]"] {
            store.apply(put(&service("web", &format!(", clusterIP: None, {families}"))));
            let names = std::fs::read_to_string(state.path().join("names.json")).unwrap();
            assert_eq!(names, expected(r#"["10.64.0.5","10.64.0.6","fd64::6"]"#), "{families}");
        }
        store.apply(put(&service("web", ", clusterIP: None, ipFamilies: [IPv6]")));
        let names = std::fs::read_to_string(state.path().join("names.json")).unwrap();
        assert!(names.contains(r#""web.shop.svc.cluster.local":{"service":["fd64::6"]"#), "{names}");
        assert!(yaml::read(&service("web", ", ipFamilies: [IPv5]")).remove(0).is_err());
        assert!(yaml::read(&service("web", ", ipFamilyPolicy: Both")).remove(0).is_err());
    }

    #[test]
    fn readers_hear_of_a_batch_once_and_of_nothing_when_nothing_changes() {
        let state = tempfile::tempdir().unwrap();
        let store = Store::new(state.path());
        let mut changes = store.changes();
        let revision = store.apply(put(&(service("web", "") + WORKLOAD)));
        assert_eq!(*changes.borrow_and_update(), revision);
        assert_eq!(store.apply(put(WORKLOAD)), revision);
        assert!(!changes.has_changed().unwrap());
    }
}
