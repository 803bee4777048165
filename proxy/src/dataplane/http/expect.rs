//! `Expect: 100-continue` is answered by whom it was asked: a sidecar says `100 Continue` when the application said it, and
//! never by itself. Until then the caller's body is not asked for, or until one second passed, after which clients send anyway.
//!
//! Sources: RFC 9110 10.1.1 and 15.2.1. The codec says `100 Continue` to a client when its body is polled for the first time;
//! whoever stands beneath it takes that away ([`CONTINUE`]). Invariants: the timer lets a body pass, and tells nobody anything;
//! whoever is answered without having been told, and did not begin by itself, is not listened to any more, for nobody knows what
//! it would say next.

use std::pin::Pin;
use std::time::Duration;

use http::header::EXPECT;
use http::{HeaderMap, HeaderName, Response, StatusCode, Version};
use tokio::time::sleep;

use super::body::{Body, HeldBody, RequestBody};

/// The body of a request whose caller waits to be told to send it.
#[derive(Clone, Debug)]
pub(crate) struct Expectation(HeldBody);

impl Expectation {
    /// Holds the body of a request that expects to be told. `None`: this one does not.
    pub(crate) fn hold(version: Version, headers: &HeaderMap, body: &RequestBody) -> Option<Self> {
        if is_expected(version, headers) { body.hold().map(Self) } else { None }
    }

    /// The body that is held.
    pub(crate) fn body(&self) -> HeldBody {
        self.0.clone()
    }

    /// Waits for an answer, and lets the body pass when patience ends.
    ///
    /// It is large and seldom: boxed here, it takes no place in the future of every other request.
    pub(crate) fn wait<'a, T: Send + 'a>(
        &'a self,
        sending: impl Future<Output = T> + Send + 'a,
    ) -> Pin<Box<dyn Future<Output = T> + Send + 'a>> {
        let mut sending = Box::pin(sending);
        Box::pin(async move {
            tokio::select! {
                biased;
                sent = &mut sending => return sent,
                () = sleep(PATIENCE) => self.0.let_pass(),
            }
            sending.await
        })
    }
}

/// Does a caller wait to be told that its body is wanted? What else it expects, in the same line or in another, is for the
/// application to meet or to refuse: whoever does not know an expectation "MAY respond with a 417", and need not (RFC 9110 10.1.1).
pub(super) fn is_expected(version: Version, headers: &HeaderMap) -> bool {
    let mut expected = headers.get_all(EXPECT).iter().flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
    // "A server that receives a 100-continue expectation in an HTTP/1.0 request MUST ignore that expectation."
    version != Version::HTTP_10 && expected.any(|one| one.trim_ascii().eq_ignore_ascii_case(b"100-continue"))
}

/// Answers a sidecar of an earlier version, which asks on a link whether a body is wanted: it hears that nobody knows, and
/// waits for as long as it is patient.
pub(crate) fn answer() -> Response<Body> {
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::NOT_FOUND;
    response
}

/// What the codec of HTTP/1 says by itself.
pub(crate) const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
/// On the question of a sidecar of an earlier version.
pub(crate) const ASKED: HeaderName = HeaderName::from_static("outrigger-continue");
/// How long a body is held without a word: as long as curl waits, and Go's client by default.
const PATIENCE: Duration = Duration::from_secs(1);
