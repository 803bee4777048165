//! Serves HTTP to a client: limits on heads, times for them, and a stop that lets what is under way end.
//!
//! Sources: RFC 9112, RFC 9113, RFC 6585 5 (431).

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH};
use http::{HeaderValue, Method, Request, StatusCode, Version};
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::time::Instant;

use super::credit::BASE;
use super::expect;
use super::frames::{self, Framed, HEADERS_READ, Rings, Stands, Traffic};
use super::guard::{self, Clock, Guarded, Late, Turn, Watched};
use super::inflow::Inflow;
use super::normalize::{self, Coding};
use super::pipeline::{self, Beside, Connection};
use super::record::{Ends, Record};
use super::reject::{REASON, Reject};
use super::rest;
use super::revoked;
use super::spelling::Odd;
use super::streams::Streams;
use super::tunnel::Upgrading;
use crate::base::net::BoxedIo;
use crate::dataplane::pool::{RESET_KEPT, RESETS_KEPT, STREAM_WINDOW};
use crate::dataplane::sniff::Prefixed;
use crate::dataplane::wire::Wire;
use crate::policy::limits::Limits;
use crate::telemetry::Protocol;

/// What a client speaks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Serves {
    Http1,
    Http2,
}

/// Serves a client, of whom `first` was read already, until it leaves or the sidecar stops.
pub(crate) async fn serve(first: Bytes, io: BoxedIo, serves: Serves, connection: Arc<Connection>) {
    let protocol = match serves {
        Serves::Http1 => Protocol::Http1,
        Serves::Http2 => Protocol::Http2,
    };
    let mtls = connection.peer.identity.is_some();
    let _open = connection.proxy.telemetry.metrics.connection(connection.direction, protocol, mtls);
    match serves {
        Serves::Http1 => serve_http1(first, io, connection).await,
        Serves::Http2 => Box::pin(serve_http2(Wire::plain(Prefixed::join(first, io)), connection)).await,
    }
}

/// Serves another sidecar, which speaks HTTP/2.
pub(crate) async fn serve_link(wire: Wire, connection: Arc<Connection>) {
    let _open = connection.proxy.telemetry.metrics.connection(connection.direction, Protocol::Link, connection.link);
    serve_http2(wire, connection).await;
}

/// How the codec's part of a connection ended.
enum Ended {
    Served(hyper::Result<()>),
    Late(Late),
    /// Its client is shut out.
    Revoked,
}

/// A codec, for as long as there is something for it to do, and the rest between.
async fn serve_http1(first: Bytes, io: BoxedIo, connection: Arc<Connection>) {
    let mut talk = Talk { first, io, since: None, rests: true };
    loop {
        // Large, and gone while the connection rests.
        let Some(rests) = Box::pin(talk_http1(talk, Arc::clone(&connection))).await else { return };
        talk = rests;
        if let (true, Some(since)) = (talk.first.is_empty(), talk.since) {
            let until = since + connection.limits.idle_timeout;
            let Some(first) = rest::rest(&mut talk.io, &connection, until).await else { return };
            talk.first = first;
        }
    }
}

/// A connection of HTTP/1 without its codec.
struct Talk {
    /// What was read and not understood yet.
    first: Bytes,
    io: BoxedIo,
    /// Where requests were answered: since when it is idle.
    since: Option<Instant>,
    /// It may rest when it is idle.
    rests: bool,
}

/// Serves until the connection is over, or may rest.
async fn talk_http1(talk: Talk, connection: Arc<Connection>) -> Option<Talk> {
    let Talk { first, io, since, rests } = talk;
    let limits = connection.limits;
    let turn = Turn::new(limits, since.is_none());
    let service = {
        let (turn, connection) = (Arc::clone(&turn), Arc::clone(&connection));
        service_fn(move |mut request: Request<Incoming>| {
            let uploads = !request.body().is_end_stream();
            let expects = uploads && expect::is_expected(request.version(), request.headers());
            let (version, tunnels) = (request.version(), *request.method() == Method::CONNECT);
            let miscoded = uploads && normalize::coding(request.headers()) == Coding::Faulty;
            let (spelling, odd) = turn.asked(uploads, expects);
            let reading = uploads.then(|| turn.body_read());
            let (turn, connection) = (Arc::clone(&turn), Arc::clone(&connection));
            let unreached = connection.is_unreached();
            async move {
                if odd != Odd::default() {
                    request.extensions_mut().insert(odd);
                }
                let upgrading = request.extensions_mut().remove::<OnUpgrade>().map(Upgrading::codec);
                let request = request.map(|body| Inflow::Codec(body, reading));
                let beside = Beside { spelling, interims: &turn.interims, broke: None };
                let mut answer = pipeline::handle(connection, request, beside, upgrading).await;
                turn.interims.through().await;
                let invalid = answer.status() == StatusCode::BAD_REQUEST && answer.headers().contains_key(&REASON);
                // Nobody knows what comes next from a client that was not told to send its body. Whoever answers "instead of
                // reading the entire message content SHOULD indicate whether it intends to close" (RFC 9110 10.1.1).
                let untold = expects && !turn.interims.is_told() && turn.is_uploading();
                // Nor from one whose request was not valid. "The server MUST close the connection after responding to such a
                // request" (RFC 9112 6.1).
                let tunnel = answer.status() == StatusCode::SWITCHING_PROTOCOLS || (tunnels && answer.status().is_success());
                // Nor from one whose tunnel was declined: what it sent ahead into it would be read as requests.
                let lengthless = answer.body().size_hint().exact().is_none() && !answer.headers().contains_key(CONTENT_LENGTH);
                let until_close = !tunnel && version == Version::HTTP_10 && lengthless;
                let closes = odd.framed_twice || miscoded || invalid || unreached || untold || (tunnels && !tunnel);
                if closes {
                    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                if closes || until_close {
                    // Or the codec says to a client of HTTP/1.0 who asked for it that the connection stays.
                    *answer.version_mut() = version;
                }
                if tunnel {
                    turn.tunnel();
                } else if until_close {
                    turn.until_close();
                }
                Ok::<_, Infallible>(answer.map(|body| Watched::new(body, turn)))
            }
        })
    };
    let served =
        codec_http1(&limits).serve_connection(TokioIo::new(Guarded::new(first, io, Arc::clone(&turn))), service).with_upgrades();
    // Large, and one for as long as the connection lives: kept out of the future of every other connection.
    let mut served = Box::pin(served);
    let mut drain = connection.drain.clone();
    let mut clock = Clock::start(&turn, since, rests);
    let mut revoked = pin!(revoked::requests(&connection, || turn.is_under_way()));
    let mut stopping = false;
    let ended = loop {
        tokio::select! {
            // The clock looks at what the codec did.
            biased;
            ended = &mut served => break Ended::Served(ended),
            late = poll_fn(|cx| clock.poll_late(&turn, cx)) => break Ended::Late(late),
            () = &mut revoked => break Ended::Revoked,
            () = drain.stopped(), if !stopping => {
                stopping = true;
                served.as_mut().graceful_shutdown();
            }
        }
    };
    // The stream comes back from the codec.
    let unread = Pin::into_inner(served).into_parts().map(|parts| parts.read_buf).unwrap_or_default();
    let reject = match ended {
        Ended::Late(Late::Rest) if !stopping => {
            let io = turn.take_back()?;
            // There are no bytes of a next request by all that is known of those that passed. If the codec knows better,
            // they are not lost.
            let empty = unread.iter().all(|byte| matches!(byte, b'\r' | b'\n'));
            let first = if empty { Bytes::new() } else { unread };
            return Some(Talk { first, io, since: Some(clock.since()), rests: empty });
        }
        // A close with bytes unread would be a reset, which takes the answer away.
        Ended::Served(Ok(())) if turn.is_uploading() => {
            if let Some(io) = turn.take_back() {
                guard::linger(io).await;
            }
            return None;
        }
        Ended::Late(Late::Reader | Late::Left) | Ended::Revoked if turn.is_cut_short() => {
            if let Some(io) = turn.take_back() {
                guard::cut(io).await;
            }
            return None;
        }
        // Whatever broke with a request under way is in the request's record.
        Ended::Served(Ok(())) | Ended::Late(Late::Idle | Late::Reader | Late::Left | Late::Rest) | Ended::Revoked => return None,
        Ended::Served(Err(error)) => {
            tracing::debug!(error = &error as &dyn std::error::Error, "a connection ended early");
            match turn.refusal(&error) {
                Some(reject) => reject,
                None => {
                    if let Some(io) = turn.take_back().filter(|_| turn.is_cut_short()) {
                        guard::cut(io).await;
                    }
                    return None;
                }
            }
        }
        Ended::Late(Late::Head) => Reject::RequestTimeout,
    };
    refused(&connection, Protocol::Http1, &reject);
    if let Some(io) = turn.take_back() {
        guard::refuse(io, &reject).await;
    }
    None
}

async fn serve_http2(wire: Wire, connection: Arc<Connection>) {
    let limits = connection.limits;
    let traffic = Traffic::new(limits);
    let mut drain = connection.drain.clone();
    let mut codec = h2::server::Builder::new();
    codec
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(BASE)
        .data_frame_budget(SMALL_FRAMES)
        // A head over the limit is refused in our words, one over this limit in those of the codec.
        .max_header_list_size(limits.header_bytes.saturating_mul(HEADERS_READ))
        .max_concurrent_streams(limits.concurrent_streams)
        .max_pending_accept_reset_streams(size(limits.pending_resets))
        .max_local_error_reset_streams(Some(size(limits.error_resets)))
        .max_send_buffer_size(SEND_BUFFER)
        .enable_connect_protocol();
    if connection.link {
        // Refused uploads of many clients may still be on the way.
        codec.max_concurrent_reset_streams(RESETS_KEPT).reset_stream_duration(RESET_KEPT);
    }
    let framed = Framed::new(wire.clone(), Arc::clone(&traffic));
    // Large, and one for as long as the connection lives: kept out of the future of every other connection.
    let mut served = Box::pin(Streams::new(&codec, framed, Arc::clone(&traffic), Arc::clone(&connection)));
    let mut clock = frames::Clock::start(&traffic, connection.proxy.dice.lock().fraction());
    // Every request holds the connection on which it came; nobody else does who is not there by now.
    let at_rest = Arc::strong_count(&connection);
    let mut revoked = pin!(revoked::requests(&connection, || Arc::strong_count(&connection) > at_rest));
    let mut stopping = connection.is_unreached();
    if stopping {
        served.graceful_shutdown();
    }
    let protocol = if connection.link { Protocol::Link } else { Protocol::Http2 };
    let driven = async {
        loop {
            tokio::select! {
                // The clock looks at what the codec did.
                biased;
                ended = &mut served => break Some(ended),
                () = traffic.breached() => break None,
                () = &mut revoked => break None,
                reject = poll_fn(|_cx| traffic.refused_unseen().map_or(Poll::Pending, Poll::Ready)) => {
                    refused(&connection, protocol, &reject);
                    // The next ones are refused when the codec runs again.
                    while let Some(reject) = traffic.refused_unseen() {
                        refused(&connection, protocol, &reject);
                    }
                }
                rings = poll_fn(|cx| clock.poll_rings(&traffic, cx)) => match rings {
                    // Whoever still uses it is waited for as before.
                    Rings::Old => served.graceful_shutdown(),
                    // Who has requests under way waits for something, be it a watch on which nothing changes for hours, as long
                    // as it is there.
                    Rings::Late(Stands::Idle) if Arc::strong_count(&connection) > at_rest => {
                        if !served.ask_whether_there() {
                            break None;
                        }
                    }
                    // Nobody else is waited for.
                    Rings::Late(Stands::Idle) if !stopping => {
                        stopping = true;
                        served.graceful_shutdown();
                    }
                    Rings::Late(Stands::Idle) => break None,
                    Rings::Late(stands) => {
                        traffic.late(stands);
                        break None;
                    }
                },
                () = drain.stopped(), if !stopping => {
                    stopping = true;
                    served.graceful_shutdown();
                }
            }
        }
    };
    let ended = wire.clone().drive(driven).await;
    let late = traffic.is_late();
    drop(served);
    if connection.revoked.get().is_some() {
        return;
    }
    while let Some(reject) = traffic.refused_unseen() {
        refused(&connection, protocol, &reject);
    }
    if let Some(frames::Breach { reject, stream }) = traffic.breach() {
        refused(&connection, protocol, &reject);
        if traffic.between_frames() {
            let told = reject.told();
            let mut words = stream.map_or_else(Vec::new, |stream| frames::answer(stream, &told));
            words.extend(frames::calm(&told.text));
            wire.clone().drive(guard::farewell(wire, &words)).await;
        }
        return;
    }
    match late {
        Some(Stands::Head) => return refused(&connection, protocol, &Reject::RequestTimeout),
        Some(Stands::Reader) => return refused(&connection, protocol, &Reject::SlowReader),
        Some(Stands::Idle) | None => {}
    }
    let Some(Err(error)) = ended else { return };
    tracing::debug!(%error, "a connection ended early");
    // The client is told by a GOAWAY, which has no place for our words.
    if error.is_library() && error.is_go_away() {
        refused(&connection, protocol, &traffic.likely(&error));
    }
}

/// The codec of HTTP/1, which keeps the limits on heads.
pub(super) fn codec_http1(limits: &Limits) -> http1::Builder {
    let mut codec = http1::Builder::new();
    codec
        .auto_date_header(false)
        .half_close(true)
        .max_header_size(size(limits.header_bytes))
        .max_headers(size(limits.header_count))
        .max_buf_size(READ_BUFFER.max(size(limits.header_bytes.saturating_add(limits.uri_bytes))))
        // A clock of our own tells waiting for a head from waiting within one.
        .header_read_timeout(None);
    codec
}

/// Tells of a request that was refused before it was one.
fn refused(connection: &Arc<Connection>, protocol: Protocol, reject: &Reject) {
    let Connection { proxy, direction, peer, original, .. } = &**connection;
    let mut record = Record::start(connection, protocol);
    record.ends = Ends::of(proxy, *direction, peer.identity.as_ref(), *original);
    let told = reject.told();
    record.refused(reject, &told);
    // It is rare and somebody asks for it: it is always written, in words that the reason alone does not have.
    record.logged(true);
    record.detail(told.text);
}

fn size(limit: u32) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX)
}

/// What the codec of HTTP/1 reads ahead of whoever takes it: a head, which may be no longer, or as much of a body. A body of
/// 64 KiB and its head are there at once, and one that nobody takes holds no more than this.
pub(crate) const READ_BUFFER: usize = 72 * 1024;
/// By how much the frames that a connection holds may be short of 256 bytes, all together: those of some forty streams of
/// messages of 100 bytes that nobody reads. Each of them costs the sidecar about as much, whatever it carries.
const SMALL_FRAMES: usize = 16 << 20;
/// What one stream may have waiting to be sent beyond its client's window.
const SEND_BUFFER: usize = 64 * 1024;
