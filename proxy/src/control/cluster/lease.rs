//! Which of several control planes writes status: the one that holds a Lease. All of them serve.
//!
//! Source: Kubernetes API, coordination.k8s.io/v1 Lease; client-go's leader election in its outlines. Whether a lease has ended
//! is measured by the own clock from when its last renewal was seen, so that clocks need not agree. Invariant: who could not
//! renew for [`DURATION`] does not lead, so that two never lead for longer than a request takes.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use crate::base::clock::WallClock;
use crate::base::drain::DrainGuard;
use crate::control::source::kubernetes::told;
use crate::model::object::MESH_NAMESPACE;

/// A candidate.
pub(crate) struct Candidate {
    leases: Api<Lease>,
    /// Its name among the candidates.
    me: String,
    clock: WallClock,
    /// The lease as it was seen last, and since when it has been so.
    seen: Option<(Option<LeaseSpec>, Instant)>,
    renewed: Option<Instant>,
}

/// What a candidate does with the lease as it stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Step {
    /// Nobody ever held it.
    Make,
    /// It is the candidate's.
    Renew,
    /// Its holder has given it up or has not renewed it.
    Take,
    /// It is another's.
    Wait,
}

impl Candidate {
    /// A candidate of this name.
    pub(crate) fn new(client: Client, me: String, clock: WallClock) -> Self {
        Self { leases: Api::namespaced(client, MESH_NAMESPACE), me, clock, seen: None, renewed: None }
    }

    /// Tells `leads` whether it does, until `stop` says so; then the lease is given up.
    pub(crate) async fn run(mut self, leads: watch::Sender<bool>, mut stop: DrainGuard) {
        loop {
            let tried = timeout(ATTEMPT_MAX, self.attempt()).await;
            let holds = match tried {
                Ok(Ok(holds)) => Some(holds),
                Ok(Err(error)) => {
                    warn!(error = told(&error), lease = LEASE, "the lease of the one who writes status cannot be read");
                    None
                }
                Err(_too_slow) => None,
            };
            let now = Instant::now();
            if holds == Some(true) {
                self.renewed = Some(now);
            }
            let is_recent = self.renewed.is_some_and(|renewed| now.duration_since(renewed) < DURATION);
            let is_leader = holds.unwrap_or(is_recent);
            if !is_leader {
                self.renewed = None;
            }
            if leads.send_replace(is_leader) != is_leader {
                info!(me = self.me, is_leader, "who writes status changed");
            }
            tokio::select! {
                () = stop.stopped() => break,
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
        if *leads.borrow() {
            leads.send_replace(false);
            drop(timeout(ATTEMPT_MAX, self.give_up()).await);
        }
    }

    /// Returns whether the lease is the candidate's now.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let lease = self.leases.get_opt(LEASE).await?;
        let spec = lease.as_ref().and_then(|lease| lease.spec.clone());
        let now = Instant::now();
        let since = match &self.seen {
            Some((seen, since)) if *seen == spec => *since,
            _ => now,
        };
        self.seen = Some((spec.clone(), since));
        let written = match (step(lease.is_some(), spec.as_ref(), &self.me, now.duration_since(since)), lease) {
            (Step::Wait, _) => return Ok(false),
            (Step::Make, _) | (_, None) => {
                let metadata = ObjectMeta { name: Some(LEASE.to_owned()), ..ObjectMeta::default() };
                let lease = Lease { metadata, spec: Some(self.held(None)) };
                self.leases.create(&PostParams::default(), &lease).await
            }
            (Step::Renew | Step::Take, Some(mut lease)) => {
                lease.spec = Some(self.held(spec));
                // It carries the version that was read: who was faster wins.
                self.leases.replace(LEASE, &PostParams::default(), &lease).await
            }
        };
        match written {
            Ok(lease) => {
                self.seen = Some((lease.spec, now));
                Ok(true)
            }
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn give_up(&self) -> Result<(), kube::Error> {
        let Some(mut lease) = self.leases.get_opt(LEASE).await? else { return Ok(()) };
        if let Some(spec) = lease.spec.as_mut().filter(|spec| spec.holder_identity.as_deref() == Some(&self.me)) {
            spec.holder_identity = None;
            self.leases.replace(LEASE, &PostParams::default(), &lease).await?;
        }
        Ok(())
    }

    /// The lease as its holder writes it.
    fn held(&self, before: Option<LeaseSpec>) -> LeaseSpec {
        let before = before.unwrap_or_default();
        let is_renewed = before.holder_identity.as_deref() == Some(&self.me);
        let since_epoch = i64::try_from(self.clock.since_epoch().as_micros()).unwrap_or_default();
        let now = Timestamp::from_microsecond(since_epoch).ok().map(MicroTime);
        let transitions = before.lease_transitions.unwrap_or_default();
        LeaseSpec {
            acquire_time: if is_renewed { before.acquire_time } else { now.clone() },
            holder_identity: Some(self.me.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            lease_transitions: Some(if is_renewed { transitions } else { transitions.saturating_add(1) }),
            renew_time: now,
            ..LeaseSpec::default()
        }
    }
}

/// What is to be done with a lease that has been as it is for so long.
fn step(is_there: bool, spec: Option<&LeaseSpec>, me: &str, unchanged: Duration) -> Step {
    if !is_there {
        return Step::Make;
    }
    let holder = spec.and_then(|spec| spec.holder_identity.as_deref()).filter(|holder| !holder.is_empty());
    let lasts = spec.and_then(|spec| u64::try_from(spec.lease_duration_seconds?).ok()).map_or(DURATION, Duration::from_secs);
    match holder {
        Some(holder) if holder == me => Step::Renew,
        Some(_other) if unchanged < lasts => Step::Wait,
        _ => Step::Take,
    }
}

const LEASE: &str = "outrigger-control";

/// How long a lease is good without being renewed.
const DURATION: Duration = Duration::from_secs(15);

/// Between two looks.
const PAUSE: Duration = Duration::from_secs(4);

const ATTEMPT_MAX: Duration = Duration::from_secs(4);

#[cfg(test)]
mod tests {
    use super::*;

    fn held(by: Option<&str>) -> LeaseSpec {
        LeaseSpec { holder_identity: by.map(str::to_owned), lease_duration_seconds: Some(15), ..LeaseSpec::default() }
    }

    #[test]
    fn a_lease_is_taken_when_nobody_has_it_or_its_holder_is_silent() {
        let second = Duration::from_secs(1);
        assert_eq!(step(false, None, "a", second), Step::Make);
        assert_eq!(step(true, None, "a", second), Step::Take);
        assert_eq!(step(true, Some(&held(None)), "a", second), Step::Take);
        assert_eq!(step(true, Some(&held(Some("a"))), "a", second), Step::Renew);
        assert_eq!(step(true, Some(&held(Some("b"))), "a", second), Step::Wait);
        assert_eq!(step(true, Some(&held(Some("b"))), "a", Duration::from_secs(15)), Step::Take);
    }
}
