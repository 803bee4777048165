//! Which of several control planes writes status: the one that holds a Lease. All of them serve.
//!
//! Source: Kubernetes API, coordination.k8s.io/v1 Lease; client-go's leader election in its outlines. Whether a lease has ended
//! is measured by the own clock from when its last renewal was seen, so that clocks need not agree. Invariant: who could not
//! renew for [`RENEWED_WITHIN`], counted from before it asked, does not lead, however slowly the API server answers. That is less
//! than the [`DURATION`] after which another takes the lease, so that two never lead.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
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
            let begun = Instant::now();
            let tried = timeout_at(self.before_its_end(begun + ATTEMPT_MAX), self.attempt()).await;
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
                // What others saw of it may be as old as that.
                self.renewed = Some(begun);
            }
            let is_recent = self.renewed.is_some_and(|renewed| now.duration_since(renewed) < RENEWED_WITHIN);
            let is_leader = holds.unwrap_or(is_recent);
            if !is_leader {
                self.renewed = None;
            }
            if leads.send_replace(is_leader) != is_leader {
                info!(me = self.me, is_leader, "who writes status changed");
            }
            tokio::select! {
                () = stop.stopped() => break,
                () = tokio::time::sleep_until(self.before_its_end(now + PAUSE)) => {}
            }
        }
        if *leads.borrow() {
            leads.send_replace(false);
            drop(timeout(ATTEMPT_MAX, self.give_up()).await);
        }
    }

    /// `at`, or when the candidate leads no more unless it renews, if that is earlier.
    fn before_its_end(&self, at: Instant) -> Instant {
        self.renewed.map_or(at, |renewed| at.min(renewed + RENEWED_WITHIN))
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

/// How long who leads goes on without having renewed it.
const RENEWED_WITHIN: Duration = Duration::from_secs(10);

/// Between two looks. A renewal that takes as long as an attempt may still comes in time.
const PAUSE: Duration = Duration::from_secs(2);

const ATTEMPT_MAX: Duration = Duration::from_secs(4);

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use http::{Method, Request, Response, StatusCode};
    use http_body_util::BodyExt as _;
    use kube::client::Body;
    use parking_lot::Mutex;
    use serde_json::{Value, json};

    use super::*;
    use crate::base::drain::Drain;

    /// The one lease that an API server has, and its version.
    type Stored = Arc<Mutex<Option<(u64, Value)>>>;

    /// What an API server answers to one request about its lease.
    fn answer(stored: &Stored, method: &Method, object: Option<Value>) -> (StatusCode, Value) {
        let status = |code: StatusCode, reason: &str| {
            (code, json!({ "kind": "Status", "status": "Failure", "reason": reason, "message": "", "code": code.as_u16() }))
        };
        let mut stored = stored.lock();
        let before = stored.as_ref().map(|(version, _)| *version);
        let object = match (method, object) {
            (&Method::GET, _) => {
                let there = stored.as_ref().map(|(_, lease)| (StatusCode::OK, lease.clone()));
                return there.unwrap_or_else(|| status(StatusCode::NOT_FOUND, "NotFound"));
            }
            (&Method::POST, Some(object)) if before.is_none() => object,
            (&Method::PUT, Some(object))
                if before.map(|version| version.to_string()).as_deref() == object["metadata"]["resourceVersion"].as_str() =>
            {
                object
            }
            _ => return status(StatusCode::CONFLICT, "Conflict"),
        };
        let version = before.unwrap_or_default() + 1;
        let mut object = object;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        *stored = Some((version, object.clone()));
        (StatusCode::OK, object)
    }

    /// A way to the API server of which every answer takes so long, and that has none once `is_cut`.
    fn way(stored: &Stored, slowly: Duration, is_cut: &Arc<AtomicBool>) -> Client {
        let (stored, is_cut) = (Arc::clone(stored), Arc::clone(is_cut));
        let serve = move |asked: Request<Body>| {
            let (stored, is_cut) = (Arc::clone(&stored), Arc::clone(&is_cut));
            async move {
                if is_cut.load(Ordering::Relaxed) {
                    std::future::pending::<()>().await;
                }
                let (head, body) = asked.into_parts();
                let body = body.collect().await.unwrap().to_bytes();
                let (status, object) = answer(&stored, &head.method, serde_json::from_slice(&body).ok());
                tokio::time::sleep(slowly).await;
                let answer = Response::builder().status(status).body(Body::from(object.to_string().into_bytes()));
                Ok::<_, std::io::Error>(answer.unwrap())
            }
        };
        Client::new(tower::service_fn(serve), "default")
    }

    /// A candidate that runs, and whether it leads.
    fn candidate(client: Client, name: &str, stop: &DrainGuard) -> watch::Receiver<bool> {
        let clock = WallClock::fixed(Duration::from_secs(1_000));
        let (leading, leads) = watch::channel(false);
        tokio::spawn(Candidate::new(client, name.to_owned(), clock).run(leading, stop.clone()));
        leads
    }

    #[tokio::test(start_paused = true)]
    async fn who_cannot_renew_leads_no_more_before_another_does() {
        let (stored, is_cut) = (Stored::default(), Arc::new(AtomicBool::new(false)));
        let (_drain, stop) = Drain::new();
        let moment = Duration::from_millis(10);
        // An attempt is two requests, and what they do stands there long before they are answered.
        let first = candidate(way(&stored, Duration::from_millis(1_900), &is_cut), "first", &stop);
        first.clone().wait_for(|leads| *leads).await.unwrap();
        for _ in 0..6_000 {
            tokio::time::sleep(moment).await;
            assert!(*first.borrow(), "a slow API server is no reason to lead no more");
        }
        let version = || stored.lock().as_ref().map(|(version, _)| *version);
        let before = version();
        while version() == before {
            tokio::time::sleep(moment).await;
        }
        // Another looks on from the very renewal that is the last one.
        let second = candidate(way(&stored, Duration::ZERO, &Arc::default()), "second", &stop);
        is_cut.store(true, Ordering::Relaxed);
        let cut = Instant::now();
        while !*second.borrow() {
            tokio::time::sleep(moment).await;
            assert!(!(*first.borrow() && *second.borrow()), "both lead {:?} after the cut", cut.elapsed());
            assert!(cut.elapsed() < Duration::from_secs(30), "nobody leads");
        }
    }

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
