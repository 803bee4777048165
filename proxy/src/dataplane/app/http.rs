//! A GET at the own app: a probe, or its metrics.
//!
//! Source: the kubelet's HTTP prober (`pkg/probe/http`): 200 to 399 is well, a redirection to the same place is followed, any
//! other is taken as it is; each question has a connection of its own. A path is written as Go's `net/url` writes it.

use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Uri, header};
use axum::response::{IntoResponse as _, Response};
use futures_util::future::BoxFuture;
use http_body_util::Empty;
use hyper::body::{Bytes, Frame, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Sleep;

use super::tls;
use crate::base::net::BoxedIo;
use crate::model::app_doors::HttpDoor;

/// A connection to the app, on its way.
type Connected<'a> = BoxFuture<'a, Result<(BoxedIo, SocketAddr), String>>;

/// Is the app well?
pub(super) async fn probe<'a>(connect: impl Fn() -> Connected<'a>, door: &HttpDoor) -> Result<(), String> {
    let mut path = written(&door.path);
    for _step in 0..=REDIRECTIONS_MAX {
        let (io, at) = connect().await?;
        let answer = asked(io, at, &path, door).await?;
        match answer.status().as_u16() {
            300..400 => match same_place(answer.headers(), at) {
                Some(next) => path = next,
                None => return Ok(()),
            },
            200..300 => return Ok(()),
            status => return Err(format!("the app answered with status {status}")),
        }
    }
    Err(format!("the app redirected more than {REDIRECTIONS_MAX} times"))
}

/// The head of the answer to one question; its body interests nobody.
async fn asked(io: BoxedIo, at: SocketAddr, path: &str, door: &HttpDoor) -> Result<http::Response<Incoming>, String> {
    let io = if door.tls { tls::over(io, at).await? } else { io };
    let (mut sender, connection) = begin(io).await?;
    let mut request = request(at, path, door)?;
    request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    let mut answer = std::pin::pin!(sender.send_request(request));
    let answer = tokio::select! {
        answer = &mut answer => answer,
        // The answer may be there all the same.
        _ended = connection => answer.await,
    };
    answer.map_err(|error| format!("no answer from the app: {error}"))
}

/// A path and its query, with what may not stand in a path percent-encoded. A path with a `%` that encodes nothing encodes nothing
/// at all.
fn written(path: &str) -> String {
    let path = path.split_once('#').map_or(path, |(path, _fragment)| path);
    let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
    let encodes =
        |at: usize| path.get(at + 1..at + 3).is_some_and(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
    let is_encoded = path.match_indices('%').all(|(at, _sign)| encodes(at));
    let path = utf8_percent_encode(path, if is_encoded { PATH } else { PLAIN_PATH });
    query.map_or_else(|| path.to_string(), |query| format!("{path}?{query}"))
}

/// The app's metrics as they come; `reader` is given back when they have been read, or cannot be.
pub(super) async fn read(
    io: BoxedIo,
    at: SocketAddr,
    door: &HttpDoor,
    asked: &HeaderMap,
    reader: OwnedSemaphorePermit,
) -> Result<Response, String> {
    let io = if door.tls { tls::over(io, at).await? } else { io };
    let (mut sender, connection) = begin(io).await?;
    let mut request = request(at, &door.path, door)?;
    for name in [header::ACCEPT, header::ACCEPT_ENCODING, SCRAPE_TIMEOUT] {
        if let Some(value) = asked.get(&name) {
            request.headers_mut().insert(name, value.clone());
        }
    }
    let mut connection = Box::pin(connection);
    let answer = {
        let mut answer = std::pin::pin!(sender.send_request(request));
        tokio::select! {
            answer = &mut answer => answer,
            // The answer may be there all the same.
            _ended = &mut connection => answer.await,
        }
    };
    let (parts, body) = answer.map_err(|error| error.to_string())?.into_parts();
    let body = Carried { connection: Some(connection), body, until: Box::pin(tokio::time::sleep(READ_AT_MOST)), _reader: reader };
    let mut response = (parts.status, Body::new(body)).into_response();
    for name in [header::CONTENT_TYPE, header::CONTENT_ENCODING] {
        if let Some(value) = parts.headers.get(&name) {
            response.headers_mut().insert(name, value.clone());
        }
    }
    Ok(response)
}

type Connection = http1::Connection<TokioIo<BoxedIo>, Empty<Bytes>>;

async fn begin(io: BoxedIo) -> Result<(http1::SendRequest<Empty<Bytes>>, Connection), String> {
    http1::handshake(TokioIo::new(io)).await.map_err(|error| format!("no HTTP with the app: {error}"))
}

fn request(at: SocketAddr, path: &str, door: &HttpDoor) -> Result<Request<Empty<Bytes>>, String> {
    let path: Uri = path.parse().map_err(|error| format!("{path:?} is no path: {error}"))?;
    let mut request = Request::new(Empty::new());
    *request.uri_mut() = path;
    let headers = request.headers_mut();
    for (name, value) in &door.headers {
        let name: HeaderName = name.parse().map_err(|error| format!("{name:?} is no header: {error}"))?;
        let value = HeaderValue::from_str(value).map_err(|error| format!("the header {name} has no value: {error}"))?;
        headers.append(name, value);
    }
    if !headers.contains_key(header::HOST) {
        headers.insert(header::HOST, HeaderValue::from_str(&at.to_string()).map_err(|error| error.to_string())?);
    }
    for (name, value) in [(header::USER_AGENT, USER_AGENT), (header::ACCEPT, "*/*")] {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    Ok(request)
}

/// The path of a redirection that leads to where the app was asked.
fn same_place(headers: &HeaderMap, at: SocketAddr) -> Option<String> {
    let uri: Uri = headers.get(header::LOCATION)?.to_str().ok()?.parse().ok()?;
    let here = uri.authority().is_none_or(|authority| authority.as_str() == at.to_string());
    let path = uri.path_and_query().filter(|path| here && path.as_str().starts_with('/'))?;
    Some(path.as_str().to_owned())
}

/// A body that moves its own connection on while it is read: nobody else does.
struct Carried {
    connection: Option<Pin<Box<Connection>>>,
    body: Incoming,
    /// Who does not read leaves the place to others.
    until: Pin<Box<Sleep>>,
    _reader: OwnedSemaphorePermit,
}

impl hyper::body::Body for Carried {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        if self.until.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Some(Err("the app's metrics were not read in time".into())));
        }
        if let Some(connection) = &mut self.connection
            && connection.as_mut().poll(cx).is_ready()
        {
            self.connection = None;
        }
        Pin::new(&mut self.body).poll_frame(cx).map_err(Into::into)
    }
}

const REDIRECTIONS_MAX: usize = 10;
/// How long the app's metrics may be read.
const READ_AT_MOST: Duration = Duration::from_secs(60);
/// What Go encodes in a path that holds encoded signs (RFC 3986 3.3: all that is no `pchar`; brackets it leaves).
const PATH: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'\\')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}');
const PLAIN_PATH: &AsciiSet = &PATH.add(b'%');
/// Apps know the kubelet by how it begins.
const USER_AGENT: &str = concat!("kube-probe/outrigger-", env!("CARGO_PKG_VERSION"));
const SCRAPE_TIMEOUT: HeaderName = HeaderName::from_static("x-prometheus-scrape-timeout-seconds");
