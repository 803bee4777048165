//! `Expect: 100-continue` is answered by whom it was asked: the caller's body is not asked for before the application said
//! `100 Continue`, or one second passed, after which clients send anyway.
//!
//! Sources: RFC 9110 10.1.1 and 15.2.1. The codec says `100 Continue` to a client when its body is polled for the first
//! time, so a body that is held is not polled. Between two sidecars its HTTP/2 carries no interim answer; a second, small
//! request on the link, with the same token, is answered when the application says that it wants the body.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::attempt::Head;
use super::body::{Body, RequestBody};
use crate::dataplane::Proxy;
use crate::dataplane::pool::{Destination, Reuse, Speaks};
use crate::identity::spiffe::SpiffeId;

/// Requests that came over links and whose senders want to know when their bodies are wanted.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    by_token: Mutex<BTreeMap<Key, Arc<Notify>>>,
}

/// Tokens mean nothing to other peers than the one that made them.
type Key = (Option<SpiffeId>, HeaderValue);

/// One side's hold on a token: that of the request, or that of the one who asks.
#[derive(Debug)]
pub(crate) struct Entry {
    proxy: Arc<Proxy>,
    key: Key,
    notify: Arc<Notify>,
}

/// A question to a peer, and whether it said that the body is wanted.
type Asking<'a> = Pin<Box<dyn Future<Output = bool> + Send + 'a>>;

/// The body of a request whose caller waits to be told to send it.
#[derive(Clone, Debug)]
pub(crate) struct Expectation {
    body: RequestBody,
    /// Who is to be told beside the body. The codec may keep this longer than the request lives, so it holds no token.
    asker: Option<Weak<Notify>>,
}

impl Entry {
    /// Takes hold of a token. `None`: there are too many, and the sender's patience is what ends the wait.
    pub(crate) fn new(proxy: &Arc<Proxy>, peer: Option<&SpiffeId>, token: &HeaderValue) -> Option<Self> {
        let key = (peer.cloned(), token.clone());
        let mut by_token = proxy.waiting.by_token.lock();
        if by_token.len() >= WAITING_MAX && !by_token.contains_key(&key) {
            return None;
        }
        let notify = Arc::clone(by_token.entry(key.clone()).or_default());
        drop(by_token);
        Some(Self { proxy: Arc::clone(proxy), key, notify })
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut by_token = self.proxy.waiting.by_token.lock();
        // One is the map's, one is this; a third is the other side's.
        if Arc::strong_count(&self.notify) <= 2 {
            by_token.remove(&self.key);
        }
    }
}

impl Expectation {
    /// Holds the body of a request that expects to be told. `None`: this one does not.
    pub(crate) fn hold(head: &Head, body: &RequestBody, asker: Option<&Entry>) -> Option<Self> {
        // "A server that receives a 100-continue expectation in an HTTP/1.0 request MUST ignore that expectation." A caller in
        // HTTP/2 cannot be told by the codec and is not kept waiting.
        let expects = head.version == Version::HTTP_11
            && head.upgrade.is_none()
            && head.headers.get(http::header::EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
        (expects && body.hold()).then(|| Self { body: body.clone(), asker: asker.map(|entry| Arc::downgrade(&entry.notify)) })
    }

    /// The body is wanted.
    pub(crate) fn met(&self) {
        self.body.release();
        if let Some(asker) = self.asker.as_ref().and_then(Weak::upgrade) {
            asker.notify_one();
        }
    }

    /// Has the application's word meet it.
    pub(crate) fn heed<B>(&self, request: &mut Request<B>) {
        let expectation = self.clone();
        hyper::ext::on_informational(request, move |interim| {
            if interim.status() == StatusCode::CONTINUE {
                expectation.met();
            }
        });
    }

    /// Waits for an answer, and meets the expectation when patience ends, or when the peer says that the body is wanted.
    ///
    /// It is large and seldom: boxed here, it takes no place in the future of every other request.
    pub(crate) fn wait<'a, T: Send + 'a>(
        &'a self,
        sending: impl Future<Output = T> + Send + 'a,
        asking: Option<Asking<'a>>,
    ) -> Pin<Box<dyn Future<Output = T> + Send + 'a>> {
        let mut sending = Box::pin(sending);
        let wanted = async move {
            let asked = async move {
                let said = match asking {
                    Some(asking) => asking.await,
                    None => false,
                };
                if !said {
                    std::future::pending::<()>().await;
                }
            };
            timeout(PATIENCE, asked).await.unwrap_or_default();
        };
        Box::pin(async move {
            tokio::select! {
                biased;
                sent = &mut sending => return sent,
                () = wanted => self.met(),
            }
            sending.await
        })
    }
}

/// Asks a peer to say when the body of the request with this token is wanted.
pub(crate) fn ask<'a>(proxy: &'a Arc<Proxy>, to: &Destination, uri: Uri, token: HeaderValue) -> Asking<'a> {
    // It is no request of the application's, and counts for none of its limits.
    let to = Destination { breaker: None, ..to.clone() };
    let mut request = Request::new(Body::Empty);
    *request.method_mut() = Method::OPTIONS;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = uri;
    request.headers_mut().insert(CONTINUE, token);
    Box::pin(async move {
        let sent = proxy.pool.send(&to, Speaks::Http2, request, Reuse::Allowed).await;
        sent.is_ok_and(|sent| sent.response.status() == StatusCode::NO_CONTENT)
    })
}

/// Answers such a question.
pub(crate) async fn answer(proxy: &Arc<Proxy>, peer: Option<&SpiffeId>, token: &HeaderValue) -> Response<Body> {
    let wanted = match Entry::new(proxy, peer, token) {
        Some(entry) => timeout(2 * PATIENCE, entry.notify.notified()).await.is_ok(),
        None => false,
    };
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = if wanted { StatusCode::NO_CONTENT } else { StatusCode::NOT_FOUND };
    response
}

/// On a request that crosses a link: what its sender asks with.
pub(crate) const EXPECT_TOKEN: HeaderName = HeaderName::from_static("outrigger-expect");
/// On the question whether the body of the request with this token is wanted.
pub(crate) const CONTINUE: HeaderName = HeaderName::from_static("outrigger-continue");
/// How long a body is held without a word: as long as curl waits, and Go's client by default.
const PATIENCE: Duration = Duration::from_secs(1);
/// Tokens at once.
const WAITING_MAX: usize = 1024;
