//! What a control plane keeps in a Kubernetes cluster: the authority's root, who writes status, what is written there, and the last
//! good forms of what is refused.

pub(crate) mod last_good;
mod lease;
pub(crate) mod root;
mod status;
pub(crate) mod writer;

use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::warn;

use self::lease::Candidate;
use self::writer::Statuses;
use super::ca::Authority;
use super::metrics::Metrics;
use super::source::kubernetes::told;
use super::store::Store;
use crate::base::clock::WallClock;
use crate::base::drain::DrainGuard;
use crate::base::random::Dice;

/// What the control plane of a cluster does beside serving.
pub(crate) struct Keeper {
    pub(crate) client: Client,
    pub(crate) authority: Arc<Authority>,
    pub(crate) statuses: Arc<Statuses>,
    pub(crate) store: Arc<Store>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: WallClock,
}

impl Keeper {
    /// Does it, until `stop` says so.
    pub(crate) fn start(self, stop: &DrainGuard, tasks: &mut JoinSet<()>) {
        let Self { client, authority, statuses, store, metrics, clock } = self;
        let (leading, leads) = watch::channel(false);
        let candidate = Candidate::new(client.clone(), name(&clock), clock.clone());
        tasks.spawn(candidate.run(leading, stop.clone()));
        tasks.spawn(publish(client.clone(), authority, leads.clone(), stop.clone()));
        tasks.spawn(last_good::keep(client.clone(), statuses.standing(), leads.clone(), stop.clone()));
        tasks.spawn(writer::run(client, statuses, store, metrics, clock, leads, stop.clone()));
    }
}

/// Tells the cluster the root: at once, and as the one that leads again and again, should somebody take it away.
async fn publish(client: Client, authority: Arc<Authority>, leads: watch::Receiver<bool>, mut stop: DrainGuard) {
    let mut is_told = false;
    loop {
        if !is_told || *leads.borrow() {
            match tokio::time::timeout(PUBLISH_MAX, root::publish(&client, &authority)).await {
                Ok(Ok(())) => is_told = true,
                Ok(Err(error)) => warn!(error = told(&error), "the root cannot be told to the cluster"),
                Err(_elapsed) => warn!("the root cannot be told to the cluster: the API server does not answer"),
            }
        }
        tokio::select! {
            () = stop.stopped() => return,
            () = tokio::time::sleep(if is_told { PUBLISH } else { PUBLISH_AGAIN }) => {}
        }
    }
}

/// The name of this process among the control planes: that of its pod, and a number, for a pod's process may start again.
fn name(clock: &WallClock) -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let since_epoch = u64::try_from(clock.since_epoch().as_micros()).unwrap_or_default();
    let seed = since_epoch ^ u64::from(std::process::id());
    format!("{host}-{:08x}", Dice::from_seed(seed).bits() >> 32)
}

const PUBLISH: Duration = Duration::from_secs(60);
const PUBLISH_AGAIN: Duration = Duration::from_secs(2);
const PUBLISH_MAX: Duration = Duration::from_secs(10);
