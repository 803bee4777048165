//! The SPIFFE Workload API: who asks is told who it is, and is told again whenever that changes.
//!
//! Source: the SPIFFE Workload API standard, sections 4 (security header), 5 (X.509 profile) and 6 (errors). The caller
//! is known by the network namespace in which its socket was made (`SO_NETNS_COOKIE` of the accepted socket) and by the cgroup
//! of its process (`peer.rs`), never by what it says. Invariant: a pod's key goes to its sidecar alone, to the process in the
//! cgroup in which that is enrolled. This is looked at for each call, and again before each answer of a stream. Where pods
//! have their identities from elsewhere, nobody gets any.

use std::collections::HashMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use futures_util::stream::unfold;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::{Request, Response, Status};
use tower::ServiceExt as _;
use tracing::{debug, warn};

use super::authority::Bundle;
use super::callers::{Callers, Place};
use super::identities::{Issuer, Svid};
use super::kubernetes::Owner;
use super::peer::Peer;
use super::pods::{Pod, Pods};
use super::workload_proto::spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer};
use super::workload_proto::{X509BundlesRequest, X509BundlesResponse, X509svid, X509svidRequest, X509svidResponse};
use super::{Agent, enrolment, netns};

/// Answers on `socket` until the agent ends, `most` connections at once; where it is one pod's socket, that `owner` alone.
pub(crate) async fn serve(agent: Arc<Agent>, socket: UnixListener, owner: Option<Arc<Owner>>, most: usize) {
    let mut connections = JoinSet::new();
    let callers = Callers::new(CONNECTIONS_MAX / 4);
    loop {
        // Cancel-safe: `accept` and `join_next` lose nothing when the other one is first.
        tokio::select! {
            accepted = socket.accept() => match accepted {
                Ok((stream, _unnamed)) => {
                    let caller = netns::cookie_of_socket(&stream).ok();
                    let is_known = |cookie| agent.pods.borrow().contains_key(&cookie);
                    let place = caller.filter(|_known| connections.len() < most);
                    let place = place.and_then(|cookie| callers.admit(cookie, is_known(cookie)));
                    match place {
                        Some(place) => {
                            let api = Api { agent: Arc::clone(&agent), owner: owner.clone() };
                            connections.spawn(connection(api, stream, place));
                        }
                        None => debug!(?caller, "a Workload API connection was refused, there are too many"),
                    }
                }
                Err(error) => {
                    // Out of descriptors: without a pause this would spin.
                    warn!(%error, "cannot accept on the Workload API socket");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_ended) = connections.join_next() => {}
        }
    }
}

/// Who is at the other end of a connection.
#[derive(Debug)]
struct Caller {
    /// Of the network namespace in which its socket was made.
    cookie: u64,
    peer: Peer,
    place: Mutex<Place>,
}

#[derive(Clone)]
struct Api {
    agent: Arc<Agent>,
    owner: Option<Arc<Owner>>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

async fn connection(api: Api, stream: UnixStream, place: Place) {
    let peer = match Peer::of(&stream) {
        Ok(peer) => peer,
        Err(error) => return debug!(%error, "who connected to the Workload API is not known"),
    };
    let caller = Arc::new(Caller { cookie: place.cookie(), peer, place: Mutex::new(place) });
    let service = SpiffeWorkloadApiServer::new(api).map_request(move |mut request: http::Request<_>| {
        request.extensions_mut().insert(Arc::clone(&caller));
        request
    });
    let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .keep_alive_interval(KEEP_ALIVE)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service))
        .await;
    if let Err(error) = served {
        debug!(%error, "a Workload API connection failed");
    }
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for Api {
    type FetchX509SVIDStream = Answers<X509svidResponse>;
    type FetchX509BundlesStream = Answers<X509BundlesResponse>;

    async fn fetch_x509svid(&self, request: Request<X509svidRequest>) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let (caller, pod) = self.caller(&request)?;
        let domain = trust_domain_id(&pod);
        let states = self.states(caller, &pod);
        let answers = unfold(states, move |mut states| {
            let domain = domain.clone();
            async move {
                loop {
                    if let Err(status) = states.changed().await {
                        return states.end().map(|states| (Err(status), states));
                    }
                    if let Some(answer) = states.svid_answer(&domain) {
                        return Some((Ok(answer), states));
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        let (caller, pod) = self.caller(&request)?;
        let domain = trust_domain_id(&pod);
        let states = self.states(caller, &pod);
        let answers = unfold(states, move |mut states| {
            let domain = domain.clone();
            async move {
                loop {
                    if let Err(status) = states.changed().await {
                        return states.end().map(|states| (Err(status), states));
                    }
                    if let Some(bundle) = states.new_bundle() {
                        let bundles = HashMap::from([(domain, bundle)]);
                        return Some((Ok(X509BundlesResponse { crl: Vec::new(), bundles }), states));
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

impl Api {
    /// The caller and its pod, if it may ask at all.
    fn caller<T>(&self, request: &Request<T>) -> Result<(Arc<Caller>, Arc<Pod>), Status> {
        // "Servers MUST reject requests that do not carry the metadata key `workload.spiffe.io` with the value `true`": a
        // browser or a confused proxy cannot send it.
        if request.metadata().get(SECURITY_HEADER).is_none_or(|value| value != "true") {
            return Err(Status::invalid_argument("security header missing; send the metadata workload.spiffe.io: true"));
        }
        if self.agent.issuer == Issuer::Elsewhere {
            return Err(Status::permission_denied(
                "the mesh has its identities from another Workload API; make the pod anew, so that its sidecar asks there",
            ));
        }
        let caller = request.extensions().get().map(Arc::clone).ok_or_else(|| Status::internal("no caller"))?;
        let pod = self.pod_of(&caller);
        if pod.is_ok() {
            caller.place.lock().is_known();
        }
        self.agent.metrics.identity_calls.with_label_values(&[if pod.is_ok() { "answered" } else { "refused" }]).inc();
        Ok((caller, pod?))
    }

    /// The pod of which the caller is the sidecar now.
    fn pod_of(&self, Caller { cookie, peer, .. }: &Caller) -> Result<Arc<Pod>, Status> {
        let cgroup = peer.cgroup(&self.agent.cgroup_root);
        decide(&self.agent.pods.borrow(), self.owner.as_deref(), *cookie, (peer.pid, cgroup.as_deref()))
    }

    fn states(&self, caller: Arc<Caller>, pod: &Pod) -> States {
        States {
            api: self.clone(),
            caller,
            svid: pod.svid.subscribe(),
            bundle: self.agent.authority.bundle(),
            sent: Bundle::default(),
            fresh: true,
            ended: false,
        }
    }
}

/// The pod of which a process is the sidecar, who asks from the network namespace `cookie` at the socket of `owner`, or at
/// everybody's.
fn decide(pods: &Pods, owner: Option<&Owner>, cookie: u64, (pid, cgroup): (u32, Option<&Path>)) -> Result<Arc<Pod>, Status> {
    let pod = pods.get(&cookie).ok_or_else(no_identity)?;
    if owner.is_some_and(|owner| pod.record.uid.as_ref() != Some(&owner.uid)) {
        return Err(no_identity());
    }
    enrolment::is_sidecar(pod, pid, cgroup).map_err(|refusal| {
        warn!(pod = %pod.record.named(), error = %refusal, remedy = refusal.remedy(), "an identity was refused");
        Status::permission_denied(format!("no identity issued; {refusal}; {}", refusal.remedy()))
    })?;
    Ok(Arc::clone(pod))
}

/// What a stream follows.
struct States {
    api: Api,
    caller: Arc<Caller>,
    svid: watch::Receiver<Option<Arc<Svid>>>,
    bundle: watch::Receiver<Bundle>,
    /// The bundle sent last.
    sent: Bundle,
    fresh: bool,
    ended: bool,
}

impl States {
    /// Returns at once the first time, then after each change; a pod that is gone ends the stream, and so does a caller that
    /// is its sidecar no more. Nothing is held of the pod itself, so that its certificates end with it.
    async fn changed(&mut self) -> Result<(), Status> {
        if self.ended {
            return Err(no_identity());
        }
        if self.fresh {
            self.fresh = false;
            return Ok(());
        }
        // Cancel-safe: a change that is not seen by one arm stays to be seen. A rotation may be an hour away: waiting for
        // it without a deadline is what the stream is for; a caller that went away ends the stream by itself.
        let changed = tokio::select! {
            changed = self.svid.changed() => changed,
            changed = self.bundle.changed() => changed,
        };
        changed.map_err(|_pod_is_gone| no_identity())?;
        self.api.pod_of(&self.caller).map(drop)
    }

    /// The stream's last word was said; the next time there is none.
    fn end(mut self) -> Option<Self> {
        if self.ended {
            return None;
        }
        self.ended = true;
        Some(self)
    }

    fn svid_answer(&mut self, domain: &str) -> Option<X509svidResponse> {
        let bundle = self.bundle.borrow_and_update().0.concat();
        let svid = self.svid.borrow_and_update().as_ref().map(Arc::clone)?;
        if bundle.is_empty() {
            return None;
        }
        debug!(id = %svid.id, domain, "identity sent");
        let svid = X509svid {
            spiffe_id: svid.id.to_string(),
            x509_svid: svid.chain.concat(),
            x509_svid_key: svid.key.clone(),
            bundle,
            hint: String::new(),
        };
        Some(X509svidResponse { svids: vec![svid], crl: Vec::new(), federated_bundles: HashMap::new() })
    }

    fn new_bundle(&mut self) -> Option<Vec<u8>> {
        let bundle = self.bundle.borrow_and_update().clone();
        if bundle.0.is_empty() || bundle == self.sent {
            return None;
        }
        let bytes = bundle.0.concat();
        self.sent = bundle;
        Some(bytes)
    }
}

fn trust_domain_id(pod: &Pod) -> String {
    format!("spiffe://{}", pod.id.trust_domain())
}

fn no_identity() -> Status {
    Status::permission_denied("no identity issued; the caller is in no pod of this node")
}

const SECURITY_HEADER: &str = "workload.spiffe.io";
/// Connections at once, of everybody.
pub(super) const CONNECTIONS_MAX: usize = 4096;
const STREAMS_MAX: u32 = 16;
const KEEP_ALIVE: Duration = Duration::from_secs(30);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::super::pods::tests::{known, record};
    use super::*;
    use crate::model::pod_record::PodRecord;

    #[track_caller]
    fn is_told(pods: &Pods, owner: Option<&str>, cookie: u64, cgroup: Option<&str>) -> Result<String, String> {
        let owner = owner.map(|uid| Owner {
            namespace: "shop".into(),
            name: "web".into(),
            uid: uid.into(),
            service_account: "web".into(),
        });
        let decided = decide(pods, owner.as_ref(), cookie, (7, cgroup.map(Path::new)));
        decided.map(|pod| pod.record.name.clone()).map_err(|status| {
            assert_eq!(status.code(), tonic::Code::PermissionDenied);
            status.message().to_owned()
        })
    }

    #[test]
    fn a_pods_key_goes_to_its_sidecar_and_to_no_other_process_of_its_network() {
        let pods = known(&[record("web", 1), record("api", 2)]);
        let of = |cgroup| is_told(&pods, None, 1, cgroup);
        assert_eq!(of(Some("/sys/fs/cgroup/outrigger/pods/shop.web/sidecar")).as_deref(), Ok("web"));
        for other in [
            Some("/sys/fs/cgroup/outrigger/pods/shop.web/app"),
            Some("/sys/fs/cgroup/outrigger/pods/shop.web/sidecar/below"),
            Some("/sys/fs/cgroup/outrigger/pods/shop.api/sidecar"),
            None,
        ] {
            let refused = of(other).unwrap_err();
            assert!(refused.contains("(pid 7)") && refused.contains("only the pod's sidecar may ask"), "{refused}");
        }
        assert!(is_told(&pods, None, 9, None).unwrap_err().contains("in no pod of this node"));
    }

    #[test]
    fn a_container_of_a_pod_that_is_not_the_enrolled_one_is_told_nothing_and_the_next_life_of_the_sidecar_is() {
        let container = |id: &str| format!("/sys/fs/cgroup/kubepods/pod0a-1/{id}");
        let enrolled = |id: &str| {
            let sidecar = Some(container(id).into());
            known(&[PodRecord { uid: Some("0a-1".into()), sidecar, ..record("web", 1) }])
        };
        let (before, after) = (enrolled("aa11"), enrolled("cc33"));
        let of = |pods: &Pods, id: &str| is_told(pods, Some("0a-1"), 1, Some(&container(id))).is_ok();
        assert_eq!((of(&before, "aa11"), of(&before, "bb22"), of(&before, "cc33")), (true, false, false));
        assert_eq!((of(&after, "aa11"), of(&after, "bb22"), of(&after, "cc33")), (false, false, true));
        assert!(is_told(&before, Some("0b-2"), 1, Some(&container("aa11"))).is_err(), "at another pod's socket");
    }
}
