//! Writes status, for as long as this control plane is the one that does.
//!
//! A write names the version that it was made for: where the object has changed meanwhile it is refused, and the change, which
//! is told by the source, makes another one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;
use tracing::warn;

use super::last_good::Standing;
use super::status::{Known, wanted};
use crate::base::clock::WallClock;
use crate::base::drain::DrainGuard;
use crate::base::problems::Problem;
use crate::control::metrics::Metrics;
use crate::control::source::kubernetes::told;
use crate::control::source::kubernetes::watched::Watched;
use crate::control::source::kubernetes::written::Written;
use crate::control::store::Store;
use crate::model::target::Former;
use crate::model::{Kind, ResourceKey};
use crate::snapshot::compile;

/// The documents whose status is written here, as the API server has them.
#[derive(Debug, Default)]
pub(crate) struct Statuses {
    written: Mutex<BTreeMap<ResourceKey, Written>>,
    standing: watch::Sender<Standing>,
    changed: watch::Sender<u64>,
}

/// What became of objects. None: one is not there any more, or none of ours.
pub(crate) type Objects = Vec<(ResourceKey, Option<Written>)>;

impl Statuses {
    /// Takes what the source saw, once the store has taken it as well: a problem of a form is known when the form is.
    pub(crate) fn take(&self, objects: Objects, standing: Option<Standing>) {
        if objects.is_empty() && standing.is_none() {
            return;
        }
        if let Some(standing) = standing {
            self.standing.send_replace(standing);
        }
        let mut written = self.written.lock();
        for (key, object) in objects {
            match object {
                Some(object) => written.insert(key, object),
                None => written.remove(&key),
            };
        }
        drop(written);
        self.changed.send_modify(|count| *count += 1);
    }

    /// How refused documents stand.
    pub(super) fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }
}

/// One write that is to be done.
struct Write {
    key: ResourceKey,
    api_version: String,
    version: String,
    status: Value,
}

/// Writes status while `leads`, until `stop` says so.
pub(crate) async fn run(
    client: Client,
    statuses: Arc<Statuses>,
    store: Arc<Store>,
    metrics: Arc<Metrics>,
    clock: WallClock,
    mut leads: watch::Receiver<bool>,
    mut stop: DrainGuard,
) {
    let (mut changed, mut news) = (statuses.changed.subscribe(), store.news());
    // What was sent already for a version, and is told by the source in a moment.
    let mut sent: BTreeMap<ResourceKey, String> = BTreeMap::new();
    loop {
        let is_leader = *leads.borrow_and_update();
        changed.mark_unchanged();
        news.mark_unchanged();
        let mut failed = false;
        if is_leader {
            let now = timestamp(&clock);
            let (asked, objects) = (Arc::clone(&store), Arc::clone(&statuses));
            let Ok(mut writes) = tokio::task::spawn_blocking(move || to_write(&asked, &objects, &now)).await else { return };
            writes.retain(|write| sent.get(&write.key) != Some(&write.version));
            let mut answers =
                futures_util::stream::iter(writes.into_iter().map(|write| send(&client, write))).buffer_unordered(AT_ONCE);
            loop {
                let (write, done) = tokio::select! {
                    // Of many writes the last ones would be made long after another leads, or keep this process from its end.
                    () = stop.stopped() => return,
                    _ = leads.wait_for(|leads| !*leads) => break,
                    answer = answers.next() => match answer {
                        Some(answer) => answer,
                        None => break,
                    },
                };
                metrics.status_written(done.is_ok());
                match done {
                    Ok(()) => drop(sent.insert(write.key, write.version)),
                    // It changed or went; both are told by the source.
                    Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {
                        sent.insert(write.key, write.version);
                    }
                    // The same again would be refused again, as long as the object is as it is.
                    Err(kube::Error::Api(status)) if status.code == 422 => {
                        warn!(resource = %write.key, error = status.message, "the API server takes no such status");
                        sent.insert(write.key, write.version);
                    }
                    Err(error) => {
                        warn!(resource = %write.key, error = told(&error), "status cannot be written; it is tried again");
                        failed = true;
                    }
                }
            }
            sent.retain(|key, _| statuses.written.lock().contains_key(key));
        } else {
            sent.clear();
        }
        tokio::select! {
            () = stop.stopped() => return,
            led = leads.changed() => if led.is_err() { return },
            _ = changed.changed(), if is_leader => {}
            _ = news.changed(), if is_leader => {}
            () = tokio::time::sleep(AGAIN), if failed => {}
        }
        tokio::time::sleep(SETTLE).await;
    }
}

/// Everything whose status is not as it should be.
fn to_write(store: &Store, statuses: &Statuses, now: &str) -> Vec<Write> {
    let problems = store.problems();
    // What is wrong with a form that is refused is told by the source; all else is about what is in force.
    let told: BTreeSet<Problem> = store.told().into_iter().map(|wrong| wrong.problem).collect();
    let standing = statuses.standing.borrow().clone();
    let (mut kept, mut known): (BTreeMap<String, Vec<Value>>, BTreeMap<&str, Known<'_>>) = Default::default();
    for wrong in problems.iter() {
        let known = known.entry(&wrong.problem.resource).or_default();
        if told.contains(&wrong.problem) { &mut known.problems } else { &mut known.of_what_is_in_force }.push(&wrong.problem);
    }
    let without_target = {
        let world = store.world();
        let of_status = |form: &Former| serde_json::to_value(form).ok();
        for (policy, covers) in world.covers() {
            kept.insert(policy.to_string(), covers.iter().filter_map(of_status).collect());
        }
        compile::without_target(world.resources())
    };
    let mut lacking: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for ((policy, service), means) in without_target {
        lacking.entry(policy.to_string()).or_default().push(format!("{service} does not exist; {means}"));
    }
    for (policy, texts) in &lacking {
        known.entry(policy).or_default().without_target.clone_from(texts);
    }
    for (policy, covers) in &kept {
        known.entry(policy).or_default().kept.clone_from(covers);
    }
    let last_good: BTreeMap<String, Option<i64>> =
        standing.last_good.iter().map(|(key, good)| (key.to_string(), good.generation)).collect();
    for (resource, generation) in &last_good {
        known.entry(resource).or_default().last_good = Some(*generation);
    }
    // What both forms have in common was told of the newest alone.
    let own = standing.last_good.iter().flat_map(|(key, good)| compile::alone(key, &good.resource).into_vec());
    let own: Vec<Problem> = own.collect();
    for problem in &own {
        let of_what_is_in_force = &mut known.entry(&problem.resource).or_default().of_what_is_in_force;
        if !of_what_is_in_force.contains(&problem) {
            of_what_is_in_force.push(problem);
        }
    }
    let nothing = Known::default();
    let written = statuses.written.lock();
    let all = written.iter().filter_map(|(key, written)| {
        let known = known.get(key.to_string().as_str()).unwrap_or(&nothing);
        let status = wanted(written, known, now)?;
        Some(Write { key: key.clone(), api_version: written.api_version.clone(), version: written.version.clone(), status })
    });
    all.collect()
}

async fn send(client: &Client, write: Write) -> (Write, Result<(), kube::Error>) {
    let resource = Watched::Documents(write.key.kind).resource(&write.api_version);
    let api: Api<DynamicObject> = match write.key.kind {
        Kind::Mesh => Api::all_with(client.clone(), &resource),
        _ => Api::namespaced_with(client.clone(), &write.key.name.namespace, &resource),
    };
    let patch = Patch::Merge(json!({ "metadata": { "resourceVersion": write.version }, "status": write.status }));
    let parameters = PatchParams { field_manager: Some(super::root::MANAGER.to_owned()), ..PatchParams::default() };
    let sent = api.patch_status(&write.key.name.name, &parameters, &patch);
    let done = match tokio::time::timeout(WRITE_MAX, sent).await {
        Ok(done) => done.map(drop),
        Err(_elapsed) => Err(kube::Error::Service("the API server does not answer".into())),
    };
    (write, done)
}

/// Now, as conditions have it (RFC 3339, whole seconds).
fn timestamp(clock: &WallClock) -> String {
    let seconds = i64::try_from(clock.since_epoch().as_secs()).unwrap_or_default();
    Timestamp::from_second(seconds).map(|now| now.to_string()).unwrap_or_default()
}

/// Writes under way at once.
const AT_ONCE: usize = 8;

const WRITE_MAX: Duration = Duration::from_secs(10);

/// Documents come in bursts.
const SETTLE: Duration = Duration::from_millis(100);

/// After a write that the API server could not do.
const AGAIN: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use http::{Request, Response, StatusCode};
    use kube::client::Body;
    use tokio::task::JoinHandle;
    use tokio::time::sleep;

    use super::*;
    use crate::base::drain::Drain;
    use crate::base::names::Named;

    /// A writer of status of so many routes, at an API server that answers with this status; None: it does not answer. How many
    /// requests there were is counted.
    struct Rig {
        requests: Arc<AtomicUsize>,
        statuses: Arc<Statuses>,
        leads: watch::Sender<bool>,
        drain: Drain,
        writer: JoinHandle<()>,
        _state: tempfile::TempDir,
    }

    fn route(version: &str) -> Option<Written> {
        Some(Written {
            api_version: "gateway.networking.k8s.io/v1".to_owned(),
            version: version.to_owned(),
            generation: Some(1),
            parents: Some(vec![(0, json!({ "group": "", "kind": "Service", "name": "web" }))]),
            rules: 1,
            status: Vec::new(),
            kept: Vec::new(),
        })
    }

    fn key(number: usize) -> ResourceKey {
        ResourceKey { kind: Kind::HttpRoute, name: Named::new("shop", format!("r{number}")) }
    }

    fn rig(routes: usize, code: Option<StatusCode>) -> Rig {
        let requests = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&requests);
        let serve = move |_asked: Request<Body>| {
            counted.fetch_add(1, Ordering::Relaxed);
            async move {
                let Some(code) = code else { return std::future::pending().await };
                let status =
                    json!({ "kind": "Status", "status": "Failure", "reason": "", "message": "no", "code": code.as_u16() });
                let answer = Response::builder().status(code).body(Body::from(status.to_string().into_bytes()));
                Ok::<_, std::io::Error>(answer.unwrap())
            }
        };
        let client = Client::new(tower::service_fn(serve), "default");
        let state = tempfile::tempdir().unwrap();
        let statuses = Arc::new(Statuses::default());
        statuses.take((0..routes).map(|number| (key(number), route("7"))).collect(), None);
        let (leads, led) = watch::channel(true);
        let (drain, stop) = Drain::new();
        let (store, metrics) = (Arc::new(Store::new(state.path())), Arc::new(Metrics::new().unwrap()));
        let clock = WallClock::fixed(Duration::from_secs(1_000));
        let writer = tokio::spawn(run(client, Arc::clone(&statuses), store, metrics, clock, led, stop));
        Rig { requests, statuses, leads, drain, writer, _state: state }
    }

    impl Rig {
        /// Waits for the first requests, and for nothing more to be asked.
        async fn asked(&self) -> usize {
            while self.requests.load(Ordering::Relaxed) == 0 {
                sleep(Duration::from_millis(1)).await;
            }
            sleep(Duration::from_millis(1)).await;
            self.requests.load(Ordering::Relaxed)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn writes_that_nobody_answers_keep_no_control_plane_from_its_end() {
        let rig = rig(1_000, None);
        assert_eq!(rig.asked().await, AT_ONCE);
        assert!(rig.drain.drain(Duration::from_secs(1)).await, "it goes on asking an API server that does not answer");
        rig.writer.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_leads_no_more_writes_no_more_of_what_it_began() {
        let rig = rig(1_000, None);
        assert_eq!(rig.asked().await, AT_ONCE);
        rig.leads.send_replace(false);
        sleep(WRITE_MAX * 3).await;
        assert_eq!(rig.requests.load(Ordering::Relaxed), AT_ONCE);
        rig.leads.send_replace(true);
        sleep(Duration::from_secs(1)).await;
        assert_eq!(rig.requests.load(Ordering::Relaxed), AT_ONCE * 2, "it leads again, and does not write");
    }

    #[tokio::test(start_paused = true)]
    async fn a_status_that_the_api_server_takes_for_wrong_is_sent_again_when_the_object_has_changed() {
        let rig = rig(1, Some(StatusCode::UNPROCESSABLE_ENTITY));
        assert_eq!(rig.asked().await, 1);
        sleep(AGAIN * 10).await;
        assert_eq!(rig.requests.load(Ordering::Relaxed), 1);
        rig.statuses.take(vec![(key(0), route("8"))], None);
        sleep(AGAIN).await;
        assert_eq!(rig.requests.load(Ordering::Relaxed), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_status_that_the_api_server_could_not_take_is_sent_again() {
        let rig = rig(1, Some(StatusCode::INTERNAL_SERVER_ERROR));
        rig.asked().await;
        let before = rig.requests.load(Ordering::Relaxed);
        sleep(AGAIN * 2).await;
        assert!(rig.requests.load(Ordering::Relaxed) > before);
    }
}
