//! Serves HTTP to a client: limits on heads, times for them, and a stop that lets what is under way end.
//!
//! Sources: RFC 9112, RFC 9113, RFC 6585 5 (431).

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};

use super::pipeline::{self, Connection};
use super::record::ConnectionRecord;
use crate::base::net::BoxedIo;
use crate::dataplane::pool::{CONNECTION_WINDOW, STREAM_WINDOW};
use crate::telemetry::Protocol;
use crate::telemetry::reason::Reason;

/// What a client speaks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Serves {
    Http1,
    Http2,
    /// HTTP/2 from another sidecar.
    Link,
}

/// Serves until the client leaves or the sidecar stops.
pub(crate) async fn serve(io: BoxedIo, serves: Serves, connection: Arc<Connection>) {
    let protocol = match serves {
        Serves::Http1 => Protocol::Http1,
        Serves::Http2 => Protocol::Http2,
        Serves::Link => Protocol::Link,
    };
    let _open = connection.proxy.telemetry.metrics.connection(connection.direction, protocol, connection.link);
    let service = {
        let connection = Arc::clone(&connection);
        service_fn(move |request| {
            let connection = Arc::clone(&connection);
            async move { Ok::<_, Infallible>(pipeline::handle(connection, request).await) }
        })
    };
    let mut drain = connection.drain.clone();
    let ended = match serves {
        Serves::Http1 => {
            let served = http1::Builder::new()
                .preserve_header_case(true)
                .auto_date_header(false)
                .half_close(true)
                .max_header_size(HEADER_BYTES)
                .max_headers(HEADERS_MAX)
                .header_read_timeout(HEAD_MAX)
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(io), service)
                .with_upgrades();
            // Large, and one for as long as the connection lives: kept out of the future of every other connection.
            let mut served = Box::pin(served);
            tokio::select! {
                ended = &mut served => ended,
                () = drain.stopped() => {
                    served.as_mut().graceful_shutdown();
                    served.await
                }
            }
        }
        Serves::Http2 | Serves::Link => {
            let mut builder = http2::Builder::new(connection.proxy.tasks.clone());
            builder
                .auto_date_header(false)
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_header_list_size(HEADER_BYTES_MAX)
                .max_concurrent_streams(STREAMS_MAX)
                .timer(TokioTimer::new());
            if serves == Serves::Link {
                builder.enable_connect_protocol();
            }
            let served = builder.serve_connection(TokioIo::new(io), service);
            // Large, and one for as long as the connection lives: kept out of the future of every other connection.
            let mut served = Box::pin(served);
            tokio::select! {
                ended = &mut served => ended,
                () = drain.stopped() => {
                    served.as_mut().graceful_shutdown();
                    served.await
                }
            }
        }
    };
    if let Err(error) = ended {
        tell(&connection, protocol, &error);
    }
}

/// A connection that ended in an error of the client's: hyper answered it, or could not, before there was a request to
/// record.
fn tell(connection: &Connection, protocol: Protocol, error: &hyper::Error) {
    tracing::debug!(error = error as &dyn std::error::Error, "a connection ended early");
    let reason = if error.is_parse_too_large() {
        Reason::HeadersTooLarge
    } else if error.is_parse() {
        Reason::BadRequest
    } else {
        // Idle connections end here too, and what broke with a request under way is in the request's record.
        return;
    };
    let mut record = ConnectionRecord::start(&connection.proxy, connection.direction, connection.peer.address);
    record.protocol = protocol;
    record.reason = reason;
    record.ends.source.clone_from(&connection.peer.identity);
    record.ends.mtls = connection.link;
}

/// The largest head, request line and header block together.
const HEADER_BYTES: usize = 64 * 1024;
/// The same for HTTP/2, in its way of counting.
pub(crate) const HEADER_BYTES_MAX: u32 = 64 * 1024;
/// The most headers in one block.
const HEADERS_MAX: usize = 256;
/// From the first byte of a head, or from the last answer, to the end of the next head. Longer than a client keeps an
/// idle connection, so that it is the client that closes it.
const HEAD_MAX: Duration = Duration::from_secs(15 * 60);
/// Requests at once on one connection.
const STREAMS_MAX: u32 = 1_000;
