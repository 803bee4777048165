//! The one place where the world changes: a change goes in, everybody who follows the world hears of it.
//!
//! A Service that names no address is given one here, before it enters the world, so that sidecars and the pods' resolvers
//! read the same. Invariant: readers see whole batches, never half of one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use tokio::sync::watch;
use tracing::{error, info};

use super::source::Told;
use super::world::{Change, Form, World};
use crate::base::problems::Problem;
use crate::base::state;
use crate::model::address_book::{AddressBook, service_addresses};
use crate::model::name_table::{NameAnswer, NameTable};
use crate::model::{Kind, Resource};

/// What the control plane knows, shared by all who answer from it.
#[derive(Debug)]
pub(crate) struct Store {
    world: RwLock<World>,
    revision: watch::Sender<u64>,
    addresses: PathBuf,
    names: PathBuf,
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
        Self {
            world: RwLock::default(),
            revision: watch::Sender::new(0),
            addresses: folder.join("addresses.json"),
            names: folder.join("names.json"),
            writing: Mutex::default(),
            problems: Mutex::new((None, Arc::new([]))),
            told: Mutex::default(),
            news: watch::Sender::new(0),
        }
    }

    /// Takes a batch of changes and returns the revision that they made. Blocks for the state folder's locks.
    pub(crate) fn apply(&self, mut changes: Vec<Change>) -> u64 {
        let mut names = self.writing.lock();
        if let Err(error) = self.give_addresses(&mut changes) {
            error!(%error, path = %self.addresses.display(), "services cannot be given addresses");
        }
        let (revision, changed) = {
            let mut world = self.world.write();
            let mut changed = 0;
            for change in changes {
                changed += world.apply(change).len();
            }
            (world.revision(), changed)
        };
        if changed > 0 {
            let table = name_table(&self.world.read());
            if table != *names {
                *names = table;
                if let Err(error) = self.write_names(&names) {
                    error!(%error, path = %self.names.display(), "names cannot be written");
                }
            }
            info!(revision, changed, "the desired state changed");
            self.revision.send_replace(revision);
            self.news.send_modify(|count| *count += 1);
        }
        revision
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
                let origin = problem.resource.parse().ok().and_then(|key| world.origin(&key).map(ToString::to_string));
                Wrong { place: origin, problem }
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
        state::update(&self.addresses, 0o644, |book: &mut AddressBook| {
            for change in changes.iter_mut() {
                give_address(change, book);
            }
        })
    }

    fn write_names(&self, names: &NameTable) -> io::Result<()> {
        state::write_atomic(&self.names, &serde_json::to_vec(names)?, 0o644)
    }
}

fn needs_address(change: &Change) -> bool {
    let Change::Put { form: Form::Read(resource), .. } = change else { return false };
    matches!(resource.as_ref(), Resource::Service(service)
        if service.spec.cluster_ips.is_empty() && service.spec.cluster_ip.as_deref().is_none_or(str::is_empty))
}

fn give_address(change: &mut Change, book: &mut AddressBook) {
    if !needs_address(change) {
        return;
    }
    let Change::Put { key, form, .. } = change else { return };
    let Form::Read(resource) = form else { return };
    match book.services.allocate(&key.name.to_string()) {
        Ok(number) => {
            let addresses = service_addresses(number);
            if let Resource::Service(service) = Arc::make_mut(resource) {
                service.spec.cluster_ip = addresses.first().map(IpAddr::to_string);
                service.spec.cluster_ips = addresses.iter().map(IpAddr::to_string).collect();
            }
        }
        Err(error) => error!(%error, service = %key.name, "a service is left without an address"),
    }
}

/// What resolves inside pods: every Service by its full name.
fn name_table(world: &World) -> NameTable {
    let mut table = BTreeMap::new();
    for resource in world.resources().by_key.values() {
        let Resource::Service(service) = resource.as_ref() else { continue };
        let mut answer =
            NameAnswer { service: service.spec.addresses().filter_map(|ip| ip.parse().ok()).collect(), endpoints: Vec::new() };
        for (key, workload) in &world.resources().by_key {
            if key.kind == Kind::Workload
                && *key.name.namespace == *service.metadata.namespace
                && let Resource::Workload(workload) = workload.as_ref()
                && !workload.spec.terminating
                && service.spec.selects(&workload.metadata.labels)
            {
                answer.endpoints.extend(&workload.spec.addresses);
            }
        }
        table.insert(format!("{}.{}.svc.cluster.local", service.metadata.name, service.metadata.namespace), answer);
    }
    NameTable(table)
}
