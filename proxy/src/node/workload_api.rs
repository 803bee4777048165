//! The SPIFFE Workload API: who asks is told who it is, and is told again whenever that changes.
//!
//! Source: the SPIFFE Workload API standard, sections 4 (security header), 5 (X.509 profile) and 6 (errors). The caller
//! is known by the network namespace in which its socket was made (`SO_NETNS_COOKIE` of the accepted socket), never by
//! what it says; a caller outside every pod gets nothing. Where pods have their identities from elsewhere, nobody gets any.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use futures_util::stream::unfold;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::{Request, Response, Status};
use tower::ServiceExt as _;
use tracing::{debug, warn};

use super::Agent;
use super::authority::Bundle;
use super::callers::{Callers, Place};
use super::identities::{Issuer, Svid};
use super::kubernetes::Owner;
use super::netns;
use super::pods::Pod;
use super::workload_proto::spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer};
use super::workload_proto::{X509BundlesRequest, X509BundlesResponse, X509svid, X509svidRequest, X509svidResponse};

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
                    let place = caller.filter(|_known| connections.len() < most).and_then(|cookie| callers.admit(cookie));
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

/// The network namespace in which the caller's socket was made.
#[derive(Clone, Copy, Debug)]
struct Caller(u64);

#[derive(Clone)]
struct Api {
    agent: Arc<Agent>,
    owner: Option<Arc<Owner>>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

async fn connection(api: Api, stream: UnixStream, place: Place) {
    let caller = Caller(place.cookie());
    let service = SpiffeWorkloadApiServer::new(api).map_request(move |mut request: http::Request<_>| {
        request.extensions_mut().insert(caller);
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
        let pod = self.caller(&request)?;
        let domain = trust_domain_id(&pod);
        let states = states(&self.agent, pod);
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
        let pod = self.caller(&request)?;
        let domain = trust_domain_id(&pod);
        let states = states(&self.agent, pod);
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
    /// The caller's pod, if it may ask at all.
    fn caller<T>(&self, request: &Request<T>) -> Result<Arc<Pod>, Status> {
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
        let Caller(cookie) = request.extensions().get().copied().ok_or_else(|| Status::internal("no caller"))?;
        let pod = self.agent.pods.borrow().get(&cookie).map(Arc::clone).ok_or_else(no_identity)?;
        let is_his = self.owner.as_ref().is_none_or(|owner| pod.record.uid.as_ref() == Some(&owner.uid));
        if is_his { Ok(pod) } else { Err(no_identity()) }
    }
}

/// What a stream follows.
struct States {
    cookie: u64,
    agent: Arc<Agent>,
    svid: watch::Receiver<Option<Arc<Svid>>>,
    bundle: watch::Receiver<Bundle>,
    /// The bundle sent last.
    sent: Bundle,
    fresh: bool,
    ended: bool,
}

fn states(agent: &Arc<Agent>, pod: Arc<Pod>) -> States {
    States {
        cookie: pod.record.netns_cookie,
        agent: Arc::clone(agent),
        svid: pod.svid.subscribe(),
        bundle: agent.authority.bundle(),
        sent: Bundle::default(),
        fresh: true,
        ended: false,
    }
}

impl States {
    /// Returns at once the first time, then after each change; a pod that is gone ends the stream. Nothing is held of the
    /// pod itself, so that its certificates end with it.
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
        let present = self.agent.pods.borrow().contains_key(&self.cookie);
        if changed.is_err() || !present { Err(no_identity()) } else { Ok(()) }
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
