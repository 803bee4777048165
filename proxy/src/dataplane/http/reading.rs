//! What a sidecar reads of a request of HTTP/1 before it decides about it, or why it refuses to read it: the codec, the guard
//! and the rules of the line, for tools that tell what would happen. Nothing is sent.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::request::Parts;
use http::{Request, Response};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;

use super::guard::{Guarded, Turn};
use super::normalize::{self, Target};
use super::reject::Reject;
use super::server::codec_http1;
use super::spelling::Odd;
use crate::policy::limits::Limits;

/// A request as everything after decides about it.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) parts: Parts,
    pub(crate) target: Target,
}

/// Reads a request whose head is all that there is of it.
///
/// # Errors
/// How a sidecar with these limits refuses it.
pub(crate) fn read(head: Bytes, limits: &Limits) -> Result<Read, Reject> {
    let mut parts = decoded(head, limits)?;
    normalize::within_limits(&parts, normalize::head_bytes(&parts), limits)?;
    let target = normalize::target(&parts)?;
    normalize::host_of_absolute_form(&mut parts)?;
    normalize::strip_hop_by_hop(&mut parts.headers);
    normalize::take_reserved(&mut parts.headers, false)?;
    Ok(Read { parts, target })
}

/// What the codec makes of a head.
fn decoded(head: Bytes, limits: &Limits) -> Result<Parts, Reject> {
    let turn = Turn::new(*limits, true);
    let seen = Arc::new(Mutex::new(None));
    let service = service_fn(|request: Request<Incoming>| {
        let (_, odd) = turn.asked(false, false);
        let (mut parts, _) = request.into_parts();
        if odd != Odd::default() {
            parts.extensions.insert(odd);
        }
        *seen.lock() = Some(parts);
        std::future::ready(Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new())))
    });
    let guarded = Guarded::new(head, Box::new(tokio::io::empty()), Arc::clone(&turn));
    let mut served = pin!(codec_http1(limits).serve_connection(TokioIo::new(guarded), service));
    // Everything is there already: whatever the codec still waits for will not come.
    let mut ended = None;
    for _turn in 0..TURNS {
        if let Poll::Ready(end) = served.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            ended = end.err();
            break;
        }
    }
    let parts = seen.lock().take();
    parts.ok_or_else(|| {
        let refusal = ended.and_then(|error| turn.refusal(&error));
        refusal.unwrap_or(Reject::BadRequest("the request is not valid HTTP/1"))
    })
}

/// How often the codec is let go on with a head of the largest size.
const TURNS: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn told(head: &str) -> String {
        match read(Bytes::from(format!("{head}\r\n\r\n")), &Limits::default()) {
            Ok(Read { parts, target }) => {
                let authority = target.authority.map(|authority| authority.to_string()).unwrap_or_default();
                format!("{} {authority} {} {}", parts.method, target.path_and_query, parts.headers.len())
            }
            Err(reject) => {
                let told = reject.told();
                format!("{} {}", told.status.as_u16(), told.reason.as_str())
            }
        }
    }

    #[test]
    fn what_can_be_read_is_read_as_the_line_reads_it() {
        assert_eq!(told("GET /%61/../b?c HTTP/1.1\r\nHost: Web.shop:80\r\nConnection: x-a\r\nX-A: 1"), "GET web.shop:80 /b?c 1");
        assert_eq!(told("OPTIONS * HTTP/1.1\r\nHost: web"), "OPTIONS web * 1");
        assert_eq!(told("GET http://api/a HTTP/1.1\r\nHost: web"), "GET api /a 1");
        assert_eq!(told("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 5"), "POST web / 2");
        assert_eq!(told("POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked"), "POST web / 1");
    }

    #[test]
    fn what_the_line_refuses_is_refused_with_its_status_and_reason() {
        let long = "a".repeat(70_000);
        for (head, refusal) in [
            ("GET / HTTP/1.1", "400 bad_request"),
            ("GET / HTTP/1.1\r\nHost:", "400 bad_request"),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: b", "400 bad_request"),
            ("GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip", "400 bad_request"),
            ("GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked", "501 bad_request"),
            ("GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked", "400 bad_request"),
            ("GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked", "400 bad_request"),
            ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked", "400 bad_request"),
            ("GET /a#b HTTP/1.1\r\nHost: a", "400 bad_request"),
            ("GET * HTTP/1.1\r\nHost: a", "400 bad_request"),
            ("GET / HTTP/1.1\r\nHost: a\r\noutrigger-upgrade: b", "400 reserved_header"),
            (&format!("GET / HTTP/1.1\r\nHost: a\r\nX: {long}"), "431 headers_too_large"),
            (&format!("GET /{long} HTTP/1.1\r\nHost: a"), "414 uri_too_long"),
            (&format!("GET / HTTP/1.1\r\nHost: a{}", "\r\nX: 1".repeat(300)), "431 headers_too_large"),
        ] {
            assert_eq!(told(head), refusal, "{}", head.get(..80).unwrap_or(head));
        }
    }
}
